//! What was received of a feed: a journal of its own, in which the events stand as if they were appended here, and with
//! them up to where the origin's journal is accounted for.
//!
//! ```text
//!   batch ┌ event ┬ event ┬ … ┬ $feed {checkpoint of the origin, terms} ┐    one write: events and progress together
//!   batch └ $feed {…, until}  ┐                                              a run too long for a batch: where it ends,
//!   batch └ event ┬ event ┘                                                  events, and progress behind the last of them
//!   batch └ event ┬ $feed {…} ┐
//!
//!   opening: the last $feed, and the events behind it: these come again, are compared, and passed over
//! ```
//! Invariants:
//! - An event of the origin is here once, or was skipped. What comes again must be what is here: an origin that has
//!   something else there has lost it, and nothing more is taken from it.
//! - Only what is durable here is acknowledged, as a checkpoint of the origin from which it can go on.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::FeedError;
use crate::error::{OpenError, ReadError};
use crate::event::{NewEvent, PayloadCodec, Recorded, StreamId};
use crate::format::batch::BATCH_HEADER_BYTES;
use crate::format::files::{Mark, Role};
use crate::format::record;
use crate::fs::Fs;
use crate::hex::{from_hex, hex};
use crate::journal::{Append, Appender, CloseError, Journal, Ticket};
use crate::options::JournalOptions;
use crate::position::{Checkpoint, Incarnation, NodeId, Position};
use crate::shipping::error::ShippingError;
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::{Entry, FeedRequest, FeedTerms, Run, Speaker};

/// The type and the stream of what says how far a feed is.
const PROGRESS: &str = "$feed";
/// The same of what says which opening of the origin wrote the events from a position on.
const OPENING: &str = "$feed.opening";
/// Passing over so many bytes of the origin's journal is noted even if no event comes.
const SKIPPED_BYTES_MAX: u64 = 8 << 20;
/// The same after so much time.
const SKIPPED_FOR: Duration = Duration::from_secs(30);
/// The same behind so many openings: what is to be noted fits into a batch.
const NEW_OPENINGS_MAX: usize = 4;
/// So many of the latest openings are known. Of what was written before, nobody is told any more who wrote it.
const OPENINGS_MAX: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Progress {
    /// The origin's journal, for people.
    journal: String,
    /// The position there, for people.
    position: u64,
    /// The whole of it: 64 bytes as in `docs/protocol.md`.
    checkpoint: String,
    /// What was asked for at the beginning.
    wanted: FeedFilter,
    /// What was granted.
    granted: FeedTerms,
    /// So many of the last events in front of this come behind the checkpoint: their run was stored in part, and came
    /// again as several shorter ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ahead: Option<u64>,
    /// In front of this position of the origin lie those, and the events behind this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Opening {
    from: u64,
    incarnation: String,
}

/// How far a feed is, and what it is.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) wanted: FeedFilter,
    pub(super) terms: FeedTerms,
    /// Up to here of the origin's journal everything is accounted for, durably.
    pub(super) durable: Checkpoint,
}

/// Events that are here and come again: of a run that was stored in part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Again {
    count: u64,
    /// The first of them lies here, or behind notes that do.
    from: Position,
    /// In front of this position of the origin they all lie.
    until: Option<Position>,
}

/// What is to be written, as many batches as it takes.
#[derive(Debug, Default)]
struct Batches {
    full: Vec<Append>,
    last: Append,
}

/// Writes what is received.
#[derive(Debug)]
pub(super) struct Received {
    appender: Appender,
    batch_bytes_max: usize,
    known: Option<Known>,
    /// Up to here it was received, and perhaps not noted yet.
    covered: Checkpoint,
    noted_at: Instant,
    again: Again,
    /// From which position on which opening of the origin wrote.
    openings: Vec<(Position, Incarnation)>,
    /// Those of them that aren't written yet.
    new_openings: Vec<(Position, Incarnation)>,
    /// What was submitted last.
    submitted: Option<(Ticket, Option<Checkpoint>)>,
}

fn feed_options(options: &JournalOptions) -> JournalOptions {
    // What comes again is known by its place.
    JournalOptions { idempotency_window_events: 0, ..options.clone() }
}

fn open_error(error: OpenError) -> ShippingError {
    ShippingError::Open(Arc::new(error))
}

