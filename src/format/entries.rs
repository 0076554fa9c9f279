//! The frame of small files that list entries of one length.

use super::{Block, Decoder, FormatError, crc32};
use crate::position::JournalId;

/// Length of such a file in front of its entries.
pub(super) const HEADER_BYTES: usize = 32;

/// A kind of file: magic, version, number of entries, journal id; then the entries, of `N` bytes each; then the
/// CRC-32 of everything in front.
pub(super) struct Entries<const N: usize> {
    pub(super) magic: [u8; 8],
    pub(super) version: u16,
}

impl<const N: usize> Entries<N> {
    pub(super) fn encode(&self, journal: JournalId, entries: &[[u8; N]]) -> Vec<u8> {
        let mut header = Block::<HEADER_BYTES>::new();
        header.put(0, &self.magic);
        header.put(8, &self.version.to_le_bytes());
        header.put(12, &(entries.len() as u32).to_le_bytes());
        header.put(16, journal.as_bytes());
        let mut out = header.0.to_vec();
        out.extend_from_slice(entries.as_flattened());
        let crc = crc32(&[&out]);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// The entries of a whole, undamaged file of this kind and version, and of `journal`.
    pub(super) fn decode<'a>(
        &self,
        bytes: &'a [u8],
        journal: JournalId,
    ) -> Result<&'a [[u8; N]], FormatError> {
        let mut input = Decoder::new(bytes);
        if input.array()? != self.magic {
            return Err(FormatError::Magic);
        }
        let (covered, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated)?;
        if crc32(&[covered]) != u32::from_le_bytes(*crc) {
            return Err(FormatError::HeaderChecksum);
        }
        let version = input.u16()?;
        if version != self.version {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        input.u16()?;
        let count = input.u32()? as usize;
        if JournalId::from_bytes(input.array()?) != journal {
            return Err(FormatError::Invalid("journal id"));
        }
        let (entries, rest) = covered.get(HEADER_BYTES..).unwrap_or_default().as_chunks::<N>();
        if entries.len() != count || !rest.is_empty() {
            return Err(FormatError::Invalid("number of entries"));
        }
        Ok(entries)
    }
}
