//! Reading every byte of a journal to find out whether it is still what was written.
//!
//! ```text
//!   node, mark ─▶ headers ─▶ for each segment: batch by batch from genesis ─▶ its tail ─▶ its sidecar
//!                   └▶ proven                   └▶ claims behind the place where the batches stop
//! ```
//! Changes nothing, takes no lock, and may run beside the journal's writer. Every finding is certain even
//! then, because it rests on an order that the writer keeps:
//! - Whatever a mark or a header claims to be durable was written before the claim. A claim that was read
//!   first must be met by bytes that are read afterwards; so the mark is read first, then the names of the
//!   segments, then their headers, and where the batches stop in front of a claim that was found later, the
//!   place is read once more.
//! - An opening clears the mark's `closed` flag before it writes anything else; so what lies behind the end
//!   of a journal whose mark is *still* closed afterwards was not written by anybody.
//! - A sidecar gets its name when it is whole and synced.
//!
//! What lies behind the proven end of a journal that wasn't closed is no damage: a group that is being
//! written, or one that a crash interrupted. It is counted, and left to recovery.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{CorruptionKind, IoContext, IoError, OpenError};
use crate::format::FormatError;
use crate::format::batch::Link;
use crate::format::files::{
    MARK_FILE_BYTES, MARK_SLOT_BYTES, MARK_SLOT_STRIDE, Mark, NODE_BYTES, Node, Role,
};
use crate::format::gaps::Gap;
use crate::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use crate::format::sidecar::{self, SegmentIndex, SidecarKey};
use crate::fs::{self, File, Fs, OpenMode};
use crate::journal::base::{Base, Start};
use crate::journal::gaps::{self, Gaps, Joint};
use crate::journal::layout::{self, Layout};
use crate::journal::order::Order;
use crate::journal::recovery;
use crate::journal::scan::{Window, file_offset, header_page, open_if_there};
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// Something in a journal that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: damage at byte {file_offset} of the file: {kind}", path.display())]
#[non_exhaustive]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// Byte in the file.
    pub file_offset: u64,
    /// Position of the first event that may be affected; `None` if no event is.
    pub position: Option<Position>,
    /// What is wrong there.
    pub kind: DamageKind,
}

/// What is wrong with a file of a journal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DamageKind {
    /// Events can't be read.
    #[error(transparent)]
    Data(#[from] CorruptionKind),
    /// A part of a header page, of which another copy is valid.
    #[error("damaged header page; one copy of the header is valid")]
    HeaderCopy,
    /// The `node` file.
    #[error("damaged node file: {0}")]
    Node(FormatError),
    /// A part of the `mark` file.
    #[error("damaged mark: {0}")]
    Mark(FormatError),
    /// The mark was written in another history than the one that the segments hold.
    #[error("the history here is not the one that was marked durable")]
    HistoryReplaced,
    /// The events are what was written, but break an order that every writer keeps.
    #[error("undamaged, but written wrongly: {0}")]
    Order(&'static str),
    /// A sidecar doesn't describe its segment.
    #[error("the sidecar does not describe its segment")]
    Sidecar,
}

impl Damage {
    /// A stable name of the kind of damage.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match &self.kind {
            DamageKind::Data(kind) => match kind {
                CorruptionKind::Batch(_) => "damage.batch",
                CorruptionKind::Chain => "damage.chain",
                CorruptionKind::SegmentHeader(_) => "damage.segment_header",
                CorruptionKind::SegmentLink => "damage.segment_link",
                CorruptionKind::MissingSegment => "damage.missing_segment",
                CorruptionKind::LostTail { .. } => "damage.lost_tail",
                CorruptionKind::BehindEnd => "damage.behind_end",
                CorruptionKind::Gaps(_) => "damage.gaps",
                CorruptionKind::Base(_) => "damage.base",
                CorruptionKind::Record(_) => "damage.record",
            },
            DamageKind::HeaderCopy => "damage.header_copy",
            DamageKind::Node(_) => "damage.node",
            DamageKind::Mark(_) => "damage.mark",
            DamageKind::HistoryReplaced => "damage.history_replaced",
            DamageKind::Order(_) => "damage.order",
            DamageKind::Sidecar => "damage.sidecar",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match &self.kind {
            DamageKind::Data(CorruptionKind::BehindEnd) => {
                "no event is affected; the next opening of an active segment sets these bytes aside"
            }
            DamageKind::Data(CorruptionKind::Base(_)) => {
                "close the store and put back the file `base` of a backup that begins at the same position; while only one copy of its header is damaged, the next opening remakes it"
            }
            DamageKind::Data(_) => {
                "`headwater repair --from` a mirror or a backup puts the lost bytes back; `headwater repair` tells what else can be done"
            }
            DamageKind::Order(_) => {
                "the bytes are intact, so no copy helps: report the bug with the versions that wrote here; `headwater cat` exports the events"
            }
            DamageKind::HeaderCopy => {
                "no event is affected; replace the disk if this repeats. The next opening remakes the page"
            }
            DamageKind::Node(_) => "restore the file `node` from a copy of this very directory",
            DamageKind::Mark(_) => {
                "no event is affected; replace the disk if this repeats. The next commits rewrite it"
            }
            DamageKind::HistoryReplaced => {
                "put back the original segments, or restore the whole directory, mark included, from one backup"
            }
            DamageKind::Sidecar => {
                "no event is affected; close the store and delete the file, the next opening writes it again"
            }
        }
    }
}

