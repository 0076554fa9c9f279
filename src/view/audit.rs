//! The completeness audit: every event of a view's types was taken in, segment by segment.
//!
//! ```text
//! journal ──▶ headers and types, nothing decoded ──▶ events of the view's types, by segment ┐
//!                                                                                           ├─ the same?
//! view ─────▶ counts in the write batch of the rows ─▶ applied + parked + discarded ────────┘
//! ```
//! A lag of zero says that the checkpoint is at the journal's end, not that the events in front of it were folded. The
//! view counts what it folds where it folds it, apart from the checkpoint; the audit counts what there is to be folded
//! from the journal alone. An event that was passed over, or a chunk of which only the checkpoint was written, makes a
//! difference. (That the rows are right is what [`check`](super::ViewControl::check) proves.)
//!
//! Invariants:
//! - Counts go through the write batch of the rows and the checkpoint that they are of.
//! - Every stored event is counted once: as folded when its first row is, or when it concerns none.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use super::chunk::Batch;
use super::control::ViewControl;
use super::db::{Reader, StorageError, all_parked, all_tallies, unrouted_range};
use super::poison::{Discarded, ParkedCounts, ParkedRecord};
use super::runner::Shared;
use crate::error::ReadError;
use crate::event::KnownKind;
use crate::format::Decoder;
use crate::journal::Journal;
use crate::position::{JournalId, Locator, Position};

/// What has become of the stored events of one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Folded into rows, or parked with some of them, or without any row.
    pub(super) applied: u64,
    /// Of a type that the view doesn't know.
    pub(super) skipped: u64,
    /// Parked under no key when it was their turn.
    pub(super) unrouted: u64,
    /// Left out by a decision that was there before.
    pub(super) discarded: u64,
}

impl Tally {
    pub(super) const BYTES: usize = 32;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let Self { applied, skipped, unrouted, discarded } = self;
        let mut out = [0; Self::BYTES];
        for (place, number) in out.chunks_exact_mut(8).zip([applied, skipped, unrouted, discarded])
        {
            place.copy_from_slice(&number.to_le_bytes());
        }
        out
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut input = Decoder::new(bytes);
        let mut number = || input.u64().ok();
        let (applied, skipped) = (number()?, number()?);
        let (unrouted, discarded) = (number()?, number()?);
        input.rest().is_empty().then_some(Self { applied, skipped, unrouted, discarded })
    }

    pub(super) const fn add(&mut self, more: Self) {
        self.applied += more.applied;
        self.skipped += more.skipped;
        self.unrouted += more.unrouted;
        self.discarded += more.discarded;
    }

    /// What both agree upon.
    pub(super) fn least(self, other: Self) -> Self {
        Self {
            applied: self.applied.min(other.applied),
            skipped: self.skipped.min(other.skipped),
            unrouted: self.unrouted.min(other.unrouted),
            discarded: self.discarded.min(other.discarded),
        }
    }
}

/// By journal and number of the segment.
pub(super) type Tallies = BTreeMap<(JournalId, u64), Tally>;

/// Counts what a chunk folds, as it does so.
pub(super) struct Folds<'a> {
    journal: JournalId,
    batches: &'a [Batch],
    tallies: Tallies,
    batch: usize,
    last: Option<Position>,
}

impl<'a> Folds<'a> {
    pub(super) const fn of(journal: JournalId, batches: &'a [Batch]) -> Self {
        Self { journal, batches, tallies: Tallies::new(), batch: 0, last: None }
    }

    /// What stands at this place among the things to be folded is of the stored event at `position`.
    pub(super) fn saw(&mut self, index: usize, position: Position, count: impl Fn(&mut Tally)) {
        while self.batches.get(self.batch).is_some_and(|batch| batch.routes <= index) {
            self.batch += 1;
        }
        let segment = self.batches.get(self.batch).map(|batch| batch.segment);
        if let Some(segment) = segment.filter(|_| self.last != Some(position)) {
            self.last = Some(position);
            count(self.tallies.entry((self.journal, segment)).or_default());
        }
    }

    /// Of the first batches, all of which were folded; with what of them needs no folding.
    pub(super) fn end(mut self, batches: usize) -> Tallies {
        for batch in self.batches.iter().take(batches) {
            self.tallies.entry((self.journal, batch.segment)).or_default().add(batch.tally);
        }
        self.tallies
    }
}

