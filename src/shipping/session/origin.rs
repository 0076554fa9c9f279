//! The origin's end of a session.

use std::time::Instant;

use super::{Deadline, Deadlines, DivergedAt, Now, SessionEnd, Violation};
use crate::format::batch::BatchRef;
use crate::format::files::{Mark, Witness};
use crate::format::leases::Lease;
use crate::format::segment::SegmentPage;
use crate::journal::Comparison;
use crate::position::{Checkpoint, JournalId, NodeId, Position};
use crate::shipping::message::{
    Ack, DATA_FIXED_BYTES, Data, Diverged, Divergence, ErrorCode, FEATURES, FRAME_BYTES_MAX,
    Failure, FrameReader, FrameWriter, GoAway, Heartbeat, Hello, Message, OriginEnd,
    PROTOCOL_VERSIONS, Subscribe, Subscribed, Welcome,
};

/// There is nothing to come from a closed journal: whoever has all of it needn't hurry back.
const CLOSED_RECONNECT_MS: u32 = 1000;

/// Why the origin can't read its own journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceError {
    /// Damage.
    Corrupt {
        /// The position of the first event that can't be read.
        position: Position,
    },
    /// The events there were removed.
    Truncated {
        /// The position of the first event that is left.
        first: Position,
    },
    /// The disk fails, or the file is of a kind that can't be read.
    Storage,
}

impl SourceError {
    fn to_failure(self) -> Failure {
        match self {
            Self::Corrupt { position } => Failure {
                position: Some(position),
                ..Failure::new(ErrorCode::CORRUPT, "the journal is damaged here")
            },
            Self::Truncated { first } => Failure {
                position: Some(first),
                ..Failure::new(ErrorCode::TRUNCATED, "the events in front of here were removed")
            },
            Self::Storage => Failure::new(ErrorCode::STORAGE, "the journal can't be read"),
        }
    }
}

/// The reading side of the journal that is shipped, as far as a session needs it.
pub(crate) trait Source {
    /// The durable end.
    fn end(&self) -> Checkpoint;
    /// The position of the first event that there still is.
    fn first_position(&self) -> Position;
    /// The journal is closed: its end won't move any more.
    fn is_closed(&self) -> bool;
    /// Is the checkpoint a batch end of this history?
    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError>;
    /// The same for a witness, which has no incarnation.
    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError>;
    /// Reads on from this position, which is a batch end.
    fn seek(&mut self, from: Position) -> Result<(), SourceError>;
    /// The next durable batch, verified, and the header page if it is its segment's first.
    fn next_batch(&mut self) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError>;
}

/// What an origin's session is told at its beginning.
#[derive(Clone, Debug)]
pub(crate) struct OriginConfig {
    pub(crate) node: NodeId,
    pub(crate) session: [u8; 16],
    pub(crate) deadlines: Deadlines,
    /// The longest frame that it takes part in.
    pub(crate) max_frame: u32,
    /// It fills a DATA frame up to about this many bytes.
    pub(crate) data_bytes: usize,
    /// It grants no larger window.
    pub(crate) max_window_bytes: u32,
}

/// What the caller has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Write what was put out, then ask again.
    Write,
    /// Ask again once the durable end is behind `past`, bytes have arrived, or it is `until`.
    Wait {
        /// `None`: the durable end doesn't matter at present.
        past: Option<Position>,
        /// The next deadline.
        until: Instant,
    },
    /// Close the connection.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitHello,
    AwaitSubscribe,
    /// The subscription is there and has not been compared yet.
    Judging(Subscribe),
    Streaming,
    Ended,
}

/// A look at a session from outside.
#[derive(Clone, Debug, Default)]
pub(crate) struct OriginStatus {
    pub(crate) node: Option<NodeId>,
    pub(crate) agent: String,
    pub(crate) streaming: bool,
    pub(crate) sent: Option<Checkpoint>,
    pub(crate) acked: Option<Checkpoint>,
    pub(crate) applied: Option<Position>,
}

/// The origin's end of a session. See the [module](super) for states and invariants.
#[derive(Debug)]
pub(crate) struct OriginSession {
    config: OriginConfig,
    reader: FrameReader,
    state: State,
    /// Control frames that wait to be written.
    control: Vec<u8>,
    handshake_until: Instant,
    heard_at: Instant,
    heartbeat_at: Instant,
    max_frame: u32,
    window_bytes: u64,
    status: OriginStatus,
    end: Option<SessionEnd>,
}

