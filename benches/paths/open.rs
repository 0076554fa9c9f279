//! Opening a journal of very many segments, after a clean stop.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use headwater::{Durability, JournalOptions, Store};

use crate::corpus::{Corpus, Plain};
use crate::measure::Measured;
use crate::meter::Meter;
use crate::shared::held::{self, Held};
use crate::{Group, Outcome, Scratch, Way};

const PAGE_BYTES: usize = 4096;
/// The smallest segments there are: a page, and one to three batches of at most 4 KiB.
const SEGMENT_BYTES: u64 = 16 << 10;
const EVENTS_PER_BATCH: usize = 8;

pub(crate) fn many_segments(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("open")?;
    let (dir, options) = (folder.join("store"), options());
    let (sealed, events) = fill(&dir, &options, scratch.scale.sealed_segments)?;
    let files = (0..sealed)
        .map(|number| dir.join("journal").join(format!("{number:016x}.seg")))
        .collect::<Vec<PathBuf>>();
    let bare = move || {
        let mut page = [0; PAGE_BYTES];
        let meter = Meter::start();
        for file in &files {
            File::open(file)?.read_exact_at(&mut page, 0)?;
            std::hint::black_box(crc32fast::hash(&page));
        }
        Ok(meter.stop())
    };
    let open = move || {
        let builder = Store::builder(&dir).journal_options(options.clone());
        let meter = Meter::start();
        let store = builder.open()?;
        let took = meter.stop();
        store.close()?;
        Ok(took)
    };
    // What is opened is counted: a segment is an "event" here.
    let bytes = sealed * PAGE_BYTES as u64;
    let ways = vec![
        Way {
            name: "files: open, read a page, CRC-32",
            events: sealed,
            bytes,
            operation: Box::new(bare),
        },
        Way { name: "open, after a clean stop", events: sealed, bytes, operation: Box::new(open) },
    ];
    let held = move |measured: &[Measured]| {
        let per_segment = measured.last().and_then(Measured::seconds);
        let per_segment = per_segment.map(|it| it.map(|seconds| seconds * 1e6 / sealed as f64));
        let note = format!(
            "the whole opening of {sealed} sealed segments with {events} events, over their number; from the page cache"
        );
        vec![Held::new(held::OPEN, per_segment, note)]
    };
    let group =
        Group::new("opening many segments (each counts as an event)", "nothing is written", ways);
    Ok(Group { held: Box::new(held), ..group })
}

fn options() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: SEGMENT_BYTES,
        segment_bytes_max: SEGMENT_BYTES,
        batch_bytes_max: PAGE_BYTES as u32,
        ..JournalOptions::default()
    }
}

/// Answers how many sealed segments and events there are.
fn fill(dir: &std::path::Path, options: &JournalOptions, wanted: usize) -> Outcome<(u64, u64)> {
    let builder = Store::builder(dir).create_if_missing().journal_options(options.clone());
    let (store, plain) = (builder.open()?, Plain::new("bench")?);
    let mut fullest = 0;
    while fullest <= wanted {
        for _ in 0..64 {
            store.append(&plain.append(EVENTS_PER_BATCH).durability(Durability::Buffered))?;
        }
        store.flush()?;
        fullest = store.journal().segments().len();
    }
    let sealed = store.journal().segments().iter().filter(|segment| segment.sealed).count();
    let events = store.journal().end().position.get();
    store.close()?;
    Ok((sealed as u64, events))
}
