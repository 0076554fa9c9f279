//! The loop. Each turn: sleep until something happens or a deadline passes, then look at everything that may have
//! changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::catch_up::CatchUp;
use super::connection::{Connection, LINGER, Step, TURN};
use super::fans::Fan;
use super::feeds::{Feed, Nothing};
use super::leases::{LeaseKeeper, Note};
use super::{Ended, FIRST_CONNECTION, LISTENER, Peer, Shared};
use crate::shipping::error::ServeError;
use crate::shipping::message::{ErrorCode, Failure, Message};
use crate::shipping::observe::EndReason;
use crate::shipping::security::Security;
use crate::shipping::session::{Now, OriginSession};
use crate::shipping::transport::{self, TICK};
use crate::shipping::wire::Wire;

/// The leases of all subscribers are noted as often.
const LEASES_EVERY: Duration = Duration::from_secs(10);
/// So many connections are accepted before it is somebody else's turn.
const ACCEPTED_AT_ONCE: usize = 64;
/// With TLS each of them may cost a signature, here and at once.
const ACCEPTED_AT_ONCE_TLS: usize = 4;
const READ_BYTES: usize = 4096;

pub(super) struct EventLoop {
    shared: Arc<Shared>,
    poll: Poll,
    /// By the numbers of their feeds: the journals that somebody has subscribed to.
    fans: BTreeMap<usize, Fan>,
    buffer: Vec<u8>,

    /// `None`: nobody is admitted any more.
    listener: Option<TcpListener>,
    /// When to look for new connections: at once after an event, later after a failure.
    accept_at: Option<Instant>,
    next_token: usize,
    slots: HashMap<usize, Slot>,
    handshakes: usize,
    per_address: HashMap<IpAddr, usize>,

    timers: Timers,
    /// Whose turn was over before they were through.
    again: Turns,
    leases_at: Instant,
    /// While shutting down: until when peers may take.
    stop_at: Option<Instant>,

    workers: Workers,
}

/// Deadlines in order: at most one for each connection, which knows its own.
#[derive(Default)]
struct Timers(BTreeSet<(Instant, usize)>);

impl Timers {
    fn first(&self) -> Option<Instant> {
        self.0.first().map(|(at, _)| *at)
    }

    /// The next one that has passed.
    fn pop(&mut self, now: Instant) -> Option<usize> {
        let (at, token) = *self.0.first()?;
        (at <= now && self.0.remove(&(at, token))).then_some(token)
    }

    /// One that is set for earlier stays: it looks, and sets the next.
    fn set(&mut self, timer: &mut Option<Instant>, until: Instant, token: usize) {
        if timer.is_none_or(|at| until < at) {
            self.clear(timer, token);
            *timer = Some(until);
            self.0.insert((until, token));
        }
    }

    fn clear(&mut self, timer: &mut Option<Instant>, token: usize) {
        if let Some(at) = timer.take() {
            self.0.remove(&(at, token));
        }
    }
}

/// Who goes on in the next turn of the loop, each once.
#[derive(Default)]
struct Turns(Vec<usize>);

impl Turns {
    fn give(&mut self, has_one: &mut bool, token: usize) {
        if !std::mem::replace(has_one, true) {
            self.0.push(token);
        }
    }
}

/// A connection, here or with a worker.
struct Slot {
    connection: Option<Box<Connection>>,
    peer: Arc<Peer>,
    feed: Option<Arc<Feed>>,
    timer: Option<Instant>,
    is_at_the_end: bool,
    /// It is in `again`.
    has_a_turn: bool,
    /// It has not come to a subscription, and counts as such until it is closed.
    is_stranger: bool,
    is_leased: bool,
}

struct Workers {
    catch_up: Arc<CatchUp>,
    turns: Sender<Box<Connection>>,
    notes: Sender<Note>,
    back: Receiver<Box<Connection>>,
    catching_up: Vec<JoinHandle<()>>,
    keeping: JoinHandle<()>,
}

