//! Retention: removing the oldest events of a journal, for ever, when nothing needs them any more.
//!
//! ```text
//!   0 ········ first ── sealed ── sealed ── target ── sealed ── active
//!   removed before      └──── would be removed ───┘      └ never
//!                                                 ▲
//!         the lowest of: what was asked for · every view's and reactor's durable checkpoint ·
//!                        every mirror's lease · what the archive has
//! ```
//! - Whole sealed segments, from the front, and only if a verified archive has every byte of them, or the
//!   loss of the history is ordered by naming the position at which the journal is to begin.
//! - What follows the journal is a *gate*: nothing is removed that it has not passed. A gate about which
//!   nothing can be found out holds back everything. A [`Plan`] names the one that holds back most.
//! - Of what is removed the journal keeps the last revision of every stream (so expected revisions stay
//!   exact) and the chain at the beginning of every segment, in its file `base`, which is durable before the
//!   first segment is removed.
//!
//! Afterwards whatever asks for the removed events is answered [`ReadError::Truncated`], with the first
//! position that is left: readers, views that must be built anew, and mirrors that begin or come back late.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{IoError, OpenError, ReadError};
use crate::format::files::Role;
use crate::format::leases::Lease;
use crate::fs::Fs;
use crate::journal::Comparison;
use crate::journal::retention::{Guard, Removable};
use crate::journal::{Appender, Ingest, Journal};
use crate::options::JournalOptions;
use crate::position::{JournalId, NodeId, Position};
use crate::reactor::{REACTORS, checkpoint};

pub use crate::journal::retention::ArchiveError;

/// What is to be removed, and on what condition.
#[derive(Clone, Debug)]
pub struct Options {
    /// How far.
    pub until: Until,
    /// What becomes of the history; without a decision it can only be planned.
    pub history: Option<History>,
    /// A mirror that wasn't heard of for so long holds nothing back. Default 7 days.
    pub lease_age_max: Duration,
    /// Nor does one that lacks more than so many bytes of batches. Default: no limit.
    pub lease_bytes_max: u64,
    /// Nor, while the disk has fewer free bytes than this, do those that lack what must go for as many to be free: the one
    /// that lacks most lets go first. `None`, the default: 1 GiB, or a tenth of the volume if that is less. Where it can't be
    /// told how many are free, it is as if there were enough.
    pub lease_free_bytes_min: Option<u64>,
}

/// How far the oldest events are to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Until {
    /// Up to this position at the most. As only whole segments are removed, some events in front of it
    /// remain.
    Position(Position),
    /// As far as the segment files that remain have at least so many bytes.
    Keeping {
        /// Bytes of segment files, header pages included.
        bytes: u64,
    },
}

/// What becomes of the removed history.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum History {
    /// This directory, made by [`Journal::backup`], has it: every byte is read there before it is removed
    /// here. Keep it on another disk.
    Archive(PathBuf),
    /// It is lost. The position is the one at which the journal will begin, exactly as the plan names it
    /// ([`Plan::target`]).
    Forget(Position),
}

impl Options {
    /// Removes as far as `until`.
    #[must_use]
    pub const fn new(until: Until) -> Self {
        Self {
            until,
            history: None,
            lease_age_max: Duration::from_secs(7 * 24 * 3600),
            lease_bytes_max: u64::MAX,
            lease_free_bytes_min: None,
        }
    }

    /// Sets what becomes of the history.
    #[must_use]
    pub fn history(mut self, history: History) -> Self {
        self.history = Some(history);
        self
    }
}

