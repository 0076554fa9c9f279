//! The service that knows its customers: mirrors the journal of `orders`, and answers from its own views,
//! also while `orders` is down.

use std::error::Error;
use std::io::{self, BufRead};
use std::path::Path;
use std::time::{Duration, Instant};

use headwater::view::{Digest, RebuildOptions, RebuildPhase, ViewHandle, ViewReadError};
use headwater::{Position, Store};

use crate::views::{ByMonth, Totals, TotalsRow};

/// How long a service of its own may take to start.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many customers there are.
const CUSTOMERS: u32 = 23_570;

pub(crate) fn run(dir: &Path, orders: &str) -> Result<(), Box<dyn Error>> {
    let store = Store::builder(dir).create_if_missing().open()?;
    let mirror = store.mirror("orders", orders)?;
    let journal = mirror.wait_ready(PATIENCE)?;
    let totals = store.view_of(&journal, Totals)?;
    println!("ready {}", totals.checkpoint().applied.position);

    // A line in, a line (or several) out: enough of an interface for a demonstration.
    for line in io::stdin().lock().lines() {
        match line?.split_whitespace().collect::<Vec<_>>()[..] {
            ["get", customer] => match totals.get(&customer.parse::<u32>()?)? {
                Some(row) => println!("row {}", show(&row)),
                None => println!("row none"),
            },
            ["wait", position] => {
                let last = Position::new(position.parse::<u64>()?.saturating_sub(1));
                let reached = journal.wait_past(last, PATIENCE);
                totals.wait_for(&reached.token(), PATIENCE)?;
                println!("reached {}", reached.position);
            }
            ["status"] => {
                let (end, lag) = (journal.end(), mirror.status().lag_events());
                let lag = lag.map_or("unknown".to_owned(), |lag| lag.to_string());
                println!(
                    "status {} {} {lag} {}",
                    end.position,
                    totals.checkpoint().applied.position,
                    end.chain
                );
            }
            ["all"] => {
                for row in totals.range(..) {
                    let (customer, row) = row?;
                    println!("customer {customer} {}", show(&row));
                }
                println!("end");
            }
            ["months"] => {
                // A view that nobody had thought of when the events were written.
                let started = Instant::now();
                let months = store.view_of(&journal, ByMonth)?;
                months.wait_for(&journal.end().token(), PATIENCE)?;
                for row in months.range(..) {
                    let (month, row) = row?;
                    println!("month {month} {} {}", row.purchases, row.spent_cents);
                }
                println!("end {}", started.elapsed().as_micros());
            }
            ["rebuild"] => rebuild(&totals)?,
            ["stop"] => break,
            _ => println!("unknown"),
        }
    }
    totals.close()?;
    mirror.stop()?;
    store.close()?;
    Ok(())
}

/// Builds the rows anew while everything goes on: others ask, and `orders` appends. How often they were answered
/// meanwhile, and how long the slowest answer took.
fn rebuild(totals: &ViewHandle<Totals>) -> Result<(), Box<dyn Error>> {
    let rebuild = totals.rebuild(RebuildOptions::default())?;
    let is_over = || rebuild.status().phase == RebuildPhase::Ended;
    let ask = || -> Result<(u64, Duration), ViewReadError> {
        let (mut answers, mut slowest) = (0, Duration::ZERO);
        let mut customers = (1..=CUSTOMERS).cycle();
        while let Some(customer) = customers.next().filter(|_| !is_over()) {
            let began = Instant::now();
            totals.get(&customer)?;
            (answers, slowest) = (answers + 1, slowest.max(began.elapsed()));
        }
        Ok((answers, slowest))
    };
    let (answers, slowest) = ask()?;
    let rebuilt = rebuild.wait()?;
    let Some(compared) = rebuilt.compared else {
        return Err("there was nothing to compare".into());
    };
    println!(
        "rebuilt {} {} {answers} {} {} {} {} {}",
        rebuilt.previous.unwrap_or_default(),
        rebuilt.generation,
        slowest.as_micros(),
        rebuilt.took.as_micros(),
        compared.position,
        hash(&compared.served),
        hash(&compared.built),
    );
    Ok(())
}

fn hash(digest: &Digest) -> String {
    digest.hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn show(row: &TotalsRow) -> String {
    format!("{} {} {} {}", row.purchases, row.cds, row.spent_cents, row.last_date)
}
