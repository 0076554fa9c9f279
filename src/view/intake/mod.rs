//! In which order the batches of several journals are taken in, and that it is recorded.
//!
//! ```text
//! journal a  ──▶ 0 … 5         5 … 9
//! journal b  ──────────▶ 0 … 3       ──▶ …
//! log           a up to 5 │ b up to 3 │ a up to 9 │ …      every view over a and b follows it,
//!                                                          live, behind a crash, and when it is built anew
//! ```
//! Within a journal the order is the journal's. Between journals somebody has to decide: the first view that has folded
//! all that is recorded takes what the journals have by then, one behind the other, and records that before it folds it.
//!
//! Invariants:
//! - Nothing is folded that isn't recorded, durably, so a view is never ahead of the log. What has been seen in a row comes
//!   back in every other generation, of whichever view.
//! - There is one log for a set of journals in a folder of views, whichever the views, versions and processes are.
//! - A run ends at a batch end, and carries the chain there: a log that is of another history of a journal is found out.
//! - A view over one journal has no log; its order is the journal's.

mod log;
#[cfg(test)]
#[cfg(feature = "test-kit")]
mod tests;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::error::{StopError, ViewError};
use super::generation::LOCK_PATIENCE;
use super::rebuild::Cancelled;
use super::runner::beginning;
use super::sources::{Checkpoints, Sources};
use crate::error::ReadError;
use crate::format::batch::Link;
pub(super) use crate::format::intake::Run;
use crate::fs::Fs;
use crate::journal::{Comparison, Cursor, Journal};
use crate::position::{Checkpoint, JournalId, Position};
pub(crate) use log::logs;
use log::{Log, Mark};

/// Why the order can't be followed.
#[derive(Debug)]
pub(super) enum Failed {
    Journal(ReadError),
    Log(ViewError),
}

impl From<ReadError> for Failed {
    fn from(error: ReadError) -> Self {
        Self::Journal(error)
    }
}

impl From<ViewError> for Failed {
    fn from(error: ViewError) -> Self {
        Self::Log(error)
    }
}

impl From<crate::error::IoError> for Failed {
    fn from(error: crate::error::IoError) -> Self {
        Self::Log(error.into())
    }
}

impl Failed {
    /// Somebody else is recording, and nothing is wrong.
    pub(super) const fn is_in_use(&self) -> bool {
        matches!(self, Self::Log(ViewError::InUse { .. }))
    }

    pub(super) fn stop(self, view: &'static str) -> StopError {
        match self {
            Self::Journal(source) => StopError::Journal { view, source },
            Self::Log(source) => StopError::Intake { view, source: Box::new(source) },
        }
    }
}

/// How the journals of a view are taken in.
#[derive(Clone, Debug)]
pub(super) struct Intake {
    /// `None` of a single journal.
    log: Option<Arc<Log>>,
}

impl Intake {
    /// Opens the log, shared with all views over these journals; begins one if there is none.
    pub(super) fn open(
        fs: &Arc<dyn Fs>,
        views_dir: &Path,
        sources: &Sources,
    ) -> Result<Self, ViewError> {
        let has_several = !sources.others().is_empty();
        let open = || Log::shared(fs, views_dir, sources.ids());
        Ok(Self { log: has_several.then(open).transpose()? })
    }

    /// As it is recorded by now, for looking only; `None` if it isn't.
    #[cfg(feature = "cli")]
    pub(super) fn read_only(
        fs: &Arc<dyn Fs>,
        views_dir: &Path,
        sources: &Sources,
    ) -> Result<Option<Self>, ViewError> {
        if sources.others().is_empty() {
            return Ok(Some(Self { log: None }));
        }
        let log = Log::read_only(fs, views_dir, sources.ids())?;
        Ok(log.map(|log| Self { log: Some(Arc::new(log)) }))
    }

    /// Up to where the journal was taken in last.
    pub(super) fn end_of(&self, journal: JournalId) -> Option<Checkpoint> {
        self.log.as_ref().map(|log| checkpoint(journal, log.end_of(journal)))
    }

    /// Forgets what is of a history that a journal has no more. For whoever knows that nothing of it is the witness of a loss
    /// that nobody has accepted.
    pub(super) fn heed(&self, sources: &Sources) -> Result<(), ViewError> {
        self.log.as_ref().map_or(Ok(()), |log| log.heed(sources))
    }

    /// Whether rows of these checkpoints were made in the recorded order.
    pub(super) fn leads_to(&self, at: &Checkpoints) -> Result<bool, ViewError> {
        self.log.as_ref().map_or(Ok(true), |log| log.leads_to(at))
    }

    /// The recorded order, for somebody else; `None` of a single journal.
    pub(super) fn bytes(&self) -> Result<Option<Vec<u8>>, ViewError> {
        self.log.as_ref().map(|log| log.bytes()).transpose()
    }

    /// Goes by an order that was recorded elsewhere, by which rows of `at` were made; false if it is another one than here.
    pub(super) fn install(
        &self,
        bytes: Option<&[u8]>,
        at: &Checkpoints,
    ) -> Result<bool, ViewError> {
        match (&self.log, bytes) {
            (None, None) => Ok(true),
            (Some(log), Some(bytes)) => log.install(bytes, at),
            _ => Ok(false),
        }
    }

