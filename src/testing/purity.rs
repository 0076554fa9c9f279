//! Whether a view is a pure fold.
//!
//! ```text
//!  event after event: route, fold, make index keys  ── several times each: the same?
//!                     row ▶ bytes ▶ row             ── the same?
//!                              │ the rows behind each event
//!                              ▼
//!  again, in chunks of other sizes, some folded twice after a crash, one part of the keys after the other: the same?
//! ```
//! Only what the real view does is tried: the order of the journal is kept for each row. In which order events of
//! *different* rows are folded differs between the view that follows and one that is rebuilt, so that is tried.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Debug};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::diff::lines;
use super::history::History;
use crate::event::{EventType, Recorded, StreamId};
use crate::position::Position;
use crate::view::memory::{
    Kept, MemoryRows, Outcome, RoutedRow, Routes, Slot, fold_once, key_of, row_of, stored_row,
};
use crate::view::{View, ViewKey};

/// How often each event is folded into the same row: the order of two entries of a `HashMap` is another one every other
/// time.
pub(super) const FOLDS: usize = 8;
/// A clock of milliseconds has moved after this time.
pub(super) const CLOCK_MOVES: Duration = Duration::from_millis(2);
/// Runs with random chunks, and runs with random crashes.
pub(super) const RANDOM_RUNS: u64 = 4;
/// How the keys are divided in the run that folds one part after the other.
const PARTS: u64 = 8;

/// Asserts that a view is a pure fold, as far as `history` shows: that it comes to the same rows however often, and in
/// however large steps, its events are folded. That is what rebuilds, repetition after a crash, and comparison by digest
/// rest on.
///
/// It finds, and names the first event and row that differ:
/// - a clock, a random number, the order of a `HashMap` in `route`, `fold` or the keys of an index;
/// - something remembered in `&self`;
/// - a row or key that isn't the same after it was stored and read back, as with `#[serde(skip)]`, or a `HashMap` in a row.
///
/// It sees what makes a difference within the moment that it takes: a clock that is read to the second, or the
/// environment, may get past it. Give it a history that reaches every arm of the fold; a thousand events take some
/// milliseconds.
///
/// ```should_panic
/// use headwater::testing::{self, History};
/// use headwater::view::{Fold, FoldError, Keys, View};
/// use headwater::{Recorded, StreamId};
///
/// /// When each stream was last heard of.
/// struct Heard;
///
/// impl View for Heard {
///     const NAME: &'static str = "heard";
///     const VERSION: u32 = 1;
///     type Key = StreamId;
///     type Row = u64;
///     type Event = Vec<u8>;
///
///     fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
///         keys.add(event.stream().clone());
///     }
///
///     fn fold(&self, _: &StreamId, _: Option<u64>, _: &Recorded<Vec<u8>>) -> Result<Fold<u64>, FoldError> {
///         let now = std::time::SystemTime::now(); // `recorded_at_us` of the event is meant
///         Ok(Fold::Put(now.duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64))
///     }
/// }
///
/// testing::assert_pure(&Heard, &History::new().with("sensor-1", [b"21.5".to_vec()]));
/// ```
///
/// # Panics
/// If it isn't, or the view can't be opened as it is.
#[track_caller]
pub fn assert_pure<V: View>(view: &V, history: &History)
where
    V::Key: Debug,
    V::Row: Debug,
{
    if let Err(impure) = check_purity(view, history) {
        panic!("{impure}");
    }
}

/// The same as [`assert_pure`], as a result.
///
/// # Errors
/// [`Impure`], the first difference.
///
/// # Panics
/// If the view can't be opened as it is: its name or an index isn't valid.
#[track_caller]
pub fn check_purity<V: View>(view: &V, history: &History) -> Result<(), Box<Impure>>
where
    V::Key: Debug,
    V::Row: Debug,
{
    let rows = MemoryRows::new(view).unwrap_or_else(|error| panic!("{error}"));
    let mut check =
        Check { view, events: history.events(), behind: BTreeMap::new(), end: Kept::default() };
    let began = Instant::now();
    check.event_after_event(rows)?;
    thread::sleep(CLOCK_MOVES.saturating_sub(began.elapsed()));
    let all = check.events.len();
    for size in [all, 2, 3, 7] {
        check.in_chunks(&format!("in chunks of {size} events"), || size, 0)?;
    }
    for seed in 0..RANDOM_RUNS {
        let mut rng = Rng::with_seed(seed);
        check.in_chunks("in chunks of random sizes", || rng.usize(1..=all.max(1)), 0)?;
        let mut rng = Rng::with_seed(seed);
        check.in_chunks(
            "with crashes, after each of which some were folded again",
            || rng.usize(1..=5),
            seed + 1,
        )?;
    }
    check.part_after_part()
}

