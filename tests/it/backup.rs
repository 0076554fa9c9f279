//! Backup and restore: byte-identical, continued, refused where they must be; a crash at every operation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::fs::sim::{Fault, Repeat, SimFs};
use headwater::{
    Append, BackupError, Comparison, ExpectedRevision, Journal, NewEvent, OpenError, Position,
    ReadError, RestoreError, Revision, Store, StreamId, abandon_restore, restore, verify,
};

use crate::options;

const DIR: &str = "/store";
const JOURNAL: &str = "/store/journal";
const BACKUP: &str = "/backup";
const RESTORED: &str = "/restored";
const RESTORED_JOURNAL: &str = "/restored/journal";

fn open_at(fs: &SimFs, dir: &str) -> Result<Store, OpenError> {
    let builder = Store::builder(dir).journal_options(options());
    let builder = if dir == DIR { builder.create_if_missing() } else { builder };
    builder.fs(Arc::new(fs.clone())).open()
}

fn payload(i: usize) -> Vec<u8> {
    format!("{i:04}-{}", "x".repeat(i * 37 % 150)).into_bytes()
}

/// Batches of 1 to 3 events, in three streams.
fn append(store: &Store, from: usize, to: usize) {
    let mut next = from;
    while next < to {
        let count = (next % 3 + 1).min(to - next);
        let stream = StreamId::new(format!("s-{}", next % 3)).unwrap();
        let events =
            (next..next + count).map(|i| NewEvent::raw("test.happened", payload(i)).unwrap());
        store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap();
        next += count;
    }
}

fn payloads(journal: &Journal) -> Vec<Vec<u8>> {
    let events = journal.read_all(Position::START).unwrap();
    events.map(|event| event.unwrap().into_data()).collect()
}

fn expected(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(payload).collect()
}

fn dynamic(fs: &SimFs) -> Arc<dyn Fs> {
    Arc::new(fs.clone())
}

fn read(fs: &SimFs, dir: &str) -> Journal {
    let (journal, damage) = Journal::open_read_only(&dynamic(fs), Path::new(dir)).unwrap();
    assert_eq!(damage, None, "{dir}");
    journal
}

/// A closed store with so many events in several segments.
fn closed_with(events: usize) -> SimFs {
    let fs = SimFs::new(events as u64);
    let store = open_at(&fs, DIR).unwrap();
    append(&store, 0, events);
    store.close().unwrap();
    fs
}

fn grow(fs: &SimFs, from: usize, to: usize) {
    let store = open_at(fs, DIR).unwrap();
    append(&store, from, to);
    store.close().unwrap();
}

fn segments(fs: &SimFs, dir: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs.files().into_iter().map(|path| Path::new("/").join(path));
    let files = files.filter(|path| {
        path.parent() == Some(Path::new(dir)) && path.extension().is_some_and(|e| e == "seg")
    });
    files.map(|path| (path.clone(), fs.raw(&path).unwrap())).collect()
}

/// The segments in `copy` are those in `of`: whole, but for the last one, which has nothing behind its end.
fn assert_identical(fs: &SimFs, copy: &str, of: &str) {
    let (copies, originals) = (segments(fs, copy), segments(fs, of));
    assert!(!copies.is_empty() && copies.len() <= originals.len());
    for (index, ((path, copy), (_, original))) in copies.iter().zip(&originals).enumerate() {
        assert!(original.starts_with(copy), "{}", path.display());
        assert!(index + 1 == copies.len() || copy.len() == original.len(), "{}", path.display());
    }
}

fn healthy(fs: &SimFs, dir: &str) -> headwater::VerifyReport {
    let report = verify(fs, Path::new(dir), &mut |_| {}).unwrap();
    assert_eq!(report.damage, [], "{dir}");
    report
}

fn backup(fs: &SimFs) -> Result<headwater::BackupReport, BackupError> {
    read(fs, JOURNAL).backup(Path::new(BACKUP))
}

fn restore_all(fs: &SimFs) -> Result<headwater::RestoreReport, RestoreError> {
    restore(&dynamic(fs), Path::new(BACKUP), Path::new(RESTORED_JOURNAL), None)
}

