//! A disk in memory that exploits every freedom the contract of [`super`] leaves to real disks.
//!
//! ```text
//!            write_at, set_len                     create, rename, remove
//!                   |                                        |
//!                   v                                        v
//!   inode:  cache (what reads see)           names:  current (what list and open see)
//!             |  un-synced: per sector the             |  un-synced: entry operations, each
//!             |  versions written, and the             |  waiting for its directories
//!             |  lengths that the file had             |
//!             v                                        v
//!           disk (what a power cut leaves) <-------- durable names
//! ```
//!
//! | event | un-synced sectors, lengths, names | cache | handles, locks |
//! |---|---|---|---|
//! | sync succeeds | reach the disk | stays | stay |
//! | sync fails | reach the disk or not, and are *clean* either way | stays | stay |
//! | [`SimFs::kill`] | stay un-synced | stays | dead |
//! | [`SimFs::power_cut`] | each reaches the disk or not | becomes the disk | dead |
//!
//! Invariants:
//! - A sector on the disk is one that was there, or one of the versions written since the last sync, whole;
//!   or, where a length grew and the data was lost, zeros ([`SimFs::set_garbage_growth`]: or garbage).
//! - The length on the disk is one of the lengths that the file had since the last sync; a length cut away
//!   and grown again reads as zeros.
//! - A file loses a durable name only to a rename or removal of that file, or to a rename over it: with an
//!   un-synced rename it has the old name or the new one, never both and never none. A rename between two
//!   directories is certain only once both are synced.
//! - One seed and one sequence of calls give one outcome; [`SimFs::trace_hash`] tells.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::{Allocate, File, Fs, Lock, LockHeld, OpenMode};

/// No file grows beyond this, so that a wild length is an error (`EFBIG`) and not an allocation.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// Un-synced versions remembered per sector; beyond it a random one that isn't the newest is forgotten.
const MAX_VERSIONS: usize = 8;
/// The unit in which the page cache drops what is clean.
const PAGE_BYTES: u64 = 4096;
/// How much of a lock file is read for the owner's name, in bytes.
const OWNER_BYTES: usize = 256;

/// The unit in which the disk writes whole or not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SectorSize {
    /// 64 bytes: memory-like devices.
    B64,
    /// 512 bytes: what disks promise at least.
    #[default]
    B512,
    /// 4096 bytes: most flash.
    B4096,
}

impl SectorSize {
    /// Bytes per sector.
    pub fn bytes(self) -> u64 {
        match self {
            Self::B64 => 64,
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// The kinds of operations, as counted and as faults apply to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// One directory made by [`Fs::create_dir_all`] (or found to be there).
    CreateDir,
    /// [`Fs::list`].
    List,
    /// [`Fs::open`] of a file that must exist.
    Open,
    /// [`Fs::open`] with [`OpenMode::CreateNew`].
    Create,
    /// [`Fs::rename`].
    Rename,
    /// [`Fs::remove`].
    Remove,
    /// [`Fs::sync_dir`], also those that [`Fs::create_dir_all`] makes.
    SyncDir,
    /// [`Fs::lock`].
    Lock,
    /// [`File::read_at`].
    Read,
    /// [`File::write_at`].
    Write,
    /// [`File::size`].
    Size,
    /// [`File::allocate`], on a disk that can.
    Allocate,
    /// [`File::set_len`].
    SetLen,
    /// [`File::sync_data`].
    SyncData,
    /// [`File::drop_cache`].
    DropCache,
}

/// What can be made to go wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device fails (`EIO`). A failed sync leaves the un-synced part clean in the cache and each piece of
    /// it on the disk or not. Not for [`Op::Size`] and [`Op::DropCache`].
    Eio,
    /// No space (`ENOSPC`): writes, lengths, new names, renames and syncs.
    Enospc,
    /// A write stores only a random first part of its bytes, and says so.
    ShortWrite,
    /// A read or write is interrupted (`EINTR`) before it does anything; never the one right after it, so
    /// that repeating gets on.
    Eintr,
    /// A write goes to another place: whole sectors of this or another file, inside its length; it succeeds.
    Misdirect,
    /// The power goes during the operation: it and everything after it fails with [`Down::PowerCut`] until
    /// [`SimFs::power_cut`].
    PowerCut,
    /// The process dies during the operation: it and everything after it fails with [`Down::Kill`] until
    /// [`SimFs::kill`] (or a power cut).
    Kill,
}

impl Fault {
    fn applies_to(self, op: Op) -> bool {
        match self {
            Self::PowerCut | Self::Kill => true,
            Self::Eio => !matches!(op, Op::Size | Op::DropCache),
            Self::Enospc => !matches!(
                op,
                Op::Size | Op::DropCache | Op::List | Op::Open | Op::Read | Op::Remove
            ),
            Self::ShortWrite | Self::Misdirect => op == Op::Write,
            Self::Eintr => matches!(op, Op::Read | Op::Write),
        }
    }
}

/// How often a planned fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// At the first operation it applies to.
    Once,
    /// At every operation it applies to, until [`SimFs::clear_faults`].
    Forever,
}

/// Random faults, each in thousandths of the operations named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultRates {
    /// Reads that fail with `EIO`.
    pub read_eio: u16,
    /// Writes and length changes that fail with `EIO`.
    pub write_eio: u16,
    /// Writes and length changes that fail with `ENOSPC`.
    pub write_enospc: u16,
    /// Writes that store only a part.
    pub short_write: u16,
    /// Reads and writes that are interrupted.
    pub interrupt: u16,
    /// Data syncs that fail with `EIO`.
    pub sync_eio: u16,
    /// Directory syncs that fail with `EIO`.
    pub sync_dir_eio: u16,
    /// Creations, openings, renames, removals, locks and listings that fail with `EIO`.
    pub entry_eio: u16,
}

/// Why nothing works any more; the inner error of what operations answer after a cut or a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// The power was cut.
    PowerCut,
    /// The process was killed.
    Kill,
}

impl Down {
    /// The cut or kill behind an error, if that is what it reports.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerCut => "simulated power cut",
            Self::Kill => "simulated process kill",
        })
    }
}

impl std::error::Error for Down {}

/// A copy of a directory tree, as a backup would make it; paths are relative to the directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The directories below it.
    pub dirs: BTreeSet<PathBuf>,
    /// The files below it and their content.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

/// The simulated disk; a cheap handle to shared state. Relative and absolute paths are the same.
#[derive(Clone)]
pub struct SimFs(Arc<Mutex<State>>);

impl fmt::Debug for SimFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFs").finish_non_exhaustive()
    }
}

/// Faults and crashes.
impl SimFs {
    /// An empty disk with sectors of 512 bytes.
    pub fn new(seed: u64) -> Self {
        Self::with_sector_size(seed, SectorSize::default())
    }

    /// An empty disk.
    pub fn with_sector_size(seed: u64, sector: SectorSize) -> Self {
        Self(Arc::new(Mutex::new(State::new(seed, sector))))
    }

    /// A deep copy with its own randomness: many crashes can be tried from one state. Nobody holds its locks.
    pub fn fork(&self, seed: u64) -> Self {
        let mut state = self.0.lock().clone();
        state.rng = Rng::with_seed(seed);
        state.locks.clear();
        Self(Arc::new(Mutex::new(state)))
    }

    /// Cuts the power and starts again: un-synced sectors, lengths and names reach the disk or not, the
    /// cache is gone, old handles answer [`Down::PowerCut`], locks are free.
    pub fn power_cut(&self) {
        let mut state = self.0.lock();
        state.settle();
        state.restart(Down::PowerCut);
    }

    /// The same, and nothing that is un-synced reaches the disk.
    pub fn power_cut_losing_all(&self) {
        let mut state = self.0.lock();
        state.lose_unsynced();
        state.settle();
        state.restart(Down::PowerCut);
    }

    /// Kills the process and starts again: the cache survives, with what is un-synced still un-synced; old
    /// handles answer [`Down::Kill`], locks are free.
    pub fn kill(&self) {
        self.0.lock().restart(Down::Kill);
    }

    /// The planned cut or kill that has struck and awaits [`SimFs::power_cut`] or [`SimFs::kill`].
    pub fn down(&self) -> Option<Down> {
        self.0.lock().down
    }

    /// Plans `fault` for the first operation numbered `op_index` or more that it applies to. Operations are
    /// numbered from 0 over the disk's life, across crashes; the next one has the number [`SimFs::ops`].
    pub fn fail_at(&self, op_index: u64, fault: Fault, repeat: Repeat) {
        self.0.lock().plans.push(Plan { op_index, only: None, fault, repeat });
    }

    /// Plans `fault` for the next operation of this kind.
    pub fn fail_next(&self, op: Op, fault: Fault) {
        let mut state = self.0.lock();
        let plan = Plan { op_index: state.ops, only: Some(op), fault, repeat: Repeat::Once };
        state.plans.push(plan);
    }

    /// Sets the rates of random faults.
    pub fn set_fault_rates(&self, rates: FaultRates) {
        self.0.lock().rates = rates;
    }

    /// Forgets planned faults and sets the rates to 0.
    pub fn clear_faults(&self) {
        let mut state = self.0.lock();
        state.plans.clear();
        state.rates = FaultRates::default();
    }

    /// How many faults have struck, planned and random.
    pub fn faults_struck(&self) -> u64 {
        self.0.lock().faults_struck
    }

    /// How many operations there were.
    pub fn ops(&self) -> u64 {
        self.0.lock().ops
    }

    /// How many operations of one kind there were.
    pub fn ops_of(&self, op: Op) -> u64 {
        self.0.lock().counts.get(&op).copied().unwrap_or(0)
    }

    /// A hash over all operations (kind, file, place, length, bytes), their outcomes and what the crashes
    /// left. A lock's owner is among the bytes, and names the process: hashes of two processes differ.
    pub fn trace_hash(&self) -> u64 {
        self.0.lock().trace
    }

