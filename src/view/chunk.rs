//! A chunk: some batches of the journal, decoded, routed and folded in memory, then written at once.
//!
//! ```text
//! batches ──decode──▶ events ──route──▶ routes: (event, slot) …    a slot: a row that some event concerns
//!                                          │
//!              rows ◀── one multi_get of all slots
//!               │
//!               └── fold along the routes, in order ──▶ one put or delete per changed slot
//!                       └ fails, twice ─▶ the slot's events from there on are parked
//! ```
//!
//! Invariants:
//! - A chunk consists of whole batches: it is applied at batch ends only.
//! - No event of a slot is folded behind one that is parked.
//! - If the view stops at an event that fails, what lies in front of that event's batch is applied; that batch
//!   and what lies behind it is not.

use std::any::Any;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::audit::{Folds, Tallies, Tally};
use super::db::{
    Db, Progress, StorageError, Writes, parked_key, parked_row_key, push_row_key, unrouted_key,
};
use super::deadly::{At, Care, Stage};
use super::error::{EventFailure, StopError, ViewError};
use super::key::ViewKey;
use super::poison::{Head, OnPoison, ParkedCounts, ParkedRecord, Rules, reason_of};
use super::row_cache::Bytes;
use super::{Fold, Indexes, Keys, View};
use crate::codec::{Bincode, Codec};
use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::event::{Event, EventId, EventKindRef, Names, Payload, Recorded};
use crate::format::FormatError;
use crate::format::record::RecordRef;
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::journal::{CursorBatch, Journal};
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, JournalId, Locator, Position};
use crate::upcast::Decoded;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use serde::Serialize;
use serde::de::DeserializeOwned;
use smallvec::SmallVec;

/// Batches on their way into the view.
pub(super) struct Chunk<V: View> {
    start: Progress,
    journal: Journal,
    rules: Rules,
    batches: Vec<Batch>,
    events: Vec<Recorded<V::Event>>,
    routes: Vec<Route>,
    unrouted: Vec<Unrouted>,
    slots: Vec<Slot<V::Key>>,
    /// Their places, by row key.
    slot_of_key: HashTable<usize>,
    hasher: RandomState,
    /// Of the stored event that is added.
    row_keys: RowKeys,
    bytes: u64,
    names: Names,
}

/// The end of a batch: in the journal, and in what the chunk has.
pub(super) struct Batch {
    pub(super) end: Checkpoint,
    /// Of all events in front of its end.
    pub(super) skipped_events: u64,
    pub(super) routes: usize,
    pub(super) unrouted: usize,
    /// The segment that it is in, and what of it needs no folding.
    pub(super) segment: u64,
    pub(super) tally: Tally,
}

/// An event concerns a row.
#[derive(Clone, Copy)]
struct Route {
    event: usize,
    slot: usize,
}

/// An event of which nobody knows which rows it concerns.
#[derive(Clone)]
pub(super) struct Unrouted {
    pub(super) position: Position,
    pub(super) recorded_at_us: i64,
    pub(super) reason: String,
}

/// A row that events of the chunk concern.
struct Slot<K> {
    key: K,
    row_key: Bytes,
    last_event: usize,
}

/// Row keys one behind the other, in memory that is there.
#[derive(Default)]
struct RowKeys {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl RowKeys {
    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn push<K: ViewKey>(&mut self, key: &K) {
        push_row_key(&mut self.bytes, |out| key.encode_key(out));
        self.ends.push(self.bytes.len());
    }

