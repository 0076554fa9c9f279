//! Copying a journal's history, verified batch by batch, into another directory: what backup and restore
//! have in common.
//!
//! ```text
//!   source   │ page │ batch │ batch │ …        every batch: checksums, chain ─▶ written
//!   target   │ page │ batch │ ╌╌╌╌╌            what is there is walked first, and continued
//! ```
//! - The bytes are the source's, verbatim. A segment is synced, and its name too, before the next one is
//!   created: of what an interrupted copy leaves only the last file can be incomplete.
//! - The target is continued only if it is a beginning of the source: the pages of its segments are the
//!   source's, and its last batch is the one that the source's next batch continues. A page carries the
//!   chain of everything in front of it.
//! - Nothing of the target is cut that holds more than the source.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{IoContext, IoError, ReadError};
use crate::format::FormatError;
use crate::format::batch::Link;
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::Journal;
use crate::journal::layout::{self, Layout};
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::{self, Segment};
use crate::position::{Checkpoint, Position};

/// As much is gathered before it is written.
const WRITE_BYTES: usize = 256 * 1024;

/// What a copy did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Segments of the source up to the end of the copy.
    pub(crate) segments: u64,
    /// Bytes written, header pages included.
    pub(crate) written_bytes: u64,
}

/// How far a copy is, for whoever looks at it, and whether it is to end.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    bytes: AtomicU64,
    bytes_total: AtomicU64,
    cancelled: AtomicBool,
}

impl Watched {
    /// How many bytes of segments are there, and of how many; none while that isn't known.
    #[cfg(feature = "shipping")]
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.bytes_total.load(Ordering::Relaxed))
    }

    /// It ends as soon as it can; what is there is of use to the next one.
    #[cfg(feature = "shipping")]
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn begins(&self, bytes_total: u64) {
        self.bytes.store(0, Ordering::Relaxed);
        self.bytes_total.store(bytes_total, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64, path: &Path) -> Result<(), IoError> {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(IoError::new("copying to", path, std::io::ErrorKind::Interrupted.into())),
            false => Ok(()),
        }
    }
}

/// Why a copy stopped.
#[derive(Debug)]
pub(crate) enum CopyError {
    Io(IoError),
    Source(ReadError),
    /// The target holds another history, from this file on.
    Differs {
        path: PathBuf,
        position: Position,
    },
    /// The target reaches further than what is to be copied.
    Ahead {
        path: PathBuf,
        position: Position,
    },
    /// The target ends in front of the first segment that the source still has, or lacks one in between.
    Missing {
        path: PathBuf,
    },
}