impl Received {
    /// Opens what was received, after recovery; `None` if there is nothing yet.
    pub(super) fn open(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
        wanted: &FeedFilter,
    ) -> Result<Option<Self>, ShippingError> {
        match Appender::open_as(Role::Feed, fs, dir, &feed_options(options), false) {
            Err(OpenError::NotFound { .. }) => Ok(None),
            Err(error) => Err(open_error(error)),
            Ok(appender) => Self::of(appender, options, wanted).map(Some),
        }
    }

    pub(super) fn create(
        node: NodeId,
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
        wanted: &FeedFilter,
    ) -> Result<Self, ShippingError> {
        let created = Appender::create_as(Role::Feed, node, fs, dir, &feed_options(options));
        Self::of(created.map_err(open_error)?, options, wanted)
    }

    fn of(
        appender: Appender,
        options: &JournalOptions,
        wanted: &FeedFilter,
    ) -> Result<Self, ShippingError> {
        let journal = appender.journal();
        let (known, again) = last_progress(journal)?.unzip();
        if let Some(known) = known.as_ref().filter(|known| known.wanted != *wanted) {
            let (had, wanted) = (Box::new(known.wanted.clone()), Box::new(wanted.clone()));
            return Err(FeedError::Differs { had, wanted }.into());
        }
        let openings = if known.is_some() { openings(journal)? } else { Vec::new() };
        let covered = known.as_ref().map_or_else(|| Mark::start(journal.id()).end, |it| it.durable);
        Ok(Self {
            batch_bytes_max: options.batch_bytes_max as usize,
            known,
            covered,
            noted_at: Instant::now(),
            again: again.unwrap_or_default(),
            openings,
            new_openings: Vec::new(),
            submitted: None,
            appender,
        })
    }

    pub(super) const fn known(&self) -> Option<&Known> {
        self.known.as_ref()
    }

    pub(super) fn journal(&self) -> &Journal {
        self.appender.journal()
    }

    pub(super) const fn covered(&self) -> Checkpoint {
        self.covered
    }

    pub(super) fn openings(&self) -> &[(Position, Incarnation)] {
        &self.openings
    }

    /// What is asked for: what was granted before, or what is wanted.
    pub(super) fn request(known: Option<&Known>, wanted: &FeedFilter) -> FeedRequest {
        match known {
            Some(known) => FeedRequest { terms: known.terms.clone(), goes_on: true },
            None => {
                let terms = FeedTerms { filter: wanted.clone(), shape: None };
                FeedRequest { terms, goes_on: false }
            }
        }
    }

    /// In front of this position of the origin lie events that are here already: of a run that was stored in part.
    pub(super) fn ahead_until(&self) -> Option<Position> {
        self.again.until.filter(|_| self.again.count > 0)
    }

    /// The subscription was granted, to a journal that ends here, at its origin or at a relay, with these terms.
    pub(super) fn granted(
        &mut self,
        end: &Checkpoint,
        is_origin: bool,
        terms: FeedTerms,
        wanted: &FeedFilter,
    ) -> Result<(), FeedError> {
        if self.known.is_some() {
            let has_all = self.ahead_until().is_none_or(|until| until <= end.position);
            // A relay may only be behind.
            return if has_all || !is_origin { Ok(()) } else { Err(self.replaced(end)) };
        }
        let durable = Mark::start(end.journal).end;
        self.known = Some(Known { wanted: wanted.clone(), terms, durable });
        self.covered = durable;
        let noted = self.note_alone().and_then(|()| self.settle());
        if noted.is_err() {
            self.known = None; // it isn't begun
        }
        noted.map(drop)
    }

    /// Takes events in. They are written when this returns; [`settle`](Self::settle) waits until they are durable.
    pub(super) fn run(&mut self, run: &Run) -> Result<(), FeedError> {
        let mut entries = run.entries().flatten();
        let passed = self.pass_over(&mut entries, &run.behind)?;
        let mut batches = Batches::default();
        for entry in entries {
            self.push(&mut batches, &entry);
        }
        let begins = self.notes(passed, Some(run.behind.position));
        let before = self.covered;
        self.cover(run.behind);
        let noted = self.note(batches, begins);
        if noted.is_err() {
            self.covered = before; // nobody is shown what isn't there
        }
        noted
    }

