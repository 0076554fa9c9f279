//! Events that kill the process: what code of a view does that nothing in the process can catch.
//!
//! ```text
//!   test ──starts, again and again──▶ this test binary: opens the view, folds, dies
//!     │                               … until it lives: says what it found, and closes
//!     ▼
//!   opens the view itself, with code that was mended, and looks at rows and what is parked
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use headwater::view::{
    Fold, FoldError, Index, Indexes, Keys, OnPoison, RebuildOptions, Table, TableView, Tables,
    View, ViewControl, ViewHandle, ViewOptions, ViewState, ViewTxn,
};
use headwater::{
    Append, EventKind, EventKindRef, ExpectedRevision, KnownKind, NewEvent, Payload, PayloadCodec,
    Position, Recorded, Store, StreamId,
};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(60);
/// Set in a child: where the store is.
const DIR: &str = "HEADWATER_DEADLY_DIR";
/// Set in a child: what it does, in this order.
const ORDERS: &str = "HEADWATER_DEADLY_ORDERS";

/// Where and how an event kills.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Kills {
    No,
    Abort,
    Overflow,
    Exit,
    Memory,
    /// In the row of [`BOTH`] only.
    OneRow,
    Index,
    Route,
    Decode,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Added {
    key: u8,
    value: u64,
    kills: Kills,
    filling: Vec<u8>,
}

/// Every event is folded into the row of its key, and into this one.
const BOTH: u8 = 255;

/// Whether the code of this process is mended: it is in the one that looks, and in children that are told so.
fn is_mended() -> bool {
    std::env::var(ORDERS).map_or(true, |orders| orders.contains("mended"))
}

fn overflow(depth: u64) -> u64 {
    let ballast = std::hint::black_box([depth; 512]);
    if depth == u64::MAX { 0 } else { overflow(depth + 1) + ballast[7] }
}

fn die(kills: Kills) {
    match kills {
        Kills::Overflow => println!("{}", overflow(0)),
        Kills::Exit => std::process::exit(7),
        Kills::Memory => drop(std::hint::black_box(Vec::<u8>::with_capacity(1 << 62))),
        _ => std::process::abort(),
    }
}

impl headwater::Event for Added {
    const KINDS: &'static [KnownKind] = &[KnownKind::present("added", 1)];

    fn kind(&self) -> EventKind {
        EventKind { name: "added", schema_version: 1 }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), headwater::codec::CodecError> {
        Ok((PayloadCodec::Json, serde_json::to_vec(self).unwrap()))
    }

    fn step(
        kind: EventKindRef<'_>,
        payload: Payload<'_>,
    ) -> Result<headwater::upcast::Step<Self>, headwater::codec::CodecError> {
        if kind.name != "added" {
            return Ok(headwater::upcast::Step::Foreign);
        }
        let added: Self = payload.decode()?;
        if added.kills == Kills::Decode && !is_mended() {
            die(added.kills);
        }
        Ok(headwater::upcast::Step::Value(added))
    }
}

/// What an event comes to in a row depends on all events of the row, and on their order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    count: u64,
    trace: u64,
    kills: bool,
}

fn step(row: Option<Sum>, added: &Added, position: Position) -> Sum {
    let row = row.unwrap_or_default();
    let trace = row.trace.wrapping_mul(31).wrapping_add(added.value).wrapping_add(position.get());
    let kills = row.kills || added.kills == Kills::Index;
    Sum { count: row.count + 1, trace, kills }
}

struct Sums;

impl Sums {
    const BY_COUNT: Index<Self, u64> = Index::new("by_count", |key: &u8, sum: &Sum, keys| {
        if sum.kills && *key != BOTH && !is_mended() {
            std::process::abort();
        }
        keys.add(sum.count);
    });
}

impl View for Sums {
    const NAME: &'static str = "sums";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = Sum;
    type Event = Added;

    fn route(&self, event: &Recorded<Added>, keys: &mut Keys<u8>) {
        if event.data().kills == Kills::Route && !is_mended() {
            std::process::abort();
        }
        keys.extend([event.data().key, BOTH]);
    }

    fn fold(
        &self,
        key: &u8,
        row: Option<Sum>,
        event: &Recorded<Added>,
    ) -> Result<Fold<Sum>, FoldError> {
        let added = event.data();
        let kills = match added.kills {
            Kills::Abort | Kills::Overflow | Kills::Exit | Kills::Memory => true,
            Kills::OneRow => *key == BOTH,
            _ => false,
        };
        if kills && !is_mended() {
            die(added.kills);
        }
        Ok(Fold::Put(step(row, added, event.position())))
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none().with(Self::BY_COUNT)
    }
}

