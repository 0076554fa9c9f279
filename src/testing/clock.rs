//! A clock that is set by hand.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use crate::fs::{File, Fs, Lock, LockHeld, OpenMode};

/// The time of clocks that nobody has set: 1 January 2020, midnight UTC, in microseconds since 1970.
pub const BEGINNING_US: i64 = 1_577_836_800_000_000;

/// A clock that stands still until it is set or advanced; all clones are one clock.
///
/// It gives the time that events are recorded with ([`Recorded::recorded_at_us`](crate::Recorded::recorded_at_us)) to
/// stores that were opened with it: [`StoreBuilder::clock`](crate::StoreBuilder::clock), [`MemoryDisk::clock`]. Nothing
/// else: timeouts, retries and event ids go by the system's clock.
///
/// [`MemoryDisk::clock`]: super::MemoryDisk::clock
///
/// ```
/// use std::time::Duration;
/// use headwater::testing::MemoryDisk;
/// use headwater::{Append, ExpectedRevision, NewEvent, Position, StreamId};
///
/// let disk = MemoryDisk::new();
/// let store = disk.store("orders")?;
/// let order = StreamId::new("order-7")?;
/// disk.clock().set_us(1_700_000_000_000_000);
/// store.append(&Append::to(&order, ExpectedRevision::Any, [NewEvent::raw("order.placed", *b"1250")?]))?;
/// disk.clock().advance(Duration::from_secs(3600));
/// store.append(&Append::to(&order, ExpectedRevision::Any, [NewEvent::raw("order.paid", *b"")?]))?;
///
/// let times: Result<Vec<i64>, _> =
///     store.read_all(Position::START)?.map(|event| event.map(|it| it.recorded_at_us())).collect();
/// assert_eq!(times?, [1_700_000_000_000_000, 1_700_003_600_000_000]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Clock(Arc<AtomicI64>);

impl Default for Clock {
    /// At the [beginning](BEGINNING_US).
    fn default() -> Self {
        Self::at_us(BEGINNING_US)
    }
}

impl Clock {
    /// A clock that shows `time_us`, in microseconds since 1970.
    #[must_use]
    pub fn at_us(time_us: i64) -> Self {
        Self(Arc::new(AtomicI64::new(time_us)))
    }

    /// What it shows, in microseconds since 1970.
    #[must_use]
    pub fn now_us(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Sets it, also back: the clocks of real machines do that, too.
    pub fn set_us(&self, time_us: i64) {
        self.0.store(time_us, Ordering::SeqCst);
    }

    /// Moves it on.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::SeqCst);
    }
}

/// Files as they were, with another clock.
#[derive(Debug)]
pub(crate) struct Clocked {
    pub(crate) fs: Arc<dyn Fs>,
    pub(crate) clock: Clock,
}

impl Fs for Clocked {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.fs.create_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.fs.list(dir)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        self.fs.open(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.fs.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.fs.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.fs.sync_dir(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        self.fs.free_bytes(dir)
    }

    fn volume_bytes(&self, dir: &Path) -> io::Result<Option<u64>> {
        self.fs.volume_bytes(dir)
    }

    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
        self.fs.lock(path, owner)
    }

    fn now_us(&self) -> i64 {
        self.clock.now_us()
    }
}
