//! The header page of a segment: the header twice, each copy with its own checksum, then zeros.
//!
//! The page is written once and never stamped again; a mirror stores it verbatim. Because it can be remade
//! from one valid copy, one flipped bit never loses the salt, and with it every batch of the segment.

use super::{Block, Decoder, FORMAT_VERSION, Flags, FormatError, crc32};
use crate::position::{Chain, Incarnation, JournalId, Position};

/// Size of the header page: the first batch of a segment lies at this file offset.
pub const HEADER_PAGE_BYTES: usize = 4096;
/// Size of one copy of the header; the copies lie at file offsets 0 and 512, each in a disk sector of its own.
pub const HEADER_COPY_BYTES: usize = 512;
/// The first eight bytes of a copy.
pub const SEGMENT_MAGIC: [u8; 8] = *b"\x89HWSEG\r\n";
/// The checksum kind of this version: CRC-32 (IEEE).
pub const CHECKSUM_CRC32: u8 = 1;

const _: () = assert!(2 * HEADER_COPY_BYTES <= HEADER_PAGE_BYTES);

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Feature flags.
    pub flags: Flags,
    /// Every synced group of batches is padded to a multiple of this: 64, 512 or 4096.
    pub group_alignment: u32,
    /// The journal.
    pub journal: JournalId,
    /// The segment's number, which is also its file's name.
    pub number: u64,
    /// Epoch of the opening that wrote this header.
    pub epoch: u32,
    /// Incarnation of the opening that wrote this header.
    pub incarnation: Incarnation,
    /// Position of the segment's first event.
    pub base_position: Position,
    /// Offset of the segment's first batch.
    pub base_offset: u64,
    /// The durable end when this header was written.
    pub durable_offset: u64,
    /// Random; goes into the checksum of every batch header here.
    pub salt: u64,
    /// When it was written, in microseconds since 1970.
    pub created_at_us: i64,
    /// Size to which the file was prepared, header page included.
    pub capacity_bytes: u64,
    /// The chain at `base_offset`: a link to the predecessor, never a proof.
    pub previous_chain: Chain,
}

/// A header that was read, with the bytes it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentPage {
    /// The fields.
    pub header: SegmentHeader,
    /// BLAKE3 of a valid copy: enters the chain of the segment's first batch.
    pub digest: [u8; 32],
    copy: Box<[u8; HEADER_COPY_BYTES]>,
}

/// What lies where a header page should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageState {
    /// At least one copy is valid.
    Valid {
        /// The header.
        page: SegmentPage,
        /// Both copies were valid and the rest was zero.
        intact: bool,
    },
    /// All zeros: a spare segment, or a lost header if bytes follow.
    Zero,
    /// No valid copy, and not zero; why the first copy is invalid.
    Invalid(FormatError),
}

impl SegmentHeader {
    /// The header page for these fields.
    #[must_use]
    pub fn to_page(&self) -> SegmentPage {
        let mut out = Block::<HEADER_COPY_BYTES>::new();
        let mut flags = [0; 6];
        self.flags.encode_into(&mut flags);
        out.put(0, &SEGMENT_MAGIC);
        out.put(8, &FORMAT_VERSION.to_le_bytes());
        out.put(10, &(HEADER_COPY_BYTES as u16).to_le_bytes());
        out.put(12, &flags);
        out.put(18, &[CHECKSUM_CRC32]);
        out.put(20, &self.group_alignment.to_le_bytes());
        out.put(24, self.journal.as_bytes());
        out.put(40, &self.number.to_le_bytes());
        out.put(48, &self.epoch.to_le_bytes());
        out.put(56, &self.incarnation.get().to_le_bytes());
        out.put(64, &self.base_position.get().to_le_bytes());
        out.put(72, &self.base_offset.to_le_bytes());
        out.put(80, &self.durable_offset.to_le_bytes());
        out.put(88, &self.salt.to_le_bytes());
        out.put(96, &self.created_at_us.to_le_bytes());
        out.put(104, &self.capacity_bytes.to_le_bytes());
        let predecessor = self.number.checked_sub(1).unwrap_or(u64::MAX);
        out.put(112, &predecessor.to_le_bytes());
        out.put(120, &self.base_offset.to_le_bytes());
        out.put(128, self.previous_chain.as_bytes());
        let crc = crc32(&[&out.0[..HEADER_COPY_BYTES - 4]]);
        out.put(HEADER_COPY_BYTES - 4, &crc.to_le_bytes());
        SegmentPage {
            header: *self,
            digest: *blake3::hash(&out.0).as_bytes(),
            copy: Box::new(out.0),
        }
    }

