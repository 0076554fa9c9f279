//! Reading a whole journal, one event, one stream: from the page cache.

use std::fs::File;
use std::os::unix::fs::FileExt;

use headwater::{Position, Revision, StreamId};

use crate::baseline;
use crate::corpus::{Corpus, STREAMS, stream_name};
use crate::measure::Measured;
use crate::meter::{Meter, Took};
use crate::shared::held::{self, Held};
use crate::{Group, Outcome, Scratch, Way};

const NOTHING: &str = "nothing is written";

pub(crate) fn replay(_: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let (events, bytes) = (corpus.events, corpus.bytes);
    let files = corpus.files.clone();
    let bare = move || baseline::read_and_check(&files);
    let journal = corpus.journal().clone();
    let batches = move || {
        let meter = Meter::start();
        let mut cursor = journal.cursor(Position::START)?;
        let mut seen = 0;
        while let Some(batch) = cursor.next_batch()? {
            seen += u64::from(batch.batch.header.count);
        }
        let took = meter.stop();
        all(seen, events)?;
        Ok(took)
    };
    let journal = corpus.journal().clone();
    let cursor = move || {
        let meter = Meter::start();
        let mut cursor = journal.cursor(Position::START)?;
        let mut seen = 0;
        while let Some(batch) = cursor.next_batch()? {
            for record in batch.batch.records() {
                std::hint::black_box(record?.payload);
                seen += 1;
            }
        }
        let took = meter.stop();
        all(seen, events)?;
        Ok(took)
    };
    let journal = corpus.journal().clone();
    let read_all = move || {
        let meter = Meter::start();
        let mut seen = 0;
        for event in journal.read_all(Position::START)? {
            std::hint::black_box(event?);
            seen += 1;
        }
        let took = meter.stop();
        all(seen, events)?;
        Ok(took)
    };
    let ways = vec![
        Way { name: "files: read + CRC-32", events, bytes, operation: Box::new(bare) },
        Way { name: "cursor: verified, batches only", events, bytes, operation: Box::new(batches) },
        Way { name: "cursor: verified, every record", events, bytes, operation: Box::new(cursor) },
        Way { name: "read_all: owned events", events, bytes, operation: Box::new(read_all) },
    ];
    let held = |measured: &[Measured]| {
        let [bare, batches, cursor, ..] = measured else { return Vec::new() };
        let note = bare.throughput().map_or_else(String::new, |it| {
            let batches = batches.times_faster(bare).map_or(f64::NAN, |it| it.median);
            let bare = it.median / 1e6;
            format!("the bare loop reads {bare:.1} M events/s; without looking at records: {batches:.2}x")
        });
        vec![Held::new(held::REPLAY, cursor.times_faster(bare), note)]
    };
    Ok(Group { held: Box::new(held), ..Group::new("replay", NOTHING, ways) })
}

fn all(seen: u64, wanted: u64) -> Outcome<()> {
    if seen == wanted { Ok(()) } else { Err(format!("{seen} of {wanted} events").into()) }
}

/// One event somewhere. What has to be read for it is the batch that holds it.
pub(crate) fn one_event(_: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let (events, bytes) = (corpus.events, corpus.batch_bytes());
    let bare = bare_batches(corpus, 1)?;
    let (journal, mut random) = (corpus.journal().clone(), fastrand::Rng::with_seed(11));
    let read = move || {
        let position = Position::new(random.u64(..events));
        let meter = Meter::start();
        let event = journal.read_all(position)?.next().ok_or("no such event")??;
        let took = meter.stop();
        if std::hint::black_box(event).position() == position {
            Ok(took)
        } else {
            Err("another event".into())
        }
    };
    let ways = vec![
        Way { name: "file: read a batch + CRC-32", events: 1, bytes, operation: Box::new(bare) },
        Way {
            name: "read_all from a position, one event",
            events: 1,
            bytes,
            operation: Box::new(read),
        },
    ];
    Ok(Group::new("one event by its position", NOTHING, ways))
}

/// One stream of many. What has to be read for it is the batches that hold it.
pub(crate) fn one_stream(_: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let events = corpus.events / STREAMS;
    let bytes = corpus.bytes / STREAMS;
    let bare = bare_batches(corpus, usize::try_from(bytes / corpus.batch_bytes())?)?;
    let (journal, mut random) = (corpus.journal().clone(), fastrand::Rng::with_seed(13));
    let read = move || {
        let stream = StreamId::new(stream_name(random.u64(..STREAMS)))?;
        let meter = Meter::start();
        let mut seen = 0;
        for event in journal.read_stream(&stream, Revision::FIRST)? {
            std::hint::black_box(event?);
            seen += 1;
        }
        let took = meter.stop();
        all(seen, events)?;
        Ok(took)
    };
    let ways = vec![
        Way { name: "file: read its batches + CRC-32", events, bytes, operation: Box::new(bare) },
        Way { name: "read_stream: owned events", events, bytes, operation: Box::new(read) },
    ];
    Ok(Group::new("one stream of many", NOTHING, ways))
}

/// Reads as many bytes as so many batches have, each somewhere in the last segment.
fn bare_batches(corpus: &Corpus, count: usize) -> Outcome<impl FnMut() -> Outcome<Took> + use<>> {
    let (path, len) = corpus.files.last().ok_or("a journal without segments")?;
    let (file, len) = (File::open(path)?, *len);
    let mut buffer = vec![0; usize::try_from(corpus.batch_bytes())?];
    let room = len.saturating_sub(buffer.len() as u64).max(1);
    let mut random = fastrand::Rng::with_seed(17);
    Ok(move || {
        let places: Vec<_> = (0..count).map(|_| random.u64(..room)).collect();
        let meter = Meter::start();
        for at in &places {
            file.read_exact_at(&mut buffer, *at)?;
            std::hint::black_box(crc32fast::hash(&buffer));
        }
        Ok(meter.stop())
    })
}
