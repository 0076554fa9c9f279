//! What is appended and read: the same bytes for everybody.

use serde::{Deserialize, Serialize};

use crate::engine::Place;

/// Payloads are cut out of this much, one behind the other, so that no batch holds the same bytes twice.
const POOL_BYTES: usize = 8 << 20;

/// Half of each piece is random, half is text: compression gains something, but not everything.
const PIECE_BYTES: usize = 32;
const TEXT: &[u8] = b"{\"total_cents\":";

/// What payloads are cut out of.
pub(crate) struct Pool {
    bytes: Vec<u8>,
    payload_bytes: usize,
}

impl Pool {
    pub(crate) fn new(payload_bytes: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let mut bytes = Vec::with_capacity(POOL_BYTES + payload_bytes + PIECE_BYTES);
        while bytes.len() < POOL_BYTES + payload_bytes {
            bytes.extend_from_slice(TEXT);
            bytes.extend(std::iter::repeat_with(|| random.u8(1..)).take(PIECE_BYTES - TEXT.len()));
        }
        Self { bytes, payload_bytes }
    }

    /// A writer's payloads. Writers with different seeds begin in different places.
    pub(crate) fn payloads(&self, seed: u64) -> Payloads<'_> {
        let pieces = (POOL_BYTES / PIECE_BYTES) as u64;
        let at = (seed.wrapping_mul(2_654_435_761) % pieces) as usize * PIECE_BYTES;
        Payloads { pool: self, at }
    }
}

/// Payloads of one size. They differ; none begins with a zero.
pub(crate) struct Payloads<'a> {
    pool: &'a Pool,
    at: usize,
}

/// From one payload to the next: in whole pieces, because each begins with text.
fn stride(bytes: usize) -> usize {
    bytes.next_multiple_of(PIECE_BYTES)
}

impl<'a> Payloads<'a> {
    /// Puts the next `count` of them into `batch`, instead of what is there.
    pub(crate) fn next(&mut self, batch: &mut Vec<&'a [u8]>, count: usize) {
        let Pool { bytes, payload_bytes } = self.pool;
        let stride = stride(*payload_bytes);
        batch.clear();
        for _ in 0..count {
            batch.push(&bytes[self.at..][..*payload_bytes]);
            self.at = (self.at + stride) % POOL_BYTES;
        }
    }
}

/// The log that is read: batches that go to the streams in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Corpus {
    pub(crate) events: u64,
    pub(crate) batch: usize,
    pub(crate) payload_bytes: usize,
    pub(crate) streams: u32,
}

impl Corpus {
    /// The stream of every batch.
    pub(crate) fn batches(&self) -> impl Iterator<Item = u32> + Clone + use<> {
        let streams = self.streams;
        let batches = self.events / self.batch as u64;
        (0..batches).map(move |batch| (batch % u64::from(streams)) as u32)
    }

    pub(crate) fn events_per_stream(&self) -> u64 {
        self.events / u64::from(self.streams)
    }

    /// Where an event is.
    pub(crate) fn place(&self, number: u64) -> Place {
        let (size, streams) = (self.batch as u64, u64::from(self.streams));
        let batch = number / size;
        Place {
            number,
            stream: (batch % streams) as u32,
            revision: batch / streams * size + number % size,
        }
    }
}
