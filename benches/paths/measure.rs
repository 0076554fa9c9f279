//! Taking turns, and what comes out of them.
//!
//! ```text
//!   turn 1: way A, way B, way C     turn 2: way A, way B, way C     ...
//! ```
//! All ways of a group see the same good and bad moments. A ratio is computed within a turn.

use std::time::{Duration, Instant};

use crate::Outcome;
use crate::meter::Took;
use crate::shared::device::{Counted, Device};
use crate::shared::spread::Spread;
use crate::{Group, Way};

/// How long a turn is.
const TURN: Duration = Duration::from_millis(150);

/// How long each way is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effort {
    /// One operation each.
    Smoke,
    Seconds(f64),
}

/// What a way took, turn by turn.
#[derive(Default)]
pub(crate) struct Measured {
    events: u64,
    turns: Vec<Turn>,
}

/// The operations of a turn.
struct Turn {
    took: Vec<Took>,
    device: Option<Counted>,
}

pub(crate) fn measure(
    group: &mut Group,
    effort: Effort,
    device: Option<&Device>,
) -> Outcome<Vec<Measured>> {
    let ways = &mut group.ways;
    let mut measured: Vec<_> =
        ways.iter().map(|way| Measured { events: way.events, turns: Vec::new() }).collect();
    let (budget, turn) = match effort {
        Effort::Smoke => (Duration::ZERO, Duration::ZERO),
        Effort::Seconds(seconds) => {
            for way in &mut *ways {
                (way.operation)()?; // the first one finds caches cold
            }
            (Duration::from_secs_f64(seconds * group.patience), TURN)
        }
    };
    let budget = budget * u32::try_from(ways.len())?;
    let began = Instant::now();
    loop {
        for (way, measured) in ways.iter_mut().zip(&mut measured) {
            measured.turns.push(take_turn(way, turn, device)?);
        }
        if began.elapsed() >= budget {
            return Ok(measured);
        }
    }
}

/// At least one operation.
fn take_turn(way: &mut Way, turn: Duration, device: Option<&Device>) -> Outcome<Turn> {
    let count = || device.and_then(Device::counted);
    let (before, began) = (count(), Instant::now());
    let mut took = Vec::new();
    loop {
        took.push((way.operation)()?);
        if began.elapsed() >= turn {
            break;
        }
    }
    let device = before.zip(count()).map(|(before, after)| Counted {
        writes: after.writes - before.writes,
        flushes: after.flushes - before.flushes,
    });
    Ok(Turn { took, device })
}

impl Turn {
    fn median(&self) -> Duration {
        let mut times: Vec<_> = self.took.iter().map(|it| it.time).collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }

    fn sum(&self, of: impl Fn(&Took) -> f64) -> f64 {
        self.took.iter().map(of).sum()
    }

    fn count(&self) -> f64 {
        self.took.len() as f64
    }
}

impl Measured {
    pub(crate) fn operations(&self) -> usize {
        self.turns.iter().map(|turn| turn.took.len()).sum()
    }

    /// Of all operations; `None` where there are too few to say.
    pub(crate) fn quantile(&self, part: f64) -> Option<Duration> {
        let mut times: Vec<_> =
            self.turns.iter().flat_map(|turn| &turn.took).map(|it| it.time).collect();
        times.sort_unstable();
        let beyond = times.len() as f64 * (1.0 - part);
        let index = (times.len().saturating_sub(1) as f64 * part).round() as usize;
        // At least two lie beyond it. (The median of one is that one.)
        (part <= 0.5 || beyond >= 2.0).then(|| times.get(index).copied()).flatten()
    }

    /// Something of each turn.
    fn of(&self, turn: impl Fn(&Turn) -> f64) -> Option<Spread> {
        Spread::of(self.turns.iter().map(turn))
    }

    fn events_of(&self, turn: &Turn) -> f64 {
        self.events as f64 * turn.count()
    }

    fn speed_of(&self, turn: &Turn) -> f64 {
        self.events as f64 / turn.median().as_secs_f64()
    }

    fn throughput_of(&self, turn: &Turn) -> f64 {
        self.events_of(turn) / turn.sum(|it| it.time.as_secs_f64())
    }

    /// Events per second.
    pub(crate) fn throughput(&self) -> Option<Spread> {
        self.of(|turn| self.throughput_of(turn))
    }

    /// Of the median operation of each turn, in seconds.
    pub(crate) fn seconds(&self) -> Option<Spread> {
        self.of(|turn| turn.median().as_secs_f64())
    }

    /// Processor time of an event, in seconds; `None` where only time was taken.
    pub(crate) fn cpu_per_event(&self) -> Option<Spread> {
        let cpu = |turn: &Turn| turn.sum(|it| it.cpu.as_secs_f64()) / self.events_of(turn);
        self.of(cpu).filter(|cpu| cpu.max > 0.0)
    }

    pub(crate) fn allocations_per_event(&self) -> Option<Spread> {
        self.cpu_per_event()?;
        self.of(|turn| turn.sum(|it| it.allocations as f64) / self.events_of(turn))
    }

    /// Writes of the device per operation, for whomever they were.
    pub(crate) fn device_writes(&self) -> Option<Spread> {
        let writes = |turn: &Turn| turn.device.map_or(f64::NAN, |it| it.writes as f64);
        self.of(|turn| writes(turn) / turn.count())
    }

    /// How many times faster the median operation is, per event, than another way's in the same turn.
    pub(crate) fn times_faster(&self, other: &Self) -> Option<Spread> {
        let pairs = self.turns.iter().zip(&other.turns);
        Spread::of(pairs.map(|(own, others)| self.speed_of(own) / other.speed_of(others)))
    }

    /// How many times the other way's events per second, in the same turn.
    pub(crate) fn times_throughput(&self, other: &Self) -> Option<Spread> {
        let pairs = self.turns.iter().zip(&other.turns);
        Spread::of(pairs.map(|(own, others)| self.throughput_of(own) / other.throughput_of(others)))
    }
}
