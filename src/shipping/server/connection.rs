//! One connection: its wire, its session, and what is to be written. It never blocks but for what its source
//! waits for, and belongs to whoever holds it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::feeds::{Choice, Feed};
use super::{Peer, PeerState, Shared};
use crate::format::leases::Lease;
use crate::journal::AckKeeper;
use crate::position::{NodeId, Position};
use crate::shipping::observe::EndReason;
use crate::shipping::session::{Next, Now, Offer, OriginSession, OriginStatus, Output, Source};
use crate::shipping::transport::Received;
use crate::shipping::wire::Wire;

/// How long a peer may take to hear why its connection is closed.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// So many frames are sent, or so many reads done, before it is somebody else's turn.
pub(super) const TURN: usize = 16;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) token: usize,
    pub(super) wire: Wire,
    pub(super) peer: Arc<Peer>,
    /// The journal that it is sent, once it has said which it wants.
    pub(super) feed: Option<Arc<Feed>>,
    session: OriginSession,
    acks: Option<AckKeeper>,
    output: Output,
    write_stall: Duration,
    sent_bytes: u64,
    /// Its lease was given to the keeper: from then on it may be sent something of the journal.
    pub(super) is_leased: bool,
    /// Since when the socket takes nothing.
    blocked_since: Option<Instant>,
    /// Everything is said; the peer may still read it.
    said_all: bool,
    /// After the end of the session, until when it is waited for the peer.
    linger_until: Option<Instant>,
    /// The peer says no more.
    heard_all: bool,
    broken: bool,
}

/// What a connection needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Bytes, room to write, or the time; with `for_more`, also a durable end that has moved.
    Wait { until: Instant, for_more: bool },
    /// Its next turn.
    Again,
    /// A source that may wait for the disk.
    OnDisk,
    /// Its lease is to be noted, before anything else is done.
    Lease,
    /// To be closed.
    Gone,
}

impl Connection {
    pub(super) fn new(
        token: usize,
        wire: Wire,
        session: OriginSession,
        peer: Arc<Peer>,
        write_stall: Duration,
    ) -> Self {
        Self {
            token,
            wire,
            peer,
            feed: None,
            session,
            acks: None,
            output: Output::default(),
            write_stall,
            sent_bytes: 0,
            is_leased: false,
            blocked_since: None,
            said_all: false,
            linger_until: None,
            heard_all: false,
            broken: false,
        }
    }

    pub(super) const fn has_subscribed(&self) -> bool {
        self.session.status().streaming
    }

    /// It is to be told how far the journal is durable by now.
    pub(super) const fn is_asked(&self) -> bool {
        self.session.is_asked()
    }

    pub(super) fn lease(&self) -> Option<Lease> {
        self.session.lease()
    }

    /// A worker is done with it.
    pub(super) fn came_back(&mut self, now: Now) {
        self.session.came_back(now);
    }

    /// In the middle of its turn: it is told that something is wrong here, and is to come again.
    pub(super) fn has_panicked(&mut self) {
        self.session.has_panicked();
    }

    pub(super) fn shut_down(&mut self) {
        self.session.shut_down();
    }

    /// Feeds the session with what has arrived; whether more may have. What arrives after the end only makes
    /// room for the peer to read the last word.
    pub(super) fn hear(&mut self, buffer: &mut [u8], now: Now) -> bool {
        for _ in 0..TURN {
            let received = self.wire.read(buffer);
            if let Some(certificates) = self.wire.newly_encrypted() {
                self.session.on_encrypted(certificates);
            }
            match received {
                Received::Bytes(0) => {} // TLS, which is no sign of life of the session
                Received::Bytes(len) => {
                    self.session.on_bytes(buffer.get(..len).unwrap_or_default(), now);
                }
                Received::Nothing => return false,
                Received::Closed => {
                    self.heard_all = true;
                    self.session.on_closed();
                    return false;
                }
            }
        }
        true
    }

    /// Finds the journal that it has asked for, if it has.
    pub(super) fn choose(&mut self, shared: &Arc<Shared>) {
        let Some(wanted) = self.session.wants().filter(|_| self.feed.is_none()) else { return };
        match shared.feeds.choose(wanted, |journal| self.session.may_have(journal), shared) {
            Choice::Feed(feed) => {
                let (role, path) = (feed.journal.role(), feed.path.clone());
                self.session.offer(Offer { role, path });
                self.acks = Some(feed.journal.ack_keeper());
                self.feed = Some(feed);
            }
            Choice::NotYet { has_none } => {
                self.session.not_yet(has_none.then_some(Position::START));
            }
            Choice::Denied => self.session.deny(),
        }
    }

