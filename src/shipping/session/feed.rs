//! What a filtered feed is made of on the origin's side: the journal's batches, in the service's public shape, sifted.
//!
//! ```text
//!   place ─▶ batch ─ batch ─ batch ─▶ events of the feed ─▶ run, with everything in front of them and between them skipped
//!                    … up to 1 MiB ─▶ none ─▶ passed: told together, 200 ms later at the latest
//! ```
//! - A run ends at a batch end, and is about batches of one opening of the origin.
//! - It has about one frame of events, or is that of one batch, however long.
//! - It speaks of no session: it is made once for all who are at the same place of the same feed.

use std::collections::VecDeque;
use std::sync::Arc;

use super::frames::follows;
use super::origin::{Source, SourceError, end_of};
use crate::event::{Names, Recorded};
use crate::format::batch::BatchRef;
use crate::format::record::RecordRef;
use crate::position::{Checkpoint, JournalId, Position};
use crate::shipping::message::{FeedTerms, RUN_BYTES_MAX, RunWriter};
use crate::shipping::shape::Shape;

/// So many bytes of the journal are looked at before it is somebody else's turn.
const SIFTED_BYTES_MAX: u64 = 1 << 20;

/// What makes a feed as it was granted.
#[derive(Debug)]
pub(crate) struct Sieve {
    pub(crate) terms: Arc<FeedTerms>,
    shape: Option<Shape>,
}

/// The bytes of a run, as they are sent, and where it ends.
#[derive(Debug)]
pub(crate) struct MadeRun {
    pub(crate) bytes: Vec<u8>,
    pub(crate) behind: Checkpoint,
}

/// From where on is sifted, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) at: Checkpoint,
    /// A run has about so many bytes at the most, unless it is that of one batch.
    pub(crate) run_bytes: usize,
    /// The run ends here: a part of it was sent already.
    pub(crate) end: Option<Checkpoint>,
}

/// What is behind a place.
#[derive(Clone, Debug)]
pub(crate) enum Sifted {
    Run(Arc<MadeRun>),
    /// Nothing of the feed up to here; more may follow.
    Passed(Checkpoint),
    /// That is the durable end.
    Nothing,
    /// There is something, and this source doesn't look at it.
    OnDisk,
}

impl Sieve {
    pub(crate) fn new(terms: Arc<FeedTerms>, shape: Option<Shape>) -> Self {
        Self { terms, shape }
    }

    /// Adds what the batch has for the feed.
    fn add(
        &self,
        batch: &BatchRef<'_>,
        journal: JournalId,
        run: &mut RunWriter,
    ) -> Result<(), SourceError> {
        let (mut position, mut bytes) = (batch.header.base_position, batch.body());
        let mut names = Names::default();
        for _ in 0..batch.header.count {
            let decoded = RecordRef::decode(bytes);
            let (record, rest) = decoded.map_err(|_| SourceError::Corrupt { position })?;
            let own = bytes.get(..bytes.len() - rest.len()).unwrap_or_default();
            // What the journal keeps for itself is nobody else's.
            if !record.event_type.starts_with('$') {
                let at = (position, batch.header.time_us);
                self.add_event(&record, own, at, journal, &mut names, run)?;
            }
            if run.len() > RUN_BYTES_MAX as usize {
                let reason = "what is published for this batch is too long".into();
                return Err(SourceError::Shape { position, reason });
            }
            (bytes, position) = (rest, position.advance(1));
        }
        Ok(())
    }

    fn add_event(
        &self,
        record: &RecordRef<'_>,
        bytes: &[u8],
        (position, time_us): (Position, i64),
        journal: JournalId,
        names: &mut Names,
        run: &mut RunWriter,
    ) -> Result<(), SourceError> {
        let filter = &self.terms.filter;
        let Some(shape) = &self.shape else {
            if filter.matches_record(record) {
                run.add(position, time_us, bytes);
            }
            return Ok(());
        };
        let event = Recorded::from_record(record, journal, position, time_us, names);
        let failed = |reason: String| SourceError::Shape { position, reason: reason.into() };
        for published in shape.publish(&event, record, bytes).map_err(failed)? {
            let matches = RecordRef::decode(&published)
                .is_ok_and(|(record, _)| filter.matches_record(&record));
            if matches {
                run.add(position, time_us, &published);
            }
        }
        Ok(())
    }
}

/// Makes the next run. What can't be read or published is told once everything in front of it was sent.
pub(crate) fn sift<S: Source + ?Sized>(
    source: &mut S,
    span: &Span,
    sieve: &Sieve,
) -> Result<Sifted, SourceError> {
    let (at, run_bytes) = (&span.at, span.run_bytes);
    let (mut run, mut end) = (RunWriter::new(at.position), *at);
    let failed = loop {
        let added = match source.next_batch(&end) {
            Ok(Some((batch, _))) if follows(&batch, &end) => {
                let has_begun = end.position > at.position;
                let next = end_of(&batch, at.journal);
                if has_begun && next.incarnation != end.incarnation {
                    break None;
                }
                let mark = run.mark();
                let added = sieve.add(&batch, at.journal, &mut run);
                // A batch that is too long for a frame has a run of its own.
                let is_too_long = !mark.is_empty() && run.len() > run_bytes;
                if added.is_err() || is_too_long {
                    run.back_to(mark);
                }
                added.map(|()| (!is_too_long).then_some(next))
            }
            Ok(Some(_)) => Err(SourceError::Corrupt { position: end.position }),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        match added {
            Ok(Some(next)) => end = next,
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
        let is_enough = run.len() >= run_bytes || end.offset - at.offset >= SIFTED_BYTES_MAX;
        if is_enough || span.end == Some(end) {
            break None;
        }
    };
    match failed {
        _ if !run.is_empty() => {
            Ok(Sifted::Run(Arc::new(MadeRun { bytes: run.finish(&end), behind: end })))
        }
        _ if end.position > at.position => Ok(Sifted::Passed(end)),
        Some(error) => Err(error),
        None => Ok(Sifted::Nothing),
    }
}

/// How many bytes of runs (or SKIPs, each taken for one) are under way, and what has to be acknowledged for them to be no more.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    runs: VecDeque<(u64, u64)>,
    bytes: u64,
}

impl InFlight {
    /// A run that ends at `offset`. At most `count_max` are counted one by one: of more, the last ones are taken for one.
    pub(crate) fn add(&mut self, offset: u64, bytes: u64, count_max: usize) {
        self.bytes += bytes;
        let count = self.runs.len();
        match self.runs.back_mut() {
            Some(last) if count >= count_max => *last = (offset, last.1 + bytes),
            _ => self.runs.push_back((offset, bytes)),
        }
    }

    pub(crate) fn acknowledged(&mut self, offset: u64) {
        while self.runs.front().is_some_and(|(end, _)| *end <= offset) {
            self.bytes -= self.runs.pop_front().map_or(0, |(_, bytes)| bytes);
        }
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }
}
