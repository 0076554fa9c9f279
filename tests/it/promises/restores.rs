//! S3: an origin that was restored from an older state and has grown again is detected, whatever was lost and whatever has
//! grown. Stores on disk, and mirrors that follow them over a socket; the oracle knows which batches both have in common.
//!
//! ```text
//!   the origin as it was  0 ──── copied ────────── total     it is lost here
//!   the mirror of that    0 ── begun ── mirrored             goes away here, or is away
//!   the origin as it is   0 ──── copied ─── regrown          with the same events, or others
//! ```

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::shipping::{
    Divergent, FollowOptions, ForkPolicy, Mirror, MirrorState, MirrorStatus, ServeOptions, Server,
    ShippingError, follow, serve,
};
use headwater::testing::Clock;
use headwater::{
    Append, Checkpoint, EventId, ExpectedRevision, Journal, JournalOptions, NewEvent, Position,
    Store, StreamId, restore,
};

use crate::fault_proxy::Proxy;
use crate::forks::{open_orphans, payloads};
use crate::shipping::{SOON, assert_same_bytes, copy_dir, damage_tail, replace_dir, used_bytes};

const CASES: u64 = 120;

/// Nobody listens there.
const NOWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 1);

/// Some events of one stream, made of numbers alone: they can be appended again, ids and all.
#[derive(Clone, Copy, Debug)]
struct Part {
    contents: u64,
    ids: u64,
}

impl Part {
    fn any(rng: &mut Rng) -> Self {
        Self { contents: rng.u64(..), ids: rng.u64(..) }
    }

    fn payloads(self) -> Vec<Vec<u8>> {
        let mut rng = Rng::with_seed(self.contents);
        (0..rng.usize(1..4)).map(|_| (0..rng.usize(1..60)).map(|_| rng.u8(..)).collect()).collect()
    }

    fn events(self) -> Vec<NewEvent> {
        let mut ids = Rng::with_seed(self.ids);
        let mut event = |payload| {
            let id = EventId::from_bytes(ids.u128(..).to_le_bytes());
            NewEvent::raw("test.happened", payload).unwrap().id(id)
        };
        self.payloads().into_iter().map(&mut event).collect()
    }
}

/// What is appended at once, and when.
#[derive(Clone, Debug)]
struct Batch {
    parts: Vec<Part>,
    time_us: i64,
}

fn lost_payloads(batches: &[Batch]) -> Vec<Vec<u8>> {
    batches.iter().flat_map(|batch| &batch.parts).flat_map(|part| part.payloads()).collect()
}

/// What the restored origin appends behind what it still has.
#[derive(Clone, Copy, Debug)]
enum Regrowth {
    /// The very same batches at the very same times: only the incarnation is another one.
    Same,
    /// The same payloads with other ids.
    SamePayloads,
    /// The same events, two former batches in one.
    CutOtherwise,
    Others,
}

/// How the older state was kept.
#[derive(Clone, Copy, Debug)]
enum Kept {
    /// The folder of the closed store.
    Folder,
    /// A backup of the store in use.
    Backup,
    /// A backup of everything, restored up to there.
    BackupUpTo,
}

#[derive(Clone, Debug)]
struct Case {
    /// How many batches the origin had when it was copied, when the mirror began, when that was restarted (if it was) and
    /// came no further, and when it was lost.
    copied: usize,
    begun: usize,
    restarted: Option<usize>,
    mirrored: usize,
    total: usize,
    /// How many are appended again.
    regrown: usize,
    regrowth: Regrowth,
    kept: Kept,
    /// The mirror is stopped while the origin is replaced; or it goes on trying.
    is_stopped: bool,
    /// Its last batch rots meanwhile, and is set aside: only a witness says that it was there.
    rots: bool,
    /// The restored origin is served before it grows.
    served_first: bool,
    /// It is opened with segments of other sizes again and again, in a new incarnation each time.
    reopens: bool,
    quarantines: bool,
}

