//! Keeps the leases of subscribers, durably, on a thread of its own: from the subscription on, before the first byte
//! is sent; again every few seconds; and at the end. What waits is noted with one write.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::Shared;
use super::connection::Connection;
use super::feeds::Feed;
use crate::env;
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
            self.note(&due);
            ended.iter().filter_map(|token| self.kept.remove(token)).for_each(|kept| kept.end());
            begun.into_iter().for_each(|connection| drop(back.send(connection)));
            shared.wake();
        }
        self.kept.drain().for_each(|(_, kept)| kept.end());
    }

    /// A failure to write them is made good next time; meanwhile this process knows them.
    fn note(&mut self, due: &[(usize, Lease, bool)]) {
        let heard_at_us = env::now_us();
        // A mirror may have come back before its last connection was given up: what that had reached doesn't count.
        // Of each journal for itself: whoever may have another one can't end it.
        let mut latest: HashMap<(usize, [u8; 16]), usize> = HashMap::new();
        for (token, kept) in &self.kept {
            let latest = latest.entry((kept.feed.number, kept.lease.id)).or_insert(*token);
            *latest = (*token).max(*latest);
        }
        let mut notes: BTreeMap<usize, (Arc<Feed>, Vec<(Lease, Stage)>)> = BTreeMap::new();
        for (token, lease, ends) in due {
            let Some(kept) = self.kept.get(token) else { continue };
            let is_known = *ends && kept.begun && kept.lease.position == lease.position;
            if is_known || latest.get(&(kept.feed.number, lease.id)) != Some(token) {
                continue;
            }
            let stage = match (kept.begun, ends) {
                (false, _) => Stage::Begins,
                (true, false) => Stage::GoesOn,
                (true, true) => Stage::Ends,
            };
            let of_feed = notes.entry(kept.feed.number);
            let (_, notes) = of_feed.or_insert_with(|| (Arc::clone(&kept.feed), Vec::new()));
            notes.push((Lease { heard_at_us, ..*lease }, stage));
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
