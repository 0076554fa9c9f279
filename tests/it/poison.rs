//! Events that can't be applied: they stop their row and no other, are there as long as the checkpoint says that
//! they were seen, and become what they should have been once the fold is mended.
//!
//! Rows and what is parked are compared with a recount that knows nothing of views.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::retention::{History, Options, Until};
use headwater::view::{
    Degraded, Fold, FoldError, Index, Indexes, KeyError, Keys, LostTail, OnDifference, OnPoison,
    ParkedError, ParkedKey, RebuildError, RebuildOptions, StopError, View, ViewHandle, ViewKey,
    ViewOptions, ViewReadError, ViewState,
};
use headwater::{
    Append, ExpectedRevision, JournalOptions, NewEvent, Position, Recorded, Store, StreamId, Token,
};
use serde::{Deserialize, Serialize};

use crate::views::{copy_dir, replace_dir};

const PATIENCE: Duration = Duration::from_secs(60);

/// In which way an event is poisonous.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Poison {
    No,
    /// The fold returns an error for the first of the event's rows.
    Error,
    /// The fold panics for the second of the event's rows.
    Panic,
    /// The first row can't be indexed.
    Index,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Added {
    key: u8,
    value: u64,
    poison: Poison,
}

headwater::events! {
    /// What is added.
    enum SumEvent {
        Added(Added) = "sum.added", version 1;
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    count: u64,
    trace: u64,
    is_unindexable: bool,
}

type Key = (u8, u8);

fn keys_of(added: &Added) -> [Key; 2] {
    [(0, added.key), (1, added.key % 3)]
}

/// Whether the event can't be folded into this row.
fn is_poison(key: Key, added: &Added) -> bool {
    match added.poison {
        Poison::No => false,
        Poison::Error | Poison::Index => key.0 == 0,
        Poison::Panic => key.0 == 1,
    }
}

fn step(row: Option<Sum>, added: &Added, position: Position) -> Sum {
    let row = row.unwrap_or_default();
    let trace = row.trace.wrapping_mul(31).wrapping_add(added.value).wrapping_add(position.get());
    // Rows that only exist between two writes aren't indexed: it stays what it is.
    Sum { count: row.count + 1, trace, ..row }
}

/// Sums, by a fold that can be mended.
#[derive(Clone, Debug, Default)]
struct Sums<const VERSION: u32 = 1> {
    is_mended: Arc<AtomicBool>,
}

impl<const VERSION: u32> Sums<VERSION> {
    const BY_COUNT: Index<Self, u64> = Index::new("by_count", |_, sum: &Sum, keys| {
        assert!(!sum.is_unindexable, "what a row");
        keys.add(sum.count);
    });
}

impl<const VERSION: u32> View for Sums<VERSION> {
    const NAME: &'static str = "sums";
    const VERSION: u32 = VERSION;
    type Key = Key;
    type Row = Sum;
    type Event = SumEvent;

    fn route(&self, event: &Recorded<SumEvent>, keys: &mut Keys<Key>) {
        let SumEvent::Added(added) = event.data();
        keys.extend(keys_of(added));
    }

    fn fold(
        &self,
        key: &Key,
        row: Option<Sum>,
        event: &Recorded<SumEvent>,
    ) -> Result<Fold<Sum>, FoldError> {
        let SumEvent::Added(added) = event.data();
        let sum = step(row, added, event.position());
        if is_poison(*key, added) && !self.is_mended.load(Ordering::SeqCst) {
            return match added.poison {
                Poison::Index => Ok(Fold::Put(Sum { is_unindexable: true, ..sum })),
                Poison::Panic => panic!("what an event"),
                _ => Err("no such sum".into()),
            };
        }
        Ok(Fold::Put(sum))
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none().with(Self::BY_COUNT)
    }
}

/// Rows, and the positions of what is parked of each.
#[derive(Debug, Default, PartialEq)]
struct Model {
    rows: BTreeMap<Key, Sum>,
    parked: BTreeMap<Key, Vec<Position>>,
    unrouted: Vec<Position>,
}

/// What a view makes of the events in front of `end` whose fold is mended from `mended` on, and which knows of
/// nothing to be retried.
fn model(store: &Store, end: Position, mended: Position) -> Model {
    let mut model = Model::default();
    let events = store.journal().read_all(Position::START).unwrap().map(Result::unwrap);
    for event in events.take_while(|event| event.position() < end) {
        let position = event.position();
        let Ok(decoded) = event.decode::<SumEvent>() else {
            model.unrouted.push(position);
            continue;
        };
        let decoded = decoded.into_iter().next().unwrap();
        let SumEvent::Added(added) = decoded.data();
        for key in keys_of(added) {
            let fails = is_poison(key, added) && position < mended;
            if fails || model.parked.contains_key(&key) {
                model.parked.entry(key).or_default().push(position);
            } else {
                let row = step(model.rows.remove(&key), added, position);
                model.rows.insert(key, row);
            }
        }
    }
    model
}

/// What the view holds, and where it is.
fn contents<const VERSION: u32>(view: &ViewHandle<Sums<VERSION>>) -> (Model, Position) {
    let snapshot = view.snapshot().unwrap();
    let rows: BTreeMap<Key, Sum> = snapshot.range(..).map(Result::unwrap).collect();
    let by_count = snapshot.by_index(Sums::<VERSION>::BY_COUNT).unwrap().range(..);
    let indexed: BTreeMap<Key, Sum> = by_count
        .map(Result::unwrap)
        .inspect(|(count, _, row)| assert_eq!(*count, row.count))
        .map(|(_, key, row)| (key, row))
        .collect();
    assert_eq!(indexed, rows);
    let mut parked = BTreeMap::new();
    for ParkedKey { key, events, first, reason, .. } in view.parked().map(Result::unwrap) {
        let list: Vec<Position> =
            view.parked_events(&key).map(|event| event.unwrap().position).collect();
        assert_eq!((events, Some(&first)), (list.len() as u64, list.first()), "{key:?}");
        assert!(reason.contains("what a") || reason.contains("no such sum"), "{reason}");
        let checked = view.get_checked(&key).unwrap();
        assert_eq!(checked.row.as_ref(), rows.get(&key));
        assert!(matches!(checked.degraded, Some(Degraded::Parked { .. })), "{checked:?}");
        assert_eq!(snapshot.get_checked(&key).unwrap(), checked);
        parked.insert(key, list);
    }
    let unrouted: Vec<Position> =
        view.unrouted_events().map(|event| event.unwrap().position).collect();
    let counts = view.status().parked;
    let events: usize = parked.values().map(Vec::len).sum();
    let expected = (parked.len() as u64, events as u64, unrouted.len() as u64);
    assert_eq!((counts.keys, counts.events, counts.unrouted), expected);
    (Model { rows, parked, unrouted }, snapshot.checkpoint().position)
}

fn added(key: u8, value: u64, poison: Poison) -> NewEvent {
    NewEvent::typed(&SumEvent::from(Added { key, value, poison })).unwrap()
}

fn undecodable() -> NewEvent {
    NewEvent::json("sum.added", &"not a sum").unwrap()
}

fn random_batch(rng: &mut Rng) -> Vec<NewEvent> {
    let event = |rng: &mut Rng| {
        let poison = match rng.u8(0..60) {
            0 => Poison::Error,
            1 => Poison::Panic,
            2 => Poison::Index,
            3 => return undecodable(),
            _ => Poison::No,
        };
        added(rng.u8(0..30), rng.u64(..), poison)
    };
    (0..rng.usize(1..8)).map(|_| event(rng)).collect()
}

fn open(dir: &Path) -> Store {
    let options = JournalOptions {
        segment_bytes_first: 8 << 10,
        segment_bytes_max: 8 << 10,
        batch_bytes_max: 2 << 10,
        group_bytes_max: 2 << 10,
        ..JournalOptions::default()
    };
    Store::builder(dir).create_if_missing().journal_options(options).open().unwrap()
}

fn append(store: &Store, events: Vec<NewEvent>) -> Token {
    let stream = StreamId::new("sums").unwrap();
    store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap().token()
}

fn catch_up<V: View>(view: &ViewHandle<V>) {
    let deadline = Instant::now() + PATIENCE;
    while !matches!(view.status().state, ViewState::CaughtUp) {
        assert!(Instant::now() < deadline, "never caught up: {:?}", view.status());
        std::thread::yield_now();
    }
}

/// The names of all files in there.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(self::files(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files.sort();
    files
}

