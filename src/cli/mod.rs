//! The command line, as the program `headwater` has it, for a binary of your own.
//!
//! ```text
//!  headwater ──┐                          journals: stat cat tail verify doctor repair …
//!              ├─▶ Cli ─▶ Args ─▶ verb ──┤
//!  a service ──┘    ╰ the code of its views: typed rows and keys, rebuild, check
//! ```
//!
//! What a service stores only its own code can read: a row is bytes to everybody else. So a service mounts the command
//! line, names its views, and all of it works as described in `docs/cli.md`; the program `headwater` is the same without
//! any views.
//!
//! As the whole of a program:
//! ```no_run
//! # mod views {
//! #     use headwater::view::{Fold, FoldError, Keys, View};
//! #     pub struct Spent;
//! #     impl View for Spent {
//! #         const NAME: &'static str = "spent";
//! #         const VERSION: u32 = 1;
//! #         type Key = u32;
//! #         type Row = u64;
//! #         type Event = Vec<u8>;
//! #         fn route(&self, _: &headwater::Recorded<Vec<u8>>, _: &mut Keys<u32>) {}
//! #         fn fold(&self, _: &u32, _: Option<u64>, _: &headwater::Recorded<Vec<u8>>) -> Result<Fold<u64>, FoldError> { Ok(Fold::Keep) }
//! #     }
//! # }
//! # use views::Spent;
//! fn main() -> std::process::ExitCode {
//!     headwater::cli::Cli::new().view(Spent).run()
//! }
//! ```
//!
//! Within the parser of a service that has one, as `service admin view ls DIR`:
//! ```
//! use clap::Parser;
//! use headwater::cli::{self, Cli};
//!
//! #[derive(Parser)]
//! enum Service {
//!     /// Serves orders
//!     Serve { dir: std::path::PathBuf },
//!     /// Looks after the journal and its views
//!     Admin(cli::Args),
//! }
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("orders");
//! # headwater::Store::create(&path)?.close()?;
//! # let path = path.to_str().unwrap();
//! match Service::parse_from(["service", "admin", "stat", path]) {
//!     Service::Serve { .. } => { /* … */ }
//!     Service::Admin(args) => {
//!         let code = Cli::new().execute(args); // for main to return
//! #       assert_eq!(format!("{code:?}"), format!("{:?}", std::process::ExitCode::SUCCESS));
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! A service with another parser, or none, hands over the rest of its arguments: [`Cli::run_from`].
//!
//! Invariants:
//! - What only looks takes no lock and changes nothing; it runs beside the service.
//! - Standard output has the answer and nothing else; errors and progress go to standard error.

mod backup;
#[cfg(feature = "shipping")]
mod bootstrap;
mod cat;
mod doctor;
mod events;
mod failure;
#[cfg(feature = "shipping")]
mod lag;
#[cfg(feature = "shipping")]
mod link;
#[cfg(feature = "shipping")]
mod links;
#[cfg(feature = "shipping")]
mod peer;
#[cfg(feature = "shipping")]
mod recover;
mod repair;
mod retain;
mod schema;
#[cfg(feature = "shipping")]
mod security;
mod stat;
mod tail;
mod target;
#[cfg(feature = "shipping")]
mod topology;
mod verify;
#[cfg(feature = "views")]
mod view;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use self::failure::Failure;
#[cfg(feature = "views")]
pub use self::view::ViewArgs;
use crate::event::Event;
#[cfg(feature = "views")]
use crate::view::{Code, TableView, View, ViewOptions};

const ABOUT: &str = "Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 damage found.\n\
                     DIR is a store, its journal, or a mirror (STORE/mirrors/NAME).";

/// Reads the event journals of Headwater, beside the service that writes, copies them, and looks after views.
#[derive(Debug, Parser)]
#[command(name = "headwater", version, after_help = ABOUT)]
struct Program {
    #[command(flatten)]
    args: Args,
}