    fn get(&self, nth: usize) -> &[u8] {
        let end_of = |nth: usize| self.ends.get(nth).copied().unwrap_or(0);
        let from = nth.checked_sub(1).map_or(0, end_of);
        self.bytes.get(from..end_of(nth)).unwrap_or_default()
    }
}

/// What has become of a slot's row.
#[derive(Clone)]
struct RowState<R> {
    stored: Option<Bytes>,
    is_decoded: bool,
    row: Option<R>,
    changed_by: Option<usize>,
}

/// What is parked of a slot.
struct Queue {
    head: Head,
    is_new: bool,
    /// Those of the chunk.
    events: Vec<usize>,
}

/// A slot's row, and what is parked of it.
struct Folding<R> {
    row: RowState<R>,
    queue: Option<Queue>,
    /// The route at which an event failed, and why; without a reason, the first one: each is to be looked at.
    failed: Option<(usize, Option<EventFailure>)>,
}

/// Why folding ended early.
enum FoldFailure {
    /// At this route.
    Event(usize, EventFailure),
    Stop(StopError),
}

impl From<StopError> for FoldFailure {
    fn from(error: StopError) -> Self {
        Self::Stop(error)
    }
}

/// What a chunk comes to.
pub(super) struct Folded {
    pub(super) writes: Writes,
    pub(super) end: Progress,
    /// Database keys of the rows that change, in their order, if somebody watches.
    pub(super) changed: Vec<Vec<u8>>,
    /// What its events count as.
    pub(super) tallies: Tallies,
    /// Why only the batches in front of `end` could be folded.
    pub(super) stop: Option<StopError>,
}

impl<V: View> Chunk<V> {
    /// An empty chunk that begins at `start`.
    pub(super) fn new(start: Progress, journal: Journal, rules: Rules) -> Self {
        Self {
            start,
            journal,
            rules,
            batches: Vec::new(),
            events: Vec::new(),
            routes: Vec::new(),
            unrouted: Vec::new(),
            slots: Vec::new(),
            slot_of_key: HashTable::new(),
            hasher: RandomState::default(),
            row_keys: RowKeys::default(),
            bytes: 0,
            names: Names::default(),
        }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Bytes of the chunk's batches, as they lie in the journal.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    fn skipped_events(&self) -> u64 {
        self.batches.last().map_or(self.start.skipped_events, |batch| batch.skipped_events)
    }

    /// Adds a batch. After an error the batches added before it can still be folded; no further ones may be
    /// added.
    pub(super) fn add(&mut self, view: &V, batch: &CursorBatch<'_>) -> Result<(), StopError> {
        let header = &batch.batch.header;
        let mut tally = Tally::default();
        let mut position = header.base_position;
        for record in batch.batch.records() {
            let record = record.map_err(|error| StopError::Journal {
                view: V::NAME,
                source: invalid_record(&self.journal, batch, position, error),
            })?;
            let journal = self.journal.id();
            let at = Place { journal, position, recorded_at_us: header.time_us };
            tally.add(self.add_record(view, &record, at)?);
            position = position.advance(1);
        }
        let skipped_events = self.skipped_events() + tally.skipped;
        let (end, routes, unrouted) = (batch.end(), self.routes.len(), self.unrouted.len());
        let segment = batch.segment;
        self.batches.push(Batch { end, skipped_events, routes, unrouted, segment, tally });
        self.bytes += batch.batch.bytes().len() as u64;
        Ok(())
    }

    /// Decodes and routes an event: what it counts as if there is nothing to be folded.
    fn add_record(
        &mut self,
        view: &V,
        record: &RecordRef<'_>,
        at: Place,
    ) -> Result<Tally, StopError> {
        let tally = Tally::default();
        if self.rules.discarded.has_all_of(at.locator(), record.id) {
            return Ok(Tally { discarded: 1, ..tally });
        }
        match self.routed(view, record, at) {
            Ok(None) => Ok(Tally { skipped: 1, ..tally }),
            Ok(Some(all)) => {
                let routes = self.routes.len();
                let mut nth = 0..;
                for (event, keys) in all {
                    for (key, nth) in keys.0.into_iter().zip(&mut nth) {
                        self.add_route(key, nth, at, record.id);
                    }
                    self.events.push(event);
                }
                let concerns_none = self.routes.len() == routes;
                Ok(Tally { applied: u64::from(concerns_none), ..tally })
            }
            Err(cause) if self.rules.on_undecodable == OnPoison::Park => {
                let Place { position, recorded_at_us, .. } = at;
                let reason = reason_of(&cause);
                self.unrouted.push(Unrouted { position, recorded_at_us, reason });
                Ok(Tally { unrouted: 1, ..tally })
            }
            Err(cause) => {
                Err(stop_at(V::NAME, &at.recorded(record, &mut Names::default(), ()), cause))
            }
        }
    }

