//! The file in which the order of intake is recorded.
//!
//! ```text
//! header │ run 0 │ run 1 │ … │ run n ┊ torn
//!                               ▲ known: what was read or written, and synced
//! ```
//! - It only grows. Whoever appends holds the lock file from the reading of what others have appended until its own records
//!   are synced: there is one order, whoever the views are, in this process or another.
//! - A record is known only when it is durable. The last write of another process may have been torn, or lie in the page
//!   cache only: what can be of it is written again and synced before it is believed.
//! - Only what was never known to anybody is cut, but for runs of a history that a journal has no more. A record tells which
//!   ones were written together with it: only what can be of the last write is taken for torn. It is cut by whoever goes on behind
//!   it; until then a view whose rows are further can tell that it was whole once.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::super::error::ViewError;
use super::super::generation::{lock_patiently, lock_within};
use super::super::sources::{Checkpoints, Sources};
use crate::error::{IoContext, IoError};
use crate::format::FormatError;
use crate::format::batch::{Link, genesis};
use crate::format::intake::{IntakeHeader, RUN_BYTES, Run};
use crate::fs::{File, Fs, OpenMode, read_exact_at, read_full_at, write_all_at};
use crate::journal::{Comparison, Journal};
use crate::position::{JournalId, Position};

/// The folder beside the views.
const FOLDER: &str = ".intake";
/// So many records are read at once.
const BLOCK: u64 = 1024;
const ACTION: &str = "recording the order of intake";

/// The order in which a set of journals is taken in.
#[derive(Debug)]
pub(in super::super) struct Log {
    fs: Arc<dyn Fs>,
    path: PathBuf,
    header: IntakeHeader,
    known: Mutex<Known>,
}

/// What is durable, and was seen here.
#[derive(Clone, Debug)]
struct Known {
    file: Arc<dyn File>,
    count: u64,
    /// Where each journal is behind them, in the order of the ids.
    ends: Vec<Link>,
    /// Number of each one's last record. If another one is there, somebody has cut the file meanwhile.
    last: Vec<Option<u64>>,
    /// How often what was known was cut.
    cuts: u64,
}

/// A place between two records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) count: u64,
    cuts: u64,
}

impl Log {
    /// That of these journals in this folder of views. It begins empty.
    pub(super) fn open(
        fs: &Arc<dyn Fs>,
        views_dir: &Path,
        ids: &[JournalId],
    ) -> Result<Self, ViewError> {
        let (header, path) = place(views_dir, ids)?;
        if let Some(dir) = path.parent() {
            fs.create_dir_all(dir).context(ACTION, dir)?;
        }
        let _lock = lock_patiently(&**fs, &lock_of(&path))?;
        let known = Known::new(begin(&**fs, &path, &header)?, &header);
        let log = Self { fs: Arc::clone(fs), path, header, known: Mutex::new(known) };
        log.adopt(&mut log.known.lock())?;
        Ok(log)
    }

    /// The same, shared with whoever has it open in this process.
    pub(super) fn shared(
        fs: &Arc<dyn Fs>,
        views_dir: &Path,
        ids: &[JournalId],
    ) -> Result<Arc<Self>, ViewError> {
        static ALL: Mutex<BTreeMap<PathBuf, Weak<Log>>> = Mutex::new(BTreeMap::new());
        let (_, path) = place(views_dir, ids)?;
        let path = std::path::absolute(&path).context(ACTION, &path)?;
        let mut all = ALL.lock();
        all.retain(|_, log| log.strong_count() > 0);
        if let Some(log) = all.get(&path).and_then(Weak::upgrade) {
            log.open_again()?;
            return Ok(log);
        }
        let log = Arc::new(Self::open(fs, views_dir, ids)?);
        all.insert(path, Arc::downgrade(&log));
        Ok(log)
    }

