//! What Headwater is held to, as far as others or a tracer are needed to measure it.

use crate::engine::Kind;
use crate::report::Data;
use crate::runner::{Cell, Measured};
use crate::shared::held::{self, Held};
use crate::shared::spread::Spread;
use crate::worker::Load;

const ONE: Load = Load { writers: 1, batch: 1, payload_bytes: 256 };

pub(crate) fn held(data: &Data) -> Vec<Held> {
    let calls = across_rolls(data);
    let best = [
        over_best_peer(data, held::BEST_PEER_64, Load { writers: 64, ..ONE }),
        over_best_peer(data, held::BEST_PEER_BATCHES, Load { batch: 1000, ..ONE }),
    ];
    calls.into_iter().chain(best.into_iter().flatten()).collect()
}

/// How many times the peer that was fastest in the median, round by round.
fn over_best_peer(data: &Data, id: &str, load: Load) -> Option<Held> {
    let Cell { entries, .. } = data.cell(Measured::Append(load))?;
    let peers = entries.iter().filter(|entry| data.kind(&entry.peer) == Kind::Peer);
    let measured = peers.filter_map(|entry| Some((entry, entry.value?)));
    let (best, value) = measured.max_by(|a, b| a.1.median.total_cmp(&b.1.median))?;
    let absent = entries.iter().filter(|entry| entry.value.is_none()).count();
    let note = match absent {
        0 => format!("the best: {}, {:.0} events/s", best.peer, value.median),
        absent => format!(
            "the best: {}, {:.0} events/s; {absent} weren't measured",
            best.peer, value.median
        ),
    };
    Held::new(id, best.headwater, note)
}

fn across_rolls(data: &Data) -> Vec<Held> {
    let Some(counted) = &data.results.across_rolls else { return Vec::new() };
    let (commits, rolls) = (counted.commits, counted.rolls);
    let per = |count: u64, of: u64| Spread::of([count as f64 / of as f64]);
    let syncs = format!(
        "{} by the committing thread in {commits} commits with {rolls} rolls",
        counted.syncs
    );
    let beside = "what other threads did isn't counted";
    let all = [
        Held::new(held::SYNCS, per(counted.syncs, commits), syncs),
        Held::new(
            held::DIRECTORY_SYNCS,
            per(counted.directory_syncs, rolls),
            format!("{} in {rolls} rolls; {beside}", counted.directory_syncs),
        ),
        Held::new(
            held::CREATIONS,
            per(counted.creations, rolls),
            format!("{} in {rolls} rolls; {beside}", counted.creations),
        ),
    ];
    all.into_iter().flatten().collect()
}
