//! The index of a sealed segment: where positions lie, which streams it holds, which event ids.
//!
//! ```text
//! file    page 0: header │ pages 1…: the sections in a row, 4092 bytes of them a page
//! page    4092 bytes │ CRC-32 of segment number ‖ page number ‖ bytes
//! section sparse  {position, offset, time} every 64 KiB of batches
//!         ids     XXH3-64 of the event id, by position
//!         streams {hash of name, first revision, count, name, postings}, sorted by hash
//!         names   of the streams, in a row
//!         postings {position, batch offset} of each stream's events, in order
//! ```
//!
//! A sidecar is derived data: a reader that finds one invalid reads the segment instead. It is valid only
//! for the segment whose number, salt, end and end chain it carries.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use super::base::Head;
use super::batch::BatchHeader;
use super::record::RecordRef;
use super::{Block, Decoder, FormatError, crc32};
use crate::event::{EventId, Revision};
use crate::position::{Chain, Position};

/// Size of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a page that carry sections.
pub(super) const PAGE_DATA: u64 = (PAGE_BYTES - 4) as u64;
const MAGIC: [u8; 8] = *b"\x89HWIDX\r\n";
const VERSION: u16 = 2;
const SPARSE_BYTES: u64 = 24;
const ID_BYTES: u64 = 8;
const STREAM_BYTES: u64 = 40;
const POSTING_BYTES: u64 = 16;
/// One sparse entry for about so many bytes of batches.
const SPARSE_EVERY_BYTES: u64 = 64 * 1024;

/// The hash of an event id by which a repeated one is looked for. Whoever asks confirms a hit by reading. Of two
/// ids with the same hash the window remembers the newer one: chance doesn't make such, but it can be done on
/// purpose, so ids are for the writer to give, and not for strangers.
#[must_use]
pub fn id_hash(id: &EventId) -> u64 {
    XxHash3_64::oneshot(id.as_bytes())
}

/// Eight bytes of the hash of a stream's name.
#[must_use]
pub fn stream_hash(name: &str) -> u64 {
    hash64(name.as_bytes())
}

pub(super) fn hash64(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    u64::from_le_bytes(hash.as_bytes().first_chunk().copied().unwrap_or_default())
}

/// A batch's first position, its offset and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparseEntry {
    /// Position of the batch's first event.
    pub position: Position,
    /// The batch's offset.
    pub offset: u64,
    /// When the batch was written, in microseconds since 1970.
    pub time_us: i64,
}

/// Where one event of a stream lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posting {
    /// The event's position.
    pub position: Position,
    /// Offset of its batch.
    pub batch_offset: u64,
}

/// A stream's events within one segment; revisions are consecutive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamPostings {
    /// Revision of the first of them.
    pub first_revision: Revision,
    /// Where they lie, in order; never empty.
    pub postings: Vec<Posting>,
}

impl StreamPostings {
    /// Revision of the last of them.
    #[must_use]
    pub fn last_revision(&self) -> Revision {
        last_revision(self.first_revision, self.postings.len() as u64)
    }
}

/// The index of one segment, in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentIndex {
    /// Some of the batches, in order; the first batch is always among them.
    pub sparse: Vec<SparseEntry>,
    /// The streams.
    pub streams: HashMap<Box<str>, StreamPostings>,
    /// Hashes of the event ids, by position.
    pub ids: Vec<u64>,
}

impl SegmentIndex {
    /// Takes in the next batch's header.
    pub fn add_batch(&mut self, header: &BatchHeader) {
        let due = self
            .sparse
            .last()
            .is_none_or(|last| header.offset.saturating_sub(last.offset) >= SPARSE_EVERY_BYTES);
        if due {
            self.sparse.push(SparseEntry {
                position: header.base_position,
                offset: header.offset,
                time_us: header.time_us,
            });
        }
    }

    /// Takes in the next event of the batch at `batch_offset`.
    pub fn add_event(&mut self, stream: &str, revision: Revision, id: &EventId, posting: Posting) {
        self.ids.push(id_hash(id));
        match self.streams.get_mut(stream) {
            Some(known) => known.postings.push(posting),
            None => {
                let postings = StreamPostings { first_revision: revision, postings: vec![posting] };
                self.streams.insert(stream.into(), postings);
            }
        }
    }

