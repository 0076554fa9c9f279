//! Command handling: an aggregate is folded from its stream, decides, and what it decides is appended.
//!
//! ```text
//!               ┌──────────────── conflict: only the new events are read ────────────────┐
//!               ▼                                                                        │
//!  command ─▶ load ─────────────▶ decide ─▶ events ─▶ append, expecting the revision that was loaded ─▶ durable
//!             │ cache · snapshot     │ none: nothing is appended
//!             │ · the whole stream   └ rejected: nothing is appended
//! ```
//! Invariants:
//! - A decision is appended only if the stream holds exactly the events that it was made from.
//! - A state is made only of events that were durable and were read. What is remembered of it, in memory or in a
//!   [snapshot](Commands::snapshot_every), is derived: it spares reading, and never changes a result.
//! - A command that carries an id has its result once: event ids follow from it, so a repetition is recognised by
//!   the journal, across restarts too, as long as the id is within the journal's window.
//!
//! No other stream and no view is looked at: for a rule that spans streams see `docs/commands.md`.

use std::any::TypeId;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::FixedState;
use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::AppendError;
use crate::event::{
    EncodeError, Event, EventId, ExpectedRevision, NewEvent, Recorded, Revision, StreamId,
};
use crate::journal::{Append, Appended, Placed, Receipt};
use crate::position::{Token, uuid_id};
use crate::store::Store;

mod cache;
mod error;
mod load;
pub(crate) mod snapshot;

pub use error::ExecuteError;

pub(crate) use cache::Cache;
use load::Loaded;
use snapshot::Snapshots;

/// How often a command is tried before it is given up, unless said otherwise.
const ATTEMPTS_MAX: u32 = 16;

/// How many commands can wait for each other; a power of two.
const TURNS: usize = 256;

/// How long a command lets others of its stream go first.
const PATIENCE: Duration = Duration::from_secs(1);

/// What decides: a state folded from the events of one stream.
///
/// `apply` and `decide` are pure: no clock, no randomness, no I/O. What they need comes with the event or the
/// command. A command may be decided several times before it is appended.
///
/// ```
/// use headwater::command::{Aggregate, Executed};
/// use headwater::{Recorded, Store, StreamId};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Deposited {
///     pub cents: u64,
/// }
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Withdrawn {
///     pub cents: u64,
/// }
/// headwater::events! {
///     pub enum AccountEvent {
///         Deposited(Deposited) = "account.deposited", version 1;
///         Withdrawn(Withdrawn) = "account.withdrawn", version 1;
///     }
/// }
///
/// #[derive(Clone, Default)]
/// struct Account {
///     balance_cents: u64,
/// }
///
/// enum Command {
///     Deposit { cents: u64 },
///     Withdraw { cents: u64 },
/// }
///
/// #[derive(Debug, PartialEq, thiserror::Error)]
/// #[error("only {balance_cents} cents are there")]
/// struct NotEnough {
///     balance_cents: u64,
/// }
///
/// impl Aggregate for Account {
///     const NAME: &'static str = "account";
///     type Event = AccountEvent;
///     type Command = Command;
///     type Error = NotEnough;
///
///     fn apply(&mut self, event: &Recorded<AccountEvent>) {
///         match event.data() {
///             AccountEvent::Deposited(deposited) => self.balance_cents += deposited.cents,
///             AccountEvent::Withdrawn(withdrawn) => self.balance_cents -= withdrawn.cents,
///         }
///     }
///
///     fn decide(&self, command: &Command) -> Result<Vec<AccountEvent>, NotEnough> {
///         match command {
///             Command::Deposit { cents } => Ok(vec![Deposited { cents: *cents }.into()]),
///             Command::Withdraw { cents } if *cents > self.balance_cents => {
///                 Err(NotEnough { balance_cents: self.balance_cents })
///             }
///             Command::Withdraw { cents } => Ok(vec![Withdrawn { cents: *cents }.into()]),
///         }
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::create(dir.path().join("bank"))?;
/// let account = StreamId::new("account-7")?;
/// store.execute::<Account>(&account, &Command::Deposit { cents: 500 })?;
/// let done = store.execute::<Account>(&account, &Command::Withdraw { cents: 200 })?;
/// assert!(matches!(done, Executed::Appended(_))); // durable now
/// assert!(store.execute::<Account>(&account, &Command::Withdraw { cents: 400 }).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Aggregate: Clone + Default + Send + Sync + 'static {
    /// Its name, and that of the folder of its snapshots: 1 to 64 of `a-z`, `0-9`, `-` and `_`.
    const NAME: &'static str;
    /// Raise it whenever the state or [`apply`](Self::apply) change: snapshots of other versions aren't used.
    const VERSION: u32 = 1;
    /// Whether events of types that [`Event`](Self::Event) doesn't know are passed over. By default they make a
    /// command fail: who doesn't know all that has happened shouldn't decide.
    const PASSES_UNKNOWN_EVENTS: bool = false;
    /// What happens to it.
    type Event: Event;
    /// What it is asked to do.
    type Command: ?Sized;
    /// Why it refuses.
    type Error: fmt::Debug + fmt::Display;

    /// What an event makes of the state.
    fn apply(&mut self, event: &Recorded<Self::Event>);

    /// What is to happen, if anything; the events are appended as one batch.
    ///
    /// # Errors
    /// Why the command is refused; it reaches the caller as [`ExecuteError::Rejected`].
    fn decide(&self, command: &Self::Command) -> Result<Vec<Self::Event>, Self::Error>;

    /// The event as it is to be appended: here it gets its tags, subject and metadata. By default it has none.
    ///
    /// # Errors
    /// [`EncodeError`] if the event can't be encoded.
    fn record(event: &Self::Event) -> Result<NewEvent, EncodeError> {
        NewEvent::typed(event)
    }
}

