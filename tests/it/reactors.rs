//! Reactors: each event at least once, in order, never before it is durable, and never silently left out.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use headwater::fs::sim::{Down, Fault, Op, Repeat, SimFs};
use headwater::planted::{Bug, plant};
use headwater::reactor::{
    EventFailure, HaltError, IdempotencyKey, OpenReactorError, ReactError, Reactor, ReactorHandle,
    ReactorOptions, ReactorState, SkipError, Start,
};
use headwater::retention::{History, Holder, Options, Until};
#[cfg(feature = "views")]
use headwater::view::{Fold, FoldError, Keys, RebuildOptions, View};
use headwater::{
    Append, AppendError, Durability, EventId, ExpectedRevision, NewEvent, OpenError, Position,
    ReadError, Recorded, Store, StreamId,
};
use parking_lot::Mutex;

use crate::commands::{Added, SumEvent, Taken};
use crate::options;

const DIR: &str = "/store";
const LONG: Duration = Duration::from_secs(60);

/// An effect: the event's position and id, and the key.
type Effect = (u64, EventId, IdempotencyKey);

/// Writes down what it is given. `Taken(n)` fails n times, or panics (`PANICS`), or never succeeds (`NEVER`).
#[derive(Clone, Default)]
struct Recorder {
    effects: Arc<Mutex<Vec<Effect>>>,
    failures: Arc<AtomicU32>,
}

const PANICS: u64 = 1000;
const NEVER: u64 = 1001;

impl Reactor for Recorder {
    const NAME: &'static str = "recorder";
    type Event = SumEvent;

    fn react(&self, event: &Recorded<SumEvent>, key: &IdempotencyKey) -> Result<(), ReactError> {
        self.effects.lock().push((event.position().get(), event.id(), *key));
        match event.data() {
            SumEvent::Added(_) => Ok(()),
            SumEvent::Taken(Taken(PANICS)) => panic!("as planned"),
            SumEvent::Taken(Taken(NEVER)) => Err(ReactError::new("no such address").permanent()),
            SumEvent::Taken(Taken(times)) => {
                let failed = self.failures.fetch_add(1, Ordering::SeqCst) + 1;
                if u64::from(failed) <= *times {
                    return Err(format!("failure {failed}").into());
                }
                Ok(())
            }
        }
    }
}

impl Recorder {
    fn positions(&self) -> Vec<u64> {
        self.effects.lock().iter().map(|(position, ..)| *position).collect()
    }
}

fn try_open(fs: &SimFs) -> Result<Store, OpenError> {
    let builder = Store::builder(DIR).journal_options(options()).create_if_missing();
    builder.fs(Arc::new(fs.clone())).open()
}

fn open(fs: &SimFs) -> Store {
    try_open(fs).unwrap()
}

fn quick(start: Start) -> ReactorOptions {
    ReactorOptions {
        back_off_min: Duration::from_millis(1),
        back_off_max: Duration::from_millis(2),
        attempts_max: 3,
        checkpoint_interval: LONG,
        ..ReactorOptions::new(start)
    }
}

fn put(store: &Store, event: impl Into<SumEvent>) -> Position {
    let event = NewEvent::typed(&event.into()).unwrap();
    let stream = StreamId::new("a").unwrap();
    store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap().token().position
}

