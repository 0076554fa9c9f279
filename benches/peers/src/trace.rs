//! Which system calls a commit takes, counted by strace.

use std::collections::BTreeMap;
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

pub(crate) fn available() -> bool {
    let tried =
        Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// Counts over so many commits, and twice as many: the difference is what commits cost, without opening and
/// closing.
pub(crate) fn count(peer: &Peer, dir: &Path, commits: u64) -> Outcome<Calls> {
    let few = trace(peer, dir, commits)?;
    let many = trace(peer, dir, 2 * commits)?;
    let mut by_name = BTreeMap::new();
    for (name, calls) in &many.calls {
        let more = calls.saturating_sub(few.calls.get(name).copied().unwrap_or(0));
        if more > 0 {
            by_name.insert(name.clone(), more as f64 / commits as f64);
        }
    }
    let sum = |names: &[&str]| names.iter().filter_map(|name| by_name.get(*name)).sum();
    let (syncs, writes) = (sum(&SYNCS), sum(&WRITES));
    Ok(Calls { syncs, writes, sync_opens: many.sync_opens, by_name })
}

struct Traced {
    calls: BTreeMap<String, u64>,
    sync_opens: bool,
}

fn trace(peer: &Peer, dir: &Path, commits: u64) -> Outcome<Traced> {
    let fresh = tempfile::tempdir_in(dir)?;
    let log = tempfile::NamedTempFile::new_in(dir)?;
    let log_path = log.path().to_str().ok_or("a path that isn't UTF-8")?;
    let filter = format!("trace=openat,{},{}", SYNCS.join(","), WRITES.join(","));
    let tracer = ["strace", "-f", "-qq", "-e", &filter, "-e", "signal=none", "-o", log_path];
    let load = Load { writers: 1, batch: 1, payload_bytes: 256 };
    Worker::start(&tracer, peer, fresh.path(), Task::Commit { load, commits })?.finish()?;
    let mut traced = Traced { calls: BTreeMap::new(), sync_opens: false };
    for line in std::fs::read_to_string(log.path())?.lines() {
        // `PID NAME(ARGUMENTS`; a call that was interrupted is resumed in a line of its own, which isn't one.
        let Some((_, rest)) = line.split_once(' ') else { continue };
        let Some((name, arguments)) = rest.trim_start().split_once('(') else { continue };
        if name == "openat" {
            traced.sync_opens |= arguments.contains("O_SYNC") || arguments.contains("O_DSYNC");
        } else if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            *traced.calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(traced)
}

/// Whether a peer's commits were seen to sync.
pub(crate) fn is_durable(peer: &Peer, calls: &Calls) -> bool {
    peer.kind == Kind::Baseline || calls.syncs >= 1.0 || calls.sync_opens
}
