//! Restore: a backup becomes a journal that can be written again.
//!
//! ```text
//!   nothing ─▶ incoming ─▶ segments, verified ─▶ mark ─▶ node ─▶ incoming removed: a journal
//!                 └──────── interrupted: the same call goes on; abandon_restore removes it all
//! ```
//! While `incoming` is there, opening for writing answers [`OpenError::Incomplete`]. The restored journal is
//! the same journal (its id and, up to the end, its bytes) in another directory (a new node id); whatever is
//! appended then bears a new incarnation, so that another continuation of the same backup differs from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Corruption, CorruptionKind, IoContext, IoError, OpenError, ReadError};
use crate::format::FormatError;
use crate::format::batch::Link;
use crate::format::files::{Mark, Node, Role};
#[cfg(feature = "shipping")]
use crate::format::in_front_of_crc;
use crate::format::incoming::{INCOMING_BYTES, Incoming};
use crate::fs::{self, Fs, OpenMode};
use crate::journal::copy::{self, CopyError, Watched};
use crate::journal::layout::{self, Layout};
use crate::journal::mark::MarkFile;
use crate::journal::scan::{Window, file_offset};
use crate::journal::{Journal, Locked};
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// What [`restore`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreReport {
    /// Where the restored journal ends.
    pub end: Checkpoint,
    /// The id of the new directory.
    pub node: NodeId,
    /// Bytes that were written now; fewer than the journal has, if an interrupted restore was continued.
    pub written_bytes: u64,
}

/// Why a restore wasn't completed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The backup can't be opened.
    #[error("the backup can't be opened: {0}")]
    Backup(#[source] OpenError),
    /// The backup can't be read, or is damaged.
    #[error("the backup can't be read: {0}")]
    Read(#[source] ReadError),
    /// The position lies within a batch, and batches are whole or absent.
    #[error("position {position} lies within a batch, which begins at {begins} and ends at {ends}")]
    NotABoundary {
        /// What was asked for.
        position: Position,
        /// The last boundary in front of it.
        begins: Position,
        /// The first boundary behind it.
        ends: Position,
    },
    /// The directory can't be used: a file operation failed, or it is in use.
    #[error(transparent)]
    Target(#[from] OpenError),
    /// There is something in the directory.
    #[error("{}: something is here already", path.display())]
    NotEmpty {
        /// What was found.
        path: PathBuf,
    },
    /// Another restore than this one was begun in the directory.
    #[error("{}: another restore was begun here, up to position {to}", path.display())]
    Another {
        /// The file that says so.
        path: PathBuf,
        /// Where the journal was to end.
        to: Position,
    },
    /// What a restore that was begun has left is not a beginning of the backup.
    #[error("{}: what is here is not a part of the backup, from position {position} at the latest", path.display())]
    Differs {
        /// The file in which that shows.
        path: PathBuf,
        /// Where it begins to differ, or in front of that.
        position: Position,
    },
    /// A mirror is to begin with the base of a view over several journals, and it wasn't said of which one it is to be; or the
    /// base isn't of that.
    #[error("{}: the base isn't of one journal only, or not of the one that is named, but of {}", base.display(), list(journals))]
    WhichJournal {
        /// The base.
        base: PathBuf,
        /// Its journals.
        journals: Vec<JournalId>,
    },
    /// No restore was begun in the directory; there is nothing to abandon.
    #[error("{}: no restore is under way here", path.display())]
    NotBegun {
        /// The directory.
        path: PathBuf,
    },
}

/// What is listed in a message.
fn list(ids: &[JournalId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl RestoreError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Backup(_) => "restore.backup",
            Self::Read(_) => "restore.read",
            Self::NotABoundary { .. } => "restore.not_a_boundary",
            Self::Target(_) => "restore.target",
            Self::NotEmpty { .. } => "restore.not_empty",
            Self::Another { .. } => "restore.another",
            Self::Differs { .. } => "restore.differs",
            Self::WhichJournal { .. } => "restore.which_journal",
            Self::NotBegun { .. } => "restore.not_begun",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Backup(_) | Self::Read(_) => {
                "run `headwater verify` on the backup; what lies in front of damage can be restored with --at-position"
            }
            Self::NotABoundary { .. } => "choose one of the two boundaries",
            Self::Target(_) => "see the cause; repeating the restore is safe",
            Self::NotEmpty { .. } => "restore into a new directory",
            Self::Another { .. } | Self::Differs { .. } => {
                "repeat that very restore, or remove what it left with `headwater restore --abandon`"
            }
            Self::WhichJournal { .. } => {
                "name the journal (FollowOptions::journal_id), or begin with BASE/journals/ID"
            }
            Self::NotBegun { .. } => {
                "check the path; a completed restore is a journal and is never removed"
            }
        }
    }
}

impl RestoreError {
    /// Whether there is only no space at present.
    #[cfg(feature = "shipping")]
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Self::Target(OpenError::Io(error)) if error.is_disk_full())
    }
}

