//! What the device and the file system do without an engine: one write and one fdatasync for everything that
//! is to be appended. No framing, no checksum, no index.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Operation, Peer, Place, Shape, Writer};

const WITHOUT: &[(Operation, &str)] = &[
    (Operation::Stream, "knows no streams"),
    (Operation::Open, "nothing to recover: it doesn't know where its data ends"),
];

pub(super) const ZEROED: Peer = Peer {
    name: "device-zeroed",
    package: None,
    kind: Kind::Baseline,
    durable: "yes: fdatasync",
    used: "one thread writes what all writers would bring into a file of written zeros, and syncs; reading is the bare read and a CRC",
    without: WITHOUT,
    open: |dir, shape| open(dir, shape, ZEROED_BYTES),
};

pub(super) const GROWING: Peer = Peer {
    name: "device-growing",
    used: "the same at the end of a file that grows",
    open: |dir, shape| open(dir, shape, 0),
    ..ZEROED
};

/// Written again from the beginning when it is full.
const ZEROED_BYTES: u64 = 64 << 20;
/// How much is read at a time.
const READ_BYTES: usize = 256 << 10;

struct Device {
    file: File,
    payload_bytes: usize,
    zeroed_bytes: u64,
    end: Mutex<u64>,
}

fn open(dir: &Path, shape: Shape, zeroed_bytes: u64) -> Outcome<Box<dyn Engine>> {
    let path = dir.join("device");
    let fresh = !path.exists();
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if fresh {
        io::copy(&mut io::repeat(0).take(zeroed_bytes), &mut file)?;
        file.sync_all()?;
        File::open(dir)?.sync_all()?;
    }
    let payload_bytes = shape.payload_bytes;
    Ok(Box::new(Device { file, payload_bytes, zeroed_bytes, end: Mutex::new(0) }))
}

impl Engine for Device {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(Writes { device: self, buffer: Vec::new() }))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        let mut buffer = vec![0; READ_BYTES / self.payload_bytes * self.payload_bytes];
        let mut crc = crc32fast::Hasher::new();
        let mut at = 0;
        loop {
            let read = self.file.read_at(&mut buffer, at)?;
            let bytes = &buffer[..read];
            // A payload begins with its length: that isn't zero, unlike what was never written.
            let mut payloads = bytes.chunks_exact(self.payload_bytes).peekable();
            if payloads.peek().is_none_or(|payload| payload.iter().all(|byte| *byte == 0)) {
                break;
            }
            crc.update(bytes);
            payloads.filter(|payload| payload.first() != Some(&0)).for_each(&mut *each);
            at += read as u64;
        }
        std::hint::black_box(crc.finalize());
        Ok(())
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        let mut payload = vec![0; self.payload_bytes];
        self.file.read_exact_at(&mut payload, place.number * self.payload_bytes as u64)?;
        std::hint::black_box(crc32fast::hash(&payload));
        each(&payload);
        Ok(())
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(())
    }
}

struct Writes<'a> {
    device: &'a Device,
    buffer: Vec<u8>,
}

impl Writer for Writes<'_> {
    fn append(&mut self, _: u32, payloads: &[&[u8]]) -> Outcome<()> {
        self.buffer.clear();
        payloads.iter().for_each(|payload| self.buffer.extend_from_slice(payload));
        let mut end = self.device.end.lock().map_err(|_| "a writer panicked")?;
        if self.device.zeroed_bytes > 0
            && *end + self.buffer.len() as u64 > self.device.zeroed_bytes
        {
            *end = 0;
        }
        self.device.file.write_all_at(&self.buffer, *end)?;
        self.device.file.sync_data()?;
        *end += self.buffer.len() as u64;
        Ok(())
    }
}
