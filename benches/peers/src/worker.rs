//! One measurement of one engine, in a process of its own: nothing that an engine leaves behind (threads, files
//! that are open, memory) is there when the next one is measured, and it can be killed or traced.

use std::hint::black_box;
use std::io::Write as _;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, Payloads, Pool};
use crate::engine::{Engine, Operation, Peer, Shape, Writer};
use crate::measure::{Meter, Usage};
use crate::{Error, Outcome};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Task {
    /// Threads append to streams of their own, for some time.
    Append { load: Load, warm: Duration, measure: Duration },
    /// Each thread appends so many times.
    Commit { load: Load, commits: u64 },
    /// Writes the corpus and stops cleanly, or waits for being killed.
    Fill { corpus: Corpus, shape: Shape, then: Then },
    /// Opens the corpus and reads for some time, but at least once.
    Read { corpus: Corpus, shape: Shape, operation: Operation, measure: Duration },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Then {
    Close,
    /// Says so when the corpus is written, and appends on.
    AppendOn,
}

/// Who appends what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) writers: u32,
    /// Events of one append.
    pub(crate) batch: usize,
    pub(crate) payload_bytes: usize,
}

/// What came out.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Appends or reads.
    pub(crate) operations: u64,
    pub(crate) events: u64,
    pub(crate) seconds: f64,
    /// What opening took, before.
    pub(crate) open_seconds: f64,
    /// Of one operation, in microseconds.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) allocations: u64,
    /// Of the device, for whomever it was.
    pub(crate) device_writes: Option<u64>,
    pub(crate) device_flushes: Option<u64>,
}

/// What the worker says on its standard output begins with this; engines print things, too.
pub(crate) const SAYS: &str = "@@ ";
pub(crate) const READY: &str = "ready";

/// Does the task and tells the result.
pub(crate) fn run(peer: &Peer, dir: &Path, task: Task) -> Outcome<()> {
    let sample = match task {
        Task::Append { load, warm, measure } => append(peer, dir, load, warm, measure)?,
        Task::Commit { load, commits } => commit(peer, dir, load, commits)?,
        Task::Fill { corpus, shape, then } => fill(peer, dir, &corpus, shape, then)?,
        Task::Read { corpus, shape, operation, measure } => {
            read(peer, dir, &corpus, shape, operation, measure)?
        }
    };
    say(&serde_json::to_string(&sample)?)
}

fn say(what: &str) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{SAYS}{what}")?;
    Ok(out.flush()?)
}

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const STOPPED: u8 = 2;

/// What the threads and the one that watches them share.
#[derive(Default)]
struct Race {
    phase: AtomicU8,
    operations: AtomicU64,
    events: AtomicU64,
}

fn append(
    peer: &Peer,
    dir: &Path,
    load: Load,
    warm: Duration,
    measure: Duration,
) -> Outcome<Sample> {
    let (engine, open) = open(peer, dir, shape(load))?;
    let meter = Meter::new(dir)?;
    let pool = Pool::new(load.payload_bytes);
    let race = Race::default();
    let start = Barrier::new(load.writers as usize + 1);
    let (mut sample, latencies) = thread::scope(|scope| {
        let mut threads = Vec::new();
        for stream in 0..load.writers {
            let (race, start, writer) = (&race, &start, engine.writer()?);
            let payloads = pool.payloads(stream.into());
            threads.push(scope.spawn(move || {
                start.wait();
                race.append(stream, writer, payloads, load.batch)
            }));
        }
        start.wait();
        thread::sleep(warm);
        let watch = Watch::start(&meter, &race);
        thread::sleep(measure);
        let sample = watch.stop();
        let mut latencies = latencies()?;
        for thread in threads {
            latencies.add(thread.join().map_err(|_| "a writer panicked")??)?;
        }
        Ok::<_, Error>((sample, latencies))
    })?;
    engine.close()?;
    sample.open_seconds = open.as_secs_f64();
    set_latencies(&mut sample, &latencies);
    Ok(sample)
}

fn shape(load: Load) -> Shape {
    Shape { payload_bytes: load.payload_bytes, streams: false }
}

impl Race {
    /// Appends until it is over.
    fn append(
        &self,
        stream: u32,
        mut writer: Box<dyn Writer + '_>,
        mut payloads: Payloads<'_>,
        size: usize,
    ) -> Outcome<Histogram<u64>> {
        let mut batch = Vec::with_capacity(size);
        let mut latencies = latencies()?;
        loop {
            let phase = self.phase.load(Ordering::Relaxed);
            if phase == STOPPED {
                return Ok(latencies);
            }
            payloads.next(&mut batch, size);
            let began = Instant::now();
            let appended = writer.append(stream, &batch);
            if appended.is_err() {
                self.phase.store(STOPPED, Ordering::Relaxed);
            }
            appended?;
            self.operations.fetch_add(1, Ordering::Relaxed);
            self.events.fetch_add(size as u64, Ordering::Relaxed);
            if phase == MEASURING {
                latencies.saturating_record(nanoseconds(began.elapsed()));
            }
        }
    }
}

/// Between start and stop.
struct Watch<'a> {
    meter: &'a Meter,
    race: &'a Race,
    began: Instant,
    usage: Usage,
    operations: u64,
    events: u64,
}

impl<'a> Watch<'a> {
    fn start(meter: &'a Meter, race: &'a Race) -> Self {
        // Unless it was stopped by a failure.
        let relaxed = Ordering::Relaxed;
        race.phase.compare_exchange(WARMING, MEASURING, relaxed, relaxed).unwrap_or_default();
        let usage = meter.read();
        Self {
            meter,
            race,
            began: Instant::now(),
            usage,
            operations: race.operations.load(Ordering::Relaxed),
            events: race.events.load(Ordering::Relaxed),
        }
    }

