//! A crash at every step.
//!
//! ```text
//!  for n in 0, 1, 2, …      scenario on a new disk ──▶ down during operation n
//!                                                        │ the disk as it is now, several times
//!                       ┌────────────────┬───────────────┴──────────────┐
//!                     killed     unsynced all lost     unsynced lost or kept, drawn (several)
//!                       └────────────────┴───────────────┬──────────────┘
//!                                                        ▼ each: check
//!  until the scenario ends before it comes to operation n; the crash is behind its end then
//! ```

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::disk::{Crash, MemoryDisk};
use crate::reactor::message_of;

/// What scenarios and checks return; any error turns into it with `?`.
pub type CrashResult = Result<(), Box<dyn Error>>;

/// Runs a scenario again and again, and crashes it at each of its disk operations; see [`CrashTest::run`].
///
/// ```
/// use headwater::testing::CrashTest;
/// use headwater::{Append, ExpectedRevision, NewEvent, Position, StreamId};
///
/// let crashes = CrashTest::new().run(
///     // What the service does. It notes in `done` what it was told is durable.
///     |disk, done: &mut Vec<Position>| {
///         let store = disk.store("orders")?;
///         for n in 0..3 {
///             let order = StreamId::new(format!("order-{n}"))?;
///             let placed = NewEvent::raw("order.placed", *b"1250")?;
///             let appended = store.append(&Append::to(&order, ExpectedRevision::NoStream, [placed]))?;
///             done.push(appended.receipt().events[0].position);
///         }
///         store.close()?;
///         Ok(())
///     },
///     // What must hold after every crash.
///     |disk, done| {
///         let store = disk.store("orders")?;
///         let events = store.read_all(Position::START)?.collect::<Result<Vec<_>, _>>()?;
///         assert!(done.iter().all(|position| events.iter().any(|it| it.position() == *position)));
///         assert!(events.len() <= done.len() + 1, "at most one more than was answered");
///         Ok(())
///     },
/// );
/// assert!(crashes.operations > 10);
/// ```
///
/// What is not tried: views (their rows aren't on this disk; fold them in memory from what the journal holds after the
/// crash), crashes of two stores on two machines, and a second crash during the check.
#[derive(Clone, Debug)]
pub struct CrashTest {
    seed: u64,
    draws: u32,
    only: Option<u64>,
}

/// What was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Crashes {
    /// At how many operations the scenario was crashed.
    pub operations: u64,
    /// How many crashes were checked: several at each operation, and behind the last one.
    pub crashes: u64,
}

impl Default for CrashTest {
    fn default() -> Self {
        Self::new()
    }
}

impl CrashTest {
    /// Crashes at every operation.
    #[must_use]
    pub fn new() -> Self {
        Self { seed: 0, draws: 2, only: None }
    }

    /// Sets the seed of what is left to chance. Default 0.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets how many power cuts with random losses are tried at each operation, beside the two that lose everything
    /// and nothing. Default 2.
    #[must_use]
    pub fn draws(mut self, draws: u32) -> Self {
        self.draws = draws;
        self
    }

    /// Crashes at this operation only: to look closer at a failure, whose message names it.
    #[must_use]
    pub fn at(mut self, operation: u64) -> Self {
        self.only = Some(operation);
        self
    }

    /// Runs `scenario` on new disks, crashing it at one operation after the other, and gives `check` what each crash
    /// has left: by a killed process, by power cuts that lose everything, and some, of what was not synced.
    ///
    /// `scenario` writes into its `T` what it may count on: what was acknowledged, what effects were seen. Once the crash
    /// has struck, every call on the disk fails, and what the scenario returns, or whether it panics, doesn't matter.
    /// `check` opens the stores anew, gets that `T`, and fails by an error or a panic.
    ///
    /// A scenario with one thread has the same operations in each run. With several threads, as with reactors or
    /// tickets, where a crash strikes varies.
    ///
    /// # Panics
    /// If a check fails, or the scenario fails without a crash. The message says how to repeat it.
    #[track_caller]
    pub fn run<T: Default>(
        &self,
        scenario: impl Fn(&MemoryDisk, &mut T) -> CrashResult,
        check: impl Fn(&MemoryDisk, &T) -> CrashResult,
    ) -> Crashes {
        let mut tried = Crashes { operations: 0, crashes: 0 };
        for operation in self.only.map_or(0.., |only| only..) {
            let disk = MemoryDisk::with_seed(self.seed.wrapping_add(operation));
            disk.stop_at(operation);
            let mut told = T::default();
            let ended = caught(|| scenario(&disk, &mut told));
            let has_struck = disk.is_down();
            if let (Err(why), false) = (ended, has_struck) {
                panic!("the scenario failed without a crash: {why}");
            }
            tried.crashes += self.check_all(operation, has_struck, &disk, &told, &check);
            if !has_struck {
                break;
            }
            tried.operations += 1;
            if self.only.is_some() {
                break;
            }
        }
        tried
    }

    /// Checks what each kind of crash leaves; how many there were.
    #[track_caller]
    fn check_all<T>(
        &self,
        operation: u64,
        has_struck: bool,
        disk: &MemoryDisk,
        told: &T,
        check: &impl Fn(&MemoryDisk, &T) -> CrashResult,
    ) -> u64 {
        let drawn = (0..self.draws).map(|_| Crash::PowerCutAtRandom);
        let mut crashes = 0;
        for crash in [Crash::Kill, Crash::PowerCut].into_iter().chain(drawn) {
            let left = disk.fork(self.seed.wrapping_add(crashes));
            left.crash(crash);
            if let Err(why) = caught(|| check(&left, told)) {
                let Self { seed, draws, .. } = self;
                let place =
                    if has_struck { "at" } else { "behind the scenario's end, in front of" };
                panic!(
                    "the check failed after a crash ({crash:?}) {place} operation {operation}: {why}\n\
                     to repeat it: CrashTest::new().seed({seed}).draws({draws}).at({operation})"
                );
            }
            crashes += 1;
        }
        crashes
    }
}

/// Why it failed, by an error or a panic.
fn caught(run: impl FnOnce() -> CrashResult) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| chain(&*error)),
        Err(panic) => Err(format!("panic: {}", message_of(&*panic))),
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(it) = cause {
        let more = it.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = it.source();
    }
    text
}
