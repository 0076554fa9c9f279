//! Opening: what is there, what of it counts, and what must be put in order before anybody may rely on it.
//!
//! ```text
//!      survey              decide (A)                mend (B), every step can crash and be run again
//!   files ─▶ headers ─▶ scan ─▶ X, proven ─▶ refuse │ 1 later segments ─▶ quarantine
//!                                                  │ 2 torn tail copied aside, zeroed
//!                                                  │ 3 sealed segments cut to their end
//!                                                  │ 4 headers and batches above `proven` written again
//!                                                  │ 5 stale sidecars and spares removed, mark = X
//!                                                  ▼ 6 publish
//! ```
//! - `X` is the end of the valid, chained prefix; `proven` the highest offset that is known to have been
//!   durable: from the mark, and in an origin also from what segment and batch headers claim. In a mirror
//!   the headers speak of the origin's disk, so only its own mark proves anything.
//! - `X < proven` means that acknowledged data is damaged or gone. Everything behind X is then left as it
//!   is. Otherwise what lies behind X was never acknowledged: a torn tail.
//! - Valid batches above `proven` may exist only in the page cache (a failed sync marks pages clean), so
//!   they are written again in place and synced before anything rests on them.
//!
//! The rules and the reasons for them stand in `docs/format.md`, section "Recovery".

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError, ReadError};
use crate::format::batch::{BatchHeader, Link};
use crate::format::files::{Mark, Node, Role, Witness};
use crate::format::gaps::Gap;
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::format::sidecar::SegmentIndex;
use crate::format::{FORMAT_VERSION, Flags, FormatError};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::base::{self, Base, Start};
use crate::journal::gaps::{self, Gaps, Joint};
use crate::journal::layout::{self, Layout};
use crate::journal::maps;
use crate::journal::mark::{self, MarkFile};
use crate::journal::scan::{Window, file_offset, header_page, open_if_there};
use crate::journal::segments::Access;
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, NodeId};

/// A segment file as it was found.
#[derive(Debug)]
struct Found {
    number: u64,
    len: u64,
    page: PageState,
}

/// A segment that belongs to the journal.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) page: SegmentPage,
    /// Where its batches end.
    pub(crate) end: Link,
    /// Its index, if it was scanned.
    pub(crate) index: Option<Arc<SegmentIndex>>,
    intact: bool,
    len: u64,
    /// What lies behind its end was given up, and isn't touched.
    gives_up_rest: bool,
}

impl Kept {
    pub(crate) fn number(&self) -> u64 {
        self.page.header.number
    }

    fn must_be_cut(&self) -> bool {
        self.len > self.end_in_file() && !self.gives_up_rest
    }

    fn end_in_file(&self) -> u64 {
        file_offset(self.page.header.base_offset, self.end.offset)
    }
}

/// What recovery found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// The journal had been closed cleanly.
    pub clean: bool,
    /// Bytes of incomplete batches that were set aside; they were never acknowledged.
    pub torn_bytes: u64,
    /// Events in those of them whose headers could be read.
    pub torn_events: u64,
    /// Segment files moved into `quarantine/`.
    pub quarantined_segments: u64,
    /// Bytes of valid but unproven batches that were written and synced again.
    pub rewritten_bytes: u64,
    /// Header pages of which a copy was damaged and has been remade.
    pub remade_headers: u64,
    /// A mirror's tail was damaged and set aside; it will be fetched again.
    pub refetch: bool,
}

/// The state of a journal on disk, before anything has been changed.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) mark: Option<Mark>,
    /// The segments of the valid prefix.
    pub(crate) kept: Vec<Kept>,
    /// X, with the epoch and incarnation of the last batch.
    pub(crate) end: Checkpoint,
    pub(crate) proven: u64,
    pub(crate) gaps: Gaps,
    /// What is known of a removed prefix.
    pub(crate) base: Option<Arc<Base>>,
    /// Segments of it that are still there: no part of the journal any more.
    below: Vec<u64>,
    /// Why the prefix ends where it does, if that isn't an orderly end.
    pub(crate) stop: Option<Corruption>,
    /// Highest epoch seen anywhere.
    pub(crate) epoch_max: u32,
    /// The first segment with a feature that this version may read but must not append behind; its flags.
    read_only: Option<(PathBuf, u16)>,
    /// Segments behind the prefix, in order.
    beyond: Vec<u64>,
    spares: Vec<u64>,
    torn_events: u64,
}

/// What is needed to go on after recovery.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) kept: Vec<Kept>,
    pub(crate) gaps: Gaps,
    pub(crate) base: Option<Arc<Base>>,
    pub(crate) end: Checkpoint,
    pub(crate) mark: MarkFile,
    pub(crate) witness: Option<Witness>,
    pub(crate) epoch_next: u32,
    pub(crate) report: RecoveryReport,
}

