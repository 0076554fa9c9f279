//! The receiver of a filtered feed, in threads: one that writes what was received, and while there is a connection, one
//! that listens to it.
//!
//! ```text
//!   origin's journal ─▶ shape ─▶ filter ═══ EVENTS, SKIP ═══▶ session: dense? of the feed? ─▶ a journal of its own ─▶ views
//!                                              ◀═══ ACK ═══ durable up to this checkpoint of the origin ──┘
//! ```
//! What is received is no copy of the origin's journal and never poses as one: its journal has an id, positions and
//! revisions of its own, and a directory of its own kind. So views are built, rebuilt and waited for as of any journal,
//! without the origin.
//!
//! Invariants:
//! - Every position of the origin is accounted for once, as an event or as skipped; a session that doesn't is ended
//!   before any of it is stored.
//! - It goes on from a checkpoint of the origin, which compares that with its own history before it sends a byte.
//! - What is acknowledged is durable, events and checkpoint in one batch.
//! - A feed that can't go on as what it was begun halts, and keeps what it has.

use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select, unbounded};
use parking_lot::{Condvar, Mutex, MutexGuard};

use self::error::of_a_feed;
use self::received::Received;
use super::error::{ShippingError, WaitError};
use super::filter::FeedFilter;
use super::link::{Arrived, CutOff, Link};
use super::message::{
    Authentication, ErrorCode, FRAME_BYTES_MAX, Failure, FeedTerms, OriginEnd, Speaker,
};
use super::mirror::{
    Awaited, BACK_OFF_MAX, FollowOptions, ForkPolicy, MirrorState, back_off, check_addresses,
    connect, setup_error,
};
use super::observe::{EndReason, Ends};
use super::session::{Delivery, MirrorConfig, MirrorSession, Now, Resume, SessionEnd};
use super::status_file::{self, StatusFile};
use super::transport;
use super::upstreams::{Addresses, Apart, Attempt, Round, Tried, UpstreamStatus, Upstreams};
use crate::env;
use crate::error::{OpenError, ReadError};
use crate::format::files::Mark;
use crate::fs::Fs;
use crate::journal::{CloseError, Journal, TokenError};
use crate::position::{Checkpoint, Durability, Incarnation, NodeId, Position, Token};

mod error;
mod received;
mod standing;

pub use error::FeedError;

/// How a feed is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FeedStatus {
    /// The address, as it was given, of the upstream that is in use or was tried last.
    pub address: String,
    /// All upstreams, in order of preference.
    pub upstreams: Vec<UpstreamStatus>,
    /// What it is doing.
    pub state: MirrorState,
    /// What it holds, as the origin has granted it: perhaps less than was wanted. `None` before that.
    pub terms: Option<FeedTerms>,
    /// Up to where of the origin's journal everything is accounted for: stored here, or none of the feed's.
    pub received: Option<Checkpoint>,
    /// The origin's durable end as last told; `None` if it has never been.
    pub origin_end: Option<OriginEnd>,
    /// How long ago that was true, at the most: it is as long since the origin was asked for what it said, however long
    /// that was on the way.
    pub origin_heard: Option<Duration>,
    /// Why the last attempt or session ended.
    pub last_error: Option<ShippingError>,
    /// How many sessions there have been after the first.
    pub reconnects: u64,
    /// Why sessions and attempts have ended, since it is followed.
    pub ends: Ends,
    lag_is_known: bool,
    /// How long ago, at the most, the origin had an end up to which everything is accounted for.
    caught_up: Option<Duration>,
}

impl FeedStatus {
    /// How many events of the origin, of the feed or not, aren't accounted for yet; `None` if the origin hasn't been
    /// heard for three heartbeats, or the relay that is followed is behind it, or hasn't said yet in this session.
    #[must_use]
    pub fn lag_events(&self) -> Option<u64> {
        let (end, received) = self.known_ends()?;
        Some(end.position.since(received.position))
    }

    /// The same in bytes of the origin's journal.
    #[must_use]
    pub fn lag_bytes(&self) -> Option<u64> {
        let (end, received) = self.known_ends()?;
        Some(end.offset.saturating_sub(received.offset))
    }

