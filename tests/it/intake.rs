//! Views of several journals whose rows depend on the order between them: every view, generation and rebuild has the same,
//! whatever happens in between.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::doctor::{self, Level};
use headwater::fs::{Fs, os::OsFs};
use headwater::view::{
    Fold, FoldError, Keys, LostTail, RebuildError, RebuildOptions, StopError, Table, TableView,
    Tables, View, ViewControl, ViewError, ViewOptions, ViewState, ViewTxn, WaitError,
};
use headwater::{
    Append, ExpectedRevision, Ingest, Journal, JournalOptions, Locator, NewEvent, Position,
    Recorded, Store, StreamId, Token, restore,
};

use crate::views::{copy_dir, copy_open_dir, replace_dir};

const PATIENCE: Duration = Duration::from_secs(60);

/// How many events, and a hash over them that depends on their order.
type Row = (u64, u64);
type Rows = BTreeMap<u8, Row>;

fn step(row: Option<Row>, at: Locator) -> Row {
    let (count, mut hash) = row.unwrap_or_default();
    for byte in at.journal.as_bytes().iter().copied().chain(at.position.get().to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    (count + 1, hash)
}

/// Which keys an event concerns: what follows its first byte, of which that says how many.
fn keys_of(event: &Recorded<Vec<u8>>) -> &[u8] {
    let (count, rest) = event.data().split_first().unwrap();
    &rest[..usize::from(*count)]
}

struct Told<const NTH: usize, const OF_VERSION: u32>;

impl<const NTH: usize, const OF_VERSION: u32> View for Told<NTH, OF_VERSION> {
    const NAME: &'static str = ["first", "second", "third"][NTH];
    const VERSION: u32 = OF_VERSION;
    type Key = u8;
    type Row = Row;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        keys.extend(keys_of(event).iter().copied());
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<Row>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<Row>, FoldError> {
        Ok(Fold::Put(step(row, event.locator())))
    }
}

struct Tabled;

const TOLD: Table<u8, Row> = Table::new("told");

impl TableView for Tabled {
    const NAME: &'static str = "tabled";
    const VERSION: u32 = 1;
    type Event = Vec<u8>;

    fn tables(&self) -> Tables {
        Tables::of(TOLD)
    }

    fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let mut keys = keys_of(event).to_vec();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let row = step(tx.get(TOLD, &key)?, event.locator());
            tx.put(TOLD, &key, &row)?;
        }
        Ok(())
    }
}

struct Opened {
    control: ViewControl,
    rows: Box<dyn Fn() -> Rows>,
}

fn open_keyed<const NTH: usize, const OF_VERSION: u32>(
    store: &Store,
    journals: &[Journal],
    options: ViewOptions,
) -> Result<Opened, ViewError> {
    let view = store.view_over(journals, Told::<NTH, OF_VERSION>, options)?;
    let control = view.control();
    Ok(Opened { control, rows: Box::new(move || view.range(..).map(Result::unwrap).collect()) })
}

fn open_tabled(
    store: &Store,
    journals: &[Journal],
    options: ViewOptions,
) -> Result<Opened, ViewError> {
    let view = store.table_view_over(journals, Tabled, options)?;
    let control = view.control();
    let rows = move || view.table(TOLD).unwrap().range(..).map(Result::unwrap).collect();
    Ok(Opened { control, rows: Box::new(rows) })
}

struct World {
    dir: PathBuf,
    stores: Vec<Store>,
    tokens: Vec<Option<Token>>,
    rng: Rng,
    opened: BTreeMap<&'static str, Opened>,
    filler_bytes: usize,
}

impl World {
    fn new(dir: &Path, seed: u64, journals: usize) -> Self {
        println!("seed {seed}");
        let store = |n| Store::create(dir.join(format!("store-{n}"))).unwrap();
        Self {
            dir: dir.to_owned(),
            stores: (0..journals).map(store).collect(),
            tokens: vec![None; journals],
            rng: Rng::with_seed(seed),
            opened: BTreeMap::new(),
            filler_bytes: 0,
        }
    }

