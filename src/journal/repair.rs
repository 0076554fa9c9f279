//! Repairing a damaged journal, by an operator's decision: bytes that a copy still has are put back, what
//! nobody has any more is given up by name, and nothing else is ever changed.
//!
//! ```text
//!   own files ──▶ batch by batch from genesis ──▶ damage? ──▶ a copy has the bytes     ─▶ fetch, verbatim, in place
//!   a copy (mirror, backup) ──────────────────────┘       └─▶ nobody has them          ─▶ give up, if the range was named
//! ```
//! Invariants:
//! - Fetched bytes are proven from both sides: each batch continues the verified chain in front of the damage,
//!   and what lies behind it in the own files continues the last of them.
//! - Nothing is overwritten or cut that isn't in `quarantine/` by then, synced. Giving up touches no byte of
//!   the journal.
//! - Every step can be cut short by a crash and simply be run again: what is left of it is found as damage,
//!   or as done.
//! - [`plan`] and [`apply`] decide by the same code; `apply` plans again after what it has done.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError};
use crate::event::{Revision, StreamId};
use crate::format::FormatError;
use crate::format::batch::{BATCH_ALIGNMENT, BatchHeader, Link};
use crate::format::files::{
    MARK_FILE_BYTES, MARK_SLOT_BYTES, MARK_SLOT_STRIDE, Mark, NODE_BYTES, Node, Role,
};
use crate::format::gaps::{Gap, GapChain};
use crate::format::record::RECORD_BYTES_MIN;
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::base::{Base, Start};
use crate::journal::cursor::Cursor;
use crate::journal::gaps::{Gaps, Joint};
use crate::journal::layout::{self, Layout};
use crate::journal::mark;
use crate::journal::recovery;
use crate::journal::scan::{Window, file_offset};
use crate::journal::segments::Access;
use crate::journal::{Comparison, Journal, Locked};
use crate::journal::{Damage, DamageKind, VerifyReport, verify};
use crate::position::{Chain, Incarnation, JournalId, Position};

/// `apply` plans and works so many times at the most; each time it gets further, or it ends.
const PASSES_MAX: usize = 8;

/// What a repair may use.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The journal directory of a mirror or of a backup, from which damaged bytes are fetched.
    pub from: Option<PathBuf>,
    /// Ranges of events to give up, each exactly as a plan has named it.
    pub accept: Vec<Range<Position>>,
}

/// A range of bytes that a copy still has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fetch {
    /// The end of the own, verified bytes in front.
    pub from: Link,
    /// Where the own bytes go on, or the end of what the copy has.
    pub to: Link,
    /// What is written: files, and byte ranges in them.
    pub files: Vec<(PathBuf, Range<u64>)>,
    /// These events had been given up before.
    pub closes_gap: bool,
}

/// One step of a repair.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// A single flipped bit of `node` is turned back: the file's checksum says which.
    MendNode {
        /// The file.
        path: PathBuf,
    },
    /// A damaged file that is rebuilt, or not needed, is moved into `quarantine/`.
    SetAside {
        /// The file.
        path: PathBuf,
    },
    /// Damaged or lost bytes are replaced by those of a copy.
    Fetch(Fetch),
    /// Events are lost. Only if the range has been named among [`Options::accept`] it is given up.
    GiveUp {
        /// What would be, or is, written into `gaps`.
        gap: Gap,
        /// The file in which the loss begins.
        path: PathBuf,
        /// Byte in the file.
        file_offset: u64,
        /// It was named.
        accepted: bool,
    },
    /// Bytes behind the end of a sealed segment, which belong to no event, are copied aside and cut off.
    CutBehindEnd {
        /// The file.
        path: PathBuf,
        /// Its right length.
        len: u64,
    },
    /// What every opening for writing does: the torn tail is copied aside and zeroed, segments behind the end
    /// are moved aside, header pages are remade from their valid copy, and the mark is written.
    Recover {
        /// Bytes of the torn tail.
        torn_bytes: u64,
        /// Segments behind the end.
        segments: u64,
        /// Header pages with a damaged copy.
        headers: u64,
        /// The mark is damaged, and is written anew.
        mark: bool,
    },
    /// Damage for which there is no remedy here.
    Beyond {
        /// The damage.
        damage: Damage,
    },
}

impl Step {
    /// Whether [`apply`] carries it out.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        !matches!(self, Self::Beyond { .. } | Self::GiveUp { accepted: false, .. })
    }
}

/// What is wrong, and what would be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// The journal.
    pub journal: JournalId,
    /// Origin or mirror; `None` for a copy.
    pub role: Option<Role>,
    /// Positions of events that have been given up already.
    pub lost: Vec<Range<Position>>,
    /// What a verification found.
    pub damage: Vec<Damage>,
    /// What would be done, in this order.
    pub steps: Vec<Step>,
}

/// What [`apply`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// In this order.
    pub done: Vec<Step>,
    /// What remains, and needs a decision or another copy.
    pub left: Vec<Step>,
    /// The journal afterwards, read from the first byte.
    pub report: VerifyReport,
}

