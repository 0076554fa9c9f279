use std::collections::HashMap;
use std::path::Path;

// Any message that holds an index and bytes will do; this one comes with the library.
use protobuf::descriptor::UninterpretedOption as Entry;
use raft_engine::{Config, Engine as Log, LogBatch, MessageExt, ReadableSize};

use crate::Outcome;
use crate::engine::{Each, Engine, Kind, Peer, Place, Shape, Writer, boxed};

pub(super) const PEER: Peer = Peer {
    name: "raft-engine",
    package: Some("raft-engine"),
    kind: Kind::Peer,
    durable: "yes: fdatasync, shared by concurrent appends",
    used: "for the appends 96 MiB of zeros prepared before the measurement (prefill_for_recycle, files of 32 MiB), else default options; LZ4 from 8 KiB on, as is its default; each stream is a raft group; there is no order among groups, so a replay reads one after the other; all indexes are kept in memory",
    without: &[],
    open,
};

struct Groups(Log);

struct Entries;

impl MessageExt for Entries {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.get_positive_int_value()
    }
}

/// How much of a group is fetched at a time.
const FETCH: u64 = 1024;

fn open(dir: &Path, shape: Shape) -> Outcome<Box<dyn Engine>> {
    let dir = dir.to_str().ok_or("a path that isn't UTF-8")?.to_owned();
    let mut config = Config { dir, ..Config::default() };
    if !shape.streams {
        // Half as many files again as the limit says are filled with zeros.
        config.target_file_size = ReadableSize::mb(32);
        config.prefill_for_recycle = true;
        config.prefill_limit = Some(ReadableSize::mb(64));
    }
    Ok(Box::new(Groups(Log::open(config).map_err(boxed)?)))
}

impl Groups {
    fn read_group(&self, group: u64, each: Each<'_>) -> Outcome<()> {
        let (Some(first), Some(last)) = (self.0.first_index(group), self.0.last_index(group))
        else {
            return Ok(());
        };
        let mut entries = Vec::new();
        for begin in (first..=last).step_by(usize::try_from(FETCH)?) {
            let end = (begin + FETCH).min(last + 1);
            entries.clear();
            self.0
                .fetch_entries_to::<Entries>(group, begin, end, None, &mut entries)
                .map_err(boxed)?;
            entries.iter().for_each(|entry| each(entry.get_string_value()));
        }
        Ok(())
    }
}

/// Groups count from 1.
fn group(stream: u32) -> u64 {
    u64::from(stream) + 1
}

impl Engine for Groups {
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>> {
        Ok(Box::new(Writes { log: &self.0, next: HashMap::new() }))
    }

    fn replay(&mut self, each: Each<'_>) -> Outcome<()> {
        let mut groups = self.0.raft_groups();
        groups.sort_unstable();
        groups.into_iter().try_for_each(|group| self.read_group(group, each))
    }

    fn read(&mut self, place: &Place, each: Each<'_>) -> Outcome<()> {
        let entry = self.0.get_entry::<Entries>(group(place.stream), place.revision + 1);
        let entry = entry.map_err(boxed)?.ok_or("no such entry")?;
        each(entry.get_string_value());
        Ok(())
    }

    fn read_stream(&mut self, stream: u32, each: Each<'_>) -> Outcome<()> {
        self.read_group(group(stream), each)
    }

    fn close(self: Box<Self>) -> Outcome<()> {
        Ok(())
    }
}

struct Writes<'a> {
    log: &'a Log,
    /// Index of each group's next entry.
    next: HashMap<u64, u64>,
}

impl Writer for Writes<'_> {
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()> {
        let group = group(stream);
        let log = self.log;
        let next =
            self.next.entry(group).or_insert_with(|| log.last_index(group).map_or(1, |it| it + 1));
        let entries = (*next..).zip(payloads).map(|(index, payload)| {
            let mut entry = Entry::new();
            entry.set_positive_int_value(index);
            entry.set_string_value(payload.to_vec());
            entry
        });
        let entries = entries.collect::<Vec<_>>();
        let mut batch = LogBatch::with_capacity(1);
        batch.add_entries::<Entries>(group, &entries).map_err(boxed)?;
        self.log.write(&mut batch, true).map_err(boxed)?;
        *next += entries.len() as u64;
        Ok(())
    }
}
