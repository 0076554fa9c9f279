//! What a reactor has done, on disk.
//!
//! ```text
//! reactors/<name>/
//!   lock           held as long as the reactor is open
//!   checkpoint     how far it is
//!
//! checkpoint
//!   0   8   magic
//!   8   2   layout of this file, 1
//!  10   6   zeros
//!  16  64   checkpoint: the end of the batch that holds the last event that was done
//!  80   8   position of the next event
//!  88   4   CRC-32 of everything in front
//! ```
//! The next event lies within that batch, or behind it; further behind only if lost events were skipped. As the
//! checkpoint's chain covers the whole batch, a journal that has the checkpoint has every event that was done.
//!
//! The file is replaced as a whole: written beside, synced, renamed, and the folder synced.

use std::path::{Path, PathBuf};

use crate::error::{IoContext, IoError};
use crate::format::{Block, Decoder, FormatError, crc32};
use crate::fs::{self, Fs, Lock, OpenMode};
use crate::journal::layout::Layout;
use crate::position::{Checkpoint, Position};

const MAGIC: [u8; 8] = *b"\x89HWRCT\r\n";
const LAYOUT: u16 = 1;
const FILE_BYTES: usize = 92;
const FILE: &str = "checkpoint";
const LOCK: &str = "lock";

/// How far a reactor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The end of the batch that holds the last event that was done.
    pub(crate) checkpoint: Checkpoint,
    /// The next event.
    pub(crate) next: Position,
}

impl Place {
    /// At the end of a batch.
    pub(crate) const fn at(checkpoint: Checkpoint) -> Self {
        Self { checkpoint, next: checkpoint.position }
    }

    fn encode(&self) -> [u8; FILE_BYTES] {
        let mut out = Block::<FILE_BYTES>::new();
        out.put(0, &MAGIC);
        out.put(8, &LAYOUT.to_le_bytes());
        out.put(16, &self.checkpoint.to_bytes());
        out.put(80, &self.next.get().to_le_bytes());
        let crc = crc32(&[out.0.get(..88).unwrap_or_default()]);
        out.put(88, &crc.to_le_bytes());
        out.0
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
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
        let next = Position::new(input.u64()?);
        if !input.rest().is_empty() {
            return Err(FormatError::Invalid("length"));
        }
        Ok(Self { checkpoint, next })
    }
}

/// The file of a reactor in the folder `dir`.
pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Reads how far a reactor is; `None` if it has never begun. The inner error: the file can't be understood.
pub(crate) fn read(fs: &dyn Fs, dir: &Path) -> Result<Option<Result<Place, FormatError>>, IoError> {
    let path = path(dir);
    let file = match fs.open(&path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(IoError::new("opening", &path, error)),
    };
    let mut bytes = [0; FILE_BYTES + 1];
    let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
    Ok(Some(Place::decode(bytes.get(..read).unwrap_or_default())))
}

/// The same for what survives a crash, beside the process that has the reactor open: what was read had its name
/// before the folder is synced here.
pub(crate) fn read_durable(
    fs: &dyn Fs,
    dir: &Path,
) -> Result<Option<Result<Place, FormatError>>, IoError> {
    let found = read(fs, dir)?;
    fs.sync_dir(dir).context("syncing", dir)?;
    Ok(found)
}

/// Records how far a reactor is; durable when this returns.
pub(super) fn write(fs: &dyn Fs, dir: &Path, place: &Place) -> Result<(), IoError> {
    Layout::new(dir).replace(fs, FILE, &place.encode())
}

/// Creates and locks the folder of a reactor. The inner error: who holds it.
pub(super) fn lock(fs: &dyn Fs, dir: &Path) -> Result<Result<Box<dyn Lock>, String>, IoError> {
    fs.create_dir_all(dir).context("creating", dir)?;
    let path = dir.join(LOCK);
    let owner = format!("process {}", std::process::id());
    let locked = fs.lock(&path, &owner).context("locking", &path)?;
    Ok(locked.map_err(|held| held.owner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Chain, Incarnation, JournalId};

    #[test]
    fn a_checkpoint_is_read_back_and_every_flipped_bit_is_noticed() {
        let checkpoint = Checkpoint {
            journal: JournalId::from_bytes([1; 16]),
            epoch: 2,
            incarnation: Incarnation::new(3),
            offset: 640,
            position: Position::new(9),
            chain: Chain::from_bytes([4; 16]),
        };
        let place = Place { checkpoint, next: Position::new(8) };
        let bytes = place.encode();
        assert_eq!(Place::decode(&bytes), Ok(place));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Place::decode(&damaged).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(Place::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
    }
}
