use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "redb",
    package: Some("redb"),
    kind: Kind::Peer,
    durable: "yes: fdatasync (Durability::Immediate), one for each append",
    used: "the key is the event's number, taken within the transaction; an index by stream (stream, number) is written only for the corpus that is read; other options are the defaults",
    without: &[],
    open,
};

const EVENTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("events");
const STREAMS: TableDefinition<'_, (u32, u64), ()> = TableDefinition::new("streams");

struct Tree {
    db: Database,
    streams: bool,
}

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let db = Database::create(dir.join("events.redb"))?;
    Ok(Box::new(Tree { db, streams: shape.streams }))
}

impl Engine for Tree {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(self))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        for item in self.db.begin_read()?.open_table(EVENTS)?.iter()? {
            each(item?.1.value());
        }
        Ok(())
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        let events = self.db.begin_read()?.open_table(EVENTS)?;
        each(events.get(place.number)?.ok_or("no such event")?.value());
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        let transaction = self.db.begin_read()?;
        let (events, streams) = (transaction.open_table(EVENTS)?, transaction.open_table(STREAMS)?);
        for item in streams.range((stream, 0)..=(stream, u64::MAX))? {
            let number = item?.0.value().1;
            each(events.get(number)?.ok_or("no such event")?.value());
        }
        Ok(())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(())
    }
}

impl Writer for &Tree {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let transaction = self.db.begin_write()?;
        {
            let mut events = transaction.open_table(EVENTS)?;
            let first = events.last()?.map_or(0, |(number, _)| number.value() + 1);
            for (number, payload) in (first..).zip(payloads) {
                events.insert(number, *payload)?;
            }
            if self.streams {
                let mut streams = transaction.open_table(STREAMS)?;
                for number in (first..).take(payloads.len()) {
                    streams.insert((stream, number), ())?;
                }
            }
        }
        Ok(transaction.commit()?)
    }
}
