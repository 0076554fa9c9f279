//! Views of several tables: what they hold is what the events' programs make, run one after the other in memory.
//!
//! Each event carries a small program (writes, deletions, reads of ranges whose answers are written down) that the view
//! runs on its tables, and the test on ordered maps.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fastrand::Rng;
use headwater::view::{
    Change, FoldError, OnPoison, RebuildOptions, StopError, Table, TableView, TableViewHandle,
    Tables, ViewError, ViewOptions, ViewReadError, ViewState, ViewTxn,
};
use headwater::{Append, ExpectedRevision, NewEvent, Position, Recorded, Store, StreamId, Token};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(60);

type Key = (u8, u8);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Op {
    Put(Key, u32),
    Delete(Key),
    /// Writes down what is in this range, under a number that comes from the table of counts.
    Range(Key, Key),
    /// The same with all keys that begin with this.
    Prefix(u8),
    Fail(Failing),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Failing {
    Error,
    Panic,
    /// Reads a table that isn't declared, and makes nothing of the error.
    NoTable,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Program(Vec<Op>);

headwater::events! {
    /// Small programs.
    enum Event {
        Program(Program) = "program.written", version 1;
    }
}

const CELLS: Table<Key, u32> = Table::new("cells");
const ANSWERS: Table<u64, Vec<(Key, u32)>> = Table::new("answers");
const COUNTS: Table<(), u64> = Table::new("counts");
const UNDECLARED: Table<u8, u8> = Table::new("undeclared");

/// `SET` 0: one table more.
#[derive(Debug)]
struct Machine<const SET: u8 = 1>;

impl<const SET: u8> TableView for Machine<SET> {
    const NAME: &'static str = "machine";
    const VERSION: u32 = 1;
    type Event = Event;

    fn tables(&self) -> Tables {
        let tables = Tables::of(COUNTS).with(ANSWERS).with(CELLS);
        if SET == 0 { tables.with(Table::<u8, u8>::new("another")) } else { tables }
    }

    fn apply(&self, event: &Recorded<Event>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let Event::Program(Program(ops)) = event.data();
        for op in ops {
            let answer: Vec<_> = match op {
                Op::Put(key, value) => {
                    tx.put(CELLS, key, value)?;
                    continue;
                }
                Op::Delete(key) => {
                    tx.delete(CELLS, key)?;
                    continue;
                }
                Op::Range(from, to) => tx.range(CELLS, *from..*to)?.collect::<Result<_, _>>()?,
                Op::Prefix(first) => tx.prefix(CELLS, first)?.collect::<Result<_, _>>()?,
                Op::Fail(Failing::Error) => return Err("asked to fail".into()),
                Op::Fail(Failing::Panic) => panic!("asked to panic"),
                Op::Fail(Failing::NoTable) => {
                    drop(tx.get(UNDECLARED, &1));
                    continue;
                }
            };
            let count = tx.get(COUNTS, &())?.unwrap_or(0);
            tx.put(ANSWERS, &count, &answer)?;
            tx.put(COUNTS, &(), &(count + 1))?;
        }
        Ok(())
    }
}

/// The same without a database.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    cells: BTreeMap<Key, u32>,
    answers: Vec<Vec<(Key, u32)>>,
}

impl Model {
    fn run(&mut self, program: &Program) {
        let before = self.clone();
        for op in &program.0 {
            let within = |it: &Model, holds: &dyn Fn(Key) -> bool| {
                it.cells
                    .iter()
                    .map(|(key, value)| (*key, *value))
                    .filter(|it| holds(it.0))
                    .collect()
            };
            match op {
                Op::Put(key, value) => drop(self.cells.insert(*key, *value)),
                Op::Delete(key) => drop(self.cells.remove(key)),
                Op::Range(from, to) => {
                    let answer = within(self, &|key| key >= *from && key < *to);
                    self.answers.push(answer);
                }
                Op::Prefix(first) => {
                    let answer = within(self, &|key| key.0 == *first);
                    self.answers.push(answer);
                }
                Op::Fail(_) => return *self = before,
            }
        }
    }
}

struct World {
    dir: tempfile::TempDir,
    store: Store,
    model: Model,
    rng: Rng,
}

impl World {
    fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        Self { dir, store, model: Model::default(), rng: Rng::with_seed(seed) }
    }

    fn op(&mut self) -> Op {
        let mut key = || (self.rng.u8(..4), self.rng.u8(..8));
        let (a, b) = (key(), key());
        match self.rng.u8(..10) {
            0..=4 => Op::Put(a, self.rng.u32(..)),
            5 | 6 => Op::Delete(a),
            7 | 8 => Op::Range(a, b),
            _ => Op::Prefix(a.0),
        }
    }

    fn program(&mut self) -> Program {
        let ops = self.rng.usize(..6);
        Program((0..ops).map(|_| self.op()).collect())
    }

    fn append(&mut self, programs: Vec<Program>) -> Token {
        programs.iter().for_each(|program| self.model.run(program));
        let events = programs.into_iter().map(|it| NewEvent::typed(&Event::from(it)).unwrap());
        let stream = StreamId::new("machine").unwrap();
        let appended = self.store.append(&Append::to(&stream, ExpectedRevision::Any, events));
        appended.unwrap().token()
    }

    fn append_some(&mut self, batches: usize) -> Token {
        let mut token = None;
        for _ in 0..batches {
            let count = self.rng.usize(1..5);
            let programs = (0..count).map(|_| self.program()).collect();
            token = Some(self.append(programs));
        }
        token.unwrap()
    }

    fn open(&self, options: ViewOptions) -> TableViewHandle<Machine> {
        self.store.table_view_with(Machine, options).unwrap()
    }

    fn assert_shows(&self, view: &TableViewHandle<Machine>, token: &Token) {
        let snapshot = view.snapshot_at_least(token, PATIENCE).unwrap();
        let rows = snapshot.table(CELLS).unwrap().range(..).map(Result::unwrap);
        let cells: BTreeMap<Key, u32> = rows.collect();
        let rows = snapshot.table(ANSWERS).unwrap().range(..).map(Result::unwrap);
        let (numbers, answers): (Vec<u64>, Vec<_>) = rows.unzip();
        assert_eq!(numbers, (0..answers.len() as u64).collect::<Vec<_>>());
        assert_eq!((cells, answers), (self.model.cells.clone(), self.model.answers.clone()));
    }
}

