//! What a mirror that is being followed has for whoever serves it on, and what a server has for its subscribers.
//!
//! ```text
//!   follow ──▶ mirror ── journal, path ──▶ Relay ◀── which journal? ── server ──▶ subscribers
//!                 └── another handle, another path: bells ──▶ sessions that were told the old one are closed
//! ```
//! Invariants:
//! - A mirror is served as far as it is durable, byte for byte, under its origin's journal id.
//! - Whoever is sent it knows the path by which it comes: when that changes, they connect again and are told.
//! - A handle that the mirror has closed, because its files are about to hold something else, is served no more.
//! - That it hears from its origin, and has all, holds for a moment: who asks later, while nothing was heard, is told so.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::message::Speaker;
use super::mirror::Mirror;
use crate::fs::Fs;
use crate::journal::{Bell, Journal};
use crate::position::{JournalId, NodeId};

/// Stands for the origin, and whoever lies between, in the path of a mirror that hasn't heard of them yet.
const UNKNOWN: NodeId = NodeId::from_bytes([0; 16]);

/// The path of a mirror that hasn't heard from its origin yet.
pub(super) fn path_of(node: NodeId) -> Vec<NodeId> {
    vec![UNKNOWN, node]
}

/// A mirror, as those see it who serve it on.
#[derive(Debug)]
pub(super) struct Relay {
    /// Where its files are.
    pub(super) fs: Arc<dyn Fs>,
    pub(super) dir: PathBuf,
    /// Counts what they have to be told anew.
    generation: AtomicU64,
    offer: Mutex<Offer>,
    standing: Mutex<Standing>,
    bells: Mutex<Bells>,
}

/// How a mirror is with its origin, as far as it knew when it was told something last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Standing {
    /// Unless it hears more; `None`: it doesn't hear from its origin.
    pub(super) hears_until: Option<Instant>,
    /// The same; `None`: it hasn't all that its origin has.
    pub(super) has_all_until: Option<Instant>,
}

impl Standing {
    fn speaker(self, now: Instant) -> Speaker {
        let holds = |until: Option<Instant>| until.is_some_and(|until| now <= until);
        match (holds(self.hears_until), holds(self.has_all_until)) {
            (false, _) => Speaker::RelayApart,
            (true, false) => Speaker::RelayBehind,
            (true, true) => Speaker::Relay,
        }
    }
}

/// What a mirror has at present.
#[derive(Clone, Debug)]
pub(super) struct Offer {
    pub(super) node: NodeId,
    /// `None`: nothing yet, or nothing at present.
    pub(super) journal: Option<Journal>,
    /// There has never been one, and the mirror is being followed: nobody's events are here.
    pub(super) is_new: bool,
    /// Of which journal it is to be a mirror, if that was said.
    pub(super) meant: Option<JournalId>,
    /// The nodes that it comes through, the mirror's last.
    pub(super) path: Vec<NodeId>,
    pub(super) generation: u64,
}

#[derive(Default)]
struct Bells(Vec<Weak<dyn Bell>>);

impl std::fmt::Debug for Bells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Bells").field(&self.0.len()).finish()
    }
}

