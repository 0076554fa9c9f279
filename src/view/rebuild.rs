//! Building a generation beside the one that is served, and letting it take over.
//!
//! ```text
//!  served    ── old ───────────────────────────────────────┐ flip ── new ──▶
//!  rebuild      built in bulk ─ compared ─ catches up ─────┘
//!                  up to C      with old    with live traffic
//!                               as of C
//! ```
//! - Reads go on all the time, of the old generation and then of the new one; no read waits for the flip. The fold
//!   of the old one stands still while the last events are folded by the new one.
//! - The flip comes when the new generation has applied at least as much as the old one and is durable. It is one
//!   replacement of the pointer. Before it, the new one goes away if the process dies; behind it, the old one stays
//!   until it is removed, and [`ViewControl::rollback`](super::ViewControl::rollback) lets it catch up and take over
//!   in the same way.
//! - Whoever has rebuilt goes on as the one who follows the journal; who did before finds that its turn is over.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::chunk::is_within_fold;
use super::error::{StopError, ViewError};
use crate::position::Position;

/// How a view is rebuilt. The defaults suit nearly everybody.
#[derive(Clone, Debug)]
pub struct RebuildOptions {
    /// Memory for rows that aren't on disk yet, at the most; more of them need further passes over the journal. If one row
    /// alone needs more, it is held all the same, and a quarter of it is allowed beside it. Default 512 MiB.
    ///
    /// On top comes, for each thread:
    /// - what is decoded: two pieces of 2 MiB of the journal, or of a batch that is longer, as values of your type; and the
    ///   keys of the rows that they concern, up to 8 MiB for each piece. Only one batch that concerns more takes more: about
    ///   100 bytes beside each key;
    /// - a row that is being folded, before and behind;
    /// - index entries, if there are any, while rows are written: 32 MiB, and up to three times as much while that grows.
    ///
    /// What RocksDB needs for writing files is its own.
    pub memory_bytes_max: usize,
    /// How many threads read, decode and fold. Default: one per core.
    pub threads: usize,
    /// How much of the journal is read per second at the most, but for what is appended while it catches up: that is read as
    /// fast as can be, or nothing would ever take over where more is appended per second than may be read. Can be
    /// [changed](RebuildHandle::throttle) while it runs. Default: no limit.
    pub bytes_per_second_max: Option<u64>,
    /// What to do if the new rows are others than the old ones. Default: [`OnDifference::Refuse`].
    pub on_difference: OnDifference,
}

impl Default for RebuildOptions {
    fn default() -> Self {
        Self {
            memory_bytes_max: 512 << 20,
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            bytes_per_second_max: None,
            on_difference: OnDifference::Refuse,
        }
    }
}

/// What to do if the rows of a rebuilt generation are others than the old ones, of the same events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnDifference {
    /// The old generation stays live, the new one is deleted, and the answer is [`RebuildError::Different`]. The
    /// same code folded the same events twice: one of the databases is damaged, or the fold isn't pure.
    #[default]
    Refuse,
    /// The new one takes over, and the difference is a part of the answer: the fold was mended, but the view's
    /// version was not raised.
    Replace,
}

/// What a rebuild is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RebuildPhase {
    /// Copies the files of a base; counted in bytes, in place of events.
    Copying,
    /// Folds the history.
    Building,
    /// Compares the rows with those that are served, as of the same checkpoint.
    Comparing,
    /// Folds what was appended meanwhile.
    CatchingUp,
    /// It has ended; [`RebuildHandle::wait`] tells how.
    Ended,
}

/// How far a rebuild has come.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RebuildStatus {
    /// What it is doing.
    pub phase: RebuildPhase,
    /// Whether it was told to pause.
    pub paused: bool,
    /// Which pass over the journal it is, from 1 on; more than one if the rows need more memory than they may.
    pub pass: u32,
    /// Events seen in this pass.
    pub events: u64,
    /// Of so many.
    pub events_total: u64,
    /// The rate of this pass, pauses included.
    pub events_per_second: f64,
    /// When all of these will be read, if it goes on as it has. `None` if nobody knows: none were read yet; or all were, and
    /// it writes what it has made, or folds what was appended since it began to catch up, however much that will be.
    pub remaining: Option<Duration>,
}

impl fmt::Display for RebuildStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.phase {
            _ if self.paused => "paused",
            RebuildPhase::Copying => "copying",
            RebuildPhase::Building => "building",
            RebuildPhase::Comparing => "comparing",
            RebuildPhase::CatchingUp => "catching up",
            RebuildPhase::Ended => "ended",
        };
        let (events, total, rate) = (self.events, self.events_total, self.events_per_second);
        let what = if self.phase == RebuildPhase::Copying { "bytes" } else { "events" };
        write!(f, "{phase}: {events} of {total} {what}, {rate:.0}/s")?;
        if self.pass > 1 {
            write!(f, ", pass {}", self.pass)?;
        }
        self.remaining.map_or(Ok(()), |left| write!(f, ", {:.0} s left", left.as_secs_f64()))
    }
}

