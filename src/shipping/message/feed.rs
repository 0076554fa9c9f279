//! What filtered feeds add to the protocol: what is asked for and granted, SKIP, and the runs that EVENTS carries.
//!
//! ```text
//!   positions   from ░░░░ e ░ e e ░░░░░░ to          ░ skipped
//!   run         └ checkpoint at `to` ┬ 4 e ┬ 1 e ┬ 0 e ┬ 6 ┘
//!                                    └ how many are skipped in front of it
//! ```
//! Invariants:
//! - A run accounts for every position between its ends, once: as an event's or as a skipped one.
//! - A run has a checksum over everything in it; events have none of their own.

use super::{FRAME_HEADER_BYTES, Message, OriginEnd, put_u16, put_u32, put_u64, zeros};
use crate::format::record::RecordRef;
use crate::format::{Decoder, FormatError, crc32};
use crate::position::{Checkpoint, Position};
use crate::shipping::filter::FeedFilter;

/// No run is longer than this: the events of the largest batch fit into it as they are stored.
pub const RUN_BYTES_MAX: u32 = 24 * 1024 * 1024;
/// In front of a run's events.
pub const RUN_FIXED_BYTES: usize = 80;
/// In front of each event of a run.
pub const ENTRY_FIXED_BYTES: usize = 16;
/// The longest name of a shape.
pub const SHAPE_NAME_BYTES_MAX: usize = 64;

const SAME_POSITION: u32 = 1;

/// Name and version of the shape in which a service publishes its events.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ShapeId {
    /// Its name: 1 to 64 bytes, no control characters.
    pub name: String,
    /// Its version.
    pub version: u32,
}

impl std::fmt::Display for ShapeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} version {}", self.name, self.version)
    }
}

/// What a filtered feed holds: which events, and in which shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct FeedTerms {
    /// Which events.
    pub filter: FeedFilter,
    /// The shape in which the service publishes them; `None`: as they are stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<ShapeId>,
}

/// Asks for a filtered feed, in a SUBSCRIBE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedRequest {
    /// What is wanted, or had before. The shape counts only if it was had.
    pub terms: FeedTerms,
    /// The feed goes on: exactly these terms were granted before.
    pub goes_on: bool,
}

/// All events from a position to a batch end are none of the feed's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skip {
    /// The first position that is skipped.
    pub from: Position,
    /// The end of the last batch that is.
    pub behind: Checkpoint,
    /// The origin's durable end when the frame was sent.
    pub origin_end: OriginEnd,
}

/// A part of a run, or all of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Events<'a> {
    /// The first position that the run accounts for.
    pub from: Position,
    /// The origin's durable end when the frame was sent.
    pub origin_end: OriginEnd,
    /// Where these bytes belong in the run.
    pub at: u32,
    /// The run goes on in the next EVENTS frame.
    pub continued: bool,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl FeedTerms {
    /// The lengths and the version, and then what they are about.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let filter = self.filter.to_bytes();
        let (name, version) = self.shape.as_ref().map_or(("", 0), |it| (&it.name, it.version));
        put_u16(out, u16::try_from(filter.len()).unwrap_or(u16::MAX));
        put_u16(out, u16::try_from(name.len()).unwrap_or(u16::MAX));
        put_u32(out, version);
        out.extend_from_slice(&filter);
        out.extend_from_slice(name.as_bytes());
    }

    pub(super) fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let (filter_len, name_len) = (usize::from(input.u16()?), usize::from(input.u16()?));
        let version = input.u32()?;
        let filter = FeedFilter::from_bytes(input.bytes(filter_len)?)?;
        let name = input.text(name_len, "name of the shape")?;
        let shape = match name {
            "" if version == 0 => None,
            "" => return Err(FormatError::Invalid("shape without a name")),
            name => Some(ShapeId { name: name.to_owned(), version }),
        };
        if shape.as_ref().is_some_and(|shape| !shape.is_valid()) {
            return Err(FormatError::Invalid("name of the shape"));
        }
        Ok(Self { filter, shape })
    }
}

impl ShapeId {
    /// Whether it can be sent.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let len = self.name.len();
        (1..=SHAPE_NAME_BYTES_MAX).contains(&len) && !self.name.chars().any(char::is_control)
    }
}