/// A copy of what is there at one moment, as a power cut would leave it.
fn copy_at_a_moment(from: &Path) -> tempfile::TempDir {
    loop {
        let (to, before) = (tempfile::tempdir().unwrap(), files(from));
        let copied = before.iter().all(|path| {
            let to = to.path().join(path.strip_prefix(from).unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(path, to).is_ok()
        });
        if copied && files(from) == before {
            return to;
        }
    }
}

fn rng(round: u64) -> Rng {
    let seed = std::env::var("HEADWATER_SEED").map_or(round, |seed| seed.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    Rng::with_seed(seed)
}

fn small_steps(rng: &mut Rng) -> ViewOptions {
    ViewOptions {
        chunk_bytes: rng.u64(1..4096),
        row_cache_bytes: rng.u64(..2048),
        flush_bytes: rng.u64(1..16384),
        ..ViewOptions::default()
    }
}

const NEVER: Position = Position::new(u64::MAX);

#[test]
fn poison_stops_its_row_and_no_other_and_a_mended_fold_makes_up_for_it() {
    for round in 0..4 {
        let (mut dir, mut rng) = (tempfile::tempdir().unwrap(), rng(round));
        let mut store = open(dir.path());
        let sums = Sums::<1>::default();
        let mut view = store.view_with(sums.clone(), small_steps(&mut rng)).unwrap();
        for _ in 0..60 {
            append(&store, random_batch(&mut rng));
            match rng.u8(0..10) {
                0 => {
                    drop(view);
                    view = store.view_with(sums.clone(), small_steps(&mut rng)).unwrap();
                }
                1 => {
                    // What a power cut leaves: what was flushed.
                    drop(view);
                    view = store.view(sums.clone()).unwrap();
                    append(&store, random_batch(&mut rng));
                    catch_up(&view);
                    let left = copy_at_a_moment(dir.path());
                    drop((view, store, dir));
                    dir = left;
                    store = open(dir.path());
                    view = store.view_with(sums.clone(), small_steps(&mut rng)).unwrap();
                }
                _ => catch_up(&view),
            }
            if rng.bool() {
                catch_up(&view);
                let (found, position) = contents(&view);
                assert_eq!(found, model(&store, position, NEVER));
            }
        }
        catch_up(&view);
        let (found, mended) = contents(&view);
        assert_eq!(found, model(&store, mended, NEVER));
        assert!(found.parked.len() > 1 && !found.unrouted.is_empty(), "{found:?}");

        sums.is_mended.store(true, Ordering::SeqCst);
        for _ in 0..10 {
            append(&store, random_batch(&mut rng));
        }
        catch_up(&view);
        let (found, position) = contents(&view);
        assert_eq!(found, model(&store, position, mended), "what is parked queues on");
        for (key, list) in &found.parked {
            // Events come in meanwhile.
            append(&store, random_batch(&mut rng));
            let retried = view.retry(key).unwrap();
            assert_eq!((retried.left, retried.reason), (0, None));
            assert!(retried.applied >= list.len() as u64);
        }
        catch_up(&view);
        let (found, position) = contents(&view);
        let all = model(&store, position, Position::START);
        assert_eq!((&found.rows, found.parked.len()), (&all.rows, 0));
        for position in &found.unrouted {
            view.discard_unrouted(*position).unwrap();
        }
        assert!(view.status().parked.is_empty());
        let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        assert!(rebuilt.compared.unwrap().is_equal());
    }
}

#[test]
fn a_discarded_event_is_left_out_now_and_by_every_later_build() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let key = (0, 7);
    let events = [
        (1, Poison::No),
        (2, Poison::Error),
        (4, Poison::No),
        (8, Poison::Index),
        (16, Poison::No),
    ];
    append(&store, events.map(|(value, poison)| added(7, value, poison)).to_vec());
    append(&store, vec![undecodable()]);
    let view = store.view(Sums::<1>::default()).unwrap();
    catch_up(&view);
    let at = Position::new;
    let parked: Vec<_> = view.parked_events(&key).map(|it| it.unwrap().position).collect();
    assert_eq!(parked, [1, 2, 3, 4].map(at));
    assert!(matches!(view.discard(&key, at(0)), Err(ParkedError::NotParked)));
    assert!(matches!(view.discard(&(0, 8), at(1)), Err(ParkedError::NotParked)));
    assert!(matches!(view.retry(&(0, 8)), Err(ParkedError::NotParked)));
    assert!(matches!(view.discard_unrouted(at(1)), Err(ParkedError::NotParked)));

    let retried = view.retry(&key).unwrap();
    assert_eq!((retried.applied, retried.left), (0, 4), "{retried:?}");
    assert!(retried.reason.unwrap().contains("no such sum"));
    let retried = view.discard(&key, at(1)).unwrap();
    assert_eq!((retried.applied, retried.left), (2, 2), "as far as the next one");
    assert!(retried.reason.unwrap().contains("what a row"));
    assert_eq!(view.get(&key).unwrap().unwrap().count, 2);
    // It can't be built anew: there is still poison.
    let halted = view.rebuild(RebuildOptions::default()).unwrap().wait();
    assert!(halted.is_err(), "{halted:?}");

    let retried = view.discard(&key, at(3)).unwrap();
    assert_eq!((retried.left, retried.reason), (0, None));
    view.discard_unrouted(at(5)).unwrap();
    assert!(view.status().parked.is_empty());
    let row = view.get(&key).unwrap().unwrap();
    assert_eq!(row.count, 3);
    assert_eq!(view.get(&(1, 1)).unwrap().unwrap().count, 5, "discarded for one row only");
    let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    assert!(rebuilt.compared.unwrap().is_equal());
    drop(view);

    // A later version, and one whose rows were deleted: event by event.
    let view = store.view(Sums::<2>::default()).unwrap();
    catch_up(&view);
    assert_eq!(view.get(&key).unwrap().unwrap(), row);
    assert!(view.status().parked.is_empty());
    let generation = view.status().generation;
    drop(view);
    std::fs::remove_dir_all(generation).unwrap();
    let view = store.view(Sums::<2>::default()).unwrap();
    catch_up(&view);
    assert_eq!(view.get(&key).unwrap().unwrap(), row);
    assert!(view.status().parked.is_empty());
}

#[test]
fn a_read_that_names_its_write_is_told_what_the_row_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(Sums::<1>::default()).unwrap();
    let before = append(&store, vec![added(1, 1, Poison::No), added(2, 1, Poison::No)]);
    let poison = append(&store, vec![added(1, 2, Poison::Error)]);
    view.wait_for(&poison, PATIENCE).unwrap();
    let refused = view.get_at_least(&(0, 1), &poison, PATIENCE);
    let Err(ViewReadError::Degraded { degraded, .. }) = refused else { panic!("{refused:?}") };
    assert!(matches!(degraded, Degraded::Parked { events: 1, .. }), "{degraded}");
    let count = |row: Option<Sum>| row.map(|row| row.count);
    assert_eq!(count(view.get_at_least(&(0, 1), &before, PATIENCE).unwrap()), Some(1));
    assert_eq!(count(view.get(&(0, 1)).unwrap()), Some(1));
    assert_eq!(count(view.get_at_least(&(0, 2), &poison, PATIENCE).unwrap()), Some(1));
    assert_eq!(view.get_checked(&(0, 2)).unwrap().degraded, None);

    // A snapshot says it of its own moment, whatever comes later.
    let snapshot = view.snapshot().unwrap();
    let unrouted = append(&store, vec![undecodable()]);
    let refused = view.get_at_least(&(0, 2), &unrouted, PATIENCE);
    let Err(ViewReadError::Degraded { degraded, .. }) = refused else { panic!("{refused:?}") };
    assert!(matches!(degraded, Degraded::Unrouted { events: 1, .. }), "{degraded}");
    let event = view.unrouted_events().next().unwrap().unwrap();
    assert_eq!((event.event_type.as_str(), event.stream.as_str()), ("sum.added", "sums"));
    assert!(event.reason.contains("decoded"), "{}", event.reason);
    let counts = snapshot.parked_counts().unwrap();
    assert_eq!((counts.keys, counts.unrouted), (1, 0));
    assert_eq!(snapshot.get_checked(&(0, 2)).unwrap().degraded, None);
    let checked = view.snapshot().unwrap().get_checked(&(0, 2)).unwrap();
    assert!(matches!(checked.degraded, Some(Degraded::Unrouted { .. })), "{checked:?}");
    view.discard_unrouted(event.position).unwrap();
    assert_eq!(count(view.get_at_least(&(0, 2), &unrouted, PATIENCE).unwrap()), Some(1));
    view.close().unwrap();
    assert!(matches!(view.retry(&(0, 1)), Err(ParkedError::NotFollowing)));
}

