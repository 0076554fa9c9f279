//! Events that kill the process: found out by its deaths, and set aside like any other poison.
//!
//! ```text
//!                 died in it         died in it                   3 deaths at the same event
//!  follow: chunk ───────────▶ event by event ────▶ again … ──────────────────────────────────▶ never tried again:
//!  bulk:   whole ─ twice ───▶ in order: chunk ──▶ …                                               parked, or the end
//! ```
//! `abort`, a stack overflow, `exit` and the lack of memory can't be caught: nobody is left to do it. So what the
//! view's code is at work on is noted in front of it, and the next opening reads what was noted.
//!
//! ```text
//! folding.<version>   8 notes of 64 bytes, one for each thread that folds, written over and over and never synced:
//!                     they outlive the process; when the machine goes down nobody asks for them
//!    0  1  at work on: 0 nothing, 1 a chunk, 2 an event, 3 a build in bulk
//!    1  1  of an event: 0 it is decoded and routed, 1 it is folded
//!    2  1  who: 0 the one that follows the journal, 1 one that builds beside it
//!    8 16  journal
//!   24  8  first position of the chunk, or the event's
//!   32  8  position behind the chunk, or further
//!   40 16  the event's id
//!   60  4  CRC-32 of everything in front
//!
//! deadly.<version>    headwater deadly 1                             a text of lines: the layout of this file,
//!                     zone follow <journal> <from> <to>              who follows is to fold these one by one,
//!                     suspect <journal> <position> <id> fold 2       the process died so often in this one,
//!                     killer <journal> <position> <id> route 3       and so often in this one that it isn't tried,
//!                     bulk build 1                                   deaths in a row while building in bulk,
//!                     crc32 5f3c9a01                                 checksum of the lines above
//! ```
//! Invariants:
//! - A note is there before the view's code runs, and gone when that has returned. It covers nothing else, not the
//!   database, not the journal; but for what a chunk of tables writes in parts: its note stands until the last.
//! - An event is given up after [`DEATHS_MAX`] deaths in a row in the very same place of its code, and only if it was
//!   noted by itself: a kill from outside that strikes while a chunk is folded makes the next opening fold that chunk
//!   event by event, no more. An event whose batch is folded meanwhile, by whomever, is acquitted.
//! - What was given up is durable before anything else is folded. It lasts until somebody [acquits](
//!   super::ViewControl::acquit) the event: code is mended, and only people know when.
//! - A note that can't be written stops nothing. Then nothing is found out.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::control::ViewControl;
use super::error::{EventFailure, ViewError};
use crate::error::IoContext;
use crate::event::{EventId, Recorded};
use crate::format::{Block, Decoder, crc32};
use crate::fs::{File, Fs, OpenMode, read_exact_at, read_full_at, write_all_at};
use crate::journal::layout::Layout;
use crate::position::{JournalId, Locator, Position};

/// So often the process may die in one event before that is given up.
pub(super) const DEATHS_MAX: u32 = 3;
/// So often in a row it may die while building in bulk before the build goes the ordered way.
pub(super) const BULK_DEATHS_MAX: u32 = 2;
const NOTES: usize = 8;
const NOTE_BYTES: usize = 64;
const NOTES_NAME: &str = "folding";
const NAME: &str = "deadly";
const HEAD: &str = "headwater deadly 1";
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Zones and suspects that are remembered; the oldest are forgotten.
const REMEMBERED_MAX: usize = 8;
/// A chunk is noted so far ahead at first.
const AHEAD_EVENTS: u64 = 64;

/// Which of the view's code was given the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Stage {
    /// It is decoded, by upcasters and codec, and asked for the rows that it concerns.
    Route,
    /// It is folded into a row, the row encoded and its index keys made.
    Fold,
}

impl Stage {
    const ALL: [(Self, &str); 2] = [(Self::Route, "route"), (Self::Fold, "fold")];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Route => "decoding or routing",
            Self::Fold => "folding",
        })
    }
}

/// Who folds. What one is through with says nothing of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Duty {
    /// Follows the journal, from building the first generation on.
    Follow,
    /// Builds, or brings up to date, a generation beside the one that is served.
    Build,
}

impl Duty {
    const ALL: [(Self, &str); 2] = [(Self::Follow, "follow"), (Self::Build, "build")];

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(it, _)| *it == self).map_or("", |(_, name)| name)
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, it)| *it == name).map(|(duty, _)| duty)
    }
}

/// An event that has killed the process so often that it isn't tried again; see [`ViewControl::deadly_events`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadlyEvent {
    /// Its place.
    pub locator: Locator,
    /// Its id.
    pub id: EventId,
    /// What the view's code was doing with it.
    pub stage: Stage,
    /// How often the process has died of it.
    pub deaths: u32,
}

/// An event, in one place of the view's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At {
    pub(super) journal: JournalId,
    pub(super) position: Position,
    pub(super) id: EventId,
    pub(super) stage: Stage,
}

impl At {
    pub(super) const fn of<E>(event: &Recorded<E>, stage: Stage) -> Self {
        let Locator { journal, position } = event.locator();
        Self { journal, position, id: event.id(), stage }
    }

    fn parse<'a>(fields: &mut impl Iterator<Item = &'a str>) -> Option<Self> {
        let journal = fields.next()?.parse().ok()?;
        let position = Position::new(fields.next()?.parse().ok()?);
        let id = fields.next()?.parse().ok()?;
        let name = fields.next()?;
        let (stage, _) = Stage::ALL.into_iter().find(|(_, it)| *it == name)?;
        Some(Self { journal, position, id, stage })
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { journal, position, id, stage } = self;
        let stage = Stage::ALL.into_iter().find(|(it, _)| it == stage).map_or("", |(_, name)| name);
        write!(f, "{journal} {position} {id} {stage}")
    }
}

