//! Reading a segment file batch by batch: what recovery, cursors and index rebuilds have in common.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{IoContext, IoError};
use crate::format::FormatError;
use crate::format::batch::{
    BATCH_ALIGNMENT, BATCH_HEADER_BYTES_MAX, BATCH_MAGIC, BatchHeader, BatchRef,
};
use crate::format::files::{MARK_MAGIC, MARK_SLOT_BYTES, Mark, Role};
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::fs::{self, File, Fs, OpenMode};

/// How much is read at a time, at the most.
const CHUNK_BYTES: usize = 256 * 1024;
/// How much is read first: who asks for one batch shouldn't pay for many.
const FIRST_CHUNK_BYTES: usize = 16 * 1024;

/// The file offset of the journal offset `offset` in the segment that begins at `base_offset`.
pub(crate) const fn file_offset(base_offset: u64, offset: u64) -> u64 {
    (HEADER_PAGE_BYTES as u64).saturating_add(offset.saturating_sub(base_offset))
}

/// Opens a file for reading; `None` if there is none.
pub(crate) fn open_if_there(fs: &dyn Fs, path: &Path) -> Result<Option<Arc<dyn File>>, IoError> {
    match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        opened => opened.context("opening", path).map(Some),
    }
}

/// The header page of a segment, and whether it was lost: it is all zeros, and something follows.
pub(crate) fn header_page(
    file: &Arc<dyn File>,
    path: &Path,
) -> Result<([u8; HEADER_PAGE_BYTES], bool), IoError> {
    let zeros = [0; HEADER_PAGE_BYTES];
    let read = || {
        let mut page = zeros;
        fs::read_full_at(&**file, &mut page, 0).context("reading", path).map(|_| page)
    };
    let page = read()?;
    let mut window = Window::new(Arc::clone(file), path.to_owned());
    if page != zeros || window.last_non_zero(HEADER_PAGE_BYTES as u64)?.is_none() {
        return Ok((page, false));
    }
    // A live writer may just have taken the spare. It writes the header first.
    let page = read()?;
    Ok((page, page == zeros))
}

/// How far the journal had been durable, by what was found.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Claims {
    pub(crate) durable_offset: u64,
    /// The mark that says so, if it is one that has gone astray.
    pub(crate) mark: Option<Mark>,
}

/// What can be told from the bytes at a place.
enum Place {
    Batch(BatchHeader),
    Mark(Mark),
}

/// A moving window over a file: keeps what was read last.
#[derive(Debug)]
pub(crate) struct Window {
    file: Arc<dyn File>,
    path: PathBuf,
    start: u64,
    data: Vec<u8>,
    /// Once set, what the file holds is no continuation of what was read before.
    retired: Option<Arc<AtomicBool>>,
}

/// The answer to whoever reads on in a history that was set aside.
pub(crate) fn retired() -> std::io::Error {
    let why = "this history was set aside; what is in its place is read through a journal that was opened since";
    std::io::Error::new(ErrorKind::StaleNetworkFileHandle, why)
}

impl Window {
    pub(crate) fn new(file: Arc<dyn File>, path: PathBuf) -> Self {
        Self { file, path, start: 0, data: Vec::new(), retired: None }
    }

    /// The same, until `retired` is set.
    pub(crate) fn until(retired: Arc<AtomicBool>, file: Arc<dyn File>, path: PathBuf) -> Self {
        Self { retired: Some(retired), ..Self::new(file, path) }
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// How much memory it takes.
    #[cfg(feature = "shipping")]
    pub(crate) fn held_bytes(&self) -> usize {
        self.data.capacity()
    }

    /// Up to `len` bytes at `at`; fewer only at `limit` or the end of the file. Never reads at or behind
    /// `limit`: what lies there may be changing.
    pub(crate) fn read(&mut self, at: u64, len: usize, limit: u64) -> Result<&[u8], IoError> {
        let len = usize::try_from(limit.saturating_sub(at)).map_or(len, |room| len.min(room));
        let in_window = at >= self.start
            && at.saturating_add(len as u64) <= self.start + self.data.len() as u64;
        if !in_window {
            let room = usize::try_from(limit.saturating_sub(at)).unwrap_or(usize::MAX);
            let chunk = (2 * self.data.len()).clamp(FIRST_CHUNK_BYTES, CHUNK_BYTES);
            self.data.resize(len.max(chunk).min(room), 0);
            let read = fs::read_full_at(&*self.file, &mut self.data, at);
            // Asked behind the reading: before the files are changed, it is set.
            let is_retired = |it: &Arc<AtomicBool>| it.load(Ordering::SeqCst);
            let read =
                if self.retired.as_ref().is_some_and(is_retired) { Err(retired()) } else { read };
            match read.context("reading", &self.path) {
                Ok(read) => self.data.truncate(read),
                Err(error) => {
                    self.data.clear();
                    return Err(error);
                }
            }
            self.start = at;
        }
        let from = (at - self.start) as usize;
        let to = (from + len).min(self.data.len());
        Ok(self.data.get(from..to).unwrap_or_default())
    }

    /// The whole, verified batch at `at`, in front of `limit`; what is there instead otherwise.
    pub(crate) fn batch(
        &mut self,
        at: u64,
        limit: u64,
        salt: u64,
    ) -> Result<Result<BatchRef<'_>, FormatError>, IoError> {
        let header = match BatchHeader::decode(self.read(at, BATCH_HEADER_BYTES_MAX, limit)?, salt)
        {
            Ok(header) => header,
            Err(error) => return Ok(Err(error)),
        };
        let bytes = self.read(at, header.padded_len as usize, limit)?;
        Ok(BatchRef::decode(bytes, salt))
    }

