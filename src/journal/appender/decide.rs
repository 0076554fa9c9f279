//! What becomes of an append: it is a duplicate, meets a conflict, or is written.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{AppendError, ReadError};
use crate::event::{EventId, ExpectedRevision, Recorded, Revision};
use crate::format::sidecar::id_hash;
use crate::journal::Journal;
use crate::journal::appender::group::{Group, Outcome};
use crate::journal::appender::window::IdWindow;
use crate::journal::appender::{Append, Appended, Placed, Receipt, Shared, State};
use crate::position::{Durability, Incarnation, Position, Token};

/// What the lock holder decides about an append.
pub(super) enum Decision {
    /// The first revision of each part that has events.
    Write(Vec<Revision>),
    /// The answer rests on this group: once it is durable, decide again.
    After(Arc<Group>, Rests),
    /// A stream is not as expected, in what is durable; unless this is an old append that comes again.
    Conflict(AppendError),
    /// An event whose id has this hash is at a durable position.
    Known { hash: u64, position: Position },
    /// Durable events that aren't in memory are to be looked at, for the conditions on queries.
    Look,
    /// The durable event at `position` may be one that this condition's query means.
    Matches { condition: usize, position: Position },
}

/// What is known of an append's conditions on queries.
#[derive(Debug)]
pub(super) struct Looked {
    /// For each condition: no event in front of this is meant.
    up_to: Vec<Position>,
    /// Events that a condition only seemed to mean, by their hashes. Another condition may mean them indeed.
    others: Vec<(usize, Position)>,
}

impl Looked {
    pub(super) fn of(append: &Append) -> Self {
        let up_to = append.conditions.iter().map(|condition| condition.from);
        Self { up_to: up_to.collect(), others: Vec::new() }
    }
}

/// Why the answer rests on a group.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rests {
    OnConflict,
    OnDuplicate,
}

impl Rests {
    pub(super) fn check(self, outcome: Outcome) -> Result<(), AppendError> {
        match (outcome, self) {
            (Outcome::Durable, _) => Ok(()),
            // Under these ids something was written, and nobody knows whether it stays.
            (Outcome::Unknown(poison), Self::OnDuplicate) => Err(AppendError::Unknown(poison)),
            (Outcome::Unknown(poison) | Outcome::NotWritten(poison), _) => {
                Err(AppendError::Poisoned(poison))
            }
        }
    }
}

impl Shared {
    /// Decides under the lock: duplicates first, then conditions. `unknown` are hashes that were looked up
    /// in vain.
    pub(super) fn decide(
        &self,
        state: &State,
        append: &Append,
        hashes: &[u64],
        unknown: &[u64],
        looked: &Looked,
    ) -> Result<Decision, AppendError> {
        for hash in hashes {
            let Some(position) = state.window.get(*hash) else { continue };
            if position < self.journal.start().position {
                continue; // removed: nobody can tell any more whether it was this event
            }
            if position >= self.journal.end().position {
                let group = Arc::clone(state.group_of(position));
                return Ok(Decision::After(group, Rests::OnDuplicate));
            }
            if !unknown.contains(hash) {
                return Ok(Decision::Known { hash: *hash, position });
            }
        }
        let mut firsts = Vec::with_capacity(append.parts.len());
        let mut heads = HashMap::new(); // of streams that may come again in this append
        for part in &append.parts {
            if let Some(head) = heads.get_mut(&part.stream) {
                firsts.push(Revision::next(*head));
                *head = head.advance(part.events.len() as u64);
                continue;
            }
            let pending = state.heads.get(&part.stream);
            let head = match pending {
                Some((revision, _)) => Some(*revision),
                None => self.journal.stream_head(&part.stream)?,
            };
            if !meets(part.expected, head) {
                let (stream, expected) = (part.stream.clone(), part.expected);
                let durable = match pending {
                    Some((_, end)) => {
                        let durable = self.journal.stream_head(&part.stream)?;
                        if meets(expected, durable) {
                            let last = Position::new(end.get().saturating_sub(1));
                            let group = Arc::clone(state.group_of(last));
                            return Ok(Decision::After(group, Rests::OnConflict));
                        }
                        durable
                    }
                    None => head,
                };
                let conflict = AppendError::Conflict { stream, expected, actual: durable };
                return Ok(Decision::Conflict(conflict));
            }
            if !part.events.is_empty() {
                let first = head.map_or(Revision::FIRST, Revision::next);
                if append.interleaved {
                    heads.insert(&part.stream, first.advance(part.events.len() as u64 - 1));
                }
                firsts.push(first);
            }
        }
        let refused = self.decide_queries(state, append, looked)?;
        Ok(refused.unwrap_or(Decision::Write(firsts)))
    }

