//! Small journals whose bytes never change: what version 1 of the format is, beyond all words.
//!
//! `tests/golden/v1/` is compared byte for byte with what the current code writes, and read by the current
//! code, by the command line and by the reader in Python. It is rewritten only with
//! `HEADWATER_REWRITE_GOLDEN=1`, which for a released format must never be needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::codec::CodecError;
use headwater::format::base::{self, BaseHeader, Boundary};
use headwater::format::batch::{BATCH_HEADER_BYTES, BatchHeader, BatchRef, body_digest, genesis};
use headwater::format::files::{MARK_FILE_BYTES, MARK_SLOT_STRIDE, Mark, Node, Role, Witness};
use headwater::format::segment::{PageState, SegmentHeader, SegmentPage};
use headwater::format::sidecar::{self, SegmentIndex, SidecarKey};
use headwater::format::{Flags, crc32, record};
use headwater::fs::{Fs, os::OsFs};
use headwater::upcast::Step;
use headwater::{
    Chain, Checkpoint, Event, EventId, EventKind, EventKindRef, Incarnation, Journal, JournalId,
    KnownKind, Locator, NewEvent, NodeId, Payload, PayloadCodec, Position, Recorded, Revision,
    StreamId,
};
use serde_json::{Value, json};

use crate::dump::dump;

/// One event, as it must be read.
#[derive(Clone, Default)]
struct Spec {
    id: u8,
    stream: &'static str,
    revision: u64,
    kind: &'static str,
    schema_version: u32,
    codec: u8,
    payload: &'static [u8],
    tags: &'static [&'static str],
    subject: Option<&'static str>,
    correlation: Option<u8>,
    causation: Option<(u8, u64)>,
    occurred_at_us: Option<i64>,
    metadata: &'static [(&'static str, &'static str)],
}

struct Stored(Spec);

impl Event for Stored {
    const KINDS: &'static [KnownKind] = &[];

    fn kind(&self) -> EventKind {
        EventKind { name: self.0.kind, schema_version: self.0.schema_version }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        Ok((PayloadCodec::from_byte(self.0.codec), self.0.payload.to_vec()))
    }

    fn step(_: EventKindRef<'_>, _: Payload<'_>) -> Result<Step<Self>, CodecError> {
        Ok(Step::Foreign)
    }
}

impl Spec {
    fn to_event(&self) -> NewEvent {
        let mut event = NewEvent::typed(&Stored(self.clone())).unwrap().id(event_id(self.id));
        for tag in self.tags {
            event = event.tag(*tag);
        }
        for (key, value) in self.metadata {
            event = event.metadata(*key, *value);
        }
        if let Some(subject) = self.subject {
            event = event.subject(subject);
        }
        if let Some(id) = self.correlation {
            event = event.correlation(event_id(id));
        }
        if let Some((journal, position)) = self.causation {
            let journal = JournalId::from_bytes([journal; 16]);
            event = event.causation(Locator { journal, position: Position::new(position) });
        }
        if let Some(time) = self.occurred_at_us {
            event = event.occurred_at_us(time);
        }
        event
    }
}

fn event_id(id: u8) -> EventId {
    EventId::from_bytes([id; 16])
}

const JOURNAL: JournalId = JournalId::from_bytes([
    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x46, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
]);
const T0_US: i64 = 1_767_225_600_000_000; // 2026-01-01T00:00:00Z

