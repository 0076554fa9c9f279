//! Backup: a copy of a journal that may be written meanwhile.
//!
//! A backup is a directory with segments and without `node` and `mark`: readable, verifiable, not writable.
//! It ends at the durable end of the moment at which it was begun, and every batch was verified on the way.
//! Repeating it into the same directory copies what is new; an interrupted one is repeated likewise.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{IoContext, IoError, OpenError, ReadError};
use crate::format::batch::Link;
use crate::fs::Fs;
use crate::journal::copy::{self, CopyError};
use crate::journal::layout;
use crate::journal::{Journal, Locked};
use crate::position::{Checkpoint, Position};

/// What [`Journal::backup`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupReport {
    /// Where the backup ends: everything in front of it is in the directory, durably.
    pub end: Checkpoint,
    /// How many segments it has in common with the journal.
    pub segments: u64,
    /// Bytes that were written now.
    pub written_bytes: u64,
}

/// Why a backup wasn't completed. What an earlier backup left in the directory is not harmed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The directory can't be used: a file operation failed, or another backup runs.
    #[error(transparent)]
    Target(#[from] OpenError),
    /// The directory is a journal of its own, or holds a restore that was begun.
    #[error("{}: belongs to a journal, not to a backup", path.display())]
    NotABackup {
        /// The file that shows it.
        path: PathBuf,
    },
    /// The directory holds the backup of another history.
    #[error("{}: holds another history than the journal's, from position {position} at the latest", path.display())]
    Differs {
        /// The file in which that shows.
        path: PathBuf,
        /// Where it begins to differ, or in front of that.
        position: Position,
    },
    /// The backup holds events that the journal doesn't have.
    #[error("{}: the backup goes on behind position {position}, where the journal is known to end", path.display())]
    Ahead {
        /// The file.
        path: PathBuf,
        /// The journal's end, or the last common batch in front of it.
        position: Position,
    },
    /// The backup lacks a segment that lies in front of others.
    #[error("{}: missing or incomplete in the backup", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The journal can't be read, or is damaged.
    #[error(transparent)]
    Read(ReadError),
}

impl BackupError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Target(_) => "backup.target",
            Self::NotABackup { .. } => "backup.not_a_backup",
            Self::Differs { .. } => "backup.differs",
            Self::Ahead { .. } => "backup.ahead",
            Self::Missing { .. } => "backup.missing",
            Self::Read(_) => "backup.read",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Target(_) => "see the cause; repeating the backup is safe",
            Self::NotABackup { .. } => "name a new directory, or one that holds an earlier backup",
            Self::Differs { .. } => {
                "keep it, and back up into a new directory; find out which of the two is the right history"
            }
            Self::Ahead { .. } => {
                "keep it: it may hold the only copy of these events. If the journal is in use, repeat the backup in a moment"
            }
            Self::Missing { .. } => {
                "run `headwater verify` on it, and back up into a new directory"
            }
            Self::Read(_) => {
                "run `headwater verify` on the journal; the backup holds what was whole in front"
            }
        }
    }
}

impl From<CopyError> for BackupError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Io(error) => Self::Target(error.into()),
            CopyError::Source(error) => Self::Read(error),
            CopyError::Differs { path, position } => Self::Differs { path, position },
            CopyError::Ahead { path, position } => Self::Ahead { path, position },
            CopyError::Missing { path } => Self::Missing { path },
        }
    }
}

impl Journal {
    /// Copies everything up to the durable end of this moment into `dir`, which is new, empty, or holds an
    /// earlier backup of this journal; then only what is new is copied. Appending goes on meanwhile.
    ///
    /// Every batch is verified, checksums and chain, before it is written. What was in the directory before
    /// is compared by the header pages (each carries the chain of all that lies in front) and, in its last
    /// segment, batch by batch; [`verify`](crate::verify) reads all of it. When this returns, the backup is
    /// durable, and so is its name. An interrupted backup is repeated.
    ///
    /// Blocks for reading and writing what is copied.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let store = headwater::Store::create(dir.path().join("orders"))?;
    /// let report = store.journal().backup(&dir.path().join("backup"))?;
    /// assert_eq!(report.end, store.journal().end());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn backup(&self, dir: &Path) -> Result<BackupReport, BackupError> {
        let fs = self.0.files.fs();
        let locked = lock(fs, dir)?;
        let end = self.end();
        let to = Link { offset: end.offset, position: end.position, chain: end.chain };
        let copied = copy::copy(self, to, &**fs, &locked.layout)?;
        let (segments, written_bytes) = (copied.segments, copied.written_bytes);
        Ok(BackupReport { end, segments, written_bytes })
    }
}

impl Journal {
    /// A backup of the end only: of the segment that holds the batch in front of `end`, up to there, with a base in place of
    /// what lies in front. `end` is the end of a batch.
    #[cfg(feature = "views")]
    pub(crate) fn copy_end(&self, end: &Checkpoint, dir: &Path) -> Result<(), BackupError> {
        let fs = self.0.files.fs();
        let locked = lock(fs, dir)?;
        copy::copy_behind(self, end, Link::from(*end), &**fs, &locked.layout)?;
        Ok(())
    }
}

/// Takes the directory for this backup alone.
fn lock(fs: &Arc<dyn Fs>, dir: &Path) -> Result<Locked, BackupError> {
    refuse_journal(&**fs, dir)?; // before even a lock file is put there
    let locked = Locked::take(fs, dir)?;
    refuse_journal(&**fs, dir)?;
    Ok(locked)
}

fn refuse_journal(fs: &dyn Fs, dir: &Path) -> Result<(), BackupError> {
    let names = match fs.list(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        listed => {
            listed.context("listing", dir).map_err(|error: IoError| OpenError::from(error))?
        }
    };
    let foreign = [layout::NODE, layout::MARK, layout::INCOMING];
    match names.iter().find(|name| foreign.contains(&name.as_str())) {
        Some(name) => Err(BackupError::NotABackup { path: dir.join(name) }),
        None => Ok(()),
    }
}
