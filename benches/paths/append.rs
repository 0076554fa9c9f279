//! Appends. What is counted begins with a payload's bytes: making and encoding the events is in it.

use std::collections::VecDeque;
use std::sync::Barrier;

use headwater::{Append, Durability, Store, Ticket};

use crate::baseline::Device;
use crate::corpus::{Corpus, PAYLOAD_BYTES, Plain};
use crate::measure::Measured;
use crate::meter::{Meter, Took};
use crate::shared::held::{self, Held};
use crate::shared::spread::Spread;
use crate::{Group, Outcome, Scratch, Way};

const DURABLE: &str = "fdatasync before every answer";
const EVENTS_PER_BATCH: usize = 1000;

/// One, 16, 64 and 256 threads, each waiting for its append. What the device gives at best is one write and
/// one sync, for one event or for 64.
pub(crate) fn by_threads(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("durable appends")?;
    let bytes = batch_bytes(&Store::create(folder.join("probe"))?, 1)?;
    let device = |name| Device::create(&folder.join(name), scratch.scale.file_bytes);
    let mut ways = vec![
        write_and_sync("device: write + fdatasync", device("device-1")?, 1, bytes)?,
        one_append("append, 1 thread", Store::create(folder.join("1"))?, 1, bytes)?,
    ];
    for (name, threads) in
        [("append, 16 threads", 16), ("append, 64 threads", 64), ("append, 256 threads", 256)]
    {
        let threads = threads.min(scratch.scale.threads_max);
        let store = Store::create(folder.join(name))?;
        let streams = (0..threads).map(|number| Plain::new(&format!("bench-{number}")));
        let streams = streams.collect::<Outcome<Vec<_>>>()?;
        let each = scratch.scale.appends_per_thread;
        let events = (threads * each) as u64;
        let operation = Box::new(move || append_together(&store, &streams, each));
        ways.push(Way { name, events, bytes: events * bytes, operation });
    }
    ways.push(write_and_sync(
        "device: write 64 + fdatasync",
        device("device-64")?,
        64,
        64 * bytes,
    )?);
    Ok(Group { held: Box::new(writers_held), ..Group::new("durable appends", DURABLE, ways) })
}

fn writers_held(measured: &[Measured]) -> Vec<Option<Held>> {
    const SHORT_S: f64 = 100e-6;
    let [device, one, sixteen, many, ..] = measured else { return Vec::new() };
    let sync = device.seconds();
    let is_short = sync.is_some_and(|it| it.median < SHORT_S);
    let void = is_short.then(|| "a bare write + fdatasync takes less than 100 µs here".to_owned());
    let note = sync.map_or_else(String::new, |it| {
        format!("a bare write + fdatasync took {:.0} µs", it.median * 1e6)
    });
    let own = |id, measured: &Measured| {
        let held = Held::new(id, measured.times_throughput(one), note.clone())?;
        Some(Held { void: void.clone(), ..held })
    };
    vec![
        Held::new(held::ONE_WRITER, device.times_faster(one), note.clone()),
        Held::new(
            held::DEVICE_WRITES,
            one.device_writes(),
            "counted by the kernel for the whole device, with whatever others wrote",
        ),
        own(held::OWN_16, sixteen),
        own(held::OWN_64, many),
    ]
}

pub(crate) fn batches(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    /// Batches of one operation.
    const SUBMITTED: usize = 64;
    let folder = scratch.folder("batches")?;
    let bytes = batch_bytes(&Store::create(folder.join("probe"))?, EVENTS_PER_BATCH)?;
    let device = Device::create(&folder.join("device"), scratch.scale.file_bytes)?;
    let (store, count) = (Store::create(folder.join("store"))?, EVENTS_PER_BATCH);
    let ways = vec![
        write_and_sync("device: write + fdatasync", device, count as u64, bytes)?,
        one_append("append, 1000 events", store, count, bytes)?,
        Way {
            name: "submit, 1000 events, 16 under way",
            events: (SUBMITTED * count) as u64,
            bytes: SUBMITTED as u64 * bytes,
            operation: submit(Store::create(folder.join("submitted"))?, count, SUBMITTED, 16)?,
        },
    ];
    Ok(Group::new("durable appends, batches of 1000", DURABLE, ways))
}

