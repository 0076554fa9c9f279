//! Those who have been sent everything of a journal, and are sent what comes.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::feeds::Feed;
use super::live::Live;
use crate::journal::Bell;
use crate::position::Position;
use crate::shipping::session::Source as _;

pub(super) struct Fan {
    feed: Arc<Feed>,
    pub(super) live: Live,
    /// The connections that have been sent everything.
    pub(super) at_the_end: Vec<usize>,
    /// How far it was durable when they were sent to last, and when that was.
    flushed: (Position, Instant),
    flush_at: Option<Instant>,
    bell_is_hung: bool,
}

impl Fan {
    pub(super) fn new(feed: &Arc<Feed>, now: Instant) -> Self {
        let live = Live::of(feed);
        Self {
            feed: Arc::clone(feed),
            flushed: (live.end().position, now),
            live,
            at_the_end: Vec::new(),
            flush_at: None,
            bell_is_hung: false,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.feed.is_over()
    }

    /// How far it is known to be durable.
    pub(super) fn end_offset(&self) -> u64 {
        self.live.end().offset
    }

    /// When there is something to be sent, if it is known that there is.
    pub(super) const fn flush_at(&self) -> Option<Instant> {
        self.flush_at
    }

    /// The next commit wakes the loop if there is anybody to be sent it, and not before it is their time.
    pub(super) fn hang_bell(&mut self) {
        if self.bell_is_hung || self.flush_at.is_some() || self.at_the_end.is_empty() {
            return;
        }
        self.bell_is_hung = true;
        let bell: Weak<dyn Bell> = Arc::<Feed>::downgrade(&self.feed);
        self.feed.journal.ring_past(self.flushed.0, bell);
    }

    /// Those who are to be sent what has been committed, if it is their time: collected for so long if there are so
    /// many of them.
    pub(super) fn flush(
        &mut self,
        interval: impl Fn(usize) -> Duration,
        now: Instant,
    ) -> Vec<usize> {
        if self.feed.has_rung() {
            self.bell_is_hung = false;
            self.flush_at = Some(self.flushed.1 + interval(self.at_the_end.len()));
        }
        if self.flush_at.is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.flush_at = None;
        self.live.renew();
        self.flushed = (self.live.end().position, now);
        std::mem::take(&mut self.at_the_end)
    }
}
