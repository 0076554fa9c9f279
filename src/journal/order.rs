//! What checksums and chain can't tell: whether the writers kept the orders that readers rely on. Read from
//! the first batch on, by a deep verification.

use std::collections::HashMap;
use std::sync::Arc;

use crate::event::Revision;
use crate::format::batch::BatchRef;
use crate::journal::base::Base;
use crate::position::{Incarnation, Position};

/// A rule that a batch breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) rule: &'static str,
    /// Of the first event that is concerned.
    pub(crate) position: Position,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(crate) struct Order {
    streams: HashMap<Box<str>, Known>,
    /// What is known of the events in front of the first batch.
    base: Option<Arc<Base>>,
    /// Counts the places where events are missing: a stream that was last seen in front of one may have
    /// lost events there.
    interruptions: u64,
    epoch: u32,
    incarnation: Incarnation,
    durable_offset: u64,
    /// Ends of batches at or behind the last durable end, in order.
    ends: std::collections::VecDeque<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    last: Revision,
    interruptions: u64,
}

impl Order {
    /// The first batch follows what retention has removed.
    pub(crate) fn begin_at(&mut self, base: &Arc<Base>) {
        let start = base.start().checkpoint;
        (self.epoch, self.incarnation) = (start.epoch, start.incarnation);
        self.ends.push_back(start.offset);
        self.base = Some(Arc::clone(base));
    }

    /// The revision that the first event of a stream behind the base has; `None` if the base can't be read
    /// there.
    fn expected(&self, stream: &str) -> Option<Revision> {
        let Some(base) = &self.base else { return Some(Revision::FIRST) };
        Some(base.head_of(stream).ok()?.map_or(Revision::FIRST, Revision::next))
    }

    /// Events are missing in front of the next batch.
    pub(crate) fn interrupt(&mut self) {
        self.interruptions += 1;
        self.ends.clear();
    }

    /// Takes in the next batch.
    pub(crate) fn add(&mut self, batch: &BatchRef<'_>) -> Result<(), Broken> {
        let writer = self.writer(batch);
        let streams = self.revisions(batch);
        writer.and(streams)
    }

    fn writer(&mut self, batch: &BatchRef<'_>) -> Result<(), Broken> {
        let header = &batch.header;
        let broken = |rule| Err(Broken { rule, position: header.base_position });
        let same_epoch = header.epoch == self.epoch && self.epoch > 0;
        let outcome = if header.epoch < self.epoch {
            broken("an epoch that goes back")
        } else if same_epoch && header.incarnation != self.incarnation {
            broken("two incarnations of one epoch")
        } else if header.durable_offset < self.durable_offset {
            broken("a durable end that goes back")
        } else if !self.is_batch_end(header.durable_offset) {
            broken("a durable end within a batch")
        } else {
            Ok(())
        };
        self.epoch = self.epoch.max(header.epoch);
        self.incarnation = header.incarnation;
        self.durable_offset = self.durable_offset.max(header.durable_offset);
        self.ends.push_back(header.end_offset());
        outcome
    }

    fn is_batch_end(&mut self, durable: u64) -> bool {
        if durable == self.durable_offset {
            return true;
        }
        // Behind an interruption the ends in front of it aren't known, nor are those in front of a base.
        let removed = self.base.as_ref().is_some_and(|b| durable <= b.start().checkpoint.offset);
        if removed {
            return true;
        }
        let behind_known = self.ends.front().is_none_or(|first| durable < *first);
        while self.ends.front().is_some_and(|end| *end < durable) {
            self.ends.pop_front();
        }
        self.ends.front() == Some(&durable) || (behind_known && self.interruptions > 0)
    }

    fn revisions(&mut self, batch: &BatchRef<'_>) -> Result<(), Broken> {
        let mut outcome = Ok(());
        let mut position = batch.header.base_position;
        for record in batch.records().map_while(Result::ok) {
            let now = Known { last: record.revision, interruptions: self.interruptions };
            let follows = match self.streams.get_mut(record.stream) {
                Some(known) => {
                    let before = std::mem::replace(known, now);
                    record.revision == before.last.next()
                        || (before.interruptions < self.interruptions
                            && record.revision > before.last)
                }
                None => {
                    let expected = self.expected(record.stream);
                    self.streams.insert(record.stream.into(), now);
                    expected.is_none_or(|expected| record.revision == expected)
                        || self.interruptions > 0
                }
            };
            if !follows && outcome.is_ok() {
                outcome = Err(Broken { rule: "a revision that does not follow", position });
            }
            position = position.advance(1);
        }
        outcome
    }
}
