//! Journals shipped over loopback sockets, with real files at both ends.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::format::files::Mark;
use headwater::fs::os::OsFs;
use headwater::shipping::message::{
    Authentication, Data, ErrorCode, FrameReader, Hello, Message, OriginEnd, PROTOCOL_VERSIONS,
    Subscribe, Subscribed, VersionRange, Welcome,
};
use headwater::shipping::{
    Deadline, Deadlines, FollowOptions, ForkPolicy, Mirror, MirrorState, MirrorStatus, PeerState,
    ServeError, ServeOptions, Server, ShippingError, WaitError, follow, serve,
};
use headwater::{
    Append, Checkpoint, ExpectedRevision, Journal, JournalId, JournalOptions, NewEvent, NodeId,
    Position, Store, StreamId,
};

use crate::descriptors::may_open;
use crate::fault_proxy::{Fault, Proxy, What};
use crate::stalls;

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

/// An origin's store on disk, open and served or not.
pub(crate) struct Origin {
    pub(crate) dir: PathBuf,
    options: JournalOptions,
    store: Option<Store>,
    server: Option<Server>,
    pub(crate) address: SocketAddr,
}

impl Origin {
    pub(crate) fn start(dir: PathBuf, options: JournalOptions) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut origin = Self { dir, options, store: None, server: None, address };
        origin.open();
        origin
    }

    pub(crate) fn open(&mut self) {
        let builder = Store::builder(&self.dir).create_if_missing();
        let store = builder.journal_options(self.options.clone()).open().unwrap();
        let server = serve(store.journal().clone(), self.address, ServeOptions::default()).unwrap();
        self.address = server.local_addr();
        (self.store, self.server) = (Some(store), Some(server));
    }

    pub(crate) fn close(&mut self) {
        self.server.take().unwrap().shutdown();
        self.store.take().unwrap().close().unwrap();
    }

    pub(crate) fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    pub(crate) fn append(&self, range: std::ops::Range<usize>) {
        for number in range {
            self.append_text(&format!("{number}-{}", "x".repeat(number * 37 % 900)));
        }
    }

    pub(crate) fn append_text(&self, text: &str) {
        let to = StreamId::new("s").unwrap();
        let event = NewEvent::raw("test.happened", text.as_bytes()).unwrap();
        self.store().append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
    }

    pub(crate) fn end(&self) -> Position {
        self.store().journal().end().position
    }
}

fn options() -> FollowOptions {
    FollowOptions { journal: small(), ..FollowOptions::default() }
}

pub(crate) fn start_mirror(dir: &Path, origin: &Origin) -> Mirror {
    follow(Arc::new(OsFs), dir, origin.address.to_string(), options()).unwrap()
}

/// The mirror's journal once it is durable up to the origin's present end.
pub(crate) fn converged(mirror: &Mirror, origin: &Origin) -> Journal {
    let journal = mirror.wait_ready(SOON).unwrap();
    let end = origin.store().journal().end();
    let last = Position::new(end.position.get().saturating_sub(1));
    if end.position > Position::START {
        let reached = journal.wait_past(last, SOON);
        assert_eq!(reached, end, "{:?}", mirror.status());
    }
    journal
}

/// Sealed segments whole, active ones up to the durable end.
pub(crate) fn assert_same_bytes(origin: &Journal, mirror: &Journal) {
    assert_eq!(origin.end(), mirror.end());
    let (ours, theirs) = (origin.segments(), mirror.segments());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let used = 4096 + (theirs.end_offset - theirs.base_offset) as usize;
        if ours.sealed && theirs.sealed {
            wait_cut(&ours.path, used);
            wait_cut(&theirs.path, used);
        }
        let (a, b) = (fs::read(&ours.path).unwrap(), fs::read(&theirs.path).unwrap());
        assert!(a[..used] == b[..used], "segment {} differs", ours.number);
    }
    assert!(theirs.len().abs_diff(ours.len()) <= 1);
}

/// The bytes of the segments, up to the end.
pub(crate) fn used_bytes(journal: &Journal) -> Vec<(u64, Vec<u8>)> {
    let used = journal.segments().into_iter().filter(|it| it.end_offset > it.base_offset);
    used.map(|segment| {
        let mut bytes = fs::read(&segment.path).unwrap();
        bytes.truncate(4096 + (segment.end_offset - segment.base_offset) as usize);
        (segment.number, bytes)
    })
    .collect()
}

/// Full segments are cut to their length beside the commits.
fn wait_cut(path: &Path, len: usize) {
    let deadline = Instant::now() + SOON;
    while fs::metadata(path).unwrap().len() != len as u64 {
        assert!(Instant::now() < deadline, "{} was never cut to {len} bytes", path.display());
        std::thread::yield_now();
    }
}

fn halted(mirror: &Mirror) -> ShippingError {
    match mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap().state {
        MirrorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            match fs::copy(entry.path(), target) {
                // Whoever has it open writes some files under another name first.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            }
        }
    }
}

pub(crate) fn replace_dir(dir: &Path, by: &Path) {
    fs::remove_dir_all(dir).unwrap();
    copy_dir(by, dir);
}

pub(crate) fn flip_bit(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn s1_a_mirror_catches_up_across_rolls_then_follows_live_and_is_identical_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..300);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    let journal = converged(&mirror, &origin);
    assert!(origin.store().journal().segments().len() > 5, "the test is meant to roll");
    assert_same_bytes(origin.store().journal(), &journal);
    assert!(mirror.wait_until(SOON, MirrorStatus::is_live).is_ok());
    origin.append(300..500);
    converged(&mirror, &origin);
    assert_same_bytes(origin.store().journal(), &journal);
    assert_eq!(journal.id(), origin.store().journal().id());
    let texts = |journal: &Journal| -> Vec<_> {
        let events = journal.read_all(Position::START).unwrap();
        events.map(|event| event.unwrap().into_data()).collect()
    };
    assert_eq!(texts(&journal), texts(origin.store().journal()));
    mirror.stop().unwrap();
}

