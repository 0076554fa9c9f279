//! Secondary indexes: rows found by what is in them.
//!
//! ```text
//!                    fold ──▶ old row, new row
//!                                │        │ keys()
//!  entries of the old row ◀──────┘        └──────▶ entries of the new row
//!           │                                             │
//!           └─ in the old only: deleted   in the new only: put ─┘  with the row and the checkpoint,
//!                                                                  in one write batch
//! ```
//!
//! Invariants:
//! - At every checkpoint the entries are exactly those that the rows make.
//! - A generation keeps the set of indexes that it was built with; another set means another generation.

use std::any::TypeId;
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Bound, Range, RangeBounds};

use super::db::{
    Identity, Reader, Scan, behind_prefix, in_index_entry, index_entry, index_prefix, row_key,
};
use super::error::{ViewError, ViewReadError};
use super::handle::{ViewHandle, ViewSnapshot};
#[cfg(feature = "cli")]
use super::key::KeySpelling;
use super::key::{EncodeKey, KeyPrefix, ViewKey, decode_all};
use super::rows::{Page, PageToken, page_of};
use super::space::Space;
use super::{Keys, View};

/// How many indexes a view may have.
const INDEXES_MAX: usize = 64;
/// Longest name of an index in bytes.
const NAME_BYTES_MAX: usize = 64;

/// A way to find rows of the view `V` by keys of type `K` that are made from them.
///
/// Declare it as a constant, name it in [`View::indexes`], and read with [`ViewHandle::by_index`]; a key of
/// another type doesn't compile. Several rows may have the same index key, and a row none, one or several.
///
/// ```
/// use headwater::view::{Fold, FoldError, Index, Indexes, Keys, View};
/// use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
/// # use std::time::Duration;
/// # use serde::{Deserialize, Serialize};
/// #
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Moved { pub customer: u32, pub city: String }
/// #
/// # headwater::events! {
/// #     /// What happens to customers.
/// #     pub enum CustomerEvent { Moved(Moved) = "customer.moved", version 1; }
/// # }
///
/// /// Where each customer lives.
/// struct Homes;
///
/// /// Customers by city.
/// const BY_CITY: Index<Homes, String> =
///     Index::new("by_city", |_customer, city: &String, keys| keys.add(city.clone()));
///
/// impl View for Homes {
///     const NAME: &'static str = "homes";
///     const VERSION: u32 = 1;
///     type Key = u32;
///     type Row = String;
///     type Event = CustomerEvent;
/// #
/// #   fn route(&self, event: &Recorded<CustomerEvent>, keys: &mut Keys<u32>) {
/// #       let CustomerEvent::Moved(moved) = event.data();
/// #       keys.add(moved.customer);
/// #   }
/// #
/// #   fn fold(
/// #       &self,
/// #       _: &u32,
/// #       _: Option<String>,
/// #       event: &Recorded<CustomerEvent>,
/// #   ) -> Result<Fold<String>, FoldError> {
/// #       let CustomerEvent::Moved(moved) = event.data();
/// #       Ok(Fold::Put(moved.city.clone()))
/// #   }
///
///     fn indexes(&self) -> Indexes<Self> {
///         Indexes::none().with(BY_CITY)
///     }
///     // … and `route` and `fold`
/// }
///
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(dir.path().join("shop"))?;
/// let homes = store.view(Homes)?;
/// # let stream = StreamId::new("customers")?;
/// # let moved = |customer, city: &str| {
/// #     NewEvent::typed(&CustomerEvent::from(Moved { customer, city: city.into() }))
/// # };
/// # let events = [moved(1, "Bern")?, moved(2, "Basel")?, moved(3, "Bern")?];
/// # let appended = store.append(&Append::to(&stream, ExpectedRevision::Any, events))?;
/// # homes.wait_for(&appended.token(), Duration::from_secs(10))?;
/// let in_bern: Result<Vec<_>, _> = homes.by_index(BY_CITY)?.get("Bern").collect();
/// let customers: Vec<u32> = in_bern?.into_iter().map(|(_city, customer, _row)| customer).collect();
/// assert_eq!(customers, [1, 3]);
///
/// // The last two cities, from the end of the alphabet.
/// let page = homes.by_index(BY_CITY)?.range(..).rev().page(2)?;
/// assert_eq!(page.items.len(), 2);
/// assert!(page.next.is_some(), "there is more");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// The function that makes the keys is a part of the view's code: pure, and with a new [`View::VERSION`] when
/// it changes. (Or give the changed index another name: that makes a new generation as well.)
pub struct Index<V: View, K> {
    name: &'static str,
    keys: fn(&V::Key, &V::Row, &mut Keys<K>),
}

