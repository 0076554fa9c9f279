//! What a process has used: processor time, allocations, write operations of the device.

use std::alloc::System;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::time::{ClockId, clock_gettime};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

use crate::Outcome;

/// Counts what Rust code allocates; C and C++ have their own allocator.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Everything that is counted, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Of all threads of this process, user and system.
    pub(crate) cpu_seconds: f64,
    pub(crate) allocations: u64,
    pub(crate) device: Option<DeviceUsage>,
}

/// What a block device has done, for whomever.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceUsage {
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
}

/// Looks at all of it.
pub(crate) struct Meter {
    /// The counters of the device under the measured folder.
    device: Option<PathBuf>,
}

impl Meter {
    pub(crate) fn new(dir: &Path) -> Outcome<Self> {
        let device = fs::metadata(dir)?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let path = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"));
        Ok(Self { device: path.exists().then_some(path) })
    }

    pub(crate) fn read(&self) -> Usage {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let stats = ALLOCATOR.stats();
        Usage {
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            allocations: (stats.allocations + stats.reallocations) as u64,
            device: self.device.as_ref().and_then(|path| device_usage(path)),
        }
    }
}

/// The fields are those of the kernel's `Documentation/block/stat.rst`.
fn device_usage(path: &Path) -> Option<DeviceUsage> {
    const WRITES: usize = 4;
    const FLUSHES: usize = 15;
    let text = fs::read_to_string(path).ok()?;
    let fields: Vec<u64> = text.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    Some(DeviceUsage { writes: *fields.get(WRITES)?, flushes: *fields.get(FLUSHES)? })
}

/// How much a folder takes on the disk, in bytes.
pub(crate) fn disk_bytes(dir: &Path) -> Outcome<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += match metadata.is_dir() {
            true => disk_bytes(&entry.path())?,
            false => metadata.blocks() * 512,
        };
    }
    Ok(bytes)
}
