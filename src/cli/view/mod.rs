//! `headwater view`: how views are, what is in them, and building them anew.
//!
//! ```text
//!  ls status get scan parked  ──▶ files as they lie on disk: beside the service; as bytes without the view's code
//!  check                      ──▶ the same, and the rows built again beside them; needs the code
//!  rm export import           ──▶ the view's lock
//!  rebuild rollback retry discard ──▶ the view's lock to the end, the journals' for a moment, and its code
//! ```

mod base;
mod failure;
mod find;
mod journals;
mod keys;
mod look;
mod mounted;
mod progress;
mod prove;
mod read;
mod write;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

pub(super) use self::failure::ViewFailure;
pub(super) use self::mounted::Views;
use super::Target;
use super::failure::Failure;
use crate::JournalId;
use crate::view::PageToken;

/// The verbs that look after views, for the parser of a service: make it a sub-command, and hand it to
/// [`Cli::execute`](super::Cli::execute).
#[derive(Debug, clap::Args)]
pub struct ViewArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Lists the views of a store and of its mirrors, each generation on a line
    Ls(Target),
    /// Tells how far a view is, what is parked and what it takes on disk
    Status(StatusArgs),
    /// Prints the row under a key
    Get(GetArgs),
    /// Prints rows in the order of their keys, or of the keys of an index
    Scan(ScanArgs),
    /// Prints which keys are parked because an event can't be applied, and which events
    Parked(ParkedArgs),
    /// Proves that the rows are what the journal makes, beside the service: builds them again and compares
    Check(CheckArgs),
    /// Builds the rows anew from the journal; the generation takes over, the old one is kept
    Rebuild(RebuildArgs),
    /// Goes back to the generation that was live before
    Rollback(Which),
    /// Folds what is parked with a key, until an event fails again
    Retry(KeyArgs),
    /// Decides that a parked event is never applied, now and when the view is built anew
    Discard(DiscardArgs),
    /// Exports the rows, while no service has the view open, for a subscriber that begins with them
    Export(ExportArgs),
    /// Lets a view begin with rows that were exported elsewhere
    Import(ImportArgs),
    /// Deletes a generation that isn't live any more, or all of a version that nobody opens any more
    Rm(RmArgs),
}

/// Which view.
#[derive(Debug, clap::Args)]
struct Which {
    #[command(flatten)]
    target: Target,
    /// The view's name
    name: String,
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    target: Target,
    /// The view's name; without it, all views
    name: Option<String>,
}

#[derive(Debug, clap::Args)]
struct GetArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    generation: OfGeneration,
    /// Of this table, if the view has several
    #[arg(long, value_name = "NAME")]
    table: Option<String>,
    /// The key; of several fields, one after the other or as a list in JSON. Without the view's code: text, 0x and bytes
    /// in hexadecimal, or TYPE:VALUE such as u32:17
    #[arg(allow_negative_numbers = true)]
    key: Vec<String>,
}

/// One of several generations.
#[derive(Debug, clap::Args)]
struct OfGeneration {
    /// Reads this generation, or the live one of this version [default: the live one]
    #[arg(long, value_name = "VERSION[.NUMBER]")]
    generation: Option<GenerationName>,
}

#[derive(Debug, clap::Args)]
struct ScanArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    generation: OfGeneration,
    /// Of this table, if the view has several
    #[arg(long, value_name = "NAME", conflicts_with = "index")]
    table: Option<String>,
    /// Goes by this index: its keys are meant below, then
    #[arg(long, value_name = "NAME")]
    index: Option<String>,
    /// Only keys that begin with this text, or with the fields in this list
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    prefix: Option<String>,
    /// Begins at this key
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    from: Option<String>,
    /// Ends in front of this key
    #[arg(long, value_name = "KEY", allow_negative_numbers = true)]
    to: Option<String>,
    /// Prints at most so many, and the token for --after if there are more
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
    /// From the end to the beginning
    #[arg(long)]
    reverse: bool,
    /// Goes on where a page has ended
    #[arg(long, value_name = "TOKEN")]
    after: Option<PageToken>,
}

