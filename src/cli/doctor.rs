//! `headwater doctor`: looks at a store and the machine below it.

use std::io::{self, Write};

use crate::doctor::{self, Check, Level};
use serde_json::json;

use super::failure::Failure;
use super::{Target, target};

pub(crate) fn run(args: &Target) -> Result<(), Failure> {
    let diagnosis = doctor::examine(&target::journal_dir(&args.dir))?;
    let mut out = io::stdout().lock();
    if args.json {
        let check = |check: &Check| {
            json!({
                "name": check.name,
                "level": check.level.to_string(),
                "finding": check.finding,
                "hint": check.hint,
            })
        };
        let checks: Vec<_> = diagnosis.checks.iter().map(check).collect();
        let level = diagnosis.level().to_string();
        writeln!(out, "{}", json!({ "level": level, "checks": checks }))?;
    } else {
        for check in &diagnosis.checks {
            writeln!(out, "{:<4}  {:<12} {}", check.level, check.name, check.finding)?;
            if let Some(hint) = check.hint {
                writeln!(out, "{:19}hint: {hint}", "")?;
            }
        }
        let count = |level| diagnosis.checks.iter().filter(|check| check.level == level).count();
        let (warnings, failures) = (count(Level::Warn), count(Level::Fail));
        writeln!(out, "{failures} failed, {warnings} warnings")?;
    }
    out.flush()?;
    if diagnosis.level() < Level::Fail { Ok(()) } else { Err(Failure::Reported) }
}
