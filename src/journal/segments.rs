//! The segments of an open journal, as readers see them, and their indexes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, ReadError};
use crate::event::Revision;
use crate::format::FormatError;
use crate::format::base::{Head, HeadRow};
use crate::format::batch::Link;
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::format::sidecar::{
    self, PAGE_BYTES, Page, Pages, Posting, SegmentIndex, Sidecar, SidecarKey, SparseEntry,
    stream_hash,
};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::base::Heads;
use crate::journal::gaps::{self, Gaps};
use crate::journal::layout::Layout;
use crate::journal::scan::{self, Window, file_offset};
use crate::position::Position;
use crate::sync::RwLock;

/// How many files are kept open for reading.
const OPEN_FILES_MAX: usize = 256;
/// How many pages of indexes are kept in memory: 4 MiB.
const PAGES_MAX: usize = 1024;

/// One segment.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) page: SegmentPage,
    /// Where its batches end, once it is sealed.
    pub(crate) sealed: Option<Sealed>,
}

/// What a sealed segment has and an active one hasn't.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) end: Link,
    index: RwLock<Arc<Index>>,
}

/// Where a sealed segment's index is.
#[derive(Debug)]
enum Index {
    File(Sidecar<IndexFile>),
    Memory(Arc<SegmentIndex>),
    Unread,
}

/// The answer of an index that is still to be read.
fn unread<T>() -> io::Result<T> {
    Err(io::ErrorKind::NotFound.into())
}

/// A stream's events in one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: Revision,
    pub(crate) last: Revision,
}

/// Which of a stream's events are looked up in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// So many from this revision on.
    From(Revision, usize),
    /// The last so many up to this revision, which is among them.
    UpTo(Revision, usize),
}

impl Wanted {
    /// How many of the `count` events from revision `first` on to leave out, and how many to take.
    fn of(self, first: Revision, count: u64) -> (u64, usize) {
        match self {
            Self::From(from, max) => (from.get().saturating_sub(first.get()), max),
            Self::UpTo(to, max) => {
                let behind = to.next().get().saturating_sub(first.get()).min(count);
                let skip = behind.saturating_sub(max as u64);
                (skip, (behind - skip) as usize)
            }
        }
    }
}

impl Segment {
    pub(crate) fn number(&self) -> u64 {
        self.page.header.number
    }

    pub(crate) fn base_offset(&self) -> u64 {
        self.page.header.base_offset
    }

    pub(crate) fn base_position(&self) -> Position {
        self.page.header.base_position
    }
}

/// Opens files for reading, and keeps the most used ones open.
#[derive(Debug)]
pub(crate) struct Files {
    fs: Arc<dyn Fs>,
    layout: Layout,
    gaps: Gaps,
    /// Other files may bear the same names from now on.
    retired: Arc<AtomicBool>,
    open: quick_cache::sync::Cache<FileKey, Arc<dyn File>>,
    /// Verified pages of sidecars and maps.
    pages: quick_cache::sync::Cache<(FileKey, u64), Page>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FileKey {
    Segment(u64),
    Sidecar(u64),
    Labels(u64),
    /// Level, and number of the first segment.
    Map(u32, u64),
}

impl Files {
    pub(crate) fn new(fs: Arc<dyn Fs>, layout: Layout, gaps: Gaps) -> Arc<Self> {
        let open = quick_cache::sync::Cache::new(OPEN_FILES_MAX);
        let pages = quick_cache::sync::Cache::new(PAGES_MAX);
        Arc::new(Self { fs, layout, gaps, retired: Arc::default(), open, pages })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn gaps(&self) -> &Gaps {
        &self.gaps
    }

    pub(crate) fn fs(&self) -> &Arc<dyn Fs> {
        &self.fs
    }

    pub(crate) fn window(&self, number: u64) -> Result<Window, IoError> {
        let path = self.layout.segment(number);
        let file = self.get(FileKey::Segment(number)).context("opening", &path)?;
        Ok(Window::until(Arc::clone(&self.retired), file, path))
    }

    /// From now on everything fails that would have to read a file: what is about to be in the files is no
    /// continuation of what these readers have seen.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
    }

