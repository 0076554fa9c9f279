//! Journals and mirrors in memory for both ends of a session: real batches and real chains, without a disk.

use super::origin::end_of;
use super::*;
use crate::event::{EventId, NewEvent, Revision, StreamId};
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader, BatchRef, Link, body_digest};
use crate::format::files::{Mark, Role, Witness};
use crate::format::segment::{PageState, SegmentHeader, SegmentPage};
use crate::format::{Flags, record};
use crate::journal::Comparison;
use crate::position::{Incarnation, JournalId};
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::Authentication;
use crate::shipping::security::Gate;

pub(crate) const JOURNAL: JournalId = JournalId::from_bytes([0x1A; 16]);
const SEGMENT_BATCHES: usize = 5;
/// The types of the events of [`ModelJournal::append_events`].
pub(crate) const TYPES: [&str; 4] = ["a", "b", "c", "$own"];

#[derive(Clone, Debug)]
pub(crate) struct ModelBatch {
    pub(crate) bytes: Vec<u8>,
    pub(crate) page: SegmentPage,
    pub(crate) first_of_segment: bool,
    pub(crate) end: Checkpoint,
}

/// An origin's journal: batches, of which the first so many are durable.
#[derive(Clone, Debug)]
pub(crate) struct ModelJournal {
    pub(crate) id: JournalId,
    pub(crate) batches: Vec<ModelBatch>,
    pub(crate) durable: usize,
    pub(crate) next: usize,
    pub(crate) closed: bool,
    pub(crate) damaged_at: Option<usize>,
    /// How many batch ends were asked for.
    pub(crate) probed: usize,
    /// How many batches at the beginning were removed.
    pub(crate) removed: usize,
    pub(crate) incarnation: u64,
    pub(crate) clock_us: i64,
}

impl ModelJournal {
    pub(crate) fn new(id: JournalId) -> Self {
        let (incarnation, clock_us) = (1, 1_700_000_000_000_000);
        let batches = Vec::new();
        Self {
            id,
            batches,
            durable: 0,
            next: 0,
            closed: false,
            damaged_at: None,
            probed: 0,
            removed: 0,
            incarnation,
            clock_us,
        }
    }

    pub(crate) fn end_of_batches(&self, count: usize) -> Checkpoint {
        match count.checked_sub(1) {
            Some(last) => self.batches[last].end,
            None => Mark::start(self.id).end,
        }
    }

    #[cfg(test)]
    pub(crate) fn append(&mut self, body: &[u8]) {
        self.append_counted(body, 1 + (body.len() / 300) as u32);
    }

    pub(crate) fn append_counted(&mut self, body: &[u8], count: u32) {
        let at = self.end_of_batches(self.batches.len());
        let first_of_segment = self.batches.len().is_multiple_of(SEGMENT_BATCHES);
        let page = match self.batches.last() {
            Some(last) if !first_of_segment => last.page.clone(),
            _ => self.next_page(&at),
        };
        let mut header = BatchHeader {
            header_len: BATCH_HEADER_BYTES as u16,
            flags: Flags::default(),
            stored_len: body.len() as u32,
            raw_len: body.len() as u32,
            body_crc: crate::format::crc32(&[body]),
            count,
            base_position: at.position,
            offset: at.offset,
            durable_offset: self.end_of_batches(self.durable).offset,
            epoch: self.incarnation as u32,
            padded_len: (BATCH_HEADER_BYTES + body.len()).next_multiple_of(64) as u32,
            incarnation: Incarnation::new(self.incarnation),
            time_us: self.clock_us,
            chain: at.chain,
        };
        let digest = first_of_segment.then_some(&page.digest);
        let front = header.seal(at.chain, digest, &body_digest(body), page.header.salt);
        let mut bytes = [&front, body].concat();
        bytes.resize(header.padded_len as usize, 0);
        let end = end_of(&BatchRef::decode(&bytes, page.header.salt).unwrap(), self.id);
        self.batches.push(ModelBatch { bytes, page, first_of_segment, end });
    }

    /// A batch of real records, some of them longer than a frame.
    pub(crate) fn append_events(&mut self, rng: &mut fastrand::Rng) {
        let mut body = Vec::new();
        let count = rng.u32(1..5);
        for _ in 0..count {
            let len = if rng.u8(..) < 12 { rng.usize(6_000..20_000) } else { rng.usize(0..300) };
            let event = NewEvent::raw(TYPES[rng.usize(..4)], vec![rng.u8(..); len]).unwrap();
            let event = event.id(EventId::from_bytes(std::array::from_fn(|_| rng.u8(..))));
            let stream = StreamId::new(format!("s-{}", rng.u8(..3))).unwrap();
            record::encode(&mut body, &event, &stream, Revision::FIRST);
        }
        self.append_counted(&body, count);
    }

