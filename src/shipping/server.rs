//! The origin's side in threads: one accepts, and each subscriber has two, one that sends and one that
//! listens to its acknowledgements.
//!
//! ```text
//!             accept ── too many? ─▶ ERROR, closed
//!               │
//!   ┌───────────┴──────────── per subscriber ───────────────────────────┐
//!   │ sender:   poll the session ─▶ write │ wait for the durable end     │
//!   │                 ▲ one lock, one condition                         │
//!   │ listener: read ─┘ HELLO, SUBSCRIBE, ACK                            │
//!   └────────────────────────────────────────────────────────────────────┘
//! ```
//! The journal is the only buffer: a subscriber that doesn't keep up costs a cursor and one frame, and
//! commits never wait for anybody.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::error::ServeError;
use super::message::{ErrorCode, FRAME_BYTES_MAX, Failure, Message};
use super::session::{Deadlines, Next, OriginConfig, OriginSession, Source, SourceError};
use super::transport::{self, Received, TICK};
use crate::env;
use crate::error::ReadError;
use crate::format::batch::BatchRef;
use crate::format::files::{Role, Witness};
use crate::format::leases::Lease;
use crate::format::segment::SegmentPage;
use crate::journal::leases::Stage;
use crate::journal::{Comparison, Cursor, Journal};
use crate::position::{Checkpoint, NodeId, Position};

/// How long a connection may take to hear why it is closed.
const LINGER: Duration = Duration::from_secs(1);

/// A subscriber's lease is written as often.
const LEASE_EVERY: Duration = Duration::from_secs(10);

/// How a journal is served. The defaults suit a few dozen subscribers.
///
/// ```
/// let options = headwater::shipping::ServeOptions { connections_max: 16, ..Default::default() };
/// # assert!(!options.allow_plaintext_off_loopback);
/// ```
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// How long peers may take, and how often they are told that this side is alive.
    pub deadlines: Deadlines,
    /// A peer that takes nothing for so long is cut off. Default 30 s.
    pub write_stall: Duration,
    /// At most so many connections; the next ones are turned away. Default 1,024.
    pub connections_max: usize,
    /// At most so many of them may not have introduced themselves yet. Default 64.
    pub handshakes_max: usize,
    /// Batches are packed into frames of about this many bytes. Default 128 KiB, at most 1 MiB.
    pub frame_bytes: usize,
    /// No peer gets more than this many bytes ahead of its acknowledgements. Default 64 MiB.
    pub window_bytes_max: u32,
    /// Connections are not encrypted yet, so by default only loopback addresses are served. With this,
    /// everybody who can reach the address can read the journal, and everybody on the way too.
    pub allow_plaintext_off_loopback: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            deadlines: Deadlines::default(),
            write_stall: Duration::from_secs(30),
            connections_max: 1024,
            handshakes_max: 64,
            frame_bytes: 128 << 10,
            window_bytes_max: 64 << 20,
            allow_plaintext_off_loopback: false,
        }
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
    /// It has acknowledged everything that is durable here.
    Live,
    /// It is about to be closed.
    Closing,
}

/// One connection, as the origin sees it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PeerStatus {
    /// Where it comes from.
    pub address: SocketAddr,
    /// Which mirror it is; `None` before it said so, or while it has no mirror yet.
    pub node: Option<NodeId>,
    /// The program's name and version, as it says.
    pub agent: String,
    /// What it is doing.
    pub state: PeerState,
    /// Up to where it was sent.
    pub sent: Option<Checkpoint>,
    /// Up to where it says that its mirror is durable.
    pub acked: Option<Checkpoint>,
    /// Up to where it says that its views are applied.
    pub applied: Option<Position>,
}

