//! Many seeds on several threads: progress, a watchdog for what hangs, failing seeds.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

use super::Check;

/// A run hangs if the process has worked for so long meanwhile. Not by the clock: on a busy machine, or stopped by a
/// signal, nothing hangs that only waits for its turn.
const HANGS_AFTER: Duration = Duration::from_secs(60);
/// But if nothing works at all, because every thread hangs, the clock has to tell.
const HANGS_BY_THE_CLOCK_AFTER: Duration = Duration::from_secs(900);

/// What was on both clocks when a run began.
#[derive(Clone, Copy)]
struct Began {
    seed: u64,
    at: Instant,
    worked: Duration,
}

impl Began {
    fn now(seed: u64) -> Self {
        Self { seed, at: Instant::now(), worked: worked() }
    }

    fn hangs(&self) -> bool {
        worked().saturating_sub(self.worked) > HANGS_AFTER
            || self.at.elapsed() > HANGS_BY_THE_CLOCK_AFTER
    }
}

/// Processor time of the whole process.
fn worked() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap()
}

/// When enough has been tried.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Until {
    pub(crate) crashes: Option<u64>,
    pub(crate) time: Option<Duration>,
}

/// What a campaign came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) runs: u64,
    pub(crate) crashes: u64,
    /// Seeds and what was wrong.
    pub(crate) failures: Vec<(u64, String)>,
}

/// Runs `one` (a seed to a number of crashes) over seeds from `first` on, until enough has been tried or
/// something has failed. `progress` is called every second.
///
/// # Panics
/// If a run hangs: nothing can be done about its thread.
pub(crate) fn over_seeds(
    first: u64,
    until: Until,
    one: impl Fn(u64) -> Check<u64> + Sync,
    progress: impl Fn(&Tally),
) -> Tally {
    let next = AtomicU64::new(first);
    let stop = AtomicBool::new(false);
    let tally = Mutex::new(Tally::default());
    let running: Mutex<BTreeMap<usize, Began>> = Mutex::default();
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let worker = &|number: usize| {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            running.lock().insert(number, Began::now(seed));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(seed)));
            let outcome = outcome.unwrap_or_else(|_| Err(format!("seed {seed}: panicked")));
            running.lock().remove(&number);
            let mut tally = tally.lock();
            tally.runs += 1;
            match outcome {
                Ok(crashes) => tally.crashes += crashes,
                Err(what) => tally.failures.push((seed, what)),
            }
            let enough = until.crashes.is_some_and(|crashes| tally.crashes >= crashes)
                || until.time.is_some_and(|time| began.elapsed() >= time)
                || !tally.failures.is_empty();
            stop.fetch_or(enough, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|n| scope.spawn(move || worker(n))).collect();
        let mut shown = Instant::now();
        while workers.iter().any(|worker| !worker.is_finished()) {
            std::thread::park_timeout(Duration::from_millis(20));
            for run in running.lock().values() {
                if run.hangs() {
                    eprintln!("seed {} hangs", run.seed);
                    std::process::exit(1);
                }
            }
            if shown.elapsed() >= Duration::from_secs(1) {
                shown = Instant::now();
                progress(&tally.lock());
            }
        }
    });
    tally.into_inner()
}
