//! Histories that part, on simulated disks: what a mirror sets aside, and what an origin takes back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::fs::Fs;
use headwater::fs::sim::{Fault, Repeat, SimFs, Snapshot};
use headwater::planted::{self, Bug};
use headwater::{
    Append, Checkpoint, Comparison, ExpectedRevision, Ingest, Journal, NewEvent, Position,
    SetAsideError, Store, StreamId, verify,
};

use crate::options;

const DIR: &str = "/store";
const MIRROR: &str = "/mirror";

type Rng = fastrand::Rng;

pub(crate) fn dynamic(fs: &SimFs) -> Arc<dyn Fs> {
    Arc::new(fs.clone())
}

fn open(fs: &SimFs) -> Store {
    let builder = Store::builder(DIR).create_if_missing().journal_options(options());
    builder.fs(dynamic(fs)).open().unwrap()
}

/// Batches of one to three events, numbered.
fn append(store: &Store, batches: usize, rng: &mut Rng, mark: &str) {
    for _ in 0..batches {
        let first = store.journal().end().position.get();
        let events: Vec<_> = (0..rng.u64(1..4))
            .map(|n| {
                let text = format!("{mark}-{}-{}", first + n, "x".repeat(rng.usize(1..150)));
                NewEvent::raw("test.happened", text).unwrap()
            })
            .collect();
        let stream = StreamId::new(format!("s-{}", rng.u8(..4))).unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, events)).unwrap();
    }
}

/// Feeds a mirror from where it is to the end of `origin`.
fn feed(ingest: &mut Ingest, origin: &Journal) {
    let mut cursor = origin.cursor(ingest.end().position).unwrap();
    while let Some(batch) = cursor.next_batch().unwrap() {
        if let Some(page) = batch.page {
            ingest.segment(&page.bytes()).unwrap();
        }
        ingest.batch(batch.batch.bytes()).unwrap();
    }
    ingest.sync().unwrap();
}

fn open_mirror(fs: &SimFs) -> Ingest {
    Ingest::open(&dynamic(fs), Path::new(MIRROR), &options()).unwrap().unwrap()
}

pub(crate) fn payloads(journal: &Journal, from: Position) -> Vec<Vec<u8>> {
    journal.read_all(from).unwrap().map(|event| event.unwrap().into_data()).collect()
}

/// The bytes of the segments, up to the end.
fn bytes(fs: &SimFs, journal: &Journal) -> Vec<(u64, Vec<u8>)> {
    let used = journal.segments().into_iter().filter(|it| it.end_offset > it.base_offset);
    used.map(|segment| {
        let mut bytes = fs.raw(&segment.path).unwrap();
        bytes.truncate((4096 + segment.end_offset - segment.base_offset) as usize);
        (segment.number, bytes)
    })
    .collect()
}

/// A tail that was set aside: it is without damage, and ends where it should.
pub(crate) fn open_orphans(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    old_end: Checkpoint,
) -> Result<Journal, String> {
    let (copy, damage) = Journal::open_read_only(fs, dir).map_err(|error| error.to_string())?;
    if let Some(damage) = damage {
        return Err(damage.to_string());
    }
    if copy.end() != old_end {
        return Err(format!("the copy ends at {:?}", copy.end()));
    }
    let report = verify(&**fs, dir, &mut |_| {}).map_err(|error| error.to_string())?;
    if !report.damage.is_empty() {
        return Err(format!("{:?}", report.damage));
    }
    Ok(copy)
}

/// An origin that was restored to an older state and has grown again, and a mirror of the older history.
struct Forked {
    origin: Store,
    origin_fs: SimFs,
    mirror_fs: SimFs,
    /// Where the histories part.
    common: Checkpoint,
    /// Where the mirror ends.
    old_end: Checkpoint,
    /// What the mirror holds.
    old: Vec<(u64, Vec<u8>)>,
    old_payloads: Vec<Vec<u8>>,
}

fn forked(seed: u64) -> Forked {
    let mut rng = Rng::with_seed(seed);
    let (origin_fs, mirror_fs) = (SimFs::new(seed), SimFs::new(!seed));
    let store = open(&origin_fs);
    let kept = if seed.is_multiple_of(5) { 0 } else { rng.usize(0..60) };
    append(&store, kept, &mut rng, "common");
    let common = store.journal().end();
    store.close().unwrap();
    let backup: Snapshot = origin_fs.snapshot_dir(Path::new(DIR));
    let store = open(&origin_fs);
    append(&store, rng.usize(1..60), &mut rng, "old");
    let (old_end, id) = (store.journal().end(), store.journal().id());
    let mut ingest =
        Ingest::create(&dynamic(&mirror_fs), Path::new(MIRROR), id, &options()).unwrap();
    feed(&mut ingest, store.journal());
    let old = bytes(&mirror_fs, ingest.journal());
    let old_payloads = payloads(ingest.journal(), Position::START);
    ingest.close().unwrap();
    drop(store);
    origin_fs.restore_dir(Path::new(DIR), &backup);
    let origin = open(&origin_fs);
    append(&origin, rng.usize(0..90), &mut rng, "new");
    Forked { origin, origin_fs, mirror_fs, common, old_end, old, old_payloads }
}

