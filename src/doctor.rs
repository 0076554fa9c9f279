//! The doctor: looks at a store and the machine below it, check by check, and says what to do.
//!
//! ```text
//!   machine   file system, sync, space, clock
//!   journal   role, lock, damage, mark, end, segments, sidecars, lost events, restore, recovery, what was set aside
//!   around    views, mirrors
//! ```
//! It reads headers and the end of the journal, not every byte: that is what [`verify`](crate::verify) is
//! for. It changes nothing, except that it writes, syncs and removes a scratch file beside the journal to
//! see whether syncing works. It takes no lock and may run beside the writer.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::OpenError;
use crate::format::files::Role;
use crate::fs::Fs;
use crate::fs::os::{OsFs, lock_holder};
use crate::journal::condition::{self, Condition};
use crate::journal::layout;
use crate::journal::orphans::orphans_in;
use crate::position::Checkpoint;
use crate::{Journal, Position};

/// Syncs that are timed.
const SYNCS: usize = 15;
/// No device makes anything durable in less.
const SYNC_MIN: Duration = Duration::from_micros(8);
/// Slower syncs make every append slow.
const SYNC_SLOW: Duration = Duration::from_millis(30);
/// A clock before 2024-01-01 was never set.
const CLOCK_MIN: Duration = Duration::from_secs(1_704_067_200);
const INODES_MIN: u64 = 1000;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, but somebody should know.
    Warn,
    /// Events are damaged or lost, or what they rest on can't be used.
    Fail,
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Check {
    /// A stable name.
    pub name: &'static str,
    /// How it ended.
    pub level: Level,
    /// What was found.
    pub finding: String,
    /// What to do about it, if anything.
    pub hint: Option<&'static str>,
}

/// What the doctor found, in the order in which it looked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Diagnosis {
    /// The checks.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    /// The worst of the checks.
    #[must_use]
    pub fn level(&self) -> Level {
        self.checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok)
    }

    fn ok(&mut self, name: &'static str, finding: impl Into<String>) {
        self.add(name, Level::Ok, finding, None);
    }

    fn warn(&mut self, name: &'static str, finding: impl Into<String>, hint: &'static str) {
        self.add(name, Level::Warn, finding, Some(hint));
    }

    fn fail(&mut self, name: &'static str, finding: impl Into<String>, hint: &'static str) {
        self.add(name, Level::Fail, finding, Some(hint));
    }

    fn add(
        &mut self,
        name: &'static str,
        level: Level,
        finding: impl Into<String>,
        hint: Option<&'static str>,
    ) {
        self.checks.push(Check { name, level, finding: finding.into(), hint });
    }
}

/// Examines the journal in `dir`, and the views and mirrors of the store that it belongs to.
///
/// Blocks for reading the end of the journal, and for a few syncs of a scratch file.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # headwater::Store::create(dir.path())?.close()?;
/// let diagnosis = headwater::doctor::examine(&dir.path().join("journal"))?;
/// for check in &diagnosis.checks {
///     println!("{:4} {}: {}", check.level, check.name, check.finding);
/// }
/// # assert!(diagnosis.level() < headwater::doctor::Level::Fail);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`OpenError::NotFound`] if there is no journal. Everything else that is wrong is in the diagnosis.
pub fn examine(dir: &Path) -> Result<Diagnosis, OpenError> {
    let mut found = Diagnosis::default();
    let condition = match condition::examine(&OsFs, dir) {
        Err(error @ OpenError::NotFound { .. }) => return Err(error),
        condition => condition,
    };
    match &condition {
        Ok(condition) => check_journal(&mut found, condition),
        Err(error) => found.fail("journal", error.to_string(), error.hint()),
    }
    check_lock(&mut found, dir);
    check_incoming(&mut found, dir);
    check_recovering(&mut found, dir);
    check_orphans(&mut found, "orphaned", "", dir);
    check_quarantine(&mut found, dir);
    check_file_system(&mut found, dir);
    check_sync(&mut found, dir);
    let condition = condition.ok();
    check_space(&mut found, dir, condition.as_ref().map_or(0, |found| found.segment_bytes));
    check_clock(&mut found, dir);
    let store = dir.parent().filter(|_| dir.ends_with("journal"));
    if let (Some(store), Some(condition)) = (store, &condition) {
        check_views(&mut found, store, condition.end);
        check_mirrors(&mut found, store);
    }
    Ok(found)
}

