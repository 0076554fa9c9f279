//! SIGKILL at any moment of a view's life: apply, flush, first build, rebuild, flip, rollback, retry, discard.
//!
//! ```text
//!   driver ──starts──▶ child: opens store and view, appends, and does one operation after the other
//!     │   ◀── pipe: "open GENERATION", "applied OFFSET", "begin rebuild", "live GENERATION", "discarded KEY POSITION" …
//!     │
//!     ├── SIGKILL
//!     ▼
//!   opens both again, with a fold that is mended: rows, index and what is parked against a recount of the journal
//! ```
//! Two kinds of worlds take turns. In one nothing is poison, and generations come and go; in the other one events can't
//! be decoded or folded, by lives whose code isn't mended, and are retried and discarded.
//!
//! After every kill:
//! - the rows are what the journal makes of the events that are neither parked nor discarded, once each, in order;
//!   every parked event is there once, behind the row's head; the index says what the rows say; and the view proves it
//!   itself (`check`), where something is parked in a copy in which that is folded first;
//! - an inline view, when its opening returns, has applied every event whose append had returned;
//! - the generation that serves is the one that was told last, or the one that was to take over;
//! - there is nothing on disk that isn't listed;
//! - what was told as discarded is written down;
//! - no more is to be folded again than the options say;
//! - no event was taken for one that kills.
//!
//! In the life of an inline view: behind each of its appends it has applied that, and it never shows what isn't durable.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::codec::CodecError;
use headwater::planted::{self, Bug};
use headwater::upcast::Step;
use headwater::view::{
    Fold, FoldError, Index, Indexes, Keys, RebuildOptions, View, ViewHandle, ViewOptions, ViewState,
};
use headwater::{
    Append, Appended, EventKind, EventKindRef, ExpectedRevision, JournalOptions, KnownKind,
    NewEvent, Payload, PayloadCodec, Position, Recorded, Store, StreamId,
};

use crate::child::say;
use crate::driver::{Running, copy_dir};
use crate::{Plan, Reached, Stop};

const PATIENCE: Duration = Duration::from_secs(60);
/// A world is begun anew behind so many bytes of its journal: each look reads all of it.
const WORLD_BYTES_MAX: u64 = 3 << 20;
const SEGMENT_BYTES: u64 = 128 << 10;
const BATCH_BYTES_MAX: u32 = 32 << 10;
/// At first there is as much as makes a first build one in bulk.
const FIRST_BYTES: usize = 1100 << 10;

// ------------------------------------------------------------------------------------------------ the view

/// Whether the code of this process takes what is poison.
static MENDED: AtomicBool = AtomicBool::new(false);

/// An event: its key, what is wrong with it, a number, and a filling.
#[derive(Clone, Debug)]
struct Added {
    key: u8,
    poison: Poison,
    value: u64,
    filling: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Poison {
    No,
    /// The fold fails in the row of the key.
    Fold,
    Undecodable,
}

impl headwater::Event for Added {
    const KINDS: &'static [KnownKind] = &[KnownKind::present("added", 1)];

    fn kind(&self) -> EventKind {
        EventKind { name: "added", schema_version: 1 }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        let poison = match self.poison {
            Poison::No => 0,
            Poison::Fold => 1,
            Poison::Undecodable => 2,
        };
        let filling = vec![self.key; self.filling];
        let bytes = [&[self.key, poison], &self.value.to_le_bytes()[..], &filling].concat();
        Ok((PayloadCodec::Raw, bytes))
    }

    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError> {
        if kind.name != "added" {
            return Ok(Step::Foreign);
        }
        let (key, bytes) = payload.bytes.split_first().unwrap();
        let (poison, bytes) = bytes.split_first().unwrap();
        let (value, filling) = bytes.split_first_chunk().unwrap();
        let poison = match poison {
            0 => Poison::No,
            1 => Poison::Fold,
            _ => Poison::Undecodable,
        };
        if poison == Poison::Undecodable && !MENDED.load(Ordering::Relaxed) {
            return Err(CodecError::NotSerde { codec: payload.codec });
        }
        let value = u64::from_le_bytes(*value);
        Ok(Step::Value(Self { key: *key, poison, value, filling: filling.len() }))
    }
}

/// How many events, and what depends on each of them, on their order, and on how often each was folded.
type Row = (u64, u64);

/// Of each key's events, and of each third key's.
fn keys_of(added: &Added) -> [u8; 2] {
    [added.key, 200 + added.key % 3]
}

fn is_poison(key: u8, added: &Added) -> bool {
    added.poison == Poison::Fold && key < 200
}

fn step(row: Option<Row>, value: u64, position: Position) -> Row {
    let (count, trace) = row.unwrap_or_default();
    (count + 1, trace.wrapping_mul(31).wrapping_add(value).wrapping_add(position.get()))
}

struct Sums;

impl Sums {
    const BY_COUNT: Index<Self, u64> = Index::new("by_count", |_, row: &Row, keys| keys.add(row.0));
}

impl View for Sums {
    const NAME: &'static str = "sums";
    const VERSION: u32 = 1;
    type Key = u8;
    type Row = Row;
    type Event = Added;

