//! One event inside a batch's body.
//!
//! A record has no checksum of its own (the body's covers it) and can be skipped without being decoded.

use super::{Decoder, FormatError};
use crate::event::{EventId, EventType, NewEvent, PayloadCodec, Revision, StreamId};
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
        let mut fixed = Decoder::new(bytes);
        let len = fixed.u32()? as usize;
        let header_len = usize::from(fixed.u16()?);
        let (record, rest) = bytes.split_at_checked(len).ok_or(FormatError::Truncated)?;
        let (header, payload) = record
            .split_at_checked(header_len)
            .ok_or(FormatError::Invalid("record header length"))?;
        let mut input = Decoder::new(header);
        input.bytes(6)?;
        let flags = input.u16()?;
        if flags != 0 {
            return Err(FormatError::Unsupported { version: super::FORMAT_VERSION, flags });
        }
        input.u16()?; // ignorable flags
        let codec = PayloadCodec::from_byte(input.u8()?);
        let fields = input.u8()?;
        if fields & !KNOWN_FIELDS != 0 {
            return Err(FormatError::Invalid("record field bits"));
        }
        let schema_version = input.u32()?;
        let id = EventId::from_bytes(input.array()?);
        let revision = Revision::new(input.u64()?);
        let (stream_len, type_len) = (input.u16()?, input.u16()?);
        let (tag_count, metadata_count) = (input.u16()?, input.u16()?);
        input.u64()?; // extension room
        let stream = input.text(usize::from(stream_len), "stream name")?;
        let event_type = input.text(usize::from(type_len), "event type")?;
        StreamId::check(stream).map_err(|_| FormatError::Invalid("stream name"))?;
        EventType::check(event_type).map_err(|_| FormatError::Invalid("event type"))?;
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
        Ok((record, rest))
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

const fn has(fields: u8, bit: u8) -> bool {
    fields & bit != 0
}

fn locator(input: &mut Decoder<'_>) -> Result<Locator, FormatError> {
    Ok(Locator {
        journal: JournalId::from_bytes(input.array()?),
        position: Position::new(input.u64()?),
    })
}

fn texts<'a>(
    input: &mut Decoder<'a>,
    count: usize,
    what: &'static str,
) -> Result<Texts<'a>, FormatError> {
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
