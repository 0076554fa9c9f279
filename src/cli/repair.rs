//! `headwater repair`: tells what can be done about damage, and does it when told to.

use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fs::{Fs, os::OsFs};
use crate::repair::{self, Options, Step};
use crate::{Damage, Position};
use serde_json::{Value, json};

use super::failure::Failure;
use super::{Target, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Prints what would be done and changes nothing; the default
    #[arg(long, conflicts_with = "apply")]
    plan: bool,
    /// Does it
    #[arg(long)]
    apply: bool,
    /// Fetches damaged bytes from this store, mirror or backup of the same journal
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    /// Gives up the events at these positions, exactly as the plan names them; may be repeated
    #[arg(long, value_name = "FROM..TO", value_parser = range)]
    accept_gap: Vec<Range<u64>>,
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text.split_once("..").ok_or("must be FROM..TO, two positions")?;
    let position = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    Ok(position(from)?..position(to)?)
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let dir = target::journal_dir(&args.target.dir);
    let accept = args.accept_gap.iter();
    let options = Options {
        from: args.from.as_deref().map(target::journal_dir),
        accept: accept.map(|r| Position::new(r.start)..Position::new(r.end)).collect(),
    };
    if args.apply { apply(args, &fs, &dir, &options) } else { plan(args, &fs, &dir, &options) }
}

