//! Keeps the leases of subscribers, durably, on a thread of its own: from the subscription on, before the first byte
//! is sent; again every few seconds; and at the end. What waits is noted with one write.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::Shared;
use super::connection::Connection;
use super::feeds::Feed;
use crate::format::leases::Lease;
use crate::journal::leases::Stage;

/// What the loop tells the keeper, of connections by their numbers.
#[derive(Debug)]
pub(super) enum Note {
    /// The first byte may be sent as soon as this is noted: the connection comes back then.
    Begins(Box<Connection>),
    /// So far they are.
    GoesOn(Vec<(usize, Lease)>),
    /// That far it came.
    Ends(usize, Lease),
}

/// What the keeper knows of a connection.
#[derive(Debug)]
struct Kept {
    feed: Arc<Feed>,
    lease: Lease,
    /// It was noted once.
    begun: bool,
}

#[derive(Debug, Default)]
pub(super) struct LeaseKeeper {
    kept: HashMap<usize, Kept>,
}

impl Kept {
    fn end(&self) {
        self.feed.journal.end_lease(&self.lease.id);
    }
}

impl LeaseKeeper {
    /// Until nobody sends notes any more.
    pub(super) fn run(
        mut self,
        shared: &Shared,
        notes: &Receiver<Note>,
        back: &Sender<Box<Connection>>,
    ) {
        while let Ok(first) = notes.recv() {
            let (mut begun, mut ended, mut due) = (Vec::new(), Vec::new(), Vec::new());
            for note in std::iter::once(first).chain(notes.try_iter()) {
                match note {
                    Note::Begins(connection) => {
                        let (token, lease) = (connection.token, connection.lease());
                        if let Some((feed, lease)) = connection.feed.clone().zip(lease) {
                            self.kept.insert(token, Kept { feed, lease, begun: false });
                            due.push((token, lease, false));
                        }
                        begun.push(connection);
                    }
                    Note::GoesOn(leases) => {
                        due.extend(leases.into_iter().map(|(token, lease)| (token, lease, false)));
                    }
                    Note::Ends(token, lease) => {
                        due.push((token, lease, true));
                        ended.push(token);
                    }
                }
            }
            // A failure is made good next time, and a panic is one: without this thread nobody would be sent anything.
            drop(catch_unwind(AssertUnwindSafe(|| self.note(&due))));
            ended.iter().filter_map(|token| self.kept.remove(token)).for_each(|kept| kept.end());
            begun.into_iter().for_each(|connection| drop(back.send(connection)));
            shared.wake();
        }
        self.kept.drain().for_each(|(_, kept)| kept.end());
    }

    /// A failure to write them is made good next time; meanwhile this process knows them.
    fn note(&mut self, due: &[(usize, Lease, bool)]) {
        // A mirror may have come back before its last connection was given up: what that had reached doesn't count.
        // Of each journal for itself: whoever may have another one can't end it.
        let key = |kept: &Kept| (kept.feed.number, kept.lease.id, kept.lease.feed);
        let mut latest = HashMap::new();
        for (token, kept) in &self.kept {
            let latest = latest.entry(key(kept)).or_insert(*token);
            *latest = (*token).max(*latest);
        }
        let mut notes: BTreeMap<usize, (Arc<Feed>, Vec<(Lease, Stage)>)> = BTreeMap::new();
        for (token, lease, ends) in due {
            let Some(kept) = self.kept.get(token) else { continue };
            let is_known = *ends && kept.begun && kept.lease.position == lease.position;
            if is_known || latest.get(&key(kept)) != Some(token) {
                continue;
            }
            let stage = match (kept.begun, ends) {
                (false, _) => Stage::Begins,
                (true, false) => Stage::GoesOn,
                (true, true) => Stage::Ends,
            };
            let of_feed = notes.entry(kept.feed.number);
            let (_, notes) = of_feed.or_insert_with(|| (Arc::clone(&kept.feed), Vec::new()));
            notes.push((*lease, stage));
        }
        // One write for each journal.
        notes.retain(|_, (feed, notes)| feed.journal.note_leases(notes).is_ok());
        for (token, lease, _) in due {
            if let Some(kept) = self.kept.get_mut(token) {
                kept.lease = *lease;
                kept.begun |= notes.contains_key(&kept.feed.number);
            }
        }
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
#[allow(clippy::unwrap_used, reason = "tests: a failure is a panic")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::fs::Fs;
    use crate::fs::sim::SimFs;
    use crate::journal::Appender;
    use crate::options::JournalOptions;
    use crate::position::Position;

    fn appender() -> Appender {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        Appender::create(&fs, Path::new("/journal"), &options).unwrap()
    }

    fn lease(feed: bool, position: u64) -> Lease {
        let position = Position::new(position);
        Lease { id: [7; 16], nameless: false, feed, position, offset: 0, heard_at_us: 0 }
    }

    fn noted(appender: &Appender) -> Vec<(bool, u64)> {
        let leases = appender.journal().leases().unwrap();
        let mut all: Vec<_> = leases.iter().map(|it| (it.feed, it.position.get())).collect();
        all.sort_unstable();
        all
    }

    /// One node may follow several journals, and have a mirror and a feed of one: each connection's lease goes on.
    #[test]
    fn of_one_node_each_journal_and_each_feed_has_a_lease_of_its_own() {
        let (one, other) = (appender(), appender());
        let of = [(&one, 1, false), (&one, 1, true), (&other, 2, false)];
        let mut keeper = LeaseKeeper::default();
        for (token, (appender, number, feed)) in of.into_iter().enumerate() {
            let feed = (Feed::of(number, appender.journal()), lease(feed, 0));
            keeper.kept.insert(token, Kept { feed: feed.0, lease: feed.1, begun: false });
        }
        for position in [0, 5] {
            let due = of.iter().enumerate();
            let due: Vec<_> =
                due.map(|(token, it)| (token, lease(it.2, position), false)).collect();
            keeper.note(&due);
            assert_eq!(noted(&one), [(false, position), (true, position)]);
            assert_eq!(noted(&other), [(false, position)]);
        }
        // The same node again, of the same kind and journal: what it had before doesn't count.
        let again = Kept { feed: Feed::of(1, one.journal()), lease: lease(false, 6), begun: true };
        keeper.kept.insert(9, again);
        keeper.note(&[(0, lease(false, 8), false), (1, lease(true, 8), false)]);
        assert_eq!(noted(&one), [(false, 5), (true, 8)]);
    }

    /// It may be long ago, while a worker has its connection.
    #[test]
    fn what_is_noted_is_when_the_peer_was_heard() {
        let appender = appender();
        let mut keeper = LeaseKeeper::default();
        let feed = Feed::of(1, appender.journal());
        keeper.kept.insert(1, Kept { feed, lease: lease(false, 0), begun: false });
        for heard_at_us in [1_000_000, 1_000_000, 9_000_000] {
            keeper.note(&[(1, Lease { heard_at_us, ..lease(false, 3) }, false)]);
            let leases = appender.journal().leases().unwrap();
            let heard: Vec<_> = leases.iter().map(|lease| lease.heard_at_us).collect();
            assert_eq!(heard, [heard_at_us]);
        }
    }
}
