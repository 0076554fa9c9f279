//! Those from whom one mirror or feed can get its journal: its origin, relays of it, in order of preference.
//!
//! ```text
//!   a round: first ─ refused, lost, behind ─▶ second ─▶ … ─▶ last ─▶ pause ─▶ the next round
//!              └── served well, then lost ─▶ pause ─▶ the next round
//! ```
//! Invariants:
//! - What is wrong with one of them keeps nobody from trying the others. Whoever follows halts when all of them refuse in a
//!   way that doesn't heal by itself, or when the origin itself says that the histories differ.
//! - The same comparison is made with each of them before it sends anything.

use std::time::{Duration, Instant};

use super::error::ShippingError;
use super::message::{Failure, Speaker};
use crate::position::Position;

/// A session that lasted this long was healthy, as is one that was live or brought something: the next attempt after it
/// comes soon, with the first of them.
const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// Bytes refused so many times at the same place weren't damaged on the way.
const REFUSALS_MAX: u32 = 3;
/// An upstream can ask for no longer a wait than this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Addresses at which a journal can be had, in order of preference: of its origin, and of relays. Each is kept as it is
/// and resolved before every attempt.
///
/// ```
/// use headwater::shipping::Addresses;
/// let one: Addresses = "orders.internal:7000".into();
/// let several: Addresses = ["relay-1.internal:7000", "orders.internal:7000"].into();
/// assert_eq!((one.as_slice().len(), several.as_slice().len()), (1, 2));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses(Vec<String>);

impl Addresses {
    /// All of them.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }

    pub(super) fn get(&self, number: usize) -> &str {
        self.0.get(number).map_or("", String::as_str)
    }
}

impl From<&str> for Addresses {
    fn from(address: &str) -> Self {
        Self(vec![address.to_owned()])
    }
}

impl From<String> for Addresses {
    fn from(address: String) -> Self {
        Self(vec![address])
    }
}

impl From<&String> for Addresses {
    fn from(address: &String) -> Self {
        address.as_str().into()
    }
}

impl<A: Into<String>> From<Vec<A>> for Addresses {
    fn from(addresses: Vec<A>) -> Self {
        Self(addresses.into_iter().map(Into::into).collect())
    }
}

impl<A: Into<String>, const N: usize> From<[A; N]> for Addresses {
    fn from(addresses: [A; N]) -> Self {
        Self(addresses.into_iter().map(Into::into).collect())
    }
}

/// How one of them is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct UpstreamStatus {
    /// Its address, as it was given.
    pub address: String,
    /// The mirror or feed is getting its journal from it.
    pub is_in_use: bool,
    /// Why the last attempt or session with it ended; or that it [wasn't asked](ShippingError::NotAsked), and why.
    pub last_error: Option<ShippingError>,
}

/// What is shown of each of them.
#[derive(Debug)]
pub(super) struct Tried {
    /// The one in use, or tried last.
    current: usize,
    last_errors: Vec<Option<ShippingError>>,
}

impl Tried {
    pub(super) fn new(count: usize) -> Self {
        Self { current: 0, last_errors: vec![None; count] }
    }

    pub(super) const fn begins_with(&mut self, number: usize) {
        self.current = number;
    }

    /// Why the last attempt has ended.
    pub(super) fn note(&mut self, error: &ShippingError) {
        if let Some(known) = self.last_errors.get_mut(self.current) {
            *known = Some(error.clone());
        }
    }

    pub(super) fn address(&self, addresses: &Addresses) -> String {
        addresses.get(self.current).to_owned()
    }

    /// How each of them is doing, for whoever is connected to one, or isn't. Who doesn't know yet which journal it
    /// follows has asked the first alone.
    pub(super) fn status(
        &self,
        addresses: &Addresses,
        is_connected: bool,
        knows_journal: bool,
    ) -> Vec<UpstreamStatus> {
        let not_asked = |number| (number > 0 && !knows_journal).then_some(ShippingError::NotAsked);
        let status = |(number, error): (usize, &Option<ShippingError>)| UpstreamStatus {
            address: addresses.get(number).to_owned(),
            is_in_use: is_connected && number == self.current,
            last_error: error.clone().or_else(|| not_asked(number)),
        };
        self.last_errors.iter().enumerate().map(status).collect()
    }
}

