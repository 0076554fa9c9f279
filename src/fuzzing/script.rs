//! What the fuzzers of both ends of a session have in common: bytes that choose, and the frames of a hostile peer.

use crate::format::files::Witness;
use crate::position::{Chain, Checkpoint, Incarnation, JournalId, NodeId, Position};
use crate::shipping::filter::{FeedFilter, FeedPart};
use crate::shipping::message::{
    Ack, Authentication, Common, Data, Diverged, Divergence, ErrorCode, Failure, FeedRequest,
    FeedTerms, GoAway, Heartbeat, Hello, Message, OriginEnd, PROBE_POSITIONS_MAX, Probe, Probed,
    Skip, Speaker, Subscribe, Subscribed, Truncated, VersionRange, Welcome, seal_frames,
};
use crate::shipping::session::model::{TYPES, witness_at};

/// The bytes of an input, taken for choices: 0 once there are none left.
pub(super) struct Script<'a> {
    bytes: &'a [u8],
    seal: bool,
}

impl<'a> Script<'a> {
    /// `seal`: damaged frames get right checksums.
    pub(super) const fn new(bytes: &'a [u8], seal: bool) -> Self {
        Self { bytes, seal }
    }

    pub(super) const fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        byte
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// One of `0..=max`.
    pub(super) fn up_to(&mut self, max: usize) -> usize {
        usize::from(self.u16()) % (max + 1)
    }

    /// Once in so many times.
    pub(super) fn one_in(&mut self, times: u8) -> bool {
        self.byte() % times == times - 1
    }

    /// As they are in the input.
    pub(super) fn raw(&mut self) -> Vec<u8> {
        let len = usize::from(self.u16()).min(self.bytes.len());
        let (raw, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        raw.to_vec()
    }

    /// The number itself, mostly; else one beside it, or any.
    pub(super) fn near(&mut self, value: u64) -> u64 {
        match self.byte() {
            250 => value.wrapping_add(1),
            251 => value.wrapping_sub(1),
            252 => 0,
            253 => u64::MAX,
            254 => value.wrapping_add(64 * u64::from(self.byte())),
            255 => self.u64(),
            _ => value,
        }
    }

    pub(super) fn near_u32(&mut self, value: u32) -> u32 {
        self.near(value.into()) as u32
    }

    fn chain(&mut self, chain: Chain) -> Chain {
        if self.one_in(16) { Chain::from_bytes([self.byte(); 16]) } else { chain }
    }

    fn position(&mut self, position: Position) -> Position {
        Position::new(self.near(position.get()))
    }

    /// The checkpoint itself, mostly; else with other fields.
    pub(super) fn end(&mut self, end: &Checkpoint) -> Checkpoint {
        if !self.one_in(8) {
            return *end;
        }
        let journal = if self.one_in(8) { JournalId::from_bytes([0x2B; 16]) } else { end.journal };
        Checkpoint {
            journal,
            epoch: self.near_u32(end.epoch),
            incarnation: Incarnation::new(self.near(end.incarnation.get())),
            offset: self.near(end.offset),
            position: self.position(end.position),
            chain: self.chain(end.chain),
        }
    }

    pub(super) fn origin_end(&mut self, end: &Checkpoint) -> OriginEnd {
        OriginEnd { offset: self.near(end.offset), position: self.position(end.position) }
    }

    /// A frame, perhaps damaged.
    pub(super) fn frame<'m>(&mut self, message: impl FnOnce(&mut Self) -> Message<'m>) -> Vec<u8> {
        let mut frame = Vec::new();
        message(self).encode(&mut frame);
        self.damage(frame)
    }

    /// Of so many bytes that are under way all arrive at once, or a part of them, or all of them together with what follows.
    pub(super) fn arriving(&mut self, under_way: usize) -> Option<usize> {
        match self.byte() % 8 {
            6 => None,
            7 => Some(self.up_to(under_way)),
            _ => Some(under_way),
        }
    }

    /// Damages frames, cuts them or leaves them as they are; what is damaged may get right checksums.
    pub(super) fn damage(&mut self, mut frames: Vec<u8>) -> Vec<u8> {
        match self.byte() % 16 {
            14 if !frames.is_empty() => {
                let at = self.up_to(frames.len() - 1);
                frames[at] ^= self.byte();
            }
            15 => frames.truncate(self.up_to(frames.len())),
            _ => return frames,
        }
        if self.seal {
            seal_frames(&mut frames);
        }
        frames
    }

    // ------------------------------------------------------------------------------------ what a mirror says

