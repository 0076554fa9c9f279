//! The one writer of an origin: group commit.
//!
//! ```text
//!  caller     encode records │ lock: duplicates? expected? reserve, assign │ CRC, digest │ wait … answer
//!  leader                                                     chain, headers │ write │ sync │ publish
//! ```
//! - Callers encode outside the lock, take their place in the open group under it, and compute checksum and
//!   digest outside it again. Whoever finds no commit under way becomes the leader: it closes the group,
//!   chains and writes its batches, syncs once, publishes the durable end and answers everybody. The next
//!   group fills meanwhile, and one of its members leads it. There is no timer and no thread: a lone caller
//!   does everything itself.
//! - After a place was assigned, every failed write or sync poisons the writer, for ever: those of the group
//!   get `Unknown`, everybody else `Poisoned`.
//! - No answer rests on what isn't durable: a conflict or duplicate that is decided by a batch behind the
//!   durable end is given only once that batch is durable.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::env::now_us;
use crate::error::{AppendError, InvalidAppend, IoError, OpenError, Poison, ReadError};
use crate::event::{EventId, ExpectedRevision, NewEvent, Recorded, Revision, StreamId};
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader, body_digest, padded_len};
use crate::format::files::{Node, Role};
use crate::format::segment::SegmentHeader;
use crate::format::{Flags, crc32, record, sidecar};
use crate::fs::Fs;
use crate::journal::mark;
use crate::journal::marker::Marker;
use crate::journal::recovery::{self, RecoveryReport};
use crate::journal::segments::Access;
use crate::journal::writer::{Failure, Writer, checkpoint_of};
use crate::journal::{Journal, Locked, new_incarnation, read_node};
use crate::options::JournalOptions;
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, Incarnation, JournalId, NodeId, Position, Token};

/// What is to be appended, atomically: events to one or several streams, each with its condition.
///
/// ```
/// use headwater::{Append, ExpectedRevision, NewEvent, Revision, StreamId};
/// let (order, stock) = (StreamId::new("order-7")?, StreamId::new("stock-lamp")?);
/// let append = Append::to(&order, ExpectedRevision::NoStream, [NewEvent::raw("order.placed", *b"x")?])
///     .and_to(&stock, ExpectedRevision::Any, [NewEvent::raw("stock.reserved", *b"1")?])
///     .and_expect(&StreamId::new("customer-3")?, ExpectedRevision::Exact(Revision::new(4)));
/// # Ok::<(), headwater::InvalidEvent>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Append {
    parts: Vec<Part>,
}

#[derive(Clone, Debug)]
struct Part {
    stream: StreamId,
    expected: ExpectedRevision,
    events: Vec<NewEvent>,
}

impl Append {
    /// Events for one stream.
    #[must_use]
    pub fn to(
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Self {
        Self::default().and_to(stream, expected, events)
    }

    /// Events for a further stream, in the same batch.
    #[must_use]
    pub fn and_to(
        mut self,
        stream: &StreamId,
        expected: ExpectedRevision,
        events: impl IntoIterator<Item = NewEvent>,
    ) -> Self {
        let events = events.into_iter().collect();
        self.parts.push(Part { stream: stream.clone(), expected, events });
        self
    }

    /// A condition on a stream that isn't written.
    #[must_use]
    pub fn and_expect(self, stream: &StreamId, expected: ExpectedRevision) -> Self {
        self.and_to(stream, expected, [])
    }

    fn check(&self) -> Result<(), InvalidAppend> {
        let (mut ids, mut streams) = (HashSet::new(), HashSet::new());
        for part in &self.parts {
            if !streams.insert(&part.stream) {
                return Err(InvalidAppend::RepeatedStream(part.stream.clone()));
            }
            for event in &part.events {
                event.check()?;
                if !ids.insert(event.id) {
                    return Err(InvalidAppend::RepeatedId(event.id));
                }
            }
        }
        if ids.is_empty() { Err(InvalidAppend::Empty) } else { Ok(()) }
    }

    fn ids(&self) -> impl Iterator<Item = EventId> {
        self.parts.iter().flat_map(|part| &part.events).map(|event| event.id)
    }
}

/// The answer to an append. Either way the events are durable when it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The events were appended now.
    New(Receipt),
    /// They had been appended before, under the same ids; this is the first result.
    Duplicate(Receipt),
}