    /// As far as it can be read now, beside whoever records; nothing is changed. Empty if there is none.
    pub(super) fn read_only(
        fs: &Arc<dyn Fs>,
        views_dir: &Path,
        ids: &[JournalId],
    ) -> Result<Option<Self>, ViewError> {
        let (header, path) = place(views_dir, ids)?;
        let file = match fs.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.context(ACTION, &path)?,
        };
        check_header(&*file, &path, &header)?;
        let log =
            Self { fs: Arc::clone(fs), path, known: Mutex::new(Known::new(file, &header)), header };
        {
            let mut known = log.known.lock();
            log.read_on(&mut known)?;
            while let Err(error) = log.check_tail(&known) {
                // Others go on recording.
                let before = known.count;
                log.read_on(&mut known)?;
                if known.count == before {
                    return Err(error);
                }
            }
        }
        Ok(Some(log))
    }

    /// It may have been deleted, or cut, since it was opened.
    fn open_again(&self) -> Result<(), ViewError> {
        let mut known = self.known.lock();
        if let Some(dir) = self.path.parent() {
            self.fs.create_dir_all(dir).context(ACTION, dir)?;
        }
        let _lock = lock_patiently(&*self.fs, &lock_of(&self.path))?;
        let file = begin(&*self.fs, &self.path, &self.header)?;
        let mut now = Known { cuts: known.cuts, ..Known::new(file, &self.header) };
        self.adopt(&mut now)?;
        now.cuts += u64::from(!self.has(&*now.file, &known)?);
        *known = now;
        Ok(())
    }

    /// Its bytes, as far as it is known.
    pub(super) fn bytes(&self) -> Result<Vec<u8>, ViewError> {
        let known = self.known.lock();
        let mut bytes = vec![0; self.header.offset_of(known.count) as usize];
        read_exact_at(&*known.file, &mut bytes, 0).context(ACTION, &self.path)?;
        Ok(bytes)
    }

    /// Goes by an order that was recorded elsewhere, by which rows of `at` were made: all of it, if nothing is recorded here.
    /// False if another order is recorded here up to there, or it isn't one of these journals.
    pub(super) fn install(&self, bytes: &[u8], at: &Checkpoints) -> Result<bool, ViewError> {
        let front = bytes.get(..self.header.len_bytes() as usize).unwrap_or_default();
        let records = bytes.get(front.len()..).unwrap_or_default().chunks(RUN_BYTES);
        let runs = (0..).zip(records).map(|(n, bytes)| self.header.decode_run(n, bytes));
        let runs: Vec<Run> = match runs.collect() {
            Ok(runs) if IntakeHeader::decode(front).as_ref() == Ok(&self.header) => runs,
            _ => return Ok(false),
        };
        let mut way = Way::new(&self.header, at);
        if !runs.iter().find_map(|run| way.pass(run)).unwrap_or_else(|| way.is_there(None)) {
            return Ok(false);
        }
        let mut known = self.known.lock();
        let _lock = lock_patiently(&*self.fs, &lock_of(&self.path))?;
        if known.count == 0 {
            known.file = begin(&*self.fs, &self.path, &self.header)?; // an empty one may have been replaced
        }
        self.adopt(&mut known)?;
        if known.count > 0 {
            let mut here = Vec::new();
            for from in (0..known.count).step_by(BLOCK as usize) {
                here.extend(self.block(&*known.file, from, known.count)?);
            }
            return Ok(turns(&here, at) == turns(&runs, at));
        }
        let mut next = known.clone();
        if !runs.iter().all(|run| self.learn(&mut next, run)) {
            return Ok(false);
        }
        // As a whole: of a write of many records, a part would be damage.
        let new = self.path.with_extension("new");
        match self.fs.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
        .context(ACTION, &new)?;
        let file = self.fs.open(&new, OpenMode::CreateNew).context(ACTION, &new)?;
        write_all_at(&*file, bytes, 0).context(ACTION, &new)?;
        file.sync_data().context(ACTION, &new)?;
        self.fs.rename(&new, &self.path).context(ACTION, &self.path)?;
        let dir = self.path.parent().unwrap_or(&self.path);
        self.fs.sync_dir(dir).context(ACTION, dir)?;
        *known = Known { cuts: known.cuts, ..Known::new(file, &self.header) };
        self.read_on(&mut known)?;
        Ok(known.count == runs.len() as u64)
    }

    /// As far as it is known.
    pub(super) fn mark(&self) -> Mark {
        let known = self.known.lock();
        Mark { count: known.count, cuts: known.cuts }
    }

    /// The beginning.
    pub(super) fn beginning(&self) -> Mark {
        Mark { count: 0, cuts: self.known.lock().cuts }
    }

    /// Where each journal is behind all that is known.
    pub(super) fn end_of(&self, journal: JournalId) -> Link {
        let ends = &self.known.lock().ends;
        let found = self.header.journals().iter().zip(ends).find(|(id, _)| **id == journal);
        found.map_or_else(|| start_of(journal), |(_, end)| *end)
    }

    /// Records from `mark` on, which moves behind them; none at the end of what is known.
    pub(super) fn next(&self, mark: &mut Mark) -> Result<Vec<Run>, ViewError> {
        let (file, count) = {
            let known = self.known.lock();
            if known.cuts != mark.cuts || known.count < mark.count {
                return Err(self.stale());
            }
            (Arc::clone(&known.file), known.count)
        };
        let to = count.min(mark.count.saturating_add(BLOCK));
        let runs = self.block(&*file, mark.count, to)?;
        mark.count += runs.len() as u64;
        if mark.count < to {
            return Err(self.damaged(mark.count));
        }
        Ok(runs)
    }

    /// Goes on behind `mark`, if nobody else has: with the runs that `more` makes of where the journals are. They are durable
    /// when this returns.
    pub(super) fn extend<E: From<ViewError>>(
        &self,
        mark: Mark,
        patience: Duration,
        more: impl FnOnce(&dyn Fn(JournalId) -> Link) -> Result<Vec<Run>, E>,
    ) -> Result<(), E> {
        let mut known = self.known.lock();
        if known.cuts != mark.cuts {
            return Err(self.stale().into());
        }
        if known.count > mark.count {
            return Ok(());
        }
        let _lock = lock_within(&*self.fs, &lock_of(&self.path), patience)?;
        if known.count == 0 {
            known.file = begin(&*self.fs, &self.path, &self.header)?; // an empty one may have been replaced
        }
        self.adopt(&mut known)?;
        if known.count > mark.count {
            return Ok(());
        }
        let ends = known.ends.clone();
        let journals = self.header.journals();
        let end_of = |journal| {
            let found = journals.iter().zip(&ends).find(|(id, _)| **id == journal);
            found.map_or_else(|| start_of(journal), |(_, end)| *end)
        };
        let runs = more(&end_of)?;
        Ok(self.append(&mut known, &runs)?)
    }

    fn append(&self, known: &mut Known, runs: &[Run]) -> Result<(), ViewError> {
        if runs.is_empty() {
            return Ok(());
        }
        let mut next = known.clone();
        if !runs.iter().all(|run| self.learn(&mut next, run)) {
            return Err(self.stale()); // a journal goes on in another way than was recorded
        }
        let numbered = (0_u16..).zip(known.count..).zip(runs);
        let bytes: Vec<u8> = numbered
            .filter_map(|((in_front, number), run)| self.header.encode_run(number, in_front, run))
            .flatten()
            .collect();
        let at = self.header.offset_of(known.count);
        self.cut_torn(known).context(ACTION, &self.path)?;
        let written = write_all_at(&*known.file, &bytes, at).and_then(|()| known.file.sync_data());
        if written.is_err() {
            // An effort: what is left of it is found by whoever appends next, and written again.
            drop(known.file.set_len(at));
        }
        written.context(ACTION, &self.path)?;
        *known = next;
        Ok(())
    }

    /// What others have appended since, which is durable then, or else isn't known. Under the lock.
    fn adopt(&self, known: &mut Known) -> Result<(), ViewError> {
        if !self.has(&*known.file, known)? {
            return Err(self.stale());
        }
        let mut found = known.clone();
        self.read_on(&mut found)?;
        let size = self.check_tail(&found)?;
        if size > self.header.offset_of(found.count) || found.count > known.count {
            self.write_again(&found, known.count).context(ACTION, &self.path)?;
        }
        *known = found;
        Ok(())
    }

    /// Whether what is known is in this file. Each journal's last record is compared: whoever cuts the file does so because of
    /// a run of a history that is lost, and so takes that journal's last one away, which isn't recorded again. If it were,
    /// because the history has come back meanwhile, then where the journals are would be right, and whoever goes on from there.
    fn has(&self, file: &dyn File, known: &Known) -> Result<bool, IoError> {
        let ends = self.header.journals().iter().zip(&known.ends).zip(&known.last);
        for ((journal, end), last) in ends {
            let Some(last) = *last else { continue };
            let run = Run { journal: *journal, end: *end };
            if self.block(file, last, last + 1)?.first() != Some(&run) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Of what lies behind what is known, nothing may be taken for a continuation of what is written there next.
    fn cut_torn(&self, known: &Known) -> io::Result<()> {
        let end = self.header.offset_of(known.count);
        if known.file.size()? > end {
            known.file.set_len(end)?;
            known.file.sync_data()?;
        }
        Ok(())
    }

    /// What may have been written last, but not what lies in front of record `from`.
    fn write_again(&self, found: &Known, from: u64) -> io::Result<()> {
        let in_one_write = self.header.journals().len() as u64;
        let from = from.max(found.count.saturating_sub(in_one_write));
        let (at, end) = (self.header.offset_of(from), self.header.offset_of(found.count));
        let mut bytes = vec![0; (end - at) as usize];
        read_exact_at(&*found.file, &mut bytes, at)?;
        write_all_at(&*found.file, &bytes, at)?;
        found.file.sync_data()
    }

    /// What isn't whole can only be of the last write, which has one run of each journal at the most. The file's size.
    fn check_tail(&self, known: &Known) -> Result<u64, ViewError> {
        let size = known.file.size().context(ACTION, &self.path)?;
        let from = self.header.offset_of(known.count);
        let in_one_write = self.header.journals().len() as u64 * RUN_BYTES as u64;
        let torn = size.saturating_sub(from);
        if torn > in_one_write {
            return Err(self.damaged(known.count));
        }
        let mut bytes = vec![0; torn as usize];
        let read = read_full_at(&*known.file, &mut bytes, from).context(ACTION, &self.path)?;
        bytes.truncate(read);
        // A write begins when all in front of it is durable.
        let mut behind = (known.count..).zip(bytes.chunks(RUN_BYTES)).skip(1);
        let is_later = |(n, bytes)| {
            self.header.decode_written(n, bytes).is_ok_and(|(_, first)| first > known.count)
        };
        if behind.any(is_later) { Err(self.damaged(known.count)) } else { Ok(size) }
    }

    /// Reads what lies behind what is known.
    fn read_on(&self, known: &mut Known) -> Result<(), IoError> {
        loop {
            let runs = self.block(&*known.file, known.count, known.count + BLOCK)?;
            for run in &runs {
                if !self.learn(known, run) {
                    return Ok(());
                }
            }
            if (runs.len() as u64) < BLOCK {
                return Ok(());
            }
        }
    }

    /// False if it can't be the next run.
    fn learn(&self, known: &mut Known, run: &Run) -> bool {
        let at = self.header.journals().iter().position(|id| *id == run.journal);
        let Some(end) = at.and_then(|at| known.ends.get_mut(at)) else { return false };
        if run.end.position <= end.position || run.end.offset <= end.offset {
            return false;
        }
        *end = run.end;
        if let Some(last) = at.and_then(|at| known.last.get_mut(at)) {
            *last = Some(known.count);
        }
        known.count += 1;
        true
    }

    /// The records with these numbers, up to the first one that isn't whole.
    fn block(&self, file: &dyn File, from: u64, to: u64) -> Result<Vec<Run>, IoError> {
        let count = to.saturating_sub(from).min(BLOCK);
        let mut bytes = vec![0; count as usize * RUN_BYTES];
        let read = read_full_at(file, &mut bytes, self.header.offset_of(from));
        bytes.truncate(read.context(ACTION, &self.path)?);
        let records = bytes.chunks_exact(RUN_BYTES);
        let decoded = (from..).zip(records).map(|(n, bytes)| self.header.decode_run(n, bytes));
        Ok(decoded.map_while(Result::ok).collect())
    }

    /// The last run of a journal among the first `before` records, with its number.
    fn last_of(
        &self,
        known: &Known,
        journal: JournalId,
        mut before: u64,
    ) -> Result<Option<(u64, Run)>, ViewError> {
        while before > 0 {
            let from = before.saturating_sub(BLOCK);
            let runs = self.block(&*known.file, from, before)?;
            if runs.len() as u64 != before - from {
                return Err(self.damaged(from + runs.len() as u64));
            }
            if let Some(at) = runs.iter().rposition(|run| run.journal == journal) {
                return Ok(runs.get(at).map(|run| (from + at as u64, *run)));
            }
            before = from;
        }
        Ok(None)
    }

    /// Cuts what is of a history that a journal has no more, and what was recorded behind it.
    pub(super) fn heed(&self, sources: &Sources) -> Result<(), ViewError> {
        let mut known = self.known.lock();
        let _lock = lock_patiently(&*self.fs, &lock_of(&self.path))?;
        self.adopt(&mut known)?;
        let mut keep = known.count;
        for journal in sources.iter() {
            keep = keep.min(self.valid(&known, journal)?);
        }
        if keep < known.count {
            let file = Arc::clone(&known.file);
            file.set_len(self.header.offset_of(keep)).context(ACTION, &self.path)?;
            file.sync_data().context(ACTION, &self.path)?;
            *known = Known { cuts: known.cuts + 1, ..Known::new(file, &self.header) };
            self.adopt(&mut known)?;
        }
        Ok(())
    }

    /// How many records there are in front of the first one that isn't of this journal's history.
    fn valid(&self, known: &Known, journal: &Journal) -> Result<u64, ViewError> {
        let end = journal.end().position;
        // One that is appended to here won't come back to what it has lost. Any other may get as far again, but for where its
        // tail was set aside: nothing will ever be there again.
        let is_all_there = journal.is_written_here() && journal.role().appends();
        let set_aside = if is_all_there { Vec::new() } else { journal.tails_set_aside() };
        let is_set_aside = |Link { offset, position, chain }: Link| {
            // Only places are known: no epoch, and no incarnation.
            let is_in = |tail: &Journal| tail.compare_place(offset, position, chain);
            let mut tails = set_aside.iter().filter(|(from, _)| *from < position);
            tails.any(|(_, tail)| matches!(is_in(tail), Ok(Comparison::Equal)))
        };
        let is_of_it = |run: &Run| {
            let Link { offset, position, chain } = run.end;
            // What can't be read is told by whoever gets there.
            let compared = journal.compare_place(offset, position, chain);
            position <= end && matches!(compared, Ok(Comparison::Equal) | Err(_))
        };
        let mut last = self.last_of(known, journal.id(), known.count)?;
        while let Some((number, run)) = last
            && run.end.position > end
            && !is_all_there
            && !is_set_aside(run.end)
        {
            last = self.last_of(known, journal.id(), number)?;
        }
        let Some((number, _)) = last.filter(|(_, run)| !is_of_it(run)) else {
            return Ok(known.count);
        };
        // Those of its history are the first ones of the journal's.
        let (mut of_it, mut not) = (0, number);
        while of_it < not {
            let middle = of_it + (not - of_it) / 2;
            match self.last_of(known, journal.id(), middle + 1)? {
                Some((number, run)) if !is_of_it(&run) => not = number,
                _ => of_it = middle + 1,
            }
        }
        Ok(not)
    }

    /// Whether views that have come as far as `at` have taken the journals in in this order.
    pub(super) fn leads_to(&self, at: &Checkpoints) -> Result<bool, ViewError> {
        let mut way = Way::new(&self.header, at);
        let mut mark = self.beginning();
        loop {
            let runs = self.next(&mut mark)?;
            if runs.is_empty() {
                break;
            }
            if let Some(found) = runs.iter().find_map(|run| way.pass(run)) {
                return Ok(found);
            }
        }
        if way.is_there(None) {
            return Ok(true);
        }
        if mark.count == 0 {
            return Ok(false); // nothing says that this is the order by which they were made
        }
        // Views are never ahead of what is recorded: what looks torn behind it was whole once.
        let file = Arc::clone(&self.known.lock().file);
        let size = file.size().context(ACTION, &self.path)?;
        let (next, behind) = (mark.count, mark.count + 1);
        let is_there = size >= self.header.offset_of(behind);
        if is_there && self.block(&*file, next, behind)?.is_empty() {
            return Err(self.damaged(next));
        }
        Ok(false)
    }

    pub(super) fn stale(&self) -> ViewError {
        ViewError::StaleIntake { path: self.path.clone() }
    }

    fn damaged(&self, number: u64) -> ViewError {
        let file_offset = self.header.offset_of(number);
        ViewError::DamagedIntake { path: self.path.clone(), file_offset }
    }
}

impl Known {
    fn new(file: Arc<dyn File>, header: &IntakeHeader) -> Self {
        let ends = header.journals().iter().map(|id| start_of(*id)).collect();
        Self { file, count: 0, ends, last: vec![None; header.journals().len()], cuts: 0 }
    }
}

/// Follows a recorded order until it is known whether somebody who is at `at` has come along it.
struct Way<'a> {
    at: &'a Checkpoints,
    here: Vec<(JournalId, Position)>,
}

