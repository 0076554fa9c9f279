//! How fast Headwater's own paths are, each beside what the machine gives without it.
//!
//! ```text
//!   group = what is measured     the bare device, loop or stream first, then Headwater doing the same
//!     ├─ --figures   some seconds each, in turns (what `./run bench` does): a table on the screen,
//!     │              paths.json, paths.svg and tables in docs/benchmarks
//!     ├─ --smoke     the same, tiny and without meaning: does everything still work?
//!     └─ otherwise   criterion, with its own arguments
//! ```
//! Ratios are of one run on one machine; nothing here is compared with a number from elsewhere. Files lie
//! in the target folder, or in `HEADWATER_BENCH_DIR`: on the file system that is to be measured.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people to look at")]

use std::path::PathBuf;
use std::process::ExitCode;

mod append;
mod baseline;
mod corpus;
mod figures;
mod measure;
mod meter;
mod open;
mod plot;
mod read;
#[cfg(all(feature = "views", feature = "shipping"))]
mod remote;
mod rolls;
#[path = "../shared/mod.rs"]
mod shared;
#[cfg(all(feature = "views", feature = "shipping"))]
mod ship;
mod statistics;
mod subscribe;
#[cfg(all(feature = "views", feature = "shipping"))]
mod view;
#[cfg(all(feature = "views", feature = "shipping"))]
mod wire;

use std::time::Duration;

use corpus::Corpus;
use measure::{Effort, Measured};
use meter::Took;
use shared::held::Held;

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
    threads_max: usize,
    appends_per_thread: usize,
    /// Of one operation.
    appends_of_tickets: usize,
    buffered_batches: usize,
    /// Size of the files that bare writes go to.
    file_bytes: u64,
    /// Size of a segment that isn't filled.
    steady_bytes: u64,
    sealed_segments: usize,
}

const FULL: Scale = Scale {
    events: 204_800,
    keys: 10_000,
    threads_max: 256,
    appends_per_thread: 50,
    appends_of_tickets: 16_384,
    buffered_batches: 512,
    file_bytes: 64 << 20,
    steady_bytes: 512 << 20,
    sealed_segments: 2_000,
};

const SMOKE: Scale = Scale {
    events: 3_200,
    keys: 100,
    threads_max: 4,
    appends_per_thread: 5,
    appends_of_tickets: 32,
    buffered_batches: 4,
    file_bytes: 2 << 20,
    steady_bytes: 4 << 20,
    sealed_segments: 10,
};

/// What several ways of doing the same are measured by. The first is the baseline.
struct Group {
    name: &'static str,
    /// What has survived a power cut when an operation is over.
    durable: &'static str,
    ways: Vec<Way>,
    /// How many times as long it is measured as the others.
    patience: f64,
    /// What of it Headwater is held to.
    held: Box<dyn Fn(&[Measured]) -> Vec<Option<Held>>>,
}

impl Group {
    fn new(name: &'static str, durable: &'static str, ways: Vec<Way>) -> Self {
        Self { name, durable, ways, patience: 1.0, held: Box::new(|_| Vec::new()) }
    }
}

/// One way of doing it.
struct Way {
    name: &'static str,
    /// What one operation moves.
    events: u64,
    bytes: u64,
    /// Does it once, and says what it took: preparing and cleaning up isn't counted.
    operation: Box<dyn FnMut() -> Outcome<Took>>,
}

/// Sets a group up.
type Setup = fn(&Scratch, &Corpus) -> Outcome<Group>;

const GROUPS: &[Setup] = &[
    append::by_threads,
    append::batches,
    append::tickets,
    append::buffered,
    rolls::rolls,
    read::replay,
    read::one_event,
    read::one_stream,
    open::many_segments,
    subscribe::append_to_subscriber,
    #[cfg(all(feature = "views", feature = "shipping"))]
    view::catch_up,
    #[cfg(all(feature = "views", feature = "shipping"))]
    ship::catch_up,
    #[cfg(all(feature = "views", feature = "shipping"))]
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
        Ok(Self {
            dir: tempfile::Builder::new().prefix("bench-").tempdir_in(parent.canonicalize()?)?,
            scale,
        })
    }

    /// A group's own folder.
    fn folder(&self, group: &str) -> Outcome<PathBuf> {
        let folder = self.dir.path().join(group);
        std::fs::create_dir(&folder)?;
        Ok(folder)
    }
}

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Outcome<()> {
    let has = |wanted: &str| arguments.iter().any(|it| it == wanted);
    let mut out = arguments.iter().skip_while(|it| *it != "--out").skip(1);
    let mut asked = figures::Asked {
        scale: FULL,
        effort: Effort::Seconds(3.0),
        out: out.next().map(PathBuf::from),
        json: has("--json"),
    };
    if has("--smoke") {
        (asked.scale, asked.effort) = (SMOKE, Effort::Smoke);
        return figures::run(asked);
    }
    if has("--quick") {
        asked.effort = Effort::Seconds(0.5);
    }
    if has("--figures") {
        return figures::run(asked);
    }
    // Cargo passes `--bench` when it runs benchmarks, and doesn't when it runs them as tests.
    statistics::run(if has("--bench") { FULL } else { SMOKE })
}