#[test]
fn s8_both_sides_report_how_far_the_mirror_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    mirror.report_applied(Position::new(7));
    assert_eq!(mirror.wait_caught_up(SOON).unwrap(), origin.store().journal().end());
    let status = mirror.status();
    assert_eq!((status.lag_events(), status.lag_bytes()), (Some(0), Some(0)));
    let end = origin.store().journal().end();
    let deadline = Instant::now() + SOON;
    let peer = loop {
        let peers = origin.server.as_ref().unwrap().peers();
        match peers.into_iter().find(|peer| peer.acked == Some(end) && peer.applied.is_some()) {
            Some(peer) => break peer,
            None => assert!(Instant::now() < deadline, "never acknowledged"),
        }
        std::thread::yield_now();
    };
    assert_eq!(peer.state, PeerState::Live);
    assert_eq!(peer.sent, Some(end));
    assert_eq!(peer.applied, Some(Position::new(7)));
    assert!(peer.agent.starts_with("headwater/"));
    origin.close();
    let gone = |status: &MirrorStatus| {
        matches!(status.state, MirrorState::Connecting) && status.last_error.is_some()
    };
    let status = mirror.wait_until(SOON, gone).unwrap();
    assert_eq!((status.lag_events(), status.lag_bytes()), (None, None), "unknown is not 0");
    assert_eq!(status.mirrored, Some(end));
}

#[test]
fn either_side_may_be_restarted_at_any_time() {
    let dir = tempfile::tempdir().unwrap();
    let mirror_dir = dir.path().join("mirror");
    let mut origin = Origin::start(dir.path().join("origin"), small());
    let mut mirror = start_mirror(&mirror_dir, &origin);
    for round in 0..6 {
        origin.append(round * 50..round * 50 + 50);
        match round % 3 {
            0 => {
                origin.close();
                origin.open();
            }
            1 => {
                mirror.stop().unwrap();
                origin.append(0..30);
                mirror = start_mirror(&mirror_dir, &origin);
            }
            _ => {
                drop(mirror);
                origin.close();
                mirror = start_mirror(&mirror_dir, &origin);
                origin.open();
            }
        }
        let journal = converged(&mirror, &origin);
        assert_same_bytes(origin.store().journal(), &journal);
    }
    assert!(mirror.status().last_error.is_none_or(|error| !error.is_halting()));
}

/// The mirror has been durable up to 60 events; the origin is put back to 40 and grows to some length.
fn restored(grow: impl Fn(&Origin)) -> (ShippingError, Journal, Journal, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mirror_dir = dir.path().join("mirror");
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..40);
    origin.close();
    copy_dir(&origin.dir, &dir.path().join("backup"));
    origin.open();
    origin.append(40..60);
    let mirror = start_mirror(&mirror_dir, &origin);
    let before = converged(&mirror, &origin).end();
    origin.close();
    replace_dir(&origin.dir, &dir.path().join("backup"));
    // Grown before it is served again: no mirror has seen the steps in between.
    let address = std::mem::replace(&mut origin.address, ([127, 0, 0, 1], 0).into());
    origin.open();
    grow(&origin);
    origin.close();
    origin.address = address;
    origin.open();
    let error = halted(&mirror);
    let journal = mirror.journal().unwrap();
    assert_eq!(journal.end(), before, "the mirror is kept as it was");
    (error, journal, origin.store().journal().clone(), dir)
}

