//! Which journal a directory stands for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fs::{Fs, os::OsFs};
use crate::{Corruption, Journal, Orphans};
use serde_json::{Value, json};

use super::failure::Failure;

/// The journal of a store or of a mirror, or the directory itself.
pub(crate) fn journal_dir(dir: &Path) -> PathBuf {
    let journal = dir.join("journal");
    if journal.is_dir() { journal } else { dir.to_owned() }
}

/// The mirrors of a store, by name.
pub(crate) fn mirrors(store: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(store.join("mirrors")) else { return Vec::new() };
    let mut mirrors: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    mirrors.sort();
    mirrors
}

/// Opens the journal that `dir` stands for, up to what is proven to be durable; with its damage, if there
/// is some.
pub(crate) fn open(dir: &Path) -> Result<(Journal, Option<Corruption>), Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    Ok(Journal::open_read_only(&fs, &journal_dir(dir))?)
}

/// A tail that was set aside, as `peer` and `verify` print it.
pub(crate) fn orphan(it: &Orphans) -> Value {
    let end = it.end.map(|end| end.position.get());
    json!({ "path": it.dir.display().to_string(), "from_position": it.from.get(), "end_position": end })
}
