//! Rebuilding a view while it serves: what takes over is what the journal makes, nothing else ever does, and whoever
//! reads notices nothing.
//!
//! The fold depends on the order of a key's events and on how often each is folded, and deletes rows now and then. What
//! it comes to is compared with a recount that knows nothing of views.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use fastrand::Rng;
use headwater::retention::{History, Options, Until};
use headwater::view::{
    Degraded, Fold, FoldError, Keys, LostTail, OnDifference, OnPoison, RebuildError,
    RebuildOptions, RebuildPhase, StopError, View, ViewError, ViewHandle, ViewOptions, ViewState,
};
use headwater::{
    Append, ExpectedRevision, JournalOptions, NewEvent, Position, ReadError, Recorded, Store,
    StreamId, Token,
};

use crate::views::{copy_dir, replace_dir, stopped, until};

const PATIENCE: Duration = Duration::from_secs(60);

/// The first two bytes of an event are its key, the third says what it does.
#[derive(Clone, Default)]
struct Traces<const VERSION: u32 = 1> {
    /// From this position on, folding fails.
    poison: Option<u64>,
    /// Added to every trace: a fold that was changed, or isn't pure.
    twist: Arc<AtomicU64>,
}

type Row = (u64, u64, Vec<u8>);

fn keys_of(data: &[u8]) -> [(u8, u16); 2] {
    let key = u16::from_le_bytes([data[0], data[1]]);
    [(0, key), (1, key % 7)]
}

fn step(row: Option<Row>, data: &[u8], position: u64, twist: u64) -> Option<Option<Row>> {
    match data[2] {
        0 => None,
        1 => Some(None),
        _ => {
            let (count, trace, _) = row.unwrap_or_default();
            let trace = trace.wrapping_mul(31).wrapping_add(position).wrapping_add(twist);
            Some(Some((count + 1, trace, data[3..3 + usize::from(data[2] % 40)].to_vec())))
        }
    }
}

impl<const VERSION: u32> View for Traces<VERSION> {
    const NAME: &'static str = "traces";
    const VERSION: u32 = VERSION;
    type Key = (u8, u16);
    type Row = Row;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<(u8, u16)>) {
        keys.extend(keys_of(event.data()));
        keys.add(keys_of(event.data())[0]); // named twice, folded once
    }

    fn fold(
        &self,
        _: &(u8, u16),
        row: Option<Row>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<Row>, FoldError> {
        let position = event.position().get();
        if self.poison.is_some_and(|poison| position >= poison) {
            return Err("poison".into());
        }
        let twist = self.twist.load(Ordering::Relaxed);
        Ok(match step(row, event.data(), position, twist) {
            None => Fold::Keep,
            Some(None) => Fold::Delete,
            Some(Some(row)) => Fold::Put(row),
        })
    }
}

/// A journal that is written at random, and what its events come to.
struct World {
    store: Store,
    rng: Rng,
    rows: BTreeMap<(u8, u16), Row>,
    token: Option<Token>,
}

impl World {
    fn new(dir: &Path, seed: u64) -> Self {
        println!("seed {seed}");
        let options = JournalOptions {
            segment_bytes_first: 256 << 10,
            segment_bytes_max: 1 << 20,
            batch_bytes_max: 64 << 10,
            group_bytes_max: 128 << 10,
            ..JournalOptions::default()
        };
        let store =
            Store::builder(dir).create_if_missing().journal_options(options).open().unwrap();
        let mut world =
            Self { store, rng: Rng::with_seed(seed), rows: BTreeMap::new(), token: None };
        world.recount();
        world
    }

    /// From what is in the journal.
    fn recount(&mut self) {
        for event in self.store.read_all(Position::START).unwrap() {
            let event = event.unwrap();
            self.count(event.data(), event.position().get());
        }
    }

    fn count(&mut self, data: &[u8], position: u64) {
        for key in keys_of(data) {
            match step(self.rows.get(&key).cloned(), data, position, 0) {
                None => {}
                Some(None) => drop(self.rows.remove(&key)),
                Some(Some(row)) => drop(self.rows.insert(key, row)),
            }
        }
    }

    fn append(&mut self, batches: usize) {
        for _ in 0..batches {
            let events: Vec<Vec<u8>> = (0..self.rng.usize(1..60)).map(|_| self.event()).collect();
            let new = events.iter().map(|data| NewEvent::raw("traced", data.clone()).unwrap());
            let append = Append::to(&stream(), ExpectedRevision::Any, new);
            let appended = self.store.append(&append).unwrap();
            for (data, placed) in events.iter().zip(&appended.receipt().events) {
                self.count(data, placed.position.get());
            }
            self.token = Some(appended.token());
        }
    }