fn halted(handle: &ReactorHandle) -> Arc<HaltError> {
    assert!(handle.wait_stopped(LONG));
    match handle.status().state {
        ReactorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reactor_begins_where_it_was_told_and_goes_on_where_it_was() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    put(&store, Added(0));
    let (now, all) = (Recorder::default(), Recorder::default());
    let handle = store.react(now.clone(), quick(Start::Now)).unwrap();
    let stranger = NewEvent::raw("other.type", *b"?").unwrap();
    store
        .append(&Append::to(&StreamId::new("b").unwrap(), ExpectedRevision::Any, [stranger]))
        .unwrap();
    let end = put(&store, Added(2));
    assert!(handle.wait_reacted(end, LONG));
    let status = handle.status();
    assert_eq!((status.reacted_events, status.unknown_events, status.lag_events), (1, 1, 0));
    assert!(matches!(status.state, ReactorState::Running), "{status:?}");
    // Once at a time.
    let second = store.react(Recorder::default(), quick(Start::Now)).unwrap_err();
    assert!(matches!(second, OpenReactorError::InUse { .. }), "{second}");
    handle.close().unwrap();
    assert_eq!(handle.status().durable, end);
    drop(handle);

    put(&store, Added(3));
    let handle = store.react(now.clone(), quick(Start::Beginning)).unwrap();
    assert!(handle.wait_reacted(Position::new(4), LONG));
    assert_eq!(now.positions(), [2, 3]);
    drop(handle);
    fs.remove_raw(&Path::new(DIR).join("reactors/recorder/checkpoint"));
    let handle = store.react(all.clone(), quick(Start::Beginning)).unwrap();
    assert!(handle.wait_reacted(Position::new(4), LONG));
    assert_eq!(all.positions(), [0, 2, 3]);
    // A closed store ends it.
    store.close().unwrap();
    assert!(handle.wait_stopped(LONG));
    assert!(matches!(handle.status().state, ReactorState::Closed));
}

/// The sum of all that was added, and how many events there were.
#[cfg(feature = "views")]
struct Sums<const VERSION: u32>;

#[cfg(feature = "views")]
impl<const VERSION: u32> View for Sums<VERSION> {
    const NAME: &'static str = "sums";
    const VERSION: u32 = VERSION;
    type Key = ();
    type Row = (u64, u64);
    type Event = SumEvent;

    fn route(&self, _: &Recorded<SumEvent>, keys: &mut Keys<()>) {
        keys.add(());
    }

    fn fold(
        &self,
        (): &(),
        row: Option<(u64, u64)>,
        event: &Recorded<SumEvent>,
    ) -> Result<Fold<(u64, u64)>, FoldError> {
        let (sum, events) = row.unwrap_or_default();
        let SumEvent::Added(Added(more)) = event.data() else { return Ok(Fold::Keep) };
        Ok(Fold::Put((sum + more, events + 1)))
    }
}

/// Folding again must not act again: that is why effects belong into reactors and not into folds.
#[cfg(feature = "views")]
#[test]
fn a_view_that_is_rebuilt_rolled_back_or_checked_runs_no_reaction_again() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Recorder::default();
    let mut end = Position::START;
    {
        let store = Store::create(dir.path().join("store")).unwrap();
        (0..20).for_each(|n| end = put(&store, Added(n)));
        let reactor = store.react(recorder.clone(), quick(Start::Beginning)).unwrap();
        let view = store.view(Sums::<1>).unwrap();
        assert!(reactor.wait_reacted(end, LONG));
        view.wait_for_latest(LONG).unwrap();
        let is_as_it_was = |after: &str| {
            // Whatever a reactor was to do anew would come before what is new.
            let end = put(&store, Added(0));
            assert!(reactor.wait_reacted(end, LONG), "{after}");
            view.wait_for_latest(LONG).unwrap();
            let all: Vec<u64> = (0..end.get()).collect();
            assert_eq!(recorder.positions(), all, "{after}");
            assert_eq!(reactor.status().reacted_events, end.get(), "{after}");
            assert_eq!(view.get(&()).unwrap(), Some((190, end.get())), "{after}");
        };
        is_as_it_was("following");
        let rebuilt = view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
        assert!(rebuilt.compared.is_some_and(|it| it.is_equal()), "it was built and compared");
        is_as_it_was("a rebuild that took over");
        view.rollback().unwrap().wait().unwrap();
        is_as_it_was("a rollback");
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
        is_as_it_was("a check");
        let newer = store.view(Sums::<2>).unwrap();
        newer.wait_for_latest(LONG).unwrap();
        is_as_it_was("a version that was built beside it");
        newer.close().unwrap();
        view.close().unwrap();
        reactor.close().unwrap();
        store.close().unwrap();
    }
    // And so it is when all is built anew because nothing is there.
    std::fs::remove_dir_all(dir.path().join("store/views")).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let reactor = store.react(recorder.clone(), quick(Start::Beginning)).unwrap();
    let view = store.view(Sums::<1>).unwrap();
    view.wait_for_latest(LONG).unwrap();
    let end = put(&store, Added(0));
    assert!(reactor.wait_reacted(end, LONG));
    assert_eq!(recorder.positions(), (0..end.get()).collect::<Vec<_>>());
}

/// Says that it has begun, and returns when it is told to.
struct Waiting {
    begun: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
    has_ended: Arc<AtomicBool>,
}

