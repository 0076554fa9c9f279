use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};
use crate::engines::keys;

pub(super) const PEER: Peer = Peer {
    name: "fjall",
    package: Some("fjall"),
    kind: Kind::Peer,
    durable: "yes: fdatasync (PersistMode::SyncData), one for each append",
    used: keys::USED,
    without: &[],
    open,
};

struct Lsm {
    db: Database,
    events: Keyspace,
    /// Of the events by stream, if streams will be read.
    streams: Option<Keyspace>,
    next: AtomicU64,
}

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let db = Database::builder(dir).open()?;
    let events = db.keyspace("events", KeyspaceCreateOptions::default)?;
    let streams = match shape.streams {
        true => Some(db.keyspace("streams", KeyspaceCreateOptions::default)?),
        false => None,
    };
    Ok(Box::new(Lsm { db, events, streams, next: AtomicU64::new(0) }))
}

impl Engine for Lsm {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(self))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        for item in self.events.iter() {
            each(&item.value()?);
        }
        Ok(())
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        each(&self.events.get(keys::event(place.number))?.ok_or("no such event")?);
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        let streams = self.streams.as_ref().ok_or("opened without streams")?;
        for item in streams.prefix(stream.to_be_bytes()) {
            each(&self.events.get(keys::event_of(&item.key()?)?)?.ok_or("no such event")?);
        }
        Ok(())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(())
    }
}

impl Writer for &Lsm {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let first = self.next.fetch_add(payloads.len() as u64, Ordering::Relaxed);
        let mut batch = self.db.batch().durability(Some(PersistMode::SyncData));
        for (number, payload) in (first..).zip(payloads) {
            batch.insert(&self.events, keys::event(number), *payload);
            if let Some(streams) = &self.streams {
                batch.insert(streams, keys::of_stream(stream, number), []);
            }
        }
        Ok(batch.commit()?)
    }
}