/// Reads the directory and decides what counts. Changes nothing (but, for a writer, the page cache).
pub(crate) fn survey(
    fs: &dyn Fs,
    layout: &Layout,
    node: &Node,
    access: Access,
) -> Result<Survey, OpenError> {
    let mark = mark::read(fs, layout, access)?;
    if let Some(mark) = mark.filter(|mark| mark.end.journal != node.journal) {
        let path = layout.dir.clone();
        return Err(OpenError::HistoryReplaced { path, position: mark.end.position });
    }
    let base = Base::read(fs, layout, node.journal)?;
    let start = Start::of(base.as_ref(), node.journal);
    let mark = start.mark(mark);
    let (below, numbers): (Vec<_>, Vec<_>) =
        segment_numbers(fs, layout)?.into_iter().partition(|number| *number < start.segment);
    let found =
        numbers.into_iter().filter_map(|number| Found::open(fs, layout, node, number).transpose());
    let found: Vec<_> = found.collect::<Result<_, _>>()?;
    let (used, spares): (Vec<_>, Vec<_>) = found.into_iter().partition(Found::is_used);
    let gaps = Gaps::read(fs, layout, node)?;
    let begin = || Walk::new(fs, layout, node.role, access, &start, mark.as_ref(), (&used, &gaps));
    let mut walk = begin();
    walk.run(&used)?;
    while let Some(base) = walk.unread_end() {
        // X turned out to be the end of a segment that was taken by its successor's header. Who wrote its
        // last batch isn't known then, and what a checkpoint rests on is better read: trust less.
        let mut again = begin();
        again.trusted = base;
        again.run(&used)?;
        walk = again;
    }
    let (end, kept) = (walk.end, walk.kept);
    let stop = walk.stop;
    let last = kept.last().map(Kept::number);
    let beyond =
        used.iter().map(|f| f.number).filter(|n| last.is_none_or(|last| *n > last)).collect();
    let mut survey = Survey {
        mark,
        end,
        proven: walk
            .claims
            .max(mark.map_or(0, |mark| mark.end.offset))
            .max(gaps.end_offset())
            // In a mirror only its own place proves anything: the origin has the rest.
            .max(if node.role.appends() { start.proven } else { 0 }),
        stop,
        epoch_max: walk
            .epoch_max
            .max(mark.map_or(0, |mark| mark.end.epoch))
            .max(start.checkpoint.epoch),
        read_only: walk.read_only,
        kept,
        beyond,
        spares: spares.iter().map(|spare| spare.number).collect(),
        torn_events: 0,
        gaps: Gaps::default(),
        base,
        below,
    };
    let mark_seen = walk.mark_seen;
    survey.gaps = gaps;
    survey.count_claims_beyond(fs, layout, node.role, &used)?;
    survey.check_mark(layout, mark_seen)?;
    survey.check_sealed_tails(fs, layout, &used)?;
    Ok(survey)
}

fn segment_numbers(fs: &dyn Fs, layout: &Layout) -> Result<Vec<u64>, IoError> {
    let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
    Ok(names.iter().filter_map(|name| layout::number_of(name, "seg")).collect())
}

impl Found {
    /// `None` if it has gone: a live writer removes a spare that it doesn't need.
    fn open(
        fs: &dyn Fs,
        layout: &Layout,
        node: &Node,
        number: u64,
    ) -> Result<Option<Self>, OpenError> {
        let path = layout.segment(number);
        let Some(file) = open_if_there(fs, &path)? else { return Ok(None) };
        let len = file.size().context("measuring", &path)?;
        let (bytes, is_lost) = header_page(&file, &path)?;
        let mut page = SegmentPage::read(&bytes);
        if let PageState::Invalid(source @ FormatError::Unsupported { .. }) = page {
            return Err(OpenError::Unsupported { path, source });
        }
        if let PageState::Valid { page: valid, .. } = &page {
            if valid.header.journal != node.journal {
                page = PageState::Invalid(FormatError::Invalid("journal id"));
            } else if valid.header.number != number {
                page = PageState::Invalid(FormatError::Invalid("segment number"));
            }
        }
        if is_lost {
            page = PageState::Invalid(FormatError::Magic);
        }
        Ok(Some(Self { number, len, page }))
    }

    fn is_used(&self) -> bool {
        self.page != PageState::Zero
    }

    fn valid(&self) -> Option<(&SegmentPage, bool)> {
        match &self.page {
            PageState::Valid { page, intact } => Some((page, *intact)),
            _ => None,
        }
    }

    /// Opened again each time: a journal has more segments than a process may have open files.
    fn file(&self, fs: &dyn Fs, layout: &Layout) -> Result<Arc<dyn File>, IoError> {
        let path = layout.segment(self.number);
        fs.open(&path, OpenMode::Read).context("opening", &path)
    }

    fn window(&self, fs: &dyn Fs, layout: &Layout) -> Result<Window, IoError> {
        Ok(Window::new(self.file(fs, layout)?, layout.segment(self.number)))
    }
}

/// Follows the chain from the beginning to X.
struct Walk<'a> {
    fs: &'a dyn Fs,
    layout: &'a Layout,
    role: Role,
    access: Access,
    gaps: &'a Gaps,
    /// Number of the first segment.
    first: u64,
    /// Every segment with a valid header: its number and its base.
    bases: Vec<(u64, u64)>,
    /// The mark: the batch that ends there is scanned, and compared with it.
    mark: Option<Checkpoint>,
    /// Segments that end at or in front of this are taken by their headers.
    trusted: u64,
    link: Link,
    end: Checkpoint,
    claims: u64,
    epoch_max: u32,
    mark_seen: Option<Checkpoint>,
    read_only: Option<(PathBuf, u16)>,
    kept: Vec<Kept>,
    stop: Option<Corruption>,
}