    /// Not before something was done, however long that takes.
    fn stop(self) -> Sample {
        while self.race.operations.load(Ordering::Relaxed) == self.operations
            && self.race.phase.load(Ordering::Relaxed) != STOPPED
        {
            thread::sleep(Duration::from_millis(1));
        }
        let mut sample = Sample {
            operations: self.race.operations.load(Ordering::Relaxed) - self.operations,
            events: self.race.events.load(Ordering::Relaxed) - self.events,
            seconds: self.began.elapsed().as_secs_f64(),
            ..Sample::default()
        };
        set_usage(&mut sample, self.usage, self.meter.read());
        self.race.phase.store(STOPPED, Ordering::Relaxed);
        sample
    }
}

fn set_usage(sample: &mut Sample, before: Usage, after: Usage) {
    sample.cpu_seconds = after.cpu_seconds - before.cpu_seconds;
    sample.allocations = after.allocations - before.allocations;
    let device = before.device.zip(after.device);
    sample.device_writes = device.map(|(before, after)| after.writes - before.writes);
    sample.device_flushes = device.map(|(before, after)| after.flushes - before.flushes);
}

fn latencies() -> Outcome<Histogram<u64>> {
    const MAX_NS: u64 = 60_000_000_000;
    Ok(Histogram::new_with_bounds(100, MAX_NS, 3)?)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn set_latencies(sample: &mut Sample, latencies: &Histogram<u64>) {
    let microseconds = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    sample.p50_us = microseconds(0.5);
    sample.p99_us = microseconds(0.99);
    sample.p999_us = microseconds(0.999);
}

fn open(peer: &Peer, dir: &Path, shape: Shape) -> Outcome<(Box<dyn Engine>, Duration)> {
    let began = Instant::now();
    let engine = (peer.open)(dir, shape)?;
    Ok((engine, began.elapsed()))
}

fn commit(peer: &Peer, dir: &Path, load: Load, commits: u64) -> Outcome<Sample> {
    let (engine, _) = open(peer, dir, shape(load))?;
    let pool = Pool::new(load.payload_bytes);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for stream in 0..load.writers {
            let (mut writer, mut batch) = (engine.writer()?, Vec::new());
            let mut payloads = pool.payloads(stream.into());
            threads.push(scope.spawn(move || -> Outcome<()> {
                for _ in 0..commits {
                    payloads.next(&mut batch, load.batch);
                    writer.append(stream, &batch)?;
                }
                Ok(())
            }));
        }
        for thread in threads {
            thread.join().map_err(|_| "a writer panicked")??;
        }
        Ok::<_, Error>(())
    })?;
    engine.close()?;
    let operations = commits * u64::from(load.writers);
    Ok(Sample { operations, events: operations * load.batch as u64, ..Sample::default() })
}

fn fill(peer: &Peer, dir: &Path, corpus: &Corpus, shape: Shape, then: Then) -> Outcome<Sample> {
    let (engine, _) = open(peer, dir, shape)?;
    let mut writer = engine.writer()?;
    let pool = Pool::new(corpus.payload_bytes);
    let mut payloads = pool.payloads(0);
    let mut batch = Vec::new();
    let mut append = |stream| {
        payloads.next(&mut batch, corpus.batch);
        writer.append(stream, &batch)
    };
    let began = Instant::now();
    corpus.batches().try_for_each(&mut append)?;
    let seconds = began.elapsed().as_secs_f64();
    if then == Then::AppendOn {
        say(READY)?;
        corpus.batches().cycle().try_for_each(&mut append)?;
    }
    drop(writer);
    engine.close()?;
    Ok(Sample { events: corpus.events, seconds, ..Sample::default() })
}

fn read(
    peer: &Peer,
    dir: &Path,
    corpus: &Corpus,
    shape: Shape,
    operation: Operation,
    measure: Duration,
) -> Outcome<Sample> {
    let (mut engine, open) = open(peer, dir, shape)?;
    let meter = Meter::new(dir)?;
    let mut random = fastrand::Rng::with_seed(11);
    let mut latencies = latencies()?;
    let mut sample = Sample { open_seconds: open.as_secs_f64(), ..Sample::default() };
    let before = meter.read();
    let began = Instant::now();
    loop {
        let (once, mut seen, mut bytes) = (Instant::now(), 0, 0);
        let mut each = |payload: &[u8]| {
            seen += 1;
            bytes += black_box(payload).len();
        };
        let expected = match operation {
            Operation::Replay => {
                engine.replay(&mut each)?;
                corpus.events
            }
            Operation::Random => {
                engine.read(&corpus.place(random.u64(..corpus.events)), &mut each)?;
                1
            }
            Operation::Stream => {
                engine.read_stream(random.u32(..corpus.streams), &mut each)?;
                corpus.events_per_stream()
            }
            Operation::Open => break,
        };
        latencies.saturating_record(nanoseconds(once.elapsed()));
        // After a kill there may be more.
        if seen < expected || bytes as u64 != seen * corpus.payload_bytes as u64 {
            return Err(format!("read {seen} events of {bytes} B, expected {expected}").into());
        }
        sample.operations += 1;
        sample.events += seen;
        if began.elapsed() >= measure {
            break;
        }
    }
    sample.seconds = began.elapsed().as_secs_f64();
    set_usage(&mut sample, before, meter.read());
    set_latencies(&mut sample, &latencies);
    engine.close()?;
    Ok(sample)
}
