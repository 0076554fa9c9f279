//! What a process has used: processor time, allocations, write operations of the device.

use std::alloc::System;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

use crate::Outcome;
use crate::shared::device::{Counted, Device};

/// Counts what Rust code allocates; C and C++ have their own allocator.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Everything that is counted, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Of all threads of this process, user and system.
    pub(crate) cpu_seconds: f64,
    pub(crate) allocations: u64,
    /// Of the device under the measured folder.
    pub(crate) device: Option<Counted>,
}

/// Looks at all of it.
pub(crate) struct Meter {
    device: Option<Device>,
}

impl Meter {
    pub(crate) fn new(dir: &Path) -> Outcome<Self> {
        Ok(Self { device: Device::under(dir)? })
    }

    pub(crate) fn read(&self) -> Usage {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let stats = ALLOCATOR.stats();
        Usage {
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            allocations: (stats.allocations + stats.reallocations) as u64,
            device: self.device.as_ref().and_then(Device::counted),
        }
    }
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