    /// For how long, at most, the origin has had something that isn't accounted for: zero if everything is, and `None` if
    /// that isn't known, as before everything was for the first time. It is counted from when the origin was asked, up to
    /// a heartbeat before it told.
    #[must_use]
    pub fn lag_time(&self) -> Option<Duration> {
        match self.lag_bytes()? {
            0 => Some(Duration::ZERO),
            _ => self.caught_up,
        }
    }

    fn known_ends(&self) -> Option<(OriginEnd, Checkpoint)> {
        self.origin_end.zip(self.received).filter(|_| self.lag_is_known)
    }

    /// Whether nothing is tried any more.
    #[must_use]
    pub const fn is_halted(&self) -> bool {
        matches!(self.state, MirrorState::Halted(_))
    }

    /// Whether it has reached its origin's end and stays there.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        matches!(self.state, MirrorState::Live)
    }
}

/// A filtered feed of another service's journal, and the threads that keep it following. Made by
/// [`Store::feed`](crate::Store::feed).
///
/// Dropping it stops following; what was received stays.
#[derive(Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    following: Option<JoinHandle<Result<(), CloseError>>>,
    status: Option<StatusFile>,
}

#[derive(Debug)]
struct Shared {
    /// Which node it will be once it is made.
    new_node: NodeId,
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    addresses: Addresses,
    filter: FeedFilter,
    options: FollowOptions,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    phase: MirrorState,
    journal: Option<Journal>,
    terms: Option<FeedTerms>,
    received: Option<Checkpoint>,
    openings: Vec<(Position, Incarnation)>,
    origin: Option<(OriginEnd, Instant)>,
    /// In this session it was told by the origin, or by a relay that has everything.
    is_current: bool,
    awaited: Awaited,
    /// In front of this position of the origin lie events that are here already, and aren't accounted for.
    ahead_until: Option<Position>,
    last_error: Option<ShippingError>,
    upstreams: Tried,
    sessions: u64,
    /// Since when there is a session.
    session_since: Option<Instant>,
    ends: Ends,
    caught_up_at: Option<Instant>,
    stopping: bool,
    resuming: bool,
    /// The connection's socket, to interrupt whoever reads from it.
    socket: Option<TcpStream>,
    /// While there is a session: whoever waits for an end that is told from now on rings here.
    asks: Option<Sender<()>>,
}

/// Follows a filtered feed of the journal that is served at one or more addresses into a journal of its own in `dir`.
///
/// What was received before is opened, with recovery, before this returns; if there is nothing yet, it is created once
/// the feed was granted. Of several addresses, of the origin and of its relays, the first one that serves is used, and the
/// next ones when it doesn't any more, as of [a mirror](super::follow): the feed goes on there from where it is.
///
/// # Errors
/// [`ShippingError::Open`] if there is something in `dir` that isn't a feed's (a mirror, a store), or can't be opened,
/// or the options name what only mirrors have, or no address is given; [`ShippingError::Feed`] if the filter isn't valid, or not the one that
/// the feed was begun with; others as [`follow`](super::follow).
pub fn follow_feed(
    fs: Arc<dyn Fs>,
    dir: &Path,
    addresses: impl Into<Addresses>,
    filter: FeedFilter,
    mut options: FollowOptions,
) -> Result<Feed, ShippingError> {
    options.deadlines = options.deadlines.bounded();
    let addresses = addresses.into();
    filter.check().map_err(FeedError::from)?;
    refuse_options_of_mirrors(&options)?;
    check_addresses(&addresses, &options)?;
    let received = Received::open(&fs, dir, &options.journal, &filter)?;
    if let (Some(known), Some(origin)) =
        (received.as_ref().and_then(Received::known), options.journal_id)
        && known.durable.journal != origin
    {
        return Err(ShippingError::Foreign { mirror: known.durable.journal, origin });
    }
    let shared = Arc::new(Shared {
        new_node: NodeId::random(),
        fs,
        dir: dir.to_owned(),
        filter,
        options,
        state: Mutex::new(State::new(addresses.as_slice().len())),
        changed: Condvar::new(),
        addresses,
    });
    shared.publish(received.as_ref());
    let status = shared.write_status().transpose().map_err(setup_error)?;
    let for_thread = Arc::clone(&shared);
    let following = thread::Builder::new()
        .name("headwater-feed".into())
        .spawn(move || {
            let _ended = EndedByPanic(Arc::clone(&for_thread));
            for_thread.run(received)
        })
        .map_err(setup_error)?;
    Ok(Feed { shared, following: Some(following), status })
}

