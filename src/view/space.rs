//! Where rows of one type lie in a view's database.

use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::View;
use super::db::{ROWS, Reader, behind_prefix};
use super::error::ViewReadError;
use super::key::{KeyPrefix, ViewKey, decode_all};
use crate::codec::{Bincode, Codec};

/// The rows of a keyed view, or of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) view: &'static str,
    table: Option<u8>,
}

impl Space {
    pub(super) const fn of<V: View>() -> Self {
        Self { view: V::NAME, table: None }
    }

    pub(super) const fn of_table(view: &'static str, number: u8) -> Self {
        Self { view, table: Some(number) }
    }

    /// With what the keys of all its rows begin.
    fn begin(self) -> Vec<u8> {
        [ROWS].into_iter().chain(self.table).collect()
    }

    /// The database key of a row.
    pub(super) fn key(self, encode: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut key = self.begin();
        encode(&mut key);
        key
    }

    /// Whether the row under this database key is one of these.
    pub(super) fn holds(self, key: &[u8]) -> bool {
        key.starts_with(&self.begin())
    }

    /// What a database key says.
    pub(super) fn decode_key<K: ViewKey>(self, key: &[u8]) -> Result<K, ViewReadError> {
        let begin = 1 + usize::from(self.table.is_some());
        decode_all(key.get(begin..).unwrap_or_default())
            .map_err(|source| ViewReadError::Key { view: self.view, source })
    }

    pub(super) fn decode_row<R: DeserializeOwned>(self, row: &[u8]) -> Result<R, ViewReadError> {
        Bincode::decode(row)
            .map_err(|source| ViewReadError::Row { view: self.view, source: Arc::new(source) })
    }

    /// The row under a database key.
    pub(super) fn get<R: DeserializeOwned>(
        self,
        reader: &Reader,
        key: &[u8],
    ) -> Result<Option<R>, ViewReadError> {
        let row = reader.get(key)?;
        row.map(|row| self.decode_row(row.as_ref())).transpose()
    }

    /// The rows under database keys, in their order.
    pub(super) fn multi_get<R: DeserializeOwned>(
        self,
        reader: &Reader,
        keys: &[Vec<u8>],
    ) -> Result<Vec<Option<R>>, ViewReadError> {
        let rows = reader.multi_get(keys)?.into_iter();
        rows.map(|row| row.map(|row| self.decode_row(&row)).transpose()).collect()
    }

    /// The database keys of a range.
    pub(super) fn range<K: ViewKey>(self, range: &impl RangeBounds<K>) -> Range<Vec<u8>> {
        let key = |key: &K| self.key(|out| key.encode_key(out));
        // No key's bytes begin with another's: nothing lies between a key and what is behind it as a prefix.
        let start = match range.start_bound() {
            Bound::Included(first) => key(first),
            Bound::Excluded(before) => behind_prefix(&key(before)),
            Bound::Unbounded => self.begin(),
        };
        let end = match range.end_bound() {
            Bound::Included(last) => behind_prefix(&key(last)),
            Bound::Excluded(end) => key(end),
            Bound::Unbounded => behind_prefix(&self.begin()),
        };
        start..end
    }

    /// The database keys that begin with these fields.
    pub(super) fn prefix<K: ViewKey>(self, prefix: &impl KeyPrefix<K>) -> Range<Vec<u8>> {
        let start = self.key(|out| prefix.encode_prefix(out));
        let end = behind_prefix(&start);
        start..end
    }
}
