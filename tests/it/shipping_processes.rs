//! An origin and its mirror as two real processes, each killed at any moment.
//!
//! The processes are this very test binary, started with one of the two `process_` tests and a directory in
//! the environment; without it those tests do nothing.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use headwater::fs::os::OsFs;
use headwater::shipping::{FollowOptions, Mirror, ServeOptions, Server, follow, serve};
use headwater::{Append, ExpectedRevision, JournalOptions, NewEvent, Position, Store, StreamId};

const DIR: &str = "HEADWATER_TEST_PROCESS_DIR";
const ADDRESS: &str = "HEADWATER_TEST_PROCESS_ADDRESS";
const SOON: Duration = Duration::from_secs(30);

fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

fn environment() -> Option<(PathBuf, String)> {
    Some((std::env::var_os(DIR)?.into(), std::env::var(ADDRESS).ok()?))
}

fn open_origin(dir: &Path, address: &str) -> (Store, Server) {
    let builder = Store::builder(dir.join("origin")).create_if_missing();
    let store = builder.journal_options(small()).open().unwrap();
    let server = serve(store.journal().clone(), address, ServeOptions::default()).unwrap();
    (store, server)
}

fn open_mirror(dir: &Path, address: &str) -> Mirror {
    let options = FollowOptions { journal: small(), ..FollowOptions::default() };
    follow(Arc::new(OsFs), &dir.join("mirror"), address, options).unwrap()
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Tells the test how far it is; ends with the test.
fn say(what: &str, position: Position) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "\n{what} {position}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Appends for ever, events that say their own position.
#[test]
fn process_origin() {
    let Some((dir, address)) = environment() else { return };
    let (store, _server) = open_origin(&dir, &address);
    let to = StreamId::new("s").unwrap();
    let mut position = store.journal().end().position.get();
    loop {
        let count = 1 + position % 5;
        let events = (position..position + count).map(|position| {
            let text = format!("{position} {}", "x".repeat(position as usize * 37 % 700));
            NewEvent::raw("test.counted", text.into_bytes()).unwrap()
        });
        store.append(&Append::to(&to, ExpectedRevision::Any, events)).unwrap();
        position += count;
        say("acknowledged", Position::new(position));
    }
}

/// Serves on what it follows. Its address is two: whom it follows, and its own.
#[test]
fn process_relay() {
    let Some((dir, addresses)) = environment() else { return };
    let (upstream, own) = addresses.split_once(' ').unwrap();
    let mirror = open_mirror(&dir, upstream);
    let _server = serve(&mirror, own, ServeOptions::default()).unwrap();
    say_what_is_mirrored(&mirror);
}

#[test]
fn process_mirror() {
    let Some((dir, address)) = environment() else { return };
    say_what_is_mirrored(&open_mirror(&dir, &address));
}

fn say_what_is_mirrored(mirror: &Mirror) {
    let journal = mirror.wait_ready(SOON).unwrap();
    let mut end = journal.end().position;
    loop {
        say("mirrored", end);
        end = journal.wait_past(end, SOON).position;
    }
}

/// The position that a process tells in a line.
fn said(line: &str) -> Option<u64> {
    let (what, position) = line.trim().split_once(' ')?;
    matches!(what, "acknowledged" | "mirrored").then(|| position.parse().unwrap())
}

struct Process {
    child: Child,
    says: BufReader<ChildStdout>,
    last: u64,
}

impl Process {
    fn start(test: &str, dir: &Path, address: &str) -> Self {
        let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(DIR, dir)
            .env(ADDRESS, address)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stdout.take().unwrap());
        Self { child, says, last: 0 }
    }

    /// Reads on until it has said this many positions; the last one.
    fn hear(&mut self, lines: usize) -> u64 {
        let mut heard = 0;
        let mut line = String::new();
        while heard < lines {
            line.clear();
            assert!(self.says.read_line(&mut line).unwrap() > 0, "the process has ended");
            if let Some(position) = said(&line) {
                assert!(position >= self.last, "{position} after {}", self.last);
                self.last = position;
                heard += 1;
            }
        }
        self.last
    }

    /// SIGKILL; what it had said before that still counts.
    fn kill(mut self) -> u64 {
        self.child.kill().unwrap();
        for line in self.says.by_ref().lines().map_while(Result::ok) {
            self.last = said(&line).unwrap_or(self.last);
        }
        self.child.wait().unwrap();
        self.last
    }

    /// Killed and started again, it has what it had.
    fn restart(self, test: &str, dir: &Path, address: &str) -> Self {
        let last = self.kill();
        let mut next = Self::start(test, dir, address);
        next.last = last;
        next
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn s5_processes_killed_at_any_moment_lose_nothing_acknowledged_and_end_up_identical() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let address = free_address();
    let mut origin = Process::start("process_origin", dir, &address);
    let mut mirror = Process::start("process_mirror", dir, &address);
    let mut acknowledged = 0;
    for _ in 0..16 {
        acknowledged = acknowledged.max(origin.hear(rng.usize(1..60)));
        mirror.hear(rng.usize(1..4));
        let kill = rng.u8(1..4);
        if kill & 1 != 0 {
            origin = origin.restart("process_origin", dir, &address);
            acknowledged = origin.last;
        }
        if kill & 2 != 0 {
            mirror = mirror.restart("process_mirror", dir, &address);
        }
    }
    acknowledged = acknowledged.max(origin.kill());
    mirror.kill();
    let (store, _server) = open_origin(dir, &address);
    let end = store.journal().end();
    assert!(end.position.get() >= acknowledged, "acknowledged events are missing");
    for (position, event) in store.read_all(Position::START).unwrap().enumerate() {
        let text = String::from_utf8(event.unwrap().into_data()).unwrap();
        assert_eq!(text.split(' ').next(), Some(position.to_string().as_str()));
    }
    let mirror = open_mirror(dir, &address);
    let journal = mirror.wait_ready(SOON).unwrap();
    assert_eq!(journal.wait_past(Position::new(end.position.get() - 1), SOON), end);
    crate::shipping::assert_same_bytes(store.journal(), &journal);
}

#[test]
fn s5_a_relay_killed_at_any_moment_goes_on_and_all_three_end_up_identical() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let (address, own) = (free_address(), free_address());
    let [at_relay, at_leaf] = ["relay", "leaf"].map(|name| dir.join(name));
    for dir in [&at_relay, &at_leaf] {
        std::fs::create_dir(dir).unwrap();
    }
    let both = format!("{address} {own}");
    let mut origin = Process::start("process_origin", dir, &address);
    let mut relay = Process::start("process_relay", &at_relay, &both);
    let mut leaf = Process::start("process_mirror", &at_leaf, &own);
    let mut acknowledged = 0;
    for _ in 0..12 {
        acknowledged = acknowledged.max(origin.hear(rng.usize(1..60)));
        leaf.hear(rng.usize(1..4));
        let kill = rng.u8(1..8);
        if kill & 1 != 0 {
            origin = origin.restart("process_origin", dir, &address);
            acknowledged = origin.last;
        }
        if kill & 6 != 0 {
            relay = relay.restart("process_relay", &at_relay, &both);
        }
        if kill & 4 != 0 {
            leaf = leaf.restart("process_mirror", &at_leaf, &own);
        }
    }
    acknowledged = acknowledged.max(origin.kill());
    relay.kill();
    leaf.kill();
    let (store, _server) = open_origin(dir, &address);
    let end = store.journal().end();
    assert!(end.position.get() >= acknowledged, "acknowledged events are missing");
    let relay = open_mirror(&at_relay, &address);
    let _relaying = serve(&relay, own.as_str(), ServeOptions::default()).unwrap();
    let leaf = open_mirror(&at_leaf, &own);
    for mirror in [&relay, &leaf] {
        let journal = mirror.wait_ready(SOON).unwrap();
        assert_eq!(journal.wait_past(Position::new(end.position.get() - 1), SOON), end);
        crate::shipping::assert_same_bytes(store.journal(), &journal);
    }
}
