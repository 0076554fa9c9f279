//! One session: two threads, alike, of which one listens, and the other one writes what has come into the mirror.
//!
//! ```text
//!   more is to come: socket ─▶ one: session ─▶ deliveries ─▶ the other: Ingest: verify, write ─▶ sync ─▶ ACK
//!   that was all:    socket ─▶ one: session ─▶ Ingest: verify, write ─▶ sync ─▶ ACK            no hop between threads
//!                              ╰─ the listener's place is free meanwhile: if that takes long, the other one listens
//! ```
//! - One listens at a time, and one writes at a time; neither waits for the other. Nobody who may have to wait for the
//!   disk listens, so a sync that hangs stops no heartbeat.
//! - What was handed over is written before what came behind it: whoever has listened writes himself only if nothing is
//!   under way.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, at, bounded, never, select, unbounded};
use parking_lot::{Mutex, MutexGuard};

use super::connect::{open_error, setup_error};
use super::rounds::is_poisoned;
use super::{MirrorState, Shared};
use crate::env;
use crate::error::IngestError;
use crate::format::batch;
use crate::format::files::Mark;
use crate::journal::{Comparison, Ingest, Journal};
use crate::position::{Checkpoint, NodeId, Position};
use crate::shipping::error::{Divergent, ShippingError};
use crate::shipping::link::{Arrived, CutOff, Link};
use crate::shipping::message::{
    Authentication, Common, ErrorCode, FRAME_BYTES_MAX, Failure, Speaker,
};
use crate::shipping::session::{
    Delivery, Held, MirrorConfig, MirrorSession, Now, Resume, SessionEnd, Told, batches,
};
use crate::shipping::transport::{self, TICK};
use crate::shipping::upstreams::{Apart, Attempt};

/// A mirror that lags by less syncs whenever nothing more has arrived.
const LIVE_LAG_BYTES: u64 = 1 << 20;
/// While catching up, a pause in the stream longer than this ends a group.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(20);

impl Shared {
    pub(super) fn publish_journal(&self, ingest: Option<&Ingest>) {
        if let Some(ingest) = ingest {
            let mut state = self.state.lock();
            state.journal = Some(ingest.journal().clone());
            self.changed.notify_all();
            drop(state);
            self.relay.publish(Some(ingest.journal()));
        }
    }