#[test]
fn an_origin_restored_from_an_older_copy_and_still_shorter_is_behind_its_mirror() {
    for grown in [0, 7] {
        let (error, mirror, origin, _dir) = restored(|origin| origin.append(100..100 + grown));
        match error {
            ShippingError::Ahead(at) => {
                assert_eq!((at.mirror, at.origin), (mirror.end(), origin.end()));
                assert_eq!((at.common, at.witness), (Some(Position::new(40)), None));
                assert_eq!(at.orphaned(), Some(Position::new(40)..Position::new(60)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_origin_restored_and_grown_again_to_the_same_length_is_a_fork_even_with_identical_payloads() {
    let (error, mirror, origin, _dir) = restored(|origin| origin.append(40..60));
    assert_eq!(mirror.end().position, origin.end().position);
    assert_eq!(mirror.end().offset, origin.end().offset, "only the incarnation differs");
    assert!(
        matches!(&error, ShippingError::Fork(at) if at.common == Some(Position::new(40))),
        "{error:?}"
    );
}

#[test]
fn an_origin_restored_and_grown_beyond_its_mirror_is_a_fork() {
    for first in [40, 500] {
        let (error, ..) = restored(|origin| origin.append(first..first + 50));
        assert!(matches!(error, ShippingError::Fork(_)), "{error:?}");
        assert!(error.hint().contains("don't delete the mirror"));
        assert!(
            error.to_string().contains("only the mirror has the 20 events from 40 to 59"),
            "{error}"
        );
    }
}

/// Whatever the tail and the regrowth: the mirror is told, says exactly what is orphaned, and with quarantine becomes the
/// new origin, while its old bytes are set aside.
#[test]
fn s4_a_mirror_that_follows_with_quarantine_becomes_its_origin_and_keeps_what_was_lost() {
    for (kept, lost, regrown) in [(40, 20, 0), (40, 20, 20), (0, 30, 50), (25, 1, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let mirror_dir = dir.path().join("mirror");
        let mut origin = Origin::start(dir.path().join("origin"), small());
        origin.append(0..kept);
        origin.close();
        copy_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(kept..kept + lost);
        let mirror = start_mirror(&mirror_dir, &origin);
        let before = converged(&mirror, &origin);
        let old_end = before.end();
        mirror.stop().unwrap();
        origin.close();
        replace_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(kept..kept + regrown);
        let quarantine = FollowOptions { forks: ForkPolicy::Quarantine, ..options() };
        let address = origin.address.to_string();
        let mirror = follow(Arc::new(OsFs), &mirror_dir, address, quarantine).unwrap();
        let told = mirror.wait_until(SOON, |status| !status.orphans.is_empty()).unwrap();
        assert_eq!(told.orphans.len(), 1);
        let orphans = &told.orphans[0];
        assert_eq!(orphans.from.get(), kept as u64);
        assert_eq!(orphans.end, Some(old_end));
        origin.append(900..905);
        mirror.wait_caught_up(SOON).unwrap();
        let journal = converged(&mirror, &origin);
        assert_same_bytes(origin.store().journal(), &journal);
        assert_eq!(journal.fork(), None);
        let fs: Arc<dyn headwater::fs::Fs> = Arc::new(OsFs);
        let (copy, damage) = Journal::open_read_only(&fs, &orphans.dir).unwrap();
        assert_eq!((copy.end(), damage), (old_end, None));
        assert_eq!(copy.read_all(orphans.from).unwrap().count(), lost);
        mirror.stop().unwrap();
    }
}

/// An origin was restored, and a mirror that was to set its tail aside asked it where their histories part. The connection
/// was lost before it had answered: a divergence with an end that isn't known, for which the mirror halted until somebody
/// resumed it, though the next attempt would have found the end. One that halts anyway halts at once.
#[test]
fn s4_a_mirror_with_quarantine_goes_on_when_the_search_for_the_common_end_is_cut_off() {
    /// WELCOME and DIVERGED, with their headers: what the origin says before PROBED.
    const BEFORE_PROBED: usize = 12 + 72 + 12 + 96;
    for what in [What::Cut, What::Vanish] {
        let dir = tempfile::tempdir().unwrap();
        let mut origin = Origin::start(dir.path().join("origin"), small());
        origin.append(0..40);
        origin.close();
        copy_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(40..60);
        let mirrors = ["sets aside", "halts"].map(|name| dir.path().join(name));
        for mirror_dir in &mirrors {
            let mirror = start_mirror(mirror_dir, &origin);
            converged(&mirror, &origin);
            mirror.stop().unwrap();
        }
        origin.close();
        replace_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(70..75);
        let once = move |number| match number {
            0 => vec![Fault { of_origin: true, at: BEFORE_PROBED, what }],
            _ => Vec::new(),
        };
        let silence = Duration::from_millis(400);
        let deadlines = Deadlines { silence, ..Deadlines::default() };
        let start = |mirror_dir: &Path, forks| {
            let proxy = Proxy::start(origin.address, once);
            let options = FollowOptions { forks, deadlines, ..options() };
            let address = proxy.address.to_string();
            (follow(Arc::new(OsFs), mirror_dir, address, options).unwrap(), proxy)
        };
        let (mirror, proxy) = start(&mirrors[0], ForkPolicy::Quarantine);
        let told = mirror.wait_until(SOON, |status| !status.orphans.is_empty());
        let told = told.unwrap_or_else(|error| panic!("{what:?}: {error}"));
        assert_eq!((told.orphans.len(), told.orphans[0].from.get()), (1, 40));
        assert_eq!(proxy.struck(), 1, "the search is meant to be cut off");
        origin.append(80..85);
        assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
        let (mirror, proxy) = start(&mirrors[1], ForkPolicy::Halt);
        match halted(&mirror) {
            ShippingError::Ahead(at) | ShippingError::Fork(at) => assert_eq!(at.common, None),
            other => panic!("{other:?}"),
        }
        assert_eq!((proxy.struck(), mirror.status().reconnects), (1, 0));
    }
}

#[test]
fn a_halted_mirror_says_that_what_it_shows_is_stale() {
    let (error, mirror, _, _dir) = restored(|origin| origin.append(40..45));
    let ShippingError::Ahead(at) = error else { panic!("{error:?}") };
    assert_eq!(mirror.fork().unwrap().common, at.common);
    assert_eq!(mirror.read_all(Position::START).unwrap().count(), 60, "it is served all the same");
}

#[test]
fn a_mirror_begins_with_a_backup_and_fetches_only_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..80);
    let backup = dir.path().join("backup");
    let report = origin.store().journal().backup(&backup).unwrap();
    let plan = forget_all(&origin);
    assert!(plan.target > Position::START, "the origin is meant to lack the beginning");
    origin.append(80..100);
    let begin = FollowOptions { begin_with: Some(backup), ..options() };
    let address = origin.address.to_string();
    for _ in 0..2 {
        let mirror =
            follow(Arc::new(OsFs), &dir.path().join("mirror"), address.clone(), begin.clone());
        let mirror = mirror.unwrap();
        let journal = converged(&mirror, &origin);
        assert_eq!(journal.start().position, Position::START);
        assert!(journal.end().position > report.end.position);
        assert_eq!(journal.read_all(Position::START).unwrap().count(), 100);
        mirror.stop().unwrap();
    }
}

#[test]
fn a_mirror_is_served_like_an_origin() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..60);
    let first = start_mirror(&dir.path().join("first"), &origin);
    let journal = converged(&first, &origin);
    let server = serve(journal, "127.0.0.1:0", ServeOptions::default()).unwrap();
    let second = dir.path().join("second");
    let address = server.local_addr().to_string();
    let second = follow(Arc::new(OsFs), &second, address, options()).unwrap();
    origin.append(60..90);
    assert_same_bytes(origin.store().journal(), &converged(&second, &origin));
}

#[test]
fn a_halted_mirror_goes_on_once_the_right_history_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let mirror_dir = dir.path().join("mirror");
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..30);
    origin.close();
    copy_dir(&origin.dir, &dir.path().join("older"));
    origin.open();
    origin.append(30..60);
    let mirror = start_mirror(&mirror_dir, &origin);
    converged(&mirror, &origin);
    origin.close();
    copy_dir(&origin.dir, &dir.path().join("newest"));
    replace_dir(&origin.dir, &dir.path().join("older"));
    origin.open();
    assert!(matches!(halted(&mirror), ShippingError::Ahead(_)));
    assert!(matches!(mirror.wait_caught_up(SOON), Err(WaitError::Halted(_))));
    origin.close();
    replace_dir(&origin.dir, &dir.path().join("newest"));
    origin.open();
    mirror.resume();
    origin.append(60..70);
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}

#[test]
fn a_mirror_refuses_another_journal_at_the_same_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..5);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    let mirrored = converged(&mirror, &origin).id();
    origin.close();
    let mut other = Origin { dir: dir.path().join("other"), store: None, server: None, ..origin };
    other.open();
    other.append(0..50);
    match halted(&mirror) {
        ShippingError::Foreign { mirror, origin } => {
            assert_eq!((mirror, origin), (mirrored, other.store().journal().id()));
        }
        other => panic!("{other:?}"),
    }
}

