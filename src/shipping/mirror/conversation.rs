//! One session: a thread that listens, and the one that writes what has come into the mirror.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};
use parking_lot::Mutex;

use super::connect::{open_error, setup_error};
use super::rounds::{Attempt, HEALTHY_AFTER, is_poisoned};
use super::{MirrorState, Shared};
use crate::env;
use crate::error::IngestError;
use crate::format::batch;
use crate::format::files::Mark;
use crate::journal::{Comparison, Ingest, Journal};
use crate::position::{Checkpoint, NodeId, Position};
use crate::shipping::error::{Divergent, ShippingError};
use crate::shipping::link::{Arrived, Link};
use crate::shipping::message::{
    Authentication, Common, ErrorCode, FRAME_BYTES_MAX, Failure, Speaker,
};
use crate::shipping::session::{
    Delivery, Held, MirrorConfig, MirrorSession, Resume, SessionEnd, Told, batches,
};
use crate::shipping::transport;

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
