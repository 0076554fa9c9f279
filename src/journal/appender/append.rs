//! What an append is given and what it answers.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use crate::error::InvalidAppend;
use crate::event::{EventId, ExpectedRevision, InvalidEvent, NewEvent, Revision, StreamId};
use crate::format::batch::{BATCH_BYTES_LIMIT, BATCH_HEADER_BYTES};
use crate::format::record;
use crate::format::sidecar::id_hash;
use crate::journal::query::Query;
use crate::position::{Durability, Position, Token};

/// What is to be appended, atomically: events to one or several streams, each with its condition.
///
/// ```
/// use headwater::{Append, ExpectedRevision, NewEvent, Revision, StreamId};
/// let (order, stock) = (StreamId::new("order-7")?, StreamId::new("stock-lamp")?);
/// let append = Append::to(&order, ExpectedRevision::NoStream, [NewEvent::raw("order.placed", *b"x")?])
///     .and_to(&stock, ExpectedRevision::Any, [NewEvent::raw("stock.reserved", *b"1")?])
///     .and_expect(&StreamId::new("customer-3")?, ExpectedRevision::Exact(Revision::new(4)));
/// # Ok::<(), headwater::InvalidEvent>(())
/// ```
#[derive(Clone, Default)]
pub struct Append {
    pub(super) parts: Vec<Part>,
    pub(super) conditions: Vec<Condition>,
    pub(super) durability: Durability,
    /// Room for the batch's header, and the records of all parts, encoded when they were given; only their
    /// revisions are missing. So events are never kept as values, and a retry needs no second encoding.
    pub(super) bytes: Vec<u8>,
    /// Where each record begins.
    pub(super) starts: Vec<usize>,
    ids: Vec<EventId>,
    /// A stream may come several times, whatever lies between: the events keep their order.
    pub(super) interleaved: bool,
    /// What is wrong with the first event that can't be written.
    invalid: Option<InvalidEvent>,
}

/// No event from a position on may be one that a query means.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) query: Query,
    pub(super) from: Position,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) stream: StreamId,
    pub(super) expected: ExpectedRevision,
    /// Which of the append's events are for this stream.
    pub(super) events: Range<usize>,
}

impl Append {
    /// Events for one stream.
    #[must_use]
    pub fn to<P: AsRef<[u8]>>(
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent<P>>,
    ) -> Self {
        Self::default().and_to(stream, expected, events)
    }

    /// Events for a further stream, in the same batch.
    #[must_use]
    pub fn and_to<P: AsRef<[u8]>>(
        mut self,
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent<P>>,
    ) -> Self {
        let from = self.starts.len();
        let mut events = events.into_iter();
        if let Some(first) = events.next() {
            self.reserve(events.size_hint().0, record::encoded_len(&first, stream));
            self.encode(&first, stream);
        }
        for event in events {
            self.encode(&event, stream);
        }
        let events = from..self.starts.len();
        self.parts.push(Part { stream: stream.clone(), expected, events });
        self
    }

    /// An event of any stream, behind those that were added before, whatever their streams: the order stays. Types
    /// that are reserved are allowed.
    #[cfg(feature = "shipping")]
    pub(crate) fn push<P: AsRef<[u8]>>(&mut self, stream: &StreamId, event: &NewEvent<P>) {
        self.interleaved = true;
        let from = self.starts.len();
        self.encode_unchecked(event, stream);
        match self.parts.last_mut().filter(|part| part.stream == *stream) {
            Some(part) => part.events.end += 1,
            None => {
                let (stream, expected) = (stream.clone(), ExpectedRevision::Any);
                self.parts.push(Part { stream, expected, events: from..from + 1 });
            }
        }
    }

    /// How long its batch will be, padding aside.
    #[cfg(feature = "shipping")]
    pub(crate) fn len_bytes(&self) -> usize {
        self.bytes.len().max(BATCH_HEADER_BYTES)
    }

