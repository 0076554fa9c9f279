//! Views of several tables, for what doesn't fall apart into rows that are folded by themselves: joins, counts over
//! others' rows, rows that move.
//!
//! ```text
//! batches ──decode──▶ events ──apply, one after the other──▶ what was written ──one write batch──▶ RocksDB
//!                               │  reads: event's own writes,        ▲
//!                               │  the chunk's, the database's       │ kept if it succeeds,
//!                               └──────── one event's writes ────────┘ dropped if it fails
//! ```
//!
//! Invariants:
//! - An event sees what all events in front of it have made, those of its batch included, and nothing else.
//! - An event is applied whole or not at all.
//! - What holds for every view holds here, too: rows and checkpoint are written together, at batch ends only.
//!
//! What it costs: events are applied in one thread, each with its own reads, and a rebuild does the same as following
//! the journal. What events write is held in memory up to the first end of a batch behind 16 MiB of it: so a batch that
//! writes very many rows needs as much. A [`View`](super::View) is folded in parallel and rebuilt many times as fast; where one
//! serves, take it.

use std::any::TypeId;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map;
use std::fmt;
use std::iter::Peekable;
use std::marker::PhantomData;
use std::ops::RangeBounds;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::audit::{Folds, Tallies, Tally};
use super::bulk;
use super::chunk::{
    Batch, Folded, Place, Unrouted, decode, end_of, guard, invalid_record, is_known, park_unrouted,
    stop_at,
};
use super::control::ViewControl;
use super::db::{Db, Identity, Progress, Reader, Scan, StorageError};
use super::deadly::{At, Care, Stage};
use super::error::{EventFailure, StopError, ViewError, ViewReadError};
use super::handle::checkpoints_of;
use super::index::check_names;
use super::key::{EncodeKey, KeyError, KeyPrefix, ViewKey};
#[cfg(feature = "testing")]
use super::memory_tables::Reading;
#[cfg(feature = "cli")]
use super::mount::RowSpelling;
use super::poison::{OnPoison, Parking, Rules, reason_of};
use super::program::{Batches, Build, Program, build_in_order};
use super::rows::Rows;
use super::sources::{Checkpoints, Sources};
use super::space::Space;
use super::watch::Watch;
use super::{FoldError, ViewOptions, generation, refuse_inline, runner};
use crate::codec::{Bincode, Codec, CodecError};
use crate::event::{Event, KnownKind, Names, Recorded};
use crate::format::record::RecordRef;
use crate::journal::{CursorBatch, Journal};
use crate::position::{Checkpoint, Token};

/// How many tables a view may have.
const TABLES_MAX: usize = 64;
/// What events have written is written into the database at the first end of a batch behind so many bytes.
const WRITTEN_BYTES_MAX: usize = 16 << 20;
/// What is kept for a watcher.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Several tables, made from events in the order of the journal, with reads of whatever is there.
///
/// The general form of a view: take it when a row is made from other rows. It is applied in one thread, and rebuilt at
/// the same speed; rows that are folded by themselves belong into a [`View`](super::View).
///
/// Like every view it is pure: what it writes depends on the events and on its own tables only.
///
/// ```
/// use std::time::Duration;
/// use headwater::view::{FoldError, Table, TableView, Tables, ViewTxn};
/// use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Named { pub customer: u32, pub name: String }
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Placed { pub order: u32, pub customer: u32 }
///
/// headwater::events! {
///     /// What happens in the shop.
///     pub enum ShopEvent {
///         Named(Named) = "customer.named", version 1;
///         Placed(Placed) = "order.placed", version 1;
///     }
/// }
///
/// /// Orders with the names of their customers, as they are now.
/// struct Orders;
///
/// const NAMES: Table<u32, String> = Table::new("names");
/// const ORDERS: Table<u32, String> = Table::new("orders");
/// /// An index is a table, too: (customer, order).
/// const OF_CUSTOMER: Table<(u32, u32), ()> = Table::new("of_customer");
///
/// impl TableView for Orders {
///     const NAME: &'static str = "orders";
///     const VERSION: u32 = 1;
///     type Event = ShopEvent;
///
///     fn tables(&self) -> Tables {
///         Tables::of(NAMES).with(ORDERS).with(OF_CUSTOMER)
///     }
///
///     fn apply(&self, event: &Recorded<ShopEvent>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
///         match event.data() {
///             ShopEvent::Named(Named { customer, name }) => {
///                 tx.put(NAMES, customer, name)?;
///                 let orders = tx.prefix(OF_CUSTOMER, customer)?.collect::<Result<Vec<_>, _>>()?;
///                 for ((_, order), ()) in orders {
///                     tx.put(ORDERS, &order, name)?;
///                 }
///             }
///             ShopEvent::Placed(Placed { order, customer }) => {
///                 let name = tx.get(NAMES, customer)?.unwrap_or_else(|| "unknown".into());
///                 tx.put(ORDERS, order, &name)?;
///                 tx.put(OF_CUSTOMER, &(*customer, *order), &())?;
///             }
///         }
///         Ok(())
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::create(dir.path().join("shop"))?;
/// let view = store.table_view(Orders)?;
/// # let stream = StreamId::new("shop")?;
/// let events = [
///     NewEvent::typed(&ShopEvent::from(Placed { order: 7, customer: 1 }))?,
///     NewEvent::typed(&ShopEvent::from(Named { customer: 1, name: "Ada".into() }))?,
/// ];
/// let appended = store.append(&Append::to(&stream, ExpectedRevision::Any, events))?;
/// view.wait_for(&appended.token(), Duration::from_secs(10))?;
/// assert_eq!(view.table(ORDERS)?.get(&7)?.as_deref(), Some("Ada"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait TableView: Send + Sync + 'static {
    /// The view's name, and its folder's: 1 to 64 of `a-z`, `0-9`, `-` and `_`. Keyed views and views of tables share
    /// the names.
    const NAME: &'static str;
    /// Raise it whenever `apply` or the type of a key or row change: the tables are then built anew, in a generation of
    /// their own.
    const VERSION: u32;
    /// The events that it is made from. Events of other types are skipped and counted.
    type Event: Event + Send + Sync;

    /// The tables, all that [`apply`](Self::apply) uses. Another set makes a new generation at the next opening.
    fn tables(&self) -> Tables;

    /// Applies the event: reads and writes rows of the tables. Whether it wrote anything or not, the next event sees it
    /// applied.
    ///
    /// # Errors
    /// [`FoldError`], from any error or text, if it can't be applied: it is tried once more, and then, as
    /// [`ViewOptions::on_poison`] says, parked alone ([`ViewControl::unrouted_events`]; rows may lack it and all reads
    /// that can say so do), or the view stops in front of the event's batch. Nothing of what it has written is kept. A
    /// panic does the same.
    fn apply(&self, event: &Recorded<Self::Event>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError>;
}

