//! The thread that follows the journal for a view, and what it shares with the view's handles.
//!
//! ```text
//!            ┌ new, and much to do ▶ Building ──── done ──┐
//!            ├ of this history ────▶ Following ───────────┤
//! open ──────┤ ahead of a mirror ──▶ AwaitingMirror equal ┤─ closed ▶ Closed
//!            └ not to be judged ───▶ Stopped ◀── fold, journal or database failed; fork
//! ```
//!
//! Invariants:
//! - Only the runner whose turn it is writes to the generation that is served.
//! - `durable <= applied <= the journal's durable end`, each a batch end, except while awaiting a mirror.
//! - Whatever ends the thread, what it has applied is flushed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::audit::Tallies;
use super::base;
use super::bulk::{self, Means};
use super::chunk::{Folded, is_within_fold, panic_message, refuse_within_fold};
use super::db::{Db, Progress, StorageError, StorageErrorKind};
use super::deadly::{Attempts, Care, Duty, Note};
use super::error::{StopError, ViewError, WaitError};
use super::generation::{Generations, is_kept};
use super::inline::{self, InlineViews, Lane, Steps};
use super::intake::{Course, Intake, Limit};
use super::openings::Openings;
use super::poison::{ParkedCounts, Parking, Rules};
use super::program::{Batches, Build, Program};
use super::rebuild::{Cancelled, Control, RebuildOptions, RebuildPhase, RebuildStatus};
use super::sources::{Bell, Checkpoints, Sources};
use super::watch::Watchers;
use super::{LostTail, ViewOptions};
use crate::error::ReadError;
use crate::format::batch::genesis;
use crate::format::files::Role;
use crate::fs::Fs;
use crate::fs::os::OsFs;
#[cfg(feature = "shipping")]
use crate::journal::Applier;
use crate::journal::{Comparison, Cursor, Journal};
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, Incarnation, JournalId, Position};

/// How long the thread sleeps at most before it looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);
/// How much longer an inline view's own thread waits for those who append.
const INLINE_PAUSE: Duration = Duration::from_millis(1);
/// A new generation of at least so many bytes of the journal is built in bulk.
const BULK_BYTES_MIN: u64 = 1 << 20;

/// What the view's handles share with its thread.
pub(super) struct Shared {
    /// The generation that is read.
    served: ArcSwap<Db>,
    pub(super) sources: Sources,
    pub(super) intake: Intake,
    pub(super) set_aside: Option<PathBuf>,
    pub(super) options: ViewOptions,
    pub(super) parking: Parking,
    pub(super) attempts: Arc<Attempts>,
    pub(super) watchers: Arc<Watchers>,
    state: Mutex<State>,
    /// In the order of the journals.
    #[cfg(feature = "shipping")]
    appliers: Vec<Applier>,
    changed: Condvar,
    /// Whose turn it is to apply: counted on by each flip. Held while something is applied.
    turn: Mutex<u64>,
    pub(super) openings: Arc<Openings>,
    /// The generation that was live before the present one, if that took over since the opening.
    pub(super) previous: Mutex<Option<u32>>,
    /// Where others than its own thread may take the view's steps.
    pub(super) lane: Lane,
    /// The last rebuild.
    pub(super) rebuild: Mutex<Option<Arc<Control>>>,
    /// A first build that is made as the journal is followed, until it has what there was when it began.
    first_build: Mutex<Option<FirstBuild>>,
    // Behind the database: the folder stays locked until that is closed.
    pub(super) folder: Mutex<Generations>,
}

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    /// What is applied was found in the journal: before that, the rows may be of another history.
    pub(super) judged: bool,
    pub(super) applied: Progress,
    pub(super) durable: Checkpoints,
    stop_requested: bool,
    flush_failure: Option<StorageError>,
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// A generation, of which nothing is to be seen yet, is built in bulk, and is the live one then.
    Building {
        control: Arc<Control>,
        number: u32,
    },
    Following,
    AwaitingMirror,
    Stopped(Arc<StopError>),
    Closed,
}

/// How far a first build in order is, and how far it is to go.
#[derive(Clone)]
struct FirstBuild {
    control: Arc<Control>,
    until: Checkpoints,
}

/// Ends the threads when the last handle is dropped.
pub(super) struct Running {
    pub(super) shared: Arc<Shared>,
    threads: Mutex<Vec<Spawned>>,
    /// Held by the one who waits for their end: whoever else closes the view waits as well.
    closing: Mutex<()>,
    /// Where those who append find it.
    pub(super) inline: OnceLock<InlineViews>,
}

/// A thread of the view, until somebody waits for its end.
struct Spawned {
    id: ThreadId,
    thread: Option<JoinHandle<()>>,
}

