//! Telling which rows have changed.
//!
//! ```text
//! chunk applied ─▶ keys of its rows ─▶ queue of each watcher ─▶ next change
//!                                        │ full
//!                                        └▶ emptied: Lagged, anything may have changed
//! ```
//!
//! Invariants:
//! - Nobody waits for a watcher, and what is kept for one is bounded.
//! - What isn't told is announced: behind a gap comes [`Change::Lagged`] or [`Change::Replaced`].
//! - A change is told when readers see it, not before.

use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::View;
use super::error::ViewReadError;
use super::handle::ViewHandle;
use super::key::ViewKey;
use super::runner::{Phase, Shared};
use super::space::Space;
use crate::position::Checkpoint;

/// What is kept for a watcher by default.
const KEPT_BYTES_MAX: usize = 1 << 20;
/// What a key needs beside its bytes.
const KEY_BYTES: usize = size_of::<Vec<u8>>();

/// What has changed in a view; see [`ViewHandle::watch`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change<K> {
    /// These rows were written or deleted.
    Rows {
        /// Their keys, in order, each once.
        keys: Vec<K>,
        /// The view has applied everything in front of it, and readers see it.
        checkpoint: Checkpoint,
    },
    /// More has changed than is kept for a watcher: any row may have.
    Lagged {
        /// As of here.
        checkpoint: Checkpoint,
    },
    /// Another generation has taken over, or the first one was built: any row may have changed.
    Replaced {
        /// As of here.
        checkpoint: Checkpoint,
    },
}

impl<K> Change<K> {
    /// As of which checkpoint it is.
    #[must_use]
    pub const fn checkpoint(&self) -> Checkpoint {
        match self {
            Self::Rows { checkpoint, .. }
            | Self::Lagged { checkpoint }
            | Self::Replaced { checkpoint } => *checkpoint,
        }
    }
}

/// Database keys of rows, shared by all watchers.
type Keys = Arc<Vec<Vec<u8>>>;

/// Those who are to be told.
#[derive(Debug, Default)]
pub(super) struct Watchers(Mutex<Vec<Weak<Queue>>>);

/// What a watcher hasn't taken yet.
#[derive(Debug)]
struct Queue {
    kept: Mutex<Kept>,
    changed: Condvar,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Kept {
    changes: VecDeque<Change<Keys>>,
    bytes: usize,
    has_ended: bool,
}

impl Watchers {
    fn add(&self, bytes_max: usize) -> Arc<Queue> {
        let queue = Queue { kept: Mutex::default(), changed: Condvar::new(), bytes_max };
        let queue = Arc::new(queue);
        self.0.lock().push(Arc::downgrade(&queue));
        queue
    }

    /// Whether somebody wants to know what changes.
    pub(super) fn are_any(&self) -> bool {
        !self.0.lock().is_empty()
    }

    /// These rows have changed, under their database keys.
    pub(super) fn rows(&self, keys: Vec<Vec<u8>>, checkpoint: Checkpoint) {
        if !keys.is_empty() {
            let bytes = keys.iter().map(|key| key.len() + KEY_BYTES).sum();
            let keys = vec![Arc::new(keys)];
            self.tell(|queue| queue.add(Change::Rows { keys: keys.clone(), checkpoint }, bytes));
        }
    }

    /// Any row may have changed.
    pub(super) fn replaced(&self, checkpoint: Checkpoint) {
        self.tell(|queue| queue.replace(Change::Replaced { checkpoint }));
    }

    /// There will be no more changes.
    pub(super) fn end(&self) {
        self.tell(|queue| queue.change(|kept| kept.has_ended = true));
    }

    fn tell(&self, tell: impl Fn(&Queue)) {
        self.0.lock().retain(|queue| queue.upgrade().inspect(|queue| tell(queue)).is_some());
    }
}

impl Queue {
    fn change(&self, change: impl FnOnce(&mut Kept)) {
        change(&mut self.kept.lock());
        self.changed.notify_all();
    }

    fn add(&self, change: Change<Keys>, bytes: usize) {
        let has_room = self.kept.lock().bytes.saturating_add(bytes) <= self.bytes_max;
        match has_room {
            true => self.change(|kept| {
                kept.bytes += bytes;
                kept.changes.push_back(change);
            }),
            false => self.replace(Change::Lagged { checkpoint: change.checkpoint() }),
        }
    }

    /// In place of everything that is kept: it says that anything may have changed.
    fn replace(&self, change: Change<Keys>) {
        self.change(|kept| {
            let is_replaced =
                kept.changes.front().is_some_and(|it| matches!(it, Change::Replaced { .. }));
            kept.bytes = 0;
            kept.changes.clear();
            // The stronger word stays.
            kept.changes.push_back(match change {
                Change::Lagged { checkpoint } if is_replaced => Change::Replaced { checkpoint },
                change => change,
            });
        });
    }

