//! The journal as the event loop reads it: what memory holds, up to a durable end that it knows, each piece packed
//! once for all who are at the same place.

use std::sync::Arc;

use super::feeds::Feed;
use crate::format::batch::{BatchRef, Link};
use crate::format::files::Witness;
use crate::format::segment::SegmentPage;
use crate::journal::{Comparison, Cursor, Journal};
use crate::position::{Checkpoint, Position};
use crate::shipping::message::Speaker;
use crate::shipping::session::{
    Limits, Piece, Place, Sieve, Sifted, Source, SourceError, Span, Supply, pack,
};

/// So many pieces are kept: subscribers that follow closely are at one of a few places.
const PIECES_MAX: usize = 8;

#[derive(Debug)]
pub(super) struct Live {
    journal: Journal,
    /// What it is told as; `None`: as an origin's.
    feed: Option<Arc<Feed>>,
    end: Checkpoint,
    is_closed: bool,
    cursor: Option<Cursor>,
    /// What was packed last, and from where; they speak of `end`.
    pieces: Vec<(Place, u32, Piece)>,
}

impl Live {
    pub(super) fn new(journal: &Journal) -> Self {
        let (journal, end) = (journal.clone(), journal.end());
        Self { journal, feed: None, end, is_closed: false, cursor: None, pieces: Vec::new() }
    }

    pub(super) fn of(feed: &Arc<Feed>) -> Self {
        Self { feed: Some(Arc::clone(feed)), ..Self::new(&feed.journal) }
    }

    /// Learns how far the journal is durable by now.
    pub(super) fn renew(&mut self) {
        // In this order: the end of a journal that was closed before is the last.
        self.is_closed = self.journal.is_closed();
        let end = self.journal.end();
        if end.offset != self.end.offset {
            self.end = end;
            self.cursor = None;
            self.pieces.clear();
        }
    }
}

impl Source for Live {
    fn end(&self) -> Checkpoint {
        self.end
    }

    fn start(&self) -> Checkpoint {
        self.journal.start()
    }

    fn speaker(&self) -> Speaker {
        self.feed.as_ref().map_or(Speaker::Origin, |feed| feed.speaker())
    }

    fn is_closed(&self) -> bool {
        self.is_closed
    }

    fn may_wait(&self) -> bool {
        false
    }

    fn compare(&mut self, _: &Checkpoint) -> Result<Comparison, SourceError> {
        Err(SourceError::Storage)
    }

    fn compare_witness(&mut self, _: &Witness) -> Result<Comparison, SourceError> {
        Err(SourceError::Storage)
    }

    fn batch_end_at(&mut self, _: Position) -> Result<Option<Link>, SourceError> {
        Err(SourceError::Storage)
    }

