//! Sequences of operations on a store, decoded from bytes, beside a plain model of what must come of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::env;
use crate::error::{AppendError, OpenError};
use crate::event::{EventId, ExpectedRevision, NewEvent, Revision, StreamId};
use crate::fs::Fs;
use crate::fs::sim::{Fault, Op, Repeat, SimFs};
use crate::journal::{
    Append, Appended, CloseError, Comparison, Ingest, Journal, Placed, Receipt, Ticket,
};
use crate::options::JournalOptions;
use crate::position::{Durability, Position};
use crate::store::Store;

const DIR: &str = "/store";
const MIRROR: &str = "/mirror";
/// An input that is longer does no more.
const STEPS_MAX: usize = 120;
const STREAMS: u8 = 3;

/// One event as it was submitted, and the place that it must get.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    id: EventId,
    stream: u8,
    revision: Revision,
    payload: Vec<u8>,
}

type Batch = Vec<Known>;

/// Runs the operations that the input tells, and compares every answer with the model's.
pub fn ops_vs_model(input: &[u8]) {
    env::seed(Some(1));
    let Some((&seed, bytes)) = input.split_first() else { return };
    let mut run = Run::new(seed, bytes);
    for _ in 0..STEPS_MAX {
        if run.bytes.is_empty() {
            break;
        }
        run.step();
    }
    run.end_life(Ending::PowerCut);
    run.disk.set_capacity(None);
    run.reopen();
    run.feed_mirror();
    env::seed(None);
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Close,
    Kill,
    PowerCut,
}

struct Run<'a> {
    bytes: &'a [u8],
    disk: SimFs,
    mirror_disk: SimFs,
    store: Option<Store>,
    /// Durable, in order.
    certain: Vec<Batch>,
    /// Accepted behind it, in order, and not known to be durable.
    pending: Vec<Batch>,
    tickets: Vec<(Batch, Ticket)>,
    /// The writer of this life has failed.
    poisoned: bool,
    faults_before: u64,
    limited: bool,
    next_id: u64,
}

fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 4096 + 8192,
        segment_bytes_max: 4096 + 8192,
        batch_bytes_max: 4096,
        group_bytes_max: 8192,
        idempotency_window_events: 10_000,
        background_thread: false,
        buffered_age_ms_max: u64::MAX,
        ..JournalOptions::default()
    }
}

