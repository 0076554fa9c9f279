use std::path::Path;
use std::sync::Mutex;

use rusqlite::{Connection, TransactionBehavior};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "sqlite",
    package: Some("rusqlite"),
    kind: Kind::Peer,
    durable: "yes: fdatasync of its log (WAL, synchronous=FULL), one for each append",
    used: "all writers share a connection behind a mutex; one table (number, stream, payload); an index by stream only for the corpus that is read; prepared statements",
    without: &[],
    open,
};

const PANICKED: &str = "a writer panicked";

struct Table(Mutex<Connection>);

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let connection = Connection::open(dir.join("events.sqlite"))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS events \
         (number INTEGER PRIMARY KEY, stream INTEGER NOT NULL, payload BLOB NOT NULL)",
    )?;
    if shape.streams {
        connection
            .execute_batch("CREATE INDEX IF NOT EXISTS streams ON events (stream, number)")?;
    }
    Ok(Box::new(Table(Mutex::new(connection))))
}

impl Table {
    fn query(&mut self, sql: &str, key: Option<u64>, each: Each<'_>) -> Outcome<()> {
        let connection = self.0.get_mut().map_err(|_| PANICKED)?;
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
        Ok(Box::new(Inserts(&self.0)))
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
        let connection = self.0.into_inner().map_err(|_| PANICKED)?;
        connection.close().map_err(|(_, error)| error.into())
    }
}

struct Inserts<'a>(&'a Mutex<Connection>);

impl Writer for Inserts<'_> {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let mut connection = self.0.lock().map_err(|_| PANICKED)?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
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
