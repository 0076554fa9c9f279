//! Upcasters: how events that were stored in an older form become what the code knows today.
//!
//! ```text
//! stored event ──Event::step──▶ Value ────────────────────────────────▶ one typed event
//!                    ▲            Foreign ───────────────────────────────▶ none: of another type
//!                    │            Upcast(f) ──f──▶ none, one or several raw events
//!                    ╰──────────────────────────────────────╯  each looked at again
//! ```
//!
//! An event type names its own upcasters, so there is no registry that one of the paths could forget:
//! [`Event::decode`] runs them, and reading, views, rebuilds and mirrors all decode through it.
//!
//! Invariants:
//! - Nothing that is stored is changed. An upcaster is a pure function of a raw event.
//! - What comes of one stored event stands at that event's position, in the order in which it was returned.
//! - An event in its present form costs nothing of this: no upcaster is looked for, nothing is allocated.
//! - Upcasters that never come to an end are an error, not a hang: [`UPCAST_CHAIN_MAX`].

use std::borrow::Cow;
use std::error::Error;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{Bincode, Codec, CodecError, Json};
use crate::event::{Event, EventKindRef, Payload, PayloadCodec};

/// How many upcasters may follow one another. More means that they go round in a circle.
pub const UPCAST_CHAIN_MAX: usize = 1000;

/// What an upcaster returns: the events that take the old one's place, or why it can't tell.
pub type Upcast<'a> = Result<Vec<RawEvent<'a>>, Box<dyn Error + Send + Sync>>;

/// Makes newer events of one that was stored in an older form. A pure function: it is called again whenever
/// the event is read.
///
/// What it returns may be of an older form in turn: it is then given to the next upcaster, so each one only
/// needs to know its own step.
pub type Upcaster = for<'a> fn(RawEvent<'a>) -> Upcast<'a>;

/// An event without types: what an upcaster is given, and what it returns.
///
/// ```
/// use headwater::upcast::{RawEvent, Upcast};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Deserialize)]
/// struct PlacedV1 {
///     total_cents: u64,
/// }
/// #[derive(Serialize)]
/// struct PlacedV2 {
///     total_cents: u64,
///     currency: String,
/// }
///
/// fn placed_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
///     event.map(|PlacedV1 { total_cents }| PlacedV2 { total_cents, currency: "EUR".into() })
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawEvent<'a> {
    /// The type's name.
    pub name: Cow<'a, str>,
    /// Version of the payload's schema.
    pub schema_version: u32,
    /// How the payload is encoded.
    pub codec: PayloadCodec,
    /// The payload's bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> RawEvent<'a> {
    /// The event of this kind with this payload.
    #[must_use]
    pub const fn new(kind: EventKindRef<'a>, payload: Payload<'a>) -> Self {
        Self {
            name: Cow::Borrowed(kind.name),
            schema_version: kind.schema_version,
            codec: payload.codec,
            bytes: Cow::Borrowed(payload.bytes),
        }
    }

    /// An event whose payload is `value`, encoded with `codec`.
    ///
    /// # Errors
    /// [`CodecError`] if the value can't be encoded, or the codec is none of serde.
    pub fn encode<T: Serialize>(
        name: &'a str,
        schema_version: u32,
        codec: PayloadCodec,
        value: &T,
    ) -> Result<Self, CodecError> {
        let bytes = match codec {
            PayloadCodec::Bincode => Bincode::encode(value)?,
            PayloadCodec::Json => Json::encode(value)?,
            codec => return Err(CodecError::NotSerde { codec }),
        };
        Ok(Self { name: Cow::Borrowed(name), schema_version, codec, bytes: Cow::Owned(bytes) })
    }

    /// Name and schema version.
    #[must_use]
    pub fn kind(&self) -> EventKindRef<'_> {
        EventKindRef { name: &self.name, schema_version: self.schema_version }
    }

    /// The payload.
    #[must_use]
    pub fn payload(&self) -> Payload<'_> {
        Payload { codec: self.codec, bytes: &self.bytes }
    }

    /// Decodes the payload with the codec it was stored with.
    ///
    /// # Errors
    /// [`CodecError`] if the bytes don't match the type, or the codec is none of serde.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, CodecError> {
        self.payload().decode()
    }

    /// The same type's next version, whose payload `change` makes of the old one; encoded as this one is.
    ///
    /// # Errors
    /// If the payload isn't an `Old`, or the new one can't be encoded.
    pub fn map<Old: DeserializeOwned, New: Serialize>(
        self,
        change: impl FnOnce(Old) -> New,
    ) -> Upcast<'a> {
        let new = change(self.decode()?);
        let Self { name, schema_version, codec, .. } = self;
        let encoded = RawEvent::encode("", schema_version.saturating_add(1), codec, &new)?;
        Ok(vec![Self { name, ..encoded }])
    }

    /// An event in the place of this one, or one of several; encoded as this one is.
    ///
    /// # Errors
    /// [`CodecError`] if the value can't be encoded.
    pub fn becomes<T: Serialize>(
        &self,
        name: &'a str,
        schema_version: u32,
        value: &T,
    ) -> Result<Self, CodecError> {
        Self::encode(name, schema_version, self.codec, value)
    }

    /// The same payload as an event of another type. Nothing is copied.
    ///
    /// # Errors
    /// None: it returns what an upcaster does.
    pub fn renamed(self, name: &'a str, schema_version: u32) -> Upcast<'a> {
        Ok(vec![Self { name: Cow::Borrowed(name), schema_version, ..self }])
    }
}