impl Forked {
    fn set_aside(&self, fs: &SimFs) -> Result<Ingest, SetAsideError> {
        let ingest = open_mirror(fs);
        ingest.set_aside(self.common.position, &options()).map(|(ingest, _)| ingest)
    }

    /// The directories of tails that were set aside.
    fn orphans(&self, fs: &SimFs) -> Vec<PathBuf> {
        let (journal, _) = Journal::open_read_only(&dynamic(fs), Path::new(MIRROR)).unwrap();
        journal.orphans().into_iter().map(|orphans| orphans.dir).collect()
    }

    /// The tail is in the copy, byte for byte, and readable like any journal.
    fn check_copy(&self, fs: &SimFs) -> Result<(), String> {
        let orphans = self.orphans(fs);
        let [dir] = &orphans[..] else { return Err(format!("{orphans:?}")) };
        let copy = open_orphans(&dynamic(fs), dir, self.old_end)?;
        let from = self.common.position;
        if payloads(&copy, from) != self.old_payloads[from.get() as usize..] {
            return Err("other events".into());
        }
        let tail = bytes(fs, &copy);
        let behind = self.old.len() - tail.len();
        if tail != self.old[behind..] {
            return Err("other bytes".into());
        }
        Ok(())
    }

    /// The mirror follows the new history, and is its very bytes.
    fn follow(&self, mut ingest: Ingest, fs: &SimFs) -> Result<(), String> {
        if ingest.end() != self.common {
            return Err(format!("the mirror ends at {:?}", ingest.end()));
        }
        feed(&mut ingest, self.origin.journal());
        if ingest.end() != self.origin.journal().end() {
            return Err("not all of the new history".into());
        }
        if bytes(fs, ingest.journal()) != bytes(&self.origin_fs, self.origin.journal()) {
            return Err("the mirror is not byte-identical to its origin".into());
        }
        let theirs = payloads(self.origin.journal(), Position::START);
        if payloads(ingest.journal(), Position::START) != theirs {
            return Err("events of both histories".into());
        }
        ingest.close().map_err(|error| error.to_string())
    }
}

#[test]
fn s4_a_quarantined_tail_is_the_old_bytes_and_the_mirror_becomes_its_origin() {
    for seed in 0..60 {
        println!("seed {seed}");
        let forked = forked(seed);
        let fs = &forked.mirror_fs;
        let ingest = open_mirror(fs);
        let before = ingest.journal().clone();
        let mut reader = before.cursor(Position::START).unwrap();
        let (ingest, orphans) = ingest.set_aside(forked.common.position, &options()).unwrap();
        let orphans = orphans.unwrap();
        assert_eq!(orphans.from, forked.common.position);
        assert_eq!(orphans.end, Some(forked.old_end));
        forked.check_copy(fs).unwrap();
        forked.follow(ingest, fs).unwrap();
        forked.check_copy(fs).unwrap();
        // Whoever read the old history gets nothing of the new one.
        assert!(before.is_closed());
        let mut read = Vec::new();
        while let Ok(Some(batch)) = reader.next_batch() {
            read.push(batch.batch.bytes().to_vec());
        }
        let old: Vec<u8> =
            forked.old.iter().flat_map(|(_, bytes)| bytes[4096..].to_vec()).collect();
        assert!(old.starts_with(&read.concat()), "a reader was shown a mixture");
        assert!(
            before
                .read_all(Position::START)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .is_err()
        );
    }
}

