//! An origin, a mirror or a relay as a process of its own: this program again, told by its arguments what to be.
//!
//! ```text
//!   driver ── stdin: "quiet" ──▶ child        a child ends with its standard input
//!          ◀── stdout ──────────              "acknowledged P", "mirrored P", "lag N" or "lag unknown",
//!                                             "reconnects N", "halted WHY", "end P"
//! ```
#![allow(dead_code, reason = "each of the test programs uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::planted::{self, Bug};
use headwater::shipping::{Deadlines, FollowOptions, MirrorState, ServeOptions, follow, serve};
use headwater::{
    Append, ExpectedRevision, Journal, JournalOptions, NewEvent, Position, Store, StreamId,
};

/// The first argument of a child.
pub(crate) const CHILD: &str = "shipping-child";
/// A relay believes bodies of batches without their checksums and chain, if this is set.
pub(crate) const PLANT: &str = "HEADWATER_CHAOS_PLANT";

/// Small, so that there are many segments.
pub(crate) fn journal_options() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 64 * 1024,
        segment_bytes_max: 64 * 1024,
        batch_bytes_max: 16 * 1024,
        group_bytes_max: 16 * 1024,
        ..JournalOptions::default()
    }
}

pub(crate) fn serve_options() -> ServeOptions {
    ServeOptions { allow_plaintext_off_loopback: true, ..ServeOptions::default() }
}

/// Notices soon what is lost without a word.
pub(crate) fn follow_options() -> FollowOptions {
    let silence = Duration::from_millis(2500);
    FollowOptions {
        journal: journal_options(),
        deadlines: Deadlines { silence, ..Deadlines::default() },
        allow_plaintext_off_loopback: true,
        ..FollowOptions::default()
    }
}

/// What a child is to be.
#[derive(Clone, Debug)]
pub(crate) enum Role {
    /// Appends, with such a pause between two appends, and serves.
    Origin { address: String, pause_ms: u64 },
    /// Follows, at one of several addresses with commas in between, and serves what it has if it is given one.
    Mirror { upstream: String, address: Option<String> },
}

impl Role {
    fn to_args(&self, dir: &Path) -> Vec<String> {
        let dir = dir.to_str().unwrap().to_owned();
        let (role, first, second) = match self {
            Self::Origin { address, pause_ms } => ("origin", address.clone(), pause_ms.to_string()),
            Self::Mirror { upstream, address } => {
                ("mirror", upstream.clone(), address.clone().unwrap_or_default())
            }
        };
        vec![CHILD.into(), role.into(), dir, first, second]
    }
}

/// What a child does; never returns.
pub(crate) fn run(args: &[String]) -> ! {
    let [role, dir, first, second] = args else { panic!("not orders: {args:?}") };
    let quiet = Arc::new(AtomicBool::new(false));
    let for_thread = Arc::clone(&quiet);
    std::thread::spawn(move || {
        for _line in std::io::stdin().lines().map_while(Result::ok) {
            for_thread.store(true, Ordering::Release);
        }
        std::process::exit(0);
    });
    match role.as_str() {
        "origin" => origin(Path::new(dir), first, second.parse().unwrap(), &quiet),
        _ => mirror(Path::new(dir), first, Some(second.as_str()).filter(|it| !it.is_empty())),
    }
}

/// One line, whole, or the end of this process.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Events that say their own position.
fn origin(dir: &Path, address: &str, pause_ms: u64, quiet: &AtomicBool) -> ! {
    let builder = Store::builder(dir).create_if_missing();
    let store = builder.journal_options(journal_options()).open().unwrap();
    let _server = serve(store.journal().clone(), address, serve_options()).unwrap();
    let to = StreamId::new("s").unwrap();
    let mut position = store.journal().end().position.get();
    say(&format!("acknowledged {position}"));
    while !quiet.load(Ordering::Acquire) {
        let count = 1 + position % 5;
        let events = (position..position + count).map(|position| {
            let text = format!("{position} {}", "x".repeat(position as usize * 37 % 700));
            NewEvent::raw("test.counted", text.into_bytes()).unwrap()
        });
        store.append(&Append::to(&to, ExpectedRevision::Any, events)).unwrap();
        position += count;
        say(&format!("acknowledged {position}"));
        std::thread::sleep(Duration::from_millis(pause_ms));
    }
    say(&format!("end {position}"));
    loop {
        std::thread::park();
    }
}

fn mirror(dir: &Path, upstream: &str, address: Option<&str>) -> ! {
    if std::env::var_os(PLANT).is_some() {
        planted::plant_everywhere(Bug::NoBodyCheck);
    }
    let upstreams: Vec<_> = upstream.split(',').collect();
    let mirror = follow(Arc::new(OsFs), dir, upstreams, follow_options()).unwrap();
    let serve = |address| serve(&mirror, address, serve_options()).unwrap();
    let _server = address.map(serve);
    let mut said = (None, None, 0);
    loop {
        let status = mirror.status();
        if let MirrorState::Halted(error) = &status.state {
            say(&format!("halted {}", error.to_string().replace('\n', " ")));
        }
        let lag = Some(status.lag_events());
        let now = (status.mirrored.map(|end| end.position), lag, status.reconnects);
        if let Some(position) = now.0.filter(|_| now.0 != said.0) {
            say(&format!("mirrored {position}"));
        }
        if now.1 != said.1 {
            let lag = status.lag_events();
            say(&lag.map_or("lag unknown".into(), |lag| format!("lag {lag}")));
        }
        if now.2 != said.2 {
            say(&format!("reconnects {}", now.2));
        }
        said = now;
        match mirror.journal() {
            // Not a pause: the wake-up by what comes next.
            Some(journal) => drop(journal.wait_past(journal.end().position, TICK)),
            None => drop(mirror.wait_ready(TICK)),
        }
    }
}

