//! Bases of views: a new subscriber serves at once, from rows that it hasn't folded, of a history that it doesn't have; and
//! nothing becomes live that isn't of the journal that it follows.
//!
//! Rows are compared with a recount of all events of the origin that knows nothing of views.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{TryRecvError, channel};
use std::time::{Duration, Instant};

use headwater::retention::{self, History, Options, Until};
use headwater::shipping::{FollowOptions, Mirror, ServeOptions, ShippingError, serve};
use headwater::view::{
    BaseError, Fold, FoldError, Index, Indexes, Keys, RebuildError, RebuildOptions, StopError,
    Table, TableView, Tables, View, ViewBase, ViewError, ViewHandle, ViewOptions, ViewState,
    ViewTxn,
};
use headwater::{
    Append, ExpectedRevision, Journal, JournalId, Locator, NewEvent, Position, ReadError, Recorded,
    Store, StreamId, Token, verify_deep,
};

use crate::shipping::{Origin, SOON, copy_dir, flip_bit, replace_dir, small};

const PATIENCE: Duration = Duration::from_secs(60);

/// The key of an event, and what is wrong with it.
type Payload = [u8; 2];
const FINE: u8 = 0;
const FAILS: u8 = 1;
const NOWHERE: u8 = 2;

/// Depends on all events of its key, and on their order.
type Row = (u64, u64);
type Rows = BTreeMap<u8, Row>;

fn step(row: Option<Row>, position: Position) -> Row {
    let (count, trace) = row.unwrap_or_default();
    (count + 1, trace.wrapping_mul(31).wrapping_add(position.get() + 1))
}

/// `SET` 0: without the index.
#[derive(Clone, Debug, Default)]
struct Traces<const VERSION: u32 = 1, const SET: u8 = 1> {
    is_mended: Arc<AtomicBool>,
}

impl<const VERSION: u32, const SET: u8> Traces<VERSION, SET> {
    const BY_COUNT: Index<Self, u64> = Index::new("by_count", |_, row: &Row, keys| keys.add(row.0));

    fn is_broken(&self, event: &Recorded<Vec<u8>>, how: u8) -> bool {
        event.data().get(1) == Some(&how) && !self.is_mended.load(Ordering::SeqCst)
    }
}

impl<const VERSION: u32, const SET: u8> View for Traces<VERSION, SET> {
    const NAME: &'static str = "traces";
    const VERSION: u32 = VERSION;
    type Key = u8;
    type Row = Row;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        assert!(!self.is_broken(event, NOWHERE), "asked to be lost");
        keys.extend(event.data().first().copied());
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<Row>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<Row>, FoldError> {
        match self.is_broken(event, FAILS) {
            true => Err("asked to fail".into()),
            false => Ok(Fold::Put(step(row, event.position()))),
        }
    }

    fn indexes(&self) -> Indexes<Self> {
        if SET == 0 { Indexes::none() } else { Indexes::none().with(Self::BY_COUNT) }
    }
}

/// What all events make, but for those at these positions.
fn recount(journal: &Journal, without: &[u64]) -> Rows {
    let mut rows = Rows::new();
    for event in journal.read_all(Position::START).unwrap().map(Result::unwrap) {
        let position = event.position();
        if let Some(key) = event.data().first().filter(|_| !without.contains(&position.get())) {
            let row = step(rows.get(key).copied(), position);
            rows.insert(*key, row);
        }
    }
    rows
}

fn rows_of<V: View<Key = u8, Row = Row>>(view: &ViewHandle<V>) -> Rows {
    view.range(..).collect::<Result<_, _>>().unwrap()
}

fn append(store: &Store, payload: Payload) -> Token {
    let stream = StreamId::new(format!("s-{}", payload[0])).unwrap();
    let filling = [&payload[..], &[b'x'; 200]].concat();
    let event = NewEvent::raw("traced", filling).unwrap();
    store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap().token()
}

fn append_many(store: &Store, count: usize) {
    for number in 0..count {
        append(store, [(number % 17) as u8, FINE]);
    }
}

/// An origin with a view, some events, and where the view's base goes.
struct World {
    dir: tempfile::TempDir,
    origin: Origin,
}

impl World {
    fn new(events: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::start(dir.path().join("origin"), small());
        append_many(origin.store(), events);
        Self { dir, origin }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) -> &Store {
        self.origin.store()
    }

    /// A base of everything that is there.
    fn base(&self, name: &str) -> (PathBuf, ViewBase) {
        let view = self.store().view(Traces::<1>::default()).unwrap();
        view.wait_for_latest(PATIENCE).unwrap();
        let path = self.path(name);
        let base = view.export_base(&path).unwrap();
        assert_eq!(base.checkpoints, [self.store().journal().end()]);
        assert_eq!(base.digest, view.digest().unwrap());
        view.close().unwrap();
        (path, base)
    }

    /// Removes what the origin needn't have any more.
    fn forget(&self) -> Position {
        let mut options = Options::new(Until::Position(self.origin.end()));
        options.lease_bytes_max = 1;
        let target = self.store().plan_retention(&options).unwrap().target;
        self.store().retain(&options.history(History::Forget(target))).unwrap();
        target
    }

    fn subscriber(&self, name: &str) -> Store {
        Store::builder(self.path(name)).create_if_missing().open().unwrap()
    }

    /// Follows into a mirror that begins with `begin_with`.
    fn follow(&self, store: &Store, begin_with: Option<&Path>) -> Mirror {
        let begin_with = begin_with.map(Path::to_owned);
        let options = FollowOptions { begin_with, journal: small(), ..FollowOptions::default() };
        store.mirror_with("orders", self.origin.address.to_string(), options).unwrap()
    }
}

fn with_base(base: &Path) -> ViewOptions {
    ViewOptions { base: Some(base.to_owned()), ..ViewOptions::default() }
}

