//! What it costs to be served by a view, and to have one: reads, flips, waiting for one's own write, bytes.
//!
//! Each beside what the machine or RocksDB does without us; those that are compared take turns.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use headwater::view::{RebuildOptions, ViewHandle, ViewOptions};
use headwater::{Append, ExpectedRevision, NewEvent, Store, StreamId};
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, Options, WriteBatch, WriteOptions,
};
use serde::Serialize;

use crate::shared::spread::Spread;
use crate::{Outcome, Sale, SaleEvent, Totals, options, portions, wait};

/// Events whose rows are read, and as many keys.
const ROWS: u64 = 1_000_000;
const READS: usize = 100_000;
const FLIPS: usize = 200;
const APPENDS: usize = 500;
const ROUNDS: usize = 9;
/// About as many events as are folded at once by default.
const CHUNK: usize = 4_000;

#[derive(Debug, Serialize)]
pub(crate) struct Served {
    /// Median nanoseconds of a read of a random row, over those of a bare get of the same file's bytes.
    pub(crate) get_ns: f64,
    pub(crate) bare_get_ns: f64,
    /// By round: bare over ours.
    pub(crate) get_ratio: Spread,
    pub(crate) flip_readers: usize,
    /// The longest read of any reader around each flip.
    pub(crate) flip_pause_p50_us: f64,
    pub(crate) flip_pause_p99_us: f64,
    /// The longest reads in as long a time without a flip.
    pub(crate) no_flip_pause_p99_us: f64,
    /// From the durable acknowledgement until the row shows it.
    pub(crate) visible_p50_us: f64,
    pub(crate) visible_p99_us: f64,
    pub(crate) append_p50_us: f64,
    /// The same appends with an inline view.
    pub(crate) append_inline_p50_us: f64,
    /// By round: the difference of the medians.
    pub(crate) inline_added_us: Spread,
    /// Bytes written per event: by a view, and by RocksDB alone when the same rows are written without a write-ahead log, and
    /// with one.
    pub(crate) bytes_of_view: f64,
    pub(crate) bytes_without_wal: f64,
    pub(crate) bytes_with_wal: f64,
    pub(crate) bytes_keys: u64,
}

pub(crate) fn measure(dir: &Path) -> Outcome<Served> {
    let (get_ns, bare_get_ns, get_ratio) = reads(&dir.join("reads"))?;
    let (flip_pause_p50_us, flip_pause_p99_us, no_flip_pause_p99_us) = flips(&dir.join("flips"))?;
    let (visible_p50_us, visible_p99_us) = visible(&dir.join("visible"))?;
    let (append_p50_us, append_inline_p50_us, inline_added_us) = inline(&dir.join("inline"))?;
    let [bytes_of_view, bytes_without_wal, bytes_with_wal] = bytes(&dir.join("bytes"))?;
    Ok(Served {
        get_ns,
        bare_get_ns,
        get_ratio,
        flip_readers: readers()?,
        flip_pause_p50_us,
        flip_pause_p99_us,
        no_flip_pause_p99_us,
        visible_p50_us,
        visible_p99_us,
        append_p50_us,
        append_inline_p50_us,
        inline_added_us,
        bytes_of_view,
        bytes_without_wal,
        bytes_with_wal,
        bytes_keys: ROWS,
    })
}

fn sales(random: &mut fastrand::Rng, keys: u64, count: usize) -> Outcome<Append> {
    sales_of((0..count).map(|_| random.u64(..keys)).collect())
}

fn sales_of(keys: Vec<u64>) -> Outcome<Append> {
    let sales = keys.into_iter().map(|key| {
        let cents = key % 1000;
        NewEvent::typed(&SaleEvent::from(Sale { key, cents, rest: "x".repeat(240) }))
    });
    let events = sales.collect::<Result<Vec<_>, _>>()?;
    Ok(Append::to(&StreamId::new("sales")?, ExpectedRevision::Any, events))
}

/// A store with so many events, and its view, caught up and on disk.
fn filled(
    dir: &Path,
    keys: u64,
    events: u64,
    options: ViewOptions,
) -> Outcome<(Store, ViewHandle<Totals>)> {
    let store = Store::create(dir)?;
    // Every key at least once, in no order.
    let mut all: Vec<u64> = (0..events).map(|n| n % keys).collect();
    fastrand::Rng::with_seed(2).shuffle(&mut all);
    for some in all.chunks(1000) {
        store.append(&sales_of(some.to_vec())?)?;
    }
    let view = store.view_with(Totals, options)?;
    wait(&view, store.journal().end().position)?;
    Ok((store, view))
}

fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |it| it.as_secs_f64() * 1e6)
}

fn percentiles(mut all: Vec<Duration>) -> (f64, f64) {
    all.sort_unstable();
    (percentile(&all, 0.5), percentile(&all, 0.99))
}

fn spread(values: Vec<f64>) -> Outcome<Spread> {
    Ok(Spread::of(values).ok_or("no rounds")?)
}

impl Served {
    /// What a view with a write-ahead log would have written.
    pub(crate) fn bytes_of_view_with_wal(&self) -> f64 {
        self.bytes_of_view + self.bytes_with_wal - self.bytes_without_wal
    }
}

/// Those of the view's database.
fn database_options() -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(256 << 20));
    blocks.set_block_size(16 << 10);
    blocks.set_bloom_filter(10.0, false);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    blocks.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    blocks.set_partition_filters(true);
    blocks.set_pin_top_level_index_and_filter(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_max_open_files(256);
    options
}

/// A random row through the view, decoded, and its bytes by a bare get from the same files.
fn reads(dir: &Path) -> Outcome<(f64, f64, Spread)> {
    let (store, view) = filled(dir, ROWS, ROWS, options())?;
    let bare = DB::open_for_read_only(&database_options(), view.status().generation, false)?;
    let keys: Vec<u64> = (0..ROWS).collect();
    let stored = |key: u64| {
        let mut stored = [1; 9];
        stored[1..].copy_from_slice(&key.to_be_bytes());
        stored
    };
    let mut random = fastrand::Rng::with_seed(3);
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let chosen: Vec<u64> = (0..READS).filter_map(|_| random.choice(&keys).copied()).collect();
        let began = Instant::now();
        for key in &chosen {
            std::hint::black_box(view.get(key)?);
        }
        let mine = began.elapsed();
        let began = Instant::now();
        for key in &chosen {
            std::hint::black_box(bare.get_pinned(stored(*key))?.map(|row| row.len()));
        }
        let others = began.elapsed();
        if round > 0 {
            // The first fills the caches.
            ours.push(mine.as_nanos() as f64 / READS as f64);
            theirs.push(others.as_nanos() as f64 / READS as f64);
            ratios.push(others.as_secs_f64() / mine.as_secs_f64());
        }
    }
    view.close()?;
    store.close()?;
    Ok((spread(ours)?.median, spread(theirs)?.median, spread(ratios)?))
}

/// As many as don't compete with the one that takes over.
fn readers() -> Outcome<usize> {
    Ok(std::thread::available_parallelism()?.get().saturating_sub(1).max(1))
}

/// A reader for each processor but one, while generations take over from each other.
fn flips(dir: &Path) -> Outcome<(f64, f64, f64)> {
    const KEYS: u64 = 10_000;
    let (store, view) = filled(dir, KEYS, 50_000, options())?;
    view.rebuild(RebuildOptions::default())?.wait()?;
    let (is_over, longest_ns) = (AtomicBool::new(false), AtomicU64::new(0));
    let take_longest = || Duration::from_nanos(longest_ns.swap(0, Ordering::Relaxed));
    let (with, without) = std::thread::scope(|scope| -> Outcome<_> {
        for seed in 0..readers()? as u64 {
            let (view, is_over, longest_ns) = (&view, &is_over, &longest_ns);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while !is_over.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let row = view.get(&random.u64(..KEYS));
                    let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    longest_ns.fetch_max(took, Ordering::Relaxed);
                    assert!(row.is_ok_and(|row| row.is_some()), "a row is missing");
                }
            });
        }
        let (mut with, mut without) = (Vec::new(), Vec::new());
        let done = (0..FLIPS).try_for_each(|_| -> Outcome<()> {
            take_longest();
            let began = Instant::now();
            view.rollback()?.wait()?;
            let took = began.elapsed();
            with.push(take_longest());
            std::thread::sleep(took);
            without.push(take_longest());
            Ok(())
        });
        is_over.store(true, Ordering::Relaxed);
        done.map(|()| (with, without))
    })?;
    view.close()?;
    store.close()?;
    let ((p50, p99), (_, without_p99)) = (percentiles(with), percentiles(without));
    Ok((p50, p99, without_p99))
}

