//! Events, the streams they belong to, and the typed events of an application.

use std::cell::Cell;
use std::fmt;
use std::hash::BuildHasher;

use smol_str::SmolStr;
use uuid::Uuid;

use crate::codec::CodecError;
use crate::env::roughly_now_ms;
use crate::format::record::RecordRef;
use crate::position::{JournalId, Locator, Position, uuid_id};
use crate::upcast::{self, Decoded, Step};

/// Longest stream name in bytes.
pub const STREAM_NAME_BYTES_MAX: usize = 255;
/// Longest event type name in bytes.
pub const EVENT_TYPE_BYTES_MAX: usize = 255;
/// Longest tag in bytes.
pub const TAG_BYTES_MAX: usize = 255;
/// Most tags of one event.
pub const TAGS_MAX: usize = 64;
/// Longest subject in bytes.
pub const SUBJECT_BYTES_MAX: usize = 255;
/// Most pairs of free metadata of one event.
pub const METADATA_PAIRS_MAX: usize = 64;
/// All metadata keys and values of one event together, in bytes.
pub const METADATA_BYTES_MAX: usize = 16 * 1024;

// Everything in front of the payload must fit a 16-bit length.
const _: () = assert!(
    56 + STREAM_NAME_BYTES_MAX
        + EVENT_TYPE_BYTES_MAX
        + TAGS_MAX * (TAG_BYTES_MAX + 2)
        + 8
        + 16
        + 24
        + SUBJECT_BYTES_MAX
        + 2
        + METADATA_BYTES_MAX
        + 4 * METADATA_PAIRS_MAX
        <= u16::MAX as usize
);

uuid_id! {
    /// Identifies an event for ever. Appending an event again under the same id appends it once.
    EventId
}

impl EventId {
    /// A new id that sorts by time of creation (UUID version 7).
    #[must_use]
    #[allow(
        clippy::new_without_default,
        reason = "every call gives another id; a default would mislead"
    )]
    pub fn new() -> Self {
        LAST_ID.with(|last| {
            let now_ms = roughly_now_ms();
            let (last_ms, id) = last.get();
            let id = if now_ms == last_ms && id & RUN_MASK < RUN_MASK {
                id + 1
            } else {
                Uuid::now_v7().as_u128() & !(RUN_MASK + 1)
            };
            last.set((now_ms, id));
            Self::from_bytes(Uuid::from_u128(id).into_bytes())
        })
    }
}

// Until the clock ticks (within some milliseconds) a thread counts on from its last id: that costs a quarter
// of a new one. What counts are the lowest 31 of the random bits, from wherever they are; the bit above is
// zero, so that no run of them reaches the counter that the `uuid` crate shares among threads.
const RUN_MASK: u128 = (1 << 31) - 1;
thread_local! {
    static LAST_ID: Cell<(i64, u128)> = const { Cell::new((i64::MIN, 0)) };
}

/// Why a name, tag or other part of an event is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidEvent {
    /// A name is empty.
    #[error("the {what} is empty")]
    Empty {
        /// Which name.
        what: &'static str,
    },
    /// Something is longer than the format allows.
    #[error("the {what} has {len}, more than the {max} allowed")]
    TooLong {
        /// What is too long, with its unit.
        what: &'static str,
        /// How long it is.
        len: usize,
        /// How long it may be.
        max: usize,
    },
    /// A name contains a control character.
    #[error("the {what} contains a control character")]
    ControlCharacter {
        /// Which name.
        what: &'static str,
    },
    /// Type names that begin with `$` are reserved.
    #[error("event types beginning with '$' are reserved")]
    ReservedType,
}

fn check_name(what: &'static str, name: &str, max: usize) -> Result<(), InvalidEvent> {
    if name.is_empty() {
        return Err(InvalidEvent::Empty { what });
    }
    check_len(what, name.len(), max)?;
    // Nearly all names are of these; the compiler compares many bytes at a time.
    let plain = name.bytes().fold(true, |plain, byte| plain & matches!(byte, b' '..=b'~'));
    if !plain && name.chars().any(char::is_control) {
        return Err(InvalidEvent::ControlCharacter { what });
    }
    Ok(())
}

