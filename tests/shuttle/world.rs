//! A store on a simulated disk, threads that use it, and what they were told.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headwater::fs::sim::{FaultRates, SimFs};
use headwater::fs::{Allocate, File, Fs, Lock, LockHeld, OpenMode};
use headwater::{
    Append, AppendError, Appended, Durability, EventId, ExpectedRevision, JournalOptions, NewEvent,
    Position, Store, StreamId,
};
use shuttle::rand::{Rng, RngCore, thread_rng};
use shuttle::sync::Mutex;
use shuttle::thread::{self, JoinHandle};

const DIR: &str = "/store";
/// Time stands still: only what happens ends a wait.
pub(crate) const FOREVER: Duration = Duration::MAX;

pub(crate) fn coin() -> bool {
    thread_rng().gen_bool(0.5)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Syncs {
    Work,
    /// One in six or so.
    Fail,
}

/// What somebody was told.
#[derive(Default)]
struct Told {
    /// Acknowledged: the position and the id.
    durable: Vec<(Position, EventId)>,
    /// Answered before it was durable.
    buffered: Vec<EventId>,
    /// Certainly not written.
    refused: Vec<EventId>,
    /// Nobody knows.
    unknown: Vec<EventId>,
}

#[derive(Clone)]
pub(crate) struct World {
    disk: SimFs,
    store: Arc<Store>,
    told: Arc<Mutex<Told>>,
    events: Events,
}

/// How large the events are; the rest follows from it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Events {
    Small,
    /// A segment takes five of them.
    Large,
    /// A group of one is written while the group in front of it is being synced.
    Huge,
}

impl Events {
    const fn payload_bytes(self) -> usize {
        match self {
            Self::Small => 16,
            Self::Large => 1500,
            Self::Huge => 66 << 10,
        }
    }
}

fn options(events: Events) -> JournalOptions {
    let (segment, batch) = match events {
        Events::Small | Events::Large => (4096 + 8192, 2048),
        Events::Huge => (1 << 20, 68 << 10),
    };
    JournalOptions {
        segment_bytes_first: segment,
        segment_bytes_max: segment,
        batch_bytes_max: batch,
        group_bytes_max: u64::from(batch) * 2,
        idempotency_window_events: 100,
        background_thread: false,
        // Time is not what these runs are about.
        buffered_age_ms_max: u64::MAX,
        ..JournalOptions::default()
    }
}

fn open(fs: Arc<dyn Fs>, events: Events) -> Store {
    let store = Store::builder(DIR).create_if_missing().journal_options(options(events));
    store.fs(fs).open().unwrap_or_else(|error| panic!("opening: {error} ({error:?})"))
}

fn event(id: EventId, bytes: usize) -> NewEvent {
    let mut payload = id.as_bytes().to_vec();
    payload.resize(bytes.max(payload.len()), 7);
    NewEvent::raw("test.happened", payload).unwrap().id(id)
}

impl World {
    pub(crate) fn new(events: Events, syncs: Syncs) -> Self {
        headwater::env::seed(Some(thread_rng().next_u64()));
        let disk = SimFs::new(thread_rng().next_u64());
        let store = Arc::new(open(Arc::new(Yielding(disk.clone())), events));
        if syncs == Syncs::Fail {
            disk.set_fault_rates(FaultRates { sync_eio: 170, ..FaultRates::default() });
        }
        Self { disk, store, told: Arc::default(), events }
    }

    fn new_id() -> EventId {
        let mut bytes = [0; 16];
        thread_rng().fill_bytes(&mut bytes);
        EventId::from_bytes(bytes)
    }

    pub(crate) fn segments(&self) -> usize {
        self.store.journal().segments().len()
    }

    /// Whether the disk holds the event for certain.
    fn is_durable(&self, id: EventId) -> bool {
        let needle = id.as_bytes();
        let files = self.disk.files();
        let mut segments = files.iter().filter(|path| path.extension().is_some_and(|e| e == "seg"));
        segments.any(|path| {
            let bytes = self.disk.raw_durable(path).unwrap_or_default();
            bytes.windows(needle.len()).any(|window| window == needle)
        })
    }

