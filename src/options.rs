//! Options of a journal, with their defaults and limits.

use crate::error::OpenError;
use crate::format::batch::{BATCH_ALIGNMENT, BATCH_BYTES_LIMIT};
use crate::format::segment::HEADER_PAGE_BYTES;

/// How a journal is written. The defaults are safe and suit nearly everybody.
///
/// ```
/// let options = headwater::JournalOptions {
///     batch_bytes_max: 4 << 20,
///     group_bytes_max: 4 << 20,
///     ..Default::default()
/// };
/// assert!(options.check().is_ok());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalOptions {
    /// Segments grow up to this size, in bytes; the first ones are smaller. Default 64 MiB; at least the
    /// header page, the largest batch and the group alignment, at most 1 TiB.
    pub segment_bytes_max: u64,
    /// Size of the first segment, in bytes; each later one is twice as large, up to the maximum.
    /// Default 1 MiB.
    pub segment_bytes_first: u64,
    /// The largest batch (the events of one append, encoded), in bytes. Default 1 MiB, at most 16 MiB.
    pub batch_bytes_max: u32,
    /// How many bytes of batches one sync may cover. Default 1 MiB; at least the largest batch.
    pub group_bytes_max: u64,
    /// Every synced group is padded to a multiple of this: 64, or 512 or 4096 for devices where a torn
    /// write can damage bytes beside it. Default 64.
    pub group_alignment_bytes: u32,
    /// How many of the last events are remembered by id, so that appending one of them again under
    /// [`Any`](crate::ExpectedRevision::Any) or [`StreamExists`](crate::ExpectedRevision::StreamExists)
    /// is recognised. (`Exact` and `NoStream` recognise every repetition.) Default 2^20.
    pub idempotency_window_events: usize,
    /// How many bytes of buffered appends ([`Durability::Buffered`](crate::Durability)) may be unsynced,
    /// all together, before they block. Default 4 MiB.
    pub buffered_bytes_max: u64,
    /// How long an event may be unsynced, in milliseconds, before buffered appends block. Default 1000.
    pub buffered_age_ms_max: u64,
    /// How many bytes of the batches that became durable last are kept in memory, for views, mirrors and
    /// subscriptions that follow closely: they read nothing from the disk then. 0 keeps none. Default 4 MiB.
    pub recent_bytes_max: usize,
    /// Whether a thread works beside the appends: it syncs the mark (the record of what is durable) when the
    /// journal is idle and once a second, prepares the next segment before it is needed, and cuts full ones.
    /// Default true. Without it the mark is synced when a full segment is cut and at close only, and each commit
    /// does a part of the rest, behind its sync.
    pub background_thread: bool,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            segment_bytes_max: 64 << 20,
            segment_bytes_first: 1 << 20,
            batch_bytes_max: 1 << 20,
            group_bytes_max: 1 << 20,
            group_alignment_bytes: 64,
            idempotency_window_events: 1 << 20,
            buffered_bytes_max: 4 << 20,
            buffered_age_ms_max: 1000,
            recent_bytes_max: 4 << 20,
            background_thread: true,
        }
    }
}

impl JournalOptions {
    /// Verifies the limits.
    ///
    /// # Errors
    /// [`OpenError::InvalidOption`] naming the option.
    pub fn check(&self) -> Result<(), OpenError> {
        let invalid = |option, reason| Err(OpenError::InvalidOption { option, reason });
        if !(1024..=BATCH_BYTES_LIMIT).contains(&self.batch_bytes_max)
            || u64::from(self.batch_bytes_max) % BATCH_ALIGNMENT != 0
        {
            return invalid("batch_bytes_max", "must be a multiple of 64 from 1024 to 16 MiB");
        }
        if !matches!(self.group_alignment_bytes, 64 | 512 | 4096) {
            return invalid("group_alignment_bytes", "must be 64, 512 or 4096");
        }
        if self.group_bytes_max < u64::from(self.batch_bytes_max) {
            return invalid("group_bytes_max", "must not be smaller than batch_bytes_max");
        }
        if self.segment_bytes_max < self.segment_bytes_min() || self.segment_bytes_max > 1 << 40 {
            return invalid(
                "segment_bytes_max",
                "must hold the header page and the largest batch, and be at most 1 TiB",
            );
        }
        Ok(())
    }

    fn segment_bytes_min(&self) -> u64 {
        HEADER_PAGE_BYTES as u64
            + u64::from(self.batch_bytes_max)
            + u64::from(self.group_alignment_bytes)
    }

    /// The size to prepare for the segment that follows one of `previous` bytes.
    pub(crate) fn segment_bytes_after(&self, previous: Option<u64>) -> u64 {
        let wanted = previous.map_or(self.segment_bytes_first, |bytes| bytes.saturating_mul(2));
        wanted.clamp(self.segment_bytes_min(), self.segment_bytes_max)
    }
}