/// More of them than are folded at once.
#[test]
fn what_is_parked_can_be_retried_when_the_journal_has_removed_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sums = Sums::<1>::default();
    let view = store.view(sums.clone()).unwrap();
    append(&store, vec![added(1, 1, Poison::Error)]);
    for value in 0..1000 {
        append(&store, vec![added(1, value, Poison::No)]);
    }
    catch_up(&view);
    let expected = model(&store, NEVER, Position::START).rows;
    view.close().unwrap();
    drop(view);
    let to_end = Options::new(Until::Position(store.journal().end().position));
    let target = store.plan_retention(&to_end).unwrap().target;
    store.retain(&to_end.history(History::Forget(target))).unwrap();
    assert!(store.journal().start().position > Position::new(500));

    let view = store.view(sums.clone()).unwrap();
    assert_eq!(view.get(&(0, 1)).unwrap(), None);
    sums.is_mended.store(true, Ordering::SeqCst);
    let retried = view.retry(&(0, 1)).unwrap();
    assert_eq!((retried.applied, retried.left), (1001, 0));
    assert_eq!(contents(&view).0.rows, expected);
}

/// A decision is durable together with what it has made of the rows, though they weren't to be flushed yet: whoever
/// compares what is on disk knows of both.
#[test]
fn a_power_cut_behind_a_decision_loses_neither_the_decision_nor_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(Sums::<1>::default()).unwrap();
    append(&store, vec![added(1, 1, Poison::Error), added(1, 2, Poison::No)]);
    catch_up(&view);
    drop(view); // parked, durably
    let view = store.view(Sums::<1>::default()).unwrap();
    append(&store, vec![added(1, 3, Poison::No), added(2, 1, Poison::Error)]);
    catch_up(&view);
    view.discard(&(0, 1), Position::new(0)).unwrap();
    view.discard(&(0, 2), Position::new(3)).unwrap();
    let (before, _) = contents(&view);
    assert!(before.parked.is_empty());

    let left = copy_at_a_moment(dir.path());
    let store = open(left.path());
    let view = store.view(Sums::<1>::default()).unwrap();
    catch_up(&view);
    assert_eq!(view.status().parked.keys, 0);
    assert_eq!(contents(&view).0, before);
}

