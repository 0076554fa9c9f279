//! A mirror whose disk doesn't answer: it goes on listening, and shows nothing that isn't durable.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::fs::sim::{Op, SimFs};
use headwater::shipping::{
    FollowOptions, Mirror, MirrorState, MirrorStatus, ServeOptions, Server, follow, serve,
};
use headwater::{Append, ExpectedRevision, NewEvent, Store, StreamId};
use parking_lot::{Condvar, Mutex};

use super::{impatient, impatient_follower};
use crate::options;
use crate::races::Hooked;
use crate::shipping::{SOON, small};

/// What the disk does to the syncs of those who write the mirror.
#[derive(Debug, Default)]
struct Syncs {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    hang: bool,
    fail: bool,
    hanging: usize,
    released: usize,
}

impl Syncs {
    /// In front of every operation.
    fn meet(&self, op: Op) -> io::Result<()> {
        let thread = std::thread::current();
        let writes = matches!(thread.name(), Some("headwater-mirror" | "headwater-listen"));
        let mut state = self.state.lock();
        if op != Op::SyncData || !writes {
            return Ok(());
        }
        if state.fail {
            state.fail = false;
            return Err(io::Error::other("the disk is gone"));
        }
        if state.hang {
            state.hanging += 1;
            self.changed.notify_all();
            while state.hang && state.released == 0 {
                self.changed.wait(&mut state);
            }
            state.hanging -= 1;
            state.released = state.released.saturating_sub(1);
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    fn wait_until_one_hangs(&self) {
        let (mut state, deadline) = (self.state.lock(), Instant::now() + SOON);
        while state.hanging == 0 {
            assert!(
                !self.changed.wait_until(&mut state, deadline).timed_out(),
                "nothing is synced"
            );
        }
    }
}

/// Lets go of what hangs, also if the test has failed.
struct Released(Arc<Syncs>);

impl std::ops::Deref for Released {
    type Target = Syncs;

    fn deref(&self) -> &Syncs {
        &self.0
    }
}

impl Drop for Released {
    fn drop(&mut self) {
        self.0.change(|state| state.hang = false);
    }
}

/// An origin, and a live mirror of it on such a disk.
struct Pair {
    origin: Store,
    // Dropped first: whoever drops the mirror waits for its sync.
    syncs: Released,
    mirror: Mirror,
    server: Server,
    // Dropped last.
    _dir: tempfile::TempDir,
}

impl Pair {
    fn live() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = Store::builder(dir.path().join("origin")).create_if_missing();
        let origin = builder.journal_options(options()).open().unwrap();
        let serving = ServeOptions { deadlines: impatient(), ..ServeOptions::default() };
        let server = serve(origin.journal().clone(), "127.0.0.1:0", serving).unwrap();
        let syncs = Arc::<Syncs>::default();
        let for_disk = Arc::clone(&syncs);
        let disk = Hooked::new(&SimFs::new(1), move |op, _: &Path| for_disk.meet(op));
        let following = FollowOptions { journal: small(), ..impatient_follower() };
        let to = server.local_addr().to_string();
        let mirror = follow(Arc::new(disk), Path::new("/mirror"), to, following).unwrap();
        let pair = Self { origin, server, mirror, syncs: Released(syncs), _dir: dir };
        pair.append();
        pair.converged();
        pair
    }

    fn append(&self) {
        append(&self.origin);
    }

    fn converged(&self) {
        let end = self.origin.journal().end();
        let reached = self.mirror.wait_until(SOON, |status| status.mirrored == Some(end));
        assert!(reached.is_ok(), "{:?}", self.mirror.status());
    }

    /// Three times as long as the origin waits for a sign of life, it and the mirror stay connected.
    /// Somebody asks all the while whether it is caught up.
    fn stays_connected(&self) {
        let until = Instant::now() + 3 * impatient().silence;
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                while Instant::now() < until {
                    drop(self.mirror.wait_caught_up(Duration::from_millis(20)));
                }
            });
            while !asking.is_finished() {
                let (peers, status) = (self.server.peers(), self.mirror.status());
                assert_eq!((peers.len(), status.reconnects), (1, 0), "{peers:?} {status:?}");
                assert!(peers[0].heard < impatient().silence, "{peers:?}");
                std::thread::sleep(Duration::from_millis(5)); // it is looked at every now and then
            }
        });
    }
}

fn append(origin: &Store) {
    let event = NewEvent::raw("test.happened", vec![7; 300]).unwrap();
    let to = StreamId::new("s").unwrap();
    origin.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
}

#[test]
fn a_mirror_whose_sync_hangs_goes_on_listening_and_shows_nothing_before_it_is_durable() {
    let pair = Pair::live();
    let durable = pair.mirror.status().mirrored;
    pair.syncs.change(|state| state.hang = true);
    pair.append();
    pair.syncs.wait_until_one_hangs();
    pair.stays_connected();
    // It takes what comes, though it can't write it.
    (0..5).for_each(|_| pair.append());
    let end = pair.origin.journal().end();
    let received = pair.mirror.wait_until(SOON, |it| it.received_offset == Some(end.offset));
    assert_eq!(received.unwrap().mirrored, durable);
    // What it has been handed meanwhile hangs as well.
    let first = pair.syncs.state.lock().hanging;
    pair.syncs.change(|state| state.released = 1);
    let moved = pair.mirror.wait_until(SOON, |it| it.mirrored != durable).unwrap();
    assert_eq!((first, moved.mirrored.map(|it| it.position.get())), (1, Some(2)));
    pair.syncs.wait_until_one_hangs();
    pair.stays_connected();
    assert_eq!(pair.mirror.status().mirrored, moved.mirrored);
    pair.syncs.change(|state| state.hang = false);
    pair.converged();
    // As before.
    pair.append();
    pair.converged();
    pair.mirror.stop().unwrap();
}

#[test]
fn a_mirror_that_is_stopped_while_its_sync_hangs_is_gone_for_its_origin_and_closes_when_it_can() {
    let Pair { origin, server, mirror, syncs, _dir } = Pair::live();
    syncs.change(|state| state.hang = true);
    append(&origin);
    syncs.wait_until_one_hangs();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| mirror.stop());
        let deadline = Instant::now() + SOON;
        while !server.peers().is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let (peers, has_stopped) = (server.peers(), stopping.is_finished());
        syncs.change(|state| state.hang = false);
        assert!(peers.is_empty() && !has_stopped, "{peers:?}");
        stopping.join().unwrap().unwrap();
    });
}

#[test]
fn a_mirror_whose_sync_fails_where_it_was_heard_is_halted_and_shows_nothing_of_it() {
    let pair = Pair::live();
    let durable = pair.mirror.status().mirrored;
    pair.syncs.change(|state| state.fail = true);
    pair.append();
    let halted = pair.mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap();
    assert_eq!((halted.mirrored, halted.reconnects), (durable, 0), "{halted:?}");
    assert!(
        matches!(&halted.state, MirrorState::Halted(error) if error.code() == "shipping.storage"),
        "{halted:?}"
    );
    pair.append();
    // Opened again, it reads what there is of it from the disk.
    pair.mirror.resume();
    pair.converged();
    pair.mirror.stop().unwrap();
}
