//! One event inside a batch's body.
//!
//! A record has no checksum of its own (the body's covers it) and can be skipped without being decoded.

use super::{Decoder, FormatError};
use crate::event::{EventId, EventType, InvalidEvent, NewEvent, PayloadCodec, Revision, StreamId};
use crate::position::{JournalId, Locator, Position};

/// The fixed part in front of a record.
pub const RECORD_FIXED_BYTES: usize = 56;
/// The shortest record: the fixed part, one byte of stream name, one of type name.
pub const RECORD_BYTES_MIN: usize = RECORD_FIXED_BYTES + 2;
/// Where the revision lies in a record: it is known last.
const REVISION_AT: usize = 32;

const HAS_OCCURRED_AT: u8 = 1;
const HAS_CORRELATION: u8 = 2;
const HAS_CAUSATION: u8 = 4;
const HAS_SUBJECT: u8 = 8;
const KNOWN_FIELDS: u8 = HAS_OCCURRED_AT | HAS_CORRELATION | HAS_CAUSATION | HAS_SUBJECT;

/// A record, borrowed from a batch.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    /// Identifies the event for ever; the key of idempotent appends.
    pub id: EventId,
    /// How the payload is encoded.
    pub codec: PayloadCodec,
    /// Version of the payload's schema.
    pub schema_version: u32,
    /// Place in the stream.
    pub revision: Revision,
    /// The stream's name.
    pub stream: &'a str,
    /// The type's name.
    pub event_type: &'a str,
    /// When it happened, if the writer said so, in microseconds since 1970.
    pub occurred_at_us: Option<i64>,
    /// Groups what belongs to one business transaction.
    pub correlation: Option<EventId>,
    /// The event that caused this one.
    pub causation: Option<Locator>,
    /// Whom the payload is about; reserved for erasure by key.
    pub subject: Option<&'a str>,
    /// The event itself.
    pub payload: &'a [u8],
    tags: Texts<'a>,
    metadata: Texts<'a>,
}

/// The verified names of a record, and the bytes that they are: both, one behind the other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Names<'a> {
    bytes: &'a [u8],
    stream: &'a str,
    event_type: &'a str,
}

impl<'a> Names<'a> {
    /// What `bytes` holds if a stream's name of `stream_len` is in front.
    #[inline]
    fn or_verified(self, bytes: &'a [u8], stream_len: usize) -> Result<Self, FormatError> {
        if stream_len == self.stream.len() && bytes == self.bytes && !bytes.is_empty() {
            return Ok(self);
        }
        Self::verified(bytes, stream_len)
    }

    fn verified(bytes: &'a [u8], stream_len: usize) -> Result<Self, FormatError> {
        let (stream, event_type) =
            bytes.split_at_checked(stream_len).ok_or(FormatError::Truncated)?;
        let stream = verified(stream, "stream name", StreamId::check)?;
        let event_type = verified(event_type, "event type", EventType::check)?;
        Ok(Self { bytes, stream, event_type })
    }
}

fn verified<'a>(
    name: &'a [u8],
    what: &'static str,
    check: fn(&str) -> Result<(), InvalidEvent>,
) -> Result<&'a str, FormatError> {
    let name = std::str::from_utf8(name).map_err(|_| FormatError::Invalid(what))?;
    check(name).map_err(|_| FormatError::Invalid(what))?;
    Ok(name)
}

/// Texts with their lengths in front, already verified.
#[derive(Clone, Copy, Debug)]
struct Texts<'a> {
    bytes: &'a [u8],
}

impl<'a> Iterator for Texts<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let mut input = Decoder::new(self.bytes);
        let text = input.text16("text").ok()?;
        self.bytes = input.rest();
        Some(text)
    }
}

impl<'a> RecordRef<'a> {
    /// Reads the record at the front of `bytes`; returns it with what follows.
    ///
    /// # Errors
    /// [`FormatError`] if a field is out of bounds or impossible.
    pub fn decode(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), FormatError> {
        Self::decode_behind(bytes, Names::default()).map(|(record, _, rest)| (record, rest))
    }

