//! Events for users: iterators over everything or one stream, and subscriptions that go on for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::event::{Names, Recorded, Revision, StreamId};
use crate::format::FormatError;
use crate::format::batch::BatchRef;
use crate::format::gaps::Gap;
use crate::format::record::RecordRef;
use crate::format::sidecar::Posting;
use crate::journal::gaps;
use crate::journal::maps::Order;
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::{self, Segment, Wanted};
use crate::journal::{Cursor, CursorBatch, Journal};
use crate::position::Position;

/// How many postings of a stream are looked up at a time.
pub(super) const POSTINGS_AT_A_TIME: usize = 1024;

/// Events in journal order, up to the durable end. At the end it answers `None`, and goes on when there is
/// more. An error ends it.
#[derive(Debug)]
pub struct Events {
    cursor: Cursor,
    from: Position,
    held: Held,
    failed: bool,
}

/// The events of one stream, in order, up to the durable end. An error ends it.
#[derive(Debug)]
pub struct StreamEvents {
    batches: StreamBatches,
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
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end, [`ReadError::Truncated`] if the event
    /// there was removed; others if the journal can't be read.
    pub fn read_all(&self, from: Position) -> Result<Events, ReadError> {
        let cursor = self.cursor(from)?;
        let held = Held::default();
        Ok(Events { cursor, from, held, failed: false })
    }

    /// The events of a stream from revision `from` on; none if there is no such stream.
    ///
    /// # Errors
    /// [`ReadError::TruncatedStream`] if events from there on were removed; others if an index can't be read.
    pub fn read_stream(
        &self,
        stream: &StreamId,
        from: Revision,
    ) -> Result<StreamEvents, ReadError> {
        self.check_stream(stream, from)?;
        Ok(StreamEvents {
            batches: StreamBatches::new(self, stream),
            next: Some(from),
            segment: self.first_segment_with(stream, from)?,
            postings: None,
            ready: VecDeque::new(),
            failed: false,
        })
    }

    /// Refuses a revision whose event was removed.
    pub(crate) fn check_stream(&self, stream: &StreamId, from: Revision) -> Result<(), ReadError> {
        let Some(base) = self.base() else { return Ok(()) };
        match base.head(stream)? {
            Some(head) if from <= head => {
                Err(ReadError::TruncatedStream { stream: stream.clone(), first: head.next() })
            }
            _ => Ok(()),
        }
    }

    /// The segment in which to begin: the last one whose events of the stream begin at or in front of `from`.
    pub(super) fn first_segment_with(
        &self,
        stream: &StreamId,
        from: Revision,
    ) -> Result<u64, ReadError> {
        // Under one lock: a segment that is being sealed is in one of the two.
        let (sealed, active) = {
            let segments = self.0.segments.read();
            let active = segments::span(&segments.active, stream.as_str());
            (segments.sealed_numbers(), active)
        };
        if from == Revision::FIRST {
            return self.holder_from(stream, sealed.start);
        }
        if active.is_some_and(|span| span.first <= from) {
            return Ok(sealed.end);
        }
        let last = self.holder(stream, sealed.clone(), Order::LastToFirst)?;
        let (mut low, mut high) = match last {
            Some((segment, span)) if span.first <= from => return Ok(segment.number()),
            Some((segment, _)) => (sealed.start, segment.number()),
            None => return Ok(sealed.end),
        };
        // Its revisions grow with the segments' numbers.
        let mut begin = None;
        while low < high {
            let middle = low + (high - low) / 2;
            match self.holder(stream, middle..high, Order::FirstToLast)? {
                Some((segment, span)) if span.first <= from => {
                    begin = Some(segment.number());
                    low = segment.number() + 1;
                }
                _ => high = middle,
            }
        }
        begin.map_or_else(|| self.holder_from(stream, sealed.start), Ok)
    }

    /// Number of the first segment from `number` on that holds the stream, or else of the active one.
    fn holder_from(&self, stream: &StreamId, number: u64) -> Result<u64, ReadError> {
        let sealed = self.sealed_numbers();
        let numbers = number..sealed.end.max(number);
        let found = self.holder(stream, numbers, Order::FirstToLast)?;
        Ok(found.map_or(sealed.end.max(number), |(segment, _)| segment.number()))
    }

