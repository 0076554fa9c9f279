//! The durable end as a thing to wait for: the only message from the writer to its followers.

use std::time::{Duration, Instant};

use crate::position::{Checkpoint, Position};
use crate::sync::{Condvar, Mutex};

#[derive(Debug)]
pub(crate) struct Watch {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Clone, Copy, Debug)]
struct State {
    end: Checkpoint,
    closed: bool,
}

impl Watch {
    pub(crate) fn new(end: Checkpoint) -> Self {
        Self { state: Mutex::new(State { end, closed: false }), moved: Condvar::new() }
    }

    pub(crate) fn end(&self) -> Checkpoint {
        self.state.lock().end
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Publishes a durable end. Everything in front of it has been synced.
    pub(crate) fn publish(&self, end: Checkpoint) {
        let mut state = self.state.lock();
        debug_assert!(end.offset >= state.end.offset);
        state.end = end;
        self.moved.notify_all();
    }

    /// The end won't move any more.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.moved.notify_all();
    }

    /// Waits until the end lies behind `position`, or it won't move any more, or time is up.
    pub(crate) fn wait_past(&self, position: Position, timeout: Duration) -> Checkpoint {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        while state.end.position <= position && !state.closed {
            match deadline {
                Some(deadline) if self.moved.wait_until(&mut state, deadline).timed_out() => break,
                Some(_) => {}
                None => self.moved.wait(&mut state),
            }
        }
        state.end
    }
}