/// The same in a table.
struct Tabled;

const SUMS: Table<u8, Sum> = Table::new("sums");

impl TableView for Tabled {
    const NAME: &'static str = "tabled";
    const VERSION: u32 = 1;
    type Event = Added;

    fn tables(&self) -> Tables {
        Tables::of(SUMS)
    }

    fn apply(&self, event: &Recorded<Added>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let added = event.data();
        if added.kills == Kills::Abort && !is_mended() {
            die(added.kills);
        }
        for key in [added.key, BOTH] {
            let sum = step(tx.get(SUMS, &key)?, added, event.position());
            tx.put(SUMS, &key, &sum)?;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------- the child

/// Nothing is made durable unless it is closed: each life begins where the first one did.
fn options() -> ViewOptions {
    ViewOptions {
        flush_bytes: u64::MAX,
        flush_interval: Duration::from_secs(3600),
        ..ViewOptions::default()
    }
}

fn settled(view: &ViewControl) -> ViewState {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = view.status().state;
        if !matches!(state, ViewState::Building | ViewState::CatchingUp) {
            return state;
        }
        assert!(Instant::now() < deadline, "never settled: {:?}", view.status());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Not a test of its own: what the others start.
#[test]
fn does_as_it_is_told_in_a_process_that_may_die() {
    let (Ok(dir), Ok(orders)) = (std::env::var(DIR), std::env::var(ORDERS)) else { return };
    let store = Store::open(dir).unwrap();
    let mut options = options();
    if orders.contains("stop") {
        (options.on_poison, options.on_undecodable) = (OnPoison::Stop, OnPoison::Stop);
    }
    if orders.contains("tables") {
        let view = store.table_view_with(Tabled, options).unwrap();
        settled(&view);
        view.close().unwrap();
        return println!("\nsaid closed");
    }
    let view = store.view_with(Sums, options).unwrap();
    let state = settled(&view);
    if let ViewState::Stopped(error) = &state {
        println!("\nsaid {} {error}", error.code());
    }
    for order in orders.split(' ') {
        match order {
            "retry" => println!("\nsaid {:?}", view.retry(&1).unwrap()),
            "rebuild" => match view.rebuild(RebuildOptions::default()).unwrap().wait() {
                Ok(rebuilt) => println!("\nsaid rebuilt {}", rebuilt.generation),
                Err(error) => println!("\nsaid {} {error}", error.code()),
            },
            "acquit" => {
                let deadly = view.deadly_events();
                assert!(view.acquit(deadly[0].locator).unwrap());
                assert!(!view.acquit(deadly[0].locator).unwrap());
            }
            "abort" => std::process::abort(),
            "live" => {
                for kills in [Kills::No, Kills::No, Kills::Abort] {
                    put(&store, vec![Added { key: 1, value: 1, kills, filling: Vec::new() }]);
                    view.wait_for_latest(PATIENCE).unwrap();
                }
            }
            _ => {}
        }
    }
    view.close().unwrap();
    println!("\nsaid closed");
}

/// One life of a child: what it said, or that it died.
fn live(dir: &Path, orders: &str) -> Option<String> {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "deadly::does_as_it_is_told_in_a_process_that_may_die"])
        .args(["--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(ORDERS, orders)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8(child.stdout).unwrap();
    let stderr = String::from_utf8_lossy(&child.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}\n{said}");
    let said: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("said ")).collect();
    (said.last() == Some(&"closed")).then(|| said.join("\n"))
}

/// As many lives as it takes until it lives: how often it died, and what it said at last.
fn live_on(dir: &Path, orders: &str) -> (u32, String) {
    for deaths in 0..12 {
        if let Some(said) = live(dir, orders) {
            return (deaths, said);
        }
    }
    panic!("a crash loop");
}

// ---------------------------------------------------------------------------------------------- the looking

fn put(store: &Store, events: Vec<Added>) {
    let events = events.iter().map(|event| NewEvent::typed(event).unwrap());
    let stream = StreamId::new("sums").unwrap();
    store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap();
}

/// Batches of events, one of which kills: its position, and what the others and it make of each row.
fn journal(dir: &Path, kills: Kills, filling: usize) -> Position {
    let store = Store::create(dir).unwrap();
    let stream = StreamId::new("sums").unwrap();
    let mut position = None;
    for batch in 0..30_u64 {
        let events: Vec<NewEvent> = (0..7)
            .map(|n| {
                let kills = if (batch, n) == (15, 3) { kills } else { Kills::No };
                let (key, value) = (if kills == Kills::No { n % 5 } else { 1 }, batch * 100);
                let filling = vec![7; filling];
                NewEvent::typed(&Added { key, value, kills, filling }).unwrap()
            })
            .collect();
        let appended = store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap();
        if batch == 15 {
            position = Some(appended.receipt().events[3].position);
        }
    }
    store.close().unwrap();
    position.unwrap()
}

/// The rows, but for the events of these rows from the killer on, and but for it altogether if it has none.
fn model(
    store: &Store,
    killer: Position,
    lacks: impl Fn(u8) -> bool,
    skip: bool,
) -> BTreeMap<u8, Sum> {
    let mut rows: BTreeMap<u8, Sum> = BTreeMap::new();
    for event in store.journal().read_all(Position::START).unwrap() {
        let event = event.unwrap();
        let added = event.decode::<Added>().unwrap().into_iter().next().unwrap();
        for key in [added.data().key, BOTH] {
            let is_left_out = lacks(key) && event.position() >= killer;
            if is_left_out || (skip && event.position() == killer) {
                continue;
            }
            let row = step(rows.remove(&key), added.data(), event.position());
            rows.insert(key, row);
        }
    }
    rows
}

fn rows(view: &ViewHandle<Sums>) -> BTreeMap<u8, Sum> {
    view.range(..).map(Result::unwrap).collect()
}

fn open(store: &Store) -> ViewHandle<Sums> {
    let view = store.view_with(Sums, options()).unwrap();
    assert!(matches!(settled(&view), ViewState::CaughtUp));
    view
}

#[test]
fn an_event_that_kills_the_process_is_parked_with_its_rows_after_four_deaths() {
    for kills in
        [Kills::Abort, Kills::Overflow, Kills::Exit, Kills::Memory, Kills::OneRow, Kills::Index]
    {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("store");
        let killer = journal(&dir, kills, 10);
        assert_eq!(live_on(&dir, "").0, 4, "{kills:?}");
        assert_eq!(live_on(&dir, "").0, 0, "{kills:?}");
        let store = Store::open(&dir).unwrap();
        let view = open(&store);
        // It is given up for all its rows: nobody knows which of them it is.
        let lacks = |key: u8| key == 1 || key == BOTH;
        assert_eq!(rows(&view), model(&store, killer, lacks, false), "{kills:?}");
        let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
        assert_eq!(parked.iter().map(|it| it.key).collect::<Vec<_>>(), [1, BOTH], "{kills:?}");
        for parked in parked {
            assert_eq!(parked.first, killer);
            assert_eq!(parked.reason, "the process died 3 times while folding it");
        }
        let deadly = view.deadly_events();
        assert_eq!((deadly.len(), deadly[0].locator.position, deadly[0].deaths), (1, killer, 3));
        // The code is mended, and says so.
        assert_eq!(view.retry(&1).unwrap().applied, 0);
        assert!(view.acquit(deadly[0].locator).unwrap());
        for key in [1, BOTH] {
            assert_eq!(view.retry(&key).unwrap().left, 0);
        }
        assert_eq!(rows(&view), model(&store, killer, |_| false, false));
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    }
}

/// What was applied in front of it wasn't durable when it came: the next life begins in front of that, and died once more,
/// in a chunk that reached over the one that was known to kill.
#[test]
fn an_event_that_kills_when_it_comes_live_is_parked_after_four_deaths_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("store");
    drop(Store::create(&dir).unwrap());
    assert!(live(&dir, "").is_some());
    assert_eq!(live(&dir, "live"), None);
    assert_eq!(1 + live_on(&dir, "").0, 4);
    let store = Store::open(&dir).unwrap();
    let view = open(&store);
    assert_eq!(view.deadly_events()[0].locator.position, Position::new(2));
}

#[test]
fn an_event_that_kills_before_its_rows_are_known_is_parked_under_no_key() {
    for kills in [Kills::Route, Kills::Decode] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("store");
        let killer = journal(&dir, kills, 10);
        assert_eq!(live_on(&dir, "").0, 4, "{kills:?}");
        let store = Store::open(&dir).unwrap();
        let view = open(&store);
        assert_eq!(rows(&view), model(&store, killer, |_| false, true), "{kills:?}");
        let unrouted: Vec<_> = view.unrouted_events().map(Result::unwrap).collect();
        assert_eq!((unrouted.len(), unrouted[0].position), (1, killer));
        assert_eq!(unrouted[0].reason, "the process died 3 times while decoding or routing it");
        view.discard_unrouted(killer).unwrap();
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    }
}

#[test]
fn an_event_that_kills_a_view_of_tables_is_parked_under_no_key() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("store");
    let killer = journal(&dir, Kills::Abort, 10);
    assert_eq!(live_on(&dir, "tables").0, 4);
    let store = Store::open(&dir).unwrap();
    let view = store.table_view_with(Tabled, options()).unwrap();
    settled(&view);
    let found: BTreeMap<u8, Sum> =
        view.table(SUMS).unwrap().range(..).map(Result::unwrap).collect();
    assert_eq!(found, model(&store, killer, |_| false, true));
    let deadly = view.deadly_events();
    assert_eq!((deadly.len(), deadly[0].locator.position), (1, killer));
    assert_eq!(view.status().parked.unrouted, 1);
}

