//! The coordinator is killed between the phases: what stays behind, and for how long.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use tokio_postgres::error::SqlState;

use super::coordinator::{Recovered, recover};
use super::{Databases, Orders, PATIENCE, Scale};
use crate::Outcome;
use crate::child::Service;
use crate::cluster::{Session, argument};

const CLIENTS: &str = "8";

#[derive(Debug, Serialize)]
pub(super) struct Death {
    /// Transactions that were left prepared.
    pub(super) prepared_at_orders: u64,
    pub(super) prepared_at_customers: u64,
    /// Customers whose row nobody could change any more.
    pub(super) locked: u64,
    /// The same when the coordinator was started again, and how long that was after its death.
    pub(super) locked_later: u64,
    pub(super) dead_ms: f64,
    pub(super) recovered: Recovered,
    pub(super) recovery_ms: f64,
}

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Death> {
    let databases = Databases::start(dir)?;
    let (orders, customers) = (databases.orders.open()?, databases.customers.open()?);
    let log = dir.join("decisions");
    let sockets = [&databases.orders, &databases.customers].map(|it| argument(it.socket_dir()));
    let [here, there] = sockets;
    let args = [OsStr::new("coordinator"), here, there, argument(&log), OsStr::new(CLIENTS)];
    let began = Instant::now();
    loop {
        let mut coordinator = Service::start(&args)?;
        coordinator.hear()?; // it has placed an order
        std::thread::sleep(scale.dead / 4);
        coordinator.kill()?;
        // Which moment a kill hits is chance.
        if locked(&customers)? > 0 {
            break;
        }
        recover(&log, [&orders, &customers])?;
        orders.run("TRUNCATE orders")?;
        customers.run("TRUNCATE totals")?;
        if began.elapsed() > PATIENCE {
            return Err("no kill hits it between the phases".into());
        }
    }
    let dead = Instant::now();
    let prepared = |side: &Session| side.number("SELECT count(*) FROM pg_prepared_xacts");
    let prepared_at_orders = u64::try_from(prepared(&orders)?)?;
    let prepared_at_customers = u64::try_from(prepared(&customers)?)?;
    let locked_first = locked(&customers)?;
    std::thread::sleep(scale.dead.saturating_sub(dead.elapsed()));
    let locked_later = locked(&customers)?;
    let (restarted, dead) = (Instant::now(), dead.elapsed());
    let recovered = recover(&log, [&orders, &customers])?;
    let recovery = restarted.elapsed();
    databases.check()?;
    if locked(&customers)? > 0 {
        return Err("rows are still locked".into());
    }
    Ok(Death {
        prepared_at_orders,
        prepared_at_customers,
        locked: locked_first,
        locked_later,
        dead_ms: dead.as_secs_f64() * 1e3,
        recovered,
        recovery_ms: recovery.as_secs_f64() * 1e3,
    })
}

/// The customers whose next order would have to wait: their rows are locked by what is prepared, or to be.
fn locked(customers: &Session) -> Outcome<u64> {
    let orders = Orders::read()?;
    let mut ids = Vec::new();
    for gid in customers.texts("SELECT gid FROM pg_prepared_xacts")? {
        let number = gid.strip_prefix("order-").ok_or("whose transaction is it?")?.parse()?;
        ids.push(orders.purchase(number)?.customer);
    }
    ids.sort_unstable();
    ids.dedup();
    let mut locked = 0;
    for id in ids {
        locked += u64::from(is_locked(customers, id)?);
    }
    Ok(locked)
}

/// Tries the statement that an order begins with, for a moment.
fn is_locked(customers: &Session, id: u32) -> Outcome<bool> {
    let statements = format!(
        "BEGIN; SET LOCAL lock_timeout = '50ms'; INSERT INTO totals AS t VALUES ({id}, 1, 1, 1, 1) \
         ON CONFLICT (customer) DO UPDATE SET purchases = t.purchases + 1"
    );
    let attempt = customers.runtime.block_on(customers.client.batch_execute(&statements));
    customers.run("ROLLBACK")?;
    match attempt {
        Ok(()) => Ok(false),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}