/// Events of a journal that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Zone {
    duty: Duty,
    journal: JournalId,
    events: Range<Position>,
}

// ------------------------------------------------------------------------------------------- what is known

/// What the deaths so far have taught.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Deadly {
    /// To be folded event by event.
    zones: Vec<Zone>,
    suspects: Vec<(At, u32)>,
    killers: BTreeMap<At, u32>,
    bulk_deaths: BTreeMap<Duty, u32>,
}

impl Deadly {
    /// Refuses an event that has killed too often.
    pub(super) fn check(&self, at: impl FnOnce() -> At) -> Result<(), EventFailure> {
        if self.killers.is_empty() {
            return Ok(());
        }
        let at = at();
        match self.killers.get(&at) {
            Some(deaths) => Err(EventFailure::Deadly { stage: at.stage, deaths: *deaths }),
            None => Ok(()),
        }
    }

    /// Whether the next build is to go the ordered way.
    pub(super) fn forbids_bulk(&self, duty: Duty) -> bool {
        self.bulk_deaths.get(&duty).is_some_and(|deaths| *deaths >= BULK_DEATHS_MAX)
    }

    fn holds(&self, duty: Duty, journal: JournalId, position: Position) -> bool {
        self.zones
            .iter()
            .any(|it| it.duty == duty && it.journal == journal && it.events.contains(&position))
    }

    /// Where the next events begin that are to be folded one by one, behind `position`.
    fn next_zone(&self, duty: Duty, journal: JournalId, position: Position) -> Option<Position> {
        let zones = self.zones.iter().filter(|it| it.duty == duty && it.journal == journal);
        zones.map(|it| it.events.start).filter(|start| *start > position).min()
    }

    /// The process died at this.
    fn died(&mut self, duty: Duty, at_work: AtWork) {
        match at_work {
            AtWork::Chunk { journal, from, to } => {
                let zone = Zone { duty, journal, events: from..to };
                self.zones.retain(|it| *it != zone);
                self.zones.push(zone);
            }
            AtWork::Bulk => *self.bulk_deaths.entry(duty).or_default() += 1,
            AtWork::Event(at) => {
                let known = self.suspects.iter().position(|(it, _)| *it == at);
                let (_, deaths) = known.map_or((at, 0), |known| self.suspects.remove(known));
                let deaths = self.killers.get(&at).copied().unwrap_or(deaths).saturating_add(1);
                if deaths >= DEATHS_MAX {
                    self.killers.insert(at, deaths);
                } else {
                    self.suspects.push((at, deaths));
                }
            }
        }
        let many = self.zones.len().saturating_sub(REMEMBERED_MAX);
        self.zones.drain(..many);
        let many = self.suspects.len().saturating_sub(REMEMBERED_MAX);
        self.suspects.drain(..many);
    }

    /// These events were folded, without a death.
    fn folded(&mut self, done: &Zone) {
        let is_in = |position: Position| done.events.contains(&position);
        let last = |zone: &Zone| Position::new(zone.events.end.get().saturating_sub(1));
        let is_same = |it: &Zone| it.duty == done.duty && it.journal == done.journal;
        self.zones.retain(|zone| !is_same(zone) || !is_in(last(zone)));
        self.suspects.retain(|(at, _)| at.journal != done.journal || !is_in(at.position));
    }

    /// Everything that there is was folded.
    fn built(&mut self, duty: Duty) {
        self.zones.retain(|zone| zone.duty != duty);
        self.bulk_deaths.remove(&duty);
    }

    pub(super) fn has_killers(&self) -> bool {
        !self.killers.is_empty()
    }

    /// What holds wherever the events are, and not of this process only.
    pub(super) fn killers_only(&self) -> Self {
        Self { killers: self.killers.clone(), ..Self::default() }
    }

    pub(super) fn text(&self) -> String {
        let Self { zones, suspects, killers, bulk_deaths } = self;
        let mut text = format!("{HEAD}\n");
        for Zone { duty, journal, events } in zones {
            text += &format!("zone {} {journal} {} {}\n", duty.name(), events.start, events.end);
        }
        for (at, deaths) in suspects {
            text += &format!("suspect {at} {deaths}\n");
        }
        for (at, deaths) in killers {
            text += &format!("killer {at} {deaths}\n");
        }
        for (duty, deaths) in bulk_deaths {
            text += &format!("bulk {} {deaths}\n", duty.name());
        }
        text += &format!("crc32 {:08x}\n", crc32(&[text.as_bytes()]));
        text
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (body, crc) = text.strip_suffix('\n')?.rsplit_once("crc32 ")?;
        if u32::from_str_radix(crc, 16) != Ok(crc32(&[body.as_bytes()])) {
            return None;
        }
        let mut lines = body.lines();
        if lines.next() != Some(HEAD) {
            return None;
        }
        let mut deadly = Self::default();
        for line in lines {
            let mut fields = line.split(' ');
            match fields.next()? {
                "zone" => {
                    let duty = Duty::parse(fields.next()?)?;
                    let journal = fields.next()?.parse().ok()?;
                    let mut position = || Some(Position::new(fields.next()?.parse().ok()?));
                    let events = position()?..position()?;
                    deadly.zones.push(Zone { duty, journal, events });
                }
                "suspect" => {
                    let at = At::parse(&mut fields)?;
                    deadly.suspects.push((at, fields.next()?.parse().ok()?));
                }
                "killer" => {
                    let at = At::parse(&mut fields)?;
                    deadly.killers.insert(at, fields.next()?.parse().ok()?);
                }
                "bulk" => {
                    let duty = Duty::parse(fields.next()?)?;
                    deadly.bulk_deaths.insert(duty, fields.next()?.parse().ok()?);
                }
                _ => return None,
            }
            if fields.next().is_some() {
                return None;
            }
        }
        Some(deadly)
    }
}

