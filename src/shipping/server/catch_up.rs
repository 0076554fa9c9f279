//! The threads that may wait for the disk: they compare histories and long filters, and read for those whose next batch isn't in
//! memory any more. A connection gets a turn of some frames, and goes back to the loop.
//!
//! Nothing is heard of a peer in the meantime, so its deadlines aren't either: the time stands still for it. What it is
//! told of a comparison it answers in its own time, from when the connection is back.
//!
//! A panic in the middle of a turn costs that connection alone: one that wasn't given back would have no deadline, and a
//! thread that ended would be missing for good.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::Shared;
use super::connection::{Connection, Step, TURN};
use super::feeds::Feed;
use crate::error::ReadError;
use crate::format::batch::{BatchRef, Link};
use crate::format::files::Witness;
use crate::format::segment::SegmentPage;
use crate::journal::{Comparison, Cursor};
use crate::position::{Checkpoint, Position};
use crate::shipping::message::Speaker;
use crate::shipping::session::{
    Limits, Place, Sieve, Sifted, Source, SourceError, Span, Supply, pack, sift,
};
use crate::shipping::transport;

/// So many cursors are kept from one turn to the next, with the files that they have open.
const CURSORS_MAX: usize = 32;
/// And with so many bytes, or the one that was used last: each holds 256 KiB, or a whole batch that is longer.
const CURSORS_BYTES_MAX: usize = 16 << 20;

/// What the catch-up threads have in common.
#[derive(Debug)]
pub(super) struct CatchUp {
    shared: Arc<Shared>,
    turns: Receiver<Box<Connection>>,
    back: Sender<Box<Connection>>,
    /// Those of connections whose turn was over before they were through.
    cursors: Mutex<Vec<(usize, Cursor)>>,
}

impl CatchUp {
    pub(super) fn new(
        shared: &Arc<Shared>,
        turns: Receiver<Box<Connection>>,
        back: Sender<Box<Connection>>,
    ) -> Self {
        Self { shared: Arc::clone(shared), turns, back, cursors: Mutex::default() }
    }

    /// Until nobody sends connections any more.
    pub(super) fn run(&self) {
        for mut connection in &self.turns {
            if !self.shared.is_stopping() {
                let turn = AssertUnwindSafe(|| self.advance(&mut connection));
                if catch_unwind(turn).is_err() {
                    connection.has_panicked();
                }
            }
            drop(self.back.send(connection));
            self.shared.wake();
        }
    }

    /// While others wait, a turn is one frame: all of them are to be heard of before their peers give them up.
    fn advance(&self, connection: &mut Connection) {
        let frames = if self.turns.is_empty() { TURN } else { 1 };
        let Some(feed) = connection.feed.clone() else { return };
        let cursor = self.cursor_of(connection.token);
        let mut source = OnDisk { shared: &self.shared, feed: &feed, cursor };
        let step = connection.advance(&mut source, transport::now(), frames);
        if let (Step::Again | Step::Wait { for_more: false, .. }, Some(cursor)) =
            (step, source.cursor)
        {
            self.keep(connection.token, cursor);
        }
    }

    fn cursor_of(&self, token: usize) -> Option<Cursor> {
        let mut cursors = self.cursors.lock();
        let at = cursors.iter().position(|(owner, _)| *owner == token)?;
        Some(cursors.remove(at).1)
    }

    fn keep(&self, token: usize, cursor: Cursor) {
        let mut cursors = self.cursors.lock();
        cursors.push((token, cursor));
        let held_bytes = |cursors: &[(usize, Cursor)]| {
            cursors.iter().map(|(_, cursor)| cursor.held_bytes()).sum::<usize>()
        };
        while cursors.len() > CURSORS_MAX
            || (cursors.len() > 1 && held_bytes(&cursors) > CURSORS_BYTES_MAX)
        {
            cursors.remove(0);
        }
    }

    /// The connection is closed.
    pub(super) fn forget(&self, token: usize) {
        self.cursors.lock().retain(|(owner, _)| *owner != token);
    }
}

/// The journal, wherever it lies.
struct OnDisk<'a> {
    shared: &'a Shared,
    feed: &'a Feed,
    cursor: Option<Cursor>,
}

impl From<ReadError> for SourceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corruption(corruption) => Self::Corrupt { position: corruption.position },
            ReadError::Gap { from, .. } => Self::Corrupt { position: from },
            ReadError::Truncated { first } => Self::Truncated { first },
            _ => Self::Storage,
        }
    }
}

impl Source for OnDisk<'_> {
    fn end(&self) -> Checkpoint {
        self.feed.journal.end()
    }

    fn start(&self) -> Checkpoint {
        self.feed.journal.start()
    }

    fn speaker(&self) -> Speaker {
        self.feed.speaker()
    }

    fn is_closed(&self) -> bool {
        self.feed.journal.is_closed()
    }

    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError> {
        let journal = &self.feed.journal;
        match journal.compare(checkpoint)? {
            // A mirror has been told that its origin has something else there.
            Comparison::Ahead if journal.has_set_aside(checkpoint) => Ok(Comparison::Differs),
            compared => Ok(compared),
        }
    }

    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError> {
        let (offset, position, chain) = (witness.offset, witness.position, witness.chain);
        Ok(self.feed.journal.compare_place(offset, position, chain)?)
    }

    fn batch_end_at(&mut self, position: Position) -> Result<Option<Link>, SourceError> {
        Ok(self.feed.journal.batch_end_at(position)?.map(Link::from))
    }

    fn seek(&mut self, from: Position) -> Result<(), SourceError> {
        self.cursor = Some(self.feed.journal.cursor(from)?);
        Ok(())
    }

    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        let journal = &self.feed.journal;
        let cursor = self.cursor.get_or_insert_with(|| journal.cursor_at(at));
        cursor.go_to(at);
        Ok(cursor.next_batch()?.map(|next| (next.batch, next.page)))
    }

    fn supply(&mut self, from: &Place, limits: &Limits) -> Result<Supply, SourceError> {
        // Whoever is live goes first.
        drop(self.shared.live_first.lock());
        Ok(pack(self, from, limits)?.map_or(Supply::Nothing, Supply::Piece))
    }

    fn sift(&mut self, span: &Span, sieve: &Arc<Sieve>) -> Result<Sifted, SourceError> {
        drop(self.shared.live_first.lock());
        if let Some(run) = self.shared.runs.get(self.feed.number, span, sieve) {
            return Ok(Sifted::Run(run));
        }
        let sifted = sift(self, span, sieve)?;
        if let Sifted::Run(run) = &sifted {
            self.shared.runs.keep(self.feed.number, span, sieve, run);
        }
        Ok(sifted)
    }
}
