//! Folding a whole journal into a view.

use std::collections::HashMap;

use headwater::view::{Fold, FoldError, Keys, View, ViewOptions};
use headwater::{Decoded, Event as _, EventKindRef, Payload, Position, Recorded};
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, Sale, ShopEvent};
use crate::meter::Meter;
use crate::{Group, Outcome, PATIENCE, Scratch, Way};

/// What each customer has bought.
pub(crate) struct Bought;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Total {
    sales: u64,
    cents: u64,
}

impl Total {
    fn with(self, sale: &Sale) -> Self {
        Self { sales: self.sales + 1, cents: self.cents.wrapping_add(sale.cents) }
    }
}

impl View for Bought {
    const NAME: &'static str = "bought";
    const VERSION: u32 = 1;
    type Key = u32;
    type Row = Total;
    type Event = ShopEvent;

    fn route(&self, event: &Recorded<ShopEvent>, keys: &mut Keys<u32>) {
        let ShopEvent::Sold(sale) = event.data();
        keys.add(sale.customer);
    }

    fn fold(
        &self,
        _customer: &u32,
        total: Option<Total>,
        event: &Recorded<ShopEvent>,
    ) -> Result<Fold<Total>, FoldError> {
        let ShopEvent::Sold(sale) = event.data();
        Ok(Fold::Put(total.unwrap_or_default().with(sale)))
    }
}

pub(crate) fn catch_up(scratch: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let (events, bytes) = (corpus.events, corpus.bytes);
    let folder = scratch.folder("view catch-up")?;
    let journal = corpus.journal().clone();
    let in_memory = move || {
        let meter = Meter::start();
        let mut totals = HashMap::<u32, Total>::new();
        let mut cursor = journal.cursor(Position::START)?;
        while let Some(batch) = cursor.next_batch()? {
            for record in batch.batch.records() {
                let record = record?;
                let (name, schema_version) = (record.event_type, record.schema_version);
                let payload = Payload { codec: record.codec, bytes: record.payload };
                let event = ShopEvent::decode(EventKindRef { name, schema_version }, payload)?;
                if let Decoded::One(ShopEvent::Sold(sale)) = event {
                    let total = totals.entry(sale.customer).or_default();
                    *total = std::mem::take(total).with(&sale);
                }
            }
        }
        let took = meter.stop();
        std::hint::black_box(totals);
        Ok(took)
    };
    let (journal, token) = (corpus.journal().clone(), corpus.token);
    let view = move || {
        let dir = folder.join("views");
        let meter = Meter::start();
        let handle = headwater::view::open(&dir, journal.clone(), Bought, ViewOptions::default())?;
        handle.wait_for(&token, PATIENCE)?;
        handle.close()?;
        let took = meter.stop();
        std::fs::remove_dir_all(&dir)?;
        Ok(took)
    };
    let ways = vec![
        Way { name: "cursor, fold into a HashMap", events, bytes, operation: Box::new(in_memory) },
        Way { name: "view, created to closed", events, bytes, operation: Box::new(view) },
    ];
    let durable = "the HashMap never; the view when it is closed, in the time";
    Ok(Group::new("view catch-up", durable, ways))
}