    /// Every event from `from` on, and then live.
    ///
    /// # Errors
    /// As [`read_all`](Self::read_all).
    pub fn subscribe(&self, from: Position) -> Result<Subscription, ReadError> {
        Ok(Subscription { events: self.read_all(from)?, caught_up_at: None })
    }
}

/// Decodes the events of a batch that lie in front of `before`.
pub(super) fn decode(
    journal: &Journal,
    batch: &CursorBatch<'_>,
    before: Position,
    names: &mut Names,
    out: &mut Vec<Recorded>,
) -> Result<(), ReadError> {
    let (mut position, time_us) = (batch.batch.header.base_position, batch.batch.header.time_us);
    for record in batch.batch.records() {
        if position >= before {
            break;
        }
        let record = record.map_err(|error| batch.unreadable(journal, error))?;
        out.push(Recorded::from_record(&record, journal.id(), position, time_us, names));
        position = position.advance(1);
    }
    Ok(())
}

/// A batch of which some events are still to be given out.
#[derive(Debug, Default)]
pub(super) struct Held {
    body: Vec<u8>,
    /// Where the next record begins.
    at: usize,
    left: u32,
    position: Position,
    time_us: i64,
    segment: u64,
    file_offset: u64,
    names: Names,
}

impl Held {
    /// Takes the place of the batch that was held.
    fn hold(&mut self, batch: &CursorBatch<'_>) {
        self.body.clear();
        self.body.extend_from_slice(batch.batch.body());
        let header = &batch.batch.header;
        (self.at, self.left) = (0, header.count);
        (self.position, self.time_us) = (header.base_position, header.time_us);
        (self.segment, self.file_offset) = (batch.segment, batch.file_offset());
    }

    /// The next event at or behind `from`; `None` if there is none left. An error stays where it is.
    fn next(&mut self, journal: &Journal, from: Position) -> Result<Option<Recorded>, ReadError> {
        while self.left > 0 {
            let rest = self.body.get(self.at..).unwrap_or_default();
            let (record, behind) = RecordRef::decode(rest).map_err(|error| {
                ReadError::Corruption(Corruption {
                    path: journal.0.layout.segment(self.segment),
                    file_offset: self.file_offset,
                    position: self.position,
                    kind: CorruptionKind::Record(error),
                })
            })?;
            let position = self.position;
            let event = (position >= from).then(|| {
                let names = &mut self.names;
                Recorded::from_record(&record, journal.id(), position, self.time_us, names)
            });
            self.at = self.body.len() - behind.len();
            self.left -= 1;
            self.position = position.advance(1);
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }
}

/// Reads the batches that a stream's index names.
#[derive(Debug)]
pub(super) struct StreamBatches {
    pub(super) journal: Journal,
    pub(super) stream: StreamId,
    /// Of the segment that was read last.
    window: Option<(u64, Window)>,
    names: Names,
}

impl StreamBatches {
    pub(super) fn new(journal: &Journal, stream: &StreamId) -> Self {
        let (journal, stream) = (journal.clone(), stream.clone());
        Self { journal, stream, window: None, names: Names::default() }
    }

    /// The stream's events in the batch at a posting, of those revisions that are wanted.
    pub(super) fn events(
        &mut self,
        segment: &Segment,
        posting: &Posting,
        wanted: impl Fn(Revision) -> bool,
    ) -> Result<Vec<Recorded>, ReadError> {
        let journal = &self.journal;
        if let Some(gap) = journal.gaps().at_offset(posting.batch_offset) {
            return Err(gaps::error(gap));
        }
        let end = journal.end();
        let (base, salt) = (segment.base_offset(), segment.page.header.salt);
        let at = file_offset(base, posting.batch_offset);
        let run = journal.0.segments.read().recent.at(posting.batch_offset);
        let recent = run.as_ref().map(|run| run.bytes_from(posting.batch_offset));
        let batch = match recent.and_then(|bytes| BatchRef::decode(bytes, salt).ok()) {
            Some(batch) => Ok(batch),
            None => {
                let limit = file_offset(base, journal.limit(segment, &end));
                journal.enter_window(&mut self.window, segment)?.batch(at, limit, salt)?
            }
        };
        let path = || journal.0.layout.segment(segment.number());
        let unreadable = |error| segments::unreadable(path(), at, posting.position, error);
        let batch = batch.map_err(unreadable)?;
        if batch.header.offset != posting.batch_offset {
            return Err(unreadable(FormatError::Invalid("batch offset")));
        }
        let mut events = Vec::new();
        let mut position = batch.header.base_position;
        for record in batch.records() {
            let record = record.map_err(unreadable)?;
            if record.stream == self.stream.as_str() && wanted(record.revision) {
                let (id, time_us) = (journal.id(), batch.header.time_us);
                events.push(Recorded::from_record(&record, id, position, time_us, &mut self.names));
            }
            position = position.advance(1);
        }
        Ok(events)
    }