/// What an [audit](ViewControl::audit) has found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audit {
    /// The segments of all journals of the view, in their order, as far as it has applied them.
    pub segments: Vec<SegmentAudit>,
    /// How much is parked, counted one by one.
    pub parked_found: ParkedCounts,
    /// How much is parked, as the view's status says.
    pub parked_counted: ParkedCounts,
}

/// What has become of the events of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentAudit {
    /// Its journal.
    pub journal: JournalId,
    /// Its number.
    pub segment: u64,
    /// The positions that were looked at: up to the view's checkpoint.
    pub events: Range<Position>,
    /// Counted in the journal: events of the types that the view knows.
    pub matching: u64,
    /// Counted in the journal: events of other types.
    pub other: u64,
    /// Counted by the view: folded into all rows that they concern, but for rows for which they are discarded.
    pub applied: u64,
    /// Counted by the view: at least one row lacks them until they are retried or discarded, or any row may.
    pub parked: u64,
    /// Counted by the view: left out altogether, by decision.
    pub discarded: u64,
    /// Counted by the view: events of types that it doesn't know.
    pub skipped: u64,
    /// Events that the journal has lost, with an operator's leave. Where there are some, nothing is compared.
    pub lost: u64,
}

impl SegmentAudit {
    /// How many events the view has passed over silently; below zero, how many it has taken in that aren't there.
    #[must_use]
    pub fn difference(&self) -> i128 {
        let taken = [self.applied, self.parked, self.discarded].map(i128::from);
        i128::from(self.matching) - taken.iter().sum::<i128>()
    }

    /// Whether all events of the segment are accounted for.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lost > 0 || (self.difference() == 0 && self.other == self.skipped)
    }
}

impl Audit {
    /// Whether every event of the view's types was taken in, and everything parked is counted.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.first_difference().is_none() && self.parked_found == self.parked_counted
    }

    /// The first segment whose events aren't all accounted for.
    #[must_use]
    pub fn first_difference(&self) -> Option<&SegmentAudit> {
        self.segments.iter().find(|segment| !segment.is_complete())
    }
}

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first_difference() {
            Some(it) => {
                let Range { start, end } = it.events;
                let (difference, segment) = (it.difference(), it.segment);
                write!(
                    f,
                    "segment {segment} (positions {start} to {end}): {difference} events are not accounted for: \
                     {} of the view's types, {} applied, {} parked, {} discarded; {} of other types, {} skipped",
                    it.matching, it.applied, it.parked, it.discarded, it.other, it.skipped
                )
            }
            None if self.parked_found != self.parked_counted => {
                let (found, counted) = (self.parked_found, self.parked_counted);
                write!(f, "what is parked is {found:?}, but counted as {counted:?}")
            }
            None => write!(f, "complete: {} segments", self.segments.len()),
        }
    }
}

/// Why a view can't be audited.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// It isn't known whether its rows are of this journal: it waits for its mirror, or was opened stopped.
    #[error("view {view}: it isn't known whether its rows are of this journal")]
    NotJudged {
        /// The view.
        view: &'static str,
    },
    /// The generation was begun by a version that didn't count.
    #[error("{}: this generation was begun before events were counted", generation.display())]
    NotCounted {
        /// Its folder.
        generation: PathBuf,
    },
    /// The journal can't be read.
    #[error(transparent)]
    Journal(#[from] ReadError),
    /// The view's database failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl AuditError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotJudged { .. } => "audit.not_judged",
            Self::NotCounted { .. } => "audit.not_counted",
            Self::Journal(error) => error.code(),
            Self::Storage(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotJudged { .. } => {
                "wait until the mirror has got as far as the view, or see why the view has stopped"
            }
            Self::NotCounted { .. } => "rebuild the view",
            Self::Journal(error) => error.hint(),
            Self::Storage(error) => error.hint(),
        }
    }
}