impl Reactor for Waiting {
    const NAME: &'static str = "waiting";
    type Event = SumEvent;

    fn react(&self, _: &Recorded<SumEvent>, _: &IdempotencyKey) -> Result<(), ReactError> {
        self.begun.lock().send(()).unwrap();
        self.go_on.lock().recv().unwrap();
        self.has_ended.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn everybody_who_closes_a_reactor_waits_for_the_reaction_that_is_under_way() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let (begun_tx, begun) = mpsc::channel();
    let (go_on, go_on_rx) = mpsc::channel();
    let has_ended = Arc::<AtomicBool>::default();
    let waiting = Waiting {
        begun: Mutex::new(begun_tx),
        go_on: Mutex::new(go_on_rx),
        has_ended: Arc::clone(&has_ended),
    };
    let handle = store.react(waiting, quick(Start::Beginning)).unwrap();
    put(&store, Added(1));
    begun.recv_timeout(LONG).unwrap();
    let (closed_tx, closed) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (handle, closed) = (handle.clone(), closed_tx.clone());
            let has_ended = &has_ended;
            scope.spawn(move || {
                handle.close().unwrap();
                closed.send(has_ended.load(Ordering::SeqCst)).unwrap();
            });
        }
        // Whoever doesn't wait is heard within this time; those who do are told to go on behind it.
        let early = closed.recv_timeout(Duration::from_millis(200));
        go_on.send(()).unwrap();
        assert!(early.is_err(), "the reaction is still under way");
    });
    assert!(closed.try_iter().all(|has_ended| has_ended));
    store.close().unwrap();
}

#[test]
fn an_effect_is_tried_again_under_its_key_and_then_the_reactor_halts_until_it_is_told() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let recorder = Recorder::default();
    let handle = store.react(recorder.clone(), quick(Start::Beginning)).unwrap();
    put(&store, Taken(2));
    let end = put(&store, Added(1));
    assert!(handle.wait_reacted(end, LONG));
    assert_eq!(recorder.positions(), [0, 0, 0, 1]);
    {
        let effects = recorder.effects.lock();
        assert!(effects[..3].iter().all(|(_, _, key)| *key == effects[0].2));
        assert_ne!(effects[0].2.to_string(), effects[3].2.to_string());
    }

    // The third failure is the last; resumed, it is tried anew.
    recorder.failures.store(0, Ordering::SeqCst);
    put(&store, Taken(4));
    let end = put(&store, Added(1));
    let error = halted(&handle);
    let HaltError::Event { position, attempts, cause: EventFailure::Refused(why), .. } = &*error
    else {
        panic!("{error}")
    };
    assert_eq!((position.get(), *attempts, why.as_str()), (2, 3, "failure 3"));
    assert_eq!(error.skippable_at(), Some(Position::new(2)));
    let status = handle.status();
    assert_eq!((status.next.get(), status.durable.get(), status.lag_events), (2, 2, 2));
    handle.resume();
    assert!(handle.wait_reacted(end, LONG));
    assert_eq!(recorder.positions()[4..], [2, 2, 2, 2, 2, 3]);

    // Neither these nor what can't be decoded are tried again; what isn't wanted is skipped by name.
    let damaged = NewEvent::raw("sum.added", *b"?").unwrap();
    for last in [PANICS, NEVER] {
        put(&store, Taken(last));
    }
    store
        .append(&Append::to(&StreamId::new("a").unwrap(), ExpectedRevision::Any, [damaged]))
        .unwrap();
    let end = put(&store, Added(1));
    for position in 4..7 {
        let error = halted(&handle);
        assert_eq!(error.code(), "reactor.event");
        let halted_at = Some(Position::new(position));
        assert_eq!(handle.skip(Position::new(9)), Err(SkipError::NotThere { halted_at }));
        handle.skip(Position::new(position)).unwrap();
        assert!(handle.wait_reacted(Position::new(position + 1), LONG));
    }
    assert!(handle.wait_reacted(end, LONG));
    assert_eq!(handle.skip(Position::new(6)), Err(SkipError::NotThere { halted_at: None }));
    assert_eq!(handle.status().skipped_events, 3);
    assert_eq!(recorder.positions()[10..], [4, 5, 7]);
    // Skipping is durable at once.
    let behind = handle.status().durable;
    assert!(behind >= Position::new(7), "{behind}");
}