fn opened(store: &Store, journal: &Journal, base: &Path) -> ViewHandle<Traces> {
    store.view_of_with(journal, Traces::default(), with_base(base)).unwrap()
}

fn refused(store: &Store, journal: &Journal, base: &Path) -> BaseError {
    refusal(store.view_of_with(journal, Traces::<1>::default(), with_base(base)))
}

fn refusal<V: View>(opened: Result<ViewHandle<V>, ViewError>) -> BaseError {
    match opened {
        Err(ViewError::Base(error)) => {
            println!("{error}\n  {}: {}", error.code(), error.hint());
            *error
        }
        Err(error) => panic!("{error}"),
        Ok(view) => panic!("{view:?}"),
    }
}

fn until_stopped<V: View>(view: &ViewHandle<V>) -> Arc<StopError> {
    loop {
        match view.status().state {
            ViewState::Stopped(error) => return error,
            _ => std::thread::yield_now(),
        }
    }
}

// ------------------------------------------------------------------------------------------ what it is good for

#[test]
fn a_new_subscriber_serves_at_once_without_any_history_and_follows() {
    let mut world = World::new(300);
    let (base, told) = world.base("base");
    assert_eq!(ViewBase::read(&base).unwrap(), told);
    let at = told.checkpoints[0].position;
    let expected = recount(world.store().journal(), &[]);
    append_many(world.store(), 100);
    let all = recount(world.store().journal(), &[]);
    let first = world.forget();
    assert!(first > Position::START && first <= at, "{first}");
    world.origin.close();

    // The origin isn't even there.
    let store = world.subscriber("new");
    let mirror = world.follow(&store, Some(&base));
    let journal = mirror.wait_ready(SOON).unwrap();
    assert_eq!(journal.end(), told.checkpoints[0]);
    let start = journal.start().position;
    assert!(start > Position::START && start < at, "{start}");
    let view = opened(&store, &journal, &base);
    assert_eq!(rows_of(&view), expected);
    assert_eq!(view.digest().unwrap(), told.digest);
    assert!(matches!(view.status().state, ViewState::CaughtUp | ViewState::CatchingUp));
    let by_count: Vec<_> = view.by_index(Traces::<1>::BY_COUNT).unwrap().range(..).collect();
    assert_eq!(by_count.len(), expected.len());

    world.origin.open();
    mirror.wait_caught_up(SOON).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), all);
    let token = append(world.store(), [3, FINE]);
    assert!(view.get_at_least(&3, &token, PATIENCE).unwrap().is_some());

    // What needs the history says where it begins.
    let truncated = |error: &StopError| matches!(error, StopError::Journal { source: ReadError::Truncated { first }, .. } if *first == start);
    let error = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap_err();
    assert!(matches!(&error, RebuildError::Stopped(error) if truncated(error)), "{error}");
    let error = view.check(RebuildOptions::default()).unwrap_err();
    assert!(matches!(&error, RebuildError::Stopped(error) if truncated(error)), "{error}");
    let other = store.view_of(&journal, Traces::<2>::default()).unwrap();
    assert!(truncated(&until_stopped(&other)));
    let error = journal.read_all(Position::START).unwrap_err();
    assert!(matches!(error, ReadError::Truncated { first } if first == start), "{error}");
    drop(other);

    // Opened again, it goes on with what it has, whether the base is still there or not.
    drop(view);
    mirror.stop().unwrap();
    let journal_dir = journal.dir().to_owned();
    drop(journal);
    let report = verify_deep(&headwater::fs::os::OsFs, &journal_dir, &mut |_| {}).unwrap();
    assert_eq!(report.damage, []);
    fs::remove_dir_all(&base).unwrap();
    append_many(world.store(), 20);
    let mirror = world.follow(&store, Some(&base));
    let journal = mirror.wait_ready(SOON).unwrap();
    mirror.wait_caught_up(SOON).unwrap();
    let view = opened(&store, &journal, &base);
    view.wait_for_latest(PATIENCE).unwrap();
    let retained = view.get(&3).unwrap().unwrap().0;
    assert!(retained > all[&3].0);
}

/// What a mirror has that began in the middle is enough for the next one.
#[test]
fn a_base_can_be_made_where_there_is_no_history_either() {
    let world = World::new(200);
    let (base, _) = world.base("first");
    let second = world.subscriber("second");
    let mirror = world.follow(&second, Some(&base));
    let journal = mirror.wait_ready(SOON).unwrap();
    let view = opened(&second, &journal, &base);
    let at = view.export_base(&world.path("same")).unwrap(); // nothing was fetched since
    append_many(world.store(), 200);
    mirror.wait_caught_up(SOON).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.export_base(&world.path("later")).unwrap();
    for (name, base) in [("third", "same"), ("fourth", "later")] {
        let base = world.path(base);
        let store = world.subscriber(name);
        let mirror = world.follow(&store, Some(&base));
        let journal = mirror.wait_ready(SOON).unwrap();
        let view = opened(&store, &journal, &base);
        mirror.wait_caught_up(SOON).unwrap();
        view.wait_for_latest(PATIENCE).unwrap();
        assert_eq!(rows_of(&view), recount(world.store().journal(), &[]), "{name}");
    }
    assert!(at.checkpoints[0].position < world.origin.end());
}

