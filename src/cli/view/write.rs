//! `headwater view rebuild`, `rollback`, `retry`, `discard` and `rm`: what changes a view.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::failure::ViewFailure;
use super::find::{self, Located};
use super::journals::{self, Found};
use super::keys;
use super::mounted::Views;
use super::progress::Progress;
use super::prove::digest_json;
use super::{DiscardArgs, GenerationName, KeyArgs, RebuildArgs, RmArgs, Which};
use crate::cli::failure::Failure;
use crate::fs::os::OsFs;
use crate::view::at_rest::AtRest;
use crate::view::{
    Code, Generation, Generations, KeySpelling, OnDifference, ParkedError, RebuildError,
    RebuildHandle, RebuildOptions, RebuildPhase, Rebuilt, Retried, Spelling, ViewControl,
    ViewError, ViewState,
};
use crate::{Locator, Position};

/// Opens the view as its service does, and closes it again.
fn with_open<T>(
    located: &Located,
    code: &Code,
    building: RebuildOptions,
    run: impl FnOnce(&ViewControl) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let ids = located.journals(code.version)?.unwrap_or_default();
    let found = journals::find(located, &ids)?;
    let found = found.into_iter().map(journals::recovered).collect::<Result<Vec<_>, _>>()?;
    let sources = journals::sources(found.into_iter());
    let sources = sources.ok_or_else(|| ViewFailure::Journals { view: located.name.clone() })?;
    let opened = code.open(&located.place.views, sources, building);
    let opened = opened.map_err(|error| in_use(&located.name, error))?;
    let done = run(&opened);
    let closed = opened.close();
    drop(opened);
    let done = done?;
    closed?;
    Ok(done)
}

pub(super) fn in_use(view: &str, error: ViewError) -> Failure {
    match error {
        ViewError::InUse { owner, .. } => {
            ViewFailure::InUse { view: view.to_owned(), owner }.into()
        }
        error => error.into(),
    }
}

pub(super) fn rebuild(args: &RebuildArgs, views: &Views) -> Result<(), Failure> {
    let which = &args.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let code = located.code(views)?;
    let version = code.version;
    let live = located.generations.iter().find(|it| it.version == version && it.live);
    let was_there = live.is_some_and(|it| !matches!(AtRest::open(it.folder()), Ok(None)));
    let on_difference = match args.accept_difference {
        true => OnDifference::Replace,
        false => OnDifference::Refuse,
    };
    let options = RebuildOptions { on_difference, ..args.means.options() };
    let mut progress = Progress::new(which.target.json)?;
    let (mut begun, mut before) = (None, None);
    let done = with_open(&located, code, options.clone(), |opened| {
        refuse_unjudged(code, opened)?;
        if was_there && opened.status().set_aside.is_none() {
            let rebuilt = finish(&opened.rebuild(options)?, &mut progress)?;
            return print_rebuilt(which, version, &rebuilt);
        }
        let status = opened.status();
        begun = number_of(&status.generation);
        before = status.set_aside.as_deref().and_then(number_of);
        build_first(opened, &mut progress)?;
        begun = None; // it stays
        print_built(which, opened)
    });
    if let Some(number) = begun {
        // An effort: what is left is told by `view ls`, and goes away with `view rm`.
        drop(generations_of(&located, version).map(|mut it| it.remove_even_live(number, before)));
    }
    done
}

fn number_of(generation: &Path) -> Option<u32> {
    generation.file_name()?.to_str()?.split_once('.')?.1.parse().ok()
}

fn generations_of(located: &Located, version: u32) -> Result<Generations, Failure> {
    let (views, name) = (&located.place.views, &located.name);
    let opened = Generations::open(Arc::new(OsFs), views, name, version);
    opened.map_err(|error| in_use(name, error))
}

/// A mirror that has to catch up with the view first says nothing about its rows.
fn refuse_unjudged(code: &Code, opened: &ViewControl) -> Result<(), Failure> {
    match opened.status().state {
        ViewState::AwaitingMirror => Err(ViewError::NotJudged { view: code.name }.into()),
        _ => Ok(()),
    }
}