impl<'a> Walk<'a> {
    fn new(
        fs: &'a dyn Fs,
        layout: &'a Layout,
        role: Role,
        access: Access,
        start: &Start,
        mark: Option<&Mark>,
        (used, gaps): (&[Found], &'a Gaps),
    ) -> Self {
        let claims = match role {
            Role::Origin | Role::Feed => {
                let headers = used.iter().filter_map(Found::valid);
                headers.map(|(page, _)| page.header.durable_offset).max().unwrap_or(0)
            }
            Role::Mirror => 0,
        };
        Self {
            fs,
            layout,
            role,
            access,
            gaps,
            first: start.segment,
            bases: used
                .iter()
                .filter_map(|found| Some((found.number, found.valid()?.0.header.base_offset)))
                .collect(),
            mark: mark.map(|mark| mark.end),
            trusted: mark.map_or(claims, |mark| mark.end.offset),
            link: start.link(),
            end: start.checkpoint,
            claims,
            epoch_max: used
                .iter()
                .filter_map(Found::valid)
                .map(|(page, _)| page.header.epoch)
                .max()
                .unwrap_or(0),
            mark_seen: mark
                .filter(|mark| mark.end.offset == start.checkpoint.offset)
                .map(|_| start.checkpoint),
            read_only: None,
            kept: Vec::new(),
            stop: None,
        }
    }

    fn run(&mut self, used: &[Found]) -> Result<(), OpenError> {
        let mut expected = self.first;
        for (index, found) in used.iter().enumerate() {
            let number = std::mem::replace(&mut expected, found.number + 1);
            if self.is_given_up(found, number) {
                continue;
            }
            let in_front = self.link.offset;
            if let Some(page) = self.leaves_gap(found) {
                self.stop = None;
                self.scan(found, page.0, page.1, Self::next_of(used, index))?;
                continue;
            }
            let crossed = self.link.offset != in_front;
            if found.number != number && !crossed {
                self.stop_between(number, CorruptionKind::MissingSegment);
                return Ok(());
            }
            let Some((page, intact)) = found.valid() else {
                let why = CorruptionKind::SegmentHeader(found.why_invalid());
                self.stop_between(found.number, why);
                return Ok(());
            };
            if !self.links(page) {
                // The chain ended inside the segment in front; that place is the one to report.
                if self.stop.is_none() {
                    self.stop_at(found.number, 0, CorruptionKind::SegmentLink);
                }
                return Ok(());
            }
            self.stop = None;
            let next = Self::next_of(used, index);
            match self.sealed_below(found, page, next) {
                Some(end) => self.keep(found, page, intact, end, None),
                None => self.scan(found, page, intact, next)?,
            }
        }
        Ok(())
    }

    /// The base of the segment that holds the last batch, if that segment was not read.
    fn unread_end(&self) -> Option<u64> {
        let holds = self.kept.iter().rfind(|k| k.end.offset > k.page.header.base_offset)?;
        holds.index.is_none().then_some(holds.page.header.base_offset)
    }

    fn next_of(used: &[Found], index: usize) -> Option<&Found> {
        let found = used.get(index)?;
        used.get(index + 1).filter(|next| next.number == found.number + 1)
    }

    /// Number of the segment in which the journal goes on behind `gap`.
    fn holder(&self, gap: &Gap) -> Option<u64> {
        let holds = self.bases.iter().filter(|(_, base)| *base <= gap.to_offset);
        holds.max_by_key(|(_, base)| *base).map(|(number, _)| *number)
    }

    fn links(&self, page: &SegmentPage) -> bool {
        let header = &page.header;
        header.base_offset == self.link.offset
            && header.base_position == self.link.position
            && header.previous_chain == self.link.chain
    }

    /// The end of a segment that lies wholly in front of what is known to be durable, from its successor's
    /// header; the batch that ends exactly there is always scanned, to compare it with the mark.
    fn sealed_below(
        &self,
        found: &Found,
        page: &SegmentPage,
        next: Option<&Found>,
    ) -> Option<Link> {
        let next = next?.valid()?.0.header;
        let end = Link {
            offset: next.base_offset,
            position: next.base_position,
            chain: next.previous_chain,
        };
        let plausible =
            end.offset > page.header.base_offset && end.position > page.header.base_position;
        let whole = found.len >= file_offset(page.header.base_offset, end.offset);
        (plausible && whole && end.offset < self.trusted).then_some(end)
    }

    fn keep(
        &mut self,
        found: &Found,
        page: &SegmentPage,
        intact: bool,
        end: Link,
        index: Option<SegmentIndex>,
    ) {
        self.note_flags(page.header.number, page.header.flags);
        let gives_up_rest = self.gaps.at(&end).is_some();
        self.link = end;
        self.end =
            Checkpoint { offset: end.offset, position: end.position, chain: end.chain, ..self.end };
        self.kept.push(Kept {
            page: page.clone(),
            end,
            index: index.map(Arc::new),
            intact,
            len: found.len,
            gives_up_rest,
        });
    }

    /// Reads all batches of a segment, as the disk holds them.
    fn scan(
        &mut self,
        found: &Found,
        page: &SegmentPage,
        intact: bool,
        next: Option<&Found>,
    ) -> Result<(), OpenError> {
        let path = self.layout.segment(found.number);
        let file = found.file(self.fs, self.layout)?;
        if self.access == Access::Writer && !planted::is(Bug::TrustPageCache) {
            // A failed sync left pages that the disk doesn't hold: sync what is dirty, drop the cache, and
            // read the disk. If the sync fails now, nothing that is read can be trusted. A reader leaves
            // that alone: beside a live writer its sync could take an error that is the writer's.
            file.sync_data().context("syncing", &path)?;
            file.drop_cache().context("dropping the cache of", &path)?;
        }
        let mut window = Window::new(file, path.clone());
        let (base, salt) = (page.header.base_offset, page.header.salt);
        let mut index = SegmentIndex::default();
        let (mut link, mut joint, mut crossed) = (self.link, Joint::from(self.link), None);
        let stop = loop {
            if let Some(gap) = self.gaps.at(&link).filter(|_| joint.behind.is_none()) {
                let ends_here =
                    next.and_then(Found::valid).map(|(next, _)| next.header.base_offset)
                        == Some(gap.to_offset);
                if !ends_here && self.holder(gap) != Some(found.number) {
                    break CorruptionKind::Batch(FormatError::Magic); // goes on in a later segment
                }
                (joint, crossed) = (Joint::behind(gap), Some(*gap));
                gaps::skip(&mut index, gap);
                if let Some(end) = self.cross(gap) {
                    link = joint.link;
                    self.end = end;
                    continue;
                }
            }
            let batch = match window.batch(file_offset(base, joint.link.offset), u64::MAX, salt)? {
                Ok(batch) => batch,
                Err(source @ FormatError::Unsupported { .. }) => {
                    return Err(OpenError::Unsupported { path, source });
                }
                Err(error) => break CorruptionKind::Batch(error),
            };
            let first = joint.link.offset == base;
            if !joint.is_continued_by(&batch, first.then_some(&page.digest)) {
                break CorruptionKind::Chain;
            }
            if let Some(gap) = &crossed {
                gaps::bridge(&mut index, gap, &batch);
            }
            match batch.check_records().and_then(|()| index.add(&batch)) {
                Ok(()) => {}
                Err(source @ FormatError::Unsupported { .. }) => {
                    return Err(OpenError::Unsupported { path, source });
                }
                Err(error) => break CorruptionKind::Record(error),
            }
            let header = batch.header;
            self.note(&header);
            self.note_flags(found.number, header.flags);
            link = header.end_link();
            joint = link.into();
            self.end = Checkpoint {
                journal: page.header.journal,
                epoch: header.epoch,
                incarnation: header.incarnation,
                offset: link.offset,
                position: link.position,
                chain: link.chain,
            };
            if self.mark.is_some_and(|mark| mark.offset == link.offset) {
                self.mark_seen = Some(self.end);
            }
        };
        self.keep(found, page, intact, link, Some(index));
        self.stop_at(found.number, file_offset(base, joint.link.offset), stop);
        Ok(())
    }

    /// The walk goes on behind `gap`: what it knows of the gap's end, if the chain there is known.
    fn cross(&mut self, gap: &Gap) -> Option<Checkpoint> {
        let end = gaps::end_of(gap, self.end.journal);
        self.epoch_max = self.epoch_max.max(gap.epoch);
        let within =
            |mark: &Checkpoint| mark.offset > gap.from.offset && mark.offset <= gap.to_offset;
        if let Some(mark) = self.mark.filter(within) {
            // Within the gap there is nothing to compare the mark with.
            self.mark_seen = end.filter(|end| end.offset == mark.offset).or(Some(mark));
        }
        end
    }

    /// Whether the segment lies within a gap, or is what is left of one that did.
    fn is_given_up(&self, found: &Found, expected: u64) -> bool {
        let Some(gap) = self.gaps.at(&self.link) else { return false };
        let follows = found.number == expected && found.valid().is_some_and(|(p, _)| self.links(p));
        !follows && self.holder(gap) != Some(found.number)
    }

    /// The header of the segment in which the journal goes on behind a gap that began in front of it.
    fn leaves_gap<'f>(&mut self, found: &'f Found) -> Option<(&'f SegmentPage, bool)> {
        let gap = self.gaps.at(&self.link)?;
        let (page, intact) = found.valid()?;
        if self.links(page) || self.holder(gap) != Some(found.number) {
            return None;
        }
        if page.header.base_offset < gap.to_offset {
            return Some((page, intact));
        }
        // It begins where the gap ends, and is linked like any other.
        let gap = *gap;
        if let Some(end) = self.cross(&gap) {
            self.end = end;
            self.link = Joint::behind(&gap).link;
        }
        None
    }

