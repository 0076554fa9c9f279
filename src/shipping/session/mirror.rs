//! The mirror's end of a session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use self::echoes::Echoes;
use self::fed::Fed;
use super::feed::InFlight;
use super::probe::{Held, Search};
use super::{Deadline, Deadlines, DivergedAt, Now, SessionEnd, TruncatedAt, Violation};
use crate::format::batch::{Link, PADDED_BYTES_LIMIT};
use crate::format::files::{Mark, Witness};
use crate::format::segment::HEADER_PAGE_BYTES;
use crate::position::{Checkpoint, NodeId, Position};
use crate::shipping::message::{
    Ack, Authentication, Common, Data, Diverged, Divergence, ErrorCode, FEATURE_FILTERED,
    FEATURE_PROBE, FEATURE_TRUNCATED, FEATURES, FRAME_BYTES_MAX, Failure, FeedRequest, FeedTerms,
    FrameReader, GoAway, Heartbeat, Hello, Message, OriginEnd, PROTOCOL_VERSIONS, Probe, Probed,
    Run, Speaker, Subscribe, Subscribed, Welcome, claimed_batch_len,
};

mod echoes;
mod fed;

#[cfg(test)]
pub(super) use fed::SKIPS_MAX;

/// However short an origin's segments are, so much lies in them on average.
const SEGMENT_BYTES_MEAN_MIN: u32 = 512;
/// A few may be shorter than that, where a journal was opened with other options, or taken over.
const PAGES_BESIDE: u32 = 64;

/// What a mirror's session is told at its beginning.
#[derive(Clone, Debug)]
pub(crate) struct MirrorConfig {
    /// `None` while there is no mirror yet.
    pub(crate) node: Option<NodeId>,
    /// It gets the journal from there: not from itself, then. An origin asks its own mirrors.
    pub(crate) follows: bool,
    pub(crate) nonce: [u8; 16],
    pub(crate) authentication: Authentication,
    pub(crate) agent: String,
    pub(crate) deadlines: Deadlines,
    pub(crate) max_frame: u32,
    pub(crate) window_bytes: u32,
    /// Where the mirror ends; `None` while there is none yet.
    pub(crate) resume: Option<Resume>,
}

/// What the origin must find in its own history before it sends anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resume {
    pub(crate) end: Checkpoint,
    pub(crate) witness: Option<Witness>,
}

/// What the session hands on to whoever writes the mirror, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The subscription was granted, for the journal that ends here at the origin.
    Subscribed(Checkpoint),
    /// The header page of the next segment.
    Segment(Box<[u8; HEADER_PAGE_BYTES]>),
    /// Whole batches, not verified yet.
    Batches(Vec<u8>),
    /// The histories differ. These are batch ends of the origin's, in order: what they are in the mirror is to
    /// be told with [`MirrorSession::on_compared`].
    Probed(Vec<Option<Link>>),
    /// The feed was granted, of the journal that ends here at the origin, with these terms.
    Granted(Checkpoint, FeedTerms),
    /// Events of the feed, verified.
    Run(Run),
    /// The feed has nothing up to here.
    Skipped(Checkpoint),
}

/// What the origin has told of itself, in this session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// Its durable end, as of then: it was read later, however long it took to come here.
    pub(crate) end: Option<(OriginEnd, Instant)>,
    /// Its clock, in microseconds since 1970, as of then.
    pub(crate) clock: Option<(i64, Instant)>,
    /// How often it makes itself heard, as it says.
    pub(crate) heartbeat: Duration,
    /// The nodes through which the journal comes, the one that serves it here last.
    pub(crate) path: Arc<[NodeId]>,
    /// Who serves it; `None`: a mirror that hasn't said yet how it is with its origin.
    pub(crate) speaker: Option<Speaker>,
    /// The offset up to which bytes have come.
    pub(crate) received: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    AwaitWelcome,
    AwaitSubscribed,
    Streaming,
    /// The histories differ, and where they part is being found out.
    Probing(DivergedAt),
    /// The answer is being compared: nothing is asked meanwhile.
    Comparing(DivergedAt),
    Ended,
}

