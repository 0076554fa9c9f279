//! A rebuild in bulk takes no more memory than it may: measured as the most that was ever allocated at a time.

use std::path::Path;
use std::time::Duration;

use headwater::view::{
    Fold, FoldError, Index, Indexes, Keys, RebuildOptions, View, ViewHandle, ViewOptions, ViewState,
};
use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId, Token};

use crate::memory::{held_bytes, held_bytes_max};
use crate::views::until;

const MIB: usize = 1 << 20;
const THREADS: usize = 1;

/// An event concerns rows of neighbouring keys, and says how long they are from now on.
struct Blocks {
    is_indexed: bool,
}

impl Blocks {
    const BY_LEN: Index<Self, u32> =
        Index::new("by_len", |_, row: &String, keys| keys.add(row.len() as u32));
}

/// The first key, how many, and how long.
type Said = (u32, u32, u32);

fn write(said: Said) -> Vec<u8> {
    let (first, count, len) = said;
    [first, count, len].iter().flat_map(|it| it.to_le_bytes()).collect()
}

fn read(bytes: &[u8]) -> Said {
    let number = |n: usize| u32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().unwrap());
    (number(0), number(1), number(2))
}

impl View for Blocks {
    const NAME: &'static str = "blocks";
    const VERSION: u32 = 1;
    type Key = u32;
    type Row = String;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<u32>) {
        let (first, count, _) = read(event.data());
        keys.extend(first..first + count);
    }

    fn fold(
        &self,
        key: &u32,
        row: Option<String>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<String>, FoldError> {
        let (_, _, len) = read(event.data());
        let mut row = row.unwrap_or_default();
        let more = (len as usize).saturating_sub(row.len());
        row.push_str(&char::from(b'a' + (key % 26) as u8).to_string().repeat(more));
        Ok(Fold::Put(row))
    }

    fn indexes(&self) -> Indexes<Self> {
        if self.is_indexed { Indexes::none().with(Self::BY_LEN) } else { Indexes::none() }
    }
}

/// What is built, and with how much memory.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    rows: u32,
    row_bytes: u32,
    keys_per_event: u32,
    limit: usize,
    is_indexed: bool,
}

const CASES: [Case; 4] = [
    Case {
        name: "large rows",
        rows: 42_000,
        row_bytes: 4000,
        keys_per_event: 1,
        limit: 16 * MIB,
        is_indexed: false,
    },
    Case {
        name: "small rows of events that concern several",
        rows: 300_000,
        row_bytes: 8,
        keys_per_event: 60,
        limit: 2 * MIB,
        is_indexed: false,
    },
    Case {
        name: "small rows of one event",
        rows: 80_000,
        row_bytes: 8,
        keys_per_event: 80_000,
        limit: MIB / 2,
        is_indexed: false,
    },
    Case {
        name: "a row that is longer than it may be",
        rows: 6,
        row_bytes: 3 * MIB as u32,
        keys_per_event: 1,
        limit: MIB,
        is_indexed: true,
    },
];

impl Case {
    fn fill(self, store: &Store) -> Token {
        let stream = StreamId::new("blocks").unwrap();
        let events: Vec<Said> = [self.row_bytes / 2, self.row_bytes]
            .into_iter()
            .flat_map(|len| {
                let firsts = (0..self.rows).step_by(self.keys_per_event as usize);
                firsts.map(move |first| (first, self.keys_per_event, len))
            })
            .collect();
        let append = |some: &[Said]| {
            let new = some.iter().map(|said| NewEvent::raw("said", write(*said)).unwrap());
            store.append(&Append::to(&stream, ExpectedRevision::Any, new)).unwrap().token()
        };
        events.chunks(500).map(append).fold(None, |_, token| Some(token)).unwrap()
    }

    /// What the documentation of `memory_bytes_max` says.
    fn bytes_max(self) -> usize {
        let pieces = 2 * THREADS;
        // What is decoded: each event takes about 100 bytes in the journal, and 250 as a value.
        let stored = 2 * (self.rows / self.keys_per_event) as usize;
        let events_per_piece = (2 * MIB / 100).min(stored.div_ceil(pieces));
        let decoded = pieces * events_per_piece * 250;
        // All events but those of few keys fill a piece; two that concern all of them are one batch.
        let of_an_event = 100 * self.keys_per_event as usize;
        let keys = pieces * (8 * MIB).min(events_per_piece * of_an_event).max(of_an_event);
        let folded = THREADS * 4 * self.row_bytes as usize;
        let is_long = self.row_bytes as usize > self.limit;
        let long_row = if is_long { self.row_bytes as usize * 5 / 4 } else { 0 };
        self.limit + long_row + decoded + keys + folded
    }
}

fn open(case: Case, dir: &Path) -> (Store, ViewHandle<Blocks>) {
    let store = Store::open(dir).unwrap();
    let options = ViewOptions { row_cache_bytes: 0, ..ViewOptions::default() };
    let view = store.view_with(Blocks { is_indexed: case.is_indexed }, options).unwrap();
    (store, view)
}

const CHILD: &str = "HEADWATER_TEST_REBUILDS_IN";

/// In a process of its own, where nobody else takes memory.
#[test]
fn process_that_rebuilds_with_little_memory() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let (nth, dir) = order.split_once(' ').unwrap();
    let case = CASES[nth.parse::<usize>().unwrap()];
    let (store, view) = open(case, Path::new(dir));
    until("what is stored is all", || matches!(view.status().state, ViewState::CaughtUp));
    let before = held_bytes();
    let (memory_bytes_max, threads) = (case.limit, THREADS);
    let options = RebuildOptions { memory_bytes_max, threads, ..RebuildOptions::default() };
    let rebuilt = view.rebuild(options).unwrap().wait().unwrap();
    let peak = held_bytes_max() - before;
    let compared = rebuilt.compared.unwrap();
    assert!(compared.is_equal() && compared.built.rows == u64::from(case.rows));
    let (took, max) = (rebuilt.took, case.bytes_max());
    println!("{}: at most {peak} bytes of {max} were taken, in {took:?}", case.name);
    assert!(peak <= max, "{} bytes too many", peak - max);
    drop((view, store));
}

/// Rows of ten times the memory that they may have.
#[test]
fn a_rebuild_takes_no_more_memory_than_it_may() {
    for (nth, case) in CASES.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let filled = case.fill(&Store::create(dir.path()).unwrap());
        let (store, view) = open(case, dir.path());
        view.wait_for(&filled, Duration::from_secs(300)).unwrap();
        view.close().unwrap();
        drop((view, store));
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rebuild_memory::process_that_rebuilds_with_little_memory"])
            .arg("--nocapture")
            .env(CHILD, format!("{nth} {}", dir.path().display()))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}");
        assert!(output.status.success(), "{case:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("were taken"));
    }
}
