//! The mirror's end of a session, or a subscriber's, against an origin that is the input, beside a model of what of it
//! may be taken.
//!
//! ```text
//!   input ─▶ frames, cut, damaged, in any order ─▶ MirrorSession ─▶ deliveries ─▶ ModelMirror: does it continue?
//!       ├──▶ time, syncs, questions, a writer that lags    └▶ frames ─▶ Heard: may that be said now?
//!       └──▶ the same frames ─▶ Heard: what is to be delivered, or the end of the session
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::SEAL;
use super::script::Script;
use crate::format::batch::PADDED_BYTES_LIMIT;
use crate::format::crc32;
use crate::format::files::Mark;
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::position::{Checkpoint, Position};
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::{
    Ack, CONTROL_BYTES_MAX, Data, ErrorCode, FEATURE_FILTERED, FEATURES, FRAME_BYTES_MAX,
    FRAME_HEADER_BYTES, Failure, FeedRequest, FeedTerms, FrameReader, Message, OriginEnd, Probed,
    RUN_BYTES_MAX, claimed_batch_len, put_part,
};
use crate::shipping::session::model::{
    JOURNAL, ModelJournal, ModelMirror, later, mirror_config, now,
};
use crate::shipping::session::{
    Deadlines, Delivery, Limits, MirrorConfig, MirrorSession, Now, Place, Resume, Sieve, Sifted,
    Source, Span, batches, pack, sift,
};

/// Switch of [`session_mirror`]: it has some of the journal already.
pub const RESUMES: u8 = 2;
/// Switch of [`session_mirror`]: it is the subscriber of a filtered feed.
pub const FEED: u8 = 4;

/// An input that is longer does no more.
const STEPS_MAX: usize = 300;
/// As the session states them.
const PROBES_MAX: u32 = 11;
const UNDER_WAY_MAX: u64 = 16;
/// HELLO, SUBSCRIBE, all PROBEs and one last frame.
const SAID_BYTES_MAX: usize = 16 << 10;

/// Whatever an origin does, a mirror passes on only what continues what it has, in order, keeps no more than its window
/// and a batch, acknowledges only what is durable, and ends in time.
pub fn session_mirror(input: &[u8]) {
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

/// A session, the mirror behind it, and the origin in front of it.
struct Scene<'a> {
    script: Script<'a>,
    now: Now,
    session: MirrorSession,
    mirror: ModelMirror,
    /// What an honest origin has, and how far it was sent.
    journal: ModelJournal,
    place: Place,
    /// Delivered, and not yet taken by the mirror.
    deliveries: VecDeque<Delivery>,
    /// Of a feed: up to here it was taken.
    fed: Option<Checkpoint>,
    refused: bool,
    wire: Vec<u8>,
    heard: Heard,
    bodies: fastrand::Rng,
    floods: u8,
}

impl<'a> Scene<'a> {
    fn new(switches: u8, bytes: &'a [u8]) -> Self {
        let now = now();
        let mut script = Script::new(bytes, switches & SEAL != 0);
        let mut bodies = fastrand::Rng::with_seed(script.byte().into());
        let mut journal = ModelJournal::new(JOURNAL);
        (0..=script.byte() % 24).for_each(|_| journal.append_events(&mut bodies));
        journal.sync();
        let mut mirror = ModelMirror::default();
        if switches & RESUMES != 0 {
            let had = script.up_to(journal.durable);
            mirror.journal = Some(JOURNAL);
            mirror.batches = journal.batches[..had]
                .iter()
                .map(|batch| (batch.bytes.clone(), batch.page.clone(), batch.end))
                .collect();
            mirror.durable = had;
        }
        let resume = mirror.resume();
        if script.one_in(4) {
            // The origin was restored, and has grown again.
            journal.reopened_with(script.up_to(journal.durable));
            (0..script.byte() % 8).for_each(|_| journal.append_events(&mut bodies));
            journal.sync();
        }
        let config = MirrorConfig { max_frame: FRAME_BYTES_MAX, ..mirror_config(resume) };
        let nonce = config.nonce;
        let request = (switches & FEED != 0).then(|| script.feed_request(resume.is_some()));
        let session = match &request {
            Some(request) => MirrorSession::fed(config, request.clone(), now),
            None => MirrorSession::new(config, now),
        };
        let place = Place { end: resume.map_or(Mark::start(JOURNAL).end, |it| it.end), part: 0 };
        let heard = Heard::new(nonce, resume, request);
        let fed = resume.map(|resume| resume.end);
        let (deliveries, wire, refused, floods) = (VecDeque::new(), Vec::new(), false, 0);
        Self {
            script,
            now,
            session,
            mirror,
            journal,
            place,
            deliveries,
            fed,
            refused,
            wire,
            heard,
            bodies,
            floods,
        }
    }

