//! Time and randomness, from the system; under feature `test-kit` a thread can replace both by a seeded
//! sequence, so that a simulated run can be repeated.

use uuid::Uuid;

/// Microseconds since 1970, by the system's clock. Information only: nothing is ordered by it.
pub(crate) fn now_us() -> i64 {
    #[cfg(feature = "test-kit")]
    if let Some(value) = seeded::next() {
        return (value >> 16) as i64;
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

/// Milliseconds since 1970, some of them late: what the system remembers from its last tick, for a third of the
/// price.
pub(crate) fn roughly_now_ms() -> i64 {
    #[cfg(feature = "test-kit")]
    if let Some(value) = seeded::next() {
        return (value >> 16) as i64 / 1000;
    }
    #[cfg(target_os = "linux")]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
    }
    #[cfg(not(target_os = "linux"))]
    {
        now_us() / 1000
    }
}

/// Milliseconds by a clock that all processes of the machine share, and that nobody sets. It begins anew with the machine.
#[cfg(feature = "shipping")]
pub(crate) fn monotonic_ms() -> i64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
}

/// Sixteen random bytes.
pub(crate) fn random_id() -> [u8; 16] {
    #[cfg(feature = "test-kit")]
    if let (Some(a), Some(b)) = (seeded::next(), seeded::next()) {
        return (u128::from(a) << 64 | u128::from(b)).to_le_bytes();
    }
    Uuid::new_v4().into_bytes()
}

/// A random number that isn't 0.
pub(crate) fn random_u64() -> u64 {
    #[cfg(feature = "test-kit")]
    if let Some(value) = seeded::next() {
        return value | 1;
    }
    // Two halves, because some bits of a version-4 UUID are fixed.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    (high ^ low.rotate_left(17)) | 1
}

/// How many steps of the work beside the commit path are taken behind a commit, where there is no thread for
/// them. One; a seeded run takes none for a while, or many.
pub(crate) fn background_steps() -> usize {
    #[cfg(feature = "test-kit")]
    return seeded::background_steps();
    #[cfg(not(feature = "test-kit"))]
    1
}

#[cfg(feature = "test-kit")]
mod seeded {
    use std::cell::RefCell;

    thread_local! {
        static RNG: RefCell<Option<fastrand::Rng>> = const { RefCell::new(None) };
        static PACE: RefCell<Option<Pace>> = const { RefCell::new(None) };
    }

    /// How many steps of the work beside the commit path are taken behind each commit.
    #[derive(Debug)]
    pub enum Pace {
        /// Always so many.
        Steps(usize),
        /// From none to so many.
        Drawn(usize, fastrand::Rng),
    }

    /// Sets the pace of the work beside the commit path where this thread does it: from a thread that never
    /// gets to run to one that is always done at once. `None`: one step behind each commit.
    pub fn pace_background(pace: Option<Pace>) {
        PACE.set(pace);
    }

    pub(super) fn background_steps() -> usize {
        PACE.with_borrow_mut(|pace| match pace {
            None => 1,
            Some(Pace::Steps(steps)) => *steps,
            Some(Pace::Drawn(most, rng)) => rng.usize(..=*most),
        })
    }

    /// Makes time and randomness of this thread follow from `seed`; `None` gives them back to the system.
    pub fn seed(seed: Option<u64>) {
        RNG.set(seed.map(fastrand::Rng::with_seed));
    }

    pub(super) fn next() -> Option<u64> {
        RNG.with_borrow_mut(|rng| rng.as_mut().map(|rng| rng.u64(..)))
    }
}

#[cfg(feature = "test-kit")]
pub use seeded::{Pace, pace_background, seed};