impl From<IoError> for RestoreError {
    fn from(error: IoError) -> Self {
        Self::Target(error.into())
    }
}

impl From<CopyError> for RestoreError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Io(error) => error.into(),
            CopyError::Source(error) => Self::Read(error),
            CopyError::Differs { path, position } | CopyError::Ahead { path, position } => {
                Self::Differs { path, position }
            }
            CopyError::Missing { path } => Self::Differs { path, position: Position::START },
        }
    }
}

/// Makes a journal in the directory `dir` from the backup in `backup`, up to `at` or all of it. It is
/// durable when this returns, and can be opened for writing.
///
/// `dir` (for a store: its folder `journal`) is new or empty, or holds this very restore, interrupted: then
/// it is continued. `at` must be the end of a batch. The journal keeps its id; the directory gets a new one.
///
/// Blocks for reading and writing the whole journal.
///
/// ```
/// # use std::sync::Arc;
/// # let dir = tempfile::tempdir()?;
/// # let store = headwater::Store::create(dir.path().join("orders"))?;
/// # let (backup, restored) = (dir.path().join("backup"), dir.path().join("restored"));
/// store.journal().backup(&backup)?;
/// let fs: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
/// headwater::restore(&fs, &backup, &restored.join("journal"), None)?;
/// let restored = headwater::Store::open(&restored)?;
/// assert_eq!(restored.journal().end(), store.journal().end());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`RestoreError`]. Damage of the backup in front of `at` is an error, and nothing is left out silently.
pub fn restore(
    fs: &Arc<dyn Fs>,
    backup: &Path,
    dir: &Path,
    at: Option<Position>,
) -> Result<RestoreReport, RestoreError> {
    restore_as(Role::Origin, fs, (backup, dir), at, &Watched::default())
}

/// Makes a mirror in `dir` of a backup, if there is nothing yet, or goes on with that: of the base of a view, of this journal.
/// It is durable when this returns.
///
/// # Errors
/// [`RestoreError`].
#[cfg(feature = "shipping")]
pub(crate) fn begin_mirror(
    fs: &Arc<dyn Fs>,
    (backup, journal): (&Path, Option<JournalId>),
    dir: &Path,
    watched: &Watched,
) -> Result<(), RestoreError> {
    if is_begun(&**fs, dir) {
        return Ok(());
    }
    let Some(backup) = copy_in(&**fs, backup, journal)? else { return Ok(()) };
    // What was begun is completed, also if the backup has grown since.
    let path = Layout::new(dir).file(layout::INCOMING);
    let begun = read_incoming(&**fs, &path)?.and_then(Result::ok);
    let at = begun.map(|incoming| incoming.to.position);
    restore_as(Role::Mirror, fs, (&backup, dir), at, watched).map(drop)
}

/// Where the journals are of which the base of a view is, by its manifest; `None` if it isn't one.
#[cfg(feature = "shipping")]
fn journals_of(fs: &dyn Fs, base: &Path) -> Option<Vec<Checkpoint>> {
    let file = fs.open(&base.join(layout::MANIFEST), OpenMode::Read).ok()?;
    let size = file.size().ok().filter(|size| *size <= layout::MANIFEST_BYTES_MAX)?;
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    fs::read_exact_at(&*file, &mut bytes, 0).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let lines = in_front_of_crc(&text)?.lines().filter_map(|line| line.strip_prefix("journal "));
    let checkpoint = |line: &str| {
        let bytes = crate::hex::from_hex(line)?.try_into().ok()?;
        Checkpoint::from_bytes(&bytes)
    };
    lines.map(checkpoint).collect::<Option<Vec<_>>>().filter(|all| !all.is_empty())
}

/// Whether a journal is there, and none that is still being restored.
#[cfg(feature = "shipping")]
pub(crate) fn is_begun(fs: &dyn Fs, dir: &Path) -> bool {
    let names = fs.list(dir).unwrap_or_default();
    let has = |name: &str| names.iter().any(|it| it == name);
    has(layout::NODE) && !has(layout::INCOMING)
}

