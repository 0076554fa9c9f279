//! The batches that became durable last, in memory, for those who follow closely.
//!
//! ```text
//!   publish ─▶ │ run │ run │ run │ ─▶ forgotten when there are too many bytes      run: what one sync covered
//!                     ╰──▶ shared by all cursors that are there
//! ```
//! - A run gets here when its sync has succeeded, in the same step that moves the durable end, and never
//!   otherwise: a writer that failed publishes nothing.
//! - The bytes are those that were written. Whoever reads them verifies them, as if they came from the disk.
//! - What is kept is bounded; a cursor holds on to the one run that it is in, for as long as it is in it.

use std::collections::VecDeque;
use std::sync::Arc;

/// What a run costs beside its bytes.
const RUN_BYTES: usize = 128;

/// Whole batches in a row, durable, of one segment.
#[derive(Debug)]
pub(crate) struct Run {
    offset: u64,
    bytes: Vec<u8>,
}

impl Run {
    pub(crate) fn end_offset(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }

    /// The bytes from `offset` on; none if it lies elsewhere.
    pub(crate) fn bytes_from(&self, offset: u64) -> &[u8] {
        let from = offset.checked_sub(self.offset).and_then(|from| usize::try_from(from).ok());
        from.and_then(|from| self.bytes.get(from..)).unwrap_or_default()
    }

    fn cost(&self) -> usize {
        self.bytes.capacity() + RUN_BYTES
    }
}

/// The last runs, by offset.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    runs: VecDeque<Arc<Run>>,
    bytes: usize,
    bytes_max: usize,
}

impl Recent {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { runs: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Takes in the batches that end at `end_offset`.
    pub(crate) fn push(&mut self, end_offset: u64, bytes: Vec<u8>) {
        let Some(offset) = end_offset.checked_sub(bytes.len() as u64) else { return };
        let run = Run { offset, bytes };
        if run.bytes.is_empty() || run.cost() > self.bytes_max {
            return;
        }
        self.bytes += run.cost();
        self.runs.push_back(Arc::new(run));
        while self.bytes > self.bytes_max
            && let Some(oldest) = self.runs.pop_front()
        {
            self.bytes -= oldest.cost();
        }
    }

    /// The run that holds the batch at `offset`.
    pub(crate) fn at(&self, offset: u64) -> Option<Arc<Run>> {
        let behind = self.runs.partition_point(|run| run.offset <= offset);
        let run = self.runs.get(behind.checked_sub(1)?)?;
        (offset < run.end_offset()).then(|| Arc::clone(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_runs_are_found_by_offset_and_never_cost_more_than_allowed() {
        let mut rng = fastrand::Rng::with_seed(7);
        for bytes_max in [0, 100, 1000, 5000] {
            let mut recent = Recent::new(bytes_max);
            let mut all: Vec<u8> = Vec::new();
            for _ in 0..500 {
                let from = all.len();
                all.extend((0..rng.usize(1..900)).map(|_| rng.u8(..)));
                recent.push(all.len() as u64, all[from..].to_vec());
                let cost: usize = recent.runs.iter().map(|run| run.cost()).sum();
                assert!(cost == recent.bytes && cost <= bytes_max);
                if all.len() - from + RUN_BYTES <= bytes_max {
                    assert!(recent.at(from as u64).is_some(), "the newest is there");
                }
                for _ in 0..5 {
                    let at = rng.usize(..all.len() + 10);
                    let Some(run) = recent.at(at as u64) else { continue };
                    let end = run.end_offset() as usize;
                    assert_eq!(run.bytes_from(at as u64), &all[at..end]);
                }
            }
            assert!(recent.at(all.len() as u64).is_none());
            assert!(recent.at(0).is_none());
        }
    }
}
