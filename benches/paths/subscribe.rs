//! How soon a subscriber in the same process has an event.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use headwater::{Item, Position, Store};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;

use crate::append::batch_bytes;
use crate::corpus::{Corpus, Plain};
use crate::measure::Measured;
use crate::meter::Took;
use crate::shared::held::{self, Held};
use crate::{Group, Outcome, PATIENCE, Scratch, Way};

pub(crate) fn append_to_subscriber(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("subscriber")?;
    let after = append_and_hear(&folder.join("after"), Since::Answer)?;
    let whole = append_and_hear(&folder.join("whole"), Since::Call)?;
    let bytes = after.1;
    let ways = vec![
        Way {
            name: "condition variable, thread to thread",
            events: 1,
            bytes: 0,
            operation: Box::new(bare_wake()),
        },
        Way { name: "from the append's answer to the event", events: 1, bytes, operation: after.0 },
        Way { name: "from the append's call to the event", events: 1, bytes, operation: whole.0 },
    ];
    let held = |measured: &[Measured]| {
        let [bare, after, _] = measured else { return Vec::new() };
        let microseconds = |measured: &Measured| measured.seconds().map(|it| it.map(|s| s * 1e6));
        let note = microseconds(bare).map_or_else(String::new, |it| {
            format!("0 if it has it before the answer; a bare wake-up from thread to thread took {:.1} µs", it.median)
        });
        vec![Held::new(held::SUBSCRIPTION, microseconds(after), note)]
    };
    let durable = "fdatasync before the event is shown to anybody";
    Ok(Group { held: Box::new(held), ..Group::new("append to subscriber", durable, ways) })
}

type Operation = Box<dyn FnMut() -> Outcome<Took>>;

/// From when on time is taken.
#[derive(Clone, Copy, PartialEq)]
enum Since {
    Call,
    Answer,
}

fn append_and_hear(dir: &std::path::Path, since: Since) -> Outcome<(Operation, u64)> {
    let (store, plain) = (Store::create(dir)?, Plain::new("bench")?);
    let bytes = batch_bytes(&store, 1)?;
    let heard = listen(&store)?;
    heard.recv_timeout(PATIENCE)?; // the event in front
    let operation = move || {
        // So that the subscriber waits again: what is measured is waking it, not finding it awake.
        std::thread::sleep(Duration::from_micros(200));
        let called = Instant::now();
        store.append(&plain.append(1))?;
        let answered = Instant::now();
        let since = if since == Since::Call { called } else { answered };
        let heard: Instant = heard.recv_timeout(PATIENCE)?;
        Ok(Took::only(heard.saturating_duration_since(since)))
    };
    Ok((Box::new(operation), bytes))
}

/// Tells when each event arrived. The thread ends when the store has gone.
fn listen(store: &Store) -> Outcome<Receiver<Instant>> {
    let mut subscription = store.subscribe(Position::START)?;
    let (tell, heard) = channel();
    std::thread::spawn(move || {
        while let Ok(Some(item)) = subscription.next(PATIENCE) {
            let now = Instant::now();
            if matches!(item, Item::Event(_)) && tell.send(now).is_err() {
                return;
            }
        }
    });
    Ok(heard)
}

/// What the system needs to wake a thread that waits.
fn bare_wake() -> impl FnMut() -> Outcome<Took> {
    let flag = Arc::new((Mutex::new(0_u64), Condvar::new()));
    let (tell, woken): (Sender<Instant>, _) = channel();
    let theirs = Arc::downgrade(&flag);
    std::thread::spawn(move || {
        let mut seen = 0;
        while let Some(flag) = theirs.upgrade() {
            let mut state = flag.0.lock();
            while *state == seen {
                if flag.1.wait_for(&mut state, Duration::from_secs(1)).timed_out() {
                    break;
                }
            }
            let now = Instant::now();
            if *state != seen {
                seen = *state;
                if tell.send(now).is_err() {
                    return;
                }
            }
        }
    });
    move || {
        std::thread::sleep(Duration::from_micros(200));
        let began = Instant::now();
        *flag.0.lock() += 1;
        flag.1.notify_all();
        let woken = woken.recv_timeout(PATIENCE)?;
        Ok(Took::only(woken.saturating_duration_since(began)))
    }
}
