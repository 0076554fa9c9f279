//! `headwater view ls` and `headwater view status`: how views are.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::StatusArgs;
use super::find::{self, Located, Place};
use super::mounted::Views;
use crate::cli::failure::Failure;
use crate::cli::stat::{plain, right};
use crate::cli::{Target, target};
use crate::fs::os::lock_holder;
use crate::journal::Comparison;
use crate::view::at_rest::{AtRest, compare_at_rest};
use crate::view::{Generation, ParkedCounts, ViewError, version_lock};
use crate::{Checkpoint, Journal};

pub(super) fn ls(args: &Target, views: &Views) -> Result<(), Failure> {
    show(args, None, views, print_list)
}

pub(super) fn status(args: &StatusArgs, views: &Views) -> Result<(), Failure> {
    show(&args.target, args.name.as_deref(), views, print_each)
}

fn show(
    args: &Target,
    name: Option<&str>,
    views: &Views,
    print: fn(&mut dyn Write, &[Status]) -> io::Result<()>,
) -> Result<(), Failure> {
    let named = name.map(|name| find::view(&args.dir, name)).transpose()?;
    let places = match &named {
        Some(located) => vec![located.place.clone()],
        None => find::places(&args.dir),
    };
    let is_meant = |it: &str| name.is_none_or(|name| it == name);
    let mut all = Vec::new();
    // The views first: what they have applied is in the journals that are looked at afterwards.
    for place in &places {
        for found in find::views_of(place) {
            match found {
                Ok(located) if is_meant(&located.name) => all.extend(of_view(&located, views)),
                Err((name, error)) if is_meant(&name) => {
                    all.push(unreadable(place, &name, error));
                }
                _ => {}
            }
        }
    }
    let (mut journals, mut damage) = (Vec::new(), None);
    for place in find::places(&args.dir) {
        match target::open(&place.journal) {
            Ok((journal, corruption)) => {
                damage = damage.or(corruption);
                journals.push((place.label, journal));
            }
            // That of a mirror may not be there yet.
            Err(error) if place.label == "own" => return Err(error),
            Err(_) => {}
        }
    }
    all.iter_mut().for_each(|status| status.judge(&journals));
    let mut out = io::stdout().lock();
    if args.json {
        let views: Vec<Value> = all.iter().map(to_json).collect();
        writeln!(out, "{}", json!({ "views": views }))?;
    } else {
        print(&mut out, &all)?;
    }
    out.flush()?;
    if let Some(corruption) = damage {
        return Err(Failure::Damaged(corruption));
    }
    // What is damaged hides nothing else, and isn't passed over.
    let failure = all.into_iter().find_map(|status| status.failure);
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// How a generation is doing, as far as that can be seen from beside.
struct Status {
    view: String,
    of: String,
    /// `None` if nobody knows which there are.
    version: Option<u32>,
    /// `None` if this version, whose code is at hand, wasn't opened yet.
    number: Option<u32>,
    live: bool,
    folder: PathBuf,
    state: State,
    held_by: Option<String>,
    at_rest: Option<Rest>,
    /// Durable ends of its journals, in the order of their checkpoints; none if one isn't there.
    ends: Option<Vec<Checkpoint>>,
    disk_bytes: u64,
    /// Why it can't be read.
    failure: Option<ViewError>,
}

/// What the database says.
struct Rest {
    durable: Vec<Checkpoint>,
    /// How many events that are, of all journals.
    events: u64,
    skipped_events: u64,
    parked: ParkedCounts,
    indexes: Vec<String>,
    tables: Vec<String>,
}

/// Of several journals, the one that counts is the last of these.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// Not opened yet by a service with this version.
    NotBuilt,
    /// Nothing of it is durable yet.
    Empty,
    /// It is being built or deleted; or was, when its process died.
    Unfinished,
    /// It was live before, or was set aside.
    Kept,
    /// It can't be read; why not.
    Unreadable(String),
    CaughtUp,
    Behind,
    /// A service has it open, and may have applied more than is durable.
    Open,
    /// It is of more of the journal than there is: of a mirror that has to catch up, or the witness of a loss.
    Ahead,
    /// The journal has another history.
    AnotherHistory,
    /// A journal of it can't be read there.
    Unknown,
}

