//! Runs that were made last: those who are at the same place of the same feed are sent the same, and what is looked at
//! and published for one of them isn't for the next.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::shipping::message::FeedTerms;
use crate::shipping::session::{MadeRun, Sieve, Span};

/// So many bytes of them are kept; one run always is.
const BYTES_MAX: usize = 4 << 20;
/// And so many.
const COUNT_MAX: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Runs(Mutex<Vec<Made>>);

#[derive(Debug)]
struct Made {
    /// Of which the run is: a mirror that has set its tail aside goes on differently from the same place.
    journal: usize,
    terms: Arc<FeedTerms>,
    span: Span,
    run: Arc<MadeRun>,
}

impl Runs {
    /// `journal` is the number of the server's feed, which changes with what can be read of the journal.
    pub(super) fn get(&self, journal: usize, span: &Span, sieve: &Sieve) -> Option<Arc<MadeRun>> {
        let made = self.0.lock();
        let is_it = |made: &&Made| {
            made.journal == journal
                && made.span.at == span.at
                && made.span.run_bytes == span.run_bytes
                && span.end.is_none_or(|end| made.run.behind == end)
                && made.terms == sieve.terms
        };
        made.iter().find(is_it).map(|made| Arc::clone(&made.run))
    }

    pub(super) fn keep(&self, journal: usize, span: &Span, sieve: &Sieve, run: &Arc<MadeRun>) {
        let mut made = self.0.lock();
        let (terms, span, run) = (Arc::clone(&sieve.terms), *span, Arc::clone(run));
        made.push(Made { journal, terms, span, run });
        let size = |made: &[Made]| made.iter().map(|made| made.run.bytes.len()).sum::<usize>();
        while made.len() > 1 && (made.len() > COUNT_MAX || size(&made) > BYTES_MAX) {
            made.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::files::Mark;
    use crate::position::{Checkpoint, JournalId, Position};
    use crate::shipping::filter::{FeedFilter, FeedPart};

    fn sieve(name: &str) -> Sieve {
        let filter = FeedFilter::from(FeedPart::types([name]));
        Sieve::new(Arc::new(FeedTerms { filter, shape: None }), None)
    }

    fn run(position: u64, len: usize) -> Arc<MadeRun> {
        let start = Mark::start(JournalId::from_bytes([1; 16])).end;
        let behind = Checkpoint { position: Position::new(position), ..start };
        Arc::new(MadeRun { bytes: vec![0; len], behind })
    }

    #[test]
    fn a_run_is_for_those_at_its_place_of_its_feed_of_its_history_only() {
        let at = Mark::start(JournalId::from_bytes([1; 16])).end;
        let span = Span { at, run_bytes: 100, end: None };
        let (runs, made) = (Runs::default(), run(5, 10));
        runs.keep(1, &span, &sieve("a"), &made);
        assert!(Arc::ptr_eq(&runs.get(1, &span, &sieve("a")).unwrap(), &made));
        assert!(runs.get(1, &span, &sieve("b")).is_none());
        assert!(runs.get(2, &span, &sieve("a")).is_none(), "another history from the same place");
        let elsewhere = Span { at: run(3, 0).behind, ..span };
        assert!(runs.get(1, &elsewhere, &sieve("a")).is_none());
        let rest = |position| Span { end: Some(run(position, 0).behind), ..span };
        assert!(runs.get(1, &rest(5), &sieve("a")).is_some());
        assert!(runs.get(1, &rest(4), &sieve("a")).is_none(), "a part of another run was sent");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_last_always_is() {
        let at = Mark::start(JournalId::from_bytes([1; 16])).end;
        let span = Span { at, run_bytes: 100, end: None };
        let runs = Runs::default();
        for name in ["a", "b", "c"] {
            runs.keep(1, &span, &sieve(name), &run(5, BYTES_MAX - 1));
            assert!(runs.get(1, &span, &sieve(name)).is_some());
            assert_eq!(runs.0.lock().len(), 1);
        }
        (0..2 * COUNT_MAX).for_each(|n| runs.keep(1, &span, &sieve(&n.to_string()), &run(5, 1)));
        assert_eq!(runs.0.lock().len(), COUNT_MAX);
    }
}