/// Without a base, with all of the history: from whoever has it.
#[test]
fn what_the_origin_has_removed_is_fetched_from_a_mirror_that_is_named_as_well() {
    let world = World::new(200);
    let first = world.subscriber("first");
    let mirror = world.follow(&first, None);
    mirror.wait_caught_up(SOON).unwrap();
    let served = serve(mirror.journal().unwrap(), "127.0.0.1:0", ServeOptions::default()).unwrap();
    assert!(world.forget() > Position::START);
    let store = world.subscriber("new");
    let journal_id = Some(world.store().journal().id());
    let options = FollowOptions { journal_id, journal: small(), ..FollowOptions::default() };
    let addresses = vec![world.origin.address.to_string(), served.local_addr().to_string()];
    let late = store.mirror_with("orders", addresses, options).unwrap();
    let journal = late.wait_ready(SOON).unwrap();
    append_many(world.store(), 10);
    let end = world.store().journal().end();
    let last = Position::new(end.position.get() - 1);
    assert_eq!(journal.wait_past(last, SOON), end, "{:?}", late.status());
    assert_eq!(journal.start().position, Position::START);
    assert_eq!(journal.read_all(Position::START).unwrap().count() as u64, end.position.get());
}

/// Also where nothing was removed, and for a store's own journal.
#[test]
fn a_base_serves_beside_the_whole_history_and_is_what_that_makes() {
    let world = World::new(120);
    let (base, _) = world.base("base");
    append_many(world.store(), 60);
    let restored = world.path("restored");
    let backup = world.path("backup");
    world.store().journal().backup(&backup).unwrap();
    let os: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
    headwater::restore(&os, &backup, &restored.join("journal"), None).unwrap();
    let store = Store::open(&restored).unwrap();
    let view = store.view_with(Traces::<1>::default(), with_base(&base)).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(store.journal(), &[]));
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    assert!(view.rebuild(RebuildOptions::default()).unwrap().wait().is_ok());
}

#[test]
fn its_files_are_hard_links_and_it_stays_what_it_was() {
    let world = World::new(100);
    let (base, told) = world.base("base");
    let tables = fs::read_dir(base.join("rows")).unwrap().map(|it| it.unwrap().path());
    let tables: Vec<_> = tables.filter(|it| it.extension().is_some_and(|it| it == "sst")).collect();
    assert!(!tables.is_empty());
    // Some may have been compacted since.
    assert!(tables.iter().any(|it| fs::metadata(it).unwrap().nlink() > 1));
    append_many(world.store(), 300);
    world.base("later"); // flushed and compacted meanwhile
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let view = opened(&store, &mirror.journal().unwrap(), &base);
    drop(mirror);
    view.wait_for_latest(PATIENCE).unwrap();
    let rows = ViewBase::read(&base).unwrap();
    assert_eq!(rows, told);
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
}

/// Whatever the moment at which it is exported, it is of an exact prefix.
#[test]
fn a_base_of_a_view_that_is_being_written_is_of_an_exact_prefix() {
    let world = World::new(10);
    let view = world.store().view(Traces::<1>::default()).unwrap();
    let done = AtomicBool::new(false);
    let bases: Vec<_> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                append_many(world.store(), 17);
            }
        });
        let export = |number: usize| {
            let path = world.path(&format!("base-{number}"));
            let told = view.export_base(&path).unwrap();
            (path, told)
        };
        let bases = (0..6).map(export).collect();
        done.store(true, Ordering::SeqCst);
        bases
    });
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let mut positions = Vec::new();
    for (path, told) in bases {
        positions.push(told.checkpoints[0].position.get());
        let folder = journal.dir().parent().unwrap().join("views");
        drop(fs::remove_dir_all(folder));
        let view = opened(&store, &journal, &path);
        view.wait_for_latest(PATIENCE).unwrap();
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal(), "{told:?}");
        view.close().unwrap();
        // The end of the journal that goes along ends there, too.
        let begun = world.subscriber(&format!("begun-{}", positions.len()));
        let mirror = world.follow(&begun, Some(&path));
        let journal = mirror.wait_ready(SOON).unwrap();
        mirror.wait_caught_up(SOON).unwrap();
        let view = opened(&begun, &journal, &path);
        view.wait_for_latest(PATIENCE).unwrap();
        assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
    }
    println!("bases at {positions:?}");
    assert!(positions.windows(2).any(|pair| pair[0] < pair[1]), "nothing was written meanwhile");
}

// -------------------------------------------------------------------------------------------- what is refused