/// A table of a [`TableView`]: rows of type `R` under keys of type `K`. Declare it as a constant.
pub struct Table<K, R> {
    name: &'static str,
    types: PhantomData<fn() -> (K, R)>,
}

impl<K, R> Table<K, R> {
    /// A table with a stable name: 1 to 64 of `a-z`, `0-9`, `-` and `_`.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self { name, types: PhantomData }
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

impl<K, R> Clone for Table<K, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, R> Copy for Table<K, R> {}

impl<K, R> fmt::Debug for Table<K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.name).finish()
    }
}

/// The tables of a view; see [`TableView::tables`].
#[derive(Clone, Debug)]
pub struct Tables(Vec<Declared>);

#[derive(Clone, Copy, Debug)]
struct Declared {
    name: &'static str,
    types: (TypeId, TypeId),
    #[cfg(feature = "cli")]
    spelling: RowSpelling,
    #[cfg(feature = "testing")]
    reading: Reading,
}

impl Tables {
    /// One table.
    #[must_use]
    pub fn of<K, R>(table: Table<K, R>) -> Self
    where
        K: ViewKey + 'static,
        R: Serialize + DeserializeOwned + 'static,
    {
        Self(Vec::new()).with(table)
    }

    /// And this one. The order doesn't matter.
    #[must_use]
    pub fn with<K, R>(mut self, table: Table<K, R>) -> Self
    where
        K: ViewKey + 'static,
        R: Serialize + DeserializeOwned + 'static,
    {
        let types = (TypeId::of::<K>(), TypeId::of::<R>());
        self.0.push(Declared {
            name: table.name,
            types,
            #[cfg(feature = "cli")]
            spelling: RowSpelling::of::<K, R>(),
            #[cfg(feature = "testing")]
            reading: Reading::of::<K, R>(),
        });
        self
    }

    /// How the rows of each are written, by name.
    #[cfg(feature = "cli")]
    pub(super) fn spellings(&self) -> Vec<(&'static str, RowSpelling)> {
        self.0.iter().map(|it| (it.name, it.spelling)).collect()
    }

    /// The name of the table in which a row lies, and how the row is read back.
    #[cfg(feature = "testing")]
    pub(super) fn reading(&self, row_key: &[u8]) -> Option<(&'static str, Reading)> {
        let mut numbered = (0_u8..).zip(&self.0);
        let found = numbered.find(|(number, _)| Space::of_table("", *number).holds(row_key));
        found.map(|(_, it)| (it.name, it.reading))
    }

    /// In the order of their numbers, which is that of their names.
    pub(super) fn sorted(mut self) -> Self {
        self.0.sort_by_key(|it| it.name);
        self
    }

    fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|it| it.name).collect()
    }

    pub(super) fn check(&self, view: &'static str) -> Result<(), ViewError> {
        let checked = check_names(&self.names(), TABLES_MAX);
        checked.map_err(|(table, reason)| ViewError::InvalidTable { view, table, reason })
    }

    pub(super) fn number<K: 'static, R: 'static>(&self, table: Table<K, R>) -> Option<u8> {
        let types = (TypeId::of::<K>(), TypeId::of::<R>());
        let mut numbered = (0_u8..).zip(&self.0);
        let found = numbered.find(|(_, it)| it.name == table.name && it.types == types);
        found.map(|(number, _)| number)
    }
}

