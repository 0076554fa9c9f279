//! Removing a journal's oldest segments. What may be removed is decided by [`crate::retention`]; here it is
//! found out which segments that are, whether an archive has them, and they are removed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError, ReadError};
use crate::format::FormatError;
use crate::format::base::Boundary;
use crate::format::batch::Link;
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::base::{self, Heads, Sources, Start};
use crate::journal::layout::{self, Layout};
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::Segment;
use crate::journal::writer::checkpoint_of;
use crate::journal::{Journal, SegmentInfo};
use crate::position::Position;

/// Why an archive can't be relied upon.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// It is a journal of its own: what happens to that happens to the archive.
    #[error("{}: belongs to a journal, not to an archive", path.display())]
    NotAnArchive {
        /// The file that shows it.
        path: PathBuf,
    },
    /// A segment isn't there.
    #[error("{}: not in the archive", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It holds another history.
    #[error("{}: holds another history than the journal's", path.display())]
    Differs {
        /// The file.
        path: PathBuf,
    },
    /// It is damaged.
    #[error(transparent)]
    Damaged(#[from] Corruption),
    /// It can't be read or synced.
    #[error(transparent)]
    Io(#[from] IoError),
}

/// A sealed segment in front of durable batches.
#[derive(Clone, Debug)]
pub(crate) struct Removable {
    pub(crate) info: SegmentInfo,
    pub(crate) file_bytes: u64,
    /// The journal may begin behind it: there is a batch on either side of that place, and no accepted loss.
    pub(crate) may_be_last: bool,
}

/// Keeps the writer from being closed while segments are removed.
pub(crate) type Guard<'a> = parking_lot::MutexGuard<'a, ()>;

impl Journal {
    /// Bytes of the segment files that can't be removed as long as somebody needs what lies behind `position`.
    #[cfg(feature = "shipping")]
    pub(crate) fn held_bytes(&self, position: Position) -> u64 {
        let segments = self.segments();
        let held = segments.iter().filter(|it| it.sealed && it.end_position > position);
        held.map(|it| HEADER_PAGE_BYTES as u64 + it.end_offset.saturating_sub(it.base_offset)).sum()
    }

    pub(crate) fn fs(&self) -> &Arc<dyn Fs> {
        self.0.files.fs()
    }

    pub(crate) fn list(&self, dir: &Path) -> std::io::Result<Vec<String>> {
        self.0.files.fs().list(dir)
    }

    pub(crate) fn retention_guard(&self) -> Guard<'_> {
        self.0.retention.lock()
    }

    /// The sealed segments, the oldest first, as far as at least one durable batch follows: with it its
    /// segment's header became durable, so what is retained will be found again.
    pub(crate) fn removable(&self) -> Result<Vec<Removable>, IoError> {
        let (fs, end) = (self.0.files.fs(), self.end());
        let all = self.segments();
        let mut removable = Vec::new();
        for (info, next) in all.iter().zip(all.iter().skip(1)) {
            let boundary = info.end_offset;
            if !info.sealed || boundary >= end.offset {
                break;
            }
            let file = fs.open(&info.path, OpenMode::Read).context("opening", &info.path)?;
            let file_bytes = file.size().context("measuring", &info.path)?;
            let lost = self.gaps().all().iter();
            let mut lost = lost.filter(|gap| (gap.from.offset..=gap.to_offset).contains(&boundary));
            let may_be_last = next.base_offset == boundary && lost.next().is_none();
            removable.push(Removable { info: info.clone(), file_bytes, may_be_last });
        }
        Ok(removable)
    }

    /// Reads the segments `numbers` in the archive, every byte: they must be these very segments. What was
    /// read is durable there. How many are there, and why no more.
    pub(crate) fn check_archive(
        &self,
        archive: &Path,
        numbers: &[u64],
    ) -> (usize, Option<ArchiveError>) {
        let layout = Layout::new(archive);
        let begins = match self.open_archive(&layout) {
            Ok(begins) => begins,
            Err(error) => return (0, Some(error)),
        };
        for (count, &number) in numbers.iter().enumerate() {
            let path = layout.segment(number);
            let checked = match self.sealed_segment(number) {
                Some(segment) if number >= begins => {
                    check_archived(&**self.0.files.fs(), &layout, &segment)
                }
                _ => Err(ArchiveError::Missing { path }),
            };
            if let Err(error) = checked {
                return (count, Some(error));
            }
        }
        (numbers.len(), None)
    }

    /// Number of the segment with which the archive begins: what lies in front is no part of it.
    fn open_archive(&self, layout: &Layout) -> Result<u64, ArchiveError> {
        let fs = &**self.0.files.fs();
        let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
        let foreign = [layout::NODE, layout::MARK, layout::INCOMING];
        if let Some(name) = names.iter().find(|name| foreign.contains(&name.as_str())) {
            return Err(ArchiveError::NotAnArchive { path: layout.file(name) });
        }
        // The names are there, but may not be durable.
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
        let base = base::Base::read(fs, layout, self.id()).map_err(|error| match error {
            OpenError::Corruption(corruption) => ArchiveError::Damaged(corruption),
            OpenError::Io(error) => ArchiveError::Io(error),
            _ => ArchiveError::Differs { path: layout.file(layout::BASE) },
        })?;
        let begins = Start::of(base.as_ref(), self.id()).segment;
        let path = layout.segment(begins);
        let there = names.iter().any(|name| layout::number_of(name, "seg") == Some(begins));
        if there { Ok(begins) } else { Err(ArchiveError::Missing { path }) }
    }

    /// Removes what an earlier removal has left because a file couldn't be removed.
    pub(crate) fn remove_leftovers(&self, _guard: &Guard<'_>) -> Result<(), ReadError> {
        let (fs, layout) = (&**self.0.files.fs(), &self.0.layout);
        let first = self.retained().segment;
        let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
        let numbers = names.iter().filter_map(|name| layout::number_of(name, "seg"));
        let numbers: Vec<_> = numbers.filter(|number| *number < first).collect();
        if let Some(base) = self.base().filter(|_| !numbers.is_empty()) {
            base.renew(fs, layout)?; // there may have been no space for that when it was found
        }
        Ok(base::remove_segments(fs, layout, numbers.into_iter())?)
    }

    /// Removes all segments in front of number `first`, for ever. The caller has the guard, and has found out
    /// that they are [removable](Self::removable).
    pub(crate) fn remove_in_front_of(
        &self,
        first: u64,
        _guard: &Guard<'_>,
    ) -> Result<(), ReadError> {
        let fs = &**self.0.files.fs();
        let layout = &self.0.layout;
        let Some(base) = self.write_base(first, u64::MAX, fs, layout)? else { return Ok(()) };
        let removed: Vec<_> = self.segments().into_iter().map(|segment| segment.number).collect();
        self.begin_at(base);
        let numbers = removed.into_iter().take_while(|number| *number < first);
        Ok(base::remove_segments(fs, layout, numbers)?)
    }

    /// Writes what is to be known of all segments in front of number `first` into a directory, durably: this
    /// journal's own, or that of a copy that begins there and ends at `end_offset`. `None` if there is nothing in front, or
    /// no such segment.
    pub(crate) fn write_base(
        &self,
        first: u64,
        end_offset: u64,
        fs: &dyn Fs,
        target: &Layout,
    ) -> Result<Option<Arc<base::Base>>, ReadError> {
        let (removed, start) = {
            let segments = self.0.segments.read();
            let removed: Vec<_> =
                segments.all.iter().take_while(|s| s.number() < first).cloned().collect();
            let next = segments.all.get(removed.len()).cloned();
            (removed, next.filter(|next| next.number() == first))
        };
        let (Some(_), Some(next)) = (removed.first(), start) else { return Ok(None) };
        let last = Position::new(next.base_position().get().saturating_sub(1));
        let Some(header) = self.header_holding(last)? else { return Ok(None) };
        let checkpoint = checkpoint_of(&header, self.id());
        let page = &next.page.header;
        let linked = Link {
            offset: page.base_offset,
            position: page.base_position,
            chain: page.previous_chain,
        };
        if header.end_link() != linked {
            return Err(ReadError::Corruption(Corruption {
                path: self.0.layout.segment(first),
                file_offset: 0,
                position: page.base_position,
                kind: CorruptionKind::SegmentLink,
            }));
        }
        let start = Start { checkpoint, segment: first, proven: self.end().offset.min(end_offset) };
        let old = self.base();
        let boundary = |segment: &Arc<Segment>| Boundary {
            segment: segment.number(),
            offset: segment.base_offset(),
            position: segment.base_position(),
            chain: segment.page.header.previous_chain,
        };
        let heads = || {
            let mut rows: Vec<Heads<'_>> = Vec::new();
            for segment in &removed {
                let Some(sealed) = &segment.sealed else { continue };
                rows.push(sealed.heads(&self.0.files, &segment.page)?);
            }
            Ok(rows)
        };
        let boundaries = removed.iter().map(boundary).collect();
        let sources = Sources { old: old.as_deref(), boundaries, heads: &heads };
        sources.write(fs, target, &start, crate::env::now_us()).map(Some)
    }
}

