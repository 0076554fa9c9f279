//! Simulated crashes: whatever was acknowledged is there, in order, once; whatever was not is whole or
//! absent; there is no false corruption; opening again changes nothing.
//!
//! A run is determined by its seed. `HEADWATER_SEED=n` runs one seed, `HEADWATER_CRASHES=n` sets how many
//! crashes to reach.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::format::batch::{BatchHeader, Link, body_digest, padded_len};
use headwater::format::files::{MARK_SLOT_BYTES, MARK_SLOT_STRIDE, Mark};
use headwater::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use headwater::format::{Flags, crc32};
use headwater::fs::sim::{Fault, FaultRates, Repeat, SectorSize, SimFs};
use headwater::fs::{Fs, OpenMode};
use headwater::planted::{self, Bug};
use headwater::{
    Append, AppendError, Appended, Checkpoint, Comparison, EventId, ExpectedRevision, Incarnation,
    Ingest, JournalOptions, NewEvent, OpenError, Position, Store, StreamId,
};

const DIR: &str = "/store";
const MIRROR: &str = "/mirror";

/// A batch as it was submitted: ids and payloads.
type Batch = Vec<(EventId, Vec<u8>)>;

struct Run {
    rng: fastrand::Rng,
    fs: SimFs,
    mirror_fs: SimFs,
    options: JournalOptions,
    /// In order; certainly there.
    acked: Vec<Batch>,
    /// Perhaps there, whole, behind `acked`.
    maybe: Vec<Batch>,
    /// Position up to which the mirror has said that it is durable.
    mirrored: Position,
    next_id: u128,
    crashes: u64,
    log: Vec<String>,
}

type Check<T> = Result<T, String>;

