//! Views over a real journal: what they answer, how they recover, what they notice.
//!
//! The view under test keeps a row per account whose `trace` depends on every event, on its place in the
//! order and on how often it was folded. It is compared with a recount that knows nothing of views.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::view::{
    self, EventFailure, Fold, FoldError, Keys, LostTail, OnPoison, StopError, View, ViewError,
    ViewHandle, ViewOptions, ViewSnapshot, ViewState, WaitError,
};
use headwater::{
    Append, AppendError, ExpectedRevision, Incarnation, Ingest, Journal, JournalOptions, NewEvent,
    Position, Recorded, Store, StreamId, Token,
};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

/// Long enough for any machine; no test waits it out unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Paid {
    account: String,
    cents: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Closed {
    account: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Noise {
    loudness: u8,
}

headwater::events! {
    /// What happens to accounts.
    enum AccountEvent {
        Paid(Paid) = "account.paid", version 1;
        Closed(Closed) = "account.closed", version 1;
    }
}

headwater::events! {
    /// What the view knows nothing of.
    enum OtherEvent {
        Noise(Noise) = "other.noise", version 1;
    }
}

/// A key that shows whether order holds within tuples: kind of row, name.
type Key = (u8, String);

const ONE_ACCOUNT: u8 = 0;
const BY_INITIAL: u8 = 1;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Row {
    events: u64,
    trace: u64,
    last: u64,
}

type Recount = BTreeMap<Key, Row>;

fn keys_of(event: &AccountEvent) -> Vec<Key> {
    let (AccountEvent::Paid(Paid { account, .. }) | AccountEvent::Closed(Closed { account })) =
        event;
    let initial = account.chars().take(1).collect();
    // The second one is named twice: it is to be folded once.
    vec![(ONE_ACCOUNT, account.clone()), (BY_INITIAL, initial), (ONE_ACCOUNT, account.clone())]
}

fn step(key: &Key, row: Option<Row>, event: &Recorded<AccountEvent>) -> Fold<Row> {
    match event.data() {
        // Nothing changes: the row stays as it is, whatever the fold did to its copy.
        AccountEvent::Paid(paid) if paid.cents == 0 => Fold::Keep,
        AccountEvent::Closed(_) if key.0 == ONE_ACCOUNT => Fold::Delete,
        AccountEvent::Closed(_) => Fold::Keep,
        AccountEvent::Paid(paid) => {
            let row = row.unwrap_or_default();
            let position = event.position().get();
            let trace = row.trace.wrapping_mul(31).wrapping_add(paid.cents).wrapping_add(position);
            Fold::Put(Row { events: row.events + 1, trace, last: position })
        }
    }
}

/// Holds a view's thread at the first event that it is to route, until it is opened.
#[derive(Clone, Debug, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn closed() -> Self {
        let gate = Self::default();
        *gate.0.0.lock() = true;
        gate
    }

    fn open(&self) {
        *self.0.0.lock() = false;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut closed = self.0.0.lock();
        self.0.1.wait_while(&mut closed, |closed| *closed);
    }
}

/// A test that fails doesn't wait for ever for the view that it holds.
impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

#[derive(Clone, Debug, Default)]
struct Accounts<const VERSION: u32 = 1> {
    gate: Gate,
}

impl<const VERSION: u32> View for Accounts<VERSION> {
    const NAME: &'static str = "accounts";
    const VERSION: u32 = VERSION;
    type Key = Key;
    type Row = Row;
    type Event = AccountEvent;

    fn route(&self, event: &Recorded<AccountEvent>, keys: &mut Keys<Key>) {
        self.gate.pass();
        keys.extend(keys_of(event.data()));
    }

    fn fold(
        &self,
        key: &Key,
        row: Option<Row>,
        event: &Recorded<AccountEvent>,
    ) -> Result<Fold<Row>, FoldError> {
        Ok(step(key, row, event))
    }
}

/// Fails at accounts with a certain name, in the way that their name says.
#[derive(Debug)]
struct Fragile;

impl View for Fragile {
    const NAME: &'static str = "fragile";
    const VERSION: u32 = 1;
    type Key = Key;
    type Row = Row;
    type Event = AccountEvent;

    fn route(&self, event: &Recorded<AccountEvent>, keys: &mut Keys<Key>) {
        keys.extend(keys_of(event.data()));
    }

    fn fold(
        &self,
        key: &Key,
        row: Option<Row>,
        event: &Recorded<AccountEvent>,
    ) -> Result<Fold<Row>, FoldError> {
        match key.1.as_str() {
            "error" => Err("no such account".into()),
            "panic" => panic!("what an account"),
            _ => Ok(step(key, row, event)),
        }
    }
}

fn recount(journal: &Journal, end: Position) -> Recount {
    let mut rows = Recount::new();
    let events = journal.read_all(Position::START).unwrap().map(Result::unwrap);
    for event in events.take_while(|event| event.position() < end) {
        for event in event.decode::<AccountEvent>().unwrap() {
            let mut keys = keys_of(event.data());
            keys.truncate(2);
            for key in keys {
                match step(&key, rows.get(&key).cloned(), &event) {
                    Fold::Put(row) => drop(rows.insert(key, row)),
                    Fold::Delete => drop(rows.remove(&key)),
                    Fold::Keep => {}
                }
            }
        }
    }
    rows
}

fn rows<V: View<Key = Key, Row = Row>>(snapshot: &ViewSnapshot<V>) -> Recount {
    let rows: Vec<(Key, Row)> = snapshot.range(..).map(Result::unwrap).collect();
    assert!(rows.is_sorted_by(|a, b| a.0 < b.0), "rows come in the order of their keys");
    rows.into_iter().collect()
}