/// The mirror's end of a session. See the [module](super) for states and invariants.
#[derive(Debug)]
pub(crate) struct MirrorSession {
    config: MirrorConfig,
    reader: FrameReader,
    state: State,
    control: Vec<u8>,
    /// For the answer that is awaited, or for the next byte.
    deadline: Instant,
    said_at: Instant,
    /// What the next DATA frame must begin with.
    next_offset: u64,
    /// The parts so far of a batch that goes on.
    partial: Vec<u8>,
    /// A header page has come, and not yet a batch behind it.
    page_open: bool,
    /// Header pages with what has come of their segments, until that is durable. They take no room in the window.
    pages: InFlight,
    durable: Option<Checkpoint>,
    applied: Option<Position>,
    ack_due: bool,
    /// What the last acknowledgement said.
    acked: Option<(u64, Option<Position>)>,
    echoes: Echoes,
    /// What is told now was caused by what this side said then.
    as_of: Instant,
    told: Told,
    /// The features that are used in this session.
    features: u64,
    search: Option<Search>,
    /// Of a session for a filtered feed.
    fed: Option<Fed>,
    end: Option<SessionEnd>,
}

impl MirrorSession {
    pub(crate) fn new(config: MirrorConfig, now: Now) -> Self {
        Self::with(config, None, now)
    }

    /// A session for a filtered feed.
    pub(crate) fn fed(config: MirrorConfig, request: FeedRequest, now: Now) -> Self {
        Self::with(config, Some(request), now)
    }

    fn with(config: MirrorConfig, feed: Option<FeedRequest>, now: Now) -> Self {
        let durable = config.resume.map(|resume| resume.end);
        let mut session = Self {
            reader: FrameReader::new(),
            state: State::AwaitWelcome,
            control: Vec::new(),
            deadline: now.at + config.deadlines.handshake,
            said_at: now.at,
            next_offset: durable.map_or(0, |end| end.offset),
            partial: Vec::new(),
            page_open: false,
            pages: InFlight::default(),
            durable,
            applied: None,
            ack_due: false,
            acked: None,
            echoes: Echoes::new(now.at),
            as_of: now.at,
            told: Told::default(),
            features: 0,
            search: None,
            fed: feed.map(|request| Fed::new(request, durable)),
            end: None,
            config,
        };
        session.say_hello();
        session
    }

    fn say_hello(&mut self) {
        // Said once, and then not kept.
        let authentication =
            std::mem::replace(&mut self.config.authentication, Authentication::None);
        self.say(&Message::Hello(Hello {
            versions: PROTOCOL_VERSIONS,
            features: self.offered(),
            max_frame: self.config.max_frame.min(FRAME_BYTES_MAX),
            node: self.config.node,
            nonce: self.config.nonce,
            authentication,
            agent: self.config.agent.clone(),
        }));
    }

    const fn offered(&self) -> u64 {
        if self.fed.is_some() { FEATURE_FILTERED | FEATURE_TRUNCATED } else { FEATURES }
    }

    /// Why the session ended, once it has.
    pub(crate) const fn end(&self) -> Option<&SessionEnd> {
        self.end.as_ref()
    }

    /// What it keeps of what it has heard, but for the parts of a batch, and of what it wants to say.
    #[cfg(feature = "test-kit")]
    pub(crate) fn held_bytes(&self) -> usize {
        self.reader.held_bytes() + self.control.len()
    }

    /// The parts so far of a batch or a run that goes on.
    #[cfg(feature = "test-kit")]
    pub(crate) fn partial(&self) -> &[u8] {
        &self.partial
    }

    /// The origin's durable end as last told in this session, and as of when.
    pub(crate) const fn origin_end(&self) -> Option<(OriginEnd, Instant)> {
        self.told.end
    }

    /// The same, unless it is a relay's that is behind its origin.
    pub(crate) fn current_end(&self) -> Option<(OriginEnd, Instant)> {
        self.told.end.filter(|_| self.told.speaker.is_some_and(Speaker::is_current))
    }

    /// All that the origin has told of itself.
    pub(crate) fn told(&self) -> Told {
        Told { received: self.next_offset, ..self.told.clone() }
    }

    /// Takes what is to be written.
    pub(crate) fn take_output(&mut self, now: Now, out: &mut Vec<u8>) {
        if let (true, Some(mirrored)) = (std::mem::take(&mut self.ack_due), self.durable) {
            self.acknowledge(mirrored, now);
        }
        if !self.control.is_empty() {
            self.said_at = now.at;
            out.append(&mut self.control);
        }
    }