fn refuse_options_of_mirrors(options: &FollowOptions) -> Result<(), ShippingError> {
    let invalid =
        |option, reason| ShippingError::Open(Arc::new(OpenError::InvalidOption { option, reason }));
    if options.begin_with.is_some() {
        return Err(invalid("begin_with", "only a mirror can begin with a backup"));
    }
    if options.forks != ForkPolicy::Halt {
        return Err(invalid("forks", "only a mirror can set events aside: a feed halts"));
    }
    Ok(())
}

impl Feed {
    /// The journal of what was received, to read from and to fold views from; `None` until the origin has granted the
    /// feed for the first time.
    ///
    /// Its id, positions and revisions are its own. An event's id is the origin's, and so is its time: one that
    /// didn't say when it [occurred](crate::Recorded::occurred_at_us) has the time when the origin recorded it.
    /// Events whose type begins with `$` are the feed's own notes; views don't see them.
    #[must_use]
    pub fn journal(&self) -> Option<Journal> {
        self.shared.state.lock().journal.clone()
    }

    /// Waits until there is a [`journal`](Self::journal).
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_ready(&self, timeout: Duration) -> Result<Journal, WaitError> {
        self.shared.wait_for(timeout, |state| state.journal.clone())
    }

    /// Waits until everything is accounted for up to an end that the origin had at some time after this call: it is
    /// asked for that at once. Behind a relay it is one that the relay had, which lacks at most what the origin has committed
    /// within two heartbeats.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_caught_up(&self, timeout: Duration) -> Result<Checkpoint, WaitError> {
        let called = Instant::now();
        self.shared.ask();
        let mut awaited = Awaited::default();
        self.shared.wait_for(timeout, |state| {
            let told = state.current_end().filter(|(_, as_of)| *as_of >= called)?;
            let received = state.received?;
            awaited.reached(told, received).map(|_| received)
        })
    }

    /// Waits until the append at the origin that gave `token` is accounted for: its events are durable here, as far as
    /// they are the feed's. Gives a token of the feed's own journal, to wait for in views of it.
    ///
    /// # Errors
    /// [`WaitError::Behind`] if it isn't in time; [`WaitError::Token`] if the token is of another journal than the
    /// feed, or of events that were lost, or so old that the origin was opened 4096 times since; [`WaitError::Halted`], [`WaitError::Stopped`].
    pub fn wait_for(&self, token: &Token, timeout: Duration) -> Result<Token, WaitError> {
        let wanted = token.position;
        let find = |state: &State| {
            let (received, journal) = (state.received?, state.journal.as_ref()?);
            if received.journal != token.journal {
                let (found, followed) = (token.journal, received.journal);
                return Some(Err(TokenError::Foreign { found, followed }));
            }
            let end = journal.end();
            let (journal, durability) = (end.journal, Durability::Durable);
            let own =
                Token { journal, incarnation: end.incarnation, position: end.position, durability };
            (received.position >= wanted).then(|| state.check(token).map(|()| own))
        };
        match self.shared.wait_for(timeout, find) {
            Ok(found) => found.map_err(WaitError::Token),
            Err(WaitError::Timeout { last_error }) => {
                let received = self.shared.state.lock().received;
                let reached = received.map_or(Position::START, |received| received.position);
                Err(WaitError::Behind { reached, wanted, last_error })
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until `condition` holds of the status, also of a halted or stopped feed.
    ///
    /// # Errors
    /// [`WaitError::Timeout`].
    pub fn wait_until(
        &self,
        timeout: Duration,
        condition: impl Fn(&FeedStatus) -> bool,
    ) -> Result<FeedStatus, WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.shared.state.lock();
        loop {
            let status = self.shared.status(&state);
            if condition(&status) {
                return Ok(status);
            }
            if self.shared.is_too_late(&mut state, deadline) {
                return Err(WaitError::Timeout { last_error: state.last_error.clone() });
            }
        }
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> FeedStatus {
        self.shared.status(&self.shared.state.lock())
    }

    /// Tries again now: a halted feed, once what halted it was put right, or one that waits before its next attempt.
    pub fn resume(&self) {
        let mut state = self.shared.state.lock();
        state.resuming = true;
        if matches!(state.phase, MirrorState::Halted(_)) {
            state.phase = MirrorState::Connecting;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Stops following, closes the journal, and waits for all threads to end.
    ///
    /// # Errors
    /// [`CloseError`] if the journal can't be closed cleanly; what was shown as received is durable.
    ///
    /// # Panics
    /// If one of the threads has panicked: with that. The feed was [stopped](MirrorState::Stopped) by it.
    pub fn stop(mut self) -> Result<(), CloseError> {
        self.shared.stop();
        let ended = self.following.take().map(JoinHandle::join);
        self.status = None;
        match ended {
            Some(Ok(closed)) => closed,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(following) = self.following.take() {
            drop(following.join());
        }
    }
}

/// Whoever waits for something of a feed learns that nothing comes any more.
struct EndedByPanic(Arc<Shared>);

impl Drop for EndedByPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.state.lock().phase = MirrorState::Stopped;
            self.0.changed.notify_all();
        }
    }
}

impl State {
    fn new(upstreams: usize) -> Self {
        Self {
            phase: MirrorState::Connecting,
            journal: None,
            terms: None,
            received: None,
            openings: Vec::new(),
            origin: None,
            is_current: false,
            awaited: Awaited::default(),
            ahead_until: None,
            last_error: None,
            upstreams: Tried::new(upstreams),
            sessions: 0,
            session_since: None,
            ends: Ends::default(),
            caught_up_at: None,
            stopping: false,
            resuming: false,
            socket: None,
            asks: None,
        }
    }

    /// Whether the events of a token at or in front of what was received are those that were received.
    fn check(&self, token: &Token) -> Result<(), TokenError> {
        let position = token.position;
        if position == Position::START {
            return Ok(());
        }
        match self.openings.iter().rfind(|(from, _)| *from < position) {
            Some((_, incarnation)) if *incarnation == token.incarnation => Ok(()),
            Some(_) => Err(TokenError::Lost { position }),
            // So old that it isn't known any more who wrote it.
            None => {
                let first = self.openings.first().map_or(position, |(from, _)| *from);
                Err(ReadError::Truncated { first }.into())
            }
        }
    }
}

impl Shared {
    fn run(&self, mut received: Option<Received>) -> Result<(), CloseError> {
        let mut pauses = back_off();
        let mut upstreams = Upstreams::new(self.addresses.as_slice().len());
        loop {
            let (round, was_healthy) =
                upstreams.round(|| self.usable(), |number| self.attempt(&mut received, number));
            if self.state.lock().stopping {
                break; // whatever comes of it: not all were asked
            }
            if was_healthy {
                pauses = back_off();
            }
            match round {
                Round::Settled(error, true) | Round::Failed(Some(error)) => {
                    if matches!(&error, ShippingError::Feed(error) if error.is_poisoned()) {
                        received = None;
                    }
                    self.halt(error);
                    pauses = back_off();
                    upstreams.forget();
                }
                _ => {
                    let rest = upstreams.rest(self.usable(), Instant::now());
                    if self.pause(pauses.next().unwrap_or(BACK_OFF_MAX).max(rest)) {
                        upstreams.forget();
                    }
                }
            }
        }
        let closed = received.map_or(Ok(()), Received::close);
        self.state.lock().phase = MirrorState::Stopped;
        self.changed.notify_all();
        closed
    }

    /// Who doesn't know yet which journal it follows follows the first one's.
    fn usable(&self) -> usize {
        let knows = self.knows_journal(&self.state.lock());
        if knows { self.addresses.as_slice().len() } else { 1 }
    }

    const fn knows_journal(&self, state: &State) -> bool {
        self.options.journal_id.is_some() || state.received.is_some()
    }

    /// Tries one of the upstreams; `None` if nobody wants it any more.
    fn attempt(&self, received: &mut Option<Received>, upstream: usize) -> Option<Attempt> {
        let mut state = self.state.lock();
        if state.stopping {
            return None;
        }
        state.upstreams.begins_with(upstream);
        drop(state);
        let attempt = match self.connect(received, upstream) {
            Ok((link, authentication)) => self.converse(received, &link, authentication),
            Err(error) => error.into(),
        };
        self.note(attempt.error.clone());
        Some(attempt)
    }

    /// Opens what was received if it isn't open, and connects to an upstream, wherever it is now.
    fn connect(
        &self,
        received: &mut Option<Received>,
        upstream: usize,
    ) -> Result<(Link, Authentication), ShippingError> {
        match received {
            Some(received) => received.begin_again()?,
            None => {
                let options = &self.options.journal;
                *received = Received::open(&self.fs, &self.dir, options, &self.filter)?;
            }
        }
        self.state.lock().begins();
        self.publish(received.as_ref());
        let give_up = || self.state.lock().stopping;
        connect(self.addresses.get(upstream), &self.options, give_up, |stream| {
            let mut state = self.state.lock();
            if state.stopping {
                return Err(ShippingError::Disconnected);
            }
            state.socket = Some(stream.try_clone().map_err(setup_error)?);
            Ok(())
        })
    }

    /// One session, from its first byte to its end; why that came.
    fn converse(
        &self,
        received: &mut Option<Received>,
        link: &Link,
        authentication: Authentication,
    ) -> Attempt {
        let had = self.state.lock().received;
        let known = received.as_ref().and_then(Received::known).cloned();
        let begins = self.options.journal_id.map(|journal| Mark::start(journal).end);
        let from = known.as_ref().map(|known| known.durable).or(begins);
        let resume = from.map(|end| Resume { end, witness: None });
        let request = Received::request(known.as_ref(), &self.filter);
        let node = received.as_ref().map_or(self.new_node, |it| it.journal().node());
        let config = MirrorConfig {
            node: Some(node),
            follows: true,
            nonce: env::random_id(),
            authentication,
            agent: self.options.agent.clone(),
            deadlines: self.options.deadlines,
            max_frame: FRAME_BYTES_MAX,
            window_bytes: self.options.window_bytes.max(1),
            resume,
        };
        let session = Mutex::new(MirrorSession::fed(config, request, transport::now()));
        let (asks, asked) = bounded(1);
        self.state.lock().asks = Some(asks.clone());
        let connection = Connection { shared: self, session, link, asked };
        let (sender, deliveries) = unbounded();
        let written = thread::scope(|scope| {
            let _cut_off = CutOff(link);
            let listener = thread::Builder::new().name("headwater-listen".into());
            let connection = &connection;
            listener
                .spawn_scoped(scope, move || connection.listen(&sender))
                .map_err(setup_error)?;
            let written = connection.write_all(received, &deliveries);
            if let Err(error) = &written {
                connection.give_up(error);
            }
            written
        });
        let end = connection.session.into_inner().end().cloned();
        let mut state = self.state.lock();
        (state.socket, state.asks) = (None, None);
        let granted = state.session_since.take();
        let went_well = matches!(state.phase, MirrorState::Live) || state.received != had;
        drop(state);
        let error = match (written, end) {
            (Err(error), _) => error,
            (Ok(()), Some(SessionEnd::Disconnected) | None) => {
                link.failure().map_or(ShippingError::Disconnected, ShippingError::Tls)
            }
            (Ok(()), Some(end)) => {
                of_a_feed(ShippingError::from_end(end, resume.map(|resume| resume.end), None))
            }
        };
        Attempt::of_session(error, granted, went_well)
    }

    fn write_status(self: &Arc<Self>) -> Option<std::io::Result<StatusFile>> {
        let shared = Arc::clone(self);
        let status = move || status_file::of_feed(&shared.status(&shared.state.lock()));
        status_file::follow(&self.fs, &self.dir, self.options.status_interval, status)
    }

    /// Somebody waits for an end that is told from now on. The next session begins with one.
    fn ask(&self) {
        if let Some(asks) = &self.state.lock().asks {
            asks.try_send(()).unwrap_or_default(); // one is enough for all
        }
    }

    fn stop(&self) {
        let mut state = self.state.lock();
        state.stopping = true;
        if let Some(socket) = &state.socket {
            drop(socket.shutdown(Shutdown::Both));
        }
        self.changed.notify_all();
    }

    /// Waits until somebody wants it to go on or to end.
    fn halt(&self, error: ShippingError) {
        let mut state = self.state.lock();
        state.last_error = Some(error.clone());
        state.phase = MirrorState::Halted(error);
        state.resuming = false;
        self.changed.notify_all();
        while !state.resuming && !state.stopping {
            self.changed.wait(&mut state);
        }
        state.resuming = false;
        state.phase = MirrorState::Connecting;
    }

    /// Why an attempt ended; that it was stopped is no reason.
    fn note(&self, error: ShippingError) {
        let mut state = self.state.lock();
        if !state.stopping {
            state.ends.count(EndReason::from(&error));
        }
        state.upstreams.note(&error);
        state.last_error = Some(error);
        state.phase = MirrorState::Connecting;
        self.changed.notify_all();
    }

    /// Whether it was told to try again.
    fn pause(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        let mut state = self.state.lock();
        while !state.resuming && !state.stopping {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        std::mem::take(&mut state.resuming)
    }

    /// Shows how far it is.
    fn publish(&self, received: Option<&Received>) {
        let Some(received) = received else { return };
        let mut state = self.state.lock();
        if let Some(known) = received.known() {
            let told =
                |openings: &[(Position, Incarnation)]| (openings.len(), openings.last().copied());
            if told(&state.openings) != told(received.openings()) {
                state.openings = received.openings().to_vec();
            }
            if state.terms.is_none() {
                state.terms = Some(known.terms.clone());
            }
            state.received = Some(received.covered());
            state.ahead_until = received.ahead_until();
            state.journal = Some(received.journal().clone());
        }
        self.judge_phase(&mut state);
    }

    fn judge_phase(&self, state: &mut State) {
        self.changed.notify_all();
        state.judge(self.options.window_bytes);
    }

    fn status(&self, state: &State) -> FeedStatus {
        let heard = state.origin.map(|(_, told)| told.elapsed());
        let connected = matches!(state.phase, MirrorState::CatchingUp | MirrorState::Live);
        let fresh = |age: Duration| age <= 3 * self.options.deadlines.heartbeat;
        let knows_journal = self.knows_journal(state);
        FeedStatus {
            address: state.upstreams.address(&self.addresses),
            upstreams: state.upstreams.status(&self.addresses, connected, knows_journal),
            state: state.phase.clone(),
            terms: state.terms.clone(),
            received: state.received,
            origin_end: state.origin.map(|(end, _)| end),
            origin_heard: heard,
            last_error: state.last_error.clone(),
            reconnects: state.sessions.saturating_sub(1),
            ends: state.ends.clone(),
            caught_up: state.caught_up_at.map(|at| at.elapsed()),
            lag_is_known: connected && heard.is_some_and(fresh) && state.current_end().is_some(),
        }
    }

    /// Waits until `look` finds something; a halted or stopped feed ends the wait.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        mut look: impl FnMut(&State) -> Option<T>,
    ) -> Result<T, WaitError> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        loop {
            if let Some(found) = look(&state) {
                return Ok(found);
            }
            match &state.phase {
                MirrorState::Halted(error) => return Err(WaitError::Halted(error.clone())),
                MirrorState::Stopped => return Err(WaitError::Stopped),
                _ => {}
            }
            if self.is_too_late(&mut state, deadline) {
                return Err(WaitError::Timeout { last_error: state.last_error.clone() });
            }
        }
    }

    /// Waits for a change; true if `deadline` has passed instead.
    fn is_too_late(&self, state: &mut MutexGuard<'_, State>, deadline: Option<Instant>) -> bool {
        match deadline {
            Some(deadline) => self.changed.wait_until(state, deadline).timed_out(),
            None => {
                self.changed.wait(state);
                false
            }
        }
    }
}

/// A connection, shared by the listener and the writer.
struct Connection<'a> {
    shared: &'a Shared,
    session: Mutex<MirrorSession>,
    link: &'a Link,
    /// Rings when somebody waits for what the origin tells from now on.
    asked: Receiver<()>,
}

