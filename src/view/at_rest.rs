//! A generation as it lies on disk, read beside whoever has it open.
//!
//! ```text
//!  service ── applies ─▶ memory ── flush ─▶ files
//!                                             │ opened for reading, all at once; no lock, nothing written
//!                                             ▼
//!                            bytes of keys, rows, index entries, what is parked
//! ```
//!
//! Invariants:
//! - What is seen is what a crash at that moment would leave: the rows of an exact prefix of the journal, and its
//!   checkpoint. What the service has applied since, and not made durable yet, isn't seen.
//! - Nothing here needs the view's code, but [`check`], which builds the rows again in a folder of its own.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bulk::{Ended, Means};
use super::chunk::panic_message;
use super::db::{
    Db, Progress, Scan, StorageError, ViewMemory, all_parked, behind_parked, behind_prefix,
    index_prefix, parked_range, row_key, unrouted_range,
};
use super::deadly::Note;
use super::error::{StopError, ViewError, ViewReadError};
use super::generation::{lock, remove_folder};
use super::intake::Intake;
use super::poison::{self, Degraded, Head, ParkedCounts, ParkedEvents, ParkedKey, Parking};
use super::program::{Build, Program};
use super::rebuild::{Comparison, RebuildError, RebuildHandle, RebuildOptions, RebuildPhase};
use super::rows::PageToken;
pub(crate) use super::runner::compare as compare_at_rest;
use super::runner::{compare, journal_failed, nothing};
use super::sources::Sources;
use super::takeover::digest_of;
use crate::error::IoContext;
use crate::fs::{Fs, os::OsFs};
use crate::journal;
use crate::position::{Checkpoint, Position};

/// Where a check builds the rows again, in the folder of the view; locked by a file beside it.
const CHECK_FOLDER: &str = "check";
const CHECK_LOCK: &str = "lock.check";

/// A generation that was opened for reading.
pub(crate) struct AtRest {
    db: Arc<Db>,
    progress: Progress,
    indexes: Vec<String>,
    tables: Vec<String>,
}

/// Which rows, or which entries of an index: keys are bytes.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// Rows of the table with this number.
    pub(crate) table: Option<u8>,
    /// Entries of the index with this number.
    pub(crate) index: Option<u8>,
    /// What their keys begin with.
    pub(crate) prefix: Vec<u8>,
    /// The first key.
    pub(crate) from: Option<Vec<u8>>,
    /// The key in front of which it ends.
    pub(crate) to: Option<Vec<u8>>,
    /// From the end to the beginning.
    pub(crate) reverse: bool,
    /// Where the last page ended.
    pub(crate) after: Option<PageToken>,
}

/// A row, or an entry of an index.
pub(crate) struct Found {
    /// Where a page ends that ends with it.
    pub(crate) token: PageToken,
    /// The key of the row; of an index, its own key and behind it that of the row.
    pub(crate) key: Vec<u8>,
    /// The row; nothing of an index.
    pub(crate) row: Box<[u8]>,
}

impl AtRest {
    /// Opens the generation in `folder`; `None` if it hasn't begun.
    pub(crate) fn open(folder: &Path) -> Result<Option<Self>, ViewError> {
        if matches!(folder.join("CURRENT").try_exists(), Ok(false)) {
            return Ok(None);
        }
        let db = Arc::new(Db::open_read_only(folder)?);
        if db.is_empty()? {
            return Ok(None);
        }
        let progress = db.stored_progress(std::iter::empty())?;
        let (indexes, tables) = db.stored_names()?;
        Ok(Some(Self { db, progress, indexes, tables }))
    }

    /// What the rows are of, in each of its journals.
    pub(crate) fn checkpoints(&self) -> Vec<Checkpoint> {
        self.progress.checkpoints.iter().copied().collect()
    }

    /// How many events of its journals it has applied.
    pub(crate) fn events(&self) -> u64 {
        self.progress.checkpoints.events()
    }

