//! The store: what a service opens. It wires the journal to its views and its peers.
//!
//! ```text
//! DIR/journal/          the journal: all there is to lose
//! DIR/views/            views of the own journal: delete them, they come back
//! DIR/reactors/         how far reactors of the own journal are
//! DIR/snapshots/        snapshots of aggregates: delete them, they come back
//! DIR/mirrors/NAME/     a mirror of a peer's journal in `journal/`, its views in `views/`, its reactors
//!                       in `reactors/`
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(feature = "shipping")]
use std::time::Duration;

use crate::command::{self, Aggregate, Commands, ExecuteError, Executed};
use crate::error::{AppendError, IoError, OpenError, ReadError};
use crate::event::{EventId, Recorded, Revision, StreamId};
use crate::fs::Fs;
use crate::fs::os::OsFs;
use crate::journal::{
    Append, Appended, Appender, CloseError, Events, EventsBackward, Journal, Query, QueryEvents,
    RecoveryReport, StreamEvents, StreamEventsBackward, Subscription, Ticket,
};
#[cfg(feature = "shipping")]
use crate::journal::{Mirrored, TokenError};
use crate::options::JournalOptions;
use crate::position::{Checkpoint, Position, Token};
use crate::reactor::{self, OpenReactorError, REACTORS, Reactor, ReactorHandle, ReactorOptions};
use crate::retention::{self, Plan, RetentionError};
#[cfg(feature = "shipping")]
use crate::shipping::{
    Addresses, Feed, FeedFilter, FollowOptions, Mirror, PeersCheck, ServeError, ServeOptions,
    Server, ShippingError, TakenBack,
};
#[cfg(feature = "views")]
use crate::view::{
    InlineViews, Sources, TableView, TableViewHandle, View, ViewError, ViewHandle, ViewOptions,
};

/// How many aggregates are kept in memory, unless said otherwise.
const AGGREGATES_CACHED_MAX: usize = 1024;

/// The folder of a journal's views, beside the journal.
#[cfg(feature = "views")]
const VIEWS: &str = "views";

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
    #[cfg(feature = "shipping")]
    options: JournalOptions,
    #[cfg(feature = "shipping")]
    taken_back: Option<TakenBack>,
    fs: Arc<dyn Fs>,
    appender: Appender,
    /// The aggregates that were used last.
    aggregates: command::Cache,
    turns: command::Turns,
    #[cfg(feature = "views")]
    inline: InlineViews,
    #[cfg(all(feature = "testing", feature = "views"))]
    is_in_memory: bool,
    /// Views and reactors, by kind and name, that remember events which the journal has lost: nothing is
    /// appended until that is settled for all of them.
    lost_tail: parking_lot::RwLock<BTreeMap<(&'static str, &'static str), AppendError>>,
}

