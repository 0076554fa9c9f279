//! All measurements, in rounds.
//!
//! ```text
//!   round 1: cell 1: peer A, peer B, peer C   cell 2: peer A, peer B, peer C   ...
//!   round 2: cell 1: peer B, peer C, peer A   cell 2: peer B, peer C, peer A   ...
//! ```
//! All peers see the same good and bad moments of the machine, and nobody is always the first one. A ratio is
//! computed within a round. What a measurement leaves on the disk is deleted, and the file system synced, before
//! the next one begins.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::child::{self, Worker};
use crate::engine::{Kind, Operation, Peer, Shape};
use crate::measure;
use crate::shared::spread::Spread;
use crate::trace::{self, AcrossRolls, Calls};
use crate::worker::{Load, Sample, Task, Then};
use crate::{Outcome, Settings};

/// One thing that is measured of everybody.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Measured {
    Append(Load),
    Replay,
    Random,
    Stream,
    OpenClean,
    OpenUnclean,
}

/// Appends that are measured: along the writers, along the batches, along the payloads.
const LOADS: [Load; 11] = [
    load(1, 1, 256),
    load(16, 1, 256),
    load(64, 1, 256),
    load(256, 1, 256),
    load(1, 100, 256),
    load(1, 1000, 256),
    load(16, 100, 256),
    load(1, 1, 64),
    load(64, 1, 64),
    load(1, 1, 4096),
    load(64, 1, 4096),
];

/// The shortest list that still runs everything.
const SMOKE_LOADS: [Load; 2] = [load(1, 1, 256), load(16, 100, 256)];

const fn load(writers: u32, batch: usize, payload_bytes: usize) -> Load {
    Load { writers, batch, payload_bytes }
}

/// What came out of all rounds.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) cells: Vec<Cell>,
    pub(crate) calls: Vec<Counted>,
    /// Of Headwater, if it could be traced.
    pub(crate) across_rolls: Option<AcrossRolls>,
    /// What the clean corpus takes on the disk, in bytes per event.
    pub(crate) disk: Vec<Disk>,
    pub(crate) seconds: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) measured: Measured,
    pub(crate) entries: Vec<Entry>,
}

/// Of one peer in one cell.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) peer: String,
    /// Why there is nothing, or no more.
    pub(crate) skipped: Option<String>,
    /// One for each round.
    pub(crate) samples: Vec<Sample>,
    /// Events per second, reads per second, or seconds to open.
    pub(crate) value: Option<Spread>,
    /// How many times better Headwater was in the same round: above 1 it wins.
    pub(crate) headwater: Option<Spread>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Counted {
    pub(crate) peer: String,
    pub(crate) calls: Option<Calls>,
    pub(crate) skipped: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) peer: String,
    pub(crate) bytes_per_event: f64,
}

impl Measured {
    /// Whether less is better.
    pub(crate) fn is_time(self) -> bool {
        matches!(self, Self::OpenClean | Self::OpenUnclean)
    }

    fn value(self, sample: &Sample) -> f64 {
        match self {
            Self::Append(_) | Self::Replay => sample.events as f64 / sample.seconds,
            Self::Random | Self::Stream => sample.operations as f64 / sample.seconds,
            Self::OpenClean | Self::OpenUnclean => sample.open_seconds,
        }
    }

    fn operation(self) -> Option<Operation> {
        match self {
            Self::Append(_) => None,
            Self::Replay => Some(Operation::Replay),
            Self::Random => Some(Operation::Random),
            Self::Stream => Some(Operation::Stream),
            Self::OpenClean | Self::OpenUnclean => Some(Operation::Open),
        }
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |number: usize, what: &str| match number {
            1 => format!("1 {what}"),
            many => format!("{many} {what}s"),
        };
        match self {
            Self::Append(Load { writers, batch, payload_bytes }) => {
                let writers = count(*writers as usize, "writer");
                write!(
                    f,
                    "appends by {writers}, {} of {payload_bytes} B each time",
                    count(*batch, "event")
                )
            }
            Self::Replay => f.write_str("replay"),
            Self::Random => f.write_str("one event by its position"),
            Self::Stream => f.write_str("one stream"),
            Self::OpenClean => f.write_str("opening after a clean stop"),
            Self::OpenUnclean => f.write_str("opening after a kill"),
        }
    }
}

