//! The journals that a server has, and which of them a subscriber gets.
//!
//! A feed is one journal as it is told to subscribers: its handle, and the path by which it comes. When a mirror has
//! another of either, its feed is over: its subscribers are told to connect again, and get the next one.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::Shared;
use crate::format::batch::{BatchRef, Link};
use crate::format::files::{Mark, Role, Witness};
use crate::format::segment::SegmentPage;
use crate::fs::Fs;
use crate::journal::{Bell, Comparison, Journal};
use crate::position::{Checkpoint, JournalId, NodeId, Position};
use crate::shipping::message::Speaker;
use crate::shipping::relay::{Origin, Relay, Served, path_of};
use crate::shipping::session::{Source, SourceError};

#[derive(Debug)]
pub(super) struct Feed {
    pub(super) number: usize,
    pub(super) journal: Journal,
    /// The nodes that it comes through, this one last.
    pub(super) path: Vec<NodeId>,
    /// Of a mirror that is being followed, and what of it this is.
    relay: Option<(Arc<Relay>, u64)>,
    /// The durable end has moved since the loop looked.
    rung: AtomicBool,
    server: Weak<Shared>,
}

impl Feed {
    /// What was told of it doesn't hold any more.
    pub(super) fn is_over(&self) -> bool {
        self.relay.as_ref().is_some_and(|(relay, of)| relay.generation() != *of)
    }

    pub(super) fn speaker(&self) -> Speaker {
        match (&self.relay, self.journal.role()) {
            (Some((relay, _)), _) => relay.speaker(),
            (None, Role::Mirror) => Speaker::RelayApart,
            (None, Role::Origin | Role::Feed) => Speaker::Origin,
        }
    }

    /// Whether the durable end has moved; asked once.
    pub(super) fn has_rung(&self) -> bool {
        self.rung.swap(false, Ordering::AcqRel)
    }
}

#[cfg(all(test, feature = "test-kit", not(shuttle)))]
impl Feed {
    pub(super) fn of(number: usize, journal: &Journal) -> Arc<Self> {
        let (journal, path) = (journal.clone(), vec![journal.node()]);
        let (rung, server) = (AtomicBool::new(false), Weak::new());
        Arc::new(Self { number, journal, path, relay: None, rung, server })
    }
}

impl Bell for Feed {
    fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        if let Some(server) = self.server.upgrade() {
            server.wake();
        }
    }
}

/// What somebody who asks for a journal gets.
#[derive(Debug)]
pub(super) enum Choice {
    Feed(Arc<Feed>),
    /// What is to be served may turn out to be that journal. With `has_none` it is certain that nothing of it is here yet.
    NotYet {
        has_none: bool,
    },
    /// Nothing, for whatever reason.
    Denied,
}

#[derive(Debug, Default)]
pub(super) struct Feeds(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    all: Vec<(Origin, Option<Arc<Feed>>)>,
    next: usize,
}

impl Feeds {
    pub(super) fn add(&self, served: Served, server: &Arc<Shared>) {
        let mut known = self.0.lock();
        for origin in served.0 {
            if let Origin::Relay(relay) = &origin {
                let bell: Weak<dyn Bell> = Arc::<Shared>::downgrade(server);
                relay.watch(bell);
            }
            known.all.push((origin, None));
        }
    }

    /// The first of them: the server's own.
    pub(super) fn own(&self, server: &Arc<Shared>) -> Option<Arc<Feed>> {
        self.0.lock().current(server).first().and_then(Presence::feed).cloned()
    }

    /// Where the files of the first of them are.
    pub(super) fn home(&self) -> Option<(Arc<dyn Fs>, PathBuf)> {
        match &self.0.lock().all.first()?.0 {
            Origin::Journal(journal) => Some((Arc::clone(journal.fs()), journal.dir().to_owned())),
            Origin::Relay(relay) => Some((Arc::clone(&relay.fs), relay.dir.clone())),
        }
    }

    /// The node by which the server is known.
    pub(super) fn node(&self) -> NodeId {
        match self.0.lock().all.first() {
            Some((Origin::Journal(journal), _)) => journal.node(),
            Some((Origin::Relay(relay), _)) => relay.offer().node,
            None => NodeId::random(),
        }
    }