impl Case {
    /// Seeds that follow each other go through what matters: whether the mirror has anything of what was lost, and which
    /// history is longer.
    fn any(seed: u64, rng: &mut Rng) -> Self {
        let most = if seed.is_multiple_of(11) { 90 } else { 18 };
        let (had_lost, longer) = (!seed.is_multiple_of(4), (seed / 4) % 3);
        let lower = rng.usize(0..most);
        // Often there is one batch between: then a mirror whose last one rots has nothing but what both have.
        let higher = lower + if rng.u8(..4) == 0 { 1 } else { rng.usize(1..most) };
        let (copied, mirrored) = match had_lost {
            true => (lower, higher),
            false => (if rng.bool() { lower } else { higher }, lower),
        };
        let missing = higher - lower;
        let regrown = match longer {
            0 => rng.usize(0..missing),
            1 => missing,
            _ => missing + rng.usize(1..most),
        };
        let begun = rng.usize(0..=mirrored);
        let (is_stopped, quarantines) = (rng.bool(), rng.bool());
        let rots = is_stopped && !quarantines && mirrored > 0 && rng.bool();
        let kinds =
            [Regrowth::Same, Regrowth::SamePayloads, Regrowth::CutOtherwise, Regrowth::Others];
        Self {
            copied,
            begun,
            restarted: rng.bool().then(|| rng.usize(begun..=mirrored)),
            mirrored,
            total: copied.max(mirrored) + if rng.bool() { 0 } else { rng.usize(0..10) },
            regrown,
            // With as many of the same batches both are equally long.
            regrowth: if longer == 1 { Regrowth::Same } else { rng.choice(kinds).unwrap() },
            kept: rng.choice([Kept::Folder, Kept::Backup, Kept::BackupUpTo]).unwrap(),
            is_stopped,
            rots,
            served_first: rng.bool(),
            reopens: rng.bool(),
            quarantines,
        }
    }

    /// Whether the mirror has what the origin has lost.
    fn is_forked(&self) -> bool {
        self.mirrored > self.copied
    }

    fn to_regrow(&self, history: &[Batch], rng: &mut Rng) -> Vec<Batch> {
        let lost = history[self.copied..].iter().cloned();
        let mut batches: Vec<Batch> = match self.regrowth {
            Regrowth::Same => lost.collect(),
            Regrowth::SamePayloads => {
                let mut again = |part: &Part| Part { ids: rng.u64(..), ..*part };
                lost.map(|it| Batch { parts: it.parts.iter().map(&mut again).collect(), ..it })
                    .collect()
            }
            Regrowth::CutOtherwise => {
                let lost: Vec<_> = lost.collect();
                let joined = |two: &[Batch]| Batch {
                    parts: two.iter().flat_map(|batch| batch.parts.clone()).collect(),
                    ..two[0].clone()
                };
                lost.chunks(2).map(joined).collect()
            }
            Regrowth::Others => Vec::new(),
        };
        let from = batches.len();
        batches.extend((from..self.regrown).map(|n| any_batch(self.copied + n, rng)));
        batches.truncate(self.regrown);
        batches
    }
}

fn any_batch(number: usize, rng: &mut Rng) -> Batch {
    Batch { parts: vec![Part::any(rng)], time_us: 1_700_000_000_000_000 + number as i64 }
}

fn os() -> Arc<dyn Fs> {
    Arc::new(OsFs)
}

/// Segments of a few batches up to many.
fn segments_of(bytes: u64) -> JournalOptions {
    JournalOptions {
        segment_bytes_first: bytes,
        segment_bytes_max: bytes,
        batch_bytes_max: 1024,
        group_bytes_max: 2048,
        ..JournalOptions::default()
    }
}

struct Origin<'a> {
    dir: PathBuf,
    rng: Rng,
    clock: Clock,
    /// In front of it, under one address for as long as this process lives: nobody else gets the port meanwhile.
    proxy: &'a Proxy,
    store: Option<Store>,
    server: Option<Server>,
}

impl<'a> Origin<'a> {
    fn new(dir: PathBuf, seed: u64, proxy: &'a Proxy) -> Self {
        let (rng, clock) = (Rng::with_seed(seed), Clock::default());
        Self { dir, rng, clock, proxy, store: None, server: None }
    }

    fn open(&mut self) {
        let bytes = self.rng.u64(5184..12_000);
        let builder = Store::builder(&self.dir).create_if_missing().clock(&self.clock);
        self.store = Some(builder.journal_options(segments_of(bytes)).open().unwrap());
    }

    fn close(&mut self) {
        self.store.take().unwrap().close().unwrap();
    }

    fn journal(&self) -> &Journal {
        self.store.as_ref().unwrap().journal()
    }

