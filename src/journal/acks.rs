//! How much of the journal its mirrors have acknowledged, for those who wait for that.
//!
//! ```text
//! session of a mirror ── note ──▶ node ▸ acknowledged ── reached? wakes ──▶ who waits: is its chain ours? ─▶ counts
//! ```
//! Invariants:
//! - A node counts once, however many sessions it has; the one that began last speaks for it, until it ends.
//! - What a mirror says counts if it is a batch end of this history, its chain included. Whoever waits compares
//!   that; a session never reads the disk for it.
//! - Nothing is kept of those who aren't connected, so it is bounded by the number of connections.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::journal::{Comparison, Journal, TokenError};
use crate::position::{Checkpoint, NodeId, Position, Token};

/// How far waiting for mirrors has come; see [`Journal::wait_mirrored`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "it says whether enough mirrors have the events"]
#[non_exhaustive]
pub struct Mirrored {
    /// The mirrors that have the events, durably; each once.
    pub nodes: Vec<NodeId>,
    /// How many were waited for.
    pub wanted: usize,
}

impl Mirrored {
    /// Whether as many have them as were waited for.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        self.nodes.len() >= self.wanted
    }
}

/// What is known of the mirrors of an open journal.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    state: Mutex<State>,
    /// Something was acknowledged that somebody waits for.
    reached: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many sessions there have been.
    sessions: u64,
    mirrors: BTreeMap<NodeId, Known>,
    /// The nearest position that somebody waits for.
    nearest: Option<Position>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    session: u64,
    acked: Checkpoint,
    /// Up to here its chain was found to be ours.
    proven: Position,
}

impl State {
    /// A session says how far its mirror is. Its number; one that speaks for the first time gets one.
    fn note(&mut self, node: NodeId, session: Option<u64>, acked: Checkpoint) -> u64 {
        let session = session.unwrap_or_else(|| {
            self.sessions += 1;
            self.sessions
        });
        let known = self.mirrors.entry(node);
        let known = known.or_insert(Known { session, acked, proven: Position::START });
        if known.session <= session {
            // One that has less than it had may go on with something else.
            let proven = known.proven.min(acked.position);
            *known = Known { session, acked, proven };
        }
        session
    }

    fn forget(&mut self, node: NodeId, session: u64) {
        if self.mirrors.get(&node).is_some_and(|known| known.session == session) {
            self.mirrors.remove(&node);
        }
    }

    /// What `known` said is of our history.
    fn prove(&mut self, node: NodeId, known: &Known) {
        let same = self.mirrors.get_mut(&node).filter(|now| now.session == known.session);
        if let Some(now) = same {
            now.proven = now.proven.max(known.acked.position);
        }
    }

    /// Those who say that they have everything in front of `position`.
    fn at(&self, position: Position) -> impl Iterator<Item = (NodeId, Known)> {
        let all = self.mirrors.iter().map(|(node, known)| (*node, *known));
        all.filter(move |(_, known)| known.acked.position >= position)
    }
}

impl Acks {
    fn note(&self, node: NodeId, session: Option<u64>, acked: Checkpoint) -> u64 {
        let mut state = self.state.lock();
        let session = state.note(node, session, acked);
        if state.nearest.is_some_and(|nearest| nearest <= acked.position) {
            // Whoever still has to wait says so again.
            state.nearest = None;
            self.reached.notify_all();
        }
        session
    }

    /// Waits until somebody has reached `position` anew; false if it is too late.
    fn wait(
        &self,
        state: &mut MutexGuard<'_, State>,
        position: Position,
        deadline: Option<Instant>,
    ) -> bool {
        state.nearest = Some(state.nearest.map_or(position, |nearest| nearest.min(position)));
        match deadline {
            None => self.reached.wait(state),
            Some(deadline) if Instant::now() >= deadline => return false,
            Some(deadline) => drop(self.reached.wait_until(state, deadline)),
        }
        true
    }
}

