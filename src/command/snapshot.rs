//! Snapshots of aggregates, on disk.
//!
//! ```text
//! DIR/snapshots/<aggregate>/<hash of the stream's name, 16 hex digits>.snap
//!
//!   0   8   magic                        104  2   length s of the stream's name
//!   8   2   layout of this file, 1       106  s   the stream's name
//!  10   6   zeros                        …    4   length n of the state
//!  16  64   checkpoint                   …    n   the state, in bincode
//!  80   4   version of the aggregate     …    4   CRC-32 of everything in front
//!  84   4   zeros
//!  88   8   how many of the stream's events are in the state
//!  96   8   zeros
//! ```
//! All of these events lie in front of the checkpoint: so where the journal has that very checkpoint (which
//! carries the chain over everything in front), the state is the fold of its events.
//!
//! - Nothing is synced. After a crash a file may be missing, old, cut or full of zeros: it is used only if
//!   everything in it is right.
//! - It is not used where events in front of it were lost, as the stream itself can't be read there either.

use std::io;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Aggregate;
use super::load::Loaded;
use crate::codec::{Bincode, Codec, CodecError};
use crate::event::StreamId;
use crate::format::{Decoder, FormatError, crc32, sidecar::stream_hash};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::{Comparison, Journal};
use crate::position::Checkpoint;
use crate::store::Store;

/// The folder of snapshots, beside the journal.
const FOLDER: &str = "snapshots";
const MAGIC: [u8; 8] = *b"\x89HWSNP\r\n";
const LAYOUT: u16 = 1;
/// No file is larger: what would be isn't written.
const FILE_BYTES_MAX: u64 = crate::codec::DECODE_BYTES_MAX as u64;

/// Whether and how snapshots of `A` are kept.
pub(super) struct Snapshots<A> {
    every: u64,
    encode: fn(&A) -> Result<Vec<u8>, CodecError>,
    decode: fn(&[u8]) -> Result<A, CodecError>,
    aggregate: PhantomData<fn() -> A>,
}

impl<A> Clone for Snapshots<A> {
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
struct Contents<'a> {
    checkpoint: Checkpoint,
    version: u32,
    count: u64,
    stream: &'a str,
    state: &'a [u8],
}

impl Contents<'_> {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128 + self.stream.len() + self.state.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&LAYOUT.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&self.checkpoint.to_bytes());
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&(self.stream.len() as u16).to_le_bytes());
        out.extend_from_slice(self.stream.as_bytes());
        out.extend_from_slice(&(self.state.len() as u32).to_le_bytes());
        out.extend_from_slice(self.state);
        let crc = crc32(&[&out]);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }
}

fn decode(bytes: &[u8]) -> Result<Contents<'_>, FormatError> {
    let (covered, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated)?;
    let mut input = Decoder::new(covered);
    if input.array()? != MAGIC {
        return Err(FormatError::Magic);
    }
    if crc32(&[covered]) != u32::from_le_bytes(*crc) {
        return Err(FormatError::BodyChecksum);
    }
    let version = input.u16()?;
    if version != LAYOUT {
        return Err(FormatError::Unsupported { version, flags: 0 });
    }
    input.bytes(6)?;
    let checkpoint =
        Checkpoint::from_bytes(&input.array()?).ok_or(FormatError::Invalid("checkpoint"))?;
    let version = input.u32()?;
    input.bytes(4)?;
    let count = input.u64()?;
    input.bytes(8)?;
    let stream = input.text16("stream name")?;
    let len = input.u32()?;
    let state = input.bytes(len as usize)?;
    if !input.rest().is_empty() {
        return Err(FormatError::Invalid("length"));
    }
    Ok(Contents { checkpoint, version, count, stream, state })
}

impl<A> Snapshots<A> {
    pub(super) const fn every(&self) -> u64 {
        self.every
    }
}

