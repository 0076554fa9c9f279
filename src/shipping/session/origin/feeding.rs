//! The origin's end of a session for a filtered feed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{CLOSED_RECONNECT_MS, OriginSession, Source, SourceError, Streamed};
use crate::position::{Checkpoint, JournalId};
use crate::shipping::message::{
    ErrorCode, Failure, FeedRequest, FeedTerms, Message, OriginEnd, ShapeId, Skip, put_part,
};
use crate::shipping::session::feed::{InFlight, MadeRun, Sieve, Sifted, Span};
use crate::shipping::session::frames::{Piece, Place};
use crate::shipping::session::{Now, Output};
use crate::shipping::shape::Shape;

/// Of a feed that holds nothing of what is committed, that is told as often.
const SKIPS_EVERY: Duration = Duration::from_millis(200);
/// So many runs under way are counted one by one.
const RUNS_COUNTED_MAX: usize = 32;

/// A feed that is being sent.
#[derive(Debug)]
pub(super) struct Feeding {
    sieve: Arc<Sieve>,
    /// Up to here there is nothing of the feed behind what was sent.
    sifted: Checkpoint,
    /// When that is told at the latest, if it wasn't.
    skip_at: Option<Instant>,
    /// Where the run ends of which a part was sent.
    run_end: Option<Checkpoint>,
    in_flight: InFlight,
}

impl Feeding {
    pub(super) fn new(terms: &Arc<FeedTerms>, shape: Option<Shape>, from: Checkpoint) -> Self {
        let sieve = Arc::new(Sieve::new(Arc::clone(terms), shape));
        let (skip_at, run_end, in_flight) = (None, None, InFlight::default());
        Self { sieve, sifted: from, skip_at, run_end, in_flight }
    }

    pub(super) const fn sifted(&self) -> Checkpoint {
        self.sifted
    }

    pub(super) const fn skip_at(&self) -> Option<Instant> {
        self.skip_at
    }

    pub(super) const fn under_way_bytes(&self) -> u64 {
        self.in_flight.bytes()
    }

    pub(super) fn acknowledged(&mut self, offset: u64) {
        self.in_flight.acknowledged(offset);
    }
}

impl OriginSession {
    /// Whether the peer may have this journal, or something of what it wants of it.
    pub(crate) fn may_have(&self, journal: &JournalId) -> bool {
        match &self.requested {
            None => self.config.gate.may_mirror(journal),
            Some(request) => {
                let allowed = self.config.gate.may_be_fed(journal).unwrap_or_default();
                request.terms.filter.meets(&allowed)
            }
        }
    }

    /// Whether the peer may have this journal, or what of it. To find that out of long filters takes a while.
    pub(super) fn grant(&mut self, journal: &JournalId) {
        let Some(request) = self.requested.take() else {
            if !self.config.gate.may_mirror(journal) {
                self.refuse(ErrorCode::DENIED);
            }
            return;
        };
        let FeedRequest { terms: FeedTerms { filter: wanted, shape: had }, goes_on } = request;
        let allowed = self.config.gate.may_be_fed(journal).unwrap_or_default();
        let is_allowed = wanted.is_within(&allowed);
        let filter = if is_allowed { wanted } else { wanted.and(&allowed) };
        if filter.parts().is_empty() || (goes_on && !is_allowed) {
            return self.refuse(ErrorCode::DENIED);
        }
        if filter.check().is_err() {
            let detail = "what is wanted and allowed is too much for one filter";
            return self.end_with(Failure::new(ErrorCode::UNSUPPORTED, detail));
        }
        let shape = self.config.shape.as_ref().map(|shape| shape.id().clone());
        if goes_on && had != shape {
            let named = |shape: Option<ShapeId>| {
                shape.map_or("events as they are stored".to_owned(), |shape| shape.to_string())
            };
            let detail = format!("the feed began with {}, now it is {}", named(had), named(shape));
            return self.end_with(Failure::new(ErrorCode::TERMS, detail));
        }
        self.status.feed = Some(Arc::new(FeedTerms { filter, shape }));
    }

