//! Reads at customers, while orders is gone for some seconds.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::thread::{JoinHandle, ScopedJoinHandle};
use std::time::Duration;

use headwater::{Position, Store};
use serde::Serialize;

use super::coordinator::Coordinator;
use super::journal::Shop;
use super::outage::{
    CLIENTS, Down, Tried, connected, longest_ms, outage, placing, steadily, steadily_for,
};
use super::{Databases, Orders, PATIENCE, Scale};
use crate::Outcome;
use crate::child::Service;
use crate::cluster::{Cluster, Session, argument};
use crate::timing::now_ns;
use crate::views::Totals;

/// What each does meanwhile.
#[derive(Debug, Serialize)]
pub(super) struct Away {
    pub(super) two_phase: Side,
    pub(super) headwater: Side,
}

#[derive(Debug, Serialize)]
pub(super) struct Side {
    pub(super) down: Down,
    /// Orders that were placed while orders was gone.
    pub(super) placed: u64,
    /// Reads at customers meanwhile.
    pub(super) read: u64,
    pub(super) failed: u64,
    pub(super) longest_read_ms: f64,
    /// From the start of orders until customers knew of an order again.
    pub(super) again_ms: f64,
}

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Away> {
    Ok(Away {
        two_phase: two_phase(&dir.join("two-phase"), scale)?,
        headwater: headwater(&dir.join("headwater"), scale)?,
    })
}

fn two_phase(dir: &Path, scale: &Scale) -> Outcome<Side> {
    let mut databases = Databases::start(dir)?;
    let coordinator = Coordinator::of(&dir.join("decisions"), &databases)?;
    let clients = connected(&coordinator)?;
    let sessions =
        (0..CLIENTS).map(|_| databases.customers.open()).collect::<Outcome<Vec<Session>>>()?;
    let orders = Orders::read()?;
    let (next, reads) = (AtomicU64::new(CLIENTS), AtomicU64::new(0));
    let began_ns = now_ns();
    let mut started_ns = 0;
    let (tried, read, down) = std::thread::scope(|scope| {
        let (next, reads, orders) = (&next, &reads, &orders);
        let placing = placing(scope, scale, clients, next);
        let reading: Vec<_> = sessions
            .into_iter()
            .zip(0..)
            .map(|(session, place)| {
                let read = move |number| {
                    let customer = orders.purchase(number)?.customer;
                    session.number(&format!(
                        "SELECT coalesce(sum(spent_cents), 0)::bigint FROM totals WHERE customer = {customer}"
                    ))?;
                    Ok(())
                };
                scope.spawn(move || steadily(scale, place, read, reads))
            })
            .collect();
        // The server ends with the thread that started it, so this one does it.
        let start = |orders: &mut Cluster| {
            started_ns = now_ns();
            orders.resume()
        };
        let down = outage(scale, began_ns, &mut databases.orders, Cluster::crash, start);
        (joined(placing), joined(reading), down)
    });
    databases.check()?;
    let placed_ns: Vec<_> = tried.iter().filter(|it| it.is_placed).map(|it| it.ended_ns).collect();
    let again_ns = placed_ns.iter().copied().filter(|at_ns| *at_ns > started_ns).min();
    let again_ns = again_ns.ok_or("no order is placed any more")?;
    Ok(Side::of(began_ns, down?, started_ns, &placed_ns, &read, again_ns))
}