    fn decode(copy: &[u8; HEADER_COPY_BYTES]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(copy);
        if input.array()? != SEGMENT_MAGIC {
            return Err(FormatError::Magic);
        }
        let (covered, crc) =
            copy.split_last_chunk::<4>().map(|(a, b)| (a, *b)).ok_or(FormatError::Truncated)?;
        if crc32(&[covered]) != u32::from_le_bytes(crc) {
            return Err(FormatError::HeaderChecksum);
        }
        let version = input.u16()?;
        let header_len = input.u16()?;
        let flags = Flags::decode(&mut input)?;
        if version != FORMAT_VERSION || flags.incompatible != 0 {
            return Err(FormatError::Unsupported { version, flags: flags.incompatible });
        }
        if usize::from(header_len) != HEADER_COPY_BYTES {
            return Err(FormatError::Invalid("segment header length"));
        }
        if input.u8()? != CHECKSUM_CRC32 {
            return Err(FormatError::Invalid("checksum kind"));
        }
        input.u8()?;
        let group_alignment = input.u32()?;
        let journal = JournalId::from_bytes(input.array()?);
        let number = input.u64()?;
        let epoch = input.u32()?;
        input.u32()?;
        let header = Self {
            flags,
            group_alignment,
            journal,
            number,
            epoch,
            incarnation: Incarnation::new(input.u64()?),
            base_position: Position::new(input.u64()?),
            base_offset: input.u64()?,
            durable_offset: input.u64()?,
            salt: input.u64()?,
            created_at_us: input.i64()?,
            capacity_bytes: input.u64()?,
            previous_chain: Chain::default(),
        };
        let predecessor = input.u64()?;
        let predecessor_end = input.u64()?;
        let previous_chain = Chain::from_bytes(input.array()?);
        Self { previous_chain, ..header }.check(predecessor, predecessor_end)
    }

    fn check(self, predecessor: u64, predecessor_end: u64) -> Result<Self, FormatError> {
        if predecessor != self.number.checked_sub(1).unwrap_or(u64::MAX) {
            return Err(FormatError::Invalid("predecessor number"));
        }
        if !matches!(self.group_alignment, 64 | 512 | 4096) {
            return Err(FormatError::Invalid("group alignment"));
        }
        if self.durable_offset > self.base_offset {
            return Err(FormatError::Invalid("durable offset above the segment's own base"));
        }
        if predecessor_end != self.base_offset {
            return Err(FormatError::Invalid("predecessor end"));
        }
        if !self.base_offset.is_multiple_of(super::batch::BATCH_ALIGNMENT) {
            return Err(FormatError::Invalid("base offset"));
        }
        Ok(self)
    }
}

impl SegmentPage {
    /// The page as it lies at the front of the file: copy, copy, zeros.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_PAGE_BYTES] {
        let mut page = Block::<HEADER_PAGE_BYTES>::new();
        page.put(0, &*self.copy);
        page.put(HEADER_COPY_BYTES, &*self.copy);
        page.0
    }

    /// Reads a header page, from whichever copy is valid.
    ///
    /// A valid checksum with an unknown version or flag is [`FormatError::Unsupported`] even if the other
    /// copy is damaged: it is not damage.
    #[must_use]
    pub fn read(page: &[u8; HEADER_PAGE_BYTES]) -> PageState {
        if page.iter().all(|&byte| byte == 0) {
            return PageState::Zero;
        }
        let copies = page.as_chunks::<HEADER_COPY_BYTES>().0;
        let mut first_error = None;
        let mut valid = None;
        for copy in copies.iter().take(2) {
            match SegmentHeader::decode(copy) {
                Ok(header) if valid.is_none() => valid = Some((header, copy)),
                Ok(_) => {}
                Err(error @ FormatError::Unsupported { .. }) => return PageState::Invalid(error),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        match valid {
            Some((header, copy)) => {
                let page_read =
                    Self { header, digest: *blake3::hash(copy).as_bytes(), copy: Box::new(*copy) };
                let intact = page_read.bytes() == *page;
                PageState::Valid { page: page_read, intact }
            }
            None => PageState::Invalid(first_error.unwrap_or(FormatError::Magic)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SegmentHeader {
        SegmentHeader {
            flags: Flags::default(),
            group_alignment: 64,
            journal: JournalId::from_bytes([1; 16]),
            number: 3,
            epoch: 2,
            incarnation: Incarnation::new(77),
            base_position: Position::new(10),
            base_offset: 640,
            durable_offset: 640,
            salt: 99,
            created_at_us: -5,
            capacity_bytes: 8192,
            previous_chain: Chain::from_bytes([9; 16]),
        }
    }

    #[test]
    fn a_page_reads_back_as_it_was_written() {
        let page = header().to_page();
        assert_eq!(SegmentPage::read(&page.bytes()), PageState::Valid { page, intact: true });
    }

    #[test]
    fn any_single_flipped_bit_leaves_the_header_readable_and_is_noticed() {
        let page = header().to_page();
        let bytes = page.bytes();
        for bit in 0..HEADER_PAGE_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            match SegmentPage::read(&damaged) {
                PageState::Valid { page: read, intact } => {
                    assert_eq!(read, page, "bit {bit}");
                    assert!(!intact, "bit {bit}");
                }
                other => panic!("bit {bit}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_required_feature_is_unsupported_not_damaged() {
        let mut unknown = header();
        unknown.flags.incompatible = 4;
        assert_eq!(
            SegmentPage::read(&unknown.to_page().bytes()),
            PageState::Invalid(FormatError::Unsupported { version: 1, flags: 4 })
        );
    }

    #[test]
    fn a_durable_offset_above_the_base_is_invalid() {
        let mut wrong = header();
        wrong.durable_offset = 704;
        assert!(matches!(
            SegmentPage::read(&wrong.to_page().bytes()),
            PageState::Invalid(FormatError::Invalid(_))
        ));
    }
}
