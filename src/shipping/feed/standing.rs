//! What a feed makes of what its origin tells: whether it is live, and when it has had all.

use std::time::Instant;

use super::State;
use crate::shipping::message::OriginEnd;
use crate::shipping::mirror::{Awaited, MirrorState};

impl State {
    /// Somebody is asked who hasn't said anything yet.
    pub(super) fn begins(&mut self) {
        self.is_current = false;
        self.awaited = Awaited::default();
    }

    /// The end that the origin has told, or a relay that has everything; `None` if it is behind, or hasn't said.
    pub(super) fn is_told(&mut self, end: Option<(OriginEnd, Instant)>) {
        if self.is_current != end.is_some() {
            self.awaited = Awaited::default();
        }
        self.is_current = end.is_some();
        self.origin = end.or(self.origin);
    }

    /// The end that was told last in this session, and as of when, if that is the origin's as far as anybody knows: not in
    /// front of events that are here.
    pub(super) fn current_end(&self) -> Option<(OriginEnd, Instant)> {
        let has_all = |end: OriginEnd| self.ahead_until.is_none_or(|until| until <= end.position);
        self.origin.filter(|(end, _)| self.is_current && has_all(*end))
    }

    /// Live once it has reached an end of the origin's and lags by no more than half a window; catching up again when it
    /// lags by more than one.
    pub(super) fn judge(&mut self, window_bytes: u32) {
        let Some(((end, _), received)) = self.origin.zip(self.received) else { return };
        let connected = matches!(self.phase, MirrorState::CatchingUp | MirrorState::Live);
        let told = self.current_end().filter(|_| connected);
        let reached = told.and_then(|told| self.awaited.reached(told, received));
        self.caught_up_at = reached.or(self.caught_up_at);
        let lag_bytes = end.offset.saturating_sub(received.offset);
        match self.phase {
            MirrorState::CatchingUp
                if reached.is_some() && lag_bytes <= u64::from(window_bytes / 2) =>
            {
                self.phase = MirrorState::Live;
            }
            MirrorState::Live if lag_bytes > u64::from(window_bytes) => {
                self.phase = MirrorState::CatchingUp;
            }
            _ => {}
        }
    }
}

#[cfg(all(test, not(shuttle)))]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::format::files::Mark;
    use crate::position::{Checkpoint, JournalId, Position};

    const WINDOW_BYTES: u32 = 64 << 10;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn told(position: u64, at: Instant) -> Option<(OriginEnd, Instant)> {
        Some((OriginEnd { offset: 64 * position, position: Position::new(position) }, at))
    }

    fn has(state: &mut State, position: u64) {
        let start = Mark::start(JournalId::from_bytes([7; 16])).end;
        let (offset, position) = (64 * position, Position::new(position));
        state.received = Some(Checkpoint { offset, position, ..start });
        state.judge(WINDOW_BYTES);
    }

    fn connected() -> State {
        State { phase: MirrorState::CatchingUp, ..State::new(1) }
    }

    /// The origin commits every 5 ms, and what was told 30 ms ago is durable here: the latest end never is.
    #[test]
    fn a_feed_that_reaches_each_end_a_moment_after_it_was_told_is_live_and_has_had_all() {
        let (mut state, start) = (connected(), Instant::now());
        for round in 1..=2000 {
            let now = start + ms(5 * round);
            state.is_told(told(100 + round, now));
            has(&mut state, 100 + round.saturating_sub(6));
            has(&mut state, 100 + round.saturating_sub(5));
            let has_had_all = state.caught_up_at.is_some_and(|at| now - at <= ms(60));
            assert!(round < 12 || has_had_all, "{round}: {:?}", state.caught_up_at);
            assert!(round < 12 || matches!(state.phase, MirrorState::Live), "{round}");
        }
        // It gets nothing of what is told from now on.
        let had_all_at = state.caught_up_at;
        for round in 2001..4000 {
            state.is_told(told(100 + round, start + ms(5 * round)));
            has(&mut state, 2095);
        }
        assert!(state.caught_up_at <= had_all_at.map(|at| at + ms(60)));
        assert!(matches!(state.phase, MirrorState::CatchingUp));
    }

    #[test]
    fn behind_a_relay_that_lacks_what_was_stored_in_part_a_feed_is_not_current() {
        let (mut state, now) = (connected(), Instant::now());
        state.ahead_until = Some(Position::new(120));
        state.is_told(told(100, now));
        has(&mut state, 100);
        assert!(matches!(state.phase, MirrorState::CatchingUp) && state.current_end().is_none());
        assert_eq!(state.caught_up_at, None);
        state.is_told(told(120, now));
        has(&mut state, 100);
        assert!(matches!(state.phase, MirrorState::CatchingUp) && state.current_end().is_some());
        state.ahead_until = None;
        has(&mut state, 120);
        assert!(matches!(state.phase, MirrorState::Live));
        assert_eq!(state.caught_up_at, Some(now));
    }
}
