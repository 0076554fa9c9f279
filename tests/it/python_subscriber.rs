//! `examples/python/follow_journal.py`, which was written from `docs/protocol.md` alone, follows our origins.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use headwater::format::batch::{BatchHeader, body_digest, genesis, padded_len};
use headwater::format::crc32;
use headwater::format::files::Mark;
use headwater::format::record;
use headwater::format::segment::SegmentHeader;
use headwater::fs::os::OsFs;
use headwater::shipping::message::{Ack, Data, Heartbeat, Message, OriginEnd, Speaker};
use headwater::{
    Checkpoint, EventId, Incarnation, JournalId, JournalOptions, NewEvent, Position, Revision,
    StreamId,
};
use serde_json::Value;

use crate::fault_proxy::{Fault, Proxy, What};
use crate::shipping::{
    Origin, assert_same_bytes, converged, copy_dir, false_origin_at, faulty_proxy, flip_bit,
    forget_all, replace_dir, small, start_mirror,
};

const DONE: i32 = 0;
const DAMAGE: i32 = 3;
const FORK: i32 = 4;
const AHEAD: i32 = 5;
const FOREIGN: i32 = 6;
const TRUNCATED: i32 = 7;
const CORRUPT: i32 = 8;

/// Nothing here takes more attempts than this.
const RETRIES_MAX: usize = 20;

/// Without Python there is nothing to be tested; where everything must be tested, that is a failure.
fn have_python() -> bool {
    let found =
        Command::new("python3").arg("--version").output().is_ok_and(|run| run.status.success());
    assert!(found || std::env::var_os("CI").is_none(), "python3 is not installed");
    if !found {
        println!("skipped: python3 is not installed");
    }
    found
}

/// The script, following; what it says is read line by line.
struct Follower {
    child: Child,
    says: BufReader<ChildStdout>,
    retries: usize,
}

impl Follower {
    fn start(address: SocketAddr, mirror: &Path, arguments: &[&str]) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/python/follow_journal.py");
        let mut child = Command::new("python3")
            .args(["-B", script, &address.to_string(), "--json", "--mirror"])
            .arg(mirror)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stdout.take().unwrap());
        Self { child, says, retries: 0 }
    }

    /// Follows until it has everything that the origin has.
    fn until(origin: &Origin, mirror: &Path) -> Ended {
        Self::start(origin.address, mirror, &["--until", &origin.end().to_string()]).ended()
    }

    fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        self.retries += usize::from(line.contains(r#""kind": "retry""#));
        assert!(self.retries <= RETRIES_MAX, "it tries again and again: {line}");
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    /// What it says up to the next of a kind, which is included.
    fn hear_until(&mut self, kind: &str) -> Value {
        while let Some(said) = self.hear() {
            if said["kind"] == kind {
                return said;
            }
        }
        panic!("it has ended without saying {kind}");
    }

    /// What it says in the end.
    fn ended(mut self) -> Ended {
        let said: Vec<_> = std::iter::from_fn(|| self.hear()).collect();
        Ended { exit_code: self.child.wait().unwrap().code().unwrap(), said }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.child.kill()); // SIGKILL
        drop(self.child.wait());
    }
}

#[derive(Debug)]
struct Ended {
    exit_code: i32,
    said: Vec<Value>,
}

impl Ended {
    fn assert(self, exit_code: i32) -> Self {
        assert_eq!(self.exit_code, exit_code, "{:#?}", self.said);
        self
    }

    fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.said.iter().filter(move |said| said["kind"] == kind)
    }
}

/// Names and bytes of a mirror's segments.
fn segments(mirror: &Path) -> Vec<(String, Vec<u8>)> {
    let mut segments: Vec<_> = fs::read_dir(mirror)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .filter(|(name, _)| name.ends_with(".seg"))
        .map(|(name, path)| (name, fs::read(path).unwrap()))
        .collect();
    segments.sort();
    segments
}

/// The mirror has all that the origin has, byte for byte; the library reads it, finds it sound, and goes on with it.
fn assert_mirrors(origin: &Origin, mirror: &Path) {
    let deep = headwater::verify_deep(&OsFs, mirror, &mut |_| {}).unwrap();
    assert!(deep.is_healthy(), "{deep:?}");
    for (segment, (name, bytes)) in origin.store().journal().segments().iter().zip(segments(mirror))
    {
        assert_eq!(segment.path.file_name().unwrap().to_str(), Some(name.as_str()));
        let used = 4096 + (segment.end_offset - segment.base_offset) as usize;
        assert!(bytes == fs::read(&segment.path).unwrap()[..used], "{name} differs");
    }
    let ours = start_mirror(mirror, origin);
    assert_same_bytes(origin.store().journal(), &converged(&ours, origin));
    ours.stop().unwrap();
}

