//! A crash at every step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use headwater::command::{CommandId, Executed};
use headwater::reactor::{ReactorOptions, ReactorState, Start};
use headwater::testing::{CrashResult, CrashTest, MemoryDisk};
use headwater::{Append, Durability, ExpectedRevision, NewEvent};

use super::disks::{Counter, Counting, append, payloads, stream};
use super::fails;

/// Appends, and counts on what it was told.
fn appends(disk: &MemoryDisk, told: &mut u8) -> CrashResult {
    let store = disk.store("shop")?;
    for n in 0..4 {
        append(&store, "s-1", &[n])?;
        *told = n + 1;
    }
    store.close()?;
    Ok(())
}

/// What was told is there, in order, and at most what was under way beside it.
fn holds(disk: &MemoryDisk, told: &u8) -> CrashResult {
    let events = payloads(&disk.store("shop")?);
    let expected: Vec<Vec<u8>> = (0..events.len()).map(|n| vec![n as u8]).collect();
    assert_eq!(events, expected);
    if (usize::from(*told)..=usize::from(*told) + 1).contains(&events.len()) {
        return Ok(());
    }
    Err(format!("{told} events were acknowledged, {} are there", events.len()).into())
}

#[test]
fn what_was_acknowledged_is_there_after_a_crash_at_every_operation() {
    let tried = CrashTest::new().run(appends, holds);
    println!("{tried:?}");
    assert!(tried.operations >= 20, "{tried:?}");
    assert_eq!(tried.crashes, (tried.operations + 1) * 4);
    let more = CrashTest::new().seed(7).draws(5).run(appends, holds);
    assert_eq!((more.operations, more.crashes), (tried.operations, (tried.operations + 1) * 7));
}

/// A scenario that counts on what isn't durable.
fn counts_on_buffered(disk: &MemoryDisk, told: &mut u8) -> CrashResult {
    let store = disk.store("shop")?;
    for n in 0..4 {
        let event = NewEvent::raw("happened", [n])?;
        let append = Append::to(&stream("s-1"), ExpectedRevision::Any, [event]);
        // Gets its place, and is committed behind this thread's back.
        store.append(&append.durability(Durability::Buffered))?;
        *told = n + 1;
    }
    Ok(())
}

#[test]
fn counting_on_what_is_not_durable_is_found_and_the_message_says_how_to_repeat_it() {
    // Something else than the append itself goes wrong, and deterministically.
    let careless = |disk: &MemoryDisk, told: &mut u8| {
        let store = disk.store("shop")?;
        for n in 0..4 {
            *told = n + 1; // too early
            append(&store, "s-1", &[n])?;
        }
        Ok(())
    };
    let strict = |disk: &MemoryDisk, told: &u8| {
        let there = payloads(&disk.store("shop")?).len();
        if there == usize::from(*told) { Ok(()) } else { Err(format!("{there} of {told}").into()) }
    };
    let text = super::failure(|| CrashTest::new().seed(5).run(careless, strict));
    assert!(text.contains("the check failed after a crash (") && text.contains("0 of 1"), "{text}");
    let at = text.rsplit_once(".at(").unwrap().1.trim_end_matches(')').parse().unwrap();
    fails(|| CrashTest::new().seed(5).at(at).run(careless, strict), &["0 of 1", "seed(5)"]);
    fails(|| CrashTest::new().run(counts_on_buffered, holds), &["acknowledged"]);
}

#[cfg(feature = "test-kit")]
#[test]
fn a_journal_that_acknowledges_before_its_sync_is_found() {
    use headwater::planted::{Bug, plant};
    plant(Some(Bug::AcknowledgeBeforeSync));
    let text = super::failure(|| CrashTest::new().draws(0).run(appends, holds));
    plant(None);
    assert!(text.contains("acknowledged") && text.contains("(PowerCut)"), "{text}");
}

