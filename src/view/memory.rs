//! The rows of a view in memory, for the tests of its author.
//!
//! ```text
//! stored events ──decode──▶ events ──route──▶ rows of the chunk, each with its events ──fold──▶ slots, entries
//! ```
//! What the real view writes into RocksDB lies in maps here; how events become that is the same code: each row of a
//! chunk is folded by [`fold_carefully`], which is also what the real view falls back to when an event fails. Between
//! two chunks a row is only what was encoded of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::chunk::{Careful, fold_carefully, guard};
use super::db::{in_index_entry, index_prefix, row_key};
use super::deadly::Note;
use super::error::{EventFailure, ViewError, ViewReadError};
use super::generation;
use super::key::{EncodeKey, ViewKey};
use super::poison::reason_of;
use super::row_cache::Bytes;
use super::space::Space;
use super::{Fold, Index, Indexes, Keys, ParkedKey, View};
use crate::codec::{Bincode, Codec};
use crate::event::Recorded;
use crate::position::{JournalId, Locator, Position};

/// A view whose rows are in memory.
pub(crate) struct MemoryRows<V: View> {
    indexes: Indexes<V>,
    pub(crate) kept: Kept,
}

/// Rows, index entries and what is parked, as of some events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    /// By the key under which the row would lie in the database.
    pub(crate) slots: BTreeMap<Vec<u8>, Slot>,
    pub(crate) entries: BTreeSet<Vec<u8>>,
    /// Events of which nobody knows which rows they concern, and why.
    pub(crate) unrouted: Vec<(Position, String)>,
    /// Events of types that the view doesn't know.
    pub(crate) skipped_events: u64,
    /// The view would have stopped here: a row that it has stored can't be read back.
    pub(crate) stopped: Option<(Position, String)>,
}

/// What there is under a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) row: Option<Vec<u8>>,
    pub(crate) parked: Option<ParkedSlot>,
}

/// What is parked of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParkedSlot {
    pub(crate) journal: JournalId,
    pub(crate) first: Position,
    pub(crate) events: u64,
    /// When the first one was recorded.
    pub(crate) since_us: i64,
    pub(crate) reason: String,
}

/// The decoded events of a chunk, and the rows that they concern.
pub(crate) struct Routes<V: View> {
    pub(crate) events: Vec<Recorded<V::Event>>,
    pub(crate) rows: Vec<RoutedRow<V>>,
    row_of_key: HashMap<Vec<u8>, usize>,
}

/// A row, and the events that concern it.
pub(crate) struct RoutedRow<V: View> {
    pub(crate) key: V::Key,
    pub(crate) row_key: Vec<u8>,
    pub(crate) events: Vec<usize>,
}

/// What an event makes of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome<R> {
    Put(R),
    Delete,
    Keep,
    Failed(String),
}

impl<V: View> Routes<V> {
    pub(crate) fn new() -> Self {
        Self { events: Vec::new(), rows: Vec::new(), row_of_key: HashMap::new() }
    }

    /// Decodes and routes a stored event; false if it is of a type that the view doesn't know. After a failure nothing of
    /// it is there.
    pub(crate) fn add(&mut self, view: &V, stored: &Recorded) -> Result<bool, EventFailure> {
        let decoded = guard(|| stored.decode::<V::Event>())?.map_err(EventFailure::Payload)?;
        if decoded.is_foreign() {
            return Ok(false);
        }
        let mut all = Vec::new();
        for event in decoded {
            let mut keys = Keys::none();
            guard(|| view.route(&event, &mut keys))?;
            all.push((event, keys));
        }
        for (event, keys) in all {
            keys.0.into_iter().for_each(|key| self.add_route(key));
            self.events.push(event);
        }
        Ok(true)
    }

    /// The next event concerns the row under `key`. A key named twice by one event is folded once.
    fn add_route(&mut self, key: V::Key) {
        let event = self.events.len();
        let row_key = row_key(|out| key.encode_key(out));
        let row = *self.row_of_key.entry(row_key.clone()).or_insert_with(|| {
            self.rows.push(RoutedRow { key, row_key, events: Vec::new() });
            self.rows.len() - 1
        });
        let row = self.rows.get_mut(row);
        if let Some(row) = row.filter(|row| row.events.last() != Some(&event)) {
            row.events.push(event);
        }
    }
}

impl<V: View> MemoryRows<V> {
    /// No rows. The view is looked at as when it is opened.
    pub(crate) fn new(view: &V) -> Result<Self, ViewError> {
        if !generation::is_valid_name(V::NAME) {
            return Err(ViewError::InvalidName { name: V::NAME });
        }
        let indexes = Indexes::of(view);
        indexes.check()?;
        Ok(Self { indexes, kept: Kept::default() })
    }

