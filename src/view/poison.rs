//! Events that can't be applied: parked with their key, decided upon later.
//!
//! ```text
//!             folds ────────────────────────▶ row
//! event ──┤   fails, twice ─▶ parked ◀─ all later events of the key
//!             can't be routed ─▶ parked under no key
//!
//! retry(key)          fold what is parked, in order, until one fails again
//! discard(key, at)    never fold this event into this row: written down beside the generations
//! ```
//!
//! Invariants:
//! - What is parked goes through the write batch of the rows and the checkpoint. A row is what the events in front
//!   of the first parked one made of it; no event of a key is folded behind one that is parked.
//! - A record is parked whole: it can be folded later even if the journal has removed it.
//! - Only the thread that follows the journal changes what is parked.
//! - A decision is durable before it takes effect. It is stored outside of the generations and holds for all of
//!   them, also for those that are built later.
//! - A decision is about one event, by its id: behind a restore or a quarantine another one may be at its position.
//! - Each version goes by its own decisions. When it is opened, it takes over those of other versions about events that it
//!   hasn't come to; a version that begins, all. So what its rows leave out is in its own file, and whoever builds them
//!   again leaves out the same. A version without a file of its own, be it empty, begins, or was built when all versions
//!   went by the decisions of all: that takes over all, too.
//!
//! ```text
//! discarded.<version>     headwater discarded 2               a text of lines: the layout of this file,
//!                         <journal> <position> <id> <key>     one event for one row, its key in hexadecimal; '-' if
//!                         …                                   it is discarded altogether,
//!                         crc32 5f3c9a01                      checksum of the lines above
//! ```
//! Layout 1 had no ids, and is still read. What was decided there, and is written again, has '-' in place of the id.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::Duration;

use parking_lot::Mutex;

use super::chunk::{Careful, Place, decode, fold_carefully, guard, refuse_within_fold, stop_at};
use super::control::ViewControl;
use super::db::{
    self, Db, Progress, Reader, Scan, StorageError, all_parked, behind_parked, parked_range,
    parked_row_key, row_key, unrouted_range,
};
use super::deadly::{Care, Stage};
use super::error::{EventFailure, StopError, ViewError, ViewReadError};
use super::handle::{ViewHandle, ViewSnapshot};
use super::key::{EncodeKey, ViewKey, decode_all};
use super::row_cache::Bytes;
use super::runner::Phase;
use super::sources::Checkpoints;
use super::space::Space;
use super::watch::Watchers;
use super::{Indexes, Keys, View, ViewOptions};
use crate::error::IoContext;
use crate::event::{EventId, EventType, Names, Recorded, StreamId};
use crate::format::record::RecordRef;
use crate::format::{Decoder, crc32};
use crate::fs::{Fs, OpenMode, read_exact_at, write_all_at};
use crate::hex::{from_hex, hex};
use crate::position::{JournalId, Locator, Position, Token};

const HEAD: &str = "headwater discarded 2";
/// Without ids.
const HEAD_1: &str = "headwater discarded 1";
const NAME: &str = "discarded";
const FILE_BYTES_MAX: u64 = 64 << 20;
/// So many parked events are folded and written at once.
const RETRY_STEP: usize = 256;
/// How long a caller waits before it looks whether there is still somebody who answers.
const TICK: Duration = Duration::from_millis(50);
/// A reason is cut behind so many bytes.
const REASON_BYTES_MAX: usize = 1 << 10;

/// What to do with an event that can't be applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnPoison {
    /// Set it aside with its key, and go on with all other keys: [`ViewHandle::parked`].
    #[default]
    Park,
    /// Stop in front of its batch.
    Stop,
}

/// How much is parked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParkedCounts {
    /// Rows that lag behind because an event couldn't be folded into them.
    pub keys: u64,
    /// Events that are parked with these, once for each row.
    pub events: u64,
    /// Events that couldn't be decoded or routed. Any row may lack them.
    pub unrouted: u64,
}

impl ParkedCounts {
    /// Whether nothing is parked.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.keys == 0 && self.unrouted == 0
    }
}

/// What can't be derived from journal and code.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) on_poison: OnPoison,
    pub(super) on_undecodable: OnPoison,
    pub(super) discarded: Arc<Discarded>,
    /// Who wants to know what changes; nobody if the rows aren't served.
    pub(super) watchers: Option<Arc<Watchers>>,
    pub(super) care: Care,
}

impl Rules {
    /// While a generation is being built: it never goes live with holes.
    pub(super) const fn strict(discarded: Arc<Discarded>, care: Care) -> Self {
        let (on_poison, on_undecodable) = (OnPoison::Stop, OnPoison::Stop);
        Self { on_poison, on_undecodable, discarded, watchers: None, care }
    }
}

/// Events that are not to be folded, by decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Discarded(BTreeSet<Decision>);

/// An event, for the row under this database key; for none at all without one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Decision {
    journal: JournalId,
    position: Position,
    /// Without one, whichever event is there.
    id: Option<EventId>,
    row_key: Option<Vec<u8>>,
}

impl Decision {
    fn is_about(&self, id: EventId) -> bool {
        self.id.is_none_or(|it| it == id)
    }

    /// Whether whoever goes by this one leaves out what the other one says, at the same place.
    fn implies(&self, other: &Self) -> bool {
        let is_same_event = other.id.is_none_or(|id| self.is_about(id));
        is_same_event && (self.row_key.is_none() || self.row_key == other.row_key)
    }
}

impl Discarded {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this event is discarded for this row.
    pub(super) fn has(&self, at: Locator, id: EventId, row_key: &[u8]) -> bool {
        let is_it = |it: &Decision| it.is_about(id) && it.row_key.as_deref() == Some(row_key);
        !self.is_empty() && self.at(at).any(is_it)
    }

    /// Whether this event is discarded altogether.
    pub(super) fn has_all_of(&self, at: Locator, id: EventId) -> bool {
        let is_it = |it: &Decision| it.is_about(id) && it.row_key.is_none();
        !self.is_empty() && self.at(at).any(is_it)
    }