/// A mirror whose last batch rots while it is closed.
fn mirror_with_a_damaged_tail(mirror_dir: &Path, origin: &Origin) {
    let mirror = start_mirror(mirror_dir, origin);
    let journal = converged(&mirror, origin);
    mirror.stop().unwrap();
    damage_tail(&journal);
}

/// Flips a bit in the last batch of a journal that is closed.
pub(crate) fn damage_tail(journal: &Journal) {
    let last = journal.segments().into_iter().rfind(|s| s.end_offset > s.base_offset).unwrap();
    flip_bit(&last.path, 4096 + last.end_offset - last.base_offset - 70);
}

#[test]
fn s6_a_mirror_sets_a_damaged_tail_aside_and_fetches_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..50);
    let mirror_dir = dir.path().join("mirror");
    mirror_with_a_damaged_tail(&mirror_dir, &origin);
    let mirror = start_mirror(&mirror_dir, &origin);
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}

#[test]
fn a_replaced_origin_is_detected_by_what_the_mirror_had_set_aside() {
    for (grown, ahead) in [(0, true), (60, false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut origin = Origin::start(dir.path().join("origin"), small());
        origin.append(0..20);
        origin.close();
        copy_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        // In one batch, so that what is left of the mirror is in the backup too.
        let to = StreamId::new("s").unwrap();
        let events = (0..9).map(|_| NewEvent::raw("test.happened", *b"lost").unwrap());
        let append = Append::to(&to, ExpectedRevision::Any, events);
        origin.store().append(&append).unwrap();
        let mirror_dir = dir.path().join("mirror");
        mirror_with_a_damaged_tail(&mirror_dir, &origin);
        origin.close();
        replace_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(0..grown);
        let mirror = start_mirror(&mirror_dir, &origin);
        match halted(&mirror) {
            ShippingError::Ahead(at) if ahead => {
                assert_eq!(at.witness.unwrap().position, Position::new(29));
                assert_eq!(at.mirror.position, Position::new(20));
            }
            ShippingError::Fork(at) if !ahead => {
                assert_eq!(at.witness.unwrap().position, Position::new(29));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(mirror.journal().unwrap().end().position, Position::new(20));
    }
}

/// What a mirror has set aside goes on from what it still holds: if that is lost at its origin, it is lost, too.
#[test]
fn what_a_mirror_has_set_aside_is_counted_as_orphaned_also_if_the_histories_part_in_front_of_it() {
    for (grown, ahead) in [(0, true), (60, false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut origin = Origin::start(dir.path().join("origin"), small());
        origin.append(0..10);
        origin.close();
        copy_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(10..21);
        let mirror_dir = dir.path().join("mirror");
        mirror_with_a_damaged_tail(&mirror_dir, &origin);
        origin.close();
        replace_dir(&origin.dir, &dir.path().join("backup"));
        origin.open();
        origin.append(100..100 + grown);
        let mirror = start_mirror(&mirror_dir, &origin);
        let at = match halted(&mirror) {
            ShippingError::Ahead(at) if ahead => at,
            ShippingError::Fork(at) if !ahead => at,
            other => panic!("{other:?}"),
        };
        let held = mirror.journal().unwrap().end().position;
        assert_eq!((at.mirror.position, at.common), (held, Some(Position::new(10))));
        assert!(held < Position::new(21), "nothing was set aside");
        assert_eq!(at.orphaned(), Some(Position::new(10)..Position::new(21)), "{at}");
    }
}

#[test]
fn s6_bit_rot_at_the_origin_is_reported_with_its_position_and_nothing_behind_it_is_shipped() {
    let dir = tempfile::tempdir().unwrap();
    // What was appended last would be sent from memory.
    let from_disk = JournalOptions { recent_bytes_max: 0, ..small() };
    let origin = Origin::start(dir.path().join("origin"), from_disk);
    origin.append(0..200);
    let segments = origin.store().journal().segments();
    flip_bit(&segments[3].path, 4096 + 200);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    match halted(&mirror) {
        ShippingError::Reported { failure } => {
            assert_eq!(failure.code, ErrorCode::CORRUPT);
            assert_eq!(failure.position, Some(segments[3].base_position));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(mirror.journal().unwrap().end().position, segments[3].base_position);
    flip_bit(&segments[3].path, 4096 + 200);
    mirror.resume();
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}

#[test]
fn batches_longer_than_a_frame_arrive_whole() {
    let dir = tempfile::tempdir().unwrap();
    let large = JournalOptions {
        batch_bytes_max: 8 << 20,
        group_bytes_max: 8 << 20,
        segment_bytes_first: 16 << 20,
        segment_bytes_max: 16 << 20,
        ..JournalOptions::default()
    };
    let origin = Origin::start(dir.path().join("origin"), large.clone());
    let follow_options = FollowOptions {
        journal: large,
        window_bytes: 1 << 20, // smaller than a batch
        ..FollowOptions::default()
    };
    let address = origin.address.to_string();
    let mirror =
        follow(Arc::new(OsFs), &dir.path().join("mirror"), address, follow_options).unwrap();
    let to = StreamId::new("s").unwrap();
    for batch in 0..4_u8 {
        let events = (0..6).map(|_| NewEvent::raw("test.large", vec![batch; 1_000_000]).unwrap());
        origin.store().append(&Append::to(&to, ExpectedRevision::Any, events)).unwrap();
        origin.append_text("small");
    }
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}

#[test]
fn a_name_is_resolved_and_the_origin_found_on_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..3);
    let address = format!("localhost:{}", origin.address.port());
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options()).unwrap();
    converged(&mirror, &origin);
}

#[test]
fn without_encryption_only_loopback_is_served_and_followed_unless_allowed_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    let journal = origin.store().journal().clone();
    match serve(journal.clone(), "0.0.0.0:0", ServeOptions::default()) {
        Err(ServeError::Plaintext { address }) => assert_eq!(address.ip().to_string(), "0.0.0.0"),
        other => panic!("{other:?}"),
    }
    let allowed = ServeOptions { allow_plaintext_off_loopback: true, ..ServeOptions::default() };
    serve(journal, "0.0.0.0:0", allowed).unwrap().shutdown();
    let mirror_dir = dir.path().join("mirror");
    match follow(Arc::new(OsFs), &mirror_dir, "192.0.2.7:4000", options()) {
        Err(error @ ShippingError::Plaintext { .. }) => {
            assert!(error.to_string().contains("192.0.2.7:4000"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!mirror_dir.exists());
}

#[test]
fn a_directory_that_is_an_origin_is_not_followed_into() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..3);
    origin.close();
    let into = origin.dir.join("journal");
    match follow(Arc::new(OsFs), &into, origin.address.to_string(), options()) {
        Err(error @ ShippingError::Open(_)) => assert!(error.is_halting()),
        other => panic!("{other:?}"),
    }
}

/// What a server says to these bytes before it closes.
fn answer_to(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer
}

fn error_in(answer: &[u8]) -> Option<ErrorCode> {
    let mut reader = FrameReader::new();
    reader.allow_data(1 << 20);
    reader.push(answer);
    while let Ok(Some(message)) = reader.next_message() {
        if let Message::Error(failure) = message {
            return Some(failure.code);
        }
    }
    None
}

fn hello(versions: VersionRange) -> Vec<u8> {
    let mut out = Vec::new();
    let (nonce, agent, authentication) = ([1; 16], "test".to_owned(), Authentication::None);
    let (features, max_frame, node) = (0, 1 << 20, None);
    let hello = Hello { versions, features, max_frame, node, nonce, authentication, agent };
    Message::Hello(hello).encode(&mut out);
    out
}

#[test]
fn s7_hostile_bytes_are_answered_with_an_error_and_a_closed_connection() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    assert_eq!(error_in(&answer_to(origin.address, http)), Some(ErrorCode::FRAME_TOO_LONG));
    assert_eq!(error_in(&answer_to(origin.address, &[0xFF; 64])), Some(ErrorCode::FRAME_TOO_LONG));
    assert_eq!(error_in(&answer_to(origin.address, &[0; 64])), Some(ErrorCode::PROTOCOL));
    let mut damaged = hello(PROTOCOL_VERSIONS);
    damaged[20] ^= 1;
    assert_eq!(error_in(&answer_to(origin.address, &damaged)), Some(ErrorCode::PROTOCOL));
    let twice = [hello(PROTOCOL_VERSIONS), hello(PROTOCOL_VERSIONS)].concat();
    assert_eq!(error_in(&answer_to(origin.address, &twice)), Some(ErrorCode::PROTOCOL));
    let future = hello(VersionRange { min: 90, max: 99 });
    assert_eq!(error_in(&answer_to(origin.address, &future)), Some(ErrorCode::VERSION));
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
}

#[test]
fn s7_a_peer_that_dribbles_is_cut_off_after_the_handshake_deadline_and_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let mut dribbler = TcpStream::connect(origin.address).unwrap();
    dribbler.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
    let started = Instant::now();
    let (mut answer, mut buffer) = (Vec::new(), [0; 256]);
    for byte in hello(PROTOCOL_VERSIONS).iter().cycle() {
        assert!(started.elapsed() < SOON, "still served");
        // The pace of the dribble; once the server has closed, writing fails or reading ends.
        match dribbler.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => answer.extend_from_slice(&buffer[..len]),
            Err(_) if !answer.is_empty() => break,
            Err(_) => {}
        }
        drop(dribbler.write_all(&[*byte]));
        if answer.is_empty() && started.elapsed() < Duration::from_millis(2500) {
            continue;
        }
    }
    assert_eq!(error_in(&answer), Some(ErrorCode::TIMEOUT));
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
}