    fn journals(&self) -> Vec<Journal> {
        self.stores.iter().map(|store| store.journal().clone()).collect()
    }

    fn views(&self) -> PathBuf {
        self.dir.join("store-0/views")
    }

    /// The file that has the order of all journals.
    fn log(&self) -> PathBuf {
        let names = OsFs.list(&self.views().join(".intake")).unwrap();
        let mut logs = names.into_iter().filter(|name| !name.contains('.'));
        let log = logs.next().unwrap();
        assert_eq!(logs.next(), None, "there is one");
        self.views().join(".intake").join(log)
    }

    fn open(&mut self, name: &'static str) {
        let chunk_bytes = [1, 300, 1 << 20][self.rng.usize(..3)];
        let options = ViewOptions { chunk_bytes, ..ViewOptions::default() };
        let mut journals = self.journals();
        self.rng.shuffle(&mut journals);
        let open = match name {
            "first" => open_keyed::<0, 1>,
            "first, version 2" => open_keyed::<0, 2>,
            "second" => open_keyed::<1, 1>,
            "third" => open_keyed::<2, 1>,
            _ => open_tabled,
        };
        self.opened.insert(name, open(&self.stores[0], &journals, options).unwrap());
    }

    fn append(&mut self, journal: usize, keys: &[u8]) -> Token {
        let mut data = vec![keys.len() as u8];
        data.extend_from_slice(keys);
        data.resize(data.len() + self.filler_bytes, 0);
        let event = NewEvent::raw("told", data).unwrap();
        let stream = StreamId::new("told").unwrap();
        let append = Append::to(&stream, ExpectedRevision::Any, [event]);
        let token = self.stores[journal].append(&append).unwrap().token();
        self.tokens[journal] = Some(token);
        token
    }

    fn append_some(&mut self, batches: usize) {
        for _ in 0..batches {
            let keys: Vec<u8> = (0..self.rng.usize(..4)).map(|_| self.rng.u8(..5)).collect();
            let journal = self.rng.usize(..self.stores.len());
            let token = self.append(journal, &keys);
            // Now and then the views are at the end: then runs are short.
            if self.rng.u8(..4) == 0
                && let Some(view) = self.opened.values().next()
            {
                view.control.wait_for(&token, PATIENCE).unwrap();
            }
        }
    }

    /// What all views have, which is the same.
    fn rows(&self) -> Rows {
        let mut all = self.opened.iter().map(|(name, view)| {
            let tokens = self.tokens.iter().flatten();
            tokens.for_each(|token| view.control.wait_for(token, PATIENCE).unwrap());
            assert!(view.control.status().set_aside.is_none(), "{name}");
            (name, (view.rows)())
        });
        let (_, first) = all.next().unwrap();
        all.for_each(|(name, rows)| assert_eq!(rows, first, "{name}"));
        first
    }

    fn close_all(&mut self) {
        for view in std::mem::take(&mut self.opened).into_values() {
            view.control.close().unwrap();
        }
    }

    /// Does something to the files of a store while nothing of it is open.
    fn reopen_store(&mut self, which: usize, meanwhile: impl FnOnce()) {
        self.close_all();
        let closed = self.stores.remove(which);
        closed.close().unwrap();
        drop(closed);
        meanwhile();
        let dir = self.dir.join(format!("store-{which}"));
        self.stores.insert(which, Store::open(dir).unwrap());
    }

    fn reopen_all(&mut self, meanwhile: impl FnOnce(&mut Self)) {
        let names: Vec<_> = self.opened.keys().copied().collect();
        self.close_all();
        meanwhile(self);
        names.into_iter().for_each(|name| self.open(name));
    }