    /// Limits the bytes of all files together, in allocated sectors; `None` is no limit. A hole that
    /// [`File::set_len`] makes takes no space.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.0.lock().capacity = bytes;
    }

    /// Whether [`File::allocate`] does anything (it doesn't, unless told otherwise).
    pub fn set_allocates(&self, allocates: bool) {
        self.0.lock().allocates = allocates;
    }

    /// Whether [`File::drop_cache`] does anything (it does, unless told otherwise).
    pub fn drop_cache_works(&self, works: bool) {
        self.0.lock().drop_cache_works = works;
    }

    /// Whether, where a power cut keeps a grown length and loses the data, half of the lost sectors hold
    /// garbage instead of zeros.
    pub fn set_garbage_growth(&self, garbage: bool) {
        self.0.lock().garbage_growth = garbage;
    }
}

/// Behind the back of the journal: no faults, no counting, durable at once.
impl SimFs {
    /// What readers of the file see; `None` if there is no such file.
    pub fn raw(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock();
        state.file_at(&state.names.current, &key(path)).map(|inode| inode.cache.bytes.clone())
    }

    /// What the disk holds for certain under that name; `None` if the name isn't durable.
    pub fn raw_durable(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock();
        state.file_at(&state.names.durable, &key(path)).map(|inode| inode.disk.bytes.clone())
    }

    /// Replaces the content of the file, or makes the file and the directories above it.
    pub fn write_raw(&self, path: &Path, bytes: &[u8]) {
        self.0.lock().write_raw(&key(path), bytes);
    }

    /// Removes the file, or the directory with all that is in it; whether there was one.
    pub fn remove_raw(&self, path: &Path) -> bool {
        self.0.lock().names.remove_raw(&key(path))
    }

    /// Flips bit `bit` (0 to 7) of the byte at `byte_offset`, in the cache and on the disk; whether there is
    /// such a byte.
    pub fn flip_bit(&self, path: &Path, byte_offset: u64, bit: u8) -> bool {
        let mut state = self.0.lock();
        let Some(Node::File(id)) = state.names.current.get(&key(path)).copied() else {
            return false;
        };
        let Some(inode) = state.inodes.get_mut(&id) else { return false };
        let flip = |image: &mut Image| {
            let byte = image.bytes.get_mut(index(byte_offset));
            byte.map(|byte| *byte ^= 1_u8 << (bit % 8)).is_some()
        };
        let on_disk = flip(&mut inode.disk);
        flip(&mut inode.cache) || on_disk
    }

    /// The paths of all files, sorted.
    pub fn files(&self) -> Vec<PathBuf> {
        let state = self.0.lock();
        let files = state.names.current.iter().filter(|(_, node)| matches!(node, Node::File(_)));
        files.map(|(path, _)| path.clone()).collect()
    }

    /// Copies what readers see below `dir`.
    pub fn snapshot_dir(&self, dir: &Path) -> Snapshot {
        let (dir, state) = (key(dir), self.0.lock());
        let mut snapshot = Snapshot::default();
        for (path, node) in state.names.below(&dir) {
            let Ok(relative) = path.strip_prefix(&dir) else { continue };
            match state.inode_of(*node) {
                Some(inode) => {
                    snapshot.files.insert(relative.to_owned(), inode.cache.bytes.clone());
                }
                None => {
                    snapshot.dirs.insert(relative.to_owned());
                }
            }
        }
        snapshot
    }

    /// Makes `dir` hold what `snapshot` holds and nothing else.
    pub fn restore_dir(&self, dir: &Path, snapshot: &Snapshot) {
        let (dir, mut state) = (key(dir), self.0.lock());
        state.names.remove_raw(&dir);
        state.names.create_dirs_raw(&dir);
        for path in &snapshot.dirs {
            state.names.create_dirs_raw(&dir.join(path));
        }
        for (path, bytes) in &snapshot.files {
            state.write_raw(&dir.join(path), bytes);
        }
    }
}

// ---------------------------------------------------------------------------------------------- content

/// The bytes of a file and which of its sectors take space.
#[derive(Clone, Debug, Default)]
struct Image {
    bytes: Vec<u8>,
    allocated: BTreeSet<u64>,
}

impl Image {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn resize(&mut self, len: u64, sector: u64) {
        self.bytes.resize(index(len), 0);
        self.allocated.split_off(&len.div_ceil(sector));
    }

    /// A whole sector; beyond the end of the file zeros.
    fn sector(&self, number: u64, sector: u64) -> Box<[u8]> {
        let mut whole = vec![0; index(sector)];
        let start = index(number * sector).min(self.bytes.len());
        for (to, from) in whole.iter_mut().zip(self.bytes.iter().skip(start)) {
            *to = *from;
        }
        whole.into()
    }

    /// Stores the part of a sector that lies inside the file.
    fn put_sector(&mut self, number: u64, content: &[u8], sector: u64) {
        if let Some(place) = self.bytes.get_mut(index(number * sector)..).filter(|p| !p.is_empty())
        {
            let len = place.len().min(content.len());
            place.iter_mut().zip(content.iter().take(len)).for_each(|(to, from)| *to = *from);
            self.allocated.insert(number);
        }
    }
}

/// What a sector held at one moment since the last sync.
#[derive(Clone, Debug)]
struct Version {
    /// Place in the order in which the file's sectors were dirtied.
    order: u64,
    /// How many un-synced length changes came before it.
    lengths_before: usize,
    content: Box<[u8]>,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    disk: Image,
    cache: Image,
    /// Un-synced sectors: their versions since the last sync, oldest first.
    dirty: BTreeMap<u64, Vec<Version>>,
    /// The lengths that the file got since the last sync, oldest first.
    lengths: Vec<u64>,
    /// Sectors that a failed sync left clean in the cache although the disk holds something else.
    stale: BTreeSet<u64>,
    next_order: u64,
}

/// What becomes of a file's dirty sectors in a power cut. Only scattering would almost never leave a large
/// group whole, or a clean prefix, which recovery has to treat right too.
enum Survival {
    Nothing,
    Everything,
    /// What was written up to some moment.
    UpTo(u64),
    /// Each sector for itself.
    Scattered,
}

impl Survival {
    fn draw(rng: &mut Rng, orders: u64) -> Self {
        match rng.u8(0..8) {
            0 => Self::Nothing,
            1 => Self::Everything,
            2 | 3 => Self::UpTo(rng.u64(0..=orders)),
            _ => Self::Scattered,
        }
    }

    fn pick<'a>(&self, rng: &mut Rng, versions: &'a [Version]) -> Option<&'a Version> {
        match self {
            Self::Nothing => None,
            Self::Everything => versions.last(),
            Self::UpTo(order) => versions.iter().rfind(|version| version.order < *order),
            Self::Scattered => match rng.u8(0..3) {
                0 => None,
                1 => versions.last(),
                _ => versions.get(rng.usize(0..versions.len().max(1))),
            },
        }
    }
}

impl Inode {
    /// A file that is on the disk as it is in the cache.
    fn settled(bytes: &[u8], sector: u64) -> Self {
        let allocated = (0..(bytes.len() as u64).div_ceil(sector)).collect();
        let image = Image { bytes: bytes.to_vec(), allocated };
        Self { disk: image.clone(), cache: image, ..Self::default() }
    }

    fn write(&mut self, buf: &[u8], offset: u64, sector: u64, rng: &mut Rng) {
        let end = offset + buf.len() as u64;
        if end > self.cache.len() {
            self.cache.resize(end, sector);
            self.lengths.push(end);
        }
        let place = self.cache.bytes.iter_mut().skip(index(offset));
        place.zip(buf).for_each(|(to, from)| *to = *from);
        for number in offset / sector..end.div_ceil(sector) {
            self.dirty_sector(number, sector, rng);
        }
    }

    fn set_len(&mut self, len: u64, sector: u64, rng: &mut Rng) {
        let shrinks = len < self.cache.len();
        self.cache.resize(len, sector);
        self.lengths.push(len);
        if shrinks {
            self.stale.split_off(&len.div_ceil(sector));
            // The rest of a sector that is cut in two is zeroed, as file systems do.
            if !len.is_multiple_of(sector) {
                self.dirty_sector(len / sector, sector, rng);
            }
        }
    }

    fn dirty_sector(&mut self, number: u64, sector: u64, rng: &mut Rng) {
        self.stale.remove(&number);
        self.cache.allocated.insert(number);
        let versions = self.dirty.entry(number).or_default();
        if versions.len() == MAX_VERSIONS {
            versions.remove(rng.usize(0..MAX_VERSIONS - 1));
        }
        versions.push(Version {
            order: self.next_order,
            lengths_before: self.lengths.len(),
            content: self.cache.sector(number, sector),
        });
        self.next_order += 1;
    }

    fn sync(&mut self, sector: u64) {
        self.next_order = 0;
        for len in std::mem::take(&mut self.lengths) {
            self.disk.resize(len, sector);
        }
        let dirty = std::mem::take(&mut self.dirty);
        // After a failed sync the length on the disk may be an old one; data that is written moves it.
        let end = dirty.last_key_value().map_or(0, |(last, _)| (last + 1) * sector);
        let end = end.min(self.cache.len());
        if end > self.disk.len() {
            self.disk.resize(end, sector);
        }
        for number in dirty.into_keys() {
            self.disk.put_sector(number, &self.cache.sector(number, sector), sector);
        }
        self.disk.allocated.extend(&self.cache.allocated);
    }

    /// Each sector and the length reach the disk or not; nobody will try again.
    fn fail_sync(&mut self, sector: u64, rng: &mut Rng) {
        self.next_order = 0;
        let lengths = std::mem::take(&mut self.lengths);
        let shortest = lengths.iter().copied().fold(self.disk.len(), u64::min);
        if rng.bool() {
            lengths.iter().for_each(|len| self.disk.resize(*len, sector));
        } else {
            // Growth goes with the data that is lost; a cut doesn't, it frees space and needs none.
            self.disk.resize(shortest, sector);
        }
        for number in std::mem::take(&mut self.dirty).into_keys() {
            let cached = self.cache.sector(number, sector);
            if rng.bool() {
                self.disk.put_sector(number, &cached, sector);
            }
            if self.disk.sector(number, sector) != cached {
                self.stale.insert(number);
            }
        }
    }