impl State {
    const fn name(&self) -> &'static str {
        match self {
            Self::NotBuilt => "not_built",
            Self::Empty => "empty",
            Self::Unfinished => "unfinished",
            Self::Kept => "kept",
            Self::Unreadable(_) => "unreadable",
            Self::Unknown => "unknown",
            Self::CaughtUp => "caught_up",
            Self::Behind => "behind",
            Self::Open => "open",
            Self::Ahead => "ahead",
            Self::AnotherHistory => "another_history",
        }
    }
}

fn of_view(located: &Located, views: &Views) -> Vec<Status> {
    let mut all: Vec<Status> =
        located.generations.iter().map(|it| of_generation(located, it)).collect();
    for code in views.versions(&located.name) {
        let version = code.version;
        if !located.generations.iter().any(|it| it.version == version) {
            let version = Some(version);
            all.push(Status { version, ..Status::new(&located.place, &located.name) });
        }
    }
    all
}

/// A view of which nobody knows which generations there are, or which of them is live.
fn unreadable(place: &Place, name: &str, error: ViewError) -> Status {
    let status = Status::new(place, name);
    let (state, disk_bytes) = (State::Unreadable(error.to_string()), bytes_in(&status.folder));
    Status { state, disk_bytes, failure: Some(error), ..status }
}

fn of_generation(located: &Located, generation: &Generation) -> Status {
    // In this order: whoever opens it in between is only seen as holding it.
    let opened = match generation.is_not_kept() {
        true => Ok(None),
        false => AtRest::open(generation.folder()),
    };
    let lock = version_lock(&located.folder(), generation.version);
    let held_by = lock_holder(&lock).ok().flatten().filter(|_| generation.live);
    let failure = opened.as_ref().err().filter(|_| !generation.is_going()).cloned();
    let (state, at_rest) = match opened {
        Err(_) if failure.is_none() => (State::Unfinished, None),
        Err(error) => (State::Unreadable(error.to_string()), None),
        Ok(_) if generation.is_not_kept() => (State::Unfinished, None),
        Ok(None) => (State::Empty, None),
        Ok(Some(at_rest)) => {
            let rest = Rest {
                durable: at_rest.checkpoints(),
                events: at_rest.events(),
                skipped_events: at_rest.skipped_events(),
                parked: at_rest.parked_counts(),
                indexes: at_rest.indexes().to_vec(),
                tables: at_rest.tables().to_vec(),
            };
            (State::Unknown, Some(rest))
        }
    };
    Status {
        version: Some(generation.version),
        number: Some(generation.number),
        live: generation.live,
        folder: generation.folder().to_owned(),
        state,
        held_by,
        at_rest,
        disk_bytes: bytes_in(generation.folder()),
        failure,
        ..Status::new(&located.place, &located.name)
    }
}

fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0, // it has gone away since
    };
    entries.filter_map(Result::ok).map(size).sum()
}

impl Status {
    /// Of a view that wasn't built yet.
    fn new(place: &Place, name: &str) -> Self {
        Self {
            view: name.to_owned(),
            of: place.label.clone(),
            version: None,
            number: None,
            live: false,
            folder: place.views.join(name),
            state: State::NotBuilt,
            held_by: None,
            at_rest: None,
            ends: None,
            disk_bytes: 0,
            failure: None,
        }
    }

    /// Compares it with its journals, of which these are there.
    fn judge(&mut self, journals: &[(String, Journal)]) {
        let Some(rest) = &self.at_rest else { return };
        let of = |at: &Checkpoint| {
            let beside = || journals.iter().find(|(label, _)| *label == self.of);
            let found = journals.iter().find(|(_, journal)| journal.id() == at.journal);
            found.or_else(|| beside().filter(|_| rest.durable.len() == 1)) // it has been replaced
        };
        let found: Option<Vec<&Journal>> =
            rest.durable.iter().map(|at| of(at).map(|(_, journal)| journal)).collect();
        let Some(found) = found else { return };
        let ends: Vec<Checkpoint> = found.iter().map(|journal| journal.end()).collect();
        let mut state = State::CaughtUp;
        for (journal, at) in found.iter().zip(&rest.durable) {
            state = state.max(self.judged(journal, at));
        }
        self.ends = Some(ends);
        self.state = if self.live || state == State::Unknown { state } else { State::Kept };
    }