    /// The header of the batch at `at`, without verifying its body.
    pub(crate) fn batch_header(
        &mut self,
        at: u64,
        limit: u64,
        salt: u64,
    ) -> Result<Result<BatchHeader, FormatError>, IoError> {
        Ok(BatchHeader::decode(self.read(at, BATCH_HEADER_BYTES_MAX, limit)?, salt))
    }

    /// Calls `found` with every valid batch header from file offset `at` on that lies at its own offset:
    /// resynchronises behind damage.
    pub(crate) fn headers_behind(
        &mut self,
        at: u64,
        page: &SegmentPage,
        mut found: impl FnMut(&BatchHeader),
    ) -> Result<(), IoError> {
        self.walk_behind(at, page, |place| {
            if let Place::Batch(header) = place {
                found(&header);
            }
        })
    }

    /// What tells, from file offset `at` on, how far the journal had been durable: in an origin headers of batches (in a
    /// mirror they speak of the origin's disk), and marks.
    ///
    /// A mark doesn't belong there: its write has gone astray. If it has hit the last batch, nothing else says that this
    /// was durable. By the salt it is told from a payload that looks like a mark.
    pub(crate) fn claims_behind(
        &mut self,
        at: u64,
        page: &SegmentPage,
        role: Role,
        mut found: impl FnMut(&BatchHeader),
    ) -> Result<Claims, IoError> {
        let mut claims = Claims::default();
        self.walk_behind(at, page, |place| match place {
            Place::Batch(header) => {
                found(&header);
                if role.appends() {
                    claims.durable_offset = claims.durable_offset.max(header.durable_offset);
                }
            }
            Place::Mark(mark) => {
                let header = &page.header;
                let is_ours = mark.end.journal == header.journal && mark.salt == header.salt as u32;
                if is_ours && mark.end.offset > claims.mark.map_or(0, |mark| mark.end.offset) {
                    claims.durable_offset = claims.durable_offset.max(mark.end.offset);
                    claims.mark = Some(mark);
                }
            }
        })?;
        Ok(claims)
    }

    fn walk_behind(
        &mut self,
        mut at: u64,
        page: &SegmentPage,
        mut found: impl FnMut(Place),
    ) -> Result<(), IoError> {
        let base = page.header.base_offset;
        loop {
            let bytes = self.read(at, BATCH_MAGIC.len(), u64::MAX)?;
            if bytes.len() < BATCH_MAGIC.len() {
                return Ok(());
            }
            if bytes == BATCH_MAGIC {
                if let Ok(header) = self.batch_header(at, u64::MAX, page.header.salt)?
                    && file_offset(base, header.offset) == at
                    && header.offset >= base
                {
                    found(Place::Batch(header));
                }
            } else if MARK_MAGIC.starts_with(bytes)
                && let Ok(mark) = Mark::decode(self.read(at, MARK_SLOT_BYTES, u64::MAX)?)
            {
                found(Place::Mark(mark));
            }
            at += BATCH_ALIGNMENT;
        }
    }

    /// The file offset behind the last byte that isn't zero, at or behind `at`; `None` if all are zero.
    pub(crate) fn last_non_zero(&mut self, mut at: u64) -> Result<Option<u64>, IoError> {
        let mut last = None;
        loop {
            let bytes = self.read(at, FIRST_CHUNK_BYTES, u64::MAX)?;
            if bytes.is_empty() {
                return Ok(last);
            }
            if let Some(index) = bytes.iter().rposition(|&byte| byte != 0) {
                last = Some(at + index as u64 + 1);
            }
            at += bytes.len() as u64;
        }
    }
}
