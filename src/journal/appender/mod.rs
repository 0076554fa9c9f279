//! The one writer of an origin: group commit.
//!
//! ```text
//!  caller     encode │ lock: duplicates? expected? room? assign │ checksum, digest │ wait … answer
//!  leader                             close the group │ chain, headers │ write │ sync │ publish │ answer
//!  group 1    ── open ──▶ written ─────────────▶ syncing ─────────────▶ durable
//!  group 2                open …………… (large: written meanwhile) ……………▶ syncing ──▶ durable
//! ```
//! - Callers encode outside the lock, take their place in the open group under it, and compute checksum and
//!   digest outside it again. Whoever finds the way free becomes the leader: it closes the group, chains
//!   and writes its batches, syncs once, publishes the durable end and answers everybody. There is no timer:
//!   the next group fills for as long as a sync takes. A lone caller does everything itself, without a
//!   thread; those who don't wait (tickets, buffered appends) are led by a thread that begins with the first.
//! - One sync is under way at a time. A small group stays open until it has ended, so that more can join; a
//!   large one ([`OVERLAP_BYTES`]) is closed and written during it. So at most two groups are on their way
//!   to the disk, which is what recovery keeps space for.
//! - After a place was assigned, every failed write or sync poisons the writer, for ever: those of groups
//!   that may have reached the disk get `Unknown`, everybody else `Poisoned`, all at once.
//! - No answer rests on what isn't durable: a conflict or duplicate that is decided by a batch behind the
//!   durable end is given only once that batch is durable.
//! - Segments are prepared ahead and cut behind, beside the commit path ([`keeper`](super::keeper)).

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use crate::error::{AppendError, IoError, OpenError, Poison};
use crate::event::{EventId, Recorded, Revision, StreamId};
use crate::format::Flags;
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader, padded_len};
use crate::format::files::{Node, Role};
use crate::format::segment::SegmentHeader;
use crate::fs::Fs;
use crate::journal::keeper::Keeper;
use crate::journal::mark;
use crate::journal::recovery::{self, RecoveryReport};
use crate::journal::segments::Access;
use crate::journal::spare::Spare;
use crate::journal::writer::{Failure, Writer};
use crate::journal::{Journal, Locked, new_incarnation, read_node};
use crate::options::JournalOptions;
#[cfg(feature = "test-kit")]
use crate::planted::{self, Bug};
use crate::position::{
    Chain, Checkpoint, Durability, Incarnation, JournalId, NodeId, Position, Token,
};
use crate::sync::{self, Condvar, Mutex, MutexGuard, Thread};

mod append;
mod commit;
mod decide;
mod group;
mod labels;
mod ticket;
mod window;

pub use append::{Append, Appended, Placed, Receipt, ViewBehind};
pub use ticket::Ticket;

use commit::Stage;
use decide::{Decision, Looked};
use group::{Draft, Group, OpenGroup, Outcome, Slot};
use labels::RecentLabels;
use window::IdWindow;

/// Accepts appends to a journal. `append` may be called from many threads at once; they share syncs.
#[derive(Debug)]
pub struct Appender {
    shared: Arc<Shared>,
    /// Leads the groups in which nobody blocks; begins with the first such append.
    committer: Mutex<Option<Thread>>,
}

#[derive(Debug)]
struct Shared {
    journal: Journal,
    keeper: Arc<Keeper>,
    options: JournalOptions,
    incarnation: Incarnation,
    epoch: u32,
    report: RecoveryReport,
    state: Mutex<State>,
    /// The leader waits here until the members of its group have computed their checksums.
    ready: Condvar,
    /// The leader of a written group waits here until the sync before its own has ended.
    turn: Condvar,
    /// Whoever needs room (in the open group, in the segment, within the bounds of what may be buffered)
    /// or the journal to be idle waits here.
    room: Condvar,
    /// The committer waits here.
    work: Condvar,
    /// Whether `labels` are kept, for those who prepare theirs in front of the lock.
    labels_kept: AtomicBool,
    /// Used by the leader only; the stages keep others away. Gone after `close`.
    writer: Mutex<Option<Writer>>,
}

