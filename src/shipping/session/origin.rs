//! The origin's end of a session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;

use self::feeding::Feeding;
use super::feed::{self, Sieve, Sifted, Span};
use super::frames::{self, Limits, Piece, Place};
use super::{Deadline, Deadlines, DivergedAt, Now, Output, SessionEnd, Violation};
use crate::format::batch::{BatchRef, Link};
use crate::format::files::{Mark, Role, Witness};
use crate::format::leases::Lease;
use crate::format::segment::SegmentPage;
use crate::journal::Comparison;
use crate::position::{Checkpoint, JournalId, NodeId, Position};
use crate::shipping::message::{
    Ack, CONTROL_BYTES_MAX, Common, Diverged, Divergence, ErrorCode, FEATURE_FILTERED,
    FEATURE_PROBE, FEATURE_TRUNCATED, FEATURES, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, Failure,
    FeedRequest, FeedTerms, FrameReader, GoAway, Heartbeat, Hello, Message, PATH_NODES_MAX,
    PROTOCOL_VERSIONS, Probed, Speaker, Subscribe, Subscribed, Truncated, Welcome,
};
use crate::shipping::observe::EndReason;
use crate::shipping::security::Gate;
use crate::shipping::shape::Shape;

mod feeding;

/// There is nothing to come from a closed journal: whoever has all of it needn't hurry back.
const CLOSED_RECONNECT_MS: u32 = 1000;
/// A mirror that is behind its subscriber may soon have caught up.
const NOT_YET_RETRY_MS: u32 = 1000;
/// Somebody has to mend the service first.
const SHAPE_RETRY_MS: u32 = 5000;
/// Here, too.
const PANIC_RETRY_MS: u32 = 5000;
/// A search for the last common batch end takes 11 questions at the most.
const PROBES_MAX: u32 = 16;

/// A peer that hasn't said HELLO may have sent so much: one frame.
const HELLO_BYTES_MAX: usize = FRAME_HEADER_BYTES + CONTROL_BYTES_MAX as usize;
/// And one that hasn't been granted a subscription so much.
const HANDSHAKE_BYTES_MAX: usize = 16 << 10;

/// Why the origin can't send its own journal.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The event can't be published in the service's shape.
    Shape {
        /// Its position.
        position: Position,
        /// Why.
        reason: Arc<str>,
    },
}

impl SourceError {
    fn to_failure(&self) -> Failure {
        match *self {
            Self::Corrupt { position } => Failure {
                position: Some(position),
                ..Failure::new(ErrorCode::CORRUPT, "the journal is damaged here")
            },
            Self::Truncated { first } => Failure {
                position: Some(first),
                ..Failure::new(ErrorCode::TRUNCATED, "the events in front of here were removed")
            },
            Self::Storage => Failure::new(ErrorCode::STORAGE, "the journal can't be read"),
            Self::Shape { position, ref reason } => Failure {
                position: Some(position),
                retry_after_ms: SHAPE_RETRY_MS,
                ..Failure::new(ErrorCode::SHAPE, &**reason)
            },
        }
    }
}

/// The reading side of the journal that is shipped, as far as a session needs it.
pub(crate) trait Source {
    /// The durable end.
    fn end(&self) -> Checkpoint;
    /// Where what there still is begins.
    fn start(&self) -> Checkpoint;
    /// The journal is closed: its end won't move any more.
    fn is_closed(&self) -> bool;
    /// Is the checkpoint a batch end of this history?
    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError>;
    /// The same for a witness, which has no incarnation.
    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError>;
    /// The last batch end at or in front of this position; `None` if it isn't known any more.
    fn batch_end_at(&mut self, position: Position) -> Result<Option<Link>, SourceError>;
    /// Whether it can be read on from this position, which is a batch end.
    fn seek(&mut self, from: Position) -> Result<(), SourceError>;
    /// The durable batch behind `at`, verified, and the header page if it is its segment's first.
    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError>;
    /// Who it is that serves it, and what they hear of its origin at present.
    fn speaker(&self) -> Speaker {
        Speaker::Origin
    }
    /// Whether it may be asked for what has to be read from the disk.
    fn may_wait(&self) -> bool {
        true
    }
    /// What follows a place, packed into frames.
    fn supply(&mut self, from: &Place, limits: &Limits) -> Result<Supply, SourceError> {
        Ok(frames::pack(self, from, limits)?.map_or(Supply::Nothing, Supply::Piece))
    }
    /// What follows a batch end, sifted for a feed.
    fn sift(&mut self, span: &Span, sieve: &Arc<Sieve>) -> Result<Sifted, SourceError> {
        feed::sift(self, span, sieve)
    }
}