    /// What is decided about whichever event is, or was, at this place.
    fn at(&self, Locator { journal, position }: Locator) -> impl Iterator<Item = &Decision> {
        let first = Decision { journal, position, id: None, row_key: None };
        let is_there = move |it: &&Decision| (it.journal, it.position) == (journal, position);
        self.0.range(first..).take_while(is_there)
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("{HEAD}\n");
        for Decision { journal, position, id, row_key } in &self.0 {
            let none = || "-".to_owned();
            let id = id.map_or_else(none, |id| id.to_string());
            let key = row_key.as_ref().map_or_else(none, |key| hex(key));
            text += &format!("{journal} {position} {id} {key}\n");
        }
        text += &format!("crc32 {:08x}\n", crc32(&[text.as_bytes()]));
        text
    }

    /// Whether this, too, is decided here.
    fn implies(&self, decision: &Decision) -> bool {
        let Decision { journal, position, .. } = *decision;
        self.at(Locator { journal, position }).any(|it| it.implies(decision))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (body, crc) = text.strip_suffix('\n')?.rsplit_once("crc32 ")?;
        if u32::from_str_radix(crc, 16) != Ok(crc32(&[body.as_bytes()])) {
            return None;
        }
        let mut lines = body.lines();
        let has_ids = match lines.next()? {
            HEAD => true,
            HEAD_1 => false,
            _ => return None,
        };
        let decision = |line: &str| {
            let mut fields = line.split(' ');
            let journal = fields.next()?.parse().ok()?;
            let position = Position::new(fields.next()?.parse().ok()?);
            let id = match has_ids.then(|| fields.next()) {
                None | Some(Some("-")) => None,
                Some(id) => Some(id?.parse().ok()?),
            };
            let row_key = match fields.next()? {
                "-" => None,
                hex => Some(from_hex(hex)?),
            };
            fields.next().is_none().then_some(Decision { journal, position, id, row_key })
        };
        lines.map(decision).collect::<Option<_>>().map(Self)
    }
}

/// What handles and the thread that follows share about what is parked.
pub(super) struct Parking {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    version: u32,
    discarded: Mutex<Arc<Discarded>>,
    asked: Mutex<VecDeque<Asked>>,
}

/// Something that the thread that follows is to do.
struct Asked {
    what: What,
    answer: SyncSender<Result<Retried, ParkedError>>,
}

#[derive(Clone, Debug)]
enum What {
    Retry { row_key: Vec<u8> },
    Discard { row_key: Option<Vec<u8>>, at: Locator },
}

impl What {
    fn row_key(&self) -> Option<&[u8]> {
        match self {
            Self::Retry { row_key } => Some(row_key),
            Self::Discard { row_key, .. } => row_key.as_deref(),
        }
    }
}

impl Parking {
    /// Reads the version's decisions in the folder of a view.
    pub(super) fn open(fs: Arc<dyn Fs>, dir: &Path, version: u32) -> Result<Self, ViewError> {
        let own = read(&*fs, &dir.join(format!("{NAME}.{version}")))?;
        let discarded = Mutex::new(Arc::new(own));
        Ok(Self { fs, dir: dir.to_owned(), version, discarded, asked: Mutex::default() })
    }

    /// Takes over what other versions have decided about events that aren't in front of `applied`.
    pub(super) fn take_over(&self, applied: &Checkpoints) -> Result<(), ViewError> {
        let before = self.discarded().0.len();
        let (discarded, is_first) = self.gathered(applied)?;
        if discarded.0.len() == before && !is_first { Ok(()) } else { self.write(discarded) }
    }

    /// Goes by these decisions, too, by which rows of `applied` were made that take the place of those that there are. If
    /// it was decided here that an event in front of that is left out, and not there, nothing is changed: which one.
    pub(super) fn adopt(
        &self,
        theirs: &Discarded,
        applied: &Checkpoints,
    ) -> Result<Option<Locator>, ViewError> {
        let (mut discarded, _) = self.gathered(applied)?;
        let is_lacking =
            |it: &&Decision| it.position < applied.position(it.journal) && !theirs.implies(it);
        if let Some(Decision { journal, position, .. }) = discarded.0.iter().find(is_lacking) {
            return Ok(Some(Locator { journal: *journal, position: *position }));
        }
        discarded.0.extend(theirs.0.iter().cloned());
        self.write(discarded)?;
        Ok(None)
    }

    /// The own decisions, and those of other versions about events that aren't in front of `applied`; all of them if there
    /// are no own ones yet, and whether that is so.
    fn gathered(&self, applied: &Checkpoints) -> Result<(Discarded, bool), ViewError> {
        let mut discarded = Discarded::clone(&self.discarded());
        let names = self.fs.list(&self.dir).context("listing the view's directory", &self.dir)?;
        let is_first = !names.contains(&format!("{NAME}.{}", self.version));
        for name in names {
            let of_version = name.strip_prefix(NAME).and_then(|it| it.strip_prefix('.'));
            if of_version.is_some_and(|it| it.parse::<u32>().is_ok()) {
                let Discarded(decisions) = read(&*self.fs, &self.dir.join(&name))?;
                let is_ahead = |it: &Decision| it.position >= applied.position(it.journal);
                discarded.0.extend(decisions.into_iter().filter(|it| is_first || is_ahead(it)));
            }
        }
        Ok((discarded, is_first))
    }

    pub(super) fn discarded(&self) -> Arc<Discarded> {
        Arc::clone(&self.discarded.lock())
    }

    /// How to deal with poison while following the journal.
    pub(super) fn rules(
        &self,
        options: &ViewOptions,
        watchers: &Arc<Watchers>,
        care: Care,
    ) -> Rules {
        let ViewOptions { on_poison, on_undecodable, .. } = *options;
        let watchers = Some(Arc::clone(watchers));
        Rules { on_poison, on_undecodable, discarded: self.discarded(), watchers, care }
    }

    /// Writes a decision down; it is durable and holds when this returns.
    fn discard(&self, decision: Decision) -> Result<(), ViewError> {
        let mut discarded = Discarded::clone(&self.discarded());
        discarded.0.insert(decision);
        self.write(discarded)
    }