impl Relay {
    /// Of a mirror that will be this node, if there is none yet; whether it is certain that there is none, not even the
    /// beginning of a copy; and of which journal it is to be, if that was said.
    pub(super) fn new(
        node: NodeId,
        fs: &Arc<dyn Fs>,
        dir: &Path,
        is_new: bool,
        meant: Option<JournalId>,
    ) -> Self {
        let path = path_of(node);
        let offer = Offer { node, journal: None, is_new, meant, path, generation: 0 };
        let (offer, bells) = (Mutex::new(offer), Mutex::default());
        let (fs, dir, generation) = (Arc::clone(fs), dir.to_owned(), AtomicU64::new(0));
        Self { fs, dir, generation, offer, standing: Mutex::default(), bells }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// What there is; a closed journal is about to be another one.
    pub(super) fn offer(&self) -> Offer {
        let mut offer = self.offer.lock().clone();
        offer.journal = offer.journal.filter(|journal| !journal.is_closed());
        offer
    }

    /// How it is with its origin by now.
    pub(super) fn speaker(&self) -> Speaker {
        self.standing.lock().speaker(Instant::now())
    }

    pub(super) fn stands(&self, standing: Standing) {
        *self.standing.lock() = standing;
    }

    /// Rings whenever there is something else.
    pub(super) fn watch(&self, bell: Weak<dyn Bell>) {
        let mut bells = self.bells.lock();
        bells.0.retain(|bell| bell.strong_count() > 0);
        bells.0.push(bell);
    }

    /// The mirror is read from this handle from now on; `None`: it isn't followed any more.
    pub(super) fn publish(&self, journal: Option<&Journal>) {
        self.change(|offer| {
            let is_known = match (&offer.journal, journal) {
                (Some(known), Some(journal)) => known.is_same(journal),
                (known, journal) => known.is_none() && journal.is_none(),
            };
            if let Some(journal) = journal.filter(|journal| journal.node() != offer.node) {
                offer.node = journal.node();
                offer.path = path_of(offer.node);
            }
            offer.journal = journal.cloned();
            offer.is_new = false; // in a moment others may fill its directory
            !is_known
        });
    }

    /// The mirror would have got its journal from itself: what it knew of its path doesn't hold.
    pub(super) fn comes_from_nowhere(&self) {
        self.comes_through(&[UNKNOWN]);
    }

    /// The mirror gets its journal through these nodes.
    pub(super) fn comes_through(&self, path: &[NodeId]) {
        self.change(|offer| {
            let path: Vec<_> = path.iter().copied().chain([offer.node]).collect();
            let is_new = offer.path != path;
            offer.path = path;
            is_new
        });
    }

    fn change(&self, change: impl FnOnce(&mut Offer) -> bool) {
        let mut offer = self.offer.lock();
        if !change(&mut offer) {
            return;
        }
        offer.generation += 1;
        self.generation.store(offer.generation, Ordering::Release);
        drop(offer);
        self.bells.lock().0.iter().filter_map(Weak::upgrade).for_each(|bell| bell.ring());
    }
}

/// What a server serves: journals of this process. The first of them is its own, which those get who don't say which
/// journal they want.
///
/// ```no_run
/// use headwater::shipping::{ServeOptions, Served, serve};
/// let store = headwater::Store::open("shop")?;
/// let orders = store.mirror("orders", "orders.internal:7000")?;
/// let served = Served::from(store.journal()).and(&orders);
/// let server = serve(served, "127.0.0.1:7000", ServeOptions::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Served(pub(super) Vec<Origin>);

/// Where one of them comes from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// From here, or from a mirror at rest.
    Journal(Journal),
    /// From a mirror that is being followed.
    Relay(Arc<Relay>),
}

impl Served {
    /// These, and then those.
    #[must_use]
    pub fn and(mut self, more: impl Into<Self>) -> Self {
        self.0.extend(more.into().0);
        self
    }
}

/// A journal as it is: a store's own, or that of a mirror at rest.
impl From<Journal> for Served {
    fn from(journal: Journal) -> Self {
        Self(vec![Origin::Journal(journal)])
    }
}

impl From<&Journal> for Served {
    fn from(journal: &Journal) -> Self {
        journal.clone().into()
    }
}

/// A mirror, while it is being followed: also one that has yet to be made, and through all that happens to it.
impl From<&Mirror> for Served {
    fn from(mirror: &Mirror) -> Self {
        Self(vec![Origin::Relay(Arc::clone(mirror.relay()))])
    }
}

/// Runs the examples of the manual.
#[cfg(doctest)]
#[doc = include_str!("../../docs/operate/relays.md")]
mod manual {}
