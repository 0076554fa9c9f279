//! S6: a flipped bit anywhere is detected before it is applied, and never passed over.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use headwater::fs::os::OsFs;
use headwater::shipping::message::ErrorCode;
use headwater::shipping::{MirrorState, MirrorStatus, ShippingError, follow};
use headwater::{Journal, JournalOptions, Position, ReadError, SegmentInfo};

use super::{batches, impatient_follower, seed};
use crate::fault_proxy::{Fault, Proxy, What};
use crate::shipping::{Origin, SOON, assert_same_bytes, converged, small, start_mirror};

const PAGE_BYTES: u64 = 4096;

fn flip(path: &Path, at: u64, bit: u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, at).unwrap();
}

/// Any byte that means something: of a header page or a batch.
fn any_byte(rng: &mut fastrand::Rng, journal: &Journal) -> (SegmentInfo, u64) {
    let mut segments = journal.segments();
    segments.retain(|segment| segment.end_offset > segment.base_offset);
    let segment = segments.swap_remove(rng.usize(..segments.len()));
    let at = rng.u64(..PAGE_BYTES + segment.end_offset - segment.base_offset);
    (segment, at)
}

/// The position of the batch in which that byte lies; `None` in a header page.
fn batch_at(journal: &Journal, segment: &SegmentInfo, at: u64) -> Option<Position> {
    let offset = segment.base_offset + at.checked_sub(PAGE_BYTES)?;
    let (_, ends) = batches(journal);
    let behind = ends.iter().take_while(|end| end.offset <= offset).last();
    Some(behind.map_or(Position::START, |end| end.position))
}

#[test]
fn s6_a_flipped_bit_anywhere_at_the_origin_is_reported_with_its_position_and_never_passed_over() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let dir = tempfile::tempdir().unwrap();
    // What was appended last would be sent from memory.
    let from_disk = JournalOptions { recent_bytes_max: 0, ..small() };
    let origin = Origin::start(dir.path().join("origin"), from_disk);
    origin.append(0..120);
    let journal = origin.store().journal();
    let mut reported = 0;
    for number in 0..24 {
        let (segment, at) = any_byte(&mut rng, journal);
        let (bit, expected) = (rng.u8(..8), batch_at(journal, &segment, at));
        println!("segment {}, byte {at}, bit {bit}: {expected:?}", segment.number);
        flip(&segment.path, at, bit);
        let mirror = start_mirror(&dir.path().join(format!("mirror-{number}")), &origin);
        let end = journal.end();
        let settled = |status: &MirrorStatus| status.is_halted() || status.mirrored == Some(end);
        let status = mirror.wait_until(SOON, settled).unwrap();
        match (&status.state, expected) {
            (MirrorState::Halted(ShippingError::Reported { failure }), _) => {
                let position = expected.unwrap_or(segment.base_position);
                assert_eq!((failure.code, failure.position), (ErrorCode::CORRUPT, Some(position)));
                assert_eq!(status.mirrored.unwrap().position, position);
                reported += 1;
            }
            // Of a header there are two copies, and zeros behind them.
            (_, None) => assert_eq!(status.mirrored, Some(end), "{status:?}"),
            (state, Some(_)) => panic!("{state:?}"),
        }
        flip(&segment.path, at, bit);
        mirror.resume();
        assert_same_bytes(journal, &converged(&mirror, &origin));
    }
    println!("{reported} of 24 were reported, the others healed from the second copy of a header");
    assert!(reported > 0);
}

/// In every frame of both directions.
#[test]
fn s6_a_flipped_bit_anywhere_on_the_way_heals_and_is_never_applied() {
    let seed = seed();
    let mut rng = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..12);
    let said_by_origin = origin.store().journal().end().offset as usize + PAGE_BYTES as usize + 400;
    std::thread::scope(|scope| {
        for number in 0..48 {
            let of_origin = number % 3 > 0;
            let at = rng.usize(..if of_origin { said_by_origin } else { 260 });
            let fault = Fault { of_origin, at, what: What::Flip(rng.u8(..8)) };
            let proxy = Proxy::start(origin.address, move |number| match number {
                0 => vec![fault],
                _ => Vec::new(),
            });
            let (mirror_dir, origin) = (dir.path().join(format!("mirror-{number}")), &origin);
            scope.spawn(move || {
                let (address, options) = (proxy.address.to_string(), impatient_follower());
                let mirror = follow(Arc::new(OsFs), &mirror_dir, address, options).unwrap();
                let journal = converged(&mirror, origin);
                assert_same_bytes(origin.store().journal(), &journal);
                println!("{fault:?}: {} faults struck", proxy.struck());
            });
        }
    });
}

#[test]
fn s6_a_flipped_bit_anywhere_in_a_mirror_is_found_by_whoever_reads_it_or_fetched_again() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..120);
    let mirror_dir = dir.path().join("mirror");
    let (mut found, mut healed) = (0, 0);
    for _ in 0..24 {
        let mirror = start_mirror(&mirror_dir, &origin);
        let journal = converged(&mirror, &origin);
        let (segment, at) = any_byte(&mut rng, &journal);
        let (bit, expected) = (rng.u8(..8), batch_at(&journal, &segment, at));
        drop(journal);
        mirror.stop().unwrap();
        println!("segment {}, byte {at}, bit {bit}: {expected:?}", segment.number);
        flip(&segment.path, at, bit);
        let mirror = start_mirror(&mirror_dir, &origin);
        let journal = converged(&mirror, &origin);
        match read_all(&journal) {
            (read, Some(ReadError::Corruption(corruption))) => {
                assert_eq!(Some(Position::new(read)), expected.or(Some(segment.base_position)));
                assert_eq!(corruption.position, Position::new(read));
                found += 1;
                flip(&segment.path, at, bit);
            }
            (_, Some(error)) => panic!("{error}"),
            (read, None) => {
                assert_eq!(Position::new(read), origin.end());
                healed += 1;
                // The second copy of a header stands for the first; a tail was fetched again.
                if expected.is_some() {
                    assert_same_bytes(origin.store().journal(), &journal);
                } else {
                    flip(&segment.path, at, bit);
                }
            }
        }
        mirror.stop().unwrap();
    }
    println!("{found} were found by reading, {healed} healed");
    assert!(found > 0);
}

/// How many events can be read, in order, and what ends that.
fn read_all(journal: &Journal) -> (u64, Option<ReadError>) {
    let mut read = 0;
    let events = match journal.read_all(Position::START) {
        Ok(events) => events,
        Err(error) => return (0, Some(error)),
    };
    for event in events {
        match event {
            Ok(event) => assert_eq!(event.position().get(), read),
            Err(error) => return (read, Some(error)),
        }
        read += 1;
    }
    (read, None)
}