impl From<IoError> for CopyError {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

impl From<ReadError> for CopyError {
    fn from(error: ReadError) -> Self {
        Self::Source(error)
    }
}

/// Copies everything in front of `to`, which is a batch end of `source`, into the directory of `target`.
pub(crate) fn copy(
    source: &Journal,
    to: Link,
    fs: &dyn Fs,
    target: &Layout,
) -> Result<Copied, CopyError> {
    copy_watched(source, to, fs, target, &Watched::default())
}

/// The same, and somebody looks.
pub(crate) fn copy_watched(
    source: &Journal,
    to: Link,
    fs: &dyn Fs,
    target: &Layout,
    watched: &Watched,
) -> Result<Copied, CopyError> {
    copy_segments(source, None, to, (fs, target), watched)
}

/// The same, from the segment on that holds the batch that ends at `from`. A base takes the place of what lies in
/// front. Nothing is removed from `source` meanwhile, unless somebody else writes it.
pub(crate) fn copy_behind(
    source: &Journal,
    from: &Checkpoint,
    to: Link,
    fs: &dyn Fs,
    target: &Layout,
) -> Result<Copied, CopyError> {
    let _guard = source.retention_guard();
    let start = source.start().position;
    if from.position < start {
        return Err(ReadError::Truncated { first: start }.into());
    }
    let last = from.position.get().checked_sub(1).map(Position::new);
    let first = last.and_then(|last| source.segment_holding(last)).map(|segment| segment.number());
    copy_segments(source, first, to, (fs, target), &Watched::default())
}

fn copy_segments(
    source: &Journal,
    from: Option<u64>,
    to: Link,
    (fs, target): (&dyn Fs, &Layout),
    watched: &Watched,
) -> Result<Copied, CopyError> {
    let (mut all, mut base) = {
        let segments = source.0.segments.read();
        (segments.all.clone(), segments.base.clone())
    };
    let left_out = all.partition_point(|segment| from.is_some_and(|from| segment.number() < from));
    all.drain(..left_out);
    let first = all.first().map_or(0, |segment| segment.number());
    // A segment without batches is only there if it is the first: without it there is no journal.
    let wanted: Vec<_> = all
        .into_iter()
        .filter(|segment| segment.base_offset() < to.offset || segment.number() == first)
        .collect();
    let names = fs.list(&target.dir).context("listing", &target.dir)?;
    let there: Vec<u64> = names.iter().filter_map(|name| layout::number_of(name, "seg")).collect();
    let last_there = there.last().copied();
    let ahead = wanted.last().zip(last_there).filter(|(last, there)| last.number() < *there);
    if let Some((_, number)) = ahead {
        return Err(CopyError::Ahead { path: target.segment(number), position: to.position });
    }
    let hole = hole(&there, first);
    // A target that ends in front of what is retained goes on if it has everything up to there.
    let whole = || match (&base, last_there) {
        (Some(base), Some(last)) if last + 1 == first => {
            ends_at(fs, target, last, &base.start().link())
        }
        _ => Ok(false),
    };
    if let Some(hole) = hole
        && !whole()?
    {
        return Err(CopyError::Missing { path: target.segment(hole) });
    }
    // What the target has of a removed prefix stays; a target that is begun now begins with the base.
    if left_out > 0 && there.is_empty() {
        // Without it, the copy would be of no history.
        let written = source.write_base(first, to.offset, fs, target)?;
        written.ok_or_else(|| ReadError::Truncated { first: source.start().position })?;
        base = None;
    }
    if let Some(base) = base.filter(|_| there.is_empty()) {
        base.copy_to(fs, target, to.offset)?;
    }
    let mut copied = Copied { segments: wanted.len() as u64, ..Copied::default() };
    let copies: Vec<_> = wanted
        .iter()
        .map(|segment| SegmentCopy::new(source, segment, to, (fs, target), watched))
        .collect();
    watched.begins(copies.iter().map(SegmentCopy::bytes).sum());
    for (copy, segment) in copies.iter().zip(&wanted) {
        match last_there {
            Some(last) if segment.number() < last => copy.compare_whole()?,
            Some(last) if segment.number() == last => copied.written_bytes += copy.go_on()?,
            _ => copied.written_bytes += copy.create()?,
        }
    }
    Ok(copied)
}

/// The first number that is missing between the target's segments, or between them and the source's first.
fn hole(there: &[u64], first: u64) -> Option<u64> {
    let gap = there.windows(2).find_map(|pair| match pair {
        [a, b] if *b != a + 1 => Some(a + 1),
        _ => None,
    });
    let (begins, ends) = (there.first().copied()?, there.last().copied()?);
    gap.or((begins > first).then_some(first)).or((ends < first).then_some(ends + 1))
}

/// Whether the target's segment `number` is whole and ends at `end`; its batches are verified.
fn ends_at(fs: &dyn Fs, target: &Layout, number: u64, end: &Link) -> Result<bool, IoError> {
    let path = target.segment(number);
    let file = fs.open(&path, OpenMode::Write).context("opening", &path)?;
    // An earlier copy may have died behind a failed sync: read what the disk holds.
    file.sync_data().context("syncing", &path)?;
    file.drop_cache().context("dropping the cache of", &path)?;
    fs.sync_dir(&target.dir).context("syncing", &target.dir)?;
    let mut bytes = [0; HEADER_PAGE_BYTES];
    fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
    let PageState::Valid { page, .. } = SegmentPage::read(&bytes) else { return Ok(false) };
    let header = page.header;
    let (offset, position) = (header.base_offset, header.base_position);
    let mut link = Link { offset, position, chain: header.previous_chain };
    let len = file.size().context("measuring", &path)?;
    let mut window = Window::new(file, path);
    while link.offset < end.offset {
        let at = file_offset(header.base_offset, link.offset);
        let Ok(batch) = window.batch(at, u64::MAX, header.salt)? else { break };
        let first = link.offset == header.base_offset;
        if !batch.continues(&link, first.then_some(&page.digest)) {
            break;
        }
        link = batch.header.end_link();
    }
    Ok(link == *end && len == file_offset(header.base_offset, end.offset))
}

/// One segment on its way.
struct SegmentCopy<'a> {
    source: &'a Journal,
    segment: &'a Arc<Segment>,
    fs: &'a dyn Fs,
    target: &'a Layout,
    path: PathBuf,
    /// Where the copy of this segment ends.
    end: Link,
    watched: &'a Watched,
}