/// Cuts the power (or kills) at every operation: the tail is in the mirror or in the copy, whole; nothing is mixed;
/// and repeating it ends as if nothing had happened. How many operations there were.
fn crash_everywhere(seed: u64, fault: Fault) -> Result<u64, String> {
    let forked = forked(seed);
    for op in 0.. {
        let fs = forked.mirror_fs.fork(seed ^ op);
        fs.fail_at(fs.ops() + op, fault, Repeat::Once);
        let opened = Ingest::open(&dynamic(&fs), Path::new(MIRROR), &options());
        let done = match opened {
            Ok(ingest) => ingest.unwrap().set_aside(forked.common.position, &options()).is_ok(),
            Err(_) => false,
        };
        let struck = fs.faults_struck() > 0;
        fs.clear_faults();
        if fault == Fault::Kill {
            fs.kill();
        } else {
            fs.power_cut();
        }
        let at = |what: String| format!("operation {op}, done: {done}: {what}");
        let ingest = Ingest::open(&dynamic(&fs), Path::new(MIRROR), &options());
        let ingest = ingest.map_err(|error| at(error.to_string()))?.unwrap();
        let (end, copied) = (ingest.end(), forked.check_copy(&fs));
        let whole = end == forked.old_end;
        if !whole && copied.is_err() {
            return Err(at(format!("the tail is lost: the mirror ends at {end:?}, {copied:?}")));
        }
        let old = payloads(ingest.journal(), Position::START);
        let in_old =
            forked.common.position <= end.position && end.position <= forked.old_end.position;
        if !in_old || old != forked.old_payloads[..end.position.get() as usize] {
            return Err(at("the mirror holds something else than its old history".into()));
        }
        let again = ingest.set_aside(forked.common.position, &options());
        let (ingest, _) = again.map_err(|error| at(error.to_string()))?;
        forked.check_copy(&fs).map_err(at)?;
        forked.follow(ingest, &fs).map_err(at)?;
        forked.check_copy(&fs).map_err(at)?;
        if !struck {
            return Ok(op);
        }
    }
    Ok(0)
}

#[test]
fn a_crash_at_every_operation_of_setting_a_tail_aside_loses_nothing_and_mixes_nothing() {
    for (seed, fault) in [(3, Fault::PowerCut), (5, Fault::PowerCut), (7, Fault::Kill)] {
        let ops = crash_everywhere(seed, fault).unwrap_or_else(|what| panic!("{seed}: {what}"));
        println!("seed {seed}, {fault:?}: {ops} operations");
        assert!(ops > 40, "{ops} operations only");
    }
}

#[test]
fn cutting_a_mirror_before_the_copy_is_durable_is_found() {
    planted::plant(Some(Bug::CutBeforeCopy));
    let found = (1..9).find_map(|seed| crash_everywhere(seed, Fault::PowerCut).err());
    planted::plant(None);
    println!("{}", found.expect("the planted bug was not found"));
}

#[test]
fn a_tail_is_set_aside_again_under_another_name_and_only_at_the_end_of_a_batch() {
    let forked = forked(1);
    let fs = &forked.mirror_fs;
    let ingest = open_mirror(fs);
    let beyond = forked.old_end.position.advance(1);
    let refused = ingest.set_aside(beyond, &options());
    assert!(matches!(refused, Err(SetAsideError::NotABoundary { position }) if position == beyond));
    let mut ingest = forked.set_aside(fs).unwrap();
    feed(&mut ingest, forked.origin.journal());
    // The new history is lost as well, from the same place on.
    let end = ingest.end();
    let (ingest, orphans) = ingest.set_aside(forked.common.position, &options()).unwrap();
    let orphans = orphans.unwrap();
    assert_eq!(orphans.end, Some(end));
    assert_eq!(ingest.journal().orphans().len(), 2);
    let (copy, _) = Journal::open_read_only(&dynamic(fs), &orphans.dir).unwrap();
    assert_eq!(copy.compare(&end).unwrap(), Comparison::Equal);
    // Nothing behind: nothing to set aside.
    let (ingest, orphans) = ingest.set_aside(forked.common.position, &options()).unwrap();
    assert_eq!((orphans, ingest.end()), (None, forked.common));
}

#[cfg(feature = "shipping")]
mod recovery {
    //! An origin takes back from its mirrors what it has lost.

    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use headwater::fs::sim::Op;
    use headwater::shipping::message::{
        Data, ErrorCode, FRAME_BYTES_MIN, FrameReader, Heartbeat, Hello, Message, OriginEnd,
        Speaker, Subscribed, Welcome,
    };
    use headwater::shipping::{
        FollowOptions, MirrorStatus, PeersCheck, PeersError, ServeOptions, Served, Server,
        ShippingError, TakenBack, follow, recover, serve,
    };
    use headwater::{Incarnation, NodeId, OpenError, Refusal};

    use super::*;
    use crate::shipping::SOON;

    /// A mirror that is served, as of some moment in an origin's life.
    struct Mirror {
        _ingest: Ingest,
        _server: Server,
        address: String,
    }

    impl Mirror {
        fn of(origin: &Journal) -> Self {
            let fs = SimFs::new(7);
            let (dir, id) = (Path::new(MIRROR), origin.id());
            let mut ingest = Ingest::create(&dynamic(&fs), dir, id, &options()).unwrap();
            feed(&mut ingest, origin);
            let journal = ingest.journal().clone();
            let server = serve(journal, "127.0.0.1:0", ServeOptions::default()).unwrap();
            let address = server.local_addr().to_string();
            Self { _ingest: ingest, _server: server, address }
        }
    }