    /// The same, behind a record with these names: records that follow each other often have the same, which
    /// then need not be verified again.
    ///
    /// Inlined always, with everything that it calls, so that a reader who looks at one field pays for no other: left to the
    /// compiler, it isn't any more as the crate grows, and replay with a look at each record takes a third longer.
    #[inline(always)]
    pub(super) fn decode_behind(
        bytes: &'a [u8],
        known: Names<'a>,
    ) -> Result<(Self, Names<'a>, &'a [u8]), FormatError> {
        let (&len, _) = bytes.split_first_chunk::<4>().ok_or(FormatError::Truncated)?;
        let (record, rest) = bytes
            .split_at_checked(u32::from_le_bytes(len) as usize)
            .ok_or(FormatError::Truncated)?;
        // At once, and not field by field: this is what reading a journal consists of.
        let (fixed, _) =
            record.split_first_chunk::<RECORD_FIXED_BYTES>().ok_or(FormatError::Truncated)?;
        let (header, payload) = record
            .split_at_checked(usize::from(u16_at(fixed, 4)))
            .ok_or(FormatError::Invalid("record header length"))?;
        let flags = u16_at(fixed, 6);
        if flags != 0 {
            return Err(FormatError::Unsupported { version: super::FORMAT_VERSION, flags });
        }
        let codec = PayloadCodec::from_byte(fixed[10]);
        let fields = fixed[11];
        if fields & !KNOWN_FIELDS != 0 {
            return Err(FormatError::Invalid("record field bits"));
        }
        let schema_version = u32::from_le_bytes(array_at(fixed, 12));
        let id = EventId::from_bytes(array_at(fixed, 16));
        let revision = Revision::new(u64::from_le_bytes(array_at(fixed, REVISION_AT)));
        let (stream_len, type_len) = (u16_at(fixed, 40), u16_at(fixed, 42));
        let (tag_count, metadata_count) = (u16_at(fixed, 44), u16_at(fixed, 46));
        let mut input =
            Decoder::new(header.get(RECORD_FIXED_BYTES..).ok_or(FormatError::Truncated)?);
        let names = input.bytes(usize::from(stream_len) + usize::from(type_len))?;
        let names = known.or_verified(names, usize::from(stream_len))?;
        let Names { stream, event_type, .. } = names;
        let tags = texts(&mut input, usize::from(tag_count), "tag")?;
        let record = Self {
            id,
            codec,
            schema_version,
            revision,
            stream,
            event_type,
            occurred_at_us: has(fields, HAS_OCCURRED_AT).then(|| input.i64()).transpose()?,
            correlation: has(fields, HAS_CORRELATION)
                .then(|| input.array().map(EventId::from_bytes))
                .transpose()?,
            causation: has(fields, HAS_CAUSATION).then(|| locator(&mut input)).transpose()?,
            subject: has(fields, HAS_SUBJECT).then(|| input.text16("subject")).transpose()?,
            payload,
            tags,
            metadata: texts(&mut input, 2 * usize::from(metadata_count), "metadata")?,
        };
        Ok((record, names, rest))
    }

    /// Whether there is more than payload, names and numbers.
    pub(crate) fn has_extras(&self) -> bool {
        self.occurred_at_us.is_some()
            || self.correlation.is_some()
            || self.causation.is_some()
            || self.subject.is_some()
            || !self.tags.bytes.is_empty()
            || !self.metadata.bytes.is_empty()
    }

    /// The tags, in the order in which they were given.
    pub fn tags(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.tags
    }

    /// The free metadata: keys and values.
    pub fn metadata(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let mut texts = self.metadata;
        std::iter::from_fn(move || Some((texts.next()?, texts.next()?)))
    }
}

/// The places are constants, within the fixed part.
#[inline]
fn array_at<const N: usize>(fixed: &[u8; RECORD_FIXED_BYTES], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&fixed[at..at + N]);
    array
}

#[inline]
fn u16_at(fixed: &[u8; RECORD_FIXED_BYTES], at: usize) -> u16 {
    u16::from_le_bytes(array_at(fixed, at))
}

#[inline]
const fn has(fields: u8, bit: u8) -> bool {
    fields & bit != 0
}

fn locator(input: &mut Decoder<'_>) -> Result<Locator, FormatError> {
    Ok(Locator {
        journal: JournalId::from_bytes(input.array()?),
        position: Position::new(input.u64()?),
    })
}

