//! What follows a journal asks this of a view, of whichever kind.
//!
//! ```text
//! View ───────▶ Keyed ──┐
//!                       ├──▶ Program ──▶ runner, takeover: follow, rebuild, check, roll back
//! TableView ──▶ Tabled ─┘
//! ```

use std::sync::Arc;

use super::bulk::{self, Means};
use super::chunk::{Chunk, Folded};
use super::db::{Db, Identity, Progress};
use super::deadly::{Care, Note};
use super::error::{StopError, ViewError};
use super::intake::{Course, Intake};
use super::poison::{Parking, Rules};
use super::rebuild::{Control, RebuildError, RebuildHandle, RebuildOptions, RebuildPhase};
use super::runner::{Running, apply, collect, nothing};
use super::sources::{Checkpoints, Sources};
use super::takeover::{self, Source};
use super::{Comparison, Indexes, View, ViewMemory};
use crate::event::{Event, KnownKind};
use crate::journal::{CursorBatch, Journal};
use crate::position::Checkpoint;

/// So much of the journal is applied at once by a build in order.
const BUILD_CHUNK_BYTES: u64 = 4 << 20;

/// A view as those see it who don't care what its rows are.
pub(super) trait Program: Send + Sync + Sized + 'static {
    const NAME: &'static str;
    const VERSION: u32;
    /// Whether a new generation is built in another way than the journal is followed.
    const HAS_BULK: bool;
    /// The events that it knows; all if it names none.
    const KINDS: &'static [KnownKind];
    type Chunk: Batches<Self>;

    /// What a generation of it is.
    fn identity(&self) -> Identity;

    /// Builds the rows of everything in front of `until` into a database that was never written to.
    fn build(&self, what: Build<'_>) -> Result<Progress, bulk::Ended>;

    /// Does what was asked for about parked events; see [`Parking::answer`].
    fn answer(
        &self,
        parking: &Parking,
        db: &Arc<Db>,
        progress: &mut Progress,
        care: &Care,
        applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError>;
}

/// What a generation is built from, into, and with.
pub(super) struct Build<'a> {
    pub(super) sources: &'a Sources,
    pub(super) intake: &'a Intake,
    pub(super) until: Checkpoints,
    pub(super) db: &'a Arc<Db>,
    pub(super) memory: &'a ViewMemory,
    pub(super) means: Means,
    pub(super) control: &'a Control,
    pub(super) note: &'a Arc<Note>,
}

/// Batches on their way into a view.
pub(super) trait Batches<P>: Sized {
    /// None yet, behind `start`.
    fn new(start: Progress, journal: Journal, rules: Rules) -> Self;

    fn is_empty(&self) -> bool;

    /// Bytes of the batches, as they lie in the journal.
    fn bytes(&self) -> u64;

    /// Adds a batch. After an error those added before it can still be folded; no further ones may be added.
    fn add(&mut self, program: &P, batch: &CursorBatch<'_>) -> Result<(), StopError>;

    /// What is to be written: of all batches, or of those in front of the one with the first event that fails. If that would
    /// be too much at once, of the first ones: the rest is to be folded when that is written.
    fn fold(self, program: &P, db: &Arc<Db>) -> Result<(Folded, Option<Self>), StopError>;
}

/// Builds as the journal is followed: chunk after chunk. What is written before the end is of no use: the generation is
/// not live yet, and deleted if this doesn't get to the end.
pub(super) fn build_in_order<P: Program>(
    program: &P,
    what: Build<'_>,
) -> Result<Progress, bulk::Ended> {
    let Build { sources, intake, until, db, memory: _, means, control, note } = what;
    let storage = |source| StopError::Storage { view: P::NAME, source };
    let rules = Rules::strict(means.discarded, note.care());
    let mut progress = db.begin(&program.identity(), nothing(sources)).map_err(storage)?;
    control.pass_begins(RebuildPhase::Building, until.events());
    let course = Course::new(sources, intake, &progress.checkpoints);
    let mut course = course.map_err(|it| it.stop(P::NAME))?;
    while let Some(checkpoint) = missing(&progress, &until) {
        let towards = Towards { until: Some(&until), bytes: BUILD_CHUNK_BYTES };
        let more = fold_more(program, &mut course, db, &mut progress, towards, &rules)?;
        if more.events == 0 {
            let end = sources.end().position(checkpoint.journal);
            return Err(StopError::Fork { view: P::NAME, checkpoint, end }.into());
        }
        control.advance(more.events, more.bytes)?;
    }
    db.flush(true).map_err(storage)?;
    Ok(progress)
}

/// A checkpoint that isn't reached.
pub(super) fn missing(progress: &Progress, until: &Checkpoints) -> Option<Checkpoint> {
    let is_missing = |it: &&Checkpoint| progress.checkpoints.position(it.journal) < it.position;
    until.iter().find(is_missing).copied()
}

/// How far, and how much at once.
#[derive(Clone, Copy)]
pub(super) struct Towards<'a> {
    /// Of each journal no further than that.
    pub(super) until: Option<&'a Checkpoints>,
    pub(super) bytes: u64,
}

