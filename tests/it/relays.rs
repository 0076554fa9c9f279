//! Mirrors that are served on: chains, rings, several upstreams, several journals at one address.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::shipping::message::{ErrorCode, Speaker};
use headwater::shipping::security::{
    Access, AccessList, Anonymous, Peer, Right, Security, SecurityOptions,
};
use headwater::shipping::{
    Addresses, Deadlines, FollowOptions, ForkPolicy, Mirror, MirrorState, MirrorStatus,
    ServeOptions, Served, Server, ShippingError, follow, serve,
};
use headwater::{Checkpoint, JournalId, NodeId, Position};

use crate::shipping::{
    Origin, SOON, assert_same_bytes, converged, copy_dir, false_origin_of, replace_dir, small,
};

fn options() -> FollowOptions {
    FollowOptions { journal: small(), ..FollowOptions::default() }
}

/// An address that nobody listens at.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A mirror that is served on while it follows.
struct Relay {
    dir: PathBuf,
    upstreams: Addresses,
    options: FollowOptions,
    address: SocketAddr,
    running: Option<(Mirror, Server)>,
}

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

    fn node(&self) -> NodeId {
        self.mirror().wait_ready(SOON).unwrap().node()
    }
}

fn until(what: &str, mirror: &Mirror, condition: impl Fn(&MirrorStatus) -> bool) -> MirrorStatus {
    let waited = mirror.wait_until(SOON, condition);
    waited.unwrap_or_else(|error| panic!("{what}: {error}; {:?}", mirror.status().upstreams))
}

fn start_leaf(dir: &Path, upstreams: impl Into<Addresses>, options: FollowOptions) -> Mirror {
    follow(Arc::new(OsFs), dir, upstreams, options).unwrap()
}

fn halted(mirror: &Mirror) -> ShippingError {
    match until("halted", mirror, MirrorStatus::is_halted).state {
        MirrorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

fn quarantine() -> FollowOptions {
    FollowOptions { forks: ForkPolicy::Quarantine, ..options() }
}

/// What is silent is noticed soon.
fn brisk() -> Deadlines {
    let heartbeat = Duration::from_millis(50);
    Deadlines { heartbeat, silence: Duration::from_secs(1), ..Deadlines::default() }
}

fn is_cycle(error: Option<&ShippingError>) -> bool {
    matches!(error, Some(ShippingError::Cycle { .. }))
}

fn is_not_yet(error: Option<&ShippingError>, position: u64) -> bool {
    matches!(error, Some(ShippingError::Reported { failure })
        if failure.code == ErrorCode::NOT_YET && failure.position == Some(Position::new(position)))
}

/// The files of a mirror that isn't followed, up to its durable end.
fn used_bytes(dir: &Path) -> (Checkpoint, Vec<Vec<u8>>) {
    let fs: Arc<dyn headwater::fs::Fs> = Arc::new(OsFs);
    let (journal, damage) = headwater::Journal::open_read_only(&fs, dir).unwrap();
    assert!(damage.is_none(), "{damage:?}");
    let used = |segment: headwater::SegmentInfo| {
        let mut bytes = std::fs::read(&segment.path).unwrap();
        bytes.truncate((4096 + segment.end_offset - segment.base_offset) as usize);
        bytes
    };
    (journal.end(), journal.segments().into_iter().map(used).collect())
}

#[test]
fn s10_a_chain_of_three_relays_ships_every_byte_live_and_each_node_knows_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..100);
    // The last first: each waits for the one in front of it.
    let addresses = [free_address(), free_address(), free_address()];
    let upstreams = [origin.address, addresses[0], addresses[1]];
    let start = |n: usize| {
        let dir = dir.path().join(format!("relay-{n}"));
        Relay::start_at(addresses[n], dir, upstreams[n].to_string(), options())
    };
    let leaf = start_leaf(&dir.path().join("leaf"), addresses[2].to_string(), options());
    let mut relays: Vec<_> = (0..3).rev().map(start).collect();
    relays.reverse();
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    let nodes = relays.iter().map(Relay::node);
    let path: Vec<_> = std::iter::once(origin.store().journal().node()).chain(nodes).collect();
    let knows_all = |status: &MirrorStatus| status.path == path && status.lag_events() == Some(0);
    until("the whole path", &leaf, knows_all);
    for (n, relay) in relays.iter().enumerate() {
        until("its part of it", relay.mirror(), |status| status.path == path[..=n]);
    }
    origin.append(100..300);
    for mirror in relays.iter().map(Relay::mirror).chain([&leaf]) {
        let journal = converged(mirror, &origin);
        assert_same_bytes(origin.store().journal(), &journal);
        assert_eq!(journal.id(), origin.store().journal().id());
    }
    assert_eq!(leaf.wait_caught_up(SOON).unwrap(), origin.store().journal().end());
}

