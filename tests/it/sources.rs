//! Views of several journals: each journal's events once, in its order, whatever is parked, rebuilt or reopened between.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::view::{
    Change, Degraded, Fold, FoldError, Keys, RebuildOptions, Table, TableView, Tables, View,
    ViewError, ViewHandle, ViewOptions, ViewReadError, ViewState, ViewTxn,
};
use headwater::{
    Append, ExpectedRevision, Journal, JournalId, Locator, NewEvent, Position, Recorded, Store,
    StreamId, Token,
};
use parking_lot::Mutex;

use crate::inline::Over;
use crate::views::{copy_dir, replace_dir, until};

const PATIENCE: Duration = Duration::from_secs(60);

/// By journal: how many events, and a hash of their positions in their order.
type Row = BTreeMap<[u8; 16], (u64, u64)>;

/// What has reached each key, told apart by journal, so that order between journals makes no difference.
#[derive(Clone, Debug, Default)]
struct Traces {
    is_mended: Arc<AtomicBool>,
    /// For the events of one journal.
    mended_for: Arc<Mutex<Option<JournalId>>>,
    /// The journals of the events, as they have come.
    routed: Arc<Mutex<Vec<JournalId>>>,
}

/// An event says which keys it concerns, and at which of them it fails unless that is mended.
const FAILS: u8 = 0x80;
const NOWHERE: u8 = 0xff;

fn step(row: Option<Row>, journal: JournalId, position: Position) -> Row {
    let mut row = row.unwrap_or_default();
    let (count, hash) = row.entry(*journal.as_bytes()).or_default();
    *count += 1;
    *hash = hash.wrapping_mul(0x0100_0000_01b3) ^ (position.get() + 1);
    row
}

impl View for Traces {
    const NAME: &'static str = "traces";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = Row;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        self.routed.lock().push(event.locator().journal);
        assert!(!event.data().contains(&NOWHERE), "asked to be lost");
        keys.extend(event.data().iter().map(|key| key & !FAILS));
    }

    fn fold(
        &self,
        key: &u8,
        row: Option<Row>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<Row>, FoldError> {
        let Locator { journal, position } = event.locator();
        let is_mended =
            || self.is_mended.load(Ordering::Relaxed) || *self.mended_for.lock() == Some(journal);
        if event.data().contains(&(key | FAILS)) && !is_mended() {
            return Err("asked to fail".into());
        }
        Ok(Fold::Put(step(row, journal, position)))
    }
}

struct World {
    stores: Vec<Store>,
    tokens: Vec<Option<Token>>,
    rng: Rng,
    view: Traces,
}

impl World {
    fn new(dir: &Path, seed: u64, journals: usize) -> Self {
        println!("seed {seed}");
        let store = |n| Store::create(dir.join(format!("store-{n}"))).unwrap();
        let stores: Vec<Store> = (0..journals).map(store).collect();
        let tokens = vec![None; journals];
        let rng = Rng::with_seed(seed);
        Self { stores, tokens, rng, view: Traces::default() }
    }

    fn journals(&self) -> Vec<Journal> {
        self.stores.iter().map(|store| store.journal().clone()).collect()
    }

    fn open(&self, chunk_bytes: u64) -> ViewHandle<Traces> {
        // A few rows are remembered with small chunks, or none.
        let row_cache_bytes = if chunk_bytes < 1 << 20 { chunk_bytes } else { 32 << 20 };
        let options = ViewOptions { chunk_bytes, row_cache_bytes, ..ViewOptions::default() };
        self.stores[0].view_over(&self.journals(), self.view.clone(), options).unwrap()
    }

    /// Does something to a store's files while it is closed.
    fn reopen(&mut self, store: usize, meanwhile: impl FnOnce()) {
        let dir = self.stores[store].journal().dir().parent().unwrap().to_owned();
        let closed = self.stores.remove(store);
        closed.close().unwrap();
        drop(closed);
        meanwhile();
        self.stores.insert(store, Store::open(dir).unwrap());
    }

    fn append(&mut self, journal: usize, events: Vec<Vec<u8>>) -> Token {
        let stream = StreamId::new("traces").unwrap();
        let events = events.into_iter().map(|data| NewEvent::raw("trace", data).unwrap());
        let append = Append::to(&stream, ExpectedRevision::Any, events);
        let token = self.stores[journal].append(&append).unwrap().token();
        self.tokens[journal] = Some(token);
        token
    }

