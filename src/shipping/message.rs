//! The frames of the shipping protocol, to bytes and back, as specified in `docs/protocol.md`.
//!
//! ```text
//! frame     ┌ length u32 ┬ type u8 ┬ flags u8 ┬ sub u16 ┬ crc u32 ┐┌ payload: length bytes ┐
//! control   └──────────── covered by the crc ─────────┘           └─── covered by the crc ┘
//! DATA      └──────────── covered by the crc ─────────┘           └ 32 B covered ┘└ batches: own CRCs, chain ┘
//! ```
//!
//! Invariants:
//! - Every length is checked against a limit before a byte is kept for it; nothing that a peer only claims
//!   is allocated. Control frames carry at most [`CONTROL_BYTES_MAX`] bytes, DATA at most what was negotiated.
//! - A frame is looked at only after its checksum was verified. Decoding never panics.
//! - Reserved fields are zero when written and refused otherwise, except in HELLO, which a later version may
//!   lengthen: it is read before the version is known.

use zeroize::Zeroizing;

mod feed;

pub use feed::{
    ENTRY_FIXED_BYTES, Entries, Entry, Events, FeedRequest, FeedTerms, RUN_BYTES_MAX,
    RUN_FIXED_BYTES, Run, SHAPE_NAME_BYTES_MAX, ShapeId, Skip,
};
pub(crate) use feed::{RunWriter, put_part};

use crate::format::batch::{Link, PADDED_BYTES_LIMIT};
use crate::format::files::Witness;
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::format::{Decoder, FormatError, crc32};
use crate::planted::{self, Bug};
use crate::position::{Chain, Checkpoint, JournalId, NodeId, Position};

/// The version of the protocol that this code speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// The versions that this code accepts, lowest and highest.
pub const PROTOCOL_VERSIONS: VersionRange =
    VersionRange { min: PROTOCOL_VERSION, max: PROTOCOL_VERSION };
/// The first four bytes of a HELLO's payload.
pub const HELLO_MAGIC: [u8; 4] = *b"HWSP";
/// Length of the header in front of each payload.
pub const FRAME_HEADER_BYTES: usize = 12;
/// The longest payload of a control frame, and of any frame before the session is agreed upon.
pub const CONTROL_BYTES_MAX: u32 = 4096;
/// Length of the part of a DATA frame's payload in front of the batches.
pub const DATA_FIXED_BYTES: u32 = 32;
/// The smallest frame limit that a peer may ask for.
pub const FRAME_BYTES_MIN: u32 = 8 * 1024;
/// The largest frame limit that this code grants, and the one it asks for.
pub const FRAME_BYTES_MAX: u32 = 1024 * 1024;
/// Feature: filtered feeds. A mirror doesn't need it, and doesn't offer it.
pub const FEATURE_FILTERED: u64 = 1;
/// Feature: PROBE and PROBED, with which a mirror finds the last common batch end of two histories.
pub const FEATURE_PROBE: u64 = 1 << 2;
/// Feature: TRUNCATED, which says where else there are events that were removed.
pub const FEATURE_TRUNCATED: u64 = 1 << 3;
/// Features that a mirror offers. Others are set apart in `docs/protocol.md`.
pub const FEATURES: u64 = FEATURE_PROBE | FEATURE_TRUNCATED;
/// The longest path of nodes that a SUBSCRIBED may carry.
pub const PATH_NODES_MAX: usize = 8;
/// The most positions that a PROBE may ask for.
pub const PROBE_POSITIONS_MAX: usize = 64;
/// The most sources that a TRUNCATED may name.
pub const SOURCES_MAX: usize = 8;

const AGENT_BYTES_MAX: usize = 64;
const DETAIL_BYTES_MAX: usize = 512;
const AUTH_BYTES_MAX: usize = 1024;
const SOURCE_BYTES_MAX: usize = 256;
const UNKNOWN: u64 = u64::MAX;

const FLAG_OPTIONAL: u8 = 1;
const FLAG_CONTINUED: u8 = 2;

const _: () = assert!(HEADER_PAGE_BYTES as u32 <= CONTROL_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MIN > CONTROL_BYTES_MAX && FRAME_BYTES_MIN <= FRAME_BYTES_MAX);

/// Frame types. The numbers left out are set apart in `docs/protocol.md` for frames to come.
mod kind {
    pub(super) const HELLO: u8 = 0x01;
    pub(super) const WELCOME: u8 = 0x02;
    pub(super) const SUBSCRIBE: u8 = 0x03;
    pub(super) const SUBSCRIBED: u8 = 0x04;
    pub(super) const DIVERGED: u8 = 0x05;
    pub(super) const PROBE: u8 = 0x06;
    pub(super) const PROBED: u8 = 0x07;
    pub(super) const DATA: u8 = 0x10;
    pub(super) const SEGMENT: u8 = 0x11;
    pub(super) const SKIP: u8 = 0x14;
    pub(super) const EVENTS: u8 = 0x15;
    pub(super) const HEARTBEAT: u8 = 0x16;
    pub(super) const ACK: u8 = 0x17;
    pub(super) const TRUNCATED: u8 = 0x18;
    pub(super) const ERROR: u8 = 0x1E;
    pub(super) const GOAWAY: u8 = 0x1F;
}

/// Why bytes from a peer are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The frame says that it is longer than agreed.
    #[error("a frame of type {kind:#04x} with {length} bytes, of at most {limit}")]
    TooLong {
        /// The frame's type.
        kind: u8,
        /// Its length.
        length: u32,
        /// What is allowed.
        limit: u32,
    },
    /// The checksum doesn't match: bytes were damaged on the way, or the peer speaks something else.
    #[error("a frame's checksum does not match")]
    Checksum,
    /// A frame that must be understood, of a type that isn't.
    #[error("a frame of unknown type {0:#04x}")]
    UnknownType(u8),
    /// The checksum matches, but the contents are not what the protocol says.
    #[error("a malformed {frame}: {source}")]
    Malformed {
        /// The frame.
        frame: &'static str,
        /// What is wrong with it.
        source: FormatError,
    },
}

