//! File systems without space or without inodes: appends say `DiskFull` and nothing else, reads go on, the
//! journal can be opened, and as soon as there is space appends work again, without a restart.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use fastrand::Rng;
use headwater::{AppendError, Store};

use crate::child;
use crate::driver::{Device, Ledger};
use crate::mounts::{Image, Kind, Mount};
use crate::{Plan, Reached, Stop};

const PAGE_BYTES: u64 = 4096;
/// The journal is full long before it has appended so much.
const BATCHES_MAX: usize = 20_000;

pub(crate) fn tmpfs(plan: &Plan) -> Reached {
    plan.need_mounts()?;
    let mount = Mount::tmpfs(&plan.dir("full").join("tmpfs"), 1 << 20, 200);
    let mount = mount.map_err(Stop::Skipped)?;
    let bytes = run(plan, &mount, &mut Bytes::new(&mount))?;
    let inodes = run(plan, &mount, &mut Inodes::new(&mount))?;
    Ok(format!("no space: {bytes}; no inodes: {inodes}; 0 violations"))
}

pub(crate) fn ext4(plan: &Plan) -> Reached {
    plan.need_mounts()?;
    let image = Image::make_sized(&plan.dir("full"), "ext4", Kind::Ext4, 16 << 20);
    let image = image.map_err(Stop::Skipped)?;
    let mount = image.mount().map_err(Stop::Skipped)?;
    let bytes = run(plan, &mount, &mut Bytes::new(&mount))?;
    Ok(format!("no space: {bytes}; 0 violations"))
}

/// Takes what a file system has to give.
trait Ballast {
    /// Takes all but `left` units.
    fn take(&mut self, left: u64) -> std::io::Result<()>;
    fn give_back(&mut self) -> std::io::Result<()>;
}

struct Bytes {
    path: PathBuf,
}

impl Bytes {
    fn new(mount: &Mount) -> Self {
        Self { path: mount.point.join("ballast") }
    }
}

impl Ballast for Bytes {
    fn take(&mut self, left: u64) -> std::io::Result<()> {
        let mut file = File::create(&self.path)?;
        let page = [1; PAGE_BYTES as usize];
        let mut len: u64 = 0;
        loop {
            match file.write_all(&page) {
                Ok(()) => len += PAGE_BYTES,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error),
            }
        }
        file.set_len(len.saturating_sub(left * PAGE_BYTES))?;
        file.sync_all()
    }

    fn give_back(&mut self) -> std::io::Result<()> {
        let file = File::create(&self.path)?;
        file.sync_all()
    }
}

struct Inodes {
    dir: PathBuf,
    made: Vec<PathBuf>,
}

impl Inodes {
    fn new(mount: &Mount) -> Self {
        Self { dir: mount.point.join("inodes"), made: Vec::new() }
    }
}

impl Ballast for Inodes {
    fn take(&mut self, left: u64) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        loop {
            let path = self.dir.join(self.made.len().to_string());
            match File::create_new(&path) {
                Ok(_) => self.made.push(path),
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error),
            }
        }
        for path in self.made.drain(self.made.len().saturating_sub(left as usize)..) {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }

    fn give_back(&mut self) -> std::io::Result<()> {
        self.made.drain(..).try_for_each(std::fs::remove_file)
    }
}

fn run(plan: &Plan, mount: &Mount, ballast: &mut dyn Ballast) -> Result<String, Stop> {
    let mut rng = plan.rng();
    let budget = plan.budget(60, 6);
    let (mut full, mut reopened, mut batches) = (0, 0, 0);
    let mut ledger = Ledger::new(mount.point.join("store"), 1);
    while budget.allows(full) {
        batches += fill(&mut ledger, ballast, &mut rng, &mut reopened)?;
        full += 1;
        ledger.check(Device::Honest)?;
        std::fs::remove_dir_all(&ledger.dir).unwrap();
        ledger = Ledger::new(ledger.dir.clone(), 1);
    }
    Ok(format!("full {full} times, opened {reopened} times while full, {batches} batches appended"))
}

/// Fills a journal, reads it, empties the rest of the file system, and goes on.
fn fill(
    ledger: &mut Ledger,
    ballast: &mut dyn Ballast,
    rng: &mut Rng,
    reopened: &mut usize,
) -> Result<usize, Stop> {
    let violated = |what: String| Stop::Violated(what);
    let mut store = open(ledger)?;
    for _ in 0..rng.usize(..20) {
        append(&store, ledger)?;
    }
    ballast.take(rng.u64(..24)).unwrap();
    let mut batches = 0;
    while append(&store, ledger)? {
        batches += 1;
        if batches == BATCHES_MAX {
            return Err(violated("is never full".into()));
        }
    }
    ledger.look(&store).map_err(violated)?;
    if rng.bool() {
        if rng.bool() {
            store.close().map_err(|error| violated(format!("closing while full: {error}")))?;
        }
        drop(store);
        store = open(ledger)?;
        *reopened += 1;
        ledger.look(&store).map_err(violated)?;
    }
    while append(&store, ledger)? {}
    ballast.give_back().unwrap();
    for _ in 0..20 {
        if !append(&store, ledger)? {
            return Err(violated("still full when there is space again".into()));
        }
    }
    Ok(batches + 20)
}

fn open(ledger: &Ledger) -> Result<Store, Stop> {
    let store = child::open(&ledger.dir, ledger.segment_bytes);
    store.map_err(|error| Stop::Violated(format!("can't be opened: {error}")))
}

/// Appends the next batch; false if there is no space.
fn append(store: &Store, ledger: &mut Ledger) -> Result<bool, Stop> {
    let first = ledger.firsts[0];
    match store.append(&child::batch(0, first)) {
        Ok(appended) => {
            ledger.acknowledge(0, child::next_batch(first), appended.token().position.get());
            Ok(true)
        }
        Err(AppendError::DiskFull(_)) => Ok(false),
        Err(error) => Err(Stop::Violated(format!("neither appended nor full: {error}"))),
    }
}