    fn hear(&self, id: EventId, answer: Result<Appended, AppendError>) {
        match answer {
            Ok(appended) => {
                let receipt = appended.receipt();
                let place = receipt.events.first().unwrap();
                assert!(self.is_durable(id), "{id} was acknowledged and isn't durable");
                let end = self.store.journal().end().position;
                assert!(end >= receipt.token.position, "{id} was acknowledged and isn't shown");
                self.told.lock().unwrap().durable.push((place.position, id));
            }
            Err(AppendError::Unknown(_)) => self.told.lock().unwrap().unknown.push(id),
            Err(error) => {
                assert!(error.is_certainly_not_written(), "{error}");
                self.told.lock().unwrap().refused.push(id);
            }
        }
    }

    // ------------------------------------------------------------------------------------------- threads

    fn spawn(&self, run: impl FnOnce(&Self) + Send + 'static) -> JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || run(&world))
    }

    /// Appends to a stream of its own, one after the other, each expecting the one in front.
    pub(crate) fn appender(&self, stream: &str, count: u64) -> JoinHandle<()> {
        let stream = StreamId::new(stream).unwrap();
        self.spawn(move |world| {
            let mut expected = ExpectedRevision::NoStream;
            for _ in 0..count {
                let id = Self::new_id();
                let append =
                    Append::to(&stream, expected, [event(id, world.events.payload_bytes())]);
                let answer = world.store.append(&append);
                let revision =
                    answer.as_ref().ok().map(|answer| answer.receipt().events[0].revision);
                world.hear(id, answer);
                let Some(revision) = revision else { return };
                expected = ExpectedRevision::Exact(revision);
            }
        })
    }

    /// Submits all, then waits for the answers: some of them on another thread.
    pub(crate) fn submitter(&self, stream: &str, count: u64) -> JoinHandle<()> {
        let stream = StreamId::new(stream).unwrap();
        self.spawn(move |world| {
            let mut tickets = Vec::new();
            for _ in 0..count {
                let id = Self::new_id();
                let append = Append::to(
                    &stream,
                    ExpectedRevision::Any,
                    [event(id, world.events.payload_bytes())],
                );
                match world.store.submit(&append) {
                    Ok(ticket) => tickets.push((id, ticket)),
                    Err(error) => world.hear(id, Err(error)),
                }
            }
            let (id, last) = match tickets.pop() {
                Some(last) => last,
                None => return,
            };
            // A ticket is a future, too.
            let other = world.spawn(move |world| world.hear(id, shuttle::future::block_on(last)));
            for (id, ticket) in tickets {
                world.hear(id, ticket.wait());
            }
            other.join().unwrap();
        })
    }

    /// Appends without waiting for the disk, then flushes.
    pub(crate) fn buffering(&self, stream: &str, count: u64) -> JoinHandle<()> {
        let stream = StreamId::new(stream).unwrap();
        self.spawn(move |world| {
            let mut mine = Vec::new();
            for _ in 0..count {
                let id = Self::new_id();
                let append = Append::to(
                    &stream,
                    ExpectedRevision::Any,
                    [event(id, world.events.payload_bytes())],
                );
                match world.store.append(&append.durability(Durability::Buffered)) {
                    Ok(appended) => mine.push((appended.receipt().events[0].position, id)),
                    Err(error) => world.hear(id, Err(error)),
                }
            }
            let flushed = world.store.flush();
            let mut told = world.told.lock().unwrap();
            match flushed {
                Ok(end) => {
                    for (position, id) in mine {
                        assert!(end.position > position && world.is_durable(id), "{id}: flushed");
                        told.durable.push((position, id));
                    }
                }
                Err(_) => told.buffered.extend(mine.into_iter().map(|(_, id)| id)),
            }
        })
    }

    /// Appends the event `number` as the first of the one stream that all claimants want.
    pub(crate) fn claimant(&self, number: u8) -> JoinHandle<()> {
        let stream = StreamId::new("wanted").unwrap();
        self.spawn(move |world| {
            let id = EventId::from_bytes([number; 16]);
            let append = Append::to(&stream, ExpectedRevision::NoStream, [event(id, 16)]);
            match world.store.append(&append) {
                // The answer speaks of the other one: that must be durable.
                Err(AppendError::Conflict { actual, .. }) => {
                    let other = EventId::from_bytes([3 - number; 16]);
                    assert!(actual.is_some() && world.is_durable(other), "a conflict with nothing");
                }
                // Two are told of the same event: it counts once.
                Err(AppendError::Poisoned(_) | AppendError::Closed) => {}
                answer => world.hear(id, answer),
            }
        })
    }