/// It was only in memory that the events weren't parked any more: a process that was killed had them parked again, though
/// whoever had asked was told that they are folded, and nothing in the journal made up for it.
#[test]
fn a_crash_behind_a_retry_takes_nothing_of_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sums = Sums::<1>::default();
    append(&store, vec![added(1, 1, Poison::Error), added(1, 2, Poison::No)]);
    let view = store.view(sums.clone()).unwrap();
    catch_up(&view);
    drop(view); // parked, durably
    let view = store.view(sums.clone()).unwrap();
    catch_up(&view);
    sums.is_mended.store(true, Ordering::SeqCst);
    let retried = view.retry(&(0, 1)).unwrap();
    assert_eq!((retried.applied, retried.left), (2, 0));
    let (before, _) = contents(&view);
    assert!(before.parked.is_empty());

    let left = copy_at_a_moment(dir.path());
    let store = open(left.path());
    let view = store.view(Sums::<1>::default()).unwrap();
    catch_up(&view);
    assert_eq!(contents(&view).0, before);
}

/// Decisions named an event by its position alone. A journal that was restored from a backup keeps its id, and other events
/// came to the positions of those that were lost: they were left out of every later generation, and nothing told.
#[test]
fn another_event_at_the_place_of_a_discarded_one_is_folded() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, backup) = (dir.path().join("journal"), dir.path().join("backup"));
    let (key, at) = ((0, 7), Position::new);
    let store = open(dir.path());
    append(&store, vec![added(7, 1, Poison::No)]);
    store.close().unwrap();
    copy_dir(&journal, &backup);
    let store = open(dir.path());
    let view = store.view(Sums::<1>::default()).unwrap();
    let lost = [undecodable(), added(7, 2, Poison::Error), added(7, 4, Poison::Error)];
    append(&store, lost.to_vec());
    catch_up(&view);
    view.discard_unrouted(at(1)).unwrap();
    view.discard(&key, at(2)).unwrap();
    view.discard(&key, at(3)).unwrap();
    assert_eq!((view.get(&key).unwrap().unwrap().count, view.status().parked.keys), (1, 0));
    drop(view);
    store.close().unwrap();
    replace_dir(&backup, &journal);

    let store = open(dir.path());
    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let sums = Sums::<1>::default();
    let view = store.view_with(sums.clone(), accepted).unwrap();
    let others = [Poison::No, Poison::No, Poison::Error];
    append(&store, others.map(|poison| added(7, 8, poison)).to_vec());
    catch_up(&view);
    let (found, end) = contents(&view);
    assert_eq!(found, model(&store, end, NEVER), "folded as they come");
    sums.is_mended.store(true, Ordering::SeqCst);
    assert_eq!(view.retry(&key).unwrap().left, 0);
    let all = model(&store, end, Position::START);
    assert_eq!(contents(&view).0, all, "retried");
    let on_difference = OnDifference::Replace;
    let in_bulk = RebuildOptions { on_difference, ..RebuildOptions::default() };
    view.rebuild(in_bulk).unwrap().wait().unwrap();
    assert_eq!(contents(&view).0, all, "built in bulk");
}

