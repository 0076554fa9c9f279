//! The service that owns the purchases: appends them to its journal and serves it.

use std::error::Error;
use std::io;
use std::path::Path;

use headwater::{Append, ExpectedRevision, NewEvent, Store};

use crate::events::{OrderEvent, Purchase, read_purchases};

/// At most so many purchases of a day are appended together.
const BATCH: usize = 16;

pub(crate) fn run(dir: &Path, listen: &str, input: &Path) -> Result<(), Box<dyn Error>> {
    let store = Store::builder(dir).create_if_missing().open()?;
    let server = store.serve(listen)?;
    // One event a purchase: the end of the journal says where we were when we were killed.
    let mut appended = usize::try_from(store.journal().end().position.get())?;
    println!("serving {} {appended}", server.local_addr());

    let purchases = read_purchases(input)?;
    let rest = purchases.get(appended..).unwrap_or_default();
    for day in rest.chunk_by(|a, b| a.date == b.date) {
        for batch in day.chunks(BATCH) {
            store.append(&append_of(batch)?)?; // durable now, all of them or none
            appended += batch.len();
            println!("appended {appended}");
        }
    }

    println!("done {}", store.journal().end().chain);
    io::copy(&mut io::stdin(), &mut io::sink())?; // serve until whoever started us lets go
    server.shutdown();
    store.close()?;
    Ok(())
}

/// One append: each customer's purchases go to the customer's stream.
fn append_of(batch: &[Purchase]) -> Result<Append, Box<dyn Error>> {
    let mut append = Append::default();
    for purchases in batch.chunk_by(|a, b| a.customer == b.customer) {
        let Some(first) = purchases.first() else { continue };
        let events = purchases.iter().map(|p| NewEvent::typed(&OrderEvent::from(p.clone())));
        let events = events.collect::<Result<Vec<_>, _>>()?;
        append = append.and_to(&first.stream()?, ExpectedRevision::Any, events);
    }
    Ok(append)
}
