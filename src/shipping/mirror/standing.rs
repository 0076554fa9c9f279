//! What a mirror makes of what its origin tells: whether it is live, and what it is for those that follow it.

use std::time::{Duration, Instant};

use super::{MirrorState, Shared, State};
use crate::journal::Journal;
use crate::position::{Checkpoint, Position};
use crate::shipping::message::{OriginEnd, Speaker};
use crate::shipping::relay::Standing;
use crate::shipping::session::{Deadlines, Told};

/// What a mirror was told of its origin it goes on telling for so many heartbeats. With the one that tells it, these are
/// the three after which its subscribers know of no lag either.
const STANDS_FOR_HEARTBEATS: u32 = 2;

/// An end that the origin told, until the mirror or feed has reached it. The latest one moves on while that syncs: whoever
/// waited for that alone might wait for ever.
#[derive(Debug, Default)]
pub(in crate::shipping) struct Awaited(Option<(OriginEnd, Instant)>);

impl Awaited {
    /// As of when the last of the ends was told that the mirror is known to have reached, if it has reached one; `told` is
    /// the latest.
    pub(in crate::shipping) fn reached(
        &mut self,
        told: (OriginEnd, Instant),
        mirrored: Checkpoint,
    ) -> Option<Instant> {
        let awaited = *self.0.get_or_insert(told);
        let has = |(end, _): &(OriginEnd, Instant)| mirrored.offset >= end.offset;
        let reached = [told, awaited].into_iter().find(has)?;
        self.0 = (reached != told).then_some(told);
        Some(reached.1)
    }
}

impl State {
    /// Whether what was told is the end of the journal, as far as anybody knows: not of a relay that is behind.
    pub(super) fn upstream_is_current(&self) -> bool {
        self.told.speaker.is_some_and(Speaker::is_current)
    }

    fn is_told(&mut self, told: Told) {
        let was_current = self.upstream_is_current();
        self.origin = told.end.or(self.origin);
        self.told = told;
        if self.upstream_is_current() != was_current {
            self.awaited = Awaited::default(); // an end that was told in between is none of the origin's
        }
    }

    /// A session begins: what was told in another one says nothing of it.
    pub(super) fn begins(&mut self, now: Instant) {
        self.phase = MirrorState::CatchingUp;
        self.sessions += 1;
        self.session_since = Some(now);
        self.awaited = Awaited::default();
    }

    fn judge(&mut self, mirrored: Checkpoint, window_bytes: u32) {
        let Some(told) = self.origin.filter(|_| self.session_since.is_some()) else { return };
        let reached = self.awaited.reached(told, mirrored);
        if self.upstream_is_current() {
            self.caught_up_at = reached.or(self.caught_up_at);
        }
        let lag_bytes = told.0.offset.saturating_sub(mirrored.offset);
        let (near_bytes, far_bytes) = (u64::from(window_bytes / 2), u64::from(window_bytes));
        match self.phase {
            MirrorState::CatchingUp if reached.is_some() && lag_bytes <= near_bytes => {
                self.phase = MirrorState::Live;
            }
            MirrorState::Live if lag_bytes > far_bytes => self.phase = MirrorState::CatchingUp,
            _ => {}
        }
    }

    /// How often something may be expected of the origin: at its own pace if that is slower than this side's, and
    /// whatever it says, twice before it is taken for dead.
    fn heartbeat(&self, own: &Deadlines) -> Duration {
        own.heartbeat.max(self.told.heartbeat.min(own.silence / 2))
    }

    /// What this mirror is for those that follow it. What it was told holds for so long.
    fn stands(&self, own: &Deadlines) -> Standing {
        let holds_for = STANDS_FOR_HEARTBEATS * self.heartbeat(own);
        let is_connected = matches!(self.phase, MirrorState::CatchingUp | MirrorState::Live);
        // Behind a relay nothing is known of that before it has said so itself.
        let is_apart = self.told.speaker.is_none_or(|it| it == Speaker::RelayApart);
        let hears = is_connected && !is_apart;
        let told_as_of = self.told.end.map(|(_, as_of)| as_of).filter(|_| hears);
        let is_current = matches!(self.phase, MirrorState::Live) && self.upstream_is_current();
        let had_all_at = self.caught_up_at.filter(|_| is_current);
        let until = |at: Option<Instant>| at.map(|at| at + holds_for);
        Standing { hears_until: until(told_as_of), has_all_until: until(had_all_at) }
    }

    /// The mirror's durable end: the journal's own, so it is never behind what a view shows already.
    pub(super) fn mirrored(&self) -> Option<Checkpoint> {
        self.journal.as_ref().map(Journal::end)
    }

    /// Up to where views are applied: as was reported, or else as they are.
    pub(super) fn applied(&self) -> Option<Position> {
        #[cfg(feature = "views")]
        let views = self.journal.as_ref().and_then(Journal::applied);
        #[cfg(not(feature = "views"))]
        let views = None;
        self.applied.or(views)
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
        state.is_told(told);
        self.judge_phase(&mut state);
    }