impl OriginSession {
    pub(crate) fn new(config: OriginConfig, now: Now) -> Self {
        Self {
            reader: FrameReader::new(),
            state: State::AwaitHello,
            control: Vec::new(),
            handshake_until: now.at + config.deadlines.handshake,
            heard_at: now.at,
            heartbeat_at: now.at,
            max_frame: config.max_frame,
            window_bytes: 0,
            status: OriginStatus::default(),
            end: None,
            config,
        }
    }

    pub(crate) const fn status(&self) -> &OriginStatus {
        &self.status
    }

    pub(crate) const fn is_in_handshake(&self) -> bool {
        matches!(self.state, State::AwaitHello | State::AwaitSubscribe | State::Judging(_))
    }

    /// Why the session ended, once it has.
    pub(crate) const fn end(&self) -> Option<&SessionEnd> {
        self.end.as_ref()
    }

    /// The peer closed its side.
    pub(crate) fn on_closed(&mut self) {
        self.finish(SessionEnd::Disconnected);
    }

    /// This side wants to end the session in good order.
    pub(crate) fn shut_down(&mut self) {
        self.go_away(0);
    }

    fn go_away(&mut self, reconnect_after_ms: u32) {
        if self.end.is_none() {
            self.say(&Message::GoAway(GoAway { reconnect_after_ms }));
            self.finish(SessionEnd::ShuttingDown);
        }
    }

    /// Bytes have arrived.
    pub(crate) fn on_bytes(&mut self, bytes: &[u8], now: Now) {
        if self.end.is_some() {
            return;
        }
        self.heard_at = now.at;
        let mut reader = std::mem::take(&mut self.reader);
        reader.push(bytes);
        while self.end.is_none() {
            match reader.next_message() {
                Ok(Some(message)) => self.on_message(message, now),
                Ok(None) => break,
                Err(error) => self.violated(error.into()),
            }
        }
        self.reader = reader;
    }

    fn on_message(&mut self, message: Message<'_>, now: Now) {
        match (self.state, message) {
            (_, Message::Error(failure)) => self.finish(SessionEnd::Peer(failure)),
            (_, Message::GoAway(go_away)) => self.finish(SessionEnd::GoAway(go_away)),
            (State::AwaitHello, Message::Hello(hello)) => self.welcome(hello, now),
            (State::AwaitSubscribe, Message::Subscribe(subscribe)) => {
                self.state = State::Judging(subscribe);
            }
            (State::Streaming, Message::Ack(ack)) => self.acknowledged(&ack),
            (_, message) => {
                let (frame, expected) = (message.name(), self.expected());
                self.violated(Violation::Unexpected { frame, expected });
            }
        }
    }