/// What was written: (segment, epoch, group of the batch, its events).
fn batches() -> Vec<(u64, u32, u32, Vec<Spec>)> {
    let placed = Spec {
        id: 1,
        stream: "order-1",
        kind: "order.placed",
        schema_version: 1,
        codec: 2,
        payload: br#"{"total_cents":1250}"#,
        ..Spec::default()
    };
    let paid = Spec {
        id: 2,
        stream: "order-1",
        revision: 1,
        kind: "order.paid",
        schema_version: 3,
        codec: 1,
        payload: &[0xfb, 0xe2, 0x04, 0x00],
        tags: &["customer:17", "région:São Paulo"],
        subject: Some("customer-17"),
        correlation: Some(0xc0),
        causation: Some((0xca, 41)),
        occurred_at_us: Some(-1),
        metadata: &[("source", "web"), ("source", "again"), ("empty", "")],
    };
    let reserved = Spec {
        id: 3,
        stream: "stock-lamp",
        kind: "stock.reserved",
        schema_version: 1,
        payload: b"one lamp, reserved",
        tags: &["customer:17"],
        ..Spec::default()
    };
    let shipped = Spec {
        id: 4,
        stream: "order-1",
        revision: 2,
        kind: "order.shipped",
        schema_version: 1,
        codec: 2,
        payload: b"{ \"parcels\": [ \"A 1\", \"B\\\"2\" ], \"weight_kg\": 1.50 }\n",
        ..Spec::default()
    };
    let empty = Spec {
        id: 5,
        stream: "stock-lamp",
        revision: 1,
        kind: "stock.counted",
        schema_version: 2,
        ..Spec::default()
    };
    let other = Spec {
        id: 6,
        stream: "σ",
        kind: "é",
        schema_version: u32::MAX,
        codec: 9,
        payload: b"\x00\x01\xfe\xff",
        occurred_at_us: Some(T0_US),
        ..Spec::default()
    };
    let last = Spec {
        id: 7,
        stream: "order-2",
        kind: "order.placed",
        schema_version: 1,
        codec: 2,
        payload: br#"{"total_cents":18446744073709551615}"#,
        ..Spec::default()
    };
    vec![
        (0, 1, 0, vec![placed]),
        (0, 1, 1, vec![paid, reserved]),
        (1, 1, 2, vec![shipped]),
        (1, 2, 3, vec![empty]),
        (1, 2, 3, vec![other]),
        (2, 2, 4, vec![last]),
    ]
}

fn incarnation(epoch: u32) -> Incarnation {
    Incarnation::new(0x1111_1111_1111_1111 * u64::from(epoch))
}

fn alignment(segment: u64) -> u32 {
    if segment == 1 { 512 } else { 64 }
}

fn salt(segment: u64) -> u64 {
    0x5a17_0000_0000_0000 + segment
}

const CAPACITY_BYTES: u64 = 8192;

struct Written {
    files: BTreeMap<String, Vec<u8>>,
    /// The checkpoint behind every batch.
    ends: Vec<Checkpoint>,
}

/// Lays out segments and sidecars through the functions that the journal itself uses.
fn write_segments() -> Written {
    let batches = batches();
    let mut files = BTreeMap::new();
    let mut end = Mark::start(JOURNAL).end;
    let mut ends = Vec::new();
    for number in 0..3_u64 {
        let of_segment: Vec<_> = batches.iter().filter(|batch| batch.0 == number).collect();
        let epoch = of_segment[0].1;
        let page = SegmentHeader {
            flags: Flags::default(),
            group_alignment: alignment(number),
            journal: JOURNAL,
            number,
            epoch,
            incarnation: incarnation(epoch),
            base_position: end.position,
            base_offset: end.offset,
            durable_offset: end.offset,
            salt: salt(number),
            created_at_us: T0_US + number as i64 * 1_000_000,
            capacity_bytes: CAPACITY_BYTES,
            previous_chain: end.chain,
        }
        .to_page();
        let mut bytes = page.bytes().to_vec();
        let mut index = SegmentIndex::default();
        let mut durable = end.offset;
        for (at, (_, epoch, group, events)) in of_segment.iter().enumerate() {
            let last_of_group = of_segment.get(at + 1).is_none_or(|next| next.2 != *group);
            let batch = write_batch(&page, &end, durable, *epoch, events, last_of_group);
            let read = BatchRef::decode(&batch, salt(number)).unwrap();
            index.add(&read).unwrap();
            let link = read.header.end_link();
            end = Checkpoint {
                journal: JOURNAL,
                epoch: *epoch,
                incarnation: incarnation(*epoch),
                offset: link.offset,
                position: link.position,
                chain: link.chain,
            };
            bytes.extend_from_slice(&batch);
            ends.push(end);
            durable = if last_of_group { end.offset } else { durable };
        }
        if number == 2 {
            bytes.resize(CAPACITY_BYTES as usize, 0);
        } else {
            let key = SidecarKey {
                segment: number,
                salt: salt(number),
                base_position: page.header.base_position,
                end_offset: end.offset,
                end_chain: end.chain,
            };
            files.insert(format!("{number:016x}.idx"), sidecar::encode(&key, &index));
        }
        files.insert(format!("{number:016x}.seg"), bytes);
    }
    Written { files, ends }
}