    /// An origin that was restored to an older state, and what it was.
    struct Lost {
        fs: SimFs,
        backup: Snapshot,
        ours: Checkpoint,
        theirs: Checkpoint,
        bytes: Vec<(u64, Vec<u8>)>,
        mirror: Mirror,
    }

    fn lost(seed: u64) -> Lost {
        let mut rng = Rng::with_seed(seed);
        let fs = SimFs::new(seed);
        let store = open(&fs);
        append(&store, rng.usize(1..40), &mut rng, "common");
        let ours = store.journal().end();
        store.close().unwrap();
        let backup = fs.snapshot_dir(Path::new(DIR));
        let store = open(&fs);
        append(&store, rng.usize(2..40), &mut rng, "old");
        let (theirs, bytes) = (store.journal().end(), bytes(&fs, store.journal()));
        let mirror = Mirror::of(store.journal());
        drop(store);
        fs.restore_dir(Path::new(DIR), &backup);
        Lost { fs, backup, ours, theirs, bytes, mirror }
    }

    fn check(mirrors: &[&str]) -> PeersCheck {
        let mirrors = mirrors.iter().map(|address| (*address).to_owned()).collect();
        PeersCheck { mirrors, recover: true, ..PeersCheck::default() }
    }

    fn take_back(fs: &SimFs, check: &PeersCheck) -> Result<Option<TakenBack>, OpenError> {
        recover(&dynamic(fs), &Path::new(DIR).join("journal"), &options(), check)
    }

    fn refused(fs: &SimFs, check: &PeersCheck) -> PeersError {
        match take_back(fs, check) {
            Err(OpenError::Peers(error)) => *error,
            other => panic!("{other:?}"),
        }
    }

    impl Lost {
        fn check_whole(&self, fs: &SimFs) -> Result<(), String> {
            let store = open(fs);
            if store.journal().end() != self.theirs {
                return Err(format!("the journal ends at {:?}", store.journal().end()));
            }
            if bytes(fs, store.journal()) != self.bytes {
                return Err("other bytes than before".into());
            }
            let before = store.journal().end().incarnation;
            append(&store, 3, &mut Rng::with_seed(1), "after");
            if store.journal().end().incarnation == before {
                return Err("the same incarnation goes on".into());
            }
            if store.journal().compare(&self.theirs).ok() != Some(Comparison::Equal) {
                return Err("not a continuation".into());
            }
            Ok(())
        }
    }

    #[test]
    fn a_restored_origin_takes_back_what_its_mirror_has_byte_for_byte() {
        for seed in 0..12 {
            println!("seed {seed}");
            let lost = lost(seed);
            let builder = Store::builder(DIR).journal_options(options()).fs(dynamic(&lost.fs));
            let store = builder.recover_from_mirrors([&lost.mirror.address]).open().unwrap();
            let back = store.taken_back().unwrap();
            assert_eq!((back.from, back.to), (lost.ours, lost.theirs));
            assert_eq!(back.address, lost.mirror.address);
            store.close().unwrap();
            drop(store);
            lost.check_whole(&lost.fs).unwrap();
            // Nothing is missing now.
            drop(take_back(&lost.fs, &check(&[])).unwrap());
        }
    }

    /// Cuts the power or kills at every operation: what is opened is what was before, or all of it; in between nothing
    /// is opened for writing, and the same call goes on.
    #[test]
    fn a_crash_at_every_operation_of_taking_back_ends_whole() {
        for (seed, fault) in [(2, Fault::PowerCut), (4, Fault::Kill)] {
            let lost = lost(seed);
            let check = check(&[&lost.mirror.address]);
            let mut refused = 0;
            for op in 0.. {
                let fs = lost.fs.fork(seed ^ op);
                fs.fail_at(fs.ops() + op, fault, Repeat::Once);
                drop(take_back(&fs, &check));
                let struck = fs.faults_struck() > 0;
                fs.clear_faults();
                if fault == Fault::Kill {
                    fs.kill();
                } else {
                    fs.power_cut();
                }
                let other = fs.fork(op);
                let builder = Store::builder(DIR).journal_options(options());
                match builder.fs(dynamic(&other)).open() {
                    Ok(store) => {
                        let end = store.journal().end();
                        assert!(end == lost.ours || end == lost.theirs, "operation {op}: {end:?}");
                    }
                    Err(OpenError::Recovering { .. }) => refused += 1,
                    Err(error) => panic!("operation {op}: {error}"),
                }
                take_back(&fs, &check).unwrap_or_else(|error| panic!("operation {op}: {error}"));
                lost.check_whole(&fs).unwrap_or_else(|what| panic!("operation {op}: {what}"));
                if !struck {
                    println!("seed {seed}, {fault:?}: {op} operations, {refused} refused");
                    break;
                }
            }
            assert!(refused > 10);
        }
    }