    /// The same of a feed: a frame of events, or that there are none up to somewhere.
    pub(super) fn feed(
        &mut self,
        mut feeding: Feeding,
        source: &mut impl Source,
        now: Now,
        out: &mut Output,
    ) -> Streamed {
        self.beat(source, now);
        let origin_end = OriginEnd::from(&source.end()); // not in front of what the heartbeat says
        if self.part == 0 && feeding.skip_at.is_some_and(|at| now.at >= at) {
            self.skip(&mut feeding, origin_end);
        }
        if self.part == 0 && feeding.in_flight.bytes() >= self.window_bytes {
            self.feeding = Some(feeding);
            return Streamed::Done;
        }
        let closed = source.is_closed();
        let span =
            Span { at: feeding.sifted, run_bytes: self.config.data_bytes, end: feeding.run_end };
        let mut streamed = Streamed::Done;
        match source.sift(&span, &feeding.sieve) {
            Ok(Sifted::OnDisk) => streamed = Streamed::OnDisk,
            Ok(Sifted::Run(run)) if self.is_same(&run, &feeding) => {
                self.run(&mut feeding, &run, origin_end, out);
            }
            Ok(_) if self.part > 0 => {
                let reason = "the service publishes something else each time it is asked".into();
                let position = feeding.sifted.position;
                self.fail(SourceError::Shape { position, reason }, source);
            }
            Ok(Sifted::Run(run)) => {
                self.skip(&mut feeding, origin_end);
                self.run(&mut feeding, &run, origin_end, out);
            }
            Ok(Sifted::Passed(to)) => {
                // What is told at once is about one opening of the origin.
                if to.incarnation != feeding.sifted.incarnation {
                    self.skip(&mut feeding, origin_end);
                }
                feeding.sifted = to;
                feeding.skip_at.get_or_insert(now.at + SKIPS_EVERY);
                streamed = Streamed::More;
            }
            Ok(Sifted::Nothing) if closed => {
                self.skip(&mut feeding, origin_end);
                self.go_away(CLOSED_RECONNECT_MS);
            }
            Ok(Sifted::Nothing) => {}
            Err(error) => {
                self.skip(&mut feeding, origin_end);
                self.fail(error, source);
            }
        }
        self.feeding = Some(feeding);
        streamed
    }

    /// Whether the rest of it continues what was sent of a run.
    fn is_same(&self, run: &MadeRun, feeding: &Feeding) -> bool {
        feeding.run_end == Some(run.behind) && self.part < run.bytes.len()
    }

    /// Tells that there is nothing of the feed up to where was looked.
    fn skip(&mut self, feeding: &mut Feeding, origin_end: OriginEnd) {
        if self.part > 0 {
            return;
        }
        feeding.skip_at = None;
        let Some(sent) = self.status.sent else { return };
        let behind = feeding.sifted;
        let origin_end = origin_end.at_least(&behind);
        if behind.position > sent.position {
            self.say(&Message::Skip(Skip { from: sent.position, behind, origin_end }));
            self.status.sent = Some(behind);
        }
    }

    /// Puts out as much of a run as a frame takes.
    fn run(&mut self, feeding: &mut Feeding, run: &MadeRun, end: OriginEnd, out: &mut Output) {
        let (from, behind) = (feeding.sifted.position, run.behind);
        let end = end.at_least(&behind);
        let mut bytes = Vec::new();
        feeding.run_end = Some(behind);
        self.part += put_part(&mut bytes, from, &run.bytes, self.part, self.max_frame, end);
        if self.part >= run.bytes.len() {
            self.part = 0;
            feeding.run_end = None;
            self.status.sent = Some(behind);
            feeding.sifted = behind;
            feeding.in_flight.add(behind.offset, run.bytes.len() as u64, RUNS_COUNTED_MAX);
        }
        out.say(&mut self.control);
        out.send(Piece { bytes: Arc::new(bytes), behind: Place { end: behind, part: self.part } });
    }
}
