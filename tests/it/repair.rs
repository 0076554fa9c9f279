//! Repair: what a copy still has is put back byte for byte, what nobody has is given up only by name, and
//! neither a crash nor a second run does any harm.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headwater::format::batch::BatchHeader;
use headwater::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use headwater::fs::Fs;
use headwater::fs::sim::{Fault, Repeat, SimFs, Snapshot};
use headwater::repair::{self, Options, Outcome, Plan, RepairError, Step};
use headwater::{
    Append, ExpectedRevision, Item, Journal, JournalOptions, NewEvent, OpenError, Position,
    ReadError, Revision, Store, StreamId, verify, verify_deep,
};

const DIR: &str = "/store";
const JOURNAL: &str = "/store/journal";
const COPY: &str = "/copy";
const EVENTS: usize = 70;

fn open(fs: &SimFs) -> Result<Store, OpenError> {
    let options = JournalOptions {
        segment_bytes_first: 7 * 1024,
        segment_bytes_max: 7 * 1024,
        batch_bytes_max: 1024,
        group_bytes_max: 2048,
        background_thread: false,
        ..JournalOptions::default()
    };
    let builder = Store::builder(DIR).create_if_missing().journal_options(options);
    builder.fs(Arc::new(fs.clone())).open()
}

fn payload(i: usize) -> Vec<u8> {
    format!("event-{i:04}-{}", "x".repeat(i * 7 % 90)).into_bytes()
}

fn stream(i: usize) -> StreamId {
    StreamId::new(format!("s-{}", i % 3)).unwrap()
}

fn append(store: &Store, range: std::ops::Range<usize>) {
    for i in range {
        let event = NewEvent::raw("test.happened", payload(i)).unwrap();
        store.append(&Append::to(&stream(i), ExpectedRevision::Any, [event])).unwrap();
    }
}

/// A closed store with several segments, and a copy of its segments.
fn store_and_copy() -> SimFs {
    store_and_copy_of(1, EVENTS)
}

fn store_and_copy_of(seed: u64, events: usize) -> SimFs {
    let fs = SimFs::new(seed);
    let store = open(&fs).unwrap();
    append(&store, 0..events);
    store.close().unwrap();
    copy_segments(&fs);
    fs
}

fn copy_segments(fs: &SimFs) {
    fs.create_dir_all(Path::new(COPY)).unwrap();
    for path in segments(fs) {
        let to = Path::new(COPY).join(path.file_name().unwrap());
        fs.write_raw(&to, &fs.raw(&path).unwrap());
    }
}

fn segments(fs: &SimFs) -> Vec<PathBuf> {
    let names = fs.list(Path::new(JOURNAL)).unwrap().into_iter();
    names.filter(|n| n.ends_with(".seg")).map(|n| Path::new(JOURNAL).join(n)).collect()
}

fn change(fs: &SimFs, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs.raw(path).unwrap();
    change(&mut bytes);
    fs.write_raw(path, &bytes);
}

/// File offsets and headers of a segment's batches.
fn batches(fs: &SimFs, path: &Path) -> Vec<(usize, BatchHeader)> {
    let bytes = fs.raw(path).unwrap();
    let PageState::Valid { page, .. } =
        SegmentPage::read(bytes[..HEADER_PAGE_BYTES].try_into().unwrap())
    else {
        panic!("{}", path.display())
    };
    let (mut at, mut found) = (HEADER_PAGE_BYTES, Vec::new());
    while let Some(Ok(header)) =
        bytes.get(at..).map(|rest| BatchHeader::decode(rest, page.header.salt))
    {
        found.push((at, header));
        at += header.padded_len as usize;
    }
    found
}

/// What is written in a file, without the zeros that were prepared.
fn written(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1)]
}

fn arc(fs: &SimFs) -> Arc<dyn Fs> {
    Arc::new(fs.clone())
}

fn plan(fs: &SimFs, options: &Options) -> Plan {
    let before = all(fs);
    let plan = repair::plan(&arc(fs), Path::new(JOURNAL), options).unwrap();
    assert_eq!(all(fs), before, "a plan changes nothing");
    plan
}

