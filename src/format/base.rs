//! The `base` file: what a journal knows of a prefix that retention has removed.
//!
//! ```text
//! file     page 0: header │ page 1: the same │ boundaries │ streams │ names
//! page     4092 bytes │ CRC-32 of journal id ‖ first offset ‖ page number ‖ bytes
//! section  begins with a page of its own; its entries lie in a row, also across pages
//!          boundaries {segment number, base offset, base position, chain} of every removed segment, in order
//!          streams    {hash of name, last revision, place and length of the name}, sorted by hash, then name
//!          names      of the streams, in a row
//! ```
//!
//! It takes the place of genesis, so it is truth and not derived: the segments that it was made of are gone.
//! The first offset only ever grows, so that a page of another base is never taken for one of this.

use std::collections::BinaryHeap;
use std::io;

use super::sidecar::{PAGE_BYTES, first_not_below, hash64, named};
use super::{Block, Decoder, FormatError, crc32};
use crate::event::Revision;
use crate::format::batch::BATCH_ALIGNMENT;
use crate::position::{Chain, Checkpoint, JournalId, Position};

/// Bytes of a page that carry contents.
const PAGE_DATA: usize = PAGE_BYTES - 4;
/// The header stands there twice.
const HEADER_PAGES: u64 = 2;
const HEADER_BYTES: usize = 128;
const BOUNDARY_BYTES: u64 = 40;
const STREAM_BYTES: u64 = 32;
const NAME_BYTES_MAX: u32 = 255;
const MAGIC: [u8; 8] = *b"\x89HWBAS\r\n";
const VERSION: u16 = 1;

/// The first page of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseHeader {
    /// Where what is retained begins: the end of the last batch that was removed.
    pub start: Checkpoint,
    /// Number of the segment that begins there.
    pub first_segment: u64,
    /// The durable end when this was written, behind the first retained batch; in a copy that ends in front of
    /// that, the end of the copy.
    pub durable_offset: u64,
    /// When it was written, in microseconds since 1970.
    pub written_at_us: i64,
    /// How many segments were removed.
    pub boundaries: u64,
    /// How many streams have events among those that were removed.
    pub streams: u64,
    /// Length of their names.
    pub name_bytes: u64,
}

/// Where a removed segment began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// The segment's number.
    pub segment: u64,
    /// Its base offset.
    pub offset: u64,
    /// Its base position.
    pub position: Position,
    /// The chain there.
    pub chain: Chain,
}

/// The last event that a stream has among those that were removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Hash of the name: the order in which streams lie in a base.
    pub hash: u64,
    /// The stream's name.
    pub name: Box<str>,
    /// Revision of that event.
    pub last: Revision,
}

impl Head {
    /// The head of a stream.
    #[must_use]
    pub fn new(name: &str, last: Revision) -> Self {
        Self { hash: hash64(name.as_bytes()), name: name.into(), last }
    }

    fn rank(&self) -> (u64, &str) {
        (self.hash, &self.name)
    }
}