/// One thread that has many appends under way.
pub(crate) fn tickets(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    const UNDER_WAY: usize = 4096;
    let folder = scratch.folder("tickets")?;
    let store = Store::create(folder.join("store"))?;
    let bytes = batch_bytes(&store, 1)?;
    let under_way = UNDER_WAY.min(scratch.scale.appends_of_tickets / 2);
    let device = Device::create(&folder.join("device"), scratch.scale.file_bytes)?;
    let (many, count) = (under_way as u64, scratch.scale.appends_of_tickets);
    let events = count as u64;
    let ways = vec![
        write_and_sync("device: write 4096 + fdatasync", device, many, many * bytes)?,
        Way {
            name: "submit, 1 thread, 4096 under way",
            events,
            bytes: events * bytes,
            operation: submit(store, 1, count, under_way)?,
        },
    ];
    Ok(Group::new("tickets", DURABLE, ways))
}

/// So many appends by one thread, the answer to each taken when `under_way` others have followed it.
fn submit(
    store: Store,
    events: usize,
    appends: usize,
    under_way: usize,
) -> Outcome<Box<dyn FnMut() -> Outcome<Took>>> {
    let plain = Plain::new("bench")?;
    Ok(Box::new(move || {
        let mut tickets = VecDeque::<Ticket>::with_capacity(under_way);
        let meter = Meter::start();
        for _ in 0..appends {
            if tickets.len() == under_way {
                tickets.pop_front().map_or(Ok(None), |ticket| ticket.wait().map(Some))?;
            }
            tickets.push_back(store.submit(&plain.append(events))?);
        }
        for ticket in tickets {
            ticket.wait()?;
        }
        Ok(meter.stop())
    }))
}

/// Batches that are answered before they are durable. The bound on what may be unsynced is far smaller than
/// what an operation appends, and it ends with a flush: the journal has to keep up.
pub(crate) fn buffered(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    const SMALL: usize = 64;
    const LARGE: usize = 128;
    const DEVICE_BYTES: u64 = 1 << 20;
    let folder = scratch.folder("buffered")?;
    let device = Device::create(&folder.join("device"), scratch.scale.file_bytes)?;
    let (small, large) = (Store::create(folder.join("64"))?, Store::create(folder.join("128"))?);
    let (small_bytes, large_bytes) = (batch_bytes(&small, SMALL)?, batch_bytes(&large, LARGE)?);
    let batches = scratch.scale.buffered_batches;
    let in_device = DEVICE_BYTES * SMALL as u64 / small_bytes;
    let way = |name, store, size: usize, bytes: u64| -> Outcome<Way> {
        let (events, bytes) = ((batches * size) as u64, batches as u64 * bytes);
        Ok(Way { name, events, bytes, operation: append_buffered(store, size, batches)? })
    };
    let ways = vec![
        write_and_sync("device: write 1 MiB + fdatasync", device, in_device, DEVICE_BYTES)?,
        way("buffered, batches of 64", small, SMALL, small_bytes)?,
        way("buffered, batches of 128", large, LARGE, large_bytes)?,
    ];
    let durable = "4 MiB unsynced at most, all synced at the end of an operation";
    let held = move |measured: &[Measured]| buffered_held(measured, [SMALL, LARGE]);
    Ok(Group { held: Box::new(held), ..Group::new("buffered appends", durable, ways) })
}