#[test]
fn a_base_of_another_view_version_or_shape_is_refused() {
    let world = World::new(50);
    let (base, _) = world.base("base");
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let error = refusal(store.view_of_with(&journal, Traces::<2>::default(), with_base(&base)));
    assert!(matches!(error, BaseError::Another { what: "version", .. }), "{error}");
    let error = refusal(store.view_of_with(&journal, Traces::<1, 0>::default(), with_base(&base)));
    assert!(matches!(error, BaseError::Another { what: "indexes", .. }), "{error}");
    let own = store.view_with(Traces::<1>::default(), with_base(&base));
    assert!(matches!(refusal(own), BaseError::Journals { .. }));
    let error = refused(&store, &journal, &world.path("nothing"));
    assert!(matches!(error, BaseError::NotABase { .. }), "{error}");
    // Nothing is left of it.
    let view = store.view_of(&journal, Traces::<1>::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
    assert_eq!(view.generations().unwrap().len(), 1);
}

#[test]
fn a_damaged_base_is_refused_whichever_file_it_is() {
    let world = World::new(80);
    let (base, _) = world.base("base");
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let files = |dir: &Path| {
        let files = fs::read_dir(dir).unwrap().map(|it| it.unwrap().path());
        files.filter(|it| it.is_file()).collect::<Vec<_>>()
    };
    let all = [files(&base), files(&base.join("rows"))].concat();
    assert!(all.len() > 4, "{all:?}");
    let views = journal.dir().parent().unwrap().join("views/traces");
    for path in all {
        let whole = fs::read(&path).unwrap();
        let damages: [&dyn Fn(); 4] = [
            &|| fs::remove_file(&path).unwrap(),
            &|| fs::write(&path, [&whole[..], b"x"].concat()).unwrap(),
            &|| fs::write(&path, &whole[..whole.len() - 1]).unwrap(),
            &|| flip_bit(&path, whole.len() as u64 / 2),
        ];
        let is_manifest = path.ends_with("manifest");
        for damage in &damages[..if whole.is_empty() { 2 } else { 4 }] {
            // The links of the origin's database must not change.
            fs::remove_file(&path).ok();
            fs::write(&path, &whole).unwrap();
            damage();
            let error = refused(&store, &journal, &base);
            let is_told = match &error {
                BaseError::Damaged { path: told, .. } => *told == path,
                BaseError::NotABase { .. } => is_manifest,
                _ => false,
            };
            assert!(is_told, "{}: {error}", path.display());
            let left = fs::read_dir(&views)
                .map_or(0, |names| names.filter(|it| it.as_ref().unwrap().path().is_dir()).count());
            assert!(left == 0 && !views.join("live").exists(), "{error}");
        }
        fs::write(&path, &whole).unwrap();
    }
    let view = opened(&store, &journal, &base);
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
}

#[test]
fn a_base_of_another_history_is_refused_also_if_the_mirror_was_to_begin_with_it() {
    let mut world = World::new(40);
    world.origin.close();
    copy_dir(&world.origin.dir, &world.path("older"));
    world.origin.open();
    append_many(world.store(), 40);
    let (base, told) = world.base("base");
    world.origin.close();
    replace_dir(&world.origin.dir, &world.path("older"));
    world.origin.open();
    append_many(world.store(), 41);
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let error = refused(&store, &journal, &base);
    let at = told.checkpoints[0];
    assert!(matches!(error, BaseError::Fork { checkpoint, .. } if checkpoint == at), "{error}");
    // Begun with the base, it is the mirror that says so, before a byte was sent.
    let other = world.subscriber("other");
    let mirror = world.follow(&other, Some(&base));
    let status = mirror.wait_until(SOON, headwater::shipping::MirrorStatus::is_halted).unwrap();
    let Some(ShippingError::Fork(parted)) = status.last_error else { panic!("{status:?}") };
    assert_eq!(parted.mirror, at);
    assert_eq!(mirror.journal().unwrap().end(), at);
}

#[test]
fn a_base_ahead_of_the_mirror_or_in_front_of_it_is_refused() {
    let world = World::new(60);
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let behind = mirror.journal().unwrap().end().position;
    mirror.stop().unwrap();
    append_many(world.store(), 60);
    let (base, told) = world.base("base");
    append_many(world.store(), 200);
    let (later, _) = world.base("later");
    let dir = store.dir().join("mirrors/orders/journal");
    let os: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
    {
        let (journal, _) = Journal::open_read_only(&os, &dir).unwrap();
        let error = refused(&store, &journal, &base);
        assert!(
            matches!(error, BaseError::Behind { checkpoint, end } if checkpoint == told.checkpoints[0] && end == behind),
            "{error}"
        );
    }
    // One that begins with the later base never has what is behind the first.
    let other = world.subscriber("other");
    let mirror = world.follow(&other, Some(&later));
    let journal = mirror.wait_ready(SOON).unwrap();
    let start = journal.start().position;
    assert!(start > told.checkpoints[0].position, "the test is meant to leave a gap");
    let error = refused(&other, &journal, &base);
    assert!(matches!(error, BaseError::Truncated { first, .. } if first == start), "{error}");
    // And an origin that has removed what follows a base says so to a mirror that begins with it.
    drop(mirror);
    world.forget();
    let late = world.subscriber("late");
    let mirror = world.follow(&late, Some(&base));
    let status = mirror.wait_until(SOON, headwater::shipping::MirrorStatus::is_halted).unwrap();
    let Some(ShippingError::Truncated { mirror: at, .. }) = status.last_error else {
        panic!("{status:?}")
    };
    assert_eq!(at, told.checkpoints[0].position);
}

#[test]
fn nothing_is_exported_into_what_is_there_and_an_interrupted_export_is_repeated() {
    let world = World::new(30);
    let (base, _) = world.base("base");
    let view = world.store().view(Traces::<1>::default()).unwrap();
    let error = view.export_base(&base).unwrap_err();
    assert!(
        matches!(&error, ViewError::Base(it) if matches!(**it, BaseError::NotEmpty { .. })),
        "{error}"
    );
    // What a process that died leaves: everything but the manifest.
    fs::remove_file(base.join("manifest")).unwrap();
    fs::write(base.join("unfinished"), "").unwrap();
    assert!(ViewBase::read(&base).is_err());
    let told = view.export_base(&base).unwrap();
    assert_eq!(ViewBase::read(&base).unwrap(), told);
    assert!(!base.join("unfinished").exists());
    // One whose journal can't be copied is none, and nothing is left of it.
    let segment = world.store().journal().segments().pop().unwrap().path;
    flip_bit(&segment, 4096 + 150);
    let other = world.path("other");
    let error = view.export_base(&other).unwrap_err();
    assert!(matches!(&error, ViewError::Base(it) if matches!(**it, BaseError::Copy(_))), "{error}");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
    flip_bit(&segment, 4096 + 150);
    view.export_base(&other).unwrap();
}

/// Only a base that says so itself is of a view that has folded nothing.
#[test]
fn a_mirror_does_not_begin_with_nothing_because_the_end_of_the_journal_is_missing() {
    let world = World::new(0);
    let (empty, told) = world.base("empty");
    assert_eq!(told.checkpoints[0].position, Position::START);
    append_many(world.store(), 40);
    let (base, _) = world.base("base");
    fs::remove_dir_all(base.join("journals")).unwrap();
    let damaged = world.path("damaged");
    copy_dir(&empty, &damaged);
    flip_bit(&damaged.join("manifest"), 30);
    for (name, base) in [("lost", base), ("rotten", damaged)] {
        let store = world.subscriber(name);
        let mirror = world.follow(&store, Some(&base));
        let status = mirror.wait_until(SOON, headwater::shipping::MirrorStatus::is_halted).unwrap();
        assert!(matches!(status.last_error, Some(ShippingError::Begin(_))), "{name}: {status:?}");
        assert!(mirror.journal().is_none(), "{name}");
    }
    let store = world.subscriber("new");
    let mirror = world.follow(&store, Some(&empty));
    mirror.wait_caught_up(SOON).unwrap();
    let view = opened(&store, &mirror.journal().unwrap(), &empty);
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
}

// ------------------------------------------------------------------------------------------- what goes along

#[test]
fn what_is_parked_and_what_was_decided_goes_along() {
    let world = World::new(20);
    let positions: Vec<u64> = [[1, FAILS], [2, FAILS], [9, NOWHERE], [9, NOWHERE]]
        .map(|payload| append(world.store(), payload).position.get() - 1)
        .to_vec();
    append_many(world.store(), 30);
    let journal = world.store().journal().id();
    let at = |n: usize| Locator { journal, position: Position::new(positions[n]) };
    let exporter = Traces::<1>::default();
    let view = world.store().view(exporter).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.discard(&2, at(1).position).unwrap();
    view.discard_unrouted(at(3).position).unwrap();
    let base = world.path("base");
    let told = view.export_base(&base).unwrap();
    assert_eq!((told.parked.keys, told.parked.unrouted), (1, 1));
    assert_eq!(told.parked, view.status().parked);

    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let mirrored = mirror.journal().unwrap();
    let importer = Traces::<1>::default();
    let view = store.view_of_with(&mirrored, importer.clone(), with_base(&base)).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(view.status().parked, told.parked);
    let parked: Vec<_> = view.parked().collect::<Result<_, _>>().unwrap();
    assert_eq!((parked[0].key, parked[0].first), (1, at(0).position));
    assert!(view.get_checked(&1).unwrap().degraded.is_some());
    importer.is_mended.store(true, Ordering::SeqCst);
    assert_eq!(view.retry(&1).unwrap().left, 0);
    // What is built here leaves out the same.
    let expected = recount(&mirrored, &[positions[1], positions[2], positions[3]]);
    assert_eq!(rows_of(&view), expected);
    let compared = view.check(RebuildOptions::default()).unwrap();
    assert!(!compared.is_equal(), "the one under no key is still parked");
    view.discard_unrouted(at(2).position).unwrap();
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
}

#[test]
fn rows_with_an_event_that_was_given_up_here_are_refused() {
    let world = World::new(20);
    let position = append(world.store(), [1, FAILS]).position.get() - 1;
    let locator =
        |journal: &Journal| Locator { journal: journal.id(), position: Position::new(position) };
    append_many(world.store(), 30);
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let view = store.view_of(&journal, Traces::<1>::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.discard(&1, locator(&journal).position).unwrap();
    let rows = rows_of(&view);
    // Where it was folded, as the code was mended there.
    let mended = Traces::<1>::default();
    mended.is_mended.store(true, Ordering::SeqCst);
    let exporter = world.store().view(mended).unwrap();
    exporter.wait_for_latest(PATIENCE).unwrap();
    let base = world.path("base");
    exporter.export_base(&base).unwrap();
    let decided = |error: &ViewError| matches!(error, ViewError::Base(it) if matches!(**it, BaseError::Decided { event } if event == locator(&journal)));
    let error = view.import_base(&base).unwrap().wait().unwrap_err();
    assert!(matches!(&error, RebuildError::View(error) if decided(error)), "{error}");
    assert_eq!((rows_of(&view), view.generations().unwrap().len()), (rows, 1));
    // Also by another version, of which a new one takes all decisions over.
    view.close().unwrap();
    drop(view);
    let folder = journal.dir().parent().unwrap().join("views/traces");
    fs::rename(folder.join("discarded.1"), folder.join("discarded.7")).unwrap();
    fs::remove_file(folder.join("live")).unwrap();
    let error = refused(&store, &journal, &base);
    assert!(matches!(error, BaseError::Decided { .. }), "{error}");
}

#[test]
fn events_that_have_killed_there_are_not_tried_here() {
    let world = World::new(20);
    let position = append(world.store(), [1, FINE]).position.get() - 1;
    append_many(world.store(), 17);
    let journal = world.store().journal();
    let event = journal.read_all(Position::new(position)).unwrap().next().unwrap().unwrap();
    // As it is written down where the process has died of it three times.
    let folder = world.store().dir().join("views/traces");
    fs::create_dir_all(&folder).unwrap();
    let body = format!(
        "headwater deadly 1\nzone follow {id} 0 9\nkiller {id} {position} {} fold 3\n",
        event.id(),
        id = journal.id()
    );
    let text = format!("{body}crc32 {:08x}\n", crc32fast::hash(body.as_bytes()));
    fs::write(folder.join("deadly.1"), text).unwrap();
    let (base, told) = world.base("base");
    assert_eq!(told.parked.keys, 1);
    let text = fs::read_to_string(base.join("deadly")).unwrap();
    assert!(text.contains("killer") && !text.contains("zone"), "{text}");
    let store = world.subscriber("new");
    let mirror = world.follow(&store, Some(&base));
    let view = opened(&store, &mirror.wait_ready(SOON).unwrap(), &base);
    let deadly = view.deadly_events();
    assert_eq!(deadly.len(), 1);
    assert_eq!((deadly[0].id, deadly[0].deaths), (event.id(), 3));
    let retried = view.retry(&1).unwrap();
    assert!(retried.left > 0 && retried.reason.is_some(), "{retried:?}");
    assert!(view.acquit(deadly[0].locator).unwrap());
    assert_eq!(view.retry(&1).unwrap().left, 0);
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
}

const COUNTS: Table<u8, u64> = Table::new("counts");
const ALL: Table<(), u64> = Table::new("all");

/// How many events each key has, and how many there are.
struct Counts;

impl TableView for Counts {
    const NAME: &'static str = "counts";
    const VERSION: u32 = 1;
    type Event = Vec<u8>;

    fn tables(&self) -> Tables {
        Tables::of(COUNTS).with(ALL)
    }

    fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let key = event.data().first().copied().unwrap_or_default();
        let count = tx.get(COUNTS, &key)?.unwrap_or(0) + 1;
        tx.put(COUNTS, &key, &count)?;
        let all = tx.get(ALL, &())?.unwrap_or(0) + 1;
        tx.put(ALL, &(), &all)?;
        Ok(())
    }
}

#[test]
fn bases_are_of_all_journals_of_a_view_and_of_tables_as_well() {
    let worlds = [World::new(60), World::new(90)];
    let [first, second] = &worlds;
    let journals = worlds.each_ref().map(|world| world.store().journal().clone());
    let (traces, counts) = (first.path("traces"), first.path("counts"));
    {
        let both =
            first.store().view_over(&journals, Traces::<1>::default(), ViewOptions::default());
        let both = both.unwrap();
        let tables =
            first.store().table_view_over(&journals, Counts, ViewOptions::default()).unwrap();
        both.wait_for_latest(PATIENCE).unwrap();
        tables.wait_for_latest(PATIENCE).unwrap();
        let told = both.export_base(&traces).unwrap();
        assert_eq!(told.checkpoints, journals.each_ref().map(Journal::end));
        tables.export_base(&counts).unwrap();
    }
    let store = first.subscriber("new");
    let mirror = |world: &World, name: &str| {
        let id = world.store().journal().id().to_string();
        let begin_with = Some(traces.join("journals").join(id));
        let options = FollowOptions { begin_with, journal: small(), ..FollowOptions::default() };
        store.mirror_with(name, world.origin.address.to_string(), options).unwrap()
    };
    let mirrors = [mirror(first, "first"), mirror(second, "second")];
    let mirrored = mirrors.each_ref().map(|mirror| mirror.wait_ready(SOON).unwrap());
    assert!(mirrored.iter().all(|journal| journal.start().position > Position::START));
    let only = store.view_over(&mirrored[..1], Traces::<1>::default(), with_base(&traces));
    assert!(matches!(refusal(only), BaseError::Journals { .. }));
    // Where they were taken in in another order.
    let elsewhere = first.subscriber("elsewhere");
    let mirrors = [(first, "first"), (second, "second")].map(|(world, name)| {
        let options = FollowOptions { journal: small(), ..FollowOptions::default() };
        let address = world.origin.address.to_string();
        let mirror = elsewhere.mirror_with(name, address, options).unwrap();
        mirror.wait_caught_up(SOON).unwrap();
        mirror
    });
    let mut mirrored = mirrors.each_ref().map(|mirror| mirror.journal().unwrap());
    mirrored.reverse();
    let another =
        elsewhere.view_over(&mirrored, Traces::<2>::default(), ViewOptions::default()).unwrap();
    another.wait_for_latest(PATIENCE).unwrap();
    mirrored.reverse();
    let refused = elsewhere.view_over(&mirrored, Traces::<1>::default(), with_base(&traces));
    assert!(matches!(refusal(refused), BaseError::Order { .. }));
    let both = store.view_over(&mirrored, Traces::<1>::default(), with_base(&traces)).unwrap();
    let tables = store.table_view_over(&mirrored, Counts, with_base(&counts)).unwrap();
    assert_eq!(tables.table(ALL).unwrap().get(&()).unwrap(), Some(150));
    for world in &worlds {
        append_many(world.store(), 17);
        let token = append(world.store(), [3, FINE]);
        both.wait_for(&token, PATIENCE).unwrap();
        tables.wait_for(&token, PATIENCE).unwrap();
    }
    assert_eq!(tables.table(ALL).unwrap().get(&()).unwrap(), Some(150 + 36));
    let count = both.get(&3).unwrap().unwrap().0;
    assert_eq!(tables.table(COUNTS).unwrap().get(&3).unwrap(), Some(count));
    let other = tables.import_base(&traces).unwrap().wait().unwrap_err();
    assert!(matches!(other, RebuildError::View(ViewError::Base(_))), "{other}");
}

/// Of several journals, each mirror begins with its own, or with nothing if the view had nothing of that.
#[test]
fn a_mirror_begins_with_its_own_journal_of_a_base_of_several() {
    for empty in [true, false] {
        let worlds = [World::new(60), World::new(if empty { 0 } else { 30 })];
        let [first, second] = &worlds;
        let journals = worlds.each_ref().map(|world| world.store().journal().clone());
        let ids = journals.each_ref().map(Journal::id);
        let base = first.path("base");
        {
            let options = ViewOptions::default();
            let both = first.store().view_over(&journals, Traces::<1>::default(), options).unwrap();
            both.wait_for_latest(PATIENCE).unwrap();
            both.export_base(&base).unwrap();
        }
        append_many(second.store(), 20);
        let store = first.subscriber("new");
        let place = |of: usize| base.join("journals").join(ids[of].to_string());
        let whole = || base.clone();
        let cases = [
            ("a by id", 0, whole(), Some(ids[0])),
            ("a by place", 0, place(0), None),
            ("b by id", 1, whole(), Some(ids[1])),
            ("b by place", 1, place(1), None),
            ("b by both", 1, place(1), Some(ids[1])),
        ];
        for (name, of, begin_with, journal_id) in cases {
            let begin_with = Some(begin_with);
            let options = FollowOptions {
                begin_with,
                journal_id,
                journal: small(),
                ..FollowOptions::default()
            };
            let address = worlds[of].origin.address.to_string();
            let mirror = store.mirror_with(&name.replace(' ', "-"), address, options).unwrap();
            mirror.wait_caught_up(SOON).unwrap_or_else(|error| panic!("{name}: {error}"));
            let mirrored = mirror.journal().unwrap();
            assert_eq!(mirrored.id(), ids[of], "{name}");
            let begins_with_nothing = mirrored.start().position == Position::START;
            assert_eq!(begins_with_nothing, empty && of == 1, "{name}");
        }
        for (name, journal_id) in
            [("of none", None), ("of another", Some(JournalId::from_bytes([9; 16])))]
        {
            let begin_with = Some(base.clone());
            let options = FollowOptions {
                begin_with,
                journal_id,
                journal: small(),
                ..FollowOptions::default()
            };
            let address = second.origin.address.to_string();
            let mirror = store.mirror_with(&name.replace(' ', "-"), address, options).unwrap();
            let status =
                mirror.wait_until(SOON, headwater::shipping::MirrorStatus::is_halted).unwrap();
            let Some(ShippingError::Begin(error)) = status.last_error else { panic!("{name}") };
            assert_eq!(error.code(), "restore.which_journal");
            assert!(ids.iter().all(|id| error.to_string().contains(&id.to_string())), "{error}");
            assert!(mirror.journal().is_none(), "{name}");
        }
    }
}

// ------------------------------------------------------------------------------------------------- killed

const CHILD: &str = "HEADWATER_BASES_CHILD";
const DIR: &str = "HEADWATER_BASES_DIR";

/// Not a test: the process that is killed.
#[test]
fn process_that_exports_or_imports() {
    let (Ok(what), Ok(dir)) = (std::env::var(CHILD), std::env::var(DIR)) else { return };
    let dir = PathBuf::from(dir);
    let (base, options) = (dir.join("base"), ViewOptions::default());
    let store = Store::open(dir.join("store")).unwrap();
    if what == "begin" {
        println!("\nready");
        let view = store.view_with(Traces::<1>::default(), with_base(&base)).unwrap();
        println!("\ndone");
        return drop(view);
    }
    let view = store.view_with(Traces::<1>::default(), options).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    println!("\nready");
    match what.as_str() {
        "export" => drop(view.export_base(&dir.join("exported"))),
        _ => drop(view.import_base(&base).unwrap().wait()),
    }
    println!("\ndone");
}

/// When a process is killed.
#[derive(Clone, Debug)]
enum When {
    Behind(Duration),
    /// As soon as there are so many files in this folder, and in those in it.
    Files(PathBuf, usize),
}

impl When {
    fn is_now(&self, began: Instant) -> bool {
        match self {
            Self::Behind(time) => began.elapsed() >= *time,
            Self::Files(folder, count) => files_within(folder) >= *count,
        }
    }
}

fn files_within(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).into_iter().flatten().map_while(Result::ok);
    let count = |path: PathBuf| if path.is_dir() { files_within(&path) } else { 1 };
    entries.map(|entry| count(entry.path())).sum()
}

