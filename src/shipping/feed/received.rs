//! What was received of a feed: a journal of its own, in which the events stand as if they were appended here, and with
//! them up to where the origin's journal is accounted for.
//!
//! ```text
//!   batch ┌ event ┬ event ┬ … ┬ $feed {checkpoint of the origin, terms} ┐    one write: events and progress together
//!   batch └ event ┬ event ┘                                                  a run too long for a batch: progress at its end
//!   batch ┌ event ┬ $feed {…} ┐
//!
//!   opening: the last $feed, and how many events lie behind it: these come again, and are passed over
//! ```
//! Invariants:
//! - An event of the origin is here once, or was skipped: what comes again is counted, not compared.
//! - Only what is durable here is acknowledged, as a checkpoint of the origin from which it can go on.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::FeedError;
use crate::error::OpenError;
use crate::event::{NewEvent, PayloadCodec, Recorded, StreamId};
use crate::format::batch::BATCH_HEADER_BYTES;
use crate::format::files::{Mark, Role};
use crate::format::record;
use crate::fs::Fs;
use crate::hex::{from_hex, hex};
use crate::journal::{Append, Appender, CloseError, Journal, Ticket};
use crate::options::JournalOptions;
use crate::position::{Checkpoint, Incarnation, JournalId, NodeId, Position};
use crate::shipping::error::ShippingError;
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::{Entry, FeedRequest, FeedTerms, Run};

/// The type and the stream of what says how far a feed is.
const PROGRESS: &str = "$feed";
/// The same of what says which opening of the origin wrote the events from a position on.
const OPENING: &str = "$feed.opening";
/// Passing over so many bytes of the origin's journal is noted even if no event comes.
const SKIPPED_BYTES_MAX: u64 = 8 << 20;
/// The same after so much time.
const SKIPPED_FOR: Duration = Duration::from_secs(30);

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

/// Writes what is received.
#[derive(Debug)]
pub(super) struct Received {
    appender: Appender,
    batch_bytes_max: usize,
    known: Option<Known>,
    /// Up to here it was received, and perhaps not noted yet.
    covered: Checkpoint,
    noted_at: Instant,
    /// So many events come again.
    again: u64,
    /// From which position on which opening of the origin wrote.
    openings: Vec<(Position, Incarnation)>,
    /// Those of them that aren't written yet.
    new_openings: Vec<(Position, Incarnation)>,
    /// What was submitted last.
    submitted: Option<(Ticket, Option<Checkpoint>)>,
}