/// Compares an archived segment with the journal's, by header page and chain: that is every byte.
fn check_archived(fs: &dyn Fs, layout: &Layout, segment: &Segment) -> Result<(), ArchiveError> {
    let path = layout.segment(segment.number());
    let differs = || ArchiveError::Differs { path: path.clone() };
    let file = match fs.open(&path, OpenMode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ArchiveError::Missing { path });
        }
        opened => opened.context("opening", &path)?,
    };
    // What made the archive may have died behind a failed sync: read what the disk holds.
    file.sync_data().context("syncing", &path)?;
    file.drop_cache().context("dropping the cache of", &path)?;
    let Some(end) = segment.sealed.as_ref().map(|sealed| sealed.end) else { return Err(differs()) };
    let damaged = |file_offset, position, kind| {
        ArchiveError::Damaged(Corruption { path: path.clone(), file_offset, position, kind })
    };
    let mut bytes = [0; HEADER_PAGE_BYTES];
    fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
    let base = segment.base_position();
    match SegmentPage::read(&bytes) {
        PageState::Valid { page, .. } if page != segment.page => return Err(differs()),
        PageState::Valid { intact: true, .. } => {}
        PageState::Valid { .. } | PageState::Zero | PageState::Invalid(_) => {
            let why = CorruptionKind::SegmentHeader(FormatError::HeaderChecksum);
            return Err(damaged(0, base, why));
        }
    }
    let len = file.size().context("measuring", &path)?;
    let header = &segment.page.header;
    let mut window = Window::new(file, path.clone());
    let mut link =
        Link { offset: header.base_offset, position: base, chain: header.previous_chain };
    while link.offset < end.offset {
        let at = file_offset(header.base_offset, link.offset);
        let batch = window
            .batch(at, u64::MAX, header.salt)?
            .map_err(|error| damaged(at, link.position, CorruptionKind::Batch(error)))?;
        let first = link.offset == header.base_offset;
        if !batch.continues(&link, first.then_some(&segment.page.digest)) {
            return Err(damaged(at, link.position, CorruptionKind::Chain));
        }
        link = batch.header.end_link();
    }
    if link != end {
        return Err(differs());
    }
    let at = file_offset(header.base_offset, end.offset);
    if len != at {
        return Err(damaged(at, end.position, CorruptionKind::BehindEnd));
    }
    Ok(())
}