/// Serves a journal to mirrors until it is shut down or dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    journal: Journal,
    options: ServeOptions,
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    one_less: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, Arc<Connection>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Connection {
    address: SocketAddr,
    stream: TcpStream,
    session: Mutex<OriginSession>,
    /// The listener has changed the session, or everything shall stop.
    changed: Condvar,
    /// It has subscribed, or is gone: it doesn't count as a handshake.
    introduced: AtomicBool,
    /// The sender has written its last byte.
    said_all: AtomicBool,
}

/// Serves `journal` at `address` until the returned [`Server`] is shut down or dropped.
///
/// Port 0 asks the system for a free one; see [`Server::local_addr`].
///
/// # Errors
/// [`ServeError`]; nothing listens then.
pub fn serve(
    journal: Journal,
    address: impl ToSocketAddrs,
    mut options: ServeOptions,
) -> Result<Server, ServeError> {
    options.deadlines = options.deadlines.bounded();
    let listen = |error| ServeError::Listen(Arc::new(error));
    if journal.role() != Role::Origin {
        return Err(ServeError::NotAnOrigin { journal: journal.id() });
    }
    let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(listen)?.collect();
    if !options.allow_plaintext_off_loopback
        && let Some(&address) = addresses.iter().find(|address| !transport::is_loopback(address))
    {
        return Err(ServeError::Plaintext { address });
    }
    let listener = TcpListener::bind(addresses.as_slice()).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let shared = Arc::new(Shared {
        journal,
        options,
        stopping: AtomicBool::new(false),
        connections: Mutex::default(),
        one_less: Condvar::new(),
    });
    let for_thread = Arc::clone(&shared);
    let accepting = thread::Builder::new()
        .name("headwater-accept".into())
        .spawn(move || for_thread.accept_all(&listener))
        .map_err(|error| ServeError::Thread(Arc::new(error)))?;
    Ok(Server { shared, address, accepting: Some(accepting) })
}

