//! Retention: what is removed and what isn't, heads and truncation, archives, crashes at every operation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::fs::sim::{Fault, Repeat, SimFs};
use headwater::fs::{Fs, OpenMode};
use headwater::planted::{Bug, plant};
use headwater::retention::{
    self, ArchiveError, History, Holder, Options, Plan, RetentionError, Until,
};
use headwater::{
    Append, AppendError, Appended, Comparison, CorruptionKind, EventId, ExpectedRevision, Ingest,
    Journal, NewEvent, OpenError, Position, ReadError, Revision, Store, StreamId, TokenState,
    restore, verify, verify_deep,
};

use crate::options;

const DIR: &str = "/store";
const JOURNAL: &str = "/store/journal";
const ARCHIVE: &str = "/archive";
const RESTORED: &str = "/restored";

const FAULTS: [(Fault, Repeat); 6] = [
    (Fault::PowerCut, Repeat::Once),
    (Fault::Kill, Repeat::Once),
    (Fault::Eio, Repeat::Once),
    (Fault::Eio, Repeat::Forever),
    (Fault::Enospc, Repeat::Forever),
    (Fault::ShortWrite, Repeat::Once),
];

fn open_at(fs: &SimFs, dir: &str) -> Result<Store, OpenError> {
    let builder = Store::builder(dir).journal_options(options()).create_if_missing();
    builder.fs(Arc::new(fs.clone())).open()
}

fn open(fs: &SimFs) -> Store {
    open_at(fs, DIR).unwrap()
}

fn dynamic(fs: &SimFs) -> Arc<dyn Fs> {
    Arc::new(fs.clone())
}

/// What was acknowledged: stream, payload and id of each event, by position.
#[derive(Clone, Debug, Default)]
struct Model {
    events: Vec<(String, Vec<u8>, EventId)>,
}

impl Model {
    fn append(&mut self, store: &Store, rng: &mut fastrand::Rng) -> Result<(), AppendError> {
        // Few streams that go on for ever, and many that are written once.
        let name = match rng.u8(..4) {
            0 => format!("once-{}", self.events.len()),
            _ => format!("s-{}", rng.u8(..4)),
        };
        let stream = StreamId::new(&name).unwrap();
        let head = self.head(&name);
        let expected = match rng.u8(..3) {
            0 => ExpectedRevision::Any,
            _ => head.map_or(ExpectedRevision::NoStream, ExpectedRevision::Exact),
        };
        let new: Vec<_> = (0..rng.usize(1..4))
            .map(|_| {
                let id = EventId::from_bytes(rng.u128(1..).to_le_bytes());
                (name.clone(), vec![rng.u8(1..); rng.usize(..200)], id)
            })
            .collect();
        let events = new.iter().map(|(_, payload, id)| {
            NewEvent::raw("test.happened", payload.clone()).unwrap().id(*id)
        });
        store.append(&Append::to(&stream, expected, events))?;
        self.events.extend(new);
        Ok(())
    }

    fn fill(&mut self, store: &Store, rng: &mut fastrand::Rng, batches: usize) {
        (0..batches).for_each(|_| self.append(store, rng).unwrap());
    }

    fn head(&self, stream: &str) -> Option<Revision> {
        let count = self.events.iter().filter(|(name, ..)| name == stream).count() as u64;
        count.checked_sub(1).map(Revision::new)
    }

    fn streams(&self) -> BTreeMap<&str, Vec<usize>> {
        let mut streams = BTreeMap::<_, Vec<_>>::new();
        for (position, (name, ..)) in self.events.iter().enumerate() {
            streams.entry(name.as_str()).or_default().push(position);
        }
        streams
    }

    /// Everything that is retained is there, and the rest is known to be gone.
    fn check(&self, journal: &Journal) {
        let first = journal.start().position;
        assert_eq!(journal.end().position.get(), self.events.len() as u64);
        let read: Vec<_> = journal.read_all(first).unwrap().map(Result::unwrap).collect();
        assert_eq!(read.len() as u64, self.events.len() as u64 - first.get());
        for (event, (stream, payload, id)) in read.iter().zip(&self.events[first.get() as usize..])
        {
            assert_eq!((event.stream().as_str(), event.id()), (stream.as_str(), *id));
            assert_eq!(event.data(), payload.as_slice());
        }
        for below in [0, first.get().saturating_sub(1)].into_iter().filter(|p| *p < first.get()) {
            let error = journal.read_all(Position::new(below)).unwrap_err();
            assert!(matches!(error, ReadError::Truncated { first: at } if at == first), "{error}");
            let error = journal.subscribe(Position::new(below)).unwrap_err();
            assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
        }
        for (name, positions) in self.streams() {
            let stream = StreamId::new(name).unwrap();
            let last = Revision::new(positions.len() as u64 - 1);
            assert_eq!(journal.stream_head(&stream).unwrap(), Some(last), "{name}");
            let removed = positions.iter().filter(|at| (**at as u64) < first.get()).count();
            let left = Revision::new(removed as u64);
            let found = journal.read_stream(&stream, left).unwrap().map(|e| e.unwrap().position());
            let found: Vec<_> = found.map(|position| position.get() as usize).collect();
            assert_eq!(found, positions[removed..], "{name}");
            if removed > 0 {
                let error = journal.read_stream(&stream, Revision::FIRST).unwrap_err();
                let ReadError::TruncatedStream { first, .. } = error else { panic!("{error}") };
                assert_eq!(first, left, "{name}");
            }
        }
        assert_eq!(journal.stream_head(&StreamId::new("absent").unwrap()).unwrap(), None);
    }
}

