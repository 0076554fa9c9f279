//! The thread that follows the journal for a view, and what it shares with the view's handles.
//!
//! ```text
//!            ┌ of this history ─▶ Following ─────────────┐
//! open ──────┤ ahead of a mirror ▶ AwaitingMirror ─ equal ┤─ closed ▶ Closed
//!            └ not to be judged ─▶ Stopped ◀── fold, journal or database failed; fork
//! ```
//!
//! Invariants:
//! - Only this thread writes to the view's database.
//! - `durable <= applied <= the journal's durable end`, each a batch end, except while awaiting a mirror.
//! - Whatever ends the thread, what it has applied is flushed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::chunk::{Chunk, Folded, panic_message};
use super::db::{Db, Progress, StorageError, ViewMemory};
use super::error::{StopError, ViewError, WaitError};
use super::generation::Generations;
use super::{LostTail, View, ViewOptions};
use crate::error::ReadError;
use crate::format::batch::genesis;
use crate::format::files::Role;
use crate::fs::os::OsFs;
use crate::journal::{Comparison, Cursor, Journal};
use crate::position::{Checkpoint, Incarnation, JournalId, Position};

/// How long the thread sleeps at most before it looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// What the view's handles share with its thread.
pub(super) struct Shared {
    pub(super) db: Db,
    pub(super) journal: Journal,
    pub(super) set_aside: Option<PathBuf>,
    state: Mutex<State>,
    changed: Condvar,
    // Behind the database: the folder stays locked until that is closed.
    _folder: Generations,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    /// What is applied was found in the journal: before that, the rows may be of another history.
    judged: bool,
    pub(super) applied: Progress,
    pub(super) durable: Checkpoint,
    stop_requested: bool,
    flush_failure: Option<StorageError>,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    Following,
    AwaitingMirror,
    Stopped(Arc<StopError>),
    Closed,
}