impl Server {
    /// The address that is listened on, with the port that the system chose if it was asked to.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Everybody who is connected.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        let open: Vec<_> = self.shared.connections.lock().open.values().cloned().collect();
        let end = self.shared.journal.end();
        open.iter().map(|connection| connection.status(&end)).collect()
    }

    /// Says goodbye to everybody, closes all connections and waits for all threads to end: a second at
    /// most, unless the disk doesn't answer.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(accepting) = self.accepting.take() {
            drop(accepting.join());
        }
        self.shared.close_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        while !self.is_stopping() {
            match transport::accept(listener) {
                Ok(Some((stream, address))) => self.admit(stream, address),
                Ok(None) => {}
                // Out of descriptors, most likely: whoever is connected goes first.
                Err(_) => {
                    let mut connections = self.connections.lock();
                    self.one_less.wait_for(&mut connections, TICK);
                }
            }
        }
    }

    /// Starts a connection's threads, or turns it away.
    fn admit(self: &Arc<Self>, stream: TcpStream, address: SocketAddr) {
        if transport::prepare(&stream, self.options.write_stall).is_err() {
            return;
        }
        let mut connections = self.connections.lock();
        connections.threads.retain(|thread| !thread.is_finished());
        let open = connections.open.len();
        let introduced = |open: &&Arc<Connection>| open.introduced.load(Ordering::Acquire);
        let handshakes = || open - connections.open.values().filter(introduced).count();
        if open >= self.options.connections_max || handshakes() >= self.options.handshakes_max {
            return turn_away(&stream);
        }
        let connection = Arc::new(Connection {
            address,
            stream,
            session: Mutex::new(OriginSession::new(self.config(), transport::now())),
            changed: Condvar::new(),
            introduced: AtomicBool::new(false),
            said_all: AtomicBool::new(false),
        });
        connections.next += 1;
        let number = connections.next;
        let (shared, for_thread) = (Arc::clone(self), Arc::clone(&connection));
        let spawned = thread::Builder::new().name("headwater-serve".into()).spawn(move || {
            for_thread.run(&shared);
            shared.connections.lock().open.remove(&number);
            shared.one_less.notify_all();
        });
        match spawned {
            Ok(thread) => {
                connections.threads.push(thread);
                connections.open.insert(number, connection);
            }
            Err(_) => turn_away(&connection.stream),
        }
    }

    fn config(&self) -> OriginConfig {
        OriginConfig {
            node: self.journal.node(),
            session: env::random_id(),
            deadlines: self.options.deadlines,
            max_frame: FRAME_BYTES_MAX,
            data_bytes: self.options.frame_bytes.clamp(1, FRAME_BYTES_MAX as usize),
            max_window_bytes: self.options.window_bytes_max.max(1),
        }
    }

    /// Wakes everybody, gives them a moment to say goodbye, then cuts whoever is left off.
    fn close_all(&self) {
        let mut connections = self.connections.lock();
        connections.open.values().for_each(|connection| connection.wake());
        let deadline = Instant::now() + LINGER;
        while !connections.open.is_empty() {
            if self.one_less.wait_until(&mut connections, deadline).timed_out() {
                break;
            }
        }
        connections.open.values().for_each(|connection| connection.cut_off());
        let threads = std::mem::take(&mut connections.threads);
        drop(connections);
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// Tells a peer to come back later. Its socket's buffer is empty, so this doesn't block.
fn turn_away(mut stream: &TcpStream) {
    let mut out = Vec::new();
    let retry_after_ms = 1000;
    let failure = Failure::new(ErrorCode::TOO_MANY, "too many connections");
    Message::Error(Failure { retry_after_ms, ..failure }).encode(&mut out);
    drop(stream.write_all(&out));
}

impl Connection {
    fn wake(&self) {
        let _session = self.session.lock();
        self.changed.notify_all();
    }

    fn cut_off(&self) {
        drop(self.stream.shutdown(Shutdown::Both));
    }

    fn status(&self, end: &Checkpoint) -> PeerStatus {
        let session = self.session.lock();
        let status = session.status().clone();
        let state = if session.end().is_some() {
            PeerState::Closing
        } else if !status.streaming {
            PeerState::Handshake
        } else if status.acked.is_some_and(|acked| acked.offset >= end.offset) {
            PeerState::Live
        } else {
            PeerState::CatchingUp
        };
        let (node, agent, sent) = (status.node, status.agent, status.sent);
        let (acked, applied) = (status.acked, status.applied);
        PeerStatus { address: self.address, node, agent, state, sent, acked, applied }
    }

    fn run(&self, shared: &Shared) {
        thread::scope(|scope| {
            let listener = thread::Builder::new().name("headwater-listen".into());
            if listener.spawn_scoped(scope, || self.listen()).is_ok() {
                self.send(shared);
                self.said_all.store(true, Ordering::Release);
                drop(self.stream.shutdown(Shutdown::Write));
            }
        });
        self.cut_off();
    }

    /// Writes what the session has to say until it has ended.
    fn send(&self, shared: &Shared) {
        let mut source = JournalSource { journal: shared.journal.clone(), cursor: None };
        let mut lease =
            LeaseKeeper { journal: &shared.journal, noted: None, begun: false, id: None };
        let mut out = Vec::new();
        let mut stream = &self.stream;
        loop {
            out.clear();
            let mut session = self.session.lock();
            if shared.is_stopping() {
                session.shut_down();
            }
            let next = session.poll(&mut source, transport::now(), &mut out);
            self.introduced.store(!session.is_in_handshake(), Ordering::Release);
            let held = session.lease();
            let mut session = session;
            if let Some(held) = held.filter(|held| lease.is_due(held, next == Next::Close)) {
                // In front of the first byte: from then on the mirror is relied upon to go on.
                drop(session);
                lease.note(held, next == Next::Close);
                session = self.session.lock();
            }
            match next {
                Next::Write => {
                    drop(session);
                    if stream.write_all(&out).is_err() {
                        return self.session.lock().on_closed();
                    }
                    // A large batch's buffer isn't kept while there is nothing to say.
                    out.clear();
                    out.shrink_to(shared.options.frame_bytes.saturating_mul(2));
                }
                Next::Wait { past: Some(position), until } => {
                    drop(session);
                    let wait = until.saturating_duration_since(Instant::now()).min(TICK);
                    let _end = shared.journal.wait_past(position, wait);
                }
                Next::Wait { past: None, until } => {
                    self.changed.wait_until(&mut session, until.min(Instant::now() + TICK));
                }
                Next::Close => return,
            }
        }
    }

    /// Feeds the session with what arrives. Once the last word is said, it only waits for the peer to
    /// close, so that the last word isn't lost to a reset.
    fn listen(&self) {
        let mut buffer = [0; 4096];
        let mut closing_since = None;
        loop {
            let received = transport::receive(&self.stream, &mut buffer);
            if self.said_all.load(Ordering::Acquire) {
                let since = *closing_since.get_or_insert_with(Instant::now);
                if received == Received::Closed || since.elapsed() > LINGER {
                    return;
                }
                continue;
            }
            let mut session = self.session.lock();
            match received {
                Received::Nothing => continue,
                Received::Closed => session.on_closed(),
                Received::Bytes(len) => {
                    session.on_bytes(buffer.get(..len).unwrap_or_default(), transport::now());
                }
            }
            self.changed.notify_all();
            if received == Received::Closed {
                return;
            }
        }
    }
}

/// Keeps a subscriber's lease: from its subscription on, again while it moves on, and at the end.
struct LeaseKeeper<'a> {
    journal: &'a Journal,
    noted: Option<(Instant, Position)>,
    begun: bool,
    id: Option<[u8; 16]>,
}