    fn route(&self, event: &Recorded<Added>, keys: &mut Keys<u8>) {
        keys.extend(keys_of(event.data()));
    }

    fn fold(
        &self,
        key: &u8,
        row: Option<Row>,
        event: &Recorded<Added>,
    ) -> Result<Fold<Row>, FoldError> {
        if is_poison(*key, event.data()) && !MENDED.load(Ordering::Relaxed) {
            return Err("no such sum".into());
        }
        Ok(Fold::Put(step(row, event.data().value, event.position())))
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none().with(Self::BY_COUNT)
    }
}

fn batch(rng: &mut Rng, poison: bool, filling: usize) -> Append {
    let event = |rng: &mut Rng| {
        let poison = match rng.u8(..) {
            0..10 if poison => Poison::Fold,
            10..14 if poison => Poison::Undecodable,
            _ => Poison::No,
        };
        let (key, value) = (rng.u8(..40), rng.u64(..));
        let filling = rng.usize(..=filling);
        NewEvent::typed(&Added { key, poison, value, filling }).unwrap()
    };
    let events: Vec<NewEvent> = (0..rng.usize(1..6)).map(|_| event(rng)).collect();
    Append::to(&StreamId::new("sums").unwrap(), ExpectedRevision::Any, events)
}

fn open_store(dir: &Path) -> Result<Store, Stop> {
    let options = JournalOptions {
        segment_bytes_first: SEGMENT_BYTES,
        segment_bytes_max: SEGMENT_BYTES,
        batch_bytes_max: BATCH_BYTES_MAX,
        group_bytes_max: BATCH_BYTES_MAX.into(),
        ..JournalOptions::default()
    };
    let store = Store::builder(dir.join("store")).create_if_missing().journal_options(options);
    store.open().map_err(|error| Stop::Violated(format!("the store can't be opened: {error}")))
}

// ----------------------------------------------------------------------------------------------- the child

/// What a child is to do, in its arguments.
#[derive(Clone, Debug)]
struct Life {
    dir: PathBuf,
    seed: u64,
    kind: Kind,
    mended: bool,
    inline: bool,
    chunk_bytes: u64,
    flush_bytes: u64,
    plant: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing is poison, and generations come and go.
    Generations,
    /// Events are parked, retried and discarded.
    Poison,
}

impl Life {
    fn to_args(&self) -> Vec<String> {
        let Self { seed, chunk_bytes, flush_bytes, .. } = self;
        let word = |is: bool, word: &str| if is { word.to_owned() } else { "-".to_owned() };
        vec![
            "view-child".into(),
            self.dir.to_str().unwrap().into(),
            seed.to_string(),
            chunk_bytes.to_string(),
            flush_bytes.to_string(),
            word(self.kind == Kind::Poison, "poison"),
            word(self.mended, "mended"),
            word(self.inline, "inline"),
            word(self.plant, "plant"),
        ]
    }

    fn from_args(args: &[String]) -> Self {
        let [dir, seed, chunk_bytes, flush_bytes, kind, mended, inline, plant] = args else {
            panic!("not orders: {args:?}")
        };
        Self {
            dir: dir.into(),
            seed: seed.parse().unwrap(),
            kind: if kind == "poison" { Kind::Poison } else { Kind::Generations },
            mended: mended == "mended",
            inline: inline == "inline",
            chunk_bytes: chunk_bytes.parse().unwrap(),
            flush_bytes: flush_bytes.parse().unwrap(),
            plant: plant == "plant",
        }
    }

