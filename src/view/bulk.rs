//! Building a generation from nothing: each row is folded in memory and written once.
//!
//! ```text
//!          pieces of the journal, in parallel           parts of the keys, in parallel
//!  round:  read ─ verify ─ decode ─ route ──────────▶  part 0: fold, piece after piece ┐
//!          read ─ verify ─ decode ─ route ──────────▶  part 1: fold, piece after piece ├─▶ next round
//!
//!  at the end:  sort the rows ─▶ sorted files, in parallel ─▶ ingested in one call, the checkpoint among them
//! ```
//! - What is made is what the ordered path makes: the events of a key are folded in their order, because the
//!   pieces of a round are, and so are the rounds. Keys don't see each other, so their order doesn't matter.
//! - **Memory is bounded.** A part takes memory from what is allowed before it allocates. When there is none left, all parts
//!   stop where they are, the upper half of the keys is forgotten and left to a further *pass* over the journal, and they
//!   go on. A pass makes the rows of one range of keys, and the next one goes on behind it; so the files of all passes are
//!   in the order of the keys and nothing has to be merged. Within a pass each part is sorted for itself, as copies of one
//!   part at a time cost little, and the parts are merged while they are written.
//! - A piece that names more keys than are good for it is folded as far as it is decoded, and then its rest.
//! - Index entries are made from the finished rows. They come in another order than the rows, of all passes: they are
//!   sorted in runs on disk, and merged when all rows are there.
//! - The database is empty until everything is in it at once: one without a checkpoint was never finished.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use smallvec::SmallVec;
use std::hash::BuildHasher;

use super::audit::Tallies;
use super::chunk::{Place, decode, encode_row, guard, invalid_record, is_known, stop_at};
use super::db::{Files, Progress, StorageError, row_key};
use super::deadly::{At, Deadly, Stage};
use super::error::{EventFailure, StopError, ViewError};
use super::intake::{Failed, Intake, Pieces, Stretch};
use super::key::{ViewKey, decode_all};
use super::poison::{Discarded, ParkedCounts};
use super::program::Build;
use super::rebuild::{Cancelled, Control, RebuildOptions, RebuildPhase};
use super::row_cache::{Bytes, FETCHED};
use super::sort::{Run, Runs};
use super::sources::{Checkpoints, Sources};
use super::{Fold, Indexes, Keys, View};
use crate::codec::{Bincode, Codec};
use crate::error::ReadError;
use crate::event::{EventId, Names, Recorded};
use crate::journal::Cursor;
use crate::planted::{self, Bug};
use crate::position::{Checkpoint, Locator, Position};

/// How the keys are divided, so that several threads can fold at once.
const PARTS: usize = 64;
/// About so much of the journal is decoded at a time by each thread.
const PIECE_BYTES: u64 = 2 << 20;
/// So many pieces each thread decodes before all fold.
const PIECES_PER_THREAD: usize = 2;
/// A piece that names keys of more bytes, with what is noted beside them, is folded before the rest of it is decoded.
const ROUTED_BYTES: usize = 4 << 20;
/// A limit on what may be read makes pieces no smaller, but fewer: each reads the batch in which it begins.
const SLOW_PIECE_BYTES_MIN: u64 = 64 << 10;
/// A sorted file has about so many bytes of keys and rows.
const FILE_BYTES: usize = 64 << 20;
/// A part with fewer rows is in a cache of the processor.
const FAR: usize = 1 << 10;
/// Keys that are looked at to find the middle of all.
const SAMPLE: usize = 1024;
/// A part takes at most so much memory beyond what it needs.
const GRANT_BYTES_MAX: usize = 64 << 10;
/// If one row alone needs more than is allowed, it is allowed so much more at least, again and again.
const BESIDE_BYTES: usize = 4 << 10;

/// What a bulk build may use.
#[derive(Clone, Debug)]
pub(super) struct Means {
    /// For rows that aren't on disk yet.
    pub(super) memory_bytes_max: usize,
    pub(super) threads: usize,
    /// What is left out, by decision.
    pub(super) discarded: Arc<Discarded>,
}

impl Means {
    pub(super) fn of(options: &RebuildOptions, discarded: Arc<Discarded>) -> Self {
        let RebuildOptions { memory_bytes_max, threads, .. } = *options;
        Self { memory_bytes_max, threads: threads.max(1), discarded }
    }
}

/// Why it ended early.
pub(super) enum Ended {
    Cancelled,
    Failed(StopError),
}

