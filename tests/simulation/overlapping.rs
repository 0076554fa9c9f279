//! A writer that lays out the next group before the last one is acknowledged: `durable` stays behind by one
//! group, and a failed sync hits two. It writes the format by itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::format::batch::{BatchHeader, Link, body_digest, padded_len};
use headwater::format::files::{MARK_SLOT_BYTES, MARK_SLOT_STRIDE, Mark};
use headwater::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use headwater::format::{Flags, crc32};
use headwater::fs::sim::SimFs;
use headwater::fs::{Fs, OpenMode};
use headwater::{Checkpoint, Incarnation, NewEvent, StreamId};

use super::world::Batch;

pub(crate) struct Overlapping {
    file: Arc<dyn headwater::fs::File>,
    mark: Arc<dyn headwater::fs::File>,
    sequence: u64,
    page: SegmentPage,
    size: u64,
    end: Checkpoint,
    /// End of the group in front of the last one.
    previous: Checkpoint,
    /// What is published as durable.
    durable: Checkpoint,
    incarnation: Incarnation,
}

impl Overlapping {
    pub(crate) fn begin(
        fs: &SimFs,
        path: &Path,
        end: Checkpoint,
        rng: &mut fastrand::Rng,
    ) -> std::io::Result<Option<Self>> {
        let file = fs.open(path, OpenMode::Write)?;
        let mark_path: PathBuf = path.with_file_name("mark");
        let mark = fs.open(&mark_path, OpenMode::Write)?;
        let mut page = [0; HEADER_PAGE_BYTES];
        file.read_at(&mut page, 0)?;
        let PageState::Valid { page, .. } = SegmentPage::read(&page) else { return Ok(None) };
        let mut sequence = 0;
        for slot in 0..2 {
            let mut bytes = [0; MARK_SLOT_BYTES];
            mark.read_at(&mut bytes, slot * MARK_SLOT_STRIDE)?;
            sequence = sequence.max(Mark::decode(&bytes).map_or(0, |mark| mark.sequence));
        }
        Ok(Some(Self {
            size: file.size()?,
            file,
            mark,
            sequence,
            page,
            end,
            previous: end,
            durable: end,
            incarnation: Incarnation::new(rng.u64(1..)),
        }))
    }

    /// Writes a group behind the last one; false if it doesn't fit.
    pub(crate) fn write(&mut self, group: &[Batch]) -> std::io::Result<bool> {
        self.previous = self.end;
        let mut bytes = Vec::new();
        let start = self.end.offset;
        let base = self.page.header.base_offset;
        let mut end = self.end;
        for (index, batch) in group.iter().enumerate() {
            let body = body_of(batch);
            let mut padded = padded_len(body.len() as u64);
            if index + 1 == group.len() {
                let used = end.offset - base + padded;
                padded += used.next_multiple_of(u64::from(self.page.header.group_alignment)) - used;
            }
            let mut header = BatchHeader {
                header_len: 128,
                flags: Flags::default(),
                stored_len: body.len() as u32,
                raw_len: body.len() as u32,
                body_crc: crc32(&[&body]),
                count: batch.len() as u32,
                base_position: end.position,
                offset: end.offset,
                durable_offset: self.durable.offset,
                epoch: end.epoch + 1,
                padded_len: padded as u32,
                incarnation: self.incarnation,
                time_us: 0,
                chain: end.chain,
            };
            let digest = (end.offset == base).then_some(&self.page.digest);
            let salt = self.page.header.salt;
            let head = header.seal(end.chain, digest, &body_digest(&body), salt);
            let from = bytes.len();
            bytes.extend_from_slice(&head);
            bytes.extend_from_slice(&body);
            bytes.resize(from + padded as usize, 0);
            let Link { offset, position, chain } = header.end_link();
            end = Checkpoint { offset, position, chain, incarnation: self.incarnation, ..end };
        }
        let at = 4096 + start - base;
        if at + bytes.len() as u64 > self.size {
            return Ok(false);
        }
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write_at(&bytes[done..], at + done as u64) {
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.end = end;
        Ok(true)
    }

    /// Syncs what is written and publishes the group in front of the last one.
    pub(crate) fn sync(&mut self, write_mark: bool) -> std::io::Result<()> {
        self.file.sync_data()?;
        self.durable = self.previous;
        if write_mark {
            self.sequence += 1;
            let mark = Mark {
                sequence: self.sequence,
                end: self.durable,
                closed: false,
                witness: None,
                salt: 0,
            };
            self.mark.write_at(&mark.encode(), self.sequence % 2 * MARK_SLOT_STRIDE).ok();
        }
        Ok(())
    }
}

/// The body of a batch whose events all open streams of their own.
fn body_of(batch: &Batch) -> Vec<u8> {
    let mut body = Vec::new();
    for (id, payload) in batch {
        let stream = StreamId::new(format!("o-{id}")).unwrap();
        let event = NewEvent::raw("test.happened", payload.clone()).unwrap().id(*id);
        headwater::format::record::encode(&mut body, &event, &stream, headwater::Revision::FIRST);
    }
    body
}