/// The view holds exactly what the events in front of its checkpoint make.
fn assert_is_prefix<V: View<Key = Key, Row = Row>>(
    view: &ViewHandle<V>,
    journal: &Journal,
) -> Position {
    let snapshot = view.snapshot().unwrap();
    let position = snapshot.checkpoint().position;
    assert_eq!(rows(&snapshot), recount(journal, position), "at position {position}");
    position
}

fn paid(account: &str, cents: u64) -> NewEvent {
    NewEvent::typed(&AccountEvent::from(Paid { account: account.into(), cents })).unwrap()
}

fn random_event(rng: &mut Rng) -> NewEvent {
    let account: String =
        (0..rng.usize(0..3)).map(|_| rng.choice(['a', 'b', '\0']).unwrap()).collect();
    match rng.u8(0..10) {
        0 => NewEvent::typed(&OtherEvent::from(Noise { loudness: rng.u8(..) })).unwrap(),
        1 => NewEvent::typed(&AccountEvent::from(Closed { account })).unwrap(),
        2 => paid(&account, 0),
        _ => paid(&account, rng.u64(1..100)),
    }
}

fn random_batch(rng: &mut Rng) -> Vec<NewEvent> {
    (0..rng.usize(1..6)).map(|_| random_event(rng)).collect()
}

/// Small steps, so that chunks, flushes and batches don't coincide.
fn small_steps(rng: &mut Rng) -> ViewOptions {
    ViewOptions {
        chunk_bytes: rng.u64(1..4096),
        row_cache_bytes: rng.u64(..2048),
        flush_bytes: rng.u64(1..16384),
        ..ViewOptions::default()
    }
}

/// A view that stops at what it can't apply.
fn stopping() -> ViewOptions {
    let (on_poison, on_undecodable) = (OnPoison::Stop, OnPoison::Stop);
    ViewOptions { on_poison, on_undecodable, ..ViewOptions::default() }
}

/// Asks again until it is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    try_copy_dir(from, to).unwrap();
}

fn try_copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => try_copy_dir(&entry.path(), &to)?,
            false => drop(std::fs::copy(entry.path(), to)?),
        }
    }
    Ok(())
}

/// Copies a directory in which files come and go, as of a moment between: none came or went while it was copied.
pub(crate) fn copy_open_dir(from: &Path, to: &Path) {
    loop {
        let before = files_of(from);
        let copied = try_copy_dir(from, to);
        match copied {
            Ok(()) if before.is_ok_and(|before| files_of(from).is_ok_and(|it| it == before)) => {
                return;
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{error}"),
            _ => std::fs::remove_dir_all(to).unwrap(),
        }
    }
}

fn files_of(dir: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => files.extend(files_of(&entry.path())?),
            false => drop(files.insert(entry.path())),
        }
    }
    Ok(files)
}

pub(crate) fn replace_dir(with: &Path, at: &Path) {
    std::fs::remove_dir_all(at).unwrap();
    copy_dir(with, at);
}

/// A store whose journal is written to, with small segments.
struct Origin(Store);

impl Origin {
    /// Opens the store, creating it if there is none.
    fn open(dir: &Path) -> Self {
        let options = JournalOptions {
            segment_bytes_first: 64 << 10,
            segment_bytes_max: 64 << 10,
            batch_bytes_max: 32 << 10,
            group_bytes_max: 32 << 10,
            ..JournalOptions::default()
        };
        let builder = Store::builder(dir).create_if_missing().journal_options(options);
        Self(builder.open().unwrap())
    }

    fn journal(&self) -> &Journal {
        self.0.journal()
    }

    fn append(&self, events: Vec<NewEvent>) -> Token {
        let stream = StreamId::new("accounts").unwrap();
        let append = Append::to(&stream, ExpectedRevision::Any, events);
        self.0.append(&append).unwrap().token()
    }

    fn close(self) {
        self.0.close().unwrap();
    }
}

/// A scratch directory with a store.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn views(&self) -> PathBuf {
        self.dir.path().join("views")
    }

    fn journal_dir(&self) -> PathBuf {
        self.dir.path().join("journal")
    }

    fn origin(&self) -> Origin {
        Origin::open(self.dir.path())
    }

    fn try_view<const VERSION: u32>(
        &self,
        journal: &Journal,
        options: ViewOptions,
    ) -> Result<ViewHandle<Accounts<VERSION>>, ViewError> {
        view::open(&self.views(), journal.clone(), Accounts::default(), options)
    }

    fn view(&self, journal: &Journal) -> ViewHandle<Accounts> {
        self.try_view(journal, ViewOptions::default()).unwrap()
    }

    /// A view that doesn't move from where it was stored until the gate is opened.
    fn held_view(&self, journal: &Journal) -> (ViewHandle<Accounts>, Gate) {
        let gate = Gate::closed();
        let accounts = Accounts { gate: gate.clone() };
        let view = view::open(&self.views(), journal.clone(), accounts, ViewOptions::default());
        (view.unwrap(), gate)
    }
}

fn catch_up<V: View>(view: &ViewHandle<V>) {
    until("caught up", || matches!(view.status().state, ViewState::CaughtUp));
}

pub(crate) fn stopped<V: View>(view: &ViewHandle<V>) -> Arc<StopError> {
    until("stopped", || matches!(view.status().state, ViewState::Stopped(_)));
    match view.status().state {
        ViewState::Stopped(error) => error,
        other => panic!("{other:?}"),
    }
}