impl From<Cancelled> for Ended {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<StopError> for Ended {
    fn from(error: StopError) -> Self {
        Self::Failed(error)
    }
}

/// Builds the rows of everything in front of `until` into a database that was never written to.
pub(super) fn build<V: View>(view: &V, what: Build<'_>) -> Result<Progress, Ended> {
    let Build { sources, intake, until, db, memory, means, control, note } = what;
    let deadly = note.deadly();
    let storage = |source| Ended::Failed(StopError::Storage { view: V::NAME, source });
    let pool = ThreadPoolBuilder::new()
        .num_threads(means.threads)
        .thread_name(|n| format!("rebuild-{n}"))
        .build()
        .map_err(|error| storage(db.no_threads(error)))?;
    let mut files = Files::new(db, memory).map_err(storage)?;
    let (pool, from, until) = (&pool, Vec::new(), &until);
    let mut pass = Pass { view, sources, intake, until, means, deadly, control, pool, from };
    let (indexes, runs) = (Indexes::of(view), Runs::new(files.dir()));
    let mut progress = None;
    let mut tallies: Option<Tallies> = None;
    loop {
        control.pass_begins(RebuildPhase::Building, until.events());
        let folded = pass.fold()?;
        progress = Some(folded.progress).or(progress);
        // Each pass sees all events. One that has seen fewer tells.
        tallies = Some(match tallies {
            Some(others) => least(others, &folded.tallies),
            None => folded.tallies,
        });
        pool.install(|| write(&folded.rows, &indexes, &mut files, &runs))?;
        match folded.left_from {
            Some(from) => pass.from = from,
            None => break,
        }
    }
    let progress = progress.unwrap_or_else(|| progress_at(until.clone(), 0));
    control.check()?;
    write_entries(runs, &mut files, control).map_err(|ended| match ended {
        EntriesEnded::Cancelled(cancelled) => cancelled.into(),
        EntriesEnded::Failed(source) => storage(source),
    })?;
    let tallies = tallies.unwrap_or_default();
    db.ingest(files, &indexes.identity(), &progress, &tallies).map_err(storage)?;
    Ok(progress)
}

/// The rows of one range of keys.
struct Pass<'a, V: View> {
    view: &'a V,
    sources: &'a Sources,
    intake: &'a Intake,
    until: &'a Checkpoints,
    means: Means,
    /// What can't be tried.
    deadly: Arc<Deadly>,
    control: &'a Control,
    pool: &'a ThreadPool,
    /// The first key of the range.
    from: Vec<u8>,
}

/// The rows that a pass has made so far.
struct Rows {
    parts: Vec<Part>,
    allowed: Allowed,
    /// The keys from here on are left to the next pass.
    to: Option<Vec<u8>>,
    /// Whether that was decided behind the decoding of pieces that aren't folded yet.
    is_narrower: bool,
}

/// How far a pass has come.
struct Seen {
    tallies: Tallies,
    end: Checkpoints,
}

impl Seen {
    fn add<V: View>(&mut self, piece: &Piece<V>) {
        for (segment, tally) in &piece.tallies {
            self.tallies.entry(*segment).or_default().add(*tally);
        }
        for at in &piece.ends {
            self.end = self.end.moved(*at);
        }
    }
}

struct Folded {
    rows: Sorted,
    tallies: Tallies,
    progress: Progress,
    /// The keys from here on are still to be folded.
    left_from: Option<Vec<u8>>,
}

/// A row as it will be stored. Encoded, so that what it needs is known, and a fold gets it by value.
struct Row {
    key: Bytes,
    row: Option<Bytes>,
}

impl Row {
    /// What it needs beside its place in a table.
    fn spilled_bytes(&self) -> usize {
        spilled(Some(&self.key)) + spilled(self.row.as_ref())
    }
}

fn spilled(bytes: Option<&Bytes>) -> usize {
    bytes.filter(|it| it.spilled()).map_or(0, SmallVec::capacity)
}

/// Memory for rows, which the parts share.
struct Allowed {
    /// As the caller has asked.
    bytes_max: usize,
    /// What the parts may have: a table that grows, shrinks or is drained is there twice, in as many parts as there are
    /// threads; and tables of the same number of rows may differ by a factor of two.
    room: usize,
    taken: AtomicUsize,
    grant: usize,
}

impl Allowed {
    fn new(means: &Means) -> Self {
        let bytes_max = means.memory_bytes_max;
        let room = bytes_max / (PARTS + 2 * means.threads) * PARTS;
        let grant = (room / (16 * PARTS)).min(GRANT_BYTES_MAX);
        Self { bytes_max, room, taken: AtomicUsize::new(0), grant }
    }

    /// Whether there is so much left; it is taken, then.
    fn take(&self, bytes: usize) -> bool {
        let taken = self.taken.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let is_there = taken <= self.room;
        if !is_there {
            self.give_back(bytes);
        }
        is_there
    }

    fn give_back(&self, bytes: usize) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Rows were forgotten; or there was at most one, and what it needs must be allowed, step by step.
    fn make_room(&mut self, parts: &mut [Part], were_forgotten: bool) {
        let taken: usize = parts.iter_mut().map(Part::taken_bytes).sum();
        self.taken = AtomicUsize::new(taken);
        if !were_forgotten {
            let room = self.room.max(taken);
            self.room = room + room / 4 + self.bytes_max.max(BESIDE_BYTES);
        }
    }
}

