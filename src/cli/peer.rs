//! `headwater peer`: what is known of mirrors at rest, and how a journal and one that is served relate.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::failure::Failure;
use super::link::LinkArgs;
use super::{Target, lag, target};
use crate::fs::{Fs, os::OsFs};
use crate::journal::orphans::orphans_in;
use crate::shipping::{ShippingError, Standing, ask};
use crate::{Checkpoint, Journal, Orphans, Position};

/// What `peer` is told.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    list: Option<List>,
    /// A store, its journal, or a mirror
    #[arg(required = true)]
    dir: Option<PathBuf>,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
    /// Asks who serves the journal here, or a mirror of it, how both relate
    #[arg(value_name = "HOST:PORT")]
    address: Option<String>,
    #[command(flatten)]
    link: LinkArgs,
}

#[derive(Debug, clap::Subcommand)]
enum List {
    /// Lists who follows the journal, and whom the store's mirrors follow
    Ls(Target),
}

/// A mirror at rest.
struct Mirror {
    name: Option<String>,
    dir: PathBuf,
    state: Result<Checkpoint, Failure>,
    orphans: Vec<Orphans>,
}

impl Mirror {
    fn of(name: Option<String>, dir: &Path) -> Self {
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let dir = target::journal_dir(dir);
        let state = target::open(&dir).and_then(|(journal, damage)| match damage {
            None => Ok(journal.end()),
            Some(damage) => Err(Failure::Damaged(damage)),
        });
        let orphans = orphans_in(&fs, &dir);
        Self { name, dir, state, orphans }
    }

    fn to_json(&self) -> Value {
        let orphaned: Vec<_> = self.orphans.iter().map(target::orphan).collect();
        let end = self.state.as_ref().ok();
        json!({
            "name": self.name,
            "path": self.dir.display().to_string(),
            "journal": end.map(|end| end.journal.to_string()),
            "end_position": end.map(|end| end.position.get()),
            "orphaned": orphaned,
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let name = self.name.as_deref().unwrap_or("journal");
        match &self.state {
            Ok(end) => writeln!(out, "{name}: {} up to position {}", end.journal, end.position)?,
            Err(_) => {
                writeln!(
                    out,
                    "{name}: can't be read; run headwater verify {}",
                    self.dir.display()
                )?;
            }
        }
        for it in &self.orphans {
            let dir = it.dir.display();
            match it.end.map(|end| end.position) {
                Some(end) => writeln!(
                    out,
                    "  set aside: {} events from position {} on, in {dir}",
                    end.since(it.from),
                    it.from
                )?,
                None => writeln!(out, "  set aside: from position {} on, in {dir}", it.from)?,
            }
        }
        Ok(())
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if let Some(List::Ls(target)) = &args.list {
        return lag::list(&target.dir, target.json);
    }
    let Some(dir) = &args.dir else { return Ok(()) }; // the parser asks for it
    let (journal, damage) = target::open(dir)?;
    if let Some(damage) = damage {
        return Err(Failure::Damaged(damage));
    }
    let mut known = vec![Mirror::of(None, dir)];
    let mirrors = target::mirrors(dir).into_iter();
    known.extend(mirrors.map(|(name, dir)| Mirror::of(Some(name), &dir)));
    let options = args.link.options();
    let ask = |address: &String| {
        let asked = ask(address, &journal, journal.end(), &options);
        asked.map(|standing| Peer { address: address.clone(), journal: &journal, standing })
    };
    let peer = args.address.as_ref().map(ask).transpose().map_err(Failure::Shipping)?;
    let mut out = io::stdout().lock();
    if args.json {
        let known: Vec<_> = known.iter().map(Mirror::to_json).collect();
        let value = json!({ "journals": known, "peer": peer.as_ref().map(Peer::to_json) });
        writeln!(out, "{value}")?;
    } else {
        known.iter().try_for_each(|mirror| mirror.print(&mut out))?;
        peer.iter().try_for_each(|peer| peer.print(&mut out))?;
    }
    out.flush()?;
    let parted = peer.is_some_and(|peer| matches!(peer.standing, Standing::Parted(_)));
    if parted { Err(Failure::Reported) } else { Ok(()) }
}

/// Who answered, and what.
struct Peer<'a> {
    address: String,
    journal: &'a Journal,
    standing: Standing,
}

impl Peer<'_> {
    /// In a word, where the peer ends if that is known, and how many events lie between both ends.
    fn summary(&self) -> (&'static str, Option<u64>, Option<u64>) {
        let ours = self.journal.end().position;
        match &self.standing {
            Standing::Holds(end) if end.position == ours => ("equal", Some(ours.get()), Some(0)),
            Standing::Holds(end) => {
                ("behind", Some(end.position.get()), Some(end.position.since(ours)))
            }
            Standing::Behind(end) => ("ahead", Some(end.get()), Some(ours.since(*end))),
            Standing::Parted(ShippingError::Ahead(at)) => {
                ("lost", Some(at.origin.position.get()), None)
            }
            Standing::Parted(ShippingError::Fork(at)) => {
                ("forked", Some(at.origin.position.get()), None)
            }
            Standing::Parted(_) => ("foreign", None, None),
        }
    }

    fn to_json(&self) -> Value {
        let (standing, end, events) = self.summary();
        let at = match &self.standing {
            Standing::Parted(ShippingError::Ahead(at) | ShippingError::Fork(at)) => Some(at),
            _ => None,
        };
        let orphaned = at.and_then(|at| at.orphaned());
        json!({
            "address": self.address,
            "standing": standing,
            "end_position": end,
            "events_between": events,
            "common_position": at.and_then(|at| at.common).map(Position::get),
            "orphaned_events": orphaned.as_ref().map(|it| it.end.since(it.start)),
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let (standing, end, events) = self.summary();
        let (address, end) = (&self.address, end.unwrap_or_default());
        let events = events.unwrap_or_default();
        match &self.standing {
            Standing::Holds(_) if standing == "equal" => {
                writeln!(out, "equal: {address} ends at position {end}, too")
            }
            Standing::Holds(_) => writeln!(
                out,
                "behind: {address} goes on to position {end}, which are {events} events more\n  next: a mirror that is followed fetches them; an origin takes them back with headwater recover"
            ),
            Standing::Behind(_) => writeln!(
                out,
                "ahead: {address} has a mirror that ends at position {end}, and has the other {events} events still to get"
            ),
            Standing::Parted(error) => {
                writeln!(out, "{standing}: {error}\n  next: {}", error.hint())
            }
        }
    }
}
