//! The batch: the events of one append, framed, checksummed and chained. The unit of atomicity and of
//! shipping; its bytes on disk are its bytes on the wire.
//!
//! Invariants:
//! - `count >= 1`, so a position has exactly one chain.
//! - A batch never spans segments, is aligned to [`BATCH_ALIGNMENT`], and knows its own offset: one found
//!   elsewhere is not a batch.
//! - `durable_offset <= offset`: a batch can only know of a durable end in front of itself.
//! - Nothing is outside some checksum: the header's covers the header, the body's the body, and padding
//!   must be zero.

use super::record::{Names, RECORD_BYTES_MIN, RecordRef};
use super::{Block, Decoder, FORMAT_VERSION, Flags, FormatError, crc32};
use crate::planted::{self, Bug};
use crate::position::{Chain, Checkpoint, Incarnation, JournalId, Position};

/// First four bytes of a batch.
pub const BATCH_MAGIC: [u8; 4] = *b"\xB7HWB";
/// Length of the header that this version writes. A reader accepts longer ones.
pub const BATCH_HEADER_BYTES: usize = 128;
/// The longest header that a reader accepts.
pub const BATCH_HEADER_BYTES_MAX: usize = 4096;
/// Batches begin at multiples of this, and are padded to one.
pub const BATCH_ALIGNMENT: u64 = 64;
/// No batch is longer than this, header and body together.
pub const BATCH_BYTES_LIMIT: u32 = 16 * 1024 * 1024;
/// The largest group alignment: the last batch of a group may be padded by almost so much.
pub const GROUP_ALIGNMENT_MAX: u32 = 4096;
/// No batch is longer than this, header, body and padding together.
pub const PADDED_BYTES_LIMIT: u32 = BATCH_BYTES_LIMIT + GROUP_ALIGNMENT_MAX;

const CRC_AT: usize = 12;
const CHAIN_AT: usize = 80;
const CHAIN_DOMAIN: &[u8] = b"headwater batch chain v1\0";
const GENESIS_DOMAIN: &[u8] = b"headwater genesis v1\0";

const _: () = assert!((BATCH_HEADER_BYTES as u64).is_multiple_of(BATCH_ALIGNMENT));
const _: () = assert!((BATCH_BYTES_LIMIT as u64).is_multiple_of(4096));

/// The fields of a batch header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Length of the header itself; the body follows it.
    pub header_len: u16,
    /// Feature flags.
    pub flags: Flags,
    /// Length of the body as stored.
    pub stored_len: u32,
    /// Length of the body after decompression; equal to `stored_len` as long as there is none.
    pub raw_len: u32,
    /// Checksum of the body as stored.
    pub body_crc: u32,
    /// Number of events, at least one.
    pub count: u32,
    /// Position of the first event.
    pub base_position: Position,
    /// The batch's own offset.
    pub offset: u64,
    /// The durable end when the batch was written.
    pub durable_offset: u64,
    /// Number of the opening that wrote it.
    pub epoch: u32,
    /// Length of header, body and padding: the next batch begins this much further on.
    pub padded_len: u32,
    /// Random twin of the epoch.
    pub incarnation: Incarnation,
    /// When it was written, in microseconds since 1970. Information only; nothing is ordered by it.
    pub time_us: i64,
    /// The chain at the end of this batch.
    pub chain: Chain,
}

/// What stands in front of a batch and must be continued by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where the batch begins.
    pub offset: u64,
    /// Position of its first event.
    pub position: Position,
    /// The chain in front of it.
    pub chain: Chain,
}

impl From<Checkpoint> for Link {
    fn from(end: Checkpoint) -> Self {
        Self { offset: end.offset, position: end.position, chain: end.chain }
    }
}

/// The chain in front of the first batch of a journal.
#[must_use]
pub fn genesis(journal: JournalId) -> Chain {
    let mut hasher = blake3::Hasher::new();
    hasher.update(GENESIS_DOMAIN).update(journal.as_bytes());
    truncate(hasher.finalize())
}

/// The digest of a body as stored, the part of the chain that can be computed before its turn comes.
#[must_use]
pub fn body_digest(body: &[u8]) -> [u8; 32] {
    *blake3::hash(body).as_bytes()
}

/// The chain at the end of a batch.
///
/// `segment` is the digest of the segment's header if this is the segment's first batch; `header` are the
/// header's bytes, in which checksum and chain count as zeros.
#[must_use]
pub fn chain(
    previous: Chain,
    segment: Option<&[u8; 32]>,
    header: &[u8],
    body_digest: &[u8; 32],
) -> Chain {
    let mut hasher = blake3::Hasher::new();
    hasher.update(CHAIN_DOMAIN).update(previous.as_bytes()).update(segment.unwrap_or(&[0; 32]));
    let piece = |from: usize, to: usize| header.get(from..to.min(header.len())).unwrap_or_default();
    hasher.update(piece(0, CRC_AT)).update(&[0; 4]).update(piece(CRC_AT + 4, CHAIN_AT));
    hasher.update(&[0; 16]).update(piece(CHAIN_AT + 16, header.len())).update(body_digest);
    truncate(hasher.finalize())
}

