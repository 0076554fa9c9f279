//! What can stand in the way of a feed, beside what can in that of a mirror.

use std::sync::Arc;

use crate::error::{AppendError, ReadError};
use crate::position::{Checkpoint, Position};
use crate::shipping::error::{ShippingError, says_so};
use crate::shipping::filter::{FeedFilter, InvalidFilter};
use crate::shipping::message::Speaker;

/// Why a feed doesn't go on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The filter can't be asked for.
    #[error(transparent)]
    Filter(#[from] InvalidFilter),
    /// What was received so far was asked for with another filter.
    #[error("the feed was begun with the filter {had}, and is followed with {wanted}")]
    Differs {
        /// The filter that it was begun with.
        had: Box<FeedFilter>,
        /// The present one.
        wanted: Box<FeedFilter>,
    },
    /// The origin doesn't have the history any more that was received: it was restored from an older copy.
    #[error(
        "the feed has received events up to position {}, the origin {}{}", received.position,
        if *is_ahead { format!("ends at position {}", origin.position) } else { "has something else there".to_owned() },
        says_so(*told_by)
    )]
    Replaced {
        /// Up to where it was received, in the origin's journal.
        received: Box<Checkpoint>,
        /// The origin's durable end, or up to where it sent something else than what is here.
        origin: Box<Checkpoint>,
        /// The origin ends in front of it, as far as is known.
        is_ahead: bool,
        /// Who says so, as [of a mirror](crate::shipping::Divergent::told_by).
        told_by: Speaker,
    },
    /// The origin has removed events that weren't received yet.
    #[error(
        "the feed goes on at position {received}, and the origin has nothing in front of position {first}"
    )]
    Removed {
        /// Up to where it was received.
        received: Position,
        /// The first position that the origin has.
        first: Position,
    },
    /// What was received can't be stored.
    #[error("what was received can't be stored: {0}")]
    Append(Arc<AppendError>),
    /// What was received before can't be read.
    #[error("what was received can't be read: {0}")]
    Read(Arc<ReadError>),
    /// The journal of what was received doesn't say how far that is.
    #[error("the journal of the feed does not say up to where it was received")]
    NoProgress,
}

impl FeedError {
    /// Whether trying again makes no sense until somebody has acted.
    #[must_use]
    pub fn is_halting(&self) -> bool {
        match self {
            Self::Append(error) => !matches!(**error, AppendError::DiskFull(_)),
            Self::Replaced { told_by, .. } => *told_by != Speaker::RelayApart,
            _ => true,
        }
    }

    /// Whether it says something of this feed or machine, so that other upstreams are no help.
    pub(in crate::shipping) const fn is_own(&self) -> bool {
        !matches!(self, Self::Replaced { .. } | Self::Removed { .. })
    }

    /// The same, said by this one.
    pub(super) fn said_by(mut self, speaker: Speaker) -> Self {
        if let Self::Replaced { told_by, .. } = &mut self {
            *told_by = speaker;
        }
        self
    }

    /// The writer of what was received has failed: it is to be opened anew.
    pub(super) fn is_poisoned(&self) -> bool {
        matches!(self, Self::Append(error) if matches!(**error, AppendError::Unknown(_) | AppendError::Poisoned(_)))
    }

    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Filter(_) => "feed.filter",
            Self::Differs { .. } => "feed.differs",
            Self::Replaced { .. } => "feed.replaced",
            Self::Removed { .. } => "feed.removed",
            Self::Append(error) => error.code(),
            Self::Read(error) => error.code(),
            Self::NoProgress => "feed.no_progress",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Filter(_) => "see FeedFilter for what a filter can say",
            Self::Differs { .. } => {
                "another filter is another feed: follow it under another name; views of it are built from its beginning"
            }
            Self::Replaced { .. } => {
                "the origin was restored from an older copy: let it take back from a mirror what it has lost, then resume. Otherwise follow the feed anew under another name, and compare: what this one holds stays readable"
            }
            Self::Removed { .. } => {
                "the events between were removed at the origin: follow the feed anew under another name; it begins with what the origin still has only if that is its beginning"
            }
            Self::Append(error) if matches!(**error, AppendError::TooLarge { .. }) => {
                "raise FollowOptions::journal.batch_bytes_max to what the origin allows, then resume"
            }
            Self::Append(error) => error.hint(),
            Self::Read(error) => error.hint(),
            Self::NoProgress => "this is no directory of a feed; follow it under another name",
        }
    }
}

impl From<AppendError> for FeedError {
    fn from(error: AppendError) -> Self {
        Self::Append(Arc::new(error))
    }
}

impl From<ReadError> for FeedError {
    fn from(error: ReadError) -> Self {
        Self::Read(Arc::new(error))
    }
}

/// What a mirror could do about it, a feed can't. What isn't final is tried again.
pub(super) fn of_a_feed(error: ShippingError) -> ShippingError {
    let is_ahead = matches!(error, ShippingError::Ahead(_));
    match error {
        error if !error.is_halting() => error,
        ShippingError::Ahead(at) | ShippingError::Fork(at) => {
            let (received, origin) = (Box::new(at.mirror), Box::new(at.origin));
            FeedError::Replaced { received, origin, is_ahead, told_by: at.told_by }.into()
        }
        ShippingError::Truncated { mirror, first, .. } => {
            FeedError::Removed { received: mirror, first }.into()
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::files::Mark;
    use crate::position::JournalId;
    use crate::shipping::error::Divergent;

    #[test]
    fn a_fork_that_a_relay_tells_which_is_apart_is_not_final_for_a_feed_either() {
        let end = Mark::start(JournalId::from_bytes([7; 16])).end;
        for told_by in [Speaker::Origin, Speaker::Relay, Speaker::RelayBehind, Speaker::RelayApart]
        {
            let at = Divergent { mirror: end, origin: end, witness: None, common: None, told_by };
            let error = of_a_feed(ShippingError::Fork(Box::new(at)));
            let is_final = told_by != Speaker::RelayApart;
            assert_eq!(error.is_halting(), is_final, "{told_by:?}: {error}");
            let code = if is_final { "feed.replaced" } else { "shipping.fork" };
            assert_eq!(error.code(), code);
            // The same if it is found in what was sent.
            let (received, origin, is_ahead) = (Box::new(end), Box::new(end), false);
            let by_origin = Speaker::Origin;
            let found = FeedError::Replaced { received, origin, is_ahead, told_by: by_origin };
            assert_eq!(found.said_by(told_by).is_halting(), is_final, "{told_by:?}");
        }
    }
}
