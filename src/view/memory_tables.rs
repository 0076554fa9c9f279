//! The tables of a view in memory, for the tests of its author.
//!
//! ```text
//! stored events ──decode──▶ events ──apply, one after the other──▶ what each has written ──▶ one ordered map
//!                                       ▲ reads: the event's own writes, the map
//! ```
//! An event is applied by the code of the real view, on its own transaction, below which there is no database: what the
//! events in front have written is all there is. Rows and keys are kept as the bytes that RocksDB would get.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::chunk::guard;
use super::error::{EventFailure, ViewError, ViewReadError};
use super::key::{EncodeKey, ViewKey};
use super::poison::reason_of;
use super::space::Space;
pub(crate) use super::tables::Written;
use super::tables::{Failure, apply};
use super::{Table, TableView, Tables, generation};
use crate::codec::{Bincode, Codec};
use crate::event::Recorded;
use crate::position::Position;

/// The tables of a view, as of some events.
pub(crate) struct MemoryTables {
    tables: Tables,
    pub(crate) kept: KeptTables,
}

/// What is in the tables, and what is parked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeptTables {
    /// By the key under which the row would lie in the database.
    rows: Written,
    /// Events that can't be decoded or applied, and why.
    pub(crate) parked: Vec<(Position, String)>,
    /// The view would have stopped here: a table isn't declared, or what it has stored can't be read back.
    pub(crate) stopped: Option<(Position, String)>,
}

/// What a stored event stands for; none if the view doesn't know its type.
pub(crate) type Understood<E> = Result<Option<Vec<Recorded<E>>>, EventFailure>;

/// What becomes of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It wrote this. What is there already isn't named.
    Applied(Written),
    /// It is of a type that the view doesn't know.
    Skipped,
    Parked(String),
    Stops(String),
}

/// Decodes an event as the view does.
pub(crate) fn understand<T: TableView>(stored: &Recorded) -> Understood<T::Event> {
    let decoded = guard(|| stored.decode::<T::Event>())?.map_err(EventFailure::Payload)?;
    Ok((!decoded.is_foreign()).then(|| decoded.into_iter().collect()))
}

impl MemoryTables {
    /// Nothing in them. The view is looked at as when it is opened.
    pub(crate) fn new<T: TableView>(view: &T) -> Result<Self, ViewError> {
        if !generation::is_valid_name(T::NAME) {
            return Err(ViewError::InvalidName { name: T::NAME });
        }
        let tables = view.tables().sorted();
        tables.check(T::NAME)?;
        Ok(Self { tables, kept: KeptTables::default() })
    }

    /// Applies an event, for a second time if it fails, as the view does.
    pub(crate) fn apply<T: TableView>(&mut self, view: &T, stored: &Recorded) {
        let event = understand::<T>(stored);
        let mut fate = self.fate(view, &event);
        if matches!(fate, Fate::Parked(_) | Fate::Stops(_)) {
            fate = self.fate(view, &event);
        }
        self.keep(stored.position(), fate);
    }

    /// What becomes of an event, tried once. It leaves nothing.
    pub(crate) fn fate<T: TableView>(&self, view: &T, event: &Understood<T::Event>) -> Fate {
        let events = match event {
            Ok(Some(events)) => events,
            Ok(None) => return Fate::Skipped,
            Err(cause) => return Fate::Parked(reason_of(cause)),
        };
        match apply(view, &self.tables, events, None, &self.kept.rows) {
            Ok(mut written) => {
                written.retain(|key, row| self.stored(key) != row.as_deref());
                Fate::Applied(written)
            }
            Err((_, Failure::Event(cause))) if !cause.is_of_the_rows() => {
                Fate::Parked(reason_of(&cause))
            }
            Err((_, Failure::Event(cause))) => Fate::Stops(reason_of(&cause)),
            Err((_, Failure::Storage(error))) => Fate::Stops(error.to_string()),
        }
    }

    /// And so it is. Nothing more is applied where the view has stopped.
    pub(crate) fn keep(&mut self, position: Position, fate: Fate) {
        if self.kept.stopped.is_some() {
            return;
        }
        match fate {
            Fate::Applied(written) => {
                for (key, row) in written {
                    match row {
                        Some(row) => self.kept.rows.insert(key, Some(row)),
                        None => self.kept.rows.remove(&key),
                    };
                }
            }
            Fate::Skipped => {}
            Fate::Parked(reason) => self.kept.parked.push((position, reason)),
            Fate::Stops(reason) => self.kept.stopped = Some((position, reason)),
        }
    }

