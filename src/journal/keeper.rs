//! What is done beside the commit path: the mark, the next segment, the end of the last one.
//!
//! ```text
//!  commit  ── mark (written, unsynced) ──▶ ┌────────┐ ── sync after 100 ms of rest, at least once a second
//!          ── prepare segment k+1 ───────▶ │ Keeper │ ── zeros, synced, under its final name, name synced
//!          ◀── spare ─────────────────────  │        │
//!          ── segment k is full ─────────▶ └────────┘ ── mark synced, file cut, sidecar written
//! ```
//! - Nothing here can lose an event: a mark that isn't written proves less, a segment that isn't prepared is
//!   prepared when it is needed, and one that isn't cut is cut by the next recovery. So failures are
//!   remembered and reported, and poison nothing.
//! - A segment belongs to the keeper until it is taken, and never again: who orders one to be prepared may be
//!   overtaken by who needs it.
//! - A segment is cut only after everything in it is durable, and after the mark that says so.
//! - Without a thread (an option) all of it is done at once, on the commit path.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{IoContext, IoError};
use crate::format::files::{Mark, Witness};
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::fs::{self, Allocate, File, Fs, OpenMode};
use crate::journal::Journal;
use crate::journal::layout::{Layout, MARK};
use crate::journal::mark::MarkFile;
use crate::journal::segments::Segment;
use crate::journal::writer::Failure;
use crate::planted::{self, Bug};
use crate::position::Checkpoint;

const IDLE: Duration = Duration::from_millis(100);
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// A segment is prepared in pieces of this size, each synced, so that a commit never waits for more.
const PIECE_BYTES: u64 = 512 << 10;
/// Between two pieces the disk is left to the commits.
const PAUSE: Duration = Duration::from_millis(1);
/// Commits of this mean size are bound by bandwidth: for them, writing zeros first would halve it.
const ALLOCATE_ABOVE_BYTES: u64 = 64 << 10;

/// Owns the mark file, and the thread (if there is one).
#[derive(Debug)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    fs: Arc<dyn Fs>,
    layout: Layout,
    state: Mutex<State>,
    changed: Condvar,
    /// A task was done.
    done: Condvar,
}

#[derive(Debug)]
struct State {
    file: MarkFile,
    /// The newest mark that was written.
    mark: Mark,
    /// When the first and the last unsynced mark were written.
    unsynced: Option<(Instant, Instant)>,
    tasks: VecDeque<Task>,
    /// A task is being done.
    busy: bool,
    spare: Option<Spare>,
    /// Segments below this one are in use: an order to prepare one of them came too late.
    unused_from: u64,
    /// Somebody waits for the spare: no more pauses.
    urgent: bool,
    commits: Commits,
    stop: bool,
    error: Option<IoError>,
    /// The first failure to cut a full segment. It is told at close: a file of the journal refused.
    uncut: Option<IoError>,
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

#[derive(Debug)]
enum Task {
    Prepare { number: u64, capacity_bytes: u64 },
    Seal(Box<Seal>),
}

/// A segment that is full, and all of it durable.
#[derive(Debug)]
pub(crate) struct Seal {
    pub(crate) journal: Journal,
    pub(crate) segment: Arc<Segment>,
    pub(crate) file: Arc<dyn File>,
    pub(crate) len: u64,
}

/// A file that reads as zeros, durable under its name, that no header describes yet.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) number: u64,
    pub(crate) file: Arc<dyn File>,
    pub(crate) path: std::path::PathBuf,
    pub(crate) capacity_bytes: u64,
}

impl Keeper {
    pub(crate) fn new(
        fs: &Arc<dyn Fs>,
        layout: &Layout,
        file: MarkFile,
        mark: Mark,
        background: bool,
    ) -> Arc<Self> {
        let state = State {
            file,
            mark,
            unsynced: None,
            tasks: VecDeque::new(),
            busy: false,
            spare: None,
            unused_from: 0,
            urgent: false,
            commits: Commits::default(),
            stop: false,
            error: None,
            uncut: None,
        };
        let shared = Arc::new(Shared {
            fs: Arc::clone(fs),
            layout: layout.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            done: Condvar::new(),
        });
        let thread = background
            .then(|| {
                let shared = Arc::clone(&shared);
                let named = std::thread::Builder::new().name("headwater-keeper".into());
                // Without the thread its work is done when it is needed: later, as safely.
                named.spawn(move || shared.run()).ok()
            })
            .flatten();
        Arc::new(Self { shared, thread: Mutex::new(thread) })
    }

