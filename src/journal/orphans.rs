//! Setting a mirror's orphaned tail aside: events that its origin has lost, or never had.
//!
//! ```text
//!   mirror   │ common ──────┤ c ├── orphaned ─┤
//!             1 copied from the segment that holds c on, verified, synced ─▶ orphaned/EPOCH-POSITION/
//!             2 readers that began before are refused from here on
//!             3 the mark is lowered to c     4 segments behind c removed, last first; the rest behind c zeroed
//!             5 recovery, as at any opening: the mirror ends at c
//! ```
//! - Until the copy is durable, nothing of the mirror is touched. From then on the tail is there twice, until it
//!   is gone from the mirror.
//! - Whatever interrupts this leaves a mirror that is a beginning of its old history, and goes up to c at least:
//!   setting it aside again finds the copy, which holds the mirror's end by its chain, and goes on with step 2.
//! - A copy is a directory like that of a backup: segments, and a base in place of what lies in front. It begins
//!   in front of c, with the common batches of c's segment.
//! - Nothing is ever removed from a copy, and none is written over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{IngestError, IoContext, IoError, OpenError, ReadError};
use crate::format::batch::Link;
use crate::format::files::{Mark, Node};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::copy::{self, CopyError};
use crate::journal::layout::{self, Layout};
use crate::journal::mark::MarkFile;
use crate::journal::recovery;
use crate::journal::scan::file_offset;
use crate::journal::segments::Access;
use crate::journal::{Comparison, Journal, Locked};
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, Position};

/// More tails than this with one epoch and one position are too many.
const NAMES_MAX: u32 = 1000;

/// A tail that was set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Orphans {
    /// Its directory: segments that can be read, verified and copied like a backup.
    pub dir: PathBuf,
    /// The common end: the first event behind it is the first that is orphaned.
    pub from: Position,
    /// Where the tail ends; `None` if it can't be read.
    pub end: Option<Checkpoint>,
}

/// Why a mirror's tail can't be set aside. Nothing is lost: it is in the mirror, or in the copy, or in both.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetAsideError {
    /// No batch of the mirror ends there.
    #[error("no batch of the mirror ends at position {position}")]
    NotABoundary {
        /// The position.
        position: Position,
    },
    /// The mirror's last batches can't be made durable.
    #[error(transparent)]
    Sync(#[from] IngestError),
    /// The tail can't be read.
    #[error("the tail can't be read: {0}")]
    Read(#[from] ReadError),
    /// Files can't be written, or the mirror can't be opened again.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl From<IoError> for SetAsideError {
    fn from(error: IoError) -> Self {
        Self::Open(error.into())
    }
}

impl SetAsideError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotABoundary { .. } => "set_aside.not_a_boundary",
            Self::Sync(_) => "set_aside.sync",
            Self::Read(_) => "set_aside.read",
            Self::Open(_) => "set_aside.open",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotABoundary { .. } => "ask the origin again where the histories part",
            Self::Sync(_) => "check the mirror's disk, then resume",
            Self::Read(_) => "run `headwater verify` on the mirror; nothing of it was removed",
            Self::Open(error) => error.hint(),
        }
    }

    /// Whether there is only no space for the copy at present.
    #[cfg(feature = "shipping")]
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Self::Open(OpenError::Io(error)) if error.is_disk_full())
    }
}

impl Journal {
    /// The tails that were set aside from this mirror, by name. What can't be listed counts as none.
    #[must_use]
    pub fn orphans(&self) -> Vec<Orphans> {
        orphans_in(self.fs(), self.dir())
    }

    /// Whether the checkpoint is a place in a tail that was set aside, and no place in this journal: nothing will
    /// ever be there again.
    ///
    /// Whoever serves a mirror asks this for each subscriber that is ahead of it. So a tail is opened to learn where it ends
    /// once, and then only if the place can be in it.
    #[cfg(any(feature = "views", feature = "shipping"))]
    pub(crate) fn has_set_aside(&self, checkpoint: &Checkpoint) -> bool {
        let (fs, position) = (self.fs(), checkpoint.position);
        let can_be_in = |dir: &Path| self.end_of_tail(dir).is_some_and(|end| position <= end);
        tails_in(fs, self.dir())
            .any(|(from, dir)| from < position && can_be_in(&dir) && holds(fs, &dir, checkpoint))
    }

    /// Where a tail ends, if it can be read. One changes only while it is being set aside, and the mirror is opened anew
    /// after that.
    #[cfg(any(feature = "views", feature = "shipping"))]
    fn end_of_tail(&self, dir: &Path) -> Option<Position> {
        if let Some(end) = self.0.tails.lock().get(dir) {
            return Some(*end);
        }
        let end = end_of_copy(self.fs(), dir)?.position;
        self.0.tails.lock().insert(dir.to_owned(), end);
        Some(end)
    }

