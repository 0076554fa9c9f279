//! The mirror's side in threads: one that owns the mirror and writes it, and while there is a connection,
//! one that listens to it.
//!
//! ```text
//!        ┌─────────────────────────── until stopped ─────────────────────────────┐
//!        ▼                                                                        │
//!   Connecting ── resolve, connect ──▶ session ──▶ CatchingUp ──▶ Live ── lost ──▶ back off, 50 ms to 10 s
//!        ▲                                │            │            │
//!        └── resume ── Halted ◀───────────┴── AHEAD, FORK, FOREIGN, damage: nothing is tried any more
//!
//!   listener: socket ─▶ session ─▶ pages, batches ─▶ writer: Ingest: verify, write ─▶ sync ─▶ ACK
//! ```
//! Invariants:
//! - Only what the [`Ingest`] has verified and synced is published, acknowledged and shown to followers.
//! - The listener never waits for the disk, so a slow sync doesn't look like a dead mirror; what lies
//!   between the two is bounded by the window.
//! - A mirror whose history differs from the origin's is kept as it is, whatever happens.

mod begin;

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use super::error::{Divergent, ShippingError, WaitError};
use super::link::{Arrived, Link};
use super::message::{
    Authentication, Common, ErrorCode, FRAME_BYTES_MAX, Failure, OriginEnd, Presented, Speaker,
};
use super::observe::{EndReason, Ends};
use super::relay::{Relay, Standing};
use super::security::{AccessToken, ClientTls, TokenSource};
use super::session::{
    Deadlines, Delivery, Held, MirrorConfig, MirrorSession, Resume, SessionEnd, Told, batches,
};
use super::status_file::{self, StatusFile};
use super::transport;
use super::upstreams::{Addresses, UpstreamStatus, Upstreams};
use crate::env;
use crate::error::{IngestError, OpenError};
use crate::format::batch;
use crate::format::files::Mark;
use crate::fs::Fs;
use crate::journal::{self, Comparison, Fork, Ingest, Journal, Orphans, Watched};
use crate::options::JournalOptions;
use crate::position::{self, Checkpoint, JournalId, NodeId, Position};

const BACK_OFF_MIN: Duration = Duration::from_millis(50);
/// Jitter comes on top, up to as much again.
pub(super) const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// A session that lasted this long was healthy, as is one that was live or brought something: the next
/// attempt after it comes soon.
pub(super) const HEALTHY_AFTER: Duration = Duration::from_secs(5);
/// What a mirror was told of its origin it goes on telling for so many heartbeats. With the one that tells it, these are
/// the three after which its subscribers know of no lag either.
const STANDS_FOR_HEARTBEATS: u32 = 2;
/// A mirror that lags by less syncs whenever nothing more has arrived.
const LIVE_LAG_BYTES: u64 = 1 << 20;
/// While catching up, a pause in the stream longer than this ends a group.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(20);

/// How an origin is followed.
///
/// ```
/// let options = headwater::shipping::FollowOptions { window_bytes: 4 << 20, ..Default::default() };
/// # assert!(!options.allow_plaintext_off_loopback);
/// ```
#[derive(Clone, Debug)]
pub struct FollowOptions {
    /// How the mirror is written.
    pub journal: JournalOptions,
    /// Which journal is followed, where several are served. Default `None`: that of the mirror, and of one that has yet
    /// to be made the own journal of who is at the first address; the others are not asked before there is a mirror, and
    /// [their status](MirrorStatus::upstreams) says so ([`ShippingError::NotAsked`]).
    pub journal_id: Option<JournalId>,
    /// How long the origin may take, and how often it is told that this side is alive.
    pub deadlines: Deadlines,
    /// How long one address may take to answer a connection attempt. Default 3 s.
    pub connect_timeout: Duration,
    /// How many bytes may be under way or in memory without being durable yet; half as many are synced at
    /// once while catching up. Default 16 MiB.
    pub window_bytes: u32,
    /// Connects with TLS. Default: plain TCP, to loopback addresses only.
    pub tls: Option<ClientTls>,
    /// Says who this is, within TLS or on the loopback; never in clear over a network.
    pub token: Option<TokenSource>,
    /// Plain TCP also goes to other addresses than those of the loopback: everybody on the way can read and forge
    /// what is shipped.
    pub allow_plaintext_off_loopback: bool,
    /// How this program introduces itself to the origin, for people to read there.
    pub agent: String,
    /// What to do when the origin has another history than the mirror. Default: halt.
    pub forks: ForkPolicy,
    /// The directory of a backup of the origin (or of another mirror) with which a mirror begins that isn't there yet: it is
    /// copied, verified, and only the rest is fetched. Or that of a view's base ([`ViewControl::export_base`]): then the
    /// mirror begins where that is, and what lies in front is never fetched. The copying is done by the mirror's thread
    /// ([`MirrorState::Bootstrapping`]); an interrupted one is continued by following again, also if the backup has grown.
    /// Default none: everything is fetched.
    ///
    /// [`ViewControl::export_base`]: crate::view::ViewControl::export_base
    pub begin_with: Option<PathBuf>,
    /// How often it is written down how the mirror does, for `headwater lag` and `peer ls` beside this process: into the file
    /// `following` beside the mirror's journal, in place, never synced. It is believed for three intervals. From 10 ms to
    /// 60 s: what is less or more counts as that. `None`: it isn't. Default 1 s.
    pub status_interval: Option<Duration>,
}

/// What a mirror does when its origin has lost events that it has, or has others in their place.
///
/// That happens when the origin is restored from an older copy. Then the mirror may hold the only copy of
/// acknowledged events, so nothing of it is ever removed: either it stands still, or they are set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForkPolicy {
    /// It halts, and is kept as it is. Views of it are served as they are; [`Journal::fork`](crate::Journal::fork)
    /// and their status say that they are stale. Somebody decides: see `docs/operate/forks.md`.
    #[default]
    Halt,
    /// The mirror's tail behind the last common batch is set aside, whole, in `orphaned/` in the mirror's directory,
    /// and the mirror follows the origin from there on.
    ///
    /// Handles of the mirrored journal that were given out before are closed: take the new
    /// [`journal`](Mirror::journal), and open the views again on it. Views that have folded orphaned events are then
    /// set aside and built anew; others go on where they were.
    Quarantine,
}