fn write_batch(
    page: &SegmentPage,
    end: &Checkpoint,
    durable_offset: u64,
    epoch: u32,
    events: &[Spec],
    last_of_group: bool,
) -> Vec<u8> {
    let mut body = Vec::new();
    for event in events {
        let stream = StreamId::new(event.stream).unwrap();
        record::encode(&mut body, &event.to_event(), &stream, Revision::new(event.revision));
    }
    let used = (BATCH_HEADER_BYTES + body.len()) as u64;
    let alignment = if last_of_group { u64::from(page.header.group_alignment) } else { 64 };
    let start = end.offset - page.header.base_offset;
    let padded = (start + used).next_multiple_of(alignment) - start;
    let mut header = BatchHeader {
        header_len: BATCH_HEADER_BYTES as u16,
        flags: Flags::default(),
        stored_len: body.len() as u32,
        raw_len: body.len() as u32,
        body_crc: crc32(&[&body]),
        count: events.len() as u32,
        base_position: end.position,
        offset: end.offset,
        durable_offset,
        epoch,
        padded_len: padded as u32,
        incarnation: incarnation(epoch),
        time_us: T0_US + 1_000 * (1 + end.position.get() as i64),
        chain: Chain::default(),
    };
    let first = end.offset == page.header.base_offset;
    let digest = first.then_some(&page.digest);
    let mut out = header.seal(end.chain, digest, &body_digest(&body), page.header.salt).to_vec();
    out.extend_from_slice(&body);
    out.resize(padded as usize, 0);
    out
}

fn mark_file(newest: Mark, other: Mark) -> Vec<u8> {
    let mut bytes = vec![0; MARK_FILE_BYTES];
    for mark in [other, newest] {
        let at = (mark.sequence % 2 * MARK_SLOT_STRIDE) as usize;
        let slot = mark.encode();
        bytes[at..at + slot.len()].copy_from_slice(&slot);
    }
    bytes
}

/// Directory name, then file name, then bytes.
fn journals() -> BTreeMap<&'static str, BTreeMap<String, Vec<u8>>> {
    let Written { files: mut origin, ends } = write_segments();
    let node = |role, id| Node { role, node: NodeId::from_bytes([id; 16]), journal: JOURNAL };
    let mut mirror = BTreeMap::new();
    for name in ["0000000000000000.seg", "0000000000000000.idx"] {
        mirror.insert(name.to_owned(), origin[name].clone());
    }
    // The mirror has set the second group of segment 1 aside, and remembers where it had been.
    let base = ends[1].offset;
    let mut active = origin["0000000000000001.seg"].clone();
    active.truncate(4096 + (ends[2].offset - base) as usize);
    active.resize(CAPACITY_BYTES as usize, 0);
    mirror.insert("0000000000000001.seg".to_owned(), active);
    mirror.insert("node".to_owned(), node(Role::Mirror, 0xb0).encode().to_vec());
    let witness =
        Witness { offset: ends[4].offset, position: ends[4].position, chain: ends[4].chain };
    let lowered =
        Mark { sequence: 9, end: ends[2], closed: false, witness: Some(witness), salt: 0 };
    mirror.insert("mark".to_owned(), mark_file(Mark { sequence: 10, ..lowered }, lowered));

    origin.insert("node".to_owned(), node(Role::Origin, 0xa0).encode().to_vec());
    let closed = Mark { sequence: 6, end: ends[5], closed: true, witness: None, salt: 0 };
    let before = Mark { sequence: 5, end: ends[4], closed: false, witness: None, salt: 0 };
    origin.insert("mark".to_owned(), mark_file(closed, before));
    // The origin, once segment 0 was removed.
    let mut trimmed = origin.clone();
    trimmed.retain(|name, _| !name.starts_with("0000000000000000"));
    trimmed.insert("base".to_owned(), base_file(&ends));
    BTreeMap::from([("origin", origin), ("mirror", mirror), ("trimmed", trimmed)])
}