/// Each follows the next, and nobody the origin.
#[test]
fn s10_a_ring_of_three_is_refused_as_a_cycle_and_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..60);
    let addresses = [free_address(), free_address(), free_address()];
    let dirs = [0, 1, 2].map(|n| dir.path().join(format!("relay-{n}")));
    let mut relays: Vec<_> = (0..3)
        .map(|n| {
            let upstream = origin.address.to_string();
            let mut relay = Relay::start_at(addresses[n], dirs[n].clone(), upstream, options());
            assert_same_bytes(origin.store().journal(), &converged(relay.mirror(), &origin));
            relay.close();
            relay
        })
        .collect();
    origin.close();
    let before = dirs.each_ref().map(|dir| used_bytes(dir));
    for n in 0..3 {
        relays[n].upstreams = addresses[(n + 1) % 3].to_string().into();
        relays[n].open();
    }
    let deadline = Instant::now() + SOON;
    let refused = loop {
        let is_refused = |relay: &Relay| is_cycle(relay.mirror().status().last_error.as_ref());
        match relays.iter().find(|relay| is_refused(relay)) {
            Some(refused) => break refused,
            None => assert!(Instant::now() < deadline, "nobody has found the ring"),
        }
        std::thread::yield_now();
    };
    match refused.mirror().status().last_error {
        Some(ShippingError::Cycle { path }) => assert!(path.contains(&refused.node()), "{path:?}"),
        other => panic!("{other:?}"),
    }
    for relay in &relays {
        let status = relay.mirror().status();
        assert_eq!(status.lag_events(), None, "nobody hears from the origin");
        assert_eq!((status.mirrored, status.is_halted()), (Some(before[0].0), false));
    }
    // The ring is opened somewhere: everybody gets everything, and nobody has to do anything.
    relays[1].close();
    origin.open();
    origin.append(60..90);
    relays[1].upstreams = origin.address.to_string().into();
    relays[1].open();
    for relay in &relays {
        assert_same_bytes(origin.store().journal(), &converged(relay.mirror(), &origin));
    }
    relays.iter_mut().for_each(Relay::close);
    for (dir, (_, before)) in dirs.iter().zip(&before) {
        let (_, now) = used_bytes(dir);
        for (before, now) in before.iter().zip(&now) {
            assert!(now.starts_with(before), "what was there has changed");
        }
    }
}

/// The first of the ring has the origin, too: while that is away, it doesn't follow itself.
#[test]
fn s10_a_ring_with_an_origin_never_follows_itself_and_goes_on_when_the_origin_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..30);
    let addresses = [free_address(), free_address(), free_address()];
    let upstreams = [
        Addresses::from([origin.address.to_string(), addresses[2].to_string()]),
        addresses[0].to_string().into(),
        addresses[1].to_string().into(),
    ];
    let relays: Vec<_> = upstreams
        .into_iter()
        .enumerate()
        .map(|(n, upstreams)| {
            let dir = dir.path().join(format!("relay-{n}"));
            Relay::start_at(addresses[n], dir, upstreams, options())
        })
        .collect();
    relays.iter().for_each(|relay| drop(converged(relay.mirror(), &origin)));
    let path_len = |len| move |status: &MirrorStatus| status.path.len() == len;
    relays.iter().zip(1..).for_each(|(it, len)| drop(until("path", it.mirror(), path_len(len))));
    origin.close();
    let refused = until("a cycle", relays[0].mirror(), |status| {
        is_cycle(status.upstreams[1].last_error.as_ref())
    });
    assert!(!refused.is_halted() && refused.upstreams[0].last_error.is_some(), "{refused:?}");
    until("lag isn't known", relays[2].mirror(), |status| status.lag_events().is_none());
    origin.open();
    origin.append(30..60);
    for relay in &relays {
        assert_same_bytes(origin.store().journal(), &converged(relay.mirror(), &origin));
    }
}

