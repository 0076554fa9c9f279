//! What a server or a follower tells those beside it, who have no part in its process: a small file beside the journal,
//! written anew every second.
//!
//! ```text
//!   STORE/serving-127.0.0.1:7401        who follows the journal, as its server sees it
//!   STORE/mirrors/NAME/following        whom the mirror follows, as it sees it
//!
//!   "headwater-status 1 LENGTH CRC\n" and so many bytes of JSON, with the time of writing by two clocks
//! ```
//! - It is overwritten in place and never synced: nothing depends on it, and the disk is left in peace. Whoever reads it
//!   checks length and checksum, and reads again if it was written meanwhile.
//! - What it says holds for three intervals, of a minute at most, whatever it says of them. Then nothing is known: the
//!   process is gone, or hangs.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::error::ShippingError;
use super::feed::FeedStatus;
use super::message::FeedTerms;
use super::mirror::{MirrorState, MirrorStatus};
use super::observe::Ends;
use super::server::{PeerState, PeerStatus};
use super::upstreams::UpstreamStatus;
use crate::env;
use crate::fs::{self, Fs, OpenMode};
use crate::journal::Journal;
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// What the name of a server's file begins with; its address follows.
pub(crate) const SERVING: &str = "serving-";
/// The name of a follower's file.
pub(crate) const FOLLOWING: &str = "following";

const MAGIC: &str = "headwater-status 1";
/// No file is read that claims to be longer.
const FILE_BYTES_MAX: usize = 16 << 20;
const INTERVAL_MIN: Duration = Duration::from_millis(10);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// What two looks at a clock may differ by the wrong way.
const CLOCK_TICK_MS: i64 = 20;
/// A file that is being written is read again so often.
const READS_MAX: u32 = 20;
const READ_PAUSE: Duration = Duration::from_millis(2);

/// Where they lie: beside the journal of a store or of a store's mirror, else within its directory.
pub(crate) fn place(journal_dir: &Path) -> PathBuf {
    match journal_dir.parent() {
        Some(beside) if journal_dir.ends_with("journal") => beside.to_owned(),
        _ => journal_dir.to_owned(),
    }
}

/// Writes one of them until it is dropped.
#[derive(Debug)]
pub(crate) struct StatusFile {
    stop: Option<Sender<()>>,
    writing: Option<JoinHandle<()>>,
}

/// What becomes of the file in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// It says so, and how it was then.
    Kept,
    Removed,
}

impl StatusFile {
    /// What `status` says is written at once and every `interval`, until there is nothing to say any more. What can't be
    /// written isn't: shipping goes on.
    pub(crate) fn start<S: Serialize>(
        fs: &Arc<dyn Fs>,
        path: PathBuf,
        interval: Duration,
        afterwards: Afterwards,
        status: impl Fn() -> Option<S> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (fs, interval) = (Arc::clone(fs), interval.clamp(INTERVAL_MIN, INTERVAL_MAX));
        let (stop, stopped) = bounded::<()>(0);
        let write = move || {
            let put = |ended| {
                let put = |status| drop(write(&*fs, &path, &stamped(status, interval, ended)));
                status().map(put).is_some()
            };
            let mut goes_on = put(false);
            while goes_on && stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                goes_on = put(false);
            }
            match afterwards {
                Afterwards::Kept => drop(put(true)),
                Afterwards::Removed => drop(fs.remove(&path)),
            }
        };
        let writing = thread::Builder::new().name("headwater-status".into()).spawn(write)?;
        Ok(Self { stop: Some(stop), writing: Some(writing) })
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(writing) = self.writing.take() {
            drop(writing.join());
        }
    }
}

/// Writes how a mirror or a feed in `dir` does, if it is to be written at all.
pub(super) fn follow(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    interval: Option<Duration>,
    status: impl Fn() -> Value + Send + 'static,
) -> Option<std::io::Result<StatusFile>> {
    let (interval, place) = (interval?, place(dir));
    if place != dir {
        // Also while there is no mirror: nothing else says why not.
        drop(fs.create_dir_all(&place));
    }
    let status = move || Some(status());
    Some(StatusFile::start(fs, place.join(FOLLOWING), interval, Afterwards::Kept, status))
}

/// What a file says, and when.
#[derive(Serialize)]
struct Stamped<S> {
    #[serde(flatten)]
    status: S,
    pid: u32,
    interval_ms: u64,
    written_us: i64,
    monotonic_ms: i64,
    ended: bool,
}