impl<V: View, K> Clone for Index<V, K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V: View, K> Copy for Index<V, K> {}

impl<V: View, K> fmt::Debug for Index<V, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Index").field("view", &V::NAME).field("name", &self.name).finish()
    }
}

impl<V: View, K: ViewKey + 'static> Index<V, K> {
    /// An index with a stable name (1 to 64 of `a-z`, `0-9`, `-` and `_`), and the keys of a row in it. A key
    /// named twice counts once.
    #[must_use]
    pub const fn new(name: &'static str, keys: fn(&V::Key, &V::Row, &mut Keys<K>)) -> Self {
        Self { name, keys }
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }
}

/// The indexes that a view keeps; see [`View::indexes`].
pub struct Indexes<V: View> {
    declared: Vec<Declared<V>>,
}

impl<V: View> fmt::Debug for Indexes<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.declared.iter().map(|it| it.name)).finish()
    }
}

/// Makes the keys of a row's entries.
type Entries<V> = Box<
    dyn Fn(u8, &<V as View>::Key, &[u8], &<V as View>::Row, &mut BTreeSet<Vec<u8>>) + Send + Sync,
>;

struct Declared<V: View> {
    name: &'static str,
    key_type: TypeId,
    #[cfg(feature = "cli")]
    spelling: KeySpelling,
    entries: Entries<V>,
}

impl<V: View> Indexes<V> {
    /// No index.
    #[must_use]
    pub const fn none() -> Self {
        Self { declared: Vec::new() }
    }

    /// And this one. The order doesn't matter.
    #[must_use]
    pub fn with<K: ViewKey + 'static>(mut self, index: Index<V, K>) -> Self {
        let make = index.keys;
        let entries: Entries<V> = Box::new(move |number, key, row_key, row, entries| {
            let mut keys = Keys::none();
            make(key, row, &mut keys);
            let entry = |key: K| index_entry(number, |out| key.encode_key(out), row_key);
            entries.extend(keys.0.into_iter().map(entry));
        });
        self.declared.push(Declared {
            name: index.name,
            key_type: TypeId::of::<K>(),
            #[cfg(feature = "cli")]
            spelling: KeySpelling::of::<K>(),
            entries,
        });
        self
    }

    /// The view's indexes in the order of their numbers, which is that of their names.
    pub(super) fn of(view: &V) -> Self {
        let mut indexes = view.indexes();
        indexes.declared.sort_by_key(|it| it.name);
        indexes
    }

    /// What a generation with these indexes is.
    pub(super) fn identity(&self) -> Identity {
        let indexes = self.declared.iter().map(|it| it.name).collect();
        Identity { name: V::NAME, version: V::VERSION, indexes, tables: Vec::new() }
    }

    pub(super) fn check(&self) -> Result<(), ViewError> {
        let names: Vec<_> = self.declared.iter().map(|it| it.name).collect();
        let checked = check_names(&names, INDEXES_MAX);
        checked.map_err(|(index, reason)| ViewError::InvalidIndex { view: V::NAME, index, reason })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.declared.is_empty()
    }

    /// The database keys of all entries of a row, in their order.
    pub(super) fn entries(&self, key: &V::Key, row_key: &[u8], row: &V::Row) -> BTreeSet<Vec<u8>> {
        let mut entries = BTreeSet::new();
        for (number, index) in (0_u8..).zip(&self.declared) {
            (index.entries)(number, key, row_key, row, &mut entries);
        }
        entries
    }

    /// How the keys of each are written, by name.
    #[cfg(feature = "cli")]
    pub(super) fn spellings(&self) -> Vec<(&'static str, KeySpelling)> {
        self.declared.iter().map(|it| (it.name, it.spelling)).collect()
    }

    pub(super) fn number<K: 'static>(&self, index: Index<V, K>) -> Result<u8, ViewReadError> {
        let mut numbered = (0_u8..).zip(&self.declared);
        let is_it = |it: &Declared<V>| it.name == index.name && it.key_type == TypeId::of::<K>();
        let found = numbered.find(|(_, it)| is_it(it));
        found
            .map(|(number, _)| number)
            .ok_or(ViewReadError::NoIndex { view: V::NAME, index: index.name })
    }
}