impl Default for FollowOptions {
    fn default() -> Self {
        Self {
            journal: JournalOptions::default(),
            journal_id: None,
            deadlines: Deadlines::default(),
            connect_timeout: Duration::from_secs(3),
            window_bytes: 16 << 20,
            tls: None,
            token: None,
            allow_plaintext_off_loopback: false,
            agent: concat!("headwater/", env!("CARGO_PKG_VERSION")).to_owned(),
            forks: ForkPolicy::default(),
            begin_with: None,
            status_interval: Some(Duration::from_secs(1)),
        }
    }
}

/// What a mirror is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MirrorState {
    /// It copies the backup that it is to begin with ([`FollowOptions::begin_with`]).
    Bootstrapping {
        /// So many bytes of segments are there, verified.
        bytes: u64,
        /// Of so many; 0 until that is known.
        bytes_total: u64,
    },
    /// It looks for its origin, or waits before the next attempt.
    Connecting,
    /// It receives what it doesn't have yet.
    CatchingUp,
    /// It has reached the origin's durable end, and gets what comes as it comes.
    Live,
    /// It doesn't follow any more until [`Mirror::resume`], or until it is followed anew.
    Halted(ShippingError),
    /// It was stopped.
    Stopped,
}

/// How a mirror is doing.
///
/// Lag is `None` wherever it isn't known: before the first session, while there is no connection, when the other side
/// hasn't been heard for three heartbeats, when the mirror has halted or was stopped. It is never 0 then.
///
/// It is told of the node that is followed. If that is a mirror itself ([`path`](Self::path) has more than one node), how
/// far *that* lags is in its own status.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MirrorStatus {
    /// The address, as it was given, of the upstream that is in use or was tried last.
    pub address: String,
    /// All upstreams, in order of preference.
    pub upstreams: Vec<UpstreamStatus>,
    /// What it is doing.
    pub state: MirrorState,
    /// The nodes that the journal comes through, its origin first and the one that is followed last, as told in the last
    /// session; empty before.
    pub path: Vec<NodeId>,
    /// For how long this session has lasted; `None`: there is none.
    pub connected_for: Option<Duration>,
    /// The offset up to which bytes have come in this session, also those that aren't durable yet.
    pub received_offset: Option<u64>,
    /// Its durable end; `None` while there is no mirror yet.
    pub mirrored: Option<Checkpoint>,
    /// Up to where views are applied, as was [reported](Mirror::report_applied) last.
    pub applied: Option<Position>,
    /// The origin's durable end as last told; `None` if it has never been.
    pub origin_end: Option<OriginEnd>,
    /// How long ago that was.
    pub origin_heard: Option<Duration>,
    /// Why the last attempt or session ended.
    pub last_error: Option<ShippingError>,
    /// How many sessions there have been after the first.
    pub reconnects: u64,
    /// Why sessions and attempts have ended, since it is followed.
    pub ends: Ends,
    /// Tails that the origin had lost, and that were set aside.
    pub orphans: Vec<Orphans>,
    /// Whether what is known of the origin's end is fresh.
    lag_is_known: bool,
    /// What time it is at the origin.
    origin_now_us: Option<i64>,
    /// How long ago the origin told an end that the mirror has reached.
    caught_up: Option<Duration>,
    /// To look something up in.
    journal: Option<Journal>,
}

impl MirrorStatus {
    /// How many events the origin has made durable and this mirror hasn't; `None` if the origin hasn't been
    /// heard for three heartbeats.
    #[must_use]
    pub fn lag_events(&self) -> Option<u64> {
        let (end, mirrored) = self.known_ends()?;
        Some(end.position.since(mirrored.position))
    }

    /// The same in bytes.
    #[must_use]
    pub fn lag_bytes(&self) -> Option<u64> {
        let (end, mirrored) = self.known_ends()?;
        Some(end.offset.saturating_sub(mirrored.offset))
    }

    /// For how long, at most, the origin has had something that this mirror hasn't: zero if it has all, and `None` if
    /// that isn't known. Off by the time that a message takes. May block for the disk.
    ///
    /// It is the shorter of two times: since the mirror had everything that the origin told; and since its last event was
    /// recorded, by the origin's clock alone: clocks that differ don't matter. With a mirror between, it is that mirror's
    /// clock against the origin's; where the result would be negative it is unknown.
    #[must_use]
    pub fn lag_time(&self) -> Option<Duration> {
        let (end, mirrored) = self.known_ends()?;
        if mirrored.offset >= end.offset {
            return Some(Duration::ZERO);
        }
        let since_last = self.age_of(mirrored).into_iter();
        since_last.chain(self.caught_up).min()
    }

    /// How long ago the last event in front of this was recorded.
    fn age_of(&self, mirrored: Checkpoint) -> Option<Duration> {
        let last = Position::new(mirrored.position.get().checked_sub(1)?);
        let recorded_us = self.journal.as_ref()?.recorded_at_us(last)?;
        let age_us = self.origin_now_us?.checked_sub(recorded_us)?;
        u64::try_from(age_us).ok().map(Duration::from_micros)
    }

    /// How many events are durable at the origin and not [applied](Self::applied) to views here; `None` if that isn't
    /// known, or views haven't reported.
    #[must_use]
    pub fn applied_lag_events(&self) -> Option<u64> {
        let (end, _) = self.known_ends()?;
        Some(end.position.since(self.applied?))
    }

    fn known_ends(&self) -> Option<(OriginEnd, Checkpoint)> {
        self.origin_end.zip(self.mirrored).filter(|_| self.lag_is_known)
    }

    /// Whether nothing is tried any more.
    #[must_use]
    pub const fn is_halted(&self) -> bool {
        matches!(self.state, MirrorState::Halted(_))
    }

    /// Whether the mirror has reached its origin's end and stays there.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        matches!(self.state, MirrorState::Live)
    }
}

/// A mirror of another service's journal, and the threads that keep it following.
///
/// Dropping it stops following; the mirror stays.
#[derive(Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
    following: Option<JoinHandle<Result<(), IngestError>>>,
    status: Option<StatusFile>,
}