/// All verbs, for the parser of a service: flatten it, or make it a sub-command, and hand it to [`Cli::execute`].
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows what a journal is, how far it reaches and its segments
    Stat(Target),
    /// Prints events, in order
    Cat(cat::Args),
    /// Prints the last events, and with -f those that follow
    Tail(tail::Args),
    /// Reads every byte and reports every damage
    Verify(verify::Args),
    /// Looks at a store and the machine below it, and says what to do
    Doctor(Target),
    /// Tells what can be done about damage, and does it with --apply
    Repair(repair::Args),
    /// Copies a journal, also one in use, into a directory; later only what is new
    Backup(backup::BackupArgs),
    /// The same into an archive, which keeps what `retain` removes from the journal
    Archive(backup::BackupArgs),
    /// Tells which of the oldest events could be removed, and removes them with --apply
    Retain(retain::Args),
    /// Makes a store of a backup
    Restore(backup::RestoreArgs),
    /// Makes a mirror of a backup, or of the base of a view, before its service follows
    #[cfg(feature = "shipping")]
    Bootstrap(bootstrap::Args),
    /// Shows what is known of mirrors, and how a journal and one that is served relate
    #[cfg(feature = "shipping")]
    Peer(peer::Args),
    /// Shows how far mirrors are behind, of the journal and of those that the store mirrors
    #[cfg(feature = "shipping")]
    Lag(lag::Args),
    /// Shows from where and to where journals are shipped
    #[cfg(feature = "shipping")]
    Topology(topology::Args),
    /// Takes back from mirrors what an origin has lost
    #[cfg(feature = "shipping")]
    Recover(recover::Args),
    /// Compares the kinds of events in a journal, and the code of a service, with recorded samples
    Schema(schema::Args),
    /// Makes a token, by which a mirror is let in
    #[cfg(feature = "shipping")]
    Token(security::TokenArgs),
    /// Prints the pin of the key of a certificate
    #[cfg(feature = "shipping")]
    Pin(security::FileArgs),
    /// Reads an access list, and tells who may have what
    #[cfg(feature = "shipping")]
    Access(security::FileArgs),
    /// Looks at views, reads their rows, rebuilds and checks them
    #[cfg(feature = "views")]
    View(ViewArgs),
}

#[cfg(feature = "views")]
impl From<ViewArgs> for Args {
    fn from(args: ViewArgs) -> Self {
        Self { command: Command::View(args) }
    }
}

/// What every command is told.
#[derive(Debug, clap::Args)]
struct Target {
    /// A store, its journal, or a mirror
    dir: PathBuf,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

/// The command line, with the views and event types whose code is at hand.
#[derive(Debug, Default)]
#[must_use = "it does nothing until it is run"]
pub struct Cli {
    types: schema::EventTypes,
    #[cfg(feature = "views")]
    views: view::Views,
}

impl Cli {
    /// Without any code of a service: rows of views are printed as bytes and can't be built anew, and whether events can be
    /// decoded nobody knows.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the code of this view, too: its keys and rows are printed and understood as what they are, in JSON
    /// ([`ViewKey`](crate::view::ViewKey) says how keys are written), and it can be built anew and checked.
    ///
    /// Several versions of one view may be named.
    #[cfg(feature = "views")]
    pub fn view<V: View>(self, view: V) -> Self {
        self.view_with(view, ViewOptions::default())
    }

    /// The same with the options that the service opens it with.
    #[cfg(feature = "views")]
    pub fn view_with<V: View>(mut self, view: V, options: ViewOptions) -> Self {
        self.views.0.push(Code::of(view, options));
        self
    }

    /// With the code of this view of several tables, too, as [`view`](Self::view).
    #[cfg(feature = "views")]
    pub fn table_view<T: TableView>(self, view: T) -> Self {
        self.table_view_with(view, ViewOptions::default())
    }

    /// The same with the options that the service opens it with.
    #[cfg(feature = "views")]
    pub fn table_view_with<T: TableView>(mut self, view: T, options: ViewOptions) -> Self {
        self.views.0.push(Code::of_tables(view, options));
        self
    }