/// The replayable seed of the i-th round.
fn rng(round: u64) -> Rng {
    let seed = std::env::var("HEADWATER_SEED").map_or(round, |seed| seed.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    Rng::with_seed(seed)
}

#[test]
fn a_view_equals_a_recount_at_every_checkpoint() {
    for round in 0..6 {
        let (world, mut rng) = (World::new(), rng(round));
        let origin = world.origin();
        let mut view = world.try_view::<1>(origin.journal(), small_steps(&mut rng)).unwrap();
        for _ in 0..40 {
            let token = origin.append(random_batch(&mut rng));
            match rng.u8(0..8) {
                0 => {
                    if rng.bool() {
                        view.close().unwrap();
                        assert_eq!(view.checkpoint().durable, view.checkpoint().applied);
                    }
                    drop(view);
                    view = world.try_view(origin.journal(), small_steps(&mut rng)).unwrap();
                }
                1..4 => view.wait_for(&token, PATIENCE).unwrap(),
                _ => {}
            }
            assert_is_prefix(&view, origin.journal());
        }
        catch_up(&view);
        assert_eq!(assert_is_prefix(&view, origin.journal()), origin.journal().end().position);
    }
}

#[test]
fn deleting_the_folder_and_opening_again_gives_the_same_answers() {
    let (world, mut rng) = (World::new(), rng(1));
    let origin = world.origin();
    for _ in 0..50 {
        origin.append(random_batch(&mut rng));
    }
    let view = world.view(origin.journal());
    catch_up(&view);
    let before = rows(&view.snapshot().unwrap());
    let skipped = view.status().skipped_events;
    drop(view);
    std::fs::remove_dir_all(world.views()).unwrap();
    let view = world.view(origin.journal());
    catch_up(&view);
    assert_eq!(rows(&view.snapshot().unwrap()), before);
    assert_eq!(view.status().skipped_events, skipped);
}

#[test]
fn events_of_other_types_are_skipped_and_counted_across_openings() {
    let world = World::new();
    let origin = world.origin();
    let noise = || NewEvent::typed(&OtherEvent::from(Noise { loudness: 1 })).unwrap();
    for round in 1..=3 {
        origin.append(vec![noise(), paid("a", 1), noise()]);
        let view = world.view(origin.journal());
        catch_up(&view);
        assert_eq!(view.status().skipped_events, 2 * round);
        assert_eq!(view.get(&(ONE_ACCOUNT, "a".to_owned())).unwrap().unwrap().events, round);
    }
}

#[test]
fn ranges_and_prefixes_are_what_they_say() {
    let world = World::new();
    let origin = world.origin();
    let names = ["", "a", "a\0", "ab", "b"];
    let token = origin.append(names.iter().map(|name| paid(name, 1)).collect());
    let view = world.view(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    let key = |name: &str| (ONE_ACCOUNT, name.to_owned());
    let found =
        |rows: view::Rows<Key, Row>| -> Vec<String> { rows.map(|row| row.unwrap().0.1).collect() };
    assert_eq!(found(view.prefix(&ONE_ACCOUNT)), names);
    assert_eq!(found(view.prefix(&BY_INITIAL)), ["", "a", "b"]);
    assert_eq!(found(view.range(key("a")..key("b"))), ["a", "a\0", "ab"]);
    assert_eq!(found(view.range(key("a")..=key("ab"))), ["a", "a\0", "ab"]);
    assert_eq!(found(view.range(..=key("a"))), ["", "a"]);
    assert_eq!(found(view.range(key("ab")..)), ["ab", "b", "", "a", "b"]);
    assert!(found(view.range(key("b")..key("a"))).is_empty());
    let behind_a = (std::ops::Bound::Excluded(key("a")), std::ops::Bound::Excluded(key("ab")));
    assert_eq!(found(view.snapshot().unwrap().range(behind_a)), ["a\0"]);
    assert_eq!(view.get(&key("c")).unwrap(), None);
}

#[test]
fn a_snapshot_stays_as_it_was_while_the_view_goes_on() {
    let world = World::new();
    let origin = world.origin();
    let first = origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    let snapshot = view.snapshot_at_least(&first, PATIENCE).unwrap();
    let second = origin.append(vec![paid("a", 2), paid("b", 2)]);
    view.wait_for(&second, PATIENCE).unwrap();
    assert_eq!(snapshot.checkpoint().position, first.position);
    assert_eq!(rows(&snapshot), recount(origin.journal(), first.position));
    assert_eq!(snapshot.get(&(ONE_ACCOUNT, "b".to_owned())).unwrap(), None);
    assert_eq!(view.get(&(ONE_ACCOUNT, "b".to_owned())).unwrap().unwrap().events, 1);
}

#[test]
fn a_read_sees_the_write_whose_token_it_names() {
    let world = World::new();
    let origin = world.origin();
    let view = world.view(origin.journal());
    for count in 1..=50 {
        let token = origin.append(vec![paid("a", 1)]);
        let row = view.get_at_least(&(ONE_ACCOUNT, "a".to_owned()), &token, PATIENCE).unwrap();
        assert_eq!(row.unwrap().events, count);
    }
}

#[test]
fn a_token_is_honoured_only_by_the_append_that_gave_it() {
    let world = World::new();
    let origin = world.origin();
    let token = origin.append(vec![paid("a", 1)]);
    origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    let lost = Token { incarnation: Incarnation::new(token.incarnation.get() ^ 2), ..token };
    assert!(matches!(view.wait_for(&lost, PATIENCE), Err(WaitError::TokenLost { .. })));
    let foreign = Token { journal: headwater::JournalId::random(), ..token };
    assert!(matches!(view.wait_for(&foreign, PATIENCE), Err(WaitError::ForeignToken { .. })));
    let future = Token { position: Position::new(99), ..token };
    let early = view.wait_for(&future, Duration::from_millis(1));
    assert!(matches!(early, Err(WaitError::Timeout { .. })), "{early:?}");
}

#[test]
fn a_wait_for_a_future_token_is_answered_by_what_really_comes() {
    let world = World::new();
    let origin = world.origin();
    let first = origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    let next = Token { position: Position::new(2), ..first };
    let other = Token { incarnation: Incarnation::new(4), ..next };
    let waiting = |token: Token| {
        let view = view.clone();
        std::thread::spawn(move || view.wait_for(&token, PATIENCE))
    };
    let (real, lost) = (waiting(next), waiting(other));
    origin.append(vec![paid("a", 1)]);
    real.join().unwrap().unwrap();
    assert!(matches!(lost.join().unwrap(), Err(WaitError::TokenLost { .. })));
}

#[test]
fn what_is_applied_becomes_durable_by_bytes_and_by_time() {
    let by_bytes = ViewOptions { flush_bytes: 1, ..ViewOptions::default() };
    let by_time =
        ViewOptions { flush_interval: Duration::from_millis(1), ..ViewOptions::default() };
    for options in [by_bytes, by_time] {
        let world = World::new();
        let origin = world.origin();
        let view = world.try_view::<1>(origin.journal(), options).unwrap();
        for _ in 0..3 {
            let token = origin.append(vec![paid("a", 1)]);
            view.wait_for(&token, PATIENCE).unwrap();
            until("durable", || view.checkpoint().durable.position == token.position);
        }
    }
}

#[test]
fn without_a_reason_to_flush_nothing_is_durable_until_closing() {
    let world = World::new();
    let origin = world.origin();
    let token = origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    assert_eq!(view.checkpoint().durable.position, Position::START);
    view.close().unwrap();
    assert_eq!(view.checkpoint().durable, view.checkpoint().applied);
    assert!(matches!(view.status().state, ViewState::Closed));
    assert_is_prefix(&view, origin.journal());
}

#[test]
fn a_view_ends_with_its_journal_and_has_applied_all_of_it() {
    let world = World::new();
    let origin = world.origin();
    let view = world.view(origin.journal());
    let mut last = origin.append(vec![paid("a", 1)]);
    for _ in 0..100 {
        last = origin.append(vec![paid("a", 1)]);
    }
    let journal = origin.journal().clone();
    origin.close();
    until("closed", || matches!(view.status().state, ViewState::Closed));
    assert_eq!(view.checkpoint().durable.position, last.position);
    assert_is_prefix(&view, &journal);
    let future = Token { position: last.position.advance(1), ..last };
    assert!(matches!(view.wait_for(&future, PATIENCE), Err(WaitError::Closed)));
}

#[test]
fn a_view_is_opened_by_one_handle_at_a_time() {
    let world = World::new();
    let origin = world.origin();
    let view = world.view(origin.journal());
    let second = world.try_view::<1>(origin.journal(), ViewOptions::default());
    assert!(matches!(second, Err(ViewError::InUse { .. })), "{second:?}");
    // Another version is another generation: it can be built while this one serves.
    let other = world.try_view::<2>(origin.journal(), ViewOptions::default()).unwrap();
    let second = world.try_view::<2>(origin.journal(), ViewOptions::default());
    assert!(matches!(second, Err(ViewError::InUse { .. })), "{second:?}");
    drop(view);
    world.view(origin.journal());
    drop(other);
}

#[test]
fn a_higher_version_is_built_anew_and_a_lower_one_finds_its_rows_again() {
    let world = World::new();
    let origin = world.origin();
    origin.append(vec![paid("a", 1)]);
    let folder = |name: &str| world.views().join("accounts").join(name);
    let first = world.view(origin.journal());
    catch_up(&first);
    assert_eq!(first.status().generation, folder("1.1"));
    drop(first);
    let second: ViewHandle<Accounts<2>> =
        world.try_view(origin.journal(), ViewOptions::default()).unwrap();
    catch_up(&second);
    assert_eq!(second.status().generation, folder("2.1"));
    assert_is_prefix(&second, origin.journal());
    drop(second);
    let (first, gate) = world.held_view(origin.journal());
    assert_eq!(first.status().generation, folder("1.1"));
    assert_eq!(first.get(&(ONE_ACCOUNT, "a".to_owned())).unwrap().unwrap().events, 1);
    gate.open();
}

#[test]
fn a_failing_fold_stops_its_view_in_front_of_the_batch_and_nothing_else() {
    for (name, code) in [("error", "view_stop.fold"), ("panic", "view_stop.panic")] {
        let world = World::new();
        let origin = world.origin();
        let good = origin.append(vec![paid("a", 1), paid("b", 2)]);
        let bad = origin.append(vec![paid("a", 3), paid(name, 4), paid("a", 5)]);
        origin.append(vec![paid("a", 6)]);

        let fragile = view::open(&world.views(), origin.journal().clone(), Fragile, stopping());
        let fragile = fragile.unwrap();
        let other = world.view(origin.journal());
        let error = stopped(&fragile);
        assert_eq!(error.code(), code, "{error}");
        assert_eq!(error.position(), Some(Position::new(3)));
        let text = error.to_string();
        assert!(text.contains("fragile") && text.contains("account.paid"), "{text}");
        assert!(text.contains("account"), "the cause is told: {text}");

        assert_eq!(fragile.checkpoint().applied.position, good.position);
        assert_is_prefix(&fragile, origin.journal());
        fragile.wait_for(&good, PATIENCE).unwrap();
        let waited = fragile.wait_for(&bad, PATIENCE);
        assert!(matches!(waited, Err(WaitError::Stopped(_))), "{waited:?}");

        let later = origin.append(vec![paid("a", 7)]);
        other.wait_for(&later, PATIENCE).unwrap();
        fragile.close().unwrap();
        assert_eq!(fragile.checkpoint().durable.position, good.position);
    }
}

#[test]
fn an_undecodable_payload_stops_the_view_at_its_event() {
    let world = World::new();
    let origin = world.origin();
    let good = origin.append(vec![paid("a", 1)]);
    origin.append(vec![paid("a", 2), NewEvent::json("account.paid", &"not a payment").unwrap()]);
    let view = world.try_view::<1>(origin.journal(), stopping()).unwrap();
    let error = stopped(&view);
    assert_eq!(error.position(), Some(Position::new(2)));
    assert!(matches!(&*error, StopError::Event { cause: EventFailure::Payload(_), .. }), "{error}");
    assert_eq!(view.checkpoint().applied.position, good.position);
    drop(view);
    // Again after reopening: it isn't skipped.
    let view = world.try_view::<1>(origin.journal(), stopping()).unwrap();
    assert_eq!(stopped(&view).position(), Some(Position::new(2)));
    assert_is_prefix(&view, &origin.journal().clone());
}

#[test]
fn a_journal_that_lost_its_tail_is_noticed_by_the_view() {
    let world = World::new();
    let backup = world.dir.path().join("backup");
    let origin = world.origin();
    let kept = origin.append(vec![paid("a", 1)]);
    origin.close();
    copy_dir(&world.journal_dir(), &backup);
    let origin = world.origin();
    let lost = origin.append(vec![paid("a", 2), paid("a", 3)]);
    let view = world.view(origin.journal());
    view.wait_for(&lost, PATIENCE).unwrap();
    drop(view);
    origin.close();

    replace_dir(&backup, &world.journal_dir());
    let origin = world.origin();
    let refused = world.try_view::<1>(origin.journal(), ViewOptions::default()).unwrap_err();
    let ViewError::LostTail { checkpoint, end, .. } = &refused else { panic!("{refused}") };
    assert_eq!((checkpoint.position, *end), (lost.position, kept.position));
    // It stays that way until somebody decides.
    assert!(world.try_view::<1>(origin.journal(), ViewOptions::default()).is_err());

    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let view = world.try_view::<1>(origin.journal(), accepted).unwrap();
    catch_up(&view);
    assert_is_prefix(&view, origin.journal());
    let aside = view.status().set_aside.unwrap();
    assert_eq!(aside, world.views().join("accounts/1.1"));
    assert!(aside.join("CURRENT").exists(), "what was set aside is kept");
    drop(view);
    assert_eq!(world.view(origin.journal()).status().set_aside, None);
}

#[test]
fn a_journal_that_was_restored_and_has_grown_again_is_noticed_by_the_view() {
    let lost_events = vec![paid("a", 2), paid("a", 2)];
    let long = (0..40).map(|cents| paid("b", cents)).collect();
    let as_many_in_more_bytes = vec![paid("a", 2), paid(&"b".repeat(999), 2)];
    // The first is identical: only the incarnation tells the histories apart.
    for grown in [lost_events.clone(), as_many_in_more_bytes, long] {
        let world = World::new();
        let backup = world.dir.path().join("backup");
        let origin = world.origin();
        origin.append(vec![paid("a", 1)]);
        origin.close();
        copy_dir(&world.journal_dir(), &backup);
        let origin = world.origin();
        let lost = origin.append(lost_events.clone());
        let view = world.view(origin.journal());
        view.wait_for(&lost, PATIENCE).unwrap();
        drop(view);
        origin.close();

        replace_dir(&backup, &world.journal_dir());
        let origin = world.origin();
        let count = grown.len();
        origin.append(grown);
        let view = world.view(origin.journal());
        assert!(view.status().set_aside.is_some(), "grown by {count} events");
        assert!(matches!(view.wait_for(&lost, PATIENCE), Err(WaitError::TokenLost { .. })));
        catch_up(&view);
        assert_is_prefix(&view, origin.journal());
    }
}

#[test]
fn a_journal_with_fewer_events_in_more_bytes_is_another_history_not_a_lost_tail() {
    let world = World::new();
    let backup = world.dir.path().join("backup");
    let origin = world.origin();
    origin.append(vec![paid("a", 1)]);
    origin.close();
    copy_dir(&world.journal_dir(), &backup);
    let origin = world.origin();
    let lost = origin.append((0..3).map(|cents| paid("a", cents)).collect());
    let view = world.view(origin.journal());
    view.wait_for(&lost, PATIENCE).unwrap();
    drop(view);
    origin.close();
    replace_dir(&backup, &world.journal_dir());
    let origin = world.origin();
    origin.append(vec![paid(&"b".repeat(999), 1)]);
    let view = world.view(origin.journal());
    assert!(view.status().set_aside.is_some());
    catch_up(&view);
    assert_is_prefix(&view, origin.journal());
}

#[test]
fn a_view_of_another_journal_is_set_aside() {
    let world = World::new();
    let origin = world.origin();
    let token = origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    drop(view);
    let other = Origin::open(&world.dir.path().join("other"));
    other.append(vec![paid("b", 1)]);
    let view = world.view(other.journal());
    assert!(view.status().set_aside.is_some());
    catch_up(&view);
    assert_is_prefix(&view, other.journal());
}

/// A mirror that is fed by hand.
struct Mirror(Ingest);

impl Mirror {
    /// Opens the mirror of `journal`, creating it if there is none.
    fn open(dir: &Path, journal: &Journal) -> Self {
        let fs: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
        let options = JournalOptions::default();
        let ingest = Ingest::open(&fs, dir, &options).unwrap();
        Self(ingest.unwrap_or_else(|| Ingest::create(&fs, dir, journal.id(), &options).unwrap()))
    }

    /// Takes over what the mirror lacks.
    fn fetch_from(&mut self, origin: &Journal) {
        let mut cursor = origin.cursor(self.0.end().position).unwrap();
        while let Some(batch) = cursor.next_batch().unwrap() {
            if let Some(page) = batch.page {
                self.0.segment(&page.bytes()).unwrap();
            }
            self.0.batch(batch.batch.bytes()).unwrap();
        }
        self.0.sync().unwrap();
    }

    fn journal(&self) -> &Journal {
        self.0.journal()
    }
}

#[test]
fn a_view_of_a_mirror_gives_the_origins_answers_and_honours_its_tokens() {
    let (world, mut rng) = (World::new(), rng(1));
    let origin = world.origin();
    let mut mirror = Mirror::open(&world.dir.path().join("mirror"), origin.journal());
    let view = world.view(mirror.journal());
    let tokens: Vec<Token> = (0..20).map(|_| origin.append(random_batch(&mut rng))).collect();
    let early = view.wait_for(&tokens[19], Duration::from_millis(1));
    assert!(matches!(early, Err(WaitError::Timeout { .. })), "{early:?}");
    mirror.fetch_from(origin.journal());
    for token in &tokens {
        view.wait_for(token, PATIENCE).unwrap();
    }
    assert_eq!(assert_is_prefix(&view, origin.journal()), tokens[19].position);
}

/// A view that has applied more than its mirror holds: the mirror was put back. Returns the view's last
/// token, and where backups of origin and mirror lie.
fn view_ahead_of_its_mirror(world: &World) -> (Token, PathBuf) {
    let (mirror_dir, backup) = (world.dir.path().join("mirror"), world.dir.path().join("backup"));
    let origin = world.origin();
    origin.append(vec![paid("a", 1)]);
    let mut mirror = Mirror::open(&mirror_dir, origin.journal());
    mirror.fetch_from(origin.journal());
    drop(mirror);
    origin.close();
    copy_dir(&mirror_dir, &backup.join("mirror"));
    copy_dir(&world.journal_dir(), &backup.join("journal"));

    let origin = world.origin();
    let token = origin.append(vec![paid("a", 2), paid("b", 3)]);
    let mut mirror = Mirror::open(&mirror_dir, origin.journal());
    mirror.fetch_from(origin.journal());
    let view = world.view(mirror.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    drop((view, mirror));
    origin.close();
    replace_dir(&backup.join("mirror"), &mirror_dir);
    (token, backup)
}

#[test]
fn a_view_ahead_of_its_mirror_serves_flagged_and_goes_on_when_the_mirror_has_caught_up() {
    let world = World::new();
    let (token, _) = view_ahead_of_its_mirror(&world);
    let origin = world.origin();
    let mut mirror = Mirror::open(&world.dir.path().join("mirror"), origin.journal());
    let view = world.view(mirror.journal());
    assert!(matches!(view.status().state, ViewState::AwaitingMirror));
    assert_eq!(assert_is_prefix(&view, origin.journal()), token.position, "it serves");
    let unjudged = view.wait_for(&token, Duration::from_millis(1));
    assert!(matches!(unjudged, Err(WaitError::Timeout { .. })), "{unjudged:?}");

    let later = origin.append(vec![paid("c", 4)]);
    mirror.fetch_from(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    view.wait_for(&later, PATIENCE).unwrap();
    assert_is_prefix(&view, origin.journal());
    assert_eq!(view.status().set_aside, None);
}

#[test]
fn a_view_of_several_journals_goes_on_when_each_mirror_has_caught_up() {
    let world = World::new();
    let (mirror_dir, backup) = (world.dir.path().join("mirror"), world.dir.path().join("backup"));
    let (own, origin) = (Origin::open(&world.dir.path().join("own")), world.origin());
    let open = |mirror: &Mirror| {
        let journals = [own.journal().clone(), mirror.journal().clone()];
        own.0.view_over(&journals, Accounts::<1>::default(), ViewOptions::default()).unwrap()
    };
    origin.append(vec![paid("a", 1)]);
    Mirror::open(&mirror_dir, origin.journal()).fetch_from(origin.journal());
    copy_dir(&mirror_dir, &backup);
    let token = origin.append(vec![paid("a", 2)]);
    let mut mirror = Mirror::open(&mirror_dir, origin.journal());
    mirror.fetch_from(origin.journal());
    let view = open(&mirror);
    view.wait_for(&token, PATIENCE).unwrap();
    drop((view, mirror));
    replace_dir(&backup, &mirror_dir);
    let mut mirror = Mirror::open(&mirror_dir, origin.journal());
    let view = open(&mirror);
    let beside = own.append(vec![paid("b", 3)]);
    let early = view.wait_for(&beside, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(early, WaitError::Timeout { .. }), "{early}");
    assert!(matches!(view.status().state, ViewState::AwaitingMirror));
    mirror.fetch_from(origin.journal());
    view.wait_for(&beside, PATIENCE).unwrap();
    assert_eq!(view.status().set_aside, None);
}

#[test]
fn a_view_whose_mirror_becomes_another_history_stops_as_a_fork() {
    for events in [2, 30] {
        let world = World::new();
        let (token, backup) = view_ahead_of_its_mirror(&world);
        replace_dir(&backup.join("journal"), &world.journal_dir());
        let origin = world.origin();
        origin.append((0..events).map(|cents| paid("c", cents)).collect());
        let mut mirror = Mirror::open(&world.dir.path().join("mirror"), origin.journal());
        let view = world.view(mirror.journal());
        mirror.fetch_from(origin.journal());
        let error = stopped(&view);
        assert!(matches!(&*error, StopError::Fork { .. }), "{error}");
        assert_eq!(view.checkpoint().applied.position, token.position);
        let of_here = origin.journal().end().token();
        assert!(
            view.wait_for(&of_here, Duration::ZERO).is_err(),
            "its rows are of another history"
        );
        assert!(view.get(&(ONE_ACCOUNT, "b".to_owned())).unwrap().is_some(), "it serves");
    }
}

/// A mirror sets a tail aside: views that had folded some of it are discarded and built anew, others go on; one that is
/// open meanwhile is shown nothing of the new history.
#[test]
fn s4_views_that_have_folded_what_was_set_aside_are_discarded_and_others_go_on() {
    for folded in [true, false] {
        let (world, mirror_dir) = (World::new(), PathBuf::from("mirror"));
        let (mirror_dir, backup) = (world.dir.path().join(mirror_dir), world.dir.path().join("b"));
        let origin = world.origin();
        let common = origin.append(vec![paid("a", 1)]);
        let mut mirror = Mirror::open(&mirror_dir, origin.journal());
        mirror.fetch_from(origin.journal());
        world.view(mirror.journal()).wait_for(&common, PATIENCE).unwrap();
        origin.close();
        copy_dir(&world.journal_dir(), &backup);
        let origin = world.origin();
        let lost = origin.append(vec![paid("a", 2), paid("b", 3)]);
        mirror.fetch_from(origin.journal());
        let view = folded.then(|| world.view(mirror.journal()));
        view.iter().for_each(|view| view.wait_for(&lost, PATIENCE).unwrap());
        origin.close();
        replace_dir(&backup, &world.journal_dir());
        let origin = world.origin();
        origin.append((0..5).map(|cents| paid("c", cents)).collect());

        let aside = mirror.0.set_aside(common.position, &JournalOptions::default()).unwrap();
        let mut mirror = Mirror(aside.0);
        if let Some(view) = view {
            let deadline = Instant::now() + PATIENCE;
            while !matches!(view.status().state, ViewState::Closed | ViewState::Stopped(_)) {
                assert!(Instant::now() < deadline, "{:?}", view.status().state);
                std::thread::yield_now();
            }
            assert_eq!(view.checkpoint().applied.position, lost.position, "it serves what it was");
        }
        let view = world.view(mirror.journal());
        assert_eq!(view.status().set_aside.is_some(), folded);
        mirror.fetch_from(origin.journal());
        catch_up(&view);
        assert_eq!(assert_is_prefix(&view, origin.journal()), origin.journal().end().position);
        assert!(view.get(&(ONE_ACCOUNT, "b".to_owned())).unwrap().is_none(), "of both histories");
        assert!(!view.status().is_forked());
    }
}

#[test]
fn a_journal_that_is_damaged_where_the_view_is_leaves_the_view_serving() {
    let world = World::new();
    let origin = world.origin();
    let view = world.view(origin.journal());
    let big = || paid(&"x".repeat(1000), 1);
    let mut last = origin.append(vec![big()]);
    for _ in 0..200 {
        last = origin.append(vec![big()]);
    }
    view.wait_for(&last, PATIENCE).unwrap();
    drop(view);
    let segment = origin.journal().segments().first().unwrap().path.clone();
    assert!(origin.journal().segments().len() > 1);
    // Opened again, so that nothing of it is in memory.
    drop(origin);
    let origin = world.origin();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[4096 + 200] ^= 1;
    std::fs::write(&segment, bytes).unwrap();

    // What is behind the damage can be judged; the view goes on.
    let view = world.view(origin.journal());
    catch_up(&view);
    drop(view);
    // To build it anew the damaged batch is needed.
    std::fs::remove_dir_all(world.views()).unwrap();
    let view = world.view(origin.journal());
    let error = stopped(&view);
    assert!(matches!(&*error, StopError::Journal { .. }), "{error}");
    assert!(error.to_string().contains("corruption"), "{error}");
    assert!(rows(&view.snapshot().unwrap()).is_empty());
    assert_eq!(view.checkpoint().applied.position, Position::START);
}

/// What a power cut leaves of a view are its files without what is only in memory.
#[test]
fn what_was_not_durable_is_folded_again_after_a_power_cut() {
    let (world, mut rng) = (World::new(), rng(1));
    let origin = world.origin();
    for _ in 0..20 {
        origin.append(random_batch(&mut rng));
    }
    let view = world.view(origin.journal());
    catch_up(&view);
    drop(view);
    let view = world.view(origin.journal());
    let mut last = origin.append(random_batch(&mut rng));
    for _ in 0..20 {
        last = origin.append(random_batch(&mut rng));
    }
    view.wait_for(&last, PATIENCE).unwrap();
    let durable = view.checkpoint().durable;
    assert!(durable.position < last.position);

    let left = World::new();
    copy_dir(world.dir.path(), left.dir.path());
    let origin = left.origin();
    let (view, gate) = left.held_view(origin.journal());
    assert_eq!(view.checkpoint().applied, durable);
    assert_eq!(assert_is_prefix(&view, origin.journal()), durable.position);
    gate.open();
    view.wait_for(&last, PATIENCE).unwrap();
    assert_is_prefix(&view, origin.journal());
}

/// After a loss was noticed, nothing may be appended in place of what was lost.
#[test]
fn a_store_refuses_appends_while_a_view_remembers_lost_events() {
    let world = World::new();
    let backup = world.dir.path().join("backup");
    let origin = world.origin();
    origin.append(vec![paid("a", 1)]);
    origin.close();
    copy_dir(&world.journal_dir(), &backup);
    let origin = world.origin();
    let lost = origin.append(vec![paid("a", 2)]);
    let view = origin.0.view(Accounts::<1>::default()).unwrap();
    view.wait_for(&lost, PATIENCE).unwrap();
    drop(view);
    origin.close();

    replace_dir(&backup, &world.journal_dir());
    let origin = world.origin();
    let stream = StreamId::new("accounts").unwrap();
    let append = Append::to(&stream, ExpectedRevision::Any, vec![paid("a", 3)]);
    assert!(matches!(origin.0.view(Accounts::<1>::default()), Err(ViewError::LostTail { .. })));
    assert!(matches!(origin.0.append(&append), Err(AppendError::LostTail { .. })));
    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let view = origin.0.view_with(Accounts::<1>::default(), accepted).unwrap();
    let token = origin.0.append(&append).unwrap().token();
    view.wait_for(&token, PATIENCE).unwrap();
    assert_is_prefix(&view, origin.journal());
}

#[test]
fn a_damaged_database_is_reported_and_built_anew_once_it_is_moved_away() {
    let world = World::new();
    let origin = world.origin();
    let token = origin.append(vec![paid("a", 1)]);
    let view = world.view(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    let generation = view.status().generation;
    drop(view);
    std::fs::write(generation.join("CURRENT"), "MANIFEST-999999\n").unwrap();
    let error = world.try_view::<1>(origin.journal(), ViewOptions::default()).unwrap_err();
    assert!(error.code().starts_with("view_storage."), "{error}");
    assert!(error.to_string().contains("accounts"), "{error}");
    std::fs::remove_dir_all(&generation).unwrap();
    let view = world.view(origin.journal());
    view.wait_for(&token, PATIENCE).unwrap();
    assert_is_prefix(&view, origin.journal());
}

const CHILD_DIR: &str = "HEADWATER_VIEWS_CHILD_DIR";
const CHILD_SEED: &str = "HEADWATER_VIEWS_CHILD_SEED";

/// How the view is run that is killed; what is appended is many times what may not be durable.
fn steps_to_be_killed(seed: u64) -> ViewOptions {
    let mut rng = Rng::with_seed(seed);
    let (chunk_bytes, flush_bytes) = (rng.u64(1..1024), rng.u64(1..8192));
    ViewOptions { chunk_bytes, flush_bytes, ..small_steps(&mut rng) }
}

/// Not a test: what the kill test below runs in a process of its own, and kills. Appends, with a view that
/// follows, and says so line by line.
#[test]
fn child_that_appends_and_folds() {
    let (Ok(dir), Ok(seed)) = (std::env::var(CHILD_DIR), std::env::var(CHILD_SEED)) else { return };
    let seed = seed.parse().unwrap();
    let (mut rng, options) = (Rng::with_seed(seed), steps_to_be_killed(seed));
    let origin = Origin::open(Path::new(&dir));
    let views = Path::new(&dir).join("views");
    let accounts = Accounts::<1>::default();
    let view = view::open(&views, origin.journal().clone(), accounts, options).unwrap();
    let mut stdout = io::stdout();
    loop {
        let token = origin.append(random_batch(&mut rng));
        if rng.u8(0..4) == 0 {
            view.wait_for(&token, PATIENCE).unwrap();
            writeln!(stdout, "applied {}", view.checkpoint().applied.offset).unwrap();
        }
        writeln!(stdout, "appended {}", token.position).unwrap();
    }
}

/// Starts the child and kills it after a number of appends. Returns the last offset that it has told as applied.
fn run_child_and_kill_it(dir: &Path, seed: u64, appends: usize) -> u64 {
    let this_module = module_path!().split_once("::").unwrap().1;
    let child = format!("{this_module}::child_that_appends_and_folds");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &child, "--nocapture"])
        .env(CHILD_DIR, dir)
        .env(CHILD_SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut seen, mut applied) = (0, 0);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        seen += usize::from(line.starts_with("appended"));
        applied = line.strip_prefix("applied ").map_or(applied, |it| it.parse().unwrap());
        if seen == appends {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(seen, appends, "the child ended by itself");
    applied
}

/// And lacks no more than is to be folded again by what the options say: of two flushes, one of which is under way.
#[test]
fn a_killed_view_holds_exactly_the_prefix_that_its_checkpoint_names() {
    const BATCH_BYTES_MAX: u64 = 2048;
    let world = World::new();
    let mut rng = rng(1);
    let (mut crashes_with_something_durable, mut lacking_max) = (0, 0);
    for _ in 0..40 {
        let seed = rng.u64(..);
        let applied = run_child_and_kill_it(world.dir.path(), seed, rng.usize(1..150));
        let origin = world.origin();
        let (view, gate) = world.held_view(origin.journal());
        let stored = assert_is_prefix(&view, origin.journal());
        assert_eq!(view.status().set_aside, None);
        let steps = steps_to_be_killed(seed);
        let lacking = applied.saturating_sub(view.checkpoint().applied.offset);
        let lacking_bytes_max = 2 * (steps.flush_bytes + steps.chunk_bytes + BATCH_BYTES_MAX);
        assert!(lacking <= lacking_bytes_max, "{lacking} bytes are to be folded again: {steps:?}");
        lacking_max = lacking_max.max(lacking);
        crashes_with_something_durable += usize::from(stored > Position::START);
        gate.open();
        // Half of the time the next child begins with what the crash left.
        if rng.bool() {
            catch_up(&view);
            assert_is_prefix(&view, origin.journal());
        }
    }
    println!("up to {lacking_max} bytes were to be folded again");
    assert!(crashes_with_something_durable > 10, "{crashes_with_something_durable}");
}