/// Thousands of events were done in a moment, and the next one failed for a minute: all of them would have come again
/// after a crash, as the time to record them was looked for behind an event only.
#[test]
fn what_is_done_is_recorded_before_a_failed_event_is_tried_again() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let recorder = Recorder::default();
    for n in 0..5 {
        put(&store, Added(n));
    }
    let failing = put(&store, Taken(1));
    let in_front = Position::new(failing.get() - 1);
    let options = ReactorOptions {
        back_off_min: LONG,
        back_off_max: LONG,
        ..quick(Start::Beginning) // records nothing for a long time
    };
    let handle = store.react(recorder, options).unwrap();
    while handle.status().failing.is_none() {
        assert!(!handle.wait_stopped(Duration::from_millis(1)));
    }
    let status = handle.status();
    assert_eq!((status.next, status.durable), (in_front, in_front), "{status:?}");
    // And so does the next process find it.
    let killed = fs.fork(1);
    killed.power_cut();
    handle.close().unwrap();
    let store = open(&killed);
    let again = Recorder::default();
    let handle = store.react(again.clone(), quick(Start::Beginning)).unwrap();
    assert!(handle.wait_reacted(failing, LONG));
    assert_eq!(again.positions(), [in_front.get(), in_front.get()]);
}

#[test]
fn a_paused_reactor_does_nothing_until_it_is_resumed() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let recorder = Recorder::default();
    let handle = store.react(recorder.clone(), quick(Start::Now)).unwrap();
    handle.pause();
    assert!(handle.wait_stopped(LONG));
    assert!(matches!(handle.status().state, ReactorState::Paused));
    let end = put(&store, Added(1));
    assert!(!handle.wait_reacted(end, Duration::from_millis(120)));
    handle.resume();
    assert!(handle.wait_reacted(end, LONG));
    // In the middle of trying again, too; and a pause doesn't count as a failure.
    let options = ReactorOptions { back_off_min: LONG, back_off_max: LONG, ..quick(Start::Now) };
    drop(handle);
    let handle = store.react(recorder.clone(), options).unwrap();
    put(&store, Taken(1));
    while handle.status().failing.is_none() {
        std::thread::yield_now();
    }
    handle.pause();
    assert!(handle.wait_stopped(LONG));
    handle.resume();
    assert!(handle.wait_reacted(Position::new(2), LONG));
    assert_eq!(recorder.positions(), [0, 1, 1]);
}

#[test]
fn a_journal_of_another_history_is_refused_until_somebody_says_where_to_go_on() {
    let fs = SimFs::new(1);
    let journal = Path::new(DIR).join("journal");
    let store = open(&fs);
    put(&store, Added(0));
    store.close().unwrap();
    drop(store);
    let older = fs.snapshot_dir(&journal);

    let store = open(&fs);
    let recorder = Recorder::default();
    let handle = store.react(recorder.clone(), quick(Start::Beginning)).unwrap();
    assert!(handle.wait_reacted(put(&store, Added(1)), LONG));
    handle.close().unwrap();
    store.close().unwrap();
    drop((handle, store));
    fs.restore_dir(&journal, &older);

    // The tail is lost: nothing is appended over it until that is settled.
    let store = open(&fs);
    let refused = store.react(recorder.clone(), quick(Start::Now)).unwrap_err();
    let OpenReactorError::LostTail { checkpoint, end, .. } = refused else { panic!("{refused}") };
    assert_eq!((checkpoint.position.get(), end.get()), (2, 1));
    let event = NewEvent::typed(&SumEvent::from(Added(7))).unwrap();
    let append = Append::to(&StreamId::new("a").unwrap(), ExpectedRevision::Any, [event]);
    assert!(matches!(store.append(&append), Err(AppendError::LostTail { view: "recorder", .. })));
    store.close().unwrap();
    drop(store);

    // Nobody asked: the journal has grown again, and has another event where one was reacted to.
    let store = open(&fs);
    put(&store, Added(7));
    put(&store, Added(8));
    let refused = store.react(recorder.clone(), quick(Start::Now)).unwrap_err();
    assert!(matches!(refused, OpenReactorError::OtherHistory { .. }), "{refused}");
    assert_eq!(recorder.positions(), [0, 1]);
    let restart = ReactorOptions { restart: Some(Start::Oldest), ..quick(Start::Now) };
    let handle = store.react(recorder.clone(), restart).unwrap();
    assert!(handle.wait_reacted(Position::new(3), LONG));
    assert_eq!(recorder.positions(), [0, 1, 0, 1, 2]);
    let effects = recorder.effects.lock();
    assert_eq!(effects[0].2, effects[2].2, "the same event");
    assert_eq!(effects[1].2.locator, effects[3].2.locator);
    assert_ne!(effects[1].2, effects[3].2, "another event in its place");
}