impl<'a> Way<'a> {
    fn new(header: &IntakeHeader, at: &'a Checkpoints) -> Self {
        Self { at, here: header.journals().iter().map(|id| (*id, Position::START)).collect() }
    }

    /// The next run; `None` if it ends in front of `at`.
    fn pass(&mut self, Run { journal, end }: &Run) -> Option<bool> {
        if self.at.position(*journal) < end.position {
            return Some(self.is_there(Some(*journal)));
        }
        let moved = self.here.iter_mut().find(|(id, _)| id == journal);
        moved.into_iter().for_each(|(_, position)| *position = end.position);
        None
    }

    /// Whether all of the journals, or all but this one, are where they are at `at`.
    fn is_there(&self, but: Option<JournalId>) -> bool {
        let mut others = self.here.iter().filter(|(id, _)| Some(*id) != but);
        others.all(|(id, position)| self.at.position(*id) == *position)
    }
}

/// Whose turn it was, and up to where, until all were at `at`.
fn turns(runs: &[Run], at: &Checkpoints) -> Vec<(JournalId, Position)> {
    let mut turns: Vec<(JournalId, Position)> = Vec::new();
    let mut reached = BTreeMap::new();
    for Run { journal, end } in runs {
        let to = end.position.min(at.position(*journal));
        let before = reached.insert(*journal.as_bytes(), to).unwrap_or(Position::START);
        match turns.last_mut() {
            _ if to <= before => {}
            Some((last, up_to)) if last == journal => *up_to = to,
            _ => turns.push((*journal, to)),
        }
    }
    turns
}