/// Keys and rows that don't fit into their places in a table.
#[derive(Default)]
struct Spilled {
    bytes: usize,
    /// What was taken for them.
    granted: usize,
}

impl Spilled {
    /// So many bytes go, and so many come. False if there isn't enough memory; nothing is changed, then.
    fn change(&mut self, less: usize, more: usize, allowed: &Allowed) -> bool {
        let bytes = self.bytes - less + more;
        if bytes > self.granted {
            let granted = bytes + allowed.grant;
            if !allowed.take(granted - self.granted) {
                return false;
            }
            self.granted = granted;
        }
        self.bytes = bytes;
        true
    }
}

/// A part of the keys.
#[derive(Default)]
struct Part {
    rows: HashTable<Row>,
    spilled: Spilled,
    /// Where it goes on in the pieces of this round: which one, and which route of it.
    at: (usize, usize),
}

impl Part {
    /// As much as it needs now, and no more.
    fn taken_bytes(&mut self) -> usize {
        self.spilled.granted = self.spilled.bytes;
        self.rows.allocation_size() + self.spilled.bytes
    }

    /// Makes place for another row. False if there isn't enough memory.
    fn has_place(&mut self, allowed: &Allowed, hash_of: impl Fn(&Row) -> u64) -> bool {
        if self.rows.len() < self.rows.capacity() {
            return true;
        }
        let small = self.rows.allocation_size();
        let about = (2 * small).max(8 * size_of::<Row>());
        let is_there = allowed.take(about);
        if is_there {
            self.rows.reserve(1, hash_of);
            let large = self.rows.allocation_size();
            allowed.taken.fetch_add(large, Ordering::Relaxed);
            allowed.give_back(about + small);
        }
        is_there
    }

    /// Its rows in order, at the price of a copy without those that were deleted.
    fn into_sorted(self) -> Vec<Row> {
        let mut rows = Vec::with_capacity(self.rows.len());
        rows.extend(self.rows.into_iter().filter(|row| row.row.is_some()));
        rows.sort_unstable_by(|a: &Row, b| a.key.cmp(&b.key));
        rows
    }
}

/// Why a part has not come to the end of a round.
enum Stopped {
    /// There is no memory for another row.
    Full,
    /// With the event's place: which piece, which event of it.
    Failed((usize, u32), Box<StopError>),
}

/// A decoded piece of the journal.
struct Piece<V: View> {
    events: Vec<Recorded<V::Event>>,
    routes: Vec<Vec<Route<V::Key>>>,
    keys: Vec<u8>,
    routed: usize,
    tallies: Tallies,
    bytes: u64,
    stored_events: u64,
    /// Of each journal in it.
    ends: SmallVec<[Checkpoint; 1]>,
    /// Where the rest begins, if it isn't decoded as a whole: in which stretch, and where.
    rest: Option<(usize, Position)>,
}

/// An event concerns the row under a key.
struct Route<K> {
    hash: u64,
    event: u32,
    key_at: u32,
    key_len: u32,
    key: K,
}