/// What was folded.
pub(super) struct More {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

/// Folds the next chunk, if there is one, into a generation that isn't served.
pub(super) fn fold_more<P: Program>(
    program: &P,
    course: &mut Course,
    db: &Arc<Db>,
    progress: &mut Progress,
    towards: Towards<'_>,
    rules: &Rules,
) -> Result<More, StopError> {
    let next = course.next(&progress.checkpoints, towards.bytes);
    let Some((cursor, mut limit)) = next.map_err(|it| it.stop(P::NAME))? else {
        return Ok(More { events: 0, bytes: 0 });
    };
    if let Some(until) = towards.until {
        limit.position = limit.position.min(until.position(cursor.journal().id()));
    }
    let (chunk, failure) = collect(program, cursor, progress.clone(), limit, rules.clone());
    let mut more = More { events: 0, bytes: chunk.bytes() };
    if !chunk.is_empty() {
        let before = progress.checkpoints.events();
        apply(program, chunk, db, &rules.care, |end, _| *progress = end)?;
        more.events = progress.checkpoints.events() - before;
    }
    failure.map_or(Ok(more), Err)
}

/// A program of any type.
pub(super) trait Managed: Send + Sync {
    fn name(&self) -> &'static str;

    fn version(&self) -> u32;

    fn kinds(&self) -> &'static [KnownKind];

    fn begin(
        self: Arc<Self>,
        running: &Running,
        options: RebuildOptions,
        source: Source,
    ) -> Result<RebuildHandle, ViewError>;

    fn check(
        self: Arc<Self>,
        running: &Running,
        options: RebuildOptions,
    ) -> Result<Comparison, RebuildError>;
}

impl<P: Program> Managed for P {
    fn name(&self) -> &'static str {
        P::NAME
    }

    fn version(&self) -> u32 {
        P::VERSION
    }

    fn kinds(&self) -> &'static [KnownKind] {
        P::KINDS
    }

    fn begin(
        self: Arc<Self>,
        running: &Running,
        options: RebuildOptions,
        source: Source,
    ) -> Result<RebuildHandle, ViewError> {
        takeover::begin(running, self, options, source)
    }

    fn check(
        self: Arc<Self>,
        running: &Running,
        options: RebuildOptions,
    ) -> Result<Comparison, RebuildError> {
        takeover::check(running, self, options)
    }
}

/// A view whose rows don't see each other.
pub(super) struct Keyed<V>(pub(super) V);

impl<V: View> Program for Keyed<V> {
    const NAME: &'static str = V::NAME;
    const VERSION: u32 = V::VERSION;
    const HAS_BULK: bool = true;
    const KINDS: &'static [KnownKind] = <V::Event as Event>::KINDS;
    type Chunk = Chunk<V>;

    fn identity(&self) -> Identity {
        Indexes::of(&self.0).identity()
    }

    fn build(&self, what: Build<'_>) -> Result<Progress, bulk::Ended> {
        if what.note.forbids_bulk() {
            return build_in_order(self, what); // it finds out of which event the process dies
        }
        let _noted = what.note.bulk();
        bulk::build(&self.0, what)
    }

    fn answer(
        &self,
        parking: &Parking,
        db: &Arc<Db>,
        progress: &mut Progress,
        care: &Care,
        applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError> {
        parking.answer(&self.0, db, progress, care, applied)
    }
}

impl<V: View> Batches<Keyed<V>> for Chunk<V> {
    fn new(start: Progress, journal: Journal, rules: Rules) -> Self {
        Self::new(start, journal, rules)
    }

    fn is_empty(&self) -> bool {
        self.is_empty()
    }

    fn bytes(&self) -> u64 {
        self.bytes()
    }

    fn add(&mut self, program: &Keyed<V>, batch: &CursorBatch<'_>) -> Result<(), StopError> {
        self.add(&program.0, batch)
    }

    fn fold(self, program: &Keyed<V>, db: &Arc<Db>) -> Result<(Folded, Option<Self>), StopError> {
        Ok((self.fold(&program.0, db)?, None))
    }
}