    pub(crate) fn skipped_events(&self) -> u64 {
        self.progress.skipped_events
    }

    pub(crate) fn parked_counts(&self) -> ParkedCounts {
        self.progress.parked
    }

    /// The names of the indexes, in the order of their numbers.
    pub(crate) fn indexes(&self) -> &[String] {
        &self.indexes
    }

    /// The names of the tables, in the order of their numbers; none of a keyed view.
    pub(crate) fn tables(&self) -> &[String] {
        &self.tables
    }

    /// The row under `key`, of a table if it has some.
    pub(crate) fn get(
        &self,
        table: Option<u8>,
        key: &[u8],
    ) -> Result<Option<Vec<u8>>, StorageError> {
        let row_key = [&space(table)[..], key].concat();
        Ok(self.db.get(&row_key)?.map(|row| row.to_vec()))
    }

    /// The row under `key`, which an entry of an index names.
    pub(crate) fn row_of_entry(&self, key: &[u8]) -> Result<Vec<u8>, StorageError> {
        self.get(None, key)?.ok_or_else(|| self.db.entry_without_row())
    }

    /// What any row may lack, because they are being made for the first time.
    pub(crate) fn building(&self) -> Result<Option<Degraded>, ViewReadError> {
        poison::building(&self.db.latest())
    }

    /// What the row under `key` lacks.
    pub(crate) fn degraded(&self, key: &[u8]) -> Result<Option<Degraded>, ViewReadError> {
        if let Some(building) = self.building()? {
            return Ok(Some(building));
        }
        let row_key = row_key(|out| out.extend_from_slice(key));
        if let Some(head) = self.db.parked_head(&row_key)? {
            let Head { events, journal, first, reason, .. } = head;
            return Ok(Some(Degraded::Parked { events, journal, first, reason }));
        }
        poison::unrouted(&self.db.latest(), None)
    }

    /// What is wanted, in order.
    pub(crate) fn scan(
        &self,
        wanted: &Wanted,
    ) -> impl Iterator<Item = Result<Found, StorageError>> + use<> {
        let space = wanted.index.map_or_else(|| space(wanted.table), index_prefix);
        let mut scan = self.db.latest().scan(range(&space, wanted));
        if wanted.reverse {
            scan.reverse();
        }
        if let Some(token) = &wanted.after {
            scan.skip_to(token.key());
        }
        let found = move |(key, row): (Box<[u8]>, Box<[u8]>)| Found {
            token: PageToken::behind(&key),
            key: key.get(space.len()..).unwrap_or_default().to_vec(),
            row,
        };
        scan.map(move |entry| entry.map(&found))
    }

    /// The keys that are parked, as bytes, in their order.
    pub(crate) fn parked(
        &self,
    ) -> impl Iterator<Item = Result<ParkedKey<Vec<u8>>, StorageError>> + use<> {
        ParkedHeads { db: Arc::clone(&self.db), scan: self.db.latest().scan(all_parked()) }
    }

    /// What is parked with the row under `key`.
    pub(crate) fn parked_events(&self, key: &[u8]) -> ParkedEvents {
        let row_key = row_key(|out| out.extend_from_slice(key));
        ParkedEvents::new(self.db.latest(), parked_range(&row_key))
    }

    /// The events that couldn't be routed.
    pub(crate) fn unrouted_events(&self) -> ParkedEvents {
        ParkedEvents::new(self.db.latest(), unrouted_range())
    }
}

/// With what the keys of rows begin.
fn space(table: Option<u8>) -> Vec<u8> {
    row_key(|out| out.extend(table))
}

/// Both ends lie within what has the prefix.
fn range(space: &[u8], wanted: &Wanted) -> Range<Vec<u8>> {
    let at = |key: &Vec<u8>| [space, key].concat();
    let first = at(&wanted.prefix);
    let last = behind_prefix(&first);
    let start = wanted.from.as_ref().map(at).unwrap_or_default().max(first);
    let end = wanted.to.as_ref().map_or_else(|| last.clone(), at).min(last);
    start.clone()..end.max(start)
}

