//! The folder of a view: which generation of it serves which version.
//!
//! ```text
//! views/.intake/   what views over the same journals have in common; see `intake`
//! views/<name>/
//!   lock.1         held as long as version 1 is open
//!   lock           held while the pointer is replaced
//!   live           the pointer: which generation each version reads
//!   discarded.2    what version 2 leaves out by decision; see `poison`
//!   folding.1      what version 1 is at work on, and deadly.1, what the process has died of; see `deadly`
//!   1.1/           RocksDB of version 1, first generation
//!   1.2/           the second one, built anew because the first was of another history
//!   1.3.gone/      what is left of one that is being deleted
//!   2.1/           version 2
//!
//! live             headwater view 1        a text of lines: the layout of this file,
//!                  1 2                     version and generation, …,
//!                  2 1
//!                  crc32 5f3c9a01          checksum of the lines above
//! ```
//!
//! Invariants:
//! - The pointer is replaced by writing a new one, syncing it and renaming it: at any moment it is the old
//!   or the new one. A flip to another generation is this and nothing else.
//! - A pointed-to folder may be missing: then the generation is empty, and is built from the journal.
//! - A generation that is being built, or deleted while somebody still reads it, is marked as one that isn't kept; the
//!   mark goes before the pointer comes, and that comes when there is something to be read: rows that were built in bulk,
//!   or the checkpoint at the beginning of those that come in order. So a first build that is cancelled or dies leaves
//!   its version without a live generation, as it was. The next opening deletes what is marked and not pointed to.
//! - A generation is deleted under another name, that of none: what a kill leaves of it is never taken for a generation, and
//!   the next opening of the view, of whichever version, deletes it.
//! - A generation that is no longer pointed to is *set aside*: nothing reads or deletes it without being
//!   asked to.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::db::Stored;
use super::error::ViewError;
use crate::error::{IoContext, IoError};
use crate::format::crc32;
use crate::fs::{Fs, Lock, OpenMode, read_exact_at, write_all_at};

/// Held for a moment, while the pointer is replaced.
const LOCK_FILE: &str = "lock";
const POINTER_FILE: &str = "live";
/// In the folder of a generation that is being built, or is being deleted.
const NOT_KEPT_FILE: &str = "not-kept";
/// Behind the name of a generation that is being deleted.
const GONE: &str = ".gone";
const POINTER_NEW_FILE: &str = "live.new";
const POINTER_HEAD: &str = "headwater view 1";
const POINTER_BYTES_MAX: u64 = 1 << 20;
/// How long, and how often, it is tried to lock what others hold for a moment.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_TICK: Duration = Duration::from_millis(10);
/// Longest name of a view in bytes.
pub(super) const NAME_BYTES_MAX: usize = 64;

/// A view's name is the name of its folder.
pub(crate) fn is_valid_name(name: &str) -> bool {
    let plain = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
    };
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(plain)
}

/// The locked folder of a view.
#[derive(Debug)]
pub(crate) struct Generations {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    /// The version that is open, and the only one that is changed here.
    version: u32,
    live: Option<u32>,
    /// Held as long as a database of the version is open, too; see [`Openings`](super::openings::Openings).
    lock: Arc<dyn Lock>,
}

/// A generation of a view, as it lies on disk.
#[derive(Clone, Debug)]
pub(crate) struct Generation {
    pub(crate) version: u32,
    pub(crate) number: u32,
    /// It is the one that its version reads.
    pub(crate) live: bool,
    is_kept: bool,
    folder: PathBuf,
}

impl Generation {
    /// Where its database is.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether it is being built or deleted, or was when its process died.
    pub(crate) const fn is_not_kept(&self) -> bool {
        !self.is_kept
    }

    /// Whether it is gone by now, or is being deleted.
    #[cfg(feature = "cli")]
    pub(crate) fn is_going(&self) -> bool {
        !is_kept(&self.folder) || !self.folder.exists()
    }

