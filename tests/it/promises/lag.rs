//! S8: lag is never reported as 0, nor as anything, when it is unknown.

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use headwater::Position;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::fs::sim::{Op, SimFs};
use headwater::shipping::message::ErrorCode;
use headwater::shipping::security::{Access, AccessList, Security, SecurityOptions};
use headwater::shipping::{
    Deadlines, FeedFilter, FollowOptions, Mirror, MirrorState, MirrorStatus, ServeOptions, Server,
    ShippingError, follow, follow_feed, serve,
};

use super::{impatient, impatient_follower, seed, serve_impatiently};
use crate::fault_proxy::Proxy;
use crate::races::Hooked;
use crate::shipping::{Origin, SOON, converged, copy_dir, replace_dir, small, start_mirror};

fn assert_unknown(status: &MirrorStatus) {
    assert_eq!((status.lag_events(), status.lag_bytes()), (None, None), "{status:?}");
}

fn is_known(status: &MirrorStatus) -> bool {
    status.lag_events().is_some()
}

#[test]
fn s8_lag_is_unknown_before_the_first_connection_and_once_nothing_is_heard_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = impatient_follower();
    let follow_at = |address: String, name: &str| {
        follow(Arc::new(OsFs), &dir.path().join(name), address, options.clone()).unwrap()
    };
    let nowhere = follow_at(unused.to_string(), "nowhere");
    let tried = |status: &MirrorStatus| status.last_error.is_some();
    assert_unknown(&nowhere.wait_until(SOON, tried).unwrap());

    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let server = serve_impatiently(origin.store().journal());
    let proxy = Proxy::start(server.local_addr(), |_| Vec::new());
    let silence = Duration::from_secs(60);
    let options = FollowOptions {
        deadlines: Deadlines { silence, ..impatient_follower().deadlines },
        ..impatient_follower()
    };
    let address = proxy.address.to_string();
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options).unwrap();
    converged(&mirror, &origin);
    let status = mirror.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
    assert_eq!(status.lag_bytes(), Some(0));
    // The connection is there, and nothing comes through it: three heartbeats later nobody knows.
    proxy.hold(true);
    origin.append(20..40);
    let deadline = Instant::now() + SOON;
    while is_known(&mirror.status()) {
        assert!(Instant::now() < deadline, "{:?}", mirror.status());
        std::thread::yield_now();
    }
    assert!(mirror.status().is_live(), "the connection isn't given up yet");
    assert_eq!(mirror.status().origin_end.unwrap().position, Position::new(20), "as last told");
    proxy.hold(false);
    converged(&mirror, &origin);
    assert!(mirror.wait_until(SOON, is_known).is_ok());
    // Whoever has lost its origin knows nothing, whatever it knew.
    proxy.hold(true);
    proxy.cut_all();
    let lost = |status: &MirrorStatus| !matches!(status.state, MirrorState::Live);
    assert_unknown(&mirror.wait_until(SOON, lost).unwrap());
}

