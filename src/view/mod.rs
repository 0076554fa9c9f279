//! Views: rows folded from events, kept in RocksDB, disposable.
//!
//! ```text
//! journal ──Cursor──▶ chunk ──fold──▶ { rows + checkpoint } ──one write batch──▶ RocksDB ──▶ reads
//!    │                  ▲                                                           │
//!    └ durable end: a wake-up, no data                     flush: applied ▶ durable ┘
//! ```
//!
//! A [`View`] says which rows an event concerns ([`route`](View::route)) and what it makes of each
//! ([`fold`](View::fold)). [`open`] starts a thread that pulls batches from a journal, own or mirrored, and
//! returns a [`ViewHandle`] to read from.
//!
//! Invariants:
//! - **State is exactly once.** Rows and the checkpoint that they are of are written together, at batch ends
//!   only, so after any crash a view holds what an exact prefix of its journal makes, and knows which. What
//!   was lost with the crash is folded again from the journal. (Effects outside of a view are *not* exactly
//!   once; a fold must have none.)
//! - **The checkpoint is compared with the journal at every opening**, by journal id, incarnation, offset,
//!   position and chain. See the table below.
//! - **A view is a pure fold**: no clock, no randomness, no I/O. So deleting its folder and opening it again
//!   gives the same answers, later.
//! - An event that can't be applied stops its row, not the view: it is parked, and so are all later events of
//!   that row, until it is retried or discarded. Reads can tell.
//! - A view that can't go on stops where it is, says at which event and why, and nothing else stops. Its
//!   rows are still served.
//! - Reads never wait for the fold, nor the fold for reads.
//!
//! | the checkpoint is ... | own journal | mirror |
//! |---|---|---|
//! | of this history | go on | go on |
//! | of another history, or of another journal | set the generation aside, build the next one | the same |
//! | behind the journal's end | [`ViewError::LostTail`]: the view is the witness of a loss | serve, wait for the mirror, compare again: go on, or stop as [`StopError::Fork`] |
//! | not to be judged: the journal is damaged there | serve, stopped | serve, stopped |
//! | of several journals in an order that isn't recorded | set the generation aside, build the next one | the same |
//!
//! `applied` is what readers see, `durable` is what survives a crash. Whatever truncates or acknowledges
//! goes by `durable`.

#[cfg(feature = "cli")]
pub(crate) mod at_rest;
mod audit;
mod base;
mod bulk;
mod chunk;
mod control;
mod db;
mod deadly;
mod error;
mod generation;
mod handle;
mod index;
mod inline;
mod intake;
mod key;
#[cfg(feature = "testing")]
pub(crate) mod memory;
#[cfg(feature = "testing")]
pub(crate) mod memory_tables;
mod moment;
#[cfg(feature = "cli")]
mod mount;
mod openings;
mod poison;
mod program;
mod rebuild;
mod row_cache;
mod rows;
mod runner;
mod sort;
mod sources;
mod space;
mod tables;
mod takeover;
mod watch;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use smallvec::SmallVec;

use program::Keyed;

use crate::event::{Event, Recorded};
use crate::journal::Journal;