/// Opening the view has begun its first generation: waits for that.
fn build_first(opened: &ViewControl, progress: &mut Progress) -> Result<(), Failure> {
    let is_done = || {
        let status = opened.status();
        !matches!(status.state, ViewState::Building) && status.rebuild.is_none()
    };
    // A view that couldn't be closed has stopped, and says why below.
    progress.follow(|| opened.status().rebuild, is_done, || drop(opened.close()));
    match opened.status().state {
        ViewState::Stopped(error) => Err(RebuildError::Stopped(error).into()),
        _ if progress.is_interrupted() => Err(RebuildError::Cancelled.into()),
        _ => Ok(()),
    }
}

fn finish(handle: &RebuildHandle, progress: &mut Progress) -> Result<Rebuilt, Failure> {
    let is_done = || handle.status().phase == RebuildPhase::Ended;
    progress.follow(|| Some(handle.status()), is_done, || handle.cancel());
    Ok(handle.wait()?)
}

fn print_rebuilt(which: &Which, version: u32, rebuilt: &Rebuilt) -> Result<(), Failure> {
    let Rebuilt { generation, previous, compared, took } = rebuilt;
    let mut out = io::stdout().lock();
    if which.target.json {
        let compared = compared.as_ref().map(|it| {
            json!({
                "equal": it.is_equal(),
                "position": it.position.get(),
                "served": digest_json(&it.served),
                "built": digest_json(&it.built),
            })
        });
        let value = json!({
            "view": which.name,
            "version": version,
            "generation": generation,
            "previous": previous,
            "compared": compared,
            "took_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        });
        writeln!(out, "{value}")?;
    } else {
        let name = &which.name;
        let seconds = took.as_secs_f64();
        let previous = previous.map(|previous| format!("{version}.{previous}"));
        let kept = previous.as_ref().map_or_else(String::new, |it| format!("; {it} is kept"));
        writeln!(
            out,
            "{name}: generation {version}.{generation} is live after {seconds:.1} s{kept}"
        )?;
        match compared {
            Some(it) if it.is_equal() => {
                writeln!(out, "both are the same at position {}: {}", it.position, it.built)?;
            }
            Some(it) => writeln!(
                out,
                "at position {} it has {}, and {} had {}",
                it.position,
                it.built,
                previous.as_deref().unwrap_or("the one before"),
                it.served
            )?,
            None => {}
        }
    }
    Ok(out.flush()?)
}

fn print_built(which: &Which, opened: &ViewControl) -> Result<(), Failure> {
    let status = opened.status();
    let generation = status.generation.file_name().unwrap_or_default().to_string_lossy();
    let position = status.checkpoint.applied.position;
    let mut out = io::stdout().lock();
    if which.target.json {
        let (version, number) = generation.split_once('.').unwrap_or_default();
        let value = json!({
            "view": which.name,
            "version": version.parse::<u32>().ok(),
            "generation": number.parse::<u32>().ok(),
            "previous": null,
            "compared": null,
            "took_ms": null,
        });
        writeln!(out, "{value}")?;
    } else {
        let name = &which.name;
        writeln!(out, "{name}: generation {generation} was built, up to position {position}")?;
    }
    Ok(out.flush()?)
}

pub(super) fn rollback(which: &Which, views: &Views) -> Result<(), Failure> {
    let located = find::view(&which.target.dir, &which.name)?;
    let code = located.code(views)?;
    let mut progress = Progress::new(which.target.json)?;
    with_open(&located, code, RebuildOptions::default(), |opened| {
        refuse_unjudged(code, opened)?;
        let rebuilt = finish(&opened.rollback()?, &mut progress)?;
        print_rebuilt(which, code.version, &rebuilt)
    })
}

pub(super) fn retry(args: &KeyArgs, views: &Views) -> Result<(), Failure> {
    let located = find::view(&args.which.target.dir, &args.which.name)?;
    let code = located.code(views)?;
    let key = keys::whole(&args.key, Some(key_of(code)?))?;
    let building = RebuildOptions::default();
    let retried = with_open(&located, code, building, |opened| Ok(opened.retry_bytes(&key)?))?;
    print_retried(&args.which, &retried)
}

pub(super) fn discard(args: &DiscardArgs, views: &Views) -> Result<(), Failure> {
    let which = &args.of.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let code = located.code(views)?;
    let position = Position::new(args.position);
    let first = |opened: &ViewControl| opened.checkpoint().applied.journal;
    let journal = |opened: &ViewControl| args.journal.unwrap_or_else(|| first(opened));
    let at = |opened: &ViewControl| Locator { journal: journal(opened), position };
    let building = RebuildOptions::default();
    let retried = match args.unrouted {
        true => with_open(&located, code, building, |opened| {
            opened.discard_unrouted_at(at(opened))?;
            Ok(None)
        })?,
        false => {
            let key = keys::whole(&args.of.key, Some(key_of(code)?))?;
            let discard = |opened: &ViewControl| Ok(opened.discard_bytes(&key, at(opened))?);
            Some(with_open(&located, code, building, discard)?)
        }
    };
    match retried {
        Some(retried) => print_retried(which, &retried),
        None => print_counts(which, 0, 0, None),
    }
}

/// How keys are written under which events are parked.
fn key_of(code: &Code) -> Result<&KeySpelling, Failure> {
    match &code.spelling {
        Spelling::Rows { rows, .. } => Ok(&rows.key),
        Spelling::Tables(_) => Err(ParkedError::NotParked.into()), // only under no key
    }
}

fn print_retried(which: &Which, retried: &Retried) -> Result<(), Failure> {
    let Retried { applied, left, reason } = retried;
    print_counts(which, *applied, *left, reason.as_deref())?;
    match reason {
        Some(reason) => {
            Err(ViewFailure::StillParked { left: *left, reason: reason.clone() }.into())
        }
        None => Ok(()),
    }
}

fn print_counts(
    which: &Which,
    applied: u64,
    left: u64,
    reason: Option<&str>,
) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match which.target.json {
        true => writeln!(
            out,
            "{}",
            json!({ "view": which.name, "applied": applied, "left": left, "reason": reason })
        )?,
        false => writeln!(out, "{}: {applied} events applied, {left} left", which.name)?,
    }
    Ok(out.flush()?)
}

pub(super) fn rm(args: &RmArgs) -> Result<(), Failure> {
    let which = &args.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let GenerationName { version, number } = args.generation;
    let is_meant =
        |it: &&Generation| it.version == version && number.is_none_or(|number| it.number == number);
    let found: Vec<&Generation> = located.generations.iter().filter(is_meant).collect();
    let folder = located.folder().join(args.generation.to_string());
    if found.is_empty() {
        return Err(ViewError::NoGeneration { folder }.into());
    }
    if number.is_none() {
        refuse_what_cannot_be_made_anew(&located, &found)?;
    }
    // Deletes what is unfinished.
    let mut generations = generations_of(&located, version)?;
    for it in &found {
        match number {
            None => generations.remove_even_live(it.number, None)?,
            Some(number) => drop(generations.remove(number)?),
        }
    }
    let deleted: Vec<String> = found.iter().map(|it| format!("{version}.{}", it.number)).collect();
    let (name, deleted) = (&which.name, deleted.join(", "));
    let mut out = io::stdout().lock();
    match (which.target.json, number) {
        (true, _) => writeln!(
            out,
            "{}",
            json!({ "view": name, "version": version, "generation": number, "deleted": true })
        )?,
        (false, Some(_)) => writeln!(out, "{name}: generation {deleted} is deleted")?,
        (false, None) => writeln!(out, "{name}: version {version} is deleted: {deleted}")?,
    }
    Ok(out.flush()?)
}

/// Where events were removed, a version that is deleted doesn't come back.
fn refuse_what_cannot_be_made_anew(
    located: &Located,
    deleted: &[&Generation],
) -> Result<(), Failure> {
    for generation in deleted.iter().filter(|it| it.live) {
        for Found { place, journal, .. } in made_from(located, generation)? {
            let start = journal.start().position;
            if start > Position::START {
                let view = located.name.clone();
                return Err(ViewFailure::Truncated { view, of: place.label, start }.into());
            }
        }
    }
    Ok(())
}

/// The journals that the rows are of; if the rows can't be read, all that they may be of.
fn made_from(located: &Located, generation: &Generation) -> Result<Vec<Found>, Failure> {
    match AtRest::open(generation.folder()) {
        Ok(None) => Ok(Vec::new()), // there are no rows
        Ok(Some(rows)) => {
            let ids: Vec<_> = rows.checkpoints().iter().map(|it| it.journal).collect();
            journals::find(located, &ids)
        }
        Err(_) => journals::all(located),
    }
}
