//! The origin's end of a session against a peer that is the input, beside a model of what it may say.
//!
//! ```text
//!   input ─▶ frames, cut, damaged, in any order ─▶ OriginSession ─▶ frames ─▶ Told: may that be said now?
//!       └──▶ time, syncs, a disk that may not be asked, an output that isn't taken   ▲
//!                                           what was heard, what is durable ─────────┘
//! ```

use std::sync::Arc;
use std::time::Duration;

use super::SEAL;
use super::script::Script;
use crate::event::EventId;
use crate::format::batch::{BatchRef, Link};
use crate::format::files::{Mark, Role, Witness};
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::journal::Comparison;
use crate::position::{Checkpoint, Position};
use crate::shipping::message::{
    Ack, CONTROL_BYTES_MAX, Data, Events, FRAME_HEADER_BYTES, FeedRequest, FeedTerms, FrameReader,
    Hello, Message, OriginEnd, RUN_BYTES_MAX, Run, Skip, Speaker, Subscribe, Subscribed,
};
use crate::shipping::session::model::{
    JOURNAL, ModelBatch, ModelJournal, later, now, origin_config,
};
use crate::shipping::session::{
    Deadlines, Limits, Next, Now, OriginConfig, OriginSession, Output, Place, Sieve, Sifted,
    Source, SourceError, Span, Supply, pack, sift,
};

/// Switch of [`session_origin`]: it serves another node's journal.
pub const RELAY: u8 = 2;
/// An input that is longer does no more.
const STEPS_MAX: usize = 300;
/// So much may wait to be said beside a piece of the journal: the answers to all PROBEs that are answered.
const SAID_BYTES_MAX: usize = 64 << 10;
/// As `docs/protocol.md` has it: in front of a HELLO, and of a subscription.
const HELLO_BYTES_MAX: usize = FRAME_HEADER_BYTES + CONTROL_BYTES_MAX as usize;
const HANDSHAKE_BYTES_MAX: usize = 16 << 10;
const PROBES_MAX: usize = 16;
const SKIPS_EVERY: Duration = Duration::from_millis(200);
/// What a session sends at a time.
const FRAME_MAX: u32 = 8192;

/// Whatever a peer does, the origin sends it only what is durable, what it has asked for and has room for, in order,
/// keeps little for it, says when to look again, and nothing behind its last word.
pub fn session_origin(input: &[u8]) {
    let Some((&switches, bytes)) = input.split_first() else { return };
    let mut scene = Scene::new(switches, bytes);
    for _ in 0..STEPS_MAX {
        if scene.script.is_over() {
            break;
        }
        scene.act();
    }
    scene.end();
}

/// A journal on a disk that may not always be asked.
struct Disk {
    journal: ModelJournal,
    may_wait: bool,
    speaker: Speaker,
}

impl Disk {
    fn is_asked(&self) {
        assert!(self.may_wait, "a source that may not wait was asked for what lies on the disk");
    }
}

impl Source for Disk {
    fn end(&self) -> Checkpoint {
        self.journal.end()
    }
    fn start(&self) -> Checkpoint {
        self.journal.start()
    }
    fn is_closed(&self) -> bool {
        self.journal.closed
    }
    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError> {
        self.is_asked();
        self.journal.compare(checkpoint)
    }
    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError> {
        self.is_asked();
        self.journal.compare_witness(witness)
    }
    fn batch_end_at(&mut self, position: Position) -> Result<Option<Link>, SourceError> {
        self.is_asked();
        self.journal.batch_end_at(position)
    }
    fn seek(&mut self, from: Position) -> Result<(), SourceError> {
        self.is_asked();
        self.journal.seek(from)
    }
    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        self.journal.next_batch(at)
    }
    fn speaker(&self) -> Speaker {
        self.speaker
    }
    fn may_wait(&self) -> bool {
        self.may_wait
    }
    fn supply(&mut self, from: &Place, limits: &Limits) -> Result<Supply, SourceError> {
        if !self.may_wait && from.end.offset < self.end().offset {
            return Ok(Supply::OnDisk);
        }
        Ok(pack(self, from, limits)?.map_or(Supply::Nothing, Supply::Piece))
    }
    fn sift(&mut self, span: &Span, sieve: &Arc<Sieve>) -> Result<Sifted, SourceError> {
        if !self.may_wait && span.at.offset < self.end().offset {
            return Ok(Sifted::OnDisk);
        }
        sift(self, span, sieve)
    }
}