/// A range of protocol versions, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionRange {
    /// The lowest.
    pub min: u16,
    /// The highest.
    pub max: u16,
}

impl VersionRange {
    /// The highest version in both ranges.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u16> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

/// The mirror's first frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The versions it speaks.
    pub versions: VersionRange,
    /// The features it offers.
    pub features: u64,
    /// The longest payload it takes.
    pub max_frame: u32,
    /// Its node, also that of a mirror that has yet to be made; `None` if it doesn't say.
    pub node: Option<NodeId>,
    /// Random; the answer repeats it.
    pub nonce: [u8; 16],
    /// By what it may be let in, beside the certificate that it has shown in TLS.
    pub authentication: Authentication,
    /// Name and version of the program, for people.
    pub agent: String,
}

/// What a mirror presents in its HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Authentication {
    /// Nothing.
    None,
    /// A bearer token.
    Token(Presented),
    /// Something of a kind that this version doesn't know; taken for nothing.
    Other(u16),
}

/// A token as it was presented: any bytes. Shows in no `Debug` output, and is overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Presented(Zeroizing<Vec<u8>>);

impl Presented {
    /// These bytes; more than 1,024 are cut when they are sent.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(bytes.to_vec()))
    }

    /// The secret itself.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Presented {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Presented(..)")
    }
}

/// The origin's answer to HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: u16,
    /// How often the origin sends a HEARTBEAT, in milliseconds.
    pub heartbeat_ms: u16,
    /// The longest payload of a DATA frame in this session.
    pub max_frame: u32,
    /// The features that are used in this session.
    pub features: u64,
    /// The origin's node.
    pub node: NodeId,
    /// Random; names the session in the diagnostics of both sides.
    pub session: [u8; 16],
    /// The nonce of the HELLO.
    pub nonce: [u8; 16],
    /// The origin's clock, in microseconds since 1970.
    pub now_us: i64,
}

/// Asks for a journal from a place on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscribe {
    /// The mirror's end: a resume token, never a bare number. `None` asks for the origin's own journal from
    /// its beginning.
    pub from: Option<Checkpoint>,
    /// The old end of a tail that the mirror has set aside and not passed again since.
    pub witness: Option<Witness>,
    /// How many bytes the origin may send ahead of what has been acknowledged.
    pub window_bytes: u32,
}

/// The subscription is granted; batches follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscribed {
    /// The origin's durable end.
    pub end: Checkpoint,
    /// The first position that the origin still has.
    pub first_position: Position,
    /// The nodes that the journal comes through, its origin first.
    pub path: Vec<NodeId>,
}

/// Who it is that serves a journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speaker {
    /// Its origin.
    #[default]
    Origin,
    /// A mirror that has everything of which its origin has told it, and hears from it.
    Relay,
    /// A mirror that hears from its origin and is behind it.
    RelayBehind,
    /// A mirror that doesn't hear from its origin at present, or can't know whether it does.
    RelayApart,
}

impl Speaker {
    const fn number(self) -> u8 {
        match self {
            Self::Origin => 0,
            Self::Relay => 1,
            Self::RelayBehind => 2,
            Self::RelayApart => 3,
        }
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        match input.u8()? {
            0 => Ok(Self::Origin),
            1 => Ok(Self::Relay),
            2 => Ok(Self::RelayBehind),
            3 => Ok(Self::RelayApart),
            _ => Err(FormatError::Invalid("speaker")),
        }
    }

    /// Whether there is no more of the journal, as far as anybody knows, than it has.
    #[must_use]
    pub const fn is_current(self) -> bool {
        matches!(self, Self::Origin | Self::Relay)
    }
}

/// How the mirror's history and the origin's differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// The mirror's end lies beyond the origin's durable end: the origin has lost events.
    Ahead,
    /// The origin has something else at the mirror's end.
    Fork,
    /// The origin serves another journal.
    Foreign,
}

/// The subscription is refused because the histories differ. Nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Diverged {
    /// In what way.
    pub divergence: Divergence,
    /// Found at the witness, not at the mirror's end.
    pub at_witness: bool,
    /// Who says so.
    pub speaker: Speaker,
    /// The last place that both have in common; `None` means that the origin doesn't know.
    pub common: Option<Common>,
    /// The origin's durable end.
    pub end: Checkpoint,
}

/// A batch end that two histories have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Common {
    /// Its position.
    pub position: Position,
    /// The chain there.
    pub chain: Chain,
}

/// Asks for batch ends of the origin's history, to find the last one that both have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// At or in front of these positions, from 1 to [`PROBE_POSITIONS_MAX`].
    pub positions: Vec<Position>,
}

/// The answer to a [`Probe`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// The last batch end at or in front of each position, in the order of the question; `None` if the origin
    /// doesn't know it any more.
    pub ends: Vec<Option<Link>>,
}

/// The subscription is refused, or ended, because the events that are to be sent were removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truncated {
    /// Where the origin's journal begins: what lies behind can be had here.
    pub start: Checkpoint,
    /// Where the rest may be found, for people: other mirrors' addresses, places of backups.
    pub sources: Vec<String>,
}

/// How far an origin is durable, in both measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginEnd {
    /// Bytes.
    pub offset: u64,
    /// Events.
    pub position: Position,
}

impl OriginEnd {
    /// That of a source which has gone on since it was asked.
    pub(crate) fn at_least(self, sent: &Checkpoint) -> Self {
        if sent.offset > self.offset { sent.into() } else { self }
    }
}

impl From<&Checkpoint> for OriginEnd {
    fn from(end: &Checkpoint) -> Self {
        Self { offset: end.offset, position: end.position }
    }
}

