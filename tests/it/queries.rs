//! Queries by type and tags, and appends that expect none of what a query means.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use headwater::fs::Fs;
use headwater::fs::sim::{Down, Fault, Op, Repeat, SimFs};
use headwater::planted::{Bug, plant};
use headwater::retention::{History, Options, Until};
use headwater::{
    Append, AppendError, Appended, EventId, ExpectedRevision, Journal, JournalOptions, NewEvent,
    OpenError, Position, Query, QueryItem, ReadError, Recorded, Store, StreamId, Ticket,
};

use crate::options;

const DIR: &str = "/store";

fn try_open(fs: &SimFs, options: JournalOptions) -> Result<Store, OpenError> {
    let builder = Store::builder(DIR).journal_options(options).create_if_missing();
    builder.fs(Arc::new(fs.clone())).open()
}

fn open(fs: &SimFs) -> Store {
    try_open(fs, options()).unwrap()
}

fn event(event_type: &str, tags: &[&str]) -> NewEvent {
    let event = NewEvent::raw(event_type, *b"x").unwrap();
    tags.iter().fold(event, |event, tag| event.tag(*tag))
}

fn to_stream(name: &str, events: impl IntoIterator<Item = NewEvent>) -> Append {
    Append::to(&StreamId::new(name).unwrap(), ExpectedRevision::Any, events)
}

fn random_event(rng: &mut fastrand::Rng) -> NewEvent {
    let tags: Vec<String> = (0..rng.u8(..3)).map(|_| format!("g{}", rng.u8(..4))).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    event(&format!("t{}", rng.u8(..3)), &tags)
}

fn random_query(rng: &mut fastrand::Rng) -> Query {
    let item = |rng: &mut fastrand::Rng| {
        let types = (0..rng.u8(..3)).map(|_| format!("t{}", rng.u8(..4))).collect::<Vec<_>>();
        let tags = (0..rng.u8(..3)).map(|_| format!("g{}", rng.u8(..5))).collect::<Vec<_>>();
        QueryItem::types(types).and_tags(tags)
    };
    Query::any_of((0..rng.u8(..3)).map(|_| item(rng)).collect::<Vec<_>>())
}

fn all(store: &Store) -> Vec<Recorded> {
    store.read_all(store.journal().start().position).unwrap().map(Result::unwrap).collect()
}

#[test]
fn a_query_means_events_of_any_of_its_types_that_have_all_of_its_tags() {
    let store = open(&SimFs::new(1));
    let events = [
        event("a", &["x"]),
        event("b", &["x", "y"]),
        event("a", &["y", "x"]),
        event("a", &[]),
        event("c", &["y"]),
    ];
    store.append(&to_stream("s", events)).unwrap();
    let found = |query: Query| -> Vec<u64> {
        let events = store.read_query(&query, Position::START).unwrap();
        events.map(|event| event.unwrap().position().get()).collect()
    };
    assert_eq!(found(QueryItem::types(["a"]).into()), [0, 2, 3]);
    assert_eq!(found(QueryItem::types(["a", "c"]).into()), [0, 2, 3, 4]);
    assert_eq!(found(QueryItem::tags(["x"]).into()), [0, 1, 2]);
    assert_eq!(found(QueryItem::tags(["x", "y"]).into()), [1, 2]);
    assert_eq!(found(QueryItem::types(["a"]).and_tags(["x", "y"]).into()), [2]);
    assert_eq!(found(QueryItem::default().into()), [0, 1, 2, 3, 4]);
    assert!(found(Query::default()).is_empty());
    assert!(found(QueryItem::tags(["a"]).into()).is_empty(), "a type is no tag");
    let either = Query::any_of([QueryItem::types(["c"]), QueryItem::types(["a"]).and_tags(["y"])]);
    assert_eq!(found(either), [2, 4]);

    let mut events = store.read_query(&QueryItem::tags(["y"]).into(), Position::new(2)).unwrap();
    assert_eq!(events.position(), Position::new(2));
    assert_eq!(events.next().unwrap().unwrap().position(), Position::new(2));
    assert_eq!(events.position(), Position::new(4));
    assert_eq!(events.next().unwrap().unwrap().position(), Position::new(4));
    assert!(events.next().is_none());
    assert_eq!(events.position(), Position::new(5));
    store.append(&to_stream("s", [event("a", &["y"])])).unwrap();
    assert_eq!(events.next().unwrap().unwrap().position(), Position::new(5));
}