    /// Clean pages read as the disk has them; the length stays, for it isn't in a page.
    fn drop_cache(&mut self, sector: u64) {
        let page = |number: u64| number * sector / PAGE_BYTES;
        let dirty: BTreeSet<u64> = self.dirty.keys().copied().map(page).collect();
        for number in self.stale.clone() {
            if !dirty.contains(&page(number)) {
                self.cache.put_sector(number, &self.disk.sector(number, sector), sector);
                self.stale.remove(&number);
            }
        }
    }

    /// A power cut.
    fn settle(&mut self, sector: u64, garbage: bool, rng: &mut Rng) {
        let all = self.lengths.len();
        let kept = if rng.bool() { all } else { rng.usize(0..=all) };
        let lengths: Vec<u64> = self.lengths.drain(..).take(kept).collect();
        let grown_from = lengths.iter().copied().fold(self.disk.len(), u64::min);
        lengths.iter().for_each(|len| self.disk.resize(*len, sector));

        let survival = Survival::draw(rng, self.next_order);
        for (number, versions) in std::mem::take(&mut self.dirty) {
            if let Some(version) = survival.pick(rng, &versions) {
                let mut content = version.content.clone();
                let later = lengths.iter().skip(version.lengths_before);
                let floor = later.copied().min().unwrap_or(u64::MAX);
                let inside = index(floor.saturating_sub(number * sector));
                content.iter_mut().skip(inside).for_each(|byte| *byte = 0);
                self.disk.put_sector(number, &content, sector);
            } else if garbage && rng.bool() {
                let start = index(grown_from.max(number * sector));
                let place = self.disk.bytes.iter_mut().take(index((number + 1) * sector));
                place.skip(start).for_each(|byte| *byte = rng.u8(..));
            }
        }
        self.stale.clear();
        self.next_order = 0;
        self.cache = self.disk.clone();
    }
}

// ------------------------------------------------------------------------------------------------ names

/// What a name stands for; the number is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    File(u64),
    Dir(u64),
}

/// A creation (no `from`), a removal (no `to`) or a rename (both).
#[derive(Clone, Debug)]
struct EntryOp {
    node: Node,
    from: Option<PathBuf>,
    to: Option<PathBuf>,
    /// Directories that have to be synced before it is durable.
    waits_for: Vec<PathBuf>,
    /// A directory sync failed on it: no later one will write it.
    abandoned: bool,
}

impl EntryOp {
    /// Whether this operation can't be on the disk without the earlier one: they are on the same file, or
    /// the earlier one freed the name that this one takes.
    fn needs(&self, earlier: &Self) -> bool {
        self.node == earlier.node || (self.to.is_some() && self.to == earlier.from)
    }

    fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.from.iter().chain(&self.to)
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        if let Some(from) = self.from.as_ref().filter(|from| names.get(*from) == Some(&self.node)) {
            names.remove(from);
        }
        if let Some(to) = &self.to {
            names.insert(to.clone(), self.node);
        }
    }
}

/// All directories, flat: path to node. The root is there without an entry.
#[derive(Clone, Debug, Default)]
struct Names {
    current: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
    pending: Vec<EntryOp>,
    next_node: u64,
}

impl Names {
    fn new_id(&mut self) -> u64 {
        self.next_node += 1;
        self.next_node
    }

    fn dir(&self, path: &Path) -> io::Result<()> {
        match self.current.get(path) {
            _ if path.as_os_str().is_empty() => Ok(()),
            Some(Node::Dir(_)) => Ok(()),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn file(&self, path: &Path) -> io::Result<u64> {
        match self.current.get(path) {
            Some(Node::File(id)) => Ok(*id),
            Some(Node::Dir(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => self.dir(path).and(Err(io::ErrorKind::IsADirectory.into())),
        }
    }

    fn below<'a>(&'a self, dir: &'a Path) -> impl Iterator<Item = (&'a PathBuf, &'a Node)> {
        self.current.iter().filter(move |(path, _)| path.starts_with(dir) && *path != dir)
    }

    fn change(&mut self, node: Node, from: Option<&Path>, to: Option<&Path>) {
        let mut waits_for: Vec<PathBuf> = from.iter().chain(&to).map(|path| parent(path)).collect();
        waits_for.dedup();
        let [from, to] = [from, to].map(|path| path.map(Path::to_owned));
        let op = EntryOp { node, from, to, waits_for, abandoned: false };
        op.apply(&mut self.current);
        self.pending.push(op);
    }

    /// Puts the chosen pending operations, and what they need, on the disk.
    fn persist(&mut self, mut chosen: Vec<bool>) {
        let mut ops = std::mem::take(&mut self.pending);
        for at in (0..ops.len()).rev() {
            let (earlier, later) = ops.split_at_mut(at);
            let Some(op) = later.first().filter(|_| chosen.get(at) == Some(&true)) else {
                continue;
            };
            for (before, chosen) in earlier.iter_mut().zip(&mut chosen) {
                *chosen |= op.needs(before);
                // Replaced at that name before it got there: it must not come back later.
                if !*chosen && op.to.is_some() && op.to == before.to {
                    before.to = None;
                }
            }
        }
        for (op, chosen) in ops.into_iter().zip(chosen) {
            if chosen {
                op.apply(&mut self.durable);
            } else {
                self.pending.push(op);
            }
        }
    }

    fn sync(&mut self, dir: &Path) {
        let mut chosen = Vec::new();
        for op in &mut self.pending {
            op.waits_for.retain(|wanted| wanted != dir);
            chosen.push(op.waits_for.is_empty() && !op.abandoned);
        }
        self.persist(chosen);
    }

    fn fail_sync(&mut self, dir: &Path, rng: &mut Rng) {
        let mut chosen = Vec::new();
        for op in &mut self.pending {
            let hit = !op.abandoned && op.waits_for.iter().any(|wanted| wanted == dir);
            let reached = hit && rng.bool();
            op.abandoned |= hit && !reached;
            chosen.push(reached);
        }
        self.persist(chosen);
    }

    /// A power cut.
    fn settle(&mut self, rng: &mut Rng) {
        let odds = [0.0, 0.5, 0.5, 1.0];
        let odds = odds.get(rng.usize(0..odds.len())).copied().unwrap_or(0.5);
        let chosen = self.pending.iter().map(|op| !op.abandoned && rng.f64() < odds).collect();
        self.persist(chosen);
        self.pending.clear();
        // In path order a directory comes before what is in it; what is in a lost one is lost.
        let mut current: BTreeMap<PathBuf, Node> = BTreeMap::new();
        for (path, node) in &self.durable {
            let dir = parent(path);
            if dir.as_os_str().is_empty() || matches!(current.get(&dir), Some(Node::Dir(_))) {
                current.insert(path.clone(), *node);
            }
        }
        self.durable = current.clone();
        self.current = current;
    }

    /// With all that is below it.
    fn remove_raw(&mut self, path: &Path) -> bool {
        let chosen = self.pending.iter().map(|op| op.paths().any(|p| p.starts_with(path)));
        self.persist(chosen.collect());
        let before = self.current.len();
        self.durable.retain(|name, _| !name.starts_with(path));
        self.current.retain(|name, _| !name.starts_with(path));
        self.current.len() < before
    }

    fn insert_raw(&mut self, path: &Path, node: Node) {
        let chosen = self.pending.iter().map(|op| op.paths().any(|p| p == path));
        self.persist(chosen.collect());
        self.durable.insert(path.to_owned(), node);
        self.current.insert(path.to_owned(), node);
    }

    fn create_dirs_raw(&mut self, dir: &Path) {
        for dir in ancestors(dir) {
            let node = match self.current.get(&dir) {
                Some(node @ Node::Dir(_)) => *node,
                _ => Node::Dir(self.new_id()),
            };
            self.insert_raw(&dir, node);
        }
    }
}

// ------------------------------------------------------------------------------------------------ state

#[derive(Clone, Copy, Debug)]
struct Plan {
    op_index: u64,
    only: Option<Op>,
    fault: Fault,
    repeat: Repeat,
}

/// How an operation is carried out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Whole,
    /// A random first part, of a write.
    Short,
    /// To another place, of a write.
    Misdirected,
    /// Of a sync: it fails, and does what failed syncs do.
    Failing,
}

#[derive(Clone, Debug)]
struct State {
    rng: Rng,
    sector: u64,
    names: Names,
    inodes: BTreeMap<u64, Inode>,
    /// Lock file's node to the token of the guard that holds it.
    locks: BTreeMap<u64, u64>,
    next_token: u64,
    /// Number of crashes so far: handles of an earlier life are dead.
    life: u64,
    /// How the last life ended.
    last_end: Down,
    down: Option<Down>,
    counts: BTreeMap<Op, u64>,
    ops: u64,
    trace: u64,
    plans: Vec<Plan>,
    rates: FaultRates,
    faults_struck: u64,
    interrupted: bool,
    capacity: Option<u64>,
    allocates: bool,
    drop_cache_works: bool,
    garbage_growth: bool,
}

impl State {
    fn new(seed: u64, sector: SectorSize) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            sector: sector.bytes(),
            names: Names::default(),
            inodes: BTreeMap::new(),
            locks: BTreeMap::new(),
            next_token: 0,
            life: 0,
            last_end: Down::PowerCut,
            down: None,
            counts: BTreeMap::new(),
            ops: 0,
            trace: 0xcbf2_9ce4_8422_2325,
            plans: Vec::new(),
            rates: FaultRates::default(),
            faults_struck: 0,
            interrupted: false,
            capacity: None,
            allocates: false,
            drop_cache_works: true,
            garbage_growth: false,
        }
    }