/// Lets a process do it, and kills it; how long it has taken, if it was too quick.
fn killed(dir: &Path, what: &str, when: &When) -> Option<Duration> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["bases::process_that_exports_or_imports", "--exact", "--nocapture"])
        .env(CHILD, what)
        .env(DIR, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line != "ready\n" {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "{what}: never ready");
    }
    let began = Instant::now();
    let (done, is_done) = channel::<()>();
    let when = when.clone();
    let killer = std::thread::spawn(move || {
        while !when.is_now(began) && is_done.try_recv() == Err(TryRecvError::Empty) {
            std::thread::yield_now();
        }
        drop(child.kill());
        child.wait().unwrap()
    });
    line.clear();
    drop(lines.read_line(&mut line));
    let mut rest = String::new();
    let took = (line == "done\n" || line == "\n").then(|| began.elapsed());
    drop(lines.read_to_string(&mut rest));
    drop(done);
    killer.join().unwrap();
    took
}

/// A store with a view of some events and a base of it, and more events.
fn to_be_killed() -> (tempfile::TempDir, PathBuf, Rows) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::create(&path).unwrap();
    append_many(&store, 200);
    let view = store.view(Traces::<1>::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.export_base(&dir.path().join("base")).unwrap();
    append_many(&store, 50);
    view.wait_for_latest(PATIENCE).unwrap();
    view.close().unwrap();
    drop(view);
    let rows = recount(store.journal(), &[]);
    store.close().unwrap();
    (dir, path, rows)
}