/// Whether these can be the names of indexes or tables, which are sorted; if not, which one and why.
pub(super) fn check_names(
    names: &[&'static str],
    count_max: usize,
) -> Result<(), (&'static str, &'static str)> {
    let plain = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
    };
    let is_valid =
        |name: &str| !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(plain);
    if let Some(name) = names.iter().find(|name| !is_valid(name)) {
        return Err((name, "its name must be 1 to 64 of a-z, 0-9, '-' and '_'"));
    }
    for pair in names.windows(2) {
        if let [a, b] = pair
            && a == b
        {
            return Err((a, "there are two of this name"));
        }
    }
    match names.get(count_max) {
        Some(name) => Err((name, "there are more than 64")),
        None => Ok(()),
    }
}

impl<V: View> ViewHandle<V> {
    /// Reads by an index, as of now: entries and rows are of the same moment.
    ///
    /// To read your own write, use [`snapshot_at_least`](Self::snapshot_at_least) and
    /// [`ViewSnapshot::by_index`].
    ///
    /// # Errors
    /// [`ViewReadError::NoIndex`] if [`View::indexes`] doesn't name this index.
    pub fn by_index<K: ViewKey + 'static>(
        &self,
        index: Index<V, K>,
    ) -> Result<IndexReader<V, K>, ViewReadError> {
        IndexReader::new(self.shared().db().snapshot(), self.indexes(), index)
    }
}

impl<V: View> ViewSnapshot<V> {
    /// Reads by an index.
    ///
    /// # Errors
    /// [`ViewReadError::NoIndex`] if [`View::indexes`] doesn't name this index.
    pub fn by_index<K: ViewKey + 'static>(
        &self,
        index: Index<V, K>,
    ) -> Result<IndexReader<V, K>, ViewReadError> {
        IndexReader::new(self.reader().clone(), self.indexes(), index)
    }
}

/// Reads rows by an index, all as of one moment. What it returns is in the order of the index keys, then of
/// the rows' keys.
pub struct IndexReader<V: View, K> {
    reader: Reader,
    index: Index<V, K>,
    number: u8,
}

impl<V: View, K> fmt::Debug for IndexReader<V, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexReader").field("index", &self.index).finish_non_exhaustive()
    }
}