    /// Sends what there is to send, so many frames at most.
    pub(super) fn advance(&mut self, source: &mut impl Source, now: Now, frames: usize) -> Step {
        if self.feed.as_ref().is_some_and(|feed| feed.is_over()) {
            self.session.shut_down();
        }
        // The first step says what there is to write, the last that it is written.
        for _ in 0..=frames {
            if !self.is_leased && self.session.lease().is_some() {
                return Step::Lease;
            }
            match self.write_out(now.at) {
                Ok(true) => {}
                Ok(false) => return self.blocked(now, source.may_wait()),
                Err(_) => {
                    self.broken = true;
                    self.session.on_closed();
                }
            }
            if self.broken {
                return Step::Gone;
            }
            if self.said_all {
                return self.linger(now.at);
            }
            match self.session.step(source, now, &mut self.output) {
                Next::Write => {}
                Next::OnDisk => return Step::OnDisk,
                Next::Wait { past, until } => {
                    return Step::Wait { until, for_more: past.is_some() };
                }
                Next::Close => {
                    self.wire.finish();
                    self.said_all = true;
                }
            }
        }
        Step::Again
    }

    /// Whether everything is written.
    fn write_out(&mut self, now: Instant) -> io::Result<bool> {
        while !self.output.is_empty() {
            let written = self.wire.write(self.output.next())?;
            if written == 0 {
                break;
            }
            self.output.advance(written);
            self.sent_bytes += written as u64;
            self.blocked_since = None;
        }
        let is_done = self.wire.flush()? && self.output.is_empty();
        match is_done {
            true => self.blocked_since = None,
            false => drop(self.blocked_since.get_or_insert(now)),
        }
        Ok(is_done)
    }

    fn blocked(&mut self, now: Now, may_wait: bool) -> Step {
        let stalled_at = self.blocked_since.unwrap_or(now.at) + self.write_stall;
        let until = self.session.on_time(now, may_wait);
        if now.at >= stalled_at {
            return Step::Gone;
        }
        if self.session.end().is_some() {
            return self.linger(now.at);
        }
        match until {
            Some(until) => Step::Wait { until: until.min(stalled_at), for_more: false },
            None => Step::OnDisk,
        }
    }

    fn linger(&mut self, now: Instant) -> Step {
        let until = *self.linger_until.get_or_insert(now + LINGER);
        let is_over = now >= until || (self.said_all && self.heard_all);
        if is_over { Step::Gone } else { Step::Wait { until, for_more: false } }
    }

    /// Why it is closed.
    pub(super) fn end_reason(&self) -> EndReason {
        match self.session.end_reason() {
            _ if self.wire.is_broken() => EndReason::Tls,
            Some(reason) => reason,
            // It took nothing any more.
            None => EndReason::Timeout,
        }
    }

    pub(super) fn node(&self) -> Option<NodeId> {
        self.session.status().node
    }

    /// Lets others see how it is, and how far it is from the durable end.
    pub(super) fn show(&mut self, step: Step, end_offset: u64, now: Instant) {
        let status = self.session.status();
        if let Some(acks) = &mut self.acks {
            // Nobody who doesn't have everything stands for it.
            acks.note(status.node.filter(|_| status.feed.is_none()), status.acked);
        }
        let mut seen = self.peer.seen.lock();
        seen.state = match step {
            _ if self.session.end().is_some() => PeerState::Closing,
            _ if !status.streaming => PeerState::Handshake,
            Step::Wait { for_more: true, .. } => PeerState::Live,
            Step::OnDisk | Step::Lease => PeerState::CatchingUp,
            _ if seen.state == PeerState::Live => PeerState::Live,
            _ => PeerState::CatchingUp,
        };
        let place =
            |status: &OriginStatus| [status.sent, status.acked].map(|it| it.map(|it| it.offset));
        let lacks = status.acked.is_some_and(|acked| acked.offset < end_offset);
        if !lacks || place(status) != place(&seen.status) {
            seen.moved_at = now;
        }
        seen.heard_at = self.session.heard_at();
        seen.sent_bytes = self.sent_bytes;
        seen.lease = self.session.lease();
        seen.feed.clone_from(&self.feed);
        seen.status.clone_from(status);
    }
}