fn before(position: u64) -> Options {
    Options::new(Until::Position(Position::new(position)))
}

fn plan(store: &Store, position: u64) -> Plan {
    store.plan_retention(&before(position)).unwrap()
}

/// Forgets as much as can be in front of `position`.
fn forget(store: &Store, position: u64) -> Result<Plan, RetentionError> {
    let target = plan(store, position).target;
    store.retain(&before(position).history(History::Forget(target)))
}

fn read(fs: &SimFs, dir: &str) -> Journal {
    let (journal, damage) = Journal::open_read_only(&dynamic(fs), Path::new(dir)).unwrap();
    assert_eq!(damage, None, "{dir}");
    journal
}

fn healthy(fs: &SimFs, dir: &str) {
    let report = verify_deep(fs, Path::new(dir), &mut |_| {}).unwrap();
    assert_eq!(report.damage, [], "{dir}");
}

fn segment_files(fs: &SimFs, dir: &str) -> Vec<PathBuf> {
    let files = fs.files().into_iter().map(|path| Path::new("/").join(path));
    files
        .filter(|path| path.parent() == Some(Path::new(dir)))
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .collect()
}

/// A closed store of many segments, and what is in it.
fn filled(seed: u64, batches: usize) -> (SimFs, Model) {
    let (fs, mut model) = (SimFs::new(seed), Model::default());
    let store = open(&fs);
    model.fill(&store, &mut fastrand::Rng::with_seed(seed), batches);
    store.close().unwrap();
    (fs, model)
}

// --------------------------------------------------------------------------------------------- what is removed

#[test]
fn random_histories_are_removed_from_the_front_and_everything_else_stays_exact() {
    let mut removed = 0;
    for seed in 0..8 {
        let (fs, mut model) = (SimFs::new(seed), Model::default());
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut store = open(&fs);
        for _ in 0..12 {
            let batches = rng.usize(1..60);
            model.fill(&store, &mut rng, batches);
            if rng.bool() {
                let asked = rng.u64(..=model.events.len() as u64);
                let first = store.journal().start().position;
                let done = forget(&store, asked).unwrap();
                assert!(done.target <= Position::new(asked).max(first), "seed {seed}");
                assert_eq!(store.journal().start().position, done.target, "seed {seed}");
                removed += done.removals.len();
            }
            if rng.u8(..3) == 0 {
                store.close().unwrap();
                store = open(&fs);
            }
            model.check(store.journal());
        }
        store.close().unwrap();
        healthy(&fs, JOURNAL);
        model.check(&read(&fs, JOURNAL));
    }
    assert!(removed > 40, "only {removed} segments were removed");
}

#[test]
fn the_plan_changes_nothing_and_only_the_planned_position_is_forgotten() {
    let (fs, model) = filled(1, 200);
    let store = open(&fs);
    let before_it = segment_files(&fs, JOURNAL);
    let asked = model.events.len() as u64 / 2;
    let planned = plan(&store, asked);
    assert!(planned.removals.len() > 2 && planned.blocker.is_none());
    assert_eq!((planned.first, planned.asked), (Position::START, planned.target));
    assert!(planned.target <= Position::new(asked));
    assert_eq!(segment_files(&fs, JOURNAL), before_it);
    let error = store.retain(&before(asked)).unwrap_err();
    assert!(matches!(error, RetentionError::Undecided), "{error}");
    let named = Position::new(planned.target.get() + 1);
    let error = store.retain(&before(asked).history(History::Forget(named))).unwrap_err();
    assert!(matches!(error, RetentionError::NotAsPlanned { .. }), "{error}");
    assert_eq!(segment_files(&fs, JOURNAL), before_it);
    let done = forget(&store, asked).unwrap();
    assert_eq!(done.removals, planned.removals);
    assert_eq!(segment_files(&fs, JOURNAL).len(), before_it.len() - done.removals.len());
    model.check(store.journal());
    let again = forget(&store, asked).unwrap();
    assert!(again.removals.is_empty() && again.target == done.target);
}

#[test]
fn the_segment_that_is_written_is_never_removed_and_is_named_as_the_blocker() {
    let (fs, mut model) = filled(2, 100);
    let store = open(&fs);
    let all = model.events.len() as u64;
    let planned = plan(&store, all);
    assert!(planned.target < Position::new(all));
    assert!(matches!(planned.blocker.unwrap().holder, Holder::Active));
    forget(&store, all).unwrap();
    assert_eq!(segment_files(&fs, JOURNAL).len(), 1);
    model.check(store.journal());
    store.close().unwrap();
    let store = open(&fs);
    model.fill(&store, &mut fastrand::Rng::with_seed(9), 50);
    model.check(store.journal());
}

#[test]
fn as_many_bytes_stay_as_are_to_be_kept() {
    let (fs, model) = filled(3, 300);
    let store = open(&fs);
    for bytes in [60_000, 30_000, 7_000] {
        let options = Options::new(Until::Keeping { bytes });
        let target = store.plan_retention(&options).unwrap().target;
        let done = store.retain(&options.history(History::Forget(target))).unwrap();
        assert!(!done.removals.is_empty());
        let sizes = segment_files(&fs, JOURNAL).into_iter().map(|f| fs.raw(&f).unwrap().len());
        let left = sizes.sum::<usize>() as u64;
        assert!((bytes..bytes + 2 * 7 * 1024).contains(&left), "{left} of {bytes}");
        model.check(store.journal());
    }
}

// ------------------------------------------------------------------------------------------- what is told then