impl<'a> SegmentCopy<'a> {
    fn new(
        source: &'a Journal,
        segment: &'a Arc<Segment>,
        to: Link,
        (fs, target): (&'a dyn Fs, &'a Layout),
        watched: &'a Watched,
    ) -> Self {
        let sealed = segment.sealed.as_ref().map(|sealed| sealed.end);
        let end = sealed.filter(|end| end.offset <= to.offset).unwrap_or(to);
        let path = target.segment(segment.number());
        Self { source, segment, fs, target, path, end, watched }
    }

    /// Length of the file when it is whole.
    fn bytes(&self) -> u64 {
        self.at(self.end.offset)
    }

    fn base(&self) -> Link {
        let header = &self.segment.page.header;
        Link {
            offset: header.base_offset,
            position: header.base_position,
            chain: header.previous_chain,
        }
    }

    fn at(&self, offset: u64) -> u64 {
        file_offset(self.segment.base_offset(), offset)
    }

    fn differs(&self, position: Position) -> CopyError {
        CopyError::Differs { path: self.path.clone(), position }
    }

    /// A segment that the target holds in front of its last: it was synced before the next one was made.
    fn compare_whole(&self) -> Result<(), CopyError> {
        let file = self.fs.open(&self.path, OpenMode::Write).context("opening", &self.path)?;
        let len = file.size().context("measuring", &self.path)?;
        if !self.has_page(&*file)? {
            return Err(CopyError::Missing { path: self.path.clone() });
        }
        match len.cmp(&self.at(self.end.offset)) {
            std::cmp::Ordering::Equal => Ok(self.watched.advance(len, &self.path)?),
            std::cmp::Ordering::Less => Err(CopyError::Missing { path: self.path.clone() }),
            std::cmp::Ordering::Greater => Err(self.differs(self.segment.base_position())),
        }
    }

    /// Whether the file begins with this segment's page; a page with a damaged copy is remade. Without any
    /// valid copy nobody knows.
    fn has_page(&self, file: &dyn File) -> Result<bool, CopyError> {
        let mut bytes = [0; HEADER_PAGE_BYTES];
        fs::read_full_at(file, &mut bytes, 0).context("reading", &self.path)?;
        match SegmentPage::read(&bytes) {
            PageState::Valid { page, .. } if page != self.segment.page => {
                Err(self.differs(self.segment.base_position()))
            }
            PageState::Valid { intact: true, .. } => Ok(true),
            PageState::Valid { page, .. } => {
                fs::write_all_at(file, &page.bytes(), 0).context("writing", &self.path)?;
                file.sync_data().context("syncing", &self.path)?;
                Ok(true)
            }
            PageState::Zero | PageState::Invalid(_) => Ok(false),
        }
    }