    fn acknowledge(&mut self, mirrored: Checkpoint, now: Now) {
        let (offset, applied) = (mirrored.offset, self.applied);
        let says_more = self.acked.is_some_and(|acked| offset > acked.0 || applied > acked.1);
        self.acked = Some((offset, applied.max(self.acked.and_then(|acked| acked.1))));
        let echo = self.echoes.send(now.at, says_more, self.config.deadlines.heartbeat);
        self.say(&Message::Ack(Ack { mirrored, applied, echo }));
    }

    /// Somebody waits for an end that the origin tells from now on: it is asked for one with the next acknowledgement, if
    /// there needn't be a pause at once.
    pub(crate) fn ask(&mut self, now: Now) {
        self.echoes.want();
        self.on_time(now);
    }

    /// When to look again whether the origin can be asked what somebody waits for. Not before a number comes back if too many
    /// are under way.
    pub(crate) fn asks_at(&self) -> Option<Instant> {
        let is_open =
            self.end.is_none() && self.state == State::Streaming && self.durable.is_some();
        self.echoes.wanted_at().filter(|_| is_open)
    }

    /// The mirror has made this much durable.
    pub(crate) fn on_durable(&mut self, end: Checkpoint) {
        self.ack_due |= self.durable.is_none_or(|durable| durable.offset < end.offset);
        self.durable = Some(end);
        self.pages.acknowledged(end.offset);
        self.fed.iter_mut().for_each(|fed| fed.acknowledged(end.offset));
        self.ack_due &= self.state == State::Streaming;
    }

    /// Views have been applied this far; goes out with the next acknowledgement.
    pub(crate) fn on_applied(&mut self, position: Position) {
        self.applied = Some(position);
    }

    /// The peer closed its side.
    pub(crate) fn on_closed(&mut self) {
        self.finish(SessionEnd::Disconnected);
    }

    /// Time has passed.
    pub(crate) fn on_time(&mut self, now: Now) {
        if self.end.is_some() {
            return;
        }
        if now.at >= self.deadline {
            let deadline = match self.state {
                State::Streaming => Deadline::Silence,
                _ => Deadline::Handshake,
            };
            return self.finish(SessionEnd::Timeout(deadline));
        }
        let is_due =
            now.at >= self.said_at + self.config.deadlines.heartbeat || self.echoes.is_due(now.at);
        self.ack_due |= self.state == State::Streaming && is_due;
    }

    /// The other side is a relay that doesn't hear from its origin: others are asked.
    pub(crate) fn leave(&mut self) {
        if self.end.is_none() {
            self.say(&Message::GoAway(GoAway { reconnect_after_ms: 0 }));
            self.finish(SessionEnd::Apart);
        }
    }

    /// This side can't go on; the peer is told why.
    pub(crate) fn fail(&mut self, failure: Failure) {
        if self.end.is_none() {
            self.say(&Message::Error(failure.clone()));
            self.finish(SessionEnd::Own(failure));
        }
    }

    /// Bytes have arrived. What they deliver is appended to `deliveries`.
    pub(crate) fn on_bytes(&mut self, bytes: &[u8], now: Now, deliveries: &mut Vec<Delivery>) {
        if self.end.is_some() {
            return;
        }
        if self.state == State::Streaming {
            self.deadline = now.at + self.config.deadlines.silence;
        }
        let mut reader = std::mem::take(&mut self.reader);
        reader.push(bytes);
        while self.end.is_none() {
            let taken = match reader.next_message() {
                Ok(Some(message)) => self.on_message(message, now, deliveries),
                Ok(None) => break,
                Err(error) => Err(error.into()),
            };
            match taken {
                Ok(Some(max_frame)) => reader.allow_data(max_frame),
                Ok(None) => {}
                Err(violation) => self.violated(violation),
            }
        }
        self.reader = reader;
    }

