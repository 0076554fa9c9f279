//! Events as a journal would hold them, without a journal.

use std::collections::HashMap;

use super::clock::BEGINNING_US;
use crate::codec::{Bincode, Codec};
use crate::error::ReadError;
use crate::event::{
    EncodeError, Event, EventType, Names, NewEvent, PayloadCodec, Recorded, Revision, StreamId,
};
use crate::format::record::{self, RecordRef};
use crate::journal::Journal;
use crate::position::{JournalId, Position};

/// How far the clock moves with each event, in microseconds.
const STEP_US: i64 = 1_000;

/// What has happened, as it is stored: encoded, with positions, revisions and times. In memory, without a journal.
///
/// Every event is appended as a batch of its own, a millisecond after the one in front of it.
///
/// ```
/// use headwater::testing::{History, stored};
/// # headwater::events! { pub enum OrderEvent { Placed(u64) = "order.placed", version 1; } }
/// let history = History::new()
///     .with("order-1", [OrderEvent::Placed(1250)])
///     .with_new("order-2", [stored("order.placed", 1, &700_u64).tag("customer:17")]);
/// assert_eq!(history.events()[1].tags(), ["customer:17"]);
/// ```
#[derive(Clone, Debug)]
pub struct History {
    events: Vec<Recorded>,
    revisions: HashMap<StreamId, Revision>,
    now_us: i64,
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

/// An event as older code would have stored it: a type name and version, and a payload in bincode, as `events!` and
/// `#[derive(Event)]` write it by default. For JSON there is [`NewEvent::json`].
///
/// # Panics
/// If the name isn't valid or the payload can't be encoded.
#[track_caller]
#[must_use]
pub fn stored<T: serde::Serialize>(name: &str, schema_version: u32, payload: &T) -> NewEvent {
    let event_type = EventType::new(name).unwrap_or_else(|error| panic!("{name:?}: {error}"));
    let payload = Bincode::encode(payload).unwrap_or_else(|error| panic!("{name:?}: {error}"));
    NewEvent::with_codec(event_type, schema_version, PayloadCodec::Bincode, payload)
}

impl History {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self { events: Vec::new(), revisions: HashMap::new(), now_us: BEGINNING_US }
    }

    /// The durable events of a journal, from its first one on.
    ///
    /// # Errors
    /// [`ReadError`], also if the first events were [removed](crate::retention) or lost.
    pub fn of(journal: &Journal) -> Result<Self, ReadError> {
        let mut history = Self::new();
        for event in journal.read_all(Position::START)? {
            let event = event?;
            history.revisions.insert(event.stream().clone(), event.revision().next());
            history.now_us = event.recorded_at_us() + STEP_US;
            history.events.push(event);
        }
        Ok(history)
    }

    /// And these typed events of a stream.
    ///
    /// # Panics
    /// If the stream's name isn't valid, or an event can't be encoded.
    #[track_caller]
    #[must_use]
    pub fn with<E: Event>(self, stream: &str, events: impl IntoIterator<Item = E>) -> Self {
        let events: Result<Vec<_>, EncodeError> =
            events.into_iter().map(|event| NewEvent::typed(&event)).collect();
        let events = events.unwrap_or_else(|error| panic!("an event of {stream:?}: {error}"));
        self.with_new(stream, events)
    }

    /// And these events of a stream, with tags and metadata, or in an older form ([`stored`]).
    ///
    /// # Panics
    /// If the stream's name or an event isn't valid.
    #[track_caller]
    #[must_use]
    pub fn with_new(mut self, stream: &str, events: impl IntoIterator<Item = NewEvent>) -> Self {
        let stream = StreamId::new(stream).unwrap_or_else(|error| panic!("{stream:?}: {error}"));
        for event in events {
            self.push(&stream, &event);
        }
        self
    }

    /// Later events are recorded from this time on, in microseconds since 1970.
    #[must_use]
    pub fn at_us(mut self, time_us: i64) -> Self {
        self.now_us = time_us;
        self
    }

    /// The events, undecoded, in the order of their positions.
    #[must_use]
    pub fn events(&self) -> &[Recorded] {
        &self.events
    }

    /// Through the bytes in which a journal would store it.
    #[track_caller]
    pub(super) fn push(&mut self, stream: &StreamId, event: &NewEvent) {
        let name = &event.event_type;
        event.check().unwrap_or_else(|error| panic!("{name} for stream {stream}: {error}"));
        let revision = self.revisions.entry(stream.clone()).or_default();
        let mut bytes = Vec::new();
        record::encode(&mut bytes, event, stream, *revision);
        *revision = revision.next();
        let position = self.events.last().map_or(Position::START, |it| it.position().advance(1));
        let (record, _) = RecordRef::decode(&bytes)
            .unwrap_or_else(|error| panic!("{name} for stream {stream}: {error}"));
        let journal = self.events.first().map_or(JOURNAL, |first| first.locator().journal);
        let names = &mut Names::default();
        self.events.push(Recorded::from_record(&record, journal, position, self.now_us, names));
        self.now_us += STEP_US;
    }
}

/// The id of journals that aren't there.
const JOURNAL: JournalId = JournalId::from_bytes(*b"headwater::test!");
