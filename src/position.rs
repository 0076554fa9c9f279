//! Places in a journal, and the identities that make them unambiguous.
//!
//! ```text
//!   position   0      1      2      3      4 = end        counts events
//!              ├──────┼──────┼──────┼──────┤
//!   offset     0      ·    384      ·    896             counts bytes of batches, padding included
//!              ╰─ batch 0 ──╯╰─ batch 1 ──╯              only batch ends have both
//! ```
//!
//! Invariants:
//! - A [`Position`] is the number of events in front of it: dense, without gaps, and position order is
//!   commit order is delivery order. Ranges are half-open; an empty journal ends at position 0.
//! - An offset counts bytes over the journal's whole life; it is never a position, and it is not a place
//!   in a file (a file offset).
//! - A [`Checkpoint`] lies at the end of a batch (or at the very beginning) and carries the chain there,
//!   so two histories that differ anywhere in front of it have different checkpoints.

use std::fmt;

mod token;

pub use token::{InvalidToken, Token};

/// The number of events in front of a place in a journal.
///
/// ```
/// use headwater::Position;
/// assert_eq!(Position::START.advance(3), Position::new(3));
/// assert_eq!(Position::new(7).to_string(), "7");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position(u64);

impl Position {
    /// The beginning of every journal.
    pub const START: Self = Self(0);

    /// The position behind `events` events.
    #[must_use]
    pub const fn new(events: u64) -> Self {
        Self(events)
    }

    /// How many events lie in front of this position.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The position `events` further on; stays at the largest position rather than wrapping.
    #[must_use]
    pub const fn advance(self, events: u64) -> Self {
        Self(self.0.saturating_add(events))
    }

    /// How many events lie between `earlier` and this position; 0 if `earlier` is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! uuid_id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id with exactly these bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The sixteen bytes, as they lie on disk.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::position::InvalidId;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                uuid::Uuid::parse_str(text).map(|id| Self(id.into_bytes())).map_err(|_| $crate::position::InvalidId)
            }
        }
    };
}
pub(crate) use uuid_id;

/// A text that is not an id: not 32 hexadecimal digits with or without hyphens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an id: expected 32 hexadecimal digits, with or without hyphens")]
pub struct InvalidId;

uuid_id! {
    /// Names a journal for ever; its mirrors bear the same id.
    JournalId
}

uuid_id! {
    /// Names a directory that holds a journal or a mirror of one: two mirrors of one journal differ in it.
    NodeId
}

impl JournalId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(crate::env::random_id())
    }
}

impl NodeId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(crate::env::random_id())
    }
}

/// The random number drawn at each opening for writing and carried by every batch written under it.
///
/// Two copies of one journal that are both written to differ in it from their first new batch on, even
/// when the events are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(u64);

impl Incarnation {
    /// The incarnation with this number; 0 stands for "no batch yet".
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The hash over everything in front of a batch end: equal chains at equal positions mean equal histories.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Chain([u8; 16]);

impl Chain {
    /// The chain with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The sixteen bytes, as they lie on disk.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({self})")
    }
}

/// The end of a batch, with all that is needed to recognise it in another copy of the journal.
///
/// Followers (views, mirrors) store one with their data; it names the *next* position they will process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checkpoint {
    /// The journal.
    pub journal: JournalId,
    /// Number of the opening that wrote the batch ending here; 0 at the beginning.
    pub epoch: u32,
    /// Its random twin; 0 at the beginning.
    pub incarnation: Incarnation,
    /// Bytes in front, counted over the journal's life.
    pub offset: u64,
    /// Events in front: the next position to process.
    pub position: Position,
    /// The hash over everything in front.
    pub chain: Chain,
}

impl Checkpoint {
    /// Size of the encoded form in bytes.
    pub const ENCODED_LEN: usize = 64;

    /// The 64 bytes in which views and the protocol carry a checkpoint: journal id, incarnation, offset,
    /// position, chain, epoch, four zeros; little-endian.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::ENCODED_LEN] {
        let mut out = [0; Self::ENCODED_LEN];
        out[..16].copy_from_slice(&self.journal.0);
        out[16..24].copy_from_slice(&self.incarnation.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.offset.to_le_bytes());
        out[32..40].copy_from_slice(&self.position.0.to_le_bytes());
        out[40..56].copy_from_slice(&self.chain.0);
        out[56..60].copy_from_slice(&self.epoch.to_le_bytes());
        out
    }

    /// The token of everything in front of this checkpoint: a view that has honoured it has applied as much.
    #[must_use]
    pub const fn token(&self) -> Token {
        Token {
            journal: self.journal,
            incarnation: self.incarnation,
            position: self.position,
            durability: Durability::Durable,
        }
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; `None` if the four last bytes aren't zero.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::ENCODED_LEN]) -> Option<Self> {
        let mut input = crate::format::Decoder::new(bytes);
        let checkpoint = Self {
            journal: JournalId(input.array().ok()?),
            incarnation: Incarnation(input.u64().ok()?),
            offset: input.u64().ok()?,
            position: Position(input.u64().ok()?),
            chain: Chain(input.array().ok()?),
            epoch: input.u32().ok()?,
        };
        (input.u32().ok()? == 0).then_some(checkpoint)
    }
}

/// What an answer vouches for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The events have survived whatever happens to process and machine: their bytes were synced.
    #[default]
    Durable,
    /// The events have their place, and are on their way to the disk. A crash can still lose them, the last
    /// ones first and never out of order. No reader, view or mirror sees them before they are durable.
    Buffered,
}

/// An event's place in the world: journal and position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Locator {
    /// The journal.
    pub journal: JournalId,
    /// The event's position in it.
    pub position: Position,
}

impl fmt::Display for Locator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.journal, self.position)
    }
}
