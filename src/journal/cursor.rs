//! The reader that every follower is made of: durable batches, in order, verified.
//!
//! ```text
//!   far behind ── pread, up to 256 KiB at a time ──▶ at the end ── runs that were just committed, shared ──▶
//! ```
//! Wherever the bytes come from, both checksums are verified before a batch is shown.

use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::format::FormatError;
use crate::format::batch::{BatchHeader, BatchRef};
use crate::format::segment::SegmentPage;
use crate::journal::Journal;
use crate::journal::gaps;
use crate::journal::recent::Run;
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::Segment;
use crate::position::{Checkpoint, JournalId, Position};

/// Pulls durable batches from a journal. It never passes the durable end: at it,
/// [`next_batch`](Self::next_batch) answers `None`, and later more.
///
/// What it shows is borrowed from its buffer: nothing is copied or allocated for an event.
///
/// ```
/// # use headwater::{Append, ExpectedRevision, NewEvent, Position, Store, StreamId};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::create(dir.path().join("orders"))?;
/// # let placed = NewEvent::raw("order.placed", *b"1250")?;
/// # store.append(&Append::to(&StreamId::new("order-7")?, ExpectedRevision::Any, [placed]))?;
/// let mut cursor = store.journal().cursor(Position::START)?;
/// let mut payload_bytes = 0;
/// while let Some(batch) = cursor.next_batch()? {
///     for record in batch.batch.records() {
///         let record = record?;
///         println!("{} {}", record.stream, record.event_type);
///         payload_bytes += record.payload.len();
///     }
/// }
/// assert_eq!(payload_bytes, 4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Cursor {
    journal: Journal,
    offset: u64,
    position: Position,
    /// How far was known to be durable when it was looked up last.
    end: Checkpoint,
    place: Option<Place>,
    /// Of the segment in `place`, once something was read from its file.
    window: Option<Window>,
    /// It never reads from the disk, and never passes `end` as it is now.
    in_memory: bool,
}

/// What holds the next batches.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) segment: Arc<Segment>,
    /// Up to here they are durable, and in this place.
    pub(super) limit: u64,
    /// They are still in memory.
    pub(super) recent: Option<Arc<Run>>,
}

/// A batch, borrowed from its cursor.
#[derive(Clone, Copy, Debug)]
pub struct CursorBatch<'a> {
    /// The batch.
    pub batch: BatchRef<'a>,
    /// The segment's header page, if this is the segment's first batch.
    pub page: Option<&'a SegmentPage>,
    /// The segment's number.
    pub segment: u64,
    journal: JournalId,
    base_offset: u64,
}

impl CursorBatch<'_> {
    /// Where the batch lies in its segment's file.
    #[must_use]
    pub fn file_offset(&self) -> u64 {
        file_offset(self.base_offset, self.batch.header.offset)
    }

    /// One of its records doesn't parse.
    pub(crate) fn unreadable(&self, journal: &Journal, error: FormatError) -> ReadError {
        ReadError::Corruption(Corruption {
            path: journal.0.layout.segment(self.segment),
            file_offset: self.file_offset(),
            position: self.batch.header.base_position,
            kind: CorruptionKind::Record(error),
        })
    }

    /// The checkpoint at the end of this batch.
    #[must_use]
    pub fn end(&self) -> Checkpoint {
        let header = &self.batch.header;
        Checkpoint {
            journal: self.journal,
            epoch: header.epoch,
            incarnation: header.incarnation,
            offset: header.end_offset(),
            position: header.end_position(),
            chain: header.chain,
        }
    }
}

