use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use okaywal::WriteAheadLog;
use okaywal::{Configuration, Entry, EntryId, LogManager, SegmentReader};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Operation, Peer, Shape, Writer};

pub(super) const PEER: Peer = Peer {
    name: "okaywal",
    package: Some("okaywal"),
    kind: Kind::Peer,
    durable: "yes: fdatasync, shared by concurrent appends",
    used: "never checkpointed, because that discards history; 64 MiB of zeros prepared before the measurement; it can be read only while it is opened, so a replay opens it; opening reads everything, because skipping chunks ends its recovery too early",
    without: &[
        (Operation::Random, "reads by its own byte addresses, which the caller has to keep"),
        (Operation::Stream, "knows no streams"),
    ],
    open,
};

const PREPARED_BYTES: u32 = 64 << 20;

struct Wal {
    dir: PathBuf,
    open: Option<WriteAheadLog>,
}

fn open(dir: &Path, _: Shape) -> Outcome<Box<dyn Engine>> {
    let recovered = Recover::default();
    Ok(Box::new(Wal { dir: dir.to_owned(), open: Some(recover(dir, recovered)?) }))
}

fn recover(dir: &Path, manager: Recover) -> io::Result<WriteAheadLog> {
    Configuration::default_for(dir)
        .preallocate_bytes(PREPARED_BYTES)
        .checkpoint_after_bytes(u64::MAX)
        .open(manager)
}

/// Sees all entries when the log is opened. Payloads are kept only if somebody wants to see them.
///
/// Always reads them: an entry that is skipped, as the interface offers, skips its checksum twice, and the log
/// seems to end there.
#[derive(Debug, Default)]
struct Recover(Option<Arc<Mutex<Vec<Vec<u8>>>>>);

impl LogManager for Recover {
    fn recover(&mut self, entry: &mut Entry<'_>) -> io::Result<()> {
        let payloads = entry.read_all_chunks()?.unwrap_or_default();
        if let Some(kept) = &self.0 {
            kept.lock().unwrap_or_else(PoisonError::into_inner).extend(payloads);
        }
        Ok(())
    }

    fn checkpoint_to(
        &mut self,
        _: EntryId,
        _: &mut SegmentReader,
        _: &WriteAheadLog,
    ) -> io::Result<()> {
        Ok(())
    }
}

impl Engine for Wal {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(Writes(self.open.as_ref().ok_or("not open")?)))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        if let Some(open) = self.open.take() {
            open.shutdown()?;
        }
        let kept = Arc::<Mutex<Vec<_>>>::default();
        self.open = Some(recover(&self.dir, Recover(Some(Arc::clone(&kept))))?);
        for payload in kept.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            each(&payload);
        }
        Ok(())
    }

    fn close(mut self: Box<Self>) -> Outcome<()> {
        self.open.take().map_or(Ok(()), |open| Ok(open.shutdown()?))
    }
}

struct Writes<'a>(&'a WriteAheadLog);

impl Writer for Writes<'_> {
    fn append(&mut self, _: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let mut entry = self.0.begin_entry()?;
        for payload in payloads {
            entry.write_chunk(payload)?;
        }
        entry.commit()?;
        Ok(())
    }
}
