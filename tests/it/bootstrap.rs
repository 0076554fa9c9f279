//! Mirrors that begin with a backup: visibly, from where they were after any interruption, and never with anything else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headwater::fs::Fs;
use headwater::fs::sim::{Fault, Op, Repeat, SimFs};
use headwater::retention::{History, Options, Until};
use headwater::shipping::{
    FollowOptions, Mirror, MirrorState, MirrorStatus, ServeOptions, ShippingError, follow, serve,
};
use headwater::{
    Append, ExpectedRevision, Journal, NewEvent, Position, RestoreError, Store, StreamId,
    verify_deep,
};
use parking_lot::{Condvar, Mutex};

use crate::options;
use crate::races::Hooked;

const SOON: Duration = Duration::from_secs(30);
const STORE: &str = "/store";
const BACKUP: &str = "/backup";
const MIRROR: &str = "/mirror/journal";
/// Nobody is there.
const NOBODY: &str = "127.0.0.1:1";

const FAULTS: [(Fault, Repeat); 6] = [
    (Fault::PowerCut, Repeat::Once),
    (Fault::Kill, Repeat::Once),
    (Fault::Eio, Repeat::Once),
    (Fault::Eio, Repeat::Forever),
    (Fault::Enospc, Repeat::Forever),
    (Fault::ShortWrite, Repeat::Once),
];

fn open(fs: &SimFs) -> Store {
    let builder = Store::builder(STORE).create_if_missing().journal_options(options());
    builder.fs(Arc::new(fs.clone())).open().unwrap()
}

fn append(store: &Store, count: usize) {
    let stream = StreamId::new("s").unwrap();
    for number in 0..count {
        let event = NewEvent::raw("test.happened", vec![number as u8; 150]).unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }
}

/// A store and its backup; if it is trimmed, neither has the beginning.
fn backed_up(fs: &SimFs, trimmed: bool) -> Store {
    let store = open(fs);
    append(&store, 70);
    if trimmed {
        let options = Options::new(Until::Position(Position::new(45)));
        let target = store.plan_retention(&options).unwrap().target;
        store.retain(&options.history(History::Forget(target))).unwrap();
        assert!(target > Position::START);
    }
    store.journal().backup(Path::new(BACKUP)).unwrap();
    store
}

fn start(fs: Arc<dyn Fs>, address: &str) -> Mirror {
    let begin_with = Some(BACKUP.into());
    let journal = options();
    let options =
        FollowOptions { begin_with, journal, status_interval: None, ..FollowOptions::default() };
    follow(fs, Path::new(MIRROR), address, options).unwrap()
}

fn is_like(mirror: &Journal, store: &Journal, context: &str) {
    let start = store.start().position;
    assert_eq!(mirror.start(), store.start(), "{context}");
    let ids = |journal: &Journal| {
        let events = journal.read_all(start).unwrap();
        events.map(|event| event.unwrap().id()).collect::<Vec<_>>()
    };
    let (mirrored, all) = (ids(mirror), ids(store));
    assert_eq!(mirrored[..], all[..mirrored.len()], "{context}");
}

fn until(mirror: &Mirror, wanted: impl Fn(&MirrorStatus) -> bool) -> MirrorStatus {
    mirror.wait_until(SOON, wanted).unwrap()
}

// ------------------------------------------------------------------------------------------------ what is seen

/// A gate in front of an operation on the mirror's second segment.
#[derive(Default)]
struct Gate {
    /// How many wait, and whether they may go on.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock();
        state.0 += 1;
        self.changed.notify_all();
        while !state.1 {
            self.changed.wait(&mut state);
        }
    }

    fn wait_for_somebody(&self) {
        let mut state = self.state.lock();
        while state.0 == 0 {
            assert!(!self.changed.wait_for(&mut state, SOON).timed_out(), "nobody came");
        }
    }

    fn open(&self) {
        self.state.lock().1 = true;
        self.changed.notify_all();
    }
}