/// What one version decides is taken over by those that haven't come to the event, and is no business of those that have
/// applied it.
#[test]
fn a_decision_counts_for_the_versions_that_have_not_applied_the_event() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (key, at) = ((0, 7), Position::new);
    append(
        &store,
        vec![added(7, 1, Poison::No), added(7, 2, Poison::Error), added(7, 4, Poison::No)],
    );
    let old = store.view(Sums::<1>::default()).unwrap();
    catch_up(&old);
    // The next version can fold it.
    let mended = || Sums::<2> { is_mended: Arc::new(AtomicBool::new(true)) };
    let new = store.view(mended()).unwrap();
    catch_up(&new);
    assert_eq!(new.get(&key).unwrap().unwrap().count, 3);
    assert_eq!(old.discard(&key, at(1)).unwrap().left, 0);
    assert_eq!(old.get(&key).unwrap().unwrap().count, 2);
    let proven = |view: &ViewHandle<Sums<2>>| {
        let compared = view.check(RebuildOptions::default()).unwrap();
        assert!(compared.is_equal(), "{compared:?}");
        let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        assert!(rebuilt.compared.unwrap().is_equal());
        assert_eq!(view.get(&key).unwrap().unwrap().count, 3);
    };
    proven(&new);
    drop(new);
    let new = store.view(mended()).unwrap();
    catch_up(&new);
    proven(&new);
    drop(new);

    // A decision about what it hasn't come to is its own from then on, also when it has passed it.
    append(&store, vec![added(7, 8, Poison::Error), added(7, 16, Poison::No)]);
    catch_up(&old);
    assert_eq!(old.discard(&key, at(3)).unwrap().left, 0);
    for _ in 0..2 {
        let new = store.view(mended()).unwrap();
        catch_up(&new);
        assert_eq!(new.get(&key).unwrap().unwrap().count, 4, "all but the last decision's");
        let compared = new.check(RebuildOptions::default()).unwrap();
        assert!(compared.is_equal(), "{compared:?}");
    }
    assert!(old.check(RebuildOptions::default()).unwrap().is_equal());
    // And a version that begins takes over all.
    let third = store.view(Sums::<3> { is_mended: Arc::new(AtomicBool::new(true)) }).unwrap();
    catch_up(&third);
    assert_eq!(third.get(&key).unwrap().unwrap().count, 3);
    assert!(third.check(RebuildOptions::default()).unwrap().is_equal());
}