uuid_id! {
    /// Identifies a command, so that one that is sent again has its first result.
    CommandId
}

impl CommandId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self::from_bytes(crate::env::random_id())
    }

    /// The id that belongs to a text, always the same: the idempotency key of a request, say.
    ///
    /// ```
    /// use headwater::command::CommandId;
    /// assert_eq!(CommandId::of("payment 4711"), CommandId::of("payment 4711"));
    /// assert_ne!(CommandId::of("payment 4711"), CommandId::of("payment 4712"));
    /// ```
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("headwater command id of a text");
        hasher.update(text.as_bytes());
        Self::from_bytes(first_16(&hasher))
    }

    /// The id of the command's event number `index` in `stream`.
    fn event_id(&self, stream: &StreamId, index: u32) -> EventId {
        let mut hasher = blake3::Hasher::new_derive_key("headwater event id of a command");
        hasher.update(&self.0);
        hasher.update(&index.to_le_bytes());
        hasher.update(stream.as_str().as_bytes());
        // A UUID of version 8: its maker says what it means.
        let id = uuid::Builder::from_custom_bytes(first_16(&hasher)).into_uuid();
        EventId::from_bytes(id.into_bytes())
    }
}

fn first_16(hasher: &blake3::Hasher) -> [u8; 16] {
    hasher.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executed {
    /// Its events were appended now, and are durable.
    Appended(Receipt),
    /// It had been executed before, under the same id; this is the first result.
    Repeated(Receipt),
    /// The aggregate decided that nothing is to happen: nothing was appended.
    Nothing {
        /// Of what was there when it decided.
        token: Token,
    },
}

impl Executed {
    /// The token to wait for in a view, here or in another service.
    #[must_use]
    pub const fn token(&self) -> Token {
        match self {
            Self::Appended(receipt) | Self::Repeated(receipt) => receipt.token,
            Self::Nothing { token } => *token,
        }
    }

    /// Where its events are; none if nothing was appended.
    #[must_use]
    pub fn events(&self) -> &[Placed] {
        match self {
            Self::Appended(receipt) | Self::Repeated(receipt) => &receipt.events,
            Self::Nothing { .. } => &[],
        }
    }
}

/// Executes commands of one kind of aggregate; from [`Store::commands`]. Cheap to make, and to keep.
///
/// ```
/// # use headwater::command::{Aggregate, CommandId, Executed};
/// # use headwater::{Recorded, Store, StreamId};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Added(u64);
/// # headwater::events! { pub enum CounterEvent { Added(Added) = "counter.added", version 1; } }
/// #[derive(Clone, Default, Serialize, Deserialize)]
/// struct Counter {
///     sum: u64,
/// }
/// # impl Aggregate for Counter {
/// #     const NAME: &'static str = "counter";
/// #     type Event = CounterEvent;
/// #     type Command = u64;
/// #     type Error = std::convert::Infallible;
/// #     fn apply(&mut self, event: &Recorded<CounterEvent>) {
/// #         let CounterEvent::Added(Added(more)) = event.data();
/// #         self.sum += more;
/// #     }
/// #     fn decide(&self, more: &u64) -> Result<Vec<CounterEvent>, Self::Error> {
/// #         Ok(vec![Added(*more).into()])
/// #     }
/// # }
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(dir.path().join("counters"))?;
/// // Long streams: a snapshot for every thousand events.
/// let counters = store.commands::<Counter>().snapshot_every(1000);
/// let clicks = StreamId::new("counter-clicks")?;
/// let id = CommandId::of("request 4711");
/// let first = counters.execute_once(id, &clicks, &3)?;
/// let again = counters.execute_once(id, &clicks, &3)?; // the answer had been lost, say
/// assert!(matches!(again, Executed::Repeated(_)));
/// assert_eq!(first.events(), again.events());
/// assert_eq!(counters.load(&clicks)?.state().sum, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Commands<A: Aggregate> {
    store: Store,
    attempts_max: u32,
    snapshots: Option<Snapshots<A>>,
    remembers: bool,
    aggregate: PhantomData<fn() -> A>,
}