/// Opens the view's live generation, judges it, and starts the thread.
pub(super) fn start<P: Program>(
    views_dir: &Path,
    sources: Sources,
    view: Arc<P>,
    options: ViewOptions,
) -> Result<Running, ViewError> {
    if options.inline {
        refuse_within_fold(P::NAME)?; // those who append would wait for it, and it for them
    }
    let mut folder = Generations::open(Arc::new(OsFs), views_dir, P::NAME, P::VERSION)?;
    let openings = Arc::new(Openings::new(folder.lock()));
    let parking = Parking::open(Arc::new(OsFs), &views_dir.join(P::NAME), P::VERSION)?;
    let attempts = Attempts::open(Arc::new(OsFs), &views_dir.join(P::NAME), P::VERSION)?;
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let intake = Intake::open(&fs, views_dir, &sources)?;
    if let Some(dir) = &options.base {
        let decided = (&parking, &*attempts);
        base::begin_with(dir, &*view, &mut folder, (&sources, &intake), decided)?;
    }
    let sources_in_order = (&sources, &intake);
    let opened = open_live(&*view, &mut folder, &openings, sources_in_order, &options)?;
    let durable = opened.db.durable(sources.ids())?.unwrap_or_else(|| sources.beginning());
    parking.take_over(&opened.progress.checkpoints)?;
    let state = State {
        judged: matches!(opened.phase, Phase::Following),
        phase: opened.phase,
        applied: opened.progress,
        durable: durable.clone(),
        stop_requested: false,
        flush_failure: None,
    };
    #[cfg(feature = "shipping")]
    let appliers = sources.iter().map(|journal| journal.applier(Position::START)).collect();
    let shared = Arc::new(Shared {
        openings,
        served: ArcSwap::new(opened.db),
        sources,
        intake,
        set_aside: opened.set_aside,
        options,
        parking,
        attempts,
        watchers: Arc::default(),
        state: Mutex::new(state),
        #[cfg(feature = "shipping")]
        appliers,
        changed: Condvar::new(),
        turn: Mutex::new(0),
        previous: Mutex::new(None),
        lane: Lane::default(),
        rebuild: Mutex::new(None),
        first_build: Mutex::new(None),
        folder: Mutex::new(folder),
    });
    if let Some(until) = opened.building_until {
        shared.begin_first_build(until);
    }
    #[cfg(feature = "shipping")]
    shared.note_applied(&shared.state());
    let runner = Runner::new(view, shared.clone(), shared.db(), 0, durable.bytes());
    let (threads, closing, inline) = (Mutex::default(), Mutex::default(), OnceLock::new());
    let running = Running { shared, threads, closing, inline };
    running.spawn(P::NAME, "view", move || runner.run())?;
    Ok(running)
}

struct Opened {
    db: Arc<Db>,
    progress: Progress,
    phase: Phase,
    set_aside: Option<PathBuf>,
    /// Its rows are made for the first time, as the journal is followed, up to there.
    building_until: Option<Checkpoints>,
}

fn open_live<P: Program>(
    view: &P,
    folder: &mut Generations,
    openings: &Arc<Openings>,
    (sources, intake): (&Sources, &Intake),
    options: &ViewOptions,
) -> Result<Opened, ViewError> {
    let open = |path: &Path| openings.open(path, &options.memory);
    let live = folder.live()?.map(|path| open(&path)).transpose()?;
    let begin = |folder: &mut Generations| {
        heed::<P>(sources, intake, options.lost_tail)?;
        begin_live(view, folder, &open, sources, &options.building)
    };
    let Some(db) = live else { return begin(folder) };
    // One that is pointed to and has nothing in it was deleted by hand.
    if db.is_empty()? {
        let path = db.path().to_owned();
        drop(db);
        openings.delete(&path)?;
        return begin(folder);
    }
    let (progress, judgement) = match db.begin(&view.identity(), nothing(sources)) {
        Ok(progress) => {
            let judgement = judge::<P>(sources, &progress.checkpoints, options.lost_tail)?;
            let sources_in_order = (sources, intake, options.lost_tail);
            let ordered = judge_order::<P>(sources_in_order, &progress.checkpoints, judgement)?;
            (progress, ordered)
        }
        Err(source) if source.kind() == StorageErrorKind::OtherShape => {
            if let Some(start) = sources.truncated() {
                return Err(ViewError::OtherShape { view: P::NAME, source, start });
            }
            (nothing(sources), Judgement::SetAside)
        }
        Err(error) => return Err(error.into()),
    };
    let is_given_up = matches!(judgement, Judgement::GiveUp);
    let phase = match judgement {
        Judgement::GoOn => Phase::Following,
        Judgement::AwaitMirror => Phase::AwaitingMirror,
        Judgement::Unknown(source) => {
            Phase::Stopped(Arc::new(StopError::Journal { view: P::NAME, source }))
        }
        // What can't be built again is served as it is, and says so.
        Judgement::SetAside | Judgement::GiveUp => {
            if let Some(first) = sources.truncated() {
                let is_other = !progress.checkpoints.are_of(sources.ids());
                if is_other && sources.iter().any(|it| progress.checkpoints.of(it.id()).is_some()) {
                    let reason = "its rows are made from others, and can't be made anew, because events were removed";
                    return Err(ViewError::Journals { view: P::NAME, reason });
                }
                let source = ReadError::Truncated { first };
                let phase = Phase::Stopped(Arc::new(StopError::Journal { view: P::NAME, source }));
                return Ok(Opened { db, progress, phase, set_aside: None, building_until: None });
            }
            let set_aside = Some(db.path().to_owned());
            drop(db);
            if is_given_up {
                folder.set_none_live()?; // the next opening doesn't ask again, however far the new one gets
            }
            return Ok(Opened { set_aside, ..begin(folder)? });
        }
    };
    let building_until = db.latest().building_until(&progress)?;
    Ok(Opened { db, progress, phase, set_aside: None, building_until })
}