    /// As if the process had died: rows that weren't flushed are lost, and of the log's last write there may be a part.
    fn crash(&mut self) {
        let image = self.dir.join("image");
        copy_open_dir(&self.views(), &image);
        self.reopen_all(|world| {
            replace_dir(&image, &world.views());
            std::fs::remove_dir_all(&image).unwrap();
            let torn = vec![world.rng.u8(..); world.rng.usize(..80)];
            let mut log = std::fs::OpenOptions::new().append(true).open(world.log()).unwrap();
            log.write_all(&torn).unwrap();
        });
    }

    fn do_something(&mut self) {
        let names: Vec<_> = self.opened.keys().copied().collect();
        let name = names[self.rng.usize(..names.len())];
        let view = self.opened[name].control.clone();
        let what = self.rng.usize(..7);
        println!("{what} with {name}");
        match what {
            0 => {
                let compared = view.check(RebuildOptions::default()).unwrap();
                assert!(compared.is_equal(), "{compared:?}");
            }
            1 => drop(view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap()),
            2 if view.generations().unwrap().len() > 1 => {
                view.rollback().unwrap().wait().unwrap();
            }
            3 => {
                drop(view);
                self.reopen_all(|_| {});
            }
            4 => {
                drop(view);
                self.crash();
            }
            5 => {
                // Only its rows go; the order is nobody's own.
                self.opened.remove(name).unwrap().control.close().unwrap();
                drop(view);
                let folder = name.split(',').next().unwrap();
                for name in ["first", "first, version 2"].iter().filter(|it| it.starts_with(folder))
                {
                    drop(self.opened.remove(name));
                }
                std::fs::remove_dir_all(self.views().join(folder)).unwrap();
                self.open(name);
            }
            _ => {
                drop(view);
                let all = ["first", "first, version 2", "second", "third", "tabled"];
                let new = all[self.rng.usize(..all.len())];
                if !self.opened.contains_key(new) {
                    self.open(new);
                }
            }
        }
    }
}

#[test]
fn every_view_and_every_rebuild_has_the_same_order_whatever_happens() {
    let mut differed = 0;
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed, 2 + seed as usize % 3);
        // So much that first generations are built in bulk.
        world.filler_bytes = if seed % 3 == 0 { 20_000 } else { 0 };
        let ahead = [0, 60][world.rng.usize(..2)];
        world.append_some(ahead);
        ["first", "tabled"].into_iter().for_each(|name| world.open(name));
        for _ in 0..12 {
            world.append_some(12);
            let seen = world.rows();
            world.do_something();
            assert_eq!(world.rows(), seen, "what was seen stays");
        }
        // With the folder the order goes as well, and another one is as good.
        let before = world.rows();
        world.close_all();
        std::fs::remove_dir_all(world.views()).unwrap();
        ["first", "tabled"].into_iter().for_each(|name| world.open(name));
        differed += usize::from(world.rows() != before);
        for view in world.opened.values() {
            assert!(view.control.check(RebuildOptions::default()).unwrap().is_equal());
        }
    }
    assert!(differed > 0, "the order makes a difference");
}

/// Rows of an order that isn't recorded any more are made anew, in one that is.
#[test]
fn a_view_whose_order_was_lost_is_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 31, 2);
    world.open("first");
    world.append_some(40);
    world.rows();
    let log = world.log();
    let kept = std::fs::read(&log).unwrap();
    for cut_bytes in [kept.len(), 68 - 16, 40 * 4] {
        let length = kept.len() - cut_bytes;
        world.close_all();
        if length == 0 {
            std::fs::remove_file(&log).unwrap();
        } else {
            let header = length.max(52);
            std::fs::write(&log, &std::fs::read(&log).unwrap()[..header]).unwrap();
        }
        world.open("first");
        let view = &world.opened["first"].control;
        assert!(view.status().set_aside.is_some(), "{cut_bytes} bytes");
        world.tokens.iter().flatten().for_each(|token| view.wait_for(token, PATIENCE).unwrap());
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
        world.append_some(20);
    }
    // Damage in the middle isn't guessed at.
    world.close_all();
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[70] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let refused = open_keyed::<0, 1>(&world.stores[0], &world.journals(), ViewOptions::default());
    let error = refused.map(drop).unwrap_err();
    assert!(matches!(error, ViewError::DamagedIntake { file_offset: 52, .. }), "{error}");
    assert_eq!(error.code(), "view.damaged_intake");
}

