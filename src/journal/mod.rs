//! The journal: the only thing that can't be rebuilt.
//!
//! ```text
//!   Appender ──▶┐                               ┌──▶ Cursor ──▶ views, shipping, iterators
//!               ├─ segments ─ sync ─ durable end ┤
//!   Ingest   ──▶┘   (the one writer)            └──▶ Watch: a number to wait for
//! ```
//! Opening a journal as origin gives an [`Appender`], as mirror an [`Ingest`]; both own a [`Journal`], the
//! reading side, which is cheap to clone and all that followers ever see.
//!
//! Invariants:
//! - Nothing at or behind the durable end is ever read by a follower; the end moves only after a sync.
//! - Reading never mutates. Only recovery, at open, may cut anything, and only what can't have been
//!   acknowledged; only [retention](crate::retention), when it is ordered, removes whole segments.
//! - One writer: a lock on the directory. Readers of other processes take none.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::error::{IoContext, IoError, OpenError, ReadError};
use crate::event::{Revision, StreamId};
use crate::format::files::{NODE_BYTES, Node, Role};
use crate::format::sidecar::{Posting, SegmentIndex, SparseEntry};
use crate::fs::{self, Fs, Lock, OpenMode};
use crate::journal::base::{Base, Start};
use crate::journal::cursor::Place;
use crate::journal::gaps::Gaps;
use crate::journal::layout::Layout;
use crate::journal::maps::{Maps, Order};
use crate::journal::recent::Recent;
use crate::journal::recovery::{Recovered, Survey};
use crate::journal::scan::file_offset;
use crate::journal::segments::{Access, Files, Sealed, Segment, Span, Wanted};
#[cfg(feature = "shipping")]
pub(crate) use crate::journal::watch::Bell;
use crate::journal::watch::Watch;
use crate::position::{Chain, Checkpoint, Incarnation, JournalId, NodeId, Position, Token};
use crate::sync::RwLock;

#[cfg(feature = "shipping")]
mod acks;
mod appender;
#[cfg(all(feature = "shipping", feature = "views"))]
mod applied;
mod backup;
mod backward;
mod base;
pub(crate) mod condition;
mod copy;
mod cursor;
mod gaps;
mod ingest;
mod keeper;
mod labels;
pub(crate) mod layout;
pub(crate) mod leases;
mod maps;
mod mark;
mod order;
pub(crate) mod orphans;
pub(crate) mod query;
mod read;
mod recent;
mod recovery;
pub mod repair;
mod restore;
pub(crate) mod retention;
mod scan;
mod segments;
mod spare;
mod verify;
mod wait;
mod watch;
mod writer;

#[cfg(feature = "shipping")]
pub(crate) use acks::AckKeeper;
#[cfg(feature = "shipping")]
pub use acks::Mirrored;
pub use appender::{Append, Appended, Appender, CloseError, Placed, Receipt, Ticket, ViewBehind};
#[cfg(all(feature = "shipping", feature = "views"))]
pub(crate) use applied::Applier;
pub use backup::{BackupError, BackupReport};
pub use backward::{EventsBackward, StreamEventsBackward};
#[cfg(feature = "shipping")]
pub(crate) use copy::Watched;
pub use cursor::{Cursor, CursorBatch};
pub use ingest::Ingest;
pub use orphans::{Orphans, SetAsideError};
pub use query::{Query, QueryEvents, QueryItem};
pub use read::{Events, Item, StreamEvents, Subscription};
pub use recovery::RecoveryReport;
pub use restore::{RestoreError, RestoreReport, abandon_restore, restore};
#[cfg(feature = "shipping")]
pub(crate) use restore::{begin_mirror, is_begun};
pub use verify::{
    Damage, DamageKind, SegmentCheck, SegmentState, VerifyProgress, VerifyReport, verify,
    verify_deep,
};
pub use wait::TokenError;

/// How often a reader beside a writer looks again before it reports damage.
const SURVEYS_MAX: usize = 2;

/// How often a reader begins again because segments were removed meanwhile.
const RETENTIONS_MAX: usize = 8;

/// How many streams' last revisions are remembered.
const HEADS_MAX: usize = 64 * 1024;

/// The reading side of a journal, own or mirrored. Cheap to clone.
#[derive(Clone)]
pub struct Journal(Arc<Shared>);

/// Only what tells it apart: all that it holds would fill a screen, or a disk.
impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Journal");
        shown.field("id", &self.id()).field("dir", &self.dir()).field("end", &self.end());
        shown.finish()
    }
}