/// Something that may need events which are to be removed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Holder {
    /// A view: how far its rows are durable.
    View {
        /// Its name.
        name: String,
        /// The version that reads this generation.
        version: u32,
        /// The generation.
        generation: u32,
        /// Its folder.
        path: PathBuf,
    },
    /// Views of which nothing can be found out: their folder can't be read, or this program was built
    /// without views.
    UnknownViews {
        /// The folder.
        path: PathBuf,
    },
    /// A reactor: how far what it has done is recorded.
    Reactor {
        /// Its name.
        name: String,
        /// Its folder.
        path: PathBuf,
    },
    /// Reactors of which nothing can be found out: their folder or checkpoint can't be read.
    UnknownReactors {
        /// The folder or file.
        path: PathBuf,
    },
    /// A mirror: how far it has said that it is durable.
    Mirror {
        /// Its node id; `None` if it didn't say which it is when it subscribed.
        node: Option<NodeId>,
        /// When it was last heard of, in microseconds since 1970.
        heard_at_us: i64,
    },
    /// A filtered feed: how far it has said that it is durable.
    Feed {
        /// Its node id; `None` if it didn't say which it is when it subscribed.
        node: Option<NodeId>,
        /// When it was last heard of, in microseconds since 1970.
        heard_at_us: i64,
    },
    /// Mirrors and feeds of which nothing can be found out: the file of their leases can't be read.
    UnknownMirrors {
        /// The file.
        path: PathBuf,
    },
    /// The archive: how far it has what is to be removed.
    Archive {
        /// Its directory.
        path: PathBuf,
        /// Why it has no more.
        error: Arc<ArchiveError>,
    },
    /// Events that were [given up](crate::repair): a journal can't begin there.
    Gap,
    /// The segment that is being written, and one in front of it while it is empty.
    Active,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::View { name, version, generation, .. } => {
                write!(f, "view {name}, version {version}, generation {generation}")
            }
            Self::UnknownViews { path } => {
                write!(f, "views that can't be read: {}", path.display())
            }
            Self::Reactor { name, .. } => write!(f, "reactor {name}"),
            Self::UnknownReactors { path } => {
                write!(f, "reactors that can't be read: {}", path.display())
            }
            Self::Mirror { node: Some(node), .. } => write!(f, "mirror {node}"),
            Self::Mirror { node: None, .. } => f.write_str("a mirror that had no id yet"),
            Self::Feed { node: Some(node), .. } => write!(f, "feed {node}"),
            Self::Feed { node: None, .. } => f.write_str("a feed that had no id"),
            Self::UnknownMirrors { path } => {
                write!(f, "mirrors whose leases can't be read: {}", path.display())
            }
            Self::Archive { error, .. } => write!(f, "the archive: {error}"),
            Self::Gap => f.write_str("events that were given up"),
            Self::Active => f.write_str("the segment that is being written"),
        }
    }
}

impl Holder {
    /// A stable name of the kind of holder.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::View { .. } => "view",
            Self::UnknownViews { .. } => "unknown_views",
            Self::Reactor { .. } => "reactor",
            Self::UnknownReactors { .. } => "unknown_reactors",
            Self::Mirror { .. } => "mirror",
            Self::Feed { .. } => "feed",
            Self::UnknownMirrors { .. } => "unknown_mirrors",
            Self::Archive { .. } => "archive",
            Self::Gap => "gap",
            Self::Active => "active",
        }
    }

    /// What can be done about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::View { .. } => {
                "let the view catch up and flush; a generation that nobody needs any more is deleted with its folder"
            }
            Self::UnknownViews { .. } => {
                "run it with a build that has views, or mend or delete the folder"
            }
            Self::Reactor { .. } => {
                "let the reactor catch up, or skip what it has halted at; one that nobody needs any more is deleted with its folder"
            }
            Self::UnknownReactors { .. } => "mend or delete the folder",
            Self::Mirror { .. } => {
                "let the mirror catch up; one that is gone for good lets go after lease_age_max, or when it lacks more than lease_bytes_max, or when the disk has less than lease_free_bytes_min left"
            }
            Self::Feed { .. } => {
                "let the feed catch up; one that is gone for good lets go as a mirror does"
            }
            Self::UnknownMirrors { .. } => {
                "close the store and delete the file, if no mirror needs what is to be removed"
            }
            Self::Archive { .. } => {
                "run `headwater archive` again, and `headwater verify` on the archive if it is damaged"
            }
            Self::Gap => "ask for a position that lies further on, or in front",
            Self::Active => "only sealed segments with events behind them are removed",
        }
    }
}

