//! The thread that follows the journal for a reactor, and what it shares with the handles.
//!
//! ```text
//!          ┌ of this history ──▶ Running ◀── resume ── Paused
//! open ────┤ ahead of a mirror ▶ AwaitingMirror ── equal ──▶ Running
//!          └ not to be judged ─▶ Halted ── resume, skip ──▶ Running     journal closed, or last handle gone ▶ Closed
//!                                  ▲ effect, journal or checkpoint failed; fork
//! ```
//!
//! Invariants:
//! - Only this thread reacts, and only it writes the checkpoint.
//! - `durable <= next <= the journal's durable end`, except while awaiting a mirror.
//! - Before it reacts to anything, what was stored was found in the journal.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use parking_lot::{Condvar, Mutex};

use super::attempts::{At, Attempts, DEATHS_MAX};
use super::checkpoint::{self, Place};
use super::error::{EventFailure, HaltError, OpenReactorError, SkipError};
use super::{IdempotencyKey, ReactError, Reactor, ReactorOptions, Start};
use crate::error::{IoError, ReadError};
use crate::event::{Event, EventKindRef, Names, Payload, Recorded};
use crate::format::files::{Mark, Role};
use crate::format::record::RecordRef;
use crate::fs::{Fs, Lock};
use crate::journal::{Comparison, Cursor, CursorBatch, Journal};
use crate::position::{Checkpoint, Locator, Position};
use crate::upcast::Decoded;

/// How long the thread sleeps at most before it looks whether something is asked of it.
const TICK: Duration = Duration::from_millis(50);

/// What the handles share with the thread.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: &'static str,
    pub(super) journal: Journal,
    state: Mutex<State>,
    changed: Condvar,
    _lock: Box<dyn Lock>,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    wish: Wish,
    /// The event that is to be skipped, in front of which the reactor has halted.
    skip: Option<Position>,
    pub(super) next: Position,
    pub(super) durable: Position,
    pub(super) counts: Counts,
    /// How often the event that is under way has failed, and the last failure.
    pub(super) failing: Option<(u32, String)>,
    last_write: Option<IoError>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) reacted: u64,
    pub(super) unknown: u64,
    pub(super) skipped: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Running,
    AwaitingMirror,
    Paused,
    Halted(Arc<HaltError>),
    Closed,
}

/// What the handles want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

/// Ends the thread when the last handle is dropped.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    thread_id: ThreadId,
}

/// What a stored checkpoint says.
enum Judgement {
    GoOn(Place),
    AwaitMirror(Place),
    Unknown(Place, ReadError),
}

/// Opens a reactor: locks its folder, judges its checkpoint, and starts the thread.
pub(super) fn start<R: Reactor>(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    journal: Journal,
    reactor: R,
    options: ReactorOptions,
) -> Result<Running, OpenReactorError> {
    let lock = checkpoint::lock(&**fs, dir)?
        .map_err(|owner| OpenReactorError::InUse { path: dir.to_owned(), owner })?;
    let judgement = judge(&**fs, dir, R::NAME, &journal, &options)?;
    let (place, phase, judged) = match judgement {
        Judgement::GoOn(place) => (place, Phase::Running, true),
        Judgement::AwaitMirror(place) => (place, Phase::AwaitingMirror, false),
        Judgement::Unknown(place, source) => {
            let halt = HaltError::Journal { reactor: R::NAME, position: place.next, source };
            (place, Phase::Halted(Arc::new(halt)), false)
        }
    };
    let state = State {
        phase,
        wish: Wish::Run,
        skip: None,
        next: place.next,
        durable: place.next,
        counts: Counts::default(),
        failing: None,
        last_write: None,
    };
    let shared = Arc::new(Shared {
        name: R::NAME,
        journal,
        state: Mutex::new(state),
        changed: Condvar::new(),
        _lock: lock,
    });
    let runner = Runner {
        reactor,
        options,
        fs: Arc::clone(fs),
        dir: dir.to_owned(),
        shared: Arc::clone(&shared),
        place,
        judged,
        unsaved: None,
        attempts: Attempts::open(&**fs, dir),
        told_of_deaths: None,
        names: Names::default(),
    };
    let thread = thread::Builder::new()
        .name(format!("reactor-{}", R::NAME))
        .spawn(move || runner.run())
        .map_err(|source| OpenReactorError::Thread {
            reactor: R::NAME,
            source: Arc::new(source),
        })?;
    let thread_id = thread.thread().id();
    Ok(Running { shared, thread: Mutex::new(Some(thread)), thread_id })
}

