//! `verify` finds every damage, and nothing where there is none: not after a crash, not beside a writer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use headwater::fs::{Fs, os::OsFs};
use headwater::{
    Append, DamageKind, ExpectedRevision, Journal, JournalOptions, NewEvent, Position,
    SegmentCheck, SegmentState, Store, StreamId, VerifyReport, verify,
};

pub(crate) fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

/// A store with `events` events in several segments.
pub(crate) fn fill(dir: &Path, options: JournalOptions, events: usize) -> Store {
    let store = Store::builder(dir).create_if_missing().journal_options(options).open().unwrap();
    for i in 0..events {
        let stream = StreamId::new(format!("s-{}", i % 7)).unwrap();
        let text = format!("{i}-{}", "x".repeat(i * 31 % 700));
        let event = NewEvent::raw("test.happened", text).unwrap().tag("t").metadata("k", "v");
        store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }
    store
}

fn check(journal: &Path) -> VerifyReport {
    verify(&OsFs, journal, &mut |_| {}).unwrap()
}

fn healthy(journal: &Path) -> VerifyReport {
    let report = check(journal);
    assert_eq!(report.damage, []);
    report
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// The files that make up the journal: all but the lock.
fn files(journal: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(journal).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.is_file() && !path.ends_with("lock")).collect();
    files.sort();
    files
}

#[test]
fn every_flipped_bit_of_a_closed_journal_is_found() {
    for alignment in [64, 512] {
        let dir = tempfile::tempdir().unwrap();
        let options = JournalOptions { group_alignment_bytes: alignment, ..small() };
        fill(dir.path(), options, 90).close().unwrap();
        let journal = dir.path().join("journal");
        let report = healthy(&journal);
        assert!(report.closed && report.segments.len() >= 3 && report.events == 90, "{report:?}");
        assert!(report.segments[0].sidecar);
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let files = files(&journal);
        for round in 0..500 {
            let path = &files[round % files.len()];
            let whole = std::fs::read(path).unwrap();
            // Half of the flips go where something is written.
            let mut bit = rng.usize(..whole.len() * 8);
            for _ in 0..20 {
                if round % 2 == 0 || whole[bit / 8] != 0 {
                    break;
                }
                bit = rng.usize(..whole.len() * 8);
            }
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(path, &damaged).unwrap();
            let found = verify(&OsFs, &journal, &mut |_| {});
            std::fs::write(path, &whole).unwrap();
            let damage = found.unwrap().damage;
            assert!(
                damage.iter().any(|damage| &damage.path == path),
                "seed {seed}: bit {bit} of {} was not found: {damage:?}",
                path.display()
            );
            assert!(
                damage.iter().all(|damage| !damage.code().is_empty() && !damage.hint().is_empty())
            );
        }
        healthy(&journal);
    }
}

#[test]
fn damage_is_reported_with_its_place_and_what_follows_is_still_read() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 90).close().unwrap();
    let journal = dir.path().join("journal");
    let before = healthy(&journal);
    let second = &before.segments[1];
    let mut bytes = std::fs::read(&second.path).unwrap();
    bytes[4096 + 200] ^= 1; // in the body of the segment's first batch
    std::fs::write(&second.path, &bytes).unwrap();
    let report = check(&journal);
    let [damage] = &report.damage[..] else { panic!("{:?}", report.damage) };
    assert_eq!((&damage.path, damage.file_offset), (&second.path, 4096));
    assert_eq!((damage.position, damage.code()), (Some(second.base_position), "damage.batch"));
    assert_eq!(report.end.position, second.base_position);
    assert_eq!(report.segments.len(), before.segments.len());
    assert_eq!(report.segments[2..], before.segments[2..]);
}

#[test]
fn lost_files_and_cut_files_are_damage() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 90).close().unwrap();
    let journal = dir.path().join("journal");
    let segments = healthy(&journal).segments;
    for (index, segment) in segments.iter().enumerate() {
        let whole = std::fs::read(&segment.path).unwrap();
        std::fs::remove_file(&segment.path).unwrap();
        let codes: Vec<_> = check(&journal).damage.iter().map(headwater::Damage::code).collect();
        let last = index + 1 == segments.len();
        assert!(
            codes.contains(&if last { "damage.lost_tail" } else { "damage.missing_segment" }),
            "{index}: {codes:?}"
        );
        let batches_end = whole.iter().rposition(|&byte| byte != 0).unwrap();
        for len in [0, 100, 4096, 5000, batches_end] {
            std::fs::write(&segment.path, &whole[..len]).unwrap();
            assert!(!check(&journal).is_healthy(), "segment {index} cut to {len}");
        }
        std::fs::write(&segment.path, &whole).unwrap();
    }
    std::fs::remove_file(journal.join("mark")).unwrap();
    assert!(matches!(check(&journal).damage[0].kind, DamageKind::Mark(_)));
}