/// Bytes of the journal, verbatim: whole batches, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data<'a> {
    /// The offset of the first of the bytes in the journal.
    pub offset: u64,
    /// The origin's durable end when the frame was sent.
    pub origin_end: OriginEnd,
    /// The last batch goes on in the next DATA frame.
    pub continued: bool,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// The origin is there, and its durable end is this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The origin's durable end.
    pub end: Checkpoint,
    /// The origin's clock, in microseconds since 1970.
    pub now_us: i64,
    /// Whose end that is.
    pub speaker: Speaker,
    /// The number of the last [`Ack`] that was heard before the end was read.
    pub echo: u64,
}

/// The mirror is there, and has this much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Durable in the mirror.
    pub mirrored: Checkpoint,
    /// Applied to the mirror's views, if it says so.
    pub applied: Option<Position>,
    /// A number for the origin to give back; another one than in the [`Ack`] before asks for a [`Heartbeat`] at once.
    pub echo: u64,
}

/// What an ERROR frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What went wrong.
    pub code: ErrorCode,
    /// How long to wait before another attempt, if one makes sense.
    pub retry_after_ms: u32,
    /// Where, for an error that has a place in the journal.
    pub position: Option<Position>,
    /// The versions that the sender speaks.
    pub versions: VersionRange,
    /// For people.
    pub detail: String,
}

impl Failure {
    /// A failure without a place and without a wait.
    #[must_use]
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        let (retry_after_ms, position) = (0, None);
        Self { code, retry_after_ms, position, versions: PROTOCOL_VERSIONS, detail: detail.into() }
    }
}

/// The code of an ERROR frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ErrorCode(pub u16);

impl ErrorCode {
    /// No protocol version in common.
    pub const VERSION: Self = Self(1);
    /// The origin wants to know who is asking.
    pub const AUTH_REQUIRED: Self = Self(2);
    /// The peer may not read this.
    pub const DENIED: Self = Self(3);
    /// No such journal here.
    pub const UNKNOWN_JOURNAL: Self = Self(4);
    /// The position has been removed by retention.
    pub const TRUNCATED: Self = Self(8);
    /// The path of nodes has become too long.
    pub const CYCLE: Self = Self(9);
    /// Too many connections.
    pub const TOO_MANY: Self = Self(10);
    /// The peer didn't take what was sent to it.
    pub const SLOW_CONSUMER: Self = Self(11);
    /// A frame was longer than agreed. Its checksum couldn't be verified then, so it may be the length that was
    /// damaged on the way.
    pub const FRAME_TOO_LONG: Self = Self(12);
    /// The peer broke the protocol.
    pub const PROTOCOL: Self = Self(13);
    /// Damage in the sender's journal, at the position given; it stops in front of it.
    pub const CORRUPT: Self = Self(14);
    /// The sender's disk fails.
    pub const STORAGE: Self = Self(15);
    /// The sender is going away.
    pub const SHUTTING_DOWN: Self = Self(16);
    /// A deadline has passed.
    pub const TIMEOUT: Self = Self(17);
    /// A mode or filter that the sender doesn't know.
    pub const UNSUPPORTED: Self = Self(18);
    /// Too many requests.
    pub const RATE: Self = Self(19);
    /// A relay that is itself behind the mirror: it ends at the position given. Without one, it has no journal at present.
    pub const NOT_YET: Self = Self(20);
    /// The bytes received are not a continuation of the mirror.
    pub const REFUSED: Self = Self(21);
    /// The feed was begun with other terms than there are now.
    pub const TERMS: Self = Self(22);
    /// The service can't publish the event at the position given.
    pub const SHAPE: Self = Self(23);