    /// Every operation comes through here: it is counted and traced, and meets its faults.
    fn call<T>(
        &mut self,
        op: Op,
        args: [u64; 3],
        work: impl FnOnce(&mut Self, How) -> io::Result<T>,
    ) -> io::Result<T> {
        if let Some(down) = self.down {
            return Err(io::Error::other(down));
        }
        let number = self.ops;
        self.ops += 1;
        *self.counts.entry(op).or_default() += 1;
        self.fold(op as u64);
        args.into_iter().for_each(|arg| self.fold(arg));

        let fault = self.fault_for(op, number);
        self.interrupted = fault == Some(Fault::Eintr);
        let result = match fault {
            None => work(self, How::Whole),
            Some(Fault::ShortWrite) => work(self, How::Short),
            Some(Fault::Misdirect) => work(self, How::Misdirected),
            Some(Fault::Eintr) => Err(Errno::INTR.into()),
            Some(Fault::Eio) => self.fail(op, Errno::IO, work),
            Some(Fault::Enospc) => self.fail(op, Errno::NOSPC, work),
            Some(Fault::PowerCut) => self.go_down(op, Down::PowerCut, work),
            Some(Fault::Kill) => self.go_down(op, Down::Kill, work),
        };
        let outcome = match &result {
            Ok(_) => 0,
            Err(error) => 1 + u64::from(error.raw_os_error().unwrap_or(0).unsigned_abs()),
        };
        self.fold(outcome);
        result
    }

    fn fail<T>(
        &mut self,
        op: Op,
        errno: Errno,
        work: impl FnOnce(&mut Self, How) -> io::Result<T>,
    ) -> io::Result<T> {
        if matches!(op, Op::SyncData | Op::SyncDir) {
            work(self, How::Failing)?;
        }
        Err(errno.into())
    }

    /// The operation is under way when everything stops: done, done in part, or not begun.
    fn go_down<T>(
        &mut self,
        op: Op,
        down: Down,
        work: impl FnOnce(&mut Self, How) -> io::Result<T>,
    ) -> io::Result<T> {
        match self.rng.u8(0..3) {
            0 => {}
            // A part of a sync is what the crash makes of it.
            1 if matches!(op, Op::SyncData | Op::SyncDir) => {}
            1 => drop(work(self, How::Short)),
            _ => drop(work(self, How::Whole)),
        }
        self.down = Some(down);
        Err(io::Error::other(down))
    }

    fn fault_for(&mut self, op: Op, number: u64) -> Option<Fault> {
        let interrupted = self.interrupted;
        let strikes = |plan: &Plan| {
            number >= plan.op_index
                && plan.fault.applies_to(op)
                && plan.only.is_none_or(|only| only == op)
                && !(plan.fault == Fault::Eintr && interrupted)
        };
        let fault = if let Some(at) = self.plans.iter().position(strikes) {
            let plan = self.plans.get(at).copied();
            if plan.is_some_and(|plan| plan.repeat == Repeat::Once) {
                self.plans.remove(at);
            }
            plan.map(|plan| plan.fault)
        } else {
            self.random_fault(op)
        };
        self.faults_struck += u64::from(fault.is_some());
        fault
    }

    fn random_fault(&mut self, op: Op) -> Option<Fault> {
        let rates = self.rates;
        let interrupt = if self.interrupted { 0 } else { rates.interrupt };
        let candidates: &[(u16, Fault)] = match op {
            Op::Read => &[(rates.read_eio, Fault::Eio), (interrupt, Fault::Eintr)],
            Op::Write => &[
                (rates.write_eio, Fault::Eio),
                (rates.write_enospc, Fault::Enospc),
                (rates.short_write, Fault::ShortWrite),
                (interrupt, Fault::Eintr),
            ],
            Op::SetLen | Op::Allocate => {
                &[(rates.write_eio, Fault::Eio), (rates.write_enospc, Fault::Enospc)]
            }
            Op::SyncData => &[(rates.sync_eio, Fault::Eio)],
            Op::SyncDir => &[(rates.sync_dir_eio, Fault::Eio)],
            Op::Size | Op::DropCache => &[],
            _ => &[(rates.entry_eio, Fault::Eio)],
        };
        let hit = candidates.iter().find(|(rate, _)| *rate > 0 && self.rng.u16(0..1000) < *rate);
        hit.map(|(_, fault)| *fault)
    }

    fn settle(&mut self) {
        self.names.settle(&mut self.rng);
        let named: BTreeSet<u64> = self.file_ids().collect();
        self.inodes.retain(|id, _| named.contains(id));
        for inode in self.inodes.values_mut() {
            inode.settle(self.sector, self.garbage_growth, &mut self.rng);
        }
        let left: Vec<u64> = self.names.current.keys().map(|path| digest(path)).collect();
        let left_bytes: Vec<u64> =
            self.inodes.values().map(|inode| crc32fast::hash(&inode.disk.bytes).into()).collect();
        left.into_iter().chain(left_bytes).for_each(|part| self.fold(part));
    }

    fn lose_unsynced(&mut self) {
        self.names.pending.clear();
        for inode in self.inodes.values_mut() {
            inode.lengths.clear();
            inode.dirty.clear();
        }
    }

    fn restart(&mut self, end: Down) {
        self.fold(end as u64);
        self.life += 1;
        self.last_end = end;
        self.down = None;
        self.locks.clear();
    }

    /// FNV-1a, a word at a time, stirred so that high bits come down.
    fn fold(&mut self, word: u64) {
        self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    }

    fn file_ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.names.current.values().filter_map(|node| match node {
            Node::File(id) => Some(*id),
            Node::Dir(_) => None,
        })
    }

    fn inode_of(&self, node: Node) -> Option<&Inode> {
        match node {
            Node::File(id) => self.inodes.get(&id),
            Node::Dir(_) => None,
        }
    }

    fn file_at(&self, names: &BTreeMap<PathBuf, Node>, path: &Path) -> Option<&Inode> {
        self.inode_of(*names.get(path)?)
    }

    fn inode(&mut self, id: u64) -> io::Result<(&mut Inode, &mut Rng)> {
        let inode = self.inodes.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        Ok((inode, &mut self.rng))
    }

    fn write_raw(&mut self, path: &Path, bytes: &[u8]) {
        self.names.create_dirs_raw(&parent(path));
        let id = self.names.file(path).unwrap_or_else(|_| self.names.new_id());
        self.names.insert_raw(path, Node::File(id));
        self.inodes.insert(id, Inode::settled(bytes, self.sector));
    }

    fn create(&mut self, path: &Path) -> io::Result<u64> {
        self.names.dir(&parent(path))?;
        if self.names.dir(path).is_ok() || self.names.current.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = self.names.new_id();
        self.names.change(Node::File(id), None, Some(path));
        self.inodes.insert(id, Inode::default());
        Ok(id)
    }

    fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        self.names.dir(&parent(path))?;
        if self.names.dir(path).is_ok() {
            return Ok(());
        }
        if self.names.current.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = Node::Dir(self.names.new_id());
        self.names.change(node, None, Some(path));
        Ok(())
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = Node::File(self.names.file(from)?);
        self.names.dir(&parent(to))?;
        if self.names.dir(to).is_ok() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if from != to {
            self.names.change(node, Some(from), Some(to));
        }
        Ok(())
    }

    fn write(&mut self, id: u64, buf: &[u8], offset: u64, how: How) -> io::Result<usize> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > MAX_FILE_BYTES) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if how == How::Misdirected {
            return Ok(self.misdirect(id, buf, offset));
        }
        let wanted = match how {
            How::Short if buf.len() > 1 => self.rng.usize(1..buf.len()),
            _ => buf.len(),
        };
        let len = self.fitting(id, offset, wanted)?;
        let part = buf.get(..len).unwrap_or(buf);
        if part.is_empty() && !buf.is_empty() {
            return Err(Errno::NOSPC.into());
        }
        if !part.is_empty() {
            let sector = self.sector;
            let (inode, rng) = self.inode(id)?;
            inode.write(part, offset, sector, rng);
        }
        Ok(part.len())
    }

    /// Only the length can be lost: what is allocated reads as zeros.
    fn allocate(&mut self, id: u64, len: u64) -> io::Result<bool> {
        if len > MAX_FILE_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if (self.fitting(id, 0, index(len))? as u64) < len {
            return Err(Errno::NOSPC.into());
        }
        let sector = self.sector;
        let (inode, _) = self.inode(id)?;
        if len > inode.cache.len() {
            inode.cache.resize(len, sector);
            inode.lengths.push(len);
        }
        inode.cache.allocated.extend(0..len.div_ceil(sector));
        Ok(true)
    }

    /// Writes to other sectors than those that were meant, of any file. Lengths stay as they are.
    fn misdirect(&mut self, id: u64, buf: &[u8], offset: u64) -> usize {
        let sector = self.sector;
        let files: Vec<u64> = self.file_ids().collect();
        let other = files.get(self.rng.usize(..files.len().max(1))).copied().unwrap_or(id);
        if let Ok((inode, rng)) = self.inode(other) {
            let at = rng.u64(0..=inode.cache.len() / sector) * sector + offset % sector;
            let room = index(inode.cache.len().saturating_sub(at)).min(buf.len());
            if let Some(part) = buf.get(..room).filter(|part| !part.is_empty()) {
                inode.write(part, at, sector, rng);
            }
        }
        buf.len()
    }

    /// `None` if there is no end to them.
    fn free_sectors(&self) -> Option<u64> {
        let capacity = self.capacity?;
        let used = self.file_ids().filter_map(|id| self.inodes.get(&id));
        let used: u64 = used.map(|inode| inode.cache.allocated.len() as u64).sum();
        Some((capacity / self.sector).saturating_sub(used))
    }

    /// How many of the first `len` bytes at `offset` there is space for.
    fn fitting(&mut self, id: u64, offset: u64, len: usize) -> io::Result<usize> {
        let sector = self.sector;
        let Some(mut free) = self.free_sectors() else { return Ok(len) };
        let (inode, _) = self.inode(id)?;
        for number in offset / sector..(offset + len as u64).div_ceil(sector) {
            if inode.cache.allocated.contains(&number) {
                continue;
            }
            if free == 0 {
                return Ok(index((number * sector).saturating_sub(offset)));
            }
            free -= 1;
        }
        Ok(len)
    }

    fn lock(&mut self, path: &Path, owner: &str) -> io::Result<Result<(u64, u64), LockHeld>> {
        let id = match self.names.file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.create(path)?,
            found => found?,
        };
        let sector = self.sector;
        if self.locks.contains_key(&id) {
            let (inode, _) = self.inode(id)?;
            let text: Vec<u8> = inode.cache.bytes.iter().copied().take(OWNER_BYTES).collect();
            return Ok(Err(LockHeld { owner: String::from_utf8_lossy(&text).into_owned() }));
        }
        // The name is an effort, as on real files.
        if self.write(id, owner.as_bytes(), 0, How::Whole).is_ok() {
            let (inode, rng) = self.inode(id)?;
            inode.set_len(owner.len() as u64, sector, rng);
        }
        self.next_token += 1;
        self.locks.insert(id, self.next_token);
        Ok(Ok((id, self.next_token)))
    }
}