    /// How far it has come with `journal`, durably. Changes nothing, and may run
    /// beside the process that has it open, which may be further on in memory.
    pub(crate) fn checkpoint(&self, journal: crate::JournalId) -> Result<Stored, ViewError> {
        if matches!(self.folder.join("CURRENT").try_exists(), Ok(false)) {
            return Ok(Stored::Nothing); // a missing generation is an empty one; one that can't be looked into isn't
        }
        let stored = super::db::stored_checkpoint(&self.folder, journal)?;
        self.sync()?;
        Ok(stored)
    }

    /// What was read may lie in the page cache only: its process may have ended in front of its sync, or be
    /// in it. Files that are gone by now are in none that was read, or others have taken their place.
    fn sync(&self) -> Result<(), IoError> {
        let fs = crate::fs::os::OsFs;
        let names = fs.list(&self.folder).context("listing", &self.folder)?;
        for path in names.iter().map(|name| self.folder.join(name)) {
            match fs.open(&path, OpenMode::Read).and_then(|file| file.sync_data()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                synced => synced.context("syncing", &path)?,
            }
        }
        fs.sync_dir(&self.folder).context("syncing", &self.folder)
    }
}

/// The file that is locked as long as a version of the view in this folder is open.
#[cfg(feature = "cli")]
pub(crate) fn version_lock(dir: &Path, version: u32) -> PathBuf {
    dir.join(format!("{LOCK_FILE}.{version}"))
}

/// The generations in the folder of a view, without locking it.
pub(crate) fn generations(dir: &Path) -> Result<Vec<Generation>, ViewError> {
    generations_in(&crate::fs::os::OsFs, dir)
}

fn generations_in(fs: &dyn Fs, dir: &Path) -> Result<Vec<Generation>, ViewError> {
    let names = fs.list(dir).context("listing the view's directory", dir)?;
    let known = |name: &String| {
        let (version, number) = parse_name(name)?;
        let folder = dir.join(name);
        Some(Generation { version, number, live: false, is_kept: is_kept(&folder), folder })
    };
    let known: Vec<_> = names.iter().filter_map(known).collect();
    // The marks first, as they go before the pointer comes: what becomes live meanwhile isn't taken for one that is set aside.
    let live = read_pointer(fs, &dir.join(POINTER_FILE))?;
    let is_live = |it: &Generation| live.get(&it.version) == Some(&it.number);
    Ok(known.into_iter().map(|it| Generation { live: is_live(&it), ..it }).collect())
}

/// Version and number.
fn parse_name(name: &str) -> Option<(u32, u32)> {
    let (version, number) = name.split_once('.')?;
    Some((version.parse().ok()?, number.parse().ok()?))
}

impl Generations {
    /// Opens the folder of the view `name`, creating it if there is none, and locks it for `version`.
    pub(crate) fn open(
        fs: Arc<dyn Fs>,
        views_dir: &Path,
        name: &str,
        version: u32,
    ) -> Result<Self, ViewError> {
        let dir = views_dir.join(name);
        fs.create_dir_all(&dir).context("creating the view's directory", &dir)?;
        let lock = lock(&*fs, &dir.join(format!("{LOCK_FILE}.{version}")))?.into();
        let live = read_pointer(&*fs, &dir.join(POINTER_FILE))?.get(&version).copied();
        let opened = Self { fs, dir, version, live, lock };
        opened.remove_gone()?;
        opened.remove_not_kept()?;
        Ok(opened)
    }

    /// Deletes a generation that isn't live and isn't open. `false` if there is none.
    #[cfg(feature = "cli")]
    pub(crate) fn remove(&self, number: u32) -> Result<bool, ViewError> {
        let forgotten = self.forget(number)?;
        forgotten.map_or(Ok(false), |folder| remove_folder(&folder).map(|()| true))
    }

