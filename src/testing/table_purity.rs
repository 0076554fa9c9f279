//! Whether a view of tables is a pure fold.
//!
//! ```text
//!  event after event: apply to the same tables        ── several times each: does it write the same?
//!                     each row it writes ▶ bytes ▶ row ▶ bytes   ── the same?
//!                              │ what each event has written
//!                              ▼
//!  again from the beginning, in chunks of other sizes, some applied twice after a crash: does each write the same?
//! ```
//! As in the check of keyed views, only what the real view does is tried. Events are applied in the order of the journal, whoever
//! applies them, so there is no other order to try. What an event writes says it all: where each writes the same onto the
//! same, all tables are the same.

use std::collections::BTreeSet;
use std::thread;
use std::time::Instant;

use fastrand::Rng;

use super::diff::lines;
use super::history::History;
use super::purity::{CLOCK_MOVES, Checked, FOLDS, Impure, RANDOM_RUNS};
use crate::event::Recorded;
use crate::view::TableView;
use crate::view::memory_tables::{Fate, MemoryTables, Written, understand};

/// Asserts that a view of tables is a pure fold, as far as `history` shows: that each event writes the same however often, and in
/// however large steps, events are applied. That is what rebuilds, repetition after a crash, and comparison by digest rest
/// on. The same as [`assert_pure`](super::assert_pure), which says what is found and what isn't, for a [`TableView`].
///
/// It names the first event that differs, with table and row.
///
/// ```should_panic
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use headwater::testing::{self, History};
/// use headwater::view::{FoldError, Table, TableView, Tables, ViewTxn};
/// use headwater::Recorded;
///
/// /// Events, numbered.
/// #[derive(Default)]
/// struct Numbered { last: AtomicU64 }
///
/// const NUMBERED: Table<u64, Vec<u8>> = Table::new("numbered");
///
/// impl TableView for Numbered {
///     const NAME: &'static str = "numbered";
///     const VERSION: u32 = 1;
///     type Event = Vec<u8>;
///
///     fn tables(&self) -> Tables { Tables::of(NUMBERED) }
///
///     fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
///         let number = self.last.fetch_add(1, Ordering::Relaxed); // it belongs into a table
///         tx.put(NUMBERED, &number, event.data())?;
///         Ok(())
///     }
/// }
///
/// testing::assert_pure_tables(&Numbered::default(), &History::new().with("sensor-1", [b"21.5".to_vec()]));
/// ```
///
/// # Panics
/// If it isn't, or the view can't be opened as it is.
#[track_caller]
pub fn assert_pure_tables<T: TableView>(view: &T, history: &History) {
    if let Err(impure) = check_purity_of_tables(view, history) {
        panic!("{impure}");
    }
}