/// How far something that follows the journal has come.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gate {
    /// What it is.
    pub holder: Holder,
    /// It needs nothing in front of this; `None` if that isn't known, and everything is held back.
    pub position: Option<Position>,
    /// It holds nothing back: it has long been silent, lacks too much, lacks what must go because the disk is full, or needs
    /// what is gone already.
    pub passed_over: bool,
}

/// A segment that would be removed, or was.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Removal {
    /// Its number.
    pub number: u64,
    /// Its file.
    pub path: PathBuf,
    /// Position of its first event.
    pub from: Position,
    /// Position behind its last event.
    pub to: Position,
    /// Length of its file in bytes.
    pub file_bytes: u64,
}

/// What would be removed, and what keeps more from being removed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// The journal.
    pub journal: JournalId,
    /// Position of its first event now.
    pub first: Position,
    /// Position of its first event afterwards, if nothing held anything back: at or in front of what was
    /// asked for.
    pub asked: Position,
    /// Position of its first event afterwards.
    pub target: Position,
    /// What would be removed, the oldest first.
    pub removals: Vec<Removal>,
    /// What keeps `target` from being `asked`; `None` if nothing does.
    pub blocker: Option<Gate>,
    /// Everything that follows the journal.
    pub gates: Vec<Gate>,
}

impl Plan {
    /// Bytes that would be freed.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.removals.iter().map(|removal| removal.file_bytes).sum()
    }

    fn first_segment(&self) -> Option<u64> {
        self.removals.last().map(|removal| removal.number + 1)
    }
}

/// Why nothing was removed, or not everything. It is safe to try again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RetentionError {
    /// The journal can't be opened. While a service has it open, that service must do it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The journal can't be read, or the base can't be written. Nothing was removed if the base isn't there;
    /// if it is, the rest is removed at the next opening.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Nothing says what becomes of the history.
    #[error("neither an archive is named nor a position to forget up to")]
    Undecided,
    /// The position that was named to be forgotten up to isn't the one at which the journal would begin.
    #[error("position {named} was named, but the journal would begin at {target}")]
    NotAsPlanned {
        /// What was named.
        named: Position,
        /// What the plan says.
        target: Position,
    },
    /// The store was closed, or its writer has failed.
    #[error("the store is closed, or its writer has failed")]
    Closed,
}

impl From<IoError> for RetentionError {
    fn from(error: IoError) -> Self {
        Self::Read(error.into())
    }
}

impl RetentionError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Open(error) => error.code(),
            Self::Read(error) => error.code(),
            Self::Undecided => "retention.undecided",
            Self::NotAsPlanned { .. } => "retention.not_as_planned",
            Self::Closed => "retention.closed",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Open(error) => error.hint(),
            Self::Read(error) => error.hint(),
            Self::Undecided => {
                "name an archive that has the events, or name the planned position to lose them for ever"
            }
            Self::NotAsPlanned { .. } => {
                "plan again, and name exactly the position that the plan names"
            }
            Self::Closed => "open the store again",
        }
    }
}