/// What a segment file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentState {
    /// Closed for ever.
    Sealed,
    /// The one that is written, or the last one.
    Active,
    /// Prepared and unused.
    Spare,
    /// Behind the proven end, and no continuation of it: left by a crash.
    Unacknowledged,
    /// Within a range that was lost and accepted as lost.
    GivenUp,
    /// In front of the journal's beginning: left by a retention that was cut short. The next opening removes
    /// it.
    Removed,
}

/// What was found in one segment file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentCheck {
    /// Its number.
    pub number: u64,
    /// Its file.
    pub path: PathBuf,
    /// What it is.
    pub state: SegmentState,
    /// Position of its first event.
    pub base_position: Position,
    /// Position behind its last valid event.
    pub end_position: Position,
    /// How many valid batches it holds.
    pub batches: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Whether it has a sidecar that was compared with it.
    pub sidecar: bool,
}

/// The outcome of [`verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The journal.
    pub journal: JournalId,
    /// Origin or mirror; `None` for a copy, which has no valid `node`.
    pub role: Option<Role>,
    /// Every segment file, by number.
    pub segments: Vec<SegmentCheck>,
    /// Position of the first event; those in front were removed.
    pub first: Position,
    /// Positions of events that were lost and [accepted as lost](crate::repair): no damage any more.
    pub lost: Vec<std::ops::Range<Position>>,
    /// The first damage of each file, in the order in which it was found. Empty: the journal is healthy.
    pub damage: Vec<Damage>,
    /// End of the valid prefix.
    pub end: Checkpoint,
    /// The offset up to which the journal is known to have been durable.
    pub proven_offset: u64,
    /// The journal was closed cleanly at its end.
    pub closed: bool,
    /// Valid events, also behind a damaged place.
    pub events: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes behind the proven end that are no valid batches: they were never acknowledged.
    pub unacknowledged_bytes: u64,
}

impl VerifyReport {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.damage.is_empty()
    }
}

/// How far [`verify`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Bytes of segments read.
    pub bytes_done: u64,
    /// Bytes of segments there are.
    pub bytes_total: u64,
}

