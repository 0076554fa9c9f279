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

/// Where the journals with these ids are: of one journal, the one beside the view, whichever it is by now.
pub(super) fn find(located: &Located, ids: &[JournalId]) -> Result<Vec<Found>, Failure> {
    let open = |place: &Place| -> Result<Found, Failure> {
        let (journal, corruption) = target::open(&place.journal)?;
        Ok(Found { place: place.clone(), journal, corruption })
    };
    if ids.len() <= 1 {
        return Ok(vec![open(&located.place)?]);
    }
    let mut all: Vec<Found> = located.places.iter().filter_map(|place| open(place).ok()).collect();
    let take = |id: &JournalId| {
        let at = all.iter().position(|found| found.journal.id() == *id);
        let dir = located.place.journal.clone();
        let missing = || ViewFailure::NoJournal { journal: *id, dir };
        Ok(all.swap_remove(at.ok_or_else(missing)?))
    };
    ids.iter().map(take).collect()
}

/// What a view is opened with. No journal is named twice, as their ids are those of a stored view.
pub(super) fn sources(mut journals: impl Iterator<Item = Journal>) -> Option<Sources> {
    Sources::new(journals.next()?, journals.collect())
}

/// A journal, as it can be had.
pub(super) enum Held {
    Origin(Appender),
    Mirror(Box<Ingest>),
    /// A service has it open: as far as it is known to be durable now.
    Beside(Journal),
}

impl Held {
    pub(super) fn open(found: Found) -> Result<Self, Failure> {
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let Found { place, journal, .. } = found;
        let (dir, options) = (&place.journal, JournalOptions::default());
        let opened = match journal.role() {
            Role::Origin => {
                let beside = place.views.parent().unwrap_or(dir);
                let remembered = retention::is_remembered(&*fs, beside);
                Appender::open(&fs, dir, &options, remembered).map(Self::Origin)
            }
            Role::Mirror => Ingest::open(&fs, dir, &options).and_then(|ingest| {
                ingest
                    .map(|it| Self::Mirror(Box::new(it)))
                    .ok_or_else(|| OpenError::NotFound { path: dir.clone() })
            }),
        };
        match opened {
            Err(OpenError::Locked { .. }) => Ok(Self::Beside(journal)),
            opened => Ok(opened?),
        }
    }

    pub(super) fn journal(&self) -> &Journal {
        match self {
            Self::Origin(appender) => appender.journal(),
            Self::Mirror(ingest) => ingest.journal(),
            Self::Beside(journal) => journal,
        }
    }

    /// Nothing was appended: whatever can't be written at the end is made up for by the next opening.
    pub(super) fn close(self) {
        match self {
            Self::Origin(appender) => drop(appender.close()),
            Self::Mirror(ingest) => drop(ingest.close()),
            Self::Beside(_) => {}
        }
    }
}
