//! The files in `views/.intake/`: in which order several journals are taken in by the views over them.

use super::batch::Link;
use super::{Block, Decoder, FormatError, crc32};
use crate::position::{Chain, JournalId, Position};

/// Length of a record.
pub const RUN_BYTES: usize = 40;
/// The most journals that a view may be made from.
pub const JOURNALS_MAX: usize = u16::MAX as usize;
const MAGIC: [u8; 8] = *b"\x89HWINT\r\n";
const LAYOUT: u16 = 2;
/// Of the header, in front of the ids.
const FRONT_BYTES: usize = 16;
const CRC_BYTES: usize = 4;

/// The head of a file: whose order it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntakeHeader {
    journals: Vec<JournalId>,
    crc: u32,
}

/// A record: events of one journal that are taken in before another's turn comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The journal.
    pub journal: JournalId,
    /// The batch end up to which; from where it was taken in before.
    pub end: Link,
}

impl IntakeHeader {
    /// No header is longer.
    pub const LEN_BYTES_MAX: usize = FRONT_BYTES + 16 * JOURNALS_MAX + CRC_BYTES;

    /// Of a set of journals.
    #[must_use]
    pub fn new(mut journals: Vec<JournalId>) -> Self {
        journals.sort_unstable_by_key(|id| *id.as_bytes());
        let mut header = Self { journals, crc: 0 };
        header.crc = crc32(&[&header.front()]);
        header
    }

    /// The journals, in the order of their ids.
    #[must_use]
    pub fn journals(&self) -> &[JournalId] {
        &self.journals
    }

    /// The name of the file.
    #[must_use]
    pub fn name(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.journals.iter().for_each(|id| {
            hasher.update(id.as_bytes());
        });
        let hash = hasher.finalize();
        crate::hex::hex(hash.as_bytes().get(..16).unwrap_or_default())
    }

