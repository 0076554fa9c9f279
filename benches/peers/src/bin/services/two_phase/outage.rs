//! Orders at a steady rate, while the customers' side is gone for some seconds.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{JoinHandle, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::coordinator::{Client, Coordinator};
use super::journal::Shop;
use super::{Databases, Scale};
use crate::Outcome;
use crate::child::Service;
use crate::cluster::{Cluster, argument};
use crate::timing::now_ns;

pub(super) const CLIENTS: u64 = 8;
pub(super) const BUCKET: Duration = Duration::from_millis(100);

/// Orders in each tenth of a second.
#[derive(Debug, Serialize)]
pub(super) struct TimeLine {
    pub(super) orders_per_second: u32,
    pub(super) two_phase: TwoPhase,
    pub(super) headwater: Headwater,
}

#[derive(Debug, Serialize)]
pub(super) struct TwoPhase {
    pub(super) down: Down,
    pub(super) placed: Vec<u64>,
    /// Attempts that failed.
    pub(super) failed: Vec<u64>,
    pub(super) longest_ms: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct Headwater {
    pub(super) down: Down,
    /// Durable at orders.
    pub(super) answered: Vec<u64>,
    pub(super) failed: Vec<u64>,
    /// Shown by customers.
    pub(super) seen: Vec<u64>,
    pub(super) longest_ms: f64,
    /// From the start of customers until they knew of every order.
    pub(super) caught_up_ms: f64,
}

/// From the kill until it answers again.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Down {
    pub(super) from_ms: f64,
    pub(super) to_ms: f64,
}

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<TimeLine> {
    let two_phase = two_phase(&dir.join("two-phase"), scale)?;
    let headwater = headwater(&dir.join("headwater"), scale)?;
    Ok(TimeLine { orders_per_second: scale.orders_per_second, two_phase, headwater })
}

/// What was tried: an order, or a read.
pub(super) struct Tried {
    pub(super) began_ns: u64,
    pub(super) ended_ns: u64,
    /// The order is placed, the read was answered.
    pub(super) is_placed: bool,
}

fn two_phase(dir: &Path, scale: &Scale) -> Outcome<TwoPhase> {
    let mut databases = Databases::start(dir)?;
    let coordinator = Coordinator::of(&dir.join("decisions"), &databases)?;
    let clients = connected(&coordinator)?;
    let next = AtomicU64::new(CLIENTS);
    let began_ns = now_ns();
    let (tried, down) = std::thread::scope(|scope| {
        let threads = placing(scope, scale, clients, &next);
        // The server ends with the thread that started it, so this one does it.
        let down =
            outage(scale, began_ns, &mut databases.customers, Cluster::crash, Cluster::resume);
        let tried = threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default());
        (tried.collect::<Vec<_>>(), down)
    });
    let down = down?;
    let placed = tried.iter().filter(|it| it.is_placed).count() as u64;
    if databases.check()? != placed + CLIENTS {
        return Err("an order was lost, or is there though it had failed".into());
    }
    let ended = |is_placed| {
        let these = tried.iter().filter(move |it| it.is_placed == is_placed);
        buckets(scale, began_ns, these.map(|it| (it.ended_ns, 1)))
    };
    Ok(TwoPhase { down, placed: ended(true), failed: ended(false), longest_ms: longest_ms(&tried) })
}