    fn serve(&mut self) {
        let server = serve(self.journal().clone(), "127.0.0.1:0", ServeOptions::default()).unwrap();
        self.proxy.lead_to(server.local_addr());
        self.server = Some(server);
    }

    fn hide(&mut self) {
        self.proxy.lead_to(NOWHERE.into());
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
    }

    /// What is served is served again.
    fn reopen(&mut self, meanwhile: impl FnOnce(&Path)) {
        let is_served = self.server.is_some();
        self.hide();
        self.close();
        meanwhile(&self.dir);
        self.open();
        if is_served {
            self.serve();
        }
    }

    fn append(&self, batch: &Batch) {
        self.clock.set_us(batch.time_us);
        let to = StreamId::new("s").unwrap();
        let events: Vec<_> = batch.parts.iter().flat_map(|part| part.events()).collect();
        let append = Append::to(&to, ExpectedRevision::Any, events);
        self.store.as_ref().unwrap().append(&append).unwrap();
    }

    fn grow(&mut self, batches: &[Batch], reopens: bool) {
        for batch in batches {
            if reopens && self.rng.u8(..8) == 0 {
                self.reopen(|_| {});
            }
            self.append(batch);
        }
    }
}

/// How a case has ended.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    WentOn,
    Ahead,
    Fork,
    /// A fork whose ends are at the same offset and position.
    Level,
}

struct Run<'a> {
    case: Case,
    origin: Origin<'a>,
    history: Vec<Batch>,
    /// The ends of the lost history, by the number of batches in front of them.
    ends: Vec<Checkpoint>,
    dir: PathBuf,
    mirror: Option<Mirror>,
    /// What the mirror had when the origin was lost.
    before: Vec<(u64, Vec<u8>)>,
}

impl<'a> Run<'a> {
    fn new(seed: u64, dir: &Path, proxy: &'a Proxy) -> Self {
        let mut rng = Rng::with_seed(seed);
        let case = Case::any(seed, &mut rng);
        println!("HEADWATER_SEED={seed}: {case:?}");
        let history = (0..case.total).map(|number| any_batch(number, &mut rng)).collect();
        let origin = Origin::new(dir.join("origin"), rng.u64(..), proxy);
        let dir = dir.to_owned();
        Self { case, origin, history, ends: Vec::new(), dir, mirror: None, before: Vec::new() }
    }

    fn follow(&mut self, forks: ForkPolicy) {
        let options =
            FollowOptions { journal: segments_of(8192), forks, ..FollowOptions::default() };
        let address = self.origin.proxy.address.to_string();
        self.mirror = Some(follow(os(), &self.dir.join("mirror"), address, options).unwrap());
    }

    fn policy(&self) -> ForkPolicy {
        if self.case.quarantines { ForkPolicy::Quarantine } else { ForkPolicy::Halt }
    }

    fn mirror(&self) -> &Mirror {
        self.mirror.as_ref().unwrap()
    }

    fn restart_mirror(&mut self, forks: ForkPolicy) {
        self.mirror.take().unwrap().stop().unwrap();
        self.follow(forks);
    }

    fn copy_path(&self) -> PathBuf {
        self.dir.join("copy")
    }

    /// The origin's life up to its loss, and the mirror beside it.
    fn live(&mut self) {
        self.origin.open();
        self.ends.push(self.origin.journal().end());
        for number in 0..=self.case.total {
            if self.case.reopens && self.origin.rng.u8(..8) == 0 {
                self.origin.reopen(|_| {});
            }
            if number == self.case.copied {
                self.copy();
            }
            if number == self.case.begun {
                self.origin.serve();
                self.follow(self.policy());
            }
            if self.case.restarted == Some(number) {
                self.restart_mirror(self.policy());
            }
            if number == self.case.mirrored {
                self.leave_mirror();
            }
            if let Some(batch) = self.history.get(number) {
                self.origin.append(batch);
                self.ends.push(self.origin.journal().end());
            }
        }
    }

    fn copy(&mut self) {
        let to = self.copy_path();
        match self.case.kept {
            Kept::Folder => self.origin.reopen(|dir| copy_dir(dir, &to)),
            Kept::Backup => drop(self.origin.journal().backup(&to).unwrap()),
            Kept::BackupUpTo => {}
        }
    }

