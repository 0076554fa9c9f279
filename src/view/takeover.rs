//! How another generation takes over; see [`rebuild`](super::rebuild).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::base::Import;
use super::bulk::{Ended, Means};
use super::chunk::{panic_message, refuse_within_fold};
use super::db::{Db, Progress, Reader, StorageError, all_rows_and_indexes, is_row};
use super::deadly::{Duty, Note};
use super::error::{StopError, ViewError};
use super::generation::is_kept;
use super::intake::Course;
use super::poison::{Discarded, Rules};
use super::program::{Build, More, Program, Towards, fold_more, missing};
use super::rebuild::{
    Comparison, Control, Digest, OnDifference, RebuildError, RebuildHandle, RebuildOptions,
    RebuildPhase, Rebuilt,
};
use super::runner::{
    Phase, Runner, Running, Shared, compare, journal_failed, nothing, storage_failed,
};
use super::sources::Checkpoints;
use crate::journal;
use crate::position::Position;

/// Rows are looked at for a digest in steps of so many, between which it can be cancelled.
const DIGEST_STEP: u64 = 4096;
/// The generation that is served stands still at the latest when the new one lags by so much.
const NEAR_BYTES_MAX: u64 = 1 << 20;

/// Where the generation that is to take over comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It is built from the journal.
    Journal,
    /// It was live before, under this number.
    Generation(u32),
    /// It is taken in from this directory.
    Base(PathBuf),
}

/// Begins to prepare another generation, in a thread.
pub(super) fn begin<P: Program>(
    running: &Running,
    view: Arc<P>,
    options: RebuildOptions,
    source: Source,
) -> Result<RebuildHandle, ViewError> {
    refuse_within_fold(P::NAME)?;
    let shared = Arc::clone(&running.shared);
    let control = Control::new(&options);
    {
        let mut rebuild = shared.rebuild.lock();
        let under_way = rebuild.as_ref().is_some_and(|control| !control.has_ended());
        match shared.state().phase {
            _ if shared.is_to_end() => return Err(ViewError::Closed { view: P::NAME }),
            Phase::Building { .. } => return Err(ViewError::Rebuilding { view: P::NAME }),
            _ if under_way => return Err(ViewError::Rebuilding { view: P::NAME }),
            _ => *rebuild = Some(Arc::clone(&control)),
        }
    }
    let handle = RebuildHandle::new(Arc::clone(&control));
    let note = shared.attempts.note(Duty::Build);
    let takeover = Takeover { view, shared, options, control: Arc::clone(&control), note };
    let spawned = running.spawn(P::NAME, "rebuild", move || takeover.run(source));
    spawned.inspect_err(|error| control.end(Err(RebuildError::View(error.clone()))))?;
    Ok(handle)
}

/// Builds the served rows again from the journal, beside them, and compares.
pub(super) fn check<P: Program>(
    running: &Running,
    view: Arc<P>,
    options: RebuildOptions,
) -> Result<Comparison, RebuildError> {
    refuse_within_fold(P::NAME)?;
    let control = Control::new(&options);
    let shared = Arc::clone(&running.shared);
    let note = shared.attempts.note(Duty::Build);
    let checked = Takeover { view, shared, options, control, note };
    checked.guarded(Takeover::check)
}

struct Takeover<P> {
    view: Arc<P>,
    shared: Arc<Shared>,
    options: RebuildOptions,
    control: Arc<Control>,
    note: Arc<Note>,
}

/// What is served, as of a moment, to be compared with.
struct Reference {
    reader: Reader,
    progress: Progress,
}

/// What is known of a generation that was built.
#[derive(Default)]
struct Built {
    compared: Option<Comparison>,
    /// The decisions about parked events that it honours.
    discarded: Option<Arc<Discarded>>,
}

impl<P: Program> Takeover<P> {
    fn run(self, source: Source) {
        let began = Instant::now();
        let done = self.guarded(|it| match source {
            Source::Journal => it.build_and_take_over(),
            Source::Generation(number) => it.take_over_again(number),
            Source::Base(dir) => it.take_in(&dir),
        });
        match done {
            Ok((runner, rebuilt)) => {
                self.control.end(Ok(Rebuilt { took: began.elapsed(), ..rebuilt }));
                drop(self);
                runner.run();
            }
            Err(error) => self.control.end(Err(error)),
        }
    }