fn headwater(dir: &Path, scale: &Scale) -> Outcome<Headwater> {
    let shop = Shop::open(&dir.join("orders"))?;
    let address = shop.server.local_addr().to_string();
    let dir = dir.join("customers");
    let args = [OsStr::new("customers"), argument(&dir), OsStr::new(&address)];
    let mut customers = Some(Follower::start(&args)?);
    let before = shop.store.journal().end().position.get();
    let began_ns = now_ns();
    let next = AtomicU64::new(before);
    let mut applied = Vec::new();
    let mut restarted_ns = 0;
    let (tried, down) = std::thread::scope(|scope| {
        let (shop, next) = (&shop, &next);
        let place = move |number| shop.place(number).map(drop);
        let threads: Vec<_> = (0..CLIENTS)
            .map(|client| scope.spawn(move || steadily(scale, client, place, next)))
            .collect();
        let down = outage(
            scale,
            began_ns,
            &mut customers,
            |it| {
                applied = it.take().ok_or("no customers")?.kill()?;
                Ok(())
            },
            |it| {
                restarted_ns = now_ns();
                *it = Some(Follower::start(&args)?);
                Ok(())
            },
        );
        let tried = threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default());
        (tried.collect::<Vec<_>>(), down)
    });
    let down = down?;
    let events = shop.store.journal().end().position.get();
    applied.extend(customers.ok_or("no customers")?.finish(events)?);
    let placed = tried.iter().filter(|it| it.is_placed).count() as u64;
    if events != before + placed {
        return Err("an order was lost".into());
    }
    // It had caught up when it first knew of everything that had been answered until then.
    let caught_up = applied.iter().filter(|it| it.at_ns > restarted_ns).find(|it| {
        let answered = tried.iter().filter(|tried| tried.is_placed && tried.ended_ns <= it.at_ns);
        it.events >= before + answered.count() as u64
    });
    let caught_up_ns = caught_up.map_or(u64::MAX, |it| it.at_ns);
    let ended = |is_placed| {
        let these = tried.iter().filter(move |it| it.is_placed == is_placed);
        buckets(scale, began_ns, these.map(|it| (it.ended_ns, 1)))
    };
    Ok(Headwater {
        down,
        answered: ended(true),
        failed: ended(false),
        seen: buckets(scale, began_ns, growth(before, &applied)),
        longest_ms: longest_ms(&tried),
        caught_up_ms: caught_up_ns.saturating_sub(restarted_ns) as f64 / 1e6,
    })
}

/// Clients that have placed the first orders, one each.
pub(super) fn connected(coordinator: &Coordinator) -> Outcome<Vec<Client<'_>>> {
    let clients = (0..CLIENTS).map(|number| {
        let mut client = Client::new(coordinator)?;
        client.place(number)?; // connects
        Ok(client)
    });
    clients.collect()
}

/// They place orders steadily, and leave nothing prepared behind.
pub(super) fn placing<'scope>(
    scope: &'scope Scope<'scope, '_>,
    scale: &'scope Scale,
    clients: Vec<Client<'scope>>,
    next: &'scope AtomicU64,
) -> Vec<ScopedJoinHandle<'scope, Vec<Tried>>> {
    let clients = clients.into_iter().zip(0..);
    let threads = clients.map(|(mut client, place)| {
        scope.spawn(move || {
            let tried = steadily(scale, place, |number| client.place(number), next);
            client.settle();
            tried
        })
    });
    threads.collect()
}

/// A client's orders, one at a time, at its part of the rate. One that takes too long delays the next.
pub(super) fn steadily(
    scale: &Scale,
    client: u64,
    place: impl FnMut(u64) -> Outcome<()>,
    next: &AtomicU64,
) -> Vec<Tried> {
    steadily_for(scale.whole, scale.orders_per_second, client, place, next)
}

pub(super) fn steadily_for(
    whole: Duration,
    orders_per_second: u32,
    client: u64,
    mut place: impl FnMut(u64) -> Outcome<()>,
    next: &AtomicU64,
) -> Vec<Tried> {
    let interval = Duration::from_secs(CLIENTS) / orders_per_second;
    let began = Instant::now();
    let mut due = interval.mul_f64(client as f64 / CLIENTS as f64);
    let mut tried = Vec::new();
    while due < whole {
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        let began_ns = now_ns();
        let is_placed = place(next.fetch_add(1, Ordering::Relaxed)).is_ok();
        tried.push(Tried { began_ns, ended_ns: now_ns(), is_placed });
        due = (due + interval).max(began.elapsed());
    }
    tried
}