impl<A: Aggregate> Snapshots<A> {
    pub(super) fn new(every: u64) -> Self
    where
        A: Serialize + DeserializeOwned,
    {
        Self {
            every: every.max(1),
            encode: |state| Bincode::encode(state),
            decode: |bytes| Bincode::decode(bytes),
            aggregate: PhantomData,
        }
    }

    /// The state of a stream's snapshot, if there is one that is of this journal's history.
    pub(super) fn read(&self, store: &Store, stream: &StreamId) -> Option<Loaded<A>> {
        let bytes = read_file(&**store.fs(), &path::<A>(store, stream)).ok()?;
        let contents = decode(&bytes).ok()?;
        if contents.version != A::VERSION || contents.stream != stream.as_str() {
            return None;
        }
        if !is_of(store.journal(), stream, &contents) {
            return None;
        }
        let state = (self.decode)(contents.state).ok()?;
        Some(Loaded { state, count: contents.count, saved: contents.count })
    }

    /// An effort: without a snapshot the stream is read.
    pub(super) fn write_if_due(&self, store: &Store, stream: &StreamId, loaded: &mut Loaded<A>) {
        if loaded.count.saturating_sub(loaded.saved) < self.every {
            return;
        }
        let Ok(state) = (self.encode)(&loaded.state) else { return };
        // Everything that is in it was durable when it was read.
        let contents = Contents {
            checkpoint: store.journal().end(),
            version: A::VERSION,
            count: loaded.count,
            stream: stream.as_str(),
            state: &state,
        };
        let bytes = contents.encode();
        if bytes.len() as u64 <= FILE_BYTES_MAX
            && write_file(&**store.fs(), &path::<A>(store, stream), &bytes).is_ok()
        {
            loaded.saved = loaded.count;
        }
    }
}

/// Whether the journal holds what a snapshot was made from.
fn is_of(journal: &Journal, stream: &StreamId, contents: &Contents<'_>) -> bool {
    let checkpoint = &contents.checkpoint;
    let lost = journal.lost_events();
    let has_events = match journal.stream_head(stream) {
        Ok(head) => head.map_or(0, |head| head.next().get()) >= contents.count,
        Err(_) => false,
    };
    has_events
        && lost.first().is_none_or(|first| first.start >= checkpoint.position)
        && matches!(journal.compare(checkpoint), Ok(Comparison::Equal))
}

fn path<A: Aggregate>(store: &Store, stream: &StreamId) -> PathBuf {
    let name = format!("{:016x}.snap", stream_hash(stream.as_str()));
    store.dir().join(FOLDER).join(A::NAME).join(name)
}

fn read_file(fs: &dyn Fs, path: &std::path::Path) -> io::Result<Vec<u8>> {
    let file = fs.open(path, OpenMode::Read)?;
    let len = file.size()?;
    if len > FILE_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; len as usize];
    fs::read_exact_at(&*file, &mut bytes, 0)?;
    Ok(bytes)
}

fn write_file(fs: &dyn Fs, path: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("snap.new");
    drop(fs.remove(&new));
    let file = match fs.open(&new, OpenMode::CreateNew) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            path.parent().map_or(Ok(()), |dir| fs.create_dir_all(dir))?;
            fs.open(&new, OpenMode::CreateNew)?
        }
        opened => opened?,
    };
    fs::write_all_at(&*file, bytes, 0)?;
    fs.rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Chain, Incarnation, JournalId, Position};

    #[test]
    fn a_snapshot_is_read_back_and_every_flipped_bit_is_noticed() {
        let checkpoint = Checkpoint {
            journal: JournalId::from_bytes([1; 16]),
            epoch: 2,
            incarnation: Incarnation::new(3),
            offset: 640,
            position: Position::new(9),
            chain: Chain::from_bytes([4; 16]),
        };
        let contents =
            Contents { checkpoint, version: 5, count: 6, stream: "order-7", state: b"state" };
        let bytes = contents.encode();
        assert_eq!(decode(&bytes), Ok(contents));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "cut to {len}");
        }
    }
}
