//! Who follows whom, as far as it can be seen from beside: leases and ends of journals as they lie on the disk, and what
//! processes that serve or follow write down every second.
//!
//! What only a process knows is unknown (`null`) unless that process has written it within three seconds: never a guess,
//! and never 0.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::target;
use crate::env;
use crate::format::files::Role;
use crate::format::leases::Lease;
use crate::fs::{Fs, os::OsFs};
use crate::position::{NodeId, Position};
use crate::shipping::status_file::{self, FOLLOWING, Reading, SERVING};
use crate::{Corruption, Journal, OpenError};

/// The fields of a link, as docs/cli.md has them.
const FIELDS: [&str; 23] = [
    "of",
    "direction",
    "name",
    "node",
    "address",
    "upstreams",
    "path",
    "agent",
    "feed",
    "state",
    "sent_position",
    "durable_position",
    "applied_position",
    "lag_events",
    "lag_bytes",
    "lag_ms",
    "held_bytes",
    "heard_ms",
    "connected_ms",
    "reconnects",
    "ends",
    "error",
    "told_ms",
];

/// A journal of a store, and what follows it or is followed by it.
pub(super) struct Place {
    /// `journal`, or `mirrors/NAME`.
    pub(super) of: String,
    pub(super) dir: PathBuf,
    /// `None` of a mirror that hasn't begun.
    pub(super) journal: Option<Journal>,
    pub(super) damage: Option<Corruption>,
    /// Why it can't be opened, if it is there.
    error: Option<OpenError>,
    /// How many connections were turned away, by reason; none if nobody says.
    pub(super) refused: Vec<Value>,
    pub(super) links: Vec<Link>,
}

/// One end of a connection, or of one that was.
pub(super) struct Link(Map<String, Value>);

impl Link {
    fn new(of: &str, direction: &str, state: &str) -> Self {
        let mut fields: Map<_, _> =
            FIELDS.iter().map(|name| ((*name).to_owned(), Value::Null)).collect();
        fields.insert("of".to_owned(), json!(of));
        fields.insert("direction".to_owned(), json!(direction));
        fields.insert("state".to_owned(), json!(state));
        Self(fields)
    }

    fn set(&mut self, field: &str, value: impl Into<Value>) {
        self.0.insert(field.to_owned(), value.into());
    }

    /// Takes over what a status says of these fields.
    fn take<'f>(&mut self, status: &Value, fields: impl IntoIterator<Item = &'f str>) {
        for field in fields {
            if let Some(value) = status.get(field) {
                self.set(field, value.clone());
            }
        }
    }

    pub(super) fn get(&self, field: &str) -> &Value {
        self.0.get(field).unwrap_or(&Value::Null)
    }

    pub(super) fn text(&self, field: &str) -> Option<&str> {
        self.get(field).as_str()
    }

    pub(super) fn number(&self, field: &str) -> Option<u64> {
        self.get(field).as_u64()
    }

    /// The best name there is for the other end.
    pub(super) fn who(&self) -> &str {
        let names = ["name", "node", "address"];
        names.iter().find_map(|field| self.text(field)).unwrap_or("unknown")
    }

    pub(super) fn to_json(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// Whether it is to the mirror or feed whose lease this is.
    fn is_to(&self, lease: &Lease) -> bool {
        node(lease).is_some_and(|node| self.text("node") == Some(&node))
            && self.get("feed").is_object() == lease.feed
            && self.text("direction") == Some("to")
    }
}

/// What a server says that runs.
struct ServerSays {
    /// The place in which its file lies.
    of: String,
    reading: Reading,
}

impl ServerSays {
    fn peers(&self) -> impl Iterator<Item = (&Self, &Value)> {
        let peers = self.reading.status.get("peers").and_then(Value::as_array);
        peers.into_iter().flatten().map(move |peer| (self, peer))
    }
}

/// The journal that `dir` stands for, and the mirrors of the store.
pub(super) fn places(dir: &Path) -> Result<Vec<Place>, Failure> {
    let own = target::journal_dir(dir);
    let opened = target::open(dir)?;
    let mut places = vec![Place::new("journal".to_owned(), own, Ok(opened))];
    for (name, mirror) in target::mirrors(dir) {
        let nested = mirror.join("journal");
        let is_flat = !nested.is_dir() && mirror.join("node").is_file();
        let dir = if is_flat { mirror } else { nested };
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let opened = Journal::open_read_only(&fs, &dir);
        places.push(Place::new(format!("mirrors/{name}"), dir, opened));
    }
    // A server has the journals of several of them.
    let servers: Vec<_> = places.iter().flat_map(Place::servers).collect();
    places.iter_mut().for_each(|place| place.find_followers(&servers));
    Ok(places)
}