/// The cells of a run, in their order.
fn plan(settings: &Settings) -> Vec<Measured> {
    use Measured::{Append, OpenClean, OpenUnclean, Random, Replay, Stream};
    let loads: &[Load] = if settings.smoke { &SMOKE_LOADS } else { &LOADS };
    let appends = loads.iter().copied().map(Append);
    appends.chain([Replay, Random, Stream, OpenClean, OpenUnclean]).collect()
}

pub(crate) fn run(peers: &[&'static Peer], dir: &Path, settings: &Settings) -> Outcome<Results> {
    let began = Instant::now();
    let runner = Runner { dir: dir.to_owned(), settings };
    eprintln!("writing the corpus for each of {} ...", peers.len());
    let disk = peers.iter().filter(|peer| peer.reads()).filter_map(|it| runner.fill(it)).collect();
    eprintln!("counting system calls ...");
    let calls = peers.iter().map(|peer| runner.count(peer)).collect();
    let across_rolls = runner.count_across_rolls(peers);
    let mut cells: Vec<_> = plan(settings).into_iter().map(|it| Cell::new(it, peers)).collect();
    for round in 0..settings.rounds {
        for cell in &mut cells {
            let since = began.elapsed().as_secs_f64();
            eprintln!(
                "{since:5.0} s  round {} of {}: {}",
                round + 1,
                settings.rounds,
                cell.measured
            );
            for turn in 0..peers.len() {
                let index = (turn + round) % peers.len();
                runner.measure(cell.measured, peers[index], &mut cell.entries[index]);
            }
        }
    }
    cells.iter_mut().for_each(Cell::evaluate);
    Ok(Results { cells, calls, across_rolls, disk, seconds: began.elapsed().as_secs_f64() })
}

impl Cell {
    fn new(measured: Measured, peers: &[&'static Peer]) -> Self {
        let entry = |peer: &&'static Peer| Entry {
            peer: peer.name.to_owned(),
            skipped: measured.operation().and_then(|it| peer.lacks(it)).map(str::to_owned),
            samples: Vec::new(),
            value: None,
            headwater: None,
        };
        Self { measured, entries: peers.iter().map(entry).collect() }
    }

    fn evaluate(&mut self) {
        let values = |entry: &Entry| -> Vec<f64> {
            entry.samples.iter().map(|sample| self.measured.value(sample)).collect()
        };
        let ours = self.entries.first().map(values).unwrap_or_default();
        let all: Vec<_> = self.entries.iter().map(values).collect();
        for (entry, values) in self.entries.iter_mut().zip(all) {
            let better =
                values.iter().zip(&ours).map(|(value, ours)| match self.measured.is_time() {
                    true => value / ours,
                    false => ours / value,
                });
            entry.headwater = Spread::of(better);
            entry.value = Spread::of(values);
        }
    }
}

/// Longer than this, and somebody who waits for the run wants to know why.
const SLOW: Duration = Duration::from_secs(3);

struct Runner<'a> {
    dir: PathBuf,
    settings: &'a Settings,
}