impl<V: View> Pass<'_, V> {
    fn fold(&self) -> Result<Folded, Ended> {
        let hasher = RandomState::default();
        let mut rows = Rows {
            parts: (0..PARTS).map(|_| Part::default()).collect(),
            allowed: Allowed::new(&self.means),
            to: None,
            is_narrower: false,
        };
        let mut seen = Seen { tallies: Tallies::new(), end: self.sources.beginning() };
        let mut all = Pieces::new(self.sources, self.intake, self.until);
        let at_once = self.means.threads * PIECES_PER_THREAD;
        let mut pieces: Vec<Piece<V>> = (0..at_once).map(|_| Piece::empty()).collect();
        let mut piece_bytes = PIECE_BYTES;
        loop {
            let allowed_bytes = self.control.bytes_at_once();
            let filled = (allowed_bytes / SLOW_PIECE_BYTES_MIN).clamp(1, at_once as u64);
            let bytes = piece_bytes.min((allowed_bytes / filled).max(SLOW_PIECE_BYTES_MIN));
            let next = |nth| if nth < filled { all.next(bytes) } else { Ok(Vec::new()) };
            let round = (0..at_once as u64).map(next).collect::<Result<Vec<_>, _>>();
            let round = round.map_err(|error| Failed::from(error).stop(V::NAME))?;
            if round.first().is_none_or(Vec::is_empty) {
                break;
            }
            rows.is_narrower = false;
            let range = Range { from: &self.from, to: rows.to.as_deref() };
            self.pool.install(|| {
                let pieces = pieces.par_iter_mut().zip(&round);
                pieces
                    .map(|(piece, at)| self.fill(piece, at, None, &hasher, range))
                    .collect::<Result<(), _>>()
            })?;
            let is_too_much = pieces.iter().any(|piece| piece.rest.is_some());
            self.fold_round(&mut rows, &mut pieces, &round, &hasher, &mut seen)?;
            // What all threads decode is better than what one of them decodes afterwards.
            piece_bytes = if is_too_much { piece_bytes / 2 } else { piece_bytes * 2 };
            piece_bytes = piece_bytes.clamp(1, PIECE_BYTES);
        }
        drop(pieces);
        let Rows { parts, to, .. } = rows;
        let rows = self.pool.install(|| parts.into_par_iter().map(Part::into_sorted).collect());
        let skipped_events = seen.tallies.values().map(|tally| tally.skipped).sum();
        let progress = progress_at(seen.end, skipped_events);
        Ok(Folded { rows: Sorted(rows), tallies: seen.tallies, progress, left_from: to })
    }

    /// Folds pieces that are decoded; of those that are not whole, one after the other, what they have, and then the rest.
    fn fold_round(
        &self,
        rows: &mut Rows,
        pieces: &mut [Piece<V>],
        round: &[Vec<Stretch>],
        hasher: &RandomState,
        seen: &mut Seen,
    ) -> Result<(), Ended> {
        let (mut pieces, mut round) = (pieces, round);
        while !pieces.is_empty() {
            let partly = pieces.iter().position(|piece| piece.rest.is_some());
            let (now, _) = pieces.split_at(partly.map_or(pieces.len(), |nth| nth + 1));
            self.fold_pieces(rows, now, hasher)?;
            now.iter().for_each(|piece| seen.add(piece));
            let folded = partly.unwrap_or(pieces.len());
            pieces = pieces.split_at_mut(folded).1;
            round = round.get(folded..).unwrap_or_default();
            if let (Some(piece), Some(at)) = (pieces.first_mut(), round.first()) {
                let range = Range { from: &self.from, to: rows.to.as_deref() };
                let rest = piece.rest;
                self.pool.install(|| self.fill(piece, at, rest, hasher, range))?;
            }
        }
        Ok(())
    }

    /// Folds pieces into the parts, as often as there is no memory left for less keys than before.
    fn fold_pieces(
        &self,
        rows: &mut Rows,
        pieces: &[Piece<V>],
        hasher: &RandomState,
    ) -> Result<(), Ended> {
        let Rows { parts, allowed, to, is_narrower } = rows;
        parts.iter_mut().for_each(|part| part.at = (0, 0));
        let mut failures = Vec::new();
        loop {
            let stopped: Vec<Stopped> = self.pool.install(|| {
                let (allowed, below) = (&*allowed, to.as_deref().filter(|_| *is_narrower));
                let fold = |(n, part): (usize, &mut Part)| {
                    part.fold(self.view, n, pieces, hasher, &self.deadly, allowed, below).err()
                };
                parts.par_iter_mut().enumerate().filter_map(fold).collect()
            });
            let mut is_full = false;
            for stopped in stopped {
                match stopped {
                    Stopped::Full => is_full = true,
                    Stopped::Failed(place, failure) => failures.push((place, failure)),
                }
            }
            if !is_full {
                break;
            }
            let middle = self.pool.install(|| halve(parts, hasher));
            allowed.make_room(parts, middle.is_some());
            if middle.is_some() {
                (*to, *is_narrower) = (middle, true);
            }
        }
        let first = failures.into_iter().min_by_key(|(place, _)| *place);
        first.map_or(Ok(()), |(_, failure)| Err(Ended::Failed(*failure)))
    }

    /// Forgets the rows for which the event is discarded.
    fn leave_out(&self, at: Locator, id: EventId, keys: &mut Keys<V::Key>) {
        let discarded = &*self.means.discarded;
        if !discarded.is_empty() {
            let stored = |key: &V::Key| row_key(|out| key.encode_key(out));
            keys.0.retain(|key| !discarded.has(at, id, &stored(key)));
        }
    }

    /// Decodes and routes the batches of some stretches, or the rest of them.
    fn fill(
        &self,
        piece: &mut Piece<V>,
        stretches: &[Stretch],
        rest: Option<(usize, Position)>,
        hasher: &RandomState,
        wanted: Range<'_>,
    ) -> Result<(), Ended> {
        piece.clear();
        // Where a journal's next stretch begins, its last one has ended.
        let mut cursors: SmallVec<[Cursor; 1]> = SmallVec::new();
        let first = rest.map_or(0, |(nth, _)| nth);
        for (nth, stretch) in stretches.iter().enumerate().skip(first) {
            let begun = rest.filter(|_| nth == first).map(|(_, at)| at);
            let from = begun.unwrap_or(stretch.from);
            let at = cursors.iter().position(|it| it.journal().id() == stretch.journal);
            let begin = || -> Result<usize, StopError> {
                let missing = ViewError::Journals { view: V::NAME, reason: "one isn't there" };
                let journal = self.sources.get(stretch.journal);
                let journal =
                    journal.ok_or(Failed::from(missing)).map_err(|it| it.stop(V::NAME))?;
                cursors.push(journal.cursor(from).map_err(journal_failed::<V>)?);
                Ok(cursors.len() - 1)
            };
            let at = at.map_or_else(begin, Ok)?;
            let Some(cursor) = cursors.get_mut(at) else { continue };
            self.fill_from(cursor, piece, stretch, from, hasher, wanted)?;
            let is_left = cursor.position() < stretch.to || nth + 1 < stretches.len();
            if piece.is_full() && is_left {
                piece.rest = Some((nth, cursor.position()));
                break;
            }
        }
        Ok(self.control.advance(piece.stored_events, piece.bytes)?)
    }

    fn fill_from(
        &self,
        cursor: &mut Cursor,
        piece: &mut Piece<V>,
        stretch: &Stretch,
        from: Position,
        hasher: &RandomState,
        wanted: Range<'_>,
    ) -> Result<(), StopError> {
        let failed = journal_failed::<V>;
        let source = cursor.journal().clone();
        let journal = source.id();
        let mut names = Names::default();
        let mut keys = Keys::none();
        while cursor.position() < stretch.to && !piece.is_full() {
            let Some(batch) = cursor.next_batch().map_err(failed)? else { break };
            let header = &batch.batch.header;
            if header.base_position < from {
                continue; // of the piece in front
            }
            if !stretch.allows(&batch.end()) {
                let position = batch.end().position;
                return Err(StopError::Order { view: V::NAME, journal, position });
            }
            let recorded_at_us = header.time_us;
            let place = (journal, batch.segment);
            let mut counts = piece.tallies.get(&place).copied().unwrap_or_default();
            for (position, record) in (header.base_position.get()..).zip(batch.batch.records()) {
                let position = Position::new(position);
                let record =
                    record.map_err(|e| failed(invalid_record(&source, &batch, position, e)))?;
                let at = Place { journal, position, recorded_at_us };
                let wrong = |cause| {
                    stop_at(V::NAME, &at.recorded(&record, &mut Names::default(), ()), cause)
                };
                if self.means.discarded.has_all_of(at.locator(), record.id) {
                    counts.discarded += 1;
                    continue;
                }
                if planted::is(Bug::SkipEvent) && position.get() % 16 == 7 {
                    continue;
                }
                if is_known::<V::Event>(&record) {
                    self.deadly.check(|| at.of(&record, Stage::Route)).map_err(wrong)?;
                }
                let decoded = decode::<V::Event>(&record).map_err(wrong)?;
                match decoded.is_foreign() {
                    true => counts.skipped += 1,
                    false => counts.applied += 1,
                }
                for data in decoded {
                    let event = at.recorded(&record, &mut names, data);
                    // Keys are encoded by the author's code, too.
                    let routed = guard(|| {
                        self.view.route(&event, &mut keys);
                        self.leave_out(at.locator(), record.id, &mut keys);
                        piece.add(event, &mut keys, hasher, wanted);
                    });
                    routed.map_err(wrong)?;
                }
                piece.stored_events += 1;
            }
            piece.tallies.insert(place, counts);
            piece.bytes += batch.batch.bytes().len() as u64;
            piece.ends_at(batch.end());
        }
        Ok(())
    }
}