    fn judged(&self, journal: &Journal, at: &Checkpoint) -> State {
        let is_at_end = at.position == journal.end().position;
        match compare_at_rest(journal, at) {
            Err(_) => State::Unknown,
            // What its service has applied since is durable in the journal, and may not be known to be yet.
            Ok(Comparison::Ahead) if self.held_by.is_some() => State::Open,
            Ok(Comparison::Ahead) => State::Ahead,
            Ok(Comparison::Differs | Comparison::Foreign) => State::AnotherHistory,
            Ok(Comparison::Equal) if is_at_end => State::CaughtUp,
            Ok(Comparison::Equal) if self.held_by.is_some() => State::Open,
            Ok(Comparison::Equal) => State::Behind,
        }
    }

    /// How many events there are in its journals.
    fn end(&self) -> Option<u64> {
        Some(self.ends.as_ref()?.iter().map(|end| end.position.get()).sum())
    }

    /// How many events are not durable in it; `None` if that says nothing.
    fn behind_durable(&self) -> Option<u64> {
        let follows = matches!(self.state, State::CaughtUp | State::Behind | State::Open);
        let rest = self.at_rest.as_ref().filter(|_| follows)?;
        Some(self.end()?.saturating_sub(rest.events))
    }

    /// How far it has applied; only its service knows while that has it open.
    fn applied(&self) -> Option<u64> {
        let rest = self.at_rest.as_ref()?;
        let is_known = self.held_by.is_none() || self.state == State::CaughtUp;
        is_known.then_some(rest.events)
    }

    fn lag(&self) -> Option<u64> {
        self.applied().and(self.behind_durable())
    }

    fn generation(&self) -> String {
        match (self.version, self.number) {
            (Some(version), Some(number)) => format!("{version}.{number}"),
            (Some(version), None) => version.to_string(),
            (None, _) => "-".to_owned(),
        }
    }

    fn lag_text(&self) -> String {
        match (self.lag(), self.behind_durable()) {
            (Some(lag), _) => lag.to_string(),
            (None, Some(most)) if self.state == State::Open => format!("at most {most}"),
            _ if self.live => "unknown".to_owned(),
            _ => "-".to_owned(),
        }
    }

    fn parked_text(&self) -> String {
        match self.at_rest.as_ref().map(|rest| rest.parked) {
            Some(ParkedCounts { keys, events, unrouted }) if keys + events + unrouted > 0 => {
                let unrouted = match unrouted {
                    0 => String::new(),
                    unrouted => format!(", {unrouted} events under no key"),
                };
                format!("{keys} keys, {events} events{unrouted}")
            }
            Some(_) => "nothing".to_owned(),
            None => "-".to_owned(),
        }
    }
}

fn to_json(status: &Status) -> Value {
    let rest = status.at_rest.as_ref();
    let parked = |rest: &Rest| {
        let ParkedCounts { keys, events, unrouted } = rest.parked;
        json!({ "keys": keys, "events": events, "unrouted_events": unrouted })
    };
    let error = match &status.state {
        State::Unreadable(error) => Some(error),
        _ => None,
    };
    json!({
        "view": status.view,
        "of": status.of,
        "version": status.version,
        "generation": status.number,
        "live": status.live,
        "state": status.state.name(),
        "held_by": status.held_by,
        "journals": rest.map(|rest| journals_json(rest, status.ends.as_deref())),
        "applied_position": status.applied(),
        "durable_position": rest.map(|rest| rest.events),
        "journal_end_position": status.end(),
        "lag_events": status.lag(),
        "lag_events_max": status.behind_durable(),
        "skipped_events": rest.map(|rest| rest.skipped_events),
        "parked": rest.map(parked),
        "indexes": rest.map(|rest| &rest.indexes),
        "tables": rest.map(|rest| &rest.tables),
        "disk_bytes": status.disk_bytes,
        "path": status.folder.display().to_string(),
        "error": error,
    })
}