impl Skip {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_u64(out, self.from.get());
        out.extend_from_slice(&self.behind.to_bytes());
        put_u64(out, self.origin_end.offset);
        put_u64(out, self.origin_end.position.get());
    }

    pub(super) fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let from = Position::new(input.u64()?);
        let behind = super::checkpoint(&input.array()?)?;
        let origin_end = OriginEnd { offset: input.u64()?, position: Position::new(input.u64()?) };
        if behind.position <= from {
            return Err(FormatError::Invalid("nothing is skipped"));
        }
        check_end(&behind, origin_end)?;
        Ok(Self { from, behind, origin_end })
    }
}

/// Nothing is sent that isn't durable.
pub(crate) fn check_end(behind: &Checkpoint, origin: OriginEnd) -> Result<(), FormatError> {
    if behind.position > origin.position || behind.offset > origin.offset {
        return Err(FormatError::Invalid("durable end in front of what was sent"));
    }
    Ok(())
}

impl<'a> Events<'a> {
    pub(super) fn encode_fixed(&self, out: &mut Vec<u8>) {
        put_u64(out, self.from.get());
        put_u64(out, self.origin_end.offset);
        put_u64(out, self.origin_end.position.get());
        put_u32(out, self.at);
        put_u32(out, 0);
    }

    pub(super) fn decode(continued: bool, input: &mut Decoder<'a>) -> Result<Self, FormatError> {
        let from = Position::new(input.u64()?);
        let origin_end = OriginEnd { offset: input.u64()?, position: Position::new(input.u64()?) };
        let at = input.u32()?;
        zeros(input, 4)?;
        let bytes = input.bytes(input.rest().len())?;
        let end = u64::from(at) + bytes.len() as u64;
        if bytes.is_empty() {
            return Err(FormatError::Truncated);
        }
        if end > u64::from(RUN_BYTES_MAX) {
            return Err(FormatError::Invalid("length of a run"));
        }
        Ok(Self { from, origin_end, at, continued, bytes })
    }
}

/// The bytes of a run that is being written.
#[derive(Debug)]
pub(crate) struct RunWriter {
    bytes: Vec<u8>,
    count: u32,
    /// The next position that isn't accounted for.
    next: Position,
}

impl RunWriter {
    pub(crate) fn new(from: Position) -> Self {
        Self { bytes: vec![0; RUN_FIXED_BYTES], count: 0, next: from }
    }

    pub(crate) const fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Where it is now.
    pub(crate) const fn mark(&self) -> RunMark {
        RunMark { len: self.bytes.len(), count: self.count, next: self.next }
    }

    /// Forgets what was added since.
    pub(crate) fn back_to(&mut self, mark: RunMark) {
        self.bytes.truncate(mark.len);
        (self.count, self.next) = (mark.count, mark.next);
    }

    /// Adds the record of an event, at the place of the one in front or behind it.
    pub(crate) fn add(&mut self, position: Position, time_us: i64, record: &[u8]) {
        let same = self.count > 0 && position < self.next;
        let skipped = if same { 0 } else { position.since(self.next) };
        put_u32(&mut self.bytes, u32::try_from(skipped).unwrap_or(u32::MAX));
        put_u32(&mut self.bytes, if same { SAME_POSITION } else { 0 });
        self.bytes.extend_from_slice(&time_us.to_le_bytes());
        self.bytes.extend_from_slice(record);
        self.count += 1;
        self.next = position.advance(1);
    }

    /// The run is complete up to here.
    pub(crate) fn finish(self, behind: &Checkpoint) -> Vec<u8> {
        let Self { mut bytes, count, next } = self;
        let rest = u32::try_from(behind.position.since(next)).unwrap_or(u32::MAX);
        let mut fixed = Vec::with_capacity(RUN_FIXED_BYTES - 4);
        put_u32(&mut fixed, count);
        put_u32(&mut fixed, rest);
        put_u32(&mut fixed, 0);
        fixed.extend_from_slice(&behind.to_bytes());
        bytes.iter_mut().skip(4).zip(fixed).for_each(|(to, from)| *to = from);
        let crc = crc32(&[bytes.get(4..).unwrap_or_default()]);
        bytes.iter_mut().zip(crc.to_le_bytes()).for_each(|(to, from)| *to = from);
        bytes
    }
}