fn start_of(journal: JournalId) -> Link {
    Link { offset: 0, position: Position::START, chain: genesis(journal) }
}

fn place(views_dir: &Path, ids: &[JournalId]) -> Result<(IntakeHeader, PathBuf), ViewError> {
    let header = IntakeHeader::new(ids.to_vec());
    let path = views_dir.join(FOLDER).join(header.name());
    Ok((header, path))
}

/// Each log in a folder of views: its file, how many journals it is of, and how many runs it has.
#[allow(clippy::type_complexity, reason = "it is said in one place only")]
pub(crate) fn logs(views_dir: &Path) -> Vec<(String, Result<(usize, u64), ViewError>)> {
    let fs: Arc<dyn Fs> = Arc::new(crate::fs::os::OsFs);
    let dir = views_dir.join(FOLDER);
    let names = fs.list(&dir).unwrap_or_default().into_iter().filter(|name| !name.contains('.'));
    let examined = |name: &str| {
        let path = dir.join(name);
        let mut bytes = vec![0; IntakeHeader::LEN_BYTES_MAX];
        let read = fs.open(&path, OpenMode::Read).and_then(|it| read_full_at(&*it, &mut bytes, 0));
        bytes.truncate(read.context(ACTION, &path)?);
        let damaged = ViewError::DamagedIntake { path: path.clone(), file_offset: 0 };
        let header = IntakeHeader::decode(&bytes).map_err(|error| match error {
            FormatError::Unsupported { version, .. } => {
                ViewError::UnsupportedIntake { path: path.clone(), version }
            }
            _ => damaged.clone(),
        })?;
        let log = Log::read_only(&fs, views_dir, header.journals())?;
        let log = log.filter(|log| log.path == path).ok_or(damaged)?;
        let count = log.known.lock().count;
        Ok((header.journals().len(), count))
    };
    let with_examined = |name: String| {
        let examined = examined(&name);
        (name, examined)
    };
    names.map(with_examined).collect()
}

