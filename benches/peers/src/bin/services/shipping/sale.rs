//! Events of 256 B, and what each customer has bought.

use std::collections::VecDeque;
use std::path::Path;

use headwater::codec::{Bincode, Codec as _};
use headwater::view::{Fold, FoldError, Keys, View};
use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
use serde::{Deserialize, Serialize};

use crate::Outcome;

pub(super) const PAYLOAD_BYTES: usize = 256;
const BATCH: u64 = 100;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sale {
    customer: u32,
    cents: u64,
    note: String,
}

headwater::events! {
    pub(super) enum SaleEvent {
        Sold(Sale) = "bench.sold", version 1;
    }
}

pub(super) struct Bought;

impl View for Bought {
    const NAME: &'static str = "bought";
    const VERSION: u32 = 1;
    type Key = u32;
    type Row = u64;
    type Event = SaleEvent;

    fn route(&self, event: &Recorded<SaleEvent>, keys: &mut Keys<u32>) {
        let SaleEvent::Sold(sale) = event.data();
        keys.add(sale.customer);
    }

    fn fold(
        &self,
        _: &u32,
        cents: Option<u64>,
        event: &Recorded<SaleEvent>,
    ) -> Result<Fold<u64>, FoldError> {
        let SaleEvent::Sold(sale) = event.data();
        Ok(Fold::Put(cents.unwrap_or_default() + sale.cents))
    }
}

/// So many sales in one append.
pub(super) fn append(first: u64, count: u64) -> Outcome<Append> {
    let events = (first..first + count).map(event).collect::<Outcome<Vec<_>>>()?;
    Ok(Append::to(&StreamId::new("till")?, ExpectedRevision::Any, events))
}

fn event(number: u64) -> Outcome<NewEvent> {
    let customer = u32::try_from(number % 1_000)?;
    let sale = Sale { customer, cents: 100 + number % 9_900, note: String::new() };
    let note = "x".repeat(PAYLOAD_BYTES.saturating_sub(Bincode::encode(&sale)?.len()));
    Ok(NewEvent::typed(&SaleEvent::from(Sale { note, ..sale }))?)
}

/// A store whose journal has this many bytes, in batches of a hundred.
pub(super) fn filled(dir: &Path, bytes: u64) -> Outcome<Store> {
    let store = Store::create(dir)?;
    let (mut under_way, mut number) = (VecDeque::new(), 0);
    while store.journal().end().offset < bytes {
        under_way.push_back(store.submit(&append(number, BATCH)?)?);
        number += BATCH;
        if under_way.len() > 16 {
            under_way.pop_front().map_or(Ok(None), |ticket| ticket.wait().map(Some))?;
        }
    }
    for ticket in under_way {
        ticket.wait()?;
    }
    Ok(store)
}