// ------------------------------------------------------------------------------------------------ applying

/// Why a table can't be read or written while an event is applied. Hand it on with `?`: the event fails with it, even
/// if the code goes on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// The view doesn't declare such a table with these types.
    #[error("the view declares no table {table:?} with these types of key and row")]
    NoTable {
        /// The table.
        table: &'static str,
    },
    /// A stored row can't be decoded as the table's row type.
    #[error("table {table:?}: a stored row can't be decoded: {source}")]
    StoredRow {
        /// The table.
        table: &'static str,
        /// Why not.
        source: Arc<CodecError>,
    },
    /// A stored key can't be decoded as the table's key type.
    #[error("table {table:?}: a stored key can't be decoded: {source}")]
    StoredKey {
        /// The table.
        table: &'static str,
        /// Why not.
        source: KeyError,
    },
    /// The new row can't be encoded.
    #[error("table {table:?}: the new row can't be encoded: {source}")]
    NewRow {
        /// The table.
        table: &'static str,
        /// Why not.
        source: Arc<CodecError>,
    },
    /// The view's database failed. The view stops.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What was written: `None` deletes.
pub(crate) type Written = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// The tables as one event finds them; what it writes is seen by its own reads at once. See [`TableView::apply`].
pub struct ViewTxn<'a> {
    tables: &'a Tables,
    /// None if all that was ever written is in `chunk`: in a test of the view's author.
    db: Option<&'a Arc<Db>>,
    chunk: &'a Written,
    own: Written,
    failed: RefCell<Option<TableError>>,
}

impl fmt::Debug for ViewTxn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ViewTxn").field("written", &self.own.len()).finish_non_exhaustive()
    }
}

impl ViewTxn<'_> {
    /// The row under `key`.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn get<K, R, Q>(&self, table: Table<K, R>, key: &Q) -> Result<Option<R>, TableError>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let key = self.space(table)?.key(|out| key.encode_key_into(out));
        let written = self.own.get(&key).or_else(|| self.chunk.get(&key));
        if let Some(row) = written {
            return row.as_deref().map(|row| self.decode_row(table.name, row)).transpose();
        }
        let Some(db) = self.db else { return Ok(None) };
        let stored = db.rows([key.as_slice()].into_iter());
        let stored = stored.map_err(|error| self.failing(error.into()))?.pop().flatten();
        stored.map(|row| self.decode_row(table.name, &row)).transpose()
    }

    /// Writes the row under `key`, new or in place of another.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn put<K, R, Q>(&mut self, table: Table<K, R>, key: &Q, row: &R) -> Result<(), TableError>
    where
        K: ViewKey + 'static,
        R: Serialize + DeserializeOwned + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let key = self.space(table)?.key(|out| key.encode_key_into(out));
        let row = Bincode::encode(row).and_then(|row| Bincode::check_size::<R>(&row).map(|()| row));
        let row = row.map_err(|source| {
            let (table, source) = (table.name, Arc::new(source));
            self.failing(TableError::NewRow { table, source })
        })?;
        self.own.insert(key, Some(row));
        Ok(())
    }

    /// Deletes the row under `key`, if there is one.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn delete<K, R, Q>(&mut self, table: Table<K, R>, key: &Q) -> Result<(), TableError>
    where
        K: ViewKey + 'static,
        R: 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let key = self.space(table)?.key(|out| key.encode_key_into(out));
        self.own.insert(key, None);
        Ok(())
    }

    /// The rows with keys in `range`, in the order of their keys. Holds one row at a time; collect what you want to
    /// change.
    ///
    /// # Errors
    /// [`TableError`], here and in each item.
    pub fn range<K, R, B>(
        &self,
        table: Table<K, R>,
        range: B,
    ) -> Result<TxnRows<'_, K, R>, TableError>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
        B: RangeBounds<K>,
    {
        let space = self.space(table)?;
        Ok(self.rows(table, space, space.range(&range)))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys.
    ///
    /// # Errors
    /// As [`range`](Self::range).
    pub fn prefix<K, R, P>(
        &self,
        table: Table<K, R>,
        prefix: &P,
    ) -> Result<TxnRows<'_, K, R>, TableError>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
        P: KeyPrefix<K>,
    {
        let space = self.space(table)?;
        Ok(self.rows(table, space, space.prefix(prefix)))
    }

    fn rows<K, R>(
        &self,
        table: Table<K, R>,
        space: Space,
        range: std::ops::Range<Vec<u8>>,
    ) -> TxnRows<'_, K, R> {
        let within = |written| -> WrittenRange<'_> {
            let written: &Written = written;
            // A range that ends in front of its start has nothing in it.
            let is_empty = range.start >= range.end;
            let range =
                if is_empty { range.start.clone()..range.start.clone() } else { range.clone() };
            written.range(range).peekable()
        };
        let (own, chunk) = (within(&self.own), within(self.chunk));
        let stored = self.db.map(|db| db.latest().scan(range.clone()).peekable());
        TxnRows { tx: self, table, space, own, chunk, stored }
    }

    fn space<K: 'static, R: 'static>(&self, table: Table<K, R>) -> Result<Space, TableError> {
        let number = self.tables.number(table);
        let number =
            number.ok_or_else(|| self.failing(TableError::NoTable { table: table.name }))?;
        Ok(Space::of_table(table.name, number))
    }

    fn decode_row<R: DeserializeOwned>(
        &self,
        table: &'static str,
        row: &[u8],
    ) -> Result<R, TableError> {
        Bincode::decode(row).map_err(|source| {
            self.failing(TableError::StoredRow { table, source: Arc::new(source) })
        })
    }

    /// The event fails with the first error, whatever its code makes of it.
    fn failing(&self, error: TableError) -> TableError {
        self.failed.borrow_mut().get_or_insert_with(|| error.clone());
        error
    }
}