/// They were set aside because the order that all views have doesn't lead to where they are: they don't come back. (Rows that are where
/// it leads by another order can't be told from its own.)
#[test]
fn rows_to_which_the_recorded_order_does_not_lead_are_not_rolled_back_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 35, 2);
    world.open("first");
    for n in 0..20 {
        world.append(n % 2, &[1]);
        world.rows(); // taken in by turns
    }
    world.close_all();
    std::fs::remove_file(world.log()).unwrap();
    // Taken in at once, one journal behind the other.
    for n in 0..20 {
        world.append(n % 2, &[1]);
    }
    let options = ViewOptions::default();
    let first = open_keyed::<0, 1>(&world.stores[0], &world.journals(), options).unwrap();
    let view = &first.control;
    assert!(view.status().set_aside.is_some());
    world.tokens.iter().flatten().for_each(|token| view.wait_for(token, PATIENCE).unwrap());
    let rows = (first.rows)();
    let live = || view.generations().unwrap().into_iter().find(|it| it.live).unwrap().number;
    let number = live();
    assert_eq!(view.generations().unwrap().len(), 2);
    let rolled_back = view.rollback().unwrap().wait();
    let Err(RebuildError::Stopped(stopped)) = rolled_back else { panic!("{rolled_back:?}") };
    assert!(matches!(*stopped, StopError::Order { .. }), "{stopped}");
    assert_eq!((live(), (first.rows)()), (number, rows));
    let token = world.append(0, &[2]);
    view.wait_for(&token, PATIENCE).unwrap();
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
}

/// A journal was replaced by an older copy and has gone on in another way.
#[test]
fn what_is_recorded_of_a_lost_history_is_forgotten_from_where_it_parts() {
    for seed in 40..44 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed, 3);
        let (journal, older) = (dir.path().join("store-1/journal"), dir.path().join("older"));
        world.open("second");
        world.append_some(30);
        world.append(1, &[1]);
        world.rows();
        world.close_all(); // it has nothing of what will be lost
        let early = world.opened.len();
        assert_eq!(early, 0);
        world.reopen_store(1, || copy_dir(&journal, &older));
        world.open("first");
        world.append_some(30);
        world.append(1, &[2]);
        world.rows();
        world.reopen_store(1, || replace_dir(&older, &journal));
        let is_longer = world.rng.bool();
        let refuse = || {
            let refused =
                open_keyed::<0, 1>(&world.stores[0], &world.journals(), ViewOptions::default());
            assert!(matches!(refused.map(drop), Err(ViewError::LostTail { .. })));
        };
        refuse();
        let log = std::fs::read(world.log()).unwrap();
        refuse();
        assert_eq!(std::fs::read(world.log()).unwrap(), log, "a witness of a loss changes nothing");
        if is_longer {
            for _ in 0..80 {
                world.append(1, &[3]);
            }
        }
        world.tokens[1] = None;
        let options = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
        let first = open_keyed::<0, 1>(&world.stores[0], &world.journals(), options).unwrap();
        assert!(first.control.status().set_aside.is_some());
        assert!(std::fs::read(world.log()).unwrap().len() < log.len(), "cut");
        world.open("second");
        assert!(world.opened["second"].control.status().set_aside.is_none(), "it goes on");
        world.append(1, &[4]);
        let rows = world.rows();
        let tokens = world.tokens.iter().flatten();
        tokens.for_each(|token| first.control.wait_for(token, PATIENCE).unwrap());
        assert_eq!((first.rows)(), rows);
        assert!(first.control.check(RebuildOptions::default()).unwrap().is_equal());
    }
}