#[derive(Debug)]
struct Shared {
    node: Node,
    layout: Layout,
    files: Arc<Files>,
    watch: Watch,
    segments: RwLock<Segments>,
    maps: Maps,
    access: Access,
    /// Held while the labels of a segment are laid out.
    labelling: Mutex<()>,
    /// Position of the first event that is retained.
    first: AtomicU64,
    /// Held while segments are removed; the writer isn't closed meanwhile.
    retention: Mutex<()>,
    leases: leases::Known,
    #[cfg(feature = "shipping")]
    acks: acks::Acks,
    #[cfg(all(feature = "shipping", feature = "views"))]
    appliers: applied::Appliers,
    /// What is known of an origin that has another history.
    fork: Mutex<Option<Fork>>,
    /// Where tails that were set aside end, of those that were asked for.
    #[cfg(any(feature = "views", feature = "shipping"))]
    tails: Mutex<std::collections::HashMap<PathBuf, Position>>,
    /// Last revisions of streams in sealed segments.
    heads: quick_cache::sync::Cache<StreamId, Revision>,
}

/// All segments; the last one is active, the others are sealed.
#[derive(Debug, Default)]
struct Segments {
    all: Vec<Arc<Segment>>,
    /// What is known of those that retention has removed.
    base: Option<Arc<Base>>,
    /// The index of the active segment's durable batches.
    active: SegmentIndex,
    /// The batches that were published last.
    recent: Recent,
}

impl Segments {
    /// The numbers between which all sealed segments lie.
    fn sealed_numbers(&self) -> std::ops::Range<u64> {
        let first = self.all.first().map_or(0, |segment| segment.number());
        let end = match self.all.last() {
            Some(last) if last.sealed.is_some() => last.number() + 1,
            Some(active) => active.number(),
            None => 0,
        };
        first..end
    }
}

/// How a checkpoint relates to a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// It is the end of a batch of this history (or its beginning).
    Equal,
    /// This journal holds another history at that place.
    Differs,
    /// It lies behind the durable end: not known here (yet).
    Ahead,
    /// It is of another journal.
    Foreign,
}

/// The history of a mirror and that of its origin part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fork {
    /// Up to here both have the same events; what lies behind is orphaned. `None` if that isn't known.
    pub common: Option<Position>,
}

/// How a token relates to a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenState {
    /// The batch is durable here.
    Present,
    /// The batch is not (yet) here.
    Pending,
    /// The events were lost: another batch is in their place, because the journal was restored, or none.
    Lost,
    /// The token is of another journal.
    Foreign,
}

impl Journal {
    fn new(
        fs: &Arc<dyn Fs>,
        layout: &Layout,
        node: Node,
        recovered: &Recovered,
        recent_bytes_max: usize,
    ) -> Result<Self, OpenError> {
        let (kept, gaps) = (&recovered.kept, recovered.gaps.clone());
        let contents = Contents { kept, gaps, base: recovered.base.clone(), end: recovered.end };
        let journal = Self::assemble(fs, layout, node, contents, Access::Writer)?;
        journal.0.segments.write().recent = Recent::new(recent_bytes_max);
        Ok(journal)
    }

    fn assemble(
        fs: &Arc<dyn Fs>,
        layout: &Layout,
        node: Node,
        contents: Contents<'_>,
        access: Access,
    ) -> Result<Self, OpenError> {
        let Contents { kept, gaps, base, end } = contents;
        let files = Files::new(Arc::clone(fs), layout.clone(), gaps);
        let mut segments = Segments { base, ..Segments::default() };
        let last = kept.len().saturating_sub(1);
        for (number, kept) in kept.iter().enumerate() {
            let sealed = match &kept.index {
                Some(index) if number == last => {
                    segments.active = SegmentIndex::clone(index);
                    None
                }
                index => Some(Sealed::open(&files, &kept.page, kept.end, index.clone(), access)?),
            };
            segments.all.push(Arc::new(Segment { page: kept.page.clone(), sealed }));
        }
        let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
        let journal = Self(Arc::new(Shared {
            node,
            layout: layout.clone(),
            files,
            watch: Watch::new(end),
            first: AtomicU64::new(
                Start::of(segments.base.as_ref(), node.journal).checkpoint.position.get(),
            ),
            retention: Mutex::new(()),
            leases: leases::Known::default(),
            #[cfg(feature = "shipping")]
            acks: acks::Acks::default(),
            #[cfg(all(feature = "shipping", feature = "views"))]
            appliers: applied::Appliers::default(),
            fork: Mutex::default(),
            #[cfg(any(feature = "views", feature = "shipping"))]
            tails: Mutex::default(),
            segments: RwLock::new(segments),
            maps: Maps::named(&names),
            access,
            labelling: Mutex::new(()),
            heads: quick_cache::sync::Cache::new(HEADS_MAX),
        }));
        if access == Access::Writer {
            journal.map_missing();
        }
        Ok(journal)
    }

