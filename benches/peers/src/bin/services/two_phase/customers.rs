//! The service that follows the orders: says `applied EVENTS NS` whenever its view has come further. Asked `total EVENTS`,
//! it waits until it has applied as many, and says how many purchases its rows have (`total PURCHASES`).

use std::io::{self, BufRead as _};
use std::path::Path;
use std::time::Duration;

use headwater::view::ViewHandle;
use headwater::{Position, Store};

use super::PATIENCE;
use crate::Outcome;
use crate::timing::now_ns;
use crate::views::Totals;

/// How often it looks.
const EVERY: Duration = Duration::from_millis(2);

pub(crate) fn run(dir: &Path, orders: &str) -> Outcome<()> {
    let store = Store::builder(dir).create_if_missing().open()?;
    let mirror = store.mirror("orders", orders)?;
    let journal = mirror.wait_ready(PATIENCE)?;
    let totals = store.view_of(&journal, Totals)?;
    std::thread::scope(|scope| {
        scope.spawn(|| -> Outcome<()> {
            let mut said = None;
            loop {
                let applied = totals.checkpoint().applied.position;
                if said != Some(applied) {
                    println!("applied {applied} {}", now_ns());
                    said = Some(applied);
                }
                std::thread::sleep(EVERY);
            }
        });
        for line in io::stdin().lock().lines() {
            let line = line?;
            let events: u64 = line.strip_prefix("total ").ok_or("what is asked?")?.parse()?;
            let end = journal.wait_past(Position::new(events.saturating_sub(1)), PATIENCE);
            totals.wait_for(&end.token(), PATIENCE)?;
            println!("total {}", total(&totals)?);
        }
        std::process::exit(0) // whoever started us is gone
    })
}

pub(super) fn total(totals: &ViewHandle<Totals>) -> Outcome<u64> {
    let mut total = 0;
    for row in totals.range(..) {
        total += u64::from(row?.1.purchases);
    }
    Ok(total)
}