impl Appended {
    /// Where the events are.
    #[must_use]
    pub const fn receipt(&self) -> &Receipt {
        match self {
            Self::New(receipt) | Self::Duplicate(receipt) => receipt,
        }
    }

    /// The token to wait for in a view, here or in another service.
    #[must_use]
    pub const fn token(&self) -> Token {
        self.receipt().token
    }
}

/// Where appended events are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The token to wait for in a view, here or in another service.
    pub token: Token,
    /// The place of each event, in the order in which they were given.
    pub events: Vec<Placed>,
}

/// The place of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its position in the journal.
    pub position: Position,
    /// Its revision in its stream.
    pub revision: Revision,
}

/// Accepts appends to a journal. `append` may be called from many threads at once; they share syncs.
#[derive(Debug)]
pub struct Appender {
    journal: Journal,
    options: JournalOptions,
    incarnation: Incarnation,
    epoch: u32,
    report: RecoveryReport,
    state: Mutex<State>,
    /// The leader waits here until the members of its group have computed their checksums.
    ready: Condvar,
    /// Whoever needs the journal to be idle (a roll, a full group, `close`) waits here.
    idle: Condvar,
    /// Used by the leader only; `State::committing` keeps others away. Gone after `close`.
    writer: Mutex<Option<Leader>>,
}