#[test]
fn a_peer_too_many_is_turned_away_and_comes_in_later() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let options = ServeOptions { handshakes_max: 3, ..ServeOptions::default() };
    let server = serve(origin.store().journal().clone(), "127.0.0.1:0", options).unwrap();
    let idle: Vec<_> = (0..3).map(|_| TcpStream::connect(server.local_addr()).unwrap()).collect();
    assert_eq!(error_in(&answer_to(server.local_addr(), b"")), Some(ErrorCode::TOO_MANY));
    let address = server.local_addr().to_string();
    let mirror =
        follow(Arc::new(OsFs), &dir.path().join("mirror"), address, self::options()).unwrap();
    drop(idle);
    converged(&mirror, &origin);
}

/// A subscriber to everything that reads no more than the first byte, which says that it was let in.
fn never_reads(server: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(server.local_addr()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut said = hello(PROTOCOL_VERSIONS);
    let all = Subscribe { from: None, witness: None, window_bytes: u32::MAX };
    Message::Subscribe(all).encode(&mut said);
    stream.write_all(&said).unwrap();
    stream.read_exact(&mut [0]).unwrap();
    stream
}

/// What is committed is in a mirror before the subscribers have read it, those who never did and one who was live; and they
/// are cut off, as they take nothing, or as they say nothing.
#[test]
fn s7_a_subscriber_that_never_reads_delays_nobody_and_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), stalls::large());
    let serve_with =
        |options| serve(origin.store().journal().clone(), "127.0.0.1:0", options).unwrap();
    let server = serve_with(stalls::patient());
    let start = |name| {
        let (path, address) = (dir.path().join(name), server.local_addr().to_string());
        let large = FollowOptions { journal: stalls::large(), ..options() };
        follow(Arc::new(OsFs), &path, address, large).unwrap()
    };
    let mirror = start("mirror");
    let mut stalled = vec![never_reads(&server)];
    for _ in 0..stalls::EVENTS {
        origin.append_text(&"x".repeat(stalls::EVENT_BYTES));
        converged(&mirror, &origin);
    }
    stalled.extend((0..stalls::STALLED).map(|_| never_reads(&server)));
    let addresses: Vec<_> = stalled.iter().map(|it| it.local_addr().unwrap()).collect();
    stalls::assert_delay_nobody(&server, &addresses, || {
        origin.append_text("more");
        converged(&mirror, &origin);
    });
    converged(&start("late"), &origin);
    let deadlines = Deadlines { silence: Duration::from_millis(400), ..Deadlines::default() };
    for options in [stalls::impatient(), ServeOptions { deadlines, ..stalls::patient() }] {
        let server = serve_with(options);
        let stalled = never_reads(&server);
        stalls::wait_cut_off(&server, stalled.local_addr().unwrap());
    }
}

