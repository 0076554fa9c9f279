//! Reading a view.

use std::ops::{Bound, Range, RangeBounds};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::View;
use super::db::{Reader, all_rows, behind_prefix, row_key};
use super::error::{StopError, ViewError, ViewReadError, WaitError};
use super::generation::Generation;
use super::index::Indexes;
use super::key::{EncodeKey, KeyPrefix, ViewKey};
use super::poison::ParkedCounts;
use super::rebuild::{
    Comparison, Digest, GenerationInfo, RebuildError, RebuildHandle, RebuildOptions, RebuildStatus,
};
use super::rows::Rows;
use super::runner::{Phase, Running, Shared, nothing};
use super::takeover::{self, Source, digest_of};
use crate::codec::{Bincode, Codec};
use crate::journal::TokenState;
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
    running: Arc<Running>,
    view: Arc<V>,
    indexes: Arc<Indexes<V>>,
}

impl<V: View> Clone for ViewHandle<V> {
    fn clone(&self) -> Self {
        let (running, view) = (self.running.clone(), self.view.clone());
        Self { running, view, indexes: self.indexes.clone() }
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

/// How far a view has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewCheckpoint {
    /// What readers see: the next event to be applied.
    pub applied: Checkpoint,
    /// What survives a crash, when it was last looked at: never more than really does.
    pub durable: Checkpoint,
}

/// How a view is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ViewStatus {
    /// What it is doing.
    pub state: ViewState,
    /// How far it has got.
    pub checkpoint: ViewCheckpoint,
    /// Where the journal ends.
    pub journal_end: Checkpoint,
    /// How many durable events of the journal, as it is on this machine, the view hasn't applied; `None`
    /// when that says nothing, because the view doesn't follow it any more. How far a mirrored journal is
    /// behind its origin is told by the mirror's status.
    pub lag_events: Option<u64>,
    /// How many of the events in front of its checkpoint were of types that it doesn't know.
    pub skipped_events: u64,
    /// How much is parked, because events can't be applied.
    pub parked: ParkedCounts,
    /// The folder of the generation that is served.
    pub generation: PathBuf,
    /// The folder of the generation that was set aside at this opening, because it was of another history
    /// than the journal, or had other indexes than the view declares. Delete it when it is of no more use.
    pub set_aside: Option<PathBuf>,
    /// The rebuild that is under way, or the building of the first generation.
    pub rebuild: Option<RebuildStatus>,
}

/// What a view is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ViewState {
    /// Its first generation is built in bulk: its rows appear all at once, when that is done.
    Building,
    /// It applies events that are there already.
    CatchingUp,
    /// It has applied all there is.
    CaughtUp,
    /// It has applied more than the mirror holds, and waits until the mirror has got as far, to compare.
    AwaitingMirror,
    /// It can't go on. Its rows are as of its checkpoint.
    Stopped(Arc<StopError>),
    /// It was closed, or its journal was, or the journal's writer failed. Its rows are as of its checkpoint.
    Closed,
}

impl<V: View> ViewHandle<V> {
    pub(super) fn new(running: Running, view: Arc<V>) -> Self {
        let indexes = Arc::new(Indexes::of(&*view));
        Self { running: Arc::new(running), view, indexes }
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.running.shared
    }

    pub(super) fn indexes(&self) -> &Indexes<V> {
        &self.indexes
    }