    /// Opens a journal for reading only, without taking its lock: also one that another process is writing.
    ///
    /// What it shows ends where the data is known to be durable; it doesn't move. Nothing is changed on
    /// disk. Damaged or lost data is reported next to the journal, which ends in front of it.
    ///
    /// # Errors
    /// [`OpenError`] if there is no journal, or it was written by a later version, or can't be read.
    pub fn open_read_only(
        fs: &Arc<dyn Fs>,
        dir: &Path,
    ) -> Result<(Self, Option<crate::error::Corruption>), OpenError> {
        let (journal, corruption, _) = Self::open_up_to(fs, dir, true)?;
        Ok((journal, corruption))
    }

    /// The same, with what is valid but not proven to be durable if `proven_only` is not set; and how far it is
    /// proven.
    fn open_up_to(
        fs: &Arc<dyn Fs>,
        dir: &Path,
        proven_only: bool,
    ) -> Result<(Self, Option<crate::error::Corruption>, u64), OpenError> {
        let layout = Layout::new(dir);
        let own = read_node(&**fs, &layout)?;
        let node = match own {
            Some(node) => node,
            None => recovery::node_of_copy(&**fs, &layout)?,
        };
        let (mut survey, corruption) = survey_beside_writer(&**fs, &layout, &node)?;
        let proven = survey.proven;
        // A copy holds only what had been durable where it comes from; nobody is writing it.
        if proven_only && own.is_some() {
            survey.cut_to_proven(&**fs, &layout)?;
        }
        let Survey { kept, gaps, base, end, .. } = survey;
        let contents = Contents { kept: &kept, gaps, base, end };
        let journal = Self::assemble(fs, &layout, node, contents, Access::ReadOnly)?;
        Ok((journal, corruption, proven))
    }

    /// The journal's id: the same in its origin and all its mirrors.
    #[must_use]
    pub fn id(&self) -> JournalId {
        self.0.node.journal
    }