// ------------------------------------------------------------------------------------------- what is noted

/// What a thread gives to the view's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtWork {
    Chunk { journal: JournalId, from: Position, to: Position },
    Event(At),
    Bulk,
}

impl AtWork {
    fn encode(duty: Duty, this: Option<&Self>) -> [u8; NOTE_BYTES] {
        let mut out = Block::<NOTE_BYTES>::new();
        let (kind, journal, from, to) = match this {
            None => (0, None, 0, 0),
            Some(Self::Chunk { journal, from, to }) => (1, Some(journal), from.get(), to.get()),
            Some(Self::Event(at)) => (2, Some(&at.journal), at.position.get(), 0),
            Some(Self::Bulk) => (3, None, 0, 0),
        };
        if let Some(Self::Event(at)) = this {
            out.put(1, &[at.stage as u8]);
            out.put(40, at.id.as_bytes());
        }
        out.put(0, &[kind]);
        out.put(2, &[duty as u8]);
        out.put(8, journal.map_or(&[0; 16], |id| id.as_bytes()));
        out.put(24, &from.to_le_bytes());
        out.put(32, &to.to_le_bytes());
        let crc = crc32(&[out.0.get(..60).unwrap_or_default()]);
        out.put(60, &crc.to_le_bytes());
        out.0
    }

    /// What isn't understood is no note: zeros, and what a power cut has left.
    fn decode(bytes: &[u8]) -> Option<(Duty, Self)> {
        let (covered, crc) = bytes.split_last_chunk::<4>()?;
        if crc32(&[covered]) != u32::from_le_bytes(*crc) {
            return None;
        }
        let mut input = Decoder::new(covered);
        let [kind, stage, duty] = input.array().ok()?;
        let (duty, _) = Duty::ALL.into_iter().find(|(it, _)| *it as u8 == duty)?;
        input.bytes(5).ok()?;
        let journal = JournalId::from_bytes(input.array().ok()?);
        let (from, to) = (Position::new(input.u64().ok()?), Position::new(input.u64().ok()?));
        let id = EventId::from_bytes(input.array().ok()?);
        let at_work = match kind {
            1 => Self::Chunk { journal, from, to },
            2 => {
                let (stage, _) = Stage::ALL.into_iter().find(|(it, _)| *it as u8 == stage)?;
                Self::Event(At { journal, position: from, id, stage })
            }
            3 => Self::Bulk,
            _ => return None,
        };
        Some((duty, at_work))
    }
}

/// Notes and what they have taught, of one version of a view.
pub(super) struct Attempts {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    version: u32,
    notes: Arc<dyn File>,
    /// Which notes are taken.
    taken: Mutex<[bool; NOTES]>,
    deadly: Mutex<Arc<Deadly>>,
}

impl Attempts {
    /// Reads what the last process has noted in the folder of a view, and what that means is durable when this returns.
    pub(super) fn open(fs: Arc<dyn Fs>, dir: &Path, version: u32) -> Result<Arc<Self>, ViewError> {
        const ACTION: &str = "reading what was being folded";
        let mut deadly = read(&*fs, &dir.join(format!("{NAME}.{version}")))?;
        let path = dir.join(format!("{NOTES_NAME}.{version}"));
        let notes = match fs.open(&path, OpenMode::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs.open(&path, OpenMode::CreateNew)
            }
            opened => opened,
        }
        .context(ACTION, &path)?;
        let mut bytes = [0; NOTES * NOTE_BYTES];
        let len = read_full_at(&*notes, &mut bytes, 0).context(ACTION, &path)?;
        let noted = bytes.get(..len).unwrap_or_default().chunks(NOTE_BYTES);
        let mut at_work: Vec<(Duty, AtWork)> = Vec::new();
        for it in noted.filter_map(AtWork::decode) {
            // Several threads may have been at the same: it is one death.
            if !at_work.contains(&it) {
                at_work.push(it);
            }
        }
        let nothing = AtWork::encode(Duty::Follow, None).repeat(NOTES);
        let cleared = write_all_at(&*notes, &nothing, 0);
        // Counted once: a note that comes back, or stays, isn't one of another death.
        let cleared =
            cleared.and_then(|()| if at_work.is_empty() { Ok(()) } else { notes.sync_data() });
        if cleared.is_err() {
            at_work.clear();
        }
        at_work.iter().for_each(|(duty, it)| deadly.died(*duty, *it));
        let opened = Self {
            fs,
            dir: dir.to_owned(),
            version,
            notes,
            taken: Mutex::default(),
            deadly: Mutex::new(Arc::new(deadly)),
        };
        if !at_work.is_empty() {
            opened.change(|_| {})?;
        }
        Ok(Arc::new(opened))
    }

    pub(super) fn deadly(&self) -> Arc<Deadly> {
        Arc::clone(&self.deadly.lock())
    }

    /// What is known from now on, durably.
    fn change(&self, change: impl FnOnce(&mut Deadly)) -> Result<(), ViewError> {
        let mut deadly = self.deadly.lock();
        let mut changed = Deadly::clone(&deadly);
        change(&mut changed);
        let name = format!("{NAME}.{}", self.version);
        Layout::new(&self.dir).replace(&*self.fs, &name, changed.text().as_bytes())?;
        *deadly = Arc::new(changed);
        Ok(())
    }

    /// These are known to kill, too, durably.
    pub(super) fn adopt(&self, theirs: &Deadly) -> Result<(), ViewError> {
        if theirs.killers.keys().all(|at| self.deadly().killers.contains_key(at)) {
            return Ok(());
        }
        self.change(|deadly| deadly.killers.extend(theirs.killers.clone()))
    }

    /// A note for a thread that folds.
    pub(super) fn note(self: &Arc<Self>, duty: Duty) -> Arc<Note> {
        let mut taken = self.taken.lock();
        let place = taken.iter().position(|taken| !taken);
        if let Some(taken) = place.and_then(|place| taken.get_mut(place)) {
            *taken = true;
        }
        let attempts = Some(Arc::clone(self));
        Arc::new(Note { attempts, duty, place, now: Mutex::default() })
    }

    fn acquit(&self, event: Locator) -> Result<bool, ViewError> {
        let Locator { journal, position } = event;
        let is = |at: &At| at.journal == journal && at.position == position;
        if !self.deadly().killers.keys().any(is) {
            return Ok(false);
        }
        self.change(|deadly| {
            deadly.killers.retain(|at, _| !is(at));
            deadly.suspects.retain(|(at, _)| !is(at));
        })?;
        Ok(true)
    }

    fn events(&self) -> Vec<DeadlyEvent> {
        let event = |(at, deaths): (&At, &u32)| {
            let At { journal, position, id, stage } = *at;
            let locator = Locator { journal, position };
            DeadlyEvent { locator, id, stage, deaths: *deaths }
        };
        self.deadly().killers.iter().map(event).collect()
    }
}

