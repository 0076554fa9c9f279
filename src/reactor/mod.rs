//! Reactors: side effects of events, at least once, in order.
//!
//! ```text
//!   journal, own or mirrored ── durable events ──▶ react(event, idempotency key) ──▶ mail, payment, other service
//!                                     ▲                  │ failed: again, later; then halt and say so
//!                                     │                  ▼ done
//!                                checkpoint ◀── every so often, synced: it never runs ahead of what is done
//! ```
//! Invariants:
//! - Each event in its turn: none is begun before the one in front of it is done, or was skipped by command.
//! - The checkpoint is written behind what it speaks of. So after a crash some events come again, at most those
//!   since the last checkpoint, and none is left out. Whoever receives the effect tells repetitions by the
//!   [`IdempotencyKey`].
//! - Only durable events are seen: no effect is of an event that a crash takes back.
//! - An event of which the process has died five times in a row makes the reactor halt in front of it, instead of
//!   killing the process for ever (`attempts.rs`).
//! - A reactor is no view: nothing ever runs it over events again. A journal with another history than the one it
//!   was reacted to (restored from an older copy, say) is noticed at opening, and refused.
//!
//! What is stored lies beside the journal, in `DIR/reactors/NAME/` (`checkpoint.rs`).

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::event::{Event, Recorded};
use crate::fs::Fs;
use crate::journal::Journal;
use crate::position::{Incarnation, Locator};

mod attempts;
pub(crate) mod checkpoint;
mod error;
mod handle;
mod runner;

pub use error::{EventFailure, HaltError, OpenReactorError, SkipError};
pub use handle::{ReactorHandle, ReactorState, ReactorStatus};
#[cfg(feature = "testing")]
pub(crate) use runner::message_of;

/// The folder of a journal's reactors, beside the journal.
pub(crate) const REACTORS: &str = "reactors";

/// What is to happen outside because of an event.
///
/// ```
/// use std::time::Duration;
///
/// use headwater::reactor::{IdempotencyKey, ReactError, Reactor, ReactorOptions, Start};
/// use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
///
/// /// Prints what others would send.
/// struct Mailer;
///
/// impl Reactor for Mailer {
///     const NAME: &'static str = "mailer";
///     type Event = Vec<u8>; // every event, undecoded
///
///     fn react(&self, event: &Recorded<Vec<u8>>, key: &IdempotencyKey) -> Result<(), ReactError> {
///         println!("{} in {}: Idempotency-Key: {key}", event.event_type(), event.stream());
///         Ok(())
///     }
/// }
///
/// # let dir = tempfile::tempdir()?;
/// let store = Store::create(dir.path().join("orders"))?;
/// let mailer = store.react(Mailer, ReactorOptions::new(Start::Now))?;
/// let placed = NewEvent::raw("order.placed", *b"1250")?;
/// let appended = store.append(&Append::to(&StreamId::new("order-7")?, ExpectedRevision::Any, [placed]))?;
/// assert!(mailer.wait_reacted(appended.token().position, Duration::from_secs(10)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Reactor: Send + 'static {
    /// Its name, and that of its folder: 1 to 64 of `a-z`, `0-9`, `-` and `_`. What is done is stored under it.
    const NAME: &'static str;
    /// The events it reacts to. Events of other types are passed over and counted.
    type Event: Event;

    /// Does what is to be done, and returns when it is done. Blocks whatever it has to wait for; events behind
    /// this one wait meanwhile.
    ///
    /// It may be called again for the same event, with the same key: after a failure, and after a crash.
    ///
    /// # Errors
    /// [`ReactError`], from any error or text: it is tried again, as the [options](ReactorOptions) say, and then
    /// the reactor halts in front of the event. A panic makes it halt at once. If the process dies in here, it is
    /// called again at the next opening; behind five deaths in a row at one event, the reactor begins halted in front
    /// of it.
    fn react(&self, event: &Recorded<Self::Event>, key: &IdempotencyKey) -> Result<(), ReactError>;
}

