//! The origin's side: one event loop for all connections, and a few threads for what may wait for the disk.
//!
//! ```text
//!   commits ── the durable end moves: bell ──┐              ┌────────── event loop ───────────┐
//!   Server: shutdown ── notifier ────────────┼── woken ──▶  │ listener, every socket          │
//!                                            │              │ reads, deadlines, live sending, │
//!              ┌── connections that are done ┘              │ from memory only                │
//!              │                                            └──┬───────────────┬──────────────┘
//!              │                     behind, or to be compared │               │ lease
//!              ├──────────────── catch-up threads: read, write ◀               │
//!              └──────────────── lease keeper: notes, in groups ◀──────────────┘
//! ```
//! A connection is its socket, its session and what is to be written, and belongs to one thread at a time: it is
//! handed over whole. Live and catching up are one session and one place: whoever has the connection sends what
//! follows what was sent, so there is nothing to hand over and no gap to fall into.
//!
//! Invariants:
//! - The loop never reads the journal's files and never waits for the disk: what isn't in memory is read by a
//!   catch-up thread, and leases are noted by their keeper, before the first byte leaves.
//! - The journal is the only buffer. A connection holds at most one piece that waits to be written, about one
//!   frame, and asks for the next when that is gone. Those at the same place share it.
//! - Whatever is told to a peer, the loop knows: its idea of the durable end is renewed when a connection comes
//!   back, so no peer hears of an end that goes back.
//! - Every connection has a deadline at any time, unless a thread is working for it.
//! - Nothing that happens is missed: sockets are read and written until they take no more, a connection that
//!   comes back is looked at as if everything had happened to it, and the bell is hung up before the loop sleeps.

mod catch_up;
mod connection;
mod event_loop;
mod fans;
mod feeds;
mod leases;
mod live;
mod runs;
mod visits;

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Poll, Token, Waker};
use parking_lot::Mutex;

