//! The two ends of a session as state machines without I/O: bytes and the time in, bytes and deliveries out.
//!
//! ```text
//! mirror                                                                 origin
//! AwaitWelcome ── HELLO ───────────────────────────────────────────────▶ AwaitHello
//!      │       ◀─────────────────────────────────────────────── WELCOME ── │
//! AwaitSubscribed ── SUBSCRIBE {end, witness, window} ──────────────────▶ AwaitSubscribe
//!      │                                                                 Judging: compares before it sends
//!      │       ◀──────────────────────────────── SUBSCRIBED │ DIVERGED ── │
//!   (Probing ── PROBE {positions} ─────────────────────────────────────▶ Diverged)
//!   (     ◀───────────────────────────────────────────────── PROBED ──   ) until the last common end is found
//! Streaming    ◀──────────── SEGMENT, DATA, DATA, HEARTBEAT, DATA … ── Streaming
//!      │ ── ACK {durable end of the mirror, number} ───────────────────▶ │
//!      │       ◀────────────── HEARTBEAT {durable end, the same number} ── │
//! ```
//!
//! Invariants:
//! - The origin sends nothing of the journal before it has found the mirror's end, and its witness, in its
//!   own history; and only what is durable, in order, each byte once per session.
//! - Every state has a deadline. Time is what the caller says.
//! - What the origin tells of itself goes with a time of the mirror's as of which it holds, however long it was on the
//!   way.
//! - The origin sends no more than the window ahead of what was acknowledged, up to one batch more; the
//!   mirror keeps no more than that, and the header pages that honest segments within it may have.
//! - After its end a session takes nothing more and says nothing more than one last frame.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{
    Common, Divergence, ErrorCode, Failure, FrameError, GoAway, Speaker, VersionRange,
};
use crate::format::FormatError;
use crate::position::{Checkpoint, NodeId, Position};

mod feed;
mod frames;
mod mirror;
#[cfg(any(test, feature = "test-kit"))]
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a panic")]
pub(crate) mod model;
mod origin;
mod probe;

pub(crate) use feed::{MadeRun, Sieve, Sifted, Span, sift};
pub(crate) use frames::{Limits, Piece, Place, pack};
pub(crate) use mirror::{Delivery, MirrorConfig, MirrorSession, Resume, Told, batches};
pub(crate) use origin::{
    Next, Offer, OriginConfig, OriginSession, OriginStatus, Source, SourceError, Supply,
};
pub(crate) use probe::Held;

/// How long each side waits for the other. One side's heartbeat must be well below the other's silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// For a peer to say who it is and what it wants, in total from the connection on; default 3 s.
    pub handshake: Duration,
    /// Without a byte from the other side it is taken for dead; default 5 s.
    pub silence: Duration,
    /// How often each side makes itself heard; default 1 s.
    pub heartbeat: Duration,
}

impl Deadlines {
    /// The same, each from 1 ms to a day: nothing floods.
    pub(crate) fn bounded(self) -> Self {
        Self {
            handshake: bounded(self.handshake),
            silence: bounded(self.silence),
            heartbeat: bounded(self.heartbeat),
        }
    }
}

/// No time that is set is longer than a day: no clock overflows.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// From 1 ms to a day.
pub(crate) fn bounded(time: Duration) -> Duration {
    time.clamp(Duration::from_millis(1), TIME_MAX)
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(3),
            silence: Duration::from_secs(5),
            heartbeat: Duration::from_secs(1),
        }
    }
}

