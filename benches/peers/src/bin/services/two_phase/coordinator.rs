//! Two-phase commit, as small as it can be without being wrong: both phases go to both databases at once, the decision
//! is synced in between, and what isn't decided is rolled back (presumed abort).
//!
//! The decisions are in a journal of Headwater's, so that clients share its syncs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures_util::future::join;
use headwater::{Append, ExpectedRevision, NewEvent, Position, Store, StreamId};
use serde::{Deserialize, Serialize};
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::Client as Connection;
use tokio_postgres::error::SqlState;

use super::{Databases, Orders};
use crate::Outcome;
use crate::cluster::{self, Session};
use crate::events::Purchase;

/// Between attempts to reach a database.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Decision {
    gid: String,
}

headwater::events! {
    pub(super) enum DecisionEvent {
        Committed(Decision) = "two-phase.committed", version 1;
    }
}

#[derive(Debug, Args)]
pub(crate) struct Task {
    orders: PathBuf,
    customers: PathBuf,
    log: PathBuf,
    clients: u64,
}

/// Places orders until it is killed: for [`death`](super::death).
pub(crate) fn run(task: &Task) -> Outcome<()> {
    let coordinator = Coordinator::new(&task.log, &task.orders, &task.customers)?;
    std::thread::scope(|scope| {
        let clients = (0..task.clients).map(|client| {
            let coordinator = &coordinator;
            scope.spawn(move || -> Outcome<()> {
                let mut it = Client::new(coordinator)?;
                for number in (client..).step_by(usize::try_from(task.clients)?) {
                    it.place(number)?;
                    if number == client {
                        println!("placed {number}");
                    }
                }
                Ok(())
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.join().map_err(|_| "a client panicked")??;
        }
        Ok(())
    })
}

/// What clients share.
pub(super) struct Coordinator {
    log: Store,
    stream: StreamId,
    orders: Orders,
    socket_dirs: [PathBuf; 2],
}

impl Coordinator {
    pub(super) fn new(log: &Path, orders: &Path, customers: &Path) -> Outcome<Self> {
        Ok(Self {
            log: Store::builder(log).create_if_missing().open()?,
            stream: StreamId::new("decisions")?,
            orders: Orders::read()?,
            socket_dirs: [orders.to_owned(), customers.to_owned()],
        })
    }

    pub(super) fn of(log: &Path, databases: &Databases) -> Outcome<Self> {
        Self::new(log, databases.orders.socket_dir(), databases.customers.socket_dir())
    }

    fn decide(&self, gid: &str) -> Outcome<()> {
        let decision = NewEvent::typed(&DecisionEvent::from(Decision { gid: gid.to_owned() }))?;
        self.log.append(&Append::to(&self.stream, ExpectedRevision::Any, [decision]))?;
        Ok(())
    }
}

/// One order at a time.
pub(super) struct Client<'a> {
    coordinator: &'a Coordinator,
    runtime: Runtime,
    orders: Participant,
    customers: Participant,
}

impl<'a> Client<'a> {
    pub(super) fn new(coordinator: &'a Coordinator) -> Outcome<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let [orders, customers] = coordinator.socket_dirs.clone().map(Participant::new);
        Ok(Self { coordinator, runtime, orders, customers })
    }

    /// When this returns, both sides have the order; after an error, neither has, or will have.
    pub(super) fn place(&mut self, number: u64) -> Outcome<()> {
        let gid = format!("order-{number}");
        let purchase = self.coordinator.orders.purchase(number)?;
        let (insert, count) = (insert(number, purchase), count(purchase));
        let Self { coordinator, runtime, orders, customers } = self;
        runtime.block_on(async {
            match join(orders.prepare(&insert, &gid), customers.prepare(&count, &gid)).await {
                (Ok(()), Ok(())) => {}
                (here, there) => {
                    join(orders.abort(&gid, here.is_ok()), customers.abort(&gid, there.is_ok()))
                        .await;
                    return here.and(there).map_err(Into::into);
                }
            }
            coordinator.decide(&gid)?;
            join(orders.commit(&gid), customers.commit(&gid)).await;
            Ok(())
        })
    }

    /// Leaves nothing prepared behind, however long that takes.
    pub(super) fn settle(&mut self) {
        let Self { runtime, orders, customers, .. } = self;
        runtime.block_on(async {
            join(orders.settle(), customers.settle()).await;
        });
    }
}

/// A database, as a client sees it.
struct Participant {
    socket_dir: PathBuf,
    connection: Option<Connection>,
    /// May be prepared there, and must not stay.
    unwanted: Option<String>,
}

impl Participant {
    fn new(socket_dir: PathBuf) -> Self {
        Self { socket_dir, connection: None, unwanted: None }
    }

    async fn prepare(&mut self, statement: &str, gid: &str) -> Result<(), tokio_postgres::Error> {
        self.clean_up().await?;
        let prepare = format!("BEGIN; {statement}; PREPARE TRANSACTION '{gid}'");
        let outcome = self.execute(&prepare).await;
        if outcome.is_err() {
            self.unwanted = Some(gid.to_owned()); // it may have been prepared all the same
        }
        outcome
    }

    /// Doesn't return before it is done: it is decided.
    async fn commit(&mut self, gid: &str) {
        while self.finish("COMMIT", gid).await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// If it can't be done now, it is done before the next order.
    async fn abort(&mut self, gid: &str, is_prepared: bool) {
        if is_prepared {
            self.unwanted = Some(gid.to_owned());
        }
        drop(self.clean_up().await);
    }

    async fn clean_up(&mut self) -> Result<(), tokio_postgres::Error> {
        if let Some(gid) = self.unwanted.clone() {
            self.finish("ROLLBACK", &gid).await?;
            self.unwanted = None;
        }
        Ok(())
    }

    async fn settle(&mut self) {
        while self.clean_up().await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn finish(&mut self, verb: &str, gid: &str) -> Result<(), tokio_postgres::Error> {
        match self.execute(&format!("{verb} PREPARED '{gid}'")).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(()), // it was done
            outcome => outcome,
        }
    }

    /// After a failure the connection is given up, and with it what it had begun and not prepared.
    async fn execute(&mut self, statements: &str) -> Result<(), tokio_postgres::Error> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => cluster::connect(&self.socket_dir).await?,
        };
        connection.batch_execute(statements).await?;
        self.connection = Some(connection);
        Ok(())
    }
}

pub(super) fn insert(number: u64, purchase: &Purchase) -> String {
    let Purchase { customer, date, cds, amount_cents } = purchase;
    format!("INSERT INTO orders VALUES ({number}, {customer}, {date}, {cds}, {amount_cents})")
}

fn count(purchase: &Purchase) -> String {
    let Purchase { customer, date, cds, amount_cents } = purchase;
    format!(
        "INSERT INTO totals AS t VALUES ({customer}, 1, {cds}, {amount_cents}, {date}) ON CONFLICT (customer) DO UPDATE SET \
         purchases = t.purchases + 1, cds = t.cds + {cds}, spent_cents = t.spent_cents + {amount_cents}, \
         last_date = greatest(t.last_date, {date})"
    )
}

/// What a coordinator does that was started again: what its log says, and nothing else.
pub(super) fn recover(log: &Path, sides: [&Session; 2]) -> Outcome<Recovered> {
    let log = Store::open(log)?;
    let mut decided = HashSet::new();
    for event in log.read_all(Position::START)? {
        for event in event?.decode::<DecisionEvent>()? {
            let DecisionEvent::Committed(decision) = event.into_data();
            decided.insert(decision.gid);
        }
    }
    let mut recovered = Recovered::default();
    for side in sides {
        for gid in side.texts("SELECT gid FROM pg_prepared_xacts")? {
            let (verb, counter) = match decided.contains(&gid) {
                true => ("COMMIT", &mut recovered.committed),
                false => ("ROLLBACK", &mut recovered.rolled_back),
            };
            side.run(&format!("{verb} PREPARED '{gid}'"))?;
            *counter += 1;
        }
    }
    Ok(recovered)
}

/// Transactions, counted at each side.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Recovered {
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
}