fn chunks_of(chunk_bytes: u64) -> ViewOptions {
    // With small chunks only a few rows are remembered, or none.
    let row_cache_bytes = if chunk_bytes < 1 << 20 { chunk_bytes } else { 32 << 20 };
    ViewOptions { chunk_bytes, row_cache_bytes, ..ViewOptions::default() }
}

#[test]
fn tables_are_what_the_programs_make_in_any_chunks_and_after_any_rebuild() {
    for seed in 0..6 {
        println!("seed {seed}");
        let mut world = World::new(seed);
        let ahead = world.rng.usize(1..40);
        let mut token = world.append_some(ahead);
        for _ in 0..3 {
            let chunk_bytes = [1, 700, 1 << 20][world.rng.usize(..3)];
            let view = world.open(chunks_of(chunk_bytes));
            world.assert_shows(&view, &token);
            let live = world.rng.usize(1..40);
            token = world.append_some(live);
            world.assert_shows(&view, &token);
            let compared = view.check(RebuildOptions::default()).unwrap();
            assert!(compared.is_equal(), "{compared:?}");
            let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
            assert!(rebuilt.compared.is_some_and(|it| it.is_equal()));
            token = world.append_some(1);
            world.assert_shows(&view, &token);
            if world.rng.bool() {
                view.rollback().unwrap().wait().unwrap();
                world.assert_shows(&view, &token);
            }
            view.close().unwrap();
        }
    }
}

#[test]
fn readers_of_a_table_see_what_is_there_at_each_read_and_through_a_flip() {
    let mut world = World::new(1);
    let token = world.append(vec![Program(vec![Op::Put((1, 1), 7), Op::Put((1, 2), 8)])]);
    let view = world.open(ViewOptions::default());
    view.wait_for(&token, PATIENCE).unwrap();
    let cells = view.table(CELLS).unwrap();
    let then = view.snapshot().unwrap();
    assert_eq!(cells.get(&(1, 1)).unwrap(), Some(7));
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    let token = world.append(vec![Program(vec![Op::Put((1, 1), 9), Op::Delete((1, 2))])]);
    view.wait_for(&token, PATIENCE).unwrap();
    assert_eq!(cells.multi_get(&[(1, 1), (1, 2), (3, 3)]).unwrap(), [Some(9), None, None]);
    let then = then.table(CELLS).unwrap();
    assert_eq!(then.multi_get(&[(1, 1), (1, 2)]).unwrap(), [Some(7), Some(8)]);
    let page = then.prefix(&1).rev().page(1).unwrap();
    assert_eq!(page.items, [((1, 2), 8)]);
    let rest = then.prefix(&1).rev().after(&page.next.unwrap()).page(5).unwrap();
    assert_eq!((rest.items, rest.next), (vec![((1, 1), 7)], None));
    let wrong = view.table(UNDECLARED).unwrap_err();
    assert!(matches!(wrong, ViewReadError::NoTable { table: "undeclared", .. }), "{wrong}");
    let wrong = view.table(Table::<u8, u32>::new("cells")).unwrap_err();
    assert_eq!(wrong.code(), "view_read.no_table", "of other types");
}