#[test]
fn a_backup_is_identical_verifiable_and_not_writable() {
    let fs = closed_with(90);
    let report = backup(&fs).unwrap();
    assert_eq!(report.end, read(&fs, JOURNAL).end());
    assert!(report.segments > 3);
    assert_identical(&fs, BACKUP, JOURNAL);
    let verified = healthy(&fs, BACKUP);
    assert_eq!((verified.role, verified.events, verified.end), (None, 90, report.end));
    assert_eq!(payloads(&read(&fs, BACKUP)), expected(90));
    let as_store = Store::builder("/copy").fs(dynamic(&fs));
    for (path, bytes) in segments(&fs, BACKUP) {
        fs.create_dir_all(Path::new("/copy/journal")).unwrap();
        fs.write_raw(&Path::new("/copy/journal").join(path.file_name().unwrap()), &bytes);
    }
    assert!(matches!(as_store.open(), Err(OpenError::Copy { .. })));
}

#[test]
fn a_repeated_backup_writes_only_what_is_new() {
    let fs = closed_with(40);
    let first = backup(&fs).unwrap();
    assert_eq!(backup(&fs).unwrap().written_bytes, 0);
    grow(&fs, 40, 90);
    let second = backup(&fs).unwrap();
    let new_segments = second.segments - first.segments;
    let batches = second.end.offset - first.end.offset;
    assert!(new_segments > 1);
    assert_eq!(second.written_bytes, batches + 4096 * new_segments);
    assert_identical(&fs, BACKUP, JOURNAL);
    assert_eq!(healthy(&fs, BACKUP).events, 90);
}

#[test]
fn a_live_store_is_backed_up_beside_its_appends() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder(dir.path().join("store"))
        .create_if_missing()
        .journal_options(options())
        .open()
        .unwrap();
    let (target, stop) = (dir.path().join("backup"), AtomicBool::new(false));
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                append(&store, n, n + 3);
                n += 3;
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut last = Position::START;
            while last < Position::new(600) {
                let durable = store.journal().end().position;
                let report = store.journal().backup(&target).unwrap();
                assert!(report.end.position >= durable && report.end.position >= last);
                last = report.end.position;
                let verified = verify(&OsFs, &target, &mut |_| {}).unwrap();
                assert!(verified.is_healthy() && verified.end == report.end, "{verified:?}");
            }
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    // The same from a process that doesn't own the store; its mark may be a group behind.
    let (journal, _) = Journal::open_read_only(&fs, &dir.path().join("store/journal")).unwrap();
    let other = dir.path().join("other");
    assert_eq!(journal.backup(&other).unwrap().end, journal.end());
    assert_eq!(store.journal().compare(&journal.end()).unwrap(), Comparison::Equal);
}

/// Runs `act` with a fault at each of its operations; then `check` after the crash.
fn at_every_operation(
    fs: &SimFs,
    act: impl Fn(&SimFs) -> bool,
    check: impl Fn(&SimFs, &str),
) -> u64 {
    let probe = fs.fork(0);
    let before = probe.ops();
    assert!(act(&probe));
    let operations = probe.ops() - before;
    for operation in 0..operations {
        for fault in [Fault::PowerCut, Fault::Kill, Fault::Eio, Fault::Enospc, Fault::ShortWrite] {
            let fork = fs.fork(operation);
            fork.fail_at(fork.ops() + operation, fault, Repeat::Once);
            let completed = act(&fork);
            fork.clear_faults();
            match fault {
                Fault::Kill => fork.kill(),
                _ => fork.power_cut(),
            }
            let what = format!("{fault:?} at {operation} of {operations}, completed: {completed}");
            check(&fork, &what);
        }
    }
    operations
}

