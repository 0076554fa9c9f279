//! The labels of a sealed segment: which of its events have a type or a tag.
//!
//! ```text
//! file    page 0: header │ pages 1…: entries, 255 a page │ pages: places, 1023 a page
//! page    4092 bytes │ CRC-32 of segment number ‖ page number ‖ bytes
//! entry   hash of a type or a tag │ number of its first place │ how many places
//! place   position of an event, counted from the segment's first
//! ```
//! Derived from the segment when a query first asks for it, never changed, and valid only for the segment whose
//! number, salt, end and end chain it carries. Two labels may have the same hash: whoever asks confirms by reading.

use std::collections::BTreeMap;
use std::io;

use twox_hash::XxHash3_64;

use super::record::RecordRef;
use super::sidecar::{PAGE_BYTES, PAGE_DATA, Pages, SidecarKey, first_not_below, push_page};
use super::{Block, Decoder, FormatError};
use crate::position::{Chain, Position};

const MAGIC: [u8; 8] = *b"\x89HWLBL\r\n";
const VERSION: u16 = 1;
const ENTRY_BYTES: usize = 16;
const PLACE_BYTES: usize = 4;
/// Entries of a page; none crosses into the next.
pub const PAGE_ENTRIES: u64 = PAGE_DATA / ENTRY_BYTES as u64;
/// Places of a page.
pub const PAGE_PLACES: u64 = PAGE_DATA / PLACE_BYTES as u64;

/// The label of an event type.
#[must_use]
pub fn type_label(name: &str) -> u64 {
    XxHash3_64::oneshot_with_seed(0, name.as_bytes())
}

/// The label of a tag.
#[must_use]
pub fn tag_label(tag: &str) -> u64 {
    XxHash3_64::oneshot_with_seed(1, tag.as_bytes())
}

/// All labels of an event, ascending.
#[must_use]
pub fn labels_of(record: &RecordRef<'_>) -> Vec<u64> {
    let tags = record.tags().map(tag_label);
    let mut labels: Vec<_> = std::iter::once(type_label(record.event_type)).chain(tags).collect();
    labels.sort_unstable();
    labels.dedup();
    labels
}

/// The labels of a segment, in memory: for each, its events, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    places: BTreeMap<u64, Vec<u32>>,
    count: u64,
}

impl Labels {
    /// Takes in an event, by its position counted from the segment's first.
    pub fn add(&mut self, place: u32, record: &RecordRef<'_>) {
        for label in labels_of(record) {
            self.places.entry(label).or_default().push(place);
            self.count += 1;
        }
    }

    /// The file; `None` if there are more places than it can count.
    #[must_use]
    pub fn encode(&self, key: &SidecarKey) -> Option<Vec<u8>> {
        let places = u32::try_from(self.count).ok()?;
        let mut file = Vec::new();
        push_page(&mut file, key.segment, 0, &encode_header(key, self.places.len(), places));
        let (mut first, mut number) = (0_u32, 1);
        let mut entries = Vec::with_capacity(self.places.len() * ENTRY_BYTES);
        for (label, places) in &self.places {
            entries.extend_from_slice(&label.to_le_bytes());
            entries.extend_from_slice(&first.to_le_bytes());
            entries.extend_from_slice(&(places.len() as u32).to_le_bytes());
            first += places.len() as u32;
        }
        for page in entries.chunks(PAGE_ENTRIES as usize * ENTRY_BYTES) {
            push_page(&mut file, key.segment, number, page);
            number += 1;
        }
        let all: Vec<u8> =
            self.places.values().flatten().flat_map(|place| place.to_le_bytes()).collect();
        for page in all.chunks(PAGE_PLACES as usize * PLACE_BYTES) {
            push_page(&mut file, key.segment, number, page);
            number += 1;
        }
        Some(file)
    }
}

fn encode_header(key: &SidecarKey, labels: usize, places: u32) -> [u8; 80] {
    let mut out = Block::<80>::new();
    out.put(0, &MAGIC);
    out.put(8, &VERSION.to_le_bytes());
    out.put(16, &key.segment.to_le_bytes());
    out.put(24, &key.salt.to_le_bytes());
    out.put(32, &key.base_position.get().to_le_bytes());
    out.put(40, &key.end_offset.to_le_bytes());
    out.put(48, key.end_chain.as_bytes());
    out.put(64, &(labels as u64).to_le_bytes());
    out.put(72, &u64::from(places).to_le_bytes());
    out.0
}

/// Key, number of labels, number of places.
fn decode_header(page: &[u8]) -> Result<(SidecarKey, u64, u64), FormatError> {
    let mut input = Decoder::new(page);
    if input.array()? != MAGIC {
        return Err(FormatError::Magic);
    }
    let version = input.u16()?;
    if version != VERSION {
        return Err(FormatError::Unsupported { version, flags: 0 });
    }
    input.bytes(6)?;
    let key = SidecarKey {
        segment: input.u64()?,
        salt: input.u64()?,
        base_position: Position::new(input.u64()?),
        end_offset: input.u64()?,
        end_chain: Chain::from_bytes(input.array()?),
    };
    Ok((key, input.u64()?, input.u64()?))
}

/// The labels of a segment on disk, read page by page as they are needed, each page verified.
#[derive(Debug)]
pub struct LabelFile<P> {
    pages: P,
    segment: u64,
    labels: u64,
    places: u64,
}