const fn check_len(what: &'static str, len: usize, max: usize) -> Result<(), InvalidEvent> {
    if len > max { Err(InvalidEvent::TooLong { what, len, max }) } else { Ok(()) }
}

/// The name of a stream, such as `order-1234`: at most 255 bytes, no control characters.
///
/// ```
/// use headwater::StreamId;
/// let stream: StreamId = "order-1234".parse()?;
/// assert_eq!(stream.category(), "order");
/// assert!("".parse::<StreamId>().is_err());
/// # Ok::<(), headwater::InvalidEvent>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(SmolStr);

impl StreamId {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`InvalidEvent`] if it is empty, too long or contains a control character.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidEvent> {
        let name = name.as_ref();
        Self::check(name)?;
        Ok(Self(name.into()))
    }

    pub(crate) fn check(name: &str) -> Result<(), InvalidEvent> {
        check_name("stream name", name, STREAM_NAME_BYTES_MAX)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part in front of the first `-`, or the whole name if there is none.
    #[must_use]
    pub fn category(&self) -> &str {
        self.0.split('-').next().unwrap_or(&self.0)
    }
}

/// The name of an event's type, such as `order.placed`: at most 255 bytes, no control characters. It is
/// stable: it is stored with every event.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventType(SmolStr);

impl EventType {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// [`InvalidEvent`] if it is empty, too long or contains a control character.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidEvent> {
        let name = name.as_ref();
        Self::check(name)?;
        Ok(Self(name.into()))
    }

    pub(crate) fn check(name: &str) -> Result<(), InvalidEvent> {
        check_name("event type", name, EVENT_TYPE_BYTES_MAX)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! name_traits {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:?})", stringify!($name), &*self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidEvent;

            fn from_str(name: &str) -> Result<Self, InvalidEvent> {
                Self::new(name)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InvalidEvent;

            fn try_from(name: &str) -> Result<Self, InvalidEvent> {
                Self::new(name)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidEvent;

            fn try_from(name: String) -> Result<Self, InvalidEvent> {
                Self::new(name)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}
name_traits!(StreamId);
name_traits!(EventType);

/// The count of events in front of an event within its stream: the first event has revision 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(u64);

impl Revision {
    /// The revision of a stream's first event.
    pub const FIRST: Self = Self(0);

    /// The revision behind `count` earlier events.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// How many events of the stream lie in front.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The revision `count` events later.
    #[must_use]
    pub const fn advance(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }

    /// The next revision.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an append expects of a stream: the optimistic-concurrency condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpectedRevision {
    /// Nothing: append whatever the stream holds.
    Any,
    /// The stream has no event yet.
    NoStream,
    /// The stream has at least one event.
    StreamExists,
    /// The stream's last event has this revision.
    Exact(Revision),
}

impl fmt::Display for ExpectedRevision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("anything"),
            Self::NoStream => f.write_str("no stream"),
            Self::StreamExists => f.write_str("an existing stream"),
            Self::Exact(revision) => write!(f, "revision {revision}"),
        }
    }
}

/// How a payload is encoded; stored with every event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PayloadCodec {
    /// Bytes that only the application understands.
    Raw,
    /// bincode 2 in its standard configuration.
    Bincode,
    /// JSON text.
    Json,
    /// A codec that this version doesn't know; the number is kept.
    Other(u8),
}

impl PayloadCodec {
    /// The codec with this number on disk.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Raw,
            1 => Self::Bincode,
            2 => Self::Json,
            other => Self::Other(other),
        }
    }

    /// The codec's number on disk.
    #[must_use]
    pub const fn to_byte(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Bincode => 1,
            Self::Json => 2,
            Self::Other(byte) => byte,
        }
    }
}

/// `raw`, `bincode`, `json`, or `codec-N` for one that this version doesn't know.
impl fmt::Display for PayloadCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Bincode => f.write_str("bincode"),
            Self::Json => f.write_str("json"),
            Self::Other(byte) => write!(f, "codec-{byte}"),
        }
    }
}