/// Begins a new generation: to be built in bulk if there is enough to build it from, and live when it is; or live from
/// now on.
fn begin_live<P: Program>(
    view: &P,
    folder: &mut Generations,
    open: &impl Fn(&Path) -> Result<Arc<Db>, StorageError>,
    sources: &Sources,
    building: &RebuildOptions,
) -> Result<Opened, ViewError> {
    let (number, path) = folder.begin()?;
    let (db, progress) = (open(&path)?, nothing(sources));
    let end = sources.end();
    let (phase, building_until) = if P::HAS_BULK && end.bytes() >= BULK_BYTES_MIN {
        (Phase::Building { control: Control::new(building), number }, None)
    } else {
        begin_in_order(view, &db, sources, &end)?;
        folder.set_live(number)?;
        (Phase::Following, Some(end))
    };
    Ok(Opened { db, progress, phase, set_aside: None, building_until })
}

/// The beginning of a generation that is built as the journal is followed; durable, so that one that is live isn't empty.
fn begin_in_order<P: Program>(
    view: &P,
    db: &Arc<Db>,
    sources: &Sources,
    until: &Checkpoints,
) -> Result<Progress, StorageError> {
    let until = Some(until).filter(|until| until.events() > 0);
    let progress = db.begin_building(&view.identity(), nothing(sources), until)?;
    db.flush(true)?;
    Ok(progress)
}

/// How far a view is that has applied nothing.
pub(super) fn nothing(sources: &Sources) -> Progress {
    let checkpoints = sources.beginning();
    Progress { checkpoints, skipped_events: 0, parked: ParkedCounts::default() }
}

/// The checkpoint of a view that has applied nothing.
pub(super) fn beginning(journal: JournalId) -> Checkpoint {
    Checkpoint {
        journal,
        epoch: 0,
        incarnation: Incarnation::default(),
        offset: 0,
        position: Position::START,
        chain: genesis(journal),
    }
}

/// What a stored checkpoint says about the rows that are of it.
enum Judgement {
    GoOn,
    /// They are live until there are others.
    SetAside,
    /// Somebody has decided so.
    GiveUp,
    AwaitMirror,
    Unknown(ReadError),
}

fn judge<P: Program>(
    sources: &Sources,
    checkpoints: &Checkpoints,
    lost_tail: LostTail,
) -> Result<Judgement, ViewError> {
    let mut judgement = Judgement::GoOn;
    // Also if others have come or gone: it may be the only witness of a loss.
    for journal in sources.iter() {
        if let Some(checkpoint) = checkpoints.of(journal.id()) {
            judgement = judgement.and(judge_one::<P>(journal, &checkpoint, lost_tail)?);
        }
    }
    let are_of = checkpoints.are_of(sources.ids());
    Ok(judgement.and(if are_of { Judgement::GoOn } else { Judgement::SetAside }))
}

/// Rows that were made in another order than is recorded are made anew, if they can be.
fn judge_order<P: Program>(
    (sources, intake, lost_tail): (&Sources, &Intake, LostTail),
    checkpoints: &Checkpoints,
    judgement: Judgement,
) -> Result<Judgement, ViewError> {
    if !matches!(judgement, Judgement::GoOn | Judgement::AwaitMirror) {
        return Ok(judgement);
    }
    heed::<P>(sources, intake, lost_tail)?;
    let is_in_order = sources.truncated().is_some() || intake.leads_to(checkpoints)?;
    Ok(if is_in_order { judgement } else { Judgement::SetAside })
}

/// Cuts what is of a lost history out of the recorded order. All views over these journals go by that, and are of use again if
/// the loss is mended: so as long as nobody has accepted the loss, the order is as good a witness as a checkpoint, and stays.
fn heed<P: Program>(
    sources: &Sources,
    intake: &Intake,
    lost_tail: LostTail,
) -> Result<(), ViewError> {
    // Who only reads a journal, or mirrors it, may get as far again.
    let is_own = |it: &&Journal| it.is_written_here() && it.role().appends();
    for journal in sources.iter().filter(is_own) {
        if let Some(recorded) = intake.end_of(journal.id()) {
            judge_one::<P>(journal, &recorded, lost_tail)?;
        }
    }
    intake.heed(sources)
}

impl Judgement {
    /// What is to be done about both.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::GiveUp, _) | (_, Self::GiveUp) => Self::GiveUp,
            (Self::SetAside, _) | (_, Self::SetAside) => Self::SetAside,
            (Self::Unknown(error), _) | (_, Self::Unknown(error)) => Self::Unknown(error),
            (Self::AwaitMirror, _) | (_, Self::AwaitMirror) => Self::AwaitMirror,
            (Self::GoOn, Self::GoOn) => Self::GoOn,
        }
    }
}