    fn options(&self) -> ViewOptions {
        ViewOptions {
            chunk_bytes: self.chunk_bytes,
            flush_bytes: self.flush_bytes,
            flush_interval: Duration::from_secs(3600),
            inline: self.inline,
            ..ViewOptions::default()
        }
    }
}

/// Lives until it is killed.
pub(crate) fn child(args: &[String]) -> ! {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        std::process::exit(1); // whatever the other thread is doing
    }));
    let life = Life::from_args(args);
    MENDED.store(life.mended, Ordering::Relaxed);
    if life.plant {
        planted::plant_everywhere(Bug::RowsDurableAlone);
    }
    let Ok(store) = open_store(&life.dir) else { std::process::exit(1) };
    std::thread::scope(|scope| {
        scope.spawn(|| keep_appending(&store, &life));
        Worker { store: &store, life: &life, rng: Rng::with_seed(life.seed) }.work()
    })
}

fn keep_appending(store: &Store, life: &Life) {
    let mut rng = Rng::with_seed(life.seed ^ 1);
    loop {
        let appended = store.append(&batch(&mut rng, life.kind == Kind::Poison, 300)).unwrap();
        if life.inline {
            say(&format!("acknowledged {}", behind(&appended)));
        }
        std::thread::sleep(Duration::from_micros(rng.u64(..2000)));
    }
}

/// Where the next event lies.
fn behind(appended: &Appended) -> u64 {
    appended.receipt().events.last().map_or(0, |it| it.position.get() + 1)
}

struct Worker<'a> {
    store: &'a Store,
    life: &'a Life,
    rng: Rng,
}

impl Worker<'_> {
    fn open(&self) -> ViewHandle<Sums> {
        let view = self.store.view_with(Sums, self.life.options()).unwrap();
        say_live(&view);
        view
    }

    fn work(&mut self) -> ! {
        let mut view = self.open();
        loop {
            match self.rng.u8(..10) {
                0 => {
                    say("begin close");
                    view.close().unwrap();
                    drop(view);
                    view = self.open();
                }
                1 => {
                    say("begin check");
                    // With something parked it is refused, at the first event that can't be folded.
                    drop(view.check(RebuildOptions::default()));
                }
                2..5 if self.life.kind == Kind::Generations || self.life.mended => {
                    self.another_generation(&view);
                }
                2..8 if self.life.kind == Kind::Poison => self.decide(&view),
                _ => {
                    let appended = self.store.append(&batch(&mut self.rng, false, 2000)).unwrap();
                    if self.life.inline {
                        let late = &appended.receipt().behind;
                        let applied = view.checkpoint().applied.position.get();
                        let is_there = applied >= behind(&appended);
                        assert!(is_there || !late.is_empty(), "applied {applied}: {appended:?}");
                    } else {
                        drop(view.wait_for(&appended.token(), Duration::from_millis(5)));
                    }
                }
            }
            if let Ok(snapshot) = view.snapshot() {
                let (shown, durable) = (snapshot.checkpoint(), self.store.journal().end());
                assert!(
                    shown.position <= durable.position,
                    "{shown:?} is shown, {durable:?} durable"
                );
            }
            say(&format!("applied {}", view.checkpoint().applied.offset));
        }
    }

    fn another_generation(&mut self, view: &ViewHandle<Sums>) {
        // In a world with poison, older generations lack what was decided upon since.
        let rolls_back = self.life.kind == Kind::Generations && self.rng.bool();
        say(if rolls_back { "begin rollback" } else { "begin rebuild" });
        let begun =
            if rolls_back { view.rollback() } else { view.rebuild(RebuildOptions::default()) };
        if let Ok(rebuild) = begun {
            drop(rebuild.wait());
        }
        say_live(view);
        if self.life.kind == Kind::Poison || self.rng.bool() {
            remove_all_but_live(view);
        }
    }

    fn decide(&mut self, view: &ViewHandle<Sums>) {
        let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
        let unrouted = view.unrouted_events().map(Result::unwrap).next();
        match self.rng.u8(..4) {
            0 if !self.life.mended => {
                if let Some(unrouted) = unrouted
                    && view.discard_unrouted(unrouted.position).is_ok()
                {
                    say(&format!("discarded - {}", unrouted.position));
                }
            }
            1 if !parked.is_empty() => {
                let it = &parked[self.rng.usize(..parked.len())];
                say("begin discard");
                if view.discard(&it.key, it.first).is_ok() {
                    say(&format!("discarded {} {}", it.key, it.first));
                }
            }
            _ if !parked.is_empty() => {
                say("begin retry");
                drop(view.retry(&parked[self.rng.usize(..parked.len())].key));
            }
            _ => {}
        }
    }
}

