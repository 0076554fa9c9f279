//! SIGKILL at any moment: while opening, while recovering, between and inside appends and rolls.
//!
//! The page cache outlives a process, so this proves nothing about syncs; it proves that every state which
//! a process can leave is one that the next can take over.

use std::time::Duration;

use fastrand::Rng;

use crate::child::Plant;
use crate::driver::{Device, Found, Ledger, Said};
use crate::{Plan, Reached, Stop};

const WRITERS: usize = 4;

pub(crate) fn run(plan: &Plan) -> Reached {
    let mut rng = plan.rng();
    let mut ledger = Ledger::new(plan.dir("kills").join("store"), WRITERS);
    let budget = plan.budget(300, 30);
    let (mut kills, mut acknowledged, mut torn) = (0, 0, 0);
    while budget.allows(kills) {
        let before = ledger.acknowledged();
        let found = kill_once(&mut ledger, &mut rng)?;
        acknowledged += ledger.acknowledged() - before;
        torn += usize::from(found.torn);
        kills += 1;
        ledger.renew_if_long();
    }
    Ok(format!(
        "{kills} kills of {WRITERS} writers, {acknowledged} batches acknowledged, {torn} torn tails, \
         0 violations"
    ))
}

fn kill_once(ledger: &mut Ledger, rng: &mut Rng) -> Result<Found, Stop> {
    let mut running = ledger.start();
    if rng.u8(..8) == 0 {
        // Most likely while it starts or recovers.
        std::thread::sleep(Duration::from_micros(rng.u64(..8_000)));
    } else {
        running.hear(ledger, |said| matches!(said, Said::Opened(_)));
        running.hear_acknowledged(ledger, rng.usize(..30));
        std::thread::sleep(Duration::from_micros(rng.u64(..500)));
    }
    running.kill(ledger);
    ledger.check(Device::Honest)
}

/// A child that claims what it has not appended is convicted.
pub(crate) fn catches_a_lie(plan: &Plan) -> Reached {
    let mut rng = plan.rng();
    let mut ledger = Ledger::new(plan.dir("kills-lie").join("store"), 1);
    ledger.plant = Some(Plant::ClaimTheNext);
    for kills in 1..=30 {
        match kill_once(&mut ledger, &mut rng) {
            Ok(_) => {}
            Err(Stop::Violated(_)) => return Ok(format!("after {kills} kills")),
            Err(skipped) => return Err(skipped),
        }
    }
    Err(Stop::Violated("30 kills have not shown a child that claims what it has not done".into()))
}