fn run(seed: u64, bug: Option<Bug>) -> Check<u64> {
    headwater::env::seed(Some(seed));
    planted::plant(bug);
    let mut run = Run::new(seed);
    let outcome = run.lives();
    headwater::env::seed(None);
    planted::plant(None);
    outcome.map_err(|what| format!("seed {seed}: {what}\n  {}", run.log.join("\n  ")))?;
    Ok(run.crashes)
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let sector = [SectorSize::B64, SectorSize::B512, SectorSize::B512, SectorSize::B4096];
        let sector = sector[rng.usize(..4)];
        let alignment = [64, 64, 64, 512, 4096][rng.usize(..5)];
        let batch_bytes_max = [1024, 2048][rng.usize(..2)];
        let segment =
            4096 + u64::from(batch_bytes_max) + u64::from(alignment) + rng.u64(0..6) * 1024;
        let fs = SimFs::with_sector_size(rng.u64(..), sector);
        let mirror_fs = SimFs::with_sector_size(rng.u64(..), sector);
        for fs in [&fs, &mirror_fs] {
            fs.drop_cache_works(rng.u8(..) < 200);
            fs.set_garbage_growth(rng.bool());
        }
        let options = JournalOptions {
            segment_bytes_max: segment,
            segment_bytes_first: segment,
            batch_bytes_max,
            group_bytes_max: u64::from(batch_bytes_max) * 2,
            group_alignment_bytes: alignment,
            idempotency_window_events: [5, 1000][rng.usize(..2)],
            background_mark_sync: false,
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
            next_id: 0,
            crashes: 0,
            log: Vec::new(),
        }
    }

    fn note(&mut self, what: impl Into<String>) {
        self.log.push(what.into());
    }

    fn lives(&mut self) -> Check<()> {
        for life in 0..self.rng.u32(2..7) {
            self.note(format!("life {life}"));
            let Some(store) = self.open_store()? else { continue };
            self.check_contents(&store)?;
            if self.rng.u8(..) < 40 {
                self.check_reopening(store)?;
                continue;
            }
            self.plan_faults(120);
            match self.rng.u8(..) {
                0..70 => self.overlapping_groups(store)?,
                _ => self.appends(store)?,
            }
            self.crash(false);
        }
        // Heal, and see that everything works.
        let Some(store) = self.open_healed()? else { return Err("does not open".into()) };
        self.check_contents(&store)?;
        self.mirror_life(&store, true)?;
        self.append_one(&store)?;
        store.close().map_err(|e| e.to_string())?;
        self.check_mirror_files()
    }

    fn plan_faults(&mut self, within: u64) {
        let at = self.fs.ops() + self.rng.u64(..within);
        let fault = match self.rng.u8(..12) {
            0..4 => Fault::PowerCut,
            4 => Fault::Kill,
            5..8 => Fault::Eio,
            8 => Fault::Enospc,
            9 => Fault::ShortWrite,
            10 => Fault::Eintr,
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

    /// Ends this life: the power goes, or only the process.
    fn crash(&mut self, power: bool) {
        self.fs.clear_faults();
        let cut =
            power || self.fs.down() == Some(headwater::fs::sim::Down::PowerCut) || self.rng.bool();
        if cut {
            self.fs.power_cut();
        } else {
            self.fs.kill();
        }
        self.crashes += 1;
        self.note(if cut { "power cut" } else { "kill" });
    }

    fn builder(&self) -> headwater::StoreBuilder {
        Store::builder(DIR)
            .create_if_missing()
            .journal_options(self.options.clone())
            .fs(Arc::new(self.fs.clone()))
    }

    /// Opens, with crashes and faults inside recovery.
    fn open_store(&mut self) -> Check<Option<Store>> {
        for _ in 0..4 {
            if self.rng.u8(..) < 100 {
                self.plan_faults(80);
            }
            let opened = self.builder().open();
            match opened {
                Ok(store) => {
                    self.fs.clear_faults();
                    return Ok(Some(store));
                }
                Err(OpenError::Io(error)) => {
                    self.note(format!("open failed: {error}"));
                    if self.fs.faults_struck() == 0 {
                        return Err(format!("open failed without a fault: {error}"));
                    }
                    self.crash(false);
                }
                Err(error) => return Err(format!("false alarm: {error} ({error:?})")),
            }
        }
        self.open_healed()
    }

    fn open_healed(&mut self) -> Check<Option<Store>> {
        self.fs.clear_faults();
        match self.builder().open() {
            Ok(store) => Ok(Some(store)),
            Err(error) => Err(format!("healed disk: {error} ({error:?})")),
        }
    }

    /// Acknowledged is there, in order, once; the rest is whole.
    fn check_contents(&mut self, store: &Store) -> Check<()> {
        let events = store.read_all(Position::START).map_err(|e| e.to_string())?;
        let mut found = Vec::new();
        for event in events {
            let event = event.map_err(|e| format!("reading: {e}"))?;
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

    /// Opening twice changes no byte of the segments.
    fn check_reopening(&mut self, store: Store) -> Check<()> {
        drop(store);
        let before = segments(&self.fs, Path::new(DIR));
        if self.rng.bool() {
            self.crash(false);
        } else {
            self.fs.kill();
        }
        let Some(store) = self.open_healed()? else { return Err("does not open".into()) };
        self.check_contents(&store)?;
        if segments(&self.fs, Path::new(DIR)) != before {
            return Err("opening again changed a segment".into());
        }
        Ok(())
    }

    fn new_batch(&mut self) -> Batch {
        let count = self.rng.usize(1..4);
        (0..count)
            .map(|_| {
                self.next_id += 1;
                let len = self.rng.usize(..250);
                let fill = self.rng.u8(..);
                (EventId::from_bytes((self.next_id ^ 7 << 100).to_le_bytes()), vec![fill; len])
            })
            .collect()
    }

    fn request(&mut self, batch: &Batch) -> Append {
        let stream = StreamId::new(format!("s-{}", self.rng.u8(..5))).unwrap();
        let events = batch
            .iter()
            .map(|(id, payload)| NewEvent::raw("test.happened", payload.clone()).unwrap().id(*id));
        Append::to(&stream, ExpectedRevision::Any, events)
    }

    fn append_one(&mut self, store: &Store) -> Check<bool> {
        let retry = !self.maybe.is_empty() && self.rng.bool();
        let batch = if retry { self.maybe[0].clone() } else { self.new_batch() };
        let request = self.request(&batch);
        if !retry {
            self.maybe.push(batch.clone());
        }
        match store.append(&request) {
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

    fn appends(&mut self, store: Store) -> Check<()> {
        for _ in 0..self.rng.u32(..25) {
            if !self.append_one(&store)? {
                break;
            }
            if self.rng.u8(..) < 20 {
                self.mirror_life(&store, false)?;
            }
        }
        if self.rng.u8(..) < 60 {
            let closed = store.close();
            self.note(format!("close: {closed:?}"));
        }
        Ok(())
    }

    /// A writer that lays out the next group before the last one is acknowledged, as the two-stage commit
    /// will: `durable` stays behind by one group, and a failed sync hits two.
    fn overlapping_groups(&mut self, store: Store) -> Check<()> {
        let end = store.journal().end();
        let Some(segment) = store.journal().segments().pop() else { return Ok(()) };
        drop(store);
        let mut writer = match Overlapping::begin(&self.fs, &segment.path, end, &mut self.rng) {
            Ok(Some(writer)) => writer,
            _ => return Ok(()),
        };
        self.note("overlapping groups");
        let mut unacknowledged: Vec<Batch> = Vec::new();
        for _ in 0..self.rng.u32(..8) {
            let mut group = Vec::new();
            for _ in 0..self.rng.u32(1..3) {
                let batch = self.new_batch();
                self.maybe.push(batch.clone());
                group.push(batch);
            }
            match writer.write(&group) {
                Ok(true) => {}
                Ok(false) | Err(_) => return Ok(()),
            }
            if writer.sync(self.rng.bool()).is_err() {
                return Ok(());
            }
            // The group in front is acknowledged now; this one has only been laid out, as far as its
            // waiters know.
            for batch in unacknowledged.drain(..) {
                self.maybe.retain(|other| other != &batch);
                self.acked.push(batch);
            }
            unacknowledged = group;
        }
        Ok(())
    }

    /// The mirror takes in what is durable, with crashes of its own.
    fn mirror_life(&mut self, store: &Store, to_the_end: bool) -> Check<()> {
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
                if self.rng.bool()
                    || self.mirror_fs.down() == Some(headwater::fs::sim::Down::PowerCut)
                {
                    self.mirror_fs.power_cut();
                } else {
                    self.mirror_fs.kill();
                }
                self.crashes += 1;
            }
        }
        Ok(())
    }

    /// Whether the mirror got through without a failure of its disk.
    fn feed(&mut self, store: &Store, to_the_end: bool) -> Check<bool> {
        let fs: Arc<dyn Fs> = Arc::new(self.mirror_fs.clone());
        let origin = store.journal();
        let opened = match Ingest::open(&fs, Path::new(MIRROR), &self.options) {
            Ok(None) => Ingest::create(&fs, Path::new(MIRROR), origin.id(), &self.options),
            Ok(Some(ingest)) => Ok(ingest),
            Err(error) => Err(error),
        };
        let mut ingest = match opened {
            Ok(ingest) => ingest,
            Err(OpenError::Io(_)) => return Ok(false),
            Err(error) => return Err(format!("mirror: false alarm: {error}")),
        };
        if ingest.recovery_report().refetch || ingest.witness().is_some() {
            return Err("mirror: lost a durable tail".into());
        }
        if ingest.journal().end().position < self.mirrored {
            return Err("mirror: forgot what was durable".into());
        }
        let end = ingest.end();
        let compared = match origin.compare(&end) {
            Err(headwater::ReadError::Io(_)) if !to_the_end => return Ok(true),
            compared => compared.map_err(|e| e.to_string())?,
        };
        if compared != Comparison::Equal {
            return Err(format!("mirror: is {compared:?} at {}", end.position));
        }
        let mut cursor = match origin.cursor(end.position) {
            Err(headwater::ReadError::Io(_)) if !to_the_end => return Ok(true),
            cursor => cursor.map_err(|e| e.to_string())?,
        };
        loop {
            let batch = match cursor.next_batch() {
                Ok(Some(batch)) => batch,
                Ok(None) => break,
                // The origin's disk fails: not the mirror's business.
                Err(headwater::ReadError::Io(_)) if !to_the_end => break,
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
                Err(headwater::IngestError::Poisoned(_)) => return Ok(false),
                Err(error) => return Err(format!("mirror: {error}")),
            }
        }
        match ingest.close() {
            Ok(()) if to_the_end => {
                self.mirrored = origin.end().position;
                Ok(true)
            }
            Ok(()) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// Sealed segments are equal as whole files, the active one up to the durable end.
    fn check_mirror_files(&self) -> Check<()> {
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

/// Names and contents of all segments.
fn segments(fs: &SimFs, dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs
        .files()
        .into_iter()
        .filter(|path| path.starts_with(dir) && !path.iter().any(|part| part == "quarantine"))
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), fs.raw(&path)?)))
        .collect();
    found.sort();
    found
}

struct Overlapping {
    file: Arc<dyn headwater::fs::File>,
    mark: Arc<dyn headwater::fs::File>,
    sequence: u64,
    page: SegmentPage,
    size: u64,
    end: Checkpoint,
    /// End of the group in front of the last one.
    previous: Checkpoint,
    /// What is published as durable.
    durable: Checkpoint,
    incarnation: Incarnation,
}

impl Overlapping {
    fn begin(
        fs: &SimFs,
        path: &Path,
        end: Checkpoint,
        rng: &mut fastrand::Rng,
    ) -> std::io::Result<Option<Self>> {
        let file = fs.open(path, OpenMode::Write)?;
        let mark_path: PathBuf = path.with_file_name("mark");
        let mark = fs.open(&mark_path, OpenMode::Write)?;
        let mut page = [0; HEADER_PAGE_BYTES];
        file.read_at(&mut page, 0)?;
        let PageState::Valid { page, .. } = SegmentPage::read(&page) else { return Ok(None) };
        let mut sequence = 0;
        for slot in 0..2 {
            let mut bytes = [0; MARK_SLOT_BYTES];
            mark.read_at(&mut bytes, slot * MARK_SLOT_STRIDE)?;
            sequence = sequence.max(Mark::decode(&bytes).map_or(0, |mark| mark.sequence));
        }
        Ok(Some(Self {
            size: file.size()?,
            file,
            mark,
            sequence,
            page,
            end,
            previous: end,
            durable: end,
            incarnation: Incarnation::new(rng.u64(1..)),
        }))
    }

    /// Writes a group behind the last one; false if it doesn't fit.
    fn write(&mut self, group: &[Batch]) -> std::io::Result<bool> {
        self.previous = self.end;
        let mut bytes = Vec::new();
        let start = self.end.offset;
        let base = self.page.header.base_offset;
        let mut end = self.end;
        for (index, batch) in group.iter().enumerate() {
            let body = body_of(batch);
            let mut padded = padded_len(body.len() as u64);
            if index + 1 == group.len() {
                let used = end.offset - base + padded;
                padded += used.next_multiple_of(u64::from(self.page.header.group_alignment)) - used;
            }
            let mut header = BatchHeader {
                header_len: 128,
                flags: Flags::default(),
                stored_len: body.len() as u32,
                raw_len: body.len() as u32,
                body_crc: crc32(&[&body]),
                count: batch.len() as u32,
                base_position: end.position,
                offset: end.offset,
                durable_offset: self.durable.offset,
                epoch: end.epoch + 1,
                padded_len: padded as u32,
                incarnation: self.incarnation,
                time_us: 0,
                chain: end.chain,
            };
            let digest = (end.offset == base).then_some(&self.page.digest);
            let salt = self.page.header.salt;
            let head = header.seal(end.chain, digest, &body_digest(&body), salt);
            let from = bytes.len();
            bytes.extend_from_slice(&head);
            bytes.extend_from_slice(&body);
            bytes.resize(from + padded as usize, 0);
            let Link { offset, position, chain } = header.end_link();
            end = Checkpoint { offset, position, chain, incarnation: self.incarnation, ..end };
        }
        let at = 4096 + start - base;
        if at + bytes.len() as u64 > self.size {
            return Ok(false);
        }
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write_at(&bytes[done..], at + done as u64) {
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.end = end;
        Ok(true)
    }

    /// Syncs what is written and publishes the group in front of the last one.
    fn sync(&mut self, write_mark: bool) -> std::io::Result<()> {
        self.file.sync_data()?;
        self.durable = self.previous;
        if write_mark {
            self.sequence += 1;
            let mark =
                Mark { sequence: self.sequence, end: self.durable, closed: false, witness: None };
            self.mark.write_at(&mark.encode(), self.sequence % 2 * MARK_SLOT_STRIDE).ok();
        }
        Ok(())
    }
}

/// The body of a batch whose events all open streams of their own.
fn body_of(batch: &Batch) -> Vec<u8> {
    let mut body = Vec::new();
    for (id, payload) in batch {
        let stream = StreamId::new(format!("o-{id}")).unwrap();
        let event = NewEvent::raw("test.happened", payload.clone()).unwrap().id(*id);
        headwater::format::record::encode(&mut body, &event, &stream, headwater::Revision::FIRST);
    }
    body
}

fn crashes_wanted() -> u64 {
    let text = std::env::var("HEADWATER_CRASHES").ok();
    text.map_or(10_000, |text| text.parse().expect("HEADWATER_CRASHES is a number"))
}

#[test]
fn acknowledged_batches_survive_every_crash_in_order_and_once() {
    if let Ok(seed) = std::env::var("HEADWATER_SEED") {
        run(seed.parse().expect("HEADWATER_SEED is a number"), None).unwrap();
        return;
    }
    let next = std::sync::atomic::AtomicU64::new(0);
    let crashes = std::sync::atomic::AtomicU64::new(0);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while crashes.load(relaxed) < crashes_wanted() {
                    let seed = next.fetch_add(1, relaxed);
                    crashes.fetch_add(run(seed, None).unwrap(), relaxed);
                }
            });
        }
    });
    println!("{} crashes in {} runs, 0 violations", crashes.into_inner(), next.into_inner());
}

/// A test that finds nothing proves nothing: these bugs must be found, within so many seeds.
#[test]
fn planted_bugs_are_caught() {
    for (bug, within) in
        [(Bug::AcknowledgeBeforeSync, 100), (Bug::NoBodyCheck, 300), (Bug::NoDirectorySync, 300)]
    {
        let caught = (0..within).find(|seed| run(*seed, Some(bug)).is_err());
        let seed = caught.unwrap_or_else(|| panic!("{bug:?} was not caught within {within} seeds"));
        println!("{bug:?} caught by seed {seed}");
    }
}
