//! The journal that is read, folded and shipped, and the events that all groups append.

use std::fmt;
use std::path::PathBuf;

use headwater::format::segment::HEADER_PAGE_BYTES;
use headwater::{Append, EventType, ExpectedRevision, Journal, NewEvent, Store, StreamId, Token};
use serde::{Deserialize, Serialize};

use crate::{Outcome, Scratch};

/// Of every event's payload.
pub(crate) const PAYLOAD_BYTES: usize = 256;
/// That get the batches in turn.
pub(crate) const STREAMS: u64 = 16;
/// Of the journal's batches.
const EVENTS_PER_BATCH: u64 = 100;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sale {
    pub(crate) customer: u32,
    pub(crate) cents: u64,
    note: String,
}

headwater::events! {
    pub(crate) enum ShopEvent {
        Sold(Sale) = "shop.sold", version 1;
    }
}

/// A closed-over journal of many events, and what is known of it.
pub(crate) struct Corpus {
    pub(crate) store: Store,
    pub(crate) events: u64,
    pub(crate) bytes: u64,
    /// The segments' files, each with how much of it holds events.
    pub(crate) files: Vec<(PathBuf, u64)>,
    #[cfg_attr(
        not(all(feature = "views", feature = "shipping")),
        allow(dead_code, reason = "views wait for it")
    )]
    pub(crate) token: Token,
}

impl Corpus {
    pub(crate) fn write(scratch: &Scratch) -> Outcome<Self> {
        let store = Store::create(scratch.dir.path().join("corpus"))?;
        let events = scratch.scale.events;
        let mut token = None;
        for batch in 0..events / EVENTS_PER_BATCH {
            let first = batch * EVENTS_PER_BATCH;
            let sales = (first..first + EVENTS_PER_BATCH)
                .map(|number| Ok(NewEvent::typed(&sale(number, scratch.scale.keys)?)?));
            let sales = sales.collect::<Outcome<Vec<_>>>()?;
            let till = StreamId::new(stream_name(batch % STREAMS))?;
            token = Some(store.append(&Append::to(&till, ExpectedRevision::Any, sales))?.token());
        }
        let end = store.journal().end();
        Ok(Self {
            events: end.position.get(),
            bytes: end.offset,
            files: files(store.journal()),
            token: token.ok_or("a journal without events")?,
            store,
        })
    }

    pub(crate) fn journal(&self) -> &Journal {
        self.store.journal()
    }

    /// Of a batch; all are about as large.
    pub(crate) fn batch_bytes(&self) -> u64 {
        self.bytes * EVENTS_PER_BATCH / self.events
    }
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = self.bytes as f64 / 1e6;
        let segments = self.files.len();
        write!(
            f,
            "{} events of {PAYLOAD_BYTES} B in batches of {EVENTS_PER_BATCH}: {mb:.1} MB in {segments} segments",
            self.events
        )
    }
}

pub(crate) fn stream_name(number: u64) -> String {
    format!("till-{number}")
}

fn files(journal: &Journal) -> Vec<(PathBuf, u64)> {
    let used = |segment: headwater::SegmentInfo| {
        let batches = segment.end_offset - segment.base_offset;
        (segment.path, HEADER_PAGE_BYTES as u64 + batches)
    };
    journal.segments().into_iter().map(used).collect()
}

/// Customers in an order that no cache likes, and a payload of exactly the wanted length.
pub(crate) fn sale(number: u64, customers: u32) -> Outcome<ShopEvent> {
    use headwater::codec::{Bincode, Codec as _};
    let customer = number.wrapping_mul(2_654_435_761) % u64::from(customers);
    let sale = Sale {
        customer: u32::try_from(customer)?,
        cents: 100 + number % 9_900,
        note: String::new(),
    };
    let note = "x".repeat(PAYLOAD_BYTES.saturating_sub(Bincode::encode(&sale)?.len()));
    Ok(ShopEvent::Sold(Sale { note, ..sale }))
}

/// Makes appends of plain events out of the same bytes; encoding them is part of what is measured.
#[derive(Clone)]
pub(crate) struct Plain {
    stream: StreamId,
    event_type: EventType,
    payload: [u8; PAYLOAD_BYTES],
}

impl Plain {
    pub(crate) fn new(stream: &str) -> Outcome<Self> {
        let (stream, event_type) = (StreamId::new(stream)?, EventType::new("bench.event")?);
        Ok(Self { stream, event_type, payload: [0xA5; PAYLOAD_BYTES] })
    }

    pub(crate) fn append(&self, count: usize) -> Append {
        let event = |_| NewEvent::raw_ref(&self.event_type, &self.payload);
        Append::to(&self.stream, ExpectedRevision::Any, (0..count).map(event))
    }
}