    /// The id of this directory.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.0.node.node
    }

    /// Origin or mirror.
    #[must_use]
    pub fn role(&self) -> Role {
        self.0.node.role
    }

    /// Whether this process is the one that writes it, and so knows where it ends.
    #[cfg(feature = "views")]
    pub(crate) fn is_written_here(&self) -> bool {
        self.0.access == Access::Writer
    }

    /// The journal's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.layout.dir
    }

    /// The durable end: everything in front of it survives a crash; nothing behind it is shown to anybody.
    #[must_use]
    pub fn end(&self) -> Checkpoint {
        self.0.watch.end()
    }

    /// Where the journal begins: at position 0, or behind the events that
    /// [retention](crate::retention) has removed.
    #[must_use]
    pub fn start(&self) -> Checkpoint {
        self.retained().checkpoint
    }

    fn retained(&self) -> Start {
        Start::of(self.0.segments.read().base.as_ref(), self.id())
    }

    fn base(&self) -> Option<Arc<Base>> {
        self.0.segments.read().base.clone()
    }

    /// Refuses a place whose events were removed.
    fn check_retained(&self, position: Position) -> Result<(), ReadError> {
        let first = Position::new(self.0.first.load(Ordering::Acquire));
        if position < first { Err(ReadError::Truncated { first }) } else { Ok(()) }
    }

    /// A failure to read at `position`: perhaps the segment there was removed meanwhile, if not by this
    /// process, then by another one.
    fn or_truncated(&self, position: Position, error: ReadError) -> ReadError {
        let gone = |error: &IoError| error.source.kind() == std::io::ErrorKind::NotFound;
        match &error {
            ReadError::Io(source) if gone(source) => {
                let fs = self.0.files.fs();
                let on_disk = Base::read(&**fs, &self.0.layout, self.id()).ok().flatten();
                let first = Start::of(on_disk.as_ref(), self.id()).checkpoint.position;
                let first = first.max(self.start().position);
                if position < first { ReadError::Truncated { first } } else { error }
            }
            _ => error,
        }
    }

    /// Whether both are handles of the same opening.
    #[cfg(feature = "shipping")]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Blocks until the durable end lies behind `position`, or the journal is closed, or the time is up.
    /// Returns the durable end as it is then.
    #[must_use]
    pub fn wait_past(&self, position: Position, timeout: Duration) -> Checkpoint {
        self.0.watch.wait_past(position, timeout)
    }

    /// Rings once, as soon as the durable end lies behind `position`, or the journal is closed: perhaps at once.
    #[cfg(feature = "shipping")]
    pub(crate) fn ring_past(&self, position: Position, bell: std::sync::Weak<dyn Bell>) {
        self.0.watch.ring_past(position, bell);
    }

    /// Whether the end won't move any more: the store was closed, or its writer failed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.watch.is_closed()
    }

    /// Every segment's number and length in bytes of batches, for tools.
    #[must_use]
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let end = self.end();
        let segments = self.0.segments.read();
        let info = |segment: &Arc<Segment>| {
            let sealed = segment.sealed.as_ref().map(|sealed| sealed.end);
            let (end_offset, end_position) =
                sealed.map_or((end.offset, end.position), |link| (link.offset, link.position));
            SegmentInfo {
                number: segment.number(),
                path: self.0.layout.segment(segment.number()),
                sealed: sealed.is_some(),
                base_position: segment.base_position(),
                end_position,
                base_offset: segment.base_offset(),
                end_offset,
            }
        };
        segments.all.iter().map(info).collect()
    }

    fn segment_holding(&self, position: Position) -> Option<Arc<Segment>> {
        let segments = self.0.segments.read();
        let behind = segments.all.partition_point(|segment| segment.base_position() <= position);
        segments.all.get(behind.checked_sub(1)?).cloned()
    }

    /// A batch at or in front of the one that holds `position`, from the index.
    fn seek(&self, segment: &Segment, position: Position) -> Result<SparseEntry, ReadError> {
        let start = SparseEntry {
            position: segment.base_position(),
            offset: segment.base_offset(),
            time_us: 0,
        };
        match &segment.sealed {
            Some(sealed) => {
                let entry = sealed.seek(&self.0.files, &segment.page, position);
                entry.map_err(|error| self.or_truncated(segment.base_position(), error))
            }
            None => {
                let segments = self.0.segments.read();
                Ok(segments::seek(&segments.active, position)
                    .filter(|entry| entry.position >= start.position && entry.position <= position)
                    .unwrap_or(start))
            }
        }
    }

    /// The header of the batch that holds the event at `position`, which lies in front of the durable end.
    fn header_holding(
        &self,
        position: Position,
    ) -> Result<Option<crate::format::batch::BatchHeader>, ReadError> {
        let end = self.end();
        self.check_retained(position)?;
        if let Some(gap) = self.gaps().at_position(position) {
            return Err(gaps::error(gap));
        }
        self.find_header(position, end).map_err(|error| self.or_truncated(position, error))
    }

    /// When the event at `position` was recorded, in microseconds since 1970 by the origin's clock; `None` if it isn't
    /// here, or can't be read. Blocks for the disk.
    #[cfg(feature = "shipping")]
    pub(crate) fn recorded_at_us(&self, position: Position) -> Option<i64> {
        self.header_holding(position).ok().flatten().map(|header| header.time_us)
    }

    fn find_header(
        &self,
        position: Position,
        end: Checkpoint,
    ) -> Result<Option<crate::format::batch::BatchHeader>, ReadError> {
        let Some(segment) = self.segment_holding(position).filter(|_| position < end.position)
        else {
            return Ok(None);
        };
        let mut entry = self.seek(&segment, position)?;
        let mut window = self.0.files.window(segment.number())?;
        let limit = file_offset(segment.base_offset(), self.limit(&segment, &end));
        loop {
            if let Some(gap) = self.gaps().at_offset(entry.offset) {
                (entry.offset, entry.position) = (gap.to_offset, gap.to_position);
            }
            let at = file_offset(segment.base_offset(), entry.offset);
            let header =
                window.batch_header(at, limit, segment.page.header.salt)?.map_err(|error| {
                    let path = self.0.layout.segment(segment.number());
                    segments::unreadable(path, at, entry.position, error)
                })?;
            if header.end_position() > position {
                return Ok(Some(header));
            }
            entry.offset = header.end_offset();
            entry.position = header.end_position();
        }
    }

    fn limit(&self, segment: &Segment, end: &Checkpoint) -> u64 {
        segment.sealed.as_ref().map_or(end.offset, |sealed| sealed.end.offset)
    }

    /// Whether a follower's checkpoint is a batch end of this history.
    ///
    /// # Errors
    /// [`ReadError`] if the journal can't be read there.
    pub fn compare(&self, checkpoint: &Checkpoint) -> Result<Comparison, ReadError> {
        if checkpoint.journal != self.id() {
            return Ok(Comparison::Foreign);
        }
        let end = self.end();
        if checkpoint.position > end.position || checkpoint.offset > end.offset {
            return Ok(Comparison::Ahead);
        }
        let Some(last) = checkpoint.position.get().checked_sub(1) else {
            let start = crate::format::files::Mark::start(self.id()).end;
            let same = checkpoint.offset == 0 && checkpoint.chain == start.chain;
            return Ok(if same { Comparison::Equal } else { Comparison::Differs });
        };
        let start = self.start();
        if checkpoint.position == start.position {
            let same = *checkpoint == start;
            return Ok(if same { Comparison::Equal } else { Comparison::Differs });
        }
        if let Some(at_gap) =
            self.compare_with_gap(checkpoint.offset, checkpoint.position, checkpoint.chain)
        {
            return at_gap;
        }
        let header = self.header_holding(Position::new(last))?;
        let same = header.is_some_and(|header| {
            header.end_position() == checkpoint.position
                && header.end_offset() == checkpoint.offset
                && header.chain == checkpoint.chain
                && header.incarnation == checkpoint.incarnation
                && header.epoch == checkpoint.epoch
        });
        Ok(if same { Comparison::Equal } else { Comparison::Differs })
    }

    /// Whether a place that another copy holds, of which only offset, position and chain are known, is a
    /// batch end of this history.
    ///
    /// # Errors
    /// [`ReadError`] if the journal can't be read there.
    pub fn compare_place(
        &self,
        offset: u64,
        position: Position,
        chain: Chain,
    ) -> Result<Comparison, ReadError> {
        let end = self.end();
        if position > end.position || offset > end.offset {
            return Ok(Comparison::Ahead);
        }
        let Some(last) = position.get().checked_sub(1) else { return Ok(Comparison::Equal) };
        let start = self.start();
        if position == start.position {
            let same = (offset, chain) == (start.offset, start.chain);
            return Ok(if same { Comparison::Equal } else { Comparison::Differs });
        }
        if let Some(at_gap) = self.compare_with_gap(offset, position, chain) {
            return at_gap;
        }
        let header = self.header_holding(Position::new(last))?;
        let same = header.is_some_and(|header| {
            header.end_position() == position
                && header.end_offset() == offset
                && header.chain == chain
        });
        Ok(if same { Comparison::Equal } else { Comparison::Differs })
    }

    /// The last batch end at or in front of `position`, or the durable end if that lies in front of it; `None` if
    /// it isn't known any more, because the events there were removed or lost.
    ///
    /// # Errors
    /// [`ReadError`] if the journal can't be read there.
    pub(crate) fn batch_end_at(&self, position: Position) -> Result<Option<Checkpoint>, ReadError> {
        let end = self.end();
        if position >= end.position {
            return Ok(Some(end));
        }
        match self.find_batch_end(position) {
            Err(ReadError::Truncated { .. } | ReadError::Gap { .. }) => Ok(None),
            found => found,
        }
    }

    fn find_batch_end(&self, position: Position) -> Result<Option<Checkpoint>, ReadError> {
        let start = self.start();
        let Some(last) = position.get().checked_sub(1) else {
            return Ok(Some(crate::format::files::Mark::start(self.id()).end));
        };
        if position == start.position {
            return Ok(Some(start));
        }
        match self.header_holding(Position::new(last))? {
            Some(header) if header.end_position() == position => {
                Ok(Some(writer::checkpoint_of(&header, self.id())))
            }
            // The batch holds `position`, too: what ends in front of it is meant.
            Some(header) => self.find_batch_end(header.base_position),
            None => Ok(None),
        }
    }

    /// Compares a place behind lost events: only the end of a gap is known, and not always.
    fn compare_with_gap(
        &self,
        offset: u64,
        position: Position,
        chain: Chain,
    ) -> Option<Result<Comparison, ReadError>> {
        let gap = self.gaps().at_position(Position::new(position.get().checked_sub(1)?))?;
        let end = gaps::end_of(gap, self.id()).filter(|end| end.position == position);
        let Some(end) = end else { return Some(Err(gaps::error(gap))) };
        let same = end.offset == offset && end.chain == chain;
        Some(Ok(if same { Comparison::Equal } else { Comparison::Differs }))
    }

    fn gaps(&self) -> &Gaps {
        self.0.files.gaps()
    }

    /// The positions of the events that were lost, and [accepted as lost](crate::repair), in order. Readers
    /// that come there are answered [`ReadError::Gap`].
    #[must_use]
    pub fn lost_events(&self) -> Vec<std::ops::Range<Position>> {
        self.gaps().all().iter().map(|gap| gap.from.position..gap.to_position).collect()
    }

    /// Whether the append that gave `token` is part of this history.
    ///
    /// # Errors
    /// [`ReadError`] if the journal can't be read there.
    pub fn token_state(&self, token: &Token) -> Result<TokenState, ReadError> {
        if token.journal != self.id() {
            return Ok(TokenState::Foreign);
        }
        let Some(last) = token.position.get().checked_sub(1).map(Position::new) else {
            return Ok(TokenState::Present); // nothing is in front of it that could be lost
        };
        let end = self.end();
        if token.position > end.position {
            return Ok(TokenState::Pending);
        }
        if self.gaps().at_position(last).is_some() {
            return Ok(TokenState::Lost);
        }
        if token.position == end.position {
            let same = token.incarnation == end.incarnation;
            return Ok(if same { TokenState::Present } else { TokenState::Lost });
        }
        let start = self.start();
        if token.position == start.position {
            let same = token.incarnation == start.incarnation;
            return Ok(if same { TokenState::Present } else { TokenState::Lost });
        }
        let header = self.header_holding(last)?;
        let same = header.is_some_and(|header| {
            header.end_position() == token.position && header.incarnation == token.incarnation
        });
        Ok(if same { TokenState::Present } else { TokenState::Lost })
    }

    /// The last revision of a stream among the durable events; `None` if it has none.
    ///
    /// # Errors
    /// [`ReadError`] if an index can't be read.
    pub fn stream_head(&self, stream: &StreamId) -> Result<Option<Revision>, ReadError> {
        let (seen, sealed) = {
            let segments = self.0.segments.read();
            if let Some(span) = segments::span(&segments.active, stream.as_str()) {
                return Ok(Some(span.last));
            }
            if let Some(head) = self.0.heads.get(stream) {
                return Ok(Some(head));
            }
            (segments.all.last().map(|segment| segment.number()), segments.sealed_numbers())
        };
        if let Some((_, span)) = self.holder(stream, sealed, Order::LastToFirst)? {
            self.remember_head(stream, span.last, seen);
            return Ok(Some(span.last));
        }
        // Also what was removed meanwhile: the base knows what those segments held.
        let Some(base) = self.base() else { return Ok(None) };
        let head = base.head(stream)?;
        if let Some(head) = head {
            self.remember_head(stream, head, seen);
        }
        Ok(head)
    }

    /// Remembers a head that was found in the sealed segments, when `seen` was the last of all. If another
    /// one was sealed while they were read, it may hold a newer head, which [`roll`](Self::roll) has
    /// remembered.
    fn remember_head(&self, stream: &StreamId, head: Revision, seen: Option<u64>) {
        let segments = self.0.segments.read();
        if segments.all.last().map(|segment| segment.number()) == seen {
            self.0.heads.insert(stream.clone(), head);
        }
    }

    fn span(&self, segment: &Segment, stream: &StreamId) -> Result<Option<Span>, ReadError> {
        match &segment.sealed {
            Some(sealed) => {
                let span = sealed.span(&self.0.files, &segment.page, stream.as_str());
                span.map_err(|error| self.or_truncated(segment.base_position(), error))
            }
            None => Ok(segments::span(&self.0.segments.read().active, stream.as_str())),
        }
    }

    /// Segment `number`, or the next one that there is, and where a stream's events lie in it; `None` if
    /// there is no such segment (yet).
    ///
    /// Both under one lock: the active segment's index is another segment's a moment later.
    fn postings(
        &self,
        number: u64,
        stream: &StreamId,
        wanted: Wanted,
    ) -> Result<Option<(Arc<Segment>, Vec<Posting>)>, ReadError> {
        let segment = {
            let segments = self.0.segments.read();
            let at = segments.all.partition_point(|segment| segment.number() < number);
            let Some(segment) = segments.all.get(at).cloned() else { return Ok(None) };
            if segment.sealed.is_none() {
                let found = segments::postings(&segments.active, stream.as_str(), wanted);
                return Ok(Some((segment, found)));
            }
            segment
        };
        let found = match &segment.sealed {
            Some(sealed) => {
                let found = sealed.postings(&self.0.files, &segment.page, stream.as_str(), wanted);
                found.map_err(|error| self.or_truncated(segment.base_position(), error))?
            }
            None => Vec::new(),
        };
        Ok(Some((segment, found)))
    }

    /// What holds the batch at `offset`, which lies in front of `end`.
    fn place_of(&self, offset: u64, end: &Checkpoint) -> Option<Place> {
        let segments = self.0.segments.read();
        let behind = segments.all.partition_point(|segment| segment.base_offset() <= offset);
        let segment = segments.all.get(behind.checked_sub(1)?).cloned()?;
        let recent = segments.recent.at(offset);
        // The active segment holds everything up to `end`: it was active when that was the end, or is now.
        let last = segment.sealed.as_ref().map_or(end.offset, |sealed| sealed.end.offset);
        let limit = recent.as_ref().map_or(last, |run| run.end_offset().min(last));
        Some(Place { segment, limit, recent })
    }

    /// Publishes batches that have just become durable: index and end at once, so that nobody finds an
    /// event in the index that lies behind the end. `bytes` are all batches since the end before.
    fn publish(
        &self,
        end: Checkpoint,
        bytes: Vec<u8>,
        index: impl FnOnce(&mut SegmentIndex, &[u8]),
    ) {
        let mut segments = self.0.segments.write();
        index(&mut segments.active, &bytes);
        segments.recent.push(end.offset, bytes);
        self.0.watch.publish(end);
    }

    /// Lets go of the segments in front of a base that is durable by now.
    fn begin_at(&self, base: Arc<Base>) {
        let first = base.start().segment;
        let mut segments = self.0.segments.write();
        let removed = segments.all.partition_point(|segment| segment.number() < first);
        let removed: Vec<_> = segments.all.drain(..removed).collect();
        self.0.first.store(base.start().checkpoint.position.get(), Ordering::Release);
        segments.base = Some(base);
        drop(segments);
        removed.iter().for_each(|segment| self.0.files.let_go(segment.number()));
    }

    /// Seals the active segment, if there is one, and goes on in the next. The sealed one is returned: its
    /// index stays in memory until [`write_sidecar`](Self::write_sidecar).
    fn roll(&self, next: crate::format::segment::SegmentPage) -> Option<Arc<Segment>> {
        let end = self.end();
        let mut segments = self.0.segments.write();
        let mut just_sealed = None;
        if let Some(active) = segments.all.pop() {
            let index = Arc::new(std::mem::take(&mut segments.active));
            for (name, postings) in &index.streams {
                if let Ok(stream) = StreamId::new(name) {
                    self.0.heads.insert(stream, postings.last_revision());
                }
            }
            let link = crate::format::batch::Link {
                offset: end.offset,
                position: end.position,
                chain: end.chain,
            };
            let sealed = Some(Sealed::in_memory(link, index));
            let segment = Arc::new(Segment { page: active.page.clone(), sealed });
            just_sealed = Some(Arc::clone(&segment));
            segments.all.push(segment);
        }
        segments.all.push(Arc::new(Segment { page: next, sealed: None }));
        just_sealed
    }

    /// Writes the sidecar of a segment that was sealed, and lets go of its index.
    fn write_sidecar(&self, segment: &Segment) {
        if let Some(sealed) = &segment.sealed {
            sealed.write_sidecar(&self.0.files, &segment.page);
            self.map_up_to(segment.number());
        }
    }

    /// Replaces the header page of the active segment, which has no batches yet.
    fn replace_active(&self, page: crate::format::segment::SegmentPage) {
        let mut segments = self.0.segments.write();
        segments.all.pop();
        segments.all.push(Arc::new(Segment { page, sealed: None }));
    }

    /// In a mirror: its origin was found to have another history, and the mirror has halted. It shows what there was,
    /// some of which the origin doesn't have, or not any more. `None` if nothing of that is known.
    #[must_use]
    pub fn fork(&self) -> Option<Fork> {
        *self.0.fork.lock()
    }

    #[cfg(feature = "shipping")]
    pub(crate) fn set_fork(&self, fork: Option<Fork>) {
        *self.0.fork.lock() = fork;
    }

    fn close_watch(&self) {
        self.0.watch.close();
    }

    /// Whoever reads from this handle, or a clone of it, is refused from now on: its files are about to hold
    /// something else.
    fn retire(&self) {
        self.close_watch();
        self.0.files.retire();
    }
}