    /// The events that a stored one stands for, if the view knows its type, each with the rows that it concerns, whose keys
    /// are encoded: that is the author's code, too.
    #[allow(clippy::type_complexity, reason = "it is said in one place only")]
    fn routed(
        &mut self,
        view: &V,
        record: &RecordRef<'_>,
        at: Place,
    ) -> Result<Option<SmallVec<[(Recorded<V::Event>, Keys<V::Key>); 1]>>, EventFailure> {
        if is_known::<V::Event>(record) {
            self.rules.care.enter(|| at.of(record, Stage::Route))?;
        }
        let decoded = decode::<V::Event>(record)?;
        if decoded.is_foreign() {
            return Ok(None);
        }
        let mut all = SmallVec::new();
        self.row_keys.clear();
        for data in decoded {
            let event = at.recorded(record, &mut self.names, data);
            let mut keys = Keys::none();
            guard(|| {
                view.route(&event, &mut keys);
                keys.0.iter().for_each(|key| self.row_keys.push(key));
            })?;
            all.push((event, keys));
        }
        Ok(Some(all))
    }

    /// The next event concerns the row under `key`, the `nth` one of the stored event. A key named twice by one event is
    /// folded once.
    fn add_route(&mut self, key: V::Key, nth: usize, at: Place, id: EventId) {
        let event = self.events.len();
        let Self { slots, slot_of_key, hasher, row_keys, .. } = self;
        let row_key = row_keys.get(nth);
        if self.rules.discarded.has(at.locator(), id, row_key) {
            return;
        }
        let hash_of = |row_key: &[u8]| hasher.hash_one(row_key);
        let hash = |slot: &usize| slots.get(*slot).map_or(0, |it| hash_of(&it.row_key));
        let is_it = |slot: &usize| slots.get(*slot).is_some_and(|it| *it.row_key == *row_key);
        let slot = match slot_of_key.entry(hash_of(row_key), is_it, hash) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => {
                let slot = *unknown.insert(slots.len()).get();
                let row_key = Bytes::from_slice(row_key);
                slots.push(Slot { key, row_key, last_event: usize::MAX });
                slot
            }
        };
        if let Some(it) = self.slots.get_mut(slot).filter(|it| it.last_event != event) {
            it.last_event = event;
            self.routes.push(Route { event, slot });
        }
    }

    /// Folds all batches, or those in front of the one with the first event that fails.
    pub(super) fn fold(mut self, view: &V, db: &Db) -> Result<Folded, StopError> {
        let mut stop = None;
        self.cut();
        loop {
            match self.fold_routes(view, db) {
                Ok(folded) => return Ok(Folded { stop, ..folded }),
                Err(FoldFailure::Stop(error)) => return Err(error),
                Err(FoldFailure::Event(route, cause)) => {
                    stop = self.stop_at_route(route, cause);
                    self.drop_batches_from(route);
                }
            }
        }
    }

    fn stop_at_route(&self, route: usize, cause: EventFailure) -> Option<StopError> {
        let event = self.events.get(self.routes.get(route)?.event)?;
        Some(stop_at(V::NAME, event, cause))
    }

    /// Folds are pure: folding the batches in front again gives what it gave before.
    fn drop_batches_from(&mut self, route: usize) {
        self.batches.truncate(self.batches.partition_point(|batch| batch.routes <= route));
        self.cut();
    }

    /// Forgets what was routed of a batch that isn't a part of the chunk.
    fn cut(&mut self) {
        let (routes, unrouted) =
            self.batches.last().map_or((0, 0), |batch| (batch.routes, batch.unrouted));
        self.routes.truncate(routes);
        self.unrouted.truncate(unrouted);
    }