pub use audit::{Audit, AuditError, SegmentAudit};
pub use base::{BaseError, ViewBase};
#[cfg(feature = "cli")]
pub(crate) use base::{Imported, export_at_rest, import_at_rest};
pub use control::{JournalStatus, ViewCheckpoint, ViewControl, ViewState, ViewStatus};
pub(crate) use db::Stored;
pub use db::{StorageError, StorageErrorKind, ViewMemory};
pub use deadly::{DeadlyEvent, Stage};
pub use error::{EventFailure, StopError, ViewError, ViewReadError, WaitError};
pub(crate) use generation::is_valid_name;
pub(crate) use generation::{Generation, generations};
#[cfg(feature = "cli")]
pub(crate) use generation::{Generations, version_lock};
pub use handle::{ViewHandle, ViewSnapshot};
pub use index::{Index, IndexReader, IndexRows, Indexes};
pub(crate) use inline::InlineViews;
pub(crate) use intake::logs as intake_logs;
#[cfg(feature = "cli")]
pub(crate) use key::KeySpelling;
pub use key::{EncodeKey, KeyError, KeyPrefix, ViewKey};
#[cfg(feature = "cli")]
pub(crate) use mount::{Code, RowSpelling, Spelling};
pub use poison::{
    Checked, Degraded, OnPoison, ParkedCounts, ParkedError, ParkedEvent, ParkedEvents, ParkedKey,
    ParkedKeys, Retried,
};
pub use rebuild::{
    Comparison, Digest, GenerationInfo, OnDifference, RebuildError, RebuildHandle, RebuildOptions,
    RebuildPhase, RebuildStatus, Rebuilt,
};
pub use rows::{InvalidPageToken, Page, PageToken, Rows};
pub(crate) use sources::Sources;
pub(crate) use tables::open_any_tables;
pub use tables::{
    Table, TableError, TableReader, TableSnapshot, TableView, TableViewHandle, Tables, TxnRows,
    ViewTxn, open_tables,
};
pub use watch::{Change, Watch};

/// Rows by key, folded from events.
///
/// A pure fold: what it returns depends on its arguments only. It is called again for the same events
/// after a crash, and for all events when the view is built anew.
///
/// ```
/// use headwater::Recorded;
/// use headwater::view::{Fold, FoldError, Keys, View};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Placed {
///     pub customer: u32,
///     pub total_cents: u64,
/// }
///
/// headwater::events! {
///     /// What happens to an order.
///     pub enum OrderEvent {
///         Placed(Placed) = "order.placed", version 1;
///     }
/// }
///
/// /// What each customer has spent.
/// struct Spent;
///
/// impl View for Spent {
///     const NAME: &'static str = "spent";
///     const VERSION: u32 = 1;
///     type Key = u32;
///     type Row = u64;
///     type Event = OrderEvent;
///
///     fn route(&self, event: &Recorded<OrderEvent>, keys: &mut Keys<u32>) {
///         let OrderEvent::Placed(placed) = event.data();
///         keys.add(placed.customer);
///     }
///
///     fn fold(
///         &self,
///         _customer: &u32,
///         spent_cents: Option<u64>,
///         event: &Recorded<OrderEvent>,
///     ) -> Result<Fold<u64>, FoldError> {
///         let OrderEvent::Placed(placed) = event.data();
///         let sum = spent_cents.unwrap_or(0).checked_add(placed.total_cents);
///         Ok(Fold::Put(sum.ok_or("more cents than a u64 holds")?))
///     }
/// }
/// ```
pub trait View: Send + Sync + 'static {
    /// The view's name, and its folder's: 1 to 64 of `a-z`, `0-9`, `-` and `_`.
    const NAME: &'static str;
    /// Raise it whenever key, row, `route` or `fold` change: the rows are then built anew, in a generation
    /// of their own. Until they are, [`get`](ViewHandle::get) finds none of those that aren't made yet: a service should
    /// [wait](ViewControl::wait_for_latest) before it serves, or read with [`get_checked`](ViewHandle::get_checked),
    /// which says [`Degraded::Building`].
    const VERSION: u32;
    /// What names a row.
    type Key: ViewKey + Send + Sync;
    /// A row.
    type Row: Clone + Serialize + DeserializeOwned;
    /// The events it is made from. Events of other types are skipped and counted.
    type Event: Event + Send + Sync;

    /// Names the rows that the event concerns. A row named twice is folded once.
    ///
    /// Neither here nor in a fold can anything be done that would wait for folds, such as a rebuild or the opening of an
    /// inline view: [`ViewError::WithinFold`].
    fn route(&self, event: &Recorded<Self::Event>, keys: &mut Keys<Self::Key>);

    /// What the event makes of one of these rows; `row` is `None` if there is none yet.
    ///
    /// # Errors
    /// [`FoldError`], from any error or text, if the event can't be applied: it is tried once more, and then
    /// parked with its key, together with all later events of that key; or the view stops in front of the
    /// event's batch. [`ViewOptions::on_poison`] says which. A panic does the same, and so does a row that is too large to be
    /// read back ([`DECODE_BYTES_MAX`](crate::codec::DECODE_BYTES_MAX)).
    fn fold(
        &self,
        key: &Self::Key,
        row: Option<Self::Row>,
        event: &Recorded<Self::Event>,
    ) -> Result<Fold<Self::Row>, FoldError>;

    /// The indexes by which rows are found, beside their keys; see [`Index`]. Default: none.
    ///
    /// Another set of indexes makes a new generation at the next opening, built from the journal, as a new
    /// [`VERSION`](Self::VERSION) does. Give an index whose keys change another name, or raise the version.
    ///
    /// A row is indexed when it is written, once for all events that were folded into it since the last time. If its keys
    /// panic, the events are folded again one after the other, and the first behind which they do is treated as one that
    /// fails to fold. So keys should be there for every row, also for those that only some histories have.
    fn indexes(&self) -> Indexes<Self>
    where
        Self: Sized,
    {
        Indexes::none()
    }
}