impl ViewControl {
    /// Proves that the view has passed over none of the events in front of its checkpoint: for each segment of the
    /// journal, the events of its types are those that it has applied, parked and discarded. Reads the whole journal,
    /// headers and types only, and blocks until that is done; reads and the fold go on.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use headwater::view::{Fold, FoldError, Keys, View};
    /// # use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
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
    /// # let store = Store::create(dir.path().join("orders"))?;
    /// # let placed = NewEvent::json("order.placed", &1250)?;
    /// # let append = Append::to(&StreamId::new("order-7")?, ExpectedRevision::Any, [placed]);
    /// let count = store.view(Count)?;
    /// let appended = store.append(&append)?;
    /// count.wait_for(&appended.token(), Duration::from_secs(10))?;
    /// let audit = count.audit()?;
    /// assert!(audit.is_complete(), "{audit}");
    /// assert_eq!((audit.segments[0].matching, audit.segments[0].applied), (1, 1));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AuditError`]. Events that were passed over are no error but the answer.
    pub fn audit(&self) -> Result<Audit, AuditError> {
        audit(self.shared(), self.name(), self.kinds())
    }
}

fn audit(
    shared: &Shared,
    view: &'static str,
    kinds: &'static [KnownKind],
) -> Result<Audit, AuditError> {
    if !shared.state().judged {
        return Err(AuditError::NotJudged { view });
    }
    let reader = shared.db().snapshot();
    let Some(progress) = reader.progress(shared.sources.ids())? else {
        return Err(AuditError::NotJudged { view }); // it is being built: there is nothing yet
    };
    if !reader.is_counted()? {
        return Err(AuditError::NotCounted { generation: reader.db().path().to_owned() });
    }
    let stored = Stored::read(&reader)?;
    // Behind the snapshot: what is discarded since is a decision, too.
    let discarded = shared.parking.discarded();
    let mut segments = Vec::new();
    for journal in shared.sources.iter() {
        let position = progress.checkpoints.position(journal.id());
        for segment in journal.segments() {
            let events = segment.base_position..segment.end_position.min(position);
            if events.start < events.end {
                let counted = count(journal, &events, kinds, &discarded)?;
                let place = (journal.id(), segment.number);
                segments.push(stored.compare(place, events, counted));
            }
        }
    }
    let (parked_found, parked_counted) = (stored.counts, progress.parked);
    Ok(Audit { segments, parked_found, parked_counted })
}

/// What is counted in the journal.
#[derive(Clone, Copy, Default)]
struct Counted {
    matching: u64,
    other: u64,
    /// Of all of these: discarded altogether.
    decided: u64,
    lost: u64,
}

/// Counts events by the names of their types, and by their ids those that are discarded.
fn count(
    journal: &Journal,
    events: &Range<Position>,
    kinds: &[KnownKind],
    discarded: &Discarded,
) -> Result<Counted, ReadError> {
    // A follower that names none takes all.
    let matches =
        |name: &str| kinds.is_empty() || kinds.iter().any(|known| known.kind.name == name);
    let mut counted = Counted::default();
    let mut cursor = journal.cursor(events.start)?;
    while cursor.position() < events.end {
        let batch = match cursor.next_batch() {
            Ok(Some(batch)) => batch,
            Ok(None) => break,
            Err(error @ ReadError::Gap { .. }) => match cursor.skip_gap() {
                Some(lost) => {
                    counted.lost += lost.end.min(events.end).since(lost.start.max(events.start));
                    continue;
                }
                None => return Err(error),
            },
            Err(error) => return Err(error),
        };
        let first = batch.batch.header.base_position.get();
        for (position, record) in (first..).map(Position::new).zip(batch.batch.records()) {
            let record = record.map_err(|error| batch.unreadable(journal, error))?;
            let at = Locator { journal: journal.id(), position };
            counted.decided += u64::from(discarded.has_all_of(at, record.id));
            match matches(record.event_type) {
                true => counted.matching += 1,
                false => counted.other += 1,
            }
        }
    }
    Ok(counted)
}

/// What the view has stored about what it has taken in.
struct Stored {
    tallies: Tallies,
    /// Parked with a row.
    parked: BTreeSet<(JournalId, Position)>,
    unrouted: BTreeSet<(JournalId, Position)>,
    counts: ParkedCounts,
}

