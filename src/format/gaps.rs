//! The `gaps` file: ranges of a journal that were lost for good, and accepted as lost.
//!
//! It lies beside the segments and changes none of their bytes, so that a range which turns up again can
//! still be put back in its place.

use super::batch::{BATCH_ALIGNMENT, Link};
use super::entries::Entries;
use super::record::RECORD_BYTES_MIN;
use super::{Block, Decoder, FormatError};
use crate::position::{Chain, Incarnation, JournalId, Position};

/// Length of an entry.
pub const GAP_BYTES: usize = 96;

const FILE: Entries<GAP_BYTES> = Entries { magic: *b"\x89HWGAP\r\n", version: 1 };
const CHAIN_AT_END: u32 = 1;
const CHAIN_BEHIND: u32 = 2;

/// What is known of the chain behind a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapChain {
    /// The chain at the end of the gap, which what follows must continue.
    AtEnd(Chain),
    /// The chain at the end of the first batch behind the gap, because the one in front of it is lost.
    Behind(Chain),
}

/// Events that were lost and accepted as lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The end of what can be read in front.
    pub from: Link,
    /// Offset at which the journal goes on.
    pub to_offset: u64,
    /// Position of the first event behind the gap.
    pub to_position: Position,
    /// What the journal must go on with.
    pub chain: GapChain,
    /// Epoch of the last lost batch; 0 if it isn't known.
    pub epoch: u32,
    /// Its incarnation; 0 if it isn't known.
    pub incarnation: Incarnation,
    /// When the loss was accepted, in microseconds since 1970.
    pub accepted_at_us: i64,
}

impl Gap {
    /// How many events were given up.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.to_position.since(self.from.position)
    }

    fn encode(&self) -> [u8; GAP_BYTES] {
        let (flags, chain) = match self.chain {
            GapChain::AtEnd(chain) => (CHAIN_AT_END, chain),
            GapChain::Behind(chain) => (CHAIN_BEHIND, chain),
        };
        let mut out = Block::<GAP_BYTES>::new();
        out.put(0, &self.from.offset.to_le_bytes());
        out.put(8, &self.from.position.get().to_le_bytes());
        out.put(16, self.from.chain.as_bytes());
        out.put(32, &self.to_offset.to_le_bytes());
        out.put(40, &self.to_position.get().to_le_bytes());
        out.put(48, chain.as_bytes());
        out.put(64, &flags.to_le_bytes());
        out.put(68, &self.epoch.to_le_bytes());
        out.put(72, &self.incarnation.get().to_le_bytes());
        out.put(80, &self.accepted_at_us.to_le_bytes());
        out.0
    }

    fn decode(bytes: &[u8; GAP_BYTES]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(bytes);
        let from = Link {
            offset: input.u64()?,
            position: Position::new(input.u64()?),
            chain: Chain::from_bytes(input.array()?),
        };
        let (to_offset, to_position) = (input.u64()?, Position::new(input.u64()?));
        let chain = Chain::from_bytes(input.array()?);
        let chain = match input.u32()? {
            CHAIN_AT_END => GapChain::AtEnd(chain),
            CHAIN_BEHIND => GapChain::Behind(chain),
            _ => return Err(FormatError::Invalid("gap flags")),
        };
        let gap = Self {
            from,
            to_offset,
            to_position,
            chain,
            epoch: input.u32()?,
            incarnation: Incarnation::new(input.u64()?),
            accepted_at_us: input.i64()?,
        };
        let bytes = to_offset.saturating_sub(from.offset);
        let events = to_position.since(from.position);
        let aligned = [from.offset, to_offset].iter().all(|o| o.is_multiple_of(BATCH_ALIGNMENT));
        // More events than fit into the bytes would be allocated for nothing.
        if events == 0 || events > bytes / RECORD_BYTES_MIN as u64 || !aligned {
            return Err(FormatError::Invalid("gap range"));
        }
        Ok(gap)
    }
}

/// The file's bytes.
#[must_use]
pub fn encode(journal: JournalId, gaps: &[Gap]) -> Vec<u8> {
    let entries: Vec<_> = gaps.iter().map(Gap::encode).collect();
    FILE.encode(journal, &entries)
}

/// Reads the file's bytes: the gaps of `journal`, in order, none within or behind another's beginning.
///
/// # Errors
/// [`FormatError`] if they aren't a whole, undamaged `gaps` of this journal and version.
pub fn decode(bytes: &[u8], journal: JournalId) -> Result<Vec<Gap>, FormatError> {
    let entries = FILE.decode(bytes, journal)?;
    let gaps = entries.iter().map(Gap::decode).collect::<Result<Vec<_>, _>>()?;
    let ordered =
        gaps.is_sorted_by(|a, b| a.to_offset <= b.from.offset && a.to_position <= b.from.position);
    if ordered { Ok(gaps) } else { Err(FormatError::Invalid("order of gaps")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(from: u64, to: u64) -> Gap {
        Gap {
            from: Link {
                offset: from * 64,
                position: Position::new(from),
                chain: Chain::from_bytes([1; 16]),
            },
            to_offset: to * 64,
            to_position: Position::new(to),
            chain: GapChain::Behind(Chain::from_bytes([2; 16])),
            epoch: 3,
            incarnation: Incarnation::new(4),
            accepted_at_us: -5,
        }
    }

    #[test]
    fn gaps_are_read_back_and_every_flipped_bit_is_noticed() {
        let journal = JournalId::from_bytes([7; 16]);
        let gaps = [gap(1, 3), Gap { chain: GapChain::AtEnd(Chain::default()), ..gap(3, 9) }];
        let bytes = encode(journal, &gaps);
        assert_eq!(decode(&bytes, journal), Ok(gaps.to_vec()));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged, journal).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len], journal).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn impossible_gaps_are_invalid() {
        let journal = JournalId::from_bytes([7; 16]);
        let overlapping = [gap(1, 3), gap(2, 4)];
        let too_many = [Gap { to_position: Position::new(400), ..gap(1, 3) }];
        let odd = [Gap { to_offset: 3 * 64 + 1, ..gap(1, 3) }];
        for gaps in [&overlapping[..], &too_many, &odd, &[gap(3, 3)], &[gap(3, 1)]] {
            assert!(matches!(
                decode(&encode(journal, gaps), journal),
                Err(FormatError::Invalid(_))
            ));
        }
        assert!(decode(&encode(JournalId::from_bytes([8; 16]), &[]), journal).is_err());
    }
}