    /// The journal that was asked for, if it is here and `may` be had; which of both it isn't shows in nothing.
    /// Whoever asks for none, or for another one than there is, gets the server's own, and compares.
    pub(super) fn choose(
        &self,
        wanted: Option<JournalId>,
        may: impl Fn(&JournalId) -> bool,
        server: &Arc<Shared>,
    ) -> Choice {
        let current = self.0.lock().current(server);
        let feeds = || current.iter().filter_map(Presence::feed);
        let found = match wanted {
            Some(id) => feeds().find(|feed| feed.journal.id() == id),
            None => current.first().and_then(Presence::feed),
        };
        if let Some(feed) = found.filter(|feed| may(&feed.journal.id())) {
            return Choice::Feed(Arc::clone(feed));
        }
        // What a mirror that has never had a journal lacks is known, if it is certain that this one was to be there.
        let is_to_be = |wanted: JournalId| {
            let is_it = |now: &Presence| match now {
                Presence::New(None) => current.len() == 1,
                Presence::New(Some(meant)) => *meant == wanted,
                Presence::Feed(_) | Presence::Absent => false,
            };
            let is_known = |now: &Presence| !matches!(now, Presence::Absent);
            current.iter().any(is_it) && current.iter().all(is_known)
        };
        let has_none = found.is_none() && wanted.is_some_and(|id| may(&id) && is_to_be(id));
        match current.first() {
            _ if feeds().count() < current.len() => Choice::NotYet { has_none },
            Some(Presence::Feed(own)) if may(&own.journal.id()) => Choice::Feed(Arc::clone(own)),
            Some(_) => Choice::Denied,
            None => Choice::NotYet { has_none: false },
        }
    }
}

/// A journal as it is served at one moment.
enum Presence {
    Feed(Arc<Feed>),
    /// There has never been one; which it is to be, if that was said.
    New(Option<JournalId>),
    /// It isn't here at present, and what it holds isn't known.
    Absent,
}

impl Presence {
    const fn feed(&self) -> Option<&Arc<Feed>> {
        match self {
            Self::Feed(feed) => Some(feed),
            _ => None,
        }
    }
}

impl Known {
    /// Every journal as it is now.
    fn current(&mut self, server: &Arc<Shared>) -> Vec<Presence> {
        let Self { all, next } = self;
        let renew = |(origin, feed): &mut (Origin, Option<Arc<Feed>>)| {
            let (journal, path, relay) = match origin {
                Origin::Journal(journal) if feed.is_none() => {
                    let path = match journal.role() {
                        Role::Mirror => path_of(journal.node()),
                        Role::Origin | Role::Feed => vec![journal.node()],
                    };
                    (journal.clone(), path, None)
                }
                Origin::Journal(_) => return feed.clone().map_or(Presence::Absent, Presence::Feed),
                Origin::Relay(relay) => {
                    let offer = relay.offer();
                    let Some(journal) = offer.journal else {
                        *feed = None;
                        return if offer.is_new {
                            Presence::New(offer.meant)
                        } else {
                            Presence::Absent
                        };
                    };
                    if let Some(feed) = feed.as_ref().filter(|feed| !feed.is_over()) {
                        return Presence::Feed(Arc::clone(feed));
                    }
                    (journal, offer.path, Some((Arc::clone(relay), offer.generation)))
                }
            };
            *next += 1;
            let (rung, server) = (AtomicBool::new(false), Arc::downgrade(server));
            let new = Arc::new(Feed { number: *next, journal, path, relay, rung, server });
            *feed = Some(Arc::clone(&new));
            Presence::Feed(new)
        };
        all.iter_mut().map(renew).collect()
    }
}

/// What there is for those who haven't said what they want.
pub(super) struct Nothing;

impl Source for Nothing {
    fn end(&self) -> Checkpoint {
        Mark::start(JournalId::from_bytes([0; 16])).end
    }

    fn start(&self) -> Checkpoint {
        self.end()
    }

    fn is_closed(&self) -> bool {
        false
    }

    fn may_wait(&self) -> bool {
        false
    }

    fn compare(&mut self, _: &Checkpoint) -> Result<Comparison, SourceError> {
        Err(SourceError::Storage)
    }

    fn compare_witness(&mut self, _: &Witness) -> Result<Comparison, SourceError> {
        Err(SourceError::Storage)
    }

    fn batch_end_at(&mut self, _: Position) -> Result<Option<Link>, SourceError> {
        Err(SourceError::Storage)
    }

    fn seek(&mut self, _: Position) -> Result<(), SourceError> {
        Err(SourceError::Storage)
    }

    fn next_batch(
        &mut self,
        _: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        Err(SourceError::Storage)
    }
}