#[test]
fn a_damaged_checkpoint_is_refused_and_one_that_cant_be_written_halts() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let recorder = Recorder::default();
    let options = ReactorOptions { checkpoint_events: 1, ..quick(Start::Now) };
    let handle = store.react(recorder.clone(), options.clone()).unwrap();
    assert!(handle.wait_reacted(put(&store, Added(0)), LONG));
    handle.pause();
    assert!(handle.wait_stopped(LONG));
    let end = put(&store, Added(1));
    fs.fail_next(Op::Rename, Fault::Eio);
    handle.resume();
    assert!(matches!(*halted(&handle), HaltError::Checkpoint { .. }));
    assert_eq!(handle.status().next, end);
    handle.resume();
    assert!(handle.wait_reacted(put(&store, Added(2)), LONG));
    handle.close().unwrap();
    assert_eq!(handle.status().durable, Position::new(3));
    drop(handle);
    assert_eq!(recorder.positions(), [0, 1, 2]);

    assert!(fs.flip_bit(&Path::new(DIR).join("reactors/recorder/checkpoint"), 83, 2));
    let refused = store.react(recorder.clone(), options.clone()).unwrap_err();
    assert!(matches!(refused, OpenReactorError::DamagedCheckpoint { .. }), "{refused}");
    // Nor is anything removed that it may need.
    let plan = store.plan_retention(&Options::new(Until::Keeping { bytes: 0 })).unwrap();
    assert!(plan.gates.iter().any(|gate| gate.holder.code() == "unknown_reactors"));
    let restart = ReactorOptions { restart: Some(Start::Now), ..options };
    drop(store.react(recorder, restart).unwrap());
}

#[test]
fn a_reactor_holds_back_what_it_has_not_done_durably() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let recorder = Recorder::default();
    let handle = store.react(recorder.clone(), quick(Start::Beginning)).unwrap();
    while store.journal().segments().len() < 4 {
        put(&store, Added(1));
    }
    let end = store.journal().end().position;
    assert!(handle.wait_reacted(end, LONG));
    // Done, but not recorded.
    let all = Options::new(Until::Keeping { bytes: 0 });
    let plan = store.plan_retention(&all).unwrap();
    assert!(plan.removals.is_empty());
    let blocker = plan.blocker.unwrap();
    assert!(matches!(&blocker.holder, Holder::Reactor { name, .. } if name == "recorder"));
    assert_eq!(blocker.position, Some(Position::START));
    handle.close().unwrap();
    let plan = store.plan_retention(&all).unwrap();
    assert_eq!(plan.target, store.journal().segments().last().unwrap().base_position);
    let forget = all.history(History::Forget(plan.target));
    store.retain(&forget).unwrap();
    drop(handle);

    // It goes on, and one that wants the beginning is told that this is gone.
    let handle = store.react(recorder.clone(), quick(Start::Now)).unwrap();
    assert!(handle.wait_reacted(put(&store, Added(1)), LONG));
    drop(handle);
    fs.remove_raw(&Path::new(DIR).join("reactors/recorder/checkpoint"));
    let late = Recorder::default();
    let handle = store.react(late.clone(), quick(Start::Beginning)).unwrap();
    let error = halted(&handle);
    let HaltError::Journal { source: ReadError::Truncated { first }, .. } = &*error else {
        panic!("{error}")
    };
    handle.skip(Position::START).unwrap();
    assert!(handle.wait_reacted(store.journal().end().position, LONG));
    assert_eq!(late.positions()[0], first.get());
    assert_eq!(late.positions().len() as u64, store.journal().end().position.since(*first));
}