/// A session, the disk behind it, and the peer in front of it.
struct Scene<'a> {
    script: Script<'a>,
    now: Now,
    session: OriginSession,
    disk: Disk,
    out: Output,
    /// So many bytes at the beginning of what is left of the output were looked at.
    seen: usize,
    /// What the peer has said and what didn't arrive yet.
    wire: Vec<u8>,
    heard_bytes: usize,
    told: Told,
    /// It was said that nothing more comes.
    closed: bool,
    bodies: fastrand::Rng,
}

impl<'a> Scene<'a> {
    fn new(switches: u8, bytes: &'a [u8]) -> Self {
        let now = now();
        let mut script = Script::new(bytes, switches & SEAL != 0);
        let role = if switches & RELAY == 0 { Role::Origin } else { Role::Mirror };
        let session = OriginSession::new(OriginConfig { role, ..origin_config() }, now);
        let mut bodies = fastrand::Rng::with_seed(script.byte().into());
        let mut journal = ModelJournal::new(JOURNAL);
        (0..script.byte() % 24).for_each(|_| journal.append_events(&mut bodies));
        journal.sync();
        let disk = Disk { journal, may_wait: true, speaker: Speaker::Origin };
        let (out, wire, told) = (Output::default(), Vec::new(), Told::default());
        let (seen, heard_bytes, closed) = (0, 0, false);
        Self { script, now, session, disk, out, seen, wire, heard_bytes, told, closed, bodies }
    }

    fn act(&mut self) {
        let end = self.some_end();
        let script = &mut self.script;
        match script.byte() % 24 {
            0 => self.say(Script::hello),
            1 => self.say(|script| Message::Subscribe(script.subscribe(&end))),
            2 => self.say(|script| {
                let subscribe = script.subscribe(&end);
                let request = script.feed_request(subscribe.from.is_some());
                Message::SubscribeFeed(Subscribe { witness: None, ..subscribe }, request)
            }),
            3 | 4 => {
                let echo = self.told.echo.wrapping_add(1);
                self.say(|script| Message::Ack(script.ack(&end, echo)));
            }
            5 => self.repeat_ack(&end),
            6 => (0..=self.script.byte() % 20).for_each(|_| {
                self.say(|script| Message::Probe(script.probe(&end)));
                self.step();
            }),
            7 => {
                let page = [0; HEADER_PAGE_BYTES];
                self.say(|script| script.any(&end, &page));
            }
            8 => self.say(|script| script.last_word(&end)),
            9 => {
                let raw = script.raw();
                let raw = script.damage(raw);
                self.send(&raw);
            }
            10 => {
                let frame = script.unknown();
                self.send(&frame);
            }
            11 => {
                let ms = [1, 20, 199, 200, 999, 1000, 2999, 3000, 5000][script.up_to(8)];
                self.now = later(self.now, Duration::from_millis(ms));
                self.on_time();
            }
            12 => self.disk.journal.append_events(&mut self.bodies),
            13 => self.disk.journal.sync(),
            14 => self.disk_changes(),
            15 => self.command(),
            16 | 17 => {
                self.step();
            }
            18 => {
                let some = script.up_to(9000);
                self.drain(some);
            }
            _ => {
                // As the server does it mostly: all that there is to say, and all of it taken.
                for _ in 0..=script.byte() % 8 {
                    self.step();
                    self.drain(usize::MAX);
                }
            }
        }
    }

