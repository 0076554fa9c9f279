//! What an operation takes: time, processor time of all threads, allocations.

use std::alloc::System;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts what Rust code allocates; RocksDB's C++ has its own allocator.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What one operation took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    pub(crate) time: Duration,
    /// Of the whole process, user and system.
    pub(crate) cpu: Duration,
    pub(crate) allocations: u64,
}

impl Took {
    /// Only a time: what else the process did meanwhile isn't part of it.
    pub(crate) fn only(time: Duration) -> Self {
        Self { time, ..Self::default() }
    }
}

/// Between start and stop. The clock is read last and first: counting isn't in the time.
pub(crate) struct Meter {
    allocations: u64,
    cpu: Duration,
    began: Instant,
}

impl Meter {
    pub(crate) fn start() -> Self {
        Self { allocations: allocations(), cpu: cpu(), began: Instant::now() }
    }

    pub(crate) fn stop(&self) -> Took {
        let time = self.began.elapsed();
        let cpu = cpu().saturating_sub(self.cpu);
        Took { time, cpu, allocations: allocations() - self.allocations }
    }
}

fn cpu() -> Duration {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(cpu.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(cpu.tv_nsec).unwrap_or_default())
}

fn allocations() -> u64 {
    let stats = ALLOCATOR.stats();
    (stats.allocations + stats.reallocations) as u64
}