/// An event that is to be appended.
///
/// ```
/// use headwater::NewEvent;
/// let event = NewEvent::json("order.placed", &serde_json::json!({ "total_cents": 1250 }))?
///     .tag("customer:17")
///     .metadata("source", "web");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// It owns its payload, or borrows it ([`raw_ref`](NewEvent::raw_ref)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent<P = Vec<u8>> {
    pub(crate) id: EventId,
    pub(crate) event_type: EventType,
    pub(crate) schema_version: u32,
    pub(crate) codec: PayloadCodec,
    pub(crate) payload: P,
    pub(crate) tags: Vec<String>,
    pub(crate) subject: Option<String>,
    pub(crate) correlation: Option<EventId>,
    pub(crate) causation: Option<Locator>,
    pub(crate) occurred_at_us: Option<i64>,
    pub(crate) metadata: Vec<(String, String)>,
}

#[cfg(feature = "shipping")]
impl<'a> NewEvent<&'a [u8]> {
    /// What a record says, without its place. `None` if a name in it is not valid.
    pub(crate) fn of_record(record: &RecordRef<'a>) -> Option<Self> {
        Some(Self {
            id: record.id,
            event_type: EventType::new(record.event_type).ok()?,
            schema_version: record.schema_version,
            codec: record.codec,
            payload: record.payload,
            tags: record.tags().map(str::to_owned).collect(),
            subject: record.subject.map(str::to_owned),
            correlation: record.correlation,
            causation: record.causation,
            occurred_at_us: record.occurred_at_us,
            metadata: record.metadata().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        })
    }
}

impl NewEvent {
    /// An event with a payload of plain bytes and a new id.
    ///
    /// # Errors
    /// [`InvalidEvent`] if the type's name is not valid.
    pub fn raw(
        event_type: impl AsRef<str>,
        payload: impl Into<Vec<u8>>,
    ) -> Result<Self, InvalidEvent> {
        let event_type = EventType::new(event_type)?;
        Ok(Self::with_codec(event_type, 1, PayloadCodec::Raw, payload.into()))
    }

    /// An event whose payload is `value` as JSON, with a new id.
    ///
    /// # Errors
    /// [`EncodeError`] if the type's name is not valid or the value can't be encoded.
    pub fn json<T: serde::Serialize>(
        event_type: impl AsRef<str>,
        value: &T,
    ) -> Result<Self, EncodeError> {
        use crate::codec::{Codec, Json};
        let event_type = EventType::new(event_type)?;
        Ok(Self::with_codec(event_type, 1, PayloadCodec::Json, Json::encode(value)?))
    }

    /// A typed event, with a new id.
    ///
    /// # Errors
    /// [`EncodeError`] if the type's name is not valid or the event can't be encoded.
    pub fn typed<E: Event>(event: &E) -> Result<Self, EncodeError> {
        let kind = event.kind();
        let (codec, payload) = event.encode()?;
        let event_type = EventType::new(kind.name)?;
        Ok(Self::with_codec(event_type, kind.schema_version, codec, payload))
    }
}

impl<'a> NewEvent<&'a [u8]> {
    /// An event with a borrowed payload of plain bytes and a new id. The payload is copied once, into the
    /// [`Append`](crate::Append) that takes the event; nothing is allocated for it.
    ///
    /// ```
    /// use headwater::{Append, EventType, ExpectedRevision, NewEvent, StreamId};
    /// let read = EventType::new("sensor.read")?;
    /// let received = b"21.5;21.6;21.4";
    /// let readings = received.split(|&byte| byte == b';');
    /// let append = Append::to(
    ///     &StreamId::new("sensor-4")?,
    ///     ExpectedRevision::Any,
    ///     readings.map(|reading| NewEvent::raw_ref(&read, reading)),
    /// );
    /// # Ok::<(), headwater::InvalidEvent>(())
    /// ```
    #[must_use]
    pub fn raw_ref(event_type: &EventType, payload: &'a [u8]) -> Self {
        Self::with_codec(event_type.clone(), 1, PayloadCodec::Raw, payload)
    }
}