    /// Writes a mark, unsynced. A failure is remembered, and harms nothing but the proof.
    pub(crate) fn mark(&self, end: Checkpoint, witness: Option<Witness>) {
        let mut state = self.shared.state.lock();
        if end.offset <= state.mark.end.offset {
            return; // a later one was quicker
        }
        state.commits.count += 1;
        state.commits.bytes += end.offset - state.mark.end.offset;
        let mark = Mark { sequence: 0, end, closed: false, witness };
        state.mark = mark;
        state.error = state.file.write(mark).err();
        let now = Instant::now();
        match &mut state.unsynced {
            Some((_, last)) => *last = now,
            None => {
                state.unsynced = Some((now, now));
                self.shared.changed.notify_one();
            }
        }
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
        state.uncut.as_ref().or(state.error.as_ref()).cloned()
    }

    /// The first failure to cut a segment.
    pub(crate) fn uncut(&self) -> Option<IoError> {
        self.shared.state.lock().uncut.clone()
    }

    /// Orders the file of segment `number` to be prepared.
    pub(crate) fn prepare(&self, number: u64, capacity_bytes: u64) {
        self.order(Task::Prepare { number, capacity_bytes });
    }

    /// Orders a full segment to be cut to its length.
    pub(crate) fn seal(&self, seal: Seal) {
        self.shared.state.lock().commits = Commits::default();
        self.order(Task::Seal(Box::new(seal)));
    }

    fn order(&self, task: Task) {
        let mut state = self.shared.state.lock();
        state.tasks.push_back(task);
        self.shared.changed.notify_one();
        drop(state);
        if !crate::env::is_background_deferred() {
            self.run_tasks();
        }
    }

    /// The prepared file of segment `number`; waits for it if it is in the making, makes it if it isn't.
    pub(crate) fn take_spare(&self, number: u64, capacity_bytes: u64) -> Result<Spare, Failure> {
        let mut state = self.shared.state.lock();
        if self.has_thread() {
            state.urgent = true;
            while state.busy || !state.tasks.is_empty() {
                self.shared.done.wait(&mut state);
            }
            state.urgent = false;
        } else {
            // What was ordered and not done is done now: the end of the last segment, and the next one.
            state.tasks.retain(|task| matches!(task, Task::Seal(_)));
            drop(state);
            self.run_tasks();
            state = self.shared.state.lock();
        }
        // From here on the file is its user's: nothing that was ordered may touch it.
        state.unused_from = number + 1;
        let usable = |spare: &Spare| spare.number == number;
        let (ready, allocate) = (state.spare.take().filter(usable), state.commits.allocate());
        drop(state);
        match ready {
            Some(spare) => Ok(spare),
            None => self.shared.prepare(number, capacity_bytes, allocate, || ()),
        }
    }

    fn has_thread(&self) -> bool {
        self.thread.lock().is_some()
    }

    /// Does all that was ordered, on this thread, if there is no other for it.
    pub(crate) fn run_tasks(&self) {
        if !self.has_thread() {
            let mut state = self.shared.state.lock();
            while self.shared.do_task(&mut state) {}
        }
    }

    /// Does what was ordered, removes a segment that wasn't needed, and ends the thread. Nothing is touched
    /// behind this, but the mark.
    pub(crate) fn stop(&self) {
        {
            let mut state = self.shared.state.lock();
            // A segment in the making is of no use any more.
            state.tasks.retain(|task| matches!(task, Task::Seal(_)));
            state.stop = true;
            state.urgent = true;
            self.shared.changed.notify_all();
        }
        let thread = self.thread.lock().take();
        match thread {
            Some(thread) => drop(thread.join()),
            None => self.run_tasks(),
        }
        if let Some(spare) = self.shared.state.lock().spare.take() {
            // If the name comes back after a crash, the next opening removes it.
            drop(self.shared.fs.remove(&spare.path));
        }
    }
}

