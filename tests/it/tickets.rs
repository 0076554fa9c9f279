//! Appends that nobody waits for at once: tickets, and buffered appends.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use headwater::fs::sim::{Fault, Repeat, SimFs};
use headwater::{
    Append, AppendError, Appended, Durability, ExpectedRevision, JournalOptions, NewEvent,
    Position, Revision, Store, StreamId, Token,
};

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

fn one(name: &str, value: u32) -> Append {
    let event = NewEvent::raw("counted", value.to_le_bytes()).unwrap();
    Append::to(&stream(name), ExpectedRevision::Any, [event])
}

fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 16 * 1024,
        segment_bytes_max: 16 * 1024,
        batch_bytes_max: 8 * 1024,
        group_bytes_max: 8 * 1024,
        ..JournalOptions::default()
    }
}

fn sim(options: JournalOptions) -> (SimFs, Store) {
    let fs = SimFs::new(7);
    let store = Store::builder("/store")
        .fs(Arc::new(fs.clone()))
        .journal_options(options)
        .create_if_missing()
        .open()
        .unwrap();
    (fs, store)
}

#[test]
fn thousands_of_tickets_of_one_thread_are_durable_in_order_across_rolls() {
    let dir = tempfile::tempdir().unwrap();
    let builder = Store::builder(dir.path()).journal_options(small()).create_if_missing();
    let store = builder.open().unwrap();
    let tickets: Vec<_> = (0..5000).map(|n| store.submit(&one("s", n)).unwrap()).collect();
    for (n, ticket) in (0_u64..).zip(tickets) {
        let Appended::New(receipt) = ticket.wait().unwrap() else { panic!("a duplicate") };
        assert_eq!(receipt.token.position, Position::new(n + 1));
        assert_eq!(receipt.events.first().unwrap().revision, Revision::new(n));
        assert!(
            store.journal().end().position > Position::new(n),
            "answered before it was durable"
        );
    }
    let values: Vec<_> = store.read_all(Position::START).unwrap().map(Result::unwrap).collect();
    assert_eq!(values.len(), 5000);
    assert!(store.journal().segments().len() > 10);
    store.close().unwrap();
}

#[test]
fn dropped_tickets_are_committed_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    (0..100).for_each(|n| drop(store.submit(&one("s", n)).unwrap()));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.journal().end().position, Position::new(100));
}

#[derive(Default)]
struct Woken {
    thread: parking::Parker,
    count: AtomicUsize,
}

/// A runtime of one thread, which sleeps until it is woken.
mod parking {
    use std::sync::{Condvar, Mutex};

    #[derive(Default)]
    pub(super) struct Parker(Mutex<bool>, Condvar);

    impl Parker {
        pub(super) fn park(&self) {
            let mut woken = self.0.lock().unwrap();
            while !std::mem::take(&mut *woken) {
                woken = self.1.wait(woken).unwrap();
            }
        }

        pub(super) fn unpark(&self) {
            *self.0.lock().unwrap() = true;
            self.1.notify_one();
        }
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.thread.unpark();
    }
}

#[test]
fn a_ticket_is_a_future_that_needs_no_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    for n in 0..200_u64 {
        let mut ticket = pin!(store.submit(&one("s", n as u32)).unwrap());
        let appended = loop {
            match ticket.as_mut().poll(&mut context) {
                Poll::Ready(answer) => break answer.unwrap(),
                Poll::Pending => woken.thread.park(),
            }
        };
        assert_eq!(appended.token().position, Position::new(n + 1));
    }
}

#[test]
fn a_duplicate_of_what_is_under_way_gets_the_first_result() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    for n in 0..200 {
        let append = one("s", n);
        let first = store.submit(&append).unwrap();
        let again = store.submit(&append).unwrap().wait().unwrap();
        let first = first.wait().unwrap();
        assert!(matches!(first, Appended::New(_)), "{first:?}");
        assert!(matches!(again, Appended::Duplicate(_)), "{again:?}");
        assert_eq!(first.receipt().events, again.receipt().events);
    }
    assert_eq!(store.journal().end().position, Position::new(200));
}

#[test]
fn a_buffered_token_says_what_it_is_and_flush_makes_it_durable() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path()).unwrap();
    let mut last = None;
    for n in 0..1000 {
        last = Some(store.append(&one("s", n).durability(Durability::Buffered)).unwrap().token());
    }
    let token = last.unwrap();
    assert_eq!(token.durability, Durability::Buffered);
    assert_eq!(token.to_string().parse::<Token>(), Ok(token));
    assert!(store.flush().unwrap().position >= token.position);
    // One that waits stands behind everything that was buffered.
    store.append(&one("s", 1).durability(Durability::Buffered)).unwrap();
    let durable = store.append(&one("s", 2)).unwrap().token();
    assert_eq!(durable.durability, Durability::Durable);
    assert_eq!(store.journal().end().position, durable.position);
}

#[test]
fn more_than_may_be_buffered_waits_for_the_disk() {
    let options = JournalOptions { buffered_bytes_max: 2048, ..JournalOptions::default() };
    let dir = tempfile::tempdir().unwrap();
    let builder = Store::builder(dir.path()).journal_options(options).create_if_missing();
    let store = builder.open().unwrap();
    let batch_bytes = 256;
    for n in 0..2000_u64 {
        store.append(&one("s", n as u32).durability(Durability::Buffered)).unwrap();
        let behind = (n + 1) - store.journal().end().position.get();
        assert!(behind * batch_bytes <= 2048, "{behind} events are unsynced");
    }
}

#[test]
fn what_was_buffered_and_is_lost_is_told_by_a_sticky_error_with_its_range() {
    let (fs, store) = sim(JournalOptions { background_thread: false, ..small() });
    let durable = store.append(&one("s", 0)).unwrap().token().position;
    fs.fail_at(fs.ops() + 1, Fault::Eio, Repeat::Forever);
    let mut answered = durable;
    let poison = loop {
        match store.append(&one("s", 1).durability(Durability::Buffered)) {
            Ok(appended) => answered = appended.token().position,
            Err(AppendError::Poisoned(poison)) => break poison,
            Err(other) => panic!("{other:?}"),
        }
    };
    let lost = poison.lost().expect("something was answered before it was durable");
    assert_eq!((lost.start, lost.end), (durable, answered));
    assert_eq!(store.journal().end().position, durable, "shown before it was durable");
    let again = store.append(&one("s", 2)).unwrap_err();
    let AppendError::Poisoned(again) = again else { panic!("{again:?}") };
    assert_eq!(again.lost(), poison.lost());
    assert!(again.to_string().contains("buffered"), "{again}");
    assert!(store.close().is_err());
    drop(store);
    fs.clear_faults();
    fs.power_cut();
    let store = Store::builder(Path::new("/store")).fs(Arc::new(fs)).open().unwrap();
    assert!(store.journal().end().position >= durable);
}

#[test]
fn every_ticket_is_answered_when_the_disk_fails() {
    for operation in 1..60 {
        let (fs, store) = sim(JournalOptions { background_thread: false, ..small() });
        fs.fail_at(fs.ops() + operation, Fault::Eio, Repeat::Forever);
        let tickets: Vec<_> = (0..200).map_while(|n| store.submit(&one("s", n)).ok()).collect();
        let mut failed = false;
        for ticket in tickets {
            let answer = ticket.wait();
            assert!(!(failed && answer.is_ok()), "operation {operation}: later events are durable");
            failed |= answer.is_err();
        }
    }
}