/// One writer, which waits for its own write behind each acknowledgement.
fn visible(dir: &Path) -> Outcome<(f64, f64)> {
    let (store, view) = filled(dir, 10_000, 50_000, options())?;
    let mut random = fastrand::Rng::with_seed(4);
    let mut waited = Vec::new();
    for n in 0..5 * APPENDS {
        let appended = store.append(&sales(&mut random, 10_000, 1)?)?;
        let began = Instant::now();
        view.wait_for(&appended.token(), Duration::from_secs(10))?;
        if n >= APPENDS {
            waited.push(began.elapsed());
        }
    }
    view.close()?;
    store.close()?;
    Ok(percentiles(waited))
}

/// Single appends to a store without a view and to one with an inline view, one event each in turn.
fn inline(dir: &Path) -> Outcome<(f64, f64, Spread)> {
    fs::create_dir_all(dir)?;
    let (plain, unused) = filled(&dir.join("plain"), 10_000, 50_000, options())?;
    unused.close()?;
    drop(unused);
    let inline = ViewOptions { inline: true, ..options() };
    let (store, view) = filled(&dir.join("inline"), 10_000, 50_000, inline)?;
    let mut random = fastrand::Rng::with_seed(5);
    let mut timed = |store: &Store| -> Outcome<Duration> {
        let append = sales(&mut random, 10_000, 1)?;
        let began = Instant::now();
        let appended = store.append(&append)?;
        let took = began.elapsed();
        match appended.receipt().behind.is_empty() {
            true => Ok(took),
            false => Err("the inline view has stopped".into()),
        }
    };
    let (mut without, mut with, mut added) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (mut of_plain, mut of_inline) = (Vec::new(), Vec::new());
        for _ in 0..APPENDS {
            of_plain.push(timed(&plain)?);
            of_inline.push(timed(&store)?);
        }
        let (plain, inline) = (percentiles(of_plain).0, percentiles(of_inline).0);
        if round > 0 {
            without.push(plain);
            with.push(inline);
            added.push(inline - plain);
        }
    }
    if view.checkpoint().applied.position != store.journal().end().position {
        return Err("the inline view is behind".into());
    }
    view.close()?;
    store.close()?;
    plain.close()?;
    Ok((spread(without)?.median, spread(with)?.median, spread(added)?))
}

/// What reaches the disk: of a view that follows, and of its rows as it writes them, once without and once with a write-ahead log.
fn bytes(dir: &Path) -> Outcome<[f64; 3]> {
    let store = Store::create(dir.join("store"))?;
    store.view_with(Totals, options())?.close()?; // it has begun: from here on it follows
    let mut random = fastrand::Rng::with_seed(6);
    for _ in 0..ROWS / 1000 {
        store.append(&sales(&mut random, ROWS, 1000)?)?;
    }
    let before = written_bytes()?;
    let view = store.view_with(Totals, options())?;
    wait(&view, store.journal().end().position)?;
    view.close()?;
    let of_view = written_bytes()? - before;
    let without = write_rows(&store, &dir.join("without"), true)?;
    let with = write_rows(&store, &dir.join("with"), false)?;
    store.close()?;
    Ok([of_view, without, with].map(|bytes| bytes as f64 / ROWS as f64))
}

fn write_rows(store: &Store, dir: &Path, disable_wal: bool) -> Outcome<u64> {
    let mut options = database_options();
    options.create_if_missing(true);
    options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    options.set_write_buffer_size(32 << 20);
    options.set_max_write_buffer_number(3);
    let db = DB::open(&options, dir)?;
    let mut write_options = WriteOptions::default();
    write_options.disable_wal(disable_wal);
    let before = written_bytes()?;
    portions(store.journal(), ROWS, |sales| {
        for chunk in sales.chunks(CHUNK) {
            let mut batch = WriteBatch::default();
            let keys = chunk
                .iter()
                .map(|sale| (sale.key, sale))
                .collect::<std::collections::BTreeMap<_, _>>();
            for (key, sale) in keys {
                // A small number and one of up to three bytes, as the view's rows.
                let row = [&[1], &sale.cents.to_le_bytes()[..3]].concat();
                batch.put([&[1], &key.to_be_bytes()[..]].concat(), row);
            }
            batch.put([0, b'p'], [0; 96]);
            db.write_opt(batch, &write_options)?;
        }
        Ok(())
    })?;
    db.flush()?;
    drop(db);
    Ok(written_bytes()? - before)
}

/// What this process has caused to be written to the disk.
fn written_bytes() -> Outcome<u64> {
    let text = fs::read_to_string("/proc/self/io")?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.ok_or("no write_bytes in /proc/self/io")?.parse()?)
}