impl Workers {
    fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let (turns, turns_taken) = unbounded();
        let (notes, notes_taken) = unbounded();
        let (come, back) = unbounded();
        let (for_keeper, server) = (come.clone(), Arc::clone(shared));
        let keeping = thread::Builder::new()
            .name("headwater-leases".into())
            .spawn(move || LeaseKeeper::default().run(&server, &notes_taken, &for_keeper))?;
        let catch_up = Arc::new(CatchUp::new(shared, turns_taken, come));
        let start = |_| {
            let catch_up = Arc::clone(&catch_up);
            let name = "headwater-catchup".into();
            thread::Builder::new().name(name).spawn(move || catch_up.run())
        };
        let threads = shared.options.catch_up_threads.max(1);
        let catching_up = (0..threads).map(start).collect::<io::Result<_>>()?;
        Ok(Self { catch_up, turns, notes, back, catching_up, keeping })
    }
}

impl EventLoop {
    pub(super) fn new(
        shared: &Arc<Shared>,
        poll: Poll,
        listener: TcpListener,
    ) -> Result<Self, ServeError> {
        let listen = |error| ServeError::Listen(Arc::new(error));
        listener.set_nonblocking(true).map_err(listen)?;
        poll.registry()
            .register(&mut SourceFd(&listener.as_raw_fd()), LISTENER, Interest::READABLE)
            .map_err(listen)?;
        let workers =
            Workers::start(shared).map_err(|error| ServeError::Thread(Arc::new(error)))?;
        let now = Instant::now();
        Ok(Self {
            shared: Arc::clone(shared),
            poll,
            fans: BTreeMap::new(),
            buffer: vec![0; READ_BYTES],
            listener: Some(listener),
            accept_at: None,
            next_token: FIRST_CONNECTION,
            slots: HashMap::new(),
            handshakes: 0,
            per_address: HashMap::new(),
            timers: Timers::default(),
            again: Turns::default(),
            leases_at: now + LEASES_EVERY,
            stop_at: None,
            workers,
        })
    }

    pub(super) fn start(self) -> io::Result<JoinHandle<()>> {
        let ended = Ended(Arc::clone(&self.shared));
        thread::Builder::new().name("headwater-serve".into()).spawn(move || {
            let _ended = ended;
            self.run();
        })
    }

    fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        while !self.is_done() {
            self.fans.values_mut().for_each(Fan::hang_bell);
            match self.poll.poll(&mut events, self.sleep()) {
                Err(error) if error.kind() != ErrorKind::Interrupted => thread::sleep(TICK),
                _ => {}
            }
            self.shared.is_looking();
            let now = transport::now();
            self.stop(now);
            self.end_feeds();
            self.take_back(now);
            for event in &events {
                match event.token() {
                    LISTENER => self.accept_at = Some(now.at),
                    Token(token) => self.touch(token, true, now),
                }
            }
            for token in std::mem::take(&mut self.again.0) {
                self.slots.get_mut(&token).into_iter().for_each(|slot| slot.has_a_turn = false);
                self.touch(token, true, now);
            }
            self.time_out(now);
            self.flush(now);
            self.accept(now);
            self.note_leases(now);
        }
        self.wind_up();
    }

    /// Until when nothing need be done, unless something happens.
    fn sleep(&self) -> Option<Duration> {
        if !self.again.0.is_empty() {
            return Some(Duration::ZERO);
        }
        let times = [
            self.timers.first(),
            self.accept_at,
            self.fans.values().filter_map(Fan::flush_at).min(),
            self.stop_at,
            Some(self.leases_at),
        ];
        let next = times.into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Nobody is let in any more, and everybody is told to go; for a second.
    fn stop(&mut self, now: Now) {
        if self.stop_at.is_some() || !self.shared.is_stopping() {
            return;
        }
        self.stop_at = Some(now.at + LINGER);
        self.listener = None;
        self.accept_at = None;
        let everybody: Vec<_> = self.slots.keys().copied().collect();
        everybody.into_iter().for_each(|token| self.give_turn(token));
    }

    fn is_done(&self) -> bool {
        let is_late = || self.stop_at.is_some_and(|at| Instant::now() >= at);
        self.stop_at.is_some() && (self.slots.is_empty() || is_late())
    }

    /// What workers are done with. They may have told peers of an end that isn't known here yet, and whatever
    /// happened at the socket was nobody's business.
    fn take_back(&mut self, now: Now) {
        // No more than are there now: others want their turn, and whoever comes later wakes the loop.
        let (back, count) = (&self.workers.back, self.workers.back.len());
        let returned: Vec<_> = back.try_iter().take(count).collect();
        for mut connection in returned {
            connection.came_back(now);
            let token = connection.token;
            let fan = connection.feed.as_ref().and_then(|feed| self.fans.get_mut(&feed.number));
            fan.into_iter().for_each(|fan| fan.live.renew());
            if let Some(slot) = self.slots.get_mut(&token) {
                slot.connection = Some(connection);
                self.touch(token, true, now);
            }
        }
    }

    /// Lets a connection get on as far as it can. One that a worker has is looked at when it comes back.
    fn touch(&mut self, token: usize, may_have_said: bool, now: Now) {
        let connection = self.slots.get_mut(&token).and_then(|slot| slot.connection.take());
        let Some(mut connection) = connection else { return };
        let more = may_have_said && connection.hear(&mut self.buffer, now);
        // The clock that answers a number isn't read before that has come.
        let now = if connection.is_asked() { transport::now() } else { now };
        if self.stop_at.is_some() {
            connection.shut_down();
        }
        connection.choose(&self.shared);
        let step = match connection.feed.clone() {
            Some(feed) => {
                let live = &mut self.fan(&feed, now.at).live;
                if connection.is_asked() {
                    live.renew();
                }
                connection.advance(live, now, TURN)
            }
            None => connection.advance(&mut Nothing, now, TURN),
        };
        self.settle(connection, step, now);
        if more && matches!(step, Step::Wait { .. }) {
            self.give_turn(token);
        }
    }

    fn fan(&mut self, feed: &Arc<Feed>, now: Instant) -> &mut Fan {
        self.fans.entry(feed.number).or_insert_with(|| Fan::new(feed, now))
    }

    /// Those whose journal comes in another way now, or is another handle, are looked at: they are to connect again.
    fn end_feeds(&mut self) {
        if !self.shared.changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let is_over = |slot: &Slot| slot.feed.as_ref().is_some_and(|feed| feed.is_over());
        let over = self.slots.iter().filter(|(_, slot)| is_over(slot)).map(|(token, _)| *token);
        over.collect::<Vec<_>>().into_iter().for_each(|token| self.give_turn(token));
    }

    /// It goes on in the next turn of the loop.
    fn give_turn(&mut self, token: usize) {
        let Some(slot) = self.slots.get_mut(&token) else { return };
        self.again.give(&mut slot.has_a_turn, token);
    }

    fn settle(&mut self, mut connection: Box<Connection>, step: Step, now: Now) {
        let token = connection.token;
        let fan = connection.feed.as_ref().and_then(|feed| self.fans.get(&feed.number));
        connection.show(step, fan.map_or(0, Fan::end_offset), now.at);
        let Some(slot) = self.slots.get_mut(&token) else { return };
        slot.feed.clone_from(&connection.feed);
        if slot.is_stranger && connection.has_subscribed() {
            slot.is_stranger = false;
            self.handshakes -= 1;
            self.shared.guests.lock().came(connection.node());
        }
        match step {
            Step::Wait { until, for_more } => {
                slot.connection = Some(connection);
                let fan = slot.feed.as_ref().and_then(|feed| self.fans.get_mut(&feed.number));
                if let Some(fan) = fan.filter(|_| for_more && !slot.is_at_the_end) {
                    slot.is_at_the_end = true;
                    fan.at_the_end.push(token);
                }
                self.timers.set(&mut slot.timer, until, token);
            }
            Step::Again => {
                slot.connection = Some(connection);
                self.give_turn(token);
            }
            Step::OnDisk => drop(self.workers.turns.send(connection)),
            Step::Lease => {
                connection.is_leased = true;
                slot.is_leased = true;
                drop(self.workers.notes.send(Note::Begins(connection)));
            }
            Step::Gone => self.close(&connection),
        }
    }

    fn close(&mut self, connection: &Connection) {
        let token = connection.token;
        let Some(mut slot) = self.slots.remove(&token) else { return };
        // Where the socket has a copy somewhere, closing it wouldn't do.
        drop(self.poll.registry().deregister(&mut SourceFd(&connection.wire.socket())));
        self.timers.clear(&mut slot.timer, token);
        let mut guests = self.shared.guests.lock();
        match slot.is_stranger {
            true => guests.refused.count(connection.end_reason()),
            false => guests.went(connection.node(), connection.end_reason()),
        }
        drop(guests);
        if slot.is_stranger {
            self.handshakes -= 1;
        }
        let address = slot.peer.address.ip();
        if let Some(count) = self.per_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.per_address.remove(&address);
            }
        }
        self.shared.peers.lock().remove(&token);
        self.workers.catch_up.forget(token);
        if let Some(lease) = connection.lease().filter(|_| slot.is_leased) {
            drop(self.workers.notes.send(Note::Ends(token, lease)));
        }
    }

    /// Some are to be told how far it is durable by now.
    fn time_out(&mut self, now: Now) {
        if self.timers.first().is_some_and(|at| at <= now.at) {
            self.fans.values_mut().for_each(|fan| fan.live.renew());
        }
        while let Some(token) = self.timers.pop(now.at) {
            if let Some(slot) = self.slots.get_mut(&token) {
                slot.timer = None;
                self.touch(token, false, now);
            }
        }
    }

    /// Sends to everybody who has been sent everything, if there is more.
    fn flush(&mut self, now: Now) {
        let options = &self.shared.options;
        let interval = |subscribers| options.flush_interval(subscribers);
        let due = self.fans.values_mut().flat_map(|fan| fan.flush(interval, now.at));
        let due: Vec<_> = due.collect();
        if due.is_empty() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let _first = shared.live_first.lock();
        for token in due {
            if let Some(slot) = self.slots.get_mut(&token) {
                slot.is_at_the_end = false;
                self.touch(token, false, now);
            }
        }
    }

    fn accept(&mut self, now: Now) {
        if self.accept_at.is_none_or(|at| at > now.at) {
            return;
        }
        let is_encrypted =
            self.shared.options.security.as_ref().is_some_and(Security::is_encrypted);
        let at_once = if is_encrypted { ACCEPTED_AT_ONCE_TLS } else { ACCEPTED_AT_ONCE };
        for _ in 0..at_once {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, address)) => self.admit(stream, address, now),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.accept_at = None;
                    return;
                }
                // It was gone before it was here.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    ) => {}
                // Out of descriptors, most likely: somebody goes first.
                Err(_) => {
                    self.accept_at = Some(now.at + TICK);
                    return;
                }
            }
        }
    }

    /// Takes a connection in, or turns it away.
    fn admit(&mut self, stream: TcpStream, address: SocketAddr, now: Now) {
        let options = &self.shared.options;
        let tls = options.security.as_ref().and_then(Security::tls);
        let from_there = self.per_address.get(&address.ip()).copied().unwrap_or(0);
        if self.slots.len() >= options.connections_max
            || self.handshakes >= options.handshakes_max
            || options.connections_per_address_max.is_some_and(|max| from_there >= max)
        {
            self.shared.guests.lock().refused.count(EndReason::Limit);
            if tls.is_none() {
                turn_away(stream);
            }
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        let wire = match tls {
            Some(config) => Wire::tls(stream, config),
            None => Wire::plain(stream),
        };
        let Ok(wire) = wire else { return };
        let both = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut SourceFd(&wire.socket()), Token(token), both).is_err()
        {
            return;
        }
        let session = OriginSession::new(options.session(self.shared.feeds.node(), &address), now);
        let peer = Arc::new(Peer::new(address));
        let write_stall = options.write_stall;
        let connection = Connection::new(token, wire, session, Arc::clone(&peer), write_stall);
        self.shared.peers.lock().insert(token, Arc::clone(&peer));
        *self.per_address.entry(address.ip()).or_default() += 1;
        self.handshakes += 1;
        let slot = Slot {
            connection: Some(Box::new(connection)),
            peer,
            feed: None,
            timer: None,
            is_at_the_end: false,
            has_a_turn: false,
            is_stranger: true,
            is_leased: false,
        };
        self.slots.insert(token, slot);
        self.touch(token, true, now);
    }

    fn note_leases(&mut self, now: Now) {
        if now.at < self.leases_at {
            return;
        }
        self.leases_at = now.at + LEASES_EVERY;
        let of = |slot: &Slot| slot.feed.as_ref().map(|feed| feed.number);
        let used: BTreeSet<_> = self.slots.values().filter_map(of).collect();
        self.fans.retain(|number, fan| used.contains(number) || !fan.is_over());
        let leased = self.slots.iter().filter(|(_, slot)| slot.is_leased);
        let lease = |slot: &Slot| slot.peer.seen.lock().lease;
        let leases: Vec<_> =
            leased.filter_map(|(token, slot)| Some((*token, lease(slot)?))).collect();
        if !leases.is_empty() {
            drop(self.workers.notes.send(Note::GoesOn(leases)));
        }
    }

    /// Cuts off whoever is left, and waits for the workers.
    fn wind_up(mut self) {
        let left: Vec<_> =
            self.slots.values_mut().filter_map(|slot| slot.connection.take()).collect();
        left.iter().for_each(|connection| self.close(connection));
        drop(left);
        let Workers { turns, notes, catching_up, keeping, .. } = self.workers;
        drop(turns);
        catching_up.into_iter().for_each(|thread| drop(thread.join()));
        drop(notes);
        drop(keeping.join());
    }
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").field("connections", &self.slots.len()).finish_non_exhaustive()
    }
}

