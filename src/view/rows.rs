//! Reading several rows: by keys, in order, in pages.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::str::FromStr;

use serde::de::DeserializeOwned;

use super::View;
use super::db::{Reader, Scan};
use super::error::ViewReadError;
use super::handle::{ViewHandle, ViewSnapshot};
use super::key::{EncodeKey, ViewKey};
use super::space::Space;
use crate::hex::from_hex;

/// Longest text that is taken for a token of a page.
const TOKEN_TEXT_MAX: usize = 128 << 10;

/// A part of what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page<T> {
    /// What is on it.
    pub items: Vec<T>,
    /// Where the next one begins; `None` if this is the last.
    pub next: Option<PageToken>,
}

/// Where a page ended, and another one goes on: hand it to [`Rows::after`] or
/// [`IndexRows::after`](super::IndexRows::after), with the same range and direction.
///
/// As text ([`Display`](fmt::Display), [`FromStr`], serde) it fits into a link. It holds the key of a row, in
/// hexadecimal: whoever may see the page may see the token. It can be forged, and does no harm: it never leads
/// out of the range that is asked for.
///
/// A page is of the moment at which it is read. Because a token is a key and not a count, rows that come and
/// go between two pages make no other row appear twice or not at all.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PageToken(Box<[u8]>);

impl PageToken {
    /// Behind the row, or the entry of an index, under this key in the database.
    pub(crate) fn behind(key: &[u8]) -> Self {
        Self(key.into())
    }

    pub(super) fn key(&self) -> Box<[u8]> {
        self.0.clone()
    }
}

impl fmt::Display for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PageToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageToken({self})")
    }
}

/// A text that isn't a [`PageToken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not the token of a page")]
pub struct InvalidPageToken;

impl FromStr for PageToken {
    type Err = InvalidPageToken;

    fn from_str(text: &str) -> Result<Self, InvalidPageToken> {
        if text.is_empty() || text.len() > TOKEN_TEXT_MAX {
            return Err(InvalidPageToken);
        }
        from_hex(text).map(|key| Self(key.into())).ok_or(InvalidPageToken)
    }
}

impl serde::Serialize for PageToken {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PageToken {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Takes a page of a scan; `key` is that of what was returned last.
pub(super) fn page_of<T, I>(
    rows: &mut I,
    limit: usize,
    key: impl Fn(&I) -> Option<&[u8]>,
) -> Result<Page<T>, ViewReadError>
where
    I: Iterator<Item = Result<T, ViewReadError>>,
{
    let items = rows.take(limit.max(1)).collect::<Result<Vec<T>, _>>()?;
    let last = key(rows).map(PageToken::behind);
    let next = if rows.next().transpose()?.is_some() { last } else { None };
    Ok(Page { items, next })
}

impl<V: View> ViewHandle<V> {
    /// The rows under `keys`, in their order, read in one call and as of one moment.
    ///
    /// To read your own write, ask a [`snapshot_at_least`](Self::snapshot_at_least).
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or a row is of another type.
    pub fn multi_get<'q, Q>(
        &self,
        keys: impl IntoIterator<Item = &'q Q>,
    ) -> Result<Vec<Option<V::Row>>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized + 'q,
    {
        let reader = self.shared().db().snapshot();
        Space::of::<V>().multi_get(&reader, &stored_keys::<V, Q>(keys))
    }
}

impl<V: View> ViewSnapshot<V> {
    /// The rows under `keys`, in their order, read in one call.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or a row is of another type.
    pub fn multi_get<'q, Q>(
        &self,
        keys: impl IntoIterator<Item = &'q Q>,
    ) -> Result<Vec<Option<V::Row>>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized + 'q,
    {
        Space::of::<V>().multi_get(self.reader(), &stored_keys::<V, Q>(keys))
    }
}

fn stored_keys<'q, V: View, Q: EncodeKey<V::Key> + ?Sized + 'q>(
    keys: impl IntoIterator<Item = &'q Q>,
) -> Vec<Vec<u8>> {
    let stored = |key: &Q| Space::of::<V>().key(|out| key.encode_key_into(out));
    keys.into_iter().map(stored).collect()
}

/// Rows in the order of their keys, or in the [reverse](Rows::rev). Stable: what is applied after its creation
/// isn't seen.
#[must_use = "an iterator reads nothing until it is used"]
pub struct Rows<K, R> {
    scan: Scan,
    space: Space,
    types: PhantomData<fn() -> (K, R)>,
}

impl<K, R> fmt::Debug for Rows<K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("view", &self.space.view).finish_non_exhaustive()
    }
}

impl<K: ViewKey, R: DeserializeOwned> Rows<K, R> {
    pub(super) fn new(reader: &Reader, space: Space, range: Range<Vec<u8>>) -> Self {
        Self { scan: reader.scan(range), space, types: PhantomData }
    }

    /// The same, from the end to the beginning: `view.range(..).rev().take(20)` are the last twenty. After some
    /// were taken: what is left.
    pub fn rev(mut self) -> Self {
        self.scan.reverse();
        self
    }

    /// Goes on behind the page that gave `token`, in this direction. A token from elsewhere doesn't lead out of
    /// the range.
    pub fn after(mut self, token: &PageToken) -> Self {
        self.scan.skip_to(token.key());
        self
    }

    /// The next `limit` rows (at least one), and where the page behind them begins.
    ///
    /// # Errors
    /// [`ViewReadError`].
    pub fn page(mut self, limit: usize) -> Result<Page<(K, R)>, ViewReadError> {
        page_of(&mut self, limit, |it| it.scan.key())
    }
}

impl<K: ViewKey, R: DeserializeOwned> Iterator for Rows<K, R> {
    type Item = Result<(K, R), ViewReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.scan.next()?.map_err(ViewReadError::from);
        let space = self.space;
        Some(entry.and_then(|(key, row)| Ok((space.decode_key(&key)?, space.decode_row(&row)?))))
    }
}
