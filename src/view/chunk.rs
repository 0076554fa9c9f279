//! A chunk: some batches of the journal, decoded, routed and folded in memory, then written at once.
//!
//! ```text
//! batches ──decode──▶ events ──route──▶ routes: (event, slot) …    a slot: a row that some event concerns
//!                                          │
//!              rows ◀── one multi_get of all slots
//!               │
//!               └── fold along the routes, in order ──▶ one put or delete per changed slot
//! ```
//!
//! Invariants:
//! - A chunk consists of whole batches: it is applied at batch ends only.
//! - What lies in front of the batch with a failing event is applied; that batch and what lies behind it
//!   is not.

use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::db::{Db, Progress, StorageError, Writes, row_key};
use super::error::{EventFailure, StopError};
use super::key::ViewKey;
use super::{Fold, Keys, View};
use crate::codec::{Bincode, Codec};
use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::event::{Event, EventKindRef, Names, Payload, Recorded};
use crate::format::FormatError;
use crate::format::record::RecordRef;
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::journal::{CursorBatch, Journal};
use crate::position::{JournalId, Position};
use crate::upcast::Decoded;

/// Batches on their way into the view.
pub(super) struct Chunk<V: View> {
    start: Progress,
    batches: Vec<Batch>,
    events: Vec<Recorded<V::Event>>,
    routes: Vec<Route>,
    slots: Vec<Slot<V::Key>>,
    slot_of_key: HashMap<Vec<u8>, usize>,
    bytes: u64,
    names: Names,
}

/// The end of a batch: in the journal, and in the chunk's routes.
struct Batch {
    end: Progress,
    routes: usize,
}

/// An event concerns a row.
#[derive(Clone, Copy)]
struct Route {
    event: usize,
    slot: usize,
}

/// A row that events of the chunk concern.
struct Slot<K> {
    key: K,
    row_key: Vec<u8>,
    last_event: usize,
}

/// What has become of a slot's row.
struct RowState<R> {
    was_stored: bool,
    undecoded: Option<Vec<u8>>,
    row: Option<R>,
    changed_by: Option<usize>,
}

/// Why folding ended early.
enum FoldFailure {
    /// At this route.
    Event(usize, EventFailure),
    Storage(StorageError),
}

/// What a chunk comes to.
pub(super) struct Folded {
    pub(super) writes: Writes,
    pub(super) end: Progress,
    /// Why only the batches in front of `end` could be folded.
    pub(super) stop: Option<StopError>,
}

