//! The journals that a view is made from, and how far it is with each.
//!
//! ```text
//! own journal ──chunk─┐
//! mirror a ─────chunk─┼──▶ one write batch per chunk: rows, and the checkpoints of all journals
//! mirror b ─────chunk─┘
//! ```
//! Most views have one. With several, within each journal the order is the journal's; between them see
//! [`intake`](super::intake).

use std::iter;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::runner::beginning;
use crate::journal::Journal;
use crate::position::{Checkpoint, JournalId, Position};

/// The journals of a view. The first is the one that is meant where nothing else is said.
#[derive(Clone)]
pub(crate) struct Sources {
    first: Journal,
    others: Arc<[Journal]>,
    ids: Arc<[JournalId]>,
}

impl From<Journal> for Sources {
    fn from(first: Journal) -> Self {
        Self { ids: [first.id()].into(), first, others: [].into() }
    }
}

impl Sources {
    /// `None` if one is named twice.
    pub(crate) fn new(first: Journal, others: Vec<Journal>) -> Option<Self> {
        let ids: Arc<[JournalId]> = iter::once(&first).chain(&others).map(Journal::id).collect();
        let is_new = |(n, id)| !ids.iter().take(n).any(|other| other == id);
        let are_new = ids.iter().enumerate().all(is_new);
        are_new.then_some(Self { first, others: others.into(), ids })
    }

    pub(super) const fn first(&self) -> &Journal {
        &self.first
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Journal> {
        iter::once(&self.first).chain(self.others.iter())
    }

    pub(super) fn others(&self) -> &[Journal] {
        &self.others
    }

    pub(super) fn ids(&self) -> &[JournalId] {
        &self.ids
    }

    pub(super) fn get(&self, journal: JournalId) -> Option<&Journal> {
        self.iter().find(|it| it.id() == journal)
    }

    /// Their durable ends.
    pub(super) fn end(&self) -> Checkpoints {
        let others = self.others.iter().map(Journal::end).collect();
        Checkpoints { first: self.first.end(), others }
    }

    /// In front of all of their events.
    pub(super) fn beginning(&self) -> Checkpoints {
        let others = self.others.iter().map(|journal| beginning(journal.id())).collect();
        Checkpoints { first: beginning(self.first.id()), others }
    }

    /// Of a journal of which events were removed: the first position that is left.
    pub(super) fn truncated(&self) -> Option<Position> {
        let mut starts = self.iter().map(|journal| journal.start().position);
        starts.find(|start| *start > Position::START)
    }

    pub(super) fn are_closed(&self) -> bool {
        self.iter().all(Journal::is_closed)
    }
}

/// A place in each journal of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Checkpoints {
    first: Checkpoint,
    others: Vec<Checkpoint>,
}

impl From<Checkpoint> for Checkpoints {
    fn from(first: Checkpoint) -> Self {
        Self { first, others: Vec::new() }
    }
}

impl Checkpoints {
    /// `None` if there is none.
    pub(super) fn of_all(mut all: impl Iterator<Item = Checkpoint>) -> Option<Self> {
        Some(Self { first: all.next()?, others: all.collect() })
    }

    /// That of the first journal.
    pub(super) const fn first(&self) -> Checkpoint {
        self.first
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Checkpoint> {
        iter::once(&self.first).chain(&self.others)
    }

    pub(super) fn of(&self, journal: JournalId) -> Option<Checkpoint> {
        self.iter().copied().find(|it| it.journal == journal)
    }

    /// Where in the journal; at its beginning if it isn't one of them.
    pub(super) fn position(&self, journal: JournalId) -> Position {
        self.of(journal).map_or(Position::START, |it| it.position)
    }

    /// The same, with this one in its journal's place.
    pub(super) fn moved(&self, checkpoint: Checkpoint) -> Self {
        let moved =
            |it: &Checkpoint| if it.journal == checkpoint.journal { checkpoint } else { *it };
        Self { first: moved(&self.first), others: self.others.iter().map(moved).collect() }
    }

    /// How many events are in front of it, of all journals.
    pub(super) fn events(&self) -> u64 {
        self.iter().fold(0, |sum, it| sum.saturating_add(it.position.get()))
    }

    /// How many events are missing up to `until`, whatever there is behind it in one journal or the other.
    pub(super) fn missing_until(&self, until: &Self) -> u64 {
        let missing = |it: &Checkpoint| it.position.since(self.position(it.journal));
        until.iter().map(missing).fold(0, u64::saturating_add)
    }

    /// How many bytes of batches.
    pub(super) fn bytes(&self) -> u64 {
        self.iter().fold(0, |sum, it| sum.saturating_add(it.offset))
    }

    /// Whether these are of the journals with these ids, in any order.
    pub(super) fn are_of(&self, ids: &[JournalId]) -> bool {
        self.iter().count() == ids.len() && ids.iter().all(|id| self.of(*id).is_some())
    }

    /// In the order of these ids, if they are of them.
    pub(super) fn ordered(self, ids: &[JournalId]) -> Self {
        let ordered = ids.iter().filter_map(|id| self.of(*id));
        Self::of_all(ordered).filter(|_| self.are_of(ids)).unwrap_or(self)
    }
}

/// Wakes one who waits for any of several journals.
#[derive(Default)]
pub(super) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    pub(super) fn ring(&self) {
        *self.rung.lock() = true;
        self.changed.notify_all();
    }

    /// Waits until it was rung since the last time.
    pub(super) fn wait(&self, timeout: Duration) {
        let mut rung = self.rung.lock();
        if !*rung {
            let _timed_out = self.changed.wait_for(&mut rung, timeout);
        }
        *rung = false;
    }

    /// Rings whenever `journal` has more, from a thread of its own, as long as somebody else has the bell.
    pub(super) fn listen(
        self: &Arc<Self>,
        journal: Journal,
        tick: Duration,
    ) -> std::io::Result<()> {
        let bell = Arc::downgrade(self);
        let listener = thread::Builder::new().name("view-listener".to_owned());
        let listen = move || {
            let mut seen = Position::START;
            while !journal.is_closed() {
                let end = journal.wait_past(seen, tick).position;
                let Some(bell) = bell.upgrade() else { return };
                if end > seen {
                    seen = end;
                    bell.ring();
                }
            }
            if let Some(bell) = bell.upgrade() {
                bell.ring();
            }
        };
        listener.spawn(listen).map(drop)
    }
}