    fn write(&self, discarded: Discarded) -> Result<(), ViewError> {
        const ACTION: &str = "writing down a discarded event";
        let path = self.dir.join(format!("{NAME}.{}", self.version));
        let new = self.dir.join(format!("{NAME}.{}.new", self.version));
        match self.fs.remove(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
        .context(ACTION, &new)?;
        let file = self.fs.open(&new, OpenMode::CreateNew).context(ACTION, &new)?;
        let text = discarded.text();
        write_all_at(&*file, text.as_bytes(), 0).context(ACTION, &new)?;
        file.sync_data().context(ACTION, &new)?;
        self.fs.rename(&new, &path).context(ACTION, &path)?;
        self.fs.sync_dir(&self.dir).context(ACTION, &self.dir)?;
        *self.discarded.lock() = Arc::new(discarded);
        Ok(())
    }

    /// Does what was asked for, as the thread that follows, whose turn it is. Tells `applied`, with the row that may
    /// have changed, before whoever asked is answered.
    pub(super) fn answer<V: View>(
        &self,
        view: &V,
        db: &Arc<Db>,
        progress: &mut Progress,
        care: &Care,
        applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError> {
        let place = InDatabase { view, db, parking: self, care };
        let answer = |what: &What, progress: &mut Progress| match what {
            What::Retry { row_key } => place.retry(row_key, progress),
            What::Discard { row_key, at } => place.discard(row_key.as_deref(), *at, progress),
        };
        self.answer_with(progress, answer, applied)
    }

    /// The same for a view whose rows are not parked one by one.
    pub(super) fn answer_without_keys(
        &self,
        view: &'static str,
        db: &Arc<Db>,
        progress: &mut Progress,
        applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError> {
        let answer = |what: &What, progress: &mut Progress| match what {
            What::Discard { row_key: None, at } => self.discard_unrouted(view, db, *at, progress),
            What::Retry { .. } | What::Discard { .. } => {
                Err(Refused::Asker(ParkedError::NotParked))
            }
        };
        self.answer_with(progress, answer, applied)
    }

    fn answer_with(
        &self,
        progress: &mut Progress,
        answer: impl Fn(&What, &mut Progress) -> Result<Retried, Refused>,
        mut applied: impl FnMut(&Progress, Option<&[u8]>),
    ) -> Result<(), StopError> {
        loop {
            let Some(asked) = self.asked.lock().pop_front() else { return Ok(()) };
            let answer = answer(&asked.what, progress);
            applied(progress, asked.what.row_key());
            let answer = match answer {
                Ok(retried) => Ok(retried),
                Err(Refused::Stop(error)) => return Err(error),
                Err(Refused::Asker(error)) => Err(error),
            };
            // Whoever asked may have gone.
            drop(asked.answer.send(answer));
        }
    }

    /// Nobody answers any more.
    pub(super) fn end(&self) {
        self.asked.lock().clear();
    }
}

/// None, if there is no such file.
fn read(fs: &dyn Fs, path: &Path) -> Result<Discarded, ViewError> {
    const ACTION: &str = "reading the discarded events";
    let file = match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Discarded::default()),
        file => file.context(ACTION, path)?,
    };
    let damaged = || ViewError::DamagedDecisions { path: path.to_owned() };
    let size = file.size().context(ACTION, path)?;
    if size > FILE_BYTES_MAX {
        return Err(damaged());
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| damaged())?];
    read_exact_at(&*file, &mut bytes, 0).context(ACTION, path)?;
    str::from_utf8(&bytes).ok().and_then(Discarded::parse).ok_or_else(damaged)
}

/// What stands in front of a parked key's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) events: u64,
    /// The journal of the first event that is parked, which couldn't be folded.
    pub(super) journal: JournalId,
    /// Its position there.
    pub(super) first: Position,
    pub(super) recorded_at_us: i64,
    pub(super) reason: String,
}

impl Head {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let (events, first) = (self.events.to_le_bytes(), self.first.get().to_le_bytes());
        let time = self.recorded_at_us.to_le_bytes();
        [&events[..], self.journal.as_bytes(), &first, &time, self.reason.as_bytes()].concat()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut input = Decoder::new(bytes);
        let events = input.u64().ok()?;
        let journal = JournalId::from_bytes(input.array().ok()?);
        let first = Position::new(input.u64().ok()?);
        let recorded_at_us = input.i64().ok()?;
        let reason = str::from_utf8(input.rest()).ok()?.to_owned();
        Some(Self { events, journal, first, recorded_at_us, reason })
    }
}

/// A reason as it is stored.
pub(super) fn reason_of(cause: &EventFailure) -> String {
    let mut reason = cause.to_string();
    let end = (0..=REASON_BYTES_MAX).rev().find(|at| reason.is_char_boundary(*at));
    reason.truncate(end.unwrap_or(0));
    reason
}

/// An event as it is parked.
pub(super) struct ParkedRecord<'a> {
    pub(super) journal: JournalId,
    pub(super) position: Position,
    pub(super) recorded_at_us: i64,
    /// Empty with a key: the reason is the key's.
    pub(super) reason: &'a str,
    pub(super) record: &'a [u8],
}

impl<'a> ParkedRecord<'a> {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let len = u32::try_from(self.reason.len()).unwrap_or(0).to_le_bytes();
        let (position, time) =
            (self.position.get().to_le_bytes(), self.recorded_at_us.to_le_bytes());
        let reason = self.reason.as_bytes();
        [self.journal.as_bytes(), &position[..], &time, &len, reason, self.record].concat()
    }

    pub(super) fn from_bytes(bytes: &'a [u8]) -> Option<Self> {
        let mut input = Decoder::new(bytes);
        let journal = JournalId::from_bytes(input.array().ok()?);
        let position = Position::new(input.u64().ok()?);
        let recorded_at_us = input.i64().ok()?;
        let len = input.u32().ok()? as usize;
        let (reason, record) = input.rest().split_at_checked(len)?;
        let reason = str::from_utf8(reason).ok()?;
        Some(Self { journal, position, recorded_at_us, reason, record })
    }

    const fn locator(&self) -> Locator {
        Locator { journal: self.journal, position: self.position }
    }
}

/// Why what was asked for wasn't done.
enum Refused {
    /// And the view stops.
    Stop(StopError),
    Asker(ParkedError),
}

impl From<StopError> for Refused {
    fn from(error: StopError) -> Self {
        Self::Stop(error)
    }
}

/// What is parked in a database, for the thread that writes to it.
struct InDatabase<'a, V> {
    view: &'a V,
    db: &'a Arc<Db>,
    parking: &'a Parking,
    care: &'a Care,
}

/// Some of a key's parked events.
struct Slice<E> {
    entries: Vec<(Box<[u8]>, Box<[u8]>)>,
    /// Of the first entries, how many events there are to fold.
    done: Vec<usize>,
    /// These.
    events: Vec<Recorded<E>>,
    /// Why the entry behind those that are done isn't.
    failure: Option<EventFailure>,
}