#[test]
fn an_event_that_fails_leaves_nothing_and_is_parked_alone() {
    for failing in [Failing::Error, Failing::Panic] {
        let mut world = World::new(2);
        let put = |key, value| Op::Put((0, key), value);
        let before = world.append(vec![Program(vec![put(1, 1)])]);
        let failed = world.append(vec![
            Program(vec![put(2, 2)]),
            Program(vec![put(1, 9), put(3, 3), Op::Fail(failing)]),
            Program(vec![Op::Range((0, 0), (9, 9))]),
        ]);
        let view = world.open(ViewOptions::default());
        view.wait_for(&failed, PATIENCE).unwrap();
        assert_eq!(view.status().parked.unrouted, 1, "{failing:?}");
        let parked: Vec<_> = view.unrouted_events().map(Result::unwrap).collect();
        assert_eq!(parked[0].position, Position::new(2));
        assert!(parked[0].reason.contains("asked to"), "{}", parked[0].reason);
        view.snapshot_at_least(&before, PATIENCE).unwrap();
        let degraded = view.snapshot_at_least(&failed, PATIENCE).unwrap_err();
        assert!(matches!(degraded, ViewReadError::Degraded { .. }), "{degraded}");

        view.discard_unrouted(Position::new(2)).unwrap();
        assert_eq!(view.status().parked.unrouted, 0);
        world.assert_shows(&view, &failed);
        view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        world.assert_shows(&view, &failed);
    }
}

fn stopped(view: &TableViewHandle<Machine>, token: &Token) -> Arc<StopError> {
    view.wait_for(token, PATIENCE).unwrap_err();
    match view.status().state {
        ViewState::Stopped(error) => error,
        state => panic!("{state:?}"),
    }
}

#[test]
fn a_view_that_stops_at_an_event_has_applied_what_is_in_front_of_its_batch() {
    let mut world = World::new(3);
    world.append(vec![Program(vec![Op::Put((0, 1), 1)])]);
    let model = world.model.clone();
    let put = Program(vec![Op::Put((0, 2), 2)]);
    let token = world.append(vec![put, Program(vec![Op::Fail(Failing::Error)])]);
    let options = ViewOptions { on_poison: OnPoison::Stop, ..ViewOptions::default() };
    let view = world.open(options);
    let error = stopped(&view, &token);
    assert_eq!((error.code(), error.position()), ("view_stop.fold", Some(Position::new(2))));
    assert_eq!(view.checkpoint().applied.position, Position::new(1));
    let cells: BTreeMap<Key, u32> =
        view.table(CELLS).unwrap().range(..).map(Result::unwrap).collect();
    assert_eq!(cells, model.cells);
    let refused = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert_eq!(refused.code(), "view_stop.fold", "{refused}");
}

#[test]
fn a_table_that_is_not_declared_stops_the_view_even_if_its_code_goes_on() {
    let mut world = World::new(4);
    let token = world.append(vec![Program(vec![Op::Fail(Failing::NoTable)])]);
    let view = world.open(ViewOptions::default());
    let error = stopped(&view, &token);
    assert_eq!(error.code(), "view_stop.table", "{error}");
    assert!(error.to_string().contains("undeclared"), "{error}");
    assert_eq!(view.status().parked.unrouted, 0);
}

#[test]
fn another_set_of_tables_makes_another_generation() {
    let mut world = World::new(5);
    let token = world.append_some(5);
    let view = world.open(ViewOptions::default());
    world.assert_shows(&view, &token);
    drop(view);
    let other = world.store.table_view(Machine::<0>).unwrap();
    other.wait_for(&token, PATIENCE).unwrap();
    assert!(other.status().set_aside.is_some());
    let cells = other.table(CELLS).unwrap().range(..).map(Result::unwrap);
    assert_eq!(cells.collect::<BTreeMap<_, _>>(), world.model.cells);
}

