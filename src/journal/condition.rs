//! What a look at a journal's directory tells without reading all of it: for the doctor.

use std::path::Path;

use crate::error::{Corruption, OpenError};
use crate::format::files::{Mark, Node, Role};
use crate::format::gaps::Gap;
use crate::fs::Fs;
use crate::journal::layout::{self, Layout};
use crate::journal::segments::Access;
use crate::journal::{mark, read_node, recovery, survey_beside_writer};
use crate::position::Checkpoint;

/// The state of a journal's directory.
#[derive(Debug)]
pub(crate) struct Condition {
    pub(crate) node: Node,
    /// `None` for a copy, which has no `node`.
    pub(crate) role: Option<Role>,
    pub(crate) mark: Option<Mark>,
    /// End of the valid prefix.
    pub(crate) end: Checkpoint,
    pub(crate) proven_offset: u64,
    pub(crate) corruption: Option<Corruption>,
    /// Behind the end: bytes of a torn tail, segments, and header pages with a damaged copy.
    pub(crate) torn_bytes: u64,
    pub(crate) segments_behind: u64,
    pub(crate) damaged_headers: u64,
    pub(crate) segments: u64,
    pub(crate) spares: u64,
    /// Sealed segments without a sidecar.
    pub(crate) without_sidecar: u64,
    /// Size to which the last segment was prepared.
    pub(crate) segment_bytes: u64,
    pub(crate) gaps: Vec<Gap>,
}

/// Looks at the journal in `dir`: its headers, and the batches behind what is proven. Changes nothing, takes
/// no lock, and may run beside the writer.
pub(crate) fn examine(fs: &dyn Fs, dir: &Path) -> Result<Condition, OpenError> {
    let layout = Layout::new(dir);
    let (node, role) = match read_node(fs, &layout)? {
        Some(node) => (node, Some(node.role)),
        None => (recovery::node_of_copy(fs, &layout)?, None),
    };
    let names = fs.list(dir).map_err(|error| crate::IoError::new("listing", dir, error))?;
    let (survey, corruption) = survey_beside_writer(fs, &layout, &node)?;
    let (torn_bytes, segments_behind, damaged_headers) = survey.pending(fs, &layout)?;
    let sealed = survey.kept.split_last().map_or(&[][..], |(_, sealed)| sealed);
    let indexed =
        |number: u64| names.iter().any(|name| layout::number_of(name, "idx") == Some(number));
    Ok(Condition {
        node,
        role,
        mark: mark::read(fs, &layout, Access::ReadOnly)?,
        end: survey.end,
        proven_offset: survey.proven,
        corruption,
        torn_bytes,
        segments_behind,
        damaged_headers,
        segments: survey.kept.len() as u64,
        spares: survey.spares() as u64,
        without_sidecar: sealed.iter().filter(|kept| !indexed(kept.number())).count() as u64,
        segment_bytes: survey.kept.last().map_or(0, |kept| kept.page.header.capacity_bytes),
        gaps: survey.gaps.all().to_vec(),
    })
}
