//! A device that refuses chosen blocks, followed by a restart, appends and a power cut.
//!
//! ```text
//!   template: a journal on a file system, in an image          dry run on a copy ─▶ blocks it has written
//!   trial: copy │ some of these blocks fail │ child appends, until it is told │ restart, another appends
//!               │ power cut │ the device works again: check
//! ```
//! After a failed sync the page cache shows what the disk doesn't hold, and the next sync succeeds: whoever
//! believes either serves events after the restart that are gone after the power cut.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use fastrand::Rng;

use crate::driver::{Device, Ledger, Running, Said};
use crate::mounts::{BLOCK_BYTES, Image, Kind, Thin, need};
use crate::{Plan, Reached, Stop};

const WRITERS: usize = 2;
const BATCHES: u64 = 20;

#[derive(Debug, Default)]
struct Tally {
    trials: usize,
    /// The first child was told of a failure.
    told: usize,
    /// The second one could not open the journal as long as the device failed.
    refused: usize,
}

pub(crate) fn run(plan: &Plan, kind: Kind) -> Reached {
    plan.need_mounts()?;
    if kind == Kind::Xfs {
        need("mkfs.xfs")?;
    }
    let dir = plan.dir(&format!("device-{}", kind.name()));
    let mut rng = plan.rng();
    let template = Template::make(&dir, kind)?;
    let budget = plan.budget(200, 15);
    let mut tally = Tally::default();
    while budget.allows(tally.trials) {
        template.trial(&mut rng, &mut tally)?;
        tally.trials += 1;
    }
    let Tally { trials, told, refused } = tally;
    if told == 0 {
        return Err(Stop::Violated(format!("no fault of {trials} has reached the journal")));
    }
    Ok(format!(
        "{trials} faults on {} ({} blocks to choose from), {told} told by the journal, {refused} openings \
         refused, 0 violations",
        kind.name(),
        template.written.len()
    ))
}

/// A journal on a file system that isn't mounted.
struct Template {
    image: Image,
    ledger: Ledger,
    /// The blocks that going on with it fills.
    written: Vec<u64>,
}

impl Template {
    fn make(dir: &Path, kind: Kind) -> Result<Self, Stop> {
        let image = Image::make(dir, "template", kind).map_err(Stop::Skipped)?;
        let mount = image.mount().map_err(Stop::Skipped)?;
        let mut ledger = Ledger::new(mount.point.join("store"), WRITERS);
        let mut running = ledger.start();
        running.hear_acknowledged(&mut ledger, 8);
        running.kill(&mut ledger);
        mount.unmount().map_err(Stop::Violated)?;
        let mut template = Self { image, ledger, written: Vec::new() };
        template.dry_run()?;
        Ok(template)
    }

    fn dry_run(&mut self) -> Result<(), Stop> {
        let thin = Thin::copy_of(&self.image).map_err(Stop::Skipped)?;
        let mount = thin.mount().map_err(Stop::Skipped)?;
        let mut ledger = self.ledger.clone();
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        ledger.check(Device::Honest)?;
        mount.unmount().map_err(Stop::Violated)?;
        self.written = filled_blocks(&self.image.file, thin.file()).unwrap();
        Ok(())
    }

    fn trial(&self, rng: &mut Rng, tally: &mut Tally) -> Result<(), Stop> {
        let mut thin = Thin::copy_of(&self.image).map_err(Stop::Skipped)?;
        let mount = thin.mount().map_err(Stop::Skipped)?;
        let count = 1 << rng.u8(..4);
        let blocks = rng.choose_multiple(&self.written, count);
        let blocks: Vec<u64> = blocks.into_iter().copied().collect();
        thin.strike(&blocks).unwrap();
        let mut ledger = self.ledger.clone();
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        let told = |said: &Said| {
            matches!(said, Said::Unknown | Said::Poisoned | Said::Refused { .. } | Said::Unclosed)
        };
        tally.told += usize::from(ledger.heard(told));

        ledger.said.clear();
        if rng.bool() {
            thin.heal().unwrap();
        }
        let mut running = ledger.start();
        running.hear_acknowledged(&mut ledger, rng.usize(1..30));
        // A file system that has given up by itself refuses to be shut down.
        drop(mount.cut());
        running.kill(&mut ledger);
        tally.refused += usize::from(ledger.heard(|said| matches!(said, Said::Refused { .. })));
        mount.unmount().map_err(Stop::Violated)?;

        thin.heal().unwrap();
        let mount = thin.mount().map_err(Stop::Violated)?;
        ledger.check(Device::Honest).map_err(|stop| match stop {
            Stop::Violated(what) => Stop::Violated(format!("{what}; blocks {blocks:?} failed")),
            skipped @ Stop::Skipped(_) => skipped,
        })?;
        mount.unmount().map_err(Stop::Violated)
    }
}

/// The blocks that are zero in one file and not in the other.
fn filled_blocks(zero: &Path, filled: &Path) -> std::io::Result<Vec<u64>> {
    let (mut zero, mut filled) = (File::open(zero)?, File::open(filled)?);
    let (mut before, mut after) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
    let mut blocks = Vec::new();
    for block in 0..zero.metadata()?.len() / BLOCK_BYTES as u64 {
        zero.read_exact(&mut before)?;
        filled.read_exact(&mut after)?;
        if before == [0; BLOCK_BYTES] && after != before {
            blocks.push(block);
        }
    }
    Ok(blocks)
}
