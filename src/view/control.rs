//! What can be done with a view of any kind: ask how it is, wait for it, rebuild it, close it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::base::{self, Beside, ViewBase};
use super::chunk::refuse_within_fold;
use super::error::{StopError, ViewError, WaitError};
use super::generation::Generation;
use super::inline;
use super::poison::ParkedCounts;
use super::program::Managed;
use super::rebuild::{
    Comparison, Digest, GenerationInfo, RebuildError, RebuildHandle, RebuildOptions, RebuildStatus,
};
use super::runner::{Phase, Running, Shared, beginning};
use super::sources::Checkpoints;
use super::takeover::{Source, digest_of};
use crate::event::KnownKind;
use crate::journal::{Fork, Journal};
use crate::position::{Checkpoint, Token};

/// How far a view has got with a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewCheckpoint {
    /// What readers see: the next event to be applied.
    pub applied: Checkpoint,
    /// What survives a crash, when it was last looked at: never more than really does.
    pub durable: Checkpoint,
}

/// How a view is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ViewStatus {
    /// What it is doing.
    pub state: ViewState,
    /// How far it has got; with its first journal, if it has several.
    pub checkpoint: ViewCheckpoint,
    /// Where the journal ends; the first, if it has several.
    pub journal_end: Checkpoint,
    /// The same for each journal of the view.
    pub journals: Vec<JournalStatus>,
    /// How many durable events of its journals, as they are on this machine, the view hasn't applied; `None`
    /// when that says nothing, because the view doesn't follow them any more. How far a mirrored journal is
    /// behind its origin is told by the mirror's status.
    pub lag_events: Option<u64>,
    /// How many of the events in front of its checkpoint were of types that it doesn't know.
    pub skipped_events: u64,
    /// How much is parked, because events can't be applied.
    pub parked: ParkedCounts,
    /// The folder of the generation that is served.
    pub generation: PathBuf,
    /// The folder of the generation that was set aside at this opening, because it was of another history
    /// than the journal, or had other indexes than the view declares, or its journals were taken in in an order that isn't
    /// recorded any more. Delete it when it is of no more use.
    pub set_aside: Option<PathBuf>,
    /// The rebuild that is under way, or the building of the first generation.
    pub rebuild: Option<RebuildStatus>,
}

impl ViewStatus {
    /// Whether a journal of the view is a mirror that has halted because its origin has another history: rows are
    /// served as they are, but they are stale, and [`journals`](Self::journals) says of which journal.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        self.journals.iter().any(|journal| journal.fork.is_some())
    }
}

/// How a view is doing with one of its journals.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct JournalStatus {
    /// How far it has got.
    pub checkpoint: ViewCheckpoint,
    /// The journal's durable end.
    pub end: Checkpoint,
    /// How many events it has yet to apply; `None` while it doesn't follow the journals.
    pub lag_events: Option<u64>,
    /// The journal is a mirror that has halted, because its origin has another history: the rows are stale, and may
    /// be made of events that the origin doesn't have.
    pub fork: Option<Fork>,
}

/// What a view is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ViewState {
    /// Its first generation is built in bulk: its rows appear all at once, when that is done.
    Building,
    /// It applies events that are there already.
    CatchingUp,
    /// It has applied all there is.
    CaughtUp,
    /// It has applied more than the mirror holds, and waits until the mirror has got as far, to compare.
    AwaitingMirror,
    /// It can't go on. Its rows are as of its checkpoint.
    Stopped(Arc<StopError>),
    /// It was closed, or its journal was, or the journal's writer failed. Its rows are as of its checkpoint.
    Closed,
}

/// An open view, whatever its rows are. Cheap to clone; the view is closed when the last clone and handle is dropped.
///
/// Every handle of a view derefs to this one; [`control`](Self::control) keeps it, to have views of several kinds
/// in one list.
#[derive(Clone)]
pub struct ViewControl {
    running: Arc<Running>,
    program: Arc<dyn Managed>,
}

impl std::fmt::Debug for ViewControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ViewControl")
            .field("name", &self.name())
            .field("version", &self.version())
            .field("checkpoint", &self.checkpoint())
            .finish_non_exhaustive()
    }
}

impl ViewControl {
    pub(super) fn new(running: Running, program: Arc<dyn Managed>) -> Self {
        Self { running: Arc::new(running), program }
    }

    pub(super) const fn running(&self) -> &Arc<Running> {
        &self.running
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.running.shared
    }