fn headwater(dir: &Path, scale: &Scale) -> Outcome<Side> {
    let at = dir.join("orders");
    let first = Placing::start(&at, "127.0.0.1:0", scale)?;
    let address = first.address.clone();
    let store = Store::create(dir.join("customers"))?;
    let journal = store.mirror("orders", address.as_str())?.wait_ready(PATIENCE)?;
    let totals = store.view_of(&journal, Totals)?;
    let (orders, reads) = (Orders::read()?, AtomicU64::new(0));
    let read = |number| {
        totals.get(&orders.purchase(number)?.customer)?;
        Ok(())
    };
    let mut placing = Some(first);
    let began_ns = now_ns();
    let (mut placed_ns, mut started_ns) = (Vec::new(), 0);
    let (read, down, again) = std::thread::scope(|scope| {
        let (read, reads) = (&read, &reads);
        let reading = (0..CLIENTS)
            .map(|client| scope.spawn(move || steadily(scale, client, read, reads)))
            .collect();
        let stop = |it: &mut Option<Placing>| {
            placed_ns = it.take().ok_or("no orders")?.kill()?;
            Ok(())
        };
        let start = |it: &mut Option<Placing>| {
            started_ns = now_ns();
            *it = Some(Placing::start(&at, &address, scale)?);
            Ok(())
        };
        let down = outage(scale, began_ns, &mut placing, stop, start);
        let again = placing.as_ref().map_or(Ok(0), |it| -> Outcome<u64> {
            totals.wait_for(&journal.wait_past(it.end, PATIENCE).token(), PATIENCE)?;
            Ok(now_ns())
        });
        (joined(reading), down, again)
    });
    placed_ns.extend(placing.ok_or("no orders")?.kill()?);
    Ok(Side::of(began_ns, down?, started_ns, &placed_ns, &read, again?))
}

fn joined(threads: Vec<ScopedJoinHandle<'_, Vec<Tried>>>) -> Vec<Tried> {
    threads.into_iter().flat_map(|it| it.join().unwrap_or_default()).collect()
}

impl Side {
    fn of(
        began_ns: u64,
        down: Down,
        started_ns: u64,
        placed_ns: &[u64],
        read: &[Tried],
        again_ns: u64,
    ) -> Self {
        let from_ns = began_ns + (down.from_ms * 1e6) as u64;
        let to_ns = began_ns + (down.to_ms * 1e6) as u64;
        let reads: Vec<_> =
            read.iter().filter(|it| (from_ns..to_ns).contains(&it.began_ns)).collect();
        Self {
            down,
            placed: placed_ns.iter().filter(|at| (from_ns..started_ns).contains(at)).count() as u64,
            read: reads.len() as u64,
            failed: reads.iter().filter(|it| !it.is_placed).count() as u64,
            longest_read_ms: longest_ms(reads),
            again_ms: again_ns.saturating_sub(started_ns) as f64 / 1e6,
        }
    }
}

/// The service of orders, at the other end of a pipe, which places them by itself.
struct Placing {
    service: Service,
    address: String,
    /// Where its journal ended when it was opened.
    end: Position,
    listener: JoinHandle<Vec<u64>>,
}

impl Placing {
    /// Returns when it serves.
    fn start(dir: &Path, address: &str, scale: &Scale) -> Outcome<Self> {
        let rate = scale.orders_per_second.to_string();
        let args = [OsStr::new("placing"), argument(dir), OsStr::new(address), OsStr::new(&rate)];
        let mut service = Service::start(&args)?;
        let said = service.hear()?;
        let [_, address, end] = &said[..] else { return Err("what does it say?".into()) };
        let (address, end) = (address.clone(), Position::new(end.parse()?));
        let lines = service.listen()?;
        let listener = std::thread::spawn(move || {
            let at_ns = |line: String| line.strip_prefix("placed ")?.parse().ok();
            lines.map_while(Result::ok).filter_map(at_ns).collect()
        });
        Ok(Self { service, address, end, listener })
    }

    /// When it had placed orders.
    fn kill(self) -> Outcome<Vec<u64>> {
        self.service.kill()?;
        Ok(self.listener.join().map_err(|_| "the listener panicked")?)
    }
}

/// Says `serving ADDRESS POSITION`, then `placed NS` for each order, until it is killed.
pub(crate) fn place_until_killed(dir: &Path, address: &str, orders_per_second: u32) -> Outcome<()> {
    let shop = Shop::open_at(dir, address)?;
    let end = shop.store.journal().end().position;
    println!("serving {} {end}", shop.server.local_addr());
    let next = AtomicU64::new(end.get());
    std::thread::scope(|scope| {
        let clients = (0..CLIENTS).map(|client| {
            let (shop, next) = (&shop, &next);
            scope.spawn(move || {
                let place = |number| {
                    shop.place(number)?;
                    println!("placed {}", now_ns());
                    Ok(())
                };
                steadily_for(Duration::MAX, orders_per_second, client, place, next)
            })
        });
        joined(clients.collect());
    });
    Ok(())
}