#[test]
fn a_relay_in_the_middle_may_go_and_come_back_at_any_time() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    let mut relay = Relay::start(dir.path().join("relay"), origin.address.to_string());
    let mut last = Relay::start(dir.path().join("last"), relay.address());
    for round in 0..6 {
        origin.append(round * 40..round * 40 + rng.usize(1..40));
        match rng.u8(..3) {
            0 => relay.close(),
            1 => drop(relay.running.take()),
            _ => origin.close(),
        }
        if rng.bool() {
            last.close();
            last.open();
        }
        if relay.running.is_none() {
            origin.append(0..rng.usize(..20));
            relay.open();
        } else {
            origin.open();
        }
        let journal = converged(last.mirror(), &origin);
        assert_same_bytes(origin.store().journal(), &journal);
    }
}

#[test]
fn a_mirror_of_several_upstreams_goes_on_with_the_next_and_its_subscribers_learn_the_new_path() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..40);
    let first = Relay::start(dir.path().join("first"), origin.address.to_string());
    converged(first.mirror(), &origin);
    let upstreams = [first.address(), origin.address.to_string()];
    let choosy = FollowOptions { journal_id: Some(origin.store().journal().id()), ..options() };
    let middle = Relay::start_at(free_address(), dir.path().join("middle"), upstreams, choosy);
    let leaf = start_leaf(&dir.path().join("leaf"), middle.address(), options());
    converged(&leaf, &origin);
    let (o, f, m) = (origin.store().journal().node(), first.node(), middle.node());
    until("by the relay", &leaf, |status| status.path == [o, f, m]);
    let status = until("the first in use", middle.mirror(), |it| it.upstreams[0].is_in_use);
    assert_eq!((status.address, status.upstreams[1].is_in_use), (first.address(), false));
    drop(first);
    origin.append(40..80);
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    until("directly", &leaf, |status| status.path == [o, m] && status.lag_events() == Some(0));
    let status = middle.mirror().status();
    assert_eq!(status.address, origin.address.to_string());
    let last_errors: Vec<_> =
        status.upstreams.iter().map(|upstream| upstream.last_error.is_some()).collect();
    assert_eq!(last_errors, [true, false], "{status:?}");
    origin.close();
    until("both are gone", middle.mirror(), |status| {
        status.upstreams.iter().all(|upstream| upstream.last_error.is_some() && !upstream.is_in_use)
    });
    origin.open();
    origin.append(80..90);
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
}

#[test]
fn an_upstream_that_refuses_hinders_no_other_and_only_what_all_refuse_halts() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    let foreign = Origin::start(dir.path().join("foreign"), small());
    origin.append(0..20);
    let right = FollowOptions { journal_id: Some(origin.store().journal().id()), ..options() };
    let upstreams = [foreign.address.to_string(), origin.address.to_string()];
    let leaf_dir = dir.path().join("leaf");
    let leaf = start_leaf(&leaf_dir, upstreams, right.clone());
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    let status = until("it is served", &leaf, |status| status.upstreams[1].is_in_use);
    let refused = status.upstreams[0].last_error.as_ref();
    assert!(matches!(refused, Some(ShippingError::Foreign { .. })), "{refused:?}");
    origin.close();
    until("nobody serves", &leaf, |status| status.upstreams[1].last_error.is_some());
    assert!(!leaf.status().is_halted(), "the origin may come back");
    origin.open();
    leaf.resume();
    origin.append(20..30);
    converged(&leaf, &origin);
    leaf.stop().unwrap();
    let upstreams = [foreign.address.to_string(), foreign.address.to_string()];
    let leaf = start_leaf(&leaf_dir, upstreams, options());
    assert!(matches!(halted(&leaf), ShippingError::Foreign { .. }));
    leaf.stop().unwrap();
    let wrong = FollowOptions { journal_id: Some(foreign.store().journal().id()), ..options() };
    let opened = follow(Arc::new(OsFs), &leaf_dir, origin.address.to_string(), wrong);
    assert!(matches!(opened, Err(ShippingError::Foreign { .. })), "{opened:?}");
}

