//! The log on a disk that loses what wasn't synced.

use std::path::PathBuf;

use fastrand::Rng;

use super::*;
use crate::format::files::Role;
use crate::format::intake::IntakeHeader;
use crate::fs::sim::{Fault, Op, Repeat, SectorSize, SimFs};
use crate::journal::{Append, Appender};
use crate::options::JournalOptions;
use crate::position::{Chain, NodeId};
use crate::{ExpectedRevision, NewEvent, StreamId};

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
        self.log.extend(self.mark, Duration::ZERO, |end_of| {
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
                fs.clear_faults(); // one that applies to nothing that was done is still to come
                if fs.down() == Some(crate::fs::sim::Down::Kill) {
                    fs.kill();
                    followed.push(assert_settled(&fs, &ids, &followed, &what));
                }
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

/// Where each of the first writes begins, and behind the last one.
fn writes(follower: &mut Follower, rng: &mut Rng, ids: &[JournalId], count: usize) -> Vec<u64> {
    let mut marks = vec![0];
    while marks.len() <= count || follower.followed.len() as u64 != marks[marks.len() - 1] {
        follower.go_on(rng, ids).unwrap();
        let end = follower.log.mark().count;
        if end > marks[marks.len() - 1] {
            marks.push(end);
        }
    }
    marks
}

fn at_end_of(ids: &[JournalId], runs: &[Run]) -> Checkpoints {
    let beginning = Checkpoints::of_all(ids.iter().map(|id| beginning(*id))).unwrap();
    runs.iter().fold(beginning, |at, run| at.moved(checkpoint(run.journal, run.end)))
}

/// What can be of the last write may be torn, whatever else of that is there; anything in front of it can't, nor what a view
/// has followed.
#[test]
fn what_rots_is_told_with_its_place_and_a_torn_tail_is_cut() {
    let mut of_one = 0;
    for seed in 0..8 {
        let fs = SimFs::new(seed);
        let ids = ids(3);
        let mut rng = Rng::with_seed(seed);
        let mut follower = Follower::open(&fs, &ids).unwrap();
        let writes = writes(&mut follower, &mut rng, &ids, 7);
        let (path, followed) = (path(&ids), std::mem::take(&mut follower.followed));
        let at = |n: u64| IntakeHeader::new(ids.clone()).offset_of(n);
        let (last, end) = (writes[writes.len() - 2], writes[writes.len() - 1]);
        of_one += u64::from(end == last + 1);
        let whole = fs.raw(&path).unwrap();
        assert_eq!(whole.len() as u64, at(end));
        let all = at_end_of(&ids, &followed);
        for byte in 0..whole.len() as u64 {
            let fs = fs.fork(byte);
            fs.flip_bit(&path, byte, 3);
            let rotten = fs.raw(&path).unwrap();
            let record = byte.checked_sub(at(0)).map(|byte| byte / 40);
            let is_told = |error: &ViewError| matches!(error, ViewError::DamagedIntake { file_offset, .. } if *file_offset == record.map_or(0, at));
            let opened = match Follower::open(&fs, &ids) {
                Ok(opened) => opened,
                Err(error) => {
                    assert!(
                        is_told(&error) && record.is_none_or(|it| it < last),
                        "{byte}: {error}"
                    );
                    continue;
                }
            };
            assert!(record.is_some_and(|it| it >= last), "seed {seed}, byte {byte}, {writes:?}");
            assert_eq!(Some(opened.log.mark().count), record);
            let known = record.unwrap() as usize;
            assert!(opened.log.leads_to(&at_end_of(&ids, &followed[..known])).unwrap());
            let error = opened.log.leads_to(&all).unwrap_err();
            assert!(is_told(&error), "seed {seed}, byte {byte}: {error}");
            assert_eq!(fs.raw(&path).unwrap(), rotten, "it stays");
        }
        // What is whole behind the torn one goes, too: it isn't what comes next.
        let torn = fs.fork(1);
        torn.flip_bit(&path, at(last), 3);
        let next = Follower::open(&torn, &ids).unwrap();
        let one = |end_of: &dyn Fn(JournalId) -> Link| {
            let end = end_of(ids[0]);
            let (offset, position) = (end.offset + 640, end.position.advance(100));
            Ok::<_, ViewError>(vec![Run { journal: ids[0], end: Link { offset, position, ..end } }])
        };
        next.log.extend(next.log.mark(), Duration::ZERO, one).unwrap();
        assert_eq!(next.log.mark().count, last + 1);
        assert_eq!(torn.raw(&path).unwrap().len() as u64, at(last + 1));
        // Whole, and in its place, but not behind the one in front of it.
        let again = IntakeHeader::new(ids.clone()).encode_run(end, 0, &followed[0]);
        let longer = fs.fork(0);
        longer.write_raw(&path, &[&whole[..], &again.unwrap()].concat());
        assert_eq!(assert_settled(&longer, &ids, &[], "twice"), followed);
        for length in at(end - 1)..at(end) {
            let fs = fs.fork(length);
            fs.write_raw(&path, &whole[..length as usize]);
            let mut kept =
                assert_settled(&fs, &ids, &[followed[..followed.len() - 1].to_vec()], "cut");
            let mut next = Follower::open(&fs, &ids).unwrap();
            while next.log.mark().count < end {
                next.go_on(&mut rng, &ids).unwrap();
            }
            assert_eq!(
                fs.raw(&path).unwrap().len() as u64,
                at(next.log.mark().count),
                "torn bytes go"
            );
            while next.followed.len() as u64 != next.log.mark().count {
                next.go_on(&mut rng, &ids).unwrap();
            }
            kept.extend(next.followed.split_off(kept.len()));
            assert_settled(&fs, &ids, &[kept], "gone on");
        }
    }
    assert!((1..8).contains(&of_one), "of one record, and of several: {of_one}");
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

/// Somebody else has cut it because of one journal, and gone on: with the very record of another journal that was the last.
#[test]
fn a_log_that_was_cut_and_ends_with_the_same_record_again_is_noticed() {
    let dir = Path::new(DIR);
    let run = |journal: JournalId, n: u64, chain: u8| {
        let end =
            Link { offset: n, position: Position::new(n), chain: Chain::from_bytes([chain; 16]) };
        Run { journal, end }
    };
    let ids = ids(2);
    let header = IntakeHeader::new(ids.clone());
    let sim = SimFs::new(4);
    let fs: Arc<dyn Fs> = Arc::new(sim.clone());
    let recorded = |lost: Run| -> Vec<u8> {
        let runs = [run(ids[1], 2, 2), lost, run(ids[1], 5, 5)];
        let records = (0..).zip(&runs).map(|(n, run)| header.encode_run(n, 0, run).unwrap());
        [header.encode(), records.flatten().collect()].concat()
    };
    let all = |_: &dyn Fn(JournalId) -> Link| Ok::<_, ViewError>(vec![run(ids[1], 6, 6)]);
    sim.write_raw(&path(&ids), &recorded(run(ids[0], 9, 1)));
    let log = Log::shared(&fs, dir, &ids).unwrap();
    let mark = log.mark();
    for lost in [run(ids[0], 9, 7), run(ids[0], 4, 1)] {
        let other = recorded(lost);
        sim.write_raw(&path(&ids), &other);
        let refused = log.extend(mark, Duration::ZERO, all);
        assert!(matches!(refused, Err(ViewError::StaleIntake { .. })), "{refused:?}");
        assert_eq!(sim.raw(&path(&ids)).unwrap(), other);
    }
    // The next view finds out what there is now, and whoever followed the other one that it has changed.
    let again = Log::shared(&fs, dir, &ids).unwrap();
    assert!(Arc::ptr_eq(&log, &again));
    assert_eq!(log.end_of(ids[0]), run(ids[0], 4, 1).end);
    let refused = log.next(&mut mark.clone());
    assert!(matches!(refused, Err(ViewError::StaleIntake { .. })), "{refused:?}");
    log.extend(log.mark(), Duration::ZERO, all).unwrap();
    assert_eq!(log.mark().count, 4);
}

/// A journal that goes on in another way may be behind where it was taken in already: nobody could read that.
#[test]
fn a_run_that_cannot_be_the_next_one_of_its_journal_is_never_written() {
    let sim = SimFs::new(5);
    let fs: Arc<dyn Fs> = Arc::new(sim.clone());
    let ids = ids(2);
    let log = Log::open(&fs, Path::new(DIR), &ids).unwrap();
    let run = |which: usize, offset, position| {
        let chain = Chain::from_bytes([position as u8; 16]);
        Run { journal: ids[which], end: Link { offset, position: Position::new(position), chain } }
    };
    let extend =
        |runs: Vec<Run>| log.extend(log.mark(), Duration::ZERO, |_| Ok::<_, ViewError>(runs));
    extend(vec![run(0, 640, 10), run(1, 640, 10)]).unwrap();
    let written = sim.raw(&path(&ids)).unwrap();
    for (offset, position) in [(640, 12), (600, 12), (700, 10), (700, 4)] {
        let refused = extend(vec![run(1, 900, 20), run(0, offset, position)]);
        assert!(matches!(refused, Err(ViewError::StaleIntake { .. })), "{refused:?}");
        assert_eq!(sim.raw(&path(&ids)).unwrap(), written);
        assert_eq!((log.mark().count, log.end_of(ids[1])), (2, run(1, 640, 10).end));
    }
    extend(vec![run(0, 700, 12)]).unwrap();
    assert_eq!(log.mark().count, 3);
}

/// What is brought from elsewhere, and isn't the order by which the rows were made, leaves no trace.
#[test]
fn an_order_from_elsewhere_is_judged_before_it_is_written() {
    let ids = ids(2);
    let header = IntakeHeader::new(ids.clone());
    let run = |which: usize, to: u64| {
        let end = Link {
            offset: to * 64,
            position: Position::new(to),
            chain: Chain::from_bytes([1; 16]),
        };
        Run { journal: ids[which], end }
    };
    let bytes = |runs: &[Run]| {
        let records = (0..).zip(runs).map(|(n, run)| header.encode_run(n, 0, run).unwrap());
        [header.encode(), records.flatten().collect()].concat()
    };
    let at = at_end_of(&ids, &[run(0, 5), run(1, 3)]);
    let theirs = [run(0, 5), run(1, 3), run(0, 9)];
    let wrong: [&[Run]; 4] = [
        &[run(0, 5), run(1, 2), run(0, 9), run(1, 3)], // past them
        &[run(0, 5)],                                  // not up to them
        &[run(0, 5), run(1, 3), run(0, 9), run(0, 8)], // back
        &[run(0, 6), run(1, 3)],
    ];
    for wrong in wrong {
        let sim = SimFs::new(6);
        let fs: Arc<dyn Fs> = Arc::new(sim.clone());
        let log = Log::open(&fs, Path::new(DIR), &ids).unwrap();
        let before = sim.raw(&path(&ids)).unwrap();
        assert!(!log.install(&bytes(wrong), &at).unwrap(), "{wrong:?}");
        assert_eq!(sim.raw(&path(&ids)).unwrap(), before, "{wrong:?}");
        assert!(log.install(&bytes(&theirs), &at).unwrap(), "after {wrong:?}");
        assert_eq!(sim.raw(&path(&ids)).unwrap(), bytes(&theirs));
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

/// A journal on its own disk, with so many events.
fn journal_of(role: Role, events: usize) -> Appender {
    let fs: Arc<dyn Fs> = Arc::new(SimFs::new(8));
    let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
    let dir = Path::new("/journal");
    let created = Appender::create_as(role, NodeId::random(), &fs, dir, &options).unwrap();
    (0..events).for_each(|_| append_to(&created));
    created
}

fn append_to(appender: &Appender) {
    let stream = StreamId::new("s").unwrap();
    let event = NewEvent::raw("e", vec![0; 16]).unwrap();
    appender.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
}

/// Whatever comes while it is recorded: that is for whoever follows.
#[test]
fn all_that_there_is_at_the_beginning_is_taken_and_no_more_and_it_can_be_cancelled() {
    let sim = SimFs::new(8);
    let fs: Arc<dyn Fs> = Arc::new(sim.clone());
    let busy = journal_of(Role::Origin, 3);
    let other = journal_of(Role::Origin, 2);
    let sources = Sources::new(busy.journal().clone(), vec![other.journal().clone()]).unwrap();
    let log = Log::open(&fs, Path::new(DIR), sources.ids()).unwrap();
    let intake = Intake { log: Some(Arc::new(log)) };
    let cancelled = intake.take_all(&sources, || Err(Cancelled)).unwrap();
    assert!(cancelled.is_none());
    append_to(&busy);
    let ends = sources.end();
    let mut asked = 0;
    let load = || {
        asked += 1;
        append_to(&busy); // there is always more
        if asked < 50 { Ok(()) } else { Err(Cancelled) }
    };
    let reached = intake.take_all(&sources, load).unwrap().expect("it ends");
    for end in ends.iter() {
        assert!(reached.position(end.journal) >= end.position, "{reached:?}");
    }
    assert_eq!(asked, 1);
}

/// Who appends to a journal won't come back to what it has lost, of a feed as well; a mirror may get as far again.
#[test]
fn what_is_beyond_the_end_of_a_journal_is_cut_unless_it_is_a_mirror() {
    for (role, kept) in [(Role::Origin, 1), (Role::Feed, 1), (Role::Mirror, 3)] {
        let sim = SimFs::new(9);
        let fs: Arc<dyn Fs> = Arc::new(sim.clone());
        let (lost, other) = (journal_of(role, 0), journal_of(Role::Origin, 2));
        let sources = Sources::new(lost.journal().clone(), vec![other.journal().clone()]).unwrap();
        let log = Log::open(&fs, Path::new(DIR), sources.ids()).unwrap();
        let beyond = |end_of: &dyn Fn(JournalId) -> Link| {
            let Link { offset, position, chain } = end_of(lost.journal().id());
            let end = Link { offset: offset + 64, position: position.advance(1), chain };
            Ok::<_, ViewError>(vec![Run { journal: lost.journal().id(), end }])
        };
        let journal = other.journal();
        let there = |_: &dyn Fn(JournalId) -> Link| {
            let end = journal.end().into();
            Ok::<_, ViewError>(vec![Run { journal: journal.id(), end }])
        };
        log.extend(log.mark(), Duration::ZERO, there).unwrap();
        log.extend(log.mark(), Duration::ZERO, beyond).unwrap();
        log.extend(log.mark(), Duration::ZERO, beyond).unwrap();
        log.heed(&sources).unwrap();
        assert_eq!(log.mark().count, kept, "{role}");
    }
}

/// It was deleted, and of what was recorded in its place nothing is whole: that says nothing about the rows.
#[test]
fn an_order_of_which_nothing_is_whole_is_another_one_and_not_damaged() {
    let fs = SimFs::new(10);
    let ids = ids(3);
    let mut rng = Rng::with_seed(10);
    let mut follower = Follower::open(&fs, &ids).unwrap();
    while follower.followed.len() < 3 {
        follower.go_on(&mut rng, &ids).unwrap();
    }
    let rows = at_end_of(&ids, &follower.followed);
    let header = IntakeHeader::new(ids.clone());
    for records in 0..=3 {
        let fs = fs.fork(records);
        let torn = vec![0; 40 * records as usize];
        fs.write_raw(&path(&ids), &[header.encode(), torn].concat());
        let opened = Follower::open(&fs, &ids).unwrap();
        assert!(!opened.log.leads_to(&rows).unwrap(), "{records}");
        assert!(opened.log.leads_to(&at_end_of(&ids, &[])).unwrap(), "{records}");
    }
}

/// It isn't guessed at, and not called damaged.
#[test]
fn an_order_of_another_layout_is_refused_by_name() {
    let sim = SimFs::new(11);
    let fs: Arc<dyn Fs> = Arc::new(sim.clone());
    let ids = ids(2);
    let mut bytes = IntakeHeader::new(ids.clone()).encode();
    bytes[8] = 1;
    let covered = bytes.len() - 4;
    let crc = crate::format::crc32(&[&bytes[..covered]]);
    bytes[covered..].copy_from_slice(&crc.to_le_bytes());
    bytes.extend([0; 40]);
    fs.create_dir_all(path(&ids).parent().unwrap()).unwrap();
    sim.write_raw(&path(&ids), &bytes);
    let refused = Log::open(&fs, Path::new(DIR), &ids).map(drop).unwrap_err();
    assert!(matches!(refused, ViewError::UnsupportedIntake { version: 1, .. }), "{refused}");
    let refused = Log::read_only(&fs, Path::new(DIR), &ids).map(drop).unwrap_err();
    assert!(matches!(refused, ViewError::UnsupportedIntake { version: 1, .. }), "{refused}");
    assert_eq!(sim.raw(&path(&ids)).unwrap(), bytes);
}

/// Nothing is wrong then, and whoever was refused goes on later.
#[test]
fn who_finds_others_recording_is_told_that_within_its_patience() {
    let sim = SimFs::new(12);
    let fs: Arc<dyn Fs> = Arc::new(sim.clone());
    let ids = ids(2);
    let log = Log::open(&fs, Path::new(DIR), &ids).unwrap();
    let lock = path(&ids).with_extension("lock");
    let held = fs.lock(&lock, "somebody else").unwrap().unwrap();
    let none = |_: &dyn Fn(JournalId) -> Link| Ok::<_, Failed>(Vec::new());
    let refused = log.extend(log.mark(), Duration::ZERO, none).unwrap_err();
    assert!(refused.is_in_use(), "{refused:?}");
    drop(held);
    log.extend(log.mark(), Duration::ZERO, none).unwrap();
}