fn check_journal(found: &mut Diagnosis, condition: &Condition) {
    let journal = condition.node.journal;
    match condition.role {
        Some(role) => found.ok("role", format!("{role} of journal {journal}")),
        None => found.warn(
            "role",
            format!("a copy of journal {journal}: no `node` file"),
            "restore it into a journal before writing; it can be read and verified as it is",
        ),
    }
    match &condition.corruption {
        Some(corruption) => found.fail(
            "journal",
            corruption.to_string(),
            "run `headwater repair` to see what can be done, with --from MIRROR if there is one",
        ),
        None => found.ok(
            "journal",
            format!(
                "{} events in {} segments, valid where looked at; `headwater verify` reads every byte",
                condition.end.position, condition.segments
            ),
        ),
    }
    check_end(found, condition);
    if condition.damaged_headers > 0 {
        found.warn(
            "headers",
            format!("{} header pages with a damaged copy", condition.damaged_headers),
            "the next opening remakes them; replace the disk if this repeats",
        );
    } else {
        found.ok("headers", "both copies of each header are valid");
    }
    match condition.without_sidecar {
        0 => found.ok("sidecars", "every sealed segment has one"),
        n => found.warn(
            "sidecars",
            format!("{n} sealed segments have none"),
            "the next opening for writing makes them",
        ),
    }
    found.ok("spares", format!("{} prepared segments", condition.spares));
    if condition.gaps.is_empty() {
        found.ok("gaps", "no events were given up");
    } else {
        let mut ranges = String::new();
        for gap in &condition.gaps {
            write!(ranges, " {}..{}", gap.from.position, gap.to_position).ok();
        }
        found.warn(
            "gaps",
            format!("events were lost and given up, at positions{ranges}"),
            "if a copy that has them turns up, `headwater repair --from` puts them back",
        );
    }
}

/// Mark against headers against the end of what is there.
fn check_end(found: &mut Diagnosis, condition: &Condition) {
    let (end, proven) = (condition.end.offset, condition.proven_offset);
    match condition.mark {
        None if condition.role.is_some() => found.warn(
            "mark",
            "no valid mark: what the last group of appends wrote is proven by nothing else",
            "the next opening writes it",
        ),
        None => found.ok("mark", "none, as in every copy"),
        Some(mark) if mark.closed && mark.end.offset == end => {
            found.ok("mark", "closed cleanly at the end");
        }
        Some(mark) => {
            found.ok("mark", format!("durable up to position {}, not closed", mark.end.position));
        }
    }
    if condition.corruption.is_some() {
        return;
    }
    let unproven = end.saturating_sub(proven);
    if condition.torn_bytes + condition.segments_behind > 0 {
        found.warn(
            "end",
            format!(
                "{} torn bytes and {} segments lie behind the end",
                condition.torn_bytes, condition.segments_behind
            ),
            "a crash, or a group that is being written: never acknowledged. The next opening sets them aside",
        );
    } else if unproven > 0 {
        found.ok("end", format!("valid, its last {unproven} bytes not proven to be durable yet"));
    } else {
        found.ok("end", format!("position {}, proven to be durable", condition.end.position));
    }
}