/// The same as [`assert_pure_tables`], as a result.
///
/// ```
/// # use headwater::testing::{History, check_purity_of_tables};
/// # use headwater::view::{FoldError, Table, TableView, Tables, ViewTxn};
/// # const COUNT: Table<(), u64> = Table::new("count");
/// # struct Counted;
/// # impl TableView for Counted {
/// #     const NAME: &'static str = "counted";
/// #     const VERSION: u32 = 1;
/// #     type Event = Vec<u8>;
/// #     fn tables(&self) -> Tables { Tables::of(COUNT) }
/// #     fn apply(&self, _: &headwater::Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
/// #         let count = tx.get(COUNT, &())?.unwrap_or(0);
/// #         Ok(tx.put(COUNT, &(), &(count + 1))?)
/// #     }
/// # }
/// let history = History::new().with("sensor-1", [b"21.5".to_vec(), b"22.0".to_vec()]);
/// check_purity_of_tables(&Counted, &history)?; // `Counted` has one table, with one row
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Impure`], the first difference.
///
/// # Panics
/// If the view can't be opened as it is: its name or a table's isn't valid.
#[track_caller]
pub fn check_purity_of_tables<T: TableView>(
    view: &T,
    history: &History,
) -> Result<(), Box<Impure>> {
    let tables = || MemoryTables::new(view).unwrap_or_else(|error| panic!("{error}"));
    let mut check = Check { view, events: history.events(), first: Vec::new() };
    let began = Instant::now();
    check.event_after_event(tables())?;
    thread::sleep(CLOCK_MOVES.saturating_sub(began.elapsed()));
    let all = check.events.len();
    for size in [all, 2, 3, 7] {
        let how = format!("in chunks of {size} events");
        check.in_chunks(&how, tables(), || size, None)?;
    }
    for seed in 0..RANDOM_RUNS {
        let mut rng = Rng::with_seed(seed);
        let how = "in chunks of random sizes";
        check.in_chunks(how, tables(), || rng.usize(1..=all.max(1)), None)?;
        let mut rng = Rng::with_seed(seed);
        let crashes = Rng::with_seed(seed + 1);
        let how = "with crashes, after each of which some were applied again";
        check.in_chunks(how, tables(), || rng.usize(1..=5), Some(crashes))?;
    }
    Ok(())
}

struct Check<'a, T: TableView> {
    view: &'a T,
    events: &'a [Recorded],
    /// What became of each event.
    first: Vec<Fate>,
}

impl<T: TableView> Check<'_, T> {
    fn event_after_event(&mut self, mut tables: MemoryTables) -> Checked {
        for stored in self.events {
            let event = understand::<T>(stored);
            let first = tables.fate(self.view, &event);
            for _ in 1..FOLDS {
                let again = tables.fate(self.view, &understand::<T>(stored));
                let what = "applied to the same tables again, it came to something else";
                same::<T>(stored, &tables, what, &first, &again)?;
            }
            round_trips::<T>(stored, &tables, &first)?;
            self.first.push(first.clone());
            tables.keep(stored.position(), first);
        }
        Ok(())
    }

    /// The same events in chunks: a chunk is decoded, then applied. With `crashes`, what was applied since some chunk's end is
    /// lost now and then, and applied again.
    fn in_chunks(
        &self,
        how: &str,
        mut tables: MemoryTables,
        mut size: impl FnMut() -> usize,
        mut crashes: Option<Rng>,
    ) -> Checked {
        let what = format!("applied {how}, it came to something else");
        let (mut begin, mut durable) = (0, (0, tables.kept.clone()));
        while begin < self.events.len() {
            let end = begin.saturating_add(size().max(1)).min(self.events.len());
            let chunk = self.events.get(begin..end).unwrap_or_default();
            let understood: Vec<_> = chunk.iter().map(understand::<T>).collect();
            let first = self.first.get(begin..end).unwrap_or_default();
            for ((stored, event), first) in chunk.iter().zip(&understood).zip(first) {
                let fate = tables.fate(self.view, event);
                same::<T>(stored, &tables, &what, first, &fate)?;
                tables.keep(stored.position(), fate);
            }
            begin = end;
            match crashes.as_mut().map(|rng| rng.u8(0..4)) {
                Some(0) => durable = (begin, tables.kept.clone()),
                Some(1) => (begin, tables.kept) = durable.clone(),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether what the event has written can be read back as what it is.
fn round_trips<T: TableView>(stored: &Recorded, tables: &MemoryTables, fate: &Fate) -> Checked {
    let Fate::Applied(written) = fate else { return Ok(()) };
    for (key, row) in written {
        let Some(row) = row else { continue };
        let later = match tables.again(key, row) {
            Ok((key_again, row_again)) if key_again == *key && row_again == *row => continue,
            Ok((key_again, row_again)) => {
                format!("stored under {key_again:02x?} as {row_again:02x?}")
            }
            Err(error) => error,
        };
        let first = format!("stored under {key:02x?} as {row:02x?}");
        let what = "the row was stored and read back, and is another";
        return Err(impure::<T>(stored, tables, Some(key), what, lines(&first, &later)));
    }
    Ok(())
}

/// Compares what has become of an event with what became of it first. `tables` are as it found them.
fn same<T: TableView>(
    stored: &Recorded,
    tables: &MemoryTables,
    what: &str,
    first: &Fate,
    later: &Fate,
) -> Checked {
    let difference = match (first, later) {
        (Fate::Applied(first), Fate::Applied(later)) => {
            let keys: BTreeSet<&Vec<u8>> = first.keys().chain(later.keys()).collect();
            let Some(key) = keys.into_iter().find(|key| first.get(*key) != later.get(*key)) else {
                return Ok(());
            };
            let shown = |written: &Written| {
                let row = written.get(key).map(Option::as_deref);
                tables.shown_row(key, row.unwrap_or_else(|| tables.stored(key)))
            };
            let difference = lines(&shown(first), &shown(later));
            return Err(impure::<T>(stored, tables, Some(key), what, difference));
        }
        // The reason may be of the moment.
        (Fate::Skipped, Fate::Skipped)
        | (Fate::Parked(_), Fate::Parked(_))
        | (Fate::Stops(_), Fate::Stops(_)) => return Ok(()),
        (first, later) => lines(&shown_fate(first), &shown_fate(later)),
    };
    Err(impure::<T>(stored, tables, None, what, difference))
}

fn shown_fate(fate: &Fate) -> String {
    match fate {
        Fate::Applied(_) => "applied".to_owned(),
        Fate::Skipped => "skipped".to_owned(),
        Fate::Parked(reason) => format!("failed: {reason}"),
        Fate::Stops(reason) => format!("stops the view: {reason}"),
    }
}

fn impure<T: TableView>(
    stored: &Recorded,
    tables: &MemoryTables,
    key: Option<&[u8]>,
    what: &str,
    difference: String,
) -> Box<Impure> {
    let (table, key) = match key.map(|key| tables.shown_key(key)) {
        Some((table, key)) => (table, Some(key)),
        None => (None, None),
    };
    Box::new(Impure {
        view: T::NAME,
        position: stored.position(),
        stream: stored.stream().clone(),
        event_type: stored.event_type().clone(),
        table,
        key,
        what: what.to_owned(),
        difference,
    })
}
