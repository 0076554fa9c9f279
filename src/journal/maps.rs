//! Which segments hold a stream, without asking all of them.
//!
//! ```text
//!   512 segments   │                  one map                   │                        who holds `order-7`?
//!    64            │ map │ map │ map │ map │ map │ map │ …       │  map │ map │           ▼ from the top down,
//!     8            │ │ │ │ │ │ │ │ │ │ │ │ …                     │ │ │ │ │ │ │ │ m │       only where a bit is set
//!     1            sidecars …………………………………………………………………… s s s │ active segment
//! ```
//! Maps ([`crate::format::map`]) are laid out when the last of the segments that they cover is sealed, from
//! the level below, page by page. With n segments:
//! - A stream that was never there costs one look-up in each map and sidecar that no higher map covers: at
//!   most 7 for each level, of which there are log₈ n. (3,000 segments: at most 28.)
//! - A stream costs, for each segment that holds it, its sidecar, and one look-up for each level above it
//!   that was not asked before: at most log₈ n. Segments that don't hold it are never asked.
//! - To begin at a revision costs log₂ n such searches.
//! - A look-up reads one page of 4 KiB, seldom two; pages that were read lately are kept in memory, 4 MiB of
//!   them. An entry is written once for each level: 9 bytes for each stream of each segment, log₈ n times.
//! - At most one map of each level is laid out when a segment is sealed.
//!
//! Invariants:
//! - Maps are derived. Without one, or if it is damaged or of another history, the level below is asked.
//! - A map never lacks a segment that holds the stream. So none is laid out over a gap, nor over a segment
//!   that is missing as a whole: what was lost there may come back.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::error::ReadError;
use crate::event::StreamId;
use crate::format::map::{FAN_OUT_BITS, LEVELS, Layer, MapKey, StreamMap};
use crate::format::sidecar::{PAGE_BYTES, stream_hash};
use crate::fs::{self, OpenMode};
use crate::journal::Journal;
use crate::journal::layout;
use crate::journal::segments::{FileKey, IndexFile, Segment, Span};

/// So much of a map is gathered before it is written.
const WRITE_BYTES: usize = 256 * 1024;
const FAN_OUT: u64 = 1 << FAN_OUT_BITS;

/// The maps of a journal, by level and number of the first segment.
#[derive(Debug, Default)]
pub(super) struct Maps {
    known: RwLock<HashMap<(u32, u64), Known>>,
}

#[derive(Clone, Debug)]
enum Known {
    /// There is a file of that name.
    Unopened,
    Open(Arc<StreamMap<IndexFile>>),
}

impl Maps {
    /// The maps that are named in a directory.
    pub(super) fn named(names: &[String]) -> Self {
        let maps = names.iter().filter_map(|name| layout::map_of(name));
        Self { known: RwLock::new(maps.map(|key| (key, Known::Unopened)).collect()) }
    }
}

/// In which order segments are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    FirstToLast,
    LastToFirst,
}

/// A search for the nearest segment that may hold a stream.
struct Search<'a> {
    journal: &'a Journal,
    hash: u64,
    numbers: &'a Range<u64>,
    order: Order,
}

impl Search<'_> {
    /// Looks at the segments whose numbers begin with `index`, in base 8, and `level` digits more.
    fn within(&self, level: u32, index: u64) -> Option<u64> {
        let covered = covered(level, index << (FAN_OUT_BITS * level));
        if covered.end <= self.numbers.start || covered.start >= self.numbers.end {
            return None;
        }
        if level == 0 {
            return Some(index);
        }
        let children = self.journal.children(level, covered.start, self.hash).unwrap_or(u8::MAX);
        let child = |at: u64| {
            let holds = children & (1 << at) != 0;
            holds.then(|| self.within(level - 1, index << FAN_OUT_BITS | at)).flatten()
        };
        match self.order {
            Order::FirstToLast => (0..FAN_OUT).find_map(child),
            Order::LastToFirst => (0..FAN_OUT).rev().find_map(child),
        }
    }
}

/// The numbers of the segments that a map covers.
pub(super) fn covered(level: u32, first: u64) -> Range<u64> {
    first..first.saturating_add(1 << (FAN_OUT_BITS * level))
}

/// The lowest level at which one map would cover all numbers in front of `end`.
fn level_above(end: u64) -> u32 {
    let last = end.saturating_sub(1);
    (0..LEVELS).find(|level| last >> (FAN_OUT_BITS * level) == 0).unwrap_or(LEVELS)
}

