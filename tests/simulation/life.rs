//! Random lives: appending, crashing, recovering, crashing inside recovery, feeding a mirror that crashes
//! too; in the end everything heals.

use std::path::Path;

use headwater::Store;
use headwater::format::crc32;
use headwater::fs::sim::{Fault, Op};
use headwater::planted::Bug;

use super::Check;
use super::overlapping::Overlapping;
use super::reached::{Reached, Row};
use super::world::{Batch, DIR, World, seeded, segments};

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) crashes: u64,
    /// Over every operation on both disks, what the crashes left, and what was answered.
    pub(crate) trace_hash: u64,
    pub(crate) reached: Reached,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, bug: Option<Bug>) -> Check<Outcome> {
    seeded(seed, bug, || {
        let mut world = World::new(seed);
        lives(&mut world).map_err(|what| world.failure(seed, &what))?;
        let disks = world.fs.trace_hash() ^ world.mirror_fs.trace_hash().rotate_left(1);
        let (log, acked) = (world.log.join("\n"), format!("{:?}", world.acked));
        let told = u64::from(crc32(&[log.as_bytes(), acked.as_bytes()]));
        let (crashes, reached) = (world.crashes, world.reached);
        Ok(Outcome { crashes, trace_hash: disks ^ told.rotate_left(32), reached })
    })
}

fn lives(world: &mut World) -> Check<()> {
    for life in 0..world.rng.u32(2..7) {
        world.note(format!("life {life}"));
        if world.rng.u8(..) < 8 {
            world.damage_mirror();
        }
        let store = world.open_through_crashes()?;
        world.check_contents(&store)?;
        if world.rng.u8(..) < 40 {
            check_reopening(world, store)?;
            continue;
        }
        if world.rng.u8(..) < 80 {
            torn_append(world, &store)?;
            continue;
        }
        world.plan_faults(120);
        match world.rng.u8(..) {
            0..70 => overlapping_groups(world, store, 8)?,
            _ => appends(world, store)?,
        }
        world.crash();
    }
    world.check_healed()
}

/// Opening twice changes no byte of the segments.
fn check_reopening(world: &mut World, store: Store) -> Check<()> {
    drop(store);
    let before = segments(&world.fs, Path::new(DIR));
    if before.is_empty() && world.acked.is_empty() {
        // An interrupted beginning was set aside; the first append makes the first segment.
        return world.open_healed().map(drop);
    }
    if before.is_empty() {
        return Err("there are no segments to compare".into());
    }
    if world.rng.bool() {
        world.crash();
    } else {
        world.fs.kill();
    }
    let store = world.open_healed()?;
    world.check_contents(&store)?;
    let after = segments(&world.fs, Path::new(DIR));
    // An opening makes the last segment as long as it is to be: zeros, behind the end.
    let same = before.len() == after.len()
        && before.iter().zip(&after).all(|(before, after)| {
            before.0 == after.0 && without_room(&before.1) == without_room(&after.1)
        });
    if !same {
        return Err("opening again changed a segment".into());
    }
    Ok(())
}

fn without_room(bytes: &[u8]) -> &[u8] {
    let len = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    bytes.get(..len).unwrap_or_default()
}

/// The power goes in the write or the sync of a batch, or its sync fails.
fn torn_append(world: &mut World, store: &Store) -> Check<()> {
    for _ in 0..world.rng.u32(..4) {
        world.append_one(store)?;
    }
    let how =
        [(Op::Write, Fault::PowerCut), (Op::SyncData, Fault::PowerCut), (Op::SyncData, Fault::Eio)];
    let (op, fault) = how[world.rng.usize(..how.len())];
    world.fs.fail_next(op, fault);
    world.note(format!("plan {fault:?} in the next {op:?}"));
    if !world.append_large(store)? {
        followers_of_the_failed(world, store)?;
    }
    world.crash();
    Ok(())
}

/// The writer has failed, its followers go on: what they see must be durable.
fn followers_of_the_failed(world: &mut World, store: &Store) -> Check<()> {
    if world.fs.down().is_some() {
        return Ok(());
    }
    world.reached.note(Row::Poisoned);
    world.mirror_life(store, false)
}

fn appends(world: &mut World, store: Store) -> Check<()> {
    for _ in 0..world.rng.u32(..25) {
        if !world.append_one(&store)? {
            followers_of_the_failed(world, &store)?;
            break;
        }
        if world.rng.u8(..) < 20 {
            world.mirror_life(&store, false)?;
        }
    }
    if world.rng.u8(..) < 60 {
        let closed = store.close();
        world.reached.note_if(Row::CleanClose, closed.is_ok());
        world.note(format!("close: {closed:?}"));
    }
    Ok(())
}

/// Groups by the overlapping writer, until its disk fails or the segment is full.
pub(crate) fn overlapping_groups(world: &mut World, store: Store, groups_max: u32) -> Check<()> {
    let end = store.journal().end();
    let Some(segment) = store.journal().segments().pop() else { return Ok(()) };
    drop(store);
    let mut writer = match Overlapping::begin(&world.fs, &segment.path, end, &mut world.rng) {
        Ok(Some(writer)) => writer,
        _ => return Ok(()),
    };
    world.note("overlapping groups");
    world.reached.note(Row::Overlapping);
    let mut unacknowledged: Vec<Batch> = Vec::new();
    for _ in 0..world.rng.u32(..groups_max) {
        let mut group = Vec::new();
        for _ in 0..world.rng.u32(1..3) {
            let batch = world.new_batch();
            world.maybe.push(batch.clone());
            group.push(batch);
        }
        match writer.write(&group) {
            Ok(true) => {}
            Ok(false) | Err(_) => return Ok(()),
        }
        if writer.sync(world.rng.bool()).is_err() {
            return Ok(());
        }
        // The group in front is acknowledged now; this one has only been laid out, as far as its
        // waiters know.
        for batch in unacknowledged.drain(..) {
            world.maybe.retain(|other| other != &batch);
            world.acked.push(batch);
        }
        unacknowledged = group;
    }
    Ok(())
}
