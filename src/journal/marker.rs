//! Writes the mark after each commit and syncs it beside the commit path: after 100 ms without a commit,
//! and at least once a second.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::IoError;
use crate::format::files::Mark;
use crate::journal::mark::MarkFile;

const IDLE: Duration = Duration::from_millis(100);
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);

/// Owns the mark file, and the thread that syncs it (if there is one).
#[derive(Debug)]
pub(crate) struct Marker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    file: MarkFile,
    /// When the first and the last unsynced mark were written.
    unsynced: Option<(Instant, Instant)>,
    stop: bool,
    error: Option<IoError>,
}

impl Marker {
    pub(crate) fn new(file: MarkFile, background: bool) -> Self {
        let state = State { file, unsynced: None, stop: false, error: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let thread = background
            .then(|| {
                let shared = Arc::clone(&shared);
                let named = std::thread::Builder::new().name("headwater-mark".into());
                // Without the thread the mark is synced at rolls and at close: less often, as safe.
                named.spawn(move || shared.run()).ok()
            })
            .flatten();
        Self { shared, thread }
    }

    /// Writes a mark, unsynced. A failure is remembered, and harms nothing but the proof.
    pub(crate) fn write(&self, mark: Mark) {
        let mut state = self.shared.state.lock();
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

    /// Writes a mark and syncs it.
    pub(crate) fn write_synced(&self, mark: Mark) -> Result<(), IoError> {
        let mut state = self.shared.state.lock();
        state.unsynced = None;
        let written = state.file.write_synced(mark);
        state.error = written.clone().err();
        written
    }

    /// The last failure, if the last write or sync of the mark failed.
    pub(crate) fn error(&self) -> Option<IoError> {
        self.shared.state.lock().error.clone()
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.stop {
            let Some((first, last)) = state.unsynced else {
                self.changed.wait(&mut state);
                continue;
            };
            let due = (last + IDLE).min(first + AT_LEAST_EVERY);
            if Instant::now() < due {
                self.changed.wait_until(&mut state, due);
                continue;
            }
            state.unsynced = None;
            let file = state.file.file();
            // Not under the lock: a commit must never wait for the mark's sync.
            let synced = parking_lot::MutexGuard::unlocked(&mut state, || file.sync_data());
            if let Err(error) = synced {
                state.error = Some(IoError::new("syncing", std::path::Path::new("mark"), error));
            }
        }
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