/// The disk with a gate in front of the mirror's second segment, which fails behind that if it is told to.
fn gated(fs: &SimFs, gate: &Arc<Gate>, fails: bool) -> Arc<dyn Fs> {
    let gate = Arc::clone(gate);
    Arc::new(Hooked::new(fs, move |op, path| {
        let is_segment =
            |name| op == Op::Create && path.ends_with(name) && path.starts_with(MIRROR);
        if is_segment("0000000000000001.seg") {
            gate.pass();
        }
        match fails && is_segment("0000000000000003.seg") {
            true => Err(std::io::Error::other("planned")),
            false => Ok(()),
        }
    }))
}

#[test]
fn a_bootstrap_is_seen_and_goes_on_where_it_was_also_if_the_backup_has_grown() {
    let fs = SimFs::new(3);
    let store = backed_up(&fs, false);
    let first_end = store.journal().end();
    let gate = Arc::new(Gate::default());
    let mirror = start(gated(&fs, &gate, true), NOBODY);
    gate.wait_for_somebody();
    let status = mirror.status();
    let MirrorState::Bootstrapping { bytes, bytes_total } = status.state else {
        panic!("{status:?}")
    };
    assert!(bytes > 0 && bytes < bytes_total, "{bytes} of {bytes_total}");
    assert!(mirror.journal().is_none() && status.mirrored.is_none());
    assert_eq!((status.lag_events(), status.lag_bytes()), (None, None), "unknown is not 0");
    gate.open();
    let status = until(&mirror, MirrorStatus::is_halted);
    assert!(matches!(status.last_error, Some(ShippingError::Begin(_))), "{status:?}");
    mirror.stop().unwrap();
    let left = fs.files().into_iter().filter(|path| Path::new("/").join(path).starts_with(MIRROR));
    let left: Vec<_> = left.map(|path| path.file_name().unwrap().to_owned()).collect();
    assert!(left.iter().any(|name| name == "incoming"), "{left:?}");
    assert!(left.iter().any(|name| name == "0000000000000002.seg"), "{left:?}");
    assert!(!left.iter().any(|name| name == "0000000000000003.seg"), "{left:?}");
    append(&store, 40);
    store.journal().backup(Path::new(BACKUP)).unwrap();
    let server = serve(store.journal().clone(), "127.0.0.1:0", ServeOptions::default()).unwrap();
    let offline = start(Arc::new(fs.clone()), NOBODY);
    assert_eq!(offline.wait_ready(SOON).unwrap().end(), first_end);
    offline.stop().unwrap();
    let mirror = start(Arc::new(fs.clone()), &server.local_addr().to_string());
    mirror.wait_caught_up(SOON).unwrap();
    let journal = mirror.journal().unwrap();
    assert_eq!(journal.end(), store.journal().end());
    is_like(&journal, store.journal(), "at the end");
}

/// Whoever stops it waits for a piece, and not for all of it.
#[test]
fn a_bootstrap_is_stopped_at_any_moment_and_completed_by_the_next() {
    let fs = SimFs::new(2);
    let store = backed_up(&fs, false);
    let mut unfinished = 0;
    for number in 0..10 {
        let disk = fs.fork(number);
        let gate = Arc::new(Gate::default());
        let mirror = start(gated(&disk, &gate, false), NOBODY);
        gate.wait_for_somebody();
        gate.open();
        mirror.stop().unwrap();
        unfinished += usize::from(disk.raw(&Path::new(MIRROR).join("incoming")).is_some());
        completed(&disk, store.journal(), "stopped");
    }
    // Whoever waits at the gate may be quicker, but not always.
    assert!(unfinished > 0, "all of it was copied each time");
}