    fn act(&mut self) {
        let end = self.some_end();
        let (features, nonce) = (self.heard.offered(), self.heard.nonce);
        let script = &mut self.script;
        match script.byte() % 28 {
            0 => self.say(|script| Message::Welcome(script.welcome(nonce, features))),
            1 => {
                let feed = self.heard.request.is_some() != script.one_in(16);
                let terms = self.heard.request.as_ref().filter(|_| !script.one_in(4));
                let terms = terms.map_or_else(
                    || FeedTerms { filter: script.filter(), shape: None },
                    |request| request.terms.clone(),
                );
                let subscribed = script.subscribed(&end);
                self.say(|_| match feed {
                    true => Message::SubscribedFeed(subscribed, terms),
                    false => Message::Subscribed(subscribed),
                });
            }
            2..=5 => self.honest(),
            6 => self.segment(),
            7 => self.data(&end),
            8 => {
                let echo = self.heard.echo_said;
                self.say(|script| Message::Heartbeat(script.heartbeat(&end, echo)));
            }
            9 => self.say(|script| Message::Diverged(script.diverged(&end))),
            10 => self.answer_probe(),
            11 => self.say(|script| script.last_word(&end)),
            12 => {
                let page = [0; HEADER_PAGE_BYTES];
                self.say(|script| script.any(&end, &page));
            }
            13 => {
                let raw = script.raw();
                let raw = script.damage(raw);
                self.send(&raw);
            }
            14 => {
                let frame = script.unknown();
                self.send(&frame);
            }
            15 => {
                let ms = [1, 20, 199, 749, 999, 1000, 2999, 3000, 5000][script.up_to(8)];
                self.now = later(self.now, Duration::from_millis(ms));
                self.session.on_time(self.now);
            }
            16 => {
                (0..=script.byte() % 4).for_each(|_| self.journal.append_events(&mut self.bodies));
                self.journal.sync();
            }
            17..=19 => {
                let count = script.up_to(8) + 1;
                self.take(count);
            }
            20 | 21 => self.sync(),
            22 | 23 => self.speak(),
            24 => self.command(),
            25 => self.flood(),
            26 => self.run(&end),
            _ => {
                let skip = script.skip(self.heard.covered.position, &end, &end);
                self.say(|_| Message::Skip(skip));
            }
        }
        self.check();
    }