    #[test]
    fn of_several_mirrors_the_longest_counts_and_different_continuations_are_refused_by_name() {
        let mut rng = Rng::with_seed(9);
        let lost = lost(9);
        // One that stopped earlier, one that has nothing more than the backup, one of another continuation.
        let level = Mirror::of(open(&lost.fs).journal());
        let store = open(&lost.fs);
        append(&store, 2, &mut rng, "another");
        let other = Mirror::of(store.journal());
        drop(store);
        lost.fs.restore_dir(Path::new(DIR), &lost.backup);
        let (longest, other) = (&lost.mirror.address, &other.address);
        match refused(&lost.fs, &check(&[&level.address, longest, other])) {
            PeersError::Conflict { first, second, first_end, ours, .. } => {
                assert_eq!((&first, &second), (longest, other));
                assert_eq!((first_end, ours), (lost.theirs.position, lost.ours.position));
            }
            error => panic!("{error}"),
        }
        assert_eq!(open(&lost.fs).journal().end(), lost.ours, "nothing was taken");
        let mut all = check(&[&level.address, longest, other]);
        all.given_up.push(other.clone());
        assert_eq!(take_back(&lost.fs, &all).unwrap().unwrap().address, *longest);
        lost.check_whole(&lost.fs).unwrap();
    }

    #[test]
    fn a_store_waits_for_enough_mirrors_and_for_nothing_that_they_hold() {
        let lost = lost(11);
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let there = &lost.mirror.address;
        match refused(&lost.fs, &check(&[there, &nobody])) {
            PeersError::Unreached { asked: 1, required: 2, missing } => {
                assert_eq!(missing[0].0, nobody);
                assert!(matches!(missing[0].1, ShippingError::Connect { .. }));
            }
            error => panic!("{error}"),
        }
        let builder = || Store::builder(DIR).journal_options(options()).fs(dynamic(&lost.fs));
        let asked = builder().ask_mirrors([there, &nobody]).require_peers_check(1).open();
        match asked {
            Err(OpenError::Peers(error)) => match *error {
                PeersError::Longer { address, ours, theirs } => {
                    assert_eq!(address, *there);
                    assert_eq!((*ours, *theirs), (lost.ours, lost.theirs));
                }
                error => panic!("{error}"),
            },
            other => panic!("{other:?}"),
        }
        let given_up = builder().recover_from_mirrors([there, &nobody]).give_up_on_mirror(&nobody);
        assert!(given_up.open().unwrap().taken_back().is_some());
    }

    /// A mirror held all that the origin was about to lose, and its disk failed one sync: it halted, and until somebody
    /// resumed it its server said NOT_YET, without a position, because a closed journal isn't served. The origin took that
    /// for "I am behind you", counted the mirror as asked, and opened at what the backup had: the events behind it, which
    /// had been acknowledged and were on the mirror's disk, became a fork. The same of a mirror that was stopped while its
    /// server went on.
    #[test]
    fn a_mirror_that_has_no_journal_at_present_has_not_been_asked() {
        let (mut rng, fs, disk) = (Rng::with_seed(23), SimFs::new(23), SimFs::new(24));
        let store = open(&fs);
        append(&store, 10, &mut rng, "common");
        store.close().unwrap();
        let backup = fs.snapshot_dir(Path::new(DIR));
        let store = open(&fs);
        append(&store, 10, &mut rng, "old");
        let theirs = store.journal().end();
        let origin = serve(store.journal(), "127.0.0.1:0", ServeOptions::default()).unwrap();
        let options = FollowOptions { journal: options(), ..FollowOptions::default() };
        let upstream = origin.local_addr().to_string();
        let mirror = follow(dynamic(&disk), Path::new(MIRROR), upstream, options).unwrap();
        let server = serve(&mirror, "127.0.0.1:0", ServeOptions::default()).unwrap();
        mirror.wait_until(SOON, |status| status.mirrored == Some(theirs)).unwrap();
        disk.fail_next(Op::SyncData, Fault::Eio);
        append(&store, 1, &mut rng, "not synced by the mirror");
        mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap();
        origin.shutdown();
        drop(store);
        fs.restore_dir(Path::new(DIR), &backup);
        let address = server.local_addr().to_string();
        let is_not_asked = || match refused(&fs, &check(&[&address])) {
            PeersError::Unreached { asked: 0, required: 1, missing } => matches!(
                &missing[0].1,
                ShippingError::Reported { failure }
                    if failure.code == ErrorCode::NOT_YET && failure.position.is_none()
            ),
            error => panic!("{error}"),
        };
        assert!(is_not_asked());
        // It opens its journal before it looks for its origin, which isn't there.
        mirror.resume();
        let looks = |status: &MirrorStatus| {
            matches!(status.last_error, Some(ShippingError::Connect { .. }))
        };
        mirror.wait_until(SOON, looks).unwrap();
        let back = take_back(&fs, &check(&[&address])).unwrap().unwrap();
        assert!(back.to.position >= theirs.position, "{back:?}");
        assert_eq!(open(&fs).journal().compare(&theirs).unwrap(), Comparison::Equal);
        mirror.stop().unwrap();
        assert!(is_not_asked());
    }