fn stamped<S>(status: S, interval: Duration, ended: bool) -> Stamped<S> {
    Stamped {
        status,
        pid: std::process::id(),
        interval_ms: millis(interval),
        written_us: env::now_us(),
        monotonic_ms: env::monotonic_ms(),
        ended,
    }
}

fn write(fs: &dyn Fs, path: &Path, status: &impl Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string(status)?;
    let head = format!("{MAGIC} {} {:08x}\n", text.len(), crc32fast::hash(text.as_bytes()));
    let file = match fs.open(path, OpenMode::Write) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs.open(path, OpenMode::CreateNew)?
        }
        opened => opened?,
    };
    fs::write_all_at(&*file, format!("{head}{text}\n").as_bytes(), 0)
}

/// What a file says.
#[derive(Debug)]
#[cfg_attr(not(feature = "cli"), allow(dead_code, reason = "the command line shows it"))]
pub(crate) struct Reading {
    pub(crate) status: Value,
    /// Who writes it was there three intervals ago at most; else it is what was last known.
    pub(crate) is_fresh: bool,
    /// How long ago it was written.
    pub(crate) age: Duration,
}

/// Reads one; `None` if there is none, or it can't be understood.
pub(crate) fn read(fs: &dyn Fs, path: &Path) -> Option<Reading> {
    let status = (0..READS_MAX).find_map(|attempt| {
        if attempt > 0 {
            thread::sleep(READ_PAUSE); // it is being written
        }
        read_once(fs, path).transpose()
    })?;
    let status = status.ok()?;
    let of = |name: &str| status.get(name).and_then(Value::as_i64);
    let by_monotonic = env::monotonic_ms().checked_sub(of("monotonic_ms")?)?;
    let by_clock = env::now_us().checked_sub(of("written_us")?)? / 1000;
    let longest = i64::try_from(INTERVAL_MAX.as_millis()).unwrap_or(i64::MAX);
    let limit = of("interval_ms")?.min(longest).saturating_mul(3);
    // Each clock alone may have begun anew, or have been set.
    let is_recent = |age: i64| (-CLOCK_TICK_MS..=limit).contains(&age);
    let ended = status.get("ended").and_then(Value::as_bool)?;
    let is_fresh = !ended && is_recent(by_monotonic) && is_recent(by_clock);
    let age = Duration::from_millis(u64::try_from(by_clock).unwrap_or(0));
    Some(Reading { status, is_fresh, age })
}

/// `Ok(None)`: it is to be read again.
fn read_once(fs: &dyn Fs, path: &Path) -> std::io::Result<Option<Value>> {
    let file = fs.open(path, OpenMode::Read)?;
    let len = usize::try_from(file.size()?).unwrap_or(usize::MAX).min(FILE_BYTES_MAX);
    let mut bytes = vec![0; len];
    let read = fs::read_full_at(&*file, &mut bytes, 0)?;
    bytes.truncate(read);
    Ok(understand(&bytes))
}

fn understand(bytes: &[u8]) -> Option<Value> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let (head, rest) = bytes.split_at_checked(end)?;
    let head = std::str::from_utf8(head).ok()?.strip_prefix(MAGIC)?.trim_start();
    let (len, crc) = head.split_once(' ')?;
    let text = rest.get(1..)?.get(..len.parse::<usize>().ok()?)?;
    let crc = u32::from_str_radix(crc, 16).ok()?;
    (crc == crc32fast::hash(text)).then(|| serde_json::from_slice(text).ok()).flatten()
}

/// Removes what servers have left that were killed.
pub(crate) fn remove_stale(fs: &dyn Fs, dir: &Path) {
    let names = fs.list(dir).unwrap_or_default();
    for name in names.iter().filter(|name| name.starts_with(SERVING)) {
        let path = dir.join(name);
        if read(fs, &path).is_none_or(|reading| !reading.is_fresh) {
            drop(fs.remove(&path));
        }
    }
}

/// What a server knows. With thousands of peers this is thousands of objects a second: they are written as they are,
/// with no tree of values between.
#[derive(Serialize)]
pub(super) struct ServerStatus {
    journal: Option<Shown<JournalId>>,
    node: Option<Shown<NodeId>>,
    first_position: Option<u64>,
    end_position: Option<u64>,
    refused: Value,
    #[serde(serialize_with = "each_peer")]
    peers: Vec<PeerStatus>,
}

