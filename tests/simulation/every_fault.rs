//! Every operation of some short scenarios, with every kind of fault, with and without a power cut behind
//! it; and on the way back a second fault.

use std::path::Path;

use headwater::fs::sim::{Down, Fault, Repeat, SimFs};
use headwater::planted::Bug;
use headwater::{RecoveryReport, Store};

use super::Check;
use super::life::overlapping_groups;
use super::world::{DIR, World, is_disk_failure, seeded, segments};

/// The faults that are tried at every operation.
pub(crate) const FAULTS: [(Fault, Repeat); 8] = [
    (Fault::PowerCut, Repeat::Once),
    (Fault::Kill, Repeat::Once),
    (Fault::Eio, Repeat::Once),
    (Fault::Eio, Repeat::Forever),
    (Fault::Enospc, Repeat::Once),
    (Fault::Enospc, Repeat::Forever),
    (Fault::ShortWrite, Repeat::Once),
    (Fault::Eintr, Repeat::Once),
];

/// A short piece of a store's life.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Whose disk fails.
    disk: Whose,
    /// Without faults.
    prepare: fn(&mut World) -> Check<()>,
    /// With a fault; whether everything succeeded.
    act: fn(&mut World) -> Check<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    Origin,
    Mirror,
}

/// How many second faults are tried behind each first one, inside the recovery.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Second {
    Sampled(u32),
    Every,
}

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "create", disk: Whose::Origin, prepare: |_| Ok(()), act: open_and_append },
    Scenario { name: "append", disk: Whose::Origin, prepare: filled, act: open_and_append },
    Scenario { name: "roll", disk: Whose::Origin, prepare: filled, act: open_and_roll },
    Scenario {
        name: "prepared ahead, cut behind",
        disk: Whose::Origin,
        prepare: filled,
        act: rolls_and_close,
    },
    Scenario { name: "overlapping groups", disk: Whose::Origin, prepare: filled, act: groups },
    Scenario { name: "reopen, close", disk: Whose::Origin, prepare: filled, act: reopen_and_close },
    Scenario { name: "torn tail", disk: Whose::Origin, prepare: torn, act: open_and_append },
    Scenario {
        name: "torn tail, disk full",
        disk: Whose::Origin,
        prepare: torn_and_full,
        act: open_only,
    },
    Scenario {
        name: "unproven batches",
        disk: Whose::Origin,
        prepare: unproven,
        act: open_and_append,
    },
    Scenario {
        name: "segments behind",
        disk: Whose::Origin,
        prepare: behind,
        act: open_and_append,
    },
    Scenario {
        name: "disk full, freed",
        disk: Whose::Origin,
        prepare: filled,
        act: full_and_freed,
    },
    Scenario { name: "mirror, from nothing", disk: Whose::Mirror, prepare: filled, act: feed },
    Scenario {
        name: "mirror, catching up",
        disk: Whose::Mirror,
        prepare: mirror_behind,
        act: feed,
    },
    Scenario { name: "mirror, restarted", disk: Whose::Mirror, prepare: mirror_torn, act: feed },
    Scenario {
        name: "mirror, damaged tail",
        disk: Whose::Mirror,
        prepare: mirror_damaged,
        act: feed,
    },
];

/// Runs one scenario in the world of `seed`; how many crashes there were.
pub(crate) fn run(scenario: &Scenario, seed: u64, second: Second, bug: Option<Bug>) -> Check<u64> {
    seeded(seed, bug, || {
        let mut world = World::new(seed);
        let name = scenario.name;
        (scenario.prepare)(&mut world)
            .map_err(|what| world.failure(seed, &format!("{name}: preparing: {what}")))?;
        let mut crashes = 0;
        let mut clean = world.fork(seed);
        let before = scenario.disk(&clean).ops();
        if !(scenario.act)(&mut clean)
            .map_err(|what| clean.failure(seed, &format!("{name}: {what}")))?
        {
            return Err(clean.failure(seed, &format!("{name}: fails without a fault")));
        }
        for at in before..scenario.disk(&clean).ops() {
            for (fault, repeat) in FAULTS {
                let mut case = world.fork(seed);
                let case_name =
                    format!("{name}: {fault:?} {repeat:?} at operation {}", at - before);
                case.note(&case_name);
                scenario.disk(&case).fail_at(at, fault, repeat);
                scenario
                    .first_fault(&mut case, fault, second, at)
                    .map_err(|what| case.failure(seed, &format!("{case_name}: {what}")))?;
                crashes += case.crashes;
            }
        }
        Ok(crashes)
    })
}