#[derive(Debug, clap::Args)]
struct ParkedArgs {
    #[command(flatten)]
    of: KeyArgs,
    #[command(flatten)]
    generation: OfGeneration,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    generation: OfGeneration,
    #[command(flatten)]
    means: Means,
}

#[derive(Debug, clap::Args)]
struct RebuildArgs {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    means: Means,
    /// Takes over also if the rows are others than before: the fold was mended, but the version not raised
    #[arg(long)]
    accept_difference: bool,
}

/// What building rows may take.
#[derive(Debug, clap::Args)]
struct Means {
    /// Reads at most so much of the journal per second
    #[arg(long, value_name = "N")]
    bytes_per_second_max: Option<u64>,
    /// Threads that read and fold [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Memory for rows that aren't on disk yet [default: 536870912]
    #[arg(long, value_name = "N")]
    memory_bytes_max: Option<usize>,
}

#[derive(Debug, clap::Args)]
struct KeyArgs {
    #[command(flatten)]
    which: Which,
    /// The key; of several fields, one after the other or as a list in JSON
    #[arg(allow_negative_numbers = true)]
    key: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct DiscardArgs {
    #[command(flatten)]
    of: KeyArgs,
    /// The event's position
    #[arg(long)]
    position: u64,
    /// Its journal, if the view is made from several [default: the only one, or the first by its id]
    #[arg(long, value_name = "ID")]
    journal: Option<JournalId>,
    /// An event that couldn't be routed, and so has no key
    #[arg(long, conflicts_with = "key")]
    unrouted: bool,
}

#[derive(Debug, clap::Args)]
struct ExportArgs {
    #[command(flatten)]
    which: Which,
    /// A new directory
    base: PathBuf,
}

#[derive(Debug, clap::Args)]
struct ImportArgs {
    #[command(flatten)]
    which: Which,
    /// The directory into which they were exported, or a copy of it
    base: PathBuf,
    /// Also if the view has rows already; these are kept, for `rollback`
    #[arg(long)]
    replace: bool,
}

#[derive(Debug, clap::Args)]
struct RmArgs {
    #[command(flatten)]
    which: Which,
    /// The generation, or the version with all that it has
    #[arg(value_name = "VERSION[.NUMBER]")]
    generation: GenerationName,
}

/// `1` or `1.2`: version, and perhaps number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GenerationName {
    version: u32,
    number: Option<u32>,
}

impl fmt::Display for GenerationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.version)?;
        self.number.map_or(Ok(()), |number| write!(f, ".{number}"))
    }
}

impl FromStr for GenerationName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u32>().map_err(|error| error.to_string());
        Ok(match text.split_once('.') {
            Some((version, rest)) => {
                Self { version: number(version)?, number: Some(number(rest)?) }
            }
            None => Self { version: number(text)?, number: None },
        })
    }
}

pub(super) fn run(args: &ViewArgs, views: &Views) -> Result<(), Failure> {
    match &args.verb {
        Verb::Ls(target) => look::ls(target, views),
        Verb::Status(args) => look::status(args, views),
        Verb::Get(args) => read::get(args, views),
        Verb::Scan(args) => read::scan(args, views),
        Verb::Parked(args) => read::parked(args, views),
        Verb::Check(args) => prove::check(args, views),
        Verb::Rebuild(args) => write::rebuild(args, views),
        Verb::Rollback(which) => write::rollback(which, views),
        Verb::Retry(args) => write::retry(args, views),
        Verb::Discard(args) => write::discard(args, views),
        Verb::Export(args) => base::export(args, views),
        Verb::Import(args) => base::import(args),
        Verb::Rm(args) => write::rm(args),
    }
}
