//! How long an order takes, and how many are placed, by clients that place one after the other.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use headwater::Store;
use headwater::view::ViewHandle;
use serde::Serialize;

use super::coordinator::{Client, Coordinator, insert};
use super::journal::Shop;
use super::{Databases, Orders, PATIENCE, Scale, customers};
use crate::Outcome;
use crate::baseline::Device;
use crate::cluster::Session;
use crate::shared::spread::Spread;
use crate::timing::{Latencies, Rounds, ms, ratios};
use crate::views::Totals;
use crate::wire::Peer;

const CLIENTS: [usize; 2] = [1, 8];
/// About what an order is in the journal.
const MESSAGE_BYTES: usize = 256;
const FILE_BYTES: u64 = 4 << 20;

/// One way to place an order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) enum Kind {
    /// The bare machine: sync here, send, sync there, answer.
    Bare,
    /// The order in one PostgreSQL database; nobody else knows of it.
    OneDatabase,
    TwoPhase,
    /// Headwater; until it is durable at orders.
    Answered,
    /// Headwater; until customers show it.
    Seen,
}

const KINDS: [Kind; 5] =
    [Kind::Bare, Kind::OneDatabase, Kind::TwoPhase, Kind::Answered, Kind::Seen];

/// What it came to.
#[derive(Debug, Serialize)]
pub(super) struct Way {
    pub(super) kind: Kind,
    pub(super) clients: usize,
    pub(super) p50_ms: Option<Spread>,
    pub(super) p99_ms: Option<Spread>,
    pub(super) per_second: Option<Spread>,
    /// Times of two-phase commit over this one's, round by round.
    pub(super) times_faster_p50: Option<Spread>,
}

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Way>> {
    let sides = Sides::start(dir)?;
    let mut ways = Vec::new();
    for clients in CLIENTS {
        let mut rounds = [(); KINDS.len()].map(|()| (Rounds::default(), Vec::new()));
        for _ in 0..scale.rounds {
            for (kind, (latencies, rates)) in KINDS.into_iter().zip(&mut rounds) {
                let placed = sides.round(kind, clients, scale.round)?;
                latencies.add(&placed.latencies);
                rates.push(placed.latencies.len() as f64 / placed.took.as_secs_f64());
                sides.settle()?;
            }
        }
        let two_phase = rounds[2].0.p50.clone();
        ways.extend(KINDS.into_iter().zip(rounds).map(|(kind, (latencies, rates))| Way {
            kind,
            clients,
            p50_ms: ms(&latencies.p50),
            p99_ms: ms(&latencies.p99),
            per_second: Spread::of(rates),
            times_faster_p50: ratios(&two_phase, &latencies.p50),
        }));
    }
    sides.check()?;
    Ok(ways)
}

/// Both worlds, side by side.
struct Sides {
    coordinator: Coordinator,
    databases: Databases,
    totals: ViewHandle<Totals>,
    _mirror: headwater::shipping::Mirror,
    _customers: Store,
    shop: Shop,
    orders: Orders,
    /// The next order's number.
    next: AtomicU64,
    /// Orders that only one database was told of.
    alone: AtomicU64,
    dir: std::path::PathBuf,
}

struct Placed {
    latencies: Latencies,
    took: Duration,
}

/// Places an order.
type Place<'a> = Box<dyn FnMut(u64) -> Outcome<()> + 'a>;

impl Sides {
    fn start(dir: &Path) -> Outcome<Self> {
        let databases = Databases::start(dir)?;
        databases.orders.open()?.run("CREATE TABLE alone (LIKE orders INCLUDING ALL)")?;
        let shop = Shop::open(&dir.join("shop"))?;
        let customers = Store::create(dir.join("follower"))?;
        let mirror = customers.mirror("orders", shop.server.local_addr().to_string())?;
        let totals = customers.view_of(&mirror.wait_ready(PATIENCE)?, Totals)?;
        Ok(Self {
            coordinator: Coordinator::of(&dir.join("decisions"), &databases)?,
            databases,
            totals,
            _mirror: mirror,
            _customers: customers,
            shop,
            orders: Orders::read()?,
            next: AtomicU64::new(0),
            alone: AtomicU64::new(0),
            dir: dir.to_owned(),
        })
    }