/// A generation has taken over, or was checked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Rebuilt {
    /// Number of the generation that was built.
    pub generation: u32,
    /// Number of the one that was served until then; [`ViewControl::rollback`](super::ViewControl::rollback) goes back
    /// to it, [`ViewControl::remove_generation`](super::ViewControl::remove_generation) deletes it. `None` if its version
    /// read none.
    pub previous: Option<u32>,
    /// What the comparison with the old one said; `None` if there was nothing to compare: the old one was far
    /// behind, or its rows were not known to be of this journal.
    pub compared: Option<Comparison>,
    /// How long it took.
    pub took: Duration,
}

/// Two generations of the same events.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Comparison {
    /// They were compared as of here; of several journals, when so many events of all of them were applied.
    pub position: Position,
    /// BLAKE3 over keys, rows and index entries of the one that is served.
    pub served: Digest,
    /// The same of the one that was built from the journal.
    pub built: Digest,
}

impl Comparison {
    /// Whether they are the same.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.served == self.built
    }
}

/// What rows come to: two generations with the same digest have the same rows and index entries.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest {
    /// How many rows.
    pub rows: u64,
    /// BLAKE3 over keys and rows, in the order of the keys, and then over the index entries.
    pub hash: [u8; 32],
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows ", self.rows)?;
        self.hash.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a rebuild has ended without taking over. What was served before is served on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RebuildError {
    /// It was cancelled, or the view was closed.
    #[error("the rebuild was cancelled")]
    Cancelled,
    /// An event can't be applied, the journal can't be read, or the database failed.
    #[error("the rebuild stopped: {0}")]
    Stopped(#[source] Arc<StopError>),
    /// The rows built from the journal are others than those that are served.
    #[error(
        "up to position {}, the rows built from the journal ({}) are others than those that are served ({})",
        .0.position, .0.built, .0.served
    )]
    Different(Comparison),
    /// Somebody decided meanwhile that a parked event is left out, and what was built has it. Begin again.
    #[error(
        "it was decided meanwhile that an event is left out, which what was built has: begin again"
    )]
    Overtaken,
    /// The code of a view can't wait for it: it may be waiting for that code to return. It goes on.
    #[error("from within the code of a view a rebuild can't be waited for")]
    WithinFold,
    /// Its folder can't be prepared, or the pointer not be replaced.
    #[error(transparent)]
    View(ViewError),
}

impl RebuildError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Cancelled => "rebuild.cancelled",
            Self::Stopped(error) => error.code(),
            Self::Different(_) => "rebuild.different",
            Self::Overtaken => "rebuild.overtaken",
            Self::WithinFold => "view.within_fold",
            Self::View(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Cancelled => "begin again when it suits",
            Self::WithinFold => "wait for it outside of the view",
            Self::Overtaken => "begin again; decide about parked events before or after",
            Self::Stopped(error) => error.hint(),
            Self::Different(_) => {
                "if the fold was changed, raise the view's version, or rebuild with OnDifference::Replace; if not, check whether the fold is pure (no clock, no randomness, no order of a hash map)"
            }
            Self::View(error) => error.hint(),
        }
    }
}

impl From<ViewError> for RebuildError {
    fn from(error: ViewError) -> Self {
        Self::View(error)
    }
}

impl From<StopError> for RebuildError {
    fn from(error: StopError) -> Self {
        Self::Stopped(Arc::new(error))
    }
}

impl From<Cancelled> for RebuildError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

/// A rebuild that is running, or has ended. Clones are of the same. Dropping it lets the rebuild go on.
#[derive(Clone, Debug)]
pub struct RebuildHandle {
    control: Arc<Control>,
}

impl RebuildHandle {
    pub(super) const fn new(control: Arc<Control>) -> Self {
        Self { control }
    }

    /// Of something that hasn't begun yet.
    #[cfg(feature = "cli")]
    pub(crate) fn unbegun(options: &RebuildOptions) -> Self {
        Self::new(Control::new(options))
    }

    #[cfg(feature = "cli")]
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// How far it has come.
    #[must_use]
    pub fn status(&self) -> RebuildStatus {
        self.control.status()
    }

