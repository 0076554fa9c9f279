//! The real file system.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{Allocate, File, Fs, Lock, LockHeld, OpenMode};

/// Real files, through the standard library.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFs;

#[derive(Debug)]
struct OsFile(fs::File);

#[derive(Debug)]
struct OsLock(fs::File);

impl Lock for OsLock {}

impl Drop for OsLock {
    /// Closing the file would release the lock too, but not while a process that is just being started
    /// holds a copy of the descriptor.
    fn drop(&mut self) {
        drop(self.0.unlock());
    }
}

impl Fs for OsFs {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let dir = std::path::absolute(dir)?;
        let mut parents: Vec<&Path> = dir.ancestors().collect();
        parents.reverse();
        for pair in parents.windows(2) {
            let [above, dir] = pair else { continue };
            let missing = !dir.is_dir();
            if missing {
                fs::create_dir(dir)?;
            }
            // Also of directories that were there: an earlier attempt may have died in front of its sync,
            // and a name that is lost takes everything below it along.
            match self.sync_dir(above) {
                Err(error) if !missing && error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => {
                    // A failed sync can't be repeated: the next attempt has to make a new name. Also of directories that
                    // were there, if they are empty: an earlier attempt may have died in front of its sync. What lies in
                    // others came after all these names were durable.
                    let inner = parents.iter().rev().take_while(|inner| inner.starts_with(dir));
                    inner.for_each(|inner| drop(fs::remove_dir(inner)));
                    return Err(error);
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            // Names that aren't UTF-8 are nobody's of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(mode != OpenMode::Read).create_new(mode == OpenMode::CreateNew);
        Ok(Arc::new(OsFile(options.open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        fs::File::open(dir)?.sync_all()
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    fn volume_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Some(stat.f_blocks.saturating_mul(stat.f_frsize)))
    }

    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {
                // Over the old name, then cut: a full disk has no block to give for one that was freed. The
                // name is for people; after a power cut it may be gone, and a full disk has no block for a
                // new one either: no reason to keep a store from its recovery.
                let named = file.rewind().and_then(|()| file.write_all(owner.as_bytes()));
                drop(named.and_then(|()| file.set_len(owner.len() as u64)));
                Ok(Ok(Box::new(OsLock(file))))
            }
            Err(fs::TryLockError::WouldBlock) => {
                let mut owner = String::new();
                file.take(256).read_to_string(&mut owner)?;
                Ok(Err(LockHeld { owner }))
            }
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

impl File for OsFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(&self.0, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(&self.0, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocate(&self, len: u64, how: Allocate) -> io::Result<bool> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{FallocateFlags, fallocate};
            // FALLOC_FL_WRITE_ZEROES, since Linux 6.17: the device writes the zeros by itself.
            const WRITE_ZEROES: FallocateFlags = FallocateFlags::from_bits_retain(0x80);
            let flags = match how {
                Allocate::Zeros => WRITE_ZEROES,
                Allocate::Blocks => FallocateFlags::empty(),
            };
            let allocate = || fallocate(&self.0, flags, 0, len);
            match rustix::io::retry_on_intr(allocate) {
                Ok(()) => return Ok(true),
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn drop_cache(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    }
}

/// Who holds the lock file `path`: what the owner wrote into it; `None` if nobody does. Takes it for a moment if so,
/// together with others who only ask.
pub(crate) fn lock_holder(path: &Path) -> io::Result<Option<String>> {
    let file = fs::File::open(path)?;
    match file.try_lock_shared() {
        Ok(()) => {
            drop(file.unlock());
            Ok(None)
        }
        Err(fs::TryLockError::WouldBlock) => {
            let mut owner = Vec::new();
            file.take(256).read_to_end(&mut owner)?;
            let owner = String::from_utf8_lossy(&owner);
            Ok(Some(owner.chars().filter(|c| !c.is_control()).collect()))
        }
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_lock_is_free_even_while_a_started_process_holds_a_copy_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let file = fs::File::create(&path).unwrap();
        file.try_lock().unwrap();
        let inherited = file.try_clone().unwrap();
        let lock = OsLock(file);
        assert!(OsFs.lock(&path, "second").unwrap().is_err());
        drop(lock);
        assert!(OsFs.lock(&path, "second").unwrap().is_ok());
        drop(inherited);
    }
}