    fn event(&mut self) -> Vec<u8> {
        let mut data: Vec<u8> = (0..self.rng.usize(50..200)).map(|_| self.rng.u8(..)).collect();
        data[1] &= 3;
        data
    }

    fn open<const VERSION: u32>(&self, view: Traces<VERSION>) -> ViewHandle<Traces<VERSION>> {
        let (chunk_bytes, on_poison) = (100 << 10, OnPoison::Stop);
        let options = ViewOptions { chunk_bytes, on_poison, ..ViewOptions::default() };
        self.store.view_with(view, options).unwrap()
    }

    fn assert_shows<const VERSION: u32>(&self, view: &ViewHandle<Traces<VERSION>>) {
        let snapshot = view.snapshot_at_least(&self.token.unwrap(), PATIENCE).unwrap();
        let rows: Result<BTreeMap<_, _>, _> = snapshot.range(..).collect();
        assert!(rows.unwrap() == self.rows, "the view shows something else");
    }
}

fn traced() -> NewEvent {
    NewEvent::raw("traced", vec![0; 100]).unwrap()
}

fn stream() -> StreamId {
    StreamId::new("traces").unwrap()
}

fn live<const VERSION: u32>(view: &ViewHandle<Traces<VERSION>>) -> Vec<u32> {
    let mut all = view.generations().unwrap();
    all.retain(|it| it.live && it.version == VERSION);
    all.iter().map(|it| it.number).collect()
}

fn little_memory() -> RebuildOptions {
    RebuildOptions { memory_bytes_max: 128 << 10, threads: 3, ..RebuildOptions::default() }
}

/// The ordered path, the bulk path and the bulk path in many passes come to the same, on any history.
#[test]
fn a_rebuild_makes_what_folding_in_order_made() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed);
        let ordered = world.open(Traces::<1>::default());
        world.append(300);
        world.assert_shows(&ordered);
        let mut rebuilt = Vec::new();
        for options in [RebuildOptions::default(), little_memory()] {
            let rebuild = ordered.rebuild(options).unwrap();
            let done = rebuild.wait().unwrap();
            let compared = done.compared.unwrap();
            assert!(compared.is_equal() && compared.built.rows == world.rows.len() as u64);
            rebuilt.push((done.previous, done.generation));
            world.assert_shows(&ordered);
            world.append(10);
            world.assert_shows(&ordered);
        }
        assert_eq!(rebuilt, [(Some(1), 2), (Some(2), 3)]);
        // A first generation over a history that is there already: in bulk, too.
        let bulk = world.open(Traces::<2>::default());
        world.assert_shows(&bulk);
        assert_eq!(bulk.digest().unwrap(), ordered.digest().unwrap());
    }
}

#[test]
fn little_memory_needs_several_passes() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 11);
    world.append(200);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    // So slow that the second pass is seen by whoever looks now and then.
    let slowly = RebuildOptions { bytes_per_second_max: Some(1 << 20), ..little_memory() };
    let rebuild = view.rebuild(slowly).unwrap();
    let mut seen = rebuild.status();
    until("a second pass", || {
        seen = rebuild.status();
        seen.pass > 1 || seen.phase == RebuildPhase::Ended
    });
    assert!(seen.pass > 1, "there was none: {seen}");
    rebuild.throttle(None);
    rebuild.wait().unwrap();
    world.assert_shows(&view);
}

/// Appends and reads go on while generation after generation takes over. A reader sees whole moments only, none
/// older than one that it saw before.
#[test]
fn readers_and_writers_notice_nothing_of_a_flip() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 21);
    world.append(150);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    let done = AtomicBool::new(false);
    let (flips, moments) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut last, mut moments) = (Position::START, 0);
            while !done.load(Ordering::Relaxed) {
                let snapshot = view.snapshot().unwrap();
                let at = snapshot.checkpoint().position;
                assert!(at >= last, "the view went back");
                last = at;
                let rows = snapshot.range(..).filter(|row| row.as_ref().unwrap().1.0 > 0).count();
                moments += usize::from(rows > 0);
            }
            moments
        });
        let rebuilder = scope.spawn(|| {
            let mut flips = 0;
            while !done.load(Ordering::Relaxed) {
                let rebuild = view.rebuild(RebuildOptions::default()).unwrap();
                let rebuilt = rebuild.wait().unwrap();
                assert!(rebuilt.compared.is_none_or(|it| it.is_equal()));
                assert!(view.remove_generation(1, rebuilt.previous.unwrap()).unwrap());
                flips += 1;
            }
            flips
        });
        for _ in 0..60 {
            world.append(5);
            let _row = view.get_at_least(&(0, 1), &world.token.unwrap(), PATIENCE).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        (rebuilder.join().unwrap(), reader.join().unwrap())
    });
    println!("{flips} flips, {moments} moments read");
    assert!(flips > 0 && moments > 0);
    world.assert_shows(&view);
}