fn feed_options(options: &JournalOptions) -> JournalOptions {
    // What comes again is known by its number.
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
        let (known, again) = last_progress(journal)?;
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
            again,
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

    /// The subscription was granted, to the origin's journal, with these terms.
    pub(super) fn granted(
        &mut self,
        journal: JournalId,
        terms: FeedTerms,
        wanted: &FeedFilter,
    ) -> Result<(), FeedError> {
        if self.known.is_some() {
            return Ok(());
        }
        let durable = Mark::start(journal).end;
        self.known = Some(Known { wanted: wanted.clone(), terms, durable });
        self.covered = durable;
        self.note(Append::default())?;
        self.settle().map(drop)
    }

    /// Takes events in. They are written when this returns; [`settle`](Self::settle) waits until they are durable.
    pub(super) fn run(&mut self, run: &Run) -> Result<(), FeedError> {
        let mut append = Append::default();
        for entry in run.entries().flatten() {
            if self.again > 0 {
                self.again -= 1;
                continue;
            }
            append = self.push(append, &entry)?;
        }
        self.cover(run.behind);
        self.note(append)
    }

    /// Nothing comes up to here.
    pub(super) fn skipped(&mut self, behind: Checkpoint) -> Result<(), FeedError> {
        self.cover(behind);
        let durable = self.known.as_ref().map_or(0, |known| known.durable.offset);
        let is_due = behind.offset.saturating_sub(durable) >= SKIPPED_BYTES_MAX
            || self.noted_at.elapsed() >= SKIPPED_FOR;
        if is_due { self.note(Append::default()) } else { Ok(()) }
    }

    fn cover(&mut self, behind: Checkpoint) {
        let last = self.openings.last().map(|(_, incarnation)| *incarnation);
        if last != Some(behind.incarnation) {
            let opening = (self.covered.position, behind.incarnation);
            self.openings.push(opening);
            self.new_openings.push(opening);
        }
        self.covered = behind;
    }

    /// Adds an event, behind what fills a batch if it doesn't fit into that any more.
    fn push(&mut self, mut append: Append, entry: &Entry<'_>) -> Result<Append, FeedError> {
        let (Some(event), Ok(stream)) =
            (NewEvent::of_record(&entry.record), StreamId::new(entry.record.stream))
        else {
            return Ok(append); // can't be: the record was verified
        };
        let dated = NewEvent {
            occurred_at_us: event.occurred_at_us.or(Some(entry.time_us)),
            ..event.clone()
        };
        let fits = |len: usize| len + BATCH_HEADER_BYTES <= self.batch_bytes_max;
        let event = if fits(record::encoded_len(&dated, &stream)) { dated } else { event };
        let len = record::encoded_len(&event, &stream);
        if !append.is_empty() && append.len_bytes() + len > self.batch_bytes_max {
            self.submit(&append, None)?;
            append = Append::default();
        }
        append.push(&stream, &event);
        Ok(append)
    }

    /// Writes the events, and up to where everything is accounted for.
    fn note(&mut self, mut append: Append) -> Result<(), FeedError> {
        let Some(known) = &self.known else { return Ok(()) };
        let progress = Progress {
            journal: self.covered.journal.to_string(),
            position: self.covered.position.get(),
            checkpoint: hex(&self.covered.to_bytes()),
            wanted: known.wanted.clone(),
            granted: known.terms.clone(),
        };
        let mut notes: Vec<_> = std::mem::take(&mut self.new_openings)
            .into_iter()
            .filter_map(|(from, incarnation)| {
                let incarnation = hex(&incarnation.get().to_le_bytes());
                reserved(OPENING, &Opening { from: from.get(), incarnation })
            })
            .collect();
        notes.extend(reserved(PROGRESS, &progress));
        let len: usize = notes.iter().map(|(at, note)| record::encoded_len(note, at)).sum();
        if !append.is_empty() && append.len_bytes() + len > self.batch_bytes_max {
            self.submit(&append, None)?;
            append = Append::default();
        }
        notes.iter().for_each(|(at, note)| append.push(at, note));
        self.noted_at = Instant::now();
        self.submit(&append, Some(self.covered))
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
        self.note(Append::default())?;
        self.settle()
    }

    /// A new session goes on from what is durable; what was received behind it comes again.
    pub(super) fn begin_again(&mut self) -> Result<(), FeedError> {
        self.appender.flush()?;
        let (known, again) = last_progress(self.journal())?;
        self.again = again;
        if let Some(known) = known {
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

/// How far it was received, and how many events came behind that.
fn last_progress(journal: &Journal) -> Result<(Option<Known>, u64), FeedError> {
    let end = journal.end().position;
    let mut behind = 0;
    for event in journal.read_all_backward(end)? {
        let event = event?;
        if event.event_type().as_str() == PROGRESS {
            return known(&event).map(|known| (Some(known), behind)).ok_or(FeedError::NoProgress);
        }
        behind += 1;
    }
    if behind == 0 { Ok((None, 0)) } else { Err(FeedError::NoProgress) }
}

fn known(event: &Recorded) -> Option<Known> {
    let progress: Progress = serde_json::from_slice(event.data()).ok()?;
    let bytes: [u8; Checkpoint::ENCODED_LEN] = from_hex(&progress.checkpoint)?.try_into().ok()?;
    let durable = Checkpoint::from_bytes(&bytes)?;
    Some(Known { wanted: progress.wanted, terms: progress.granted, durable })
}

/// Those that are still known, in order.
fn openings(journal: &Journal) -> Result<Vec<(Position, Incarnation)>, FeedError> {
    let Ok(stream) = StreamId::new(OPENING) else { return Ok(Vec::new()) };
    let mut openings = Vec::new();
    for event in journal.read_stream_backward(&stream, None)? {
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
    use crate::fs::sim::SimFs;
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
        let start = Mark::start(ORIGIN).end;
        let (offset, incarnation) = (64 * position, Incarnation::new(3));
        Checkpoint { offset, incarnation, position: Position::new(position), ..start }
    }

    /// Longer than several batches here: every second position.
    fn run(from: u64) -> Run {
        let mut run = RunWriter::new(Position::new(from));
        for number in 0..EVENTS {
            let event = NewEvent::raw("happened", vec![number as u8; 300]).unwrap();
            let event = event.id(EventId::from_bytes([(from + number) as u8; 16]));
            let mut bytes = Vec::new();
            let stream = StreamId::new(format!("s-{}", number % 2)).unwrap();
            record::encode(&mut bytes, &event, &stream, Revision::FIRST);
            run.add(Position::new(from + 2 * number), 5, &bytes);
        }
        let bytes = run.finish(&behind(from + 2 * EVENTS));
        Run::decode(Position::new(from), bytes).unwrap()
    }

    fn ids(received: &Received) -> Vec<u8> {
        let events = received.journal().read_all(Position::START).unwrap().map(Result::unwrap);
        let events = events.filter(|event| !event.event_type().as_str().starts_with('$'));
        events.map(|event| event.id().as_bytes()[0]).collect()
    }

    /// Killed between any two batches of a run, it goes on behind what is there.
    #[test]
    fn a_run_that_was_stored_in_part_is_completed_when_it_comes_again() {
        let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
        for stored in 0..=EVENTS as usize {
            let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
            let node = NodeId::from_bytes([1; 16]);
            let mut received = Received::create(node, &fs, dir, &options(), &all).unwrap();
            let terms = FeedTerms { filter: all.clone(), shape: None };
            received.granted(ORIGIN, terms, &all).unwrap();
            received.run(&run(0)).unwrap();
            assert_eq!(received.settle().unwrap(), Some(behind(2 * EVENTS)));
            let second = run(2 * EVENTS);
            let mut append = Append::default();
            for entry in second.entries().take(stored) {
                append = received.push(append, &entry.unwrap()).unwrap();
            }
            if !append.is_empty() {
                received.submit(&append, None).unwrap();
            }
            assert_eq!(received.settle().unwrap(), None, "nothing of it can be acknowledged");
            received.close().unwrap();

            let mut received = Received::open(&fs, dir, &options(), &all).unwrap().unwrap();
            assert_eq!(received.known().unwrap().durable, behind(2 * EVENTS));
            assert_eq!(received.again, stored as u64);
            received.run(&second).unwrap();
            assert_eq!(received.settle().unwrap(), Some(behind(4 * EVENTS)));
            let wanted: Vec<u8> = (0..EVENTS as u8).chain(24..24 + EVENTS as u8).collect();
            assert_eq!(ids(&received), wanted, "{stored}");
            assert_eq!(received.openings(), [(Position::START, Incarnation::new(3))]);
            received.close().unwrap();
        }
    }

    #[test]
    fn what_is_passed_over_is_noted_now_and_then_and_at_the_end() {
        let (dir, all) = (Path::new("/feed"), FeedFilter::everything());
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let node = NodeId::from_bytes([1; 16]);
        let mut received = Received::create(node, &fs, dir, &options(), &all).unwrap();
        let terms = FeedTerms { filter: all.clone(), shape: None };
        received.granted(ORIGIN, terms, &all).unwrap();
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
        assert_eq!((received.known().unwrap().durable, received.again), (behind(far + 1), 0));
    }
}