    /// Takes in events of one stream that follow each other in the batch at `batch_offset`. Their ids are
    /// the caller's to add.
    pub fn add_run(
        &mut self,
        stream: &str,
        first_revision: Revision,
        first: Position,
        count: usize,
        batch_offset: u64,
    ) {
        let places =
            (0..count as u64).map(|index| Posting { position: first.advance(index), batch_offset });
        match self.streams.get_mut(stream) {
            Some(known) => known.postings.extend(places),
            None => {
                let postings = StreamPostings { first_revision, postings: places.collect() };
                self.streams.insert(stream.into(), postings);
            }
        }
    }

    /// Takes in a whole batch.
    ///
    /// # Errors
    /// [`FormatError`] of the first record that doesn't parse.
    pub fn add(&mut self, batch: &super::batch::BatchRef<'_>) -> Result<(), FormatError> {
        self.add_batch(&batch.header);
        let mut position = batch.header.base_position;
        for record in batch.records() {
            let record: RecordRef<'_> = record?;
            let posting = Posting { position, batch_offset: batch.header.offset };
            self.add_event(record.stream, record.revision, &record.id, posting);
            position = position.advance(1);
        }
        Ok(())
    }
}

/// For which segment a sidecar is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SidecarKey {
    /// The segment's number.
    pub segment: u64,
    /// Its salt.
    pub salt: u64,
    /// Position of its first event.
    pub base_position: Position,
    /// Its end: the next segment's base offset.
    pub end_offset: u64,
    /// The chain at its end.
    pub end_chain: Chain,
}

/// The file of an index.
#[must_use]
pub fn encode(key: &SidecarKey, index: &SegmentIndex) -> Vec<u8> {
    let mut streams: Vec<_> = index
        .streams
        .iter()
        .map(|(name, postings)| (hash64(name.as_bytes()), name, postings))
        .collect();
    streams.sort_unstable_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    let mut data = Vec::new();
    for entry in &index.sparse {
        data.extend_from_slice(&entry.position.get().to_le_bytes());
        data.extend_from_slice(&entry.offset.to_le_bytes());
        data.extend_from_slice(&entry.time_us.to_le_bytes());
    }
    index.ids.iter().for_each(|id| data.extend_from_slice(&id.to_le_bytes()));
    let (mut name_at, mut posting_at) = (0_u64, 0_u64);
    for (hash, name, postings) in &streams {
        data.extend_from_slice(&hash.to_le_bytes());
        data.extend_from_slice(&postings.first_revision.get().to_le_bytes());
        data.extend_from_slice(&(postings.postings.len() as u32).to_le_bytes());
        data.extend_from_slice(&(name.len() as u32).to_le_bytes());
        data.extend_from_slice(&name_at.to_le_bytes());
        data.extend_from_slice(&posting_at.to_le_bytes());
        name_at += name.len() as u64;
        posting_at += postings.postings.len() as u64;
    }
    streams.iter().for_each(|(_, name, _)| data.extend_from_slice(name.as_bytes()));
    for posting in streams.iter().flat_map(|(_, _, postings)| &postings.postings) {
        data.extend_from_slice(&posting.position.get().to_le_bytes());
        data.extend_from_slice(&posting.batch_offset.to_le_bytes());
    }
    let header = Header {
        key: *key,
        sparse: index.sparse.len() as u64,
        ids: index.ids.len() as u64,
        streams: streams.len() as u64,
        name_bytes: name_at,
        postings: posting_at,
    };
    let mut file = Vec::with_capacity(PAGE_BYTES * (2 + data.len() / PAGE_DATA as usize));
    push_page(&mut file, key.segment, 0, &header.encode());
    for (number, chunk) in (1..).zip(data.chunks(PAGE_DATA as usize)) {
        push_page(&mut file, key.segment, number, chunk);
    }
    file
}

/// Appends page `number` to `file`.
pub(super) fn push_page(file: &mut Vec<u8>, tag: u64, number: u64, data: &[u8]) {
    let mut page = Block::<PAGE_BYTES>::new();
    page.put(0, data);
    let crc = page_crc(tag, number, &page.0[..PAGE_DATA as usize]);
    page.put(PAGE_DATA as usize, &crc.to_le_bytes());
    file.extend_from_slice(&page.0);
}

fn page_crc(tag: u64, number: u64, data: &[u8]) -> u32 {
    crc32(&[&tag.to_le_bytes(), &number.to_le_bytes(), data])
}