/// What an opening has found.
struct Contents<'a> {
    kept: &'a [recovery::Kept],
    gaps: Gaps,
    base: Option<Arc<Base>>,
    end: Checkpoint,
}

/// A segment, as tools show it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// Its number.
    pub number: u64,
    /// Its file.
    pub path: PathBuf,
    /// Closed for ever.
    pub sealed: bool,
    /// Position of its first event.
    pub base_position: Position,
    /// Position behind its last durable event.
    pub end_position: Position,
    /// Offset of its first batch.
    pub base_offset: u64,
    /// Offset behind its last durable batch.
    pub end_offset: u64,
}

/// Surveys a journal that may be written meanwhile.
///
/// The batches may be read before, and the claim that they are durable after, the writer has written them:
/// that looks like lost data. But what a claim vouches for had been written before the claim was read, so
/// it is there on a second look, unless it is damaged.
fn survey_beside_writer(
    fs: &dyn Fs,
    layout: &Layout,
    node: &Node,
) -> Result<(Survey, Option<crate::error::Corruption>), OpenError> {
    let mut survey = survey_beside_retention(fs, layout, node)?;
    let mut corruption = survey.corruption(layout);
    for _ in 0..SURVEYS_MAX {
        if corruption.is_none() {
            break;
        }
        // A live writer may have gone on between two reads of ours: its later batches then claim to be
        // behind what had not been there yet. Whatever had been durable before is there on a second look.
        let known = survey.proven;
        survey = survey_beside_retention(fs, layout, node)?;
        if survey.end.offset >= known {
            survey.proven = survey.proven.min(survey.end.offset);
        }
        corruption = survey.corruption(layout);
    }
    Ok((survey, corruption))
}