    /// The target's last segment: what of it is durable and whole is kept, the rest is written.
    fn go_on(&self) -> Result<u64, CopyError> {
        let file = self.fs.open(&self.path, OpenMode::Write).context("opening", &self.path)?;
        // An earlier copy may have died behind a failed sync: read what the disk holds.
        file.sync_data().context("syncing", &self.path)?;
        file.drop_cache().context("dropping the cache of", &self.path)?;
        self.fs.sync_dir(&self.target.dir).context("syncing", &self.target.dir)?;
        let has_page = self.has_page(&*file)?; // if not, not even that had become durable
        let mut window = Window::new(Arc::clone(&file), self.path.clone());
        let kept = if has_page { self.walk(&mut window)? } else { self.base() };
        // Also behind damage: what the source doesn't have may be the only copy.
        let mut ahead = false;
        window.headers_behind(self.at(kept.offset), &self.segment.page, |header| {
            ahead |= header.end_offset() > self.end.offset;
        })?;
        if ahead {
            return Err(CopyError::Ahead { path: self.path.clone(), position: kept.position });
        }
        self.write(&file, has_page.then_some(kept))
    }

    /// How far the target's batches go, up to the end of this copy.
    fn walk(&self, window: &mut Window) -> Result<Link, CopyError> {
        let page = &self.segment.page;
        let mut link = self.base();
        while link.offset < self.end.offset {
            let Ok(batch) = window.batch(self.at(link.offset), u64::MAX, page.header.salt)? else {
                break;
            };
            let first = link.offset == page.header.base_offset;
            let continues = batch.continues(&link, first.then_some(&page.digest));
            if !continues || batch.header.end_offset() > self.end.offset {
                break;
            }
            link = batch.header.end_link();
        }
        Ok(link)
    }

    fn create(&self) -> Result<u64, CopyError> {
        let file = self.fs.open(&self.path, OpenMode::CreateNew).context("creating", &self.path)?;
        self.write(&file, None)
    }

    /// Writes what lies behind `kept` (everything, if there is nothing), and syncs file and name.
    fn write(&self, file: &Arc<dyn File>, kept: Option<Link>) -> Result<u64, CopyError> {
        let (path, watched) = (&self.path, self.watched);
        let mut out = Output { file, path, watched, at: 0, buffer: Vec::new(), written: 0 };
        let mut link = kept.unwrap_or_else(|| self.base());
        match kept {
            None => out.put(&self.segment.page.bytes())?,
            Some(kept) => {
                out.at = self.at(kept.offset);
                watched.advance(out.at, path)?;
            }
        }
        let (page, limit) = (&self.segment.page, self.at(self.end.offset));
        let window = self.source.0.files.window(self.segment.number());
        let mut window =
            window.map_err(|error| self.source.or_truncated(link.position, error.into()))?;
        while link.offset < self.end.offset {
            let at = self.at(link.offset);
            let batch = match window.batch(at, limit, page.header.salt)? {
                Ok(batch) => batch,
                Err(error) => return Err(self.damaged(&window, at, link.position, error)),
            };
            let first = link.offset == page.header.base_offset;
            if !batch.continues(&link, first.then_some(&page.digest)) {
                return Err(match kept {
                    Some(kept) if kept == link => self.differs(link.position),
                    _ => self.damaged(&window, at, link.position, FormatError::Invalid("chain")),
                });
            }
            out.put(batch.bytes())?;
            link = batch.header.end_link();
        }
        if self.end != link {
            return Err(self.differs(link.position));
        }
        out.flush()?;
        // Only now is it certain that what lies behind is of an interrupted copy.
        let longer = file.size().context("measuring", &self.path)? > out.at;
        if longer {
            file.set_len(out.at).context("cutting", &self.path)?;
        }
        if (longer || out.written > 0) && super::orphans::copy_is_synced() {
            file.sync_data().context("syncing", &self.path)?;
            self.fs.sync_dir(&self.target.dir).context("syncing", &self.target.dir)?;
        }
        Ok(out.written)
    }

