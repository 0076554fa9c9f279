//! Reading a view.

use std::ops::{Deref, RangeBounds};
use std::sync::Arc;
use std::time::Duration;

use super::View;
use super::control::ViewControl;
use super::db::{Db, Reader, StorageError, row_key};
use super::error::ViewReadError;
use super::index::Indexes;
use super::key::{EncodeKey, KeyPrefix};
use super::poison::{checked, lacking};
use super::rows::Rows;
use super::runner::{Shared, nothing};
use super::sources::Checkpoints;
use super::space::Space;
use crate::position::{Checkpoint, Token};

/// An open view. Cheap to clone; the view is closed when the last clone is dropped.
///
/// Reads see what is applied, never wait for the fold, and go on when the view has stopped or was closed.
///
/// ```
/// # use std::time::Duration;
/// # use headwater::view::{Fold, FoldError, Keys, View};
/// # use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
/// /// How many events each stream has.
/// struct Count;
///
/// impl View for Count {
///     const NAME: &'static str = "count";
///     const VERSION: u32 = 1;
///     type Key = StreamId;
///     type Row = u64;
///     type Event = Vec<u8>; // every event, undecoded
///
///     fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
///         keys.add(event.stream().clone());
///     }
///
///     fn fold(
///         &self,
///         _: &StreamId,
///         count: Option<u64>,
///         _: &Recorded<Vec<u8>>,
///     ) -> Result<Fold<u64>, FoldError> {
///         Ok(Fold::Put(count.unwrap_or(0) + 1))
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::create(dir.path().join("orders"))?;
/// let count = store.view(Count)?;
/// let order = StreamId::new("order-7")?;
/// let placed = NewEvent::json("order.placed", &1250)?;
/// let appended = store.append(&Append::to(&order, ExpectedRevision::Any, [placed]))?;
///
/// // Read your write: wait until the view has applied it.
/// let patience = Duration::from_secs(10);
/// assert_eq!(count.get_at_least("order-7", &appended.token(), patience)?, Some(1));
///
/// // Several rows of one moment, and which moment it is.
/// let snapshot = count.snapshot()?;
/// let rows: Result<Vec<_>, _> = snapshot.range(..).collect();
/// assert_eq!(rows?, [(order, 1)]);
/// assert_eq!(snapshot.checkpoint().position, appended.token().position);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ViewHandle<V: View> {
    control: ViewControl,
    indexes: Arc<Indexes<V>>,
}

impl<V: View> Clone for ViewHandle<V> {
    fn clone(&self) -> Self {
        Self { control: self.control.clone(), indexes: self.indexes.clone() }
    }
}

/// What all kinds of views have in common.
impl<V: View> Deref for ViewHandle<V> {
    type Target = ViewControl;

    fn deref(&self) -> &ViewControl {
        &self.control
    }
}

impl<V: View> std::fmt::Debug for ViewHandle<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ViewHandle")
            .field("name", &V::NAME)
            .field("version", &V::VERSION)
            .field("checkpoint", &self.checkpoint())
            .finish_non_exhaustive()
    }
}

impl<V: View> ViewHandle<V> {
    pub(super) fn new(control: ViewControl, indexes: Indexes<V>) -> Self {
        Self { control, indexes: Arc::new(indexes) }
    }

    pub(super) fn indexes(&self) -> &Indexes<V> {
        &self.indexes
    }