#[test]
fn killed_at_any_moment_it_ends_up_identical_byte_for_byte() {
    if !have_python() {
        return;
    }
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let mirror = dir.path().join("mirror");
    let origin = Origin::start(dir.path().join("origin"), small());
    let each = 40;
    for round in 0..12 {
        let window = rng.usize(1..20_000).to_string();
        let mut follower = Follower::start(origin.address, &mirror, &["--window", &window]);
        std::thread::scope(|scope| {
            scope.spawn(|| origin.append(round * each..(round + 1) * each));
            let mut next = None;
            for _ in 0..rng.usize(..=each) {
                let position = follower.hear_until("event")["position"].as_u64().unwrap();
                assert!(next.is_none_or(|next| next == position), "{position}, not {next:?}");
                next = Some(position + 1);
            }
            drop(follower);
        });
    }
    let ended = Follower::until(&origin, &mirror).assert(DONE);
    assert_eq!(ended.of_kind("done").next().unwrap()["position"], origin.end().get());
    assert!(segments(&mirror).len() > 8, "it has rolled many times");
    assert_mirrors(&origin, &mirror);
    // And the other way round: it goes on with what the library has written.
    origin.append(0..40);
    Follower::until(&origin, &mirror).assert(DONE);
    assert_mirrors(&origin, &mirror);
}

/// The origin is restored from an older copy and grows; the script must leave its mirror of the former history alone.
fn after_a_restore(grow: impl Fn(&Origin)) -> (Ended, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let (mirror, backup) = (dir.path().join("mirror"), dir.path().join("backup"));
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..40);
    origin.close();
    copy_dir(&origin.dir, &backup);
    origin.open();
    origin.append(40..60);
    Follower::until(&origin, &mirror).assert(DONE);
    origin.close();
    replace_dir(&origin.dir, &backup);
    origin.open();
    grow(&origin);
    let before = segments(&mirror);
    let ended = Follower::until(&origin, &mirror);
    assert!(segments(&mirror) == before, "the mirror is kept as it was");
    (ended, dir)
}

#[test]
fn an_origin_that_was_restored_and_has_grown_again_is_refused_as_a_fork() {
    if !have_python() {
        return;
    }
    for first in [40, 500] {
        let (ended, _dir) = after_a_restore(|origin| origin.append(first..first + 20));
        assert_eq!(ended.assert(FORK).of_kind("halted").next().unwrap()["code"], "FORK");
    }
    let (ended, _dir) = after_a_restore(|origin| origin.append(100..107));
    assert_eq!(ended.assert(AHEAD).of_kind("halted").next().unwrap()["code"], "AHEAD");
}

#[test]
fn a_damaged_tail_is_fetched_again_and_remembered_against_a_replaced_origin() {
    if !have_python() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (mirror, backup) = (dir.path().join("mirror"), dir.path().join("backup"));
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..40);
    Follower::until(&origin, &mirror).assert(DONE);
    let rot = || {
        let (name, bytes) = segments(&mirror).pop().unwrap();
        flip_bit(&mirror.join(name), bytes.len() as u64 - 70);
    };
    rot();
    Follower::until(&origin, &mirror).assert(DONE);
    assert_mirrors(&origin, &mirror);
    origin.close();
    copy_dir(&origin.dir, &backup);
    origin.open();
    origin.append(40..41);
    Follower::until(&origin, &mirror).assert(DONE);
    origin.close();
    replace_dir(&origin.dir, &backup);
    origin.open();
    origin.append(70..80);
    rot(); // what is left is in the backup too
    let ended = Follower::until(&origin, &mirror).assert(FORK);
    let text = ended.of_kind("halted").next().unwrap()["text"].as_str().unwrap();
    assert!(text.contains("set aside"), "{text}");
}