/// One store and its reactor, killed at random points again and again. What was wrong, if anything.
fn live_and_die(seed: u64, bug: Option<Bug>) -> Result<u64, String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let fs = SimFs::new(seed);
    let recorder = Recorder::default();
    let mut crashes = 0;
    // Everything in front of this has had its effect.
    let mut done = 0;
    for life in 0..6 {
        let reactor_options = ReactorOptions {
            checkpoint_events: rng.u64(1..5),
            checkpoint_interval: Duration::from_millis(rng.u64(1..3)),
            ..quick(Start::Beginning)
        };
        // Behind a sync that failed, what isn't durable can still be read: that must not be reacted to either.
        let fault = [Fault::PowerCut, Fault::Kill, Fault::Eio][rng.usize(..3)];
        if life < 5 {
            fs.fail_at(fs.ops() + rng.u64(..150), fault, Repeat::Once);
        }
        let before = recorder.effects.lock().len();
        plant(bug);
        let ended = live(&fs, &recorder, reactor_options, rng.usize(5..60), &mut rng);
        plant(None);
        match fs.down() {
            Some(Down::PowerCut) => fs.power_cut(),
            Some(Down::Kill) => fs.kill(),
            None if fs.faults_struck() > 0 => fs.power_cut(),
            None => ended?,
        }
        crashes += u64::from(fs.faults_struck() > 0);
        fs.clear_faults();

        let effects = recorder.effects.lock();
        let here: Vec<u64> = effects[before..].iter().map(|(position, ..)| *position).collect();
        if let Some(first) = here.first() {
            if *first > done {
                return Err(format!(
                    "seed {seed}: {done}..{first} left out: the checkpoint was ahead"
                ));
            }
            if here.windows(2).any(|pair| pair[1] != pair[0] + 1) {
                return Err(format!("seed {seed}: out of order: {here:?}"));
            }
            done = done.max(here.last().map_or(0, |last| last + 1));
        }
        // What had an effect was durable: it is there, now that the disk has lost what it could.
        let lasting = fs.fork(rng.u64(..));
        lasting.power_cut();
        let store = open(&lasting);
        let ids: Vec<_> =
            store.read_all(Position::START).unwrap().map(|event| event.unwrap().id()).collect();
        let lost = effects.iter().find(|(at, id, _)| ids.get(*at as usize) != Some(id));
        if let Some((position, ..)) = lost {
            return Err(format!("seed {seed}: reacted to {position}, which was not durable"));
        }
    }
    let end = open(&fs).journal().end().position.get();
    if done != end {
        return Err(format!("seed {seed}: {done} of {end} events had their effect"));
    }
    Ok(crashes)
}

fn live(
    fs: &SimFs,
    recorder: &Recorder,
    options: ReactorOptions,
    events: usize,
    rng: &mut fastrand::Rng,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let store = try_open(fs).map_err(|error| text(&error))?;
    let handle = store.react(recorder.clone(), options).map_err(|error| text(&error))?;
    for _ in 0..events {
        let some =
            (0..rng.usize(1..4)).map(|_| NewEvent::typed(&SumEvent::from(Added(1))).unwrap());
        let append = Append::to(&StreamId::new("a").unwrap(), ExpectedRevision::Any, some);
        let durability = if rng.u8(..3) == 0 { Durability::Buffered } else { Durability::Durable };
        if let Err(error) = store.append(&append.durability(durability)) {
            // What it would ever react to it has reacted to: all that is shown, also on a disk that is gone.
            let end = store.journal().end().position;
            let is_all = handle.wait_reacted(end, Duration::from_millis(20));
            return Err(format!("{error}; all that is shown was reacted to: {is_all}"));
        }
        if rng.u8(..8) == 0 {
            let end = store.journal().end().position;
            while !handle.wait_reacted(end, Duration::from_millis(5)) {
                if handle.wait_stopped(Duration::ZERO) {
                    return Err("stopped".into());
                }
            }
        }
    }
    let end = store.flush().map_err(|error| text(&error))?.position;
    while !handle.wait_reacted(end, Duration::from_millis(5)) {
        if handle.wait_stopped(Duration::ZERO) {
            return Err(format!("{:?}", handle.status().state));
        }
    }
    handle.close().map_err(|error| text(&error))?;
    store.close().map_err(|error| text(&error))
}

#[test]
fn killed_anywhere_every_event_has_its_effect_at_least_once_in_order_and_only_when_it_is_durable() {
    let crashes: u64 = (0..300).map(|seed| live_and_die(seed, None).unwrap()).sum();
    println!("{crashes} crashes");
    assert!(crashes > 900, "{crashes}");
}