    fn append_some(&mut self, batches: usize, failing_percent: u8) {
        for _ in 0..batches {
            let count = self.rng.usize(1..4);
            let event = |rng: &mut Rng| {
                let keys = rng.usize(0..3);
                let flag = |rng: &mut Rng| if rng.u8(..100) < failing_percent { FAILS } else { 0 };
                (0..keys).map(|_| rng.u8(..6) | flag(rng)).collect()
            };
            let events = (0..count).map(|_| event(&mut self.rng)).collect();
            let journal = self.rng.usize(..self.stores.len());
            self.append(journal, events);
        }
    }

    fn wait(&self, view: &ViewHandle<Traces>) {
        self.tokens.iter().flatten().for_each(|token| view.wait_for(token, PATIENCE).unwrap());
    }

    /// What the rows come to if nothing is parked.
    fn recount(&self) -> BTreeMap<u8, Row> {
        let mut rows = BTreeMap::new();
        for journal in self.journals() {
            for event in journal.read_all(Position::START).unwrap().map(Result::unwrap) {
                let Locator { journal, position } = event.locator();
                let mut keys: Vec<u8> = event.data().iter().map(|key| key & !FAILS).collect();
                keys.sort_unstable();
                keys.dedup();
                for key in keys {
                    let row = step(rows.remove(&key), journal, position);
                    rows.insert(key, row);
                }
            }
        }
        rows
    }

    fn assert_shows(&self, view: &ViewHandle<Traces>) {
        self.wait(view);
        let rows: BTreeMap<u8, Row> = view.range(..).map(Result::unwrap).collect();
        assert_eq!(rows, self.recount());
    }
}

#[test]
fn rows_are_what_all_journals_make_after_any_reopening_and_rebuild() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let journals = 2 + seed as usize % 2;
        let mut world = World::new(dir.path(), seed, journals);
        let ahead = [0, 20, 4000][world.rng.usize(..3)];
        world.append_some(ahead, 0); // many are built in bulk
        for _ in 0..3 {
            let chunk_bytes = [1, 700, 1 << 20][world.rng.usize(..3)];
            let view = world.open(chunk_bytes);
            world.assert_shows(&view);
            world.append_some(30, 0);
            world.assert_shows(&view);
            let status = view.status();
            assert_eq!((status.journals.len(), status.lag_events), (journals, Some(0)));
            assert!(status.journals.iter().all(|it| it.checkpoint.applied == it.end));
            let compared = view.check(RebuildOptions::default()).unwrap();
            assert!(compared.is_equal(), "{compared:?}");
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
            world.append_some(5, 0);
            world.assert_shows(&view);
            if world.rng.bool() {
                view.rollback().unwrap().wait().unwrap();
                world.assert_shows(&view);
            }
            let snapshot = view.snapshot_latest(PATIENCE).unwrap();
            let ends = world.journals().iter().map(Journal::end).collect::<Vec<_>>();
            assert_eq!(snapshot.checkpoints(), ends);
            view.close().unwrap();
        }
    }
}

/// What one journal has had since doesn't make up for what another one had already.
#[test]
fn rows_are_being_made_until_they_are_of_what_each_journal_had() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 12, 2);
    let had: [u64; 2] = [2, 6];
    for (journal, had) in had.into_iter().enumerate() {
        for _ in 0..had {
            world.append(journal, vec![vec![journal as u8]]);
        }
    }
    let building = RebuildOptions { bytes_per_second_max: Some(1), ..RebuildOptions::default() };
    let slow = ViewOptions { building, chunk_bytes: 1, ..ViewOptions::default() };
    // Each opening takes in one batch, of one journal after the other.
    for opening in 1..12 {
        let view = world.stores[0].view_over(&world.journals(), world.view.clone(), slow.clone());
        let view = view.unwrap();
        if opening == 1 {
            for _ in 0..9 {
                world.append(0, vec![vec![0]]);
            }
        }
        let applied =
            || view.snapshot().unwrap().checkpoints().into_iter().map(|it| it.position.get());
        until("a batch is applied", || applied().sum::<u64>() >= opening);
        let left: u64 = applied().zip(had).map(|(applied, had)| had.saturating_sub(applied)).sum();
        let [now, then] = [opening, opening + left].map(Position::new);
        let expected = Degraded::Building { applied: now, until: Some(then) };
        assert_eq!(view.get_checked(&1).unwrap().degraded, Some(expected), "opening {opening}");
        let rebuild = view.status().rebuild.unwrap();
        assert!(rebuild.events < rebuild.events_total, "opening {opening}: {rebuild}");
        view.close().unwrap();
    }
    let view = world.open(1 << 20);
    world.assert_shows(&view);
    assert_eq!(view.get_checked(&1).unwrap().degraded, None);
}

