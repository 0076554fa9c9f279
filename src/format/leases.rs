//! The `leases` file: up to where mirrors have said that they are durable.
//!
//! It is about followers, not about the journal: it isn't copied, and a lease that is too old holds back
//! more than it must, and never less.

use super::entries::{self, Entries};
use super::{Block, Decoder, FormatError};
use crate::position::{JournalId, Position};

/// Length of the file in front of its entries.
pub const LEASES_HEADER_BYTES: usize = entries::HEADER_BYTES;
/// Length of an entry.
pub const LEASE_BYTES: usize = 48;
/// No file has more entries; those that were heard of first are left out.
pub const LEASES_MAX: usize = 4096;

const FILE: Entries<LEASE_BYTES> = Entries { magic: *b"\x89HWLEA\r\n", version: 1 };
const FLAG_NAMELESS: u32 = 1;
const FLAG_FEED: u32 = 2;

/// What a mirror still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The mirror's node id, or the session's id if it had none when it subscribed.
    pub id: [u8; 16],
    /// The id is a session's.
    pub nameless: bool,
    /// It is a filtered feed's: another lease than that of a mirror with the same id.
    pub feed: bool,
    /// The mirror has everything in front of this.
    pub position: Position,
    /// The same in bytes.
    pub offset: u64,
    /// When it was last heard of, in microseconds since 1970.
    pub heard_at_us: i64,
}

impl Lease {
    /// Whether it is another state of the same lease.
    #[cfg(any(test, feature = "shipping"))]
    pub(crate) fn is_of(&self, other: &Self) -> bool {
        (self.id, self.feed) == (other.id, other.feed)
    }

    fn encode(&self) -> [u8; LEASE_BYTES] {
        let mut out = Block::<LEASE_BYTES>::new();
        out.put(0, &self.id);
        out.put(16, &self.position.get().to_le_bytes());
        out.put(24, &self.offset.to_le_bytes());
        out.put(32, &self.heard_at_us.to_le_bytes());
        let nameless = if self.nameless { FLAG_NAMELESS } else { 0 };
        let feed = if self.feed { FLAG_FEED } else { 0 };
        out.put(40, &(nameless | feed).to_le_bytes());
        out.0
    }

    fn decode(bytes: &[u8; LEASE_BYTES]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(bytes);
        let id = input.array()?;
        let (position, offset) = (Position::new(input.u64()?), input.u64()?);
        let heard_at_us = input.i64()?;
        let flags = input.u32()?;
        if flags & !(FLAG_NAMELESS | FLAG_FEED) != 0 {
            return Err(FormatError::Invalid("lease flags"));
        }
        let (nameless, feed) = (flags & FLAG_NAMELESS != 0, flags & FLAG_FEED != 0);
        Ok(Self { id, nameless, feed, position, offset, heard_at_us })
    }
}

/// The file's bytes.
#[must_use]
pub fn encode(journal: JournalId, leases: &[Lease]) -> Vec<u8> {
    let entries: Vec<_> = leases.iter().map(Lease::encode).collect();
    FILE.encode(journal, &entries)
}

/// Reads the file's bytes.
///
/// # Errors
/// [`FormatError`] if they aren't a whole, undamaged `leases` of this journal and version.
pub fn decode(bytes: &[u8], journal: JournalId) -> Result<Vec<Lease>, FormatError> {
    let entries = FILE.decode(bytes, journal)?;
    if entries.len() > LEASES_MAX {
        return Err(FormatError::Invalid("number of leases"));
    }
    entries.iter().map(Lease::decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_back_and_every_flipped_bit_is_noticed() {
        let journal = JournalId::from_bytes([7; 16]);
        let lease = Lease {
            id: [1; 16],
            nameless: false,
            feed: false,
            position: Position::new(9),
            offset: 640,
            heard_at_us: -5,
        };
        let nameless = Lease { id: [2; 16], nameless: true, ..lease };
        let leases = [lease, nameless, Lease { feed: true, ..lease }];
        let bytes = encode(journal, &leases);
        assert_eq!(decode(&bytes, journal), Ok(leases.to_vec()));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged, journal).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len], journal).is_err(), "cut to {len}");
        }
        assert!(decode(&bytes, JournalId::from_bytes([8; 16])).is_err());
    }
}
