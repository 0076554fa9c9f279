//! What Headwater is held to: each figure has a limit that was set before it was measured. The page says which are
//! reached and which are missed; nobody types that in.
//!
//! ```text
//!   paths ── paths.json: held ──╮
//!                               ├──▶ the table "Held to" of docs/benchmarks/README.md
//!   peers ── peers.json: held ──╯
//! ```
//! Each program measures its own part and writes the whole table, with the other's part as it was last measured.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::page::{self, Part};
use super::spread::Spread;

/// A measured figure with a limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// Names the target.
    pub(crate) id: String,
    /// What is compared with the limit: the median over the turns or rounds.
    pub(crate) value: Spread,
    /// What one has to know to judge it.
    pub(crate) note: String,
    /// Why the limit says nothing here, if so.
    pub(crate) void: Option<String>,
}

impl Held {
    /// `None` if it wasn't measured.
    pub(crate) fn new(id: &str, value: Option<Spread>, note: impl Into<String>) -> Option<Self> {
        Some(Self { id: id.to_owned(), value: value?, note: note.into(), void: None })
    }
}

#[derive(Clone, Copy)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
}

struct Target {
    id: &'static str,
    what: &'static str,
    limit: Limit,
    unit: &'static str,
    digits: usize,
}

const fn target(
    id: &'static str,
    what: &'static str,
    limit: Limit,
    unit: &'static str,
    digits: usize,
) -> Target {
    Target { id, what, limit, unit, digits }
}

pub(crate) const SYNCS: &str = "syncs";
pub(crate) const DIRECTORY_SYNCS: &str = "directory-syncs";
pub(crate) const CREATIONS: &str = "creations";
pub(crate) const DEVICE_WRITES: &str = "device-writes";
pub(crate) const ONE_WRITER: &str = "one-writer";
pub(crate) const BEST_PEER_64: &str = "best-peer-64";
pub(crate) const BEST_PEER_BATCHES: &str = "best-peer-batches";
pub(crate) const OWN_16: &str = "own-16";
pub(crate) const OWN_64: &str = "own-64";
pub(crate) const BUFFERED: &str = "buffered";
pub(crate) const BUFFERED_CPU: &str = "buffered-processor";
/// In millions of events per second.
pub(crate) const BUFFERED_M: f64 = 3.0;
pub(crate) const ALLOCATIONS: &str = "allocations";
pub(crate) const REPLAY: &str = "replay";
pub(crate) const OPEN: &str = "open";
pub(crate) const ROLLS: &str = "rolls";
pub(crate) const SUBSCRIPTION: &str = "subscription";

use Limit::{AtLeast, AtMost, Exactly};

const TARGETS: [Target; 16] = [
    target(SYNCS, "Sync calls per commit of one writer, rolls included", Exactly(1.0), "", 3),
    target(DIRECTORY_SYNCS, "Directory syncs on the commit path", AtMost(0.0), " per roll", 2),
    target(CREATIONS, "Files created on the commit path", AtMost(0.0), " per roll", 2),
    target(DEVICE_WRITES, "Writes of the device per commit (ext4)", AtMost(2.5), "", 2),
    target(
        ONE_WRITER,
        "One durable writer, 256 B: median time over that of a bare write + fdatasync of as many bytes (zero-filled file)",
        AtMost(1.10),
        "x",
        2,
    ),
    target(BEST_PEER_64, "64 durable writers, 256 B: over the best peer", AtLeast(1.5), "x", 2),
    target(
        BEST_PEER_BATCHES,
        "Durable batches of 1000, 256 B: over the best peer",
        AtLeast(2.0),
        "x",
        2,
    ),
    target(OWN_16, "16 durable writers over one", AtLeast(6.0), "x", 1),
    target(OWN_64, "64 durable writers over one", AtLeast(18.0), "x", 1),
    target(
        BUFFERED,
        "Buffered batches of 64, 256 B: by the clock, one thread appending",
        AtLeast(BUFFERED_M),
        " M events/s",
        2,
    ),
    target(
        BUFFERED_CPU,
        "The same by processor time: what one core could do",
        AtLeast(BUFFERED_M),
        " M events/s",
        2,
    ),
    target(
        ALLOCATIONS,
        "Allocations for one more event in a buffered batch",
        AtMost(0.01),
        " per event",
        3,
    ),
    target(
        REPLAY,
        "Replay, verified, every record seen: over a bare read + CRC-32",
        AtLeast(0.8),
        "x",
        2,
    ),
    target(OPEN, "Opening, by the number of sealed segments", AtMost(100.0), " µs per segment", 1),
    target(
        ROLLS,
        "Appends with a roll every 2 MiB: p99.9 over that without rolls",
        AtMost(1.5),
        "x",
        2,
    ),
    target(
        SUBSCRIPTION,
        "A subscriber in the process has the event: median, after the append's answer",
        AtMost(20.0),
        " µs",
        1,
    ),
];

impl Limit {
    fn reached(self, value: f64) -> bool {
        match self {
            AtMost(limit) => value <= limit,
            AtLeast(limit) => value >= limit,
            Exactly(wanted) => (value - wanted).abs() < 0.005,
        }
    }

    fn shown(self, target: &Target) -> String {
        let (word, limit) = match self {
            AtMost(limit) => ("at most ", limit),
            AtLeast(limit) => ("at least ", limit),
            Exactly(limit) => ("", limit),
        };
        format!("{word}{limit}{}", target.unit)
    }
}

impl Target {
    fn row(&self, held: Option<&Held>) -> String {
        let limit = self.limit.shown(self);
        let Some(held) = held else {
            return format!("| {} | {limit} | - | not measured | |\n", self.what);
        };
        let (Spread { median, min, max }, unit, digits) = (held.value, self.unit, self.digits);
        let spread = if min == max {
            String::new()
        } else {
            format!("<br>*{min:.digits$} to {max:.digits$}*")
        };
        let verdict = match &held.void {
            Some(_) => "says nothing here",
            None if self.limit.reached(median) => "reached",
            None => "**missed**",
        };
        let note = [held.void.as_deref(), Some(held.note.as_str())];
        let note: Vec<_> = note.into_iter().flatten().filter(|it| !it.is_empty()).collect();
        format!(
            "| {} | {limit} | {median:.digits$}{unit}{spread} | {verdict} | {} |\n",
            self.what,
            note.join("; ")
        )
    }
}

const PART: Part =
    Part { begin: "<!-- held to: generated: begin -->", end: "<!-- held to: generated: end -->" };

/// The files that may hold figures.
const DATA: [&str; 2] = ["paths.json", "peers.json"];

/// Writes the table from what both programs have left in the folder.
pub(crate) fn write(out: &Path, page: &Path) -> Result<(), super::Error> {
    #[derive(Deserialize)]
    struct Data {
        held: Vec<Held>,
    }
    let mut all = Vec::new();
    for file in DATA {
        match fs::read_to_string(out.join(file)) {
            Ok(text) => all.extend(serde_json::from_str::<Data>(&text)?.held),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    page::write(page, &PART, &table(&all))
}

fn table(all: &[Held]) -> String {
    let mut text = "| | wanted | measured | | |\n|---|---|---:|---|---|\n".to_owned();
    for target in &TARGETS {
        text += &target.row(all.iter().find(|held| held.id == target.id));
    }
    text
}