fn truncate(hash: blake3::Hash) -> Chain {
    let (front, _) = hash.as_bytes().split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
    Chain::from_bytes(*front)
}

/// The length of a batch with a body of `stored_len` bytes, padded.
#[must_use]
pub const fn padded_len(stored_len: u64) -> u64 {
    (BATCH_HEADER_BYTES as u64 + stored_len).next_multiple_of(BATCH_ALIGNMENT)
}

impl BatchHeader {
    /// The header's bytes, checksummed with the segment's salt. The chain must be in place.
    #[must_use]
    pub fn encode(&self, salt: u64) -> [u8; BATCH_HEADER_BYTES] {
        let mut bytes = self.encode_unchecked();
        let crc = crc32(&[&salt.to_le_bytes(), &bytes]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Sets the chain for a batch that follows `previous`, and returns the header's bytes.
    #[must_use]
    pub fn seal(
        &mut self,
        previous: Chain,
        segment: Option<&[u8; 32]>,
        body_digest: &[u8; 32],
        salt: u64,
    ) -> [u8; BATCH_HEADER_BYTES] {
        self.chain = chain(previous, segment, &self.encode_unchecked(), body_digest);
        self.encode(salt)
    }

    fn encode_unchecked(&self) -> [u8; BATCH_HEADER_BYTES] {
        let mut out = Block::<BATCH_HEADER_BYTES>::new();
        let mut flags = [0; 6];
        self.flags.encode_into(&mut flags);
        out.put(0, &BATCH_MAGIC);
        out.put(4, &self.header_len.to_le_bytes());
        out.put(6, &flags);
        out.put(16, &self.stored_len.to_le_bytes());
        out.put(20, &self.raw_len.to_le_bytes());
        out.put(24, &self.body_crc.to_le_bytes());
        out.put(28, &self.count.to_le_bytes());
        out.put(32, &self.base_position.get().to_le_bytes());
        out.put(40, &self.offset.to_le_bytes());
        out.put(48, &self.durable_offset.to_le_bytes());
        out.put(56, &self.epoch.to_le_bytes());
        out.put(60, &self.padded_len.to_le_bytes());
        out.put(64, &self.incarnation.get().to_le_bytes());
        out.put(72, &self.time_us.to_le_bytes());
        out.put(CHAIN_AT, self.chain.as_bytes());
        out.0
    }

    /// Reads the header at the front of `bytes`, which may go on behind it.
    ///
    /// The checksum is verified before any length is believed.
    ///
    /// # Errors
    /// [`FormatError`]; [`FormatError::Unsupported`] only if the checksum is right.
    pub fn decode(bytes: &[u8], salt: u64) -> Result<Self, FormatError> {
        let mut input = Decoder::new(bytes);
        if input.array()? != BATCH_MAGIC {
            return Err(FormatError::Magic);
        }
        let header_len = input.u16()?;
        let len = usize::from(header_len);
        if !(BATCH_HEADER_BYTES..=BATCH_HEADER_BYTES_MAX).contains(&len) || len % 8 != 0 {
            return Err(FormatError::Invalid("batch header length"));
        }
        let header = bytes.get(..len).ok_or(FormatError::Truncated)?;
        let flags = Flags::decode(&mut input)?;
        let crc = input.u32()?;
        let (front, back) = (
            header.get(..CRC_AT).unwrap_or_default(),
            header.get(CRC_AT + 4..).unwrap_or_default(),
        );
        if crc32(&[&salt.to_le_bytes(), front, &[0; 4], back]) != crc {
            return Err(FormatError::HeaderChecksum);
        }
        if flags.incompatible != 0 {
            let flags = flags.incompatible;
            return Err(FormatError::Unsupported { version: FORMAT_VERSION, flags });
        }
        let header = Self {
            header_len,
            flags,
            stored_len: input.u32()?,
            raw_len: input.u32()?,
            body_crc: input.u32()?,
            count: input.u32()?,
            base_position: Position::new(input.u64()?),
            offset: input.u64()?,
            durable_offset: input.u64()?,
            epoch: input.u32()?,
            padded_len: input.u32()?,
            incarnation: Incarnation::new(input.u64()?),
            time_us: input.i64()?,
            chain: Chain::from_bytes(input.array()?),
        };
        header.check()
    }

    fn check(self) -> Result<Self, FormatError> {
        let used = u64::from(self.header_len) + u64::from(self.stored_len);
        let padded = u64::from(self.padded_len);
        if used > u64::from(BATCH_BYTES_LIMIT) {
            return Err(FormatError::Invalid("batch length"));
        }
        if self.padded_len > PADDED_BYTES_LIMIT || padded % BATCH_ALIGNMENT != 0 || padded < used {
            return Err(FormatError::Invalid("batch length"));
        }
        if padded - used >= u64::from(GROUP_ALIGNMENT_MAX) + BATCH_ALIGNMENT {
            return Err(FormatError::Invalid("padding length"));
        }
        if self.raw_len != self.stored_len {
            return Err(FormatError::Invalid("raw length"));
        }
        let records_max = u64::from(self.stored_len) / RECORD_BYTES_MIN as u64;
        if self.count == 0 || u64::from(self.count) > records_max {
            return Err(FormatError::Invalid("event count"));
        }
        if self.durable_offset > self.offset {
            return Err(FormatError::Invalid("durable offset above the batch's own offset"));
        }
        let ends = (
            self.offset.checked_add(padded),
            self.base_position.get().checked_add(u64::from(self.count)),
        );
        if !self.offset.is_multiple_of(BATCH_ALIGNMENT) || ends.0.is_none() || ends.1.is_none() {
            return Err(FormatError::Invalid("offset or position"));
        }
        Ok(self)
    }

    /// Where the next batch begins.
    #[must_use]
    pub fn end_offset(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.padded_len))
    }