/// What a source has behind a place.
#[derive(Debug)]
pub(crate) enum Supply {
    Piece(Piece),
    /// That is the durable end.
    Nothing,
    /// There is something, and this source would have to read it from the disk.
    OnDisk,
}

/// What a subscriber is told of the journal that it gets.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    /// Only an origin knows that events are lost; a mirror may be behind.
    pub(crate) role: Role,
    /// The nodes that the journal comes through, the one that serves it last.
    pub(crate) path: Vec<NodeId>,
}

/// What an origin's session is told at its beginning.
#[derive(Clone, Debug)]
pub(crate) struct OriginConfig {
    pub(crate) node: NodeId,
    /// What is served until something else is offered: the node's own journal.
    pub(crate) role: Role,
    /// Where events may be found that were removed here, as text.
    pub(crate) sources: Vec<String>,
    pub(crate) session: [u8; 16],
    pub(crate) deadlines: Deadlines,
    /// The longest frame that it takes part in.
    pub(crate) max_frame: u32,
    /// It fills a DATA frame up to about this many bytes.
    pub(crate) data_bytes: usize,
    /// It grants no larger window.
    pub(crate) max_window_bytes: u32,
    /// A peer may send so many acknowledgements a second that say nothing new.
    pub(crate) idle_acks_max: u32,
    /// Who is let in, and what for.
    pub(crate) gate: Gate,
    /// In what shape events are published in filtered feeds; `None`: as they are stored.
    pub(crate) shape: Option<Shape>,
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
    /// Ask again with a source that may wait for the disk.
    OnDisk,
    /// Close the connection.
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitHello,
    AwaitSubscribe,
    /// The subscription is there and has not been compared yet.
    Judging(Subscribe),
    /// The histories differ. The mirror may ask where they part.
    Diverged(DivergedAt),
    Streaming,
    Ended,
}

/// A look at a session from outside.
#[derive(Clone, Debug, Default)]
pub(crate) struct OriginStatus {
    pub(crate) node: Option<NodeId>,
    /// Its name in the access list.
    pub(crate) peer: Option<String>,
    pub(crate) agent: String,
    pub(crate) streaming: bool,
    pub(crate) sent: Option<Checkpoint>,
    pub(crate) acked: Option<Checkpoint>,
    pub(crate) applied: Option<Position>,
    /// What the peer is fed, if it doesn't get the whole journal.
    pub(crate) feed: Option<Arc<FeedTerms>>,
}