    fn get(&self, key: FileKey) -> io::Result<Arc<dyn File>> {
        if self.retired.load(Ordering::SeqCst) {
            return Err(scan::retired());
        }
        self.open.get_or_insert_with(&key, || self.fs.open(&self.path(key), OpenMode::Read))
    }

    pub(crate) fn path(&self, key: FileKey) -> PathBuf {
        match key {
            FileKey::Segment(number) => self.layout.segment(number),
            FileKey::Sidecar(number) => self.layout.sidecar(number),
            FileKey::Labels(number) => self.layout.labels(number),
            FileKey::Map(level, first) => self.layout.map(level, first),
        }
    }

    /// Closes the files of a segment that was removed, so that their space is given back.
    pub(crate) fn let_go(&self, number: u64) {
        self.forget(FileKey::Segment(number));
        self.forget(FileKey::Sidecar(number));
        self.forget(FileKey::Labels(number));
    }

    /// The file is about to be made anew.
    pub(crate) fn forget(&self, key: FileKey) {
        self.open.remove(&key);
        self.pages.retain(|(file, _), _| *file != key);
    }
}

/// The pages of a sidecar or map on disk.
#[derive(Debug)]
pub(crate) struct IndexFile {
    files: Arc<Files>,
    key: FileKey,
}

impl IndexFile {
    pub(crate) fn new(files: &Arc<Files>, key: FileKey) -> Self {
        Self { files: Arc::clone(files), key }
    }
}

impl Pages for IndexFile {
    fn read_page(&self, tag: u64, number: u64) -> io::Result<Page> {
        let mut page = [0; PAGE_BYTES];
        let file = self.files.get(self.key)?;
        fs::read_exact_at(&*file, &mut page, number * PAGE_BYTES as u64)?;
        sidecar::verify_page(tag, number, &page)?;
        Ok(Arc::new(page))
    }

    fn page(&self, tag: u64, number: u64) -> io::Result<Page> {
        // Nobody waits for another's read: an append must not depend on how slow a reader is.
        let (pages, key) = (&self.files.pages, (self.key, number));
        if let Some(page) = pages.get(&key) {
            return Ok(page);
        }
        let page = self.read_page(tag, number)?;
        pages.insert(key, Arc::clone(&page));
        Ok(page)
    }

    fn count(&self) -> io::Result<u64> {
        Ok(self.files.get(self.key)?.size()? / PAGE_BYTES as u64)
    }
}

pub(crate) fn key_of(page: &SegmentPage, end: &Link) -> SidecarKey {
    SidecarKey {
        segment: page.header.number,
        salt: page.header.salt,
        base_position: page.header.base_position,
        end_offset: end.offset,
        end_chain: end.chain,
    }
}

/// Whether sidecars may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    Writer,
}

impl Sealed {
    /// A segment whose index is known and has no sidecar yet.
    pub(crate) fn in_memory(end: Link, index: Arc<SegmentIndex>) -> Self {
        Self { end, index: RwLock::new(Arc::new(Index::Memory(index))) }
    }

    /// Writes the sidecar and lets go of the index in memory. An effort: it stays if it can't be written.
    pub(crate) fn write_sidecar(&self, files: &Arc<Files>, page: &SegmentPage) {
        // A whole sidecar says more about lost events than what can be read.
        if files.gaps.touch(page.header.base_offset..self.end.offset) {
            return;
        }
        let index = Arc::clone(&self.index.read());
        if let Index::Memory(index) = &*index
            && let Some(file) = write_sidecar(files, page, &self.end, index)
        {
            *self.index.write() = Arc::new(file);
        }
    }

    /// Opens a sealed segment with its sidecar. Without a valid one, a writer writes it, from `index` if the
    /// segment has just been read; a reader reads the segment when it is asked about it, so that damage
    /// there doesn't keep it from everything in front.
    pub(crate) fn open(
        files: &Arc<Files>,
        page: &SegmentPage,
        end: Link,
        index: Option<Arc<SegmentIndex>>,
        access: Access,
    ) -> Result<Self, ReadError> {
        let pages = IndexFile::new(files, FileKey::Sidecar(page.header.number));
        if let Ok(Some(sidecar)) = Sidecar::open(pages, &key_of(page, &end)) {
            return Ok(Self { end, index: RwLock::new(Arc::new(Index::File(sidecar))) });
        }
        let index = match (index, access) {
            (Some(index), _) => index,
            (None, Access::Writer) => Arc::new(read_index(files, page, &end)?),
            (None, Access::ReadOnly) => {
                return Ok(Self { end, index: RwLock::new(Arc::new(Index::Unread)) });
            }
        };
        let sealed = Self::in_memory(end, index);
        if access == Access::Writer {
            sealed.write_sidecar(files, page);
        }
        Ok(sealed)
    }