/// A row that can be written but not be read back.
#[derive(Debug)]
struct Sizes;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Large {
    Text(String),
    /// Small on disk, and large in memory.
    Numbers(Vec<u64>),
}

impl View for Sizes {
    const NAME: &'static str = "sizes";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = (u64, Large);
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        keys.add(event.data()[0]);
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<(u64, Large)>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<(u64, Large)>, FoldError> {
        let count = row.map_or(0, |row| row.0) + 1;
        let mib = usize::from(event.data()[2]) << 20;
        Ok(Fold::Put((
            count,
            match event.data()[1] {
                0 => Large::Text("7".repeat(mib)),
                _ => Large::Numbers(vec![7; mib / 8]),
            },
        )))
    }
}

#[test]
fn a_row_that_is_too_large_to_be_read_back_parks_its_event_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(Sizes).unwrap();
    // Key, kind, MiB.
    let events = [[1, 0, 1], [1, 0, 63], [2, 1, 63], [1, 0, 65], [2, 1, 65], [1, 0, 1], [3, 0, 1]];
    for event in events {
        let token = append(&store, vec![NewEvent::raw("sized", event.to_vec()).unwrap()]);
        view.wait_for(&token, PATIENCE).unwrap();
    }
    let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
    let places: Vec<_> = parked.iter().map(|it| (it.key, it.first.get(), it.events)).collect();
    assert_eq!(places, [(1, 3, 2), (2, 4, 1)]);
    for it in &parked {
        assert!(it.reason.contains("too large") && it.reason.contains("64 MiB"), "{}", it.reason);
    }
    assert_eq!(view.get(&1).unwrap().map(|row| row.0), Some(2));
    assert_eq!(view.get(&2).unwrap().map(|row| row.0), Some(1));
    assert_eq!(view.get(&3).unwrap().map(|row| row.0), Some(1));
    assert!(matches!(view.status().state, ViewState::CaughtUp));
    let halted = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert!(halted.to_string().contains("too large"), "{halted}");
}