    /// Deletes a generation that isn't open, also the one that the version reads: it reads `instead` then, which was live
    /// before, if that is named.
    #[cfg(feature = "cli")]
    pub(crate) fn remove_even_live(
        &mut self,
        number: u32,
        instead: Option<u32>,
    ) -> Result<(), ViewError> {
        if self.live != instead && self.live.is_none_or(|live| live == number) {
            self.point_to(instead)?;
        }
        remove_folder(&self.dir.join(format!("{}.{number}", self.version)))
    }

    /// What keeps others from opening the version, as long as it lives.
    pub(super) fn lock(&self) -> Arc<dyn Lock> {
        Arc::clone(&self.lock)
    }

    /// The folder of the live generation, if there is one.
    pub(super) fn live(&self) -> Result<Option<PathBuf>, ViewError> {
        Ok(self.live.map(|number| self.folder(number)).transpose()?)
    }

    /// The folder of a new generation, beside the live one if there is one: [`set_live`](Self::set_live) makes it the
    /// live one. Until then it isn't kept: it goes away at the next opening if its process dies.
    pub(super) fn begin(&self) -> Result<(u32, PathBuf), ViewError> {
        const ACTION: &str = "creating the generation's directory";
        let number = self.last_used()?.saturating_add(1);
        let name = format!("{}.{number}", self.version);
        let (folder, unmarked) = (self.dir.join(&name), self.dir.join(name + GONE));
        // Killed before it is marked, it has a name that is no generation's.
        remove_all(&unmarked).context(ACTION, &unmarked)?;
        self.fs.create_dir_all(&unmarked).context(ACTION, &unmarked)?;
        self.keep_no_longer(&unmarked)?;
        self.fs.rename(&unmarked, &folder).context(ACTION, &folder)?;
        self.fs.sync_dir(&self.dir).context(ACTION, &self.dir)?;
        Ok((number, folder))
    }

    /// Points to a generation that [`begin`](Self::begin) has begun, or that was live before.
    pub(super) fn set_live(&mut self, number: u32) -> Result<(), ViewError> {
        let folder = self.folder(number)?;
        let mark = folder.join(NOT_KEPT_FILE);
        match self.fs.remove(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.fs.sync_dir(&folder),
        }
        .context("finishing a generation", &mark)?;
        self.point_to(Some(number))
    }

    /// Points to none any more: the live generation is set aside.
    pub(super) fn set_none_live(&mut self) -> Result<(), ViewError> {
        self.point_to(None)
    }

    /// Where its files are.
    pub(super) const fn fs(&self) -> &Arc<dyn Fs> {
        &self.fs
    }

    /// Whether the live generation has a database; one that was deleted by hand has none.
    pub(super) fn has_live_rows(&self) -> bool {
        let folder = |number| self.dir.join(format!("{}.{number}", self.version));
        self.live
            .is_some_and(|number| !matches!(folder(number).join("CURRENT").try_exists(), Ok(false)))
    }

    /// The number of the live generation.
    pub(super) const fn live_number(&self) -> Option<u32> {
        self.live
    }

    /// All generations of all versions that have a folder and are kept.
    pub(super) fn all(&self) -> Result<Vec<Generation>, ViewError> {
        Ok(generations(&self.dir)?.into_iter().filter(|it| !it.is_not_kept()).collect())
    }

    /// The folder of a generation that was live before.
    pub(super) fn existing(&self, number: u32) -> Result<PathBuf, ViewError> {
        let folder = self.dir.join(format!("{}.{number}", self.version));
        self.find(self.version, number)?
            .map(|it| it.folder)
            .ok_or(ViewError::NoGeneration { folder })
    }

    /// Forgets a generation that isn't live: its folder is to be deleted when nobody has it open any more.
    /// `None` if there is none.
    pub(super) fn forget(&self, number: u32) -> Result<Option<PathBuf>, ViewError> {
        match self.find(self.version, number)? {
            None => Ok(None),
            Some(Generation { live: true, folder, .. }) => Err(ViewError::Live { folder }),
            Some(Generation { folder, .. }) => {
                self.keep_no_longer(&folder)?;
                Ok(Some(folder))
            }
        }
    }