/// The generation that serves: none before the first is built.
fn live(view: &ViewHandle<Sums>) -> Option<u32> {
    view.generations().unwrap().iter().find(|it| it.live).map(|it| it.number)
}

fn say_live(view: &ViewHandle<Sums>) {
    if let Some(live) = live(view) {
        say(&format!("live {live}"));
    }
}

fn remove_all_but_live(view: &ViewHandle<Sums>) {
    for it in view.generations().unwrap().iter().filter(|it| !it.live) {
        drop(view.remove_generation(it.version, it.number));
    }
}

// ---------------------------------------------------------------------------------------------- the driver

/// What is known of a world from what its children have said.
struct World {
    dir: PathBuf,
    kind: Kind,
    told: Told,
}

/// What was said in one life.
#[derive(Debug, Default)]
struct Told {
    live: Option<u32>,
    applied: u64,
    /// Where the last event lies whose append has returned, and one more.
    acknowledged: u64,
    /// What was begun and not ended.
    under_way: Option<String>,
    discarded: BTreeSet<(Option<u8>, u64)>,
}

impl Told {
    /// Whether it says how far the worker is.
    fn note(&mut self, line: &str) -> bool {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["live", number] => self.live = Some(number.parse().unwrap()),
            ["applied", offset] => {
                self.applied = offset.parse().unwrap();
                self.under_way = None;
            }
            ["acknowledged", next] => {
                self.acknowledged = self.acknowledged.max(next.parse().unwrap());
                return false;
            }
            ["begin", what] => self.under_way = Some((*what).to_owned()),
            ["discarded", key, position] => {
                self.discarded.insert((key.parse().ok(), position.parse().unwrap()));
            }
            _ => panic!("the child says {line:?}"),
        }
        true
    }
}

#[derive(Debug, Default)]
struct Tally {
    kills: usize,
    checks: usize,
    inline: usize,
    parked: usize,
    under_way: BTreeMap<String, usize>,
}

fn violated(what: impl Into<String>) -> Stop {
    Stop::Violated(what.into())
}

impl World {
    fn new(dir: PathBuf, kind: Kind, rng: &mut Rng) -> Result<Self, Stop> {
        drop(std::fs::remove_dir_all(&dir));
        std::fs::create_dir_all(&dir).unwrap();
        let store = open_store(&dir)?;
        while store.journal().end().offset < FIRST_BYTES as u64 {
            store.append(&batch(rng, kind == Kind::Poison, 6000)).unwrap();
        }
        store.close().unwrap();
        Ok(Self { dir, kind, told: Told::default() })
    }

    fn views(&self) -> PathBuf {
        self.dir.join("store/views")
    }

    /// One life of a child, to its end; then a look at what it has left.
    fn round(&mut self, rng: &mut Rng, plant: bool, tally: &mut Tally) -> Result<(), Stop> {
        if rng.u8(..12) == 0 {
            // Views are disposable: the next life begins with building them.
            drop(std::fs::remove_dir_all(self.views()));
            self.told.live = None;
        }
        let life = Life {
            dir: self.dir.clone(),
            seed: rng.u64(..),
            kind: self.kind,
            mended: rng.u8(..3) == 0,
            inline: self.kind == Kind::Generations && rng.u8(..3) == 0,
            chunk_bytes: rng.u64(1..16 << 10),
            flush_bytes: rng.u64(1..64 << 10),
            plant,
        };
        let mut running = Running::spawn(&life.to_args(), &[]);
        let lines = if rng.u8(..6) == 0 { 0 } else { rng.usize(..10) };
        let mut heard = 0;
        while heard < lines {
            let Some(line) = running.line() else {
                let (_, stderr) = running.kill_and_hear();
                return Err(violated(format!("the child ended by itself: {stderr}")));
            };
            heard += usize::from(self.told.note(&line));
        }
        let sleep_us = if lines == 0 { rng.u64(..120_000) } else { rng.u64(..8_000) };
        std::thread::sleep(Duration::from_micros(sleep_us));
        let (lines, stderr) = running.kill_and_hear();
        for line in &lines {
            self.told.note(line);
        }
        if stderr.contains("panicked") {
            return Err(violated(format!("the child panicked: {stderr}")));
        }
        tally.kills += 1;
        tally.inline += usize::from(life.inline);
        let under_way = self.told.under_way.take().unwrap_or_else(|| "append".to_owned());
        *tally.under_way.entry(under_way.clone()).or_default() += 1;
        self.look(rng, &life, &under_way, tally).map_err(|stop| match stop {
            Stop::Violated(what) => {
                let kept = if plant { "planted".to_owned() } else { self.keep() };
                violated(format!("{what}; in {under_way:?} of {life:?}; {kept}"))
            }
            skipped @ Stop::Skipped(_) => skipped,
        })
    }

