use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::{mpsc, oneshot, watch};
use umadb_core::db::UmaDb;
use umadb_core::mvcc::{Mvcc, StorageOptions};
use umadb_core::writer_thread_blocking::writer_thread_blocking;
use umadb_core::writer_thread_request::WriterThreadRequest as Request;
use umadb_dcb::{DcbEvent, DcbEventStoreSync, DcbQuery, DcbQueryItem};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "umadb-core",
    package: Some("umadb-core"),
    kind: Kind::Peer,
    durable: "yes: two fdatasyncs (pages, then the header), shared by concurrent appends",
    used: "appends go through its writer thread, as in its server; one tag per event (its stream), only for the corpus that is read; no condition; other options are the defaults",
    without: &[],
    open,
};

/// How many events its writer thread puts into one commit.
const GROUP_EVENTS_MAX: usize = 2000;
/// How many requests wait for it at most.
const QUEUE: usize = 1024;
/// How many events are read at a time: a read without a limit collects all of them first.
const READ: u32 = 1000;

struct Tree {
    db: UmaDb,
    requests: mpsc::Sender<Request>,
    writer: JoinHandle<()>,
    streams: bool,
}

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let mvcc = Arc::new(Mvcc::new(false, StorageOptions::default().db_path(dir))?);
    let db = UmaDb::from_arc(Arc::clone(&mvcc));
    let (requests, received) = mpsc::channel(QUEUE);
    let head = watch::channel(None).0;
    let writer = std::thread::spawn(move || {
        writer_thread_blocking(mvcc, received, head, GROUP_EVENTS_MAX);
    });
    Ok(Box::new(Tree { db, requests, writer, streams: shape.streams }))
}

impl Tree {
    fn read_from(&self, query: Option<DcbQuery>, from: u64, limit: u32) -> Outcome<Vec<Event>> {
        Ok(self.db.read(query, Some(from), false, Some(limit))?.next_batch()?)
    }

    fn read_all(&self, query: Option<DcbQuery>, each: Each<'_>) -> Outcome<()> {
        let mut from = 1;
        loop {
            let events = self.read_from(query.clone(), from, READ)?;
            events.iter().for_each(|event| each(&event.event.data));
            match events.last() {
                Some(last) if events.len() == READ as usize => from = last.position + 1,
                _ => return Ok(()),
            }
        }
    }
}

type Event = umadb_dcb::DcbSequencedEvent;

fn tag(stream: u32) -> String {
    format!("stream-{stream}")
}

impl Engine for Tree {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(self))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        self.read_all(None, each)
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        let events = self.read_from(None, place.number + 1, 1)?;
        each(&events.first().ok_or("no such event")?.event.data);
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        let query = DcbQuery::new().item(DcbQueryItem::new().tags([tag(stream)]));
        self.read_all(Some(query), each)
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        self.requests.blocking_send(Request::Shutdown).map_err(|_| "its writer has gone")?;
        self.writer.join().map_err(|_| "its writer panicked".into())
    }
}

impl Writer for &Tree {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let events = payloads.iter().map(|payload| {
            let event = DcbEvent::new().event_type("bench.event").data(*payload);
            if self.streams { event.tags([tag(stream)]) } else { event }
        });
        let (response_tx, response) = oneshot::channel();
        let request = Request::Append {
            events: events.collect(),
            condition: None,
            tracking_info: None,
            response_tx,
            cancel: None,
        };
        self.requests.blocking_send(request).map_err(|_| "its writer has gone")?;
        response.blocking_recv()??;
        Ok(())
    }
}
