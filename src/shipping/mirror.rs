//! The mirror's side in threads: one that owns the mirror, and while there is a connection, another one: they listen to it and
//! write what comes, and take turns.
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
//! Attempts and upstreams are in `rounds`, a connection in `connect`, a session with its two threads in `conversation`; what
//! follows from what the origin tells in `standing`, and what is shown of it in `status`. `begin` copies a backup first.
//!
//! Invariants:
//! - Only what the [`Ingest`] has verified and synced is published, acknowledged and shown to followers.
//! - Whoever listens never waits for the disk: who has heard an event that is all there is, and writes it, gives the listener's
//!   place up before. So a slow sync doesn't look like a dead mirror; what lies between the two is bounded by the window, with a
//!   header page for each 512 bytes of it at the most.
//! - A mirror whose history differs from the origin's is kept as it is, whatever happens.

mod begin;
mod connect;
mod conversation;
mod options;
mod rounds;
mod standing;
mod status;

use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use parking_lot::{Condvar, Mutex, MutexGuard};

use self::connect::open_error;
pub(super) use self::standing::Awaited;
use super::error::{ShippingError, WaitError};
use super::message::OriginEnd;
use super::observe::Ends;
use super::relay::Relay;
use super::session::Told;
use super::status_file::{self, StatusFile};
use super::upstreams::{Addresses, Tried};
use crate::error::IngestError;
use crate::fs::Fs;
use crate::journal::{self, Ingest, Journal, Orphans, Watched};
use crate::position::{self, Checkpoint, NodeId, Position};

pub(super) use self::connect::{check_addresses, connect, setup_error};
pub(super) use self::conversation::compare_ends;
pub use self::options::{FollowOptions, ForkPolicy};
pub(super) use self::rounds::{BACK_OFF_MAX, back_off};
pub use self::status::{MirrorState, MirrorStatus};

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
    /// As of when the origin told an end that the mirror has reached.
    caught_up_at: Option<Instant>,
    /// The next one that it is to reach.
    awaited: Awaited,
    /// As was reported.
    applied: Option<Position>,
    last_error: Option<ShippingError>,
    upstreams: Tried,
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
    /// While there is a session: whoever waits for an end that is told from now on rings here.
    asks: Option<Sender<()>>,
}

impl State {
    fn new(journal: Option<Journal>, orphans: Vec<Orphans>, upstreams: usize) -> Self {
        Self {
            phase: MirrorState::Connecting,
            journal,
            origin: None,
            told: Told::default(),
            caught_up_at: None,
            awaited: Awaited::default(),
            applied: None,
            last_error: None,
            upstreams: Tried::new(upstreams),
            sessions: 0,
            session_since: None,
            ends: Ends::default(),
            orphans,
            stopping: false,
            resuming: false,
            copying: None,
            socket: None,
            asks: None,
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
    check_addresses(&addresses, &options)?;
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
    let is_new = journal.is_none() && options.begin_with.is_none();
    let relay = Arc::new(Relay::new(new_node, &fs, dir, is_new, options.journal_id));
    if journal.is_some() {
        relay.publish(journal.as_ref());
    }
    let shared = Arc::new(Shared {
        new_node,
        relay,
        fs,
        dir: dir.to_owned(),
        options,
        state: Mutex::new(State::new(journal, orphans, addresses.as_slice().len())),
        changed: Condvar::new(),
        addresses,
    });
    let status = shared.write_status().transpose().map_err(setup_error)?;
    let for_thread = Arc::clone(&shared);
    let following = thread::Builder::new()
        .name("headwater-mirror".into())
        .spawn(move || {
            let _ended = EndedByPanic(Arc::clone(&for_thread));
            for_thread.begin();
            for_thread.run(ingest)
        })
        .map_err(setup_error)?;
    Ok(Mirror { shared, following: Some(following), status })
}

/// Whoever waits for something of a mirror, or follows it, learns that nothing comes any more.
struct EndedByPanic(Arc<Shared>);

impl Drop for EndedByPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.relay.publish(None);
            self.0.state.lock().phase = MirrorState::Stopped;
            self.0.changed.notify_all();
        }
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

    /// Waits until the mirror is durable up to an end that the origin had at some time after this call: it is asked for
    /// that at once. Behind a relay it is one that the relay had, which lacks at most what the origin has committed within two
    /// heartbeats. To wait for a certain event, wait for its token, here ([`wait_for`](Self::wait_for)) or in a view.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn wait_caught_up(&self, timeout: Duration) -> Result<Checkpoint, WaitError> {
        let called = Instant::now();
        self.shared.ask();
        self.shared.wait_for(timeout, standing::reaches_what_is_told_from(called))
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

    /// Tells the origin, with the next acknowledgement, up to where views of this mirror are applied. Without it, the
    /// origin is told what the views of this mirror that are open here have all applied; from now on, only this.
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
    ///
    /// # Panics
    /// If one of the threads has panicked: with that. The mirror was [stopped](MirrorState::Stopped) by it.
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

impl Shared {
    fn write_status(self: &Arc<Self>) -> Option<std::io::Result<StatusFile>> {
        let shared = Arc::clone(self);
        let status = move || {
            let status = shared.status(&shared.state.lock());
            status_file::of_mirror(&status) // may wait for the disk, and holds nobody up
        };
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
        if let Some(copying) = &state.copying {
            copying.cancel();
        }
        if let Some(socket) = &state.socket {
            drop(socket.shutdown(Shutdown::Both));
        }
        self.changed.notify_all();
    }

    /// Waits until `look` finds something; a halted or stopped mirror ends the wait.
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
