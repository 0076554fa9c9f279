//! The file `incoming`: a journal that is being restored, from where to where.

use super::batch::Link;
use super::{Block, Decoder, FormatError, crc32};
use crate::position::{Chain, JournalId, Position};

/// Length of the file.
pub const INCOMING_BYTES: usize = 96;
const MAGIC: [u8; 8] = *b"\x89HWINC\r\n";
const VERSION: u16 = 1;

/// The contents of `incoming`: written before the first byte of a restore, removed behind the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The journal.
    pub journal: JournalId,
    /// Offset of the first batch that is restored.
    pub from_offset: u64,
    /// Position of its first event.
    pub from_position: Position,
    /// Where the restored journal will end.
    pub to: Link,
}

impl Incoming {
    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; INCOMING_BYTES] {
        let mut out = Block::<INCOMING_BYTES>::new();
        out.put(0, &MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(16, self.journal.as_bytes());
        out.put(32, &self.from_offset.to_le_bytes());
        out.put(40, &self.from_position.get().to_le_bytes());
        out.put(48, &self.to.offset.to_le_bytes());
        out.put(56, &self.to.position.get().to_le_bytes());
        out.put(64, self.to.chain.as_bytes());
        let crc = crc32(&[&out.0[..INCOMING_BYTES - 4]]);
        out.put(INCOMING_BYTES - 4, &crc.to_le_bytes());
        out.0
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`FormatError`] if they aren't a whole, undamaged `incoming` of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes: &[u8; INCOMING_BYTES] = bytes.try_into().map_err(|_| FormatError::Truncated)?;
        let mut input = Decoder::new(bytes);
        if input.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let (covered, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated)?;
        if crc32(&[covered]) != u32::from_le_bytes(*crc) {
            return Err(FormatError::HeaderChecksum);
        }
        let version = input.u16()?;
        if version != VERSION {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        input.bytes(6)?;
        Ok(Self {
            journal: JournalId::from_bytes(input.array()?),
            from_offset: input.u64()?,
            from_position: Position::new(input.u64()?),
            to: Link {
                offset: input.u64()?,
                position: Position::new(input.u64()?),
                chain: Chain::from_bytes(input.array()?),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_noticed() {
        let incoming = Incoming {
            journal: JournalId::from_bytes([2; 16]),
            from_offset: 64,
            from_position: Position::new(1),
            to: Link { offset: 128, position: Position::new(3), chain: Chain::from_bytes([7; 16]) },
        };
        assert_eq!(Incoming::decode(&incoming.encode()), Ok(incoming));
        for bit in 0..INCOMING_BYTES * 8 {
            let mut bytes = incoming.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Incoming::decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