fn check_lock(found: &mut Diagnosis, dir: &Path) {
    let path = dir.join("lock");
    match lock_holder(&path) {
        Ok(None) => found.ok("lock", "free: no process writes here"),
        Ok(Some(owner)) => found.ok("lock", format!("held by {owner}")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => found.ok("lock", "never taken"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let hint = "check the permissions of the directory";
            found.warn("lock", format!("{}: {error}", path.display()), hint);
        }
        Err(error) => found.fail(
            "lock",
            format!("{}: {error}", path.display()),
            "use a file system on which files can be locked",
        ),
    }
}

fn check_incoming(found: &mut Diagnosis, dir: &Path) {
    if dir.join("incoming").exists() {
        found.fail(
            "restore",
            "a restore has begun and not ended",
            "complete or abandon it with the command that began it",
        );
    } else {
        found.ok("restore", "none under way");
    }
}

fn check_recovering(found: &mut Diagnosis, dir: &Path) {
    if dir.join(layout::RECOVERING).exists() {
        found.fail(
            "recovery",
            "what was lost is being taken back from a mirror, and not all of it has come",
            "run `headwater recover` again, or keep what has come with `headwater recover --abandon`",
        );
    } else {
        found.ok("recovery", "none under way");
    }
}

/// What an origin had lost and its mirror keeps. With an empty `name` of the journal itself, else of one of its mirrors.
fn check_orphans(found: &mut Diagnosis, check: &'static str, name: &str, dir: &Path) {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let orphans = orphans_in(&fs, dir);
    if orphans.is_empty() && name.is_empty() {
        found.ok(check, "no events were set aside because their origin had lost them");
    }
    let name = if name.is_empty() { String::new() } else { format!("{name}: ") };
    for it in orphans {
        let events = match it.end {
            Some(end) => format!("{} events", end.position.since(it.from)),
            None => "events that can't be read".to_owned(),
        };
        found.warn(
            check,
            format!(
                "{name}{events} from position {} on, which the origin has lost, lie in {}",
                it.from,
                it.dir.display()
            ),
            "they may be the only copy: see docs/operate/forks.md before the folder is moved away",
        );
    }
}

fn check_quarantine(found: &mut Diagnosis, dir: &Path) {
    let files = fs::read_dir(dir.join("quarantine")).into_iter().flatten().filter_map(Result::ok);
    let (mut count, mut bytes) = (0_u64, 0_u64);
    for file in files.filter(|file| file.file_name() != "reserve") {
        count += 1;
        bytes += file.metadata().map_or(0, |metadata| metadata.len());
    }
    match count {
        0 => found.ok("quarantine", "empty"),
        _ => found.warn(
            "quarantine",
            format!("{count} files, {bytes} bytes, set aside by recovery or repair"),
            "they hold nothing that was acknowledged and not put back; delete them once nobody asks about them",
        ),
    }
}

/// What is known of a file system by its magic number: its name, and what is wrong with it for a journal.
#[cfg(target_os = "linux")]
fn file_system(magic: i64) -> (&'static str, Option<&'static str>) {
    const VOLATILE: Option<&str> =
        Some("it lies in memory and is gone with it: keep journals on a disk");
    const NETWORK: Option<&str> = Some(
        "locks and syncs over a network are only as good as the server: keep journals on a local disk",
    );
    const LAYER: Option<&str> = Some(
        "the layer below decides what a sync is worth, and containers throw it away: mount a volume",
    );
    match magic & 0xffff_ffff {
        0x0102_1994 => ("tmpfs", VOLATILE),
        0x8584_58f6 => ("ramfs", VOLATILE),
        0x6969 => ("nfs", NETWORK),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => ("smb", NETWORK),
        0x0102_1997 => ("9p", NETWORK),
        0x00c3_6400 => ("ceph", NETWORK),
        0x7461_636f => ("ocfs2", NETWORK),
        0x0116_1970 => ("gfs2", NETWORK),
        0x6573_5546 => ("fuse", LAYER),
        0x794c_7630 => ("overlay", LAYER),
        0xef53 => ("ext4", None),
        0x5846_5342 => ("xfs", None),
        0x9123_683e => ("btrfs", None),
        0x2fc1_2fc1 => ("zfs", None),
        0xf2f5_2010 => ("f2fs", None),
        _ => ("unknown", None),
    }
}

fn check_file_system(found: &mut Diagnosis, dir: &Path) {
    #[cfg(target_os = "linux")]
    match rustix::fs::statfs(dir) {
        Ok(stat) => {
            #[allow(
                clippy::unnecessary_cast,
                clippy::useless_conversion,
                reason = "its type differs between architectures"
            )]
            let magic = stat.f_type as i64;
            match file_system(magic) {
                (name, None) => found.ok("file system", format!("{name} ({magic:#x})")),
                (name, Some(hint)) => found.warn("file system", name, hint),
            }
        }
        Err(error) => found.warn("file system", error.to_string(), "check the directory"),
    }
    #[cfg(not(target_os = "linux"))]
    found.ok("file system", format!("not examined on this system: {}", dir.display()));
}

