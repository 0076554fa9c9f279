//! Bases: the rows of a view as of its checkpoint, for somebody who hasn't folded the history and needn't.
//!
//! ```text
//!  a service that has the view            BASE/                                a new subscriber
//!  generation ── checkpoint of RocksDB ─▶ rows/       hard links if it can be ─── copied, verified ─▶ generation
//!  decisions, deadly events ────────────▶ discarded, deadly ───────────────────── taken over
//!  order of intake, of several journals ▶ intake ──────────────────────────────── taken over
//!  journal ──── the last segment ───────▶ journals/ID/   up to that checkpoint ── begin_with ───────▶ mirror
//!                                         manifest    last, when all is durable
//! ```
//! With the rows comes the end of each journal: the segment in which the checkpoint lies, up to there, and what is to be
//! known of all in front ([retention](crate::retention) leaves the same). A mirror that begins with it holds the view's
//! checkpoint, chain and all, so its origin compares it before it sends a byte; and the view compares itself with the mirror.
//! Nothing in front of that segment is needed, or ever fetched.
//!
//! Invariants:
//! - A directory without `manifest` is no base. It is written last, and names every file with its length and BLAKE3.
//! - What is imported is a generation like any other: begun beside the live one, not kept until it is whole, live by one
//!   replacement of the pointer.
//! - Nothing of another view, version, shape or history becomes live: the checkpoint must lie in each of the view's journals
//!   here, with the same chain.
//! - What is parked comes with the rows. Decisions that they were made by are taken over before they are live; rows that
//!   have an event which was given up here are refused.
//!
//! ```text
//! manifest      headwater view base 1                 a text of lines: the layout of this file,
//!               view counts 1                         name and version,
//!               layout 2                              layout of the database,
//!               codec bincode 2                       how rows are encoded,
//!               index by-day                          names of indexes and tables, in order,
//!               table orders
//!               journal 5f00…                         a checkpoint, its 64 bytes in hexadecimal; for each journal
//!               skipped 3                             events of unknown types in front of it,
//!               parked 1 2 0                          keys, events, and events under no key,
//!               digest 41 9a3c…                       rows, and BLAKE3 over them and their index entries,
//!               file rows/000012.sst 52311 77e0…      for each file: length, and BLAKE3
//!               crc32 5f3c9a01                        checksum of the lines above
//! ```

mod error;
mod export;
mod import;
mod manifest;

use std::path::Path;
use std::sync::Arc;

pub use error::BaseError;
#[cfg(feature = "cli")]
pub(crate) use export::export_at_rest;
pub(super) use export::{Beside, export};
pub(super) use import::{Import, begin_with};
#[cfg(feature = "cli")]
pub(crate) use import::{Imported, import_at_rest};
use manifest::Manifest;

use super::error::ViewError;
use super::poison::ParkedCounts;
use super::rebuild::Digest;
use crate::fs::{Fs, os::OsFs};
use crate::journal::layout::MANIFEST;
use crate::position::Checkpoint;

/// There while a base is being written.
const UNFINISHED: &str = "unfinished";
const ROWS: &str = "rows";
const DISCARDED: &str = "discarded";
const DEADLY: &str = "deadly";
const INTAKE: &str = "intake";
/// How rows are encoded.
const CODEC: &str = "bincode 2";
/// Files are read and written in pieces of so many bytes.
const PIECE_BYTES: usize = 256 << 10;

/// What is in a base; see [`ViewControl::export_base`](super::ViewControl::export_base).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ViewBase {
    /// The view's name.
    pub view: String,
    /// The version that can read the rows.
    pub version: u32,
    /// What the rows are of, in each of the view's journals.
    pub checkpoints: Vec<Checkpoint>,
    /// What the rows come to.
    pub digest: Digest,
    /// How many of the events in front of the checkpoint were of types that the view doesn't know.
    pub skipped_events: u64,
    /// How much is parked.
    pub parked: ParkedCounts,
    /// Bytes of its files, without those of the journals.
    pub bytes: u64,
}

impl ViewBase {
    /// Reads what the base in `dir` says of itself. The files are verified when it is imported.
    ///
    /// # Errors
    /// [`ViewError::Base`] if it is none, or damaged.
    pub fn read(dir: &Path) -> Result<Self, ViewError> {
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        Ok(Manifest::read(&*fs, dir)?.summary())
    }
}
