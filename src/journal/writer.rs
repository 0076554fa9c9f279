//! What both writers of a journal share: entering segments and leaving them, writing and syncing batches.
//!
//! A failure while space is being reserved is clean: nothing refers to the new file yet. Every failure
//! behind that is final ([`Failure::Fatal`]): what reached the disk is unknown, and asking again proves
//! nothing.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{IoContext, IoError};
use crate::format::batch::BatchHeader;
use crate::format::files::{Mark, Role, Witness};
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::fs::{self, File, OpenMode};
use crate::journal::keeper::{Keeper, Order, Seal};
use crate::journal::mark::MarkFile;
use crate::journal::scan::file_offset;
use crate::journal::spare::Spare;
use crate::journal::{Journal, Locked};
use crate::options::JournalOptions;
use crate::planted::{self, Bug};
use crate::position::Checkpoint;

/// How much of a segment is prepared ahead, at the most, on the word of a peer.
pub(crate) const RESERVE_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) journal: Journal,
    keeper: Arc<Keeper>,
    active: Option<Active>,
    options: JournalOptions,
    written: Checkpoint,
    /// Last: the lock is released when nothing of ours touches the files any more.
    locked: Locked,
}

#[derive(Debug)]
struct Active {
    file: ActiveFile,
    page: SegmentPage,
    /// Size up to which the file is allocated.
    capacity_bytes: u64,
}

/// The file of the active segment.
#[derive(Clone, Debug)]
pub(crate) struct ActiveFile {
    file: Arc<dyn File>,
    path: PathBuf,
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

impl Writer {
    /// Goes on behind what recovery left: in the journal's last segment, if it has one.
    pub(crate) fn open(
        locked: Locked,
        journal: Journal,
        mark: MarkFile,
        last: Option<SegmentPage>,
        options: &JournalOptions,
    ) -> Result<Self, IoError> {
        let written = journal.end();
        let newest = Mark { sequence: 0, end: written, closed: false, witness: None, salt: 0 };
        let first = journal.retained().segment;
        let next = last.as_ref().map_or(first, |page| page.header.number + 1);
        let background = options.background_thread;
        let keeper = Keeper::new(&locked.fs, &locked.layout, mark, newest, next, background);
        let options = options.clone();
        let mut writer = Self { journal, keeper, active: None, options, written, locked };
        if let Some(page) = last {
            writer.resume(page)?;
        }
        Ok(writer)
    }