    /// The row under `key`; of a [parked](Self::parked) key, as it was in front of the first event that is
    /// parked. See [`get_checked`](Self::get_checked).
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get<Q>(&self, key: &Q) -> Result<Option<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let key = row_key(|out| key.encode_key_into(out));
        self.shared()
            .with_db(|db| db.get(&key)?.map(|row| decode_row::<V>(row.as_ref())).transpose())
    }

    /// The row under `key` once the view has applied what `token` stands for: read your own write, or that
    /// of the service that handed you the token. Blocks for `timeout` at most.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for`](Self::wait_for) says;
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
        let checked = self.get_checked(key)?;
        match checked.degraded.filter(|it| it.first() < token.position) {
            Some(degraded) => Err(ViewReadError::Degraded { view: V::NAME, degraded }),
            None => Ok(checked.row),
        }
    }

    /// The rows with keys in `range`, in the order of their keys, as of now. Holds one row at a time.
    ///
    /// # Errors
    /// None here; each item may be a [`ViewReadError`].
    pub fn range<R: RangeBounds<V::Key>>(&self, range: R) -> Rows<V> {
        Rows::new(&self.shared().db().latest(), row_range(&range))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys, as of now.
    pub fn prefix<P: KeyPrefix<V::Key>>(&self, prefix: &P) -> Rows<V> {
        Rows::new(&self.shared().db().latest(), prefix_range(prefix))
    }

    /// The view as of now, for several reads that belong together.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails.
    pub fn snapshot(&self) -> Result<ViewSnapshot<V>, ViewReadError> {
        let shared = self.shared();
        let reader = shared.db().snapshot();
        let progress = reader.progress(shared.journal.id())?;
        let checkpoint = progress.unwrap_or_else(|| nothing(&shared.journal)).checkpoint;
        Ok(ViewSnapshot { reader, checkpoint, indexes: Arc::clone(&self.indexes) })
    }

    /// A [`snapshot`](Self::snapshot) once the view has applied what `token` stands for.
    ///
    /// # Errors
    /// [`ViewReadError::Wait`] if the view hasn't got there, as [`wait_for`](Self::wait_for) says.
    pub fn snapshot_at_least(
        &self,
        token: &Token,
        timeout: Duration,
    ) -> Result<ViewSnapshot<V>, ViewReadError> {
        self.wait_for(token, timeout)?;
        self.snapshot()
    }

    /// Waits until the view has applied the append that gave `token`, for `timeout` at most.
    ///
    /// # Errors
    /// [`WaitError`]; in particular, a token of events that were lost is not honoured by other events at
    /// its position.
    pub fn wait_for(&self, token: &Token, timeout: Duration) -> Result<(), WaitError> {
        let shared = self.shared();
        let deadline = Instant::now().checked_add(timeout);
        let pending = is_pending(shared, token)?;
        shared.wait_until_applied(token.position, deadline)?;
        if pending && is_pending(shared, token)? {
            let reached = shared.state().applied.checkpoint.position;
            return Err(WaitError::Timeout { reached, wanted: token.position });
        }
        Ok(())
    }

    /// How far the view has got.
    #[must_use]
    pub fn checkpoint(&self) -> ViewCheckpoint {
        let state = self.shared().state();
        ViewCheckpoint { applied: state.applied.checkpoint, durable: state.durable }
    }

    /// How the view is doing.
    #[must_use]
    pub fn status(&self) -> ViewStatus {
        let shared = self.shared();
        let state = shared.state();
        let journal_end = shared.journal.end();
        let applied = state.applied.checkpoint;
        let behind = journal_end.position.since(applied.position);
        let follows = matches!(state.phase, Phase::Following | Phase::Building(_));
        let lag_events = follows.then_some(behind);
        ViewStatus {
            state: match state.phase {
                Phase::Building(_) => ViewState::Building,
                Phase::Following if behind == 0 => ViewState::CaughtUp,
                Phase::Following => ViewState::CatchingUp,
                Phase::AwaitingMirror => ViewState::AwaitingMirror,
                Phase::Stopped(error) => ViewState::Stopped(error),
                Phase::Closed => ViewState::Closed,
            },
            checkpoint: ViewCheckpoint { applied, durable: state.durable },
            journal_end,
            lag_events,
            skipped_events: state.applied.skipped_events,
            parked: state.applied.parked,
            generation: shared.db().path().to_owned(),
            set_aside: shared.set_aside.clone(),
            rebuild: shared.rebuild_status(),
        }
    }

    /// Builds the view's rows anew from the journal, in a generation beside the one that is served, and lets it take
    /// over. Reads go on all the time. Returns at once; the handle tells how far it is, and can pause it, slow it
    /// down or cancel it. The old generation is kept, for [`rollback`](Self::rollback), until it is
    /// [removed](Self::remove_generation); it needs its disk space twice.
    ///
    /// An event that can't be applied ends it: a generation with holes never takes over. So do removed events
    /// ([`ReadError::Truncated`](crate::ReadError::Truncated)).
    ///
    /// # Errors
    /// [`ViewError::Rebuilding`] if a rebuild is under way, [`ViewError::Closed`]; others if there can't be a thread.
    pub fn rebuild(&self, options: RebuildOptions) -> Result<RebuildHandle, ViewError> {
        takeover::begin(&self.running, self.view.clone(), options, Source::Journal)
    }

    /// Goes back to the generation that was live before the present one: it catches up with the journal and takes over, as
    /// after a rebuild. The present one is kept. After another opening, "before" is the one with the next lower number.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild); [`ViewError::NoGeneration`] if none is kept.
    pub fn rollback(&self) -> Result<RebuildHandle, ViewError> {
        let shared = self.shared();
        let number = {
            let folder = shared.folder.lock();
            let live = folder.live_number();
            let kept = folder.all()?.into_iter().filter(|it| it.version == V::VERSION && !it.live);
            let kept: Vec<u32> = kept.map(|it| it.number).collect();
            let previous = shared.previous.lock().filter(|number| kept.contains(number));
            let lower = || kept.iter().copied().filter(|number| *number < live).max();
            let lowest = live.saturating_sub(1);
            let before = previous.or_else(lower);
            before.map_or_else(|| folder.existing(lowest).map(|_| lowest), Ok)?
        };
        let options = RebuildOptions::default();
        takeover::begin(&self.running, self.view.clone(), options, Source::Generation(number))
    }

    /// Proves that the rows are what the journal makes: builds them again, beside, as of this moment, and compares.
    /// Blocks until that is done; reads and the fold go on.
    ///
    /// # Errors
    /// [`RebuildError`]. Rows that differ are no error but the answer.
    pub fn check(&self, options: RebuildOptions) -> Result<Comparison, RebuildError> {
        takeover::check(&self.running, self.view.clone(), options)
    }

    /// What the rows come to, as of now. Reads all of them.
    ///
    /// # Errors
    /// [`RebuildError::Stopped`] if the database fails.
    pub fn digest(&self) -> Result<Digest, RebuildError> {
        digest_of::<V>(&self.shared().db().snapshot(), None)
    }

    /// The generations of the view on disk, of all versions, but for one that is being built.
    ///
    /// # Errors
    /// [`ViewError::Io`].
    pub fn generations(&self) -> Result<Vec<GenerationInfo>, ViewError> {
        let all = self.shared().folder.lock().all()?;
        let info = |it: Generation| GenerationInfo {
            version: it.version,
            number: it.number,
            live: it.live,
            folder: it.folder().to_owned(),
        };
        Ok(all.into_iter().map(info).collect())
    }

    /// Deletes a generation that isn't live any more, with its folder: at once, or when the last snapshot of it is
    /// dropped. `false` if there is none.
    ///
    /// # Errors
    /// [`ViewError::Live`] if its version reads it, [`ViewError::Rebuilding`] while a rebuild is under way,
    /// [`ViewError::InUse`] if it is of another version that is open.
    pub fn remove_generation(&self, version: u32, number: u32) -> Result<bool, ViewError> {
        let shared = self.shared();
        let rebuild = shared.rebuild.lock(); // none begins meanwhile
        if rebuild.as_ref().is_some_and(|control| !control.has_ended()) {
            return Err(ViewError::Rebuilding { view: V::NAME });
        }
        if version != V::VERSION {
            return shared.folder.lock().remove_other(version, number);
        }
        let forgotten = shared.folder.lock().forget(number)?;
        forgotten.map_or(Ok(false), |folder| shared.openings.delete(&folder).map(|()| true))
    }

    /// Stops following the journal, for all clones, and makes durable what is applied. Blocks until then.
    /// Reads go on; the view can be opened again when the last clone, snapshot and iterator is dropped.
    ///
    /// # Errors
    /// [`ViewError::Storage`] if not all could be made durable; the journal makes up for it at the next
    /// opening.
    pub fn close(&self) -> Result<(), ViewError> {
        self.running.close()
    }
}