#[derive(Debug)]
struct State {
    /// Where the next batch goes.
    next: Place,
    durable_offset: u64,
    /// Bytes of batches that the active segment can still take behind `next`.
    room_bytes: u64,
    alignment: Alignment,
    open: OpenGroup,
    /// Closed groups that have no outcome yet; at most two.
    closed: VecDeque<ClosedGroup>,
    /// What is going on in front of the sync.
    stage: Stage,
    syncing: bool,
    end: Option<Ended>,
    /// Last revisions of streams, of batches that aren't durable, and where these end.
    heads: HashMap<StreamId, (Revision, Position), RandomState>,
    window: IdWindow,
    /// The last events by type and tags, once somebody has made a condition on them.
    labels: Option<RecentLabels>,
    /// The end of the last append that was answered before it was durable.
    buffered: Position,
    committer: CommitterState,
}

#[derive(Debug)]
struct ClosedGroup {
    group: Arc<Group>,
    end: Position,
    began: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommitterState {
    None,
    Running,
    Stopping,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    position: Position,
}

/// Groups end at multiples of `bytes` behind the active segment's base.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    base_offset: u64,
    bytes: u64,
}

impl Alignment {
    fn of(writer: &Writer) -> Self {
        writer.page().map_or(Self { base_offset: 0, bytes: 64 }, |page| Self {
            base_offset: page.header.base_offset,
            bytes: u64::from(page.header.group_alignment),
        })
    }
}

/// Why nothing more is accepted.
#[derive(Clone, Debug)]
enum Ended {
    Poisoned(Poison),
    Closed,
}

/// How the caller of an append waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// On its thread, where it can lead.
    Blocking,
    /// Elsewhere, or not at all.
    Elsewhere,
}

/// What became of an append under the lock.
enum Entered {
    Answered(Appended),
    InGroup(Arc<Group>, Receipt),
}

impl Appender {
    /// Creates a journal; its first segment is durable when this returns.
    pub(crate) fn create(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
    ) -> Result<Self, OpenError> {
        Self::create_as(Role::Origin, NodeId::random(), fs, dir, options)
    }

    /// The same for what is received of a feed.
    pub(crate) fn create_as(
        role: Role,
        node: NodeId,
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
    ) -> Result<Self, OpenError> {
        options.check()?;
        let locked = Locked::take(fs, dir)?;
        locked.refuse_unfinished()?;
        let exists = OpenError::AlreadyExists { path: dir.to_owned() };
        if read_node(&**fs, &locked.layout)?.is_some() || locked.has_segments()? {
            return Err(exists);
        }
        let mark = mark::read(&**fs, &locked.layout, Access::Writer)?;
        if let Some(mark) = mark.filter(|mark| mark.end.offset > 0) {
            // Not even `node`: what is restored here later must find the directory as it was.
            let position = mark.end.position;
            return Err(OpenError::LostJournal { path: dir.to_owned(), position });
        }
        let node = Node { role, node, journal: JournalId::random() };
        Self::start(locked, node, options)
    }

    /// Opens a journal, after recovery. `witnessed` says that something else (a view) remembers events of
    /// this journal, so that an empty directory is a loss and not a beginning.
    pub(crate) fn open(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
        witnessed: bool,
    ) -> Result<Self, OpenError> {
        Self::open_as(Role::Origin, fs, dir, options, witnessed)
    }