/// A view that has nothing of what is lost would cut the order out from under the views that come back with it.
#[test]
fn the_order_outlives_a_loss_that_is_mended_and_whatever_is_opened_in_between() {
    for seed in 45..47 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed, 2);
        let (journal, older) = (dir.path().join("store-1/journal"), dir.path().join("older"));
        let newer = dir.path().join("newer");
        world.append_some(20);
        ["first", "second"].into_iter().for_each(|name| world.open(name));
        world.append(1, &[1]);
        world.rows();
        world.opened.remove("second").unwrap().control.close().unwrap(); // it has nothing of what will be lost
        world.reopen_store(1, || copy_dir(&journal, &older));
        world.open("first");
        world.append_some(30);
        world.append(1, &[2]);
        world.append(0, &[2]);
        let seen = world.rows();
        world.reopen_store(1, || {
            copy_dir(&journal, &newer);
            replace_dir(&older, &journal);
        });
        let log = std::fs::read(world.log()).unwrap();
        let options = ViewOptions::default;
        for open in [open_keyed::<2, 1>, open_keyed::<1, 1>, open_keyed::<0, 2>] {
            let refused = open(&world.stores[0], &world.journals(), options()).map(drop);
            let Err(ViewError::LostTail { checkpoint, .. }) = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(checkpoint.position, world.tokens[1].unwrap().position);
            assert_eq!(std::fs::read(world.log()).unwrap(), log);
        }
        world.reopen_store(1, || replace_dir(&newer, &journal));
        ["third", "first", "second"].into_iter().for_each(|name| world.open(name));
        assert_eq!(world.rows(), seen);
        // Who has accepted the loss decides for all.
        world.reopen_store(1, || replace_dir(&older, &journal));
        world.tokens[1] = None;
        let options = ViewOptions { lost_tail: LostTail::SetAside, ..options() };
        let new = open_keyed::<0, 2>(&world.stores[0], &world.journals(), options).unwrap();
        assert!(std::fs::read(world.log()).unwrap().len() < log.len());
        let own = open_keyed::<0, 1>(&world.stores[0], &world.journals(), ViewOptions::default());
        assert!(
            matches!(own.map(drop), Err(ViewError::LostTail { .. })),
            "it is asked itself, too"
        );
        drop(new);
    }
}

/// A mirror that was fetched anew, say: what it has is taken in, and then the others wait for it.
#[test]
fn a_journal_that_has_less_than_was_taken_in_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 50, 2);
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let journal = dir.path().join("store-1/journal");
    world.filler_bytes = 20_000; // so much that it is built in bulk
    world.open("first");
    world.append_some(80);
    world.rows();
    let backup = dir.path().join("backup");
    world.stores[1].journal().backup(&backup).unwrap();
    world.append(1, &[1]);
    world.rows();
    let last = world.append(0, &[1]);
    let seen = world.rows();
    world.close_all();
    let journals = |dir: &Path| {
        let (older, _) = Journal::open_read_only(&fs, dir).unwrap();
        [world.stores[0].journal().clone(), older]
    };
    let of = |journals: &[Journal]| {
        open_keyed::<1, 1>(&world.stores[0], journals, ViewOptions::default()).unwrap()
    };
    let behind = of(&journals(&backup));
    let has_all = |view: &Opened| {
        let end = world.stores[0].journal().end().position.get() - 1;
        view.control.status().journals.iter().all(|it| {
            let at = it.checkpoint.applied;
            at.position.get() >= end || at.journal != last.journal
        }) && matches!(view.control.status().state, ViewState::CatchingUp)
    };
    let deadline = Instant::now() + PATIENCE;
    while !has_all(&behind) {
        assert!(Instant::now() < deadline, "{:?}", behind.control.status());
        std::thread::yield_now();
    }
    assert!(behind.control.wait_for(&last, Duration::from_millis(200)).is_err(), "out of turn");
    // A rebuild gets as far, and no further.
    behind.control.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    assert!(behind.control.check(RebuildOptions::default()).unwrap().is_equal());
    behind.control.close().unwrap();
    drop(behind);
    let again = of(&journals(&journal));
    again.control.wait_for(&last, PATIENCE).unwrap();
    assert_eq!((again.rows)(), seen);
}