/// Finds out what [`apply`] would remove from the journal in the directory `dir`. Changes nothing, takes no
/// lock, and may run beside the service that writes.
///
/// `dir` is that of the journal, own or mirrored; its views are looked for in the folder `views` beside it.
/// Blocks for reading header pages, and with an archive for reading there what would be removed.
///
/// # Errors
/// [`RetentionError`] if the journal can't be read.
pub fn plan(fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<Plan, RetentionError> {
    let (journal, damage) = Journal::open_read_only(fs, dir)?;
    if let Some(damage) = damage {
        return Err(OpenError::Corruption(damage).into());
    }
    plan_of(&journal, options)
}

/// Removes the oldest events of the journal in the directory `dir`, which nobody has open: an origin's or a
/// mirror's. Of a store that is open, [`Store::retain`](crate::Store::retain) does it.
///
/// What is removed is gone when this returns, and it can't be undone. Blocks as [`plan`], for opening the
/// journal, and for writing the heads of all streams that have events among those removed.
///
/// ```
/// use headwater::fs::{Fs, os::OsFs};
/// use headwater::retention::{self, History, Options, Until};
/// # let dir = tempfile::tempdir()?;
/// # headwater::Store::create(dir.path())?.close()?;
/// let fs: std::sync::Arc<dyn Fs> = std::sync::Arc::new(OsFs);
/// let journal = dir.path().join("journal");
/// let options = Options::new(Until::Keeping { bytes: 10 << 30 });
/// let plan = retention::plan(&fs, &journal, &options)?;
/// assert!(plan.removals.is_empty()); // there are no ten gigabytes
/// let plan = retention::apply(&fs, &journal, &options.history(History::Forget(plan.target)))?;
/// assert_eq!(plan.target, plan.first);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`RetentionError`].
pub fn apply(fs: &Arc<dyn Fs>, dir: &Path, options: &Options) -> Result<Plan, RetentionError> {
    let (journal, _) = Journal::open_read_only(fs, dir)?;
    let defaults = JournalOptions::default();
    match journal.role() {
        role @ (Role::Origin | Role::Feed) => {
            // As a store does it: where views or reactors remember events, an empty journal is a loss.
            let remembered = is_remembered(&**fs, &beside(dir));
            let appender = Appender::open_as(role, fs, dir, &defaults, remembered)?;
            let outcome = apply_to(appender.journal(), options);
            let closed = appender.close();
            let plan = outcome?;
            closed.map_err(|_| RetentionError::Closed)?;
            Ok(plan)
        }
        Role::Mirror => {
            let not_found = || OpenError::NotFound { path: dir.to_owned() };
            let ingest = Ingest::open(fs, dir, &defaults)?.ok_or_else(not_found)?;
            let outcome = apply_to(ingest.journal(), options);
            let closed = ingest.close();
            let plan = outcome?;
            closed.map_err(|_| RetentionError::Closed)?;
            Ok(plan)
        }
    }
}

/// The same for a journal that this process has open for writing.
pub(crate) fn apply_to(journal: &Journal, options: &Options) -> Result<Plan, RetentionError> {
    let guard: Guard<'_> = journal.retention_guard();
    if journal.is_closed() {
        return Err(RetentionError::Closed);
    }
    let plan = plan_of(journal, options)?;
    match &options.history {
        None => return Err(RetentionError::Undecided),
        Some(History::Forget(named)) if *named != plan.target => {
            return Err(RetentionError::NotAsPlanned { named: *named, target: plan.target });
        }
        Some(_) => {}
    }
    journal.remove_leftovers(&guard)?;
    if let Some(first) = plan.first_segment() {
        journal.remove_in_front_of(first, &guard)?;
    }
    Ok(plan)
}

pub(crate) fn plan_of(journal: &Journal, options: &Options) -> Result<Plan, RetentionError> {
    let first = journal.start().position;
    let removable = journal.removable()?;
    let (wanted, past_active) = wanted(journal, &removable, options.until);
    let asked = removable.get(..wanted).and_then(<[_]>::last).map_or(first, end_of);
    let mut gates = views(journal);
    gates.extend(reactors(journal));
    gates.extend(mirrors(journal, options, removable.get(..wanted).unwrap_or_default()));
    for gate in &mut gates {
        // It can't go on any more in any case.
        gate.passed_over |= gate.position.is_some_and(|position| position < first);
    }
    let holding = gates.iter().filter(|gate| !gate.passed_over);
    let lowest = holding.min_by_key(|gate| gate.position.unwrap_or(Position::START)).cloned();
    let limit = lowest.as_ref().map_or(asked, |gate| gate.position.unwrap_or(Position::START));
    let passed = removable.iter().take(wanted).take_while(|segment| end_of(segment) <= limit);
    let mut count = passed.count();
    let mut blocker = lowest.filter(|_| count < wanted);
    let archived = archive_gate(journal, &removable, count, options);
    if let Some((gate, has)) = archived {
        count = count.min(has);
        gates.push(gate.clone());
        blocker = if gate.passed_over { blocker } else { Some(gate) };
    }
    let clean = removable.iter().take(count).rposition(|segment| segment.may_be_last);
    let clean = clean.map_or(0, |last| last + 1);
    if clean < count && blocker.is_none() {
        let position = removable.get(clean).map(|segment| segment.info.base_position);
        blocker = Some(Gate { holder: Holder::Gap, position, passed_over: false });
    }
    if past_active && blocker.is_none() {
        let position = Some(removable.last().map_or(first, end_of));
        blocker = Some(Gate { holder: Holder::Active, position, passed_over: false });
    }
    let removals: Vec<_> = removable.iter().take(clean).map(removal).collect();
    let target = removals.last().map_or(first, |removal| removal.to);
    Ok(Plan { journal: journal.id(), first, asked, target, removals, blocker, gates })
}

fn end_of(segment: &Removable) -> Position {
    segment.info.end_position
}

fn removal(segment: &Removable) -> Removal {
    Removal {
        number: segment.info.number,
        path: segment.info.path.clone(),
        from: segment.info.base_position,
        to: segment.info.end_position,
        file_bytes: segment.file_bytes,
    }
}

/// How many of the segments are to be removed, and whether more were asked for than can ever be.
fn wanted(journal: &Journal, removable: &[Removable], until: Until) -> (usize, bool) {
    match until {
        Until::Position(position) => {
            let wanted = removable.iter().take_while(|segment| end_of(segment) <= position).count();
            let rest = journal.segments();
            let next = rest.get(wanted).map(|segment| segment.end_position);
            (wanted, wanted == removable.len() && next.is_some_and(|next| next <= position))
        }
        Until::Keeping { bytes } => {
            let all = journal.segments();
            let rest = all.iter().skip(removable.len());
            let page = crate::format::segment::HEADER_PAGE_BYTES as u64;
            let mut kept: u64 = rest.map(|s| page + s.end_offset - s.base_offset).sum();
            let past_active = kept > bytes;
            let stay = removable.iter().rev().take_while(|segment| {
                let wanted = kept < bytes;
                kept += segment.file_bytes;
                wanted
            });
            (removable.len() - stay.count(), past_active)
        }
    }
}

/// The archive as a gate, and how many of the first `count` segments it has.
fn archive_gate(
    journal: &Journal,
    removable: &[Removable],
    count: usize,
    options: &Options,
) -> Option<(Gate, usize)> {
    let Some(History::Archive(path)) = &options.history else { return None };
    let numbers: Vec<_> = removable.iter().take(count).map(|s| s.info.number).collect();
    let (has, error) = journal.check_archive(path, &numbers);
    let position = removable.get(has).map(|segment| segment.info.base_position);
    let error = Arc::new(error?);
    let holder = Holder::Archive { path: path.clone(), error };
    Some((Gate { holder, position, passed_over: false }, has))
}

/// So many bytes of a volume should be free, unless another number is given;
const FREE_BYTES_MIN: u64 = 1 << 30;
/// and no more than this part of it.
const FREE_SHARE_MIN: u64 = 10;

/// In front of which position segments must go for the disk to have as many free bytes as it should.
fn must_go(journal: &Journal, wanted: &[Removable], free_bytes_min: Option<u64>) -> Position {
    let (fs, dir) = (journal.fs(), journal.dir());
    let free = fs.free_bytes(dir).ok().flatten().unwrap_or(u64::MAX);
    let of_volume = || {
        let volume = fs.volume_bytes(dir).ok().flatten();
        volume.map_or(FREE_BYTES_MIN, |bytes| FREE_BYTES_MIN.min(bytes / FREE_SHARE_MIN))
    };
    let mut missing = free_bytes_min.unwrap_or_else(of_volume).saturating_sub(free);
    let must_go = wanted.iter().take_while(|segment| {
        let is_missing = missing > 0;
        missing = missing.saturating_sub(segment.file_bytes);
        is_missing
    });
    must_go.last().map_or(Position::START, end_of)
}

fn mirrors(journal: &Journal, options: &Options, wanted: &[Removable]) -> Vec<Gate> {
    let Some(leases) = journal.leases() else {
        let holder = Holder::UnknownMirrors { path: journal.leases_path() };
        return vec![Gate { holder, position: None, passed_over: false }];
    };
    let (now, end) = (crate::env::now_us(), journal.end());
    let must_go = must_go(journal, wanted, options.lease_free_bytes_min);
    let age_max_us = i64::try_from(options.lease_age_max.as_micros()).unwrap_or(i64::MAX);
    let holder = |lease: &Lease| {
        let node = (!lease.nameless).then(|| NodeId::from_bytes(lease.id));
        let heard_at_us = lease.heard_at_us;
        match lease.feed {
            true => Holder::Feed { node, heard_at_us },
            false => Holder::Mirror { node, heard_at_us },
        }
    };
    let gate = |lease: &Lease| Gate {
        holder: holder(lease),
        position: Some(lease.position),
        passed_over: now.saturating_sub(lease.heard_at_us) > age_max_us
            || end.offset.saturating_sub(lease.offset) > options.lease_bytes_max
            || lease.position < must_go,
    };
    leases.iter().map(gate).collect()
}

/// The folder of a store's mirrors.
const MIRRORS: &str = "mirrors";

/// The folder in which a journal's lies, and what follows it.
fn beside(dir: &Path) -> PathBuf {
    match dir.file_name() {
        Some(_) => dir.parent().unwrap_or(dir).to_owned(),
        None => dir.join(".."), // `.`, say: what is in front of its last name isn't where it lies
    }
}

/// The folder of the views of a journal.
fn views_dir(dir: &Path) -> PathBuf {
    beside(dir).join("views")
}

/// Whether something in the store's directory `dir` remembers events of its journal.
pub(crate) fn is_remembered(fs: &dyn Fs, dir: &Path) -> bool {
    let has_any =
        |name| fs.list(&dir.join(name)).is_ok_and(|names| names.iter().any(|it| is_of_one(&it)));
    has_any("views") || has_any(REACTORS)
}

/// Whether a name in the folder of views or reactors is that of one of them, and not of what several have in common.
fn is_of_one(name: &&String) -> bool {
    !name.starts_with('.')
}

/// Every reactor, as it is on disk.
fn reactors(journal: &Journal) -> Vec<Gate> {
    let dir = beside(journal.dir()).join(REACTORS);
    let unknown = |path: PathBuf| {
        let holder = Holder::UnknownReactors { path };
        Gate { holder, position: None, passed_over: false }
    };
    let gate = |name: String| {
        let path = dir.join(&name);
        match checkpoint::read_durable(&**journal.fs(), &path) {
            // It hasn't begun: when it does, it begins with what is left.
            Ok(None) => None,
            Ok(Some(Ok(place))) => {
                let differs = is_of_another_history(journal, &place.checkpoint);
                let position = Some(if differs { Position::START } else { place.next });
                let holder = Holder::Reactor { name, path };
                Some(Gate { holder, position, passed_over: false })
            }
            Ok(Some(Err(_))) | Err(_) => Some(unknown(checkpoint::path(&path))),
        }
    };
    match journal.list(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(_) => vec![unknown(dir.clone())],
        Ok(names) => names.into_iter().filter_map(gate).collect(),
    }
}

/// Every generation of every view that needs this journal, as it is on disk: of those beside it, and of those that the
/// store keeps which mirrors it.
fn views(journal: &Journal) -> Vec<Gate> {
    let own = views_in(journal, &views_dir(journal.dir()), Beside::Own);
    // From its name on: `.` doesn't say where it lies.
    let dir = std::path::absolute(journal.dir()).unwrap_or_else(|_| journal.dir().to_owned());
    let mirror = beside(&dir);
    let mirrors = mirror.parent().filter(|it| it.ends_with(MIRRORS));
    let store = mirrors.and_then(Path::parent).map(|store| store.join("views"));
    let over = store.map_or_else(Vec::new, |dir| views_in(journal, &dir, Beside::Another));
    own.into_iter().chain(over).collect()
}

/// Whose views a folder holds, if they don't say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Own,
    Another,
}