/// Why a repair can't be planned or carried out. What was done so far is durable and harmless; run it again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepairError {
    /// The journal can't be opened, read or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The copy can't be opened.
    #[error("the copy to fetch from: {0}")]
    Source(#[source] OpenError),
    /// The copy is of another journal.
    #[error("{}: a copy of journal {found}, not of {wanted}", path.display())]
    OtherJournal {
        /// The copy.
        path: PathBuf,
        /// Its journal.
        found: JournalId,
        /// The damaged journal.
        wanted: JournalId,
    },
    /// A range that was to be given up isn't one that the plan names.
    #[error("positions {from}..{to} are not a range that is lost")]
    NotLost {
        /// First position that was named.
        from: Position,
        /// Position behind the last one.
        to: Position,
    },
    /// The copy doesn't hold any more what it held when the repair was planned.
    #[error("{}: changed while it was read", path.display())]
    SourceChanged {
        /// The copy.
        path: PathBuf,
    },
}

impl From<IoError> for RepairError {
    fn from(error: IoError) -> Self {
        Self::Open(error.into())
    }
}

impl RepairError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Open(error) => error.code(),
            Self::Source(_) => "repair.source",
            Self::OtherJournal { .. } => "repair.other_journal",
            Self::NotLost { .. } => "repair.not_lost",
            Self::SourceChanged { .. } => "repair.source_changed",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Open(error) => error.hint(),
            Self::Source(_) | Self::OtherJournal { .. } => {
                "name a mirror or a backup of this very journal"
            }
            Self::NotLost { .. } => "give the ranges exactly as the plan names them",
            Self::SourceChanged { .. } => "run the repair again",
        }
    }
}