    fn guarded<T>(
        &self,
        run: impl FnOnce(&Self) -> Result<T, RebuildError>,
    ) -> Result<T, RebuildError> {
        catch_unwind(AssertUnwindSafe(|| run(self))).unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            Err(StopError::Panic { view: P::NAME, message }.into())
        })
    }

    fn build_and_take_over(&self) -> Result<(Runner<P>, Rebuilt), RebuildError> {
        // Rows that lag behind are no measure.
        let is_comparable =
            |it: &Reference| it.progress.parked.is_empty() && self.is_near(&it.progress);
        let reference = self.reference()?.filter(is_comparable);
        self.with_new_generation(|number, path| {
            let discarded = self.shared.parking.discarded();
            let until = reference.as_ref().map(|it| it.progress.checkpoints.clone());
            let (db, progress) = self.build(path, until, &discarded)?;
            let compared = reference.map(|reference| self.compare(&reference, &db)).transpose()?;
            if let Some(compared) = compared.as_ref().filter(|it| !it.is_equal())
                && self.options.on_difference == OnDifference::Refuse
            {
                return Err(RebuildError::Different(compared.clone()));
            }
            self.take_over(number, db, progress, Built { compared, discarded: Some(discarded) })
        })
    }

    fn take_over_again(&self, number: u32) -> Result<(Runner<P>, Rebuilt), RebuildError> {
        let path = self.shared.folder.lock().existing(number)?;
        self.take_over_whole(number, &path, Built::default())
    }

    /// A base: its rows, and what was decided about them.
    fn take_in(&self, dir: &Path) -> Result<(Runner<P>, Rebuilt), RebuildError> {
        let (shared, control) = (&self.shared, &self.control);
        let import = Import::open(shared.folder.lock().fs(), dir)?;
        import.check(&*self.view)?;
        import.judge(&shared.sources)?;
        self.with_new_generation(|number, path| {
            control.pass_begins(RebuildPhase::Copying, import.bytes());
            import
                .copy_into(path, |bytes| Ok::<_, RebuildError>(control.advance(bytes, bytes)?))?;
            let discarded = {
                let _turn = shared.stand_still(); // decisions are made by whose turn it is
                import.adopt(&shared.intake, &shared.parking, &shared.attempts)?;
                Some(shared.parking.discarded())
            };
            self.take_over_whole(number, path, Built { compared: None, discarded })
        })
    }

    /// A generation that is whole, if it is of this history.
    fn take_over_whole(
        &self,
        number: u32,
        path: &Path,
        built: Built,
    ) -> Result<(Runner<P>, Rebuilt), RebuildError> {
        let shared = &self.shared;
        let db = shared.openings.open(path, &shared.options.memory).map_err(ViewError::from)?;
        let identity = self.view.identity();
        let progress = db.begin(&identity, nothing(&shared.sources));
        let progress = progress.map_err(ViewError::from)?;
        if !progress.checkpoints.are_of(shared.sources.ids()) {
            return Err(ViewError::NotJudged { view: P::NAME }.into());
        }
        for (journal, checkpoint) in shared.sources.iter().zip(progress.checkpoints.iter()) {
            let compared = compare(journal, checkpoint).map_err(journal_failed::<P>)?;
            if compared != journal::Comparison::Equal {
                let (checkpoint, end) = (*checkpoint, journal.end().position);
                return Err(StopError::Fork { view: P::NAME, checkpoint, end }.into());
            }
        }
        // Rows that the recorded order doesn't lead to stay aside. It tells where they are, not how they came there: those that are at
        // the end of all journals are there by whatever order.
        let reached = &progress.checkpoints;
        if shared.sources.truncated().is_none() && !shared.intake.leads_to(reached)? {
            let journal = shared.sources.first().id();
            let position = reached.position(journal);
            return Err(StopError::Order { view: P::NAME, journal, position }.into());
        }
        self.take_over(number, db, progress, built)
    }

    fn check(&self) -> Result<Comparison, RebuildError> {
        let reference = self.reference()?.ok_or(ViewError::NotJudged { view: P::NAME })?;
        let mut compared = None;
        let checked = self.with_new_generation(|_, path| {
            let discarded = self.shared.parking.discarded();
            let (db, _) =
                self.build(path, Some(reference.progress.checkpoints.clone()), &discarded)?;
            compared = Some(self.compare(&reference, &db)?);
            Ok(path.to_owned())
        });
        self.shared.openings.delete(&checked?)?;
        compared.ok_or(RebuildError::Cancelled)
    }

    /// A failure leaves nothing of the generation, unless it was in pointing to it: then the pointer may point to it.
    fn with_new_generation<T>(
        &self,
        make: impl FnOnce(u32, &Path) -> Result<T, RebuildError>,
    ) -> Result<T, RebuildError> {
        let (number, path) = self.shared.folder.lock().begin()?;
        make(number, &path).inspect_err(|_| {
            if !is_kept(&path) {
                // An effort: the next opening deletes it, too.
                drop(self.shared.openings.delete(&path));
            }
        })
    }

    /// What is served now, if it is known to be of this journal.
    fn reference(&self) -> Result<Option<Reference>, RebuildError> {
        if !self.shared.state().judged {
            return Ok(None);
        }
        let reader = self.shared.db().snapshot();
        let progress = reader.progress(self.shared.sources.ids()).map_err(ViewError::from)?;
        Ok(progress.map(|progress| Reference { reader, progress }))
    }

    /// Whether what is served is so far that it is worth while to build up to there first.
    fn is_near(&self, progress: &Progress) -> bool {
        let applied = progress.checkpoints.events();
        let behind = self.shared.sources.end().events().saturating_sub(applied);
        behind.saturating_mul(4) <= applied
    }

    fn build(
        &self,
        path: &Path,
        until: Option<Checkpoints>,
        discarded: &Arc<Discarded>,
    ) -> Result<(Arc<Db>, Progress), RebuildError> {
        let shared = &self.shared;
        let all = || {
            let all = shared.intake.take_all(&shared.sources, || self.control.check());
            all.map_err(|it| it.stop(P::NAME))?.ok_or(RebuildError::Cancelled)
        };
        let until = until.map_or_else(all, Ok)?;
        let db = shared.openings.open(path, &shared.options.memory).map_err(ViewError::from)?;
        let means = Means::of(&self.options, Arc::clone(discarded));
        let (sources, intake) = (&shared.sources, &shared.intake);
        let (memory, control, note) = (&shared.options.memory, &*self.control, &self.note);
        let what = Build { sources, intake, until, db: &db, memory, means, control, note };
        match self.view.build(what) {
            Ok(progress) => {
                self.note.built();
                Ok((db, progress))
            }
            Err(Ended::Cancelled) => Err(RebuildError::Cancelled),
            Err(Ended::Failed(error)) => Err(error.into()),
        }
    }

    fn compare(&self, reference: &Reference, db: &Arc<Db>) -> Result<Comparison, RebuildError> {
        self.control.pass_begins(RebuildPhase::Comparing, 0);
        let position = Position::new(reference.progress.checkpoints.events());
        let served = digest_of(P::NAME, &reference.reader, Some(&self.control))?;
        let built = digest_of(P::NAME, &db.latest(), Some(&self.control))?;
        Ok(Comparison { position, served, built })
    }

    /// Catches up, and takes over when nothing is missing any more.
    fn take_over(
        &self,
        number: u32,
        db: Arc<Db>,
        mut progress: Progress,
        built: Built,
    ) -> Result<(Runner<P>, Rebuilt), RebuildError> {
        let Built { compared, discarded } = built;
        let shared = &self.shared;
        let behind = |progress: &Progress, end: &Checkpoints| {
            end.events().saturating_sub(progress.checkpoints.events())
        };
        self.control
            .pass_begins(RebuildPhase::CatchingUp, behind(&progress, &shared.sources.end()));
        let course = Course::new(&shared.sources, &shared.intake, &progress.checkpoints);
        let mut course = course.map_err(|it| it.stop(P::NAME))?;
        let flush = |db: &Db| db.flush(true).map_err(storage_failed::<P>);
        // What is there is read as slowly as is asked for. What is appended meanwhile isn't: if it is more than may be read, there
        // would never be an end.
        let slowly_until = shared.sources.end().bytes();
        let near = shared.options.chunk_bytes.clamp(1, NEAR_BYTES_MAX);
        while shared.sources.end().bytes() > progress.checkpoints.bytes().saturating_add(near) {
            let more = self.fold_more(&mut course, &db, &mut progress)?;
            if more.events == 0 {
                break; // a mirror has less than was taken in before: nobody gets further
            }
            let is_slow = progress.checkpoints.bytes() <= slowly_until;
            self.control.advance(more.events, if is_slow { more.bytes } else { 0 })?;
        }
        flush(&db)?; // so that little is left to be flushed while the old one stands still
        self.control.check()?;
        // From here on nothing may wait for the one who asked for this: the old one stands still.
        let mut turn = shared.stand_still();
        let old = shared.state().applied.checkpoints;
        while let Some(checkpoint) = missing(&progress, &old) {
            if self.fold_more(&mut course, &db, &mut progress)?.events == 0 {
                let end = shared.sources.end().position(checkpoint.journal);
                return Err(StopError::Fork { view: P::NAME, checkpoint, end }.into());
            }
        }
        if db.latest().building_until(&progress).map_err(storage_failed::<P>)?.is_some() {
            // It was replaced while it was built. It has what there is now, and nobody knows when there will be more.
            db.end_building(&progress).map_err(storage_failed::<P>)?;
        }
        flush(&db)?;
        self.control.check_at_once()?;
        if discarded.is_some_and(|it| !Arc::ptr_eq(&it, &shared.parking.discarded())) {
            return Err(RebuildError::Overtaken); // decisions are made by whose turn it is: none comes any more
        }
        let previous = {
            let mut folder = shared.folder.lock();
            let previous = folder.live_number();
            folder.set_live(number)?;
            previous
        };
        *shared.previous.lock() = previous;
        let mine = shared.flip(&mut turn, Arc::clone(&db), &progress);
        drop(turn);
        let (view, shared) = (Arc::clone(&self.view), Arc::clone(shared));
        let runner = Runner::new(view, shared, db, mine, progress.checkpoints.bytes());
        let took = std::time::Duration::ZERO;
        Ok((runner, Rebuilt { generation: number, previous, compared, took }))
    }

    fn fold_more(
        &self,
        course: &mut Course,
        db: &Arc<Db>,
        progress: &mut Progress,
    ) -> Result<More, StopError> {
        let towards = Towards { until: None, bytes: self.shared.options.chunk_bytes };
        let rules = Rules::strict(self.shared.parking.discarded(), self.note.care());
        fold_more(&*self.view, course, db, progress, towards, &rules)
    }
}

/// What the rows and their index entries come to.
pub(super) fn digest_of(
    view: &'static str,
    reader: &Reader,
    control: Option<&Control>,
) -> Result<Digest, RebuildError> {
    let failed = |source| StopError::Storage { view, source }.into();
    digest_rows(reader, failed, || Ok(control.map_or(Ok(()), Control::check)?))
}

/// The same for whoever fails otherwise, with a step taken now and then.
pub(super) fn digest_rows<E>(
    reader: &Reader,
    failed: impl Fn(StorageError) -> E,
    mut step: impl FnMut() -> Result<(), E>,
) -> Result<Digest, E> {
    let mut hasher = blake3::Hasher::new();
    let (mut rows, mut seen) = (0, 0_u64);
    for entry in reader.scan(all_rows_and_indexes()) {
        let (key, row) = entry.map_err(&failed)?;
        for part in [&key, &row] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        rows += u64::from(is_row(&key));
        seen += 1;
        if seen % DIGEST_STEP == 0 {
            step()?;
        }
    }
    Ok(Digest { rows, hash: *hasher.finalize().as_bytes() })
}
