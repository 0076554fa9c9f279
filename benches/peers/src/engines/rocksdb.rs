use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, Options, WriteBatch, WriteOptions};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};
use crate::engines::keys;

pub(super) const PEER: Peer = Peer {
    name: "rocksdb",
    package: Some("rocksdb"),
    kind: Kind::Peer,
    durable: "yes: fdatasync of its log (sync writes), shared by concurrent appends",
    used: keys::USED,
    without: &[],
    open,
};

const STREAMS: &str = "streams";

struct Lsm {
    db: DB,
    streams: bool,
    next: AtomicU64,
}

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    let db = match shape.streams {
        true => DB::open_cf(&options, dir, [STREAMS])?,
        false => DB::open(&options, dir)?,
    };
    Ok(Box::new(Lsm { db, streams: shape.streams, next: AtomicU64::new(0) }))
}

impl Lsm {
    fn streams(&self) -> Outcome<&ColumnFamily> {
        Ok(self.db.cf_handle(STREAMS).ok_or("opened without streams")?)
    }
}

impl Engine for Lsm {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(self))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        let mut events = self.db.raw_iterator();
        events.seek_to_first();
        while let Some(payload) = events.value() {
            each(payload);
            events.next();
        }
        Ok(events.status()?)
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        each(&self.db.get_pinned(keys::event(place.number))?.ok_or("no such event")?);
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        let from = keys::of_stream(stream, 0);
        let mode = IteratorMode::From(&from, Direction::Forward);
        for item in self.db.iterator_cf(self.streams()?, mode) {
            let (key, _) = item?;
            if !key.starts_with(&stream.to_be_bytes()) {
                break;
            }
            each(&self.db.get_pinned(keys::event_of(&key)?)?.ok_or("no such event")?);
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
        let mut batch = WriteBatch::default();
        for (number, payload) in (first..).zip(payloads) {
            batch.put(keys::event(number), payload);
            if self.streams {
                batch.put_cf(self.streams()?, keys::of_stream(stream, number), []);
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        Ok(self.db.write_opt(batch, &options)?)
    }
}