impl ServerStatus {
    pub(super) fn new(journal: Option<&Journal>, peers: Vec<PeerStatus>, refused: &Ends) -> Self {
        Self {
            journal: journal.map(|it| Shown(it.id())),
            node: journal.map(|it| Shown(it.node())),
            first_position: journal.map(|it| it.start().position.get()),
            end_position: journal.map(|it| it.end().position.get()),
            refused: ends(refused),
            peers,
        }
    }
}

fn each_peer<S: Serializer>(peers: &[PeerStatus], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(peers.iter().map(PeerFields::of))
}

/// As it is printed.
struct Shown<T>(T);

impl<T: Display> Serialize for Shown<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

#[derive(Serialize)]
struct PeerFields<'a> {
    name: Option<&'a str>,
    journal: Option<Shown<JournalId>>,
    node: Option<Shown<NodeId>>,
    address: Shown<SocketAddr>,
    agent: &'a str,
    state: &'static str,
    feed: Option<&'a FeedTerms>,
    sent_position: Option<u64>,
    durable_position: Option<u64>,
    applied_position: Option<u64>,
    lag_events: Option<u64>,
    lag_bytes: Option<u64>,
    lag_ms: Option<u64>,
    held_bytes: Option<u64>,
    heard_ms: u64,
    connected_ms: u64,
    reconnects: u64,
    ends: Value,
}

impl<'a> PeerFields<'a> {
    fn of(status: &'a PeerStatus) -> Self {
        Self {
            name: status.peer.as_deref(),
            journal: status.journal().map(Shown),
            node: status.node.map(Shown),
            address: Shown(status.address),
            agent: &status.agent,
            state: match status.state {
                PeerState::Handshake => "handshake",
                PeerState::CatchingUp => "catching_up",
                PeerState::Live => "live",
                PeerState::Stalled => "stalled",
                PeerState::Closing => "closing",
            },
            feed: status.feed.as_ref(),
            sent_position: position(status.sent),
            durable_position: position(status.acked),
            applied_position: status.applied.map(Position::get),
            lag_events: status.lag_events(),
            lag_bytes: status.lag_bytes(),
            lag_ms: status.lag_time().map(millis),
            held_bytes: status.held_bytes(),
            heard_ms: millis(status.heard),
            connected_ms: millis(status.connected_for),
            reconnects: status.reconnects,
            ends: ends(&status.ends),
        }
    }
}

/// What a follower knows.
pub(super) fn of_mirror(status: &MirrorStatus) -> Value {
    let path: Vec<_> = status.path.iter().map(ToString::to_string).collect();
    json!({
        "address": status.address,
        "upstreams": upstreams(&status.upstreams),
        "path": path,
        "state": state(&status.state),
        "durable_position": position(status.mirrored),
        "applied_position": status.applied.map(Position::get),
        "lag_events": status.lag_events(),
        "lag_bytes": status.lag_bytes(),
        "lag_ms": status.lag_time().map(millis),
        "heard_ms": status.origin_heard.map(millis),
        "connected_ms": status.connected_for.map(millis),
        "reconnects": status.reconnects,
        "ends": ends(&status.ends),
        "error": status.last_error.as_ref().map(error),
    })
}

/// What the receiver of a feed knows; positions are the origin's.
pub(super) fn of_feed(status: &FeedStatus) -> Value {
    json!({
        "address": status.address,
        "upstreams": upstreams(&status.upstreams),
        "feed": status.terms,
        "state": state(&status.state),
        "durable_position": position(status.received),
        "lag_events": status.lag_events(),
        "lag_bytes": status.lag_bytes(),
        "lag_ms": status.lag_time().map(millis),
        "heard_ms": status.origin_heard.map(millis),
        "reconnects": status.reconnects,
        "ends": ends(&status.ends),
        "error": status.last_error.as_ref().map(error),
    })
}

fn upstreams(upstreams: &[UpstreamStatus]) -> Value {
    let upstream = |upstream: &UpstreamStatus| {
        let error = upstream.last_error.as_ref().map(error);
        json!({ "address": upstream.address, "in_use": upstream.is_in_use, "error": error })
    };
    upstreams.iter().map(upstream).collect()
}

const fn state(state: &MirrorState) -> &'static str {
    match state {
        MirrorState::Bootstrapping { .. } => "bootstrapping",
        MirrorState::Connecting => "connecting",
        MirrorState::CatchingUp => "catching_up",
        MirrorState::Live => "live",
        MirrorState::Halted(_) => "halted",
        MirrorState::Stopped => "stopped",
    }
}

