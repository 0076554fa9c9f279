//! Subscribers that take nothing: whoever tries what becomes of the others brings one here to a stop first, and looks that
//! it stands still while they are served. Which of both comes first is what counts, not how long it takes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use headwater::JournalOptions;
use headwater::shipping::{Deadlines, PeerState, PeerStatus, ServeOptions, Server};

const SOON: Duration = Duration::from_secs(60);

/// More than the sockets of both sides hold, in events of [`EVENT_BYTES`].
pub(crate) const EVENTS: usize = 24;
pub(crate) const EVENT_BYTES: usize = 900_000;

/// Takes events of that size.
pub(crate) fn large() -> JournalOptions {
    JournalOptions {
        batch_bytes_max: 1 << 20,
        group_bytes_max: 1 << 20,
        segment_bytes_first: 4 << 20,
        segment_bytes_max: 4 << 20,
        ..JournalOptions::default()
    }
}

/// Nobody is cut off, neither for being quiet nor for taking nothing; and it is soon noticed that somebody is stuck.
pub(crate) fn patient() -> ServeOptions {
    let (never, heartbeat) = (Duration::from_secs(3600), Duration::from_millis(50));
    let deadlines = Deadlines { silence: never, heartbeat, ..Deadlines::default() };
    ServeOptions { deadlines, write_stall: never, ..ServeOptions::default() }
}

/// The same, but who takes nothing is cut off.
pub(crate) fn impatient() -> ServeOptions {
    ServeOptions { write_stall: Duration::from_millis(400), ..patient() }
}

/// More than there are threads to serve those who catch up.
pub(crate) const STALLED: usize = 3;

fn peer(server: &Server, address: SocketAddr) -> Option<PeerStatus> {
    server.peers().into_iter().find(|peer| peer.address == address)
}

/// How much those were sent that are connected from `stalled`, if all of them are stuck.
fn sent_to_stuck(server: &Server, stalled: &[SocketAddr]) -> Option<u64> {
    let peers = stalled.iter().map(|address| peer(server, *address).expect("it was cut off"));
    let is_stuck = |peer: &PeerStatus| peer.state == PeerState::Stalled && peer.sent_bytes > 0;
    peers.map(|peer| is_stuck(&peer).then_some(peer.sent_bytes)).sum()
}

/// Waits until all who are connected from `stalled` and read nothing are stuck.
pub(crate) fn wait_stuck(server: &Server, stalled: &[SocketAddr]) {
    let deadline = Instant::now() + SOON;
    while sent_to_stuck(server, stalled).is_none() {
        assert!(Instant::now() < deadline, "they aren't stuck: {:?}", server.peers());
        std::thread::yield_now();
    }
}

/// Waits until all who are connected from `stalled` and read nothing are stuck; then serves others again and again: each
/// time they have what was committed before one of the stalled has got a byte more.
pub(crate) fn assert_delay_nobody(
    server: &Server,
    stalled: &[SocketAddr],
    mut serve_others: impl FnMut(),
) {
    let deadline = Instant::now() + SOON;
    let (mut served, mut before) = (0, None);
    while served < 20 {
        match sent_to_stuck(server, stalled) {
            Some(sent) => {
                // Buffers may have taken a little more: then it begins again.
                served = if before == Some(sent) { served + 1 } else { 0 };
                before = Some(sent);
                serve_others();
            }
            None => std::thread::yield_now(),
        }
        assert!(Instant::now() < deadline, "they aren't stuck: {:?}", server.peers());
    }
    // What they lack isn't only what was committed meanwhile.
    for address in stalled {
        let peer = peer(server, *address).unwrap();
        let sent = peer.sent.map_or(0, |sent| sent.offset);
        let events = (EVENTS * EVENT_BYTES) as u64;
        assert!(sent < events, "it was sent {sent} bytes of {events}: that is no stall");
    }
}

/// Waits until whoever is connected from this address isn't any more.
pub(crate) fn wait_cut_off(server: &Server, stalled: SocketAddr) {
    let deadline = Instant::now() + SOON;
    while let Some(peer) = peer(server, stalled) {
        assert!(Instant::now() < deadline, "it is still connected: {peer:?}");
        std::thread::yield_now();
    }
}