impl State {
    /// Whether segment `number` is neither in use nor prepared already.
    fn wants(&self, number: u64) -> bool {
        number >= self.unused_from && self.spare.as_ref().is_none_or(|spare| spare.number != number)
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            if self.do_task(&mut state) {
                continue;
            }
            if state.stop {
                return;
            }
            let Some((first, last)) = state.unsynced else {
                self.changed.wait(&mut state);
                continue;
            };
            let due = (last + IDLE).min(first + AT_LEAST_EVERY);
            if Instant::now() < due {
                self.changed.wait_until(&mut state, due);
                continue;
            }
            self.sync_mark(&mut state);
        }
    }

    /// Syncs the newest mark. Not under the lock: a commit must never wait for it.
    fn sync_mark(&self, state: &mut MutexGuard<'_, State>) {
        state.unsynced = None;
        let file = state.file.file();
        if let Err(error) = MutexGuard::unlocked(state, || file.sync_data()) {
            state.error = Some(IoError::new("syncing", &self.layout.file(MARK), error));
        }
    }

    /// Does the next task; `false` if there is none.
    fn do_task(&self, state: &mut MutexGuard<'_, State>) -> bool {
        let Some(task) = state.tasks.pop_front() else { return false };
        state.busy = true;
        let failed = match task {
            Task::Prepare { number, .. } if !state.wants(number) => None,
            Task::Prepare { number, capacity_bytes } => {
                let allocate = state.commits.allocate();
                let made = MutexGuard::unlocked(state, || {
                    self.prepare(number, capacity_bytes, allocate, || self.pause())
                });
                match made {
                    Ok(spare) => {
                        state.spare = Some(spare);
                        None
                    }
                    // It will be tried again when it is needed, and answered then.
                    Err(Failure::DiskFull(error) | Failure::Fatal(error)) => Some(error),
                }
            }
            Task::Seal(seal) => {
                // A mark that can't be written proves less; nothing is cut that it would have to protect.
                self.sync_mark(state);
                let failed = MutexGuard::unlocked(state, || self.cut(&seal)).err();
                state.uncut = state.uncut.take().or(failed);
                None
            }
        };
        if failed.is_some() {
            state.error = failed;
        }
        state.busy = false;
        self.done.notify_all();
        true
    }

    fn cut(&self, seal: &Seal) -> Result<(), IoError> {
        let path = self.layout.segment(seal.segment.number());
        seal.file.set_len(seal.len).context("cutting", &path)?;
        seal.file.sync_data().context("syncing", &path)?;
        seal.journal.write_sidecar(&seal.segment);
        Ok(())
    }

    /// Leaves the disk to the commits for a moment, unless somebody waits.
    fn pause(&self) {
        let mut state = self.state.lock();
        if !state.urgent {
            self.changed.wait_for(&mut state, PAUSE);
        }
    }

    /// Makes the file of segment `number`, durable with its name. A failure is clean: nothing refers to it.
    fn prepare(
        &self,
        number: u64,
        capacity_bytes: u64,
        allocate: Allocate,
        pause: impl Fn(),
    ) -> Result<Spare, Failure> {
        let path = self.layout.segment(number);
        let made = self.create(&path).and_then(|file| {
            fill(&*file, 0..capacity_bytes, allocate, pause)?;
            if !planted::is(Bug::NoDirectorySync) {
                self.fs.sync_dir(&self.layout.dir)?;
            }
            Ok(file)
        });
        match made.context("preparing", &path) {
            Ok(file) => Ok(Spare { number, file, path, capacity_bytes }),
            Err(error) if error.is_disk_full() => {
                drop(self.fs.remove(&path));
                Err(Failure::DiskFull(error))
            }
            Err(error) => Err(Failure::Fatal(error)),
        }
    }

    fn create(&self, path: &std::path::Path) -> std::io::Result<Arc<dyn File>> {
        match self.fs.open(path, OpenMode::CreateNew) {
            // Left over from an attempt of ours that failed; it never had a header.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let file = self.fs.open(path, OpenMode::Write)?;
                let mut front = [0; HEADER_PAGE_BYTES];
                fs::read_full_at(&*file, &mut front, 0)?;
                if front.iter().any(|&byte| byte != 0) {
                    return Err(error);
                }
                Ok(file)
            }
            opened => opened,
        }
    }
}

/// Makes a range of a new file read as zeros, durably.
fn fill(
    file: &dyn File,
    range: Range<u64>,
    allocate: Allocate,
    pause: impl Fn(),
) -> std::io::Result<()> {
    if file.size()? == 0 && file.allocate(range.end, allocate)? {
        return file.sync_data();
    }
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PIECE_BYTES);
        fs::write_zeros(file, at..end)?;
        file.sync_data()?;
        at = end;
        pause();
    }
    Ok(())
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;
    use crate::position::JournalId;

    /// An order to prepare a segment once came when it had been taken and filled, and wrote zeros over it.
    #[test]
    fn a_segment_that_was_taken_is_never_prepared_again() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let disk: Arc<dyn Fs> = Arc::new(OsFs);
        let mark = Mark::start(JournalId::random());
        for background in [false, true] {
            let number = u64::from(background);
            let file = MarkFile::open(&*disk, &layout, 0).unwrap();
            let keeper = Keeper::new(&disk, &layout, file, mark, background);
            let taken = keeper.take_spare(number, 8192).unwrap();
            // Even while its front is still empty.
            fs::write_all_at(&*taken.file, &[7; 100], 6000).unwrap();
            keeper.prepare(number, 8192);
            keeper.stop();
            let mut found = [0; 100];
            fs::read_exact_at(&*taken.file, &mut found, 6000).unwrap();
            assert_eq!(found, [7; 100]);
        }
    }
}
