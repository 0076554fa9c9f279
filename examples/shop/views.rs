//! The views of `customers`.

use headwater::Recorded;
use headwater::view::{Fold, FoldError, Keys, View};
use serde::{Deserialize, Serialize};

use crate::events::OrderEvent;

/// What each customer has bought.
pub(crate) struct Totals;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TotalsRow {
    pub(crate) purchases: u32,
    pub(crate) cds: u32,
    pub(crate) spent_cents: u64,
    pub(crate) last_date: u32,
}

impl View for Totals {
    const NAME: &'static str = "totals";
    const VERSION: u32 = 1;
    type Key = u32;
    type Row = TotalsRow;
    type Event = OrderEvent;

    fn route(&self, event: &Recorded<OrderEvent>, keys: &mut Keys<u32>) {
        let OrderEvent::Purchased(purchase) = event.data();
        keys.add(purchase.customer);
    }

    fn fold(
        &self,
        _customer: &u32,
        row: Option<TotalsRow>,
        event: &Recorded<OrderEvent>,
    ) -> Result<Fold<TotalsRow>, FoldError> {
        let OrderEvent::Purchased(purchase) = event.data();
        let row = row.unwrap_or_default();
        Ok(Fold::Put(TotalsRow {
            purchases: row.purchases + 1,
            cds: row.cds + purchase.cds,
            spent_cents: row.spent_cents + purchase.amount_cents,
            last_date: row.last_date.max(purchase.date),
        }))
    }
}

/// What was bought in each month (as in 199701).
pub(crate) struct ByMonth;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MonthRow {
    pub(crate) purchases: u32,
    pub(crate) spent_cents: u64,
}

impl View for ByMonth {
    const NAME: &'static str = "by_month";
    const VERSION: u32 = 1;
    type Key = u32;
    type Row = MonthRow;
    type Event = OrderEvent;

    fn route(&self, event: &Recorded<OrderEvent>, keys: &mut Keys<u32>) {
        let OrderEvent::Purchased(purchase) = event.data();
        keys.add(purchase.date / 100);
    }

    fn fold(
        &self,
        _month: &u32,
        row: Option<MonthRow>,
        event: &Recorded<OrderEvent>,
    ) -> Result<Fold<MonthRow>, FoldError> {
        let OrderEvent::Purchased(purchase) = event.data();
        let row = row.unwrap_or_default();
        Ok(Fold::Put(MonthRow {
            purchases: row.purchases + 1,
            spent_cents: row.spent_cents + purchase.amount_cents,
        }))
    }
}
