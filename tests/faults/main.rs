//! Faults of the real world against the real library on real files.
//!
//! ```text
//!   driver ──starts──▶ child (this program again): opens a store, appends from several threads
//!     │   ◀── pipe: "opened P", "acknowledged W NEXT P", "unknown W", "full W", "refused …"
//!     │
//!     ├── kills    SIGKILL at any moment
//!     ├── calls    strace: SIGKILL, error or lie at the n-th system call
//!     ├── power    file system shutdown on loop-mounted ext4 and XFS: what was not synced is gone
//!     ├── device   EIO from chosen blocks of the device, restart, append, power cut
//!     ├── full     file systems without space or inodes
//!     ├── network  packets lost, late, twice, and partitions (with feature `shipping`: its children ship)
//!     ├── views    SIGKILL in the life of a view (with feature `views`: its child is another one)
//!     ▼
//!   opens the journal again and compares it with what it has read from the pipe
//! ```
//! What was acknowledged is there, in order, once, at the position that was told; what was served after an
//! opening never vanishes; what was not acknowledged is there whole or not at all; nothing healthy is taken
//! for damaged. Each part first catches a planted bug, where that is quick.
//!
//! `./run faults` runs all parts, in about five minutes; `./run faults --soak` in an hour and a half: the sum of what the
//! parts may take ([`Plan::budget`]), and `chaos`. Without either (as in `cargo test`) there is a smoke test of the first
//! part. Arguments choose parts by name.
//!
//! Mounts live in a mount namespace of this process, loop devices detach with their last mount, children
//! end with their standard input: however this program ends, nothing is left behind but files.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests: a failure is a panic, and what was tried is printed"
)]

use std::os::unix::process::CommandExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

mod calls;
mod child;
mod device;
mod driver;
mod full;
mod kills;
mod mounts;
#[cfg(feature = "shipping")]
mod network;
mod power;
#[cfg(feature = "shipping")]
#[path = "../chaos/processes.rs"]
mod processes;
#[cfg(feature = "views")]
mod views;

/// `ci` or `soak`; set by `./run faults`.
const MODE: &str = "HEADWATER_FAULTS";
/// Repeats the choices of a run; what the machine makes of them differs.
const SEED: &str = "HEADWATER_SEED";
/// Set once this process has a mount namespace of its own; otherwise why it hasn't.
const NAMESPACE: &str = "HEADWATER_FAULTS_NAMESPACE";

/// Why a part has ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The machine doesn't allow it.
    Skipped(String),
    /// A promise was broken.
    Violated(String),
}

/// What a part has reached, or why it hasn't.
pub(crate) type Reached = Result<String, Stop>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Smoke,
    Ci,
    Soak,
}

/// What every part is told.
#[derive(Debug)]
pub(crate) struct Plan {
    mode: Mode,
    seed: u64,
    /// A directory of this run, on a real disk; removed at the end.
    scratch: PathBuf,
    mounts: Result<(), String>,
}

impl Plan {
    /// Rounds are done until there are `rounds` of them or `seconds` have passed; a soak does twenty times
    /// as many of both.
    pub(crate) fn budget(&self, rounds: usize, seconds: u64) -> Budget {
        let (rounds, seconds) = match self.mode {
            Mode::Smoke => (10.min(rounds), seconds),
            Mode::Ci => (rounds, seconds),
            Mode::Soak => (20 * rounds, 20 * seconds),
        };
        Budget { rounds, until: Instant::now() + Duration::from_secs(seconds) }
    }

    pub(crate) fn rng(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed)
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let dir = self.scratch.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Skips what needs mounts where there can't be any.
    pub(crate) fn need_mounts(&self) -> Result<(), Stop> {
        self.mounts.clone().map_err(Stop::Skipped)
    }
}

/// Bounds a loop.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) rounds: usize,
    until: Instant,
}

impl Budget {
    pub(crate) fn allows(&self, done: usize) -> bool {
        done < self.rounds && Instant::now() < self.until
    }
}