/// What was recorded of it can't be judged before the mirror gets as far.
#[cfg(feature = "shipping")]
#[test]
fn a_mirror_that_goes_on_in_another_way_than_was_recorded_stops_its_views_and_they_are_made_anew() {
    use headwater::format::intake::{IntakeHeader, Run};
    use headwater::shipping::{FollowOptions, ServeOptions, follow, serve};
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 51, 2);
    world.append_some(20);
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let origin = world.stores[1].journal().clone();
    let server = serve(origin, address, ServeOptions::default()).unwrap();
    let (fs, options) = (Arc::new(OsFs), FollowOptions::default());
    let at = server.local_addr().to_string();
    let mirror = follow(fs, &dir.path().join("mirror"), at, options).unwrap();
    mirror.wait_for(&world.tokens[1].unwrap(), PATIENCE).unwrap();
    let mirrored = mirror.journal().unwrap();
    let journals = [world.stores[0].journal().clone(), mirrored.clone()];

    let header = IntakeHeader::new(journals.iter().map(Journal::id).collect());
    let mut end = mirrored.end();
    end.offset += 64;
    end.position = Position::new(end.position.get() + 3);
    let run = Run { journal: mirrored.id(), end: end.into() };
    let record = header.encode_run(0, 0, &run).unwrap();
    let folder = world.views().join(".intake");
    std::fs::create_dir_all(&folder).unwrap();
    let log = folder.join(header.name());
    std::fs::write(&log, [header.encode(), record.to_vec()].concat()).unwrap();

    let open =
        || open_keyed::<0, 1>(&world.stores[0], &journals, ViewOptions::default()).unwrap().control;
    let view = open();
    view.wait_for(&world.tokens[1].unwrap(), PATIENCE).unwrap();
    let stream = StreamId::new("told").unwrap();
    let append = |store: &Store| {
        let events = [NewEvent::raw("told", vec![1, 1]).unwrap()];
        store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap().token()
    };
    for _ in 0..3 {
        world.tokens[1] = Some(append(&world.stores[1]));
    }
    let refused = view.wait_for(&world.tokens[1].unwrap(), PATIENCE).unwrap_err();
    let WaitError::Stopped(stopped) = refused else { panic!("{refused}") };
    assert!(matches!(*stopped, StopError::Order { .. }), "{stopped}");
    assert_eq!(stopped.code(), "view_stop.order");
    // Recorded behind the run that is lost, what there is now would keep it from being forgotten, for ever.
    world.tokens[1] = Some(append(&world.stores[1]));
    mirror.wait_for(&world.tokens[1].unwrap(), PATIENCE).unwrap();
    let recorded = std::fs::read(&log).unwrap();
    let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait();
    let Err(RebuildError::Stopped(stopped)) = rebuilt else { panic!("{rebuilt:?}") };
    let StopError::Intake { source, .. } = &*stopped else { panic!("{stopped}") };
    assert!(matches!(**source, ViewError::StaleIntake { .. }), "{source}");
    assert_eq!(std::fs::read(&log).unwrap(), recorded);
    view.close().unwrap();
    drop(view);
    let view = open();
    assert!(view.status().set_aside.is_some());
    let tokens = world.tokens.iter().flatten();
    tokens.for_each(|token| view.wait_for(token, PATIENCE).unwrap());
    assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
}

