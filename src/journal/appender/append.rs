//! What an append is given and what it answers.

use std::collections::HashSet;

use crate::error::InvalidAppend;
use crate::event::{EventId, ExpectedRevision, NewEvent, Revision, StreamId};
use crate::format::sidecar::id_hash;
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
#[derive(Clone, Debug, Default)]
pub struct Append {
    pub(super) parts: Vec<Part>,
    pub(super) durability: Durability,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) stream: StreamId,
    pub(super) expected: ExpectedRevision,
    pub(super) events: Vec<NewEvent>,
}

impl Append {
    /// Events for one stream.
    #[must_use]
    pub fn to(
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Self {
        Self::default().and_to(stream, expected, events)
    }

    /// Events for a further stream, in the same batch.
    #[must_use]
    pub fn and_to(
        mut self,
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Self {
        let events = events.into_iter().collect();
        self.parts.push(Part { stream: stream.clone(), expected, events });
        self
    }

    /// A condition on a stream that isn't written.
    #[must_use]
    pub fn and_expect(self, stream: &StreamId, expected: ExpectedRevision) -> Self {
        self.and_to(stream, expected, [])
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

    /// Verifies what can be verified without the journal. `hashes` are those of the ids, in order.
    pub(super) fn check(&self, hashes: &[u64]) -> Result<(), InvalidAppend> {
        let mut streams = HashSet::new();
        for part in &self.parts {
            if self.parts.len() > 1 && !streams.insert(&part.stream) {
                return Err(InvalidAppend::RepeatedStream(part.stream.clone()));
            }
            part.events.iter().try_for_each(NewEvent::check)?;
        }
        if hashes.is_empty() {
            return Err(InvalidAppend::Empty);
        }
        self.repeated_id(hashes).map_or(Ok(()), |id| Err(InvalidAppend::RepeatedId(id)))
    }

    /// Sorting the hashes is quicker than a set of the ids, which is asked only if two are the same.
    fn repeated_id(&self, hashes: &[u64]) -> Option<EventId> {
        let mut sorted = hashes.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).all(|pair| pair.first() != pair.last()) {
            return None;
        }
        let mut seen = HashSet::new();
        self.ids().find(|id| !seen.insert(*id))
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = EventId> {
        self.parts.iter().flat_map(|part| &part.events).map(|event| event.id)
    }

    pub(super) fn id_hashes(&self) -> Vec<u64> {
        self.ids().map(|id| id_hash(&id)).collect()
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
}

/// The place of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its position in the journal.
    pub position: Position,
    /// Its revision in its stream.
    pub revision: Revision,
}