/// Counts, and asks in front of each event that a rebuild folds.
struct Asking {
    is_rebuilt: Arc<AtomicBool>,
    asks: Mutex<mpsc::Sender<u64>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl View for Asking {
    const NAME: &'static str = "asking";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, _: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        keys.add(0);
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<u64>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        let follows = std::thread::current().name() == Some("view-asking");
        if self.is_rebuilt.load(Ordering::SeqCst) && !follows {
            self.asks.lock().unwrap().send(event.position().get())?;
            self.go_on.lock().unwrap().recv()?;
        }
        Ok(Fold::Put(row.unwrap_or_default() + 1))
    }
}

/// What was appended while a rebuild caught up was counted against what it may read. Where that is less, it never came near
/// the end, and `remaining` said that there were 0 s left.
#[test]
fn a_rebuild_that_may_read_less_than_is_appended_takes_over_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    let put = || {
        let append = Append::to(&stream(), ExpectedRevision::Any, [traced()]);
        store.append(&append).unwrap().token()
    };
    let (asks_tx, asks) = mpsc::channel();
    let (go_on, go_on_rx) = mpsc::channel();
    let is_rebuilt = Arc::<AtomicBool>::default();
    let asking = Asking {
        is_rebuilt: Arc::clone(&is_rebuilt),
        asks: Mutex::new(asks_tx),
        go_on: Mutex::new(go_on_rx),
    };
    // It follows up to the last event, one after the other.
    let options = ViewOptions { chunk_bytes: 1, ..ViewOptions::default() };
    let view = store.view_with(asking, options).unwrap();
    assert_eq!(view.get_at_least(&0, &put(), PATIENCE).unwrap(), Some(1));
    is_rebuilt.store(true, Ordering::SeqCst);
    let rebuild = view.rebuild(RebuildOptions::default()).unwrap();
    let mut last = None;
    for position in 0..6 {
        assert_eq!(asks.recv_timeout(PATIENCE), Ok(position));
        // It builds up to 0, and catches up with 1 from the beginning.
        if position == 2 {
            assert_eq!(rebuild.status().phase, RebuildPhase::CatchingUp);
            rebuild.throttle(Some(1));
        }
        if position < 5 {
            last = Some(put());
        }
        go_on.send(()).unwrap();
    }
    assert_eq!(rebuild.wait().unwrap().generation, 2);
    assert_eq!(view.get_at_least(&0, &last.unwrap(), PATIENCE).unwrap(), Some(6));
}

#[test]
fn rolling_back_catches_up_before_it_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 31);
    world.append(100);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    assert!(matches!(view.rollback(), Err(ViewError::NoGeneration { .. })));
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    world.append(50);
    world.assert_shows(&view);
    let back = view.rollback().unwrap().wait().unwrap();
    assert_eq!((back.generation, back.previous), (1, Some(2)));
    world.assert_shows(&view);
    drop(view);
    let view = world.open(Traces::<1>::default());
    assert_eq!(live(&view), [1]);
    world.assert_shows(&view);
    assert!(matches!(view.remove_generation(1, 1), Err(ViewError::Live { .. })));
    assert!(view.remove_generation(1, 2).unwrap());
    assert!(!view.remove_generation(1, 2).unwrap());
}

/// A fold that doesn't give the same twice is found before its rows take over.
#[test]
fn other_rows_than_those_served_do_not_take_over_unless_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 41);
    world.append(100);
    let traces = Traces::<1>::default();
    let view = world.open(traces.clone());
    world.assert_shows(&view);
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    traces.twist.store(1, Ordering::Relaxed);
    assert!(!view.check(RebuildOptions::default()).unwrap().is_equal());
    let refused = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert!(matches!(&refused, RebuildError::Different(it) if it.served != it.built), "{refused}");
    assert_eq!((live(&view), view.generations().unwrap().len()), (vec![1], 1));
    world.assert_shows(&view);
    let options =
        RebuildOptions { on_difference: OnDifference::Replace, ..RebuildOptions::default() };
    let replaced = view.rebuild(options).unwrap().wait().unwrap();
    assert!(!replaced.compared.unwrap().is_equal());
    assert_eq!(live(&view), [2]);
}

#[test]
fn an_event_that_cannot_be_applied_ends_a_rebuild_and_the_old_rows_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 51);
    world.append(100);
    let poison = world.token.unwrap().position.get() / 2;
    let view = world.open(Traces::<1> { poison: Some(poison), ..Traces::default() });
    let stopped = stopped(&view);
    let batch_end = view.checkpoint().applied.position.get();
    assert!(stopped.position().unwrap().get() == poison && batch_end <= poison && batch_end > 0);
    let failed = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert!(
        matches!(&failed, RebuildError::Stopped(it) if it.position() == stopped.position()),
        "{failed}"
    );
    assert_eq!(view.generations().unwrap().len(), 1);
    drop(view);
    // The fold was mended: a rebuild goes on where the old generation could not.
    let view = world.open(Traces::<1>::default());
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    world.assert_shows(&view);
}

