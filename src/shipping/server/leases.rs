//! Keeps the leases of subscribers, durably, on a thread of its own: from the subscription on, before the first byte
//! is sent; again every few seconds; and at the end. What waits is noted with one write.

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::Shared;
use super::connection::Connection;
use crate::env;
use crate::format::leases::Lease;
use crate::journal::leases::Stage;
use crate::position::Position;

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
    id: [u8; 16],
    position: Position,
    /// It was noted once.
    begun: bool,
}

#[derive(Debug)]
pub(super) struct LeaseKeeper {
    shared: Arc<Shared>,
    kept: HashMap<usize, Kept>,
}

impl LeaseKeeper {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), kept: HashMap::new() }
    }

    /// Until nobody sends notes any more.
    pub(super) fn run(mut self, notes: &Receiver<Note>, back: &Sender<Box<Connection>>) {
        while let Ok(first) = notes.recv() {
            let (mut begun, mut ended, mut due) = (Vec::new(), Vec::new(), Vec::new());
            for note in std::iter::once(first).chain(notes.try_iter()) {
                match note {
                    Note::Begins(connection) => {
                        due.extend(
                            connection.lease().map(|lease| (connection.token, lease, false)),
                        );
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
            let ended: Vec<_> = ended.iter().filter_map(|token| self.kept.remove(token)).collect();
            self.end(&ended);
            begun.into_iter().for_each(|connection| drop(back.send(connection)));
            self.shared.wake();
        }
        let left: Vec<_> = self.kept.drain().map(|(_, kept)| kept).collect();
        self.end(&left);
    }

    fn end(&self, ended: &[Kept]) {
        ended.iter().for_each(|kept| self.shared.journal.end_lease(&kept.id));
    }

    /// A failure to write them is made good next time; meanwhile this process knows them.
    fn note(&mut self, due: &[(usize, Lease, bool)]) {
        let heard_at_us = env::now_us();
        // A mirror may have come back before its last connection was given up: what that had reached doesn't count.
        let mut latest: HashMap<[u8; 16], usize> = HashMap::new();
        let all = self.kept.iter().map(|(token, kept)| (kept.id, *token));
        for (id, token) in all.chain(due.iter().map(|(token, lease, _)| (lease.id, *token))) {
            latest.entry(id).and_modify(|it| *it = token.max(*it)).or_insert(token);
        }
        let mut notes = Vec::with_capacity(due.len());
        for (token, lease, ends) in due {
            let kept = self.kept.get(token);
            let is_known = *ends && kept.is_some_and(|kept| kept.position == lease.position);
            if is_known || latest.get(&lease.id) != Some(token) {
                continue;
            }
            let stage = match (kept.is_some_and(|kept| kept.begun), ends) {
                (false, _) => Stage::Begins,
                (true, false) => Stage::GoesOn,
                (true, true) => Stage::Ends,
            };
            notes.push((Lease { heard_at_us, ..*lease }, stage));
        }
        let noted = !notes.is_empty() && self.shared.journal.note_leases(&notes).is_ok();
        for (token, lease, _) in due {
            let kept = self.kept.entry(*token);
            let kept =
                kept.or_insert(Kept { id: lease.id, position: lease.position, begun: false });
            kept.position = lease.position;
            kept.begun |= noted;
        }
    }
}