/// A place within a run that is being written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunMark {
    len: usize,
    count: u32,
    next: Position,
}

impl RunMark {
    /// Whether it has no event in front of it.
    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// A run whose checksum was verified, and which accounts for every position from `from` to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first position that it accounts for.
    pub from: Position,
    /// The end of its last batch.
    pub behind: Checkpoint,
    bytes: Vec<u8>,
}

/// An event of a run.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The position of the stored event that it comes from.
    pub position: Position,
    /// When that was recorded.
    pub time_us: i64,
    /// The event. Its revision means nothing where it was published in another shape.
    pub record: RecordRef<'a>,
}

impl Run {
    /// Verifies a run: its checksum, that its events parse, and that nothing is left out or counted twice.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(from: Position, bytes: Vec<u8>) -> Result<Self, FormatError> {
        let mut input = Decoder::new(&bytes);
        let crc = input.u32()?;
        if crc32(&[input.rest()]) != crc {
            return Err(FormatError::BodyChecksum);
        }
        let (count, rest) = (input.u32()?, input.u32()?);
        zeros(&mut input, 4)?;
        let behind = super::checkpoint(&input.array()?)?;
        let run = Self { from, behind, bytes };
        let (mut next, mut seen) = (from.get(), 0_u32);
        let mut entries = run.entries();
        for entry in entries.by_ref() {
            next = entry?.position.get().checked_add(1).ok_or(FormatError::Invalid("position"))?;
            seen += 1;
        }
        if count == 0 || seen != count || !entries.rest.is_empty() {
            return Err(FormatError::Invalid("number of events"));
        }
        if next.checked_add(u64::from(rest)) != Some(behind.position.get()) {
            return Err(FormatError::Invalid("positions that are not accounted for"));
        }
        Ok(run)
    }

    /// Its events, in order.
    #[must_use]
    pub fn entries(&self) -> Entries<'_> {
        let mut fixed = Decoder::new(self.bytes.get(4..).unwrap_or_default());
        Entries {
            rest: self.bytes.get(RUN_FIXED_BYTES..).unwrap_or_default(),
            left: fixed.u32().unwrap_or(0),
            next: self.from,
            is_first: true,
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// The events of a [`Run`]; see [`Run::entries`].
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
    left: u32,
    next: Position,
    is_first: bool,
}

impl<'a> Entries<'a> {
    fn read(&mut self) -> Result<Entry<'a>, FormatError> {
        let mut input = Decoder::new(self.rest);
        let (skipped, flags, time_us) = (input.u32()?, input.u32()?, input.i64()?);
        let same = flags == SAME_POSITION;
        if flags & !SAME_POSITION != 0 || same && (self.is_first || skipped != 0) {
            return Err(FormatError::Invalid("flags of an event"));
        }
        let position = match same {
            true => self.next.get().checked_sub(1),
            false => self.next.get().checked_add(u64::from(skipped)),
        };
        let position = Position::new(position.ok_or(FormatError::Invalid("position"))?);
        let (record, rest) = RecordRef::decode(input.rest())?;
        self.rest = rest;
        self.next = position.advance(1);
        self.is_first = false;
        Ok(Entry { position, time_us, record })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let entry = self.read();
        if entry.is_err() {
            self.left = 0;
        }
        Some(entry)
    }
}

/// As many bytes of a run from `at` on as a frame takes, in one; how many these are.
pub(crate) fn put_part(
    out: &mut Vec<u8>,
    from: Position,
    run: &[u8],
    at: usize,
    max_frame: u32,
    origin_end: OriginEnd,
) -> usize {
    let rest = run.get(at..).unwrap_or_default();
    let room = (max_frame.saturating_sub(super::DATA_FIXED_BYTES)).max(1) as usize;
    let bytes = rest.get(..room).unwrap_or(rest);
    let continued = bytes.len() < rest.len();
    out.reserve(FRAME_HEADER_BYTES + super::DATA_FIXED_BYTES as usize + bytes.len());
    let at = u32::try_from(at).unwrap_or(u32::MAX);
    Message::Events(Events { from, origin_end, at, continued, bytes }).encode(out);
    bytes.len()
}