    fn note(&mut self, header: &BatchHeader) {
        self.epoch_max = self.epoch_max.max(header.epoch);
        if self.role.appends() {
            self.claims = self.claims.max(header.durable_offset);
        }
    }

    fn note_flags(&mut self, number: u64, flags: Flags) {
        if flags.read_only != 0 && self.read_only.is_none() {
            self.read_only = Some((self.layout.segment(number), flags.read_only));
        }
    }

    /// The next segment can't be used; unless the one in front is damaged, that is the place to report.
    fn stop_between(&mut self, number: u64, kind: CorruptionKind) {
        let orderly = |stop: &Corruption| {
            matches!(stop.kind, CorruptionKind::Batch(FormatError::Magic | FormatError::Truncated))
        };
        if self.stop.as_ref().is_none_or(orderly) {
            self.stop_at(number, 0, kind);
        }
    }

    fn stop_at(&mut self, number: u64, file_offset: u64, kind: CorruptionKind) {
        let path = self.layout.segment(number);
        self.stop = Some(Corruption { path, file_offset, position: self.link.position, kind });
    }
}

impl Found {
    fn why_invalid(&self) -> FormatError {
        match &self.page {
            PageState::Invalid(error) => *error,
            _ => FormatError::Magic,
        }
    }
}

impl Survey {
    /// What [`mend`] would set in order, for tools: bytes of the torn tail, segments behind the end, and
    /// header pages of which a copy is damaged.
    pub(crate) fn pending(&self, fs: &dyn Fs, layout: &Layout) -> Result<(u64, u64, u64), IoError> {
        let mut torn_bytes = 0;
        if let Some(active) = self.kept.last() {
            let path = layout.segment(active.number());
            let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
            let end = active.end_in_file();
            let last = Window::new(file, path).last_non_zero(end)?;
            torn_bytes = last.map_or(0, |last| last - end);
        }
        let remade = self.kept.iter().filter(|kept| !kept.intact).count();
        Ok((torn_bytes, self.beyond.len() as u64, remade as u64))
    }