fn assert_halted_and_unknown(mirror: &Mirror) -> ShippingError {
    let status = mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap();
    assert_unknown(&status);
    match status.state {
        MirrorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn s8_lag_is_unknown_to_a_mirror_that_was_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    origin.close();
    copy_dir(&origin.dir, &dir.path().join("backup"));
    origin.open();
    origin.append(20..40);
    let path = dir.path().join("mirror");
    let mirror = start_mirror(&path, &origin);
    converged(&mirror, &origin);
    assert!(mirror.wait_until(SOON, is_known).is_ok());
    // Denied.
    let nobody = Access::List(AccessList::new([]).unwrap());
    let security = Security::new(SecurityOptions { tls: None, access: nobody }).unwrap();
    let options = ServeOptions { security: Some(security), ..ServeOptions::default() };
    let denying = serve(origin.store().journal().clone(), "127.0.0.1:0", options).unwrap();
    mirror.stop().unwrap();
    let address = denying.local_addr().to_string();
    let options = impatient_follower();
    let denied = follow(Arc::new(OsFs), &path, address, options).unwrap();
    let error = assert_halted_and_unknown(&denied);
    let refused = |code| code == ErrorCode::DENIED || code == ErrorCode::AUTH_REQUIRED;
    assert!(matches!(&error, ShippingError::Reported { failure } if refused(failure.code)));
    denied.stop().unwrap();
    denying.shutdown();
    // The origin is put back: level with the mirror in numbers, and another history.
    let mirror = start_mirror(&path, &origin);
    converged(&mirror, &origin);
    assert!(mirror.wait_until(SOON, is_known).is_ok());
    origin.close();
    replace_dir(&origin.dir, &dir.path().join("backup"));
    origin.open();
    let error = assert_halted_and_unknown(&mirror);
    assert!(matches!(error, ShippingError::Ahead(_)), "{error}");
    origin.append(20..40);
    mirror.resume();
    let forked = |status: &MirrorStatus| {
        matches!(&status.state, MirrorState::Halted(ShippingError::Fork(_)))
    };
    let status = mirror.wait_until(SOON, forked).unwrap();
    assert_eq!(status.mirrored.unwrap().offset, origin.store().journal().end().offset);
    assert_unknown(&status);
}

/// What a status says was true at most so long ago: three heartbeats, and the time that threads and sockets take.
const TRUE_SINCE: Duration = Duration::from_millis(2000);

/// Whatever happens to the connection: if it is said that so many events are missing, there were no more of them a
/// moment ago.
#[test]
fn s8_whatever_is_said_of_lag_was_true_a_moment_ago() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    let server = serve_impatiently(origin.store().journal());
    let proxy = Proxy::start(server.local_addr(), |_| Vec::new());
    let address = proxy.address.to_string();
    // Nobody gives up: only the age of what was told says that it is old.
    let silence = Duration::from_secs(60);
    let deadlines = Deadlines { silence, ..impatient_follower().deadlines };
    let options = FollowOptions { deadlines, ..impatient_follower() };
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options).unwrap();
    mirror.wait_until(SOON, is_known).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut known, mut unknown) = (0_u64, 0_u64);
            let mut ends = std::collections::VecDeque::new();
            while !is_over.load(Ordering::Acquire) {
                let now = Instant::now();
                ends.push_back((now, origin.end().get()));
                while ends.get(1).is_some_and(|(at, _)| now - *at > TRUE_SINCE) {
                    ends.pop_front();
                }
                let before = ends.front().filter(|(at, _)| now - *at > TRUE_SINCE);
                let status = mirror.status();
                let Some(lag) = status.lag_events() else {
                    unknown += 1;
                    std::thread::yield_now();
                    continue;
                };
                known += 1;
                let claimed = status.mirrored.unwrap().position.get() + lag;
                let was = before.map_or(0, |(_, end)| *end);
                assert!(claimed >= was, "{claimed} is said, it was {was} a while ago: {status:?}");
                std::thread::yield_now();
            }
            (known, unknown)
        });
        for round in 0..4 {
            let held = round % 2 == 1;
            proxy.hold(held);
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(if held { 3000 } else { 500 }) {
                let first = origin.end().get() as usize;
                origin.append(first..first + rng.usize(1..4));
                if watching.is_finished() {
                    break;
                }
            }
            if !held && rng.bool() {
                proxy.cut_all();
            }
        }
        is_over.store(true, Ordering::Release);
        let (known, unknown) = watching.join().unwrap();
        println!("{known} times it was known, {unknown} times not");
        assert!(known > 0 && unknown > 0);
    });
}

/// Nobody says anything of their own accord for a minute: whoever waits asks, and is answered.
#[test]
fn who_waits_to_be_caught_up_asks_and_waits_for_no_heartbeat() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let (heartbeat, silence) = (Duration::from_secs(60), Duration::from_secs(600));
    let deadlines = Deadlines { heartbeat, silence, ..Deadlines::default() };
    let serving = ServeOptions { deadlines, ..ServeOptions::default() };
    let server = serve(origin.store().journal(), "127.0.0.1:0", serving).unwrap();
    let options = FollowOptions { deadlines, ..impatient_follower() };
    let address = server.local_addr().to_string();
    let all = FeedFilter::everything();
    let (fs, path) = (Arc::new(OsFs), dir.path().join("feed"));
    let feed = follow_feed(fs, &path, address.clone(), all, options.clone()).unwrap();
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options).unwrap();
    converged(&mirror, &origin);
    let began = Instant::now();
    for round in 1..4 {
        for _ in 0..20 {
            assert_eq!(mirror.wait_caught_up(SOON).unwrap(), origin.store().journal().end());
            assert_eq!(feed.wait_caught_up(SOON).unwrap(), origin.store().journal().end());
        }
        origin.append(20 * round..20 * round + 20);
    }
    // Each asks at the latest 20 ms after the one in front of it: sixty times both.
    let took = began.elapsed();
    println!("{took:?}");
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// It speaks often, and gives nobody up.
fn patient() -> Deadlines {
    Deadlines { silence: Duration::from_secs(60), ..impatient() }
}

