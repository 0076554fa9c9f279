//! Two services as real processes on the loopback, killed at any moment; and origins that were put back to
//! an older state behind the back of those who follow them.
//!
//! ```text
//!   driver (the test) ──starts, kills──▶ process_that_appends      Store, two writers, Server
//!        │                                        ║ TCP
//!        └────────────────starts, kills──▶ process_that_subscribes  Store, Mirror, View of it
//!        ◀── lines: what is acknowledged, mirrored, applied
//! ```
//! The processes are this test binary again. They end with the driver: their standard input closes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::shipping::{Mirror, MirrorState, MirrorStatus, Server, ShippingError};
use headwater::view::{
    Fold, FoldError, Keys, LostTail, View, ViewError, ViewHandle, ViewOptions, ViewState,
};
use headwater::{
    Append, AppendError, EventId, ExpectedRevision, Journal, JournalOptions, NewEvent, OpenError,
    Position, Recorded, Revision, Store, StreamId, Token,
};
use serde::{Deserialize, Serialize};

use crate::shipping::{assert_same_bytes, copy_dir, flip_bit, replace_dir};

/// Long enough for any machine; nothing waits it out unless it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Segments of a few batches.
fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

fn open(dir: &Path) -> Store {
    try_open(dir).unwrap_or_else(|error| panic!("{error}"))
}

fn try_open(dir: &Path) -> Result<Store, OpenError> {
    Store::builder(dir).create_if_missing().journal_options(small()).open()
}

// ------------------------------------------------------------------------------- events and their recount

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Counted {
    writer: u8,
    number: u64,
    filling: String,
}

headwater::events! {
    /// What the writers append.
    enum WriterEvent {
        Counted(Counted) = "writer.counted", version 1;
    }
}

/// Depends on every event of its key, on their order, and on how often each was folded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Row {
    events: u64,
    trace: u64,
}

/// Each writer's row under (writer, 0), and one for each of ten of its events.
type Key = (u8, u64);
type Rows = BTreeMap<Key, Row>;

fn keys_of(counted: &Counted) -> [Key; 2] {
    [(counted.writer, 0), (counted.writer, 1 + counted.number / 10)]
}

fn step(row: Option<Row>, event: &Recorded<WriterEvent>) -> Row {
    let WriterEvent::Counted(counted) = event.data();
    let row = row.unwrap_or_default();
    let trace = row.trace.wrapping_mul(31).wrapping_add(counted.number + event.position().get());
    Row { events: row.events + 1, trace }
}

#[derive(Debug)]
struct Counts;

impl View for Counts {
    const NAME: &'static str = "counts";
    const VERSION: u32 = 1;
    type Key = Key;
    type Row = Row;
    type Event = WriterEvent;

    fn route(&self, event: &Recorded<WriterEvent>, keys: &mut Keys<Key>) {
        let WriterEvent::Counted(counted) = event.data();
        keys.extend(keys_of(counted));
    }

    fn fold(
        &self,
        _key: &Key,
        row: Option<Row>,
        event: &Recorded<WriterEvent>,
    ) -> Result<Fold<Row>, FoldError> {
        Ok(Fold::Put(step(row, event)))
    }
}

fn events(journal: &Journal) -> impl Iterator<Item = Recorded<WriterEvent>> {
    let events = journal.read_all(Position::START).unwrap();
    events.flat_map(|event| event.unwrap().decode::<WriterEvent>().unwrap())
}

/// The rows of the first events, counted without any view.
fn recount(journal: &Journal, end: Position) -> Rows {
    let mut rows = Rows::new();
    for event in events(journal).take_while(|event| event.position() < end) {
        let WriterEvent::Counted(counted) = event.data();
        for key in keys_of(counted) {
            let row = step(rows.remove(&key), &event);
            rows.insert(key, row);
        }
    }
    rows
}

/// The view holds exactly what the events in front of its checkpoint make.
fn assert_is_prefix(view: &ViewHandle<Counts>, journal: &Journal) -> Position {
    let snapshot = view.snapshot().unwrap();
    let position = snapshot.checkpoint().position;
    let rows: Rows = snapshot.range(..).map(Result::unwrap).collect();
    assert!(rows == recount(journal, position), "the rows at position {position} differ");
    position
}