impl<E> Slice<E> {
    /// Only so many events could be folded.
    fn cut(&mut self, folded: usize, cause: EventFailure) {
        let mut ends = 0;
        let failed = self.done.iter().position(|count| {
            ends += count;
            ends > folded
        });
        self.done.truncate(failed.unwrap_or(self.done.len()));
        self.failure = Some(cause);
    }
}

impl<V: View> InDatabase<'_, V> {
    fn damaged(&self, what: &'static str) -> StopError {
        Self::failed(self.db.parked_damaged(what))
    }

    fn failed(source: StorageError) -> StopError {
        StopError::Storage { view: V::NAME, source }
    }

    fn head(&self, row_key: &[u8]) -> Result<Option<Head>, StopError> {
        self.db.parked_head(row_key).map_err(Self::failed)
    }

    fn retry(&self, row_key: &[u8], progress: &mut Progress) -> Result<Retried, Refused> {
        let mut retried = Retried { applied: 0, left: 0, reason: None };
        let Some(mut head) = self.head(row_key)? else {
            return Err(Refused::Asker(ParkedError::NotParked));
        };
        loop {
            let (done, failure) = self.retry_some(row_key, &mut head, progress)?;
            retried.applied += done;
            retried.left = head.events;
            retried.reason = failure;
            if retried.left == 0 || retried.reason.is_some() {
                // The journal doesn't make up for it: behind a crash what was folded would be parked as before.
                self.db.flush(true).map_err(Self::failed)?;
                return Ok(retried);
            }
        }
    }

    /// Folds some of a key's events: how many, and why no more.
    fn retry_some(
        &self,
        row_key: &[u8],
        head: &mut Head,
        progress: &mut Progress,
    ) -> Result<(u64, Option<String>), StopError> {
        let mut some = self.some_events(row_key)?;
        let Careful { change, folded, failure } = self.fold(row_key, &some.events)?;
        self.care.done();
        if let Some(cause) = failure {
            if let Some(event) = some.events.get(folded).filter(|_| cause.is_of_the_rows()) {
                return Err(stop_at(V::NAME, event, cause));
            }
            some.cut(folded, cause);
        }
        let mut writes = self.db.writes();
        change.write(row_key, &mut writes);
        for (key, _) in some.entries.iter().take(some.done.len()) {
            writes.delete(key);
        }
        let count = some.done.len() as u64;
        let mut now = progress.clone();
        head.events = head.events.saturating_sub(count);
        now.parked.events = now.parked.events.saturating_sub(count);
        if let Some((_, value)) = some.entries.get(some.done.len()) {
            let damaged = || self.damaged("a parked event");
            let record = ParkedRecord::from_bytes(value).ok_or_else(damaged)?;
            (head.journal, head.first) = (record.journal, record.position);
            head.recorded_at_us = record.recorded_at_us;
        }
        let reason = some.failure.as_ref().map(reason_of);
        if let Some(reason) = &reason {
            head.reason.clone_from(reason);
        }
        if head.events == 0 {
            writes.delete(&parked_row_key(row_key));
            now.parked.keys = now.parked.keys.saturating_sub(1);
        } else {
            writes.put(&parked_row_key(row_key), &head.to_bytes());
        }
        self.db.write(writes, &now).map_err(Self::failed)?;
        *progress = now;
        Ok((count, reason))
    }

    /// What events make of the row, up to the first that can't be folded.
    fn fold(&self, row_key: &[u8], events: &[Recorded<V::Event>]) -> Result<Careful, StopError> {
        if events.is_empty() {
            return Ok(Careful::default());
        }
        let key = guard(|| decode_all::<V::Key>(row_key.get(1..).unwrap_or_default()));
        self.care.pause();
        let key = match key {
            Ok(key) => key.map_err(|_| self.damaged("a parked key"))?,
            Err(cause) => return Ok(Careful { failure: Some(cause), ..Careful::default() }),
        };
        let stored = self.db.get(row_key).map_err(Self::failed)?;
        let stored = stored.map(|row| Bytes::from_slice(&row));
        let (indexes, events) = (Indexes::of(self.view), events.iter());
        Ok(fold_carefully(self.view, &indexes, &key, row_key, stored, events, self.care))
    }

    /// The first of a key's events, up to one that can't be decoded or routed.
    fn some_events(&self, row_key: &[u8]) -> Result<Slice<V::Event>, StopError> {
        let discarded = self.parking.discarded();
        let (entries, done, events) = (Vec::new(), Vec::new(), Vec::new());
        let mut some = Slice { entries, done, events, failure: None };
        for entry in self.db.latest().scan(parked_range(row_key)).take(RETRY_STEP) {
            some.entries.push(entry.map_err(Self::failed)?);
        }
        if some.entries.is_empty() {
            return Err(self.damaged("a parked key without its events"));
        }
        for (_, value) in &some.entries {
            let damaged = || self.damaged("a parked event");
            let parked = ParkedRecord::from_bytes(value).ok_or_else(damaged)?;
            let (record, _) = RecordRef::decode(parked.record).map_err(|_| damaged())?;
            let events = match discarded.has(parked.locator(), record.id, row_key) {
                true => Ok(Vec::new()),
                false => self.events(&parked, &record, row_key),
            };
            match events {
                Ok(events) => {
                    some.done.push(events.len());
                    some.events.extend(events);
                }
                Err(cause) => {
                    some.failure = Some(cause);
                    break;
                }
            }
        }
        Ok(some)
    }

    /// What a parked event stands for, as the code reads it now; nothing if it doesn't concern the key any more.
    fn events(
        &self,
        parked: &ParkedRecord<'_>,
        record: &RecordRef<'_>,
        row_key: &[u8],
    ) -> Result<Vec<Recorded<V::Event>>, EventFailure> {
        let ParkedRecord { journal, position, recorded_at_us, .. } = *parked;
        let at = Place { journal, position, recorded_at_us };
        let mut events = Vec::new();
        self.care.enter(|| at.of(record, Stage::Route))?;
        for data in decode::<V::Event>(record)? {
            let event = at.recorded(record, &mut Names::default(), data);
            let mut keys = Keys::none();
            let is_named = guard(|| {
                self.view.route(&event, &mut keys);
                keys.0.iter().any(|key| db::row_key(|out| key.encode_key(out)) == row_key)
            })?;
            events.extend(is_named.then_some(event));
        }
        Ok(events)
    }

    fn discard(
        &self,
        row_key: Option<&[u8]>,
        at: Locator,
        progress: &mut Progress,
    ) -> Result<Retried, Refused> {
        let Some(row_key) = row_key else {
            return self.parking.discard_unrouted(V::NAME, self.db, at, progress);
        };
        self.parking.decide(V::NAME, self.db, at, Some(row_key))?;
        // What stood behind it may be folded now. That is as durable as the decision: whoever compares what is on disk
        // knows of both or of neither.
        self.retry(row_key, progress)
    }
}