fn judge_one<P: Program>(
    journal: &Journal,
    checkpoint: &Checkpoint,
    lost_tail: LostTail,
) -> Result<Judgement, ViewError> {
    Ok(match compare(journal, checkpoint) {
        Err(error) => Judgement::Unknown(error),
        Ok(Comparison::Equal) => Judgement::GoOn,
        Ok(Comparison::Differs | Comparison::Foreign) => Judgement::SetAside,
        Ok(Comparison::Ahead) if journal.has_set_aside(checkpoint) => Judgement::SetAside,
        Ok(Comparison::Ahead) if journal.role() == Role::Mirror => Judgement::AwaitMirror,
        Ok(Comparison::Ahead) if lost_tail == LostTail::SetAside => Judgement::GiveUp,
        Ok(Comparison::Ahead) => {
            let (checkpoint, end) = (*checkpoint, journal.end().position);
            return Err(ViewError::LostTail { view: P::NAME, checkpoint, end });
        }
    })
}

/// Compares a checkpoint with the journal. Within one history, more events are more bytes: a checkpoint that
/// is ahead of the end in only one of the two is of another history.
pub(crate) fn compare(journal: &Journal, checkpoint: &Checkpoint) -> Result<Comparison, ReadError> {
    let end = journal.end();
    let (has_position, has_offset) =
        (checkpoint.position <= end.position, checkpoint.offset <= end.offset);
    match journal.compare(checkpoint)? {
        Comparison::Ahead if has_position != has_offset => Ok(Comparison::Differs),
        comparison => Ok(comparison),
    }
}

/// When to flush, counted from the first write that isn't durable.
struct FlushClock {
    bytes: u64,
    interval: Duration,
    flushed_offset: u64,
    unflushed_since: Option<Instant>,
    looked_at: Instant,
}

impl FlushClock {
    fn new(options: &ViewOptions, flushed_offset: u64) -> Self {
        Self {
            bytes: options.flush_bytes,
            interval: options.flush_interval,
            flushed_offset,
            unflushed_since: None,
            looked_at: Instant::now(),
        }
    }

    /// Something isn't durable: the clock runs.
    fn start(&mut self) {
        self.unflushed_since.get_or_insert_with(Instant::now);
    }

    fn is_due(&self, applied_offset: u64) -> bool {
        self.unflushed_since.is_some_and(|since| {
            applied_offset.saturating_sub(self.flushed_offset) >= self.bytes
                || since.elapsed() >= self.interval
        })
    }

    fn flushed(&mut self, applied_offset: u64) {
        self.flushed_offset = applied_offset;
        self.unflushed_since = None;
    }
}

/// Follows the journal with one generation, as long as it is its turn.
pub(super) struct Runner<P> {
    view: Arc<P>,
    shared: Arc<Shared>,
    db: Arc<Db>,
    turn: u64,
    flush: FlushClock,
    /// Once it follows.
    course: Option<Course>,
    has_ended: bool,
    note: Arc<Note>,
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was applied; there may be more.
    Moved,
    /// There is nothing to be applied; of the first journal, behind this position.
    Idle(Position),
    /// It takes no more: the view was closed, has stopped, or another generation has taken over.
    Ended,
}

impl<P: Program> Runner<P> {
    pub(super) fn new(
        view: Arc<P>,
        shared: Arc<Shared>,
        db: Arc<Db>,
        turn: u64,
        durable_offset: u64,
    ) -> Self {
        let flush = FlushClock::new(&shared.options, durable_offset);
        let note = shared.attempts.note(Duty::Follow);
        Self { view, shared, db, turn, flush, course: None, has_ended: false, note }
    }

