//! Reading: from memory while it is recent, one stream without the others, forward and backward, whatever
//! became of the indexes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use headwater::fs::Fs;
use headwater::fs::sim::{Fault, Op, SimFs};
use headwater::{
    Append, AppendError, CursorBatch, ExpectedRevision, Ingest, Item, Journal, JournalOptions,
    NewEvent, Position, ReadError, Recorded, Revision, Store, StreamId,
};

use crate::races::Hooked;

const DIR: &str = "/store";
const JOURNAL: &str = "/store/journal";

fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 6 * 1024,
        segment_bytes_max: 6 * 1024,
        batch_bytes_max: 1024,
        group_bytes_max: 1024,
        background_thread: false,
        ..JournalOptions::default()
    }
}

fn open_with(fs: &SimFs, options: JournalOptions) -> Store {
    open_on(Arc::new(fs.clone()), options)
}

fn open_on(fs: Arc<dyn Fs>, options: JournalOptions) -> Store {
    let builder = Store::builder(DIR).create_if_missing().journal_options(options);
    builder.fs(fs).open().unwrap()
}

fn open(fs: &SimFs) -> Store {
    open_with(fs, options())
}

fn read_only(fs: &SimFs) -> Journal {
    let fs: Arc<dyn Fs> = Arc::new(fs.clone());
    let (journal, corruption) = Journal::open_read_only(&fs, Path::new(JOURNAL)).unwrap();
    assert_eq!(corruption, None);
    journal
}

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

fn put(store: &Store, name: &str, payload: &[u8]) {
    let event = NewEvent::raw("test.happened", payload).unwrap();
    store.append(&Append::to(&stream(name), ExpectedRevision::Any, [event])).unwrap();
}

/// Appends to `filler` until there are so many segments.
fn fill(store: &Store, segments: usize) {
    while store.journal().segments().len() < segments {
        put(store, "filler", &[7; 400]);
    }
}