#[inline]
fn texts<'a>(
    input: &mut Decoder<'a>,
    count: usize,
    what: &'static str,
) -> Result<Texts<'a>, FormatError> {
    if count == 0 {
        return Ok(Texts { bytes: &[] }); // most often
    }
    let all = input.rest();
    for _ in 0..count {
        input.text16(what)?;
    }
    let len = all.len() - input.rest().len();
    Ok(Texts { bytes: all.get(..len).unwrap_or_default() })
}

/// How long the record of `event` is.
#[must_use]
pub(crate) fn encoded_len<P: AsRef<[u8]>>(event: &NewEvent<P>, stream: &StreamId) -> usize {
    let text16 = |text: &String| 2 + text.len();
    let option = |present: bool, len: usize| if present { len } else { 0 };
    RECORD_FIXED_BYTES
        + stream.as_str().len()
        + event.event_type.as_str().len()
        + event.tags.iter().map(text16).sum::<usize>()
        + option(event.occurred_at_us.is_some(), 8)
        + option(event.correlation.is_some(), 16)
        + option(event.causation.is_some(), 24)
        + event.subject.as_ref().map_or(0, text16)
        + event.metadata.iter().map(|(key, value)| text16(key) + text16(value)).sum::<usize>()
        + event.payload.as_ref().len()
}

/// Appends the record of `event` to `out`. The event has passed [`NewEvent::check`].
pub fn encode<P: AsRef<[u8]>>(
    out: &mut Vec<u8>,
    event: &NewEvent<P>,
    stream: &StreamId,
    revision: Revision,
) {
    let start = out.len();
    out.reserve(encoded_len(event, stream));
    let mut fields = 0;
    fields |= if event.occurred_at_us.is_some() { HAS_OCCURRED_AT } else { 0 };
    fields |= if event.correlation.is_some() { HAS_CORRELATION } else { 0 };
    fields |= if event.causation.is_some() { HAS_CAUSATION } else { 0 };
    fields |= if event.subject.is_some() { HAS_SUBJECT } else { 0 };
    let mut fixed = [0; RECORD_FIXED_BYTES]; // lengths below; no flags
    fixed[10..12].copy_from_slice(&[event.codec.to_byte(), fields]);
    fixed[12..16].copy_from_slice(&event.schema_version.to_le_bytes());
    fixed[16..32].copy_from_slice(event.id.as_bytes());
    fixed[REVISION_AT..40].copy_from_slice(&revision.get().to_le_bytes());
    fixed[40..42].copy_from_slice(&len16(stream.as_str().len()));
    fixed[42..44].copy_from_slice(&len16(event.event_type.as_str().len()));
    fixed[44..46].copy_from_slice(&len16(event.tags.len()));
    fixed[46..48].copy_from_slice(&len16(event.metadata.len()));
    out.extend_from_slice(&fixed);
    out.extend_from_slice(stream.as_str().as_bytes());
    out.extend_from_slice(event.event_type.as_str().as_bytes());
    event.tags.iter().for_each(|tag| put_text16(out, tag));
    if let Some(time) = event.occurred_at_us {
        out.extend_from_slice(&time.to_le_bytes());
    }
    if let Some(correlation) = event.correlation {
        out.extend_from_slice(correlation.as_bytes());
    }
    if let Some(causation) = event.causation {
        out.extend_from_slice(causation.journal.as_bytes());
        out.extend_from_slice(&causation.position.get().to_le_bytes());
    }
    if let Some(subject) = &event.subject {
        put_text16(out, subject);
    }
    for (key, value) in &event.metadata {
        put_text16(out, key);
        put_text16(out, value);
    }
    let header_len = out.len() - start;
    out.extend_from_slice(event.payload.as_ref());
    let len = out.len() - start;
    debug_assert_eq!(len, encoded_len(event, stream));
    // Both fit: `NewEvent::check` bounds the header, the batch limit bounds the record.
    out[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes());
    out[start + 4..start + 6].copy_from_slice(&(header_len as u16).to_le_bytes());
}

/// Writes the revision into the record that begins at `record_at`: it is known only when its turn comes.
pub(crate) fn set_revision(body: &mut [u8], record_at: usize, revision: Revision) {
    let at = record_at + REVISION_AT;
    body[at..at + 8].copy_from_slice(&revision.get().to_le_bytes());
}

const fn len16(len: usize) -> [u8; 2] {
    (len as u16).to_le_bytes()
}

fn put_text16(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&len16(text.len()));
    out.extend_from_slice(text.as_bytes());
}
