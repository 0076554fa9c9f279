//! What commits take while many listen, one doesn't take what it is sent, and one is far behind.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use headwater::position::Checkpoint;

use super::origin::{Acked, Door, Origin};
use super::swarm::{Member, Swarm};
use super::{Scale, sale};
use crate::Outcome;
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, Rounds, ms, ratios};

const LIVE: usize = 100;
const INTERVAL: Duration = Duration::from_millis(4);
/// What there is to catch up with. More than sockets hold, less than a window.
const HISTORY_BYTES: u64 = 48 << 20;
/// As over a gigabit line.
const CATCH_UP_BYTES_PER_SECOND: u64 = 110 << 20;

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let dir = dir.join("origin");
    sale::filled(&dir, HISTORY_BYTES)?.close()?;
    let mut origin = Origin::start(&dir, "127.0.0.1:0")?;
    origin.commit(scale.crowd_commits, Duration::ZERO)?; // not counted
    let (mut alone, mut among) = (Rounds::default(), Rounds::default());
    for _ in 0..scale.crowd_rounds {
        alone.add(&latencies(&origin.commit(scale.crowd_commits, INTERVAL)?));
        let crowd = Crowd::gather(&mut origin)?;
        among.add(&latencies(&origin.commit(scale.crowd_commits, INTERVAL)?));
        crowd.leave()?;
        origin.wait_gone()?;
    }
    let what =
        format!("Commits with {LIVE} live subscribers, one stalled and one catching up: p99");
    let note = format!(
        "a commit every {} ms; the one that catches up takes {} MiB/s; they share the processors with the origin",
        INTERVAL.as_millis(),
        CATCH_UP_BYTES_PER_SECOND >> 20
    );
    let beside = "without any";
    Ok(vec![
        Figure::new(what, "ms", ms(&among.p99))
            .beside(beside, ms(&alone.p99), ratios(&among.p99, &alone.p99))
            .wanted(Wanted::RatioAtMost(1.1))
            .note(note),
        Figure::new("The same: p50", "ms", ms(&among.p50)).beside(
            beside,
            ms(&alone.p50),
            ratios(&among.p50, &alone.p50),
        ),
    ])
}

fn latencies(acked: &[Acked]) -> Latencies {
    let mut latencies = Latencies::default();
    acked.iter().for_each(|it| latencies.add_between_ns(it.called_ns, it.answered_ns));
    latencies
}

struct Crowd {
    live: Swarm,
    stop: Arc<AtomicBool>,
    others: [JoinHandle<Outcome<()>>; 2],
}

impl Crowd {
    fn gather(origin: &mut Origin) -> Outcome<Self> {
        let (door, begin) = (origin.door()?, origin.begin());
        let (knocks, again) = (door.clone(), door.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let live = Swarm::connect(vec![door], origin.end, LIVE)?;
        let (stalled, behind) = (Arc::clone(&stop), Arc::clone(&stop));
        let others = [
            std::thread::spawn(move || stall(&knocks, begin, &stalled)),
            std::thread::spawn(move || catch_up(&again, begin, &behind)),
        ];
        origin.wait_streaming(LIVE + 2)?;
        Ok(Self { live, stop, others })
    }

    fn leave(self) -> Outcome<()> {
        self.stop.store(true, Ordering::Release);
        for other in self.others {
            other.join().map_err(|_| "a subscriber panicked")??;
        }
        self.live.stop()
    }
}

/// Is alive, but takes nothing.
fn stall(door: &Door, begin: Checkpoint, stop: &AtomicBool) -> Outcome<()> {
    let mut member = Member::subscribe(door, None, begin)?;
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(200));
        member.acknowledge()?;
    }
    Ok(())
}

/// Begins at the beginning over and over, at the speed of a line.
fn catch_up(door: &Door, begin: Checkpoint, stop: &AtomicBool) -> Outcome<()> {
    let mut buffer = vec![0; 64 << 10];
    while !stop.load(Ordering::Acquire) {
        let mut member = Member::subscribe(door, None, begin)?;
        let (began, mut taken) = (Instant::now(), 0);
        while taken < HISTORY_BYTES - (1 << 20) && !stop.load(Ordering::Acquire) {
            taken += member.take(&mut buffer)?.map_or(0, |delivery| delivery.bytes());
            let due = Duration::from_secs_f64(taken as f64 / CATCH_UP_BYTES_PER_SECOND as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    Ok(())
}
