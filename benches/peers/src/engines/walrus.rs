use std::path::Path;

use walrus_rust::{FsyncSchedule, ReadConsistency, Walrus};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Operation, Peer, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "walrus-rust",
    package: Some("walrus-rust"),
    kind: Kind::Peer,
    durable: "NOT QUITE: SyncEach opens its files with O_SYNC and calls fsync, but for single events it ignores the result of the write, so that a failed write is acknowledged, too. Its default (an fsync every 200 ms, after the acknowledgement) is NOT DURABLE and isn't measured",
    used: "SyncEach, file back end; each stream is a topic; batches through io_uring",
    without: &[
        (Operation::Replay, "reading consumes a topic and has no order among topics"),
        (Operation::Random, "reads only the next event of a topic"),
        (Operation::Stream, "reading consumes a topic"),
        (
            Operation::Open,
            "writing the log would take minutes: in a batch, each event is synced for itself",
        ),
    ],
    open,
};

struct Topics(Walrus);

fn open(dir: &Path, _: Shape) -> Outcome<Box<dyn Engine>> {
    // It knows no paths, only names below the folder `wal_files` of where it is started.
    std::env::set_current_dir(dir)?;
    let schedule = FsyncSchedule::SyncEach;
    let wal = Walrus::with_consistency_and_schedule(ReadConsistency::StrictlyAtOnce, schedule)?;
    Ok(Box::new(Topics(wal)))
}

impl Engine for Topics {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(Writes { wal: &self.0, topic: String::new(), stream: None }))
    }

    fn replay(&mut self, _: Each<'_>) -> Outcome<()> {
        Err("not offered".into())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(())
    }
}

struct Writes<'a> {
    wal: &'a Walrus,
    topic: String,
    stream: Option<u32>,
}

impl Writer for Writes<'_> {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        if self.stream != Some(stream) {
            self.topic = format!("t{stream}"); // longer names don't fit into its headers
            self.stream = Some(stream);
        }
        match payloads {
            [payload] => self.wal.append_for_topic(&self.topic, payload)?,
            payloads => self.wal.batch_append_for_topic(&self.topic, payloads)?,
        }
        Ok(())
    }
}