    fn round(&self, kind: Kind, clients: usize, time: Duration) -> Outcome<Placed> {
        let start = std::sync::Barrier::new(clients + 1);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..clients)
                .map(|client| {
                    let start = &start;
                    scope.spawn(move || -> Outcome<Latencies> {
                        let place = self.client(kind, client).and_then(|mut place| {
                            place(self.next.fetch_add(1, Ordering::Relaxed))?; // connects
                            Ok(place)
                        });
                        start.wait();
                        self.work(place?, time)
                    })
                })
                .collect();
            start.wait();
            let began = Instant::now();
            let mut latencies = Latencies::default();
            for thread in threads {
                latencies.append(&mut thread.join().map_err(|_| "a client panicked")??);
            }
            Ok(Placed { latencies, took: began.elapsed() })
        })
    }

    fn work(&self, mut place: Place<'_>, time: Duration) -> Outcome<Latencies> {
        let (began, mut latencies) = (Instant::now(), Latencies::default());
        while began.elapsed() < time {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let called = Instant::now();
            place(number)?;
            latencies.add(called.elapsed());
        }
        Ok(latencies)
    }

    fn client(&self, kind: Kind, number: usize) -> Outcome<Place<'_>> {
        Ok(match kind {
            Kind::Bare => self.bare(number)?,
            Kind::OneDatabase => {
                let session = self.databases.orders.open()?;
                Box::new(move |number| self.place_alone(&session, number))
            }
            Kind::TwoPhase => {
                let mut client = Client::new(&self.coordinator)?;
                Box::new(move |number| client.place(number))
            }
            Kind::Answered => Box::new(|number| self.shop.place(number).map(drop)),
            Kind::Seen => Box::new(|number| {
                let token = self.shop.place(number)?;
                Ok(self.totals.wait_for(&token, PATIENCE)?)
            }),
        })
    }

    fn bare(&self, client: usize) -> Outcome<Place<'_>> {
        let file = |side: &str| -> Outcome<Device> {
            let path = self.dir.join(format!("bare-{side}-{client}"));
            drop(std::fs::remove_file(&path));
            Ok(Device::create(&path, FILE_BYTES)?)
        };
        let (mut here, there) = (file("here")?, file("there")?);
        let mut peer = Peer::start(there, MESSAGE_BYTES)?;
        let message = [0xA5; MESSAGE_BYTES];
        Ok(Box::new(move |_| {
            here.write_synced(&message)?;
            Ok(peer.send(&message)?)
        }))
    }

    fn place_alone(&self, session: &Session, number: u64) -> Outcome<()> {
        let insert = insert(number, self.orders.purchase(number)?);
        session.run(&insert.replacen("orders", "alone", 1))?;
        self.alone.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// What one of them leaves to be done shall not be the next one's burden.
    fn settle(&self) -> Outcome<()> {
        self.totals.wait_for(&self.shop.store.journal().end().token(), PATIENCE)?;
        Ok(rustix::fs::syncfs(std::fs::File::open(&self.dir)?)?)
    }

    /// Nothing was lost, nothing was counted twice.
    fn check(&self) -> Outcome<()> {
        self.databases.check()?;
        let alone = self.databases.orders.open()?.number("SELECT count(*) FROM alone")?;
        if u64::try_from(alone)? != self.alone.load(Ordering::Relaxed) {
            return Err("the one database has lost orders".into());
        }
        let events = self.shop.store.journal().end().position.get();
        if customers::total(&self.totals)? == events {
            Ok(())
        } else {
            Err("the view differs".into())
        }
    }
}