fn base_file(ends: &[Checkpoint]) -> Vec<u8> {
    let genesis = Mark::start(JOURNAL).end;
    let mut heads = [("order-1", 1), ("stock-lamp", 0)].map(|(name, last)| {
        let revision = Revision::new(last);
        base::Head::new(name, revision)
    });
    heads.sort_by_key(|head| head.hash);
    let header = BaseHeader {
        start: ends[1],
        first_segment: 1,
        durable_offset: ends[5].offset,
        written_at_us: T0_US + 60_000_000,
        boundaries: 1,
        streams: 2,
        name_bytes: 17,
    };
    let (offset, position, chain) = (genesis.offset, genesis.position, genesis.chain);
    let boundary = Boundary { segment: 0, offset, position, chain };
    let mut bytes = vec![0; 5 * 4096];
    let mut put = |number: u64, page: &[u8; 4096]| {
        bytes[number as usize * 4096..][..4096].copy_from_slice(page);
        Ok(())
    };
    let heads = heads.into_iter().map(Ok);
    base::write(&header, std::iter::once(Ok(boundary)), heads, &mut put).unwrap();
    bytes
}

/// Positions of the events of a golden journal.
fn positions(journal: &str) -> std::ops::Range<usize> {
    match journal {
        "origin" => 0..7,
        "trimmed" => 3..7,
        _ => 0..4,
    }
}

/// How an event looks in JSON, for the command line and for the reader in Python; see docs/cli.md.
fn expected_json() -> Vec<Value> {
    let mut position = 0;
    let mut lines = Vec::new();
    for (_, _, _, events) in batches() {
        let recorded_at_us = T0_US + 1_000 * (1 + position as i64);
        for spec in events {
            let codecs = ["raw", "bincode", "json"];
            let codec = codecs.get(usize::from(spec.codec)).unwrap_or(&"codec-9");
            let mut line = json!({
                "position": position,
                "recorded_at": format!("2026-01-01T00:00:00.{:06}Z", recorded_at_us - T0_US),
                "recorded_at_us": recorded_at_us,
                "id": event_id(spec.id).to_string(),
                "stream": spec.stream,
                "revision": spec.revision,
                "type": spec.kind,
                "schema_version": spec.schema_version,
                "codec": codec,
                "tags": spec.tags,
                "metadata": spec.metadata,
            });
            let mut set = |key: &str, value: Value| line[key] = value;
            if let Some(subject) = spec.subject {
                set("subject", json!(subject));
            }
            if let Some(id) = spec.correlation {
                set("correlation", json!(event_id(id).to_string()));
            }
            if let Some((journal, position)) = spec.causation {
                let journal = JournalId::from_bytes([journal; 16]).to_string();
                set("causation", json!({ "journal": journal, "position": position }));
            }
            if let Some(time) = spec.occurred_at_us {
                set("occurred_at_us", json!(time));
            }
            match (spec.codec, std::str::from_utf8(spec.payload)) {
                (2, Ok(text)) => set("payload", serde_json::from_str(text).unwrap()),
                (_, Ok(text)) if !text.chars().any(char::is_control) => {
                    set("payload_text", json!(text));
                }
                _ => {
                    let hex: String = spec.payload.iter().map(|b| format!("{b:02x}")).collect();
                    set("payload_hex", json!(hex));
                }
            }
            lines.push(line);
            position += 1;
        }
    }
    lines
}

/// The directory of the golden files.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

