//! The one writer of a mirror: takes in a peer's header pages and batches, verbatim.
//!
//! Everything is verified before it is written: checksums, that it continues the mirror, the chain computed
//! anew, that its records parse. What it writes is byte for byte what the origin's files hold, so `cmp`
//! proves the copy: sealed segments whole, the active one up to the durable end.

use std::path::Path;
use std::sync::Arc;

#[cfg(feature = "shipping")]
use crate::error::IoContext;
use crate::error::{IngestError, OpenError, Poison, Refusal};
use crate::format::batch::{BatchRef, Link};
use crate::format::files::{Node, Role, Witness};
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::format::sidecar::SegmentIndex;
use crate::fs::Fs;
#[cfg(feature = "shipping")]
use crate::journal::layout;
use crate::journal::orphans::{self, Orphans, SetAsideError};
use crate::journal::recovery::{self, RecoveryReport};
use crate::journal::segments::Access;
use crate::journal::writer::{Failure, Writer, checkpoint_of};
use crate::journal::{Journal, Locked, read_node};
use crate::options::JournalOptions;
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// Writes a mirror. One owner; the mirror's readers use its [`Journal`].
#[derive(Debug)]
pub struct Ingest {
    writer: Writer,
    /// End of what has been written, durable or not.
    end: Checkpoint,
    /// What was written since the last sync, for the index.
    unsynced: Vec<u8>,
    witness: Option<Witness>,
    poison: Option<Poison>,
    report: RecoveryReport,
}

impl Ingest {
    /// Opens a mirror, after recovery; `None` if there is none in `dir` yet.
    ///
    /// A mirror whose tail is damaged or lost sets it aside and goes on in front of it:
    /// [`witness`](Self::witness) tells where it had been, and the rest is to be fetched again.
    ///
    /// # Errors
    /// [`OpenError`]. Blocks for recovery.
    pub fn open(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
    ) -> Result<Option<Self>, OpenError> {
        if fs.list(dir).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let locked = Locked::take(fs, dir)?;
        locked.refuse_unfinished()?;
        match read_node(&**fs, &locked.layout)? {
            None if locked.has_segments()? => Err(OpenError::Copy { path: dir.to_owned() }),
            None => Ok(None),
            Some(node) if node.role != Role::Mirror => {
                let (found, wanted) = (node.role, Role::Mirror);
                Err(OpenError::Role { path: dir.to_owned(), found, wanted })
            }
            Some(node) => Self::recover(locked, node, options).map(Some),
        }
    }

    /// Begins a mirror of `journal`.
    ///
    /// # Errors
    /// [`OpenError::AlreadyExists`] if there is a journal or mirror; others of the file system.
    pub fn create(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        journal: JournalId,
        options: &JournalOptions,
    ) -> Result<Self, OpenError> {
        Self::create_as(NodeId::random(), fs, dir, journal, options)
    }

    /// The same with a node id that was told before.
    pub(crate) fn create_as(
        node: NodeId,
        fs: &Arc<dyn Fs>,
        dir: &Path,
        journal: JournalId,
        options: &JournalOptions,
    ) -> Result<Self, OpenError> {
        let locked = Locked::take(fs, dir)?;
        locked.refuse_unfinished()?;
        if read_node(&**fs, &locked.layout)?.is_some() || locked.has_segments()? {
            return Err(OpenError::AlreadyExists { path: dir.to_owned() });
        }
        let node = Node { role: Role::Mirror, node, journal };
        Self::recover(locked, node, options)
    }

