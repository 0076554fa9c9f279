//! `headwater stat`: what a journal is, how far it reaches, its segments.

use std::io::{self, Write};

use crate::{Checkpoint, Corruption, Journal, Position, SegmentInfo};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::events::Time;
use super::failure::Failure;
use super::{Target, target};

pub(crate) fn run(args: &Target) -> Result<(), Failure> {
    let (journal, corruption) = target::open(&args.dir)?;
    let times = Times::of(&journal)?;
    let mirrors = mirrors(args);
    let mut out = io::stdout().lock();
    if args.json {
        let value = to_json(&journal, corruption.as_ref(), &times, &mirrors);
        writeln!(out, "{value}")?;
    } else {
        print(&mut out, &journal, &times, &mirrors)?;
    }
    out.flush()?;
    corruption.map_or(Ok(()), |corruption| Err(Failure::Damaged(corruption)))
}

/// A mirror of the store, or why it can't be opened.
struct Mirror {
    name: String,
    state: Result<Checkpoint, Failure>,
}

fn mirrors(args: &Target) -> Vec<Mirror> {
    let open = |(name, path): (String, std::path::PathBuf)| {
        let state = target::open(&path).and_then(|(journal, corruption)| match corruption {
            None => Ok(journal.end()),
            Some(corruption) => Err(Failure::Damaged(corruption)),
        });
        Mirror { name, state }
    };
    target::mirrors(&args.dir).into_iter().map(open).collect()
}

/// When the first and the last event were recorded.
struct Times {
    first_us: Option<i64>,
    last_us: Option<i64>,
}

impl Times {
    fn of(journal: &Journal) -> Result<Self, Failure> {
        let at = |position: Position| -> Result<Option<i64>, Failure> {
            let event = journal.read_all(position)?.next().transpose()?;
            Ok(event.map(|event| event.recorded_at_us()))
        };
        let last = Position::new(journal.end().position.get().saturating_sub(1));
        Ok(Self { first_us: at(journal.start().position)?, last_us: at(last)? })
    }
}

fn file_bytes(segment: &SegmentInfo) -> u64 {
    std::fs::metadata(&segment.path).map_or(0, |metadata| metadata.len())
}

const fn state(segment: &SegmentInfo) -> &'static str {
    if segment.sealed { "sealed" } else { "active" }
}

fn to_json(
    journal: &Journal,
    corruption: Option<&Corruption>,
    times: &Times,
    mirrors: &[Mirror],
) -> Value {
    let end = journal.end();
    let segment = |segment: &SegmentInfo| {
        json!({
            "number": segment.number,
            "path": segment.path.display().to_string(),
            "state": state(segment),
            "base_position": segment.base_position.get(),
            "end_position": segment.end_position.get(),
            "base_offset": segment.base_offset,
            "end_offset": segment.end_offset,
            "file_bytes": file_bytes(segment),
        })
    };
    let mirror = |mirror: &Mirror| match &mirror.state {
        Ok(end) => json!({
            "name": mirror.name,
            "journal": end.journal.to_string(),
            "end_position": end.position.get(),
            "chain": end.chain.to_string(),
        }),
        Err(_) => json!({ "name": mirror.name, "error": true }),
    };
    json!({
        "journal": journal.id().to_string(),
        "node": journal.node().to_string(),
        "role": journal.role().to_string(),
        "path": journal.dir().display().to_string(),
        "first_position": journal.start().position.get(),
        "end_position": end.position.get(),
        "end_offset": end.offset,
        "chain": end.chain.to_string(),
        "epoch": end.epoch,
        "incarnation": end.incarnation.to_string(),
        "first_recorded_at_us": times.first_us,
        "last_recorded_at_us": times.last_us,
        "segments": journal.segments().iter().map(segment).collect::<Vec<_>>(),
        "mirrors": mirrors.iter().map(mirror).collect::<Vec<_>>(),
        "damage": corruption.map(ToString::to_string),
    })
}

fn print(
    out: &mut impl Write,
    journal: &Journal,
    times: &Times,
    mirrors: &[Mirror],
) -> io::Result<()> {
    let end = journal.end();
    let time = |us: Option<i64>| us.map_or_else(|| "-".to_owned(), |us| Time(us).to_string());
    let mut table = plain();
    table.add_row(vec!["journal".to_owned(), journal.id().to_string()]);
    table.add_row(vec!["role".to_owned(), journal.role().to_string()]);
    table.add_row(vec!["node".to_owned(), journal.node().to_string()]);
    table.add_row(vec!["path".to_owned(), journal.dir().display().to_string()]);
    table.add_row(vec!["events".to_owned(), end.position.to_string()]);
    let first = journal.start().position;
    if first > Position::START {
        table.add_row(vec!["removed in front of".to_owned(), first.to_string()]);
    }
    table.add_row(vec!["bytes of batches".to_owned(), end.offset.to_string()]);
    table.add_row(vec!["chain at the end".to_owned(), end.chain.to_string()]);
    table.add_row(vec!["epoch".to_owned(), end.epoch.to_string()]);
    table.add_row(vec!["first recorded".to_owned(), time(times.first_us)]);
    table.add_row(vec!["last recorded".to_owned(), time(times.last_us)]);
    writeln!(out, "{}\n", table.trim_fmt())?;

    let mut table = plain();
    table.set_header(["segment", "state", "positions", "batch bytes", "file bytes", "file"]);
    for segment in journal.segments() {
        table.add_row(vec![
            segment.number.to_string(),
            state(&segment).to_owned(),
            format!("{}..{}", segment.base_position, segment.end_position),
            segment.end_offset.saturating_sub(segment.base_offset).to_string(),
            file_bytes(&segment).to_string(),
            segment.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        ]);
    }
    right(&mut table, &[0, 3, 4]);
    writeln!(out, "{}", table.trim_fmt())?;

    if !mirrors.is_empty() {
        let mut table = plain();
        table.set_header(["mirror", "journal", "events"]);
        for mirror in mirrors {
            table.add_row(match &mirror.state {
                Ok(end) => {
                    vec![mirror.name.clone(), end.journal.to_string(), end.position.to_string()]
                }
                Err(_) => vec![mirror.name.clone(), "unreadable: see stat on it".to_owned()],
            });
        }
        right(&mut table, &[2]);
        writeln!(out, "\n{}", table.trim_fmt())?;
    }
    Ok(())
}

/// A table without lines, as wide as its contents: for people and for `awk`.
pub(crate) fn plain() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

pub(crate) fn right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