#[test]
fn a_view_that_stops_at_poison_stops_at_what_kills_and_names_it() {
    for (kills, what) in [(Kills::Abort, "folding"), (Kills::Route, "decoding or routing")] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("store");
        let killer = journal(&dir, kills, 10);
        let (deaths, said) = live_on(&dir, "stop");
        assert_eq!(deaths, 4);
        let expected =
            format!("view_stop.deadly view sums stopped at position {killer} of journal ");
        assert!(said.starts_with(&expected) && said.contains(" (added in stream sums)"), "{said}");
        assert!(said.contains(&format!("the process died 3 times while {what} it")), "{said}");
    }
}

/// Deaths that are no event's fault: it was folded in between.
#[test]
fn an_event_that_is_folded_meanwhile_is_acquitted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("store");
    journal(&dir, Kills::Abort, 10);
    for _ in 0..4 {
        // In the chunk and in the event, or twice in the event.
        for _ in 0..2 {
            assert_eq!(live(&dir, ""), None);
        }
        // Folded, and nothing of it is durable.
        assert_eq!(live(&dir, "mended abort"), None);
    }
    assert_eq!(live(&dir, "mended").as_deref(), Some("closed"));
    let store = Store::open(&dir).unwrap();
    let view = open(&store);
    assert!(view.status().parked.is_empty() && view.deadly_events().is_empty());
}