    /// What is said is about this place: the end of what was sent, mostly, or any batch end.
    fn some_end(&mut self) -> Checkpoint {
        let journal = &self.disk.journal;
        match (self.script.byte() % 4, self.told.sent) {
            (0, _) => journal.end_of_batches(self.script.up_to(journal.batches.len())),
            (_, Some(sent)) => sent,
            (_, None) => journal.end(),
        }
    }

    fn say<'m>(&mut self, message: impl FnOnce(&mut Script<'a>) -> Message<'m>) {
        let frame = self.script.frame(message);
        self.send(&frame);
    }

    fn send(&mut self, frame: &[u8]) {
        self.wire.extend_from_slice(frame);
        if let Some(some) = self.script.arriving(self.wire.len()) {
            self.arrive(some);
        }
    }

    fn arrive(&mut self, up_to: usize) {
        let bytes: Vec<u8> = self.wire.drain(..up_to.min(self.wire.len())).collect();
        if self.session.end().is_none() {
            self.heard_bytes += bytes.len();
            self.session.on_bytes(&bytes, self.now);
            self.told.hear(&bytes);
            assert!(!self.told.is_broken || self.session.end().is_some(), "a breach is overlooked");
        } else {
            let end = self.session.end().cloned();
            self.session.on_bytes(&bytes, self.now);
            assert_eq!(self.session.end().cloned(), end, "it hears although it has ended");
        }
        let frame = FRAME_HEADER_BYTES + CONTROL_BYTES_MAX as usize;
        let limit = bytes.len() + frame + SAID_BYTES_MAX;
        assert!(self.session.held_bytes() <= limit, "{} bytes held", self.session.held_bytes());
        if self.session.end().is_none() && self.session.is_in_handshake() {
            let limit =
                if self.told.hello.is_some() { HANDSHAKE_BYTES_MAX } else { HELLO_BYTES_MAX };
            assert!(self.heard_bytes <= limit, "{} bytes before SUBSCRIBE", self.heard_bytes);
        }
    }

    /// The same acknowledgement again and again, in no time.
    fn repeat_ack(&mut self, end: &Checkpoint) {
        let (count, ack) = (self.script.byte(), self.script.ack(end, self.told.echo));
        let mut frames = Vec::new();
        (0..count).for_each(|_| Message::Ack(ack).encode(&mut frames));
        self.wire.extend_from_slice(&frames);
        self.arrive(usize::MAX);
        let limit = origin_config().idle_acks_max + 2;
        assert!(self.session.end().is_some() || u32::from(count) <= limit, "{count} idle ACKs");
    }

    fn on_time(&mut self) {
        let again = self.session.on_time(self.now, self.disk.may_wait);
        let (now, latest) = (self.now.at, self.now.at + longest());
        let is_soon = again.is_some_and(|again| again > now && again <= latest);
        assert!(is_soon, "looks again at {again:?}");
    }

    fn disk_changes(&mut self) {
        let journal = &mut self.disk.journal;
        let durable = journal.durable;
        match self.script.byte() % 8 {
            0 => journal.closed = true,
            1 => journal.damaged_at = Some(self.script.up_to(durable)),
            2 => journal.removed = journal.removed.max(self.script.up_to(durable)),
            3 => self.disk.speaker = [Speaker::Relay, Speaker::RelayBehind][self.script.up_to(1)],
            4 => {
                self.disk.may_wait = true;
                self.session.came_back(self.now);
            }
            _ => self.disk.may_wait ^= true,
        }
    }

    /// What the server does with a session.
    fn command(&mut self) {
        match self.script.byte() % 8 {
            0 => self.session.on_closed(),
            1 => self.session.shut_down(),
            2 if self.session.wants().is_some() => self.session.deny(),
            3 if self.session.wants().is_some() => self.session.not_yet(None),
            _ => self.session.came_back(self.now),
        }
    }

    fn step(&mut self) -> Next {
        let had_ended = self.session.end().is_some();
        let was_left = self.out.left().len();
        let next = self.session.step(&mut self.disk, self.now, &mut self.out);
        let left = self.out.left();
        assert!(!self.closed || left.is_empty(), "more is said behind the end");
        assert!(was_left <= left.len() && left.len() <= longest_output(), "{}", left.len());
        self.told.say(&left[self.seen..], &mut self.disk, had_ended);
        self.seen = left.len();
        let end = self.session.end();
        match next {
            Next::Write => {
                assert!(!left.is_empty() || self.told.feed.is_some(), "nothing to write");
            }
            Next::OnDisk => assert!(!self.disk.may_wait, "the disk was there"),
            Next::Close => {
                assert!(end.is_some() && left.is_empty(), "closed: {end:?}");
                self.closed = true;
            }
            Next::Wait { past, until } => {
                assert!(until > self.now.at && until <= self.now.at + longest(), "until {until:?}");
                assert!(end.is_none() && left.is_empty(), "waits: {end:?}");
                let has_more = past.is_some_and(|past| past < self.disk.end().position);
                assert!(!has_more, "waits although there is something to send");
            }
        }
        if end.is_some() {
            assert!(!matches!(next, Next::Wait { .. } | Next::OnDisk), "{next:?} behind the end");
        }
        assert!(end.is_some() || !self.told.is_over, "it goes on behind its last word");
        next
    }

    fn drain(&mut self, mut len: usize) {
        while len > 0 && !self.out.is_empty() {
            let taken = self.out.next().len().min(len);
            self.out.advance(taken);
            len -= taken;
            self.seen -= taken;
        }
    }

    /// It waits for more, and has room for it: so it has sent everything, and tells what a feed has nothing of.
    fn has_told_all(&mut self) {
        self.now = later(self.now, SKIPS_EVERY);
        self.step();
        self.drain(usize::MAX);
        let has_all = self.told.sent == Some(self.disk.end());
        assert!(has_all || self.session.end().is_some(), "kept back: {:?}", self.told.sent);
    }

    /// Everything is taken, and then nothing is heard any more: it ends, and says nothing behind that.
    fn end(&mut self) {
        self.disk.may_wait = true;
        for round in 0.. {
            self.drain(usize::MAX);
            self.session.came_back(self.now);
            match self.step() {
                Next::Write => {}
                Next::Wait { past: Some(_), .. } if self.told.sent.is_some() => {
                    self.has_told_all();
                    break;
                }
                _ => break,
            }
            assert!(round < 10_000, "it never has said all");
        }
        self.now = later(self.now, longest());
        for _ in 0..4 {
            self.step();
            self.drain(usize::MAX);
        }
        assert!(self.session.end().is_some(), "silence is not noticed");
        assert!(self.closed, "it isn't closed");
        self.now = later(self.now, longest());
        let mut hello = Vec::new();
        self.script.hello().encode(&mut hello);
        self.wire = hello;
        self.arrive(usize::MAX);
        self.step();
    }
}