    /// Opens an origin that may have lost its tail, after recovery, to take in what a mirror holds of it. One that is
    /// [recovering](Self::begin_recovering) is put in order like a mirror. `None` if there is no journal.
    ///
    /// # Errors
    /// [`OpenError`]. Blocks for recovery.
    #[cfg(feature = "shipping")]
    pub(crate) fn open_lossy(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
    ) -> Result<Option<Self>, OpenError> {
        if fs.list(dir).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Ok(None);
        }
        let locked = Locked::take(fs, dir)?;
        let is_recovering = match locked.refuse_unfinished() {
            Err(OpenError::Recovering { .. }) => true,
            checked => checked.map(|()| false)?,
        };
        let Some(node) = locked.origin()?.filter(|_| is_recovering || locked.is_begun()) else {
            return Ok(None);
        };
        let role = if is_recovering { Role::Mirror } else { Role::Origin };
        Self::recover(locked, Node { role, ..node }, options).map(Some)
    }

    /// From now on, until [`end_recovering`](Self::end_recovering), the origin is put in order like a mirror, and can't
    /// be opened for anything else: the headers of what it takes in speak of the disk on which they were written.
    ///
    /// # Errors
    /// [`OpenError`]. Blocks for recovery.
    #[cfg(feature = "shipping")]
    pub(crate) fn begin_recovering(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        options: &JournalOptions,
    ) -> Result<Self, OpenError> {
        let locked = Locked::take(fs, dir)?;
        let node = locked.origin()?.ok_or(OpenError::NotFound { path: dir.to_owned() })?;
        locked.layout.replace(&**fs, layout::RECOVERING, b"see docs/format.md, Recovering\n")?;
        Self::recover(locked, Node { role: Role::Mirror, ..node }, options)
    }

    /// Everything that was taken in is durable, and marked so: the origin is an origin again.
    ///
    /// # Errors
    /// [`OpenError`]; repeating it is safe.
    #[cfg(feature = "shipping")]
    pub(crate) fn end_recovering(fs: &Arc<dyn Fs>, dir: &Path) -> Result<(), OpenError> {
        let locked = Locked::take(fs, dir)?;
        let path = locked.layout.file(layout::RECOVERING);
        match fs.remove(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.context("removing", &path)?,
        }
        Ok(fs.sync_dir(dir).context("syncing", dir)?)
    }

    fn recover(locked: Locked, node: Node, options: &JournalOptions) -> Result<Self, OpenError> {
        options.check()?;
        let fs = Arc::clone(&locked.fs);
        let survey = recovery::survey(&*fs, &locked.layout, &node, Access::Writer)?;
        if survey.is_empty() {
            // The sync of its name may have failed when it was begun.
            locked.write_node(&node)?;
        }
        let reserve = CATCH_UP_BYTES_MAX.min(options.segment_bytes_max);
        let recovered = recovery::mend(&*fs, &locked.layout, &node, survey, reserve)?;
        let journal =
            Journal::new(&fs, &locked.layout, node, &recovered, options.recent_bytes_max)?;
        let page = recovered.kept.last().map(|kept| kept.page.clone());
        let writer = Writer::open(locked, journal, recovered.mark, page, options)?;
        Ok(Self {
            end: writer.journal.end(),
            writer,
            unsynced: Vec::new(),
            witness: recovered.witness,
            poison: None,
            report: recovered.report,
        })
    }

    /// The reading side.
    #[must_use]
    pub const fn journal(&self) -> &Journal {
        &self.writer.journal
    }

    /// The end of what has been written: what the next batch must continue. It may lie behind the durable
    /// end until the next [`sync`](Self::sync).
    #[must_use]
    pub const fn end(&self) -> Checkpoint {
        self.end
    }

    /// Where this mirror had been before it set a damaged tail aside; `None` once that place was passed
    /// again. The origin must be compared with it too.
    #[must_use]
    pub const fn witness(&self) -> Option<Witness> {
        self.witness
    }

    /// What opening found and did.
    #[must_use]
    pub const fn recovery_report(&self) -> &RecoveryReport {
        &self.report
    }

    /// Takes in the header page of the next segment, in front of its first batch. Seals the segment before
    /// it; a header behind which no batch has come is replaced. Blocks for a sync.
    ///
    /// # Errors
    /// [`IngestError`]; after [`IngestError::Refused`] the mirror is as it was.
    pub fn segment(&mut self, page: &[u8; HEADER_PAGE_BYTES]) -> Result<(), IngestError> {
        self.check_poison()?;
        let page = match SegmentPage::read(page) {
            PageState::Valid { page, intact: true } => page,
            PageState::Valid { .. } | PageState::Zero => {
                return Err(self.refuse(Refusal::Page(crate::format::FormatError::Invalid("page"))));
            }
            PageState::Invalid(error) => return Err(self.refuse(Refusal::Page(error))),
        };
        let header = page.header;
        if header.journal != self.end.journal {
            return Err(self.refuse(Refusal::Journal(header.journal)));
        }
        let active = self.writer.page().map(|page| page.header);
        let replaces = active.is_some_and(|active| active.base_offset == self.end.offset);
        let number = match active {
            Some(active) if replaces => active.number,
            Some(active) => active.number + 1,
            None => self.writer.journal.retained().segment,
        };
        let links = header.number == number
            && header.base_offset == self.end.offset
            && header.base_position == self.end.position
            && header.previous_chain == self.end.chain
            && header.capacity_bytes >= HEADER_PAGE_BYTES as u64
            && header.capacity_bytes <= 1 << 40;
        if !links {
            return Err(self.refuse(Refusal::SegmentLink));
        }
        if replaces {
            return self.writer.replace_header(page).map_err(|failure| self.fail(failure));
        }
        self.sync()?;
        // The origin may have prepared more than this disk holds, or lie about it: what is reserved here
        // is bounded, and a segment that needs more grows.
        let spare = match self.writer.reserve_for(header.capacity_bytes) {
            Ok(spare) => spare,
            Err(failure) => return Err(self.fail(failure)),
        };
        self.writer.roll(spare, page, self.witness).map_err(|failure| self.fail(failure))
    }

    /// Takes in exactly one whole batch. It is written, and durable after the next [`sync`](Self::sync) at
    /// the latest.
    /// Returns the checkpoint at its end.
    ///
    /// # Errors
    /// [`IngestError`]; after [`IngestError::Refused`] and [`IngestError::WitnessDiffers`] the mirror is as
    /// it was.
    pub fn batch(&mut self, bytes: &[u8]) -> Result<Checkpoint, IngestError> {
        self.check_poison()?;
        let Some(page) = self.writer.page() else { return Err(self.refuse(Refusal::NoSegment)) };
        let (base, salt, digest) = (page.header.base_offset, page.header.salt, page.digest);
        let batch = match BatchRef::decode(bytes, salt) {
            Ok(batch) if batch.bytes().len() == bytes.len() => batch,
            Ok(_) => {
                let error = crate::format::FormatError::Invalid("bytes behind the batch");
                return Err(self.refuse(Refusal::Batch(error)));
            }
            Err(error) => return Err(self.refuse(Refusal::Batch(error))),
        };
        let link =
            Link { offset: self.end.offset, position: self.end.position, chain: self.end.chain };
        let first = link.offset == base;
        let continues = batch.continues(&link, first.then_some(&digest));
        if !continues && !planted::is(Bug::TakeUnlinked) {
            return Err(self.refuse(Refusal::BatchLink));
        }
        if let Err(error) = batch.check_records() {
            return Err(self.refuse(Refusal::Batch(error)));
        }
        let end = checkpoint_of(&batch.header, self.end.journal);
        self.check_witness(&end)?;
        if self.unsynced.len() as u64 + bytes.len() as u64 > CATCH_UP_BYTES_MAX {
            self.sync()?;
        }
        self.writer.write(bytes, end).map_err(|failure| self.fail(failure))?;
        self.unsynced.extend_from_slice(bytes);
        self.end = end;
        Ok(end)
    }

    /// When the old end is passed, the same batch must end there again.
    fn check_witness(&self, end: &Checkpoint) -> Result<(), IngestError> {
        let Some(witness) = self.witness else { return Ok(()) };
        let same = end.offset == witness.offset
            && end.position == witness.position
            && end.chain == witness.chain;
        if end.offset < witness.offset || same {
            return Ok(());
        }
        if self.end.offset >= witness.offset {
            return Ok(()); // passed before, only not yet forgotten
        }
        Err(IngestError::WitnessDiffers { position: witness.position })
    }

    /// Makes everything that was taken in durable, and publishes it. Returns the durable end.
    ///
    /// # Errors
    /// [`IngestError::Poisoned`].
    pub fn sync(&mut self) -> Result<Checkpoint, IngestError> {
        self.check_poison()?;
        if self.end == self.writer.journal.end() {
            return Ok(self.end);
        }
        if let Some(file) = self.writer.active_file() {
            file.sync().map_err(|error| self.fail(Failure::Fatal(error)))?;
        }
        self.witness = self.witness.filter(|witness| witness.offset > self.end.offset);
        let salt = self.writer.page().map_or(0, |page| page.header.salt);
        let unsynced = std::mem::take(&mut self.unsynced);
        self.writer.journal.publish(self.end, unsynced, |index, bytes| add_all(index, bytes, salt));
        self.writer.keeper().mark(self.end, self.witness);
        Ok(self.end)
    }

    /// Sets everything behind `position` aside, where a batch must end, and goes on there: what the origin has lost
    /// is kept, and what it has in its place can be taken in. Where the tail is; `None` if there is nothing behind.
    /// What had been set aside before because it was damaged is not waited for any more.
    ///
    /// Nothing is removed before the copy is durable. After an interruption or an error the mirror is opened like
    /// any other, and holds as much of its old history as before, or as is in the copy; then this is repeated.
    ///
    /// Readers of the mirror that began before are refused: from the [`Journal`] that is returned with
    /// [`journal`](Self::journal) others are to be begun.
    ///
    /// Blocks for copying all segments behind `position`, and for recovery.
    ///
    /// # Errors
    /// [`SetAsideError`].
    pub fn set_aside(
        mut self,
        position: Position,
        options: &JournalOptions,
    ) -> Result<(Self, Option<Orphans>), SetAsideError> {
        self.sync()?;
        let journal = self.journal().clone();
        let is_there =
            |end: &Checkpoint| end.position == position && position >= journal.start().position;
        let common = journal.batch_end_at(position)?.filter(is_there);
        let common = common.ok_or(SetAsideError::NotABoundary { position })?;
        let has_tail = common.position < journal.end().position;
        let orphans = has_tail.then(|| orphans::copy_aside(&journal, &common)).transpose()?;
        let (fs, dir, node) = (Arc::clone(journal.fs()), journal.dir().to_owned(), journal.0.node);
        journal.retire();
        drop(self);
        let locked = Locked::take(&fs, &dir)?;
        orphans::cut(&locked, &node, &common)?;
        Ok((Self::recover(locked, node, options)?, orphans))
    }

    /// Syncs, and marks the mirror as cleanly closed.
    ///
    /// # Errors
    /// [`IngestError::Poisoned`].
    pub fn close(mut self) -> Result<(), IngestError> {
        self.sync()?;
        let closed = self.writer.close(self.witness);
        closed.map_err(|error| IngestError::Poisoned(Poison::new(error, None)))
    }

    fn check_poison(&self) -> Result<(), IngestError> {
        self.poison.clone().map_or(Ok(()), |poison| Err(IngestError::Poisoned(poison)))
    }

    fn refuse(&self, refusal: Refusal) -> IngestError {
        IngestError::Refused { position: self.end.position, refusal }
    }

    fn fail(&mut self, failure: Failure) -> IngestError {
        match failure {
            Failure::DiskFull(error) => IngestError::DiskFull(error),
            Failure::Fatal(error) => {
                let poison = Poison::new(error, None);
                self.poison = Some(poison.clone());
                self.writer.journal.close_watch();
                IngestError::Poisoned(poison)
            }
        }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.writer.journal.close_watch();
    }
}

/// A mirror takes in no more than this (or one batch that is larger) before it syncs by itself: space for
/// as much is kept for the quarantine.
const CATCH_UP_BYTES_MAX: u64 = 9 << 20;

fn add_all(index: &mut SegmentIndex, bytes: &[u8], salt: u64) {
    let mut rest = bytes;
    while let Ok(batch) = BatchRef::decode(rest, salt) {
        // It was verified when it was taken in: it parses.
        index.add(&batch).ok();
        rest = rest.get(batch.bytes().len()..).unwrap_or_default();
    }
}