use self::event_loop::EventLoop;
use self::feeds::{Feed, Feeds};
use self::visits::{Guests, Visits};
use super::error::ServeError;
use super::message::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, FeedTerms};
use super::observe::Ends;
use super::relay::Served;
use super::security::{Gate, Security};
use super::session::{Deadlines, OriginConfig, OriginStatus, TIME_MAX, bounded};
use super::shape::Shape;
use super::status_file::{self, Afterwards, ServerStatus, StatusFile};
use super::transport;
use super::wire::ENCRYPTED_BYTES_MAX;
use crate::env;
use crate::format::files::{Mark, Role};
use crate::format::leases::Lease;
use crate::journal::{Bell, Journal};
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// How a journal is served. The defaults suit some hundred subscribers.
///
/// ```
/// let options = headwater::shipping::ServeOptions { connections_max: 16, ..Default::default() };
/// # assert!(!options.allow_plaintext_off_loopback);
/// ```
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// How long peers may take, and how often they are told that this side is alive.
    pub deadlines: Deadlines,
    /// A peer that takes nothing for so long is cut off: from 1 ms to a day, what is less or more counts as that. Default
    /// 30 s.
    pub write_stall: Duration,
    /// At most so many connections; the next ones are turned away. Default 1,024.
    pub connections_max: usize,
    /// At most so many of them may not have introduced themselves yet. Default 64.
    pub handshakes_max: usize,
    /// At most so many of them may come from one IP address; `None`: as many as there may be. Default `None`.
    pub connections_per_address_max: Option<usize>,
    /// A peer may send so many acknowledgements a second that say nothing new, behind another one that doesn't; one that
    /// sends more is cut off. A mirror sends up to 50 while many ask it, one after the other, to be caught up. Default 100.
    pub idle_acks_per_second_max: u32,
    /// No frame is longer, and a connection holds about one of them. From 8 KiB to 1 MiB, default 40 KiB. Within TLS
    /// 16 KiB of that are for what is encrypted and not taken yet.
    pub frame_bytes: usize,
    /// Where events may be found that were removed here, for a mirror that lacks them: addresses of other mirrors,
    /// places of backups; up to 8 texts of up to 256 bytes. Default none.
    pub sources: Vec<String>,
    /// No peer gets more than this many bytes ahead of its acknowledgements. Default 64 MiB.
    pub window_bytes_max: u32,
    /// So many threads read for those that catch up, compare histories and sift filtered feeds. At least 1, default 2.
    /// A [`shape`](Self::shape) that hangs holds one of them until it returns.
    pub catch_up_threads: usize,
    /// How long commits are collected before they are sent: with more than so many live subscribers, they are sent
    /// to at most once in so long. What is committed later than that after the last time is sent at once. By
    /// default 5 ms with more than 64 of them, 50 ms with more than 1,000; with fewer, every commit is sent at
    /// once. The last entry that fits counts. More than a day counts as that.
    pub flush_intervals: Vec<(usize, Duration)>,
    /// TLS, and who may have the journal. Default: plain TCP, at addresses of the loopback only, for everybody on
    /// this machine.
    pub security: Option<Security>,
    /// Plain TCP also at other addresses than those of the loopback: everybody on the way can read and forge what is
    /// shipped. Without an access list, everybody who can reach the address can have the journal.
    pub allow_plaintext_off_loopback: bool,
    /// How often it is written down who follows and how far they are, for `headwater lag` and `peer ls` beside this process:
    /// into the file `serving-ADDRESS` in the store's directory, in place, never synced. It is believed for three intervals. From 10 ms to
    /// 60 s: what is less or more counts as that. `None`: it isn't. Default 1 s.
    pub status_interval: Option<Duration>,
    /// In what shape events are published in filtered feeds. Default: as they are stored. Mirrors aren't concerned.
    pub shape: Option<Shape>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            deadlines: Deadlines::default(),
            write_stall: Duration::from_secs(30),
            connections_max: 1024,
            handshakes_max: 64,
            connections_per_address_max: None,
            idle_acks_per_second_max: 100,
            frame_bytes: 40 << 10,
            sources: Vec::new(),
            window_bytes_max: 64 << 20,
            catch_up_threads: 2,
            flush_intervals: vec![
                (64, Duration::from_millis(5)),
                (1000, Duration::from_millis(50)),
            ],
            security: None,
            allow_plaintext_off_loopback: false,
            status_interval: Some(Duration::from_secs(1)),
            shape: None,
        }
    }
}

impl ServeOptions {
    /// The same, with every time within bounds: it is added to the clock's, and the sum has to be one.
    fn bounded(mut self) -> Self {
        self.deadlines = self.deadlines.bounded();
        self.write_stall = bounded(self.write_stall);
        for (_, interval) in &mut self.flush_intervals {
            *interval = TIME_MAX.min(*interval);
        }
        self
    }

    fn session(&self, node: NodeId, address: &SocketAddr) -> OriginConfig {
        let encrypted = self.security.as_ref().is_some_and(Security::is_encrypted);
        let frame_bytes =
            self.frame_bytes.saturating_sub(if encrypted { ENCRYPTED_BYTES_MAX } else { 0 });
        let frame_bytes = frame_bytes.clamp(FRAME_BYTES_MIN as usize, FRAME_BYTES_MAX as usize);
        OriginConfig {
            node,
            role: Role::Origin,
            sources: self.sources.clone(),
            session: env::random_id(),
            deadlines: self.deadlines,
            max_frame: u32::try_from(frame_bytes).unwrap_or(FRAME_BYTES_MAX),
            data_bytes: frame_bytes,
            max_window_bytes: self.window_bytes_max.max(1),
            idle_acks_max: self.idle_acks_per_second_max,
            gate: Gate::new(self.security.clone(), transport::is_loopback(address)),
            shape: self.shape.clone(),
        }
    }

