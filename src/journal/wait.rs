//! Waiting for the events of a token, in the origin and in every mirror.

use std::time::Duration;

use crate::error::ReadError;
use crate::journal::{Journal, TokenState};
use crate::position::{JournalId, Position, Token};

/// Why waiting for a [`Token`] in a journal ended without its events.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Time is up.
    #[error("the journal is durable up to position {reached}, not yet up to position {wanted}")]
    Timeout {
        /// How far the journal is durable here.
        reached: Position,
        /// The token's position.
        wanted: Position,
    },
    /// The journal has another event at the token's position: what the token stands for was lost.
    #[error(
        "the append that ended at position {position} is not in this journal's history: it was lost"
    )]
    Lost {
        /// The token's position.
        position: Position,
    },
    /// The token is of another journal.
    #[error("the token is of journal {found}, and not of {followed}")]
    Foreign {
        /// The token's journal.
        found: JournalId,
        /// The one that was asked.
        followed: JournalId,
    },
    /// The journal was closed, or its writer failed, in front of the token's position.
    #[error("the journal was closed at position {reached}, in front of position {wanted}")]
    Closed {
        /// How far the journal is durable here.
        reached: Position,
        /// The token's position.
        wanted: Position,
    },
    /// The journal can't be asked whether the token is of its history.
    #[error(transparent)]
    Journal(#[from] ReadError),
}

impl TokenError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "token.timeout",
            Self::Lost { .. } => "token.lost",
            Self::Foreign { .. } => "token.foreign",
            Self::Closed { .. } => "token.closed",
            Self::Journal(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "wait longer, or read what is there",
            Self::Lost { .. } => {
                "the journal was restored from an older copy: make the change again, it is gone"
            }
            Self::Foreign { .. } => "ask the journal, or the mirror of it, that the token is of",
            Self::Closed { .. } => "open the journal again",
            Self::Journal(error) => error.hint(),
        }
    }
}

impl Journal {
    /// Waits until the append that gave `token` is durable here, for `timeout` at most: in a mirror, until the
    /// origin's events have come. From then on every reader of this journal sees them. A view has a `wait_for` of its
    /// own, and so has a mirror's handle, which also tells what hinders it.
    ///
    /// # Errors
    /// [`TokenError`]; in particular, a token of events that were lost is not honoured by others at its position.
    pub fn wait_for(&self, token: &Token, timeout: Duration) -> Result<(), TokenError> {
        if !self.is_pending(token)? {
            return Ok(());
        }
        let wanted = token.position;
        let last = Position::new(wanted.get().saturating_sub(1));
        let reached = self.wait_past(last, timeout).position;
        let is_closed = self.is_closed();
        if !self.is_pending(token)? {
            return Ok(());
        }
        Err(match is_closed {
            true => TokenError::Closed { reached, wanted },
            false => TokenError::Timeout { reached, wanted },
        })
    }

    /// Whether the events of `token` aren't here yet; an error if they never will be.
    pub(crate) fn is_pending(&self, token: &Token) -> Result<bool, TokenError> {
        match self.token_state(token)? {
            TokenState::Present => Ok(false),
            TokenState::Pending => Ok(true),
            TokenState::Lost => Err(TokenError::Lost { position: token.position }),
            TokenState::Foreign => {
                Err(TokenError::Foreign { found: token.journal, followed: self.id() })
            }
        }
    }
}