    /// It holds nothing that the origin might have lost, and can't get anything while the origin waits for it: an origin that
    /// was restarted while a new mirror was being set up would have stayed closed.
    #[test]
    fn a_mirror_that_has_never_had_the_journal_keeps_its_origin_from_nothing() {
        let fs = SimFs::new(25);
        let store = open(&fs);
        append(&store, 10, &mut Rng::with_seed(25), "all");
        store.close().unwrap();
        let id = store.journal().id();
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let new = |journal_id| {
            let options =
                FollowOptions { journal: options(), journal_id, ..FollowOptions::default() };
            let disk = dynamic(&SimFs::new(26));
            follow(disk, Path::new(MIRROR), nobody.to_string(), options).unwrap()
        };
        let asked = |served: Served| {
            let server = serve(served, "127.0.0.1:0", ServeOptions::default()).unwrap();
            take_back(&fs, &check(&[&server.local_addr().to_string()]))
        };
        let (mirror, named) = (new(None), new(Some(id)));
        let taken_back = asked((&mirror).into());
        assert!(matches!(taken_back, Ok(None)), "{taken_back:?}");
        // Beside other journals it may be meant for another one, and a mirror of this one be there that isn't served.
        let other = open(&SimFs::new(27));
        let beside = |mirror| Served::from(other.journal().clone()).and(mirror);
        match asked(beside(&mirror)) {
            Err(OpenError::Peers(error)) => {
                assert!(matches!(*error, PeersError::Unreached { asked: 0, .. }), "{error}");
            }
            answer => panic!("{answer:?}"),
        }
        let taken_back = asked(beside(&named));
        assert!(matches!(taken_back, Ok(None)), "{taken_back:?}");
        // From now on its directory is anybody's.
        let served = Served::from(&named);
        named.stop().unwrap();
        assert!(matches!(asked(served), Err(OpenError::Peers(_))));
    }

    #[test]
    fn an_origin_that_was_appended_to_since_is_told_where_it_parts_from_its_mirror() {
        let lost = lost(13);
        let store = open(&lost.fs);
        append(&store, 4, &mut Rng::with_seed(2), "since");
        let end = store.journal().end();
        drop(store);
        match refused(&lost.fs, &check(&[&lost.mirror.address])) {
            PeersError::Parted { address, error: ShippingError::Fork(at) } => {
                assert_eq!(address, lost.mirror.address);
                assert_eq!(at.common, Some(lost.ours.position));
            }
            // A mirror that ends in front of what was appended since can't say.
            PeersError::Parted { error, .. } => panic!("{error}"),
            error => panic!("{error}"),
        }
        assert_eq!(open(&lost.fs).journal().end(), end);
    }

    const OTHER: NodeId = NodeId::from_bytes([9; 16]);

