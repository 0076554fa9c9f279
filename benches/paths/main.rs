//! How fast Headwater's own paths are, each beside what the machine gives without it.
//!
//! ```text
//!   group = what is measured     the bare device, loop or stream first, then Headwater doing the same
//!     ├─ --figures   some seconds each, in turns, one table (what `./run bench` shows)
//!     ├─ --figures --json   the same as JSON
//!     ├─ --smoke     the same, tiny and without meaning: does everything still work?
//!     └─ otherwise   criterion, with its own arguments
//! ```
//! Ratios are of one run on one machine; nothing here is compared with a number from elsewhere. Files lie
//! in the target folder, or in `HEADWATER_BENCH_DIR`: on the file system that is to be measured.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people to look at")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

mod append;
mod baseline;
mod corpus;
mod figures;
mod machine;
mod remote;
mod replay;
mod ship;
mod statistics;
mod view;

use corpus::Corpus;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Outcome<T> = Result<T, Error>;

/// How long anything may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Scale {
    /// Events in the journal that is read, folded and shipped.
    events: u64,
    /// Rows in the view of it.
    keys: u32,
    threads: usize,
    appends_per_thread: usize,
    /// Size of the files that bare writes go to.
    file_bytes: u64,
}

const FULL: Scale = Scale {
    events: 200_000,
    keys: 10_000,
    threads: 64,
    appends_per_thread: 50,
    file_bytes: 64 << 20,
};

const SMOKE: Scale =
    Scale { events: 2_000, keys: 100, threads: 4, appends_per_thread: 5, file_bytes: 2 << 20 };

/// What several ways of doing the same are measured by. The first is the baseline.
struct Group {
    name: &'static str,
    /// What has survived a power cut when an operation is over.
    durable: &'static str,
    ways: Vec<Way>,
}

/// One way of doing it.
struct Way {
    name: &'static str,
    /// What one operation moves.
    events: u64,
    bytes: u64,
    /// Does it once, and says how long it took: preparing and cleaning up isn't counted.
    operation: Box<dyn FnMut() -> Outcome<Duration>>,
}

/// Sets a group up.
type Setup = fn(&Scratch, &Corpus) -> Outcome<Group>;

const GROUPS: [Setup; 7] = [
    append::one_thread,
    append::many_threads,
    append::batches,
    replay::replay,
    view::catch_up,
    ship::catch_up,
    remote::commit_to_remote_view,
];

/// Where files go, and how much there is to do.
struct Scratch {
    dir: tempfile::TempDir,
    scale: Scale,
}

impl Scratch {
    fn new(scale: Scale) -> Outcome<Self> {
        let chosen = std::env::var_os("HEADWATER_BENCH_DIR").map(PathBuf::from);
        let parent = chosen.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
        std::fs::create_dir_all(&parent)?;
        Ok(Self { dir: tempfile::Builder::new().prefix("bench-").tempdir_in(parent)?, scale })
    }

    /// A group's own folder.
    fn folder(&self, group: &str) -> Outcome<PathBuf> {
        let folder = self.dir.path().join(group);
        std::fs::create_dir(&folder)?;
        Ok(folder)
    }
}

fn main() -> ExitCode {
    let has = |wanted: &str| std::env::args().any(|arg| arg == wanted);
    // Cargo passes `--bench` when it runs benchmarks, and doesn't when it runs them as tests.
    let done = match (has("--smoke"), has("--figures"), has("--bench")) {
        (true, ..) => figures::print(SMOKE, figures::Effort::Smoke),
        (_, true, _) if has("--json") => figures::print_json(FULL, figures::Effort::Seconds(3)),
        (_, true, _) => figures::print(FULL, figures::Effort::Seconds(3)),
        (.., measured) => statistics::run(if measured { FULL } else { SMOKE }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
