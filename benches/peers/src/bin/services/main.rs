//! What happens between services: `./run bench --shipping` and `./run bench --two-phase`.
//!
//! ```text
//!  shipping   ── catch-up │ commit to a view elsewhere │ thousands of subscribers │ kills ── beside the bare machine
//!             └─ the same row by PostgreSQL's logical replication
//!  two-phase  ── an order in two PostgreSQL databases at once │ in one journal that the other service follows
//! ```
//! What is compared takes turns within a round. Whoever must be killed, or be measured alone, is a process of its
//! own: this program again, with a hidden verb.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser};

#[allow(dead_code, reason = "the other programs use the rest")]
#[path = "../../../../shared/mod.rs"]
mod shared;

#[allow(dead_code, reason = "the other program uses the rest")]
#[path = "../../../../paths/baseline.rs"]
mod baseline;
#[allow(dead_code, reason = "the other program uses the rest")]
#[path = "../../../../paths/meter.rs"]
mod meter;
#[path = "../../../../paths/wire.rs"]
mod wire;

#[path = "../../../../../examples/shop/events.rs"]
mod events;
#[allow(dead_code, reason = "the demo uses the rest")]
#[path = "../../../../../examples/shop/views.rs"]
mod views;

mod child;
mod cluster;
mod figure;
mod shipping;
mod timing;
mod two_phase;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Debug, Parser)]
enum Cli {
    /// Shipping beside the bare machine, and beside PostgreSQL's logical replication.
    Shipping(shipping::Choice),
    /// An order that two services must know of: two-phase commit beside replication.
    TwoPhase(Settings),
    #[command(hide = true)]
    Origin { dir: PathBuf, address: String, tls: Option<PathBuf> },
    #[command(hide = true)]
    Relays { dir: PathBuf, origin: String, count: usize },
    #[command(hide = true)]
    Bare(shipping::bare::Task),
    #[command(hide = true)]
    BareRelays { dir: PathBuf, origin: String, count: usize, message_bytes: usize },
    #[command(hide = true)]
    Coordinator(two_phase::coordinator::Task),
    #[command(hide = true)]
    Placing { dir: PathBuf, address: String, orders_per_second: u32 },
    #[command(hide = true)]
    Customers { dir: PathBuf, orders: String },
}

#[derive(Debug, Args)]
struct Settings {
    /// Less of everything, in less than half a minute; not to be quoted, and written to the target folder.
    #[arg(long)]
    quick: bool,
    /// Where data, tables and plots go, instead of docs.
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Settings {
    /// The folder for pages and data: that of the documentation, or as it was asked for.
    fn out(&self, folder: &str) -> Outcome<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let default = match self.quick {
            true => root.join("target/quick"),
            false => root.join("../../docs"),
        };
        let out = self.out.clone().unwrap_or(default).join(folder);
        fs::create_dir_all(&out)?;
        Ok(out)
    }
}

/// A folder on the disk that is measured; it goes when it is dropped.
fn scratch() -> Outcome<tempfile::TempDir> {
    let parent = std::env::var_os("HEADWATER_BENCH_DIR").map(PathBuf::from);
    let parent = parent.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"));
    fs::create_dir_all(&parent)?;
    Ok(tempfile::Builder::new().prefix("services-").tempdir_in(parent)?)
}

fn main() -> ExitCode {
    let outcome = match Cli::parse() {
        Cli::Shipping(choice) => shipping::run(&choice),
        Cli::TwoPhase(settings) => two_phase::run(&settings),
        Cli::Origin { dir, address, tls } => {
            shipping::origin::serve(&dir, &address, tls.as_deref())
        }
        Cli::Relays { dir, origin, count } => shipping::relays::serve(&dir, &origin, count),
        Cli::Bare(task) => shipping::bare::serve(&task),
        Cli::BareRelays { dir, origin, count, message_bytes } => {
            shipping::bare::relay(&dir, &origin, count, message_bytes)
        }
        Cli::Coordinator(task) => two_phase::coordinator::run(&task),
        Cli::Placing { dir, address, orders_per_second } => {
            two_phase::away::place_until_killed(&dir, &address, orders_per_second)
        }
        Cli::Customers { dir, orders } => two_phase::customers::run(&dir, &orders),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("services: {error}");
            ExitCode::FAILURE
        }
    }
}