#[test]
fn what_is_excluded_is_a_conflict_that_names_the_event_and_a_repetition_is_none() {
    for window in [1 << 20, 0] {
        let options = JournalOptions { idempotency_window_events: window, ..options() };
        let fs = SimFs::new(1);
        let store = try_open(&fs, options.clone()).unwrap();
        store.append(&to_stream("s", [event("noise", &[])])).unwrap();
        let taken = Query::from(QueryItem::types(["registered"]).and_tags(["email:a"]));
        let register = |name: &str, from: u64| {
            let append = to_stream(name, [event("registered", &["email:a", "country:nl"])]);
            append.and_expect_none(taken.clone(), Position::new(from))
        };
        let (first, other) = (register("user-1", 0), register("user-2", 1));
        let appended = store.append(&first).unwrap();
        assert!(matches!(appended, Appended::New(_)));
        for reopened in [false, true] {
            let store = match reopened {
                false => store.clone(),
                true => {
                    store.close().unwrap();
                    try_open(&fs.fork(2), options.clone()).unwrap()
                }
            };
            let conflict = store.append(&other).unwrap_err();
            let named = matches!(conflict, AppendError::QueryConflict { position }
                if position == Position::new(1));
            assert!(named, "{conflict}");
            let again = store.append(&first).unwrap();
            assert_eq!(again, Appended::Duplicate(appended.receipt().clone()));
            // From behind it, nothing is in the way.
            let end = store.journal().end().position.get();
            store.append(&register("user-3", end)).unwrap();
        }
    }
}

#[test]
fn a_condition_on_what_is_not_there_any_more_or_not_yet_is_refused() {
    let store = open(&SimFs::new(1));
    while store.journal().segments().len() < 4 {
        store.append(&to_stream("s", [event("a", &[])])).unwrap();
    }
    let end = store.journal().end().position;
    let none = || Query::from(QueryItem::types(["nothing"]));
    let expecting = |from| to_stream("s", [event("a", &[])]).and_expect_none(none(), from);
    let beyond = store.append(&expecting(end.advance(1))).unwrap_err();
    assert!(matches!(beyond, AppendError::Read(ReadError::BeyondEnd { .. })), "{beyond}");
    store.append(&expecting(end)).unwrap();
    let all = Options::new(Until::Keeping { bytes: 0 });
    let target = store.plan_retention(&all).unwrap().target;
    store.retain(&all.history(History::Forget(target))).unwrap();
    let gone = store.append(&expecting(Position::START)).unwrap_err();
    assert!(matches!(gone, AppendError::Read(ReadError::Truncated { .. })), "{gone}");
    store.append(&expecting(target)).unwrap();
}

/// A conditional append that was tried.
struct Tried {
    query: Query,
    from: Position,
    ids: Vec<EventId>,
    outcome: Result<Appended, AppendError>,
}

impl Tried {
    fn append(
        rng: &mut fastrand::Rng,
        name: &str,
        from: Position,
    ) -> (Append, Query, Vec<EventId>) {
        let events: Vec<_> = (0..rng.usize(1..3)).map(|_| random_event(rng)).collect();
        let ids = events.iter().map(NewEvent::event_id).collect();
        let query = random_query(rng);
        (to_stream(name, events).and_expect_none(query.clone(), from), query, ids)
    }

    /// Whether the answer is true of the history: one after the other, in the order of positions.
    fn judge(&self, history: &[Recorded]) -> Result<(), String> {
        let meant = |range: std::ops::Range<u64>| {
            let events = history.get(range.start as usize..range.end as usize).unwrap_or_default();
            events.iter().find(|event| self.query.matches(event)).map(Recorded::position)
        };
        let at = |id: &EventId| history.iter().find(|event| event.id() == *id);
        match &self.outcome {
            Ok(appended) => {
                let place = appended.receipt().events[0].position;
                if at(&self.ids[0]).map(Recorded::position) != Some(place) {
                    return Err(format!("what was appended at {place} isn't there"));
                }
                match meant(self.from.get()..place.get()) {
                    Some(there) => Err(format!("appended at {place} in spite of {there}")),
                    None => Ok(()),
                }
            }
            Err(AppendError::QueryConflict { position }) => {
                let there = history.get(position.get() as usize);
                if !there.is_some_and(|event| self.query.matches(event)) || *position < self.from {
                    return Err(format!("refused because of {position}, which isn't meant"));
                }
                match at(&self.ids[0]) {
                    Some(_) => Err("refused, and appended".into()),
                    None => Ok(()),
                }
            }
            // Nobody knows; but if it is there, its condition was met.
            Err(_) => match at(&self.ids[0]).map(Recorded::position) {
                Some(place) => match meant(self.from.get()..place.get()) {
                    Some(there) => Err(format!("appended at {place} in spite of {there}")),
                    None => Ok(()),
                },
                None => Ok(()),
            },
        }
    }
}