const TICK: Duration = Duration::from_millis(50);

// ------------------------------------------------------------------------------------------------ the driver

/// A child, as its driver sees it.
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    says: Receiver<String>,
    pub(crate) heard: Heard,
}

/// What it has said last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard {
    /// Acknowledged or mirrored.
    pub(crate) position: u64,
    /// Acknowledged before it said that it is quiet.
    pub(crate) end: Option<u64>,
    /// `None`: it has said nothing yet. `Some(None)`: that it isn't known.
    pub(crate) lag: Option<Option<u64>>,
    pub(crate) reconnects: u64,
    pub(crate) halted: Option<String>,
}

impl Process {
    /// Starts a child, by the words of `prefix` in front of it.
    pub(crate) fn start(prefix: &[String], role: &Role, dir: &Path) -> Self {
        let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
        let mut words = prefix.iter().cloned().chain([own]).chain(role.to_args(dir));
        let mut child = Command::new(words.next().unwrap())
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, says) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || forward(lines, &sender));
        Self { stdin: child.stdin.take(), child, says, heard: Heard::default() }
    }

    /// Takes in what it has said so far.
    pub(crate) fn hear(&mut self) -> Result<(), String> {
        loop {
            match self.says.try_recv() {
                Ok(line) => self.take(&line),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err("a process has ended".into()),
            }
        }
    }

    /// Listens until it has said what is wanted.
    pub(crate) fn hear_until(
        &mut self,
        timeout: Duration,
        wanted: impl Fn(&Heard) -> bool,
    ) -> Result<(), String> {
        let deadline = Instant::now() + timeout;
        while !wanted(&self.heard) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.says.recv_timeout(left) {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("not within {timeout:?}: {:?}", self.heard));
                }
                Err(RecvTimeoutError::Disconnected) => return Err("a process has ended".into()),
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &str) {
        let Some((what, said)) = line.split_once(' ') else { return };
        match what {
            "acknowledged" | "mirrored" => self.heard.position = said.parse().unwrap(),
            "end" => self.heard.end = Some(said.parse().unwrap()),
            "lag" => self.heard.lag = Some(said.parse().ok()),
            "reconnects" => self.heard.reconnects = said.parse().unwrap(),
            "halted" => self.heard.halted = Some(said.to_owned()),
            _ => {}
        }
    }

    /// An origin appends no more.
    pub(crate) fn quiet(&mut self) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(b"quiet\n").and_then(|()| stdin.flush()).unwrap();
    }

    /// SIGKILL. What it had said before that still counts.
    pub(crate) fn kill(mut self) -> Heard {
        drop(self.child.kill());
        while let Ok(line) = self.says.recv() {
            self.take(&line);
        }
        drop(self.child.wait());
        std::mem::take(&mut self.heard)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn forward(lines: impl Iterator<Item = std::io::Result<String>>, sender: &Sender<String>) {
    for line in lines.map_while(Result::ok) {
        if sender.send(line).is_err() {
            return;
        }
    }
}

/// An origin that was killed, opened again.
pub(crate) fn reopen(dir: &Path) -> Result<Store, String> {
    let opened = Store::builder(dir).journal_options(journal_options()).open();
    opened.map_err(|error| format!("{}: {error}", dir.display()))
}

/// Whether every segment of `mirror` is, up to its end, the very bytes of the origin's. The files themselves are looked
/// at: what has been mirrored is there, whatever the mirror could prove when it was killed.
pub(crate) fn compare(origin: &Journal, mirror: &Path) -> Result<(), String> {
    let segments = origin.segments();
    for segment in segments.iter().filter(|segment| segment.end_offset > segment.base_offset) {
        let copy = mirror.join(segment.path.file_name().unwrap());
        if bytes_of(&segment.path, segment)? != bytes_of(&copy, segment)? {
            return Err(format!("{} differs from {}", copy.display(), segment.path.display()));
        }
    }
    Ok(())
}

fn bytes_of(path: &Path, segment: &headwater::SegmentInfo) -> Result<Vec<u8>, String> {
    let mut bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    bytes.truncate((4096 + segment.end_offset - segment.base_offset) as usize);
    Ok(bytes)
}

/// The digest of all batches of a journal, and that its events say their own positions.
pub(crate) fn digest(journal: &Journal) -> Result<blake3::Hash, String> {
    let mut hasher = blake3::Hasher::new();
    let mut cursor = journal.cursor(Position::START).map_err(|error| error.to_string())?;
    while let Some(batch) = cursor.next_batch().map_err(|error| error.to_string())? {
        hasher.update(batch.batch.bytes());
    }
    let events = journal.read_all(Position::START).map_err(|error| error.to_string())?;
    for (position, event) in events.enumerate() {
        let event = event.map_err(|error| error.to_string())?;
        if !event.data().starts_with(format!("{position} ").as_bytes()) {
            return Err(format!("another event at position {position}"));
        }
    }
    Ok(hasher.finalize())
}