#[test]
fn an_interrupted_backup_keeps_the_earlier_one_and_is_completed_by_the_next() {
    for (first, second) in [(0, 60), (25, 60), (40, 41)] {
        let fs = closed_with(first);
        if first > 0 {
            backup(&fs).unwrap();
        }
        grow(&fs, first, second);
        let operations = at_every_operation(
            &fs,
            |fs| {
                let journal = Journal::open_read_only(&dynamic(fs), Path::new(JOURNAL));
                journal.is_ok_and(|(journal, _)| journal.backup(Path::new(BACKUP)).is_ok())
            },
            |fs, what| {
                if first > 0 {
                    let (kept, _) =
                        Journal::open_read_only(&dynamic(fs), Path::new(BACKUP)).unwrap();
                    assert!(kept.end().position >= Position::new(first as u64), "{what}");
                }
                let report = backup(fs).unwrap_or_else(|error| panic!("{what}: {error}"));
                if what.ends_with("true") {
                    assert_eq!(report.written_bytes, 0, "{what}: not durable");
                }
                assert_identical(fs, BACKUP, JOURNAL);
                assert_eq!(healthy(fs, BACKUP).events, second as u64, "{what}");
            },
        );
        assert!(operations > 20, "{operations}");
    }
}

#[test]
fn a_backup_refuses_another_history_a_shorter_one_and_a_journal() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let before = segments(&fs, BACKUP);
    // The same journal, continued in another way from a copy, and the copy itself, which is shorter.
    let fork = fs.fork(1);
    grow(&fs, 40, 60);
    backup(&fs).unwrap();
    let longer = segments(&fs, BACKUP);
    for (path, bytes) in &longer {
        fork.write_raw(path, bytes);
    }
    assert!(matches!(backup(&fork), Err(BackupError::Ahead { .. })));
    grow(&fork, 40, 90);
    assert!(matches!(backup(&fork), Err(BackupError::Differs { .. })), "{:?}", backup(&fork));
    assert_eq!(segments(&fork, BACKUP), longer);
    // Another journal.
    let other = closed_with(41);
    for (path, bytes) in &before {
        other.create_dir_all(Path::new(BACKUP)).unwrap();
        other.write_raw(path, bytes);
    }
    assert!(matches!(backup(&other), Err(BackupError::Differs { .. })));
    // A journal's own directory, also another's.
    let onto = read(&fs, JOURNAL).backup(Path::new(JOURNAL));
    assert!(matches!(onto, Err(BackupError::NotABackup { .. })), "{onto:?}");
    // A lost segment of the backup.
    fs.remove_raw(&longer[1].0);
    assert!(matches!(backup(&fs), Err(BackupError::Missing { .. })));
}

#[test]
fn a_damaged_header_copy_of_a_backup_is_remade_by_the_next() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let before = segments(&fs, BACKUP);
    before.iter().for_each(|(path, _)| assert!(fs.flip_bit(path, 512 + 30, 1)));
    assert_eq!(backup(&fs).unwrap().written_bytes, 0);
    assert_eq!(segments(&fs, BACKUP), before);
}

#[test]
fn damage_of_a_backup_never_costs_what_only_the_backup_has() {
    let fs = closed_with(3);
    let shorter = fs.fork(7);
    grow(&fs, 3, 7);
    backup(&fs).unwrap();
    let [(path, bytes)] = &segments(&fs, BACKUP)[..] else { panic!("one segment") };
    shorter.create_dir_all(Path::new(BACKUP)).unwrap();
    shorter.write_raw(path, bytes);
    assert!(shorter.flip_bit(path, 4096 + 100, 1));
    let before = segments(&shorter, BACKUP);
    assert!(matches!(backup(&shorter), Err(BackupError::Ahead { .. })));
    assert_eq!(segments(&shorter, BACKUP), before);
    // The journal that has all of it mends it.
    assert!(fs.flip_bit(path, 4096 + 100, 1));
    backup(&fs).unwrap();
    assert_eq!(healthy(&fs, BACKUP).events, 7);
}

#[test]
fn a_fork_within_the_last_segment_is_not_mixed_into_a_backup() {
    let fs = closed_with(3);
    let fork = fs.fork(7);
    // The same events, batches of the same lengths: only incarnation and chain tell them apart.
    grow(&fs, 3, 6);
    grow(&fork, 3, 12);
    backup(&fs).unwrap();
    let [(path, bytes)] = &segments(&fs, BACKUP)[..] else { panic!("one segment") };
    fork.create_dir_all(Path::new(BACKUP)).unwrap();
    fork.write_raw(path, bytes);
    let refused = backup(&fork);
    assert!(matches!(refused, Err(BackupError::Differs { .. })), "{refused:?}");
    assert_eq!(segments(&fork, BACKUP), segments(&fs, BACKUP));
}