    /// What is said is about this place: the origin's end, mostly, or any batch end.
    fn some_end(&mut self) -> Checkpoint {
        match self.script.byte() % 4 {
            0 => self.journal.end_of_batches(self.script.up_to(self.journal.batches.len())),
            _ => self.journal.end(),
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
        let end = self.session.end().cloned();
        let mut new = Vec::new();
        self.session.on_bytes(&bytes, self.now, &mut new);
        if end.is_some() {
            assert!(new.is_empty(), "it delivers behind its end");
            assert_eq!(self.session.end().cloned(), end, "it hears although it has ended");
            return;
        }
        self.heard.hear(&bytes);
        for delivery in new {
            self.heard.is_delivered(&delivery);
            self.deliveries.push_back(delivery);
        }
        let frame = FRAME_HEADER_BYTES + self.heard.max_frame.max(CONTROL_BYTES_MAX) as usize;
        let limit = bytes.len() + frame + SAID_BYTES_MAX;
        assert!(self.session.held_bytes() <= limit, "{} bytes held", self.session.held_bytes());
        if self.session.end().is_none() {
            assert!(!self.heard.is_broken, "a breach is overlooked");
            self.heard.has_all(self.session.partial());
        }
    }

    // --------------------------------------------------------------------------------------- the origin's side

    /// What an honest origin sends next, of the journal or of the feed.
    fn honest(&mut self) {
        if self.heard.request.is_some() {
            let end = self.journal.end();
            return self.run(&end);
        }
        let max_frame = self.heard.max_frame.max(1024);
        let room = u64::from(self.script.byte()) * 64 + 1;
        let limits = Limits { max_frame, data_bytes: 2048, room };
        if let Ok(Some(piece)) = pack(&mut self.journal, &self.place, &limits) {
            self.place = piece.behind;
            let bytes = self.script.damage(piece.bytes.to_vec());
            self.send(&bytes);
        }
    }

    /// Header pages: of the next segment, mostly, and more of them than there should be.
    fn segment(&mut self) {
        let next = self.script.up_to(self.journal.batches.len());
        let Some(batch) = self.journal.batches.get(next) else { return };
        let page = batch.page.bytes();
        for _ in 0..=self.script.byte() % 3 {
            self.say(|_| Message::Segment(&page));
        }
    }

    /// Bytes of the journal from anywhere, said to be from anywhere.
    fn data(&mut self, end: &Checkpoint) {
        let index = self.script.up_to(self.journal.batches.len());
        let Some(batch) = self.journal.batches.get(index) else { return };
        let bytes = batch.bytes.clone();
        let from = self.script.up_to(bytes.len() - 1).min(self.script.up_to(bytes.len()));
        let bytes = &bytes[if self.script.one_in(2) { from } else { 0 }..];
        let bytes = &bytes[..bytes.len().min(usize::from(self.script.u16()).max(1))];
        let offset = self.heard.next;
        let end = Checkpoint { offset: end.offset.max(offset + bytes.len() as u64), ..*end };
        self.say(|script| {
            let (offset, origin_end) = (script.near(offset), script.origin_end(&end));
            Message::Data(Data { offset, origin_end, continued: script.one_in(2), bytes })
        });
    }

    /// The answer of an honest origin, mostly.
    fn answer_probe(&mut self) {
        let asked = self.heard.asked.clone();
        let ends = asked.iter().filter_map(|at| self.journal.batch_end_at(*at).ok());
        let mut ends: Vec<_> = ends.collect();
        match self.script.byte() % 8 {
            6 => ends.truncate(self.script.up_to(ends.len())),
            7 => ends.iter_mut().for_each(|end| *end = None),
            _ => {}
        }
        if !ends.is_empty() {
            self.say(|_| Message::Probed(Probed { ends }));
        }
    }

    /// So much that no honest origin sends it: parts of one batch, whole batches, or segments of one batch each.
    fn flood(&mut self) {
        let (kind, count) = (self.script.byte() % 3, usize::from(self.script.byte()));
        self.floods += 1;
        if self.floods > 2 || self.heard.phase != Phase::Streaming {
            return;
        }
        // An origin that was restored may have nothing, and no page.
        let Some(batch) = self.journal.batches.first() else { return };
        let (page, max_frame) = (batch.page.bytes(), self.heard.max_frame as usize);
        let mut payload = vec![0; if kind == 2 { 128 } else { max_frame - 32 }];
        let whole = if kind == 0 { PADDED_BYTES_LIMIT } else { payload.len() as u32 };
        payload[60..64].copy_from_slice(&whole.to_le_bytes());
        let mut offset = self.heard.next;
        // What is kept is compared with each piece, what is delivered is taken off each of them.
        let piece_bytes = if kind == 0 { 4 << 20 } else { 128 << 10 };
        let count = if kind == 2 { count } else { (18 << 20) / payload.len() };
        for _ in 0..count {
            if kind == 2 {
                Message::Segment(&page).encode(&mut self.wire);
            }
            let origin_end = OriginEnd { offset: 1 << 40, position: Position::new(1 << 40) };
            let (continued, bytes) = (kind == 0, &payload[..]);
            Message::Data(Data { offset, origin_end, continued, bytes }).encode(&mut self.wire);
            offset += payload.len() as u64;
            if self.wire.len() > piece_bytes {
                self.arrive(usize::MAX);
            }
        }
        self.arrive(usize::MAX);
    }

    /// The next run of a feed, or what there is none of; its fields or its bytes may be others, or it is from elsewhere.
    fn run(&mut self, elsewhere: &Checkpoint) {
        let Some(request) = self.heard.request.clone() else { return };
        let from = if self.script.one_in(16) { *elsewhere } else { self.heard.covered };
        let terms = FeedTerms { filter: self.heard.filter(&request), shape: None };
        let run_bytes = self.script.up_to(4000) + 1;
        let span = Span { at: from, run_bytes, end: None };
        let other = if self.script.one_in(16) { FeedFilter::everything() } else { terms.filter };
        let sieve = Sieve::new(Arc::new(FeedTerms { filter: other, shape: None }), None);
        let end = self.journal.end();
        match sift(&mut self.journal, &span, &sieve) {
            Ok(Sifted::Run(run)) => {
                let mut bytes = run.bytes.clone();
                if self.script.one_in(16) {
                    let at = self.script.up_to(bytes.len() - 1);
                    bytes[at] ^= self.script.byte();
                    let crc = crc32(&[&bytes[4..]]);
                    bytes[..4].copy_from_slice(&crc.to_le_bytes());
                }
                let position = Position::new(self.script.near(from.position.get()));
                let origin_end = self.script.origin_end(&end);
                let (mut frames, mut at) = (Vec::new(), 0);
                let max_frame = self.heard.max_frame.max(1024);
                while at < bytes.len() {
                    at += put_part(&mut frames, position, &bytes, at, max_frame, origin_end);
                }
                let frames = self.script.damage(frames);
                self.send(&frames);
            }
            Ok(Sifted::Passed(to)) => {
                let skip = self.script.skip(from.position, &to, &end);
                self.say(|_| Message::Skip(skip));
            }
            _ => {}
        }
    }

    // --------------------------------------------------------------------------------------- the mirror's side

    /// The writer takes what was delivered, unless it has refused something before.
    fn take(&mut self, count: usize) {
        for _ in 0..count {
            let Some(delivery) = self.deliveries.pop_front() else { return };
            if self.refused {
                continue;
            }
            match delivery {
                Delivery::Probed(ends) => {
                    self.heard.compared += 1;
                    self.session.on_compared(&self.mirror.held(&ends), self.now);
                }
                Delivery::Granted(end, _) => {
                    self.fed.get_or_insert(Mark::start(end.journal).end);
                }
                Delivery::Run(run) => self.fed = Some(run.behind),
                Delivery::Skipped(behind) => self.fed = Some(behind),
                delivery => {
                    if let Err(reason) = self.mirror.try_take(delivery) {
                        self.refused = true;
                        self.session.fail(Failure::new(ErrorCode::REFUSED, reason));
                    }
                }
            }
        }
    }

    fn sync(&mut self) {
        let end = match self.heard.request {
            Some(_) => self.fed,
            None => self.mirror.sync(),
        };
        if let Some(end) = end.filter(|_| !self.refused) {
            self.session.on_durable(end);
            self.heard.is_durable(end);
        }
    }

    fn command(&mut self) {
        match self.script.byte() % 8 {
            0 => self.session.on_closed(),
            1 => self.session.leave(),
            2 => self.session.fail(Failure::new(ErrorCode::STORAGE, "the disk")),
            3 => self.session.on_applied(Position::new(u64::from(self.script.byte()))),
            _ => {
                self.session.ask(self.now);
                let asks_at = self.session.asks_at();
                let soon = self.now.at + Duration::from_secs(1);
                assert!(asks_at.is_none_or(|at| at < soon), "asks at {asks_at:?}");
            }
        }
    }

    /// What the session has to say is taken.
    fn speak(&mut self) {
        let mut out = Vec::new();
        self.session.take_output(self.now, &mut out);
        assert!(out.len() <= SAID_BYTES_MAX, "{} bytes to say", out.len());
        self.heard.say(&out, self.session.end().is_some());
    }

    fn check(&self) {
        let heard = &self.heard;
        if self.session.end().is_none() {
            let told = self.session.told().end.map(|(end, _)| end);
            assert_eq!(told, heard.told, "the origin's durable end");
        }
        let window = u64::from(mirror_config(None).window_bytes);
        if heard.request.is_some() {
            let held = heard.runs.iter().map(|(_, len)| len).sum::<u64>();
            let held = held + self.session.partial().len() as u64;
            assert!(held <= window + u64::from(RUN_BYTES_MAX), "{held} bytes of runs");
            return;
        }
        let partial = self.session.partial().len() as u64;
        let held = (heard.delivered + partial).saturating_sub(heard.durable.offset);
        assert!(held <= window + u64::from(PADDED_BYTES_LIMIT), "{held} bytes not durable");
        let pages = heard.pages_held.len() as u64;
        assert!(pages <= window / 512 + 64 + 1, "{pages} header pages not durable");
    }

    /// Nothing is heard any more: it ends, says what it has to say, and nothing behind that.
    fn end(&mut self) {
        self.take(usize::MAX);
        self.speak();
        self.check();
        let Deadlines { handshake, silence, .. } = Deadlines::default();
        self.now = later(self.now, handshake.max(silence));
        self.session.on_time(self.now);
        let end = self.session.end().cloned();
        assert!(end.is_some(), "silence is not noticed");
        self.speak();
        self.session.ask(self.now);
        self.sync();
        self.session.leave();
        self.session.fail(Failure::new(ErrorCode::STORAGE, "the disk"));
        self.say(|script| Message::Welcome(script.welcome([0x17; 16], 0)));
        self.arrive(usize::MAX);
        let mut out = Vec::new();
        self.session.take_output(self.now, &mut out);
        assert!(out.is_empty(), "more is said behind the end");
        assert_eq!(self.session.end().cloned(), end);
    }
}

/// What was heard of the origin and said to it so far: what is to be delivered, and what may be said next.
struct Heard {
    nonce: [u8; 16],
    resume: Option<Resume>,
    request: Option<FeedRequest>,
    hearing: FrameReader,
    saying: FrameReader,
    max_frame: u32,
    phase: Phase,
    /// The session should have ended by what was heard.
    is_broken: bool,
    /// The origin's durable end as it was told last.
    told: Option<OriginEnd>,
    /// What the next DATA frame must begin with.
    next: u64,
    /// Bytes of the journal that were sent in order and not delivered, and header pages with the places of theirs.
    bytes: Vec<u8>,
    pages: VecDeque<(u64, Box<[u8; HEADER_PAGE_BYTES]>)>,
    /// Up to here bytes were delivered.
    delivered: u64,
    /// The places of header pages that were delivered and whose segments aren't durable.
    pages_held: Vec<u64>,
    durable: Checkpoint,
    /// Of a feed: what was granted, up to where every position is accounted for, and runs that aren't durable.
    granted: Option<FeedTerms>,
    covered: Checkpoint,
    runs: Vec<(u64, u64)>,
    diverged: bool,
    asked: Vec<Position>,
    probes: u32,
    /// Answers that were delivered, and those that the mirror has compared.
    answers: u32,
    compared: u32,
    echo_said: u64,
    echo_back: u64,
    said: u32,
    is_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    AwaitWelcome,
    AwaitSubscribed,
    Streaming,
    Diverged,
}

impl Heard {
    fn new(nonce: [u8; 16], resume: Option<Resume>, request: Option<FeedRequest>) -> Self {
        let end = resume.map_or(Mark::start(JOURNAL).end, |resume| resume.end);
        Self {
            nonce,
            resume,
            request,
            hearing: FrameReader::new(),
            saying: FrameReader::new(),
            max_frame: 0,
            phase: Phase::AwaitWelcome,
            is_broken: false,
            told: None,
            next: end.offset,
            bytes: Vec::new(),
            pages: VecDeque::new(),
            delivered: end.offset,
            pages_held: Vec::new(),
            durable: end,
            granted: None,
            covered: end,
            runs: Vec::new(),
            diverged: false,
            asked: Vec::new(),
            probes: 0,
            answers: 0,
            compared: 0,
            echo_said: 0,
            echo_back: 0,
            said: 0,
            is_over: false,
        }
    }

