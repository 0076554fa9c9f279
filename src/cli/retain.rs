//! `headwater archive` and `headwater retain`: keeping the history elsewhere, and removing it here.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::Position;
use crate::fs::{Fs, os::OsFs};
use crate::retention::{self, Gate, History, Options, Plan, Removal, Until};
use serde_json::{Value, json};

use super::failure::Failure;
use super::{Target, target};

/// What `retain` is told.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("until").required(true))]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Prints what would be removed and changes nothing; the default
    #[arg(long, conflicts_with = "apply")]
    plan: bool,
    /// Does it
    #[arg(long)]
    apply: bool,
    /// Removes whole segments in front of this position
    #[arg(long, value_name = "POSITION", group = "until")]
    before: Option<u64>,
    /// Removes the oldest segments as far as at least so many bytes of them remain
    #[arg(long, value_name = "N", group = "until")]
    keep_bytes: Option<u64>,
    /// The archive that has what is removed: it is read there first, every byte
    #[arg(long, value_name = "DIR", conflicts_with = "forget")]
    archive: Option<PathBuf>,
    /// Loses the history for ever; the position at which the journal will begin, exactly as the plan says
    #[arg(long, value_name = "POSITION")]
    forget: Option<u64>,
    /// Passes over mirrors that weren't heard of for so many hours [default: 168]
    #[arg(long, value_name = "HOURS")]
    mirror_hours_max: Option<u64>,
    /// Passes over mirrors that lack more than so many bytes
    #[arg(long, value_name = "N")]
    mirror_bytes_max: Option<u64>,
    /// While the disk has less than so many bytes left, passes over mirrors that lack what must go [default:
    /// 1073741824, or a tenth of the volume if that is less]
    #[arg(long, value_name = "N")]
    mirror_free_bytes_min: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let dir = target::journal_dir(&args.target.dir);
    let options = options(args);
    let plan = match args.apply {
        true => retention::apply(&fs, &dir, &options)?,
        false => retention::plan(&fs, &dir, &options)?,
    };
    let mut out = io::stdout().lock();
    match args.target.json {
        true => writeln!(out, "{}", plan_json(&plan, args.apply))?,
        false => print_plan(&mut out, &plan, args.apply)?,
    }
    Ok(out.flush()?)
}

fn options(args: &Args) -> Options {
    // Exactly one of the two is there.
    let until = match (args.before, args.keep_bytes) {
        (Some(before), _) => Until::Position(Position::new(before)),
        (None, bytes) => Until::Keeping { bytes: bytes.unwrap_or(u64::MAX) },
    };
    let mut options = Options::new(until);
    let archive = args.archive.clone().map(History::Archive);
    options.history = archive.or(args.forget.map(|at| History::Forget(Position::new(at))));
    if let Some(hours) = args.mirror_hours_max {
        options.lease_age_max = Duration::from_secs(hours.saturating_mul(3600));
    }
    options.lease_bytes_max = args.mirror_bytes_max.unwrap_or(options.lease_bytes_max);
    options.lease_free_bytes_min = args.mirror_free_bytes_min;
    options
}

fn print_plan(out: &mut impl Write, plan: &Plan, applied: bool) -> io::Result<()> {
    let does = if applied { "removed" } else { "would remove" };
    for removal in &plan.removals {
        writeln!(
            out,
            "{does} segment {:016x}: positions {}..{}, {} bytes",
            removal.number, removal.from, removal.to, removal.file_bytes
        )?;
    }
    if let Some(blocker) = &plan.blocker {
        let at = blocker.position.map_or("nothing".into(), |p| format!("position {p}"));
        writeln!(out, "held back at {at} by {}", blocker.holder)?;
        writeln!(out, "  hint: {}", blocker.holder.hint())?;
    }
    match (plan.removals.is_empty(), applied) {
        (true, _) => writeln!(out, "nothing to remove; the journal begins at {}", plan.first),
        (_, true) => {
            writeln!(
                out,
                "{} bytes freed; the journal begins at {}",
                plan.file_bytes(),
                plan.target
            )
        }
        (_, false) => writeln!(
            out,
            "nothing was changed; with --apply and --archive DIR or --forget {}, {} bytes are freed",
            plan.target,
            plan.file_bytes()
        ),
    }
}

fn plan_json(plan: &Plan, applied: bool) -> Value {
    json!({
        "applied": applied,
        "journal": plan.journal.to_string(),
        "first_position": plan.first.get(),
        "asked_position": plan.asked.get(),
        "target_position": plan.target.get(),
        "file_bytes": plan.file_bytes(),
        "segments": plan.removals.iter().map(removal_json).collect::<Vec<_>>(),
        "blocker": plan.blocker.as_ref().map(gate_json),
        "gates": plan.gates.iter().map(gate_json).collect::<Vec<_>>(),
    })
}

fn removal_json(removal: &Removal) -> Value {
    json!({
        "number": removal.number,
        "path": removal.path.display().to_string(),
        "from_position": removal.from.get(),
        "to_position": removal.to.get(),
        "file_bytes": removal.file_bytes,
    })
}

fn gate_json(gate: &Gate) -> Value {
    json!({
        "holder": gate.holder.code(),
        "name": gate.holder.to_string(),
        "position": gate.position.map(Position::get),
        "passed_over": gate.passed_over,
        "hint": gate.holder.hint(),
    })
}