    /// The events of a feed in the first so many batches, and their positions.
    pub(crate) fn events_of(&self, filter: &FeedFilter, batches: usize) -> Vec<(u64, EventId)> {
        let mut all = Vec::new();
        for batch in &self.batches[..batches] {
            let decoded = BatchRef::decode(&batch.bytes, batch.page.header.salt).unwrap();
            let base = decoded.header.base_position;
            for (index, record) in decoded.records().enumerate() {
                let record = record.unwrap();
                if filter.matches_record(&record) && !record.event_type.starts_with('$') {
                    all.push((base.advance(index as u64).get(), record.id));
                }
            }
        }
        all
    }

    pub(crate) fn next_page(&self, at: &Checkpoint) -> SegmentPage {
        let number = (self.batches.len() / SEGMENT_BATCHES) as u64;
        SegmentHeader {
            flags: Flags::default(),
            group_alignment: 64,
            journal: self.id,
            number,
            epoch: self.incarnation as u32,
            incarnation: Incarnation::new(self.incarnation),
            base_position: at.position,
            base_offset: at.offset,
            durable_offset: 0,
            salt: 0x5A17_0000 + number,
            created_at_us: self.clock_us,
            capacity_bytes: 65536,
            previous_chain: at.chain,
        }
        .to_page()
    }

    /// Loses what is not durable, or more; the next opening has another incarnation.
    pub(crate) fn reopened_with(&mut self, batches: usize) {
        self.batches.truncate(batches);
        self.durable = self.batches.len();
        self.incarnation += 1;
        self.closed = false;
    }

    pub(crate) fn sync(&mut self) {
        self.durable = self.batches.len();
    }
}

impl Source for ModelJournal {
    fn end(&self) -> Checkpoint {
        self.end_of_batches(self.durable)
    }

    fn start(&self) -> Checkpoint {
        self.end_of_batches(self.removed)
    }

    fn batch_end_at(&mut self, position: Position) -> Result<Option<Link>, SourceError> {
        self.probed += 1;
        let ends = (0..=self.durable).map(|count| self.end_of_batches(count));
        let end = ends.take_while(|end| end.position <= position).last();
        let known = |end: &Checkpoint| end.offset == 0 || end.offset >= self.start().offset;
        Ok(end.filter(known).map(Link::from))
    }

    fn is_closed(&self) -> bool {
        self.closed
    }

    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError> {
        if checkpoint.journal != self.id {
            return Ok(Comparison::Foreign);
        }
        if checkpoint.offset > self.end().offset {
            return Ok(Comparison::Ahead);
        }
        if checkpoint.offset < self.start().offset {
            return Err(SourceError::Truncated { first: self.start().position });
        }
        let equal = (0..=self.durable).any(|count| self.end_of_batches(count) == *checkpoint);
        Ok(if equal { Comparison::Equal } else { Comparison::Differs })
    }

    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError> {
        if witness.offset > self.end().offset {
            return Ok(Comparison::Ahead);
        }
        let equal =
            (0..=self.durable).any(|count| witness_at(&self.end_of_batches(count)) == *witness);
        Ok(if equal { Comparison::Equal } else { Comparison::Differs })
    }

    fn seek(&mut self, from: Position) -> Result<(), SourceError> {
        let first = self.start().position;
        if from < first {
            return Err(SourceError::Truncated { first });
        }
        self.next = self.batches.iter().take_while(|batch| batch.end.position <= from).count();
        Ok(())
    }

    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        self.seek(at.position)?;
        if self.damaged_at == Some(self.next) {
            return Err(SourceError::Corrupt { position: self.end_of_batches(self.next).position });
        }
        if self.next >= self.durable {
            return Ok(None);
        }
        let batch = &self.batches[self.next];
        let decoded = BatchRef::decode(&batch.bytes, batch.page.header.salt).unwrap();
        Ok(Some((decoded, batch.first_of_segment.then_some(&batch.page))))
    }
}

#[cfg(test)]
pub(crate) fn common_at(end: &Checkpoint) -> Common {
    Common { position: end.position, chain: end.chain }
}

pub(crate) fn witness_at(end: &Checkpoint) -> Witness {
    Witness { offset: end.offset, position: end.position, chain: end.chain }
}

/// A mirror: takes only what continues it, loses what it has not synced.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModelMirror {
    pub(crate) journal: Option<JournalId>,
    pub(crate) batches: Vec<(Vec<u8>, SegmentPage, Checkpoint)>,
    pub(crate) durable: usize,
    pub(crate) page: Option<SegmentPage>,
    pub(crate) witness: Option<Witness>,
}

