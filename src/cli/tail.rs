//! `headwater tail`: the last events, and with `-f` those that follow.

use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{Journal, JournalId, Position};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::failure::Failure;
use super::{Target, events, target};

/// How often `-f` looks for more.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Prints so many of the last events
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 10)]
    lines: u64,
    /// Goes on with what is appended, until it is interrupted or nobody reads its output any more
    #[arg(short, long)]
    follow: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let dir = target::journal_dir(&args.target.dir);
    let mut seen = mark(&dir);
    let began = Instant::now();
    let (journal, corruption) = target::open(&dir)?;
    let mut took = began.elapsed();
    let id = journal.id();
    let first = journal.end().position.get().saturating_sub(args.lines);
    let first = Position::new(first).max(journal.start().position);
    let mut next = print_from(&journal, first, args.target.json)?;
    if let Some(corruption) = corruption {
        return Err(Failure::Damaged(corruption));
    }
    if !args.follow {
        return Ok(());
    }
    drop(journal);
    loop {
        // Opening reads the active segment. On a large one look less often, to stay a light guest.
        wait(POLL.max(4 * took))?;
        let now = mark(&dir);
        if now == seen {
            continue;
        }
        seen = now;
        let began = Instant::now();
        next = follow(&dir, id, next, args.target.json)?;
        took = began.elapsed();
    }
}

/// The bytes of the mark, which change with every commit.
fn mark(dir: &Path) -> Option<Vec<u8>> {
    std::fs::read(dir.join("mark")).ok()
}

/// Prints what has come since `next`.
fn follow(dir: &Path, id: JournalId, next: Position, json: bool) -> Result<Position, Failure> {
    let (journal, corruption) = target::open(dir)?;
    if journal.id() != id {
        return Err(Failure::Replaced);
    }
    // A mirror that has set a damaged tail aside ends earlier for a while, until it has caught up again.
    let next = if journal.end().position > next { print_from(&journal, next, json)? } else { next };
    corruption.map_or(Ok(next), |corruption| Err(Failure::Damaged(corruption)))
}

/// Prints all events from `from` on; returns the position behind the last one.
fn print_from(journal: &Journal, from: Position, json: bool) -> Result<Position, Failure> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut next = from;
    for event in journal.read_all(from)? {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                out.flush()?;
                return Err(error.into());
            }
        };
        events::print(&mut out, &event, json)?;
        next = event.position().advance(1);
    }
    out.flush()?;
    Ok(next)
}

/// Waits, or finds that nobody reads the output any more.
pub(super) fn wait(how_long: Duration) -> Result<(), Failure> {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let timeout = Timespec::try_from(how_long).ok();
    match poll(&mut fds, timeout.as_ref()) {
        Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
        Ok(_) => Err(Failure::PipeClosed),
        Err(error) => Err(Failure::Output(error.into())),
    }
}
