//! `headwater backup` and `headwater restore`: copying a journal, and making one of the copy.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use crate::fs::{Fs, os::OsFs};
use crate::{Position, abandon_restore, restore};
use serde_json::json;

use super::failure::Failure;
use super::target;

/// What `backup` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// A store, its journal, or a mirror; it may be in use
    source: PathBuf,
    /// The backup: a new directory, or that of an earlier backup of the same journal
    backup: PathBuf,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

/// What `restore` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// The directory of a backup
    backup: PathBuf,
    /// The store to be made: a new directory, or one in which this restore was interrupted
    store: PathBuf,
    /// Restores the events in front of this position only; it must be the end of a batch
    #[arg(long, value_name = "POSITION")]
    at_position: Option<u64>,
    /// Removes what an interrupted restore has left, instead of restoring
    #[arg(long, conflicts_with = "at_position")]
    abandon: bool,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

pub(crate) fn backup(args: &BackupArgs) -> Result<(), Failure> {
    let (journal, damage) = target::open(&args.source)?;
    let report = journal.backup(&args.backup)?;
    let mut out = io::stdout().lock();
    if args.json {
        let value = json!({
            "journal": report.end.journal.to_string(),
            "end_position": report.end.position.get(),
            "end_offset": report.end.offset,
            "chain": report.end.chain.to_string(),
            "segments": report.segments,
            "written_bytes": report.written_bytes,
        });
        writeln!(out, "{value}")?;
    } else {
        let (end, bytes) = (report.end, report.written_bytes);
        writeln!(
            out,
            "backed up to position {}, chain {}: {bytes} bytes new",
            end.position, end.chain
        )?;
    }
    out.flush()?;
    damage.map_or(Ok(()), |damage| Err(Failure::Damaged(damage)))
}

pub(crate) fn restore_or_abandon(args: &RestoreArgs) -> Result<(), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let dir = args.store.join("journal");
    let mut out = io::stdout().lock();
    if args.abandon {
        abandon_restore(&fs, &dir)?;
        if args.json {
            writeln!(out, "{}", json!({ "abandoned": true }))?;
        } else {
            writeln!(out, "abandoned: what the restore had left is removed")?;
        }
        return Ok(out.flush()?);
    }
    let backup = target::journal_dir(&args.backup);
    let report = restore(&fs, &backup, &dir, args.at_position.map(Position::new))?;
    if args.json {
        let value = json!({
            "journal": report.end.journal.to_string(),
            "node": report.node.to_string(),
            "end_position": report.end.position.get(),
            "end_offset": report.end.offset,
            "chain": report.end.chain.to_string(),
            "written_bytes": report.written_bytes,
        });
        writeln!(out, "{value}")?;
    } else {
        let (end, bytes) = (report.end, report.written_bytes);
        writeln!(
            out,
            "restored up to position {}, chain {}: {bytes} bytes written",
            end.position, end.chain
        )?;
    }
    Ok(out.flush()?)
}