impl Parking {
    /// Writes down that a parked event is discarded; the key under which it lies.
    fn decide(
        &self,
        view: &'static str,
        db: &Arc<Db>,
        at: Locator,
        row_key: Option<&[u8]>,
    ) -> Result<Box<[u8]>, Refused> {
        let range = row_key.map_or_else(unrouted_range, parked_range);
        let failed = |source| Refused::Stop(StopError::Storage { view, source });
        let mut found = None;
        for entry in db.latest().scan(range) {
            let (key, value) = entry.map_err(failed)?;
            let parked = ParkedRecord::from_bytes(&value);
            let damaged = || failed(db.parked_damaged("a parked event"));
            let parked = parked.ok_or_else(damaged)?;
            if parked.locator() == at {
                let (record, _) = RecordRef::decode(parked.record).map_err(|_| damaged())?;
                found = Some((key, record.id));
                break;
            }
        }
        let (key, id) = found.ok_or(Refused::Asker(ParkedError::NotParked))?;
        let Locator { journal, position } = at;
        let row_key = row_key.map(<[u8]>::to_vec);
        let decision = Decision { journal, position, id: Some(id), row_key };
        self.discard(decision).map_err(|error| Refused::Asker(ParkedError::View(error)))?;
        Ok(key)
    }

    fn discard_unrouted(
        &self,
        view: &'static str,
        db: &Arc<Db>,
        at: Locator,
        progress: &mut Progress,
    ) -> Result<Retried, Refused> {
        let key = self.decide(view, db, at, None)?;
        let mut writes = db.writes();
        writes.delete(&key);
        let mut now = progress.clone();
        now.parked.unrouted = now.parked.unrouted.saturating_sub(1);
        let storage = |source| StopError::Storage { view, source };
        db.write(writes, &now).map_err(storage)?;
        *progress = now;
        db.flush(true).map_err(storage)?;
        Ok(Retried { applied: 0, left: 0, reason: None })
    }
}

/// What [`ViewHandle::retry`] has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retried {
    /// How many parked events were folded or, because they don't concern the row any more, left out.
    pub applied: u64,
    /// How many are still parked.
    pub left: u64,
    /// Why the first of these can't be folded.
    pub reason: Option<String>,
}

/// Why nothing was done about what is parked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParkedError {
    /// Nothing is parked there.
    #[error("nothing is parked there")]
    NotParked,
    /// The view doesn't follow its journal, or has ceased to meanwhile: its status says why.
    #[error("the view doesn't follow its journal")]
    NotFollowing,
    /// The decision can't be written down.
    #[error(transparent)]
    View(ViewError),
}

impl ParkedError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotParked => "parked.not_parked",
            Self::NotFollowing => "parked.not_following",
            Self::View(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotParked => "list what is parked",
            Self::NotFollowing => "see the view's status",
            Self::View(error) => error.hint(),
        }
    }
}

/// A row that lags behind, because an event can't be folded into it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParkedKey<K> {
    /// The row's key.
    pub key: K,
    /// How many events are parked: the one that failed, and those behind it.
    pub events: u64,
    /// The journal of the one that failed.
    pub journal: JournalId,
    /// Its position. The row is of all its events in front of this.
    pub first: Position,
    /// When that was recorded, in microseconds since 1970.
    pub since_us: i64,
    /// Why it failed.
    pub reason: String,
}

/// An event that is parked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ParkedEvent {
    /// Its journal.
    pub journal: JournalId,
    /// Its position there.
    pub position: Position,
    /// Its stream.
    pub stream: StreamId,
    /// Its type.
    pub event_type: EventType,
    /// The version of its payload's schema.
    pub schema_version: u32,
    /// When it was recorded, in microseconds since 1970.
    pub recorded_at_us: i64,
    /// Why it couldn't be routed; empty for events with a key, whose reason is the key's.
    pub reason: String,
}

/// A row, and whether it is all that it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked<R> {
    /// The row.
    pub row: Option<R>,
    /// What the row lacks, if something is parked, or the rows are being made.
    pub degraded: Option<Degraded>,
}

/// What a row lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Degraded {
    /// The rows of the view's version are being made for the first time: there may be more events of this one, and if
    /// there is no row, that says nothing. [Wait](ViewControl::wait_for_latest), or ask again later.
    ///
    /// That a view lags behind a journal that has grown is nothing of this kind. It isn't said any more when everything is
    /// applied that was there when the building began.
    Building {
        /// How far the rows are; of several journals, how many events of all of them are applied.
        applied: Position,
        /// How far they are then, if that is known: in bulk they appear all at once, and
        /// [`ViewStatus::rebuild`](super::ViewStatus::rebuild) says how far that is. Of several journals at the least: what is
        /// appended to one of them may have its turn before what another one has had.
        until: Option<Position>,
    },
    /// Events of the row are parked: it is as it was in front of the first of them.
    Parked {
        /// How many.
        events: u64,
        /// The journal of the first.
        journal: JournalId,
        /// Its position.
        first: Position,
        /// Why that couldn't be folded.
        reason: String,
    },
    /// Events couldn't be decoded or routed: nobody knows whether they concern this row.
    Unrouted {
        /// How many.
        events: u64,
        /// The journal of the first.
        journal: JournalId,
        /// Its position.
        first: Position,
    },
}

impl Degraded {
    /// The first event that is lacking, or may be.
    #[must_use]
    pub const fn first(&self) -> Position {
        match self {
            Self::Parked { first, .. } | Self::Unrouted { first, .. } => *first,
            Self::Building { applied, .. } => *applied,
        }
    }
}

