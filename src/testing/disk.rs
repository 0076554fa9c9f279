//! A disk in memory, that can crash.

use std::path::Path;
use std::sync::Arc;

use super::clock::{Clock, Clocked};
use crate::error::OpenError;
use crate::fs::sim::{Fault, Repeat, SimFs};
use crate::options::JournalOptions;
use crate::store::{Store, StoreBuilder};

/// The largest batch of stores on such a disk, unless said otherwise.
const BATCH_BYTES_MAX: u32 = 256 << 10;

/// A disk in memory, for stores in tests: quick, gone with the test, and it can crash as real ones do. Cheap to clone;
/// all clones are one disk.
///
/// Appends, reads, queries, commands, snapshots, reactors, mirrors, backups and retention work as on a real disk: it
/// stands below all of them. **Views don't**: their rows are in RocksDB, which needs a real directory, so
/// [`Store::view`](crate::Store::view) refuses. Fold them in memory
#[cfg_attr(feature = "views", doc = "([`view`](super::view()), also over a store's journal), ")]
#[cfg_attr(not(feature = "views"), doc = "(`testing::view`, with feature `views`), ")]
/// or open a store in a temporary directory.
///
/// Stores are opened without a thread beside the appends
/// ([`background_thread`](crate::JournalOptions::background_thread)), so that a test which appends from one thread does
/// the same operations each time; and with batches of at most 256 KiB, in place of 1 MiB, so that segments are small and
/// crashes are tried quickly. [`builder`](Self::builder) takes other options.
///
/// ```
/// use headwater::testing::{Crash, MemoryDisk};
/// use headwater::{Append, ExpectedRevision, NewEvent, Position, StreamId};
///
/// let disk = MemoryDisk::new();
/// let store = disk.store("orders")?; // created if there is none
/// let placed = NewEvent::raw("order.placed", *b"1250")?;
/// store.append(&Append::to(&StreamId::new("order-7")?, ExpectedRevision::Any, [placed]))?;
///
/// disk.crash(Crash::PowerCut); // whatever was not synced is lost
/// assert!(store.append(&Append::default()).is_err(), "it was of the life before");
/// let store = disk.store("orders")?;
/// assert_eq!(store.read_all(Position::START)?.count(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    sim: SimFs,
    clock: Clock,
}

/// How a machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Crash {
    /// The process dies: what was written is there, synced or not.
    Kill,
    /// The power goes: whatever was not synced is lost.
    PowerCut,
    /// The power goes: of what was not synced each sector, length and name is lost or kept, as the disk's seed has it.
    PowerCutAtRandom,
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::with_seed(0)
    }

    /// An empty disk with this seed of what it leaves to chance.
    #[must_use]
    pub fn with_seed(seed: u64) -> Self {
        let sim = SimFs::new(seed);
        sim.set_allocates(true);
        Self { sim, clock: Clock::default() }
    }

    /// Opens the store in `dir` of this disk, or creates it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn store(&self, dir: impl AsRef<Path>) -> Result<Store, OpenError> {
        self.builder(dir).create_if_missing().open()
    }

    /// The same with options. Options of the journal replace those of this disk, so say `background_thread: false`
    /// if the operations are to be the same each time.
    pub fn builder(&self, dir: impl AsRef<Path>) -> StoreBuilder {
        let clocked = Clocked { fs: Arc::new(self.sim.clone()), clock: self.clock.clone() };
        let options = JournalOptions {
            background_thread: false,
            batch_bytes_max: BATCH_BYTES_MAX,
            group_bytes_max: BATCH_BYTES_MAX.into(),
            segment_bytes_first: 0, // as small as they can be
            ..JournalOptions::default()
        };
        Store::builder(dir).in_memory(Arc::new(clocked)).journal_options(options)
    }

    /// The clock that events on this disk are recorded with; it stands still until it is set or advanced.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Goes down and starts again. Everything that was open fails from now on; what is opened again finds what the
    /// crash has left.
    pub fn crash(&self, crash: Crash) {
        self.sim.clear_faults();
        match crash {
            Crash::Kill => self.sim.kill(),
            Crash::PowerCut => self.sim.power_cut_losing_all(),
            Crash::PowerCutAtRandom => self.sim.power_cut(),
        }
    }

    /// Plans to go down during the operation with this number: it is done, done in part or not begun, and everything
    /// behind it fails, until [`crash`](Self::crash). Operations are numbered from 0 on for as long as the disk is there.
    pub fn stop_at(&self, operation: u64) {
        self.sim.fail_at(operation, Fault::Kill, Repeat::Once);
    }

    /// Whether it has gone [down](Self::stop_at).
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.sim.down().is_some()
    }

    /// How many operations there were: the number of the next one.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.sim.ops()
    }

    /// Limits what the disk can hold, in bytes of all files together; `None` is no limit. Beyond it appends are
    /// answered [`DiskFull`](crate::AppendError::DiskFull).
    pub fn limit_bytes(&self, bytes: Option<u64>) {
        self.sim.set_capacity(bytes);
    }

    /// A copy of the disk as it is now, with another seed: several crashes can be tried from one state. It has a
    /// clock of its own, set to the same time.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        Self { sim: self.sim.fork(seed), clock: Clock::at_us(self.clock.now_us()) }
    }
}