#[test]
fn a_thousand_connections_that_come_and_go_leave_the_origin_serving() {
    if !may_open(2000) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    for number in 0..1000 {
        let stream = TcpStream::connect(origin.address);
        let mut stream = stream.unwrap_or_else(|error| panic!("connection {number}: {error}"));
        if number % 3 == 0 {
            // One too many may be gone already.
            drop(stream.write_all(&hello(PROTOCOL_VERSIONS)[..number % 70]));
        }
    }
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
}

#[test]
fn shutting_down_is_prompt_and_the_mirror_finds_the_next_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
    let started = Instant::now();
    origin.close();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(TcpStream::connect(origin.address).is_err(), "nobody listens any more");
    let started = Instant::now();
    origin.open();
    origin.append(10..20);
    converged(&mirror, &origin);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(mirror.status().reconnects >= 1);
    let started = Instant::now();
    mirror.stop().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn a_mirror_that_waits_for_an_absent_origin_stops_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mirror =
        follow(Arc::new(OsFs), &dir.path().join("mirror"), unused.to_string(), options()).unwrap();
    match mirror.wait_ready(Duration::from_millis(300)) {
        Err(WaitError::Timeout { last_error: Some(ShippingError::Connect { address, .. }) }) => {
            assert_eq!(address, unused);
        }
        other => panic!("{other:?}"),
    }
    let started = Instant::now();
    mirror.stop().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
}

/// A proxy that flips a bit in what the origin says, or cuts it off, on so many connections.
pub(crate) fn faulty_proxy(origin: SocketAddr, seed: u64, faults: usize) -> SocketAddr {
    let mut rng = fastrand::Rng::with_seed(seed);
    let proxy = Proxy::start(origin, move |number| {
        let (at, cut, bit) = (rng.usize(..60_000), rng.bool(), rng.u8(..8));
        let what = if cut { What::Cut } else { What::Flip(bit) };
        let fault = Fault { of_origin: true, at, what };
        if number < faults { vec![fault] } else { Vec::new() }
    });
    proxy.address
}

#[test]
fn s6_flipped_bits_and_cut_connections_on_the_way_heal_and_never_reach_the_mirror() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..400);
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (origin, dir) = (&origin, dir.path().join(format!("mirror-{seed}")));
            scope.spawn(move || {
                println!("seed {seed}");
                let through = faulty_proxy(origin.address, seed, 5).to_string();
                let mirror = follow(Arc::new(OsFs), &dir, through, options()).unwrap();
                let journal = converged(&mirror, origin);
                assert_same_bytes(origin.store().journal(), &journal);
            });
        }
    });
}

#[test]
fn s6_a_flipped_bit_in_what_the_mirror_says_heals_wherever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    // HELLO: its length (beyond what is allowed, and within), type, flags, checksum, magic, versions.
    for at in [1, 0, 4, 5, 8, 12, 18] {
        let fault = Fault { of_origin: false, at, what: What::Flip(5) };
        let through = Proxy::start(origin.address, move |number| match number {
            0 => vec![fault],
            _ => Vec::new(),
        });
        let through = through.address;
        let mirror = dir.path().join(format!("mirror-{at}"));
        let mirror = follow(Arc::new(OsFs), &mirror, through.to_string(), options()).unwrap();
        assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
    }
}

#[test]
fn what_was_committed_reaches_a_live_mirror_without_waiting_for_a_timer() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    let journal = mirror.wait_ready(SOON).unwrap();
    let mut times: Vec<_> = (0..60)
        .map(|number| {
            origin.append(number..number + 1);
            let started = Instant::now();
            let end = journal.wait_past(Position::new(number as u64), SOON);
            assert_eq!(end.position, origin.end());
            started.elapsed()
        })
        .collect();
    times.sort();
    println!("from acknowledged to durable in the mirror: median {:?}", times[30]);
    assert!(times[30] < Duration::from_millis(100), "{times:?}");
}

#[test]
fn several_mirrors_follow_one_origin_under_concurrent_appends() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    let mirrors: Vec<_> =
        (0..4).map(|n| start_mirror(&dir.path().join(format!("m{n}")), &origin)).collect();
    std::thread::scope(|scope| {
        (0..4).for_each(|_| {
            scope.spawn(|| origin.append(0..100));
        });
    });
    assert_eq!(origin.end(), Position::new(400));
    for mirror in &mirrors {
        assert_same_bytes(origin.store().journal(), &converged(mirror, &origin));
    }
}

/// Answers HELLO and SUBSCRIBE as an origin with an empty journal would, then sends `then`, and stays.
fn false_origin(then: fn(&mut Vec<u8>)) -> SocketAddr {
    false_origin_at(Mark::start(JournalId::from_bytes([7; 16])).end, then)
}

/// The same, of a journal that is durable up to `end`.
pub(crate) fn false_origin_at(
    end: Checkpoint,
    then: impl Fn(&mut Vec<u8>) + Clone + Send + 'static,
) -> SocketAddr {
    false_origin_of(end, Vec::new(), then)
}

/// The same, or a relay, if the journal comes through several nodes.
pub(crate) fn false_origin_of(
    end: Checkpoint,
    path: Vec<NodeId>,
    then: impl Fn(&mut Vec<u8>) + Clone + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (then, path) = (then.clone(), path.clone());
            std::thread::spawn(move || answer_falsely(&stream, end, &path, then));
        }
    });
    address
}

