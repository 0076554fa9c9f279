//! Who has been here, and why connections ended: counted since the server runs.

use std::collections::HashMap;

use crate::position::NodeId;
use crate::shipping::observe::{EndReason, Ends};

/// So many nodes are remembered; whoever comes with ever new ids pushes out those that have come least.
const NODES_MAX: usize = 4096;

/// The connections of one node.
#[derive(Clone, Debug, Default)]
pub(super) struct Visits {
    /// How many subscriptions were granted.
    pub(super) sessions: u64,
    /// Why those that are over ended.
    pub(super) ends: Ends,
}

#[derive(Debug, Default)]
pub(super) struct Guests {
    nodes: HashMap<NodeId, Visits>,
    /// Connections that have come to no subscription.
    pub(super) refused: Ends,
    /// Those that have.
    pub(super) ended: Ends,
}

impl Guests {
    /// A subscription was granted.
    pub(super) fn came(&mut self, node: Option<NodeId>) {
        let Some(node) = node else { return };
        if self.nodes.len() >= NODES_MAX && !self.nodes.contains_key(&node) {
            let rarest = self.nodes.iter().min_by_key(|(_, visits)| visits.sessions);
            if let Some(rarest) = rarest.map(|(node, _)| *node) {
                self.nodes.remove(&rarest);
            }
        }
        self.nodes.entry(node).or_default().sessions += 1;
    }

    /// The subscription is over.
    pub(super) fn went(&mut self, node: Option<NodeId>, reason: EndReason) {
        self.ended.count(reason);
        if let Some(visits) = node.and_then(|node| self.nodes.get_mut(&node)) {
            visits.ends.count(reason);
        }
    }

    pub(super) fn of(&self, node: Option<NodeId>) -> Visits {
        node.and_then(|node| self.nodes.get(&node)).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_with_ever_new_ids_is_forgotten_before_those_who_come_again() {
        let mut guests = Guests::default();
        let node = |n: u32| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            Some(NodeId::from_bytes(id))
        };
        (0..2).for_each(|_| guests.came(node(0)));
        for n in 1..=NODES_MAX as u32 {
            guests.came(node(n));
            guests.went(node(n), EndReason::Disconnected);
        }
        assert_eq!((guests.nodes.len(), guests.of(node(0)).sessions), (NODES_MAX, 2));
        let last = guests.of(node(NODES_MAX as u32));
        assert_eq!((last.sessions, last.ends.of(EndReason::Disconnected)), (1, 1));
        guests.went(None, EndReason::Timeout);
        guests.came(None);
        assert_eq!(guests.ended.total(), NODES_MAX as u64 + 1);
    }
}