impl Connection<'_> {
    /// Feeds the session with what arrives, and passes on what it delivers, until it ends.
    fn listen(&self, sender: &Sender<Delivery>) {
        let (mut raw, mut plain) = (vec![0; 128 << 10], Vec::new());
        let mut deliveries = Vec::new();
        let (mut told, mut apart) = (None, Apart::default());
        let (addresses, silence) = (&self.shared.addresses, self.shared.options.deadlines.silence);
        while self.flush() {
            let arrived = self.link.receive(&mut raw, &mut plain);
            let now = transport::now();
            let mut session = self.session.lock();
            match arrived {
                Arrived::Bytes(bytes) => session.on_bytes(bytes, now, &mut deliveries),
                Arrived::Nothing => {}
                Arrived::Closed => session.on_closed(),
            }
            session.on_time(now);
            if apart.is_to_be_left(session.told().speaker, addresses, silence, now.at) {
                session.leave();
            }
            let (ended, origin_end) = (session.end().is_some(), session.current_end());
            drop(session);
            if told != origin_end {
                told = origin_end;
                let mut state = self.shared.state.lock();
                state.is_told(origin_end);
                self.shared.judge_phase(&mut state);
            }
            let writing = deliveries.drain(..).all(|delivery| sender.send(delivery).is_ok());
            if ended || !writing {
                break;
            }
        }
        self.flush();
    }

    /// Writes what the session has to say; false if nobody takes it any more.
    fn flush(&self) -> bool {
        let written = self.link.write(|out| self.session.lock().take_output(transport::now(), out));
        if !written {
            self.session.lock().on_closed();
        }
        written
    }

    /// Takes all deliveries, until the listener has ended; those that have come meanwhile are made durable together.
    fn write_all(
        &self,
        received: &mut Option<Received>,
        deliveries: &Receiver<Delivery>,
    ) -> Result<(), ShippingError> {
        let mut asks_at = None;
        loop {
            let first = select! {
                recv(deliveries) -> delivery => match delivery {
                    Ok(delivery) => delivery,
                    Err(_) => break,
                },
                recv(self.asked) -> _ => {
                    asks_at = self.tell(MirrorSession::ask);
                    continue;
                }
                recv(asks_at.map_or_else(never, at)) -> _ => {
                    asks_at = self.tell(MirrorSession::on_time);
                    continue;
                }
            };
            let all = std::iter::once(first).chain(deliveries.try_iter());
            let taken = all.into_iter().try_for_each(|delivery| self.take(received, delivery));
            self.settle(received)?;
            taken?;
        }
        received.as_mut().map_or(Ok(None), Received::rest)?;
        self.shared.publish(received.as_ref());
        Ok(())
    }

    fn take(
        &self,
        received: &mut Option<Received>,
        delivery: Delivery,
    ) -> Result<(), ShippingError> {
        let taken = match (delivery, received.as_mut()) {
            (Delivery::Granted(end, terms), _) => return self.granted(received, end, terms),
            (Delivery::Run(run), Some(received)) => received.run(&run),
            (Delivery::Skipped(behind), Some(received)) => received.skipped(behind),
            _ => Ok(()),
        };
        Ok(taken.map_err(|error| error.said_by(self.speaker()))?)
    }

    fn speaker(&self) -> Speaker {
        self.session.lock().told().speaker.unwrap_or(Speaker::RelayApart)
    }

    fn granted(
        &self,
        received: &mut Option<Received>,
        end: Checkpoint,
        terms: FeedTerms,
    ) -> Result<(), ShippingError> {
        let shared = self.shared;
        if received.is_none() {
            let (node, options) = (shared.new_node, &shared.options.journal);
            let created = Received::create(node, &shared.fs, &shared.dir, options, &shared.filter)?;
            *received = Some(created);
        }
        if let Some(received) = received {
            let is_origin = self.session.lock().told().path.len() <= 1;
            received.granted(&end, is_origin, terms, &shared.filter)?;
        }
        let mut state = shared.state.lock();
        state.phase = MirrorState::CatchingUp;
        state.sessions += 1;
        state.session_since = Some(Instant::now());
        drop(state);
        shared.publish(received.as_ref());
        Ok(())
    }

    fn settle(&self, received: &mut Option<Received>) -> Result<(), ShippingError> {
        let Some(received) = received else { return Ok(()) };
        let durable = received.settle()?;
        self.shared.publish(Some(received));
        if let Some(durable) = durable {
            let mut session = self.session.lock();
            session.on_durable(durable);
            if self.asked.try_recv().is_ok() {
                session.ask(transport::now());
            }
            drop(session);
            self.flush();
        }
        Ok(())
    }

    /// The session is told something, and says what comes of it. When to look again, if what somebody waits for can't be
    /// asked yet.
    fn tell(&self, what: fn(&mut MirrorSession, Now)) -> Option<Instant> {
        what(&mut self.session.lock(), transport::now());
        self.flush();
        self.session.lock().asks_at()
    }

    /// The writer can't go on: the origin is told why, and the listener is interrupted.
    fn give_up(&self, error: &ShippingError) {
        self.session.lock().fail(Failure::new(ErrorCode::STORAGE, error.to_string()));
        self.flush();
        self.link.cut_off();
    }
}