fn apply(fs: &SimFs, options: &Options) -> Outcome {
    repair::apply(&arc(fs), Path::new(JOURNAL), options).unwrap()
}

fn from_copy() -> Options {
    Options { from: Some(COPY.into()), ..Options::default() }
}

/// Everything but the lock file, which bears the owner's name.
fn all(fs: &SimFs) -> Snapshot {
    let mut snapshot = fs.snapshot_dir(Path::new(DIR));
    snapshot.files.retain(|path, _| path.file_name().is_none_or(|name| name != "lock"));
    snapshot
}

fn quarantined(fs: &SimFs) -> usize {
    fs.list(&Path::new(JOURNAL).join("quarantine"))
        .map_or(0, |names| names.iter().filter(|name| *name != "reserve").count())
}

fn payloads(journal: &Journal) -> Vec<Vec<u8>> {
    let events = journal.read_all(Position::START).unwrap();
    events.map(|event| event.unwrap().into_data()).collect()
}

fn expected(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(payload).collect()
}

fn lost_ranges(plan: &Plan) -> Vec<std::ops::Range<Position>> {
    let lost = plan.steps.iter().filter_map(|step| match step {
        Step::GiveUp { gap, .. } => Some(gap.from.position..gap.to_position),
        _ => None,
    });
    lost.collect()
}

fn flip(fs: &SimFs, path: &Path, at: usize) {
    change(fs, path, |bytes| bytes[at] ^= 0x10);
}

type Harm = fn(&SimFs, &Path);

/// Every way in which acknowledged bytes of a segment can be damaged or gone.
fn harms() -> Vec<(&'static str, Harm)> {
    fn middle(fs: &SimFs, path: &Path) -> (usize, BatchHeader) {
        let batches = batches(fs, path);
        batches[batches.len() / 2]
    }
    fn last(fs: &SimFs, path: &Path) -> (usize, BatchHeader) {
        batches(fs, path).pop().unwrap()
    }
    vec![
        ("both header copies", |fs, path| {
            flip(fs, path, 100);
            flip(fs, path, 612);
        }),
        ("a batch header", |fs, path| flip(fs, path, middle(fs, path).0 + 33)),
        ("the first batch header", |fs, path| flip(fs, path, HEADER_PAGE_BYTES + 17)),
        ("a body", |fs, path| flip(fs, path, middle(fs, path).0 + 140)),
        ("the first body", |fs, path| flip(fs, path, HEADER_PAGE_BYTES + 140)),
        ("the last body", |fs, path| flip(fs, path, last(fs, path).0 + 140)),
        ("padding", |fs, path| {
            let padded = batches(fs, path).into_iter().find(|(_, header)| {
                u32::from(header.header_len) + header.stored_len < header.padded_len
            });
            let (at, header) = padded.unwrap();
            flip(fs, path, at + header.padded_len as usize - 1);
        }),
        ("two batches", |fs, path| {
            let all = batches(fs, path);
            flip(fs, path, all[1].0 + 140);
            flip(fs, path, all[all.len() - 2].0 + 20);
        }),
        ("a block of zeros", |fs, path| {
            let (at, _) = middle(fs, path);
            change(fs, path, |bytes| bytes[at - 32..at + 512].fill(0));
        }),
        ("a lost tail", |fs, path| {
            let (at, _) = middle(fs, path);
            change(fs, path, |bytes| bytes.truncate(at + 17));
        }),
        ("a file of zeros", |fs, path| change(fs, path, |bytes| bytes.fill(0))),
        ("a missing file", |fs, path| assert!(fs.remove_raw(path))),
    ]
}