#[test]
fn what_a_crash_leaves_behind_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    // No thread that changes files while they are copied.
    let options = JournalOptions { background_thread: false, ..small() };
    let store = fill(&dir.path().join("store"), options, 60);
    let crashed = dir.path().join("crashed");
    copy_dir(&dir.path().join("store/journal"), &crashed);
    drop(store);
    let report = healthy(&crashed);
    assert!(!report.closed);
    let in_use = |segment: &&SegmentCheck| segment.state != SegmentState::Spare;
    let active = report.segments.iter().rfind(in_use).unwrap();
    assert_eq!(active.state, SegmentState::Active);

    // A torn group behind the end, and a segment that was never acknowledged.
    let bytes = std::fs::read(&active.path).unwrap();
    let end = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let end = end.next_multiple_of(64);
    let mut torn = bytes.clone();
    torn[end..end + 100].copy_from_slice(&bytes[4096..4196]);
    std::fs::write(&active.path, &torn).unwrap();
    let next = crashed.join(format!("{:016x}.seg", active.number + 1));
    std::fs::write(&next, &bytes[..5000]).unwrap();
    let report = healthy(&crashed);
    assert!(report.unacknowledged_bytes >= 100);
    assert_eq!(report.segments.last().unwrap().state, SegmentState::Unacknowledged);
    assert_eq!(report.end.position, Position::new(60));
}

#[test]
fn a_replaced_history_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fill(&a, small(), 5).close().unwrap();
    copy_dir(&a.join("journal"), &b.join("journal"));
    fill(&a, small(), 3).close().unwrap();
    fill(&b, small(), 3).close().unwrap();
    let segment = "journal/0000000000000000.seg";
    std::fs::copy(a.join(segment), b.join(segment)).unwrap();
    let damage = check(&b.join("journal")).damage;
    assert!(damage.iter().any(|damage| damage.code() == "damage.history_replaced"), "{damage:?}");
}

#[test]
fn a_directory_without_node_and_mark_is_verified_as_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 40).close().unwrap();
    let journal = dir.path().join("journal");
    std::fs::remove_file(journal.join("node")).unwrap();
    std::fs::remove_file(journal.join("mark")).unwrap();
    let report = healthy(&journal);
    assert_eq!((report.role, report.events), (None, 40));
}

#[test]
fn beside_a_writer_nothing_looks_damaged_and_readers_see_a_growing_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let options = JournalOptions { segment_bytes_max: 64 * 1024, ..small() };
    let store = fill(dir.path(), options, 1);
    let journal = dir.path().join("journal");
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (store, stop) = (&store, &stop);
            scope.spawn(move || {
                let stream = StreamId::new(format!("t-{thread}")).unwrap();
                let mut n = 0_usize;
                while !stop.load(Ordering::Relaxed) {
                    let event = NewEvent::raw("e", "y".repeat(n * 13 % 900)).unwrap();
                    store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
                    n += 1;
                }
            });
        }
        let mut last = Position::START;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while last < Position::new(1500) {
                let before = store.journal().end().position;
                healthy(&journal);
                let (reader, corruption) = Journal::open_read_only(&fs, &journal).unwrap();
                assert_eq!(corruption, None);
                let end = reader.end().position;
                assert!(end >= last && end <= store.journal().end().position);
                // The mark is written just behind the publication, so one group may still be missing.
                assert!(before.since(end) <= 2, "published {before}, proven {end}");
                let events = reader.read_all(last).unwrap();
                assert_eq!(events.map(Result::unwrap).count() as u64, end.since(last));
                last = end;
            }
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    let (reader, _) = Journal::open_read_only(&fs, &journal).unwrap();
    assert_eq!(reader.end(), store.journal().end());
    store.close().unwrap();
    healthy(&journal);
}