fn judge(
    fs: &dyn Fs,
    dir: &Path,
    reactor: &'static str,
    journal: &Journal,
    options: &ReactorOptions,
) -> Result<Judgement, OpenReactorError> {
    let begin = |start| {
        let place = beginning(journal, start);
        checkpoint::write(fs, dir, &place)?;
        Ok(Judgement::GoOn(place))
    };
    let place = match checkpoint::read(fs, dir)? {
        None => return begin(options.start),
        Some(Ok(place)) => place,
        Some(Err(source)) => {
            let path = checkpoint::path(dir);
            let damaged = OpenReactorError::DamagedCheckpoint { path, source };
            return options.restart.map_or(Err(damaged), begin);
        }
    };
    let checkpoint = place.checkpoint;
    let refused = match compare(journal, &checkpoint) {
        Ok(Comparison::Equal) => return Ok(Judgement::GoOn(place)),
        Err(ReadError::Gap { .. } | ReadError::Truncated { .. }) if options.restart.is_some() => {
            return options.restart.map_or(Ok(Judgement::GoOn(place)), begin);
        }
        Err(error) => return Ok(Judgement::Unknown(place, error)),
        Ok(Comparison::Ahead) if journal.role() == Role::Mirror => {
            return Ok(Judgement::AwaitMirror(place));
        }
        Ok(Comparison::Ahead) => {
            let end = journal.end().position;
            OpenReactorError::LostTail { reactor, checkpoint, end }
        }
        Ok(Comparison::Differs | Comparison::Foreign) => {
            OpenReactorError::OtherHistory { reactor, checkpoint }
        }
    };
    options.restart.map_or(Err(refused), begin)
}

fn beginning(journal: &Journal, start: Start) -> Place {
    Place::at(match start {
        Start::Now => journal.end(),
        Start::Oldest => journal.start(),
        Start::Beginning => Mark::start(journal.id()).end,
    })
}

/// Compares a checkpoint with the journal. Within one history, more events are more bytes: a checkpoint that
/// is ahead of the end in only one of the two is of another history.
fn compare(journal: &Journal, checkpoint: &Checkpoint) -> Result<Comparison, ReadError> {
    let end = journal.end();
    let (has_position, has_offset) =
        (checkpoint.position <= end.position, checkpoint.offset <= end.offset);
    match journal.compare(checkpoint)? {
        Comparison::Ahead if has_position != has_offset => Ok(Comparison::Differs),
        comparison => Ok(comparison),
    }
}

struct Runner<R> {
    reactor: R,
    options: ReactorOptions,
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    shared: Arc<Shared>,
    /// What is done.
    place: Place,
    /// What was stored was found in the journal.
    judged: bool,
    /// What is done and isn't recorded: how many events, and since when.
    unsaved: Option<(u64, Instant)>,
    attempts: Attempts,
    /// It has halted in front of this event because the process had died of it: whoever resumes it wants it tried.
    told_of_deaths: Option<Position>,
    names: Names,
}

/// Why following ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Something else is asked for.
    Asked,
    /// The journal was closed, and everything is done.
    Closed,
}

impl<R: Reactor> Runner<R> {
    fn run(mut self) {
        while self.shared.wait_until_to_run() {
            let ended = self.follow();
            let saved = self.save();
            match ended.and_then(|ended| saved.map(|()| ended)) {
                Ok(Ended::Asked) => self.shared.pause_if_asked(),
                Ok(Ended::Closed) => break,
                Err(halt) => self.shared.change(|state| {
                    state.skip = None;
                    state.phase = Phase::Halted(Arc::new(halt));
                }),
            }
        }
        self.shared.change(|state| state.phase = Phase::Closed);
    }