    /// Decides the conditions on queries; `None` if all are met, by what is durable and by what is pending.
    fn decide_queries(
        &self,
        state: &State,
        append: &Append,
        looked: &Looked,
    ) -> Result<Option<Decision>, AppendError> {
        let Some(labels) = &state.labels else { return Ok(None) };
        let end = self.journal.end().position;
        for (number, (condition, up_to)) in append.conditions.iter().zip(&looked.up_to).enumerate()
        {
            if *up_to > state.next.position {
                // Of a history that this journal doesn't have: nobody knows what it was decided from.
                return Err(ReadError::BeyondEnd { position: *up_to, end }.into());
            }
            if *up_to < labels.floor() {
                if *up_to < end {
                    return Ok(Some(Decision::Look));
                }
                let last = Position::new(labels.floor().get().saturating_sub(1));
                let group = Arc::clone(state.group_of(last));
                return Ok(Some(Decision::After(group, Rests::OnConflict)));
            }
            let others = looked.others.iter().filter(|(of, _)| *of == number);
            let others: Vec<Position> = others.map(|(_, position)| *position).collect();
            match labels.first_match(&condition.query, *up_to, &others) {
                Some(position) if position >= end => {
                    let group = Arc::clone(state.group_of(position));
                    return Ok(Some(Decision::After(group, Rests::OnConflict)));
                }
                Some(position) => {
                    return Ok(Some(Decision::Matches { condition: number, position }));
                }
                None => {}
            }
        }
        Ok(None)
    }

    /// Looks for events that the conditions' queries mean among what is durable now. The answer, if there is one.
    pub(super) fn look(
        &self,
        append: &Append,
        looked: &mut Looked,
    ) -> Result<Option<Result<Appended, AppendError>>, AppendError> {
        for (condition, up_to) in append.conditions.iter().zip(&mut looked.up_to) {
            if *up_to >= self.journal.end().position {
                continue;
            }
            let mut events = self.journal.read_query(&condition.query, *up_to)?;
            if let Some(event) = events.next().transpose()? {
                return self.judge_conflict(append, event.position()).map(Some);
            }
            *up_to = events.position();
        }
        Ok(None)
    }

    /// A durable event has the labels that a query means: the answer, if it is meant indeed.
    pub(super) fn judge_match(
        &self,
        append: &Append,
        condition: usize,
        position: Position,
        looked: &mut Looked,
    ) -> Result<Option<Result<Appended, AppendError>>, AppendError> {
        let event = self.journal.read_all(position)?.next().transpose()?;
        let query = append.conditions.get(condition).map(|condition| &condition.query);
        if query.zip(event.as_ref()).is_some_and(|(query, event)| query.matches(event)) {
            return self.judge_conflict(append, position).map(Some);
        }
        looked.others.push((condition, position));
        Ok(None)
    }

    /// The durable event at `position` is one that there must not be; unless it is the append's own, which comes
    /// again.
    fn judge_conflict(
        &self,
        append: &Append,
        position: Position,
    ) -> Result<Result<Appended, AppendError>, AppendError> {
        let repeated = match self.judge_known(append, position)? {
            Some(duplicate) => Some(duplicate),
            None => self.repeated_beyond_window(append)?,
        };
        Ok(repeated.unwrap_or(Err(AppendError::QueryConflict { position })))
    }

    /// The batch of an event that is among the last ones, and its token; once it is durable.
    pub(super) fn find(&self, id: EventId) -> Result<Option<(Token, Vec<Recorded>)>, AppendError> {
        loop {
            let state = self.state.lock();
            let Some(position) = state.window.get(id_hash(&id)) else { return Ok(None) };
            if position >= self.journal.end().position {
                if let Some(poison) = state.poison() {
                    return Err(AppendError::Unknown(poison.clone())); // nothing becomes durable any more
                }
                let group = Arc::clone(state.group_of(position));
                drop(state);
                Rests::OnDuplicate.check(self.see_through(&group))?;
                continue;
            }
            drop(state);
            let batch = match self.journal.events_around(position) {
                Err(ReadError::Truncated { .. }) => return Ok(None),
                batch => batch?,
            };
            if batch.iter().all(|event| event.id() != id) {
                return Ok(None); // another id with the same hash
            }
            return Ok(Some((self.token_behind(&batch)?, batch)));
        }
    }

    /// The event at `position` has the hash of one of the append's ids; `None` if it isn't one of them.
    pub(super) fn judge_known(
        &self,
        append: &Append,
        position: Position,
    ) -> Result<Option<Result<Appended, AppendError>>, AppendError> {
        let batch = match self.journal.events_around(position) {
            Err(ReadError::Truncated { .. }) => return Ok(None),
            batch => batch?,
        };
        let ours = append.ids().any(|id| batch.iter().any(|event| event.id() == id));
        Ok(ours.then(|| self.judge_duplicates(append, &batch)))
    }