    fn damaged(
        &self,
        window: &Window,
        at: u64,
        position: Position,
        error: FormatError,
    ) -> CopyError {
        CopyError::Source(segments::unreadable(window.path().clone(), at, position, error))
    }
}

/// Gathers small writes.
struct Output<'a> {
    file: &'a Arc<dyn File>,
    path: &'a PathBuf,
    watched: &'a Watched,
    at: u64,
    buffer: Vec<u8>,
    written: u64,
}

impl Output<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < WRITE_BYTES { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), IoError> {
        fs::write_all_at(&**self.file, &self.buffer, self.at).context("writing", self.path)?;
        self.at += self.buffer.len() as u64;
        self.written += self.buffer.len() as u64;
        let written = std::mem::take(&mut self.buffer).len() as u64;
        self.watched.advance(written, self.path)
    }
}

#[cfg(test)]
#[cfg(all(feature = "test-kit", not(shuttle)))]
mod tests {
    use super::*;
    use crate::event::{ExpectedRevision, NewEvent, StreamId};
    use crate::fs::routed::Routed;
    use crate::fs::sim::SimFs;
    use crate::journal::{Append, Appender};
    use crate::options::JournalOptions;

    fn journal(fs: &Arc<dyn Fs>) -> Appender {
        let options = JournalOptions {
            segment_bytes_first: 7 * 1024,
            segment_bytes_max: 7 * 1024,
            batch_bytes_max: 1024,
            group_bytes_max: 2048,
            background_thread: false,
            ..JournalOptions::default()
        };
        let appender = Appender::create(fs, Path::new("/journal"), &options).unwrap();
        let stream = StreamId::new("a").unwrap();
        for number in 0..70 {
            let event = NewEvent::raw("happened", vec![number; 200]).unwrap();
            appender.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
        }
        appender
    }

    fn removes_all_it_can(journal: &Journal) -> bool {
        let Some(guard) = journal.0.retention.try_lock() else { return false };
        let first = journal.removable().unwrap().last().unwrap().info.number + 1;
        journal.remove_in_front_of(first, &guard).unwrap();
        true
    }

    /// What is removed in the middle of it takes neither the base nor the segment with the checkpoint away.
    #[test]
    fn a_copy_of_the_end_stands_still_against_retention() {
        let fs: Arc<dyn Fs> = Arc::new(SimFs::new(1));
        let appender = journal(&fs);
        let source = appender.journal().clone();
        let target = Layout::new(Path::new("/copy"));
        fs.create_dir_all(&target.dir).unwrap();
        let removable = source.removable().unwrap();
        assert!(removable.len() > 2);
        let at = removable[1].info.end_position;
        let end = source.batch_end_at(at).unwrap().unwrap();
        assert_eq!(end.position, at);
        let (disk, held) = (Arc::clone(&fs), source.clone());
        let routed = Routed(Box::new(move |path| {
            if path.starts_with("/copy") {
                removes_all_it_can(&held);
            }
            Arc::clone(&disk)
        }));
        copy_behind(&source, &end, Link::from(end), &routed, &target).unwrap();
        let (copy, damage) = Journal::open_read_only(&fs, &target.dir).unwrap();
        assert!(damage.is_none(), "{damage:?}");
        assert_eq!(copy.end().position, at);
        let start = copy.start().position;
        assert!(start > Position::START && start < at, "{start}");
        assert!(removes_all_it_can(&source), "behind it");

        // And what isn't there any more can't be copied.
        let target = Layout::new(Path::new("/late"));
        fs.create_dir_all(&target.dir).unwrap();
        let refused = copy_behind(&source, &end, Link::from(end), &*fs, &target);
        let Err(CopyError::Source(ReadError::Truncated { first })) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(first, source.start().position);
        assert_eq!(fs.list(&target.dir).unwrap(), [""; 0]);
    }
}
