//! A store, its mirror and a model of what must be in them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use headwater::env::{Pace, pace_background};
use headwater::fs::Fs;
use headwater::fs::sim::{Down, Fault, FaultRates, Repeat, SectorSize, SimFs};
use headwater::planted::{self, Bug};
use headwater::{
    Append, AppendError, Appended, Comparison, EventId, ExpectedRevision, Ingest, IngestError,
    JournalOptions, NewEvent, OpenError, Position, ReadError, Revision, Store, StreamId,
};

use super::Check;
use super::reached::{Reached, Row};

pub(crate) const DIR: &str = "/store";
pub(crate) const MIRROR: &str = "/mirror";

/// A batch as it was submitted: ids and payloads.
pub(crate) type Batch = Vec<(EventId, Vec<u8>)>;

/// Everything that one seed determines.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) rng: fastrand::Rng,
    pub(crate) fs: SimFs,
    pub(crate) mirror_fs: SimFs,
    pub(crate) options: JournalOptions,
    /// In order; certainly there.
    pub(crate) acked: Vec<Batch>,
    /// Perhaps there, whole, behind `acked`.
    pub(crate) maybe: Vec<Batch>,
    /// Position up to which the mirror has said that it is durable.
    pub(crate) mirrored: Position,
    /// The mirror's disk has lost what was durable there: it may go back and fetch it again.
    pub(crate) mirror_damaged: bool,
    next_id: u128,
    /// Faults that had struck before the present opening: later failures have other causes.
    struck_before: u64,
    pub(crate) crashes: u64,
    pub(crate) reached: Reached,
    pub(crate) log: Vec<String>,
}

/// Runs `work` with time, randomness and a planted bug that depend on nothing but the arguments.
pub(crate) fn seeded<T>(seed: u64, bug: Option<Bug>, work: impl FnOnce() -> T) -> T {
    headwater::env::seed(Some(seed));
    planted::plant(bug);
    let outcome = work();
    headwater::env::seed(None);
    pace_background(None);
    planted::plant(None);
    outcome
}