fn error(error: &ShippingError) -> Value {
    json!({ "code": error.code(), "message": error.to_string(), "hint": error.hint() })
}

fn position(checkpoint: Option<Checkpoint>) -> Option<u64> {
    checkpoint.map(|checkpoint| checkpoint.position.get())
}

fn ends(ends: &Ends) -> Value {
    let counts: Map<_, _> =
        ends.iter().map(|(reason, count)| (reason.code().to_owned(), json!(count))).collect();
    Value::Object(counts)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;

    #[test]
    fn a_file_is_read_as_it_was_written_and_every_flipped_bit_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FOLLOWING);
        let second = Duration::from_secs(1);
        write(&OsFs, &path, &stamped(json!({ "a": "long ".repeat(50) }), second, false)).unwrap();
        write(&OsFs, &path, &stamped(json!({ "a": 1 }), second, false)).unwrap();
        let reading = read(&OsFs, &path).unwrap();
        assert!(reading.is_fresh && reading.status["a"] == 1, "{reading:?}");
        let bytes = std::fs::read(&path).unwrap();
        let whole = understand(&bytes).unwrap();
        let used = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let used = used + whole.to_string().len();
        for bit in 0..used * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(understand(&damaged).is_none_or(|it| it == whole), "bit {bit}");
        }
        (0..used).for_each(|len| assert!(understand(&bytes[..len]).is_none(), "cut to {len}"));
    }

    #[test]
    fn what_was_written_long_ago_in_another_life_or_at_the_end_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FOLLOWING);
        let fresh = |change: &dyn Fn(&mut Value), ended| {
            let status = stamped(json!({}), Duration::from_secs(1), ended);
            let mut status = serde_json::to_value(status).unwrap();
            change(&mut status);
            write(&OsFs, &path, &status).unwrap();
            read(&OsFs, &path).unwrap().is_fresh
        };
        let shift = |name: &'static str, by: i64| {
            move |status: &mut Value| status[name] = json!(status[name].as_i64().unwrap() + by)
        };
        assert!(fresh(&|_| {}, false));
        assert!(!fresh(&|_| {}, true));
        assert!(fresh(&shift("monotonic_ms", -2000), false));
        assert!(!fresh(&shift("monotonic_ms", -4000), false), "of a process that hangs");
        assert!(!fresh(&shift("monotonic_ms", 4000), false), "from before the machine was started");
        assert!(!fresh(&shift("written_us", -4_000_000), false));
        assert!(!fresh(&shift("written_us", 4_000_000), false), "the clock was set back");
    }

    #[test]
    fn nobody_is_believed_for_longer_than_three_of_the_longest_intervals_whatever_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FOLLOWING);
        let longest = i64::try_from(millis(INTERVAL_MAX)).unwrap();
        let fresh = |interval_ms: i64, age_ms: i64| {
            let status = stamped(json!({}), INTERVAL_MAX, false);
            let mut status = serde_json::to_value(status).unwrap();
            for (name, unit) in [("monotonic_ms", 1), ("written_us", 1000)] {
                status[name] = json!(status[name].as_i64().unwrap() - age_ms * unit);
            }
            status["interval_ms"] = json!(interval_ms);
            write(&OsFs, &path, &status).unwrap();
            read(&OsFs, &path).unwrap().is_fresh
        };
        for interval_ms in [longest, longest + 1, 24 * 3600 * 1000, i64::MAX] {
            assert!(fresh(interval_ms, 2 * longest), "{interval_ms}");
            assert!(!fresh(interval_ms, 3 * longest + 1000), "{interval_ms}");
        }
        for interval_ms in [-1, i64::MIN] {
            assert!(!fresh(interval_ms, 1000), "{interval_ms}");
        }
    }

    #[test]
    fn an_interval_of_a_day_is_written_as_the_longest_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let (fs, path): (Arc<dyn Fs>, _) = (Arc::new(OsFs), dir.path().join(FOLLOWING));
        let day = Duration::from_secs(24 * 3600);
        let status = || Some(json!({}));
        drop(StatusFile::start(&fs, path.clone(), day, Afterwards::Kept, status).unwrap());
        assert_eq!(read(&OsFs, &path).unwrap().status["interval_ms"], millis(INTERVAL_MAX));
    }
}
