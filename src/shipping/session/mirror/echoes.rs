//! How old what the origin tells is at most, by the mirror's own clock alone.
//!
//! ```text
//!   mirror  ── ACK, number 7 ──▶ ┄┄ however long it takes ┄┄ ──▶ origin
//!     └ sent at T                                                 │ reads its durable end
//!   mirror  ◀── HEARTBEAT, end, number 7 ┄┄ held up on the way ┄┄ ┘
//! ```
//! What causes something comes before it: the origin's durable end was read after T. Every end that comes behind it in
//! the session was read later still, and ends don't go back. So all of them hold *as of* T, whenever they come.
//!
//! Invariants:
//! - A number comes back that was sent, once, in order; every other one is refused.
//! - No more than [`UNDER_WAY_MAX`] are under way, however long none comes back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::shipping::session::Violation;

/// More are not sent before one comes back.
const UNDER_WAY_MAX: usize = 16;
/// An acknowledgement that only asks isn't sent more often: an origin needn't put up with more than 100 a second that say
/// nothing new.
const PAUSE: Duration = Duration::from_millis(20);

/// The numbers that were sent, 1, 2, 3 and so on in each session. None is 0.
#[derive(Debug)]
pub(super) struct Echoes {
    /// The last one that was sent.
    sent: u64,
    /// When those were sent that haven't come back, in order.
    under_way: VecDeque<Instant>,
    /// The next one is sent at the latest then.
    due_at: Instant,
    /// Somebody waits for it.
    is_wanted: bool,
    /// One that says nothing else isn't sent before.
    alone_at: Instant,
}

impl Echoes {
    pub(super) const fn new(now: Instant) -> Self {
        let under_way = VecDeque::new();
        Self { sent: 0, under_way, due_at: now, is_wanted: false, alone_at: now }
    }

    /// Somebody waits for an end that is told from now on.
    pub(super) const fn want(&mut self) {
        self.is_wanted = true;
    }

    /// When the one that somebody waits for may be sent, if it hasn't been; that isn't known while too many are under way.
    pub(super) fn wanted_at(&self) -> Option<Instant> {
        let is_next = self.is_wanted && self.under_way.len() < UNDER_WAY_MAX;
        is_next.then_some(self.alone_at)
    }

    /// Whether to send one although there is nothing else to say.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.is_to_be_sent(now) && now >= self.alone_at
    }

    fn is_to_be_sent(&self, now: Instant) -> bool {
        (self.is_wanted || now >= self.due_at) && self.under_way.len() < UNDER_WAY_MAX
    }

    /// What an acknowledgement carries that is sent now: another number if it is time for one, else the last one again,
    /// which asks for nothing. `says_more`: it isn't sent for that alone.
    pub(super) fn send(&mut self, now: Instant, says_more: bool, heartbeat: Duration) -> u64 {
        if self.is_to_be_sent(now) {
            self.sent += 1;
            self.under_way.push_back(now);
            self.is_wanted = false;
            // The answer is the origin's heartbeat: so its own, which is as long, is hardly ever needed.
            self.due_at = now + heartbeat * 3 / 4;
        }
        self.alone_at = if says_more { now } else { now + PAUSE };
        self.sent
    }

    /// A number has come back. When it was sent, if it hasn't come back before.
    pub(super) fn came_back(&mut self, echo: u64) -> Result<Option<Instant>, Violation> {
        let back = self.sent - self.under_way.len() as u64;
        let count = echo.checked_sub(back).and_then(|count| usize::try_from(count).ok());
        match count.filter(|count| *count <= self.under_way.len()) {
            Some(count) => Ok(self.under_way.drain(..count).next_back()),
            None => Err(Violation::Echo { echo, from: back, sent: self.sent }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use super::*;

    const HEARTBEAT: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_number_comes_back_once_in_order_and_tells_when_it_was_sent() {
        let start = Instant::now();
        let at = |n: u32| start + n * HEARTBEAT;
        let mut echoes = Echoes::new(start);
        let refused = |from, echo, sent| Err(Violation::Echo { echo, from, sent });
        assert_eq!((echoes.came_back(0), echoes.came_back(1)), (Ok(None), refused(0, 1, 0)));
        for n in 1..=5 {
            assert_eq!(echoes.send(at(n), false, HEARTBEAT), u64::from(n));
        }
        assert_eq!(echoes.came_back(2), Ok(Some(at(2))));
        assert_eq!(echoes.came_back(2), Ok(None), "no news");
        assert_eq!(echoes.came_back(1), refused(2, 1, 5));
        assert_eq!(echoes.came_back(0), refused(2, 0, 5));
        assert_eq!(echoes.came_back(6), refused(2, 6, 5));
        assert_eq!(echoes.came_back(u64::MAX), refused(2, u64::MAX, 5));
        assert_eq!(echoes.came_back(5), Ok(Some(at(5))));
        assert_eq!(echoes.came_back(5), Ok(None));
    }

    #[test]
    fn one_is_sent_in_time_and_at_once_if_somebody_waits() {
        let start = Instant::now();
        let mut echoes = Echoes::new(start);
        assert!(echoes.is_due(start));
        assert_eq!(echoes.send(start, true, HEARTBEAT), 1);
        assert!(!echoes.is_due(start + ms(749)) && echoes.is_due(start + ms(750)));
        assert_eq!(echoes.send(start + ms(700), true, HEARTBEAT), 1, "the last one again");
        echoes.want();
        assert!(echoes.is_due(start + ms(700)));
        assert_eq!(echoes.send(start + ms(701), false, HEARTBEAT), 2);
        // Whoever comes now waits a little, unless there is more to say.
        echoes.want();
        assert!(!echoes.is_due(start + ms(720)) && echoes.is_due(start + ms(721)));
        assert_eq!(echoes.wanted_at(), Some(start + ms(721)));
        assert_eq!(echoes.send(start + ms(702), true, HEARTBEAT), 3);
        assert_eq!(echoes.wanted_at(), None);
        assert_eq!(echoes.came_back(3), Ok(Some(start + ms(702))));
    }

    #[test]
    fn while_none_comes_back_only_so_many_are_sent() {
        let start = Instant::now();
        let mut echoes = Echoes::new(start);
        for n in 0..100 {
            echoes.want();
            echoes.send(start + n * HEARTBEAT, false, HEARTBEAT);
        }
        assert_eq!((echoes.sent, echoes.under_way.len()), (16, UNDER_WAY_MAX));
        assert!(!echoes.is_due(start + 1000 * HEARTBEAT));
        assert_eq!(echoes.wanted_at(), None, "nobody is to look for it over and over");
        assert_eq!(echoes.came_back(1), Ok(Some(start)));
        assert!(echoes.is_due(start + 1000 * HEARTBEAT), "it is wanted all the while");
    }
}