    /// The tails that were set aside, as far as they can be read: from which position, and what.
    #[cfg(feature = "views")]
    pub(crate) fn tails_set_aside(&self) -> Vec<(Position, Self)> {
        let opened =
            |it: Orphans| Some((it.from, Self::open_read_only(self.fs(), &it.dir).ok()?.0));
        self.orphans().into_iter().filter_map(opened).collect()
    }
}

/// The tails that were set aside from the mirror in `dir`, by name.
pub(crate) fn orphans_in(fs: &Arc<dyn Fs>, dir: &Path) -> Vec<Orphans> {
    let orphans = tails_in(fs, dir).map(|(from, dir)| {
        let end = end_of_copy(fs, &dir);
        Orphans { dir, from, end }
    });
    orphans.collect()
}

/// Behind which positions there are tails, and where, by name.
fn tails_in(fs: &Arc<dyn Fs>, dir: &Path) -> impl Iterator<Item = (Position, PathBuf)> {
    let dir = Layout::new(dir).orphaned();
    let names = fs.list(&dir).unwrap_or_default().into_iter();
    names.filter_map(move |name| {
        Some((Position::new(layout::orphaned_from(&name)?), dir.join(&name)))
    })
}

fn end_of_copy(fs: &Arc<dyn Fs>, dir: &Path) -> Option<Checkpoint> {
    Journal::open_read_only(fs, dir).ok().map(|(journal, _)| journal.end())
}

/// Whether the copy in `dir` goes up to this place at least, by its chain.
fn holds(fs: &Arc<dyn Fs>, dir: &Path, end: &Checkpoint) -> bool {
    Journal::open_read_only(fs, dir)
        .ok()
        .is_some_and(|(journal, _)| matches!(journal.compare(end), Ok(Comparison::Equal)))
}

/// Step 1: the copy, durable when this returns. One that is there already is completed, or taken as it is.
pub(crate) fn copy_aside(source: &Journal, common: &Checkpoint) -> Result<Orphans, SetAsideError> {
    let (fs, end) = (source.fs(), source.end());
    let all = orphans_in(fs, source.dir());
    let is_whole = |it: &&Orphans| it.from <= common.position && holds(fs, &it.dir, &end);
    if let Some(there) = all.iter().find(is_whole) {
        return Ok(there.clone());
    }
    let layout = Layout::new(source.dir());
    for attempt in 1..NAMES_MAX {
        let dir = layout.orphaned_tail(end.epoch, common.position, attempt);
        fs.create_dir_all(&dir).context("creating", &dir)?;
        match copy::copy_behind(source, common, Link::from(end), &**fs, &Layout::new(&dir)) {
            Ok(_) => return Ok(Orphans { dir, from: common.position, end: Some(end) }),
            // Another tail that began at the same place.
            Err(
                CopyError::Differs { .. } | CopyError::Ahead { .. } | CopyError::Missing { .. },
            ) => {}
            Err(CopyError::Io(error)) => return Err(error.into()),
            Err(CopyError::Source(error)) => return Err(error.into()),
        }
    }
    let dir = layout.orphaned();
    Err(IoError::new("finding a name in", &dir, std::io::ErrorKind::AlreadyExists.into()).into())
}

/// Steps 3 and 4: nothing is left behind `common`.
pub(super) fn cut(locked: &Locked, node: &Node, common: &Checkpoint) -> Result<(), OpenError> {
    let (fs, layout) = (&*locked.fs, &locked.layout);
    let survey = recovery::survey(fs, layout, node, Access::Writer)?;
    let mut mark = MarkFile::open(fs, layout, survey.mark.map_or(0, |mark| mark.sequence))?;
    mark.lower(Mark { sequence: 0, end: *common, closed: false, witness: None, salt: 0 })?;
    let behind =
        survey.kept.iter().rev().take_while(|it| it.page.header.base_offset >= common.offset);
    for kept in behind {
        let path = layout.segment(kept.number());
        fs.remove(&path).context("removing", &path)?;
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    }
    let holds = survey.kept.iter().rfind(|it| it.page.header.base_offset < common.offset);
    if let Some(kept) = holds {
        let path = layout.segment(kept.number());
        let file = fs.open(&path, OpenMode::Write).context("opening", &path)?;
        let size = file.size().context("measuring", &path)?;
        let from = file_offset(kept.page.header.base_offset, common.offset);
        fs::write_zeros(&*file, from..size).context("zeroing", &path)?;
        file.sync_data().context("syncing", &path)?;
    }
    Ok(())
}

/// Whether a copy's files are to be synced: always, unless a test wants to see what happens otherwise.
pub(crate) fn copy_is_synced() -> bool {
    !planted::is(Bug::CutBeforeCopy)
}