    /// Length of the header, and offset of the first record.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        (FRONT_BYTES + 16 * self.journals.len() + CRC_BYTES) as u64
    }

    /// Where the record with this number lies in the file.
    #[must_use]
    pub const fn offset_of(&self, number: u64) -> u64 {
        self.len_bytes().saturating_add(number.saturating_mul(RUN_BYTES as u64))
    }

    fn front(&self) -> Vec<u8> {
        let count = u16::try_from(self.journals.len()).unwrap_or(u16::MAX);
        let mut out = [&MAGIC[..], &LAYOUT.to_le_bytes(), &count.to_le_bytes(), &[0; 4]].concat();
        self.journals.iter().for_each(|id| out.extend_from_slice(id.as_bytes()));
        out
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.front();
        out.extend_from_slice(&self.crc.to_le_bytes());
        out
    }

    /// Reads the header from the beginning of a file.
    ///
    /// # Errors
    /// [`FormatError`] if there is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(bytes);
        if input.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let (version, count) = (input.u16()?, input.u16()?);
        input.bytes(4)?;
        let ids = input.bytes(16 * usize::from(count))?;
        let (ids, _) = ids.as_chunks::<16>();
        let header = Self::new(ids.iter().map(|id| JournalId::from_bytes(*id)).collect());
        let covered = bytes.get(..FRONT_BYTES + ids.as_flattened().len()).unwrap_or_default();
        if input.u32()? != crc32(&[covered]) {
            return Err(FormatError::HeaderChecksum);
        }
        if version != LAYOUT {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        if covered == header.front() { Ok(header) } else { Err(FormatError::Invalid("journals")) }
    }

    /// The bytes of the record with this number, which is written together with so many others in front of it; `None` if its
    /// journal isn't one of them.
    #[must_use]
    pub fn encode_run(&self, number: u64, in_front: u16, run: &Run) -> Option<[u8; RUN_BYTES]> {
        let journal = self.journals.iter().position(|id| *id == run.journal)?;
        let mut out = Block::<RUN_BYTES>::new();
        out.put(0, &run.end.offset.to_le_bytes());
        out.put(8, &run.end.position.get().to_le_bytes());
        out.put(16, run.end.chain.as_bytes());
        out.put(32, &u16::try_from(journal).ok()?.to_le_bytes());
        out.put(34, &in_front.to_le_bytes());
        let crc = self.crc_of(number, &out.0[..RUN_BYTES - CRC_BYTES]);
        out.put(RUN_BYTES - CRC_BYTES, &crc.to_le_bytes());
        Some(out.0)
    }

    /// Reads the record with this number.
    ///
    /// # Errors
    /// [`FormatError`] if these aren't the bytes of one.
    pub fn decode_run(&self, number: u64, bytes: &[u8]) -> Result<Run, FormatError> {
        self.decode_written(number, bytes).map(|(run, _)| run)
    }

    /// The same, and the number of the first record that was written together with it.
    ///
    /// # Errors
    /// [`FormatError`] if these aren't the bytes of one.
    pub fn decode_written(&self, number: u64, bytes: &[u8]) -> Result<(Run, u64), FormatError> {
        let bytes: &[u8; RUN_BYTES] = bytes.try_into().map_err(|_| FormatError::Truncated)?;
        let (covered, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated)?;
        if self.crc_of(number, covered) != u32::from_le_bytes(*crc) {
            return Err(FormatError::BodyChecksum);
        }
        let mut input = Decoder::new(covered);
        let (offset, position) = (input.u64()?, Position::new(input.u64()?));
        let chain = Chain::from_bytes(input.array()?);
        let journal = self.journals.get(usize::from(input.u16()?));
        let journal = *journal.ok_or(FormatError::Invalid("journal"))?;
        let in_front = number.checked_sub(u64::from(input.u16()?));
        let first = in_front.ok_or(FormatError::Invalid("records in front"))?;
        Ok((Run { journal, end: Link { offset, position, chain } }, first))
    }

    /// A record counts in its own place in its own file only.
    fn crc_of(&self, number: u64, covered: &[u8]) -> u32 {
        crc32(&[&self.crc.to_le_bytes(), &number.to_le_bytes(), covered])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> IntakeHeader {
        IntakeHeader::new([7, 2, 5].map(|n| JournalId::from_bytes([n; 16])).to_vec())
    }

    fn run() -> Run {
        let end =
            Link { offset: 640, position: Position::new(9), chain: Chain::from_bytes([3; 16]) };
        Run { journal: JournalId::from_bytes([5; 16]), end }
    }

    #[test]
    fn the_order_in_which_journals_are_named_makes_no_difference() {
        let mut others = header().journals().to_vec();
        others.rotate_left(1);
        assert_eq!(IntakeHeader::new(others.clone()), header());
        others.pop();
        assert_ne!(IntakeHeader::new(others).name(), header().name());
        assert_eq!(header().name().len(), 32);
    }

    #[test]
    fn every_flipped_bit_is_noticed_and_so_is_another_place() {
        let header = header();
        let bytes = header.encode();
        assert_eq!((IntakeHeader::decode(&bytes), bytes.len()), (Ok(header.clone()), 68));
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(IntakeHeader::decode(&bytes).is_err(), "bit {bit}");
        }
        let bytes = header.encode_run(4, 1, &run()).unwrap();
        assert_eq!(header.decode_run(4, &bytes), Ok(run()));
        assert_eq!(header.decode_written(4, &bytes), Ok((run(), 3)));
        for bit in 0..RUN_BYTES * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(header.decode_run(4, &bytes).is_err(), "bit {bit}");
        }
        assert!(header.decode_run(5, &bytes).is_err());
        let other = IntakeHeader::new(vec![JournalId::from_bytes([5; 16])]);
        assert!(other.decode_run(4, &bytes).is_err());
    }

    /// Exactly these bytes are on people's disks.
    #[test]
    fn the_bytes_are_the_documented_ones() {
        let header = IntakeHeader::new([2, 1].map(|n| JournalId::from_bytes([n; 16])).to_vec());
        let hex = |bytes: &[u8]| crate::hex::hex(bytes);
        assert_eq!(hex(&header.encode()[..16]), "894857494e540d0a0200020000000000");
        assert_eq!(header.encode()[16..48], [[1; 16], [2; 16]].concat());
        let run = Run { journal: JournalId::from_bytes([2; 16]), ..run() };
        let bytes = header.encode_run(0, 0, &run).unwrap();
        let front = [&640_u64.to_le_bytes()[..], &9_u64.to_le_bytes(), &[3; 16], &[1, 0, 0, 0]];
        assert_eq!(bytes[..36], front.concat());
    }
}
