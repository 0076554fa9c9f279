//! Groups of batches that share a sync, and those who wait for them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use crate::error::Poison;
use crate::event::{Revision, StreamId};
use crate::format::batch::{BATCH_ALIGNMENT, BATCH_HEADER_BYTES, BatchHeader, body_digest};
use crate::format::labels::labels_of;
use crate::format::record::RecordRef;
use crate::format::sidecar::SegmentIndex;
use crate::format::{crc32, record};
use crate::journal::appender::append::Append;
use crate::sync::{Gate, Mutex, Signal};

/// What became of a group.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Durable,
    /// It was written, or may have been, and its sync failed or never began.
    Unknown(Poison),
    /// The writer had failed before the group's turn came.
    NotWritten(Poison),
}

/// Those who wait for one sync.
#[derive(Debug)]
pub(super) struct Group {
    outcome: OnceLock<Outcome>,
    gate: Gate,
    wakers: Mutex<Vec<Waker>>,
}

impl Group {
    pub(super) fn new() -> Self {
        Self { outcome: OnceLock::new(), gate: Gate::default(), wakers: Mutex::default() }
    }

    pub(super) fn outcome(&self) -> Option<&Outcome> {
        self.outcome.get()
    }

    /// Answers everybody. Only the first outcome counts.
    pub(super) fn resolve(&self, outcome: Outcome) {
        if self.outcome.set(outcome).is_ok() {
            self.gate.open();
            std::mem::take(&mut *self.wakers.lock()).into_iter().for_each(Waker::wake);
        }
    }

    /// Asks one of those who wait to see to the group.
    pub(super) fn call(&self) {
        self.gate.call();
    }

    pub(super) fn wait(&self) -> Signal {
        self.gate.wait()
    }

    /// `place` is where the asker's waker is kept, once it is.
    pub(super) fn poll(&self, context: &Context<'_>, place: &mut Option<usize>) -> Poll<&Outcome> {
        if let Some(outcome) = self.outcome.get() {
            return Poll::Ready(outcome);
        }
        let mut wakers = self.wakers.lock();
        // `resolve` takes the wakers after it has set the outcome: whoever is too late sees the outcome.
        if let Some(outcome) = self.outcome.get() {
            return Poll::Ready(outcome);
        }
        match place.and_then(|place| wakers.get_mut(place)) {
            Some(waker) => waker.clone_from(context.waker()),
            None => {
                *place = Some(wakers.len());
                wakers.push(context.waker().clone());
            }
        }
        Poll::Pending
    }
}

/// The group that still takes batches in.
#[derive(Debug)]
pub(super) struct OpenGroup {
    pub(super) group: Arc<Group>,
    pub(super) slots: Vec<Slot>,
    pub(super) bytes: u64,
    /// When its first member came.
    pub(super) began: Instant,
    /// Members that are still computing their checksums.
    pub(super) unready: usize,
}

impl OpenGroup {
    pub(super) fn new() -> Self {
        let group = Arc::new(Group::new());
        Self { group, slots: Vec::new(), bytes: 0, began: Instant::now(), unready: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

/// A batch's place in a group; the batch itself follows when its checksums are computed.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) header: BatchHeader,
    pub(super) batch: Option<Batch>,
}

/// A batch but for its header, for which there is room in front.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) crc: u32,
    pub(super) digest: [u8; 32],
    pub(super) runs: Vec<Run>,
    pub(super) ids: Vec<u64>,
}

/// Events of one stream that follow each other in a batch.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) stream: StreamId,
    pub(super) first: Revision,
    /// Which of the batch's events they are.
    pub(super) events: Range<usize>,
}

/// An append, encoded but for what is known only when its turn comes.
#[derive(Debug)]
pub(super) struct Draft {
    bytes: Vec<u8>,
    /// Where each record begins.
    starts: Vec<usize>,
    pub(super) runs: Vec<Run>,
    pub(super) ids: Vec<u64>,
    /// The labels of each event, once they are asked for.
    labels: Option<Vec<Vec<u64>>>,
}

impl Draft {
    pub(super) fn of(append: &Append, ids: Vec<u64>) -> Self {
        // With some room for the padding, so that the batch never moves.
        let mut bytes = Vec::with_capacity(append.bytes.len() + BATCH_ALIGNMENT as usize);
        bytes.extend_from_slice(&append.bytes);
        let written = append.parts.iter().filter(|part| !part.events.is_empty());
        let runs = written.map(|part| Run {
            stream: part.stream.clone(),
            first: Revision::FIRST,
            events: part.events.clone(),
        });
        Self { bytes, starts: append.starts.clone(), runs: runs.collect(), ids, labels: None }
    }

    /// Finds out by what its events are looked up.
    pub(super) fn label(&mut self) {
        let bytes = &self.bytes;
        let labels = |at: &usize| {
            let record = RecordRef::decode(bytes.get(*at..).unwrap_or_default());
            // The own encoding can be read.
            record.map(|(record, _)| labels_of(&record)).unwrap_or_default()
        };
        self.labels.get_or_insert_with(|| self.starts.iter().map(labels).collect());
    }

    pub(super) fn take_labels(&mut self) -> Vec<Vec<u64>> {
        self.label();
        self.labels.take().unwrap_or_default()
    }

    pub(super) fn body_len(&self) -> u64 {
        (self.bytes.len() - BATCH_HEADER_BYTES) as u64
    }

    /// Writes the revisions of the runs into their records. Costs no lock: nobody else sees the draft.
    pub(super) fn set_revisions(&mut self) {
        for run in &self.runs {
            let mut revision = run.first;
            for at in self.starts.get(run.events.clone()).unwrap_or_default() {
                record::set_revision(&mut self.bytes, *at, revision);
                revision = revision.next();
            }
        }
    }

    pub(super) fn into_batch(self) -> Batch {
        let body = self.bytes.get(BATCH_HEADER_BYTES..).unwrap_or_default();
        let (crc, digest) = (crc32(&[body]), body_digest(body));
        Batch { bytes: self.bytes, crc, digest, runs: self.runs, ids: self.ids }
    }
}

impl Batch {
    /// Tells the index of the segment what the batch holds.
    pub(super) fn add_to(&self, header: &BatchHeader, index: &mut SegmentIndex) {
        index.add_batch(header);
        for run in &self.runs {
            let first = header.base_position.advance(run.events.start as u64);
            index.add_run(run.stream.as_str(), run.first, first, run.events.len(), header.offset);
        }
        index.ids.extend_from_slice(&self.ids);
    }

    /// Puts the header into its room, and zeros behind the body.
    pub(super) fn complete(&mut self, header: &[u8; BATCH_HEADER_BYTES], padded_len: usize) {
        if let Some(room) = self.bytes.first_chunk_mut() {
            *room = *header;
        }
        self.bytes.resize(padded_len, 0);
    }
}
