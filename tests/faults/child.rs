//! The process that the faults strike: it opens a store, appends, and says what it was told.
//!
//! The workload is the same in every life of a journal: writer `w` appends batches of its numbered events
//! to its stream, each under the revision that it must have. After a crash it goes on with the first event
//! that it has no acknowledgement for, which the journal may have had for long.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fastrand::Rng;
use headwater::planted::{self, Bug};
use headwater::{
    Append, AppendError, Appended, EventId, ExpectedRevision, JournalOptions, NewEvent, OpenError,
    Position, Revision, Store, StreamId,
};

/// A bug of the child, to prove that the driver would notice one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plant {
    /// The library's own: what it acknowledges is not yet on the disk.
    AcknowledgeBeforeSync,
    /// The library's own: after a failed sync, a restart takes the page cache for the disk.
    TrustPageCache,
    /// The child's: it claims the next batch together with the one that was acknowledged.
    ClaimTheNext,
}

impl Plant {
    const ALL: [(Self, &'static str); 3] = [
        (Self::AcknowledgeBeforeSync, "acknowledge-before-sync"),
        (Self::TrustPageCache, "trust-page-cache"),
        (Self::ClaimTheNext, "claim-the-next"),
    ];
}

/// What a child is to do.
#[derive(Clone, Debug)]
pub(crate) struct Orders {
    pub(crate) dir: PathBuf,
    /// The first event of each writer that isn't known to be acknowledged.
    pub(crate) firsts: Vec<u64>,
    /// How many batches each writer appends before it is done and the store is closed.
    pub(crate) batches: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) plant: Option<Plant>,
}

impl Orders {
    pub(crate) fn to_args(&self) -> Vec<String> {
        let plant = Plant::ALL.iter().find(|(plant, _)| Some(*plant) == self.plant);
        let firsts: Vec<String> = self.firsts.iter().map(u64::to_string).collect();
        vec![
            "child".into(),
            self.dir.to_str().unwrap().into(),
            firsts.join(","),
            self.batches.to_string(),
            self.segment_bytes.to_string(),
            plant.map_or("none", |(_, name)| name).into(),
        ]
    }

    fn from_args(args: &[String]) -> Self {
        let [dir, firsts, batches, segment_bytes, plant] = args else {
            panic!("not orders: {args:?}")
        };
        Self {
            dir: dir.into(),
            firsts: firsts.split(',').map(|first| first.parse().unwrap()).collect(),
            batches: batches.parse().unwrap(),
            segment_bytes: segment_bytes.parse().unwrap(),
            plant: Plant::ALL.iter().find(|(_, name)| name == plant).map(|(plant, _)| *plant),
        }
    }
}

// ------------------------------------------------------------------------------------------ the workload

/// Small segments, of a few batches each.
pub(crate) const SEGMENT_BYTES: u64 = 16 * 1024;

pub(crate) fn open(dir: &Path, segment_bytes: u64) -> Result<Store, OpenError> {
    let options = JournalOptions {
        segment_bytes_first: segment_bytes,
        segment_bytes_max: segment_bytes,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    };
    Store::builder(dir).create_if_missing().journal_options(options).open()
}

pub(crate) const EVENT_TYPE: &str = "faults.counted";

pub(crate) fn stream(writer: usize) -> StreamId {
    StreamId::new(format!("writer-{writer}")).unwrap()
}

/// Follows from the event: whoever appends it again after a crash appends the same one.
pub(crate) fn event_id(writer: usize, number: u64) -> EventId {
    EventId::from_bytes((u128::from(number) << 64 | (writer as u128 + 1)).to_le_bytes())
}

pub(crate) fn payload(writer: usize, number: u64) -> Vec<u8> {
    let mut rng = Rng::with_seed(number << 8 | writer as u64);
    let len = rng.usize(..900);
    std::iter::repeat_with(|| rng.u8(..)).take(len).collect()
}

/// The first event of the batch behind the one that begins with event `first`.
pub(crate) fn next_batch(first: u64) -> u64 {
    first + 1 + first % 4
}