type WrittenRange<'a> = Peekable<btree_map::Range<'a, Vec<u8>, Option<Vec<u8>>>>;

/// Rows of a table as an event finds them; see [`ViewTxn::range`].
#[must_use = "an iterator reads nothing until it is used"]
pub struct TxnRows<'a, K, R> {
    tx: &'a ViewTxn<'a>,
    table: Table<K, R>,
    space: Space,
    own: WrittenRange<'a>,
    chunk: WrittenRange<'a>,
    stored: Option<Peekable<Scan>>,
}

impl<K, R> fmt::Debug for TxnRows<'_, K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TxnRows").field("table", &self.table.name).finish_non_exhaustive()
    }
}

impl<K, R> TxnRows<'_, K, R> {
    /// The next key in any of the three, with what the newest of those that have it says.
    fn next_entry(&mut self) -> Option<Result<(Vec<u8>, Option<Vec<u8>>), StorageError>> {
        let stored = match self.stored.as_mut().and_then(Peekable::peek) {
            Some(Err(_)) => {
                let failed = self.stored.as_mut()?.next();
                return failed.map(|error| error.map(|_| Default::default()));
            }
            Some(Ok((key, _))) => Some(&**key),
            None => None,
        };
        let written = |range: &mut WrittenRange<'_>| range.peek().map(|(key, _)| (*key).clone());
        let (own, chunk) = (written(&mut self.own), written(&mut self.chunk));
        let keys = [own.as_deref(), chunk.as_deref(), stored];
        let key = keys.into_iter().flatten().min()?.to_vec();
        let stored = self
            .stored
            .as_mut()
            .and_then(|stored| stored.next_if(|it| it.as_ref().is_ok_and(|(it, _)| **it == *key)));
        let chunk = self.chunk.next_if(|(it, _)| **it == key);
        let own = self.own.next_if(|(it, _)| **it == key);
        let row = match (own.or(chunk), stored) {
            (Some((_, row)), _) => row.clone(),
            (None, Some(stored)) => match stored {
                Ok((_, row)) => Some(row.into_vec()),
                Err(error) => return Some(Err(error)),
            },
            (None, None) => None,
        };
        Some(Ok((key, row)))
    }
}

impl<K: ViewKey, R: DeserializeOwned> Iterator for TxnRows<'_, K, R> {
    type Item = Result<(K, R), TableError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (key, row) = match self.next_entry()? {
                Ok((_, None)) => continue, // deleted
                Ok((key, Some(row))) => (key, row),
                Err(error) => return Some(Err(self.tx.failing(error.into()))),
            };
            let table = self.table.name;
            let key = self.space.decode_key(&key).map_err(|error| {
                let source = match error {
                    ViewReadError::Key { source, .. } => source,
                    _ => KeyError::Invalid("key"),
                };
                self.tx.failing(TableError::StoredKey { table, source })
            });
            return Some(key.and_then(|key| Ok((key, self.tx.decode_row(table, &row)?))));
        }
    }
}

/// A view of tables, as those see it who follow a journal.
pub(super) struct Tabled<T> {
    view: T,
    tables: Tables,
}

impl<T: TableView> Tabled<T> {
    pub(super) fn new(view: T) -> Self {
        let tables = view.tables().sorted();
        Self { view, tables }
    }

    pub(super) const fn tables(&self) -> &Tables {
        &self.tables
    }
}

impl<T: TableView> Program for Tabled<T> {
    const NAME: &'static str = T::NAME;
    const VERSION: u32 = T::VERSION;
    const HAS_BULK: bool = false;
    const KINDS: &'static [KnownKind] = <T::Event as Event>::KINDS;
    type Chunk = TableChunk<T>;

    fn identity(&self) -> Identity {
        let tables = self.tables.names();
        Identity { name: T::NAME, version: T::VERSION, indexes: Vec::new(), tables }
    }

    fn build(&self, what: Build<'_>) -> Result<Progress, bulk::Ended> {
        build_in_order(self, what)
    }

