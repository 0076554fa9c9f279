//! Running a child, what it has said, and whether its journal keeps it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use headwater::fs::os::OsFs;
use headwater::{OpenError, Position, ReadError, Recorded, Store};

use crate::Stop;
use crate::child::{self, Orders, Plant, SEGMENT_BYTES};

/// Long enough for any machine; nothing waits it out unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

// ------------------------------------------------------------------------------------------ what is said

/// A line of the child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// The journal is open, with everything in front of this position.
    Opened(u64),
    /// The writer's events in front of `next` are durable, and the journal in front of `position`.
    Acknowledged {
        writer: usize,
        next: u64,
        position: u64,
    },
    /// No space for the next segment.
    Full,
    /// The append may have happened.
    Unknown,
    Poisoned,
    /// Something couldn't be read; nothing is claimed about it.
    Unread(String),
    Refused {
        code: String,
        line: String,
    },
    Closed,
    Unclosed,
    Violation(String),
}

impl Said {
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["opened", position] => Self::Opened(position.parse().unwrap()),
            ["acknowledged", writer, next, position] => Self::Acknowledged {
                writer: writer.parse().unwrap(),
                next: next.parse().unwrap(),
                position: position.parse().unwrap(),
            },
            ["full", ..] => Self::Full,
            ["unknown", ..] => Self::Unknown,
            ["poisoned", ..] => Self::Poisoned,
            ["unread" | "unreadable", ..] => Self::Unread(line.to_owned()),
            ["refused", code, ..] => {
                Self::Refused { code: (*code).to_owned(), line: line.to_owned() }
            }
            ["closed"] => Self::Closed,
            ["unclosed", ..] => Self::Unclosed,
            _ => Self::Violation(line.to_owned()),
        }
    }
}

/// Children that were started.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    stderr: File,
    until_dropped: Option<ChildStdin>,
}

impl Running {
    /// Starts a child, by `through` (a program that starts it, with its arguments) if there is one.
    pub(crate) fn start(orders: &Orders, through: &[String]) -> Self {
        Self::spawn(&orders.to_args(), through)
    }

    /// Starts this program with these arguments.
    pub(crate) fn spawn(args: &[String], through: &[String]) -> Self {
        // Not on the file system that is to fail.
        let stderr = tempfile::tempfile_in(crate::target_dir()).unwrap();
        let this = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
        let mut line = through.to_vec();
        line.push(this);
        line.extend_from_slice(args);
        let mut child = Command::new(&line[0])
            .args(&line[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone().unwrap())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut line = String::new();
            // A line without its end was not said.
            while stdout.read_line(&mut line).is_ok_and(|_| line.ends_with('\n')) {
                if sender.send(line.trim_end().to_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
        let until_dropped = child.stdin.take();
        Self { child, lines, stderr, until_dropped }
    }

    fn next(&mut self) -> Option<Said> {
        self.line().map(|line| Said::parse(&line))
    }

    /// The next line; `None` if the child has ended.
    pub(crate) fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                panic!("the child says nothing for too long; {}", self.stderr())
            }
        }
    }

    /// Notes what is said until `enough` says so; false if the child has ended before.
    pub(crate) fn hear(
        &mut self,
        ledger: &mut Ledger,
        mut enough: impl FnMut(&Said) -> bool,
    ) -> bool {
        while let Some(said) = self.next() {
            ledger.note(&said);
            if enough(&said) {
                return true;
            }
        }
        false
    }

    /// Hears acknowledgements, at the most `count`; fewer if the child ends before.
    pub(crate) fn hear_acknowledged(&mut self, ledger: &mut Ledger, count: usize) {
        let mut heard = 0;
        if count > 0 {
            self.hear(ledger, |said| {
                heard += usize::from(matches!(said, Said::Acknowledged { .. }));
                heard == count
            });
        }
    }

    /// SIGKILL. What it had said before still counts.
    pub(crate) fn kill(mut self, ledger: &mut Ledger) {
        self.child.kill().unwrap();
        self.end(ledger);
    }

    /// SIGKILL; what it had said before and wasn't heard yet, and what it has written to its standard error.
    #[cfg(feature = "views")]
    pub(crate) fn kill_and_hear(mut self) -> (Vec<String>, String) {
        self.child.kill().unwrap();
        let lines = std::iter::from_fn(|| self.line()).collect();
        self.child.wait().unwrap();
        (lines, self.stderr())
    }

