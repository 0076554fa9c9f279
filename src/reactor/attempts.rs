//! Events that kill the process while it reacts to them.
//!
//! ```text
//! reactors/<name>/reacting     what it is at; written over and over, never synced: it outlives the process, and when
//!                              the machine goes down nobody asks for it
//!    0  1  1 while the reactor's code is at the event, 0 when that has returned
//!    8 16  journal
//!   24  8  the event's position
//!   32 16  its id
//!   48  4  how often the process had died of it before
//!   52  4  CRC-32 of everything in front
//! ```
//! Nothing can catch an abort, so the next opening counts. A note that can't be written or read stops nothing: then
//! nothing is found out.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::event::EventId;
use crate::format::{Block, Decoder, crc32};
use crate::fs::{self, File, Fs, OpenMode};
use crate::position::{JournalId, Position};

/// So often in a row the process may die of an event before the reactor halts in front of it. A reaction waits for
/// others, and may be killed from outside meanwhile: more often than the fold of a view.
pub(super) const DEATHS_MAX: u32 = 5;
const FILE: &str = "reacting";
const FILE_BYTES: usize = 56;

/// An event, by all that tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    pub(super) journal: JournalId,
    pub(super) position: Position,
    pub(super) id: EventId,
}

/// What is noted about the event that is under way.
#[derive(Debug)]
pub(super) struct Attempts {
    file: Option<Arc<dyn File>>,
    /// The event in which the last process died, and how often that has happened.
    died: Option<(At, u32)>,
}

impl Attempts {
    /// Reads what the last process was at.
    pub(super) fn open(fs: &dyn Fs, dir: &Path) -> Self {
        let path = dir.join(FILE);
        let file = match fs.open(&path, OpenMode::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs.open(&path, OpenMode::CreateNew)
            }
            opened => opened,
        };
        let file = file.ok();
        let died = file.as_ref().and_then(|file| {
            let mut bytes = [0; FILE_BYTES];
            fs::read_exact_at(&**file, &mut bytes, 0).ok()?;
            let (is_under_way, at, deaths) = decode(&bytes)?;
            let deaths = deaths.saturating_add(u32::from(is_under_way));
            (deaths > 0).then_some((at, deaths))
        });
        Self { file, died }
    }

    /// How often the process has died of it.
    pub(super) fn deaths(&self, at: At) -> u32 {
        self.died.filter(|(died, _)| *died == at).map_or(0, |(_, deaths)| deaths)
    }

    /// The reactor's code is given the event.
    pub(super) fn begin(&self, at: At) {
        self.write(true, at, self.deaths(at));
    }

    /// It has returned. That says nothing yet: there may be more to do about the event.
    pub(super) fn pause(&self, at: At) {
        self.write(false, at, self.deaths(at));
    }

    /// All that was to be done about the event is done, or the code has returned with an error: the event doesn't kill.
    pub(super) fn end(&mut self, at: At) {
        self.died = self.died.filter(|(died, _)| *died != at);
        self.pause(at);
    }

    fn write(&self, is_under_way: bool, at: At, deaths: u32) {
        if let Some(file) = &self.file {
            drop(fs::write_all_at(&**file, &encode(is_under_way, at, deaths), 0));
        }
    }
}

fn encode(is_under_way: bool, at: At, deaths: u32) -> [u8; FILE_BYTES] {
    let mut out = Block::<FILE_BYTES>::new();
    out.put(0, &[u8::from(is_under_way)]);
    out.put(8, at.journal.as_bytes());
    out.put(24, &at.position.get().to_le_bytes());
    out.put(32, at.id.as_bytes());
    out.put(48, &deaths.to_le_bytes());
    let crc = crc32(&[out.0.get(..52).unwrap_or_default()]);
    out.put(52, &crc.to_le_bytes());
    out.0
}

/// What isn't understood is no note.
fn decode(bytes: &[u8]) -> Option<(bool, At, u32)> {
    let (covered, crc) = bytes.split_last_chunk::<4>()?;
    if crc32(&[covered]) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut input = Decoder::new(covered);
    let is_under_way = input.u8().ok()? == 1;
    input.bytes(7).ok()?;
    let journal = JournalId::from_bytes(input.array().ok()?);
    let position = Position::new(input.u64().ok()?);
    let id = EventId::from_bytes(input.array().ok()?);
    let deaths = u32::from_le_bytes(input.array().ok()?);
    Some((is_under_way, At { journal, position, id }, deaths))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;

    #[test]
    fn a_note_is_read_back_and_every_flipped_bit_makes_it_none() {
        let (journal, id) = (JournalId::from_bytes([1; 16]), EventId::from_bytes([2; 16]));
        let at = At { journal, position: Position::new(9), id };
        let bytes = encode(true, at, 3);
        assert_eq!(decode(&bytes), Some((true, at, 3)));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn deaths_of_one_event_in_a_row_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |position: u64| At {
            journal: JournalId::from_bytes([1; 16]),
            position: Position::new(position),
            id: EventId::from_bytes([position as u8; 16]),
        };
        let open = || Attempts::open(&OsFs, dir.path());
        for deaths in 0..3 {
            let attempts = open();
            assert_eq!((attempts.deaths(at(4)), attempts.deaths(at(5))), (deaths, 0));
            attempts.begin(at(4));
        }
        let mut attempts = open();
        attempts.begin(at(4));
        attempts.pause(at(4));
        assert_eq!(open().deaths(at(4)), 3);
        attempts.end(at(4));
        attempts.begin(at(5));
        let attempts = open();
        assert_eq!((attempts.deaths(at(4)), attempts.deaths(at(5))), (0, 1));
    }
}