impl Stored {
    fn read(reader: &Reader) -> Result<Self, StorageError> {
        let mut tallies = Tallies::new();
        for entry in reader.scan(all_tallies()) {
            let (key, value) = entry?;
            let (place, tally) = reader.db().tally_from(&key, &value)?;
            tallies.insert(place, tally);
        }
        let damaged = || reader.db().parked_damaged("a parked event");
        let place = |value: &[u8]| {
            let parked = ParkedRecord::from_bytes(value).ok_or_else(damaged)?;
            Ok::<_, StorageError>((parked.journal, parked.position))
        };
        let mut counts = ParkedCounts::default();
        let (mut parked, mut unrouted) = (BTreeSet::new(), BTreeSet::new());
        let mut head: Option<Box<[u8]>> = None;
        for entry in reader.scan(all_parked()) {
            let (key, value) = entry?;
            // No head begins with another's key.
            if head.as_deref().is_some_and(|head| key.starts_with(head)) {
                counts.events += 1;
                parked.insert(place(&value)?);
            } else {
                counts.keys += 1;
                head = Some(key);
            }
        }
        for entry in reader.scan(unrouted_range()) {
            counts.unrouted += 1;
            unrouted.insert(place(&entry?.1)?);
        }
        Ok(Self { tallies, parked, unrouted, counts })
    }

    fn compare(
        &self,
        (journal, segment): (JournalId, u64),
        events: Range<Position>,
        Counted { matching, other, decided, lost }: Counted,
    ) -> SegmentAudit {
        let tally = self.tallies.get(&(journal, segment)).copied().unwrap_or_default();
        let Tally { applied, skipped, unrouted, discarded } = tally;
        let within = |all: &BTreeSet<(JournalId, Position)>| {
            all.range((journal, events.start)..(journal, events.end)).count() as u64
        };
        let (with_key, under_none) = (within(&self.parked), within(&self.unrouted));
        // Those that are gone were decided upon since; or they are just gone.
        let decided_since = decided.saturating_sub(discarded);
        let gone = unrouted.saturating_sub(under_none).min(decided_since);
        SegmentAudit {
            journal,
            segment,
            events,
            matching,
            other,
            applied: applied.saturating_sub(with_key),
            parked: with_key + under_none,
            discarded: discarded + gone,
            skipped,
            lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::event::EventId;
    use crate::format::crc32;
    use crate::format::files::Role;
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;
    use crate::position::NodeId;
    use crate::{ExpectedRevision, NewEvent, StreamId};

    /// Behind a restore another event is at the place of one that was discarded. Had that counted as discarded, another one of
    /// the segment could have gone unnoticed.
    #[test]
    fn what_is_discarded_is_counted_by_the_ids_of_events_and_not_by_their_places() {
        let (fs, dir): (Arc<dyn Fs>, _) = (Arc::new(SimFs::new(1)), Path::new("/journal"));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create_as(Role::Origin, NodeId::random(), &fs, dir, &options);
        let appender = appender.unwrap();
        let (own, other) = (EventId::from_bytes([1; 16]), EventId::from_bytes([2; 16]));
        let stream = StreamId::new("counted").unwrap();
        let event = NewEvent::raw("counted", *b"").unwrap().id(own);
        appender.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
        let journal = appender.journal();
        let events = Position::START..journal.end().position;
        for (decided, id) in [(1, own.to_string()), (0, other.to_string()), (1, "-".to_owned())] {
            let body = format!("headwater discarded 2\n{} 0 {id} -\n", journal.id());
            let text = format!("{body}crc32 {:08x}\n", crc32(&[body.as_bytes()]));
            let discarded = Discarded::parse(&text).unwrap();
            let counted = count(journal, &events, &[], &discarded).unwrap();
            assert_eq!((counted.matching, counted.decided), (1, decided), "{id}");
        }
    }

    /// A decision that was there before an event was folded accounts for that one already, and for no other one that is gone.
    #[test]
    fn a_decision_accounts_for_one_event_only() {
        let place = (JournalId::from_bytes([3; 16]), 0);
        let tally = Tally { unrouted: 2, discarded: 1, ..Tally::default() };
        let stored = Stored {
            tallies: [(place, tally)].into(),
            parked: BTreeSet::new(),
            unrouted: BTreeSet::new(),
            counts: ParkedCounts::default(),
        };
        let audited = |decided| {
            let counted = Counted { matching: 3, decided, ..Counted::default() };
            stored.compare(place, Position::START..Position::new(3), counted)
        };
        assert_eq!([1, 2, 3].map(|decided| audited(decided).discarded), [1, 2, 3]);
    }
}