/// How to open a store; see [`Store::builder`].
#[derive(Clone, Debug)]
pub struct StoreBuilder {
    dir: PathBuf,
    options: JournalOptions,
    create: Create,
    fs: Arc<dyn Fs>,
    #[cfg(all(feature = "testing", feature = "views"))]
    is_in_memory: bool,
    aggregates_cached_max: usize,
    #[cfg(feature = "shipping")]
    peers: Option<PeersCheck>,
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
            #[cfg(all(feature = "testing", feature = "views"))]
            is_in_memory: false,
            aggregates_cached_max: AGGREGATES_CACHED_MAX,
            #[cfg(feature = "shipping")]
            peers: None,
        }
    }

    /// Appends events. They are durable when this returns `Ok`, whichever kind of `Ok` it is, unless the
    /// append itself says otherwise ([`Append::durability`]).
    ///
    /// Blocks for the disk. May be called from many threads at once; they share syncs.
    ///
    /// # Errors
    /// [`AppendError`]; every one but [`AppendError::Unknown`] means that nothing was written. That an inline view has
    /// not applied the events is no error: [`Receipt::behind`](crate::Receipt::behind) says so.
    pub fn append(&self, append: &Append) -> Result<Appended, AppendError> {
        self.refuse_lost_tail()?;
        #[cfg(feature = "views")]
        self.refuse_buffered_beside_inline(append)?;
        let appended = self.inner.appender.append(append)?;
        #[cfg(feature = "views")]
        let appended = match append.is_durable() {
            true => self.applied_inline(appended),
            false => appended, // an inline view was opened in this moment
        };
        Ok(appended)
    }

    #[cfg(feature = "views")]
    fn applied_inline(&self, mut appended: Appended) -> Appended {
        let position = appended.token().position;
        appended.receipt_mut().behind = self.inner.inline.apply_up_to(position);
        appended
    }

    /// What isn't durable isn't shown, so an append that doesn't wait for that can't be applied when it returns.
    #[cfg(feature = "views")]
    fn refuse_buffered_beside_inline(&self, append: &Append) -> Result<(), AppendError> {
        if append.is_durable() {
            return Ok(());
        }
        self.inner.inline.first().map_or(Ok(()), |view| Err(AppendError::BufferedInline { view }))
    }

    /// Appends events without waiting for them: the [`Ticket`] gives the answer, to a thread that waits or
    /// to a task that awaits. One thread can have thousands of appends under way; they become durable in
    /// the order in which they were submitted, and dropping a ticket cancels nothing.
    ///
    /// Inline views don't hold the answer up: they apply the events within milliseconds behind it.
    ///
    /// Blocks only for room, as long as more is under way than the options allow.
    ///
    /// # Errors
    /// [`AppendError`]; nothing was written then.
    pub fn submit(&self, append: &Append) -> Result<Ticket, AppendError> {
        self.refuse_lost_tail()?;
        #[cfg(feature = "views")]
        self.refuse_buffered_beside_inline(append)?;
        self.inner.appender.submit(append)
    }

    /// Executes a command on the aggregate of a stream: folds its events, lets it decide, and appends what it
    /// has decided, or begins again if other events came between. The events are durable when this returns `Ok`.
    ///
    /// [`commands`](Self::commands) does the same with options, and for commands that may be sent twice.
    ///
    /// Blocks for reading what isn't in memory and for the disk. See [`Aggregate`] for an example.
    ///
    /// # Errors
    /// [`ExecuteError`].
    pub fn execute<A: Aggregate>(
        &self,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Executed, ExecuteError<A::Error>> {
        self.commands::<A>().execute(stream, command)
    }

    /// What executes commands of one kind of aggregate, with options.
    #[must_use]
    pub fn commands<A: Aggregate>(&self) -> Commands<A> {
        Commands::new(self)
    }

    /// The batch of the event with this id, and its token, if it is among the last events; once it is durable.
    pub(crate) fn find(&self, id: EventId) -> Result<Option<(Token, Vec<Recorded>)>, AppendError> {
        self.inner.appender.find(id)
    }

    pub(crate) fn aggregates(&self) -> &command::Cache {
        &self.inner.aggregates
    }

    pub(crate) fn turns(&self) -> &command::Turns {
        &self.inner.turns
    }

    pub(crate) fn fs(&self) -> &Arc<dyn Fs> {
        &self.inner.fs
    }

    /// The last failure beside the commit path: recording the durable end, preparing the next segment or
    /// cutting a full one; `None` if the last attempt worked. It makes no append fail; it weakens what recovery
    /// can prove, or makes the next roll slower. Worth an alert.
    #[must_use]
    pub fn background_error(&self) -> Option<IoError> {
        self.inner.appender.background_error()
    }

    /// Waits until everything that was appended, submitted or buffered before is durable. Returns the
    /// durable end.
    ///
    /// # Errors
    /// [`AppendError::Poisoned`] if that can't be any more.
    pub fn flush(&self) -> Result<Checkpoint, AppendError> {
        self.inner.appender.flush()
    }

    /// Waits until `mirrors` distinct mirrors have the append that gave `token`, for `timeout` at most, and tells
    /// which have. Too few in time is no error; see [`Journal::wait_mirrored`].
    ///
    /// # Errors
    /// [`TokenError`].
    #[cfg(feature = "shipping")]
    pub fn wait_mirrored(
        &self,
        token: &Token,
        mirrors: usize,
        timeout: Duration,
    ) -> Result<Mirrored, TokenError> {
        self.journal().wait_mirrored(token, mirrors, timeout)
    }

    fn refuse_lost_tail(&self) -> Result<(), AppendError> {
        if let Some(error) = self.inner.lost_tail.read().values().next() {
            return Err(error.clone());
        }
        Ok(())
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

    /// The durable events from `from` on that a query means; see [`Journal::read_query`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_query(&self, query: &Query, from: Position) -> Result<QueryEvents, ReadError> {
        self.journal().read_query(query, from)
    }

    /// The durable events in front of `before`, the newest first; see [`Journal::read_all_backward`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_all_backward(&self, before: Position) -> Result<EventsBackward, ReadError> {
        self.journal().read_all_backward(before)
    }

    /// The durable events of a stream, the newest first, from revision `from` or from its last event on; see
    /// [`Journal::read_stream_backward`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_stream_backward(
        &self,
        stream: &StreamId,
        from: Option<Revision>,
    ) -> Result<StreamEventsBackward, ReadError> {
        self.journal().read_stream_backward(stream, from)
    }

    /// Every event from `from` on, and then live; see [`Journal::subscribe`].
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn subscribe(&self, from: Position) -> Result<Subscription, ReadError> {
        self.journal().subscribe(from)
    }

    /// Opens a view of the store's own journal, creating it if there is none, and begins to follow the
    /// journal in a thread of its own. Returns as soon as the stored rows can be read.
    ///
    /// # Errors
    /// [`ViewError`]. After [`ViewError::LostTail`] (the view remembers events that the journal has lost)
    /// the store refuses appends, until the journal was restored or the view is opened with
    /// [`LostTail::SetAside`](crate::view::LostTail::SetAside).
    #[cfg(feature = "views")]
    pub fn view<V: View>(&self, view: V) -> Result<ViewHandle<V>, ViewError> {
        self.view_with(view, ViewOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ViewError`], as [`view`](Self::view).
    #[cfg(feature = "views")]
    pub fn view_with<V: View>(
        &self,
        view: V,
        options: ViewOptions,
    ) -> Result<ViewHandle<V>, ViewError> {
        let dir = self.views_in(&self.inner.dir)?;
        let inline = options.inline;
        let opened = crate::view::open_any(&dir, self.journal().clone().into(), view, options);
        let opened = self.heed_lost_tail(V::NAME, opened)?;
        if inline {
            self.inner.inline.add(&opened);
        }
        Ok(opened)
    }

    /// Opens a view of several tables of the store's own journal, as [`view`](Self::view) opens a keyed one.
    ///
    /// # Errors
    /// [`ViewError`], as [`view`](Self::view).
    #[cfg(feature = "views")]
    pub fn table_view<T: TableView>(&self, view: T) -> Result<TableViewHandle<T>, ViewError> {
        self.table_view_with(view, ViewOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ViewError`], as [`view`](Self::view).
    #[cfg(feature = "views")]
    pub fn table_view_with<T: TableView>(
        &self,
        view: T,
        options: ViewOptions,
    ) -> Result<TableViewHandle<T>, ViewError> {
        let dir = self.views_in(&self.inner.dir)?;
        let inline = options.inline;
        let opened =
            crate::view::open_any_tables(&dir, self.journal().clone().into(), view, options);
        let opened = self.heed_lost_tail(T::NAME, opened)?;
        if inline {
            self.inner.inline.add(&opened);
        }
        Ok(opened)
    }

    /// Opens a view of several journals: the store's own and mirrors of others (from
    #[cfg_attr(feature = "shipping", doc = "[`Mirror::wait_ready`]),")]
    #[cfg_attr(not(feature = "shipping"), doc = "a mirror, feature `shipping`),")]
    /// in any order, the one that is meant where nothing else is said first. Its rows lie with those of the store's own
    /// views. Another set of journals makes a new generation at the next opening.
    ///
    /// Each journal's events are folded in its order, and those of different journals as they come. Which came first is
    /// recorded, durably and before it is folded, in the folder `.intake` beside the views: all views of the store over the
    /// same journals have the same order, and so has every rebuild. Deleting the folder of *all* views deletes the order
    /// with it, and another one is recorded. A token of any of the journals can be waited for.
    ///
    /// A mirror that comes to have less than was taken in from it (it was fetched anew, say) is waited for, at its turn.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use headwater::view::{Fold, FoldError, Keys, View, ViewOptions};
    /// # use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
    /// # struct Count;
    /// # impl View for Count {
    /// #     const NAME: &'static str = "count";
    /// #     const VERSION: u32 = 1;
    /// #     type Key = StreamId;
    /// #     type Row = u64;
    /// #     type Event = Vec<u8>;
    /// #     fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
    /// #         keys.add(event.stream().clone());
    /// #     }
    /// #     fn fold(&self, _: &StreamId, n: Option<u64>, _: &Recorded<Vec<u8>>) -> Result<Fold<u64>, FoldError> {
    /// #         Ok(Fold::Put(n.unwrap_or(0) + 1))
    /// #     }
    /// # }
    /// # let dir = tempfile::tempdir()?;
    /// # let orders = Store::create(dir.path().join("orders"))?;
    /// # let payments = Store::create(dir.path().join("payments"))?;
    /// // How many events each order has, here and in the mirrored journal of the payments.
    /// let journals = [orders.journal().clone(), payments.journal().clone()];
    /// let count = orders.view_over(&journals, Count, ViewOptions::default())?;
    /// let order = StreamId::new("order-7")?;
    /// for store in [&orders, &payments] {
    ///     let event = NewEvent::raw("happened", *b"")?;
    ///     let appended = store.append(&Append::to(&order, ExpectedRevision::Any, [event]))?;
    ///     count.wait_for(&appended.token(), Duration::from_secs(10))?;
    /// }
    /// assert_eq!(count.get("order-7")?, Some(2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError`], as [`view`](Self::view); [`ViewError::Journals`] if a journal is named twice, or none is.
    #[cfg(feature = "views")]
    pub fn view_over<V: View>(
        &self,
        journals: &[Journal],
        view: V,
        options: ViewOptions,
    ) -> Result<ViewHandle<V>, ViewError> {
        let sources = sources_of(V::NAME, journals, &options)?;
        let dir = self.views_in(&self.inner.dir)?;
        self.heed_lost_tail(V::NAME, crate::view::open_any(&dir, sources, view, options))
    }

    /// Opens a view of several tables of several journals, as [`view_over`](Self::view_over) opens a keyed one.
    ///
    /// # Errors
    /// [`ViewError`], as [`view_over`](Self::view_over).
    #[cfg(feature = "views")]
    pub fn table_view_over<T: TableView>(
        &self,
        journals: &[Journal],
        view: T,
        options: ViewOptions,
    ) -> Result<TableViewHandle<T>, ViewError> {
        let sources = sources_of(T::NAME, journals, &options)?;
        let dir = self.views_in(&self.inner.dir)?;
        self.heed_lost_tail(T::NAME, crate::view::open_any_tables(&dir, sources, view, options))
    }

    /// A view that remembers events which the journal has lost keeps the store from appending.
    #[cfg(feature = "views")]
    fn heed_lost_tail<T>(
        &self,
        view: &'static str,
        opened: Result<T, ViewError>,
    ) -> Result<T, ViewError> {
        match &opened {
            Err(ViewError::LostTail { checkpoint, end, .. })
                if checkpoint.journal == self.journal().id() =>
            {
                let (applied, end) = (checkpoint.position, *end);
                let error = AppendError::LostTail { view, applied, end };
                self.inner.lost_tail.write().insert((VIEWS, view), error);
            }
            Ok(_) => drop(self.inner.lost_tail.write().remove(&(VIEWS, view))),
            Err(_) => {}
        }
        opened
    }

    /// Opens a view of a mirrored journal: get it from [`Mirror::wait_ready`]. The view's rows lie beside
    /// the mirror.
    ///
    /// # Errors
    /// [`ViewError`].
    #[cfg(all(feature = "views", feature = "shipping"))]
    pub fn view_of<V: View>(&self, journal: &Journal, view: V) -> Result<ViewHandle<V>, ViewError> {
        self.view_of_with(journal, view, ViewOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ViewError`].
    #[cfg(all(feature = "views", feature = "shipping"))]
    pub fn view_of_with<V: View>(
        &self,
        journal: &Journal,
        view: V,
        options: ViewOptions,
    ) -> Result<ViewHandle<V>, ViewError> {
        if journal.node() == self.journal().node() {
            return self.view_with(view, options);
        }
        crate::view::open(&self.views_beside(journal)?, journal.clone(), view, options)
    }

    /// Opens a view of several tables of a mirrored journal, as [`view_of`](Self::view_of) opens a keyed one.
    ///
    /// # Errors
    /// [`ViewError`].
    #[cfg(all(feature = "views", feature = "shipping"))]
    pub fn table_view_of<T: TableView>(
        &self,
        journal: &Journal,
        view: T,
    ) -> Result<TableViewHandle<T>, ViewError> {
        self.table_view_of_with(journal, view, ViewOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ViewError`].
    #[cfg(all(feature = "views", feature = "shipping"))]
    pub fn table_view_of_with<T: TableView>(
        &self,
        journal: &Journal,
        view: T,
        options: ViewOptions,
    ) -> Result<TableViewHandle<T>, ViewError> {
        if journal.node() == self.journal().node() {
            return self.table_view_with(view, options);
        }
        crate::view::open_tables(&self.views_beside(journal)?, journal.clone(), view, options)
    }

    #[cfg(all(feature = "views", feature = "shipping"))]
    fn views_beside(&self, journal: &Journal) -> Result<PathBuf, ViewError> {
        self.views_in(journal.dir().parent().unwrap_or(&self.inner.dir))
    }

    /// The folder of views in `dir`; where the store's files are in memory, there is none for RocksDB.
    #[cfg(feature = "views")]
    #[allow(
        clippy::unnecessary_wraps,
        clippy::unused_self,
        reason = "stores are in memory with feature `testing` only"
    )]
    fn views_in(&self, dir: &Path) -> Result<PathBuf, ViewError> {
        let dir = dir.join(VIEWS);
        #[cfg(feature = "testing")]
        if self.inner.is_in_memory {
            let why = "the store is on a disk in memory, and views are in RocksDB: fold the view with testing::view, \
                       or open the store in a temporary directory";
            let source = std::io::Error::new(std::io::ErrorKind::Unsupported, why);
            return Err(IoError::new("opening a view", &dir, source).into());
        }
        Ok(dir)
    }

    /// Opens a reactor to the store's own journal, which begins where its options say if it is new and otherwise
    /// goes on where it was, in a thread of its own.
    ///
    /// # Errors
    /// [`OpenReactorError`]. After [`OpenReactorError::LostTail`] (it has reacted to events that the journal has
    /// lost) the store refuses appends, until the journal was restored or the reactor is opened with
    /// [`ReactorOptions::restart`].
    pub fn react<R: Reactor>(
        &self,
        reactor: R,
        options: ReactorOptions,
    ) -> Result<ReactorHandle, OpenReactorError> {
        let (dir, journal) = (self.inner.dir.join(REACTORS), self.journal().clone());
        let opened = reactor::open(&self.inner.fs, &dir, journal, reactor, options);
        match &opened {
            Err(OpenReactorError::LostTail { checkpoint, end, .. }) => {
                let (view, applied, end) = (R::NAME, checkpoint.position, *end);
                let error = AppendError::LostTail { view, applied, end };
                self.inner.lost_tail.write().insert((REACTORS, view), error);
            }
            Ok(_) => drop(self.inner.lost_tail.write().remove(&(REACTORS, R::NAME))),
            Err(_) => {}
        }
        opened
    }

    /// Opens a reactor to a mirrored journal: get it from
    #[cfg_attr(feature = "shipping", doc = "[`Mirror::wait_ready`].")]
    #[cfg_attr(not(feature = "shipping"), doc = "a mirror (feature `shipping`).")]
    /// What is stored of it lies beside the mirror.
    ///
    /// # Errors
    /// [`OpenReactorError`].
    pub fn react_to<R: Reactor>(
        &self,
        journal: &Journal,
        reactor: R,
        options: ReactorOptions,
    ) -> Result<ReactorHandle, OpenReactorError> {
        if journal.node() == self.journal().node() {
            return self.react(reactor, options);
        }
        let dir = journal.dir().parent().unwrap_or(&self.inner.dir).join(REACTORS);
        reactor::open(&self.inner.fs, &dir, journal.clone(), reactor, options)
    }

    /// Serves the journal to mirrors in other services on this machine, at an address of the loopback (plain TCP;
    /// for others see [`ServeOptions::security`]), until the returned [`Server`] is shut down or dropped. Port 0 asks for a free one.
    ///
    /// # Errors
    /// [`ServeError`]; nothing listens then.
    #[cfg(feature = "shipping")]
    pub fn serve(&self, address: impl std::net::ToSocketAddrs) -> Result<Server, ServeError> {
        self.serve_with(address, ServeOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ServeError`]; nothing listens then.
    #[cfg(feature = "shipping")]
    pub fn serve_with(
        &self,
        address: impl std::net::ToSocketAddrs,
        options: ServeOptions,
    ) -> Result<Server, ServeError> {
        crate::shipping::serve(self.journal().clone(), address, options)
    }

    /// Follows the journal that another service serves at `addresses`, one or more of it and of its relays in order of
    /// preference, into the mirror `name`, which is
    /// created if there is none. An address is kept as it is and resolved before every attempt; the other
    /// service needs not be there. `name` is 1 to 64 of `a-z`, `0-9`, `-` and `_`.
    ///
    /// # Errors
    /// [`ShippingError`] if the mirror can't be opened; whatever happens on the way to the origin is told by
    /// [`Mirror::status`] and retried.
    #[cfg(feature = "shipping")]
    pub fn mirror(
        &self,
        name: &str,
        addresses: impl Into<Addresses>,
    ) -> Result<Mirror, ShippingError> {
        let journal = self.inner.options.clone();
        self.mirror_with(name, addresses, FollowOptions { journal, ..FollowOptions::default() })
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ShippingError`] if the mirror can't be opened.
    #[cfg(feature = "shipping")]
    pub fn mirror_with(
        &self,
        name: &str,
        addresses: impl Into<Addresses>,
        options: FollowOptions,
    ) -> Result<Mirror, ShippingError> {
        let dir = self.mirror_dir(name)?;
        crate::shipping::follow(Arc::clone(&self.inner.fs), &dir, addresses, options)
    }

    /// Follows a filtered feed of the journal that another service serves at `addresses`, one or more of it and of its relays
    /// in order of preference: only the events that `filter`
    /// means, in the shape in which the service publishes them. They are kept in a journal of their own, under `name`
    /// beside the mirrors; views of it are opened with [`view_of`](Self::view_of).
    ///
    /// # Errors
    /// [`ShippingError`] as [`follow_feed`](crate::shipping::follow_feed); whatever happens on the way to the origin
    /// is told by [`Feed::status`](crate::shipping::Feed::status) and retried.
    #[cfg(feature = "shipping")]
    pub fn feed(
        &self,
        name: &str,
        addresses: impl Into<Addresses>,
        filter: impl Into<FeedFilter>,
    ) -> Result<Feed, ShippingError> {
        let journal = self.inner.options.clone();
        let options = FollowOptions { journal, ..FollowOptions::default() };
        self.feed_with(name, addresses, filter, options)
    }

    /// The same with options.
    ///
    /// # Errors
    /// [`ShippingError`].
    #[cfg(feature = "shipping")]
    pub fn feed_with(
        &self,
        name: &str,
        addresses: impl Into<Addresses>,
        filter: impl Into<FeedFilter>,
        options: FollowOptions,
    ) -> Result<Feed, ShippingError> {
        let (fs, dir) = (Arc::clone(&self.inner.fs), self.mirror_dir(name)?);
        crate::shipping::follow_feed(fs, &dir, addresses, filter.into(), options)
    }

    #[cfg(feature = "shipping")]
    fn mirror_dir(&self, name: &str) -> Result<PathBuf, ShippingError> {
        if !is_mirror_name(name) {
            let (option, reason) = ("mirror name", MIRROR_NAME);
            let invalid = OpenError::InvalidOption { option, reason };
            return Err(ShippingError::Open(Arc::new(invalid)));
        }
        Ok(self.inner.dir.join("mirrors").join(name).join("journal"))
    }

    /// What [`retain`](Self::retain) would remove, and what keeps more from being removed. Changes nothing.
    ///
    /// Blocks for reading header pages, and with an archive for reading there what would be removed.
    ///
    /// # Errors
    /// [`RetentionError`] if the journal can't be read.
    pub fn plan_retention(&self, options: &retention::Options) -> Result<Plan, RetentionError> {
        retention::plan_of(self.journal(), options)
    }

    /// Removes the oldest events of the store's own journal, for ever: whole sealed segments that no view and
    /// no mirror needs any more, and that an archive has, or whose loss is ordered. What was removed.
    ///
    /// Appending and reading go on meanwhile; readers that come to removed events are answered
    /// [`ReadError::Truncated`]. The files are gone when this returns. Blocks as
    /// [`plan_retention`](Self::plan_retention), and for writing the heads of all streams that have events
    /// among those removed.
    ///
    /// ```
    /// use headwater::retention::{History, Options, Until};
    /// # let dir = tempfile::tempdir()?;
    /// # let (path, archive) = (dir.path().join("orders"), dir.path().join("archive"));
    /// let store = headwater::Store::create(&path)?;
    /// store.journal().backup(&archive)?;
    /// let removed = store.retain(
    ///     &Options::new(Until::Keeping { bytes: 10 << 30 }).history(History::Archive(archive)),
    /// )?;
    /// assert_eq!(removed.file_bytes(), 0); // there are no ten gigabytes yet
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`RetentionError`]; trying again is safe.
    pub fn retain(&self, options: &retention::Options) -> Result<Plan, RetentionError> {
        retention::apply_to(self.journal(), options)
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

    /// What opening has taken back from a mirror; see [`StoreBuilder::recover_from_mirrors`].
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn taken_back(&self) -> Option<&TakenBack> {
        self.inner.taken_back.as_ref()
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

    /// Sets how many aggregates, those that were used last, stay in memory for the next command
    /// ([`Store::execute`]). Default 1024; 0 keeps none.
    #[must_use]
    pub fn aggregates_cached_max(mut self, aggregates: usize) -> Self {
        self.aggregates_cached_max = aggregates;
        self
    }

    /// Before the journal is opened for writing, asks these mirrors of it (`host:port`, where each is
    /// [served](crate::shipping::serve)) whether they hold events that it has lost, because it was restored from an older
    /// copy: then they are taken back, verified like a mirror verifies, and synced. The longest counts.
    ///
    /// All of them must answer, unless [`require_peers_check`](Self::require_peers_check) says otherwise; one that has no
    /// journal at present, because it has halted or was stopped, doesn't. A journal that doesn't exist isn't taken back.
    ///
    /// ```no_run
    /// let mirrors = ["10.0.0.2:7000", "10.0.0.3:7000"];
    /// let store = headwater::Store::builder("orders").recover_from_mirrors(mirrors).open()?;
    /// if let Some(back) = store.taken_back() {
    ///     println!("{} events are back from {}", back.to.position.since(back.from.position), back.address);
    /// }
    /// # Ok::<(), headwater::OpenError>(())
    /// ```
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn recover_from_mirrors<A: Into<String>>(
        mut self,
        mirrors: impl IntoIterator<Item = A>,
    ) -> Self {
        let check = self.peers.get_or_insert_default();
        check.mirrors.extend(mirrors.into_iter().map(Into::into));
        check.recover = true;
        self
    }

    /// The same without taking anything back: opening fails if one of these mirrors holds more than the journal.
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn ask_mirrors<A: Into<String>>(mut self, mirrors: impl IntoIterator<Item = A>) -> Self {
        let check = self.peers.get_or_insert_default();
        check.mirrors.extend(mirrors.into_iter().map(Into::into));
        self
    }

    /// Refuses to open for writing until `count` of the named mirrors have been asked; without this, all of them.
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn require_peers_check(mut self, count: usize) -> Self {
        self.peers.get_or_insert_default().required = Some(count);
        self
    }

    /// Doesn't ask this one of the named mirrors: it is gone for good, with whatever it held.
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn give_up_on_mirror(mut self, mirror: impl Into<String>) -> Self {
        self.peers.get_or_insert_default().given_up.push(mirror.into());
        self
    }

    /// Sets how mirrors are asked, in full.
    #[cfg(feature = "shipping")]
    #[must_use]
    pub fn peers_check(mut self, check: PeersCheck) -> Self {
        self.peers = Some(check);
        self
    }

    /// Uses another file system for the journal.
    #[cfg(feature = "test-kit")]
    #[must_use]
    pub fn fs(mut self, fs: Arc<dyn Fs>) -> Self {
        self.fs = fs;
        self
    }

    /// Records events with the time that `clock` shows, and not the system's: for tests. Feature `testing`.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn clock(mut self, clock: &crate::testing::Clock) -> Self {
        let (fs, clock) = (self.fs, clock.clone());
        self.fs = Arc::new(crate::testing::Clocked { fs, clock });
        self
    }

    /// Uses files in memory.
    #[cfg(feature = "testing")]
    pub(crate) fn in_memory(mut self, fs: Arc<dyn Fs>) -> Self {
        self.fs = fs;
        #[cfg(feature = "views")]
        {
            self.is_in_memory = true;
        }
        self
    }

    /// Opens the store.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(self) -> Result<Store, OpenError> {
        let Self { dir, options, create, fs, aggregates_cached_max, .. } = self;
        let journal = dir.join("journal");
        #[cfg(feature = "shipping")]
        let taken_back = match &self.peers {
            Some(check) => crate::shipping::recover(&fs, &journal, &options, check)?,
            None => None,
        };
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
                #[cfg(feature = "shipping")]
                options,
                #[cfg(feature = "shipping")]
                taken_back,
                fs,
                appender,
                aggregates: command::Cache::new(aggregates_cached_max),
                turns: command::Turns::default(),
                #[cfg(feature = "views")]
                inline: InlineViews::default(),
                #[cfg(all(feature = "testing", feature = "views"))]
                is_in_memory: self.is_in_memory,
                lost_tail: parking_lot::RwLock::default(),
            }),
        })
    }
}

