//! The command line: reads journals, copies them, and mends damaged ones. Described in `docs/cli.md`.

mod backup;
mod cat;
mod doctor;
mod events;
mod failure;
mod repair;
mod retain;
mod schema;
mod stat;
mod tail;
mod target;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

/// Reads the event journals of Headwater, beside the service that writes, and copies them. Nothing but
/// `repair --apply` and `retain --apply` changes any.
#[derive(Debug, Parser)]
#[command(
    name = "headwater",
    version,
    after_help = "Exit codes: 0 fine, 1 failed, 2 wrong usage, 3 damage found.\n\
                  DIR is a store, its journal, or a mirror (STORE/mirrors/NAME)."
)]
struct Cli {
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
    /// Compares the kinds of events in a journal with recorded samples
    Schema(schema::Args),
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

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Stat(target) => stat::run(&target),
        Command::Cat(args) => cat::run(&args),
        Command::Tail(args) => tail::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Doctor(target) => doctor::run(&target),
        Command::Repair(args) => repair::run(&args),
        Command::Backup(args) => backup::backup(&args),
        Command::Archive(args) => backup::backup(&args),
        Command::Retain(args) => retain::run(&args),
        Command::Restore(args) => backup::restore_or_abandon(&args),
        Command::Schema(args) => schema::run(&args),
    };
    match outcome {
        Ok(()) | Err(Failure::PipeClosed) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            failure.exit_code()
        }
    }
}