impl<P> NewEvent<P> {
    pub(crate) fn with_codec(
        event_type: EventType,
        schema_version: u32,
        codec: PayloadCodec,
        payload: P,
    ) -> Self {
        Self {
            id: EventId::new(),
            event_type,
            schema_version,
            codec,
            payload,
            tags: Vec::new(),
            subject: None,
            correlation: None,
            causation: None,
            occurred_at_us: None,
            metadata: Vec::new(),
        }
    }

    /// Sets the id: give the same id to retries of the same event.
    #[must_use]
    pub fn id(mut self, id: EventId) -> Self {
        self.id = id;
        self
    }

    /// The id under which it will be appended.
    #[must_use]
    pub const fn event_id(&self) -> EventId {
        self.id
    }

    /// Sets the version of the payload's schema.
    #[must_use]
    pub fn schema_version(mut self, version: u32) -> Self {
        self.schema_version = version;
        self
    }

    /// Adds a tag.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.push(tag.into());
        self
    }

    /// Says whom the payload is about.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Groups the event with others of one business transaction.
    #[must_use]
    pub fn correlation(mut self, id: EventId) -> Self {
        self.correlation = Some(id);
        self
    }

    /// Names the event that caused this one.
    #[must_use]
    pub fn causation(mut self, cause: Locator) -> Self {
        self.causation = Some(cause);
        self
    }

    /// Says when it happened, in microseconds since 1970.
    #[must_use]
    pub fn occurred_at_us(mut self, time_us: i64) -> Self {
        self.occurred_at_us = Some(time_us);
        self
    }

    /// Adds a pair of free metadata.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.push((key.into(), value.into()));
        self
    }

    /// Verifies all limits of the format.
    ///
    /// # Errors
    /// [`InvalidEvent`] naming what is too long, empty or reserved.
    pub fn check(&self) -> Result<(), InvalidEvent> {
        if self.event_type.as_str().starts_with('$') {
            return Err(InvalidEvent::ReservedType);
        }
        check_len("list of tags", self.tags.len(), TAGS_MAX)?;
        for tag in &self.tags {
            check_name("tag", tag, TAG_BYTES_MAX)?;
        }
        if let Some(subject) = &self.subject {
            check_name("subject", subject, SUBJECT_BYTES_MAX)?;
        }
        check_len("list of metadata", self.metadata.len(), METADATA_PAIRS_MAX)?;
        let bytes = self.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        check_len("metadata", bytes, METADATA_BYTES_MAX)
    }
}