/// The same beside a writer that may remove segments: what was found counts only if the base is the same
/// before and after.
fn survey_beside_retention(fs: &dyn Fs, layout: &Layout, node: &Node) -> Result<Survey, OpenError> {
    unchanged_base(fs, layout, node.journal, || {
        recovery::survey(fs, layout, node, Access::ReadOnly)
    })
}

/// Looks again if the base was replaced meanwhile.
fn unchanged_base<T>(
    fs: &dyn Fs,
    layout: &Layout,
    journal: JournalId,
    mut look: impl FnMut() -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let base = || Ok::<_, OpenError>(Start::of(Base::read(fs, layout, journal)?.as_ref(), journal));
    let mut before = base()?;
    for _ in 0..RETENTIONS_MAX {
        let found = look();
        let after = base()?;
        if before == after {
            return found;
        }
        before = after;
    }
    look()
}

/// The files, locked for writing.
#[derive(Debug)]
struct Locked {
    fs: Arc<dyn Fs>,
    layout: Layout,
    _lock: Box<dyn Lock>,
}

impl Locked {
    /// Takes the directory's lock, creating the directory if it is missing.
    fn take(fs: &Arc<dyn Fs>, dir: &Path) -> Result<Self, OpenError> {
        let layout = Layout::new(dir);
        fs.create_dir_all(dir).context("creating", dir)?;
        let path = layout.file(layout::LOCK);
        let program = std::env::current_exe().ok();
        let program =
            program.as_deref().and_then(Path::file_name).and_then(std::ffi::OsStr::to_str);
        let owner = format!("process {} ({})", std::process::id(), program.unwrap_or("unknown"));
        match fs.lock(&path, &owner).context("locking", &path)? {
            Ok(lock) => Ok(Self { fs: Arc::clone(fs), layout, _lock: lock }),
            Err(held) => Err(OpenError::Locked { path, owner: held.owner }),
        }
    }

