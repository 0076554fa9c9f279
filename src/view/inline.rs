//! Views that are applied before an append returns.
//!
//! ```text
//! append ── durable ──▶ whoever appends takes the view's next steps ──▶ applied: the append returns
//!                        │ one at a time; who waits finds its events applied
//!                        └ the view's own thread does what nobody waits for, a little later
//! ```
//! No thread is woken on the way, and nothing is written twice: the view is behind the journal like every other, only
//! never seen to be. After a crash it catches up before it is handed out.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::chunk::is_within_fold;
use super::control::ViewControl;
use super::error::{ViewError, WaitError};
use super::runner::{Shared, Step};
use crate::journal::ViewBehind;
use crate::position::{JournalId, Position};

/// How long somebody waits whose steps are not wanted, before it looks again.
const TICK: Duration = Duration::from_millis(10);

/// How long the closing of a view waits for those who append.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can take a view's steps.
pub(super) trait Steps: Send + Sync {
    fn step(&self) -> Step;

    /// The same, if nobody else is at it.
    fn try_step(&self) -> Option<Step>;
}

/// Who follows the journal now.
#[derive(Default)]
pub(super) struct Lane(Mutex<Option<Weak<dyn Steps>>>);

impl Lane {
    pub(super) fn offer<S: Steps + 'static>(&self, steps: &Arc<S>) {
        let steps: Arc<dyn Steps> = Arc::<S>::clone(steps);
        *self.0.lock() = Some(Arc::downgrade(&steps));
    }

    fn step(&self) -> Step {
        let _stepping = Stepping::begin();
        self.steps().map_or(Step::Ended, |steps| steps.step())
    }

    fn try_step(&self) -> Option<Step> {
        let _stepping = Stepping::begin();
        self.steps()?.try_step()
    }

    fn steps(&self) -> Option<Arc<dyn Steps>> {
        self.0.lock().as_ref().and_then(Weak::upgrade)
    }
}

thread_local! {
    static STEPPING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is taking a step of some view, for somebody who waits.
pub(super) fn is_stepping() -> bool {
    STEPPING.get()
}

struct Stepping(bool);

impl Stepping {
    fn begin() -> Self {
        Self(STEPPING.replace(true))
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        STEPPING.set(self.0);
    }
}

/// The inline views of a store. They are not kept open by it.
#[derive(Clone, Default)]
pub(crate) struct InlineViews(Arc<RwLock<Vec<Entry>>>);

struct Entry {
    name: &'static str,
    /// Whoever takes steps holds the lock of the list until it has let go of this again.
    shared: Weak<Shared>,
}

impl Entry {
    /// Its name, if it isn't closed.
    fn if_open(&self) -> Option<&'static str> {
        self.shared.upgrade().filter(|it| !it.is_to_end()).map(|_| self.name)
    }
}

impl fmt::Debug for InlineViews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.read().iter().map(|entry| entry.name)).finish()
    }
}

impl InlineViews {
    /// From now on appends wait for the view. Returns when it has caught up with the journal, or has stopped.
    pub(crate) fn add(&self, view: &ViewControl) {
        let running = view.running();
        let shared = &running.shared;
        // What it has to catch up with by itself doesn't keep others from appending.
        let catch_up = || drop(apply_up_to(shared, shared.sources.first().end().position));
        catch_up();
        {
            let mut views = self.0.write();
            views.retain(|entry| entry.shared.strong_count() > 0);
            views.push(Entry { name: view.name(), shared: Arc::downgrade(shared) });
        }
        drop(running.inline.set(self.clone())); // it is opened once
        catch_up(); // with what was appended meanwhile
    }

    /// The view is closed: nobody takes steps of it any more when this returns, or holds on to it.
    pub(super) fn leave(&self, shared: &Arc<Shared>) {
        if let Some(mut views) = self.0.try_write_for(PATIENCE) {
            views.retain(|entry| entry.shared.as_ptr() != Arc::as_ptr(shared));
        }
    }

    /// One of the views that are open.
    pub(crate) fn first(&self) -> Option<&'static str> {
        self.0.read_recursive().iter().find_map(Entry::if_open)
    }

    /// Has all views apply everything in front of `position`, which is durable; which ones haven't.
    pub(crate) fn apply_up_to(&self, position: Position) -> Vec<ViewBehind> {
        if is_within_fold() {
            // Its steps may be under way right here: nobody else takes them, and nobody may wait for them.
            let behind = |view| {
                let error = ViewError::WithinFold { view };
                ViewBehind { view, code: error.code(), reason: error.to_string() }
            };
            let views = self.0.read_recursive();
            return views.iter().filter_map(Entry::if_open).map(behind).collect();
        }
        let views = self.0.read();
        let apply = |entry: &Entry| {
            let (view, shared) = (entry.name, entry.shared.upgrade()?);
            match apply_up_to(&shared, position) {
                // Whoever closes a view doesn't want it to be applied.
                Ok(()) | Err(WaitError::Closed) => None,
                Err(error) => {
                    Some(ViewBehind { view, code: error.code(), reason: error.to_string() })
                }
            }
        };
        views.iter().filter_map(apply).collect()
    }
}

/// Has an inline view apply what there is up to `position`, for somebody who waits for it until `deadline`; not if others
/// are at it.
pub(super) fn help(
    shared: &Shared,
    journal: JournalId,
    position: Position,
    deadline: Option<Instant>,
) {
    let is_late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
    let has_applied = || shared.has_applied(journal, position).unwrap_or(true);
    while shared.options.inline && !has_applied() && !is_late() && !shared.is_busy() {
        if shared.lane.try_step() != Some(Step::Moved) {
            return;
        }
    }
}

/// Applies everything in front of `position`, which is durable.
fn apply_up_to(shared: &Shared, position: Position) -> Result<(), WaitError> {
    let journal = shared.sources.first().id();
    while !shared.has_applied(journal, position)? {
        if shared.lane.step() != Step::Moved {
            // It is being built, or another generation takes over.
            let deadline = Instant::now() + TICK;
            match shared.wait_until_applied(journal, position, Some(deadline)) {
                Err(WaitError::Timeout { .. }) => {}
                applied => return applied,
            }
        }
    }
    Ok(())
}