// --------------------------------------------------------------------------------------------- the writers

const WRITERS: u8 = 2;

fn stream(writer: u8) -> StreamId {
    StreamId::new(format!("writer-{writer}")).unwrap()
}

/// The id follows from the event: whoever appends it again after a crash appends the same one.
fn event_id(writer: u8, number: u64) -> EventId {
    EventId::from_bytes((u128::from(writer) << 64 | u128::from(number)).to_le_bytes())
}

/// The batch of a writer that begins with event `first`; always the same.
fn batch(writer: u8, first: u64) -> Vec<NewEvent> {
    let mut rng = Rng::with_seed(first << 8 | u64::from(writer));
    let event = |number| {
        let filling = "x".repeat(rng.usize(..900));
        let event = WriterEvent::from(Counted { writer, number, filling });
        NewEvent::typed(&event).unwrap().id(event_id(writer, number))
    };
    (first..first + 1 + first % 4).map(event).collect()
}

/// Appends the writer's batch that begins with event `first`, or finds it appended; the next `first`.
fn append_batch(store: &Store, writer: u8, first: u64) -> (Token, u64) {
    let expected = match first.checked_sub(1) {
        None => ExpectedRevision::NoStream,
        Some(last) => ExpectedRevision::Exact(Revision::new(last)),
    };
    let events = batch(writer, first);
    let next = first + events.len() as u64;
    let appended = store.append(&Append::to(&stream(writer), expected, events)).unwrap();
    let receipt = appended.receipt();
    for (placed, number) in receipt.events.iter().zip(first..) {
        assert_eq!(placed.revision.get(), number, "of writer {writer}");
    }
    (receipt.token, next)
}

// ------------------------------------------------------------------------------------------- the processes

const DIR: &str = "HEADWATER_PROCESS_DIR";
const ADDRESS: &str = "HEADWATER_PROCESS_ADDRESS";
/// What each writer knows to be acknowledged, as its client would.
const ACKNOWLEDGED: &str = "HEADWATER_PROCESS_ACKNOWLEDGED";

/// What the driver has said; `None` in an ordinary run of the tests.
fn process() -> Option<(PathBuf, String)> {
    let said = (std::env::var_os(DIR)?.into(), std::env::var(ADDRESS).ok()?);
    std::thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        std::process::exit(0);
    });
    Some(said)
}

/// One line, whole, or the end of this process.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(format!("\n{line}\n").as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Not a test: serves a store that two writers append to, and says what was acknowledged. A writer begins
/// with the first event that it has no acknowledgement for, which the store may have had for long.
#[test]
fn process_that_appends() {
    let Some((dir, address)) = process() else { return };
    let store = open(&dir);
    let _server = store.serve(address.as_str()).unwrap();
    say("serving");
    let acknowledged = std::env::var(ACKNOWLEDGED).unwrap();
    let first = acknowledged.split(' ').map(|number| number.parse::<u64>().unwrap());
    std::thread::scope(|scope| {
        for (writer, mut first) in (0..WRITERS).zip(first) {
            let store = &store;
            scope.spawn(move || {
                loop {
                    let (token, next) = append_batch(store, writer, first);
                    say(&format!("acknowledged {writer} {next} {}", token.position));
                    first = next;
                }
            });
        }
    });
}

/// Not a test: mirrors the origin and folds a view of the mirror, and says how far both are.
#[test]
fn process_that_subscribes() {
    let Some((dir, address)) = process() else { return };
    let store = open(&dir);
    let mirror = store.mirror("origin", address).unwrap();
    let journal = mirror.wait_ready(PATIENCE).unwrap();
    let view = store.view_of_with(&journal, Counts, small_steps()).unwrap();
    let mut mirrored = journal.end().position;
    let mut applied = view.checkpoint().applied.position;
    say(&format!("applied {applied}"));
    loop {
        let (status, viewed) = (mirror.status(), view.status());
        assert!(!status.is_halted(), "{status:?}");
        assert!(!matches!(viewed.state, ViewState::Stopped(_)), "{viewed:?}");
        assert_eq!(viewed.set_aside, None, "a crash is not a loss");
        if journal.end().position > mirrored {
            mirrored = journal.end().position;
            say(&format!("mirrored {mirrored}"));
        }
        if view.checkpoint().applied.position > applied {
            applied = view.checkpoint().applied.position;
            say(&format!("applied {applied}"));
        }
        // Not a pause: the wake-up of whatever comes next.
        let _end = journal.wait_past(mirrored, Duration::from_millis(5));
    }
}