/// Leases are caps, in free disk as in age and bytes.
#[test]
fn on_a_full_disk_the_mirrors_that_lack_most_let_go_first_and_only_as_far_as_must_be() {
    use headwater::format::leases::{Lease, encode};
    let (fs, _) = filled(7, 300);
    let journal = read(&fs, JOURNAL);
    let ends: Vec<_> = journal.segments().iter().map(|it| it.end_position).collect();
    let lease = |id, position| Lease {
        id: [id; 16],
        nameless: false,
        feed: false,
        position,
        offset: 0,
        heard_at_us: i64::MAX,
    };
    // The first lacks the second segment and what follows, the other one the fourth.
    let leases = [lease(1, ends[0]), lease(2, ends[2])];
    let path = Path::new(JOURNAL).join("leases");
    let file = fs.open(&path, OpenMode::CreateNew).unwrap();
    let bytes = encode(journal.id(), &leases);
    assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
    fs.set_capacity(Some(u64::MAX / 2));
    let free = fs.free_bytes(Path::new(JOURNAL)).unwrap().unwrap();
    let asked = before(u64::MAX >> 1);
    let plan = |missing: u64| {
        let options = Options { lease_free_bytes_min: Some(free + missing), ..asked.clone() };
        let plan = retention::plan(&dynamic(&fs), Path::new(JOURNAL), &options).unwrap();
        let passed_over: Vec<_> = plan.gates.iter().map(|gate| gate.passed_over).collect();
        (plan.target, passed_over, plan)
    };
    let (target, passed_over, whole) = plan(0);
    assert_eq!((target, passed_over), (ends[0], vec![false, false]));
    assert!(matches!(whole.blocker.unwrap().holder, Holder::Mirror { .. }));
    let first = whole.removals[0].file_bytes;
    let (target, passed_over, _) = plan(first);
    assert_eq!((target, passed_over), (ends[0], vec![false, false]), "that much goes in any case");
    let (target, passed_over, _) = plan(first + 1);
    assert_eq!((target, passed_over), (ends[2], vec![true, false]));
    let (target, passed_over, _) = plan(free);
    assert!(target > ends[2], "{target}");
    assert_eq!(passed_over, [true, true]);
    // By default at most a tenth of the volume, however small that is.
    let used = u64::MAX / 2 - free;
    let default = || {
        let plan = retention::plan(&dynamic(&fs), Path::new(JOURNAL), &asked).unwrap();
        (plan.target, plan.gates.iter().map(|gate| gate.passed_over).collect::<Vec<_>>())
    };
    fs.set_capacity(Some(2 * used));
    assert_eq!(default(), (ends[0], vec![false, false]));
    fs.set_capacity(Some(used + 4096));
    let (target, passed_over) = default();
    assert!(target > ends[0] && passed_over[0], "{target}, {passed_over:?}");
    // Nobody knows how many are free.
    fs.set_capacity(None);
    assert_eq!(plan(free).0, ends[0]);
}

#[test]
fn conditions_stay_exact_and_a_repetition_of_what_is_gone_is_a_conflict() {
    let fs = SimFs::new(4);
    let store = open(&fs);
    let (old, busy) = (StreamId::new("old").unwrap(), StreamId::new("busy").unwrap());
    let event =
        |n: u8| NewEvent::raw("test.happened", [n; 100]).unwrap().id(EventId::from_bytes([n; 16]));
    let created = Append::to(&old, ExpectedRevision::NoStream, [event(1)]);
    let went_on = Append::to(&old, ExpectedRevision::Exact(Revision::FIRST), [event(2)]);
    let token = store.append(&created).unwrap().token();
    store.append(&went_on).unwrap();
    for n in 10..120 {
        store.append(&Append::to(&busy, ExpectedRevision::Any, [event(n)])).unwrap();
    }
    let kept = store.append(&Append::to(&busy, ExpectedRevision::Any, [event(121)])).unwrap();
    for append in [&created, &went_on] {
        assert!(matches!(store.append(append).unwrap(), Appended::Duplicate(_)));
    }
    forget(&store, 50).unwrap();
    let check = |store: &Store| {
        for append in [&created, &went_on] {
            let error = store.append(append).unwrap_err();
            let AppendError::Conflict { actual, .. } = error else { panic!("{error}") };
            assert_eq!(actual, Some(Revision::new(1)));
        }
        // A repetition of what is left is one.
        let again = Append::to(&busy, ExpectedRevision::Any, [event(121)]);
        assert!(matches!(store.append(&again).unwrap(), Appended::Duplicate(_)));
        let journal = store.journal();
        let error = journal.token_state(&token).unwrap_err();
        assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
        assert_eq!(journal.token_state(&kept.token()).unwrap(), TokenState::Present);
    };
    check(&store);
    store.close().unwrap();
    let store = open(&fs);
    check(&store);
    let next = Append::to(&old, ExpectedRevision::Exact(Revision::new(1)), [event(3)]);
    store.append(&next).unwrap();
    assert_eq!(store.journal().stream_head(&old).unwrap(), Some(Revision::new(2)));
}

#[test]
fn the_window_of_ids_ends_where_the_journal_begins() {
    let fs = SimFs::new(5);
    let store = open(&fs);
    let stream = StreamId::new("s").unwrap();
    let event =
        |n: u8| NewEvent::raw("test.happened", [n; 100]).unwrap().id(EventId::from_bytes([n; 16]));
    let append = |n| Append::to(&stream, ExpectedRevision::Any, [event(n)]);
    (1..100).for_each(|n| drop(store.append(&append(n)).unwrap()));
    forget(&store, 50).unwrap();
    let first = store.journal().start().position.get();
    // The same answers before and after the journal was opened again.
    assert!(matches!(store.append(&append(1)).unwrap(), Appended::New(_)));
    assert!(matches!(store.append(&append(first as u8 + 1)).unwrap(), Appended::Duplicate(_)));
    store.close().unwrap();
    let store = open(&fs);
    assert!(matches!(store.append(&append(2)).unwrap(), Appended::New(_)));
    assert!(matches!(store.append(&append(first as u8 + 1)).unwrap(), Appended::Duplicate(_)));
}