/// Rows built without the events in front would look whole.
#[test]
fn removed_history_cannot_be_rebuilt_and_the_old_rows_stay() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 91);
    world.append(400);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    view.close().unwrap();
    drop(view);
    let target = world.store.journal().segments()[1].end_position;
    let options = Options::new(Until::Position(target)).history(History::Forget(target));
    assert_eq!(world.store.retain(&options).unwrap().target, target);
    let told = |error: &StopError| {
        matches!(error, StopError::Journal { source: ReadError::Truncated { .. }, .. })
    };
    let view = world.open(Traces::<1>::default());
    let failed = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert!(matches!(&failed, RebuildError::Stopped(error) if told(error)), "{failed}");
    world.append(1);
    world.assert_shows(&view);
    let raised = world.open(Traces::<2>::default());
    let error = stopped(&raised);
    assert!(told(&error), "{error}");
    assert_eq!(raised.snapshot().unwrap().range(..).count(), 0);
}

#[test]
fn a_rebuild_can_be_paused_slowed_down_and_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 61);
    world.append(900); // several pieces
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    let crawl =
        RebuildOptions { bytes_per_second_max: Some(1), threads: 1, ..RebuildOptions::default() };
    let rebuild = view.rebuild(crawl.clone()).unwrap();
    until("a first event", || rebuild.status().events > 0);
    let status = view.status().rebuild.unwrap();
    assert!(status.events < status.events_total && status.remaining.is_some(), "{status}");
    assert!(matches!(view.rebuild(RebuildOptions::default()), Err(ViewError::Rebuilding { .. })));
    rebuild.pause();
    rebuild.throttle(None);
    assert!(rebuild.status().paused);
    world.append(1);
    world.assert_shows(&view);
    rebuild.resume();
    rebuild.wait().unwrap();
    assert!(view.status().rebuild.is_none());
    world.assert_shows(&view);

    let rebuild = view.rebuild(crawl.clone()).unwrap();
    rebuild.cancel();
    assert!(matches!(rebuild.wait(), Err(RebuildError::Cancelled)));
    assert_eq!(live(&view), [2]);
    // Closing cancels, too.
    let rebuild = view.rebuild(crawl).unwrap();
    view.close().unwrap();
    assert!(matches!(rebuild.wait(), Err(RebuildError::Cancelled)));
    assert!(matches!(view.rebuild(RebuildOptions::default()), Err(ViewError::Closed { .. })));
    drop(view);
    let view = world.open(Traces::<1>::default());
    assert_eq!(view.generations().unwrap().len(), 2);
    world.assert_shows(&view);
}

/// A higher version is built from the history while the lower one goes on serving, in the same process.
#[test]
fn a_higher_version_is_built_while_the_lower_one_serves() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 71);
    world.append(100);
    let first = world.open(Traces::<1>::default());
    world.assert_shows(&first);
    let second = world.open(Traces::<2>::default());
    world.assert_shows(&second);
    world.append(10);
    world.assert_shows(&first);
    world.assert_shows(&second);
    assert!(matches!(world.store.view(Traces::<2>::default()), Err(ViewError::InUse { .. })));
}

const CHILD: &str = "HEADWATER_REBUILD_CHILD";

/// Not a test of its own: what the next one starts and kills.
#[test]
fn rebuilds_for_ever_in_a_process_that_is_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(3);
    }));
    let mut world = World::new(Path::new(&dir), 0);
    let view = world.open(Traces::<1>::default());
    // So much beside each rebuild: a journal that grows as fast as it can is rebuilt ever more slowly.
    let (more, wanted) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while more.send(()).is_ok() {
                let rebuilt = view.rebuild(little_memory()).unwrap().wait().unwrap();
                println!("rebuilt {}", rebuilt.generation);
                let back = view.rollback().unwrap().wait().unwrap();
                println!("back {}", back.generation);
                drop(view.remove_generation(1, rebuilt.generation));
                std::io::stdout().flush().unwrap();
            }
        });
        for () in wanted {
            world.append(100);
        }
    });
}