    /// Until it has ended by itself.
    pub(crate) fn end(&mut self, ledger: &mut Ledger) -> ExitStatus {
        self.hear(ledger, |_| false);
        let status = self.child.wait().unwrap();
        self.until_dropped = None;
        let stderr = self.stderr();
        if stderr.contains("panicked") {
            ledger.note(&Said::Violation(format!("the child panicked: {stderr}")));
        }
        status
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.stderr.rewind().unwrap();
        self.stderr.read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also if it was started through another program: its standard input ends.
        self.until_dropped = None;
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

// -------------------------------------------------------------------------------------------- the ledger

/// How far the device can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Honest,
    /// It has claimed a write that it hasn't done: acknowledged events may be gone, if nothing wrong is
    /// served for them.
    Lies,
}

/// What is known of a journal from outside.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    pub(crate) dir: PathBuf,
    pub(crate) firsts: Vec<u64>,
    pub(crate) segment_bytes: u64,
    pub(crate) plant: Option<Plant>,
    acknowledged: Vec<(usize, u64, u64)>,
    /// Everything in front of this position was served.
    served: u64,
    /// Said since it was last looked at.
    pub(crate) said: Vec<Said>,
    violations: Vec<String>,
}

/// What a check has found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub(crate) torn: bool,
    pub(crate) rewritten: bool,
}

impl Ledger {
    pub(crate) fn new(dir: PathBuf, writers: usize) -> Self {
        Self {
            dir,
            firsts: vec![0; writers],
            segment_bytes: SEGMENT_BYTES,
            plant: None,
            acknowledged: Vec::new(),
            served: 0,
            said: Vec::new(),
            violations: Vec::new(),
        }
    }

    /// The same journal, copied to another place.
    pub(crate) fn copied_to(&self, dir: PathBuf) -> Self {
        copy_dir(&self.dir, &dir);
        self.at(dir)
    }

    /// The same journal, that somebody has put into another place.
    pub(crate) fn at(&self, dir: PathBuf) -> Self {
        Self { dir, said: Vec::new(), ..self.clone() }
    }

    pub(crate) fn orders(&self, batches: u64) -> Orders {
        Orders {
            dir: self.dir.clone(),
            firsts: self.firsts.clone(),
            batches,
            segment_bytes: self.segment_bytes,
            plant: self.plant,
        }
    }