#[test]
fn a_scenario_that_fails_without_a_crash_fails_the_test() {
    let broken = |disk: &MemoryDisk, (): &mut ()| {
        disk.builder("nowhere").open()?;
        Ok(())
    };
    fails(
        || CrashTest::new().run(broken, |_, ()| Ok(())),
        &["the scenario failed without a crash", "no journal"],
    );
    // A panic of the scenario that the crash has made is the crash.
    let panics = |disk: &MemoryDisk, (): &mut ()| {
        append(&disk.store("shop").unwrap(), "s-1", b"").unwrap();
        Ok(())
    };
    assert!(CrashTest::new().draws(0).run(panics, |_, ()| Ok(())).operations > 5);
    // A panic of the check is not.
    let check = |_: &MemoryDisk, (): &()| panic!("it is wrong");
    fails(|| CrashTest::new().run(panics, check), &["panic: it is wrong", "operation 0"]);
}

#[test]
fn a_command_with_an_id_is_executed_once_whatever_crashes() {
    let execute = |disk: &MemoryDisk| -> Result<Executed, Box<dyn std::error::Error>> {
        let store = disk.store("bank")?;
        let counters = store.commands::<Counter>().snapshot_every(1);
        Ok(counters.execute_once(CommandId::of("request 1"), &stream("counter-1"), &5)?)
    };
    CrashTest::new().run(
        |disk, told: &mut bool| {
            execute(disk)?;
            *told = true;
            Ok(())
        },
        |disk, told| {
            // The request is sent again.
            let again = execute(disk)?;
            assert!(!told || matches!(again, Executed::Repeated(_)), "{again:?}");
            let store = disk.store("bank")?;
            let state = store.commands::<Counter>().load(&stream("counter-1"))?;
            assert_eq!(state.state().0, 5);
            Ok(())
        },
    );
}

#[test]
fn a_reactor_has_reacted_to_every_durable_event_when_it_is_opened_again() {
    type Calls = Arc<AtomicU64>;
    let react = |disk: &MemoryDisk, calls: &Calls, append_to: Option<u8>| -> CrashResult {
        let store = disk.store("shop")?;
        let reactor =
            store.react(Counting(Arc::clone(calls)), ReactorOptions::new(Start::Beginning))?;
        for n in 0..append_to.unwrap_or(0) {
            append(&store, "s-1", &[n])?;
        }
        let end = store.journal().end().position;
        while !reactor.wait_reacted(end, Duration::from_millis(5)) {
            if let ReactorState::Halted(error) = reactor.status().state {
                return Err(error.into());
            }
        }
        Ok(reactor.close()?)
    };
    let tried = CrashTest::new().draws(1).run(
        |disk, calls: &mut Calls| react(disk, calls, Some(3)),
        |disk, before| {
            let calls = Calls::default();
            react(disk, &calls, None)?;
            let there = disk.store("shop")?.journal().end().position.get();
            let all = calls.load(Ordering::SeqCst) + before.load(Ordering::SeqCst);
            assert!(all >= there, "{all} reactions to {there} events");
            Ok(())
        },
    );
    assert!(tried.operations > 20, "{tried:?}");
}

#[cfg(feature = "views")]
#[test]
fn views_are_folded_in_memory_from_what_a_crash_has_left() {
    use headwater::Recorded;
    use headwater::testing::{History, view};
    use headwater::view::{Fold, FoldError, Keys, View};

    struct Sum;
    impl View for Sum {
        const NAME: &'static str = "sum";
        const VERSION: u32 = 1;
        type Key = ();
        type Row = u64;
        type Event = Vec<u8>;

        fn route(&self, _: &Recorded<Vec<u8>>, keys: &mut Keys<()>) {
            keys.add(());
        }

        fn fold(
            &self,
            (): &(),
            sum: Option<u64>,
            event: &Recorded<Vec<u8>>,
        ) -> Result<Fold<u64>, FoldError> {
            let more: u64 = event.data().iter().map(|byte| u64::from(*byte)).sum();
            Ok(Fold::Put(sum.unwrap_or(0) + more))
        }
    }

    CrashTest::new().run(appends, |disk, told| {
        let store = disk.store("shop")?;
        let there = store.read_all(headwater::Position::START)?.count() as u64;
        let test = view(Sum).given_history(History::of(store.journal())?).then_pure();
        assert!(there >= u64::from(*told));
        assert_eq!(test.get(&()), (there > 0).then_some(there * there.saturating_sub(1) / 2));
        Ok(())
    });
}