/// Positions say nothing between journals: what is parked of several must not be taken for one another.
#[test]
fn events_of_all_journals_are_parked_and_retried_in_the_order_of_their_intake() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed, 3);
        let chunk_bytes = [1, 300, 1 << 20][world.rng.usize(..3)];
        let view = world.open(chunk_bytes);
        for _ in 0..4 {
            world.append_some(20, 15);
            world.wait(&view);
            let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
            for key in &parked {
                let events: Vec<_> = view.parked_events(&key.key).map(Result::unwrap).collect();
                assert_eq!(events.len() as u64, key.events);
                assert_eq!((events[0].journal, events[0].position), (key.journal, key.first));
                let mut last = BTreeMap::new();
                for event in &events {
                    let before = last.insert(event.journal, event.position);
                    assert!(before < Some(event.position), "each journal's in its order");
                }
            }
            let counted: u64 = parked.iter().map(|key| key.events).sum();
            assert_eq!(view.status().parked.events, counted);
        }
        world.view.is_mended.store(true, Ordering::Relaxed);
        let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
        assert!(!parked.is_empty(), "some are");
        for key in parked {
            let retried = view.retry(&key.key).unwrap();
            assert_eq!((retried.applied, retried.left), (key.events, 0));
        }
        world.assert_shows(&view);
        // What comes next is folded into the rows that the retries have made.
        world.append_some(20, 0);
        world.assert_shows(&view);
        let compared = view.check(RebuildOptions::default()).unwrap();
        assert!(compared.is_equal(), "{compared:?}");
    }
}

#[test]
fn an_event_is_discarded_in_its_own_journal_and_reads_know_what_they_lack() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 9, 2);
    let view = world.open(1);
    // The same position in both journals.
    let good = world.append(0, vec![vec![1]]);
    view.wait_for(&good, PATIENCE).unwrap();
    let bad = world.append(1, vec![vec![1 | FAILS]]);
    view.wait_for(&bad, PATIENCE).unwrap();
    let behind = world.append(0, vec![vec![1]]);
    view.wait_for(&behind, PATIENCE).unwrap();

    view.get_at_least(&1, &good, PATIENCE).unwrap();
    for token in [&bad, &behind] {
        let lacking = view.get_at_least(&1, token, PATIENCE).unwrap_err();
        assert!(matches!(lacking, ViewReadError::Degraded { .. }), "{lacking}");
    }
    let at = |journal: usize, position| Locator {
        journal: world.stores[journal].journal().id(),
        position: Position::new(position),
    };
    assert_eq!(view.discard(&1, Position::new(0)).unwrap_err().code(), "parked.not_parked");
    let retried = view.discard_at(&1, at(1, 0)).unwrap();
    assert_eq!((retried.applied, retried.left), (2, 0), "the discarded one counts as done");
    let row = view.get_at_least(&1, &behind, PATIENCE).unwrap().unwrap();
    assert_eq!(row.len(), 1, "of the first journal only");
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
}

/// Neighbours in the queue at the same position of different journals were taken for what one stored event stands for: the
/// one that could be folded waited for the other, and was named as the one that fails.
#[test]
fn an_event_that_can_be_folded_does_not_wait_for_one_at_the_same_position_of_another_journal() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 13, 2);
    let view = world.open(1);
    let bad = vec![1 | FAILS];
    let first = world.append(0, vec![bad.clone()]);
    view.wait_for(&first, PATIENCE).unwrap();
    let second = world.append(1, vec![bad]);
    view.wait_for(&second, PATIENCE).unwrap();
    *world.view.mended_for.lock() = Some(first.journal);
    let retried = view.retry(&1).unwrap();
    assert_eq!((retried.applied, retried.left), (1, 1));
    let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
    assert_eq!((parked[0].journal, parked[0].events), (second.journal, 1));
}

/// The same keys in two tables: what one has is nothing of the other's.
struct Tabled;

const COUNTS: Table<u8, u64> = Table::new("counts");
const POSITIONS: Table<u8, u64> = Table::new("positions");

impl TableView for Tabled {
    const NAME: &'static str = "tabled";
    const VERSION: u32 = 1;
    type Event = Vec<u8>;

    fn tables(&self) -> Tables {
        Tables::of(COUNTS).with(POSITIONS)
    }

    fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        for key in event.data() {
            for (table, more) in [(COUNTS, 1), (POSITIONS, event.position().get())] {
                let sum = tx.get(table, key)?.unwrap_or(0) + more;
                tx.put(table, key, &sum)?;
            }
        }
        Ok(())
    }
}