impl Journal {
    /// A cursor at the batch that holds the event at `from`, or at the durable end.
    ///
    /// # Errors
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end, [`ReadError::Truncated`] if the event
    /// there was removed; others if the journal can't be read.
    pub fn cursor(&self, from: Position) -> Result<Cursor, ReadError> {
        let end = self.end();
        if from > end.position {
            return Err(ReadError::BeyondEnd { position: from, end: end.position });
        }
        let (offset, position) = match self.header_holding(from) {
            Ok(Some(header)) => (header.offset, header.base_position),
            Ok(None) => (end.offset, end.position),
            // At the gap: the first batch that is asked for tells.
            Err(error) => match self.gaps().at_position(from) {
                Some(gap) => (gap.from.offset, gap.from.position),
                None => return Err(error),
            },
        };
        Ok(Cursor::new(self, offset, position))
    }
}

impl Journal {
    /// A cursor behind a batch that ends at `at`, which is one of this history.
    #[cfg(feature = "shipping")]
    pub(crate) fn cursor_at(&self, at: &Checkpoint) -> Cursor {
        Cursor::new(self, at.offset, at.position)
    }
}

impl Cursor {
    /// At a batch that begins at `offset` and `position`.
    pub(super) fn new(journal: &Journal, offset: u64, position: Position) -> Self {
        let (journal, end) = (journal.clone(), journal.end());
        Self { journal, offset, position, end, place: None, window: None, in_memory: false }
    }

    /// At a batch end, up to another one. It shows what memory still holds, and nothing where it would have to
    /// read from the disk.
    #[cfg(feature = "shipping")]
    pub(crate) fn in_memory(journal: &Journal, at: &Checkpoint, end: Checkpoint) -> Self {
        let (journal, offset, position) = (journal.clone(), at.offset, at.position);
        Self { journal, offset, position, end, place: None, window: None, in_memory: true }
    }

    /// Goes on at another batch end. What lies in the window is read from there.
    #[cfg(feature = "shipping")]
    pub(crate) fn go_to(&mut self, at: &Checkpoint) {
        if (self.offset, self.position) != (at.offset, at.position) {
            (self.offset, self.position) = (at.offset, at.position);
            // Another run may hold it.
            self.place.take_if(|place| self.in_memory || place.recent.is_some());
        }
    }

    /// How much memory its buffer takes: at least the largest batch that it has come across.
    #[cfg(feature = "shipping")]
    pub(crate) fn held_bytes(&self) -> usize {
        self.window.as_ref().map_or(0, Window::held_bytes)
    }