    pub(super) fn run(mut self) {
        if self.guarded(Self::enter) == Step::Ended {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let lane = Arc::new(Mutex::new(self));
        shared.lane.offer(&lane);
        let bell = shared.bell();
        loop {
            let step = lane.step();
            match step {
                Step::Moved => {}
                Step::Idle(position) => shared.wait_for_more(position, bell.as_deref()),
                Step::Ended => return,
            }
        }
    }

    /// Takes a step; one that fails or panics ends the view.
    fn guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<Step, StopError>) -> Step {
        if self.has_ended {
            return Step::Ended;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| step(self))).unwrap_or_else(|panic| {
            Err(StopError::Panic { view: P::NAME, message: panic_message(&*panic) })
        });
        if let Ok(step @ (Step::Moved | Step::Idle(_))) = outcome {
            return step;
        }
        self.has_ended = true;
        if let Some(_turn) = self.shared.take_turn(self.turn) {
            self.shared.end(outcome.map(drop), self.db.flush(true));
        }
        Step::Ended
    }

    /// Gets to where the journal is followed from.
    fn enter(&mut self) -> Result<Step, StopError> {
        let follows = match self.shared.state().phase {
            Phase::Building { control, number } => self.build_live(&control, number)?,
            Phase::Following => true,
            Phase::AwaitingMirror => self.await_mirror()?,
            Phase::Stopped(_) | Phase::Closed => false,
        };
        Ok(if follows { Step::Moved } else { Step::Ended })
    }

    /// Builds the generation, and lets the version read it; false if it was closed meanwhile. Nothing is left of it then, nor
    /// if it can't be built.
    fn build_live(&self, control: &Control, number: u32) -> Result<bool, StopError> {
        let shared = &*self.shared;
        let built = self.build(control).and_then(|built| {
            let set_live = || shared.folder.lock().set_live(number);
            let failed = |source| StopError::Folder { view: P::NAME, source: Box::new(source) };
            built.map(|progress| set_live().map_err(failed).map(|()| progress)).transpose()
        });
        let path = self.db.path();
        if !matches!(built, Ok(Some(_))) && !is_kept(path) {
            // An effort: the next opening deletes it, too.
            drop(shared.openings.delete(path));
        }
        let Some(progress) = built? else { return Ok(false) };
        shared.change(|state| {
            (state.phase, state.judged) = (Phase::Following, true);
            state.durable = progress.checkpoints.clone();
            shared.watchers.replaced(progress.checkpoints.first());
            state.applied = progress;
        });
        Ok(true)
    }

    /// Builds the rows; `None` if it was closed meanwhile. If an event can't be applied, it is for the ordered path to say
    /// which, and to apply what is in front of it.
    fn build(&self, control: &Control) -> Result<Option<Progress>, StopError> {
        let (shared, db) = (&*self.shared, &self.db);
        let until = shared.intake.take_all(&shared.sources, || control.check());
        let Some(until) = until.map_err(|it| it.stop(P::NAME))? else { return Ok(None) };
        let in_order = || {
            let begun = begin_in_order(&*self.view, db, &shared.sources, &until);
            shared.begin_first_build(until.clone());
            begun.map(Some).map_err(storage_failed::<P>)
        };
        if self.note.forbids_bulk() {
            return in_order();
        }
        let means = Means::of(&shared.options.building, shared.parking.discarded());
        let (sources, intake) = (&shared.sources, &shared.intake);
        let (memory, note) = (&shared.options.memory, &self.note);
        let what =
            Build { sources, intake, until: until.clone(), db, memory, means, control, note };
        match self.view.build(what) {
            Ok(progress) => Ok(Some(progress)),
            Err(bulk::Ended::Cancelled) => Ok(None),
            Err(bulk::Ended::Failed(StopError::Event { .. } | StopError::Index { .. })) => {
                in_order()
            }
            Err(bulk::Ended::Failed(error)) => Err(error),
        }
    }

    /// Waits until the mirrors have what the view has applied; false if that won't happen any more.
    fn await_mirror(&self) -> Result<bool, StopError> {
        let checkpoints = self.shared.state().applied.checkpoints;
        for (journal, checkpoint) in self.shared.sources.iter().zip(checkpoints.iter()) {
            if !self.await_checkpoint(journal, checkpoint)? {
                return Ok(false);
            }
        }
        let Some(_turn) = self.shared.take_turn(self.turn) else { return Ok(false) };
        self.shared.change(|state| {
            state.phase = Phase::Following;
            state.judged = true;
        });
        Ok(true)
    }

    fn await_checkpoint(
        &self,
        journal: &Journal,
        checkpoint: &Checkpoint,
    ) -> Result<bool, StopError> {
        let before = Position::new(checkpoint.position.get().saturating_sub(1));
        while !self.shared.is_to_end() {
            let closed = journal.is_closed();
            let end = journal.wait_past(before, TICK);
            match compare(journal, checkpoint).map_err(journal_failed::<P>)? {
                Comparison::Equal => return Ok(true),
                Comparison::Ahead if closed => return Ok(false),
                Comparison::Ahead => {}
                _ => {
                    let (checkpoint, end) = (*checkpoint, end.position);
                    return Err(StopError::Fork { view: P::NAME, checkpoint, end });
                }
            }
        }
        Ok(false)
    }

    /// Applies the next chunk, and does what else is due.
    fn follow(&mut self) -> Result<Step, StopError> {
        let (view, db) = (Arc::clone(&self.view), Arc::clone(&self.db));
        let shared = Arc::clone(&self.shared);
        if shared.is_to_end() {
            return Ok(Step::Ended);
        }
        let mut applied = shared.state().applied;
        let before = applied.checkpoints.clone();
        // Asked first: what was published before the closing is still to be read.
        let closed = shared.sources.are_closed();
        let next = self.next_chunk(&applied)?;
        let is_in_use = next.is_none();
        let (chunk, failure) = next.unwrap_or_default();
        let idle = chunk.is_none();
        {
            let Some(_turn) = shared.take_turn(self.turn) else { return Ok(Step::Ended) };
            if let Some((chunk, journal)) = chunk {
                let flush = &mut self.flush;
                apply(&*view, chunk, &db, &self.note.care(), |end, changed| {
                    applied = end;
                    flush.start();
                    shared.applied(&applied, journal, changed);
                })?;
            }
            let flush = &mut self.flush;
            let care = self.note.all_care();
            view.answer(&shared.parking, &db, &mut applied, &care, |progress, row| {
                flush.start();
                let row = row.map(<[u8]>::to_vec).into_iter().collect();
                shared.applied(progress, shared.sources.first().id(), row);
            })?;
            if idle && failure.is_none() && !is_in_use && !closed && shared.ends_first_build() {
                // A journal that was longer when that began: no more comes.
                db.end_building(&applied).map_err(storage_failed::<P>)?;
                flush.start();
            }
            self.tend().map_err(storage_failed::<P>)?;
        }
        if shared.advance_first_build(&before, &applied.checkpoints).is_err() {
            return Ok(Step::Ended);
        }
        match failure {
            Some(failure) => Err(failure),
            None if is_in_use => Ok(Step::Idle(before.first().position)),
            None if idle && closed => Ok(Step::Ended),
            None if idle => {
                self.note.built();
                let first = shared.sources.first().id();
                Ok(Step::Idle(applied.checkpoints.position(first)))
            }
            None => Ok(Step::Moved),
        }
    }

    /// What the journal whose turn it is has, and why there is no more; `None` if others are recording whose turn it is.
    #[allow(clippy::type_complexity, reason = "it is said in one place only")]
    fn next_chunk(
        &mut self,
        applied: &Progress,
    ) -> Result<Option<(Option<(P::Chunk, JournalId)>, Option<StopError>)>, StopError> {
        let Self { view, shared, db, course, note, .. } = self;
        let course = match course {
            Some(course) => course,
            None => {
                db.keep_written_rows(shared.options.row_cache_bytes);
                let begun = Course::new(&shared.sources, &shared.intake, &applied.checkpoints);
                course.insert(begun.map_err(|it| it.stop(P::NAME))?.with_patience(TICK))
            }
        };
        let next = match course.next(&applied.checkpoints, shared.options.chunk_bytes) {
            Err(failed) if failed.is_in_use() => return Ok(None),
            next => next.map_err(|it| it.stop(P::NAME))?,
        };
        let Some((cursor, limit)) = next else { return Ok(Some((None, None))) };
        let journal = cursor.journal().id();
        let rules = shared.parking.rules(&shared.options, &shared.watchers, note.care());
        let (chunk, failure) = collect(&**view, cursor, applied.clone(), limit, rules);
        Ok(Some(((!chunk.is_empty()).then_some((chunk, journal)), failure)))
    }

    /// Flushes when it is time, and looks how far the last flush has got.
    fn tend(&mut self) -> Result<(), StorageError> {
        let state = self.shared.state();
        let applied = state.applied.checkpoints;
        if self.flush.is_due(applied.bytes()) {
            // One at a time: what is to be folded again after a crash stays bounded, however slow the disk is.
            self.shared.look_at_durable()?;
            let is_under_way = self.shared.state().durable.bytes() < self.flush.flushed_offset;
            self.db.flush(is_under_way)?;
            self.flush.flushed(applied.bytes());
        }
        if state.durable != applied && self.flush.looked_at.elapsed() >= TICK {
            self.shared.look_at_durable()?;
            self.flush.looked_at = Instant::now();
            // A flush runs in the background: asking for it again tells whether it failed.
            self.flush.start();
        }
        Ok(())
    }
}