/// Tells a peer to come back later. Its socket's buffer is empty, so this doesn't block. What it has said so far is
/// read: it would turn the close into a reset, which might overtake the answer.
fn turn_away(mut stream: TcpStream) {
    let mut out = Vec::new();
    let retry_after_ms = 1000;
    let failure = Failure::new(ErrorCode::TOO_MANY, "too many connections");
    Message::Error(Failure { retry_after_ms, ..failure }).encode(&mut out);
    if stream.set_nonblocking(true).is_ok() {
        drop(stream.write_all(&out));
        drop(stream.shutdown(Shutdown::Write));
        drop(stream.read(&mut [0; READ_BYTES]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_deadlines_of_a_connection_the_earlier_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (mut timers, mut first, mut second) = (Timers::default(), None, None);
        timers.set(&mut first, at(30), 1);
        timers.set(&mut first, at(50), 1);
        assert_eq!((first, timers.first()), (Some(at(30)), Some(at(30))));
        timers.set(&mut second, at(40), 2);
        timers.set(&mut second, at(20), 2);
        assert_eq!((timers.pop(at(19)), timers.pop(at(20))), (None, Some(2)));
        timers.clear(&mut first, 1);
        assert_eq!((first, timers.first()), (None, None));
    }

    #[test]
    fn nobody_has_two_turns_in_one_round() {
        let (mut turns, mut first, mut second) = (Turns::default(), false, false);
        for _ in 0..3 {
            turns.give(&mut first, 1);
        }
        turns.give(&mut second, 2);
        assert_eq!(turns.0, [1, 2]);
        // Its turn has come: it may have another one.
        first = false;
        turns.give(&mut first, 1);
        assert_eq!(turns.0, [1, 2, 1]);
    }
}
