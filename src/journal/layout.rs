//! The names in a journal's directory, and how a small file there is replaced.
//!
//! ```text
//! journal/
//!   node                    role, node id, journal id
//!   mark                    how far it is known to be durable
//!   0000000000000000.seg    segments, by number in hexadecimal
//!   0000000000000000.idx    sidecars of sealed segments (derived)
//!   0000000000000000-1.map  maps of streams to segments, by level (derived)
//!   0000000000000000.lbl    types and tags of sealed segments (derived)
//!   base                    what is known of a prefix that retention has removed, if it has
//!   gaps                    losses that were accepted, if there are any
//!   leases                  up to where mirrors have said to be durable, if there are any
//!   quarantine/             what recovery moved aside, under names that are never used again
//!     reserve               space for it, allocated while there is some
//!   orphaned/               in a mirror: tails that its origin has lost, set aside
//!     EPOCH-POSITION/       one of them: segments from the last common batch on, and a base
//!   incoming                a restore that is under way: from where to where
//!   recovering              an origin that is taking back from a mirror what it has lost
//!   lock                    held by the writer, bears its name
//! ```

use std::path::{Path, PathBuf};

use crate::error::{IoContext, IoError};
use crate::format::map::LEVELS;
use crate::fs::{self, Fs, OpenMode};
use crate::position::Position;

/// In the base of a view: the ends of its journals, by id.
#[cfg(any(feature = "views", feature = "shipping"))]
pub(crate) const JOURNALS: &str = "journals";
/// In the base of a view: what there is.
#[cfg(any(feature = "views", feature = "shipping"))]
pub(crate) const MANIFEST: &str = "manifest";
/// No manifest is longer: it names some hundred thousand files.
#[cfg(any(feature = "views", feature = "shipping"))]
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
pub(crate) const NODE: &str = "node";
pub(crate) const MARK: &str = "mark";
pub(crate) const LOCK: &str = "lock";
pub(crate) const INCOMING: &str = "incoming";
pub(crate) const BASE: &str = "base";
pub(crate) const LEASES: &str = "leases";
pub(crate) const GAPS: &str = "gaps";
pub(crate) const QUARANTINE: &str = "quarantine";
pub(crate) const RESERVE: &str = "reserve";
pub(crate) const ORPHANED: &str = "orphaned";
pub(crate) const RECOVERING: &str = "recovering";

/// What the name of a file ends with until it takes the place of the one that it replaces.
pub(crate) const NEW: &str = ".new";
/// Ending of a sidecar that is being written.
pub(crate) const SIDECAR_TEMP: &str = "idx.new";
/// Ending of a file of labels, and of one that is being written.
pub(crate) const LABELS: &str = "lbl";
pub(crate) const LABELS_TEMP: &str = "lbl.new";

const TORN: &str = "torn";

/// Paths within one journal's directory.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
}

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where `name` is written before it replaces what has that name.
    pub(crate) fn new_file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{NEW}"))
    }

    /// Replaces a small file as a whole: the contents are durable before they have the name, and the name is when
    /// this returns.
    pub(crate) fn replace(&self, fs: &dyn Fs, name: &str, bytes: &[u8]) -> Result<(), IoError> {
        let (new, path) = (self.new_file(name), self.file(name));
        drop(fs.remove(&new));
        let file = fs.open(&new, OpenMode::CreateNew).context("creating", &new)?;
        fs::write_all_at(&*file, bytes, 0).context("writing", &new)?;
        file.sync_data().context("syncing", &new)?;
        fs.rename(&new, &path).context("renaming", &new)?;
        fs.sync_dir(&self.dir).context("syncing", &self.dir)
    }

    pub(crate) fn segment(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}.seg"))
    }

    pub(crate) fn sidecar(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}.idx"))
    }

    /// A sidecar that is being written.
    pub(crate) fn sidecar_temp(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}.{SIDECAR_TEMP}"))
    }

    pub(crate) fn labels(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}.{LABELS}"))
    }

    /// A file of labels that is being written.
    pub(crate) fn labels_temp(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:016x}.{LABELS_TEMP}"))
    }

    pub(crate) fn map(&self, level: u32, first: u64) -> PathBuf {
        self.dir.join(format!("{first:016x}-{level}.map"))
    }

    pub(crate) fn quarantine(&self) -> PathBuf {
        self.dir.join(QUARANTINE)
    }

    pub(crate) fn orphaned(&self) -> PathBuf {
        self.dir.join(ORPHANED)
    }

    /// Where a mirror's tail is set aside: its epoch, and the position of the last common batch end. The first
    /// attempt to find a free name is number 1.
    pub(crate) fn orphaned_tail(&self, epoch: u32, from: Position, attempt: u32) -> PathBuf {
        let again = if attempt > 1 { format!("-{attempt}") } else { String::new() };
        self.orphaned().join(format!("{epoch}-{}{again}", from.get()))
    }

    /// The copy of a torn tail, until the tail is gone: the segment, and where in its file the tail begins.
    pub(crate) fn torn_tail(&self, number: u64, from: u64) -> PathBuf {
        self.quarantine().join(format!("{number:016x}-{from:016x}.{TORN}"))
    }

    /// A name in the quarantine that was never used.
    pub(crate) fn quarantined(&self, number: u64, what: &str) -> PathBuf {
        let unique = crate::env::random_u64();
        self.quarantine().join(format!("{number:016x}-{unique:016x}.{what}"))
    }
}

/// The position in the name of a [`Layout::orphaned_tail`].
pub(crate) fn orphaned_from(name: &str) -> Option<u64> {
    let mut parts = name.split('-');
    parts.next()?.parse::<u32>().ok()?;
    parts.next()?.parse().ok()
}

/// The segment of which this is a [`Layout::torn_tail`].
pub(crate) fn torn_of(name: &str) -> Option<u64> {
    let (number, from) = name.strip_suffix(TORN)?.strip_suffix('.')?.split_once('-')?;
    u64::from_str_radix(from, 16).ok()?;
    u64::from_str_radix(number, 16).ok()
}

/// The number in the name of a segment or sidecar.
pub(crate) fn number_of(name: &str, extension: &str) -> Option<u64> {
    let digits = name.strip_suffix(extension)?.strip_suffix('.')?;
    let well_formed =
        digits.len() == 16 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let number = well_formed.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    number.filter(|number| *number < u64::MAX) // which means "none", and has no next one
}

/// Level and number of the first segment in the name of a map.
pub(crate) fn map_of(name: &str) -> Option<(u32, u64)> {
    let (first, level) = name.strip_suffix(".map")?.rsplit_once('-')?;
    let level: u32 = level.parse().ok().filter(|level| (1..LEVELS).contains(level))?;
    let first = u64::from_str_radix(first, 16).ok()?;
    (name == format!("{first:016x}-{level}.map")).then_some((level, first))
}