    fn keep(&self) -> String {
        let kept = tempfile::Builder::new()
            .prefix("faults-violation-")
            .tempdir_in(crate::target_dir())
            .unwrap()
            .keep();
        copy_dir(&self.dir, &kept);
        format!("its files as they are now: {}", kept.display())
    }

    fn look(
        &mut self,
        rng: &mut Rng,
        life: &Life,
        under_way: &str,
        tally: &mut Tally,
    ) -> Result<(), Stop> {
        let store = open_store(&self.dir)?;
        let view = open_view(&store, life)?;
        let (applied, acknowledged) = (view.checkpoint().applied.position, self.told.acknowledged);
        if life.inline && applied.get() < acknowledged {
            return Err(violated(format!(
                "opened at {applied}, acknowledged up to {acknowledged}"
            )));
        }
        let durable = view.checkpoint().durable.offset;
        self.look_at_live(&view, under_way)?;
        // Twice: one flush may be under way. And chunks, whose last batch may go beyond what they may have.
        let bound = 2 * (life.flush_bytes + life.chunk_bytes + u64::from(BATCH_BYTES_MAX));
        if self.told.applied > durable + bound && !self.was_built(&view) {
            let applied = self.told.applied;
            return Err(violated(format!("applied {applied}, but durable is only {durable}")));
        }
        catch_up(&view)?;
        self.look_at_files(&view)?;
        tally.parked += self.compare(&store, &view)?;
        if !view.deadly_events().is_empty() {
            return Err(violated(format!("taken for deadly: {:?}", view.deadly_events())));
        }
        // What is parked may stay so for several lives: a copy shows what the rows are without it.
        let parked = view.status().parked;
        let in_copy = (parked.events > 0 || parked.unrouted > 0) && rng.u8(..3) > 0;
        if !in_copy {
            drain_and_check(&view)?;
        }
        tally.checks += 1;
        if self.kind == Kind::Poison {
            remove_all_but_live(&view);
        }
        self.told = Told { live: live(&view), ..Told::default() };
        view.close().map_err(|error| violated(format!("can't be closed: {error}")))?;
        let is_long = store.journal().end().offset > WORLD_BYTES_MAX;
        drop(view);
        store.close().map_err(|error| violated(format!("can't be closed: {error}")))?;
        if in_copy {
            self.check_a_copy(life)?;
        }
        if is_long {
            *self = Self::new(self.dir.clone(), self.kind, rng)?;
        }
        Ok(())
    }

    fn check_a_copy(&self, life: &Life) -> Result<(), Stop> {
        let copy = self.dir.with_extension("copy");
        copy_dir(&self.dir, &copy);
        let store = open_store(&copy)?;
        let view = open_view(&store, life)?;
        catch_up(&view)?;
        drain_and_check(&view)?;
        drop((view, store));
        std::fs::remove_dir_all(copy).unwrap();
        Ok(())
    }

    /// Another generation than the child has spoken of: nothing is known of how durable it is.
    fn was_built(&self, view: &ViewHandle<Sums>) -> bool {
        self.told.live != live(view)
    }

    fn look_at_live(&self, view: &ViewHandle<Sums>, under_way: &str) -> Result<(), Stop> {
        let Some(told) = self.told.live else { return Ok(()) };
        match live(view) {
            Some(found) if found == told || matches!(under_way, "rebuild" | "rollback") => Ok(()),
            found => Err(violated(format!("generation {found:?} serves, but {told} did"))),
        }
    }