/// Whose own journal it would be is said by the first alone.
#[test]
fn a_mirror_that_knows_no_journal_yet_takes_that_of_its_first_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    let other = Origin::start(dir.path().join("other"), small());
    origin.append(0..20);
    other.append(0..5);
    origin.close();
    let upstreams = [origin.address.to_string(), other.address.to_string()];
    let leaf = start_leaf(&dir.path().join("leaf"), upstreams, options());
    until("the first is away", &leaf, |status| status.ends.total() >= 3);
    assert!(leaf.journal().is_none());
    let other_is = |status: &MirrorStatus| status.upstreams[1].last_error.clone();
    match other_is(&leaf.status()) {
        Some(error @ ShippingError::NotAsked) => assert!(error.hint().contains("journal_id")),
        other => panic!("it wasn't asked, and nobody is told: {other:?}"),
    }
    origin.open();
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    assert!(other_is(&leaf.status()).is_none(), "it may be asked from now on");
    leaf.stop().unwrap();
    origin.close();
    let named = FollowOptions { journal_id: Some(other.store().journal().id()), ..options() };
    let upstreams = [origin.address.to_string(), other.address.to_string()];
    let leaf = start_leaf(&dir.path().join("named"), upstreams, named);
    assert!(other_is(&leaf.status()).is_none());
    assert_same_bytes(other.store().journal(), &converged(&leaf, &other));
    let none = follow(Arc::new(OsFs), &dir.path().join("none"), Vec::<String>::new(), options());
    assert!(matches!(none, Err(ShippingError::Open(_))), "{none:?}");
}

/// Serves on one address its own journal and two mirrors, for those who may have the journals in `may`.
fn serve_three(own: &Origin, mirrors: [&Mirror; 2], may: Option<Vec<JournalId>>) -> Server {
    let security = may.map(|may| {
        let may = may.into_iter().map(Right::verbatim).collect();
        let peer = Peer { anonymous: Anonymous::Loopback, may, ..Peer::named("somebody") };
        let access = Access::List(AccessList::new([peer]).unwrap());
        Security::new(SecurityOptions { access, ..SecurityOptions::default() }).unwrap()
    });
    let options = ServeOptions { security, ..ServeOptions::default() };
    let served = Served::from(own.store().journal()).and(mirrors[0]);
    let server = serve(served, "127.0.0.1:0", options).unwrap();
    server.add(mirrors[1]);
    server
}

