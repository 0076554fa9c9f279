//! Where a journal begins: at genesis, or behind a prefix that retention has removed.
//!
//! ```text
//!   removed: 0 … n-1          │ base │ n │ n+1 │ … retained
//!   heads, boundaries ──▶ base.new ─▶ synced ─▶ renamed ─▶ name synced ─▶ only now segments are removed
//! ```
//! - From the moment at which it is durable the base is truth: segments below it are no part of the journal,
//!   whether they are still there or not.
//! - A base that is found in front of segments that should be gone may not be durable: the sync of its name
//!   may have failed. It is made anew before one of them is removed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError, ReadError};
use crate::event::{Revision, StreamId};
use crate::format::FormatError;
use crate::format::base::{self, BaseHeader, Boundary, Head, HeadRow, Merged, Pages};
use crate::format::batch::Link;
use crate::format::files::Mark;
use crate::format::sidecar::PAGE_BYTES;
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::layout::{self, Layout};
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, JournalId, Position};

/// Where what is retained begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// The end of what was removed, or genesis.
    pub(crate) checkpoint: Checkpoint,
    /// Number of the segment that begins there.
    pub(crate) segment: u64,
    /// How far the journal is known to have been durable.
    pub(crate) proven: u64,
}

impl Start {
    /// The beginning of a journal that has lost nothing.
    pub(crate) fn genesis(journal: JournalId) -> Self {
        Self { checkpoint: Mark::start(journal).end, segment: 0, proven: 0 }
    }

    pub(crate) fn of(base: Option<&Arc<Base>>, journal: JournalId) -> Self {
        base.map_or_else(|| Self::genesis(journal), |base| base.start())
    }

    pub(crate) fn link(&self) -> Link {
        let Checkpoint { offset, position, chain, .. } = self.checkpoint;
        Link { offset, position, chain }
    }

    /// The mark that counts: a base was durable, so it vouches for its place like a mark does.
    pub(crate) fn mark(&self, mark: Option<Mark>) -> Option<Mark> {
        let kept = mark.filter(|mark| {
            mark.end.offset >= self.checkpoint.offset || mark.end.journal != self.checkpoint.journal
        });
        let base = Mark {
            sequence: mark.map_or(0, |mark| mark.sequence),
            end: self.checkpoint,
            closed: false,
            witness: mark.and_then(|mark| mark.witness),
            salt: 0,
        };
        kept.or((self.segment > 0).then_some(base))
    }
}

/// The open `base` of a journal.
#[derive(Debug)]
pub(crate) struct Base {
    file: base::Base<FilePages>,
    path: PathBuf,
}

/// The pages of a file. It is kept open: the name may be given to a newer base meanwhile.
#[derive(Debug)]
struct FilePages(Arc<dyn File>);

impl Pages for FilePages {
    fn read_page(&self, number: u64, page: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        fs::read_exact_at(&*self.0, page, number.saturating_mul(PAGE_BYTES as u64))
    }

    fn count(&self) -> io::Result<u64> {
        Ok(self.0.size()? / PAGE_BYTES as u64)
    }
}