#[test]
fn what_trying_again_will_not_change_ends_it_with_a_code_of_its_own() {
    if !have_python() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mirror = dir.path().join("mirror");
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..100);
    Follower::until(&origin, &mirror).assert(DONE);
    let foreign = Origin::start(dir.path().join("foreign"), small());
    Follower::until(&foreign, &mirror).assert(FOREIGN);
    let id = foreign.store().journal().id().to_string();
    let other = dir.path().join("other");
    Follower::start(origin.address, &other, &["--journal", &id]).ended().assert(FOREIGN);
    // What it lacks is removed: from the beginning on, or behind its end.
    origin.append(100..300);
    let (removed, ended) = removed_behind(&mut origin, &mirror);
    assert_eq!(ended.assert(TRUNCATED).of_kind("halted").next().unwrap()["code"], "TRUNCATED");
    assert!(removed > Position::START);
    Follower::until(&origin, &other).assert(TRUNCATED);
    // What lies in front of a damage is taken.
    let rotten =
        Origin::start(dir.path().join("rotten"), JournalOptions { recent_bytes_max: 0, ..small() });
    rotten.append(0..100);
    let segment = &rotten.store().journal().segments()[2];
    flip_bit(&segment.path, 4096 + 200);
    let third = dir.path().join("third");
    let ended = Follower::until(&rotten, &third).assert(CORRUPT);
    let durable = ended.of_kind("durable").last().unwrap();
    assert_eq!(durable["position"], segment.base_position.get());
}

/// The origin removes as much as it can, as if it had never heard of the mirror, which then follows.
fn removed_behind(origin: &mut Origin, mirror: &Path) -> (Position, Ended) {
    origin.close();
    fs::remove_file(origin.dir.join("journal/leases")).unwrap();
    origin.open();
    let removed = forget_all(origin).target;
    (removed, Follower::until(origin, mirror))
}

/// Every byte of the mirror's segments is the origin's.
fn assert_prefix(origin: &Origin, mirror: &Path) {
    let journal = origin.dir.join("journal");
    for (name, bytes) in segments(mirror) {
        assert!(fs::read(journal.join(&name)).unwrap().starts_with(&bytes), "{name} differs");
    }
}

#[test]
fn flipped_bits_and_cut_connections_heal_and_are_never_written() {
    if !have_python() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..150);
    for _ in 0..4 {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mirror = dir.path().join(format!("mirror-{seed}"));
        let through = faulty_proxy(origin.address, seed, 3);
        let mut follower =
            Follower::start(through, &mirror, &["--until", &origin.end().to_string()]);
        while let Some(said) = follower.hear() {
            assert_ne!(said["kind"], "halted", "{said}");
            assert_prefix(&origin, &mirror);
        }
        assert_eq!(follower.child.wait().unwrap().code(), Some(DONE));
        assert_mirrors(&origin, &mirror);
    }
}

/// WELCOME, SUBSCRIBED with a path of one, SEGMENT, and the front of DATA.
const FIRST_BATCH_AT: usize = (12 + 80) + (12 + 96) + (12 + 4096) + (12 + 32);

#[test]
fn a_bit_that_is_flipped_again_and_again_ends_it_and_is_never_written() {
    if !have_python() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(100..103);
    // In the checksum, the position and the chain of the header, and in the body.
    for at in [14, 32, 85, 128 + 99] {
        let mirror = dir.path().join(format!("mirror-{at}"));
        let fault =
            Fault { of_origin: true, at: FIRST_BATCH_AT + at, what: What::Flip(fastrand::u8(..8)) };
        let through = Proxy::start(origin.address, move |_| vec![fault]).address;
        let ended = Follower::start(through, &mirror, &["--until", "3"]).ended().assert(DAMAGE);
        assert_eq!(ended.of_kind("halted").next().unwrap()["code"], "REFUSED");
        assert_eq!(ended.of_kind("retry").count(), 2, "on the way it would have healed");
        assert_eq!(ended.of_kind("event").count(), 0);
        assert!(segments(&mirror).is_empty());
    }
}

const JOURNAL: JournalId = JournalId::from_bytes([7; 16]);
const INCARNATION: u64 = 0x1111;

/// A segment's header page, as an origin writes it, unless it is changed.
fn page(change: fn(&mut SegmentHeader)) -> Vec<u8> {
    let mut header = SegmentHeader {
        flags: Default::default(),
        group_alignment: 64,
        journal: JOURNAL,
        number: 0,
        epoch: 1,
        incarnation: Incarnation::new(INCARNATION),
        base_position: Position::START,
        base_offset: 0,
        durable_offset: 0,
        salt: 77,
        created_at_us: 0,
        capacity_bytes: 8192,
        previous_chain: genesis(JOURNAL),
    };
    change(&mut header);
    header.to_page().bytes().to_vec()
}