#[test]
fn whatever_is_damaged_comes_back_from_a_good_copy_byte_for_byte() {
    let whole = store_and_copy();
    let files = segments(&whole);
    assert!(files.len() >= 4, "{files:?}");
    for path in &files {
        for (name, harm) in harms() {
            let fs = whole.fork(3);
            harm(&fs, path);
            let name = format!("{name} of {}", path.display());
            assert!(
                open(&fs).is_err()
                    || !verify(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap().is_healthy()
            );
            let planned = plan(&fs, &from_copy());
            assert!(!planned.damage.is_empty() && !planned.steps.is_empty(), "{name}");
            assert!(planned.steps.iter().all(Step::is_possible), "{name}: {planned:?}");
            let outcome = apply(&fs, &from_copy());
            assert_eq!(outcome.left, [], "{name}");
            assert_eq!(outcome.report.damage, [], "{name}");
            for file in &files {
                let (repaired, right) = (fs.raw(file).unwrap(), whole.raw(file).unwrap());
                assert_eq!(written(&repaired), written(&right), "{name}: {}", file.display());
                if file != files.last().unwrap() {
                    assert_eq!(repaired.len(), right.len(), "{name}: {}", file.display());
                }
            }
            fs.power_cut();
            let store = open(&fs).unwrap();
            assert_eq!(payloads(store.journal()), expected(EVENTS), "{name}");
            append(&store, EVENTS..EVENTS + 5);
            store.close().unwrap();
            assert!(verify_deep(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap().is_healthy());
        }
    }
}

#[test]
fn damaged_bytes_are_kept_in_quarantine_before_they_are_overwritten() {
    let fs = store_and_copy();
    let path = &segments(&fs)[1];
    let (at, header) = batches(&fs, path)[1];
    flip(&fs, path, at + 140);
    let damaged = fs.raw(path).unwrap()[at..at + header.padded_len as usize].to_vec();
    apply(&fs, &from_copy());
    let aside = Path::new(JOURNAL).join("quarantine");
    let kept = fs.list(&aside).unwrap().into_iter().map(|name| fs.raw(&aside.join(name)).unwrap());
    assert!(kept.into_iter().any(|bytes| bytes == damaged));
}

/// What can be read, and the positions of what can't.
fn read_past_gaps(journal: &Journal) -> (Vec<Vec<u8>>, Vec<std::ops::Range<Position>>) {
    let mut subscription = journal.subscribe(Position::START).unwrap();
    let (mut data, mut gaps) = (Vec::new(), Vec::new());
    loop {
        match subscription.next(Duration::ZERO).unwrap().unwrap() {
            Item::Event(event) => data.push(event.into_data()),
            Item::Gap { from, to } => gaps.push(from..to),
            Item::CaughtUp { .. } => return (data, gaps),
            other => panic!("{other:?}"),
        }
    }
}

fn without(ranges: &[std::ops::Range<Position>], count: usize) -> Vec<Vec<u8>> {
    let lost = |i: &usize| ranges.iter().any(|range| range.contains(&Position::new(*i as u64)));
    (0..count).filter(|i| !lost(i)).map(payload).collect()
}

#[test]
fn what_nobody_has_is_given_up_only_by_name_and_the_journal_goes_on_behind_it() {
    let whole = store_and_copy();
    let files = segments(&whole);
    for path in &files {
        for (name, harm) in harms() {
            let fs = whole.fork(5);
            harm(&fs, path);
            let name = format!("{name} of {}", path.display());
            let planned = plan(&fs, &Options::default());
            let lost = lost_ranges(&planned);
            assert!(!lost.is_empty(), "{name}: {planned:?}");

            // Unnamed, nothing is given up, and nothing is changed.
            let before = all(&fs);
            let outcome = apply(&fs, &Options::default());
            assert!(outcome.done.is_empty() && !outcome.left.is_empty(), "{name}");
            assert_eq!(all(&fs), before, "{name}");
            let nearly = lost[0].start..lost[0].end.advance(1);
            let options = Options { accept: vec![nearly], ..Options::default() };
            let refused = repair::apply(&arc(&fs), Path::new(JOURNAL), &options);
            assert!(matches!(refused, Err(RepairError::NotLost { .. })), "{name}: {refused:?}");

            let options = Options { accept: lost.clone(), ..Options::default() };
            let outcome = apply(&fs, &options);
            assert_eq!(
                (&outcome.left[..], &outcome.report.damage[..]),
                (&[][..], &[][..]),
                "{name}"
            );
            assert_eq!(outcome.report.lost, lost, "{name}");
            for file in segments(&fs) {
                let aside = before
                    .files
                    .iter()
                    .find(|(path, _)| Path::new("/").join(path) == file || **path == file);
                assert!(aside.is_none_or(|(_, bytes)| *bytes == fs.raw(&file).unwrap()), "{name}");
            }

            // Readers of the closed journal are told, and so are those of the opened one.
            let (reader, corruption) =
                Journal::open_read_only(&arc(&fs), Path::new(JOURNAL)).unwrap();
            assert_eq!(corruption, None, "{name}");
            assert_eq!(read_past_gaps(&reader), (without(&lost, EVENTS), lost.clone()), "{name}");
            for round in 0..3 {
                let store = open(&fs).unwrap_or_else(|error| panic!("{name}: {error}"));
                let known = EVENTS + 20 * round;
                assert_eq!(store.journal().end().position, Position::new(known as u64), "{name}");
                assert_eq!(read_past_gaps(store.journal()), (without(&lost, known), lost.clone()));
                assert_eq!(store.journal().lost_events(), lost, "{name}");
                let first = store.read_all(Position::START).unwrap().find_map(Result::err);
                assert!(
                    matches!(first, Some(ReadError::Gap { from, to }) if from == lost[0].start && to == lost[0].end),
                    "{name}: {first:?}"
                );
                append(&store, known..known + 20);
                if round == 1 {
                    drop(store);
                    fs.power_cut();
                } else {
                    store.close().unwrap();
                }
                let report = verify_deep(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap();
                assert_eq!((&report.damage[..], &report.lost), (&[][..], &lost), "{name}");
                assert_eq!(report.end.position, Position::new(known as u64 + 20), "{name}");
            }
            assert_eq!(plan(&fs, &Options::default()).steps, [], "{name}");
        }
    }
}

#[test]
fn a_stream_with_lost_events_says_so_where_they_are_missing() {
    let fs = store_and_copy();
    let path = &segments(&fs)[1];
    let (at, header) = batches(&fs, path)[4];
    flip(&fs, path, at + 140);
    for (sidecar, name) in [(true, "with"), (false, "without")] {
        let fs = fs.fork(1);
        if !sidecar {
            assert!(fs.remove_raw(&path.with_extension("idx")));
        }
        let accept = lost_ranges(&plan(&fs, &Options::default()));
        apply(&fs, &Options { accept, ..Options::default() });
        let store = open(&fs).unwrap();
        let lost = header.base_position.get() as usize;
        for i in 0..3 {
            let events: Vec<_> = store.read_stream(&stream(i), Revision::FIRST).unwrap().collect();
            let (ok, errors): (Vec<_>, Vec<_>) = events.into_iter().partition(Result::is_ok);
            if i == lost % 3 {
                assert_eq!(ok.len(), lost / 3, "{name} its sidecar");
                assert!(matches!(errors[..], [Err(ReadError::Gap { .. })]), "{errors:?}");
                let behind = Revision::new(lost as u64 / 3 + 1);
                let rest = store.read_stream(&stream(i), behind).unwrap();
                let rest: Vec<_> = rest.map(|event| event.unwrap().into_data()).collect();
                let right: Vec<_> = (lost + 3..EVENTS).step_by(3).map(payload).collect();
                assert_eq!(rest, right, "{name} its sidecar");
                let back = store.journal().read_stream_backward(&stream(i), None).unwrap();
                let (ok, errors): (Vec<_>, Vec<_>) = back.partition(Result::is_ok);
                let ok = ok.into_iter().map(|event| event.unwrap().into_data());
                assert!(ok.eq(right.into_iter().rev()), "{name} its sidecar");
                assert!(matches!(errors[..], [Err(ReadError::Gap { .. })]), "{errors:?}");
                let front = Revision::new(lost as u64 / 3 - 1);
                let back = store.journal().read_stream_backward(&stream(i), Some(front)).unwrap();
                assert_eq!(back.map(Result::unwrap).count(), lost / 3);
            } else {
                assert!(errors.is_empty(), "{errors:?}");
                assert_eq!(ok.len(), (i..EVENTS).step_by(3).count());
            }
        }
        let back = store.journal().read_all_backward(Position::new(EVENTS as u64)).unwrap();
        let (ok, errors): (Vec<_>, Vec<_>) = back.partition(Result::is_ok);
        let ok = ok.into_iter().map(|event| event.unwrap().into_data());
        assert!(ok.eq((lost + 1..EVENTS).rev().map(payload)), "{name} its sidecar");
        assert!(matches!(errors[..], [Err(ReadError::Gap { .. })]), "{errors:?}");
        let back = store.journal().read_all_backward(Position::new(lost as u64)).unwrap();
        assert!(back.map(|event| event.unwrap().into_data()).eq((0..lost).rev().map(payload)));
    }
}

/// What a map says outlives the gap: were one laid out over it, a stream that comes back would not be found.
#[test]
fn a_stream_that_was_lost_whole_and_comes_back_is_found_among_many_segments() {
    let fs = SimFs::new(3);
    let store = open(&fs).unwrap();
    let mut rare = None;
    for i in 0.. {
        if store.journal().segments().len() == 4 && rare.is_none() {
            let event = NewEvent::raw("test.happened", *b"rare").unwrap();
            let to = StreamId::new("rare").unwrap();
            store.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
            rare = Some(store.journal().segments().len() - 1);
        }
        append(&store, i..i + 1);
        if store.journal().segments().len() == 10 {
            break;
        }
    }
    store.close().unwrap();
    copy_segments(&fs);
    let rare_in = &segments(&fs)[rare.unwrap()];
    let to = StreamId::new("rare").unwrap();
    let bytes = fs.raw(rare_in).unwrap();
    let at = bytes.windows(4).position(|bytes| bytes == b"rare").unwrap();
    flip(&fs, rare_in, at);
    // Sidecars and maps are made anew, with the events missing.
    for name in fs.list(Path::new(JOURNAL)).unwrap() {
        if name.ends_with(".idx") || name.ends_with(".map") {
            assert!(fs.remove_raw(&Path::new(JOURNAL).join(name)));
        }
    }
    let accept = lost_ranges(&plan(&fs, &Options::default()));
    apply(&fs, &Options { accept, ..Options::default() });
    let store = open(&fs).unwrap();
    assert_eq!(store.journal().stream_head(&to).unwrap(), None);
    store.close().unwrap();
    let outcome = apply(&fs, &from_copy());
    assert_eq!((outcome.left, outcome.report.lost), (vec![], vec![]));
    let store = open(&fs).unwrap();
    assert_eq!(store.journal().stream_head(&to).unwrap(), Some(Revision::FIRST));
    let read = store.read_stream(&to, Revision::FIRST).unwrap();
    assert_eq!(read.map(|event| event.unwrap().into_data()).collect::<Vec<_>>(), [b"rare"]);
}

/// A segment of which nothing is left is none that a map can know nothing of.
#[test]
fn a_segment_that_was_lost_whole_and_comes_back_is_found_among_many() {
    for lost in [0, 3, 8] {
        let fs = SimFs::new(4);
        let store = open(&fs).unwrap();
        let rare = StreamId::new("rare").unwrap();
        let count = || store.journal().segments().len();
        for i in 0.. {
            if count() == lost + 1 && store.journal().stream_head(&rare).unwrap().is_none() {
                let event = NewEvent::raw("test.happened", *b"rare").unwrap();
                store.append(&Append::to(&rare, ExpectedRevision::Any, [event])).unwrap();
                assert_eq!(count(), lost + 1);
            }
            append(&store, i..i + 1);
            if count() == 18 {
                break;
            }
        }
        store.close().unwrap();
        copy_segments(&fs);
        assert!(fs.remove_raw(&segments(&fs)[lost]));
        for name in fs.list(Path::new(JOURNAL)).unwrap() {
            if name.ends_with(".idx") || name.ends_with(".map") {
                assert!(fs.remove_raw(&Path::new(JOURNAL).join(name)));
            }
        }
        let accept = lost_ranges(&plan(&fs, &Options::default()));
        let outcome = apply(&fs, &Options { accept, ..Options::default() });
        assert_eq!(outcome.left, [], "segment {lost}");
        open(&fs).unwrap().close().unwrap(); // lays out the maps
        let outcome = apply(&fs, &from_copy());
        assert_eq!((outcome.left, outcome.report.lost), (vec![], vec![]), "segment {lost}");
        let store = open(&fs).unwrap();
        let head = store.journal().stream_head(&rare).unwrap();
        assert_eq!(head, Some(Revision::FIRST), "segment {lost}");
    }
}

#[test]
fn what_was_given_up_comes_back_when_a_copy_turns_up_also_behind_later_events() {
    let whole = store_and_copy();
    for (index, path) in segments(&whole).iter().enumerate() {
        for (name, harm) in harms() {
            let fs = whole.fork(5);
            harm(&fs, path);
            let name = format!("{name} of segment {index}");
            let accept = lost_ranges(&plan(&fs, &Options::default()));
            apply(&fs, &Options { accept, ..Options::default() });
            let outcome = apply(&fs, &from_copy());
            assert_eq!((outcome.left, outcome.report.damage), (vec![], vec![]), "{name}");
            assert_eq!(outcome.report.lost, [], "{name}");
            let store = open(&fs).unwrap();
            assert_eq!(payloads(store.journal()), expected(EVENTS), "{name}");
            append(&store, EVENTS..EVENTS + 5);
            assert_eq!(payloads(store.journal()), expected(EVENTS + 5), "{name}");
        }
    }
}

#[test]
fn lost_revisions_that_were_given_again_are_not_put_back() {
    let fs = store_and_copy();
    let path = segments(&fs).pop().unwrap();
    let (at, _) = batches(&fs, &path).pop().unwrap();
    flip(&fs, &path, at + 140);
    let lost = lost_ranges(&plan(&fs, &Options::default()));
    apply(&fs, &Options { accept: lost.clone(), ..Options::default() });
    let store = open(&fs).unwrap();
    append(&store, EVENTS..EVENTS + 3); // one of them to the stream whose head was lost
    store.close().unwrap();
    let outcome = apply(&fs, &from_copy());
    assert_eq!((outcome.done, outcome.report.lost), (vec![], lost));
}

#[test]
fn a_repair_that_was_cut_short_anywhere_is_run_again() {
    const EVENTS: usize = 34;
    let whole = store_and_copy_of(1, EVENTS);
    let path = segments(&whole).remove(1);
    assert!(segments(&whole).len() >= 3);
    let missing = segments(&whole).remove(2);
    let scenes: [(&str, Harm, bool); 3] = [
        ("fetch", |fs, path| flip(fs, path, batches(fs, path)[2].0 + 140), true),
        ("fetch a file", |fs, path| assert!(fs.remove_raw(path)), true),
        ("give up", |fs, path| flip(fs, path, batches(fs, path)[2].0 + 140), false),
    ];
    for (name, harm, fetch) in scenes {
        let damaged = whole.fork(9);
        harm(&damaged, if name == "fetch a file" { &missing } else { &path });
        let accept = lost_ranges(&plan(&damaged, &Options::default()));
        let options =
            if fetch { from_copy() } else { Options { accept: accept.clone(), from: None } };
        let probe = damaged.fork(0);
        let before = probe.ops();
        apply(&probe, &options);
        let operations = probe.ops() - before;
        let copies = quarantined(&probe);
        println!("{name}: {operations} operations");
        for operation in 0..operations {
            // Neighbouring operations leave the same files most of the time: each fault meets every third.
            let fault = [Fault::PowerCut, Fault::Kill, Fault::Eio][operation as usize % 3];
            let fs = damaged.fork(operation);
            fs.fail_at(fs.ops() + operation, fault, Repeat::Once);
            let first = repair::apply(&arc(&fs), Path::new(JOURNAL), &options);
            fs.clear_faults();
            if fault == Fault::Kill {
                fs.kill();
            } else {
                fs.power_cut();
            }
            let name = format!("{name}: {fault:?} at operation {operation}: {first:?}");
            let outcome = apply(&fs, &options);
            assert_eq!((outcome.left, outcome.report.damage), (vec![], vec![]), "{name}");
            assert!(quarantined(&fs) >= copies, "{name}");
            fs.power_cut();
            let store = open(&fs).unwrap();
            if fetch {
                assert_eq!(payloads(store.journal()), expected(EVENTS), "{name}");
            } else {
                assert_eq!(store.journal().lost_events(), accept, "{name}");
            }
        }
    }
}

#[test]
fn a_copy_of_another_history_is_not_used() {
    let fs = store_and_copy();
    // Another journal.
    let other = store_and_copy_of(2, EVENTS);
    for path in other.list(Path::new(COPY)).unwrap() {
        fs.write_raw(
            &Path::new("/other").join(&path),
            &other.raw(&Path::new(COPY).join(&path)).unwrap(),
        );
    }
    // The same journal, forked in its last segment.
    let fork = fs.fork(4);
    let last = segments(&fs).pop().unwrap();
    let (at, _) = batches(&fs, &last)[1];
    change(&fork, &last, |bytes| bytes[at..].fill(0));
    for name in ["mark", "node"] {
        assert!(fork.remove_raw(&Path::new(JOURNAL).join(name)));
    }
    let damaged = fs.fork(1);
    flip(&damaged, &last, batches(&fs, &last)[2].0 + 140);
    let other = Options { from: Some("/other".into()), ..Options::default() };
    let refused = repair::plan(&arc(&damaged), Path::new(JOURNAL), &other);
    assert!(matches!(refused, Err(RepairError::OtherJournal { .. })), "{refused:?}");
    // A copy that ends too early, or is damaged at the same place, doesn't help and does no harm.
    for path in segments(&fork) {
        damaged.write_raw(
            &Path::new("/short").join(path.file_name().unwrap()),
            &fork.raw(&path).unwrap(),
        );
    }
    let before = all(&damaged);
    let short = Options { from: Some("/short".into()), ..Options::default() };
    let outcome = apply(&damaged, &short);
    assert!(outcome.done.is_empty() && outcome.left.len() == 1, "{outcome:?}");
    assert_eq!(all(&damaged), before);
}

#[test]
fn what_is_not_an_event_is_mended_without_a_copy() {
    let whole = store_and_copy();
    let files = segments(&whole);
    let journal = Path::new(JOURNAL);
    type Harm<'h> = Box<dyn Fn(&SimFs) + 'h>;
    let harms: Vec<(&str, Harm<'_>)> = vec![
        ("one header copy", Box::new(|fs| flip(fs, &files[1], 90))),
        (
            "one header copy of the active segment",
            Box::new(|fs| flip(fs, &files[files.len() - 1], 700)),
        ),
        ("the rest of a header page", Box::new(|fs| flip(fs, &files[0], 3000))),
        ("a slot of the mark", Box::new(|fs| flip(fs, &journal.join("mark"), 40))),
        (
            "both slots of the mark",
            Box::new(|fs| {
                flip(fs, &journal.join("mark"), 40);
                flip(fs, &journal.join("mark"), 4096 + 40);
            }),
        ),
        ("between the slots of the mark", Box::new(|fs| flip(fs, &journal.join("mark"), 2000))),
        ("a missing mark", Box::new(|fs| assert!(fs.remove_raw(&journal.join("mark"))))),
        ("a bit of node", Box::new(|fs| flip(fs, &journal.join("node"), 20))),
        ("a sidecar", Box::new(|fs| flip(fs, &files[1].with_extension("idx"), 5000))),
        (
            "bytes behind a sealed segment",
            Box::new(|fs| {
                change(fs, &files[1], |bytes| bytes.extend([0, 0, 7]));
            }),
        ),
        (
            "bytes behind the end",
            Box::new(|fs| {
                let (at, header) = batches(fs, &files[files.len() - 1]).pop().unwrap();
                flip(fs, &files[files.len() - 1], at + header.padded_len as usize + 70);
            }),
        ),
        (
            "a segment behind the end",
            Box::new(|fs| {
                let next = journal.join(format!("{:016x}.seg", files.len()));
                fs.write_raw(&next, &fs.raw(&files[0]).unwrap());
            }),
        ),
    ];
    for (name, harm) in harms {
        let fs = whole.fork(8);
        harm(&fs);
        assert!(!verify(&fs, journal, &mut |_| {}).unwrap().is_healthy(), "{name}");
        let planned = plan(&fs, &Options::default());
        assert!(planned.steps.iter().all(Step::is_possible), "{name}: {planned:?}");
        let outcome = apply(&fs, &Options::default());
        assert!(!outcome.done.is_empty(), "{name}");
        assert_eq!((outcome.left, outcome.report.damage), (vec![], vec![]), "{name}");
        fs.power_cut();
        assert_eq!(payloads(open(&fs).unwrap().journal()), expected(EVENTS), "{name}");
    }
}

#[test]
fn a_torn_tail_is_set_aside_as_recovery_would() {
    let fs = SimFs::new(3);
    let store = open(&fs).unwrap();
    append(&store, 0..30);
    let active =
        segments(&fs).into_iter().rfind(|path| !written(&fs.raw(path).unwrap()).is_empty());
    let active = active.unwrap();
    drop(store);
    fs.kill();
    let (at, header) = batches(&fs, &active).pop().unwrap();
    let end = at + header.padded_len as usize;
    change(&fs, &active, |bytes| bytes[end + 5..end + 50].fill(7));
    let planned = plan(&fs, &Options::default());
    assert!(
        matches!(
            planned.steps[..],
            [Step::Recover { torn_bytes: 50, segments: 0, headers: 0, mark: false }]
        ),
        "{planned:?}"
    );
    let outcome = apply(&fs, &Options::default());
    assert_eq!((outcome.left, outcome.report.unacknowledged_bytes), (vec![], 0));
    assert_eq!(quarantined(&fs), 1);
    assert_eq!(payloads(open(&fs).unwrap().journal()), expected(30));
}

#[test]
fn a_damaged_gaps_file_hides_nothing_and_the_loss_is_found_anew() {
    let fs = store_and_copy();
    let path = &segments(&fs)[1];
    let (at, _) = batches(&fs, path)[4];
    flip(&fs, path, at + 140);
    let accept = lost_ranges(&plan(&fs, &Options::default()));
    let options = Options { accept: accept.clone(), ..Options::default() };
    apply(&fs, &options);
    let gaps = Path::new(JOURNAL).join("gaps");
    flip(&fs, &gaps, 50);
    assert!(matches!(open(&fs), Err(OpenError::Corruption(_))));
    assert!(verify(&fs, Path::new(JOURNAL), &mut |_| {}).is_err());
    let outcome = apply(&fs, &Options::default());
    assert_eq!((outcome.done.len(), outcome.left.len()), (1, 1), "{outcome:?}");
    assert_eq!(apply(&fs, &options).report.lost, accept);
}

#[test]
fn a_healthy_journal_is_left_as_it_is_and_one_that_is_written_is_refused() {
    let fs = store_and_copy();
    let before = all(&fs);
    assert_eq!(plan(&fs, &from_copy()).steps, []);
    let outcome = apply(&fs, &from_copy());
    assert!(outcome.done.is_empty() && outcome.left.is_empty() && outcome.report.is_healthy());
    assert_eq!(all(&fs), before);
    let store = open(&fs).unwrap();
    for refused in [
        repair::plan(&arc(&fs), Path::new(JOURNAL), &Options::default()).err(),
        repair::apply(&arc(&fs), Path::new(JOURNAL), &Options::default()).err(),
    ] {
        assert!(matches!(refused, Some(RepairError::Open(OpenError::Locked { .. }))));
    }
    drop(store);
    let nothing = repair::apply(&arc(&fs), Path::new("/nowhere"), &Options::default());
    assert!(matches!(nothing, Err(RepairError::Open(OpenError::NotFound { .. }))), "{nothing:?}");
}