/// The copy of a journal that is meant: the directory itself, or that of the journal in the base of a view. `None` if the base is of
/// a view that has folded nothing of it: there is nothing to begin with, and everything is fetched. The manifest must say so:
/// where the copy is only missing, something is lost.
#[cfg(feature = "shipping")]
fn copy_in(
    fs: &dyn Fs,
    dir: &Path,
    journal: Option<JournalId>,
) -> Result<Option<PathBuf>, RestoreError> {
    let (base, journal) = match named_in_base(dir) {
        Some((base, named)) if fs.list(dir).is_err() => (base, Some(named)),
        _ => (dir, journal),
    };
    let Some(journals) = journals_of(fs, base) else { return Ok(Some(dir.to_owned())) };
    let meant = match (journal, journals.as_slice()) {
        (Some(id), all) => all.iter().find(|it| it.journal == id),
        (None, [only]) => Some(only),
        (None, _) => None,
    };
    let Some(meant) = meant else {
        let journals = journals.iter().map(|it| it.journal).collect();
        return Err(RestoreError::WhichJournal { base: base.to_owned(), journals });
    };
    let copy = || base.join(layout::JOURNALS).join(meant.journal.to_string());
    Ok((meant.position > Position::START).then(copy))
}

/// Whether it is the place of a journal's copy in a base: `BASE/journals/ID`.
#[cfg(feature = "shipping")]
fn named_in_base(dir: &Path) -> Option<(&Path, JournalId)> {
    let journals =
        dir.parent().filter(|it| it.file_name().is_some_and(|it| it == layout::JOURNALS))?;
    Some((journals.parent()?, dir.file_name()?.to_str()?.parse().ok()?))
}

fn restore_as(
    role: Role,
    fs: &Arc<dyn Fs>,
    (backup, dir): (&Path, &Path),
    at: Option<Position>,
    watched: &Watched,
) -> Result<RestoreReport, RestoreError> {
    let (source, damage) = Journal::open_read_only(fs, backup).map_err(RestoreError::Backup)?;
    let wanted = at.unwrap_or_else(|| source.end().position);
    let damage = match damage {
        None => tail_damage(fs, &source)?,
        damage => damage,
    };
    if let Some(damage) = damage.filter(|_| at.is_none_or(|at| at > source.end().position)) {
        return Err(RestoreError::Read(damage.into()));
    }
    let end = boundary(&source, wanted)?;
    let to = Link { offset: end.offset, position: end.position, chain: end.chain };
    if fs.list(dir).is_ok() {
        check_target(&**fs, &Layout::new(dir))?; // before even a lock file is put there
    }
    let locked = Locked::take(fs, dir)?;
    let start = source.start();
    let (from_offset, from_position) = (start.offset, start.position);
    let incoming = Incoming { journal: source.id(), from_offset, from_position, to };
    begin(&**fs, &locked.layout, &incoming)?;
    let copied = copy::copy_watched(&source, to, &**fs, &locked.layout, watched)?;
    // Proof of the end, in front of `node`: nothing opens this yet.
    let mut mark = MarkFile::open(&**fs, &locked.layout, 0)?;
    mark.write_synced(Mark { sequence: 0, end, closed: false, witness: None, salt: 0 })?;
    let node = Node { role, node: NodeId::random(), journal: source.id() };
    locked.write_node(&node)?;
    finish(&**fs, &locked.layout)?;
    Ok(RestoreReport { end, node: node.node, written_bytes: copied.written_bytes })
}

