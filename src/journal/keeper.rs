//! What is done beside the commit path: the mark, the next segment, the end of the last one.
//!
//! ```text
//!  commit  ── mark (written, unsynced) ──▶ ┌────────┐ ── sync after 100 ms of rest, at least once a second
//!             a quarter of k is full ────▶ │ Keeper │ ── segment k+1: zeros, synced, then its name
//!  roll    ◀─ spare k+1 ────────────────── │        │
//!          ── segment k is full ─────────▶ └────────┘ ── mark synced, file cut, sidecar written
//! ```
//! - Nothing here can lose an event: a mark that isn't written proves less, a segment that isn't prepared is
//!   prepared when it is needed, and one that isn't cut is cut by the next recovery. So failures are remembered
//!   and told, and poison nothing.
//! - There is one next segment, and its number only grows: it is counted on when the spare is taken. Everything
//!   about its name is decided in [`spare`](super::spare).
//! - A segment is cut only after everything in it is durable, and after the mark that says so.
//! - The active segment is never touched here, nor synced: a sync could take an error that is the commit's.
//! - The work is done in steps, by a thread; without one (an option) every commit takes a step behind its answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::env;
use crate::error::{IoContext, IoError};
use crate::format::files::{Mark, Witness};
use crate::fs::{Allocate, File, Fs};
use crate::journal::Journal;
use crate::journal::layout::{Layout, MARK};
use crate::journal::mark::MarkFile;
use crate::journal::segments::Segment;
use crate::journal::spare::{Maker, Place, Spare};
use crate::journal::writer::Failure;
use crate::position::Checkpoint;
use crate::sync::{self, Condvar, Mutex, MutexGuard, Thread};

const IDLE: Duration = Duration::from_millis(100);
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// Between two steps the thread leaves the disk to the commits.
const PAUSE: Duration = Duration::from_millis(1);
/// Commits of this mean size are bound by bandwidth: for them, writing zeros first would halve it.
const ALLOCATE_ABOVE_BYTES: u64 = 64 << 10;
/// So many full segments may wait to be cut; with one more, who brings it helps.
const SEALS_MAX: usize = 4;

/// Owns the mark file, the next segment, and the thread (if there is one).
#[derive(Debug)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Mutex<Option<Thread>>,
    has_thread: bool,
}

#[derive(Debug)]
struct Shared {
    fs: Arc<dyn Fs>,
    layout: Layout,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    file: MarkFile,
    /// The newest mark that was written.
    mark: Mark,
    /// Of the segment that is written to, its lower half.
    salt: u32,
    /// When the first and the last unsynced mark were written.
    unsynced: Option<(Instant, Instant)>,
    /// Number of the next segment: nobody was given it yet.
    next: u64,
    place: Place,
    order: Option<Order>,
    /// Full segments that wait to be cut.
    seals: VecDeque<Seal>,
    /// Steps that are being taken, without the lock.
    under_way: usize,
    commits: Commits,
    stop: bool,
    error: Option<IoError>,
    /// Why the next segment could not be prepared ahead.
    unprepared: Option<IoError>,
    /// The first failure to cut a full segment. It is told at close: a file of the journal refused.
    uncut: Option<IoError>,
}

/// When the next segment is to be prepared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    /// Once everything up to here is durable.
    pub(crate) from_offset: u64,
    pub(crate) capacity_bytes: u64,
}

/// How large the commits into the present segment are.
#[derive(Clone, Copy, Debug, Default)]
struct Commits {
    count: u64,
    bytes: u64,
}

impl Commits {
    fn allocate(self) -> Allocate {
        if self.bytes / self.count.max(1) >= ALLOCATE_ABOVE_BYTES {
            Allocate::Blocks
        } else {
            Allocate::Zeros
        }
    }
}

/// A segment that is full, and all of it durable.
#[derive(Debug)]
pub(crate) struct Seal {
    pub(crate) journal: Journal,
    pub(crate) segment: Arc<Segment>,
    pub(crate) file: Arc<dyn File>,
    pub(crate) len: u64,
}

