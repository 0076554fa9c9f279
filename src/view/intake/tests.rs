//! The log on a disk that loses what wasn't synced.

use std::path::PathBuf;

use fastrand::Rng;

use super::*;
use crate::format::intake::IntakeHeader;
use crate::fs::sim::{Fault, Op, Repeat, SectorSize, SimFs};
use crate::position::Chain;

const DIR: &str = "/store/views";

fn ids(count: u8) -> Vec<JournalId> {
    (1..=count).map(|n| JournalId::from_bytes([n; 16])).collect()
}

fn path(ids: &[JournalId]) -> PathBuf {
    Path::new(DIR).join(".intake").join(IntakeHeader::new(ids.to_vec()).name())
}

/// A process with views over the same journals: what it follows it holds for settled.
struct Follower {
    log: Log,
    mark: Mark,
    followed: Vec<Run>,
}

impl Follower {
    fn open(fs: &SimFs, ids: &[JournalId]) -> Result<Self, ViewError> {
        let fs: Arc<dyn Fs> = Arc::new(fs.clone());
        let log = Log::open(&fs, Path::new(DIR), ids)?;
        let mark = log.beginning();
        Ok(Self { log, mark, followed: Vec::new() })
    }

    /// Follows what there is, or makes more.
    fn go_on(&mut self, rng: &mut Rng, ids: &[JournalId]) -> Result<(), ViewError> {
        let more = self.log.next(&mut self.mark)?;
        if !more.is_empty() {
            self.followed.extend(more);
            return Ok(());
        }
        self.log.extend(self.mark, |end_of| {
            let some: Vec<&JournalId> = ids.iter().filter(|_| rng.bool()).collect();
            let run = |journal: &JournalId| {
                let Link { offset, position, .. } = end_of(*journal);
                let (offset, position) = (offset + 64, position.advance(rng.u64(1..5)));
                let chain = Chain::from_bytes([rng.u8(..); 16]);
                Run { journal: *journal, end: Link { offset, position, chain } }
            };
            Ok::<_, ViewError>(some.into_iter().map(run).collect())
        })
    }
}