/// Reads every byte of the journal in `dir`: header pages, batches, their chain from genesis, padding, what
/// lies behind the end, sidecars, `base`, `gaps`, `node` and `mark`, but neither maps nor `leases`. Changes
/// nothing and takes no lock; may run beside the writer. Calls `progress` from time to time.
///
/// Blocks for reading the whole journal.
///
/// ```
/// use headwater::fs::os::OsFs;
/// # let dir = tempfile::tempdir()?;
/// # let store = headwater::Store::create(dir.path())?;
/// let report = headwater::verify(&OsFs, &dir.path().join("journal"), &mut |_| {})?;
/// assert!(report.is_healthy());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`OpenError`] if there is no journal, if it was written by a later version, or if a file can't be read.
/// Damage is no error: it is in the report.
pub fn verify(
    fs: &dyn Fs,
    dir: &Path,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, OpenError> {
    run(fs, dir, false, progress)
}

/// The same, and what checksums and chain can't tell: whether the writers kept every order that readers rely
/// on. Revisions of each stream are consecutive through the whole journal, epochs never go back, an epoch has
/// one incarnation, and what batches claim to be durable never goes back and ends where a batch ends.
///
/// Blocks like [`verify`], and needs memory for the name of every stream.
///
/// # Errors
/// As [`verify`].
pub fn verify_deep(
    fs: &dyn Fs,
    dir: &Path,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, OpenError> {
    run(fs, dir, true, progress)
}

fn run(
    fs: &dyn Fs,
    dir: &Path,
    deep: bool,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, OpenError> {
    let layout = Layout::new(dir);
    let mut damage = Vec::new();
    let (node, role) = find_node(fs, &layout, &mut damage)?;
    // A writer may remove segments between two looks at them.
    super::unchanged_base(fs, &layout, node.journal, || {
        run_once(fs, &layout, (node, role), damage.clone(), deep, progress)
    })
}

fn run_once(
    fs: &dyn Fs,
    layout: &Layout,
    (node, role): (Node, Option<Role>),
    mut damage: Vec<Damage>,
    deep: bool,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, OpenError> {
    let dir = &layout.dir;
    let marks = Marks::read(fs, layout)?; // what it vouches for is there when the names are listed
    let base = Base::read(fs, layout, node.journal)?;
    let start = Start::of(base.as_ref(), node.journal);
    let names = fs.list(dir).context("listing", dir)?;
    let heads = names
        .iter()
        .filter_map(|name| layout::number_of(name, "seg"))
        .filter_map(|number| Head::open(fs, layout, &node, number).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    // The mark's file is durable before the first segment is made.
    damage.extend(marks.damage(layout, role.is_some() && heads.iter().any(Head::is_used)));
    let mark = start.mark(marks.best());
    let gaps = Gaps::read(fs, layout, &node)?;
    let (removed, heads): (Vec<_>, Vec<_>) =
        heads.into_iter().partition(|head| head.number < start.segment);
    let mut verifier =
        Verifier::new(fs, layout, (node, role), &start, mark, &heads, damage, progress);
    verifier.report.proven_offset = verifier.report.proven_offset.max(gaps.end_offset());
    if let Some(base) = &base {
        verifier.base(base, &removed)?;
    }
    let lost = gaps.all().iter().map(|gap| gap.from.position..gap.to_position);
    verifier.report.lost = lost.collect();
    verifier.gaps = gaps;
    verifier.order = deep.then(Order::default);
    if let (Some(order), Some(base)) = (&mut verifier.order, &base) {
        order.begin_at(base);
    }
    if let Some(mark) = mark.filter(|mark| mark.end.journal != node.journal) {
        verifier.damage(
            layout.file(layout::MARK),
            0,
            mark.end.position,
            DamageKind::HistoryReplaced,
        );
    }
    verifier.segments(&heads)?;
    Ok(verifier.finish())
}

/// The identity of the directory; `None` as role if there is no valid `node`.
fn find_node(
    fs: &dyn Fs,
    layout: &Layout,
    damage: &mut Vec<Damage>,
) -> Result<(Node, Option<Role>), OpenError> {
    match super::read_node(fs, layout) {
        Ok(Some(node)) if node_len(fs, layout)? == NODE_BYTES as u64 => Ok((node, Some(node.role))),
        Ok(Some(node)) => {
            damage.push(node_damage(layout, FormatError::Invalid("length")));
            Ok((node, Some(node.role)))
        }
        Ok(None) => Ok((recovery::node_of_copy(fs, layout)?, None)),
        Err(OpenError::Corruption(corruption)) => {
            let why = match corruption.kind {
                CorruptionKind::SegmentHeader(error) => error,
                _ => FormatError::HeaderChecksum,
            };
            damage.push(node_damage(layout, why));
            // Without its role nothing but the mark proves anything.
            let copy = recovery::node_of_copy(fs, layout);
            let copy = copy.map_err(|_| OpenError::Corruption(corruption))?;
            Ok((Node { role: Role::Mirror, node: NodeId::from_bytes([0; 16]), ..copy }, None))
        }
        Err(error) => Err(error),
    }
}

fn node_len(fs: &dyn Fs, layout: &Layout) -> Result<u64, IoError> {
    let path = layout.file(layout::NODE);
    let file = fs.open(&path, OpenMode::Read).context("opening", &path)?;
    file.size().context("measuring", &path)
}

fn node_damage(layout: &Layout, why: FormatError) -> Damage {
    let path = layout.file(layout::NODE);
    Damage { path, file_offset: 0, position: None, kind: DamageKind::Node(why) }
}

/// The whole `mark` file.
struct Marks {
    bytes: Vec<u8>,
    slots: [Option<Result<Mark, FormatError>>; 2],
}

impl Marks {
    fn read(fs: &dyn Fs, layout: &Layout) -> Result<Self, IoError> {
        let mut marks = Self::read_once(fs, layout)?;
        // The writer may be writing a slot right now; it writes it at once, and the other one next.
        for _ in 0..8 {
            if marks.slots.iter().flatten().all(Result::is_ok) {
                break;
            }
            marks = Self::read_once(fs, layout)?;
        }
        Ok(marks)
    }

    fn read_once(fs: &dyn Fs, layout: &Layout) -> Result<Self, IoError> {
        let path = layout.file(layout::MARK);
        let file = match fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { bytes: Vec::new(), slots: [None, None] });
            }
            Err(error) => return Err(IoError::new("opening", &path, error)),
        };
        let mut bytes = vec![0; MARK_FILE_BYTES + 1];
        let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", &path)?;
        bytes.truncate(read);
        let slot = |index: usize| {
            let at = index * MARK_SLOT_STRIDE as usize;
            let slot = bytes.get(at..at + MARK_SLOT_BYTES).unwrap_or_default();
            (!slot.iter().all(|&byte| byte == 0)).then(|| Mark::decode(slot))
        };
        let slots = [slot(0), slot(1)];
        Ok(Self { bytes, slots })
    }

    fn best(&self) -> Option<Mark> {
        let valid = self.slots.iter().flatten().filter_map(|slot| slot.ok());
        valid.max_by_key(|mark| (mark.end.offset, mark.sequence))
    }

    /// `expected`: there are segments that were written here, so there must be a mark.
    fn damage(&self, layout: &Layout, expected: bool) -> Option<Damage> {
        let damage = |file_offset, error| Damage {
            path: layout.file(layout::MARK),
            file_offset,
            position: None,
            kind: DamageKind::Mark(error),
        };
        for (index, slot) in self.slots.iter().enumerate() {
            if let Some(Err(error)) = slot {
                return Some(damage(index as u64 * MARK_SLOT_STRIDE, *error));
            }
        }
        let stray =
            self.bytes.iter().enumerate().position(|(at, &byte)| {
                at % MARK_SLOT_STRIDE as usize >= MARK_SLOT_BYTES && byte != 0
            });
        if let Some(at) = stray {
            return Some(damage(at as u64, FormatError::Invalid("bytes between the slots")));
        }
        let written = self.slots.iter().any(Option::is_some);
        let len = self.bytes.len();
        match len.cmp(&MARK_FILE_BYTES) {
            std::cmp::Ordering::Less if written || expected => {
                Some(damage(len as u64, FormatError::Truncated))
            }
            std::cmp::Ordering::Greater => {
                Some(damage(MARK_FILE_BYTES as u64, FormatError::Invalid("length")))
            }
            _ => None,
        }
    }
}

/// A segment file and its header page.
struct Head {
    number: u64,
    path: PathBuf,
    file: Arc<dyn File>,
    len: u64,
    page: PageState,
    /// The first byte of the header page that isn't as it should be.
    page_differs_at: Option<u64>,
}

impl Head {
    /// `None` if it has gone: a live writer removes a spare that it doesn't need.
    fn open(
        fs: &dyn Fs,
        layout: &Layout,
        node: &Node,
        number: u64,
    ) -> Result<Option<Self>, OpenError> {
        let path = layout.segment(number);
        let Some(file) = open_if_there(fs, &path)? else { return Ok(None) };
        drop(file.drop_cache()); // an effort: the disk is to be verified, not the cache
        let len = file.size().context("measuring", &path)?;
        let (bytes, is_lost) = header_page(&file, &path)?;
        let mut page = SegmentPage::read(&bytes);
        let mut page_differs_at = None;
        match &page {
            PageState::Invalid(source @ FormatError::Unsupported { .. }) => {
                return Err(OpenError::Unsupported { path, source: *source });
            }
            PageState::Valid { page: valid, intact } => {
                if !intact {
                    let right = valid.bytes();
                    let at = bytes.iter().zip(&right).position(|(found, right)| found != right);
                    page_differs_at = at.map(|at| at as u64);
                }
                if valid.header.journal != node.journal {
                    page = PageState::Invalid(FormatError::Invalid("journal id"));
                } else if valid.header.number != number {
                    page = PageState::Invalid(FormatError::Invalid("segment number"));
                }
            }
            _ => {}
        }
        if is_lost {
            page = PageState::Invalid(FormatError::Magic);
        }
        Ok(Some(Self { number, path, file, len, page, page_differs_at }))
    }

    fn valid(&self) -> Option<&SegmentPage> {
        match &self.page {
            PageState::Valid { page, .. } => Some(page),
            _ => None,
        }
    }

    fn is_used(&self) -> bool {
        self.page != PageState::Zero
    }

    fn window(&self) -> Window {
        Window::new(Arc::clone(&self.file), self.path.clone())
    }
}

/// Where the batches of a segment stop, and why.
struct Stop {
    end: Link,
    kind: CorruptionKind,
    /// How many valid batches lie in front.
    batches: u64,
    /// What follows was given up; the journal goes on in a later segment.
    at_gap: bool,
}

impl Stop {
    /// Nothing lies there, as at every end.
    fn is_orderly(&self) -> bool {
        use FormatError::{Magic, Truncated};
        matches!(self.kind, CorruptionKind::Batch(Magic | Truncated))
    }
}

struct Verifier<'a> {
    fs: &'a dyn Fs,
    layout: &'a Layout,
    role: Role,
    mark: Option<Mark>,
    gaps: Gaps,
    order: Option<Order>,
    /// Every segment with a valid header: its number and its base.
    bases: Vec<(u64, u64)>,
    report: VerifyReport,
    /// The mark's place was found, and it is the mark's history.
    mark_seen: bool,
    /// The prefix goes on: nothing was damaged so far.
    unbroken: bool,
    start: Start,
    progress: &'a mut dyn FnMut(VerifyProgress),
    bytes_total: u64,
    reported_bytes: u64,
}

impl<'a> Verifier<'a> {
    #[allow(clippy::too_many_arguments, reason = "called once, with what was read first")]
    fn new(
        fs: &'a dyn Fs,
        layout: &'a Layout,
        (node, role): (Node, Option<Role>),
        start: &Start,
        mark: Option<Mark>,
        heads: &[Head],
        damage: Vec<Damage>,
        progress: &'a mut dyn FnMut(VerifyProgress),
    ) -> Self {
        let claims = heads.iter().filter_map(Head::valid).map(|page| page.header.durable_offset);
        let claimed = if node.role.appends() { claims.max().unwrap_or(0) } else { 0 };
        let marked = mark.map_or(0, |mark| mark.end.offset);
        let claimed = if node.role.appends() { claimed.max(start.proven) } else { claimed };
        let end = start.checkpoint;
        Self {
            fs,
            layout,
            role: node.role,
            mark,
            gaps: Gaps::default(),
            order: None,
            bases: heads
                .iter()
                .filter_map(|head| Some((head.number, head.valid()?.header.base_offset)))
                .collect(),
            report: VerifyReport {
                journal: node.journal,
                role,
                first: start.checkpoint.position,
                lost: Vec::new(),
                segments: Vec::new(),
                damage,
                end,
                proven_offset: claimed.max(marked),
                closed: false,
                events: 0,
                bytes_read: 0,
                unacknowledged_bytes: 0,
            },
            mark_seen: mark.is_some_and(|mark| {
                mark.end.offset == end.offset
                    && mark.end.position == end.position
                    && mark.end.chain == end.chain
            }),
            unbroken: true,
            start: *start,
            progress,
            bytes_total: heads.iter().map(|head| head.len).sum(),
            reported_bytes: 0,
        }
    }

    fn damage(&mut self, path: PathBuf, at: u64, position: Position, kind: DamageKind) {
        if self.report.damage.iter().all(|known| known.path != path) {
            let position = Some(position);
            self.report.damage.push(Damage { path, file_offset: at, position, kind });
        }
    }

    fn read(&mut self, bytes: u64) {
        self.report.bytes_read += bytes;
        if self.report.bytes_read - self.reported_bytes >= 1 << 20 {
            self.reported_bytes = self.report.bytes_read;
            let (bytes_done, bytes_total) = (self.report.bytes_read, self.bytes_total);
            (self.progress)(VerifyProgress { bytes_done, bytes_total });
        }
    }

    /// Whether bytes at `offset` must be what was written: they had been durable, or the journal was closed
    /// there and nobody has opened it since.
    fn must_hold(&self, offset: u64) -> Result<bool, IoError> {
        Ok(self.report.proven_offset > offset || self.is_closed_at(offset)?)
    }

    /// Whether the journal was closed at `offset` and still is.
    fn is_closed_at(&self, offset: u64) -> Result<bool, IoError> {
        let Some(mark) = self.mark.filter(|mark| mark.closed && mark.end.offset == offset) else {
            return Ok(false);
        };
        Ok(Marks::read(self.fs, self.layout)?.best() == Some(mark))
    }

    fn segments(&mut self, heads: &[Head]) -> Result<(), OpenError> {
        let used: Vec<&Head> = heads.iter().filter(|head| head.is_used()).collect();
        for spare in heads.iter().filter(|head| !head.is_used()) {
            self.read(spare.len);
            self.note(spare, SegmentState::Spare, Position::START, Position::START, 0, false);
        }
        let mut link = Some(self.start.link());
        let mut next_number = self.start.segment;
        for (index, head) in used.iter().enumerate() {
            let next = used.get(index + 1).filter(|next| next.number == head.number + 1);
            let missing = head.number != next_number;
            next_number = head.number + 1;
            if let Some(gap) = self.gap_in_front(head, link, missing) {
                if self.holder(&gap) != Some(head.number) {
                    let position = gap.from.position;
                    self.read(head.len);
                    self.note(head, SegmentState::GivenUp, position, position, 0, false);
                    continue;
                }
                // It begins within the gap, and nothing in front of it is left; or where the gap ends.
                link = self.cross(&gap).filter(|end| begins_at(head, end.offset));
                let outcome = match head.valid() {
                    Some(page) if self.links(head, page, link)? => {
                        let next = next.and_then(|next| next.valid());
                        self.segment(head, page, next, index + 1 == used.len())?
                    }
                    _ => Outcome::Damaged,
                };
                match outcome {
                    Outcome::Continues(end) => link = Some(end),
                    Outcome::Damaged => link = None,
                    Outcome::Ends => return self.unacknowledged(&used[index + 1..]),
                }
                continue;
            }
            if missing && !self.gap(self.layout.segment(head.number - 1), link)? {
                return self.unacknowledged(&used[index..]);
            }
            let link_here = link.filter(|_| !missing);
            let Some(page) = head.valid() else {
                if !self.lost_header(head, link_here)? {
                    return self.unacknowledged(&used[index..]);
                }
                self.unbroken = false;
                if let Some(order) = &mut self.order {
                    order.interrupt();
                }
                link = None;
                continue;
            };
            if !self.links(head, page, link_here)? {
                return self.unacknowledged(&used[index..]);
            }
            let last = index + 1 == used.len();
            match self.segment(head, page, next.and_then(|next| next.valid()), last)? {
                Outcome::Continues(end) => link = Some(end),
                Outcome::Damaged => link = None,
                Outcome::Ends => return self.unacknowledged(&used[index + 1..]),
            }
        }
        if used.is_empty() && self.report.proven_offset > 0 {
            let path = self.layout.segment(self.start.segment);
            let kind = CorruptionKind::MissingSegment.into();
            self.damage(path, 0, self.start.checkpoint.position, kind);
        }
        Ok(())
    }

    /// Reads the base; what is left of the segments below it is no part of the journal any more.
    fn base(&mut self, base: &Arc<Base>, removed: &[Head]) -> Result<(), IoError> {
        let (damage, bytes) = base.check()?;
        self.bytes_total += bytes;
        self.read(bytes);
        if let Some(damage) = damage {
            self.damage(damage.path, damage.file_offset, damage.position, damage.kind.into());
        }
        let position = self.start.checkpoint.position;
        for head in removed {
            self.read(head.len);
            self.note(head, SegmentState::Removed, position, position, 0, false);
        }
        Ok(())
    }

    /// The gap that explains why a segment doesn't follow the one in front.
    fn gap_in_front(&self, head: &Head, link: Option<Link>, missing: bool) -> Option<Gap> {
        let link = link?;
        let gap = self.gaps.at(&link)?;
        let follows = head.valid().is_some_and(|page| {
            page.header.base_offset == link.offset && page.header.previous_chain == link.chain
        });
        (missing || !follows).then_some(*gap)
    }

    /// Number of the segment in which the journal goes on behind `gap`.
    fn holder(&self, gap: &Gap) -> Option<u64> {
        let holds = self.bases.iter().filter(|(_, base)| *base <= gap.to_offset);
        holds.max_by_key(|(_, base)| *base).map(|(number, _)| *number)
    }

    /// The prefix goes on behind `gap`: its end, if the chain there is known.
    fn cross(&mut self, gap: &Gap) -> Option<Link> {
        if let Some(order) = &mut self.order {
            order.interrupt();
        }
        if let Some(mark) = self.mark {
            let within = mark.end.offset > gap.from.offset && mark.end.offset < gap.to_offset;
            self.mark_seen |= within && self.unbroken;
        }
        let end = gaps::end_of(gap, self.report.journal)?;
        self.advance(end);
        Some(Joint::behind(gap).link)
    }

    /// A number is missing in front of a used segment; whether that is damage.
    fn gap(&mut self, path: PathBuf, link: Option<Link>) -> Result<bool, IoError> {
        let must = link.map_or(Ok(true), |link| self.must_hold(link.offset))?;
        if must {
            let position = self.report.end.position;
            self.damage(path, 0, position, CorruptionKind::MissingSegment.into());
            self.unbroken = false;
            if let Some(order) = &mut self.order {
                order.interrupt();
            }
        }
        Ok(must)
    }

    /// Neither copy of a header can be read; whether that is damage.
    fn lost_header(&mut self, head: &Head, link: Option<Link>) -> Result<bool, IoError> {
        let must = link.map_or(Ok(true), |link| self.must_hold(link.offset))?;
        if let (true, PageState::Invalid(error)) = (must, &head.page) {
            self.read(head.len);
            let position = self.report.end.position;
            self.damage(
                head.path.clone(),
                0,
                position,
                CorruptionKind::SegmentHeader(*error).into(),
            );
            self.note(head, SegmentState::Active, position, position, 0, false);
        }
        Ok(must)
    }

    /// Compares a segment's header with the end of the one in front; whether the segment counts.
    fn links(
        &mut self,
        head: &Head,
        page: &SegmentPage,
        link: Option<Link>,
    ) -> Result<bool, IoError> {
        let header = &page.header;
        if let Some(at) = head.page_differs_at
            && self.must_hold(header.base_offset)?
        {
            self.damage(head.path.clone(), at, header.base_position, DamageKind::HeaderCopy);
        }
        let Some(link) = link else { return Ok(true) };
        let same = header.base_offset == link.offset
            && header.base_position == link.position
            && header.previous_chain == link.chain;
        if same {
            return Ok(true);
        }
        let must = self.must_hold(link.offset)?;
        if must {
            let kind = CorruptionKind::SegmentLink.into();
            self.damage(head.path.clone(), 0, link.position, kind);
            self.unbroken = false;
        }
        Ok(must)
    }

    /// Reads a segment from its first batch to the end of its file.
    fn segment(
        &mut self,
        head: &Head,
        page: &SegmentPage,
        next: Option<&SegmentPage>,
        last: bool,
    ) -> Result<Outcome, OpenError> {
        let header = page.header;
        let base = Link {
            offset: header.base_offset,
            position: header.base_position,
            chain: header.previous_chain,
        };
        self.read(HEADER_PAGE_BYTES as u64);
        let sealed_end = next.map(|next| next.header.base_offset);
        let mut index = SegmentIndex::default();
        let mut stop = self.batches(head, page, base, sealed_end, &mut index)?;
        let mut batches = stop.batches;
        while !stop.at_gap
            && sealed_end != Some(stop.end.offset)
            && self.claimed_behind(head, page, &stop)?
        {
            // What the claim vouches for had been written before it: if it isn't there now, it is lost.
            let again = self.batches(head, page, stop.end, sealed_end, &mut index)?;
            batches += again.batches;
            let goes_on = again.batches > 0;
            stop = again;
            if !goes_on {
                break;
            }
        }
        let outcome = match stop.at_gap {
            true => {
                let at = file_offset(header.base_offset, stop.end.offset);
                self.read(head.len.saturating_sub(at));
                Outcome::Continues(stop.end)
            }
            false => self.judge(head, page, &stop, sealed_end, last)?,
        };
        let sealed = sealed_end == Some(stop.end.offset);
        // The sidecar of a segment that has lost events may still know them.
        let whole = !self.gaps.touch(header.base_offset..stop.end.offset);
        let sidecar = sealed && whole && self.sidecar(page, &stop.end, &index)?;
        let state = if sealed || !last { SegmentState::Sealed } else { SegmentState::Active };
        self.note(head, state, header.base_position, stop.end.position, batches, sidecar);
        Ok(outcome)
    }

    /// Reads batches from `from` on for as long as they are valid and continue each other.
    fn batches(
        &mut self,
        head: &Head,
        page: &SegmentPage,
        from: Link,
        sealed_end: Option<u64>,
        index: &mut SegmentIndex,
    ) -> Result<Stop, OpenError> {
        let (base, salt) = (page.header.base_offset, page.header.salt);
        let mut window = head.window();
        let (mut joint, mut batches) = (Joint::from(from), 0);
        while sealed_end.is_none_or(|end| joint.link.offset < end) {
            let link = joint.link;
            let at = file_offset(base, link.offset);
            let stop = |kind| Stop { end: link, kind, batches, at_gap: false };
            let gap = self.gaps.at(&link).filter(|_| joint.behind.is_none()).copied();
            if let Some(gap) = gap {
                if sealed_end != Some(gap.to_offset) && self.holder(&gap) != Some(head.number) {
                    let kind = CorruptionKind::Batch(FormatError::Magic);
                    return Ok(Stop { at_gap: true, ..stop(kind) });
                }
                self.cross(&gap);
                joint = Joint::behind(&gap);
                continue;
            }
            let batch = match window.batch(at, u64::MAX, salt)? {
                Ok(batch) => batch,
                Err(source @ FormatError::Unsupported { .. }) => {
                    return Err(OpenError::Unsupported { path: head.path.clone(), source });
                }
                Err(error) => return Ok(stop(CorruptionKind::Batch(error))),
            };
            let first = link.offset == base;
            if !joint.is_continued_by(&batch, first.then_some(&page.digest)) {
                return Ok(stop(CorruptionKind::Chain));
            }
            if let Err(error) = batch.check_records().and_then(|()| index.add(&batch)) {
                return Ok(stop(CorruptionKind::Record(error)));
            }
            let header = batch.header;
            if let Some(Err(broken)) = self.order.as_mut().map(|order| order.add(&batch)) {
                let kind = DamageKind::Order(broken.rule);
                self.damage(head.path.clone(), at, broken.position, kind);
            }
            let link = header.end_link();
            joint = link.into();
            batches += 1;
            self.report.events += u64::from(header.count);
            self.advance(Checkpoint {
                journal: self.report.journal,
                epoch: header.epoch,
                incarnation: header.incarnation,
                offset: link.offset,
                position: link.position,
                chain: link.chain,
            });
            self.read(u64::from(header.padded_len));
        }
        let kind = CorruptionKind::Batch(FormatError::Truncated);
        Ok(Stop { end: joint.link, kind, batches, at_gap: false })
    }

    /// The valid prefix reaches to `end`.
    fn advance(&mut self, end: Checkpoint) {
        if !self.unbroken {
            return;
        }
        self.report.end = end;
        if let Some(mark) = self.mark.filter(|mark| mark.end.offset == end.offset) {
            self.mark_seen = mark.end.position == end.position && mark.end.chain == end.chain;
        }
    }

    /// Looks for what claims more to be durable behind the place where the batches stop; whether there is anything.
    fn claimed_behind(
        &mut self,
        head: &Head,
        page: &SegmentPage,
        stop: &Stop,
    ) -> Result<bool, IoError> {
        let at = file_offset(page.header.base_offset, stop.end.offset);
        let claims = head.window().claims_behind(at, page, self.role, |_| {})?;
        let claimed = claims.durable_offset;
        self.report.proven_offset = self.report.proven_offset.max(claimed);
        Ok(claimed > stop.end.offset)
    }

    /// Decides what it means that a segment's batches stop where they do.
    fn judge(
        &mut self,
        head: &Head,
        page: &SegmentPage,
        stop: &Stop,
        sealed_end: Option<u64>,
        last: bool,
    ) -> Result<Outcome, IoError> {
        let end = stop.end;
        let at = file_offset(page.header.base_offset, end.offset);
        let mut window = head.window();
        let tail = window.last_non_zero(at)?;
        self.read(head.len.saturating_sub(at));
        let reached = sealed_end.is_some_and(|sealed| end.offset >= sealed);
        // Without a readable successor, an orderly end may be the true one: the successor is judged next.
        let may_end_here = sealed_end.is_none() && !last && stop.is_orderly() && tail.is_none();
        if reached || may_end_here {
            if tail.is_some() {
                let at = first_non_zero(&mut window, at, head.len)?;
                let kind = CorruptionKind::BehindEnd.into();
                self.damage(head.path.clone(), at, end.position, kind);
            }
            return Ok(Outcome::Continues(end));
        }
        if self.report.proven_offset > end.offset {
            let proven = self.report.proven_offset;
            let kind = match &stop.kind {
                _ if stop.is_orderly() => CorruptionKind::LostTail { proven },
                kind => kind.clone(),
            };
            self.damage(head.path.clone(), at, end.position, kind.into());
            self.unbroken = false;
            if let Some(order) = &mut self.order {
                order.interrupt();
            }
            return Ok(Outcome::Damaged);
        }
        if let Some(to) = tail {
            if self.is_closed_at(end.offset)? {
                let at = first_non_zero(&mut window, at, head.len)?;
                let kind = CorruptionKind::BehindEnd.into();
                self.damage(head.path.clone(), at, end.position, kind);
            } else {
                self.report.unacknowledged_bytes += to - at;
            }
        }
        Ok(Outcome::Ends)
    }

    /// Segments behind the proven end that don't continue it.
    fn unacknowledged(&mut self, heads: &[&Head]) -> Result<(), OpenError> {
        for head in heads {
            self.read(head.len);
            let position = self.report.end.position;
            if self.is_closed_at(self.report.end.offset)? {
                let kind = CorruptionKind::BehindEnd.into();
                self.damage(head.path.clone(), 0, position, kind);
            }
            self.report.unacknowledged_bytes += head.len;
            self.note(head, SegmentState::Unacknowledged, position, position, 0, false);
        }
        Ok(())
    }

    /// Compares a sealed segment's sidecar with what was read; whether there was one to compare.
    fn sidecar(
        &mut self,
        page: &SegmentPage,
        end: &Link,
        index: &SegmentIndex,
    ) -> Result<bool, IoError> {
        // Until the next segment holds a durable batch, a crash may make this one the active one again.
        if !self.must_hold(end.offset)? {
            return Ok(false);
        }
        let path = self.layout.sidecar(page.header.number);
        let file = match self.fs.open(&path, OpenMode::Read) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(IoError::new("opening", &path, error)),
        };
        let key = SidecarKey {
            segment: page.header.number,
            salt: page.header.salt,
            base_position: page.header.base_position,
            end_offset: end.offset,
            end_chain: end.chain,
        };
        let expected = sidecar::encode(&key, index);
        let mut found = vec![0; expected.len() + 1];
        let read = fs::read_full_at(&*file, &mut found, 0).context("reading", &path)?;
        found.truncate(read);
        if found != expected {
            let at = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            let file_offset = at.unwrap_or(read.min(expected.len())) as u64;
            let kind = DamageKind::Sidecar;
            self.report.damage.push(Damage { path, file_offset, position: None, kind });
        }
        Ok(true)
    }

    fn note(
        &mut self,
        head: &Head,
        state: SegmentState,
        base_position: Position,
        end_position: Position,
        batches: u64,
        sidecar: bool,
    ) {
        self.report.segments.push(SegmentCheck {
            number: head.number,
            path: head.path.clone(),
            state,
            base_position,
            end_position,
            batches,
            file_bytes: head.len,
            sidecar,
        });
    }

    fn finish(mut self) -> VerifyReport {
        self.report.segments.sort_by_key(|segment| segment.number);
        if let Some(mark) = self.mark {
            let within = mark.end.offset <= self.report.end.offset;
            if within && !self.mark_seen {
                let path = self.layout.file(layout::MARK);
                self.damage(path, 0, mark.end.position, DamageKind::HistoryReplaced);
            }
            self.report.closed = mark.closed && mark.end.offset == self.report.end.offset;
        }
        let (bytes_done, bytes_total) = (self.bytes_total, self.bytes_total);
        (self.progress)(VerifyProgress { bytes_done, bytes_total });
        self.report
    }
}

/// What a segment means for those behind it.
enum Outcome {
    /// The next one must continue this.
    Continues(Link),
    /// The next one can be verified only for itself.
    Damaged,
    /// The journal ends here; what follows was never acknowledged.
    Ends,
}

fn begins_at(head: &Head, offset: u64) -> bool {
    head.valid().is_some_and(|page| page.header.base_offset == offset)
}

fn first_non_zero(window: &mut Window, mut at: u64, to: u64) -> Result<u64, IoError> {
    while at < to {
        let bytes = window.read(at, 64 * 1024, u64::MAX)?;
        if bytes.is_empty() {
            break;
        }
        match bytes.iter().position(|&byte| byte != 0) {
            Some(index) => return Ok(at + index as u64),
            None => at += bytes.len() as u64,
        }
    }
    Ok(at)
}
