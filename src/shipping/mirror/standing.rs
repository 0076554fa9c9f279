//! What a mirror makes of what its origin tells: whether it is live, and what it is for those that follow it.

use std::time::{Duration, Instant};

use super::{MirrorState, Shared, State};
use crate::journal::Journal;
use crate::position::Checkpoint;
use crate::shipping::message::Speaker;
use crate::shipping::relay::Standing;
use crate::shipping::session::Told;

/// What a mirror was told of its origin it goes on telling for so many heartbeats. With the one that tells it, these are
/// the three after which its subscribers know of no lag either.
const STANDS_FOR_HEARTBEATS: u32 = 2;

impl State {
    /// Whether what was told is the end of the journal, as far as anybody knows: not of a relay that is behind.
    pub(super) fn upstream_is_current(&self) -> bool {
        self.told.speaker.is_some_and(Speaker::is_current)
    }

    /// What this mirror is for those that follow it. What it was told holds for so long.
    fn standing(&self, holds_for: Duration) -> Standing {
        let is_connected = matches!(self.phase, MirrorState::CatchingUp | MirrorState::Live);
        let hears = is_connected && self.told.speaker != Some(Speaker::RelayApart);
        let told_at = self.told.end.map(|(_, told_at)| told_at).filter(|_| hears);
        let is_current = matches!(self.phase, MirrorState::Live) && self.upstream_is_current();
        let had_all_at = self.caught_up_at.filter(|_| is_current);
        let until = |at: Option<Instant>| at.map(|at| at + holds_for);
        Standing { hears_until: until(told_at), has_all_until: until(had_all_at) }
    }

    /// The mirror's durable end: the journal's own, so it is never behind what a view shows already.
    pub(super) fn mirrored(&self) -> Option<Checkpoint> {
        self.journal.as_ref().map(Journal::end)
    }

    pub(super) fn phase(&self) -> MirrorState {
        match (&self.phase, &self.copying) {
            (MirrorState::Bootstrapping { .. }, Some(copying)) => {
                let (bytes, bytes_total) = copying.bytes();
                MirrorState::Bootstrapping { bytes, bytes_total }
            }
            (phase, _) => phase.clone(),
        }
    }
}

impl Shared {
    /// The origin has told something of itself.
    pub(super) fn origin_told(&self, told: Told) {
        let mut state = self.state.lock();
        state.origin = told.end.or(state.origin);
        state.told = told;
        self.judge_phase(&mut state);
    }

    /// Whether to ask others than a relay that hasn't heard from its origin for as long as a peer may be silent.
    pub(super) fn leaves(
        &self,
        speaker: Option<Speaker>,
        since: &mut Option<Instant>,
        now: Instant,
    ) -> bool {
        if speaker != Some(Speaker::RelayApart) || self.addresses.as_slice().len() < 2 {
            *since = None;
            return false;
        }
        let since = *since.get_or_insert(now);
        now >= since + self.options.deadlines.silence
    }

    /// The mirror's durable end has moved.
    pub(super) fn mirror_moved(&self) {
        self.judge_phase(&mut self.state.lock());
    }

    /// Live once it has reached the origin's end; catching up again when it lags by more than the window.
    pub(super) fn judge_phase(&self, state: &mut State) {
        self.changed.notify_all();
        self.judge_lag(state);
        self.speak(state);
    }

    /// Those that follow this mirror are told how it is, with the next heartbeat.
    pub(super) fn speak(&self, state: &State) {
        let holds_for = STANDS_FOR_HEARTBEATS * self.options.deadlines.heartbeat;
        self.relay.stands(state.standing(holds_for));
    }

    fn judge_lag(&self, state: &mut State) {
        let Some(((end, told_at), mirrored)) = state.origin.zip(state.mirrored()) else { return };
        let lag_bytes = end.offset.saturating_sub(mirrored.offset);
        if lag_bytes == 0 && state.session_since.is_some() && state.upstream_is_current() {
            state.caught_up_at = Some(told_at);
        }
        match state.phase {
            MirrorState::CatchingUp if lag_bytes == 0 => state.phase = MirrorState::Live,
            MirrorState::Live if lag_bytes > u64::from(self.options.window_bytes) => {
                state.phase = MirrorState::CatchingUp;
            }
            _ => {}
        }
    }
}