    fn fold_routes(&self, view: &V, db: &Db) -> Result<Folded, FoldFailure> {
        let indexes = Indexes::of(view);
        let mut rows = self.read_rows(db).map_err(|source| storage_failed::<V>(source))?;
        let mut folds = Folds::of(self.journal.id(), &self.batches);
        for (index, route) in self.routes.iter().enumerate() {
            let (slot, event) = (self.slots.get(route.slot), self.events.get(route.event));
            let (Some(it), Some(slot), Some(event)) = (rows.get_mut(route.slot), slot, event)
            else {
                continue;
            };
            if planted::is(Bug::SkipEvent) && event.position().get() % 16 == 7 {
                continue;
            }
            folds.saw(index, event.position(), |tally| tally.applied += 1);
            if let Some(queue) = &mut it.queue {
                self.push(queue, route.event);
            } else if self.rules.care.is_careful() {
                it.failed.get_or_insert((index, None));
            } else if it.failed.is_none() {
                let care = &self.rules.care;
                let folded = enter(care, event)
                    .and_then(|()| fold_twice(view, &slot.key, &mut it.row, event, index));
                if let Err(cause) = folded {
                    if self.stops_at(&cause) {
                        return Err(FoldFailure::Event(index, cause)); // the first one in the journal
                    }
                    it.failed = Some((index, Some(cause)));
                }
            }
        }
        let folded = self.settle(view, &indexes, db, rows)?;
        Ok(Folded { tallies: folds.end(self.batches.len()), ..folded })
    }

    fn stops_at(&self, cause: &EventFailure) -> bool {
        cause.is_of_the_rows() || self.rules.on_poison == OnPoison::Stop
    }

    /// Parks an event that failed at a route, if that is what is to be done.
    fn park(
        &self,
        route: usize,
        event: &Recorded<V::Event>,
        index: usize,
        cause: EventFailure,
    ) -> Result<Queue, FoldFailure> {
        if self.stops_at(&cause) {
            return Err(FoldFailure::Event(route, cause));
        }
        let head = Head {
            events: 0,
            journal: self.journal.id(),
            first: event.position(),
            recorded_at_us: event.recorded_at_us(),
            reason: reason_of(&cause),
        };
        let mut queue = Queue { head, is_new: true, events: Vec::new() };
        self.push(&mut queue, index);
        Ok(queue)
    }

    /// Parks an event behind others; those that one stored event stands for are parked as that one.
    fn push(&self, queue: &mut Queue, index: usize) {
        let position = |index: usize| self.events.get(index).map(Recorded::position);
        if queue.events.last().is_none_or(|last| position(*last) != position(index)) {
            queue.head.events += 1;
            queue.events.push(index);
        }
    }

    fn read_rows(&self, db: &Db) -> Result<Vec<Folding<V::Row>>, StorageError> {
        let stored = db.rows(self.slots.iter().map(|slot| slot.row_key.as_slice()))?.into_iter();
        let row = |stored| Folding { row: RowState::stored(stored), queue: None, failed: None };
        let mut rows: Vec<_> = stored.map(row).collect();
        if self.start.parked.keys > 0 {
            let heads: Vec<Vec<u8>> =
                self.slots.iter().map(|slot| parked_row_key(&slot.row_key)).collect();
            let heads = db.rows(heads.iter().map(Vec::as_slice))?;
            for (row, head) in rows.iter_mut().zip(heads) {
                let head = head.map(|bytes| db.parked_head_from(&bytes)).transpose()?;
                row.queue = head.map(|head| Queue { head, is_new: false, events: Vec::new() });
            }
        }
        Ok(rows)
    }

    /// What is to be written, in the order of the keys: the memtable takes that fastest.
    fn settle(
        &self,
        view: &V,
        indexes: &Indexes<V>,
        db: &Db,
        mut rows: Vec<Folding<V::Row>>,
    ) -> Result<Folded, FoldFailure> {
        let mut order: Vec<_> = self.slots.iter().enumerate().collect();
        order.sort_unstable_by(|(_, a), (_, b)| a.row_key.cmp(&b.row_key));
        let is_watched = self.rules.watchers.as_ref().is_some_and(|watchers| watchers.are_any());
        let (mut writes, mut changed, mut parked) = (db.writes(), Vec::new(), Vec::new());
        for (index, slot) in order {
            let Some(folding) = rows.get_mut(index) else { continue };
            let Folding { row, queue, failed } = folding;
            let (mut queue, failed) = (queue.take(), failed.take());
            if let Some(route) = failed.as_ref().map(|(route, _)| *route).or(row.changed_by) {
                let change = match failed {
                    Some((_, cause)) => Err(cause),
                    None => change_of(indexes, &slot.key, &slot.row_key, row).map_err(Some),
                };
                let change = match change {
                    Ok(change) => change,
                    Err(cause) => {
                        let stored = row.stored.take();
                        let (change, parked) = self.fold_slot_again(
                            view,
                            indexes,
                            (index, slot),
                            stored,
                            route,
                            cause,
                        )?;
                        queue = parked.or(queue);
                        change
                    }
                };
                change.write(&slot.row_key, &mut writes);
                changed.extend(is_watched.then(|| slot.row_key.to_vec()));
            }
            parked.extend(queue.filter(|it| !it.events.is_empty()).map(|queue| (slot, queue)));
        }
        self.rules.care.pause();
        let counts = self.write_parked(&parked, &mut writes)?;
        let end = end_of(&self.start, &self.batches, counts);
        Ok(Folded { writes, end, changed, tallies: Tallies::new(), stop: None })
    }

