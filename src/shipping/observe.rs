//! What both ends tell of how shipping goes: why connections ended, in a few kinds that can be counted.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;

use super::error::ShippingError;
use super::feed::FeedError;
use super::message::ErrorCode;
use super::session::SessionEnd;
use crate::error::IngestError;

/// Why a connection ended, or didn't come about; the same kinds at both ends.
///
/// What happened exactly is in the error beside: [`MirrorStatus::last_error`](super::MirrorStatus::last_error).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum EndReason {
    /// The name service didn't answer, or knows no such name.
    Resolve,
    /// Nobody listens there.
    Refused,
    /// No way leads there.
    Unreachable,
    /// The other side answered too late, or has fallen silent; or it took nothing any more.
    Timeout,
    /// The other side closed the connection, or it was reset, without a word.
    Disconnected,
    /// The other side, or this one, was shut down in good order, or its journal was closed.
    GoingAway,
    /// There are as many connections as there may be, or too much was asked for.
    Limit,
    /// No TLS connection came about, or it broke.
    Tls,
    /// Nobody knows who it is: no token, key or certificate, or an unknown one. A mirror is told of an unknown one as
    /// it is told of [`Access`](Self::Access).
    Credentials,
    /// It may not have this journal, or not any more.
    Access,
    /// The protocol was broken, or no version of it is spoken by both.
    Protocol,
    /// The bytes that came don't continue the mirror.
    Damaged,
    /// One side has another history than the other, or another journal.
    History,
    /// What is needed next was removed.
    Removed,
    /// The journal comes from the mirror itself.
    Cycle,
    /// A mirror was asked that is itself behind, or apart from its origin.
    Behind,
    /// The journal can't be read, or the mirror not written.
    Storage,
    /// Settings, certificates or limits of this side's own.
    Settings,
}

impl EndReason {
    /// Its stable name.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Disconnected => "disconnected",
            Self::GoingAway => "going_away",
            Self::Limit => "limit",
            Self::Tls => "tls",
            Self::Credentials => "credentials",
            Self::Access => "access",
            Self::Protocol => "protocol",
            Self::Damaged => "damaged",
            Self::History => "history",
            Self::Removed => "removed",
            Self::Cycle => "cycle",
            Self::Behind => "behind",
            Self::Storage => "storage",
            Self::Settings => "settings",
        }
    }

    fn of_code(code: ErrorCode) -> Self {
        match code {
            ErrorCode::AUTH_REQUIRED => Self::Credentials,
            ErrorCode::DENIED | ErrorCode::UNKNOWN_JOURNAL => Self::Access,
            ErrorCode::TRUNCATED => Self::Removed,
            ErrorCode::CYCLE => Self::Cycle,
            ErrorCode::TOO_MANY | ErrorCode::RATE => Self::Limit,
            ErrorCode::TIMEOUT | ErrorCode::SLOW_CONSUMER => Self::Timeout,
            ErrorCode::CORRUPT | ErrorCode::STORAGE => Self::Storage,
            ErrorCode::SHUTTING_DOWN => Self::GoingAway,
            ErrorCode::NOT_YET => Self::Behind,
            ErrorCode::REFUSED => Self::Damaged,
            _ => Self::Protocol,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// Of a mirror's attempt.
impl From<&ShippingError> for EndReason {
    fn from(error: &ShippingError) -> Self {
        match error {
            ShippingError::Resolve { .. } => Self::Resolve,
            ShippingError::Connect { source, .. } => match source.kind() {
                ErrorKind::ConnectionRefused => Self::Refused,
                ErrorKind::TimedOut => Self::Timeout,
                _ => Self::Unreachable,
            },
            ShippingError::Timeout(_) => Self::Timeout,
            ShippingError::Disconnected => Self::Disconnected,
            ShippingError::GoingAway { .. } => Self::GoingAway,
            ShippingError::Tls(_) => Self::Tls,
            ShippingError::Reported { failure } => Self::of_code(failure.code),
            ShippingError::Version { .. } | ShippingError::Violation(_) => Self::Protocol,
            ShippingError::Refused { .. } | ShippingError::Storage(IngestError::Refused { .. }) => {
                Self::Damaged
            }
            ShippingError::Ahead(_) | ShippingError::Fork(_) | ShippingError::Foreign { .. } => {
                Self::History
            }
            ShippingError::Truncated { .. } | ShippingError::Feed(FeedError::Removed { .. }) => {
                Self::Removed
            }
            ShippingError::Feed(FeedError::Replaced { .. }) => Self::History,
            ShippingError::Feed(FeedError::Filter(_) | FeedError::Differs { .. }) => Self::Settings,
            ShippingError::Feed(_) => Self::Storage,
            ShippingError::Cycle { .. } => Self::Cycle,
            ShippingError::Apart => Self::Behind,
            ShippingError::Storage(_)
            | ShippingError::SetAside(_)
            | ShippingError::Begin(_)
            | ShippingError::Open(_) => Self::Storage,
            ShippingError::Plaintext { .. }
            | ShippingError::Security(_)
            | ShippingError::NotAsked
            | ShippingError::Setup(_) => Self::Settings,
        }
    }
}

/// Of a session, as the origin sees it.
impl From<&SessionEnd> for EndReason {
    fn from(end: &SessionEnd) -> Self {
        match end {
            SessionEnd::Disconnected => Self::Disconnected,
            SessionEnd::Violation(violation) => Self::of_code(violation.to_failure().code),
            SessionEnd::Version(_) => Self::Protocol,
            SessionEnd::Timeout(_) => Self::Timeout,
            SessionEnd::Peer(failure) | SessionEnd::Own(failure) => Self::of_code(failure.code),
            SessionEnd::GoAway(_) | SessionEnd::ShuttingDown => Self::GoingAway,
            SessionEnd::Diverged(_) => Self::History,
            SessionEnd::Truncated(_) => Self::Removed,
            SessionEnd::Cycle(_) => Self::Cycle,
            SessionEnd::Apart => Self::Behind,
        }
    }
}

/// How often connections have ended, by reason.
///
/// ```
/// use headwater::shipping::{EndReason, Ends};
///
/// let ends = Ends::default();
/// assert_eq!((ends.of(EndReason::Timeout), ends.total()), (0, 0));
/// for (reason, count) in ends.iter() {
///     println!("{reason}: {count}");
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends(BTreeMap<EndReason, u64>);

impl Ends {
    /// How often for this reason.
    #[must_use]
    pub fn of(&self, reason: EndReason) -> u64 {
        self.0.get(&reason).copied().unwrap_or(0)
    }

    /// How often for any.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// The reasons that there were, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (EndReason, u64)> {
        self.0.iter().map(|(reason, count)| (*reason, *count))
    }

    pub(crate) fn count(&mut self, reason: EndReason) {
        *self.0.entry(reason).or_default() += 1;
    }
}

/// Compiles the examples of the manual.
#[cfg(doctest)]
#[doc = include_str!("../../docs/operate/watching.md")]
mod manual {}

/// Compiles the examples of the manual.
#[cfg(all(doctest, feature = "views"))]
#[doc = include_str!("../../docs/operate/bootstrap.md")]
mod bootstrap_manual {}