/// Why a typed event can't be made ready for appending.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The type's name or another part breaks a limit.
    #[error(transparent)]
    Invalid(#[from] InvalidEvent),
    /// The codec refused the value.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// An event of the journal, with its data decoded as `E` or, by default, as the payload's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded<E = Vec<u8>> {
    locator: Locator,
    recorded_at_us: i64,
    id: EventId,
    stream: StreamId,
    revision: Revision,
    event_type: EventType,
    schema_version: u32,
    codec: PayloadCodec,
    /// What few events have.
    extras: Option<Box<Extras>>,
    data: E,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Extras {
    tags: Vec<String>,
    subject: Option<String>,
    correlation: Option<EventId>,
    causation: Option<Locator>,
    occurred_at_us: Option<i64>,
    metadata: Vec<(String, String)>,
}

impl Extras {
    fn of(record: &RecordRef<'_>) -> Option<Box<Self>> {
        record.has_extras().then(|| {
            Box::new(Self {
                tags: record.tags().map(str::to_owned).collect(),
                subject: record.subject.map(str::to_owned),
                correlation: record.correlation,
                causation: record.causation,
                occurred_at_us: record.occurred_at_us,
                metadata: record.metadata().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            })
        })
    }
}

/// Long names that were met lately: events that follow each other share theirs, rather than each having a
/// copy. Short ones need no allocation.
#[derive(Debug, Default)]
pub(crate) struct Names {
    /// Of the event in front.
    last: Option<(StreamId, EventType)>,
    streams: Vec<Option<StreamId>>,
    types: Vec<Option<EventType>>,
}

/// Names up to this length are held in place.
const INLINE_BYTES: usize = 23;
/// How many of each are remembered; powers of two.
const STREAMS_REMEMBERED: usize = 256;
const TYPES_REMEMBERED: usize = 32;

impl Names {
    fn of(&mut self, stream: &str, event_type: &str) -> (StreamId, EventType) {
        match &self.last {
            Some(last) if last.0.as_str() == stream && last.1.as_str() == event_type => {
                last.clone()
            }
            _ => {
                let names = (self.stream(stream), self.event_type(event_type));
                self.last.insert(names).clone()
            }
        }
    }

    fn stream(&mut self, name: &str) -> StreamId {
        if name.len() <= INLINE_BYTES {
            return StreamId(name.into());
        }
        remembered(&mut self.streams, STREAMS_REMEMBERED, name, || StreamId(name.into()))
    }

    fn event_type(&mut self, name: &str) -> EventType {
        if name.len() <= INLINE_BYTES {
            return EventType(name.into());
        }
        remembered(&mut self.types, TYPES_REMEMBERED, name, || EventType(name.into()))
    }
}

fn remembered<T: AsRef<str> + Clone>(
    known: &mut Vec<Option<T>>,
    max: usize,
    name: &str,
    new: impl FnOnce() -> T,
) -> T {
    if known.is_empty() {
        known.resize(max, None);
    }
    let hash = foldhash::fast::FixedState::with_seed(0).hash_one(name);
    let Some(place) = known.get_mut(hash as usize % max) else { return new() };
    match place {
        Some(known) if known.as_ref() == name => known.clone(),
        place => place.insert(new()).clone(),
    }
}

impl<E> Recorded<E> {
    pub(crate) fn from_record_with(
        record: &RecordRef<'_>,
        journal: JournalId,
        position: Position,
        recorded_at_us: i64,
        names: &mut Names,
        data: E,
    ) -> Self {
        let (stream, event_type) = names.of(record.stream, record.event_type);
        Self {
            locator: Locator { journal, position },
            recorded_at_us,
            id: record.id,
            stream,
            revision: record.revision,
            event_type,
            schema_version: record.schema_version,
            codec: record.codec,
            extras: Extras::of(record),
            data,
        }
    }
}

impl Recorded {
    pub(crate) fn from_record(
        record: &RecordRef<'_>,
        journal: JournalId,
        position: Position,
        recorded_at_us: i64,
        names: &mut Names,
    ) -> Self {
        let data = record.payload.to_vec();
        Self::from_record_with(record, journal, position, recorded_at_us, names, data)
    }

    /// Decodes the payload as `E`. That is one event, or none if this one is of another type; upcasters of
    /// `E` may make several or none of an event of an older form. They all have this one's position, id,
    /// stream, type and version, as stored.
    ///
    /// ```
    /// # use headwater::{Recorded, codec::CodecError};
    /// # headwater::events! {
    /// #     enum OrderEvent { Placed(u64) = "order.placed", version 1; }
    /// # }
    /// # fn print(recorded: &Recorded) -> Result<(), CodecError> {
    /// for event in recorded.decode::<OrderEvent>()? {
    ///     println!("{}: {:?}", event.position(), event.data());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`CodecError`] if the type is one of `E`'s but the payload can't be decoded or upcast.
    pub fn decode<E: Event>(&self) -> Result<Decoded<Recorded<E>>, CodecError> {
        let payload = Payload { codec: self.codec, bytes: &self.data };
        let kind =
            EventKindRef { name: self.event_type.as_str(), schema_version: self.schema_version };
        Ok(E::decode(kind, payload)?.map(|data| self.with_data(data)))
    }

    fn with_data<E>(&self, data: E) -> Recorded<E> {
        Recorded {
            locator: self.locator,
            recorded_at_us: self.recorded_at_us,
            id: self.id,
            stream: self.stream.clone(),
            revision: self.revision,
            event_type: self.event_type.clone(),
            schema_version: self.schema_version,
            codec: self.codec,
            extras: self.extras.clone(),
            data,
        }
    }
}

impl<E> Recorded<E> {
    /// The event's position: the number of events in front of it.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.locator.position
    }

    /// Journal and position.
    #[must_use]
    pub const fn locator(&self) -> Locator {
        self.locator
    }

    /// When its batch was written, in microseconds since 1970, by the origin's clock.
    #[must_use]
    pub const fn recorded_at_us(&self) -> i64 {
        self.recorded_at_us
    }

    /// When it happened, if the writer said so, in microseconds since 1970.
    #[must_use]
    pub fn occurred_at_us(&self) -> Option<i64> {
        self.extras.as_ref()?.occurred_at_us
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> EventId {
        self.id
    }

    /// The stream.
    #[must_use]
    pub const fn stream(&self) -> &StreamId {
        &self.stream
    }

    /// Its place in the stream.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        self.revision
    }

    /// Its type.
    #[must_use]
    pub const fn event_type(&self) -> &EventType {
        &self.event_type
    }

    /// Version of the payload's schema.
    #[must_use]
    pub const fn schema_version(&self) -> u32 {
        self.schema_version
    }

    /// How the payload is encoded.
    #[must_use]
    pub const fn codec(&self) -> PayloadCodec {
        self.codec
    }

    /// Its tags.
    #[must_use]
    pub fn tags(&self) -> &[String] {
        self.extras.as_ref().map_or(&[], |extras| &extras.tags)
    }

    /// Whom the payload is about.
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        self.extras.as_ref()?.subject.as_deref()
    }

    /// The business transaction it belongs to.
    #[must_use]
    pub fn correlation(&self) -> Option<EventId> {
        self.extras.as_ref()?.correlation
    }

    /// The event that caused it.
    #[must_use]
    pub fn causation(&self) -> Option<Locator> {
        self.extras.as_ref()?.causation
    }

    /// Free metadata: keys and values.
    #[must_use]
    pub fn metadata(&self) -> &[(String, String)] {
        self.extras.as_ref().map_or(&[], |extras| &extras.metadata)
    }

    /// The event itself.
    #[must_use]
    pub const fn data(&self) -> &E {
        &self.data
    }

    /// The event itself, taken out.
    #[must_use]
    pub fn into_data(self) -> E {
        self.data
    }
}