impl<V: View, K: ViewKey + 'static> IndexReader<V, K> {
    fn new(
        reader: Reader,
        indexes: &Indexes<V>,
        index: Index<V, K>,
    ) -> Result<Self, ViewReadError> {
        Ok(Self { reader, index, number: indexes.number(index)? })
    }

    /// The rows that have exactly this index key.
    pub fn get<Q: EncodeKey<K> + ?Sized>(&self, key: &Q) -> IndexRows<V, K> {
        self.begins_with(|out| key.encode_key_into(out))
    }

    /// The row that has this index key, if there is one.
    ///
    /// # Errors
    /// [`ViewReadError::NotUnique`] if there are several; others if they can't be read.
    pub fn unique<Q>(&self, key: &Q) -> Result<Option<(V::Key, V::Row)>, ViewReadError>
    where
        Q: EncodeKey<K> + ?Sized,
    {
        let mut rows = self.get(key);
        let Some((_, key, row)) = rows.next().transpose()? else { return Ok(None) };
        match rows.next().transpose()? {
            None => Ok(Some((key, row))),
            Some(_) => Err(ViewReadError::NotUnique { view: V::NAME, index: self.index.name }),
        }
    }

    /// The rows with index keys in `range`.
    pub fn range<R: RangeBounds<K>>(&self, range: R) -> IndexRows<V, K> {
        let at = |key: &K| {
            let mut out = index_prefix(self.number);
            key.encode_key(&mut out);
            out
        };
        let start = match range.start_bound() {
            Bound::Included(key) => at(key),
            Bound::Excluded(key) => behind_prefix(&at(key)),
            Bound::Unbounded => index_prefix(self.number),
        };
        let end = match range.end_bound() {
            Bound::Included(key) => behind_prefix(&at(key)),
            Bound::Excluded(key) => at(key),
            Bound::Unbounded => behind_prefix(&index_prefix(self.number)),
        };
        self.rows(start..end)
    }

    /// The rows whose index keys begin with the fields `prefix`.
    pub fn prefix<P: KeyPrefix<K>>(&self, prefix: &P) -> IndexRows<V, K> {
        self.begins_with(|out| prefix.encode_prefix(out))
    }

    fn begins_with(&self, encode: impl FnOnce(&mut Vec<u8>)) -> IndexRows<V, K> {
        let mut start = index_prefix(self.number);
        encode(&mut start);
        let end = behind_prefix(&start);
        self.rows(start..end)
    }

    fn rows(&self, range: Range<Vec<u8>>) -> IndexRows<V, K> {
        IndexRows { scan: self.reader.scan(range), reader: self.reader.clone(), types: PhantomData }
    }
}

/// Index keys, row keys and rows in the order of the index keys, then of the row keys; all as of one moment.
#[must_use = "an iterator reads nothing until it is used"]
pub struct IndexRows<V: View, K> {
    reader: Reader,
    scan: Scan,
    types: PhantomData<fn() -> (V, K)>,
}

impl<V: View, K> fmt::Debug for IndexRows<V, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IndexRows").field("name", &V::NAME).finish_non_exhaustive()
    }
}

/// A row found by an index: index key, key, row.
type Found<V, K> = (K, <V as View>::Key, <V as View>::Row);

impl<V: View, K: ViewKey> IndexRows<V, K> {
    /// The same, from the end to the beginning. After some were taken: what is left.
    pub fn rev(mut self) -> Self {
        self.scan.reverse();
        self
    }

    /// Goes on behind the page that gave `token`, in this direction. A token from elsewhere doesn't lead out
    /// of what is asked for.
    pub fn after(mut self, token: &PageToken) -> Self {
        self.scan.skip_to(token.key());
        self
    }

    /// The next `limit` rows (at least one), and where the page behind them begins.
    ///
    /// # Errors
    /// [`ViewReadError`].
    pub fn page(mut self, limit: usize) -> Result<Page<Found<V, K>>, ViewReadError> {
        page_of(&mut self, limit, |it| it.scan.key())
    }

    fn found(&self, entry: &[u8]) -> Result<Found<V, K>, ViewReadError> {
        let wrong = |source| ViewReadError::Key { view: V::NAME, source };
        let mut input = in_index_entry(entry);
        let index_key = K::decode_key(&mut input).map_err(wrong)?;
        let stored = self.reader.get(&row_key(|out| out.extend_from_slice(input)))?;
        let row = stored.ok_or_else(|| self.reader.db().entry_without_row())?;
        let key = decode_all(input).map_err(wrong)?;
        Ok((index_key, key, Space::of::<V>().decode_row(row.as_ref())?))
    }
}

impl<V: View, K: ViewKey> Iterator for IndexRows<V, K> {
    type Item = Result<Found<V, K>, ViewReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.scan.next()?;
        Some(entry.map_err(ViewReadError::from).and_then(|(entry, _)| self.found(&entry)))
    }
}
