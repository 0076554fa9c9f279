//! What the fuzzers call, and what replays their corpus in the tests: bytes in, a panic if a promise about
//! damaged or hostile bytes is broken.
//!
//! Every input begins with a byte of switches. With [`SEAL`], what follows gets right checksums (and a right
//! chain) wherever it has the shape of something that is checksummed: a fuzzer can't guess those, and
//! behind them is most of the code.
//!
//! | target | input behind the switches |
//! |---|---|
//! | [`decode_batch`] | salt (8 bytes), a batch |
//! | [`decode_message`] | frames of the shipping protocol |
//! | [`ops_vs_model`] | operations on a store (`fuzzing/ops.rs`); the first byte is the disk's seed instead |
//! | [`recover_segment`] | segment 0 of a journal |
//! | `session_mirror` | what an origin does, and how this side takes it (`fuzzing/session_mirror.rs`) |
//! | `session_origin` | what a mirror or a subscriber does, and how this side takes it (`fuzzing/session_origin.rs`) |

mod ops;
#[cfg(feature = "shipping")]
mod script;
#[cfg(feature = "shipping")]
mod session_mirror;
#[cfg(feature = "shipping")]
mod session_origin;

pub use ops::ops_vs_model;
#[cfg(feature = "shipping")]
pub use session_mirror::{FEED, RESUMES, session_mirror};
#[cfg(feature = "shipping")]
pub use session_origin::{RELAY, session_origin};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::env;
use crate::error::OpenError;
use crate::event::{ExpectedRevision, NewEvent, Revision};
use crate::format::batch::{
    BATCH_HEADER_BYTES, BATCH_MAGIC, BatchHeader, BatchRef, Link, body_digest, chain, genesis,
};
use crate::format::files::{Node, Role};
use crate::format::segment::{HEADER_COPY_BYTES, HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::format::sidecar::SegmentIndex;
use crate::format::{Decoder, FormatError, crc32};
use crate::fs::Fs;
use crate::fs::sim::SimFs;
use crate::journal::{Append, Appender, Ingest, Journal};
use crate::options::JournalOptions;
use crate::position::{Chain, Checkpoint, JournalId, NodeId, Position};

/// Switch: checksums are made right before anything is decoded.
pub const SEAL: u8 = 1;
/// Switch of [`decode_message`]: DATA frames are allowed.
pub const DATA: u8 = 2;
/// Switch of [`recover_segment`]: the segment is a mirror's.
pub const MIRROR: u8 = 2;

/// A target: what a fuzzer or a test calls with bytes.
pub type Target = fn(&[u8]);

/// The targets, by the names of their folders.
pub const TARGETS: &[(&str, Target)] = &[
    ("decode_batch", decode_batch),
    #[cfg(feature = "shipping")]
    ("decode_message", decode_message),
    ("ops_vs_model", ops_vs_model),
    ("recover_segment", recover_segment),
    #[cfg(feature = "shipping")]
    ("session_mirror", session_mirror),
    #[cfg(feature = "shipping")]
    ("session_origin", session_origin),
];

/// Where the fields lie that [`seal_batch`] needs, as in `docs/format.md`.
mod at {
    pub(super) const HEADER_LEN: usize = 4;
    pub(super) const CRC: usize = 12;
    pub(super) const STORED_LEN: usize = 16;
    pub(super) const BODY_CRC: usize = 24;
    pub(super) const PADDED_LEN: usize = 60;
    pub(super) const CHAIN: usize = 80;
    /// In a segment's header.
    pub(super) const JOURNAL: usize = 24;
    /// In a segment's header.
    pub(super) const PREVIOUS_CHAIN: usize = 128;
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(room) = bytes.get_mut(at..at + value.len()) {
        room.copy_from_slice(value);
    }
}

// ------------------------------------------------------------------------------------------------- batch

/// A batch is whole and as its header says, or refused; its records are read, or refused.
pub fn decode_batch(input: &[u8]) {
    let mut input = Decoder::new(input);
    let (Ok(switches), Ok(salt)) = (input.u8(), input.u64()) else { return };
    let mut bytes = input.rest().to_vec();
    if switches & SEAL != 0 {
        seal(&mut bytes, salt);
    }
    let Ok(batch) = BatchRef::decode(&bytes, salt) else { return };
    check_batch(&batch, salt);
    check_records(&batch);
}

fn check_batch(batch: &BatchRef<'_>, salt: u64) {
    let header = batch.header;
    assert_eq!(batch.bytes().len(), header.padded_len as usize);
    assert_eq!(batch.body().len(), header.stored_len as usize);
    assert!(header.count > 0 && header.durable_offset <= header.offset);
    assert_eq!(header.end_offset() - header.offset, u64::from(header.padded_len));
    assert_eq!(header.end_position().since(header.base_position), u64::from(header.count));
    if usize::from(header.header_len) == BATCH_HEADER_BYTES {
        assert_eq!(BatchHeader::decode(&header.encode(salt), salt), Ok(header));
    }
    let all_but_one = batch.bytes().split_last().map_or(&[][..], |(_, front)| front);
    let cut = BatchRef::decode(all_but_one, salt).map(|batch| batch.header);
    assert_eq!(cut, Err(FormatError::Truncated));
    let link =
        Link { offset: header.offset, position: header.base_position, chain: Chain::default() };
    let chained = batch.chain_after(link.chain, None) == header.chain;
    assert_eq!(batch.continues(&link, None), chained);
}

fn check_records(batch: &BatchRef<'_>) {
    let records: Vec<_> = batch.records().collect();
    assert!(records.len() <= batch.header.count as usize);
    let complete = records.iter().all(Result::is_ok);
    assert!(batch.check_records().is_err() || complete);
    let mut index = SegmentIndex::default();
    assert_eq!(index.add(batch).is_ok(), complete);
    let mut names = crate::event::Names::default();
    for record in records.into_iter().flatten() {
        let (journal, position) = (JournalId::from_bytes([1; 16]), batch.header.base_position);
        let event = crate::event::Recorded::from_record(&record, journal, position, 0, &mut names);
        assert_eq!(event.stream().as_str(), record.stream);
        assert_eq!(event.data().as_slice(), record.payload);
        assert!(event.tags().len() + 2 * event.metadata().len() <= batch.body().len());
    }
}

/// Makes the checksums of a batch right, and its chain, as if it were a journal's first.
pub fn seal(batch: &mut [u8], salt: u64) {
    let len = batch.len();
    seal_batch(batch, salt, Chain::default(), None, len);
}

/// Makes the checksums of the batch at the front of `bytes` right, and its chain. Returns the chain and how
/// long the batch is, at most `limit`; `None` if nothing there has the shape of a batch.
fn seal_batch(
    bytes: &mut [u8],
    salt: u64,
    previous: Chain,
    segment: Option<&[u8; 32]>,
    limit: usize,
) -> Option<(Chain, usize)> {
    let header_len = usize::from(u16::from_le_bytes(array(bytes, at::HEADER_LEN)?));
    let stored_len = u32::from_le_bytes(array(bytes, at::STORED_LEN)?) as usize;
    let padded_len = u32::from_le_bytes(array(bytes, at::PADDED_LEN)?) as usize;
    let shaped = bytes.starts_with(&BATCH_MAGIC) && header_len >= BATCH_HEADER_BYTES;
    if !shaped || padded_len == 0 || padded_len > limit {
        return None;
    }
    let body = bytes.get(header_len..header_len + stored_len)?;
    let (body_crc, digest) = (crc32(&[body]), body_digest(body));
    put(bytes, at::BODY_CRC, &body_crc.to_le_bytes());
    let chain = chain(previous, segment, bytes.get(..header_len)?, &digest);
    put(bytes, at::CHAIN, chain.as_bytes());
    put(bytes, at::CRC, &[0; 4]);
    let crc = crc32(&[&salt.to_le_bytes(), bytes.get(..header_len)?]);
    put(bytes, at::CRC, &crc.to_le_bytes());
    Some((chain, padded_len))
}

// ----------------------------------------------------------------------------------------------- message

/// Frames are read the same however they arrive, and what was understood is written and read back the same.
#[cfg(feature = "shipping")]
pub fn decode_message(input: &[u8]) {
    let Some((&switches, frames)) = input.split_first() else { return };
    let mut frames = frames.to_vec();
    if switches & SEAL != 0 {
        crate::shipping::message::seal_frames(&mut frames);
    }
    let at_once = read_frames(&frames, switches, frames.len().max(1));
    for pieces in [1, 7, 64] {
        assert_eq!(read_frames(&frames, switches, pieces), at_once, "in pieces of {pieces}");
    }
}

#[cfg(feature = "shipping")]
type ReadFrames = (Vec<Vec<u8>>, Option<crate::shipping::message::FrameError>);

/// All messages, written again, and how reading ended.
#[cfg(feature = "shipping")]
fn read_frames(frames: &[u8], switches: u8, piece_bytes: usize) -> ReadFrames {
    use crate::shipping::message::{FRAME_BYTES_MAX, FrameReader};
    let mut reader = FrameReader::new();
    if switches & DATA != 0 {
        reader.allow_data(FRAME_BYTES_MAX);
    }
    let mut messages = Vec::new();
    for piece in frames.chunks(piece_bytes) {
        reader.push(piece);
        loop {
            match reader.next_message() {
                Ok(Some(message)) => messages.push(written_again(&message)),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

#[cfg(feature = "shipping")]
fn written_again(message: &crate::shipping::message::Message<'_>) -> Vec<u8> {
    use crate::shipping::message::{FRAME_BYTES_MAX, FrameReader, Message};
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    let mut reader = FrameReader::new();
    reader.allow_data(FRAME_BYTES_MAX);
    reader.push(&bytes);
    assert_eq!(reader.next_message(), Ok(Some(message.clone())));
    assert!(!reader.is_inside_a_frame());
    if let Message::Segment(page) = message
        && let PageState::Valid { page, .. } = SegmentPage::read(page)
    {
        assert_eq!(SegmentPage::read(&page.bytes()), PageState::Valid { page, intact: true });
    }
    if let Message::Events(events) = message {
        read_run(events.from, events.bytes);
    }
    bytes
}

/// A run that is taken in accounts for every position in front of its end.
#[cfg(feature = "shipping")]
fn read_run(from: Position, bytes: &[u8]) {
    use crate::shipping::message::{RUN_FIXED_BYTES, Run};
    let mut bytes = bytes.to_vec();
    if bytes.len() > RUN_FIXED_BYTES {
        let crc = crc32(&[&bytes[4..]]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(run) = Run::decode(from, bytes) {
        let mut last = from;
        assert!(run.entries().all(|entry| entry.is_ok()));
        for entry in run.entries().flatten() {
            assert!(entry.position >= last && entry.position < run.behind.position);
            last = entry.position;
        }
    }
}

// ----------------------------------------------------------------------------------------------- segment

const DIR: &str = "/journal";

/// A journal of one segment file is read, or refused with a place; reading changes nothing. If it can be
/// opened for writing, it keeps what could be read, takes events, and opens again with all of them.
pub fn recover_segment(input: &[u8]) {
    let Some((&switches, segment)) = input.split_first() else { return };
    let mut segment = segment.to_vec();
    if switches & SEAL != 0 {
        seal_segment(&mut segment);
    }
    env::seed(Some(1));
    let role = if switches & MIRROR == 0 { Role::Origin } else { Role::Mirror };
    let disk = Disk::with(role, &segment);
    let readable = disk.read_only();
    match role {
        Role::Origin | Role::Feed => disk.write_to(readable),
        Role::Mirror => disk.reopen_mirror(readable),
    }
    env::seed(None);
}

/// Makes the checksums of a segment's header and of its batches right, and the chain.
fn seal_segment(bytes: &mut [u8]) {
    let journal = JournalId::from_bytes(array(bytes, at::JOURNAL).unwrap_or_default());
    let header_bytes = bytes.len().min(HEADER_PAGE_BYTES);
    for copy in bytes[..header_bytes].chunks_exact_mut(HEADER_COPY_BYTES).take(2) {
        put(copy, at::PREVIOUS_CHAIN, genesis(journal).as_bytes());
        if let Some((covered, crc)) = copy.split_last_chunk_mut::<4>() {
            *crc = crc32(&[covered]).to_le_bytes();
        }
    }
    let Some(page) = bytes.first_chunk::<HEADER_PAGE_BYTES>() else { return };
    let PageState::Valid { page, .. } = SegmentPage::read(page) else { return };
    let (salt, mut previous) = (page.header.salt, page.header.previous_chain);
    let mut first = Some(&page.digest);
    let mut rest = &mut bytes[HEADER_PAGE_BYTES..];
    loop {
        let limit = rest.len();
        let Some((chain, len)) = seal_batch(rest, salt, previous, first.take(), limit) else {
            return;
        };
        previous = chain;
        rest = &mut rest[len..];
    }
}

/// What a reader found: the durable end and the number of events, or nothing if it was refused.
#[derive(Clone, Copy, Debug)]
struct Readable {
    end: Checkpoint,
    damaged: bool,
}

struct Disk {
    sim: SimFs,
    fs: Arc<dyn Fs>,
    segment: PathBuf,
}

impl Disk {
    fn with(role: Role, segment: &[u8]) -> Self {
        let sim = SimFs::new(1);
        // A header may ask for any amount of space.
        sim.set_capacity(Some(1 << 20));
        let journal = JournalId::from_bytes(array(segment, at::JOURNAL).unwrap_or_default());
        let node = Node { role, node: NodeId::from_bytes([2; 16]), journal };
        let path = Path::new(DIR).join("0000000000000000.seg");
        sim.write_raw(&Path::new(DIR).join("node"), &node.encode());
        sim.write_raw(&path, segment);
        Self { fs: Arc::new(sim.clone()), sim, segment: path }
    }

    fn options() -> JournalOptions {
        JournalOptions {
            segment_bytes_first: 16 * 1024,
            segment_bytes_max: 16 * 1024,
            batch_bytes_max: 1024,
            group_bytes_max: 1024,
            background_thread: false,
            ..JournalOptions::default()
        }
    }

    fn read_only(&self) -> Option<Readable> {
        let before = self.sim.snapshot_dir(Path::new(DIR));
        let read = Journal::open_read_only(&self.fs, Path::new(DIR)).ok();
        let readable = read.map(|(journal, corruption)| {
            check_reading(&journal);
            Readable { end: journal.end(), damaged: corruption.is_some() }
        });
        let after = self.sim.snapshot_dir(Path::new(DIR));
        assert!(before.files == after.files, "reading changed something");
        readable
    }

    fn open(&self) -> Result<Appender, OpenError> {
        Appender::open(&self.fs, Path::new(DIR), &Self::options(), false)
    }

    fn write_to(&self, readable: Option<Readable>) {
        let before = self.sim.raw(&self.segment);
        let appender = match self.open() {
            Ok(appender) => appender,
            Err(error) => {
                let spared = self.sim.raw(&self.segment) == before;
                assert!(spared || !matches!(error, OpenError::Corruption(_)), "{error}");
                return;
            }
        };
        if let Some(readable) = readable {
            assert!(!readable.damaged, "opened for writing in spite of damage");
            assert!(appender.journal().end().offset >= readable.end.offset, "events are missing");
        }
        let appended = append_to_some_streams(&appender);
        check_reading(appender.journal());
        let end = appender.journal().end();
        assert_eq!(appender.close().map_err(|error| error.to_string()), Ok(()));
        drop(appender);
        let again = self.open().unwrap_or_else(|error| panic!("after {appended}: {error}"));
        assert_eq!(again.journal().end(), end, "after {appended} appends");
        check_reading(again.journal());
    }

    fn reopen_mirror(&self, readable: Option<Readable>) {
        let open = || Ingest::open(&self.fs, Path::new(DIR), &Self::options());
        let Ok(Some(mirror)) = open() else { return };
        let end = mirror.journal().end();
        assert!(readable.is_none_or(|readable| end.offset >= readable.end.offset));
        check_reading(mirror.journal());
        assert_eq!(mirror.close().map_err(|error| error.to_string()), Ok(()));
        match open() {
            Ok(Some(mirror)) => assert_eq!(mirror.journal().end(), end),
            other => panic!("{other:?}"),
        }
    }
}

/// Everything that is shown can be read, in order, by journal and by stream.
fn check_reading(journal: &Journal) {
    let events = journal.read_all(Position::START).unwrap_or_else(|error| panic!("{error}"));
    let mut next = Position::START;
    let mut streams = std::collections::BTreeSet::new();
    for event in events {
        let event = event.unwrap_or_else(|error| panic!("at {next}: {error}"));
        assert_eq!(event.position(), next);
        next = next.advance(1);
        streams.insert(event.stream().clone());
    }
    assert_eq!(next, journal.end().position);
    for stream in streams {
        for from in [Revision::new(0), Revision::new(1), Revision::new(u64::MAX)] {
            let events = journal.read_stream(&stream, from);
            let events = events.unwrap_or_else(|error| panic!("{stream}: {error}"));
            for event in events.flatten() {
                assert_eq!(event.stream(), &stream);
                assert!(event.revision() >= from);
            }
        }
    }
}

/// Appends behind whatever revisions are there; how many appends succeeded.
fn append_to_some_streams(appender: &Appender) -> usize {
    let events = appender.journal().read_all(Position::START);
    let streams = events.into_iter().flatten().flatten().map(|event| event.stream().clone());
    let mut streams: Vec<_> = streams.take(100).collect();
    streams.sort();
    streams.dedup();
    streams.truncate(4);
    let event = || NewEvent::raw("fuzz.appended", *b"more");
    let appends = streams.iter().filter_map(|stream| {
        let append = Append::to(stream, ExpectedRevision::Any, [event().ok()?]);
        appender.append(&append).ok()
    });
    appends.count()
}