    /// Deletes a generation of another version, which isn't open. `false` if there is none.
    pub(super) fn remove_other(&self, version: u32, number: u32) -> Result<bool, ViewError> {
        let _lock = lock(&*self.fs, &self.dir.join(format!("{LOCK_FILE}.{version}")))?;
        match self.find(version, number)? {
            None => Ok(false),
            Some(Generation { live: true, folder, .. }) => Err(ViewError::Live { folder }),
            Some(generation) => remove_folder(&generation.folder).map(|()| true),
        }
    }

    fn find(&self, version: u32, number: u32) -> Result<Option<Generation>, ViewError> {
        let mut all = self.all()?.into_iter();
        Ok(all.find(|it| (it.version, it.number) == (version, number)))
    }

    fn keep_no_longer(&self, folder: &Path) -> Result<(), ViewError> {
        let mark = folder.join(NOT_KEPT_FILE);
        let file = self.fs.open(&mark, OpenMode::CreateNew);
        let marked = file.and_then(|file| file.sync_data()).and_then(|()| self.fs.sync_dir(folder));
        Ok(marked.context("marking a generation that isn't kept", &mark)?)
    }

    /// Deletes what is left of generations that a process was deleting when it died, also of versions that nobody may ever
    /// open again.
    fn remove_gone(&self) -> Result<(), IoError> {
        let names = self.fs.list(&self.dir).context("listing the view's directory", &self.dir)?;
        let is_gone = |name: &&String| name.strip_suffix(GONE).and_then(parse_name).is_some();
        for name in names.iter().filter(is_gone) {
            // An effort: nobody reads it, and another process may be at it.
            drop(remove_all(&self.dir.join(name)));
        }
        Ok(())
    }

    /// Deletes what a process that died was building, or was to delete.
    fn remove_not_kept(&self) -> Result<(), ViewError> {
        let all = generations(&self.dir)?.into_iter();
        let begun = |it: &Generation| it.version == self.version && it.is_not_kept() && !it.live;
        all.filter(begun).try_for_each(|it| remove_folder(&it.folder))
    }

    /// RocksDB syncs what is in a folder, not the folder's own name: that is done here.
    fn folder(&self, number: u32) -> Result<PathBuf, IoError> {
        let folder = self.dir.join(format!("{}.{number}", self.version));
        self.fs.create_dir_all(&folder).context("creating the generation's directory", &folder)?;
        Ok(folder)
    }

    /// The highest generation that has a folder or is pointed to; 0 if there is none.
    fn last_used(&self) -> Result<u32, IoError> {
        let names = self.fs.list(&self.dir).context("listing the view's directory", &self.dir)?;
        let generation_of = |name: &String| {
            let (of_version, generation) = name.split_once('.')?;
            (of_version.parse() == Ok(self.version)).then(|| generation.parse().ok())?
        };
        let with_folder = names.iter().filter_map(generation_of).max();
        Ok(with_folder.max(self.live).unwrap_or(0))
    }

    /// Replaces the own line of the pointer, or removes it. The others are their versions', which may be open as well.
    fn point_to(&mut self, number: Option<u32>) -> Result<(), ViewError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock();
        let _lock = lock_patiently(&*self.fs, &self.dir.join(LOCK_FILE))?;
        let mut live = read_pointer(&*self.fs, &self.dir.join(POINTER_FILE))?;
        match number {
            Some(number) => live.insert(self.version, number),
            None => live.remove(&self.version),
        };
        self.write_pointer(&live)?;
        self.live = number;
        Ok(())
    }

    fn write_pointer(&self, live: &BTreeMap<u32, u32>) -> Result<(), IoError> {
        const ACTION: &str = "replacing the view's pointer";
        let (new, pointer) = (self.dir.join(POINTER_NEW_FILE), self.dir.join(POINTER_FILE));
        match self.fs.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
        .context(ACTION, &new)?;
        let file = self.fs.open(&new, OpenMode::CreateNew).context(ACTION, &new)?;
        write_all_at(&*file, pointer_text(live).as_bytes(), 0).context(ACTION, &new)?;
        file.sync_data().context(ACTION, &new)?;
        self.fs.rename(&new, &pointer).context(ACTION, &pointer)?;
        self.fs.sync_dir(&self.dir).context(ACTION, &self.dir)
    }
}