impl Place {
    fn new(
        of: String,
        dir: PathBuf,
        opened: Result<(Journal, Option<Corruption>), OpenError>,
    ) -> Self {
        let (journal, damage, error) = match opened {
            Ok((journal, damage)) => (Some(journal), damage, None),
            // One that has not reached its origin yet.
            Err(OpenError::NotFound { .. }) => (None, None, None),
            Err(error) => (None, None, Some(error)),
        };
        let (refused, links) = (Vec::new(), Vec::new());
        let mut place = Self { of, dir, journal, damage, error, refused, links };
        place.find_upstream();
        place
    }

    /// A mirror's own link.
    fn find_upstream(&mut self) {
        let reading = status_file::read(&OsFs, &status_file::place(&self.dir).join(FOLLOWING));
        let role = self.journal.as_ref().map(Journal::role);
        if role == Some(Role::Origin)
            || (role.is_none() && reading.is_none() && self.error.is_none())
        {
            return;
        }
        let mut link = Link::new(&self.of, "from", "unknown");
        if let Some(Reading { status, is_fresh, age }) = &reading {
            // Whom it follows doesn't change by itself; how it does only its process knows.
            link.take(status, ["address", "path", "feed"]);
            if role == Some(Role::Feed) {
                link.take(status, ["durable_position"]); // which never goes back
            }
            let node = status.get("path").and_then(Value::as_array).and_then(|path| path.last());
            link.set("node", node.cloned().unwrap_or_default());
            link.set("told_ms", millis(age.as_millis()));
            if status.get("ended") == Some(&json!(true)) {
                link.set("state", "stopped");
                link.take(status, ["error"]);
            }
            if *is_fresh {
                link.take(status, FIELDS.into_iter().filter(|field| *field != "told_ms"));
            }
        }
        if let Some(error) = &self.error {
            link.set("state", "unreadable");
            let (code, message, hint) = (error.code(), error.to_string(), error.hint());
            link.set("error", json!({ "code": code, "message": message, "hint": hint }));
        }
        // The positions of a feed's own journal are others than the origin's.
        if let Some(journal) = self.journal.as_ref().filter(|_| role == Some(Role::Mirror)) {
            link.set("durable_position", journal.end().position.get());
        }
        self.links.push(link);
    }

    /// What servers tell that have begun here.
    fn servers(&self) -> Vec<ServerSays> {
        let beside = status_file::place(&self.dir);
        let names = OsFs.list(&beside).unwrap_or_default();
        let names = names.iter().filter(|name| name.starts_with(SERVING));
        let readings = names.filter_map(|name| status_file::read(&OsFs, &beside.join(name)));
        let fresh = readings.filter(|reading| reading.is_fresh);
        fresh.map(|reading| ServerSays { of: self.of.clone(), reading }).collect()
    }

    fn find_followers(&mut self, servers: &[ServerSays]) {
        for server in servers.iter().filter(|server| server.of == self.of) {
            self.refused.push(server.reading.status.get("refused").cloned().unwrap_or_default());
        }
        let Some(journal) = self.journal.clone() else { return };
        let id = journal.id().to_string();
        let leases = journal.leases();
        let mut is_served = servers.iter().any(|server| server.of == self.of);
        for (server, peer) in servers.iter().flat_map(ServerSays::peers) {
            let gets = peer.get("journal").and_then(Value::as_str);
            if gets.map_or(server.of != self.of, |gets| gets != id) {
                continue;
            }
            is_served = true;
            let mut link = Link::new(&self.of, "to", "unknown");
            link.take(peer, FIELDS);
            link.set("told_ms", millis(server.reading.age.as_millis()));
            // What holds back is the lease, which follows the acknowledgements.
            let lease = leases.iter().flatten().find(|lease| link.is_to(lease));
            if let Some(lease) = lease {
                link.set("held_bytes", journal.held_bytes(lease.position));
            }
            self.links.push(link);
        }
        let Some(leases) = leases else {
            let mut link = Link::new(&self.of, "to", "unreadable");
            link.set("held_bytes", journal.held_bytes(Position::START));
            return self.links.push(link);
        };
        let is_away = |lease: &&Lease| !self.links.iter().any(|link| link.is_to(lease));
        let state = if is_served { "away" } else { "unknown" };
        let away = leases.iter().filter(is_away).map(|lease| self.away(&journal, lease, state));
        let away: Vec<_> = away.collect();
        self.links.extend(away);
    }

    /// A mirror that isn't here: what it has said last holds back the journal.
    fn away(&self, journal: &Journal, lease: &Lease, state: &str) -> Link {
        let mut link = Link::new(&self.of, "to", state);
        link.set("node", node(lease));
        link.set("durable_position", lease.position.get());
        link.set("held_bytes", journal.held_bytes(lease.position));
        let heard_us = env::now_us().checked_sub(lease.heard_at_us);
        link.set("heard_ms", heard_us.and_then(|us| u64::try_from(us / 1000).ok()));
        link
    }
}

fn node(lease: &Lease) -> Option<String> {
    (!lease.nameless).then(|| NodeId::from_bytes(lease.id).to_string())
}

fn millis(millis: u128) -> u64 {
    u64::try_from(millis).unwrap_or(u64::MAX)
}