pub(super) fn outage<T>(
    scale: &Scale,
    began_ns: u64,
    side: &mut T,
    stop: impl FnOnce(&mut T) -> Outcome<()>,
    start: impl FnOnce(&mut T) -> Outcome<()>,
) -> Outcome<Down> {
    let until = |time: Duration| {
        let elapsed = Duration::from_nanos(now_ns() - began_ns);
        std::thread::sleep(time.saturating_sub(elapsed));
    };
    let ms = || (now_ns() - began_ns) as f64 / 1e6;
    until(scale.down_from);
    let from_ms = ms();
    stop(side)?;
    until(scale.down_to);
    start(side)?;
    Ok(Down { from_ms, to_ms: ms() })
}

fn buckets(scale: &Scale, began_ns: u64, these: impl Iterator<Item = (u64, u64)>) -> Vec<u64> {
    let bucket_ns = u64::try_from(BUCKET.as_nanos()).unwrap_or(u64::MAX);
    let count = scale.whole.as_nanos().div_ceil(BUCKET.as_nanos());
    let mut buckets = vec![0; usize::try_from(count).unwrap_or(0)];
    for (at_ns, orders) in these {
        let index =
            usize::try_from(at_ns.saturating_sub(began_ns) / bucket_ns).unwrap_or(usize::MAX);
        if let Some(bucket) = buckets.get_mut(index) {
            *bucket += orders;
        }
    }
    buckets
}

pub(super) fn longest_ms<'t>(tried: impl IntoIterator<Item = &'t Tried>) -> f64 {
    let longest = tried.into_iter().map(|it| it.ended_ns - it.began_ns).max();
    longest.unwrap_or_default() as f64 / 1e6
}

/// Up to where customers had applied the journal.
#[derive(Clone, Copy)]
struct Applied {
    events: u64,
    at_ns: u64,
}

/// How many were new, and when. A service that was killed may begin a little further back.
fn growth(mut known: u64, applied: &[Applied]) -> impl Iterator<Item = (u64, u64)> {
    applied.iter().map(move |it| {
        let new = it.events.saturating_sub(known);
        known += new;
        (it.at_ns, new)
    })
}

/// The customers' process, and whoever listens to it.
struct Follower {
    service: Service,
    listener: JoinHandle<Outcome<(Vec<Applied>, Option<u64>)>>,
}

impl Follower {
    /// Returns when it serves.
    fn start(args: &[&OsStr]) -> Outcome<Self> {
        let mut service = Service::start(args)?;
        service.hear()?;
        let lines = service.listen()?;
        let listener = std::thread::spawn(move || {
            let (mut applied, mut total) = (Vec::new(), None);
            for line in lines.map_while(Result::ok) {
                match line.split(' ').collect::<Vec<_>>()[..] {
                    ["applied", events, at_ns] => {
                        let (events, at_ns) = (events.parse()?, at_ns.parse()?);
                        applied.push(Applied { events, at_ns });
                    }
                    ["total", purchases] => {
                        total = Some(purchases.parse()?);
                        break;
                    }
                    _ => {} // killed within a line
                }
            }
            Ok((applied, total))
        });
        Ok(Self { service, listener })
    }

    fn kill(self) -> Outcome<Vec<Applied>> {
        self.service.kill()?;
        Ok(self.listener.join().map_err(|_| "the listener panicked")??.0)
    }

    /// When it has applied this many events; its rows must hold all of them, once.
    fn finish(mut self, events: u64) -> Outcome<Vec<Applied>> {
        self.service.say(&format!("total {events}"))?;
        let (applied, total) = self.listener.join().map_err(|_| "the listener panicked")??;
        if total == Some(events) {
            Ok(applied)
        } else {
            Err("customers don't know of every order".into())
        }
    }
}