/// Names an effect: the same whenever it is tried, and another for every other event and reactor.
///
/// An event is named by journal and position, and the incarnation that wrote it: where a journal was restored
/// from an older copy and has gone on, another event has the same position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IdempotencyKey {
    /// The reactor's name.
    pub reactor: &'static str,
    /// The event's place.
    pub locator: Locator,
    /// What wrote it.
    pub incarnation: Incarnation,
    /// Which of the events it is that upcasters have made of the stored one; 0 for nearly all.
    pub part: u32,
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reactor, locator, incarnation, part } = self;
        write!(f, "{reactor}/{locator}/{incarnation}")?;
        if *part > 0 { write!(f, "/{part}") } else { Ok(()) }
    }
}

/// Why an effect could not be had. Made from any error with `?`, from a text, or with [`ReactError::new`].
pub struct ReactError {
    cause: Box<dyn std::error::Error + Send + Sync>,
    is_permanent: bool,
}

impl ReactError {
    /// From anything that can be shown.
    #[must_use]
    pub fn new(reason: impl fmt::Display) -> Self {
        Self { cause: reason.to_string().into(), is_permanent: false }
    }

    /// Trying again won't help: the reactor halts at once.
    #[must_use]
    pub fn permanent(self) -> Self {
        Self { is_permanent: true, ..self }
    }
}

// Not an `Error` itself: that is what makes it convertible from every error.
impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for ReactError {
    fn from(error: E) -> Self {
        Self { cause: error.into(), is_permanent: false }
    }
}

impl fmt::Display for ReactError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl fmt::Debug for ReactError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

/// Where a reactor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// At the durable end: it reacts to events that are yet to come.
    Now,
    /// At position 0. If events were [removed](crate::retention), it halts and says so.
    Beginning,
    /// At the first event that the journal still has.
    Oldest,
}

/// How a reactor is run.
#[derive(Clone, Debug)]
pub struct ReactorOptions {
    /// Where it begins when it is opened for the first time; afterwards it goes on where it was.
    pub start: Start,
    /// Where it begins anew if what it has done is of another history than the journal (which was restored from
    /// an older copy, or lost its tail), or can't be told any more because its checkpoint is damaged. By default
    /// it isn't opened then: some events may have had their effect already, or never will.
    pub restart: Option<Start>,
    /// How often an event is tried before the reactor halts. Default 10; at least once.
    pub attempts_max: u32,
    /// How long it waits at least before it tries again; twice as long each time. Default 100 ms.
    pub back_off_min: Duration,
    /// How long at most. Default 30 s.
    pub back_off_max: Duration,
    /// What is done is recorded durably at the latest behind so many events: as many come again after a crash.
    /// Default 1000.
    pub checkpoint_events: u64,
    /// And at the latest so long after it was done, and before it waits to try an event again. Nothing is recorded while
    /// [`react`](Reactor::react) is at an event: what was done in front of that, not longer ago than this, comes again if the
    /// process ends meanwhile. Default 200 ms.
    pub checkpoint_interval: Duration,
}

impl ReactorOptions {
    /// The defaults, with a decision where to begin.
    #[must_use]
    pub const fn new(start: Start) -> Self {
        Self {
            start,
            restart: None,
            attempts_max: 10,
            back_off_min: Duration::from_millis(100),
            back_off_max: Duration::from_secs(30),
            checkpoint_events: 1000,
            checkpoint_interval: Duration::from_millis(200),
        }
    }
}

/// Opens a reactor of `journal` in the folder `reactors` beside the journal's.
pub(crate) fn open<R: Reactor>(
    fs: &Arc<dyn Fs>,
    reactors_dir: &Path,
    journal: Journal,
    reactor: R,
    options: ReactorOptions,
) -> Result<ReactorHandle, OpenReactorError> {
    const { assert!(crate::command::is_valid_name(R::NAME), "1 to 64 of a-z, 0-9, - and _") }
    runner::start(fs, &reactors_dir.join(R::NAME), journal, reactor, options)
        .map(ReactorHandle::new)
}
