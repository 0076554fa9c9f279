//! Stores on a disk in memory, and the clock.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use headwater::command::{Aggregate, CommandId, Executed};
use headwater::reactor::{IdempotencyKey, ReactError, Reactor, ReactorOptions, Start};
use headwater::testing::{BEGINNING_US, Clock, Crash, MemoryDisk};
use headwater::{
    Append, AppendError, ExpectedRevision, NewEvent, Position, Query, QueryItem, Recorded,
    Revision, Store, StreamId,
};
use serde::{Deserialize, Serialize};

pub(super) fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

pub(super) fn append(store: &Store, name: &str, payload: &[u8]) -> Result<Position, AppendError> {
    let event = NewEvent::raw("happened", payload).unwrap().tag("all");
    let appended = store.append(&Append::to(&stream(name), ExpectedRevision::Any, [event]))?;
    Ok(appended.receipt().events[0].position)
}

pub(super) fn payloads(store: &Store) -> Vec<Vec<u8>> {
    let events = store.read_all(Position::START).unwrap();
    events.map(|event| event.unwrap().into_data()).collect()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Added(u64);

headwater::events! { pub(super) enum CounterEvent { Added(Added) = "counter.added", version 1; } }

#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Counter(pub(super) u64);

impl Aggregate for Counter {
    const NAME: &'static str = "counter";
    type Event = CounterEvent;
    type Command = u64;
    type Error = String;

    fn apply(&mut self, event: &Recorded<CounterEvent>) {
        let CounterEvent::Added(Added(more)) = event.data();
        self.0 += more;
    }

    fn decide(&self, more: &u64) -> Result<Vec<CounterEvent>, String> {
        Ok(vec![Added(*more).into()])
    }
}

/// Counts what it has done, by nothing else than calls.
pub(super) struct Counting(pub(super) Arc<AtomicU64>);

impl Reactor for Counting {
    const NAME: &'static str = "counting";
    type Event = Vec<u8>;

    fn react(&self, _: &Recorded<Vec<u8>>, _: &IdempotencyKey) -> Result<(), ReactError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn appends_reads_queries_commands_snapshots_and_reactors_work_on_a_disk_in_memory() {
    let disk = MemoryDisk::new();
    let store = disk.store("shop").unwrap();
    for n in 0..50_u8 {
        append(&store, &format!("s-{}", n % 5), &[n]).unwrap();
    }
    assert_eq!(payloads(&store).len(), 50);
    assert_eq!(store.read_stream(&stream("s-2"), Revision::FIRST).unwrap().count(), 10);
    let query = Query::from(QueryItem::tags(["all"]));
    assert_eq!(store.read_query(&query, Position::new(40)).unwrap().count(), 10);

    let counters = store.commands::<Counter>().snapshot_every(2).forgetful();
    for n in 0..10 {
        let id = CommandId::of(&n.to_string());
        counters.execute_once(id, &stream("counter-1"), &n).unwrap();
        let again = counters.execute_once(id, &stream("counter-1"), &n).unwrap();
        assert!(matches!(again, Executed::Repeated(_)));
    }
    assert_eq!(counters.load(&stream("counter-1")).unwrap().state().0, 45);

    let calls = Arc::new(AtomicU64::new(0));
    let open = || store.react(Counting(Arc::clone(&calls)), ReactorOptions::new(Start::Beginning));
    let reactor = open().unwrap();
    assert!(reactor.wait_reacted(Position::new(60), Duration::from_secs(60)));
    reactor.close().unwrap();
    drop(reactor);
    let reactor = open().unwrap();
    append(&store, "s-1", b"more").unwrap();
    assert!(reactor.wait_reacted(Position::new(61), Duration::from_secs(60)));
    assert_eq!(calls.load(Ordering::SeqCst), 61);
    drop(reactor);

    store.close().unwrap();
    assert!(!Path::new("shop").exists(), "nothing of it is on the real disk");
    let store = disk.store("shop").unwrap();
    assert_eq!(payloads(&store).len(), 61);
    assert_eq!(store.commands::<Counter>().load(&stream("counter-1")).unwrap().state().0, 45);
}

#[cfg(feature = "views")]
#[test]
fn a_view_of_a_store_in_memory_is_refused_and_nothing_is_written_to_the_real_disk() {
    use headwater::view::{Fold, FoldError, Keys, View, ViewOptions};

    struct Count;
    impl View for Count {
        const NAME: &'static str = "count";
        const VERSION: u32 = 1;
        type Key = ();
        type Row = u64;
        type Event = Vec<u8>;

        fn route(&self, _: &Recorded<Vec<u8>>, keys: &mut Keys<()>) {
            keys.add(());
        }

        fn fold(
            &self,
            (): &(),
            n: Option<u64>,
            _: &Recorded<Vec<u8>>,
        ) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(n.unwrap_or(0) + 1))
        }
    }

    let store = MemoryDisk::new().store("refused").unwrap();
    append(&store, "s-1", b"").unwrap();
    let error = store.view(Count).unwrap_err();
    assert!(error.to_string().contains("testing::view"), "{error}");
    let over = store.view_over(&[store.journal().clone()], Count, ViewOptions::default());
    assert!(over.unwrap_err().to_string().contains("testing::view"));
    assert!(!Path::new("refused").exists());
    // What is said there works.
    let history = headwater::testing::History::of(store.journal()).unwrap();
    headwater::testing::view(Count).given_history(history).then_row(&(), 1);
    let dir = tempfile::tempdir().unwrap();
    let view =
        headwater::view::open(dir.path(), store.journal().clone(), Count, ViewOptions::default());
    let end = store.journal().end().token();
    assert_eq!(view.unwrap().get_at_least(&(), &end, Duration::from_secs(60)).unwrap(), Some(1));
}

