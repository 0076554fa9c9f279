//! The commit path under a scheduler that tries interleavings of its threads (shuttle): random ones, and
//! such with few changes of thread at chosen places (PCT), which find what needs a rare order.
//!
//! ```text
//!  appenders ─┐                                       ┌─ follower: waits for the end, reads
//!  tickets   ─┼─▶ Store on a simulated disk, whose ◀──┤
//!  buffered  ─┘   writes and syncs change threads,    └─ close, at any moment
//!                 and some of whose syncs fail
//! ```
//! What must hold, whatever the order: nothing hangs (the scheduler finds that), everybody is answered;
//! what is answered or shown is durable at that moment; after a power cut what was acknowledged is where it
//! was said to be, what was refused is not there, and positions have no holes.
//!
//! `./run shuttle` runs it. A failed schedule is printed; `HEADWATER_SCHEDULE=… ./run shuttle NAME` runs it
//! once more. `HEADWATER_SCHEDULES=n` sets how many are tried.
#![cfg(all(shuttle, feature = "test-kit"))]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests: a failure is a panic, and what was tried is printed"
)]

mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use headwater::planted::{self, Bug};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use world::{Events, Syncs, World};

/// How often each of them is run, by each scheduler.
const SCHEDULES: usize = 1_500;
/// Within how many a planted bug must be found.
const WITHIN: usize = 1_500;
/// Changes of thread that PCT places.
const DEPTH: usize = 3;

type Scenario = fn();

fn config(persistence: FailurePersistence) -> Config {
    let mut config = Config::new();
    config.stack_size = 512 * 1024;
    config.failure_persistence = persistence;
    config.max_steps = MaxSteps::FailAfter(200_000);
    config.silence_warnings = true;
    config
}

fn explore(name: &str, scenario: Scenario) {
    if let Ok(schedule) = std::env::var("HEADWATER_SCHEDULE") {
        return replay(&schedule, scenario);
    }
    let wanted = std::env::var("HEADWATER_SCHEDULES").ok();
    let count = wanted.map_or(SCHEDULES, |text| text.parse().unwrap());
    let began = Instant::now();
    let random = RandomScheduler::new(count);
    let random = Runner::new(random, config(FailurePersistence::Print)).run(scenario);
    let few = PctScheduler::new(DEPTH, count);
    let few = Runner::new(few, config(FailurePersistence::Print)).run(scenario);
    println!("{name}: {random} random and {few} PCT schedules, {:?}", began.elapsed());
}

fn replay(schedule: &str, scenario: Scenario) {
    let schedule: String = schedule.split_whitespace().collect();
    let replay = ReplayScheduler::new_from_encoded(&schedule);
    Runner::new(replay, config(FailurePersistence::None)).run(scenario);
}

/// Whether the bug is found within [`WITHIN`] schedules of one of the schedulers.
fn finds(bug: Bug, scenario: Scenario) -> bool {
    planted::plant(Some(bug));
    let began = Instant::now();
    let found = catch_unwind(AssertUnwindSafe(|| {
        let random = RandomScheduler::new_from_seed(1, WITHIN);
        Runner::new(random, config(FailurePersistence::None)).run(scenario);
    }))
    .is_err();
    planted::plant(None);
    println!("{bug:?}: found {found}, {:?}", began.elapsed());
    found
}

// --------------------------------------------------------------------------------------------- scenarios

/// Everything at once, on a disk whose syncs work.
fn all_kinds() {
    let world = World::new(Events::Small, Syncs::Work);
    let appenders = [world.appender("a", 2), world.appender("b", 2)];
    let tickets = world.submitter("t", 2);
    let buffered = world.buffering("u", 2);
    let follower = world.follower();
    for thread in appenders {
        thread.join().unwrap();
    }
    tickets.join().unwrap();
    buffered.join().unwrap();
    world.close();
    follower.join().unwrap();
    world.check();
}

/// The same, and one of the syncs fails.
fn failing_sync() {
    let world = World::new(Events::Small, Syncs::Fail);
    let appenders = [world.appender("a", 3), world.appender("b", 2)];
    let tickets = world.submitter("t", 2);
    let buffered = world.buffering("u", 2);
    let follower = world.follower();
    for thread in appenders {
        thread.join().unwrap();
    }
    tickets.join().unwrap();
    buffered.join().unwrap();
    world.close();
    follower.join().unwrap();
    world.check();
}

