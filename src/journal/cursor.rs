//! The reader that every follower is made of: durable batches, in order, verified.

use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, ReadError};
use crate::format::FormatError;
use crate::format::batch::BatchRef;
use crate::format::segment::SegmentPage;
use crate::journal::Journal;
use crate::journal::gaps;
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::Segment;
use crate::position::{Checkpoint, JournalId, Position};

/// Pulls durable batches from a journal. It never passes the durable end: at it,
/// [`next_batch`](Self::next_batch) answers `None`, and later more.
#[derive(Debug)]
pub struct Cursor {
    journal: Journal,
    offset: u64,
    position: Position,
    open: Option<(Arc<Segment>, Window)>,
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
    /// [`ReadError::BeyondEnd`] if `from` lies behind the durable end; others if the journal can't be read.
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
        Ok(Cursor { journal: self.clone(), offset, position, open: None })
    }
}

impl Cursor {
    /// The position of the next batch's first event.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.position
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
        let end = self.journal.end();
        if self.offset >= end.offset {
            return Ok(None);
        }
        if let Some(gap) = self.journal.gaps().at_offset(self.offset) {
            return Err(gaps::error(gap));
        }
        self.enter_segment()?;
        let Some((segment, window)) = &mut self.open else { return Ok(None) };
        let base = segment.base_offset();
        let limit = segment.sealed.as_ref().map_or(end.offset, |sealed| sealed.end.offset);
        let at = file_offset(base, self.offset);
        let (journal, position) = (&self.journal, self.position);
        let path = || journal.0.layout.segment(segment.number());
        let corruption = |kind| {
            ReadError::Corruption(Corruption { path: path(), file_offset: at, position, kind })
        };
        let batch = match window.batch(at, file_offset(base, limit), segment.page.header.salt)? {
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

    /// Makes sure that the open segment is the one that holds `self.offset`, and knows its end if it was
    /// sealed meanwhile.
    fn enter_segment(&mut self) -> Result<(), ReadError> {
        let stays = self.open.as_ref().is_some_and(|(segment, _)| match &segment.sealed {
            Some(sealed) => (segment.base_offset()..sealed.end.offset).contains(&self.offset),
            None => false,
        });
        if stays {
            return Ok(());
        }
        let Some(segment) = self.journal.segment_at(self.offset) else { return Ok(()) };
        match &mut self.open {
            Some((open, _)) if open.number() == segment.number() => *open = segment,
            open => {
                let window = self.journal.0.files.window(segment.number())?;
                *open = Some((segment, window));
            }
        }
        Ok(())
    }
}