    /// What is stored under a database key.
    pub(crate) fn stored(&self, key: &[u8]) -> Option<&[u8]> {
        self.kept.rows.get(key)?.as_deref()
    }

    pub(crate) fn get<T: TableView, K, R, Q>(
        &self,
        table: Table<K, R>,
        key: &Q,
    ) -> Result<Option<R>, ViewReadError>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let space = self.space::<T, K, R>(table)?;
        let row = self.stored(&space.key(|out| key.encode_key_into(out)));
        row.map(|row| space.decode_row(row)).transpose()
    }

    /// The rows of a table, in the order of their keys.
    pub(crate) fn rows<T: TableView, K, R>(
        &self,
        table: Table<K, R>,
    ) -> Result<Vec<(K, R)>, ViewReadError>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
    {
        let space = self.space::<T, K, R>(table)?;
        let rows = self.kept.rows.range(space.range::<K>(&(..)));
        let rows = rows.filter_map(|(key, row)| Some((key, row.as_deref()?)));
        rows.map(|(key, row)| Ok((space.decode_key(key)?, space.decode_row(row)?))).collect()
    }

    fn space<T: TableView, K: 'static, R: 'static>(
        &self,
        table: Table<K, R>,
    ) -> Result<Space, ViewReadError> {
        let number = self.tables.number(table);
        let number = number.ok_or(ViewReadError::NoTable { view: T::NAME, table: table.name() })?;
        Ok(Space::of_table(T::NAME, number))
    }

    /// The table of a row, and its key as people read it.
    pub(crate) fn shown_key(&self, key: &[u8]) -> (Option<&'static str>, String) {
        let Some((table, reading)) = self.tables.reading(key) else {
            return (None, format!("{key:02x?}"));
        };
        let read = (reading.key)(key);
        (Some(table), read.map_or_else(|error| format!("{key:02x?} ({error})"), |it| it.shown))
    }

    /// A row as people read it, and its bytes.
    pub(crate) fn shown_row(&self, key: &[u8], row: Option<&[u8]>) -> String {
        let Some(bytes) = row else { return "no row".to_owned() };
        let read = self.tables.reading(key).map(|(_, reading)| (reading.row)(bytes));
        let shown = match read {
            Some(Ok(read)) => read.shown,
            Some(Err(error)) => error,
            None => String::new(),
        };
        format!("{shown}\nstored as {bytes:02x?}")
    }

    /// What is stored of a row if it is read and written again: its database key, and the row.
    pub(crate) fn again(&self, key: &[u8], row: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
        let Some((_, reading)) = self.tables.reading(key) else {
            return Err("it lies in no table".to_owned());
        };
        Ok(((reading.key)(key)?.again, (reading.row)(row)?.again))
    }
}

/// How what is in a table is read back, without its types.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    key: fn(&[u8]) -> Result<Read, String>,
    row: fn(&[u8]) -> Result<Read, String>,
}

/// What was read back: as people read it, and stored again.
struct Read {
    shown: String,
    again: Vec<u8>,
}

impl Reading {
    pub(super) fn of<K: ViewKey, R: Serialize + DeserializeOwned>() -> Self {
        let key = |stored: &[u8]| {
            // Which table it is doesn't matter here: its number is in front of the key.
            let mut again = stored.get(..2).unwrap_or_default().to_vec();
            let key = Space::of_table("", 0).decode_key::<K>(stored);
            let key = key.map_err(|error| error.to_string())?;
            key.encode_key(&mut again);
            Ok(Read { shown: key.key_to_json().to_string(), again })
        };
        let row = |stored: &[u8]| {
            let row: R = Bincode::decode(stored).map_err(|error| error.to_string())?;
            let again = Bincode::encode(&row).map_err(|error| error.to_string())?;
            // Not every row has a form in JSON.
            let shown = serde_json::to_string_pretty(&row).unwrap_or_default();
            Ok(Read { shown, again })
        };
        Self { key, row }
    }
}