    /// Number of the segment that is expected behind those of the prefix.
    fn next_number(&self) -> u64 {
        let first = self.base.as_ref().map_or(0, |base| base.start().segment);
        self.kept.last().map_or(first, |kept| kept.number() + 1)
    }

    /// How many prepared segments there are.
    pub(crate) fn spares(&self) -> usize {
        self.spares.len()
    }

    /// No segment that belongs to the journal.
    pub(crate) fn has_no_segment(&self) -> bool {
        self.kept.is_empty()
    }

    /// No used segment at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.beyond.is_empty() && self.base.is_none()
    }

    /// What lies behind X: in an origin batch headers tell what had been durable when they were written, and a mark does
    /// that was written to a wrong place.
    fn count_claims_beyond(
        &mut self,
        fs: &dyn Fs,
        layout: &Layout,
        role: Role,
        used: &[Found],
    ) -> Result<(), OpenError> {
        let first = self.kept.last().map_or(0, Kept::number);
        for found in used.iter().filter(|found| found.number >= first) {
            let Some((page, _)) = found.valid() else { continue };
            let behind = self.kept.last().filter(|kept| kept.number() == found.number);
            let at = behind.map_or(HEADER_PAGE_BYTES as u64, Kept::end_in_file);
            let mut events = 0;
            let count = |header: &BatchHeader| events += u64::from(header.count);
            let claims = found.window(fs, layout)?.claims_behind(at, page, role, count)?;
            self.proven = self.proven.max(claims.durable_offset);
            self.torn_events += events;
        }
        Ok(())
    }

    /// Row "history replaced": the mark lies within the valid prefix, but on another history.
    fn check_mark(&self, layout: &Layout, seen: Option<Checkpoint>) -> Result<(), OpenError> {
        match self.mark {
            Some(mark) if mark.end.offset <= self.end.offset => {
                let same = seen.is_some_and(|seen| {
                    seen.chain == mark.end.chain && seen.position == mark.end.position
                });
                if same {
                    Ok(())
                } else {
                    let path = layout.dir.clone();
                    Err(OpenError::HistoryReplaced { path, position: mark.end.position })
                }
            }
            _ => Ok(()),
        }
    }

    /// Row "lost": acknowledged data is damaged or gone.
    pub(crate) fn corruption(&self, layout: &Layout) -> Option<Corruption> {
        if self.end.offset >= self.proven {
            return None;
        }
        let lost = CorruptionKind::LostTail { proven: self.proven };
        Some(match &self.stop {
            // Zeros or the end of the file where a batch should be: lost rather than damaged.
            Some(Corruption {
                path,
                file_offset,
                position,
                kind: CorruptionKind::Batch(FormatError::Magic | FormatError::Truncated),
            }) => Corruption {
                path: path.clone(),
                file_offset: *file_offset,
                position: *position,
                kind: lost,
            },
            Some(stop) => stop.clone(),
            None => Corruption {
                path: layout.segment(self.next_number()),
                file_offset: 0,
                position: self.end.position,
                kind: CorruptionKind::MissingSegment,
            },
        })
    }

    /// Non-zero bytes behind the end of a sealed segment below `proven` were never written by us.
    fn check_sealed_tails(
        &self,
        fs: &dyn Fs,
        layout: &Layout,
        used: &[Found],
    ) -> Result<(), OpenError> {
        let Some((_, sealed)) = self.kept.split_last() else { return Ok(()) };
        for kept in sealed.iter().filter(|kept| kept.must_be_cut()) {
            let Some(found) = used.iter().find(|found| found.number == kept.number()) else {
                continue;
            };
            let end = kept.end_in_file();
            if kept.end.offset <= self.proven
                && found.window(fs, layout)?.last_non_zero(end)?.is_some()
            {
                return Err(OpenError::Corruption(Corruption {
                    path: layout.segment(kept.number()),
                    file_offset: end,
                    position: kept.end.position,
                    kind: CorruptionKind::BehindEnd,
                }));
            }
        }
        Ok(())
    }
}