/// Ends the thread when the last handle is dropped.
pub(super) struct Running {
    pub(super) shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Opens the view's live generation, judges it, and starts the thread.
pub(super) fn start<V: View>(
    views_dir: &Path,
    journal: Journal,
    view: V,
    options: ViewOptions,
) -> Result<Running, ViewError> {
    let mut folder = Generations::open(Arc::new(OsFs), views_dir, V::NAME)?;
    let opened = open_live::<V>(&mut folder, &journal, &options)?;
    let durable = opened.db.durable(journal.id())?.unwrap_or_else(|| beginning(journal.id()));
    let state = State {
        judged: matches!(opened.phase, Phase::Following),
        phase: opened.phase,
        applied: opened.progress,
        durable,
        stop_requested: false,
        flush_failure: None,
    };
    let shared = Arc::new(Shared {
        db: opened.db,
        journal,
        set_aside: opened.set_aside,
        state: Mutex::new(state),
        changed: Condvar::new(),
        _folder: folder,
    });
    let runner =
        Runner { view, shared: shared.clone(), flush: FlushClock::new(&options, durable.offset) };
    let thread = thread::Builder::new()
        .name(format!("view-{}", V::NAME))
        .spawn(move || runner.run(options.chunk_bytes))
        .map_err(|source| ViewError::Thread { view: V::NAME, source: Arc::new(source) })?;
    Ok(Running { shared, thread: Mutex::new(Some(thread)) })
}

struct Opened {
    db: Db,
    progress: Progress,
    phase: Phase,
    set_aside: Option<PathBuf>,
}

fn open_live<V: View>(
    folder: &mut Generations,
    journal: &Journal,
    options: &ViewOptions,
) -> Result<Opened, ViewError> {
    let (db, progress) = open_db::<V>(&folder.live(V::VERSION)?, journal, &options.memory)?;
    let phase = match judge::<V>(journal, &progress.checkpoint, options.lost_tail)? {
        Judgement::GoOn => Phase::Following,
        Judgement::AwaitMirror => Phase::AwaitingMirror,
        Judgement::Unknown(source) => {
            Phase::Stopped(Arc::new(StopError::Journal { view: V::NAME, source }))
        }
        Judgement::SetAside => {
            let set_aside = Some(db.path().to_owned());
            drop(db);
            let (db, progress) = open_db::<V>(&folder.next(V::VERSION)?, journal, &options.memory)?;
            return Ok(Opened { db, progress, phase: Phase::Following, set_aside });
        }
    };
    Ok(Opened { db, progress, phase, set_aside: None })
}

fn open_db<V: View>(
    path: &Path,
    journal: &Journal,
    memory: &ViewMemory,
) -> Result<(Db, Progress), StorageError> {
    let db = Db::open(path, memory)?;
    let start = Progress { checkpoint: beginning(journal.id()), skipped_events: 0 };
    let progress = db.begin(V::NAME, V::VERSION, start)?;
    Ok((db, progress))
}

/// The checkpoint of a view that has applied nothing.
fn beginning(journal: JournalId) -> Checkpoint {
    Checkpoint {
        journal,
        epoch: 0,
        incarnation: Incarnation::default(),
        offset: 0,
        position: Position::START,
        chain: genesis(journal),
    }
}

/// What a stored checkpoint says about the rows that are of it.
enum Judgement {
    GoOn,
    SetAside,
    AwaitMirror,
    Unknown(ReadError),
}

fn judge<V: View>(
    journal: &Journal,
    checkpoint: &Checkpoint,
    lost_tail: LostTail,
) -> Result<Judgement, ViewError> {
    Ok(match compare(journal, checkpoint) {
        Err(error) => Judgement::Unknown(error),
        Ok(Comparison::Equal) => Judgement::GoOn,
        Ok(Comparison::Differs | Comparison::Foreign) => Judgement::SetAside,
        Ok(Comparison::Ahead) if journal.role() == Role::Mirror => Judgement::AwaitMirror,
        Ok(Comparison::Ahead) if lost_tail == LostTail::SetAside => Judgement::SetAside,
        Ok(Comparison::Ahead) => {
            let (checkpoint, end) = (*checkpoint, journal.end().position);
            return Err(ViewError::LostTail { view: V::NAME, checkpoint, end });
        }
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

/// When to flush, counted from the first write that isn't durable.
struct FlushClock {
    bytes: u64,
    interval: Duration,
    flushed_offset: u64,
    unflushed_since: Option<Instant>,
    looked_at: Instant,
}

impl FlushClock {
    fn new(options: &ViewOptions, flushed_offset: u64) -> Self {
        Self {
            bytes: options.flush_bytes,
            interval: options.flush_interval,
            flushed_offset,
            unflushed_since: None,
            looked_at: Instant::now(),
        }
    }

    /// Something isn't durable: the clock runs.
    fn start(&mut self) {
        self.unflushed_since.get_or_insert_with(Instant::now);
    }

    fn is_due(&self, applied_offset: u64) -> bool {
        self.unflushed_since.is_some_and(|since| {
            applied_offset.saturating_sub(self.flushed_offset) >= self.bytes
                || since.elapsed() >= self.interval
        })
    }

    fn flushed(&mut self, applied_offset: u64) {
        self.flushed_offset = applied_offset;
        self.unflushed_since = None;
    }
}

struct Runner<V> {
    view: V,
    shared: Arc<Shared>,
    flush: FlushClock,
}

impl<V: View> Runner<V> {
    fn run(mut self, chunk_bytes: u64) {
        let outcome =
            catch_unwind(AssertUnwindSafe(|| self.enter(chunk_bytes))).unwrap_or_else(|panic| {
                Err(StopError::Panic { view: V::NAME, message: panic_message(&*panic) })
            });
        self.shared.end(outcome);
    }

    fn enter(&mut self, chunk_bytes: u64) -> Result<(), StopError> {
        match self.shared.state().phase {
            Phase::Following => self.follow(chunk_bytes),
            Phase::AwaitingMirror if self.await_mirror()? => self.follow(chunk_bytes),
            Phase::AwaitingMirror | Phase::Stopped(_) | Phase::Closed => Ok(()),
        }
    }

    /// Waits until the mirror has what the view has applied; false if that won't happen any more.
    fn await_mirror(&self) -> Result<bool, StopError> {
        let checkpoint = self.shared.state().applied.checkpoint;
        let before = Position::new(checkpoint.position.get().saturating_sub(1));
        while !self.shared.is_to_end() {
            let closed = self.shared.journal.is_closed();
            let end = self.shared.journal.wait_past(before, TICK);
            match compare(&self.shared.journal, &checkpoint).map_err(journal_failed::<V>)? {
                Comparison::Equal => {
                    self.shared.change(|state| {
                        state.phase = Phase::Following;
                        state.judged = true;
                    });
                    return Ok(true);
                }
                Comparison::Ahead if closed => return Ok(false),
                Comparison::Ahead => {}
                _ => {
                    let end = end.position;
                    return Err(StopError::Fork { view: V::NAME, checkpoint, end });
                }
            }
        }
        Ok(false)
    }

    fn follow(&mut self, chunk_bytes: u64) -> Result<(), StopError> {
        let start = self.shared.state().applied.checkpoint.position;
        let mut cursor = self.shared.journal.cursor(start).map_err(journal_failed::<V>)?;
        while !self.shared.is_to_end() {
            // Asked first: what was published before the closing is still to be read.
            let closed = self.shared.journal.is_closed();
            let (chunk, failure) = self.collect(&mut cursor, chunk_bytes);
            let idle = chunk.is_empty();
            if !idle {
                self.apply(chunk)?;
            }
            self.tend().map_err(storage_failed::<V>)?;
            match failure {
                Some(failure) => return Err(failure),
                None if idle && closed => return Ok(()),
                None if idle => {
                    let _end = self.shared.journal.wait_past(cursor.position(), TICK);
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Batches for one write, and why there are no more.
    fn collect(&self, cursor: &mut Cursor, chunk_bytes: u64) -> (Chunk<V>, Option<StopError>) {
        let mut chunk = Chunk::new(self.shared.state().applied);
        while chunk.bytes() < chunk_bytes.max(1) {
            let added = match cursor.next_batch() {
                Ok(Some(batch)) => chunk.add(&self.view, &self.shared.journal, &batch),
                Ok(None) => break,
                Err(error) => Err(journal_failed::<V>(error)),
            };
            if let Err(failure) = added {
                return (chunk, Some(failure));
            }
        }
        (chunk, None)
    }

    fn apply(&mut self, chunk: Chunk<V>) -> Result<(), StopError> {
        let Folded { writes, end, stop } = chunk.fold(&self.view, &self.shared.db)?;
        self.shared.db.write(writes, &end).map_err(storage_failed::<V>)?;
        self.flush.start();
        self.shared.change(|state| state.applied = end);
        stop.map_or(Ok(()), Err)
    }

    /// Flushes when it is time, and looks how far the last flush has got.
    fn tend(&mut self) -> Result<(), StorageError> {
        let state = self.shared.state();
        let applied = state.applied.checkpoint;
        if self.flush.is_due(applied.offset) {
            self.shared.db.flush(false)?;
            self.flush.flushed(applied.offset);
        }
        if state.durable != applied && self.flush.looked_at.elapsed() >= TICK {
            self.shared.look_at_durable()?;
            self.flush.looked_at = Instant::now();
            // A flush runs in the background: asking for it again tells whether it failed.
            self.flush.start();
        }
        Ok(())
    }
}

fn journal_failed<V: View>(source: ReadError) -> StopError {
    StopError::Journal { view: V::NAME, source }
}

fn storage_failed<V: View>(source: StorageError) -> StopError {
    StopError::Storage { view: V::NAME, source }
}

impl Shared {
    pub(super) fn state(&self) -> State {
        self.state.lock().clone()
    }

    fn is_to_end(&self) -> bool {
        self.state.lock().stop_requested
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    fn look_at_durable(&self) -> Result<(), StorageError> {
        if let Some(durable) = self.db.durable(self.journal.id())? {
            self.change(|state| state.durable = durable);
        }
        Ok(())
    }

    fn end(&self, outcome: Result<(), StopError>) {
        let flush_failure = self.db.flush(true).and_then(|()| self.look_at_durable()).err();
        self.change(|state| {
            state.flush_failure = flush_failure;
            match outcome {
                Err(error) => state.phase = Phase::Stopped(Arc::new(error)),
                // A view that was opened stopped stays that.
                Ok(()) if matches!(state.phase, Phase::Stopped(_)) => {}
                Ok(()) => state.phase = Phase::Closed,
            }
        });
    }

    /// Waits until the view has applied `position` of this journal.
    pub(super) fn wait_until_applied(
        &self,
        wanted: Position,
        deadline: Option<Instant>,
    ) -> Result<(), WaitError> {
        let mut state = self.state.lock();
        loop {
            let reached = state.applied.checkpoint.position;
            match &state.phase {
                _ if state.judged && reached >= wanted => return Ok(()),
                Phase::Following | Phase::AwaitingMirror => {}
                Phase::Stopped(error) => return Err(WaitError::Stopped(error.clone())),
                Phase::Closed => return Err(WaitError::Closed),
            }
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if Instant::now() >= deadline => {
                    return Err(WaitError::Timeout { reached, wanted });
                }
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
            }
        }
    }
}

impl Running {
    /// Ends the thread, and waits until it has flushed what it has applied.
    pub(super) fn close(&self) -> Result<(), ViewError> {
        self.shared.change(|state| state.stop_requested = true);
        let mut thread = self.thread.lock();
        // A view may hold a handle to itself: its own thread can't wait for its own end.
        if let Some(handle) = thread.take_if(|it| it.thread().id() != thread::current().id()) {
            // The thread catches every panic of the view's code; there is nothing to hand on.
            drop(handle.join());
        }
        let failure = self.shared.state().flush_failure;
        failure.map_or(Ok(()), |error| Err(ViewError::Storage(error)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Whoever wants to know how it ended calls close.
        drop(self.close());
    }
}