    /// The position behind the last event.
    #[must_use]
    pub fn end_position(&self) -> Position {
        self.base_position.advance(u64::from(self.count))
    }

    /// What the next batch must continue.
    #[must_use]
    pub fn end_link(&self) -> Link {
        Link { offset: self.end_offset(), position: self.end_position(), chain: self.chain }
    }
}

/// A whole batch whose checksums were verified, borrowed from a buffer.
#[derive(Clone, Copy, Debug)]
pub struct BatchRef<'a> {
    /// The fields of the header.
    pub header: BatchHeader,
    bytes: &'a [u8],
}

impl<'a> BatchRef<'a> {
    /// Reads and verifies the batch at the front of `bytes`: both checksums, zero padding.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] if the buffer holds only a part of it; otherwise what is wrong with it.
    pub fn decode(bytes: &'a [u8], salt: u64) -> Result<Self, FormatError> {
        let header = BatchHeader::decode(bytes, salt)?;
        let bytes = bytes.get(..header.padded_len as usize).ok_or(FormatError::Truncated)?;
        let batch = Self { header, bytes };
        if crc32(&[batch.body()]) != header.body_crc && !planted::is(Bug::NoBodyCheck) {
            return Err(FormatError::BodyChecksum);
        }
        let padding = bytes.get(batch.body_end()..).unwrap_or_default();
        if padding.iter().any(|&byte| byte != 0) {
            return Err(FormatError::Invalid("padding that is not zero"));
        }
        Ok(batch)
    }

    /// The batch at the front of `bytes`, which were verified and decoded as this header.
    pub(crate) fn of_verified(header: BatchHeader, bytes: &'a [u8]) -> Self {
        Self { header, bytes: bytes.get(..header.padded_len as usize).unwrap_or_default() }
    }

    /// Whether this batch continues `link`: its offset, its position, and its chain computed anew.
    #[must_use]
    pub fn continues(&self, link: &Link, segment: Option<&[u8; 32]>) -> bool {
        self.header.offset == link.offset
            && self.header.base_position == link.position
            && (self.header.chain == self.chain_after(link.chain, segment)
                || planted::is(Bug::NoBodyCheck))
    }

    /// The chain at this batch's end if it follows `previous`.
    #[must_use]
    pub fn chain_after(&self, previous: Chain, segment: Option<&[u8; 32]>) -> Chain {
        let header = self.bytes.get(..usize::from(self.header.header_len)).unwrap_or_default();
        chain(previous, segment, header, &body_digest(self.body()))
    }

    /// Header, body and padding.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The records.
    #[must_use]
    pub fn body(&self) -> &'a [u8] {
        self.bytes.get(usize::from(self.header.header_len)..self.body_end()).unwrap_or_default()
    }

    fn body_end(&self) -> usize {
        usize::from(self.header.header_len) + self.header.stored_len as usize
    }

    /// The records, in order; an error ends the iteration.
    ///
    /// A batch with right checksums whose records don't parse was written by a faulty or hostile writer.
    #[must_use]
    pub fn records(&self) -> Records<'a> {
        Records { rest: self.body(), left: self.header.count, names: Names::default() }
    }

    /// Verifies that the body consists of exactly `count` valid records.
    ///
    /// # Errors
    /// The first record's error, or [`FormatError::Invalid`] if bytes are left over.
    pub fn check_records(&self) -> Result<(), FormatError> {
        let mut records = self.records();
        records.by_ref().try_for_each(|record| record.map(drop))?;
        if records.rest.is_empty() {
            Ok(())
        } else {
            Err(FormatError::Invalid("bytes behind the last record"))
        }
    }
}

/// The records of a batch; see [`BatchRef::records`].
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    left: u32,
    /// Those of the record in front.
    names: Names<'a>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<RecordRef<'a>, FormatError>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        match RecordRef::decode_behind(self.rest, self.names) {
            Ok((record, names, rest)) => {
                (self.rest, self.names) = (rest, names);
                Some(Ok(record))
            }
            Err(error) => {
                self.left = 0;
                Some(Err(error))
            }
        }
    }
}