/// What is recorded of a tail that was set aside will never be there again: the others don't wait for it.
#[cfg(feature = "shipping")]
#[test]
fn a_tail_that_was_set_aside_from_a_mirror_is_forgotten_in_the_order_as_well() {
    for seed in 54..57 {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World::new(dir.path(), seed, 2);
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let options = JournalOptions::default();
        let at = dir.path().join("mirror");
        let mut mirror =
            Ingest::create(&fs, &at, world.stores[1].journal().id(), &options).unwrap();
        let own = world.stores[0].journal().clone();
        let open = |world: &World, mirror: &Journal| {
            let journals = [own.clone(), mirror.clone()];
            open_keyed::<0, 1>(&world.stores[0], &journals, ViewOptions::default()).unwrap()
        };
        let wait = |view: &Opened, token: Token| view.control.wait_for(&token, PATIENCE).unwrap();
        let view = open(&world, mirror.journal());
        let mut common = world.stores[1].journal().end();
        for round in 0..3 {
            // One run of the mirror, of several batches.
            for n in 0..4 {
                let token = world.append(1, &[n]);
                if round == 1 && n == 1 {
                    common = world.stores[1].journal().end();
                }
                assert_eq!(token.position.get(), 4 * round + u64::from(n) + 1);
            }
            feed(&mut mirror, world.stores[1].journal());
            wait(&view, world.tokens[1].unwrap());
            let token = world.append(0, &[1]);
            wait(&view, token);
        }
        let lost = world.stores[1].journal().end();
        view.control.close().unwrap();
        drop(view);
        let (mut mirror, orphans) = mirror.set_aside(common.position, &options).unwrap();
        assert_eq!(orphans.unwrap().end, Some(lost));
        // Everything that is there is taken in at once, also if the mirror is never fed again.
        let view = open(&world, mirror.journal());
        assert!(view.control.status().set_aside.is_some());
        let last = world.append(0, &[2]);
        wait(&view, last);
        wait(&view, common.token());
        // The new history, which gets further than the old one.
        let backup = dir.path().join("backup");
        world.stores[1].journal().backup(&backup).unwrap();
        let restored = dir.path().join("restored");
        restore(&fs, &backup, &restored.join("journal"), Some(common.position)).unwrap();
        world.stores[1] = Store::open(&restored).unwrap();
        for n in 0..12 {
            let token = world.append(1, &[n % 5]);
            feed(&mut mirror, world.stores[1].journal());
            wait(&view, token);
        }
        assert!(world.stores[1].journal().end().position > lost.position);
        assert!(view.control.check(RebuildOptions::default()).unwrap().is_equal());
        view.control.close().unwrap();
        drop(view);
        let view = open(&world, mirror.journal());
        assert!(view.control.status().set_aside.is_none(), "once is enough");
    }
}

/// Feeds a mirror from where it is to the end of `origin`.
fn feed(mirror: &mut Ingest, origin: &Journal) {
    let mut cursor = origin.cursor(mirror.end().position).unwrap();
    while let Some(batch) = cursor.next_batch().unwrap() {
        if let Some(page) = batch.page {
            mirror.segment(&page.bytes()).unwrap();
        }
        mirror.batch(batch.batch.bytes()).unwrap();
    }
    mirror.sync().unwrap();
}

/// Longer than anybody should: a view that follows isn't stopped by that.
#[test]
fn a_view_that_follows_waits_for_who_records_however_long_that_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 52, 2);
    world.open("first");
    world.append_some(10);
    world.rows();
    let lock = world.log().with_extension("lock");
    let held = OsFs.lock(&lock, "somebody else").unwrap().unwrap();
    let token = world.append(1, &[1]);
    let view = world.opened["first"].control.clone();
    let waited = view.wait_for(&token, Duration::from_secs(11)); // who opens a view is refused behind 10
    assert!(matches!(waited, Err(WaitError::Timeout { .. })), "{waited:?}");
    drop(held);
    view.wait_for(&token, PATIENCE).unwrap();
    // Nor is its closing.
    let held = OsFs.lock(&lock, "somebody else").unwrap().unwrap();
    world.append(1, &[1]);
    let began = Instant::now();
    view.close().unwrap();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    drop(held);
}