impl fmt::Display for Degraded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Building { applied, until: Some(until) } => {
                write!(f, "the view is being built: it is at position {applied} of {until}")
            }
            Self::Building { until: None, .. } => f.write_str("the view is being built"),
            Self::Parked { events, first, reason, .. } => {
                write!(f, "{events} events of it are parked, from position {first} on: {reason}")
            }
            Self::Unrouted { events, first, .. } => {
                write!(f, "{events} events couldn't be routed, the first at position {first}")
            }
        }
    }
}

/// A row, and what it lacks as of the reader's moment.
pub(super) fn checked<V: View>(
    reader: &Reader,
    row_key: &[u8],
) -> Result<Checked<V::Row>, ViewReadError> {
    let keys = [row_key.to_vec(), parked_row_key(row_key)];
    let mut found = reader.multi_get(&keys)?.into_iter();
    let row = found.next().flatten();
    let row = row.map(|row| Space::of::<V>().decode_row(&row)).transpose()?;
    let degraded = match found.next().flatten() {
        Some(head) => {
            let Head { events, journal, first, reason, .. } =
                reader.db().parked_head_from(&head)?;
            Some(Degraded::Parked { events, journal, first, reason })
        }
        None => unrouted(reader, None)?,
    };
    Ok(Checked { row, degraded })
}

/// The same, and whether the rows are being made as of that moment.
fn checked_whole<V: View>(
    reader: &Reader,
    row_key: &[u8],
) -> Result<Checked<V::Row>, ViewReadError> {
    let Checked { row, degraded } = checked::<V>(reader, row_key)?;
    Ok(Checked { row, degraded: building(reader)?.or(degraded) })
}

/// What any row may lack because the rows are being made for the first time.
pub(super) fn building(reader: &Reader) -> Result<Option<Degraded>, ViewReadError> {
    let Some(progress) = reader.progress(&[])? else {
        return Ok(Some(Degraded::Building { applied: Position::START, until: None }));
    };
    let Some(until) = reader.building_until(&progress)? else { return Ok(None) };
    let applied = Position::new(progress.checkpoints.events());
    let until = Some(applied.advance(progress.checkpoints.missing_until(&until)));
    Ok(Some(Degraded::Building { applied, until }))
}

/// What the row lacks of what is in front of `token`, or may lack.
pub(super) fn lacking(
    reader: &Reader,
    row_key: &[u8],
    token: &Token,
) -> Result<Option<Degraded>, ViewReadError> {
    let Some(head) = reader.get(&parked_row_key(row_key))? else {
        return unrouted(reader, Some(token));
    };
    let Head { events, reason, .. } = reader.db().parked_head_from(head.as_ref())?;
    let parked = first_of(reader, parked_range(row_key), Some(token))?;
    let parked = parked.map(|(journal, first)| Degraded::Parked { events, journal, first, reason });
    parked.map_or_else(|| unrouted(reader, Some(token)), |it| Ok(Some(it)))
}

/// What any row may lack as of the reader's moment; of what is in front of `token`, if there is one.
pub(super) fn unrouted(
    reader: &Reader,
    token: Option<&Token>,
) -> Result<Option<Degraded>, ViewReadError> {
    let events = reader.progress(&[])?.map_or(0, |progress| progress.parked.unrouted);
    if events == 0 {
        return Ok(None);
    }
    let first = first_of(reader, unrouted_range(), token)?;
    Ok(first.map(|(journal, first)| Degraded::Unrouted { events, journal, first }))
}

/// The first parked event; the first of the token's journal, if it is in front of the token.
fn first_of(
    reader: &Reader,
    range: Range<Vec<u8>>,
    token: Option<&Token>,
) -> Result<Option<(JournalId, Position)>, ViewReadError> {
    for entry in reader.scan(range) {
        let (_, value) = entry?;
        let parked = ParkedRecord::from_bytes(&value);
        let parked = parked.ok_or_else(|| reader.db().parked_damaged("a parked event"))?;
        // Within a journal they are in its order.
        if token.is_none_or(|token| token.journal == parked.journal) {
            let is_missing = token.is_none_or(|token| parked.position < token.position);
            return Ok(is_missing.then_some((parked.journal, parked.position)));
        }
    }
    Ok(None)
}

impl<V: View> ViewHandle<V> {
    /// The row under `key`, and whether it is all that it should be: [`get`](Self::get) returns the row of a
    /// parked key as it was in front of the first parked event, and while the view's rows are made for the first time what
    /// there is of them, and doesn't say so.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get_checked<Q>(&self, key: &Q) -> Result<Checked<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let key = row_key(|out| key.encode_key_into(out));
        checked_whole::<V>(&self.shared().db().snapshot(), &key)
    }

    /// The rows that lag behind because an event can't be folded into them, in the order of their keys.
    pub fn parked(&self) -> ParkedKeys<V> {
        let reader = self.shared().db().latest();
        ParkedKeys { scan: reader.scan(all_parked()), reader, view: std::marker::PhantomData }
    }

    /// What is parked with this row, in the order of the journal.
    pub fn parked_events<Q>(&self, key: &Q) -> ParkedEvents
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let key = row_key(|out| key.encode_key_into(out));
        ParkedEvents::new(self.shared().db().latest(), parked_range(&key))
    }

    /// Folds what is parked with this row, in order, until an event fails again: after the fold was mended, or
    /// what it calls. Blocks until the thread that follows the journal has done it, durably: a crash behind it takes
    /// nothing of it back.
    ///
    /// # Errors
    /// [`ParkedError::NotParked`]; [`ParkedError::NotFollowing`]. That an event fails again is no error but the
    /// answer.
    pub fn retry<Q>(&self, key: &Q) -> Result<Retried, ParkedError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let row_key = row_key(|out| key.encode_key_into(out));
        ask(self, What::Retry { row_key })
    }

    /// Decides that a parked event is never folded into this row, now and when the view is built anew, and
    /// folds what is parked behind it. The decision is durable when this returns, and can't be taken back.
    ///
    /// # Errors
    /// As [`retry`](Self::retry); [`ParkedError::View`] if it can't be written down: nothing was changed.
    pub fn discard<Q>(&self, key: &Q, position: Position) -> Result<Retried, ParkedError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        self.discard_at(key, self.first_at(position))
    }

    /// The same, for views of several journals: which one the event is of is said, too.
    ///
    /// # Errors
    /// As [`discard`](Self::discard).
    pub fn discard_at<Q>(&self, key: &Q, at: Locator) -> Result<Retried, ParkedError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        let row_key = Some(row_key(|out| key.encode_key_into(out)));
        ask(self, What::Discard { row_key, at })
    }
}