/// What a version in the folder of a view knows, as it lies on disk.
#[cfg(feature = "cli")]
pub(super) fn known(fs: &dyn Fs, dir: &Path, version: u32) -> Result<Deadly, ViewError> {
    read(fs, &dir.join(format!("{NAME}.{version}")))
}

fn read(fs: &dyn Fs, path: &Path) -> Result<Deadly, ViewError> {
    const ACTION: &str = "reading which events are deadly";
    let file = match fs.open(path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Deadly::default()),
        file => file.context(ACTION, path)?,
    };
    let damaged = || ViewError::DamagedDeadly { path: path.to_owned() };
    let size = file.size().context(ACTION, path)?;
    if size > FILE_BYTES_MAX {
        return Err(damaged());
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| damaged())?];
    read_exact_at(&*file, &mut bytes, 0).context(ACTION, path)?;
    str::from_utf8(&bytes).ok().and_then(Deadly::parse).ok_or_else(damaged)
}

/// What one thread is at work on. Gone when it is dropped.
pub(super) struct Note {
    /// `None` where nothing is noted, because nobody would come and read it.
    attempts: Option<Arc<Attempts>>,
    duty: Duty,
    /// `None` if there are more threads than notes: nothing is noted then.
    place: Option<usize>,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    is_noted: bool,
    /// What was given to the view's code since the last [`Care::done`], and how far that is noted.
    chunk: Option<(Zone, Position)>,
    event: Option<At>,
}

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Note").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Note {
    /// Notes nothing: for what isn't begun again by itself if the process dies of it.
    #[cfg(any(feature = "cli", feature = "testing"))]
    pub(super) fn nowhere() -> Arc<Self> {
        Arc::new(Self { attempts: None, duty: Duty::Build, place: None, now: Mutex::default() })
    }

    fn write(&self, now: &mut Now, at_work: Option<&AtWork>) {
        if let (Some(place), Some(attempts)) = (self.place, &self.attempts) {
            let offset = (place * NOTE_BYTES) as u64;
            // An effort: folding doesn't depend on it.
            let bytes = AtWork::encode(self.duty, at_work);
            drop(write_all_at(&*attempts.notes, &bytes, offset));
        }
        now.is_noted = at_work.is_some();
    }

    /// A build in bulk begins. It is over when what is returned is dropped.
    pub(super) fn bulk(self: &Arc<Self>) -> Returned {
        self.write(&mut self.now.lock(), Some(&AtWork::Bulk));
        Returned(Arc::clone(self))
    }

    /// Everything that there is was folded, in whatever way.
    pub(super) fn built(&self) {
        let Some(attempts) = &self.attempts else { return };
        let deadly = attempts.deadly();
        let is_own = |zone: &Zone| zone.duty == self.duty;
        if deadly.zones.iter().any(is_own) || deadly.bulk_deaths.contains_key(&self.duty) {
            drop(attempts.change(|deadly| deadly.built(self.duty))); // an effort, too
        }
    }

    pub(super) fn deadly(&self) -> Arc<Deadly> {
        self.attempts.as_ref().map(|attempts| attempts.deadly()).unwrap_or_default()
    }

    /// Whether a build is not to be in bulk.
    pub(super) fn forbids_bulk(&self) -> bool {
        self.deadly().forbids_bulk(self.duty)
    }

    /// As carefully as is usual.
    pub(super) fn care(self: &Arc<Self>) -> Care {
        Care { note: Arc::clone(self), is_careful: false, deadly: self.deadly() }
    }

    /// As carefully as can be.
    pub(super) fn all_care(self: &Arc<Self>) -> Care {
        Care { note: Arc::clone(self), is_careful: true, deadly: self.deadly() }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let now = self.now.get_mut();
        if now.is_noted {
            let mut now = std::mem::take(now);
            self.write(&mut now, None);
        }
        let Some(attempts) = &self.attempts else { return };
        let mut taken = attempts.taken.lock();
        if let Some(taken) = self.place.and_then(|place| taken.get_mut(place)) {
            *taken = false;
        }
    }
}