/// The keys of a pass.
#[derive(Clone, Copy)]
struct Range<'a> {
    from: &'a [u8],
    to: Option<&'a [u8]>,
}

impl Range<'_> {
    fn holds(self, key: &[u8]) -> bool {
        (self.from.is_empty() || key >= self.from) && self.to.is_none_or(|to| key < to)
    }
}

impl<V: View> Piece<V> {
    fn empty() -> Self {
        Self {
            events: Vec::new(),
            routes: (0..PARTS).map(|_| Vec::new()).collect(),
            keys: Vec::new(),
            routed: 0,
            tallies: Tallies::new(),
            bytes: 0,
            stored_events: 0,
            ends: SmallVec::new(),
            rest: None,
        }
    }

    fn routed_bytes(&self) -> usize {
        self.routed * size_of::<Route<V::Key>>() + self.keys.len()
    }

    fn is_full(&self) -> bool {
        self.routed_bytes() >= ROUTED_BYTES
    }

    /// Empty again, with the memory that it has, unless a batch has needed an unusual amount.
    fn clear(&mut self) {
        if self.routed_bytes() > 2 * ROUTED_BYTES {
            *self = Self::empty();
        }
        self.events.clear();
        self.routes.iter_mut().for_each(Vec::clear);
        self.keys.clear();
        self.tallies.clear();
        (self.routed, self.bytes, self.stored_events) = (0, 0, 0);
        self.ends.clear();
        self.rest = None;
    }

