//! Power cuts: the file system is shut down under a running child, which drops everything that was not
//! synced, data and names; then it is mounted again, replays its log, and the journal is opened.

use std::time::Duration;

use fastrand::Rng;

use crate::child::Plant;
use crate::driver::{Device, Found, Ledger, Said};
use crate::mounts::{Image, Kind, Mount, need};
use crate::{Plan, Reached, Stop};

const WRITERS: usize = 4;

/// A journal on a file system whose power can fail.
struct Machine {
    image: Image,
    mount: Option<Mount>,
    ledger: Ledger,
}

impl Machine {
    fn new(plan: &Plan, name: &str, kind: Kind) -> Result<Self, Stop> {
        plan.need_mounts()?;
        if kind == Kind::Xfs {
            need("mkfs.xfs")?;
        }
        let image = Image::make(&plan.dir(name), kind.name(), kind).map_err(Stop::Skipped)?;
        let mount = image.mount().map_err(Stop::Skipped)?;
        let ledger = Ledger::new(mount.point.join("store"), WRITERS);
        Ok(Self { image, mount: Some(mount), ledger })
    }

    /// One life of a child, ended by a power cut.
    fn cut(&mut self, rng: &mut Rng) -> Result<(), Stop> {
        let mount = self.mount.take().unwrap();
        let mut running = self.ledger.start();
        match rng.u8(..8) {
            // Most likely while it starts or recovers.
            0 | 1 => std::thread::sleep(Duration::from_micros(rng.u64(..12_000))),
            _ => {
                running.hear(&mut self.ledger, |said| matches!(said, Said::Opened(_)));
                running.hear_acknowledged(&mut self.ledger, rng.usize(..40));
            }
        }
        let cut = if rng.u8(..8) == 0 {
            running.kill(&mut self.ledger);
            mount.cut()
        } else {
            let cut = mount.cut();
            // It may say more: what it acknowledges now must hold too.
            running.kill(&mut self.ledger);
            cut
        };
        cut.map_err(Stop::Skipped)?;
        mount.unmount().map_err(Stop::Violated)?;
        self.mount = Some(self.image.mount().map_err(Stop::Violated)?);
        Ok(())
    }

    fn check(&mut self) -> Result<Found, Stop> {
        let found = self.ledger.check(Device::Honest)?;
        self.ledger.renew_if_long();
        Ok(found)
    }
}

pub(crate) fn run(plan: &Plan, kind: Kind) -> Reached {
    let mut machine = Machine::new(plan, "power", kind)?;
    let mut rng = plan.rng();
    let budget = plan.budget(250, 25);
    let (mut cuts, mut checks, mut torn, mut rewritten, mut acknowledged) = (0, 0, 0, 0, 0);
    while budget.allows(cuts) {
        let before = machine.ledger.acknowledged();
        machine.cut(&mut rng)?;
        acknowledged += machine.ledger.acknowledged() - before;
        cuts += 1;
        // Sometimes the next child recovers, and may lose power meanwhile.
        if rng.u8(..4) > 0 {
            let found = machine.check()?;
            checks += 1;
            torn += usize::from(found.torn);
            rewritten += usize::from(found.rewritten);
        }
    }
    machine.check()?;
    Ok(format!(
        "{cuts} power cuts on {}, {checks} checks, {acknowledged} batches acknowledged, {torn} torn and \
         {rewritten} rewritten tails, 0 violations",
        kind.name()
    ))
}

/// A library that acknowledges before its sync is convicted.
pub(crate) fn catches_early_acknowledgements(plan: &Plan) -> Reached {
    let mut machine = Machine::new(plan, "power-early", Kind::Ext4)?;
    machine.ledger.plant = Some(Plant::AcknowledgeBeforeSync);
    let mut rng = plan.rng();
    for cuts in 1..=30 {
        machine.cut(&mut rng)?;
        match machine.check() {
            Ok(_) => {}
            Err(Stop::Violated(what)) => return Ok(format!("after {cuts} power cuts: {what}")),
            Err(skipped) => return Err(skipped),
        }
    }
    Err(Stop::Violated("30 power cuts have not shown acknowledgements before the sync".into()))
}
