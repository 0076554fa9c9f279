//! Files of which some lie elsewhere, for tests of this crate.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{File, Fs, Lock, LockHeld, OpenMode};

/// Asks in front of every operation on a path where that lies.
pub(crate) struct Routed(pub(crate) Box<dyn Fn(&Path) -> Arc<dyn Fs> + Send + Sync>);

impl fmt::Debug for Routed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Routed")
    }
}

impl Fs for Routed {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        (self.0)(dir).create_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        (self.0)(dir).list(dir)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        (self.0)(path).open(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.0)(from).rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        (self.0)(path).remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        (self.0)(dir).sync_dir(dir)
    }

    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
        (self.0)(path).lock(path, owner)
    }
}