    /// Asks the index. A damaged sidecar is derived data: the segment is read instead, once.
    fn ask<T>(
        &self,
        files: &Files,
        page: &SegmentPage,
        question: impl Fn(&Index) -> io::Result<T>,
    ) -> Result<T, ReadError> {
        let index = Arc::clone(&self.index.read());
        if let Ok(answer) = question(&index) {
            return Ok(answer);
        }
        let rebuilt = Arc::new(Index::Memory(Arc::new(read_index(files, page, &self.end)?)));
        *self.index.write() = Arc::clone(&rebuilt);
        let path = files.layout().sidecar(page.header.number);
        Ok(question(&rebuilt).context("reading the index that replaces", &path)?)
    }

    /// The streams of the segment and the revision of their last event here, as rows of a base.
    pub(crate) fn heads(&self, files: &Files, page: &SegmentPage) -> Result<Heads<'_>, ReadError> {
        // Asked for something, a damaged or unread index is replaced.
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => sidecar.heads(0, u64::MAX).map(drop),
            Index::Memory(_) => Ok(()),
            Index::Unread => unread(),
        })?;
        let index = Arc::clone(&self.index.read());
        Ok(match &*index {
            Index::File(_) => Box::new(HeadRow::new(move |first, max| match &*index {
                Index::File(sidecar) => sidecar.heads(first, max),
                _ => unread(),
            })),
            Index::Memory(index) => {
                let streams = index.streams.iter();
                let mut heads: Vec<_> =
                    streams.map(|(name, known)| Head::new(name, known.last_revision())).collect();
                heads.sort_unstable_by(|a, b| (a.hash, &a.name).cmp(&(b.hash, &b.name)));
                Box::new(heads.into_iter().map(Ok))
            }
            Index::Unread => Box::new(std::iter::once(unread())),
        })
    }

    pub(crate) fn seek(
        &self,
        files: &Files,
        page: &SegmentPage,
        position: Position,
    ) -> Result<SparseEntry, ReadError> {
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => sidecar.seek(position),
            Index::Memory(index) => seek(index, position).ok_or(io::ErrorKind::InvalidData.into()),
            Index::Unread => unread(),
        })
    }

    pub(crate) fn span(
        &self,
        files: &Files,
        page: &SegmentPage,
        stream: &str,
    ) -> Result<Option<Span>, ReadError> {
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => Ok(sidecar
                .stream(stream)?
                .map(|span| Span { first: span.first_revision, last: span.last_revision() })),
            Index::Memory(index) => Ok(span(index, stream)),
            Index::Unread => unread(),
        })
    }

    pub(crate) fn postings(
        &self,
        files: &Files,
        page: &SegmentPage,
        stream: &str,
        wanted: Wanted,
    ) -> Result<Vec<Posting>, ReadError> {
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => match sidecar.stream(stream)? {
                Some(span) => {
                    let (skip, max) = wanted.of(span.first_revision, u64::from(span.count));
                    sidecar.postings(&span, skip, max)
                }
                None => Ok(Vec::new()),
            },
            Index::Memory(index) => Ok(postings(index, stream, wanted)),
            Index::Unread => unread(),
        })
    }

    /// The hashes of its streams' names, ascending.
    pub(crate) fn stream_hashes(
        &self,
        files: &Files,
        page: &SegmentPage,
    ) -> Result<Vec<u64>, ReadError> {
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => sidecar.stream_hashes(0, sidecar.streams()),
            Index::Memory(index) => {
                let names = index.streams.keys();
                let mut hashes: Vec<u64> = names.map(|name| stream_hash(name)).collect();
                hashes.sort_unstable();
                Ok(hashes)
            }
            Index::Unread => unread(),
        })
    }

    pub(crate) fn last_ids(
        &self,
        files: &Files,
        page: &SegmentPage,
        count: u64,
    ) -> Result<Vec<u64>, ReadError> {
        self.ask(files, page, |index| match index {
            Index::File(sidecar) => sidecar.last_ids(count),
            Index::Memory(index) => {
                let skip =
                    index.ids.len().saturating_sub(usize::try_from(count).unwrap_or(usize::MAX));
                Ok(index.ids.get(skip..).unwrap_or_default().to_vec())
            }
            Index::Unread => unread(),
        })
    }
}