/// The rows that an event concerns; filled by [`View::route`].
#[derive(Debug)]
pub struct Keys<K>(SmallVec<[K; 1]>);

impl<K> Keys<K> {
    fn none() -> Self {
        Self(SmallVec::new())
    }

    /// The event concerns the row under `key`.
    pub fn add(&mut self, key: K) {
        self.0.push(key);
    }
}

impl<K> Extend<K> for Keys<K> {
    fn extend<I: IntoIterator<Item = K>>(&mut self, keys: I) {
        self.0.extend(keys);
    }
}

/// What an event makes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold<R> {
    /// This row, new or changed.
    Put(R),
    /// No row.
    Delete,
    /// What was there.
    Keep,
}

/// Why an event can't be applied. Made from any error with `?`, from a text, or with [`FoldError::new`].
pub struct FoldError(Box<dyn std::error::Error + Send + Sync>);

impl FoldError {
    /// From anything that can be shown.
    #[must_use]
    pub fn new(reason: impl fmt::Display) -> Self {
        Self(reason.to_string().into())
    }
}

// Not an `Error` itself: that is what makes it convertible from every error.
impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for FoldError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for FoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for FoldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a view is run. The defaults suit nearly everybody.
#[derive(Clone, Debug)]
pub struct ViewOptions {
    /// How many bytes of the journal are folded at once, at least one batch. A chunk is in memory, decoded, with
    /// the rows that it changes; a larger one is faster where many of its events are of the same rows. Default 4 MiB.
    pub chunk_bytes: u64,
    /// Rows are made durable at the latest when they are of this many bytes of the journal: as many are
    /// folded again after a crash, and one chunk more; twice as many if that was under way. Default 64 MiB.
    pub flush_bytes: u64,
    /// Rows are made durable at the latest this long after they were applied. Default 10 s.
    pub flush_interval: Duration,
    /// What to do when the own journal has lost events that the view has applied. Default: refuse to open.
    pub lost_tail: LostTail,
    /// What to do with an event that can't be folded into a row. Default: [`OnPoison::Park`] it with its key.
    pub on_poison: OnPoison,
    /// What to do with an event that can't be decoded or routed. Default: [`OnPoison::Park`] it. Any row may lack
    /// it then, and all say that they are degraded, until it is discarded or the view is built anew.
    pub on_undecodable: OnPoison,
    /// Rows that were written last are kept in memory for the fold that needs them next, up to so many bytes; about 100
    /// and what is in it for each. Folding into more keys than that reads the database. Default 32 MiB; 0 keeps none.
    pub row_cache_bytes: u64,
    /// Whether the view has applied an append when that returns: read your own write, without a token. Default: false.
    ///
    /// It costs the append what the fold costs, by every thread that appends one after the other; an asynchronous view
    /// folds many appends at once, beside them. Opening such a view blocks until it has caught up with the journal. For
    /// views of the store's own journal only, and not together with buffered appends. What is submitted without waiting
    /// ([`Store::submit`](crate::Store::submit)) is applied a few milliseconds later, or by
    /// [`wait_for`](ViewControl::wait_for).
    pub inline: bool,
    /// The directory of a base ([`ViewControl::export_base`]) with which the view begins if it has no rows yet: they are
    /// copied, verified, and live when the opening returns. It goes on from there, also if the journal doesn't reach back
    /// any further. A view that has rows doesn't look at it. Default: none, it is built from the journal.
    ///
    /// Opening fails with [`ViewError::Base`] if it is another view's, damaged, or of another history than the journal; if
    /// the journal ends in front of its checkpoint, or begins behind. Interrupted, it begins anew.
    pub base: Option<PathBuf>,
    /// How the first generation of the view's version is built if there is much to fold: with how much memory, how many
    /// threads, and how fast at the most. Default: as fast as it goes. See [`ViewStatus::rebuild`] for how far it is. Rows
    /// are missing meanwhile: [`Degraded::Building`].
    pub building: RebuildOptions,
    /// Memory, shared with other views.
    pub memory: ViewMemory,
}