    fn flush_interval(&self, subscribers: usize) -> Duration {
        let fits = self.flush_intervals.iter().rfind(|(more_than, _)| subscribers > *more_than);
        fits.map_or(Duration::ZERO, |(_, interval)| *interval)
    }
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeerState {
    /// It has not subscribed yet.
    Handshake,
    /// It is being sent what it doesn't have yet.
    CatchingUp,
    /// It has been sent everything that is durable here, and is sent what comes as it comes.
    Live,
    /// It lacks something, and for three heartbeats nothing could be sent to it and it has acknowledged nothing: its disk,
    /// its machine or the way there is stuck. If it stays so, it is cut off.
    Stalled,
    /// It is about to be closed.
    Closing,
}

/// One connection, as the origin sees it.
///
/// Lag is `None` wherever it isn't known: before there is a subscription, when the peer hasn't been heard for three
/// heartbeats, when the connection is about to be closed. It is never 0 then. It is counted from the durable end of the
/// journal that is served here: of a mirror that is served, how far *that* lags is in its own status.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PeerStatus {
    /// Where it comes from.
    pub address: SocketAddr,
    /// Which mirror it is; `None` before it said so, and of a subscriber that doesn't say.
    pub node: Option<NodeId>,
    /// Who it is in the access list, if there is [`security`](ServeOptions::security) and it was let in.
    pub peer: Option<String>,
    /// The program's name and version, as it says.
    pub agent: String,
    /// What it is doing.
    pub state: PeerState,
    /// What it is fed, if it doesn't get the whole journal.
    pub feed: Option<FeedTerms>,
    /// Up to where it was sent.
    pub sent: Option<Checkpoint>,
    /// Up to where it says that its mirror is durable.
    pub acked: Option<Checkpoint>,
    /// Up to where it says that its views are applied.
    pub applied: Option<Position>,
    /// How long it has been connected.
    pub connected_for: Duration,
    /// How many bytes it has been sent in that time.
    pub sent_bytes: u64,
    /// How long ago the last byte came from it.
    pub heard: Duration,
    /// How often this node has subscribed before, since this server runs.
    pub reconnects: u64,
    /// Why its sessions have ended before.
    pub ends: Ends,
    /// The durable end here of the journal that it gets; before it has subscribed, the beginning of none.
    pub end: Checkpoint,
    heard_lately: bool,
    now_us: i64,
    /// To look something up in.
    journal: Option<Journal>,
}

impl PeerStatus {
    /// The journal that it gets, once it has subscribed.
    #[must_use]
    pub fn journal(&self) -> Option<JournalId> {
        self.journal.as_ref().map(Journal::id)
    }

    /// How many events are durable here and, as far as it has said, not there; `None` if that isn't known.
    #[must_use]
    pub fn lag_events(&self) -> Option<u64> {
        self.known_ack().map(|acked| self.end.position.since(acked.position))
    }

    /// The same in bytes.
    #[must_use]
    pub fn lag_bytes(&self) -> Option<u64> {
        self.known_ack().map(|acked| self.end.offset.saturating_sub(acked.offset))
    }

    /// How long ago the oldest event was recorded that is not durable there, as far as it has said: zero if there is none,
    /// and `None` if that isn't known. May block for the disk.
    ///
    /// Both times are by the clock of the origin's machine. Where a mirror is served, it is this machine's clock against
    /// the origin's; where the result would be negative it is unknown.
    #[must_use]
    pub fn lag_time(&self) -> Option<Duration> {
        let acked = self.known_ack()?;
        if acked.offset >= self.end.offset {
            return Some(Duration::ZERO);
        }
        let recorded_us = self.journal.as_ref()?.recorded_at_us(acked.position)?;
        u64::try_from(self.now_us.checked_sub(recorded_us)?).ok().map(Duration::from_micros)
    }

    /// How many events are durable here and, as far as it has said, not applied to views there; `None` if that isn't
    /// known, or it doesn't say.
    #[must_use]
    pub fn applied_lag_events(&self) -> Option<u64> {
        self.known_ack().and(self.applied).map(|applied| self.end.position.since(applied))
    }