/// Whenever the process is killed: the view serves what the journal makes, and nothing half-built is left.
#[test]
fn a_killed_rebuild_leaves_a_view_that_serves() {
    let dir = tempfile::tempdir().unwrap();
    World::new(dir.path(), 81).append(100);
    let mut rng = Rng::with_seed(82);
    let kills = std::env::var("HEADWATER_KILLS").map_or(6, |it| it.parse().unwrap());
    let mut seen = BTreeMap::new();
    for _ in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rebuild::rebuilds_for_ever_in_a_process_that_is_killed"])
            .args(["--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..rng.usize(1..5) {
            let line = lines.by_ref().map(Result::unwrap);
            let mut line = line.filter(|it| it.starts_with("rebuilt") || it.starts_with("back"));
            let kind = line.next().expect("the child goes on until it is killed");
            *seen.entry(kind.split(' ').next().unwrap().to_owned()).or_insert(0) += 1;
        }
        std::thread::sleep(Duration::from_micros(rng.u64(0..20_000))); // anywhere in the next one
        child.kill().unwrap();
        child.wait().unwrap();
        let mut world = World::new(dir.path(), 83);
        let view = world.open(Traces::<1>::default());
        world.append(1);
        world.assert_shows(&view);
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
        let begun = std::fs::read_dir(dir.path().join("views/traces")).unwrap();
        let begun = begun.filter(|it| it.as_ref().unwrap().path().join("not-kept").exists());
        assert_eq!(begun.count(), 0, "something half-built is left");
        let kept = view.generations().unwrap();
        assert!(kept.iter().all(|it| it.folder.join("CURRENT").exists()), "{kept:?}");
    }
    println!("{kills} kills, after {seen:?}");
}

/// Files in a generation, so that deleting it takes a while.
const MANY: usize = 10_000;
const DELETED: &str = "HEADWATER_DELETED_VERSION";

/// Not a test of its own: what the next one starts and kills.
#[test]
fn deletes_a_generation_in_a_process_that_is_killed() {
    let Some(version) = std::env::var(DELETED).ok() else { return };
    let world = World::new(Path::new(&std::env::var_os(CHILD).unwrap()), 0);
    let view = world.open(Traces::<1>::default());
    println!("deleting");
    view.remove_generation(version.parse().unwrap(), 1).unwrap();
}

/// A generation was deleted under its own name, and its mark was one of the files that went, if it had one at all: those of
/// other versions had none. Killed meanwhile, the rest of it passed for one that is kept: it held back retention, and could be
/// rolled back to.
#[test]
fn a_killed_deletion_leaves_nothing_that_passes_for_a_generation() {
    for version in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), 84);
        world.append(3);
        let (first, second) =
            (world.open(Traces::<1>::default()), world.open(Traces::<2>::default()));
        world.assert_shows(&first);
        world.assert_shows(&second);
        first.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        second.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        drop((first, second, world));
        let views = dir.path().join("views/traces");
        let deleted = views.join(format!("{version}.1"));
        for n in 0..MANY {
            std::fs::write(deleted.join(n.to_string()), "").unwrap();
        }
        let files = || std::fs::read_dir(&deleted).map_or(0, Iterator::count);
        let before = files();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rebuild::deletes_a_generation_in_a_process_that_is_killed"])
            .args(["--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .env(DELETED, version.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|line| line.ends_with("deleting")), "the child has not begun");
        until("the deletion is under way", || files() < before);
        child.kill().unwrap();
        child.wait().unwrap();

        let world = World::new(dir.path(), 85);
        let view = world.open(Traces::<1>::default());
        let left = view.generations().unwrap();
        let mut left: Vec<_> = left.iter().map(|it| (it.version, it.number)).collect();
        left.sort_unstable();
        let others = [(1, 1), (1, 2), (2, 1), (2, 2)].into_iter().filter(|it| *it != (version, 1));
        assert_eq!(left, others.collect::<Vec<_>>());
        let names = std::fs::read_dir(&views).unwrap().map(|it| it.unwrap().file_name());
        let names: Vec<_> = names.map(|it| it.into_string().unwrap()).collect();
        let of_it = format!("{version}.1");
        assert!(!names.iter().any(|name| name.starts_with(&of_it)), "{names:?}");
    }
}

/// Folds wait at the first event until nobody has `go_on` any more.
struct Gated<const VERSION: u32> {
    reached: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl<const VERSION: u32> View for Gated<VERSION> {
    const NAME: &'static str = "traces";
    const VERSION: u32 = VERSION;
    type Key = (u8, u16);
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<(u8, u16)>) {
        keys.extend(keys_of(event.data()));
    }

    fn fold(
        &self,
        _: &(u8, u16),
        row: Option<u64>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        if event.position() == Position::START && row.is_none() {
            self.reached.lock().unwrap().send(()).unwrap();
            let ended = self.go_on.lock().unwrap().recv();
            assert!(ended.is_err(), "nothing is ever sent");
        }
        Ok(Fold::Put(row.unwrap_or(0) + 1))
    }
}