#[test]
fn one_server_has_several_journals_and_says_nothing_of_those_that_somebody_may_not_have() {
    let dir = tempfile::tempdir().unwrap();
    let [own, first, second] = ["own", "first", "second"].map(|name| {
        let origin = Origin::start(dir.path().join(name), small());
        origin.append(0..name.len() * 10);
        origin
    });
    let mirror = |name: &str, origin: &Origin| {
        let upstream = origin.address.to_string();
        start_leaf(&dir.path().join(format!("{name}-mirror")), upstream, options())
    };
    let mirrors = [mirror("first", &first), mirror("second", &second)];
    mirrors.iter().zip([&first, &second]).for_each(|(it, origin)| drop(converged(it, origin)));
    let [a, b, c] = [&own, &first, &second].map(|origin| origin.store().journal().id());
    let unknown = JournalId::from_bytes([0xEE; 16]);
    let ask = |server: &Server, name: &str, journal_id: Option<JournalId>| {
        let options = FollowOptions { journal_id, ..options() };
        start_leaf(&dir.path().join(name), server.local_addr().to_string(), options)
    };
    let open = serve_three(&own, [&mirrors[0], &mirrors[1]], None);
    for (name, wanted, origin) in
        [("0", None, &own), ("1", Some(a), &own), ("2", Some(b), &first), ("3", Some(c), &second)]
    {
        let leaf = ask(&open, name, wanted);
        assert_same_bytes(origin.store().journal(), &converged(&leaf, origin));
        origin.append(100..120);
        assert_same_bytes(origin.store().journal(), &converged(&leaf, origin));
        let deadline = Instant::now() + SOON;
        while !open.peers().iter().any(|peer| {
            peer.journal() == wanted.or(Some(a))
                && peer.acked == Some(origin.store().journal().end())
        }) {
            assert!(Instant::now() < deadline, "{:?}", open.peers());
            std::thread::yield_now();
        }
    }
    assert!(matches!(halted(&ask(&open, "4", Some(unknown))), ShippingError::Foreign { .. }));

    // The own one and the first: the second looks as if it weren't there.
    let some = serve_three(&own, [&mirrors[0], &mirrors[1]], Some(vec![a, b]));
    converged(&ask(&some, "5", Some(b)), &first);
    for (name, wanted) in [("6", c), ("7", unknown)] {
        match halted(&ask(&some, name, Some(wanted))) {
            ShippingError::Foreign { mirror, origin } => assert_eq!((mirror, origin), (wanted, a)),
            other => panic!("{other:?}"),
        }
    }
    // Only the second: neither the own one nor the first is there, and nobody is told of any.
    let one = serve_three(&own, [&mirrors[0], &mirrors[1]], Some(vec![c]));
    converged(&ask(&one, "8", Some(c)), &second);
    let said = [("9", None), ("10", Some(a)), ("11", Some(b)), ("12", Some(unknown))].map(
        |(name, wanted)| match halted(&ask(&one, name, wanted)) {
            ShippingError::Reported { failure } => failure,
            other => panic!("{other:?}"),
        },
    );
    assert_eq!(said[0].code, ErrorCode::DENIED);
    assert!(said.iter().all(|failure| *failure == said[0]), "{said:?}");
}

#[test]
fn a_relay_that_is_behind_says_not_yet_and_never_that_events_are_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..40);
    let mut relay = Relay::start(dir.path().join("relay"), origin.address.to_string());
    converged(relay.mirror(), &origin);
    relay.close();
    origin.append(40..60);
    let leaf_dir = dir.path().join("leaf");
    let leaf = start_leaf(&leaf_dir, origin.address.to_string(), options());
    let end = converged(&leaf, &origin).end();
    leaf.stop().unwrap();
    origin.close();
    relay.open();
    let leaf = start_leaf(&leaf_dir, relay.address(), options());
    until("not yet", &leaf, |status| is_not_yet(status.last_error.as_ref(), 40));
    assert!(!leaf.status().is_halted());
    assert_eq!(leaf.journal().unwrap().end(), end);
    origin.open();
    origin.append(60..70);
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
}

/// There is a relay before there is a journal.
#[test]
fn a_relay_without_a_journal_yet_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let id = origin.store().journal().id();
    origin.close();
    let relay = Relay::start(dir.path().join("relay"), origin.address.to_string());
    let known = FollowOptions { journal_id: Some(id), ..options() };
    let leaves = [("known", known), ("any", options())]
        .map(|(name, options)| start_leaf(&dir.path().join(name), relay.address(), options));
    for leaf in &leaves {
        let status = until("not yet", leaf, |status| status.last_error.is_some());
        assert!(
            matches!(&status.last_error, Some(ShippingError::Reported { failure })
                if failure.code == ErrorCode::NOT_YET),
            "{status:?}"
        );
    }
    origin.open();
    for leaf in &leaves {
        assert_same_bytes(origin.store().journal(), &converged(leaf, &origin));
    }
}

/// An origin with 60 events, and its copy from when it had the first 40.
fn origin_and_backup(dir: &Path) -> (Origin, PathBuf) {
    let backup = dir.join("backup");
    let mut origin = Origin::start(dir.join("origin"), small());
    origin.append(0..40);
    origin.close();
    copy_dir(&origin.dir, &backup);
    origin.open();
    origin.append(40..60);
    (origin, backup)
}

