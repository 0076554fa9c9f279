//! Accepted losses, and how readers of batches go on behind them.
//!
//! ```text
//!   batches ─▶ from │ lost for good │ to ─▶ batches      offsets and positions count on, as if nothing were missing
//! ```
//! A gap begins at the end of a verified batch and ends where a verified batch begins, at the beginning of
//! a segment, or at the journal's end. The segment that *holds* its end is the last one that begins at or in
//! front of it; segments between the two are no part of the journal any more.

use std::collections::HashSet;
use std::ops::Range;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError, ReadError};
use crate::format::FormatError;
use crate::format::batch::{BatchRef, Link};
use crate::format::files::{Node, Role};
use crate::format::gaps::{self, Gap, GapChain};
use crate::format::sidecar::{Posting, SegmentIndex};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::layout::{self, Layout};
use crate::position::{Chain, Checkpoint, JournalId, Position};

/// No `gaps` file is longer than this: far more than anybody would accept.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The gaps of a journal, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gaps(Vec<Gap>);

/// A place at which a batch must follow: a link, of which behind a gap the chain may not be known, but that
/// at the end of the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joint {
    pub(crate) link: Link,
    pub(crate) behind: Option<Chain>,
}

impl From<Link> for Joint {
    fn from(link: Link) -> Self {
        Self { link, behind: None }
    }
}

impl Joint {
    /// Where the journal goes on behind `gap`.
    pub(crate) fn behind(gap: &Gap) -> Self {
        let (chain, behind) = match gap.chain {
            GapChain::AtEnd(chain) => (chain, None),
            GapChain::Behind(chain) => (Chain::default(), Some(chain)),
        };
        Self { link: Link { offset: gap.to_offset, position: gap.to_position, chain }, behind }
    }

    /// Whether `batch` is the one that belongs here.
    pub(crate) fn is_continued_by(&self, batch: &BatchRef<'_>, segment: Option<&[u8; 32]>) -> bool {
        match self.behind {
            None => batch.continues(&self.link, segment),
            Some(chain) => {
                batch.header.offset == self.link.offset
                    && batch.header.base_position == self.link.position
                    && batch.header.chain == chain
            }
        }
    }
}

/// The checkpoint at the end of a gap; `None` if the chain there is lost.
pub(crate) fn end_of(gap: &Gap, journal: JournalId) -> Option<Checkpoint> {
    let GapChain::AtEnd(chain) = gap.chain else { return None };
    Some(Checkpoint {
        journal,
        epoch: gap.epoch,
        incarnation: gap.incarnation,
        offset: gap.to_offset,
        position: gap.to_position,
        chain,
    })
}

/// The error of a reader that comes to a gap.
pub(crate) fn error(gap: &Gap) -> ReadError {
    ReadError::Gap { from: gap.from.position, to: gap.to_position }
}

impl Gaps {
    /// Reads the `gaps` file; none if there is none.
    pub(crate) fn read(fs: &dyn Fs, layout: &Layout, node: &Node) -> Result<Self, OpenError> {
        let path = layout.file(layout::GAPS);
        let file = match fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(IoError::new("opening", &path, error).into()),
        };
        let len = file.size().context("measuring", &path)?.min(FILE_BYTES_MAX);
        let mut bytes = vec![0; len as usize];
        let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
        bytes.truncate(read);
        let gaps = match gaps::decode(&bytes, node.journal) {
            Ok(_) if node.role == Role::Mirror => Err(FormatError::Invalid("gaps of a mirror")),
            decoded => decoded,
        };
        match gaps {
            Ok(gaps) => Ok(Self(gaps)),
            Err(source @ FormatError::Unsupported { .. }) => {
                Err(OpenError::Unsupported { path, source })
            }
            Err(error) => Err(OpenError::Corruption(Corruption {
                path,
                file_offset: 0,
                position: Position::START,
                kind: CorruptionKind::Gaps(error),
            })),
        }
    }

    /// Writes the file, durably and at once; removes it if there is no gap.
    pub(crate) fn write(
        &self,
        fs: &dyn Fs,
        layout: &Layout,
        journal: JournalId,
    ) -> Result<(), IoError> {
        if !self.0.is_empty() {
            return layout.replace(fs, layout::GAPS, &gaps::encode(journal, &self.0));
        }
        let path = layout.file(layout::GAPS);
        drop(fs.remove(&layout.new_file(layout::GAPS)));
        fs.remove(&path).context("removing", &path)?;
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)
    }

    pub(crate) fn all(&self) -> &[Gap] {
        &self.0
    }

    pub(crate) fn insert(&mut self, gap: Gap) {
        self.0.push(gap);
        self.0.sort_by_key(|gap| gap.from.offset);
    }

    pub(crate) fn remove(&mut self, from_offset: u64) {
        self.0.retain(|gap| gap.from.offset != from_offset);
    }

    /// The end of the last gap.
    pub(crate) fn end_offset(&self) -> u64 {
        self.0.last().map_or(0, |gap| gap.to_offset)
    }

    /// The gap that holds the batch at `offset`.
    pub(crate) fn at_offset(&self, offset: u64) -> Option<&Gap> {
        self.0.iter().find(|gap| (gap.from.offset..gap.to_offset).contains(&offset))
    }

    /// The gap that holds the event at `position`.
    pub(crate) fn at_position(&self, position: Position) -> Option<&Gap> {
        self.0.iter().find(|gap| (gap.from.position..gap.to_position).contains(&position))
    }

    /// The gap that begins or lies at `link`, if it is of the same history.
    pub(crate) fn at(&self, link: &Link) -> Option<&Gap> {
        self.at_offset(link.offset)
            .filter(|gap| gap.from.offset != link.offset || gap.from == *link)
    }

    /// The last gap that ends at or in front of `position`.
    pub(crate) fn in_front_of(&self, position: Position) -> Option<&Gap> {
        self.0.iter().rfind(|gap| gap.to_position <= position)
    }

    /// The first gap that begins behind `position`.
    pub(crate) fn behind(&self, position: Position) -> Option<&Gap> {
        self.0.iter().find(|gap| gap.from.position > position)
    }

    /// Whether a gap begins, lies or ends within these offsets.
    pub(crate) fn touch(&self, offsets: Range<u64>) -> bool {
        self.0.iter().any(|gap| gap.from.offset < offsets.end && gap.to_offset > offsets.start)
    }
}

/// Notes in the index of the segment that holds both sides of `gap` that events are missing: ids go by
/// position.
pub(crate) fn skip(index: &mut SegmentIndex, gap: &Gap) {
    let held = index.ids.len() as u64;
    if held > 0 {
        index.ids.resize((held + gap.events()) as usize, 0);
    }
}

/// Before a batch behind `gap` is added to the index: postings of a stream go by revision, so those of its
/// lost events are made to point at the gap.
pub(crate) fn bridge(index: &mut SegmentIndex, gap: &Gap, batch: &BatchRef<'_>) {
    let lost = Posting { position: gap.from.position, batch_offset: gap.from.offset };
    let mut seen = HashSet::new();
    for record in batch.records().map_while(Result::ok) {
        if !seen.insert(record.stream) {
            continue;
        }
        let Some(known) = index.streams.get_mut(record.stream) else { continue };
        let missing = record.revision.get().saturating_sub(known.last_revision().get() + 1);
        // More of them than events are missing is not the gap's doing.
        if missing <= gap.events() {
            known.postings.extend(std::iter::repeat_n(lost, missing as usize));
        }
    }
}