    /// With the code of this event type, too: `schema check SCHEMA` then also proves what
    /// [`schema::check`](crate::schema::check) does, with these values, over the samples in `SCHEMA/dir`, and `schema
    /// check SCHEMA DIR` decodes every event of the journal, through upcasters. An empty `dir` is SCHEMA itself.
    ///
    /// Name all event types of the service: each passes over the events of the others. What none of them knows is shown as
    /// not read.
    ///
    /// ```
    /// use headwater::cli::Cli;
    /// use headwater::schema;
    ///
    /// headwater::events! { enum OrderEvent { Placed(u64) = "order.placed", version 1; } }
    ///
    /// fn samples() -> Vec<OrderEvent> {
    ///     vec![OrderEvent::Placed(1250)]
    /// }
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let schema = dir.path();
    /// schema::record(schema.join("orders"), &samples())?; // once; the files belong to the repository
    /// let cli = Cli::new().events("orders", samples());
    /// let code = cli.run_from(["service", "schema", "check", schema.to_str().unwrap()]);
    /// # assert_eq!(format!("{code:?}"), format!("{:?}", std::process::ExitCode::SUCCESS));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn events<E: Event + Send + Sync + 'static>(
        mut self,
        dir: impl Into<PathBuf>,
        values: impl IntoIterator<Item = E>,
    ) -> Self {
        self.types.add(dir.into(), values.into_iter().collect());
        self
    }

    /// Does what the arguments of this process say, and prints it; wrong usage ends the process. For `main` to return.
    ///
    /// Blocks until it is done.
    #[must_use = "it is what the process is to exit with"]
    pub fn run(&self) -> ExitCode {
        self.execute(Program::parse().args)
    }

    /// The same with these arguments, of which the first is how the command line was called, for messages: `service admin`.
    #[must_use = "it is what the process is to exit with"]
    pub fn run_from<I>(&self, args: I) -> ExitCode
    where
        I: IntoIterator<Item: Into<OsString> + Clone>,
    {
        let mut args = args.into_iter().map(Into::into);
        let called: OsString = args.next().unwrap_or_default();
        let command = Program::command().bin_name(called.to_string_lossy().into_owned());
        let matches = command.no_binary_name(true).try_get_matches_from(args);
        match matches.and_then(|matches| Program::from_arg_matches(&matches)) {
            Ok(program) => self.execute(program.args),
            Err(error) => error.exit(),
        }
    }

    /// The same with arguments that a parser has understood: [`Args`], or
    #[cfg_attr(feature = "views", doc = "[`ViewArgs`] alone.")]
    #[cfg_attr(not(feature = "views"), doc = "`ViewArgs` (feature `views`) alone.")]
    #[must_use = "it is what the process is to exit with"]
    pub fn execute(&self, args: impl Into<Args>) -> ExitCode {
        match self.outcome(&args.into()) {
            Ok(()) | Err(Failure::PipeClosed) => ExitCode::SUCCESS,
            Err(failure) => {
                failure.report();
                failure.exit_code()
            }
        }
    }

    fn outcome(&self, args: &Args) -> Result<(), Failure> {
        match &args.command {
            Command::Stat(target) => stat::run(target),
            Command::Cat(args) => cat::run(args),
            Command::Tail(args) => tail::run(args),
            Command::Verify(args) => verify::run(args),
            Command::Doctor(target) => doctor::run(target),
            Command::Repair(args) => repair::run(args),
            Command::Backup(args) | Command::Archive(args) => backup::backup(args),
            Command::Retain(args) => retain::run(args),
            Command::Restore(args) => backup::restore_or_abandon(args),
            #[cfg(feature = "shipping")]
            Command::Bootstrap(args) => bootstrap::run(args),
            #[cfg(feature = "shipping")]
            Command::Peer(args) => peer::run(args),
            #[cfg(feature = "shipping")]
            Command::Lag(args) => lag::run(args),
            #[cfg(feature = "shipping")]
            Command::Topology(args) => topology::run(args),
            #[cfg(feature = "shipping")]
            Command::Recover(args) => recover::run(args),
            Command::Schema(args) => schema::run(args, &self.types),
            #[cfg(feature = "shipping")]
            Command::Token(args) => security::token(args),
            #[cfg(feature = "shipping")]
            Command::Pin(args) => security::pin(args),
            #[cfg(feature = "shipping")]
            Command::Access(args) => security::access(args),
            #[cfg(feature = "views")]
            Command::View(args) => view::run(args, &self.views),
        }
    }
}
