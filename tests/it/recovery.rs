//! Recovery, row by row and step by step: the tests are named after the decision table in `docs/format.md`.
//! Where it is meaningful the power is cut (or the process killed) at every single operation of recovery.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::env::{Pace, pace_background};
use headwater::format::batch::{BatchHeader, body_digest, padded_len};
use headwater::format::files::Mark;
use headwater::format::record;
use headwater::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentHeader, SegmentPage};
use headwater::format::{Flags, crc32};
use headwater::fs::Fs;
use headwater::fs::sim::{Fault, FaultRates, Repeat, SimFs, Snapshot};
use headwater::{
    Append, AppendError, Checkpoint, Comparison, Corruption, CorruptionKind, EventId,
    ExpectedRevision, Incarnation, Ingest, IngestError, Journal, NewEvent, OpenError, Position,
    Revision, Store, StreamId, repair,
};

use crate::options;

const DIR: &str = "/store";
const JOURNAL: &str = "/store/journal";
const MIRROR: &str = "/mirror";

fn open(fs: &SimFs) -> Result<Store, OpenError> {
    let builder = Store::builder(DIR).create_if_missing().journal_options(options());
    builder.fs(Arc::new(fs.clone())).open()
}

fn stream(index: usize) -> StreamId {
    StreamId::new(format!("s-{}", index % 3)).unwrap()
}

fn append(store: &Store, from: usize, to: usize, mark: &str) {
    for i in from..to {
        let event = NewEvent::raw("test.happened", payload(i, mark)).unwrap();
        store.append(&Append::to(&stream(i), ExpectedRevision::Any, [event])).unwrap();
    }
}

fn payload(i: usize, mark: &str) -> Vec<u8> {
    format!("{mark}-{i:04}-{}", "x".repeat(100)).into_bytes()
}

fn payloads(journal: &Journal) -> Vec<Vec<u8>> {
    let events = journal.read_all(Position::START).unwrap();
    events.map(|event| event.unwrap().into_data()).collect()
}

fn expected(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| payload(i, "a")).collect()
}

/// A store with so many events, closed.
fn closed_with(events: usize) -> SimFs {
    let fs = SimFs::new(events as u64);
    let store = open(&fs).unwrap();
    append(&store, 0, events, "a");
    store.close().unwrap();
    fs
}

fn segment(number: u64) -> PathBuf {
    Path::new(JOURNAL).join(format!("{number:016x}.seg"))
}

fn sidecar(number: u64) -> PathBuf {
    segment(number).with_extension("idx")
}

fn named(fs: &SimFs, dir: &str, extension: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let aside = |path: &PathBuf| path.iter().any(|part| part == "quarantine");
    let files = fs.files().into_iter().filter(|path| {
        Path::new("/").join(path).starts_with(dir)
            && !aside(path)
            && path.extension().is_some_and(|found| found == extension)
    });
    files.map(|path| (path.clone(), fs.raw(&path).unwrap())).collect()
}

fn segments(fs: &SimFs) -> Vec<(PathBuf, Vec<u8>)> {
    named(fs, JOURNAL, "seg")
}

fn quarantined(fs: &SimFs, extension: &str) -> Vec<Vec<u8>> {
    let found = fs.files().into_iter().filter(|path| {
        path.iter().any(|part| part == "quarantine")
            && path.extension().is_some_and(|found| found == extension)
    });
    found.map(|path| fs.raw(&path).unwrap()).collect()
}

/// Everything but the lock file, which bears the owner's name.
fn all(fs: &SimFs) -> Snapshot {
    let mut snapshot = fs.snapshot_dir(Path::new(DIR));
    snapshot.files.retain(|path, _| path.file_name().is_none_or(|name| name != "lock"));
    snapshot
}

fn page_of(fs: &SimFs, path: &Path) -> SegmentPage {
    let bytes = fs.raw(path).unwrap();
    match SegmentPage::read(bytes[..HEADER_PAGE_BYTES].try_into().unwrap()) {
        PageState::Valid { page, .. } => page,
        other => panic!("{other:?}"),
    }
}

/// Number and file offset of the end of the active segment's batches.
fn active_end(fs: &SimFs) -> (u64, usize) {
    let (last, bytes) = segments(fs).pop().unwrap();
    let page = page_of(fs, &last);
    let (mut at, salt) = (HEADER_PAGE_BYTES, page.header.salt);
    while let Some(Ok(header)) = bytes.get(at..).map(|rest| BatchHeader::decode(rest, salt)) {
        at += header.padded_len as usize;
    }
    (page.header.number, at)
}

/// Where the batches of a segment begin.
fn batch_starts(fs: &SimFs, path: &Path) -> Vec<usize> {
    let (bytes, salt) = (fs.raw(path).unwrap(), page_of(fs, path).header.salt);
    let (mut at, mut starts) = (HEADER_PAGE_BYTES, Vec::new());
    while let Some(Ok(header)) = bytes.get(at..).map(|rest| BatchHeader::decode(rest, salt)) {
        starts.push(at);
        at += header.padded_len as usize;
    }
    starts
}

fn change(fs: &SimFs, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs.raw(path).unwrap();
    change(&mut bytes);
    fs.write_raw(path, &bytes);
}