    /// Passes over what is here already of what comes up to `behind`; how many events.
    fn pass_over<'a>(
        &mut self,
        mut entries: impl Iterator<Item = Entry<'a>>,
        behind: &Checkpoint,
    ) -> Result<u64, FeedError> {
        if self.again.count == 0 {
            return Ok(0);
        }
        let mut passed = 0;
        let is_received = |event: &Result<Recorded, ReadError>| !event.as_ref().is_ok_and(is_note);
        let mut stored = self.journal().read_all(self.again.from)?.filter(is_received);
        while self.again.count > 0 {
            let Some(entry) = entries.next() else { break };
            let event = stored.next().transpose()?.ok_or(FeedError::NoProgress)?;
            if !is_same(&event, &entry) {
                return Err(self.replaced(behind));
            }
            self.again.count -= 1;
            self.again.from = event.position().advance(1);
            passed += 1;
        }
        // All of them would have come by now.
        if self.again.count > 0 && self.again.until.is_some_and(|until| until <= behind.position) {
            return Err(self.replaced(behind));
        }
        Ok(passed)
    }

    fn replaced(&self, behind: &Checkpoint) -> FeedError {
        let durable = self.known.as_ref().map_or(self.covered, |known| known.durable);
        let (received, origin) = (Box::new(durable), Box::new(*behind));
        let told_by = Speaker::Origin; // unless a relay has sent it: who listens to it knows
        FeedError::Replaced { received, origin, is_ahead: false, told_by }
    }

    /// Nothing comes up to here.
    pub(super) fn skipped(&mut self, behind: Checkpoint) -> Result<(), FeedError> {
        self.pass_over(std::iter::empty(), &behind)?;
        self.cover(behind);
        let durable = self.known.as_ref().map_or(0, |known| known.durable.offset);
        let is_due = behind.offset.saturating_sub(durable) >= SKIPPED_BYTES_MAX
            || self.noted_at.elapsed() >= SKIPPED_FOR
            || self.new_openings.len() >= NEW_OPENINGS_MAX;
        if is_due { self.note_alone() } else { Ok(()) }
    }

    fn cover(&mut self, behind: Checkpoint) {
        let last = self.openings.last().map(|(_, incarnation)| *incarnation);
        if last != Some(behind.incarnation) {
            let opening = (self.covered.position, behind.incarnation);
            if self.openings.len() >= OPENINGS_MAX {
                self.openings.remove(0);
            }
            self.openings.push(opening);
            self.new_openings.push(opening);
        }
        self.covered = behind;
    }

    /// Adds an event, to a new batch if it doesn't fit into the last.
    fn push(&self, batches: &mut Batches, entry: &Entry<'_>) {
        let (Some(event), Ok(stream)) =
            (NewEvent::of_record(&entry.record), StreamId::new(entry.record.stream))
        else {
            return; // can't be: the record was verified
        };
        let dated = NewEvent {
            occurred_at_us: event.occurred_at_us.or(Some(entry.time_us)),
            ..event.clone()
        };
        let fits = |len: usize| len + BATCH_HEADER_BYTES <= self.batch_bytes_max;
        let event = if fits(record::encoded_len(&dated, &stream)) { dated } else { event };
        batches.make_room(record::encoded_len(&event, &stream), self.batch_bytes_max);
        batches.last.push(&stream, &event);
    }

    /// Up to where everything is accounted for, but for these events that are here. Those, and the ones that follow, lie
    /// in front of `until` at the origin.
    fn progress(&self, ahead: u64, until: Option<Position>) -> Option<(StreamId, NewEvent)> {
        let known = self.known.as_ref()?;
        let progress = Progress {
            journal: self.covered.journal.to_string(),
            position: self.covered.position.get(),
            checkpoint: hex(&self.covered.to_bytes()),
            wanted: known.wanted.clone(),
            granted: known.terms.clone(),
            ahead: (ahead > 0).then_some(ahead),
            until: until.map(Position::get),
        };
        reserved(PROGRESS, &progress)
    }

    fn note_alone(&mut self) -> Result<(), FeedError> {
        self.note(Batches::default(), Vec::new())
    }

    /// [Progress](Self::progress), and behind the openings that aren't written yet: it accounts for what they wrote.
    fn notes(&self, ahead: u64, until: Option<Position>) -> Vec<(StreamId, NewEvent)> {
        let openings = self.new_openings.iter().filter_map(|(from, incarnation)| {
            let incarnation = hex(&incarnation.get().to_le_bytes());
            reserved(OPENING, &Opening { from: from.get(), incarnation })
        });
        openings.chain(self.progress(ahead, until)).collect()
    }

    /// Writes events, and up to where everything is accounted for. If that is more than one batch, it is noted at first
    /// that they `begin`.
    fn note(
        &mut self,
        mut batches: Batches,
        begins: Vec<(StreamId, NewEvent)>,
    ) -> Result<(), FeedError> {
        if self.known.is_none() {
            return Ok(());
        }
        let mut notes = self.notes(self.again.count, self.ahead_until());
        self.new_openings.clear();
        let len = notes.iter().map(|(at, note)| record::encoded_len(note, at)).sum();
        batches.make_room(len, self.batch_bytes_max);
        let Batches { full, mut last } = batches;
        self.noted_at = Instant::now();
        if let (Some((_, openings)), false) = (begins.split_last(), full.is_empty()) {
            let mut first = Append::default();
            begins.iter().for_each(|(at, note)| first.push(at, note));
            self.submit(&first, None)?;
            notes.drain(..openings.len()); // these are written
        }
        notes.iter().for_each(|(at, note)| last.push(at, note));
        full.iter().try_for_each(|part| self.submit(part, None))?;
        self.submit(&last, Some(self.covered))
    }

    fn submit(&mut self, append: &Append, progress: Option<Checkpoint>) -> Result<(), FeedError> {
        let before = self.submitted.take().and_then(|(_, progress)| progress);
        let ticket = self.appender.submit(append)?;
        self.submitted = Some((ticket, progress.or(before)));
        Ok(())
    }

    /// Waits until everything that was taken in is durable; up to where it can be acknowledged, if that is news.
    pub(super) fn settle(&mut self) -> Result<Option<Checkpoint>, FeedError> {
        let Some((ticket, progress)) = self.submitted.take() else { return Ok(None) };
        ticket.wait()?;
        if let (Some(durable), Some(known)) = (progress, &mut self.known) {
            known.durable = durable;
        }
        Ok(progress)
    }

    /// Notes what was passed over since, and waits until it is durable: the next session goes on from there.
    pub(super) fn rest(&mut self) -> Result<Option<Checkpoint>, FeedError> {
        let settled = self.settle()?;
        let is_noted = self.known.as_ref().is_none_or(|known| known.durable == self.covered);
        if is_noted {
            return Ok(settled);
        }
        self.note_alone()?;
        self.settle()
    }

    /// A new session goes on from what is durable; what was received behind it comes again.
    pub(super) fn begin_again(&mut self) -> Result<(), FeedError> {
        self.appender.flush()?;
        self.again = Again::default();
        if let Some((known, again)) = last_progress(self.journal())? {
            self.again = again;
            self.openings = openings(self.journal())?;
            self.covered = known.durable;
            self.known = Some(known);
        }
        self.new_openings.clear();
        self.submitted = None;
        Ok(())
    }

    pub(super) fn close(self) -> Result<(), CloseError> {
        self.appender.close()
    }
}