    fn follow(&mut self) -> Result<Ended, HaltError> {
        if !self.judged && !self.is_told_to_go_on() && !self.await_mirror()? {
            return Ok(Ended::Asked);
        }
        self.judged = true;
        self.shared.change(|state| state.phase = Phase::Running);
        let journal = self.shared.journal.clone();
        let mut cursor = match journal.cursor(self.place.next) {
            Err(ReadError::Truncated { .. }) if self.takes_skip(self.place.next) => {
                self.done(Place::at(journal.start()), |counts| counts.skipped += 1);
                journal.cursor(self.place.next)
            }
            cursor => cursor,
        }
        .map_err(|error| self.journal_failed(error))?;
        while self.shared.is_to_run() {
            // Asked first: what was published before the closing is still to be read.
            let closed = journal.is_closed();
            let idle = match cursor.next_batch() {
                Ok(Some(batch)) if self.batch(&batch)? => false,
                // The rest of the batch is still to be done: whoever goes on begins at it.
                Ok(Some(_)) => return Ok(Ended::Asked),
                Ok(None) => true,
                Err(error) => {
                    self.gap(&mut cursor, error)?;
                    false
                }
            };
            self.tend()?;
            if idle && closed {
                return Ok(Ended::Closed);
            }
            if idle {
                let _end = journal.wait_past(cursor.position(), TICK);
            }
        }
        Ok(Ended::Asked)
    }

    /// What was done can't be compared any more, because it lies where events were lost or removed, and whoever is asked
    /// has said to go on behind them.
    fn is_told_to_go_on(&self) -> bool {
        let compared = compare(&self.shared.journal, &self.place.checkpoint);
        let is_gone = matches!(compared, Err(ReadError::Gap { .. } | ReadError::Truncated { .. }));
        is_gone && self.shared.state().skip == Some(self.place.next)
    }

    /// Waits until the mirror has what was done; false if something else is asked for.
    fn await_mirror(&self) -> Result<bool, HaltError> {
        let checkpoint = self.place.checkpoint;
        let before = Position::new(checkpoint.position.get().saturating_sub(1));
        let journal = &self.shared.journal;
        while self.shared.is_to_run() {
            match compare(journal, &checkpoint).map_err(|error| self.journal_failed(error))? {
                Comparison::Equal => return Ok(true),
                Comparison::Ahead if journal.role() == Role::Mirror => {
                    self.shared.change(|state| state.phase = Phase::AwaitingMirror);
                    let _end = journal.wait_past(before, TICK);
                    if journal.is_closed() {
                        thread::sleep(TICK); // the end won't move; whoever has the handle decides
                    }
                }
                _ => return Err(HaltError::Fork { reactor: R::NAME, checkpoint }),
            }
        }
        Ok(false)
    }

    /// Reacts to the events of a batch that aren't done; false if something else was asked for in between.
    fn batch(&mut self, batch: &CursorBatch<'_>) -> Result<bool, HaltError> {
        let mut position = batch.batch.header.base_position;
        for record in batch.batch.records() {
            let journal = self.shared.journal.clone();
            let record =
                record.map_err(|error| self.journal_failed(batch.unreadable(&journal, error)))?;
            if position >= self.place.next {
                if !self.shared.is_to_run() || !self.event(batch, &record, position)? {
                    return Ok(false);
                }
                self.tend()?;
            }
            position = position.advance(1);
        }
        Ok(true)
    }

    /// Does what is to be done about an event; false if something else is asked for before that.
    fn event(
        &mut self,
        batch: &CursorBatch<'_>,
        record: &RecordRef<'_>,
        position: Position,
    ) -> Result<bool, HaltError> {
        let behind = Place { checkpoint: batch.end(), next: position.advance(1) };
        if self.takes_skip(position) {
            self.done(behind, |counts| counts.skipped += 1);
            self.save()?;
            return Ok(true);
        }
        let payload = Payload { codec: record.codec, bytes: record.payload };
        let kind = EventKindRef { name: record.event_type, schema_version: record.schema_version };
        let journal = self.shared.journal.id();
        let header = &batch.batch.header;
        let at = At { journal, position, id: record.id };
        let kinds = R::Event::KINDS;
        // Events of other types are many, and nothing happens to them.
        let is_known = kinds.is_empty() || kinds.iter().any(|it| it.kind.name == record.event_type);
        if is_known {
            self.halt_at_killer(record, at, header.time_us)?;
            self.attempts.begin(at);
        }
        let recorded = |data, names: &mut Names| {
            Recorded::from_record_with(record, journal, position, header.time_us, names, data)
        };
        let decoded = catch_unwind(AssertUnwindSafe(|| R::Event::decode(kind, payload)))
            .map_err(|panic| EventFailure::Panicked(message_of(&*panic)))
            .and_then(|decoded| decoded.map_err(EventFailure::Undecodable));
        if is_known {
            self.attempts.pause(at);
        }
        match decoded {
            Ok(Decoded::Foreign) => {
                self.done(behind, |counts| counts.unknown += 1);
                return Ok(true);
            }
            Ok(decoded) => {
                let (locator, incarnation) = (Locator { journal, position }, header.incarnation);
                for (part, data) in (0..).zip(decoded) {
                    let event = recorded(data, &mut self.names);
                    let key = IdempotencyKey { reactor: R::NAME, locator, incarnation, part };
                    if !self.react(&event, &key)? {
                        return Ok(false);
                    }
                }
            }
            Err(cause) => {
                let event = Recorded::from_record_with(
                    record,
                    journal,
                    position,
                    header.time_us,
                    &mut self.names,
                    (),
                );
                return Err(halted_at(&event, R::NAME, 1, cause));
            }
        }
        self.attempts.end(at);
        self.done(behind, |counts| counts.reacted += 1);
        Ok(true)
    }