    /// Goes on in a segment. If its file was cut, tries to make it as long as it was prepared to be; without
    /// space it counts as full.
    fn resume(&mut self, page: SegmentPage) -> Result<(), IoError> {
        let path = self.locked.layout.segment(page.header.number);
        let file = self.locked.fs.open(&path, OpenMode::Write).context("opening", &path)?;
        let mut capacity_bytes = file.size().context("measuring", &path)?;
        let wanted = page.header.capacity_bytes.min(self.reserve_bytes_max());
        if capacity_bytes < wanted {
            let grown =
                fs::write_zeros(&*file, capacity_bytes..wanted).and_then(|()| file.sync_data());
            match grown.context("extending", &path) {
                Ok(()) => capacity_bytes = wanted,
                Err(error) if error.is_disk_full() => {
                    // Give back what there was: others need it too, and half a segment serves nobody.
                    file.set_len(capacity_bytes).context("cutting", &path)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.enter(Active { file: ActiveFile { file, path }, page, capacity_bytes });
        Ok(())
    }

    /// Makes a segment the active one, and has the one behind it prepared when a quarter of it is full. Returns
    /// the one that was active.
    fn enter(&mut self, active: Active) -> Option<Active> {
        let header = &active.page.header;
        self.keeper.enter(header.salt);
        self.keeper.order(Order {
            from_offset: header.base_offset + active.capacity_bytes / 4,
            capacity_bytes: self.capacity_bytes_behind(Some(header.capacity_bytes)),
        });
        self.active.replace(active)
    }

    /// In a mirror a header is a peer's word, so what is prepared on it is bounded.
    fn reserve_bytes_max(&self) -> u64 {
        match self.journal.role() {
            Role::Origin | Role::Feed => u64::MAX,
            Role::Mirror => RESERVE_BYTES_MAX,
        }
    }

    /// The size to prepare for the segment behind one of `previous` bytes. In a mirror a guess: the origin
    /// decides, most often by the same rule.
    fn capacity_bytes_behind(&self, previous: Option<u64>) -> u64 {
        self.options.segment_bytes_after(previous).min(self.reserve_bytes_max())
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

    /// The file of the next segment: it reads as zeros, and is durable with its name.
    pub(crate) fn reserve(&self) -> Result<Spare, Failure> {
        let previous = self.page().map(|page| page.header.capacity_bytes);
        self.keeper.take_spare(self.capacity_bytes_behind(previous))
    }

    /// The same, with `capacity_bytes` at least, if so much may be reserved on a peer's word.
    pub(crate) fn reserve_for(&self, capacity_bytes: u64) -> Result<Spare, Failure> {
        self.keeper.take_spare(capacity_bytes.min(self.reserve_bytes_max()))
    }

    /// Goes on in the next segment, when everything in the active one is durable. Its header is not synced:
    /// it becomes durable together with its first batch. What was active is cut to its length beside the
    /// commit path.
    pub(crate) fn roll(
        &mut self,
        spare: Spare,
        page: SegmentPage,
        witness: Option<Witness>,
    ) -> Result<(), Failure> {
        let end = self.journal.end();
        self.keeper.mark(end, witness);
        let Spare { number, file, path, capacity_bytes } = spare;
        if page.header.number != number {
            let source = std::io::ErrorKind::InvalidInput.into();
            return Err(IoError::new("writing another segment's header to", &path, source).into());
        }
        fs::write_all_at(&*file, &page.bytes(), 0).context("writing", &path)?;
        let sealed = self.journal.roll(page.clone());
        let active = Active { file: ActiveFile { file, path }, page, capacity_bytes };
        if let (Some(full), Some(segment)) = (self.enter(active), sealed) {
            let dropped = u64::from(planted::is(Bug::DropBatchAtRoll));
            let len = file_offset(full.page.header.base_offset, end.offset) - dropped;
            let journal = self.journal.clone();
            self.keeper.seal(Seal { journal, segment, file: full.file.file, len });
        }
        Ok(())
    }

    /// Writes another header into the active segment, which has no batch yet.
    pub(crate) fn replace_header(&mut self, page: SegmentPage) -> Result<(), Failure> {
        if let Some(active) = &mut self.active {
            let ActiveFile { file, path } = &active.file;
            fs::write_all_at(&**file, &page.bytes(), 0).context("writing", path)?;
            active.page = page.clone();
            self.journal.replace_active(page);
        }
        Ok(())
    }

    /// The end of what was written, durable or not.
    pub(crate) const fn written(&self) -> &Checkpoint {
        &self.written
    }

    pub(crate) fn salt(&self) -> u64 {
        self.page().map_or(0, |page| page.header.salt)
    }

    /// What enters the chain of the batch at `offset`, if it is the segment's first.
    pub(crate) fn digest_at(&self, offset: u64) -> Option<[u8; 32]> {
        self.page().filter(|page| page.header.base_offset == offset).map(|page| page.digest)
    }

    /// Writes batches behind those that were written, unsynced; they end at `end`.
    pub(crate) fn write(&mut self, bytes: &[u8], end: Checkpoint) -> Result<(), Failure> {
        if let Some(active) = &self.active {
            let at = file_offset(active.page.header.base_offset, self.written.offset);
            debug_assert!(at >= HEADER_PAGE_BYTES as u64);
            fs::write_all_at(&*active.file.file, bytes, at)
                .context("writing", &active.file.path)?;
        }
        self.written = end;
        Ok(())
    }

    /// The file to sync; it stays the active one until everything in it is durable.
    pub(crate) fn active_file(&self) -> Option<ActiveFile> {
        self.active.as_ref().map(|active| active.file.clone())
    }

    pub(crate) fn keeper(&self) -> Arc<Keeper> {
        Arc::clone(&self.keeper)
    }

    /// Marks the journal as cleanly closed. Nothing is written behind it.
    pub(crate) fn close(&self, witness: Option<Witness>) -> Result<(), IoError> {
        self.journal.close_watch();
        self.keeper.stop();
        let end = self.journal.end();
        self.keeper.mark_synced(Mark { sequence: 0, end, closed: true, witness, salt: 0 })
    }
}

impl Drop for Writer {
    /// Others may hold the keeper; the files are let go of before the lock is.
    fn drop(&mut self) {
        self.keeper.stop();
    }
}

impl ActiveFile {
    pub(crate) fn sync(&self) -> Result<(), IoError> {
        let retries = planted::is(Bug::RetryFailedSync);
        let synced = self.file.sync_data();
        synced
            .or_else(|error| if retries { self.file.sync_data() } else { Err(error) })
            .context("syncing", &self.path)
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