fn views_in(journal: &Journal, dir: &Path, beside: Beside) -> Vec<Gate> {
    let unknown = |path: PathBuf| {
        let holder = Holder::UnknownViews { path };
        Gate { holder, position: None, passed_over: false }
    };
    match journal.list(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(_) => vec![unknown(dir.to_owned())],
        Ok(names) => {
            let view = |name: &String| view(journal, name, dir.join(name), beside, &unknown);
            names.iter().filter(is_of_one).flat_map(view).collect()
        }
    }
}

/// The journals that a store mirrors.
#[cfg(feature = "views")]
fn mirrored(journal: &Journal) -> Vec<JournalId> {
    let dir = beside(journal.dir()).join(MIRRORS);
    let names = journal.list(&dir).unwrap_or_default();
    let id = |name: String| {
        let mirror = dir.join(name).join("journal");
        crate::journal::node_of(&**journal.fs(), &mirror).map(|node| node.journal)
    };
    names.into_iter().filter_map(id).collect()
}

#[cfg(feature = "views")]
fn view(
    journal: &Journal,
    name: &str,
    dir: PathBuf,
    beside: Beside,
    unknown: &dyn Fn(PathBuf) -> Gate,
) -> Vec<Gate> {
    use crate::view::Stored;
    let Ok(generations) = crate::view::generations(&dir) else { return vec![unknown(dir)] };
    let live: Vec<_> = generations.iter().filter(|it| it.live).cloned().collect();
    // Another of its version has taken over from it.
    let is_set_aside = |it: &crate::view::Generation| {
        !it.is_not_kept()
            && live.iter().any(|live| live.version == it.version && live.number > it.number)
    };
    let gate = |generation: crate::view::Generation| {
        let path = generation.folder().to_owned();
        let position = match generation.checkpoint(journal.id()) {
            Ok(Stored::At(checkpoint))
                if generation.live && is_of_another_history(journal, &checkpoint) =>
            {
                Position::START
            }
            Ok(Stored::At(checkpoint)) => checkpoint.position,
            // Who is made from mirrors needs nothing of this one. What is of a journal that nobody knows any more is
            // built anew from this one.
            Ok(Stored::Others(ids)) => {
                let is_mirrored = mirrored(journal).iter().any(|id| ids.contains(id));
                if beside == Beside::Another || is_mirrored {
                    return None;
                }
                Position::START
            }
            // It may be going to be made from this one, too.
            Ok(Stored::Nothing) => Position::START,
            Err(_) => return Some(unknown(path)),
        };
        // One that was set aside before it had begun is never read again; one that is being built reads everything, and so
        // does one that is about to be the live one.
        let passed_over = is_set_aside(&generation) && position == Position::START;
        let (version, generation) = (generation.version, generation.number);
        let holder = Holder::View { name: name.to_owned(), version, generation, path };
        Some(Gate { holder, position: Some(position), passed_over })
    };
    generations.into_iter().filter_map(gate).collect()
}

/// Whether what has come so far is of another history: then a view is built anew when it is opened next, and of
/// a reactor somebody has to say where it begins.
fn is_of_another_history(journal: &Journal, checkpoint: &crate::Checkpoint) -> bool {
    match journal.compare(checkpoint) {
        Ok(Comparison::Differs | Comparison::Foreign) => true,
        // A mirror may still come to where its view is.
        Ok(Comparison::Ahead) => journal.role().appends(),
        Ok(Comparison::Equal) | Err(_) => false,
    }
}

#[cfg(not(feature = "views"))]
fn view(
    _journal: &Journal,
    _name: &str,
    dir: PathBuf,
    _beside: Beside,
    unknown: &dyn Fn(PathBuf) -> Gate,
) -> Vec<Gate> {
    vec![unknown(dir)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_are_looked_for_beside_the_journal_whatever_its_path_is() {
        for (dir, views) in [
            ("/store/journal", "/store/views"),
            ("journal", "views"),
            ("journal/.", "views"),
            (".", "./../views"),
            ("store/journal/quarantine/..", "store/journal/quarantine/../../views"),
        ] {
            assert_eq!(views_dir(Path::new(dir)), Path::new(views), "{dir}");
        }
    }
}