    pub(super) fn hello(&mut self) -> Message<'static> {
        let max = self.near(1) as u16;
        let features = self.near(0b1101);
        Message::Hello(Hello {
            versions: VersionRange { min: 1, max },
            features,
            max_frame: self.near_u32(8192 + 64 * u32::from(self.bytes.len() as u8)),
            node: (!self.one_in(4)).then_some(NodeId::from_bytes([0x11; 16])),
            nonce: [self.byte(); 16],
            authentication: Authentication::None,
            agent: "fuzz".to_owned(),
        })
    }

    pub(super) fn subscribe(&mut self, end: &Checkpoint) -> Subscribe {
        let from = (!self.one_in(4)).then(|| self.end(end));
        let witness = from.filter(|_| self.one_in(4)).map(|_| {
            let witness = witness_at(end);
            Witness { offset: self.near(witness.offset), ..witness }
        });
        let window_bytes = [4096, 1, 600, 1 << 20, u32::MAX][self.up_to(4)];
        Subscribe { from, witness, window_bytes }
    }

    pub(super) fn filter(&mut self) -> FeedFilter {
        match self.byte() % 3 {
            0 => FeedFilter::everything(),
            1 => FeedFilter::any_of([FeedPart::types([TYPES[0]])]),
            _ => FeedFilter::any_of([FeedPart::categories(["s"]), FeedPart::types([TYPES[1]])]),
        }
    }

    pub(super) fn feed_request(&mut self, may_go_on: bool) -> FeedRequest {
        let terms = FeedTerms { filter: self.filter(), shape: None };
        FeedRequest { terms, goes_on: may_go_on && self.one_in(4) }
    }

    pub(super) fn ack(&mut self, end: &Checkpoint, echo: u64) -> Ack {
        let applied = self.one_in(4).then(|| self.position(end.position));
        Ack { mirrored: self.end(end), applied, echo: self.near(echo) }
    }

    pub(super) fn probe(&mut self, end: &Checkpoint) -> Probe {
        let count = self.up_to(PROBE_POSITIONS_MAX - 1) + 1;
        let position = |n| self.position(Position::new(end.position.get().saturating_sub(n)));
        Probe { positions: (0..count as u64).rev().map(position).collect() }
    }

    // ----------------------------------------------------------------------------------- what an origin says

    pub(super) fn welcome(&mut self, nonce: [u8; 16], features: u64) -> Welcome {
        Welcome {
            version: self.near(1) as u16,
            heartbeat_ms: self.near(1000) as u16,
            max_frame: if self.one_in(8) { self.near_u32(1 << 20) } else { 8192 },
            features: self.near(features),
            node: NodeId::from_bytes([if self.one_in(16) { 0x11 } else { 0x0E }; 16]),
            session: [0x5E; 16],
            nonce: if self.one_in(16) { [self.byte(); 16] } else { nonce },
            now_us: self.near(1_700_000_000_000_000) as i64,
        }
    }

    pub(super) fn subscribed(&mut self, end: &Checkpoint) -> Subscribed {
        let path = (0..self.byte() % 3).map(|n| NodeId::from_bytes([0x0E + n; 16])).collect();
        let first_position = Position::new(self.near(0));
        Subscribed { end: self.end(end), first_position, path }
    }

    pub(super) fn diverged(&mut self, end: &Checkpoint) -> Diverged {
        let kinds = [Divergence::Ahead, Divergence::Fork, Divergence::Foreign];
        let common = Common { position: self.position(end.position), chain: end.chain };
        Diverged {
            divergence: kinds[self.up_to(2)],
            at_witness: self.one_in(4),
            speaker: self.speaker(),
            common: self.one_in(4).then_some(common),
            end: self.end(end),
        }
    }

    fn speaker(&mut self) -> Speaker {
        let all = [Speaker::Origin, Speaker::Relay, Speaker::RelayBehind, Speaker::RelayApart];
        all[self.up_to(3)]
    }

    pub(super) fn heartbeat(&mut self, end: &Checkpoint, echo: u64) -> Heartbeat {
        let now_us = self.near(1_700_000_000_000_000) as i64;
        Heartbeat { end: self.end(end), now_us, speaker: self.speaker(), echo: self.near(echo) }
    }

    pub(super) fn skip(&mut self, from: Position, behind: &Checkpoint, end: &Checkpoint) -> Skip {
        Skip {
            from: self.position(from),
            behind: self.end(behind),
            origin_end: self.origin_end(end),
        }
    }

    // --------------------------------------------------------------------------------------- what both say

    pub(super) fn last_word(&mut self, end: &Checkpoint) -> Message<'static> {
        match self.byte() % 4 {
            0 => Message::GoAway(GoAway { reconnect_after_ms: self.near_u32(1000) }),
            1 => Message::Truncated(Truncated { start: self.end(end), sources: vec!["b".into()] }),
            _ => Message::Error(Failure::new(ErrorCode(self.u16() % 25), "said by the input")),
        }
    }

    /// A frame of any kind, wherever it belongs.
    pub(super) fn any<'b>(&mut self, end: &Checkpoint, page: &'b [u8; 4096]) -> Message<'b> {
        match self.byte() % 14 {
            0 => self.hello(),
            1 => Message::Subscribe(self.subscribe(end)),
            2 => Message::SubscribeFeed(self.subscribe(end), self.feed_request(false)),
            3 => Message::Ack(self.ack(end, 0)),
            4 => Message::Probe(self.probe(end)),
            5 => Message::Welcome(self.welcome([0x17; 16], 0)),
            6 => Message::Subscribed(self.subscribed(end)),
            7 => {
                let terms = FeedTerms { filter: self.filter(), shape: None };
                Message::SubscribedFeed(self.subscribed(end), terms)
            }
            8 => Message::Diverged(self.diverged(end)),
            9 => Message::Probed(Probed { ends: vec![None, Some((*end).into())] }),
            10 => Message::Heartbeat(self.heartbeat(end, 0)),
            11 => Message::Segment(page),
            12 => {
                let origin_end = OriginEnd { offset: u64::MAX, position: end.position };
                let (offset, continued) = (self.near(end.offset), self.one_in(2));
                Message::Data(Data { offset, origin_end, continued, bytes: page })
            }
            _ => Message::Skip(self.skip(Position::START, end, end)),
        }
    }

    /// A frame of a type that isn't known, passed over if it is optional.
    pub(super) fn unknown(&mut self) -> Vec<u8> {
        let len = u32::from(self.u16() % 4096);
        let (kind, flags) = (0x60 + self.byte() % 16, u8::from(!self.one_in(4)));
        let mut frame = [&len.to_le_bytes()[..], &[kind, flags, 0, 0, 0, 0, 0, 0]].concat();
        frame.resize(12 + len as usize, 0xEE);
        seal_frames(&mut frame);
        frame
    }
}
