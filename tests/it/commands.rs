//! Command handling: decisions, conflicts, repetitions, and snapshots that never change a result.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use headwater::command::{Aggregate, CommandId, Commands, ExecuteError, Executed};
use headwater::fs::sim::{Down, Fault, Repeat, SimFs, Snapshot};
use headwater::retention::{History, Options, Until};
use headwater::{
    Append, AppendError, EncodeError, ExpectedRevision, NewEvent, OpenError, Position, ReadError,
    Recorded, Revision, Store, StreamId,
};
use serde::{Deserialize, Serialize};

use crate::options;

const DIR: &str = "/store";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Added(pub(crate) u64);
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Taken(pub(crate) u64);

headwater::events! {
    pub(crate) enum SumEvent {
        Added(Added) = "sum.added", version 1;
        Taken(Taken) = "sum.taken", version 1;
    }
}

/// Its state depends on every event, their order and their number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Sum {
    value: u64,
    events: u64,
    trace: u64,
    #[serde(skip, default = "count_read")]
    from_snapshot: (),
}

thread_local! {
    /// How many snapshots this thread has read.
    static SNAPSHOTS_READ: Cell<u64> = const { Cell::new(0) };
}

fn count_read() {
    SNAPSHOTS_READ.set(SNAPSHOTS_READ.get() + 1);
}

#[derive(Clone, Debug)]
enum Do {
    Add(u64),
    /// As two events.
    AddTwice(u64),
    /// Refused if there is less.
    Take(u64),
    Nothing,
}

impl Aggregate for Sum {
    const NAME: &'static str = "sum";
    type Event = SumEvent;
    type Command = Do;
    type Error = String;

    fn apply(&mut self, event: &Recorded<SumEvent>) {
        assert_eq!(event.revision().get(), self.events, "each event once, in order");
        self.events += 1;
        let (sign, amount) = match event.data() {
            SumEvent::Added(Added(amount)) => (1, *amount),
            SumEvent::Taken(Taken(amount)) => (2, *amount),
        };
        self.value = if sign == 1 { self.value + amount } else { self.value - amount };
        let mixed = self.trace ^ (sign << 60) ^ amount ^ event.position().get();
        self.trace = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }

    fn decide(&self, command: &Do) -> Result<Vec<SumEvent>, String> {
        match command {
            Do::Add(amount) => Ok(vec![Added(*amount).into()]),
            Do::AddTwice(amount) => Ok(vec![Added(*amount).into(), Added(*amount).into()]),
            Do::Take(amount) if *amount > self.value => Err(format!("only {}", self.value)),
            Do::Take(amount) => Ok(vec![Taken(*amount).into()]),
            Do::Nothing => Ok(Vec::new()),
        }
    }

    fn record(event: &SumEvent) -> Result<NewEvent, EncodeError> {
        Ok(NewEvent::typed(event)?.tag("sum"))
    }
}

fn try_open(fs: &SimFs) -> Result<Store, OpenError> {
    let builder = Store::builder(DIR).journal_options(options()).create_if_missing();
    builder.fs(Arc::new(fs.clone())).open()
}

fn open(fs: &SimFs) -> Store {
    try_open(fs).unwrap()
}

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

/// Folded without anything that is tested here.
fn refold(store: &Store, name: &str) -> Sum {
    let mut sum = Sum::default();
    for event in store.read_all(Position::START).unwrap() {
        let event = event.unwrap();
        if event.stream().as_str() == name {
            sum.apply(&event.decode().unwrap().into_iter().next().unwrap());
        }
    }
    sum
}

