//! What a service holds of a reactor.

use std::sync::Arc;
use std::time::Duration;

use super::error::{HaltError, SkipError};
use super::runner::{Phase, Running};
use crate::error::IoError;
use crate::position::{Checkpoint, Position};

/// A reactor that is open. Cheap to clone; when the last clone is dropped, it ends as by [`close`](Self::close).
#[derive(Clone, Debug)]
pub struct ReactorHandle {
    running: Arc<Running>,
}

/// How a reactor is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReactorStatus {
    /// What it is doing.
    pub state: ReactorState,
    /// The next event: everything in front of it is done, or was skipped.
    pub next: Position,
    /// The same as it is recorded: here it would go on after a crash.
    pub durable: Position,
    /// Where the journal ends.
    pub journal_end: Checkpoint,
    /// How many durable events of the journal, as it is on this machine, aren't done.
    pub lag_events: u64,
    /// To how many events it has reacted since it was opened.
    pub reacted_events: u64,
    /// How many events of types that it doesn't know it has passed over since.
    pub unknown_events: u64,
    /// How many events were skipped by command since.
    pub skipped_events: u64,
    /// How often the next event has failed, and how the last time; `None` if it hasn't.
    pub failing: Option<(u32, String)>,
}

/// What a reactor is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ReactorState {
    /// It reacts, tries again, or waits for events.
    Running,
    /// It has done more than the mirror holds, and waits until the mirror has got as far, to compare.
    AwaitingMirror,
    /// It was paused.
    Paused,
    /// It can't go on, and waits for [`resume`](ReactorHandle::resume) or [`skip`](ReactorHandle::skip).
    Halted(Arc<HaltError>),
    /// It was closed, or its journal was, and everything durable is done.
    Closed,
}

impl ReactorHandle {
    pub(super) fn new(running: Running) -> Self {
        Self { running: Arc::new(running) }
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> ReactorStatus {
        let shared = &self.running.shared;
        let (state, journal_end) = (shared.state(), shared.journal.end());
        ReactorStatus {
            state: match state.phase {
                Phase::Running => ReactorState::Running,
                Phase::AwaitingMirror => ReactorState::AwaitingMirror,
                Phase::Paused => ReactorState::Paused,
                Phase::Halted(error) => ReactorState::Halted(error),
                Phase::Closed => ReactorState::Closed,
            },
            next: state.next,
            durable: state.durable,
            journal_end,
            lag_events: journal_end.position.since(state.next),
            reacted_events: state.counts.reacted,
            unknown_events: state.counts.unknown,
            skipped_events: state.counts.skipped,
            failing: state.failing,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.running.shared.name
    }

    /// Stops it in front of the next event, or of the one that is being tried again, until it is
    /// [resumed](Self::resume). Doesn't wait for a reaction that is under way.
    pub fn pause(&self) {
        self.running.shared.pause();
    }

    /// Goes on after a pause, or tries again what it has halted at.
    pub fn resume(&self) {
        self.running.shared.resume();
    }

    /// Goes on behind the event at `position`, at which it has [halted](ReactorState::Halted): the event's effect is
    /// given up, durably. Where events were lost or removed, behind all of those.
    ///
    /// # Errors
    /// [`SkipError::NotThere`] if it hasn't halted there.
    pub fn skip(&self, position: Position) -> Result<(), SkipError> {
        self.running.shared.skip(position)
    }

    /// Waits until every event in front of `position` is done, for `timeout` at most; whether they are.
    #[must_use]
    pub fn wait_reacted(&self, position: Position, timeout: Duration) -> bool {
        self.running.shared.wait_for(timeout, |state| state.next >= position)
    }

    /// Waits until it does nothing more by itself (it has halted, is paused or closed), for `timeout` at most;
    /// whether that is so.
    #[must_use]
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        self.running.shared.wait_for(timeout, |state| {
            matches!(state.phase, Phase::Halted(_) | Phase::Paused | Phase::Closed)
        })
    }

    /// Stops it for all clones, and records durably what is done. Blocks until the reaction that is under way
    /// has ended. It can be opened again when the last clone is dropped.
    ///
    /// # Errors
    /// [`IoError`] if not all could be recorded: that much comes again.
    pub fn close(&self) -> Result<(), IoError> {
        self.running.close()
    }
}