/// Removes what an unfinished [`restore`] has left in `dir`. Only a directory in which one is under way is
/// touched.
///
/// # Errors
/// [`RestoreError::NotBegun`] if none is; others of the file system. Repeating it is safe.
pub fn abandon_restore(fs: &Arc<dyn Fs>, dir: &Path) -> Result<(), RestoreError> {
    let not_begun = || RestoreError::NotBegun { path: dir.to_owned() };
    let begun = |names: &[String]| names.iter().any(|name| name == layout::INCOMING);
    match fs.list(dir) {
        Ok(names) if begun(&names) => {}
        Ok(_) => return Err(not_begun()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(not_begun()),
        Err(error) => return Err(IoError::new("listing", dir, error).into()),
    }
    let locked = Locked::take(fs, dir)?;
    let names = fs.list(dir).context("listing", dir)?;
    if !begun(&names) {
        return Err(not_begun());
    }
    let ours = |name: &String| {
        let new = name.strip_suffix(layout::NEW);
        layout::number_of(name, "seg").is_some()
            || [layout::NODE, layout::MARK, layout::BASE].contains(&new.unwrap_or(name))
            || new == Some(layout::INCOMING)
    };
    for name in names.iter().filter(|name| ours(name)) {
        let path = dir.join(name);
        fs.remove(&path).context("removing", &path)?;
    }
    fs.sync_dir(dir).context("syncing", dir)?;
    finish(&**fs, &locked.layout)
}

/// What lies behind the last batch of a copy: nothing, if it is what a backup has made.
fn tail_damage(fs: &Arc<dyn Fs>, source: &Journal) -> Result<Option<Corruption>, RestoreError> {
    let end = source.end();
    let Some(last) = source.segments().pop() else { return Ok(None) };
    let file = fs.open(&last.path, OpenMode::Read).context("opening", &last.path);
    let mut window =
        Window::new(file.map_err(ReadError::Io).map_err(RestoreError::Read)?, last.path.clone());
    let at = file_offset(last.base_offset, end.offset);
    let tail = window.last_non_zero(at).map_err(ReadError::Io).map_err(RestoreError::Read)?;
    Ok(tail.map(|_| Corruption {
        path: last.path.clone(),
        file_offset: at,
        position: end.position,
        kind: CorruptionKind::Batch(FormatError::Invalid("bytes behind the last batch of a copy")),
    }))
}

/// The checkpoint at `position`, which must be the end of a batch.
fn boundary(source: &Journal, position: Position) -> Result<Checkpoint, RestoreError> {
    let end = source.end();
    if position == end.position {
        return Ok(end);
    }
    if position > end.position {
        let error = ReadError::BeyondEnd { position, end: end.position };
        return Err(RestoreError::Read(error));
    }
    if position == source.start().position {
        return Ok(source.start());
    }
    let Some(last) = position.get().checked_sub(1) else {
        let first = source.start().position;
        return Err(RestoreError::Read(ReadError::Truncated { first }));
    };
    let header = source.header_holding(Position::new(last)).map_err(RestoreError::Read)?;
    match header {
        Some(header) if header.end_position() == position => {
            Ok(crate::journal::writer::checkpoint_of(&header, source.id()))
        }
        Some(header) => {
            let (begins, ends) = (header.base_position, header.end_position());
            Err(RestoreError::NotABoundary { position, begins, ends })
        }
        None => Err(RestoreError::Read(ReadError::BeyondEnd { position, end: end.position })),
    }
}

/// Refuses a directory with anything in it, unless a restore is under way there.
fn check_target(fs: &dyn Fs, layout: &Layout) -> Result<(), RestoreError> {
    let names = fs.list(&layout.dir).context("listing", &layout.dir)?;
    if names.iter().any(|name| name == layout::INCOMING) {
        return Ok(());
    }
    let begun = |name: &str| name.strip_suffix(layout::NEW) == Some(layout::INCOMING);
    match names.iter().find(|name| *name != layout::LOCK && !begun(name)) {
        Some(name) => Err(RestoreError::NotEmpty { path: layout.file(name) }),
        None => Ok(()),
    }
}

/// Writes `incoming`, durably, or finds that it says the same.
fn begin(fs: &dyn Fs, layout: &Layout, incoming: &Incoming) -> Result<(), RestoreError> {
    check_target(fs, layout)?;
    let path = layout.file(layout::INCOMING);
    match read_incoming(fs, &path)? {
        None => Ok(layout.replace(fs, layout::INCOMING, &incoming.encode())?),
        Some(Ok(found)) if found == *incoming => {
            fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
            Ok(())
        }
        Some(Ok(found)) => Err(RestoreError::Another { path, to: found.to.position }),
        // One that can't be read was never durable, or is damaged: only abandoning it is safe.
        Some(Err(_)) => Err(RestoreError::Another { path, to: Position::START }),
    }
}

/// `None` if there is none. The inner error: it can't be understood.
fn read_incoming(
    fs: &dyn Fs,
    path: &Path,
) -> Result<Option<Result<Incoming, FormatError>>, IoError> {
    let file = match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.context("opening", path)?,
    };
    let mut bytes = [0; INCOMING_BYTES + 1];
    let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", path)?;
    Ok(Some(Incoming::decode(bytes.get(..read).unwrap_or_default())))
}

/// Removes `incoming`, durably: the last step.
fn finish(fs: &dyn Fs, layout: &Layout) -> Result<(), RestoreError> {
    let path = layout.file(layout::INCOMING);
    fs.remove(&path).context("removing", &path)?;
    fs.sync_dir(&layout.dir).context("syncing", &layout.dir)?;
    Ok(())
}