/// No deadline is further away.
fn longest() -> Duration {
    let Deadlines { handshake, silence, heartbeat } = Deadlines::default();
    handshake.max(silence).max(heartbeat)
}

const fn longest_output() -> usize {
    let frames = 2 * (FRAME_HEADER_BYTES + FRAME_MAX as usize);
    SAID_BYTES_MAX + frames + FRAME_HEADER_BYTES + HEADER_PAGE_BYTES
}

/// What was heard and said so far, and what may be said next.
#[derive(Default)]
struct Told {
    hearing: FrameReader,
    saying: Option<FrameReader>,
    hello: Option<Hello>,
    is_welcomed: bool,
    asked: Option<(Subscribe, Option<FeedRequest>)>,
    /// The session should have ended by what was heard.
    is_broken: bool,
    is_diverged: bool,
    probes: Vec<Vec<Position>>,
    probed: usize,
    feed: Option<FeedTerms>,
    window: u64,
    /// Where what was sent whole ends; `None` before SUBSCRIBED.
    sent: Option<Checkpoint>,
    acked: Option<Checkpoint>,
    echo: u64,
    /// The bytes of the next batch, or of a run, that were sent.
    part: Vec<u8>,
    page_said: bool,
    /// Runs that were not acknowledged: where they end and how long they are.
    runs: Vec<(u64, u64)>,
    /// The last word was said.
    is_over: bool,
}

