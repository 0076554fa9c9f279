//! Queries: events by type and tags, across streams.
//!
//! ```text
//!  query = item OR item OR …          item = (any of these types) AND (all of these tags)
//!
//!  read_query(query, from) ─▶ events … up to `position`        decide
//!                                          │
//!  append ── and_expect_none(query, position): nobody has appended another one meanwhile
//! ```

use std::collections::VecDeque;
use std::io;

use crate::error::ReadError;
use crate::event::{Names, Recorded};
use crate::format::labels::{tag_label, type_label};
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
    /// Events of any of these types, as they are stored: upcasters aren't asked, so old names have to be named, too.
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

    pub(super) fn matches(&self, event_type: &str, has_tag: impl Fn(&String) -> bool) -> bool {
        let of_type = self.types.is_empty() || self.types.iter().any(|name| name == event_type);
        of_type && self.tags.iter().all(has_tag)
    }

    /// The hashes of its types and of its tags.
    pub(super) fn labels(&self) -> (Vec<u64>, Vec<u64>) {
        let types = self.types.iter().map(|name| type_label(name));
        (types.collect(), self.tags.iter().map(|tag| tag_label(tag)).collect())
    }
}

impl QueryItem {
    /// The places of events that have its labels, when each label has these; `None` if it asks for no label.
    fn places(
        &self,
        places_of: &dyn Fn(u64) -> io::Result<Vec<u32>>,
    ) -> io::Result<Option<Vec<u32>>> {
        let (types, tags) = self.labels();
        let mut found: Option<Vec<u32>> = None;
        if !types.is_empty() {
            let mut any = Vec::new();
            for label in types {
                any.extend(places_of(label)?);
            }
            any.sort_unstable();
            any.dedup();
            found = Some(any);
        }
        for label in tags {
            let mut places = places_of(label)?;
            if let Some(others) = &found {
                places.retain(|place| others.binary_search(place).is_ok());
            }
            found = Some(places);
        }
        Ok(found)
    }
}

impl Query {
    /// The places of events that may be meant, ascending; `None` if that can be any.
    pub(super) fn places(
        &self,
        places_of: &dyn Fn(u64) -> io::Result<Vec<u32>>,
    ) -> io::Result<Option<Vec<u32>>> {
        let mut all = Vec::new();
        for item in &self.items {
            let Some(places) = item.places(places_of)? else { return Ok(None) };
            all.extend(places);
        }
        all.sort_unstable();
        all.dedup();
        Ok(Some(all))
    }
}

/// The next place lies so few events ahead that reading on is quicker than looking it up.
const NEAR_EVENTS: u64 = 256;

/// The events that a query means, in journal order, up to the durable end. At the end it answers `None`, and goes
/// on when there is more. An error ends it.
#[derive(Debug)]
pub struct QueryEvents {
    cursor: Cursor,
    query: Query,
    from: Position,
    /// What is known of the segment that is read.
    part: Option<Part>,
    /// What is ready of the batch that was read last, the next one last.
    ready: Vec<Recorded>,
    names: Names,
    failed: bool,
}

/// A part of the journal, and where in it events may be that are meant.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) end: Position,
    /// `None`: anywhere.
    pub(super) places: Option<VecDeque<Position>>,
}

impl Journal {
    /// The events from `from` on that a query means.
    ///
    /// The active segment is read from there on. For sealed ones, files of labels (`*.lbl`, derived) say where
    /// events with a type or tag are: they are laid out when a query first comes through a segment, which
    /// reads it once; then a segment without such events costs a look-up of each type and tag, some pages of 4
    /// KiB.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end, [`ReadError::Truncated`] if the event
    /// there was removed; others if the journal can't be read.
    pub fn read_query(&self, query: &Query, from: Position) -> Result<QueryEvents, ReadError> {
        Ok(QueryEvents {
            cursor: self.cursor(from)?,
            query: query.clone(),
            from,
            part: None,
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
            self.go_ahead()?;
            if !self.read_batch()? {
                return Ok(None);
            }
        }
    }

    /// Passes over what can't hold an event that is meant.
    fn go_ahead(&mut self) -> Result<(), ReadError> {
        let journal = self.cursor.journal().clone();
        loop {
            let at = self.cursor.position();
            if self.part.as_ref().is_none_or(|part| part.end <= at) {
                self.part = journal.part_of(&self.query, at.max(self.from), self.cursor.offset());
            }
            let Some(Part { end, places: Some(places) }) = &mut self.part else { return Ok(()) };
            while places.front().is_some_and(|place| *place < at) {
                places.pop_front();
            }
            let next = places.front().copied();
            let wanted = next.unwrap_or(*end);
            if wanted.since(at) > NEAR_EVENTS || next.is_none() {
                self.cursor = journal.cursor(wanted)?;
            }
            if next.is_some() {
                return Ok(());
            }
            self.part = None;
        }
    }

    /// Reads the next batch; `false` if there is none.
    fn read_batch(&mut self) -> Result<bool, ReadError> {
        let journal = self.cursor.journal().clone();
        let Some(batch) = self.cursor.next_batch()? else { return Ok(false) };
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
        Ok(true)
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
