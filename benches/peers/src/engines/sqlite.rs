use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "sqlite",
    package: Some("rusqlite"),
    kind: Kind::Peer,
    durable: "yes: fdatasync of its log (WAL, synchronous=FULL), one for each append",
    used: "a connection for each writer, who wait for each other with a busy time-out of 10 s; one table (number, stream, payload); an index by stream only for the corpus that is read; prepared statements",
    without: &[],
    open,
};

const BUSY: Duration = Duration::from_secs(10);

struct Table {
    path: PathBuf,
    reads: std::sync::Mutex<Connection>,
}

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let path = dir.join("events.sqlite");
    let reads = connect(&path)?;
    reads.execute_batch(
        "CREATE TABLE IF NOT EXISTS events \
         (number INTEGER PRIMARY KEY, stream INTEGER NOT NULL, payload BLOB NOT NULL)",
    )?;
    if shape.streams {
        reads.execute_batch("CREATE INDEX IF NOT EXISTS streams ON events (stream, number)")?;
    }
    Ok(Box::new(Table { path, reads: std::sync::Mutex::new(reads) }))
}

fn connect(path: &Path) -> Outcome<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    Ok(connection)
}

impl Table {
    fn query(&mut self, sql: &str, key: Option<u64>, each: Each<'_>) -> Outcome<()> {
        let connection = self.reads.get_mut().map_err(|_| "a reader panicked")?;
        let mut statement = connection.prepare_cached(sql)?;
        let mut rows = match key {
            Some(key) => statement.query([i64::try_from(key)?])?,
            None => statement.query([])?,
        };
        while let Some(row) = rows.next()? {
            each(row.get_ref(0)?.as_blob()?);
        }
        Ok(())
    }
}

impl Engine for Table {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(Inserts(connect(&self.path)?)))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        self.query("SELECT payload FROM events ORDER BY number", None, each)
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        // SQLite counts from 1.
        self.query("SELECT payload FROM events WHERE number = ?", Some(place.number + 1), each)
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        let sql = "SELECT payload FROM events WHERE stream = ? ORDER BY number";
        self.query(sql, Some(stream.into()), each)
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        let reads = self.reads.into_inner().map_err(|_| "a reader panicked")?;
        reads.close().map_err(|(_, error)| error.into())
    }
}

struct Inserts(Connection);

impl Writer for Inserts {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut insert =
                transaction.prepare_cached("INSERT INTO events (stream, payload) VALUES (?, ?)")?;
            for payload in payloads {
                insert.execute((stream, payload))?;
            }
        }
        Ok(transaction.commit()?)
    }
}