impl Journal {
    /// Waits until `mirrors` distinct mirrors have the append that gave `token`, for `timeout` at most, and tells which
    /// have: a service that answers only then has lost nothing if this machine is lost for good.
    ///
    /// What counts: a mirror that subscribes *here* (not to one of our mirrors), of the whole journal; that says, or
    /// said when it subscribed, that it has synced as much; whose chain there is ours; once per node id, while it is
    /// connected. A peer that may subscribe is believed about its own disk.
    ///
    /// Too few in time is no error, but the answer: the events are durable here, were before this began, and reach
    /// the others when they come back. Don't append them again. For the same reason this hides nothing: readers,
    /// views and mirrors see events as soon as they are durable here, long before enough mirrors have them.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use headwater::{Append, ExpectedRevision, NewEvent, Store, StreamId};
    /// # let dir = tempfile::tempdir()?;
    /// # let patience = Duration::from_secs(10);
    /// let orders = Store::create(dir.path().join("orders"))?;
    /// let server = orders.serve("127.0.0.1:0")?;
    /// # let customers = Store::create(dir.path().join("customers"))?;
    /// # let _mirror = customers.mirror("orders", server.local_addr().to_string())?;
    /// let placed = NewEvent::json("order.placed", &1250)?;
    /// let order = StreamId::new("order-7")?;
    /// let appended = orders.append(&Append::to(&order, ExpectedRevision::NoStream, [placed]))?;
    /// let mirrored = orders.wait_mirrored(&appended.token(), 1, patience)?;
    /// if !mirrored.is_enough() {
    ///     println!("accepted, but on {} other machines only", mirrored.nodes.len());
    /// }
    /// # assert!(mirrored.is_enough());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`TokenError`] if the token isn't of this history, or the journal can't be read; and, of a buffered append,
    /// if it isn't even durable here in time.
    pub fn wait_mirrored(
        &self,
        token: &Token,
        mirrors: usize,
        timeout: Duration,
    ) -> Result<Mirrored, TokenError> {
        let deadline = Instant::now().checked_add(timeout);
        self.wait_for(token, timeout)?;
        let position = token.position;
        let (mut nodes, mut refused) = (BTreeSet::new(), BTreeMap::new());
        let acks = &self.0.acks;
        let mut state = acks.state.lock();
        loop {
            let proven = state.at(position).filter(|(_, known)| known.proven >= position);
            nodes.extend(proven.map(|(node, _)| node));
            if nodes.len() >= mirrors {
                break;
            }
            let is_new = |(node, known): &(NodeId, Known)| {
                !nodes.contains(node) && refused.get(node) != Some(&known.acked)
            };
            let said = state.at(position).find(is_new);
            if let Some((node, known)) = said {
                let compared = MutexGuard::unlocked(&mut state, || self.compare(&known.acked));
                match compared.map_err(TokenError::Journal)? {
                    Comparison::Equal => {
                        nodes.insert(node);
                        state.prove(node, &known);
                    }
                    _ => drop(refused.insert(node, known.acked)),
                }
            } else if !acks.wait(&mut state, position, deadline) {
                break;
            }
        }
        Ok(Mirrored { nodes: nodes.into_iter().collect(), wanted: mirrors })
    }

    /// Where a session of a mirror says how far it is.
    pub(crate) fn ack_keeper(&self) -> AckKeeper {
        AckKeeper { journal: self.clone(), noted: None }
    }
}

/// Keeps what one session of a mirror of the whole journal has acknowledged, until the session ends.
#[derive(Debug)]
pub(crate) struct AckKeeper {
    journal: Journal,
    noted: Option<(NodeId, u64, Checkpoint)>,
}

impl AckKeeper {
    /// Which node it is and what it has acknowledged, as far as both are known. What was noted before costs nothing.
    pub(crate) fn note(&mut self, node: Option<NodeId>, acked: Option<Checkpoint>) {
        let Some((node, acked)) = node.zip(acked) else { return };
        let before = self.noted.filter(|(before, ..)| *before == node);
        // Our own node is no other place where the events would be.
        if before.is_some_and(|(.., before)| before == acked) || node == self.journal.node() {
            return;
        }
        let session = before.map(|(_, session, _)| session);
        let session = self.journal.0.acks.note(node, session, acked);
        self.noted = Some((node, session, acked));
    }
}

impl Drop for AckKeeper {
    fn drop(&mut self) {
        if let Some((node, session, _)) = self.noted {
            self.journal.0.acks.state.lock().forget(node, session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::files::Mark;
    use crate::position::JournalId;

    fn at(position: u64) -> Checkpoint {
        let start = Mark::start(JournalId::from_bytes([1; 16])).end;
        Checkpoint { position: Position::new(position), ..start }
    }

    fn node(number: u8) -> NodeId {
        NodeId::from_bytes([number; 16])
    }

    #[test]
    fn the_session_that_began_last_speaks_for_its_node_until_it_ends() {
        let mut state = State::default();
        let acked =
            |state: &State| state.mirrors.get(&node(1)).map(|known| known.acked.position.get());
        let first = state.note(node(1), None, at(9));
        let second = state.note(node(1), None, at(4)); // it was restored, and the first one's socket isn't closed yet
        assert_eq!(state.note(node(1), Some(first), at(12)), first);
        assert_eq!(acked(&state), Some(4));
        state.forget(node(1), first);
        state.note(node(1), Some(second), at(5));
        assert_eq!(acked(&state), Some(5));
        state.forget(node(1), second);
        assert_eq!(acked(&state), None);
    }

    #[test]
    fn what_was_proven_is_not_of_what_a_mirror_has_lost_since() {
        let mut state = State::default();
        let first = state.note(node(1), None, at(9));
        let known = state.mirrors[&node(1)];
        state.prove(node(1), &known);
        state.note(node(1), Some(first), at(12));
        assert_eq!(state.mirrors[&node(1)].proven, Position::new(9));
        let second = state.note(node(1), None, at(4));
        assert_eq!(state.mirrors[&node(1)].proven, Position::new(4));
        state.note(node(1), Some(second), at(12));
        state.prove(node(1), &known); // of the first session, compared meanwhile
        assert_eq!(state.mirrors[&node(1)].proven, Position::new(4));
    }
}