    /// An event failed, or what the row came to can't be written: folds the row's events again, one after the other,
    /// and parks from the first on with which it couldn't be written.
    fn fold_slot_again(
        &self,
        view: &V,
        indexes: &Indexes<V>,
        (index, slot): (usize, &Slot<V::Key>),
        stored: Option<Bytes>,
        route: usize,
        cause: Option<EventFailure>,
    ) -> Result<(Change, Option<Queue>), FoldFailure> {
        let routes: Vec<(usize, &Route)> =
            self.routes.iter().enumerate().filter(|(_, route)| route.slot == index).collect();
        let events = routes.iter().filter_map(|(_, route)| self.events.get(route.event));
        let Careful { change, folded, failure } = fold_carefully(
            view,
            indexes,
            &slot.key,
            &slot.row_key,
            stored,
            events,
            &self.rules.care,
        );
        let failed = routes.get(folded).and_then(|(n, it)| Some((*n, self.events.get(it.event)?)));
        let (failure, failed_route, event) = match (failure, failed) {
            (Some(failure), Some((route, event))) => (failure, route, event),
            (None, _) => return Ok((change, None)), // it was of the moment
            (Some(failure), None) => {
                return Err(FoldFailure::Event(route, cause.unwrap_or(failure)));
            }
        };
        let (_, first) = routes.get(folded).copied().unwrap_or((0, &Route { event: 0, slot: 0 }));
        let mut queue = self.park(failed_route, event, first.event, failure)?;
        routes.iter().skip(folded + 1).for_each(|(_, route)| self.push(&mut queue, route.event));
        Ok((change, Some(queue)))
    }

    /// Writes what is parked; how much it is in all.
    fn write_parked(
        &self,
        parked: &[(&Slot<V::Key>, Queue)],
        writes: &mut Writes,
    ) -> Result<ParkedCounts, FoldFailure> {
        let mut counts = self.start.parked;
        let event = |index: &usize| self.events.get(*index);
        let queued = parked.iter().flat_map(|(_, queue)| queue.events.iter().filter_map(event));
        let positions = queued.map(Recorded::position).collect();
        let records = records_at(V::NAME, &self.journal, &positions)?;
        let record = |position| records.get(&position).map(Vec::as_slice).unwrap_or_default();
        let (journal, base) = (self.journal.id(), order_base(&self.start, self.journal.id()));
        for (slot, queue) in parked {
            for event in queue.events.iter().filter_map(event) {
                let (position, recorded_at_us) = (event.position(), event.recorded_at_us());
                let (reason, record) = ("", record(position));
                let it = ParkedRecord { journal, position, recorded_at_us, reason, record };
                writes.put(&parked_key(&slot.row_key, base + position.get()), &it.to_bytes());
            }
            writes.put(&parked_row_key(&slot.row_key), &queue.head.to_bytes());
            counts.keys += u64::from(queue.is_new);
            counts.events += queue.events.len() as u64;
        }
        park_unrouted(V::NAME, &self.journal, &self.start, &self.unrouted, writes)?;
        counts.unrouted += self.unrouted.len() as u64;
        Ok(counts)
    }
}

