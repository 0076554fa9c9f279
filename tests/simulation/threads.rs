//! Several threads append to one store until its disk fails: everybody is answered, and what was
//! acknowledged is there, where it was said to be. Which groups form is up to the scheduler, so a seed
//! determines the faults and not the run.

use headwater::{AppendError, Position, Store, StreamId};

use super::Check;
use super::world::{Batch, World, request_to, seeded};

const THREADS: usize = 3;
const APPENDS: usize = 8;

pub(crate) fn run(seed: u64) -> Check<u64> {
    seeded(seed, None, || {
        let mut world = World::new(seed);
        world.options.background_thread = world.rng.bool();
        lives(&mut world).map_err(|what| world.failure(seed, &what))?;
        Ok(world.crashes)
    })
}

fn lives(world: &mut World) -> Check<()> {
    let mut placed: Vec<(u64, Batch)> = Vec::new();
    for _ in 0..world.rng.u32(2..4) {
        let store = world.open_through_crashes()?;
        check_placed(&store, &placed)?;
        let mine: Vec<Vec<Batch>> =
            (0..THREADS).map(|_| (0..APPENDS).map(|_| world.new_batch()).collect()).collect();
        world.plan_faults(120);
        std::thread::scope(|scope| {
            let store = &store;
            let appending: Vec<_> = mine
                .iter()
                .enumerate()
                .map(|(number, batches)| scope.spawn(move || append_all(store, number, batches)))
                .collect();
            for thread in appending {
                placed.extend(thread.join().map_err(|_| "a thread panicked".to_owned())??);
            }
            Ok::<(), String>(())
        })?;
        drop(store);
        world.crash();
    }
    let store = world.open_healed()?;
    check_placed(&store, &placed)
}

/// The acknowledged batches, with the position of their first event.
fn append_all(store: &Store, number: usize, batches: &[Batch]) -> Check<Vec<(u64, Batch)>> {
    let stream = StreamId::new(format!("t-{number}")).map_err(|error| error.to_string())?;
    let mut acked = Vec::new();
    for batch in batches {
        match store.append(&request_to(&stream, batch)) {
            Ok(appended) => {
                let first = appended.receipt().events.first().ok_or("an empty receipt")?;
                acked.push((first.position.get(), batch.clone()));
            }
            Err(AppendError::Unknown(_)) => break,
            Err(error) if error.is_certainly_not_written() => {}
            Err(error) => return Err(format!("append: {error}")),
        }
    }
    Ok(acked)
}

fn check_placed(store: &Store, placed: &[(u64, Batch)]) -> Check<()> {
    let events = store.read_all(Position::START).map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for event in events {
        let event = event.map_err(|error| format!("reading: {error}"))?;
        found.push((event.id(), event.data().clone()));
    }
    for (at, batch) in placed {
        let there = found.get(*at as usize..).is_some_and(|found| found.starts_with(batch));
        if !there {
            return Err(format!("the acknowledged batch at {at} is lost"));
        }
    }
    let mut ids: Vec<_> = found.iter().map(|(id, _)| id.to_string()).collect();
    ids.sort();
    ids.dedup();
    if ids.len() != found.len() {
        return Err("an event is there twice".into());
    }
    Ok(())
}