    /// A child that appends until it is stopped.
    pub(crate) fn start(&self) -> Running {
        Running::start(&self.orders(u64::MAX), &[])
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// Whether it was said since the last look.
    pub(crate) fn heard(&self, wanted: impl Fn(&Said) -> bool) -> bool {
        self.said.iter().any(wanted)
    }

    fn note(&mut self, said: &Said) {
        match said {
            Said::Opened(position) => {
                if *position < self.served {
                    self.violations.push(format!(
                        "the journal ends at {position}, but had been served up to {}",
                        self.served
                    ));
                }
                self.served = *position;
            }
            Said::Acknowledged { writer, next, position } => {
                self.acknowledged.push((*writer, *next, *position));
                self.firsts[*writer] = *next;
            }
            Said::Violation(what) => self.violations.push(what.clone()),
            // Whatever has happened, only the file system may be to blame.
            Said::Refused { code, line } if code != "open.io" => self.violations.push(line.clone()),
            _ => {}
        }
        self.said.push(said.clone());
    }

    /// Opens the journal as a restarted service would, compares it with what was said, and goes on in it.
    pub(crate) fn check(&mut self, device: Device) -> Result<Found, Stop> {
        self.said.clear();
        let found = match child::open(&self.dir, self.segment_bytes) {
            Ok(store) => self.compare(&store, device).and_then(|found| {
                if device == Device::Honest {
                    self.go_on(&store)?;
                    self.verify()?;
                }
                Ok(found)
            }),
            // It was noticed.
            Err(OpenError::Corruption(_)) if device == Device::Lies => Ok(Found::default()),
            Err(error) => Err(format!("can't be opened: {error}")),
        };
        let found = match std::mem::take(&mut self.violations).first() {
            Some(violation) if device == Device::Honest => Err(violation.clone()),
            _ => found,
        };
        found.map_err(|what| Stop::Violated(format!("{what} ({})", self.keep())))
    }

    /// Compares an open journal with what was said.
    pub(crate) fn look(&mut self, store: &Store) -> Result<(), String> {
        self.compare(store, Device::Honest).map(drop)
    }

    /// The driver has appended by itself.
    pub(crate) fn acknowledge(&mut self, writer: usize, next: u64, position: u64) {
        self.note(&Said::Acknowledged { writer, next, position });
    }

    fn compare(&mut self, store: &Store, device: Device) -> Result<Found, String> {
        // By writer: the positions of its events.
        let mut positions: Vec<Vec<u64>> = vec![Vec::new(); self.firsts.len()];
        let mut end = 0;
        for event in store.read_all(Position::START).map_err(|error| error.to_string())? {
            let event = match event {
                Err(ReadError::Corruption(_)) if device == Device::Lies => {
                    return Ok(Found::default());
                }
                event => event.map_err(|error| format!("event {end}: {error}"))?,
            };
            if event.position().get() != end {
                return Err(format!("event {end} is given position {}", event.position()));
            }
            place(&event, &mut positions)?;
            end += 1;
        }
        if store.journal().end().position.get() != end {
            return Err(format!("{end} events, but the end is {}", store.journal().end().position));
        }
        for (writer, positions) in positions.iter().enumerate() {
            let mut whole = 0;
            while whole < positions.len() as u64 {
                whole = child::next_batch(whole);
            }
            if whole != positions.len() as u64 {
                return Err(format!("writer {writer}: {} events split a batch", positions.len()));
            }
        }
        if device == Device::Honest {
            self.compare_acknowledged(&positions, end)?;
        }
        self.served = end;
        let report = store.recovery_report();
        let (torn, rewritten) = (report.torn_bytes > 0, report.rewritten_bytes > 0);
        Ok(Found { torn, rewritten })
    }

    fn compare_acknowledged(&self, positions: &[Vec<u64>], end: u64) -> Result<(), String> {
        for (writer, next, told) in &self.acknowledged {
            let last = next.checked_sub(1).and_then(|last| positions[*writer].get(last as usize));
            let Some(position) = last else {
                return Err(format!(
                    "writer {writer}: events in front of {next} were acknowledged, {} are there",
                    positions[*writer].len()
                ));
            };
            if position + 1 != *told {
                return Err(format!(
                    "writer {writer}: event {} is at {position}, acknowledged up to {told}",
                    next - 1
                ));
            }
        }
        if end < self.served {
            return Err(format!("ends at {end}, but had been served up to {}", self.served));
        }
        Ok(())
    }

    /// A batch of each writer, in turn.
    fn go_on(&mut self, store: &Store) -> Result<(), String> {
        let writer = self.acknowledged.len() % self.firsts.len();
        let first = self.firsts[writer];
        let appended = store.append(&child::batch(writer, first));
        let appended = appended.map_err(|error| format!("doesn't go on: {error}"))?;
        let position = appended.token().position.get();
        self.acknowledge(writer, child::next_batch(first), position);
        Ok(())
    }

    /// What the operator's tool says, beside the open store.
    fn verify(&self) -> Result<(), String> {
        let report = headwater::verify(&OsFs, &self.dir.join("journal"), &mut |_| {});
        let report = report.map_err(|error| format!("verify: {error}"))?;
        if report.is_healthy() { Ok(()) } else { Err(format!("verify: {:?}", report.damage)) }
    }

    /// Keeps the files of a violation for whoever looks into it. Not those of a bug that was planted.
    fn keep(&self) -> String {
        if self.plant.is_some() {
            return "planted".into();
        }
        let kept = tempfile::Builder::new()
            .prefix("faults-violation-")
            .tempdir_in(crate::target_dir())
            .unwrap()
            .keep();
        copy_dir(&self.dir, &kept.join("store"));
        format!("its files as they are now: {}", kept.display())
    }

    /// A fresh journal, before this one becomes long.
    pub(crate) fn renew_if_long(&mut self) {
        if self.firsts.iter().sum::<u64>() > 1500 {
            std::fs::remove_dir_all(&self.dir).unwrap();
            *self = Self {
                segment_bytes: self.segment_bytes,
                plant: self.plant,
                ..Self::new(self.dir.clone(), self.firsts.len())
            };
        }
    }
}

/// Files the event under its writer, if it is the next one of that, unchanged.
fn place(event: &Recorded, positions: &mut [Vec<u64>]) -> Result<(), String> {
    let position = event.position();
    let writer = event.stream().as_str().strip_prefix("writer-");
    let writer = writer.and_then(|writer| writer.parse::<usize>().ok());
    let Some((writer, own)) = writer.and_then(|writer| Some((writer, positions.get_mut(writer)?)))
    else {
        return Err(format!("event {position} is of stream {}", event.stream()));
    };
    let number = own.len() as u64;
    if event.revision().get() != number || event.id() != child::event_id(writer, number) {
        return Err(format!(
            "event {position} of writer {writer} has revision {}, expected {number}",
            event.revision()
        ));
    }
    if event.data() != &child::payload(writer, number) {
        return Err(format!("event {position} of writer {writer} is not what was appended"));
    }
    own.push(position.get());
    Ok(())
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