/// Whether the generation in this folder is neither being built nor being deleted.
pub(super) fn is_kept(folder: &Path) -> bool {
    !folder.join(NOT_KEPT_FILE).exists()
}

/// Deletes the folder of a generation; that there is none is fine. It loses its name at once.
pub(super) fn remove_folder(folder: &Path) -> Result<(), ViewError> {
    const ACTION: &str = "deleting a generation";
    let fs = crate::fs::os::OsFs;
    let mut gone = folder.as_os_str().to_owned();
    gone.push(GONE);
    let gone = PathBuf::from(gone);
    remove_all(&gone).context(ACTION, &gone)?; // of a deletion that died
    match fs.rename(folder, &gone) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed.context(ACTION, folder)?,
    }
    let dir = folder.parent().unwrap_or(folder);
    fs.sync_dir(dir).context(ACTION, dir)?;
    Ok(remove_all(&gone).context(ACTION, &gone)?)
}

fn remove_all(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

pub(super) fn lock(fs: &dyn Fs, path: &Path) -> Result<Box<dyn Lock>, ViewError> {
    let owner = format!("process {}", std::process::id());
    let path = path.to_owned();
    fs.lock(&path, &owner)
        .context("locking the view", &path)?
        .map_err(|held| ViewError::InUse { path, owner: held.owner })
}

/// Others hold it for a moment only, and what they would be in the way of may have taken hours.
pub(super) fn lock_patiently(fs: &dyn Fs, path: &Path) -> Result<Box<dyn Lock>, ViewError> {
    lock_within(fs, path, LOCK_PATIENCE)
}

/// The same for whoever has so much patience.
pub(super) fn lock_within(
    fs: &dyn Fs,
    path: &Path,
    patience: Duration,
) -> Result<Box<dyn Lock>, ViewError> {
    let began = Instant::now();
    loop {
        match lock(fs, path) {
            Err(ViewError::InUse { .. }) if began.elapsed() < patience => {
                std::thread::sleep(LOCK_TICK);
            }
            locked => return locked,
        }
    }
}

fn read_pointer(fs: &dyn Fs, path: &Path) -> Result<BTreeMap<u32, u32>, ViewError> {
    const ACTION: &str = "reading the view's pointer";
    let file = match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        file => file.context(ACTION, path)?,
    };
    let damaged = || ViewError::DamagedPointer { path: path.to_owned() };
    let size = file.size().context(ACTION, path)?;
    let len = usize::try_from(size.min(POINTER_BYTES_MAX + 1)).map_err(|_| damaged())?;
    if size > POINTER_BYTES_MAX {
        return Err(damaged());
    }
    let mut bytes = vec![0; len];
    read_exact_at(&*file, &mut bytes, 0).context(ACTION, path)?;
    str::from_utf8(&bytes).ok().and_then(parse_pointer).ok_or_else(damaged)
}

fn pointer_text(live: &BTreeMap<u32, u32>) -> String {
    let lines = live.iter().map(|(version, generation)| format!("{version} {generation}\n"));
    let mut text = std::iter::once(format!("{POINTER_HEAD}\n")).chain(lines).collect::<String>();
    text += &format!("crc32 {:08x}\n", crc32(&[text.as_bytes()]));
    text
}