    fn ends_at(&mut self, end: Checkpoint) {
        match self.ends.iter_mut().find(|it| it.journal == end.journal) {
            Some(last) => *last = end,
            None => self.ends.push(end),
        }
    }

    fn add(
        &mut self,
        event: Recorded<V::Event>,
        keys: &mut Keys<V::Key>,
        hasher: &RandomState,
        wanted: Range<'_>,
    ) {
        let index = self.events.len() as u32;
        let own = self.keys.len();
        for key in keys.0.drain(..) {
            let key_at = self.keys.len();
            key.encode_key(&mut self.keys);
            let bytes = self.keys.get(key_at..).unwrap_or_default();
            let hash = hasher.hash_one(bytes);
            let part = self.routes.get_mut(part_of(hash));
            let routes = part.filter(|_| wanted.holds(bytes));
            let Some(routes) = routes else {
                self.keys.truncate(key_at);
                continue;
            };
            // A key named twice by one event is folded once.
            let again = routes.iter().rev().take_while(|route| route.event == index).any(|route| {
                let at = route.key_at as usize;
                route.hash == hash
                    && at >= own
                    && self.keys.get(at..at + route.key_len as usize) == Some(bytes)
            });
            if again {
                self.keys.truncate(key_at);
                continue;
            }
            let key_len = bytes.len() as u32;
            routes.push(Route { hash, event: index, key_at: key_at as u32, key_len, key });
            self.routed += 1;
        }
        self.events.push(event);
    }

    fn key(&self, route: &Route<V::Key>) -> &[u8] {
        let at = route.key_at as usize;
        self.keys.get(at..at + route.key_len as usize).unwrap_or_default()
    }
}

impl Part {
    /// Folds what the pieces have for this part, from where it has stopped on.
    #[allow(clippy::too_many_arguments, reason = "what one part is given by its pass")]
    fn fold<V: View>(
        &mut self,
        view: &V,
        part: usize,
        pieces: &[Piece<V>],
        hasher: &RandomState,
        deadly: &Deadly,
        allowed: &Allowed,
        below: Option<&[u8]>,
    ) -> Result<(), Stopped> {
        let (begun, mut skipped) = self.at;
        for (nth, piece) in pieces.iter().enumerate().skip(begun) {
            let all = piece.routes.get(part).map_or(&[][..], Vec::as_slice);
            let mut routes = all.get(std::mem::take(&mut skipped)..).unwrap_or_default();
            let mut fetched_until = routes.len() + 1;
            while let Some(first) = routes.first() {
                if routes.len() < fetched_until {
                    self.fetch(piece, routes.get(..FETCHED).unwrap_or(routes));
                    fetched_until = routes.len().saturating_sub(FETCHED) + 1;
                }
                let key = piece.key(first);
                let same = |it: &&Route<V::Key>| it.hash == first.hash && piece.key(it) == key;
                let (run, rest) = routes.split_at(routes.iter().take_while(same).count());
                if below.is_none_or(|below| key < below) {
                    match self.fold_run(view, piece, key, run, hasher, deadly, allowed) {
                        Ok(true) => {}
                        Ok(false) => {
                            self.at = (nth, all.len() - routes.len());
                            return Err(Stopped::Full);
                        }
                        Err((at, event, cause)) => {
                            self.at = (pieces.len(), 0);
                            let failure = Box::new(stop_at(V::NAME, event, cause));
                            return Err(Stopped::Failed((nth, at), failure));
                        }
                    }
                }
                routes = rest;
            }
        }
        self.at = (pieces.len(), 0);
        Ok(())
    }

    /// Looks at the rows of some routes. Each lies somewhere else in memory; the processor fetches several at once as long
    /// as nothing is done with them in between.
    fn fetch<V: View>(&self, piece: &Piece<V>, routes: &[Route<V::Key>]) {
        // Few are near anyway.
        let far = self.rows.len() >= FAR;
        for route in routes.iter().filter(|_| far) {
            let key = piece.key(route);
            let found = self.rows.find(route.hash, |row| row.key.as_slice() == key);
            std::hint::black_box(found.is_some());
        }
    }

