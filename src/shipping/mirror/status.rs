//! How a mirror is doing, for whoever looks.

use std::time::{Duration, Instant};

use super::{Shared, State};
use crate::journal::{Journal, Orphans};
use crate::position::{Checkpoint, NodeId, Position};
use crate::shipping::error::ShippingError;
use crate::shipping::message::OriginEnd;
use crate::shipping::observe::Ends;
use crate::shipping::upstreams::UpstreamStatus;

/// What a mirror is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MirrorState {
    /// It copies the backup that it is to begin with ([`FollowOptions::begin_with`](super::FollowOptions::begin_with)).
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
    /// It has reached a durable end that the origin told in this session, and gets what comes as it comes.
    Live,
    /// It doesn't follow any more until [`Mirror::resume`](super::Mirror::resume), or until it is followed anew.
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
    /// Up to where the views of this mirror that are open are all applied, or as was
    /// [reported](super::Mirror::report_applied) last; `None` if there are none.
    pub applied: Option<Position>,
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
    /// Tails that the origin had lost, and that were set aside.
    pub orphans: Vec<Orphans>,
    /// Whether what is known of the origin's end is fresh.
    lag_is_known: bool,
    /// What time it is at the origin, at the most.
    origin_now_us: Option<i64>,
    /// How long ago, at the most, the origin had an end that the mirror has reached.
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
    /// that isn't known. Off by a round trip at the most. May block for the disk.
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

impl Shared {
    pub(super) fn status(&self, state: &State) -> MirrorStatus {
        let heard = state.origin.map(|(_, told)| told.elapsed());
        let connected = matches!(state.phase, MirrorState::CatchingUp | MirrorState::Live);
        let fresh = |age: Duration| age <= 3 * self.options.deadlines.heartbeat;
        let now_there = |(us, at): (i64, Instant)| {
            us.saturating_add(i64::try_from(at.elapsed().as_micros()).unwrap_or(i64::MAX))
        };
        let since = state.session_since;
        let knows_journal = self.knows_journal(state);
        MirrorStatus {
            address: state.upstreams.address(&self.addresses),
            upstreams: state.upstreams.status(&self.addresses, connected, knows_journal),
            state: state.phase(),
            path: state.told.path.to_vec(),
            connected_for: since.map(|since| since.elapsed()),
            received_offset: since.map(|_| state.told.received),
            mirrored: state.mirrored(),
            applied: state.applied(),
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
}