impl Told {
    /// What the session has heard, as far as it was still listening.
    fn hear(&mut self, bytes: &[u8]) {
        let mut hearing = std::mem::take(&mut self.hearing);
        hearing.push(bytes);
        while !self.is_broken {
            match hearing.next_message() {
                Ok(Some(message)) => self.hear_message(message),
                Ok(None) => break,
                Err(_) => self.is_broken = true,
            }
        }
        self.hearing = hearing;
    }

    fn hear_message(&mut self, message: Message<'_>) {
        match message {
            Message::Hello(hello) if self.hello.is_none() => self.hello = Some(hello),
            Message::Subscribe(subscribe) if self.may_ask() => self.asked = Some((subscribe, None)),
            Message::SubscribeFeed(subscribe, request) if self.may_ask() => {
                self.asked = Some((subscribe, Some(request)));
            }
            Message::Probe(probe) if self.is_diverged && self.probes.len() == self.probed => {
                self.probes.push(probe.positions);
            }
            Message::Ack(ack) if self.sent.is_some() => self.hear_ack(&ack),
            _ => self.is_broken = true,
        }
    }

    fn may_ask(&self) -> bool {
        self.hello.is_some() && self.asked.is_none()
    }

    fn hear_ack(&mut self, ack: &Ack) {
        let (Some(acked), Some(sent)) = (self.acked, self.sent) else { return };
        let at = ack.mirrored;
        let fits = at.journal == sent.journal
            && (acked.offset..=sent.offset).contains(&at.offset)
            && (acked.position..=sent.position).contains(&at.position);
        if !fits {
            self.is_broken = true;
            return;
        }
        self.acked = Some(at);
        self.echo = ack.echo;
        self.runs.retain(|(end, _)| *end > at.offset);
    }

    /// What the session has put out, in one step.
    fn say(&mut self, bytes: &[u8], disk: &mut Disk, had_ended: bool) {
        let mut saying = self.saying.take().unwrap_or_else(|| {
            let mut reader = FrameReader::new();
            reader.allow_data(FRAME_MAX);
            reader
        });
        saying.push(bytes);
        loop {
            match saying.next_message() {
                Ok(Some(message)) => self.say_message(&message, disk, had_ended),
                Ok(None) => break,
                Err(error) => panic!("it says what is no frame: {error}"),
            }
        }
        assert!(!saying.is_inside_a_frame(), "a part of a frame");
        self.saying = Some(saying);
    }

    fn say_message(&mut self, message: &Message<'_>, disk: &mut Disk, had_ended: bool) {
        assert!(!self.is_over, "{} behind the last word", message.name());
        if had_ended {
            let may_follow = matches!(message, Message::Welcome(_))
                || matches!(message, Message::Error(_) | Message::GoAway(_));
            assert!(may_follow, "{} behind the end", message.name());
        }
        match message {
            Message::Welcome(welcome) => {
                let hello = self.hello.as_ref().unwrap_or_else(|| panic!("WELCOME to nobody"));
                assert!(!std::mem::replace(&mut self.is_welcomed, true), "WELCOME twice");
                assert_eq!(welcome.nonce, hello.nonce);
                assert!(welcome.max_frame <= hello.max_frame.min(FRAME_MAX));
                assert_eq!(welcome.features & !hello.features, 0, "features of nobody's");
                assert!(hello.versions.min <= welcome.version);
                assert!(welcome.version <= hello.versions.max);
            }
            Message::Subscribed(subscribed) => self.grant(subscribed, None, disk),
            Message::SubscribedFeed(subscribed, terms) => self.grant(subscribed, Some(terms), disk),
            Message::Diverged(diverged) => {
                self.is_judged(disk);
                assert!(self.asked_end_is_elsewhere(disk), "DIVERGED, though nothing differs");
                assert_eq!(diverged.end, disk.end());
                self.is_diverged = true;
            }
            Message::Probed(probed) => self.answer(&probed.ends, disk),
            Message::Segment(page) => {
                let next = self.next_batch(disk);
                assert!(next.first_of_segment && next.page.bytes() == **page, "another page");
                assert!(self.part.is_empty() && !std::mem::replace(&mut self.page_said, true));
            }
            Message::Data(data) => self.data(data, disk),
            Message::Events(events) => self.events(events, disk),
            Message::Skip(skip) => self.skip(skip, disk),
            Message::Heartbeat(heartbeat) => {
                assert!(self.sent.is_some(), "HEARTBEAT before SUBSCRIBED");
                assert_eq!((heartbeat.end, heartbeat.echo), (disk.end(), self.echo));
            }
            Message::Truncated(_) => {
                match self.sent {
                    None => self.is_judged(disk),
                    // It was removed meanwhile.
                    Some(sent) => assert!(sent.position < disk.start().position, "all is there"),
                }
                self.is_over = true;
            }
            Message::Error(_) | Message::GoAway(_) => self.is_over = true,
            _ => panic!("an origin says {}", message.name()),
        }
    }

