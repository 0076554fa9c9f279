//! A subscriber without a disk and without I/O: it verifies every byte like a mirror does, and keeps a digest.
//! Written from `docs/protocol.md`, not from the library's session.
#![allow(dead_code, reason = "each of the test programs uses a part of it")]

use headwater::format::batch::{BatchRef, Link, genesis};
use headwater::format::segment::{PageState, SegmentPage};
use headwater::shipping::message::{
    Ack, Authentication, Data, Diverged, ErrorCode, FrameReader, Hello, Message, PROTOCOL_VERSIONS,
    Subscribe,
};
use headwater::{Checkpoint, JournalId, NodeId};

/// Why a connection is of no use any more.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Ended {
    /// What came isn't what was sent, or doesn't continue what is there. Nothing of it was taken.
    Damaged(String),
    /// The origin says so.
    Told(ErrorCode),
    GoAway,
    Diverged(Box<Diverged>),
}

pub(crate) struct Subscriber {
    /// The end of what was verified; `None` before the journal is known.
    pub(crate) end: Option<Checkpoint>,
    /// The origin's durable end as last told in this connection, in bytes.
    pub(crate) told: Option<u64>,
    /// The bytes of all batches, if they are kept.
    pub(crate) kept: Option<Vec<u8>>,
    /// Over the bytes of all batches.
    hasher: blake3::Hasher,
    node: Option<NodeId>,
    window_bytes: u32,
    reader: FrameReader,
    /// The header page of the segment in which the end lies.
    page: Option<SegmentPage>,
    /// One that no batch has followed yet.
    next_page: Option<SegmentPage>,
    /// Of a batch that comes in parts.
    partial: Vec<u8>,
    acked: u64,
}

impl Subscriber {
    pub(crate) fn new(node: Option<NodeId>, window_bytes: u32) -> Self {
        Self {
            end: None,
            told: None,
            kept: None,
            hasher: blake3::Hasher::new(),
            node,
            window_bytes,
            reader: FrameReader::new(),
            page: None,
            next_page: None,
            partial: Vec::new(),
            acked: 0,
        }
    }

    pub(crate) fn keeping(window_bytes: u32) -> Self {
        Self { kept: Some(Vec::new()), ..Self::new(None, window_bytes) }
    }

    pub(crate) fn digest(&self) -> blake3::Hash {
        self.hasher.finalize()
    }

    /// Whether it has all that the origin has said it has.
    pub(crate) fn is_at_the_end(&self) -> bool {
        self.told.is_some_and(|told| self.end.is_some_and(|end| end.offset >= told))
    }

    /// A new connection: what to say first.
    pub(crate) fn begin(&mut self) -> Vec<u8> {
        self.reader = FrameReader::new();
        self.reader.allow_data(1 << 20);
        (self.told, self.next_page) = (None, None);
        self.partial.clear();
        let mut out = Vec::new();
        Message::Hello(Hello {
            versions: PROTOCOL_VERSIONS,
            features: 0,
            max_frame: 1 << 20,
            node: self.node,
            nonce: [7; 16],
            authentication: Authentication::None,
            agent: "headwater/test".into(),
        })
        .encode(&mut out);
        let window_bytes = self.window_bytes;
        Message::Subscribe(Subscribe { from: self.end, witness: None, window_bytes })
            .encode(&mut out);
        out
    }