impl<V: View> ViewSnapshot<V> {
    /// The row under `key`, and whether it is all that it should be, as [`ViewHandle::get_checked`] says it of now.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails or the row is of another type.
    pub fn get_checked<Q>(&self, key: &Q) -> Result<Checked<V::Row>, ViewReadError>
    where
        Q: EncodeKey<V::Key> + ?Sized,
    {
        checked_whole::<V>(self.reader(), &row_key(|out| key.encode_key_into(out)))
    }

    /// How much is parked as of the snapshot: whether any row that it reads may lack events.
    ///
    /// # Errors
    /// [`ViewReadError`] if the database fails.
    pub fn parked_counts(&self) -> Result<ParkedCounts, ViewReadError> {
        Ok(self.reader().progress(&[])?.map_or_else(ParkedCounts::default, |it| it.parked))
    }

    /// The rows that lag behind as of the snapshot, because an event can't be folded into them, in the order of their keys.
    pub fn parked(&self) -> ParkedKeys<V> {
        let reader = self.reader().clone();
        ParkedKeys { scan: reader.scan(all_parked()), reader, view: std::marker::PhantomData }
    }
}

impl ViewControl {
    /// The events that couldn't be decoded or routed, in the order of the journal. Any row may lack them. They
    /// can't be folded later, behind others: mend the code and [`rebuild`](ViewControl::rebuild), or
    /// [discard](ViewControl::discard_unrouted) them.
    pub fn unrouted_events(&self) -> ParkedEvents {
        ParkedEvents::new(self.shared().db().latest(), unrouted_range())
    }

    /// Decides that an event that can't be routed is left out, now and when the view is built anew.
    ///
    /// # Errors
    /// [`ParkedError`]; after [`ParkedError::View`] nothing was changed.
    pub fn discard_unrouted(&self, position: Position) -> Result<(), ParkedError> {
        self.discard_unrouted_at(self.first_at(position))
    }

    /// The same, for views of several journals: which one the event is of is said, too.
    ///
    /// # Errors
    /// As [`discard_unrouted`](ViewControl::discard_unrouted).
    pub fn discard_unrouted_at(&self, at: Locator) -> Result<(), ParkedError> {
        ask(self, What::Discard { row_key: None, at }).map(drop)
    }

    /// [`ViewHandle::retry`] of a key as bytes.
    #[cfg(feature = "cli")]
    pub(crate) fn retry_bytes(&self, key: &[u8]) -> Result<Retried, ParkedError> {
        let row_key = row_key(|out| out.extend_from_slice(key));
        ask(self, What::Retry { row_key })
    }

    /// [`ViewHandle::discard_at`] of a key as bytes.
    #[cfg(feature = "cli")]
    pub(crate) fn discard_bytes(&self, key: &[u8], at: Locator) -> Result<Retried, ParkedError> {
        let row_key = Some(row_key(|out| out.extend_from_slice(key)));
        ask(self, What::Discard { row_key, at })
    }

    /// A position in the view's first journal, which is its only one most often.
    fn first_at(&self, position: Position) -> Locator {
        Locator { journal: self.shared().sources.first().id(), position }
    }
}

/// Asks the thread that follows the journal, and waits for its answer.
fn ask(view: &ViewControl, what: What) -> Result<Retried, ParkedError> {
    refuse_within_fold(view.name()).map_err(ParkedError::View)?;
    let shared = view.shared();
    let follows = || matches!(shared.state().phase, Phase::Following);
    let (answer, answered) = mpsc::sync_channel(1);
    shared.parking.asked.lock().push_back(Asked { what, answer });
    loop {
        match answered.recv_timeout(TICK) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Disconnected) => return Err(ParkedError::NotFollowing),
            Err(RecvTimeoutError::Timeout) if follows() => {}
            // Whoever comes next is not to do it: nobody waits for the answer.
            Err(RecvTimeoutError::Timeout) => shared.parking.end(),
        }
    }
}

/// Rows that lag behind; see [`ViewHandle::parked`].
#[must_use = "an iterator reads nothing until it is used"]
pub struct ParkedKeys<V: View> {
    reader: Reader,
    scan: Scan,
    view: std::marker::PhantomData<fn() -> V>,
}

impl<V: View> fmt::Debug for ParkedKeys<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParkedKeys").field("name", &V::NAME).finish_non_exhaustive()
    }
}

impl<V: View> Iterator for ParkedKeys<V> {
    type Item = Result<ParkedKey<V::Key>, ViewReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (entry, value) = match self.scan.next()? {
            Ok(entry) => entry,
            Err(error) => return Some(Err(error.into())),
        };
        // The next key's head.
        self.scan.skip_to(behind_parked(&entry));
        let key = decode_all(entry.get(1..).unwrap_or_default())
            .map_err(|source| ViewReadError::Key { view: V::NAME, source });
        let head = self.reader.db().parked_head_from(&value).map_err(ViewReadError::from);
        Some(key.and_then(|key| {
            let Head { events, journal, first, recorded_at_us, reason } = head?;
            Ok(ParkedKey { key, events, journal, first, since_us: recorded_at_us, reason })
        }))
    }
}

/// Parked events in the order in which they were taken in: of each journal, in its order.
#[must_use = "an iterator reads nothing until it is used"]
pub struct ParkedEvents {
    reader: Reader,
    scan: Scan,
}

impl fmt::Debug for ParkedEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParkedEvents").finish_non_exhaustive()
    }
}

impl ParkedEvents {
    pub(super) fn new(reader: Reader, range: Range<Vec<u8>>) -> Self {
        Self { scan: reader.scan(range), reader }
    }
}

impl Iterator for ParkedEvents {
    type Item = Result<ParkedEvent, ViewReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.scan.next()?;
        Some(entry.map_err(ViewReadError::from).and_then(|(_, value)| {
            parked_event(&value)
                .ok_or_else(|| self.reader.db().parked_damaged("a parked event").into())
        }))
    }
}