/// The end of what was noted.
#[must_use = "when it is dropped, the note is gone"]
pub(super) struct Returned(Arc<Note>);

impl Drop for Returned {
    fn drop(&mut self) {
        self.0.write(&mut self.0.now.lock(), None);
    }
}

/// How the view's code is called: noted in front, and not at all with what is known to kill.
#[derive(Clone, Debug)]
pub(super) struct Care {
    note: Arc<Note>,
    deadly: Arc<Deadly>,
    /// Each event is noted.
    is_careful: bool,
}

impl Care {
    /// As carefully as events of this journal from `position` on are to be folded.
    pub(super) fn at(&self, journal: JournalId, position: Position) -> Self {
        let is_careful = self.deadly.holds(self.note.duty, journal, position);
        Self { is_careful, ..self.clone() }
    }

    pub(super) const fn is_careful(&self) -> bool {
        self.is_careful
    }

    /// How many bytes of the journal may be folded at once.
    pub(super) const fn chunk_bytes(&self, usually: u64) -> u64 {
        if self.is_careful { 1 } else { usually }
    }

    /// Where a chunk from `position` on is to end at the latest: one in which the process has died is begun anew, and not in
    /// the midst of a larger one, in which it would only die once more.
    pub(super) fn chunk_end(&self, journal: JournalId, position: Position) -> Option<Position> {
        self.deadly.next_zone(self.note.duty, journal, position)
    }

    /// These events are given to the view's code.
    pub(super) fn batch(&self, journal: JournalId, events: Range<Position>) {
        let mut now = self.note.now.lock();
        let end = events.end;
        let (mut zone, noted) = now.chunk.take().unwrap_or_else(|| {
            let from = events.start;
            (Zone { duty: self.note.duty, journal, events: from..from }, from)
        });
        let from = zone.events.start;
        zone.events.end = end;
        let chunk = if end > noted {
            // Twice as far as it is: a note for each batch would be too many.
            let ahead = end.since(from).saturating_mul(2).max(AHEAD_EVENTS);
            let to = Position::new(from.get().saturating_add(ahead));
            self.note.write(&mut now, Some(&AtWork::Chunk { journal, from, to }));
            (zone, to)
        } else {
            (zone, noted)
        };
        now.chunk = Some(chunk);
    }

    /// This event is given to the view's code; an error if it has killed too often.
    pub(super) fn enter(&self, at: impl Fn() -> At) -> Result<(), EventFailure> {
        self.deadly.check(&at)?;
        if self.is_careful {
            let at = at();
            let mut now = self.note.now.lock();
            if now.event != Some(at) || !now.is_noted {
                self.note.write(&mut now, Some(&AtWork::Event(at)));
                now.event = Some(at);
            }
        }
        Ok(())
    }

    /// The view's code has returned, and something else comes next: a death in that is none of the event's. That says
    /// nothing for the event yet.
    pub(super) fn pause(&self) {
        let mut now = self.note.now.lock();
        if self.is_careful && now.is_noted {
            self.note.write(&mut now, None);
        }
    }

    /// What it was given won't be folded now.
    pub(super) fn abandon(&self) {
        let mut now = self.note.now.lock();
        if std::mem::take(&mut *now).is_noted {
            self.note.write(&mut now, None);
        }
    }

    /// The view's code has returned from everything that it was given.
    pub(super) fn done(&self) {
        let mut now = self.note.now.lock();
        let Now { is_noted, chunk, event } = std::mem::take(&mut *now);
        if is_noted {
            self.note.write(&mut now, None);
        }
        let single = |at: At| {
            let events = at.position..at.position.advance(1);
            Zone { duty: self.note.duty, journal: at.journal, events }
        };
        let single = event.map(single);
        let Some(done) = chunk.map(|(zone, _)| zone).or(single) else { return };
        let Some(attempts) = &self.note.attempts else { return };
        let deadly = attempts.deadly();
        if deadly.zones.is_empty() && deadly.suspects.is_empty() {
            return;
        }
        let mut left = Deadly::clone(&deadly);
        left.folded(&done);
        if left != *deadly {
            // An effort: otherwise they are folded carefully once more.
            drop(attempts.change(|deadly| deadly.folded(&done)));
        }
    }
}

impl ViewControl {
    /// Events that have killed the process so often, at least three times in a row, that they aren't tried again.
    ///
    /// Code that aborts, overflows its stack, exits or runs out of memory leaves nobody to catch that. The view notes
    /// what its code is given, outside of the database, and the next opening looks for that: it folds what was under way
    /// event by event, and an event in which the process dies again and again is parked with its rows (or under no key,
    /// if it is decoding or routing it that kills), or stops the view, as [`ViewOptions::on_poison`] and
    /// [`ViewOptions::on_undecodable`] say. [`retry`](super::ViewHandle::retry) and [`rebuild`](Self::rebuild) don't
    /// try it either, until it is [acquitted](Self::acquit).
    ///
    /// [`ViewOptions::on_poison`]: super::ViewOptions::on_poison
    /// [`ViewOptions::on_undecodable`]: super::ViewOptions::on_undecodable
    #[must_use]
    pub fn deadly_events(&self) -> Vec<DeadlyEvent> {
        self.shared().attempts.events()
    }

    /// The code was mended: the event may be tried again, by [`retry`](super::ViewHandle::retry), or by a
    /// [`rebuild`](Self::rebuild). If it still kills, that is found out again. `false` if it isn't
    /// [deadly](Self::deadly_events). A higher version of the view knows nothing of what killed a lower one.
    ///
    /// # Errors
    /// [`ViewError::Io`] if that can't be written down: nothing was changed.
    pub fn acquit(&self, event: Locator) -> Result<bool, ViewError> {
        self.shared().attempts.acquit(event)
    }
}