    fn seek(&mut self, _: Position) -> Result<(), SourceError> {
        Err(SourceError::Storage)
    }

    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        let (journal, end) = (&self.journal, self.end);
        let cursor = self.cursor.get_or_insert_with(|| Cursor::in_memory(journal, at, end));
        cursor.go_to(at);
        Ok(cursor.next_batch()?.map(|next| (next.batch, next.page)))
    }

    fn supply(&mut self, from: &Place, limits: &Limits) -> Result<Supply, SourceError> {
        if from.end.offset >= self.end.offset {
            return Ok(Supply::Nothing);
        }
        // What is cut short by a window isn't for others.
        let is_shared = limits.room >= u64::from(limits.max_frame);
        let key = (*from, limits.max_frame);
        let known = self.pieces.iter().find(|(place, max, _)| (*place, *max) == key);
        if let (true, Some((.., piece))) = (is_shared, known) {
            return Ok(Supply::Piece(piece.clone()));
        }
        let Some(piece) = pack(self, from, limits)? else { return Ok(Supply::OnDisk) };
        if is_shared {
            if self.pieces.len() >= PIECES_MAX {
                self.pieces.remove(0);
            }
            self.pieces.push((key.0, key.1, piece.clone()));
        }
        Ok(Supply::Piece(piece))
    }

    /// What events are about, and the service's own code, are nothing for the loop.
    fn sift(&mut self, span: &Span, _: &Arc<Sieve>) -> Result<Sifted, SourceError> {
        let is_end = span.at.offset >= self.end.offset;
        Ok(if is_end { Sifted::Nothing } else { Sifted::OnDisk })
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::event::{ExpectedRevision, NewEvent, StreamId};
    use crate::format::files::Mark;
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;

    const LIMITS: Limits = Limits { max_frame: 8192, data_bytes: 8192, room: 1 << 20 };

    fn appender(recent_bytes_max: usize) -> Appender {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions {
            background_thread: false,
            recent_bytes_max,
            ..JournalOptions::default()
        };
        Appender::create(&fs, Path::new("/journal"), &options).unwrap()
    }

    fn append(appender: &Appender, payload_bytes: usize) {
        let event = NewEvent::raw("happened", vec![7; payload_bytes]).unwrap();
        let to = StreamId::new("a").unwrap();
        appender.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
    }

    fn live(appender: &Appender) -> Live {
        Live::new(appender.journal())
    }

    fn place(end: Checkpoint) -> Place {
        Place { end, part: 0 }
    }

    fn start(live: &Live) -> Place {
        place(Mark::start(live.end.journal).end)
    }

    fn piece(live: &mut Live, from: Place, limits: &Limits) -> Piece {
        match live.supply(&from, limits).unwrap() {
            Supply::Piece(piece) => piece,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn those_at_one_place_share_a_piece_and_none_passes_the_end_that_is_known() {
        let appender = appender(1 << 20);
        (0..3).for_each(|_| append(&appender, 100));
        let mut live = live(&appender);
        let from = start(&live);
        let first = piece(&mut live, from, &LIMITS);
        assert!(Arc::ptr_eq(&first.bytes, &piece(&mut live, from, &LIMITS).bytes));
        assert_eq!(first.behind, place(appender.journal().end()));
        let narrow = piece(&mut live, from, &Limits { room: 1, ..LIMITS });
        assert!(narrow.behind.end.offset < first.behind.end.offset, "cut short by its window");
        let known = live.end;
        append(&appender, 100);
        assert!(Arc::ptr_eq(&first.bytes, &piece(&mut live, from, &LIMITS).bytes));
        assert!(matches!(live.supply(&place(known), &LIMITS).unwrap(), Supply::Nothing));
        live.renew();
        let longer = piece(&mut live, from, &LIMITS);
        assert_eq!(longer.behind, place(appender.journal().end()));
        let rest = piece(&mut live, place(known), &LIMITS);
        assert_eq!(rest.behind, longer.behind);
    }

    #[test]
    fn what_memory_holds_no_more_is_left_to_others_also_when_it_is_asked_for_in_turns() {
        let appender = appender(4000);
        (0..20).for_each(|_| append(&appender, 900));
        let known = appender.journal().end();
        append(&appender, 900);
        let mut live = live(&appender);
        let from = start(&live);
        for _ in 0..3 {
            assert!(matches!(live.supply(&from, &LIMITS).unwrap(), Supply::OnDisk));
            live.pieces.clear();
            assert_eq!(piece(&mut live, place(known), &LIMITS).behind.end, live.end);
        }
    }

    #[test]
    fn a_batch_longer_than_a_frame_goes_in_pieces_of_one_frame() {
        let appender = appender(1 << 20);
        [100, 30_000, 100].into_iter().for_each(|bytes| append(&appender, bytes));
        let mut live = live(&appender);
        let (mut at, mut pieces) = (start(&live), 0);
        while at.end.offset < live.end.offset {
            let next = piece(&mut live, at, &LIMITS);
            assert!(next.bytes.len() <= 12 + 4108 + 8192, "{}", next.bytes.len());
            assert_ne!(next.behind, at);
            at = next.behind;
            pieces += 1;
        }
        assert_eq!((at, pieces), (place(live.end), 6));
    }
}