    /// Stops it until [`resume`](Self::resume). Returns at once; what is being folded is folded first. What it didn't read
    /// meanwhile isn't made up for: behind it, as much may be read per second as in front.
    pub fn pause(&self) {
        self.control.change(|state| state.paused = true);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.control.change(|state| state.paused = false);
    }

    /// How much of the journal it may read per second from now on, as [`RebuildOptions::bytes_per_second_max`] says; `None`
    /// for no limit.
    pub fn throttle(&self, bytes_per_second_max: Option<u64>) {
        self.control.change(|state| state.throttle(bytes_per_second_max));
    }

    /// Ends it. What it has built is deleted. Does nothing if it has taken over already.
    pub fn cancel(&self) {
        self.control.cancel();
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// [`RebuildError`]; the generation that was served is served on, then. [`RebuildError::WithinFold`] if the code of a
    /// view asks for it.
    pub fn wait(&self) -> Result<Rebuilt, RebuildError> {
        if is_within_fold() {
            return Err(RebuildError::WithinFold);
        }
        self.control.wait()
    }
}

/// It was asked to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cancelled;

/// What a rebuild shares with its handles.
#[derive(Debug)]
pub(super) struct Control {
    state: Mutex<ControlState>,
    changed: Condvar,
}

#[derive(Debug)]
struct ControlState {
    phase: RebuildPhase,
    paused: bool,
    cancelled: bool,
    pass: u32,
    events: u64,
    events_total: u64,
    pass_began: Instant,
    throttled: Option<Throttle>,
    outcome: Option<Result<Rebuilt, RebuildError>>,
}

/// So much time in which it could have read and didn't is made up for.
const IDLE_MAX: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Throttle {
    bytes_per_second_max: u64,
    since: Instant,
    bytes: u64,
}

impl Throttle {
    const fn new(bytes_per_second_max: u64, now: Instant) -> Self {
        Self { bytes_per_second_max, since: now, bytes: 0 }
    }

    /// It reads from now on. If it hasn't for a while, because it was paused or had other things to do, it doesn't read the more
    /// for it.
    fn reads_on(&mut self, now: Instant) {
        if now.saturating_duration_since(self.due()) > IDLE_MAX {
            *self = Self::new(self.bytes_per_second_max, now);
        }
    }

    /// When what was read may have been read.
    fn due(&self) -> Instant {
        let seconds = self.bytes as f64 / self.bytes_per_second_max.max(1) as f64;
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        self.since.checked_add(wait).unwrap_or_else(|| self.since + Duration::from_secs(3600))
    }
}

impl ControlState {
    fn throttle(&mut self, bytes_per_second_max: Option<u64>) {
        let now = Instant::now();
        self.throttled = bytes_per_second_max.map(|bytes_max| Throttle::new(bytes_max, now));
    }