/// A relay of what is served at `address`, and a mirror that follows it.
fn relay_and_leaf(fs: Arc<dyn Fs>, dir: &Path, address: String) -> (Mirror, Server, Mirror) {
    let options = || FollowOptions { deadlines: patient(), ..impatient_follower() };
    let relay = follow(fs, &dir.join("relay"), address, options()).unwrap();
    let serving = ServeOptions { deadlines: patient(), ..ServeOptions::default() };
    let server = serve(&relay, "127.0.0.1:0", serving).unwrap();
    let address = server.local_addr().to_string();
    let leaf = follow(Arc::new(OsFs), &dir.join("leaf"), address, options()).unwrap();
    (relay, server, leaf)
}

/// It hears from its relay, and is told that this knows of no lag.
fn is_told_so(status: &MirrorStatus) -> bool {
    let is_heard = status.origin_heard.is_some_and(|heard| heard <= 3 * impatient().heartbeat);
    is_heard && status.is_live() && !is_known(status)
}

/// Nothing is cut, and nothing comes: who follows the relay is heard all the time, and isn't told that all is there.
#[test]
fn s8_behind_a_relay_whose_origin_hangs_lag_is_unknown_long_before_anybody_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let server = serve_impatiently(origin.store().journal());
    let proxy = Proxy::start(server.local_addr(), |_| Vec::new());
    let (relay, _server, leaf) =
        relay_and_leaf(Arc::new(OsFs), dir.path(), proxy.address.to_string());
    for round in 0..2 {
        converged(&leaf, &origin);
        leaf.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
        proxy.hold(true);
        origin.append(20 + round * 20..40 + round * 20);
        if let Err(error) = leaf.wait_until(SOON, is_told_so) {
            panic!("{error}: {:?}", leaf.status());
        }
        assert!(relay.status().is_live(), "the connection isn't given up yet");
        assert!(leaf.wait_caught_up(Duration::from_millis(300)).is_err());
        proxy.hold(false);
    }
    converged(&leaf, &origin);
    leaf.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
}

/// Nobody gets on with a sync while it is closed.
#[derive(Default)]
pub(super) struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub(super) fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.opened.notify_all();
    }

    pub(super) fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
    }
}

/// Whatever happens to the test, those who wait go on.
pub(super) struct Opens<'a>(pub(super) &'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.set_closed(false);
    }
}

/// A relay that hears from its origin and gets nothing to its disk has a lag, and its subscribers lack what it lacks.
#[test]
fn s8_behind_a_relay_whose_disk_hangs_lag_is_unknown_although_the_relay_hears_from_its_origin() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let server = serve_impatiently(origin.store().journal());
    let gate = Arc::new(Gate::default());
    let for_disk = Arc::clone(&gate);
    let fs = Hooked::new(&SimFs::new(1), move |op, _| {
        if op == Op::SyncData {
            for_disk.pass();
        }
        Ok(())
    });
    let (relay, _server, leaf) =
        relay_and_leaf(Arc::new(fs), dir.path(), server.local_addr().to_string());
    let _opens = Opens(&gate);
    converged(&leaf, &origin);
    leaf.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
    gate.set_closed(true);
    origin.append(20..25);
    let lags = |status: &MirrorStatus| status.is_live() && status.lag_events() == Some(5);
    relay.wait_until(SOON, lags).unwrap();
    if let Err(error) = leaf.wait_until(SOON, is_told_so) {
        panic!("{error}: {:?}", leaf.status());
    }
    assert!(relay.wait_until(SOON, lags).is_ok(), "it goes on hearing from its origin");
    // Nor is anything acknowledged that isn't on its disk.
    let acked = server.peers().iter().filter_map(|peer| Some(peer.acked?.position)).max();
    assert_eq!(acked, Some(Position::new(20)));
    gate.set_closed(false);
    converged(&leaf, &origin);
    leaf.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
}