impl Runner<'_> {
    /// Where a peer's corpus lies.
    fn corpus_dir(&self, peer: &Peer) -> PathBuf {
        self.dir.join(format!("corpus-{}", peer.name))
    }

    fn shape(&self) -> Shape {
        Shape { payload_bytes: self.settings.corpus.payload_bytes, streams: true }
    }

    fn fill(&self, peer: &'static Peer) -> Option<Disk> {
        let dir = self.corpus_dir(peer);
        let corpus = self.settings.corpus;
        let task = Task::Fill { corpus, shape: self.shape(), then: Then::Close };
        let began = Instant::now();
        let filled = std::fs::create_dir(&dir)
            .map_err(Into::into)
            .and_then(|()| child::perform(peer, &dir, task))
            .and_then(|_| measure::disk_bytes(&dir));
        match filled {
            Ok(bytes) => {
                eprintln!(
                    "        {} took {:.1} s for it",
                    peer.name,
                    began.elapsed().as_secs_f64()
                );
                let bytes_per_event = bytes as f64 / corpus.events as f64;
                Some(Disk { peer: peer.name.to_owned(), bytes_per_event })
            }
            Err(error) => {
                eprintln!("{}: the corpus can't be written: {error}", peer.name);
                None
            }
        }
    }

    fn count(&self, peer: &'static Peer) -> Counted {
        if !trace::available() {
            let skipped = Some("strace is not installed".to_owned());
            return Counted { peer: peer.name.to_owned(), calls: None, skipped };
        }
        match trace::count(peer, &self.dir, self.settings.traced_commits) {
            Ok(calls) => {
                if !trace::is_durable(peer, &calls) {
                    eprintln!("{}: NOT ONE SYNC PER COMMIT: {calls:?}", peer.name);
                }
                Counted { peer: peer.name.to_owned(), calls: Some(calls), skipped: None }
            }
            Err(error) => {
                eprintln!("{}: system calls can't be counted: {error}", peer.name);
                Counted {
                    peer: peer.name.to_owned(),
                    calls: None,
                    skipped: Some(error.to_string()),
                }
            }
        }
    }

    fn count_across_rolls(&self, peers: &[&'static Peer]) -> Option<AcrossRolls> {
        let own = peers.iter().find(|peer| peer.kind == Kind::Headwater)?;
        if !trace::available() {
            return None;
        }
        trace::across_rolls(own, &self.dir, self.settings.traced_across_rolls)
            .inspect_err(|error| eprintln!("rolls can't be traced: {error}"))
            .ok()
    }

    /// One sample; after a failure the peer is left out of the cell.
    fn measure(&self, measured: Measured, peer: &Peer, entry: &mut Entry) {
        if entry.skipped.is_some() {
            return;
        }
        let began = Instant::now();
        match self.sample(measured, peer) {
            Ok(sample) => entry.samples.push(sample),
            Err(error) => {
                eprintln!("{}, {measured}: {error}", peer.name);
                entry.skipped = Some(error.to_string());
                entry.samples.clear(); // half of the rounds can't be compared
            }
        }
        let took = began.elapsed();
        if took > SLOW {
            eprintln!("        {} took {:.0} s for it", peer.name, took.as_secs_f64());
        }
    }

    fn sample(&self, measured: Measured, peer: &Peer) -> Outcome<Sample> {
        let Settings { corpus, warm, slice, .. } = *self.settings;
        let shape = self.shape();
        let sample = match measured {
            Measured::Append(load) => {
                let fresh = tempfile::tempdir_in(&self.dir)?;
                let load = if peer.kind == Kind::Baseline { together(load) } else { load };
                child::perform(peer, fresh.path(), Task::Append { load, warm, measure: slice })
            }
            Measured::OpenUnclean => {
                let fresh = tempfile::tempdir_in(&self.dir)?;
                let fill = Task::Fill { corpus, shape, then: Then::AppendOn };
                Worker::start(&[], peer, fresh.path(), fill)?.kill_when_ready()?;
                // Where it can be replayed, it is also seen that nothing acknowledged is missing.
                let operation = match peer.lacks(Operation::Replay) {
                    None => Operation::Replay,
                    Some(_) => Operation::Open,
                };
                let measure = Duration::ZERO;
                child::perform(peer, fresh.path(), Task::Read { corpus, shape, operation, measure })
            }
            Measured::Replay | Measured::Random | Measured::Stream | Measured::OpenClean => {
                let operation = measured.operation().unwrap_or(Operation::Open);
                let read = Task::Read { corpus, shape, operation, measure: slice };
                child::perform(peer, &self.corpus_dir(peer), read)
            }
        };
        settle(&self.dir)?;
        sample
    }
}

/// The bare device: one thread brings what all writers would.
fn together(load: Load) -> Load {
    Load { writers: 1, batch: load.batch * load.writers as usize, ..load }
}

/// Nobody pays for what another one has left to be written.
fn settle(dir: &Path) -> Outcome<()> {
    Ok(rustix::fs::syncfs(std::fs::File::open(dir)?)?)
}

/// How long a run takes about, in seconds.
pub(crate) fn expected(peers: usize, settings: &Settings) -> f64 {
    const AROUND: f64 = 0.15; // starting, opening, preparing, closing, deleting
    let cells = plan(settings).len() as f64;
    let slice = settings.slice.as_secs_f64() + settings.warm.as_secs_f64() + AROUND;
    cells * peers as f64 * settings.rounds as f64 * slice
}