fn answer_falsely(
    mut stream: &TcpStream,
    end: Checkpoint,
    path: &[NodeId],
    then: impl Fn(&mut Vec<u8>),
) -> Option<()> {
    let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
    loop {
        let len = stream.read(&mut buffer).ok().filter(|&len| len > 0)?;
        reader.push(&buffer[..len]);
        while let Some(message) = reader.next_message().ok()? {
            let mut out = Vec::new();
            match message {
                Message::Hello(hello) => Message::Welcome(Welcome {
                    version: 1,
                    heartbeat_ms: 1000,
                    max_frame: 8192,
                    features: 0,
                    node: NodeId::from_bytes([9; 16]),
                    session: [1; 16],
                    nonce: hello.nonce,
                    now_us: 0,
                })
                .encode(&mut out),
                Message::Subscribe(_) => {
                    let first_position = Position::START;
                    let path = path.to_vec();
                    Message::Subscribed(Subscribed { end, first_position, path }).encode(&mut out);
                    then(&mut out);
                }
                _ => {}
            }
            stream.write_all(&out).ok()?;
        }
    }
}

#[test]
fn bytes_that_are_refused_again_and_again_halt_the_mirror() {
    let address = false_origin(|out| {
        let mut bytes = [0xB7; 128];
        bytes[60..64].copy_from_slice(&128_u32.to_le_bytes());
        let origin_end = OriginEnd { offset: 128, position: Position::new(1) };
        Message::Data(Data { offset: 0, origin_end, continued: false, bytes: &bytes }).encode(out);
    });
    let dir = tempfile::tempdir().unwrap();
    let mirror =
        follow(Arc::new(OsFs), &dir.path().join("mirror"), address.to_string(), options()).unwrap();
    match halted(&mirror) {
        ShippingError::Refused { position, .. } => assert_eq!(position, Position::START),
        other => panic!("{other:?}"),
    }
    assert_eq!(mirror.status().reconnects, 2, "damage on the way would have healed");
    assert_eq!(mirror.journal().unwrap().end().position, Position::START);
}

#[test]
fn an_origin_that_falls_silent_is_given_up_and_tried_again() {
    let address = false_origin(|_| {});
    let dir = tempfile::tempdir().unwrap();
    let deadlines = Deadlines {
        handshake: Duration::from_millis(400),
        silence: Duration::from_millis(400),
        heartbeat: Duration::from_millis(100),
    };
    let options = FollowOptions { deadlines, ..options() };
    let address = address.to_string();
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options).unwrap();
    let status = mirror.wait_until(SOON, |status| status.reconnects >= 2).unwrap();
    assert!(
        matches!(status.last_error, Some(ShippingError::Timeout(Deadline::Silence))),
        "{status:?}"
    );
}

#[test]
fn a_service_that_accepts_and_says_nothing_is_given_up_and_tried_again() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let deadlines = Deadlines { handshake: Duration::from_millis(300), ..Deadlines::default() };
    let options = FollowOptions { deadlines, ..options() };
    let address = silent.local_addr().unwrap().to_string();
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options).unwrap();
    let timed_out = |status: &MirrorStatus| {
        matches!(status.last_error, Some(ShippingError::Timeout(Deadline::Handshake)))
    };
    mirror.wait_until(SOON, timed_out).unwrap();
    let first = silent.accept().unwrap();
    let again = silent.accept().unwrap();
    assert_ne!(first.1, again.1);
}

/// Everything a mirror sent is answered by another service's greeting.
#[test]
fn another_service_at_the_address_is_not_taken_for_an_origin() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut stream in other.incoming().map_while(Result::ok) {
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"));
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let mirror = follow(Arc::new(OsFs), &dir.path().join("mirror"), address, options()).unwrap();
    let violated = |status: &MirrorStatus| {
        matches!(status.last_error, Some(ShippingError::Violation(_) | ShippingError::Disconnected))
    };
    let status = mirror.wait_until(SOON, violated).unwrap();
    assert!(!status.is_halted());
    assert!(mirror.journal().is_none());
}

/// Removes as many of the origin's segments as can be, and forgets them.
pub(crate) fn forget_all(origin: &Origin) -> headwater::retention::Plan {
    use headwater::retention::{History, Options, Until};
    let options = Options::new(Until::Position(origin.end()));
    let target = origin.store().plan_retention(&options).unwrap().target;
    origin.store().retain(&options.history(History::Forget(target))).unwrap()
}

#[test]
fn a_mirror_holds_back_what_it_lacks_also_after_a_restart() {
    use headwater::retention::{Holder, Options, Until};
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..100);
    let path = dir.path().join("mirror");
    let mirror = start_mirror(&path, &origin);
    converged(&mirror, &origin);
    mirror.stop().unwrap();
    // It comes back, now with an id, and is told that it has everything.
    let mirror = start_mirror(&path, &origin);
    converged(&mirror, &origin);
    assert!(mirror.wait_until(SOON, MirrorStatus::is_live).is_ok());
    mirror.stop().unwrap();
    let had = origin.end();
    origin.close();
    origin.open();
    origin.append(100..300);
    let options = Options::new(Until::Position(origin.end()));
    let plan = origin.store().plan_retention(&options).unwrap();
    let blocker = plan.blocker.unwrap();
    assert!(matches!(blocker.holder, Holder::Mirror { node: Some(_), .. }), "{}", blocker.holder);
    assert!(blocker.position.unwrap() <= had && plan.target <= had);
    assert_eq!(plan.gates.len(), 1, "the lease without an id was taken over: {:?}", plan.gates);
    // One that is silent for too long, or too far behind, or on a full disk, holds nothing back.
    for options in [
        Options { lease_age_max: Duration::ZERO, ..options.clone() },
        Options { lease_bytes_max: 1, ..options.clone() },
        Options { lease_free_bytes_min: Some(u64::MAX), ..options.clone() },
    ] {
        let plan = origin.store().plan_retention(&options).unwrap();
        assert!(plan.target > had && plan.gates[0].passed_over);
    }
    // What it needs is left to it.
    let done = forget_all(&origin);
    assert!(done.target > Position::START && done.target <= had);
    let mirror = start_mirror(&path, &origin);
    let journal = converged(&mirror, &origin);
    assert_eq!(journal.end(), origin.store().journal().end());
    assert_eq!(journal.read_all(Position::START).unwrap().count(), 300);
    mirror.stop().unwrap();
    // A file that can't be understood holds back everything.
    let leases = origin.dir.join("journal/leases");
    origin.close();
    flip_bit(&leases, 40);
    origin.open();
    let plan = origin.store().plan_retention(&options).unwrap();
    assert!(plan.removals.is_empty());
    let blocker = plan.blocker.unwrap();
    assert!(matches!(blocker.holder, Holder::UnknownMirrors { .. }), "{}", blocker.holder);
}