/// What a peer did that the protocol forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// What it sent isn't a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that has no business in this state of the session.
    #[error("{frame} while waiting for {expected}")]
    Unexpected {
        /// The frame.
        frame: &'static str,
        /// What would have been right.
        expected: &'static str,
    },
    /// WELCOME doesn't answer this HELLO.
    #[error("WELCOME answers another HELLO, or promises what was not asked for")]
    Welcome,
    /// SUBSCRIBED for another journal, or for an end in front of the mirror's.
    #[error("SUBSCRIBED does not fit the subscription")]
    Subscribed,
    /// An acknowledgement of what was not sent, or of less than before.
    #[error("ACK of offset {acked}, outside {from} to {sent}")]
    Ack {
        /// The offset that was acknowledged.
        acked: u64,
        /// The offset that had been acknowledged before.
        from: u64,
        /// The offset up to which was sent.
        sent: u64,
    },
    /// An echo of what was not sent, or from before the last one.
    #[error("HEARTBEAT with echo {echo}, outside {from} to {sent}")]
    Echo {
        /// The number that came back.
        echo: u64,
        /// The last one that had come back before.
        from: u64,
        /// The last one that was sent.
        sent: u64,
    },
    /// More bytes than it takes to ask for a subscription.
    #[error("more than {limit} bytes in front of a subscription")]
    Handshake {
        /// How many are enough.
        limit: usize,
    },
    /// Acknowledgements again and again that say nothing new.
    #[error("more than {per_second} acknowledgements a second that say nothing new")]
    Rate {
        /// How many a second are enough.
        per_second: u32,
    },
    /// Bytes of another place than the next.
    #[error("bytes of offset {found} where those of offset {expected} follow")]
    Offset {
        /// The next offset.
        expected: u64,
        /// The offset of the frame.
        found: u64,
    },
    /// The bytes don't divide into batches.
    #[error("bytes that do not divide into batches, at offset {0}")]
    Batches(u64),
    /// More bytes in flight than the window allows.
    #[error("more bytes in flight than the window of {window_bytes}")]
    Window {
        /// The window.
        window_bytes: u32,
    },
    /// More header pages in flight than segments can begin within the window.
    #[error("more than {limit} header pages of segments that were not acknowledged")]
    Pages {
        /// How many are enough.
        limit: u32,
    },
    /// PROBED doesn't answer the question.
    #[error("PROBED answers another question")]
    Probed,
    /// Positions of a feed that don't follow each other.
    #[error("events of position {found} where those of position {expected} follow")]
    Position {
        /// The next position that wasn't accounted for.
        expected: Position,
        /// The position of the frame.
        found: Position,
    },
    /// Events of a feed that are damaged, or don't account for each position.
    #[error("events behind position {from} of a feed: {source}")]
    Run {
        /// The position in front of them.
        from: Position,
        /// What is wrong with them.
        source: FormatError,
    },
    /// More and more of what there is nothing of in a feed, and nobody can have taken it yet.
    #[error("more than {limit} SKIPs in a row that were not acknowledged")]
    Skips {
        /// How many are enough.
        limit: u32,
    },
    /// An event that the feed doesn't hold.
    #[error("the event at position {0} is none of the feed's")]
    NotInFeed(Position),
    /// A durable end that goes back.
    #[error("a durable end at position {found} after one at {known}")]
    EndWentBack {
        /// The end known.
        known: Position,
        /// The end told.
        found: Position,
    },
}

impl Violation {
    /// The frame with which the peer is told.
    pub(crate) fn to_failure(self) -> Failure {
        let code = match self {
            Self::Frame(FrameError::TooLong { .. }) => ErrorCode::FRAME_TOO_LONG,
            Self::Rate { .. } => ErrorCode::RATE,
            _ => ErrorCode::PROTOCOL,
        };
        Failure::new(code, self.to_string())
    }
}

/// Which deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deadline {
    /// The peer didn't introduce itself in time.
    Handshake,
    /// Nothing was heard of the peer.
    Silence,
}

impl std::fmt::Display for Deadline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Handshake => "the handshake took too long",
            Self::Silence => "nothing was heard for too long",
        })
    }
}

/// The histories of mirror and origin differ; what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DivergedAt {
    /// In what way.
    pub(crate) divergence: Divergence,
    /// Found at the old end of a tail that the mirror had set aside, not at its present end.
    pub(crate) at_witness: bool,
    /// The last place known to be common; `None`: unknown.
    pub(crate) common: Option<Common>,
    /// Who says so.
    pub(crate) speaker: Speaker,
    /// The origin's durable end.
    pub(crate) origin: Checkpoint,
    /// The search for the common end was cut off, by something that passes: another attempt may find it.
    pub(crate) is_cut_off: bool,
}