#[test]
fn each_crash_leaves_what_it_says() {
    let begin = |seed| {
        let disk = MemoryDisk::with_seed(seed);
        let store = disk.store("shop").unwrap();
        append(&store, "s-1", b"durable").unwrap();
        (disk, store)
    };
    let (disk, store) = begin(0);
    let from = disk.operations();
    append(&store, "s-1", b"second").unwrap();
    let to = disk.operations();
    let left = |crash| {
        let mut seen = BTreeSet::new();
        for (operation, seed) in (from..to).flat_map(|at| (0..8).map(move |seed| (at, seed))) {
            let (disk, store) = begin(seed);
            assert_eq!(disk.operations(), from, "the same operations each time");
            disk.stop_at(operation);
            // What comes behind the sync fails no append.
            let told = append(&store, "s-1", b"second").is_ok();
            assert!(disk.is_down());
            let disk = disk.fork(seed);
            disk.crash(crash);
            assert!(!disk.is_down());
            let there = payloads(&disk.store("shop").unwrap());
            assert!(!told || there.len() == 2, "{crash:?} at operation {operation}");
            seen.insert(there);
        }
        seen.into_iter().collect::<Vec<_>>()
    };
    let (one, both) = (vec![b"durable".to_vec()], vec![b"durable".to_vec(), b"second".to_vec()]);
    assert_eq!(left(Crash::Kill), [one.clone(), both.clone()], "written is written");
    assert_eq!(left(Crash::PowerCut), [one.clone(), both.clone()], "lost unless it is synced");
    assert_eq!(left(Crash::PowerCutAtRandom), [one, both]);
}

#[test]
fn what_was_open_before_a_crash_is_of_another_life() {
    let disk = MemoryDisk::default();
    let store = disk.store("shop").unwrap();
    append(&store, "s-1", b"1").unwrap();
    disk.crash(Crash::PowerCut);
    assert!(append(&store, "s-1", b"2").is_err());
    let again = disk.store("shop").unwrap();
    assert_eq!(payloads(&again), [b"1"]);
    append(&again, "s-1", b"3").unwrap();
}

#[test]
fn a_disk_with_a_limit_fills_up_and_appending_goes_on_when_there_is_space() {
    let disk = MemoryDisk::new();
    let store = disk.store("shop").unwrap();
    disk.limit_bytes(Some(2 << 20));
    let event = vec![7; 64 << 10];
    let full = (0..1000).find_map(|_| append(&store, "s-1", &event).err()).expect("it gets full");
    assert!(matches!(full, AppendError::DiskFull { .. }), "{full}");
    disk.limit_bytes(None);
    append(&store, "s-1", b"again").unwrap();
}

#[test]
fn events_are_recorded_with_the_time_of_the_clock() {
    let times = |store: &Store| -> Vec<i64> {
        let events = store.read_all(Position::START).unwrap();
        events.map(|event| event.unwrap().recorded_at_us()).collect()
    };
    let disk = MemoryDisk::new();
    let store = disk.store("shop").unwrap();
    append(&store, "s-1", b"").unwrap();
    disk.clock().advance(Duration::from_millis(7));
    append(&store, "s-1", b"").unwrap();
    disk.clock().set_us(5);
    append(&store, "s-1", b"").unwrap();
    // Also what another thread commits.
    let event = NewEvent::raw("happened", *b"").unwrap();
    store
        .submit(&Append::to(&stream("s-1"), ExpectedRevision::Any, [event]))
        .unwrap()
        .wait()
        .unwrap();
    assert_eq!(times(&store), [BEGINNING_US, BEGINNING_US + 7_000, 5, 5]);

    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::at_us(11);
    let path = dir.path().join("shop");
    let store = Store::builder(&path).create_if_missing().clock(&clock).open().unwrap();
    append(&store, "s-1", b"").unwrap();
    clock.set_us(12);
    append(&store, "s-1", b"").unwrap();
    assert_eq!(times(&store), [11, 12]);
    drop(store);
    let store = Store::open(&path).unwrap();
    append(&store, "s-1", b"").unwrap();
    assert!(times(&store)[2] > BEGINNING_US, "by the system's clock again");
}