    /// Folds events of the same key that follow each other. False if there is no memory for what becomes of them: nothing is
    /// changed, then.
    #[allow(clippy::too_many_arguments, reason = "what one part is given by its pass")]
    fn fold_run<'p, V: View>(
        &mut self,
        view: &V,
        piece: &'p Piece<V>,
        key: &[u8],
        run: &[Route<V::Key>],
        hasher: &RandomState,
        deadly: &Deadly,
        allowed: &Allowed,
    ) -> Result<bool, (u32, &'p Recorded<V::Event>, EventFailure)> {
        let hash = run.first().map_or(0, |route| route.hash);
        let hash_of = |row: &Row| hasher.hash_one(row.key.as_slice());
        if !self.has_place(allowed, hash_of) {
            return Ok(false);
        }
        let entry = self.rows.entry(hash, |row| row.key.as_slice() == key, hash_of);
        let mut stored = match &entry {
            Entry::Occupied(entry) => entry.get().row.as_ref(),
            Entry::Vacant(_) => None,
        };
        let mut row = None;
        let mut changed_by = None;
        for (n, route) in run.iter().enumerate() {
            let Some(event) = piece.events.get(route.event as usize) else { continue };
            let at = route.event;
            deadly.check(|| At::of(event, Stage::Fold)).map_err(|cause| (at, event, cause))?;
            if let Some(bytes) = stored.take() {
                let decoded = Bincode::decode::<V::Row>(bytes);
                row = Some(decoded.map_err(|error| (at, event, EventFailure::StoredRow(error)))?);
            }
            // The last one may have it: if it changes nothing, it is as it was stored.
            let is_last = n + 1 == run.len() && changed_by.is_none();
            let given = if is_last { row.take() } else { row.clone() };
            let folded = guard(|| view.fold(&route.key, given, event));
            let folded = folded.map_err(|cause| (at, event, cause))?;
            match folded.map_err(|error| (at, event, EventFailure::Fold(error.0)))? {
                Fold::Put(new) => (row, changed_by) = (Some(new), Some((at, event))),
                Fold::Delete => (row, changed_by) = (None, Some((at, event))),
                Fold::Keep => {}
            }
        }
        let Some((at, event)) = changed_by else { return Ok(true) };
        let bytes = row.as_ref().map(encode_row).transpose().map_err(|cause| (at, event, cause))?;
        Ok(match entry {
            Entry::Occupied(mut entry) => {
                let row = &mut entry.get_mut().row;
                let (less, more) = (spilled(row.as_ref()), spilled(bytes.as_ref()));
                let is_there = self.spilled.change(less, more, allowed);
                if is_there {
                    *row = bytes;
                }
                is_there
            }
            Entry::Vacant(_) if bytes.is_none() => true,
            Entry::Vacant(entry) => {
                let row = Row { key: Bytes::from_slice(key), row: bytes };
                let is_there = self.spilled.change(0, row.spilled_bytes(), allowed);
                if is_there {
                    entry.insert(row);
                }
                is_there
            }
        })
    }
}

/// What both passes have counted.
fn least(mut some: Tallies, others: &Tallies) -> Tallies {
    for (segment, tally) in &mut some {
        *tally = tally.least(others.get(segment).copied().unwrap_or_default());
    }
    some
}

/// Nothing is parked: an event that can't be applied ends the build.
fn progress_at(checkpoints: Checkpoints, skipped_events: u64) -> Progress {
    Progress { checkpoints, skipped_events, parked: ParkedCounts::default() }
}

const fn part_of(hash: u64) -> usize {
    // The table takes the lowest and the highest bits.
    (hash >> 32) as usize % PARTS
}

/// Forgets the upper half of the keys; where it begins. `None` if there is only one key.
fn halve(parts: &mut [Part], hasher: &RandomState) -> Option<Vec<u8>> {
    let each = SAMPLE / PARTS;
    let mut sample: Vec<&[u8]> =
        parts.iter().flat_map(|part| part.rows.iter().take(each)).map(|row| &row.key[..]).collect();
    sample.sort_unstable();
    sample.dedup();
    let middle = sample.get(sample.len() / 2).filter(|_| sample.len() > 1)?.to_vec();
    parts.par_iter_mut().for_each(|part| {
        part.rows.retain(|row| row.key.as_slice() < middle.as_slice());
        part.rows.shrink_to_fit(|row| hasher.hash_one(row.key.as_slice()));
        part.spilled.bytes = part.rows.iter().map(Row::spilled_bytes).sum();
    });
    Some(middle)
}

fn journal_failed<V: View>(source: ReadError) -> StopError {
    StopError::Journal { view: V::NAME, source }
}

/// Rows of a pass: each part in order.
struct Sorted(Vec<Vec<Row>>);

impl Sorted {
    /// Parted by keys into so many ranges of about the same number of rows, or fewer: of each range what each part has.
    fn ranges<'r>(&'r self, count: usize) -> Vec<Vec<&'r [Row]>> {
        let each = (SAMPLE / PARTS).max(count);
        let some =
            |rows: &'r Vec<Row>| (0..each).filter_map(move |n| rows.get(n * rows.len() / each));
        let mut sample: Vec<&[u8]> = self.0.iter().flat_map(some).map(|row| &row.key[..]).collect();
        sample.sort_unstable();
        sample.dedup();
        let begins = (1..count).filter_map(|n| sample.get(n * sample.len() / count).copied());
        let mut left: Vec<&[Row]> = self.0.iter().map(Vec::as_slice).collect();
        let mut ranges = Vec::new();
        for begin in begins {
            let parts = left
                .iter()
                .map(|rows| rows.split_at(rows.partition_point(|row| row.key.as_slice() < begin)));
            let (range, rest) = parts.unzip();
            ranges.push(range);
            left = rest;
        }
        ranges.push(left);
        ranges.retain(|range| range.iter().any(|rows| !rows.is_empty()));
        ranges
    }
}