/// An event that the journal keeps for itself.
fn reserved<T: Serialize>(name: &str, value: &T) -> Option<(StreamId, NewEvent)> {
    let stream = StreamId::new(name).ok()?;
    let event = NewEvent::raw(name, serde_json::to_vec(value).ok()?).ok()?;
    Some((stream, NewEvent { codec: PayloadCodec::Json, ..event }))
}

fn is_note(event: &Recorded) -> bool {
    event.event_type().as_str().starts_with('$')
}

/// Whether an event is the one that was stored. When it was recorded doesn't matter.
fn is_same(stored: &Recorded, entry: &Entry<'_>) -> bool {
    let record = &entry.record;
    stored.id() == record.id
        && stored.stream().as_str() == record.stream
        && stored.event_type().as_str() == record.event_type
        && stored.data() == record.payload
}

/// How far it was received, and the events that came behind that; `None` if there is nothing.
fn last_progress(journal: &Journal) -> Result<Option<(Known, Again)>, FeedError> {
    let mut again = Again::default();
    let mut events = journal.read_all_backward(journal.end().position)?;
    let (known, ahead) = loop {
        match events.next().transpose()? {
            Some(event) if event.event_type().as_str() == PROGRESS => {
                let (known, ahead, until) = known(&event).ok_or(FeedError::NoProgress)?;
                again.until = until;
                break (known, ahead);
            }
            Some(event) => again.add(&event),
            None if again.count == 0 => return Ok(None),
            None => return Err(FeedError::NoProgress),
        }
    };
    for _ in 0..ahead {
        let event = loop {
            let event = events.next().transpose()?.ok_or(FeedError::NoProgress)?;
            if !is_note(&event) {
                break event;
            }
        };
        again.add(&event);
    }
    Ok(Some((known, again)))
}

