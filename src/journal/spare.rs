//! The file of the next segment, from nothing to ready.
//!
//! ```text
//!            create              fill, sync: piece by piece           sync its name
//!  Nothing ─────────▶ Begun ─────────────────────────────▶ Begun ───────────────────▶ Ready ── taken ──▶ its user's
//!     ▲                 │ a step failed
//!     ├──── removed ────┤
//!     └─ removed ─ LeftOver (it could not be removed)
//! ```
//! - Only a file that was created here is written here: creating fails if there is one, and what a failed
//!   attempt left is removed first. So a name whose sync failed is always made anew, never synced again.
//! - Whoever takes a step has the place to himself: it is [`Place::Busy`] for everybody else. A spare is taken
//!   by value, so that nothing of it stays behind.
//! - A failure is clean: nothing refers to the file yet.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{IoContext, IoError};
use crate::fs::{self, Allocate, File, Fs, OpenMode};
use crate::journal::layout::Layout;
use crate::planted::{self, Bug};

/// A step fills and syncs so much, so that a commit never waits for more.
const PIECE_BYTES: u64 = 512 << 10;

/// A file that reads as zeros, durable under its name, that no header describes yet.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) number: u64,
    pub(crate) file: Arc<dyn File>,
    pub(crate) path: PathBuf,
    pub(crate) capacity_bytes: u64,
}

/// What there is under the name of the next segment.
#[derive(Debug)]
pub(crate) enum Place {
    Nothing,
    /// What an attempt of ours made that failed, and that could not be removed.
    LeftOver,
    Begun(Begun),
    Ready(Spare),
    /// Somebody takes a step.
    Busy,
}

/// A file of ours; zeros and durable up to `filled_bytes`.
#[derive(Debug)]
pub(crate) struct Begun {
    file: Arc<dyn File>,
    filled_bytes: u64,
    capacity_bytes: u64,
}

/// Where and how the next segment is made.
#[derive(Debug)]
pub(crate) struct Maker<'a> {
    pub(crate) fs: &'a dyn Fs,
    pub(crate) layout: &'a Layout,
    pub(crate) number: u64,
    /// Of a file that has yet to be begun.
    pub(crate) capacity_bytes: u64,
    pub(crate) allocate: Allocate,
}

impl Maker<'_> {
    /// One step further. Behind a failure there is nothing, or what could not be removed.
    pub(crate) fn step(&self, place: Place) -> (Place, Result<(), IoError>) {
        let path = self.layout.segment(self.number);
        let (place, done) = match place {
            Place::Nothing => self.begin(&path),
            Place::LeftOver => remove(self.fs, &path),
            Place::Begun(begun) if begun.filled_bytes < begun.capacity_bytes => {
                self.fill(begun, &path)
            }
            Place::Begun(begun) => self.name(begun, &path),
            Place::Ready(_) | Place::Busy => (place, Ok(())),
        };
        (place, done.context("preparing", &path))
    }

    fn begin(&self, path: &Path) -> (Place, io::Result<()>) {
        match self.fs.open(path, OpenMode::CreateNew) {
            Ok(file) => {
                let begun = Begun { file, filled_bytes: 0, capacity_bytes: self.capacity_bytes };
                (Place::Begun(begun), Ok(()))
            }
            Err(error) => (Place::Nothing, Err(error)),
        }
    }

    fn fill(&self, mut begun: Begun, path: &Path) -> (Place, io::Result<()>) {
        match begun.fill_more(self.allocate) {
            Ok(()) => (Place::Begun(begun), Ok(())),
            Err(error) => (remove(self.fs, path).0, Err(error)),
        }
    }

    fn name(&self, begun: Begun, path: &Path) -> (Place, io::Result<()>) {
        let synced = match planted::is(Bug::NoDirectorySync) {
            true => Ok(()),
            false => self.fs.sync_dir(&self.layout.dir),
        };
        match synced {
            Ok(()) => {
                let Begun { file, capacity_bytes, .. } = begun;
                let (number, path) = (self.number, path.to_owned());
                (Place::Ready(Spare { number, file, path, capacity_bytes }), Ok(()))
            }
            // It might stay lost though a second sync succeeds.
            Err(error) if planted::is(Bug::NameSyncedAgain) => (Place::Begun(begun), Err(error)),
            Err(error) => (remove(self.fs, path).0, Err(error)),
        }
    }
}

impl Begun {
    fn fill_more(&mut self, allocate: Allocate) -> io::Result<()> {
        let from = self.filled_bytes;
        let mut to = self.capacity_bytes;
        if from > 0 || !self.file.allocate(to, allocate)? {
            to = to.min(from + PIECE_BYTES);
            fs::write_zeros(&*self.file, from..to)?;
        }
        self.file.sync_data()?;
        self.filled_bytes = to;
        Ok(())
    }
}

impl Spare {
    /// The same file on its way to being larger.
    pub(crate) fn enlarge(self, capacity_bytes: u64) -> Place {
        let Self { file, capacity_bytes: filled_bytes, .. } = self;
        Place::Begun(Begun { file, filled_bytes, capacity_bytes })
    }
}

impl Place {
    /// Removes what nobody took.
    pub(crate) fn give_up(self, fs: &dyn Fs, path: &Path) {
        if !matches!(self, Self::Nothing) {
            // An effort: the next opening removes what bears the name and has no header.
            drop(fs.remove(path));
        }
    }
}

fn remove(fs: &dyn Fs, path: &Path) -> (Place, io::Result<()>) {
    match fs.remove(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => (Place::LeftOver, Err(error)),
        _ => (Place::Nothing, Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;

    #[test]
    fn a_spare_is_filled_piece_by_piece_and_grows() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        std::fs::create_dir_all(&layout.dir).unwrap();
        let maker = |capacity_bytes| Maker {
            fs: &OsFs,
            layout: &layout,
            number: 7,
            capacity_bytes,
            allocate: Allocate::Zeros,
        };
        let ready = |mut place, capacity_bytes| {
            loop {
                let (next, done) = maker(capacity_bytes).step(place);
                done.unwrap();
                match next {
                    Place::Ready(spare) => return spare,
                    next => place = next,
                }
            }
        };
        let size = PIECE_BYTES * 2 + 4096;
        let spare = ready(Place::Nothing, size);
        assert_eq!((spare.number, spare.capacity_bytes), (7, size));
        assert_eq!(std::fs::read(&spare.path).unwrap(), vec![0; size as usize]);
        let spare = ready(spare.enlarge(size * 2), size);
        assert_eq!(spare.capacity_bytes, size * 2);
        assert_eq!(std::fs::read(&spare.path).unwrap(), vec![0; size as usize * 2]);

        // What is there already isn't ours.
        let (place, done) = maker(size).step(Place::Nothing);
        assert!(matches!(place, Place::Nothing));
        assert_eq!(done.unwrap_err().source.kind(), ErrorKind::AlreadyExists);
        assert!(spare.path.exists());
        let path = spare.path.clone();
        Place::Ready(spare).give_up(&OsFs, &path);
        assert!(!path.exists());
    }
}
