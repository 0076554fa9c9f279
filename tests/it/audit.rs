//! The completeness audit: every event of a view's types is accounted for, and one that isn't is noticed.
//!
//! What it says is compared with a recount that knows nothing of views. Bugs are planted in processes of their own.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::planted::{Bug, plant_everywhere};
use headwater::retention::{History, Options, Until};
use headwater::view::{
    Audit, Fold, FoldError, Keys, RebuildOptions, SegmentAudit, Table, TableView, Tables, View,
    ViewControl, ViewOptions, ViewState, ViewTxn,
};
use headwater::{
    Append, ExpectedRevision, JournalOptions, NewEvent, Position, Recorded, Store, StreamId,
};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Added {
    key: u8,
    is_poison: bool,
    filling: Vec<u8>,
}

headwater::events! {
    /// What is added.
    enum SumEvent {
        Added(Added) = "sum.added", version 1;
    }
}

/// Events of a key, and of all keys below 100; nothing of those above.
struct Sums;

fn keys_of(added: &Added) -> Vec<u8> {
    if added.key < 100 { vec![added.key, 255] } else { Vec::new() }
}

impl View for Sums {
    const NAME: &'static str = "sums";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = u64;
    type Event = SumEvent;

    fn route(&self, event: &Recorded<SumEvent>, keys: &mut Keys<u8>) {
        let SumEvent::Added(added) = event.data();
        keys.extend(keys_of(added));
    }

    fn fold(
        &self,
        key: &u8,
        row: Option<u64>,
        event: &Recorded<SumEvent>,
    ) -> Result<Fold<u64>, FoldError> {
        let SumEvent::Added(added) = event.data();
        if added.is_poison && *key != 255 {
            return Err("no such sum".into());
        }
        Ok(Fold::Put(row.unwrap_or(0) + 1))
    }
}

/// The same in a table.
struct Counts;

const COUNTS: Table<u8, u64> = Table::new("counts");

impl TableView for Counts {
    const NAME: &'static str = "counts";
    const VERSION: u32 = 1;
    type Event = SumEvent;

    fn tables(&self) -> Tables {
        Tables::of(COUNTS)
    }

    fn apply(&self, event: &Recorded<SumEvent>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let SumEvent::Added(added) = event.data();
        if added.is_poison {
            return Err("no such sum".into());
        }
        let count = tx.get(COUNTS, &added.key)?.unwrap_or(0);
        tx.put(COUNTS, &added.key, &(count + 1))?;
        Ok(())
    }
}

fn open(dir: &Path) -> Store {
    let options = JournalOptions {
        segment_bytes_first: 32 << 10,
        segment_bytes_max: 32 << 10,
        batch_bytes_max: 8 << 10,
        group_bytes_max: 8 << 10,
        ..JournalOptions::default()
    };
    Store::builder(dir).create_if_missing().journal_options(options).open().unwrap()
}

fn append(store: &Store, rng: &mut Rng, batches: usize, poison: bool) {
    for _ in 0..batches {
        let event = |rng: &mut Rng| match rng.u8(..40) {
            0 if poison => NewEvent::json("sum.added", &"not a sum").unwrap(),
            1..4 => NewEvent::raw("other.type", *b"?").unwrap(),
            n => {
                let (key, is_poison) = (rng.u8(..120), poison && n == 4);
                let filling = vec![7; rng.usize(..600)];
                NewEvent::typed(&SumEvent::from(Added { key, is_poison, filling })).unwrap()
            }
        };
        let events: Vec<NewEvent> = (0..rng.usize(1..9)).map(|_| event(rng)).collect();
        let stream = StreamId::new("sums").unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap();
    }
}

fn small() -> ViewOptions {
    ViewOptions { chunk_bytes: 4096, ..ViewOptions::default() }
}

fn catch_up(view: &ViewControl) {
    let deadline = Instant::now() + PATIENCE;
    while !matches!(view.status().state, ViewState::CaughtUp) {
        assert!(Instant::now() < deadline, "never caught up: {:?}", view.status());
        std::thread::yield_now();
    }
}

/// Events of the view's types and others, by segment.
fn recount(store: &Store) -> Vec<(u64, u64, u64)> {
    let mut counts = BTreeMap::new();
    let segments = store.journal().segments();
    let of = |position: Position| segments.iter().find(|it| position < it.end_position).unwrap();
    let first = segments.first().unwrap().base_position;
    for event in store.journal().read_all(first).unwrap().map(Result::unwrap) {
        let (matching, other) = counts.entry(of(event.position()).number).or_insert((0, 0));
        match event.event_type().as_str() {
            "sum.added" => *matching += 1,
            _ => *other += 1,
        }
    }
    counts.into_iter().map(|(segment, (matching, other))| (segment, matching, other)).collect()
}