/// Puts a surveyed journal in order (part B), so that everything up to X is durable and nothing lies behind.
///
/// A mirror whose tail is damaged or lost lowers its mark first, keeps the old end as a witness, and goes
/// on from X: it will fetch the rest again.
pub(crate) fn mend(
    fs: &dyn Fs,
    layout: &Layout,
    node: &Node,
    mut survey: Survey,
    reserve_bytes: u64,
) -> Result<Recovered, OpenError> {
    let corruption = survey.corruption(layout);
    if let Some(corruption) = corruption.clone().filter(|_| node.role.appends()) {
        return Err(OpenError::Corruption(corruption));
    }
    if let Some((path, flags)) = survey.read_only.clone().filter(|_| node.role.appends()) {
        let source = FormatError::Unsupported { version: FORMAT_VERSION, flags };
        return Err(OpenError::Unsupported { path, source });
    }
    let mut mark = MarkFile::open(fs, layout, survey.mark.map_or(0, |mark| mark.sequence))?;
    // What was fetched again up to the witness was compared with it before it was written.
    let mut witness = survey.mark.and_then(|mark| mark.witness);
    witness = witness.filter(|witness| witness.offset > survey.end.offset);
    let mut report = RecoveryReport {
        clean: survey.mark.is_some_and(|m| m.closed && m.end.offset == survey.end.offset),
        ..RecoveryReport::default()
    };
    if let (Some(_), Some(old)) = (corruption, survey.mark) {
        let old_end =
            Witness { offset: old.end.offset, position: old.end.position, chain: old.end.chain };
        witness = witness.filter(|known| known.offset >= old_end.offset).or(Some(old_end));
        mark.lower(Mark { sequence: 0, end: survey.end, closed: false, witness, salt: 0 })?;
        survey.proven = survey.end.offset;
        report.refetch = true;
    }
    finish_retention(fs, layout, &survey)?;
    if !survey.gaps.all().is_empty() {
        // The sync of its name may have failed, and can't be repeated: made anew, like the base.
        survey.gaps.write(fs, layout, node.journal)?;
    }
    fs.create_dir_all(&layout.quarantine()).context("creating", &layout.quarantine())?;
    quarantine_beyond(fs, layout, &survey, &mut report)?;
    clear_torn_tail(fs, layout, &survey, &mut report)?;
    cut_sealed(fs, layout, &survey)?;
    if !planted::is(Bug::TrustPageCache) {
        rewrite_unproven(fs, layout, &survey, &mut report)?;
    }
    remove_stale(fs, layout, &survey)?;
    let end = survey.end;
    mark.write_synced(Mark { sequence: 0, end, closed: false, witness, salt: 0 })?;
    ensure_reserve(fs, layout, reserve_bytes);
    Ok(Recovered {
        kept: survey.kept,
        gaps: survey.gaps,
        base: survey.base,
        end,
        mark,
        witness,
        epoch_next: survey.epoch_max.saturating_add(1),
        report,
    })
}

/// Step 0: what a crash has left of a retention. The sync of the base's name may have failed, and can't be
/// repeated, so it is made anew; only then nothing needs what lies below it.
fn finish_retention(fs: &dyn Fs, layout: &Layout, survey: &Survey) -> Result<(), OpenError> {
    let Some(base) = &survey.base else { return Ok(()) };
    if survey.below.is_empty() && base.is_intact() {
        return Ok(());
    }
    match base.renew(fs, layout) {
        // Nothing rests on it but the removal: that is left to a later opening, or to the next retention.
        Err(ReadError::Io(error)) if error.is_disk_full() => Ok(()),
        renewed => {
            renewed?;
            Ok(base::remove_segments(fs, layout, survey.below.iter().copied())?)
        }
    }
}

/// Step 1: last first, so that a crash never leaves a segment behind a missing one.
fn quarantine_beyond(
    fs: &dyn Fs,
    layout: &Layout,
    survey: &Survey,
    report: &mut RecoveryReport,
) -> Result<(), IoError> {
    for &number in survey.beyond.iter().rev() {
        let path = layout.segment(number);
        fs.rename(&path, &layout.quarantined(number, "seg")).context("moving aside", &path)?;
        fs.sync_dir(&layout.quarantine()).context("syncing", &layout.quarantine())?;
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
        report.quarantined_segments += 1;
    }
    Ok(())
}

/// Step 2: what lies behind X in its segment is copied aside, then zeroed.
///
/// The copy bears the place of its tail until the tail is gone, and only then a name of its own: whatever
/// interrupts this, the next recovery finds the copy, completes it in its own space, and needs no more.
fn clear_torn_tail(
    fs: &dyn Fs,
    layout: &Layout,
    survey: &Survey,
    report: &mut RecoveryReport,
) -> Result<(), IoError> {
    if let Some(active) = survey.kept.last() {
        let path = layout.segment(active.number());
        let file = fs.open(&path, OpenMode::Write).context("opening", &path)?;
        let mut window = Window::new(Arc::clone(&file), path.clone());
        let from = active.end_in_file();
        // What an earlier recovery zeroed may be zero in the cache only, if its sync failed: once more.
        let zeroed = copied_bytes(fs, layout, active.number(), from)?.map(|len| from + len);
        let torn = window.last_non_zero(from)?;
        if let Some(to) = torn {
            copy_aside(fs, layout, active.number(), &mut window, from..to)?;
            report.torn_bytes = to - from;
            report.torn_events = survey.torn_events;
        }
        if let Some(to) = torn.max(zeroed) {
            let to = to.min(file.size().context("measuring", &path)?);
            fs::write_zeros(&*file, from..to).context("zeroing", &path)?;
            file.sync_data().context("syncing", &path)?;
        }
    }
    name_copies(fs, layout)
}