    /// The mirror's durable end has moved to here. The journal isn't asked for it: those who were just woken are asking.
    pub(super) fn mirror_moved(&self, end: Checkpoint) {
        self.judge_phase_at(&mut self.state.lock(), Some(end));
    }

    pub(super) fn judge_phase(&self, state: &mut State) {
        self.judge_phase_at(state, state.mirrored());
    }

    /// Live once it has reached an end of the origin's and lags by no more than half a window; catching up again when it lags by
    /// more than one.
    fn judge_phase_at(&self, state: &mut State, mirrored: Option<Checkpoint>) {
        self.changed.notify_all();
        if let Some(mirrored) = mirrored {
            state.judge(mirrored, self.options.window_bytes);
        }
        self.speak(state);
    }

    /// Those that follow this mirror are told how it is, with the next heartbeat.
    pub(super) fn speak(&self, state: &State) {
        self.relay.stands(state.stands(&self.options.deadlines));
    }
}

/// Finds the mirror's durable end once that has reached an end as of then or later, told by one who is current.
pub(super) fn reaches_what_is_told_from(
    called: Instant,
) -> impl FnMut(&State) -> Option<Checkpoint> {
    let mut awaited = Awaited::default();
    move |state| {
        let counts = |as_of: Instant| as_of >= called && state.upstream_is_current();
        let told = state.origin.filter(|(_, as_of)| counts(*as_of))?;
        let mirrored = state.mirrored()?;
        awaited.reached(told, mirrored).map(|_| mirrored)
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::event::{ExpectedRevision, NewEvent, StreamId};
    use crate::format::files::Mark;
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;
    use crate::position::{JournalId, Position};

    const WINDOW_BYTES: u32 = 64 << 10;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn at(offset: u64) -> Checkpoint {
        Checkpoint { offset, ..Mark::start(JournalId::from_bytes([7; 16])).end }
    }

    fn told(speaker: Speaker, offset: u64, as_of: Instant) -> Told {
        let end = OriginEnd { offset, position: Position::new(offset / 64) };
        Told { end: Some((end, as_of)), speaker: Some(speaker), ..Told::default() }
    }

    /// In a session that has just begun.
    fn connected(start: Instant) -> State {
        let mut state = State::new(None, Vec::new(), 1);
        state.is_told(told(Speaker::Origin, 6400, start));
        state.begins(start);
        state
    }

    /// The origin commits every 5 ms, and what was told 30 ms ago is durable here: the latest end never is.
    #[test]
    fn whoever_reaches_each_end_a_moment_after_it_was_told_has_all_however_steadily_they_come() {
        let start = Instant::now();
        let (mut state, own) = (connected(start), Deadlines::default());
        for round in 1..=2000 {
            let now = start + ms(5 * round);
            state.is_told(told(Speaker::Origin, 6400 + 64 * round, now));
            state.judge(at(6400 + 64 * round.saturating_sub(6)), WINDOW_BYTES);
            state.judge(at(6400 + 64 * round.saturating_sub(5)), WINDOW_BYTES);
            let had_all_at = state.caught_up_at.filter(|at| now - *at <= ms(60));
            assert!(round < 12 || had_all_at.is_some(), "{round}: {:?}", state.caught_up_at);
            let has_all_until = state.stands(&own).has_all_until;
            assert_eq!(has_all_until, had_all_at.map(|at| at + ms(2000)));
            assert!(round < 12 || matches!(state.phase, MirrorState::Live), "{:?}", state.phase);
        }
        // It has nothing of what is told from now on.
        let had_all_at = state.caught_up_at;
        for round in 2001..3000 {
            state.is_told(told(Speaker::Origin, 6400 + 64 * round, start + ms(5 * round)));
            state.judge(at(6400 + 64 * 1995), WINDOW_BYTES);
        }
        assert!(state.caught_up_at <= had_all_at.map(|at| at + ms(60)));
    }

    /// What is told in between holds as of when the origin was asked last: a heartbeat ago at the most, and the way.
    #[test]
    fn whoever_reaches_each_end_has_all_all_the_while_however_seldom_it_asks_as_of_when_they_hold()
    {
        let start = Instant::now();
        let (mut state, own) = (connected(start), Deadlines::default());
        for round in 1..=4000 {
            let now = start + ms(5 * round);
            let as_of = start + ms((5 * round).saturating_sub(40) / 1000 * 1000);
            state.is_told(told(Speaker::Origin, 6400 + 64 * round, as_of));
            state.judge(at(6400 + 64 * round.saturating_sub(6)), WINDOW_BYTES);
            let stands = state.stands(&own);
            assert!(round < 12 || stands.has_all_until.is_some_and(|until| until >= now));
            assert!(stands.hears_until.is_some_and(|until| until >= now), "{round}");
            assert!(stands.has_all_until <= Some(as_of + ms(2000)), "{round}: as of what was told");
        }
    }

    #[test]
    fn who_is_far_behind_is_not_live_for_having_reached_what_was_the_end() {
        let start = Instant::now();
        let mut state = connected(start);
        state.judge(at(0), WINDOW_BYTES);
        state.is_told(told(Speaker::Origin, 1 << 20, start + ms(100)));
        state.judge(at(6400), WINDOW_BYTES);
        assert!(matches!(state.phase, MirrorState::CatchingUp), "{:?}", state.phase);
        state.is_told(told(Speaker::Origin, (1 << 20) + 640, start + ms(200)));
        state.judge(at(1 << 20), WINDOW_BYTES);
        assert!(matches!(state.phase, MirrorState::Live), "{:?}", state.phase);
        state.is_told(told(Speaker::Origin, 2 << 20, start + ms(300)));
        state.judge(at(1 << 20), WINDOW_BYTES);
        assert!(matches!(state.phase, MirrorState::CatchingUp), "{:?}", state.phase);
    }

    /// It says so in WELCOME. Whoever is connected to it, and hears it when it said, is never apart from it.
    #[test]
    fn an_origin_that_speaks_seldom_and_says_so_is_heard_all_the_while() {
        let start = Instant::now();
        let own = Deadlines::default();
        let seldom = |pause| Told { heartbeat: pause, ..told(Speaker::Origin, 6400, start) };
        for (said, holds_for) in [(0, 2000), (1000, 2000), (2400, 4800), (60_000, 5000)] {
            let mut state = connected(start);
            state.is_told(seldom(ms(said)));
            state.judge(at(6400), WINDOW_BYTES);
            let stands = state.stands(&own);
            let until = Some(start + ms(holds_for));
            assert_eq!((stands.hears_until, stands.has_all_until), (until, until), "{said}");
        }
        // Who looks more seldom itself is in no hurry.
        let own = Deadlines { heartbeat: ms(4000), ..own };
        assert_eq!(connected(start).heartbeat(&own), ms(4000));
    }

    /// A relay followed another one that was apart from its origin. Between its subscription and the first HEARTBEAT, which
    /// tells of that, it said that it hears from the origin: what it had of an out-of-date history was final for those who
    /// asked it then. An origin is known by its path, which comes with the subscription.
    #[test]
    fn who_was_not_told_yet_who_speaks_does_not_hear_from_the_origin() {
        let (start, own) = (Instant::now(), Deadlines::default());
        let mut state = connected(start);
        let subscribed = |speaker| Told { speaker, ..told(Speaker::Origin, 6400, start) };
        let hears = [
            (None, false),
            (Some(Speaker::RelayApart), false),
            (Some(Speaker::RelayBehind), true),
            (Some(Speaker::Relay), true),
            (Some(Speaker::Origin), true),
        ];
        for (speaker, hears) in hears {
            state.is_told(subscribed(speaker));
            assert_eq!(state.stands(&own).hears_until.is_some(), hears, "{speaker:?}");
        }
    }

    #[test]
    fn what_a_relay_told_that_was_behind_is_no_end_of_the_origins() {
        let start = Instant::now();
        let mut state = connected(start);
        state.judge(at(6400), WINDOW_BYTES);
        assert_eq!(state.caught_up_at, Some(start));
        state.is_told(told(Speaker::RelayBehind, 7040, start + ms(100)));
        state.judge(at(6400), WINDOW_BYTES);
        state.is_told(told(Speaker::Relay, 12800, start + ms(200)));
        state.judge(at(7040), WINDOW_BYTES);
        assert_eq!(state.caught_up_at, Some(start));
        state.judge(at(12800), WINDOW_BYTES);
        assert_eq!(state.caught_up_at, Some(start + ms(200)));
    }

    #[test]
    fn who_waits_to_be_caught_up_waits_for_one_end_and_not_for_all_that_come_behind() {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create(&fs, Path::new("/journal"), &options).unwrap();
        let start = Instant::now();
        let mut state = connected(start);
        state.journal = Some(appender.journal().clone());
        let mirrored = appender.journal().end();
        state.is_told(told(Speaker::Origin, mirrored.offset, start));
        let mut look = reaches_what_is_told_from(start + ms(1));
        assert_eq!(look(&state), None, "that was told before");
        state.is_told(told(Speaker::Origin, mirrored.offset + 64, start + ms(2)));
        assert_eq!(look(&state), None);
        let event = NewEvent::raw("happened", vec![7; 100]).unwrap();
        let to = StreamId::new("a").unwrap();
        appender.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
        let mirrored = appender.journal().end();
        state.is_told(told(Speaker::RelayBehind, mirrored.offset, start + ms(3)));
        assert_eq!(look(&state), None, "the end of one who is behind");
        state.is_told(told(Speaker::Origin, mirrored.offset + 64_000, start + ms(4)));
        assert_eq!(look(&state), Some(mirrored));
    }
}
