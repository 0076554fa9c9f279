//! Inline views: what was appended is seen without a token, by whoever appended it, whatever goes on beside.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use headwater::view::{
    self, Fold, FoldError, Keys, OnPoison, RebuildOptions, View, ViewError, ViewHandle,
    ViewOptions, ViewState,
};
use headwater::{
    Append, AppendError, Durability, ExpectedRevision, NewEvent, Position, Recorded, Store,
    StreamId,
};

const PATIENCE: Duration = Duration::from_secs(60);
const FAILS: &[u8] = b"fails";

/// How many events each stream has, and the position behind the last one.
#[derive(Debug)]
struct Counts;

impl View for Counts {
    const NAME: &'static str = "counts";
    const VERSION: u32 = 1;
    type Key = StreamId;
    type Row = (u64, u64);
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
        keys.add(event.stream().clone());
    }

    fn fold(
        &self,
        _: &StreamId,
        row: Option<(u64, u64)>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<(u64, u64)>, FoldError> {
        if event.data() == FAILS {
            return Err("asked to fail".into());
        }
        Ok(Fold::Put((row.map_or(0, |row| row.0) + 1, event.position().get() + 1)))
    }
}

fn inline() -> ViewOptions {
    ViewOptions { inline: true, on_poison: OnPoison::Stop, ..ViewOptions::default() }
}

fn create(dir: &Path) -> Store {
    Store::create(dir.join("store")).unwrap()
}

fn to(stream: &str, data: &[u8]) -> Append {
    let stream = StreamId::new(stream).unwrap();
    let event = NewEvent::raw("counted", data.to_vec()).unwrap();
    Append::to(&stream, ExpectedRevision::Any, [event])
}

/// Appends, and reads the row at once.
fn append_and_see(store: &Store, view: &ViewHandle<Counts>, stream: &str, count: u64) {
    let appended = store.append(&to(stream, b"")).unwrap();
    assert_eq!(appended.receipt().behind, []);
    let seen = view.get(stream).unwrap();
    assert_eq!(seen, Some((count, appended.token().position.get())), "{stream}");
}

#[test]
fn every_thread_sees_what_it_has_appended_at_once_while_rebuilds_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let view = store.view_with(Counts, inline()).unwrap();
    let is_over = AtomicBool::new(false);
    let appended = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (store, view, is_over, appended) = (&store, &view, &is_over, &appended);
            scope.spawn(move || {
                let stream = format!("stream-{thread}");
                for count in 1.. {
                    append_and_see(store, view, &stream, count);
                    appended.fetch_add(1, Ordering::Relaxed);
                    if is_over.load(Ordering::Relaxed) && count >= 100 {
                        return;
                    }
                }
            });
        }
        for _ in 0..5 {
            let before = appended.load(Ordering::Relaxed);
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
            while appended.load(Ordering::Relaxed) < before + 10 {
                std::thread::yield_now();
            }
        }
        view.rollback().unwrap().wait().unwrap();
        is_over.store(true, Ordering::Relaxed);
    });
    let compared = view.check(RebuildOptions::default()).unwrap();
    assert!(compared.is_equal(), "{compared:?}");
}

#[test]
fn opening_catches_up_before_anything_is_read() {
    for events in [10, 3000] {
        let dir = tempfile::tempdir().unwrap();
        let store = create(dir.path());
        let stream = StreamId::new("a").unwrap();
        for _ in 0..events / 10 {
            let ten = (0..10).map(|_| NewEvent::raw("counted", vec![0; 600]).unwrap());
            store.append(&Append::to(&stream, ExpectedRevision::Any, ten)).unwrap();
        }
        for opening in 0..2 {
            let view = store.view_with(Counts, inline()).unwrap();
            assert_eq!(view.get("a").unwrap().map(|row| row.0), Some(events + opening));
            append_and_see(&store, &view, "a", events + opening + 1);
            // What an append doesn't wait for is seen by whoever does.
            let ticket = store.submit(&to("b", b"")).unwrap();
            let token = ticket.wait().unwrap().token();
            assert_eq!(view.get_at_least("b", &token, PATIENCE).unwrap().unwrap().0, opening + 1);
        }
    }
}

#[test]
fn the_events_are_appended_even_if_the_view_can_not_apply_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let view = store.view_with(Counts, inline()).unwrap();
    append_and_see(&store, &view, "a", 1);
    for position in 2..4 {
        let appended = store.append(&to("a", FAILS)).unwrap();
        assert_eq!(appended.token().position, Position::new(position));
        let [behind] = &appended.receipt().behind[..] else { panic!("{appended:?}") };
        assert_eq!((behind.view, behind.code), ("counts", "view_wait.stopped"));
        assert!(behind.reason.contains("asked to fail"), "{}", behind.reason);
        assert!(matches!(view.status().state, ViewState::Stopped(_)));
    }
    assert_eq!(view.get("a").unwrap().unwrap().0, 1);
    assert_eq!(store.journal().end().position, Position::new(3));
    drop(view);
    let appended = store.append(&to("a", b"")).unwrap();
    assert_eq!(appended.receipt().behind, [], "nobody has the view open");
}

#[test]
fn what_is_not_durable_is_not_shown_so_buffered_appends_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let buffered = to("a", b"").durability(Durability::Buffered);
    store.append(&buffered).unwrap();
    let view = store.view_with(Counts, inline()).unwrap();
    let refused = store.append(&buffered).unwrap_err();
    assert!(matches!(refused, AppendError::BufferedInline { view: "counts" }), "{refused}");
    let refused = store.submit(&buffered).map(drop).unwrap_err();
    assert_eq!(refused.code(), "append.buffered_inline");
    view.close().unwrap();
    store.append(&buffered).unwrap();
}

#[test]
fn only_a_store_opens_inline_views_and_does_not_keep_them_open() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let views = dir.path().join("elsewhere");
    let refused = view::open(&views, store.journal().clone(), Counts, inline()).unwrap_err();
    assert!(matches!(refused, ViewError::Inline { view: "counts" }), "{refused}");
    let view = store.view_with(Counts, inline()).unwrap();
    let in_use = store.view_with(Counts, inline()).unwrap_err();
    assert!(matches!(in_use, ViewError::InUse { .. }), "{in_use}");
    drop(view);
    let view = store.view_with(Counts, inline()).unwrap();
    append_and_see(&store, &view, "a", 1);
    assert_eq!(view.snapshot_latest(PATIENCE).unwrap().checkpoint().position, Position::new(1));
}

#[test]
fn the_latest_is_what_was_durable_when_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let options = ViewOptions { inline: false, ..inline() };
    let view = store.view_with(Counts, options).unwrap();
    for count in 1..200 {
        store.append(&to("a", b"")).unwrap();
        assert_eq!(view.get_latest("a", PATIENCE).unwrap(), Some((count, count)));
    }
    store.append(&to("a", FAILS)).unwrap();
    let stopped = view.get_latest("a", PATIENCE).unwrap_err();
    assert_eq!(stopped.code(), "view_wait.stopped", "{stopped}");
}