impl BaseHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = Block::<HEADER_BYTES>::new();
        out.put(0, &MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(16, &self.start.to_bytes());
        out.put(80, &self.first_segment.to_le_bytes());
        out.put(88, &self.durable_offset.to_le_bytes());
        out.put(96, &self.written_at_us.to_le_bytes());
        out.put(104, &self.boundaries.to_le_bytes());
        out.put(112, &self.streams.to_le_bytes());
        out.put(120, &self.name_bytes.to_le_bytes());
        out.0
    }

    /// Reads header page `number`.
    ///
    /// # Errors
    /// [`FormatError`] if it isn't a whole, undamaged page of this version.
    pub fn decode(number: u64, page: &[u8; PAGE_BYTES]) -> Result<Self, FormatError> {
        let mut input = Decoder::new(page);
        if input.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = input.u16()?;
        input.bytes(6)?;
        let start = Checkpoint::from_bytes(&input.array()?);
        let mut header = |start| {
            Ok::<_, FormatError>(Self {
                start,
                first_segment: input.u64()?,
                durable_offset: input.u64()?,
                written_at_us: input.i64()?,
                boundaries: input.u64()?,
                streams: input.u64()?,
                name_bytes: input.u64()?,
            })
        };
        let header = header(start.ok_or(FormatError::Invalid("start of a base"))?)?;
        verified(&header.key(), number, page).ok_or(FormatError::HeaderChecksum)?;
        if version != VERSION {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        let start = &header.start;
        let whole = start.offset > 0
            && start.position > Position::START
            && start.offset.is_multiple_of(BATCH_ALIGNMENT)
            && header.durable_offset >= start.offset
            && header.first_segment > 0
            && (1..=header.first_segment).contains(&header.boundaries)
            && header.streams <= start.position.get();
        if whole { Ok(header) } else { Err(FormatError::Invalid("base")) }
    }

    const fn key(&self) -> Key {
        Key { journal: self.start.journal, offset: self.start.offset }
    }

    /// Pages at which boundaries, streams and names begin; and how many pages there are.
    fn layout(&self) -> Option<[u64; 4]> {
        let pages =
            |count: u64, bytes: u64| Some(count.checked_mul(bytes)?.div_ceil(PAGE_DATA as u64));
        let boundaries = HEADER_PAGES;
        let streams = boundaries.checked_add(pages(self.boundaries, BOUNDARY_BYTES)?)?;
        let names = streams.checked_add(pages(self.streams, STREAM_BYTES)?)?;
        let end = names.checked_add(pages(self.name_bytes, 1)?)?;
        Some([boundaries, streams, names, end])
    }
}

/// What tells the pages of one base from those of all others.
#[derive(Clone, Copy, Debug)]
struct Key {
    journal: JournalId,
    offset: u64,
}

fn page_crc(key: &Key, number: u64, data: &[u8]) -> u32 {
    crc32(&[key.journal.as_bytes(), &key.offset.to_le_bytes(), &number.to_le_bytes(), data])
}

fn verified<'a>(key: &Key, number: u64, page: &'a [u8; PAGE_BYTES]) -> Option<&'a [u8]> {
    let (data, crc) = page.split_last_chunk::<4>()?;
    (page_crc(key, number, data) == u32::from_le_bytes(*crc)).then_some(data)
}

/// Fills one section, page by page.
struct Section<'a, W> {
    key: Key,
    number: u64,
    page: Box<[u8; PAGE_BYTES]>,
    filled: usize,
    out: &'a mut W,
}

impl<'a, W: FnMut(u64, &[u8; PAGE_BYTES]) -> io::Result<()>> Section<'a, W> {
    fn new(key: Key, number: u64, out: &'a mut W) -> Self {
        Self { key, number, page: Box::new([0; PAGE_BYTES]), filled: 0, out }
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.page.get_mut(self.filled..PAGE_DATA).unwrap_or_default();
            let (now, rest) = bytes.split_at(bytes.len().min(room.len()));
            room.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            self.filled += now.len();
            bytes = rest;
            if self.filled == PAGE_DATA {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let (data, crc) = self.page.split_at_mut(PAGE_DATA);
        crc.copy_from_slice(&page_crc(&self.key, self.number, data).to_le_bytes());
        (self.out)(self.number, &self.page)?;
        self.number += 1;
        self.filled = 0;
        self.page.fill(0);
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        if self.filled > 0 { self.flush() } else { Ok(()) }
    }
}

/// Hands all pages of a base to `out`, in no particular order. `heads` are sorted by hash, then name, and
/// each occurs once; they are asked for as many as `header` says.
///
/// # Errors
/// Of `out` and of `heads`; [`io::ErrorKind::InvalidInput`] if boundaries and heads aren't what the header
/// says.
pub fn write(
    header: &BaseHeader,
    boundaries: impl Iterator<Item = io::Result<Boundary>>,
    heads: impl Iterator<Item = io::Result<Head>>,
    out: &mut impl FnMut(u64, &[u8; PAGE_BYTES]) -> io::Result<()>,
) -> io::Result<()> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let (key, layout) = (header.key(), header.layout().ok_or_else(wrong)?);
    for number in 0..HEADER_PAGES {
        let mut page = Section::new(key, number, out);
        page.put(&header.encode())?;
        page.finish()?;
    }
    let mut section = Section::new(key, layout[0], out);
    let mut count = 0;
    for boundary in boundaries {
        let boundary = boundary?;
        section.put(&boundary.segment.to_le_bytes())?;
        section.put(&boundary.offset.to_le_bytes())?;
        section.put(&boundary.position.get().to_le_bytes())?;
        section.put(boundary.chain.as_bytes())?;
        count += 1;
    }
    section.finish()?;
    if count != header.boundaries {
        return Err(wrong());
    }
    write_heads(header, layout, heads, out)
}