/// The journal is closed while others begin.
fn closed_meanwhile() {
    let world = World::new(Events::Small, Syncs::Work);
    let appender = world.appender("a", 2);
    let tickets = world.submitter("t", 2);
    let follower = world.follower();
    world.close();
    appender.join().unwrap();
    tickets.join().unwrap();
    follower.join().unwrap();
    world.check();
}

/// The same event comes twice at once, and another wants the same place in its stream; the sync that
/// decides may fail.
fn duplicate_and_conflict() {
    let syncs = if world::coin() { Syncs::Fail } else { Syncs::Work };
    let world = World::new(Events::Small, syncs);
    let threads = [world.claimant(1), world.claimant(1), world.claimant(2)];
    for thread in threads {
        thread.join().unwrap();
    }
    world.close();
    world.check();
}

/// Segments of a few batches: everybody meets rolls.
fn rolls() {
    let world = World::new(Events::Large, Syncs::Work);
    let appenders = [world.appender("a", 3), world.appender("b", 3)];
    let tickets = world.submitter("t", 3);
    let follower = world.follower();
    for thread in appenders {
        thread.join().unwrap();
    }
    tickets.join().unwrap();
    assert!(world.segments() > 1, "there was no roll");
    world.close();
    follower.join().unwrap();
    world.check();
}

/// Groups so large that each is written while the one in front of it is being synced; a sync may fail.
fn overlapping() {
    let syncs = if world::coin() { Syncs::Fail } else { Syncs::Work };
    let world = World::new(Events::Huge, syncs);
    let appenders = [world.appender("a", 2), world.appender("b", 2), world.appender("c", 1)];
    let follower = world.follower();
    for thread in appenders {
        thread.join().unwrap();
    }
    world.close();
    follower.join().unwrap();
    world.check();
}

/// The same, and the journal is closed meanwhile.
fn closed_while_overlapping() {
    let world = World::new(Events::Huge, Syncs::Fail);
    let appenders = [world.appender("a", 2), world.appender("b", 2), world.appender("c", 1)];
    world.close();
    for thread in appenders {
        thread.join().unwrap();
    }
    world.check();
}

// ------------------------------------------------------------------------------------------------- tests

#[test]
fn every_kind_of_append_is_answered_truly_in_any_order() {
    explore("every_kind_of_append", all_kinds);
}

#[test]
fn a_failing_sync_ends_everybodys_waiting_in_any_order() {
    explore("a_failing_sync", failing_sync);
}

#[test]
fn closing_beside_appends_neither_hangs_nor_loses_in_any_order() {
    explore("closing_beside_appends", closed_meanwhile);
}

#[test]
fn closing_beside_overlapping_groups_of_which_one_fails_ends_in_any_order() {
    explore("closing_beside_overlapping", closed_while_overlapping);
}

#[test]
fn duplicates_and_conflicts_rest_on_what_is_durable_in_any_order() {
    explore("duplicates_and_conflicts", duplicate_and_conflict);
}

#[test]
fn rolls_let_everybody_through_in_any_order() {
    explore("rolls", rolls);
}

#[test]
fn overlapping_groups_are_answered_truly_in_any_order() {
    explore("overlapping_groups", overlapping);
}

/// A test that finds nothing proves nothing.
#[test]
fn planted_races_are_found() {
    let races: [(Bug, Scenario); 5] = [
        (Bug::LostWakeUp, all_kinds),
        (Bug::AnswerBeforePublish, all_kinds),
        (Bug::TurnWithoutNotice, overlapping),
        (Bug::RoomWithoutNotice, rolls),
        (Bug::ShipUnsynced, failing_sync),
    ];
    for (bug, scenario) in races {
        assert!(finds(bug, scenario), "{bug:?} is not found within {WITHIN} schedules");
    }
    for bug in [Bug::AcknowledgeBeforeSync, Bug::RetryFailedSync] {
        assert!(finds(bug, failing_sync), "{bug:?} is not found within {WITHIN} schedules");
    }
}

#[test]
fn a_failed_schedule_fails_again_when_it_is_replayed() {
    let dir = tempfile::tempdir().unwrap();
    planted::plant(Some(Bug::LostWakeUp));
    let kept = FailurePersistence::File(Some(dir.path().to_owned()));
    let failed = catch_unwind(AssertUnwindSafe(|| {
        Runner::new(RandomScheduler::new_from_seed(1, WITHIN), config(kept)).run(all_kinds);
    }));
    assert!(failed.is_err());
    let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let schedule = std::fs::read_to_string(file).unwrap();
    let again = catch_unwind(AssertUnwindSafe(|| replay(&schedule, all_kinds)));
    planted::plant(None);
    assert!(again.is_err(), "passes when it is replayed");
}