/// The bytes of a batch that continues `end` in the segment of `page`.
fn batch(
    page: &SegmentPage,
    end: &Checkpoint,
    flags: Flags,
    edit: impl FnOnce(&mut Vec<u8>),
) -> Vec<u8> {
    let event = NewEvent::raw("test.happened", b"forged".to_vec()).unwrap();
    let mut body = Vec::new();
    record::encode(&mut body, &event, &StreamId::new("forged").unwrap(), Revision::FIRST);
    edit(&mut body);
    let mut header = BatchHeader {
        header_len: 128,
        flags,
        stored_len: body.len() as u32,
        raw_len: body.len() as u32,
        body_crc: crc32(&[&body]),
        count: 1,
        base_position: end.position,
        offset: end.offset,
        durable_offset: end.offset,
        epoch: end.epoch,
        padded_len: padded_len(body.len() as u64) as u32,
        incarnation: Incarnation::new(9),
        time_us: 0,
        chain: end.chain,
    };
    let digest = (end.offset == page.header.base_offset).then_some(&page.digest);
    let mut bytes = header.seal(end.chain, digest, &body_digest(&body), page.header.salt).to_vec();
    bytes.extend_from_slice(&body);
    bytes.resize(header.padded_len as usize, 0);
    bytes
}

/// Opens forks of `fs` with a crash at every operation of the opening, and hands each to `check`.
fn crash_at_every_operation(fs: &SimFs, check: impl Fn(&SimFs, &str)) {
    let probe = fs.fork(0);
    let before = probe.ops();
    drop(open(&probe));
    let operations = probe.ops() - before;
    assert!(operations > 10);
    for operation in 0..operations {
        for fault in [Fault::PowerCut, Fault::Kill] {
            let fork = fs.fork(operation);
            fork.fail_at(fork.ops() + operation, fault, Repeat::Once);
            drop(open(&fork));
            fork.clear_faults();
            match fault {
                Fault::Kill => fork.kill(),
                _ => fork.power_cut(),
            }
            check(&fork, &format!("{fault:?} at operation {operation} of {operations}"));
        }
    }
}

fn corruption(opened: Result<Store, OpenError>) -> Corruption {
    match opened {
        Err(OpenError::Corruption(corruption)) => corruption,
        other => panic!("{other:?}"),
    }
}

fn read_only(fs: &SimFs) -> (Journal, Option<Corruption>) {
    let fs: Arc<dyn Fs> = Arc::new(fs.clone());
    Journal::open_read_only(&fs, Path::new(JOURNAL)).unwrap()
}

// -------------------------------------------------------------------------------------------- part A

#[test]
fn row_a1_nothing_left_origin_refuses() {
    let fs = closed_with(25);
    for (path, _) in segments(&fs) {
        assert!(fs.remove_raw(&path));
    }
    let before = all(&fs);
    match open(&fs) {
        Err(OpenError::LostJournal { position, .. }) => assert_eq!(position, Position::new(25)),
        other => panic!("{other:?}"),
    }
    assert_eq!(all(&fs), before);
    // Even without `node` a new journal isn't begun where a mark remembers another.
    assert!(fs.remove_raw(&Path::new(JOURNAL).join("node")));
    let before = all(&fs);
    assert!(matches!(open(&fs), Err(OpenError::LostJournal { .. })));
    assert_eq!(all(&fs), before);
}