/// Batches for one write behind `applied`, and why there are no more.
pub(super) fn collect<P: Program>(
    view: &P,
    cursor: &mut Cursor,
    applied: Progress,
    limit: Limit,
    rules: Rules,
) -> (P::Chunk, Option<StopError>) {
    let journal = cursor.journal().clone();
    let care = rules.care.at(journal.id(), cursor.position());
    let rules = Rules { care: care.clone(), ..rules };
    let mut chunk = P::Chunk::new(applied, journal.clone(), rules);
    let bytes_max = care.chunk_bytes(limit.bytes.max(1));
    let end = care.chunk_end(journal.id(), cursor.position());
    let end = end.map_or(limit.position, |end| end.min(limit.position));
    while chunk.bytes() < bytes_max && cursor.position() < end {
        let added = match cursor.next_batch() {
            Ok(Some(batch)) if !limit.allows(&batch.end()) => {
                let position = batch.end().position;
                Err(StopError::Order { view: P::NAME, journal: journal.id(), position })
            }
            Ok(Some(batch)) => {
                let header = &batch.batch.header;
                care.batch(journal.id(), header.base_position..header.end_position());
                chunk.add(view, &batch)
            }
            Ok(None) => break,
            Err(error) => Err(journal_failed::<P>(error)),
        };
        if let Err(failure) = added {
            if chunk.is_empty() {
                care.abandon();
            }
            return (chunk, Some(failure));
        }
    }
    care.pause();
    (chunk, None)
}

/// Folds a chunk into a generation, and tells how far it is then, and which rows have changed: more than once if it is
/// written in parts. The error may be behind that: why no further.
pub(super) fn apply<P: Program>(
    view: &P,
    mut chunk: P::Chunk,
    db: &Arc<Db>,
    care: &Care,
    mut applied: impl FnMut(Progress, Vec<Vec<u8>>),
) -> Result<(), StopError> {
    loop {
        let (folded, rest) = chunk.fold(view, db)?;
        let Folded { mut writes, end, stop, changed, mut tallies } = folded;
        if rest.is_none() {
            care.done();
        }
        if planted::is(Bug::DropChunk) && end.checkpoints.events() % 3 == 0 {
            (writes, tallies) = (db.writes(), Tallies::new());
        }
        db.tally(&mut writes, &tallies).map_err(storage_failed::<P>)?;
        db.write(writes, &end).map_err(storage_failed::<P>)?;
        applied(end, changed);
        stop.map_or(Ok(()), Err)?;
        let Some(rest) = rest else { return Ok(()) };
        chunk = rest;
    }
}