/// Whether an open was refused because the disk failed, and not because of what lies on it.
pub(crate) fn is_disk_failure(error: &OpenError) -> bool {
    matches!(error, OpenError::Io(_))
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let sector = [SectorSize::B64, SectorSize::B512, SectorSize::B512, SectorSize::B4096];
        let sector = sector[rng.usize(..4)];
        let alignment = [64, 64, 64, 512, 4096][rng.usize(..5)];
        let batch_bytes_max = [1024, 2048, 3072][rng.usize(..3)];
        let segment =
            4096 + u64::from(batch_bytes_max) + u64::from(alignment) + rng.u64(0..6) * 1024;
        let fs = SimFs::with_sector_size(rng.u64(..), sector);
        let mirror_fs = SimFs::with_sector_size(rng.u64(..), sector);
        for fs in [&fs, &mirror_fs] {
            fs.drop_cache_works(rng.u8(..) < 200);
            fs.set_garbage_growth(rng.bool());
            fs.set_allocates(seed.is_multiple_of(3));
        }
        let options = JournalOptions {
            segment_bytes_max: segment,
            segment_bytes_first: segment,
            batch_bytes_max,
            group_bytes_max: u64::from(batch_bytes_max) * 2,
            group_alignment_bytes: alignment,
            idempotency_window_events: [5, 1000][rng.usize(..2)],
            background_thread: false,
            ..JournalOptions::default()
        };
        Self {
            rng,
            fs,
            mirror_fs,
            options,
            acked: Vec::new(),
            maybe: Vec::new(),
            mirrored: Position::START,
            mirror_damaged: false,
            next_id: 0,
            struck_before: 0,
            crashes: 0,
            reached: Reached::default(),
            log: Vec::new(),
        }
    }

    /// The same world once more, with disks and a future of its own.
    pub(crate) fn fork(&self, seed: u64) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            fs: self.fs.fork(seed),
            mirror_fs: self.mirror_fs.fork(!seed),
            ..self.clone()
        }
    }

    /// A fork of which this world's randomness determines the future.
    pub(crate) fn next_fork(&mut self) -> Self {
        let seed = self.rng.u64(..);
        self.fork(seed)
    }

    pub(crate) fn note(&mut self, what: impl Into<String>) {
        self.log.push(what.into());
    }

    /// The failure of a run, with what led to it.
    pub(crate) fn failure(&self, seed: u64, what: &str) -> String {
        format!("seed {seed}: {what}\n  {}", self.log.join("\n  "))
    }

    // ------------------------------------------------------------------------------------ crashes, faults

    pub(crate) fn plan_faults(&mut self, within: u64) {
        let at = self.fs.ops() + self.rng.u64(..within);
        let fault = match self.rng.u8(..13) {
            0..5 => Fault::PowerCut,
            5 => Fault::Kill,
            6..9 => Fault::Eio,
            9 => Fault::Enospc,
            10 => Fault::ShortWrite,
            11 => Fault::Eintr,
            _ => return,
        };
        let repeat = if self.rng.u8(..) < 60 { Repeat::Forever } else { Repeat::Once };
        self.fs.fail_at(at, fault, repeat);
        if self.rng.u8(..) < 60 {
            let rates = FaultRates { sync_eio: self.rng.u16(..300), ..FaultRates::default() };
            self.fs.set_fault_rates(rates);
        }
        self.note(format!("plan {fault:?} {repeat:?} at {at} (now {})", self.fs.ops()));
    }

    /// Plans one fault within so many operations.
    pub(crate) fn plan(&mut self, fault: Fault, within: u64) {
        let at = self.fs.ops() + self.rng.u64(..within);
        self.fs.fail_at(at, fault, Repeat::Once);
        self.note(format!("plan {fault:?} at {at} (now {})", self.fs.ops()));
    }

    /// Ends this life of the origin: the power goes, or only the process.
    pub(crate) fn crash(&mut self) {
        self.fs.clear_faults();
        let cut = self.fs.down() == Some(Down::PowerCut) || self.rng.bool();
        self.end_life(cut);
    }

    pub(crate) fn end_life(&mut self, power_cut: bool) {
        if power_cut {
            self.fs.power_cut();
        } else {
            self.fs.kill();
        }
        self.crashes += 1;
        self.note(if power_cut { "power cut" } else { "kill" });
    }

    /// Ends the mirror's life if its disk failed or it was to die.
    pub(crate) fn crash_mirror(&mut self) {
        self.mirror_fs.clear_faults();
        if self.rng.bool() || self.mirror_fs.down() == Some(Down::PowerCut) {
            self.mirror_fs.power_cut();
        } else {
            self.mirror_fs.kill();
        }
        self.crashes += 1;
    }

    // --------------------------------------------------------------------------------------------- opening

    pub(crate) fn open(&self) -> Result<Store, OpenError> {
        // What is done beside the commits goes on at a pace of its own in each life.
        let seed = self.fs.trace_hash();
        let most = [0, 1, 2, 2, 3, 10][(seed % 6) as usize];
        pace_background(Some(Pace::Drawn(most, fastrand::Rng::with_seed(seed))));
        Store::builder(DIR)
            .create_if_missing()
            .journal_options(self.options.clone())
            .fs(Arc::new(self.fs.clone()))
            .open()
    }

    /// Opens, with crashes and faults inside recovery, several levels deep.
    pub(crate) fn open_through_crashes(&mut self) -> Check<Store> {
        for level in 0..4 {
            let struck = self.fs.faults_struck();
            if self.rng.u8(..) < 100 {
                self.plan_faults(80);
            }
            match self.open() {
                Ok(store) => {
                    self.fs.clear_faults();
                    // What goes on beside the opening may have met what that came past.
                    if self.fs.down().is_some() {
                        drop(store);
                        self.crash();
                        continue;
                    }
                    self.note_recovery(&store);
                    return Ok(store);
                }
                Err(OpenError::Io(error)) => {
                    self.note(format!("open failed: {error}"));
                    if self.fs.faults_struck() == struck {
                        return Err(format!("open failed without a fault: {error}"));
                    }
                    let again = if level == 0 { Row::Interrupted } else { Row::InterruptedAgain };
                    self.reached.note(again);
                    self.crash();
                }
                Err(error) => return Err(format!("false alarm: {error} ({error:?})")),
            }
        }
        self.open_healed()
    }

    fn note_recovery(&mut self, store: &Store) {
        self.struck_before = self.fs.faults_struck();
        let report = store.recovery_report();
        self.reached.note_if(Row::TornTail, report.torn_bytes > 0);
        self.reached.note_if(Row::Quarantined, report.quarantined_segments > 0);
        self.reached.note_if(Row::Rewritten, report.rewritten_bytes > 0);
        self.reached.note_if(Row::Remade, report.remade_headers > 0);
    }

    pub(crate) fn open_healed(&mut self) -> Check<Store> {
        self.fs.clear_faults();
        let store = self.open().map_err(|error| format!("healed disk: {error} ({error:?})"))?;
        self.note_recovery(&store);
        Ok(store)
    }

    // -------------------------------------------------------------------------------------------- checking

    /// Acknowledged is there, in order, once; the rest is whole. What is found is acknowledged from now on,
    /// for it has been shown.
    pub(crate) fn check_contents(&mut self, store: &Store) -> Check<()> {
        let events = store.read_all(Position::START).map_err(|e| e.to_string())?;
        let mut found = Vec::new();
        let mut revisions: BTreeMap<StreamId, Revision> = BTreeMap::new();
        for event in events {
            let event = event.map_err(|e| format!("reading: {e}"))?;
            let next = revisions.entry(event.stream().clone()).or_insert(Revision::FIRST);
            if event.revision() != *next || event.position().get() != found.len() as u64 {
                return Err(format!("{} of {} is out of order", event.revision(), event.stream()));
            }
            *next = next.next();
            found.push((event.id(), event.data().clone()));
        }
        let mut rest = found.as_slice();
        for (index, batch) in self.acked.iter().enumerate() {
            rest = rest.strip_prefix(batch.as_slice()).ok_or_else(|| {
                let (all, events) = (self.acked.len(), found.len());
                let end = store.journal().end();
                format!("acknowledged batch {index} of {all} is lost: {events} events, {end:?}")
            })?;
        }
        while !rest.is_empty() {
            let whole = self.maybe.iter().position(|batch| rest.starts_with(batch));
            let Some(index) = whole else {
                return Err(
                    "an event that was never submitted, a part of a batch, or a repetition".into(),
                );
            };
            let batch = self.maybe.remove(index);
            rest = &rest[batch.len()..];
            self.acked.push(batch);
        }
        if store.journal().end().position.get() != found.len() as u64 {
            return Err("the end doesn't agree with the events".into());
        }
        self.note(format!("found {} batches, {:?}", self.acked.len(), store.recovery_report()));
        Ok(())
    }

    /// On a healed disk everything works again: contents, mirror, appending, closing, byte identity.
    pub(crate) fn check_healed(&mut self) -> Check<()> {
        let store = self.open_healed()?;
        self.check_contents(&store)?;
        self.mirror_life(&store, true)?;
        if !self.append_one(&store)? {
            return Err("an append fails on a healed disk".into());
        }
        store.close().map_err(|e| e.to_string())?;
        self.check_mirror_files()
    }

    // ------------------------------------------------------------------------------------------- appending

    fn new_id(&mut self) -> EventId {
        self.next_id += 1;
        EventId::from_bytes((self.next_id ^ 7 << 100).to_le_bytes())
    }

    pub(crate) fn new_batch(&mut self) -> Batch {
        let count = self.rng.usize(1..4);
        // Some batches span many sectors, so that they tear.
        let room = (self.options.batch_bytes_max as usize - 128) / count - 128;
        let most = if self.rng.u8(..) < 128 { room } else { room.min(100) };
        (0..count)
            .map(|_| {
                let id = self.new_id();
                let len = self.rng.usize(..most);
                let fill = self.rng.u8(1..);
                (id, vec![fill; len])
            })
            .collect()
    }

    pub(crate) fn request(&mut self, batch: &Batch) -> Append {
        let stream = StreamId::new(format!("s-{}", self.rng.u8(..5))).unwrap();
        request_to(&stream, batch)
    }

    /// Appends a new batch, or once more one whose fate is unknown. Whether the store goes on.
    pub(crate) fn append_one(&mut self, store: &Store) -> Check<bool> {
        let retry = !self.maybe.is_empty() && self.rng.bool();
        let batch = if retry { self.maybe[0].clone() } else { self.new_batch() };
        self.append(store, batch, retry)
    }

    /// Appends one event that spans as many sectors as a batch can.
    pub(crate) fn append_large(&mut self, store: &Store) -> Check<bool> {
        let len = self.options.batch_bytes_max as usize - 384;
        let batch = vec![(self.new_id(), vec![self.rng.u8(1..); len])];
        self.append(store, batch, false)
    }

    fn append(&mut self, store: &Store, batch: Batch, retry: bool) -> Check<bool> {
        let request = self.request(&batch);
        if !retry {
            self.maybe.push(batch.clone());
        }
        self.reached.note_if(Row::Repeated, retry);
        let segments = store.journal().segments().len();
        let answer = store.append(&request);
        self.reached.note_if(Row::Roll, store.journal().segments().len() > segments);
        self.reached.note_if(Row::Unknown, matches!(answer, Err(AppendError::Unknown(_))));
        self.reached.note_if(Row::DiskFull, matches!(answer, Err(AppendError::DiskFull(_))));
        let unprovoked = self.fs.faults_struck() == self.struck_before && self.fs.down().is_none();
        if let (true, Err(AppendError::Unknown(_) | AppendError::Poisoned(_))) =
            (unprovoked, &answer)
        {
            return Err(format!("append fails without a fault: {answer:?}"));
        }
        match answer {
            Ok(Appended::New(_)) => {
                self.maybe.retain(|other| other != &batch);
                self.acked.push(batch);
                Ok(true)
            }
            Ok(Appended::Duplicate(_)) => Err("a new batch is called a duplicate".into()),
            Err(AppendError::Unknown(_)) => Ok(false),
            Err(AppendError::DiskFull(_)) => {
                self.maybe.retain(|other| other != &batch || retry);
                Ok(true)
            }
            Err(error) if error.is_certainly_not_written() => {
                self.maybe.retain(|other| other != &batch || retry);
                self.note(format!("append: {error}"));
                Ok(false)
            }
            Err(error) => Err(format!("append: {error}")),
        }
    }

    // ---------------------------------------------------------------------------------------------- mirror

    /// The mirror takes in what is durable, with crashes of its own.
    pub(crate) fn mirror_life(&mut self, store: &Store, to_the_end: bool) -> Check<()> {
        if !to_the_end && self.rng.u8(..) < 100 {
            let at = self.mirror_fs.ops() + self.rng.u64(..80);
            let fault =
                [Fault::PowerCut, Fault::PowerCut, Fault::Eio, Fault::Kill][self.rng.usize(..4)];
            self.mirror_fs.fail_at(at, fault, Repeat::Once);
            self.note(format!("mirror: plan {fault:?}"));
        }
        let fed = self.feed(store, to_the_end)?;
        self.mirror_fs.clear_faults();
        // The planned crash may have struck where the mirror goes on without a word, such as in the
        // allocation of the quarantine's reserve; then it is down all the same.
        match fed && self.mirror_fs.down().is_none() {
            true => {}
            false if to_the_end => return Err("the mirror fails on a healed disk".into()),
            false => {
                self.reached.note(Row::MirrorCrash);
                self.crash_mirror();
            }
        }
        Ok(())
    }

    /// A bit of what the mirror's last segment holds is flipped while nobody looks.
    pub(crate) fn damage_mirror(&mut self) {
        let Some((name, bytes)) = segments(&self.mirror_fs, Path::new(MIRROR)).pop() else {
            return;
        };
        let end = bytes.iter().rposition(|&byte| byte != 0).unwrap_or(0) as u64;
        let at = if end > 4096 { self.rng.u64(4096..end) } else { 0 };
        self.mirror_fs.flip_bit(&Path::new(MIRROR).join(name), at, 1);
        self.mirror_damaged = true;
    }

    pub(crate) fn open_mirror(&self, store: &Store) -> Result<Ingest, OpenError> {
        let fs: Arc<dyn Fs> = Arc::new(self.mirror_fs.clone());
        match Ingest::open(&fs, Path::new(MIRROR), &self.options)? {
            Some(ingest) => Ok(ingest),
            None => Ingest::create(&fs, Path::new(MIRROR), store.journal().id(), &self.options),
        }
    }

    /// Whether the mirror got through without a failure of its disk.
    pub(crate) fn feed(&mut self, store: &Store, to_the_end: bool) -> Check<bool> {
        let origin = store.journal();
        let mut ingest = match self.open_mirror(store) {
            Ok(ingest) => ingest,
            Err(error) if is_disk_failure(&error) => return Ok(false),
            Err(error) => return Err(format!("mirror: false alarm: {error}")),
        };
        self.check_mirror_end(&ingest)?;
        let end = ingest.end();
        self.reached.note_if(Row::MirrorLowered, ingest.recovery_report().refetch);
        self.reached.note_if(Row::MirrorWitness, ingest.witness().is_some());
        let behind = origin.segments().iter().filter(|s| s.base_position >= end.position).count();
        self.reached.note_if(Row::MirrorCatchUp, behind > 1);
        let compared = match origin.compare(&end) {
            Err(ReadError::Io(_)) if !to_the_end => return Ok(true),
            compared => compared.map_err(|e| e.to_string())?,
        };
        if compared != Comparison::Equal {
            return Err(format!("mirror: is {compared:?} at {}", end.position));
        }
        let mut cursor = match origin.cursor(end.position) {
            Err(ReadError::Io(_)) if !to_the_end => return Ok(true),
            cursor => cursor.map_err(|e| e.to_string())?,
        };
        loop {
            let batch = match cursor.next_batch() {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                // The origin's disk fails: not the mirror's business.
                Err(ReadError::Io(_)) if !to_the_end => break,
                Err(error) => return Err(format!("mirror: origin: {error}")),
            };
            if !to_the_end && self.rng.u8(..) < 20 {
                break;
            }
            let page = batch.page.map_or(Ok(()), |page| ingest.segment(&page.bytes()));
            let taken = page.and_then(|()| ingest.batch(batch.batch.bytes()).map(drop));
            let synced = match taken {
                Ok(()) if self.rng.u8(..) < 128 => ingest.sync().map(drop),
                taken => taken,
            };
            match synced {
                Ok(()) => self.mirrored = ingest.journal().end().position,
                Err(IngestError::Poisoned(_) | IngestError::DiskFull(_)) => return Ok(false),
                Err(error) => return Err(format!("mirror: {error}")),
            }
        }
        match ingest.close() {
            Ok(()) if to_the_end => {
                self.mirrored = origin.end().position;
                self.mirror_damaged = false;
                Ok(true)
            }
            Ok(()) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    fn check_mirror_end(&mut self, ingest: &Ingest) -> Check<()> {
        let goes_back = ingest.recovery_report().refetch || ingest.witness().is_some();
        if self.mirror_damaged {
            if goes_back {
                self.mirrored = ingest.journal().end().position;
            }
            return Ok(());
        }
        if goes_back {
            return Err("mirror: lost a durable tail".into());
        }
        if ingest.journal().end().position < self.mirrored {
            return Err("mirror: forgot what was durable".into());
        }
        Ok(())
    }

    /// Sealed segments are equal as whole files, the active one up to the durable end.
    pub(crate) fn check_mirror_files(&self) -> Check<()> {
        let origin = segments(&self.fs, Path::new(DIR));
        let mirror = segments(&self.mirror_fs, Path::new(MIRROR));
        for (index, (name, bytes)) in mirror.iter().enumerate() {
            let Some((_, original)) = origin.iter().find(|(other, _)| other == name) else {
                return Err(format!("mirror: {name} is not in the origin"));
            };
            let sealed = index + 1 < mirror.len();
            if sealed && bytes != original {
                return Err(format!("mirror: sealed segment {name} differs"));
            }
            let len = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            if bytes.get(..len) != original.get(..len) {
                return Err(format!("mirror: active segment {name} differs"));
            }
        }
        Ok(())
    }
}

/// An append of `batch` to `stream`, whatever is in it.
pub(crate) fn request_to(stream: &StreamId, batch: &Batch) -> Append {
    let events = batch
        .iter()
        .map(|(id, payload)| NewEvent::raw("test.happened", payload.clone()).unwrap().id(*id));
    Append::to(stream, ExpectedRevision::Any, events)
}

/// Names and contents of all segments.
pub(crate) fn segments(fs: &SimFs, dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs
        .files()
        .into_iter()
        .filter(|path| path.starts_with(dir.strip_prefix("/").unwrap_or(dir)))
        .filter(|path| !path.iter().any(|part| part == "quarantine"))
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), fs.raw(&path)?)))
        .collect();
    found.sort();
    found
}