#[derive(Debug)]
struct Shared {
    /// Which node a mirror will be that has yet to be made: the origin counts its acknowledgements from the first on.
    new_node: NodeId,
    /// For those who serve it on.
    relay: Arc<Relay>,
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    addresses: Addresses,
    options: FollowOptions,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    phase: MirrorState,
    journal: Option<Journal>,
    origin: Option<(OriginEnd, Instant)>,
    /// What else it has told in the last session.
    told: Told,
    /// When the origin told an end that the mirror has reached.
    caught_up_at: Option<Instant>,
    applied: Option<Position>,
    last_error: Option<ShippingError>,
    /// The upstream in use or tried last, and why the last session with each ended.
    upstream: usize,
    upstream_errors: Vec<Option<ShippingError>>,
    sessions: u64,
    session_since: Option<Instant>,
    ends: Ends,
    orphans: Vec<Orphans>,
    stopping: bool,
    resuming: bool,
    /// The backup that is being copied.
    copying: Option<Arc<Watched>>,
    /// The connection's socket, to interrupt whoever reads from it.
    socket: Option<TcpStream>,
}

impl State {
    /// Whether what was told is the end of the journal, as far as anybody knows: not of a relay that is behind.
    fn upstream_is_current(&self) -> bool {
        self.told.speaker.is_some_and(Speaker::is_current)
    }

    /// What this mirror is for those that follow it. What it was told holds for so long.
    fn standing(&self, holds_for: Duration) -> Standing {
        let is_connected = matches!(self.phase, MirrorState::CatchingUp | MirrorState::Live);
        let hears = is_connected && self.told.speaker != Some(Speaker::RelayApart);
        let told_at = self.told.end.map(|(_, told_at)| told_at).filter(|_| hears);
        let is_current = matches!(self.phase, MirrorState::Live) && self.upstream_is_current();
        let had_all_at = self.caught_up_at.filter(|_| is_current);
        let until = |at: Option<Instant>| at.map(|at| at + holds_for);
        Standing { hears_until: until(told_at), has_all_until: until(had_all_at) }
    }

    /// The mirror's durable end: the journal's own, so it is never behind what a view shows already.
    fn mirrored(&self) -> Option<Checkpoint> {
        self.journal.as_ref().map(Journal::end)
    }

    fn phase(&self) -> MirrorState {
        match (&self.phase, &self.copying) {
            (MirrorState::Bootstrapping { .. }, Some(copying)) => {
                let (bytes, bytes_total) = copying.bytes();
                MirrorState::Bootstrapping { bytes, bytes_total }
            }
            (phase, _) => phase.clone(),
        }
    }
}

/// Follows the journal that is served at one or more addresses into a mirror in `dir`.
///
/// The mirror is opened, with recovery, before this returns; if there is none yet, it is created once the
/// origin has said which journal it serves, or what it begins with was copied. An address is kept as it is and resolved before every attempt. Of several,
/// of the origin and of relays, the first one that serves is used, and the next ones when it doesn't any more; whatever
/// they are, the mirror's end is compared with their history before they send anything.
///
/// # Errors
/// [`ShippingError::Open`] if there is something in `dir` that can't be opened as a mirror, or no address is given,
/// [`ShippingError::Foreign`] if it is a mirror of another journal than the options name,
/// [`ShippingError::Plaintext`] if an address is a literal one off the loopback and there is no TLS,
/// [`ShippingError::Security`] if certificates, keys or the token can't be used, [`ShippingError::Setup`] if no thread can be started.
pub fn follow(
    fs: Arc<dyn Fs>,
    dir: &Path,
    addresses: impl Into<Addresses>,
    mut options: FollowOptions,
) -> Result<Mirror, ShippingError> {
    options.deadlines = options.deadlines.bounded();
    let addresses = addresses.into();
    if addresses.as_slice().is_empty() {
        let (option, reason) = ("addresses", "name at least one");
        return Err(open_error(OpenError::InvalidOption { option, reason }));
    }
    for address in addresses.as_slice() {
        check_literal(address, &options)?;
        Credentials::read(&options, address)?;
    }
    // One that has yet to begin with a backup is opened when it has.
    let ingest = match &options.begin_with {
        Some(_) if !journal::is_begun(&*fs, dir) => None,
        _ => Ingest::open(&fs, dir, &options.journal).map_err(open_error)?,
    };
    let journal = ingest.as_ref().map(|ingest| ingest.journal().clone());
    if let (Some(journal), Some(origin)) = (&journal, options.journal_id)
        && journal.id() != origin
    {
        return Err(ShippingError::Foreign { mirror: journal.id(), origin });
    }
    let orphans = journal.as_ref().map(Journal::orphans).unwrap_or_default();
    let new_node = NodeId::random();
    let relay = Arc::new(Relay::new(new_node, &fs, dir));
    relay.publish(journal.as_ref());
    let shared = Arc::new(Shared {
        new_node,
        relay,
        fs,
        dir: dir.to_owned(),
        options,
        state: Mutex::new(State {
            phase: MirrorState::Connecting,
            journal,
            origin: None,
            told: Told::default(),
            caught_up_at: None,
            applied: None,
            last_error: None,
            upstream: 0,
            upstream_errors: vec![None; addresses.as_slice().len()],
            sessions: 0,
            session_since: None,
            ends: Ends::default(),
            orphans,
            stopping: false,
            resuming: false,
            copying: None,
            socket: None,
        }),
        changed: Condvar::new(),
        addresses,
    });
    let status = shared.write_status().transpose().map_err(setup_error)?;
    let for_thread = Arc::clone(&shared);
    let following = thread::Builder::new()
        .name("headwater-mirror".into())
        .spawn(move || {
            for_thread.begin();
            for_thread.run(ingest)
        })
        .map_err(setup_error)?;
    Ok(Mirror { shared, following: Some(following), status })
}

fn open_error(error: OpenError) -> ShippingError {
    ShippingError::Open(Arc::new(error))
}

pub(super) fn setup_error(error: std::io::Error) -> ShippingError {
    ShippingError::Setup(Arc::new(error))
}

/// What a connection is made with, as it is at present.
pub(super) struct Credentials {
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    authentication: Authentication,
}

impl Credentials {
    pub(super) fn read(options: &FollowOptions, address: &str) -> Result<Self, ShippingError> {
        let tls = options.tls.as_ref();
        let tls = tls.map(|tls| Ok((tls.config()?, tls.server_name(address)?)));
        let token = options.token.as_ref().map(TokenSource::token).transpose()?;
        let presented = |token: AccessToken| Presented::new(token.expose().as_bytes());
        Ok(Self {
            tls: tls.transpose().map_err(ShippingError::Security)?,
            authentication: token
                .map_or(Authentication::None, |token| Authentication::Token(presented(token))),
        })
    }
}