/// Writes events of which nobody knows which rows they concern.
pub(super) fn park_unrouted(
    view: &'static str,
    journal: &Journal,
    start: &Progress,
    unrouted: &[Unrouted],
    writes: &mut Writes,
) -> Result<(), StopError> {
    let base = order_base(start, journal.id());
    let records = records_at(view, journal, &unrouted.iter().map(|it| it.position).collect())?;
    for Unrouted { position, recorded_at_us, reason } in unrouted {
        let record = records.get(position).map(Vec::as_slice).unwrap_or_default();
        let (journal, position, recorded_at_us) = (journal.id(), *position, *recorded_at_us);
        let it = ParkedRecord { journal, position, recorded_at_us, reason, record };
        writes.put(&unrouted_key(base + position.get()), &it.to_bytes());
    }
    Ok(())
}

/// The records at these positions, as they lie in the journal.
fn records_at(
    view: &'static str,
    journal: &Journal,
    positions: &BTreeSet<Position>,
) -> Result<BTreeMap<Position, Vec<u8>>, StopError> {
    let failed = |source| StopError::Journal { view, source };
    let mut records = BTreeMap::new();
    let (Some(first), Some(last)) = (positions.first(), positions.last()) else {
        return Ok(records);
    };
    let mut cursor = journal.cursor(*first).map_err(failed)?;
    while cursor.position() <= *last {
        let Some(batch) = cursor.next_batch().map_err(failed)? else { break };
        let mut position = batch.batch.header.base_position;
        let mut rest = batch.batch.body();
        for _ in 0..batch.batch.header.count {
            let wrong = |e| failed(invalid_record(journal, &batch, position, e));
            let (_, behind) = RecordRef::decode(rest).map_err(wrong)?;
            if positions.contains(&position) {
                let len = rest.len() - behind.len();
                records.insert(position, rest.get(..len).unwrap_or_default().to_vec());
            }
            (rest, position) = (behind, position.advance(1));
        }
    }
    Ok(records)
}

/// How far it is behind these batches.
pub(super) fn end_of(start: &Progress, batches: &[Batch], parked: ParkedCounts) -> Progress {
    batches.last().map_or_else(
        || Progress { parked, ..start.clone() },
        |batch| {
            let checkpoints = start.checkpoints.moved(batch.end);
            Progress { checkpoints, skipped_events: batch.skipped_events, parked }
        },
    )
}

/// How many events of other journals were in front of the events of this one, when they were taken in: added to a
/// position, it gives the order.
pub(super) fn order_base(start: &Progress, journal: JournalId) -> u64 {
    start.checkpoints.events() - start.checkpoints.position(journal).get()
}

fn storage_failed<V: View>(source: StorageError) -> StopError {
    StopError::Storage { view: V::NAME, source }
}

impl<R> RowState<R> {
    const fn stored(stored: Option<Bytes>) -> Self {
        Self { stored, is_decoded: false, row: None, changed_by: None }
    }
}

/// What becomes of a row in the database.
#[derive(Default)]
pub(super) struct Change {
    row: RowChange,
    put_entries: Vec<Vec<u8>>,
    delete_entries: Vec<Vec<u8>>,
}

#[derive(Default)]
enum RowChange {
    #[default]
    None,
    Put(Bytes),
    Delete,
}

impl Change {
    /// Makes it to a row and to entries in memory.
    #[cfg(feature = "testing")]
    pub(super) fn make(self, stored: &mut Option<Vec<u8>>, entries: &mut BTreeSet<Vec<u8>>) {
        match self.row {
            RowChange::None => {}
            RowChange::Put(row) => *stored = Some(row.into_vec()),
            RowChange::Delete => *stored = None,
        }
        entries.retain(|entry| !self.delete_entries.contains(entry));
        entries.extend(self.put_entries);
    }

    pub(super) fn write(&self, row_key: &[u8], writes: &mut Writes) {
        match &self.row {
            RowChange::None => {}
            RowChange::Put(row) => writes.put(row_key, row),
            RowChange::Delete => writes.delete(row_key),
        }
        self.delete_entries.iter().for_each(|entry| writes.delete(entry));
        self.put_entries.iter().for_each(|entry| writes.put(entry, &[]));
    }
}

