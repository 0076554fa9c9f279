//! Watching a view: a cache that reads again what it is told has changed is never wrong for good.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::view::{
    Change, Fold, FoldError, Keys, RebuildOptions, View, ViewHandle, ViewOptions, ViewState, Watch,
};
use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId, Token};

const PATIENCE: Duration = Duration::from_secs(60);

/// Counts events by their first byte; 255 deletes.
#[derive(Debug)]
struct Counts;

impl View for Counts {
    const NAME: &'static str = "counts";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        keys.extend(numbers(event.data()).first().copied());
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<u64>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        Ok(match numbers(event.data()).get(1) {
            Some(255) => Fold::Delete,
            Some(254) => Fold::Keep,
            _ => Fold::Put(row.unwrap_or(0) + 1),
        })
    }
}

fn numbers(json: &[u8]) -> Vec<u8> {
    serde_json::from_slice(json).unwrap()
}

fn append(store: &Store, events: &[[u8; 2]]) -> Token {
    let stream = StreamId::new("counts").unwrap();
    let events = events.iter().map(|event| NewEvent::json("counted", event).unwrap());
    store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap().token()
}

fn open(dir: &Path) -> Store {
    Store::builder(dir).create_if_missing().open().unwrap()
}

fn catch_up(view: &ViewHandle<Counts>) {
    let deadline = Instant::now() + PATIENCE;
    while !matches!(view.status().state, ViewState::CaughtUp) {
        assert!(Instant::now() < deadline, "never caught up: {:?}", view.status());
        std::thread::yield_now();
    }
}

fn rows(view: &ViewHandle<Counts>) -> BTreeMap<u8, u64> {
    view.range(..).map(Result::unwrap).collect()
}

/// Rows that are read again when they are said to have changed.
struct Cache {
    watch: Watch<u8>,
    rows: BTreeMap<u8, u64>,
    /// Rows, Lagged, Replaced.
    told: [u32; 3],
}

impl Cache {
    fn new(view: &ViewHandle<Counts>, watch: Watch<u8>) -> Self {
        Self { watch, rows: rows(view), told: [0; 3] }
    }

    fn take_all(&mut self, view: &ViewHandle<Counts>) {
        while let Some(change) = self.watch.next_within(Duration::ZERO).unwrap() {
            assert!(change.checkpoint().position <= view.checkpoint().applied.position);
            match change {
                Change::Rows { keys, .. } => {
                    assert!(keys.is_sorted_by(|a, b| a < b));
                    self.told[0] += 1;
                    for key in keys {
                        match view.get(&key).unwrap() {
                            Some(row) => drop(self.rows.insert(key, row)),
                            None => drop(self.rows.remove(&key)),
                        }
                    }
                }
                Change::Lagged { .. } => {
                    self.told[1] += 1;
                    self.rows = rows(view);
                }
                Change::Replaced { .. } => {
                    self.told[2] += 1;
                    self.rows = rows(view);
                }
                _ => panic!("{change:?}"),
            }
        }
    }
}

#[test]
fn a_cache_that_reads_again_what_it_is_told_is_right() {
    let seed = std::env::var("HEADWATER_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let options = ViewOptions { chunk_bytes: 1, ..ViewOptions::default() };
    let view = store.view_with(Counts, options).unwrap();
    append(&store, &[[1, 0], [2, 0]]);
    catch_up(&view);
    let mut quick = Cache::new(&view, view.watch());
    // As much is kept as a few keys need.
    let mut slow = Cache::new(&view, view.watch_within(200));
    for round in 0..200 {
        let event = |rng: &mut Rng| [rng.u8(..), *rng.choice(&[0, 0, 254, 255]).unwrap()];
        let events: Vec<[u8; 2]> = (0..rng.usize(1..5)).map(|_| event(&mut rng)).collect();
        append(&store, &events);
        if round % 50 == 49 {
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        }
        if rng.bool() {
            catch_up(&view);
            quick.take_all(&view);
            assert_eq!(quick.rows, rows(&view));
        }
        if rng.u8(0..8) == 0 {
            catch_up(&view);
            slow.take_all(&view);
            assert_eq!(slow.rows, rows(&view));
        }
    }
    catch_up(&view);
    for cache in [&mut quick, &mut slow] {
        cache.take_all(&view);
        assert_eq!(cache.rows, rows(&view));
    }
    assert_eq!((quick.told[1], quick.told[2]), (0, 4), "{:?}", quick.told);
    assert!(slow.told.iter().all(|count| *count > 0), "{:?}", slow.told);
}

#[test]
fn only_what_changes_is_told_and_the_end_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(Counts).unwrap();
    let mut watch = view.watch();
    assert_eq!(watch.next_within(Duration::from_millis(1)).unwrap(), None);
    assert!(!watch.has_ended());
    // One batch is told at once. Kept rows and those that were never there didn't change.
    let token = append(&store, &[[3, 0], [1, 0], [3, 0], [2, 254]]);
    let change = watch.next().unwrap().unwrap();
    let Change::Rows { keys, checkpoint } = change else { panic!("{change:?}") };
    assert_eq!((keys, checkpoint.position), (vec![1, 3], token.position));
    assert_eq!(view.get(&3).unwrap(), Some(2), "readers see what is told");
    let waiting = std::thread::spawn(move || (watch.next().is_none(), watch.has_ended()));
    view.close().unwrap();
    assert_eq!(waiting.join().unwrap(), (true, true));
    assert!(view.watch().has_ended());
}