#[test]
fn threads_that_append_on_conditions_are_answered_as_if_one_came_after_the_other() {
    let (mut appended, mut refused) = (0, 0);
    for seed in 0..40 {
        let fs = SimFs::new(seed);
        let mut store = open(&fs);
        for _ in 0..3 {
            let number = AtomicU64::new(seed * 1000);
            let tried: Vec<Vec<Tried>> = std::thread::scope(|scope| {
                let work = || {
                    let thread = number.fetch_add(1, Ordering::SeqCst);
                    let mut rng = fastrand::Rng::with_seed(thread);
                    let one = |_| {
                        let end = store.journal().end().position.get();
                        // Mostly recent, sometimes from anywhere.
                        let back = if rng.u8(..6) == 0 { end } else { end.min(rng.u64(..4)) };
                        let from = Position::new(end - back);
                        let (append, query, ids) =
                            Tried::append(&mut rng, &format!("s{thread}"), from);
                        let outcome = match rng.bool() {
                            true => store.append(&append),
                            false => store.submit(&append).and_then(Ticket::wait),
                        };
                        if rng.u8(..8) == 0 {
                            store.append(&to_stream("plain", [random_event(&mut rng)])).unwrap();
                        }
                        if outcome.is_ok() && rng.u8(..4) == 0 {
                            let again = store.append(&append).unwrap();
                            assert!(matches!(again, Appended::Duplicate(_)));
                        }
                        Tried { query, from, ids, outcome }
                    };
                    (0..15).map(one).collect()
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let history = all(&store);
            for tried in tried.iter().flatten() {
                tried.judge(&history).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
                match &tried.outcome {
                    Ok(_) => appended += 1,
                    Err(AppendError::QueryConflict { .. }) => refused += 1,
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
            store.close().unwrap();
            drop(store);
            store = open(&fs);
        }
    }
    println!("{appended} appended, {refused} refused");
    assert!(appended > 1000 && refused > 1000);
}

/// Lives with many conditional appends under way at once, each ended by a crash.
fn conditions_and_crashes(seed: u64, bug: Option<Bug>) -> Result<(u64, u64), String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let fs = SimFs::new(seed);
    let mut tried: Vec<Tried> = Vec::new();
    let mut crashes = 0;
    for life in 0..5 {
        let fault = match rng.u8(..3) {
            0 => Fault::PowerCut,
            1 => Fault::Kill,
            _ => Fault::Eio,
        };
        fs.fail_at(fs.ops() + rng.u64(..100), fault, Repeat::Once);
        plant(bug);
        if let Ok(store) = try_open(&fs, options()) {
            for _ in 0..8 {
                let mut under_way = Vec::new();
                for _ in 0..rng.usize(1..6) {
                    let end = store.journal().end().position.get();
                    let from = Position::new(end - end.min(rng.u64(..6)));
                    let (append, query, ids) = Tried::append(&mut rng, &format!("s{life}"), from);
                    under_way.push((query, from, ids, store.submit(&append)));
                }
                for (query, from, ids, ticket) in under_way {
                    let outcome = ticket.and_then(Ticket::wait);
                    tried.push(Tried { query, from, ids, outcome });
                }
            }
            drop(store);
        }
        plant(None);
        match fs.down() {
            Some(Down::PowerCut) => fs.power_cut(),
            Some(Down::Kill) => fs.kill(),
            None => {}
        }
        crashes += u64::from(fs.faults_struck() > 0);
        fs.clear_faults();
        fs.power_cut();
        let history = all(&open(&fs));
        for tried in &tried {
            tried.judge(&history).map_err(|what| format!("seed {seed}: {what}"))?;
        }
    }
    let refused = tried
        .iter()
        .filter(|tried| matches!(tried.outcome, Err(AppendError::QueryConflict { .. })));
    Ok((crashes, refused.count() as u64))
}

#[test]
fn no_answer_to_a_condition_rests_on_what_a_crash_takes_back() {
    let (mut crashes, mut refused) = (0, 0);
    for seed in 0..250 {
        let (here, conflicts) = conditions_and_crashes(seed, None).unwrap();
        (crashes, refused) = (crashes + here, refused + conflicts);
    }
    println!("{crashes} crashes, {refused} refused");
    assert!(crashes > 700 && refused > 1000, "{crashes}, {refused}");
}

/// More than is kept in memory: what lies in front is looked for in the journal.
#[test]
fn a_condition_reaches_back_behind_what_is_remembered() {
    let large = JournalOptions {
        segment_bytes_first: 4 << 20,
        segment_bytes_max: 4 << 20,
        background_thread: false,
        ..JournalOptions::default()
    };
    let store = try_open(&SimFs::new(1), large).unwrap();
    let rare = |from| {
        let append = to_stream("s", [event("t", &[])]);
        append.and_expect_none(QueryItem::tags(["rare"]), Position::new(from))
    };
    store.append(&rare(0)).unwrap(); // from now on they are kept
    let place = store.append(&to_stream("s", [event("t", &["rare"])])).unwrap().receipt().events[0];
    let many = || (0..1000).map(|_| event("t", &["a", "b"]));
    for _ in 0..100 {
        store.append(&to_stream("s", many())).unwrap();
    }
    for from in [0, 1] {
        let conflict = store.append(&rare(from)).unwrap_err();
        assert!(
            matches!(conflict, AppendError::QueryConflict { position } if position == place.position)
        );
    }
    store.append(&rare(2)).unwrap();
    store.append(&rare(90_000)).unwrap();
}

/// Read with labels and without, whatever has become of them, a query means what a look at every event means.
#[test]
fn a_query_finds_what_a_look_at_every_event_finds() {
    let mut laid_out = 0;
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let fs = SimFs::new(seed);
        for _ in 0..4 {
            let store = open(&fs);
            for _ in 0..rng.usize(..60) {
                let events: Vec<_> = (0..rng.usize(1..4)).map(|_| random_event(&mut rng)).collect();
                let rare = (rng.u8(..30) == 0).then(|| event("rare", &["rare"]));
                store.append(&to_stream("s", events.into_iter().chain(rare))).unwrap();
            }
            let history = all(&store);
            let first = store.journal().start().position.get();
            let dynamic: Arc<dyn Fs> = Arc::new(fs.clone());
            let (beside, _) =
                Journal::open_read_only(&dynamic, &Path::new(DIR).join("journal")).unwrap();
            for _ in 0..25 {
                let query = match rng.u8(..4) {
                    0 => QueryItem::tags(["rare"]).into(),
                    _ => random_query(&mut rng),
                };
                let from = rng.u64(first..=first + history.len() as u64);
                let expected: Vec<_> = history
                    .iter()
                    .filter(|event| event.position().get() >= from && query.matches(event))
                    .collect();
                let journal = if rng.bool() { store.journal() } else { &beside };
                let mut events = journal.read_query(&query, Position::new(from)).unwrap();
                let mut found = Vec::new();
                while let Some(event) = events.next() {
                    found.push(event.unwrap());
                    let next = expected.get(found.len()).map(|event| event.position());
                    assert!(next.is_none_or(|next| events.position() <= next), "seed {seed}");
                }
                assert!(
                    found.iter().eq(expected.iter().copied()),
                    "seed {seed}: {query:?} from {from}"
                );
                assert_eq!(events.position(), journal.end().position);
            }
            let files = fs.files();
            let labels: Vec<_> =
                files.iter().filter(|p| p.extension().is_some_and(|e| e == "lbl")).collect();
            laid_out += labels.len();
            if let Some(path) = rng.choice(labels) {
                let len = fs.raw(path).unwrap().len() as u64;
                match rng.u8(..3) {
                    0 => drop(fs.flip_bit(path, rng.u64(..len), rng.u8(..8))),
                    1 => fs.write_raw(path, &[0; 4096]),
                    _ => {}
                }
            }
            if rng.u8(..3) == 0 {
                let all = Options::new(Until::Keeping { bytes: rng.u64(..30_000) });
                let target = store.plan_retention(&all).unwrap().target;
                store.retain(&all.history(History::Forget(target))).unwrap();
            }
            drop(store);
            if rng.bool() {
                fs.power_cut();
            } else {
                fs.kill();
            }
        }
    }
    println!("{laid_out} files of labels");
    assert!(laid_out > 300, "{laid_out}");
}

/// Neither does a condition on recent events read anything, nor does a rare tag cost what the journal holds.
#[test]
fn what_a_condition_and_a_query_cost_does_not_grow_with_the_journal() {
    let fs = SimFs::new(1);
    let store = open(&fs);
    let none = || Query::from(QueryItem::tags(["never"]));
    let mut costs = Vec::new();
    let expecting = |from| to_stream("s", [event("t", &[])]).and_expect_none(none(), from);
    store.append(&expecting(Position::START)).unwrap(); // from now on the last events are remembered
    for segments in [5, 20, 80] {
        while store.journal().segments().len() < segments {
            store.append(&to_stream("s", [event("t", &["often"])])).unwrap();
        }
        let from = store.journal().end().position;
        store.append(&to_stream("s", [event("t", &[])])).unwrap();
        let before = fs.ops_of(Op::Read);
        store.append(&expecting(from)).unwrap();
        let condition = fs.ops_of(Op::Read) - before;
        // The first query lays out the labels of the segments that have none.
        let count = || store.read_query(&none(), Position::START).unwrap().count();
        assert_eq!(count(), 0);
        let before = fs.ops_of(Op::Read);
        assert_eq!(count(), 0);
        costs.push((segments as u64, condition, fs.ops_of(Op::Read) - before));
    }
    println!("segments, reads of a condition, reads of a query: {costs:?}");
    for (segments, condition, query) in costs {
        assert_eq!(condition, 0);
        assert!(query <= 4 * segments, "{query} for {segments}");
    }
}
