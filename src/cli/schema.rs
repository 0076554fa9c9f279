//! `headwater schema check`: whether every kind of event in a journal has a recorded sample; and in a service, which names
//! its event types, whether its code reads the samples and every event that is there.
//!
//! ```text
//!  types of the service ──▶ schema::check over their samples ──▶ findings
//!          │
//!  journal ┴─ each record: counted by kind, decoded by each type, upcast to the end ──▶ kinds, undecodable events
//! ```

use std::any::Any;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::failure::Failure;
use super::stat::{plain, right};
use super::target;
use crate::event::{Event, EventKindRef, Payload};
use crate::format::record::RecordRef;
use crate::journal::Journal;
use crate::position::Position;
use crate::schema::{self, Findings, Kinds, Sample, SchemaError, StoredKind};
use crate::upcast::Decoded;

/// So many undecodable events are told one by one; all are counted.
const TOLD_MAX: usize = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Tells which kinds of events in a journal have no sample; in a service, also what its code doesn't read
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The directory of the samples
    schema: PathBuf,
    /// A store, its journal, or a mirror; a service may leave it out, and checks the samples only
    dir: Option<PathBuf>,
    /// Prints JSON, with the fields of docs/cli.md
    #[arg(long)]
    json: bool,
}

/// The event types whose code is at hand.
#[derive(Default)]
pub(crate) struct EventTypes(Vec<Box<dyn Mounted>>);

impl fmt::Debug for EventTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|it| it.dir())).finish()
    }
}