/// A batch of one event, the first of its journal, sealed as an origin seals it after it has been changed.
fn batch(page: &[u8], body: &[u8], change: fn(&mut BatchHeader)) -> Vec<u8> {
    let mut header = BatchHeader {
        header_len: 128,
        flags: Default::default(),
        stored_len: body.len() as u32,
        raw_len: body.len() as u32,
        body_crc: crc32(&[body]),
        count: 1,
        base_position: Position::START,
        offset: 0,
        durable_offset: 0,
        epoch: 1,
        padded_len: padded_len(body.len() as u64) as u32,
        incarnation: Incarnation::new(INCARNATION),
        time_us: 0,
        chain: Default::default(),
    };
    change(&mut header);
    let segment = *blake3::hash(&page[..512]).as_bytes();
    let mut bytes = header.seal(genesis(JOURNAL), Some(&segment), &body_digest(body), 77).to_vec();
    bytes.extend_from_slice(body);
    bytes.resize(header.padded_len as usize, 0);
    bytes
}

fn body() -> Vec<u8> {
    let event = NewEvent::raw("test.happened", *b"it").unwrap().id(EventId::from_bytes([1; 16]));
    let mut body = Vec::new();
    record::encode(&mut body, &event, &StreamId::new("s").unwrap(), Revision::FIRST);
    body
}

/// A mirror up to position 1 of an origin that answers SUBSCRIBE with these frames.
fn follow_falsely(frames: Vec<u8>, end: OriginEnd) -> (Follower, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let end = Checkpoint {
        offset: end.offset,
        position: end.position,
        incarnation: Incarnation::new(INCARNATION),
        epoch: 1,
        ..Mark::start(JOURNAL).end
    };
    let address = false_origin_at(end, move |out| out.extend_from_slice(&frames));
    (Follower::start(address, dir.path(), &["--until", "1"]), dir)
}

fn frame(message: &Message<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(&mut frame);
    frame
}

fn segment_frame(page: &[u8]) -> Vec<u8> {
    frame(&Message::Segment(page.try_into().unwrap()))
}

fn data_frame(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let origin_end = OriginEnd { offset: bytes.len() as u64, position: Position::new(1) };
    frame(&Message::Data(Data { offset, origin_end, continued: false, bytes }))
}

/// What is written of a segment's first batch, and what is said.
fn follow_batch(page: &[u8], batch: &[u8]) -> (Ended, Vec<u8>) {
    let end = OriginEnd { offset: batch.len() as u64, position: Position::new(1) };
    let frames = [segment_frame(page), data_frame(0, batch)].concat();
    let (follower, dir) = follow_falsely(frames, end);
    let ended = follower.ended();
    (ended, segments(dir.path()).into_iter().flat_map(|(_, bytes)| bytes).collect())
}