/// What came of an attempt to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Streamed {
    Done,
    /// There is more to do, if nothing to be written.
    More,
    /// What comes next has to be read by another source.
    OnDisk,
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
    /// The same in microseconds since 1970.
    heard_at_us: i64,
    /// When the peer got what it had to wait for: nothing can be heard of it before.
    answered_at: Instant,
    /// It was found out by a source that may wait, for however long.
    has_answered: bool,
    heartbeat_at: Instant,
    /// The number of the last acknowledgement, and whether it is to be given back at once.
    echo: (u64, bool),
    max_frame: u32,
    /// The features that are used in this session.
    features: u64,
    /// The positions of a PROBE that has not been answered yet.
    asked: Vec<Position>,
    probes: u32,
    window_bytes: u64,
    /// How much the peer sent before its subscription was granted.
    handshake_bytes: usize,
    /// How many acknowledgements without news have come behind another one, and since when they are counted.
    idle_acks: (u32, Instant),
    /// The last one was without news.
    is_idle: bool,
    /// How much of the batch behind `status.sent` has been sent.
    part: usize,
    offer: Offer,
    /// The feed that was asked for, until it is granted.
    requested: Option<FeedRequest>,
    feeding: Option<Feeding>,
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
            heard_at_us: now.unix_us,
            answered_at: now.at,
            has_answered: false,
            heartbeat_at: now.at,
            echo: (0, false),
            max_frame: config.max_frame,
            features: 0,
            asked: Vec::new(),
            probes: 0,
            window_bytes: 0,
            handshake_bytes: 0,
            idle_acks: (0, now.at),
            is_idle: false,
            part: 0,
            offer: Offer { role: config.role, path: vec![config.node] },
            requested: None,
            feeding: None,
            status: OriginStatus::default(),
            end: None,
            config,
        }
    }

    pub(crate) const fn status(&self) -> &OriginStatus {
        &self.status
    }

    pub(crate) const fn is_in_handshake(&self) -> bool {
        !matches!(self.state, State::Streaming | State::Ended)
    }

    /// Why the session ended, once it has.
    pub(crate) const fn end(&self) -> Option<&SessionEnd> {
        self.end.as_ref()
    }

    /// What it keeps of what it has heard, and of what it wants to say.
    #[cfg(feature = "test-kit")]
    pub(crate) fn held_bytes(&self) -> usize {
        self.reader.held_bytes() + self.control.len()
    }

    /// When the peer was heard of last.
    pub(crate) const fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Somebody who may wait for the disk had it, and has given it back. If the peer was answered meanwhile, it is waited for
    /// from now on.
    pub(crate) fn came_back(&mut self, now: Now) {
        if std::mem::take(&mut self.has_answered) {
            self.answered_at = now.at;
        }
    }

    fn has_answered(&mut self, now: Now) {
        (self.has_answered, self.answered_at) = (true, now.at);
    }

    /// Until when something is to be heard of the peer; once it was told that the histories differ, all of its next question:
    /// until it has a subscription it is one of the strangers, of whom there may be a few only.
    fn silence_until(&self, now: Now) -> Instant {
        let since = match self.state {
            // It has asked, and waits for us.
            State::Diverged(_) if !self.asked.is_empty() => now.at,
            State::Diverged(_) => self.answered_at,
            _ => self.heard_at.max(self.answered_at),
        };
        since + self.config.deadlines.silence
    }

    /// Why the session ended, in a word.
    pub(crate) fn end_reason(&self) -> Option<EndReason> {
        match &self.end {
            // To the peer it looks the same.
            Some(SessionEnd::Own(Failure { code: ErrorCode::DENIED, .. }))
                if self.status.peer.is_none() =>
            {
                Some(EndReason::Credentials)
            }
            end => end.as_ref().map(EndReason::from),
        }
    }

    /// The peer closed its side.
    pub(crate) fn on_closed(&mut self) {
        self.finish(SessionEnd::Disconnected);
    }

    /// This side wants to end the session in good order.
    pub(crate) fn shut_down(&mut self) {
        self.go_away(0);
    }

    /// In the middle of a step. What that would have said isn't said.
    pub(crate) fn has_panicked(&mut self) {
        self.control.clear();
        if self.end.is_none() {
            let failure = Failure::new(ErrorCode::STORAGE, "this side has failed");
            self.end_with(Failure { retry_after_ms: PANIC_RETRY_MS, ..failure });
        }
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
        (self.heard_at, self.heard_at_us) = (now.at, now.unix_us);
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
        self.check_handshake(bytes.len());
    }

    /// Nobody gets ahead with what is passed over, or never whole.
    fn check_handshake(&mut self, heard: usize) {
        let limit = match self.state {
            State::AwaitHello => HELLO_BYTES_MAX,
            _ => HANDSHAKE_BYTES_MAX,
        };
        if self.is_in_handshake() {
            self.handshake_bytes += heard;
            if self.handshake_bytes > limit {
                self.violated(Violation::Handshake { limit });
            }
        }
    }

    fn on_message(&mut self, message: Message<'_>, now: Now) {
        match (self.state, message) {
            (_, Message::Error(failure)) => self.finish(SessionEnd::Peer(failure)),
            (_, Message::GoAway(go_away)) => self.finish(SessionEnd::GoAway(go_away)),
            (State::AwaitHello, Message::Hello(hello)) => self.welcome(hello, now),
            (State::AwaitSubscribe, Message::Subscribe(subscribe)) => {
                self.state = State::Judging(subscribe);
            }
            (State::AwaitSubscribe, Message::SubscribeFeed(subscribe, request))
                if self.features & FEATURE_FILTERED != 0 =>
            {
                self.requested = Some(request);
                self.state = State::Judging(subscribe);
            }
            (State::Diverged(_), Message::Probe(probe)) if self.asked.is_empty() => {
                self.asked = probe.positions;
            }
            (State::Streaming, Message::Ack(ack)) => self.acknowledged(&ack, now),
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
            State::Diverged(_) if self.asked.is_empty() => "PROBE",
            State::Diverged(_) => "the answer to PROBE",
            State::Streaming | State::Ended => "ACK",
        }
    }

    fn welcome(&mut self, hello: Hello, now: Now) {
        let Some(version) = hello.versions.common(PROTOCOL_VERSIONS) else {
            self.say(&Message::Error(Failure::new(ErrorCode::VERSION, "")));
            return self.finish(SessionEnd::Version(hello.versions));
        };
        if let Err(code) = self.config.gate.enter(&hello.authentication) {
            return self.refuse(code);
        }
        self.max_frame = self.config.max_frame.min(hello.max_frame).min(FRAME_BYTES_MAX);
        self.features = hello.features & (FEATURES | FEATURE_FILTERED);
        self.say(&Message::Welcome(Welcome {
            version,
            heartbeat_ms: u16::try_from(self.config.deadlines.heartbeat.as_millis())
                .unwrap_or(u16::MAX),
            max_frame: self.max_frame,
            features: self.features,
            node: self.config.node,
            session: self.config.session,
            nonce: hello.nonce,
            now_us: now.unix_us,
        }));
        self.status.peer = self.config.gate.peer().map(ToOwned::to_owned);
        self.status.node = hello.node;
        self.status.agent = hello.agent;
        self.state = State::AwaitSubscribe;
    }

    /// Tells a peer that it isn't let in, or may not have this: the same words whatever the reason.
    fn refuse(&mut self, code: ErrorCode) {
        let detail = if code == ErrorCode::AUTH_REQUIRED { "who are you?" } else { "denied" };
        self.end_with(Failure::new(code, detail));
    }

    /// The handshake of TLS has come to its end, and the peer has shown these certificates.
    pub(crate) fn on_encrypted(&mut self, certificates: Vec<CertificateDer<'static>>) {
        self.config.gate.encrypted(certificates);
    }

    fn acknowledged(&mut self, ack: &Ack, now: Now) {
        let (Some(from), Some(sent)) = (self.status.acked, self.status.sent) else { return };
        let mirrored = &ack.mirrored;
        if mirrored.journal != sent.journal
            || !(from.offset..=sent.offset).contains(&mirrored.offset)
            || !(from.position..=sent.position).contains(&mirrored.position)
        {
            let (acked, from, sent) = (mirrored.offset, from.offset, sent.offset);
            return self.violated(Violation::Ack { acked, from, sent });
        }
        let repeats = mirrored.offset == from.offset && ack.applied <= self.status.applied;
        if std::mem::replace(&mut self.is_idle, repeats) && repeats && !self.may_repeat(now) {
            let per_second = self.config.idle_acks_max;
            return self.violated(Violation::Rate { per_second });
        }
        if ack.echo != self.echo.0 {
            self.echo = (ack.echo, true);
        }
        self.status.acked = Some(ack.mirrored);
        if let Some(feeding) = &mut self.feeding {
            feeding.acknowledged(mirrored.offset);
        }
        self.status.applied = ack.applied.or(self.status.applied);
    }

    /// Counts an acknowledgement that says nothing new.
    fn may_repeat(&mut self, now: Now) -> bool {
        let (count, since) = &mut self.idle_acks;
        if now.at.saturating_duration_since(*since) >= Duration::from_secs(1) {
            (*count, *since) = (0, now.at);
        }
        *count += 1;
        *count <= self.config.idle_acks_max
    }

    /// The journal that is asked for and hasn't been compared yet; the inner `None`: the server's own.
    pub(crate) const fn wants(&self) -> Option<Option<JournalId>> {
        match &self.state {
            State::Judging(Subscribe { from: Some(from), .. }) => Some(Some(from.journal)),
            State::Judging(Subscribe { from: None, .. }) => Some(None),
            _ => None,
        }
    }

    /// This is what it gets: the source is that journal from now on.
    pub(crate) fn offer(&mut self, offer: Offer) {
        self.offer = offer;
    }

    /// It may not have what it has asked for, or that isn't here.
    pub(crate) fn deny(&mut self) {
        self.refuse(ErrorCode::DENIED);
    }

    /// Whether the peer is to be told the durable end at once, as it is after it has asked.
    pub(crate) const fn is_asked(&self) -> bool {
        self.echo.1
    }

    /// What the subscriber needs the journal for, once it has subscribed.
    pub(crate) fn lease(&self) -> Option<Lease> {
        let acked = self.status.acked.filter(|_| self.status.streaming)?;
        let (id, nameless) = match self.status.node {
            Some(node) => (*node.as_bytes(), false),
            None => (self.config.session, true),
        };
        let (position, offset) = (acked.position, acked.offset);
        let feed = self.status.feed.is_some();
        let heard_at_us = self.heard_at_us;
        Some(Lease { id, nameless, feed, position, offset, heard_at_us })
    }

    /// What to do next. What is to be written is put into `out`; nothing is asked of the source while some
    /// of it is left there.
    pub(crate) fn step(&mut self, source: &mut impl Source, now: Now, out: &mut Output) -> Next {
        self.check_deadlines(now);
        let mut on_disk = self.check_rights(source.may_wait());
        if matches!(self.state, State::Judging(_)) && source.may_wait() {
            // Nothing is looked at before: whether it is the journal that was asked for shows in nothing.
            self.grant(&source.end().journal);
        }
        let mut more = false;
        if let State::Judging(subscribe) = self.state {
            match source.may_wait() {
                true => {
                    self.judge(&subscribe, source, now);
                    self.has_answered(now);
                }
                false => on_disk = true,
            }
        }
        if !self.asked.is_empty() {
            match source.may_wait() {
                true => {
                    self.answer_probe(source);
                    self.has_answered(now);
                }
                false => on_disk = true,
            }
        }
        if self.state == State::Streaming && out.is_empty() {
            let streamed = match self.feeding.take() {
                None => self.stream(source, now, out),
                Some(feeding) => self.feed(feeding, source, now, out),
            };
            on_disk |= streamed == Streamed::OnDisk;
            more = streamed == Streamed::More;
        }
        out.say(&mut self.control);
        if !out.is_empty() {
            return Next::Write;
        }
        if self.end.is_some() {
            return Next::Close;
        }
        if on_disk {
            return Next::OnDisk;
        }
        if more {
            return Next::Write;
        }
        Next::Wait {
            past: self.window_is_open().then(|| self.sent_position()),
            until: self.next_deadline(now),
        }
    }

    /// Some [`step`](Self::step)s at once; everything is appended to `out`.
    #[cfg(test)]
    pub(crate) fn poll(&mut self, source: &mut impl Source, now: Now, out: &mut Vec<u8>) -> Next {
        let (before, mut output) = (out.len(), Output::default());
        loop {
            let next = self.step(source, now, &mut output);
            while !output.is_empty() {
                out.extend_from_slice(output.next());
                output.advance(output.next().len());
            }
            let said = out.len() - before;
            match next {
                Next::Write if self.part > 0 || said < self.config.data_bytes => {}
                _ if said > 0 => return Next::Write,
                _ => return next,
            }
        }
    }

    /// Time has passed, and nothing can be written. When to say so again; `None`: at once, where it may be waited for.
    pub(crate) fn on_time(&mut self, now: Now, may_wait: bool) -> Option<Instant> {
        self.check_deadlines(now);
        if self.check_rights(may_wait) {
            return None;
        }
        Some(match self.state {
            State::AwaitHello | State::AwaitSubscribe => self.handshake_until,
            // Rights are looked at as often.
            State::Diverged(_) | State::Streaming => {
                self.silence_until(now).min(now.at + self.config.deadlines.heartbeat)
            }
            State::Judging(_) | State::Ended => now.at + self.config.deadlines.silence,
        })
    }

    /// How many bytes more the window takes, or one batch more than that.
    fn room(&self) -> u64 {
        if let Some(feeding) = &self.feeding {
            return self.window_bytes.saturating_sub(feeding.under_way_bytes());
        }
        let sent = self.status.sent.map_or(0, |sent| sent.offset);
        let acked = self.status.acked.map_or(0, |acked| acked.offset);
        self.window_bytes.saturating_sub(sent.saturating_sub(acked))
    }

    fn window_is_open(&self) -> bool {
        self.state == State::Streaming && self.room() > 0
    }

    fn sent_position(&self) -> Position {
        let sifted = self.feeding.as_ref().map(Feeding::sifted);
        sifted.or(self.status.sent).map_or(Position::START, |sent| sent.position)
    }

    fn next_deadline(&self, now: Now) -> Instant {
        let silence_until = self.silence_until(now);
        match self.state {
            // Rights are looked at as often.
            State::Diverged(_) => silence_until.min(now.at + self.config.deadlines.heartbeat),
            State::Streaming => {
                let skip_at = self.feeding.as_ref().and_then(Feeding::skip_at);
                let until = silence_until.min(self.heartbeat_at);
                skip_at.map_or(until, |at| until.min(at))
            }
            _ => self.handshake_until,
        }
    }

    fn check_deadlines(&mut self, now: Now) {
        let deadline = match self.state {
            State::AwaitHello | State::AwaitSubscribe if now.at >= self.handshake_until => {
                Deadline::Handshake
            }
            State::Diverged(_) | State::Streaming if now.at >= self.silence_until(now) => {
                Deadline::Silence
            }
            _ => return,
        };
        self.say(&Message::Error(Failure::new(ErrorCode::TIMEOUT, deadline.to_string())));
        self.finish(SessionEnd::Timeout(deadline));
    }

    /// Rights may have been taken away since. Whether that is still to be found out, by somebody who may wait.
    fn check_rights(&mut self, may_wait: bool) -> bool {
        let compared = match self.state {
            State::Diverged(at) => Some(at.origin), // about which it may ask
            _ => self.status.sent,
        };
        let journal = compared.map(|it| it.journal);
        let filter = self.status.feed.as_ref().map(|terms| &terms.filter);
        if self.end.is_some() {
            return false;
        }
        let is_revoked = self.config.gate.is_revoked(journal.as_ref(), filter, may_wait);
        if is_revoked == Some(true) {
            self.refuse(ErrorCode::DENIED);
        }
        is_revoked.is_none()
    }

    /// Compares the mirror's end and its witness with this journal; nothing is sent before.
    fn judge(&mut self, subscribe: &Subscribe, source: &mut impl Source, now: Now) {
        let end = source.end();
        let divergence = match find_divergence(subscribe, source) {
            Ok(divergence) => divergence,
            Err(error) => return self.fail(error, source),
        };
        let from = subscribe.from.unwrap_or_else(|| Mark::start(end.journal).end);
        match divergence {
            Some((Divergence::Ahead, _)) if self.offer.role == Role::Mirror => {
                return self.not_yet(Some(end.position));
            }
            Some((divergence, at_witness)) => {
                // What the mirror still holds was found here, if only its witness was not.
                let common = Common { position: from.position, chain: from.chain };
                let common = at_witness.then_some(common);
                return self.diverged(DivergedAt {
                    divergence,
                    at_witness,
                    common,
                    speaker: source.speaker(),
                    origin: end,
                    is_cut_off: false,
                });
            }
            None => {}
        }
        if self.offer.path.len() > PATH_NODES_MAX {
            let detail = format!("the journal comes through more than {PATH_NODES_MAX} nodes");
            return self.end_with(Failure::new(ErrorCode::CYCLE, detail));
        }
        if let Err(error) = source.seek(from.position) {
            return self.fail(error, source);
        }
        self.status.sent = Some(from);
        self.status.acked = Some(from);
        self.status.streaming = true;
        self.window_bytes = u64::from(subscribe.window_bytes.min(self.config.max_window_bytes));
        self.state = State::Streaming;
        // A mirror says at once how it is with its origin.
        self.heartbeat_at = match self.offer.role {
            Role::Mirror => now.at,
            Role::Origin | Role::Feed => now.at + self.config.deadlines.heartbeat,
        };
        let (first_position, path) = (source.start().position, self.offer.path.clone());
        let subscribed = Subscribed { end, first_position, path };
        match self.status.feed.clone() {
            None => self.say(&Message::Subscribed(subscribed)),
            Some(terms) => {
                self.feeding = Some(Feeding::new(&terms, self.config.shape.clone(), from));
                self.say(&Message::SubscribedFeed(subscribed, FeedTerms::clone(&terms)));
            }
        }
    }

    /// Only the origin itself knows that there is nothing more than it has. `None`: what is to be served has no journal at
    /// present.
    pub(crate) fn not_yet(&mut self, end: Option<Position>) {
        let detail = match end {
            Some(_) => "this mirror is behind you",
            None => "a mirror is served here that has no journal at present",
        };
        let failure = Failure {
            position: end,
            retry_after_ms: NOT_YET_RETRY_MS,
            ..Failure::new(ErrorCode::NOT_YET, detail)
        };
        self.end_with(failure);
    }

    /// Stays for a while if the mirror may want to know where the histories part.
    fn diverged(&mut self, at: DivergedAt) {
        let DivergedAt { divergence, at_witness, common, speaker, origin: end, .. } = at;
        self.say(&Message::Diverged(Diverged { divergence, at_witness, speaker, common, end }));
        let may_ask = self.features & FEATURE_PROBE != 0
            && divergence != Divergence::Foreign
            && common.is_none();
        if may_ask {
            self.state = State::Diverged(at);
        } else {
            self.finish(SessionEnd::Diverged(at));
        }
    }

    fn answer_probe(&mut self, source: &mut impl Source) {
        let asked = std::mem::take(&mut self.asked);
        if !matches!(self.state, State::Diverged(_)) {
            return;
        }
        self.probes += 1;
        if self.probes > PROBES_MAX {
            return self.end_with(Failure::new(ErrorCode::RATE, "too many PROBEs"));
        }
        let ends = asked.into_iter().map(|position| source.batch_end_at(position));
        match ends.collect() {
            Ok(ends) => self.say(&Message::Probed(Probed { ends })),
            Err(error) => self.fail(error, source),
        }
    }

    /// Puts out what there is to send: a heartbeat if it is due, and batches that the window and one frame
    /// take.
    fn stream(&mut self, source: &mut impl Source, now: Now, out: &mut Output) -> Streamed {
        self.beat(source, now);
        let Some(sent) = self.status.sent.filter(|_| self.window_is_open() || self.part > 0) else {
            return Streamed::Done;
        };
        let closed = source.is_closed();
        let limits = Limits {
            max_frame: self.max_frame,
            data_bytes: self.config.data_bytes,
            room: self.room(),
        };
        match source.supply(&Place { end: sent, part: self.part }, &limits) {
            Ok(Supply::Piece(piece)) => {
                self.status.sent = Some(piece.behind.end);
                self.part = piece.behind.part;
                out.say(&mut self.control);
                out.send(piece);
            }
            Ok(Supply::Nothing) if closed => self.go_away(CLOSED_RECONNECT_MS),
            Ok(Supply::Nothing) => {}
            Ok(Supply::OnDisk) => return Streamed::OnDisk,
            Err(error) => self.fail(error, source),
        }
        Streamed::Done
    }

    fn beat(&mut self, source: &impl Source, now: Now) {
        let is_asked = std::mem::take(&mut self.echo.1);
        if is_asked || now.at >= self.heartbeat_at {
            self.heartbeat_at = now.at + self.config.deadlines.heartbeat;
            let (end, now_us, speaker, echo) =
                (source.end(), now.unix_us, source.speaker(), self.echo.0);
            self.say(&Message::Heartbeat(Heartbeat { end, now_us, speaker, echo }));
        }
    }

    fn fail(&mut self, error: SourceError, source: &impl Source) {
        let failure = error.to_failure();
        if let SourceError::Truncated { .. } = error
            && self.features & FEATURE_TRUNCATED != 0
        {
            let (start, sources) = (source.start(), self.config.sources.clone());
            self.say(&Message::Truncated(Truncated { start, sources }));
            return self.finish(SessionEnd::Own(failure));
        }
        self.end_with(failure);
    }

    fn end_with(&mut self, failure: Failure) {
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

    /// A mirror that was told that the histories differ may leave when it likes.
    fn finish(&mut self, end: SessionEnd) {
        let end = match (self.state, end) {
            (_, end @ (SessionEnd::Violation(_) | SessionEnd::Own(_))) => end,
            (State::Diverged(at), _) => SessionEnd::Diverged(at),
            (_, end) => end,
        };
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