    fn reads_on(&mut self, now: Instant) {
        if let Some(throttle) = &mut self.throttled {
            throttle.reads_on(now);
        }
    }
}

impl Control {
    pub(super) fn new(options: &RebuildOptions) -> Arc<Self> {
        let mut state = ControlState {
            phase: RebuildPhase::Building,
            paused: false,
            cancelled: false,
            pass: 0,
            events: 0,
            events_total: 0,
            pass_began: Instant::now(),
            throttled: None,
            outcome: None,
        };
        state.throttle(options.bytes_per_second_max);
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn change(&self, change: impl FnOnce(&mut ControlState)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    pub(super) fn cancel(&self) {
        self.change(|state| state.cancelled = true);
    }

    /// A pass over so many events begins.
    pub(super) fn pass_begins(&self, phase: RebuildPhase, events_total: u64) {
        self.change(|state| {
            let again = state.phase == phase && phase == RebuildPhase::Building;
            state.pass = if again { state.pass + 1 } else { 1 };
            (state.phase, state.events, state.events_total) = (phase, 0, events_total);
            state.pass_began = Instant::now();
            state.reads_on(state.pass_began);
        });
    }

    /// So much was read. Waits while it is paused, and as long as it takes not to read more than allowed.
    pub(super) fn advance(&self, events: u64, bytes: u64) -> Result<(), Cancelled> {
        let mut state = self.state.lock();
        state.events += events;
        if let Some(throttle) = &mut state.throttled {
            throttle.bytes += bytes;
        }
        loop {
            if state.cancelled {
                return Err(Cancelled);
            }
            let now = Instant::now();
            let due = state.throttled.as_ref().map(Throttle::due);
            if state.paused {
                self.changed.wait(&mut state);
            } else if let Some(due) = due.filter(|due| *due > now) {
                self.changed.wait_until(&mut state, due);
            } else {
                state.reads_on(now);
                return Ok(());
            }
        }
    }

    /// How much is to be read before it does something else, at the most: all that may be read within the time that is made
    /// up for. Whoever reads more, and then folds it for longer than that, comes to less than is allowed.
    pub(super) fn bytes_at_once(&self) -> u64 {
        let state = self.state.lock();
        let throttled = state.throttled.as_ref();
        throttled.map_or(u64::MAX, |it| it.bytes_per_second_max.saturating_mul(IDLE_MAX.as_secs()))
    }

    /// Whether it was asked to end. Never waits: for where others wait for it.
    pub(super) fn check_at_once(&self) -> Result<(), Cancelled> {
        if self.state.lock().cancelled { Err(Cancelled) } else { Ok(()) }
    }

    /// Waits while it is paused.
    pub(super) fn check(&self) -> Result<(), Cancelled> {
        self.advance(0, 0)
    }

    pub(super) fn end(&self, outcome: Result<Rebuilt, RebuildError>) {
        self.change(|state| {
            state.phase = RebuildPhase::Ended;
            state.outcome.get_or_insert(outcome);
        });
    }

    pub(super) fn has_ended(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    fn wait(&self) -> Result<Rebuilt, RebuildError> {
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    pub(super) fn status(&self) -> RebuildStatus {
        let state = self.state.lock();
        let seconds = state.pass_began.elapsed().as_secs_f64();
        let events_per_second = if seconds > 0.0 { state.events as f64 / seconds } else { 0.0 };
        let left = state.events_total.saturating_sub(state.events);
        let seconds_left = left as f64 / events_per_second;
        let is_known = state.phase != RebuildPhase::Ended && left > 0;
        RebuildStatus {
            phase: state.phase,
            paused: state.paused,
            pass: state.pass,
            events: state.events,
            events_total: state.events_total,
            events_per_second,
            remaining: Duration::try_from_secs_f64(seconds_left).ok().filter(|_| is_known),
        }
    }
}

/// A generation on disk, as [`ViewControl::generations`](super::ViewControl::generations) lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GenerationInfo {
    /// The view's version that can read it.
    pub version: u32,
    /// Its number, within the version.
    pub number: u32,
    /// Whether it is the one that its version reads.
    pub live: bool,
    /// Its folder.
    pub folder: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_SECOND: Duration = Duration::from_secs(1);

    fn due(control: &Control) -> Instant {
        control.state.lock().throttled.as_ref().unwrap().due()
    }

    /// The throttle counted from its first byte on: behind a pause of an hour, what could have been read within it was read
    /// at full speed, from the disk that the throttle was to spare.
    #[test]
    fn what_was_not_read_in_a_pause_is_not_made_up_for() {
        let options =
            RebuildOptions { bytes_per_second_max: Some(1000), ..RebuildOptions::default() };
        for pass_begins in [false, true] {
            let control = Control::new(&options);
            // As if it had stood still for some time.
            let long_ago = Instant::now().checked_sub(10 * A_SECOND).unwrap();
            control.state.lock().throttled = Some(Throttle::new(1000, long_ago));
            let now = Instant::now();
            if pass_begins {
                control.pass_begins(RebuildPhase::Building, 1);
            } else {
                control.check().unwrap();
            }
            assert!(due(&control) >= now, "a pass begins: {pass_begins}");
        }
    }

    /// Who catches up folds what is appended meanwhile, too, and said to be done with it in no time.
    #[test]
    fn what_was_to_be_read_tells_when_it_is_over_and_what_comes_behind_it_nothing() {
        let control = Control::new(&RebuildOptions::default());
        control.pass_begins(RebuildPhase::CatchingUp, 10);
        assert_eq!(control.status().remaining, None, "nothing was read");
        control.state.lock().pass_began = Instant::now().checked_sub(5 * A_SECOND).unwrap();
        control.advance(5, 0).unwrap();
        let remaining = control.status().remaining.unwrap();
        assert!((5..60).contains(&remaining.as_secs()), "{remaining:?}");
        for more in [5, 7] {
            control.advance(more, 0).unwrap();
            assert_eq!(control.status().remaining, None, "{}", control.status());
        }
    }

    #[test]
    fn who_reads_more_slowly_than_allowed_waits_for_nothing() {
        let mut now = Instant::now();
        let mut throttle = Throttle::new(1000, now);
        for seconds in [1, 5, 1, 1, 60, 2] {
            throttle.reads_on(now);
            throttle.bytes += 1000;
            now += seconds * A_SECOND;
            assert!(throttle.due() <= now, "behind a piece that took {seconds} s");
        }
        // But behind all that not more than a second's bytes at once.
        throttle.reads_on(now);
        throttle.bytes += 3000;
        assert!(throttle.due() >= now + 2 * A_SECOND);
    }
}