/// How a view was found out not to be a pure fold: the first event and row that differ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Impure {
    /// The view's name.
    pub view: &'static str,
    /// The event's position.
    pub position: Position,
    /// The event's stream.
    pub stream: StreamId,
    /// The event's type.
    pub event_type: EventType,
    /// The row's table, in a view of tables.
    pub table: Option<&'static str>,
    /// The row's key, as `Debug` shows it (in a view of tables: in JSON); `None` if it shows before there is a row.
    pub key: Option<String>,
    /// What was done.
    pub what: String,
    /// What came first (`-`) and later (`+`).
    pub difference: String,
}

impl fmt::Display for Impure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { view, position, stream, event_type, table, key, what, difference } = self;
        writeln!(f, "view {view} is not a pure fold")?;
        writeln!(f, "  event: position {position}, {event_type} in stream {stream}")?;
        match (key, table) {
            (Some(key), Some(table)) => writeln!(f, "  row:   {key} of table {table}")?,
            (Some(key), None) => writeln!(f, "  row:   {key}")?,
            (None, _) => {}
        }
        writeln!(f, "  {what} (- first, + later):")?;
        f.write_str(difference)?;
        f.write_str(
            "  usual causes: a clock, a random number, the order of a HashMap, something remembered in &self,\n  \
             a field that serde skips",
        )
    }
}

impl std::error::Error for Impure {}

struct Check<'a, V: View> {
    view: &'a V,
    events: &'a [Recorded],
    /// What was under each key behind each event that concerns it, by the event's number.
    behind: BTreeMap<Vec<u8>, Vec<(usize, Slot)>>,
    /// What there was at the end.
    end: Kept,
}

pub(super) type Checked = Result<(), Box<Impure>>;

