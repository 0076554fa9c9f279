//! Rows that were written last, for the fold that needs them next.
//!
//! A fold begins with the stored row. To find one among a million costs more than to fold it; most of those that are needed
//! were written not long ago.
//!
//! Invariants:
//! - What is in it is what the database has: it is changed by what was written, behind each write, and by nothing else.
//! - It is bounded in bytes, its own included.

use foldhash::fast::RandomState;
use quick_cache::Weighter;
use quick_cache::unsync::{Cache, DefaultLifecycle};
use smallvec::SmallVec;

/// Small keys and rows without an allocation.
pub(super) type Bytes = SmallVec<[u8; 16]>;

/// A row under its database key; `None` if it was deleted.
pub(super) type Written = (Bytes, Option<Bytes>);

/// So many rows are looked at before something is done with the first of them.
pub(super) const FETCHED: usize = 32;

/// What an entry needs beside what doesn't fit into it: the entry, its links and its place in the table.
const ENTRY_BYTES: u64 = (size_of::<Written>() + 40) as u64;

#[derive(Clone)]
struct ByBytes;

impl Weighter<Bytes, Option<Bytes>> for ByBytes {
    fn weight(&self, key: &Bytes, row: &Option<Bytes>) -> u64 {
        ENTRY_BYTES + spilled(key) + row.as_ref().map_or(0, spilled)
    }
}

fn spilled(bytes: &Bytes) -> u64 {
    if bytes.spilled() { bytes.capacity() as u64 } else { 0 }
}

pub(super) struct RowCache(Cache<Bytes, Option<Bytes>, ByBytes, RandomState>);

impl RowCache {
    /// `None` if it could hold nothing.
    pub(super) fn new(bytes_max: u64) -> Option<Self> {
        let entries = bytes_max / ENTRY_BYTES;
        let (hasher, lifecycle) = (RandomState::default(), DefaultLifecycle::default());
        // It grows with what is in it.
        let estimated = usize::try_from(entries).ok().filter(|entries| *entries > 0)?.min(1 << 16);
        Some(Self(Cache::with(estimated, bytes_max, ByBytes, hasher, lifecycle)))
    }

    /// These were written.
    pub(super) fn written(&mut self, rows: Vec<Written>) {
        let mut rows = rows.into_iter();
        while !rows.as_slice().is_empty() {
            rows.as_slice().iter().take(FETCHED).for_each(|(key, _)| self.fetch(key));
            rows.by_ref().take(FETCHED).for_each(|(key, row)| self.0.insert(key, row));
        }
    }

    /// Looks at a row. Each lies somewhere else in memory; the processor fetches several at once as long as nothing is done
    /// with them in between.
    fn fetch(&self, key: &[u8]) {
        std::hint::black_box(self.0.peek(key).is_some_and(Option::is_some));
    }

    /// The rows under some keys, in their order, as far as they are known here.
    pub(super) fn get_all(&self, keys: &[&[u8]]) -> impl Iterator<Item = Option<&Option<Bytes>>> {
        keys.chunks(FETCHED).flat_map(|keys| {
            keys.iter().for_each(|key| self.fetch(key));
            keys.iter().map(|key| self.0.get(*key))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_was_written_last_and_fits_into_the_bytes_that_were_given() {
        const BYTES_MAX: u64 = 64 << 10;
        let key = |n: u32| Bytes::from_vec([&[1; 20][..], &n.to_le_bytes()].concat());
        for row_bytes in [0, 8, 1000] {
            let row = |n: u32, round: u8| {
                (n % 3 != u32::from(round)).then(|| Bytes::from_vec(vec![round; row_bytes]))
            };
            let mut cache = RowCache::new(BYTES_MAX).unwrap();
            for round in 0..3 {
                (0..2000).for_each(|n| cache.written(vec![(key(n), row(n, round))]));
            }
            let (mut count, mut bytes) = (0, 0);
            for n in 0..2000 {
                let key = key(n);
                let Some(kept) = cache.get_all(&[&key]).next().unwrap() else { continue };
                assert_eq!(*kept, row(n, 2));
                count += 1;
                bytes += size_of::<Written>() + 24 + kept.as_ref().map_or(0, |_| row_bytes);
            }
            assert!(count > 10 && bytes as u64 <= BYTES_MAX, "{count} rows of {bytes} bytes");
        }
        assert!(RowCache::new(ENTRY_BYTES - 1).is_none());
    }
}