    /// The mirror has everything up to here, and nothing more comes.
    fn leave_mirror(&mut self) {
        let mirrored = self.caught_up();
        self.before = used_bytes(&mirrored);
        self.origin.hide();
        if self.case.is_stopped {
            self.mirror.take().unwrap().stop().unwrap();
        }
        if self.case.rots {
            damage_tail(&mirrored);
            let (_, last) = self.before.last_mut().unwrap();
            let len =
                self.ends[self.case.mirrored].offset - self.ends[self.case.mirrored - 1].offset;
            last.truncate(last.len() - len as usize);
            self.before.retain(|(_, bytes)| bytes.len() > 4096);
        }
    }

    /// The mirror's journal, once it ends where the origin ends.
    fn caught_up(&self) -> Journal {
        let end = self.origin.journal().end();
        self.mirror().resume();
        assert_eq!(self.mirror().wait_caught_up(SOON).unwrap(), end);
        self.mirror().journal().unwrap()
    }

    fn replace_origin(&mut self) {
        let copy = self.copy_path();
        if matches!(self.case.kept, Kept::BackupUpTo) {
            self.origin.journal().backup(&copy).unwrap();
        }
        self.origin.close();
        if matches!(self.case.kept, Kept::Folder) {
            replace_dir(&self.origin.dir, &copy);
        } else {
            fs::remove_dir_all(&self.origin.dir).unwrap();
            let up_to = self.ends[self.case.copied].position;
            let at = matches!(self.case.kept, Kept::BackupUpTo).then_some(up_to);
            restore(&os(), &copy, &self.origin.dir.join("journal"), at).unwrap();
        }
        self.origin.open();
        assert_eq!(self.origin.journal().end(), self.ends[self.case.copied]);
    }

    fn meet(&mut self) {
        self.origin.serve();
        match &self.mirror {
            Some(mirror) => mirror.resume(),
            None => self.follow(self.policy()),
        }
    }

    fn check(&mut self) -> Outcome {
        match (self.case.is_forked(), self.case.quarantines) {
            (false, _) => self.check_goes_on(),
            (true, false) => self.check_halts(),
            (true, true) => {
                self.check_set_aside();
                self.outcome()
            }
        }
    }

    fn check_goes_on(&self) -> Outcome {
        let journal = self.caught_up();
        assert_same_bytes(self.origin.journal(), &journal);
        assert_eq!((journal.fork(), journal.orphans()), (None, Vec::new()));
        Outcome::WentOn
    }

    fn common(&self) -> Position {
        self.ends[self.case.copied].position
    }

    fn old_end(&self) -> Checkpoint {
        self.ends[self.case.mirrored]
    }

    /// What the mirror still has.
    fn mirror_end(&self) -> Checkpoint {
        self.ends[self.case.mirrored - usize::from(self.case.rots)]
    }

    /// Where the mirror ends, or ended if what it still has is all in the origin's history.
    fn compared(&self) -> Checkpoint {
        match self.mirror_end().position > self.common() {
            true => self.mirror_end(),
            false => self.old_end(),
        }
    }

    /// What the origin can say, from lengths alone.
    fn outcome(&self) -> Outcome {
        let (ours, theirs) = (self.origin.journal().end(), self.compared());
        if theirs.position > ours.position || theirs.offset > ours.offset {
            Outcome::Ahead
        } else if (theirs.position, theirs.offset) == (ours.position, ours.offset) {
            Outcome::Level
        } else {
            Outcome::Fork
        }
    }

    fn check_halts(&self) -> Outcome {
        let outcome = self.outcome();
        let status = self.mirror().wait_until(SOON, MirrorStatus::is_halted).unwrap();
        match (outcome, status.state) {
            (Outcome::Ahead, MirrorState::Halted(ShippingError::Ahead(at)))
            | (Outcome::Fork | Outcome::Level, MirrorState::Halted(ShippingError::Fork(at))) => {
                self.check_told(&at);
            }
            (outcome, other) => panic!("{outcome:?} is {other:?}"),
        }
        let journal = self.mirror().journal().unwrap();
        assert_eq!(journal.fork().unwrap().common, Some(self.common()));
        assert!(used_bytes(&journal) == self.before, "the mirror isn't what it was");
        let lost = payloads(&journal, self.common());
        assert!(self.lost().starts_with(&lost), "the events that are reported");
        assert!(self.case.rots || lost.len() == self.lost().len());
        outcome
    }