/// A key that can't be encoded if it is this one.
static REFUSED: AtomicU8 = AtomicU8::new(3);
/// One that can't be decoded.
static UNREADABLE: AtomicU8 = AtomicU8::new(255);

#[derive(Clone, Debug, PartialEq)]
struct Picky(u8);

impl ViewKey for Picky {
    fn encode_key(&self, out: &mut Vec<u8>) {
        assert_ne!(self.0, REFUSED.load(Ordering::SeqCst), "what a key");
        self.0.encode_key(out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        let key = u8::decode_key(input)?;
        assert_ne!(key, UNREADABLE.load(Ordering::SeqCst), "what a stored key");
        Ok(Self(key))
    }
}

/// Counts events by their first two bytes; 6 and 7 can't be counted.
#[derive(Debug)]
struct Pickies;

impl View for Pickies {
    const NAME: &'static str = "pickies";
    const VERSION: u32 = 1;
    type Key = Picky;
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<Picky>) {
        keys.extend(event.data().iter().take(2).map(|key| Picky(*key)));
    }

    fn fold(
        &self,
        key: &Picky,
        row: Option<u64>,
        _: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        if [6, 7].contains(&key.0) { Err("no".into()) } else { Ok(Fold::Put(row.unwrap_or(0) + 1)) }
    }
}