/// An origin that has lost the events from 40 to 59 and has `regrown` others; what was there before it lost them.
fn restore(origin: &mut Origin, backup: &Path, regrown: usize) {
    replace_dir(&origin.dir, backup);
    let address = std::mem::replace(&mut origin.address, free_address());
    origin.open();
    origin.append(500..500 + regrown);
    origin.close();
    origin.address = address;
    origin.open();
}

#[test]
fn s4_what_a_relay_sets_aside_its_subscribers_are_told_and_nothing_is_mixed() {
    for regrown in [0, 5, 50] {
        let dir = tempfile::tempdir().unwrap();
        let (mut origin, backup) = origin_and_backup(dir.path());
        let upstream = origin.address.to_string();
        let relay_dir = dir.path().join("relay");
        let relay = Relay::start_at(free_address(), relay_dir, upstream, quarantine());
        let halting = start_leaf(&dir.path().join("halting"), relay.address(), options());
        let moving = start_leaf(&dir.path().join("moving"), relay.address(), quarantine());
        let before = converged(&halting, &origin).end();
        converged(&moving, &origin);
        origin.close();
        restore(&mut origin, &backup, regrown);
        assert_same_bytes(origin.store().journal(), &follows(relay.mirror(), &origin));
        let journal = follows(&moving, &origin);
        assert_same_bytes(origin.store().journal(), &journal);
        let orphans = moving.status().orphans;
        assert_eq!(orphans[0].from, Position::new(40));
        match halted(&halting) {
            ShippingError::Fork(at) => {
                assert_eq!((at.mirror, at.common), (before, Some(Position::new(40))));
                assert!(matches!(at.told_by, Speaker::Relay | Speaker::RelayBehind), "{at:?}");
                assert_eq!(at.orphaned(), Some(Position::new(40)..Position::new(60)));
            }
            other => panic!("{other:?}"),
        }
        let kept = halting.journal().unwrap();
        assert_eq!(kept.end(), before, "the mirror is kept as it was");
        assert_eq!(kept.read_all(Position::START).unwrap().count(), 60);
        origin.append(600..620);
        assert_same_bytes(origin.store().journal(), &follows(&moving, &origin));
    }
}

/// A relay's word that histories differ counts once nobody else serves: who is stopped before the others were asked sets
/// nothing aside.
#[test]
fn a_mirror_that_is_stopped_before_it_has_asked_all_sets_nothing_aside() {
    let dir = tempfile::tempdir().unwrap();
    let (mut origin, backup) = origin_and_backup(dir.path());
    let (upstream, relay) = (origin.address.to_string(), dir.path().join("relay"));
    let relay = Relay::start_at(free_address(), relay, upstream, quarantine());
    let leaf_dir = dir.path().join("leaf");
    let leaf = start_leaf(&leaf_dir, relay.address(), quarantine());
    let before = converged(&leaf, &origin).end();
    leaf.stop().unwrap();
    origin.close();
    restore(&mut origin, &backup, 50);
    follows(relay.mirror(), &origin);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let both = [relay.address(), silent.local_addr().unwrap().to_string()];
    let leaf = start_leaf(&leaf_dir, both.clone(), quarantine());
    let status = until("it asks the next one", &leaf, |status| {
        matches!(status.upstreams[0].last_error, Some(ShippingError::Fork(_)))
            && status.address == both[1]
    });
    assert!(!status.is_halted());
    leaf.stop().unwrap();
    assert_eq!(used_bytes(&leaf_dir).0, before);
    let leaf = start_leaf(&leaf_dir, relay.address(), quarantine());
    assert_same_bytes(origin.store().journal(), &follows(&leaf, &origin));
}

/// The mirror's journal once it is the origin's, also if it had to set something aside for that.
fn follows(mirror: &Mirror, origin: &Origin) -> headwater::Journal {
    let end = origin.store().journal().end();
    until("the new history", mirror, |status| status.mirrored == Some(end));
    mirror.journal().unwrap()
}

