//! `headwater recover`: takes back from mirrors what an origin has lost, before anything is appended to it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;

use super::failure::Failure;
use super::link::LinkArgs;
use super::target;
use crate::JournalOptions;
use crate::fs::{Fs, os::OsFs};
use crate::shipping::{PeersCheck, abandon_recovery, recover};

/// What `recover` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A store, or its journal
    dir: PathBuf,
    /// The address of a mirror of it; all of them are asked, and must answer
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "abandon")]
    from: Vec<String>,
    /// Only asks, and fails if one of them holds more
    #[arg(long)]
    check: bool,
    /// So many answers are enough
    #[arg(long, value_name = "COUNT")]
    require: Option<usize>,
    /// Leaves one of them out: it is gone for good, with whatever it held
    #[arg(long, value_name = "HOST:PORT")]
    give_up: Vec<String>,
    /// Keeps what has arrived of an interrupted recovery, and asks nobody
    #[arg(long, conflicts_with_all = ["from", "check", "require", "give_up"])]
    abandon: bool,
    #[command(flatten)]
    link: LinkArgs,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let dir = target::journal_dir(&args.dir);
    let journal = JournalOptions { background_thread: false, ..JournalOptions::default() };
    let back = if args.abandon {
        abandon_recovery(&fs, &dir, &journal)?;
        None
    } else {
        let check = PeersCheck {
            mirrors: args.from.clone(),
            recover: !args.check,
            required: args.require,
            given_up: args.give_up.clone(),
            options: args.link.options(),
        };
        recover(&fs, &dir, &journal, &check)?
    };
    let (journal, _) = target::open(&args.dir)?;
    let end = journal.end();
    let mut out = io::stdout().lock();
    if args.json {
        let taken = back.as_ref().map(|back| {
            json!({
                "address": back.address,
                "from_position": back.from.position.get(),
                "to_position": back.to.position.get(),
            })
        });
        let value = json!({ "end_position": end.position.get(), "chain": end.chain.to_string(), "taken_back": taken });
        writeln!(out, "{value}")?;
    } else {
        match &back {
            Some(back) => {
                let events = back.to.position.since(back.from.position);
                writeln!(out, "{events} events taken back from {}", back.address)?;
            }
            None if args.abandon => writeln!(out, "what has arrived is kept")?,
            None => writeln!(out, "nothing is missing")?,
        }
        writeln!(out, "the journal ends at position {}", end.position)?;
    }
    Ok(out.flush()?)
}
