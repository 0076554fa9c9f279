//! `headwater schema check`: whether every kind of event in a journal has a recorded sample.
//!
//! Whether the code of a service reads the samples only that code can tell: in its tests, by
//! `headwater::schema::check`.

use std::io::{self, Write};
use std::path::PathBuf;

use crate::schema::{self, Sample, StoredKind};
use serde_json::{Value, json};

use super::failure::Failure;
use super::stat::{plain, right};
use super::{Target, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Tells which kinds of events in a journal have no sample
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The directory of the samples
    schema: PathBuf,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let Verb::Check(args) = &args.verb;
    let samples = schema::samples(&args.schema)?;
    let (journal, corruption) = target::open(&args.target.dir)?;
    let kinds = schema::stored_kinds(&journal)?;
    let mut out = io::stdout().lock();
    match args.target.json {
        true => writeln!(out, "{}", to_json(&kinds, &samples))?,
        false => print(&mut out, &kinds, &samples)?,
    }
    out.flush()?;
    if let Some(corruption) = corruption {
        return Err(Failure::Damaged(corruption));
    }
    match kinds.iter().filter(|kind| !kind.is_recorded(&samples)).count() {
        0 => Ok(()),
        unrecorded => Err(Failure::Unrecorded(unrecorded)),
    }
}

fn to_json(kinds: &[StoredKind], samples: &[Sample]) -> Value {
    let kind = |kind: &StoredKind| {
        json!({
            "type": kind.name,
            "schema_version": kind.schema_version,
            "codec": kind.codec.to_string(),
            "events": kind.events,
            "first_position": kind.first.get(),
            "recorded": kind.is_recorded(samples),
        })
    };
    json!({
        "complete": kinds.iter().all(|kind| kind.is_recorded(samples)),
        "samples": samples.len(),
        "kinds": kinds.iter().map(kind).collect::<Vec<_>>(),
    })
}

fn print(out: &mut impl Write, kinds: &[StoredKind], samples: &[Sample]) -> io::Result<()> {
    let mut table = plain();
    table.set_header(["type", "version", "codec", "events", "first at", "sample"]);
    for kind in kinds {
        table.add_row(vec![
            kind.name.clone(),
            kind.schema_version.to_string(),
            kind.codec.to_string(),
            kind.events.to_string(),
            kind.first.to_string(),
            if kind.is_recorded(samples) { "yes" } else { "MISSING" }.to_owned(),
        ]);
    }
    right(&mut table, &[1, 3, 4]);
    writeln!(out, "{}", table.trim_fmt())
}