impl<V: View> Chunk<V> {
    /// An empty chunk that begins at `start`.
    pub(super) fn new(start: Progress) -> Self {
        Self {
            start,
            batches: Vec::new(),
            events: Vec::new(),
            routes: Vec::new(),
            slots: Vec::new(),
            slot_of_key: HashMap::new(),
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

    fn end(&self) -> Progress {
        self.batches.last().map_or(self.start, |batch| batch.end)
    }

    /// Adds a batch. After an error the batches added before it can still be folded; no further ones may be
    /// added.
    pub(super) fn add(
        &mut self,
        view: &V,
        journal: &Journal,
        batch: &CursorBatch<'_>,
    ) -> Result<(), StopError> {
        let header = &batch.batch.header;
        let mut skipped_events = self.end().skipped_events;
        let mut position = header.base_position;
        for record in batch.batch.records() {
            let record = record.map_err(|error| StopError::Journal {
                view: V::NAME,
                source: invalid_record(journal, batch, position, error),
            })?;
            let at = Place { journal: journal.id(), position, recorded_at_us: header.time_us };
            skipped_events += u64::from(!self.add_record(view, &record, at)?);
            position = position.advance(1);
        }
        let end = Progress { checkpoint: batch.end(), skipped_events };
        self.batches.push(Batch { end, routes: self.routes.len() });
        self.bytes += batch.batch.bytes().len() as u64;
        Ok(())
    }

    /// Decodes and routes an event; false if it is of a type that the view doesn't know.
    fn add_record(
        &mut self,
        view: &V,
        record: &RecordRef<'_>,
        at: Place,
    ) -> Result<bool, StopError> {
        let failed =
            |cause| stop_at::<V, _>(&at.recorded(record, &mut Names::default(), ()), cause);
        match decode::<V::Event>(record).map_err(failed)? {
            Decoded::Foreign => return Ok(false),
            Decoded::One(data) => self.add_event(view, record, at, data).map_err(failed)?,
            Decoded::Many(all) => {
                for data in all {
                    self.add_event(view, record, at, data).map_err(failed)?;
                }
            }
        }
        Ok(true)
    }

    /// Routes an event: a stored one, or one of those that upcasters made of it.
    fn add_event(
        &mut self,
        view: &V,
        record: &RecordRef<'_>,
        at: Place,
        data: V::Event,
    ) -> Result<(), EventFailure> {
        let event = at.recorded(record, &mut self.names, data);
        let mut keys = Keys(Vec::new());
        guard(|| view.route(&event, &mut keys))?;
        for key in keys.0 {
            self.add_route(key);
        }
        self.events.push(event);
        Ok(())
    }

    /// The next event concerns the row under `key`. A key named twice by one event is folded once.
    fn add_route(&mut self, key: V::Key) {
        let event = self.events.len();
        let row_key = row_key(|out| key.encode_key(out));
        let slot = match self.slot_of_key.get(&row_key) {
            Some(&slot) => slot,
            None => {
                let slot = self.slots.len();
                self.slot_of_key.insert(row_key.clone(), slot);
                self.slots.push(Slot { key, row_key, last_event: usize::MAX });
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
        self.cut_routes();
        loop {
            match self.fold_routes(view, db) {
                Ok(writes) => return Ok(Folded { writes, end: self.end(), stop }),
                Err(FoldFailure::Storage(source)) => {
                    return Err(StopError::Storage { view: V::NAME, source });
                }
                Err(FoldFailure::Event(route, cause)) => {
                    stop = self.stop_at_route(route, cause);
                    self.drop_batches_from(route);
                }
            }
        }
    }

    fn stop_at_route(&self, route: usize, cause: EventFailure) -> Option<StopError> {
        let event = self.events.get(self.routes.get(route)?.event)?;
        Some(stop_at::<V, _>(event, cause))
    }

    /// Folds are pure: folding the batches in front again gives what it gave before.
    fn drop_batches_from(&mut self, route: usize) {
        self.batches.truncate(self.batches.partition_point(|batch| batch.routes <= route));
        self.cut_routes();
    }

    /// Forgets what was routed of a batch that isn't a part of the chunk.
    fn cut_routes(&mut self) {
        self.routes.truncate(self.batches.last().map_or(0, |batch| batch.routes));
    }

    fn fold_routes(&self, view: &V, db: &Db) -> Result<Writes, FoldFailure> {
        let mut rows = self.read_rows(db).map_err(FoldFailure::Storage)?;
        for (index, route) in self.routes.iter().enumerate() {
            let (slot, event) = (self.slots.get(route.slot), self.events.get(route.event));
            if let (Some(row), Some(slot), Some(event)) = (rows.get_mut(route.slot), slot, event) {
                fold_one(view, &slot.key, row, event, index)
                    .map_err(|cause| FoldFailure::Event(index, cause))?;
            }
        }
        self.writes(rows)
    }

    fn read_rows(&self, db: &Db) -> Result<Vec<RowState<V::Row>>, StorageError> {
        let stored = db.rows(self.slots.iter().map(|slot| slot.row_key.as_slice()))?;
        Ok(stored.into_iter().map(RowState::stored).collect())
    }

    /// What is to be written, in the order of the keys: the memtable takes that fastest.
    fn writes(&self, rows: Vec<RowState<V::Row>>) -> Result<Writes, FoldFailure> {
        let mut changed: Vec<(&Slot<V::Key>, RowState<V::Row>)> =
            self.slots.iter().zip(rows).filter(|(_, row)| row.changed_by.is_some()).collect();
        changed.sort_unstable_by(|(a, _), (b, _)| a.row_key.cmp(&b.row_key));
        let mut writes = Writes::new();
        for (slot, state) in changed {
            match (state.changed_by, state.row) {
                (Some(route), Some(row)) => {
                    let encoded = guard(|| Bincode::encode(&row))
                        .and_then(|encoded| encoded.map_err(EventFailure::NewRow))
                        .map_err(|cause| FoldFailure::Event(route, cause))?;
                    writes.put_row(&slot.row_key, &encoded);
                }
                (Some(_), None) if state.was_stored => writes.delete_row(&slot.row_key),
                _ => {}
            }
        }
        Ok(writes)
    }
}

impl<R> RowState<R> {
    const fn stored(bytes: Option<Vec<u8>>) -> Self {
        Self { was_stored: bytes.is_some(), undecoded: bytes, row: None, changed_by: None }
    }
}

fn fold_one<V: View>(
    view: &V,
    key: &V::Key,
    state: &mut RowState<V::Row>,
    event: &Recorded<V::Event>,
    route: usize,
) -> Result<(), EventFailure> {
    if let Some(bytes) = state.undecoded.take() {
        let row = guard(|| Bincode::decode(&bytes))?.map_err(EventFailure::StoredRow)?;
        state.row = Some(row);
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

pub(super) fn stop_at<V: View, E>(event: &Recorded<E>, cause: EventFailure) -> StopError {
    StopError::Event {
        view: V::NAME,
        position: event.position(),
        stream: event.stream().clone(),
        event_type: event.event_type().clone(),
        cause,
    }
}

/// Runs code of the view's author, whose panics stop the view and nothing else.
pub(super) fn guard<T>(code: impl FnOnce() -> T) -> Result<T, EventFailure> {
    catch_unwind(AssertUnwindSafe(code))
        .map_err(|panic| EventFailure::Panic { message: panic_message(&*panic) })
}

pub(super) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