    /// Everything in the view's folder is known, and a generation's folder has nothing that is only used on the way.
    fn look_at_files(&self, view: &ViewHandle<Sums>) -> Result<(), Stop> {
        let generations = view.generations().unwrap();
        let listed = generations.iter().map(|it| format!("{}.{}", it.version, it.number));
        let known = ["live", "lock", "lock.1", "discarded.1", "folding.1", "deadly.1"];
        let mut known: BTreeSet<String> = listed.chain(known.map(str::to_owned)).collect();
        // What the next replacement of a file begins with removing.
        known.extend(["live.new", "discarded.1.new", "deadly.1.new"].map(str::to_owned));
        let names = |dir: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(dir).unwrap();
            entries.map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
        };
        let dir = self.views().join("sums");
        if let Some(name) = names(&dir).into_iter().find(|name| !known.contains(name)) {
            return Err(violated(format!("{name} is left in {}", dir.display())));
        }
        for generation in generations {
            let left = names(&generation.folder);
            if let Some(name) = left.iter().find(|it| *it == "bulk" || *it == "not-kept") {
                return Err(violated(format!("{name} is left in {}", generation.folder.display())));
            }
        }
        Ok(())
    }

    /// Compares rows, index, and what is parked with the journal; how many events are parked.
    fn compare(&self, store: &Store, view: &ViewHandle<Sums>) -> Result<usize, Stop> {
        let decisions = self.decisions();
        let undone = self.told.discarded.difference(&decisions).next();
        if let Some(undone) = undone {
            return Err(violated(format!("{undone:?} was discarded, and isn't written down")));
        }
        let unrouted: BTreeSet<u64> =
            view.unrouted_events().map(|it| it.unwrap().position.get()).collect();
        let mut heads = BTreeMap::new();
        let mut parked: BTreeMap<u8, Vec<u64>> = BTreeMap::new();
        for it in view.parked().map(Result::unwrap) {
            let events = view.parked_events(&it.key).map(|it| it.unwrap().position.get());
            parked.insert(it.key, events.collect());
            heads.insert(it.key, it.first.get());
        }
        let counts = view.status().parked;
        let events: usize = parked.values().map(Vec::len).sum();
        let found = (parked.len() as u64, events as u64, unrouted.len() as u64);
        if found != (counts.keys, counts.events, counts.unrouted) {
            return Err(violated(format!("{found:?} are parked, counted {counts:?}")));
        }
        let (mut rows, mut expected) = (BTreeMap::new(), BTreeMap::<u8, Vec<u64>>::new());
        for event in store.read_all(Position::START).unwrap() {
            let event = event.unwrap();
            let position = event.position().get();
            let is_out = decisions.contains(&(None, position)) || unrouted.contains(&position);
            if is_out {
                continue;
            }
            let added = event.decode::<Added>().unwrap().into_iter().next().unwrap();
            for key in keys_of(added.data()) {
                let is_discarded = decisions.contains(&(Some(key), position));
                let is_parked = heads.get(&key).is_some_and(|first| position >= *first);
                if is_parked {
                    let list = parked.get(&key).is_some_and(|list| list.contains(&position));
                    // What was discarded may be there still: it is left out when it is its turn.
                    if !is_discarded || list {
                        expected.entry(key).or_default().push(position);
                    }
                } else if !is_discarded {
                    let row = step(rows.remove(&key), added.data().value, event.position());
                    rows.insert(key, row);
                }
            }
        }
        if expected != parked {
            return Err(violated(format!("parked is {parked:?}, expected {expected:?}")));
        }
        let found: BTreeMap<u8, Row> = view.range(..).map(Result::unwrap).collect();
        if let Some((key, row)) = rows.iter().find(|(key, row)| found.get(key) != Some(row)) {
            let found = found.get(key);
            return Err(violated(format!("row {key} is {found:?}, expected {row:?}")));
        }
        if let Some((key, row)) = found.iter().find(|(key, _)| !rows.contains_key(key)) {
            return Err(violated(format!("row {key} is {row:?}, expected none")));
        }
        let snapshot = view.snapshot().unwrap();
        let indexed = snapshot.by_index(Sums::BY_COUNT).unwrap().range(..).map(Result::unwrap);
        let indexed: BTreeMap<u8, Row> = indexed.map(|(_, key, row)| (key, row)).collect();
        if indexed != found {
            return Err(violated("the index differs from the rows"));
        }
        Ok(events + unrouted.len())
    }

    /// What is written down as discarded: key and position.
    fn decisions(&self) -> BTreeSet<(Option<u8>, u64)> {
        let text = std::fs::read_to_string(self.views().join("sums/discarded.1"));
        let text = text.unwrap_or_default();
        let decision = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let [_, position, _, key] = words.as_slice() else { return None };
            // The row's key in the database ends with the only byte of the view's key.
            let key = (*key != "-").then(|| u8::from_str_radix(&key[key.len() - 2..], 16).unwrap());
            Some((key, position.parse().ok()?))
        };
        text.lines().skip(1).filter_map(decision).collect()
    }
}