    /// How many bytes of segment files can't be removed here until it has acknowledged more, unless
    /// [`retention`](crate::retention) passes it over; `None` before there is a subscription. The lease that holds them
    /// follows the acknowledgements within ten seconds.
    #[must_use]
    pub fn held_bytes(&self) -> Option<u64> {
        self.journal.as_ref().zip(self.acked).map(|(it, acked)| it.held_bytes(acked.position))
    }

    fn known_ack(&self) -> Option<Checkpoint> {
        self.acked.filter(|_| self.heard_lately && self.state != PeerState::Closing)
    }

    /// Whether it is sent what comes as it comes.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        matches!(self.state, PeerState::Live)
    }
}

/// Serves journals to mirrors until it is shut down or dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    serving: Option<JoinHandle<()>>,
    status: Option<StatusFile>,
}

/// What the threads of a server have in common.
pub(super) struct Shared {
    feeds: Feeds,
    options: ServeOptions,
    stopping: AtomicBool,
    /// The loop is gone.
    ended: AtomicBool,
    waker: Waker,
    /// The loop has been woken and hasn't looked yet.
    woken: AtomicBool,
    /// A mirror that is served has something else since the loop looked.
    changed: AtomicBool,
    peers: Mutex<BTreeMap<usize, Arc<Peer>>>,
    guests: Mutex<Guests>,
    /// Held while live subscribers are sent to: those that catch up wait for it between two frames.
    live_first: Mutex<()>,
    runs: runs::Runs,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("feeds", &self.feeds).finish_non_exhaustive()
    }
}

impl Shared {
    /// The loop looks at everything once more, from now on. What it shall find is there already.
    fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            drop(self.waker.wake());
        }
    }

    /// The loop is about to look: whatever comes from now on wakes it again.
    fn is_looking(&self) {
        self.woken.swap(false, Ordering::AcqRel);
    }

    /// The server's own journal, if there is one at present.
    fn own(self: &Arc<Self>) -> Option<Journal> {
        self.feeds.own(self).map(|feed| feed.journal.clone())
    }

    fn peers(&self) -> Vec<PeerStatus> {
        let peers: Vec<_> = self.peers.lock().values().cloned().collect();
        peers.iter().map(|peer| peer.status(self)).collect()
    }

    fn refused(&self) -> Ends {
        self.guests.lock().refused.clone()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// However the loop ends, also by a panic: nobody is served any more, and that shows.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.ended.store(true, Ordering::Release);
        self.0.peers.lock().clear();
    }
}

/// Rung by mirrors.
impl Bell for Shared {
    fn ring(&self) {
        self.changed.store(true, Ordering::Release);
        self.wake();
    }
}

/// A connection as others see it.
#[derive(Debug)]
struct Peer {
    address: SocketAddr,
    since: Instant,
    seen: Mutex<Seen>,
}

/// How it was when it was looked at last.
#[derive(Debug)]
struct Seen {
    state: PeerState,
    status: OriginStatus,
    sent_bytes: u64,
    lease: Option<Lease>,
    heard_at: Instant,
    /// When it lacked nothing, was sent something or has acknowledged something last.
    moved_at: Instant,
    feed: Option<Arc<Feed>>,
}

impl Peer {
    fn new(address: SocketAddr) -> Self {
        let (state, status) = (PeerState::Handshake, OriginStatus::default());
        let since = Instant::now();
        let (heard_at, moved_at) = (since, since);
        let seen =
            Seen { state, status, sent_bytes: 0, lease: None, heard_at, moved_at, feed: None };
        Self { address, since, seen: Mutex::new(seen) }
    }

