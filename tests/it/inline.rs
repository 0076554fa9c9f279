//! Inline views: what was appended is seen without a token, by whoever appended it, whatever goes on beside.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use headwater::reactor::{IdempotencyKey, ReactError, Reactor, ReactorOptions, Start};
use headwater::view::{
    self, Fold, FoldError, Keys, OnPoison, RebuildOptions, View, ViewError, ViewHandle,
    ViewOptions, ViewState, WaitError,
};
use headwater::{
    Append, AppendError, Durability, ExpectedRevision, NewEvent, Position, Recorded, Store,
    StreamId,
};
use parking_lot::{Condvar, Mutex};

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

/// Is set when it is dropped: what other threads wait for is over also if this one panics.
pub(crate) struct Over<'a>(pub(crate) &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn every_thread_sees_what_it_has_appended_at_once_while_rebuilds_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    // Batch by batch: what is durable at once needs several steps.
    let options = ViewOptions { chunk_bytes: 1, ..inline() };
    let view = store.view_with(Counts, options).unwrap();
    let is_over = AtomicBool::new(false);
    let appended = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads = [0, 1, 2].map(|thread| {
            let (store, view, is_over, appended) = (&store, &view, &is_over, &appended);
            scope.spawn(move || {
                let stream = format!("stream-{thread}");
                let _over = Over(is_over);
                for count in 1.. {
                    append_and_see(store, view, &stream, count);
                    appended.fetch_add(1, Ordering::Relaxed);
                    if is_over.load(Ordering::Relaxed) && count >= 100 {
                        return;
                    }
                }
            })
        });
        let _over = Over(&is_over);
        for _ in 0..5 {
            let before = appended.load(Ordering::Relaxed);
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
            while appended.load(Ordering::Relaxed) < before + 10 {
                assert!(
                    !threads.iter().any(std::thread::ScopedJoinHandle::is_finished),
                    "what it appended wasn't there"
                );
                std::thread::yield_now();
            }
        }
        view.rollback().unwrap().wait().unwrap();
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

/// Those who append take steps of it: they let go of it before it is closed, and it is caught up before it is handed out.
#[test]
fn a_view_is_closed_and_opened_again_while_others_append() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let (is_over, appended) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    store.append(&to("a", b"")).unwrap();
                    appended.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let _over = Over(&is_over);
        for _ in 0..50 {
            let view = store.view_with(Counts, inline()).unwrap();
            let returned = appended.load(Ordering::SeqCst);
            assert!(view.get("a").unwrap().map_or(0, |row| row.0) >= returned);
            view.close().unwrap();
        }
    });
}

/// Holds the fold at an event until it is told to go on, or for as long as a test can wait.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<(bool, bool)>, Condvar)>);

impl Gate {
    fn hold(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock();
        state.0 = true;
        changed.notify_all();
        changed.wait_while_for(&mut state, |(_, is_open)| !*is_open, PATIENCE / 10);
    }

    fn wait_until_held(&self) {
        let (state, changed) = &*self.0;
        changed.wait_while(&mut state.lock(), |(is_held, _)| !*is_held);
    }

    fn open(&self) {
        self.0.0.lock().1 = true;
        self.0.1.notify_all();
    }
}

/// A handle to itself, which it closes, or lets go of, when it is asked to; or its fold takes its time.
#[derive(Clone, Default)]
struct Own {
    handle: Arc<Mutex<Option<ViewHandle<Self>>>>,
    gate: Gate,
}

const CLOSES: &[u8] = b"closes";
const DROPS: &[u8] = b"drops";
const HOLDS: &[u8] = b"holds";

impl View for Own {
    const NAME: &'static str = "own";
    const VERSION: u32 = 1;
    type Key = StreamId;
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<StreamId>) {
        keys.add(event.stream().clone());
    }

    fn fold(
        &self,
        _: &StreamId,
        row: Option<u64>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        let handle = || self.handle.lock().take();
        match &event.data()[..] {
            CLOSES => handle().map_or(Ok(()), |handle| handle.close())?,
            DROPS => drop(handle()),
            HOLDS => self.gate.hold(),
            _ => {}
        }
        Ok(Fold::Put(row.unwrap_or(0) + 1))
    }
}

