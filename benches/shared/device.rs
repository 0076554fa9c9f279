//! What the kernel has counted of a block device: for whomever it was, so its idle rate is told, too.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The device under a folder.
pub(crate) struct Device(PathBuf);

/// What it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counted {
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
}

impl Device {
    /// `None` where the kernel doesn't tell: a folder in memory or on the network.
    pub(crate) fn under(dir: &Path) -> io::Result<Option<Self>> {
        let device = fs::metadata(dir)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let path = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"));
        Ok(path.exists().then_some(Self(path)))
    }

    pub(crate) fn counted(&self) -> Option<Counted> {
        counted(&fs::read_to_string(&self.0).ok()?)
    }

    /// Writes per second while this program does nothing: what others do on the device.
    pub(crate) fn idle_writes_per_second(&self) -> Option<f64> {
        let (before, began) = (self.counted()?, Instant::now());
        thread::sleep(Duration::from_secs(1));
        let writes = self.counted()?.writes.saturating_sub(before.writes);
        Some(writes as f64 / began.elapsed().as_secs_f64())
    }
}

/// The fields are those of the kernel's `Documentation/block/stat.rst`.
fn counted(stat: &str) -> Option<Counted> {
    const WRITES: usize = 4;
    const FLUSHES: usize = 15;
    let fields: Vec<u64> = stat.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    Some(Counted { writes: *fields.get(WRITES)?, flushes: *fields.get(FLUSHES)? })
}
