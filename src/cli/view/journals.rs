//! The journals that a view is made from.

use std::sync::Arc;

use super::failure::ViewFailure;
use super::find::{Located, Place};
use crate::cli::failure::Failure;
use crate::cli::target;
use crate::format::files::Role;
use crate::fs::{Fs, os::OsFs};
use crate::journal::{Appender, Ingest};
use crate::view::Sources;
use crate::{Corruption, Journal, JournalId, JournalOptions, OpenError, retention};

/// A journal beside the view, or in a mirror beside it, as far as it is known to be durable; with its damage.
pub(super) struct Found {
    pub(super) place: Place,
    pub(super) journal: Journal,
    pub(super) corruption: Option<Corruption>,
}

/// Where the journals with these ids are. If there is one id, and none has it: the one beside the view, which has been
/// replaced.
pub(super) fn find(located: &Located, ids: &[JournalId]) -> Result<Vec<Found>, Failure> {
    if let [] | [_] = ids {
        let beside = open(&located.place)?;
        if ids.iter().all(|id| *id == beside.journal.id()) {
            return Ok(vec![beside]);
        }
        // A store's own view may be of one mirror.
        let (mut all, mut failures) = those_there(located);
        let found = all.iter().position(|found| ids.contains(&found.journal.id()));
        let found = found.map(|at| all.swap_remove(at));
        let missing = || failures.pop().map_or(Ok(beside), Err); // one that can't be read may be it
        return Ok(vec![found.map_or_else(missing, Ok)?]);
    }
    let (mut all, mut failures) = those_there(located);
    let take = |id: &JournalId| {
        if let Some(at) = all.iter().position(|found| found.journal.id() == *id) {
            return Ok(all.swap_remove(at));
        }
        // It may be the one that can't be read.
        let dir = located.place.journal.clone();
        let missing = || ViewFailure::NoJournal { journal: *id, dir }.into();
        Err(failures.pop().unwrap_or_else(missing))
    };
    ids.iter().map(take).collect()
}

/// All journals beside the view and in mirrors beside it.
pub(super) fn all(located: &Located) -> Result<Vec<Found>, Failure> {
    let (all, mut failures) = those_there(located);
    failures.pop().map_or(Ok(all), Err)
}

/// The same, and why some can't be read.
fn those_there(located: &Located) -> (Vec<Found>, Vec<Failure>) {
    let (mut all, mut failures) = (Vec::new(), Vec::new());
    for place in &located.places {
        match open(place) {
            Ok(found) => all.push(found),
            Err(_) if matches!(place.journal.try_exists(), Ok(false)) => {}
            Err(failure) => failures.push(failure),
        }
    }
    (all, failures)
}

fn open(place: &Place) -> Result<Found, Failure> {
    let (journal, corruption) = target::open(&place.journal)?;
    Ok(Found { place: place.clone(), journal, corruption })
}

/// What a view is opened with. No journal is named twice, as their ids are those of a stored view.
pub(super) fn sources(mut journals: impl Iterator<Item = Journal>) -> Option<Sources> {
    Sources::new(journals.next()?, journals.collect())
}

/// A journal as an opening for writing leaves it: what is there and valid is durable, and known to be. Its lock is held only
/// for that: whatever is done with the view may take long, and others may append meanwhile. If a service has it open, as far
/// as it is known to be durable now.
pub(super) fn recovered(found: Found) -> Result<Journal, Failure> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let Found { place, journal, .. } = found;
    let (dir, options) = (&place.journal, JournalOptions::default());
    // Nothing was appended: whatever can't be written at the end is made up for by the next opening.
    let recovered = match journal.role() {
        role @ (Role::Origin | Role::Feed) => {
            let beside = place.views.parent().unwrap_or(dir);
            let remembered = retention::is_remembered(&*fs, beside);
            Appender::open_as(role, &fs, dir, &options, remembered).map(|it| drop(it.close()))
        }
        Role::Mirror => Ingest::open(&fs, dir, &options).and_then(|ingest| {
            let missing = || OpenError::NotFound { path: dir.clone() };
            ingest.ok_or_else(missing).map(|it| drop(it.close()))
        }),
    };
    match recovered {
        Err(OpenError::Locked { .. }) => Ok(journal),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(target::open(dir)?.0),
    }
}