    fn check_told(&self, at: &Divergent) {
        assert_eq!((at.mirror, at.origin), (self.mirror_end(), self.origin.journal().end()));
        assert_eq!(at.common, Some(self.common()));
        // What was set aside is the mirror's alone, too, wherever in front of it the histories part.
        let witness = at.witness.map(|witness| witness.position);
        assert_eq!(witness, self.case.rots.then_some(self.old_end().position));
        assert_eq!(at.orphaned(), Some(self.common()..self.old_end().position));
    }

    fn lost(&self) -> Vec<Vec<u8>> {
        lost_payloads(&self.history[self.case.copied..self.case.mirrored])
    }

    fn check_set_aside(&self) {
        let set_aside = |status: &MirrorStatus| !status.orphans.is_empty();
        let status = self.mirror().wait_until(SOON, set_aside).unwrap();
        let journal = self.caught_up();
        assert_same_bytes(self.origin.journal(), &journal);
        assert_eq!(journal.fork(), None);
        let [orphans] = &status.orphans[..] else { panic!("{:?}", status.orphans) };
        assert_eq!((orphans.from, orphans.end), (self.common(), Some(self.old_end())));
        let copy = open_orphans(&os(), &orphans.dir, self.old_end()).unwrap();
        assert_eq!(payloads(&copy, self.common()), self.lost());
        let kept = used_bytes(&copy);
        assert!(self.before.ends_with(&kept), "what was set aside isn't what there was");
    }

    fn run(mut self) -> Outcome {
        self.live();
        self.replace_origin();
        let mut rng = Rng::with_seed(self.origin.rng.u64(..));
        let batches = self.case.to_regrow(&self.history, &mut rng);
        if self.case.served_first {
            self.meet();
            self.check();
        }
        self.origin.grow(&batches, self.case.reopens);
        match self.case.served_first {
            true => self.mirror().resume(),
            false => self.meet(),
        }
        let outcome = self.check();
        if self.case.is_forked() && !self.case.quarantines {
            // Nor does a restart make it another history, and somebody decides.
            self.restart_mirror(ForkPolicy::Halt);
            self.check();
            if self.case.rots {
                return outcome;
            }
            self.restart_mirror(ForkPolicy::Quarantine);
            self.check_set_aside();
        }
        let more: Vec<_> = (0..3).map(|n| any_batch(1000 + n, &mut rng)).collect();
        self.origin.grow(&more, false);
        assert_same_bytes(self.origin.journal(), &self.caught_up());
        self.mirror.take().unwrap().stop().unwrap();
        outcome
    }
}

fn named_seed() -> Option<u64> {
    std::env::var("HEADWATER_SEED").ok().map(|seed| seed.parse().unwrap())
}

/// Any one of them is run alone with `HEADWATER_SEED=n`.
#[test]
fn s3_whatever_was_lost_and_has_grown_again_a_restored_origin_is_detected_and_the_common_end_exact()
{
    let run = |seed, proxy: &Proxy| {
        let dir = tempfile::tempdir().unwrap();
        Run::new(seed, dir.path(), proxy).run()
    };
    let nowhere = || Proxy::start(NOWHERE.into(), |_| Vec::new());
    if let Some(seed) = named_seed() {
        println!("{:?}", run(seed, &nowhere()));
        return;
    }
    let (first, next) = (fastrand::u64(..u64::MAX / 2), AtomicUsize::new(0));
    let counts = Mutex::new([0; 4]);
    // Most of the time they wait for disks and for each other.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let proxy = nowhere();
                loop {
                    let seed = match next.fetch_add(1, Ordering::Relaxed) as u64 {
                        number if number < CASES => first + number,
                        _ => return,
                    };
                    let run = AssertUnwindSafe(|| run(seed, &proxy));
                    let outcome = catch_unwind(run)
                        .unwrap_or_else(|_| panic!("replay with HEADWATER_SEED={seed}"));
                    counts.lock().unwrap()[outcome as usize] += 1;
                }
            });
        }
    });
    let counts = counts.into_inner().unwrap();
    println!("{counts:?} went on, are behind their mirror, longer, level");
    // Two of the twelve kinds of cases at least end each way.
    assert!(counts.iter().all(|count| *count >= CASES / 24), "{counts:?}");
}