    /// The same, if there is a directory.
    fn take_existing(fs: &Arc<dyn Fs>, dir: &Path) -> Result<Self, OpenError> {
        if fs.list(dir).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            return Err(OpenError::NotFound { path: dir.to_owned() });
        }
        let locked = Self::take(fs, dir)?;
        locked.refuse_unfinished()?;
        Ok(locked)
    }

    /// A file that an unfinished restore leaves behind.
    fn refuse_unfinished(&self) -> Result<(), OpenError> {
        let names = self.fs.list(&self.layout.dir).context("listing", &self.layout.dir)?;
        if names.iter().any(|name| name == layout::INCOMING) {
            return Err(OpenError::Incomplete { path: self.layout.dir.clone() });
        }
        if names.iter().any(|name| name == layout::RECOVERING) {
            return Err(OpenError::Recovering { path: self.layout.dir.clone() });
        }
        Ok(())
    }

    /// The journal's origin; `None` if there is no journal.
    #[cfg(feature = "shipping")]
    fn origin(&self) -> Result<Option<Node>, OpenError> {
        match read_node(&*self.fs, &self.layout)? {
            Some(node) if node.role != Role::Origin => {
                let (found, wanted) = (node.role, Role::Origin);
                Err(OpenError::Role { path: self.layout.dir.clone(), found, wanted })
            }
            node => Ok(node),
        }
    }

    /// Whether anything of the journal is there; without it, it isn't for a mirror to say what that means.
    #[cfg(feature = "shipping")]
    fn is_begun(&self) -> bool {
        self.has_segments().unwrap_or(true)
    }

    fn has_segments(&self) -> Result<bool, OpenError> {
        let names = self.fs.list(&self.layout.dir).context("listing", &self.layout.dir)?;
        let of_journal =
            |name: &String| name == layout::BASE || layout::number_of(name, "seg").is_some();
        Ok(names.iter().any(of_journal))
    }

    /// Writes `node`, durably, before the first segment exists.
    fn write_node(&self, node: &Node) -> Result<(), IoError> {
        write_node(&*self.fs, &self.layout, node)
    }
}

