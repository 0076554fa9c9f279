//! How far the views of a journal have applied it, for a mirror that tells its origin.
//!
//! ```text
//! view ── note ──▶ Applier ╌╌weak╌╌▶ journal ◀── how far have all got? ── mirror ──▶ ACK
//! ```
//! A note is one store into an atomic, and nobody is woken: following costs the same, whoever looks. An applier that is gone
//! is forgotten when the next one comes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::journal::Journal;
use crate::position::Position;

/// It follows the journal no more.
const NOWHERE: u64 = u64::MAX;

/// Those who apply a journal at present.
#[derive(Debug, Default)]
pub(super) struct Appliers(Mutex<Vec<Weak<AtomicU64>>>);

/// Where a view says how far it has applied a journal, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Applier(Arc<AtomicU64>);

impl Applier {
    pub(crate) fn note(&self, behind: Position) {
        self.0.store(behind.get(), Ordering::Relaxed);
    }

    /// It goes no further, and isn't to be waited for.
    pub(crate) fn leave(&self) {
        self.0.store(NOWHERE, Ordering::Relaxed);
    }
}

impl Journal {
    /// Somebody begins to apply this journal, and has got as far as `behind`.
    pub(crate) fn applier(&self, behind: Position) -> Applier {
        let applied = Arc::new(AtomicU64::new(behind.get()));
        let mut appliers = self.0.appliers.0.lock();
        appliers.retain(|it| it.strong_count() > 0);
        appliers.push(Arc::downgrade(&applied));
        Applier(applied)
    }

    /// Behind the last event that everybody who applies this journal has applied; `None` if there is nobody.
    pub(crate) fn applied(&self) -> Option<Position> {
        let appliers = self.0.appliers.0.lock();
        let applied = appliers.iter().filter_map(|it| Some(it.upgrade()?.load(Ordering::Relaxed)));
        let least = applied.filter(|it| *it != NOWHERE).min()?;
        // One that is ahead of its mirror waits for it.
        Some(Position::new(least).min(self.end().position))
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::event::{ExpectedRevision, NewEvent, StreamId};
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;

    #[test]
    fn the_last_of_those_who_apply_counts_while_it_does() {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create(&fs, Path::new("/journal"), &options).unwrap();
        for _ in 0..5 {
            let event = NewEvent::raw("happened", *b"so").unwrap();
            let to = StreamId::new("a").unwrap();
            appender.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
        }
        let journal = appender.journal();
        assert_eq!(journal.applied(), None);
        let (first, second) = (journal.applier(Position::new(4)), journal.applier(Position::START));
        assert_eq!(journal.applied(), Some(Position::START));
        second.note(Position::new(9));
        assert_eq!(journal.applied(), Some(Position::new(4)));
        first.leave();
        assert_eq!(journal.applied(), Some(Position::new(5)), "no further than the journal goes");
        drop((first, second));
        assert_eq!(journal.applied(), None);
    }
}