/// The stable name and schema version under which an event is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventKind {
    /// The type's name.
    pub name: &'static str,
    /// Version of the payload's schema.
    pub schema_version: u32,
}

/// Name and schema version of a stored event that is to be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventKindRef<'a> {
    /// The type's name.
    pub name: &'a str,
    /// Version of the payload's schema.
    pub schema_version: u32,
}

/// A stored payload.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// How it is encoded.
    pub codec: PayloadCodec,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl Payload<'_> {
    /// Decodes the payload with the codec it was stored with.
    ///
    /// # Errors
    /// [`CodecError`] if that isn't a serde codec, or the bytes don't match the type.
    pub fn decode<T: serde::de::DeserializeOwned>(&self) -> Result<T, CodecError> {
        use crate::codec::{Bincode, Codec, Json};
        match self.codec {
            PayloadCodec::Bincode => Bincode::decode(self.bytes),
            PayloadCodec::Json => Json::decode(self.bytes),
            other => Err(CodecError::NotSerde { codec: other }),
        }
    }
}

/// A kind of events that an event type knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownKind {
    /// Name and schema version.
    pub kind: EventKind,
    /// Whether it is only read, by an upcaster, and no longer written.
    pub is_past: bool,
}

impl KnownKind {
    /// A kind of which events are written.
    #[must_use]
    pub const fn present(name: &'static str, schema_version: u32) -> Self {
        Self { kind: EventKind { name, schema_version }, is_past: false }
    }

    /// A kind that only an upcaster reads.
    #[must_use]
    pub const fn past(name: &'static str, schema_version: u32) -> Self {
        Self { kind: EventKind { name, schema_version }, is_past: true }
    }
}

