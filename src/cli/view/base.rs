//! `headwater view export` and `import`: the rows of a view, for somebody who needn't fold the history.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::failure::ViewFailure;
use super::find::{self, Located};
use super::journals;
use super::mounted::Views;
use super::prove::digest_json;
use super::write::in_use;
use super::{ExportArgs, ImportArgs};
use crate::JournalId;
use crate::cli::failure::Failure;
use crate::cli::target;
use crate::view::{Imported, Sources, ViewBase, export_at_rest, import_at_rest, is_valid_name};

/// The journals with these ids, as an opening leaves them.
fn sources(located: &Located, ids: &[JournalId]) -> Result<Sources, Failure> {
    let found = journals::find(located, ids)?;
    let found = found.into_iter().map(journals::recovered).collect::<Result<Vec<_>, _>>()?;
    let sources = journals::sources(found.into_iter());
    Ok(sources.ok_or_else(|| ViewFailure::Journals { view: located.name.clone() })?)
}

pub(super) fn export(args: &ExportArgs, views: &Views) -> Result<(), Failure> {
    let which = &args.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let (generation, _) = located.generation(None, views)?;
    let version = generation.version;
    let ids = located.journals(version)?.unwrap_or_default();
    let (of, journals) = ((located.name.as_str(), version), sources(&located, &ids)?);
    let exported = export_at_rest(&located.place.views, of, &journals, &args.base);
    let base = exported.map_err(|error| in_use(&located.name, error))?;
    let mut out = io::stdout().lock();
    match which.target.json {
        true => writeln!(out, "{}", base_json(&base))?,
        false => print(&mut out, "exported", &base)?,
    }
    Ok(out.flush()?)
}

pub(super) fn import(args: &ImportArgs) -> Result<(), Failure> {
    let which = &args.which;
    let base = ViewBase::read(&args.base)?;
    let ids: Vec<_> = base.checkpoints.iter().map(|it| it.journal).collect();
    let located = begun(which, &ids)?;
    let (name, journals) = (&which.name, sources(&located, &ids)?);
    let views = &located.place.views;
    let imported = import_at_rest(views, name, &journals, &args.base, args.replace);
    let Imported { version, number, previous } = imported.map_err(|error| in_use(name, error))?;
    let mut out = io::stdout().lock();
    if which.target.json {
        let mut value = base_json(&base);
        value["generation"] = json!(number);
        value["previous"] = json!(previous);
        writeln!(out, "{value}")?;
    } else {
        print(&mut out, "imported", &base)?;
        let kept = previous.map(|it| format!("; {version}.{it} is kept")).unwrap_or_default();
        writeln!(out, "generation {version}.{number} is live{kept}")?;
    }
    Ok(out.flush()?)
}

/// Where a view that may not be there yet belongs: beside the only journal that it is made from, or with the views of the
/// store.
fn begun(which: &super::Which, ids: &[JournalId]) -> Result<Located, Failure> {
    let (dir, name) = (&which.target.dir, which.name.clone());
    if !is_valid_name(&name) {
        return Err(ViewFailure::NoView { view: name, dir: dir.clone() }.into());
    }
    let places = find::places(dir);
    let own = places.first().cloned();
    let place = match ids {
        [id] => {
            let has_it = |place: &&find::Place| {
                target::open(&place.journal).is_ok_and(|(journal, _)| journal.id() == *id)
            };
            let missing = || ViewFailure::NoJournal { journal: *id, dir: dir.clone() };
            places.iter().find(has_it).cloned().ok_or_else(missing)?
        }
        _ => own.ok_or_else(|| ViewFailure::Journals { view: name.clone() })?,
    };
    Ok(Located { places, place, name, generations: Vec::new() })
}

fn base_json(base: &ViewBase) -> Value {
    let journals = base.checkpoints.iter().map(|at| {
        json!({
            "journal": at.journal.to_string(),
            "position": at.position.get(),
            "chain": at.chain.to_string(),
        })
    });
    json!({
        "view": base.view,
        "version": base.version,
        "journals": journals.collect::<Vec<_>>(),
        "digest": digest_json(&base.digest),
        "parked_keys": base.parked.keys,
        "unrouted_events": base.parked.unrouted,
        "file_bytes": base.bytes,
    })
}

fn print(out: &mut impl Write, done: &str, base: &ViewBase) -> io::Result<()> {
    let ViewBase { view, version, digest, bytes, .. } = base;
    writeln!(out, "{view}: version {version} {done}: {digest}, {bytes} bytes")?;
    for at in &base.checkpoints {
        writeln!(out, "  of journal {} up to position {}", at.journal, at.position)?;
    }
    if !base.parked.is_empty() {
        let (keys, unrouted) = (base.parked.keys, base.parked.unrouted);
        writeln!(out, "  {keys} keys are parked, and {unrouted} events under no key")?;
    }
    Ok(())
}