pub(crate) fn seek(index: &SegmentIndex, position: Position) -> Option<SparseEntry> {
    let behind = index.sparse.partition_point(|entry| entry.position <= position);
    index.sparse.get(behind.saturating_sub(1)).copied()
}

pub(crate) fn span(index: &SegmentIndex, stream: &str) -> Option<Span> {
    let known = index.streams.get(stream)?;
    Some(Span { first: known.first_revision, last: known.last_revision() })
}

pub(crate) fn postings(index: &SegmentIndex, stream: &str, wanted: Wanted) -> Vec<Posting> {
    let Some(known) = index.streams.get(stream) else { return Vec::new() };
    let (skip, max) = wanted.of(known.first_revision, known.postings.len() as u64);
    let skip = usize::try_from(skip).unwrap_or(usize::MAX);
    known.postings.iter().skip(skip).take(max).copied().collect()
}

/// Reads a whole segment to build its index.
fn read_index(files: &Files, page: &SegmentPage, end: &Link) -> Result<SegmentIndex, ReadError> {
    let mut window = files.window(page.header.number)?;
    let base = page.header.base_offset;
    let limit = file_offset(base, end.offset);
    let mut index = SegmentIndex::default();
    let (mut at, mut position) = (file_offset(base, base), page.header.base_position);
    let path = window.path().clone();
    let corruption = |file_offset, position, kind| {
        ReadError::Corruption(Corruption { path: path.clone(), file_offset, position, kind })
    };
    let mut crossed = None;
    while at < limit {
        if let Some(gap) = files.gaps.at_offset(base + (at - HEADER_PAGE_BYTES as u64)) {
            gaps::skip(&mut index, gap);
            crossed = Some(*gap);
            (at, position) = (file_offset(base, gap.to_offset), gap.to_position);
            continue;
        }
        let batch = window
            .batch(at, limit, page.header.salt)?
            .map_err(|error| corruption(at, position, CorruptionKind::Batch(error)))?;
        if let Some(gap) = &crossed {
            gaps::bridge(&mut index, gap, &batch);
        }
        index
            .add(&batch)
            .map_err(|error| corruption(at, position, CorruptionKind::Record(error)))?;
        position = batch.header.end_position();
        at += u64::from(batch.header.padded_len);
    }
    Ok(index)
}

/// What bears a sidecar's name is whole, also beside a writer and behind a crash: whoever verifies it relies on
/// that.
fn write_sidecar(
    files: &Arc<Files>,
    page: &SegmentPage,
    end: &Link,
    index: &SegmentIndex,
) -> Option<Index> {
    let number = page.header.number;
    let (temp, path) = (files.layout.sidecar_temp(number), files.layout.sidecar(number));
    let key = key_of(page, end);
    drop(files.fs.remove(&temp));
    let file = files.fs.open(&temp, OpenMode::CreateNew).ok()?;
    let bytes = sidecar::encode(&key, index);
    let written = fs::write_all_at(&*file, &bytes, 0)
        .and_then(|()| file.sync_data())
        .and_then(|()| files.fs.rename(&temp, &path));
    if written.is_err() {
        drop(files.fs.remove(&temp));
        return None;
    }
    files.forget(FileKey::Sidecar(number));
    let pages = IndexFile::new(files, FileKey::Sidecar(number));
    Sidecar::open(pages, &key).ok().flatten().map(Index::File)
}

/// A batch that doesn't read as it should, as a [`ReadError`].
pub(crate) fn unreadable(
    path: PathBuf,
    file_offset: u64,
    position: Position,
    error: FormatError,
) -> ReadError {
    match error {
        FormatError::Unsupported { .. } => ReadError::Unsupported { path, source: error },
        error => ReadError::Corruption(Corruption {
            path,
            file_offset,
            position,
            kind: CorruptionKind::Batch(error),
        }),
    }
}