    /// The process has died of this event so often that whoever is asked is asked first.
    fn halt_at_killer(
        &mut self,
        record: &RecordRef<'_>,
        at: At,
        time_us: i64,
    ) -> Result<(), HaltError> {
        let deaths = self.attempts.deaths(at);
        if deaths < DEATHS_MAX || self.told_of_deaths == Some(at.position) {
            return Ok(());
        }
        self.told_of_deaths = Some(at.position);
        self.attempts.pause(at); // the note may be of an event in front that was reacted to once more
        let At { journal, position, .. } = at;
        let names = &mut self.names;
        let event = Recorded::from_record_with(record, journal, position, time_us, names, ());
        Err(halted_at(&event, R::NAME, deaths, EventFailure::Died(deaths)))
    }

    /// Tries until it is done; false if something else is asked for before that.
    fn react(
        &mut self,
        event: &Recorded<R::Event>,
        key: &IdempotencyKey,
    ) -> Result<bool, HaltError> {
        self.tend()?; // the part in front of it may have taken long
        let mut delays = ExponentialBuilder::new()
            .with_jitter()
            .with_min_delay(self.options.back_off_min)
            .with_max_delay(self.options.back_off_max)
            .without_max_times()
            .build();
        for attempts in 1.. {
            let Locator { journal, position } = event.locator();
            let at = At { journal, position, id: event.id() };
            self.attempts.begin(at);
            let tried = catch_unwind(AssertUnwindSafe(|| {
                let tried = self.reactor.react(event, key);
                tried
                    .map_err(|ReactError { cause, is_permanent }| (cause.to_string(), is_permanent))
            }));
            self.attempts.pause(at);
            if !matches!(tried, Ok(Ok(()))) {
                self.attempts.end(at);
            }
            let (cause, is_permanent) = match tried {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error,
                Err(panic) => {
                    let cause = EventFailure::Panicked(message_of(&*panic));
                    return Err(halted_at(event, R::NAME, attempts, cause));
                }
            };
            if is_permanent || attempts >= self.options.attempts_max.max(1) {
                return Err(halted_at(event, R::NAME, attempts, EventFailure::Refused(cause)));
            }
            // What is done in front of it doesn't wait for it: others may need long to mend what it fails of.
            self.save()?;
            let delay = delays.next().unwrap_or(self.options.back_off_max);
            self.shared.change(|state| state.failing = Some((attempts, cause)));
            if !self.shared.sleep(delay) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// At lost events: behind them if they are to be skipped.
    fn gap(&mut self, cursor: &mut Cursor, error: ReadError) -> Result<(), HaltError> {
        let skips = matches!(error, ReadError::Gap { .. }) && self.takes_skip(self.place.next);
        let Some(lost) = skips.then(|| cursor.skip_gap()).flatten() else {
            return Err(self.journal_failed(error));
        };
        let behind = Place { next: lost.end, ..self.place };
        self.done(behind, |counts| counts.skipped += lost.end.since(lost.start));
        self.save()
    }

    fn takes_skip(&self, position: Position) -> bool {
        let mut state = self.shared.state.lock();
        let wanted = state.skip == Some(position);
        if wanted {
            state.skip = None;
        }
        wanted
    }

    fn done(&mut self, place: Place, count: impl FnOnce(&mut Counts)) {
        let (events, since) = self.unsaved.unwrap_or_else(|| (0, Instant::now()));
        self.unsaved = Some((events + 1, since));
        self.place = place;
        self.shared.change(|state| {
            state.next = place.next;
            state.failing = None;
            count(&mut state.counts);
        });
    }

    /// Records what is done when it is time.
    fn tend(&mut self) -> Result<(), HaltError> {
        let due = self.unsaved.is_some_and(|(events, since)| {
            events >= self.options.checkpoint_events
                || since.elapsed() >= self.options.checkpoint_interval
        });
        if due { self.save() } else { Ok(()) }
    }

    /// Records what is done, durably.
    fn save(&mut self) -> Result<(), HaltError> {
        if self.unsaved.is_none() {
            return Ok(());
        }
        let written = checkpoint::write(&*self.fs, &self.dir, &self.place);
        let place = self.place;
        self.shared.change(|state| {
            state.last_write = written.as_ref().err().cloned();
            if written.is_ok() {
                state.durable = place.next;
            }
        });
        written.map_err(|source| HaltError::Checkpoint { reactor: R::NAME, source })?;
        self.unsaved = None;
        Ok(())
    }

    fn journal_failed(&self, source: ReadError) -> HaltError {
        HaltError::Journal { reactor: R::NAME, position: self.place.next, source }
    }
}

fn halted_at<E>(
    event: &Recorded<E>,
    reactor: &'static str,
    attempts: u32,
    cause: EventFailure,
) -> HaltError {
    let (position, stream) = (event.position(), event.stream().clone());
    let event_type = event.event_type().clone();
    HaltError::Event { reactor, position, stream, event_type, attempts, cause }
}

pub(crate) fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

impl Shared {
    pub(super) fn state(&self) -> State {
        self.state.lock().clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    fn is_to_run(&self) -> bool {
        self.state.lock().wish == Wish::Run
    }

    /// Blocks while it is paused or halted; false when the thread is to end.
    fn wait_until_to_run(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            match (state.wish, &state.phase) {
                (Wish::Stop, _) => return false,
                (Wish::Run, Phase::Running | Phase::AwaitingMirror) => return true,
                (Wish::Pause, Phase::Running | Phase::AwaitingMirror) => {
                    state.phase = Phase::Paused;
                    self.changed.notify_all();
                }
                _ => self.changed.wait(&mut state),
            }
        }
    }

    fn pause_if_asked(&self) {
        self.change(|state| {
            if state.wish == Wish::Pause {
                state.phase = Phase::Paused;
            }
        });
    }

    /// False if something else is asked for meanwhile.
    fn sleep(&self, time: Duration) -> bool {
        let deadline = Instant::now().checked_add(time);
        let mut state = self.state.lock();
        while state.wish == Wish::Run {
            match deadline {
                Some(deadline) if Instant::now() >= deadline => return true,
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
                None => self.changed.wait(&mut state),
            }
        }
        false
    }

    pub(super) fn pause(&self) {
        self.change(|state| {
            if state.wish == Wish::Run {
                state.wish = Wish::Pause;
            }
        });
    }

    pub(super) fn resume(&self) {
        self.change(State::resume);
    }

    pub(super) fn skip(&self, position: Position) -> Result<(), SkipError> {
        let mut state = self.state.lock();
        let halted_at = match &state.phase {
            Phase::Halted(error) => error.skippable_at(),
            _ => None,
        };
        if halted_at != Some(position) {
            return Err(SkipError::NotThere { halted_at });
        }
        state.skip = Some(position);
        state.resume();
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until `wanted` is true of the state, or time is up; whether it is.
    pub(super) fn wait_for(&self, timeout: Duration, wanted: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        while !wanted(&state) {
            match deadline {
                Some(deadline) if Instant::now() >= deadline => return false,
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
                None => self.changed.wait(&mut state),
            }
        }
        true
    }
}

impl State {
    fn resume(&mut self) {
        if self.wish != Wish::Stop {
            self.wish = Wish::Run;
        }
        if matches!(self.phase, Phase::Paused | Phase::Halted(_)) {
            self.phase = Phase::Running;
            self.failing = None;
        }
    }
}

impl Running {
    /// Ends the thread once the event that is under way is done or has failed, and waits for that.
    pub(super) fn close(&self) -> Result<(), IoError> {
        self.shared.change(|state| state.wish = Wish::Stop);
        // Not for itself: a reactor may hold its own handle. So it isn't kept by the lock from its end, either.
        if thread::current().id() != self.thread_id {
            let mut thread = self.thread.lock(); // whoever else closes it waits as well
            if let Some(thread) = thread.take() {
                drop(thread.join());
            }
        }
        self.shared.state().last_write.map_or(Ok(()), Err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.close());
    }
}