fn write_heads(
    header: &BaseHeader,
    [_, streams_at, names_at, _]: [u64; 4],
    heads: impl Iterator<Item = io::Result<Head>>,
    out: &mut impl FnMut(u64, &[u8; PAGE_BYTES]) -> io::Result<()>,
) -> io::Result<()> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let key = header.key();
    let (mut count, mut name_bytes) = (0, 0);
    // Two sections grow at once: the names of one page of streams are kept until that page is written.
    let mut names = Vec::new();
    let mut name_page = names_at;
    let mut streams = Vec::new();
    let mut stream_page = streams_at;
    for head in heads {
        let head = head?;
        streams.extend_from_slice(&head.hash.to_le_bytes());
        streams.extend_from_slice(&head.last.get().to_le_bytes());
        streams.extend_from_slice(&u64::to_le_bytes(name_bytes));
        streams.extend_from_slice(&(head.name.len() as u32).to_le_bytes());
        streams.extend_from_slice(&[0; 4]);
        names.extend_from_slice(head.name.as_bytes());
        count += 1;
        name_bytes += head.name.len() as u64;
        stream_page += put_whole_pages(key, stream_page, &mut streams, out)?;
        name_page += put_whole_pages(key, name_page, &mut names, out)?;
    }
    for (number, rest) in [(stream_page, &streams), (name_page, &names)] {
        let mut last = Section::new(key, number, out);
        last.put(rest)?;
        last.finish()?;
    }
    if count == header.streams && name_bytes == header.name_bytes { Ok(()) } else { Err(wrong()) }
}

/// Writes the whole pages in front of `bytes` and takes them away; how many there were.
fn put_whole_pages(
    key: Key,
    number: u64,
    bytes: &mut Vec<u8>,
    out: &mut impl FnMut(u64, &[u8; PAGE_BYTES]) -> io::Result<()>,
) -> io::Result<u64> {
    let whole = bytes.len() / PAGE_DATA;
    let mut section = Section::new(key, number, out);
    section.put(bytes.get(..whole * PAGE_DATA).unwrap_or_default())?;
    section.finish()?;
    drop(bytes.drain(..whole * PAGE_DATA));
    Ok(whole as u64)
}

/// Where the pages of a base come from. They are verified here.
pub trait Pages: Send + Sync {
    /// Reads page `number` into `page`.
    ///
    /// # Errors
    /// Of the file; [`io::ErrorKind::UnexpectedEof`] if there is no such page.
    fn read_page(&self, number: u64, page: &mut [u8; PAGE_BYTES]) -> io::Result<()>;
    /// How many whole pages there are.
    ///
    /// # Errors
    /// Of the file.
    fn count(&self) -> io::Result<u64>;
}

/// A base, read page by page as it is needed, each page verified.
///
/// Every method answers [`io::ErrorKind::InvalidData`] when a page is damaged.
#[derive(Debug)]
pub struct Base<P> {
    pages: P,
    header: BaseHeader,
    layout: [u64; 4],
    intact: bool,
}