/// Rows of several parts, in order.
fn merged<'r>(parts: &[&'r [Row]]) -> impl Iterator<Item = &'r Row> {
    let mut left = parts.to_vec();
    let head = |(n, rows): (usize, &&'r [Row])| Some(Reverse((rows.first()?.key.as_slice(), n)));
    let mut heads: BinaryHeap<_> = left.iter().enumerate().filter_map(head).collect();
    std::iter::from_fn(move || {
        let mut least = heads.peek_mut()?;
        let rows = left.get_mut(least.0.1)?;
        let (row, rest) = rows.split_first()?;
        *rows = rest;
        match rest.first() {
            Some(next) => least.0.0 = next.key.as_slice(),
            None => drop(PeekMut::pop(least)),
        }
        Some(row)
    })
}

/// Writes rows into sorted files, and their index entries into runs.
fn write<V: View>(
    sorted: &Sorted,
    indexes: &Indexes<V>,
    files: &mut Files<'_>,
    runs: &Runs,
) -> Result<(), StopError> {
    let len = |row: &Row| row.key.len() + row.row.as_ref().map_or(0, SmallVec::len);
    let total: usize = sorted.0.par_iter().map(|rows| rows.iter().map(len).sum::<usize>()).sum();
    let ranges = sorted.ranges(total.div_ceil(FILE_BYTES).max(rayon::current_num_threads()));
    let paths: Vec<PathBuf> = ranges.iter().map(|_| files.next()).collect();
    let written: Result<Vec<()>, StopError> = ranges
        .par_iter()
        .zip(&paths)
        .map(|(range, path)| {
            write_file(merged(range), files, path)
                .map_err(|source| StopError::Storage { view: V::NAME, source })?;
            if indexes.is_empty() {
                return Ok(());
            }
            let mut run = runs.begin();
            let failed = |error| StopError::Storage { view: V::NAME, source: files.failed(error) };
            for row in merged(range) {
                add_entries(row, indexes, &mut run)
                    .map_err(|cause| StopError::Index { view: V::NAME, cause })?
                    .map_err(failed)?;
            }
            run.end().map_err(failed)
        })
        .collect();
    written?;
    files.keep(paths);
    Ok(())
}

fn write_file<'r>(
    rows: impl Iterator<Item = &'r Row>,
    files: &Files<'_>,
    path: &Path,
) -> Result<(), StorageError> {
    let entries = rows.filter_map(|row| {
        let bytes = row.row.as_ref()?;
        Some((row_key(|out| out.extend_from_slice(&row.key)), bytes.as_slice()))
    });
    files.write(path, entries)
}

/// Adds a row's index entries to a run.
fn add_entries<V: View>(
    row: &Row,
    indexes: &Indexes<V>,
    run: &mut Run<'_>,
) -> Result<io::Result<()>, EventFailure> {
    let Some(bytes) = &row.row else { return Ok(Ok(())) };
    let key = guard(|| decode_all::<V::Key>(&row.key))?.map_err(EventFailure::StoredKey)?;
    let decoded = guard(|| Bincode::decode::<V::Row>(bytes))?.map_err(EventFailure::StoredRow)?;
    let row_key = row_key(|out| out.extend_from_slice(&row.key));
    let entries = guard(|| indexes.entries(&key, &row_key, &decoded))?;
    Ok(entries.iter().try_for_each(|entry| run.add(entry)))
}

/// Why writing index entries ended early.
enum EntriesEnded {
    Cancelled(Cancelled),
    Failed(StorageError),
}

/// Merges the runs of index entries into sorted files.
fn write_entries(runs: Runs, files: &mut Files<'_>, control: &Control) -> Result<(), EntriesEnded> {
    let mut failure = None;
    let failed = |error| EntriesEnded::Failed(files.failed(error));
    let mut entries = runs.merge(failed, || control.check().map_err(EntriesEnded::Cancelled))?;
    let mut entry = entries.next();
    while entry.is_some() {
        control.check().map_err(EntriesEnded::Cancelled)?;
        let path = files.next();
        let mut bytes = 0;
        let file = std::iter::from_fn(|| match entry.take() {
            Some(Ok(found)) if bytes < FILE_BYTES => {
                bytes += found.len();
                entry = entries.next();
                Some((found, &[][..]))
            }
            Some(Err(error)) => {
                failure = Some(error);
                None
            }
            other => {
                entry = other; // of the next file
                None
            }
        });
        files.write(&path, file).map_err(EntriesEnded::Failed)?;
        files.keep([path]);
        if let Some(error) = failure {
            return Err(EntriesEnded::Failed(files.failed(error)));
        }
    }
    Ok(())
}