impl<V: View> Check<'_, V>
where
    V::Key: Debug,
    V::Row: Debug,
{
    fn event_after_event(&mut self, mut rows: MemoryRows<V>) -> Checked {
        for (number, stored) in self.events.iter().enumerate() {
            let routes = self.routes(stored)?;
            for row in &routes.rows {
                self.key_round_trip(stored, row)?;
                self.folds(stored, &routes, row, &rows)?;
            }
            for key in rows.apply(self.view, std::slice::from_ref(stored), |_| true) {
                let slot = rows.kept.slots.get(&key).cloned().unwrap_or_default();
                self.behind.entry(key).or_default().push((number, slot));
            }
        }
        self.end = rows.kept;
        Ok(())
    }

    /// Where the event goes, asked several times.
    fn routes(&self, stored: &Recorded) -> Result<Routes<V>, Box<Impure>> {
        let once = || {
            let mut routes = Routes::new();
            let known = routes.add(self.view, stored).map_err(|cause| cause.to_string());
            let rows =
                routes.rows.iter().map(|row| (format!("{:?}", row.key), &row.row_key, &row.events));
            let shown = format!("{:#?}", (known, rows.collect::<Vec<_>>()));
            (routes, shown)
        };
        let (routes, first) = once();
        for _ in 1..FOLDS {
            let (_, again) = once();
            self.same(stored, None, "routed again, it went to other rows", &first, &again)?;
        }
        Ok(routes)
    }

    fn key_round_trip(&self, stored: &Recorded, row: &RoutedRow<V>) -> Checked {
        let shown = |key: &V::Key| {
            let mut bytes = Vec::new();
            key.encode_key(&mut bytes);
            format!("{key:?} = {bytes:02x?}")
        };
        let read = key_of::<V>(&row.row_key);
        let read = read.map_or_else(|error| error.to_string(), |key| shown(&key));
        let what = "the key was stored and read back, and is another";
        self.same(stored, Some(&row.row_key), what, &shown(&row.key), &read)
    }

    /// What the event makes of the row, several times; and whether that can be stored and read back.
    fn folds(
        &self,
        stored: &Recorded,
        routes: &Routes<V>,
        row: &RoutedRow<V>,
        rows: &MemoryRows<V>,
    ) -> Checked {
        let before = rows.kept.slots.get(&row.row_key).cloned().unwrap_or_default();
        if before.parked.is_some() {
            return Ok(());
        }
        let key = Some(row.row_key.as_slice());
        let mut first = None;
        for _ in 0..FOLDS {
            let (folded, shown) = self.fold(routes, row, before.row.as_deref());
            let (_, first) = first.get_or_insert((folded, shown.clone()));
            let what = "folded into the same row again, it came to something else";
            self.same(stored, key, what, first, &shown)?;
        }
        let Some((Some(folded), _)) = first else { return Ok(()) };
        let Ok(bytes) = stored_row::<V>(&folded) else { return Ok(()) }; // it would be parked
        let read = row_of::<V>(&bytes);
        let shown = format!("{folded:#?}\nstored as {bytes:02x?}");
        let again = match &read {
            Ok(read) => {
                format!("{read:#?}\nstored as {:02x?}", stored_row::<V>(read).unwrap_or_default())
            }
            Err(error) => error.to_string(),
        };
        self.same(stored, key, "the row was stored and read back, and is another", &shown, &again)?;
        let entries = |folded| format!("{:02x?}", rows.entries_of(&row.key, &row.row_key, folded));
        let first = entries(&folded);
        let others = std::iter::repeat_n(&folded, FOLDS).chain(&read);
        for other in others {
            let what = "the keys in its indexes were made again, and are others";
            self.same(stored, key, what, &first, &entries(other))?;
        }
        Ok(())
    }

    /// Folds all that the stored event stands for; the new row if there is one, and all that came of it.
    fn fold(
        &self,
        routes: &Routes<V>,
        row: &RoutedRow<V>,
        before: Option<&[u8]>,
    ) -> (Option<V::Row>, String) {
        let mut now = before.and_then(|bytes| row_of::<V>(bytes).ok());
        let mut shown = String::new();
        for event in row.events.iter().filter_map(|index| routes.events.get(*index)) {
            let outcome = fold_once(self.view, &row.key, now.clone(), event);
            match &outcome {
                Outcome::Failed(why) => shown += &format!("{FAILED}{}\n", why.replace('\n', " ")),
                outcome => shown += &format!("{outcome:#?}\n"),
            }
            match outcome {
                Outcome::Put(row) => {
                    shown += &format!("stored as {:02x?}\n", stored_row::<V>(&row));
                    now = Some(row);
                }
                Outcome::Delete => now = None,
                Outcome::Keep => {}
                Outcome::Failed(_) => return (None, shown),
            }
        }
        (now, shown)
    }

    /// The same events in chunks. With `crashes`, what was folded since some chunk's end is lost now and then, and folded
    /// again.
    fn in_chunks(&self, how: &str, mut size: impl FnMut() -> usize, crashes: u64) -> Checked {
        let mut rows = MemoryRows::new(self.view).unwrap_or_else(|error| panic!("{error}"));
        let mut rng = Rng::with_seed(crashes);
        let (mut durable, mut begin) = ((0, Kept::default()), 0);
        while begin < self.events.len() {
            let end = (begin + size().max(1)).min(self.events.len());
            let chunk = self.events.get(begin..end).unwrap_or_default();
            let keys = rows.apply(self.view, chunk, |_| true);
            self.compare(how, &keys, &rows.kept, begin..end)?;
            begin = end;
            if crashes > 0 && rng.u8(0..4) == 0 {
                durable = (begin, rows.kept.clone());
            } else if crashes > 0 && rng.u8(0..4) == 0 {
                (begin, rows.kept) = durable.clone();
            }
        }
        self.compare_end(how, &rows.kept)
    }

    /// As a rebuild does: all events of some keys, then all events of others.
    fn part_after_part(&self) -> Checked {
        let how = "one part of the keys after the other, as when a view is rebuilt";
        let mut rows = MemoryRows::new(self.view).unwrap_or_else(|error| panic!("{error}"));
        let part_of = |key: &[u8]| u64::from(crc32fast::hash(key)) % PARTS;
        for part in 0..PARTS {
            // Not decoded or skipped, they would be counted in each part.
            (rows.kept.unrouted, rows.kept.skipped_events) = (Vec::new(), 0);
            let keys = rows.apply(self.view, self.events, |key| part_of(key) == part);
            self.compare(how, &keys, &rows.kept, 0..self.events.len())?;
        }
        self.compare_end(how, &rows.kept)
    }

    /// Compares the rows of a chunk with what was there behind its last event.
    fn compare(&self, how: &str, keys: &[Vec<u8>], kept: &Kept, chunk: Range<usize>) -> Checked {
        let differing = keys.iter().filter_map(|key| {
            // A key that wasn't there the first time is a difference, too.
            let shown = |slot: Option<&Slot>| shown_slot::<V>(slot.unwrap_or(&Slot::default()));
            let came = shown(kept.slots.get(key));
            let first = shown(self.behind_event(key, chunk.end));
            (!is_same(&first, &came))
                .then(|| (self.first_that_differs(key, &chunk), key, first, came))
        });
        let Some((number, key, first, came)) = differing.min_by_key(|(number, ..)| *number) else {
            return Ok(());
        };
        let Some(stored) = self.events.get(number) else { return Ok(()) };
        let what = format!("folded {how}, it came to another row");
        self.same(stored, Some(key), &what, &first, &came)
    }

    /// What was under the key behind the event in front of `end`.
    fn behind_event(&self, key: &[u8], end: usize) -> Option<&Slot> {
        let behind = self.behind.get(key)?;
        let last = behind.partition_point(|(number, _)| *number < end).checked_sub(1)?;
        behind.get(last).map(|(_, slot)| slot)
    }

    /// The first event of the chunk with which the row differs, if it does so again; or the row's last one in it.
    fn first_that_differs(&self, key: &[u8], chunk: &Range<usize>) -> usize {
        let mut routes = Routes::<V>::new();
        for stored in self.events.get(chunk.clone()).unwrap_or_default() {
            // What can't be routed concerns no row.
            drop(routes.add(self.view, stored));
        }
        let events = routes.rows.iter().find(|row| row.row_key == key);
        let events = events.map(|row| row.events.as_slice()).unwrap_or_default();
        let Ok(key_value) = key_of::<V>(key) else { return chunk.start };
        let before = self.behind_event(key, chunk.start).and_then(|slot| slot.row.as_deref());
        let mut now = before.and_then(|row| row_of::<V>(row).ok());
        let mut last = chunk.start;
        for (place, index) in events.iter().enumerate() {
            let Some(event) = routes.events.get(*index) else { continue };
            last = self.events.partition_point(|stored| stored.position() < event.position());
            let first = self.behind_event(key, last + 1);
            match fold_once(self.view, &key_value, now.clone(), event) {
                Outcome::Put(row) => now = Some(row),
                Outcome::Delete => now = None,
                Outcome::Keep => {}
                Outcome::Failed(_) => return last,
            }
            // Several events can stand for one that was stored.
            let next = events.get(place + 1).and_then(|next| routes.events.get(*next));
            let is_whole = next.is_none_or(|next| next.position() != event.position());
            let row = now.as_ref().and_then(|row| stored_row::<V>(row).ok());
            if is_whole && first.is_none_or(|first| first.row != row) {
                return last;
            }
        }
        last
    }

    /// Compares what isn't a row.
    fn compare_end(&self, how: &str, kept: &Kept) -> Checked {
        let Some(last) = self.events.last() else { return Ok(()) };
        let shown = |kept: &Kept| {
            let unrouted: Vec<_> = kept.unrouted.iter().map(|(position, _)| *position).collect();
            let entries = kept.entries.iter().map(|entry| format!("{entry:02x?}"));
            let entries = entries.collect::<Vec<_>>();
            let is_there = |slot: &Slot| slot.row.is_some() || slot.parked.is_some();
            let keys = kept.slots.iter().filter(|(_, slot)| is_there(slot));
            let keys: BTreeSet<String> = keys.map(|(key, _)| shown_key::<V>(key)).collect();
            format!("{:#?}", (keys, entries, unrouted, kept.skipped_events, &kept.stopped))
        };
        let what =
            format!("folded {how}, keys, index entries or what is parked were others at the end");
        self.same(last, None, &what, &shown(&self.end), &shown(kept))
    }

    fn same(
        &self,
        stored: &Recorded,
        row_key: Option<&[u8]>,
        what: &str,
        first: &str,
        later: &str,
    ) -> Checked {
        if is_same(first, later) {
            return Ok(());
        }
        let key = row_key.map(shown_key::<V>);
        Err(Box::new(Impure {
            view: V::NAME,
            position: stored.position(),
            stream: stored.stream().clone(),
            event_type: stored.event_type().clone(),
            table: None,
            key,
            what: what.to_owned(),
            difference: lines(first, later),
        }))
    }
}

