//! Events newest first: of everything, or of one stream.
//!
//! Batches are linked forward only, so going back is going forward from a place that the index knows, at most
//! 64 KiB or one batch in front, and giving out in reverse what was read. What is taken is what it costs, but
//! for that one piece.

use std::sync::Arc;

use crate::error::ReadError;
use crate::event::{Names, Recorded, Revision, StreamId};
use crate::format::sidecar::Posting;
use crate::journal::cursor::Cursor;
use crate::journal::gaps;
use crate::journal::maps::Order;
use crate::journal::read::{POSTINGS_AT_A_TIME, StreamBatches};
use crate::journal::segments::{Segment, Wanted};
use crate::journal::{Journal, read};
use crate::position::Position;

/// Events in reverse journal order, down to the first one. An error ends it: [`ReadError::Truncated`] where the
/// events in front were removed.
#[derive(Debug)]
pub struct EventsBackward {
    journal: Journal,
    /// What is ready and what was given out lies at or behind this.
    before: Position,
    /// The last one is next.
    ready: Vec<Recorded>,
    /// In front of what is ready events are missing.
    gap: Option<ReadError>,
    names: Names,
    failed: bool,
}

/// The events of one stream in reverse order, down to the first one. An error ends it:
/// [`ReadError::TruncatedStream`] where the events in front were removed.
#[derive(Debug)]
pub struct StreamEventsBackward {
    batches: StreamBatches,
    /// `None` in front of the first one.
    next: Option<Revision>,
    /// Number of the segment that holds the next one.
    segment: u64,
    /// What was looked up in that segment; the last one is next.
    postings: Option<(Arc<Segment>, Vec<Posting>)>,
    /// The last one is next.
    ready: Vec<Recorded>,
    failed: bool,
}

impl Journal {
    /// The events in front of `before`, the newest first. From the end: `read_all_backward(end().position)`.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `before` lies behind the durable end.
    pub fn read_all_backward(&self, before: Position) -> Result<EventsBackward, ReadError> {
        let end = self.end().position;
        if before > end {
            return Err(ReadError::BeyondEnd { position: before, end });
        }
        Ok(EventsBackward {
            journal: self.clone(),
            before,
            ready: Vec::new(),
            gap: None,
            names: Names::default(),
            failed: false,
        })
    }

    /// The events of a stream, the newest first: from revision `from` on, or from its last event. None if
    /// there is no such stream. Reading the last few events of a stream costs what these few cost.
    ///
    /// ```
    /// # use headwater::{Append, ExpectedRevision, NewEvent, Revision, Store, StreamId};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::create(dir.path().join("orders"))?;
    /// let order = StreamId::new("order-7")?;
    /// let events = (0..5).map(|_| NewEvent::raw("order.changed", *b"x")).collect::<Result<Vec<_>, _>>()?;
    /// store.append(&Append::to(&order, ExpectedRevision::NoStream, events))?;
    /// let last_two = store.journal().read_stream_backward(&order, None)?.take(2);
    /// let revisions = last_two.map(|event| Ok(event?.revision().get()));
    /// assert_eq!(revisions.collect::<Result<Vec<_>, headwater::ReadError>>()?, [4, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ReadError`] if an index can't be read.
    pub fn read_stream_backward(
        &self,
        stream: &StreamId,
        from: Option<Revision>,
    ) -> Result<StreamEventsBackward, ReadError> {
        let head = self.stream_head(stream)?;
        let next = head.map(|head| from.map_or(head, |from| from.min(head)));
        let segment = next.map_or(Ok(0), |next| self.first_segment_with(stream, next))?;
        Ok(StreamEventsBackward {
            batches: StreamBatches::new(self, stream),
            next,
            segment,
            postings: None,
            ready: Vec::new(),
            failed: false,
        })
    }
}

impl EventsBackward {
    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Ok(Some(event));
            }
            if let Some(error) = self.gap.take() {
                return Err(error);
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Reads the piece that ends at `before`; `false` if there is nothing in front of it.
    fn fill(&mut self) -> Result<bool, ReadError> {
        let journal = &self.journal;
        let Some(last) = self.before.get().checked_sub(1).map(Position::new) else {
            return Ok(false);
        };
        journal.check_retained(last)?;
        if let Some(gap) = journal.gaps().at_position(last) {
            return Err(gaps::error(gap));
        }
        let Some(segment) = journal.segment_holding(last) else { return Ok(false) };
        let entry = journal.seek(&segment, last)?;
        let mut cursor = Cursor::new(journal, entry.offset, entry.position);
        while cursor.position() < self.before {
            match cursor.next_batch() {
                Ok(Some(batch)) => {
                    read::decode(journal, &batch, self.before, &mut self.names, &mut self.ready)?;
                }
                Ok(None) => return Ok(false),
                Err(error) => {
                    let Some(_) = cursor.skip_gap() else { return Err(error) };
                    self.ready.clear();
                    self.gap = Some(error);
                }
            }
        }
        match self.ready.first() {
            Some(first) => self.before = first.position(),
            None => return Ok(false),
        }
        Ok(true)
    }
}

impl Iterator for EventsBackward {
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

impl StreamEventsBackward {
    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        let Some(next) = self.next else { return Ok(None) };
        loop {
            if let Some(event) = self.ready.pop() {
                self.next = event.revision().get().checked_sub(1).map(Revision::new);
                return Ok(Some(event));
            }
            let Some((segment, posting)) = self.next_posting(next)? else { return Ok(None) };
            let events = self
                .batches
                .events(&segment, &posting, |revision| revision <= next)
                .map_err(|error| self.batches.or_truncated(next, posting.position, error))?;
            // As when reading forward: the index goes by count.
            if events.last().is_none_or(|event| event.revision() != next) {
                let gap = self.batches.journal.gaps().behind(posting.position);
                return Err(self.batches.misplaced(&segment, &posting, gap));
            }
            if let Some((_, postings)) = &mut self.postings {
                while postings.last().is_some_and(|p| p.batch_offset == posting.batch_offset) {
                    postings.pop();
                }
            }
            self.ready = events;
        }
    }

    fn next_posting(
        &mut self,
        next: Revision,
    ) -> Result<Option<(Arc<Segment>, Posting)>, ReadError> {
        let (journal, stream) = (&self.batches.journal, &self.batches.stream);
        loop {
            if let Some((segment, postings)) = &mut self.postings
                && let Some(posting) = postings.pop()
            {
                return Ok(Some((Arc::clone(segment), posting)));
            }
            let wanted = Wanted::UpTo(next, POSTINGS_AT_A_TIME);
            let found = journal.postings(self.segment, stream, wanted)?;
            let Some((segment, found)) = found else { return Ok(None) };
            if !found.is_empty() {
                self.postings = Some((segment, found));
                continue;
            }
            let numbers = journal.sealed_numbers().start..segment.number();
            match journal.holder(stream, numbers, Order::LastToFirst)? {
                Some((holder, _)) => self.segment = holder.number(),
                // What was in front of it is lost, or was removed.
                None => {
                    journal.check_stream(stream, next)?;
                    let lost = journal.gaps().in_front_of(segment.base_position());
                    return lost.map_or(Ok(None), |gap| Err(gaps::error(gap)));
                }
            }
        }
    }
}

impl Iterator for StreamEventsBackward {
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