impl<A: Aggregate> Clone for Commands<A> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), snapshots: self.snapshots.clone(), ..*self }
    }
}

impl<A: Aggregate> fmt::Debug for Commands<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Commands");
        shown.field("aggregate", &A::NAME).field("attempts_max", &self.attempts_max);
        shown.field("snapshot_every", &self.snapshots.as_ref().map(Snapshots::every));
        shown.finish_non_exhaustive()
    }
}

/// An aggregate as it was loaded.
#[derive(Clone, Debug)]
pub struct State<A> {
    loaded: Arc<Loaded<A>>,
}

impl<A> State<A> {
    /// The state.
    #[must_use]
    pub fn state(&self) -> &A {
        &self.loaded.state
    }

    /// Revision of the last event that is in it; `None` if there is none.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        self.loaded.count.checked_sub(1).map(Revision::new)
    }
}

impl<A: Aggregate> Commands<A> {
    pub(crate) fn new(store: &Store) -> Self {
        const { assert!(is_valid_name(A::NAME), "1 to 64 of a-z, 0-9, - and _") }
        Self {
            store: store.clone(),
            attempts_max: ATTEMPTS_MAX,
            snapshots: None,
            remembers: true,
            aggregate: PhantomData,
        }
    }

    /// Sets how often a command is decided before it is given up as a [conflict](ExecuteError::Conflict).
    /// Default 16; at least once.
    #[must_use]
    pub fn attempts_max(mut self, attempts: u32) -> Self {
        self.attempts_max = attempts.max(1);
        self
    }

    /// Keeps no state in memory: every command reads the stream, from its snapshot on if there is one.
    #[must_use]
    pub fn forgetful(mut self) -> Self {
        self.remembers = false;
        self
    }

    /// Keeps a snapshot of an aggregate on disk whenever so many events have come since the last one (at least
    /// 1), in `DIR/snapshots/`. It is read instead of the events in front of it after a restart, or when the
    /// state is no longer in memory.
    ///
    /// Snapshots are derived data: a missing, damaged or outdated one, or one of another history (the journal
    /// was restored, say), is passed over. Failing to write one fails no command, and nothing waits for a sync.
    #[must_use]
    pub fn snapshot_every(mut self, events: u64) -> Self
    where
        A: Serialize + DeserializeOwned,
    {
        self.snapshots = Some(Snapshots::new(events));
        self
    }