/// The heads of the parked keys.
struct ParkedHeads {
    db: Arc<Db>,
    scan: Scan,
}

impl Iterator for ParkedHeads {
    type Item = Result<ParkedKey<Vec<u8>>, StorageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (entry, value) = match self.scan.next()? {
            Ok(entry) => entry,
            Err(error) => return Some(Err(error)),
        };
        // The next key's head.
        self.scan.skip_to(behind_parked(&entry));
        let key = entry.get(1..).unwrap_or_default().to_vec();
        Some(self.db.parked_head_from(&value).map(|head| {
            let Head { events, journal, first, recorded_at_us: since_us, reason } = head;
            ParkedKey { key, events, journal, first, since_us, reason }
        }))
    }
}

/// Builds the rows again in a folder of its own, up to where the generation is, and compares. `dir` is the view's folder,
/// in which no other check may be running; `watched` tells how far it is, and can cancel it.
pub(super) fn check<P: Program>(
    at_rest: &AtRest,
    program: &P,
    sources: &Sources,
    dir: &Path,
    options: &RebuildOptions,
    watched: &RebuildHandle,
) -> Result<Comparison, RebuildError> {
    let check = || {
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let _lock = lock(&*fs, &dir.join(CHECK_LOCK))?;
        let scratch = Scratch::new(&*fs, dir.join(CHECK_FOLDER))?;
        // Refuses the rows of another view, or of another shape; writes nothing, as there are some.
        let progress = at_rest.db.begin(&program.identity(), nothing(sources));
        let until = progress.map_err(ViewError::from)?.checkpoints;
        if !until.are_of(sources.ids()) {
            return Err(ViewError::NotJudged { view: P::NAME }.into());
        }
        for (journal, checkpoint) in sources.iter().zip(until.iter()) {
            match compare(journal, checkpoint).map_err(journal_failed::<P>)? {
                journal::Comparison::Equal => {}
                _ => return Err(ViewError::NotJudged { view: P::NAME }.into()),
            }
        }
        let views_dir = dir.parent().unwrap_or(dir);
        let intake = Intake::read_only(&fs, views_dir, sources)?;
        let unordered = ViewError::Unordered { view: P::NAME };
        let intake = &intake.ok_or_else(|| unordered.clone())?;
        if !intake.leads_to(&until)? {
            return Err(unordered.into());
        }
        let position = Position::new(until.events());
        let memory = &ViewMemory::default();
        let db = &Arc::new(Db::open(&scratch.0, memory).map_err(ViewError::from)?);
        let decided = Parking::open(fs, dir, P::VERSION)?.discarded();
        let (means, control) = (Means::of(options, decided), watched.control());
        let note = &Note::nowhere();
        let what = Build { sources, intake, until, db, memory, means, control, note };
        let built = program.build(what);
        built.map_err(|ended| match ended {
            Ended::Cancelled => RebuildError::Cancelled,
            Ended::Failed(error) => error.into(),
        })?;
        control.pass_begins(RebuildPhase::Comparing, 0);
        let served = digest_of(P::NAME, &at_rest.db.latest(), Some(control))?;
        let built = digest_of(P::NAME, &db.latest(), Some(control))?;
        Ok(Comparison { position, served, built })
    };
    catch_unwind(AssertUnwindSafe(check)).unwrap_or_else(|panic| {
        let message = panic_message(&*panic);
        Err(StopError::Panic { view: P::NAME, message }.into())
    })
}

/// A folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    /// Deletes first what a process that died has left.
    fn new(fs: &dyn Fs, folder: PathBuf) -> Result<Self, ViewError> {
        remove_folder(&folder)?;
        fs.create_dir_all(&folder).context("creating a folder for the check", &folder)?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // An effort: the next check deletes it, too.
        drop(remove_folder(&self.0));
    }
}