/// A file that is removed when it isn't needed any more.
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!("doctor-{:016x}.tmp", crate::env::random_u64()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Self { file, path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// The median time of a sync of 4 KiB, written over zeros as a segment's batches are.
fn time_syncs(dir: &Path) -> io::Result<Duration> {
    let scratch = Scratch::create(dir)?;
    scratch.file.write_all_at(&[0; 64 * 1024], 0)?;
    scratch.file.sync_data()?;
    let mut times = Vec::new();
    for round in 0..SYNCS {
        let block = [round as u8 + 1; 4096];
        let begun = Instant::now();
        scratch.file.write_all_at(&block, round as u64 * 4096)?;
        scratch.file.sync_data()?;
        times.push(begun.elapsed());
    }
    OsFs.sync_dir(dir)?;
    times.sort_unstable();
    Ok(times.get(SYNCS / 2).copied().unwrap_or_default())
}

fn check_sync(found: &mut Diagnosis, dir: &Path) {
    match time_syncs(dir) {
        Ok(median) if median < SYNC_MIN => found.warn(
            "sync",
            format!("a write with its sync takes {median:?}: nothing can be durable so fast"),
            "this file system ignores syncs: what it holds is lost with the power",
        ),
        Ok(median) if median > SYNC_SLOW => found.warn(
            "sync",
            format!("a write with its sync takes {median:?}"),
            "every append waits for one: use a faster disk, or append in larger batches",
        ),
        Ok(median) => found.ok("sync", format!("a write with its sync takes {median:?}")),
        Err(error) => found.warn(
            "sync",
            format!("a scratch file can't be written and synced: {error}"),
            "make the directory writable for the service that appends",
        ),
    }
}

fn check_space(found: &mut Diagnosis, dir: &Path, segment_bytes: u64) {
    let stat = match rustix::fs::statvfs(dir) {
        Ok(stat) => stat,
        Err(error) => return found.warn("space", error.to_string(), "check the directory"),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let segments = free / segment_bytes.max(1);
    let finding =
        format!("{free} bytes free, enough for {segments} segments of {segment_bytes} bytes");
    if segment_bytes > 0 && segments < 2 {
        found.warn("space", finding, "free some: appends fail cleanly when there is none");
    } else {
        found.ok("space", finding);
    }
    // Some file systems make inodes as they are needed, and count none.
    if stat.f_files > 0 && stat.f_favail < INODES_MIN {
        let finding = format!("{} inodes free", stat.f_favail);
        found.warn("inodes", finding, "remove files: every segment needs one or two");
    } else {
        found.ok("inodes", "enough");
    }
}

fn check_clock(found: &mut Diagnosis, dir: &Path) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let last = last_recorded_us(dir).unwrap_or(0);
    let now_us = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
    let hint = "set the clock; nothing is ordered by it, but recorded times are";
    if now < CLOCK_MIN {
        found.warn("clock", "it was never set", hint);
    } else if now_us < last {
        let behind = Duration::from_micros(last.abs_diff(now_us));
        found.warn("clock", format!("{behind:?} behind the last recorded event"), hint);
    } else {
        found.ok("clock", "not behind the last recorded event");
    }
}

fn last_recorded_us(dir: &Path) -> Option<i64> {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let (journal, _) = Journal::open_read_only(&fs, dir).ok()?;
    let last = Position::new(journal.end().position.get().checked_sub(1)?);
    let event = journal.read_all(last).ok()?.next()?.ok()?;
    Some(event.recorded_at_us())
}

/// The folders in a folder, by name.
fn folders(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let mut folders: Vec<_> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(name, _)| !name.starts_with('.'))
        .collect();
    folders.sort();
    folders
}

/// In which order the journals of views over several are taken in.
#[cfg(feature = "views")]
fn check_intake(found: &mut Diagnosis, views: &Path) {
    let rebuild = "delete it and, if all events are left, the folders of the views over these journals: they are built anew, in an order that is recorded anew";
    for (name, examined) in crate::view::intake_logs(views) {
        match examined {
            Ok((journals, runs)) => {
                found
                    .ok("intake", format!("{name}: the order of {journals} journals, {runs} runs"));
            }
            Err(error) => found.warn("intake", format!("{name}: {error}"), rebuild),
        }
    }
}

/// Views beside a journal that ends at `end`.
#[cfg(feature = "views")]
fn check_views(found: &mut Diagnosis, store: &Path, end: Checkpoint) {
    let rebuild = "move its folder away: the next opening builds it anew from the journal";
    check_intake(found, &store.join("views"));
    for (name, path) in folders(&store.join("views")) {
        let generations = match crate::view::generations(&path) {
            Ok(generations) => generations,
            Err(error) => {
                found.warn("view", format!("{name}: {error}"), rebuild);
                continue;
            }
        };
        for generation in generations {
            let name = format!("{name}, version {}.{}", generation.version, generation.number);
            if generation.is_not_kept() {
                let what =
                    "being built or deleted; if not, the next opening of the view deletes it";
                found.ok("view", format!("{name}: {what}"));
                continue;
            }
            if !generation.live {
                found.ok(
                    "view",
                    format!("{name}: set aside, or kept to go back to; may be deleted"),
                );
                continue;
            }
            use crate::view::Stored;
            match generation.checkpoint(end.journal) {
                Ok(Stored::Nothing) => found.ok("view", format!("{name}: empty")),
                Ok(Stored::Others(_)) => {
                    found.ok("view", format!("{name}: made from other journals"));
                }
                Ok(Stored::At(at)) if at.position > end.position => found.fail(
                    "view",
                    format!(
                        "{name}: at position {}, but the journal ends at {}",
                        at.position, end.position
                    ),
                    "the journal has lost its tail: restore it from a mirror or a newer backup",
                ),
                Ok(Stored::At(at)) => found.ok(
                    "view",
                    format!(
                        "{name}: at position {}, {} events behind",
                        at.position,
                        end.position.since(at.position)
                    ),
                ),
                Err(error) => found.warn("view", format!("{name}: {error}"), rebuild),
            }
        }
    }
}

#[cfg(not(feature = "views"))]
fn check_views(found: &mut Diagnosis, store: &Path, _end: Checkpoint) {
    for (name, _) in folders(&store.join("views")) {
        found.ok("view", format!("{name}: not examined, built without views"));
    }
}

fn check_mirrors(found: &mut Diagnosis, store: &Path) {
    for (name, path) in folders(&store.join("mirrors")) {
        let journal = path.join("journal");
        let journal = if journal.is_dir() { journal } else { path.clone() };
        match condition::examine(&OsFs, &journal) {
            Ok(condition) => check_mirror(found, &name, &path, &journal, &condition),
            Err(error) => found.warn("mirror", format!("{name}: {error}"), error.hint()),
        }
    }
}

fn check_mirror(found: &mut Diagnosis, name: &str, path: &Path, dir: &Path, condition: &Condition) {
    let (journal, end) = (condition.node.journal, condition.end);
    if !matches!(condition.role, Some(Role::Mirror | Role::Feed)) {
        let hint = "mirrors belong to the store that follows them: move it away";
        return found.warn("mirror", format!("{name}: not a mirror's directory"), hint);
    }
    match &condition.corruption {
        Some(corruption) => found.warn(
            "mirror",
            format!("{name}: {corruption}"),
            "it sets the rest aside and fetches it again from its origin",
        ),
        None => {
            found
                .ok("mirror", format!("{name}: journal {journal} up to position {}", end.position));
        }
    }
    check_orphans(found, "mirror", name, dir);
    check_views(found, path, end);
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn file_systems_that_keep_nothing_are_known() {
        let tmpfs = std::path::Path::new("/dev/shm");
        let Ok(stat) = rustix::fs::statfs(tmpfs) else {
            println!("skipped: no {}", tmpfs.display());
            return;
        };
        #[allow(clippy::unnecessary_cast, reason = "its type differs between architectures")]
        let (name, hint) = super::file_system(stat.f_type as i64);
        println!("{}: {name}", tmpfs.display());
        assert_eq!(name == "tmpfs", hint.is_some_and(|hint| hint.contains("memory")));
    }
}
