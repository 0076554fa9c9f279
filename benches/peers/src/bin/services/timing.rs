//! Times that processes can compare, and what many of them come to.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::shared::spread::Spread;

/// Nanoseconds of a clock that all processes of this machine share.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// Latencies in seconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies(Vec<f64>);

impl Latencies {
    pub(crate) fn add(&mut self, latency: Duration) {
        self.0.push(latency.as_secs_f64());
    }

    pub(crate) fn add_between_ns(&mut self, from: u64, to: u64) {
        self.add(Duration::from_nanos(to.saturating_sub(from)));
    }

    pub(crate) fn append(&mut self, others: &mut Self) {
        self.0.append(&mut others.0);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest that at least this part of all doesn't exceed; infinite if there is none.
    pub(crate) fn percentile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::INFINITY)
    }
}

/// The percentiles of some rounds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rounds {
    pub(crate) p50: Vec<f64>,
    pub(crate) p99: Vec<f64>,
}

impl Rounds {
    pub(crate) fn add(&mut self, latencies: &Latencies) {
        self.p50.push(latencies.percentile(0.5));
        self.p99.push(latencies.percentile(0.99));
    }
}

/// The spread of `these`, in milliseconds.
pub(crate) fn ms(these: &[f64]) -> Option<Spread> {
    Spread::of(these.iter().map(|seconds| seconds * 1e3))
}

/// The spread of the ratios, round by round.
pub(crate) fn ratios(these: &[f64], over: &[f64]) -> Option<Spread> {
    Spread::of(these.iter().zip(over).map(|(this, over)| this / over))
}
