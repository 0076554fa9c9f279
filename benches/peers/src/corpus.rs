//! What is appended and read: the same bytes for everybody.

use serde::{Deserialize, Serialize};

use crate::engine::Place;

/// Payloads are cut out of this much, one behind the other, so that no batch holds the same bytes twice.
const POOL_BYTES: usize = 8 << 20;

/// Half of each piece is random, half is text: compression gains something, but not everything.
const PIECE_BYTES: usize = 32;
const TEXT: &[u8] = b"{\"total_cents\":";

/// Payloads of a given size. They differ; none begins with a zero.
pub(crate) struct Payloads {
    pool: Vec<u8>,
    bytes: usize,
    at: usize,
}

/// From one payload to the next: in whole pieces, because each begins with text.
fn stride(bytes: usize) -> usize {
    bytes.next_multiple_of(PIECE_BYTES)
}

impl Payloads {
    /// Writers with different seeds begin in different places.
    pub(crate) fn new(bytes: usize, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let mut pool = Vec::with_capacity(POOL_BYTES + bytes);
        while pool.len() < POOL_BYTES + bytes {
            pool.extend_from_slice(TEXT);
            pool.extend(std::iter::repeat_with(|| random.u8(1..)).take(PIECE_BYTES - TEXT.len()));
        }
        let pieces = (POOL_BYTES / PIECE_BYTES) as u64;
        let at = (seed.wrapping_mul(2_654_435_761) % pieces) as usize * PIECE_BYTES;
        Self { pool, bytes, at }
    }

    /// The next `count` of them.
    pub(crate) fn next(&mut self, count: usize) -> Vec<&[u8]> {
        let first = self.at;
        let stride = stride(self.bytes);
        self.at = (self.at + count * stride) % POOL_BYTES;
        let at = |index: usize| (first + index * stride) % POOL_BYTES;
        (0..count).map(|index| &self.pool[at(index)..][..self.bytes]).collect()
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