/// What a changed row comes to: the row, and the index entries in which it differs from the stored one.
fn change_of<V: View>(
    indexes: &Indexes<V>,
    key: &V::Key,
    row_key: &[u8],
    state: &RowState<V::Row>,
) -> Result<Change, EventFailure> {
    let RowState { stored, row, changed_by, .. } = state;
    let mut change = Change::default();
    if changed_by.is_none() {
        return Ok(change);
    }
    change.row = match row {
        Some(row) => RowChange::Put(encode_row(row)?),
        None if stored.is_some() => RowChange::Delete,
        None => RowChange::None,
    };
    if !indexes.is_empty() {
        let entries = |row: Option<&V::Row>| {
            guard(|| row.map(|row| indexes.entries(key, row_key, row)).unwrap_or_default())
        };
        let before = stored.as_deref().map(decode_row::<V>).transpose()?;
        let (before, now) = (entries(before.as_ref())?, entries(row.as_ref())?);
        change.delete_entries = before.difference(&now).cloned().collect();
        change.put_entries = now.difference(&before).cloned().collect();
    }
    Ok(change)
}

/// As it will be stored; not if it couldn't be read back.
pub(super) fn encode_row<R: Serialize + DeserializeOwned>(row: &R) -> Result<Bytes, EventFailure> {
    let encoded = guard(|| {
        let mut bytes = Bytes::new();
        Bincode::encode_with(row, |more| bytes.extend_from_slice(more))?;
        Bincode::check_size::<R>(&bytes).map(|()| bytes)
    });
    encoded?.map_err(EventFailure::NewRow)
}

fn decode_row<V: View>(stored: &[u8]) -> Result<V::Row, EventFailure> {
    guard(|| Bincode::decode(stored))?.map_err(EventFailure::StoredRow)
}

/// What [`fold_carefully`] has done.
#[derive(Default)]
pub(super) struct Careful {
    /// What the row comes to with the events that could be folded.
    pub(super) change: Change,
    /// How many these are.
    pub(super) folded: usize,
    /// Why the next one couldn't be.
    pub(super) failure: Option<EventFailure>,
}

/// Folds events of one row, each up to what would be written, until one fails.
pub(super) fn fold_carefully<'e, V: View>(
    view: &V,
    indexes: &Indexes<V>,
    key: &V::Key,
    row_key: &[u8],
    stored: Option<Bytes>,
    events: impl Iterator<Item = &'e Recorded<V::Event>>,
    care: &Care,
) -> Careful
where
    V::Event: 'e,
{
    let mut state = RowState::stored(stored);
    let mut careful = Careful { change: Change::default(), folded: 0, failure: None };
    let mut events = events.peekable();
    while let Some(first) = events.next() {
        // Those that one stored event stands for are folded all or not at all.
        let (mut next, mut count) = (state.clone(), 1);
        let mut folded = enter(care, first)
            .and_then(|()| fold_twice(view, key, &mut next, first, careful.folded));
        while let Some(event) = events.next_if(|it| it.locator() == first.locator()) {
            folded = folded.and_then(|()| fold_twice(view, key, &mut next, event, careful.folded));
            count += 1;
        }
        match folded.and_then(|()| change_of(indexes, key, row_key, &next)) {
            Ok(change) => {
                state = next;
                careful.change = change;
                careful.folded += count;
            }
            Err(cause) => {
                careful.failure = Some(cause);
                break;
            }
        }
    }
    careful
}

/// An event is about to be folded into a row.
fn enter<E>(care: &Care, event: &Recorded<E>) -> Result<(), EventFailure> {
    care.enter(|| At::of(event, Stage::Fold))
}

/// Folds an event, once more if it fails: a panic may have been of the moment. A failure changes nothing.
fn fold_twice<V: View>(
    view: &V,
    key: &V::Key,
    state: &mut RowState<V::Row>,
    event: &Recorded<V::Event>,
    route: usize,
) -> Result<(), EventFailure> {
    fold_one(view, key, state, event, route).or_else(|_| fold_one(view, key, state, event, route))
}