fn append_buffered(
    store: Store,
    size: usize,
    batches: usize,
) -> Outcome<Box<dyn FnMut() -> Outcome<Took>>> {
    let plain = Plain::new("bench")?;
    Ok(Box::new(move || {
        let meter = Meter::start();
        for _ in 0..batches {
            store.append(&plain.append(size).durability(Durability::Buffered))?;
        }
        store.flush()?;
        Ok(meter.stop())
    }))
}

fn buffered_held(measured: &[Measured], sizes: [usize; 2]) -> Vec<Option<Held>> {
    let millions = |it: Spread| it.map(|each| each / 1e6);
    let [device, small, large] = measured else { return Vec::new() };
    let on_device = device.throughput().map(millions).map_or(0.0, |it| it.median);
    let by_clock = || {
        let held = Held::new(
            held::BUFFERED,
            small.throughput().map(millions),
            format!(
                "writing 1 MiB and syncing it, over and over, the bare device takes the bytes of {on_device:.2} M events/s"
            ),
        )?;
        let void = (on_device < held::BUFFERED_M)
            .then(|| "the bare device is too slow for it; see the next line".to_owned());
        Some(Held { void, ..held })
    };
    let per_processor = small.cpu_per_event().map(|it| it.map(|cpu| 1e-6 / cpu));
    let per_batch = |measured: &Measured, size: usize| {
        measured.allocations_per_event().map_or(f64::NAN, |it| it.median * size as f64)
    };
    let of_small = per_batch(small, sizes[0]);
    let more = (per_batch(large, sizes[1]) - of_small) / (sizes[1] - sizes[0]) as f64;
    vec![
        by_clock(),
        Held::new(
            held::BUFFERED_CPU,
            per_processor,
            "user and system time of all threads together, the writes and syncs included",
        ),
        Held::new(
            held::ALLOCATIONS,
            Spread::of([more.max(0.0)]),
            format!(
                "a batch of 64 makes {of_small:.1}, whatever its size, from the payload's bytes on"
            ),
        ),
    ]
}

fn append_together(store: &Store, streams: &[Plain], count: usize) -> Outcome<Took> {
    let start = Barrier::new(streams.len() + 1);
    std::thread::scope(|scope| {
        let mut threads = Vec::with_capacity(streams.len());
        for stream in streams {
            let start = &start;
            threads.push(scope.spawn(move || -> Outcome<()> {
                start.wait();
                for _ in 0..count {
                    store.append(&stream.append(1))?;
                }
                Ok(())
            }));
        }
        start.wait();
        let meter = Meter::start();
        for thread in threads {
            thread.join().map_err(|_| "an appending thread panicked")??;
        }
        Ok(meter.stop())
    })
}

/// What an append of so many events comes to in the journal, in bytes.
pub(crate) fn batch_bytes(store: &Store, events: usize) -> Outcome<u64> {
    append_bytes(store, &Plain::new("bench-1")?.append(events))
}

/// What an append comes to in the journal, in bytes.
pub(crate) fn append_bytes(store: &Store, append: &Append) -> Outcome<u64> {
    let before = store.journal().end().offset;
    store.append(append)?;
    Ok(store.journal().end().offset - before)
}

fn write_and_sync(name: &'static str, mut device: Device, events: u64, bytes: u64) -> Outcome<Way> {
    let buffer = vec![0xA5; usize::try_from(bytes)?];
    let operation = Box::new(move || {
        let meter = Meter::start();
        device.write_synced(&buffer)?;
        Ok(meter.stop())
    });
    Ok(Way { name, events, bytes, operation })
}

/// An append by this thread.
pub(crate) fn one_append(
    name: &'static str,
    store: Store,
    events: usize,
    bytes: u64,
) -> Outcome<Way> {
    let plain = Plain::new("bench-1")?;
    let operation = Box::new(move || {
        let meter = Meter::start();
        store.append(&plain.append(events))?;
        Ok(meter.stop())
    });
    Ok(Way { name, events: events as u64, bytes, operation })
}

const _: () = assert!(PAYLOAD_BYTES == 256, "the names of the targets say so");