#[cfg(test)]
mod tests {
    use super::super::db::Db;
    use super::super::intake::Limit;
    use super::super::poison::{OnPoison, Rules};
    use super::super::program::Keyed;
    use super::super::runner::{collect, nothing};
    use super::super::sources::Sources;
    use super::super::{Fold, FoldError, Indexes, Keys, View, ViewMemory};
    use super::*;
    use crate::codec::CodecError;
    use crate::event::{Event, EventKind, EventKindRef, KnownKind, Payload};
    use crate::fs::os::OsFs;
    use crate::{Append, ExpectedRevision, NewEvent, PayloadCodec, Store, StreamId};
    use proptest::prelude::*;

    fn journal() -> impl Strategy<Value = JournalId> {
        any::<[u8; 16]>().prop_map(JournalId::from_bytes)
    }

    fn duty() -> impl Strategy<Value = Duty> {
        any::<bool>().prop_map(|builds| if builds { Duty::Build } else { Duty::Follow })
    }

    fn at() -> impl Strategy<Value = At> {
        (journal(), any::<u64>(), any::<[u8; 16]>(), any::<bool>()).prop_map(
            |(journal, position, id, folds)| At {
                journal,
                position: Position::new(position),
                id: EventId::from_bytes(id),
                stage: if folds { Stage::Fold } else { Stage::Route },
            },
        )
    }

    fn zone() -> impl Strategy<Value = Zone> {
        (duty(), journal(), any::<u64>(), any::<u64>()).prop_map(|(duty, journal, from, to)| Zone {
            duty,
            journal,
            events: Position::new(from)..Position::new(to),
        })
    }

    fn at_work() -> impl Strategy<Value = AtWork> {
        prop_oneof![
            zone().prop_map(|Zone { journal, events, .. }| {
                AtWork::Chunk { journal, from: events.start, to: events.end }
            }),
            at().prop_map(AtWork::Event),
            Just(AtWork::Bulk),
        ]
    }

    fn deadly() -> impl Strategy<Value = Deadly> {
        let suspects = prop::collection::vec((at(), any::<u32>()), 0..3);
        let killers = prop::collection::btree_map(at(), any::<u32>(), 0..3);
        let bulk_deaths = prop::collection::btree_map(duty(), any::<u32>(), 0..3);
        (prop::collection::vec(zone(), 0..3), suspects, killers, bulk_deaths).prop_map(
            |(zones, suspects, killers, bulk_deaths)| Deadly {
                zones,
                suspects,
                killers,
                bulk_deaths,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_known_is_read_as_it_was_written(known in deadly(), at: prop::sample::Index) {
            let text = known.text();
            prop_assert_eq!(Deadly::parse(&text), Some(known));
            let mut damaged = text.clone().into_bytes();
            damaged[at.index(text.len())] ^= 1;
            let read = String::from_utf8(damaged).ok().and_then(|text| Deadly::parse(&text));
            prop_assert_eq!(read, None);
        }

        #[test]
        fn a_note_is_read_as_it_was_written_and_a_damaged_one_is_none(
            duty in duty(), note in at_work(), bit in 0..NOTE_BYTES * 8,
        ) {
            let mut bytes = AtWork::encode(duty, Some(&note));
            prop_assert_eq!(AtWork::decode(&bytes), Some((duty, note)));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(AtWork::decode(&bytes), None);
        }
    }

    const JOURNAL: JournalId = JournalId::from_bytes([7; 16]);

    fn open(dir: &Path) -> Arc<Attempts> {
        Attempts::open(Arc::new(OsFs), dir, 1).unwrap()
    }

    fn event(position: u64) -> At {
        let (position, id) = (Position::new(position), EventId::from_bytes([position as u8; 16]));
        At { journal: JOURNAL, position, id, stage: Stage::Fold }
    }

    /// A process that dies in this event: everything is left as it is.
    fn die_in(dir: &Path, position: u64) {
        die_in_event(&open(dir), position);
    }

    fn die_in_event(attempts: &Arc<Attempts>, position: u64) {
        let care = attempts.note(Duty::Follow).all_care();
        care.batch(JOURNAL, Position::new(0)..Position::new(20));
        care.enter(|| event(position)).unwrap();
        std::mem::forget(care);
    }

    fn is_killer(dir: &Path, position: u64) -> bool {
        open(dir).deadly().check(|| event(position)).is_err()
    }

    #[test]
    fn three_deaths_in_a_row_at_the_same_event_make_a_killer_of_it() {
        let dir = tempfile::tempdir().unwrap();
        die_in(dir.path(), 5);
        die_in(dir.path(), 5);
        assert!(!is_killer(dir.path(), 5));
        die_in(dir.path(), 5);
        assert!(is_killer(dir.path(), 5) && !is_killer(dir.path(), 6));
        let fifth = Locator { journal: JOURNAL, position: Position::new(5) };
        assert!(open(dir.path()).acquit(fifth).unwrap());
        assert!(!is_killer(dir.path(), 5));
    }

    #[test]
    fn threads_that_were_at_the_same_event_died_one_death() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 1..DEATHS_MAX {
            let attempts = open(dir.path());
            (0..3).for_each(|_| die_in_event(&attempts, 5));
        }
        assert!(!is_killer(dir.path(), 5));
        die_in(dir.path(), 5);
        assert!(is_killer(dir.path(), 5));
    }

    /// Whatever happens while it is counted.
    #[cfg(feature = "test-kit")]
    #[test]
    fn a_death_is_counted_once_wherever_the_process_dies_while_it_is_counted() {
        use crate::fs::sim::{Down, Fault, Repeat, SimFs};
        let dir = Path::new("/view");
        for fault in [Fault::Kill, Fault::PowerCut, Fault::Eio] {
            let mut most = 0;
            for (at, seed) in (0..20).flat_map(|at| (0..8).map(move |seed| (at, seed))) {
                let fs = SimFs::new(seed);
                fs.create_dir_all(dir).unwrap();
                let open = || Attempts::open(Arc::new(fs.clone()), dir, 1);
                let attempts = open().unwrap();
                die_in_event(&attempts, 5);
                // The system may have written the note to the disk.
                attempts.notes.sync_data().unwrap();
                fs.sync_dir(dir).unwrap();
                fs.fail_at(fs.ops() + at, fault, Repeat::Once);
                drop(open());
                fs.clear_faults();
                match (fs.down(), fault) {
                    (Some(Down::Kill), _) => fs.kill(),
                    (Some(Down::PowerCut), _) | (None, Fault::PowerCut) => fs.power_cut(),
                    (None, _) => {}
                }
                let counted = open().unwrap().deadly().suspects.iter().map(|it| it.1).sum();
                assert!(counted <= 1, "{fault:?} at {at}, seed {seed}: {counted} deaths");
                most = most.max(counted);
            }
            assert_eq!(most, 1, "{fault:?}: none was counted");
        }
    }

    #[test]
    fn what_was_folded_meanwhile_counts_anew() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..4 {
            die_in(dir.path(), 5);
            die_in(dir.path(), 5);
            let care = open(dir.path()).note(Duty::Follow).all_care();
            care.batch(JOURNAL, Position::new(0)..Position::new(20));
            care.enter(|| event(5)).unwrap();
            care.done();
        }
        assert!(!is_killer(dir.path(), 5));
    }