    /// Returns the frame limit once it is agreed upon.
    fn on_message(
        &mut self,
        message: Message<'_>,
        now: Now,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<Option<u32>, Violation> {
        match (self.state, message) {
            (_, Message::Error(failure)) => self.reported(failure),
            (_, Message::GoAway(go_away)) => self.finish(SessionEnd::GoAway(go_away)),
            (State::AwaitWelcome, Message::Welcome(welcome)) => {
                self.welcomed(&welcome, now)?;
                return Ok(Some(welcome.max_frame));
            }
            (State::AwaitSubscribed, Message::Subscribed(subscribed)) => {
                self.subscribed(&subscribed, None, now, deliveries)?;
            }
            (State::AwaitSubscribed, Message::SubscribedFeed(subscribed, terms)) => {
                self.subscribed(&subscribed, Some(terms), now, deliveries)?;
            }
            (State::Streaming, Message::Events(events)) if self.fed.is_some() => {
                self.events(&events, deliveries)?;
            }
            (State::Streaming, Message::Skip(skip))
                if self.fed.is_some() && self.partial.is_empty() =>
            {
                self.skip(&skip, deliveries)?;
            }
            (State::AwaitSubscribed, Message::Diverged(diverged)) => {
                self.diverged(&diverged, now)?;
            }
            (State::Probing(_), Message::Probed(probed)) => self.probed(probed, now, deliveries)?,
            (_, Message::Truncated(truncated))
                if matches!(self.state, State::AwaitSubscribed | State::Streaming) =>
            {
                let (start, sources) = (truncated.start, truncated.sources);
                let (first, start) = (start.position, Some(start));
                self.finish(SessionEnd::Truncated(TruncatedAt { first, start, sources }));
            }
            (State::Streaming, Message::Segment(page))
                if self.partial.is_empty() && !self.page_open && self.fed.is_none() =>
            {
                self.check_pages()?;
                self.page_open = true;
                deliveries.push(Delivery::Segment(Box::new(*page)));
            }
            (State::Streaming, Message::Data(data)) if self.fed.is_none() => {
                self.data(&data, deliveries)?;
            }
            (State::Streaming, Message::Heartbeat(heartbeat)) => self.heartbeat(&heartbeat)?,
            (_, message) => {
                let (frame, expected) = (message.name(), self.expected());
                return Err(Violation::Unexpected { frame, expected });
            }
        }
        Ok(None)
    }

    pub(super) const fn expected(&self) -> &'static str {
        match self.state {
            State::AwaitWelcome => "WELCOME",
            State::AwaitSubscribed => "SUBSCRIBED",
            State::Probing(_) => "PROBED",
            State::Comparing(_) => "nothing before PROBE",
            _ if self.fed.is_some() && self.partial.is_empty() => "EVENTS",
            _ if self.fed.is_some() => "the rest of a run",
            State::Streaming | State::Ended if self.partial.is_empty() => "DATA",
            State::Streaming | State::Ended => "the rest of a batch",
        }
    }

    fn reported(&mut self, failure: Failure) {
        self.finish(match failure.code {
            ErrorCode::VERSION => SessionEnd::Version(failure.versions),
            _ => SessionEnd::Peer(failure),
        });
    }

    fn welcomed(&mut self, welcome: &Welcome, now: Now) -> Result<(), Violation> {
        let ours = PROTOCOL_VERSIONS.min..=PROTOCOL_VERSIONS.max;
        if !ours.contains(&welcome.version)
            || welcome.nonce != self.config.nonce
            || welcome.features & !self.offered() != 0
            || welcome.max_frame > self.config.max_frame
        {
            return Err(Violation::Welcome);
        }
        if self.config.follows && self.config.node == Some(welcome.node) {
            self.finish(SessionEnd::Cycle(vec![welcome.node]));
            return Ok(());
        }
        if self.fed.is_some() && welcome.features & FEATURE_FILTERED == 0 {
            let failure = Failure::new(ErrorCode::UNSUPPORTED, "it serves no filtered feeds");
            self.finish(SessionEnd::Peer(failure));
            return Ok(());
        }
        self.features = welcome.features;
        self.told.clock = Some((welcome.now_us, self.as_of));
        self.as_of = now.at;
        self.told.heartbeat = Duration::from_millis(welcome.heartbeat_ms.into());
        self.state = State::AwaitSubscribed;
        self.deadline = now.at + self.config.deadlines.silence;
        let subscribe = Subscribe {
            from: self.config.resume.map(|resume| resume.end),
            witness: self.config.resume.and_then(|resume| resume.witness),
            window_bytes: self.config.window_bytes,
        };
        let request = self.fed.as_ref().map(|fed| fed.request().clone());
        match request {
            Some(request) => self.say(&Message::SubscribeFeed(subscribe, request)),
            None => self.say(&Message::Subscribe(subscribe)),
        }
        Ok(())
    }

