//! Views that are applied before an append returns.
//!
//! ```text
//! append ── durable ──▶ whoever appends takes the view's next steps ──▶ applied: the append returns
//!                        │ one at a time; who waits finds its events applied
//!                        └ the view's own thread does what nobody waits for, a little later
//! ```
//! No thread is woken on the way, and nothing is written twice: the view is behind the journal like every other, only
//! never seen to be. After a crash it catches up before it is handed out.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::control::ViewControl;
use super::error::WaitError;
use super::runner::{Running, Shared, Step};
use crate::journal::ViewBehind;
use crate::position::Position;

/// How long somebody waits whose steps are not wanted, before it looks again.
const TICK: Duration = Duration::from_millis(10);

/// What can take a view's steps.
pub(super) trait Steps: Send + Sync {
    fn step(&self) -> Step;
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
        let steps = self.0.lock().as_ref().and_then(Weak::upgrade);
        steps.map_or(Step::Ended, |steps| steps.step())
    }
}

/// The inline views of a store. They are not kept open by it.
#[derive(Default)]
pub(crate) struct InlineViews(RwLock<Vec<(&'static str, Weak<Running>)>>);

impl fmt::Debug for InlineViews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.read().iter().map(|(name, _)| name)).finish()
    }
}

impl InlineViews {
    /// From now on appends wait for the view. Returns when it has caught up with the journal, or has stopped.
    pub(crate) fn add(&self, view: &ViewControl) {
        let running = view.running();
        // What it has to catch up with by itself doesn't keep others from appending.
        let catch_up = || drop(apply_up_to(running, running.shared.sources.first().end().position));
        catch_up();
        {
            let mut views = self.0.write();
            views.retain(|(_, running)| running.strong_count() > 0);
            views.push((view.name(), Arc::downgrade(running)));
        }
        catch_up(); // with what was appended meanwhile
    }

    /// One of the views that are open.
    pub(crate) fn first(&self) -> Option<&'static str> {
        let views = self.0.read();
        let open = |(name, running): &(&'static str, Weak<Running>)| {
            running.upgrade().filter(|it| !it.shared.is_to_end()).map(|_| *name)
        };
        views.iter().find_map(open)
    }

    /// Has all views apply everything in front of `position`, which is durable; which ones haven't.
    pub(crate) fn apply_up_to(&self, position: Position) -> Vec<ViewBehind> {
        let views = self.0.read();
        let apply = |(view, running): &(&'static str, Weak<Running>)| {
            let running = running.upgrade()?;
            match apply_up_to(&running, position) {
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

/// Has an inline view apply what there is, for somebody who waits for it.
pub(super) fn help(shared: &Shared) {
    while shared.options.inline && shared.lane.step() == Step::Moved {}
}

/// Applies everything in front of `position`, which is durable.
fn apply_up_to(running: &Running, position: Position) -> Result<(), WaitError> {
    let shared = &running.shared;
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
