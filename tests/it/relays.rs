//! Mirrors that are served on: chains, rings, several upstreams, several journals at one address.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use headwater::fs::os::OsFs;
use headwater::shipping::{
    Addresses, FollowOptions, Mirror, MirrorStatus, ServeOptions, Server, follow, serve,
};

use crate::shipping::{Origin, SOON, assert_same_bytes, converged, small};

fn options() -> FollowOptions {
    FollowOptions { journal: small(), ..FollowOptions::default() }
}

/// An address that nobody listens at.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A mirror that is served on while it follows.
#[allow(dead_code, reason = "for more tests")]
struct Relay {
    dir: PathBuf,
    upstreams: Addresses,
    options: FollowOptions,
    address: SocketAddr,
    running: Option<(Mirror, Server)>,
}

#[allow(dead_code, reason = "for more tests")]
impl Relay {
    fn start(dir: PathBuf, upstreams: impl Into<Addresses>) -> Self {
        Self::start_at(free_address(), dir, upstreams, options())
    }

    fn start_at(
        address: SocketAddr,
        dir: PathBuf,
        upstreams: impl Into<Addresses>,
        options: FollowOptions,
    ) -> Self {
        let mut relay = Self { dir, upstreams: upstreams.into(), options, address, running: None };
        relay.open();
        relay
    }

    fn open(&mut self) {
        let upstreams = self.upstreams.clone();
        let mirror = follow(Arc::new(OsFs), &self.dir, upstreams, self.options.clone()).unwrap();
        let server = serve(&mirror, self.address, ServeOptions::default()).unwrap();
        self.running = Some((mirror, server));
    }

    fn close(&mut self) {
        let (mirror, server) = self.running.take().unwrap();
        server.shutdown();
        mirror.stop().unwrap();
    }

    fn mirror(&self) -> &Mirror {
        &self.running.as_ref().unwrap().0
    }

    fn server(&self) -> &Server {
        &self.running.as_ref().unwrap().1
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn node(&self) -> headwater::NodeId {
        self.mirror().wait_ready(SOON).unwrap().node()
    }
}

fn until(what: &str, mirror: &Mirror, condition: impl Fn(&MirrorStatus) -> bool) -> MirrorStatus {
    let waited = mirror.wait_until(SOON, condition);
    waited.unwrap_or_else(|error| panic!("{what}: {error}; {:?}", mirror.status()))
}

#[test]
fn s10_a_chain_of_three_relays_ships_every_byte_live_and_each_node_knows_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..100);
    // The last first: each waits for the one in front of it.
    let addresses = [free_address(), free_address(), free_address()];
    let upstreams = [origin.address, addresses[0], addresses[1]];
    let relays: Vec<_> = (0..3)
        .rev()
        .map(|n| {
            let dir = dir.path().join(format!("relay-{n}"));
            Relay::start_at(addresses[n], dir, upstreams[n].to_string(), options())
        })
        .collect();
    let leaf =
        follow(Arc::new(OsFs), &dir.path().join("leaf"), addresses[2].to_string(), options())
            .unwrap();
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    let path: Vec<_> = std::iter::once(origin.store().journal().node())
        .chain(relays.iter().rev().map(Relay::node))
        .collect();
    until("the whole path", &leaf, |status| status.path == path && status.is_live());
    origin.append(100..300);
    for mirror in relays.iter().map(Relay::mirror).chain([&leaf]) {
        let journal = converged(mirror, &origin);
        assert_same_bytes(origin.store().journal(), &journal);
        assert_eq!(journal.id(), origin.store().journal().id());
    }
}