impl ModelMirror {
    pub(crate) fn end_of_batches(&self, count: usize) -> Option<Checkpoint> {
        match count.checked_sub(1) {
            Some(last) => Some(self.batches[last].2),
            None => self.journal.map(|journal| Mark::start(journal).end),
        }
    }

    pub(crate) fn resume(&self) -> Option<Resume> {
        let end = self.end_of_batches(self.batches.len())?;
        Some(Resume { end, witness: self.witness })
    }

    /// What batch ends of an origin's are here.
    pub(crate) fn held(&self, ends: &[Option<Link>]) -> Vec<Held> {
        let own: Vec<_> = (0..=self.batches.len()).filter_map(|n| self.end_of_batches(n)).collect();
        let held = |end: &Option<Link>| match end {
            None => Held::Unknown,
            Some(end) if own.iter().any(|own| Link::from(*own) == *end) => {
                Held::Common(Common { position: end.position, chain: end.chain })
            }
            Some(_) => Held::Other,
        };
        ends.iter().map(held).collect()
    }

    #[cfg(test)]
    pub(crate) fn take(&mut self, delivery: Delivery) {
        self.try_take(delivery).unwrap();
    }

    /// Takes only what continues what is there; what doesn't is refused with the reason.
    pub(crate) fn try_take(&mut self, delivery: Delivery) -> Result<(), String> {
        match delivery {
            Delivery::Subscribed(end)
                if *self.journal.get_or_insert(end.journal) == end.journal =>
            {
                Ok(())
            }
            Delivery::Segment(page) => match SegmentPage::read(&page) {
                PageState::Valid { page, intact: true } => {
                    self.page = Some(page);
                    Ok(())
                }
                other => Err(format!("{other:?}")),
            },
            Delivery::Batches(bytes) => batches(&bytes).try_for_each(|bytes| self.batch(bytes)),
            other => Err(format!("{other:?}: the connection compares, and this is no feed")),
        }
    }

    fn batch(&mut self, bytes: &[u8]) -> Result<(), String> {
        let last = self.batches.last().map(|(_, page, _)| page);
        let page = self.page.as_ref().or(last).ok_or("no segment")?.clone();
        let batch = BatchRef::decode(bytes, page.header.salt).map_err(|error| error.to_string())?;
        let at = self.end_of_batches(self.batches.len()).ok_or("no journal")?;
        let digest = self.page.as_ref().map(|page| &page.digest);
        let is_whole = batch.bytes().len() == bytes.len();
        if !is_whole || !batch.continues(&Link::from(at), digest) {
            return Err(format!("{:?} doesn't continue {at:?}", batch.header));
        }
        let end = end_of(&batch, at.journal);
        self.batches.push((bytes.to_vec(), page, end));
        self.page = None;
        Ok(())
    }

    pub(crate) fn sync(&mut self) -> Option<Checkpoint> {
        self.durable = self.batches.len();
        self.end_of_batches(self.durable)
    }

    #[cfg(test)]
    pub(crate) fn crash(&mut self) {
        self.batches.truncate(self.durable);
        self.page = None;
    }

    #[cfg(test)]
    pub(crate) fn set_aside_from(&mut self, batches: usize) {
        self.witness = self.end_of_batches(self.batches.len()).map(|end| witness_at(&end));
        self.durable = batches;
        self.crash();
    }
}

pub(crate) fn origin_config() -> OriginConfig {
    OriginConfig {
        node: NodeId::from_bytes([0x0E; 16]),
        role: Role::Origin,
        sources: vec!["127.0.0.1:7001".into(), "/srv/backups/orders".into()],
        session: [0x5E; 16],
        deadlines: Deadlines::default(),
        max_frame: 8192,
        data_bytes: 2048,
        max_window_bytes: 1 << 20,
        idle_acks_max: 100,
        gate: Gate::default(),
        shape: None,
    }
}

pub(crate) fn mirror_config(resume: Option<Resume>) -> MirrorConfig {
    MirrorConfig {
        node: Some(NodeId::from_bytes([0x11; 16])),
        follows: true,
        nonce: [0x17; 16],
        authentication: Authentication::None,
        agent: "headwater/test".to_owned(),
        deadlines: Deadlines::default(),
        max_frame: 8192,
        window_bytes: 4096,
        resume,
    }
}

pub(crate) fn now() -> Now {
    Now { at: Instant::now(), unix_us: 1_700_000_000_000_000 }
}

pub(crate) fn later(now: Now, by: Duration) -> Now {
    Now { at: now.at + by, unix_us: now.unix_us + by.as_micros() as i64 }
}