fn parse_pointer(text: &str) -> Option<BTreeMap<u32, u32>> {
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once("crc32 ")?;
    if u32::from_str_radix(crc, 16) != Ok(crc32(&[body.as_bytes()])) {
        return None;
    }
    let mut lines = body.lines();
    if lines.next() != Some(POINTER_HEAD) {
        return None;
    }
    lines
        .map(|line| {
            let (version, generation) = line.split_once(' ')?;
            Some((version.parse().ok()?, generation.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;
    use crate::fs::{File, LockHeld};

    fn open_version(dir: &Path, version: u32) -> Result<Generations, ViewError> {
        Generations::open(Arc::new(OsFs), dir, "orders", version)
    }

    fn open(dir: &Path) -> Result<Generations, ViewError> {
        open_version(dir, 1)
    }

    #[test]
    fn names_are_plain_file_names() {
        for name in ["orders", "a", "orders_by-day2", &"x".repeat(64)] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "..", "a/b", "Orders", "ä", "a b", "a.b", &"x".repeat(65)] {
            assert!(!is_valid_name(name), "{name}");
        }
    }

    /// A new generation that is live.
    fn next(generations: &mut Generations) -> PathBuf {
        let (number, folder) = generations.begin().unwrap();
        generations.set_live(number).unwrap();
        folder
    }

    #[test]
    fn each_version_keeps_its_own_live_generation_across_openings() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| dir.path().join("orders").join(name);
        let mut first = open(dir.path()).unwrap();
        assert_eq!(first.live().unwrap(), None);
        assert_eq!(next(&mut first), folder("1.1"));
        let mut second = open_version(dir.path(), 2).unwrap();
        assert_eq!(next(&mut second), folder("2.1"));
        assert_eq!(next(&mut first), folder("1.2"));
        drop((first, second));
        assert_eq!(open(dir.path()).unwrap().live().unwrap(), Some(folder("1.2")));
        assert_eq!(open_version(dir.path(), 2).unwrap().live().unwrap(), Some(folder("2.1")));
    }

    #[test]
    fn a_folder_that_exists_is_never_taken_for_a_new_generation() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("orders/3.7")).unwrap();
        let mut generations = open_version(dir.path(), 3).unwrap();
        assert_eq!(next(&mut generations), dir.path().join("orders/3.8"));
    }

    #[test]
    fn what_was_begun_goes_away_at_the_next_opening_unless_it_became_live() {
        let dir = tempfile::tempdir().unwrap();
        let mut generations = open(dir.path()).unwrap();
        next(&mut generations);
        let (number, begun) = generations.begin().unwrap();
        let second = open_version(dir.path(), 2).unwrap();
        let (_, of_second) = second.begin().unwrap();
        assert!(generations.all().unwrap().iter().all(|it| it.folder != begun));
        assert_eq!(generations.forget(number).unwrap(), None, "nobody else deletes it");
        drop(generations);
        let mut generations = open(dir.path()).unwrap();
        assert!(!begun.exists() && of_second.exists(), "the other version's is its own affair");
        let (number, begun) = generations.begin().unwrap();
        generations.set_live(number).unwrap();
        assert!(matches!(generations.forget(number), Err(ViewError::Live { .. })));
        let first = generations.forget(1).unwrap().unwrap();
        assert!(generations.all().unwrap().iter().all(|it| it.folder != first));
        drop(generations);
        assert_eq!(open(dir.path()).unwrap().live().unwrap(), Some(begun));
        assert!(!first.exists());
    }

    #[cfg(feature = "cli")]
    #[test]
    fn a_version_without_its_live_generation_is_as_it_was_before_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let (mut first, mut second) =
            (open(dir.path()).unwrap(), open_version(dir.path(), 2).unwrap());
        let kept = next(&mut first);
        let (set_aside, removed) = (next(&mut second), next(&mut second));
        second.remove_even_live(2, None).unwrap();
        assert!(!removed.exists() && set_aside.exists());
        assert_eq!(second.live().unwrap(), None);
        let removed = next(&mut second);
        second.remove_even_live(2, Some(1)).unwrap();
        assert!(!removed.exists());
        assert_eq!(second.live().unwrap(), Some(set_aside.clone()));
        second.remove_even_live(1, None).unwrap();
        drop((first, second));
        assert_eq!(open_version(dir.path(), 2).unwrap().live().unwrap(), None);
        assert_eq!(open(dir.path()).unwrap().live().unwrap(), Some(kept));
    }

    #[test]
    fn a_second_opening_is_refused_and_names_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).unwrap();
        let error = open(dir.path()).unwrap_err();
        assert!(
            matches!(&error, ViewError::InUse { owner, .. } if owner.contains("process")),
            "{error}"
        );
        drop(first);
        open(dir.path()).unwrap();
    }

    #[test]
    fn whoever_replaces_the_pointer_waits_for_another_process_that_does() {
        let dir = tempfile::tempdir().unwrap();
        let mut generations = open(dir.path()).unwrap();
        let (number, _) = generations.begin().unwrap();
        let held = lock(&OsFs, &dir.path().join("orders").join(LOCK_FILE)).unwrap();
        std::thread::scope(|scope| {
            let setting = scope.spawn(|| generations.set_live(number));
            std::thread::sleep(LOCK_TICK * 5);
            assert!(!setting.is_finished());
            drop(held);
            setting.join().unwrap().unwrap();
        });
    }

    /// The disk, on which a generation becomes live just in front of the opening of the pointer, or just behind it.
    #[derive(Debug)]
    struct Meanwhile {
        opened: Mutex<Generations>,
        number: u32,
        is_behind: bool,
    }

    impl Meanwhile {
        fn happens(&self) {
            self.opened.lock().set_live(self.number).unwrap();
        }
    }

    impl Fs for Meanwhile {
        fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
            OsFs.create_dir_all(dir)
        }

        fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
            OsFs.list(dir)
        }

        fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
            if !self.is_behind {
                self.happens();
            }
            let opened = OsFs.open(path, mode); // of a pointer that is replaced the old one
            if self.is_behind {
                self.happens();
            }
            opened
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            OsFs.rename(from, to)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            OsFs.remove(path)
        }

        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            OsFs.sync_dir(dir)
        }

        fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
            OsFs.lock(path, owner)
        }
    }

    /// Who looks at the folder is told that one that is set aside may be deleted.
    #[test]
    fn what_becomes_live_while_it_is_looked_at_is_not_taken_for_one_that_is_set_aside() {
        for is_behind in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut opened = open(dir.path()).unwrap();
            next(&mut opened);
            let (number, _) = opened.begin().unwrap();
            let meanwhile = Meanwhile { opened: Mutex::new(opened), number, is_behind };
            let seen = generations_in(&meanwhile, &dir.path().join("orders")).unwrap();
            let of = |number| seen.iter().find(|it| it.number == number).unwrap();
            assert_eq!((of(1).live, of(2).live), (is_behind, !is_behind));
            assert!(of(2).live || of(2).is_not_kept(), "{seen:?}");
        }
    }

    #[test]
    fn any_changed_byte_of_the_pointer_is_noticed() {
        let text = pointer_text(&BTreeMap::from([(1, 2), (3, 1)]));
        assert_eq!(parse_pointer(&text), Some(BTreeMap::from([(1, 2), (3, 1)])));
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let parsed = String::from_utf8(bytes).ok().as_deref().and_then(parse_pointer);
            assert_eq!(parsed, None, "byte {at} changed");
            assert_eq!(parse_pointer(&text[..at]), None, "cut at {at}");
        }
    }

    #[test]
    fn a_damaged_pointer_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        next(&mut open(dir.path()).unwrap());
        std::fs::write(dir.path().join("orders/live"), "headwater view 1\n1 9\ncrc32 00000000\n")
            .unwrap();
        assert!(matches!(open(dir.path()), Err(ViewError::DamagedPointer { .. })));
    }
}
