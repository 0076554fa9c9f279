//! Queries: events by type and tags, across streams.
//!
//! ```text
//!  query = item OR item OR …          item = (any of these types) AND (all of these tags)
//!
//!  read_query(query, from) ─▶ events … up to `position`        decide
//!                                          │
//!  append ── and_expect_none(query, position): nobody has appended another one meanwhile
//! ```

use twox_hash::XxHash3_64;

use crate::error::ReadError;
use crate::event::{Names, Recorded};
use crate::format::record::RecordRef;
use crate::journal::{Cursor, Journal};
use crate::position::Position;

/// Which events are meant: those that one of its items matches.
///
/// ```
/// use headwater::{Query, QueryItem};
/// let query = Query::any_of([
///     QueryItem::tags(["course:7"]).and_types(["course.booked", "course.left"]),
///     QueryItem::types(["course.cancelled"]),
/// ]);
/// assert_eq!(query.items().len(), 2);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    items: Vec<QueryItem>,
}

/// A part of a [`Query`]: matches events of any of its types that have all of its tags. Without types it matches
/// those of every type; without both, every event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueryItem {
    types: Vec<String>,
    tags: Vec<String>,
}

impl Query {
    /// What any of the items matches; without items, nothing.
    #[must_use]
    pub fn any_of(items: impl IntoIterator<Item = QueryItem>) -> Self {
        Self { items: items.into_iter().collect() }
    }

    /// Its items.
    #[must_use]
    pub fn items(&self) -> &[QueryItem] {
        &self.items
    }

    /// Whether an event is meant.
    #[must_use]
    pub fn matches<E>(&self, event: &Recorded<E>) -> bool {
        let has_tag = |tag: &String| event.tags().contains(tag);
        self.items.iter().any(|item| item.matches(event.event_type().as_str(), has_tag))
    }

    pub(crate) fn matches_record(&self, record: &RecordRef<'_>) -> bool {
        let has_tag = |wanted: &String| record.tags().any(|tag| tag == wanted);
        self.items.iter().any(|item| item.matches(record.event_type, has_tag))
    }
}

impl From<QueryItem> for Query {
    fn from(item: QueryItem) -> Self {
        Self { items: vec![item] }
    }
}

impl QueryItem {
    /// Events of any of these types.
    #[must_use]
    pub fn types<T: Into<String>>(types: impl IntoIterator<Item = T>) -> Self {
        Self::default().and_types(types)
    }

    /// Events with all of these tags.
    #[must_use]
    pub fn tags<T: Into<String>>(tags: impl IntoIterator<Item = T>) -> Self {
        Self::default().and_tags(tags)
    }

    /// Adds types.
    #[must_use]
    pub fn and_types<T: Into<String>>(mut self, types: impl IntoIterator<Item = T>) -> Self {
        self.types.extend(types.into_iter().map(Into::into));
        self
    }

    /// Adds tags.
    #[must_use]
    pub fn and_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.tags.extend(tags.into_iter().map(Into::into));
        self
    }

    fn matches(&self, event_type: &str, has_tag: impl Fn(&String) -> bool) -> bool {
        let of_type = self.types.is_empty() || self.types.iter().any(|name| name == event_type);
        of_type && self.tags.iter().all(has_tag)
    }

    /// The hashes of its types and of its tags.
    pub(crate) fn labels(&self) -> (Vec<u64>, Vec<u64>) {
        let types = self.types.iter().map(|name| type_label(name));
        (types.collect(), self.tags.iter().map(|tag| tag_label(tag)).collect())
    }
}

/// What an event is looked up by: its type, and each of its tags, as a hash. Two may have the same; whoever asks
/// confirms a hit by reading.
pub(crate) fn labels_of(record: &RecordRef<'_>) -> Vec<u64> {
    let tags = record.tags().map(tag_label);
    std::iter::once(type_label(record.event_type)).chain(tags).collect()
}

fn type_label(name: &str) -> u64 {
    XxHash3_64::oneshot_with_seed(0, name.as_bytes())
}

fn tag_label(tag: &str) -> u64 {
    XxHash3_64::oneshot_with_seed(1, tag.as_bytes())
}

/// The events that a query means, in journal order, up to the durable end. At the end it answers `None`, and goes
/// on when there is more. An error ends it.
#[derive(Debug)]
pub struct QueryEvents {
    cursor: Cursor,
    query: Query,
    from: Position,
    /// What is ready of the batch that was read last, the next one last.
    ready: Vec<Recorded>,
    names: Names,
    failed: bool,
}

impl Journal {
    /// The events from `from` on that a query means. Reads every batch from there on.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end, [`ReadError::Truncated`] if the event
    /// there was removed; others if the journal can't be read.
    pub fn read_query(&self, query: &Query, from: Position) -> Result<QueryEvents, ReadError> {
        Ok(QueryEvents {
            cursor: self.cursor(from)?,
            query: query.clone(),
            from,
            ready: Vec::new(),
            names: Names::default(),
            failed: false,
        })
    }
}

impl QueryEvents {
    /// How far it has looked: no event in front of this position, from where it began, is meant but those that
    /// were given out. Once it has answered `None`, decide, and append
    /// [expecting none](crate::Append::and_expect_none) from here on.
    #[must_use]
    pub fn position(&self) -> Position {
        self.ready.last().map_or_else(|| self.cursor.position().max(self.from), Recorded::position)
    }

    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Ok(Some(event));
            }
            let journal = self.cursor.journal().clone();
            let Some(batch) = self.cursor.next_batch()? else { return Ok(None) };
            let header = &batch.batch.header;
            let mut position = header.base_position;
            for record in batch.batch.records() {
                let record = record.map_err(|error| batch.unreadable(&journal, error))?;
                if position >= self.from && self.query.matches_record(&record) {
                    let (id, time_us, names) = (journal.id(), header.time_us, &mut self.names);
                    let event = Recorded::from_record(&record, id, position, time_us, names);
                    self.ready.push(event);
                }
                position = position.advance(1);
            }
            self.ready.reverse();
        }
    }
}

impl Iterator for QueryEvents {
    type Item = Result<Recorded, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}