/// Connects to whoever serves at `address`, wherever that is now; how this side introduces itself there.
pub(super) fn connect(
    address: &str,
    options: &FollowOptions,
    give_up: impl Fn() -> bool,
    connected: impl FnOnce(&TcpStream) -> Result<(), ShippingError>,
) -> Result<(Link, Authentication), ShippingError> {
    let credentials = Credentials::read(options, address)?;
    let addresses = transport::resolve(address, &give_up)?;
    let addresses = check_plaintext(&addresses, options)?;
    let stream = transport::connect(&addresses, options.connect_timeout, give_up)?;
    transport::prepare(&stream, options.deadlines.bounded().silence).map_err(setup_error)?;
    connected(&stream)?;
    let link = match credentials.tls {
        Some((config, name)) => Link::tls(stream, config, name)?,
        None => Link::plain(stream),
    };
    Ok((link, credentials.authentication))
}

/// Whether an address that needs no name service may be connected to.
pub(super) fn check_literal(address: &str, options: &FollowOptions) -> Result<(), ShippingError> {
    match address.parse::<SocketAddr>() {
        Ok(literal) => check_plaintext(&[literal], options).map(drop),
        Err(_) => Ok(()),
    }
}

/// Leaves the addresses that may be connected to; an error if there are none. A token isn't sent in clear, whatever
/// is allowed.
fn check_plaintext(
    addresses: &[SocketAddr],
    options: &FollowOptions,
) -> Result<Vec<SocketAddr>, ShippingError> {
    let plaintext = options.allow_plaintext_off_loopback && options.token.is_none();
    let anywhere = options.tls.is_some() || plaintext;
    let allowed = |address: &&SocketAddr| anywhere || transport::is_loopback(address);
    let usable: Vec<_> = addresses.iter().filter(allowed).copied().collect();
    match addresses.first() {
        Some(&address) if usable.is_empty() => Err(ShippingError::Plaintext { address }),
        _ => Ok(usable),
    }
}

impl Mirror {
    pub(super) fn relay(&self) -> &Arc<Relay> {
        &self.shared.relay
    }

    /// The mirrored journal, to read from and to fold views from; `None` until the origin was reached for
    /// the first time.
    #[must_use]
    pub fn journal(&self) -> Option<Journal> {
        self.shared.state.lock().journal.clone()
    }

    /// Waits until there is a mirrored journal to read: at once if there was one already, else until the
    /// origin was reached. It may be far behind; see [`wait_caught_up`](Self::wait_caught_up).
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_ready(&self, timeout: Duration) -> Result<Journal, WaitError> {
        self.shared.wait_for(timeout, |state| state.journal.clone())
    }