    /// The row under `key`; of a [parked](Self::parked) key, as it was in front of the first event that is
    /// parked. While the rows are made for the first time, `None` may mean that this one isn't made yet. Of both tells
    /// [`get_checked`](Self::get_checked).
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get<Q>(&self, key: &Q) -> Result<Option<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let space = Space::of::<V>();
        let key = space.key(|out| key.encode_key_into(out));
        let row = |db: &Db| db.get(&key)?.map(|row| space.decode_row(row.as_ref())).transpose();
        self.shared().with_db(row)
    }

    /// The row under `key` once the view has applied what `token` stands for: read your own write, or that
    /// of the service that handed you the token. Blocks for `timeout` at most.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for`](ViewControl::wait_for) says;
    /// [`ViewReadError::Degraded`] if an event in front of the token is parked and the row lacks it, or may.
    pub fn get_at_least<Q>(
        &self,
        key: &Q,
        token: &Token,
        timeout: Duration,
    ) -> Result<Option<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        self.wait_for(token, timeout)?;
        if self.shared().state().applied.parked.is_empty() {
            return self.get(key);
        }
        let space = Space::of::<V>();
        let key = space.key(|out| key.encode_key_into(out));
        let reader = self.shared().db().snapshot();
        match lacking(&reader, &key, token)? {
            Some(degraded) => Err(ViewReadError::Degraded { view: V::NAME, degraded }),
            None => space.get(&reader, &key),
        }
    }

    /// The row under `key` once the view has applied everything that is durable in its journal now. Blocks for `timeout`
    /// at most.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for_latest`](ViewControl::wait_for_latest) says;
    /// [`ViewReadError::Degraded`] if an event is parked and the row lacks it, or may.
    pub fn get_latest<Q>(&self, key: &Q, timeout: Duration) -> Result<Option<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        self.wait_for_latest(timeout)?;
        if self.shared().state().applied.parked.is_empty() {
            return self.get(key);
        }
        let key = row_key(|out| key.encode_key_into(out));
        let checked = checked::<V>(&self.shared().db().snapshot(), &key)?;
        match checked.degraded {
            Some(degraded) => Err(ViewReadError::Degraded { view: V::NAME, degraded }),
            None => Ok(checked.row),
        }
    }

    /// The rows with keys in `range`, in the order of their keys, as of now. Holds one row at a time.
    ///
    /// # Errors
    /// None here; each item may be a [`ViewReadError`].
    pub fn range<R: RangeBounds<V::Key>>(&self, range: R) -> Rows<V::Key, V::Row> {
        let space = Space::of::<V>();
        Rows::new(&self.shared().db().latest(), space, space.range(&range))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys, as of now.
    pub fn prefix<P: KeyPrefix<V::Key>>(&self, prefix: &P) -> Rows<V::Key, V::Row> {
        let space = Space::of::<V>();
        Rows::new(&self.shared().db().latest(), space, space.prefix(prefix))
    }

    /// The view as of now, for several reads that belong together.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails.
    pub fn snapshot(&self) -> Result<ViewSnapshot<V>, ViewReadError> {
        let shared = self.shared();
        let reader = shared.db().snapshot();
        let checkpoints = checkpoints_of(shared, &reader)?;
        Ok(ViewSnapshot { reader, checkpoints, indexes: Arc::clone(&self.indexes) })
    }

    /// A [`snapshot`](Self::snapshot) once the view has applied what `token` stands for.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for`](ViewControl::wait_for) says.
    pub fn snapshot_at_least(
        &self,
        token: &Token,
        timeout: Duration,
    ) -> Result<ViewSnapshot<V>, ViewReadError> {
        self.wait_for(token, timeout)?;
        self.snapshot()
    }

    /// A [`snapshot`](Self::snapshot) once the view has applied everything that is durable in its journal now. Rows of
    /// which something is [parked](Self::parked) lack it.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for_latest`](ViewControl::wait_for_latest) says.
    pub fn snapshot_latest(&self, timeout: Duration) -> Result<ViewSnapshot<V>, ViewReadError> {
        self.wait_for_latest(timeout)?;
        self.snapshot()
    }
}

/// What a reader's rows are of.
pub(super) fn checkpoints_of(
    shared: &Shared,
    reader: &Reader,
) -> Result<Checkpoints, StorageError> {
    let progress = reader.progress(shared.sources.ids())?;
    Ok(progress.unwrap_or_else(|| nothing(&shared.sources)).checkpoints)
}

/// A view as of one moment: all reads are of the same checkpoint.
pub struct ViewSnapshot<V: View> {
    reader: Reader,
    checkpoints: Checkpoints,
    indexes: Arc<Indexes<V>>,
}

impl<V: View> std::fmt::Debug for ViewSnapshot<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ViewSnapshot")
            .field("name", &V::NAME)
            .field("checkpoint", &self.checkpoint())
            .finish_non_exhaustive()
    }
}

impl<V: View> ViewSnapshot<V> {
    pub(super) const fn reader(&self) -> &Reader {
        &self.reader
    }

    pub(super) fn indexes(&self) -> &Indexes<V> {
        &self.indexes
    }

    /// The row under `key`.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get<Q>(&self, key: &Q) -> Result<Option<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let space = Space::of::<V>();
        space.get(&self.reader, &space.key(|out| key.encode_key_into(out)))
    }

    /// The rows with keys in `range`, in the order of their keys. Holds one row at a time.
    pub fn range<R: RangeBounds<V::Key>>(&self, range: R) -> Rows<V::Key, V::Row> {
        let space = Space::of::<V>();
        Rows::new(&self.reader, space, space.range(&range))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys.
    pub fn prefix<P: KeyPrefix<V::Key>>(&self, prefix: &P) -> Rows<V::Key, V::Row> {
        let space = Space::of::<V>();
        Rows::new(&self.reader, space, space.prefix(prefix))
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
