//! The mark: a durable end that was certainly reached.
//!
//! It is what tells a torn tail from lost data. Two slots, each in a block of its own, are written in turn,
//! without a sync, after each successful sync of the journal; so a mark may be stale or torn (it proves
//! less), but never too new. The highest valid offset counts.

use std::sync::Arc;

use crate::error::{IoContext, IoError};
use crate::format::files::{MARK_FILE_BYTES, MARK_SLOT_BYTES, MARK_SLOT_STRIDE, Mark};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::layout::{Layout, MARK};
use crate::journal::segments::Access;

/// The open mark file and what it says.
#[derive(Debug)]
pub(crate) struct MarkFile {
    file: Arc<dyn File>,
    path: std::path::PathBuf,
    sequence: u64,
}

/// Reads the mark; `None` if there is none, or no slot was ever written completely.
pub(crate) fn read(fs: &dyn Fs, layout: &Layout, access: Access) -> Result<Option<Mark>, IoError> {
    let path = layout.file(MARK);
    let file = match fs.open(&path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(IoError::new("opening", &path, error)),
    };
    if access == Access::Writer {
        // The cache may show what a failed sync has lost: read what the disk holds. The error of the sync
        // itself is of no interest, a mark that is lost proves less and nothing wrong.
        drop(file.sync_data());
        file.drop_cache().context("dropping the cache of", &path)?;
    }
    let mut best: Option<Mark> = None;
    for slot in 0..2 {
        let mut bytes = [0; MARK_SLOT_BYTES];
        let read = fs::read_full_at(&*file, &mut bytes, slot * MARK_SLOT_STRIDE);
        if read.context("reading", &path)? < MARK_SLOT_BYTES {
            continue;
        }
        if let Ok(mark) = Mark::decode(&bytes) {
            let rank = |mark: &Mark| (mark.end.offset, mark.sequence);
            best = Some(best.filter(|known| rank(known) >= rank(&mark)).unwrap_or(mark));
        }
    }
    Ok(best)
}

impl MarkFile {
    /// Opens the file for writing, creating it if it is missing, and at its full size: an earlier attempt may
    /// have ended between its name and its bytes.
    pub(crate) fn open(fs: &dyn Fs, layout: &Layout, sequence: u64) -> Result<Self, IoError> {
        let path = layout.file(MARK);
        let file = match fs.open(&path, OpenMode::Write) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                fs.open(&path, OpenMode::CreateNew).context("creating", &path)?
            }
            opened => opened.context("opening", &path)?,
        };
        let len = file.size().context("measuring", &path)?;
        if len < MARK_FILE_BYTES as u64 {
            fs::write_zeros(&*file, len..MARK_FILE_BYTES as u64).context("writing", &path)?;
            file.sync_data().context("syncing", &path)?;
            fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
        }
        Ok(Self { file, path, sequence })
    }

    /// Writes `mark` into the slot that doesn't hold the newest one. Not synced.
    pub(crate) fn write(&mut self, mark: Mark) -> Result<(), IoError> {
        self.sequence += 1;
        let bytes = Mark { sequence: self.sequence, ..mark }.encode();
        let at = (self.sequence % 2) * MARK_SLOT_STRIDE;
        fs::write_all_at(&*self.file, &bytes, at).context("writing", &self.path)
    }

    /// Writes and syncs `mark`.
    pub(crate) fn write_synced(&mut self, mark: Mark) -> Result<(), IoError> {
        self.write(mark)?;
        self.sync()
    }

    /// Replaces both slots, one after the other, so that a lower end counts. Done before anything is cut.
    pub(crate) fn lower(&mut self, mark: Mark) -> Result<(), IoError> {
        self.write_synced(mark)?;
        self.write_synced(mark)
    }

    pub(crate) fn sync(&self) -> Result<(), IoError> {
        self.file.sync_data().context("syncing", &self.path)
    }

    pub(crate) fn file(&self) -> Arc<dyn File> {
        Arc::clone(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_only_begun_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        for len in [0, 1, MARK_SLOT_STRIDE + 1] {
            let begun = std::fs::File::create(layout.file(MARK)).unwrap();
            begun.set_len(len).unwrap();
            MarkFile::open(&fs::os::OsFs, &layout, 0).unwrap();
            assert_eq!(begun.metadata().unwrap().len(), MARK_FILE_BYTES as u64);
        }
    }
}