#[test]
fn a_view_that_is_closed_by_its_own_fold_ends_and_nobody_waits_for_ever() {
    for (inline, event) in [(true, CLOSES), (true, DROPS), (false, CLOSES), (false, DROPS)] {
        let dir = tempfile::tempdir().unwrap();
        let store = create(dir.path());
        let own = Own::default();
        let view = store.view_with(own.clone(), ViewOptions { inline, ..self::inline() }).unwrap();
        let watch = (event == CLOSES).then(|| view.control());
        *own.handle.lock() = Some(view);
        let (done, is_done) = mpsc::channel();
        let appender = store.clone();
        std::thread::spawn(move || {
            let appended = appender.append(&to("a", event)).unwrap();
            done.send(appended.receipt().behind.clone()).unwrap();
        });
        let behind = is_done.recv_timeout(PATIENCE / 3);
        assert_eq!(behind.as_deref(), Ok(&[][..]), "inline {inline}, {event:?}");
        if let Some(view) = &watch {
            until(|| matches!(view.status().state, ViewState::Closed));
            // What it was at when it was closed is applied.
            assert_eq!(view.checkpoint().applied.position, Position::new(1));
            view.close().unwrap();
        }
        drop(watch);
        // It can be opened again once its thread has ended.
        let view = until_some(|| store.view_with(Own::default(), self::inline()).ok());
        assert_eq!(view.get("a").unwrap(), Some(1));
        assert_eq!(store.append(&to("a", b"")).unwrap().receipt().behind, []);
        assert_eq!(view.get("a").unwrap(), Some(2));
    }
}

fn until(mut is_so: impl FnMut() -> bool) {
    until_some(|| is_so().then_some(()));
}

fn until_some<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "never");
        std::thread::yield_now();
    }
}

#[test]
fn a_wait_for_an_inline_view_ends_when_its_time_is_over_though_the_fold_takes_longer() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path());
    let own = Own::default();
    let view = store.view_with(own.clone(), inline()).unwrap();
    let token = store.submit(&to("a", HOLDS)).unwrap().wait().unwrap().token();
    own.gate.wait_until_held();
    let short = Duration::from_millis(20);
    let waits = [
        view.wait_for(&token, short).unwrap_err(),
        view.wait_for_latest(short).unwrap_err(),
        // Applied only when there is nothing else to do: somebody is at it.
        view.wait_for_latest(Duration::ZERO).unwrap_err(),
    ];
    for late in waits {
        let WaitError::Timeout { reached, wanted } = late else { panic!("{late}") };
        assert_eq!((reached, wanted), (Position::START, Position::new(1)));
    }
    own.gate.open();
    view.wait_for(&token, PATIENCE).unwrap();
    assert_eq!(view.get_latest("a", PATIENCE).unwrap(), Some(1));
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

/// Whatever a fold shouldn't do.
type Misdeed = Box<dyn Fn() -> String + Send>;

/// A view whose fold does something to views and stores: once, and writes down what has come of it.
#[derive(Default)]
struct Meddler<const VERSION: u32> {
    misdeed: Arc<Mutex<Option<Misdeed>>>,
    outcome: Arc<Mutex<Option<String>>>,
}

impl<const VERSION: u32> View for Meddler<VERSION> {
    const NAME: &'static str = "meddler";
    const VERSION: u32 = VERSION;
    type Key = u8;
    type Row = u64;
    type Event = Vec<u8>;

    fn route(&self, _: &Recorded<Vec<u8>>, keys: &mut Keys<u8>) {
        keys.add(0);
    }

    fn fold(
        &self,
        _: &u8,
        row: Option<u64>,
        _: &Recorded<Vec<u8>>,
    ) -> Result<Fold<u64>, FoldError> {
        let misdeed = self.misdeed.lock().take();
        if let Some(misdeed) = misdeed {
            *self.outcome.lock() = Some(misdeed());
        }
        Ok(Fold::Put(row.unwrap_or(0) + 1))
    }
}

/// In which thread a fold does it.
#[derive(Clone, Copy, Debug)]
enum By {
    /// One that appends.
    Appender,
    /// The view's own.
    Follower,
    /// One that builds a generation in bulk.
    Builder,
}

/// Runs `test` in a thread; a deadlock is a failure.
fn within_patience(what: String, test: impl FnOnce() + Send + 'static) {
    let (ended, has_ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        ended.send(()).unwrap();
    });
    let ended = has_ended.recv_timeout(Duration::from_secs(20));
    assert!(ended != Err(mpsc::RecvTimeoutError::Timeout), "{what}: a deadlock");
    thread.join().unwrap();
}