/// Chunks, flushes and batches shall not coincide.
fn small_steps() -> ViewOptions {
    ViewOptions { chunk_bytes: 5000, flush_bytes: 17_000, ..ViewOptions::default() }
}

/// A process of this binary.
struct Process {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
    stderr: PathBuf,
    _until_dropped: ChildStdin,
}

impl Process {
    fn start(name: &'static str, dir: &Path, environment: &[(&str, &str)]) -> Self {
        let this_module = module_path!().split_once("::").unwrap().1;
        let stderr = dir.join(format!("{name}.stderr"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{this_module}::{name}"), "--nocapture"])
            .env(DIR, dir.join(name))
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let _until_dropped = child.stdin.take().unwrap();
        Self { name, child, lines, stderr, _until_dropped }
    }

    /// The next line; `None` once it has ended.
    fn line(&mut self, deadline: Instant, waited_for: &str) -> String {
        let left = deadline.saturating_duration_since(Instant::now());
        let why = match self.lines.recv_timeout(left) {
            Ok(line) => return line,
            Err(RecvTimeoutError::Timeout) => "has not said for too long",
            Err(RecvTimeoutError::Disconnected) => "has ended without saying",
        };
        let stderr = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        panic!("{} {why}: {waited_for:?}; its errors:\n{stderr}", self.name)
    }

    /// Reads lines until `count` of them begin with `word`; `hear` gets all.
    fn hear(&mut self, word: &str, count: usize, mut hear: impl FnMut(&str)) {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = 0;
        while heard < count {
            let line = self.line(deadline, word);
            heard += usize::from(line.split(' ').next() == Some(word));
            hear(&line);
        }
    }

    /// SIGKILL. What it had said before still counts.
    fn kill(mut self, mut hear: impl FnMut(&str)) {
        self.child.kill().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => hear(&line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("{} outlives SIGKILL", self.name),
            }
        }
        let status = self.child.wait().unwrap();
        let stderr = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        assert_eq!(status.code(), None, "{} had ended before:\n{stderr}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What the origin has acknowledged.
#[derive(Debug, Default)]
struct Acknowledged {
    /// Per writer: the number of its first event without acknowledgement.
    next: [u64; WRITERS as usize],
    /// Where the last event of each acknowledged batch is, by writer and number.
    places: HashMap<(u8, u64), Position>,
}

impl Acknowledged {
    fn hear(&mut self, line: &str) {
        let Some(line) = line.strip_prefix("acknowledged ") else { return };
        let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
        let [writer, next, end] = numbers[..] else { panic!("{line:?}") };
        let known = &mut self.next[writer as usize];
        assert!(next > *known, "writer {writer} goes back: {line:?}");
        *known = next;
        self.places.insert((writer as u8, next - 1), Position::new(end - 1));
    }

    /// Everything that was acknowledged is where it was said to be; each writer's events are there in
    /// order, once, and nothing else is there.
    fn check(&self, journal: &Journal) {
        let mut next = [0; WRITERS as usize];
        let mut places = HashMap::new();
        for event in events(journal) {
            let WriterEvent::Counted(counted) = event.data();
            let expected = &mut next[usize::from(counted.writer)];
            assert_eq!(counted.number, *expected, "{}", event.position());
            assert_eq!(event.id(), event_id(counted.writer, counted.number));
            assert_eq!(event.revision().get(), counted.number);
            *expected += 1;
            places.insert((counted.writer, counted.number), event.position());
        }
        for (event, place) in &self.places {
            assert_eq!(places.get(event), Some(place), "{event:?} was acknowledged");
        }
        assert!(next.iter().zip(self.next).all(|(there, acknowledged)| *there >= acknowledged));
    }
}

/// A free port that no outgoing connection is given by the system.
fn free_address() -> String {
    let mut rng = Rng::new();
    for _ in 0..1000 {
        let address = format!("127.0.0.1:{}", rng.u16(10_000..30_000));
        if TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
    panic!("no free port")
}

struct Driver {
    dir: tempfile::TempDir,
    address: String,
    acknowledged: Acknowledged,
}

impl Driver {
    fn start_origin(&self) -> Process {
        let [a, b] = self.acknowledged.next;
        let acknowledged = format!("{a} {b}");
        let environment = [(ADDRESS, self.address.as_str()), (ACKNOWLEDGED, &acknowledged)];
        Process::start("process_that_appends", self.dir.path(), &environment)
    }

    fn start_subscriber(&self) -> Process {
        let environment = [(ADDRESS, self.address.as_str())];
        Process::start("process_that_subscribes", self.dir.path(), &environment)
    }

    /// Lets both come as far as the dice say.
    fn progress(&mut self, rng: &mut Rng, origin: &mut Process, subscriber: &mut Process) {
        if rng.u8(..4) > 0 {
            origin.hear("acknowledged", rng.usize(1..60), |line| self.acknowledged.hear(line));
        }
        if rng.u8(..4) > 0 {
            let word = *rng.choice(&["mirrored", "applied"]).unwrap();
            subscriber.hear(word, rng.usize(1..5), |_| {});
        }
    }

    /// Both stores, opened after the last crash in this process.
    fn check(&self) {
        let origin = open(&self.dir.path().join("process_that_appends"));
        self.acknowledged.check(origin.journal());
        let _server = origin.serve(self.address.as_str()).unwrap();
        let subscriber = open(&self.dir.path().join("process_that_subscribes"));
        let mirror = subscriber.mirror("origin", self.address.as_str()).unwrap();
        let journal = mirror.wait_ready(PATIENCE).unwrap();
        let view = subscriber.view_of_with(&journal, Counts, small_steps()).unwrap();
        let end = origin.journal().end();
        let caught_up = |status: &MirrorStatus| status.is_live() && status.mirrored == Some(end);
        let live = mirror.wait_until(PATIENCE, caught_up);
        assert!(live.is_ok(), "{:?}", mirror.status());
        assert_same_bytes(origin.journal(), &journal);
        wait_applied(&view, end.position);
        assert_eq!(assert_is_prefix(&view, origin.journal()), end.position);
        assert_eq!(view.status().set_aside, None);
        let segments = origin.journal().segments().len();
        println!("{} events in {segments} segments", end.position);
        assert!(segments > 5, "meant to roll");
    }
}

fn wait_applied(view: &ViewHandle<Counts>, position: Position) {
    let deadline = Instant::now() + PATIENCE;
    while view.checkpoint().applied.position < position {
        assert!(Instant::now() < deadline, "{:?}", view.status());
        std::thread::yield_now();
    }
}

#[test]
fn services_killed_at_any_moment_keep_what_was_acknowledged_and_their_views_equal_a_recount() {
    let seed =
        std::env::var("HEADWATER_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver { dir, address: free_address(), acknowledged: Acknowledged::default() };
    let mut origin = driver.start_origin();
    let mut subscriber = driver.start_subscriber();
    for round in 0..20 {
        driver.progress(&mut rng, &mut origin, &mut subscriber);
        let (kill_origin, kill_subscriber) =
            *rng.choice(&[(true, false), (false, true), (true, true)]).unwrap();
        println!("round {round}: origin {kill_origin}, subscriber {kill_subscriber}");
        if kill_origin {
            origin.kill(|line| driver.acknowledged.hear(line));
            origin = driver.start_origin();
        }
        if kill_subscriber {
            subscriber.kill(|_| {});
            subscriber = driver.start_subscriber();
        }
    }
    driver.progress(&mut rng, &mut origin, &mut subscriber);
    origin.kill(|line| driver.acknowledged.hear(line));
    subscriber.kill(|_| {});
    driver.check();
}

// ---------------------------------------------------------------------------- put back to an older state

/// An origin that serves, and a subscriber with a mirror of it and a view of that.
struct World {
    dir: tempfile::TempDir,
    address: String,
}

/// An open origin.
struct Origin {
    store: Store,
    server: Server,
}

impl Origin {
    fn append(&self, firsts: std::ops::Range<u64>) -> Option<Token> {
        let (mut first, mut last) = (firsts.start, None);
        while first < firsts.end {
            let (token, next) = append_batch(&self.store, 0, first);
            (first, last) = (next, Some(token));
        }
        last
    }

    fn end(&self) -> Position {
        self.store.journal().end().position
    }

    fn close(self) {
        self.server.shutdown();
        self.store.close().unwrap();
    }
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), address: free_address() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn origin(&self) -> Origin {
        let store = open(&self.path("origin"));
        let server = store.serve(self.address.as_str()).unwrap();
        Origin { store, server }
    }

    fn mirror(&self) -> (Store, Mirror) {
        let store = open(&self.path("subscriber"));
        let mirror = store.mirror("origin", self.address.as_str()).unwrap();
        (store, mirror)
    }

    fn mirror_dir(&self) -> PathBuf {
        self.path("subscriber/mirrors/origin/journal")
    }

    /// Keeps a copy of the origin's journal, mark and all.
    fn keep(&self, name: &str) {
        copy_dir(&self.path("origin/journal"), &self.path(name));
    }

    /// Puts the whole journal back.
    fn put_back(&self, name: &str) {
        replace_dir(&self.path("origin/journal"), &self.path(name));
    }

    /// Puts the segments back and leaves everything else, the mark most of all.
    fn put_back_segments_only(&self, name: &str) {
        let journal = self.path("origin/journal");
        for path in segment_files(&journal).into_keys() {
            std::fs::remove_file(journal.join(path)).unwrap();
        }
        for (path, bytes) in segment_files(&self.path(name)) {
            std::fs::write(journal.join(path), bytes).unwrap();
        }
    }

    /// An origin of which `older` was kept, which then went on to position `KNOWN`: a mirror, a view of
    /// the mirror and a view of its own know all of it, and everybody is closed.
    fn known_up_to(&self) -> Token {
        let origin = self.origin();
        origin.append(0..OLDER);
        origin.close();
        self.keep("older");
        let origin = self.origin();
        let token = origin.append(OLDER..KNOWN).unwrap();
        let (store, mirror) = self.mirror();
        let journal = mirror.wait_ready(PATIENCE).unwrap();
        let views = (origin.store.view(Counts).unwrap(), store.view_of(&journal, Counts).unwrap());
        views.0.wait_for(&token, PATIENCE).unwrap();
        views.1.wait_for(&token, PATIENCE).unwrap();
        views.0.close().unwrap();
        views.1.close().unwrap();
        mirror.stop().unwrap();
        origin.close();
        token
    }
}

/// Where batches of writer 0 begin, so that histories can meet there: 0, 1, 3, 7, 11, 15, ...
const OLDER: u64 = 27;
const KNOWN: u64 = 59;

/// Segment files by name.
fn segment_files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let segments = entries.filter(|path| path.extension().is_some_and(|it| it == "seg"));
    segments.map(|path| (path.file_name().unwrap().into(), std::fs::read(path).unwrap())).collect()
}

fn halted(mirror: &Mirror) -> ShippingError {
    let halted = mirror.wait_until(PATIENCE, MirrorStatus::is_halted);
    match halted.unwrap_or_else(|_| panic!("{:?}", mirror.status())).state {
        MirrorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

/// How an origin that was put back has grown again. Its payloads are those that were lost, as far as
/// there were any.
const GROWN_AGAIN_TO: [(&str, u64); 4] =
    [("not at all", OLDER), ("but is shorter", 43), ("to the same length", KNOWN), ("beyond", 83)];

#[test]
fn a_journal_replaced_by_an_older_copy_with_its_mark_is_noticed_by_its_mirror_and_its_own_views() {
    for (grown, to) in GROWN_AGAIN_TO {
        println!("{grown}");
        let world = World::new();
        let token = world.known_up_to();
        let mirrored = segment_files(&world.mirror_dir());
        world.put_back("older");
        // What it grows by is appended before anybody can see it.
        let origin = world.origin();
        origin.append(OLDER..to);
        assert_eq!(origin.end(), Position::new(to));

        own_view_notices(&origin.store, &token);
        let (store, mirror) = world.mirror();
        let error = halted(&mirror);
        match (&error, to < KNOWN) {
            (ShippingError::Ahead(at), true) => assert_eq!(at.origin, origin.store.journal().end()),
            (ShippingError::Fork(at), false) => assert_eq!(at.mirror.position, token.position),
            other => panic!("{other:?}"),
        }
        // The mirror may be the only place where the lost events still are: they are kept and served.
        let journal = mirror.journal().unwrap();
        let view = store.view_of(&journal, Counts).unwrap();
        assert_eq!(assert_is_prefix(&view, &journal), token.position);
        drop(view);
        mirror.stop().unwrap();
        assert!(segment_files(&world.mirror_dir()) == mirrored, "{grown}: the mirror was changed");
    }
}

/// A shorter journal has lost its tail: nothing more is appended until that was accepted. A longer one is
/// another history: the view is set aside and built anew.
fn own_view_notices(store: &Store, known: &Token) {
    let end = store.journal().end().position;
    if end < known.position {
        match store.view(Counts) {
            Err(ViewError::LostTail { checkpoint, end: lost_at, .. }) => {
                assert_eq!((checkpoint.position, lost_at), (known.position, end));
            }
            other => panic!("{other:?}"),
        }
        let next = Append::to(&stream(9), ExpectedRevision::Any, batch(9, 0));
        assert!(matches!(store.append(&next), Err(AppendError::LostTail { .. })));
        assert!(matches!(store.view(Counts), Err(ViewError::LostTail { .. })));
        assert_eq!(store.journal().end().position, end);
    }
    let accepted = ViewOptions { lost_tail: LostTail::SetAside, ..ViewOptions::default() };
    let options = if end < known.position { accepted } else { ViewOptions::default() };
    let view = store.view_with(Counts, options).unwrap();
    assert!(view.status().set_aside.is_some());
    wait_applied(&view, end);
    assert_eq!(assert_is_prefix(&view, store.journal()), end);
    assert!(view.wait_for(known, Duration::ZERO).is_err());
}

#[test]
fn a_mirror_follows_again_once_the_history_that_it_knows_is_back() {
    let world = World::new();
    world.known_up_to();
    world.keep("newest");
    world.put_back("older");
    let origin = world.origin();
    origin.append(OLDER..KNOWN);
    let (store, mirror) = world.mirror();
    assert!(matches!(halted(&mirror), ShippingError::Fork(_)));
    origin.close();
    world.put_back("newest");
    let origin = world.origin();
    mirror.resume();
    let token = origin.append(KNOWN..83).unwrap();
    let journal = mirror.journal().unwrap();
    let view = store.view_of(&journal, Counts).unwrap();
    view.wait_for(&token, PATIENCE).unwrap();
    assert_same_bytes(origin.store.journal(), &journal);
    assert_is_prefix(&view, origin.store.journal());
    let own = origin.store.view(Counts).unwrap();
    own.wait_for(&token, PATIENCE).unwrap();
    assert_eq!(own.status().set_aside, None);
}

#[test]
fn older_segments_under_a_newer_mark_are_refused_and_left_as_they_are() {
    for (grown, to) in GROWN_AGAIN_TO {
        println!("{grown}");
        let world = World::new();
        let token = world.known_up_to();
        world.keep("newest");
        // Another life of the older copy, in the same place.
        world.put_back("older");
        let origin = world.origin();
        origin.append(OLDER..to);
        origin.close();
        world.keep("grown");
        world.put_back("newest");
        world.put_back_segments_only("grown");

        let before = segment_files(&world.path("origin/journal"));
        for _ in 0..2 {
            match try_open(&world.path("origin")) {
                Err(OpenError::Corruption(corruption)) if to < KNOWN => {
                    assert_eq!(corruption.position, Position::new(to));
                }
                Err(OpenError::HistoryReplaced { position, .. }) if to >= KNOWN => {
                    assert_eq!(position, token.position);
                }
                other => panic!("{grown}: {other:?}"),
            }
        }
        assert!(segment_files(&world.path("origin/journal")) == before, "{grown}: was changed");
        // With the right segments everything is as before.
        world.put_back_segments_only("newest");
        let origin = world.origin();
        assert_eq!(origin.end(), token.position);
    }
}

#[test]
fn older_segments_under_the_mark_of_a_killed_origin_are_refused() {
    let world = World::new();
    let origin = world.origin();
    origin.append(0..OLDER);
    origin.close();
    world.keep("older");
    let origin = world.origin();
    let known = origin.append(OLDER..KNOWN).unwrap();
    // As SIGKILL leaves it: nothing is closed, the mark is as of the last sync.
    world.keep("killed");
    origin.close();
    world.put_back("killed");
    world.put_back_segments_only("older");
    match try_open(&world.path("origin")) {
        Err(OpenError::Corruption(corruption)) => {
            assert_eq!(corruption.position, Position::new(OLDER));
        }
        other => panic!("{other:?}"),
    }
    world.put_back("killed");
    assert_eq!(world.origin().end(), known.position);
}

#[test]
fn a_mirror_that_has_set_its_damaged_tail_aside_still_notices_an_origin_put_back_behind_it() {
    // Within the last segment: in front of it, damage is noticed when it is read.
    let known_end = OLDER + 8;
    for to in [OLDER, OLDER + 4, known_end, KNOWN] {
        println!("grown again to {to}, of {known_end}");
        let world = World::new();
        let origin = world.origin();
        origin.append(0..OLDER);
        origin.close();
        world.keep("older");
        let origin = world.origin();
        let known = origin.append(OLDER..known_end).unwrap();
        let (store, mirror) = world.mirror();
        let journal = mirror.wait_ready(PATIENCE).unwrap();
        let reached = journal.wait_past(Position::new(known_end - 1), PATIENCE);
        assert_eq!(reached.position, known.position);
        mirror.stop().unwrap();
        origin.close();
        damage_behind(&journal, Position::new(OLDER));
        store.close().unwrap();

        world.put_back("older");
        let origin = world.origin();
        origin.append(OLDER..to);
        let (store, mirror) = world.mirror();
        let error = halted(&mirror);
        let at = match (&error, to < known_end) {
            (ShippingError::Ahead(at), true) | (ShippingError::Fork(at), false) => at,
            other => panic!("{other:?}"),
        };
        assert_eq!(at.witness.map(|witness| witness.position), Some(known.position));
        let kept = mirror.journal().unwrap();
        assert_eq!(kept.end().position, Position::new(OLDER), "nothing was fetched");
        mirror.stop().unwrap();
        let quarantine = std::fs::read_dir(world.mirror_dir().join("quarantine")).unwrap();
        let aside = quarantine.filter(|entry| entry.as_ref().unwrap().file_name() != "reserve");
        assert!(aside.count() > 0, "what was set aside is kept");
        // It remembers over restarts.
        store.close().unwrap();
        let (_store, mirror) = world.mirror();
        assert_eq!(halted(&mirror).code(), error.code());
    }
}

/// Flips a bit in the first batch behind `position`, which lies in the last segment.
fn damage_behind(mirror: &Journal, position: Position) {
    let segment = mirror.segments().pop().unwrap();
    assert!(segment.base_position <= position);
    let mut cursor = mirror.cursor(position).unwrap();
    let next = cursor.next_batch().unwrap().unwrap();
    assert_eq!(next.batch.header.base_position, position);
    let file_offset = 4096 + next.batch.header.offset - segment.base_offset;
    flip_bit(&segment.path, file_offset + 200);
}
