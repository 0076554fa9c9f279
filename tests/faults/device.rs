//! EIO from chosen blocks of the device, followed by a restart, appends and a power cut.
//!
//! ```text
//!   template: a journal on a file system, in an image          dry run on a copy ─▶ blocks it has written
//!   trial: copy │ one of these blocks fails │ child appends, until it is told │ restart, another appends
//!               │ power cut │ the image without faults: check
//! ```
//! After a failed sync the page cache shows what the disk doesn't hold, and the next sync succeeds: whoever
//! believes either serves events after the restart that are gone after the power cut.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use fastrand::Rng;

use crate::driver::{Device, Ledger, Running, Said};
use crate::mounts::{Fails, Faulty, Image, Kind, need, tool};
use crate::{Plan, Reached, Stop};

const WRITERS: usize = 2;
const BATCHES: u64 = 20;
const BLOCK_BYTES: usize = 4096;
const SECTORS_PER_BLOCK: u64 = 8;

#[derive(Debug, Default)]
struct Tally {
    trials: usize,
    /// The first child was told of a failure.
    told: usize,
    /// The second one could not open the journal as long as the device failed.
    refused: usize,
    /// The file system itself could not be mounted after the fault.
    unmountable: usize,
}

pub(crate) fn run(plan: &Plan, kind: Kind) -> Reached {
    plan.need_mounts()?;
    for program in ["qemu-storage-daemon", "setpriv"] {
        need(program)?;
    }
    if kind == Kind::Xfs {
        need("mkfs.xfs")?;
    }
    if let Err(why) = File::open("/dev/fuse") {
        return Err(Stop::Skipped(format!("/dev/fuse: {why}")));
    }
    let dir = plan.dir(&format!("device-{}", kind.name()));
    let mut rng = plan.rng();
    let template = Template::make(&dir, kind)?;
    let budget = plan.budget(200, 15);
    let mut tally = Tally::default();
    while budget.allows(tally.trials) {
        let block = *rng.choice(&template.written).unwrap();
        let fails = *rng.choice(&[Fails::Once, Fails::Always]).unwrap();
        template.trial(block, fails, &mut rng, &mut tally).map_err(|stop| match stop {
            Stop::Violated(what) => Stop::Violated(format!("{what}; block {block} fails {fails:?}")),
            skipped @ Stop::Skipped(_) => skipped,
        })?;
        tally.trials += 1;
    }
    let Tally { trials, told, refused, unmountable } = tally;
    if told == 0 {
        return Err(Stop::Violated(format!("no fault of {trials} has reached the journal")));
    }
    Ok(format!(
        "{trials} faults on {} ({} blocks to choose from), {told} told by the journal, {refused} openings \
         refused, {unmountable} not mountable, 0 violations",
        kind.name(),
        template.written.len()
    ))
}

/// A journal on a file system that isn't mounted.
struct Template {
    image: Image,
    ledger: Ledger,
    /// The blocks that going on with it writes.
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
        let copy = self.copy("dry")?;
        let mount = copy.mount().map_err(Stop::Skipped)?;
        let mut ledger = self.ledger.at(mount.point.join("store"));
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        ledger.check(Device::Honest)?;
        mount.unmount().map_err(Stop::Violated)?;
        self.written = differing_blocks(&self.image.file, &copy.file).unwrap();
        Ok(())
    }

    fn copy(&self, name: &str) -> Result<Image, Stop> {
        let copy = self.image.beside(name);
        let (from, to) = (self.image.file.as_os_str(), copy.file.as_os_str());
        tool("cp", &["--sparse=auto".as_ref(), from, to]).map_err(Stop::Skipped)?;
        Ok(copy)
    }

    fn trial(
        &self,
        block: u64,
        fails: Fails,
        rng: &mut Rng,
        tally: &mut Tally,
    ) -> Result<(), Stop> {
        let image = self.copy("trial")?;
        let sector = block * SECTORS_PER_BLOCK;
        let mut faulty = Faulty::serve(&image).map_err(Stop::Skipped)?;
        let mount = faulty.mount(&image).map_err(Stop::Skipped)?;
        faulty.strike(sector..sector + SECTORS_PER_BLOCK, fails).map_err(Stop::Skipped)?;
        let mut ledger = self.ledger.at(mount.point.join("store"));
        Running::start(&ledger.orders(BATCHES), &[]).end(&mut ledger);
        let told = |said: &Said| {
            matches!(said, Said::Unknown | Said::Poisoned | Said::Refused { .. } | Said::Unclosed)
        };
        tally.told += usize::from(ledger.heard(told));

        ledger.said.clear();
        let mut running = ledger.start();
        running.hear_acknowledged(&mut ledger, rng.usize(1..30));
        let cut = mount.cut();
        running.kill(&mut ledger);
        tally.refused += usize::from(ledger.heard(|said| matches!(said, Said::Refused { .. })));
        // A file system that has given up by itself refuses to be shut down.
        drop(cut);
        mount.unmount().map_err(Stop::Violated)?;
        drop(faulty);

        let Ok(mount) = image.mount() else {
            tally.unmountable += 1;
            return Ok(());
        };
        ledger.check(Device::Honest)?;
        mount.unmount().map_err(Stop::Violated)
    }
}

fn differing_blocks(one: &Path, other: &Path) -> std::io::Result<Vec<u64>> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
    let mut differing = Vec::new();
    for block in 0..one.metadata()?.len() / BLOCK_BYTES as u64 {
        one.read_exact(&mut left)?;
        other.read_exact(&mut right)?;
        if left != right {
            differing.push(block);
        }
    }
    Ok(differing)
}