fn open_view(store: &Store, life: &Life) -> Result<ViewHandle<Sums>, Stop> {
    let (chunk_bytes, inline) = (life.chunk_bytes, life.inline);
    let options = ViewOptions { chunk_bytes, inline, ..ViewOptions::default() };
    let view = store.view_with(Sums, options);
    view.map_err(|error| violated(format!("the view can't be opened: {error}")))
}

fn catch_up(view: &ViewHandle<Sums>) -> Result<(), Stop> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match view.status().state {
            ViewState::CaughtUp => return Ok(()),
            ViewState::Stopped(error) => return Err(violated(format!("stopped: {error}"))),
            state if Instant::now() > deadline => {
                return Err(violated(format!("never caught up: {state:?}")));
            }
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// Folds what is parked, by a fold that takes it, and lets the view prove that it is what its history makes.
fn drain_and_check(view: &ViewHandle<Sums>) -> Result<(), Stop> {
    let parked: Vec<u8> = view.parked().map(|it| it.unwrap().key).collect();
    for key in parked {
        let retried = view.retry(&key).map_err(|error| violated(format!("retry: {error}")))?;
        if retried.left > 0 {
            return Err(violated(format!("can't be retried: {retried:?}")));
        }
    }
    let unrouted: Vec<Position> = view.unrouted_events().map(|it| it.unwrap().position).collect();
    for position in unrouted {
        view.discard_unrouted(position).map_err(|error| violated(format!("discard: {error}")))?;
    }
    let compared = view.check(RebuildOptions::default());
    let compared = compared.map_err(|error| violated(format!("check: {error}")))?;
    if compared.is_equal() { Ok(()) } else { Err(violated(format!("differs: {compared:?}"))) }
}

fn rounds(
    plan: &Plan,
    name: &str,
    kind: Kind,
    plant: bool,
    budget: &crate::Budget,
    tally: &mut Tally,
) -> Result<(), Stop> {
    MENDED.store(true, Ordering::Relaxed);
    let mut rng = plan.rng();
    // What a killed process has written is in the page cache: a disk would only take time.
    let memory = Path::new("/dev/shm");
    let quick = tempfile::Builder::new().prefix("faults-").tempdir_in(memory).ok();
    let dir = quick.as_ref().map_or_else(|| plan.dir(name), |quick| quick.path().join(name));
    let mut world = World::new(dir, kind, &mut rng)?;
    while budget.allows(tally.kills) {
        world.round(&mut rng, plant, tally)?;
    }
    Ok(())
}

pub(crate) fn generations(plan: &Plan) -> Reached {
    run(plan, "views-generations", Kind::Generations)
}

pub(crate) fn poison(plan: &Plan) -> Reached {
    run(plan, "views-poison", Kind::Poison)
}

fn run(plan: &Plan, name: &str, kind: Kind) -> Reached {
    let mut tally = Tally::default();
    rounds(plan, name, kind, false, &plan.budget(200, 28), &mut tally)?;
    let Tally { kills, checks, inline, parked, under_way } = tally;
    let under_way: Vec<String> =
        under_way.into_iter().map(|(what, times)| format!("{times} in {what}")).collect();
    let under_way = under_way.join(", ");
    Ok(format!(
        "{kills} kills ({under_way}), {inline} of inline views, {parked} parked events found again, {checks} checks, 0 violations"
    ))
}

/// Rows that are written apart from the checkpoint that they are of: a kill in between folds events twice.
pub(crate) fn catches_a_checkpoint_apart(plan: &Plan) -> Reached {
    let mut tally = Tally::default();
    let name = "views-planted";
    let budget = plan.budget(40, 20);
    match rounds(plan, name, Kind::Generations, true, &budget, &mut tally) {
        Err(Stop::Violated(_)) => Ok(format!("after {} kills", tally.kills)),
        Err(skipped) => Err(skipped),
        Ok(()) => {
            let kills = tally.kills;
            Err(violated(format!("{kills} kills have not shown rows apart from their checkpoint")))
        }
    }
}