    fn welcome(hello: &Hello) -> Message<'static> {
        Message::Welcome(Welcome {
            version: 1,
            heartbeat_ms: 1000,
            max_frame: FRAME_BYTES_MIN,
            features: 0,
            node: OTHER,
            session: [1; 16],
            nonce: hello.nonce,
            now_us: 0,
        })
    }

    fn subscribed(end: Checkpoint) -> Message<'static> {
        let (first_position, path) = (Position::START, vec![OTHER]);
        Message::Subscribed(Subscribed { end, first_position, path })
    }

    /// Says that it holds the journal's end, and sends batches that don't continue it.
    fn liar(end: Checkpoint, at: u64, bytes: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                lie(&stream.unwrap(), end, at, &bytes);
            }
        });
        address
    }

    fn lie(mut stream: &TcpStream, end: Checkpoint, at: u64, bytes: &[u8]) {
        let (mut reader, mut buffer, mut out) = (FrameReader::new(), [0; 4096], Vec::new());
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            reader.push(&buffer[..len]);
            while let Ok(Some(message)) = reader.next_message() {
                match message {
                    Message::Hello(hello) => welcome(&hello).encode(&mut out),
                    Message::Subscribe(_) => {
                        subscribed(end).encode(&mut out);
                        let origin_end = OriginEnd { offset: end.offset, position: end.position };
                        let data = Data { offset: at, origin_end, continued: false, bytes };
                        Message::Data(data).encode(&mut out);
                    }
                    _ => {}
                }
            }
            drop(stream.write_all(&out));
            out.clear();
        }
    }

    #[test]
    fn what_does_not_continue_the_journal_is_not_taken_back() {
        let lost = lost(17);
        // The second batch behind the journal's end, in the place of the first.
        let whole = lost.bytes.iter().flat_map(|(_, bytes)| bytes[4096..].to_vec());
        let whole: Vec<u8> = whole.collect();
        let at = lost.ours.offset as usize;
        let len_at = |at: usize| u32::from_le_bytes(whole[at + 60..at + 64].try_into().unwrap());
        let second = at + len_at(at) as usize;
        let batch = whole[second..second + len_at(second) as usize].to_vec();
        let end = Checkpoint {
            incarnation: Incarnation::new(1),
            offset: lost.ours.offset + batch.len() as u64,
            position: lost.ours.position.advance(3),
            ..lost.theirs
        };
        let address = liar(end, lost.ours.offset, batch).to_string();
        let refusal = |fs: &SimFs| match refused(fs, &check(&[&address])) {
            PeersError::Pull { error: ShippingError::Refused { refusal, .. }, .. } => Some(refusal),
            _ => None,
        };
        let fs = lost.fs.fork(1);
        assert_eq!(refusal(&fs), Some(Refusal::BatchLink));
        // It isn't opened for writing, and goes on from a mirror that doesn't lie.
        let builder = Store::builder(DIR).journal_options(options()).fs(dynamic(&fs));
        assert!(matches!(builder.open(), Err(OpenError::Recovering { .. })));
        take_back(&fs, &check(&[&lost.mirror.address])).unwrap();
        lost.check_whole(&fs).unwrap();
        // The planted bug is found by this very test.
        planted::plant(Some(Bug::TakeUnlinked));
        let fs = lost.fs.fork(2);
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| refusal(&fs)));
        planted::plant(None);
        assert!(!matches!(taken, Ok(Some(Refusal::BatchLink))), "the planted bug was not found");
    }

    /// Holds everything when it is asked first; when it is asked again it ends at `now`, and has nothing to send. It is there
    /// all the while, and says so.
    fn shrinking(told: Checkpoint, now: Checkpoint) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let end = if number == 0 { told } else { now };
                std::thread::spawn(move || stand_by(&stream.unwrap(), end));
            }
        });
        address
    }

    fn stand_by(mut stream: &TcpStream, end: Checkpoint) {
        let (mut reader, mut buffer, mut out) = (FrameReader::new(), [0; 4096], Vec::new());
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            reader.push(&buffer[..len]);
            while let Ok(Some(message)) = reader.next_message() {
                match message {
                    Message::Hello(hello) => welcome(&hello).encode(&mut out),
                    Message::Subscribe(_) => subscribed(end).encode(&mut out),
                    Message::Ack(ack) => {
                        let (speaker, echo) = (Speaker::Origin, ack.echo);
                        Message::Heartbeat(Heartbeat { end, now_us: 0, speaker, echo })
                            .encode(&mut out);
                    }
                    _ => {}
                }
            }
            drop(stream.write_all(&out));
            out.clear();
        }
    }

    /// Between the question how far it reaches and the taking back, a mirror was restarted and set a damaged tail aside. What
    /// it had left was taken; then the origin waited for the rest, from heartbeat to heartbeat, and `open` never returned.
    #[test]
    fn a_mirror_that_no_longer_reaches_what_it_told_is_not_waited_for() {
        let lost = lost(29);
        let address = shrinking(lost.theirs, lost.ours).to_string();
        let (fs, shrinking) = (lost.fs.fork(1), check(&[&address]));
        let (tell, told) = std::sync::mpsc::channel();
        let other = fs.clone();
        std::thread::spawn(move || tell.send(refused(&other, &shrinking)));
        match told.recv_timeout(SOON).expect("it waits for what nobody has") {
            PeersError::Receded { address: named, told, reached } => {
                assert_eq!(named, address);
                assert_eq!((told, reached), (lost.theirs.position, lost.ours.position));
            }
            error => panic!("{error}"),
        }
        // It isn't opened for writing by chance, and goes on from a mirror that has all of it.
        let builder = Store::builder(DIR).journal_options(options()).fs(dynamic(&fs));
        assert!(matches!(builder.open(), Err(OpenError::Recovering { .. })));
        take_back(&fs, &check(&[&lost.mirror.address])).unwrap();
        lost.check_whole(&fs).unwrap();
    }

    #[test]
    fn what_has_arrived_is_kept_when_taking_back_is_given_up() {
        let lost = lost(19);
        let dir = Path::new(DIR).join("journal");
        let fs = (0..).map(|op| {
            let fs = lost.fs.fork(op);
            fs.fail_at(fs.ops() + op, Fault::Kill, Repeat::Once);
            drop(take_back(&fs, &check(&[&lost.mirror.address])));
            fs.clear_faults();
            fs.kill();
            fs
        });
        let is_recovering =
            |fs: &SimFs| fs.files().iter().any(|path| path.ends_with("journal/recovering"));
        let fs = fs.skip_while(|fs| !is_recovering(fs)).nth(20).unwrap();
        assert!(is_recovering(&fs), "the test is meant to interrupt it");
        headwater::shipping::abandon_recovery(&dynamic(&fs), &dir, &options()).unwrap();
        let end = open(&fs).journal().end();
        assert!(end.position >= lost.ours.position && end.position <= lost.theirs.position);
    }
}

