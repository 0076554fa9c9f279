//! From an append's answer until a view in another service shows it, beside one durable round trip.

use std::path::Path;
use std::time::{Duration, Instant};

use headwater::Store;
use headwater::shipping::{Mirror, Server};
use headwater::view::ViewHandle;

use super::{PATIENCE, Scale, sale};
use crate::Outcome;
use crate::baseline::Device;
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, Rounds, ms, ratios};
use crate::wire::Peer;

const FILE_BYTES: u64 = 64 << 20;

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let remote = Remote::start(dir)?;
    let before = remote.origin.journal().end().offset;
    remote.append_and_see(0)?;
    let bytes = remote.origin.journal().end().offset - before;
    let message = vec![0xA5; usize::try_from(bytes)?];
    let mut here = Device::create(&dir.join("here"), FILE_BYTES)?;
    let mut peer = Peer::start(Device::create(&dir.join("there"), FILE_BYTES)?, message.len())?;

    let (mut bare, mut ours) = (Rounds::default(), Rounds::default());
    let mut number = 0;
    for _ in 0..scale.rounds {
        let (mut of_bare, mut of_ours) = (Latencies::default(), Latencies::default());
        for _ in 0..scale.commits_per_round {
            here.write_synced(&message)?; // as an append would
            let answered = Instant::now();
            peer.send(&message)?;
            of_bare.add(answered.elapsed());

            number += 1;
            let append = sale::append(number, 1)?;
            let token = remote.origin.append(&append)?.token();
            let answered = Instant::now();
            remote.view.wait_for(&token, PATIENCE)?;
            of_ours.add(answered.elapsed());
        }
        bare.add(&of_bare);
        ours.add(&of_ours);
    }
    let beside = "send, write + fdatasync, reply";
    let note =
        "the mirror is durable before its view shows it; one writer, one subscriber, the loopback";
    Ok(vec![
        Figure::new("Append's answer to a view elsewhere, 256 B: p50", "ms", ms(&ours.p50))
            .beside(beside, ms(&bare.p50), ratios(&ours.p50, &bare.p50))
            .wanted(Wanted::RatioAtMost(2.0))
            .note(note),
        Figure::new("The same: p99", "ms", ms(&ours.p99))
            .beside(beside, ms(&bare.p99), ratios(&ours.p99, &bare.p99))
            .wanted(Wanted::AtMost(3.0)),
    ])
}

/// A store, and another one on this machine with a view of its journal.
pub(super) struct Remote {
    origin: Store,
    view: ViewHandle<sale::Bought>,
    // Dropped behind them: the mirror follows the server.
    _mirror: Mirror,
    _follower: Store,
    _server: Server,
}

impl Remote {
    pub(super) fn start(dir: &Path) -> Outcome<Self> {
        let origin = Store::create(dir.join("origin"))?;
        let server = origin.serve("127.0.0.1:0")?;
        let follower = Store::create(dir.join("follower"))?;
        let mirror = follower.mirror("origin", server.local_addr().to_string())?;
        origin.append(&sale::append(0, 1)?)?;
        let view = follower.view_of(&mirror.wait_ready(PATIENCE)?, sale::Bought)?;
        Ok(Self { origin, view, _mirror: mirror, _follower: follower, _server: server })
    }

    /// From the beginning of an append until the view shows it.
    pub(super) fn append_and_see(&self, number: u64) -> Outcome<Duration> {
        let append = sale::append(number, 1)?;
        let began = Instant::now();
        let token = self.origin.append(&append)?.token();
        self.view.wait_for(&token, PATIENCE)?;
        Ok(began.elapsed())
    }
}