    const fn offered(&self) -> u64 {
        if self.request.is_some() { FEATURE_FILTERED } else { FEATURES }
    }

    fn filter(&self, request: &FeedRequest) -> FeedFilter {
        self.granted.as_ref().map_or_else(|| request.terms.filter.clone(), |it| it.filter.clone())
    }

    fn hear(&mut self, bytes: &[u8]) {
        let mut hearing = std::mem::take(&mut self.hearing);
        hearing.push(bytes);
        while !self.is_broken {
            match hearing.next_message() {
                Ok(Some(message)) => self.hear_message(&message),
                Ok(None) => break,
                Err(_) => self.is_broken = true,
            }
            if self.max_frame > 0 {
                hearing.allow_data(self.max_frame);
            }
        }
        self.hearing = hearing;
    }

    fn hear_message(&mut self, message: &Message<'_>) {
        match (self.phase, message) {
            (Phase::AwaitWelcome, Message::Welcome(welcome))
                if welcome.nonce == self.nonce && welcome.max_frame <= FRAME_BYTES_MAX =>
            {
                self.max_frame = welcome.max_frame;
                self.phase = Phase::AwaitSubscribed;
            }
            (Phase::AwaitSubscribed, Message::Subscribed(subscribed)) if self.request.is_none() => {
                self.granted_to(&subscribed.end);
            }
            (Phase::AwaitSubscribed, Message::SubscribedFeed(subscribed, terms))
                if self.request.is_some() =>
            {
                self.granted = Some(terms.clone());
                self.granted_to(&subscribed.end);
            }
            (Phase::AwaitSubscribed, Message::Diverged(_)) => {
                (self.phase, self.diverged) = (Phase::Diverged, true);
            }
            (Phase::Diverged, Message::Probed(_)) => {}
            (Phase::Streaming, Message::Heartbeat(heartbeat)) => {
                let is_echo = (self.echo_back..=self.echo_said).contains(&heartbeat.echo);
                self.echo_back = heartbeat.echo;
                let is_ours = heartbeat.end.journal == self.durable.journal;
                self.is_broken |= !is_echo || !is_ours;
                self.is_told(OriginEnd::from(&heartbeat.end));
            }
            (Phase::Streaming, Message::Data(data)) if self.request.is_none() => self.data(data),
            (Phase::Streaming, Message::Segment(page)) if self.request.is_none() => {
                self.pages.push_back((self.next, Box::new(**page)));
            }
            (Phase::Streaming, Message::Events(events)) if self.request.is_some() => {
                self.is_told(events.origin_end);
            }
            (Phase::Streaming, Message::Skip(skip)) if self.request.is_some() => {
                self.is_told(skip.origin_end);
            }
            _ => self.is_broken = true,
        }
    }

