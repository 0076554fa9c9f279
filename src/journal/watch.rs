//! The durable end as a thing to wait for: the only message from the writer to its followers.
//!
//! - Publishing costs a lock and no system call while nobody waits for what has come. Those who wait say how
//!   far: an end that doesn't reach the nearest of them wakes nobody.
//! - Wake-ups coalesce. Who is woken reads the newest end, and whatever is published before it waits again
//!   wakes it no second time.
//! - None is lost: who waits and who publishes hold the same lock.

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
    /// The nearest position behind which somebody waits for the end to be; `None` if nobody waits.
    nearest: Option<Position>,
}

impl State {
    fn is_past(&self, position: Position) -> bool {
        self.end.position > position || self.closed
    }
}

impl Watch {
    pub(crate) fn new(end: Checkpoint) -> Self {
        let state = State { end, closed: false, nearest: None };
        Self { state: Mutex::new(state), moved: Condvar::new() }
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
        if state.nearest.is_some_and(|nearest| state.is_past(nearest)) {
            self.wake(&mut state);
        }
    }

    /// The end won't move any more.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        self.wake(&mut state);
    }

    /// Whoever still has to wait says so again.
    fn wake(&self, state: &mut State) {
        state.nearest = None;
        self.moved.notify_all();
    }

    /// Waits until the end lies behind `position`, or it won't move any more, or time is up.
    pub(crate) fn wait_past(&self, position: Position, timeout: Duration) -> Checkpoint {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        while !state.is_past(position) {
            state.nearest = Some(state.nearest.map_or(position, |nearest| nearest.min(position)));
            match deadline {
                Some(deadline) if self.moved.wait_until(&mut state, deadline).timed_out() => break,
                Some(_) => {}
                None => self.moved.wait(&mut state),
            }
        }
        state.end
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::format::files::Mark;
    use crate::position::JournalId;

    const LONG: Duration = Duration::from_secs(60);

    fn end_at(position: u64) -> Checkpoint {
        let start = Mark::start(JournalId::from_bytes([1; 16])).end;
        Checkpoint { offset: position * 64, position: Position::new(position), ..start }
    }

    /// Were one wake-up lost, somebody would wait for a minute.
    #[test]
    fn everybody_wakes_however_far_they_wait() {
        let watch = Watch::new(end_at(0));
        let seen = AtomicU64::new(0);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for waiter in 0..4 {
                let (watch, seen) = (&watch, &seen);
                scope.spawn(move || {
                    let mut at = 0;
                    while at < 2000 {
                        // Each waits a different distance ahead.
                        let until = (at + waiter * 7).min(1999);
                        at = watch.wait_past(Position::new(until), LONG).position.get();
                        assert!(at > until);
                        seen.fetch_max(at, Ordering::Relaxed);
                    }
                });
            }
            for position in 1..=2000 {
                watch.publish(end_at(position));
                if position % 16 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        assert_eq!(seen.into_inner(), 2000);
        assert!(began.elapsed() < LONG / 2);
    }

    #[test]
    fn closing_wakes_those_who_wait_for_what_never_comes() {
        let watch = Watch::new(end_at(3));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| watch.wait_past(Position::new(10), LONG));
            let near = scope.spawn(|| watch.wait_past(Position::new(3), LONG));
            watch.publish(end_at(4));
            assert_eq!(near.join().unwrap().position, Position::new(4));
            watch.close();
            assert_eq!(waits.join().unwrap().position, Position::new(4));
        });
        assert!(watch.is_closed());
    }

    #[test]
    fn time_is_up_without_an_event() {
        let watch = Watch::new(end_at(3));
        let end = watch.wait_past(Position::new(3), Duration::from_millis(1));
        assert_eq!(end.position, Position::new(3));
    }
}