    fn status(&self, shared: &Shared) -> PeerStatus {
        let seen = self.seen.lock();
        let status = &seen.status;
        let journal = seen.feed.as_ref().map(|feed| &feed.journal);
        let lately = 3 * shared.options.deadlines.heartbeat;
        // What it has acknowledged is of an end that was there before.
        let none = || Mark::start(JournalId::from_bytes([0; 16])).end;
        let end = journal.map_or_else(none, Journal::end);
        let lacks = status.acked.is_some_and(|acked| acked.offset < end.offset);
        let is_stuck = lacks && seen.moved_at.elapsed() > lately;
        let (heard, visits) = (seen.heard_at.elapsed(), shared.guests.lock().of(status.node));
        let Visits { sessions, ends } = visits;
        PeerStatus {
            address: self.address,
            node: status.node,
            peer: status.peer.clone(),
            agent: status.agent.clone(),
            state: match seen.state {
                PeerState::CatchingUp | PeerState::Live if is_stuck => PeerState::Stalled,
                state => state,
            },
            feed: status.feed.as_deref().cloned(),
            sent: status.sent,
            acked: status.acked,
            applied: status.applied,
            connected_for: self.since.elapsed(),
            sent_bytes: seen.sent_bytes,
            heard,
            reconnects: sessions.saturating_sub(1),
            ends,
            end,
            heard_lately: heard <= lately,
            now_us: journal.map_or(0, |journal| journal.fs().now_us()),
            journal: journal.cloned(),
        }
    }
}

/// Serves one or more journals at `address` until the returned [`Server`] is shut down or dropped: a store's own,
/// and mirrors that are being followed, which are served on as relays under their origin's journal id, or mirrors at
/// rest. Who subscribes says which journal; see [`Served`].
///
/// Port 0 asks the system for a free one; see [`Server::local_addr`].
///
/// # Errors
/// [`ServeError`]; nothing listens then.
pub fn serve(
    served: impl Into<Served>,
    address: impl ToSocketAddrs,
    options: ServeOptions,
) -> Result<Server, ServeError> {
    start(served.into(), address, options.bounded())
}

fn start(
    served: Served,
    address: impl ToSocketAddrs,
    options: ServeOptions,
) -> Result<Server, ServeError> {
    let listen = |error| ServeError::Listen(Arc::new(error));
    let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(listen)?.collect();
    let encrypted = options.security.as_ref().is_some_and(Security::is_encrypted);
    if !encrypted
        && !options.allow_plaintext_off_loopback
        && let Some(&address) = addresses.iter().find(|address| !transport::is_loopback(address))
    {
        return Err(ServeError::Plaintext { address });
    }
    let listener = TcpListener::bind(addresses.as_slice()).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let poll = Poll::new().map_err(listen)?;
    let shared = Arc::new(Shared {
        feeds: Feeds::default(),
        options,
        stopping: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        waker: Waker::new(poll.registry(), WAKER).map_err(listen)?,
        woken: AtomicBool::new(false),
        changed: AtomicBool::new(false),
        peers: Mutex::default(),
        guests: Mutex::default(),
        live_first: Mutex::default(),
        runs: runs::Runs::default(),
    });
    shared.feeds.add(served, &shared);
    let event_loop = EventLoop::new(&shared, poll, listener)?;
    let thread = |error| ServeError::Thread(Arc::new(error));
    let serving = Some(event_loop.start().map_err(thread)?);
    let mut server = Server { shared, address, serving, status: None };
    server.status = server.write_status().transpose().map_err(thread)?;
    Ok(server)
}

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
/// Connections have this number or a higher one, each its own.
const FIRST_CONNECTION: usize = 2;