#[test]
fn a_first_build_that_is_killed_goes_the_ordered_way_and_finds_the_event() {
    // While folding, and while the files of the build are written.
    for kills in [Kills::Abort, Kills::Index] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("store");
        let killer = journal(&dir, kills, 3000);
        // Twice in bulk, once in a chunk, three times in the event.
        assert_eq!(live_on(&dir, "").0, 6);
        let store = Store::open(&dir).unwrap();
        assert!(store.journal().end().offset > 1 << 20, "there is nothing to build in bulk");
        let view = open(&store);
        let lacks = |key: u8| key == 1 || key == BOTH;
        assert_eq!(rows(&view), model(&store, killer, lacks, false));
        assert!(!view.status().generation.join("bulk").exists(), "something half-built is left");
    }
}

#[test]
fn a_rebuild_that_kills_ends_with_the_event_named_and_the_old_rows_stay() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("store");
    let killer = journal(&dir, Kills::Abort, 10);
    assert_eq!(live(&dir, "mended").as_deref(), Some("closed"));
    let (deaths, said) = live_on(&dir, "rebuild");
    assert_eq!(deaths, 6, "{said}");
    assert!(said.starts_with("view_stop.deadly"), "{said}");
    assert!(said.contains(&format!("at position {killer} ")), "{said}");
    assert_eq!(live_on(&dir, "rebuild").0, 0, "it isn't tried again");
    assert_eq!(live(&dir, "mended acquit rebuild").as_deref(), Some("rebuilt 2\nclosed"));
    let store = Store::open(&dir).unwrap();
    let view = open(&store);
    assert_eq!(rows(&view), model(&store, killer, |_| false, false));
    assert_eq!(view.generations().unwrap().len(), 2);
}

#[test]
fn a_retry_that_kills_is_no_crash_loop() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("store");
    let killer = journal(&dir, Kills::Abort, 10);
    live_on(&dir, "");
    // It is not tried, unless it is said that the code is mended; if that isn't true, it is found out again.
    let refused = |said: &str| said.contains("left: ") && said.contains("the process died 3 times");
    let (deaths, said) = live_on(&dir, "retry");
    assert!(deaths == 0 && refused(&said), "{deaths} {said}");
    assert_eq!(live(&dir, "acquit retry"), None);
    let (deaths, said) = live_on(&dir, "retry");
    assert!(deaths == 2 && refused(&said), "{deaths} {said}");
    let store = Store::open(&dir).unwrap();
    let view = open(&store);
    let lacks = |key: u8| key == 1 || key == BOTH;
    assert_eq!(rows(&view), model(&store, killer, lacks, false));
}