/// In front of the reason why a fold has failed.
const FAILED: &str = "failed: ";

/// Whether two texts say the same: what stands for a set or a map may show its entries in any order, line by line, and the
/// reason for a failure may be of the moment. The stored bytes are a line of their own.
fn is_same(first: &str, later: &str) -> bool {
    let sorted = |text: &str| {
        let what = |line: &str| match line.starts_with(FAILED) {
            true => FAILED.to_owned(),
            false => line.trim_end_matches(',').to_owned(),
        };
        let mut lines: Vec<String> = text.lines().map(what).collect();
        lines.sort_unstable();
        lines
    };
    first == later || sorted(first) == sorted(later)
}

fn shown_key<V: View>(row_key: &[u8]) -> String
where
    V::Key: Debug,
{
    match key_of::<V>(row_key) {
        Ok(key) => format!("{key:?}"),
        Err(_) => format!("{row_key:02x?}"),
    }
}

/// What there is under a key, but for why something is parked.
fn shown_slot<V: View>(slot: &Slot) -> String
where
    V::Row: Debug,
{
    let row = slot.row.as_deref().map(row_of::<V>);
    let parked = slot.parked.as_ref().map(|parked| (parked.first, parked.events));
    format!("{row:#?}\nstored as {:02x?}\nparked: {parked:?}", slot.row)
}