    /// The name in `docs/protocol.md`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VERSION => "VERSION",
            Self::AUTH_REQUIRED => "AUTH_REQUIRED",
            Self::DENIED => "DENIED",
            Self::UNKNOWN_JOURNAL => "UNKNOWN_JOURNAL",
            Self::TRUNCATED => "TRUNCATED",
            Self::CYCLE => "CYCLE",
            Self::TOO_MANY => "TOO_MANY",
            Self::SLOW_CONSUMER => "SLOW_CONSUMER",
            Self::FRAME_TOO_LONG => "FRAME_TOO_LONG",
            Self::PROTOCOL => "PROTOCOL",
            Self::CORRUPT => "CORRUPT",
            Self::STORAGE => "STORAGE",
            Self::SHUTTING_DOWN => "SHUTTING_DOWN",
            Self::TIMEOUT => "TIMEOUT",
            Self::UNSUPPORTED => "UNSUPPORTED",
            Self::RATE => "RATE",
            Self::NOT_YET => "NOT_YET",
            Self::REFUSED => "REFUSED",
            Self::TERMS => "TERMS",
            Self::SHAPE => "SHAPE",
            _ => "UNKNOWN",
        }
    }

    /// Whether the same attempt may succeed later without anybody doing anything. Codes that aren't known
    /// are taken for such.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        !matches!(
            self,
            Self::VERSION
                | Self::AUTH_REQUIRED
                | Self::DENIED
                | Self::UNKNOWN_JOURNAL
                | Self::TRUNCATED
                | Self::CORRUPT
                | Self::UNSUPPORTED
                | Self::TERMS
        )
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// The sender ends the session in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GoAway {
    /// How long to wait before connecting again.
    pub reconnect_after_ms: u32,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Welcome`].
    Welcome(Welcome),
    /// See [`Subscribe`].
    Subscribe(Subscribe),
    /// Asks for a filtered feed. There is no witness then.
    SubscribeFeed(Subscribe, FeedRequest),
    /// See [`Subscribed`].
    Subscribed(Subscribed),
    /// The feed is granted, with these terms.
    SubscribedFeed(Subscribed, FeedTerms),
    /// See [`Diverged`].
    Diverged(Diverged),
    /// See [`Probe`].
    Probe(Probe),
    /// See [`Probed`].
    Probed(Probed),
    /// The header page of a segment, verbatim, in front of the segment's first batch.
    Segment(&'a [u8; HEADER_PAGE_BYTES]),
    /// See [`Data`].
    Data(Data<'a>),
    /// See [`Skip`].
    Skip(Skip),
    /// See [`Events`].
    Events(Events<'a>),
    /// See [`Heartbeat`].
    Heartbeat(Heartbeat),
    /// See [`Ack`].
    Ack(Ack),
    /// See [`Truncated`].
    Truncated(Truncated),
    /// See [`Failure`].
    Error(Failure),
    /// See [`GoAway`].
    GoAway(GoAway),
}

impl Message<'_> {
    /// The frame's name in `docs/protocol.md`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        frame_name(self.kind())
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::Welcome(_) => kind::WELCOME,
            Self::Subscribe(_) | Self::SubscribeFeed(..) => kind::SUBSCRIBE,
            Self::Subscribed(_) | Self::SubscribedFeed(..) => kind::SUBSCRIBED,
            Self::Diverged(_) => kind::DIVERGED,
            Self::Probe(_) => kind::PROBE,
            Self::Probed(_) => kind::PROBED,
            Self::Segment(_) => kind::SEGMENT,
            Self::Data(_) => kind::DATA,
            Self::Skip(_) => kind::SKIP,
            Self::Events(_) => kind::EVENTS,
            Self::Heartbeat(_) => kind::HEARTBEAT,
            Self::Ack(_) => kind::ACK,
            Self::Truncated(_) => kind::TRUNCATED,
            Self::Error(_) => kind::ERROR,
            Self::GoAway(_) => kind::GOAWAY,
        }
    }

    /// Appends the frame to `out`. Texts and lists that are too long are cut.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let frame = FrameWriter::begin(out);
        let mut flags = 0;
        match self {
            Self::Hello(hello) => hello.encode(out),
            Self::Welcome(welcome) => welcome.encode(out),
            Self::Subscribe(subscribe) => subscribe.encode(None, out),
            Self::SubscribeFeed(subscribe, feed) => subscribe.encode(Some(feed), out),
            Self::Subscribed(subscribed) => subscribed.encode(out),
            Self::SubscribedFeed(subscribed, terms) => {
                subscribed.encode(out);
                terms.encode(out);
            }
            Self::Diverged(diverged) => diverged.encode(out),
            Self::Probe(probe) => probe.encode(out),
            Self::Probed(probed) => probed.encode(out),
            Self::Segment(page) => out.extend_from_slice(*page),
            Self::Data(data) => {
                data.encode_fixed(out);
                out.extend_from_slice(data.bytes);
                flags = if data.continued { FLAG_CONTINUED } else { 0 };
            }
            Self::Skip(skip) => skip.encode(out),
            Self::Events(events) => {
                events.encode_fixed(out);
                out.extend_from_slice(events.bytes);
                flags = if events.continued { FLAG_CONTINUED } else { 0 };
            }
            Self::Heartbeat(heartbeat) => heartbeat.encode(out),
            Self::Ack(ack) => ack.encode(out),
            Self::Truncated(truncated) => truncated.encode(out),
            Self::Error(failure) => failure.encode(out),
            Self::GoAway(go_away) => {
                put_u32(out, go_away.reconnect_after_ms);
                put_u32(out, 0);
            }
        }
        frame.finish(out, self.kind(), flags);
    }
}

const fn frame_name(kind: u8) -> &'static str {
    match kind {
        kind::HELLO => "HELLO",
        kind::WELCOME => "WELCOME",
        kind::SUBSCRIBE => "SUBSCRIBE",
        kind::SUBSCRIBED => "SUBSCRIBED",
        kind::DIVERGED => "DIVERGED",
        kind::PROBE => "PROBE",
        kind::PROBED => "PROBED",
        kind::SEGMENT => "SEGMENT",
        kind::DATA => "DATA",
        kind::SKIP => "SKIP",
        kind::EVENTS => "EVENTS",
        kind::HEARTBEAT => "HEARTBEAT",
        kind::ACK => "ACK",
        kind::TRUNCATED => "TRUNCATED",
        kind::ERROR => "ERROR",
        kind::GOAWAY => "GOAWAY",
        _ => "frame",
    }
}

/// A frame whose payload is being written behind its still empty header.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    at: usize,
}

impl FrameWriter {
    pub(crate) fn begin(out: &mut Vec<u8>) -> Self {
        let at = out.len();
        out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        Self { at }
    }

    /// Begins a DATA frame; batches are appended to `out`, then [`finish_data`](Self::finish_data).
    pub(crate) fn begin_data(out: &mut Vec<u8>) -> Self {
        let frame = Self::begin(out);
        out.extend_from_slice(&[0; DATA_FIXED_BYTES as usize]);
        frame
    }

    pub(crate) fn finish_data(self, out: &mut [u8], data: &Data<'_>) {
        let mut fixed = Vec::with_capacity(DATA_FIXED_BYTES as usize);
        data.encode_fixed(&mut fixed);
        if let Some(room) = out.get_mut(self.at + FRAME_HEADER_BYTES..) {
            room.iter_mut().zip(&fixed).for_each(|(to, from)| *to = *from);
        }
        self.finish(out, kind::DATA, if data.continued { FLAG_CONTINUED } else { 0 });
    }

    fn finish(self, out: &mut [u8], kind: u8, flags: u8) {
        let Some((header, payload)) =
            out.get_mut(self.at..).and_then(<[u8]>::split_first_chunk_mut::<FRAME_HEADER_BYTES>)
        else {
            return;
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let covered = payload.get(..covered_len(kind, length)).unwrap_or(payload);
        let frame = FrameHeader { length, kind, flags, sub: 0, crc: 0 };
        let crc = crc32(&[&frame.covered(), covered]);
        *header = FrameHeader { crc, ..frame }.encode();
    }
}

/// How much of the payload the frame's checksum covers.
fn covered_len(kind: u8, length: u32) -> usize {
    if is_bulk(kind) { length.min(DATA_FIXED_BYTES) as usize } else { length as usize }
}

/// Whether it carries events, which have checksums of their own.
const fn is_bulk(kind: u8) -> bool {
    matches!(kind, kind::DATA | kind::EVENTS)
}

#[derive(Clone, Copy, Debug)]
struct FrameHeader {
    length: u32,
    kind: u8,
    flags: u8,
    sub: u16,
    crc: u32,
}

impl FrameHeader {
    fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Self {
        let [l0, l1, l2, l3, kind, flags, s0, s1, c0, c1, c2, c3] = *bytes;
        Self {
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            kind,
            flags,
            sub: u16::from_le_bytes([s0, s1]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    fn encode(self) -> [u8; FRAME_HEADER_BYTES] {
        let [l0, l1, l2, l3, kind, flags, s0, s1] = self.covered();
        let [c0, c1, c2, c3] = self.crc.to_le_bytes();
        [l0, l1, l2, l3, kind, flags, s0, s1, c0, c1, c2, c3]
    }

    fn covered(self) -> [u8; 8] {
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [s0, s1] = self.sub.to_le_bytes();
        [l0, l1, l2, l3, self.kind, self.flags, s0, s1]
    }

    fn check_length(self, data_limit: u32) -> Result<(), FrameError> {
        let limit = if is_bulk(self.kind) { data_limit } else { CONTROL_BYTES_MAX };
        if self.length > limit && !planted::is(Bug::UnboundedFrame) {
            return Err(FrameError::TooLong { kind: self.kind, length: self.length, limit });
        }
        Ok(())
    }

    fn is_known(self) -> bool {
        frame_name(self.kind) != "frame"
    }
}

/// Makes the checksums of the frames in `bytes` right, up to the first that isn't whole: a fuzzer can't.
#[cfg(feature = "test-kit")]
pub(crate) fn seal_frames(mut bytes: &mut [u8]) {
    while let Some((header, rest)) = bytes.split_first_chunk_mut::<FRAME_HEADER_BYTES>() {
        let frame = FrameHeader::decode(header);
        let Some((payload, behind)) = rest.split_at_mut_checked(frame.length as usize) else {
            return;
        };
        let covered = payload.get(..covered_len(frame.kind, frame.length)).unwrap_or_default();
        let crc = crc32(&[&frame.covered(), covered]);
        *header = FrameHeader { crc, ..frame }.encode();
        bytes = behind;
    }
}

/// Cuts a stream of bytes into frames, and verifies them.
///
/// Holds no more than the beginning of one frame and what was pushed last.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    consumed: usize,
    data_limit: u32,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameReader {
    /// A reader that takes control frames only.
    #[must_use]
    pub const fn new() -> Self {
        Self { buffer: Vec::new(), consumed: 0, data_limit: 0 }
    }

    /// From here on DATA frames with payloads of up to `max_frame` bytes are taken.
    pub const fn allow_data(&mut self, max_frame: u32) {
        self.data_limit = max_frame;
    }

    /// Adds what has arrived. Call [`next_message`](Self::next_message) until it has nothing more before
    /// adding again.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// How many bytes it keeps.
    #[cfg(feature = "test-kit")]
    pub(crate) const fn held_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn is_inside_a_frame(&self) -> bool {
        self.buffer.len() > self.consumed
    }

    /// The next whole frame; unknown optional frames are passed over.
    ///
    /// # Errors
    /// [`FrameError`]; the stream can't be read any further then.
    pub fn next_message(&mut self) -> Result<Option<Message<'_>>, FrameError> {
        while let Some((header, payload)) = self.next_frame()? {
            if header.is_known() {
                let payload = self.buffer.get(payload).unwrap_or_default();
                return decode_payload(header, payload).map(Some);
            }
            if header.flags & FLAG_OPTIONAL == 0 {
                return Err(FrameError::UnknownType(header.kind));
            }
        }
        Ok(None)
    }

    /// Verifies and consumes the frame at the front, if all of it is there.
    fn next_frame(&mut self) -> Result<Option<(FrameHeader, std::ops::Range<usize>)>, FrameError> {
        let pending = self.buffer.get(self.consumed..).unwrap_or_default();
        let Some((header, payload)) = pending.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = FrameHeader::decode(header);
        header.check_length(self.data_limit)?;
        let Some(covered) = payload.get(..covered_len(header.kind, header.length)) else {
            return Ok(None);
        };
        if crc32(&[&header.covered(), covered]) != header.crc {
            return Err(FrameError::Checksum);
        }
        if payload.len() < header.length as usize {
            return Ok(None);
        }
        let begin = self.consumed + FRAME_HEADER_BYTES;
        let end = begin + header.length as usize;
        self.consumed = end;
        Ok(Some((header, begin..end)))
    }
}

fn decode_payload(header: FrameHeader, payload: &[u8]) -> Result<Message<'_>, FrameError> {
    let frame = frame_name(header.kind);
    let malformed = |source| FrameError::Malformed { frame, source };
    let allowed = if is_bulk(header.kind) { FLAG_CONTINUED } else { 0 };
    if header.flags & !allowed != 0 {
        return Err(malformed(FormatError::Invalid("flags")));
    }
    if header.sub != 0 {
        return Err(malformed(FormatError::Invalid("subscription number")));
    }
    let mut input = Decoder::new(payload);
    let continued = header.flags & FLAG_CONTINUED != 0;
    let message = decode_message(header.kind, continued, &mut input).map_err(malformed)?;
    if header.kind != kind::HELLO && !input.rest().is_empty() {
        return Err(malformed(FormatError::Invalid("length")));
    }
    Ok(message)
}

fn decode_message<'a>(
    kind: u8,
    continued: bool,
    input: &mut Decoder<'a>,
) -> Result<Message<'a>, FormatError> {
    Ok(match kind {
        kind::HELLO => Message::Hello(Hello::decode(input)?),
        kind::WELCOME => Message::Welcome(Welcome::decode(input)?),
        kind::SUBSCRIBE => Subscribe::decode(input)?,
        kind::SUBSCRIBED => {
            let subscribed = Subscribed::decode(input)?;
            match input.rest().is_empty() {
                true => Message::Subscribed(subscribed),
                false => Message::SubscribedFeed(subscribed, FeedTerms::decode(input)?),
            }
        }
        kind::DIVERGED => Message::Diverged(Diverged::decode(input)?),
        kind::PROBE => Message::Probe(Probe::decode(input)?),
        kind::PROBED => Message::Probed(Probed::decode(input)?),
        kind::SEGMENT => {
            let page = input.bytes(HEADER_PAGE_BYTES)?;
            Message::Segment(page.try_into().map_err(|_| FormatError::Truncated)?)
        }
        kind::DATA => Message::Data(Data::decode(continued, input)?),
        kind::SKIP => Message::Skip(Skip::decode(input)?),
        kind::EVENTS => Message::Events(Events::decode(continued, input)?),
        kind::HEARTBEAT => Message::Heartbeat(Heartbeat::decode(input)?),
        kind::ACK => Message::Ack(Ack::decode(input)?),
        kind::TRUNCATED => Message::Truncated(Truncated::decode(input)?),
        kind::ERROR => Message::Error(Failure::decode(input)?),
        kind::GOAWAY => {
            let go_away = GoAway { reconnect_after_ms: input.u32()? };
            zeros(input, 4)?;
            Message::GoAway(go_away)
        }
        _ => return Err(FormatError::Invalid("frame type")),
    })
}

impl Hello {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&HELLO_MAGIC);
        put_u16(out, self.versions.min);
        put_u16(out, self.versions.max);
        put_u64(out, self.features);
        put_u32(out, self.max_frame);
        put_u32(out, 0);
        put_node(out, self.node);
        out.extend_from_slice(&self.nonce);
        self.authentication.encode(out);
        put_text(out, &self.agent, AGENT_BYTES_MAX);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        if input.array()? != HELLO_MAGIC {
            return Err(FormatError::Magic);
        }
        let versions = VersionRange { min: input.u16()?, max: input.u16()? };
        let features = input.u64()?;
        let max_frame = input.u32()?;
        input.u32()?;
        let node = node(input)?;
        let nonce = input.array()?;
        let authentication = Authentication::decode(input)?;
        let agent = text(input, AGENT_BYTES_MAX, "agent")?;
        if max_frame < FRAME_BYTES_MIN {
            return Err(FormatError::Invalid("frame limit"));
        }
        Ok(Self { versions, features, max_frame, node, nonce, authentication, agent })
    }
}

const AUTH_NONE: u16 = 0;
const AUTH_TOKEN: u16 = 1;

impl Authentication {
    fn encode(&self, out: &mut Vec<u8>) {
        let (kind, bytes) = match self {
            Self::None => (AUTH_NONE, &[][..]),
            Self::Token(token) => (AUTH_TOKEN, token.as_bytes()),
            Self::Other(kind) => (*kind, &[][..]),
        };
        let bytes = bytes.get(..AUTH_BYTES_MAX).unwrap_or(bytes);
        put_u16(out, kind);
        put_u16(out, u16::try_from(bytes.len()).unwrap_or(0));
        out.extend_from_slice(bytes);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let kind = input.u16()?;
        let len = usize::from(input.u16()?);
        if len > AUTH_BYTES_MAX {
            return Err(FormatError::Invalid("length of the authentication"));
        }
        let bytes = input.bytes(len)?;
        Ok(match kind {
            AUTH_NONE => Self::None,
            AUTH_TOKEN => Self::Token(Presented::new(bytes)),
            other => Self::Other(other),
        })
    }
}

impl Welcome {
    fn encode(&self, out: &mut Vec<u8>) {
        put_u16(out, self.version);
        put_u16(out, self.heartbeat_ms);
        put_u32(out, self.max_frame);
        put_u64(out, self.features);
        out.extend_from_slice(self.node.as_bytes());
        out.extend_from_slice(&self.session);
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(&self.now_us.to_le_bytes());
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let welcome = Self {
            version: input.u16()?,
            heartbeat_ms: input.u16()?,
            max_frame: input.u32()?,
            features: input.u64()?,
            node: NodeId::from_bytes(input.array()?),
            session: input.array()?,
            nonce: input.array()?,
            now_us: input.i64()?,
        };
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&welcome.max_frame) {
            return Err(FormatError::Invalid("frame limit"));
        }
        Ok(welcome)
    }
}

const SUBSCRIBE_WITNESS: u8 = 1;
const SUBSCRIBE_GOES_ON: u8 = 2;
const MODE_VERBATIM: u8 = 0;
const MODE_FILTERED: u8 = 1;

impl Subscribe {
    fn encode(&self, feed: Option<&FeedRequest>, out: &mut Vec<u8>) {
        match &self.from {
            Some(from) => out.extend_from_slice(&from.to_bytes()),
            None => out.extend_from_slice(&[0; Checkpoint::ENCODED_LEN]),
        }
        out.push(if feed.is_some() { MODE_FILTERED } else { MODE_VERBATIM });
        let goes_on = feed.is_some_and(|feed| feed.goes_on);
        let witness = if self.witness.is_some() { SUBSCRIBE_WITNESS } else { 0 };
        out.push(witness | if goes_on { SUBSCRIBE_GOES_ON } else { 0 });
        put_u16(out, 0);
        put_u32(out, self.window_bytes);
        let witness = self.witness.unwrap_or(Witness {
            offset: 0,
            position: Position::START,
            chain: Chain::default(),
        });
        put_u64(out, witness.offset);
        put_u64(out, witness.position.get());
        out.extend_from_slice(witness.chain.as_bytes());
        match feed {
            Some(feed) => feed.terms.encode(out),
            None => put_u64(out, 0),
        }
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Message<'static>, FormatError> {
        let from = input.array()?;
        let from =
            if from == [0; Checkpoint::ENCODED_LEN] { None } else { Some(checkpoint(&from)?) };
        let mode = input.u8()?;
        let allowed = match mode {
            MODE_VERBATIM => SUBSCRIBE_WITNESS,
            MODE_FILTERED => SUBSCRIBE_GOES_ON,
            _ => return Err(FormatError::Invalid("mode")),
        };
        let flags = input.u8()?;
        if flags & !allowed != 0 {
            return Err(FormatError::Invalid("subscription flags"));
        }
        zeros(input, 2)?;
        let window_bytes = input.u32()?;
        let witness = Witness {
            offset: input.u64()?,
            position: Position::new(input.u64()?),
            chain: Chain::from_bytes(input.array()?),
        };
        let goes_on = flags & SUBSCRIBE_GOES_ON != 0;
        let feed = match mode {
            MODE_FILTERED => Some(FeedRequest { terms: FeedTerms::decode(input)?, goes_on }),
            _ => zeros(input, 8).map(|()| None)?,
        };
        let witness = (flags & SUBSCRIBE_WITNESS != 0).then_some(witness);
        if window_bytes == 0 {
            return Err(FormatError::Invalid("window"));
        }
        if from.is_none() && witness.is_some() {
            return Err(FormatError::Invalid("witness without a journal"));
        }
        if from.is_none() && goes_on {
            return Err(FormatError::Invalid("feed that goes on from nowhere"));
        }
        let subscribe = Self { from, witness, window_bytes };
        Ok(match feed {
            Some(feed) => Message::SubscribeFeed(subscribe, feed),
            None => Message::Subscribe(subscribe),
        })
    }
}

impl Subscribed {
    fn encode(&self, out: &mut Vec<u8>) {
        let path = self.path.get(..PATH_NODES_MAX).unwrap_or(&self.path);
        out.extend_from_slice(&self.end.to_bytes());
        put_u64(out, self.first_position.get());
        put_u64(out, path.len() as u64);
        path.iter().for_each(|node| out.extend_from_slice(node.as_bytes()));
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let end = checkpoint(&input.array()?)?;
        let first_position = Position::new(input.u64()?);
        let nodes = input.u64()?;
        if nodes > PATH_NODES_MAX as u64 {
            return Err(FormatError::Invalid("number of nodes in the path"));
        }
        let path = (0..nodes)
            .map(|_| input.array().map(NodeId::from_bytes))
            .collect::<Result<_, FormatError>>()?;
        Ok(Self { end, first_position, path })
    }
}

impl Divergence {
    const fn number(self) -> u8 {
        match self {
            Self::Ahead => 1,
            Self::Fork => 2,
            Self::Foreign => 3,
        }
    }

    const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Ahead),
            2 => Some(Self::Fork),
            3 => Some(Self::Foreign),
            _ => None,
        }
    }
}

const DIVERGED_AT_WITNESS: u8 = 1;
const DIVERGED_COMMON: u8 = 2;

impl Diverged {
    fn encode(&self, out: &mut Vec<u8>) {
        let witness = if self.at_witness { DIVERGED_AT_WITNESS } else { 0 };
        let known = if self.common.is_some() { DIVERGED_COMMON } else { 0 };
        out.push(self.divergence.number());
        out.push(witness | known);
        out.push(self.speaker.number());
        out.extend_from_slice(&[0; 5]);
        put_u64(out, self.common.map_or(UNKNOWN, |common| common.position.get()));
        out.extend_from_slice(self.common.map_or(Chain::default(), |c| c.chain).as_bytes());
        out.extend_from_slice(&self.end.to_bytes());
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let divergence =
            Divergence::from_number(input.u8()?).ok_or(FormatError::Invalid("divergence"))?;
        let flags = input.u8()?;
        if flags & !(DIVERGED_AT_WITNESS | DIVERGED_COMMON) != 0 {
            return Err(FormatError::Invalid("divergence flags"));
        }
        let speaker = Speaker::decode(input)?;
        zeros(input, 5)?;
        let common = Common {
            position: Position::new(input.u64()?),
            chain: Chain::from_bytes(input.array()?),
        };
        Ok(Self {
            divergence,
            at_witness: flags & DIVERGED_AT_WITNESS != 0,
            speaker,
            common: (flags & DIVERGED_COMMON != 0).then_some(common),
            end: checkpoint(&input.array()?)?,
        })
    }
}

/// How many positions are asked for, or answered.
fn probe_count(input: &mut Decoder<'_>) -> Result<u64, FormatError> {
    let count = input.u64()?;
    if count == 0 || count > PROBE_POSITIONS_MAX as u64 {
        return Err(FormatError::Invalid("number of positions"));
    }
    Ok(count)
}

impl Probe {
    fn encode(&self, out: &mut Vec<u8>) {
        let positions = self.positions.get(..PROBE_POSITIONS_MAX).unwrap_or(&self.positions);
        put_u64(out, positions.len() as u64);
        positions.iter().for_each(|position| put_u64(out, position.get()));
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let count = probe_count(input)?;
        let position = |_| input.u64().map(Position::new);
        Ok(Self { positions: (0..count).map(position).collect::<Result<_, _>>()? })
    }
}

impl Probed {
    fn encode(&self, out: &mut Vec<u8>) {
        let ends = self.ends.get(..PROBE_POSITIONS_MAX).unwrap_or(&self.ends);
        put_u64(out, ends.len() as u64);
        let unknown = Link { offset: 0, position: Position::new(UNKNOWN), chain: Chain::default() };
        for end in ends.iter().map(|end| end.unwrap_or(unknown)) {
            put_u64(out, end.offset);
            put_u64(out, end.position.get());
            out.extend_from_slice(end.chain.as_bytes());
        }
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let count = probe_count(input)?;
        let end = |_| {
            let (offset, position) = (input.u64()?, Position::new(input.u64()?));
            let link = Link { offset, position, chain: Chain::from_bytes(input.array()?) };
            if position.get() != UNKNOWN {
                return Ok(Some(link));
            }
            if link.offset != 0 || link.chain != Chain::default() {
                return Err(FormatError::Invalid("place that is not known"));
            }
            Ok(None)
        };
        Ok(Self { ends: (0..count).map(end).collect::<Result<_, _>>()? })
    }
}

impl Truncated {
    fn encode(&self, out: &mut Vec<u8>) {
        let sources = self.sources.get(..SOURCES_MAX).unwrap_or(&self.sources);
        out.extend_from_slice(&self.start.to_bytes());
        put_u16(out, sources.len() as u16);
        sources.iter().for_each(|source| put_text(out, source, SOURCE_BYTES_MAX));
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let start = checkpoint(&input.array()?)?;
        let count = usize::from(input.u16()?);
        if count > SOURCES_MAX {
            return Err(FormatError::Invalid("number of sources"));
        }
        let source = |_| text(input, SOURCE_BYTES_MAX, "source");
        Ok(Self { start, sources: (0..count).map(source).collect::<Result<_, _>>()? })
    }
}

impl<'a> Data<'a> {
    fn encode_fixed(&self, out: &mut Vec<u8>) {
        put_u64(out, self.offset);
        put_u64(out, self.origin_end.offset);
        put_u64(out, self.origin_end.position.get());
        put_u64(out, 0);
    }

    fn decode(continued: bool, input: &mut Decoder<'a>) -> Result<Self, FormatError> {
        let offset = input.u64()?;
        let origin_end = OriginEnd { offset: input.u64()?, position: Position::new(input.u64()?) };
        zeros(input, 8)?;
        let bytes = input.bytes(input.rest().len())?;
        let end = offset.checked_add(bytes.len() as u64).ok_or(FormatError::Invalid("offset"))?;
        if bytes.is_empty() {
            return Err(FormatError::Truncated);
        }
        if end > origin_end.offset {
            return Err(FormatError::Invalid("durable end in front of the bytes sent"));
        }
        Ok(Self { offset, origin_end, continued, bytes })
    }
}

impl Heartbeat {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.end.to_bytes());
        out.extend_from_slice(&self.now_us.to_le_bytes());
        put_u64(out, self.speaker.number().into());
        put_u64(out, self.echo);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let (end, now_us) = (checkpoint(&input.array()?)?, input.i64()?);
        let speaker = Speaker::decode(input)?;
        zeros(input, 7)?;
        Ok(Self { end, now_us, speaker, echo: input.u64()? })
    }
}

impl Ack {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.mirrored.to_bytes());
        put_u64(out, self.applied.map_or(UNKNOWN, Position::get));
        put_u64(out, self.echo);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let mirrored = checkpoint(&input.array()?)?;
        let applied = input.u64()?;
        let applied = (applied != UNKNOWN).then_some(Position::new(applied));
        Ok(Self { mirrored, applied, echo: input.u64()? })
    }
}

impl Failure {
    fn encode(&self, out: &mut Vec<u8>) {
        put_u16(out, self.code.0);
        put_u16(out, self.versions.min);
        put_u16(out, self.versions.max);
        put_u16(out, 0);
        put_u32(out, self.retry_after_ms);
        put_u64(out, self.position.map_or(UNKNOWN, Position::get));
        put_text(out, &self.detail, DETAIL_BYTES_MAX);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let code = ErrorCode(input.u16()?);
        let versions = VersionRange { min: input.u16()?, max: input.u16()? };
        zeros(input, 2)?;
        let retry_after_ms = input.u32()?;
        let position = input.u64()?;
        Ok(Self {
            code,
            retry_after_ms,
            position: (position != UNKNOWN).then_some(Position::new(position)),
            versions,
            detail: text(input, DETAIL_BYTES_MAX, "detail")?,
        })
    }
}

fn checkpoint(bytes: &[u8; Checkpoint::ENCODED_LEN]) -> Result<Checkpoint, FormatError> {
    let checkpoint = Checkpoint::from_bytes(bytes).ok_or(FormatError::Invalid("checkpoint"))?;
    if checkpoint.journal == JournalId::from_bytes([0; 16]) {
        return Err(FormatError::Invalid("journal id"));
    }
    Ok(checkpoint)
}

fn node(input: &mut Decoder<'_>) -> Result<Option<NodeId>, FormatError> {
    let bytes: [u8; 16] = input.array()?;
    Ok((bytes != [0; 16]).then_some(NodeId::from_bytes(bytes)))
}

fn put_node(out: &mut Vec<u8>, node: Option<NodeId>) {
    out.extend_from_slice(node.map_or([0; 16], |node| *node.as_bytes()).as_slice());
}

/// A text with its length in front, for people: no control characters.
fn text(input: &mut Decoder<'_>, max: usize, what: &'static str) -> Result<String, FormatError> {
    let len = usize::from(input.u16()?);
    if len > max {
        return Err(FormatError::Invalid(what));
    }
    let text = input.text(len, what)?;
    if text.chars().any(char::is_control) {
        return Err(FormatError::Invalid(what));
    }
    Ok(text.to_owned())
}

fn put_text(out: &mut Vec<u8>, text: &str, max: usize) {
    // It may end up on somebody's terminal.
    let text = text.replace(char::is_control, " ");
    let end = (0..=text.len().min(max)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let text = text.get(..end).unwrap_or_default();
    put_u16(out, u16::try_from(text.len()).unwrap_or(0));
    out.extend_from_slice(text.as_bytes());
}

fn zeros(input: &mut Decoder<'_>, len: usize) -> Result<(), FormatError> {
    if input.bytes(len)?.iter().any(|&byte| byte != 0) {
        return Err(FormatError::Invalid("reserved field that is not zero"));
    }
    Ok(())
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// The length of the batch at the front of `bytes`, as its not yet verified header says; `None` if the
/// bytes can't be the front of a batch. Whoever stores the batch verifies it.
pub(crate) fn claimed_batch_len(bytes: &[u8]) -> Option<usize> {
    let padded_len = bytes.get(60..).and_then(<[u8]>::first_chunk::<4>)?;
    let len = u32::from_le_bytes(*padded_len);
    let min = crate::format::batch::BATCH_HEADER_BYTES as u32;
    (min..=PADDED_BYTES_LIMIT).contains(&len).then_some(len as usize)
}

#[cfg(test)]
mod tests;