#[test]
fn a_mirror_that_cannot_begin_says_why_and_tries_again_when_it_is_told_to() {
    let fs = SimFs::new(4);
    let store = backed_up(&fs, false);
    let damaged = Path::new(BACKUP).join("0000000000000001.seg");
    assert!(fs.flip_bit(&damaged, 5000, 3));
    let mirror = start(Arc::new(fs.clone()), NOBODY);
    let status = until(&mirror, MirrorStatus::is_halted);
    let Some(ShippingError::Begin(error)) = &status.last_error else { panic!("{status:?}") };
    assert!(matches!(**error, RestoreError::Read(_)), "{error}");
    assert!(mirror.journal().is_none());
    assert!(fs.flip_bit(&damaged, 5000, 3));
    mirror.resume();
    let journal = mirror.wait_ready(SOON).unwrap();
    assert_eq!(journal.end(), store.journal().end());
    // What is there isn't touched any more, whatever the backup is.
    mirror.stop().unwrap();
    fs.remove_raw(&damaged);
    let mirror = start(Arc::new(fs.clone()), NOBODY);
    assert_eq!(mirror.wait_ready(SOON).unwrap().end(), store.journal().end());
}

#[test]
fn a_full_disk_is_waited_for() {
    let fs = SimFs::new(5);
    let store = backed_up(&fs, false);
    let used: usize = fs.files().iter().map(|path| fs.raw(path).unwrap().len()).sum();
    fs.set_capacity(Some(used as u64 + 16 * 1024));
    let mirror = start(Arc::new(fs.clone()), NOBODY);
    let is_full = |status: &MirrorStatus| matches!(&status.last_error, Some(error @ ShippingError::Begin(_)) if !error.is_halting());
    assert!(!until(&mirror, is_full).is_halted());
    fs.set_capacity(None);
    mirror.resume();
    assert_eq!(mirror.wait_ready(SOON).unwrap().end(), store.journal().end());
}

// ---------------------------------------------------------------------------------------------- what interrupts it

/// Begins a mirror on a disk that fails at operation `at`; false if it doesn't get that far.
fn interrupted(fs: &SimFs, at: u64, fault: Fault, repeat: Repeat) -> bool {
    fs.fail_at(fs.ops() + at, fault, repeat);
    let mirror = start(Arc::new(fs.clone()), NOBODY);
    let has_failed = |error: &Option<ShippingError>| {
        matches!(error, Some(ShippingError::Begin(_) | ShippingError::Open(_)))
    };
    until(&mirror, |status| {
        status.is_halted() || has_failed(&status.last_error) || status.mirrored.is_some()
    });
    drop(mirror);
    let struck = fs.faults_struck() > 0 || fs.down().is_some();
    fs.clear_faults();
    struck
}

fn completed(fs: &SimFs, store: &Journal, context: &str) {
    let mirror = start(Arc::new(fs.clone()), NOBODY);
    let journal = mirror.wait_ready(SOON).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(journal.end(), store.end(), "{context}");
    is_like(&journal, store, context);
    mirror.stop().unwrap();
    let report = verify_deep(fs, Path::new(MIRROR), &mut |_| {}).unwrap();
    assert_eq!(report.damage, [], "{context}");
}

/// With and without a base in place of what lies in front: that is how a view's base begins a mirror, too.
#[test]
fn a_bootstrap_that_is_interrupted_anywhere_is_completed_by_the_next() {
    let seed = 8;
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut all = 0;
    let disks = [false, true].map(|trimmed| {
        let fs = SimFs::new(6 + u64::from(trimmed));
        let store = backed_up(&fs, trimmed);
        store.close().unwrap();
        (fs, store, trimmed)
    });
    for (fault, repeat) in FAULTS {
        let (fs, store, trimmed) = &disks[usize::from(rng.bool())];
        let mut at = 0;
        loop {
            at += rng.u64(1..20);
            let disk = fs.fork(at);
            if !interrupted(&disk, at, fault, repeat) {
                break;
            }
            all += 1;
            let cut = rng.bool();
            if cut {
                disk.power_cut();
            } else {
                disk.kill();
            }
            let context = format!("{fault:?} {repeat:?} at {at}, cut {cut}, trimmed {trimmed}");
            completed(&disk, store.journal(), &context);
        }
        println!("{all} interruptions, up to operation {at}: {fault:?}");
    }
    assert!(all > 20, "only {all}");
}