/// The writer's batch that begins with event `first`.
pub(crate) fn batch(writer: usize, first: u64) -> Append {
    let event = |number| {
        let event = NewEvent::raw(EVENT_TYPE, payload(writer, number)).unwrap();
        event.id(event_id(writer, number))
    };
    let expected = match first.checked_sub(1) {
        None => ExpectedRevision::NoStream,
        Some(last) => ExpectedRevision::Exact(Revision::new(last)),
    };
    Append::to(&stream(writer), expected, (first..next_batch(first)).map(event))
}

// ------------------------------------------------------------------------------------------- the process

/// One line, whole, or the end of this process.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Carries out the orders, and ends.
pub(crate) fn run(args: &[String]) -> ! {
    let orders = Orders::from_args(args);
    std::thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        std::process::exit(0);
    });
    match orders.plant {
        Some(Plant::AcknowledgeBeforeSync) => planted::plant_everywhere(Bug::AcknowledgeBeforeSync),
        Some(Plant::TrustPageCache) => planted::plant_everywhere(Bug::TrustPageCache),
        Some(Plant::ClaimTheNext) | None => {}
    }
    match open(&orders.dir, orders.segment_bytes) {
        Err(error) => say(&format!("refused {} {error}", error.code())),
        Ok(store) => work(&store, &orders),
    }
    std::process::exit(0);
}

fn work(store: &Store, orders: &Orders) {
    say(&format!("opened {}", store.journal().end().position));
    std::thread::scope(|scope| {
        for (writer, first) in orders.firsts.iter().enumerate() {
            scope.spawn(move || write(store, orders, writer, *first));
        }
    });
    match store.close() {
        Ok(()) => say("closed"),
        Err(error) => say(&format!("unclosed {error}")),
    }
}

/// What may pass by itself is asked for again this often.
const ATTEMPTS_MAX: usize = 3;

fn write(store: &Store, orders: &Orders, writer: usize, mut first: u64) {
    let mut attempts = 0;
    let mut batches = 0;
    while batches < orders.batches {
        let next = next_batch(first);
        match store.append(&batch(writer, first)) {
            Ok(appended) => {
                acknowledge(writer, first, next, &appended);
                if orders.plant == Some(Plant::ClaimTheNext) {
                    let position = appended.token().position.advance(next_batch(next) - next);
                    say(&format!("acknowledged {writer} {} {position}", next_batch(next)));
                }
                (first, batches, attempts) = (next, batches + 1, 0);
            }
            Err(AppendError::Unknown(poison)) => {
                say(&format!("unknown {writer} {poison}"));
                return stay_poisoned(store, writer, first);
            }
            Err(AppendError::Poisoned(poison)) => {
                say(&format!("poisoned {writer} {poison}"));
                return stay_poisoned(store, writer, first);
            }
            Err(error @ (AppendError::DiskFull(_) | AppendError::Read(_))) => {
                let word = if matches!(error, AppendError::Read(_)) { "unread" } else { "full" };
                say(&format!("{word} {writer} {error}"));
                attempts += 1;
                if attempts == ATTEMPTS_MAX {
                    return;
                }
            }
            Err(error) => return say(&format!("violation writer {writer} at {first}: {error}")),
        }
    }
}

fn acknowledge(writer: usize, first: u64, next: u64, appended: &Appended) {
    let receipt = appended.receipt();
    let placed: Vec<u64> = receipt.events.iter().map(|placed| placed.revision.get()).collect();
    if placed.iter().copied().ne(first..next) {
        say(&format!("violation writer {writer}: revisions {placed:?} for {first}..{next}"));
    }
    say(&format!("acknowledged {writer} {next} {}", receipt.token.position));
}

/// After a failure nothing is accepted any more, and what is durable can still be read.
fn stay_poisoned(store: &Store, writer: usize, first: u64) {
    if !matches!(store.append(&batch(writer, first)), Err(AppendError::Poisoned(_))) {
        say(&format!("violation writer {writer}: not poisoned at {first}"));
    }
    let end = store.journal().end().position;
    match store.read_all(Position::START) {
        Ok(events) => {
            let mut count = 0;
            for event in events {
                match event {
                    Ok(_) => count += 1,
                    Err(error) => return say(&format!("unreadable {error}")),
                }
            }
            if Position::new(count) != end {
                say(&format!("violation {count} events are read of {end} that are durable"));
            }
        }
        Err(error) => say(&format!("unreadable {error}")),
    }
}
