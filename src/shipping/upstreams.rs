//! Those from whom one mirror can get its journal: its origin, relays of it, in order of preference.
//!
//! ```text
//!   a round: first ─ refused, lost, behind ─▶ second ─▶ … ─▶ last ─▶ pause ─▶ the next round
//!              └── served well, then lost ─▶ pause ─▶ the next round
//! ```
//! Invariants:
//! - What is wrong with one of them keeps nobody from trying the others. The mirror halts when all of them refuse in a
//!   way that doesn't heal by itself, or when its origin itself says that the histories differ.
//! - The same comparison is made with each of them before it sends anything.

use std::time::{Duration, Instant};

use super::error::ShippingError;
use super::message::Failure;
use crate::position::Position;

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
    /// The mirror is getting its journal from it.
    pub is_in_use: bool,
    /// Why the last attempt or session with it ended; or that it [wasn't asked](ShippingError::NotAsked), and why.
    pub last_error: Option<ShippingError>,
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

    /// Whether it has asked to be left alone for a while.
    pub(super) fn rests(&self, number: usize, now: Instant) -> bool {
        let rests_until = self.0.get(number).and_then(|upstream| upstream.rests_until);
        rests_until.is_some_and(|until| now < until)
    }

    /// An attempt with it has ended; whether trying again wouldn't help. It would, whatever the error, if that is known to
    /// heal.
    pub(super) fn note(
        &mut self,
        number: usize,
        error: &ShippingError,
        heals: bool,
        now: Instant,
    ) -> bool {
        let Some(upstream) = self.0.get_mut(number) else { return false };
        let is_refused = upstream.refusals.count(error) || (error.is_halting() && !heals);
        let asked_for = retry_after(error);
        upstream.rests_until = (!asked_for.is_zero()).then(|| now + asked_for);
        upstream.last = Some((error.clone(), is_refused));
        is_refused
    }

    /// Why there is no use in trying any of the first `count` again, if there isn't.
    pub(super) fn refused_by_all(&self, count: usize) -> Option<ShippingError> {
        let refused = |upstream: &Upstream| match &upstream.last {
            Some((error, true)) => Some(error.clone()),
            _ => None,
        };
        let all: Option<Vec<_>> = self.0.iter().take(count).map(refused).collect();
        let mut all = all?;
        let fork = all.iter().position(|error| error.fork().is_some());
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
pub(super) fn retry_after(error: &ShippingError) -> Duration {
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
}
