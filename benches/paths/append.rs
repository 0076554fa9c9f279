//! Durable appends. Making the events isn't counted, the append is, whole.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use headwater::{Append, Store, StreamId};

use crate::baseline::Device;
use crate::corpus::{Corpus, plain};
use crate::{Group, Outcome, Scratch, Way};

const DURABLE: &str = "fdatasync before every answer";
const EVENTS_PER_BATCH: usize = 1000;

pub(crate) fn one_thread(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let names = ["device: write + fdatasync", "append, 1 event"];
    lone_writer(scratch, "append, 1 thread", names, 1)
}

pub(crate) fn batches(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let names = ["device: write + fdatasync", "append, 1000 events"];
    lone_writer(scratch, "append, batches of 1000", names, EVENTS_PER_BATCH)
}

fn lone_writer(
    scratch: &Scratch,
    name: &'static str,
    [device_name, append_name]: [&'static str; 2],
    events: usize,
) -> Outcome<Group> {
    let folder = scratch.folder(name)?;
    let store = Store::create(folder.join("store"))?;
    let stream = StreamId::new("bench-1")?;
    let bytes = batch_bytes(&store, &plain(&stream, events)?)?;
    let device = Device::create(&folder.join("device"), scratch.scale.file_bytes)?;
    let append = move || {
        let append = plain(&stream, events)?;
        let began = Instant::now();
        store.append(&append)?;
        Ok(began.elapsed())
    };
    let events = events as u64;
    let ways = vec![
        write_and_sync(device_name, device, events, bytes)?,
        Way { name: append_name, events, bytes, operation: Box::new(append) },
    ];
    Ok(Group { name, durable: DURABLE, ways })
}

/// As many appends in flight as there are threads. What the device gives at best is all of them under one
/// sync.
pub(crate) fn many_threads(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("append, 64 threads")?;
    let scale = scratch.scale;
    let store = Store::create(folder.join("store"))?;
    let streams = (0..scale.threads).map(|number| StreamId::new(format!("bench-{number}")));
    let streams = streams.collect::<Result<Vec<_>, _>>()?;
    let first = streams.first().ok_or("no threads")?;
    let bytes = batch_bytes(&store, &plain(first, 1)?)?;
    let threads = scale.threads as u64;
    let device = Device::create(&folder.join("device"), scale.file_bytes)?;
    let append = move || append_together(&store, &streams, scale.appends_per_thread);
    let events = threads * scale.appends_per_thread as u64;
    let ways = vec![
        write_and_sync("device: write 64 + fdatasync", device, threads, threads * bytes)?,
        Way {
            name: "append, 64 threads, 1 event each",
            events,
            bytes: events * bytes,
            operation: Box::new(append),
        },
    ];
    Ok(Group { name: "append, 64 threads", durable: DURABLE, ways })
}

fn append_together(store: &Store, streams: &[StreamId], count: usize) -> Outcome<Duration> {
    let start = Barrier::new(streams.len() + 1);
    std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(streams.len());
        for stream in streams {
            let appends = (0..count).map(|_| plain(stream, 1)).collect::<Outcome<Vec<_>>>()?;
            let start = &start;
            threads.push(scope.spawn(move || -> Outcome<()> {
                start.wait();
                for append in &appends {
                    store.append(append)?;
                }
                Ok(())
            }));
        }
        start.wait();
        let began = Instant::now();
        for thread in threads {
            thread.join().map_err(|_| "an appending thread panicked")??;
        }
        Ok(began.elapsed())
    })
}

/// What an append comes to in the journal, in bytes.
pub(crate) fn batch_bytes(store: &Store, append: &Append) -> Outcome<u64> {
    let before = store.journal().end().offset;
    store.append(append)?;
    Ok(store.journal().end().offset - before)
}

fn write_and_sync(name: &'static str, mut device: Device, events: u64, bytes: u64) -> Outcome<Way> {
    let buffer = vec![0xA5; usize::try_from(bytes)?];
    let operation = Box::new(move || device.time_write(&buffer));
    Ok(Way { name, events, bytes, operation })
}