fn plan(args: &Args, fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<(), Failure> {
    let plan = repair::plan(fs, dir, options)?;
    let mut out = io::stdout().lock();
    if args.target.json {
        let value = json!({
            "applied": false,
            "healthy": plan.damage.is_empty() && plan.steps.is_empty(),
            "journal": plan.journal.to_string(),
            "role": plan.role.map(|role| role.to_string()),
            "damage": plan.damage.iter().map(damage_json).collect::<Vec<_>>(),
            "steps": plan.steps.iter().map(step_json).collect::<Vec<_>>(),
        });
        writeln!(out, "{value}")?;
    } else {
        print_damage(&mut out, &plan.damage)?;
        for step in &plan.steps {
            print_step(&mut out, if step.is_possible() { "would" } else { "can't" }, step)?;
        }
        match plan.steps.iter().any(Step::is_possible) {
            true => writeln!(out, "nothing was changed; --apply does it")?,
            false if plan.steps.is_empty() => writeln!(out, "nothing to repair")?,
            false => writeln!(out, "nothing was changed")?,
        }
    }
    out.flush()?;
    let sound = plan.damage.is_empty() && plan.steps.iter().all(Step::is_possible);
    if sound { Ok(()) } else { Err(Failure::Reported) }
}

fn apply(args: &Args, fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<(), Failure> {
    let outcome = repair::apply(fs, dir, options)?;
    let report = &outcome.report;
    let mut out = io::stdout().lock();
    if args.target.json {
        let value = json!({
            "applied": true,
            "healthy": report.is_healthy() && outcome.left.is_empty(),
            "journal": report.journal.to_string(),
            "role": report.role.map(|role| role.to_string()),
            "damage": report.damage.iter().map(damage_json).collect::<Vec<_>>(),
            "steps": outcome.done.iter().map(step_json).collect::<Vec<_>>(),
            "left": outcome.left.iter().map(step_json).collect::<Vec<_>>(),
        });
        writeln!(out, "{value}")?;
    } else {
        for step in &outcome.done {
            print_step(&mut out, "did", step)?;
        }
        for step in &outcome.left {
            print_step(&mut out, "can't", step)?;
        }
        print_damage(&mut out, &report.damage)?;
        let verdict = if report.is_healthy() { "healthy" } else { "still damaged" };
        writeln!(
            out,
            "{verdict}: {} events, end at position {}, chain {}",
            report.events, report.end.position, report.end.chain
        )?;
    }
    out.flush()?;
    let sound = report.is_healthy() && outcome.left.is_empty();
    if sound { Ok(()) } else { Err(Failure::Reported) }
}

fn print_damage(out: &mut impl Write, damage: &[Damage]) -> io::Result<()> {
    for damage in damage {
        writeln!(out, "damage[{}]: {damage}", damage.code())?;
        if let Some(position) = damage.position {
            writeln!(out, "  first event affected: position {position}")?;
        }
    }
    Ok(())
}

fn print_step(out: &mut impl Write, mode: &str, step: &Step) -> io::Result<()> {
    match step {
        Step::MendNode { path } => {
            writeln!(out, "{mode} turn back the flipped bit in {}", path.display())
        }
        Step::SetAside { path } => {
            writeln!(out, "{mode} move {} into quarantine/", path.display())
        }
        Step::Fetch(fetch) => {
            let (from, to) = (fetch.from.position, fetch.to.position);
            writeln!(out, "{mode} fetch the events at positions {from}..{to} from the copy:")?;
            for (path, range) in &fetch.files {
                let (at, len) = (range.start, range.end - range.start);
                writeln!(out, "  {len} bytes at byte {at} of {}", path.display())?;
            }
            Ok(())
        }
        Step::GiveUp { gap, path, file_offset, .. } => {
            let (from, to) = (gap.from.position, gap.to_position);
            writeln!(
                out,
                "{mode} give up {} events at positions {from}..{to}, lost at byte {file_offset} of {}",
                gap.events(),
                path.display()
            )?;
            if mode == "can't" {
                writeln!(
                    out,
                    "  hint: --from a mirror or backup that has them; or, if they are lost for good, \
                     --accept-gap {from}..{to}"
                )?;
            }
            Ok(())
        }
        Step::CutBehindEnd { path, len } => {
            writeln!(
                out,
                "{mode} copy aside and cut what lies behind byte {len} of {}",
                path.display()
            )
        }
        Step::Recover { torn_bytes, segments, headers, mark } => writeln!(
            out,
            "{mode} recover as every opening does: {torn_bytes} torn bytes and {segments} segments set aside, \
             {headers} header pages remade{}",
            if *mark { ", the mark written anew" } else { "" }
        ),
        Step::Beyond { damage } => {
            writeln!(out, "{mode} repair {damage}\n  hint: {}", damage.hint())
        }
    }
}

fn damage_json(damage: &Damage) -> Value {
    json!({
        "code": damage.code(),
        "path": damage.path.display().to_string(),
        "file_offset": damage.file_offset,
        "position": damage.position.map(Position::get),
        "message": damage.kind.to_string(),
        "hint": damage.hint(),
    })
}

fn step_json(step: &Step) -> Value {
    let mut value = match step {
        Step::MendNode { path } => {
            json!({ "step": "mend_node", "path": path.display().to_string() })
        }
        Step::SetAside { path } => {
            json!({ "step": "set_aside", "path": path.display().to_string() })
        }
        Step::Fetch(fetch) => {
            let file = |(path, range): &(PathBuf, Range<u64>)| {
                json!({
                    "path": path.display().to_string(),
                    "file_offset": range.start,
                    "bytes": range.end - range.start,
                })
            };
            json!({
                "step": "fetch",
                "from_position": fetch.from.position.get(),
                "to_position": fetch.to.position.get(),
                "files": fetch.files.iter().map(file).collect::<Vec<_>>(),
            })
        }
        Step::GiveUp { gap, path, file_offset, .. } => json!({
            "step": "give_up",
            "from_position": gap.from.position.get(),
            "to_position": gap.to_position.get(),
            "events": gap.events(),
            "path": path.display().to_string(),
            "file_offset": file_offset,
        }),
        Step::CutBehindEnd { path, len } => json!({
            "step": "cut_behind_end",
            "path": path.display().to_string(),
            "file_offset": len,
        }),
        Step::Recover { torn_bytes, segments, headers, mark } => json!({
            "step": "recover",
            "torn_bytes": torn_bytes,
            "segments": segments,
            "headers": headers,
            "mark": mark,
        }),
        Step::Beyond { damage } => json!({ "step": "beyond", "damage": damage_json(damage) }),
    };
    if let Some(fields) = value.as_object_mut() {
        fields.insert("possible".to_owned(), step.is_possible().into());
    }
    value
}