#[test]
fn tables_are_what_all_journals_make() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 18, 2);
    let options = ViewOptions { chunk_bytes: 300, ..ViewOptions::default() };
    let view = world.stores[0].table_view_over(&world.journals(), Tabled, options).unwrap();
    for _ in 0..3 {
        world.append_some(20, 0);
        world.tokens.iter().flatten().for_each(|token| view.wait_for(token, PATIENCE).unwrap());
        let mut expected: BTreeMap<u8, (u64, u64)> = BTreeMap::new();
        for journal in world.journals() {
            for event in journal.read_all(Position::START).unwrap().map(Result::unwrap) {
                for key in event.data() {
                    let row = expected.entry(*key).or_default();
                    *row = (row.0 + 1, row.1 + event.position().get());
                }
            }
        }
        let counts = view.table(COUNTS).unwrap();
        let found = counts.range(..).map(Result::unwrap).map(|(key, count)| {
            (key, (count, view.table(POSITIONS).unwrap().get(&key).unwrap().unwrap()))
        });
        assert_eq!(found.collect::<BTreeMap<_, _>>(), expected);
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
        view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    }
}

#[test]
fn an_unrouted_event_of_one_journal_degrades_behind_itself_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 10, 2);
    let view = world.open(1);
    let good = world.append(0, vec![vec![1], vec![2]]);
    let lost = world.append(1, vec![vec![NOWHERE]]);
    view.wait_for(&lost, PATIENCE).unwrap();
    view.get_at_least(&1, &good, PATIENCE).unwrap();
    view.get_at_least(&1, &lost, PATIENCE).unwrap_err();
    let parked: Vec<_> = view.unrouted_events().map(Result::unwrap).collect();
    let at = Locator { journal: parked[0].journal, position: parked[0].position };
    assert_eq!(at, Locator { journal: world.stores[1].journal().id(), position: Position::START });
    view.discard_unrouted_at(at).unwrap();
    view.get_at_least(&1, &lost, PATIENCE).unwrap();
}

#[test]
fn another_set_of_journals_makes_another_generation_and_wrong_sets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 11, 3);
    world.append_some(30, 0);
    let view = world.open(1 << 20);
    world.assert_shows(&view);
    drop(view);
    let mut journals = world.journals();
    let open = |journals: &[Journal]| {
        world.stores[0].view_over(journals, Traces::default(), ViewOptions::default())
    };
    journals.reverse();
    let view = open(&journals).unwrap();
    assert!(view.status().set_aside.is_none(), "the order doesn't matter");
    world.assert_shows(&view);
    drop(view);
    journals.pop();
    let view = open(&journals).unwrap();
    assert!(view.status().set_aside.is_some());
    drop(view);
    journals.push(journals[0].clone());
    for wrong in [&journals[..], &[]] {
        let refused = open(wrong).map(drop).unwrap_err();
        assert!(matches!(refused, ViewError::Journals { .. }), "{refused}");
    }
}

/// Nobody polls: whichever journal has something wakes the view.
#[test]
fn every_journal_wakes_the_view() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 12, 3);
    let view = world.open(1 << 20);
    let mut changes = view.watch();
    let mut waits = [const { Vec::new() }; 3];
    for round in 0..300 {
        let token = world.append(round % 3, vec![vec![1]]);
        let since = Instant::now();
        view.wait_for(&token, PATIENCE).unwrap();
        waits[round % 3].push(since.elapsed());
        let change = changes.next_within(PATIENCE).unwrap();
        let Some(Change::Rows { checkpoint, .. }) = change else { panic!("{change:?}") };
        assert_eq!((checkpoint.journal, checkpoint.position), (token.journal, token.position));
    }
    world.assert_shows(&view);
    // Who polls needs nearly 50 ms for most of them, whatever else the machine is doing.
    for mut waits in waits {
        let (_, median, _) = waits.select_nth_unstable(50);
        assert!(*median < Duration::from_millis(25), "{median:?}");
    }
}

/// Of all of them, at once, and whatever takes over.
#[test]
fn the_latest_is_that_of_all_journals_and_nobody_sees_the_view_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 17, 3);
    let view = world.open(1 << 20);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = vec![Position::START; 3];
            while !is_over.load(Ordering::Relaxed) {
                let now = view.snapshot().unwrap().checkpoints();
                let now: Vec<Position> = now.iter().map(|it| it.position).collect();
                assert!(seen.iter().zip(&now).all(|(seen, now)| seen <= now), "{seen:?} {now:?}");
                seen = now;
            }
        });
        scope.spawn(|| {
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) {
                let journal = count as usize % 3;
                let token = world.append(journal, vec![vec![1]]);
                count += 1;
                let row = view.get_latest(&1, PATIENCE).unwrap().unwrap();
                assert_eq!(row.values().map(|it| it.0).sum::<u64>(), count, "{token:?}");
            }
        });
        let _over = Over(&is_over);
        for _ in 0..10 {
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        }
    });
}

