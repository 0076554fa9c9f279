//! Bugs that are planted, to prove that the tests would find them: each is convicted by the check that is
//! there for it, within a stated number of seeds.
//!
//! Elsewhere: `CheckpointApartFromRows` in `src/view/db.rs`, beside the database; the races in `tests/shuttle`.
//!
//! The numbers are about seven times what it takes on average (`planted::rates` measures it): other seeds would
//! miss one in a thousand, and a check that becomes much weaker fails here.

use headwater::planted::{self, Bug};

use crate::simulation::every_fault::{self, SCENARIOS, Second};
use crate::simulation::{Check, life};

struct Planted {
    bug: Bug,
    /// What convicts it.
    check: &'static str,
    /// One seed; an error convicts.
    run: fn(u64, Option<Bug>) -> Check<()>,
    /// Seeds within which it must be.
    within: u64,
}

const PLANTED: &[Planted] = &[
    Planted { bug: Bug::AcknowledgeBeforeSync, check: LIVES, run: lives, within: 10 },
    Planted { bug: Bug::DropBatchAtRoll, check: LIVES, run: lives, within: 10 },
    Planted { bug: Bug::NoBodyCheck, check: LIVES, run: lives, within: 60 },
    Planted { bug: Bug::NoDirectorySync, check: LIVES, run: lives, within: 15 },
    Planted { bug: Bug::RetryFailedSync, check: LIVES, run: lives, within: 60 },
    Planted { bug: Bug::ShipUnsynced, check: LIVES, run: lives, within: 60 },
    Planted { bug: Bug::SplitBatch, check: LIVES, run: lives, within: 20 },
    Planted { bug: Bug::TrustPageCache, check: LIVES, run: lives, within: 60 },
    Planted { bug: Bug::NameSyncedAgain, check: AHEAD, run: ahead, within: 10 },
    #[cfg(feature = "shipping")]
    Planted { bug: Bug::UnboundedFrame, check: PEER, run: hostile_peer, within: 1 },
];

const LIVES: &str = "random lives";
const AHEAD: &str = "every fault while segments are prepared";
#[cfg(feature = "shipping")]
const PEER: &str = "a peer that claims too much";

#[test]
fn planted_bugs_are_caught() {
    let mut missed = Vec::new();
    for Planted { bug, check, run, within } in PLANTED {
        let caught = (0..*within).find_map(|seed| Some((seed, run(seed, Some(*bug)).err()?)));
        match caught {
            Some((seed, what)) => {
                let what = what.lines().next().unwrap_or_default();
                println!("{bug:?}: {check}, seed {seed} of {within}: {what}");
            }
            None => missed.push(format!("{bug:?} by {check} within {within} seeds")),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// How many seeds of many convict each bug, to set `within`.
#[test]
#[ignore = "a measurement"]
fn rates() {
    for Planted { bug, check, run, within } in PLANTED {
        let seeds = 0..if *within > 10 { 400 } else { *within };
        let all = seeds.end;
        let convicted: Vec<u64> = seeds.filter(|seed| run(*seed, Some(*bug)).is_err()).collect();
        let gaps = convicted.windows(2).map(|pair| pair[1] - pair[0]).max();
        println!("{bug:?}: {check}, {} of {all}, at most {gaps:?} apart", convicted.len());
    }
}

/// The same checks, without a bug: they convict nobody who is innocent.
#[test]
fn without_a_bug_nobody_is_convicted() {
    for Planted { run, within, .. } in PLANTED {
        for seed in 0..(*within).min(3) {
            run(seed, None).unwrap_or_else(|what| panic!("{what}"));
        }
    }
}

fn lives(seed: u64, bug: Option<Bug>) -> Check<()> {
    // A bug may also make the library panic.
    let run = std::panic::catch_unwind(|| life::run(seed, bug).map(drop));
    planted::plant(None);
    run.unwrap_or_else(|_| Err("a panic".into()))
}

fn ahead(seed: u64, bug: Option<Bug>) -> Check<()> {
    let name = "prepared ahead, cut behind";
    let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).ok_or("no scenario")?;
    every_fault::run(scenario, seed, Second::Sampled(0), bug).map(drop)
}

/// Frames that claim more than was agreed are refused before they are kept.
#[cfg(feature = "shipping")]
fn hostile_peer(_: u64, bug: Option<Bug>) -> Check<()> {
    use headwater::format::crc32;
    use headwater::shipping::message::{DATA_FIXED_BYTES, FRAME_BYTES_MAX, FrameReader};
    planted::plant(bug);
    let mut reader = FrameReader::new();
    reader.allow_data(FRAME_BYTES_MAX);
    let mut taken = 0;
    let outcome = loop {
        // The header of a DATA frame of 4 GB, and its beginning for as long as it is taken.
        let bytes = if taken == 0 {
            let header = [&u32::MAX.to_le_bytes()[..], &[0x10, 0, 0, 0]].concat();
            let crc = crc32(&[&header, &[0; DATA_FIXED_BYTES as usize]]);
            [&header[..], &crc.to_le_bytes()].concat()
        } else {
            vec![0; 64 * 1024]
        };
        reader.push(&bytes);
        taken += bytes.len();
        match reader.next_message() {
            Err(_) => break Ok(()),
            Ok(_) if taken > 2 * FRAME_BYTES_MAX as usize => {
                break Err(format!("{taken} bytes were kept for one frame"));
            }
            Ok(_) => {}
        }
    };
    planted::plant(None);
    outcome
}