    #[cfg(feature = "shipping")]
    pub(crate) fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// A condition on a stream that isn't written.
    #[must_use]
    pub fn and_expect(mut self, stream: &StreamId, expected: ExpectedRevision) -> Self {
        let events = self.starts.len()..self.starts.len();
        self.parts.push(Part { stream: stream.clone(), expected, events });
        self
    }

    /// A condition on events of any stream: it is only appended if no event at `from` or behind it is one that
    /// the query means. So a decision that was made from [`read_query`](crate::Store::read_query) is appended
    /// only if it would be made again.
    ///
    /// What such an event is looked for in costs what lies between `from` and the end, and among the last
    /// events (some 100,000) only what the query itself costs: give the position up to which you have read.
    ///
    /// ```
    /// use headwater::{Append, ExpectedRevision, NewEvent, Position, Query, QueryItem, Store, StreamId};
    /// # let dir = tempfile::tempdir()?;
    /// let store = Store::create(dir.path().join("users"))?;
    /// // An address is given once, whatever the users' streams are.
    /// let taken = Query::from(QueryItem::tags(["email:ada@example.org"]));
    /// let mut found = store.read_query(&taken, Position::START)?;
    /// assert!(found.next().is_none());
    /// let registered = NewEvent::raw("user.registered", *b"Ada")?.tag("email:ada@example.org");
    /// let append = Append::to(&StreamId::new("user-1")?, ExpectedRevision::NoStream, [registered])
    ///     .and_expect_none(taken.clone(), found.position());
    /// store.append(&append)?;
    ///
    /// let again = NewEvent::raw("user.registered", *b"Eve")?.tag("email:ada@example.org");
    /// let append = Append::to(&StreamId::new("user-2")?, ExpectedRevision::NoStream, [again])
    ///     .and_expect_none(taken, Position::START);
    /// assert_eq!(store.append(&append).unwrap_err().code(), "append.query_conflict");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn and_expect_none(mut self, query: impl Into<Query>, from: Position) -> Self {
        self.conditions.push(Condition { query: query.into(), from });
        self
    }

    /// Makes room for an event of `len` bytes and `more` like it: events of one append are often alike.
    fn reserve(&mut self, more: usize, len: usize) {
        let fit = BATCH_BYTES_LIMIT as usize / len;
        let count = more.min(fit) + 1;
        self.bytes.reserve(BATCH_HEADER_BYTES + count * len);
        self.starts.reserve(count);
        self.ids.reserve(count);
    }

    /// What can't be written is not encoded, and remembered: appending tells.
    fn encode<P: AsRef<[u8]>>(&mut self, event: &NewEvent<P>, stream: &StreamId) {
        if let Err(invalid) = event.check() {
            self.invalid.get_or_insert(invalid);
            return;
        }
        self.encode_unchecked(event, stream);
    }

    fn encode_unchecked<P: AsRef<[u8]>>(&mut self, event: &NewEvent<P>, stream: &StreamId) {
        if self.bytes.is_empty() {
            self.bytes.resize(BATCH_HEADER_BYTES, 0);
        }
        self.starts.push(self.bytes.len());
        self.ids.push(event.id);
        record::encode(&mut self.bytes, event, stream, Revision::FIRST);
    }

    /// Sets what the answer vouches for; by default, that the events are durable.
    ///
    /// ```
    /// use headwater::{Append, Durability, ExpectedRevision, NewEvent, StreamId};
    /// let reading = NewEvent::raw("sensor.read", *b"21.5")?;
    /// let append = Append::to(&StreamId::new("sensor-4")?, ExpectedRevision::Any, [reading])
    ///     .durability(Durability::Buffered);
    /// # Ok::<(), headwater::InvalidEvent>(())
    /// ```
    #[must_use]
    pub const fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    #[cfg(feature = "views")]
    pub(crate) fn is_durable(&self) -> bool {
        self.durability == Durability::Durable
    }

    /// The first event, and the rest; `None` if there is no rest, or several streams.
    #[cfg(feature = "test-kit")]
    pub(super) fn split(&self) -> Option<(Self, Self)> {
        let ([part], Some(second)) = (self.parts.as_slice(), self.starts.get(1)) else {
            return None;
        };
        let piece = |bytes: Range<usize>, events: Range<usize>| {
            let mut encoded = vec![0; BATCH_HEADER_BYTES];
            encoded.extend_from_slice(self.bytes.get(bytes.clone())?);
            let starts = self.starts.get(events.clone())?.iter();
            Some(Self {
                parts: vec![Part { events: 0..events.len(), ..part.clone() }],
                starts: starts.map(|at| at + BATCH_HEADER_BYTES - bytes.start).collect(),
                ids: self.ids.get(events)?.to_vec(),
                bytes: encoded,
                ..self.clone()
            })
        };
        let all = self.starts.len();
        Some((piece(BATCH_HEADER_BYTES..*second, 0..1)?, piece(*second..self.bytes.len(), 1..all)?))
    }

    /// Verifies what can be verified without the journal. `hashes` are those of the ids, in order.
    pub(super) fn check(&self, hashes: &[u64]) -> Result<(), InvalidAppend> {
        if let Some(invalid) = &self.invalid {
            return Err(invalid.clone().into());
        }
        let mut streams = HashSet::new();
        for part in &self.parts {
            if self.parts.len() > 1 && !self.interleaved && !streams.insert(&part.stream) {
                return Err(InvalidAppend::RepeatedStream(part.stream.clone()));
            }
        }
        if hashes.is_empty() {
            return Err(InvalidAppend::Empty);
        }
        self.repeated_id(hashes).map_or(Ok(()), |id| Err(InvalidAppend::RepeatedId(id)))
    }

    /// Ids that ascend, as new ones do, are all different. Otherwise sorting the hashes is quicker than a
    /// set of the ids, which is asked only if two are the same.
    fn repeated_id(&self, hashes: &[u64]) -> Option<EventId> {
        if self.ids.is_sorted_by(|id, next| id < next) {
            return None;
        }
        let mut sorted = hashes.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).all(|pair| pair.first() != pair.last()) {
            return None;
        }
        let mut seen = HashSet::new();
        self.ids().find(|id| !seen.insert(*id))
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = EventId> {
        self.ids.iter().copied()
    }

    pub(super) fn id_hashes(&self) -> Vec<u64> {
        self.ids().map(|id| id_hash(&id)).collect()
    }
}