#[test]
fn checkpoints_are_compared_down_to_the_beginning_and_refused_below() {
    let (fs, model) = filled(6, 200);
    let store = open(&fs);
    let journal = store.journal();
    let mut cursor = journal.cursor(Position::START).unwrap();
    let mut ends = vec![journal.start()];
    while let Some(batch) = cursor.next_batch().unwrap() {
        ends.push(batch.end());
    }
    forget(&store, model.events.len() as u64 / 2).unwrap();
    let first = journal.start().position;
    for end in &ends {
        let compared = journal.compare(end);
        let place = journal.compare_place(end.offset, end.position, end.chain);
        if end.position >= first || end.position == Position::START {
            assert_eq!(compared.unwrap(), Comparison::Equal, "{}", end.position);
            assert_eq!(place.unwrap(), Comparison::Equal);
        } else {
            assert!(matches!(compared, Err(ReadError::Truncated { first: at }) if at == first));
            assert!(matches!(place, Err(ReadError::Truncated { .. })));
        }
    }
    let mut forked = journal.start();
    forked.chain = ends[1].chain;
    assert_eq!(journal.compare(&forked).unwrap(), Comparison::Differs);
}

#[test]
fn readers_that_are_on_their_way_are_told_and_never_skip() {
    let (fs, model) = filled(7, 200);
    let store = open(&fs);
    let journal = store.journal();
    let beside = read(&fs, JOURNAL);
    let busy = StreamId::new("s-1").unwrap();
    let mut events: Vec<_> = (0..2)
        .map(|skip| {
            let mut events = journal.read_all(Position::START).unwrap();
            (0..skip * 3).for_each(|_| drop(events.next().unwrap().unwrap()));
            events
        })
        .collect();
    let mut stream = journal.read_stream(&busy, Revision::FIRST).unwrap();
    let mut of_beside = beside.read_stream(&busy, Revision::FIRST).unwrap();
    let mut subscription = journal.subscribe(Position::START).unwrap();
    drop(stream.next().unwrap().unwrap());
    let half = model.events.len() as u64 / 2;
    forget(&store, half).unwrap();
    for events in &mut events {
        let error = events.find_map(Result::err).unwrap();
        assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
    }
    let error = subscription.next(std::time::Duration::ZERO).unwrap_err();
    assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
    // What was looked up before may still be delivered, in order; behind it nothing is left out.
    let mut next = 1;
    let error = loop {
        match stream.next() {
            Some(Ok(event)) => assert_eq!(event.revision().get(), next),
            Some(Err(error)) => break Some(error),
            None => break None,
        }
        next += 1;
    };
    match error {
        Some(ReadError::TruncatedStream { first, .. }) => assert!(first.get() > next),
        Some(error) => panic!("{error}"),
        None => assert_eq!(Some(next), model.head("s-1").map(|head| head.get() + 1)),
    }
    // In a reader beside the writer the files are gone, and it finds out why.
    let error = beside.read_all(Position::START).and_then(|mut e| e.next().transpose());
    assert!(matches!(error, Err(ReadError::Truncated { .. })), "{error:?}");
    let error = of_beside.find_map(Result::err).unwrap();
    assert!(
        matches!(error, ReadError::Truncated { .. } | ReadError::TruncatedStream { .. }),
        "{error}"
    );
}

#[test]
fn heads_of_many_streams_are_merged_base_by_base() {
    let fs = SimFs::new(8);
    let store = open(&fs);
    let mut names = Vec::new();
    for round in 0..6 {
        for n in 0..150 {
            // Some streams come again in later rounds.
            let name = format!("stream-{}-{}", n, if n % 3 == 0 { 0 } else { round });
            let stream = StreamId::new(&name).unwrap();
            let event = NewEvent::raw("test.happened", *b"x").unwrap();
            store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
            names.push(name);
        }
        forget(&store, names.len() as u64).unwrap();
    }
    assert!(store.journal().start().position.get() > 800);
    let check = |store: &Store| {
        for name in &names {
            let count = names.iter().filter(|other| *other == name).count() as u64;
            let head = store.journal().stream_head(&StreamId::new(name).unwrap()).unwrap();
            assert_eq!(head, Some(Revision::new(count - 1)), "{name}");
        }
    };
    check(&store);
    store.close().unwrap();
    check(&open(&fs));
    healthy(&fs, JOURNAL);
}

// --------------------------------------------------------------------------------------------------- archives

fn archived(store: &Store, position: u64) -> Result<Plan, RetentionError> {
    store.retain(&before(position).history(History::Archive(ARCHIVE.into())))
}

#[test]
fn what_the_archive_has_is_removed_and_can_be_restored() {
    let (fs, mut model) = filled(10, 150);
    let store = open(&fs);
    let mut rng = fastrand::Rng::with_seed(1010);
    for round in 0..3 {
        store.journal().backup(Path::new(ARCHIVE)).unwrap();
        let done = archived(&store, model.events.len() as u64).unwrap();
        assert!(!done.removals.is_empty(), "round {round}");
        model.check(store.journal());
        model.fill(&store, &mut rng, 80);
    }
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    let archive = read(&fs, ARCHIVE);
    assert_eq!(archive.start().position, Position::START);
    model.check(&archive);
    let whole = Path::new(RESTORED).join("journal");
    restore(&dynamic(&fs), Path::new(ARCHIVE), &whole, None).unwrap();
    let restored = open_at(&fs, RESTORED).unwrap();
    model.check(restored.journal());
    let end = store.journal().end();
    assert_eq!(restored.journal().compare(&end).unwrap(), Comparison::Equal);
}

