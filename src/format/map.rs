//! Which of eight neighbours hold a stream: the index above the sidecars.
//!
//! ```text
//! level 2   │                map of segments 0…63               │  which of the eight maps below knows the stream
//! level 1   │ 0…7 │ 8…15 │ 16…23 │ …                     │ 56…63 │  which of the eight segments holds it
//! level 0   the sidecars
//!
//! file      page 0: header │ pages 1…: 454 entries each │ every page 4092 bytes and their CRC-32
//! entry     hash of the name │ a bit for each of the eight
//! ```
//! A map of level L covers the 8^L segments whose numbers begin with the same digits (in base 8). It is
//! derived from sidecars, never changed, and valid only for the history whose chain it carries. It may name
//! a neighbour too many (two names can have the same hash, a segment may be gone), never one too few.

use std::io;

use super::sidecar::{PAGE_BYTES, PAGE_DATA, Pages, push_page};
use super::{Block, Decoder, FormatError};
use crate::position::Chain;

const MAGIC: [u8; 8] = *b"\x89HWMAP\r\n";
const VERSION: u16 = 1;
const ENTRY_BYTES: usize = 9;
/// Entries of a page; none crosses into the next.
pub const PAGE_ENTRIES: usize = PAGE_DATA as usize / ENTRY_BYTES;
/// How many children a map has, as a power of two.
pub const FAN_OUT_BITS: u32 = 3;
/// How many levels there are, with that of the segments, which is 0.
pub const LEVELS: u32 = 64 / FAN_OUT_BITS;

/// For which segments, of which history, a map is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapKey {
    /// It covers 8^level segments.
    pub level: u8,
    /// Number of the first of them.
    pub first: u64,
    /// Where the last of them ends.
    pub end_offset: u64,
    /// The chain there.
    pub end_chain: Chain,
}

impl MapKey {
    /// What the checksum of every page begins with.
    #[must_use]
    pub fn tag(&self) -> u64 {
        u64::from_le_bytes(self.end_chain.as_bytes().first_chunk().copied().unwrap_or_default())
    }

    fn encode(&self, entries: u64) -> [u8; 64] {
        let mut out = Block::<64>::new();
        out.put(0, &MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(10, &[self.level]);
        out.put(16, &self.first.to_le_bytes());
        out.put(24, &self.end_offset.to_le_bytes());
        out.put(32, self.end_chain.as_bytes());
        out.put(48, &entries.to_le_bytes());
        out.0
    }

    fn decode(page: &[u8]) -> Result<(Self, u64), FormatError> {
        let mut input = Decoder::new(page);
        if input.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = input.u16()?;
        if version != VERSION {
            return Err(FormatError::Unsupported { version, flags: 0 });
        }
        let level = input.u8()?;
        input.bytes(5)?;
        let (first, end_offset) = (input.u64()?, input.u64()?);
        let end_chain = Chain::from_bytes(input.array()?);
        Ok((Self { level, first, end_offset, end_chain }, input.u64()?))
    }
}

/// Lays out a map's pages, one after the other. Page 0 comes last: without it there is no map.
#[derive(Debug)]
pub struct Layer {
    key: MapKey,
    pages: u64,
    entries: u64,
    page: Vec<u8>,
}

impl Layer {
    /// Begins the map of `key`.
    #[must_use]
    pub fn new(key: MapKey) -> Self {
        Self { key, pages: 0, entries: 0, page: Vec::with_capacity(PAGE_DATA as usize) }
    }

    /// Takes in the next entry, by ascending hash; appends a page to `out` whenever one is full.
    pub fn push(&mut self, hash: u64, children: u8, out: &mut Vec<u8>) {
        self.page.extend_from_slice(&hash.to_le_bytes());
        self.page.push(children);
        self.entries += 1;
        if self.page.len() == PAGE_ENTRIES * ENTRY_BYTES {
            self.end_page(out);
        }
    }

    fn end_page(&mut self, out: &mut Vec<u8>) {
        self.pages += 1;
        push_page(out, self.key.tag(), self.pages, &self.page);
        self.page.clear();
    }

    /// Appends the last page to `out`. Returns page 0.
    #[must_use]
    pub fn finish(mut self, out: &mut Vec<u8>) -> Vec<u8> {
        if !self.page.is_empty() {
            self.end_page(out);
        }
        let mut page = Vec::with_capacity(PAGE_BYTES);
        push_page(&mut page, self.key.tag(), 0, &self.key.encode(self.entries));
        page
    }
}

/// A map, read page by page as its entries are needed, each page verified.
#[derive(Debug)]
pub struct StreamMap<P> {
    pages: P,
    tag: u64,
    entries: u64,
}

impl<P: Pages> StreamMap<P> {
    /// Opens a map; `None` if it isn't the valid map that `key` describes.
    ///
    /// # Errors
    /// Of the file.
    pub fn open(pages: P, key: &MapKey) -> io::Result<Option<Self>> {
        let count = pages.count()?;
        if count == 0 {
            return Ok(None);
        }
        let page = match pages.read_page(key.tag(), 0) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
            page => page?,
        };
        let Ok((found, entries)) = MapKey::decode(&page[..]) else { return Ok(None) };
        let whole = entries.div_ceil(PAGE_ENTRIES as u64).checked_add(1) == Some(count);
        Ok((found == *key && whole).then_some(Self { pages, tag: key.tag(), entries }))
    }

    fn page_count(&self) -> u64 {
        self.entries.div_ceil(PAGE_ENTRIES as u64)
    }

    /// How many entries the page has whose index, from 0, is `index`.
    fn entries_in(&self, index: u64) -> usize {
        let rest = self.entries.saturating_sub(index * PAGE_ENTRIES as u64);
        usize::try_from(rest).unwrap_or(PAGE_ENTRIES).min(PAGE_ENTRIES)
    }