#[test]
fn damage_never_gets_into_a_backup() {
    let fs = closed_with(60);
    let all = segments(&fs, JOURNAL);
    let journal = read(&fs, JOURNAL);
    let (path, _) = &all[1];
    assert!(fs.flip_bit(path, 4096 + 200, 3));
    let error = journal.backup(Path::new(BACKUP)).unwrap_err();
    assert!(matches!(error, BackupError::Read(ReadError::Corruption(_))), "{error}");
    assert!(fs.flip_bit(path, 4096 + 200, 3));
    assert_eq!(backup(&fs).unwrap().end, journal.end());
    assert_eq!(healthy(&fs, BACKUP).events, 60);
}

#[test]
fn a_restored_journal_is_identical_and_goes_on_under_a_new_node_and_incarnation() {
    let fs = closed_with(60);
    let store = open_at(&fs, DIR).unwrap();
    let (id, node) = (store.journal().id(), store.journal().node());
    store.close().unwrap();
    backup(&fs).unwrap();
    let report = restore_all(&fs).unwrap();
    assert_ne!(report.node, node);
    assert_identical(&fs, RESTORED_JOURNAL, JOURNAL);
    assert_eq!(healthy(&fs, RESTORED_JOURNAL).end, report.end);
    let restored = open_at(&fs, RESTORED).unwrap();
    assert_eq!((restored.journal().id(), restored.journal().node()), (id, report.node));
    assert_eq!(payloads(restored.journal()), expected(60));
    append(&restored, 60, 90);
    assert_eq!(payloads(restored.journal()), expected(90));
    let head = restored.journal().stream_head(&StreamId::new("s-0").unwrap()).unwrap();
    assert!(head > Some(Revision::FIRST));
    // The original goes on too: with the same events, and another history.
    grow(&fs, 60, 90);
    let end = restored.journal().end();
    assert_eq!(read(&fs, JOURNAL).compare(&end).unwrap(), Comparison::Differs);
    assert_ne!(read(&fs, JOURNAL).end().incarnation, end.incarnation);
    assert_identical(&fs, BACKUP, RESTORED_JOURNAL);
}

#[test]
fn a_restore_ends_at_any_batch_end_and_only_there() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let source = read(&fs, BACKUP);
    let mut ends = vec![Position::START];
    let mut cursor = source.cursor(Position::START).unwrap();
    while let Some(batch) = cursor.next_batch().unwrap() {
        ends.push(batch.end().position);
    }
    for position in (0..=40).map(Position::new) {
        let fork = fs.fork(position.get());
        let target = Path::new(RESTORED_JOURNAL);
        let outcome = restore(&dynamic(&fork), Path::new(BACKUP), target, Some(position));
        if ends.contains(&position) {
            assert_eq!(outcome.unwrap().end.position, position);
            assert_identical(&fork, RESTORED_JOURNAL, JOURNAL);
            let store = open_at(&fork, RESTORED).unwrap();
            let count = position.get() as usize;
            assert_eq!(payloads(store.journal()), expected(count));
            append(&store, count, count + 9);
            assert_eq!(payloads(store.journal()), expected(count + 9));
        } else {
            let Err(RestoreError::NotABoundary { begins, ends: next, .. }) = outcome else {
                panic!("{position}: {outcome:?}")
            };
            assert!(begins < position && position < next);
            assert!(ends.contains(&begins) && ends.contains(&next));
            assert!(segments(&fork, RESTORED_JOURNAL).is_empty());
        }
    }
    let beyond = restore(
        &dynamic(&fs),
        Path::new(BACKUP),
        Path::new(RESTORED_JOURNAL),
        Some(Position::new(41)),
    );
    assert!(matches!(beyond, Err(RestoreError::Read(ReadError::BeyondEnd { .. }))), "{beyond:?}");
}