// ----------------------------------------------------------------------------------------------- traits

impl Fs for SimFs {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let target = key(dir);
        for dir in ancestors(&target) {
            let above = parent(&dir);
            let missing = state.names.dir(&dir).is_err();
            if missing {
                let args = [digest(&dir), 0, 0];
                state.call(Op::CreateDir, args, |state, _| state.create_dir(&dir))?;
            }
            let args = [digest(&above), 0, 0];
            let synced = state.call(Op::SyncDir, args, |state, how| state.sync_dir(&above, how));
            if synced.is_err() && state.down.is_none() {
                // As on a real disk: made anew by the next attempt, if nothing is in it.
                let is_empty = state.names.below(&dir).all(|(path, _)| target.starts_with(path));
                if is_empty {
                    state.names.remove_raw(&dir);
                }
            }
            synced?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let dir = key(dir);
        self.0.lock().call(Op::List, [digest(&dir), 0, 0], |state, _| {
            state.names.dir(&dir)?;
            let entries = state.names.below(&dir).filter(|(path, _)| parent(path) == dir);
            let names = entries.filter_map(|(path, _)| path.file_name()?.to_str());
            let mut names: Vec<String> = names.map(str::to_owned).collect();
            names.sort();
            Ok(names)
        })
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let path = key(path);
        let op = if mode == OpenMode::CreateNew { Op::Create } else { Op::Open };
        let mut state = self.0.lock();
        let node = state.call(op, [digest(&path), mode as u64, 0], |state, _| match op {
            Op::Create => state.create(&path),
            _ => state.names.file(&path),
        })?;
        let (life, writable) = (state.life, mode != OpenMode::Read);
        Ok(Arc::new(SimFile { fs: self.clone(), node, life, writable }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (key(from), key(to));
        let args = [digest(&from), digest(&to), 0];
        self.0.lock().call(Op::Rename, args, |state, _| state.rename(&from, &to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let path = key(path);
        self.0.lock().call(Op::Remove, [digest(&path), 0, 0], |state, _| {
            let node = Node::File(state.names.file(&path)?);
            state.names.change(node, Some(&path), None);
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = key(dir);
        let args = [digest(&dir), 0, 0];
        self.0.lock().call(Op::SyncDir, args, |state, how| state.sync_dir(&dir, how))
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<Option<u64>> {
        let state = self.0.lock();
        Ok(state.free_sectors().map(|sectors| sectors * state.sector))
    }

    fn volume_bytes(&self, _dir: &Path) -> io::Result<Option<u64>> {
        Ok(self.0.lock().capacity)
    }

    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
        let path = key(path);
        let args = [digest(&path), crc32fast::hash(owner.as_bytes()).into(), 0];
        let taken = self.0.lock().call(Op::Lock, args, |state, _| state.lock(&path, owner))?;
        Ok(taken.map(|(node, token)| -> Box<dyn Lock> {
            Box::new(SimLock { fs: self.clone(), node, token })
        }))
    }
}

impl State {
    fn sync_dir(&mut self, dir: &Path, how: How) -> io::Result<()> {
        self.names.dir(dir)?;
        match how {
            How::Failing => self.names.fail_sync(dir, &mut self.rng),
            _ => self.names.sync(dir),
        }
        Ok(())
    }
}

#[derive(Debug)]
struct SimLock {
    fs: SimFs,
    node: u64,
    token: u64,
}

impl Lock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.fs.0.lock();
        // After a crash somebody else may hold it.
        if state.locks.get(&self.node) == Some(&self.token) {
            state.locks.remove(&self.node);
        }
    }
}

#[derive(Debug)]
struct SimFile {
    fs: SimFs,
    node: u64,
    life: u64,
    writable: bool,
}

impl SimFile {
    fn call<T>(
        &self,
        op: Op,
        args: [u64; 2],
        work: impl FnOnce(&mut State, How) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.fs.0.lock();
        if state.life != self.life {
            return Err(io::Error::other(state.last_end));
        }
        if !self.writable && matches!(op, Op::Write | Op::Allocate | Op::SetLen) {
            return Err(Errno::BADF.into());
        }
        let [first, second] = args;
        state.call(op, [self.node, first, second], work)
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.call(Op::Read, [offset, buf.len() as u64], |state, _| {
            let (inode, _) = state.inode(self.node)?;
            let rest = inode.cache.bytes.get(index(offset)..).unwrap_or(&[]);
            let len = rest.len().min(buf.len());
            buf.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            let read = rest.get(..len).map_or(0, crc32fast::hash);
            state.fold(read.into());
            Ok(len)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let what = (buf.len() as u64) << 32 | u64::from(crc32fast::hash(buf));
        self.call(Op::Write, [offset, what], |state, how| state.write(self.node, buf, offset, how))
    }

    fn size(&self) -> io::Result<u64> {
        self.call(Op::Size, [0, 0], |state, _| Ok(state.inode(self.node)?.0.cache.len()))
    }

    fn allocate(&self, len: u64, _: Allocate) -> io::Result<bool> {
        if !self.fs.0.lock().allocates {
            return Ok(false);
        }
        self.call(Op::Allocate, [len, 0], |state, _| state.allocate(self.node, len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(Op::SetLen, [len, 0], |state, _| {
            if len > MAX_FILE_BYTES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let sector = state.sector;
            let (inode, rng) = state.inode(self.node)?;
            inode.set_len(len, sector, rng);
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call(Op::SyncData, [0, 0], |state, how| {
            let sector = state.sector;
            let (inode, rng) = state.inode(self.node)?;
            match how {
                How::Failing => inode.fail_sync(sector, rng),
                _ => inode.sync(sector),
            }
            Ok(())
        })
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.call(Op::DropCache, [0, 0], |state, _| {
            if state.drop_cache_works {
                let sector = state.sector;
                state.inode(self.node)?.0.drop_cache(sector);
            }
            Ok(())
        })
    }
}

// ---------------------------------------------------------------------------------------------- helpers

/// One spelling per path, without a root: `/a/./b`, `a/c/../b` and `a/b` are the same.
fn key(path: &Path) -> PathBuf {
    let mut key = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => key.push(name),
            Component::ParentDir => {
                key.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::CurDir => {}
        }
    }
    key
}

fn parent(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

/// The directory and those above it, without the root, outermost first.
fn ancestors(dir: &Path) -> Vec<PathBuf> {
    let above = dir.ancestors().filter(|dir| !dir.as_os_str().is_empty());
    let mut above: Vec<PathBuf> = above.map(Path::to_owned).collect();
    above.reverse();
    above
}

fn digest(path: &Path) -> u64 {
    crc32fast::hash(path.as_os_str().as_encoded_bytes()).into()
}

/// An offset as an index; beyond the address space it is beyond every file.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::{read_full_at, write_all_at};
    use super::*;

    const SECTOR: usize = 512;

    fn p(path: &str) -> &Path {
        Path::new(path)
    }

    /// A disk with the directory `j`, durable.
    fn disk(seed: u64) -> SimFs {
        let fs = SimFs::new(seed);
        fs.create_dir_all(p("/j")).unwrap();
        fs
    }

    fn create(fs: &SimFs, path: &str, bytes: &[u8]) -> Arc<dyn File> {
        let file = fs.open(p(path), OpenMode::CreateNew).unwrap();
        write_all_at(&*file, bytes, 0).unwrap();
        file
    }

    /// A file whose content and name are durable.
    fn durable(fs: &SimFs, path: &str, bytes: &[u8]) -> Arc<dyn File> {
        let file = create(fs, path, bytes);
        file.sync_data().unwrap();
        fs.sync_dir(p(path).parent().unwrap()).unwrap();
        file
    }

    fn read(file: &dyn File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.size().unwrap()).unwrap()];
        assert_eq!(read_full_at(file, &mut bytes, 0).unwrap(), bytes.len());
        bytes
    }

    /// What is seen after a power cut, over many crashes from one state.
    fn after_cuts<T: Ord>(fs: &SimFs, seeds: u64, see: impl Fn(&SimFs) -> T) -> BTreeSet<T> {
        let crash = |seed| {
            let fork = fs.fork(seed);
            fork.power_cut();
            see(&fork)
        };
        (0..seeds).map(crash).collect()
    }

    /// Which of the names exist, with the first byte of each.
    fn names(fs: &SimFs) -> Vec<(String, u8)> {
        let first = |path: &PathBuf| fs.raw(path).and_then(|b| b.first().copied()).unwrap_or(0);
        fs.files().iter().map(|path| (path.display().to_string(), first(path))).collect()
    }

    fn named(pairs: &[(&str, u8)]) -> Vec<(String, u8)> {
        pairs.iter().map(|(path, byte)| ((*path).to_owned(), *byte)).collect()
    }

    #[test]
    fn unsynced_sectors_are_kept_lost_and_left_at_any_version_independently() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", &[0; 3 * SECTOR]);
        write_all_at(&*file, &[1; 3 * SECTOR], 0).unwrap();
        write_all_at(&*file, &[2; 3 * SECTOR], 0).unwrap();
        let seen = after_cuts(&fs, 6000, |fs| {
            let bytes = fs.raw(p("/j/a")).unwrap();
            let sectors = bytes.chunks(SECTOR).map(|sector| {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is whole");
                sector[0]
            });
            sectors.collect::<Vec<u8>>()
        });
        // Three sectors, three versions each: lost, torn, reordered and all between.
        assert_eq!(seen.len(), 27, "{seen:?}");
    }

    #[test]
    fn sector_size_is_the_unit_of_tearing() {
        for (size, bytes) in
            [(SectorSize::B64, 64), (SectorSize::B512, 512), (SectorSize::B4096, 4096)]
        {
            let fs = SimFs::with_sector_size(0, size);
            let file = durable(&fs, "/a", &[0; 8192]);
            write_all_at(&*file, &[1; 8192], 0).unwrap();
            let units = after_cuts(&fs, 200, |fs| {
                let bytes = fs.raw(p("/a")).unwrap();
                bytes.chunk_by(|a, b| a == b).map(<[u8]>::len).min().unwrap()
            });
            assert_eq!(units.first(), Some(&bytes));
        }
    }

    #[test]
    fn synced_content_survives_and_unsynced_content_was_written_once() {
        let mut changed = 0;
        for seed in 0..400 {
            let mut rng = Rng::with_seed(seed);
            let fs = disk(seed);
            let file = durable(&fs, "/j/a", &[]);
            // All contents since the last sync.
            let mut history = vec![Vec::new()];
            for step in 1..=rng.u8(1..30) {
                let len = rng.usize(0..3000);
                match rng.u8(0..10) {
                    0..6 => {
                        let offset = rng.usize(0..3000);
                        write_all_at(&*file, &vec![step; len], offset as u64).unwrap();
                    }
                    6 | 7 => file.set_len(len as u64).unwrap(),
                    _ => {
                        file.sync_data().unwrap();
                        assert_eq!(fs.raw(p("/j/a")), fs.raw_durable(p("/j/a")));
                        history.clear();
                    }
                }
                history.push(read(&*file));
            }
            fs.power_cut();
            let left = fs.raw(p("/j/a")).unwrap();
            changed += usize::from(Some(&left) != history.last());
            if history.len() == 1 {
                assert_eq!(left, history[0], "seed {seed}: all was synced");
            }
            assert!(history.iter().any(|h| h.len() == left.len()), "seed {seed}: length");
            for (at, byte) in left.iter().enumerate() {
                let had = |h: &Vec<u8>| h.get(at).copied().unwrap_or(0) == *byte;
                assert!(history.iter().any(had), "seed {seed}: byte {at} is {byte}");
            }
        }
        assert!(changed > 100, "{changed}");
    }

    #[test]
    fn length_may_grow_before_the_data_as_zeros_or_garbage() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", b"");
        write_all_at(&*file, &[7; SECTOR], 0).unwrap();
        let see = |fs: &SimFs| fs.raw(p("/j/a")).unwrap();
        let seen = after_cuts(&fs, 100, see);
        let expected = [vec![], vec![0; SECTOR], vec![7; SECTOR]];
        assert_eq!(seen, BTreeSet::from(expected.clone()));
        fs.set_garbage_growth(true);
        let seen = after_cuts(&fs, 100, see);
        assert!(expected.iter().all(|content| seen.contains(content)));
        assert!(seen.len() > 3, "garbage");
        assert!(seen.iter().all(|content| content.is_empty() || content.len() == SECTOR));
    }

    #[test]
    fn unsynced_cut_is_kept_or_not_and_what_was_cut_stays_cut() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", &[9; 2 * SECTOR]);
        write_all_at(&*file, &[8; SECTOR], SECTOR as u64).unwrap();
        file.set_len(100).unwrap();
        file.set_len(3 * SECTOR as u64).unwrap();
        let seen = after_cuts(&fs, 500, |fs| {
            let bytes = fs.raw(p("/j/a")).unwrap();
            (bytes.len(), bytes.get(SECTOR).copied())
        });
        let (two, three) = (2 * SECTOR, 3 * SECTOR);
        let expected = [(100, None), (two, Some(8)), (two, Some(9)), (three, Some(0))];
        assert_eq!(seen, BTreeSet::from(expected));
    }

    #[test]
    fn names_are_certain_only_after_the_directory_is_synced() {
        let fs = disk(0);
        durable(&fs, "/j/old", b"o");
        create(&fs, "/j/new", b"n").sync_data().unwrap();
        fs.remove(p("/j/old")).unwrap();
        let all: Vec<_> =
            [&[][..], &[("j/new", b'n')], &[("j/new", b'n'), ("j/old", b'o')], &[("j/old", b'o')]]
                .map(named)
                .into();
        assert_eq!(after_cuts(&fs, 200, names), all.into_iter().collect());
        fs.sync_dir(p("/j")).unwrap();
        assert_eq!(after_cuts(&fs, 200, names), [named(&[("j/new", b'n')])].into());
    }

    #[test]
    fn rename_keeps_the_old_name_or_the_new_one() {
        let fs = disk(0);
        durable(&fs, "/j/a", b"1");
        durable(&fs, "/j/b", b"2");
        fs.rename(p("/j/a"), p("/j/b")).unwrap();
        // Taking the freed name must not make the first file vanish.
        create(&fs, "/j/a", b"3").sync_data().unwrap();
        let expected = [
            named(&[("j/a", b'1'), ("j/b", b'2')]),
            named(&[("j/b", b'1')]),
            named(&[("j/a", b'3'), ("j/b", b'1')]),
        ];
        assert_eq!(after_cuts(&fs, 200, names), expected.into());
    }

    #[test]
    fn rename_between_directories_needs_both_synced() {
        let fs = disk(0);
        fs.create_dir_all(p("/q/r")).unwrap();
        durable(&fs, "/j/a", b"1");
        fs.rename(p("/j/a"), p("/q/r/a")).unwrap();
        let either: BTreeSet<_> = [named(&[("j/a", b'1')]), named(&[("q/r/a", b'1')])].into();
        assert_eq!(after_cuts(&fs, 100, names), either);
        fs.sync_dir(p("/q/r")).unwrap();
        assert_eq!(after_cuts(&fs, 100, names), either);
        fs.sync_dir(p("/j")).unwrap();
        assert_eq!(after_cuts(&fs, 100, names), [named(&[("q/r/a", b'1')])].into());
    }

    /// Every file is known by its content, a byte of its own.
    #[test]
    fn files_vanish_only_by_removal_or_replacement() {
        let mut moved = 0;
        for seed in 0..3000 {
            let mut rng = Rng::with_seed(seed);
            let fs = disk(seed);
            fs.create_dir_all(p("/k")).unwrap();
            let paths = ["/j/a", "/j/b", "/j/c", "/k/a", "/k/b"];
            let (mut certain, mut next, mut failed) = (BTreeSet::new(), 1, false);
            let sync = |certain: &mut BTreeSet<u8>, failed: bool| {
                fs.sync_dir(p("/j")).unwrap();
                fs.sync_dir(p("/k")).unwrap();
                if failed {
                    return;
                }
                *certain = names(&fs).into_iter().map(|(_, id)| id).collect();
                let state = fs.0.lock();
                assert_eq!(state.names.durable, state.names.current, "seed {seed}");
            };
            for _ in 0..rng.u8(1..14) {
                let (from, to) = (*rng.choice(&paths).unwrap(), *rng.choice(&paths).unwrap());
                let doomed = |path| fs.raw(p(path)).map_or(0, |bytes| bytes[0]);
                match rng.u8(0..12) {
                    0..3 if fs.raw(p(from)).is_none() => {
                        create(&fs, from, &[next]).sync_data().unwrap();
                        next += 1;
                    }
                    3..8 if fs.raw(p(from)).is_some() && from != to => {
                        certain.remove(&doomed(to));
                        fs.rename(p(from), p(to)).unwrap();
                    }
                    8 if fs.raw(p(from)).is_some() => {
                        certain.remove(&doomed(from));
                        fs.remove(p(from)).unwrap();
                    }
                    9 => fs.sync_dir(p("/j")).unwrap(),
                    10 => fs.sync_dir(p("/k")).unwrap(),
                    11 if rng.u8(0..8) == 0 => {
                        fs.fail_at(fs.ops(), Fault::Eio, Repeat::Once);
                        assert!(fs.sync_dir(p("/j")).is_err());
                        failed = true;
                    }
                    11 => sync(&mut certain, failed),
                    _ => {}
                }
            }
            let before = names(&fs);
            let fork = fs.fork(seed);
            sync(&mut certain.clone(), failed);
            fork.power_cut();
            moved += usize::from(names(&fork) != before);
            let left: Vec<u8> = names(&fork).into_iter().map(|(_, id)| id).collect();
            for id in certain {
                let times = left.iter().filter(|found| **found == id).count();
                assert_eq!(times, 1, "seed {seed}: file {id} in {:?}", names(&fork));
            }
        }
        assert!(moved > 500, "{moved}");
    }

    /// A failed sync can't be repeated: the next attempt has to make a new name, or a power cut takes
    /// everything below the old one along.
    #[test]
    fn directory_whose_name_could_not_be_synced_is_made_anew() {
        for seed in 0..50 {
            let fs = disk(seed);
            fs.fail_at(fs.ops() + 2, Fault::Eio, Repeat::Once); // the sync of /j
            assert!(fs.create_dir_all(p("/j/sub")).is_err());
            assert!(fs.open(p("/j/sub/a"), OpenMode::CreateNew).is_err(), "it is gone again");
            fs.create_dir_all(p("/j/sub")).unwrap();
            durable(&fs, "/j/sub/a", b"1");
            let outcomes = after_cuts(&fs, 5, names);
            assert_eq!(outcomes, [named(&[("j/sub/a", b'1')])].into());
        }
    }

    #[test]
    fn failed_sync_leaves_new_data_in_the_cache_and_old_data_on_the_disk() {
        let (mut lost, mut reached) = (0, 0);
        for seed in 0..50 {
            let fs = disk(seed);
            let file = durable(&fs, "/j/a", &[1; SECTOR]);
            write_all_at(&*file, &[2; SECTOR], 0).unwrap();
            fs.fail_at(fs.ops(), Fault::Eio, Repeat::Once);
            let error = file.sync_data().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
            file.sync_data().expect("the second sync has nothing to do");
            assert_eq!(read(&*file), [2; SECTOR], "the cache shows new data");

            fs.kill();
            let file = fs.open(p("/j/a"), OpenMode::Write).unwrap();
            file.sync_data().unwrap();
            assert_eq!(read(&*file), [2; SECTOR], "to the next process as well");

            let on_disk = fs.raw_durable(p("/j/a")).unwrap();
            fs.drop_cache_works(false);
            file.drop_cache().unwrap();
            assert_eq!(read(&*file), [2; SECTOR]);
            fs.drop_cache_works(true);
            let rewritten = fs.fork(seed);
            file.drop_cache().unwrap();
            assert_eq!(read(&*file), on_disk);
            fs.power_cut();
            assert_eq!(fs.raw(p("/j/a")).unwrap(), on_disk);
            if on_disk == [1; SECTOR] {
                lost += 1;
            } else {
                reached += 1;
            }

            // Writing what the cache shows makes it dirty, and then durable.
            let file = rewritten.open(p("/j/a"), OpenMode::Write).unwrap();
            let seen = read(&*file);
            write_all_at(&*file, &seen, 0).unwrap();
            file.sync_data().unwrap();
            rewritten.power_cut();
            assert_eq!(rewritten.raw(p("/j/a")).unwrap(), seen);
        }
        assert!(lost > 5 && reached > 5, "{lost} {reached}");
    }

    #[test]
    fn failed_sync_can_lose_a_grown_length() {
        let lengths = (0..50).flat_map(|seed| {
            let fs = disk(seed);
            let file = durable(&fs, "/j/a", &[1; 10]);
            write_all_at(&*file, &[1; 10], 10).unwrap();
            fs.fail_at(fs.ops(), Fault::Enospc, Repeat::Once);
            assert!(file.sync_data().is_err());
            file.sync_data().unwrap();
            file.drop_cache().unwrap();
            assert_eq!(file.size().unwrap(), 20);
            after_cuts(&fs, 3, |fs| fs.raw(p("/j/a")).unwrap().len())
        });
        assert_eq!(lengths.collect::<BTreeSet<_>>(), [10, 20].into());
    }

    #[test]
    fn after_a_failed_sync_new_writes_are_durable_and_cuts_stay_cuts() {
        for seed in 0..50 {
            for len in [100, SECTOR] {
                let fs = disk(seed);
                let file = durable(&fs, "/j/a", &[1; 2 * SECTOR]);
                write_all_at(&*file, &[2; 2 * SECTOR], 0).unwrap();
                fs.fail_at(fs.ops(), Fault::Eio, Repeat::Once);
                assert!(file.sync_data().is_err());
                file.set_len(len as u64).unwrap();
                file.set_len(2 * SECTOR as u64).unwrap();
                file.drop_cache().unwrap();
                assert!(read(&*file).iter().skip(len).all(|byte| *byte == 0), "seed {seed}");
            }
            let fs = disk(seed);
            let file = durable(&fs, "/j/a", b"");
            write_all_at(&*file, &[1; 2 * SECTOR], 0).unwrap();
            fs.fail_at(fs.ops(), Fault::Eio, Repeat::Once);
            assert!(file.sync_data().is_err());
            write_all_at(&*file, &[2; SECTOR], SECTOR as u64).unwrap();
            file.sync_data().unwrap();
            fs.power_cut();
            assert_eq!(fs.raw(p("/j/a")).unwrap().get(SECTOR..), Some(&[2; SECTOR][..]));
        }
    }

    #[test]
    fn dirty_pages_survive_dropping_the_cache() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", &[1; SECTOR]);
        write_all_at(&*file, &[2; SECTOR], 0).unwrap();
        file.drop_cache().unwrap();
        assert_eq!(read(&*file), [2; SECTOR]);
        file.sync_data().unwrap();
        assert_eq!(fs.raw_durable(p("/j/a")).unwrap(), [2; SECTOR]);
    }

    #[test]
    fn what_is_not_synced_can_be_lost_for_certain() {
        for seed in 0..20 {
            let fs = disk(seed);
            let file = durable(&fs, "/j/a", &[1; SECTOR]);
            write_all_at(&*file, &[2; 3 * SECTOR], 0).unwrap();
            create(&fs, "/j/b", b"3").sync_data().unwrap();
            fs.rename(p("/j/a"), p("/j/c")).unwrap();
            fs.power_cut_losing_all();
            assert_eq!(names(&fs), named(&[("j/a", 1)]));
            assert_eq!(fs.raw(p("/j/a")).unwrap(), [1; SECTOR]);
        }
    }

    #[test]
    fn failed_directory_sync_is_not_made_good_by_a_later_one() {
        let outcomes = (0..50).flat_map(|seed| {
            let fs = disk(seed);
            create(&fs, "/j/a", b"1").sync_data().unwrap();
            fs.fail_at(fs.ops(), Fault::Eio, Repeat::Once);
            assert!(fs.sync_dir(p("/j")).is_err());
            fs.sync_dir(p("/j")).unwrap();
            assert_eq!(fs.list(p("/j")).unwrap(), ["a"]);
            after_cuts(&fs, 3, names)
        });
        let expected = [vec![], named(&[("j/a", b'1')])];
        assert_eq!(outcomes.collect::<BTreeSet<_>>(), expected.into());
    }

    #[test]
    fn full_disk_takes_what_fits_and_then_refuses() {
        let fs = disk(0);
        fs.set_capacity(Some(4 * SECTOR as u64));
        let a = create(&fs, "/j/a", &[1; 2 * SECTOR]);
        let b = create(&fs, "/j/b", b"");
        b.set_len(100 * SECTOR as u64).expect("a hole takes no space");
        assert_eq!(b.write_at(&[2; 3 * SECTOR], 100).unwrap(), 2 * SECTOR - 100);
        let error = b.write_at(&[2; 10], 2 * SECTOR as u64).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(b.write_at(&[3; SECTOR], 0).unwrap(), SECTOR, "space it has already");
        a.set_len(SECTOR as u64).unwrap();
        assert_eq!(b.write_at(&[2; 10], 2 * SECTOR as u64).unwrap(), 10);
        assert!(b.write_at(&[2; 10], 3 * SECTOR as u64).is_err());
        fs.remove(p("/j/a")).unwrap();
        assert_eq!(b.write_at(&[2; 10], 3 * SECTOR as u64).unwrap(), 10);
    }

    #[test]
    fn what_is_allocated_takes_space_and_is_zeros_or_not_there() {
        let fs = disk(0);
        fs.set_garbage_growth(true);
        let file = create(&fs, "/j/a", b"");
        fs.sync_dir(p("/j")).unwrap();
        let len = 4 * SECTOR as u64;
        assert!(!file.allocate(len, Allocate::Zeros).unwrap(), "not every file system can");
        fs.set_allocates(true);
        fs.set_capacity(Some(len - 1));
        let error = file.allocate(len, Allocate::Zeros).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        fs.set_capacity(Some(len));
        assert!(file.allocate(len, Allocate::Zeros).unwrap());
        assert!(create(&fs, "/j/b", b"").write_at(&[1], 0).is_err(), "the space is taken");
        let seen = after_cuts(&fs, 100, |fs| fs.raw(p("/j/a")).unwrap());
        assert_eq!(seen, [vec![], vec![0; 4 * SECTOR]].into());
        file.sync_data().unwrap();
        let seen = after_cuts(&fs, 100, |fs| fs.raw(p("/j/a")).unwrap());
        assert_eq!(seen, [vec![0; 4 * SECTOR]].into());
    }

    #[test]
    fn wild_lengths_are_errors() {
        let fs = disk(0);
        let file = create(&fs, "/j/a", b"abc");
        assert_eq!(file.set_len(u64::MAX).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(file.write_at(b"x", u64::MAX).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(file.read_at(&mut [0; 4], u64::MAX).unwrap(), 0);
        assert_eq!(file.write_at(b"", 1 << 20).unwrap(), 0);
        assert_eq!(read(&*file), b"abc");
    }

    #[test]
    fn handles_and_locks_die_with_their_life() {
        for down in [Down::PowerCut, Down::Kill] {
            let fs = disk(0);
            let file = durable(&fs, "/j/a", b"1");
            let guard = fs.lock(p("/j/lock"), "first").unwrap().unwrap();
            let held = fs.lock(p("/j/lock"), "second").unwrap().unwrap_err();
            assert_eq!(held.owner, "first");
            match down {
                Down::PowerCut => fs.power_cut(),
                Down::Kill => fs.kill(),
            }
            let mut buf = [0];
            let errors = [
                file.read_at(&mut buf, 0).unwrap_err(),
                file.write_at(&buf, 0).unwrap_err(),
                file.size().unwrap_err(),
                file.set_len(0).unwrap_err(),
                file.sync_data().unwrap_err(),
                file.drop_cache().unwrap_err(),
            ];
            assert!(errors.iter().all(|error| Down::of(error) == Some(down)), "{errors:?}");

            let third = fs.lock(p("/j/lock"), "third").unwrap().unwrap();
            drop(guard);
            let held = fs.lock(p("/j/lock"), "fourth").unwrap().unwrap_err();
            assert_eq!(held.owner, "third", "an old guard doesn't release a newer lock");
            drop(third);
            assert!(fs.lock(p("/j/lock"), "fifth").unwrap().is_ok());
        }
    }

    #[test]
    fn kill_keeps_the_cache_and_a_later_power_cut_can_still_lose_it() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", &[1; SECTOR]);
        write_all_at(&*file, &[2; SECTOR], 0).unwrap();
        create(&fs, "/j/b", b"3");
        fs.kill();
        assert_eq!(names(&fs), named(&[("j/a", 2), ("j/b", b'3')]));
        let seen = after_cuts(&fs, 100, |fs| (fs.raw(p("/j/a")).unwrap()[0], fs.files().len()));
        assert_eq!(seen, [(1, 1), (1, 2), (2, 1), (2, 2)].into());
    }

    #[test]
    fn planned_crash_stops_everything_until_the_restart() {
        for (fault, down) in [(Fault::PowerCut, Down::PowerCut), (Fault::Kill, Down::Kill)] {
            let contents = (0..60).map(|seed| {
                let fs = disk(seed);
                let file = durable(&fs, "/j/a", &[1; 4]);
                fs.fail_at(fs.ops() + 1, fault, Repeat::Once);
                assert_eq!(file.size().unwrap(), 4, "not yet");
                assert_eq!(Down::of(&file.write_at(&[2; 4], 0).unwrap_err()), Some(down));
                assert_eq!(fs.down(), Some(down));
                let ops = fs.ops();
                assert_eq!(Down::of(&fs.list(p("/j")).unwrap_err()), Some(down));
                assert_eq!(Down::of(&file.sync_data().unwrap_err()), Some(down));
                assert_eq!(fs.ops(), ops, "nothing runs");
                match down {
                    Down::PowerCut => fs.power_cut(),
                    Down::Kill => fs.kill(),
                }
                assert_eq!((fs.down(), fs.faults_struck()), (None, 1));
                fs.raw(p("/j/a")).unwrap()
            });
            let seen: BTreeSet<_> = contents.collect();
            // Not begun, done in part, done.
            let expected = [[1, 1, 1, 1], [2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1], [2, 2, 2, 2]];
            assert_eq!(seen, expected.map(Vec::from).into(), "{fault:?}");
        }
    }

    #[test]
    fn faults_wait_for_an_operation_they_apply_to() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", &[1; 4]);
        fs.fail_at(fs.ops(), Fault::ShortWrite, Repeat::Once);
        assert_eq!(file.read_at(&mut [0; 4], 0).unwrap(), 4);
        let written = file.write_at(&[2; 100], 0).unwrap();
        assert!((1..100).contains(&written), "{written}");
        assert_eq!(file.write_at(&[2; 100], 0).unwrap(), 100);

        fs.fail_at(fs.ops(), Fault::Eintr, Repeat::Forever);
        for _ in 0..3 {
            let error = file.read_at(&mut [0; 4], 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted);
            assert_eq!(file.read_at(&mut [0; 4], 0).unwrap(), 4, "repeating gets on");
        }
        fs.clear_faults();

        fs.fail_at(fs.ops(), Fault::Enospc, Repeat::Forever);
        for _ in 0..3 {
            let error = file.write_at(&[2; 4], 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            file.read_at(&mut [0; 4], 0).expect("reading takes no space");
        }
        fs.clear_faults();
        file.write_at(&[2; 4], 0).unwrap();
        assert_eq!(fs.ops_of(Op::SyncData), 1);
    }

    #[test]
    fn random_faults_strike_at_about_their_rates() {
        let fs = disk(5);
        let file = durable(&fs, "/j/a", &[1; 4]);
        fs.set_fault_rates(FaultRates { sync_eio: 100, ..FaultRates::default() });
        let failed = (0..2000).filter(|_| file.sync_data().is_err()).count();
        assert!((120..280).contains(&failed), "{failed}");
        assert_eq!(fs.faults_struck(), failed as u64);
        fs.clear_faults();
        assert!((0..100).all(|_| file.sync_data().is_ok()));
    }

    #[test]
    fn one_seed_gives_one_run() {
        let run = |seed| {
            let fs = disk(seed);
            fs.set_fault_rates(FaultRates {
                write_eio: 50,
                short_write: 100,
                sync_eio: 50,
                entry_eio: 50,
                ..FaultRates::default()
            });
            for life in 0..5 {
                let file = fs.open(p("/j/a"), OpenMode::Write);
                let file = file.or_else(|_| fs.open(p("/j/a"), OpenMode::CreateNew));
                let Ok(file) = file else { continue };
                for step in 0..20_u8 {
                    drop(file.write_at(&[step; 700], u64::from(step) * 300));
                    if step % 7 == life {
                        drop(file.sync_data().and_then(|()| fs.sync_dir(p("/j"))));
                    }
                }
                fs.power_cut();
            }
            (fs.trace_hash(), fs.raw(p("/j/a")), fs.ops())
        };
        let runs: BTreeSet<_> = (0..20).map(run).collect();
        assert_eq!(runs.len(), 20, "seeds differ");
        assert_eq!(runs, (0..20).map(run).collect());
    }

    #[test]
    fn forks_go_their_own_ways() {
        let fs = disk(0);
        let file = durable(&fs, "/j/a", b"1");
        let guard = fs.lock(p("/j/lock"), "first").unwrap().unwrap();
        let fork = fs.fork(1);
        let other = fork.lock(p("/j/lock"), "fork").unwrap().unwrap();
        drop(guard);
        assert!(fork.lock(p("/j/lock"), "again").unwrap().is_err(), "a guard is of one disk");
        drop(other);
        fork.power_cut();
        fork.write_raw(p("/j/a"), b"2");
        assert_eq!(read(&*file), b"1");
    }

    #[test]
    fn raw_access_is_durable_and_uncounted() {
        let fs = disk(0);
        let ops = fs.ops();
        fs.write_raw(p("/x/y/z"), b"abc");
        assert!(fs.flip_bit(p("/x/y/z"), 1, 0));
        assert!(!fs.flip_bit(p("/x/y/z"), 3, 0));
        assert!(!fs.flip_bit(p("/x/y/w"), 0, 0));
        assert_eq!(fs.ops(), ops);
        create(&fs, "/j/a", b"1");
        fs.write_raw(p("/j/a"), b"2");
        fs.rename(p("/j/a"), p("/j/b")).unwrap();
        create(&fs, "/j/c", b"3");
        assert!(fs.remove_raw(p("/j/b")));
        assert!(!fs.remove_raw(p("/j/b")));
        fs.sync_dir(p("/j")).unwrap();
        let seen = after_cuts(&fs, 50, |fs| (fs.files(), fs.raw(p("/x/y/z"))));
        let files = ["j/c", "x/y/z"].map(PathBuf::from).to_vec();
        assert_eq!(seen, [(files, Some(b"acc".to_vec()))].into());
    }

    #[test]
    fn restored_directory_is_what_was_copied_and_nothing_else() {
        let fs = disk(0);
        fs.create_dir_all(p("/j/empty")).unwrap();
        durable(&fs, "/j/a", b"1");
        create(&fs, "/j/b", b"2");
        let snapshot = fs.snapshot_dir(p("/j"));
        assert_eq!(snapshot.files.len(), 2);
        fs.remove(p("/j/b")).unwrap();
        fs.rename(p("/j/a"), p("/a")).unwrap();
        create(&fs, "/j/c", b"3");
        fs.restore_dir(p("/j"), &snapshot);
        fs.restore_dir(p("/other/place"), &snapshot);
        let seen = after_cuts(&fs, 50, |fs| {
            assert_eq!(fs.list(p("/j")).unwrap(), ["a", "b", "empty"]);
            assert_eq!(fs.snapshot_dir(p("/other/place")), snapshot);
            fs.snapshot_dir(p("/j")) == snapshot
        });
        assert_eq!(seen, [true].into());
    }

    #[test]
    fn names_are_checked_as_on_a_real_disk() {
        let fs = disk(0);
        create(&fs, "/j/a", b"1");
        let kind = |error: io::Error| error.kind();
        let open = |path, mode| fs.open(p(path), mode).map(drop).map_err(kind);
        assert_eq!(open("/j/a", OpenMode::CreateNew), Err(io::ErrorKind::AlreadyExists));
        assert_eq!(open("/j/b", OpenMode::Write), Err(io::ErrorKind::NotFound));
        assert_eq!(open("/k/b", OpenMode::CreateNew), Err(io::ErrorKind::NotFound));
        assert_eq!(open("/j", OpenMode::Read), Err(io::ErrorKind::IsADirectory));
        assert_eq!(open("j/../j/./a", OpenMode::Read), Ok(()));
        assert_eq!(fs.list(p("/k")).map_err(kind), Err(io::ErrorKind::NotFound));
        assert_eq!(fs.sync_dir(p("/k")).map_err(kind), Err(io::ErrorKind::NotFound));
        assert_eq!(fs.remove(p("/j/b")).map_err(kind), Err(io::ErrorKind::NotFound));
        let rename = |from, to| fs.rename(p(from), p(to)).map_err(kind);
        assert_eq!(rename("/j/b", "/j/c"), Err(io::ErrorKind::NotFound));
        assert_eq!(rename("/j/a", "/k/a"), Err(io::ErrorKind::NotFound));
        assert_eq!(rename("/j/a", "/j/a"), Ok(()));
        let reader = fs.open(p("/j/a"), OpenMode::Read).unwrap();
        assert!(reader.write_at(b"2", 0).is_err() && reader.set_len(0).is_err());
        fs.create_dir_all(p("/j")).expect("it is there");
        assert!(fs.create_dir_all(p("/j/a/b")).is_err(), "a file is in the way");
        assert_eq!(fs.list(p("/j")).unwrap(), ["a"]);
    }

    #[test]
    fn threads_share_a_disk() {
        let fs = disk(0);
        std::thread::scope(|scope| {
            for id in 0..4_u8 {
                let fs = &fs;
                scope.spawn(move || {
                    let file = durable(fs, &format!("/j/{id}"), b"");
                    for step in 0..100 {
                        write_all_at(&*file, &[id; 100], step * 100).unwrap();
                        file.sync_data().unwrap();
                    }
                });
            }
        });
        fs.power_cut();
        for id in 0..4_u8 {
            assert_eq!(fs.raw(p(&format!("/j/{id}"))).unwrap(), [id; 10_000]);
        }
    }
}