#[test]
fn a_mirror_that_begins_behind_a_removal_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..200);
    let first = forget_all(&origin).target;
    assert!(first > Position::START);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    let error = halted(&mirror);
    assert!(
        matches!(error, ShippingError::Truncated { mirror: Position::START, first: at, .. } if at == first),
        "{error}"
    );
    assert_eq!(error.code(), "shipping.truncated");
    mirror.stop().unwrap();
}

#[test]
fn a_mirror_that_lacks_what_was_removed_is_told_and_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..100);
    let path = dir.path().join("mirror");
    let mirror = start_mirror(&path, &origin);
    let end = converged(&mirror, &origin).end();
    mirror.stop().unwrap();
    origin.append(100..300);
    fs::remove_file(origin.dir.join("journal/leases")).unwrap();
    let plan = {
        use headwater::retention::{History, Options, Until};
        let mut options = Options::new(Until::Position(origin.end()));
        options.lease_bytes_max = 1;
        let target = origin.store().plan_retention(&options).unwrap().target;
        origin.store().retain(&options.history(History::Forget(target))).unwrap()
    };
    assert!(plan.target > end.position);
    let mirror = start_mirror(&path, &origin);
    let error = halted(&mirror);
    let told = matches!(error, ShippingError::Truncated { mirror, first, .. } if mirror == end.position && first == plan.target);
    assert!(told, "{error}");
    assert_eq!(mirror.journal().unwrap().end(), end);
    mirror.stop().unwrap();
}

#[test]
fn a_closed_mirror_is_trimmed_and_goes_on_following() {
    use headwater::retention::{self, History, Options, Until};
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..200);
    let path = dir.path().join("mirror");
    let mirror = start_mirror(&path, &origin);
    let end = converged(&mirror, &origin).end();
    mirror.stop().unwrap();
    let os: Arc<dyn headwater::fs::Fs> = Arc::new(OsFs);
    let options = Options::new(Until::Position(end.position));
    let target = retention::plan(&os, &path, &options).unwrap().target;
    let options = options.history(History::Forget(target));
    assert!(!retention::apply(&os, &path, &options).unwrap().removals.is_empty());
    origin.append(200..300);
    let mirror = start_mirror(&path, &origin);
    let journal = converged(&mirror, &origin);
    assert_eq!(journal.start().position, target);
    assert_eq!(journal.read_all(target).unwrap().count() as u64, 300 - target.get());
    mirror.stop().unwrap();
    assert!(headwater::verify_deep(&OsFs, &path, &mut |_| {}).unwrap().is_healthy());
}

/// Writes down at which positions it has reacted.
#[derive(Clone, Default)]
struct Positions(Arc<std::sync::Mutex<Vec<u64>>>);

impl headwater::reactor::Reactor for Positions {
    const NAME: &'static str = "positions";
    type Event = Vec<u8>;

    fn react(
        &self,
        event: &headwater::Recorded<Vec<u8>>,
        _: &headwater::reactor::IdempotencyKey,
    ) -> Result<(), headwater::reactor::ReactError> {
        self.0.lock().unwrap().push(event.position().get());
        Ok(())
    }
}

/// A mirror that had to be fetched again is behind what was reacted to, for a while: nothing is done twice.
#[test]
fn a_reactor_of_a_mirror_waits_until_the_mirror_is_where_it_was() {
    use headwater::reactor::{ReactorOptions, ReactorState, Start};

    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let here = dir.path().join("here");
    let mirrored = here.join("mirrors/peer/journal");
    let recorder = Positions::default();
    let older = dir.path().join("older");
    let follow_peer = |origin: &Origin| {
        let store = Store::builder(&here).create_if_missing().open().unwrap();
        let mirror = store.mirror_with("peer", origin.address.to_string(), options()).unwrap();
        (store, mirror)
    };
    let react = |store: &Store, journal: &Journal| {
        store.react_to(journal, recorder.clone(), ReactorOptions::new(Start::Beginning)).unwrap()
    };
    {
        let (store, mirror) = follow_peer(&origin);
        drop(converged(&mirror, &origin));
        mirror.stop().unwrap();
        drop(store);
        copy_dir(&mirrored, &older);
        let (store, mirror) = follow_peer(&origin);
        origin.append(10..20);
        let journal = converged(&mirror, &origin);
        let reactor = react(&store, &journal);
        assert!(reactor.wait_reacted(origin.end(), SOON));
        reactor.close().unwrap();
        mirror.stop().unwrap();
    }
    fs::remove_dir_all(&mirrored).unwrap();
    copy_dir(&older, &mirrored);
    origin.close();
    let (store, mirror) = follow_peer(&origin);
    let journal = mirror.wait_ready(SOON).unwrap();
    assert_eq!(journal.end().position, Position::new(10));
    let reactor = react(&store, &journal);
    assert!(!reactor.wait_stopped(Duration::from_millis(100)));
    assert!(matches!(reactor.status().state, ReactorState::AwaitingMirror));
    origin.open();
    origin.append(20..25);
    converged(&mirror, &origin);
    assert!(reactor.wait_reacted(origin.end(), SOON));
    assert_eq!(*recorder.0.lock().unwrap(), (0..25).collect::<Vec<_>>());
    assert!(matches!(reactor.status().state, ReactorState::Running));
}