    /// The same for what is received of a feed.
    pub(crate) fn open_as(
        role: Role,
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
        witnessed: bool,
    ) -> Result<Self, OpenError> {
        options.check()?;
        let not_found = || OpenError::NotFound { path: dir.to_owned() };
        if fs.list(dir).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Err(not_found());
        }
        let locked = Locked::take(fs, dir)?;
        locked.refuse_unfinished()?;
        let Some(node) = read_node(&**fs, &locked.layout)? else {
            let path = dir.to_owned();
            return Err(if locked.has_segments()? {
                OpenError::Copy { path }
            } else {
                not_found()
            });
        };
        if node.role != role {
            let (found, wanted) = (node.role, role);
            return Err(OpenError::Role { path: dir.to_owned(), found, wanted });
        }
        let survey = recovery::survey(&**fs, &locked.layout, &node, Access::Writer)?;
        if survey.is_empty() {
            let position = survey.mark.map_or(Position::START, |mark| mark.end.position);
            if witnessed || survey.mark.is_some_and(|mark| mark.end.offset > 0) {
                return Err(OpenError::LostJournal { path: dir.to_owned(), position });
            }
            // `create` was interrupted before its first segment was durable.
            return Self::start(locked, node, options);
        }
        if witnessed && survey.has_no_segment() {
            // Not an interrupted `create`: what remembers events came after it.
            let position = survey.end.position;
            return Err(OpenError::LostJournal { path: dir.to_owned(), position });
        }
        let reserve = 2 * options.group_bytes_max;
        let recovered = recovery::mend(&**fs, &locked.layout, &node, survey, reserve)?;
        let journal = Journal::new(fs, &locked.layout, node, &recovered, options.recent_bytes_max)?;
        let page = recovered.kept.last().map(|kept| kept.page.clone());
        let writer = Writer::open(locked, journal, recovered.mark, page, options)?;
        Self::assemble(writer, options, recovered.epoch_next, recovered.report)
    }

    /// Makes `node` and segment 0 of a new journal. A `node` that an interrupted attempt left is written
    /// again: the sync of its name may have failed.
    fn start(locked: Locked, node: Node, options: &JournalOptions) -> Result<Self, OpenError> {
        locked.write_node(&node)?;
        let fs = Arc::clone(&locked.fs);
        let survey = recovery::survey(&*fs, &locked.layout, &node, Access::Writer)?;
        let reserve = 2 * options.group_bytes_max;
        let recovered = recovery::mend(&*fs, &locked.layout, &node, survey, reserve)?;
        let journal =
            Journal::new(&fs, &locked.layout, node, &recovered, options.recent_bytes_max)?;
        let mut writer = Writer::open(locked, journal, recovered.mark, None, options)?;
        let opened = new_incarnation();
        first_segment(&mut writer, opened, options).map_err(|failure| match failure {
            Failure::DiskFull(error) | Failure::Fatal(error) => OpenError::Io(error),
        })?;
        let report = RecoveryReport { clean: true, ..RecoveryReport::default() };
        Self::assemble(writer, options, 1, report)
    }

    fn assemble(
        writer: Writer,
        options: &JournalOptions,
        epoch: u32,
        report: RecoveryReport,
    ) -> Result<Self, OpenError> {
        let journal = writer.journal.clone();
        let end = journal.end();
        let window = journal.id_window(options.idempotency_window_events)?;
        let mut state = State {
            next: Place { offset: end.offset, position: end.position },
            durable_offset: end.offset,
            room_bytes: 0,
            alignment: Alignment::of(&writer),
            open: OpenGroup::new(),
            closed: VecDeque::new(),
            stage: Stage::Free,
            syncing: false,
            end: None,
            heads: HashMap::default(),
            window,
            labels: None,
            buffered: Position::START,
            committer: CommitterState::None,
        };
        state.enter_segment(&writer, end.offset);
        let shared = Arc::new(Shared {
            journal,
            keeper: writer.keeper(),
            options: options.clone(),
            incarnation: new_incarnation(),
            epoch,
            report,
            state: Mutex::new(state),
            ready: Condvar::new(),
            turn: Condvar::new(),
            room: Condvar::new(),
            work: Condvar::new(),
            labels_kept: AtomicBool::new(false),
            writer: Mutex::new(Some(writer)),
        });
        Ok(Self { shared, committer: Mutex::new(None) })
    }

    /// The reading side.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.shared.journal
    }

    /// What opening found and did.
    #[must_use]
    pub fn recovery_report(&self) -> &RecoveryReport {
        &self.shared.report
    }

    /// The last failure beside the commit path: recording the durable end, preparing the next segment or
    /// cutting a full one; `None` if the last attempt worked. It makes no append fail; it weakens what recovery
    /// can prove, or makes the next roll slower.
    #[must_use]
    pub fn background_error(&self) -> Option<IoError> {
        self.shared.keeper.error()
    }

    /// Appends a batch. The events are what the append's [`Durability`] says when this returns `Ok`: by
    /// default, durable.
    ///
    /// Blocks for one sync, sometimes for two; callers on several threads share them. A buffered append
    /// blocks only while more is unsynced than the options allow.
    ///
    /// # Errors
    /// [`AppendError`]; every one but [`AppendError::Unknown`] means that nothing was written.
    pub fn append(&self, append: &Append) -> Result<Appended, AppendError> {
        if append.durability == Durability::Buffered {
            return self.submit(append)?.wait();
        }
        #[cfg(feature = "test-kit")]
        if planted::is(Bug::SplitBatch)
            && let Some((first, rest)) = append.split()
        {
            return self.append(&first).and_then(|_| self.append(&rest));
        }
        let (group, receipt) = match self.shared.enter(append, Waits::Blocking)? {
            Entered::Answered(appended) => return Ok(appended),
            Entered::InGroup(group, receipt) => (group, receipt),
        };
        self.shared.see_through(&group).answer(receipt)
    }

    /// Appends a batch without waiting for it: the [`Ticket`] gives the answer. It has its place when this
    /// returns, behind everything that was submitted before, and is committed whether or not anybody waits.
    ///
    /// Blocks only for room: while the open group is full, while a segment is being changed, while more is
    /// unsynced than the options allow, or while the answer to this append rests on one under way.
    ///
    /// # Errors
    /// [`AppendError`], none of which means that anything was written.
    pub fn submit(&self, append: &Append) -> Result<Ticket, AppendError> {
        let has_committer = self.ensure_committer();
        let (group, receipt) = match self.shared.enter(append, Waits::Elsewhere)? {
            Entered::Answered(appended) => return Ok(Ticket::answered(appended)),
            Entered::InGroup(group, receipt) => (group, receipt),
        };
        if !has_committer {
            self.shared.see_through(&group);
        }
        Ok(match append.durability {
            Durability::Buffered => Ticket::answered(Appended::New(receipt)),
            Durability::Durable => Ticket::pending(group, receipt),
        })
    }

    /// The batch of the event with this id, and its token, if it is among the last events; once it is durable.
    pub(crate) fn find(&self, id: EventId) -> Result<Option<(Token, Vec<Recorded>)>, AppendError> {
        self.shared.find(id)
    }

    /// Waits until everything that was appended before is durable. Returns the durable end.
    ///
    /// # Errors
    /// [`AppendError::Poisoned`] if that can't be any more.
    pub fn flush(&self) -> Result<Checkpoint, AppendError> {
        self.shared.flush()
    }

    /// Whether there is a thread that leads for those who don't wait. Where there can't be one, they lead.
    fn ensure_committer(&self) -> bool {
        let mut committer = self.committer.lock();
        if committer.is_none() {
            let shared = Arc::clone(&self.shared);
            *committer = sync::spawn("headwater-commit", move || shared.run_committer());
            if committer.is_some() {
                self.shared.state.lock().start_committer();
            }
        }
        committer.is_some()
    }

    /// Closes the journal: waits for what is under way, refuses everything later, marks the journal as
    /// cleanly closed and releases its lock. Closing again does nothing.
    ///
    /// # Errors
    /// The poison, if a write or sync had failed; or the failure to write the mark, which loses nothing.
    pub fn close(&self) -> Result<(), CloseError> {
        let poison = self.finish();
        self.shared.journal.close_watch();
        let _retention = self.shared.journal.retention_guard(); // the lock is held as long as it goes on
        match (self.shared.writer.lock().take(), poison) {
            (_, Some(poison)) => Err(CloseError::Poisoned(poison)),
            (Some(writer), None) => {
                writer.close(None).map_err(CloseError::Mark)?;
                self.shared.keeper.uncut().map_or(Ok(()), |error| Err(CloseError::Cut(error)))
            }
            (None, None) => Ok(()),
        }
    }

    /// Lets nobody new in, waits for what is under way, and ends the committer.
    fn finish(&self) -> Option<Poison> {
        let poison = {
            let mut state = self.shared.state.lock();
            // First nobody new, or those who come one after the other would keep it open for ever.
            state.end.get_or_insert(Ended::Closed);
            while !state.is_idle() {
                self.shared.room.wait(&mut state);
            }
            // Also if there is none: one that is being started beside this must end at once.
            state.committer = CommitterState::Stopping;
            state.poison().cloned()
        };
        self.shared.work.notify_all();
        if let Some(committer) = self.committer.lock().take() {
            drop(committer.join());
        }
        poison
    }
}