    fn runs(&self, sources: &Sources) -> Runs {
        let (log, read) = (self.log.clone(), VecDeque::new());
        let mark = log.as_ref().map(|log| log.beginning());
        let only = endless(sources.first().id());
        let read = if log.is_some() { read } else { VecDeque::from([only]) };
        Runs { log: log.zip(mark), read }
    }

    /// Records all that the journals have when this is called, whatever comes meanwhile. How far they are in the recorded order,
    /// where all of it is there: a mirror may have less than was recorded. `None` if it was cancelled.
    pub(super) fn take_all(
        &self,
        sources: &Sources,
        mut check: impl FnMut() -> Result<(), Cancelled>,
    ) -> Result<Option<Checkpoints>, Failed> {
        let ends = sources.end();
        let Some(log) = &self.log else { return Ok(Some(ends)) };
        while has_more(log, &ends) {
            extend(log, log.mark(), sources, u64::MAX, LOCK_PATIENCE)?;
            if check().is_err() {
                return Ok(None);
            }
        }
        let mut reached = sources.beginning();
        let mut runs = self.runs(sources);
        let is_short =
            |it: &Checkpoints| ends.iter().any(|end| it.position(end.journal) < end.position);
        while is_short(&reached)
            && let Some(run) = runs.peek()?
        {
            let is_there = |it: &Journal| it.end().position >= run.end.position;
            if !sources.get(run.journal).is_some_and(is_there) {
                break;
            }
            reached = reached.moved(checkpoint(run.journal, run.end));
            runs.pop();
        }
        Ok(Some(reached))
    }
}

fn checkpoint(journal: JournalId, Link { offset, position, chain }: Link) -> Checkpoint {
    Checkpoint { offset, position, chain, ..beginning(journal) }
}

/// Of a journal that has no others beside it.
fn endless(journal: JournalId) -> Run {
    let end = Link { position: Position::new(u64::MAX), ..beginning(journal).into() };
    Run { journal, end }
}

/// Whether the journals have something that isn't recorded, if they end there.
fn has_more(log: &Log, ends: &Checkpoints) -> bool {
    ends.iter().any(|end| end.position > log.end_of(end.journal).position)
}

/// Records what the journals have behind `mark`: of each up to its end, or about so many bytes. Others may
/// be recording for so long.
fn extend(
    log: &Log,
    mark: Mark,
    sources: &Sources,
    bytes: u64,
    patience: Duration,
) -> Result<(), Failed> {
    log.extend(mark, patience, |end_of| {
        let run = |journal: &Journal| -> Option<Result<Run, Failed>> {
            let from = end_of(journal.id());
            let end = journal.end();
            let reach = || {
                if !continues(journal, from) {
                    return Err(log.stale().into());
                }
                Ok(Run { journal: journal.id(), end: reach(journal, from, end, bytes)? })
            };
            (end.position > from.position).then(reach)
        };
        sources.iter().filter_map(run).collect()
    })
}

/// Whether what was recorded last of a journal is in its present history: a mirror that has lost its end may go on in
/// another way. What can't be read is told by whoever gets there.
fn continues(journal: &Journal, Link { offset, position, chain }: Link) -> bool {
    let compared = journal.compare_place(offset, position, chain);
    position == Position::START || matches!(compared, Ok(Comparison::Equal) | Err(_))
}

/// A batch end about so many bytes behind `from`, but at least one batch.
fn reach(journal: &Journal, from: Link, end: Checkpoint, bytes: u64) -> Result<Link, ReadError> {
    let there = end.offset.saturating_sub(from.offset);
    if there <= bytes {
        return Ok(end.into());
    }
    let events = u128::from(end.position.since(from.position));
    let events = events * u128::from(bytes) / u128::from(there);
    let about = from.position.advance(u64::try_from(events).unwrap_or(u64::MAX));
    match journal.batch_end_at(about) {
        Ok(Some(found)) if found.position > from.position => Ok(found.into()),
        Ok(Some(_)) => {
            let mut cursor = journal.cursor(from.position)?;
            let next = cursor.next_batch()?.map(|batch| batch.end());
            Ok(next.unwrap_or(end).into())
        }
        // Removed, lost or damaged: whoever gets there is told.
        Ok(None) | Err(_) => Ok(end.into()),
    }
}

/// The recorded runs, from the first one on.
struct Runs {
    log: Option<(Arc<Log>, Mark)>,
    /// Those that were read from the log already.
    read: VecDeque<Run>,
}

impl Runs {
    fn peek(&mut self) -> Result<Option<Run>, ViewError> {
        if let (true, Some((log, mark))) = (self.read.is_empty(), &mut self.log) {
            self.read.extend(log.next(mark)?);
        }
        Ok(self.read.front().copied())
    }

    fn pop(&mut self) {
        self.read.pop_front();
    }
}

/// Reads on in the journals, in the order of their intake.
pub(super) struct Course {
    sources: Sources,
    runs: Runs,
    cursors: Vec<Cursor>,
    /// For how long others may be recording what comes next.
    patience: Duration,
}