/// A relay that holds the old history and hears nothing from the origin is the one that is out of date.
#[test]
fn a_relay_apart_from_its_origin_judges_nobody_and_others_are_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (mut origin, backup) = origin_and_backup(dir.path());
    let stale = Relay::start(dir.path().join("stale"), origin.address.to_string());
    converged(stale.mirror(), &origin);
    origin.close();
    restore(&mut origin, &backup, 10);
    assert!(matches!(halted(stale.mirror()), ShippingError::Ahead(_)));
    for (name, options) in [("halt", options()), ("quarantine", quarantine())] {
        let leaf_dir = dir.path().join(name);
        let leaf = start_leaf(&leaf_dir, origin.address.to_string(), options.clone());
        converged(&leaf, &origin);
        leaf.stop().unwrap();
        let leaf = start_leaf(&leaf_dir, stale.address(), options.clone());
        let apart = |error: &ShippingError| matches!(error, ShippingError::Fork(at) if at.told_by == Speaker::RelayApart);
        until("told", &leaf, |status| status.last_error.as_ref().is_some_and(apart));
        assert!(!leaf.status().is_halted());
        leaf.stop().unwrap();
        let both = [stale.address(), origin.address.to_string()];
        let leaf = start_leaf(&leaf_dir, both, options);
        origin.append(700..702);
        assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
        assert!(leaf.status().upstreams[0].last_error.as_ref().is_some_and(apart));
        assert!(leaf.status().orphans.is_empty(), "nothing is set aside at its word");
    }
    assert_eq!(stale.mirror().journal().unwrap().end().position, Position::new(60));
}

/// A relay of a relay had the out-of-date history. It was asked between its own subscription and the first HEARTBEAT, which
/// would have told it that the one in front is apart from the origin: meanwhile it said that it is one that hears from the
/// origin, and what it said of the newer history was final. Its subscriber halted, and one with quarantine would have set
/// the right events aside.
#[test]
fn a_relay_that_does_not_know_yet_how_its_relay_stands_judges_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (mut origin, backup) = origin_and_backup(dir.path());
    let mut stale = Relay::start(dir.path().join("stale"), origin.address.to_string());
    let old = converged(stale.mirror(), &origin).end();
    stale.close();
    origin.close();
    restore(&mut origin, &backup, 5);
    let leaves = [options(), quarantine()].map(|options| {
        let leaf_dir = dir.path().join(format!("{:?}", options.forks));
        let leaf = start_leaf(&leaf_dir, origin.address.to_string(), options.clone());
        converged(&leaf, &origin);
        leaf.stop().unwrap();
        (leaf_dir, options)
    });
    for (leaf_dir, options) in leaves {
        // Grants the subscription, and says nothing more.
        let silent = false_origin_of(old, vec![NodeId::random(), NodeId::random()], |_| {});
        stale.upstreams = silent.to_string().into();
        stale.open();
        until("subscribed", stale.mirror(), |status| {
            matches!(status.state, MirrorState::CatchingUp | MirrorState::Live)
        });
        let leaf = start_leaf(&leaf_dir, stale.address(), options);
        let told = until("told", &leaf, |status| status.last_error.is_some());
        match told.last_error {
            Some(ShippingError::Fork(at)) => assert_eq!(at.told_by, Speaker::RelayApart),
            other => panic!("{other:?}"),
        }
        assert!(!leaf.status().is_halted() && leaf.status().orphans.is_empty());
        stale.close();
    }
}

/// The origin's own word counts at once, whatever others would still serve.
#[test]
fn a_fork_that_the_origin_itself_tells_is_final_although_a_relay_would_serve() {
    let dir = tempfile::tempdir().unwrap();
    let (mut origin, backup) = origin_and_backup(dir.path());
    let stale = Relay::start(dir.path().join("stale"), origin.address.to_string());
    converged(stale.mirror(), &origin);
    let leaf_dir = dir.path().join("leaf");
    let leaf = start_leaf(&leaf_dir, origin.address.to_string(), options());
    converged(&leaf, &origin);
    leaf.stop().unwrap();
    origin.close();
    restore(&mut origin, &backup, 30);
    halted(stale.mirror());
    let both = [origin.address.to_string(), stale.address()];
    let leaf = start_leaf(&leaf_dir, both, options());
    match halted(&leaf) {
        ShippingError::Fork(at) => assert_eq!(at.told_by, Speaker::Origin),
        other => panic!("{other:?}"),
    }
    assert!(leaf.status().upstreams[1].last_error.is_none(), "it wasn't asked");
}