impl Drop for Appender {
    /// What was submitted or buffered is still committed.
    fn drop(&mut self) {
        self.finish();
        self.shared.journal.close_watch();
    }
}

impl Shared {
    /// Gives an append its place in the open group, or its answer.
    fn enter(&self, append: &Append, waits: Waits) -> Result<Entered, AppendError> {
        let hashes = append.id_hashes();
        append.check(&hashes)?;
        let mut draft = Draft::of(append, hashes);
        if self.labels_kept.load(Ordering::Relaxed) {
            draft.label();
        }
        let len_bytes = padded_len(draft.body_len());
        let max_bytes = u64::from(self.options.batch_bytes_max);
        if len_bytes > max_bytes {
            return Err(AppendError::TooLarge { len_bytes, max_bytes });
        }
        // Ids whose hash is known but which themselves are not.
        let mut unknown = Vec::new();
        let mut looked = Looked::of(append);
        let mut state = self.state.lock();
        self.keep_labels(&mut state, append);
        loop {
            state.check_open()?;
            match self.decide(&state, append, &draft.ids, &unknown, &looked)? {
                Decision::Write(firsts) => {
                    // If the lock was given up, everything must be decided again.
                    if self.make_room(&mut state, append.durability, len_bytes)? == Room::Here {
                        return Ok(self.join(state, append, draft, firsts, waits));
                    }
                    continue;
                }
                Decision::After(group, rests) => {
                    drop(state);
                    rests.check(self.see_through(&group))?;
                }
                Decision::Look => {
                    drop(state);
                    if let Some(answer) = self.look(append, &mut looked)? {
                        return answer.map(Entered::Answered);
                    }
                }
                Decision::Matches { condition, position } => {
                    drop(state);
                    if let Some(answer) =
                        self.judge_match(append, condition, position, &mut looked)?
                    {
                        return answer.map(Entered::Answered);
                    }
                }
                Decision::Conflict(conflict) => {
                    drop(state);
                    return self
                        .repeated_beyond_window(append)?
                        .map_or(Err(conflict), |repeated| repeated.map(Entered::Answered));
                }
                Decision::Known { hash, position } => {
                    drop(state);
                    // Two ids may have the same hash.
                    match self.judge_known(append, position)? {
                        Some(duplicate) => return duplicate.map(Entered::Answered),
                        None => unknown.push(hash),
                    }
                }
            }
            state = self.state.lock();
        }
    }