#[test]
fn a_command_is_decided_from_all_events_and_what_is_refused_appends_nothing() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let account = stream("account");
    let done = store.execute::<Sum>(&account, &Do::AddTwice(5)).unwrap();
    assert!(matches!(&done, Executed::Appended(receipt) if receipt.events.len() == 2));
    assert_eq!(done.token(), store.journal().end().token());
    let refused = store.execute::<Sum>(&account, &Do::Take(11)).unwrap_err();
    assert!(matches!(&refused, ExecuteError::Rejected(why) if why == "only 10"), "{refused:?}");
    assert_eq!(refused.code(), "execute.rejected");
    let nothing = store.execute::<Sum>(&account, &Do::Nothing).unwrap();
    assert_eq!(nothing, Executed::Nothing { token: done.token() });
    assert!(nothing.events().is_empty());
    store.execute::<Sum>(&account, &Do::Take(10)).unwrap();
    assert_eq!(store.journal().end().position, Position::new(3));
    let tagged = store.read_all(Position::START).unwrap().all(|e| e.unwrap().tags() == ["sum"]);
    assert!(tagged);

    // Others write to the stream, too.
    let by_hand = NewEvent::typed(&SumEvent::from(Added(7))).unwrap();
    store.append(&Append::to(&account, ExpectedRevision::Any, [by_hand])).unwrap();
    store.execute::<Sum>(&account, &Do::Take(7)).unwrap();
    let loaded = store.commands::<Sum>().load(&account).unwrap();
    assert_eq!(loaded.state(), &refold(&store, "account"));
    assert_eq!(loaded.revision(), Some(Revision::new(4)));
    assert_eq!(store.commands::<Sum>().load(&stream("other")).unwrap().revision(), None);
}