#[test]
fn a_reaction_to_what_is_not_durable_would_be_noticed() {
    // As a lost event, or because the reactor itself finds that the journal has lost its tail.
    let found = (0..1000).find_map(|seed| live_and_die(seed, Some(Bug::ShipUnsynced)).err());
    println!("{}", found.expect("nobody noticed"));
}

/// Set in a child: where its store is.
const KILLED: &str = "HEADWATER_REACTOR_DIR";

/// Set in a child: its reactor fails, and the process dies before that tries again.
const FAILS: &str = "HEADWATER_REACTOR_FAILS";

/// Kills the process at the third event.
struct Killer;

impl Reactor for Killer {
    const NAME: &'static str = "killer";
    type Event = SumEvent;

    fn react(&self, event: &Recorded<SumEvent>, _: &IdempotencyKey) -> Result<(), ReactError> {
        match event.position().get() {
            2 if std::env::var_os(FAILS).is_some() => Err("not today".into()),
            2 if std::env::var_os(KILLED).is_some() => std::process::abort(),
            _ => Ok(()),
        }
    }
}

/// Not a test of its own: what the next one starts.
#[test]
fn reacts_in_a_process_that_dies() {
    let Some(dir) = std::env::var_os(KILLED) else { return };
    let store = Store::open(Path::new(&dir)).unwrap();
    let fails = std::env::var_os(FAILS).is_some();
    let back_off_min = if fails { LONG } else { quick(Start::Now).back_off_min };
    let options = ReactorOptions { back_off_min, back_off_max: LONG, ..quick(Start::Beginning) };
    let killer = store.react(Killer, options).unwrap();
    if fails {
        while killer.status().failing.is_none() {
            std::thread::yield_now();
        }
        std::process::abort();
    }
    println!("\nhalted: {}", halted(&killer));
}

/// One life of it: why it halted, if it did.
fn live_as_killer(dir: &Path, fails: bool) -> Option<String> {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "reactors::reacts_in_a_process_that_dies", "--nocapture"]);
    child.env(KILLED, dir).stderr(std::process::Stdio::null());
    if fails {
        child.env(FAILS, "");
    }
    let said = String::from_utf8(child.output().unwrap().stdout).unwrap();
    said.lines().find_map(|line| line.strip_prefix("halted: ").map(str::to_owned))
}

fn store_for_killer(dir: &Path) -> PathBuf {
    let dir = dir.join("store");
    let store = Store::create(&dir).unwrap();
    (0..5).for_each(|n| {
        put(&store, Added(n));
    });
    store.close().unwrap();
    dir
}

#[test]
fn an_event_from_which_the_reactor_has_returned_meanwhile_counts_anew() {
    let dir = tempfile::tempdir().unwrap();
    let dir = store_for_killer(dir.path());
    for _ in 0..2 {
        for _ in 0..4 {
            assert_eq!(live_as_killer(&dir, false), None);
        }
        assert_eq!(live_as_killer(&dir, true), None);
    }
    let store = Store::open(&dir).unwrap();
    let killer = store.react(Killer, quick(Start::Beginning)).unwrap();
    assert!(killer.wait_reacted(Position::new(5), LONG), "{:?}", killer.status());
}

#[test]
fn an_event_that_kills_the_process_makes_the_reactor_halt_in_front_of_it_after_five_deaths() {
    let dir = tempfile::tempdir().unwrap();
    let dir = store_for_killer(dir.path());
    let live = || live_as_killer(&dir, false);
    for _ in 0..5 {
        assert_eq!(live(), None);
    }
    for _ in 0..2 {
        let said = live().expect("it halts");
        assert!(said.starts_with("reactor killer halted at position 2 "), "{said}");
        assert!(said.ends_with("the process died 5 times while it was at it"), "{said}");
    }
    // Resumed by code that was mended.
    let store = Store::open(&dir).unwrap();
    let killer = store.react(Killer, quick(Start::Beginning)).unwrap();
    let error = halted(&killer);
    assert!(matches!(&*error, HaltError::Event { cause: EventFailure::Died(5), .. }), "{error}");
    killer.resume();
    assert!(killer.wait_reacted(Position::new(5), LONG));
    drop(killer);
    let killer = store.react(Killer, quick(Start::Beginning)).unwrap();
    put(&store, Added(6));
    assert!(killer.wait_reacted(Position::new(6), LONG));
}