impl fmt::Debug for Append {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parts, conditions, durability, bytes, ids, invalid, .. } = self;
        let mut shown = f.debug_struct("Append");
        shown
            .field("parts", parts)
            .field("conditions", conditions)
            .field("durability", durability)
            .field("ids", ids);
        shown.field("len_bytes", &bytes.len()).field("invalid", invalid).finish()
    }
}

/// The answer to an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The events were appended now. They are what the token's [`Durability`] says.
    New(Receipt),
    /// They had been appended before, under the same ids; this is the first result. They are durable.
    Duplicate(Receipt),
}

impl Appended {
    /// Where the events are.
    #[must_use]
    pub const fn receipt(&self) -> &Receipt {
        match self {
            Self::New(receipt) | Self::Duplicate(receipt) => receipt,
        }
    }

    #[cfg(feature = "views")]
    pub(crate) const fn receipt_mut(&mut self) -> &mut Receipt {
        match self {
            Self::New(receipt) | Self::Duplicate(receipt) => receipt,
        }
    }

    /// The token to wait for in a view, here or in another service.
    #[must_use]
    pub const fn token(&self) -> Token {
        self.receipt().token
    }
}

/// Where appended events are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The token to wait for in a view, here or in another service.
    pub token: Token,
    /// The place of each event, in the order in which they were given.
    pub events: Vec<Placed>,
    /// Inline views that have not applied the events. The events are durable all the same, and must not be appended
    /// again.
    pub behind: Vec<ViewBehind>,
}

/// An inline view that has not applied what was appended, because it has stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ViewBehind {
    /// The view.
    pub view: &'static str,
    /// A stable name of the kind of error.
    pub code: &'static str,
    /// Why.
    pub reason: String,
}

/// The place of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its position in the journal.
    pub position: Position,
    /// Its revision in its stream.
    pub revision: Revision,
}