    fn granted_to(&mut self, end: &Checkpoint) {
        self.phase = Phase::Streaming;
        if self.resume.is_none() {
            let start = Mark::start(end.journal).end;
            (self.durable, self.covered) = (start, start);
        }
        let (had, told) = (self.durable, OriginEnd::from(end));
        let is_behind = told.offset < had.offset || told.position < had.position;
        self.is_broken |= end.journal != had.journal || is_behind;
        self.told = Some(told);
    }

    /// A durable end doesn't go back.
    fn is_told(&mut self, end: OriginEnd) {
        let goes_back =
            self.told.is_some_and(|it| end.offset < it.offset || end.position < it.position);
        self.is_broken |= goes_back;
        if !self.is_broken {
            self.told = Some(end);
        }
    }

    fn data(&mut self, data: &Data<'_>) {
        self.is_told(data.origin_end);
        if data.offset != self.next || self.is_broken {
            self.is_broken = true;
            return;
        }
        self.next += data.bytes.len() as u64;
        let window = u64::from(mirror_config(None).window_bytes) + u64::from(PADDED_BYTES_LIMIT);
        if self.next.saturating_sub(self.durable.offset) > window {
            self.is_broken = true;
            return;
        }
        self.bytes.extend_from_slice(data.bytes);
    }