#[cfg(feature = "views")]
fn sources_of(
    view: &'static str,
    journals: &[Journal],
    options: &ViewOptions,
) -> Result<Sources, ViewError> {
    if options.inline {
        return Err(ViewError::Inline { view });
    }
    let none = ViewError::Journals { view, reason: "there is none" };
    let (first, others) = journals.split_first().ok_or(none)?;
    let many = ViewError::Journals { view, reason: "there are more than 65535" };
    if journals.len() > crate::format::intake::JOURNALS_MAX {
        return Err(many);
    }
    let twice = ViewError::Journals { view, reason: "one is named twice" };
    Sources::new(first.clone(), others.to_vec()).ok_or(twice)
}

/// What a mirror's name must be.
#[cfg(feature = "shipping")]
pub(crate) const MIRROR_NAME: &str = "must be 1 to 64 of a-z, 0-9, - and _";

/// A mirror's name is that of its folder.
#[cfg(feature = "shipping")]
pub(crate) fn is_mirror_name(name: &str) -> bool {
    let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_');
    !name.is_empty() && name.len() <= 64 && name.chars().all(allowed)
}

/// Whether views or reactors of the own journal exist: then there were events, and an empty journal is a loss.
fn remembered(fs: &Arc<dyn Fs>, dir: &Path) -> bool {
    retention::is_remembered(&**fs, dir)
}
