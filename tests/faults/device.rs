//! A device that refuses chosen blocks, followed by a restart, appends and a power cut.
//!
//! ```text
//!   template: a journal on a file system, in an image          dry run on a copy ─▶ blocks it has written
//!   trial: copy │ some of these blocks fail │ child appends, until it is told │ restart, another appends
//!               │ power cut │ the device works again: check
//! ```
//! After a failed sync the page cache shows what the disk doesn't hold, and the next sync succeeds: whoever
//! believes either serves events after the restart that are gone after the power cut.

use std::collections::HashSet;
use std::path::Path;

use fastrand::Rng;

use crate::child::Plant;
use crate::driver::{Device, Ledger, Running, Said};
use crate::mounts::{BLOCK_BYTES, Image, Kind, Thin, need};
use crate::{Plan, Reached, Stop};

const WRITERS: usize = 2;
const BATCHES: u64 = 20;
/// Two segments for all batches of a trial: most of the blocks are prepared before they fail.
const SEGMENT_BYTES: u64 = 64 * 1024;

#[derive(Debug, Default)]
struct Tally {
    trials: usize,
    /// The first child was told of a failure.
    told: usize,
    /// It was told that there is no space for the next segment.
    full: usize,
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
    let budget = plan.budget(200, 12);
    let mut tally = Tally::default();
    while budget.allows(tally.trials) {
        template.trial(&mut rng, &mut tally)?;
        tally.trials += 1;
    }
    let Tally { trials, told, full, refused } = tally;
    if told == 0 {
        return Err(Stop::Violated(format!("no fault of {trials} has reached the journal")));
    }
    Ok(format!(
        "{trials} faults on {} ({} blocks of data and {} others to choose from), {told} appends or openings \
         failed, {full} segments not prepared, {refused} openings refused, 0 violations",
        kind.name(),
        template.data.len(),
        template.other.len()
    ))
}

/// A library whose recovery believes the page cache is convicted.
pub(crate) fn catches_trust_in_the_page_cache(plan: &Plan) -> Reached {
    plan.need_mounts()?;
    let mut rng = plan.rng();
    let mut template = Template::make(&plan.dir("device-trust"), Kind::Ext4)?;
    template.ledger.plant = Some(Plant::TrustPageCache);
    template.other.clone_from(&template.data);
    for trials in 1..=60 {
        match template.trial(&mut rng, &mut Tally::default()) {
            Ok(()) => {}
            Err(Stop::Violated(what)) => return Ok(format!("after {trials} faults: {what}")),
            Err(skipped) => return Err(skipped),
        }
    }
    Err(Stop::Violated("60 faults have not shown trust in the page cache".into()))
}

/// A journal on a file system that isn't mounted.
struct Template {
    image: Image,
    ledger: Ledger,
    /// The blocks that going on with it fills: with batches, and with what the file system has to say.
    data: Vec<u64>,
    other: Vec<u64>,
}

impl Template {
    fn make(dir: &Path, kind: Kind) -> Result<Self, Stop> {
        let image = Image::make(dir, "template", kind).map_err(Stop::Skipped)?;
        let mount = image.mount().map_err(Stop::Skipped)?;
        let mut ledger = Ledger::new(mount.point.join("store"), WRITERS);
        ledger.segment_bytes = SEGMENT_BYTES;
        let mut running = ledger.start();
        running.hear_acknowledged(&mut ledger, 8);
        running.kill(&mut ledger);
        mount.unmount().map_err(Stop::Violated)?;
        let mut template = Self { image, ledger, data: Vec::new(), other: Vec::new() };
        template.dry_run()?;
        Ok(template)
    }

    fn dry_run(&mut self) -> Result<(), Stop> {
        let thin = Thin::copy_of(&self.image).map_err(Stop::Skipped)?;
        let mount = thin.mount().map_err(Stop::Skipped)?;
        let mut ledger = self.ledger.clone();
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        ledger.check(Device::Honest)?;
        let batches = segment_blocks(&ledger.dir.join("journal")).unwrap();
        mount.unmount().map_err(Stop::Violated)?;
        let filled = filled_blocks(&self.image.file, thin.file()).unwrap();
        let (data, other) = filled.into_iter().partition(|(_, bytes)| batches.contains(bytes));
        let numbers = |blocks: Vec<Block>| blocks.into_iter().map(|(number, _)| number).collect();
        (self.data, self.other) = (numbers(data), numbers(other));
        Ok(())
    }

    fn trial(&self, rng: &mut Rng, tally: &mut Tally) -> Result<(), Stop> {
        let mut thin = Thin::copy_of(&self.image).map_err(Stop::Skipped)?;
        let mount = thin.mount().map_err(Stop::Skipped)?;
        let of = if rng.u8(..4) == 0 { &self.other } else { &self.data };
        let count = 1 << rng.u8(..4);
        let blocks = rng.choose_multiple(of, count);
        let blocks: Vec<u64> = blocks.into_iter().copied().collect();
        thin.strike(&blocks).unwrap();
        let mut ledger = self.ledger.clone();
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        let told = |said: &Said| {
            matches!(said, Said::Unknown | Said::Poisoned | Said::Refused { .. } | Said::Unclosed)
        };
        tally.told += usize::from(ledger.heard(told));
        tally.full += usize::from(ledger.heard(|said| *said == Said::Full));

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

/// Number and content.
type Block = (u64, Vec<u8>);

fn blocks_of(path: &Path) -> std::io::Result<Vec<Block>> {
    let bytes = std::fs::read(path)?;
    let blocks = bytes.chunks(BLOCK_BYTES).zip(0..);
    let filled = blocks.filter(|(bytes, _)| bytes.iter().any(|byte| *byte != 0));
    Ok(filled.map(|(bytes, number)| (number, bytes.to_vec())).collect())
}

/// The blocks that are zero in one image and not in the other.
fn filled_blocks(zero: &Path, filled: &Path) -> std::io::Result<Vec<Block>> {
    let before: HashSet<u64> = blocks_of(zero)?.into_iter().map(|(number, _)| number).collect();
    let after = blocks_of(filled)?.into_iter();
    Ok(after.filter(|(number, _)| !before.contains(number)).collect())
}

/// The contents of all blocks of all segments.
fn segment_blocks(journal: &Path) -> std::io::Result<HashSet<Vec<u8>>> {
    let mut contents = HashSet::new();
    for entry in std::fs::read_dir(journal)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "seg") {
            contents.extend(blocks_of(&path)?.into_iter().map(|(_, bytes)| bytes));
        }
    }
    Ok(contents)
}