    /// Nothing of the journal is told before somebody has introduced themselves and asked for it.
    fn is_judged(&self, disk: &Disk) {
        assert!(self.is_welcomed && self.asked.is_some(), "an answer that nobody has asked for");
        assert!(self.sent.is_none() && !self.is_diverged, "a second answer");
        disk.is_asked();
    }

    /// Where the peer is, as it says.
    fn from(&self, disk: &Disk) -> Checkpoint {
        let asked = self.asked.as_ref().and_then(|(subscribe, _)| subscribe.from);
        asked.unwrap_or_else(|| Mark::start(disk.journal.id).end)
    }

    fn asked_end_is_elsewhere(&self, disk: &Disk) -> bool {
        let (journal, from) = (&disk.journal, self.from(disk));
        let ends: Vec<_> = (0..=journal.durable).map(|n| journal.end_of_batches(n)).collect();
        let witness = self.asked.as_ref().and_then(|(subscribe, _)| subscribe.witness);
        let is_witness = |end: &Checkpoint, witness: Witness| {
            (end.offset, end.position, end.chain)
                == (witness.offset, witness.position, witness.chain)
        };
        !ends.contains(&from)
            || witness.is_some_and(|witness| !ends.iter().any(|end| is_witness(end, witness)))
    }

    fn grant(&mut self, subscribed: &Subscribed, feed: Option<&FeedTerms>, disk: &Disk) {
        self.is_judged(disk);
        assert!(!self.asked_end_is_elsewhere(disk), "another history is served");
        assert_eq!(subscribed.end, disk.end());
        assert_eq!(subscribed.first_position, disk.start().position);
        let (subscribe, request) = self.asked.clone().unwrap_or_else(|| panic!("nobody asked"));
        assert_eq!(request.is_some(), feed.is_some());
        if let (Some(request), Some(terms)) = (request, feed) {
            assert!(terms.filter.is_within(&request.terms.filter), "more than was asked for");
        }
        self.window = u64::from(subscribe.window_bytes.min(origin_config().max_window_bytes));
        let from = self.from(disk);
        (self.sent, self.acked, self.feed) = (Some(from), Some(from), feed.cloned());
    }

    fn answer(&mut self, ends: &[Option<Link>], disk: &Disk) {
        assert!(self.is_diverged, "PROBED before DIVERGED");
        let asked = self.probes.get(self.probed).unwrap_or_else(|| panic!("nobody asked"));
        self.probed += 1;
        assert!(self.probed <= PROBES_MAX, "{} answers", self.probed);
        assert_eq!(ends.len(), asked.len());
        let journal = &disk.journal;
        for (asked, end) in asked.iter().zip(ends) {
            let Some(end) = end else { continue };
            let is_there = (0..=journal.durable)
                .any(|count| Link::from(journal.end_of_batches(count)) == *end);
            assert!(is_there && end.position <= *asked, "{end:?} is no batch end");
        }
    }