/// The typed events of an application; usually derived, or declared by [`events!`](crate::events).
///
/// A type says under which stable name and schema version each of its values is stored, and decodes what it
/// knows. Names and versions are part of the stored data: renaming a Rust type changes nothing on disk.
pub trait Event: Sized {
    /// All kinds that can be decoded: those that are written, and older ones that are upcast.
    /// [`schema::check`](crate::schema::check) proves that they are.
    const KINDS: &'static [KnownKind];

    /// Name and schema version of this event.
    fn kind(&self) -> EventKind;

    /// Encodes the payload.
    ///
    /// # Errors
    /// [`CodecError`] if the value can't be represented.
    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError>;

    /// Decodes an event of a present kind, or names the upcaster of an older one.
    ///
    /// # Errors
    /// [`CodecError`] if the kind is known but the payload can't be decoded.
    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError>;

    /// Decodes a stored event, through upcasters if it is of an older form. Everything that reads typed
    /// events does it by this function; it isn't meant to be written anew.
    ///
    /// # Errors
    /// [`CodecError`] if the kind is known but the payload can't be decoded or upcast.
    #[inline]
    fn decode(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Decoded<Self>, CodecError> {
        match Self::step(kind, payload)? {
            Step::Value(event) => Ok(Decoded::One(event)),
            Step::Foreign => Ok(Decoded::Foreign),
            Step::Upcast(upcaster) => upcast::run(kind, payload, upcaster),
        }
    }
}

/// The payload's bytes as they are: the event type of a follower that wants every event undecoded.
impl Event for Vec<u8> {
    const KINDS: &'static [KnownKind] = &[];