impl<'a> Run<'a> {
    fn new(seed: u8, bytes: &'a [u8]) -> Self {
        let mut run = Self {
            bytes,
            disk: SimFs::new(seed.into()),
            mirror_disk: SimFs::new(seed.into()),
            store: None,
            certain: Vec::new(),
            pending: Vec::new(),
            tickets: Vec::new(),
            poisoned: false,
            faults_before: 0,
            limited: false,
            next_id: 0,
        };
        run.reopen();
        run
    }

    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        byte
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap_or_else(|| panic!("the store is open between the steps"))
    }

    /// Whether something has gone wrong with the disk in this life, so that failures are no surprise.
    fn may_fail(&self) -> bool {
        self.poisoned || self.limited || self.disk.faults_struck() > self.faults_before
    }

    fn step(&mut self) {
        match self.byte() % 20 {
            0..4 => self.append(Durability::Durable),
            4 => self.append(Durability::Buffered),
            5 | 6 => self.submit(),
            7 => self.wait_for_tickets(),
            8 => self.flush(),
            9 => self.conflict(),
            10 => self.repeat(),
            11 => self.repeat_in_part(),
            12 => self.read_all(),
            13 => self.read_stream(),
            14 => self.read_by_cursor(),
            15 => self.plan_fault(),
            16 => self.limit_space(),
            17 => {
                let ending = [Ending::Close, Ending::Kill, Ending::PowerCut];
                let ending = ending[usize::from(self.byte() % 3)];
                self.end_life(ending);
                self.reopen();
            }
            18 => self.die_in_recovery(),
            _ => self.feed_mirror(),
        }
    }

    // ----------------------------------------------------------------------------------------- appending

    /// All events that count when the next batch is judged.
    fn accepted(&self) -> impl Iterator<Item = &Known> {
        self.certain.iter().chain(&self.pending).flatten()
    }

    fn head(&self, stream: u8) -> Option<Revision> {
        self.accepted().filter(|known| known.stream == stream).last().map(|known| known.revision)
    }

    fn new_batch(&mut self) -> (Batch, Append) {
        let what = self.byte();
        let stream = what % STREAMS;
        let count = what / STREAMS % 3 + 1;
        let len = usize::from(self.byte()) * 2;
        let head = self.head(stream);
        let mut revision = head.map_or(Revision::FIRST, Revision::next);
        let mut batch = Batch::new();
        for _ in 0..count {
            self.next_id += 1;
            let id = EventId::from_bytes(u128::from(self.next_id).to_le_bytes());
            let payload = vec![self.next_id as u8 | 1; len];
            batch.push(Known { id, stream, revision, payload });
            revision = revision.next();
        }
        let exactly = head.map_or(ExpectedRevision::NoStream, ExpectedRevision::Exact);
        let expected = if what < 128 { ExpectedRevision::Any } else { exactly };
        let append = append_of(&batch, expected);
        (batch, append)
    }

    /// The places that the next batch must get.
    fn places(&self, batch: &Batch) -> Vec<Placed> {
        let first = self.accepted().count() as u64;
        let place = |(index, known): (usize, &Known)| Placed {
            position: Position::new(first + index as u64),
            revision: known.revision,
        };
        batch.iter().enumerate().map(place).collect()
    }

    fn accept(&mut self, batch: Batch, receipt: &Receipt) {
        assert_eq!(receipt.events, self.places(&batch));
        self.pending.push(batch);
    }

    /// Everything up to here is durable.
    fn settle(&mut self, position: Position) {
        while (self.certain.iter().flatten().count() as u64) < position.get() {
            assert!(!self.pending.is_empty(), "durable up to {position}, and never accepted");
            let batch = self.pending.remove(0);
            self.certain.push(batch);
        }
    }

    fn append(&mut self, durability: Durability) {
        let (batch, append) = self.new_batch();
        match self.store().append(&append.durability(durability)) {
            Ok(Appended::New(receipt)) => {
                self.accept(batch, &receipt);
                if durability == Durability::Durable {
                    self.settle(receipt.token.position);
                }
            }
            Ok(other) => panic!("new ids, and {other:?}"),
            Err(AppendError::Unknown(_)) => {
                self.fail("appending");
                self.pending.push(batch);
            }
            Err(error) => self.refused(&error),
        }
    }

    /// An append of which certainly nothing was written.
    fn refused(&mut self, error: &AppendError) {
        assert!(error.is_certainly_not_written(), "{error}");
        match error {
            AppendError::DiskFull(_) => assert!(self.may_fail(), "{error}"),
            AppendError::Poisoned(_) => self.fail("appending"),
            other => panic!("{other}"),
        }
    }

    fn fail(&mut self, what: &str) {
        assert!(self.may_fail(), "{what} fails without a fault");
        self.poisoned = true;
    }

    fn submit(&mut self) {
        let (batch, append) = self.new_batch();
        match self.store().submit(&append) {
            Ok(ticket) => {
                // Its place is known only when it is answered; meanwhile it is as good as taken.
                self.pending.push(batch.clone());
                self.tickets.push((batch, ticket));
            }
            Err(error) => self.refused(&error),
        }
    }

    fn wait_for_tickets(&mut self) {
        for (batch, ticket) in std::mem::take(&mut self.tickets) {
            match ticket.wait() {
                Ok(appended) => {
                    let receipt = appended.receipt();
                    self.settle(receipt.token.position);
                    let at = receipt.events.first().map_or(0, |event| event.position.get());
                    let events = self.certain.iter().flatten().skip(at as usize);
                    assert!(events.take(batch.len()).eq(&batch), "a ticket for other events");
                }
                Err(AppendError::Unknown(_)) => self.fail("a ticket"),
                Err(AppendError::Poisoned(_)) => {
                    self.fail("a ticket");
                    self.pending.retain(|other| *other != batch); // certainly not written
                }
                Err(error) => panic!("a ticket: {error}"),
            }
        }
    }

    fn flush(&mut self) {
        match self.store().flush() {
            Ok(end) => {
                self.settle(end.position);
                assert!(self.pending.is_empty() || self.poisoned, "flushed, and not durable");
            }
            Err(AppendError::Poisoned(_)) => self.fail("flushing"),
            Err(error) => panic!("flushing: {error}"),
        }
    }

    fn conflict(&mut self) {
        let (batch, _) = self.new_batch();
        let Some(known) = batch.first() else { return };
        let head = self.head(known.stream);
        let wrong = match head {
            Some(_) => ExpectedRevision::NoStream,
            None => ExpectedRevision::StreamExists,
        };
        match self.store().append(&append_of(&batch, wrong)) {
            Err(AppendError::Conflict { actual, .. }) => {
                // It tells what is durable, and rests on that.
                let end = self.store().journal().end().position;
                self.settle(end);
                let is_it =
                    |other: &&Known| other.stream == known.stream && Some(other.revision) == actual;
                let told = self.certain.iter().flatten().find(is_it);
                assert_eq!(told.is_some(), head.is_some(), "a conflict with {actual:?}");
            }
            Err(AppendError::Poisoned(_)) => self.fail("a conflict"),
            other => panic!("expected {wrong:?}, the head is {head:?}: {other:?}"),
        }
    }

    /// One of the batches that were accepted, and the position of its first event.
    fn chosen(&mut self) -> Option<(u64, Batch)> {
        let all = self.certain.len() + self.pending.len();
        let index = usize::from(self.byte()) % all.max(1);
        let batches = || self.certain.iter().chain(&self.pending);
        let first = batches().take(index).map(Vec::len).sum::<usize>() as u64;
        Some((first, batches().nth(index)?.clone()))
    }

    fn repeat(&mut self) {
        let Some((first, batch)) = self.chosen() else { return };
        match self.store().append(&append_of(&batch, ExpectedRevision::Any)) {
            Ok(Appended::Duplicate(receipt)) => {
                self.settle(receipt.token.position);
                let places = batch.iter().enumerate().map(|(index, known)| Placed {
                    position: Position::new(first + index as u64),
                    revision: known.revision,
                });
                assert!(places.eq(receipt.events.iter().copied()), "repeated: {receipt:?}");
            }
            Ok(other) => panic!("known ids, and {other:?}"),
            Err(AppendError::Unknown(_) | AppendError::Poisoned(_)) => self.fail("repeating"),
            Err(error) => panic!("repeating: {error}"),
        }
    }

    fn repeat_in_part(&mut self) {
        let Some((_, batch)) = self.chosen() else { return };
        let (mut more, _) = self.new_batch();
        let total = more.len() + 1;
        more.extend(batch.into_iter().take(1));
        match self.store().append(&append_of(&more, ExpectedRevision::Any)) {
            Err(AppendError::PartialDuplicate { known, total: of }) => {
                assert_eq!((known, of), (1, total));
                let end = self.store().journal().end().position;
                self.settle(end);
            }
            Err(AppendError::Unknown(_) | AppendError::Poisoned(_)) => self.fail("repeating"),
            other => panic!("one known id among new ones: {other:?}"),
        }
    }

    // ------------------------------------------------------------------------------------------- reading

    /// A failing disk fails readers too; that is not what this is about.
    fn disk_failed(&self, error: &crate::error::ReadError) {
        let io = matches!(error, crate::error::ReadError::Io(_));
        assert!(io && self.may_fail(), "reading: {error}");
    }

    /// What is read is what was accepted, in order, and all that is durable is there.
    fn check_events(&mut self, journal: &Journal) -> bool {
        let end = journal.end().position;
        let events = match journal.read_all(Position::START) {
            Ok(events) => events,
            Err(error) => {
                self.disk_failed(&error);
                return false;
            }
        };
        let mut found = Vec::new();
        for event in events {
            match event {
                Ok(event) => found.push(event),
                Err(error) => {
                    self.disk_failed(&error);
                    return false;
                }
            }
        }
        assert!(found.len() as u64 >= end.get(), "events are missing in front of the end");
        self.settle(Position::new(found.len() as u64));
        assert_eq!(
            self.certain.iter().flatten().count(),
            found.len(),
            "durable events are missing"
        );
        for (index, (known, event)) in self.certain.iter().flatten().zip(&found).enumerate() {
            assert_eq!(event.position().get(), index as u64);
            assert_eq!((event.id(), event.revision()), (known.id, known.revision));
            assert_eq!(event.stream(), &stream(known.stream));
            assert_eq!(*event.data(), known.payload);
        }
        true
    }

    fn read_all(&mut self) {
        let journal = self.store().journal().clone();
        self.check_events(&journal);
    }

    fn read_stream(&mut self) {
        let journal = self.store().journal().clone();
        if !self.check_events(&journal) {
            return;
        }
        let (number, from) = (self.byte() % STREAMS, Revision::new(u64::from(self.byte() % 8)));
        let end = Position::new(self.certain.iter().flatten().count() as u64);
        let events = match journal.read_stream(&stream(number), from) {
            Ok(events) => events,
            Err(error) => return self.disk_failed(&error),
        };
        let mut found = Vec::new();
        for event in events {
            match event {
                // Others may have become durable since.
                Ok(event) if event.position() >= end => break,
                Ok(event) => found.push((event.id(), event.revision())),
                Err(error) => return self.disk_failed(&error),
            }
        }
        let known = self.certain.iter().flatten();
        let wanted = known.filter(|known| known.stream == number && known.revision >= from);
        assert!(
            wanted.map(|known| (known.id, known.revision)).eq(found),
            "stream {number} from {from:?}"
        );
    }

    fn read_by_cursor(&mut self) {
        let journal = self.store().journal().clone();
        let from = u64::from(self.byte()) % (journal.end().position.get() + 1);
        let mut cursor = match journal.cursor(Position::new(from)) {
            Ok(cursor) => cursor,
            Err(error) => return self.disk_failed(&error),
        };
        let mut next = cursor.position();
        assert!(next.get() <= from);
        loop {
            let batch = match cursor.next_batch() {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                Err(error) => return self.disk_failed(&error),
            };
            assert_eq!(batch.batch.header.base_position, next);
            next = batch.batch.header.end_position();
        }
        self.settle(next);
        assert!(next.get() >= self.certain.iter().flatten().count() as u64);
    }

    // ------------------------------------------------------------------------------------ faults, crashes

    fn plan_fault(&mut self) {
        let (op, fault) = match self.byte() % 6 {
            0 | 1 => (Op::SyncData, Fault::Eio),
            2 => (Op::Write, Fault::Eio),
            3 => (Op::Write, Fault::Enospc),
            4 => (Op::Write, Fault::ShortWrite),
            _ => (Op::Read, Fault::Eintr),
        };
        self.disk.fail_next(op, fault);
    }

    fn limit_space(&mut self) {
        self.limited = self.byte().is_multiple_of(2);
        self.disk.set_capacity(self.limited.then_some(0));
    }

    fn end_life(&mut self, ending: Ending) {
        match ending {
            Ending::Close => {
                let closed = self.store().close();
                self.wait_for_tickets();
                match closed {
                    Ok(()) => {
                        let end = self.store().journal().end().position;
                        self.settle(end);
                        assert!(self.pending.is_empty(), "closed, and not durable");
                    }
                    Err(CloseError::Poisoned(_)) => self.fail("closing"),
                    Err(error) => assert!(self.may_fail(), "closing: {error}"),
                }
                self.store = None;
                self.disk.clear_faults();
                self.disk.kill();
            }
            Ending::Kill | Ending::PowerCut => {
                self.disk.clear_faults();
                if ending == Ending::Kill {
                    self.disk.kill();
                } else {
                    self.disk.power_cut();
                }
                self.poisoned = true;
                // Those of this life are answered, whatever the answer.
                self.wait_for_tickets();
                self.store = None;
            }
        }
    }

    fn open(&self) -> Result<Store, OpenError> {
        let fs: Arc<dyn Fs> = Arc::new(self.disk.clone());
        Store::builder(DIR).create_if_missing().journal_options(options()).fs(fs).open()
    }

    /// Opens, and learns which of the pending batches are there: the first ones, each whole.
    fn reopen(&mut self) {
        self.disk.clear_faults();
        if self.store.is_none() && self.disk.files().is_empty() {
            self.limited = false;
            self.disk.set_capacity(None);
        }
        let store = match self.open() {
            Ok(store) => store,
            Err(OpenError::Io(error)) if self.limited => {
                // Not everything can be had without space: a torn tail behind a torn tail.
                assert!(error.is_disk_full(), "opening: {error}");
                self.limited = false;
                self.disk.set_capacity(None);
                self.open().unwrap_or_else(|error| panic!("opening with space: {error}"))
            }
            Err(error) => panic!("opening: {error} ({error:?})"),
        };
        self.poisoned = false;
        self.faults_before = self.disk.faults_struck();
        let journal = store.journal().clone();
        self.store = Some(store);
        assert!(self.check_events(&journal), "a healed disk fails");
        self.pending.clear();
    }

    fn die_in_recovery(&mut self) {
        let ending = if self.byte().is_multiple_of(2) { Ending::Kill } else { Ending::PowerCut };
        self.end_life(ending);
        let (at, fault) = (u64::from(self.byte()), [Fault::Kill, Fault::PowerCut, Fault::Eio]);
        let fault = fault[usize::from(self.byte() % 3)];
        self.disk.fail_at(self.disk.ops() + at, fault, Repeat::Once);
        let opened = self.open();
        assert!(
            matches!(opened, Ok(_) | Err(OpenError::Io(_))),
            "a false alarm: {:?}",
            opened.err()
        );
        self.disk.clear_faults();
        match self.disk.down() {
            Some(crate::fs::sim::Down::PowerCut) => self.disk.power_cut(),
            _ => self.disk.kill(),
        }
        drop(opened);
        self.reopen();
    }

    // -------------------------------------------------------------------------------------------- mirror

    /// The mirror takes in everything that is durable, and is the same then.
    fn feed_mirror(&mut self) {
        let origin = self.store().journal().clone();
        let fs: Arc<dyn Fs> = Arc::new(self.mirror_disk.clone());
        let dir = Path::new(MIRROR);
        let opened = Ingest::open(&fs, dir, &options());
        let opened = opened.unwrap_or_else(|error| panic!("mirror: {error}"));
        let mut mirror = opened.unwrap_or_else(|| {
            let created = Ingest::create(&fs, dir, origin.id(), &options());
            created.unwrap_or_else(|error| panic!("mirror: {error}"))
        });
        let end = mirror.end();
        match origin.compare(&end) {
            Ok(comparison) => {
                assert_eq!(comparison, Comparison::Equal, "mirror at {}", end.position);
            }
            Err(error) => return self.disk_failed(&error),
        }
        let mut cursor = match origin.cursor(end.position) {
            Ok(cursor) => cursor,
            Err(error) => return self.disk_failed(&error),
        };
        loop {
            let batch = match cursor.next_batch() {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                Err(error) => {
                    self.disk_failed(&error);
                    break;
                }
            };
            let page = batch.page.map_or(Ok(()), |page| mirror.segment(&page.bytes()));
            let taken = page.and_then(|()| mirror.batch(batch.batch.bytes()));
            taken.unwrap_or_else(|error| panic!("mirror: {error}"));
        }
        mirror.sync().unwrap_or_else(|error| panic!("mirror: {error}"));
        let copy = mirror.journal().clone();
        self.settle(copy.end().position);
        let mut model = BTreeMap::new();
        for (index, known) in self.certain.iter().flatten().enumerate() {
            model.insert(index as u64, known.id);
        }
        let events = copy.read_all(Position::START).unwrap_or_else(|error| panic!("{error}"));
        for event in events {
            let event = event.unwrap_or_else(|error| panic!("mirror: {error}"));
            assert_eq!(model.get(&event.position().get()), Some(&event.id()));
        }
        mirror.close().unwrap_or_else(|error| panic!("mirror: {error}"));
    }
}

fn stream(number: u8) -> StreamId {
    StreamId::new(format!("s-{number}")).unwrap_or_else(|error| panic!("{error}"))
}

fn append_of(batch: &Batch, expected: ExpectedRevision) -> Append {
    let events = batch.iter().map(|known| {
        let event = NewEvent::raw("fuzz.happened", known.payload.clone());
        event.unwrap_or_else(|error| panic!("{error}")).id(known.id)
    });
    let number = batch.first().map_or(0, |known| known.stream);
    Append::to(&stream(number), expected, events)
}