impl Scenario {
    fn disk<'a>(&self, world: &'a World) -> &'a SimFs {
        match self.disk {
            Whose::Origin => &world.fs,
            Whose::Mirror => &world.mirror_fs,
        }
    }

    fn first_fault(&self, case: &mut World, fault: Fault, second: Second, at: u64) -> Check<()> {
        let succeeded = (self.act)(case)?;
        if matches!(fault, Fault::ShortWrite | Fault::Eintr) && !succeeded {
            return Err("a short or interrupted call is not repeated".into());
        }
        let down = self.disk(case).down();
        let ends = [true, false].into_iter().filter(|cut| *cut || down != Some(Down::PowerCut));
        for power_cut in ends {
            let mut after = case.fork(at << 8 | u64::from(power_cut) << 4 | fault as u64);
            let outcome = self.behind_the_crash(&mut after, power_cut, second);
            case.crashes += after.crashes;
            if outcome.is_err() {
                case.log = std::mem::take(&mut after.log);
                return outcome;
            }
        }
        Ok(())
    }

    fn behind_the_crash(&self, world: &mut World, power_cut: bool, second: Second) -> Check<()> {
        self.end_life(world, power_cut);
        let mut healed = world.next_fork();
        let before = self.disk(&healed).ops();
        self.recover(&mut healed).inspect_err(|_| world.log = healed.log.clone())?;
        let ops = self.disk(&healed).ops() - before;
        self.check(&mut healed).inspect_err(|_| world.log = healed.log.clone())?;
        let seconds: Vec<u64> = match second {
            Second::Every => (0..ops).collect(),
            Second::Sampled(count) => (0..count).map(|_| world.rng.u64(..ops.max(1))).collect(),
        };
        for at in seconds {
            let mut again = world.next_fork();
            let (fault, repeat) = FAULTS[again.rng.usize(..FAULTS.len())];
            again.note(format!("second: {fault:?} {repeat:?} at operation {at} of the recovery"));
            let disk = self.disk(&again);
            let struck = disk.faults_struck();
            disk.fail_at(disk.ops() + at, fault, repeat);
            let outcome = self.second_fault(&mut again, struck);
            world.crashes += again.crashes;
            outcome.inspect_err(|_| world.log = again.log.clone())?;
        }
        Ok(())
    }

    fn second_fault(&self, world: &mut World, struck: u64) -> Check<()> {
        let opened = match self.disk {
            Whose::Origin => opened(world)?.map(drop).is_some(),
            Whose::Mirror => feed(world)?,
        };
        if !opened && self.disk(world).faults_struck() == struck {
            return Err("the disk fails without a fault".into());
        }
        let cut = self.disk(world).down() == Some(Down::PowerCut) || world.rng.bool();
        self.end_life(world, cut);
        self.recover(world)?;
        self.check(world)
    }

    fn end_life(&self, world: &mut World, power_cut: bool) {
        self.disk(world).clear_faults();
        match (self.disk, power_cut) {
            (Whose::Origin, _) => world.end_life(power_cut),
            (Whose::Mirror, true) => world.mirror_fs.power_cut(),
            (Whose::Mirror, false) => world.mirror_fs.kill(),
        }
        world.crashes += u64::from(self.disk == Whose::Mirror);
        if self.disk == Whose::Mirror {
            world.fs.kill();
        }
    }

    /// The opening behind the last crash; where the disk is full, it still is.
    fn recover(&self, world: &mut World) -> Check<()> {
        if self.disk == Whose::Origin {
            let store = world.open_healed()?;
            world.check_contents(&store)?;
        }
        Ok(())
    }

    fn check(&self, world: &mut World) -> Check<()> {
        world.check_healed()
    }
}

// ------------------------------------------------------------------------------------------ what is tried

/// The store, if the disk lets it be opened and read.
fn opened(world: &mut World) -> Check<Option<Store>> {
    let store = match world.open() {
        Ok(store) => store,
        Err(error) if is_disk_failure(&error) => {
            world.note(format!("open failed: {error}"));
            return Ok(None);
        }
        Err(error) => return Err(format!("false alarm: {error} ({error:?})")),
    };
    match world.check_contents(&store) {
        Ok(()) => Ok(Some(store)),
        Err(what) if what.contains("os error") || what.contains("simulated") => {
            world.note(format!("reading failed: {what}"));
            Ok(None)
        }
        Err(what) => Err(what),
    }
}

fn open_only(world: &mut World) -> Check<bool> {
    Ok(opened(world)?.is_some())
}

fn open_and_append(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    for _ in 0..2 {
        let acked = world.acked.len();
        if !world.append_one(&store)? || world.acked.len() == acked {
            return Ok(false);
        }
    }
    Ok(true)
}

fn open_and_roll(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    let segments = store.journal().segments().len();
    for _ in 0..100 {
        let acked = world.acked.len();
        if !world.append_one(&store)? || world.acked.len() == acked {
            return Ok(false);
        }
        if store.journal().segments().len() > segments {
            return Ok(true);
        }
    }
    Err("there was no roll".into())
}

