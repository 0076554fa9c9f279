//! Reading a whole journal.

use std::time::Instant;

use headwater::Position;

use crate::baseline;
use crate::corpus::Corpus;
use crate::{Group, Outcome, Scratch, Way};

pub(crate) fn replay(_: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let (events, bytes) = (corpus.events, corpus.bytes);
    let files = corpus.files.clone();
    let bare = move || baseline::read_and_check(&files);
    let journal = corpus.journal().clone();
    let cursor = move || {
        let began = Instant::now();
        let mut cursor = journal.cursor(Position::START)?;
        let mut seen = 0;
        while let Some(batch) = cursor.next_batch()? {
            seen += u64::from(batch.batch.header.count);
        }
        all(seen, events)?;
        Ok(began.elapsed())
    };
    let journal = corpus.journal().clone();
    let read_all = move || {
        let began = Instant::now();
        let mut seen = 0;
        for event in journal.read_all(Position::START)? {
            std::hint::black_box(event?);
            seen += 1;
        }
        all(seen, events)?;
        Ok(began.elapsed())
    };
    let ways = vec![
        Way { name: "files: read + CRC-32", events, bytes, operation: Box::new(bare) },
        Way { name: "cursor: verified batches", events, bytes, operation: Box::new(cursor) },
        Way { name: "read_all: owned events", events, bytes, operation: Box::new(read_all) },
    ];
    Ok(Group { name: "replay", durable: "nothing is written", ways })
}

fn all(seen: u64, wanted: u64) -> Outcome<()> {
    if seen == wanted { Ok(()) } else { Err(format!("{seen} of {wanted} events").into()) }
}
