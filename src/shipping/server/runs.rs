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
    terms: FeedTerms,
    span: Span,
    run: Arc<MadeRun>,
}

impl Runs {
    pub(super) fn get(&self, span: &Span, sieve: &Sieve) -> Option<Arc<MadeRun>> {
        let made = self.0.lock();
        let is_it = |made: &&Made| {
            made.span.at == span.at
                && made.span.run_bytes == span.run_bytes
                && span.end.is_none_or(|end| made.run.behind == end)
                && made.terms == sieve.terms
        };
        made.iter().find(is_it).map(|made| Arc::clone(&made.run))
    }

    pub(super) fn keep(&self, span: &Span, sieve: &Sieve, run: &Arc<MadeRun>) {
        let mut made = self.0.lock();
        made.push(Made { terms: sieve.terms.clone(), span: *span, run: Arc::clone(run) });
        let size = |made: &[Made]| made.iter().map(|made| made.run.bytes.len()).sum::<usize>();
        while made.len() > 1 && (made.len() > COUNT_MAX || size(&made) > BYTES_MAX) {
            made.remove(0);
        }
    }
}