fn parked_event(value: &[u8]) -> Option<ParkedEvent> {
    let parked = ParkedRecord::from_bytes(value)?;
    let (record, _) = RecordRef::decode(parked.record).ok()?;
    Some(ParkedEvent {
        journal: parked.journal,
        position: parked.position,
        stream: StreamId::new(record.stream).ok()?,
        event_type: EventType::new(record.event_type).ok()?,
        schema_version: record.schema_version,
        recorded_at_us: parked.recorded_at_us,
        reason: parked.reason.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::os::OsFs;
    use crate::position::Checkpoint;
    use crate::view::runner::beginning;
    use proptest::prelude::*;

    fn decision() -> impl Strategy<Value = Decision> {
        let id = any::<Option<[u8; 16]>>();
        (any::<[u8; 16]>(), any::<u64>(), id, any::<Option<Vec<u8>>>()).prop_map(
            |(journal, position, id, row_key)| Decision {
                journal: JournalId::from_bytes(journal),
                position: Position::new(position),
                id: id.map(EventId::from_bytes),
                row_key: row_key.map(|key| row_key_of(&key)),
            },
        )
    }

    fn row_key_of(key: &[u8]) -> Vec<u8> {
        row_key(|out| out.extend_from_slice(key))
    }

    proptest! {
        #[test]
        fn decisions_are_read_as_they_were_written(
            decisions in prop::collection::btree_set(decision(), 0..5),
            at: prop::sample::Index,
        ) {
            let decisions = Discarded(decisions);
            let text = decisions.text();
            prop_assert_eq!(Discarded::parse(&text), Some(decisions));
            let mut damaged = text.clone().into_bytes();
            damaged[at.index(text.len())] ^= 1;
            let read = String::from_utf8(damaged).ok().and_then(|text| Discarded::parse(&text));
            prop_assert_eq!(read, None);
        }

        #[test]
        fn what_is_parked_is_read_as_it_was_written(
            events: u64, journal: [u8; 16], position: u64, recorded_at_us: i64, reason: String, record: Vec<u8>,
            bytes: Vec<u8>,
        ) {
            let (journal, position) = (JournalId::from_bytes(journal), Position::new(position));
            let head = Head { events, journal, first: position, recorded_at_us, reason: reason.clone() };
            prop_assert_eq!(Head::from_bytes(&head.to_bytes()), Some(head));
            let parked = ParkedRecord { journal, position, recorded_at_us, reason: &reason, record: &record };
            let bytes_of = parked.to_bytes();
            let read = ParkedRecord::from_bytes(&bytes_of).unwrap();
            prop_assert_eq!((read.journal, read.position), (journal, position));
            prop_assert_eq!((read.recorded_at_us, read.reason), (recorded_at_us, reason.as_str()));
            prop_assert_eq!(read.record, record);
            let _any = (Head::from_bytes(&bytes), ParkedRecord::from_bytes(&bytes).is_some());
        }
    }

    /// Layout 1 named an event by its place alone: a decision hit whichever event came to be there.
    #[test]
    fn a_decision_is_about_one_event_and_one_of_layout_1_about_its_place() {
        let (journal, position) = (JournalId::from_bytes([7; 16]), Position::new(5));
        let at = Locator { journal, position };
        let (id, other) = (EventId::from_bytes([1; 16]), EventId::from_bytes([2; 16]));
        let text_of = |head: &str, line: &str| {
            let body = format!("{head}\n{line}\n");
            format!("{body}crc32 {:08x}\n", crc32(&[body.as_bytes()]))
        };
        let old = Discarded::parse(&text_of(HEAD_1, &format!("{journal} 5 -"))).unwrap();
        assert!(old.has_all_of(at, id) && old.has_all_of(at, other));
        assert!(old.text().starts_with(HEAD));
        assert_eq!(Discarded::parse(&old.text()), Some(old.clone()), "written anew");
        let new = Discarded::parse(&text_of(HEAD, &format!("{journal} 5 {id} -"))).unwrap();
        assert!(new.has_all_of(at, id) && !new.has_all_of(at, other));
        for (head, line) in
            [(HEAD, format!("{journal} 5 -")), (HEAD_1, format!("{journal} 5 {id} -"))]
        {
            assert_eq!(Discarded::parse(&text_of(head, &line)), None, "{head}: {line}");
        }
        // Nobody knows which event the old one is about: whoever goes by either is taken to go by the other.
        let decision = |id| Decision { journal, position, id, row_key: Some(row_key_of(b"a")) };
        assert!(new.implies(&decision(Some(id))) && new.implies(&decision(None)));
        assert!(!new.implies(&decision(Some(other))) && old.implies(&decision(Some(other))));
    }

    #[test]
    fn a_version_takes_over_decisions_about_what_it_has_not_applied_and_a_damaged_file_is_refused()
    {
        let dir = tempfile::tempdir().unwrap();
        let open = |version| Parking::open(Arc::new(OsFs), dir.path(), version);
        let journal = JournalId::from_bytes([7; 16]);
        let applied = |position| {
            let position = Position::new(position);
            Checkpoints::from(Checkpoint { position, ..beginning(journal) })
        };
        let (position, key) = (Position::new(5), row_key_of(b"a"));
        let (at, id) = (Locator { journal, position }, EventId::from_bytes([1; 16]));
        let decision = Decision { journal, position, id: Some(id), row_key: Some(key.clone()) };
        let second = open(2).unwrap();
        second.take_over(&applied(0)).unwrap();
        open(1).unwrap().discard(decision.clone()).unwrap();
        second.take_over(&applied(6)).unwrap();
        assert!(!second.discarded().has(at, id, &key), "it has applied the event");
        second.take_over(&applied(5)).unwrap();
        assert!(second.discarded().has(at, id, &key));
        second.discard(Decision { row_key: None, ..decision }).unwrap();
        let second = open(2).unwrap().discarded();
        assert!(second.has(at, id, &key) && second.has_all_of(at, id));
        let behind = Locator { position: position.advance(1), ..at };
        assert!(!second.has(behind, id, &key) && !second.has(at, id, b"b"));
        assert!(!open(1).unwrap().discarded().has_all_of(at, id));
        let before_files = open(3).unwrap();
        before_files.take_over(&applied(6)).unwrap();
        assert!(before_files.discarded().has(at, id, &key), "it went by all of them");
        std::fs::write(dir.path().join("discarded.2"), "headwater discarded 2\n").unwrap();
        assert!(matches!(open(2), Err(ViewError::DamagedDecisions { .. })));
        let taken_over = open(1).unwrap().take_over(&applied(0));
        assert!(matches!(taken_over, Err(ViewError::DamagedDecisions { .. })));
    }
}