    fn answer(
        &self,
        parking: &Parking,
        db: &Arc<Db>,
        progress: &mut Progress,
        _: &Care,
        applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError> {
        parking.answer_without_keys(T::NAME, db, progress, applied)
    }
}

/// Batches on their way into the tables.
pub(super) struct TableChunk<T: TableView> {
    start: Progress,
    journal: Journal,
    rules: Rules,
    batches: Vec<Batch>,
    events: Vec<Recorded<T::Event>>,
    unrouted: Vec<Unrouted>,
    bytes: u64,
    names: Names,
    /// Why there are no more batches, once an event has failed at which the view stops.
    stop: Option<StopError>,
}

/// Why applying ended early.
enum ApplyFailure {
    /// At this event.
    Event(usize, EventFailure),
    Stop(StopError),
}

impl<T: TableView> TableChunk<T> {
    fn skipped_events(&self) -> u64 {
        self.batches.last().map_or(self.start.skipped_events, |batch| batch.skipped_events)
    }

    /// Decodes an event: what it counts as if there is nothing to be applied.
    fn add_record(&mut self, record: &RecordRef<'_>, at: Place) -> Result<Tally, StopError> {
        let tally = Tally::default();
        if self.rules.discarded.has_all_of(at.locator(), record.id) {
            return Ok(Tally { discarded: 1, ..tally });
        }
        let entered = match is_known::<T::Event>(record) {
            true => self.rules.care.enter(|| at.of(record, Stage::Route)),
            false => Ok(()),
        };
        match entered.and_then(|()| decode::<T::Event>(record)) {
            Ok(decoded) if decoded.is_foreign() => Ok(Tally { skipped: 1, ..tally }),
            Ok(decoded) => {
                let before = self.events.len();
                let events = decoded.into_iter();
                self.events.extend(events.map(|data| at.recorded(record, &mut self.names, data)));
                let is_none = self.events.len() == before;
                Ok(Tally { applied: u64::from(is_none), ..tally })
            }
            Err(cause) if self.rules.on_undecodable == OnPoison::Park => {
                let Place { position, recorded_at_us, .. } = at;
                self.unrouted.push(Unrouted {
                    position,
                    recorded_at_us,
                    reason: reason_of(&cause),
                });
                Ok(Tally { unrouted: 1, ..tally })
            }
            Err(cause) => {
                let event = at.recorded(record, &mut Names::default(), ());
                Err(stop_at(T::NAME, &event, cause))
            }
        }
    }

    /// Forgets what was decoded of a batch that isn't a part of the chunk.
    fn cut(&mut self) {
        let (events, unrouted) = self.batches.last().map_or((0, 0), |it| (it.routes, it.unrouted));
        self.events.truncate(events);
        self.unrouted.truncate(unrouted);
    }

    /// Applies the events of all batches, or of the first ones if those write much: of how many.
    fn apply(&self, program: &Tabled<T>, db: &Arc<Db>) -> Result<(Folded, usize), ApplyFailure> {
        let storage = |source| ApplyFailure::Stop(StopError::Storage { view: T::NAME, source });
        let (mut written, mut written_bytes) = (Written::new(), 0);
        let (mut failed, mut first) = (Vec::new(), 0);
        let mut batches = self.batches.len();
        let mut folds = Folds::of(self.journal.id(), &self.batches);
        // Those that one stored event stands for are applied all or not at all.
        for events in self.events.chunk_by(|a, b| a.position() == b.position()) {
            let mut applied = self.apply_one(program, events, db, &written);
            if matches!(applied, Err((_, Failure::Event(_)))) {
                applied = self.apply_one(program, events, db, &written); // a panic may have been of the moment
            }
            match applied {
                Ok(own) => {
                    written_bytes += own.iter().map(bytes_of).sum::<usize>();
                    written.extend(own);
                    let position = events.first().map(Recorded::position);
                    position.into_iter().for_each(|position| {
                        folds.saw(first, position, |tally| tally.applied += 1);
                    });
                }
                Err((_, Failure::Storage(source))) => return Err(storage(source)),
                Err((nth, Failure::Event(cause))) => {
                    let event = events.get(nth).filter(|_| self.rules.on_poison == OnPoison::Park);
                    let Some(event) = event.filter(|_| !cause.is_of_the_rows()) else {
                        return Err(ApplyFailure::Event(first + nth, cause));
                    };
                    let (position, recorded_at_us) = (event.position(), event.recorded_at_us());
                    let reason = reason_of(&cause);
                    folds.saw(first, position, |tally| tally.unrouted += 1);
                    failed.push(Unrouted { position, recorded_at_us, reason });
                }
            }
            first += events.len();
            if written_bytes >= WRITTEN_BYTES_MAX
                && let Some(ended) = self.batches_up_to(first)
            {
                batches = ended;
                break;
            }
        }
        let batches = self.batches.get(..batches).unwrap_or_default();
        let folded = self.settle(db, &written, batches, failed).map_err(ApplyFailure::Stop)?;
        Ok((Folded { tallies: folds.end(batches.len()), ..folded }, batches.len()))
    }

    /// How many batches end in front of this event, if one ends right there.
    fn batches_up_to(&self, event: usize) -> Option<usize> {
        let ended = self.batches.partition_point(|batch| batch.routes <= event);
        let last = self.batches.get(ended.checked_sub(1)?)?;
        (last.routes == event).then_some(ended)
    }

