//! Events for users: iterators over everything or one stream, and subscriptions that go on for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::event::{Recorded, Revision, StreamId};
use crate::format::FormatError;
use crate::format::batch::BatchRef;
use crate::format::sidecar::Posting;
use crate::journal::gaps;
use crate::journal::scan::file_offset;
use crate::journal::segments::{self, Segment};
use crate::journal::{Cursor, Journal};
use crate::position::{JournalId, Position};

/// How many postings of a stream are looked up at a time.
const POSTINGS_AT_A_TIME: usize = 1024;

/// Events in journal order, up to the durable end. At the end it answers `None`, and goes on when there is
/// more. An error ends it.
#[derive(Debug)]
pub struct Events {
    cursor: Cursor,
    from: Position,
    ready: VecDeque<Recorded>,
    failed: bool,
}

/// The events of one stream, in order, up to the durable end. An error ends it.
#[derive(Debug)]
pub struct StreamEvents {
    journal: Journal,
    stream: StreamId,
    /// `None` behind the last revision that there can be.
    next: Option<Revision>,
    /// Number of the segment to look into next.
    segment: u64,
    /// What was looked up in that segment.
    postings: Option<(Arc<Segment>, VecDeque<Posting>)>,
    ready: VecDeque<Recorded>,
    failed: bool,
}

/// What a [`Subscription`] delivers.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly every item is an event; a box each would cost more"
)]
pub enum Item {
    /// The next event.
    Event(Recorded),
    /// Everything that was durable has been delivered; said once each time that becomes true.
    CaughtUp {
        /// The durable end that was reached.
        end: Position,
    },
    /// Events that were lost and accepted as lost; the subscription goes on behind them.
    Gap {
        /// Position of the first lost event.
        from: Position,
        /// Position behind the last lost event.
        to: Position,
    },
}

/// Catch-up and live in one loop: delivers every event from a position on, as it becomes durable.
#[derive(Debug)]
pub struct Subscription {
    events: Events,
    caught_up_at: Option<Position>,
}

impl Journal {
    /// All events from `from` on.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end; others if the journal can't be read.
    pub fn read_all(&self, from: Position) -> Result<Events, ReadError> {
        let cursor = self.cursor(from)?;
        Ok(Events { cursor, from, ready: VecDeque::new(), failed: false })
    }

    /// The events of a stream from revision `from` on; none if there is no such stream.
    ///
    /// # Errors
    /// [`ReadError`] if an index can't be read.
    pub fn read_stream(
        &self,
        stream: &StreamId,
        from: Revision,
    ) -> Result<StreamEvents, ReadError> {
        Ok(StreamEvents {
            journal: self.clone(),
            stream: stream.clone(),
            next: Some(from),
            segment: self.first_segment_with(stream, from)?,
            postings: None,
            ready: VecDeque::new(),
            failed: false,
        })
    }

    /// The segment in which to begin: walking back from the end, the one that holds `from`.
    fn first_segment_with(&self, stream: &StreamId, from: Revision) -> Result<u64, ReadError> {
        let all = self.0.segments.read().all.clone();
        let mut first = all.last().map_or(0, |segment| segment.number());
        for segment in all.iter().rev() {
            if let Some(span) = self.span(segment, stream)? {
                first = segment.number();
                if span.first <= from {
                    break;
                }
                if span.first == Revision::FIRST {
                    break;
                }
            }
        }
        Ok(first)
    }

    /// Every event from `from` on, and then live.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end; others if the journal can't be read.
    pub fn subscribe(&self, from: Position) -> Result<Subscription, ReadError> {
        Ok(Subscription { events: self.read_all(from)?, caught_up_at: None })
    }

    /// The events of the batch that an index names.
    pub(super) fn batch_events(
        &self,
        segment: &Segment,
        posting: &Posting,
    ) -> Result<Vec<Recorded>, ReadError> {
        if let Some(gap) = self.gaps().at_offset(posting.batch_offset) {
            return Err(gaps::error(gap));
        }
        let end = self.end();
        let mut window = self.0.files.window(segment.number())?;
        let base = segment.base_offset();
        let limit = file_offset(base, self.limit(segment, &end));
        let at = file_offset(base, posting.batch_offset);
        let read = window.batch(at, limit, segment.page.header.salt)?;
        let batch = match read {
            Ok(batch) if batch.header.offset == posting.batch_offset => batch,
            Ok(_) => {
                let error = FormatError::Invalid("batch offset");
                return Err(segments::unreadable(&window, at, posting.position, error));
            }
            Err(error) => return Err(segments::unreadable(&window, at, posting.position, error)),
        };
        let mut events = Vec::with_capacity(batch.header.count as usize);
        decode(&batch, self.id(), Position::START, &mut events)
            .map_err(|error| segments::unreadable(&window, at, posting.position, error))?;
        Ok(events)
    }
}

