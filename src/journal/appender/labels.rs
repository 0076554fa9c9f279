//! The events that were appended last, by type and tags: for conditions on queries.
//!
//! ```text
//!  entries   floor ── position ─▶ labels of the event ── … ── next        durable and pending
//!  places    label ─▶ positions, ascending
//! ```
//! It is kept from the first condition on, so that nobody else pays for it. What lies in front of the floor is
//! looked for in the journal.

use std::collections::{HashMap, VecDeque};

use foldhash::fast::FixedState;

use crate::journal::query::{Query, QueryItem};
use crate::position::Position;

/// How many labels are kept, all together: some MiB.
const LABELS_MAX: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct RecentLabels {
    floor: Position,
    entries: VecDeque<Vec<u64>>,
    places: HashMap<u64, VecDeque<Position>, FixedState>,
    count: usize,
    max: usize,
}

impl RecentLabels {
    /// Of the events from `floor` on.
    pub(super) fn from(floor: Position) -> Self {
        Self::with_max(floor, LABELS_MAX)
    }

    fn with_max(floor: Position, max: usize) -> Self {
        let (entries, places) = (VecDeque::new(), HashMap::default());
        Self { floor, entries, places, count: 0, max }
    }

    /// Everything from here on is in it.
    pub(super) const fn floor(&self) -> Position {
        self.floor
    }

    /// Takes in the labels of the next event, ascending.
    pub(super) fn push(&mut self, labels: Vec<u64>) {
        let position = self.floor.advance(self.entries.len() as u64);
        for label in &labels {
            self.places.entry(*label).or_default().push_back(position);
        }
        self.count += labels.len();
        self.entries.push_back(labels);
        while self.count > self.max {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        let Some(labels) = self.entries.pop_front() else { return };
        self.floor = self.floor.advance(1);
        self.count -= labels.len();
        for label in labels {
            if let Some(places) = self.places.get_mut(&label) {
                places.pop_front();
                if places.is_empty() {
                    self.places.remove(&label);
                }
            }
        }
    }

    /// The first event from `from` on that may be meant, but for those in `others`, which are known not to be.
    pub(super) fn first_match(
        &self,
        query: &Query,
        from: Position,
        others: &[Position],
    ) -> Option<Position> {
        query.items().iter().filter_map(|item| self.first_of_item(item, from, others)).min()
    }

    fn first_of_item(
        &self,
        item: &QueryItem,
        from: Position,
        others: &[Position],
    ) -> Option<Position> {
        let (types, tags) = item.labels();
        let is_meant = |position: &Position| {
            let labels = self.labels_at(*position);
            let has = |label: &u64| labels.binary_search(label).is_ok();
            (types.is_empty() || types.iter().any(has))
                && tags.iter().all(has)
                && !others.contains(position)
        };
        // Among the events with the rarest of the tags; without tags, those of each type.
        let rarest = tags.iter().map(|tag| self.places_of(*tag)).min_by_key(|places| places.len());
        match rarest {
            Some(places) => behind(places, from).find(is_meant),
            None if types.is_empty() => {
                let end = self.floor.advance(self.entries.len() as u64).get();
                (from.max(self.floor).get()..end).map(Position::new).find(is_meant)
            }
            None => {
                let first = |label: &u64| behind(self.places_of(*label), from).find(is_meant);
                types.iter().filter_map(first).min()
            }
        }
    }

    fn labels_at(&self, position: Position) -> &[u64] {
        self.entries.get(position.since(self.floor) as usize).map_or(&[], Vec::as_slice)
    }

    fn places_of(&self, label: u64) -> &VecDeque<Position> {
        static NONE: VecDeque<Position> = VecDeque::new();
        self.places.get(&label).unwrap_or(&NONE)
    }
}

fn behind(places: &VecDeque<Position>, from: Position) -> impl Iterator<Item = Position> {
    places.range(places.partition_point(|place| *place < from)..).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::labels::labels_of;
    use crate::format::record;
    use crate::{NewEvent, Revision, StreamId};

    /// A list that is looked through from end to end answers the same, however much was forgotten.
    #[test]
    fn it_finds_what_a_list_finds() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let start = rng.u64(..5);
            let mut recent = RecentLabels::with_max(Position::new(start), rng.usize(1..60));
            let mut list: Vec<(String, Vec<String>)> = Vec::new();
            let stream = StreamId::new("s").unwrap();
            for _ in 0..100 {
                let event_type = format!("t{}", rng.u8(..3));
                let tags: Vec<_> = (0..rng.u8(..4)).map(|_| format!("g{}", rng.u8(..5))).collect();
                let mut event = NewEvent::raw(&event_type, *b"").unwrap();
                for tag in &tags {
                    event = event.tag(tag.clone());
                }
                let mut bytes = Vec::new();
                record::encode(&mut bytes, &event, &stream, Revision::FIRST);
                recent.push(labels_of(&record::RecordRef::decode(&bytes).unwrap().0));
                list.push((event_type, tags));

                let item = |rng: &mut fastrand::Rng| {
                    let types = (0..rng.u8(..3)).map(|_| format!("t{}", rng.u8(..4)));
                    let item = QueryItem::types(types.collect::<Vec<_>>());
                    item.and_tags(
                        (0..rng.u8(..3)).map(|_| format!("g{}", rng.u8(..6))).collect::<Vec<_>>(),
                    )
                };
                let query =
                    Query::any_of((0..rng.u8(..3)).map(|_| item(&mut rng)).collect::<Vec<_>>());
                let first = recent.floor().get();
                let from = rng.u64(first..first + 60);
                let meant = |(event_type, tags): &(String, Vec<String>)| {
                    query
                        .items()
                        .iter()
                        .any(|item| item.matches(event_type, |tag| tags.contains(tag)))
                };
                let at = |position: u64| &list[(position - start) as usize];
                let end = start + list.len() as u64;
                let expected = (from..end).find(|position| meant(at(*position)));
                let found = recent.first_match(&query, Position::new(from), &[]);
                assert_eq!(found.map(Position::get), expected, "seed {seed}: {query:?}");
                let second = expected.and_then(|first| (first + 1..end).find(|p| meant(at(*p))));
                let others: Vec<_> = found.into_iter().collect();
                let found = recent.first_match(&query, Position::new(from), &others);
                assert_eq!(found.map(Position::get), second, "seed {seed}: {query:?}");
            }
            assert!(recent.count <= recent.max);
        }
    }
}