const ROUNDS: usize = 4;

/// At any time, and while any of the files is written that `folder` gets beside those that it has.
fn moments(seed: u64, longest: Duration, folder: &Path, (had, has): (usize, usize)) -> Vec<When> {
    println!("seed {seed}, up to {longest:?}, {had} to {has} files");
    let mut rng = fastrand::Rng::with_seed(seed);
    let behind = (0..ROUNDS).map(|_| When::Behind(longest.mul_f64(rng.f64() * 1.1)));
    let mut moments: Vec<_> = behind.collect();
    moments.extend((had + 1..=has).map(|count| When::Files(folder.to_owned(), count)));
    moments
}

#[test]
fn an_import_that_is_killed_anywhere_leaves_what_was_there_or_all_of_it() {
    for what in ["begin", "import"] {
        let (dir, path, rows) = to_be_killed();
        let views = path.join("views");
        let whole = dir.path().join("whole");
        copy_dir(&views, &whole);
        let before = |path: &Path| {
            drop(fs::remove_dir_all(path));
            if what == "import" {
                copy_dir(&whole, path);
            }
        };
        before(&views);
        let had = files_within(&views);
        let longest = killed(dir.path(), what, &When::Behind(PATIENCE)).unwrap();
        let (mut early, mut late) = (0, 0);
        for behind in moments(31, longest, &views, (had, files_within(&views))) {
            before(&views);
            let done = killed(dir.path(), what, &behind).is_some();
            let store = Store::open(&path).unwrap();
            let options = with_base(&dir.path().join("base"));
            let view = store.view_with(Traces::<1>::default(), options).unwrap();
            view.wait_for_latest(PATIENCE).unwrap();
            assert_eq!(rows_of(&view), rows, "{what} behind {behind:?}");
            let generations = view.generations().unwrap();
            assert!(generations.iter().any(|it| it.live), "{generations:?}");
            let folders = fs::read_dir(views.join("traces")).unwrap();
            let folders = folders.filter(|it| it.as_ref().unwrap().path().is_dir()).count();
            assert_eq!(folders, generations.len(), "something is left");
            if done {
                late += 1;
            } else {
                early += 1;
            }
            assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
        }
        println!("{what}: {early} were killed, {late} had done it");
    }
}