    /// Which of the eight hold a stream whose name has this hash: one bit each.
    ///
    /// # Errors
    /// Of the file; [`io::ErrorKind::InvalidData`] if a page is damaged.
    pub fn children(&self, hash: u64) -> io::Result<u8> {
        let (mut low, mut high) = (0, self.page_count());
        // Hashes are uniform, so the first guess is nearly always right or a neighbour.
        let mut guess = ((u128::from(hash) * u128::from(high)) >> 64) as u64;
        let mut steps = 0;
        while low < high {
            let page = self.pages.page(self.tag, guess + 1)?;
            let entries = page.as_chunks::<ENTRY_BYTES>().0;
            let entries = entries.get(..self.entries_in(guess)).unwrap_or_default();
            let (Some(first), Some(last)) = (entries.first(), entries.last()) else { break };
            if hash < hash_of(first) {
                high = guess;
            } else if hash > hash_of(last) {
                low = guess + 1;
            } else {
                let found = entries.binary_search_by_key(&hash, hash_of);
                let entry = found.ok().and_then(|at| entries.get(at));
                return Ok(entry.map_or(0, |entry| entry[ENTRY_BYTES - 1]));
            }
            steps += 1;
            let middle = low + (high.saturating_sub(low)) / 2;
            let neighbour = if high == guess { guess.saturating_sub(1) } else { low };
            guess = if steps > 3 { middle } else { neighbour };
        }
        Ok(0)
    }

    /// The hashes of page `index`, from 0 on, in order; `None` behind the last page. The page isn't kept in
    /// memory.
    ///
    /// # Errors
    /// As [`children`](Self::children).
    pub fn hashes(&self, index: u64) -> io::Result<Option<Vec<u64>>> {
        if index >= self.page_count() {
            return Ok(None);
        }
        let page = self.pages.read_page(self.tag, index + 1)?;
        let entries = page.as_chunks::<ENTRY_BYTES>().0;
        Ok(Some(entries.iter().take(self.entries_in(index)).map(hash_of).collect()))
    }
}

fn hash_of(entry: &[u8; ENTRY_BYTES]) -> u64 {
    u64::from_le_bytes(entry.first_chunk().copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> MapKey {
        MapKey { level: 2, first: 64, end_offset: 1 << 30, end_chain: Chain::from_bytes([9; 16]) }
    }

    fn map_of(entries: &[(u64, u8)]) -> Vec<u8> {
        let (mut layer, mut out) = (Layer::new(key()), vec![0; PAGE_BYTES]);
        entries.iter().for_each(|(hash, children)| layer.push(*hash, *children, &mut out));
        let header = layer.finish(&mut out);
        out[..PAGE_BYTES].copy_from_slice(&header);
        out
    }

    fn entries(rng: &mut fastrand::Rng, count: usize, skewed: bool) -> Vec<(u64, u8)> {
        let shift = if skewed { 20 } else { 0 };
        let mut all: Vec<_> = (0..count).map(|_| (rng.u64(..) >> shift, rng.u8(1..))).collect();
        all.sort_by_key(|entry| entry.0);
        all.dedup_by_key(|entry| entry.0);
        all
    }

    #[test]
    fn every_entry_is_found_and_nothing_else() {
        let mut rng = fastrand::Rng::with_seed(3);
        for count in [0, 1, 453, 454, 455, 5000, 40_000] {
            for skewed in [false, true] {
                let all = entries(&mut rng, count, skewed);
                let map = StreamMap::open(map_of(&all), &key()).unwrap().unwrap();
                for (hash, children) in &all {
                    assert_eq!(map.children(*hash).unwrap(), *children);
                    let other = hash.wrapping_add(1);
                    if all.binary_search_by_key(&other, |entry| entry.0).is_err() {
                        assert_eq!(map.children(other).unwrap(), 0);
                    }
                }
                assert_eq!(map.children(u64::MAX).unwrap(), 0);
                let mut hashes = Vec::new();
                while let Some(page) =
                    map.hashes(hashes.len().div_ceil(PAGE_ENTRIES) as u64).unwrap()
                {
                    hashes.extend(page);
                }
                assert!(hashes.iter().eq(all.iter().map(|(hash, _)| hash)));
            }
        }
    }

    #[test]
    fn a_map_of_other_segments_or_another_history_is_not_valid() {
        let bytes = map_of(&[(1, 1)]);
        for other in [
            MapKey { level: 1, ..key() },
            MapKey { first: 0, ..key() },
            MapKey { end_offset: 1, ..key() },
            MapKey { end_chain: Chain::from_bytes([8; 16]), ..key() },
        ] {
            assert!(StreamMap::open(bytes.clone(), &other).unwrap().is_none());
        }
        for len in [0, PAGE_BYTES, 3 * PAGE_BYTES] {
            let mut cut = bytes.clone();
            cut.resize(len, 0);
            assert!(StreamMap::open(cut, &key()).unwrap().is_none());
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_never_another_answer() {
        let mut rng = fastrand::Rng::with_seed(5);
        let all = entries(&mut rng, 2000, false);
        let bytes = map_of(&all);
        let mut refused = 0;
        for _ in 0..2000 {
            let mut damaged = bytes.clone();
            let bit = rng.usize(..bytes.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            let Some(map) = StreamMap::open(damaged, &key()).unwrap() else {
                refused += 1;
                continue;
            };
            let (hash, children) = all[rng.usize(..all.len())];
            match map.children(hash) {
                Ok(found) => assert_eq!(found, children),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                    refused += 1;
                }
            }
        }
        assert!(refused > 400, "{refused}");
    }
}