fn fold_one<V: View>(
    view: &V,
    key: &V::Key,
    state: &mut RowState<V::Row>,
    event: &Recorded<V::Event>,
    route: usize,
) -> Result<(), EventFailure> {
    if !state.is_decoded {
        state.row = state.stored.as_deref().map(decode_row::<V>).transpose()?;
        state.is_decoded = true;
    }
    let folded = guard(|| view.fold(key, state.row.clone(), event))?;
    let row = match folded.map_err(|error| EventFailure::Fold(error.0))? {
        Fold::Put(row) => Some(row),
        Fold::Delete => None,
        Fold::Keep => return Ok(()),
    };
    state.row = row;
    state.changed_by = Some(route);
    Ok(())
}

/// Whether code of the view's may be called for it: what it doesn't know can't kill it.
pub(super) fn is_known<E: Event>(record: &RecordRef<'_>) -> bool {
    let kinds = E::KINDS;
    kinds.is_empty() || kinds.iter().any(|it| it.kind.name == record.event_type)
}

pub(super) fn decode<E: Event>(record: &RecordRef<'_>) -> Result<Decoded<E>, EventFailure> {
    let kind = EventKindRef { name: record.event_type, schema_version: record.schema_version };
    let payload = Payload { codec: record.codec, bytes: record.payload };
    guard(|| E::decode(kind, payload))?.map_err(EventFailure::Payload)
}

/// Where a record stands, apart from what it says itself.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) journal: JournalId,
    pub(super) position: Position,
    pub(super) recorded_at_us: i64,
}

impl Place {
    pub(super) const fn locator(self) -> Locator {
        Locator { journal: self.journal, position: self.position }
    }

    pub(super) const fn of(self, record: &RecordRef<'_>, stage: Stage) -> At {
        let Self { journal, position, .. } = self;
        At { journal, position, id: record.id, stage }
    }

    pub(super) fn recorded<E>(
        self,
        record: &RecordRef<'_>,
        names: &mut Names,
        data: E,
    ) -> Recorded<E> {
        let Self { journal, position, recorded_at_us } = self;
        Recorded::from_record_with(record, journal, position, recorded_at_us, names, data)
    }
}

pub(super) fn invalid_record(
    journal: &Journal,
    batch: &CursorBatch<'_>,
    position: Position,
    error: FormatError,
) -> ReadError {
    let segment = journal.segments().into_iter().find(|it| it.number == batch.segment);
    let (path, base_offset) = segment.map_or_else(
        || (journal.dir().to_owned(), 0),
        |segment| (segment.path, segment.base_offset),
    );
    let file_offset = HEADER_PAGE_BYTES as u64 + (batch.batch.header.offset - base_offset);
    Corruption { path, file_offset, position, kind: CorruptionKind::Record(error) }.into()
}

pub(super) fn stop_at<E>(
    view: &'static str,
    event: &Recorded<E>,
    cause: EventFailure,
) -> StopError {
    let Locator { journal, position } = event.locator();
    StopError::Event {
        view,
        journal,
        position,
        stream: event.stream().clone(),
        event_type: event.event_type().clone(),
        cause,
    }
}

/// Runs code of the view's author, whose panics stop the view and nothing else.
pub(super) fn guard<T>(code: impl FnOnce() -> T) -> Result<T, EventFailure> {
    let _within = Within::begin();
    catch_unwind(AssertUnwindSafe(code))
        .map_err(|panic| EventFailure::Panic { message: panic_message(&*panic) })
}

thread_local! {
    static IS_WITHIN: Cell<bool> = const { Cell::new(false) };
}

/// While this thread runs the code of some view: others may be waiting for that, so it may not wait for others.
struct Within(bool);

impl Within {
    fn begin() -> Self {
        Self(IS_WITHIN.replace(true))
    }
}

impl Drop for Within {
    fn drop(&mut self) {
        IS_WITHIN.set(self.0);
    }
}

/// Whether this thread is running the code of some view.
pub(super) fn is_within_fold() -> bool {
    IS_WITHIN.get()
}

/// What waits for a view can't be asked for by its code, nor by that of another one which it may wait for.
pub(super) fn refuse_within_fold(view: &'static str) -> Result<(), ViewError> {
    if is_within_fold() { Err(ViewError::WithinFold { view }) } else { Ok(()) }
}

pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