#[test]
fn an_export_that_is_killed_anywhere_is_no_base_or_a_whole_one() {
    let (dir, path, rows) = to_be_killed();
    let exported = dir.path().join("exported");
    let longest = killed(dir.path(), "export", &When::Behind(PATIENCE)).unwrap();
    let (mut none, mut whole) = (0, 0);
    for behind in moments(32, longest, &exported, (0, files_within(&exported))) {
        drop(fs::remove_dir_all(&exported));
        killed(dir.path(), "export", &behind);
        let store = Store::open(&path).unwrap();
        let is_base = ViewBase::read(&exported).is_ok();
        if is_base {
            whole += 1;
        } else {
            none += 1;
            // It is repeated into the same directory.
            let view = store.view(Traces::<1>::default()).unwrap();
            view.wait_for_latest(PATIENCE).unwrap();
            view.export_base(&exported).unwrap();
            view.close().unwrap();
        }
        // With the end of the journal that a mirror can begin with.
        let told = ViewBase::read(&exported).unwrap().checkpoints[0];
        let copy = exported.join("journals").join(told.journal.to_string());
        let os: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
        let (copy, damage) = Journal::open_read_only(&os, &copy).unwrap();
        assert_eq!((copy.end(), damage), (told, None), "behind {behind:?}");
        drop(fs::remove_dir_all(path.join("views")));
        let view = store.view_with(Traces::<1>::default(), with_base(&exported)).unwrap();
        view.wait_for_latest(PATIENCE).unwrap();
        assert_eq!(rows_of(&view), rows, "behind {behind:?}");
    }
    println!("{none} were none, {whole} were whole");
}