    /// Only what was sent is delivered, in its order, each batch whole and behind its segment's page.
    fn is_delivered(&mut self, delivery: &Delivery) {
        match delivery {
            Delivery::Subscribed(end) => {
                assert!(self.request.is_none() && self.phase == Phase::Streaming);
                assert_eq!(end.journal, self.durable.journal, "another journal");
            }
            Delivery::Segment(page) => {
                let (at, sent) =
                    self.pages.pop_front().unwrap_or_else(|| panic!("a page of nobody"));
                assert!(at == self.delivered && sent == *page, "a page of elsewhere");
                assert!(!self.pages_held.contains(&at), "a second page for a segment");
                self.pages_held.push(at);
            }
            Delivery::Batches(bytes) => {
                assert!(self.pages.front().is_none_or(|(at, _)| *at > self.delivered), "no page");
                assert!(self.bytes.starts_with(bytes), "other bytes than were sent in order");
                let lens: usize = batches(bytes).map(|it| claimed_batch_len(it).unwrap_or(0)).sum();
                assert!(lens == bytes.len() && lens > 0, "parts of batches");
                self.bytes.drain(..bytes.len());
                self.delivered += bytes.len() as u64;
            }
            Delivery::Probed(ends) => {
                assert!(self.diverged && ends.len() <= 64, "an answer to nobody");
                self.answers += 1;
                assert!(self.answers <= self.compared + 1, "answers to one question");
            }
            Delivery::Granted(_, terms) => {
                let request = self.request.as_ref().unwrap_or_else(|| panic!("a feed of nobody"));
                assert!(terms.filter.is_within(&request.terms.filter), "more than was asked for");
                assert!(!request.goes_on || *terms == request.terms, "a feed with other terms");
            }
            Delivery::Run(run) => {
                let terms = self.granted.as_ref().unwrap_or_else(|| panic!("a run of nobody"));
                assert_eq!(run.from, self.covered.position, "positions are left out");
                for entry in run.entries().flatten() {
                    let record = &entry.record;
                    assert!(terms.filter.matches_record(record), "not in the feed");
                    assert!(!record.event_type.starts_with('$'), "the journal's own");
                }
                self.runs.push((run.behind.offset, run.len_bytes() as u64));
                self.covers(run.behind);
            }
            Delivery::Skipped(behind) => self.covers(*behind),
        }
    }