    /// Takes what has arrived; what there is to say.
    pub(crate) fn hear(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Ended> {
        let mut reader = std::mem::take(&mut self.reader);
        reader.push(bytes);
        let heard = loop {
            match reader.next_message() {
                Ok(Some(message)) => match self.take(message) {
                    Ok(()) => {}
                    Err(ended) => break Err(ended),
                },
                Ok(None) => break Ok(()),
                Err(error) => break Err(Ended::Damaged(error.to_string())),
            }
        };
        self.reader = reader;
        heard?;
        let news = self.end.is_some_and(|end| end.offset > self.acked);
        Ok(if news { self.acknowledge() } else { Vec::new() })
    }

    /// That it is there, and how far.
    pub(crate) fn acknowledge(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        if let (Some(mirrored), Some(_)) = (self.end, self.told) {
            self.acked = mirrored.offset;
            Message::Ack(Ack { mirrored, applied: None, echo: 0 }).encode(&mut out);
        }
        out
    }

    fn take(&mut self, message: Message<'_>) -> Result<(), Ended> {
        match message {
            Message::Subscribed(subscribed) => {
                let journal = subscribed.end.journal;
                let own = *self.end.get_or_insert_with(|| start(journal));
                if own.journal != journal {
                    return Err(Ended::Damaged("another journal".into()));
                }
                self.acked = own.offset;
                self.ends_at(subscribed.end.offset)
            }
            Message::Segment(bytes) => {
                let PageState::Valid { page, intact: true } = SegmentPage::read(bytes) else {
                    return Err(Ended::Damaged("a header page that isn't one".into()));
                };
                let (end, header) = (self.end(), &page.header);
                if header.journal != end.journal
                    || header.base_offset != end.offset
                    || header.base_position != end.position
                    || header.previous_chain != end.chain
                {
                    return Err(Ended::Damaged("a segment that begins elsewhere".into()));
                }
                self.next_page = Some(page);
                Ok(())
            }
            Message::Data(data) => self.data(&data),
            Message::Heartbeat(heartbeat) => self.ends_at(heartbeat.end.offset),
            Message::Error(failure) => Err(Ended::Told(failure.code)),
            Message::GoAway(_) => Err(Ended::GoAway),
            Message::Diverged(diverged) => Err(Ended::Diverged(Box::new(diverged))),
            _ => Ok(()),
        }
    }

    fn end(&self) -> Checkpoint {
        self.end.expect("nothing comes before SUBSCRIBED")
    }

    fn ends_at(&mut self, offset: u64) -> Result<(), Ended> {
        if self.told.is_some_and(|told| offset < told) || offset < self.end().offset {
            return Err(Ended::Damaged("a durable end that goes back".into()));
        }
        self.told = Some(offset);
        Ok(())
    }

    fn data(&mut self, data: &Data<'_>) -> Result<(), Ended> {
        let at = self.end().offset + self.partial.len() as u64;
        if data.offset != at {
            return Err(Ended::Damaged(format!("offset {} at {at}", data.offset)));
        }
        self.ends_at(data.origin_end.offset)?;
        let mut bytes = std::mem::take(&mut self.partial);
        bytes.extend_from_slice(data.bytes);
        if data.continued {
            self.partial = bytes;
            return Ok(());
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let claimed = rest.get(60..64).map(|len| u32::from_le_bytes(len.try_into().unwrap()));
            let split = claimed.and_then(|len| rest.split_at_checked(len as usize));
            let Some((batch, behind)) = split.filter(|(batch, _)| batch.len() >= 128) else {
                return Err(Ended::Damaged("bytes that don't divide into batches".into()));
            };
            self.batch(batch)?;
            rest = behind;
        }
        Ok(())
    }

    fn batch(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        let end = self.end();
        let page = self.next_page.as_ref().or(self.page.as_ref());
        let Some(page) = page else { return Err(Ended::Damaged("no segment".into())) };
        let batch = BatchRef::decode(bytes, page.header.salt);
        let batch = batch.map_err(|error| Ended::Damaged(error.to_string()))?;
        let link = Link { offset: end.offset, position: end.position, chain: end.chain };
        let digest = self.next_page.as_ref().map(|page| &page.digest);
        if !batch.continues(&link, digest) {
            return Err(Ended::Damaged(format!("a batch that doesn't continue {link:?}")));
        }
        batch.check_records().map_err(|error| Ended::Damaged(error.to_string()))?;
        let header = &batch.header;
        self.end = Some(Checkpoint {
            journal: end.journal,
            epoch: header.epoch,
            incarnation: header.incarnation,
            offset: header.end_offset(),
            position: header.end_position(),
            chain: header.chain,
        });
        if let Some(page) = self.next_page.take() {
            self.page = Some(page);
        }
        self.hasher.update(bytes);
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(bytes);
        }
        Ok(())
    }
}

fn start(journal: JournalId) -> Checkpoint {
    Checkpoint {
        journal,
        epoch: 0,
        incarnation: headwater::Incarnation::new(0),
        offset: 0,
        position: headwater::Position::START,
        chain: genesis(journal),
    }
}
