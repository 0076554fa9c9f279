//! One write of a life lands in another place, and succeeds. Whatever becomes of it is reported, or harmless:
//! what is read is what was written, and nothing is missing in silence.
//!
//! The power stays on until the store was opened again: a misdirected write together with the loss of the
//! mark is a residual risk that the specification states.

use std::sync::Arc;

use headwater::fs::Fs;
use headwater::fs::sim::Fault;
use headwater::{OpenError, Position, ReadError};

use super::Check;
use super::world::{World, seeded};

/// How the misdirected writes of some seeds ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ending {
    /// Damage was reported.
    pub(crate) reported: u64,
    /// Everything was there.
    pub(crate) harmless: u64,
}

pub(crate) fn run(seed: u64) -> Check<Ending> {
    seeded(seed, None, || {
        let mut world = World::new(seed);
        life(&mut world).map_err(|what| world.failure(seed, &what))
    })
}

fn life(world: &mut World) -> Check<Ending> {
    let reported = Ok(Ending { reported: 1, harmless: 0 });
    let mut store = world.open_healed()?;
    for _ in 0..world.rng.u32(3..20) {
        world.append_one(&store)?;
    }
    if world.rng.bool() {
        drop(store);
        world.fs.kill();
        world.plan(Fault::Misdirect, 60);
        store = match world.open() {
            Ok(store) => store,
            Err(OpenError::Io(error)) => return Err(format!("opening: {error}")),
            Err(_) => return reported,
        };
    } else {
        world.plan(Fault::Misdirect, 60);
    }
    for _ in 0..world.rng.u32(..25) {
        match world.append_one(&store) {
            Ok(true) => {}
            Ok(false) => break,
            Err(what) => return Err(what),
        }
    }
    if world.rng.bool() {
        drop(store.close());
    }
    drop(store);
    world.fs.clear_faults();
    world.fs.kill();
    match world.open() {
        Err(OpenError::Io(error)) => Err(format!("opening: {error}")),
        Err(error) => {
            world.note(format!("reported: {error}"));
            read_what_is_left(world)?;
            reported
        }
        Ok(store) => match prefix(world, store.read_all(Position::START))? {
            Some(missing) if missing > 0 => {
                Err(format!("{missing} batches are missing in silence"))
            }
            Some(_) => Ok(Ending { reported: 0, harmless: 1 }),
            None => reported,
        },
    }
}

/// Reading beside the damage shows nothing that is wrong.
fn read_what_is_left(world: &mut World) -> Check<()> {
    let fs: Arc<dyn Fs> = Arc::new(world.fs.clone());
    let dir = std::path::Path::new(super::world::DIR).join("journal");
    if let Ok((journal, _)) = headwater::Journal::open_read_only(&fs, &dir) {
        prefix(world, journal.read_all(Position::START))?;
    }
    Ok(())
}

/// How many acknowledged batches are missing at the end; `None` if reading reported damage.
fn prefix(world: &World, events: Result<headwater::Events, ReadError>) -> Check<Option<usize>> {
    let Ok(events) = events else { return Ok(None) };
    let mut found = Vec::new();
    let mut damaged = false;
    for event in events {
        match event {
            Ok(event) => found.push((event.id(), event.data().clone())),
            Err(ReadError::Io(error)) => return Err(format!("reading: {error}")),
            Err(_) => {
                damaged = true;
                break;
            }
        }
    }
    let mut rest = found.as_slice();
    for (index, batch) in world.acked.iter().enumerate() {
        match rest.strip_prefix(batch.as_slice()) {
            Some(behind) => rest = behind,
            None if rest.is_empty() => {
                return Ok((!damaged).then_some(world.acked.len() - index));
            }
            None => return Err(format!("batch {index} is read as something else")),
        }
    }
    while !rest.is_empty() {
        let Some(batch) = world.maybe.iter().find(|batch| rest.starts_with(batch)) else {
            return Err("an event is read that was never submitted there".into());
        };
        rest = &rest[batch.len()..];
    }
    Ok((!damaged).then_some(0))
}