impl EventTypes {
    pub(crate) fn add<E: Event + Send + Sync + 'static>(&mut self, dir: PathBuf, values: Vec<E>) {
        self.0.push(Box::new(OfType { dir, values }));
    }

    /// The samples that are recorded: in `schema` itself and for each type.
    fn samples(&self, schema: &Path) -> Result<Vec<Sample>, SchemaError> {
        let mut dirs: Vec<PathBuf> = self.0.iter().map(|it| schema.join(it.dir())).collect();
        dirs.push(schema.to_owned());
        dirs.sort();
        dirs.dedup();
        let mut samples = Vec::new();
        for dir in dirs {
            samples.extend(schema::samples(dir)?);
        }
        Ok(samples)
    }

    /// What the library's check finds, for each type.
    fn findings(&self, schema: &Path) -> Result<Vec<Findings>, SchemaError> {
        let mut all = Vec::new();
        for it in &self.0 {
            match it.check(&schema.join(it.dir())) {
                Ok(()) => {}
                Err(SchemaError::Findings(findings)) => all.push(findings),
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Whether any type reads the event, or why one that knows it doesn't.
    fn read(&self, record: &RecordRef<'_>) -> Result<bool, String> {
        let kind = EventKindRef { name: record.event_type, schema_version: record.schema_version };
        let payload = Payload { codec: record.codec, bytes: record.payload };
        let mut is_read = false;
        for it in &self.0 {
            let read = catch_unwind(AssertUnwindSafe(|| it.reads(kind, payload)));
            is_read |= read.unwrap_or_else(|panic| Err(panicked(&*panic)))?;
        }
        Ok(is_read)
    }
}

/// An event type, without it.
trait Mounted: Send + Sync {
    /// Where its samples are, from the directory of all samples.
    fn dir(&self) -> &Path;

    fn check(&self, dir: &Path) -> Result<(), SchemaError>;

    /// Whether the event is one of its own and can be decoded; why not, if it can't.
    fn reads(&self, kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<bool, String>;
}

struct OfType<E> {
    dir: PathBuf,
    values: Vec<E>,
}

impl<E: Event + Send + Sync> Mounted for OfType<E> {
    fn dir(&self) -> &Path {
        &self.dir
    }

    fn check(&self, dir: &Path) -> Result<(), SchemaError> {
        schema::check(dir, &self.values).map(drop)
    }

    fn reads(&self, kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<bool, String> {
        let decoded = E::decode(kind, payload).map_err(|error| error.to_string())?;
        Ok(!matches!(decoded, Decoded::Foreign))
    }
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", text.unwrap_or_else(|| "without a message".to_owned()))
}

/// An event that a type knows and can't decode.
struct Undecodable {
    position: Position,
    stream: String,
    event_type: String,
    schema_version: u32,
    reason: String,
}

/// What the check has found.
#[derive(Default)]
struct Report {
    samples: Vec<Sample>,
    findings: Vec<Findings>,
    kinds: Vec<StoredKind>,
    /// Of the kinds, in their order: how many events are read. None if no types are at hand.
    read: Option<Vec<u64>>,
    undecodable_events: u64,
    /// The first of them.
    undecodable: Vec<Undecodable>,
}

pub(crate) fn run(args: &Args, types: &EventTypes) -> Result<(), Failure> {
    let Verb::Check(args) = &args.verb;
    if args.dir.is_none() && types.0.is_empty() {
        return Err(Failure::NothingToCheck);
    }
    let mut report = Report {
        samples: types.samples(&args.schema)?,
        findings: types.findings(&args.schema)?,
        ..Report::default()
    };
    let mut corruption = None;
    if let Some(dir) = &args.dir {
        let (journal, damage) = target::open(dir)?;
        report.look_through(&journal, types)?;
        corruption = damage;
    }
    let mut out = io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", report.to_json())?,
        false => report.print(&mut out, args.dir.is_some())?,
    }
    out.flush()?;
    match corruption {
        Some(corruption) => Err(Failure::Damaged(corruption)),
        None => report.judge(),
    }
}

impl Report {
    fn look_through(&mut self, journal: &Journal, types: &EventTypes) -> Result<(), Failure> {
        let mut kinds = Kinds::default();
        let mut unread = Kinds::default();
        schema::for_each_record(journal, |position, record| {
            kinds.add(position, record);
            match types.read(record) {
                Ok(true) => {}
                Ok(false) => unread.add(position, record),
                Err(reason) => {
                    unread.add(position, record);
                    self.tell(position, record, reason);
                }
            }
        })?;
        (self.kinds, self.read) = (kinds.into_vec(), None);
        if !types.0.is_empty() {
            let unread = unread.into_vec();
            let of = |kind: &StoredKind| unread.iter().find(|it| it.is_same_kind(kind));
            let read = |kind| of(kind).map_or(kind.events, |unread| kind.events - unread.events);
            self.read = Some(self.kinds.iter().map(read).collect());
        }
        Ok(())
    }

    fn tell(&mut self, position: Position, record: &RecordRef<'_>, reason: String) {
        self.undecodable_events += 1;
        if self.undecodable.len() < TOLD_MAX {
            self.undecodable.push(Undecodable {
                position,
                stream: record.stream.to_owned(),
                event_type: record.event_type.to_owned(),
                schema_version: record.schema_version,
                reason,
            });
        }
    }

    fn judge(&self) -> Result<(), Failure> {
        if self.undecodable_events > 0 {
            return Err(Failure::Undecodable(self.undecodable_events));
        }
        match self.findings.iter().map(|it| it.iter().count()).sum() {
            0 => {}
            findings => return Err(Failure::Unproven(findings)),
        }
        match self.kinds.iter().filter(|kind| !kind.is_recorded(&self.samples)).count() {
            0 => Ok(()),
            unrecorded => Err(Failure::Unrecorded(unrecorded)),
        }
    }

    /// The kinds, with how many events of each are read.
    fn kinds(&self) -> impl Iterator<Item = (&StoredKind, Option<u64>)> {
        let read = |nth: usize| self.read.as_ref().and_then(|read| read.get(nth).copied());
        self.kinds.iter().enumerate().map(move |(nth, kind)| (kind, read(nth)))
    }

    fn to_json(&self) -> Value {
        let kind = |(kind, read): (&StoredKind, Option<u64>)| {
            json!({
                "type": kind.name,
                "schema_version": kind.schema_version,
                "codec": kind.codec.to_string(),
                "events": kind.events,
                "first_position": kind.first.get(),
                "recorded": kind.is_recorded(&self.samples),
                "read_events": read,
            })
        };
        let findings = self.findings.iter().flatten().map(|finding| {
            json!({ "code": finding.code(), "what": finding.to_string(), "hint": finding.hint() })
        });
        let undecodable = self.undecodable.iter().map(|it| {
            json!({
                "position": it.position.get(),
                "stream": it.stream,
                "type": it.event_type,
                "schema_version": it.schema_version,
                "reason": it.reason,
            })
        });
        json!({
            "complete": self.kinds.iter().all(|kind| kind.is_recorded(&self.samples)),
            "samples": self.samples.len(),
            "kinds": self.kinds().map(kind).collect::<Vec<_>>(),
            "findings": findings.collect::<Vec<_>>(),
            "undecodable_events": self.undecodable_events,
            "undecodable": undecodable.collect::<Vec<_>>(),
        })
    }

    fn print(&self, out: &mut impl Write, has_journal: bool) -> io::Result<()> {
        if has_journal {
            self.print_kinds(out)?;
        } else {
            writeln!(out, "{} samples", self.samples.len())?;
        }
        for finding in self.findings.iter().flatten() {
            writeln!(out, "{}: {finding}\n  hint: {}", finding.code(), finding.hint())?;
        }
        for it in &self.undecodable {
            let Undecodable { position, stream, event_type, schema_version, reason } = it;
            writeln!(
                out,
                "position {position}: {event_type:?}, version {schema_version}, in stream {stream}: {reason}"
            )?;
        }
        match self.undecodable_events.saturating_sub(self.undecodable.len() as u64) {
            0 => Ok(()),
            more => writeln!(out, "and {more} more that can't be decoded"),
        }
    }

    fn print_kinds(&self, out: &mut impl Write) -> io::Result<()> {
        let mut table = plain();
        let mut header = vec!["type", "version", "codec", "events", "first at", "sample"];
        header.extend(self.read.is_some().then_some("read"));
        table.set_header(header);
        for (kind, read) in self.kinds() {
            let mut row = vec![
                kind.name.clone(),
                kind.schema_version.to_string(),
                kind.codec.to_string(),
                kind.events.to_string(),
                kind.first.to_string(),
                if kind.is_recorded(&self.samples) { "yes" } else { "MISSING" }.to_owned(),
            ];
            row.extend(read.map(|read| match read {
                read if read == kind.events => "all".to_owned(),
                0 => "NONE".to_owned(),
                read => format!("ONLY {read}"),
            }));
            table.add_row(row);
        }
        right(&mut table, &[1, 3, 4]);
        writeln!(out, "{}", table.trim_fmt())
    }
}