/// The upcaster of events that nobody needs any more: it makes nothing of them.
///
/// ```
/// use headwater::{EventKindRef, Payload, PayloadCodec, upcast::{RawEvent, discard}};
/// let kind = EventKindRef { name: "order.viewed", schema_version: 1 };
/// let payload = Payload { codec: PayloadCodec::Raw, bytes: b"whatever" };
/// assert!(discard(RawEvent::new(kind, payload))?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
///
/// # Errors
/// None: it returns what an upcaster does.
pub fn discard(_: RawEvent<'_>) -> Upcast<'_> {
    Ok(Vec::new())
}

/// What an event type does with a stored event.
#[derive(Clone, Copy, Debug)]
pub enum Step<E> {
    /// It is of the present form: here it is.
    Value(E),
    /// It is of an older form, of which this makes newer ones.
    Upcast(Upcaster),
    /// It is of none of the event type's kinds.
    Foreign,
}

/// The typed events that one stored event stands for: usually one, more or none after upcasting.
///
/// ```
/// # fn sum(events: headwater::upcast::Decoded<u64>) -> u64 {
/// let mut sum = 0;
/// for event in events {
///     sum += event;
/// }
/// # sum
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded<E> {
    /// The stored event is of another type.
    Foreign,
    /// It is this event.
    One(E),
    /// Upcasters have made these events of it, in this order; perhaps none at all.
    Many(Vec<E>),
}

impl<E> Decoded<E> {
    /// Whether the stored event is of another type. If not, there may be no event all the same: an upcaster
    /// can make nothing of one.
    #[must_use]
    pub const fn is_foreign(&self) -> bool {
        matches!(self, Self::Foreign)
    }

    /// The same with each event changed.
    pub fn map<T>(self, mut change: impl FnMut(E) -> T) -> Decoded<T> {
        match self {
            Self::Foreign => Decoded::Foreign,
            Self::One(event) => Decoded::One(change(event)),
            Self::Many(events) => Decoded::Many(events.into_iter().map(change).collect()),
        }
    }
}

impl<E> IntoIterator for Decoded<E> {
    type Item = E;
    type IntoIter = DecodedIter<E>;

    fn into_iter(self) -> DecodedIter<E> {
        let (one, many) = match self {
            Self::Foreign => (None, Vec::new()),
            Self::One(event) => (Some(event), Vec::new()),
            Self::Many(events) => (None, events),
        };
        DecodedIter { one, many: many.into_iter() }
    }
}

/// The events of a [`Decoded`].
#[derive(Clone, Debug)]
pub struct DecodedIter<E> {
    one: Option<E>,
    many: std::vec::IntoIter<E>,
}

impl<E> Iterator for DecodedIter<E> {
    type Item = E;

    fn next(&mut self) -> Option<E> {
        self.one.take().or_else(|| self.many.next())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let len = usize::from(self.one.is_some()) + self.many.len();
        (len, Some(len))
    }
}

impl<E> ExactSizeIterator for DecodedIter<E> {}

/// Runs upcasters, beginning with `first`, until all that has come of the event is of the present form.
#[cold]
#[inline(never)]
pub(crate) fn run<E: Event>(
    kind: EventKindRef<'_>,
    payload: Payload<'_>,
    first: Upcaster,
) -> Result<Decoded<E>, CodecError> {
    // With how many upcasters each has come through. The last one is the next to be looked at, so what an
    // upcaster returns goes in backwards; and a circle is followed to its bound before anything beside it.
    let first = call(first, RawEvent::new(kind, payload))?;
    let mut todo: Vec<_> = first.into_iter().rev().map(|event| (event, 1)).collect();
    let mut done = Vec::new();
    while let Some((event, chain)) = todo.pop() {
        let step = E::step(event.kind(), event.payload());
        match step.map_err(|error| failed(kind, Box::new(error)))? {
            Step::Value(value) => done.push(value),
            Step::Upcast(_) if chain == UPCAST_CHAIN_MAX => {
                let EventKindRef { name, schema_version: version } = kind;
                return Err(CodecError::UpcastWithoutEnd { name: name.into(), version });
            }
            Step::Upcast(upcaster) => {
                let next = call(upcaster, event)?.into_iter().rev();
                todo.extend(next.map(|event| (event, chain + 1)));
            }
            Step::Foreign => {
                let RawEvent { name, schema_version: version, .. } = event;
                return Err(CodecError::UpcastToUnknown { name: name.into_owned(), version });
            }
        }
    }
    Ok(match (done.pop(), done.is_empty()) {
        (Some(event), true) => Decoded::One(event),
        (last, _) => {
            done.extend(last);
            Decoded::Many(done)
        }
    })
}

fn call(upcaster: Upcaster, event: RawEvent<'_>) -> Result<Vec<RawEvent<'_>>, CodecError> {
    let (name, schema_version) = (event.name.clone(), event.schema_version);
    upcaster(event).map_err(|source| failed(EventKindRef { name: &name, schema_version }, source))
}

fn failed(kind: EventKindRef<'_>, source: Box<dyn Error + Send + Sync>) -> CodecError {
    CodecError::Upcast { name: kind.name.into(), version: kind.schema_version, source }
}