    fn kind(&self) -> EventKind {
        EventKind { name: "bytes", schema_version: 1 }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        Ok((PayloadCodec::Raw, self.clone()))
    }

    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError> {
        // What a journal notes for itself is nobody's event.
        let is_own = kind.name.starts_with('$');
        Ok(if is_own { Step::Foreign } else { Step::Value(payload.bytes.to_vec()) })
    }
}

/// Makes an enum the typed events of an application: each variant a type of events, under a stable name and
/// schema version. Feature `derive`.
///
/// ```
/// use headwater::upcast::{RawEvent, Upcast, discard};
/// use headwater::Event;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// struct Placed {
///     total_cents: u64,
///     currency: String,
/// }
///
/// #[derive(Debug, PartialEq, Event)]
/// #[event(upcast("order.viewed", 1 = discard))] // nobody needs them any more
/// enum OrderEvent {
///     #[event(name = "order.placed", version = 2, upcast(1 = placed_1_to_2))]
///     Placed(Placed),
///     #[event(name = "order.cancelled", version = 1, codec = json)]
///     Cancelled { by: u32, reason: String },
///     #[event(name = "order.closed", version = 1, upcast("order.finished", 1 = finished))]
///     Closed,
/// }
///
/// /// Version 1 was the cents alone.
/// fn placed_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
///     event.map(|total_cents: u64| Placed { total_cents, currency: "EUR".into() })
/// }
///
/// fn finished(event: RawEvent<'_>) -> Upcast<'_> {
///     event.renamed("order.closed", 1)
/// }
///
/// let old = RawEvent::encode("order.placed", 1, headwater::PayloadCodec::Bincode, &1250_u64)?;
/// let events: Vec<OrderEvent> =
///     OrderEvent::decode(old.kind(), old.payload())?.into_iter().collect();
/// assert_eq!(events, [OrderEvent::Placed(Placed { total_cents: 1250, currency: "EUR".into() })]);
/// # Ok::<(), headwater::codec::CodecError>(())
/// ```
///
/// A variant holds one value, which is the payload; or named fields, which are stored as a struct of them is; or
/// nothing.
///
/// | of a variant | |
/// |---|---|
/// | `name = "…"` | under which its events are stored, for ever |
/// | `version = N` | of the payload's schema: raise it whenever the payload's layout changes |
/// | `codec = bincode` or `json` | how it is written, bincode unless told otherwise. Any of the two is read |
/// | `upcast(1 = f, 2 = g)` | the [upcasters](crate::upcast) of its older versions |
/// | `upcast("other", 1 = f)` | the upcasters of another type, such as the name it once had |
/// | `since = N` | the first version that was ever stored, if that isn't 1 |
///
/// | of the enum | |
/// |---|---|
/// | `codec = …` | of all variants that don't say |
/// | `upcast("name", 1 = f)` | the upcasters of a type that no variant stands for any more |
/// | `crate = path` | where this library is, if not at `::headwater` |
///
/// A version that nothing reads doesn't compile, so none is forgotten when one is raised:
///
/// ```compile_fail
/// #[derive(headwater::Event)]
/// enum OrderEvent {
///     #[event(name = "order.placed", version = 2)] // nothing reads version 1 of "order.placed"
///     Placed(u64),
/// }
/// ```
///
/// What the compiler can't see is found by [`schema::check`](crate::schema::check).
#[cfg(feature = "derive")]
pub use headwater_derive::Event;

/// Declares an enum of events, each variant a serde type stored under a stable name and schema version.
///
/// A short form that needs no procedural macro, for events that have only one version of each type so far.
/// What older versions become is told by `#[derive(Event)]` (feature `derive`); the two store the same bytes.
///
/// ```
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// pub struct Placed {
///     pub total_cents: u64,
/// }
///
/// headwater::events! {
///     /// What happens to an order.
///     pub enum OrderEvent {
///         Placed(Placed) = "order.placed", version 1;
///     }
/// }
///
/// let event = headwater::NewEvent::typed(&OrderEvent::from(Placed { total_cents: 1250 }))?;
/// # Ok::<(), headwater::EncodeError>(())
/// ```
#[macro_export]
macro_rules! events {
    ($(#[$meta:meta])* $vis:vis enum $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident($data:ty) = $type_name:literal, version $version:literal;)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        $vis enum $name {
            $($(#[$variant_meta])* #[allow(missing_docs, reason = "documented by its data")] $variant($data),)+
        }

        $(impl From<$data> for $name {
            fn from(data: $data) -> Self {
                Self::$variant(data)
            }
        })+

        impl $crate::Event for $name {
            const KINDS: &'static [$crate::KnownKind] =
                &[$($crate::KnownKind::present($type_name, $version)),+];

            fn kind(&self) -> $crate::EventKind {
                match self {
                    $(Self::$variant(_) => $crate::EventKind { name: $type_name, schema_version: $version },)+
                }
            }

            fn encode(&self) -> Result<($crate::PayloadCodec, Vec<u8>), $crate::codec::CodecError> {
                use $crate::codec::Codec as _;
                match self {
                    $(Self::$variant(data) => {
                        $crate::codec::Bincode::encode(data).map(|bytes| ($crate::PayloadCodec::Bincode, bytes))
                    })+
                }
            }

            #[inline]
            fn step(
                kind: $crate::EventKindRef<'_>,
                payload: $crate::Payload<'_>,
            ) -> Result<$crate::upcast::Step<Self>, $crate::codec::CodecError> {
                #[allow(unreachable_patterns, reason = "a type may be listed in several versions")]
                match (kind.name, kind.schema_version) {
                    $(($type_name, $version) => {
                        payload.decode().map(Self::$variant).map($crate::upcast::Step::Value)
                    })+
                    $(($type_name, version) => {
                        Err($crate::codec::CodecError::SchemaVersion { name: $type_name, version })
                    })+
                    _ => Ok($crate::upcast::Step::Foreign),
                }
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_ascend_within_a_thread_and_are_never_given_twice() {
        const EACH: usize = 50_000;
        let ids = || (0..EACH).map(|_| EventId::new()).collect::<Vec<_>>();
        let all: Vec<Vec<EventId>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(ids)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for ids in &all {
            assert!(ids.is_sorted_by(|id, next| id < next));
            let version = |id: &EventId| Uuid::from_bytes(*id.as_bytes()).get_version_num();
            assert!(ids.iter().all(|id| version(id) == 7));
        }
        assert_eq!(all.iter().flatten().collect::<HashSet<_>>().len(), 4 * EACH);
    }
}
