//! Simulated crashes: whatever was acknowledged is there, in order, once; whatever was not is whole or
//! absent; there is no false corruption; opening again changes nothing.
//!
//! A run is determined by its seed. `HEADWATER_SEED=n` runs one seed, `HEADWATER_CRASHES=n` sets how many
//! crashes to reach. The same, for longer: `./run soak`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use headwater::fs::sim::{Fault, Repeat, SimFs};
use headwater::{Append, ExpectedRevision, NewEvent, Position, Store, StreamId};

use crate::options;
use crate::simulation::campaign::{Tally, Until, over_seeds};
use crate::simulation::every_fault::{self, SCENARIOS, Second};
use crate::simulation::reached::Reached;
use crate::simulation::{bits, life, misdirected, threads};

fn crashes_wanted() -> u64 {
    let text = std::env::var("HEADWATER_CRASHES").ok();
    text.map_or(10_000, |text| text.parse().expect("HEADWATER_CRASHES is a number"))
}

fn sound(what: &str, tally: &Tally) {
    assert!(tally.failures.is_empty(), "{}", tally.failures[0].1);
    println!("{what}: {} crashes in {} runs, 0 violations", tally.crashes, tally.runs);
}

#[test]
fn acknowledged_batches_survive_every_crash_in_order_and_once() {
    if let Ok(seed) = std::env::var("HEADWATER_SEED") {
        let seed = seed.parse().expect("HEADWATER_SEED is a number");
        life::run(seed, None).unwrap_or_else(|what| panic!("{what}"));
        return;
    }
    let until = Until { crashes: Some(crashes_wanted()), time: None };
    let reached = Mutex::new(Reached::default());
    let one = |seed| {
        let outcome = life::run(seed, None)?;
        reached.lock().unwrap().add(&outcome.reached);
        Ok(outcome.crashes)
    };
    let tally = over_seeds(0, until, one, |_| {});
    sound("random lives", &tally);
    // A simulation that never gets into trouble proves nothing.
    let (text, seldom) = reached.into_inner().unwrap().judge(tally.runs);
    println!("{text}");
    assert!(seldom.is_empty(), "too seldom in {} runs: {seldom:?}\n{text}", tally.runs);
}

#[test]
fn a_seed_run_twice_leaves_the_same_trace() {
    for seed in 0..50 {
        assert_eq!(life::run(seed, None), life::run(seed, None), "seed {seed}");
    }
    assert_ne!(life::run(1, None), life::run(2, None));
}

#[test]
fn every_fault_at_every_operation_of_every_scenario_is_survived() {
    let next = AtomicUsize::new(0);
    let only = std::env::var("HEADWATER_SCENARIO").ok();
    let work = || {
        let mut crashes = 0;
        while let Some(scenario) = SCENARIOS.get(next.fetch_add(1, Ordering::Relaxed)) {
            if only.as_ref().is_some_and(|only| only != scenario.name) {
                continue;
            }
            let here = every_fault::run(scenario, 1, Second::Sampled(1), None);
            crashes += here.unwrap_or_else(|what| panic!("{what}"));
        }
        crashes
    };
    let crashes = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        work() + other.join().unwrap()
    });
    println!("{crashes} crashes in {} scenarios, 0 violations", SCENARIOS.len());
}

#[test]
fn threads_that_append_until_the_disk_fails_are_all_answered_truly() {
    let until = Until { crashes: Some(1_000), time: None };
    sound("threads", &over_seeds(0, until, threads::run, |_| {}));
}

#[test]
fn a_misdirected_write_is_reported_or_harmless() {
    let (mut reported, mut harmless) = (0, 0);
    for seed in 0..1_000 {
        let ending = misdirected::run(seed).unwrap_or_else(|what| panic!("{what}"));
        reported += ending.reported;
        harmless += ending.harmless;
    }
    println!("{reported} reported, {harmless} harmless");
    assert!(reported > 50 && harmless > 50);
}

#[test]
fn a_flipped_bit_is_reported_with_file_offset_and_position() {
    let journal = bits::Journal::new(1).unwrap();
    // All of them in the soak; here each byte of a segment is flipped in one of its bits.
    for byte in (0..journal.bits / 8).step_by(7) {
        journal.flip(byte * 8 + byte % 8).unwrap_or_else(|what| panic!("{what}"));
    }
}

/// A name that a killed process has made, and whose sync fails in the next one, must not be trusted by the third. Every
/// pair of places in the making of a store at which that can happen.
#[test]
fn a_store_whose_making_was_interrupted_twice_is_not_lost() {
    let open = |fs: &SimFs| {
        let builder = Store::builder("/store").journal_options(options()).create_if_missing();
        builder.fs(Arc::new(fs.clone())).open()
    };
    let mut survived = 0;
    for (kill_at, fail_at) in (0..14).flat_map(|kill_at| (0..14).map(move |at| (kill_at, at))) {
        for fault in [Fault::Enospc, Fault::Eio] {
            let fs = SimFs::new(kill_at * 100 + fail_at);
            fs.fail_at(kill_at, Fault::Kill, Repeat::Once);
            drop(open(&fs));
            fs.kill();
            fs.clear_faults();
            fs.fail_at(fs.ops() + fail_at, fault, Repeat::Once);
            drop(open(&fs));
            fs.kill();
            fs.clear_faults();
            let store = open(&fs).unwrap();
            let stream = StreamId::new("a").unwrap();
            let event = NewEvent::raw("happened", *b"once").unwrap();
            store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
            drop(store);
            fs.power_cut();
            let events = open(&fs).unwrap().read_all(Position::START).unwrap().count();
            assert_eq!(events, 1, "killed at operation {kill_at}, {fault:?} {fail_at} behind that");
            survived += 1;
        }
    }
    assert_eq!(survived, 14 * 14 * 2);
}
