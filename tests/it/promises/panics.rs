//! A panic in the middle of the work costs what it was about, and everybody who waits for that learns it. The disk panics
//! here, as nothing else does that a test can set.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use headwater::fs::sim::{Op, SimFs};
use headwater::shipping::message::{
    Authentication, ErrorCode, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
};
use headwater::shipping::{
    FeedFilter, FollowOptions, MirrorState, ServeOptions, Server, WaitError, follow, follow_feed,
    serve,
};
use headwater::{Append, ExpectedRevision, JournalOptions, NewEvent, Store, StreamId};

use super::{impatient, impatient_follower};
use crate::options;
use crate::races::Hooked;
use crate::shipping::{SOON, small};

/// How many panics there are still to be.
type Panics = Arc<AtomicUsize>;

/// A disk that panics in the hands of these threads.
fn disk(threads: &'static [&'static str], op: Op) -> (Arc<Hooked>, Panics) {
    let panics = Panics::default();
    let left = Arc::clone(&panics);
    let disk = Hooked::new(&SimFs::new(1), move |found, _: &Path| {
        let thread = std::thread::current();
        let is_theirs = thread.name().is_some_and(|name| threads.contains(&name));
        let one_less = |left: usize| left.checked_sub(1);
        if found == op
            && is_theirs
            && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok()
        {
            panic!("planted: {op:?}");
        }
        Ok(())
    });
    (Arc::new(disk), panics)
}

fn append(origin: &Store) {
    let event = NewEvent::raw("test.happened", vec![7; 300]).unwrap();
    let to = StreamId::new("s").unwrap();
    origin.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
}

fn serve_impatiently(origin: &Store) -> Server {
    let options = ServeOptions { deadlines: impatient(), ..ServeOptions::default() };
    serve(origin.journal().clone(), "127.0.0.1:0", options).unwrap()
}

fn until_nobody_is_there(server: &Server) {
    let deadline = Instant::now() + SOON;
    while !server.peers().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", server.peers());
        std::thread::yield_now();
    }
}

/// Subscribes to everything, and listens until it is told of an error or left alone.
fn error_of_subscriber(address: SocketAddr) -> Option<ErrorCode> {
    let mut said = Vec::new();
    Message::Hello(Hello {
        versions: PROTOCOL_VERSIONS,
        features: 0,
        max_frame: 1 << 20,
        node: None,
        nonce: [1; 16],
        authentication: Authentication::None,
        agent: "test".into(),
    })
    .encode(&mut said);
    let subscribe = Subscribe { from: None, witness: None, window_bytes: 1 << 20 };
    Message::Subscribe(subscribe).encode(&mut said);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&said).unwrap();
    let (mut buffer, mut reader) = ([0; 4096], FrameReader::new());
    loop {
        let len = stream.read(&mut buffer).expect("nobody says anything any more");
        if len == 0 {
            return None;
        }
        reader.push(&buffer[..len]);
        while let Some(message) = reader.next_message().unwrap() {
            if let Message::Error(failure) = message {
                return Some(failure.code);
            }
        }
    }
}

/// The first panic of a catch-up thread ended the thread, and left a connection of which nobody knew any more: it had no
/// deadline, and held its place and its lease for ever. After the second one no thread was left, and whoever subscribed
/// waited for ever.
#[test]
fn a_panic_while_somebody_catches_up_costs_that_connection_alone() {
    let (disk, panics) = disk(&["headwater-catchup"], Op::Read);
    let journal = JournalOptions { recent_bytes_max: 0, ..options() };
    let origin = Store::builder("/origin").create_if_missing().journal_options(journal);
    let origin = origin.fs(disk).open().unwrap();
    (0..20).for_each(|_| append(&origin));
    let serving = ServeOptions { catch_up_threads: 2, ..ServeOptions::default() };
    let server = serve(origin.journal().clone(), "127.0.0.1:0", serving).unwrap();
    for _ in 0..5 {
        panics.store(1, Ordering::SeqCst);
        let error = error_of_subscriber(server.local_addr());
        assert_eq!((error, panics.load(Ordering::SeqCst)), (Some(ErrorCode::STORAGE), 0));
    }
    until_nobody_is_there(&server);
    let following = FollowOptions { journal: small(), ..impatient_follower() };
    let to = server.local_addr().to_string();
    let mirror = follow(Arc::new(SimFs::new(2)), Path::new("/mirror"), to, following).unwrap();
    assert_eq!(mirror.wait_caught_up(SOON).unwrap(), origin.journal().end());
}

/// A feed whose writer panicked listened on: it acknowledged nothing new and wrote nothing, was connected and looked well,
/// and whoever waited for it without a limit waited for ever.
#[test]
fn a_feed_that_panics_is_stopped_and_everybody_learns_it() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Store::create(dir.path().join("origin")).unwrap();
    let server = serve_impatiently(&origin);
    append(&origin);
    // While it is made, once its origin has granted it: what comes later is written by the journal's own threads.
    let (disk, panics) = disk(&["headwater-feed"], Op::Create);
    panics.store(1, Ordering::SeqCst);
    let (to, wanted) = (server.local_addr().to_string(), FeedFilter::everything());
    let feed = follow_feed(disk, Path::new("/feed"), to, wanted, impatient_follower()).unwrap();
    let stopped = feed.wait_until(SOON, |it| matches!(it.state, MirrorState::Stopped));
    assert!(stopped.is_ok(), "{:?}", feed.status());
    assert_eq!(panics.load(Ordering::SeqCst), 0);
    let waited = feed.wait_caught_up(Duration::MAX);
    assert!(matches!(waited, Err(WaitError::Stopped)), "{waited:?}");
    until_nobody_is_there(&server);
    let stopped = AssertUnwindSafe(|| feed.stop());
    assert!(catch_unwind(stopped).is_err(), "nobody is told of the panic");
}

/// The same of a mirror: it was gone, and looked as if it was live.
#[test]
fn a_mirror_that_panics_is_stopped_and_everybody_learns_it() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Store::create(dir.path().join("origin")).unwrap();
    let server = serve_impatiently(&origin);
    append(&origin);
    let (disk, panics) = disk(&["headwater-mirror", "headwater-listen"], Op::SyncData);
    let following = FollowOptions { journal: small(), ..impatient_follower() };
    let to = server.local_addr().to_string();
    let mirror = follow(disk, Path::new("/mirror"), to, following).unwrap();
    mirror.wait_caught_up(SOON).unwrap();
    panics.store(1, Ordering::SeqCst);
    append(&origin);
    let stopped = mirror.wait_until(SOON, |it| matches!(it.state, MirrorState::Stopped));
    assert!(stopped.is_ok(), "{:?}", mirror.status());
    let waited = mirror.wait_caught_up(Duration::MAX);
    assert!(matches!(waited, Err(WaitError::Stopped)), "{waited:?}");
    until_nobody_is_there(&server);
    let stopped = AssertUnwindSafe(|| mirror.stop());
    assert!(catch_unwind(stopped).is_err(), "nobody is told of the panic");
}
