//! The journal on real files, through the public interface.

use std::sync::Arc;
use std::time::Duration;

use headwater::format::Flags;
use headwater::format::batch::genesis;
use headwater::format::segment::SegmentHeader;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::{
    Append, AppendError, Appended, EventId, ExpectedRevision, Incarnation, Ingest, Item, JournalId,
    JournalOptions, NewEvent, OpenError, Position, Revision, Store, StreamId,
};

fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

fn event(text: &str) -> NewEvent {
    NewEvent::raw("test.happened", text.as_bytes()).unwrap()
}

fn texts(store: &Store, from: u64) -> Vec<String> {
    let events = store.read_all(Position::new(from)).unwrap();
    events.map(|event| String::from_utf8(event.unwrap().into_data()).unwrap()).collect()
}

fn open(dir: &std::path::Path) -> Store {
    Store::builder(dir).create_if_missing().journal_options(small()).open().unwrap()
}

#[test]
fn what_was_appended_is_read_back_in_order_across_rolls_and_reopenings() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for round in 0..4 {
        let store = open(dir.path());
        for i in 0..60 {
            let text = format!("{round}-{i}-{}", "x".repeat(i * 7 % 300));
            let to = stream(&format!("s-{}", i % 7));
            store.append(&Append::to(&to, ExpectedRevision::Any, [event(&text)])).unwrap();
            expected.push(text);
        }
        assert_eq!(texts(&store, 0), expected);
        assert_eq!(
            texts(&store, 100.min(expected.len() as u64)),
            expected[100.min(expected.len())..]
        );
        for s in 0..7 {
            let read = store.read_stream(&stream(&format!("s-{s}")), Revision::new(2)).unwrap();
            let revisions: Vec<u64> = read.map(|e| e.unwrap().revision().get()).collect();
            let all = expected.iter().filter(|t| {
                let i: usize = t.split('-').nth(1).unwrap().parse().unwrap();
                i % 7 == s
            });
            assert_eq!(revisions, (2..all.count() as u64).collect::<Vec<_>>(), "stream {s}");
        }
        assert!(store.journal().segments().len() > round);
        if round % 2 == 0 {
            store.close().unwrap();
        }
    }
}

#[test]
fn expected_revisions_are_enforced() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let s = stream("a");
    let append = |expected| store.append(&Append::to(&s, expected, [event("e")]));
    assert!(matches!(
        append(ExpectedRevision::StreamExists),
        Err(AppendError::Conflict { actual: None, .. })
    ));
    append(ExpectedRevision::NoStream).unwrap();
    append(ExpectedRevision::Exact(Revision::new(0))).unwrap();
    append(ExpectedRevision::StreamExists).unwrap();
    match append(ExpectedRevision::Exact(Revision::new(1))) {
        Err(AppendError::Conflict { actual, .. }) => assert_eq!(actual, Some(Revision::new(2))),
        other => panic!("{other:?}"),
    }
    assert!(matches!(append(ExpectedRevision::NoStream), Err(AppendError::Conflict { .. })));
    // A condition on a stream that isn't written.
    let other = Append::to(&stream("b"), ExpectedRevision::Any, [event("e")])
        .and_expect(&s, ExpectedRevision::Exact(Revision::new(1)));
    assert!(matches!(store.append(&other), Err(AppendError::Conflict { .. })));
    assert_eq!(store.journal().end().position, Position::new(3));
}

#[test]
fn repeating_an_append_gives_its_first_result() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (event("a"), event("b"));
    let s = stream("a");
    let both = Append::to(&s, ExpectedRevision::Any, [a.clone(), b.clone()]);
    let first = open(dir.path()).append(&both).unwrap();
    for _ in 0..2 {
        let store = open(dir.path());
        match store.append(&both).unwrap() {
            Appended::Duplicate(receipt) => assert_eq!(&receipt, first.receipt()),
            other => panic!("{other:?}"),
        }
        let partly = Append::to(&s, ExpectedRevision::Any, [a.clone(), event("c")]);
        assert!(matches!(
            store.append(&partly),
            Err(AppendError::PartialDuplicate { known: 1, total: 2 })
        ));
        store.close().unwrap();
    }
    // Without a window, `NoStream` and `Exact` still recognise the repetition.
    let options = JournalOptions { idempotency_window_events: 0, ..small() };
    let store = Store::builder(dir.path()).journal_options(options).open().unwrap();
    store.append(&Append::to(&s, ExpectedRevision::Any, [event("later")])).unwrap();
    let again = Append::to(&s, ExpectedRevision::NoStream, [a, b]);
    assert_eq!(store.append(&again).unwrap(), Appended::Duplicate(first.receipt().clone()));
}

#[test]
fn a_batch_over_several_streams_is_one_batch() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let append = Append::to(&stream("a"), ExpectedRevision::NoStream, [event("1"), event("2")])
        .and_to(&stream("b"), ExpectedRevision::NoStream, [event("3")]);
    let receipt = store.append(&append).unwrap();
    let placed: Vec<_> =
        receipt.receipt().events.iter().map(|p| (p.position.get(), p.revision.get())).collect();
    assert_eq!(placed, [(0, 0), (1, 1), (2, 0)]);
    assert_eq!(texts(&store, 0), ["1", "2", "3"]);
}

