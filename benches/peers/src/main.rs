//! Headwater beside others, in one run: `./run bench --peers`.
//!
//! ```text
//!   runner ── for every round, cell and peer ──▶ worker (a process): opens the engine, does one task
//!      │                                             ╰──▶ a sample: time, processor, allocations, I/O
//!      ├──▶ report: peers.json, README.md
//!      ╰──▶ plot:   *.svg
//! ```
//! Everybody gets the same bytes and is asked for the same durability; what they make of it stands in the tables.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

mod child;
mod corpus;
mod engine;
mod engines;
mod explain;
mod held_to;
mod measure;
mod plot;
mod readme;
mod report;
mod runner;
#[allow(dead_code, reason = "the other program uses the rest")]
#[path = "../../shared/mod.rs"]
mod shared;
mod trace;
mod worker;

use corpus::Corpus;
use engine::{Kind, Peer};

type Error = Box<dyn std::error::Error + Send + Sync>;
type Outcome<T> = Result<T, Error>;

/// Headwater beside other logs and stores, in one run.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    worker: Option<Inner>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Inner {
    /// One task in a process of its own; the run starts these.
    #[command(hide = true)]
    Worker { peer: String, dir: PathBuf, task: String },
}

#[derive(Debug, Args)]
struct Run {
    /// Measure only these (and Headwater and the bare device); may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// How many rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each measurement of a round takes.
    #[arg(long, default_value_t = 0.3)]
    seconds: f64,
    /// Two short rounds, in two minutes: for a first impression, not to be quoted.
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// Only look whether everything works: tiny, and without meaning.
    #[arg(long)]
    smoke: bool,
    /// Print the data on the standard output, too.
    #[arg(long)]
    json: bool,
    /// Where data, plots and tables go. Whole runs go to docs/benchmarks, others to the target folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Make tables and plots again from the data in the folder, without measuring.
    #[arg(long)]
    redraw: bool,
    /// List who takes part.
    #[arg(long)]
    list: bool,
}

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Settings {
    pub(crate) smoke: bool,
    pub(crate) quick: bool,
    pub(crate) rounds: usize,
    pub(crate) warm: Duration,
    pub(crate) slice: Duration,
    pub(crate) corpus: Corpus,
    /// For counting system calls.
    pub(crate) traced_commits: u64,
    /// For counting them across rolls.
    pub(crate) traced_across_rolls: u64,
}

const CORPUS: Corpus = Corpus { events: 100_000, batch: 100, payload_bytes: 256, streams: 100 };
const SMOKE_CORPUS: Corpus = Corpus { events: 1_000, batch: 100, payload_bytes: 256, streams: 5 };

impl Settings {
    fn new(run: &Run) -> Outcome<Self> {
        if run.smoke {
            let (warm, slice) = (Duration::from_millis(5), Duration::from_millis(15));
            let (rounds, traced_commits, traced_across_rolls) = (1, 5, 300);
            return Ok(Self {
                smoke: true,
                quick: false,
                rounds,
                warm,
                slice,
                corpus: SMOKE_CORPUS,
                traced_commits,
                traced_across_rolls,
            });
        }
        let (rounds, seconds) = if run.quick { (2, 0.1) } else { (run.rounds, run.seconds) };
        let slice = Duration::try_from_secs_f64(seconds)?;
        if rounds == 0 || slice.is_zero() {
            return Err("at least one round, of some time".into());
        }
        let warm = slice / 4;
        Ok(Self {
            smoke: false,
            quick: run.quick,
            rounds,
            warm,
            slice,
            corpus: CORPUS,
            traced_commits: 50,
            traced_across_rolls: 2_000,
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.worker {
        Some(Inner::Worker { peer, dir, task }) => work(&peer, &dir, &task),
        None => compare(&cli.run),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peers: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(peer: &str, dir: &Path, task: &str) -> Outcome<()> {
    let peer = engines::PEERS.iter().find(|it| it.name == peer).ok_or("no such peer")?;
    worker::run(peer, dir, serde_json::from_str(task)?)
}

fn compare(run: &Run) -> Outcome<()> {
    if run.list {
        for peer in engines::PEERS {
            println!("{:<16} {}", peer.name, peer.version().unwrap_or("-"));
        }
        return Ok(());
    }
    let out = out_dir(run);
    if run.redraw {
        let data = report::redraw(&out)?;
        return if whole(run) { report::show(&data) } else { Ok(()) };
    }
    let peers = chosen(&run.only)?;
    let settings = Settings::new(run)?;
    let scratch = scratch()?;
    let machine = shared::machine::Machine::look(scratch.path());
    eprintln!("{machine}");
    let minutes = runner::expected(peers.len(), &settings) / 60.0;
    eprintln!("{} peers, {} rounds: about {minutes:.1} minutes", peers.len(), settings.rounds);
    let results = runner::run(&peers, scratch.path(), &settings)?;
    let data = report::Data::new(machine, settings, &peers, results);
    if run.json {
        println!("{}", serde_json::to_string_pretty(&data)?);
    }
    report::write(&out, &data)?;
    if whole(run) {
        report::show(&data)?;
    }
    eprintln!("data, tables and plots: {}", out.display());
    Ok(())
}

/// Whether it is a run that can be shown.
fn whole(run: &Run) -> bool {
    !run.smoke && !run.quick && run.only.is_empty() && run.out.is_none()
}

fn out_dir(run: &Run) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    match &run.out {
        Some(out) => out.clone(),
        None if whole(run) => root.join("../../docs/benchmarks"),
        None => root.join("target/benchmarks"),
    }
}

fn chosen(only: &[String]) -> Outcome<Vec<&'static Peer>> {
    let peers = engines::PEERS;
    if let Some(unknown) = only.iter().find(|name| peers.iter().all(|peer| peer.name != **name)) {
        return Err(format!("there is no {unknown}; see --list").into());
    }
    let wanted = |peer: &&Peer| {
        only.is_empty() || peer.kind != Kind::Peer || only.iter().any(|name| name == peer.name)
    };
    Ok(peers.iter().filter(wanted).collect())
}

/// On the file system that is to be measured: HEADWATER_BENCH_DIR, or the target folder.
fn scratch() -> Outcome<tempfile::TempDir> {
    let parent = match std::env::var_os("HEADWATER_BENCH_DIR") {
        Some(chosen) => PathBuf::from(chosen),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tmp"),
    };
    std::fs::create_dir_all(&parent)?;
    Ok(tempfile::Builder::new().prefix("peers-").tempdir_in(parent.canonicalize()?)?)
}