#[test]
fn threads_never_take_more_than_is_there_and_none_gives_up() {
    const EACH: u64 = 40;
    let fs = SimFs::new(1);
    let store = open(&fs);
    let account = stream("account");
    store.execute::<Sum>(&account, &Do::Add(6 * EACH - 10)).unwrap();
    let (taken, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (store, account, taken, refused) = (&store, &account, &taken, &refused);
            scope.spawn(move || {
                // Some remember, some don't, some keep snapshots.
                let commands = store.commands::<Sum>();
                let commands = match thread % 3 {
                    0 => commands,
                    1 => commands.forgetful(),
                    _ => commands.snapshot_every(7),
                };
                for _ in 0..EACH {
                    match commands.execute(account, &Do::Take(1)) {
                        Ok(done) => {
                            assert!(matches!(done, Executed::Appended(_)));
                            taken.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(ExecuteError::Rejected(_)) => {
                            refused.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert_eq!((taken.into_inner(), refused.into_inner()), (6 * EACH - 10, 10));
    let state = refold(&store, "account");
    assert_eq!((state.value, state.events), (0, 6 * EACH - 9));
}

thread_local! {
    /// Comes between a decision and its append, so often.
    static BETWEEN: RefCell<Option<(Store, u32)>> = const { RefCell::new(None) };
}

/// Each decision finds the stream changed by the time it is appended.
#[derive(Clone, Default)]
struct Unlucky {
    seen: u64,
}

impl Aggregate for Unlucky {
    const NAME: &'static str = "unlucky";
    type Event = SumEvent;
    type Command = ();
    type Error = String;

    fn apply(&mut self, _: &Recorded<SumEvent>) {
        self.seen += 1;
    }

    fn decide(&self, (): &()) -> Result<Vec<SumEvent>, String> {
        BETWEEN.with_borrow_mut(|between| {
            if let Some((store, left)) = between.as_mut().filter(|(_, left)| *left > 0) {
                *left -= 1;
                let event = NewEvent::typed(&SumEvent::from(Added(0))).unwrap();
                store.append(&Append::to(&stream("a"), ExpectedRevision::Any, [event])).unwrap();
            }
        });
        Ok(vec![Added(self.seen).into()])
    }
}

#[test]
fn a_conflict_is_tried_again_with_the_new_events_and_given_up_after_so_many_attempts() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let commands = store.commands::<Unlucky>().attempts_max(4);
    BETWEEN.set(Some((store.clone(), 3)));
    commands.execute(&stream("a"), &()).unwrap();
    let last = store.read_all_backward(store.journal().end().position).unwrap().next().unwrap();
    // Decided from the three that came between.
    assert_eq!(
        last.unwrap().decode::<SumEvent>().unwrap().into_iter().next().unwrap().data(),
        &SumEvent::from(Added(3))
    );

    BETWEEN.set(Some((store.clone(), 4)));
    let error = commands.execute(&stream("a"), &()).unwrap_err();
    BETWEEN.set(None);
    let ExecuteError::Conflict { attempts: 4, expected, actual, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(expected, ExpectedRevision::Exact(Revision::new(6)));
    assert_eq!(actual, Some(Revision::new(7)));
    assert_eq!(store.journal().end().position, Position::new(8));
}

#[test]
fn a_command_that_comes_again_has_its_first_result_whatever_would_be_decided_now() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let (account, id) = (stream("account"), CommandId::of("request 1"));
    let commands = store.commands::<Sum>();
    commands.execute(&account, &Do::Add(5)).unwrap();
    let first = commands.execute_once(id, &account, &Do::Take(5)).unwrap();
    let Executed::Appended(receipt) = &first else { panic!("{first:?}") };
    // Now it would be refused; another command under the id isn't even looked at.
    for command in [Do::Take(5), Do::Nothing, Do::AddTwice(1)] {
        let again = commands.execute_once(id, &account, &command).unwrap();
        assert_eq!(again, Executed::Repeated(receipt.clone()), "{command:?}");
    }
    // On another stream it is another command.
    let other = commands.execute_once(id, &stream("other"), &Do::AddTwice(1)).unwrap();
    assert!(matches!(other, Executed::Appended(_)));
    store.close().unwrap();
    drop((commands, store));

    let store = open(&fs);
    let commands = store.commands::<Sum>();
    let again = commands.execute_once(id, &account, &Do::Add(5)).unwrap();
    assert_eq!(again, Executed::Repeated(receipt.clone()));
    let again = commands.execute_once(id, &stream("other"), &Do::Add(1)).unwrap();
    assert_eq!(again.events(), other.events());
    assert_eq!(again.events().len(), 2);
    // What was refused is decided again.
    let id = CommandId::random();
    assert!(commands.execute_once(id, &account, &Do::Take(1)).is_err());
    commands.execute(&account, &Do::Add(1)).unwrap();
    assert!(matches!(commands.execute_once(id, &account, &Do::Take(1)), Ok(Executed::Appended(_))));
}

#[test]
fn a_command_that_threads_send_at_once_happens_once_and_all_have_its_result() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let account = stream("account");
    store.execute::<Sum>(&account, &Do::Add(1)).unwrap();
    for round in 0..100 {
        let id = CommandId::of(&format!("round {round}"));
        let barrier = Barrier::new(4);
        let results: Vec<_> = std::thread::scope(|scope| {
            let one = || {
                let commands = store.commands::<Sum>();
                barrier.wait();
                // Once it has happened it would be refused.
                commands.execute_once(id, &account, &Do::Take(1)).unwrap()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let appended = results.iter().filter(|done| matches!(done, Executed::Appended(_)));
        assert_eq!(appended.count(), 1);
        assert!(results.iter().all(|done| done.events() == results[0].events()));
        assert!(results.iter().all(|done| done.token() == results[0].token()));
        store.execute::<Sum>(&account, &Do::Add(1)).unwrap();
    }
    assert_eq!(refold(&store, "account").events, 201);
}

#[test]
fn an_event_that_cant_be_understood_stops_commands_and_is_named() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let (a, b) = (stream("a"), stream("b"));
    store.execute::<Sum>(&a, &Do::Add(1)).unwrap();
    let strange = NewEvent::raw("sum.strange", *b"?").unwrap();
    store.append(&Append::to(&a, ExpectedRevision::Any, [strange])).unwrap();
    let damaged = NewEvent::raw("sum.added", *b"?").unwrap();
    store.append(&Append::to(&b, ExpectedRevision::Any, [damaged])).unwrap();
    for commands in [store.commands::<Sum>(), store.commands().snapshot_every(1)] {
        match commands.execute(&a, &Do::Add(1)) {
            Err(ExecuteError::UnknownEvent { position, event_type, .. }) => {
                assert_eq!((position.get(), event_type.as_str()), (1, "sum.strange"));
            }
            other => panic!("{other:?}"),
        }
        match commands.execute(&b, &Do::Add(1)) {
            Err(ExecuteError::Undecodable { position, .. }) => assert_eq!(position.get(), 2),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(store.journal().end().position, Position::new(3));
    // Who says that they don't matter passes over them.
    store.execute::<Lenient>(&a, &()).unwrap();
    assert_eq!(store.commands::<Lenient>().load(&a).unwrap().revision(), Some(Revision::new(2)));
}

#[derive(Clone, Default)]
struct Lenient;

impl Aggregate for Lenient {
    const NAME: &'static str = "lenient";
    const PASSES_UNKNOWN_EVENTS: bool = true;
    type Event = SumEvent;
    type Command = ();
    type Error = String;

    fn apply(&mut self, _: &Recorded<SumEvent>) {}

    fn decide(&self, (): &()) -> Result<Vec<SumEvent>, String> {
        Ok(vec![Added(1).into()])
    }
}

/// Else a command would work until the store is opened again.
#[test]
fn a_stream_whose_first_events_were_removed_is_no_aggregate_whatever_is_remembered() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let commands = store.commands::<Sum>().snapshot_every(1);
    while store.journal().segments().len() < 4 {
        commands.execute(&stream("a"), &Do::Add(1)).unwrap();
    }
    let options = Options::new(Until::Keeping { bytes: 0 });
    let target = store.plan_retention(&options).unwrap().target;
    store.retain(&options.history(History::Forget(target))).unwrap();
    for commands in [commands.clone(), commands.clone().forgetful(), store.commands()] {
        let error = commands.execute(&stream("a"), &Do::Add(1)).unwrap_err();
        let truncated = matches!(error, ExecuteError::Read(ReadError::TruncatedStream { .. }));
        assert!(truncated, "{error}");
        commands.execute(&stream("b"), &Do::Add(1)).unwrap();
    }
}

/// Whatever happens to journal and snapshots, apart or together, commands are decided from the journal's events.
#[test]
fn a_snapshot_never_changes_a_result() {
    let (mut outdated, mut damaged) = (0, 0);
    for seed in 0..150 {
        let (restored, flipped) = snapshots_and_journal_go_separate_ways(seed);
        (outdated, damaged) = (outdated + restored, damaged + flipped);
    }
    let used = SNAPSHOTS_READ.get();
    println!(
        "{used} loads began at a snapshot; {outdated} times restored, {damaged} times damaged"
    );
    assert!(used > 300 && outdated > 100 && damaged > 50, "{used}, {outdated}, {damaged}");
}

fn snapshots_and_journal_go_separate_ways(seed: u64) -> (u64, u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let fs = SimFs::new(seed);
    let mut copies: Vec<Snapshot> = Vec::new();
    let (mut restored, mut flipped) = (0, 0);
    let folder = Path::new("store/snapshots/sum"); // as the disk names it
    for _ in 0..12 {
        let store = open(&fs);
        let every = rng.u64(1..6);
        let kinds: [Commands<Sum>; 3] = [
            store.commands().snapshot_every(every),
            store.commands().snapshot_every(every).forgetful(),
            store.commands(),
        ];
        for _ in 0..rng.usize(..12) {
            let name = format!("s{}", rng.u8(..3));
            let commands = &kinds[rng.usize(..3)];
            let command = match rng.u8(..5) {
                0 => Do::AddTwice(rng.u64(..9)),
                1 => Do::Nothing,
                2 => Do::Take(rng.u64(..20)),
                _ => Do::Add(rng.u64(..9)),
            };
            let before = refold(&store, &name);
            let expected = before.decide(&command);
            match (commands.execute(&stream(&name), &command), expected) {
                (Ok(done), Ok(events)) => assert_eq!(done.events().len(), events.len()),
                (Err(ExecuteError::Rejected(why)), Err(expected)) => assert_eq!(why, expected),
                (done, expected) => panic!("seed {seed}: {done:?}, expected {expected:?}"),
            }
            let after = refold(&store, &name);
            for commands in &kinds {
                let loaded = commands.load(&stream(&name)).unwrap();
                assert_eq!(loaded.state(), &after, "seed {seed}");
            }
        }
        store.close().unwrap();
        drop((kinds, store));
        let journal = Path::new(DIR).join("journal");
        match rng.u8(..6) {
            0 => copies.push(fs.snapshot_dir(&journal)),
            // Restored from an older copy: the snapshots are ahead, and soon of another history.
            1 | 2 if !copies.is_empty() => {
                restored += 1;
                fs.restore_dir(&journal, &copies[rng.usize(..copies.len())]);
            }
            3 => {
                let files = fs.files();
                let snapshots: Vec<_> = files.iter().filter(|p| p.starts_with(folder)).collect();
                if let Some(path) = rng.choice(snapshots) {
                    let len = fs.raw(path).unwrap().len() as u64;
                    flipped +=
                        u64::from(len > 0 && fs.flip_bit(path, rng.u64(..len.max(1)), rng.u8(..8)));
                }
            }
            4 => fs.power_cut(),
            _ => {}
        }
    }
    (restored, flipped)
}

/// The same events and the same layout, and another meaning.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Sum2(Sum);

impl Aggregate for Sum2 {
    const NAME: &'static str = Sum::NAME;
    const VERSION: u32 = 2;
    type Event = SumEvent;
    type Command = Do;
    type Error = String;

    fn apply(&mut self, event: &Recorded<SumEvent>) {
        self.0.apply(event);
        self.0.trace = 0;
    }

    fn decide(&self, command: &Do) -> Result<Vec<SumEvent>, String> {
        self.0.decide(command)
    }
}

#[test]
fn a_snapshot_of_another_version_is_not_used() {
    let store = open(&SimFs::new(1));
    let (old, new) = (store.commands::<Sum>(), store.commands::<Sum2>());
    let (old, new) = (old.snapshot_every(1).forgetful(), new.snapshot_every(1).forgetful());
    for amount in 1..5 {
        old.execute(&stream("a"), &Do::Add(amount)).unwrap();
        assert_ne!(old.load(&stream("a")).unwrap().state().trace, 0);
        assert_eq!(new.load(&stream("a")).unwrap().state().0.trace, 0);
    }
}

/// Whoever repeats a command until it is answered has executed it once, whatever crashes.
#[test]
fn commands_repeated_across_crashes_happen_exactly_once() {
    let (mut crashes, mut repeated) = (0, 0);
    for seed in 0..400 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let fs = SimFs::new(seed);
        let (total, a) = (rng.u64(3..12), stream("a"));
        let mut next = 0;
        while next < total {
            let fault = if rng.bool() { Fault::PowerCut } else { Fault::Kill };
            fs.fail_at(fs.ops() + rng.u64(..120), fault, Repeat::Once);
            let mut run = || -> Result<(), String> {
                let store = try_open(&fs).map_err(|e| e.to_string())?;
                let commands = store.commands::<Sum>().snapshot_every(2);
                while next < total {
                    let id = CommandId::of(&format!("command {next}"));
                    let done = commands.execute_once(id, &a, &Do::AddTwice(1));
                    match done {
                        Ok(Executed::Repeated(_)) => repeated += 1,
                        Ok(_) => {}
                        Err(error) => {
                            let expected = matches!(
                                error,
                                ExecuteError::Append(
                                    AppendError::Unknown(_)
                                        | AppendError::Poisoned(_)
                                        | AppendError::DiskFull(_)
                                        | AppendError::Read(_)
                                ) | ExecuteError::Read(_)
                            );
                            assert!(expected, "seed {seed}: {error:?}");
                            return Err(error.to_string());
                        }
                    }
                    next += 1;
                }
                Ok(())
            };
            let outcome = run();
            match fs.down() {
                Some(Down::PowerCut) => fs.power_cut(),
                Some(Down::Kill) => fs.kill(),
                None => outcome.unwrap(),
            }
            crashes += u64::from(fs.faults_struck() > 0);
            fs.clear_faults();
        }
        let store = open(&fs);
        let sum = refold(&store, "a");
        assert_eq!((sum.value, sum.events), (2 * total, 2 * total), "seed {seed}");
        assert_eq!(store.commands::<Sum>().snapshot_every(2).load(&a).unwrap().state(), &sum);
    }
    println!("{crashes} crashes, {repeated} commands had happened before");
    assert!(crashes > 300 && repeated > 20, "{crashes} {repeated}");
}
