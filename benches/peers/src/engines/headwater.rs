use std::path::Path;

use headwater::{
    Append, EventType, ExpectedRevision, NewEvent, Position, Revision, Store, StreamId,
};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "headwater",
    package: Some("headwater"),
    kind: Kind::Headwater,
    durable: "yes: fdatasync, shared by concurrent appends",
    used: "default options; ids, streams, revisions and the hash chain can't be left out",
    without: &[],
    open,
};

struct Journal(Store);

fn open(dir: &Path, _: Shape) -> Outcome<Box<dyn Engine>> {
    Ok(Box::new(Journal(Store::builder(dir).create_if_missing().open()?)))
}

impl Engine for Journal {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        let event_type = EventType::new("bench.event")?;
        Ok(Box::new(Appends { store: &self.0, event_type, stream: None }))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        let mut cursor = self.0.journal().cursor(Position::START)?;
        while let Some(batch) = cursor.next_batch()? {
            for record in batch.batch.records() {
                each(record?.payload);
            }
        }
        Ok(())
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        let event =
            self.0.read_all(Position::new(place.number))?.next().ok_or("no such event")??;
        each(event.data());
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        for event in self.0.read_stream(&name(stream)?, Revision::FIRST)? {
            each(event?.data());
        }
        Ok(())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(self.0.close()?)
    }
}

struct Appends<'a> {
    store: &'a Store,
    event_type: EventType,
    stream: Option<(u32, StreamId)>,
}

impl Writer for Appends<'_> {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let id = match &self.stream {
            Some((number, id)) if *number == stream => id,
            _ => &self.stream.insert((stream, name(stream)?)).1,
        };
        let events = payloads.iter().map(|payload| NewEvent::raw_ref(&self.event_type, payload));
        self.store.append(&Append::to(id, ExpectedRevision::Any, events))?;
        Ok(())
    }
}

fn name(stream: u32) -> Outcome<StreamId> {
    Ok(StreamId::new(format!("stream-{stream}"))?)
}
