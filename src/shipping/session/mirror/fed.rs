//! The subscriber's end of a session for a filtered feed: it takes nothing that isn't the feed's, and accounts for every
//! position once.

use super::{Delivery, MirrorSession};
use crate::position::{Chain, Checkpoint, Incarnation, JournalId, Position};
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::{
    Entry, Events, FeedRequest, FeedTerms, OriginEnd, RUN_BYTES_MAX, Run, Skip,
};
use crate::shipping::session::Violation;
use crate::shipping::session::feed::InFlight;

/// So many SKIPs that no run follows may wait to be acknowledged. One comes with each run, whose number the window limits;
/// of others, a subscriber acknowledges each 8 MiB of the journal that is passed over.
pub(crate) const SKIPS_MAX: u32 = 1 << 17;

/// Where nothing is known yet.
const NOWHERE: Checkpoint = Checkpoint {
    journal: JournalId::from_bytes([0; 16]),
    epoch: 0,
    incarnation: Incarnation::new(0),
    offset: 0,
    position: Position::START,
    chain: Chain::from_bytes([0; 16]),
};

/// What a session for a filtered feed knows beside the rest.
#[derive(Debug)]
pub(super) struct Fed {
    request: FeedRequest,
    filter: FeedFilter,
    /// Up to here every position is accounted for.
    covered: Checkpoint,
    in_flight: InFlight,
    /// SKIPs that no run followed. They take no room, and yet have to be taken.
    skips: InFlight,
    /// A SKIP came last.
    is_behind_skip: bool,
}

impl Fed {
    pub(super) fn new(request: FeedRequest, durable: Option<Checkpoint>) -> Self {
        let (filter, covered) = (request.terms.filter.clone(), durable.unwrap_or(NOWHERE));
        let (in_flight, skips) = (InFlight::default(), InFlight::default());
        Self { filter, request, covered, in_flight, skips, is_behind_skip: false }
    }

    pub(super) const fn request(&self) -> &FeedRequest {
        &self.request
    }

    /// It was granted, from here on.
    pub(super) fn begin(&mut self, from: Checkpoint, terms: &FeedTerms) {
        self.covered = from;
        self.filter = terms.filter.clone();
    }

    pub(super) fn acknowledged(&mut self, offset: u64) {
        self.in_flight.acknowledged(offset);
        self.skips.acknowledged(offset);
    }

    /// Counts a SKIP up to `offset`, if there is no run between it and the one in front.
    fn skip(&mut self, offset: u64) -> Result<(), Violation> {
        if std::mem::replace(&mut self.is_behind_skip, true) {
            self.skips.add(offset, 1, usize::MAX);
        }
        let limit = SKIPS_MAX;
        if self.skips.bytes() > u64::from(limit) { Err(Violation::Skips { limit }) } else { Ok(()) }
    }
}

impl MirrorSession {
    /// Whether what was granted is what was asked for, or a part of it if that can't be but new.
    pub(super) fn are_asked_for(&self, granted: Option<&FeedTerms>) -> bool {
        match (granted, self.fed.as_ref().map(|fed| &fed.request)) {
            (None, None) => true,
            (Some(granted), Some(request)) if request.goes_on => *granted == request.terms,
            (Some(granted), Some(request)) => granted.filter.is_within(&request.terms.filter),
            _ => false,
        }
    }

    pub(super) fn events(
        &mut self,
        events: &Events<'_>,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<(), Violation> {
        self.origin_is_durable_to(events.origin_end)?;
        let Some(fed) = &mut self.fed else { return Ok(()) };
        let expected = fed.covered.position;
        if events.from != expected {
            return Err(Violation::Position { expected, found: events.from });
        }
        if events.at as usize != self.partial.len() {
            let (expected, found) = (self.partial.len() as u64, u64::from(events.at));
            return Err(Violation::Offset { expected, found });
        }
        let window_bytes = self.config.window_bytes;
        let held = (self.partial.len() + events.bytes.len()) as u64 + fed.in_flight.bytes();
        if held > u64::from(window_bytes) + u64::from(RUN_BYTES_MAX) {
            return Err(Violation::Window { window_bytes });
        }
        self.partial.extend_from_slice(events.bytes);
        if events.continued {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.partial);
        let from = events.from;
        let run = Run::decode(from, bytes).map_err(|source| Violation::Run { from, source })?;
        let fits = |entry: &Entry<'_>| {
            !entry.record.event_type.starts_with('$') && fed.filter.matches_record(&entry.record)
        };
        if let Some(entry) = run.entries().flatten().find(|entry| !fits(entry)) {
            return Err(Violation::NotInFeed(entry.position));
        }
        self.covers(run.behind)?;
        let (offset, len) = (run.behind.offset, run.len_bytes() as u64);
        self.fed.iter_mut().for_each(|fed| {
            fed.in_flight.add(offset, len, usize::MAX);
            fed.is_behind_skip = false;
        });
        deliveries.push(Delivery::Run(run));
        Ok(())
    }

    pub(super) fn skip(
        &mut self,
        skip: &Skip,
        deliveries: &mut Vec<Delivery>,
    ) -> Result<(), Violation> {
        self.origin_is_durable_to(skip.origin_end)?;
        let expected = self.fed.as_ref().map_or(skip.from, |fed| fed.covered.position);
        if skip.from != expected {
            return Err(Violation::Position { expected, found: skip.from });
        }
        self.covers(skip.behind)?;
        self.fed.as_mut().map_or(Ok(()), |fed| fed.skip(skip.behind.offset))?;
        deliveries.push(Delivery::Skipped(skip.behind));
        Ok(())
    }

    /// Everything up to here is accounted for. Both measures go on, up to the durable end at most.
    fn covers(&mut self, behind: Checkpoint) -> Result<(), Violation> {
        let end = self.origin_end().map_or(OriginEnd::from(&behind), |(end, _)| end);
        let Some(fed) = &mut self.fed else { return Ok(()) };
        let goes_on = behind.offset > fed.covered.offset
            && behind.position > fed.covered.position
            && behind.journal == fed.covered.journal;
        if !goes_on || behind.offset > end.offset || behind.position > end.position {
            let (expected, found) = (fed.covered.position, behind.position);
            return Err(Violation::Position { expected, found });
        }
        fed.covered = behind;
        Ok(())
    }
}