    /// Folds a chunk, or of it only what concerns the rows that are `wanted`; the database keys of these.
    pub(crate) fn apply(
        &mut self,
        view: &V,
        chunk: &[Recorded],
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Vec<Vec<u8>> {
        let mut routes = Routes::new();
        for stored in chunk.iter().take_while(|_| self.kept.stopped.is_none()) {
            match routes.add(view, stored) {
                Ok(is_known) => self.kept.skipped_events += u64::from(!is_known),
                Err(cause) => self.kept.unrouted.push((stored.position(), reason_of(&cause))),
            }
        }
        let Routes { events, rows, .. } = routes;
        let rows: Vec<_> = rows.into_iter().filter(|row| wanted(&row.row_key)).collect();
        rows.iter().for_each(|row| self.fold(view, &events, row));
        rows.into_iter().map(|row| row.row_key).collect()
    }

    fn fold(&mut self, view: &V, events: &[Recorded<V::Event>], row: &RoutedRow<V>) {
        let events: Vec<_> = row.events.iter().filter_map(|index| events.get(*index)).collect();
        let slot = self.kept.slots.entry(row.row_key.clone()).or_default();
        let mut behind = 0;
        if slot.parked.is_none() {
            let stored = slot.row.as_deref().map(Bytes::from_slice);
            let all = events.iter().copied();
            let care = Note::nowhere().care();
            let Careful { change, folded, failure } =
                fold_carefully(view, &self.indexes, &row.key, &row.row_key, stored, all, &care);
            change.make(&mut slot.row, &mut self.kept.entries);
            let (Some(failure), Some(event)) = (failure, events.get(folded)) else { return };
            let Locator { journal, position: first } = event.locator();
            let (since_us, reason) = (event.recorded_at_us(), reason_of(&failure));
            if failure.is_of_the_rows() {
                self.kept.stopped.get_or_insert((first, reason));
                return;
            }
            slot.parked = Some(ParkedSlot { journal, first, events: 0, since_us, reason });
            behind = folded;
        }
        // Those that one stored event stands for are parked as that one.
        let mut parked: Vec<Position> =
            events.iter().skip(behind).map(|event| event.position()).collect();
        parked.dedup();
        if let Some(slot) = &mut slot.parked {
            slot.events += parked.len() as u64;
        }
    }

    pub(crate) fn slot<Q: EncodeKey<V::Key> + ?Sized>(&self, key: &Q) -> Option<&Slot> {
        self.kept.slots.get(&row_key(|out| key.encode_key_into(out)))
    }

    /// All rows, in the order of their keys.
    pub(crate) fn rows(&self) -> Result<Vec<(V::Key, V::Row)>, ViewReadError> {
        let rows =
            self.kept.slots.iter().filter_map(|(key, slot)| Some((key, slot.row.as_deref()?)));
        rows.map(|(row_key, row)| Ok((key_of::<V>(row_key)?, row_of::<V>(row)?))).collect()
    }

    /// What is parked, in the order of the keys.
    pub(crate) fn parked(&self) -> Result<Vec<ParkedKey<V::Key>>, ViewReadError> {
        let slots = self.kept.slots.iter();
        let parked = slots.filter_map(|(key, slot)| Some((key, slot.parked.clone()?)));
        let parked = parked.map(|(row_key, parked)| {
            let ParkedSlot { journal, first, events, since_us, reason } = parked;
            Ok(ParkedKey { key: key_of::<V>(row_key)?, events, journal, first, since_us, reason })
        });
        parked.collect()
    }

    /// The rows that have this key in an index, in the order of their own.
    pub(crate) fn by_index<K: ViewKey + 'static, Q: EncodeKey<K> + ?Sized>(
        &self,
        index: Index<V, K>,
        key: &Q,
    ) -> Result<Vec<(V::Key, V::Row)>, ViewReadError> {
        let mut prefix = index_prefix(self.indexes.number(index)?);
        key.encode_key_into(&mut prefix);
        let entries = self.kept.entries.range(prefix.clone()..);
        let entries = entries.take_while(|entry| entry.starts_with(&prefix));
        entries.map(|entry| self.found::<K>(entry)).collect()
    }

    fn found<K: ViewKey>(&self, entry: &[u8]) -> Result<(V::Key, V::Row), ViewReadError> {
        let mut input = in_index_entry(entry);
        K::decode_key(&mut input).map_err(|source| ViewReadError::Key { view: V::NAME, source })?;
        let row_key = row_key(|out| out.extend_from_slice(input));
        let row = self.kept.slots.get(&row_key).and_then(|slot| slot.row.as_deref());
        Ok((key_of::<V>(&row_key)?, row_of::<V>(row.unwrap_or_default())?))
    }

    /// The index entries of a row, or why they can't be had.
    pub(crate) fn entries_of(
        &self,
        key: &V::Key,
        row_key: &[u8],
        row: &V::Row,
    ) -> Result<BTreeSet<Vec<u8>>, String> {
        guard(|| self.indexes.entries(key, row_key, row)).map_err(|cause| cause.to_string())
    }
}

/// Folds once, as a view that has stored nothing in between.
pub(crate) fn fold_once<V: View>(
    view: &V,
    key: &V::Key,
    row: Option<V::Row>,
    event: &Recorded<V::Event>,
) -> Outcome<V::Row> {
    match guard(|| view.fold(key, row, event)) {
        Ok(Ok(Fold::Put(row))) => Outcome::Put(row),
        Ok(Ok(Fold::Delete)) => Outcome::Delete,
        Ok(Ok(Fold::Keep)) => Outcome::Keep,
        Ok(Err(error)) => Outcome::Failed(error.to_string()),
        Err(cause) => Outcome::Failed(cause.to_string()),
    }
}

/// The key that lies under a database key.
pub(crate) fn key_of<V: View>(row_key: &[u8]) -> Result<V::Key, ViewReadError> {
    Space::of::<V>().decode_key(row_key)
}

/// The row that is stored as these bytes.
pub(crate) fn row_of<V: View>(stored: &[u8]) -> Result<V::Row, ViewReadError> {
    Space::of::<V>().decode_row(stored)
}

/// A row as it is stored, or why it can't be.
pub(crate) fn stored_row<V: View>(row: &V::Row) -> Result<Vec<u8>, String> {
    match guard(|| Bincode::encode(row)) {
        Ok(bytes) => bytes.map_err(|error| error.to_string()),
        Err(cause) => Err(cause.to_string()),
    }
}
