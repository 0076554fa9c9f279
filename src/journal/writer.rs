//! What both writers of a journal share: preparing, entering and sealing segments, and syncing batches.
//!
//! A failure while space is being reserved is clean: nothing refers to the new file yet. Every failure
//! behind that is final ([`Failure::Fatal`]): what reached the disk is unknown, and asking again proves
//! nothing.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{IoContext, IoError};
use crate::format::batch::BatchHeader;
use crate::format::files::{Mark, Witness};
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::format::sidecar::SegmentIndex;
use crate::fs::{self, File, OpenMode};
use crate::journal::marker::Marker;
use crate::journal::scan::file_offset;
use crate::journal::segments::Access;
use crate::journal::{Journal, Locked};
use crate::planted::{self, Bug};
use crate::position::Checkpoint;

#[derive(Debug)]
pub(crate) struct Writer {
    locked: Locked,
    pub(crate) journal: Journal,
    marker: Marker,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    file: Arc<dyn File>,
    path: PathBuf,
    page: SegmentPage,
    /// Size up to which the file is allocated.
    capacity_bytes: u64,
}

/// Why the writer couldn't go on.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No space to reserve; nothing has happened.
    DiskFull(IoError),
    /// A write or sync failed.
    Fatal(IoError),
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        Self::Fatal(error)
    }
}

/// A file with zeros, durable under its name, that no header describes yet.
#[derive(Debug)]
pub(crate) struct Spare {
    file: Arc<dyn File>,
    path: PathBuf,
    capacity_bytes: u64,
}

impl Writer {
    pub(crate) fn new(locked: Locked, journal: Journal, marker: Marker) -> Self {
        Self { locked, journal, marker, active: None }
    }

    /// Goes on in the journal's last segment. If its file was cut, tries to make it as long as it was
    /// prepared to be, but no longer than `reserve_max`; without space it counts as full.
    pub(crate) fn resume(&mut self, page: SegmentPage, reserve_max: u64) -> Result<(), IoError> {
        let path = self.locked.layout.segment(page.header.number);
        let file = self.locked.fs.open(&path, OpenMode::Write).context("opening", &path)?;
        let mut capacity_bytes = file.size().context("measuring", &path)?;
        let wanted = page.header.capacity_bytes.min(reserve_max);
        if capacity_bytes < wanted {
            let grown =
                fs::write_zeros(&*file, capacity_bytes..wanted).and_then(|()| file.sync_data());
            match grown.context("extending", &path) {
                Ok(()) => capacity_bytes = wanted,
                Err(error) if error.is_disk_full() => {}
                Err(error) => return Err(error),
            }
        }
        self.active = Some(Active { file, path, page, capacity_bytes });
        Ok(())
    }

    pub(crate) fn page(&self) -> Option<&SegmentPage> {
        self.active.as_ref().map(|active| &active.page)
    }

    /// Bytes of batches that still fit into the active segment behind `offset`. The room ends at a multiple
    /// of the group alignment, so that what fits without its group's padding fits with it.
    pub(crate) fn room_behind(&self, offset: u64) -> u64 {
        self.active.as_ref().map_or(0, |active| {
            let header = &active.page.header;
            let size = active.capacity_bytes.saturating_sub(HEADER_PAGE_BYTES as u64);
            let usable = size - size % u64::from(header.group_alignment);
            usable.saturating_sub(offset.saturating_sub(header.base_offset))
        })
    }

    /// Prepares the file of segment `number`: zeros, synced, under its final name, its name synced.
    pub(crate) fn reserve(&self, number: u64, capacity_bytes: u64) -> Result<Spare, Failure> {
        let (fs, layout) = (&*self.locked.fs, &self.locked.layout);
        let path = layout.segment(number);
        let file = match fs.open(&path, OpenMode::CreateNew) {
            // Left over from an attempt of ours that ran out of space.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs.open(&path, OpenMode::Write)
            }
            opened => opened,
        };
        let filled = file.and_then(|file| {
            fs::write_zeros(&*file, 0..capacity_bytes)?;
            file.sync_data()?;
            Ok(file)
        });
        let file = filled.context("preparing", &path).map_err(|error| {
            if error.is_disk_full() {
                drop(fs.remove(&path));
                Failure::DiskFull(error)
            } else {
                Failure::Fatal(error)
            }
        })?;
        if !planted::is(Bug::NoDirectorySync) {
            fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
        }
        Ok(Spare { file, path, capacity_bytes })
    }

    /// Cuts the active segment, of which everything is durable, to its length. The mark is synced first.
    pub(crate) fn seal(&mut self, witness: Option<Witness>) -> Result<(), Failure> {
        let end = self.journal.end();
        // A mark that can't be written proves less; nothing is cut that it would have to protect.
        drop(self.marker.write_synced(Mark { sequence: 0, end, closed: false, witness }));
        if let Some(active) = &self.active {
            let len = file_offset(active.page.header.base_offset, end.offset);
            active.file.set_len(len).context("cutting", &active.path)?;
            active.file.sync_data().context("syncing", &active.path)?;
        }
        Ok(())
    }

    /// Writes the header of the next segment, unsynced: it becomes durable together with its first batch.
    pub(crate) fn enter(&mut self, spare: Spare, page: SegmentPage) -> Result<(), Failure> {
        let Spare { file, path, capacity_bytes } = spare;
        fs::write_all_at(&*file, &page.bytes(), 0).context("writing", &path)?;
        self.journal.roll(page.clone(), Access::Writer);
        self.active = Some(Active { file, path, page, capacity_bytes });
        Ok(())
    }

    /// Writes another header into the active segment, which has no batch yet.
    pub(crate) fn replace_header(&mut self, page: SegmentPage) -> Result<(), Failure> {
        if let Some(active) = &mut self.active {
            fs::write_all_at(&*active.file, &page.bytes(), 0).context("writing", &active.path)?;
            active.page = page.clone();
            self.journal.replace_active(page);
        }
        Ok(())
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), Failure> {
        if let Some(active) = &self.active {
            let at = file_offset(active.page.header.base_offset, offset);
            debug_assert!(at >= HEADER_PAGE_BYTES as u64);
            fs::write_all_at(&*active.file, bytes, at).context("writing", &active.path)?;
        }
        Ok(())
    }

    pub(crate) fn sync(&self) -> Result<(), Failure> {
        if let Some(active) = &self.active {
            active.file.sync_data().context("syncing", &active.path)?;
        }
        Ok(())
    }

    /// Makes it known that everything up to `end` is durable: to readers, and in the mark.
    pub(crate) fn publish(
        &self,
        end: Checkpoint,
        witness: Option<Witness>,
        index: impl FnOnce(&mut SegmentIndex),
    ) {
        self.journal.publish(end, index);
        self.marker.write(Mark { sequence: 0, end, closed: false, witness });
    }

    /// Marks the journal as cleanly closed. Nothing is written behind it.
    pub(crate) fn close(&self, witness: Option<Witness>) -> Result<(), IoError> {
        self.journal.close_watch();
        let end = self.journal.end();
        self.marker.write_synced(Mark { sequence: 0, end, closed: true, witness })
    }

    pub(crate) fn mark_error(&self) -> Option<IoError> {
        self.marker.error()
    }
}

/// The checkpoint at the end of a batch.
pub(crate) fn checkpoint_of(
    header: &BatchHeader,
    journal: crate::position::JournalId,
) -> Checkpoint {
    Checkpoint {
        journal,
        epoch: header.epoch,
        incarnation: header.incarnation,
        offset: header.end_offset(),
        position: header.end_position(),
        chain: header.chain,
    }
}