pub(super) fn journal_failed<P: Program>(source: ReadError) -> StopError {
    StopError::Journal { view: P::NAME, source }
}

pub(super) fn storage_failed<P: Program>(source: StorageError) -> StopError {
    StopError::Storage { view: P::NAME, source }
}

impl<P: Program> Steps for Mutex<Runner<P>> {
    fn step(&self) -> Step {
        self.lock().guarded(Runner::follow)
    }

    fn try_step(&self) -> Option<Step> {
        self.try_lock().map(|mut runner| runner.guarded(Runner::follow))
    }
}

impl Shared {
    pub(super) fn state(&self) -> State {
        self.state.lock().clone()
    }

    /// The generation that is read.
    pub(super) fn db(&self) -> Arc<Db> {
        self.served.load_full()
    }

    /// The same, without counting a reference.
    pub(super) fn with_db<R>(&self, read: impl FnOnce(&Db) -> R) -> R {
        read(&self.served.load())
    }

    pub(super) fn is_to_end(&self) -> bool {
        self.state.lock().stop_requested
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        #[cfg(feature = "shipping")]
        self.note_applied(&state);
        drop(state);
        self.changed.notify_all();
    }

    /// A mirror tells its origin how far its views have got.
    #[cfg(feature = "shipping")]
    fn note_applied(&self, state: &State) {
        let is_closed = state.stop_requested || matches!(state.phase, Phase::Closed);
        for (applier, journal) in self.appliers.iter().zip(self.sources.ids()) {
            match is_closed {
                true => applier.leave(),
                // Rows may be of another history, or of another journal.
                false if !state.judged => applier.note(Position::START),
                false => applier.note(state.applied.checkpoints.position(*journal)),
            }
        }
    }

    /// Keeps the others from applying; `None` if it isn't this one's turn any more.
    fn take_turn(&self, turn: u64) -> Option<MutexGuard<'_, u64>> {
        Some(self.turn.lock()).filter(|now| **now == turn)
    }

    /// Whether something is being applied, or another generation is taking over.
    pub(super) fn is_busy(&self) -> bool {
        self.turn.is_locked()
    }

    /// Keeps everybody from applying.
    pub(super) fn stand_still(&self) -> MutexGuard<'_, u64> {
        self.turn.lock()
    }

    /// From now on `db` is read, of which `progress` is durable. The turn is its runner's.
    pub(super) fn flip(
        &self,
        turn: &mut MutexGuard<'_, u64>,
        db: Arc<Db>,
        progress: &Progress,
    ) -> u64 {
        **turn += 1;
        // Rows first: whoever learns how far the view is finds them.
        self.served.store(db);
        self.change(|state| {
            (state.phase, state.judged) = (Phase::Following, true);
            state.applied = progress.clone();
            state.durable = progress.checkpoints.clone();
            state.flush_failure = None;
            self.watchers.replaced(progress.checkpoints.first());
        });
        **turn
    }

    /// So much is applied, and these rows were written. Whoever learns the one from the state has been told the other.
    fn applied(&self, progress: &Progress, journal: JournalId, changed: Vec<Vec<u8>>) {
        self.change(|state| {
            state.applied = progress.clone();
            let checkpoints = &progress.checkpoints;
            let checkpoint = checkpoints.of(journal).unwrap_or_else(|| checkpoints.first());
            self.watchers.rows(changed, checkpoint);
        });
    }

    /// Waits until the journal has more than is in front of `position`, or something else may be due.
    fn wait_for_more(&self, position: Position, bell: Option<&Bell>) {
        match bell {
            Some(bell) => bell.wait(TICK),
            None => drop(self.sources.first().wait_past(position, TICK)),
        }
        if self.options.inline && !self.is_to_end() {
            // Whoever appends is quicker; this is for what nobody waits for.
            thread::sleep(INLINE_PAUSE);
        }
    }

    /// What rings when any of several journals has more.
    fn bell(&self) -> Option<Arc<Bell>> {
        if self.sources.others().is_empty() {
            return None;
        }
        let bell = Arc::<Bell>::default();
        for journal in self.sources.iter() {
            // Without a thread it is looked at every now and then.
            drop(bell.listen(journal.clone(), TICK));
        }
        Some(bell)
    }

    fn look_at_durable(&self) -> Result<(), StorageError> {
        if let Some(durable) = self.db().durable(self.sources.ids())? {
            self.change(|state| state.durable = durable);
        }
        Ok(())
    }

    fn end(&self, outcome: Result<(), StopError>, flushed: Result<(), StorageError>) {
        self.parking.end();
        let flush_failure = flushed.and_then(|()| self.look_at_durable()).err();
        self.change(|state| {
            state.flush_failure = flush_failure;
            match outcome {
                Err(error) => state.phase = Phase::Stopped(Arc::new(error)),
                // A view that was opened stopped stays that.
                Ok(()) if matches!(state.phase, Phase::Stopped(_)) => {}
                Ok(()) => state.phase = Phase::Closed,
            }
        });
        if matches!(self.state().phase, Phase::Closed) {
            self.watchers.end();
        }
    }

    /// The rows are made as the journal is followed: how far that is can be seen, as of any other build.
    fn begin_first_build(&self, until: Checkpoints) {
        let left = self.state().applied.checkpoints.missing_until(&until);
        if left > 0 {
            let control = Control::new(&self.options.building);
            control.pass_begins(RebuildPhase::Building, left);
            *self.first_build.lock() = Some(FirstBuild { control, until });
        }
    }

    /// It is over; whether there was one. Whoever is held up for what it has read isn't any more: who closes the view finds nobody
    /// to wake now.
    fn ends_first_build(&self) -> bool {
        let ended = self.first_build.lock().take();
        ended.inspect(|it| it.control.cancel()).is_some()
    }

    /// So much was folded since.
    fn advance_first_build(
        &self,
        before: &Checkpoints,
        applied: &Checkpoints,
    ) -> Result<(), Cancelled> {
        let Some(FirstBuild { control, until }) = self.first_build.lock().clone() else {
            return Ok(());
        };
        let [missed, missing] = [before, applied].map(|it| it.missing_until(&until));
        if missing == 0 {
            self.ends_first_build();
            return Ok(());
        }
        control
            .advance(missed.saturating_sub(missing), applied.bytes().saturating_sub(before.bytes()))
    }

    /// How far the rebuild is that is under way, or the first build.
    pub(super) fn rebuild_status(&self) -> Option<RebuildStatus> {
        if let Phase::Building { control, .. } = self.state().phase {
            return Some(control.status());
        }
        let rebuild = self.rebuild.lock();
        let rebuild = rebuild.as_ref().filter(|control| !control.has_ended());
        let follows = matches!(self.state().phase, Phase::Following);
        let first_build = || self.first_build.lock().clone().filter(|_| follows);
        rebuild
            .map(|control| control.status())
            .or_else(|| first_build().map(|it| it.control.status()))
    }

    /// Whether the view has applied `position` of this journal, or why it won't.
    pub(super) fn has_applied(
        &self,
        journal: JournalId,
        wanted: Position,
    ) -> Result<bool, WaitError> {
        self.state.lock().has_applied(journal, wanted)
    }

    /// Waits until the view has applied `position` of this journal.
    pub(super) fn wait_until_applied(
        &self,
        journal: JournalId,
        wanted: Position,
        deadline: Option<Instant>,
    ) -> Result<(), WaitError> {
        let mut state = self.state.lock();
        loop {
            if state.has_applied(journal, wanted)? {
                return Ok(());
            }
            let reached = state.applied.checkpoints.position(journal);
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if Instant::now() >= deadline => {
                    return Err(WaitError::Timeout { reached, wanted });
                }
                Some(deadline) => drop(self.changed.wait_until(&mut state, deadline)),
            }
        }
    }
}