/// How long the one in use has been a relay that doesn't hear from its origin.
#[derive(Debug, Default)]
pub(super) struct Apart(Option<Instant>);

impl Apart {
    /// Whether to ask others: a peer may be silent for no longer.
    pub(super) fn is_to_be_left(
        &mut self,
        speaker: Option<Speaker>,
        addresses: &Addresses,
        silence: Duration,
        now: Instant,
    ) -> bool {
        if speaker != Some(Speaker::RelayApart) || addresses.as_slice().len() < 2 {
            self.0 = None;
            return false;
        }
        now >= *self.0.get_or_insert(now) + silence
    }
}

/// How an attempt with one of them went.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) error: ShippingError,
    /// It came to a session that went well for a while.
    pub(super) is_healthy: bool,
    /// Trying again helps, whatever the error.
    pub(super) heals: bool,
}

impl Attempt {
    /// A session has ended, which was granted then, if it was, and went well if it was live or brought something.
    pub(super) fn of_session(
        error: ShippingError,
        granted: Option<Instant>,
        went_well: bool,
    ) -> Self {
        let lasted = granted.is_some_and(|at| at.elapsed() >= HEALTHY_AFTER);
        // Who fell silent has served nobody for as long.
        let is_healthy = went_well || (lasted && !matches!(error, ShippingError::Timeout(_)));
        Self { error, is_healthy, heals: false }
    }
}

impl From<ShippingError> for Attempt {
    fn from(error: ShippingError) -> Self {
        Self { error, is_healthy: false, heals: false }
    }
}

/// What comes of trying one after the other.
#[derive(Debug)]
pub(super) enum Round {
    /// One has served for a while.
    Served,
    /// Nobody else can say otherwise; and whether trying again wouldn't help.
    Settled(ShippingError, bool),
    /// None has served. Why there is no use in trying any of them again, if there isn't.
    Failed(Option<ShippingError>),
}

/// What is known of each of them.
#[derive(Debug)]
pub(super) struct Upstreams(Vec<Upstream>);

#[derive(Debug)]
struct Upstream {
    /// How the last attempt ended, and whether it needs somebody to act.
    last: Option<(ShippingError, bool)>,
    rests_until: Option<Instant>,
    refusals: Refusals,
}

/// Counts how often bytes were refused at one place.
#[derive(Debug, Default)]
struct Refusals {
    at: Option<Position>,
    count: u32,
}

impl Refusals {
    /// Whether this was one too many.
    fn count(&mut self, error: &ShippingError) -> bool {
        let ShippingError::Refused { position, .. } = error else { return false };
        if self.at != Some(*position) {
            *self = Self { at: Some(*position), count: 0 };
        }
        self.count += 1;
        self.count >= REFUSALS_MAX
    }
}

impl Upstreams {
    pub(super) fn new(count: usize) -> Self {
        let new = || Upstream { last: None, rests_until: None, refusals: Refusals::default() };
        Self((0..count).map(|_| new()).collect())
    }