#[test]
fn an_interrupted_restore_is_incomplete_until_it_is_continued_or_abandoned() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let incoming = Path::new(RESTORED_JOURNAL).join("incoming");
    let operations = at_every_operation(
        &fs,
        |fs| restore_all(fs).is_ok(),
        |fs, what| {
            let complete = match open_at(fs, RESTORED) {
                Ok(store) => {
                    // Then it is the whole journal: there is nothing in between.
                    assert_eq!(payloads(store.journal()), expected(40), "{what}");
                    true
                }
                Err(OpenError::NotFound { .. } | OpenError::Incomplete { .. }) => false,
                Err(error) => panic!("{what}: {error}"),
            };
            assert!(complete || !what.ends_with("true"), "{what}: not durable");
            if complete {
                return;
            }
            let begun = fs.raw(&incoming).is_some();
            let abandoned = fs.fork(1);
            let outcome = abandon_restore(&dynamic(&abandoned), Path::new(RESTORED_JOURNAL));
            match begun {
                true => outcome.unwrap(),
                false => assert!(matches!(outcome, Err(RestoreError::NotBegun { .. })), "{what}"),
            }
            assert!(segments(&abandoned, RESTORED_JOURNAL).is_empty(), "{what}");
            for fork in [fs, &abandoned] {
                restore_all(fork).unwrap_or_else(|error| panic!("{what}: {error}"));
                let store = open_at(fork, RESTORED).unwrap();
                assert_eq!(payloads(store.journal()), expected(40), "{what}");
                drop(store);
                assert_eq!(healthy(fork, RESTORED_JOURNAL).events, 40, "{what}");
            }
        },
    );
    assert!(operations > 40, "{operations}");
}

#[test]
fn only_the_same_restore_continues_and_a_full_directory_is_refused() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let target = Path::new(RESTORED_JOURNAL);
    let (probe, before) = (fs.fork(0), fs.ops());
    restore_all(&probe).unwrap();
    fs.fail_at(fs.ops() + (probe.ops() - before) * 3 / 4, Fault::Kill, Repeat::Once);
    drop(restore_all(&fs));
    fs.clear_faults();
    fs.kill();
    assert!(
        fs.raw(&target.join("incoming")).is_some() && !segments(&fs, RESTORED_JOURNAL).is_empty()
    );
    let other = restore(&dynamic(&fs), Path::new(BACKUP), target, Some(Position::new(1)));
    assert!(matches!(other, Err(RestoreError::Another { .. })), "{other:?}");
    for create in [true, false] {
        let builder = Store::builder(RESTORED).fs(dynamic(&fs));
        let builder = if create { builder.create_if_missing() } else { builder };
        assert!(matches!(builder.open(), Err(OpenError::Incomplete { .. })));
    }
    restore_all(&fs).unwrap();
    assert!(matches!(restore_all(&fs), Err(RestoreError::NotEmpty { .. })));
    let nothing = abandon_restore(&dynamic(&fs), target);
    assert!(matches!(nothing, Err(RestoreError::NotBegun { .. })), "{nothing:?}");
    assert_eq!(payloads(open_at(&fs, RESTORED).unwrap().journal()), expected(40));
}

#[test]
fn a_damaged_backup_is_not_restored_behind_the_damage() {
    let fs = closed_with(40);
    backup(&fs).unwrap();
    let all = segments(&fs, BACKUP);
    assert!(all.len() > 2);
    for (index, (path, bytes)) in all.iter().enumerate() {
        let fork = fs.fork(1);
        assert!(fork.flip_bit(path, bytes.len() as u64 - 70, 2));
        match restore_all(&fork) {
            Err(RestoreError::Read(ReadError::Corruption(found))) => assert_eq!(&found.path, path),
            other => panic!("segment {index}: {other:?}"),
        }
        assert!(matches!(
            open_at(&fork, RESTORED),
            Err(OpenError::NotFound { .. } | OpenError::Incomplete { .. })
        ));
    }
    // What lies in front can be restored.
    let (second, _) = &all[1];
    assert!(fs.flip_bit(second, 4096 + 100, 2));
    let begin = verify(&fs, Path::new(BACKUP), &mut |_| {}).unwrap().end.position;
    let report =
        restore(&dynamic(&fs), Path::new(BACKUP), Path::new(RESTORED_JOURNAL), Some(begin))
            .unwrap();
    assert_eq!(report.end.position, begin);
    let store = open_at(&fs, RESTORED).unwrap();
    assert_eq!(payloads(store.journal()), expected(begin.get() as usize));
}