impl Server {
    /// The address that is listened on, with the port that the system chose if it was asked to.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves these, too, from now on.
    ///
    /// ```no_run
    /// let store = headwater::Store::open("shop")?;
    /// let server = store.serve("127.0.0.1:7000")?;
    /// let orders = store.mirror("orders", "orders.internal:7000")?;
    /// server.add(&orders);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add(&self, served: impl Into<Served>) {
        self.shared.feeds.add(served.into(), &self.shared);
    }

    /// Whether it still serves: false if its thread has ended by a panic, which is a defect of this library. Nobody can
    /// connect then; [`shutdown`](Self::shutdown) tells of the panic, and the journals can be served again.
    ///
    /// ```no_run
    /// let store = headwater::Store::open("shop")?;
    /// let server = store.serve("127.0.0.1:7000")?;
    /// assert!(server.is_serving());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn is_serving(&self) -> bool {
        !self.shared.has_ended()
    }

    /// Everybody who is connected.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.shared.peers()
    }

    /// How many connections have come to no subscription, and why: turned away, not let in, given up. Since it serves.
    #[must_use]
    pub fn refused(&self) -> Ends {
        self.shared.refused()
    }

    /// Why subscriptions that had been granted have ended, since it serves.
    #[must_use]
    pub fn ended(&self) -> Ends {
        self.shared.guests.lock().ended.clone()
    }

    fn write_status(&self) -> Option<io::Result<StatusFile>> {
        let interval = self.shared.options.status_interval?;
        let (fs, dir) = self.shared.feeds.home()?;
        let dir = status_file::place(&dir);
        status_file::remove_stale(&*fs, &dir);
        let path = dir.join(format!("{}{}", status_file::SERVING, self.address));
        let shared = Arc::clone(&self.shared);
        let status = move || {
            let says =
                || ServerStatus::new(shared.own().as_ref(), shared.peers(), &shared.refused());
            (!shared.has_ended()).then(says)
        };
        Some(StatusFile::start(&fs, path, interval, Afterwards::Removed, status))
    }

    /// Says goodbye to everybody, closes all connections and waits for all threads to end: a second at
    /// most, unless the disk or a [`shape`](ServeOptions::shape) doesn't answer.
    ///
    /// # Panics
    /// If the thread that served has [ended by a panic](Self::is_serving): with that.
    pub fn shutdown(mut self) {
        if let Err(panic) = self.stop() {
            std::panic::resume_unwind(panic);
        }
    }

    fn stop(&mut self) -> std::thread::Result<()> {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake();
        let ended = self.serving.take().map_or(Ok(()), JoinHandle::join);
        self.status = None;
        ended
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It looked as if it served on: peers were shown for ever, and the status file was written anew each second.
    #[cfg(all(feature = "test-kit", not(shuttle)))]
    #[test]
    fn that_the_loop_has_ended_by_a_panic_shows() {
        use std::net::TcpStream;
        use std::path::Path;

        use crate::fs::Fs;
        use crate::fs::sim::SimFs;
        use crate::journal::Appender;
        use crate::options::JournalOptions;

        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create(&fs, Path::new("/store/journal"), &options).unwrap();
        let status_interval = Some(Duration::from_millis(10));
        let options = ServeOptions { status_interval, ..ServeOptions::default() }.bounded();
        // As no option can be set: the sum isn't a time, and the loop panics when somebody connects.
        let deadlines = Deadlines { handshake: Duration::MAX, ..Deadlines::default() };
        let options = ServeOptions { deadlines, ..options };
        let server = start(appender.journal().clone().into(), "127.0.0.1:0", options).unwrap();
        let is_written = || {
            let names = fs.list(Path::new("/store")).unwrap();
            names.iter().any(|name| name.starts_with(status_file::SERVING))
        };
        let until = |holds: &dyn Fn() -> bool| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while !holds() {
                assert!(Instant::now() < deadline, "it looks as if it served");
                std::thread::yield_now();
            }
        };
        until(&is_written);
        assert!(server.is_serving());
        let _stranger = TcpStream::connect(server.local_addr()).unwrap();
        until(&|| !server.is_serving() && !is_written());
        assert!(server.peers().is_empty());
        let shutdown = std::panic::AssertUnwindSafe(|| server.shutdown());
        assert!(std::panic::catch_unwind(shutdown).is_err(), "nobody is told of the panic");
    }

    #[test]
    fn few_subscribers_are_sent_to_at_once_and_many_in_intervals() {
        let options = ServeOptions::default();
        let interval = |count| options.flush_interval(count).as_millis();
        assert_eq!([0, 64, 65, 1000, 1001, 9000].map(interval), [0, 0, 5, 5, 50, 50]);
        let never = ServeOptions { flush_intervals: Vec::new(), ..options };
        assert_eq!(never.flush_interval(9000), Duration::ZERO);
    }
}