#[test]
fn what_does_not_continue_the_journal_is_refused_whatever_its_checksums_say() {
    if !have_python() {
        return;
    }
    let right = page(|_| {});
    let whole = batch(&right, &body(), |_| {});
    let (ended, written) = follow_batch(&right, &whole);
    ended.assert(DONE);
    assert!(written == [right.clone(), whole].concat());

    type Spoil = (&'static str, fn(&mut BatchHeader), fn(&mut Vec<u8>));
    let batches: [Spoil; 6] = [
        ("place", |header| header.base_position = Position::new(1), |_| {}),
        ("place", |header| (header.offset, header.durable_offset) = (64, 64), |_| {}),
        ("body checksum", |header| header.body_crc ^= 1, |_| {}),
        ("header checksum", |_| {}, |bytes| bytes[12] ^= 1),
        ("padding", |_| {}, |bytes| *bytes.last_mut().unwrap() = 1),
        ("event count", |header| header.count = 0, |_| {}),
    ];
    for (what, change, spoil) in batches {
        let mut bytes = batch(&right, &body(), change);
        spoil(&mut bytes);
        assert_refused(what, &right, &bytes);
    }
    // Another history: all of it right, but for the chain.
    let other = page(|header| header.created_at_us = 1);
    assert_refused("chain", &right, &batch(&other, &body(), |_| {}));
    let mut records = body();
    records[40] ^= 1; // the length of the stream's name
    assert_refused("", &right, &batch(&right, &records, |_| {}));
    let pages: [(&str, Vec<u8>); 3] = [
        ("another journal", page(|header| header.journal = JournalId::from_bytes([8; 16]))),
        ("begin", page(|header| header.base_position = Position::new(1))),
        ("begin", page(|header| header.previous_chain = Default::default())),
    ];
    for (what, page) in pages {
        assert_refused(what, &page, &batch(&page, &body(), |_| {}));
    }
}

fn assert_refused(what: &str, page: &[u8], batch: &[u8]) {
    let (ended, written) = follow_batch(page, batch);
    let ended = ended.assert(DAMAGE);
    let text = ended.of_kind("halted").next().unwrap()["text"].as_str().unwrap();
    assert!(text.contains(what), "{text:?} instead of {what:?}");
    assert_eq!((ended.of_kind("event").count(), written.len()), (0, 0));
}

/// A frame of a type that isn't known.
fn unknown_frame(flags: u8) -> Vec<u8> {
    let mut frame = vec![5, 0, 0, 0, 0x8A, flags, 7, 0];
    let payload = b"later";
    let crc = crc32(&[&frame, payload]);
    frame.extend_from_slice(&crc.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

#[test]
fn frames_that_break_the_protocol_end_the_session_and_unknown_optional_ones_are_passed_over() {
    if !have_python() {
        return;
    }
    let page = page(|_| {});
    let batch = batch(&page, &body(), |_| {});
    let (segment, data) = (segment_frame(&page), data_frame(0, &batch));
    let end = OriginEnd { offset: batch.len() as u64, position: Position::new(1) };
    let optional = [unknown_frame(1), segment.clone(), unknown_frame(0xF1), data.clone()].concat();
    let (follower, _dir) = follow_falsely(optional, end);
    follower.ended().assert(DONE);

    let spoiled = |at: usize| {
        let mut frame = data.clone();
        frame[at] ^= 1;
        [segment.clone(), frame].concat()
    };
    let ack =
        frame(&Message::Ack(Ack { mirrored: Mark::start(JOURNAL).end, applied: None, echo: 0 }));
    let heartbeat = |echo| {
        let (end, speaker) = (Mark::start(JOURNAL).end, Speaker::Origin);
        frame(&Message::Heartbeat(Heartbeat { end, now_us: 0, speaker, echo }))
    };
    let back = OriginEnd { offset: end.offset - 64, ..end };
    let back = frame(&Message::Data(Data {
        offset: 0,
        origin_end: back,
        continued: false,
        bytes: &batch[..batch.len() - 64],
    }));
    let breaches = [
        ("checksum", spoiled(1)), // a length that is never waited for
        ("checksum", spoiled(8)),
        ("checksum", spoiled(12 + 31)),
        ("unknown type", unknown_frame(0)),
        ("in front of SEGMENT", data.clone()),
        ("SEGMENT behind SEGMENT", [segment.clone(), segment.clone()].concat()),
        ("begin where", [segment.clone(), data_frame(64, &batch[..64])].concat()),
        ("goes back", [segment.clone(), back].concat()),
        ("longer than what is there", {
            let cut = &batch[..batch.len() - 64];
            let data = Data { offset: 0, origin_end: end, continued: false, bytes: cut };
            [segment.clone(), frame(&Message::Data(data))].concat()
        }),
        ("ACK while streaming", ack),
        ("echo of what was not sent", heartbeat(1)),
    ];
    for (what, frames) in breaches {
        let (mut follower, dir) = follow_falsely(frames, end);
        let retry = follower.hear_until("retry");
        let text = retry["text"].as_str().unwrap();
        assert!(text.contains(what), "{text:?} instead of {what:?}");
        assert!(segments(dir.path()).is_empty());
    }
}

#[test]
fn a_batch_longer_than_a_frame_arrives_whole() {
    if !have_python() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mirror = dir.path().join("mirror");
    let large = JournalOptions {
        batch_bytes_max: 4 << 20,
        group_bytes_max: 4 << 20,
        segment_bytes_first: 8 << 20,
        segment_bytes_max: 8 << 20,
        ..JournalOptions::default()
    };
    let origin = Origin::start(dir.path().join("origin"), large);
    origin.append(0..2);
    origin.append_text(&"x".repeat(2_200_000));
    origin.append(2..4);
    Follower::until(&origin, &mirror).assert(DONE);
    assert_mirrors(&origin, &mirror);
}