    /// What is behind the first batches, which are written: up to `start`.
    fn rest(mut self, batches: usize, start: Progress) -> Option<Self> {
        let last = self.batches.get(batches.checked_sub(1)?)?;
        let (events, unrouted) = (last.routes, last.unrouted);
        let mut rest = self.batches.split_off(batches);
        for batch in &mut rest {
            (batch.routes, batch.unrouted) = (batch.routes - events, batch.unrouted - unrouted);
        }
        let (events, unrouted) = (self.events.split_off(events), self.unrouted.split_off(unrouted));
        (!rest.is_empty()).then_some(Self { start, batches: rest, events, unrouted, ..self })
    }

    fn apply_one(
        &self,
        program: &Tabled<T>,
        events: &[Recorded<T::Event>],
        db: &Arc<Db>,
        written: &Written,
    ) -> Result<Written, (usize, Failure)> {
        if let Some(event) = events.first() {
            let entered = self.rules.care.enter(|| At::of(event, Stage::Fold));
            entered.map_err(|cause| (0, Failure::Event(cause)))?;
        }
        program.apply(events, db, written)
    }

    fn settle(
        &self,
        db: &Db,
        written: &Written,
        batches: &[Batch],
        failed: Vec<Unrouted>,
    ) -> Result<Folded, StopError> {
        let unrouted = self.unrouted.iter().take(batches.last().map_or(0, |it| it.unrouted));
        let unrouted: Vec<Unrouted> = unrouted.cloned().chain(failed).collect();
        let mut writes = db.writes();
        let is_watched = self.rules.watchers.as_ref().is_some_and(|watchers| watchers.are_any());
        let mut changed = Vec::new();
        for (key, row) in written {
            match row {
                Some(row) => writes.put(key, row),
                None => writes.delete(key),
            }
            changed.extend(is_watched.then(|| key.clone()));
        }
        park_unrouted(T::NAME, &self.journal, &self.start, &unrouted, &mut writes)?;
        let mut parked = self.start.parked;
        parked.unrouted += unrouted.len() as u64;
        let end = end_of(&self.start, batches, parked);
        Ok(Folded { writes, end, changed, tallies: Tallies::new(), stop: None })
    }
}

/// What a row takes in memory that is to be written.
fn bytes_of((key, row): (&Vec<u8>, &Option<Vec<u8>>)) -> usize {
    key.len() + row.as_ref().map_or(0, Vec::len)
}

/// Why an event couldn't be applied.
pub(super) enum Failure {
    Event(EventFailure),
    Storage(StorageError),
}

impl<T: TableView> Tabled<T> {
    /// What events write, on top of what was written; or which one fails, and why.
    fn apply(
        &self,
        events: &[Recorded<T::Event>],
        db: &Arc<Db>,
        written: &Written,
    ) -> Result<Written, (usize, Failure)> {
        apply(&self.view, &self.tables, events, Some(db), written)
    }
}

/// [`Tabled::apply`], also without a database: on top of nothing but what was written.
pub(super) fn apply<T: TableView>(
    view: &T,
    tables: &Tables,
    events: &[Recorded<T::Event>],
    db: Option<&Arc<Db>>,
    written: &Written,
) -> Result<Written, (usize, Failure)> {
    let failed = RefCell::new(None);
    let mut tx = ViewTxn { tables, db, chunk: written, own: Written::new(), failed };
    for (nth, event) in events.iter().enumerate() {
        let applied = guard(|| view.apply(event, &mut tx));
        let failure = match tx.failed.take() {
            Some(TableError::Storage(source)) => Some(Failure::Storage(source)),
            Some(error) => Some(Failure::Event(EventFailure::Table(error))),
            None => match applied {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(Failure::Event(EventFailure::Fold(error.0))),
                Err(panic) => Some(Failure::Event(panic)),
            },
        };
        if let Some(failure) = failure {
            return Err((nth, failure));
        }
    }
    Ok(tx.own)
}

impl<T: TableView> Batches<Tabled<T>> for TableChunk<T> {
    fn new(start: Progress, journal: Journal, rules: Rules) -> Self {
        let (batches, events, unrouted) = (Vec::new(), Vec::new(), Vec::new());
        let (bytes, names, stop) = (0, Names::default(), None);
        Self { start, journal, rules, batches, events, unrouted, bytes, names, stop }
    }

    fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn add(&mut self, _: &Tabled<T>, batch: &CursorBatch<'_>) -> Result<(), StopError> {
        let header = &batch.batch.header;
        let mut tally = Tally::default();
        let mut position = header.base_position;
        for record in batch.batch.records() {
            let record = record.map_err(|error| StopError::Journal {
                view: T::NAME,
                source: invalid_record(&self.journal, batch, position, error),
            })?;
            let journal = self.journal.id();
            let at = Place { journal, position, recorded_at_us: header.time_us };
            tally.add(self.add_record(&record, at)?);
            position = position.advance(1);
        }
        let skipped_events = self.skipped_events() + tally.skipped;
        let (end, routes, unrouted) = (batch.end(), self.events.len(), self.unrouted.len());
        let segment = batch.segment;
        self.batches.push(Batch { end, skipped_events, routes, unrouted, segment, tally });
        self.bytes += batch.batch.bytes().len() as u64;
        Ok(())
    }