#[test]
fn more_than_the_archive_has_is_not_removed() {
    let (fs, mut model) = filled(11, 100);
    let store = open(&fs);
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    model.fill(&store, &mut fastrand::Rng::with_seed(1011), 100);
    let all = model.events.len() as u64;
    let done = archived(&store, all).unwrap();
    let blocker = done.blocker.unwrap();
    assert!(matches!(blocker.holder, Holder::Archive { .. }), "{}", blocker.holder);
    assert!(!done.removals.is_empty());
    assert!(done.target < plan(&store, all).asked);
    model.check(store.journal());
    model.check_archive(&fs, done.target);
}

impl Model {
    /// The archive has everything in front of `position`.
    fn check_archive(&self, fs: &SimFs, position: Position) {
        let archive = read(fs, ARCHIVE);
        let count = position.get() as usize;
        let events = archive.read_all(Position::START).unwrap().take(count);
        let events: Vec<_> = events.map(|event| event.unwrap().id()).collect();
        let expected: Vec<_> = self.events.iter().take(count).map(|(.., id)| *id).collect();
        assert_eq!(events, expected);
    }
}

fn flip(fs: &SimFs, path: &Path, byte: u64) {
    let file = fs.open(path, OpenMode::Write).unwrap();
    let mut bytes = [0];
    file.read_at(&mut bytes, byte).unwrap();
    file.write_at(&[bytes[0] ^ 4], byte).unwrap();
    file.sync_data().unwrap();
}

#[test]
fn an_archive_that_ends_where_the_journal_begins_goes_on() {
    let (fs, mut model) = filled(17, 100);
    let store = open(&fs);
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    // Without its last segment it ends with a whole one.
    let files = segment_files(&fs, ARCHIVE);
    fs.remove(files.last().unwrap()).unwrap();
    archived(&store, model.events.len() as u64).unwrap();
    assert_eq!(segment_files(&fs, JOURNAL).len(), 1);
    model.fill(&store, &mut fastrand::Rng::with_seed(1017), 60);
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    model.check(&read(&fs, ARCHIVE));
    healthy(&fs, ARCHIVE);
    // With a part of it missing it doesn't.
    archived(&store, model.events.len() as u64).unwrap();
    let files = segment_files(&fs, ARCHIVE);
    fs.remove(files.last().unwrap()).unwrap();
    let last = fs.open(&files[files.len() - 2], OpenMode::Write).unwrap();
    last.set_len(last.size().unwrap() - 64).unwrap();
    let error = store.journal().backup(Path::new(ARCHIVE)).unwrap_err();
    assert_eq!(error.code(), "backup.missing");
}

#[test]
fn a_damaged_archive_holds_back_what_it_lacks() {
    let (fs, model) = filled(12, 150);
    let store = open(&fs);
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    let files = segment_files(&fs, ARCHIVE);
    let mut rng = fastrand::Rng::with_seed(12);
    let all = model.events.len() as u64;
    let whole = plan(&store, all).removals.len();
    let try_plan = || {
        let options = before(all).history(History::Archive(ARCHIVE.into()));
        store.plan_retention(&options).unwrap()
    };
    assert_eq!(try_plan().removals.len(), whole);
    for _ in 0..200 {
        let at = rng.usize(..whole);
        let len = fs.raw(&files[at]).unwrap().len() as u64;
        let byte = rng.u64(..len);
        flip(&fs, &files[at], byte);
        let planned = try_plan();
        assert_eq!(planned.removals.len(), at, "byte {byte} of {}", files[at].display());
        let Holder::Archive { error, .. } = planned.blocker.unwrap().holder else { panic!() };
        assert!(matches!(&*error, ArchiveError::Damaged(_)), "{error}");
        flip(&fs, &files[at], byte);
    }
    // Longer, shorter, and not there.
    let file = fs.open(&files[1], OpenMode::Write).unwrap();
    let len = file.size().unwrap();
    for wrong in [len + 64, len - 64] {
        file.set_len(wrong).unwrap();
        assert_eq!(try_plan().removals.len(), 1);
    }
    fs.remove(&files[1]).unwrap();
    let planned = try_plan();
    let Holder::Archive { error, .. } = planned.blocker.unwrap().holder else { panic!() };
    assert!(matches!(&*error, ArchiveError::Missing { .. }), "{error}");
    assert_eq!(planned.removals.len(), 1);
    // The journal itself is no archive.
    let options = before(all).history(History::Archive(JOURNAL.into()));
    let planned = store.plan_retention(&options).unwrap();
    let Holder::Archive { error, .. } = planned.blocker.unwrap().holder else { panic!() };
    assert!(matches!(&*error, ArchiveError::NotAnArchive { .. }), "{error}");
    assert!(planned.removals.is_empty());
}

#[test]
fn an_archive_of_another_history_is_refused() {
    let (fs, model) = filled(13, 100);
    let (other, _) = filled(14, 100);
    read(&other, JOURNAL).backup(Path::new(ARCHIVE)).unwrap();
    let store = open(&fs);
    fs.create_dir_all(Path::new(ARCHIVE)).unwrap();
    for path in segment_files(&other, ARCHIVE) {
        let file = fs.open(&path, OpenMode::CreateNew).unwrap();
        file.write_at(&other.raw(&path).unwrap(), 0).unwrap();
    }
    let planned = archived(&store, model.events.len() as u64).unwrap();
    assert!(planned.removals.is_empty());
    let Holder::Archive { error, .. } = planned.blocker.unwrap().holder else { panic!() };
    assert!(matches!(&*error, ArchiveError::Differs { .. }), "{error}");
}