    /// From the first condition on.
    fn keep_labels(&self, state: &mut State, append: &Append) {
        if state.labels.is_none() && !append.conditions.is_empty() {
            state.labels = Some(RecentLabels::from(state.next.position));
            self.labels_kept.store(true, Ordering::Relaxed);
        }
    }

    /// Takes a place in the open group.
    fn join(
        &self,
        mut state: MutexGuard<'_, State>,
        append: &Append,
        mut draft: Draft,
        firsts: Vec<Revision>,
        waits: Waits,
    ) -> Entered {
        for (run, first) in draft.runs.iter_mut().zip(firsts) {
            run.first = first;
        }
        let header = state.assign(&draft, self);
        if let Some(labels) = &mut state.labels {
            draft.take_labels().into_iter().for_each(|event| labels.push(event));
        }
        let (group, slot) = state.take_slot(header);
        if append.durability == Durability::Buffered {
            state.buffered = header.end_position();
        }
        drop(state);

        draft.set_revisions();
        let events = placed(&draft, header.base_position);
        let batch = draft.into_batch();
        let mut state = self.state.lock();
        // The group can't have been closed: it waits for this.
        if let Some(slot) = state.open.slots.get_mut(slot) {
            slot.header.body_crc = batch.crc;
            slot.batch = Some(batch);
        }
        state.open.unready -= 1;
        if state.open.unready == 0 {
            self.ready.notify_all();
        }
        if waits == Waits::Elsewhere {
            self.call_leader(&state);
        }
        drop(state);
        let token = Token {
            journal: self.journal.id(),
            incarnation: self.incarnation,
            position: header.end_position(),
            durability: append.durability,
        };
        Entered::InGroup(group, Receipt { token, events, behind: Vec::new() })
    }

    /// Makes sure that a batch of `len_bytes` fits into the open group and the active segment, and that not
    /// too much would be buffered.
    fn make_room(
        &self,
        state: &mut MutexGuard<'_, State>,
        durability: Durability,
        len_bytes: u64,
    ) -> Result<Room, AppendError> {
        let fits_segment = len_bytes <= state.room_bytes;
        let fits_group =
            state.open.is_empty() || state.open.bytes + len_bytes <= self.options.group_bytes_max;
        let may_wait =
            durability == Durability::Durable || state.may_buffer(&self.options, len_bytes);
        if fits_segment && fits_group && may_wait {
            return Ok(Room::Here);
        }
        if state.is_idle() {
            self.roll(state)?;
        } else {
            // Those under way see to it.
            self.room.wait(state);
        }
        Ok(Room::Changed)
    }