    /// Nothing was sent. Where the histories part is asked for: it isn't believed.
    fn diverged(&mut self, diverged: &Diverged, now: Now) -> Result<(), Violation> {
        let (divergence, at_witness) = (diverged.divergence, diverged.at_witness);
        let (common, speaker, origin) = (diverged.common, diverged.speaker, diverged.end);
        let is_cut_off = false;
        let at = DivergedAt { divergence, at_witness, common, speaker, origin, is_cut_off };
        let Some(mirror) = self.durable.filter(|_| divergence != Divergence::Foreign) else {
            self.finish(SessionEnd::Diverged(at));
            return Ok(());
        };
        if at_witness || self.features & FEATURE_PROBE == 0 {
            // The origin has found the mirror's end in its own history, or it hasn't.
            let own_end = Common { position: mirror.position, chain: mirror.chain };
            let may_be = |common: Common| match at_witness {
                true => common == own_end,
                false => common.position < mirror.position,
            };
            if !common.is_none_or(may_be) {
                return Err(Violation::Subscribed);
            }
            self.finish(SessionEnd::Diverged(at));
            return Ok(());
        }
        self.state = State::Probing(DivergedAt { common: None, ..at });
        let shorter_end = mirror.position.min(origin.position);
        self.search = Some(Search::new(mirror.journal, shorter_end));
        self.ask_on(now);
        Ok(())
    }

    /// Asks the next question, or ends with what was found.
    fn ask_on(&mut self, now: Now) {
        let (State::Probing(at), Some(search)) = (self.state, &self.search) else { return };
        let positions = search.asked().to_vec();
        if positions.is_empty() {
            let common = search.found();
            return self.finish(SessionEnd::Diverged(DivergedAt { common, ..at }));
        }
        self.deadline = now.at + self.config.deadlines.silence;
        self.say(&Message::Probe(Probe { positions }));
    }