/// The events of a golden journal in JSON.
#[cfg(feature = "cli")]
pub(crate) fn golden_json(journal: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden().join(format!("{journal}.ndjson"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// All golden files: binary ones, a readable dump of each, and the events in JSON.
fn golden_files() -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for (journal, files) in journals() {
        for (name, bytes) in files {
            let path = golden().join(journal).join(&name);
            let text = format!("{journal}/{name}\n\n{}", annotate(&name, &bytes));
            all.insert(PathBuf::from(format!("{}.txt", path.display())), text.into_bytes());
            all.insert(path, bytes);
        }
        let lines = &expected_json()[positions(journal)];
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        all.insert(golden().join(format!("{journal}.ndjson")), lines.into_bytes());
    }
    all
}

#[test]
fn the_golden_files_are_what_this_code_writes() {
    let rewrite = std::env::var_os("HEADWATER_REWRITE_GOLDEN").is_some_and(|value| value == "1");
    for (path, bytes) in golden_files() {
        if rewrite {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let found = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        assert!(found == bytes, "{} differs", path.display());
    }
    // Nothing lies beside them that no test knows.
    let known = golden_files();
    for journal in ["origin", "mirror", "trimmed"] {
        for entry in std::fs::read_dir(golden().join(journal)).unwrap() {
            let path = entry.unwrap().path();
            assert!(known.contains_key(&path), "{} is not a golden file", path.display());
        }
    }
}

#[test]
fn every_event_of_the_golden_journals_is_read_as_it_was_written() {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    for (name, role, count) in [("origin", Role::Origin, 7), ("mirror", Role::Mirror, 4)] {
        let (journal, corruption) = Journal::open_read_only(&fs, &golden().join(name)).unwrap();
        assert_eq!(corruption, None);
        assert_eq!((journal.id(), journal.role()), (JOURNAL, role));
        assert_eq!(journal.end().position, Position::new(count));
        let specs: Vec<Spec> = batches().into_iter().flat_map(|batch| batch.3).collect();
        let read: Vec<Recorded> =
            journal.read_all(Position::START).unwrap().map(Result::unwrap).collect();
        assert_eq!(read.len() as u64, count);
        for (position, (spec, event)) in specs.iter().zip(&read).enumerate() {
            assert_eq!(event.position(), Position::new(position as u64));
            same(spec, event);
        }
        let streams = journal.read_stream(&StreamId::new("order-1").unwrap(), Revision::FIRST);
        let ids: Vec<EventId> = streams.unwrap().map(|event| event.unwrap().id()).collect();
        assert_eq!(ids, [event_id(1), event_id(2), event_id(4)]);
    }
}

#[test]
fn a_golden_journal_whose_first_segment_was_removed_is_read_from_there_on() {
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let dir = golden().join("trimmed");
    let (journal, corruption) = Journal::open_read_only(&fs, &dir).unwrap();
    assert_eq!(corruption, None);
    assert_eq!(journal.start().position, Position::new(3));
    assert!(headwater::verify_deep(&OsFs, &dir, &mut |_| {}).unwrap().is_healthy());
    let specs: Vec<Spec> = batches().into_iter().flat_map(|batch| batch.3).collect();
    let read: Vec<_> = journal.read_all(Position::new(3)).unwrap().map(Result::unwrap).collect();
    assert_eq!(read.len(), 4);
    specs[3..].iter().zip(&read).for_each(|(spec, event)| same(spec, event));
    assert_eq!(journal.read_all(Position::START).unwrap_err().code(), "read.truncated");
    for (stream, head) in [("order-1", 2), ("stock-lamp", 0)] {
        let stream = StreamId::new(stream).unwrap();
        assert!(journal.stream_head(&stream).unwrap() >= Some(Revision::new(head)), "{stream}");
        let error = journal.read_stream(&stream, Revision::FIRST).unwrap_err();
        assert_eq!(error.code(), "read.truncated_stream");
    }
}

fn same(spec: &Spec, event: &Recorded) {
    assert_eq!(event.id(), event_id(spec.id));
    assert_eq!(event.stream().as_str(), spec.stream);
    assert_eq!(event.revision().get(), spec.revision);
    assert_eq!(event.event_type().as_str(), spec.kind);
    assert_eq!(event.schema_version(), spec.schema_version);
    assert_eq!(event.codec().to_byte(), spec.codec);
    assert_eq!(event.data(), spec.payload);
    assert_eq!(event.tags(), spec.tags);
    assert_eq!(event.subject(), spec.subject);
    assert_eq!(event.correlation(), spec.correlation.map(event_id));
    let causation = event.causation().map(|cause| (cause.journal, cause.position.get()));
    assert_eq!(causation, spec.causation.map(|(j, p)| (JournalId::from_bytes([j; 16]), p)));
    assert_eq!(event.occurred_at_us(), spec.occurred_at_us);
    let metadata: Vec<(&str, &str)> =
        event.metadata().iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(metadata, spec.metadata);
}

/// Flipping any one bit of the golden segments' batches is noticed by reading them.
#[test]
fn the_chain_of_the_golden_journal_begins_at_genesis_and_leads_to_its_end() {
    let mut chain = genesis(JOURNAL);
    let Written { files, ends } = write_segments();
    let mut seen = Vec::new();
    for number in 0..3 {
        let bytes = &files[&format!("{number:016x}.seg")];
        let PageState::Valid { page, intact: true } =
            SegmentPage::read(bytes.first_chunk().unwrap())
        else {
            panic!("segment {number}");
        };
        assert_eq!(page.header.previous_chain, chain);
        let mut rest = &bytes[4096..];
        let mut first = Some(&page.digest);
        while let Ok(batch) = BatchRef::decode(rest, page.header.salt) {
            chain = batch.chain_after(chain, first.take());
            assert_eq!(chain, batch.header.chain);
            seen.push(chain);
            rest = &rest[batch.bytes().len()..];
        }
    }
    assert_eq!(seen, ends.iter().map(|end| end.chain).collect::<Vec<_>>());
}

// ------------------------------------------------------------------------------------- readable dumps

/// Writes fields of a binary file as lines of offset, bytes and meaning.
struct Annotator<'a> {
    bytes: &'a [u8],
    at: usize,
    out: String,
}

impl<'a> Annotator<'a> {
    fn title(&mut self, text: &str) {
        self.out += &format!("---- {text}\n");
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        taken
    }

    fn line(&mut self, at: usize, bytes: &[u8], text: &str) {
        for (index, chunk) in bytes.chunks(16).enumerate() {
            let hex: Vec<String> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
            let text = if index == 0 { text } else { "" };
            let line = format!("{:08x}  {:<47}  {text}", at + 16 * index, hex.join(" "));
            self.out += line.trim_end();
            self.out += "\n";
        }
    }

    fn field(&mut self, name: &str, len: usize, show: impl Fn(&[u8]) -> String) -> &'a [u8] {
        let at = self.at;
        let bytes = self.take(len);
        self.line(at, bytes, &format!("{name} {}", show(bytes)));
        bytes
    }

    fn number(&mut self, name: &str, len: usize) -> u64 {
        let mut wide = [0; 8];
        wide[..len].copy_from_slice(self.field(name, len, |bytes| {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(wide).to_string()
        }));
        u64::from_le_bytes(wide)
    }

    fn time(&mut self, name: &str) {
        self.field(name, 8, |bytes| {
            format!("{} us", i64::from_le_bytes(bytes.try_into().unwrap()))
        });
    }

    fn hex(&mut self, name: &str, len: usize) {
        self.field(name, len, |_| String::new());
    }

    fn text(&mut self, name: &str, len: usize) {
        self.field(name, len, |bytes| format!("{:?}", String::from_utf8_lossy(bytes)));
    }

    fn text16(&mut self, name: &str) {
        let len = self.number(&format!("length of {name}"), 2) as usize;
        self.text(name, len);
    }

    fn zeros(&mut self, name: &str, to: usize) {
        if to > self.at {
            let len = to - self.at;
            let at = self.at;
            assert!(self.take(len).iter().all(|&byte| byte == 0), "{name} at {at} is not zero");
            self.out += &format!("{at:08x}  {:<47}  {name}\n", format!("00 x {len}"));
        }
    }

    fn flags(&mut self) {
        self.number("required flags", 2);
        self.number("read-only flags", 2);
        self.number("ignorable flags", 2);
    }
}

fn annotate(name: &str, bytes: &[u8]) -> String {
    let mut out = Annotator { bytes, at: 0, out: String::new() };
    match name.rsplit('.').next() {
        Some("seg") => annotate_segment(&mut out),
        Some("idx") => annotate_sidecar(&mut out),
        Some("node") => annotate_node(&mut out),
        Some("base") => annotate_base(&mut out),
        _ => (0..2).for_each(|slot| annotate_slot(&mut out, slot)),
    }
    assert_eq!(out.at, bytes.len());
    out.out + &format!("{:08x}  end of file\n", bytes.len())
}

fn annotate_segment(out: &mut Annotator<'_>) {
    for copy in 0..2 {
        out.title(&format!("header, copy {copy}"));
        annotate_header_copy(out, copy * 512);
    }
    out.zeros("rest of the header page", 4096);
    while out.bytes[out.at..].starts_with(b"\xB7HWB") {
        annotate_batch(out);
    }
    out.zeros("prepared room", out.bytes.len());
}

fn annotate_header_copy(out: &mut Annotator<'_>, start: usize) {
    out.hex("magic", 8);
    out.number("format version", 2);
    out.number("header length", 2);
    out.flags();
    out.number("checksum kind", 1);
    out.zeros("reserved", start + 20);
    out.number("group alignment", 4);
    out.hex("journal id", 16);
    out.number("segment number", 8);
    out.number("epoch", 4);
    out.zeros("reserved", start + 56);
    out.hex("incarnation", 8);
    out.number("base position", 8);
    out.number("base offset", 8);
    out.number("durable offset", 8);
    out.hex("salt", 8);
    out.time("created at");
    out.number("capacity", 8);
    out.hex("predecessor's number", 8);
    out.number("predecessor's end", 8);
    out.hex("chain at the base", 16);
    out.zeros("extension room", start + 508);
    out.hex("CRC-32 of the 508 bytes in front", 4);
}

fn annotate_batch(out: &mut Annotator<'_>) {
    let start = out.at;
    out.title(&format!("batch at file offset {start}"));
    out.hex("magic", 4);
    out.number("header length", 2);
    out.flags();
    out.hex("CRC-32 of salt and header", 4);
    let stored = out.number("stored length", 4) as usize;
    out.number("raw length", 4);
    out.hex("CRC-32 of the body", 4);
    let count = out.number("events", 4);
    let position = out.number("base position", 8);
    out.number("own offset", 8);
    out.number("durable offset", 8);
    out.number("epoch", 4);
    let padded = out.number("padded length", 4) as usize;
    out.hex("incarnation", 8);
    out.time("written at");
    out.hex("chain at the end", 16);
    out.zeros("extension room", start + 128);
    (0..count).for_each(|index| annotate_record(out, position + index));
    assert_eq!(out.at, start + 128 + stored);
    out.zeros("padding", start + padded);
}

fn annotate_record(out: &mut Annotator<'_>, position: u64) {
    let start = out.at;
    out.title(&format!("record at position {position}"));
    let len = out.number("record length", 4) as usize;
    let header_len = out.number("record header length", 2) as usize;
    out.number("required flags", 2);
    out.number("ignorable flags", 2);
    out.number("payload codec", 1);
    let fields = out.number("fields present", 1);
    out.number("schema version", 4);
    out.hex("event id", 16);
    out.number("revision", 8);
    let stream = out.number("length of stream", 2) as usize;
    let kind = out.number("length of type", 2) as usize;
    let tags = out.number("tags", 2);
    let pairs = out.number("metadata pairs", 2);
    out.zeros("extension room", start + 56);
    out.text("stream", stream);
    out.text("type", kind);
    (0..tags).for_each(|_| out.text16("tag"));
    if fields & 1 != 0 {
        out.time("occurred at");
    }
    if fields & 2 != 0 {
        out.hex("correlation", 16);
    }
    if fields & 4 != 0 {
        out.hex("causation: journal id", 16);
        out.number("causation: position", 8);
    }
    if fields & 8 != 0 {
        out.text16("subject");
    }
    for _ in 0..pairs {
        out.text16("key");
        out.text16("value");
    }
    assert_eq!(out.at, start + header_len);
    if len > header_len {
        out.text("payload", len - header_len);
    }
}

fn annotate_node(out: &mut Annotator<'_>) {
    out.hex("magic", 8);
    out.number("version", 2);
    out.number("role (1 origin, 2 mirror)", 1);
    out.zeros("reserved", 16);
    out.hex("node id", 16);
    out.hex("journal id", 16);
    out.zeros("reserved", 60);
    out.hex("CRC-32 of the 60 bytes in front", 4);
}

fn annotate_slot(out: &mut Annotator<'_>, slot: usize) {
    let start = slot * 4096;
    out.title(&format!("slot {slot}"));
    out.hex("magic", 8);
    out.number("version", 2);
    out.zeros("reserved", start + 12);
    out.number("flags (1 closed, 2 witness)", 4);
    out.number("sequence", 8);
    out.hex("journal id", 16);
    out.hex("incarnation", 8);
    out.number("durable offset", 8);
    out.number("position", 8);
    out.hex("chain", 16);
    out.number("epoch", 4);
    out.zeros("reserved", start + 88);
    out.number("witness: offset", 8);
    out.number("witness: position", 8);
    out.hex("witness: chain", 16);
    out.zeros("reserved", start + 124);
    out.hex("CRC-32 of the 124 bytes in front", 4);
    out.zeros("rest of the block", start + 4096);
}

fn annotate_sidecar(out: &mut Annotator<'_>) {
    out.title("page 0");
    out.hex("magic", 8);
    out.number("version", 2);
    out.zeros("reserved", 16);
    out.number("segment number", 8);
    out.hex("segment's salt", 8);
    out.number("base position", 8);
    out.number("end offset", 8);
    out.hex("chain at the end", 16);
    let sparse = out.number("sparse entries", 8);
    let ids = out.number("ids", 8);
    let streams = out.number("streams", 8);
    let name_bytes = out.number("bytes of names", 8);
    let postings = out.number("postings", 8);
    out.zeros("rest of the page", 4092);
    out.hex("CRC-32 of segment number, page number, page", 4);
    // The golden sidecars have one page of sections; an entry never crosses a page there.
    out.title("page 1");
    for _ in 0..sparse {
        out.number("sparse: position", 8);
        out.number("sparse: offset", 8);
        out.time("sparse: time");
    }
    (0..ids).for_each(|_| out.hex("hash of event id", 8));
    for _ in 0..streams {
        out.hex("stream: hash of name", 8);
        out.number("stream: first revision", 8);
        out.number("stream: events", 4);
        out.number("stream: length of name", 4);
        out.number("stream: place of name", 8);
        out.number("stream: first posting", 8);
    }
    out.text("names", name_bytes as usize);
    for _ in 0..postings {
        out.number("posting: position", 8);
        out.number("posting: batch offset", 8);
    }
    out.zeros("rest of the page", 2 * 4096 - 4);
    out.hex("CRC-32 of segment number, page number, page", 4);
}

fn annotate_base(out: &mut Annotator<'_>) {
    for page in 0..2 {
        out.title(if page == 0 { "header" } else { "header again" });
        out.hex("magic", 8);
        out.number("version", 2);
        out.zeros("reserved", page * 4096 + 16);
        out.hex("journal id", 16);
        out.hex("incarnation of the last removed batch", 8);
        out.number("first offset", 8);
        out.number("first position", 8);
        out.hex("chain there", 16);
        out.number("epoch of the last removed batch", 4);
        out.zeros("reserved", page * 4096 + 80);
        out.number("first segment", 8);
        out.number("durable offset", 8);
        out.time("time of writing");
        out.number("boundaries", 8);
        out.number("streams", 8);
        out.number("bytes of names", 8);
        out.zeros("rest of the page", page * 4096 + 4092);
        out.hex("CRC-32 of journal id, first offset, page number, page", 4);
    }
    out.title("boundaries");
    out.number("segment", 8);
    out.number("its base offset", 8);
    out.number("its base position", 8);
    out.hex("chain there", 16);
    out.zeros("rest of the page", 3 * 4096 - 4);
    out.hex("CRC-32", 4);
    out.title("streams");
    for _ in 0..2 {
        out.hex("hash of name", 8);
        out.number("last revision", 8);
        out.number("place of name", 8);
        out.number("length of name", 4);
        out.hex("reserved", 4);
    }
    out.zeros("rest of the page", 4 * 4096 - 4);
    out.hex("CRC-32", 4);
    out.title("names");
    out.text("names", 17);
    out.zeros("rest of the page", 5 * 4096 - 4);
    out.hex("CRC-32", 4);
}

#[test]
fn a_hex_dump_is_read_back_as_the_bytes_it_shows() {
    let bytes = &journals()["origin"]["0000000000000001.seg"];
    let text = format!("intro\n\nsegment ({} bytes)\n{}```\n", bytes.len(), dump(bytes));
    assert_eq!(&crate::dump::dump_of(&text, "segment"), bytes);
}

/// Prints the dumps that docs/format.md shows; they stand there verbatim.
#[test]
fn the_specification_shows_the_bytes_of_the_golden_journal() {
    let files = &journals()["origin"];
    let segment = &files["0000000000000000.seg"];
    let batch = &segment[4096..4096 + 256];
    let shown: [(&str, &[u8]); 7] = [
        ("node", &files["node"]),
        ("header copy", &segment[..512]),
        ("batch", batch),
        ("record", &batch[128..128 + 95]),
        ("mark slot", &files["mark"][..128]),
        ("base page 0", &journals()["trimmed"]["base"][..4096]),
        ("sidecar page 0", &files["0000000000000000.idx"][..4096]),
    ];
    let spec = include_str!("../../docs/format.md");
    for (label, bytes) in shown {
        let expected = format!("{label} ({} bytes)\n{}```", bytes.len(), dump(bytes));
        assert!(spec.contains(&expected), "docs/format.md should show\n{expected}");
    }
}