impl LeaseKeeper<'_> {
    fn is_due(&self, lease: &Lease, closing: bool) -> bool {
        self.noted.is_none_or(|(at, position)| {
            at.elapsed() >= LEASE_EVERY || (closing && position != lease.position)
        })
    }

    /// A failure to write it is made good next time; meanwhile this process knows it.
    fn note(&mut self, lease: Lease, closing: bool) {
        self.noted = Some((Instant::now(), lease.position));
        self.id = Some(lease.id);
        let lease = Lease { heard_at_us: env::now_us(), ..lease };
        let stage = match (self.begun, closing) {
            (false, _) => Stage::Begins,
            (true, false) => Stage::GoesOn,
            (true, true) => Stage::Ends,
        };
        self.begun |= self.journal.note_lease(lease, stage).is_ok();
    }
}

impl Drop for LeaseKeeper<'_> {
    fn drop(&mut self) {
        self.id.iter().for_each(|id| self.journal.end_lease(id));
    }
}

/// The journal, as a session reads it.
struct JournalSource {
    journal: Journal,
    cursor: Option<Cursor>,
}

impl From<ReadError> for SourceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corruption(corruption) => Self::Corrupt { position: corruption.position },
            ReadError::Gap { from, .. } => Self::Corrupt { position: from },
            ReadError::Truncated { first } => Self::Truncated { first },
            _ => Self::Storage,
        }
    }
}

impl Source for JournalSource {
    fn end(&self) -> Checkpoint {
        self.journal.end()
    }

    fn first_position(&self) -> Position {
        self.journal.start().position
    }

    fn is_closed(&self) -> bool {
        self.journal.is_closed()
    }

    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError> {
        Ok(self.journal.compare(checkpoint)?)
    }

    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError> {
        Ok(self.journal.compare_place(witness.offset, witness.position, witness.chain)?)
    }

    fn seek(&mut self, from: Position) -> Result<(), SourceError> {
        self.cursor = Some(self.journal.cursor(from)?);
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        let Some(cursor) = &mut self.cursor else { return Ok(None) };
        Ok(cursor.next_batch()?.map(|next| (next.batch, next.page)))
    }
}