fn journals_json(rest: &Rest, ends: Option<&[Checkpoint]>) -> Vec<Value> {
    let of = |(nth, at): (usize, &Checkpoint)| {
        let end = ends.and_then(|ends| ends.get(nth)).map(|end| end.position.get());
        json!({
            "journal": at.journal.to_string(),
            "durable_position": at.position.get(),
            "end_position": end,
        })
    };
    rest.durable.iter().enumerate().map(of).collect()
}

fn print_list(out: &mut dyn Write, all: &[Status]) -> io::Result<()> {
    if all.is_empty() {
        return writeln!(out, "no views");
    }
    let mut table = plain();
    table.set_header([
        "view",
        "of",
        "generation",
        "live",
        "state",
        "durable",
        "lag",
        "parked",
        "bytes",
        "held by",
    ]);
    for status in all {
        let durable = status.at_rest.as_ref().map(|rest| rest.events.to_string());
        table.add_row(vec![
            status.view.clone(),
            status.of.clone(),
            status.generation(),
            if status.live { "live" } else { "-" }.to_owned(),
            status.state.name().to_owned(),
            durable.unwrap_or_else(|| "-".to_owned()),
            status.lag_text(),
            status.parked_text(),
            status.disk_bytes.to_string(),
            status.held_by.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    right(&mut table, &[5, 6, 8]);
    writeln!(out, "{}", table.trim_fmt())
}

fn print_each(out: &mut dyn Write, all: &[Status]) -> io::Result<()> {
    if all.is_empty() {
        return writeln!(out, "no views");
    }
    for (index, status) in all.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        let rest = status.at_rest.as_ref();
        let state = match &status.state {
            State::Unreadable(error) => format!("unreadable: {error}"),
            state => state.name().to_owned(),
        };
        let applied = match (status.applied(), rest) {
            (Some(applied), _) => applied.to_string(),
            (None, Some(_)) => "unknown: only the process that has it open knows".to_owned(),
            (None, None) => "-".to_owned(),
        };
        let mut table = plain();
        for (what, value) in [
            ("view", status.view.clone()),
            ("of the journal", status.of.clone()),
            ("generation", status.generation()),
            ("live", if status.live { "yes" } else { "no" }.to_owned()),
            ("state", state),
            ("open in", or_dash(status.held_by.clone())),
            ("applied", applied),
            ("durable", or_dash(rest.map(|rest| rest.events.to_string()))),
            ("journal ends at", or_dash(status.end().map(|end| end.to_string()))),
            ("lag in events", status.lag_text()),
            ("skipped events", or_dash(rest.map(|rest| rest.skipped_events.to_string()))),
            ("parked", status.parked_text()),
            (
                "indexes",
                or_dash(rest.map(|rest| rest.indexes.join(", ")).filter(|it| !it.is_empty())),
            ),
            (
                "tables",
                or_dash(rest.map(|rest| rest.tables.join(", ")).filter(|it| !it.is_empty())),
            ),
            ("bytes on disk", status.disk_bytes.to_string()),
            ("path", status.folder.display().to_string()),
        ] {
            table.add_row(vec![what.to_owned(), value]);
        }
        writeln!(out, "{}", table.trim_fmt())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is deleted while it is looked at can't be read, and isn't damaged.
    #[test]
    fn what_can_not_be_read_because_it_is_being_deleted_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("views/spent/1.1");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir(dir.path().join("journal")).unwrap();
        std::fs::write(folder.join("CURRENT"), "damaged").unwrap();
        let located = find::view(dir.path(), "spent").unwrap();
        let state = || {
            let status = of_generation(&located, &located.generations[0]);
            (status.state.name(), status.failure.is_some())
        };
        assert_eq!(state(), ("unreadable", true));
        std::fs::write(folder.join("not-kept"), "").unwrap();
        assert_eq!(state(), ("unfinished", false));
    }
}