/// How far a journal is read before something else is done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    /// About so many bytes, or one batch.
    pub(super) bytes: u64,
    /// In front of this position.
    pub(super) position: Position,
    /// Where it is another journal's turn, and what the journal is there.
    end: Link,
}

impl Limit {
    const fn in_run(bytes: u64, run: Run) -> Self {
        Self { bytes, position: run.end.position, end: run.end }
    }

    #[cfg(test)]
    pub(super) fn of(bytes: u64) -> Self {
        Self::in_run(bytes, endless(JournalId::from_bytes([0; 16])))
    }

    /// Whether a batch that ends there can be taken in: a run that doesn't end where one of its batches does is of another
    /// history.
    pub(super) fn allows(&self, end: &Checkpoint) -> bool {
        end.position < self.end.position || Link::from(*end) == self.end
    }
}

impl Course {
    /// Goes on behind `from`.
    pub(super) fn new(
        sources: &Sources,
        intake: &Intake,
        from: &Checkpoints,
    ) -> Result<Self, Failed> {
        let cursor = |journal: &Journal| journal.cursor(from.position(journal.id()));
        let cursors = sources.iter().map(cursor).collect::<Result<_, _>>()?;
        let (sources, runs) = (sources.clone(), intake.runs(sources));
        Ok(Self { sources, runs, cursors, patience: LOCK_PATIENCE })
    }

    /// For who can do something else meanwhile: others may be recording for so long, or it is refused as in use.
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Which journal is read next behind `at`, and how far; `None` if no journal has more. What isn't recorded yet is, about
    /// so many bytes of each journal.
    pub(super) fn next(
        &mut self,
        at: &Checkpoints,
        bytes: u64,
    ) -> Result<Option<(&mut Cursor, Limit)>, Failed> {
        let run = loop {
            match self.runs.peek()? {
                Some(run) if at.position(run.journal) < run.end.position => break run,
                Some(_) => self.runs.pop(),
                None => {
                    let Some((log, mark)) = &self.runs.log else { return Ok(None) };
                    if log.mark() == *mark {
                        if !has_more(log, &self.sources.end()) {
                            return Ok(None);
                        }
                        extend(log, *mark, &self.sources, bytes, self.patience)?;
                    }
                }
            }
        };
        let limit = Limit::in_run(bytes, run);
        let cursor = self.cursors.iter_mut().find(|it| it.journal().id() == run.journal);
        Ok(cursor.map(|cursor| (cursor, limit)))
    }
}

/// Batches of one journal that begin at `from` or behind it, in front of `to`.
pub(super) struct Stretch {
    pub(super) journal: JournalId,
    pub(super) from: Position,
    pub(super) to: Position,
    limit: Limit,
}

impl Stretch {
    /// As [`Limit::allows`].
    pub(super) fn allows(&self, end: &Checkpoint) -> bool {
        self.limit.allows(end)
    }
}

/// All that is in front of `until`, in the order of intake, in pieces.
pub(super) struct Pieces<'a> {
    runs: Runs,
    until: &'a Checkpoints,
    /// What is in the pieces already; offsets are about right.
    reached: Checkpoints,
}

impl<'a> Pieces<'a> {
    /// From the very first event on: where events were removed, the first one can't be read, and says so.
    pub(super) fn new(sources: &Sources, intake: &Intake, until: &'a Checkpoints) -> Self {
        Self { runs: intake.runs(sources), until, reached: sources.beginning() }
    }

    /// The next piece, of about so many bytes; empty at the end.
    pub(super) fn next(&mut self, bytes: u64) -> Result<Vec<Stretch>, ViewError> {
        let mut piece = Vec::new();
        let mut left = bytes.max(1);
        while left > 0 && !self.is_at_end() {
            let Some(run) = self.runs.peek()? else { break };
            let (Some(from), Some(until)) =
                (self.reached.of(run.journal), self.until.of(run.journal))
            else {
                break;
            };
            let end = Checkpoint { offset: run.end.offset, position: run.end.position, ..until };
            let to = if run.end.position <= until.position { end } else { until };
            if to.position <= from.position {
                self.runs.pop();
                continue;
            }
            let there = to.offset.saturating_sub(from.offset);
            let events = to.position.since(from.position);
            let part = u128::from(events) * u128::from(left) / u128::from(there.max(1));
            let part = u64::try_from(part).unwrap_or(u64::MAX).max(1);
            let (journal, from, limit) = (run.journal, from.position, Limit::in_run(bytes, run));
            if part >= events {
                piece.push(Stretch { journal, from, to: to.position, limit });
                self.reached = self.reached.moved(to);
                left = left.saturating_sub(there.max(1));
            } else {
                let position = from.advance(part);
                let offset = to.offset.saturating_sub(there - left.min(there));
                piece.push(Stretch { journal, from, to: position, limit });
                self.reached = self.reached.moved(Checkpoint { position, offset, ..to });
                left = 0;
            }
        }
        Ok(piece)
    }

    fn is_at_end(&self) -> bool {
        self.until.iter().all(|end| self.reached.position(end.journal) >= end.position)
    }
}