    /// One session, from its first byte to its end.
    pub(super) fn converse(
        &self,
        ingest: &mut Option<Ingest>,
        link: &Link,
        authentication: Authentication,
    ) -> Attempt {
        let resume = ingest.as_ref().map(|i| Resume { end: i.end(), witness: i.witness() });
        let beginning = |id| Resume { end: Mark::start(id).end, witness: None };
        let resume = resume.or_else(|| self.options.journal_id.map(beginning));
        let node = ingest.as_ref().map_or(self.new_node, |ingest| ingest.journal().node());
        let config = self.config(node, resume, authentication);
        let session = Mutex::new(MirrorSession::new(config, transport::now()));
        let (asks, asked) = bounded(1);
        self.state.lock().asks = Some(asks.clone());
        let connection = Connection { shared: self, session, link, asked };
        let desk = Desk::new(&connection, ingest);
        let written = thread::scope(|scope| {
            let desk = &desk;
            let other = thread::Builder::new().name("headwater-listen".into());
            let other = other.spawn_scoped(scope, || desk.work()).map_err(setup_error)?;
            let written = desk.work();
            match other.join() {
                Ok(by_other) => written.and(by_other),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        drop(desk);
        let end = connection.session.into_inner().end().cloned();
        let mut state = self.state.lock();
        (state.socket, state.asks) = (None, None);
        let granted = state.session_since.take();
        let was_live = matches!(state.phase, MirrorState::Live);
        let had = resume.map_or(Position::START, |resume| resume.end.position);
        let progressed = state.mirrored().is_some_and(|mirrored| mirrored.position > had);
        drop(state);
        let (mirror, witness) = (resume.map(|r| r.end), resume.and_then(|r| r.witness));
        let is_cut_off =
            written.is_ok() && matches!(&end, Some(SessionEnd::Diverged(at)) if at.is_cut_off);
        let error = match (written, end) {
            (Err(error), _) => error,
            (Ok(()), Some(SessionEnd::Disconnected) | None) => {
                link.failure().map_or(ShippingError::Disconnected, ShippingError::Tls)
            }
            (Ok(()), Some(end)) => ShippingError::from_end(end, mirror, witness),
        };
        // Who is to set something aside asks again from where on: a mirror that halts anyway need not know.
        let heals = is_cut_off && self.quarantines();
        Attempt { heals, ..Attempt::of_session(error, granted, was_live || progressed) }
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
}

/// A connection, shared by the two threads.
struct Connection<'a> {
    shared: &'a Shared,
    session: Mutex<MirrorSession>,
    link: &'a Link,
    /// Rings when somebody waits for what the origin tells from now on.
    asked: Receiver<()>,
}

impl Connection<'_> {
    /// Writes what the session has to say; false if nobody takes it any more.
    fn flush(&self) -> bool {
        let written = self.link.write(|out| {
            let applied = self.shared.state.lock().applied();
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
        self.shared.mirror_moved(end);
        let mut session = self.session.lock();
        session.on_durable(end);
        if self.asked.try_recv().is_ok() {
            session.ask(transport::now());
        }
        drop(session);
        self.flush();
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

/// Where the two threads of a session find what is to be done.
struct Desk<'a> {
    connection: &'a Connection<'a>,
    /// Held by whoever listens.
    listener: Mutex<Listener>,
    /// Held by whoever writes.
    writer: Mutex<MirrorWriter<'a>>,
    deliveries: Receiver<Delivery>,
    /// Deliveries that are not in the mirror yet, or not durable. Only whoever listens adds to them.
    under_way: AtomicUsize,
}

/// What whoever listens goes by.
struct Listener {
    /// `None`: the session is over, or can't go on.
    sender: Option<Sender<Delivery>>,
    raw: Vec<u8>,
    plain: Vec<u8>,
    told: Told,
    apart: Apart,
}

/// What became of a place.
#[derive(PartialEq, Eq)]
enum Left {
    /// It is free, or there is another one to be taken.
    Free,
    /// The session is over.
    Over,
}

impl<'a> Desk<'a> {
    fn new(connection: &'a Connection<'a>, ingest: &'a mut Option<Ingest>) -> Self {
        let (sender, deliveries) = unbounded();
        let listener = Listener {
            sender: Some(sender),
            raw: vec![0; 128 << 10],
            plain: Vec::new(),
            told: Told::default(),
            apart: Apart::default(),
        };
        Self {
            connection,
            listener: Mutex::new(listener),
            writer: Mutex::new(MirrorWriter::new(connection, ingest)),
            deliveries,
            under_way: AtomicUsize::new(0),
        }
    }

    /// Takes the place that is free, until the session is over.
    fn work(&self) -> Result<(), ShippingError> {
        let _cut_off = CutOff(self.connection.link);
        loop {
            let listener = self.listener.try_lock().filter(|it| it.sender.is_some());
            let left = match listener {
                Some(listener) => self.listen(listener),
                None => self.write(),
            };
            match left {
                Ok(Left::Free) => {}
                Ok(Left::Over) => return Ok(()),
                Err(error) => {
                    self.connection.give_up(&error);
                    // Whoever listens learns it from the connection.
                    if let Some(mut listener) = self.listener.try_lock() {
                        listener.sender = None;
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Feeds the session with what arrives, and passes on what it delivers, until it ends; or until something came behind
    /// which nothing is to come yet, and writes that itself.
    fn listen(&self, mut listener: MutexGuard<'_, Listener>) -> Result<Left, ShippingError> {
        let mut deliveries = Vec::new();
        while self.connection.flush() {
            let (ended, is_all) = listener.hear(self.connection, &mut deliveries);
            let is_first = self.under_way.fetch_add(deliveries.len(), Ordering::Relaxed) == 0;
            if is_all && is_first && !ended && !deliveries.is_empty() {
                drop(listener);
                return self.write_here(deliveries);
            }
            let sender = listener.sender.iter();
            sender.for_each(|it| deliveries.drain(..).for_each(|delivery| drop(it.send(delivery))));
            if ended {
                break;
            }
        }
        self.connection.flush();
        listener.sender = None;
        Ok(Left::Over)
    }

    /// Nobody else writes: nothing was under way, and whoever listens by now hands on what comes.
    fn write_here(&self, deliveries: Vec<Delivery>) -> Result<Left, ShippingError> {
        let count = deliveries.len();
        let mut writer = self.writer.lock();
        writer.take_all(deliveries)?;
        drop(writer);
        self.under_way.fetch_sub(count, Ordering::Relaxed);
        Ok(Left::Free)
    }

    /// Takes all deliveries, until the session is over; or until nothing comes, nor does anybody listen. What has been
    /// written is synced also then, and also when a later delivery is refused.
    fn write(&self) -> Result<Left, ShippingError> {
        let mut asks_at = None;
        loop {
            select! {
                recv(self.deliveries) -> first => {
                    let Ok(first) = first else { return Ok(Left::Over) };
                    let mut writer = self.writer.lock();
                    let written = writer.write_all(first, &self.deliveries)?;
                    drop(writer);
                    self.under_way.fetch_sub(written, Ordering::Relaxed);
                    continue;
                }
                recv(self.connection.asked) -> _ => asks_at = self.connection.tell(MirrorSession::ask),
                recv(asks_at.map_or_else(never, at)) -> _ => asks_at = self.connection.tell(MirrorSession::on_time),
                default(TICK) => {}
            }
            if !self.listener.is_locked() {
                return Ok(Left::Free);
            }
        }
    }
}

impl Listener {
    /// What arrives within a [`TICK`] goes to the session. Whether that has ended; and whether all is delivered that the
    /// origin is known to have.
    fn hear(
        &mut self,
        connection: &Connection<'_>,
        deliveries: &mut Vec<Delivery>,
    ) -> (bool, bool) {
        let arrived = connection.link.receive(&mut self.raw, &mut self.plain);
        let now = transport::now();
        let mut session = connection.session.lock();
        match arrived {
            Arrived::Bytes(bytes) => session.on_bytes(bytes, now, deliveries),
            Arrived::Nothing => {}
            Arrived::Closed => session.on_closed(),
        }
        session.on_time(now);
        let (addresses, options) = (&connection.shared.addresses, &connection.shared.options);
        let (speaker, silence) = (session.told().speaker, options.deadlines.silence);
        if self.apart.is_to_be_left(speaker, addresses, silence, now.at) {
            session.leave();
        }
        let (ended, told) = (session.end().is_some(), session.told());
        drop(session);
        let is_all = told.end.is_some_and(|(end, _)| end.offset <= told.received);
        // The end goes first: a mirror isn't live because it has reached that of an earlier session.
        if self.told != told {
            self.told = told;
            connection.shared.origin_told(self.told.clone());
        }
        (ended, is_all)
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

impl<'a> MirrorWriter<'a> {
    fn new(connection: &'a Connection<'a>, ingest: &'a mut Option<Ingest>) -> Self {
        Self { connection, ingest, origin: None, unsynced_bytes: 0 }
    }

    /// Takes these, and syncs.
    fn take_all(&mut self, deliveries: Vec<Delivery>) -> Result<(), ShippingError> {
        let taken = deliveries.into_iter().try_for_each(|delivery| self.take(delivery));
        self.synced_behind(taken)?;
        self.sync()
    }

    /// Takes what was handed over, until all of it is durable; how many deliveries that were.
    fn write_all(
        &mut self,
        first: Delivery,
        deliveries: &Receiver<Delivery>,
    ) -> Result<usize, ShippingError> {
        let (mut next, mut count) = (Some(first), 0);
        while let Some(delivery) = next {
            count += 1;
            let taken = self.take(delivery);
            self.synced_behind(taken)?;
            if self.unsynced_bytes >= self.group_bytes() {
                self.sync()?;
            }
            next = self.next(deliveries);
        }
        self.sync()?;
        Ok(count)
    }

    /// What was written in front of something that is refused is synced.
    fn synced_behind(&mut self, taken: Result<(), ShippingError>) -> Result<(), ShippingError> {
        if let Err(error) = taken {
            if !is_poisoned(&error) {
                self.sync()?;
            }
            return Err(error);
        }
        Ok(())
    }

    fn group_bytes(&self) -> u64 {
        u64::from(self.connection.shared.options.window_bytes) / 2
    }

    /// When live, everything is synced as soon as nothing more has arrived; while catching up, in groups
    /// of half a window.
    fn next(&self, deliveries: &Receiver<Delivery>) -> Option<Delivery> {
        match deliveries.try_recv() {
            Ok(delivery) => Some(delivery),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) if self.unsynced_bytes == 0 => None,
            Err(TryRecvError::Empty) if self.lag_bytes() <= LIVE_LAG_BYTES => None,
            Err(TryRecvError::Empty) => deliveries.recv_timeout(CATCH_UP_PAUSE).ok(),
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
        state.begins(Instant::now());
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
pub(in crate::shipping) fn compare_ends(
    journal: &Journal,
    ends: &[Option<batch::Link>],
) -> Vec<Held> {
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