impl Journal {
    /// The nearest sealed segment among `numbers` that holds a stream, and what it holds of it.
    pub(super) fn holder(
        &self,
        stream: &StreamId,
        mut numbers: Range<u64>,
        order: Order,
    ) -> Result<Option<(Arc<Segment>, Span)>, ReadError> {
        let hash = stream_hash(stream.as_str());
        loop {
            let search = Search { journal: self, hash, numbers: &numbers, order };
            let Some(number) = search.within(level_above(numbers.end), 0) else { return Ok(None) };
            if let Some(segment) = self.sealed_segment(number) {
                match self.span(&segment, stream) {
                    Ok(Some(span)) => return Ok(Some((segment, span))),
                    Ok(None) => {}
                    Err(_) if number < self.retained().segment => {} // removed meanwhile
                    Err(error) => return Err(error),
                }
            }
            match order {
                Order::FirstToLast => numbers.start = number + 1,
                Order::LastToFirst => numbers.end = number,
            }
        }
    }

    pub(super) fn sealed_segment(&self, number: u64) -> Option<Arc<Segment>> {
        let segments = self.0.segments.read();
        let at = segments.all.binary_search_by_key(&number, |segment| segment.number()).ok()?;
        segments.all.get(at).filter(|segment| segment.sealed.is_some()).cloned()
    }

    /// Which of the eight below a map hold a stream; `None` if the map can't say.
    fn children(&self, level: u32, first: u64, hash: u64) -> Option<u8> {
        let children = self.map(level, first)?.children(hash);
        if children.is_err() {
            self.0.maps.known.write().remove(&(level, first));
        }
        children.ok()
    }

    /// A map, if there is a valid one.
    fn map(&self, level: u32, first: u64) -> Option<Arc<StreamMap<IndexFile>>> {
        let known = self.0.maps.known.read().get(&(level, first)).cloned()?;
        if let Known::Open(map) = known {
            return Some(map);
        }
        let key = self.map_key(level, first)?;
        let file = IndexFile::new(&self.0.files, FileKey::Map(level, first));
        let opened = StreamMap::open(file, &key).ok().flatten().map(Arc::new);
        let mut maps = self.0.maps.known.write();
        match &opened {
            Some(map) => maps.insert((level, first), Known::Open(Arc::clone(map))),
            None => maps.remove(&(level, first)),
        };
        opened
    }

    /// What the map is valid for; `None` if the segments that it covers aren't all sealed.
    fn map_key(&self, level: u32, first: u64) -> Option<MapKey> {
        let segments = self.0.segments.read();
        let end = covered(level, first).end;
        let behind = segments.all.partition_point(|segment| segment.number() < end);
        let last = segments.all.get(behind.checked_sub(1)?)?;
        let sealed = last.sealed.as_ref().filter(|_| last.number() >= first)?.end;
        let level = u8::try_from(level).ok()?;
        Some(MapKey { level, first, end_offset: sealed.offset, end_chain: sealed.chain })
    }

    /// Lays out the maps that are complete with segment `number`, which has just been sealed.
    pub(super) fn map_up_to(&self, number: u64) {
        for level in 1..LEVELS {
            let len = 1 << (FAN_OUT_BITS * level);
            let Some(first) = (number + 1).checked_sub(len).filter(|first| first % len == 0) else {
                return;
            };
            self.lay_out(level, first);
        }
    }

    /// Lays out the maps that are missing, or can be seen to be invalid by their first page.
    pub(super) fn map_missing(&self) {
        let numbers = self.sealed_numbers();
        for level in 1..level_above(numbers.end) {
            let len = 1 << (FAN_OUT_BITS * level);
            let mut first = numbers.start - numbers.start % len;
            while first + len <= numbers.end {
                if self.map(level, first).is_none() {
                    self.lay_out(level, first);
                }
                first += len;
            }
        }
    }

    pub(super) fn sealed_numbers(&self) -> Range<u64> {
        self.0.segments.read().sealed_numbers()
    }

    /// An effort: without the map, the level below is asked.
    fn lay_out(&self, level: u32, first: u64) {
        let Some(key) = self.map_key(level, first).filter(|_| !self.has_gap(level, first)) else {
            return;
        };
        let file = FileKey::Map(level, first);
        self.0.files.forget(file);
        let path = self.0.files.path(file);
        let fs = self.0.files.fs();
        drop(fs.remove(&path));
        let written = self
            .merge(level, first)
            .and_then(|merge| Ok(write(&*fs.open(&path, OpenMode::CreateNew)?, key, merge)?));
        match written {
            Ok(()) => drop(self.0.maps.known.write().insert((level, first), Known::Unopened)),
            Err(Failed) => drop(fs.remove(&path)),
        }
    }