impl<P: Pages> Base<P> {
    /// Opens a base; the inner error tells why it isn't one.
    ///
    /// # Errors
    /// Of the file.
    pub fn open(pages: P) -> io::Result<Result<Self, FormatError>> {
        let count = pages.count()?;
        let mut found = Err(FormatError::Truncated);
        let mut intact = true;
        for number in 0..HEADER_PAGES.min(count) {
            let mut page = [0; PAGE_BYTES];
            pages.read_page(number, &mut page)?;
            let header = BaseHeader::decode(number, &page);
            intact &= header.is_ok();
            found = match (found, header) {
                (Err(FormatError::Truncated), header) => header,
                (Err(_), Ok(header)) => Ok(header),
                (found, _) => found,
            };
        }
        let header = match found {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let Some(layout) = header.layout().filter(|layout| layout[3] == count) else {
            return Ok(Err(FormatError::Truncated));
        };
        Ok(Ok(Self { pages, header, layout, intact }))
    }

    /// The header.
    pub const fn header(&self) -> &BaseHeader {
        &self.header
    }

    /// Whether both copies of the header are valid.
    pub const fn is_intact(&self) -> bool {
        self.intact
    }

    /// How many pages there are.
    pub const fn page_count(&self) -> u64 {
        self.layout[3]
    }

    /// Page `number`, verified; a header page whose copy is damaged is made of the other.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn page(&self, number: u64) -> io::Result<[u8; PAGE_BYTES]> {
        self.page_up_to(number, u64::MAX)
    }