#[derive(Clone, Copy, Debug)]
struct Header {
    key: SidecarKey,
    sparse: u64,
    ids: u64,
    streams: u64,
    name_bytes: u64,
    postings: u64,
}

impl Header {
    fn encode(&self) -> [u8; 120] {
        let mut out = Block::<120>::new();
        out.put(0, &MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(16, &self.key.segment.to_le_bytes());
        out.put(24, &self.key.salt.to_le_bytes());
        out.put(32, &self.key.base_position.get().to_le_bytes());
        out.put(40, &self.key.end_offset.to_le_bytes());
        out.put(48, self.key.end_chain.as_bytes());
        out.put(64, &self.sparse.to_le_bytes());
        out.put(72, &self.ids.to_le_bytes());
        out.put(80, &self.streams.to_le_bytes());
        out.put(88, &self.name_bytes.to_le_bytes());
        out.put(96, &self.postings.to_le_bytes());
        out.0
    }

    fn decode(page: &[u8]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(page);
        if input.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = input.u16()?;
        if version != VERSION {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        input.bytes(6)?;
        Ok(Self {
            key: SidecarKey {
                segment: input.u64()?,
                salt: input.u64()?,
                base_position: Position::new(input.u64()?),
                end_offset: input.u64()?,
                end_chain: Chain::from_bytes(input.array()?),
            },
            sparse: input.u64()?,
            ids: input.u64()?,
            streams: input.u64()?,
            name_bytes: input.u64()?,
            postings: input.u64()?,
        })
    }

    /// Where the sections begin, in bytes of section data; and their end.
    fn layout(&self) -> Option<[u64; 6]> {
        let ids = self.sparse.checked_mul(SPARSE_BYTES)?;
        let streams = ids.checked_add(self.ids.checked_mul(ID_BYTES)?)?;
        let names = streams.checked_add(self.streams.checked_mul(STREAM_BYTES)?)?;
        let postings = names.checked_add(self.name_bytes)?;
        let end = postings.checked_add(self.postings.checked_mul(POSTING_BYTES)?)?;
        Some([0, ids, streams, names, postings, end])
    }
}

/// Where the pages of an index come from. Each ends with a checksum that covers its number and a tag, which
/// is the same for all pages of a file.
pub trait Pages: Send + Sync {
    /// Page `number`, verified.
    ///
    /// # Errors
    /// Of the file; [`io::ErrorKind::UnexpectedEof`] if there is no such page,
    /// [`io::ErrorKind::InvalidData`] if it is damaged.
    fn read_page(&self, tag: u64, number: u64) -> io::Result<Page>;

    /// The same, for look-ups that are likely to come again: it may have been kept from an earlier one.
    ///
    /// # Errors
    /// As [`read_page`](Self::read_page).
    fn page(&self, tag: u64, number: u64) -> io::Result<Page> {
        self.read_page(tag, number)
    }

    /// How many whole pages there are.
    ///
    /// # Errors
    /// Of the file.
    fn count(&self) -> io::Result<u64>;
}

/// A verified page, shared.
pub type Page = Arc<[u8; PAGE_BYTES]>;

/// Verifies the checksum of page `number`.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if it isn't right.
pub fn verify_page(tag: u64, number: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
    let (data, crc) = page.split_last_chunk::<4>().ok_or(io::ErrorKind::InvalidData)?;
    let right = page_crc(tag, number, data) == u32::from_le_bytes(*crc);
    if right { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// A sidecar's contents, read page by page as they are needed, each page verified.
///
/// Every method answers [`io::ErrorKind::InvalidData`] when a page is damaged.
#[derive(Debug)]
pub struct Sidecar<P> {
    pages: P,
    header: Header,
    layout: [u64; 6],
}

impl<P: Pages> Sidecar<P> {
    /// Opens a sidecar; `None` if it isn't the valid sidecar of the segment that `key` describes.
    ///
    /// # Errors
    /// Of the file.
    pub fn open(pages: P, key: &SidecarKey) -> io::Result<Option<Self>> {
        let count = pages.count()?;
        if count == 0 {
            return Ok(None);
        }
        let page = match pages.read_page(key.segment, 0) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
            page => page?,
        };
        let Ok(header) = Header::decode(&page[..]) else { return Ok(None) };
        let Some(layout) = header.layout() else { return Ok(None) };
        let [.., end] = layout;
        let valid = header.key == *key
            && end.div_ceil(PAGE_DATA).checked_add(1) == Some(count)
            && header.sparse > 0
            && header.ids == header.postings;
        Ok(valid.then_some(Self { pages, header, layout }))
    }

    /// How many events the segment holds.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.header.ids
    }

    /// Bytes of the sections, for a look-up.
    fn read(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        self.read_with(at, len, P::page)
    }

    /// The same, for what is read once.
    fn read_once(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        self.read_with(at, len, P::read_page)
    }

    fn read_with(
        &self,
        at: u64,
        len: usize,
        page_of: fn(&P, u64, u64) -> io::Result<Page>,
    ) -> io::Result<Vec<u8>> {
        let damaged = || io::Error::from(io::ErrorKind::InvalidData);
        let end =
            at.checked_add(len as u64).filter(|&end| end <= self.layout[5]).ok_or_else(damaged)?;
        let mut out = Vec::with_capacity(len);
        let mut at = at;
        while at < end {
            let page = page_of(&self.pages, self.header.key.segment, at / PAGE_DATA + 1)?;
            let from = at % PAGE_DATA;
            let to = PAGE_DATA.min(from + (end - at));
            out.extend_from_slice(page.get(from as usize..to as usize).ok_or_else(damaged)?);
            at += to - from;
        }
        Ok(out)
    }

    /// How many streams there are.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.header.streams
    }

    /// The hashes of the names of up to `max` streams, from the `first`-th on, ascending.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn stream_hashes(&self, first: u64, max: u64) -> io::Result<Vec<u64>> {
        let count = self.header.streams.saturating_sub(first).min(max);
        let at = self.layout[2] + first * STREAM_BYTES;
        let bytes = self.read_once(at, (count * STREAM_BYTES) as usize)?;
        let entries = bytes.as_chunks::<{ STREAM_BYTES as usize }>().0;
        let hash = |entry: &[u8; STREAM_BYTES as usize]| entry.first_chunk().copied();
        Ok(entries.iter().filter_map(hash).map(u64::from_le_bytes).collect())
    }