    /// The position of the next batch's first event.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.position
    }

    /// The offset of the next batch.
    pub(super) const fn offset(&self) -> u64 {
        self.offset
    }

    /// The journal that is read.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The next batch, with both checksums verified; `None` at the durable end. Blocks for the disk only;
    /// to wait for more, use [`Journal::wait_past`].
    ///
    /// # Errors
    /// [`ReadError`]; the cursor stays where it is, nothing is skipped.
    pub fn next_batch(&mut self) -> Result<Option<CursorBatch<'_>>, ReadError> {
        if self.offset >= self.end.offset && !self.in_memory {
            self.end = self.journal.end();
        }
        if self.offset >= self.end.offset {
            return Ok(None);
        }
        self.journal.check_retained(self.position)?;
        if let Some(gap) = self.journal.gaps().at_offset(self.offset) {
            return Err(gaps::error(gap));
        }
        if !self.enter() {
            return Ok(None);
        }
        let in_memory = self.recent_header();
        if in_memory.is_none() && !self.in_memory {
            self.open_window()?;
        }
        let Some(Place { segment, limit, recent }) = &self.place else { return Ok(None) };
        let base = segment.base_offset();
        let at = file_offset(base, self.offset);
        let (journal, position) = (&self.journal, self.position);
        let path = || journal.0.layout.segment(segment.number());
        let corruption = |kind| {
            ReadError::Corruption(Corruption { path: path(), file_offset: at, position, kind })
        };
        let batch = match (in_memory, recent, &mut self.window) {
            (Some(header), Some(run), _) => {
                Ok(BatchRef::of_verified(header, run.bytes_from(self.offset)))
            }
            (.., Some(window)) => {
                window.batch(at, file_offset(base, *limit), segment.page.header.salt)?
            }
            (.., None) => return Ok(None),
        };
        let batch = match batch {
            Ok(batch) => batch,
            Err(source @ FormatError::Unsupported { .. }) => {
                return Err(ReadError::Unsupported { path: path(), source });
            }
            Err(error) => return Err(corruption(CorruptionKind::Batch(error))),
        };
        if batch.header.offset != self.offset || batch.header.base_position != self.position {
            return Err(corruption(CorruptionKind::Chain));
        }
        self.offset = batch.header.end_offset();
        self.position = batch.header.end_position();
        let first = batch.header.offset == base;
        Ok(Some(CursorBatch {
            batch,
            page: first.then_some(&segment.page),
            segment: segment.number(),
            journal: segment.page.header.journal,
            base_offset: base,
        }))
    }

    /// If [`next_batch`](Self::next_batch) has answered [`ReadError::Gap`]: goes on behind the lost events.
    /// Their positions; `None` if no event is missing here.
    pub fn skip_gap(&mut self) -> Option<std::ops::Range<Position>> {
        let gap = self.journal.gaps().at_offset(self.offset)?;
        let lost = gap.from.position..gap.to_position;
        (self.offset, self.position) = (gap.to_offset, gap.to_position);
        Some(lost)
    }

    /// Makes sure that `place` holds the next batch; `false` if there is none.
    fn enter(&mut self) -> bool {
        let stays = self
            .place
            .as_ref()
            .is_some_and(|place| (place.segment.base_offset()..place.limit).contains(&self.offset));
        if stays {
            return true;
        }
        let Some(place) = self.journal.place_of(self.offset, &self.end) else { return false };
        let same = self.place.as_ref().map(|old| old.segment.number());
        if place.recent.is_some() || same != Some(place.segment.number()) {
            self.window = None;
        }
        self.place = Some(place);
        true
    }

    /// The header of the next batch, if the batch is in memory and what is there is right.
    fn recent_header(&mut self) -> Option<BatchHeader> {
        let place = self.place.as_mut()?;
        let bytes = place.recent.as_ref()?.bytes_from(self.offset);
        match BatchRef::decode(bytes, place.segment.page.header.salt) {
            Ok(batch) => Some(batch.header),
            Err(_) => {
                place.recent = None; // the disk decides
                None
            }
        }
    }

    fn open_window(&mut self) -> Result<(), ReadError> {
        if let (None, Some(place)) = (&self.window, &self.place) {
            let window = self.journal.0.files.window(place.segment.number());
            let window =
                window.map_err(|error| self.journal.or_truncated(self.position, error.into()))?;
            self.window = Some(window);
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::event::{ExpectedRevision, NewEvent, StreamId};
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;

    #[test]
    fn a_batch_that_memory_holds_wrongly_is_read_from_the_disk() {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create(&fs, Path::new("/journal"), &options).unwrap();
        let stream = StreamId::new("a").unwrap();
        for text in [b"one", b"two"] {
            let event = NewEvent::raw("happened", *text).unwrap();
            appender.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
        }
        let journal = appender.journal();
        let mut cursor = journal.cursor(Position::START).unwrap();
        let mut wrong = cursor.next_batch().unwrap().unwrap().batch.bytes().to_vec();
        let first_end = cursor.offset;
        let at = wrong.windows(3).position(|bytes| bytes == b"one").unwrap();
        wrong[at] ^= 1;
        journal.0.segments.write().recent = crate::journal::recent::Recent::new(1 << 20);
        journal.0.segments.write().recent.push(first_end, wrong);
        let mut cursor = journal.cursor(Position::START).unwrap();
        for text in [b"one", b"two"] {
            let batch = cursor.next_batch().unwrap().unwrap();
            assert_eq!(batch.batch.records().next().unwrap().unwrap().payload, text);
        }
        assert!(cursor.next_batch().unwrap().is_none());
    }
}