fn complete(store: &Store, view: &ViewControl) -> Audit {
    catch_up(view);
    let audit = view.audit().unwrap();
    assert!(audit.is_complete(), "{audit}");
    assert_eq!(audit.segments.last().unwrap().events.end, store.journal().end().position);
    let counts = |it: &SegmentAudit| (it.segment, it.matching, it.other);
    assert_eq!(audit.segments.iter().map(counts).collect::<Vec<_>>(), recount(store));
    audit
}

/// Applied, parked, discarded, in all.
fn sums(audit: &Audit) -> (u64, u64, u64) {
    audit.segments.iter().fold((0, 0, 0), |(applied, parked, discarded), it| {
        (applied + it.applied, parked + it.parked, discarded + it.discarded)
    })
}

#[test]
fn every_event_is_counted_once_whatever_becomes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut rng) = (open(dir.path()), Rng::with_seed(7));
    let mut view = store.view_with(Sums, small()).unwrap();
    for _ in 0..4 {
        append(&store, &mut rng, 60, true);
        complete(&store, &view);
        drop(view);
        append(&store, &mut rng, 20, true);
        view = store.view_with(Sums, small()).unwrap();
    }
    let before = complete(&store, &view);
    assert!(before.segments.len() > 3 && before.first_difference().is_none());
    let (applied, parked, discarded) = sums(&before);
    assert!(applied > 0 && parked > 0 && discarded == 0);
    // Decisions move events from one sum into another one.
    let unrouted: Vec<_> = view.unrouted_events().map(|it| it.unwrap().position).collect();
    unrouted.iter().for_each(|position| view.discard_unrouted(*position).unwrap());
    let after = sums(&complete(&store, &view));
    let gone = unrouted.len() as u64;
    assert_eq!(after, (applied, parked - gone, gone));
    while let Some(parked) = view.parked().next().map(Result::unwrap) {
        view.discard(&parked.key, parked.first).unwrap();
    }
    // For one row only: in the others they are.
    assert_eq!(sums(&complete(&store, &view)), (applied + parked - gone, 0, gone));
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    assert_eq!(sums(&complete(&store, &view)), (applied + parked - gone, 0, gone));
    append(&store, &mut rng, 10, false);
    complete(&store, &view);
    // What is removed from the front is asked for no more.
    view.close().unwrap();
    drop(view);
    let target = store.journal().segments()[2].end_position;
    let options = Options::new(Until::Position(target)).history(History::Forget(target));
    assert_eq!(store.retain(&options).unwrap().target, target);
    complete(&store, &store.view_with(Sums, small()).unwrap());
}

#[test]
fn a_view_of_tables_and_builds_in_bulk_are_counted_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut rng) = (open(dir.path()), Rng::with_seed(8));
    append(&store, &mut rng, 1000, false);
    assert!(store.journal().end().offset > 1 << 20);
    let view = store.view_with(Sums, small()).unwrap();
    complete(&store, &view);
    append(&store, &mut rng, 40, false);
    complete(&store, &view);
    let little = RebuildOptions { memory_bytes_max: 1, ..RebuildOptions::default() };
    view.rebuild(little).unwrap().wait().unwrap();
    complete(&store, &view);
    append(&store, &mut rng, 40, true);
    let tables = store.table_view_with(Counts, small()).unwrap();
    let (_, parked, _) = sums(&complete(&store, &tables));
    assert!(parked > 0);
    append(&store, &mut rng, 40, true);
    complete(&store, &tables);
}

const DIR: &str = "HEADWATER_AUDIT_DIR";
const BUG: &str = "HEADWATER_AUDIT_BUG";

/// Not a test of its own: what the next one starts.
#[test]
fn audits_in_a_process_with_a_bug() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    plant_everywhere(match std::env::var(BUG).unwrap().as_str() {
        "skip" => Bug::SkipEvent,
        "drop" => Bug::DropChunk,
        _ => return,
    });
    let store = open(Path::new(&dir));
    let view = store.view_with(Sums, small()).unwrap();
    catch_up(&view);
    println!("\nsaid {}", view.audit().unwrap());
}

#[test]
fn an_event_that_is_passed_over_and_a_chunk_that_is_lost_are_noticed() {
    // Few enough to be followed, and enough to be built in bulk.
    for (bug, batches) in [("skip", 60), ("drop", 60), ("skip", 1000)] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        append(&store, &mut Rng::with_seed(9), batches, false);
        store.close().unwrap();
        drop(store);
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "audit::audits_in_a_process_with_a_bug", "--nocapture"])
            .env(DIR, dir.path())
            .env(BUG, bug)
            .output()
            .unwrap();
        let said = String::from_utf8(child.stdout).unwrap();
        let said = said.lines().find_map(|line| line.strip_prefix("said ")).expect(&said);
        assert!(said.contains("events are not accounted for"), "{bug} {batches}: {said}");
    }
}