/// Closes the view twice at a time while it folds the first event: neither returns before the fold has. A failure drops
/// `go_on`, and so lets the fold go on.
fn close_gated<const VERSION: u32>(view: &ViewHandle<Gated<VERSION>>, go_on: mpsc::Sender<()>) {
    let (closed_tx, closed) = mpsc::channel();
    let closer = |closed: mpsc::Sender<ViewState>| {
        let view = view.clone();
        std::thread::spawn(move || {
            view.close().unwrap();
            closed.send(view.status().state).unwrap();
        })
    };
    let closers = [closer(closed_tx.clone()), closer(closed_tx)];
    // Whoever doesn't wait is heard within this time.
    let early = closed.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err(), "the fold is under way, and a closer has returned: {early:?}");
    drop(go_on);
    for _ in &closers {
        let state = closed.recv_timeout(PATIENCE).expect("closing ends when the fold does");
        assert!(matches!(state, ViewState::Closed), "{state:?}");
    }
    closers.into_iter().for_each(|it| it.join().unwrap());
}

/// A first build that was closed in the middle leaves nothing: it holds nothing back, and is no generation of anything.
#[test]
fn a_first_build_that_is_cancelled_leaves_no_generation_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 9);
    world.append(400);
    let old = world.open(Traces::<1>::default());
    world.assert_shows(&old);
    let end = world.store.journal().end().position;
    let (reached_tx, reached) = mpsc::channel();
    let (go_on, go_on_rx) = mpsc::channel();
    let (reached_tx, go_on_rx) = (Mutex::new(reached_tx), Mutex::new(go_on_rx));
    let gated = Gated::<2> { reached: reached_tx, go_on: go_on_rx };
    let new = world.store.view(gated).unwrap();
    reached.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(new.status().state, ViewState::Building));
    let names = |old: &ViewHandle<Traces<1>>| -> Vec<(u32, u32, bool)> {
        old.generations().unwrap().iter().map(|it| (it.version, it.number, it.live)).collect()
    };
    assert_eq!(names(&old), [(1, 1, true)], "what is being built is no generation yet");
    let snapshot = new.snapshot().unwrap();
    close_gated(&new, go_on);
    let folder = new.status().generation;
    drop(new);
    // Whoever opened it now would find its own generation deleted when the last reader goes.
    let too_early = world.store.view(Traces::<2>::default());
    assert!(matches!(too_early, Err(ViewError::InUse { .. })), "{too_early:?}");
    assert!(folder.exists(), "it is read still");
    drop(snapshot);
    assert!(!folder.exists(), "{}", folder.display());
    assert_eq!(names(&old), [(1, 1, true)]);
    old.close().unwrap();
    let plan = world.store.plan_retention(&Options::new(Until::Position(end))).unwrap();
    let gates: Vec<_> = plan.gates.iter().map(|it| (it.holder.to_string(), it.position)).collect();
    assert_eq!(gates, [("view traces, version 1, generation 1".to_owned(), Some(end))]);
    // The version that comes next begins anew.
    let next = world.open(Traces::<2>::default());
    world.assert_shows(&next);
    assert_eq!(live(&next), [1]);
}

/// Many threads read up to 4 MiB each before any of it is folded. Where that took longer than a second, nothing of it was made
/// up for, and less was read than was allowed.
#[test]
fn a_slow_build_folds_what_it_may_read_within_a_second_and_no_more_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 20);
    world.append(400);
    // However many they are, together they read no more.
    for threads in [4, 32] {
        let (reached_tx, reached) = mpsc::channel();
        let (go_on, go_on_rx) = mpsc::channel();
        let (reached_tx, go_on_rx) = (Mutex::new(reached_tx), Mutex::new(go_on_rx));
        let building = RebuildOptions {
            bytes_per_second_max: Some(400 << 10),
            threads,
            ..RebuildOptions::default()
        };
        let slow = ViewOptions { building, ..ViewOptions::default() };
        let gated = Gated::<1> { reached: reached_tx, go_on: go_on_rx };
        let view = world.store.view_with(gated, slow).unwrap();
        reached.recv_timeout(PATIENCE).unwrap();
        let status = view.status().rebuild.unwrap();
        close_gated(&view, go_on);
        assert!(status.events * 2 < status.events_total, "{threads} threads: {status}");
    }
}

#[test]
fn a_first_build_reads_no_faster_than_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 13);
    world.append(400);
    let building = RebuildOptions { bytes_per_second_max: Some(1), ..RebuildOptions::default() };
    let slow = ViewOptions { building, ..ViewOptions::default() };
    let view = world.store.view_with(Traces::<1>::default(), slow).unwrap();
    let late = view.wait_for_latest(Duration::from_secs(1));
    assert!(late.is_err() && matches!(view.status().state, ViewState::Building), "{late:?}");
    assert!(view.status().rebuild.is_some());
    drop(view); // waits for nothing
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
}