    /// The last batch known to begin at or in front of `position`.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn seek(&self, position: Position) -> io::Result<SparseEntry> {
        let (mut low, mut high) = (0, self.header.sparse);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.sparse(middle)?.position <= position { low = middle } else { high = middle }
        }
        self.sparse(low)
    }

    fn sparse(&self, index: u64) -> io::Result<SparseEntry> {
        let bytes = self.read(self.layout[0] + index * SPARSE_BYTES, SPARSE_BYTES as usize)?;
        let mut input = Decoder::new(&bytes);
        let entry = (|| {
            Ok::<_, FormatError>(SparseEntry {
                position: Position::new(input.u64()?),
                offset: input.u64()?,
                time_us: input.i64()?,
            })
        })();
        entry.map_err(invalid)
    }

    /// The hashes of the ids of the last `count` events (or of all, if there are fewer).
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn last_ids(&self, count: u64) -> io::Result<Vec<u64>> {
        let count = count.min(self.header.ids);
        let from = self.layout[1] + (self.header.ids - count) * ID_BYTES;
        let bytes = self.read_once(from, (count * ID_BYTES) as usize)?;
        Ok(bytes.as_chunks().0.iter().map(|id| u64::from_le_bytes(*id)).collect())
    }

    /// A stream's events in this segment: first revision and number, without reading the postings.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn stream(&self, name: &str) -> io::Result<Option<StreamSpan>> {
        let hash = hash64(name.as_bytes());
        let mut index = self.first_with_hash(hash)?;
        while index < self.header.streams {
            let entry = self.entry(index)?;
            if entry.0 != hash {
                break;
            }
            if self.read(self.layout[3].saturating_add(entry.2), entry.1 as usize)?
                == name.as_bytes()
            {
                return Ok(Some(entry.3));
            }
            index += 1;
        }
        Ok(None)
    }

    /// Up to `max` streams from number `first` on, in the order of hashes and names, each with the revision of
    /// its last event here.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn heads(&self, first: u64, max: u64) -> io::Result<Vec<Head>> {
        let count = self.header.streams.saturating_sub(first).min(max);
        let at = self.layout[2].saturating_add(first.saturating_mul(STREAM_BYTES));
        let entries = self.read(at, (count * STREAM_BYTES) as usize)?;
        let rows = entries.chunks_exact(STREAM_BYTES as usize).map(|bytes| {
            let (hash, len, at, span) = Self::decode_entry(bytes)?;
            Ok((hash, span.last_revision(), at, len))
        });
        let rows = rows.collect::<io::Result<Vec<_>>>()?;
        named(&rows, |at, len| self.read(self.layout[3].saturating_add(at), len))
    }

    /// Binary search: the first entry whose hash isn't smaller.
    fn first_with_hash(&self, hash: u64) -> io::Result<u64> {
        first_not_below(self.header.streams, hash, |index| Ok(self.entry(index)?.0))
    }

    /// Hash, name length, place of the name, span.
    fn entry(&self, index: u64) -> io::Result<(u64, u32, u64, StreamSpan)> {
        let bytes = self.read(self.layout[2] + index * STREAM_BYTES, STREAM_BYTES as usize)?;
        Self::decode_entry(&bytes)
    }

    fn decode_entry(bytes: &[u8]) -> io::Result<(u64, u32, u64, StreamSpan)> {
        let mut input = Decoder::new(bytes);
        let entry = (|| {
            let hash = input.u64()?;
            let first_revision = Revision::new(input.u64()?);
            let count = input.u32()?;
            let name_len = input.u32()?;
            let name_at = input.u64()?;
            let first_posting = input.u64()?;
            Ok::<_, FormatError>((
                hash,
                name_len,
                name_at,
                StreamSpan { first_revision, count, first_posting },
            ))
        })();
        entry.map_err(invalid)
    }

    /// The postings of a stream from its `skip`-th event in this segment on, at most `max` of them.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn postings(&self, span: &StreamSpan, skip: u64, max: usize) -> io::Result<Vec<Posting>> {
        let count = u64::from(span.count).saturating_sub(skip).min(max as u64);
        let at = span
            .first_posting
            .checked_add(skip)
            .and_then(|first| first.checked_mul(POSTING_BYTES))
            .and_then(|from| from.checked_add(self.layout[4]))
            .ok_or(io::ErrorKind::InvalidData)?;
        let bytes = self.read(at, (count * POSTING_BYTES) as usize)?;
        let mut input = Decoder::new(&bytes);
        let mut postings = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let position = Position::new(input.u64().map_err(invalid)?);
            let batch_offset = input.u64().map_err(invalid)?;
            postings.push(Posting { position, batch_offset });
        }
        Ok(postings)
    }
}