    /// The same for a copy of the journal that ends at `durable_offset`: its base vouches for no more.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn page_up_to(&self, number: u64, durable_offset: u64) -> io::Result<[u8; PAGE_BYTES]> {
        let mut page = [0; PAGE_BYTES];
        if number < HEADER_PAGES {
            let durable_offset = self.header.durable_offset.min(durable_offset);
            let header = BaseHeader { durable_offset, ..self.header };
            let mut take = |_, made: &[u8; PAGE_BYTES]| {
                page = *made;
                Ok(())
            };
            let mut section = Section::new(header.key(), number, &mut take);
            section.put(&header.encode())?;
            section.finish()?;
            return Ok(page);
        }
        self.pages.read_page(number, &mut page)?;
        match verified(&self.header.key(), number, &page) {
            Some(_) => Ok(page),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn read(&self, section: usize, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let damaged = || io::Error::from(io::ErrorKind::InvalidData);
        let first = self.layout.get(section).ok_or_else(damaged)?;
        let end = self.layout.get(section + 1).ok_or_else(damaged)?;
        let mut out = Vec::with_capacity(len);
        let (mut number, mut from) = (first + at / PAGE_DATA as u64, at as usize % PAGE_DATA);
        while out.len() < len {
            if number >= *end {
                return Err(damaged());
            }
            let page = self.page(number)?;
            let to = PAGE_DATA.min(from + len - out.len());
            out.extend_from_slice(page.get(from..to).ok_or_else(damaged)?);
            (number, from) = (number + 1, 0);
        }
        Ok(out)
    }

    /// The removed segments, in order.
    pub fn boundaries(&self) -> impl Iterator<Item = io::Result<Boundary>> {
        (0..self.header.boundaries).map(|index| self.boundary(index))
    }

    fn boundary(&self, index: u64) -> io::Result<Boundary> {
        let bytes = self.read(0, index * BOUNDARY_BYTES, BOUNDARY_BYTES as usize)?;
        let mut input = Decoder::new(&bytes);
        let mut boundary = || {
            Ok::<_, FormatError>(Boundary {
                segment: input.u64()?,
                offset: input.u64()?,
                position: Position::new(input.u64()?),
                chain: Chain::from_bytes(input.array()?),
            })
        };
        boundary().map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Last revision of a stream among the removed events; `None` if it has none there.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn head(&self, name: &str) -> io::Result<Option<Revision>> {
        let hash = hash64(name.as_bytes());
        let mut index = first_not_below(self.header.streams, hash, |at| Ok(self.entry(at)?.hash))?;
        while index < self.header.streams {
            let entry = self.entry(index)?;
            if entry.hash != hash {
                break;
            }
            if entry.name_bytes as usize == name.len() && *self.name(&entry)? == *name {
                return Ok(Some(entry.last));
            }
            index += 1;
        }
        Ok(None)
    }

    /// Up to `max` heads from number `first` on, in order.
    ///
    /// # Errors
    /// Of the file, or damage.
    pub fn heads(&self, first: u64, max: u64) -> io::Result<Vec<Head>> {
        let count = self.header.streams.saturating_sub(first).min(max);
        let at = first.saturating_mul(STREAM_BYTES);
        let entries = self.read(1, at, (count * STREAM_BYTES) as usize)?;
        let rows = entries.chunks_exact(STREAM_BYTES as usize).map(|bytes| {
            let entry = Entry::decode(bytes)?;
            Ok((entry.hash, entry.last, entry.name_at, entry.name_bytes))
        });
        let rows = rows.collect::<io::Result<Vec<_>>>()?;
        named(&rows, |at, len| self.read(2, at, len))
    }

    fn entry(&self, index: u64) -> io::Result<Entry> {
        Entry::decode(&self.read(1, index * STREAM_BYTES, STREAM_BYTES as usize)?)
    }

    fn name(&self, entry: &Entry) -> io::Result<Box<str>> {
        let bytes = self.read(2, entry.name_at, entry.name_bytes as usize)?;
        let name =
            String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
        name.map(String::into_boxed_str)
    }
}

struct Entry {
    hash: u64,
    last: Revision,
    name_at: u64,
    name_bytes: u32,
}

impl Entry {
    fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut input = Decoder::new(bytes);
        let mut entry = || {
            Ok::<_, FormatError>(Self {
                hash: input.u64()?,
                last: Revision::new(input.u64()?),
                name_at: input.u64()?,
                name_bytes: input.u32()?,
            })
        };
        let entry = entry().ok().filter(|entry| entry.name_bytes <= NAME_BYTES_MAX);
        entry.ok_or(io::ErrorKind::InvalidData.into())
    }
}

/// A row of heads, of which some are read at a time.
pub struct HeadRow<F> {
    read: F,
    next: u64,
    ready: std::vec::IntoIter<Head>,
}

impl<F> std::fmt::Debug for HeadRow<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadRow").field("next", &self.next).finish_non_exhaustive()
    }
}

impl<F: FnMut(u64, u64) -> io::Result<Vec<Head>>> HeadRow<F> {
    /// `read` is given the number of the first and how many are wanted.
    pub fn new(read: F) -> Self {
        Self { read, next: 0, ready: Vec::new().into_iter() }
    }
}

impl<F: FnMut(u64, u64) -> io::Result<Vec<Head>>> Iterator for HeadRow<F> {
    type Item = io::Result<Head>;

    fn next(&mut self) -> Option<Self::Item> {
        /// The entries of about a page.
        const AT_A_TIME: u64 = 100;
        if let Some(head) = self.ready.next() {
            return Some(Ok(head));
        }
        match (self.read)(self.next, AT_A_TIME) {
            Ok(heads) => {
                self.next += heads.len() as u64;
                self.ready = heads.into_iter();
                self.ready.next().map(Ok)
            }
            Err(error) => Some(Err(error)),
        }
    }
}

/// Several rows of heads, each sorted, as one. Of heads of the same stream that of the last row counts.
pub struct Merged<I: Iterator<Item = io::Result<Head>>> {
    rows: Vec<I>,
    next: BinaryHeap<Candidate>,
    failure: Option<io::Error>,
}