    /// Waits until the mirror is durable up to an end that the origin told after this call. That comes with
    /// the next events or the next heartbeat. To wait for a certain event, wait for its token, here
    /// ([`wait_for`](Self::wait_for)) or in a view.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_caught_up(&self, timeout: Duration) -> Result<Checkpoint, WaitError> {
        let called = Instant::now();
        self.shared.wait_for(timeout, |state| {
            let origin = state.origin.filter(|_| state.upstream_is_current());
            let (end, _) = origin.filter(|(_, told)| *told >= called)?;
            state.mirrored().filter(|mirrored| mirrored.offset >= end.offset)
        })
    }

    /// Waits until the mirror has the append that gave `token`, durably, for `timeout` at most; the token comes
    /// from the service that appended. Also while there is no mirror yet. From then on every reader of
    /// [`journal`](Self::journal) sees the events; a view is to be waited for itself.
    ///
    /// # Errors
    /// [`WaitError::Behind`] if it doesn't come so far in time, with what hinders it;
    /// [`WaitError::Token`] if the token is of another journal, or of events that aren't in this history: those
    /// that lie at its position don't stand for them; [`WaitError::Halted`], [`WaitError::Stopped`].
    pub fn wait_for(&self, token: &position::Token, timeout: Duration) -> Result<(), WaitError> {
        let wanted = token.position;
        let reaches =
            |journal: &Journal| journal.id() != token.journal || journal.end().position >= wanted;
        let find = |state: &State| state.journal.clone().filter(reaches);
        let behind = |last_error| {
            let reached = self.journal().map_or(Position::START, |it| it.end().position);
            WaitError::Behind { reached, wanted, last_error }
        };
        let journal = self.shared.wait_for(timeout, find).map_err(|error| match error {
            WaitError::Timeout { last_error } => behind(last_error),
            error => error,
        })?;
        Ok(journal.wait_for(token, Duration::ZERO)?)
    }

    /// Waits until `condition` holds of the status, also of a halted or stopped mirror.
    ///
    /// # Errors
    /// [`WaitError::Timeout`].
    pub fn wait_until(
        &self,
        timeout: Duration,
        condition: impl Fn(&MirrorStatus) -> bool,
    ) -> Result<MirrorStatus, WaitError> {
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
    pub fn status(&self) -> MirrorStatus {
        self.shared.status(&self.shared.state.lock())
    }

    /// Tells the origin, with the next acknowledgement, up to where views of this mirror are applied.
    pub fn report_applied(&self, position: Position) {
        self.shared.state.lock().applied = Some(position);
    }

    /// Tries again now: a halted mirror, once what halted it was put right, or one that waits before its
    /// next attempt. A mirror whose disk had failed is opened again; take the new
    /// [`journal`](Self::journal) then.
    pub fn resume(&self) {
        let mut state = self.shared.state.lock();
        state.resuming = true;
        // Whoever waits from now on waits for the new attempt.
        if matches!(state.phase, MirrorState::Halted(_)) {
            state.phase = MirrorState::Connecting;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Stops following, closes the mirror, and waits for all threads to end.
    ///
    /// # Errors
    /// [`IngestError`] if the mirror can't be closed cleanly; what was published as durable is.
    pub fn stop(mut self) -> Result<(), IngestError> {
        self.stop_following()
    }

    fn stop_following(&mut self) -> Result<(), IngestError> {
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

impl Drop for Mirror {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(following) = self.following.take() {
            drop(following.join());
        }
    }
}

/// How an attempt went.
struct Attempt {
    error: ShippingError,
    /// It came to a session that went well for a while.
    healthy: bool,
}

impl From<ShippingError> for Attempt {
    fn from(error: ShippingError) -> Self {
        Self { error, healthy: false }
    }
}

/// What comes of trying all upstreams.
enum Round {
    /// Another one.
    Again,
    /// Nothing more before somebody acts.
    Halt(ShippingError),
    /// What lies behind the common end is to be set aside.
    SetAside(Position),
}

pub(super) fn back_off() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_jitter()
        .with_min_delay(BACK_OFF_MIN)
        .with_max_delay(BACK_OFF_MAX)
        .without_max_times()
        .build()
}

impl Shared {
    fn run(&self, mut ingest: Option<Ingest>) -> Result<(), IngestError> {
        let mut pauses = back_off();
        let mut upstreams = Upstreams::new(self.addresses.as_slice().len());
        while !self.state.lock().stopping {
            let (round, healthy) = self.round(&mut ingest, &mut upstreams);
            if healthy {
                pauses = back_off();
            }
            let round = match round {
                Round::SetAside(common) => match self.set_aside(&mut ingest, common) {
                    Ok(()) => {
                        upstreams.forget();
                        Round::Again
                    }
                    Err(error) if error.is_halting() => Round::Halt(error),
                    Err(error) => {
                        self.note(error);
                        Round::Again
                    }
                },
                round => round,
            };
            match round {
                Round::Halt(error) => {
                    let poisoned = is_poisoned(&error);
                    self.halt(error);
                    pauses = back_off();
                    upstreams.forget();
                    if poisoned {
                        ingest = None;
                    }
                }
                _ => {
                    let rest = upstreams.rest(self.usable(), Instant::now());
                    if self.pause(pauses.next().unwrap_or(BACK_OFF_MAX).max(rest)) {
                        upstreams.forget();
                    }
                }
            }
        }
        let closed = ingest.map_or(Ok(()), Ingest::close);
        self.relay.publish(None);
        self.state.lock().phase = MirrorState::Stopped;
        self.changed.notify_all();
        closed
    }

    /// Who doesn't know yet which journal to follow follows the first one's.
    fn usable(&self) -> usize {
        let knows = self.knows_journal(&self.state.lock());
        if knows { self.addresses.as_slice().len() } else { 1 }
    }

    fn knows_journal(&self, state: &State) -> bool {
        self.options.journal_id.is_some() || state.journal.is_some()
    }

    /// Tries one upstream after the other, until one has served for a while, or has said what nobody else can say
    /// otherwise. Whether one has served.
    fn round(&self, ingest: &mut Option<Ingest>, upstreams: &mut Upstreams) -> (Round, bool) {
        let mut was_healthy = false;
        for number in 0..self.usable() {
            if upstreams.rests(number, Instant::now()) || self.state.lock().stopping {
                continue;
            }
            let Attempt { error, healthy } = self.attempt(ingest, number);
            was_healthy |= healthy;
            let is_refused = upstreams.note(number, &error, Instant::now());
            self.count(&error);
            self.note(error.clone());
            if matches!(error, ShippingError::Cycle { .. }) {
                self.relay.comes_from_nowhere();
            }
            if self.is_settled(&error) {
                return (self.settle(error, is_refused), was_healthy);
            }
            if healthy && !is_refused && !matches!(error, ShippingError::Apart) {
                return (Round::Again, was_healthy);
            }
        }
        if let Some(error) = upstreams.parted().filter(|_| self.quarantines()) {
            return (self.settle(error, true), was_healthy);
        }
        let halted = upstreams.refused_by_all(self.usable());
        (halted.map_or(Round::Again, Round::Halt), was_healthy)
    }

    fn quarantines(&self) -> bool {
        self.options.forks == ForkPolicy::Quarantine
    }

    /// Whether other upstreams can't do better: it is the trouble of this side, or the origin's own word.
    fn is_settled(&self, error: &ShippingError) -> bool {
        error.is_own()
            || matches!(error, ShippingError::Ahead(at) | ShippingError::Fork(at) if at.told_by == Speaker::Origin)
    }

    fn settle(&self, error: ShippingError, is_refused: bool) -> Round {
        match error.fork() {
            Some(Fork { common: Some(common) }) if self.quarantines() => Round::SetAside(common),
            _ if is_refused => Round::Halt(error),
            _ => Round::Again,
        }
    }

    /// Sets aside what lies behind the common end; then the mirror follows from there.
    fn set_aside(
        &self,
        ingest: &mut Option<Ingest>,
        common: Position,
    ) -> Result<(), ShippingError> {
        let Some(parted) = ingest.take() else { return Ok(()) };
        let done = parted.set_aside(common, &self.options.journal);
        let (whole, _) = done.map_err(|error| ShippingError::SetAside(Arc::new(error)))?;
        let orphans = whole.journal().orphans();
        let mut state = self.state.lock();
        state.orphans = orphans;
        state.caught_up_at = None; // with another history
        drop(state);
        self.publish_journal(Some(&whole));
        *ingest = Some(whole);
        Ok(())
    }

    /// Why an attempt ended; that it was stopped is no reason.
    fn count(&self, error: &ShippingError) {
        let mut state = self.state.lock();
        if !state.stopping {
            state.ends.count(EndReason::from(error));
        }
    }

    fn write_status(self: &Arc<Self>) -> Option<std::io::Result<StatusFile>> {
        let shared = Arc::clone(self);
        let status = move || {
            let status = shared.status(&shared.state.lock());
            status_file::of_mirror(&status) // may wait for the disk, and holds nobody up
        };
        status_file::follow(&self.fs, &self.dir, self.options.status_interval, status)
    }

    fn stop(&self) {
        let mut state = self.state.lock();
        state.stopping = true;
        if let Some(copying) = &state.copying {
            copying.cancel();
        }
        if let Some(socket) = &state.socket {
            drop(socket.shutdown(Shutdown::Both));
        }
        self.changed.notify_all();
    }

    /// Waits until somebody wants it to go on or to end.
    fn halt(&self, error: ShippingError) {
        let mut state = self.state.lock();
        state.last_error = Some(error.clone());
        if let (Some(journal), Some(fork)) = (&state.journal, error.fork()) {
            journal.set_fork(Some(fork));
        }
        state.phase = MirrorState::Halted(error);
        self.speak(&state);
        state.resuming = false;
        self.changed.notify_all();
        while !state.resuming && !state.stopping {
            self.changed.wait(&mut state);
        }
        state.resuming = false;
        state.phase = MirrorState::Connecting;
    }

    /// Of the upstream that was tried last.
    fn note(&self, error: ShippingError) {
        let mut state = self.state.lock();
        let upstream = state.upstream;
        state.upstream_errors.get_mut(upstream).into_iter().for_each(|known| {
            *known = Some(error.clone());
        });
        state.last_error = Some(error);
        state.phase = MirrorState::Connecting;
        self.speak(&state);
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

    fn attempt(&self, ingest: &mut Option<Ingest>, upstream: usize) -> Attempt {
        self.state.lock().upstream = upstream;
        match self.connect(ingest, upstream) {
            Ok((link, authentication)) => self.converse(ingest, &link, authentication),
            Err(error) => error.into(),
        }
    }

    /// Opens the mirror if it isn't open, and connects to an upstream, wherever it is now.
    fn connect(
        &self,
        ingest: &mut Option<Ingest>,
        upstream: usize,
    ) -> Result<(Link, Authentication), ShippingError> {
        if ingest.is_none() {
            let opened = Ingest::open(&self.fs, &self.dir, &self.options.journal);
            *ingest = opened.map_err(open_error)?;
            self.publish_journal(ingest.as_ref());
        }
        let give_up = || self.state.lock().stopping;
        let address = self.addresses.as_slice().get(upstream).map_or("", String::as_str);
        connect(address, &self.options, give_up, |stream| {
            let mut state = self.state.lock();
            if state.stopping {
                return Err(ShippingError::Disconnected);
            }
            state.socket = Some(stream.try_clone().map_err(setup_error)?);
            Ok(())
        })
    }

    fn publish_journal(&self, ingest: Option<&Ingest>) {
        if let Some(ingest) = ingest {
            let mut state = self.state.lock();
            state.journal = Some(ingest.journal().clone());
            self.changed.notify_all();
            drop(state);
            self.relay.publish(Some(ingest.journal()));
        }
    }

    /// One session, from its first byte to its end.
    fn converse(
        &self,
        ingest: &mut Option<Ingest>,
        link: &Link,
        authentication: Authentication,
    ) -> Attempt {
        let started = Instant::now();
        let resume = ingest.as_ref().map(|i| Resume { end: i.end(), witness: i.witness() });
        let beginning = |id| Resume { end: Mark::start(id).end, witness: None };
        let resume = resume.or_else(|| self.options.journal_id.map(beginning));
        let node = ingest.as_ref().map_or(self.new_node, |ingest| ingest.journal().node());
        let config = self.config(node, resume, authentication);
        let session = Mutex::new(MirrorSession::new(config, transport::now()));
        let connection = Connection { shared: self, session, link };
        let (sender, deliveries) = unbounded();
        let written = thread::scope(|scope| {
            let listener = thread::Builder::new().name("headwater-listen".into());
            let connection = &connection;
            listener
                .spawn_scoped(scope, move || connection.listen(&sender))
                .map_err(setup_error)?;
            let written = MirrorWriter::new(connection, ingest).write_all(&deliveries);
            if let Err(error) = &written {
                connection.give_up(error);
            }
            written
        });
        let end = connection.session.into_inner().end().cloned();
        let mut state = self.state.lock();
        state.socket = None;
        state.session_since = None;
        let was_live = matches!(state.phase, MirrorState::Live);
        let had = resume.map_or(Position::START, |resume| resume.end.position);
        let progressed = state.mirrored().is_some_and(|mirrored| mirrored.position > had);
        let healthy = was_live || progressed || started.elapsed() >= HEALTHY_AFTER;
        let (mirror, witness) = (resume.map(|r| r.end), resume.and_then(|r| r.witness));
        let error = match (written, end) {
            (Err(error), _) => error,
            (Ok(()), Some(SessionEnd::Disconnected) | None) => {
                link.failure().map_or(ShippingError::Disconnected, ShippingError::Tls)
            }
            (Ok(()), Some(end)) => ShippingError::from_end(end, mirror, witness),
        };
        Attempt { error, healthy }
    }

    fn config(
        &self,
        node: NodeId,
        resume: Option<Resume>,
        authentication: Authentication,
    ) -> MirrorConfig {
        MirrorConfig {
            node: Some(node),
            follows: true,
            nonce: env::random_id(),
            authentication,
            agent: self.options.agent.clone(),
            deadlines: self.options.deadlines,
            max_frame: FRAME_BYTES_MAX,
            window_bytes: self.options.window_bytes.max(1),
            resume,
        }
    }

    /// The origin has told something of itself.
    fn origin_told(&self, told: Told) {
        let mut state = self.state.lock();
        state.origin = told.end.or(state.origin);
        state.told = told;
        self.judge_phase(&mut state);
    }

    /// Whether to ask others than a relay that hasn't heard from its origin for as long as a peer may be silent.
    fn leaves(&self, speaker: Option<Speaker>, since: &mut Option<Instant>, now: Instant) -> bool {
        if speaker != Some(Speaker::RelayApart) || self.addresses.as_slice().len() < 2 {
            *since = None;
            return false;
        }
        let since = *since.get_or_insert(now);
        now >= since + self.options.deadlines.silence
    }

    /// The mirror's durable end has moved.
    fn mirror_moved(&self) {
        self.judge_phase(&mut self.state.lock());
    }

    /// Live once it has reached the origin's end; catching up again when it lags by more than the window.
    fn judge_phase(&self, state: &mut State) {
        self.changed.notify_all();
        self.judge_lag(state);
        self.speak(state);
    }

    /// Those that follow this mirror are told how it is, with the next heartbeat.
    fn speak(&self, state: &State) {
        let holds_for = STANDS_FOR_HEARTBEATS * self.options.deadlines.heartbeat;
        self.relay.stands(state.standing(holds_for));
    }

    fn judge_lag(&self, state: &mut State) {
        let Some(((end, told_at), mirrored)) = state.origin.zip(state.mirrored()) else { return };
        let lag_bytes = end.offset.saturating_sub(mirrored.offset);
        if lag_bytes == 0 && state.session_since.is_some() && state.upstream_is_current() {
            state.caught_up_at = Some(told_at);
        }
        match state.phase {
            MirrorState::CatchingUp if lag_bytes == 0 => state.phase = MirrorState::Live,
            MirrorState::Live if lag_bytes > u64::from(self.options.window_bytes) => {
                state.phase = MirrorState::CatchingUp;
            }
            _ => {}
        }
    }

    fn status(&self, state: &State) -> MirrorStatus {
        let heard = state.origin.map(|(_, told)| told.elapsed());
        let connected = matches!(state.phase, MirrorState::CatchingUp | MirrorState::Live);
        let fresh = |age: Duration| age <= 3 * self.options.deadlines.heartbeat;
        let now_there = |(us, at): (i64, Instant)| {
            us.saturating_add(i64::try_from(at.elapsed().as_micros()).unwrap_or(i64::MAX))
        };
        let since = state.session_since;
        let address =
            |number: usize| self.addresses.as_slice().get(number).cloned().unwrap_or_default();
        let not_asked = (!self.knows_journal(state)).then_some(ShippingError::NotAsked);
        let upstream = |(number, last_error): (usize, &Option<ShippingError>)| UpstreamStatus {
            address: address(number),
            is_in_use: connected && number == state.upstream,
            last_error: last_error.clone().or_else(|| not_asked.clone().filter(|_| number > 0)),
        };
        let upstreams = state.upstream_errors.iter().enumerate().map(upstream).collect();
        MirrorStatus {
            address: address(state.upstream),
            upstreams,
            state: state.phase(),
            path: state.told.path.to_vec(),
            connected_for: since.map(|since| since.elapsed()),
            received_offset: since.map(|_| state.told.received),
            mirrored: state.mirrored(),
            applied: state.applied,
            origin_end: state.origin.map(|(end, _)| end),
            origin_heard: heard,
            last_error: state.last_error.clone(),
            reconnects: state.sessions.saturating_sub(1),
            ends: state.ends.clone(),
            orphans: state.orphans.clone(),
            origin_now_us: state.told.clock.map(now_there),
            caught_up: state.caught_up_at.map(|at| at.elapsed()),
            journal: state.journal.clone(),
            lag_is_known: connected && heard.is_some_and(fresh) && state.upstream_is_current(),
        }
    }

    /// Waits until `look` finds something; a halted or stopped mirror ends the wait.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        look: impl Fn(&State) -> Option<T>,
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

    /// Waits for a change; true if `deadline` has passed instead. Without one (a timeout beyond what the
    /// clock can tell) it is never too late.
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

fn is_poisoned(error: &ShippingError) -> bool {
    matches!(error, ShippingError::Storage(IngestError::Poisoned(_)))
}

/// A connection, shared by the listener and the writer.
struct Connection<'a> {
    shared: &'a Shared,
    session: Mutex<MirrorSession>,
    link: &'a Link,
}

impl Connection<'_> {
    /// Feeds the session with what arrives, and passes on what it delivers, until it ends.
    fn listen(&self, sender: &Sender<Delivery>) {
        let (mut raw, mut plain) = (vec![0; 128 << 10], Vec::new());
        let mut deliveries = Vec::new();
        let mut told = Told::default();
        let mut apart_since = None;
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
            if self.shared.leaves(session.told().speaker, &mut apart_since, now.at) {
                session.leave();
            }
            let (ended, told_now) = (session.end().is_some(), session.told());
            drop(session);
            // The end goes first: a mirror isn't live because it has reached that of an earlier session.
            if told != told_now {
                told = told_now;
                self.shared.origin_told(told.clone());
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
        let written = self.link.write(|out| {
            let applied = self.shared.state.lock().applied;
            let mut session = self.session.lock();
            applied.into_iter().for_each(|position| session.on_applied(position));
            session.take_output(transport::now(), out);
        });
        if !written {
            self.session.lock().on_closed();
        }
        written
    }

    /// Tells the session what batch ends of the origin's are in the mirror; it asks on, or has ended.
    fn compared(&self, held: &[Held]) {
        let mut session = self.session.lock();
        session.on_compared(held, transport::now());
        let ended = session.end().is_some();
        drop(session);
        self.flush();
        if ended {
            self.link.cut_off(); // the listener needn't wait
        }
    }

    fn became_durable(&self, end: Checkpoint) {
        self.shared.mirror_moved();
        self.session.lock().on_durable(end);
        self.flush();
    }

    /// The writer can't go on: the origin is told why, and the listener is interrupted.
    fn give_up(&self, error: &ShippingError) {
        let (code, position) = match error {
            ShippingError::Refused { position, .. } => (ErrorCode::REFUSED, Some(*position)),
            ShippingError::Fork(at) => (ErrorCode::REFUSED, Some(at.mirror.position)),
            _ => (ErrorCode::STORAGE, None),
        };
        let failure = Failure { position, ..Failure::new(code, error.to_string()) };
        self.session.lock().fail(failure);
        self.flush();
        self.link.cut_off();
    }
}

/// Puts what a session delivers into the mirror.
struct MirrorWriter<'a> {
    connection: &'a Connection<'a>,
    ingest: &'a mut Option<Ingest>,
    /// The origin's durable end when it granted the subscription.
    origin: Option<Checkpoint>,
    unsynced_bytes: u64,
}

/// What comes next for a writer.
enum Step {
    Take(Delivery),
    Sync,
    End,
}

impl<'a> MirrorWriter<'a> {
    fn new(connection: &'a Connection<'a>, ingest: &'a mut Option<Ingest>) -> Self {
        Self { connection, ingest, origin: None, unsynced_bytes: 0 }
    }

    /// Takes all deliveries, until the listener has ended. What has been written is synced also then, and
    /// also when a later delivery is refused.
    fn write_all(mut self, deliveries: &Receiver<Delivery>) -> Result<(), ShippingError> {
        loop {
            let taken = match self.next_step(deliveries) {
                Step::Take(delivery) => self.take(delivery),
                Step::Sync => self.sync(),
                Step::End => return self.sync(),
            };
            if let Err(error) = taken {
                if !is_poisoned(&error) {
                    self.sync()?;
                }
                return Err(error);
            }
        }
    }

    /// When live, everything is synced as soon as nothing more has arrived; while catching up, in groups
    /// of half a window.
    fn next_step(&self, deliveries: &Receiver<Delivery>) -> Step {
        if self.unsynced_bytes == 0 {
            return deliveries.recv().map_or(Step::End, Step::Take);
        }
        let group_bytes = u64::from(self.connection.shared.options.window_bytes) / 2;
        if self.unsynced_bytes >= group_bytes {
            return Step::Sync;
        }
        match deliveries.try_recv() {
            Ok(delivery) => Step::Take(delivery),
            Err(TryRecvError::Disconnected) => Step::End,
            Err(TryRecvError::Empty) if self.lag_bytes() <= LIVE_LAG_BYTES => Step::Sync,
            Err(TryRecvError::Empty) => match deliveries.recv_timeout(CATCH_UP_PAUSE) {
                Ok(delivery) => Step::Take(delivery),
                Err(RecvTimeoutError::Timeout) => Step::Sync,
                Err(RecvTimeoutError::Disconnected) => Step::End,
            },
        }
    }

    /// How far what is written lies behind what the origin has.
    fn lag_bytes(&self) -> u64 {
        let origin = self.connection.session.lock().origin_end().map_or(0, |(end, _)| end.offset);
        let written = self.ingest.as_ref().map_or(0, |ingest| ingest.end().offset);
        origin.saturating_sub(written)
    }

    fn take(&mut self, delivery: Delivery) -> Result<(), ShippingError> {
        match delivery {
            Delivery::Subscribed(origin) => self.subscribed(origin),
            Delivery::Segment(page) => {
                let taken = self.ingest()?.segment(&page);
                taken.map_err(|error| self.ingest_error(error))?;
                // Everything in front of the new segment was synced on the way.
                self.sync()
            }
            Delivery::Probed(ends) => {
                let journal = self.ingest()?.journal().clone();
                self.connection.compared(&compare_ends(&journal, &ends));
                Ok(())
            }
            Delivery::Granted(..) | Delivery::Run(_) | Delivery::Skipped(_) => Ok(()), // of feeds
            Delivery::Batches(bytes) => batches(&bytes).try_for_each(|batch| {
                let taken = self.ingest()?.batch(batch);
                taken.map_err(|error| self.ingest_error(error))?;
                self.unsynced_bytes += batch.len() as u64;
                Ok(())
            }),
        }
    }

    /// The session has compared the journal ids already, if there was a mirror.
    fn subscribed(&mut self, origin: Checkpoint) -> Result<(), ShippingError> {
        let shared = self.connection.shared;
        self.origin = Some(origin);
        if self.ingest.is_none() {
            let options = &shared.options.journal;
            let (node, journal) = (shared.new_node, origin.journal);
            let created = Ingest::create_as(node, &shared.fs, &shared.dir, journal, options);
            *self.ingest = Some(created.map_err(open_error)?);
        }
        shared.publish_journal(self.ingest.as_ref());
        let path = self.connection.session.lock().told().path;
        shared.relay.comes_through(&path);
        let mut state = shared.state.lock();
        state.journal.iter().for_each(|journal| journal.set_fork(None));
        state.phase = MirrorState::CatchingUp;
        state.sessions += 1;
        state.session_since = Some(Instant::now());
        shared.judge_phase(&mut state);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), ShippingError> {
        if std::mem::take(&mut self.unsynced_bytes) == 0 {
            return Ok(());
        }
        let synced = self.ingest()?.sync();
        let end = synced.map_err(|error| self.ingest_error(error))?;
        self.connection.became_durable(end);
        Ok(())
    }

    /// The mirror; it is there once the subscription was granted.
    fn ingest(&mut self) -> Result<&mut Ingest, ShippingError> {
        self.ingest.as_mut().ok_or(ShippingError::Disconnected)
    }

    fn ingest_error(&self, error: IngestError) -> ShippingError {
        let ends = self.origin.zip(self.ingest.as_ref());
        match (error, ends) {
            (IngestError::Refused { position, refusal }, _) => {
                ShippingError::Refused { position, refusal }
            }
            (IngestError::WitnessDiffers { .. }, Some((origin, ingest))) => {
                let (mirror, witness) = (ingest.end(), ingest.witness());
                // What is in the mirror continues into what the origin has sent.
                let common = Some(mirror.position);
                let speaker = self.connection.session.lock().told().speaker;
                let told_by = speaker.unwrap_or(Speaker::RelayApart);
                let at = Divergent { mirror, origin, witness, common, told_by };
                ShippingError::Fork(Box::new(at))
            }
            (error, _) => ShippingError::Storage(error),
        }
    }
}

/// What batch ends of another history are in this one.
pub(super) fn compare_ends(journal: &Journal, ends: &[Option<batch::Link>]) -> Vec<Held> {
    let compare = |end: &Option<batch::Link>| {
        let Some(batch::Link { offset, position, chain }) = *end else { return Held::Unknown };
        match journal.compare_place(offset, position, chain) {
            Ok(Comparison::Equal) => Held::Common(Common { position, chain }),
            Ok(_) => Held::Other,
            // What was removed or is damaged here can't be compared.
            Err(_) => Held::Unknown,
        }
    };
    ends.iter().map(compare).collect()
}

#[cfg(test)]
mod tests {
    use super::super::security::Trust;
    use super::*;

    #[test]
    fn pauses_begin_at_50_ms_never_exceed_10_s_and_never_end() {
        let pauses: Vec<_> = back_off().take(40).collect();
        assert_eq!(pauses.len(), 40);
        assert!(pauses[0] >= BACK_OFF_MIN && pauses[0] <= 2 * BACK_OFF_MIN, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= Duration::from_secs(10)), "{pauses:?}");
        assert!(pauses[39] >= BACK_OFF_MAX, "{pauses:?}");
    }

    #[test]
    fn of_several_addresses_only_those_on_loopback_are_used() {
        let addresses = ["192.0.2.1:1", "127.0.0.9:2", "[::1]:3", "[::ffff:127.0.0.1]:4"]
            .map(|address| address.parse::<SocketAddr>().unwrap());
        let mut options = FollowOptions::default();
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses[1..]);
        match check_plaintext(&addresses[..1], &options) {
            Err(ShippingError::Plaintext { address }) => assert_eq!(address, addresses[0]),
            other => panic!("{other:?}"),
        }
        options.allow_plaintext_off_loopback = true;
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses);
        options.token = Some(AccessToken::generate().unwrap().into());
        let kept = check_plaintext(&addresses, &options).unwrap();
        assert_eq!(kept, addresses[1..], "a token in clear");
        options.tls = Some(ClientTls::trusting(Trust::Keys(Vec::new())));
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses);
    }
}