    fn has_gap(&self, level: u32, first: u64) -> bool {
        let covered = covered(level, first);
        let segments = self.0.segments.read();
        let within = segments.all.iter().filter(|segment| covered.contains(&segment.number()));
        let offsets = within.filter_map(|segment| {
            let end = segment.sealed.as_ref()?.end.offset;
            Some(segment.base_offset()..end.saturating_add(1))
        });
        offsets.into_iter().any(|offsets| self.gaps().touch(offsets))
    }

    /// The streams of the eight below a map.
    fn merge(&self, level: u32, first: u64) -> Result<Merge, Failed> {
        let len = 1 << (FAN_OUT_BITS * (level - 1));
        let mut sources = Vec::with_capacity(FAN_OUT as usize);
        for child in 0..FAN_OUT {
            let mut hashes = self.hashes(level - 1, first + child * len)?;
            let head = hashes.next()?;
            sources.push((hashes, head));
        }
        Ok(Merge { sources })
    }

    fn hashes(&self, level: u32, first: u64) -> Result<Hashes, Failed> {
        if level == 0 {
            let Some(segment) = self.sealed_segment(first) else {
                // Removed, for ever; or lost, and then it may come back.
                let is_removed = first < self.retained().segment;
                return is_removed.then(|| Hashes::List(Vec::new().into_iter())).ok_or(Failed);
            };
            let sealed = segment.sealed.as_ref().ok_or(Failed)?;
            let hashes = sealed.stream_hashes(&self.0.files, &segment.page);
            return Ok(Hashes::List(hashes.map_err(|_| Failed)?.into_iter()));
        }
        Ok(match self.map(level, first) {
            Some(map) => Hashes::Map { map, page: 0, list: Vec::new().into_iter() },
            None => Hashes::Merge(Box::new(self.merge(level, first)?)),
        })
    }
}

/// A map can't be laid out now.
#[derive(Debug)]
struct Failed;

impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        Self
    }
}

/// The hashes of the streams of one child, ascending.
enum Hashes {
    List(std::vec::IntoIter<u64>),
    Map { map: Arc<StreamMap<IndexFile>>, page: u64, list: std::vec::IntoIter<u64> },
    Merge(Box<Merge>),
}

impl Hashes {
    fn next(&mut self) -> io::Result<Option<u64>> {
        match self {
            Self::List(list) => Ok(list.next()),
            Self::Merge(merge) => Ok(merge.next()?.map(|(hash, _)| hash)),
            Self::Map { map, page, list } => loop {
                if let Some(hash) = list.next() {
                    return Ok(Some(hash));
                }
                let Some(hashes) = map.hashes(*page)? else { return Ok(None) };
                (*page, *list) = (*page + 1, hashes.into_iter());
            },
        }
    }
}

/// The entries of a map.
struct Merge {
    /// With the next hash of each.
    sources: Vec<(Hashes, Option<u64>)>,
}

impl Merge {
    fn next(&mut self) -> io::Result<Option<(u64, u8)>> {
        let Some(least) = self.sources.iter().filter_map(|(_, head)| *head).min() else {
            return Ok(None);
        };
        let mut children = 0;
        for (child, (hashes, head)) in self.sources.iter_mut().enumerate() {
            while *head == Some(least) {
                children |= 1 << child;
                *head = hashes.next()?;
            }
        }
        Ok(Some((least, children)))
    }
}

fn write(file: &dyn fs::File, key: MapKey, mut merge: Merge) -> io::Result<()> {
    let (mut layer, mut out) = (Layer::new(key), Vec::new());
    let mut at = PAGE_BYTES as u64;
    while let Some((hash, children)) = merge.next()? {
        layer.push(hash, children, &mut out);
        if out.len() >= WRITE_BYTES {
            fs::write_all_at(file, &out, at)?;
            at += out.len() as u64;
            out.clear();
        }
    }
    let header = layer.finish(&mut out);
    fs::write_all_at(file, &out, at)?;
    fs::write_all_at(file, &header, 0)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_cover_what_they_should() {
        for (end, level) in [(0, 0), (1, 0), (2, 1), (8, 1), (9, 2), (64, 2), (65, 3), (3000, 4)] {
            assert_eq!(level_above(end), level, "{end}");
        }
        assert_eq!(covered(2, 64), 64..128);
        assert_eq!(level_above(u64::MAX >> 1), LEVELS);
    }
}
