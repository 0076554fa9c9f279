//! Which system calls a commit takes, counted by strace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::child::Worker;
use crate::engine::{Kind, Peer};
use crate::worker::{Load, Task};

/// What makes data durable. Files that are opened with O_SYNC or O_DSYNC need no call: see `sync_opens`.
const SYNCS: [&str; 5] = ["fsync", "fdatasync", "sync_file_range", "msync", "syncfs"];
/// What carries data.
const WRITES: [&str; 6] = ["write", "pwrite64", "writev", "pwritev", "pwritev2", "io_uring_enter"];

/// Per commit of one event by one writer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Calls {
    pub(crate) syncs: f64,
    pub(crate) writes: f64,
    /// Whether it opens files so that every write is synced by the kernel.
    pub(crate) sync_opens: bool,
    /// All of them by name.
    pub(crate) by_name: BTreeMap<String, f64>,
}

/// What the thread that commits does, in all, while segments fill up and are followed by others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AcrossRolls {
    pub(crate) commits: u64,
    pub(crate) rolls: u64,
    pub(crate) syncs: u64,
    pub(crate) directory_syncs: u64,
    pub(crate) creations: u64,
}

pub(crate) fn available() -> bool {
    let tried =
        Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// Counts over so many commits, and twice as many: the difference is what commits cost, without opening and
/// closing.
pub(crate) fn count(peer: &Peer, dir: &Path, commits: u64) -> Outcome<Calls> {
    let (few, many) = (calls(peer, dir, commits)?, calls(peer, dir, 2 * commits)?);
    let sync_opens = many.iter().any(Call::opens_synced);
    let (few, many) = (by_name(&few), by_name(&many));
    let mut by_name = BTreeMap::new();
    for (name, calls) in many {
        let more = calls.saturating_sub(few.get(&name).copied().unwrap_or(0));
        if more > 0 {
            by_name.insert(name, more as f64 / commits as f64);
        }
    }
    let sum = |names: &[&str]| names.iter().filter_map(|name| by_name.get(*name)).sum();
    let (syncs, writes) = (sum(&SYNCS), sum(&WRITES));
    Ok(Calls { syncs, writes, sync_opens, by_name })
}

fn by_name(calls: &[Call]) -> BTreeMap<String, u64> {
    let mut by_name = BTreeMap::new();
    for call in calls.iter().filter(|call| call.name != "openat") {
        *by_name.entry(call.name.clone()).or_default() += 1;
    }
    by_name
}

fn calls(peer: &Peer, dir: &Path, commits: u64) -> Outcome<Vec<Call>> {
    let fresh = tempfile::tempdir_in(dir)?;
    let load = Load { writers: 1, batch: 1, payload_bytes: 256 };
    trace(peer, fresh.path(), Task::Commit { load, commits })
}

/// Counts what the committing thread does: that is the one that syncs most. Commits are of some KiB, so that some
/// of them need a new segment.
pub(crate) fn across_rolls(peer: &Peer, dir: &Path, commits: u64) -> Outcome<AcrossRolls> {
    const BATCH: usize = 16;
    let fresh = tempfile::tempdir_in(dir)?;
    let load = Load { writers: 1, batch: BATCH, payload_bytes: 256 };
    let calls = trace(peer, fresh.path(), Task::Commit { load, commits })?;
    let mut syncs_by_thread = BTreeMap::<&str, u64>::new();
    for call in calls.iter().filter(|call| call.is_sync()) {
        *syncs_by_thread.entry(&call.thread).or_default() += 1;
    }
    let (committer, _) =
        syncs_by_thread.iter().max_by_key(|(_, syncs)| **syncs).ok_or("nobody synced")?;
    let own = || calls.iter().filter(|call| call.thread == *committer);
    let synced = || own().filter(|call| call.is_sync());
    // The folder is still there: what is a directory can be asked.
    let directories = || synced().filter(|call| Path::new(&call.path).is_dir());
    let data: BTreeSet<_> =
        synced().map(|call| &call.path).filter(|path| path.ends_with(".seg")).collect();
    Ok(AcrossRolls {
        commits,
        rolls: (data.len() as u64).saturating_sub(1),
        syncs: synced().count() as u64,
        directory_syncs: directories().count() as u64,
        creations: own().filter(|call| call.creates()).count() as u64,
    })
}

/// A line of the log: `THREAD NAME(FD<PATH>, ...`.
struct Call {
    thread: String,
    name: String,
    arguments: String,
    /// Of the first file descriptor.
    path: String,
}

impl Call {
    /// A call that was interrupted is resumed in a line of its own, which isn't one.
    fn parse(line: &str) -> Option<Self> {
        let (thread, rest) = line.split_once(' ')?;
        let (name, arguments) = rest.trim_start().split_once('(')?;
        if !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return None;
        }
        let path = arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        let [thread, name, arguments, path] =
            [thread, name, arguments, path.map_or("", |(path, _)| path)].map(str::to_owned);
        Some(Self { thread, name, arguments, path })
    }

    fn is_sync(&self) -> bool {
        SYNCS.contains(&self.name.as_str())
    }

    fn opens_synced(&self) -> bool {
        self.name == "openat"
            && (self.arguments.contains("O_SYNC") || self.arguments.contains("O_DSYNC"))
    }

    fn creates(&self) -> bool {
        self.name == "openat" && self.arguments.contains("O_CREAT")
    }
}

fn trace(peer: &Peer, dir: &Path, task: Task) -> Outcome<Vec<Call>> {
    let log = tempfile::NamedTempFile::new()?;
    let log_path = log.path().to_str().ok_or("a path that isn't UTF-8")?;
    let filter = format!("trace=openat,{},{}", SYNCS.join(","), WRITES.join(","));
    let tracer = ["strace", "-f", "-y", "-qq", "-e", &filter, "-e", "signal=none", "-o", log_path];
    Worker::start(&tracer, peer, dir, task)?.finish()?;
    // What was written may be in the log, and needn't be text.
    let log = std::fs::read(log.path())?;
    Ok(String::from_utf8_lossy(&log).lines().filter_map(Call::parse).collect())
}

/// Whether a peer's commits were seen to sync.
pub(crate) fn is_durable(peer: &Peer, calls: &Calls) -> bool {
    peer.kind == Kind::Baseline || calls.syncs >= 1.0 || calls.sync_opens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_names_its_thread_and_file() {
        let call = Call::parse("  17 fdatasync(7</a/b c.seg>) = 0".trim_start()).unwrap();
        assert_eq!((call.thread.as_str(), call.path.as_str()), ("17", "/a/b c.seg"));
        assert!(call.is_sync() && !call.creates());
    }

    #[test]
    fn a_call_that_is_resumed_counts_once() {
        assert!(Call::parse("17 fdatasync(7</a> <unfinished ...>").is_some());
        assert!(Call::parse("17 <... fdatasync resumed>) = 0").is_none());
    }
}