    fn fold(
        mut self,
        program: &Tabled<T>,
        db: &Arc<Db>,
    ) -> Result<(Folded, Option<Self>), StopError> {
        self.cut();
        loop {
            match self.apply(program, db) {
                Ok((folded, batches)) if batches < self.batches.len() => {
                    let rest = self.rest(batches, folded.end.clone());
                    return Ok((folded, rest));
                }
                Ok((folded, _)) => return Ok((Folded { stop: self.stop, ..folded }, None)),
                Err(ApplyFailure::Stop(error)) => return Err(error),
                Err(ApplyFailure::Event(failed, cause)) => {
                    self.stop = self.events.get(failed).map(|event| stop_at(T::NAME, event, cause));
                    // A view is pure: applying the batches in front again gives what it gave before.
                    self.batches.truncate(self.batches.partition_point(|it| it.routes <= failed));
                    self.cut();
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ reading

/// An open view of tables. Cheap to clone; the view is closed when the last clone is dropped.
///
/// Reads see what is applied, never wait for the view, and go on when it has stopped or was closed. See [`TableView`]
/// for an example, and [`ViewControl`] for what can be done with every view: wait for a token, rebuild, check.
pub struct TableViewHandle<T> {
    control: ViewControl,
    tables: Arc<Tables>,
    view: PhantomData<fn() -> T>,
}

impl<T> Clone for TableViewHandle<T> {
    fn clone(&self) -> Self {
        Self { control: self.control.clone(), tables: self.tables.clone(), view: PhantomData }
    }
}

impl<T> fmt::Debug for TableViewHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableViewHandle").field("view", &self.control).finish()
    }
}

/// What all kinds of views have in common.
impl<T> std::ops::Deref for TableViewHandle<T> {
    type Target = ViewControl;

    fn deref(&self) -> &ViewControl {
        &self.control
    }
}

impl<T: TableView> TableViewHandle<T> {
    /// Reads a table, at each read as it is then, also when another generation takes over.
    ///
    /// # Errors
    /// [`ViewReadError::NoTable`] if [`TableView::tables`] doesn't name it.
    pub fn table<K: ViewKey + 'static, R: DeserializeOwned + 'static>(
        &self,
        table: Table<K, R>,
    ) -> Result<TableReader<K, R>, ViewReadError> {
        TableReader::new(Source::View(self.control.clone()), T::NAME, &self.tables, table)
    }

    /// All tables as of now, for several reads that belong together.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails.
    pub fn snapshot(&self) -> Result<TableSnapshot<T>, ViewReadError> {
        let shared = self.control.shared();
        let reader = shared.db().snapshot();
        let checkpoints = checkpoints_of(shared, &reader)?;
        let tables = Arc::clone(&self.tables);
        Ok(TableSnapshot { reader, checkpoints, tables, view: PhantomData })
    }

    /// A [`snapshot`](Self::snapshot) once the view has applied what `token` stands for.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for`](ViewControl::wait_for) says;
    /// [`ViewReadError::Degraded`] if an event in front of the token is parked: any row may lack it.
    pub fn snapshot_at_least(
        &self,
        token: &Token,
        timeout: Duration,
    ) -> Result<TableSnapshot<T>, ViewReadError> {
        self.wait_for(token, timeout)?;
        let snapshot = self.snapshot()?;
        match super::poison::unrouted(&snapshot.reader, Some(token))? {
            Some(degraded) => Err(ViewReadError::Degraded { view: T::NAME, degraded }),
            None => Ok(snapshot),
        }
    }

    /// A [`snapshot`](Self::snapshot) once the view has applied everything that is durable in its journal now.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for_latest`](ViewControl::wait_for_latest) says;
    /// [`ViewReadError::Degraded`] if an event is parked: any row may lack it.
    pub fn snapshot_latest(&self, timeout: Duration) -> Result<TableSnapshot<T>, ViewReadError> {
        self.wait_for_latest(timeout)?;
        let snapshot = self.snapshot()?;
        match super::poison::unrouted(&snapshot.reader, None)? {
            Some(degraded) => Err(ViewReadError::Degraded { view: T::NAME, degraded }),
            None => Ok(snapshot),
        }
    }

    /// Tells from now on which rows of a table change; see [`ViewHandle::watch`](super::ViewHandle::watch). A row that
    /// was written as it was before counts as changed.
    ///
    /// # Errors
    /// [`ViewReadError::NoTable`] if [`TableView::tables`] doesn't name it.
    pub fn watch<K: ViewKey + 'static, R: 'static>(
        &self,
        table: Table<K, R>,
    ) -> Result<Watch<K>, ViewReadError> {
        let space = space_of(T::NAME, &self.tables, table)?;
        Ok(Watch::new(self.control.shared(), space, KEPT_BYTES_MAX))
    }
}

/// Tables as of one moment: all reads are of the same checkpoint.
pub struct TableSnapshot<T> {
    reader: Reader,
    checkpoints: Checkpoints,
    tables: Arc<Tables>,
    view: PhantomData<fn() -> T>,
}

impl<T: TableView> fmt::Debug for TableSnapshot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableSnapshot")
            .field("name", &T::NAME)
            .field("checkpoint", &self.checkpoint())
            .finish_non_exhaustive()
    }
}

impl<T: TableView> TableSnapshot<T> {
    /// Reads a table as of the snapshot's moment.
    ///
    /// # Errors
    /// [`ViewReadError::NoTable`] if [`TableView::tables`] doesn't name it.
    pub fn table<K: ViewKey + 'static, R: DeserializeOwned + 'static>(
        &self,
        table: Table<K, R>,
    ) -> Result<TableReader<K, R>, ViewReadError> {
        TableReader::new(Source::Moment(self.reader.clone()), T::NAME, &self.tables, table)
    }

