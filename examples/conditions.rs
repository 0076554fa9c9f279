//! What a condition on a query costs, and a query for a rare tag, in journals of growing size.
//!
//! ```text
//! cargo run --release --no-default-features --example conditions [EVENTS …]
//! ```
#![allow(clippy::print_stdout, reason = "it prints what it measures")]

use std::time::Instant;

use headwater::{
    Append, Durability, ExpectedRevision, NewEvent, Position, Query, QueryItem, Store, StreamId,
};

/// Appends of which the mean is taken; buffered, so that no sync is in it.
const ROUNDS: u64 = 20_000;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut sizes =
        std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<Vec<_>, _>>()?;
    if sizes.is_empty() {
        sizes = vec![100_000, 1_000_000, 3_000_000];
    }
    println!(
        "    events segments | append ns  on condition ns  same, old position ns | query, first ms  again ms"
    );
    sizes.into_iter().try_for_each(measure)
}

fn measure(events: u64) -> Result<(), Failure> {
    let dir = tempfile::tempdir_in("target")?;
    let store = Store::create(dir.path().join("journal"))?;
    let stream = StreamId::new("users")?;
    let registered = |number: u64| -> Result<_, Failure> {
        Ok(NewEvent::raw("user.registered", [7; 100])?.tag(format!("email:{number}")))
    };
    let mut number = 0;
    while number < events {
        let batch = (number..number + 500).map(registered).collect::<Result<Vec<_>, _>>()?;
        let append = Append::to(&stream, ExpectedRevision::Any, batch);
        store.append(&append.durability(Durability::Buffered))?;
        number += 500;
    }
    store.flush()?;

    let one = |number| -> Result<_, Failure> {
        let append = Append::to(&stream, ExpectedRevision::Any, [registered(number)?]);
        Ok(append.durability(Durability::Buffered))
    };
    let unique = |number: u64| Query::from(QueryItem::tags([format!("email:{number}")]));
    let mean_ns = |began: Instant| began.elapsed().as_nanos() as u64 / ROUNDS;

    let began = Instant::now();
    for round in 0..ROUNDS {
        store.append(&one(number + round)?)?;
    }
    let plain_ns = mean_ns(began);
    number += ROUNDS;
    store.flush()?;

    let began = Instant::now();
    for round in number..number + ROUNDS {
        let end = store.journal().end().position;
        store.append(&one(round)?.and_expect_none(unique(round), end))?;
    }
    let recent_ns = mean_ns(began);
    let old = Position::new(number);
    number += ROUNDS;

    let began = Instant::now();
    for round in number..number + ROUNDS {
        store.append(&one(round)?.and_expect_none(unique(round), old))?;
    }
    let old_ns = mean_ns(began);
    store.flush()?;

    let find = || -> Result<f64, Failure> {
        let began = Instant::now();
        let found = store.read_query(&unique(events / 2), Position::START)?.count();
        assert_eq!(found, 1);
        Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let (first_ms, again_ms) = (find()?, find()?);
    let segments = store.journal().segments().len();
    println!(
        "{events:>10} {segments:>8} | {plain_ns:>9} {recent_ns:>16} {old_ns:>22} | {first_ms:>15.1} {again_ms:>9.2}"
    );
    store.close()?;
    Ok(())
}