    /// Goes on in the next segment. Nothing is pending; others wait meanwhile.
    fn roll(&self, state: &mut MutexGuard<'_, State>) -> Result<(), AppendError> {
        state.stage = Stage::Writing;
        let room_before = std::mem::take(&mut state.room_bytes); // nobody takes a place meanwhile
        let rolled = MutexGuard::unlocked(state, || self.next_segment());
        state.stage = Stage::Free;
        self.room.notify_all();
        match rolled {
            Ok(()) => {
                let writer = self.writer.lock();
                if let Some(writer) = &*writer {
                    let offset = state.next.offset;
                    state.enter_segment(writer, offset);
                }
                Ok(())
            }
            Err(Failure::DiskFull(error)) => {
                state.room_bytes = room_before;
                Err(AppendError::DiskFull(error))
            }
            Err(Failure::Fatal(error)) => Err(AppendError::Poisoned(self.poison(state, error))),
        }
    }

    fn next_segment(&self) -> Result<(), Failure> {
        let mut writer = self.writer.lock();
        let Some(writer) = &mut *writer else { return Err(closed()) };
        let spare = writer.reserve()?;
        let (epoch, options) = (self.epoch, &self.options);
        let header = next_header(&self.journal, &spare, epoch, self.incarnation, options);
        writer.roll(spare, header.to_page(), None)
    }

    fn flush(&self) -> Result<Checkpoint, AppendError> {
        let group = {
            let state = self.state.lock();
            let last = state.closed.back().map(|closed| &closed.group);
            let open = (!state.open.is_empty()).then_some(&state.open.group);
            match (open.or(last), &state.end) {
                (Some(group), _) => Arc::clone(group),
                (None, Some(Ended::Poisoned(poison))) => {
                    return Err(AppendError::Poisoned(poison.clone()));
                }
                (None, _) => return Ok(self.journal.end()),
            }
        };
        match self.see_through(&group) {
            Outcome::Durable => Ok(self.journal.end()),
            Outcome::Unknown(poison) | Outcome::NotWritten(poison) => {
                Err(AppendError::Poisoned(poison))
            }
        }
    }
}

fn placed(draft: &Draft, base: Position) -> Vec<Placed> {
    let run = |run: &group::Run| {
        let (first, start) = (run.first, run.events.start);
        run.events.clone().map(move |index| Placed {
            position: base.advance(index as u64),
            revision: first.advance((index - start) as u64),
        })
    };
    let mut all = Vec::with_capacity(draft.ids.len());
    draft.runs.iter().for_each(|each| all.extend(run(each)));
    all
}

/// Why closing wasn't clean. Everything that was acknowledged is durable all the same.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseError {
    /// An earlier write or sync had failed.
    #[error(transparent)]
    Poisoned(Poison),
    /// The mark could not be written; the next opening scans the last segment.
    #[error("the journal could not be marked as closed: {0}")]
    Mark(IoError),
    /// A full segment could not be cut to its length, some time before; the next opening does it.
    #[error("a full segment could not be cut to its length: {0}")]
    Cut(IoError),
}

/// Can't happen: `close` waits until nothing is under way.
fn closed() -> Failure {
    let source = std::io::ErrorKind::NotConnected.into();
    Failure::Fatal(IoError::new("writing", Path::new("the closed journal"), source))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Here,
    Changed,
}

impl State {
    const fn poison(&self) -> Option<&Poison> {
        match &self.end {
            Some(Ended::Poisoned(poison)) => Some(poison),
            _ => None,
        }
    }

    fn check_open(&self) -> Result<(), AppendError> {
        match &self.end {
            None => Ok(()),
            Some(Ended::Poisoned(poison)) => Err(AppendError::Poisoned(poison.clone())),
            Some(Ended::Closed) => Err(AppendError::Closed),
        }
    }

    fn start_committer(&mut self) {
        if self.committer == CommitterState::None {
            self.committer = CommitterState::Running;
        }
    }

    /// Nothing is under way.
    fn is_idle(&self) -> bool {
        self.open.is_empty() && self.closed.is_empty() && self.stage == Stage::Free
    }