/// A stream's events within a sealed segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSpan {
    /// Revision of the first of them.
    pub first_revision: Revision,
    /// How many there are; at least one.
    pub count: u32,
    first_posting: u64,
}

impl StreamSpan {
    /// Revision of the last of them.
    #[must_use]
    pub fn last_revision(&self) -> Revision {
        last_revision(self.first_revision, u64::from(self.count))
    }
}

/// The first revision is what a record says, and so any number.
const fn last_revision(first: Revision, count: u64) -> Revision {
    Revision::new(first.get().saturating_add(count.saturating_sub(1)))
}

/// The heads of consecutive streams, of which hash, last revision, place and length of the name are known.
/// Their names lie in a row, and are read at once.
pub(super) fn named(
    rows: &[(u64, Revision, u64, u32)],
    read: impl FnOnce(u64, usize) -> io::Result<Vec<u8>>,
) -> io::Result<Vec<Head>> {
    const NAME_BYTES_MAX: u64 = 255;
    let damaged = || io::Error::from(io::ErrorKind::InvalidData);
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(Vec::new()) };
    let end = last.2.checked_add(u64::from(last.3));
    let len = end.and_then(|end| end.checked_sub(first.2)).ok_or_else(damaged)?;
    if len > rows.len() as u64 * NAME_BYTES_MAX {
        return Err(damaged());
    }
    let names = read(first.2, len as usize)?;
    let head = |(hash, last, at, len): &(u64, Revision, u64, u32)| {
        let from = at.checked_sub(first.2)?;
        let name = names.get(from as usize..)?.get(..*len as usize)?;
        Some(Head { hash: *hash, name: std::str::from_utf8(name).ok()?.into(), last: *last })
    };
    rows.iter().map(|row| head(row).ok_or_else(damaged)).collect()
}