    /// Waits for the durable end and reads up to it, until the journal ends.
    pub(crate) fn follower(&self) -> JoinHandle<()> {
        self.spawn(|world| {
            let journal = world.store.journal().clone();
            let mut cursor = journal.cursor(Position::START).unwrap();
            let mut next = Position::START;
            loop {
                let end = journal.wait_past(next, FOREVER);
                while let Some(batch) = cursor.next_batch().unwrap() {
                    assert_eq!(batch.batch.header.base_position, next, "repeated or skipped");
                    next = batch.batch.header.end_position();
                    for record in batch.batch.records() {
                        let id = record.unwrap().id;
                        assert!(world.is_durable(id), "{id} is shown and isn't durable");
                    }
                }
                if next >= end.position && journal.is_closed() && next >= journal.end().position {
                    return;
                }
            }
        })
    }

    // ---------------------------------------------------------------------------------------------- end

    pub(crate) fn close(&self) {
        // Refused if a sync had failed.
        drop(self.store.close());
    }

    /// The power goes, and what is there is what was said.
    pub(crate) fn check(self) {
        let Self { disk, store, told, events: sizes } = self;
        let told = std::mem::take(&mut *told.lock().unwrap());
        drop(store);
        disk.clear_faults();
        disk.power_cut();
        let store = open(Arc::new(disk), sizes);
        let events = store.read_all(Position::START).unwrap();
        let events: Vec<_> = events.map(Result::unwrap).collect();
        let ids: BTreeSet<EventId> = events.iter().map(headwater::Recorded::id).collect();
        assert_eq!(ids.len(), events.len(), "an event is there twice");
        for (index, event) in events.iter().enumerate() {
            assert_eq!(event.position().get(), index as u64, "positions have a hole");
            let id = event.id();
            let known = told.durable.iter().any(|(_, known)| *known == id)
                || told.unknown.contains(&id)
                || told.buffered.contains(&id);
            assert!(known, "{id} was never submitted, or was refused");
        }
        for (position, id) in &told.durable {
            let there = events.get(position.get() as usize).map(headwater::Recorded::id);
            assert_eq!(there, Some(*id), "acknowledged at {position}");
        }
        assert!(told.refused.iter().all(|id| !ids.contains(id)), "refused, and there");
        store.close().unwrap();
        headwater::env::seed(None);
    }
}

// ------------------------------------------------------------------------------------------------- disk

/// A disk at whose writes and syncs other threads get their turn.
#[derive(Debug)]
struct Yielding(SimFs);

#[derive(Debug)]
struct YieldingFile(Arc<dyn File>);

impl Fs for Yielding {
    fn create_dir_all(&self, dir: &Path) -> std::io::Result<()> {
        self.0.create_dir_all(dir)
    }
    fn list(&self, dir: &Path) -> std::io::Result<Vec<String>> {
        self.0.list(dir)
    }
    fn open(&self, path: &Path, mode: OpenMode) -> std::io::Result<Arc<dyn File>> {
        Ok(Arc::new(YieldingFile(self.0.open(path, mode)?)))
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> std::io::Result<()> {
        self.0.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> std::io::Result<()> {
        self.0.sync_dir(dir)
    }
    fn lock(&self, path: &Path, owner: &str) -> std::io::Result<Result<Box<dyn Lock>, LockHeld>> {
        self.0.lock(path, owner)
    }
}

impl File for YieldingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> std::io::Result<usize> {
        thread::yield_now();
        self.0.write_at(buf, offset)
    }
    fn size(&self) -> std::io::Result<u64> {
        self.0.size()
    }
    fn allocate(&self, len: u64, how: Allocate) -> std::io::Result<bool> {
        self.0.allocate(len, how)
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        thread::yield_now();
        let synced = self.0.sync_data();
        thread::yield_now();
        synced
    }
    fn drop_cache(&self) -> std::io::Result<()> {
        self.0.drop_cache()
    }
}