    /// The same view, without the types of its rows.
    #[must_use]
    pub fn control(&self) -> Self {
        self.clone()
    }

    /// The view's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.program.name()
    }

    /// The version of the view that is open.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.program.version()
    }

    /// The types of events that it folds; all if none.
    pub(super) fn kinds(&self) -> &'static [KnownKind] {
        self.program.kinds()
    }

    /// Waits until the view has applied the append that gave `token`, for `timeout` at most.
    ///
    /// # Errors
    /// [`WaitError`]; in particular, a token of events that were lost is not honoured by other events at
    /// its position.
    pub fn wait_for(&self, token: &Token, timeout: Duration) -> Result<(), WaitError> {
        let shared = self.shared();
        let deadline = Instant::now().checked_add(timeout);
        let pending = is_pending(shared, token)?;
        inline::help(shared, token.journal, token.position, deadline);
        shared.wait_until_applied(token.journal, token.position, deadline)?;
        if pending && is_pending(shared, token)? {
            let reached = shared.state().applied.checkpoints.position(token.journal);
            return Err(WaitError::Timeout { reached, wanted: token.position });
        }
        Ok(())
    }

    /// Waits until the view has applied everything that is durable in its journal now, for `timeout` at most. Of a
    /// mirrored journal that is what the mirror has: how far its origin is, only a token of the origin can say.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_for_latest(&self, timeout: Duration) -> Result<(), WaitError> {
        let shared = self.shared();
        let deadline = Instant::now().checked_add(timeout);
        let ends = shared.sources.end();
        inline::help(shared, ends.first().journal, ends.first().position, deadline);
        ends.iter()
            .try_for_each(|end| shared.wait_until_applied(end.journal, end.position, deadline))
    }

    /// How far the view has got; with its first journal, if it has several.
    #[must_use]
    pub fn checkpoint(&self) -> ViewCheckpoint {
        let state = self.shared().state();
        ViewCheckpoint {
            applied: state.applied.checkpoints.first(),
            durable: state.durable.first(),
        }
    }

    /// How the view is doing.
    #[must_use]
    pub fn status(&self) -> ViewStatus {
        let shared = self.shared();
        let state = shared.state();
        let ends = shared.sources.end();
        let follows = matches!(state.phase, Phase::Following | Phase::Building { .. });
        let journals = ends.iter().map(|end| {
            let of =
                |it: &Checkpoints| it.of(end.journal).unwrap_or_else(|| beginning(end.journal));
            let (applied, durable) = (of(&state.applied.checkpoints), of(&state.durable));
            let lag_events = follows.then(|| end.position.since(applied.position));
            let checkpoint = ViewCheckpoint { applied, durable };
            let fork = shared.sources.get(end.journal).and_then(Journal::fork);
            JournalStatus { checkpoint, end: *end, lag_events, fork }
        });
        let behind = ends.events().saturating_sub(state.applied.checkpoints.events());
        ViewStatus {
            journals: journals.collect(),
            state: match state.phase {
                Phase::Building { .. } => ViewState::Building,
                Phase::Following if behind == 0 => ViewState::CaughtUp,
                Phase::Following => ViewState::CatchingUp,
                Phase::AwaitingMirror => ViewState::AwaitingMirror,
                Phase::Stopped(error) => ViewState::Stopped(error),
                Phase::Closed => ViewState::Closed,
            },
            checkpoint: self.checkpoint(),
            journal_end: ends.first(),
            lag_events: follows.then_some(behind),
            skipped_events: state.applied.skipped_events,
            parked: state.applied.parked,
            generation: shared.db().path().to_owned(),
            set_aside: shared.set_aside.clone(),
            rebuild: shared.rebuild_status(),
        }
    }

    /// Builds the view's rows anew from the journal, in a generation beside the one that is served, and lets it take
    /// over. Reads go on all the time. Returns at once; the handle tells how far it is, and can pause it, slow it
    /// down or cancel it. The old generation is kept, for [`rollback`](Self::rollback), until it is
    /// [removed](Self::remove_generation); it needs its disk space twice.
    ///
    /// An event that can't be applied ends it: a generation with holes never takes over. So do removed events
    /// ([`ReadError::Truncated`](crate::ReadError::Truncated)).
    ///
    /// # Errors
    /// [`ViewError::Rebuilding`] if a rebuild is under way, [`ViewError::Closed`], [`ViewError::WithinFold`]; others if
    /// there can't be a thread.
    pub fn rebuild(&self, options: RebuildOptions) -> Result<RebuildHandle, ViewError> {
        self.program.clone().begin(&self.running, options, Source::Journal)
    }

    /// Goes back to the generation that was live before the present one: it catches up with the journal and takes over, as
    /// after a rebuild. The present one is kept. After another opening, "before" is the one with the next lower number.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild); [`ViewError::NoGeneration`] if none is kept.
    pub fn rollback(&self) -> Result<RebuildHandle, ViewError> {
        refuse_within_fold(self.name())?;
        let shared = self.shared();
        let number = {
            let folder = shared.folder.lock();
            let live = folder.live_number().unwrap_or_default();
            let kept =
                folder.all()?.into_iter().filter(|it| it.version == self.version() && !it.live);
            let kept: Vec<u32> = kept.map(|it| it.number).collect();
            let previous = shared.previous.lock().filter(|number| kept.contains(number));
            let lower = || kept.iter().copied().filter(|number| *number < live).max();
            let lowest = live.saturating_sub(1);
            let before = previous.or_else(lower);
            before.map_or_else(|| folder.existing(lowest).map(|_| lowest), Ok)?
        };
        let options = RebuildOptions::default();
        self.program.clone().begin(&self.running, options, Source::Generation(number))
    }

    /// Exports a base into the directory `dir`, which is new or empty: the rows as they are, what is parked, what was
    /// decided about it, and of each journal as much of its end as a mirror needs to begin there. Whoever imports it
    /// ([`ViewOptions::base`](super::ViewOptions::base), [`import_base`](Self::import_base)) serves without having folded the
    /// history, and without having it.
    ///
    /// Folding stands still while the database is flushed and its files are linked (copied, if `dir` is on another file
    /// system); reads go on. Then every row is read once. Durable when this returns; what an interrupted export has left is no
    /// base, and is replaced by repeating it. Blocks until then.
    ///
    /// ```
    /// # use headwater::view::{Fold, FoldError, Keys, View, ViewOptions};
    /// # use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
    /// # use std::time::Duration;
    /// # struct Count;
    /// # impl View for Count {
    /// #     const NAME: &'static str = "count";
    /// #     const VERSION: u32 = 1;
    /// #     type Key = StreamId;
    /// #     type Row = u64;
    /// #     type Event = Vec<u8>;
    /// #     fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
    /// #         keys.add(event.stream().clone());
    /// #     }
    /// #     fn fold(&self, _: &StreamId, n: Option<u64>, _: &Recorded<Vec<u8>>) -> Result<Fold<u64>, FoldError> {
    /// #         Ok(Fold::Put(n.unwrap_or(0) + 1))
    /// #     }
    /// # }
    /// # let dir = tempfile::tempdir()?;
    /// # let patience = Duration::from_secs(10);
    /// # let orders = Store::create(dir.path().join("orders"))?;
    /// # let order = StreamId::new("order-7")?;
    /// # let placed = NewEvent::raw("order.placed", *b"")?;
    /// # let appended = orders.append(&Append::to(&order, ExpectedRevision::Any, [placed]))?;
    /// # let count = orders.view(Count)?;
    /// # count.wait_for(&appended.token(), patience)?;
    /// # let base = dir.path().join("base");
    /// // Where the view is:
    /// count.export_base(&base)?;
    ///
    /// # #[cfg(feature = "shipping")] {
    /// # use headwater::shipping::FollowOptions;
    /// // Elsewhere, with a copy of that directory: it serves at once, and follows from there.
    /// let customers = Store::create(dir.path().join("customers"))?;
    /// let begin = FollowOptions { begin_with: Some(base.clone()), ..FollowOptions::default() };
    /// let mirror = customers.mirror_with("orders", "127.0.0.1:1", begin)?;
    /// let journal = mirror.wait_ready(patience)?;
    /// let options = ViewOptions { base: Some(base), ..ViewOptions::default() };
    /// assert_eq!(customers.view_of_with(&journal, Count, options)?.get("order-7")?, Some(1));
    /// # }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError::NotJudged`] if the rows aren't known to be of the journal as it is, or are being built;
    /// [`ViewError::Base`] if there is something in the directory, or the end of the journal can't be read;
    /// [`ViewError::WithinFold`]; others of the database and the file system.
    pub fn export_base(&self, dir: &Path) -> Result<ViewBase, ViewError> {
        refuse_within_fold(self.name())?;
        let shared = self.shared();
        if !shared.state().judged {
            return Err(ViewError::NotJudged { view: self.name() });
        }
        let fs = Arc::clone(shared.folder.lock().fs());
        base::export(&fs, dir, &shared.sources, |rows| {
            // Whose turn it is writes rows and decisions: they are of one moment.
            let _turn = shared.stand_still();
            shared.db().export(rows)?;
            let (discarded, deadly) = (shared.parking.discarded(), shared.attempts.deadly());
            Ok(Beside { discarded, deadly, intake: shared.intake.bytes()? })
        })
    }

    /// Lets the rows of the base in `dir` take the place of those that are served, as a [`rebuild`](Self::rebuild) does with
    /// new ones: they are copied, verified, compared with the journals by the chain, and brought up to date beside the
    /// generation that serves, which is kept, for [`rollback`](Self::rollback). Returns at once. A view that begins is given
    /// its base with [`ViewOptions::base`](super::ViewOptions::base).
    ///
    /// The rows themselves aren't compared: the base may be right where the ones that are served aren't.
    ///
    /// # Errors
    /// As [`rebuild`](Self::rebuild). What is wrong with the base is told by the handle, as [`RebuildError::View`].
    pub fn import_base(&self, dir: &Path) -> Result<RebuildHandle, ViewError> {
        let source = Source::Base(dir.to_owned());
        self.program.clone().begin(&self.running, RebuildOptions::default(), source)
    }

    /// Proves that the rows are what the journal makes: builds them again, beside, as of this moment, and compares.
    /// Blocks until that is done; reads and the fold go on.
    ///
    /// # Errors
    /// [`RebuildError`]. Rows that differ are no error but the answer.
    pub fn check(&self, options: RebuildOptions) -> Result<Comparison, RebuildError> {
        self.program.clone().check(&self.running, options)
    }

    /// What the rows come to, as of now. Reads all of them.
    ///
    /// # Errors
    /// [`RebuildError::Stopped`] if the database fails.
    pub fn digest(&self) -> Result<Digest, RebuildError> {
        digest_of(self.name(), &self.shared().db().snapshot(), None)
    }

    /// The generations of the view on disk, of all versions, but for one that is being built.
    ///
    /// # Errors
    /// [`ViewError::Io`].
    pub fn generations(&self) -> Result<Vec<GenerationInfo>, ViewError> {
        let all = self.shared().folder.lock().all()?;
        let info = |it: Generation| GenerationInfo {
            version: it.version,
            number: it.number,
            live: it.live,
            folder: it.folder().to_owned(),
        };
        Ok(all.into_iter().map(info).collect())
    }

    /// Deletes a generation that isn't live any more, with its folder: at once, or when the last snapshot of it is
    /// dropped. `false` if there is none.
    ///
    /// # Errors
    /// [`ViewError::Live`] if its version reads it, [`ViewError::Rebuilding`] while a rebuild is under way,
    /// [`ViewError::InUse`] if it is of another version that is open.
    pub fn remove_generation(&self, version: u32, number: u32) -> Result<bool, ViewError> {
        let shared = self.shared();
        let rebuild = shared.rebuild.lock(); // none begins meanwhile
        if rebuild.as_ref().is_some_and(|control| !control.has_ended()) {
            return Err(ViewError::Rebuilding { view: self.name() });
        }
        if version != self.version() {
            return shared.folder.lock().remove_other(version, number);
        }
        let forgotten = shared.folder.lock().forget(number)?;
        forgotten.map_or(Ok(false), |folder| shared.openings.delete(&folder).map(|()| true))
    }

    /// Stops following the journal, for all clones, and makes durable what is applied. Blocks until then; not from within
    /// the code of a view, which others may be waiting for.
    /// Reads go on; the view can be opened again when the last clone, snapshot and iterator is dropped.
    ///
    /// # Errors
    /// [`ViewError::Storage`] if not all could be made durable; the journal makes up for it at the next
    /// opening.
    pub fn close(&self) -> Result<(), ViewError> {
        self.running.close()
    }
}

/// Whether the journal doesn't reach the token's position yet.
fn is_pending(shared: &Shared, token: &Token) -> Result<bool, WaitError> {
    let sources = &shared.sources;
    let journal = sources.get(token.journal).unwrap_or_else(|| sources.first());
    Ok(journal.is_pending(token)?)
}
