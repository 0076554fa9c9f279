//! What the machine does without Headwater: the same bytes, the same durability, nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::meter::{Meter, Took};

/// How much is read at a time, as a journal's cursor does.
const READ_BYTES: usize = 256 << 10;

/// A file of written, synced zeros: a sync of what is written into it needs no metadata.
pub(crate) struct Device {
    file: File,
    size: u64,
    at: u64,
}

impl Device {
    pub(crate) fn create(path: &Path, size: u64) -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        io::copy(&mut io::repeat(0).take(size), &mut file)?;
        file.sync_all()?;
        Ok(Self { file, size, at: 0 })
    }

    /// One that is there, from its beginning on.
    #[allow(dead_code, reason = "another program that has this file uses it")]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { file, size, at: 0 })
    }

    /// Writes behind what was written last, at the beginning again when the file is full.
    pub(crate) fn write_synced(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.at + bytes.len() as u64 > self.size {
            self.at = 0;
        }
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        self.file.sync_data()
    }
}

/// Reads the first bytes of each file and computes their checksum.
pub(crate) fn read_and_check(files: &[(PathBuf, u64)]) -> Outcome<Took> {
    let mut buffer = vec![0; READ_BYTES];
    let mut crc = crc32fast::Hasher::new();
    let meter = Meter::start();
    for (path, len) in files {
        let mut file = File::open(path)?.take(*len);
        loop {
            let read = file.read(&mut buffer)?;
            match buffer.get(..read) {
                Some(bytes) if read > 0 => crc.update(bytes),
                _ => break,
            }
        }
    }
    std::hint::black_box(crc.finalize());
    Ok(meter.stop())
}