type Part = (&'static str, fn(&Plan) -> Reached);

const PARTS: &[Part] = &[
    ("kills: catches a lie", kills::catches_a_lie),
    ("kills", kills::run),
    ("calls: catches a lie", calls::catches_a_lie),
    ("calls", calls::run),
    ("power: catches acknowledgements before the sync", power::catches_early_acknowledgements),
    ("power ext4", |plan| power::run(plan, mounts::Kind::Ext4)),
    ("power xfs", |plan| power::run(plan, mounts::Kind::Xfs)),
    ("device: catches trust in the page cache", device::catches_trust_in_the_page_cache),
    ("device ext4", |plan| device::run(plan, mounts::Kind::Ext4)),
    ("device xfs", |plan| device::run(plan, mounts::Kind::Xfs)),
    ("full tmpfs", full::tmpfs),
    ("full ext4", full::ext4),
    #[cfg(feature = "shipping")]
    ("network", network::run),
    #[cfg(feature = "views")]
    ("views: catches a checkpoint apart from its rows", views::catches_a_checkpoint_apart),
    #[cfg(feature = "views")]
    ("views generations", views::generations),
    #[cfg(feature = "views")]
    ("views poison", views::poison),
];

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "child") {
        child::run(&args.split_off(1));
    }
    #[cfg(feature = "shipping")]
    if args.first().is_some_and(|arg| arg == processes::CHILD) {
        processes::run(&args.split_off(1));
    }
    #[cfg(feature = "views")]
    if args.first().is_some_and(|arg| arg == "view-child") {
        views::child(&args.split_off(1));
    }
    if args.iter().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    // Flags are the standard test harness's; names are of other tests too.
    args.retain(|arg| !arg.starts_with('-'));
    let mode = match std::env::var(MODE).as_deref() {
        Ok("soak") => Mode::Soak,
        Ok("ci") => Mode::Ci,
        _ => Mode::Smoke,
    };
    let chosen: Vec<Part> = PARTS
        .iter()
        .copied()
        .filter(|(name, _)| mode != Mode::Smoke || name.starts_with("kills"))
        .filter(|(name, _)| args.is_empty() || args.iter().any(|arg| name.contains(arg.as_str())))
        .collect();
    if chosen.is_empty() {
        return ExitCode::SUCCESS;
    }
    if mode != Mode::Smoke {
        enter_namespace();
    }
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    run(&chosen, mode, seed.unwrap_or_else(|| fastrand::u64(..)))
}

fn run(parts: &[Part], mode: Mode, seed: u64) -> ExitCode {
    let scratch = tempfile::Builder::new().prefix("faults-").tempdir_in(target_dir()).unwrap();
    let mounts = mounts::available(scratch.path(), std::env::var(NAMESPACE).ok().as_deref());
    println!("faults: {SEED}={seed}, in {}", scratch.path().display());
    let plan = Plan { mode, seed, scratch: scratch.path().to_owned(), mounts };
    let (mut violated, mut skipped) = (0, 0);
    for (name, part) in parts {
        let began = Instant::now();
        let reached = std::panic::catch_unwind(AssertUnwindSafe(|| part(&plan)))
            .unwrap_or_else(|_| Err(Stop::Violated("panicked, see above".into())));
        let took = began.elapsed().as_secs_f64();
        match reached {
            Ok(what) => println!("  {name}: {what} ({took:.1} s)"),
            Err(Stop::Skipped(why)) => {
                skipped += 1;
                println!("  {name}: SKIPPED, {why}");
            }
            Err(Stop::Violated(what)) => {
                violated += 1;
                println!("  {name}: VIOLATED after {took:.1} s: {what}");
            }
        }
    }
    println!("faults: {} parts, {violated} violated, {skipped} skipped", parts.len());
    if violated > 0 {
        println!("faults: traces are kept in {}", scratch.keep().display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Where cargo lets tests write: on the disk that the project is on, never a tmpfs by accident.
pub(crate) fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Starts this program again in a mount namespace of its own, if that is allowed. Returns otherwise.
fn enter_namespace() {
    if std::env::var_os(NAMESPACE).is_some() {
        return;
    }
    let allowed = Command::new("unshare").args(["--mount", "true"]).output();
    let why = match allowed {
        Ok(tried) if tried.status.success() => {
            let error = Command::new("unshare")
                .args(["--mount", "--propagation", "private", "--"])
                .arg(std::env::current_exe().unwrap())
                .args(std::env::args_os().skip(1))
                .env(NAMESPACE, "own")
                .exec();
            error.to_string()
        }
        Ok(tried) => String::from_utf8_lossy(&tried.stderr).trim().to_owned(),
        Err(error) => format!("unshare: {error}"),
    };
    println!("no mount namespace: {why}");
}