    /// What the rows are of: exactly the events in front of it; of the first journal, if the view has several.
    #[must_use]
    pub const fn checkpoint(&self) -> Checkpoint {
        self.checkpoints.first()
    }

    /// What the rows are of, in each of the view's journals.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.checkpoints.iter().copied().collect()
    }
}

/// Reads a table of a view.
#[derive(Clone)]
pub struct TableReader<K, R> {
    source: Source,
    space: Space,
    table: Table<K, R>,
}

#[derive(Clone)]
enum Source {
    View(ViewControl),
    Moment(Reader),
}

impl<K, R> fmt::Debug for TableReader<K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableReader")
            .field("view", &self.space.view)
            .field("table", &self.table.name)
            .finish_non_exhaustive()
    }
}

fn space_of<K: 'static, R: 'static>(
    view: &'static str,
    tables: &Tables,
    table: Table<K, R>,
) -> Result<Space, ViewReadError> {
    let number = tables.number(table);
    let number = number.ok_or(ViewReadError::NoTable { view, table: table.name })?;
    Ok(Space::of_table(view, number))
}

impl<K: ViewKey + 'static, R: DeserializeOwned + 'static> TableReader<K, R> {
    fn new(
        source: Source,
        view: &'static str,
        tables: &Tables,
        table: Table<K, R>,
    ) -> Result<Self, ViewReadError> {
        Ok(Self { source, space: space_of(view, tables, table)?, table })
    }

    fn reader(&self) -> Reader {
        match &self.source {
            Source::View(control) => control.shared().db().latest(),
            Source::Moment(reader) => reader.clone(),
        }
    }

    fn key<Q: EncodeKey<K> + ?Sized>(&self, key: &Q) -> Vec<u8> {
        self.space.key(|out| key.encode_key_into(out))
    }

    /// The row under `key`.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get<Q: EncodeKey<K> + ?Sized>(&self, key: &Q) -> Result<Option<R>, ViewReadError> {
        self.space.get(&self.reader(), &self.key(key))
    }

    /// The rows under `keys`, in their order, read in one call and as of one moment.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or a row is of another type.
    pub fn multi_get<'q, Q: EncodeKey<K> + ?Sized + 'q>(
        &self,
        keys: impl IntoIterator<Item = &'q Q>,
    ) -> Result<Vec<Option<R>>, ViewReadError> {
        let keys: Vec<Vec<u8>> = keys.into_iter().map(|key| self.key(key)).collect();
        let reader = match &self.source {
            Source::View(control) => control.shared().db().snapshot(),
            Source::Moment(reader) => reader.clone(),
        };
        self.space.multi_get(&reader, &keys)
    }

    /// The rows with keys in `range`, in the order of their keys, as of now. Holds one row at a time.
    pub fn range<B: RangeBounds<K>>(&self, range: B) -> Rows<K, R> {
        Rows::new(&self.reader(), self.space, self.space.range(&range))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys, as of now.
    pub fn prefix<P: KeyPrefix<K>>(&self, prefix: &P) -> Rows<K, R> {
        Rows::new(&self.reader(), self.space, self.space.prefix(prefix))
    }
}

/// Opens a view of tables; see [`view::open`](super::open), which opens a keyed one.
///
/// # Errors
/// [`ViewError`]; nothing that is stored was changed then.
pub fn open_tables<T: TableView>(
    views_dir: &std::path::Path,
    journal: Journal,
    view: T,
    options: ViewOptions,
) -> Result<TableViewHandle<T>, ViewError> {
    refuse_inline(T::NAME, &options)?;
    open_any_tables(views_dir, journal.into(), view, options)
}

/// The same, inline or not.
pub(crate) fn open_any_tables<T: TableView>(
    views_dir: &std::path::Path,
    sources: Sources,
    view: T,
    options: ViewOptions,
) -> Result<TableViewHandle<T>, ViewError> {
    if !generation::is_valid_name(T::NAME) {
        return Err(ViewError::InvalidName { name: T::NAME });
    }
    let program = Arc::new(Tabled::new(view));
    let tables = program.tables().clone();
    tables.check(T::NAME)?;
    let running = runner::start(views_dir, sources, Arc::clone(&program), options)?;
    let control = ViewControl::new(running, program);
    Ok(TableViewHandle { control, tables: Arc::new(tables), view: PhantomData })
}
