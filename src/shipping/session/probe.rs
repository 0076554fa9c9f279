//! Finding the last batch end that two histories have in common, with few questions.
//!
//! ```text
//!   mirror  ├── common ──┤ c ├── other ──────┤
//!   origin  ├── common ──┤ c ├── else ──────────┤
//!                    low ▲ … ▲ high             asked: the origin's batch ends at or in front of up to 64
//! ```
//! Each end carries the chain over everything in front of it, so what is common is a prefix: up to `low` it is
//! known to be, from `high` on it isn't. Each answer leaves a 64th of what lies between them.

use crate::format::batch::{Link, genesis};
use crate::planted::{self, Bug};
use crate::position::{JournalId, Position};
use crate::shipping::message::{Common, PROBE_POSITIONS_MAX};

/// What the origin's batch end is in the mirror's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// A batch end, too.
    Common(Common),
    /// Nothing: there are other batches.
    Other,
    /// One of both has removed what was there.
    Unknown,
}

/// A search for the last common batch end.
#[derive(Clone, Debug)]
pub(crate) struct Search {
    /// What lies in front isn't another history.
    low: Position,
    /// The last batch end at or in front of `low`, if it is known.
    common: Option<Common>,
    /// What lies here or behind isn't looked at any more: it differs, or only one of both has it.
    high: Position,
    asked: Vec<Position>,
}

impl Search {
    /// Between the beginning of the journal and the shorter history's end.
    pub(crate) fn new(journal: JournalId, shorter_end: Position) -> Self {
        let (low, chain) = (Position::START, genesis(journal));
        let common = Some(Common { position: low, chain });
        let mut search = Self { low, common, high: shorter_end.advance(1), asked: Vec::new() };
        search.choose();
        search
    }

    /// The positions to ask for next; none if the search is over.
    pub(crate) fn asked(&self) -> &[Position] {
        &self.asked
    }

    /// Where both histories part, once nothing is to be asked any more; `None` if one of both has removed it.
    pub(crate) const fn found(&self) -> Option<Common> {
        self.common
    }

    /// Whether these can be the answer: as many, and none behind what was asked for.
    pub(crate) fn is_answered_by(&self, ends: &[Option<Link>]) -> bool {
        let fits =
            |(asked, end): (&Position, &Option<Link>)| end.is_none_or(|end| end.position <= *asked);
        ends.len() == self.asked.len() && self.asked.iter().zip(ends).all(fits)
    }

    /// Goes on with what the origin's batch ends have turned out to be.
    pub(crate) fn narrow(&mut self, held: &[Held]) {
        for (asked, held) in std::mem::take(&mut self.asked).into_iter().zip(held) {
            match held {
                Held::Common(common) => (self.low, self.common) = (asked, Some(*common)),
                Held::Unknown => (self.low, self.common) = (asked, None),
                Held::Other => {
                    self.high = asked;
                    break;
                }
            }
        }
        self.choose();
    }

    /// Up to 64 positions between `low` and `high`, evenly, the last of them included.
    fn choose(&mut self) {
        let off_by_one = u64::from(planted::is(Bug::ProbeOffByOne));
        let between = self.high.get().saturating_sub(self.low.get()).saturating_sub(1 + off_by_one);
        let count = between.min(PROBE_POSITIONS_MAX as u64);
        let nth = |n: u64| u128::from(between) * u128::from(n) / u128::from(count);
        self.asked = (1..=count).map(|n| self.low.advance(nth(n) as u64)).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Chain;

    fn common(position: u64) -> Common {
        Common { position: Position::new(position), chain: Chain::default() }
    }

    /// The search against batch ends of all kinds: exact, in few steps, and never out of bounds.
    #[test]
    fn the_exact_end_is_found_in_few_steps_whatever_the_histories_are() {
        let mut rng = fastrand::Rng::with_seed(1);
        for round in 0..2000 {
            let bits = rng.u32(1..60);
            let shared: u64 = rng.u64(0..1 << bits);
            let (mine, theirs) = (rng.u64(0..1 << bits), rng.u64(0..1 << bits));
            // The origin's batches have this length, in its common part and behind it; and it has removed some.
            let batch = rng.u64(1..9);
            let fork = shared - shared % batch;
            let removed = if rng.u8(..) < 60 { rng.u64(0..=fork + batch) } else { 0 };
            let removed = removed - removed % batch;
            let shorter = fork + mine.min(theirs);
            let mut search = Search::new(JournalId::from_bytes([1; 16]), Position::new(shorter));
            let mut steps = 0;
            while !search.asked().is_empty() {
                assert!(search.asked().len() <= PROBE_POSITIONS_MAX);
                assert!(search.asked().iter().all(|asked| asked.get() <= shorter));
                let held: Vec<_> = search
                    .asked()
                    .iter()
                    .map(|asked| match asked.get() - asked.get() % batch {
                        end if end < removed && end > 0 => Held::Unknown,
                        end if end <= fork => Held::Common(common(end)),
                        _ => Held::Other,
                    })
                    .collect();
                search.narrow(&held);
                steps += 1;
                assert!(steps <= 11, "round {round}");
            }
            let known = fork >= removed || fork == 0;
            let found = search.found().map(|found| found.position.get());
            assert_eq!(found, known.then_some(fork), "round {round}, {removed} removed");
        }
    }

    #[cfg(feature = "test-kit")]
    #[test]
    fn a_search_that_leaves_out_a_position_is_found() {
        planted::plant(Some(Bug::ProbeOffByOne));
        let found = std::panic::catch_unwind(
            the_exact_end_is_found_in_few_steps_whatever_the_histories_are,
        );
        planted::plant(None);
        assert!(found.is_err(), "the planted bug was not found");
    }
}
