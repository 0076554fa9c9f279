//! Which generations of a view are open.
//!
//! RocksDB opens a database once, and closing it takes time: it is over when the last one who reads it has let go *and*
//! its files are closed. Whoever wants to open or delete it waits for that or leaves it to the one who closes. Until then
//! the version stays locked: the one who closes may delete a folder, which must not be another process's by then.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

use super::db::{Db, StorageError, ViewMemory};
use super::error::ViewError;
use super::generation::remove_folder;
use crate::fs::Lock;

/// The databases that a view has open, by folder.
pub(super) struct Openings {
    open: Mutex<HashMap<PathBuf, Opening>>,
    closed: Condvar,
    /// Of the version. Every open database holds on to this, and so to the lock.
    _lock: Arc<dyn Lock>,
}

struct Opening {
    db: Weak<Db>,
    /// The folder goes away when it is closed.
    is_doomed: bool,
}

/// A part of the database that is dropped when it has been closed.
pub(super) struct Closing {
    openings: Arc<Openings>,
    path: PathBuf,
}

impl Openings {
    /// Of a version that is locked.
    pub(super) fn new(lock: Arc<dyn Lock>) -> Self {
        Self { open: Mutex::default(), closed: Condvar::new(), _lock: lock }
    }

    /// Opens the database at `path`, or finds it open. If it is just being closed, waits for that.
    pub(super) fn open(
        self: &Arc<Self>,
        path: &Path,
        memory: &ViewMemory,
    ) -> Result<Arc<Db>, StorageError> {
        let mut open = self.open.lock();
        while let Some(opening) = open.get(path) {
            match opening.db.upgrade() {
                Some(db) => return Ok(db),
                None => self.closed.wait(&mut open),
            }
        }
        let db = Db::open(path, memory)?; // under the lock, so that nobody else opens it
        let closing = Closing { openings: Arc::clone(self), path: path.to_owned() };
        let db = Arc::new(db.with_closing(closing));
        open.insert(path.to_owned(), Opening { db: Arc::downgrade(&db), is_doomed: false });
        Ok(db)
    }

    /// Deletes the database at `path`, now or when it is closed.
    pub(super) fn delete(&self, path: &Path) -> Result<(), ViewError> {
        match self.open.lock().get_mut(path) {
            Some(opening) => {
                opening.is_doomed = true;
                Ok(())
            }
            None => remove_folder(path),
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut open = self.openings.open.lock();
        if open.remove(&self.path).is_some_and(|opening| opening.is_doomed) {
            // An effort: the folder is marked or has lost its name, and the next opening of the view deletes it.
            drop(remove_folder(&self.path));
        }
        self.openings.closed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::generation::Generations;
    use super::*;
    use crate::fs::os::OsFs;

    /// Or else the next process makes a generation under the same name, and it is deleted under its feet.
    #[test]
    fn a_version_stays_locked_until_what_was_doomed_while_it_was_read_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let lock = || Generations::open(Arc::new(OsFs), dir.path(), "orders", 1);
        let generations = lock().unwrap();
        let openings = Arc::new(Openings::new(generations.lock()));
        let (_, path) = generations.begin().unwrap();
        let read = openings.open(&path, &ViewMemory::default()).unwrap();
        openings.delete(&path).unwrap();
        drop((openings, generations));
        assert!(matches!(lock(), Err(ViewError::InUse { .. })));
        assert!(path.exists());
        drop(read);
        assert!(!path.exists());
        assert_eq!(lock().unwrap().begin().unwrap().1, path);
    }
}
