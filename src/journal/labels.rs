//! Where in sealed segments the events of a query may be.
//!
//! ```text
//!   sealed ──── sealed ──── sealed ──── active
//!   labels      labels      (read, and its labels laid out)     read
//! ```
//! Invariants:
//! - Files of labels are derived. Without one, or if it is damaged or of another history, the segment is read.
//! - None is laid out over a gap: a reader has to be told of lost events, and they may come back.

use std::io;
use std::sync::Arc;

use crate::format::labels::{LabelFile, Labels};
use crate::fs::{self, OpenMode};
use crate::journal::query::{Part, Query};
use crate::journal::segments::{Access, FileKey, IndexFile, Segment, key_of};
use crate::journal::{Cursor, Journal};
use crate::position::Position;

impl Journal {
    /// The rest of the sealed segment that holds the batch at `offset`, and where in it events from `from` on may
    /// be that are meant; `None` if it isn't sealed.
    pub(super) fn part_of(&self, query: &Query, from: Position, offset: u64) -> Option<Part> {
        let segment = self.segment_holding(from)?;
        let end = segment.sealed.as_ref()?.end;
        let base = segment.base_position();
        let rest = end.offset.saturating_sub(offset);
        let worth = rest >= end.offset.saturating_sub(segment.base_offset()) / 2;
        let places = self.label_file(&segment, worth).and_then(|file| {
            let Ok(places) = query.places(&|label| file.places(label)) else {
                self.remove_labels(segment.number());
                return None;
            };
            let places = places?.into_iter().map(|place| base.advance(u64::from(place)));
            Some(places.filter(|place| (from..end.position).contains(place)).collect())
        });
        Some(Part { end: end.position, places })
    }

    /// They are damaged: the next query lays them out anew. An effort.
    fn remove_labels(&self, number: u64) {
        if self.0.access == Access::Writer {
            let files = &self.0.files;
            drop(files.fs().remove(&files.layout().labels(number)));
            files.forget(FileKey::Labels(number));
        }
    }

    /// The labels of a sealed segment, if there are valid ones, or they can be laid out and that is worth it.
    fn label_file(&self, segment: &Arc<Segment>, worth: bool) -> Option<LabelFile<IndexFile>> {
        let end = segment.sealed.as_ref()?.end;
        if self.gaps().touch(segment.base_offset()..end.offset.saturating_add(1)) {
            return None;
        }
        let key = key_of(&segment.page, &end);
        let open = || {
            let pages = IndexFile::new(&self.0.files, FileKey::Labels(segment.number()));
            LabelFile::open(pages, &key).ok().flatten()
        };
        if let Some(file) = open() {
            return Some(file);
        }
        if !worth || self.0.access == Access::ReadOnly {
            return None;
        }
        let _one_at_a_time = self.0.labelling.lock();
        if let Some(file) = open() {
            return Some(file);
        }
        let bytes = self.read_labels(segment)?.encode(&key)?;
        self.write_labels(segment.number(), &bytes).ok()?;
        open()
    }

    fn read_labels(&self, segment: &Segment) -> Option<Labels> {
        let (base, end) = (segment.base_position(), segment.sealed.as_ref()?.end.position);
        let mut cursor = Cursor::new(self, segment.base_offset(), base);
        let mut labels = Labels::default();
        while cursor.position() < end {
            let batch = cursor.next_batch().ok()??;
            let mut position = batch.batch.header.base_position;
            for record in batch.batch.records() {
                let place = u32::try_from(position.since(base)).ok()?;
                labels.add(place, &record.ok()?);
                position = position.advance(1);
            }
        }
        Some(labels)
    }

    /// What bears the name is whole, also behind a crash.
    fn write_labels(&self, number: u64, bytes: &[u8]) -> io::Result<()> {
        let files = &self.0.files;
        let (temp, path) = (files.layout().labels_temp(number), files.layout().labels(number));
        let fs = files.fs();
        drop(fs.remove(&temp));
        let file = fs.open(&temp, OpenMode::CreateNew)?;
        let written = fs::write_all_at(&*file, bytes, 0)
            .and_then(|()| file.sync_data())
            .and_then(|()| fs.rename(&temp, &path));
        if written.is_err() {
            drop(fs.remove(&temp));
        }
        files.forget(FileKey::Labels(number));
        written
    }
}