impl Keeper {
    /// `next` is the number of the first segment that isn't there.
    pub(crate) fn new(
        fs: &Arc<dyn Fs>,
        layout: &Layout,
        file: MarkFile,
        mark: Mark,
        next: u64,
        background: bool,
    ) -> Arc<Self> {
        let state = State {
            file,
            mark,
            salt: 0,
            unsynced: None,
            next,
            place: Place::Nothing,
            order: None,
            seals: VecDeque::new(),
            under_way: 0,
            commits: Commits::default(),
            stop: false,
            error: None,
            unprepared: None,
            uncut: None,
        };
        let shared = Arc::new(Shared {
            fs: Arc::clone(fs),
            layout: layout.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let thread = background
            .then(|| {
                let shared = Arc::clone(&shared);
                // Without the thread its work is done by the commits: later, as safely.
                sync::spawn("headwater-keeper", move || shared.run())
            })
            .flatten();
        let has_thread = thread.is_some();
        Arc::new(Self { shared, thread: Mutex::new(thread), has_thread })
    }

    /// Writes a mark, unsynced. A failure is remembered, and harms nothing but the proof.
    pub(crate) fn mark(&self, end: Checkpoint, witness: Option<Witness>) {
        let mut state = self.shared.state.lock();
        if end.offset <= state.mark.end.offset {
            return; // a later one was quicker
        }
        let was_due = state.is_spare_due();
        state.commits.count += 1;
        state.commits.bytes += end.offset - state.mark.end.offset;
        let mark = Mark { sequence: 0, end, closed: false, witness, salt: state.salt };
        state.mark = mark;
        state.error = state.file.write(mark).err();
        let now = Instant::now();
        let (first, _) = state.unsynced.unwrap_or((now, now));
        if state.unsynced.replace((first, now)).is_none() || state.is_spare_due() != was_due {
            self.shared.changed.notify_all();
        }
        if !self.has_thread {
            for _ in 0..env::background_steps() {
                self.shared.step(&mut state);
            }
        }
    }

    /// From now on a segment with this salt is written to.
    pub(crate) fn enter(&self, salt: u64) {
        self.shared.state.lock().salt = salt as u32; // its lower half
    }

    /// Writes a mark that says whether the journal was closed, and syncs it.
    pub(crate) fn mark_synced(&self, mark: Mark) -> Result<(), IoError> {
        let mut state = self.shared.state.lock();
        (state.mark, state.unsynced) = (mark, None);
        let written = state.file.write_synced(mark);
        state.error = written.clone().err();
        written
    }

    /// The failure to cut a segment, if there was one; or else the last failure, if the last attempt failed.
    pub(crate) fn error(&self) -> Option<IoError> {
        let state = self.shared.state.lock();
        let State { uncut, unprepared, error, .. } = &*state;
        uncut.as_ref().or(unprepared.as_ref()).or(error.as_ref()).cloned()
    }

    /// The first failure to cut a segment.
    pub(crate) fn uncut(&self) -> Option<IoError> {
        self.shared.state.lock().uncut.clone()
    }

    /// Has the next segment prepared, when its time has come.
    pub(crate) fn order(&self, order: Order) {
        self.shared.state.lock().order = Some(order);
    }

    /// Has a full segment cut to its length, behind a synced mark.
    pub(crate) fn seal(&self, seal: Seal) {
        let mut state = self.shared.state.lock();
        state.commits = Commits::default();
        state.seals.push_back(seal);
        self.shared.changed.notify_all();
        if state.seals.len() > SEALS_MAX {
            self.shared.step(&mut state);
        }
    }

    /// The file of the next segment, which has `capacity_bytes` at least. It is its user's from here on.
    ///
    /// What is still to be done on it is done here; most often that is nothing.
    pub(crate) fn take_spare(&self, capacity_bytes: u64) -> Result<Spare, Failure> {
        let mut state = self.shared.state.lock();
        loop {
            match std::mem::replace(&mut state.place, Place::Nothing) {
                Place::Ready(spare) if spare.capacity_bytes >= capacity_bytes => {
                    state.next += 1;
                    state.order = None;
                    return Ok(spare);
                }
                Place::Ready(spare) => state.place = spare.enlarge(capacity_bytes),
                Place::Busy => {
                    state.place = Place::Busy;
                    self.shared.changed.wait(&mut state);
                }
                place => {
                    state.place = place;
                    self.shared.prepare(&mut state, capacity_bytes).map_err(|error| match error
                        .is_disk_full()
                    {
                        true => Failure::DiskFull(error),
                        false => Failure::Fatal(error),
                    })?;
                }
            }
        }
    }

    /// Ends the thread, cuts what waits to be cut, and removes a segment that wasn't needed. Nothing is touched
    /// behind this, but the mark.
    pub(crate) fn stop(&self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            drop(thread.join());
        }
        let mut state = self.shared.state.lock();
        while state.under_way > 0 {
            self.shared.changed.wait(&mut state); // behind a commit whose answer was quicker
        }
        while let Some(seal) = state.seals.pop_front() {
            self.shared.cut(&mut state, &seal);
        }
        let place = std::mem::replace(&mut state.place, Place::Nothing);
        place.give_up(&*self.shared.fs, &self.shared.layout.segment(state.next));
    }
}

impl State {
    /// Whether there is a step to take towards the next segment.
    fn is_spare_due(&self) -> bool {
        match self.place {
            Place::Nothing | Place::LeftOver => {
                self.order.is_some_and(|order| order.from_offset <= self.mark.end.offset)
            }
            Place::Begun(_) => true,
            Place::Ready(_) | Place::Busy => false,
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.stop {
            let due = state.unsynced.map(|(first, last)| (last + IDLE).min(first + AT_LEAST_EVERY));
            if due.is_some_and(|due| due <= Instant::now()) {
                self.sync_mark(&mut state);
            } else if self.step(&mut state) {
                self.pause(&mut state);
            } else if let Some(due) = due {
                self.changed.wait_until(&mut state, due);
            } else {
                self.changed.wait(&mut state);
            }
        }
    }

    /// Leaves the disk to the commits.
    fn pause(&self, state: &mut MutexGuard<'_, State>) {
        let until = Instant::now() + PAUSE;
        while !state.stop && !self.changed.wait_until(state, until).timed_out() {}
    }

    /// Syncs the newest mark. Not under the lock: a commit must never wait for it.
    fn sync_mark(&self, state: &mut MutexGuard<'_, State>) {
        state.unsynced = None;
        let file = state.file.file();
        if let Err(error) = MutexGuard::unlocked(state, || file.sync_data()) {
            state.error = Some(IoError::new("syncing", &self.layout.file(MARK), error));
        }
    }

    /// Takes one step of what waits to be done; `false` if nothing does.
    fn step(&self, state: &mut MutexGuard<'_, State>) -> bool {
        if state.stop {
            return false;
        }
        state.under_way += 1;
        let stepped = if let Some(seal) = state.seals.pop_front() {
            self.cut(state, &seal);
            true
        } else if let Some(order) = state.order.filter(|_| state.is_spare_due()) {
            // If this fails, it is tried again when the segment is needed, and answered then.
            drop(self.prepare(state, order.capacity_bytes));
            true
        } else {
            false
        };
        state.under_way -= 1;
        self.changed.notify_all();
        stepped
    }

    /// Takes one step towards the next segment.
    fn prepare(
        &self,
        state: &mut MutexGuard<'_, State>,
        capacity_bytes: u64,
    ) -> Result<(), IoError> {
        let maker = Maker {
            fs: &*self.fs,
            layout: &self.layout,
            number: state.next,
            capacity_bytes,
            allocate: state.commits.allocate(),
        };
        let place = std::mem::replace(&mut state.place, Place::Busy);
        let (place, done) = MutexGuard::unlocked(state, || maker.step(place));
        state.place = place;
        if done.is_err() {
            state.order = None;
        }
        state.unprepared = done.clone().err();
        self.changed.notify_all();
        done
    }

    /// Cuts a full segment. A failure is remembered.
    fn cut(&self, state: &mut MutexGuard<'_, State>, seal: &Seal) {
        // A mark that can't be written proves less; nothing is cut that it would have to protect.
        self.sync_mark(state);
        let failed = MutexGuard::unlocked(state, || self.cut_file(seal)).err();
        state.uncut = state.uncut.take().or(failed);
    }

    fn cut_file(&self, seal: &Seal) -> Result<(), IoError> {
        let path = self.layout.segment(seal.segment.number());
        seal.file.set_len(seal.len).context("cutting", &path)?;
        seal.file.sync_data().context("syncing", &path)?;
        seal.journal.write_sidecar(&seal.segment);
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}