/// Binary search among `count` entries that are sorted by hash: the first one whose hash isn't smaller.
pub(super) fn first_not_below(
    count: u64,
    hash: u64,
    hash_of: impl Fn(u64) -> io::Result<u64>,
) -> io::Result<u64> {
    let (mut low, mut high) = (0, count);
    // Hashes are uniform, so the first guess is nearly always within a page of the entry.
    let mut middle = ((u128::from(hash) * u128::from(high)) >> 64) as u64;
    let mut step = 32;
    while low < high {
        middle = middle.clamp(low, high - 1);
        if hash_of(middle)? < hash {
            low = middle + 1;
            middle = low.saturating_add(step);
        } else {
            high = middle;
            middle = high.saturating_sub(step);
        }
        if high.saturating_sub(low) <= 4 * step || step > 1 << 40 {
            middle = low + (high - low) / 2;
        } else {
            step *= 4;
        }
    }
    Ok(low)
}

fn invalid(_: FormatError) -> io::Error {
    io::ErrorKind::InvalidData.into()
}

#[cfg(test)]
impl Pages for Vec<u8> {
    fn read_page(&self, tag: u64, number: u64) -> io::Result<Page> {
        let all = self.as_chunks::<PAGE_BYTES>().0;
        let page = all.get(number as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
        verify_page(tag, number, page)?;
        Ok(Arc::new(*page))
    }

    fn count(&self) -> io::Result<u64> {
        Ok((self.len() / PAGE_BYTES) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SidecarKey {
        SidecarKey {
            segment: 4,
            salt: 5,
            base_position: Position::new(1000),
            end_offset: 1 << 20,
            end_chain: Chain::from_bytes([3; 16]),
        }
    }

    fn index(streams: u64, events: u64) -> SegmentIndex {
        let mut index = SegmentIndex::default();
        let mut revisions = HashMap::new();
        for i in 0..events {
            let name = format!("s-{}", i * 7 % streams);
            let revision = revisions.entry(name.clone()).or_insert(50_u64);
            let id = EventId::from_bytes(u128::from(i).to_le_bytes());
            let posting = Posting { position: Position::new(1000 + i), batch_offset: 64 * i };
            index.add_event(&name, Revision::new(*revision), &id, posting);
            *revision += 1;
            if i % 100 == 0 {
                index.sparse.push(SparseEntry {
                    position: posting.position,
                    offset: posting.batch_offset,
                    time_us: 0,
                });
            }
        }
        index
    }

    #[test]
    fn every_stream_position_and_id_is_found_again() {
        for (streams, events) in [(1, 1), (3, 10), (700, 5000), (5000, 5000)] {
            let index = index(streams, events);
            let sidecar = Sidecar::open(encode(&key(), &index), &key()).unwrap().unwrap();
            for (name, known) in &index.streams {
                let span = sidecar.stream(name).unwrap().unwrap();
                assert_eq!(span.last_revision(), known.last_revision());
                assert_eq!(sidecar.postings(&span, 0, usize::MAX).unwrap(), known.postings);
            }
            assert_eq!(sidecar.stream("absent").unwrap(), None);
            assert_eq!(sidecar.last_ids(u64::MAX).unwrap(), index.ids);
            for i in 0..events {
                let entry = sidecar.seek(Position::new(1000 + i)).unwrap();
                assert_eq!(entry.position.get(), 1000 + i / 100 * 100);
            }
        }
    }

    #[test]
    fn a_sidecar_of_another_segment_is_not_valid() {
        let bytes = encode(&key(), &index(3, 10));
        for other in [
            SidecarKey { segment: 5, ..key() },
            SidecarKey { salt: 6, ..key() },
            SidecarKey { end_offset: 1 << 21, ..key() },
            SidecarKey { end_chain: Chain::from_bytes([4; 16]), ..key() },
        ] {
            assert!(Sidecar::open(bytes.clone(), &other).unwrap().is_none());
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_never_another_answer() {
        let index = index(300, 1000);
        let bytes = encode(&key(), &index);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..2000 {
            let mut damaged = bytes.clone();
            let bit = rng.usize(..bytes.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Some(sidecar) = Sidecar::open(damaged, &key()).unwrap() else { continue };
            let name = format!("s-{}", rng.u64(..300));
            match sidecar.stream(&name) {
                Ok(span) => {
                    let known = index.streams.get(name.as_str()).unwrap();
                    assert_eq!(span.unwrap().last_revision(), known.last_revision());
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
            }
        }
    }
}