/// The disk, and how often the thread that calls this has opened, measured or read a file of it: what goes on
/// beside it doesn't count.
fn counted(disk: &SimFs) -> (Arc<dyn Fs>, impl Fn() -> u64 + use<>) {
    let (count, me) = (Arc::new(AtomicU64::new(0)), std::thread::current().id());
    let counter = Arc::clone(&count);
    let hook = move |op: Op, _: &Path| {
        if matches!(op, Op::Read | Op::Open | Op::Size) && std::thread::current().id() == me {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    (Arc::new(Hooked::new(disk, hook)), move || count.load(Ordering::Relaxed))
}

fn disk_reads(fs: &SimFs) -> u64 {
    fs.ops_of(Op::Read) + fs.ops_of(Op::Open) + fs.ops_of(Op::Size)
}

fn data(event: Result<Recorded, ReadError>) -> Vec<u8> {
    event.unwrap().into_data()
}

/// Takes in what the origin has more than the mirror.
fn ship(mirror: &mut Ingest, batch: &CursorBatch<'_>) {
    if let Some(page) = batch.page {
        mirror.segment(&page.bytes()).unwrap();
    }
    mirror.batch(batch.batch.bytes()).unwrap();
    mirror.sync().unwrap();
}

#[test]
fn followers_that_keep_up_read_nothing_from_the_disk_in_an_origin_or_a_mirror() {
    let (disk, reads) = counted(&SimFs::new(1));
    let (fs, mirror_reads) = counted(&SimFs::new(2));
    let store = open_on(disk, options());
    let id = store.journal().id();
    let mut mirror = Ingest::create(&fs, Path::new("/mirror"), id, &options()).unwrap();
    let mut cursor = store.journal().cursor(Position::START).unwrap();
    let mut subscription = store.subscribe(Position::START).unwrap();
    let mut mirrored = mirror.journal().read_all(Position::START).unwrap();
    for i in 0..200_u32 {
        put(&store, &format!("s-{}", i % 5), &i.to_le_bytes());
        let before = reads();
        ship(&mut mirror, &cursor.next_batch().unwrap().unwrap());
        assert!(cursor.next_batch().unwrap().is_none());
        loop {
            match subscription.next(Duration::ZERO).unwrap() {
                Some(Item::Event(event)) => assert_eq!(event.data()[..], i.to_le_bytes()),
                Some(_) => {}
                None => break,
            }
        }
        assert_eq!(subscription.position(), Position::new(u64::from(i) + 1));
        let name = stream(&format!("s-{}", i % 5));
        let last = store.journal().read_stream_backward(&name, None).unwrap().next().unwrap();
        assert_eq!(data(last), i.to_le_bytes());
        assert_eq!(reads(), before, "event {i}");
        let before = mirror_reads();
        assert_eq!(data(mirrored.next().unwrap()), i.to_le_bytes());
        assert!(mirrored.next().is_none());
        assert_eq!(mirror_reads(), before, "event {i}, mirrored");
    }
    assert!(store.journal().segments().len() > 5);
    // From the beginning, some come from the disk and some from memory: all are there once.
    for journal in [store.journal(), mirror.journal()] {
        let all: Vec<_> = journal.read_all(Position::START).unwrap().map(data).collect();
        assert!(all.iter().map(Vec::as_slice).eq(
            (0..200_u32).map(u32::to_le_bytes).collect::<Vec<_>>().iter().map(|bytes| &bytes[..])
        ));
    }
}

#[test]
fn what_is_kept_in_memory_is_bounded_and_a_follower_that_falls_behind_reads_on_from_the_disk() {
    for recent_bytes_max in [0, 700, 3000] {
        let (disk, reads) = counted(&SimFs::new(1));
        let store = open_on(disk, JournalOptions { recent_bytes_max, ..options() });
        let mut cursor = store.journal().cursor(Position::START).unwrap();
        let mut rng = Rng::with_seed(recent_bytes_max as u64);
        let (mut appended, mut seen) = (0_u64, 0_u64);
        for _ in 0..120 {
            for _ in 0..rng.u64(0..6) {
                put(&store, "a", &appended.to_le_bytes());
                appended += 1;
            }
            for _ in 0..rng.u64(0..8) {
                let before = reads();
                let Some(batch) = cursor.next_batch().unwrap() else { break };
                let record = batch.batch.records().next().unwrap().unwrap();
                assert_eq!(record.payload, seen.to_le_bytes());
                seen += 1;
                if recent_bytes_max == 3000 && seen == appended {
                    assert_eq!(reads(), before);
                }
            }
            assert!(seen <= appended);
        }
        while cursor.next_batch().unwrap().is_some() {
            seen += 1;
        }
        assert_eq!(seen, appended);
    }
}

#[test]
fn a_batch_whose_sync_failed_is_shown_to_nobody() {
    let disk = SimFs::new(1);
    let store = open(&disk);
    put(&store, "a", b"durable");
    let mut cursor = store.journal().cursor(Position::new(1)).unwrap();
    let mut subscription = store.subscribe(Position::new(1)).unwrap();
    disk.fail_next(Op::SyncData, Fault::Eio);
    let event = NewEvent::raw("test.happened", *b"lost?").unwrap();
    let failed = store.append(&Append::to(&stream("a"), ExpectedRevision::Any, [event]));
    assert!(matches!(failed, Err(AppendError::Unknown(_))), "{failed:?}");
    assert!(cursor.next_batch().unwrap().is_none());
    assert!(!matches!(subscription.next(Duration::ZERO).unwrap(), Some(Item::Event(_))));
    let all = store.read_all(Position::START).unwrap().map(data).collect::<Vec<_>>();
    assert_eq!(all, [b"durable"]);
    assert_eq!(store.journal().stream_head(&stream("a")).unwrap(), Some(Revision::FIRST));
    let back = store.journal().read_stream_backward(&stream("a"), None).unwrap();
    assert_eq!(back.map(data).collect::<Vec<_>>(), [b"durable"]);
}

/// What the journal should hold.
#[derive(Default)]
struct Model {
    all: Vec<(String, Vec<u8>)>,
    streams: HashMap<String, Vec<usize>>,
}

impl Model {
    fn push(&mut self, name: &str, payload: Vec<u8>) {
        self.streams.entry(name.into()).or_default().push(self.all.len());
        self.all.push((name.into(), payload));
    }

    fn check(&self, journal: &Journal, rng: &mut Rng, what: &str) {
        assert_eq!(journal.end().position.get(), self.all.len() as u64, "{what}");
        for _ in 0..12 {
            let name = if rng.u8(..) < 40 {
                format!("absent-{}", rng.u16(..))
            } else {
                self.all
                    .get(rng.usize(..self.all.len().max(1)))
                    .map_or("none".into(), |e| e.0.clone())
            };
            self.check_stream(journal, &name, rng, what);
        }
        let from = rng.usize(..=self.all.len());
        let take = if rng.bool() { usize::MAX } else { rng.usize(..40) };
        let wanted = || self.all.iter().map(|event| &event.1);
        let forward = journal.read_all(Position::new(from as u64)).unwrap();
        let forward: Vec<_> = forward.take(take).map(data).collect();
        assert!(forward.iter().eq(wanted().skip(from).take(take)), "{what}: from {from}");
        let backward = journal.read_all_backward(Position::new(from as u64)).unwrap();
        let backward: Vec<_> = backward.take(take).map(data).collect();
        let wanted: Vec<_> = wanted().take(from).collect();
        assert!(
            backward.iter().eq(wanted.into_iter().rev().take(take)),
            "{what}: back from {from}"
        );
    }

    fn check_stream(&self, journal: &Journal, name: &str, rng: &mut Rng, what: &str) {
        let empty = Vec::new();
        let wanted = self.streams.get(name).unwrap_or(&empty);
        let head = wanted.len().checked_sub(1).map(|last| Revision::new(last as u64));
        let what = format!("{what}: {name} of {} events", wanted.len());
        if rng.bool() {
            assert_eq!(journal.stream_head(&stream(name)).unwrap(), head, "{what}");
        }
        let payload = |index: &usize| &self.all[*index].1;
        let from = if rng.bool() { 0 } else { rng.usize(..wanted.len() + 3) };
        let take = if rng.bool() { usize::MAX } else { rng.usize(..5) };
        let read = journal.read_stream(&stream(name), Revision::new(from as u64)).unwrap();
        let read: Vec<_> = read.take(take).map(|event| event.unwrap()).collect();
        assert!(
            read.iter().map(Recorded::data).eq(wanted.iter().skip(from).take(take).map(payload)),
            "{what}: from {from}, {take}"
        );
        for (event, (revision, index)) in read.iter().zip(wanted.iter().enumerate().skip(from)) {
            assert_eq!(event.revision().get(), revision as u64, "{what}");
            assert_eq!(event.position().get(), *index as u64, "{what}");
            assert_eq!(event.stream().as_str(), name);
        }
        let from = rng.bool().then(|| rng.usize(..wanted.len() + 3));
        let revision = from.map(|from| Revision::new(from as u64));
        let count = from.map_or(wanted.len(), |from| wanted.len().min(from + 1));
        let back = journal.read_stream_backward(&stream(name), revision).unwrap();
        let back: Vec<_> = back.take(take).map(data).collect();
        let wanted = wanted[..count].iter().rev().take(take).map(payload);
        assert!(back.iter().eq(wanted), "{what}: back from {from:?}, {take}");
    }
}

fn append_some(store: &Store, model: &mut Model, rng: &mut Rng, streams: usize) {
    let mut append: Option<Append> = None;
    let mut names = Vec::new();
    for _ in 0..rng.usize(1..3) {
        // A few streams get nearly everything, many a little.
        let name = match rng.u8(..) {
            0..100 => format!("hot-{}", rng.u8(..3)),
            _ => format!("s-{}", rng.usize(..streams)),
        };
        if names.contains(&name) {
            continue;
        }
        let events: Vec<_> = (0..rng.usize(1..4))
            .map(|_| {
                let payload: Vec<u8> = (0..rng.usize(1..60)).map(|_| rng.u8(..)).collect();
                model.push(&name, payload.clone());
                NewEvent::raw("test.happened", payload).unwrap()
            })
            .collect();
        append = Some(match append {
            None => Append::to(&stream(&name), ExpectedRevision::Any, events),
            Some(append) => append.and_to(&stream(&name), ExpectedRevision::Any, events),
        });
        names.push(name);
    }
    store.append(&append.unwrap()).unwrap();
}

fn derived(fs: &SimFs) -> Vec<PathBuf> {
    let is = |path: &PathBuf, extension: &str| path.extension().is_some_and(|e| e == extension);
    fs.files().into_iter().filter(|path| is(path, "idx") || is(path, "map")).collect()
}

/// Damages or removes some of the indexes.
fn damage_indexes(fs: &SimFs, rng: &mut Rng) -> usize {
    let mut damaged = 0;
    for path in derived(fs) {
        if rng.u8(..) > 60 {
            continue;
        }
        damaged += 1;
        let len = fs.raw(&path).unwrap().len();
        match rng.u8(..5) {
            0 => drop(fs.remove_raw(&path)),
            1 => fs.write_raw(&path, &fs.raw(&path).unwrap()[..rng.usize(..=len)]),
            2 => fs.write_raw(&path, &vec![0; len]),
            _ => drop(fs.flip_bit(&path, rng.u64(..len as u64), rng.u8(..8))),
        }
    }
    damaged
}

fn history(seed: u64, segments: usize) {
    let mut rng = Rng::with_seed(seed);
    let disk = SimFs::new(seed);
    let mut model = Model::default();
    let recent_bytes_max = [0, 2000, 4 << 20][rng.usize(..3)];
    let options = JournalOptions { recent_bytes_max, ..options() };
    let mut store = open_with(&disk, options.clone());
    let streams = rng.usize(5..400);
    let (mut rounds, mut damaged) = (0, 0);
    while store.journal().segments().len() < segments {
        rounds += 1;
        for _ in 0..rng.usize(1..90) {
            append_some(&store, &mut model, &mut rng, streams);
        }
        let what = format!("seed {seed}, round {rounds}");
        model.check(store.journal(), &mut rng, &what);
        model.check(&read_only(&disk), &mut rng, &format!("{what}, beside the writer"));
        match rng.u8(..4) {
            0 => {
                store.close().unwrap();
                damaged += damage_indexes(&disk, &mut rng);
                model.check(&read_only(&disk), &mut rng, &format!("{what}, damaged"));
                store = open_with(&disk, options.clone());
            }
            1 => {
                drop(store);
                disk.power_cut();
                damaged += damage_indexes(&disk, &mut rng);
                store = open_with(&disk, options.clone());
            }
            _ => continue,
        }
        model.check(store.journal(), &mut rng, &format!("{what}, reopened"));
    }
    let maps = derived(&disk).iter().filter(|path| path.extension().unwrap() == "map").count();
    println!(
        "seed {seed}: {} events in {} streams, {maps} maps, {damaged} indexes damaged",
        model.all.len(),
        model.streams.len()
    );
}

#[test]
fn histories_with_rolls_reopenings_and_damaged_indexes_read_like_a_plain_list() {
    for seed in 0..12 {
        history(seed, 24);
    }
    history(100, 90);
}

#[test]
fn a_stream_costs_what_it_holds_and_not_the_journal() {
    let disk = SimFs::new(1);
    let store = open(&disk);
    let mut segments = 0;
    for part in 0..3_u8 {
        segments += 100;
        put(&store, "rare", &[part]);
        fill(&store, segments);
    }
    fill(&store, 330);
    store.close().unwrap();
    let ask = |disk: &SimFs, what: &str, ask: &dyn Fn(&Journal)| {
        let journal = read_only(disk);
        let before = disk_reads(disk);
        ask(&journal);
        let cost = disk_reads(disk) - before;
        println!("{what}: {cost} reads, openings and sizes of {segments} segments");
        cost
    };
    // Levels: 8, 64, 512. A look-up that opens a map is three operations, a second page one more.
    let absent = ask(&disk, "a head that isn't there", &|journal| {
        assert_eq!(journal.stream_head(&stream("absent")).unwrap(), None);
    });
    assert!(absent <= 7 * 3 * 3, "{absent}");
    let whole = ask(&disk, "a stream of three events", &|journal| {
        let read = journal.read_stream(&stream("rare"), Revision::FIRST).unwrap();
        assert_eq!(read.map(data).collect::<Vec<_>>(), [[0], [1], [2]]);
    });
    assert!(whole <= 120, "{whole}");
    let back = ask(&disk, "the same backward", &|journal| {
        let read = journal.read_stream_backward(&stream("rare"), None).unwrap();
        assert_eq!(read.map(data).collect::<Vec<_>>(), [[2], [1], [0]]);
    });
    assert!(back <= 140, "{back}");
    let last = ask(&disk, "the last event of a long stream", &|journal| {
        let mut read = journal.read_stream_backward(&stream("filler"), None).unwrap();
        assert_eq!(data(read.next().unwrap()), [7; 400]);
    });
    assert!(last <= 30, "{last}");
    let middle = ask(&disk, "ten from the middle of a long stream", &|journal| {
        let head = journal.stream_head(&stream("filler")).unwrap().unwrap().get();
        let read = journal.read_stream(&stream("filler"), Revision::new(head / 2)).unwrap();
        assert_eq!(read.take(10).map(data).filter(|data| *data == [7; 400]).count(), 10);
    });
    assert!(middle <= 150, "{middle}");
    let newest = ask(&disk, "the last ten events of all", &|journal| {
        let read = journal.read_all_backward(journal.end().position).unwrap();
        assert_eq!(read.take(10).map(data).filter(|data| *data == [7; 400]).count(), 10);
    });
    // Of two segments: the file, its pieces, the sidecar.
    assert!(newest <= 16, "{newest}");
    // Without maps everything is asked, and the answers are the same.
    let bare = disk.fork(2);
    for path in derived(&bare).iter().filter(|path| path.extension().unwrap() == "map") {
        assert!(bare.remove_raw(path));
    }
    let without = ask(&bare, "a head that isn't there, without maps", &|journal| {
        assert_eq!(journal.stream_head(&stream("absent")).unwrap(), None);
    });
    assert!(without > 300, "{without}");
    // A writer lays them out again.
    open(&bare).close().unwrap();
    let again = ask(&bare, "a head that isn't there, with new maps", &|journal| {
        assert_eq!(journal.stream_head(&stream("absent")).unwrap(), None);
    });
    assert_eq!(again, absent);
    assert_eq!(derived(&bare), derived(&disk));
    for path in derived(&disk) {
        assert!(disk.raw(&path) == bare.raw(&path), "{}", path.display());
    }
}

/// Every append to a new stream asks for a head that isn't there.
#[test]
fn heads_of_new_streams_are_asked_of_memory_however_long_the_journal_is() {
    let disk = SimFs::new(1);
    let store = open(&disk);
    fill(&store, 200);
    store.close().unwrap();
    let journal = read_only(&disk);
    let ask = |name: String| assert_eq!(journal.stream_head(&stream(&name)).unwrap(), None);
    (0..30).for_each(|i| ask(format!("warm-{i}"))); // pages of the maps are in memory then
    let before = disk_reads(&disk);
    (0..30).for_each(|i| ask(format!("new-{i}")));
    assert_eq!(disk_reads(&disk), before);
}

#[test]
fn opening_costs_a_few_operations_for_each_sealed_segment() {
    let cost_of = |segments: usize, unclean: bool| {
        let disk = SimFs::new(1);
        let store = open(&disk);
        fill(&store, segments);
        if unclean {
            drop(store);
            disk.kill();
        } else {
            store.close().unwrap();
        }
        let before = disk.ops();
        let options = JournalOptions { idempotency_window_events: 100, ..options() };
        let store = open_with(&disk, options);
        let as_writer = disk.ops() - before;
        store.close().unwrap();
        let before = disk.ops();
        drop(read_only(&disk));
        (as_writer, disk.ops() - before)
    };
    for unclean in [false, true] {
        let (few, many) = (cost_of(20, unclean), cost_of(120, unclean));
        println!("unclean {unclean}: {few:?} operations with 20 segments, {many:?} with 120");
        assert!(many.0 - few.0 <= 100 * 8, "as writer");
        assert!(many.1 - few.1 <= 100 * 8, "for reading");
    }
}