impl State {
    fn has_applied(&self, journal: JournalId, wanted: Position) -> Result<bool, WaitError> {
        match &self.phase {
            _ if self.judged && self.applied.checkpoints.position(journal) >= wanted => Ok(true),
            Phase::Building { .. } | Phase::Following | Phase::AwaitingMirror => Ok(false),
            Phase::Stopped(error) => Err(WaitError::Stopped(error.clone())),
            Phase::Closed => Err(WaitError::Closed),
        }
    }
}

impl Running {
    /// Begins a thread that ends with the view.
    pub(super) fn spawn(
        &self,
        view: &'static str,
        kind: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), ViewError> {
        let thread = thread::Builder::new()
            .name(format!("{kind}-{view}"))
            .spawn(run)
            .map_err(|source| ViewError::Thread { view, source: Arc::new(source) })?;
        let mut threads = self.threads.lock();
        threads.retain(|it| it.thread.as_ref().is_none_or(|thread| !thread.is_finished()));
        threads.push(Spawned { id: thread.thread().id(), thread: Some(thread) });
        Ok(())
    }

    /// Ends the threads, and waits until they have flushed what they have applied.
    pub(super) fn close(&self) -> Result<(), ViewError> {
        self.shared.change(|state| state.stop_requested = true);
        if let Phase::Building { control, .. } = self.shared.state().phase {
            control.cancel();
        }
        if let Some(control) = &*self.shared.rebuild.lock() {
            control.cancel();
        }
        if let Some(first) = &*self.shared.first_build.lock() {
            first.control.cancel();
        }
        self.shared.watchers.end();
        if inline::is_stepping() || is_within_fold() {
            return Ok(()); // others wait for the fold that closes a view: it may not wait for them
        }
        let is_own = self.threads.lock().iter().any(|it| it.id == thread::current().id());
        // A view may hold a handle to itself: its threads can't wait for their own end.
        if !is_own {
            self.wait_for_threads();
        }
        if let Some(inline) = self.inline.get() {
            inline.leave(&self.shared);
        }
        let failure = self.shared.state().flush_failure;
        failure.map_or(Ok(()), |error| Err(ViewError::Storage(error)))
    }

    fn wait_for_threads(&self) {
        let _closing = self.closing.lock();
        let take = |it: &mut Spawned| it.thread.take();
        let threads: Vec<_> = self.threads.lock().iter_mut().filter_map(take).collect();
        for thread in threads {
            // The threads catch every panic of the view's code; there is nothing to hand on.
            drop(thread.join());
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Whoever wants to know how it ended calls close.
        drop(self.close());
    }
}
