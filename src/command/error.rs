//! Why a command has come to nothing.

use crate::codec::CodecError;
use crate::error::{AppendError, ReadError};
use crate::event::{EncodeError, EventType, ExpectedRevision, Revision, StreamId};
use crate::position::Position;

/// Why a command was not executed. `E` is the aggregate's own error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError<E: std::fmt::Debug + std::fmt::Display> {
    /// The aggregate refuses the command. Nothing was appended.
    #[error("{0}")]
    Rejected(E),
    /// Other events came between each time. Nothing was appended.
    #[error("stream {stream} was changed by others during each of {attempts} attempts")]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// How often it was decided.
        attempts: u32,
        /// What the last decision was made from.
        expected: ExpectedRevision,
        /// What was there instead: revision of the stream's last event, `None` if it has none.
        actual: Option<Revision>,
    },
    /// The append failed. Whether the events were written, see [`AppendError`].
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The aggregate's events can't be read; its first ones may have been [removed](crate::retention). Nothing was
    /// appended.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The payload of an event can't be decoded. Nothing was appended.
    #[error("the event at position {position} ({event_type} in stream {stream}): {source}")]
    Undecodable {
        /// The stream.
        stream: StreamId,
        /// The event's position.
        position: Position,
        /// The event's type.
        event_type: EventType,
        /// Why not.
        #[source]
        source: CodecError,
    },
    /// The aggregate doesn't know an event's type, and doesn't pass over such events. Nothing was appended.
    #[error("the event at position {position} in stream {stream} is of unknown type {event_type}")]
    UnknownEvent {
        /// The stream.
        stream: StreamId,
        /// The event's position.
        position: Position,
        /// The event's type.
        event_type: EventType,
    },
    /// What was decided can't be encoded. Nothing was appended.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

impl<E: std::fmt::Debug + std::fmt::Display> ExecuteError<E> {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Rejected(_) => "execute.rejected",
            Self::Conflict { .. } => "execute.conflict",
            Self::Append(error) => error.code(),
            Self::Read(error) => error.code(),
            Self::Undecodable { .. } => "execute.undecodable",
            Self::UnknownEvent { .. } => "execute.unknown_event",
            Self::Encode(_) => "execute.encode",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Rejected(_) => "the aggregate says why",
            Self::Conflict { .. } => {
                "execute it again; if that happens often, the stream is too busy: make it several"
            }
            Self::Append(error) => error.hint(),
            Self::Read(error) => error.hint(),
            Self::Undecodable { .. } => {
                "run a version that knows this event, or teach the event type to decode it"
            }
            Self::UnknownEvent { .. } => {
                "run a version that knows this event, or set PASSES_UNKNOWN_EVENTS if it doesn't matter"
            }
            Self::Encode(_) => "mend the event",
        }
    }
}
