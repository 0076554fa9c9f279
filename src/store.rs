//! The store: what a service opens. It wires the journal to its views and its peers.
//!
//! ```text
//! DIR/journal/          the journal: all there is to lose
//! DIR/views/            views of the own journal: delete them, they come back
//! DIR/mirrors/NAME/     mirrors of peers' journals, and under `views/` their views
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{AppendError, OpenError, ReadError};
use crate::event::{Revision, StreamId};
use crate::fs::Fs;
use crate::fs::os::OsFs;
use crate::journal::{
    Append, Appended, Appender, CloseError, Events, Journal, RecoveryReport, StreamEvents,
    Subscription,
};
use crate::options::JournalOptions;
use crate::position::Position;

/// A service's database: its event journal, and what follows it. Cheap to clone; all clones are one store.
///
/// ```
/// use headwater::{Append, ExpectedRevision, NewEvent, Position, Store, StreamId};
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("orders");
/// let store = Store::create(&path)?;
/// let order = StreamId::new("order-7")?;
/// let placed = NewEvent::json("order.placed", &serde_json::json!({ "total_cents": 1250 }))?;
/// let appended = store.append(&Append::to(&order, ExpectedRevision::NoStream, [placed]))?;
/// assert_eq!(appended.token().position, Position::new(1)); // durable now
/// for event in store.read_all(Position::START)? {
///     println!("{}", event?.event_type());
/// }
/// store.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    #[cfg(any(feature = "views", feature = "shipping"))]
    options: JournalOptions,
    #[cfg(feature = "shipping")]
    fs: Arc<dyn Fs>,
    appender: Appender,
}

/// How to open a store; see [`Store::builder`].
#[derive(Clone, Debug)]
pub struct StoreBuilder {
    dir: PathBuf,
    options: JournalOptions,
    create: Create,
    fs: Arc<dyn Fs>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Create {
    Never,
    IfMissing,
    Always,
}

impl Store {
    /// Opens the store in `dir`, after recovery. Blocks for reading the end of the journal.
    ///
    /// # Errors
    /// [`OpenError::NotFound`] if there is none, [`OpenError::Locked`] if it is open already,
    /// [`OpenError::Corruption`] if acknowledged data is damaged; see [`OpenError`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::builder(dir).open()
    }

    /// Creates a store in `dir`, which needs not exist. It is durable when this returns.
    ///
    /// # Errors
    /// [`OpenError::AlreadyExists`] if there is one; see [`OpenError`].
    pub fn create(dir: impl AsRef<Path>) -> Result<Self, OpenError> {
        let mut builder = Self::builder(dir);
        builder.create = Create::Always;
        builder.open()
    }

    /// Opens or creates a store with options.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// let store = headwater::Store::builder(dir.path().join("orders")).create_if_missing().open()?;
    /// # Ok::<(), headwater::OpenError>(())
    /// # .or_else(|e| Err::<(), Box<dyn std::error::Error>>(e.into()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder(dir: impl AsRef<Path>) -> StoreBuilder {
        StoreBuilder {
            dir: dir.as_ref().to_owned(),
            options: JournalOptions::default(),
            create: Create::Never,
            fs: Arc::new(OsFs),
        }
    }

    /// Appends events. They are durable when this returns `Ok`, whichever kind of `Ok` it is.
    ///
    /// Blocks for the disk. May be called from many threads at once; they share syncs.
    ///
    /// # Errors
    /// [`AppendError`]; every one but [`AppendError::Unknown`] means that nothing was written.
    pub fn append(&self, append: &Append) -> Result<Appended, AppendError> {
        self.inner.appender.append(append)
    }

    /// The reading side of the journal.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        self.inner.appender.journal()
    }

    /// All durable events from `from` on; see [`Journal::read_all`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_all(&self, from: Position) -> Result<Events, ReadError> {
        self.journal().read_all(from)
    }

    /// The durable events of a stream from revision `from` on; see [`Journal::read_stream`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_stream(
        &self,
        stream: &StreamId,
        from: Revision,
    ) -> Result<StreamEvents, ReadError> {
        self.journal().read_stream(stream, from)
    }

    /// Every event from `from` on, and then live; see [`Journal::subscribe`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn subscribe(&self, from: Position) -> Result<Subscription, ReadError> {
        self.journal().subscribe(from)
    }

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What opening found and did.
    #[must_use]
    pub fn recovery_report(&self) -> &RecoveryReport {
        self.inner.appender.recovery_report()
    }

    /// Waits for appends under way, refuses later ones, marks the journal as cleanly closed and releases
    /// its lock. Readers keep what is durable. Closing again does nothing.
    ///
    /// # Errors
    /// [`CloseError`]; everything that was acknowledged is durable all the same.
    pub fn close(&self) -> Result<(), CloseError> {
        self.inner.appender.close()
    }
}

impl StoreBuilder {
    /// Creates the store if there is none. Without this, opening a missing store is an error: a path that is
    /// wrong, or a disk that isn't mounted, doesn't silently begin a new history.
    #[must_use]
    pub fn create_if_missing(mut self) -> Self {
        self.create = Create::IfMissing;
        self
    }

    /// Sets the journal's options.
    #[must_use]
    pub fn journal_options(mut self, options: JournalOptions) -> Self {
        self.options = options;
        self
    }

    /// Uses another file system for the journal.
    #[cfg(feature = "test-kit")]
    #[must_use]
    pub fn fs(mut self, fs: Arc<dyn Fs>) -> Self {
        self.fs = fs;
        self
    }

    /// Opens the store.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(self) -> Result<Store, OpenError> {
        let Self { dir, options, create, fs } = self;
        let journal = dir.join("journal");
        let appender = match create {
            Create::Always => Appender::create(&fs, &journal, &options)?,
            Create::Never => Appender::open(&fs, &journal, &options, remembered(&fs, &dir))?,
            Create::IfMissing => {
                match Appender::open(&fs, &journal, &options, remembered(&fs, &dir)) {
                    Err(OpenError::NotFound { .. }) if !remembered(&fs, &dir) => {
                        Appender::create(&fs, &journal, &options)?
                    }
                    opened => opened?,
                }
            }
        };
        Ok(Store {
            inner: Arc::new(Inner {
                dir,
                #[cfg(any(feature = "views", feature = "shipping"))]
                options,
                #[cfg(feature = "shipping")]
                fs,
                appender,
            }),
        })
    }
}

/// Whether views of the own journal exist: then there were events, and an empty journal is a loss.
fn remembered(fs: &Arc<dyn Fs>, dir: &Path) -> bool {
    fs.list(&dir.join("views")).is_ok_and(|names| !names.is_empty())
}