/// One that has much to be folded doesn't keep the view from the others.
#[test]
fn the_journals_have_their_turns() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 14, 3);
    (0..100).for_each(|_| {
        world.append(0, vec![vec![1]]);
    });
    let quiet = [1, 2].map(|journal| world.append(journal, vec![vec![2]]).journal);
    let view = world.open(1);
    world.assert_shows(&view);
    let routed = world.view.routed.lock();
    assert!(quiet.iter().all(|journal| routed[..3].contains(journal)), "{routed:?}");
}

/// It ends with the last of them.
#[test]
fn a_view_goes_on_with_the_journals_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 15, 2);
    let view = world.open(1);
    world.append_some(20, 0);
    world.assert_shows(&view);
    world.stores[1].close().unwrap();
    world.append(0, vec![vec![1]]);
    world.wait(&view);
    assert_eq!(view.status().lag_events, Some(0));
    world.stores[0].close().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !matches!(view.status().state, ViewState::Closed) {
        assert!(Instant::now() < deadline, "{:?}", view.status());
        std::thread::yield_now();
    }
}

/// A view may be the only witness of a loss, whichever journals it is opened with.
#[test]
fn a_lost_tail_is_told_though_the_set_of_journals_has_changed_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 16, 3);
    let (journal, older) = (dir.path().join("store-1/journal"), dir.path().join("older"));
    let kept = world.append(1, vec![vec![1]]);
    world.reopen(1, || copy_dir(&journal, &older));
    let lost = world.append(1, vec![vec![1]]);
    let open = |world: &World, journals: &[usize]| {
        let journals = journals.iter().map(|n| world.stores[*n].journal().clone());
        let journals: Vec<Journal> = journals.collect();
        world.stores[0].view_over(&journals, Traces::default(), ViewOptions::default())
    };
    let view = open(&world, &[0, 1]).unwrap();
    view.wait_for(&lost, PATIENCE).unwrap();
    view.close().unwrap();
    drop(view);
    world.reopen(1, || replace_dir(&older, &journal));
    for journals in [&[0, 1][..], &[0, 1, 2], &[1, 2], &[1]] {
        let refused = open(&world, journals).map(drop).unwrap_err();
        let ViewError::LostTail { checkpoint, end, .. } = refused else { panic!("{refused}") };
        let told = (checkpoint.journal, checkpoint.position, end);
        assert_eq!(told, (lost.journal, lost.position, kept.position), "{journals:?}");
    }
    // Of what it doesn't follow any more it says nothing.
    assert!(open(&world, &[0, 2]).unwrap().status().set_aside.is_some());
}

/// The journal that has lost events is named, whichever of them it is.
#[test]
fn a_loss_names_the_journal_that_was_lost_from() {
    let dir = tempfile::tempdir().unwrap();
    for lost in 0..2 {
        let mut world = World::new(&dir.path().join(lost.to_string()), 7, 2);
        for journal in 0..2 {
            world.append(journal, vec![vec![1], vec![2]]);
        }
        let view = world.open(1 << 20);
        world.wait(&view);
        let backup = dir.path().join(format!("backup-{lost}"));
        world.stores[lost].journal().backup(&backup).unwrap();
        world.append(lost, vec![vec![3]]);
        world.wait(&view);
        view.close().unwrap();
        drop(view);
        let id = world.stores[lost].journal().id();
        let journal = world.stores[lost].journal().dir().to_owned();
        world.reopen(lost, || {
            std::fs::remove_dir_all(&journal).unwrap();
            let fs: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
            headwater::restore(&fs, &backup, &journal, None).unwrap();
        });
        let journals = world.journals();
        let refused = world.stores[0]
            .view_over(&journals, world.view.clone(), ViewOptions::default())
            .map(drop)
            .unwrap_err();
        let ViewError::LostTail { checkpoint, .. } = &refused else { panic!("{refused}") };
        assert_eq!(checkpoint.journal, id);
        assert!(refused.to_string().contains(&id.to_string()), "{refused}");
        let other = journals[1 - lost].id().to_string();
        assert!(!refused.to_string().contains(&other), "{refused}");
    }
}
