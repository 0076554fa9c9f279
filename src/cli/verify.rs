//! `headwater verify`: reads every byte.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fs::{Fs, os::OsFs};
use crate::journal::layout;
use crate::journal::orphans::orphans_in;
use crate::{Damage, Orphans, SegmentCheck, SegmentState, VerifyProgress, VerifyReport};
use serde_json::{Value, json};

use super::failure::Failure;
use super::stat::{plain, right};
use super::target::orphan;
use super::{Target, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Also checks what checksums can't tell: revisions, epochs and durable ends, through the whole journal
    #[arg(long)]
    deep: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut meter = Meter::new();
    let (dir, deep) = (target::journal_dir(&args.target.dir), args.deep);
    let args = &args.target;
    let mut show = |progress| meter.show(progress);
    let report = match deep {
        true => crate::verify_deep(&OsFs, &dir, &mut show),
        false => crate::verify(&OsFs, &dir, &mut show),
    };
    meter.clear();
    let report = report?;
    let mut out = io::stdout().lock();
    let beside = Beside::of(&dir);
    if args.json {
        writeln!(out, "{}", to_json(&report, &beside))?;
    } else {
        print(&mut out, &report, &beside)?;
    }
    out.flush()?;
    if report.is_healthy() { Ok(()) } else { Err(Failure::Reported) }
}

/// What lies beside the segments and is no damage of theirs.
struct Beside {
    recovering: bool,
    orphans: Vec<Orphans>,
}

impl Beside {
    fn of(dir: &Path) -> Self {
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let recovering = dir.join(layout::RECOVERING).exists();
        Self { recovering, orphans: orphans_in(&fs, dir) }
    }
}

const fn state(segment: &SegmentCheck) -> &'static str {
    match segment.state {
        SegmentState::Sealed => "sealed",
        SegmentState::Active => "active",
        SegmentState::Spare => "spare",
        SegmentState::GivenUp => "given_up",
        SegmentState::Removed => "removed",
        _ => "unacknowledged",
    }
}

fn to_json(report: &VerifyReport, beside: &Beside) -> Value {
    let segment = |segment: &SegmentCheck| {
        json!({
            "number": segment.number,
            "path": segment.path.display().to_string(),
            "state": state(segment),
            "base_position": segment.base_position.get(),
            "end_position": segment.end_position.get(),
            "batches": segment.batches,
            "file_bytes": segment.file_bytes,
            "sidecar": segment.sidecar,
        })
    };
    let damage = |damage: &Damage| {
        json!({
            "code": damage.code(),
            "path": damage.path.display().to_string(),
            "file_offset": damage.file_offset,
            "position": damage.position.map(crate::Position::get),
            "message": damage.kind.to_string(),
            "hint": damage.hint(),
        })
    };
    json!({
        "healthy": report.is_healthy(),
        "journal": report.journal.to_string(),
        "role": report.role.map(|role| role.to_string()),
        "first_position": report.first.get(),
        "end_position": report.end.position.get(),
        "end_offset": report.end.offset,
        "chain": report.end.chain.to_string(),
        "proven_offset": report.proven_offset,
        "closed": report.closed,
        "events": report.events,
        "bytes_read": report.bytes_read,
        "unacknowledged_bytes": report.unacknowledged_bytes,
        "lost": report.lost.iter().map(|lost| json!({
            "from_position": lost.start.get(),
            "to_position": lost.end.get(),
        })).collect::<Vec<_>>(),
        "recovering": beside.recovering,
        "orphaned": beside.orphans.iter().map(orphan).collect::<Vec<_>>(),
        "segments": report.segments.iter().map(segment).collect::<Vec<_>>(),
        "damage": report.damage.iter().map(damage).collect::<Vec<_>>(),
    })
}

fn print(out: &mut impl Write, report: &VerifyReport, beside: &Beside) -> io::Result<()> {
    let mut table = plain();
    table.set_header(["segment", "state", "positions", "batches", "file bytes", "sidecar"]);
    for segment in &report.segments {
        table.add_row(vec![
            segment.number.to_string(),
            state(segment).to_owned(),
            format!("{}..{}", segment.base_position, segment.end_position),
            segment.batches.to_string(),
            segment.file_bytes.to_string(),
            if segment.sidecar { "verified" } else { "-" }.to_owned(),
        ]);
    }
    right(&mut table, &[0, 3, 4]);
    writeln!(out, "{}\n", table.trim_fmt())?;
    for damage in &report.damage {
        writeln!(out, "damage[{}]: {damage}", damage.code())?;
        if let Some(position) = damage.position {
            writeln!(out, "  first event affected: position {position}")?;
        }
        writeln!(out, "  hint: {}", damage.hint())?;
    }
    if report.unacknowledged_bytes > 0 {
        writeln!(
            out,
            "{} bytes behind the end were never acknowledged; the next opening sets them aside",
            report.unacknowledged_bytes
        )?;
    }
    for lost in &report.lost {
        writeln!(out, "events at positions {}..{} were lost and given up", lost.start, lost.end)?;
    }
    if beside.recovering {
        writeln!(
            out,
            "events are being taken back from a mirror, and not all have come: see headwater recover"
        )?;
    }
    for it in &beside.orphans {
        let (from, dir) = (it.from, it.dir.display());
        writeln!(out, "events from position {from} on, which the origin has lost, are in {dir}")?;
    }
    let verdict = match report.damage.len() {
        0 => "healthy".to_owned(),
        1 => "1 file damaged".to_owned(),
        files => format!("{files} files damaged"),
    };
    writeln!(
        out,
        "{verdict}: {} events, end at position {}, chain {}, {} bytes read",
        report.events, report.end.position, report.end.chain, report.bytes_read
    )
}

/// A line of progress, on a terminal only.
struct Meter {
    shown: Option<Instant>,
    terminal: bool,
}

impl Meter {
    fn new() -> Self {
        Self { shown: None, terminal: io::stderr().is_terminal() }
    }

    fn show(&mut self, progress: VerifyProgress) {
        let due = self.shown.is_none_or(|shown| shown.elapsed() >= Duration::from_millis(100));
        if self.terminal && due {
            self.shown = Some(Instant::now());
            let percent = progress.bytes_done.saturating_mul(100) / progress.bytes_total.max(1);
            // Progress that can't be shown is no failure.
            drop(write!(io::stderr(), "\rverifying {:>3} %", percent.min(100)));
        }
    }

    fn clear(&self) {
        if self.shown.is_some() {
            drop(write!(io::stderr(), "\r\x1b[K"));
        }
    }
}