    /// A failure to read the event of revision `next`: perhaps it was removed meanwhile.
    pub(super) fn or_truncated(
        &self,
        next: Revision,
        position: Position,
        error: ReadError,
    ) -> ReadError {
        match self.journal.or_truncated(position, error) {
            ReadError::Truncated { first } => match self.journal.check_stream(&self.stream, next) {
                Err(error) => error,
                Ok(()) => ReadError::Truncated { first },
            },
            error => error,
        }
    }

    /// Revisions are missing beside this event: lost in `gap`, or never written.
    pub(super) fn misplaced(
        &self,
        segment: &Segment,
        posting: &Posting,
        gap: Option<&Gap>,
    ) -> ReadError {
        if let Some(gap) = gap {
            return gaps::error(gap);
        }
        ReadError::Corruption(Corruption {
            path: self.journal.0.layout.segment(segment.number()),
            file_offset: file_offset(segment.base_offset(), posting.batch_offset),
            position: posting.position,
            kind: CorruptionKind::Record(FormatError::Invalid("revision")),
        })
    }
}

impl Journal {
    fn enter_window<'w>(
        &self,
        window: &'w mut Option<(u64, Window)>,
        segment: &Segment,
    ) -> Result<&'w mut Window, ReadError> {
        let number = segment.number();
        let fresh = match window.take().filter(|(open, _)| *open == number) {
            Some(open) => open,
            None => (number, self.0.files.window(number)?),
        };
        Ok(&mut window.insert(fresh).1)
    }
}

impl Events {
    fn step(&mut self) -> Result<Option<Recorded>, ReadError> {
        loop {
            if let Some(event) = self.held.next(self.cursor.journal(), self.from)? {
                return Ok(Some(event));
            }
            let Some(batch) = self.cursor.next_batch()? else { return Ok(None) };
            self.held.hold(&batch);
        }
    }

    fn position(&self) -> Position {
        if self.held.left > 0 { self.held.position.max(self.from) } else { self.cursor.position() }
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
            let events = self
                .batches
                .events(&segment, &posting, |revision| revision >= next)
                .map_err(|error| self.batches.or_truncated(next, posting.position, error))?;
            // The index goes by count. A faulty or hostile writer may have left a gap; looking again would
            // find the same batch for ever.
            if events.first().is_none_or(|event| event.revision() != next) {
                // Or what comes next was removed while it was looked for.
                self.batches.journal.check_stream(&self.batches.stream, next)?;
                let gap = self.batches.journal.gaps().in_front_of(posting.position);
                return Err(self.batches.misplaced(&segment, &posting, gap));
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

    fn next_posting(
        &mut self,
        next: Revision,
    ) -> Result<Option<(Arc<Segment>, Posting)>, ReadError> {
        let (journal, stream) = (&self.batches.journal, &self.batches.stream);
        loop {
            if let Some((segment, postings)) = &mut self.postings
                && let Some(posting) = postings.pop_front()
            {
                return Ok(Some((Arc::clone(segment), posting)));
            }
            let wanted = Wanted::From(next, POSTINGS_AT_A_TIME);
            let found = journal.postings(self.segment, stream, wanted);
            let first = journal.retained().segment;
            if first > self.segment {
                // What was looked for may have been removed meanwhile.
                journal.check_stream(stream, next)?;
                self.segment = first;
                continue;
            }
            let Some((segment, found)) = found? else { return Ok(None) };
            match found.is_empty() {
                false => self.postings = Some((segment, found.into())),
                true if segment.sealed.is_some() => {
                    self.segment = journal.holder_from(stream, segment.number() + 1)?;
                }
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
                // Any other error keeps its place, though a gap may follow the batch that is held.
                Err(error) => {
                    let gap = matches!(error, ReadError::Gap { .. });
                    let lost = gap.then(|| self.events.cursor.skip_gap()).flatten();
                    let lost = lost.ok_or(error)?;
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