    fn covers(&mut self, behind: Checkpoint) {
        let had = self.covered;
        assert_eq!(behind.journal, had.journal);
        assert!(behind.position > had.position && behind.offset > had.offset, "it goes back");
        let told = self.told.unwrap_or_else(|| panic!("events before SUBSCRIBED"));
        assert!(behind.offset <= told.offset && behind.position <= told.position, "not durable");
        self.covered = behind;
    }

    /// A session that goes on has delivered everything, or keeps it until its batch is whole.
    fn has_all(&self, partial: &[u8]) {
        if self.request.is_none() {
            assert!(self.bytes == partial, "{} bytes are kept", self.bytes.len());
            assert!(self.pages.is_empty(), "{} pages are kept", self.pages.len());
        }
    }

    fn is_durable(&mut self, end: Checkpoint) {
        self.durable = end;
        self.pages_held.retain(|at| *at >= end.offset);
        self.runs.retain(|(behind, _)| *behind > end.offset);
    }

    fn say(&mut self, bytes: &[u8], has_ended: bool) {
        assert!(!self.is_over || bytes.is_empty(), "more is said behind the last word");
        let mut saying = std::mem::take(&mut self.saying);
        saying.push(bytes);
        loop {
            match saying.next_message() {
                Ok(Some(message)) => self.say_message(&message, has_ended),
                Ok(None) => break,
                Err(error) => panic!("it says what is no frame: {error}"),
            }
        }
        assert!(!saying.is_inside_a_frame(), "a part of a frame");
        self.saying = saying;
        self.is_over |= has_ended;
    }

    fn say_message(&mut self, message: &Message<'_>, has_ended: bool) {
        assert!(!self.is_over, "{} behind the last word", message.name());
        self.said += 1;
        match message {
            Message::Hello(hello) => {
                assert_eq!((self.said, hello.nonce, hello.features & !0b1101), (1, self.nonce, 0));
            }
            Message::Subscribe(subscribe) | Message::SubscribeFeed(subscribe, _) => {
                assert_eq!(self.said, 2, "SUBSCRIBE once, behind HELLO");
                assert_ne!(self.phase, Phase::AwaitWelcome, "SUBSCRIBE before WELCOME");
                assert_eq!(subscribe.from, self.resume.map(|resume| resume.end));
            }
            Message::Ack(ack) => self.say_ack(ack, has_ended),
            Message::Probe(probe) => {
                self.probes += 1;
                assert!(self.diverged && self.probes <= PROBES_MAX, "{} PROBEs", self.probes);
                let own = self.durable.position;
                assert!(probe.positions.iter().all(|at| *at <= own), "{:?}", probe.positions);
                self.asked.clone_from(&probe.positions);
            }
            Message::Error(_) | Message::GoAway(_) => {
                assert!(has_ended, "a last word, and it goes on");
                self.is_over = true;
            }
            _ => panic!("a mirror says {}", message.name()),
        }
    }

    fn say_ack(&mut self, ack: &Ack, has_ended: bool) {
        assert!(self.phase == Phase::Streaming && !has_ended, "ACK in {:?}", self.phase);
        assert_eq!(ack.mirrored, self.durable, "acknowledged, but not durable");
        assert!(ack.echo >= self.echo_said, "numbers go back");
        assert!(ack.echo <= self.echo_back + UNDER_WAY_MAX, "too many numbers under way");
        self.echo_said = ack.echo;
    }
}