/// How much an interrupted recovery had copied of the tail at `from`.
fn copied_bytes(
    fs: &dyn Fs,
    layout: &Layout,
    number: u64,
    from: u64,
) -> Result<Option<u64>, IoError> {
    let path = layout.torn_tail(number, from);
    match fs.open(&path, OpenMode::Read) {
        Ok(copy) => copy.size().map(Some).context("measuring", &path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("opening", &path),
    }
}

fn copy_aside(
    fs: &dyn Fs,
    layout: &Layout,
    number: u64,
    window: &mut Window,
    range: std::ops::Range<u64>,
) -> Result<(), IoError> {
    let path = layout.torn_tail(number, range.start);
    match fs.open(&path, OpenMode::Write) {
        // Whole, but a part of the tail may be zeroed since: that must not overwrite what was kept.
        Ok(copy) => {
            copy_tail(&*copy, &path, window, range, Over::Earlier)?;
            copy.sync_data().context("syncing", &path)?;
            // Its name may still be unsynced.
            return fs.sync_dir(&layout.quarantine()).context("syncing", &layout.quarantine());
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("opening", &path),
    }
    // The reserve's blocks are allocated: recovery must work with no space left.
    let reserve = layout.quarantine().join(layout::RESERVE);
    let opened = match fs.open(&reserve, OpenMode::Write) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs.open(&reserve, OpenMode::CreateNew)
        }
        opened => opened,
    };
    let copy = opened.context("opening", &reserve)?;
    let len = range.end - range.start;
    copy_tail(&*copy, &reserve, window, range, Over::Anything)?;
    copy.set_len(len).context("cutting", &reserve)?;
    copy.sync_data().context("syncing", &reserve)?;
    fs.rename(&reserve, &path).context("naming", &path)?;
    fs.sync_dir(&layout.quarantine()).context("syncing", &layout.quarantine())
}

/// What a copy is written over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    Anything,
    /// A copy of the same tail: bytes that are zero by now stay as they were.
    Earlier,
}

fn copy_tail(
    copy: &dyn File,
    path: &Path,
    window: &mut Window,
    range: std::ops::Range<u64>,
    over: Over,
) -> Result<(), IoError> {
    let mut at = range.start;
    while at < range.end {
        let mut bytes = window.read(at, 64 * 1024, range.end)?.to_vec();
        if bytes.is_empty() {
            break;
        }
        let to = at - range.start;
        if over == Over::Earlier {
            let mut earlier = vec![0; bytes.len()];
            fs::read_full_at(copy, &mut earlier, to).context("reading", path)?;
            let gone = bytes.iter_mut().zip(earlier).filter(|(byte, _)| **byte == 0);
            gone.for_each(|(byte, earlier)| *byte = earlier);
        }
        fs::write_all_at(copy, &bytes, to).context("writing", path)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Gives the copies of tails that are gone from their segments names that are never used again.
fn name_copies(fs: &dyn Fs, layout: &Layout) -> Result<(), IoError> {
    let dir = layout.quarantine();
    let names = fs.list(&dir).context("listing", &dir)?;
    let mut named = false;
    for (name, number) in names.iter().filter_map(|name| Some((name, layout::torn_of(name)?))) {
        let path = dir.join(name);
        fs.rename(&path, &layout.quarantined(number, "tail")).context("naming", &path)?;
        named = true;
    }
    if named {
        fs.sync_dir(&dir).context("syncing", &dir)?;
    }
    Ok(())
}

/// Step 3: a cut that was lost in a crash.
fn cut_sealed(fs: &dyn Fs, layout: &Layout, survey: &Survey) -> Result<(), IoError> {
    let Some((_, sealed)) = survey.kept.split_last() else { return Ok(()) };
    for kept in sealed.iter().filter(|kept| kept.must_be_cut()) {
        let path = layout.segment(kept.number());
        let file = fs.open(&path, OpenMode::Write).context("opening", &path)?;
        file.set_len(kept.end_in_file()).context("cutting", &path)?;
        file.sync_data().context("syncing", &path)?;
    }
    Ok(())
}

/// Step 4: verbatim and in place, lowest segment first. Also remakes header pages with a damaged copy.
fn rewrite_unproven(
    fs: &dyn Fs,
    layout: &Layout,
    survey: &Survey,
    report: &mut RecoveryReport,
) -> Result<(), IoError> {
    let mut wrote = false;
    for kept in &survey.kept {
        let base = kept.page.header.base_offset;
        let from = survey.proven.max(base);
        let first_unproven =
            base >= survey.proven || first_batch_end(fs, layout, kept, survey.proven)?;
        if !kept.intact {
            report.remade_headers += 1;
        }
        if kept.intact && !first_unproven && from >= kept.end.offset {
            continue;
        }
        let path = layout.segment(kept.number());
        let file = fs.open(&path, OpenMode::Write).context("opening", &path)?;
        if first_unproven || !kept.intact {
            fs::write_all_at(&*file, &kept.page.bytes(), 0).context("writing", &path)?;
        }
        let mut window = Window::new(Arc::clone(&file), path.clone());
        let (mut at, to) = (file_offset(base, from), kept.end_in_file());
        while at < to {
            // Verified once more: where the cache couldn't be dropped, a page of it may have gone since the
            // scan, and the disk may hold something else.
            let batch = window.batch(at, to, kept.page.header.salt)?.map_err(|_| {
                IoError::new("reading again", &path, std::io::ErrorKind::InvalidData.into())
            })?;
            let len = batch.bytes().len() as u64;
            fs::write_all_at(&*file, batch.bytes(), at).context("writing", &path)?;
            at += len;
            report.rewritten_bytes += len;
        }
        file.sync_data().context("syncing", &path)?;
        wrote = true;
    }
    if wrote {
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    }
    Ok(())
}

/// Whether the segment's first batch ends above `proven`, though the segment begins below it.
fn first_batch_end(
    fs: &dyn Fs,
    layout: &Layout,
    kept: &Kept,
    proven: u64,
) -> Result<bool, IoError> {
    if kept.end.offset <= proven {
        return Ok(kept.end.offset == kept.page.header.base_offset);
    }
    let path = layout.segment(kept.number());
    let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
    let mut window = Window::new(file, path);
    let header = window.batch_header(HEADER_PAGE_BYTES as u64, u64::MAX, kept.page.header.salt)?;
    Ok(header.is_ok_and(|header| header.end_offset() > proven))
}

/// Step 5: the sidecar of the segment that stays active, sidecars and maps without their segments, and spares.
fn remove_stale(fs: &dyn Fs, layout: &Layout, survey: &Survey) -> Result<(), IoError> {
    let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
    let sealed = survey.kept.split_last().map_or(&[][..], |(_, sealed)| sealed);
    let active = survey.kept.last().map_or(0, Kept::number);
    let oldest = survey.kept.first().map_or(0, Kept::number);
    let mut removed = false;
    for name in &names {
        let number = layout::number_of(name, "idx");
        let sidecar = number
            .or_else(|| layout::number_of(name, layout::LABELS))
            .is_some_and(|number| sealed.binary_search_by_key(&number, Kept::number).is_err());
        let spare =
            layout::number_of(name, "seg").is_some_and(|number| survey.spares.contains(&number));
        let map = layout::map_of(name).is_some_and(|(level, first)| {
            let covered = maps::covered(level, first);
            covered.end > active || covered.end <= oldest
        });
        let unfinished = [layout::SIDECAR_TEMP, layout::LABELS_TEMP]
            .iter()
            .any(|ending| layout::number_of(name, ending).is_some());
        if sidecar || spare || map || unfinished {
            let path = layout.file(name);
            fs.remove(&path).context("removing", &path)?;
            removed = true;
        }
    }
    if removed {
        fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    }
    Ok(())
}

/// Allocates space for the quarantine while there is some. An effort: without it, recovery needs space only
/// if there is a torn tail.
pub(crate) fn ensure_reserve(fs: &dyn Fs, layout: &Layout, bytes: u64) {
    let path = layout.quarantine().join(layout::RESERVE);
    let made = match fs.open(&path, OpenMode::CreateNew) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            fs.open(&path, OpenMode::Write)
        }
        opened => opened,
    };
    // It may be shorter than it should be: made under other options, or in an opening that was killed.
    let made = made.and_then(|file| {
        let len = file.size()?;
        if len < bytes {
            fs::write_zeros(&*file, len..bytes)?;
            file.sync_data()?;
            fs.sync_dir(&layout.quarantine())?;
        }
        Ok(())
    });
    if made.is_err() {
        drop(fs.remove(&path));
    }
}