/// Finds out what is wrong with the journal in `dir` and what [`apply`] would do about it. Changes nothing
/// (but takes the lock, if there is one to take: a journal that is being written is not to be repaired).
///
/// Blocks for reading the whole journal, twice.
///
/// ```
/// use headwater::{fs::{Fs, os::OsFs}, repair};
/// # let dir = tempfile::tempdir()?;
/// # headwater::Store::create(dir.path())?.close()?;
/// let fs: std::sync::Arc<dyn Fs> = std::sync::Arc::new(OsFs);
/// let plan = repair::plan(&fs, &dir.path().join("journal"), &repair::Options::default())?;
/// assert!(plan.damage.is_empty() && plan.steps.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`RepairError`]; damage is no error.
pub fn plan(fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<Plan, RepairError> {
    let _lock = lock_if_there(fs, dir)?;
    let source = open_source(fs, options)?;
    let plan = Scene::plan(fs, dir, source.as_ref(), &options.accept)?;
    check_accepted(&plan, &options.accept)?;
    Ok(plan)
}

/// Carries out what [`plan`] says, and verifies the whole journal afterwards. Everything is durable when this
/// returns. Steps for which there is no remedy, and losses that weren't named, are left as they are.
///
/// Blocks for reading the whole journal several times, and for what is fetched.
///
/// # Errors
/// [`RepairError`]; run it again then.
pub fn apply(fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<Outcome, RepairError> {
    let locked = Locked::take_existing(fs, dir)?;
    let source = open_source(fs, options)?;
    settle(&**fs, &locked.layout)?;
    renew_gaps(&**fs, &locked.layout)?;
    let mut done = Vec::new();
    for pass in 0..PASSES_MAX {
        let plan = Scene::plan(fs, dir, source.as_ref(), &options.accept)?;
        if pass == 0 {
            check_accepted(&plan, &options.accept)?;
        }
        let (todo, left): (Vec<_>, Vec<_>) = plan.steps.into_iter().partition(Step::is_possible);
        if todo.is_empty() {
            let report = verify(&**fs, dir, &mut |_| {})?;
            return Ok(Outcome { done, left, report });
        }
        for step in todo {
            carry_out(&**fs, &locked.layout, source.as_ref(), &step)?;
            done.push(step);
        }
    }
    let left = Scene::plan(fs, dir, source.as_ref(), &options.accept)?.steps;
    Ok(Outcome { done, left, report: verify(&**fs, dir, &mut |_| {})? })
}

/// What an interrupted repair has written may be in the cache only: it is synced, and what a failed sync has
/// lost is not taken for written.
fn settle(fs: &dyn Fs, layout: &Layout) -> Result<(), RepairError> {
    let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
    for number in names.iter().filter_map(|name| layout::number_of(name, "seg")) {
        let path = layout.segment(number);
        let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
        file.sync_data().context("syncing", &path)?;
        file.drop_cache().context("dropping the cache of", &path)?;
    }
    Ok(fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?)
}

/// The losses that an interrupted repair has noted: the sync of their file's name may have failed, and can't be
/// repeated, so the file is made anew before anything rests on it. One that can't be read is planned for.
fn renew_gaps(fs: &dyn Fs, layout: &Layout) -> Result<(), RepairError> {
    let (node, ..) = find_node(fs, layout)?;
    match Gaps::read(fs, layout, &node) {
        Ok(gaps) if !gaps.all().is_empty() => Ok(gaps.write(fs, layout, node.journal)?),
        _ => Ok(()),
    }
}

fn lock_if_there(fs: &Arc<dyn Fs>, dir: &Path) -> Result<Option<Locked>, RepairError> {
    let names = fs.list(dir).unwrap_or_default();
    let there = names.iter().any(|name| name == layout::LOCK);
    Ok(if there { Some(Locked::take_existing(fs, dir)?) } else { None })
}

fn open_source(fs: &Arc<dyn Fs>, options: &Options) -> Result<Option<Source>, RepairError> {
    let Some(path) = options.from.clone() else { return Ok(None) };
    let opened = Journal::open_up_to(fs, &path, false);
    let (journal, _, proven) = opened.map_err(RepairError::Source)?;
    Ok(Some(Source { journal, proven, path }))
}

fn check_accepted(plan: &Plan, accept: &[Range<Position>]) -> Result<(), RepairError> {
    let lost = |range: &Range<Position>| {
        plan.steps.iter().any(|step| {
            matches!(step, Step::GiveUp { gap, .. }
                if gap.from.position == range.start && gap.to_position == range.end)
        })
    };
    match accept.iter().find(|range| !lost(range) && !plan.lost.contains(range)) {
        Some(range) => Err(RepairError::NotLost { from: range.start, to: range.end }),
        None => Ok(()),
    }
}

/// A copy of the journal. What is valid in it but not proven to be durable counts only where the own journal
/// proves it.
#[derive(Debug)]
struct Source {
    journal: Journal,
    proven: u64,
    path: PathBuf,
}

impl Source {
    /// A cursor at `link`, if the copy is of the same history there and goes on.
    fn cursor_at(&self, link: &Link) -> Option<Cursor> {
        let (offset, position, chain) = (link.offset, link.position, link.chain);
        let same = self.journal.compare_place(offset, position, chain).ok()? == Comparison::Equal;
        let goes_on = position < self.journal.end().position;
        self.journal.cursor(position).ok().filter(|_| same && goes_on)
    }
}

/// A segment file as it was found.
#[derive(Debug)]
struct Segment {
    number: u64,
    path: PathBuf,
    file: Arc<dyn File>,
    /// Its header; `None` if both copies are lost.
    page: Option<SegmentPage>,
    why_invalid: FormatError,
}

impl Segment {
    fn open(
        fs: &dyn Fs,
        layout: &Layout,
        node: &Node,
        number: u64,
    ) -> Result<Option<Self>, OpenError> {
        let path = layout.segment(number);
        let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
        drop(file.drop_cache()); // an effort: the disk is to be read, not the cache
        let mut bytes = [0; HEADER_PAGE_BYTES];
        fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
        let invalid = FormatError::Invalid("segment header of another journal or place");
        let (page, why_invalid) = match SegmentPage::read(&bytes) {
            PageState::Valid { page, .. } => {
                let ours = page.header.journal == node.journal && page.header.number == number;
                (ours.then_some(page), invalid)
            }
            PageState::Invalid(source @ FormatError::Unsupported { .. }) => {
                return Err(OpenError::Unsupported { path, source });
            }
            PageState::Invalid(error) => (None, error),
            PageState::Zero => (None, FormatError::Magic),
        };
        let segment = Self { number, path, file, page, why_invalid };
        let spare = bytes.iter().all(|&byte| byte == 0)
            && segment.window().last_non_zero(HEADER_PAGE_BYTES as u64)?.is_none();
        Ok((!spare).then_some(segment))
    }

    fn window(&self) -> Window {
        Window::new(Arc::clone(&self.file), self.path.clone())
    }

    fn base_offset(&self) -> Option<u64> {
        self.page.as_ref().map(|page| page.header.base_offset)
    }
}

/// How far the walk has come.
#[derive(Clone, Copy, Debug)]
struct Place {
    joint: Joint,
    /// Index of the segment in which the next batch is looked for.
    segment: Option<usize>,
}

/// Everything that a plan is made of.
struct Scene<'a> {
    fs: &'a Arc<dyn Fs>,
    layout: Layout,
    node: Node,
    role: Option<Role>,
    mark: Option<Mark>,
    gaps: Gaps,
    segments: Vec<Segment>,
    source: Option<&'a Source>,
    accept: &'a [Range<Position>],
    proven: u64,
    start: Start,
    steps: Vec<Step>,
}

impl<'a> Scene<'a> {
    fn plan(
        fs: &'a Arc<dyn Fs>,
        dir: &Path,
        source: Option<&'a Source>,
        accept: &'a [Range<Position>],
    ) -> Result<Plan, RepairError> {
        let layout = Layout::new(dir);
        let names = fs.list(dir).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => OpenError::NotFound { path: dir.to_owned() },
            _ => IoError::new("listing", dir, error).into(),
        })?;
        let (node, role, mut steps) = find_node(&**fs, &layout)?;
        let gaps = match Gaps::read(&**fs, &layout, &node) {
            Ok(gaps) => gaps,
            Err(OpenError::Corruption(corruption)) => {
                // Without it the losses are found anew.
                steps.push(Step::SetAside { path: corruption.path.clone() });
                let damage = vec![damage_of(corruption)];
                return Ok(Plan { journal: node.journal, role, lost: Vec::new(), damage, steps });
            }
            Err(error) => return Err(error.into()),
        };
        let damage = verify(&**fs, dir, &mut |_| {})?.damage;
        if let Some(source) = source.filter(|source| source.journal.id() != node.journal) {
            let (path, found) = (source.path.clone(), source.journal.id());
            return Err(RepairError::OtherJournal { path, found, wanted: node.journal });
        }
        let start = Start::of(Base::read(&**fs, &layout, node.journal)?.as_ref(), node.journal);
        let numbers = names.iter().filter_map(|name| layout::number_of(name, "seg"));
        let segments = numbers
            .filter(|number| *number >= start.segment)
            .map(|number| Segment::open(&**fs, &layout, &node, number))
            .collect::<Result<Vec<_>, _>>()?;
        let mark = start.mark(mark::read(&**fs, &layout, Access::ReadOnly)?);
        let mut scene = Self {
            fs,
            node,
            role,
            mark: mark.filter(|mark| mark.end.journal == node.journal),
            proven: mark.map_or(0, |mark| mark.end.offset).max(gaps.end_offset()),
            start,
            gaps,
            segments: segments.into_iter().flatten().collect(),
            source,
            accept,
            layout,
            steps,
        };
        scene.walk()?;
        scene.set_sidecars_aside(&damage);
        scene.plan_recovery(&damage)?;
        let lost = scene.gaps.all().iter().map(|gap| gap.from.position..gap.to_position).collect();
        Ok(Plan { journal: node.journal, role, lost, damage, steps: scene.steps })
    }

    fn walk(&mut self) -> Result<(), RepairError> {
        if self.node.role.appends() {
            let claims = self.segments.iter().filter_map(|s| s.page.as_ref());
            let claimed = claims.map(|page| page.header.durable_offset).max();
            self.proven = self.proven.max(claimed.unwrap_or(0)).max(self.start.proven);
        }
        let mut place = Place { joint: self.start.link().into(), segment: None };
        while let Some(next) = self.next(place)? {
            place = next;
        }
        Ok(())
    }

    /// One step on: over a batch, into the next segment, or over damage. `None` at the end.
    fn next(&mut self, place: Place) -> Result<Option<Place>, RepairError> {
        let link = place.joint.link;
        if let Some(gap) = self.gaps.at(&link).filter(|_| place.joint.behind.is_none()).copied() {
            let fetched = self.fetch(place, Some(&gap))?;
            return Ok(Some(fetched.unwrap_or_else(|| self.behind(&gap))));
        }
        if let Some(end) = self.own_batch(place)? {
            return Ok(Some(Place { joint: end.into(), ..place }));
        }
        if let Some(next) = self.own_segment(&link).filter(|next| Some(*next) != place.segment) {
            self.check_tail(place)?;
            return Ok(Some(Place { segment: Some(next), ..place }));
        }
        self.count_claims(place)?;
        if self.proven <= link.offset && place.joint.behind.is_none() {
            return Ok(None);
        }
        if let Some(fetched) = self.fetch(place, None)? {
            return Ok(Some(fetched));
        }
        let (path, at) = self.describe(place);
        match self.loss(place)?.filter(|_| self.role.is_some_and(Role::appends)) {
            Some(gap) => {
                let range = gap.from.position..gap.to_position;
                let accepted = self.accept.contains(&range);
                self.steps.push(Step::GiveUp { gap, path, file_offset: at, accepted });
                Ok(Some(self.behind(&gap)))
            }
            None => {
                let kind = match place.segment.and_then(|index| self.segments.get(index)) {
                    Some(segment) if segment.page.is_none() => {
                        CorruptionKind::SegmentHeader(segment.why_invalid)
                    }
                    _ => CorruptionKind::LostTail { proven: self.proven },
                };
                let position = Some(link.position);
                let damage = Damage { path, file_offset: at, position, kind: kind.into() };
                self.steps.push(Step::Beyond { damage });
                Ok(None)
            }
        }
    }

    /// The end of the own batch that belongs here.
    fn own_batch(&self, place: Place) -> Result<Option<Link>, RepairError> {
        let Some(segment) = place.segment.and_then(|index| self.segments.get(index)) else {
            return Ok(None);
        };
        let Some(page) = &segment.page else { return Ok(None) };
        let (base, link) = (page.header.base_offset, place.joint.link);
        let mut window = segment.window();
        let batch =
            match window.batch(file_offset(base, link.offset), u64::MAX, page.header.salt)? {
                Ok(batch) => batch,
                Err(source @ FormatError::Unsupported { .. }) => {
                    return Err(
                        OpenError::Unsupported { path: segment.path.clone(), source }.into()
                    );
                }
                Err(_) => return Ok(None),
            };
        let first = (link.offset == base).then_some(&page.digest);
        let belongs = place.joint.is_continued_by(&batch, first) && batch.check_records().is_ok();
        Ok(belongs.then(|| batch.header.end_link()))
    }

    /// The own segment that begins here.
    fn own_segment(&self, link: &Link) -> Option<usize> {
        self.segments.iter().position(|segment| {
            segment.page.as_ref().is_some_and(|page| {
                page.header.base_offset == link.offset
                    && page.header.base_position == link.position
                    && page.header.previous_chain == link.chain
            })
        })
    }

    fn own_number(&self, number: u64) -> Option<usize> {
        self.segments.iter().position(|segment| segment.number == number)
    }

    /// Looks behind the end of a segment that is left for the next one.
    fn check_tail(&mut self, place: Place) -> Result<(), RepairError> {
        let Some(segment) = place.segment.and_then(|index| self.segments.get(index)) else {
            return Ok(());
        };
        let Some(base) = segment.base_offset() else { return Ok(()) };
        let len = file_offset(base, place.joint.link.offset);
        if segment.window().last_non_zero(len)?.is_some() {
            self.steps.push(Step::CutBehindEnd { path: segment.path.clone(), len });
        }
        Ok(())
    }

    /// What lies behind the place where the valid batches stop tells what had been durable.
    fn count_claims(&mut self, place: Place) -> Result<(), RepairError> {
        let (mut proven, mut stray) = (self.proven, None);
        let first = place.segment.unwrap_or(0);
        for (index, segment) in self.segments.iter().enumerate().skip(first) {
            let Some(page) = &segment.page else { continue };
            let behind = Some(index) == place.segment;
            let offset = if behind { place.joint.link.offset } else { page.header.base_offset };
            let at = file_offset(page.header.base_offset, offset);
            let claims = segment.window().claims_behind(at, page, self.node.role, |_| {})?;
            proven = proven.max(claims.durable_offset);
            // One that has gone astray says where the lost events end, as one in its place does.
            stray = claims.mark.or(stray);
        }
        self.proven = proven;
        self.mark = stray.filter(|mark| mark.end.offset == proven).or(self.mark);
        Ok(())
    }

    /// Where the walk goes on behind lost events.
    fn behind(&self, gap: &Gap) -> Place {
        let holds = self.segments.iter().enumerate().filter_map(|(index, segment)| {
            Some((index, segment.base_offset().filter(|base| *base <= gap.to_offset)?))
        });
        let segment = holds.max_by_key(|(_, base)| *base).map(|(index, _)| index);
        Place { joint: Joint::behind(gap), segment }
    }

    /// The file and the byte at which the walk has stopped.
    fn describe(&self, place: Place) -> (PathBuf, u64) {
        let next = match place.segment.and_then(|index| self.segments.get(index)) {
            Some(segment) => {
                let base = segment.base_offset().unwrap_or(0);
                let at = file_offset(base, place.joint.link.offset);
                let more =
                    segment.window().read(at, 1, u64::MAX).is_ok_and(|read| !read.is_empty());
                if more {
                    return (segment.path.clone(), at);
                }
                segment.number + 1
            }
            None => self.start.segment,
        };
        (self.layout.segment(next), 0)
    }

    /// What of the copy fills the place up to where the own bytes go on.
    fn fetch(&mut self, place: Place, closes: Option<&Gap>) -> Result<Option<Place>, RepairError> {
        let (closes_gap, mut revisions) = (closes.is_some(), HashMap::new());
        let from = place.joint.link;
        let cursor = self.source.filter(|_| place.joint.behind.is_none());
        let Some(mut cursor) = cursor.and_then(|source| source.cursor_at(&from)) else {
            return Ok(None);
        };
        let proven = self.source.map_or(0, |source| source.proven);
        let (mut link, mut files) = (from, Vec::new());
        let mut page = place.segment.and_then(|index| self.segments.get(index)?.page.clone());
        // Damage of the copy ends this like its end: what doesn't reach far enough isn't used.
        while let Ok(Some(read)) = cursor.next_batch() {
            let first = read.page.map(|page| page.digest);
            if !read.batch.continues(&link, first.as_ref()) || read.batch.check_records().is_err() {
                return Ok(None);
            }
            let path = self.layout.segment(read.segment);
            if let Some(theirs) = read.page {
                let own = self.own_number(read.segment).and_then(|i| self.segments.get(i));
                match own.and_then(|own| own.page.as_ref()) {
                    Some(own) if own.digest != theirs.digest => return Ok(None), // another history
                    Some(_) => {}
                    None => extend(&mut files, &path, 0..HEADER_PAGE_BYTES as u64),
                }
                page = Some(theirs.clone());
            }
            let at = read.file_offset();
            extend(&mut files, &path, at..at + read.batch.bytes().len() as u64);
            link = read.batch.header.end_link();
            let number = read.segment;
            for record in read.batch.records().map_while(Result::ok).filter(|_| closes_gap) {
                revisions.entry(Box::from(record.stream)).or_insert(record.revision);
            }
            if closes.is_some_and(|gap| link.offset < gap.to_offset) {
                continue;
            }
            if let Some(end) = self.rejoin(&link, number, page.as_ref())? {
                if let Some(gap) = closes
                    && self.were_given_again(gap, &revisions)?
                {
                    return Ok(None);
                }
                let fetch = Fetch { from, to: link, files, closes_gap };
                self.steps.push(Step::Fetch(fetch));
                return Ok(Some(end));
            }
            let marked = self.mark.filter(|mark| mark.end.offset == link.offset);
            if marked.is_some_and(|mark| mark.end.chain != link.chain) {
                return Ok(None); // another history
            }
            if link.offset >= self.proven.max(proven) {
                break;
            }
        }
        // It is the journal's tail if nothing more is known to have been durable.
        if link.offset < self.proven || link.offset == from.offset || closes_gap {
            return Ok(None);
        }
        self.steps.push(Step::Fetch(Fetch { from, to: link, files, closes_gap }));
        self.proven = link.offset;
        Ok(Some(Place { joint: link.into(), segment: None }))
    }

    /// Whether revisions of lost events were given to others since: with both, the streams would be none.
    fn were_given_again(
        &self,
        gap: &Gap,
        first_lost: &HashMap<Box<str>, Revision>,
    ) -> Result<bool, RepairError> {
        let (own, _) = Journal::open_read_only(self.fs, &self.layout.dir)?;
        for (stream, revision) in first_lost {
            let Ok(stream) = StreamId::new(&**stream) else { continue };
            let next = own.read_stream(&stream, *revision).map_err(OpenError::from)?.next();
            if let Some(Ok(event)) = next
                && event.position() >= gap.to_position
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the own bytes go on at `link`, in segment `number` with the header `page`, or in the next one.
    fn rejoin(
        &mut self,
        link: &Link,
        number: u64,
        page: Option<&SegmentPage>,
    ) -> Result<Option<Place>, RepairError> {
        let joint = Joint::from(*link);
        let own = self.own_number(number);
        let ends_gap =
            self.gaps.all().iter().any(|gap| {
                gap.to_offset == link.offset && gap.chain == GapChain::AtEnd(link.chain)
            });
        if ends_gap || self.own_segment(link).is_some() {
            return Ok(Some(Place { joint, segment: own }));
        }
        let Some(index) = own else { return Ok(None) };
        let Some(segment) = self.segments.get_mut(index) else { return Ok(None) };
        let before = segment.page.clone();
        segment.page = segment.page.take().or_else(|| page.cloned());
        let place = Place { joint, segment: Some(index) };
        if self.own_batch(place)?.is_some() {
            return Ok(Some(place));
        }
        if let Some(segment) = self.segments.get_mut(index) {
            segment.page = before;
        }
        Ok(None)
    }

    /// The smallest range that must be given up here: up to the next valid batch, the next segment, or the
    /// last place that is known to have been durable. `None` if nothing of the journal is left to go on in.
    fn loss(&self, place: Place) -> Result<Option<Gap>, RepairError> {
        let from = place.joint.link;
        if place.joint.behind.is_some() {
            return Ok(None); // the first batch behind a gap must be the one that was there
        }
        let mut ends = Vec::new();
        let current = place.segment.and_then(|index| self.segments.get(index));
        if let Some((segment, page)) = current.and_then(|s| Some((s, s.page.as_ref()?))) {
            let headers = headers_from(segment, page, &from)?;
            if let Some(gap) = next_batch(segment, page, &from, &headers)? {
                return Ok(Some(gap));
            }
            ends.extend(headers.last().map(|header| Gap {
                epoch: header.epoch,
                incarnation: header.incarnation,
                ..gap(&from, &header.end_link())
            }));
        }
        let later = self.segments.iter().filter_map(|segment| segment.page.as_ref());
        let next = later.map(|page| &page.header).filter(|header| header.base_offset > from.offset);
        if let Some(next) = next.min_by_key(|header| header.base_offset) {
            let to = Link {
                offset: next.base_offset,
                position: next.base_position,
                chain: next.previous_chain,
            };
            return Ok(Some(gap(&from, &to)).filter(is_plausible));
        }
        ends.extend(self.mark.filter(|mark| mark.end.offset > from.offset).map(|mark| {
            let end = mark.end;
            let to = Link { offset: end.offset, position: end.position, chain: end.chain };
            Gap { epoch: end.epoch, incarnation: end.incarnation, ..gap(&from, &to) }
        }));
        let held = |gap: &Gap| self.behind(gap).segment.is_some();
        let last = ends.into_iter().max_by_key(|gap| gap.to_offset);
        Ok(last.filter(|gap| is_plausible(gap) && gap.to_offset >= self.proven && held(gap)))
    }

    fn set_sidecars_aside(&mut self, damage: &[Damage]) {
        let damaged = damage.iter().filter(|damage| damage.kind == DamageKind::Sidecar);
        self.steps.extend(damaged.map(|damage| Step::SetAside { path: damage.path.clone() }));
    }

    /// What recovery would do, once there is nothing left that keeps it from doing it.
    fn plan_recovery(&mut self, damage: &[Damage]) -> Result<(), RepairError> {
        if let Some(replaced) = damage.iter().find(|d| d.kind == DamageKind::HistoryReplaced) {
            self.steps.push(Step::Beyond { damage: replaced.clone() });
        }
        let settled = self.steps.iter().all(|step| matches!(step, Step::SetAside { .. }));
        if !settled || self.role.is_none() {
            return Ok(());
        }
        let survey = recovery::survey(&**self.fs, &self.layout, &self.node, Access::ReadOnly)?;
        if survey.corruption(&self.layout).is_some() {
            return Ok(()); // a mirror that will fetch its tail again
        }
        let (torn_bytes, segments, headers) = survey.pending(&**self.fs, &self.layout)?;
        let mark = damage.iter().any(|damage| matches!(damage.kind, DamageKind::Mark(_)));
        if torn_bytes + segments + headers > 0 || mark {
            self.steps.push(Step::Recover { torn_bytes, segments, headers, mark });
        }
        Ok(())
    }
}

fn extend(files: &mut Vec<(PathBuf, Range<u64>)>, path: &Path, range: Range<u64>) {
    match files.last_mut() {
        Some((last, known)) if last == path && known.end == range.start => known.end = range.end,
        _ => files.push((path.to_owned(), range)),
    }
}

fn gap(from: &Link, to: &Link) -> Gap {
    Gap {
        from: *from,
        to_offset: to.offset,
        to_position: to.position,
        chain: GapChain::AtEnd(to.chain),
        epoch: 0,
        incarnation: Incarnation::default(),
        accepted_at_us: 0,
    }
}

/// Whether so many events fit into so many bytes.
fn is_plausible(gap: &Gap) -> bool {
    let bytes = gap.to_offset.saturating_sub(gap.from.offset);
    gap.events() > 0 && gap.events() <= bytes / RECORD_BYTES_MIN as u64
}

/// The headers of batches from `from` on, none of them within another's bytes.
fn headers_from(
    segment: &Segment,
    page: &SegmentPage,
    from: &Link,
) -> Result<Vec<BatchHeader>, IoError> {
    let mut headers: Vec<BatchHeader> = Vec::new();
    let mut behind = (from.offset, from.position);
    segment.window().headers_behind(
        file_offset(page.header.base_offset, from.offset),
        page,
        |header| {
            if header.offset >= behind.0 && header.base_position >= behind.1 {
                behind = (header.end_offset(), header.end_position());
                headers.push(*header);
            }
        },
    )?;
    Ok(headers)
}

/// The loss in front of the first whole batch behind `from`.
fn next_batch(
    segment: &Segment,
    page: &SegmentPage,
    from: &Link,
    headers: &[BatchHeader],
) -> Result<Option<Gap>, IoError> {
    let mut window = segment.window();
    let mut in_front: Option<&BatchHeader> = None;
    for header in headers {
        let at = file_offset(page.header.base_offset, header.offset);
        let whole = header.offset >= from.offset + BATCH_ALIGNMENT
            && window.batch(at, u64::MAX, page.header.salt)?.is_ok();
        if whole {
            let to = Link {
                offset: header.offset,
                position: header.base_position,
                chain: Chain::default(),
            };
            let known = in_front.filter(|front| {
                front.end_offset() == to.offset && front.end_position() == to.position
            });
            let gap = match known {
                Some(front) => Gap {
                    epoch: front.epoch,
                    incarnation: front.incarnation,
                    ..gap(from, &front.end_link())
                },
                None => Gap { chain: GapChain::Behind(header.chain), ..gap(from, &to) },
            };
            if is_plausible(&gap) {
                return Ok(Some(gap));
            }
        }
        in_front = Some(header);
    }
    Ok(None)
}

fn damage_of(corruption: Corruption) -> Damage {
    Damage {
        path: corruption.path,
        file_offset: corruption.file_offset,
        position: None,
        kind: corruption.kind.into(),
    }
}

/// Whose directory this is. With the step that mends a `node` of which one bit is wrong.
fn find_node(fs: &dyn Fs, layout: &Layout) -> Result<(Node, Option<Role>, Vec<Step>), RepairError> {
    match super::read_node(fs, layout) {
        Ok(Some(node)) => Ok((node, Some(node.role), Vec::new())),
        Ok(None) => Ok((recovery::node_of_copy(fs, layout)?, None, Vec::new())),
        Err(OpenError::Corruption(corruption)) => {
            let path = layout.file(layout::NODE);
            match mended_node(fs, &path)? {
                Some(node) => Ok((node, Some(node.role), vec![Step::MendNode { path }])),
                None => {
                    let damage = damage_of(corruption);
                    let steps = vec![Step::Beyond { damage }];
                    Ok((recovery::node_of_copy(fs, layout)?, None, steps))
                }
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// The only `node` that differs from the file in a single bit: the checksum tells all others apart.
fn mended_node(fs: &dyn Fs, path: &Path) -> Result<Option<Node>, IoError> {
    let file = fs.open(path, OpenMode::Read).context("opening", path)?;
    let mut bytes = [0; NODE_BYTES];
    if fs::read_full_at(&*file, &mut bytes, 0).context("reading", path)? < NODE_BYTES {
        return Ok(None);
    }
    for bit in 0..NODE_BYTES * 8 {
        let mut tried = bytes;
        if let Some(byte) = tried.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        if let Ok(node) = Node::decode(&tried) {
            return Ok(Some(node));
        }
    }
    Ok(None)
}

fn carry_out(
    fs: &dyn Fs,
    layout: &Layout,
    source: Option<&Source>,
    step: &Step,
) -> Result<(), RepairError> {
    fs.create_dir_all(&layout.quarantine()).context("creating", &layout.quarantine())?;
    match step {
        Step::MendNode { path } => {
            if let Some(node) = mended_node(fs, path)? {
                copy_aside(fs, layout, path, 0..u64::MAX)?;
                super::write_node(fs, layout, &node)?;
            }
            Ok(())
        }
        Step::SetAside { path } => {
            fs.rename(path, &aside(layout, path)).context("moving aside", path)?;
            fs.sync_dir(&layout.quarantine()).context("syncing", &layout.quarantine())?;
            Ok(fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?)
        }
        Step::Fetch(fetch) => match source {
            Some(source) => carry_out_fetch(fs, layout, source, fetch),
            None => Ok(()),
        },
        Step::GiveUp { gap, accepted: true, .. } => {
            let (node, ..) = find_node(fs, layout)?;
            let mut gaps = Gaps::read(fs, layout, &node)?;
            gaps.insert(Gap { accepted_at_us: crate::env::now_us(), ..*gap });
            Ok(gaps.write(fs, layout, node.journal)?)
        }
        Step::CutBehindEnd { path, len } => {
            copy_aside(fs, layout, path, *len..u64::MAX)?;
            let file = fs.open(path, OpenMode::Write).context("opening", path)?;
            file.set_len(*len).context("cutting", path)?;
            Ok(file.sync_data().context("syncing", path)?)
        }
        Step::Recover { mark, .. } => carry_out_recovery(fs, layout, *mark),
        Step::GiveUp { .. } | Step::Beyond { .. } => Ok(()),
    }
}

/// Writes the copy's bytes in place, verifying them once more.
fn carry_out_fetch(
    fs: &dyn Fs,
    layout: &Layout,
    source: &Source,
    fetch: &Fetch,
) -> Result<(), RepairError> {
    let changed = || RepairError::SourceChanged { path: source.path.clone() };
    for (path, range) in &fetch.files {
        copy_aside(fs, layout, path, range.clone())?;
    }
    let mut cursor = source.cursor_at(&fetch.from).ok_or_else(changed)?;
    let (mut link, mut open) = (fetch.from, None::<(PathBuf, Arc<dyn File>)>);
    while link.offset < fetch.to.offset {
        let read = cursor.next_batch().ok().flatten().ok_or_else(changed)?;
        if !read.batch.continues(&link, read.page.map(|page| &page.digest)) {
            return Err(changed());
        }
        let path = layout.segment(read.segment);
        let file = match &mut open {
            Some((known, file)) if *known == path => file,
            open => {
                if let Some((path, file)) = open.take() {
                    file.sync_data().context("syncing", &path)?;
                }
                &mut open.insert((path.clone(), open_or_create(fs, &path)?)).1
            }
        };
        if let Some(page) = read.page
            && fetch.files.iter().any(|(known, range)| *known == path && range.start == 0)
        {
            fs::write_all_at(&**file, &page.bytes(), 0).context("writing", &path)?;
        }
        fs::write_all_at(&**file, read.batch.bytes(), read.file_offset())
            .context("writing", &path)?;
        link = read.batch.header.end_link();
    }
    if link != fetch.to {
        return Err(changed());
    }
    if let Some((path, file)) = open {
        file.sync_data().context("syncing", &path)?;
    }
    fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    if fetch.closes_gap {
        let (node, ..) = find_node(fs, layout)?;
        let mut gaps = Gaps::read(fs, layout, &node)?;
        gaps.remove(fetch.from.offset);
        gaps.write(fs, layout, node.journal)?;
    }
    Ok(())
}

fn open_or_create(fs: &dyn Fs, path: &Path) -> Result<Arc<dyn File>, IoError> {
    match fs.open(path, OpenMode::Write) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs.open(path, OpenMode::CreateNew).context("creating", path)
        }
        opened => opened.context("opening", path),
    }
}

/// Recovery, as at every opening for writing. Of a damaged mark both slots are written.
fn carry_out_recovery(fs: &dyn Fs, layout: &Layout, mark: bool) -> Result<(), RepairError> {
    let (node, ..) = find_node(fs, layout)?;
    let survey = recovery::survey(fs, layout, &node, Access::Writer)?;
    let path = layout.file(layout::MARK);
    if mark && fs.open(&path, OpenMode::Read).is_ok() {
        copy_aside(fs, layout, &path, 0..u64::MAX)?;
    }
    let mut recovered = recovery::mend(fs, layout, &node, survey, 0)?;
    if !mark {
        return Ok(());
    }
    let (end, witness) = (recovered.end, recovered.witness);
    recovered.mark.lower(Mark { sequence: 0, end, closed: false, witness, salt: 0 })?;
    let file = recovered.mark.file();
    for slot in [0, MARK_SLOT_STRIDE] {
        let between = slot + MARK_SLOT_BYTES as u64..slot + MARK_SLOT_STRIDE;
        fs::write_zeros(&*file, between).context("writing", &path)?;
    }
    file.set_len(MARK_FILE_BYTES as u64).context("cutting", &path)?;
    Ok(file.sync_data().context("syncing", &path)?)
}

fn aside(layout: &Layout, path: &Path) -> PathBuf {
    let name = path.file_name().and_then(std::ffi::OsStr::to_str).unwrap_or("file");
    let unique = crate::env::random_u64();
    layout.quarantine().join(format!("{name}-{unique:016x}.damaged"))
}

/// Copies what a file holds within `range` into the quarantine, durably, if there is anything but zeros.
fn copy_aside(fs: &dyn Fs, layout: &Layout, path: &Path, range: Range<u64>) -> Result<(), IoError> {
    let file = match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        opened => opened.context("opening", path)?,
    };
    let end = file.size().context("measuring", path)?.min(range.end);
    let mut window = Window::new(file, path.to_owned());
    let mut at = range.start;
    let mut copy: Option<(PathBuf, Arc<dyn File>)> = None;
    while at < end {
        let bytes = window.read(at, 64 * 1024, end)?;
        if bytes.is_empty() {
            break;
        }
        let len = bytes.len() as u64;
        if copy.is_none() && bytes.iter().any(|&byte| byte != 0) {
            let to = aside(layout, path);
            let file = fs.open(&to, OpenMode::CreateNew).context("creating", &to)?;
            copy = Some((to, file));
        }
        // Zeros in front of the first other byte are left out by writing behind them.
        if let Some((to, copy)) = &copy {
            fs::write_all_at(&**copy, bytes, at - range.start).context("writing", to)?;
        }
        at += len;
    }
    if let Some((to, copy)) = copy {
        copy.sync_data().context("syncing", &to)?;
        fs.sync_dir(&layout.quarantine()).context("syncing", &layout.quarantine())?;
    }
    Ok(())
}