/// Whether the journal doesn't reach the token's position yet.
fn is_pending(shared: &Shared, token: &Token) -> Result<bool, WaitError> {
    match shared.journal.token_state(token)? {
        TokenState::Present => Ok(false),
        TokenState::Pending => Ok(true),
        TokenState::Lost => Err(WaitError::TokenLost { position: token.position }),
        TokenState::Foreign => {
            Err(WaitError::ForeignToken { found: token.journal, followed: shared.journal.id() })
        }
    }
}

/// A view as of one moment: all reads are of the same checkpoint.
pub struct ViewSnapshot<V: View> {
    reader: Reader,
    checkpoint: Checkpoint,
    indexes: Arc<Indexes<V>>,
}

impl<V: View> std::fmt::Debug for ViewSnapshot<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ViewSnapshot")
            .field("name", &V::NAME)
            .field("checkpoint", &self.checkpoint)
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
        get::<V, Q>(&self.reader, key)
    }

    /// The rows with keys in `range`, in the order of their keys. Holds one row at a time.
    pub fn range<R: RangeBounds<V::Key>>(&self, range: R) -> Rows<V> {
        Rows::new(&self.reader, row_range(&range))
    }

    /// The rows whose keys begin with the fields `prefix`, in the order of their keys.
    pub fn prefix<P: KeyPrefix<V::Key>>(&self, prefix: &P) -> Rows<V> {
        Rows::new(&self.reader, prefix_range(prefix))
    }

    /// What the rows are of: exactly the events in front of it.
    #[must_use]
    pub const fn checkpoint(&self) -> Checkpoint {
        self.checkpoint
    }
}