    /// The next change, in time; `None` if there is none then, or no more.
    fn next(&self, deadline: Option<Instant>) -> Option<Change<Keys>> {
        let mut kept = self.kept.lock();
        loop {
            if let Some(change) = kept.changes.pop_front() {
                if let Change::Rows { keys, .. } = &change {
                    let keys = keys.iter().flat_map(|keys| keys.iter());
                    kept.bytes -= keys.map(|key| key.len() + KEY_BYTES).sum::<usize>();
                }
                return Some(change);
            }
            match deadline {
                _ if kept.has_ended => return None,
                None => self.changed.wait(&mut kept),
                Some(deadline) if Instant::now() >= deadline => return None,
                Some(deadline) => drop(self.changed.wait_until(&mut kept, deadline)),
            }
        }
    }
}

impl<V: View> ViewHandle<V> {
    /// Tells from now on which rows change, for caches and live pages: every change that is applied behind this
    /// call.
    ///
    /// Up to 1 MiB of keys is kept until it is taken. Who is slower than that is told [`Change::Lagged`], and reads
    /// again whatever it depends on; neither the view nor other watchers wait for it.
    ///
    /// To begin without a gap: watch first, read then. What changed in between is told, too, and read twice.
    #[must_use = "what is told is lost if nobody takes it"]
    pub fn watch(&self) -> Watch<V::Key> {
        self.watch_within(KEPT_BYTES_MAX)
    }

    /// The same, with another bound on what is kept.
    #[must_use = "what is told is lost if nobody takes it"]
    pub fn watch_within(&self, kept_bytes_max: usize) -> Watch<V::Key> {
        Watch::new(self.shared(), Space::of::<V>(), kept_bytes_max)
    }
}

/// Changes of a view as they are applied; see [`ViewHandle::watch`].
///
/// As an iterator it blocks until there is one, and ends when the view or its journal is closed. It doesn't keep the
/// view open.
pub struct Watch<K> {
    queue: Arc<Queue>,
    space: Space,
    key: PhantomData<fn() -> K>,
}

impl<K> fmt::Debug for Watch<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("view", &self.space.view).finish_non_exhaustive()
    }
}

impl<K: ViewKey> Watch<K> {
    /// Begins to watch some rows of a view.
    pub(super) fn new(shared: &Shared, space: Space, kept_bytes_max: usize) -> Self {
        // Between two writes: of a write, either all is told or nothing.
        let _still = shared.stand_still();
        let queue = shared.watchers.add(kept_bytes_max);
        if shared.is_to_end() || matches!(shared.state().phase, Phase::Closed) {
            queue.change(|kept| kept.has_ended = true);
        }
        Self { queue, space, key: PhantomData }
    }

    /// The next change; waits for it, for `timeout` at most. `None` if there was none, or the view was closed.
    ///
    /// # Errors
    /// [`ViewReadError::Key`] if a key can't be decoded.
    pub fn next_within(&mut self, timeout: Duration) -> Result<Option<Change<K>>, ViewReadError> {
        self.next_until(Instant::now().checked_add(timeout))
    }

    fn next_until(&self, deadline: Option<Instant>) -> Result<Option<Change<K>>, ViewReadError> {
        while let Some(change) = self.queue.next(deadline) {
            if let Some(change) = self.decoded(change)? {
                return Ok(Some(change));
            }
        }
        Ok(None)
    }

    /// What has changed of these rows, if anything has.
    fn decoded(&self, change: Change<Keys>) -> Result<Option<Change<K>>, ViewReadError> {
        Ok(Some(match change {
            Change::Lagged { checkpoint } => Change::Lagged { checkpoint },
            Change::Replaced { checkpoint } => Change::Replaced { checkpoint },
            Change::Rows { keys, checkpoint } => {
                let keys = keys.iter().flat_map(|keys| keys.iter());
                let keys = keys.filter(|key| self.space.holds(key));
                let keys: Vec<K> =
                    keys.map(|key| self.space.decode_key(key)).collect::<Result<_, _>>()?;
                if keys.is_empty() {
                    return Ok(None);
                }
                Change::Rows { keys, checkpoint }
            }
        }))
    }

    /// Whether the view was closed and everything was taken.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let kept = self.queue.kept.lock();
        kept.has_ended && kept.changes.is_empty()
    }
}

impl<K: ViewKey> Iterator for Watch<K> {
    type Item = Result<Change<K>, ViewReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_until(None).transpose()
    }
}