    /// Nothing is known of them any more.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.0.len());
    }

    /// Tries one after the other of those that are `usable`, until one has served for a while, or has said what nobody else
    /// can say otherwise, or nobody wants it any more. Whether a session went well.
    pub(super) fn round(
        &mut self,
        usable: impl Fn() -> usize,
        mut attempt: impl FnMut(usize) -> Option<Attempt>,
    ) -> (Round, bool) {
        let mut was_healthy = false;
        for number in 0..usable() {
            if self.rests(number, Instant::now()) {
                continue;
            }
            let Some(Attempt { error, is_healthy, heals }) = attempt(number) else { break };
            was_healthy |= is_healthy;
            let is_refused = self.note(number, &error, heals, Instant::now());
            if error.is_settled() {
                return (Round::Settled(error, is_refused), was_healthy);
            }
            if is_healthy && !is_refused && !matches!(error, ShippingError::Apart) {
                return (Round::Served, was_healthy);
            }
        }
        (Round::Failed(self.refused_by_all(usable())), was_healthy)
    }

    /// Whether it has asked to be left alone for a while.
    fn rests(&self, number: usize, now: Instant) -> bool {
        let rests_until = self.0.get(number).and_then(|upstream| upstream.rests_until);
        rests_until.is_some_and(|until| now < until)
    }

    /// An attempt with it has ended; whether trying again wouldn't help. It would, whatever the error, if that is known to
    /// heal.
    fn note(&mut self, number: usize, error: &ShippingError, heals: bool, now: Instant) -> bool {
        let Some(upstream) = self.0.get_mut(number) else { return false };
        let is_refused = upstream.refusals.count(error) || (error.is_halting() && !heals);
        let asked_for = retry_after(error);
        upstream.rests_until = (!asked_for.is_zero()).then(|| now + asked_for);
        upstream.last = Some((error.clone(), is_refused));
        is_refused
    }

    /// Why there is no use in trying any of the first `count` again, if there isn't.
    fn refused_by_all(&self, count: usize) -> Option<ShippingError> {
        let refused = |upstream: &Upstream| match &upstream.last {
            Some((error, true)) => Some(error.clone()),
            _ => None,
        };
        let all: Option<Vec<_>> = self.0.iter().take(count).map(refused).collect();
        let mut all = all?;
        let fork = all.iter().position(|error| error.told_by().is_some());
        (!all.is_empty()).then(|| all.swap_remove(fork.unwrap_or(0)))
    }

    /// What one of them, in the order of preference, knows of histories that part.
    pub(super) fn parted(&self) -> Option<ShippingError> {
        let errors = self.0.iter().filter_map(|upstream| upstream.last.as_ref());
        errors.map(|(error, _)| error).find(|error| error.is_parting()).cloned()
    }

    /// For how long all of the first `count` of them want to be left alone.
    pub(super) fn rest(&self, count: usize, now: Instant) -> Duration {
        let rest = |upstream: &Upstream| {
            upstream
                .rests_until
                .map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
        };
        self.0.iter().take(count).map(rest).min().unwrap_or_default()
    }
}