#[test]
fn a_backup_of_a_trimmed_journal_is_verified_restored_and_continued() {
    let (fs, mut model) = filled(15, 150);
    let store = open(&fs);
    forget(&store, model.events.len() as u64 / 2).unwrap();
    let first = store.journal().start();
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    healthy(&fs, ARCHIVE);
    assert_eq!(read(&fs, ARCHIVE).start(), first);
    model.fill(&store, &mut fastrand::Rng::with_seed(1015), 60);
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    forget(&store, model.events.len() as u64).unwrap();
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    let backup = read(&fs, ARCHIVE);
    assert_eq!(backup.start(), first, "the backup keeps what it has");
    model.check(&backup);
    let dir = Path::new(RESTORED).join("journal");
    let error =
        restore(&dynamic(&fs), Path::new(ARCHIVE), &dir, Some(Position::START)).unwrap_err();
    assert_eq!(error.code(), "restore.read");
    restore(&dynamic(&fs), Path::new(ARCHIVE), &dir, None).unwrap();
    let restored = open_at(&fs, RESTORED).unwrap();
    assert_eq!(restored.journal().start(), first);
    model.fill(&restored, &mut fastrand::Rng::with_seed(16), 60);
    model.check(restored.journal());
    restored.close().unwrap();
    healthy(&fs, "/restored/journal");
}

#[test]
fn an_archive_that_lacks_its_beginning_is_none() {
    let (fs, mut model) = filled(25, 150);
    let store = open(&fs);
    forget(&store, model.events.len() as u64 / 2).unwrap();
    store.journal().backup(Path::new(ARCHIVE)).unwrap();
    model.fill(&store, &mut fastrand::Rng::with_seed(25), 60);
    let all = model.events.len() as u64;
    let options = before(all).history(History::Archive(ARCHIVE.into()));
    assert!(!store.plan_retention(&options).unwrap().removals.is_empty());
    fs.remove(&Path::new(ARCHIVE).join("base")).unwrap();
    let planned = store.plan_retention(&options).unwrap();
    assert!(planned.removals.is_empty());
    let Holder::Archive { error, .. } = planned.blocker.unwrap().holder else { panic!() };
    assert!(matches!(&*error, ArchiveError::Missing { .. }), "{error}");
}

#[test]
fn a_backup_of_a_trimmed_journal_is_restored_up_to_any_batch() {
    let (fs, model) = filled(16, 150);
    let store = open(&fs);
    forget(&store, model.events.len() as u64 / 2).unwrap();
    let journal = store.journal();
    journal.backup(Path::new(ARCHIVE)).unwrap();
    let first = journal.start().position;
    let mut cursor = journal.cursor(first).unwrap();
    let mut ends = vec![journal.start()];
    while let Some(batch) = cursor.next_batch().unwrap() {
        ends.push(batch.end());
    }
    for (number, end) in ends.iter().enumerate().step_by(7) {
        let dir = format!("/restored-{number}");
        let at = Some(end.position);
        let target = Path::new(&dir).join("journal");
        restore(&dynamic(&fs), Path::new(ARCHIVE), &target, at).unwrap();
        healthy(&fs, &format!("{dir}/journal"));
        let mut restored = Model { events: model.events[..end.position.get() as usize].to_vec() };
        let again = open_at(&fs, &dir).unwrap();
        assert_eq!(again.journal().end(), *end);
        let mut rng = fastrand::Rng::with_seed(number as u64);
        restored.fill(&again, &mut rng, 20);
        restored.check(again.journal());
        again.close().unwrap();
        let again = open_at(&fs, &dir).unwrap();
        restored.check(again.journal());
    }
}

// --------------------------------------------------------------------------------------------- damage, crashes