#[test]
fn many_threads_append_and_every_event_is_there_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                let s = stream(&format!("t-{thread}"));
                for i in 0..100_u64 {
                    let expected = match i.checked_sub(1) {
                        None => ExpectedRevision::NoStream,
                        Some(last) => ExpectedRevision::Exact(Revision::new(last)),
                    };
                    let appended = store.append(&Append::to(&s, expected, [event("x")])).unwrap();
                    assert_eq!(appended.receipt().events[0].revision.get(), i);
                    assert!(store.journal().end().position >= appended.token().position);
                }
            });
        }
    });
    assert_eq!(texts(&store, 0).len(), 800);
}

#[test]
fn a_second_writer_is_told_who_holds_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    match Store::open(dir.path()) {
        Err(OpenError::Locked { owner, path }) => {
            assert!(owner.contains(&std::process::id().to_string()), "{owner}");
            assert!(path.starts_with(dir.path()));
        }
        other => panic!("{other:?}"),
    }
    store.close().unwrap();
    Store::open(dir.path()).unwrap();
}

#[test]
fn a_missing_store_is_not_created_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Store::open(dir.path().join("x")), Err(OpenError::NotFound { .. })));
    assert!(!dir.path().join("x").exists());
    Store::create(dir.path().join("x")).unwrap();
    assert!(matches!(Store::create(dir.path().join("x")), Err(OpenError::AlreadyExists { .. })));
}

#[test]
fn a_subscription_catches_up_says_so_once_and_goes_on_live() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let s = stream("a");
    let put = |text: &str| {
        store.append(&Append::to(&s, ExpectedRevision::Any, [event(text)])).unwrap();
    };
    put("1");
    let mut subscription = store.subscribe(Position::START).unwrap();
    let mut next = |timeout| subscription.next(Duration::from_millis(timeout)).unwrap();
    assert!(matches!(next(0), Some(Item::Event(e)) if e.data() == b"1"));
    assert_eq!(next(0), Some(Item::CaughtUp { end: Position::new(1) }));
    assert_eq!(next(0), None);
    std::thread::scope(|scope| {
        scope.spawn(|| put("2"));
        assert!(matches!(next(10_000), Some(Item::Event(e)) if e.data() == b"2"));
    });
    assert_eq!(next(0), Some(Item::CaughtUp { end: Position::new(2) }));
}

#[test]
fn too_large_and_invalid_appends_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let s = stream("a");
    let append =
        |events: Vec<NewEvent>| store.append(&Append::to(&s, ExpectedRevision::Any, events));
    assert!(matches!(append(vec![event(&"x".repeat(9000))]), Err(AppendError::TooLarge { .. })));
    assert!(matches!(append(vec![]), Err(AppendError::Invalid(_))));
    let id = EventId::new();
    assert!(matches!(
        append(vec![event("a").id(id), event("b").id(id)]),
        Err(AppendError::Invalid(_))
    ));
    assert!(matches!(append(vec![event("a").tag("")]), Err(AppendError::Invalid(_))));
    assert_eq!(store.journal().end().position, Position::START);
    append(vec![event("fine")]).unwrap();
}

#[test]
fn a_mirror_reserves_no_more_than_its_bound_on_an_origins_word_also_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let fs: Arc<dyn Fs> = Arc::new(OsFs);
    let journal = JournalId::from_bytes([1; 16]);
    let mut mirror = Ingest::create(&fs, dir.path(), journal, &small()).unwrap();
    let header = SegmentHeader {
        flags: Flags::default(),
        group_alignment: 64,
        journal,
        number: 0,
        epoch: 1,
        incarnation: Incarnation::new(1),
        base_position: Position::START,
        base_offset: 0,
        durable_offset: 0,
        salt: 1,
        created_at_us: 0,
        capacity_bytes: 200 << 20,
        previous_chain: genesis(journal),
    };
    mirror.segment(&header.to_page().bytes()).unwrap();
    drop(mirror);
    let path = dir.path().join("0000000000000000.seg");
    let reserved = || std::fs::metadata(&path).unwrap().len();
    assert_eq!(reserved(), 64 << 20);
    drop(Ingest::open(&fs, dir.path(), &small()).unwrap().unwrap());
    assert_eq!(reserved(), 64 << 20);
}

#[test]
fn the_store_refuses_to_begin_anew_where_views_remember_events() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.append(&Append::to(&stream("a"), ExpectedRevision::Any, [event("1")])).unwrap();
    store.close().unwrap();
    std::fs::remove_file(dir.path().join("journal/0000000000000000.seg")).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(OpenError::LostJournal { .. })));
    std::fs::remove_file(dir.path().join("journal/mark")).unwrap();
    std::fs::create_dir_all(dir.path().join("views/totals")).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(OpenError::LostJournal { .. })));
}
