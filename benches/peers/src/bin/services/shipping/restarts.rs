//! From SIGKILL to the first event that a mirror gets of the origin that was started again.

use std::path::Path;
use std::time::Duration;

use headwater::Store;

use super::origin::Origin;
use super::{PATIENCE, Scale, sale};
use crate::Outcome;
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, ms, now_ns};

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let at = dir.join("origin");
    sale::filled(&at, 16 << 20)?.close()?;
    let mut origin = Origin::start(&at, "127.0.0.1:0")?;
    let address = origin.address.to_string();
    let follower = Store::create(dir.join("follower"))?;
    let mirror = follower.mirror("origin", address.clone())?;
    let journal = mirror.wait_ready(PATIENCE)?;
    let (mut since_kill, mut since_answer) = (Latencies::default(), Latencies::default());
    for _ in 0..scale.kills {
        origin.commit(10, Duration::ZERO)?;
        mirror.wait_caught_up(PATIENCE)?;
        let killed_ns = now_ns();
        origin.kill()?;
        origin = Origin::start(&at, &address)?;
        let first = origin.commit(1, Duration::ZERO)?;
        let first = first.first().ok_or("no commit")?;
        let last = headwater::Position::new(first.position.get() - 1);
        if journal.wait_past(last, PATIENCE).position < first.position {
            return Err("the mirror doesn't come back".into());
        }
        let arrived_ns = now_ns();
        since_kill.add_between_ns(killed_ns, arrived_ns);
        since_answer.add_between_ns(first.answered_ns, arrived_ns);
    }
    let note = format!(
        "{} kills; p50 {:.0} ms; of that, after the event's answer: p50 {:.0} ms, p99 {:.0} ms",
        scale.kills,
        since_kill.percentile(0.5) * 1e3,
        since_answer.percentile(0.5) * 1e3,
        since_answer.percentile(0.99) * 1e3,
    );
    let what = "SIGKILL of the origin and a restart at once, until the first new event is durable in the mirror: p99";
    Ok(vec![
        Figure::new(what, "ms", ms(&[since_kill.percentile(0.99)]))
            .wanted(Wanted::AtMost(1_000.0))
            .note(note),
    ])
}