/// Nobody who has just deployed a view is to be told that a row doesn't exist which isn't made yet.
#[test]
fn a_checked_read_says_that_the_rows_are_being_made_in_bulk() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 15);
    world.append(400);
    let key = *world.rows.keys().next().unwrap();
    let (reached_tx, reached) = mpsc::channel();
    let (go_on, go_on_rx) = mpsc::channel();
    let (reached_tx, go_on_rx) = (Mutex::new(reached_tx), Mutex::new(go_on_rx));
    let view = world.store.view(Gated::<1> { reached: reached_tx, go_on: go_on_rx }).unwrap();
    reached.recv_timeout(PATIENCE).unwrap();
    let (checked, snapshot) = (view.get_checked(&key).unwrap(), view.snapshot().unwrap());
    drop(go_on); // before anything fails: the view waits for its fold
    let building = Some(Degraded::Building { applied: Position::START, until: None });
    assert_eq!((checked.row, checked.degraded), (None, building.clone()));
    view.wait_for_latest(PATIENCE).unwrap();
    let checked = view.get_checked(&key).unwrap();
    assert!(checked.row.is_some() && checked.degraded.is_none(), "{checked:?}");
    assert_eq!(snapshot.get_checked(&key).unwrap().degraded, building, "as of its moment");
    let checked = view.snapshot().unwrap().get_checked(&key).unwrap();
    assert!(checked.row.is_some() && checked.degraded.is_none(), "{checked:?}");
}

/// Built in order, rows are seen as they come, also by the next process.
#[test]
fn a_checked_read_says_that_the_rows_are_being_made_also_behind_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, backup) = (dir.path().join("journal"), dir.path().join("backup"));
    World::new(dir.path(), 16).append(5);
    copy_dir(&journal, &backup);
    let mut world = World::new(dir.path(), 17);
    world.append(5);
    let end = world.store.journal().end().position;
    let building = RebuildOptions { bytes_per_second_max: Some(1), ..RebuildOptions::default() };
    let slow = ViewOptions { building, chunk_bytes: 1, ..ViewOptions::default() };
    let mut reached = Position::START;
    for opening in 1..3 {
        let view = world.store.view_with(Traces::<1>::default(), slow.clone()).unwrap();
        let rebuild = view.status().rebuild.unwrap();
        assert_eq!(rebuild.events_total, end.since(reached), "opening {opening}");
        until("a chunk is applied", || view.checkpoint().applied.position > reached);
        reached = view.checkpoint().applied.position;
        let building = Some(Degraded::Building { applied: reached, until: Some(end) });
        assert_eq!(view.get_checked(&(0, u16::MAX)).unwrap().degraded, building);
        let snapshot = view.snapshot().unwrap();
        assert_eq!(snapshot.get_checked(&(0, u16::MAX)).unwrap().degraded, building);
        view.close().unwrap();
        assert_eq!(view.get_checked(&(0, u16::MAX)).unwrap().degraded, building, "closed");
    }
    // As it is behind a restore: no more will come than there is.
    world.store.close().unwrap();
    let (longer, views) = (dir.path().join("longer"), dir.path().join("views"));
    let kept = dir.path().join("views-kept");
    copy_dir(&journal, &longer);
    copy_dir(&views, &kept);
    replace_dir(&backup, &journal);
    let world = World::new(dir.path(), 18);
    let view = world.open(Traces::<1>::default());
    view.wait_for_latest(PATIENCE).unwrap();
    until("built", || view.get_checked(&(0, u16::MAX)).unwrap().degraded.is_none());
    drop(view);
    world.store.close().unwrap();
    replace_dir(&longer, &journal);
    replace_dir(&kept, &views);

    let mut world = World::new(dir.path(), 19);
    let view = world.open(Traces::<1>::default());
    view.wait_for_latest(PATIENCE).unwrap();
    let expected = world.rows.clone();
    let assert_whole = |view: &ViewHandle<Traces<1>>| {
        let rows: BTreeMap<_, _> = view.range(..).map(Result::unwrap).collect();
        assert_eq!(rows, expected);
        let checked = view.get_checked(rows.keys().next().unwrap()).unwrap();
        assert!(checked.row.is_some() && checked.degraded.is_none(), "{checked:?}");
    };
    assert_whole(&view);
    view.close().unwrap();
    drop(view);
    // That it lags isn't that it is built.
    world.append(1);
    let poisoned = Traces::<1> { poison: Some(end.get()), ..Traces::default() };
    let view = world.open(poisoned);
    stopped(&view);
    assert_whole(&view);
}