/// Decodes the events of a batch from `from` on.
fn decode(
    batch: &BatchRef<'_>,
    journal: JournalId,
    from: Position,
    out: &mut impl Extend<Recorded>,
) -> Result<(), FormatError> {
    let mut position = batch.header.base_position;
    for record in batch.records() {
        let record = record?;
        if position >= from {
            let event = Recorded::from_record(&record, journal, position, batch.header.time_us);
            out.extend([event]);
        }
        position = position.advance(1);
    }
    Ok(())
}

/// Decodes the next batch's events from `from` on into `ready`; whether there was a batch.
fn fill(
    cursor: &mut Cursor,
    journal: JournalId,
    from: Position,
    ready: &mut VecDeque<Recorded>,
) -> Result<bool, ReadError> {
    let position = cursor.position();
    let dir = cursor.journal().dir().to_owned();
    let Some(batch) = cursor.next_batch()? else { return Ok(false) };
    let at = batch.file_offset();
    decode(&batch.batch, journal, from, ready).map_err(|error| {
        ReadError::Corruption(Corruption {
            path: dir.join(format!("{:016x}.seg", batch.segment)),
            file_offset: at,
            position,
            kind: CorruptionKind::Record(error),
        })
    })?;
    Ok(true)
}

impl Events {
    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let journal = self.cursor.journal().id();
            if !fill(&mut self.cursor, journal, self.from, &mut self.ready)? {
                return Ok(None);
            }
        }
    }

    fn position(&self) -> Position {
        self.ready.front().map_or(self.cursor.position(), Recorded::position)
    }
}

impl Iterator for Events {
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

impl StreamEvents {
    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        let Some(next) = self.next else { return Ok(None) };
        loop {
            while let Some(event) = self.ready.pop_front() {
                if event.revision() == next {
                    self.next = Some(next.next()).filter(|behind| *behind > next);
                    return Ok(Some(event));
                }
            }
            let Some((segment, posting)) = self.next_posting(next)? else { return Ok(None) };
            let mut events = self.journal.batch_events(&segment, &posting)?;
            events.retain(|event| event.stream() == &self.stream && event.revision() >= next);
            // The index goes by count. A faulty or hostile writer may have left a gap; looking again would
            // find the same batch for ever.
            if events.first().is_none_or(|event| event.revision() != next) {
                return Err(self.misplaced(&segment, &posting));
            }
            // All of the batch's events of this stream come at once.
            if let Some((_, postings)) = &mut self.postings {
                while postings.front().is_some_and(|p| p.batch_offset == posting.batch_offset) {
                    postings.pop_front();
                }
            }
            self.ready.extend(events);
        }
    }

    /// Revisions are missing in front of this event: lost, or never written.
    fn misplaced(&self, segment: &Segment, posting: &Posting) -> ReadError {
        if let Some(gap) = self.journal.gaps().in_front_of(posting.position) {
            return gaps::error(gap);
        }
        ReadError::Corruption(Corruption {
            path: self.journal.0.layout.segment(segment.number()),
            file_offset: file_offset(segment.base_offset(), posting.batch_offset),
            position: posting.position,
            kind: CorruptionKind::Record(FormatError::Invalid("revision")),
        })
    }

    fn next_posting(
        &mut self,
        next: Revision,
    ) -> Result<Option<(Arc<Segment>, Posting)>, ReadError> {
        loop {
            if let Some((segment, postings)) = &mut self.postings
                && let Some(posting) = postings.pop_front()
            {
                return Ok(Some((Arc::clone(segment), posting)));
            }
            let found =
                self.journal.postings(self.segment, &self.stream, next, POSTINGS_AT_A_TIME)?;
            let Some((segment, found)) = found else { return Ok(None) };
            match found.is_empty() {
                false => self.postings = Some((segment, found.into())),
                true if segment.sealed.is_some() => self.segment = segment.number() + 1,
                // The active segment may have been sealed meanwhile; the next call looks again.
                true => return Ok(None),
            }
        }
    }
}

impl Iterator for StreamEvents {
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

impl Subscription {
    /// The position of the next event.
    #[must_use]
    pub fn position(&self) -> Position {
        self.events.position()
    }

    /// The next item; `None` if nothing came within `timeout`, or the journal was closed and everything
    /// has been delivered.
    ///
    /// Blocks up to `timeout`.
    ///
    /// # Errors
    /// [`ReadError`]; nothing is skipped: the next call tries the same place again.
    pub fn next(&mut self, timeout: Duration) -> Result<Option<Item>, ReadError> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            match self.events.step() {
                Ok(Some(event)) => {
                    self.caught_up_at = None;
                    return Ok(Some(Item::Event(event)));
                }
                Ok(None) => {}
                Err(error) => {
                    let lost = self.events.cursor.skip_gap().ok_or(error)?;
                    return Ok(Some(Item::Gap { from: lost.start, to: lost.end }));
                }
            }
            let position = self.events.position();
            if self.caught_up_at.is_none() {
                self.caught_up_at = Some(position);
                return Ok(Some(Item::CaughtUp { end: position }));
            }
            let left = deadline.map_or(timeout, |at| at.saturating_duration_since(Instant::now()));
            let journal = self.events.cursor.journal();
            if journal.wait_past(position, left).position <= position {
                return Ok(None);
            }
        }
    }
}