impl Base {
    /// Reads `base`; `None` if there is none.
    pub(crate) fn read(
        fs: &dyn Fs,
        layout: &Layout,
        journal: JournalId,
    ) -> Result<Option<Arc<Self>>, OpenError> {
        let path = layout.file(layout::BASE);
        let file = match fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(IoError::new("opening", &path, error).into()),
        };
        let damaged = |error| {
            let position = Position::START;
            let kind = CorruptionKind::Base(error);
            OpenError::Corruption(Corruption { path: path.clone(), file_offset: 0, position, kind })
        };
        match base::Base::open(FilePages(file)).context("reading", &path)? {
            Ok(file) if file.header().start.journal != journal => {
                Err(damaged(FormatError::Invalid("journal id")))
            }
            Ok(file) => Ok(Some(Arc::new(Self { file, path }))),
            Err(source @ FormatError::Unsupported { .. }) => {
                Err(OpenError::Unsupported { path, source })
            }
            Err(error) => Err(damaged(error)),
        }
    }

    pub(crate) fn header(&self) -> &BaseHeader {
        self.file.header()
    }

    pub(crate) fn is_intact(&self) -> bool {
        self.file.is_intact()
    }

    pub(crate) fn start(&self) -> Start {
        let header = self.header();
        Start {
            checkpoint: header.start,
            segment: header.first_segment,
            proven: header.durable_offset,
        }
    }

    /// Last revision of a stream among the removed events.
    pub(crate) fn head(&self, stream: &StreamId) -> Result<Option<Revision>, ReadError> {
        self.head_of(stream.as_str())
    }

    pub(crate) fn head_of(&self, stream: &str) -> Result<Option<Revision>, ReadError> {
        self.file.head(stream).map_err(|error| self.unreadable(error))
    }

    fn unreadable(&self, error: io::Error) -> ReadError {
        if error.kind() != io::ErrorKind::InvalidData {
            return IoError::new("reading", &self.path, error).into();
        }
        ReadError::Corruption(self.damage(HEADERS_BYTES, FormatError::BodyChecksum))
    }

    fn damage(&self, file_offset: u64, error: FormatError) -> Corruption {
        Corruption {
            path: self.path.clone(),
            file_offset,
            position: self.header().start.position,
            kind: CorruptionKind::Base(error),
        }
    }

    /// Reads all of it: the first damage, and how many bytes were read.
    pub(crate) fn check(&self) -> Result<(Option<Corruption>, u64), IoError> {
        let bytes = self.file.page_count() * PAGE_BYTES as u64;
        if !self.is_intact() {
            return Ok((Some(self.damage(0, FormatError::HeaderChecksum)), bytes));
        }
        for number in 0..self.file.page_count() {
            match self.file.page(number) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    let at = number * PAGE_BYTES as u64;
                    return Ok((Some(self.damage(at, FormatError::BodyChecksum)), bytes));
                }
                Err(error) => return Err(IoError::new("reading", &self.path, error)),
            }
        }
        Ok((None, bytes))
    }

    /// Writes these very pages anew; durable when this returns.
    pub(crate) fn renew(&self, fs: &dyn Fs, layout: &Layout) -> Result<(), ReadError> {
        self.copy_to(fs, layout, u64::MAX)
    }

    /// Writes them into the directory of a copy of the journal that ends at `end_offset`; durable when this
    /// returns. What lies behind that is no part of the copy, and isn't missed there.
    pub(crate) fn copy_to(
        &self,
        fs: &dyn Fs,
        layout: &Layout,
        end_offset: u64,
    ) -> Result<(), ReadError> {
        let path = &self.path;
        let mut damaged = None;
        replace(fs, layout, |file| {
            for number in 0..self.file.page_count() {
                let page = self.file.page_up_to(number, end_offset).map_err(|error| {
                    if error.kind() == io::ErrorKind::InvalidData {
                        damaged = Some(number * PAGE_BYTES as u64);
                    }
                    IoError::new("reading", path, error)
                })?;
                put(file, layout, number, &page)?;
            }
            Ok(())
        })
        .map_err(|error| match damaged {
            Some(at) => ReadError::Corruption(self.damage(at, FormatError::BodyChecksum)),
            None => error.into(),
        })
    }
}

const HEADERS_BYTES: u64 = 2 * PAGE_BYTES as u64;

/// A row of heads, sorted.
pub(crate) type Heads<'a> = Box<dyn Iterator<Item = io::Result<Head>> + 'a>;

/// What a new base is made of: the one before it, and the segments that are to be removed.
pub(crate) struct Sources<'a> {
    pub(crate) old: Option<&'a Base>,
    /// Where the newly removed segments begin, in order.
    pub(crate) boundaries: Vec<Boundary>,
    /// Their heads, asked for anew each time; the oldest segment first.
    pub(crate) heads: &'a dyn Fn() -> Result<Vec<Heads<'a>>, ReadError>,
}