struct Candidate {
    head: Head,
    row: usize,
}

impl Ord for Candidate {
    /// The greatest is the first to be taken: the lowest rank, and of equal ones the last row.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.head.rank().cmp(&self.head.rank()).then(self.row.cmp(&other.row))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

impl<I: Iterator<Item = io::Result<Head>>> std::fmt::Debug for Merged<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merged").field("rows", &self.rows.len()).finish_non_exhaustive()
    }
}

impl<I: Iterator<Item = io::Result<Head>>> Merged<I> {
    /// Merges `rows`; the oldest first.
    pub fn new(rows: Vec<I>) -> Self {
        let mut merged = Self { next: BinaryHeap::with_capacity(rows.len()), rows, failure: None };
        (0..merged.rows.len()).for_each(|row| merged.advance(row));
        merged
    }

    fn advance(&mut self, row: usize) {
        match self.rows.get_mut(row).and_then(Iterator::next) {
            Some(Ok(head)) => self.next.push(Candidate { head, row }),
            Some(Err(error)) => self.failure = Some(error),
            None => {}
        }
    }
}

impl<I: Iterator<Item = io::Result<Head>>> Iterator for Merged<I> {
    type Item = io::Result<Head>;

    fn next(&mut self) -> Option<Self::Item> {
        let Candidate { head, row } = match self.failure.take() {
            Some(error) => return Some(Err(error)),
            None => self.next.pop()?,
        };
        self.advance(row);
        while let Some(older) = self.next.peek().filter(|next| next.head.rank() == head.rank()) {
            let row = older.row;
            self.next.pop();
            self.advance(row);
        }
        Some(Ok(head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Incarnation;

    impl Pages for Vec<u8> {
        fn read_page(&self, number: u64, page: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
            let all = self.as_chunks::<PAGE_BYTES>().0;
            *page = *all.get(number as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(())
        }

        fn count(&self) -> io::Result<u64> {
            Ok((self.len() / PAGE_BYTES) as u64)
        }
    }

    fn header(heads: &[Head], boundaries: u64) -> BaseHeader {
        BaseHeader {
            start: Checkpoint {
                journal: JournalId::from_bytes([7; 16]),
                epoch: 3,
                incarnation: Incarnation::new(4),
                offset: 64 << 20,
                position: Position::new(1 << 20),
                chain: Chain::from_bytes([5; 16]),
            },
            first_segment: boundaries,
            durable_offset: 65 << 20,
            written_at_us: -5,
            boundaries,
            streams: heads.len() as u64,
            name_bytes: heads.iter().map(|head| head.name.len() as u64).sum(),
        }
    }

    fn file(heads: &[Head], boundaries: u64) -> (BaseHeader, Vec<Boundary>, Vec<u8>) {
        let header = header(heads, boundaries);
        let boundaries: Vec<_> = (0..boundaries)
            .map(|segment| Boundary {
                segment,
                offset: segment << 16,
                position: Position::new(segment * 10),
                chain: Chain::from_bytes([segment as u8; 16]),
            })
            .collect();
        let mut bytes = Vec::new();
        let mut put = |number: u64, page: &[u8; PAGE_BYTES]| {
            let at = number as usize * PAGE_BYTES;
            bytes.resize(bytes.len().max(at + PAGE_BYTES), 0);
            bytes[at..at + PAGE_BYTES].copy_from_slice(page);
            Ok(())
        };
        let known = boundaries.iter().map(|boundary| Ok(*boundary));
        write(&header, known, heads.iter().cloned().map(Ok), &mut put).unwrap();
        (header, boundaries, bytes)
    }

    fn heads(count: u64) -> Vec<Head> {
        let head =
            |n| Head::new(&format!("s-{n}{}", "x".repeat(n as usize % 40)), Revision::new(n));
        let mut heads: Vec<_> = (0..count).map(head).collect();
        heads.sort_by(|a, b| a.rank().cmp(&b.rank()));
        heads
    }

    #[test]
    fn every_head_and_boundary_is_found_again() {
        for (streams, segments) in [(0, 1), (1, 1), (130, 103), (5000, 2000)] {
            let heads = heads(streams);
            let (header, boundaries, bytes) = file(&heads, segments);
            let base = Base::open(bytes).unwrap().unwrap();
            assert_eq!(*base.header(), header);
            assert!(base.is_intact());
            let found: Vec<_> = base.boundaries().map(Result::unwrap).collect();
            assert_eq!(found, boundaries);
            let row = HeadRow::new(|first, max| base.heads(first, max));
            assert_eq!(row.map(Result::unwrap).collect::<Vec<_>>(), heads);
            for head in &heads {
                assert_eq!(base.head(&head.name).unwrap(), Some(head.last));
            }
            assert_eq!(base.head("absent").unwrap(), None);
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_or_mended_by_the_other_header_never_another_answer() {
        let heads = heads(300);
        let (header, _, bytes) = file(&heads, 5);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..3000 {
            let mut damaged = bytes.clone();
            let bit = rng.usize(..bytes.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            let base = Base::open(damaged).unwrap().unwrap();
            assert_eq!(*base.header(), header);
            let page = bit as u64 / 8 / PAGE_BYTES as u64;
            assert_eq!(base.is_intact(), page >= HEADER_PAGES);
            let check = base.page(page);
            match page < HEADER_PAGES {
                true => assert_eq!(
                    check.unwrap()[..],
                    bytes[page as usize * PAGE_BYTES..][..PAGE_BYTES]
                ),
                false => assert_eq!(check.unwrap_err().kind(), io::ErrorKind::InvalidData),
            }
            let head = rng.choice(&heads).unwrap();
            match base.head(&head.name) {
                Ok(found) => assert_eq!(found, Some(head.last)),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
            }
        }
        for len in 0..bytes.len() / PAGE_BYTES {
            let cut = bytes[..len * PAGE_BYTES].to_vec();
            assert_eq!(Base::open(cut).unwrap().err(), Some(FormatError::Truncated), "{len} pages");
        }
    }

    #[test]
    fn a_page_of_another_base_is_not_taken() {
        let heads = heads(300);
        let (_, _, mut bytes) = file(&heads, 5);
        let (mut other, boundaries, _) = file(&heads, 5);
        other.start.offset += 64;
        let mut put = |number: u64, page: &[u8; PAGE_BYTES]| {
            if number == 3 {
                bytes[3 * PAGE_BYTES..4 * PAGE_BYTES].copy_from_slice(page);
            }
            Ok(())
        };
        let known = boundaries.iter().map(|boundary| Ok(*boundary));
        write(&other, known, heads.iter().cloned().map(Ok), &mut put).unwrap();
        let base = Base::open(bytes).unwrap().unwrap();
        assert_eq!(base.page(3).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn merging_keeps_the_newest_head_of_each_stream() {
        let mut rng = fastrand::Rng::with_seed(2);
        for _ in 0..50 {
            let mut newest = std::collections::BTreeMap::new();
            let rows: Vec<Vec<_>> = (0..rng.u64(1..6))
                .map(|row| {
                    let mut heads = heads(40);
                    heads.retain(|_| rng.bool());
                    heads.iter_mut().for_each(|head| head.last = Revision::new(row));
                    heads.iter().for_each(|head| {
                        newest.insert((head.hash, head.name.clone()), head.last);
                    });
                    heads.into_iter().map(Ok).collect()
                })
                .collect();
            let merged = Merged::new(rows.into_iter().map(Vec::into_iter).collect());
            let merged: Vec<_> = merged.map(Result::unwrap).collect();
            let expected: Vec<_> =
                newest.into_iter().map(|((hash, name), last)| Head { hash, name, last }).collect();
            assert_eq!(merged, expected);
        }
    }
}