    /// Executes a command on the aggregate of a stream: loads it, lets it decide, appends what it has decided,
    /// and begins again if other events came between. Its events are durable when this returns `Ok`.
    ///
    /// Blocks for reading what isn't in memory and for the disk; at most a second longer for commands on the
    /// same stream that are under way.
    ///
    /// # Errors
    /// [`ExecuteError`].
    pub fn execute(
        &self,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Executed, ExecuteError<A::Error>> {
        self.run(None, stream, command)
    }

    /// The same for a command with an id. If it was executed on this stream before, its first result is the
    /// answer, whatever the aggregate would decide now.
    ///
    /// It is recognised as long as its events are among the last of the journal
    /// ([`idempotency_window_events`](crate::JournalOptions::idempotency_window_events), by default 2^20), also
    /// after a restart. A command that had been rejected, or for which nothing was appended, is decided again.
    ///
    /// # Errors
    /// [`ExecuteError`]. After [`AppendError::Unknown`] open the store again and execute the command again
    /// under the same id, to settle it.
    pub fn execute_once(
        &self,
        id: CommandId,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Executed, ExecuteError<A::Error>> {
        self.run(Some(id), stream, command)
    }

    /// The aggregate of a stream, as of the durable end.
    ///
    /// # Errors
    /// [`ExecuteError`]; never `Rejected`, `Conflict` or `Append`.
    pub fn load(&self, stream: &StreamId) -> Result<State<A>, ExecuteError<A::Error>> {
        let mut loaded = self.begin(stream)?;
        let advanced = loaded.advance(self.store.journal(), stream);
        let loaded = self.keep(stream, loaded);
        advanced.map(|()| State { loaded })
    }

    fn run(
        &self,
        id: Option<CommandId>,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Executed, ExecuteError<A::Error>> {
        let _turn = self.store.turns().take(stream);
        let outcome = self.begin(stream).and_then(|mut loaded| {
            let outcome = self.try_often(id, stream, command, &mut loaded);
            drop(self.keep(stream, loaded));
            outcome
        });
        match outcome {
            // Perhaps because of its own events: it was executed before, or another thread does it, too.
            Ok(Executed::Nothing { .. }) | Err(_) => {
                let first = match &outcome {
                    Err(ExecuteError::Append(error)) if !is_of_ids(error) => None,
                    _ => self.first_result(id, stream)?,
                };
                first.map_or(outcome, Ok)
            }
            outcome => outcome,
        }
    }

    fn try_often(
        &self,
        id: Option<CommandId>,
        stream: &StreamId,
        command: &A::Command,
        loaded: &mut Loaded<A>,
    ) -> Result<Executed, ExecuteError<A::Error>> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            loaded.advance(self.store.journal(), stream)?;
            let token = self.store.journal().end().token();
            let decided = loaded.state.decide(command).map_err(ExecuteError::Rejected)?;
            if decided.is_empty() {
                return Ok(Executed::Nothing { token });
            }
            let append = append_of::<A>(id, stream, loaded.expected(), &decided)?;
            match self.store.append(&append) {
                Ok(Appended::New(receipt)) => return Ok(Executed::Appended(receipt)),
                Ok(Appended::Duplicate(receipt)) => {
                    let first = self.first_result(id, stream)?;
                    return Ok(first.unwrap_or(Executed::Repeated(receipt)));
                }
                Err(AppendError::Conflict { stream, expected, actual })
                    if attempts >= self.attempts_max =>
                {
                    return Err(ExecuteError::Conflict { stream, attempts, expected, actual });
                }
                Err(AppendError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What the command has led to when it was executed first, if that is known.
    fn first_result(
        &self,
        id: Option<CommandId>,
        stream: &StreamId,
    ) -> Result<Option<Executed>, AppendError> {
        let Some(id) = id else { return Ok(None) };
        let Some((token, batch)) = self.store.find(id.event_id(stream, 0))? else {
            return Ok(None);
        };
        let mut events = Vec::new();
        for index in 0.. {
            let wanted = id.event_id(stream, index);
            let Some(event) = batch.iter().find(|event| event.id() == wanted) else { break };
            events.push(Placed { position: event.position(), revision: event.revision() });
        }
        Ok(Some(Executed::Repeated(Receipt { token, events, behind: Vec::new() })))
    }

    /// What is remembered of an aggregate; the beginning if there is nothing.
    fn begin(&self, stream: &StreamId) -> Result<Loaded<A>, ExecuteError<A::Error>> {
        // Without its first events a stream is no aggregate, whatever is remembered of them.
        self.store.journal().check_stream(stream, Revision::FIRST)?;
        let key = (TypeId::of::<A>(), stream.clone());
        if let Some(known) = self.store.aggregates().take(&key).filter(|_| self.remembers) {
            return Ok(Arc::unwrap_or_clone(known));
        }
        let snapshot = self.snapshots.as_ref();
        Ok(snapshot.and_then(|snapshots| snapshots.read(&self.store, stream)).unwrap_or_default())
    }

    /// Remembers an aggregate.
    fn keep(&self, stream: &StreamId, mut loaded: Loaded<A>) -> Arc<Loaded<A>> {
        if let Some(snapshots) = &self.snapshots {
            snapshots.write_if_due(&self.store, stream, &mut loaded);
        }
        let loaded = Arc::new(loaded);
        if self.remembers {
            let key = (TypeId::of::<A>(), stream.clone());
            self.store.aggregates().put(key, Arc::clone(&loaded));
        }
        loaded
    }
}

/// An error that says that events with these ids are there.
const fn is_of_ids(error: &AppendError) -> bool {
    matches!(error, AppendError::PartialDuplicate { .. })
}

fn append_of<A: Aggregate>(
    id: Option<CommandId>,
    stream: &StreamId,
    expected: ExpectedRevision,
    decided: &[A::Event],
) -> Result<Append, EncodeError> {
    let mut events = Vec::with_capacity(decided.len());
    for (index, event) in (0..).zip(decided) {
        let event = A::record(event)?;
        events.push(match id {
            Some(id) => event.id(id.event_id(stream, index)),
            None => event,
        });
    }
    Ok(Append::to(stream, expected, events))
}

/// The name of a folder.
pub(crate) const fn is_valid_name(name: &str) -> bool {
    let name = name.as_bytes();
    let mut at = 0;
    while at < name.len() {
        if !matches!(name[at], b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') {
            return false;
        }
        at += 1;
    }
    !name.is_empty() && name.len() <= 64
}

/// Commands on one stream go one after the other, as they could only be in each other's way. It is a courtesy
/// and proves nothing: who has waited long goes on, and so does whoever comes by another way.
#[derive(Debug)]
pub(crate) struct Turns(Box<[Mutex<()>]>);

impl Default for Turns {
    fn default() -> Self {
        Self((0..TURNS).map(|_| Mutex::default()).collect())
    }
}

impl Turns {
    fn take(&self, stream: &StreamId) -> Option<MutexGuard<'_, ()>> {
        use std::hash::BuildHasher;
        let hash = FixedState::with_seed(0).hash_one(stream.as_str());
        self.0.get(hash as usize % TURNS)?.try_lock_for(PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// They are stored: the same command must have the same ids for ever.
    #[test]
    fn the_ids_of_a_commands_events_never_change() {
        let id = CommandId::from_bytes([7; 16]);
        let stream = StreamId::new("order-7").unwrap();
        let [first, second] = [0, 1].map(|index| id.event_id(&stream, index).to_string());
        assert_eq!([first, second, CommandId::of("order 7").to_string()], GOLDEN);
        let other = StreamId::new("order-8").unwrap();
        assert_ne!(id.event_id(&stream, 0), id.event_id(&other, 0));
    }

    const GOLDEN: [&str; 3] = [
        "052a0be5-9e1f-847d-90fd-b2d79554b192",
        "b412f537-eb02-85a3-8530-aebf1d88a79a",
        "9f256ccf-003c-b985-4c38-a4f81bde931b",
    ];

    #[test]
    fn names_are_those_of_folders() {
        for (name, valid) in
            [("order", true), ("a-b_9", true), ("", false), ("Order", false), ("../a", false)]
        {
            assert_eq!(is_valid_name(name), valid, "{name}");
        }
        assert!(!is_valid_name(&"a".repeat(65)));
    }
}