/// The origin has removed what the mirror needs; what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TruncatedAt {
    /// The first position that the origin has.
    pub(crate) first: Position,
    /// The checkpoint there, if the origin has told.
    pub(crate) start: Option<Checkpoint>,
    /// Where the rest may be found, as the origin says.
    pub(crate) sources: Vec<String>,
}

impl From<Position> for TruncatedAt {
    fn from(first: Position) -> Self {
        Self { first, start: None, sources: Vec::new() }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SessionEnd {
    /// The other side closed the connection without a word.
    #[error("the peer closed the connection")]
    Disconnected,
    /// The other side broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// A deadline has passed.
    #[error("{0}")]
    Timeout(Deadline),
    /// No version of the protocol in common.
    #[error("the peer speaks versions {} to {} of the protocol", .0.min, .0.max)]
    Version(VersionRange),
    /// The other side said so, with a reason.
    #[error("the peer reports {}: {}", .0.code, .0.detail)]
    Peer(Failure),
    /// The other side goes away.
    #[error("the peer goes away")]
    GoAway(GoAway),
    /// The histories differ.
    #[error("the histories differ")]
    Diverged(DivergedAt),
    /// The mirror needs what the origin has removed.
    #[error("the origin has nothing in front of position {}", .0.first)]
    Truncated(TruncatedAt),
    /// The journal comes from the mirror itself.
    #[error("the path of the journal leads through this mirror")]
    Cycle(Vec<NodeId>),
    /// This side ended the session because of its own journal or disk.
    #[error("ended by this side: {}", .0.detail)]
    Own(Failure),
    /// The relay at the other side doesn't hear from its origin, and there are others to ask.
    #[error("the relay doesn't hear from its origin")]
    Apart,
    /// This side is shutting down.
    #[error("this side is shutting down")]
    ShuttingDown,
}

impl SessionEnd {
    /// Whether the next session may go better without anybody's doing.
    fn passes(&self) -> bool {
        match self {
            Self::Disconnected
            | Self::Violation(_)
            | Self::Timeout(_)
            | Self::GoAway(_)
            | Self::Apart
            | Self::ShuttingDown => true,
            Self::Peer(failure) | Self::Own(failure) => failure.code.is_transient(),
            Self::Version(_) | Self::Diverged(_) | Self::Truncated(_) | Self::Cycle(_) => false,
        }
    }
}

/// What time it is, as the caller says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// For deadlines.
    pub(crate) at: Instant,
    /// For the other side to read, in microseconds since 1970.
    pub(crate) unix_us: i64,
}

/// What is to be written, in order: frames of this session's own, and then perhaps a piece that others are
/// sent, too.
#[derive(Debug, Default)]
pub(crate) struct Output {
    own: Vec<u8>,
    piece: Option<Arc<Vec<u8>>>,
    /// How much of the one that is next was written.
    written: usize,
}

impl Output {
    pub(crate) const fn is_empty(&self) -> bool {
        self.own.is_empty() && self.piece.is_none()
    }

    /// Takes frames over. In front of a piece that hasn't begun; nothing is said once one has.
    fn say(&mut self, frames: &mut Vec<u8>) {
        if self.piece.is_none() {
            self.own.append(frames);
        }
    }

    fn send(&mut self, piece: Piece) {
        self.piece = Some(piece.bytes);
    }

    /// What is to be written next; empty if that is nothing.
    pub(crate) fn next(&self) -> &[u8] {
        let next = match &self.piece {
            Some(piece) if self.own.is_empty() => piece,
            _ => &self.own,
        };
        next.get(self.written..).unwrap_or_default()
    }

    /// All that is still to be written.
    #[cfg(feature = "test-kit")]
    pub(crate) fn left(&self) -> Vec<u8> {
        let piece = self.piece.as_deref().map_or(&[][..], Vec::as_slice);
        let all = [&self.own, piece].concat();
        all.get(self.written..).unwrap_or_default().to_vec()
    }

    /// So much of it was written.
    pub(crate) fn advance(&mut self, len: usize) {
        self.written += len;
        if self.next().is_empty() {
            self.written = 0;
            match self.own.is_empty() {
                true => self.piece = None,
                false => self.own.clear(),
            }
        }
    }
}

#[cfg(test)]
mod tests;