    /// The place up to which the whole journal was sent.
    fn place(&self) -> Checkpoint {
        assert!(self.feed.is_none(), "the journal itself in a feed");
        self.sent.unwrap_or_else(|| panic!("something of the journal before SUBSCRIBED"))
    }

    fn next_batch<'d>(&self, disk: &'d Disk) -> &'d ModelBatch {
        let place = self.place();
        let durable = &disk.journal.batches[..disk.journal.durable];
        let next = durable.iter().find(|batch| batch.end.offset > place.offset);
        next.unwrap_or_else(|| panic!("there is nothing durable behind {place:?}"))
    }

    fn check_end(end: OriginEnd, disk: &Disk) {
        let durable = disk.end();
        assert!(end.offset <= durable.offset && end.position <= durable.position, "{end:?}");
    }

    fn data(&mut self, data: &Data<'_>, disk: &Disk) {
        Self::check_end(data.origin_end, disk);
        assert_eq!(data.offset, self.place().offset + self.part.len() as u64, "out of order");
        let mut rest = data.bytes;
        while !rest.is_empty() {
            let batch = self.next_batch(disk);
            if self.part.is_empty() {
                let ahead = self.place().offset - self.acked.map_or(0, |acked| acked.offset);
                assert!(ahead < self.window, "begun {ahead} ahead, window {}", self.window);
                let page_said = std::mem::take(&mut self.page_said);
                assert_eq!(page_said, batch.first_of_segment, "the page of a segment");
            }
            let missing = &batch.bytes[self.part.len()..];
            let len = missing.len().min(rest.len());
            assert!(rest[..len] == missing[..len], "other bytes than the journal's");
            if len == missing.len() {
                (self.sent, self.part) = (Some(batch.end), Vec::new());
            } else {
                self.part.extend_from_slice(&rest[..len]);
            }
            rest = &rest[len..];
        }
        assert_eq!(data.continued, !self.part.is_empty());
    }

    fn events(&mut self, events: &Events<'_>, disk: &Disk) {
        Self::check_end(events.origin_end, disk);
        let sent = self.sent.unwrap_or_else(|| panic!("events before SUBSCRIBED"));
        assert_eq!((events.from, events.at as usize), (sent.position, self.part.len()));
        let under_way: u64 = self.runs.iter().map(|(_, len)| len).sum();
        assert!(under_way < self.window, "{under_way} bytes under way, window {}", self.window);
        self.part.extend_from_slice(events.bytes);
        assert!(self.part.len() <= RUN_BYTES_MAX as usize);
        if events.continued {
            return;
        }
        let bytes = std::mem::take(&mut self.part);
        let run = Run::decode(events.from, bytes).unwrap_or_else(|error| panic!("{error}"));
        let told: Vec<_> =
            run.entries().flatten().map(|it| (it.position.get(), it.record.id)).collect();
        self.runs.push((run.behind.offset, run.len_bytes() as u64));
        self.covers(run.behind, &told, disk);
    }

    fn skip(&mut self, skip: &Skip, disk: &Disk) {
        Self::check_end(skip.origin_end, disk);
        assert_eq!(Some(skip.from), self.sent.map(|sent| sent.position));
        assert!(self.part.is_empty(), "SKIP within a run");
        self.covers(skip.behind, &[], disk);
    }

    /// All events of the feed up to here were told, and no others.
    fn covers(&mut self, behind: Checkpoint, told: &[(u64, EventId)], disk: &Disk) {
        let (journal, from) = (&disk.journal, self.sent.map_or(Position::START, |it| it.position));
        let terms = self.feed.as_ref().unwrap_or_else(|| panic!("there is no feed"));
        let count = (0..=journal.durable).find(|&n| journal.end_of_batches(n) == behind);
        let count = count.unwrap_or_else(|| panic!("{behind:?} is no durable batch end"));
        assert!(behind.position > from, "nothing is told");
        let mut expected = journal.events_of(&terms.filter, count);
        expected.retain(|(position, _)| *position >= from.get());
        assert_eq!(told, expected, "events of the feed");
        self.sent = Some(behind);
    }
}