    fn enter_segment(&mut self, writer: &Writer, offset: u64) {
        self.room_bytes = writer.room_behind(offset);
        self.alignment = Alignment::of(writer);
    }

    /// Whether so much more may be answered before it is durable.
    fn may_buffer(&self, options: &JournalOptions, len_bytes: u64) -> bool {
        let unsynced_bytes = self.next.offset - self.durable_offset;
        let oldest = self.closed.front().map_or(self.open.began, |closed| closed.began);
        let age_max = Duration::from_millis(options.buffered_age_ms_max);
        unsynced_bytes == 0
            || (unsynced_bytes + len_bytes <= options.buffered_bytes_max
                && oldest.elapsed() <= age_max)
    }

    /// The group that makes everything up to `position` durable.
    fn group_of(&self, position: Position) -> &Arc<Group> {
        let closed = self.closed.iter().find(|closed| closed.end > position);
        closed.map_or(&self.open.group, |closed| &closed.group)
    }

    /// Gives the batch its offset and position.
    fn assign(&mut self, draft: &Draft, appender: &Shared) -> BatchHeader {
        let stored_len = draft.body_len() as u32;
        let padded = padded_len(u64::from(stored_len));
        let header = BatchHeader {
            header_len: BATCH_HEADER_BYTES as u16,
            flags: Flags::default(),
            stored_len,
            raw_len: stored_len,
            body_crc: 0,
            count: draft.ids.len() as u32,
            base_position: self.next.position,
            offset: self.next.offset,
            durable_offset: 0,
            epoch: appender.epoch,
            padded_len: padded as u32,
            incarnation: appender.incarnation,
            time_us: appender.journal.fs().now_us(),
            chain: Chain::default(),
        };
        let mut position = header.base_position;
        for hash in &draft.ids {
            self.window.insert(*hash, position);
            position = position.advance(1);
        }
        for run in &draft.runs {
            let last = run.first.advance(run.events.len() as u64 - 1);
            self.heads.insert(run.stream.clone(), (last, header.end_position()));
        }
        self.next.offset += padded;
        self.next.position = header.end_position();
        self.room_bytes = self.room_bytes.saturating_sub(padded);
        header
    }

    fn take_slot(&mut self, header: BatchHeader) -> (Arc<Group>, usize) {
        if self.open.is_empty() {
            self.open.began = Instant::now();
        }
        self.open.bytes += u64::from(header.padded_len);
        self.open.unready += 1;
        self.open.slots.push(Slot { header, batch: None });
        (Arc::clone(&self.open.group), self.open.slots.len() - 1)
    }

    /// Pads the group's last batch so that the next group begins at the alignment.
    fn align_group(&mut self, slots: &mut [Slot]) {
        let Some(last) = slots.last_mut() else { return };
        let used = self.next.offset.saturating_sub(self.alignment.base_offset);
        let more = used.next_multiple_of(self.alignment.bytes) - used;
        last.header.padded_len += more as u32;
        self.next.offset += more;
        self.room_bytes = self.room_bytes.saturating_sub(more);
    }
}

/// Makes segment 0, durable with its name and its header.
fn first_segment(
    writer: &mut Writer,
    incarnation: Incarnation,
    options: &JournalOptions,
) -> Result<(), Failure> {
    let spare = writer.reserve()?;
    let header = next_header(&writer.journal, &spare, 1, incarnation, options);
    writer.roll(spare, header.to_page(), None)?;
    Ok(writer.active_file().map_or(Ok(()), |file| file.sync())?)
}

/// The header of the segment that begins at the durable end, in `spare`.
fn next_header(
    journal: &Journal,
    spare: &Spare,
    epoch: u32,
    incarnation: Incarnation,
    options: &JournalOptions,
) -> SegmentHeader {
    let end: Checkpoint = journal.end();
    SegmentHeader {
        flags: Flags::default(),
        group_alignment: options.group_alignment_bytes,
        journal: journal.id(),
        number: spare.number,
        epoch,
        incarnation,
        base_position: end.position,
        base_offset: end.offset,
        durable_offset: end.offset,
        salt: new_incarnation().get(),
        created_at_us: journal.fs().now_us(),
        capacity_bytes: spare.capacity_bytes,
        previous_chain: end.chain,
    }
}