#[derive(Debug)]
struct Leader {
    writer: Writer,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct State {
    /// Where the next batch goes.
    next: Place,
    /// Bytes of batches that the active segment can still take behind `next`.
    room_bytes: u64,
    alignment: Alignment,
    open: OpenGroup,
    committing: bool,
    end: Option<Ended>,
    pending: Pending,
    window: IdWindow,
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

#[derive(Debug)]
struct OpenGroup {
    group: Arc<Group>,
    slots: Vec<Slot>,
    bytes: u64,
    /// Members that are still computing their checksums.
    unready: usize,
}

/// Those who wait for one sync.
#[derive(Debug, Default)]
struct Group {
    /// Guarded by the appender's state lock in all but name: set once, then everybody is woken.
    outcome: Mutex<Option<Result<(), Poison>>>,
    answered: Condvar,
}

#[derive(Debug)]
struct Slot {
    header: BatchHeader,
    body: Option<Body>,
}

#[derive(Debug)]
struct Body {
    bytes: Vec<u8>,
    digest: [u8; 32],
}

/// What has been assigned but is not yet durable.
#[derive(Debug, Default)]
struct Pending {
    heads: HashMap<StreamId, (Revision, Arc<Group>)>,
    ids: HashMap<EventId, Arc<Group>>,
}

/// The hashes of the last event ids and the positions of their events.
#[derive(Debug)]
struct IdWindow {
    known: HashMap<u64, Position>,
    order: VecDeque<(u64, Position)>,
    max: usize,
}

impl IdWindow {
    fn insert(&mut self, hash: u64, position: Position) {
        if self.max == 0 {
            return;
        }
        if self.order.len() >= self.max
            && let Some((oldest, at)) = self.order.pop_front()
            // The same id may have come again since, when it had left a smaller window.
            && self.known.get(&oldest) == Some(&at)
        {
            self.known.remove(&oldest);
        }
        self.order.push_back((hash, position));
        self.known.insert(hash, position);
    }
}

/// An append with its records encoded, but for the revisions.
struct Encoded {
    body: Vec<u8>,
    /// Per part: where its records begin in the body.
    records: Vec<Vec<usize>>,
    count: u32,
}

/// What the lock holder decides about an append.
enum Decision {
    Write(Vec<Revision>),
    Answer(Result<Appended, AppendError>),
    /// The answer stands, but it may be given only once this group is durable.
    AnswerAfter(Arc<Group>, Box<Verdict>),
}

/// An answer that rests on events that may not be durable yet.
enum Verdict {
    Conflict(AppendError),
    Duplicate,
}

impl Appender {
    /// Creates a journal; its first segment is durable when this returns.
    pub(crate) fn create(
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
        let node =
            Node { role: Role::Origin, node: NodeId::random(), journal: JournalId::random() };
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
        if node.role != Role::Origin {
            let (found, wanted) = (node.role, Role::Origin);
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
        let journal = Journal::new(fs, &locked.layout, node, &recovered, Access::Writer)?;
        let page = recovered.kept.last().map(|kept| kept.page.clone());
        let marker = Marker::new(recovered.mark, options.background_mark_sync);
        let mut writer = Writer::new(locked, journal, marker);
        if let Some(page) = page {
            writer.resume(page)?;
        }
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
        let journal = Journal::new(&fs, &locked.layout, node, &recovered, Access::Writer)?;
        let marker = Marker::new(recovered.mark, options.background_mark_sync);
        let mut writer = Writer::new(locked, journal, marker);
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
        let state = State {
            next: Place { offset: end.offset, position: end.position },
            room_bytes: writer.room_behind(end.offset),
            alignment: Alignment::of(&writer),
            open: OpenGroup::new(),
            committing: false,
            end: None,
            pending: Pending::default(),
            window,
        };
        Ok(Self {
            journal,
            options: options.clone(),
            incarnation: new_incarnation(),
            epoch,
            report,
            state: Mutex::new(state),
            ready: Condvar::new(),
            idle: Condvar::new(),
            writer: Mutex::new(Some(Leader { writer, buffer: Vec::new() })),
        })
    }

    /// The reading side.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.journal
    }

    /// What opening found and did.
    #[must_use]
    pub const fn recovery_report(&self) -> &RecoveryReport {
        &self.report
    }

    /// The last failure to record the durable end, if it failed last time. It makes no append fail; it
    /// weakens what recovery can prove.
    #[must_use]
    pub fn mark_error(&self) -> Option<IoError> {
        self.writer.lock().as_ref()?.writer.mark_error()
    }

    /// Appends a batch. The events are durable when this returns `Ok`.
    ///
    /// Blocks for one sync, sometimes for two; callers on several threads share them.
    ///
    /// # Errors
    /// [`AppendError`]; every one but [`AppendError::Unknown`] means that nothing was written.
    pub fn append(&self, append: &Append) -> Result<Appended, AppendError> {
        append.check()?;
        let encoded = encode(append);
        let body_bytes = encoded.body.len() as u64;
        let len_bytes = padded_len(body_bytes);
        let max_bytes = u64::from(self.options.batch_bytes_max);
        if len_bytes > max_bytes {
            return Err(AppendError::TooLarge { len_bytes, max_bytes });
        }
        let mut state = self.state.lock();
        loop {
            state.check_open()?;
            match self.decide(&state, append)? {
                Decision::Answer(answer) => return answer,
                Decision::AnswerAfter(group, verdict) => {
                    match (self.lead_or_wait(state, &group), *verdict) {
                        (Some(Ok(())), Verdict::Conflict(conflict)) => return Err(conflict),
                        (Some(Ok(())), Verdict::Duplicate) => state = self.state.lock(),
                        (Some(Err(poison)), Verdict::Conflict(_)) => {
                            return Err(AppendError::Poisoned(poison));
                        }
                        // Under these ids something was written, and nobody knows whether it stays.
                        (Some(Err(poison)), Verdict::Duplicate) => {
                            return Err(AppendError::Unknown(poison));
                        }
                        (None, _) => return Err(self.poisoned()),
                    }
                }
                Decision::Write(revisions) => {
                    match self.make_room(&mut state, len_bytes)? {
                        // The lock was given up meanwhile: everything must be decided again.
                        Room::Changed => {}
                        Room::Here => return self.commit(state, append, encoded, revisions),
                    }
                }
            }
        }
    }

    /// Decides under the lock what becomes of an append: duplicates first, then conditions.
    fn decide(&self, state: &State, append: &Append) -> Result<Decision, AppendError> {
        if let Some(decision) = self.find_duplicates(state, append)? {
            return Ok(decision);
        }
        let mut firsts = Vec::with_capacity(append.parts.len());
        for part in &append.parts {
            let pending = state.pending.heads.get(&part.stream);
            let head = match pending {
                Some((revision, _)) => Some(*revision),
                None => self.journal.stream_head(&part.stream)?,
            };
            if !meets(part.expected, head) {
                let conflict = AppendError::Conflict {
                    stream: part.stream.clone(),
                    expected: part.expected,
                    actual: head,
                };
                if let Some(repeated) = self.repeated_beyond_window(append)? {
                    return Ok(Decision::Answer(repeated));
                }
                if let Some((_, group)) = pending {
                    let verdict = Box::new(Verdict::Conflict(conflict));
                    return Ok(Decision::AnswerAfter(Arc::clone(group), verdict));
                }
                return Ok(Decision::Answer(Err(conflict)));
            }
            firsts.push(head.map_or(Revision::FIRST, Revision::next));
        }
        Ok(Decision::Write(firsts))
    }

    /// Looks for the append's event ids among those that are known.
    fn find_duplicates(
        &self,
        state: &State,
        append: &Append,
    ) -> Result<Option<Decision>, AppendError> {
        if let Some(group) = append.ids().find_map(|id| state.pending.ids.get(&id)) {
            // Once it is durable, the question is answered from the journal.
            let verdict = Box::new(Verdict::Duplicate);
            return Ok(Some(Decision::AnswerAfter(Arc::clone(group), verdict)));
        }
        // A hit is confirmed by reading: two ids may have the same hash.
        for id in append.ids() {
            let Some(position) = state.window.known.get(&sidecar::id_hash(&id)) else { continue };
            let batch = self.journal.events_around(*position)?;
            if batch.iter().any(|event| event.id() == id) {
                return Ok(Some(Decision::Answer(self.judge_duplicates(append, &batch))));
            }
        }
        Ok(None)
    }

    /// For `Exact` and `NoStream` every repetition is recognised, however old: the event behind the
    /// expected revision is compared, in every part, for a condition that isn't met any more may be
    /// another part's.
    fn repeated_beyond_window(
        &self,
        append: &Append,
    ) -> Result<Option<Result<Appended, AppendError>>, AppendError> {
        for part in append.parts.iter().filter(|part| !part.events.is_empty()) {
            let next = match part.expected {
                ExpectedRevision::NoStream => Revision::FIRST,
                ExpectedRevision::Exact(revision) => revision.next(),
                ExpectedRevision::Any | ExpectedRevision::StreamExists => continue,
            };
            let event = self.journal.read_stream(&part.stream, next)?.next().transpose()?;
            let ours = |event: &Recorded| append.ids().any(|id| id == event.id());
            if let Some(event) = event.filter(ours) {
                let batch = self.journal.events_around(event.position())?;
                return Ok(Some(self.judge_duplicates(append, &batch)));
            }
        }
        Ok(None)
    }

    /// At least one of the append's ids is in `batch`: all of them make it a duplicate.
    fn judge_duplicates(
        &self,
        append: &Append,
        batch: &[Recorded],
    ) -> Result<Appended, AppendError> {
        let total = append.ids().count();
        let found: Vec<_> = append
            .ids()
            .filter_map(|id| batch.iter().find(|event| event.id() == id))
            .map(|event| Placed { position: event.position(), revision: event.revision() })
            .collect();
        if found.len() < total {
            return Err(AppendError::PartialDuplicate { known: found.len(), total });
        }
        let last = batch.last().map_or(Position::START, |event| event.position().advance(1));
        let incarnation = self.journal.incarnation_before(last)?;
        let token = Token { journal: self.journal.id(), incarnation, position: last };
        Ok(Appended::Duplicate(Receipt { token, events: found }))
    }

    /// Makes sure that a batch of `len_bytes` fits into the open group and the active segment.
    fn make_room(
        &self,
        state: &mut MutexGuard<'_, State>,
        len_bytes: u64,
    ) -> Result<Room, AppendError> {
        let fits_segment = len_bytes <= state.room_bytes;
        let fits_group = state.open.slots.is_empty()
            || state.open.bytes + len_bytes <= self.options.group_bytes_max;
        if fits_segment && fits_group {
            return Ok(Room::Here);
        }
        if state.committing || !state.open.slots.is_empty() {
            // The group's members are on their way: they commit it.
            self.idle.wait(state);
            return Ok(Room::Changed);
        }
        self.roll(state)?;
        Ok(Room::Changed)
    }

    /// Seals the active segment and prepares the next. Nothing is pending; others wait meanwhile.
    fn roll(&self, state: &mut MutexGuard<'_, State>) -> Result<(), AppendError> {
        state.committing = true;
        let room_before = std::mem::take(&mut state.room_bytes); // nobody takes a place meanwhile
        let rolled = MutexGuard::unlocked(state, || {
            let mut leader = self.writer.lock();
            let Some(Leader { writer, .. }) = &mut *leader else { return Err(closed()) };
            let previous = writer.page().map(|page| page.header);
            let number = previous.map_or(0, |header| header.number + 1);
            let capacity = previous.map(|header| header.capacity_bytes);
            let capacity_bytes = self.options.segment_bytes_after(capacity);
            let spare = writer.reserve(number, capacity_bytes)?;
            writer.seal(None)?;
            let header = next_header(
                &self.journal,
                number,
                self.epoch,
                self.incarnation,
                &self.options,
                capacity_bytes,
            );
            writer.enter(spare, header.to_page())?;
            Ok((writer.room_behind(header.base_offset), Alignment::of(writer)))
        });
        state.committing = false;
        self.idle.notify_all();
        match rolled {
            Ok((room_bytes, alignment)) => {
                (state.room_bytes, state.alignment) = (room_bytes, alignment);
                Ok(())
            }
            Err(Failure::DiskFull(error)) => {
                state.room_bytes = room_before;
                Err(AppendError::DiskFull(error))
            }
            Err(Failure::Fatal(error)) => {
                let poison = self.poison(state, error);
                Err(AppendError::Poisoned(poison))
            }
        }
    }

    fn poison(&self, state: &mut MutexGuard<'_, State>, error: IoError) -> Poison {
        let poison = Poison(Arc::new(error));
        state.end = Some(Ended::Poisoned(poison.clone()));
        self.journal.close_watch();
        self.idle.notify_all();
        poison
    }

    /// Takes a place in the open group and sees the group through its sync.
    fn commit(
        &self,
        mut state: MutexGuard<'_, State>,
        append: &Append,
        mut encoded: Encoded,
        firsts: Vec<Revision>,
    ) -> Result<Appended, AppendError> {
        let mut placed = Vec::with_capacity(encoded.count as usize);
        let mut position = state.next.position;
        for ((part, records), first) in append.parts.iter().zip(&encoded.records).zip(firsts) {
            let mut revision = first;
            for at in records {
                record::set_revision(&mut encoded.body, *at, revision);
                placed.push(Placed { position, revision });
                position = position.advance(1);
                revision = revision.next();
            }
            if let Some(last) = placed.last().filter(|_| !records.is_empty()) {
                let group = Arc::clone(&state.open.group);
                state.pending.heads.insert(part.stream.clone(), (last.revision, group));
            }
        }
        let (group, slot) = state.assign(append, &encoded, self);
        drop(state);

        let body_crc = crc32(&[&encoded.body]);
        let body = Body { digest: body_digest(&encoded.body), bytes: encoded.body };
        let mut state = self.state.lock();
        // The group can't have been closed: it waits for this.
        if let Some(slot) = state.open.slots.get_mut(slot) {
            slot.header.body_crc = body_crc;
            slot.body = Some(body);
        }
        state.open.unready -= 1;
        if state.open.unready == 0 {
            self.ready.notify_one();
        }
        match self.lead_or_wait(state, &group) {
            Some(Ok(())) => {}
            Some(Err(poison)) => return Err(AppendError::Unknown(poison)),
            None => return Err(self.poisoned()),
        }
        let token = Token { journal: self.journal.id(), incarnation: self.incarnation, position };
        Ok(Appended::New(Receipt { token, events: placed }))
    }

    /// Sees a group through to its outcome: leads its commit if nobody else is committing, waits otherwise.
    /// `None`: the writer was poisoned before the group's turn came; nothing of it was written.
    fn lead_or_wait(
        &self,
        mut state: MutexGuard<'_, State>,
        group: &Arc<Group>,
    ) -> Option<Result<(), Poison>> {
        loop {
            let outcome = group.outcome.lock().clone();
            if outcome.is_some() {
                return outcome;
            }
            let is_open = Arc::ptr_eq(&state.open.group, group);
            if !is_open || state.committing {
                group.answered.wait(&mut state);
            } else if state.is_poisoned() {
                return None;
            } else {
                self.lead(&mut state);
            }
        }
    }

    fn poisoned(&self) -> AppendError {
        self.state.lock().check_open().err().unwrap_or(AppendError::Closed)
    }

    /// Commits the open group: closes it, writes it, syncs, publishes, answers.
    fn lead(&self, state: &mut MutexGuard<'_, State>) {
        state.committing = true;
        while state.open.unready > 0 {
            self.ready.wait(state);
        }
        let OpenGroup { group, mut slots, .. } =
            std::mem::replace(&mut state.open, OpenGroup::new());
        state.align_group(&mut slots);
        let outcome = MutexGuard::unlocked(state, || self.write_group(&mut slots));
        state.committing = false;
        let outcome = match outcome {
            Ok(()) => {
                state.settle(&group, &slots);
                Ok(())
            }
            Err(error) => Err(self.poison(state, error)),
        };
        *group.outcome.lock() = Some(outcome.clone());
        group.answered.notify_all();
        if outcome.is_err() {
            // Those behind get `Poisoned`: none of them was written.
            state.open.group.answered.notify_all();
        } else {
            // One of those who came meanwhile leads them.
            state.open.group.answered.notify_one();
        }
        self.idle.notify_all();
    }

    /// Everything that happens to a group outside the lock.
    fn write_group(&self, slots: &mut [Slot]) -> Result<(), IoError> {
        let mut leader = self.writer.lock();
        let fatal = |failure| match failure {
            Failure::DiskFull(error) | Failure::Fatal(error) => error,
        };
        let Some(Leader { writer, buffer }) = &mut *leader else { return Err(fatal(closed())) };
        let Some(page) = writer.page().cloned() else { return Err(fatal(closed())) };
        let durable = self.journal.end();
        let mut end = durable;
        buffer.clear();
        for slot in &mut *slots {
            let Some(body) = &slot.body else { continue };
            slot.header.durable_offset = durable.offset;
            let first = slot.header.offset == page.header.base_offset;
            let digest = first.then_some(&page.digest);
            let header = slot.header.seal(end.chain, digest, &body.digest, page.header.salt);
            let start = buffer.len();
            buffer.extend_from_slice(&header);
            buffer.extend_from_slice(&body.bytes);
            buffer.resize(start + slot.header.padded_len as usize, 0);
            end = checkpoint_of(&slot.header, self.journal.id());
        }
        writer.write(buffer, durable.offset).map_err(fatal)?;
        if !planted::is(Bug::AcknowledgeBeforeSync) {
            writer.sync().map_err(fatal)?;
        }
        writer.publish(end, None, |index| slots.iter().for_each(|slot| slot.add_to(index)));
        Ok(())
    }

    /// Closes the journal: waits for what is under way, refuses everything later, marks the journal as
    /// cleanly closed and releases its lock. Closing again does nothing.
    ///
    /// # Errors
    /// The poison, if a write or sync had failed; or the failure to write the mark, which loses nothing.
    pub fn close(&self) -> Result<(), CloseError> {
        let mut state = self.state.lock();
        // First nobody new is let in, or those who come one after the other would keep it open for ever.
        state.end.get_or_insert(Ended::Closed);
        while !state.is_poisoned() && (state.committing || !state.open.slots.is_empty()) {
            self.idle.wait(&mut state);
        }
        let poison = match &state.end {
            Some(Ended::Poisoned(poison)) => Some(poison.clone()),
            _ => None,
        };
        drop(state);
        self.journal.close_watch();
        match (self.writer.lock().take(), poison) {
            (_, Some(poison)) => Err(CloseError::Poisoned(poison)),
            (Some(leader), None) => leader.writer.close(None).map_err(CloseError::Mark),
            (None, None) => Ok(()),
        }
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.journal.close_watch();
    }
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
}

/// Can't happen: `close` waits until nothing is under way.
fn closed() -> Failure {
    let source = std::io::ErrorKind::NotConnected.into();
    Failure::Fatal(IoError::new("writing", Path::new("the closed journal"), source))
}

enum Room {
    Here,
    Changed,
}

impl OpenGroup {
    fn new() -> Self {
        Self { group: Arc::default(), slots: Vec::new(), bytes: 0, unready: 0 }
    }
}

impl Slot {
    fn for_each_record(&self, mut each: impl FnMut(&record::RecordRef<'_>, Position)) {
        let mut position = self.header.base_position;
        let mut rest = self.body.as_ref().map_or(&[][..], |body| &body.bytes);
        while let Ok((record, behind)) = record::RecordRef::decode(rest) {
            each(&record, position);
            position = position.advance(1);
            rest = behind;
        }
    }

    fn add_to(&self, index: &mut sidecar::SegmentIndex) {
        index.add_batch(&self.header);
        self.for_each_record(|record, position| {
            let posting = sidecar::Posting { position, batch_offset: self.header.offset };
            index.add_event(record.stream, record.revision, &record.id, posting);
        });
    }
}

impl State {
    const fn is_poisoned(&self) -> bool {
        matches!(self.end, Some(Ended::Poisoned(_)))
    }

    fn check_open(&self) -> Result<(), AppendError> {
        match &self.end {
            None => Ok(()),
            Some(Ended::Poisoned(poison)) => Err(AppendError::Poisoned(poison.clone())),
            Some(Ended::Closed) => Err(AppendError::Closed),
        }
    }

    /// Gives the batch its offset and position in the open group.
    fn assign(
        &mut self,
        append: &Append,
        encoded: &Encoded,
        appender: &Appender,
    ) -> (Arc<Group>, usize) {
        let stored_len = encoded.body.len() as u32;
        let padded = padded_len(u64::from(stored_len));
        let header = BatchHeader {
            header_len: BATCH_HEADER_BYTES as u16,
            flags: Flags::default(),
            stored_len,
            raw_len: stored_len,
            body_crc: 0,
            count: encoded.count,
            base_position: self.next.position,
            offset: self.next.offset,
            durable_offset: 0,
            epoch: appender.epoch,
            padded_len: padded as u32,
            incarnation: appender.incarnation,
            time_us: now_us(),
            chain: crate::position::Chain::default(),
        };
        self.next.offset += padded;
        self.next.position = header.end_position();
        self.room_bytes = self.room_bytes.saturating_sub(padded);
        let group = Arc::clone(&self.open.group);
        for id in append.ids() {
            self.pending.ids.insert(id, Arc::clone(&group));
        }
        self.open.bytes += padded;
        self.open.unready += 1;
        self.open.slots.push(Slot { header, body: None });
        (group, self.open.slots.len() - 1)
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

    /// A group has become durable: what was pending in it is now in the journal's index.
    fn settle(&mut self, group: &Arc<Group>, slots: &[Slot]) {
        self.pending.heads.retain(|_, (_, pending)| !Arc::ptr_eq(pending, group));
        let window = &mut self.window;
        for slot in slots {
            slot.for_each_record(|record, position| {
                self.pending.ids.remove(&record.id);
                window.insert(sidecar::id_hash(&record.id), position);
            });
        }
    }
}

impl Journal {
    /// The ids of the last events.
    fn id_window(&self, max: usize) -> Result<IdWindow, ReadError> {
        let mut window = IdWindow { known: HashMap::new(), order: VecDeque::new(), max };
        let mut newest_first: Vec<(Position, Vec<u64>)> = Vec::new();
        let segments = self.0.segments.read();
        let mut missing = max as u64;
        for segment in segments.all.iter().rev() {
            let ids = match &segment.sealed {
                Some(sealed) => sealed.last_ids(&self.0.files, &segment.page, missing)?,
                None => segments.active.ids.clone(),
            };
            let end = match &segment.sealed {
                Some(sealed) => sealed.end.position,
                None => self.end().position,
            };
            missing = missing.saturating_sub(ids.len() as u64);
            newest_first.push((Position::new(end.since(Position::new(ids.len() as u64))), ids));
            if missing == 0 {
                break;
            }
        }
        for (first, ids) in newest_first.into_iter().rev() {
            for (index, id) in ids.into_iter().enumerate() {
                window.insert(id, first.advance(index as u64));
            }
        }
        Ok(window)
    }

    /// All events of the batch that holds the durable event at `position`.
    fn events_around(&self, position: Position) -> Result<Vec<Recorded>, ReadError> {
        let mut events: Vec<Recorded> = Vec::new();
        let Some(range) = self.batch_range(position)? else { return Ok(events) };
        let taken = self.read_all(range.start)?.take(range.end.since(range.start) as usize);
        for event in taken {
            events.push(event?);
        }
        Ok(events)
    }

    fn batch_range(&self, position: Position) -> Result<Option<Range<Position>>, ReadError> {
        let header = self.header_holding(position)?;
        Ok(header.map(|header| header.base_position..header.end_position()))
    }

    /// The incarnation that wrote the batch in front of `end`.
    fn incarnation_before(&self, end: Position) -> Result<Incarnation, ReadError> {
        let last = Position::new(end.get().saturating_sub(1));
        Ok(self.header_holding(last)?.map(|header| header.incarnation).unwrap_or_default())
    }
}

fn meets(expected: ExpectedRevision, head: Option<Revision>) -> bool {
    match expected {
        ExpectedRevision::Any => true,
        ExpectedRevision::NoStream => head.is_none(),
        ExpectedRevision::StreamExists => head.is_some(),
        ExpectedRevision::Exact(revision) => head == Some(revision),
    }
}

fn encode(append: &Append) -> Encoded {
    let mut body = Vec::new();
    let mut count = 0;
    let mut records = Vec::with_capacity(append.parts.len());
    for part in &append.parts {
        let mut starts = Vec::with_capacity(part.events.len());
        for event in &part.events {
            starts.push(body.len());
            record::encode(&mut body, event, &part.stream, Revision::FIRST);
            count += 1;
        }
        records.push(starts);
    }
    Encoded { body, records, count }
}

/// Makes segment 0, durable with its name and its header.
fn first_segment(
    writer: &mut Writer,
    incarnation: Incarnation,
    options: &JournalOptions,
) -> Result<(), Failure> {
    let capacity_bytes = options.segment_bytes_after(None);
    let spare = writer.reserve(0, capacity_bytes)?;
    let header = next_header(&writer.journal, 0, 1, incarnation, options, capacity_bytes);
    writer.enter(spare, header.to_page())?;
    writer.sync()
}

/// The header of the segment that begins at the durable end.
fn next_header(
    journal: &Journal,
    number: u64,
    epoch: u32,
    incarnation: Incarnation,
    options: &JournalOptions,
    capacity_bytes: u64,
) -> SegmentHeader {
    let end: Checkpoint = journal.end();
    SegmentHeader {
        flags: Flags::default(),
        group_alignment: options.group_alignment_bytes,
        journal: journal.id(),
        number,
        epoch,
        incarnation,
        base_position: end.position,
        base_offset: end.offset,
        durable_offset: end.offset,
        salt: new_incarnation().get(),
        created_at_us: now_us(),
        capacity_bytes,
        previous_chain: end.chain,
    }
}