/// What hears nothing from its origin is left for what does, and lag isn't known meanwhile.
#[test]
fn s8_behind_a_relay_that_is_apart_lag_is_unknown_and_another_upstream_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..30);
    let serving = ServeOptions { deadlines: brisk(), ..ServeOptions::default() };
    let way = serve(origin.store().journal(), "127.0.0.1:0", serving).unwrap();
    let relay = dir.path().join("relay");
    let relay = start_leaf(&relay, way.local_addr().to_string(), options());
    let serving = ServeOptions { deadlines: brisk(), ..ServeOptions::default() };
    let server = serve(&relay, "127.0.0.1:0", serving).unwrap();
    let following = FollowOptions { deadlines: brisk(), ..options() };
    let address = server.local_addr().to_string();
    converged(&relay, &origin);
    let only = start_leaf(&dir.path().join("only"), address.clone(), following.clone());
    converged(&only, &origin);
    let both = [address, origin.address.to_string()];
    let leaf = start_leaf(&dir.path().join("leaf"), both, following);
    converged(&leaf, &origin);
    for mirror in [&only, &leaf] {
        until("lag is known", mirror, |status| status.lag_events() == Some(0));
    }
    assert_eq!(leaf.status().address, server.local_addr().to_string());
    way.shutdown();
    origin.append(30..50);
    let unknown = |status: &MirrorStatus| status.lag_events().is_none() && status.is_live();
    until("connected, and lag isn't known", &only, unknown);
    assert_same_bytes(origin.store().journal(), &converged(&leaf, &origin));
    let status = until("by the origin", &leaf, |status| status.lag_events() == Some(0));
    assert_eq!(status.address, origin.address.to_string());
    assert!(matches!(status.upstreams[0].last_error, Some(ShippingError::Apart)), "{status:?}");
    assert!(only.wait_caught_up(Duration::from_millis(300)).is_err());
}

#[test]
fn a_path_of_more_than_eight_nodes_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let mut relays: Vec<Relay> = Vec::new();
    for n in 0..8 {
        let upstream = relays.last().map_or(origin.address.to_string(), Relay::address);
        let relay = Relay::start(dir.path().join(format!("{n}")), upstream);
        until("its path", relay.mirror(), |status| status.path.len() == n + 1);
        relays.push(relay);
    }
    let nodes: Vec<NodeId> = relays.iter().map(Relay::node).collect();
    assert_eq!(relays[7].mirror().status().path[1..], nodes[..7]);
    assert_same_bytes(origin.store().journal(), &converged(relays[7].mirror(), &origin));
    let leaf = start_leaf(&dir.path().join("leaf"), relays[7].address(), options());
    let is_refused = |error: &ShippingError| matches!(error, ShippingError::Reported { failure } if failure.code == ErrorCode::CYCLE);
    until("refused", &leaf, |status| status.last_error.as_ref().is_some_and(is_refused));
    assert!(leaf.journal().is_none());
    assert!(relays[7].server().peers().iter().all(|peer| peer.sent.is_none()));
}

/// A relay knows the origin by name; that is no cycle when the origin asks it for what it has lost.
#[test]
fn an_origin_takes_back_what_it_has_lost_from_a_relay_that_is_being_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut origin, backup) = origin_and_backup(dir.path());
    let relay = Relay::start(dir.path().join("relay"), origin.address.to_string());
    let before = converged(relay.mirror(), &origin);
    until("the path", relay.mirror(), |status| status.path.len() == 1);
    origin.close();
    replace_dir(&origin.dir, &backup);
    let builder = headwater::Store::builder(&origin.dir).journal_options(small());
    let store = builder.recover_from_mirrors([relay.address()]).open().unwrap();
    assert_eq!(store.taken_back().map(|back| back.to), Some(before.end()));
    assert_same_bytes(store.journal(), &before);
    store.close().unwrap();
}
