//! Attempts, one after the other, with one upstream after the other, until nobody wants it any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use super::connect::{connect, open_error, setup_error};
use super::standing::Awaited;
use super::{ForkPolicy, MirrorState, Shared, State};
use crate::error::IngestError;
use crate::journal::{Fork, Ingest};
use crate::position::Position;
use crate::shipping::error::ShippingError;
use crate::shipping::link::Link;
use crate::shipping::message::Authentication;
use crate::shipping::observe::EndReason;
use crate::shipping::upstreams::{Attempt, Round, Upstreams};

const BACK_OFF_MIN: Duration = Duration::from_millis(50);
/// Jitter comes on top, up to as much again.
pub(in crate::shipping) const BACK_OFF_MAX: Duration = Duration::from_secs(5);

/// What comes behind trying all upstreams.
enum Next {
    /// The next round.
    Again,
    /// Nothing more before somebody acts.
    Halt(ShippingError),
    /// What lies behind the common end is to be set aside.
    SetAside(Position),
}

pub(in crate::shipping) fn back_off() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_jitter()
        .with_min_delay(BACK_OFF_MIN)
        .with_max_delay(BACK_OFF_MAX)
        .without_max_times()
        .build()
}

impl Shared {
    pub(super) fn run(&self, mut ingest: Option<Ingest>) -> Result<(), IngestError> {
        let mut pauses = back_off();
        let mut upstreams = Upstreams::new(self.addresses.as_slice().len());
        loop {
            let (next, was_healthy) = self.round(&mut ingest, &mut upstreams);
            if self.state.lock().stopping {
                break; // whatever comes of it: not all were asked
            }
            if was_healthy {
                pauses = back_off();
            }
            let next = match next {
                Next::SetAside(common) => match self.set_aside(&mut ingest, common) {
                    Ok(()) => {
                        upstreams.forget();
                        Next::Again
                    }
                    Err(error) if error.is_halting() => Next::Halt(error),
                    Err(error) => {
                        self.note(error);
                        Next::Again
                    }
                },
                next => next,
            };
            match next {
                Next::Halt(error) => {
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

    pub(super) fn knows_journal(&self, state: &State) -> bool {
        self.options.journal_id.is_some() || state.journal.is_some()
    }

    /// Tries one upstream after the other. Whether one has served.
    fn round(&self, ingest: &mut Option<Ingest>, upstreams: &mut Upstreams) -> (Next, bool) {
        let (round, was_healthy) =
            upstreams.round(|| self.usable(), |number| self.attempt(ingest, number));
        let parted = || upstreams.parted().filter(|_| self.quarantines());
        let next = match round {
            Round::Served => Next::Again,
            Round::Settled(error, is_refused) => self.settle(error, is_refused),
            Round::Failed(refused) => match parted() {
                Some(error) => self.settle(error, true),
                None => refused.map_or(Next::Again, Next::Halt),
            },
        };
        (next, was_healthy)
    }

    pub(super) fn quarantines(&self) -> bool {
        self.options.forks == ForkPolicy::Quarantine
    }

    fn settle(&self, error: ShippingError, is_refused: bool) -> Next {
        match error.fork() {
            Some(Fork { common: Some(common) }) if self.quarantines() => Next::SetAside(common),
            _ if is_refused => Next::Halt(error),
            _ => Next::Again,
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
        (state.caught_up_at, state.awaited) = (None, Awaited::default()); // with another history
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

    /// Waits until somebody wants it to go on or to end.
    pub(super) fn halt(&self, error: ShippingError) {
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
    pub(super) fn note(&self, error: ShippingError) {
        let mut state = self.state.lock();
        state.upstreams.note(&error);
        state.last_error = Some(error);
        state.phase = MirrorState::Connecting;
        self.speak(&state);
        self.changed.notify_all();
    }

    /// Whether it was told to try again.
    pub(super) fn pause(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        let mut state = self.state.lock();
        while !state.resuming && !state.stopping {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        std::mem::take(&mut state.resuming)
    }

    /// Tries one of the upstreams; `None` if nobody wants it any more.
    fn attempt(&self, ingest: &mut Option<Ingest>, upstream: usize) -> Option<Attempt> {
        let mut state = self.state.lock();
        if state.stopping {
            return None;
        }
        state.upstreams.begins_with(upstream);
        drop(state);
        let attempt = match self.connect(ingest, upstream) {
            Ok((link, authentication)) => self.converse(ingest, &link, authentication),
            Err(error) => error.into(),
        };
        self.count(&attempt.error);
        self.note(attempt.error.clone());
        if matches!(attempt.error, ShippingError::Cycle { .. }) {
            self.relay.comes_from_nowhere();
        }
        Some(attempt)
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
        connect(self.addresses.get(upstream), &self.options, give_up, |stream| {
            let mut state = self.state.lock();
            if state.stopping {
                return Err(ShippingError::Disconnected);
            }
            state.socket = Some(stream.try_clone().map_err(setup_error)?);
            Ok(())
        })
    }
}

pub(super) fn is_poisoned(error: &ShippingError) -> bool {
    matches!(error, ShippingError::Storage(IngestError::Poisoned(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_begin_at_50_ms_never_exceed_10_s_and_never_end() {
        let pauses: Vec<_> = back_off().take(40).collect();
        assert_eq!(pauses.len(), 40);
        assert!(pauses[0] >= BACK_OFF_MIN && pauses[0] <= 2 * BACK_OFF_MIN, "{pauses:?}");
        assert!(pauses.iter().all(|pause| *pause <= Duration::from_secs(10)), "{pauses:?}");
        assert!(pauses[39] >= BACK_OFF_MAX, "{pauses:?}");
    }
}
