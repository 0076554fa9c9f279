//! `headwater view check`: whether the rows are what the journal makes.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::failure::ViewFailure;
use super::find;
use super::journals;
use super::mounted::Views;
use super::progress::Progress;
use super::{CheckArgs, Means};
use crate::cli::failure::Failure;
use crate::hex::hex;
use crate::view::{Comparison, Digest, RebuildError, RebuildHandle, RebuildOptions};

impl Means {
    pub(super) fn options(&self) -> RebuildOptions {
        let defaults = RebuildOptions::default();
        RebuildOptions {
            bytes_per_second_max: self.bytes_per_second_max,
            threads: self.threads.unwrap_or(defaults.threads),
            memory_bytes_max: self.memory_bytes_max.unwrap_or(defaults.memory_bytes_max),
            ..defaults
        }
    }
}

pub(super) fn check(args: &CheckArgs, views: &Views) -> Result<(), Failure> {
    let which = &args.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let (at_rest, generation, code) = located.open(args.generation.generation, views)?;
    let code = code.ok_or_else(|| ViewFailure::NoCode { view: which.name.clone() })?;
    // Behind the view: what that has applied is durable here.
    let ids: Vec<_> = at_rest.checkpoints().iter().map(|it| it.journal).collect();
    let found = journals::find(&located, &ids)?;
    if let Some(corruption) = found.iter().find_map(|it| it.corruption.clone()) {
        return Err(Failure::Damaged(corruption));
    }
    let sources = journals::sources(found.into_iter().map(|it| it.journal));
    let sources = sources.ok_or_else(|| ViewFailure::Journals { view: which.name.clone() })?;
    let options = args.means.options();
    let watched = RebuildHandle::unbegun(&options);
    let mut progress = Progress::new(which.target.json)?;
    let folder = located.folder();
    let compared = std::thread::scope(|scope| {
        let check = || code.check(&at_rest, &sources, &folder, &options, &watched);
        let checking = scope.spawn(check);
        progress.follow(|| Some(watched.status()), || checking.is_finished(), || watched.cancel());
        checking.join().unwrap_or(Err(RebuildError::Cancelled)) // it catches every panic itself
    })?;
    let mut out = io::stdout().lock();
    if which.target.json {
        let value = json!({
            "view": which.name,
            "version": generation.version,
            "generation": generation.number,
            "equal": compared.is_equal(),
            "position": compared.position.get(),
            "served": digest_json(&compared.served),
            "built": digest_json(&compared.built),
        });
        writeln!(out, "{value}")?;
    } else {
        let name =
            format!("{}, generation {}.{}", which.name, generation.version, generation.number);
        print(&mut out, &name, &compared)?;
    }
    out.flush()?;
    if compared.is_equal() { Ok(()) } else { Err(Failure::Reported) }
}

pub(super) fn digest_json(digest: &Digest) -> Value {
    json!({ "rows": digest.rows, "hash": hex(&digest.hash) })
}

fn print(out: &mut impl Write, name: &str, compared: &Comparison) -> io::Result<()> {
    let Comparison { position, served, built } = compared;
    if compared.is_equal() {
        return writeln!(
            out,
            "{name}: the rows are what the journal makes, up to position {position}: {served}"
        );
    }
    writeln!(out, "{name}: the rows are NOT what the journal makes, up to position {position}")?;
    writeln!(out, "  stored: {served}\n  built:  {built}")?;
    writeln!(out, "  hint: {}", RebuildError::Different(compared.clone()).hint())
}