/// It is told what it is, and no view.
#[test]
fn the_doctor_examines_the_order_of_intake() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 70, 2);
    world.open("first");
    world.append_some(20);
    world.rows();
    world.close_all();
    let log = world.log();
    let journal = dir.path().join("store-0/journal");
    let examined = || {
        let checks = doctor::examine(&journal).unwrap().checks.into_iter();
        let (intake, others): (Vec<_>, Vec<_>) = checks.partition(|it| it.name == "intake");
        assert!(!others.iter().any(|it| it.finding.contains(".intake")), "{others:?}");
        intake.into_iter().next().unwrap()
    };
    let fine = examined();
    let name = log.file_name().unwrap().to_str().unwrap();
    let expected = format!("{name}: the order of 2 journals");
    assert!(fine.level < Level::Warn && fine.finding.starts_with(&expected), "{fine:?}");
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let damaged = examined();
    assert!(damaged.level == Level::Warn && damaged.finding.contains("byte 52"), "{damaged:?}");
}

const CHILD: &str = "HEADWATER_INTAKE_CHILD";

/// Appends to all journals and has views over them, until it is killed: not a test.
#[test]
fn process_that_takes_in_until_it_is_killed() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let dir = PathBuf::from(dir);
    let mut world = World::new(&dir, 0, 0);
    let options = |chunk_bytes| ViewOptions {
        chunk_bytes,
        flush_bytes: 1,
        flush_interval: Duration::from_millis(1),
        ..ViewOptions::default()
    };
    world.stores = (0..3).map(|n| Store::open(dir.join(format!("store-{n}"))).unwrap()).collect();
    world.tokens = vec![None; 3];
    world.rng = Rng::new();
    let journals = world.journals();
    let _first = open_keyed::<0, 1>(&world.stores[0], &journals, options(1)).unwrap();
    let _second = open_keyed::<1, 1>(&world.stores[0], &journals, options(1 << 20)).unwrap();
    let _tabled = open_tabled(&world.stores[0], &journals, options(500)).unwrap();
    for n in 0_u64.. {
        world.append_some(1);
        if n % 16 == 0 {
            writeln!(std::io::stdout(), "appended").unwrap();
        }
    }
}

#[test]
fn a_killed_process_leaves_an_order_that_all_its_views_are_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = World::new(dir.path(), 60, 3);
    for round in 0..5 {
        world.stores.drain(..).for_each(|store| store.close().unwrap());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "intake::process_that_takes_in_until_it_is_killed",
            "--exact",
            "--nocapture",
        ]);
        command.env(CHILD, dir.path()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let appended = || lines.next().map(Result::unwrap).unwrap().contains("appended");
        let wanted = world.rng.usize(1..12);
        let seen = std::iter::repeat_with(appended).filter(|it| *it).take(wanted).count();
        assert_eq!(seen, wanted);
        child.kill().unwrap();
        child.wait().unwrap();
        let store = |n| Store::open(dir.path().join(format!("store-{n}"))).unwrap();
        world.stores = (0..3).map(store).collect();
        world.tokens = world.journals().iter().map(|it| Some(it.end().token())).collect();
        ["first", "second", "tabled"].into_iter().for_each(|name| world.open(name));
        let rows = world.rows();
        for view in world.opened.values() {
            assert!(view.control.check(RebuildOptions::default()).unwrap().is_equal());
        }
        world.open("third");
        assert_eq!(world.rows(), rows, "round {round}");
        world.close_all();
    }
}
