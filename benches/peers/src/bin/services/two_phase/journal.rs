//! The same order with Headwater: appended to the journal of orders, followed by the customers' side.

use std::path::Path;

use headwater::position::Token;
use headwater::shipping::Server;
use headwater::{Append, ExpectedRevision, NewEvent, Store};

use super::Orders;
use crate::Outcome;
use crate::events::OrderEvent;

pub(super) struct Shop {
    pub(super) store: Store,
    pub(super) server: Server,
    orders: Orders,
}

impl Shop {
    pub(super) fn open(dir: &Path) -> Outcome<Self> {
        Self::open_at(dir, "127.0.0.1:0")
    }

    pub(super) fn open_at(dir: &Path, address: &str) -> Outcome<Self> {
        let store = Store::builder(dir).create_if_missing().open()?;
        let server = store.serve(address)?;
        Ok(Self { store, server, orders: Orders::read()? })
    }

    /// When this returns, the order is durable here.
    pub(super) fn place(&self, number: u64) -> Outcome<Token> {
        let purchase = self.orders.purchase(number)?;
        let placed = NewEvent::typed(&OrderEvent::from(purchase.clone()))?;
        let append = Append::to(&purchase.stream()?, ExpectedRevision::Any, [placed]);
        Ok(self.store.append(&append)?.token())
    }
}