    #[test]
    fn a_thread_that_ends_in_order_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let attempts = open(dir.path());
        for _ in 0..2 * NOTES {
            let care = attempts.note(Duty::Build).care().at(JOURNAL, Position::START);
            care.batch(JOURNAL, Position::new(0)..Position::new(20));
        }
        drop(attempts);
        assert_eq!(*open(dir.path()).deadly(), Deadly::default());
        assert!(!dir.path().join("deadly.1").exists());
    }

    #[test]
    fn what_one_folds_says_nothing_of_what_the_other_died_of() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let note = open(dir.path()).note(Duty::Build);
            std::mem::forget(note.bulk());
        }
        let attempts = open(dir.path());
        let (follow, build) = (attempts.note(Duty::Follow), attempts.note(Duty::Build));
        follow.built();
        assert!(!follow.forbids_bulk() && build.forbids_bulk());
        build.built();
        assert!(!build.forbids_bulk());
    }

    #[test]
    fn a_damaged_file_is_refused_and_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("deadly.1"), "headwater deadly 1\n").unwrap();
        let opened = Attempts::open(Arc::new(OsFs), dir.path(), 1);
        assert!(matches!(opened, Err(ViewError::DamagedDeadly { .. })));
    }

    // ------------------------------------------------------------------------------------- who is blamed

    /// What was noted while this or that was at work.
    type Seen = Vec<(&'static str, Option<AtWork>)>;

    static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
    static SEEN: Mutex<Seen> = Mutex::new(Vec::new());

    fn see(what: &'static str) {
        let Some(folder) = &*FOLDER.lock() else { return };
        let bytes = std::fs::read(folder.join("folding.1")).unwrap();
        let noted = AtWork::decode(&bytes[..NOTE_BYTES]).map(|(_, noted)| noted);
        let mut seen = SEEN.lock();
        if seen.last() != Some(&(what, noted)) {
            seen.push((what, noted));
        }
    }

    /// Fails in the code that is named.
    #[derive(Clone)]
    struct Known(&'static str);

    impl Event for Known {
        const KINDS: &'static [KnownKind] = &[KnownKind::present("known", 1)];

        fn kind(&self) -> EventKind {
            EventKind { name: "known", schema_version: 1 }
        }

        fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
            Ok((PayloadCodec::Raw, self.0.into()))
        }

        fn step(
            kind: EventKindRef<'_>,
            payload: Payload<'_>,
        ) -> Result<crate::upcast::Step<Self>, CodecError> {
            if kind.name != "known" {
                see("foreign");
                return Ok(crate::upcast::Step::Foreign);
            }
            see("decode");
            Ok(crate::upcast::Step::Value(Self(if payload.bytes == b"fold" {
                "fold"
            } else {
                "route"
            })))
        }
    }

    struct Witness;

    impl View for Witness {
        const NAME: &'static str = "witness";
        const VERSION: u32 = 1;
        type Key = u8;
        type Row = u64;
        type Event = Known;

        fn route(&self, event: &Recorded<Known>, keys: &mut Keys<u8>) {
            see("route");
            assert!(event.data().0 != "route", "as planned");
            keys.add(1);
        }

        fn fold(
            &self,
            _: &u8,
            _: Option<u64>,
            _: &Recorded<Known>,
        ) -> Result<Fold<u64>, FoldError> {
            see("fold");
            Err("as planned".into())
        }

        // Asked for in front of reading rows, or behind that.
        fn indexes(&self) -> Indexes<Self> {
            see("database");
            Indexes::none()
        }
    }

    /// Takes whatever comes.
    struct Quiet;

    impl View for Quiet {
        const NAME: &'static str = "quiet";
        const VERSION: u32 = 1;
        type Key = u8;
        type Row = u64;
        type Event = Vec<u8>;

        fn route(&self, _: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
            keys.add(1);
        }

        fn fold(
            &self,
            _: &u8,
            row: Option<u64>,
            _: &Recorded<Vec<u8>>,
        ) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(row.unwrap_or_default() + 1))
        }
    }

    /// What the view had applied in front of the chunk in which the process died wasn't durable, so that the next opening began
    /// further in front: its first chunk reached over that place, and the process died in it once more than need be.
    #[test]
    fn a_chunk_ends_in_front_of_one_in_which_the_process_died() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let journal = store.journal().clone();
        let put = |count: usize| {
            let event = || NewEvent::raw("added", *b"").unwrap();
            let events: Vec<NewEvent> = std::iter::repeat_with(event).take(count).collect();
            let to = StreamId::new("s").unwrap();
            store.append(&Append::to(&to, ExpectedRevision::Any, events)).unwrap();
        };
        [2, 2, 2, 1, 3, 1].into_iter().for_each(put);
        let folder = dir.path().join("apart");
        std::fs::create_dir(&folder).unwrap();
        let died = |duty, journal, from: u64| {
            let care = open(&folder).note(duty).care();
            care.batch(journal, Position::new(from)..Position::new(from + 1));
            std::mem::forget(care);
        };
        died(Duty::Follow, journal.id(), 7);
        died(Duty::Follow, journal.id(), 6);
        // Neither what others died of, nor elsewhere.
        died(Duty::Build, journal.id(), 2);
        died(Duty::Follow, JOURNAL, 4);
        let note = open(&folder).note(Duty::Follow);
        let mut cursor = journal.cursor(Position::START).unwrap();
        let mut end_of_next = || {
            let start = nothing(&Sources::from(journal.clone()));
            let rules = Rules::strict(Arc::default(), note.care());
            let limit = Limit::of(1 << 20);
            let (_, failure) = collect(&Keyed(Quiet), &mut cursor, start, limit, rules);
            assert!(failure.is_none(), "{failure:?}");
            cursor.position().get()
        };
        // All up to there at once, and from there on batch by batch.
        assert_eq!([end_of_next(), end_of_next(), end_of_next(), end_of_next()], [6, 7, 10, 11]);
    }

    /// Neither the journal nor the database is, nor a part of the view that has returned, nor an event that it doesn't know.
    #[test]
    fn an_event_is_blamed_for_what_the_code_of_the_view_does_with_it_and_for_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let journal = store.journal().clone();
        let append = |events: Vec<NewEvent>| {
            let to = StreamId::new("s").unwrap();
            store.append(&Append::to(&to, ExpectedRevision::Any, events)).unwrap().token()
        };
        let known = |fails| NewEvent::typed(&Known(fails)).unwrap();
        append(vec![NewEvent::raw("foreign", *b"").unwrap(), known("fold")]);
        append(vec![known("route")]);

        // The process has died in a chunk.
        let folder = dir.path().join("apart");
        std::fs::create_dir(&folder).unwrap();
        let care = open(&folder).note(Duty::Follow).care();
        care.batch(journal.id(), Position::new(0)..Position::new(3));
        std::mem::forget(care);
        let attempts = open(&folder);
        *FOLDER.lock() = Some(folder);
        let note = attempts.note(Duty::Follow);
        let memory = ViewMemory::new(1 << 20, 1 << 20);
        let db = Arc::new(Db::open(&dir.path().join("rows"), &memory).unwrap());
        let mut cursor = journal.cursor(Position::START).unwrap();
        let start = nothing(&Sources::from(journal.clone()));
        let mut collected = || {
            let rules =
                Rules { on_poison: OnPoison::Park, ..Rules::strict(Arc::default(), note.care()) };
            let limit = Limit::of(1 << 20);
            let got = collect(&Keyed(Witness), &mut cursor, start.clone(), limit, rules);
            see("journal");
            got
        };
        let (chunk, failure) = collected();
        assert!(failure.is_none(), "{failure:?}");
        assert_eq!(chunk.fold(&Witness, &db).unwrap().end.parked.events, 1);
        see("what is parked");
        let at = |position, stage| {
            let event = journal.read_all(Position::new(position)).unwrap().next().unwrap().unwrap();
            Some(AtWork::Event(At::of(&event, stage)))
        };
        let ahead = AtWork::Chunk {
            journal: journal.id(),
            from: Position::START,
            to: Position::new(AHEAD_EVENTS),
        };
        let (route, fold) = (at(1, Stage::Route), at(1, Stage::Fold));
        let expected = [
            ("foreign", Some(ahead)),
            ("decode", route),
            ("route", route),
            ("journal", None),
            ("database", None),
            ("fold", fold),
            ("what is parked", None),
        ];
        assert_eq!(std::mem::take(&mut *SEEN.lock()), expected);
        // One that isn't folded.
        let (chunk, failure) = collected();
        assert!(chunk.is_empty() && failure.is_some());
        let route = at(2, Stage::Route);
        let expected = [("decode", route), ("route", route), ("journal", None)];
        assert_eq!(std::mem::take(&mut *SEEN.lock()), expected);
        *FOLDER.lock() = None;

        // What is parked is tried again.
        let view = store.view(Witness).unwrap();
        view.wait_for_latest(std::time::Duration::from_secs(60)).unwrap();
        *FOLDER.lock() = Some(dir.path().join("store/views/witness"));
        assert_eq!(view.retry(&1).unwrap().left, 1);
        *FOLDER.lock() = None;
        let (route, fold) = (at(1, Stage::Route), at(1, Stage::Fold));
        let expected = [("decode", route), ("route", route), ("database", None), ("fold", fold)];
        assert_eq!(std::mem::take(&mut *SEEN.lock()), expected);
    }
}
