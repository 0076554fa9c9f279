//! The disk seam: the few file operations that journals need, as traits.
//!
//! [`os`] implements them on real files; `sim` on a disk in memory that remembers what was synced and, at a
//! simulated crash, loses, tears and reorders the rest (for tests of services: `testing::MemoryDisk`, feature
//! `testing`). Everything in the journal goes through here, so that every rule about durability can be tested
//! against a disk that exploits it.
//!
//! The contract, which is POSIX at its most unhelpful:
//! - What was written may reach the disk in any order, sector by sector, or not at all, until a successful
//!   [`File::sync_data`]; a file's length likewise.
//! - A created, renamed or removed name may be lost until a successful [`Fs::sync_dir`] of its directory.
//! - After a *failed* sync the cache may show data that the disk does not hold, and a second sync may
//!   succeed without writing it.
//! - `read_at` and `write_at` may be interrupted (`EINTR`) before they do anything; everything here that
//!   calls them repeats. Nothing else is interrupted.
//! - `write_at` may write fewer bytes than asked; bytes outside the written range are left alone.

use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

pub mod os;
#[cfg(all(test, feature = "test-kit"))]
pub(crate) mod routed;
#[cfg(feature = "test-kit")]
pub mod sim;
#[cfg(all(feature = "testing", not(feature = "test-kit")))]
#[allow(dead_code, unreachable_pub, reason = "some of it serves only the tests of this crate")]
pub(crate) mod sim;

/// How [`Fs::open`] opens a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenMode {
    /// For reading; the file must exist.
    Read,
    /// For reading and writing; the file must exist.
    Write,
    /// For reading and writing; the file must not exist yet.
    CreateNew,
}

/// How [`File::allocate`] makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Blocks that hold zeros: writing into them changes nothing but them.
    Zeros,
    /// Blocks that only count as zeros: quicker to have, but the first write into each costs the file
    /// system an entry in its own journal.
    Blocks,
}

/// A file system: names, directories and locks.
pub trait Fs: Debug + Send + Sync + 'static {
    /// Creates `dir` and its missing parents, and syncs the names of all of them, also of those that were
    /// there. Succeeds if it is there. A directory whose name can't be synced is removed again, also one that was
    /// there, if it is empty.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// The names of the entries in `dir`, sorted; [`io::ErrorKind::NotFound`] if there is no such directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;
    /// Renames a file, replacing what bears the new name; atomic, durable once the directory is synced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Takes the exclusive lock file `path`, creating it if needed, and writes `owner` into it,
    /// if there is space for it.
    /// The outer error is of the file system; the inner one says who holds the lock.
    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>>;
    /// How many bytes can still be written below `dir`; `None` if that can't be told.
    fn free_bytes(&self, _dir: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// How many bytes the volume has below which `dir` is, used or not; `None` if that can't be told.
    fn volume_bytes(&self, _dir: &Path) -> io::Result<Option<u64>> {
        Ok(None)
    }
    /// The time by the clock of the machine that has the files, in microseconds since 1970: what events are recorded
    /// with. Information only.
    fn now_us(&self) -> i64 {
        crate::env::now_us()
    }
}

/// An open file. All methods take `&self`; the caller keeps writers apart.
pub trait File: Debug + Send + Sync + 'static {
    /// Reads up to `buf.len()` bytes at `offset`; 0 at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes up to `buf.len()` bytes at `offset`, growing the file if needed; may write fewer.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;
    /// Length in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Allocates the first `len` bytes of an empty file, which then read as zeros; `false` if that can't be
    /// had without writing them.
    fn allocate(&self, _len: u64, _how: Allocate) -> io::Result<bool> {
        Ok(false)
    }
    /// Cuts or grows the file; a grown part reads as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes data and length durable (`fdatasync`).
    fn sync_data(&self) -> io::Result<()>;
    /// Drops the file's clean pages from the page cache, so that later reads come from the disk.
    /// An effort, not a promise.
    fn drop_cache(&self) -> io::Result<()>;
}

/// Held for as long as it lives.
pub trait Lock: Debug + Send + Sync {}

/// Another process (or another handle in this one) holds the lock; what it wrote into the lock file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockHeld {
    /// The text that the owner wrote: process id and name.
    pub owner: String,
}

/// Reads exactly `buf.len()` bytes, or fails with [`io::ErrorKind::UnexpectedEof`].
pub(crate) fn read_exact_at(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let read = read_full_at(file, buf, offset)?;
    if read < buf.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Reads until `buf` is full or the file ends; how many bytes were read.
pub(crate) fn read_full_at(file: &dyn File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes all of `buf`; a short write is continued, an interrupted one repeated.
pub(crate) fn write_all_at(file: &dyn File, buf: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buf.get(done..).filter(|rest| !rest.is_empty()) {
        match file.write_at(rest, offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes zeros over `range` (file offsets), in pieces.
pub(crate) fn write_zeros(file: &dyn File, range: std::ops::Range<u64>) -> io::Result<()> {
    const PIECE: usize = 256 * 1024;
    static ZEROS: [u8; PIECE] = [0; PIECE];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).map_or(PIECE, |rest| rest.min(PIECE));
        write_all_at(file, ZEROS.get(..len).unwrap_or(&ZEROS), at)?;
        at += len as u64;
    }
    Ok(())
}
