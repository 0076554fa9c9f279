//! The durable end as a thing to wait for: the only message from the writer to its followers.
//!
//! - Publishing costs a lock and no system call while nobody waits for what has come. Those who wait say how
//!   far: an end that doesn't reach the nearest of them wakes nobody.
//! - Wake-ups coalesce. Who is woken reads the newest end, and whatever is published before it waits again
//!   wakes it no second time.
//! - None is lost: who waits and who publishes hold the same lock.
//! - Whoever waits for other things, too, leaves a [`Bell`] instead, which rings once.

use std::sync::Weak;
use std::time::{Duration, Instant};

use crate::position::{Checkpoint, Position};
use crate::sync::{Condvar, Mutex};

/// Somebody to be told that the end has moved.
pub(crate) trait Bell: Send + Sync {
    /// Called by whoever publishes, with locks held: must not wait, nor ask the journal.
    fn ring(&self);
}

#[derive(Debug)]
pub(crate) struct Watch {
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    end: Checkpoint,
    closed: bool,
    /// The nearest position behind which somebody waits for the end to be; `None` if nobody waits.
    nearest: Option<Position>,
    /// Those that have not rung yet, and behind which position the end is to be.
    bells: Vec<(Position, Weak<dyn Bell>)>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("end", &self.end).field("closed", &self.closed).finish()
    }
}

impl State {
    fn is_past(&self, position: Position) -> bool {
        self.end.position > position || self.closed
    }
}

impl Watch {
    pub(crate) fn new(end: Checkpoint) -> Self {
        let state = State { end, closed: false, nearest: None, bells: Vec::new() };
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

    /// Whoever still has to wait says so again; bells stay.
    fn wake(&self, state: &mut State) {
        self.moved.notify_all();
        let (end, closed) = (state.end.position, state.closed);
        state.bells.retain(|(position, bell)| {
            let Some(bell) = bell.upgrade() else { return false };
            let is_past = end > *position || closed;
            if is_past {
                bell.ring();
            }
            !is_past
        });
        state.nearest = state.bells.iter().map(|(position, _)| *position).min();
    }

    /// Rings once, as soon as the end lies behind `position` or won't move any more: perhaps at once.
    #[cfg(any(test, feature = "shipping"))]
    pub(crate) fn ring_past(&self, position: Position, bell: Weak<dyn Bell>) {
        let mut state = self.state.lock();
        state.bells.retain(|(_, bell)| bell.strong_count() > 0);
        state.bells.push((position, bell));
        if state.is_past(position) {
            return self.wake(&mut state);
        }
        state.nearest = Some(state.nearest.map_or(position, |nearest| nearest.min(position)));
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
    use std::sync::Arc;
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

    #[derive(Default)]
    struct Counter(AtomicU64);

    impl Bell for Counter {
        fn ring(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_bell_rings_once_when_the_end_is_past_its_position_whoever_else_waits() {
        let watch = Watch::new(end_at(3));
        let counters: Vec<_> = (0..3).map(|_| Arc::new(Counter::default())).collect();
        let rung = || -> Vec<_> {
            counters.iter().map(|counter| counter.0.load(Ordering::Relaxed)).collect()
        };
        let hang = |index: usize, position| {
            let bell: Arc<dyn Bell> = Arc::<Counter>::clone(&counters[index]);
            watch.ring_past(Position::new(position), Arc::downgrade(&bell));
        };
        hang(0, 2);
        assert_eq!(rung(), [1, 0, 0], "at once");
        hang(0, 3);
        hang(1, 9);
        hang(2, 5);
        let _end = watch.wait_past(Position::new(20), Duration::from_millis(1));
        watch.publish(end_at(4));
        assert_eq!(rung(), [2, 0, 0]);
        watch.publish(end_at(6));
        watch.publish(end_at(7));
        assert_eq!(rung(), [2, 0, 1], "the farther one is still hung up");
        watch.publish(end_at(10));
        assert_eq!(rung(), [2, 1, 1]);
        hang(1, 50);
        watch.close();
        assert_eq!(rung(), [2, 2, 1]);
        hang(1, 50);
        assert_eq!(rung(), [2, 3, 1], "it won't move any more");
    }

    #[test]
    fn time_is_up_without_an_event() {
        let watch = Watch::new(end_at(3));
        let end = watch.wait_past(Position::new(3), Duration::from_millis(1));
        assert_eq!(end.position, Position::new(3));
    }
}
