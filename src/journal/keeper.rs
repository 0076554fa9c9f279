//! The mark, the next segment, the end of the last one.
//!
//! ```text
//!  commit  ── mark (written, unsynced) ──▶ Keeper ── sync after 100 ms of rest, at least once a second
//!  roll    ── the next segment ─────────▶        ── zeros, synced, under its final name, name synced
//!          ── the full one ──────────────▶        ── mark synced, file cut, sidecar written
//! ```
//! - A mark that isn't written proves less, and a segment that isn't cut is cut by the next recovery: such
//!   failures are remembered and told, and poison nothing.
//! - A segment is cut only after everything in it is durable, and after the mark that says so.

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
}

#[derive(Debug)]
struct State {
    file: MarkFile,
    /// The newest mark that was written.
    mark: Mark,
    /// When the first and the last unsynced mark were written.
    unsynced: Option<(Instant, Instant)>,
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

    /// Cuts a full segment to its length, behind a synced mark.
    pub(crate) fn seal(&self, seal: &Seal) {
        let mut state = self.shared.state.lock();
        state.commits = Commits::default();
        // A mark that can't be written proves less; nothing is cut that it would have to protect.
        self.shared.sync_mark(&mut state);
        let failed = MutexGuard::unlocked(&mut state, || self.shared.cut(seal)).err();
        state.uncut = state.uncut.take().or(failed);
    }

    /// The file of segment `number`, made durable with its name.
    pub(crate) fn take_spare(&self, number: u64, capacity_bytes: u64) -> Result<Spare, Failure> {
        let allocate = self.shared.state.lock().commits.allocate();
        self.shared.prepare(number, capacity_bytes, allocate)
    }

    /// Ends the thread. Nothing is touched behind this, but the mark.
    pub(crate) fn stop(&self) {
        {
            let mut state = self.shared.state.lock();
            state.stop = true;
            self.shared.changed.notify_all();
        }
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        loop {
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

    fn cut(&self, seal: &Seal) -> Result<(), IoError> {
        let path = self.layout.segment(seal.segment.number());
        seal.file.set_len(seal.len).context("cutting", &path)?;
        seal.file.sync_data().context("syncing", &path)?;
        seal.journal.write_sidecar(&seal.segment);
        Ok(())
    }

    /// Makes the file of segment `number`, durable with its name. A failure is clean: nothing refers to it.
    fn prepare(
        &self,
        number: u64,
        capacity_bytes: u64,
        allocate: Allocate,
    ) -> Result<Spare, Failure> {
        let path = self.layout.segment(number);
        let made = self.create(&path).and_then(|file| {
            fill(&*file, 0..capacity_bytes, allocate)?;
            if !planted::is(Bug::NoDirectorySync) {
                self.fs.sync_dir(&self.layout.dir)?;
            }
            Ok(file)
        });
        match made.context("preparing", &path) {
            Ok(file) => Ok(Spare { file, path, capacity_bytes }),
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
fn fill(file: &dyn File, range: Range<u64>, allocate: Allocate) -> std::io::Result<()> {
    if file.size()? > 0 || !file.allocate(range.end, allocate)? {
        fs::write_zeros(file, range)?;
    }
    file.sync_data()
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}