impl<P: Pages> LabelFile<P> {
    /// Opens a file of labels; `None` if it isn't the valid one of the segment that `key` describes.
    ///
    /// # Errors
    /// Of the file.
    pub fn open(pages: P, key: &SidecarKey) -> io::Result<Option<Self>> {
        let count = pages.count()?;
        if count == 0 {
            return Ok(None);
        }
        let page = match pages.page(key.segment, 0) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
            page => page?,
        };
        let Ok((found, labels, places)) = decode_header(&page[..]) else { return Ok(None) };
        let needed = labels.div_ceil(PAGE_ENTRIES).checked_add(places.div_ceil(PAGE_PLACES));
        let whole = needed.and_then(|needed| needed.checked_add(1)) == Some(count);
        let segment = key.segment;
        Ok((found == *key && whole).then_some(Self { pages, segment, labels, places }))
    }

    /// The events that have a label, ascending, counted from the segment's first.
    ///
    /// # Errors
    /// Of the file; [`io::ErrorKind::InvalidData`] if a page is damaged.
    pub fn places(&self, label: u64) -> io::Result<Vec<u32>> {
        let index = first_not_below(self.labels, label, |index| Ok(self.entry(index)?.0))?;
        if index >= self.labels {
            return Ok(Vec::new());
        }
        let (found, first, count) = self.entry(index)?;
        if found != label {
            return Ok(Vec::new());
        }
        let end = first.checked_add(count).filter(|end| *end <= self.places).ok_or_else(damaged)?;
        let mut out = Vec::with_capacity(count as usize); // no more than there are pages for
        let mut at = first;
        while at < end {
            let number = 1 + self.labels.div_ceil(PAGE_ENTRIES) + at / PAGE_PLACES;
            let page = self.pages.page(self.segment, number)?;
            let places = page.as_chunks::<PLACE_BYTES>().0;
            let from = (at % PAGE_PLACES) as usize;
            let to = PAGE_PLACES.min(from as u64 + (end - at)) as usize;
            let places = places.get(from..to).ok_or_else(damaged)?;
            out.extend(places.iter().map(|place| u32::from_le_bytes(*place)));
            at += (to - from) as u64;
        }
        Ok(out)
    }

    /// Label, number of its first place, how many.
    fn entry(&self, index: u64) -> io::Result<(u64, u64, u64)> {
        let page = self.pages.page(self.segment, 1 + index / PAGE_ENTRIES)?;
        let entries = page.as_chunks::<ENTRY_BYTES>().0;
        let entry = entries.get((index % PAGE_ENTRIES) as usize).ok_or_else(damaged)?;
        let mut input = Decoder::new(entry);
        let fields = (|| Ok::<_, FormatError>((input.u64()?, input.u32()?, input.u32()?)))();
        let (label, first, count) = fields.map_err(|_| damaged())?;
        Ok((label, u64::from(first), u64::from(count)))
    }
}

fn damaged() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

const _: () =
    assert!(PAGE_BYTES as u64 == PAGE_DATA + 4 && PAGE_ENTRIES == 255 && PAGE_PLACES == 1023);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::sidecar::{Page, verify_page};
    use super::*;

    struct Bytes(Vec<u8>);

    impl Pages for Bytes {
        fn read_page(&self, tag: u64, number: u64) -> io::Result<Page> {
            let pages = self.0.as_chunks::<PAGE_BYTES>().0;
            let page = pages.get(number as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
            verify_page(tag, number, page)?;
            Ok(Arc::new(*page))
        }

        fn count(&self) -> io::Result<u64> {
            Ok((self.0.len() / PAGE_BYTES) as u64)
        }
    }

    fn key() -> SidecarKey {
        SidecarKey {
            segment: 7,
            salt: 8,
            base_position: Position::new(900),
            end_offset: 1 << 20,
            end_chain: Chain::from_bytes([9; 16]),
        }
    }

    #[test]
    fn every_label_has_its_places_however_many_there_are() {
        for (count, each) in [(0, 1), (1, 1), (255, 3), (256, 5), (3000, 2), (2, 5000)] {
            let mut rng = fastrand::Rng::with_seed(count * 7 + each);
            let mut labels = Labels::default();
            for _ in 0..count {
                let mut places: Vec<u32> = (0..rng.u64(1..=each)).map(|_| rng.u32(..)).collect();
                places.sort_unstable();
                labels.count += places.len() as u64;
                if let Some(old) = labels.places.insert(rng.u64(..), places) {
                    labels.count -= old.len() as u64;
                }
            }
            let bytes = labels.encode(&key()).unwrap();
            let file = LabelFile::open(Bytes(bytes.clone()), &key()).unwrap().unwrap();
            for (label, places) in &labels.places {
                assert_eq!(&file.places(*label).unwrap(), places);
            }
            for _ in 0..100 {
                let other = rng.u64(..);
                if !labels.places.contains_key(&other) {
                    assert!(file.places(other).unwrap().is_empty());
                }
            }
            let other = SidecarKey { salt: 9, ..key() };
            assert!(LabelFile::open(Bytes(bytes), &other).unwrap().is_none());
        }
    }

    #[test]
    fn no_flipped_bit_ever_becomes_an_answer() {
        let mut labels = Labels::default();
        for label in 0..300_u64 {
            labels.places.insert(label << 55, vec![label as u32, 1000]);
            labels.count += 2;
        }
        let right = labels.encode(&key()).unwrap();
        for bit in (0..right.len() * 8).step_by(37) {
            let mut bytes = right.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(Some(file)) = LabelFile::open(Bytes(bytes), &key()) else { continue };
            for (label, places) in &labels.places {
                assert!(
                    file.places(*label).is_ok_and(|found| found == *places)
                        || file.places(*label).is_err()
                );
            }
        }
    }
}