// ------------------------------------------------------------------------------------- in place of what serves

#[test]
fn a_base_takes_the_place_of_rows_that_serve_at_once_and_they_are_kept() {
    let world = World::new(150);
    let (base, _) = world.base("base");
    append_many(world.store(), 100);
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let view = store.view_of(&journal, Traces::<1>::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    let expected = rows_of(&view);
    // Opened with a base, rows that are there stay.
    view.close().unwrap();
    drop(view);
    let view = opened(&store, &journal, &base);
    assert_eq!(view.generations().unwrap().len(), 1);
    let rebuilt = std::thread::scope(|scope| {
        let importing = view.import_base(&base).unwrap();
        let waiting = importing.clone();
        let done = scope.spawn(move || waiting.wait().unwrap());
        let mut seen = 0;
        while !done.is_finished() {
            assert_eq!(rows_of(&view), expected, "never less than before");
            seen += 1;
        }
        println!("read {seen} times meanwhile");
        done.join().unwrap()
    });
    assert_eq!((rebuilt.generation, rebuilt.previous), (2, Some(1)));
    assert!(rebuilt.compared.is_none());
    assert_eq!(rows_of(&view), expected);
    append_many(world.store(), 20);
    mirror.wait_caught_up(SOON).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(&journal, &[]));
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    assert_eq!(view.rollback().unwrap().wait().unwrap().generation, 1);
    assert_eq!(rows_of(&view), recount(&journal, &[]));
    // Whatever is wrong with a base leaves everything as it was.
    flip_bit(&base.join("rows/CURRENT"), 3);
    let error = view.import_base(&base).unwrap().wait().unwrap_err();
    assert!(matches!(error, RebuildError::View(ViewError::Base(_))), "{error}");
    let error = view.import_base(&world.path("nothing")).unwrap().wait().unwrap_err();
    assert!(matches!(error, RebuildError::View(ViewError::Base(_))), "{error}");
    assert_eq!(view.generations().unwrap().len(), 2);
}

/// The mirror was trimmed, and the rows are of no use: a base is the only way back.
#[test]
fn a_view_that_cannot_be_built_any_more_goes_on_with_a_base() {
    let world = World::new(200);
    let store = world.subscriber("new");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    mirror.stop().unwrap();
    let dir = store.dir().join("mirrors/orders/journal");
    let os: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
    let options = Options::new(Until::Position(world.origin.end()));
    let target = retention::plan(&os, &dir, &options).unwrap().target;
    retention::apply(&os, &dir, &options.history(History::Forget(target))).unwrap();
    let (base, _) = world.base("base");
    let mirror = world.follow(&store, None);
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    let view = store.view_of(&journal, Traces::<1>::default()).unwrap();
    let error = until_stopped(&view);
    let StopError::Journal { source: ReadError::Truncated { first }, .. } = &*error else {
        panic!("{error}")
    };
    assert_eq!(*first, target);
    view.import_base(&base).unwrap().wait().unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(rows_of(&view), recount(world.store().journal(), &[]));
}
