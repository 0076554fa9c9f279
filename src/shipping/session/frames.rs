//! Batches packed into frames: the same bytes for everybody who is at the same place.
//!
//! ```text
//!   place {end of a batch, bytes of the next one} ─▶ SEGMENT? DATA(batch, batch, batch) ─▶ place behind them
//!                                                    DATA(a part of a batch)
//! ```
//! - A piece is at most about one frame long, whatever the batches: one that is longer than a frame goes in
//!   several pieces.
//! - It speaks of no session, so it is packed once and sent to many.
//! - A frame's durable end is never in front of its batches.

use std::sync::Arc;

use super::origin::{Source, SourceError, end_of};
use crate::format::batch::BatchRef;
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::position::Checkpoint;
use crate::shipping::message::{
    DATA_FIXED_BYTES, Data, FRAME_HEADER_BYTES, FrameWriter, Message, OriginEnd,
};

/// How far somebody was sent a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The end of the last batch that was sent whole.
    pub(crate) end: Checkpoint,
    /// So many bytes of the next one were sent, too.
    pub(crate) part: usize,
}

/// How much is packed at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The longest payload of a frame.
    pub(crate) max_frame: u32,
    /// No batch is added to a piece of so many bytes.
    pub(crate) data_bytes: usize,
    /// Nor behind so many bytes of batches.
    pub(crate) room: u64,
}

/// Whole frames, to be sent as they are.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) bytes: Arc<Vec<u8>>,
    /// Where it ends.
    pub(crate) behind: Place,
}

/// Packs what the source has behind `from`; `None` if that is nothing. What can't be read is told once
/// everything in front of it was sent.
pub(crate) fn pack<S: Source + ?Sized>(
    source: &mut S,
    from: &Place,
    limits: &Limits,
) -> Result<Option<Piece>, SourceError> {
    let mut packer = Packer::new(OriginEnd::from(&source.end()), limits);
    let mut at = *from;
    let failed = loop {
        match source.next_batch(&at.end) {
            Ok(Some((batch, page))) if follows(&batch, &at.end) => {
                if !packer.add(&batch, page, &mut at) {
                    break None;
                }
            }
            Ok(Some(_)) => break Some(SourceError::Corrupt { position: at.end.position }),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let bytes = packer.finish();
    match failed {
        Some(error) if bytes.is_empty() => Err(error),
        _ if bytes.is_empty() => Ok(None),
        _ => Ok(Some(Piece { bytes: Arc::new(bytes), behind: at })),
    }
}

pub(super) fn follows(batch: &BatchRef<'_>, at: &Checkpoint) -> bool {
    batch.header.offset == at.offset && batch.header.base_position == at.position
}

struct Packer<'a> {
    limits: &'a Limits,
    bytes: Vec<u8>,
    /// A DATA frame that batches are added to, and its offset.
    open: Option<(FrameWriter, u64)>,
    /// The durable end as of the beginning, or the end of the last batch if that lies behind it.
    origin_end: OriginEnd,
    batch_bytes: u64,
}

impl<'a> Packer<'a> {
    fn new(origin_end: OriginEnd, limits: &'a Limits) -> Self {
        Self { limits, bytes: Vec::new(), open: None, origin_end, batch_bytes: 0 }
    }

    fn payload_max(&self) -> usize {
        self.limits.max_frame.saturating_sub(DATA_FIXED_BYTES).max(1) as usize
    }

    /// Adds a batch, or what there is still to be sent of it, and goes on to the place behind it; whether
    /// another one may follow. One that doesn't fit is left to the next piece.
    fn add(&mut self, batch: &BatchRef<'_>, page: Option<&SegmentPage>, at: &mut Place) -> bool {
        let rest = batch.bytes().get(at.part..).unwrap_or_default();
        let page = page.filter(|_| at.part == 0);
        if !self.bytes.is_empty() && self.len_with(rest.len(), page.is_some()) > self.piece_max() {
            return false;
        }
        if let Some(page) = page {
            self.close();
            Message::Segment(&page.bytes()).encode(&mut self.bytes);
        }
        let header = &batch.header;
        if header.end_offset() > self.origin_end.offset {
            let (offset, position) = (header.end_offset(), header.end_position());
            self.origin_end = OriginEnd { offset, position };
        }
        let behind = Place { end: end_of(batch, at.end.journal), part: 0 };
        if at.part > 0 || rest.len() > self.payload_max() {
            self.part(header.offset, rest, at, behind);
            return false;
        }
        self.open.get_or_insert_with(|| (FrameWriter::begin_data(&mut self.bytes), header.offset));
        self.bytes.extend_from_slice(rest);
        self.batch_bytes += rest.len() as u64;
        *at = behind;
        self.bytes.len() < self.limits.data_bytes && self.batch_bytes < self.limits.room
    }

    fn piece_max(&self) -> usize {
        FRAME_HEADER_BYTES + self.limits.max_frame as usize
    }

    fn len_with(&self, batch_bytes: usize, page: bool) -> usize {
        let frame_bytes = FRAME_HEADER_BYTES + DATA_FIXED_BYTES as usize;
        let page_bytes = if page { FRAME_HEADER_BYTES + HEADER_PAGE_BYTES } else { 0 };
        let opened = if page || self.open.is_none() { frame_bytes } else { 0 };
        self.bytes.len() + page_bytes + opened + batch_bytes
    }

    /// As much of a batch as one frame takes.
    fn part(&mut self, offset: u64, rest: &[u8], at: &mut Place, behind: Place) {
        let len = rest.len().min(self.payload_max());
        let offset = offset + at.part as u64;
        let continued = len < rest.len();
        let bytes = rest.get(..len).unwrap_or_default();
        let origin_end = self.origin_end;
        Message::Data(Data { offset, origin_end, continued, bytes }).encode(&mut self.bytes);
        match continued {
            true => at.part += len,
            false => *at = behind,
        }
    }

    fn close(&mut self) {
        if let Some((frame, offset)) = self.open.take() {
            let data = Data { offset, origin_end: self.origin_end, continued: false, bytes: &[] };
            frame.finish_data(&mut self.bytes, &data);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.close();
        self.bytes.shrink_to_fit();
        self.bytes
    }
}