fn write_node(fs: &dyn Fs, layout: &Layout, node: &Node) -> Result<(), IoError> {
    layout.replace(fs, layout::NODE, &node.encode())
}

/// Whose the directory of a journal is, as far as it says so.
#[cfg(feature = "views")]
pub(crate) fn node_of(fs: &dyn Fs, dir: &Path) -> Option<Node> {
    read_node(fs, &Layout::new(dir)).ok().flatten()
}

/// Reads `node`; `None` if there is none.
fn read_node(fs: &dyn Fs, layout: &Layout) -> Result<Option<Node>, OpenError> {
    let path = layout.file(layout::NODE);
    let file = match fs.open(&path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(IoError::new("opening", &path, error).into()),
    };
    let mut bytes = [0; NODE_BYTES];
    let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
    match Node::decode(bytes.get(..read).unwrap_or_default()) {
        Ok(node) => Ok(Some(node)),
        Err(source @ crate::format::FormatError::Unsupported { .. }) => {
            Err(OpenError::Unsupported { path, source })
        }
        Err(error) => Err(OpenError::Corruption(crate::error::Corruption {
            path,
            file_offset: 0,
            position: Position::START,
            kind: crate::error::CorruptionKind::SegmentHeader(error),
        })),
    }
}

/// A random incarnation; never 0, which stands for "no batch yet".
fn new_incarnation() -> Incarnation {
    Incarnation::new(crate::env::random_u64())
}