fn lock_of(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

/// Opens the file. One with nothing in it is made anew: what was recorded was it under a name that was durable; of any other
/// one nobody knows whether its name is, and a failed sync can't be repeated.
fn begin(fs: &dyn Fs, path: &Path, header: &IntakeHeader) -> Result<Arc<dyn File>, ViewError> {
    match fs.open(path, OpenMode::Write) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        file => {
            let file = file.context(ACTION, path)?;
            if file.size().context(ACTION, path)? > header.len_bytes() {
                check_header(&*file, path, header)?;
                return Ok(file);
            }
        }
    }
    let new = path.with_extension("new");
    match fs.remove(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .context(ACTION, &new)?;
    let file = fs.open(&new, OpenMode::CreateNew).context(ACTION, &new)?;
    write_all_at(&*file, &header.encode(), 0).context(ACTION, &new)?;
    file.sync_data().context(ACTION, &new)?;
    fs.rename(&new, path).context(ACTION, path)?;
    let dir = path.parent().unwrap_or(path);
    fs.sync_dir(dir).context(ACTION, dir)?;
    Ok(file)
}

fn check_header(file: &dyn File, path: &Path, header: &IntakeHeader) -> Result<(), ViewError> {
    let mut bytes = vec![0; header.len_bytes() as usize];
    let read = read_full_at(file, &mut bytes, 0).context(ACTION, path)?;
    bytes.truncate(read);
    let path = path.to_owned();
    match IntakeHeader::decode(&bytes) {
        Ok(found) if found == *header => Ok(()),
        Err(FormatError::Unsupported { version, .. }) => {
            Err(ViewError::UnsupportedIntake { path, version })
        }
        _ => Err(ViewError::DamagedIntake { path, file_offset: 0 }),
    }
}