/// A journal of less than 1 MiB is folded in order. When all of it was there the build was over, and the thread held up for
/// what it had read, for as long as that took: nobody who closed the view could wake it.
#[test]
fn a_first_build_in_order_holds_nobody_up_when_it_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 14);
    world.append(5);
    let building = RebuildOptions { bytes_per_second_max: Some(1), ..RebuildOptions::default() };
    let slow = ViewOptions { building, ..ViewOptions::default() };
    let view = world.store.view_with(Traces::<1>::default(), slow).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    world.append(1);
    view.wait_for_latest(PATIENCE).unwrap();
    world.assert_shows(&view);
    let (closed_tx, closed) = mpsc::channel();
    std::thread::spawn(move || closed_tx.send(view.close().is_ok()));
    assert_eq!(closed.recv_timeout(PATIENCE), Ok(true));
}

/// A rebuild that takes over ends the first build of the generation that it takes the place of. Whoever folded that one was held
/// up all the same, for as long as what it had read takes: nobody who closed the view could wake it.
#[test]
fn a_first_build_in_order_holds_nobody_up_when_a_rebuild_has_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 22);
    world.append(5);
    let view = world.store.view_with(Traces::<1>::default(), slow_in_order()).unwrap();
    until("a chunk is applied", || view.checkpoint().applied.position > Position::START);
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    world.assert_shows(&view);
    world.append(1);
    world.assert_shows(&view);
    until("the first build is over", || view.status().rebuild.is_none());
    let (closed_tx, closed) = mpsc::channel();
    std::thread::spawn(move || closed_tx.send(view.close().is_ok()));
    assert_eq!(closed.recv_timeout(PATIENCE), Ok(true));
}

/// Events that were there as the rows of a generation began to be made may be lost when it takes over again.
#[test]
fn rows_that_are_rolled_back_to_are_not_being_made_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, backup) = (dir.path().join("journal"), dir.path().join("backup"));
    World::new(dir.path(), 23).append(5);
    copy_dir(&journal, &backup);
    let mut world = World::new(dir.path(), 24);
    world.append(5);
    let view = world.store.view_with(Traces::<1>::default(), slow_in_order()).unwrap();
    until("a chunk is applied", || view.checkpoint().applied.position > Position::START);
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    world.assert_shows(&view);
    view.close().unwrap();
    drop(view);
    world.store.close().unwrap();
    replace_dir(&backup, &journal);
    let world = World::new(dir.path(), 25);
    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let view = world.store.view_with(Traces::<1>::default(), accepted).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(live(&view), [3]);
    assert!(view.remove_generation(1, 2).unwrap(), "it is of what is lost");
    assert_eq!(view.rollback().unwrap().wait().unwrap().generation, 1);
    let rows: BTreeMap<_, _> = view.range(..).map(Result::unwrap).collect();
    assert_eq!(rows, world.rows);
    let checked = view.get_checked(rows.keys().next().unwrap()).unwrap();
    assert_eq!(checked.degraded, None);
}

/// One batch is applied, and then it waits.
fn slow_in_order() -> ViewOptions {
    let building = RebuildOptions { bytes_per_second_max: Some(1), ..RebuildOptions::default() };
    ViewOptions { building, chunk_bytes: 1, ..ViewOptions::default() }
}

/// Whoever restarts while the new rows are built isn't asked again.
#[test]
fn a_lost_tail_that_was_accepted_stays_accepted_before_the_new_rows_are_built() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, backup) = (dir.path().join("journal"), dir.path().join("backup"));
    let mut world = World::new(dir.path(), 10);
    world.append(400);
    let token = world.token;
    world.store.close().unwrap();
    copy_dir(&journal, &backup);
    let mut world = World::new(dir.path(), 11);
    world.append(1);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    drop(view);
    world.store.close().unwrap();
    replace_dir(&backup, &journal);

    let mut world = World::new(dir.path(), 12);
    world.token = token;
    let refused = world.store.view(Traces::<1>::default());
    assert!(matches!(refused, Err(ViewError::LostTail { .. })));
    let (reached_tx, reached) = mpsc::channel();
    let (go_on, go_on_rx) = mpsc::channel();
    let (reached_tx, go_on_rx) = (Mutex::new(reached_tx), Mutex::new(go_on_rx));
    let gated = Gated::<1> { reached: reached_tx, go_on: go_on_rx };
    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let new = world.store.view_with(gated, accepted).unwrap();
    reached.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(new.status().state, ViewState::Building));
    close_gated(&new, go_on);
    drop(new);
    let view = world.open(Traces::<1>::default());
    world.assert_shows(&view);
    assert_eq!(live(&view), [2]);
    assert!(dir.path().join("views/traces/1.1/CURRENT").exists(), "what was set aside is kept");
}