#[test]
fn names_that_can_not_be_are_refused() {
    struct Wrong(Tables);
    impl TableView for Wrong {
        const NAME: &'static str = "wrong";
        const VERSION: u32 = 1;
        type Event = Event;
        fn tables(&self) -> Tables {
            self.0.clone()
        }
        fn apply(&self, _: &Recorded<Event>, _: &mut ViewTxn<'_>) -> Result<(), FoldError> {
            Ok(())
        }
    }
    let world = World::new(6);
    let twice = Tables::of(CELLS).with(Table::<u8, u8>::new("cells"));
    for tables in [twice, Tables::of(Table::<u8, u8>::new("Cells"))] {
        let refused = world.store.table_view(Wrong(tables)).map(drop).unwrap_err();
        assert!(matches!(refused, ViewError::InvalidTable { .. }), "{refused}");
        assert!(!Path::new(&world.dir.path().join("store/views/wrong")).exists());
    }
}

#[test]
fn watchers_are_told_of_their_table_only() {
    let mut world = World::new(7);
    let view = world.open(ViewOptions::default());
    let mut cells = view.watch(CELLS).unwrap();
    let mut counts = view.watch(COUNTS).unwrap();
    let token = world.append(vec![Program(vec![Op::Put((1, 1), 7), Op::Delete((2, 2))])]);
    view.wait_for(&token, PATIENCE).unwrap();
    let told = cells.next_within(PATIENCE).unwrap();
    assert!(matches!(told, Some(Change::Rows { keys, .. }) if keys == [(1, 1), (2, 2)]));
    world.append(vec![Program(vec![Op::Prefix(1)])]);
    let told = counts.next_within(PATIENCE).unwrap();
    assert!(matches!(told, Some(Change::Rows { keys, .. }) if keys == [()]));
    view.close().unwrap();
    assert!(cells.next().is_none(), "nothing else of this table");
}

/// Each event writes a row of a megabyte, and looks at what of the rows in front of it is in the database already.
#[derive(Debug)]
struct Large {
    handle: Arc<OnceLock<TableViewHandle<Large>>>,
    /// The most events whose rows were in memory only.
    held_max: Arc<AtomicU64>,
}

// Text: bytes would be decoded one by one, for a megabyte each.
const LARGE: Table<u64, String> = Table::new("large");

impl TableView for Large {
    const NAME: &'static str = "large";
    const VERSION: u32 = 1;
    type Event = Vec<u8>;

    fn tables(&self) -> Tables {
        Tables::of(LARGE)
    }

    fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let position = event.position().get();
        let table = self.handle.wait().table(LARGE)?;
        let is_held = |at: &u64| table.get(at).unwrap().is_none();
        let held = (0..position).rev().take_while(is_held).count() as u64;
        self.held_max.fetch_max(held, Ordering::Relaxed);
        if position > 0 {
            let is_there = tx.get(LARGE, &(position - 1))?.is_some();
            assert_eq!(is_there, position != 60, "it sees what is in front of it");
        }
        if event.data() == b"fails" {
            return Err("asked to fail".into());
        }
        tx.put(LARGE, &position, &"x".repeat(1 << 20))?;
        Ok(())
    }
}

/// What a chunk writes doesn't have to fit into memory: it is written in parts, at the ends of batches.
#[test]
fn what_a_chunk_writes_is_held_up_to_a_bound() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    let stream = StreamId::new("large").unwrap();
    let event = |data: &[u8]| NewEvent::raw("large", data.to_vec()).unwrap();
    let to_append = |events: Vec<NewEvent>| Append::to(&stream, ExpectedRevision::Any, events);
    for n in 0..60 {
        let data: &[u8] = if n == 59 { b"fails" } else { b"" };
        store.append(&to_append(vec![event(data)])).unwrap();
    }
    // A batch is written whole.
    let batch = (0..30).map(|_| event(b"")).collect();
    store.append(&to_append(batch)).unwrap_or_else(|error| panic!("{error}"));
    let (handle, held_max) = (Arc::new(OnceLock::new()), Arc::new(AtomicU64::new(0)));
    let large = Large { handle: Arc::clone(&handle), held_max: Arc::clone(&held_max) };
    let view = store.table_view(large).unwrap();
    handle.set(view.clone()).unwrap();
    let token = store.journal().end().token();
    view.wait_for(&token, PATIENCE).unwrap();
    let held_max = held_max.load(Ordering::Relaxed);
    assert!((16..16 + 30).contains(&held_max), "{held_max} rows of a megabyte in memory");
    assert_eq!(view.table(LARGE).unwrap().range(..).count(), 89);
    assert_eq!(view.status().parked.unrouted, 1);
    let audit = view.audit().unwrap();
    assert!(audit.is_complete(), "{audit:?}");
    assert!(view.check(RebuildOptions::default()).is_err(), "it halts at what fails");
    view.close().unwrap();
}