fn get<V: View, Q>(reader: &Reader, key: &Q) -> Result<Option<V::Row>, ViewReadError>
where
    Q: EncodeKey<V::Key> + ?Sized,
{
    let row = reader.get(&row_key(|out| key.encode_key_into(out)))?;
    row.map(|row| decode_row::<V>(row.as_ref())).transpose()
}

pub(super) fn decode_row<V: View>(row: &[u8]) -> Result<V::Row, ViewReadError> {
    Bincode::decode(row)
        .map_err(|source| ViewReadError::Row { view: V::NAME, source: Arc::new(source) })
}

fn prefix_range<K: ViewKey>(prefix: &impl KeyPrefix<K>) -> Range<Vec<u8>> {
    let start = row_key(|out| prefix.encode_prefix(out));
    let end = behind_prefix(&start);
    start..end
}

fn row_range<K: ViewKey>(range: &impl RangeBounds<K>) -> Range<Vec<u8>> {
    let all = all_rows();
    let start = match range.start_bound() {
        Bound::Included(key) => stored_key(key),
        Bound::Excluded(key) => behind_key(key),
        Bound::Unbounded => all.start,
    };
    let end = match range.end_bound() {
        Bound::Included(key) => behind_key(key),
        Bound::Excluded(key) => stored_key(key),
        Bound::Unbounded => all.end,
    };
    start..end
}

fn stored_key<K: ViewKey>(key: &K) -> Vec<u8> {
    row_key(|out| key.encode_key(out))
}

/// No key's bytes begin with another's: nothing lies between a key and this.
fn behind_key<K: ViewKey>(key: &K) -> Vec<u8> {
    behind_prefix(&stored_key(key))
}