/// What a mirror that is served answers to a subscriber that ends here.
#[cfg(feature = "shipping")]
fn answer_to(address: std::net::SocketAddr, end: Checkpoint) -> String {
    use std::io::{Read, Write};

    use headwater::shipping::message::{
        Authentication, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
    };

    let mut said = Vec::new();
    Message::Hello(Hello {
        versions: PROTOCOL_VERSIONS,
        features: 0,
        max_frame: 1 << 20,
        node: None,
        nonce: [1; 16],
        authentication: Authentication::None,
        agent: "test".into(),
    })
    .encode(&mut said);
    let subscribe = Subscribe { from: Some(end), witness: None, window_bytes: 1 };
    Message::Subscribe(subscribe).encode(&mut said);
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(crate::shipping::SOON)).unwrap();
    stream.write_all(&said).unwrap();
    let (mut heard, mut reader, mut last) = (Vec::new(), FrameReader::new(), String::new());
    stream.read_to_end(&mut heard).unwrap();
    reader.push(&heard);
    while let Some(message) = reader.next_message().unwrap() {
        last = match message {
            Message::Error(failure) => failure.code.to_string(),
            message => message.name().to_owned(),
        };
    }
    last
}

/// A mirror that is served looks whether a subscriber that is ahead of it is in a tail that was set aside. It opened each
/// tail to see where it ends, which reads its last segment whole, and opened it again to look for the place, for every
/// subscriber that said it was ahead.
#[cfg(feature = "shipping")]
#[test]
fn a_subscriber_that_is_ahead_has_no_tail_opened_that_it_can_not_be_in() {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::races::Hooked;
    use headwater::fs::sim::Op;

    let forked = forked(3);
    let mirror = forked.set_aside(&forked.mirror_fs).unwrap();
    assert_eq!(mirror.journal().orphans().len(), 1);
    mirror.close().unwrap();
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    let disk = Hooked::new(&forked.mirror_fs, move |op, path| {
        let is_of_tail = path.components().any(|it| it.as_os_str() == "orphaned");
        count.fetch_add(usize::from(op == Op::Open && is_of_tail), Ordering::SeqCst);
        Ok(())
    });
    let disk: Arc<dyn Fs> = Arc::new(disk);
    let mirror = Ingest::open(&disk, Path::new(MIRROR), &options()).unwrap().unwrap();
    let server = headwater::shipping::serve(
        mirror.journal().clone(),
        "127.0.0.1:0",
        headwater::shipping::ServeOptions::default(),
    )
    .unwrap();
    let opened_for = |end: Checkpoint, answer: &str| {
        opened.store(0, Ordering::SeqCst);
        assert_eq!(answer_to(server.local_addr(), end), answer);
        opened.load(Ordering::SeqCst)
    };
    let (position, offset) = (forked.old_end.position, forked.old_end.offset);
    let position = Position::new(position.get() + 1000);
    let ahead = Checkpoint { position, offset: offset + (1 << 20), ..forked.old_end };
    let first = opened_for(ahead, "NOT_YET (20)");
    let next = opened_for(ahead, "NOT_YET (20)");
    assert!(first > 0 && next == 0, "{first}, then {next}");
    // Who may be in it is looked for.
    assert!(opened_for(forked.old_end, "DIVERGED") > 0);
    assert_eq!(opened_for(ahead, "NOT_YET (20)"), 0);
}
