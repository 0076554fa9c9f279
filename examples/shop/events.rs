//! What both services agree on: the events of `orders`.

use std::path::Path;

use headwater::StreamId;
use serde::{Deserialize, Serialize};

/// Somebody bought CDs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Purchase {
    pub customer: u32,
    /// As in 19970131.
    pub date: u32,
    pub cds: u32,
    pub amount_cents: u64,
}

headwater::events! {
    /// Everything that `orders` publishes.
    pub enum OrderEvent {
        Purchased(Purchase) = "order.purchased", version 1;
    }
}

impl Purchase {
    /// Each customer is a stream.
    pub fn stream(&self) -> Result<StreamId, headwater::InvalidEvent> {
        StreamId::new(format!("customer-{:05}", self.customer))
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let purchase = Self {
            customer: fields.next()?.parse().ok()?,
            date: fields.next()?.parse().ok()?,
            cds: fields.next()?.parse().ok()?,
            amount_cents: cents(fields.next()?)?,
        };
        fields.next().is_none().then_some(purchase)
    }
}

/// `11.77` is 1177 cents, exactly.
fn cents(dollars: &str) -> Option<u64> {
    let (whole, fraction) = dollars.split_once('.')?;
    let fraction: u64 = (fraction.len() == 2).then(|| fraction.parse().ok())??;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(fraction)
}

/// The purchases in the file, as they happened: by day, and on a day by customer.
pub fn read_purchases(path: &Path) -> Result<Vec<Purchase>, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(path)?;
    let lines = text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty());
    let purchases = lines.map(|(number, line)| {
        Purchase::parse(line).ok_or_else(|| {
            format!("{}:{}: not a purchase: {line:?}", path.display(), number + 1).into()
        })
    });
    let mut purchases = purchases.collect::<Result<Vec<Purchase>, Box<dyn std::error::Error>>>()?;
    purchases.sort_by_key(|purchase| (purchase.date, purchase.customer));
    Ok(purchases)
}