/// Several rolls, with what is done beside them at the pace of this seed. Failures there fail no append.
fn rolls_and_close(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    let segments = store.journal().segments().len();
    while store.journal().segments().len() < segments + 3 {
        let acked = world.acked.len();
        if !world.append_one(&store)? || world.acked.len() == acked {
            return Ok(false);
        }
    }
    // Into the last segment, too: its name must have been synced.
    Ok(world.append_one(&store)? && store.close().is_ok())
}

fn groups(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    let struck = world.fs.faults_struck();
    overlapping_groups(world, store, 5)?;
    Ok(world.fs.faults_struck() == struck || world.fs.down().is_none())
}

fn reopen_and_close(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    Ok(store.close().is_ok())
}

fn full_and_freed(world: &mut World) -> Check<bool> {
    let Some(store) = opened(world)? else { return Ok(false) };
    world.fs.set_capacity(Some(0));
    for _ in 0..100 {
        let acked = world.acked.len();
        if !world.append_one(&store)? {
            world.fs.set_capacity(None);
            return Ok(false);
        }
        if world.acked.len() == acked {
            world.fs.set_capacity(None);
            return world.append_one(&store);
        }
    }
    Err("the disk never was full".into())
}

fn feed(world: &mut World) -> Check<bool> {
    world.fs.kill();
    let store = world.open_healed()?;
    let fed = world.feed(&store, true)?;
    Ok(fed && world.mirror_fs.down().is_none())
}

// --------------------------------------------------------------------------------------------- beginnings

fn filled(world: &mut World) -> Check<()> {
    let store = world.open_healed()?;
    while store.journal().segments().len() < 3 {
        world.append_one(&store)?;
    }
    store.close().map_err(|error| error.to_string())
}

/// A crash that recovery reports as `wanted`, found by trying.
fn crashed(world: &mut World, fault: Fault, wanted: fn(&RecoveryReport) -> bool) -> Check<()> {
    filled(world)?;
    for attempt in 0..20_000 {
        let mut trial = world.fork(attempt);
        let store = trial.open_healed()?;
        let at = trial.fs.ops() + trial.rng.u64(..30);
        trial.fs.fail_at(at, fault, Repeat::Once);
        for _ in 0..20 {
            if !trial.append_one(&store)? {
                break;
            }
        }
        drop(store);
        let cut = fault == Fault::PowerCut;
        trial.end_life(cut);
        trial.fs.clear_faults();
        let probe = trial.fork(attempt);
        let report = probe.open().map_err(|error| error.to_string())?.recovery_report().clone();
        if wanted(&report) {
            *world = trial;
            return Ok(());
        }
    }
    Err("no such crash was found".into())
}

fn torn(world: &mut World) -> Check<()> {
    crashed(world, Fault::PowerCut, |report| report.torn_bytes > 0)
}

fn torn_and_full(world: &mut World) -> Check<()> {
    torn(world)?;
    world.fs.set_capacity(Some(0));
    Ok(())
}

fn unproven(world: &mut World) -> Check<()> {
    crashed(world, Fault::Eio, |report| report.rewritten_bytes > 0)
}

/// A segment whose header and first batch were under way in a crash: only a part of the batch got there.
fn behind(world: &mut World) -> Check<()> {
    filled(world)?;
    world.fs.kill();
    let next = segments(&world.fs, Path::new(DIR)).len();
    let mut bytes = vec![0; 8192];
    bytes[5000] = 1;
    let path = Path::new(DIR).join("journal").join(format!("{next:016x}.seg"));
    world.fs.write_raw(&path, &bytes);
    let probe = world.fork(0);
    let report = probe.open().map_err(|error| error.to_string())?.recovery_report().clone();
    if report.quarantined_segments == 1 { Ok(()) } else { Err(format!("{report:?}")) }
}

fn mirror_behind(world: &mut World) -> Check<()> {
    filled(world)?;
    let store = world.open_healed()?;
    world.mirror_life(&store, true)?;
    while store.journal().segments().len() < 6 {
        world.append_one(&store)?;
    }
    store.close().map_err(|error| error.to_string())
}

fn mirror_torn(world: &mut World) -> Check<()> {
    mirror_behind(world)?;
    let store = world.open_healed()?;
    let at = world.mirror_fs.ops() + 40 + world.rng.u64(..20);
    world.mirror_fs.fail_at(at, Fault::PowerCut, Repeat::Once);
    world.feed(&store, true)?;
    world.mirror_fs.clear_faults();
    world.mirror_fs.power_cut();
    drop(store);
    Ok(())
}

fn mirror_damaged(world: &mut World) -> Check<()> {
    mirror_behind(world)?;
    let store = world.open_healed()?;
    world.mirror_life(&store, true)?;
    store.close().map_err(|error| error.to_string())?;
    drop(store);
    world.fs.kill();
    world.damage_mirror();
    if world.mirror_damaged { Ok(()) } else { Err("no mirror".into()) }
}