impl Batches {
    /// The last one has room for so many bytes, or is a new one.
    fn make_room(&mut self, len: usize, bytes_max: usize) {
        if !self.last.is_empty() && self.last.len_bytes() + len > bytes_max {
            self.full.push(std::mem::take(&mut self.last));
        }
    }
}

impl Again {
    /// One more, in front of the others.
    fn add(&mut self, event: &Recorded) {
        self.count += 1;
        self.from = event.position();
    }
}

fn known(event: &Recorded) -> Option<(Known, u64, Option<Position>)> {
    let progress: Progress = serde_json::from_slice(event.data()).ok()?;
    let bytes: [u8; Checkpoint::ENCODED_LEN] = from_hex(&progress.checkpoint)?.try_into().ok()?;
    let durable = Checkpoint::from_bytes(&bytes)?;
    let known = Known { wanted: progress.wanted, terms: progress.granted, durable };
    Some((known, progress.ahead.unwrap_or(0), progress.until.map(Position::new)))
}

/// Those that are still known, in order.
fn openings(journal: &Journal) -> Result<Vec<(Position, Incarnation)>, FeedError> {
    let Ok(stream) = StreamId::new(OPENING) else { return Ok(Vec::new()) };
    let mut openings = Vec::new();
    for event in journal.read_stream_backward(&stream, None)?.take(OPENINGS_MAX) {
        let Ok(event) = event else { break }; // removed
        let opening: Opening =
            serde_json::from_slice(event.data()).map_err(|_| FeedError::NoProgress)?;
        let incarnation = from_hex(&opening.incarnation).and_then(|it| it.try_into().ok());
        let incarnation = incarnation.map(u64::from_le_bytes).ok_or(FeedError::NoProgress)?;
        openings.push((Position::new(opening.from), Incarnation::new(incarnation)));
    }
    openings.reverse();
    Ok(openings)
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use super::*;
    use crate::event::{EventId, Revision};
    use crate::fs::sim::{Fault, Repeat, SimFs};
    use crate::position::JournalId;
    use crate::shipping::message::RunWriter;

    const ORIGIN: JournalId = JournalId::from_bytes([9; 16]);
    const EVENTS: u64 = 12;

    fn options() -> JournalOptions {
        JournalOptions {
            background_thread: false,
            batch_bytes_max: 1024,
            segment_bytes_first: 8192,
            segment_bytes_max: 8192,
            group_bytes_max: 1024,
            ..JournalOptions::default()
        }
    }

    fn behind(position: u64) -> Checkpoint {
        behind_by(3, position)
    }

    fn behind_by(incarnation: u64, position: u64) -> Checkpoint {
        let start = Mark::start(ORIGIN).end;
        let (offset, incarnation) = (64 * position, Incarnation::new(incarnation));
        Checkpoint { offset, incarnation, position: Position::new(position), ..start }
    }

    /// Longer than several batches here: every second position, events from `first` on.
    fn run_of(from: u64, first: u8, count: u64) -> Run {
        run_by(3, from, first, count)
    }

    fn run_by(incarnation: u64, from: u64, first: u8, count: u64) -> Run {
        let mut run = RunWriter::new(Position::new(from));
        for number in 0..count {
            let event = NewEvent::raw("happened", vec![first + number as u8; 300]).unwrap();
            let event = event.id(EventId::from_bytes([first + number as u8; 16]));
            let mut bytes = Vec::new();
            let stream = StreamId::new(format!("s-{}", (u64::from(first) + number) % 2)).unwrap();
            record::encode(&mut bytes, &event, &stream, Revision::FIRST);
            run.add(Position::new(from + 2 * number), 5, &bytes);
        }
        let bytes = run.finish(&behind_by(incarnation, from + 2 * count));
        Run::decode(Position::new(from), bytes).unwrap()
    }

    fn run(from: u64) -> Run {
        run_of(from, from as u8, EVENTS)
    }

    /// A feed that has a run.
    fn begun(fs: &Arc<dyn Fs>, dir: &str) -> Received {
        let (node, all) = (NodeId::from_bytes([1; 16]), FeedFilter::everything());
        let mut received = Received::create(node, fs, Path::new(dir), &options(), &all).unwrap();
        let terms = FeedTerms { filter: all.clone(), shape: None };
        received.granted(&behind(0), true, terms, &all).unwrap();
        received.run(&run(0)).unwrap();
        assert_eq!(received.settle().unwrap(), Some(behind(2 * EVENTS)));
        received
    }

    /// What is written first of a run that is too long for a batch.
    fn begins(run: &Run) -> NewEvent {
        let mut received = begun(&(Arc::new(SimFs::new(1)) as _), "/other");
        let end = received.journal().end().position;
        received.run(run).unwrap();
        received.settle().unwrap();
        let first = received.journal().read_all(end).unwrap().next().unwrap().unwrap();
        assert_eq!(first.event_type().as_str(), PROGRESS);
        NewEvent::raw(PROGRESS, first.data().clone()).unwrap()
    }

    /// A feed that has a run, and some events of the next one, when it is killed.
    fn killed(fs: &Arc<dyn Fs>, second: &Run, stored: usize) -> Received {
        let mut received = begun(fs, "/feed");
        let at = StreamId::new(PROGRESS).unwrap();
        let begins = (at, begins(second));
        let mut batches = Batches::default();
        batches.last.push(&begins.0, &begins.1);
        for entry in second.entries().take(stored) {
            received.push(&mut batches, &entry.unwrap());
        }
        batches.full.iter().chain([&batches.last]).for_each(|batch| {
            received.submit(batch, None).unwrap();
        });
        assert_eq!(received.settle().unwrap(), None, "nothing of it can be acknowledged");
        received.close().unwrap();
        let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
        let received = Received::open(fs, dir, &options(), &all).unwrap().unwrap();
        assert_eq!(received.known().unwrap().durable, behind(2 * EVENTS));
        received
    }

    fn ids(received: &Received) -> Vec<u8> {
        let events = received.journal().read_all(Position::START).unwrap().map(Result::unwrap);
        let events = events.filter(|event| !event.event_type().as_str().starts_with('$'));
        events.map(|event| event.id().as_bytes()[0]).collect()
    }

    /// Which journal it follows isn't known before that is noted: another address could be asked for its own.
    #[test]
    fn a_feed_is_begun_once_that_is_noted() {
        for fault in [Fault::Enospc, Fault::Eio, Fault::Kill] {
            for failed_at in 0.. {
                let disk = SimFs::new(1);
                let fs: Arc<dyn Fs> = Arc::new(disk.clone());
                let (node, dir, all) =
                    (NodeId::from_bytes([1; 16]), Path::new("/feed"), FeedFilter::everything());
                let mut received = Received::create(node, &fs, dir, &options(), &all).unwrap();
                disk.fail_at(disk.ops() + failed_at, fault, Repeat::Once);
                let terms = FeedTerms { filter: all.clone(), shape: None };
                let granted = received.granted(&behind(0), true, terms, &all);
                let is_over = disk.faults_struck() == 0;
                assert_eq!(received.known().is_some(), granted.is_ok(), "{fault:?}, {failed_at}");
                if is_over {
                    assert!(granted.is_ok() && failed_at > 0);
                    break;
                }
            }
        }
    }

    /// Killed between any two batches of a run, it goes on behind what is there.
    #[test]
    fn a_run_that_was_stored_in_part_is_completed_when_it_comes_again() {
        for stored in 0..=EVENTS as usize {
            let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
            let second = run(2 * EVENTS);
            let mut received = killed(&fs, &second, stored);
            received.run(&second).unwrap();
            assert_eq!(received.settle().unwrap(), Some(behind(4 * EVENTS)));
            let wanted: Vec<u8> = (0..EVENTS as u8).chain(24..24 + EVENTS as u8).collect();
            assert_eq!(ids(&received), wanted, "{stored}");
            assert_eq!(received.openings(), [(Position::START, Incarnation::new(3))]);
            received.close().unwrap();
        }
    }

    fn is_replaced(taken: Result<(), FeedError>) -> bool {
        matches!(taken, Err(FeedError::Replaced { .. }))
    }

    /// The origin was restored from a copy that has what is accounted for, and has written something else since.
    #[test]
    fn what_comes_instead_of_a_run_that_was_stored_in_part_is_not_taken_for_it() {
        let from = 2 * EVENTS;
        for stored in 1..=EVENTS as usize {
            // It has this many of those events again, and then others, none, or nothing of the feed.
            for same in 0..=stored as u64 {
                let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
                let mut received = killed(&fs, &run(from), stored);
                let had = ids(&received);
                if same > 0 {
                    received.run(&run_of(from, from as u8, same)).unwrap();
                }
                let gone_on = from + 2 * same;
                let other = run_of(gone_on, 100, EVENTS);
                if same < stored as u64 {
                    assert!(is_replaced(received.run(&other)), "{stored}, {same}");
                    assert!(is_replaced(received.skipped(behind(4 * EVENTS))), "{stored}, {same}");
                    assert_eq!(ids(&received), had);
                } else {
                    received.run(&other).unwrap();
                    received.settle().unwrap();
                    assert_eq!(ids(&received).len(), (2 * EVENTS as usize) + stored);
                }
                received.close().unwrap();
            }
        }
    }

    /// It was restored, and has written nothing since.
    #[test]
    fn an_origin_that_ends_in_front_of_what_was_stored_in_part_is_recognised_at_once() {
        let from = 2 * EVENTS;
        let terms = || FeedTerms { filter: FeedFilter::everything(), shape: None };
        for stored in 0..=EVENTS as usize {
            let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
            let mut received = killed(&fs, &run(from), stored);
            let all = FeedFilter::everything();
            let mut granted =
                |end, is_origin| received.granted(&behind(end), is_origin, terms(), &all);
            for end in from..4 * EVENTS {
                assert_eq!(is_replaced(granted(end, true)), stored > 0, "{stored}, {end}");
                granted(end, false).unwrap(); // a relay that is behind
            }
            granted(4 * EVENTS, true).unwrap();
            let until = (stored > 0).then_some(Position::new(4 * EVENTS));
            assert_eq!(received.ahead_until(), until);
            received.run(&run(from)).unwrap();
            received.settle().unwrap();
            assert_eq!(received.ahead_until(), None);
            received.close().unwrap();
        }
    }

    /// It may come again in shorter runs, from somebody with shorter frames, also if it is cut off in between.
    #[test]
    fn a_run_that_was_stored_in_part_may_come_again_in_several() {
        let from = 2 * EVENTS;
        let splits = (1..=EVENTS as usize).flat_map(|n| (1..EVENTS).map(move |m| (n, m)));
        for ((stored, first), is_cut_off) in splits.flat_map(|it| [(it, false), (it, true)]) {
            let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
            let mut received = killed(&fs, &run(from), stored);
            received.run(&run_of(from, from as u8, first)).unwrap();
            assert_eq!(received.settle().unwrap(), Some(behind(from + 2 * first)), "not held up");
            if is_cut_off {
                received.close().unwrap();
                let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
                received = Received::open(&fs, dir, &options(), &all).unwrap().unwrap();
            }
            let rest = run_of(from + 2 * first, (from + first) as u8, EVENTS - first);
            received.run(&rest).unwrap();
            assert_eq!(received.settle().unwrap(), Some(behind(4 * EVENTS)));
            let wanted: Vec<u8> = (0..EVENTS as u8).chain(24..24 + EVENTS as u8).collect();
            assert_eq!(ids(&received), wanted, "{stored}, {first}, cut off: {is_cut_off}");
            received.close().unwrap();
        }
    }

    /// Killed at any moment while a run of several batches is stored, it knows who wrote what was passed over in front.
    #[test]
    fn who_wrote_what_was_passed_over_is_known_however_much_of_the_next_run_was_stored() {
        let opening = |from, incarnation| (Position::new(from), Incarnation::new(incarnation));
        let (from, to) = (2 * EVENTS, 2 * EVENTS + 2);
        let take = |received: &mut Received, incarnation: u64| {
            if received.covered().position < Position::new(to) {
                received.skipped(behind_by(4, to))?;
            }
            received.run(&run_by(incarnation, to, to as u8, EVENTS))?;
            received.settle()
        };
        for (incarnation, wanted) in [
            (4, vec![opening(0, 3), opening(from, 4)]),
            (5, vec![opening(0, 3), opening(from, 4), opening(to, 5)]),
        ] {
            for killed_at in 0.. {
                let disk = SimFs::new(1);
                let fs: Arc<dyn Fs> = Arc::new(disk.clone());
                let mut received = begun(&fs, "/feed");
                disk.fail_at(disk.ops() + killed_at, Fault::Kill, Repeat::Once);
                let is_taken = take(&mut received, incarnation).is_ok();
                drop(received);
                let is_over = is_taken && disk.faults_struck() == 0;
                disk.clear_faults();
                disk.kill();
                let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
                let mut received = Received::open(&fs, dir, &options(), &all).unwrap().unwrap();
                if received.covered().position < Position::new(to + 2 * EVENTS) {
                    take(&mut received, incarnation).unwrap();
                }
                assert_eq!(received.openings(), wanted, "{killed_at}");
                received.begin_again().unwrap();
                assert_eq!(received.openings(), wanted, "{killed_at}, noted");
                let all: Vec<u8> = (0..EVENTS as u8).chain(26..26 + EVENTS as u8).collect();
                assert_eq!(ids(&received), all, "{killed_at}");
                received.close().unwrap();
                if is_over {
                    assert!(killed_at > 3, "it took several writes");
                    break;
                }
            }
        }
    }

    /// It says of each position that another opening wrote it.
    #[test]
    fn an_origin_of_many_openings_costs_bounded_memory_and_fits_into_batches() {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let mut received = begun(&fs, "/feed");
        let count = OPENINGS_MAX as u64 + 100;
        for at in 2 * EVENTS..2 * EVENTS + count {
            received.skipped(behind_by(at, at + 1)).unwrap();
            assert!(received.new_openings.len() < NEW_OPENINGS_MAX);
            assert!(received.openings().len() <= OPENINGS_MAX);
            let (from, by) = *received.openings().last().unwrap();
            assert_eq!((from.get(), by.get()), (at, at));
        }
        for more in 1..=NEW_OPENINGS_MAX as u64 {
            let from = 2 * EVENTS + count + more * 100;
            (1..more).for_each(|at| received.skipped(behind_by(at, from + at)).unwrap());
            received.run(&run_by(from, from + more - 1, 100, EVENTS)).unwrap();
        }
        received.rest().unwrap();
        received.begin_again().unwrap();
        assert_eq!(received.openings().len(), OPENINGS_MAX);
        let last = received.openings().last().unwrap().1.get();
        assert_eq!(last, 2 * EVENTS + count + NEW_OPENINGS_MAX as u64 * 100);
        received.close().unwrap();
    }

    #[test]
    fn what_is_passed_over_is_noted_now_and_then_and_at_the_end() {
        let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let node = NodeId::from_bytes([1; 16]);
        let mut received = Received::create(node, &fs, dir, &options(), &all).unwrap();
        let terms = FeedTerms { filter: all.clone(), shape: None };
        received.granted(&behind(0), true, terms, &all).unwrap();
        let end = received.journal().end().position;
        received.skipped(behind(1)).unwrap();
        assert_eq!(received.settle().unwrap(), None);
        assert_eq!(received.journal().end().position, end, "not for each of them");
        let far = SKIPPED_BYTES_MAX / 64;
        received.skipped(behind(far)).unwrap();
        assert_eq!(received.settle().unwrap(), Some(behind(far)));
        received.skipped(behind(far + 1)).unwrap();
        assert_eq!(received.rest().unwrap(), Some(behind(far + 1)));
        assert_eq!(received.rest().unwrap(), None);
        received.close().unwrap();
        let received = Received::open(&fs, dir, &options(), &all).unwrap().unwrap();
        assert_eq!(
            (received.known().unwrap().durable, received.again),
            (behind(far + 1), Again::default())
        );
    }
}