/// Whatever was followed by anybody is the beginning of what is found afterwards, by everybody.
fn assert_settled(fs: &SimFs, ids: &[JournalId], followed: &[Vec<Run>], what: &str) -> Vec<Run> {
    let mut after = Follower::open(fs, ids).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut all = Vec::new();
    loop {
        let more = after.log.next(&mut after.mark).unwrap();
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    for followed in followed {
        assert!(all.starts_with(followed), "{what}: {followed:?} followed, {all:?} found");
    }
    all
}

/// Two processes extend the log by turns; at one operation after the other the power goes, the process dies, or the disk
/// fails, and perhaps the process dies of that, and the power goes later.
#[test]
fn what_anybody_has_followed_is_there_whatever_dies_or_fails() {
    for seed in 0..6 {
        let ids = ids(2 + seed as u8 % 3);
        let sector = [SectorSize::B64, SectorSize::B512, SectorSize::B4096][seed as usize % 3];
        let run = |plan: &[(u64, Fault)]| {
            let fs = SimFs::with_sector_size(seed, sector);
            fs.set_garbage_growth(seed % 2 == 0);
            for (op, fault) in plan {
                fs.fail_at(*op, *fault, Repeat::Once);
            }
            let mut rng = Rng::with_seed(seed);
            let mut followers: Vec<Option<Follower>> = vec![None, None];
            let mut followed: Vec<Vec<Run>> = Vec::new();
            for _ in 0..24 {
                if fs.down().is_some() {
                    break;
                }
                let which = rng.usize(..2);
                let Some(follower) = &mut followers[which] else {
                    followers[which] = Follower::open(&fs, &ids).ok();
                    continue;
                };
                // One that has failed is opened again, as a view is, or goes on for another view.
                let failed = follower.go_on(&mut rng, &ids).is_err();
                if failed && rng.bool() || rng.u8(..8) == 0 {
                    followed.extend(followers[which].take().map(|it| it.followed));
                }
            }
            followed.extend(followers.into_iter().flatten().map(|it| it.followed));
            (fs, followed)
        };
        let (fs, followed) = run(&[]);
        let ops = fs.ops();
        assert!(followed.iter().map(Vec::len).sum::<usize>() > 5, "seed {seed}: {followed:?}");
        for op in 0..ops {
            let at_op = |fault| vec![(op, fault)];
            let plans = [Fault::PowerCut, Fault::Kill, Fault::Eio, Fault::ShortWrite].map(at_op);
            let dies = vec![(op, Fault::Eio), (op + 1, Fault::Kill)];
            // What couldn't be synced can't be cut either, and whoever finds it can't sync it.
            let (next, later) = (op + 1, op + 2 + (op + seed) % 10);
            let stays = [op, next, later].map(|op| (op, Fault::Eio)).to_vec();
            for plan in plans.into_iter().chain([dies, stays]) {
                let what = format!("seed {seed}, {plan:?}");
                let (fs, mut followed) = run(&plan);
                if fs.down() == Some(crate::fs::sim::Down::Kill) {
                    fs.kill();
                    followed.push(assert_settled(&fs, &ids, &followed, &what));
                }
                fs.clear_faults();
                for fork in 0..3 {
                    let fs = fs.fork(fork);
                    match fork {
                        0 => fs.power_cut_losing_all(),
                        _ => fs.power_cut(),
                    }
                    assert_settled(&fs, &ids, &followed, &what);
                }
            }
        }
    }
}

/// Nothing that can be read hides behind it: it isn't the last write.
#[test]
fn what_rots_is_told_with_its_place_and_a_torn_tail_is_cut() {
    let fs = SimFs::new(1);
    let ids = ids(3);
    let mut rng = Rng::with_seed(1);
    let mut follower = Follower::open(&fs, &ids).unwrap();
    while follower.followed.len() < 12 {
        follower.go_on(&mut rng, &ids).unwrap();
    }
    let (path, followed) = (path(&ids), std::mem::take(&mut follower.followed));
    let at = |n: usize| IntakeHeader::new(ids.clone()).offset_of(n as u64);
    let length = fs.raw(&path).unwrap().len();
    assert_eq!(length as u64, at(followed.len()));
    for byte in 0..length {
        let fs = fs.fork(byte as u64);
        fs.flip_bit(&path, byte as u64, 3);
        let opened = Follower::open(&fs, &ids);
        let is_last = byte as u64 >= at(followed.len() - 3);
        match opened.map(|it| it.log.mark().count) {
            Ok(count) => assert!(is_last && at(count as usize) <= byte as u64, "byte {byte}"),
            Err(ViewError::DamagedIntake { file_offset, .. }) => {
                assert!(
                    !is_last && (file_offset..file_offset + 40).contains(&(byte as u64))
                        || byte < 68
                );
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Whole, and in its place, but not behind the one in front of it.
    let again = IntakeHeader::new(ids.clone()).encode_run(followed.len() as u64, &followed[0]);
    let longer = fs.fork(0);
    longer.write_raw(&path, &[fs.raw(&path).unwrap(), again.unwrap().to_vec()].concat());
    assert_eq!(assert_settled(&longer, &ids, &[], "twice"), followed);
    for length in at(followed.len() - 1) as usize..length {
        let fs = fs.fork(length as u64);
        fs.write_raw(&path, &fs.raw(&path).unwrap()[..length]);
        assert_settled(&fs, &ids, &[followed[..followed.len() - 1].to_vec()], "cut");
        assert_eq!(fs.raw(&path).unwrap().len() as u64, at(followed.len() - 1), "torn bytes go");
    }
}

/// Somebody else has cut what was followed: nothing may be taken for its continuation.
#[test]
fn a_log_that_was_cut_under_its_followers_is_refused() {
    let fs = SimFs::new(2);
    let ids = ids(2);
    let mut rng = Rng::with_seed(2);
    let mut follower = Follower::open(&fs, &ids).unwrap();
    while follower.followed.len() < 6 {
        follower.go_on(&mut rng, &ids).unwrap();
    }
    while !follower.log.next(&mut follower.mark).unwrap().is_empty() {}
    let path = path(&ids);
    let bytes = fs.raw(&path).unwrap();
    fs.write_raw(&path, &bytes[..bytes.len() - 40]);
    let mut other = Follower::open(&fs, &ids).unwrap();
    for _ in 0..8 {
        other.go_on(&mut rng, &ids).unwrap();
        let refused = follower.go_on(&mut rng, &ids);
        assert!(matches!(refused, Err(ViewError::StaleIntake { .. })), "{refused:?}");
    }
}

/// What couldn't be written isn't followed, and the next one who tries begins where it began.
#[test]
fn a_full_disk_stops_who_extends_and_nothing_else() {
    let fs = SimFs::new(3);
    let ids = ids(2);
    let mut rng = Rng::with_seed(3);
    let mut follower = Follower::open(&fs, &ids).unwrap();
    for _ in 0..50 {
        let op = [Op::Write, Op::SyncData][rng.usize(..2)];
        fs.fail_next(op, Fault::Enospc);
        let before = follower.log.mark();
        if follower.go_on(&mut rng, &ids).is_err() {
            assert_eq!(follower.log.mark(), before);
        }
        fs.clear_faults();
        follower.go_on(&mut rng, &ids).unwrap();
    }
    assert!(follower.followed.len() > 20);
    fs.power_cut();
    assert_settled(&fs, &ids, &[follower.followed], "a full disk");
}

/// Whatever the runs and the size of the pieces: each journal whole, in the order of the runs, cut where `until` is.
#[test]
fn pieces_are_what_the_runs_are() {
    for seed in 0..300 {
        let mut rng = Rng::with_seed(seed);
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(seed));
        let ids = ids(rng.u8(2..5));
        let mut follower = Follower {
            log: Log::open(&fs, Path::new(DIR), &ids).unwrap(),
            mark: Mark::default(),
            followed: Vec::new(),
        };
        while follower.followed.len() < 30 {
            follower.go_on(&mut rng, &ids).unwrap();
        }
        let Follower { log, followed, .. } = follower;
        // Up to somewhere within a run.
        let last = rng.usize(..followed.len());
        let place = |journal: JournalId, position: Position, offset| Checkpoint {
            position,
            offset,
            ..beginning(journal)
        };
        let mut until = Checkpoints::of_all(ids.iter().map(|id| beginning(*id))).unwrap();
        let mut expected: Vec<(JournalId, u64)> = Vec::new();
        for (n, run) in followed.iter().enumerate().take(last + 1) {
            let from = until.position(run.journal).get();
            let mut to = run.end.position.get();
            if n == last {
                to = rng.u64(from + 1..=to);
            }
            expected.extend((from..to).map(|position| (run.journal, position)));
            until = until.moved(place(run.journal, Position::new(to), run.end.offset));
        }
        let mark = log.beginning();
        let runs = Runs { log: Some((Arc::new(log), mark)), read: VecDeque::new() };
        let reached = Checkpoints::of_all(ids.iter().map(|id| beginning(*id))).unwrap();
        let mut pieces = Pieces { runs, until: &until, reached };
        let bytes = rng.u64(1..400);
        let mut found = Vec::new();
        loop {
            let piece = pieces.next(bytes).unwrap();
            if piece.is_empty() {
                break;
            }
            for Stretch { journal, from, to, .. } in piece {
                found.extend((from.get()..to.get()).map(|position| (journal, position)));
            }
        }
        assert_eq!(found, expected, "seed {seed}");
    }
}
