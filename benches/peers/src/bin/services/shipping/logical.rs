//! From the beginning of a write until another service can read it: PostgreSQL's logical replication, and ours.

use std::path::Path;
use std::time::Instant;

use super::remote_view::Remote;
use super::{PATIENCE, Scale, sale};
use crate::Outcome;
use crate::cluster::{self, Cluster, Session};
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, Rounds, ms, ratios};

const TABLE: &str = "CREATE TABLE sales (id bigint PRIMARY KEY, payload bytea NOT NULL)";

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    if let Some(why) = cluster::missing() {
        let what = "A write's beginning until it can be read elsewhere, beside PostgreSQL";
        return Ok(vec![Figure::new(what, "ms", None).note(format!("left out: {why}"))]);
    }
    let postgres = Replicated::start(dir)?;
    let remote = Remote::start(dir)?;
    let (mut theirs, mut ours, mut polls) = <(Rounds, Rounds, Rounds)>::default();
    let mut number = 0;
    for _ in 0..scale.peer_rounds {
        let (mut of_theirs, mut of_ours) = (Latencies::default(), Latencies::default());
        let mut of_polls = Latencies::default();
        for _ in 0..scale.peer_commits {
            number += 1;
            let began = Instant::now();
            postgres.insert(number)?;
            while !postgres.is_visible(number, &mut of_polls)? {
                if began.elapsed() > PATIENCE {
                    return Err("a row doesn't arrive".into());
                }
            }
            of_theirs.add(began.elapsed());

            of_ours.add(remote.append_and_see(number.unsigned_abs())?);
        }
        theirs.add(&of_theirs);
        ours.add(&of_ours);
        polls.add(&of_polls);
    }
    let beside = "PostgreSQL, logical replication";
    let poll = polls.p50.iter().sum::<f64>() / polls.p50.len() as f64;
    let note = format!(
        "both sides of both sync; PostgreSQL's row is looked for by one statement after the other, each of which takes {:.2} ms, ours is waited for",
        poll * 1e3
    );
    Ok(vec![
        Figure::new("A write's beginning until it can be read elsewhere: p50", "ms", ms(&ours.p50))
            .beside(beside, ms(&theirs.p50), ratios(&ours.p50, &theirs.p50))
            .wanted(Wanted::RatioAtMost(1.0 / 3.0))
            .note(note),
        Figure::new("The same: p99", "ms", ms(&ours.p99))
            .beside(beside, ms(&theirs.p99), ratios(&ours.p99, &theirs.p99))
            .wanted(Wanted::RatioAtMost(1.0 / 3.0)),
    ])
}

/// A publisher and a subscriber.
struct Replicated {
    publisher: Session,
    subscriber: Session,
    insert: tokio_postgres::Statement,
    find: tokio_postgres::Statement,
    payload: Vec<u8>,
    /// Behind the sessions, so that it goes last.
    _clusters: [Cluster; 2],
}

impl Replicated {
    fn start(dir: &Path) -> Outcome<Self> {
        let clusters =
            [Cluster::start(&dir.join("publisher"))?, Cluster::start(&dir.join("subscriber"))?];
        let [here, there] = &clusters;
        let (publisher, subscriber) = (here.open()?, there.open()?);
        publisher.run(TABLE)?;
        publisher.run("CREATE PUBLICATION sales FOR TABLE sales")?;
        subscriber.run(TABLE)?;
        // Without this, what is applied there isn't synced.
        subscriber.run(&format!(
            "CREATE SUBSCRIPTION sales CONNECTION '{}' PUBLICATION sales WITH (synchronous_commit = on)",
            here.connection_string()
        ))?;
        let prepare = |at: &Session, query: &str| at.runtime.block_on(at.client.prepare(query));
        let insert = prepare(&publisher, "INSERT INTO sales VALUES ($1, $2)")?;
        let find = prepare(&subscriber, "SELECT 1 FROM sales WHERE id = $1")?;
        let payload = vec![0xA5; sale::PAYLOAD_BYTES];
        let this = Self { publisher, subscriber, insert, find, payload, _clusters: clusters };
        this.wait_streaming()?;
        Ok(this)
    }

    /// Until the first copy of the table is behind it.
    fn wait_streaming(&self) -> Outcome<()> {
        self.insert(0)?;
        let began = Instant::now();
        while !self.is_visible(0, &mut Latencies::default())? {
            if began.elapsed() > PATIENCE {
                return Err("the subscription doesn't come to life".into());
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    }

    fn insert(&self, id: i64) -> Outcome<()> {
        let Session { client, runtime } = &self.publisher;
        runtime.block_on(client.execute(&self.insert, &[&id, &self.payload]))?;
        Ok(())
    }

    fn is_visible(&self, id: i64, polls: &mut Latencies) -> Outcome<bool> {
        let Session { client, runtime } = &self.subscriber;
        let began = Instant::now();
        let row = runtime.block_on(client.query_opt(&self.find, &[&id]))?;
        polls.add(began.elapsed());
        Ok(row.is_some())
    }
}
