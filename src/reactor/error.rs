//! What can go wrong with a reactor, one type per operation.

use std::path::PathBuf;
use std::sync::Arc;

use crate::codec::CodecError;
use crate::error::{IoError, ReadError};
use crate::event::{EventType, StreamId};
use crate::format::FormatError;
use crate::position::{Checkpoint, Position};

/// Why a reactor can't be opened. It has not reacted to anything then.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenReactorError {
    /// Another handle, here or in another process, has it open.
    #[error("{}: the reactor is open already, by {owner}", path.display())]
    InUse {
        /// Its folder.
        path: PathBuf,
        /// Who holds it.
        owner: String,
    },
    /// It has reacted to events that its own journal no longer has: the journal has lost its tail, or was
    /// restored from an older copy. Nothing was changed; the reactor is the witness of the loss.
    #[error(
        "reactor {reactor} has reacted up to position {}, but the journal ends at position {end}: its tail is \
         lost", checkpoint.position
    )]
    LostTail {
        /// The reactor.
        reactor: &'static str,
        /// How far it is.
        checkpoint: Checkpoint,
        /// Where the journal ends.
        end: Position,
    },
    /// It has reacted to another history, or another journal. Nothing was changed.
    #[error(
        "reactor {reactor} has reacted to another history than the journal's, up to position {}",
        checkpoint.position
    )]
    OtherHistory {
        /// The reactor.
        reactor: &'static str,
        /// How far it is.
        checkpoint: Checkpoint,
    },
    /// The file that says how far it is can't be understood.
    #[error("{}: damaged: {source}", path.display())]
    DamagedCheckpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Its thread couldn't be started.
    #[error("reactor {reactor}: its thread could not be started: {source}")]
    Thread {
        /// The reactor.
        reactor: &'static str,
        /// The system's answer.
        source: Arc<std::io::Error>,
    },
}

impl OpenReactorError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "reactor.in_use",
            Self::LostTail { .. } => "reactor.lost_tail",
            Self::OtherHistory { .. } => "reactor.other_history",
            Self::DamagedCheckpoint { .. } => "reactor.damaged_checkpoint",
            Self::Io(_) => "reactor.io",
            Self::Thread { .. } => "reactor.thread",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "drop the other handle, or stop the other process",
            Self::LostTail { .. } => {
                "restore the journal from a mirror or a newer backup; only if the loss is accepted, open it with ReactorOptions::restart"
            }
            Self::OtherHistory { .. } => {
                "find out which effects there were; then open it with ReactorOptions::restart, which says where to go on"
            }
            Self::DamagedCheckpoint { .. } => {
                "put the file back from a backup; or open it with ReactorOptions::restart, which says where to go on"
            }
            Self::Io(_) => "see the system's error; opening again is safe",
            Self::Thread { .. } => "raise the limit on threads",
        }
    }
}

/// Why a reactor has halted. It goes on when it is [resumed](super::ReactorHandle::resume), at the same place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HaltError {
    /// An event's effect could not be had.
    #[error(
        "reactor {reactor} halted at position {position} ({event_type} in stream {stream}), tried {attempts} \
         times: {cause}"
    )]
    Event {
        /// The reactor.
        reactor: &'static str,
        /// The event's position.
        position: Position,
        /// The event's stream.
        stream: StreamId,
        /// The event's type.
        event_type: EventType,
        /// How often it was tried.
        attempts: u32,
        /// What happened the last time.
        #[source]
        cause: EventFailure,
    },
    /// The journal can't be read at `position`.
    #[error("reactor {reactor} halted at position {position}: {source}")]
    Journal {
        /// The reactor.
        reactor: &'static str,
        /// The next event.
        position: Position,
        /// Why not.
        source: ReadError,
    },
    /// A mirror that had to be fetched again up to the reactor's checkpoint is another history there.
    #[error(
        "reactor {reactor} has reacted to another history: the mirror differs from it at position {}",
        checkpoint.position
    )]
    Fork {
        /// The reactor.
        reactor: &'static str,
        /// How far it is.
        checkpoint: Checkpoint,
    },
    /// What was done can't be recorded.
    #[error("reactor {reactor} halted: {source}")]
    Checkpoint {
        /// The reactor.
        reactor: &'static str,
        /// What failed.
        source: IoError,
    },
}

/// What happened to an event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventFailure {
    /// The reactor's own error, as text.
    #[error("{0}")]
    Refused(String),
    /// It panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The payload can't be decoded.
    #[error(transparent)]
    Undecodable(CodecError),
    /// The process has died of it, so often in a row; it may have had its effect each time. It is tried once more if
    /// the reactor is resumed.
    #[error("the process died {0} times while it was at it")]
    Died(u32),
}

impl HaltError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Event { .. } => "reactor.event",
            Self::Journal { source, .. } => source.code(),
            Self::Fork { .. } => "reactor.fork",
            Self::Checkpoint { .. } => "reactor.checkpoint",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Event { .. } => {
                "mend the cause and resume; or skip the event, if its effect isn't wanted"
            }
            Self::Journal {
                source: ReadError::Gap { .. } | ReadError::Truncated { .. }, ..
            } => "skip the events that are gone, if it can do without them",
            Self::Journal { source, .. } => source.hint(),
            Self::Fork { .. } => {
                "the origin was restored or forked: find out which effects there were, and begin with ReactorOptions::restart"
            }
            Self::Checkpoint { .. } => "see the system's error, then resume",
        }
    }

    /// Where it can be made to go on behind by [`skip`](super::ReactorHandle::skip).
    #[must_use]
    pub const fn skippable_at(&self) -> Option<Position> {
        match self {
            Self::Event { position, .. }
            | Self::Journal {
                position,
                source: ReadError::Gap { .. } | ReadError::Truncated { .. },
                ..
            } => Some(*position),
            _ => None,
        }
    }
}

/// Why nothing was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SkipError {
    /// It hasn't halted at this event.
    #[error("the reactor has not halted at that position")]
    NotThere {
        /// Where it has halted and could skip.
        halted_at: Option<Position>,
    },
}