    fn probed(
        &mut self,
        probed: Probed,
        now: Now,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<(), Violation> {
        if !self.search.as_ref().is_some_and(|search| search.is_answered_by(&probed.ends)) {
            return Err(Violation::Probed);
        }
        if let State::Probing(at) = self.state {
            self.state = State::Comparing(at);
        }
        // It is compared on this side now, however long the disk takes.
        self.deadline = now.at + self.config.deadlines.silence;
        deliveries.push(Delivery::Probed(probed.ends));
        Ok(())
    }

    /// What the batch ends of the last [`Delivery::Probed`] are in the mirror.
    pub(crate) fn on_compared(&mut self, held: &[Held], now: Now) {
        if let (State::Comparing(at), Some(search)) = (self.state, &mut self.search) {
            search.narrow(held);
            self.state = State::Probing(at);
            self.ask_on(now);
        }
    }

    fn subscribed(
        &mut self,
        subscribed: &Subscribed,
        terms: Option<FeedTerms>,
        now: Now,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<(), Violation> {
        let from = self.durable.unwrap_or_else(|| Mark::start(subscribed.end.journal).end);
        let end = subscribed.end;
        let behind = end.offset < from.offset || end.position < from.position;
        if end.journal != from.journal || behind || !self.are_asked_for(terms.as_ref()) {
            return Err(Violation::Subscribed);
        }
        let is_there = |node| subscribed.path.contains(&node);
        if self.config.follows && self.config.node.is_some_and(is_there) {
            self.finish(SessionEnd::Cycle(subscribed.path.clone()));
            return Ok(());
        }
        if subscribed.first_position > from.position {
            self.finish(SessionEnd::Truncated(subscribed.first_position.into()));
            return Ok(());
        }
        self.durable = Some(from);
        self.state = State::Streaming;
        self.deadline = now.at + self.config.deadlines.silence;
        self.told.end = Some((OriginEnd::from(&end), self.as_of));
        self.told.path = subscribed.path.as_slice().into();
        self.told.speaker = (subscribed.path.len() <= 1).then_some(Speaker::Origin);
        self.ack_due = true;
        match (terms, &mut self.fed) {
            (Some(terms), Some(fed)) => {
                fed.begin(from, &terms);
                deliveries.push(Delivery::Granted(end, terms));
            }
            _ => deliveries.push(Delivery::Subscribed(end)),
        }
        Ok(())
    }

    fn heartbeat(&mut self, heartbeat: &Heartbeat) -> Result<(), Violation> {
        if self.durable.is_none_or(|durable| durable.journal != heartbeat.end.journal) {
            return Err(Violation::Subscribed);
        }
        if let Some(sent) = self.echoes.came_back(heartbeat.echo)? {
            self.as_of = sent;
            self.told.clock = Some((heartbeat.now_us, sent));
        }
        self.told.speaker = Some(heartbeat.speaker);
        self.origin_is_durable_to(OriginEnd::from(&heartbeat.end))
    }

    /// A durable end never goes back, and never lies in front of what was sent.
    fn origin_is_durable_to(&mut self, end: OriginEnd) -> Result<(), Violation> {
        let known = self.told.end.map_or(end, |(end, _)| end);
        if end.offset < known.offset || end.position < known.position {
            return Err(Violation::EndWentBack { known: known.position, found: end.position });
        }
        self.told.end = Some((end, self.as_of));
        Ok(())
    }

    fn data(&mut self, data: &Data<'_>, deliveries: &mut Vec<Delivery>) -> Result<(), Violation> {
        if data.offset != self.next_offset {
            return Err(Violation::Offset { expected: self.next_offset, found: data.offset });
        }
        if data.bytes.is_empty() {
            return Err(Violation::Batches(data.offset));
        }
        self.origin_is_durable_to(data.origin_end)?;
        self.next_offset += data.bytes.len() as u64;
        if std::mem::take(&mut self.page_open) {
            self.pages.add(self.next_offset, 1, usize::MAX);
        }
        self.check_window()?;
        if data.continued || !self.partial.is_empty() {
            return self.part(data, deliveries);
        }
        if !divides_into_batches(data.bytes) {
            return Err(Violation::Batches(data.offset));
        }
        deliveries.push(Delivery::Batches(data.bytes.to_vec()));
        Ok(())
    }

    /// A peer that keeps to the window sends at most one batch more than it.
    fn check_window(&self) -> Result<(), Violation> {
        let window_bytes = self.config.window_bytes;
        let acked = self.durable.map_or(0, |durable| durable.offset);
        let limit = u64::from(window_bytes) + u64::from(PADDED_BYTES_LIMIT);
        if self.next_offset.saturating_sub(acked) > limit {
            return Err(Violation::Window { window_bytes });
        }
        Ok(())
    }

    /// A segment takes a batch of 1 KiB at least, and the next one begins when something doesn't fit: two that follow each
    /// other have more than that.
    fn check_pages(&self) -> Result<(), Violation> {
        let limit = self.config.window_bytes / SEGMENT_BYTES_MEAN_MIN + PAGES_BESIDE;
        if self.pages.bytes() >= u64::from(limit) {
            return Err(Violation::Pages { limit });
        }
        Ok(())
    }

    fn part(&mut self, data: &Data<'_>, deliveries: &mut Vec<Delivery>) -> Result<(), Violation> {
        let at = data.offset - self.partial.len() as u64;
        self.partial.extend_from_slice(data.bytes);
        let held = self.partial.len();
        let whole = claimed_batch_len(&self.partial).ok_or(Violation::Batches(at))?;
        if (data.continued && held >= whole) || (!data.continued && held != whole) {
            return Err(Violation::Batches(at));
        }
        if !data.continued {
            deliveries.push(Delivery::Batches(std::mem::take(&mut self.partial)));
        }
        Ok(())
    }

    fn violated(&mut self, violation: Violation) {
        self.say(&Message::Error(violation.to_failure()));
        self.finish(SessionEnd::Violation(violation));
    }

    fn say(&mut self, message: &Message<'_>) {
        message.encode(&mut self.control);
    }

    /// A session that ends while it is being found out where the histories part ends because they differ; whether it may be
    /// found out the next time is told.
    fn finish(&mut self, end: SessionEnd) {
        let end = match (self.state, end) {
            (_, end @ (SessionEnd::Diverged(_) | SessionEnd::Violation(_))) => end,
            (State::Probing(at) | State::Comparing(at), end) => {
                SessionEnd::Diverged(DivergedAt { is_cut_off: end.passes(), ..at })
            }
            (_, end) => end,
        };
        self.state = State::Ended;
        self.ack_due = false;
        self.partial = Vec::new();
        self.end.get_or_insert(end);
    }
}

fn divides_into_batches(mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        let Some((_, rest)) = claimed_batch_len(bytes).and_then(|len| bytes.split_at_checked(len))
        else {
            return false;
        };
        bytes = rest;
    }
    true
}

/// The batches in a [`Delivery::Batches`].
pub(crate) fn batches(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let len = claimed_batch_len(bytes).unwrap_or(bytes.len());
        let (batch, rest) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
        bytes = rest;
        Some(batch)
    })
}