#[test]
fn a_damaged_base_is_reported_and_one_copy_of_its_header_suffices() {
    let (fs, model) = filled(20, 400);
    let store = open(&fs);
    forget(&store, model.events.len() as u64 / 2).unwrap();
    store.close().unwrap();
    let base = Path::new(JOURNAL).join("base");
    let len = fs.raw(&base).unwrap().len() as u64;
    assert!(len >= 5 * 4096);
    for page in 0..2 {
        flip(&fs, &base, page * 4096 + 100);
        let report = verify(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap();
        assert_eq!(
            report.damage.iter().map(headwater::Damage::code).collect::<Vec<_>>(),
            ["damage.base"]
        );
        let store = open(&fs); // which makes it anew
        model.check(store.journal());
        store.close().unwrap();
        healthy(&fs, JOURNAL);
    }
    for page in 2..len / 4096 {
        flip(&fs, &base, page * 4096 + 100);
        let report = verify(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap();
        assert_eq!(report.damage.len(), 1);
        assert_eq!(
            (report.damage[0].code(), report.damage[0].file_offset),
            ("damage.base", page * 4096)
        );
        flip(&fs, &base, page * 4096 + 100);
    }
    // Of a stream whose head can't be read, nothing is said.
    let page = 3;
    flip(&fs, &base, page * 4096 + 100);
    let store = open(&fs);
    let heads = model.streams().into_iter().map(|(name, positions)| {
        let head = store.journal().stream_head(&StreamId::new(name).unwrap());
        head.map(|head| assert_eq!(head, Some(Revision::new(positions.len() as u64 - 1))))
    });
    let failures: Vec<_> = heads.filter_map(Result::err).collect();
    assert!(!failures.is_empty());
    let of_base = |error: &ReadError| matches!(error, ReadError::Corruption(c) if matches!(c.kind, CorruptionKind::Base(_)) && c.path == base);
    assert!(failures.iter().all(of_base), "{failures:?}");
    store.close().unwrap();
    flip(&fs, &base, page * 4096 + 100);
    for page in 0..2 {
        flip(&fs, &base, page * 4096 + 100);
    }
    let error = open_at(&fs, DIR).unwrap_err();
    assert!(matches!(&error, OpenError::Corruption(c) if c.path == base), "{error}");
    // Without it, nothing says that what is missing was removed.
    fs.remove(&base).unwrap();
    let error = open_at(&fs, DIR).unwrap_err();
    assert!(
        matches!(&error, OpenError::Corruption(c) if c.kind == CorruptionKind::MissingSegment),
        "{error}"
    );
}

#[test]
fn a_segment_that_is_missing_behind_the_base_is_corruption() {
    let (fs, model) = filled(21, 300);
    let store = open(&fs);
    forget(&store, model.events.len() as u64 / 2).unwrap();
    store.close().unwrap();
    let files = segment_files(&fs, JOURNAL);
    for lost in [0, 1, files.len() - 1] {
        let fs = fs.fork(7);
        fs.remove(&files[lost]).unwrap();
        let error = open_at(&fs, DIR).unwrap_err();
        // A lost last segment shows at the end of the one in front.
        let shown = if lost + 1 == files.len() { &files[lost - 1] } else { &files[lost] };
        assert!(matches!(&error, OpenError::Corruption(c) if c.path == *shown), "{lost}: {error}");
        let report = verify(&fs, Path::new(JOURNAL), &mut |_| {}).unwrap();
        assert_eq!(report.damage[0].path, *shown);
    }
    let fs = fs.fork(7);
    files.iter().for_each(|file| fs.remove(file).unwrap());
    let error = open_at(&fs, DIR).unwrap_err();
    assert!(matches!(error, OpenError::Corruption(_)), "{error}");
}

/// Removes half of a journal whose disk fails at operation `at`; `None` if it didn't get that far.
fn interrupted(fs: &SimFs, half: u64, at: u64, fault: Fault, repeat: Repeat) -> Option<bool> {
    let store = open(fs);
    let target = plan(&store, half).target;
    let options = before(half).history(History::Forget(target));
    let begin = fs.ops();
    fs.fail_at(begin + at, fault, repeat);
    let outcome = store.retain(&options);
    let struck = fs.faults_struck() > 0 || fs.down().is_some();
    fs.clear_faults();
    struck.then_some(outcome.is_ok())
}

fn after_crash(fs: &SimFs, model: &Model, firsts: &[Position], context: &str) {
    let store = open_at(fs, DIR).unwrap_or_else(|error| panic!("{context}: {error}"));
    let first = store.journal().start().position;
    assert!(firsts.contains(&first), "{context}: begins at {first}");
    model.check(store.journal());
    let mut model = model.clone();
    model.fill(&store, &mut fastrand::Rng::with_seed(1001), 5);
    store.close().unwrap();
    healthy(fs, JOURNAL);
    let lowest = segment_files(fs, JOURNAL)[0].clone();
    let header = read(fs, JOURNAL).segments()[0].clone();
    assert_eq!((header.path, header.base_position), (lowest, first), "{context}");
}

/// Every operation of a removal, with every fault, a kill or power cut behind it, and a second one in the
/// recovery. How many first faults struck.
fn crash_everywhere(trimmed: bool, seconds: u64) -> Result<u64, String> {
    let (fs, mut model) = filled(22, 45);
    let store = open(&fs);
    let mut rng = fastrand::Rng::with_seed(1022);
    if trimmed {
        forget(&store, model.events.len() as u64).unwrap();
        model.fill(&store, &mut rng, 45);
    }
    let first = store.journal().start().position;
    let half = model.events.len() as u64 - 20;
    let target = plan(&store, half).target;
    assert!(target > first);
    store.close().unwrap();
    let mut struck = 0;
    for (fault, repeat) in FAULTS {
        for at in 0.. {
            let disk = fs.fork(at);
            let Some(done) = interrupted(&disk, half, at, fault, repeat) else { break };
            struck += 1;
            let firsts = if done { vec![target] } else { vec![first, target] };
            for cut in [false, true] {
                let context = format!("{fault:?} {repeat:?} at {at}, cut {cut}");
                let end =
                    |disk: &SimFs, cut: bool| if cut { disk.power_cut() } else { disk.kill() };
                let disk = disk.fork(at + 1);
                end(&disk, cut);
                for _ in 0..seconds {
                    // The recovery is interrupted as well; whatever it leaves is set in order by the next.
                    let again = disk.fork(rng.u64(..));
                    again.fail_at(again.ops() + rng.u64(..40), fault, repeat);
                    drop(open_at(&again, DIR));
                    again.clear_faults();
                    end(&again, rng.bool());
                    check_after(&again, &model, &firsts, &context)?;
                }
                check_after(&disk, &model, &firsts, &context)?;
            }
        }
    }
    Ok(struck)
}

fn check_after(
    fs: &SimFs,
    model: &Model,
    firsts: &[Position],
    context: &str,
) -> Result<(), String> {
    let check = std::panic::AssertUnwindSafe(|| after_crash(fs, model, firsts, context));
    std::panic::catch_unwind(check).map_err(|_| context.to_owned())
}

#[test]
fn a_removal_that_is_interrupted_anywhere_happened_or_not() {
    let struck = crash_everywhere(false, 1).unwrap();
    assert!(struck > 100, "{struck}");
    println!("{struck} interrupted removals");
}

#[test]
fn a_second_removal_that_is_interrupted_anywhere_happened_or_not() {
    let struck = crash_everywhere(true, 1).unwrap();
    println!("{struck} interrupted removals");
}

#[test]
fn removing_segments_before_the_base_is_durable_is_caught() {
    plant(Some(Bug::UnlinkBeforeBase));
    let outcome = std::panic::catch_unwind(|| crash_everywhere(false, 0));
    plant(None);
    assert!(matches!(outcome, Ok(Err(_)) | Err(_)), "the planted bug went unseen");
}

#[test]
fn a_closed_store_is_trimmed_without_a_service_and_an_open_one_is_refused() {
    let (fs, model) = filled(23, 150);
    let half = model.events.len() as u64 / 2;
    let store = open(&fs);
    let (dir, fs_dyn) = (Path::new(JOURNAL), dynamic(&fs));
    let planned = retention::plan(&fs_dyn, dir, &before(half)).unwrap();
    let options = before(half).history(History::Forget(planned.target));
    let error = retention::apply(&fs_dyn, dir, &options).unwrap_err();
    assert!(matches!(error, RetentionError::Open(OpenError::Locked { .. })), "{error}");
    store.close().unwrap();
    let error = store.retain(&options).unwrap_err();
    assert!(matches!(error, RetentionError::Closed), "{error}");
    let done = retention::apply(&fs_dyn, dir, &options).unwrap();
    assert_eq!(done.removals, planned.removals);
    model.check(open(&fs).journal());
}

#[test]
fn a_trimmed_mirror_that_lost_all_its_segments_fetches_them_again() {
    let (fs, model) = filled(29, 120);
    let store = open(&fs);
    let (disk, mirror) = (SimFs::new(30), Path::new("/mirror"));
    let fetch = |mirror: &mut Ingest| {
        let mut cursor = store.journal().cursor(mirror.end().position).unwrap();
        while let Some(batch) = cursor.next_batch().unwrap() {
            if let Some(page) = batch.page {
                mirror.segment(&page.bytes()).unwrap();
            }
            mirror.batch(batch.batch.bytes()).unwrap();
        }
        mirror.sync().unwrap();
    };
    let id = store.journal().id();
    let mut ingest = Ingest::create(&dynamic(&disk), mirror, id, &options()).unwrap();
    fetch(&mut ingest);
    ingest.close().unwrap();
    let half = before(model.events.len() as u64 / 2);
    let target = retention::plan(&dynamic(&disk), mirror, &half).unwrap().target;
    assert!(target > Position::START);
    let half = half.history(History::Forget(target));
    retention::apply(&dynamic(&disk), mirror, &half).unwrap();
    for path in segment_files(&disk, "/mirror") {
        assert!(disk.remove_raw(&path));
    }
    let mut ingest = Ingest::open(&dynamic(&disk), mirror, &options()).unwrap().unwrap();
    assert!(ingest.recovery_report().refetch);
    assert_eq!(ingest.end().position, target);
    fetch(&mut ingest);
    model.check(ingest.journal());
    ingest.close().unwrap();
    let ingest = Ingest::open(&dynamic(&disk), mirror, &options()).unwrap().unwrap();
    model.check(ingest.journal());
    healthy(&disk, "/mirror");
}

#[test]
fn a_journal_that_views_remember_is_not_begun_anew_by_a_removal() {
    let (fs, _) = filled(24, 50);
    let names = fs.list(Path::new(JOURNAL)).unwrap();
    let gone = names.iter().filter(|name| name.ends_with(".seg") || *name == "mark");
    gone.for_each(|name| fs.remove(&Path::new(JOURNAL).join(name)).unwrap());
    fs.create_dir_all(Path::new("/store/views/orders")).unwrap();
    let options = before(50).history(History::Forget(Position::START));
    let error = retention::apply(&dynamic(&fs), Path::new(JOURNAL), &options).unwrap_err();
    assert!(matches!(error, RetentionError::Open(OpenError::LostJournal { .. })), "{error}");
    assert_eq!(segment_files(&fs, JOURNAL), [] as [PathBuf; 0]);
}

#[test]
fn what_an_interrupted_removal_has_left_does_not_keep_a_full_disk_from_being_opened() {
    let mut left = 0;
    for at in 0.. {
        let (fs, model) = filled(26, 150);
        let half = model.events.len() as u64 / 2;
        if interrupted(&fs, half, at, Fault::PowerCut, Repeat::Once).is_none() {
            break;
        }
        fs.power_cut();
        fs.set_capacity(Some(0));
        let store = open(&fs);
        model.check(store.journal());
        let first = store.journal().segments()[0].number;
        let files = segment_files(&fs, JOURNAL);
        let below = files.iter().filter(|path| {
            let number = path.file_stem().unwrap().to_str().unwrap();
            u64::from_str_radix(number, 16).unwrap() < first
        });
        let below = below.count();
        left += below;
        if below > 0 {
            // Removed once there is space, by the next removal or opening.
            let error = forget(&store, half).unwrap_err();
            assert!(matches!(error, RetentionError::Read(_)), "{error}");
            assert_eq!(segment_files(&fs, JOURNAL).len(), store.journal().segments().len() + below);
        }
        fs.set_capacity(None);
        forget(&store, half).unwrap();
        assert_eq!(segment_files(&fs, JOURNAL).len(), store.journal().segments().len());
        model.check(store.journal());
    }
    assert!(left > 0);
}