    const fn expected(&self) -> &'static str {
        match self.state {
            State::AwaitHello => "HELLO",
            State::AwaitSubscribe => "SUBSCRIBE",
            State::Judging(_) => "the answer to SUBSCRIBE",
            State::Streaming | State::Ended => "ACK",
        }
    }

    fn welcome(&mut self, hello: Hello, now: Now) {
        let Some(version) = hello.versions.common(PROTOCOL_VERSIONS) else {
            self.say(&Message::Error(Failure::new(ErrorCode::VERSION, "")));
            return self.finish(SessionEnd::Version(hello.versions));
        };
        self.max_frame = self.config.max_frame.min(hello.max_frame).min(FRAME_BYTES_MAX);
        self.say(&Message::Welcome(Welcome {
            version,
            heartbeat_ms: u16::try_from(self.config.deadlines.heartbeat.as_millis())
                .unwrap_or(u16::MAX),
            max_frame: self.max_frame,
            features: hello.features & FEATURES,
            node: self.config.node,
            session: self.config.session,
            nonce: hello.nonce,
            now_us: now.unix_us,
        }));
        self.status.node = hello.node;
        self.status.agent = hello.agent;
        self.state = State::AwaitSubscribe;
    }

    fn acknowledged(&mut self, ack: &Ack) {
        let from = self.status.acked.map_or(0, |acked| acked.offset);
        let sent = self.status.sent.map_or(0, |sent| sent.offset);
        let acked = ack.mirrored.offset;
        let ours = self.status.sent.is_some_and(|sent| sent.journal == ack.mirrored.journal);
        if !ours || !(from..=sent).contains(&acked) {
            return self.violated(Violation::Ack { acked, from, sent });
        }
        self.status.acked = Some(ack.mirrored);
        self.status.applied = ack.applied.or(self.status.applied);
    }

    /// What the subscriber needs the journal for, once it has subscribed.
    pub(crate) fn lease(&self) -> Option<Lease> {
        let acked = self.status.acked.filter(|_| self.status.streaming)?;
        let (id, nameless) = match self.status.node {
            Some(node) => (*node.as_bytes(), false),
            None => (self.config.session, true),
        };
        let (position, offset) = (acked.position, acked.offset);
        Some(Lease { id, nameless, position, offset, heard_at_us: 0 })
    }

    /// What to do next. Everything that is to be written is appended to `out`.
    pub(crate) fn poll(&mut self, source: &mut impl Source, now: Now, out: &mut Vec<u8>) -> Next {
        self.check_deadlines(now);
        if let State::Judging(subscribe) = self.state {
            self.judge(&subscribe, source, now);
        }
        if self.end.is_none() && self.state == State::Streaming {
            self.stream(source, now, out);
        }
        out.append(&mut self.control);
        if !out.is_empty() {
            return Next::Write;
        }
        if self.end.is_some() {
            return Next::Close;
        }
        Next::Wait {
            past: self.window_is_open().then(|| self.sent_position()),
            until: self.next_deadline(),
        }
    }

    fn window_is_open(&self) -> bool {
        let sent = self.status.sent.map_or(0, |sent| sent.offset);
        let acked = self.status.acked.map_or(0, |acked| acked.offset);
        self.state == State::Streaming && sent.saturating_sub(acked) < self.window_bytes
    }

    fn sent_position(&self) -> Position {
        self.status.sent.map_or(Position::START, |sent| sent.position)
    }

    fn next_deadline(&self) -> Instant {
        let silence_until = self.heard_at + self.config.deadlines.silence;
        match self.state {
            State::Streaming => silence_until.min(self.heartbeat_at),
            _ => self.handshake_until,
        }
    }

    fn check_deadlines(&mut self, now: Now) {
        let deadline = match self.state {
            State::AwaitHello | State::AwaitSubscribe if now.at >= self.handshake_until => {
                Deadline::Handshake
            }
            State::Streaming if now.at >= self.heard_at + self.config.deadlines.silence => {
                Deadline::Silence
            }
            _ => return,
        };
        self.say(&Message::Error(Failure::new(ErrorCode::TIMEOUT, deadline.to_string())));
        self.finish(SessionEnd::Timeout(deadline));
    }

    /// Compares the mirror's end and its witness with this journal; nothing is sent before.
    fn judge(&mut self, subscribe: &Subscribe, source: &mut impl Source, now: Now) {
        let end = source.end();
        let divergence = match find_divergence(subscribe, source) {
            Ok(divergence) => divergence,
            Err(error) => return self.fail(error),
        };
        if let Some((divergence, at_witness)) = divergence {
            self.say(&Message::Diverged(Diverged { divergence, at_witness, common: None, end }));
            let at = DivergedAt { divergence, at_witness, common: None, origin: end };
            return self.finish(SessionEnd::Diverged(at));
        }
        let from = subscribe.from.unwrap_or_else(|| Mark::start(end.journal).end);
        if let Err(error) = source.seek(from.position) {
            return self.fail(error);
        }
        self.status.sent = Some(from);
        self.status.acked = Some(from);
        self.status.streaming = true;
        self.window_bytes = u64::from(subscribe.window_bytes.min(self.config.max_window_bytes));
        self.state = State::Streaming;
        self.heartbeat_at = now.at + self.config.deadlines.heartbeat;
        self.say(&Message::Subscribed(Subscribed {
            end,
            first_position: source.first_position(),
            path: vec![self.config.node],
        }));
    }

    /// Appends what there is to send: a heartbeat if it is due, and as many batches as the window and one
    /// frame take.
    fn stream(&mut self, source: &mut impl Source, now: Now, out: &mut Vec<u8>) {
        out.append(&mut self.control);
        if now.at >= self.heartbeat_at {
            self.heartbeat_at = now.at + self.config.deadlines.heartbeat;
            let end = source.end();
            Message::Heartbeat(Heartbeat { end, now_us: now.unix_us }).encode(out);
        }
        let closed = source.is_closed();
        let before = out.len();
        if let Err(error) = self.send_batches(source, out) {
            return self.fail(error);
        }
        let nothing_left = out.len() == before && self.window_is_open();
        if closed && nothing_left {
            self.go_away(CLOSED_RECONNECT_MS);
        }
    }

    fn send_batches(
        &mut self,
        source: &mut impl Source,
        out: &mut Vec<u8>,
    ) -> Result<(), SourceError> {
        let mut frames = DataFrames::new(out, OriginEnd::from(&source.end()), self.max_frame);
        let mut result = Ok(());
        while frames.len() < self.config.data_bytes && self.window_is_open() {
            let Some(sent) = self.status.sent else { break };
            match source.next_batch() {
                Ok(None) => break,
                Ok(Some((batch, page))) if follows(&batch, &sent) => {
                    page.iter().for_each(|page| frames.segment(page));
                    frames.batch(&batch);
                    self.status.sent = Some(end_of(&batch, sent.journal));
                }
                Ok(Some(_)) => {
                    result = Err(SourceError::Corrupt { position: sent.position });
                    break;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        frames.close();
        result
    }

    fn fail(&mut self, error: SourceError) {
        let failure = error.to_failure();
        self.say(&Message::Error(failure.clone()));
        self.finish(SessionEnd::Own(failure));
    }

    fn violated(&mut self, violation: Violation) {
        self.say(&Message::Error(violation.to_failure()));
        self.finish(SessionEnd::Violation(violation));
    }

    fn say(&mut self, message: &Message<'_>) {
        message.encode(&mut self.control);
    }

    fn finish(&mut self, end: SessionEnd) {
        self.state = State::Ended;
        self.end.get_or_insert(end);
    }
}

/// In what way the mirror's history isn't a beginning of this journal's, and whether that shows at its
/// witness.
fn find_divergence(
    subscribe: &Subscribe,
    source: &mut impl Source,
) -> Result<Option<(Divergence, bool)>, SourceError> {
    let Some(from) = &subscribe.from else { return Ok(None) };
    if let Some(divergence) = divergence(source.compare(from)?) {
        return Ok(Some((divergence, false)));
    }
    let Some(witness) = &subscribe.witness else { return Ok(None) };
    Ok(divergence(source.compare_witness(witness)?).map(|divergence| (divergence, true)))
}

const fn divergence(comparison: Comparison) -> Option<Divergence> {
    match comparison {
        Comparison::Equal => None,
        Comparison::Differs => Some(Divergence::Fork),
        Comparison::Ahead => Some(Divergence::Ahead),
        Comparison::Foreign => Some(Divergence::Foreign),
    }
}

fn follows(batch: &BatchRef<'_>, sent: &Checkpoint) -> bool {
    batch.header.offset == sent.offset && batch.header.base_position == sent.position
}

/// The checkpoint at the end of a batch.
pub(crate) fn end_of(batch: &BatchRef<'_>, journal: JournalId) -> Checkpoint {
    Checkpoint {
        journal,
        epoch: batch.header.epoch,
        incarnation: batch.header.incarnation,
        offset: batch.header.end_offset(),
        position: batch.header.end_position(),
        chain: batch.header.chain,
    }
}

/// Packs batches into DATA frames: whole ones together, one that is too long for a frame into several.
struct DataFrames<'a> {
    out: &'a mut Vec<u8>,
    begin: usize,
    open: Option<(FrameWriter, u64)>,
    /// The durable end as of the beginning, or the end of the last batch if that lies behind it.
    origin_end: OriginEnd,
    payload_max: usize,
}

impl<'a> DataFrames<'a> {
    fn new(out: &'a mut Vec<u8>, origin_end: OriginEnd, max_frame: u32) -> Self {
        let payload_max = max_frame.saturating_sub(DATA_FIXED_BYTES).max(1) as usize;
        Self { begin: out.len(), out, open: None, origin_end, payload_max }
    }

    /// How much has been packed.
    fn len(&self) -> usize {
        self.out.len() - self.begin
    }

    fn segment(&mut self, page: &SegmentPage) {
        self.close();
        Message::Segment(&page.bytes()).encode(self.out);
    }

    fn batch(&mut self, batch: &BatchRef<'_>) {
        let held = self.open.as_ref().map_or(0, |(frame, _)| frame.data_len(self.out));
        if held + batch.bytes().len() > self.payload_max {
            self.close();
        }
        if batch.header.end_offset() > self.origin_end.offset {
            let (offset, position) = (batch.header.end_offset(), batch.header.end_position());
            self.origin_end = OriginEnd { offset, position };
        }
        if batch.bytes().len() > self.payload_max {
            return self.parts(batch);
        }
        self.open.get_or_insert_with(|| (FrameWriter::begin_data(self.out), batch.header.offset));
        self.out.extend_from_slice(batch.bytes());
    }

    fn parts(&mut self, batch: &BatchRef<'_>) {
        let mut offset = batch.header.offset;
        for bytes in batch.bytes().chunks(self.payload_max) {
            let next = offset + bytes.len() as u64;
            let continued = next < batch.header.end_offset();
            let origin_end = self.origin_end;
            Message::Data(Data { offset, origin_end, continued, bytes }).encode(self.out);
            offset = next;
        }
    }

    fn close(&mut self) {
        if let Some((frame, offset)) = self.open.take() {
            let origin_end = self.origin_end;
            frame.finish_data(self.out, &Data { offset, origin_end, continued: false, bytes: &[] });
        }
    }
}