/// What a fold does to views is refused where it would wait for itself, in whichever thread it runs.
#[test]
fn a_fold_that_opens_rebuilds_or_appends_is_refused_instead_of_waiting_for_itself() {
    type Misdeeds = fn(Store, ViewHandle<Counts>, Option<ViewHandle<Meddler<1>>>) -> Misdeed;
    let misdeeds: [(&str, Misdeeds, &str); 10] = [
        (
            "open",
            |store, _, _| {
                Box::new(move || {
                    store
                        .view_with(Meddler::<3>::default(), inline())
                        .map(drop)
                        .unwrap_err()
                        .code()
                        .to_owned()
                })
            },
            "view.within_fold",
        ),
        (
            "rebuild",
            |_, other, _| {
                Box::new(move || {
                    let rebuild = other.rebuild(RebuildOptions::default());
                    rebuild.map(|it| drop(it.wait())).unwrap_err().code().to_owned()
                })
            },
            "view.within_fold",
        ),
        (
            "rebuild itself",
            |_, _, own| {
                Box::new(move || {
                    let rebuild = own.as_ref().unwrap().rebuild(RebuildOptions::default());
                    rebuild.map(|it| drop(it.wait())).unwrap_err().code().to_owned()
                })
            },
            "view.within_fold",
        ),
        (
            "roll back",
            |_, _, own| {
                Box::new(move || {
                    own.as_ref().unwrap().rollback().map(drop).unwrap_err().code().to_owned()
                })
            },
            "view.within_fold",
        ),
        (
            "check itself",
            |_, _, own| {
                Box::new(move || {
                    let checked = own.as_ref().unwrap().check(RebuildOptions::default());
                    checked.unwrap_err().code().to_owned()
                })
            },
            "view.within_fold",
        ),
        (
            "retry",
            |_, _, own| {
                Box::new(move || own.as_ref().unwrap().retry(&0).unwrap_err().code().to_owned())
            },
            "view.within_fold",
        ),
        (
            "append",
            |store, _, _| {
                Box::new(move || {
                    let appended = store.append(&to("meddled", b"")).unwrap();
                    let behind = &appended.receipt().behind;
                    assert!(behind.iter().all(|it| it.code == behind[0].code), "{behind:?}");
                    behind[0].code.to_owned()
                })
            },
            "view.within_fold",
        ),
        ("close", |_, other, _| Box::new(move || format!("{:?}", other.close())), "Ok(())"),
        (
            "close itself",
            |_, _, own| Box::new(move || format!("{:?}", own.as_ref().unwrap().close())),
            "Ok(())",
        ),
        (
            "open another",
            |store, _, _| {
                Box::new(move || {
                    let options = ViewOptions { inline: false, ..inline() };
                    format!("{:?}", store.view_with(Meddler::<3>::default(), options).map(drop))
                })
            },
            "Ok(())",
        ),
    ];
    for by in [By::Appender, By::Follower, By::Builder] {
        for (name, misdeed, expected) in misdeeds {
            let what = format!("{name}, by {by:?}");
            println!("{what}");
            within_patience(what.clone(), move || {
                let dir = tempfile::tempdir().unwrap();
                let store = create(dir.path());
                let other = store.view_with(Counts, inline()).unwrap();
                let meddler = Meddler::<1>::default();
                let (place, outcome) = (meddler.misdeed.clone(), meddler.outcome.clone());
                store.append(&to("a", b"")).unwrap();
                let options = ViewOptions { inline: !matches!(by, By::Follower), ..inline() };
                let own = store.view_with(meddler, options).unwrap();
                own.wait_for_latest(PATIENCE).unwrap();
                *place.lock() = Some(misdeed(store.clone(), other.clone(), Some(own.clone())));
                match by {
                    By::Appender | By::Follower => drop(store.append(&to("a", b"")).unwrap()),
                    By::Builder => drop(own.rebuild(RebuildOptions::default()).unwrap().wait()),
                }
                drop(own.wait_for_latest(PATIENCE));
                assert_eq!(outcome.lock().as_deref(), Some(expected), "{what}");
                drop(place.lock().take());
                drop(store.append(&to("a", b"")).unwrap());
            });
        }
    }
}

/// A reaction isn't waited for by any view: it may do all of that.
#[test]
fn a_reaction_opens_rebuilds_and_closes_an_inline_view() {
    struct Opens(Mutex<Option<Store>>, mpsc::Sender<u64>);

    impl Reactor for Opens {
        const NAME: &'static str = "opens";
        type Event = Vec<u8>;

        fn react(&self, _: &Recorded<Vec<u8>>, _: &IdempotencyKey) -> Result<(), ReactError> {
            let Some(store) = self.0.lock().take() else { return Ok(()) };
            let view = store.view_with(Counts, inline())?;
            store.append(&to("b", b""))?;
            view.rebuild(RebuildOptions::default())?.wait()?;
            let row = view.get("b")?.unwrap_or_default();
            view.close()?;
            self.1.send(row.0).unwrap();
            Ok(())
        }
    }

    within_patience("a reaction".to_owned(), || {
        let dir = tempfile::tempdir().unwrap();
        let store = create(dir.path());
        let (sender, opened) = mpsc::channel();
        let reactor = Opens(Mutex::new(Some(store.clone())), sender);
        let options = ReactorOptions::new(Start::Beginning);
        let reactor = store.react(reactor, options).unwrap();
        store.append(&to("a", b"")).unwrap();
        assert_eq!(opened.recv_timeout(PATIENCE), Ok(1));
        assert!(reactor.wait_reacted(Position::new(2), PATIENCE));
        reactor.close().unwrap();
    });
}