    /// For `Exact` and `NoStream` every repetition is recognised, however old: the event behind the
    /// expected revision is compared, in every part, for a condition that isn't met any more may be
    /// another part's. If that event was removed, nobody can tell, and it stays a conflict.
    pub(super) fn repeated_beyond_window(
        &self,
        append: &Append,
    ) -> Result<Option<Result<Appended, AppendError>>, AppendError> {
        for part in append.parts.iter().filter(|part| !part.events.is_empty()) {
            let next = match part.expected {
                ExpectedRevision::NoStream => Revision::FIRST,
                ExpectedRevision::Exact(revision) => revision.next(),
                ExpectedRevision::Any | ExpectedRevision::StreamExists => continue,
            };
            let read = self.journal.read_stream(&part.stream, next);
            let event = match read.and_then(|mut events| events.next().transpose()) {
                Err(ReadError::TruncatedStream { .. } | ReadError::Truncated { .. }) => continue,
                event => event?,
            };
            let ours = |event: &Recorded| append.ids().any(|id| id == event.id());
            if let Some(event) = event.filter(ours) {
                let batch = match self.journal.events_around(event.position()) {
                    Err(ReadError::Truncated { .. }) => continue,
                    batch => batch?,
                };
                return Ok(Some(self.judge_duplicates(append, &batch)));
            }
        }
        Ok(None)
    }

    /// At least one of the append's ids is in `batch`: all of them make it a duplicate.
    fn judge_duplicates(
        &self,
        append: &Append,
        batch: &[Recorded],
    ) -> Result<Appended, AppendError> {
        let total = append.ids().count();
        let found: Vec<_> = append
            .ids()
            .filter_map(|id| batch.iter().find(|event| event.id() == id))
            .map(|event| Placed { position: event.position(), revision: event.revision() })
            .collect();
        if found.len() < total {
            return Err(AppendError::PartialDuplicate { known: found.len(), total });
        }
        let token = self.token_behind(batch)?;
        Ok(Appended::Duplicate(Receipt { token, events: found, behind: Vec::new() }))
    }

    fn token_behind(&self, batch: &[Recorded]) -> Result<Token, ReadError> {
        let position = batch.last().map_or(Position::START, |event| event.position().advance(1));
        let incarnation = self.journal.incarnation_before(position)?;
        let (journal, durability) = (self.journal.id(), Durability::Durable);
        Ok(Token { journal, incarnation, position, durability })
    }
}

impl Journal {
    /// The ids of the last events.
    pub(super) fn id_window(&self, max: usize) -> Result<IdWindow, ReadError> {
        let mut window = IdWindow::new(max);
        let mut newest_first: Vec<(Position, Vec<u64>)> = Vec::new();
        let segments = self.0.segments.read();
        let mut missing = max as u64;
        for segment in segments.all.iter().rev() {
            let ids = match &segment.sealed {
                Some(sealed) => sealed.last_ids(&self.0.files, &segment.page, missing)?,
                None => segments.active.ids.clone(),
            };
            let end = match &segment.sealed {
                Some(sealed) => sealed.end.position,
                None => self.end().position,
            };
            missing = missing.saturating_sub(ids.len() as u64);
            newest_first.push((Position::new(end.since(Position::new(ids.len() as u64))), ids));
            if missing == 0 {
                break;
            }
        }
        for (first, ids) in newest_first.into_iter().rev() {
            for (index, id) in ids.into_iter().enumerate() {
                window.insert(id, first.advance(index as u64));
            }
        }
        Ok(window)
    }

    /// All events of the batch that holds the durable event at `position`.
    fn events_around(&self, position: Position) -> Result<Vec<Recorded>, ReadError> {
        let mut events: Vec<Recorded> = Vec::new();
        let Some(range) = self.batch_range(position)? else { return Ok(events) };
        let taken = self.read_all(range.start)?.take(range.end.since(range.start) as usize);
        for event in taken {
            events.push(event?);
        }
        Ok(events)
    }

    fn batch_range(&self, position: Position) -> Result<Option<Range<Position>>, ReadError> {
        let header = self.header_holding(position)?;
        Ok(header.map(|header| header.base_position..header.end_position()))
    }

    /// The incarnation that wrote the batch in front of `end`.
    fn incarnation_before(&self, end: Position) -> Result<Incarnation, ReadError> {
        let last = Position::new(end.get().saturating_sub(1));
        Ok(self.header_holding(last)?.map(|header| header.incarnation).unwrap_or_default())
    }
}

fn meets(expected: ExpectedRevision, head: Option<Revision>) -> bool {
    match expected {
        ExpectedRevision::Any => true,
        ExpectedRevision::NoStream => head.is_none(),
        ExpectedRevision::StreamExists => head.is_some(),
        ExpectedRevision::Exact(revision) => head == Some(revision),
    }
}