impl<'a> Sources<'a> {
    fn heads(&self) -> Result<Merged<Heads<'a>>, ReadError> {
        let mut rows = (self.heads)()?;
        if let Some(old) = self.old {
            rows.insert(0, Box::new(HeadRow::new(|first, max| old.file.heads(first, max))));
        }
        Ok(Merged::new(rows))
    }

    /// Writes the base at `start`, durably and at once. Needs memory for a page of each source.
    pub(crate) fn write(
        &self,
        fs: &dyn Fs,
        layout: &Layout,
        start: &Start,
        written_at_us: i64,
    ) -> Result<Arc<Base>, ReadError> {
        let path = layout.file(layout::BASE);
        let mut header = BaseHeader {
            start: start.checkpoint,
            first_segment: start.segment,
            durable_offset: start.proven,
            written_at_us,
            boundaries: self.boundaries.len() as u64,
            streams: 0,
            name_bytes: 0,
        };
        header.boundaries += self.old.map_or(0, |old| old.header().boundaries);
        for head in self.heads()? {
            let head = head.context("reading heads for", &path)?;
            header.streams += 1;
            header.name_bytes += head.name.len() as u64;
        }
        let heads = self.heads()?;
        replace(fs, layout, |file| {
            let mut failure = None;
            let written =
                base::write(&header, self.all_boundaries(), heads, &mut |number, page| {
                    put(file, layout, number, page).map_err(|error| {
                        failure = Some(error);
                        io::Error::from(io::ErrorKind::Other)
                    })
                });
            written.map_err(|error| {
                failure.take().unwrap_or_else(|| IoError::new("reading heads for", &path, error))
            })
        })?;
        // What is read back is what the next opening will find.
        let again =
            Base::read(fs, layout, start.checkpoint.journal).map_err(|error| match error {
                OpenError::Corruption(corruption) => ReadError::Corruption(corruption),
                OpenError::Io(error) => ReadError::Io(error),
                _ => IoError::new("reading back", &path, io::ErrorKind::InvalidData.into()).into(),
            })?;
        let gone = || IoError::new("reading back", &path, io::ErrorKind::NotFound.into());
        Ok(again.ok_or_else(gone)?)
    }

    fn all_boundaries(&self) -> impl Iterator<Item = io::Result<Boundary>> {
        let old = self.old.into_iter().flat_map(|old| old.file.boundaries());
        old.chain(self.boundaries.iter().map(|boundary| Ok(*boundary)))
    }
}

fn put(
    file: &dyn File,
    layout: &Layout,
    number: u64,
    page: &[u8; PAGE_BYTES],
) -> Result<(), IoError> {
    let at = number.saturating_mul(PAGE_BYTES as u64);
    fs::write_all_at(file, page, at).context("writing", &layout.new_file(layout::BASE))
}

/// Puts a new `base` in the place of the old one: the contents are durable before it has the name, and the
/// name is when this returns.
fn replace(
    fs: &dyn Fs,
    layout: &Layout,
    write: impl FnOnce(&dyn File) -> Result<(), IoError>,
) -> Result<(), IoError> {
    let (new, path) = (layout.new_file(layout::BASE), layout.file(layout::BASE));
    drop(fs.remove(&new));
    let file = fs.open(&new, OpenMode::CreateNew).context("creating", &new)?;
    let made = write(&*file).and_then(|()| match planted::is(Bug::UnlinkBeforeBase) {
        true => Ok(()),
        false => file.sync_data().context("syncing", &new),
    });
    if let Err(error) = made {
        drop(fs.remove(&new)); // it may have taken the last space
        return Err(error);
    }
    fs.rename(&new, &path).context("renaming", &new)?;
    if planted::is(Bug::UnlinkBeforeBase) {
        return Ok(());
    }
    fs.sync_dir(&layout.dir).context("syncing", &layout.dir)
}

/// Removes segments below a durable base, with their sidecars: the lowest first, so that what a crash leaves
/// continues what is retained.
pub(crate) fn remove_segments(
    fs: &dyn Fs,
    layout: &Layout,
    numbers: impl Iterator<Item = u64>,
) -> Result<(), IoError> {
    let mut removed = false;
    for number in numbers {
        for path in [layout.segment(number), layout.sidecar(number), layout.labels(number)] {
            match fs.remove(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.context("removing", &path)?,
            }
        }
        removed = true;
    }
    if removed {
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    }
    Ok(())
}