/// How long an upstream asked to wait.
fn retry_after(error: &ShippingError) -> Duration {
    let asked_for_ms = match error {
        ShippingError::Reported { failure } => {
            let Failure { retry_after_ms, .. } = **failure;
            retry_after_ms
        }
        ShippingError::GoingAway { reconnect_after_ms } => *reconnect_after_ms,
        _ => 0,
    };
    Duration::from_millis(asked_for_ms.into()).min(RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Refusal;
    use crate::shipping::message::VersionRange;
    use crate::shipping::session::Deadline;

    fn refused_at(position: u64) -> ShippingError {
        let position = Position::new(position);
        ShippingError::Refused { position, refusal: Refusal::BatchLink }
    }

    #[test]
    fn only_refusals_at_one_place_in_a_row_are_too_many() {
        let mut refusals = Refusals::default();
        let counted: Vec<_> = [1, 1, 2, 2, 1, 1, 1]
            .map(|position| refusals.count(&refused_at(position)))
            .into_iter()
            .collect();
        assert_eq!(counted, [false, false, false, false, false, false, true]);
        assert!(!refusals.count(&ShippingError::Disconnected));
    }

    fn version() -> ShippingError {
        ShippingError::Version { versions: VersionRange { min: 2, max: 2 } }
    }

    #[test]
    fn only_what_all_refuse_is_refused_and_only_what_all_want_is_waited_for() {
        let now = Instant::now();
        let mut both = Upstreams::new(2);
        assert!(both.note(0, &version(), false, now));
        assert!(both.refused_by_all(2).is_none());
        assert!(both.refused_by_all(1).is_some(), "the other isn't tried yet");
        assert!(!both.note(1, &ShippingError::GoingAway { reconnect_after_ms: 1000 }, false, now));
        assert!(both.refused_by_all(2).is_none() && both.rests(1, now) && !both.rests(0, now));
        assert_eq!(both.rest(2, now), Duration::ZERO, "the first doesn't rest");
        both.note(0, &ShippingError::GoingAway { reconnect_after_ms: 300 }, false, now);
        assert_eq!(both.rest(2, now), Duration::from_millis(300));
        assert!(!both.rests(0, now + Duration::from_millis(300)));
        both.note(0, &version(), false, now);
        both.note(1, &version(), false, now);
        assert!(matches!(both.refused_by_all(2), Some(ShippingError::Version { .. })));
        assert!(!both.note(1, &version(), true, now));
        assert!(both.refused_by_all(2).is_none(), "the second heals");
        both.forget();
        assert!(both.refused_by_all(2).is_none());
        assert!(Upstreams::new(0).refused_by_all(0).is_none());
    }

    /// Asks both; how each attempt went is told.
    fn asked(both: &mut Upstreams, attempts: [Attempt; 2]) -> (Round, Vec<usize>) {
        let (mut attempts, mut asked) = (attempts.into_iter(), Vec::new());
        let attempt = |number| {
            asked.push(number);
            attempts.next()
        };
        (both.round(|| 2, attempt).0, asked)
    }

    fn ended(error: ShippingError, went_well: bool) -> Attempt {
        Attempt::of_session(error, None, went_well)
    }

    #[test]
    fn the_next_one_is_asked_unless_one_has_served_or_said_what_nobody_else_can_say_otherwise() {
        let lost = || ended(ShippingError::Disconnected, false);
        let both = || Upstreams::new(2);
        let (round, numbers) = asked(&mut both(), [lost(), lost()]);
        assert!(matches!(round, Round::Failed(None)) && numbers == [0, 1], "{round:?}");
        let served = ended(ShippingError::Disconnected, true);
        let (round, numbers) = asked(&mut both(), [served, lost()]);
        assert!(matches!(round, Round::Served) && numbers == [0], "{round:?}");
        let left = ended(ShippingError::Apart, true);
        let (round, numbers) = asked(&mut both(), [left, lost()]);
        assert!(matches!(round, Round::Failed(None)) && numbers == [0, 1], "{round:?}");
        let (round, numbers) = asked(&mut both(), [ended(version(), true), version().into()]);
        assert!(matches!(round, Round::Failed(Some(_))) && numbers == [0, 1], "{round:?}");
        let own = ShippingError::Setup(std::sync::Arc::new(std::io::Error::other("no threads")));
        let (round, numbers) = asked(&mut both(), [own.into(), lost()]);
        assert!(matches!(round, Round::Settled(_, false)) && numbers == [0], "{round:?}");
        let going = ShippingError::GoingAway { reconnect_after_ms: 60_000 };
        let mut resting = both();
        asked(&mut resting, [going.into(), lost()]);
        assert_eq!(
            asked(&mut resting, [lost(), lost()]).1,
            [1],
            "the first wants to be left alone"
        );
    }

    /// It was granted, and nothing came any more: the next attempt was with the same one, and so on for ever.
    #[test]
    fn who_grants_a_session_and_falls_silent_has_not_served() {
        let Some(long_ago) = Instant::now().checked_sub(2 * HEALTHY_AFTER) else { return };
        let silent = || ShippingError::Timeout(Deadline::Silence);
        let is_healthy = |error, granted| Attempt::of_session(error, granted, false).is_healthy;
        assert!(!is_healthy(silent(), Some(long_ago)));
        assert!(is_healthy(ShippingError::Disconnected, Some(long_ago)));
        assert!(!is_healthy(ShippingError::Disconnected, Some(Instant::now())));
        assert!(
            !is_healthy(ShippingError::Disconnected, None),
            "however long it took to be refused"
        );
        assert!(Attempt::of_session(silent(), Some(long_ago), true).is_healthy, "it was live");
    }
}