impl Default for ViewOptions {
    fn default() -> Self {
        Self {
            chunk_bytes: 4 << 20,
            flush_bytes: 64 << 20,
            flush_interval: Duration::from_secs(10),
            lost_tail: LostTail::Refuse,
            on_poison: OnPoison::Park,
            on_undecodable: OnPoison::Park,
            row_cache_bytes: 32 << 20,
            inline: false,
            base: None,
            building: RebuildOptions::default(),
            memory: ViewMemory::default(),
        }
    }
}

/// What to do when the own journal has lost events that the view has applied, or, of several journals, another view over
/// the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum LostTail {
    /// Refuse to open the view: [`ViewError::LostTail`].
    #[default]
    Refuse,
    /// The loss is accepted: set the generation aside and build the next one from what is left. The order in which several
    /// journals are taken in forgets what is lost, also for the other views over them.
    SetAside,
}

/// Opens a view of `journal` in the folder `views_dir`, creating it if there is none, and begins to follow
/// the journal in a thread of its own.
///
/// Returns as soon as the stored rows can be read, however far behind they are; see
/// [`ViewControl::wait_for`] and [`ViewControl::status`].
///
/// [Retention](crate::retention) knows of a view only if `views_dir` is the folder `views` beside the journal's.
///
/// # Errors
/// [`ViewError`]; nothing that is stored was changed then. [`ViewError::Inline`] if the options ask for an inline view:
/// only a [`Store`](crate::Store) can open one.
pub fn open<V: View>(
    views_dir: &Path,
    journal: Journal,
    view: V,
    options: ViewOptions,
) -> Result<ViewHandle<V>, ViewError> {
    refuse_inline(V::NAME, &options)?;
    open_any(views_dir, journal.into(), view, options)
}

/// Whoever doesn't append can't apply what is appended.
fn refuse_inline(view: &'static str, options: &ViewOptions) -> Result<(), ViewError> {
    if options.inline { Err(ViewError::Inline { view }) } else { Ok(()) }
}

/// The same, inline or not.
pub(crate) fn open_any<V: View>(
    views_dir: &Path,
    sources: Sources,
    view: V,
    options: ViewOptions,
) -> Result<ViewHandle<V>, ViewError> {
    if !is_valid_name(V::NAME) {
        return Err(ViewError::InvalidName { name: V::NAME });
    }
    let indexes = Indexes::of(&view);
    indexes.check()?;
    let program = Arc::new(Keyed(view));
    let running = runner::start(views_dir, sources, Arc::clone(&program), options)?;
    Ok(ViewHandle::new(ViewControl::new(running, program), indexes))
}