/// Role and id of a directory without `node`: a copy, known by its segment headers. It is read like an
/// origin's, and never written.
pub(crate) fn node_of_copy(fs: &dyn Fs, layout: &Layout) -> Result<Node, OpenError> {
    let not_found = || OpenError::NotFound { path: layout.dir.clone() };
    let names = match fs.list(&layout.dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(not_found()),
        listed => listed.context("listing", &layout.dir)?,
    };
    for number in names.iter().filter_map(|name| layout::number_of(name, "seg")) {
        let path = layout.segment(number);
        let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
        let mut bytes = [0; HEADER_PAGE_BYTES];
        fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
        if let PageState::Valid { page, .. } = SegmentPage::read(&bytes) {
            let journal = page.header.journal;
            return Ok(Node { role: Role::Origin, node: NodeId::from_bytes([0; 16]), journal });
        }
    }
    Err(not_found())
}

impl Survey {
    /// Ends the prefix at the last batch that is known to be durable: what a reader beside a live writer
    /// may see.
    pub(crate) fn cut_to_proven(&mut self, fs: &dyn Fs, layout: &Layout) -> Result<(), OpenError> {
        if self.end.offset <= self.proven {
            return Ok(());
        }
        while self.kept.len() > 1
            && self.kept.last().is_some_and(|kept| kept.page.header.base_offset >= self.proven)
        {
            self.kept.pop();
        }
        let Some(last) = self.kept.last_mut() else { return Ok(()) };
        let header = last.page.header;
        let path = layout.segment(header.number);
        let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
        let mut window = Window::new(file, path);
        let mut index = SegmentIndex::default();
        let mut end = Checkpoint {
            journal: header.journal,
            epoch: header.epoch,
            incarnation: header.incarnation,
            offset: header.base_offset,
            position: header.base_position,
            chain: header.previous_chain,
        };
        let mut crossed = None;
        while end.offset < self.proven {
            let mut at = end.offset;
            if let Some(gap) = self.gaps.at_offset(end.offset) {
                gaps::skip(&mut index, gap);
                crossed = Some(*gap);
                at = gap.to_offset;
                if let Some(to) = gaps::end_of(gap, end.journal) {
                    end = to;
                    continue;
                }
            }
            let at = file_offset(header.base_offset, at);
            let Ok(batch) = window.batch(at, u64::MAX, header.salt)? else { break };
            if let Some(gap) = &crossed {
                gaps::bridge(&mut index, gap, &batch);
            }
            if batch.header.end_offset() > self.proven || index.add(&batch).is_err() {
                break;
            }
            let link = batch.header.end_link();
            end.epoch = batch.header.epoch;
            end.incarnation = batch.header.incarnation;
            (end.offset, end.position, end.chain) = (link.offset, link.position, link.chain);
        }
        last.end = Link { offset: end.offset, position: end.position, chain: end.chain };
        last.index = Some(Arc::new(index));
        self.end = end;
        Ok(())
    }
}