/// Only `route` was guarded, and not the encoding of the keys that it had named: such a panic stopped the whole view, at
/// every opening, without a word of which event it was; a first build in bulk didn't even try the ordered way.
#[test]
fn a_key_that_cannot_be_encoded_parks_its_event_and_stops_nothing() {
    let stream = StreamId::new("pickies").unwrap();
    for event_bytes in [2, 600 << 10] {
        // More than 1 MiB is built in bulk at first.
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let append = |keys: [u8; 2]| {
            let mut data = keys.to_vec();
            data.resize(event_bytes, 0);
            let event = NewEvent::raw("pickies.counted", data).unwrap();
            store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
        };
        REFUSED.store(3, Ordering::SeqCst);
        append([2, 2]);
        append([2, 3]);
        append([2, 4]);
        let options = ViewOptions { on_undecodable: OnPoison::Stop, ..ViewOptions::default() };
        let view = store.view_with(Pickies, options).unwrap();
        let stopped = crate::views::stopped(&view);
        assert!(matches!(&*stopped, StopError::Event { position, .. } if position.get() == 1));
        assert!(stopped.to_string().contains("what a key"), "{stopped}");
        drop(view);
        std::fs::remove_dir_all(dir.path().join("store/views")).unwrap();

        let view = store.view(Pickies).unwrap();
        catch_up(&view);
        append([3, 4]);
        catch_up(&view);
        let rows: Vec<_> = view.range(..).map(Result::unwrap).collect();
        assert_eq!(rows, [(Picky(2), 2), (Picky(4), 1)]);
        let unrouted: Vec<_> = view.unrouted_events().map(Result::unwrap).collect();
        assert_eq!(unrouted.iter().map(|it| it.position.get()).collect::<Vec<_>>(), [1, 3]);
        assert!(unrouted.iter().all(|it| it.reason.contains("what a key")), "{unrouted:?}");
        // Large events are routed side by side: it may be either that a rebuild comes to first.
        let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait();
        let Err(RebuildError::Stopped(failed)) = rebuilt else { panic!("{rebuilt:?}") };
        let at = failed.position().map(Position::get);
        assert!(matches!(&*failed, StopError::Event { .. }) && [Some(1), Some(3)].contains(&at));

        // The event of a row that is parked names a row whose key can't be encoded any more.
        append([8, 6]);
        catch_up(&view);
        REFUSED.store(8, Ordering::SeqCst);
        let retried = view.retry(&Picky(6)).unwrap();
        assert!(retried.reason.as_ref().unwrap().contains("what a key"), "{retried:?}");
        assert_eq!(retried.left, 1);
        assert!(matches!(view.status().state, ViewState::CaughtUp));
    }
}

/// Of all that a retry calls, the decoding of the key alone wasn't guarded: whoever asked had stopped the view for good.
#[test]
fn a_key_that_cannot_be_decoded_leaves_its_events_parked_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(Pickies).unwrap();
    let append = |keys: [u8; 2]| {
        let token = append(&store, vec![NewEvent::raw("pickies.counted", keys).unwrap()]);
        view.wait_for(&token, PATIENCE).unwrap();
    };
    append([7, 1]);
    append([7, 1]);
    UNREADABLE.store(7, Ordering::SeqCst);
    let retried = view.retry(&Picky(7)).unwrap();
    assert!(retried.reason.as_ref().unwrap().contains("what a stored key"), "{retried:?}");
    assert_eq!((retried.applied, retried.left), (0, 2));
    let retried = view.discard(&Picky(7), Position::START).unwrap();
    assert!(retried.reason.as_ref().unwrap().contains("what a stored key"), "{retried:?}");
    assert_eq!((retried.applied, retried.left), (1, 1));
    append([7, 1]);
    assert_eq!(view.get(&Picky(1)).unwrap(), Some(3));
    UNREADABLE.store(255, Ordering::SeqCst);
    let retried = view.retry(&Picky(7)).unwrap();
    assert_eq!((retried.left, retried.reason.unwrap().contains("what a stored key")), (2, false));
    for position in [1, 2] {
        UNREADABLE.store(7, Ordering::SeqCst);
        let retried = view.discard(&Picky(7), Position::new(position)).unwrap();
        assert_eq!(retried.left, 2 - position, "nothing is folded if all is left out");
        assert_eq!(retried.reason.is_some(), position == 1);
    }
    UNREADABLE.store(255, Ordering::SeqCst);
    assert!(view.status().parked.is_empty() && matches!(view.status().state, ViewState::CaughtUp));
}