#[test]
fn row_a2_unreadable_refuses_and_changes_nothing() {
    let fs = closed_with(25);
    let before = segments(&fs);
    fs.set_fault_rates(FaultRates { read_eio: 1000, ..FaultRates::default() });
    assert!(matches!(open(&fs), Err(OpenError::Io(_))));
    fs.clear_faults();
    assert_eq!(segments(&fs), before);
    let (mut operation, mut refused) = (0, 0);
    loop {
        let fork = fs.fork(operation);
        let struck = fork.faults_struck();
        fork.fail_at(fork.ops() + operation, Fault::Eio, Repeat::Once);
        let opened = open(&fork);
        let over = fork.faults_struck() == struck;
        fork.clear_faults();
        match opened {
            Ok(store) => assert_eq!(payloads(store.journal()), expected(25)),
            Err(OpenError::Io(_)) => refused += 1,
            Err(other) => panic!("operation {operation}: {other:?}"),
        }
        fork.power_cut();
        assert_eq!(payloads(open(&fork).unwrap().journal()), expected(25), "{operation}");
        if over {
            break;
        }
        operation += 1;
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn row_a3_unsupported_refuses() {
    let fs = closed_with(25);
    let end = open(&fs).unwrap().journal().end();
    fs.kill();
    let (number, at) = active_end(&fs);
    let page = page_of(&fs, &segment(number));
    let required = Flags { incompatible: 1, ..Flags::default() };
    let appended: [(&str, Vec<u8>); 3] = [
        ("a batch", batch(&page, &end, required, |_| {})),
        ("a record", batch(&page, &end, Flags::default(), |body| body[6] = 1)),
        (
            "a batch that may only be read",
            batch(&page, &end, Flags { read_only: 1, ..Flags::default() }, |_| {}),
        ),
    ];
    for (what, bytes) in appended {
        let fork = fs.fork(1);
        change(&fork, &segment(number), |file| {
            file[at..at + bytes.len()].copy_from_slice(&bytes);
        });
        let before = all(&fork);
        assert!(matches!(open(&fork), Err(OpenError::Unsupported { .. })), "{what}");
        assert_eq!(all(&fork), before, "{what}");
    }
    for flags in [required, Flags { read_only: 2, ..Flags::default() }] {
        let fork = fs.fork(1);
        let header = SegmentHeader { flags, ..page.header };
        change(&fork, &segment(number), |file| {
            file[..HEADER_PAGE_BYTES].copy_from_slice(&header.to_page().bytes());
        });
        let refused = open(&fork).err();
        // With other flags the header has another digest: only the first case is certain to be seen first.
        assert!(
            matches!(refused, Some(OpenError::Unsupported { .. } | OpenError::Corruption(_))),
            "{refused:?}"
        );
    }
}

#[test]
fn row_a6_lost_refuses_and_reads_below_x_work() {
    let fs = closed_with(25);
    let (number, _) = active_end(&fs);
    let starts = batch_starts(&fs, &segment(number));
    let base = page_of(&fs, &segment(number)).header.base_position.get() as usize;
    assert!(starts.len() > 3);
    for (index, start) in starts.iter().enumerate() {
        for place in [start + 1, start + 40, start + 150] {
            let fork = fs.fork(1);
            assert!(fork.flip_bit(&segment(number), place as u64, 3));
            let before = all(&fork);
            let found = corruption(open(&fork));
            assert_eq!(found.path, segment(number));
            assert_eq!(found.file_offset, *start as u64);
            assert_eq!(found.position, Position::new((base + index) as u64));
            assert_eq!(all(&fork), before);
            let (journal, reported) = read_only(&fork);
            assert_eq!(reported, Some(found));
            assert_eq!(payloads(&journal), expected(base + index));
            // Its end is a checkpoint of the undamaged history.
            let (whole, none) = read_only(&fs);
            assert_eq!(none, None);
            assert_eq!(whole.compare(&journal.end()).unwrap(), Comparison::Equal);
        }
    }
}

#[test]
fn damage_in_a_sealed_segment_is_found_by_readers_and_what_is_in_front_is_readable() {
    let fs = closed_with(25);
    for path in [sidecar(0), sidecar(1)] {
        assert!(fs.remove_raw(&path)); // a copy may lack them
    }
    let second = batch_starts(&fs, &segment(1))[1];
    let base = page_of(&fs, &segment(1)).header.base_position.get() as usize;
    assert!(fs.flip_bit(&segment(1), second as u64 + 130, 0));
    let (journal, _) = read_only(&fs);
    let mut events = journal.read_all(Position::START).unwrap();
    for payload in expected(base + 1) {
        assert_eq!(events.next().unwrap().unwrap().data(), &payload);
    }
    assert!(matches!(events.next(), Some(Err(headwater::ReadError::Corruption(_)))));
}

#[test]
fn row_a6_lost_refuses_whatever_follows() {
    let fs = closed_with(25);
    let (number, end) = active_end(&fs);
    let last = *batch_starts(&fs, &segment(number)).last().unwrap();
    let cases: [(&str, &dyn Fn(&SimFs)); 4] = [
        ("zeros", &|fs| change(fs, &segment(number), |file| file[last..end].fill(0))),
        ("end of file", &|fs| change(fs, &segment(number), |file| file.truncate(last))),
        ("missing segment", &|fs| assert!(fs.remove_raw(&segment(number)))),
        ("nothing behind the header", &|fs| {
            change(fs, &segment(number), |file| {
                file.truncate(HEADER_PAGE_BYTES);
            });
        }),
    ];
    for (what, damage) in cases {
        let fork = fs.fork(1);
        damage(&fork);
        let before = all(&fork);
        let found = corruption(open(&fork));
        assert!(
            matches!(found.kind, CorruptionKind::LostTail { .. } | CorruptionKind::MissingSegment),
            "{what}: {found:?}"
        );
        assert_eq!(all(&fork), before, "{what}");
    }
    // A segment in the middle.
    assert!(fs.remove_raw(&segment(1)));
    assert_eq!(corruption(open(&fs)).kind, CorruptionKind::MissingSegment);
}

#[test]
fn row_a6_lost_is_known_from_the_headers_without_a_mark() {
    let fs = closed_with(25);
    assert!(fs.remove_raw(&Path::new(JOURNAL).join("mark")));
    let (number, _) = active_end(&fs);
    let starts = batch_starts(&fs, &segment(number));
    // The batch behind the damage says that the damaged one had been durable.
    assert!(fs.flip_bit(&segment(number), starts[1] as u64 + 5, 0));
    assert_eq!(corruption(open(&fs)).file_offset, starts[1] as u64);
}

/// The soak met a write of the mark that went astray, into the very batch that it was to vouch for: the mark in the other
/// slot knew nothing of the batch, and what was left of it looked like a torn tail. Who doesn't know the salt can't make a
/// payload look like one.
#[test]
fn row_a6_lost_is_known_from_a_mark_that_was_written_over_the_last_batch() {
    let mark_path = Path::new(JOURNAL).join("mark");
    for events in 20..25 {
        let fs = closed_with(events);
        let (number, end) = active_end(&fs);
        let last = *batch_starts(&fs, &segment(number)).last().unwrap();
        let secret = page_of(&fs, &segment(number)).header.salt as u32;
        let marks = fs.raw(&mark_path).unwrap();
        let slots =
            [&marks[..128], &marks[4096..4096 + 128]].map(|slot| Mark::decode(slot).unwrap());
        let newest = slots.into_iter().max_by_key(|mark| mark.sequence).unwrap();
        assert_eq!(slots.map(|mark| mark.salt).iter().max(), Some(&secret), "commits tell it");
        for (at, salt) in
            (last..end - 128).step_by(64).flat_map(|at| [(at, secret), (at, secret ^ 1)])
        {
            let fork = fs.fork(1);
            // Neither slot has it: the next one would have replaced the older.
            fork.write_raw(&mark_path, &vec![0; marks.len()]);
            let astray = Mark { salt, closed: false, ..newest };
            change(&fork, &segment(number), |file| {
                file[at..at + 128].copy_from_slice(&astray.encode());
            });
            if salt != secret {
                open(&fork).unwrap();
                continue;
            }
            let before = all(&fork);
            let found = corruption(open(&fork));
            assert_eq!((found.path, found.file_offset), (segment(number), last as u64));
            assert_eq!(all(&fork), before);
            // If nobody has the batch, it can be given up by name.
            let fs: Arc<dyn Fs> = Arc::new(fork.clone());
            let lost = Position::new(events as u64 - 1)..Position::new(events as u64);
            let planned =
                repair::plan(&fs, Path::new(JOURNAL), &repair::Options::default()).unwrap();
            let gives_up = |step: &repair::Step| match step {
                repair::Step::GiveUp { gap, .. } => (gap.from.position..gap.to_position) == lost,
                _ => false,
            };
            assert!(planned.steps.iter().any(gives_up), "{planned:?}");
            let options = repair::Options { accept: vec![lost.clone()], ..Default::default() };
            repair::apply(&fs, Path::new(JOURNAL), &options).unwrap();
            let store = open(&fork).unwrap();
            assert_eq!(store.journal().end().position, Position::new(events as u64));
        }
    }
}

#[test]
fn row_a4_replaced_refuses() {
    let fs = SimFs::new(1);
    let store = open(&fs).unwrap();
    append(&store, 0, 12, "a");
    let older = fs.fork(2);
    append(&store, 12, 25, "a");
    store.close().unwrap();
    older.kill();
    for (grown_to, what) in [(18, "shorter"), (25, "equal"), (38, "longer")] {
        let other = older.fork(3);
        append(&open(&other).unwrap(), 12, grown_to, "b");
        let fork = fs.fork(4);
        for (path, _) in segments(&fork).into_iter().chain(named(&fork, JOURNAL, "idx")) {
            assert!(fork.remove_raw(&path));
        }
        for (path, bytes) in segments(&other) {
            fork.write_raw(&path, &bytes);
        }
        let before = all(&fork);
        match (what, open(&fork)) {
            ("shorter", Err(OpenError::Corruption(found))) => {
                assert!(matches!(found.kind, CorruptionKind::LostTail { .. }), "{found:?}");
            }
            ("equal" | "longer", Err(OpenError::HistoryReplaced { position, .. })) => {
                assert_eq!(position, Position::new(25));
            }
            (_, other) => panic!("{what}: {other:?}"),
        }
        assert_eq!(all(&fork), before, "{what}");
    }
}

// -------------------------------------------------------------------------------------------- part B

#[test]
fn step_b1_quarantine_takes_later_segments_last_first() {
    let fs = closed_with(25);
    let (number, _) = active_end(&fs);
    let later: Vec<PathBuf> = (1..4).map(|more| segment(number + more)).collect();
    for path in &later {
        fs.write_raw(path, &[0x5a; 5000]);
    }
    crash_at_every_operation(&fs, |fs, when| {
        let there: Vec<bool> = later.iter().map(|path| fs.raw(path).is_some()).collect();
        assert!(there.is_sorted_by(|a, b| a >= b), "a gap {when}: {there:?}");
        let store = open(fs).unwrap();
        assert_eq!(payloads(store.journal()), expected(25), "{when}");
        assert_eq!(quarantined(fs, "seg"), vec![vec![0x5a; 5000]; 3], "{when}");
        // The names are taken again, and what comes under them now stays.
        append(&store, 25, 45, "a");
        for seed in 0..8 {
            let cut = fs.fork(seed);
            cut.power_cut();
            assert_eq!(payloads(open(&cut).unwrap().journal()), expected(45), "{when}");
        }
    });
    assert_eq!(open(&fs).unwrap().recovery_report().quarantined_segments, 3);
}

/// A store behind whose end half a batch lies.
fn torn() -> (SimFs, PathBuf, usize, Vec<u8>) {
    let fs = closed_with(25);
    let end = open(&fs).unwrap().journal().end();
    fs.kill();
    let (number, at) = active_end(&fs);
    let whole = batch(&page_of(&fs, &segment(number)), &end, Flags::default(), |_| {});
    let half = whole[..150].to_vec();
    change(&fs, &segment(number), |file| file[at..at + 150].copy_from_slice(&half));
    (fs, segment(number), at, half)
}

#[test]
fn step_b2_torn_tail_is_copied_aside_then_zeroed() {
    let (fs, path, at, half) = torn();
    crash_at_every_operation(&fs, |fs, when| {
        assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
        let file = fs.raw(&path).unwrap();
        assert!(file[at..].iter().all(|&byte| byte == 0), "{when}");
        fs.power_cut();
        assert!(fs.raw(&path).unwrap()[at..].iter().all(|&byte| byte == 0), "{when}");
        assert!(quarantined(fs, "tail").contains(&half), "{when}");
    });
    let store = open(&fs).unwrap();
    assert_eq!((store.recovery_report().torn_bytes, store.recovery_report().torn_events), (150, 1));
}

#[test]
fn step_b2_torn_tail_needs_no_space() {
    let (fs, path, at, half) = torn();
    fs.set_capacity(Some(0));
    let store = open(&fs).unwrap();
    assert_eq!(payloads(store.journal()), expected(25));
    assert!(fs.raw(&path).unwrap()[at..].iter().all(|&byte| byte == 0));
    assert_eq!(quarantined(&fs, "tail"), [half]);
    append(&store, 25, 26, "a"); // into the space that is there
}

#[test]
fn step_b3_cut_that_was_lost_is_repeated() {
    let fs = closed_with(25);
    let before = segments(&fs);
    for number in [0, 1] {
        change(&fs, &segment(number), |file| file.resize(7 * 1024, 0));
    }
    crash_at_every_operation(&fs, |fs, when| {
        assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
        fs.power_cut();
        assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
        assert!(segments(fs) == before, "{when}");
    });
}

#[test]
fn row_a5_stray_bytes_behind_a_sealed_end_are_corruption() {
    for number in [0, 1] {
        let fs = closed_with(25);
        let end = fs.raw(&segment(number)).unwrap().len() as u64;
        change(&fs, &segment(number), |file| file.resize(7 * 1024, 0));
        assert!(fs.flip_bit(&segment(number), 7 * 1024 - 5, 1));
        let before = all(&fs);
        let found = corruption(open(&fs));
        assert_eq!((found.kind, found.file_offset), (CorruptionKind::BehindEnd, end));
        assert_eq!(all(&fs), before);
    }
}

#[test]
fn step_b4_rewrite_of_unproven_batches_and_headers() {
    // The failing sync is the last one of its append.
    pace_background(Some(Pace::Steps(0)));
    let mut shown_unproven = 0;
    for events in 1..14 {
        for seed in 0..12 {
            for cache_drops in [true, false] {
                let fs = SimFs::new(seed);
                let store = open(&fs).unwrap();
                append(&store, 0, events, "a");
                // The sync fails; pages are clean and the disk holds some of them. At the beginning of a
                // segment the header is among them.
                let last = NewEvent::raw("test.happened", payload(events, "a")).unwrap();
                let append = Append::to(&stream(events), ExpectedRevision::Any, [last]);
                fs.fail_at(last_sync_of_an_append(events), Fault::Eio, Repeat::Once);
                let answer = store.append(&append);
                assert!(matches!(answer, Err(AppendError::Unknown(_))), "{answer:?}");
                fs.clear_faults();
                fs.drop_cache_works(cache_drops);
                fs.kill();
                drop(store);
                crash_now_and_then(&fs, events, seed);
                // Restarted without a power cut; whatever is shown now must stay.
                let shown = payloads(open(&fs).unwrap().journal());
                assert!(shown == expected(events) || shown == expected(events + 1));
                shown_unproven += usize::from(shown.len() > events);
                fs.power_cut();
                assert_eq!(payloads(open(&fs).unwrap().journal()), shown, "{events} {seed}");
            }
        }
    }
    assert!(shown_unproven > 100, "{shown_unproven}");
}

/// Number of the operation that syncs the batch of the append behind so many; only the mark is written
/// later.
fn last_sync_of_an_append(events: usize) -> u64 {
    let fs = SimFs::new(0);
    let store = open(&fs).unwrap();
    append(&store, 0, events + 1, "a");
    fs.ops() - 2
}

fn crash_now_and_then(fs: &SimFs, events: usize, seed: u64) {
    for operation in (seed..60).step_by(7) {
        let fork = fs.fork(operation);
        fork.fail_at(fork.ops() + operation, Fault::PowerCut, Repeat::Once);
        drop(open(&fork));
        fork.clear_faults();
        fork.power_cut();
        let shown = payloads(open(&fork).unwrap().journal());
        assert!(shown == expected(events) || shown == expected(events + 1));
    }
}

#[test]
fn step_b4_rewrite_remakes_a_damaged_header_copy() {
    let fs = closed_with(25);
    let before = segments(&fs);
    for number in 0..before.len() as u64 {
        for place in [30, 512 + 30, 2000] {
            let fork = fs.fork(1);
            assert!(fork.flip_bit(&segment(number), place, 2));
            crash_at_every_operation(&fork, |fs, when| {
                assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
                fs.power_cut();
                assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
                assert!(segments(fs) == before, "{when}");
            });
            assert_eq!(open(&fork).unwrap().recovery_report().remade_headers, 1);
        }
        let fork = fs.fork(1);
        assert!(fork.flip_bit(&segment(number), 30, 2) && fork.flip_bit(&segment(number), 542, 2));
        let found = corruption(open(&fork));
        assert_eq!(found.path, segment(number));
        assert!(matches!(found.kind, CorruptionKind::SegmentHeader(_)), "{found:?}");
    }
}

#[test]
fn step_b5_settle_removes_stale_sidecars() {
    let fs = closed_with(25);
    let sidecars = named(&fs, JOURNAL, "idx");
    assert_eq!(sidecars.len(), 2);
    let (active, _) = active_end(&fs);
    fs.write_raw(&sidecar(active), &sidecars[0].1); // of the segment that stays active
    fs.write_raw(&sidecar(77), b"of no segment");
    fs.write_raw(&sidecar(0), &sidecars[1].1); // of another segment
    assert!(fs.flip_bit(&sidecar(1), 20, 4));
    crash_at_every_operation(&fs, |fs, when| {
        let store = open(fs).unwrap();
        for index in 0..3 {
            let events = store.read_stream(&stream(index), Revision::FIRST).unwrap();
            let read: Vec<Vec<u8>> = events.map(|event| event.unwrap().into_data()).collect();
            let wanted = expected(25).into_iter().skip(index).step_by(3);
            assert_eq!(read, wanted.collect::<Vec<_>>(), "{when}");
        }
        assert!(named(fs, JOURNAL, "idx") == sidecars, "{when}");
    });
}

#[test]
fn step_b5_settle_removes_spares_but_no_lost_headers() {
    let fs = closed_with(25);
    let (active, _) = active_end(&fs);
    fs.write_raw(&segment(active + 1), &[0; 7 * 1024]);
    crash_at_every_operation(&fs, |fs, when| {
        assert_eq!(payloads(open(fs).unwrap().journal()), expected(25), "{when}");
        assert_eq!(fs.raw(&segment(active + 1)), None, "{when}");
        assert!(quarantined(fs, "seg").is_empty(), "{when}");
    });
    let mut lost = vec![0; 7 * 1024];
    lost[6000] = 1;
    fs.write_raw(&segment(active + 1), &lost);
    assert_eq!(open(&fs).unwrap().recovery_report().quarantined_segments, 1);
    assert_eq!(quarantined(&fs, "seg"), [lost]);
}

#[test]
fn step_b6_publish_after_a_clean_reopen_changed_no_byte() {
    let fs = closed_with(25);
    let before = segments(&fs);
    for _ in 0..3 {
        let store = open(&fs).unwrap();
        assert!(store.recovery_report().clean);
        store.close().unwrap();
        assert!(segments(&fs) == before);
    }
    // Nor does one after a crash in which nothing was under way.
    drop(open(&fs).unwrap());
    fs.power_cut();
    assert!(!open(&fs).unwrap().recovery_report().clean);
    assert!(segments(&fs) == before);
}

// ------------------------------------------------------------------------------------------- mirrors

fn ingest(fs: &SimFs) -> Result<Option<Ingest>, OpenError> {
    let fs: Arc<dyn Fs> = Arc::new(fs.clone());
    Ingest::open(&fs, Path::new(MIRROR), &options())
}

/// Feeds a mirror from where it is to the end of `origin`.
fn feed(ingest: &mut Ingest, origin: &Journal) -> Result<(), IngestError> {
    let mut cursor = origin.cursor(ingest.end().position).unwrap();
    while let Some(batch) = cursor.next_batch().unwrap() {
        if let Some(page) = batch.page {
            ingest.segment(&page.bytes())?;
        }
        ingest.batch(batch.batch.bytes())?;
        ingest.sync()?;
    }
    Ok(())
}

/// An origin, open, and its mirror, closed; both with 25 events.
fn mirrored() -> (SimFs, Store, SimFs) {
    let fs = SimFs::new(1);
    let store = open(&fs).unwrap();
    append(&store, 0, 25, "a");
    let mirror = SimFs::new(2);
    let disk: Arc<dyn Fs> = Arc::new(mirror.clone());
    let id = store.journal().id();
    let mut ingest = Ingest::create(&disk, Path::new(MIRROR), id, &options()).unwrap();
    feed(&mut ingest, store.journal()).unwrap();
    ingest.close().unwrap();
    (fs, store, mirror)
}

fn mirror_segment(number: u64) -> PathBuf {
    Path::new(MIRROR).join(format!("{number:016x}.seg"))
}

fn assert_equal_files(origin: &SimFs, mirror: &SimFs, when: &str) {
    let (mut origin, mirror) = (segments(origin), named(mirror, MIRROR, "seg"));
    origin.retain(|(_, bytes)| bytes.iter().any(|&byte| byte != 0)); // a spare is part of no journal
    assert_eq!(origin.len(), mirror.len(), "{when}");
    for ((_, a), (path, b)) in origin.iter().zip(&mirror) {
        assert!(a == b, "{when}: {} differs", path.display());
    }
}

#[test]
fn row_a1_nothing_left_mirror_refetches_from_0() {
    let (fs, store, mirror) = mirrored();
    let end = store.journal().end();
    for (path, _) in named(&mirror, MIRROR, "seg") {
        assert!(mirror.remove_raw(&path));
    }
    let mut ingest = ingest(&mirror).unwrap().unwrap();
    assert!(ingest.recovery_report().refetch);
    assert_eq!(ingest.journal().id(), store.journal().id());
    assert_eq!(ingest.end().position, Position::START);
    assert_eq!(ingest.witness().unwrap().chain, end.chain);
    feed(&mut ingest, store.journal()).unwrap();
    assert_eq!(ingest.witness(), None);
    ingest.close().unwrap();
    assert_equal_files(&fs, &mirror, "refetched");
}

#[test]
fn step_b0_lower_keeps_a_witness_and_the_mirror_refetches() {
    let (fs, store, mirror) = mirrored();
    let end = store.journal().end();
    let active = named(&mirror, MIRROR, "seg").len() as u64 - 1;
    for (index, start) in batch_starts(&mirror, &mirror_segment(active)).into_iter().enumerate() {
        let damaged = mirror.fork(1);
        assert!(damaged.flip_bit(&mirror_segment(active), start as u64 + 140, 3));
        let probe = damaged.fork(0);
        let before = probe.ops();
        drop(ingest(&probe).unwrap());
        let operations = probe.ops() - before;
        for operation in (0..=operations).step_by(if index == 0 { 1 } else { 5 }) {
            let fork = damaged.fork(operation);
            fork.fail_at(fork.ops() + operation, Fault::PowerCut, Repeat::Once);
            drop(ingest(&fork));
            fork.clear_faults();
            fork.power_cut();
            let when = format!("batch {index}, operation {operation} of {operations}");
            let ingest = ingest(&fork).unwrap().unwrap();
            // The origin must recognise the end as its own, down to who wrote the batch in front of it.
            let own = ingest.end();
            let (first_witness, first_end) = (ingest.witness(), own.offset);
            drop(ingest);
            fork.power_cut();
            // The mark was lowered for good: the next opening finds nothing to set aside.
            let mut ingest = self::ingest(&fork).unwrap().unwrap();
            assert!(!ingest.recovery_report().refetch, "{when}");
            assert_eq!(
                (ingest.witness(), ingest.end().offset),
                (first_witness, first_end),
                "{when}"
            );
            assert_eq!(store.journal().compare(&own).unwrap(), Comparison::Equal, "{when}");
            let witness = ingest.witness().unwrap_or_else(|| panic!("{when}: no witness"));
            assert_eq!((witness.offset, witness.chain), (end.offset, end.chain), "{when}");
            assert!(own.offset < end.offset, "{when}");
            feed(&mut ingest, store.journal()).unwrap();
            assert_eq!(ingest.witness(), None, "{when}");
            ingest.close().unwrap();
            assert_equal_files(&fs, &fork, &when);
        }
    }
}

#[test]
fn mirror_witness_that_differs_is_refused() {
    let fs = SimFs::new(1);
    let store = open(&fs).unwrap();
    append(&store, 0, 20, "a");
    let older = fs.fork(5);
    append(&store, 20, 25, "a");
    let mirror = SimFs::new(2);
    let disk: Arc<dyn Fs> = Arc::new(mirror.clone());
    let id = store.journal().id();
    let mut first = Ingest::create(&disk, Path::new(MIRROR), id, &options()).unwrap();
    feed(&mut first, store.journal()).unwrap();
    first.close().unwrap();
    // The mirror loses what only it and the lost origin had; the origin comes back from an older copy.
    let active = named(&mirror, MIRROR, "seg").len() as u64 - 1;
    let starts = batch_starts(&mirror, &mirror_segment(active));
    assert!(mirror.flip_bit(&mirror_segment(active), starts[0] as u64 + 140, 3));
    older.kill();
    let restored = open(&older).unwrap();
    append(&restored, 20, 40, "b");
    for _ in 0..2 {
        let mut again = ingest(&mirror).unwrap().unwrap();
        match feed(&mut again, restored.journal()) {
            Err(IngestError::WitnessDiffers { position }) => {
                assert_eq!(position, Position::new(25));
            }
            other => panic!("{other:?}"),
        }
        // It stays refused, also after the mirror was closed and opened.
        again.close().unwrap();
    }
}

#[test]
fn mirror_headers_prove_nothing() {
    let (_, store, mirror) = mirrored();
    let mark = Path::new(MIRROR).join("mark");
    let old = mirror.raw(&mark).unwrap();
    append(&store, 25, 27, "a");
    let mut first = ingest(&mirror).unwrap().unwrap();
    feed(&mut first, store.journal()).unwrap();
    first.close().unwrap();
    mirror.write_raw(&mark, &old);
    // Batches that the mirror never said to be durable may vanish, whatever the headers behind claim of the
    // origin's disk.
    let active = named(&mirror, MIRROR, "seg").len() as u64 - 1;
    let starts = batch_starts(&mirror, &mirror_segment(active));
    let damaged = starts[starts.len() - 2];
    assert!(mirror.flip_bit(&mirror_segment(active), damaged as u64 + 140, 3));
    let mut ingest = ingest(&mirror).unwrap().unwrap();
    assert!(!ingest.recovery_report().refetch);
    assert_eq!(ingest.end().position, Position::new(25));
    assert_eq!(ingest.witness(), None);
    assert_eq!(store.journal().compare(&ingest.end()).unwrap(), Comparison::Equal);
    feed(&mut ingest, store.journal()).unwrap();
}

#[test]
fn mirror_reserves_a_bounded_space_on_a_peers_word() {
    let (_, store, mirror) = mirrored();
    let end = store.journal().end();
    let header = SegmentHeader {
        number: 3,
        base_position: end.position,
        base_offset: end.offset,
        durable_offset: end.offset,
        capacity_bytes: 1 << 40,
        previous_chain: end.chain,
        ..page_of(&mirror, &mirror_segment(2)).header
    };
    let mut first = ingest(&mirror).unwrap().unwrap();
    first.segment(&header.to_page().bytes()).unwrap();
    drop(first);
    drop(ingest(&mirror).unwrap());
    assert!(mirror.raw(&mirror_segment(3)).unwrap().len() <= 64 << 20);
}

// ------------------------------------------------------------------------------------------ any damage

#[test]
fn every_single_bit_flip_in_acknowledged_bytes_is_detected_or_harmless() {
    let fs = closed_with(14);
    let wanted = expected(14);
    let mut reported = 0;
    for path in fs.files() {
        if path.file_name().is_some_and(|name| name == "lock" || name == "reserve") {
            continue;
        }
        let len = fs.raw(&path).unwrap().len();
        for byte in (0..len).step_by(3) {
            let fork = fs.fork(byte as u64);
            assert!(fork.flip_bit(&path, byte as u64, (byte % 8) as u8));
            let place = format!("{} byte {byte}", path.display());
            match open(&fork) {
                Ok(store) => {
                    let mut read = Vec::new();
                    let damage = store.read_all(Position::START).and_then(|mut events| {
                        events.try_for_each(|event| event.map(|event| read.push(event.into_data())))
                    });
                    assert!(wanted.starts_with(&read), "{place}");
                    match damage {
                        Ok(()) => assert_eq!(read, wanted, "{place}"),
                        Err(headwater::ReadError::Corruption(found)) => {
                            assert!(found.path.ends_with(path.file_name().unwrap()), "{place}");
                            reported += 1;
                        }
                        Err(error) => panic!("{place}: {error}"),
                    }
                    for index in 0..3 {
                        let events = store.read_stream(&stream(index), Revision::FIRST);
                        let ok: Vec<_> =
                            events.into_iter().flatten().map_while(Result::ok).collect();
                        for (at, event) in ok.iter().enumerate() {
                            assert_eq!(event.data(), &payload(index + 3 * at, "a"), "{place}");
                        }
                    }
                }
                Err(OpenError::Corruption(found)) => {
                    assert!(found.path.ends_with(path.file_name().unwrap()), "{place}: {found}");
                    reported += 1;
                }
                Err(error) => panic!("{place}: {error:?}"),
            }
        }
    }
    assert!(reported > 500, "{reported}");
}

// ------------------------------------------------------------------------------------- many at a time

/// Threads append through one store while the disk fails or the power goes; the schedule is the system's.
/// Every call returns; what was acknowledged is there; the rest is whole or absent, and nothing is there
/// twice.
#[test]
fn concurrent_appends_survive_crashes() {
    for round in 0..300_u64 {
        let mut rng = fastrand::Rng::with_seed(round);
        let fs = SimFs::new(round);
        fs.drop_cache_works(rng.bool());
        let mut acked: Vec<Vec<EventId>> = Vec::new();
        let mut submitted: Vec<Vec<EventId>> = Vec::new();
        for _life in 0..3 {
            let store = open(&fs).unwrap();
            let faults =
                [Fault::PowerCut, Fault::Kill, Fault::Eio, Fault::Enospc, Fault::ShortWrite];
            let fault = faults[rng.usize(..faults.len())];
            fs.fail_at(fs.ops() + rng.u64(..120), fault, Repeat::Once);
            let retried = submitted.last().cloned();
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4_u64)
                    .map(|thread| {
                        let (store, seed) = (&store, rng.u64(..));
                        let retried = retried.clone();
                        scope.spawn(move || appends(store, thread, seed, retried))
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for (ids, ok) in results.into_iter().flatten() {
                if ok {
                    acked.push(ids.clone());
                }
                submitted.push(ids);
            }
            if rng.bool() {
                drop(store.close());
            }
            fs.clear_faults();
            if rng.bool() || fs.down() == Some(headwater::fs::sim::Down::PowerCut) {
                fs.power_cut();
            } else {
                fs.kill();
            }
            let store = open(&fs).unwrap();
            let events = store.read_all(Position::START).unwrap();
            let found: Vec<EventId> = events.map(|event| event.unwrap().id()).collect();
            let unique: std::collections::HashSet<_> = found.iter().copied().collect();
            assert_eq!(unique.len(), found.len(), "round {round}: repeated");
            for ids in &acked {
                assert!(ids.iter().all(|id| unique.contains(id)), "round {round}: lost");
            }
            for ids in &submitted {
                let there = ids.iter().filter(|id| unique.contains(id)).count();
                assert!(there == 0 || there == ids.len(), "round {round}: in part");
            }
            drop(store);
            fs.kill();
        }
    }
}

fn appends(
    store: &Store,
    thread: u64,
    seed: u64,
    retried: Option<Vec<EventId>>,
) -> Vec<(Vec<EventId>, bool)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut results = Vec::new();
    let mut retried = retried;
    for _ in 0..rng.usize(5..30) {
        let fresh = || (0..1 + seed as usize % 3).map(|_| EventId::new()).collect();
        let ids: Vec<EventId> = retried.take().unwrap_or_else(fresh);
        let to = StreamId::new(format!("t-{}", (thread + rng.u64(..2)) % 4)).unwrap();
        let len = rng.usize(..200);
        let events =
            ids.iter().map(|id| NewEvent::raw("test.happened", vec![7; len]).unwrap().id(*id));
        let answer = store.append(&Append::to(&to, ExpectedRevision::Any, events));
        let over = matches!(answer, Err(AppendError::Poisoned(_) | AppendError::Unknown(_)));
        results.push((ids, answer.is_ok()));
        if over {
            break;
        }
    }
    results
}
