//! What happens to connections at their edges: while they are strangers, when they end, when another one takes their
//! place, and when the server goes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::retention::{Options, Until};
use headwater::shipping::message::{
    Ack, Authentication, ErrorCode, FEATURE_PROBE, FrameReader, Hello, Message, PROTOCOL_VERSIONS,
    Subscribe,
};
use headwater::shipping::{
    Deadlines, FollowOptions, MirrorStatus, PeerState, PeerStatus, ServeOptions, Server, follow,
    serve,
};
use headwater::{Chain, Checkpoint, JournalOptions, NodeId, Position};

use crate::shipping::{Origin, SOON, small};
use crate::subscriber::{Ended, Subscriber};

/// Nobody is cut off for being quiet.
fn patient() -> ServeOptions {
    let silence = Duration::from_secs(120);
    let deadlines =
        Deadlines { silence, heartbeat: Duration::from_millis(200), ..Deadlines::default() };
    ServeOptions { deadlines, write_stall: silence, ..ServeOptions::default() }
}

struct Served {
    origin: Origin,
    server: Server,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start(events: usize, journal: JournalOptions, options: ServeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::start(dir.path().join("origin"), journal);
        origin.append(0..events);
        let journal = origin.store().journal().clone();
        let server = serve(journal, "127.0.0.1:0", options).unwrap();
        Self { origin, server, _dir: dir }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.server.local_addr()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn end(&self) -> Checkpoint {
        self.origin.store().journal().end()
    }

    /// Waits until the server's peers are as wanted.
    fn peers_until(&self, wanted: impl Fn(&[PeerStatus]) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let peers = self.server.peers();
            if wanted(&peers) {
                return;
            }
            let states: Vec<_> = peers.iter().map(|peer| (peer.state, peer.sent_bytes)).collect();
            assert!(Instant::now() < deadline, "{states:?}");
            std::thread::yield_now();
        }
    }
}

fn encoded(messages: &[Message<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut out));
    out
}

fn hello(features: u64) -> Message<'static> {
    Message::Hello(Hello {
        versions: PROTOCOL_VERSIONS,
        features,
        max_frame: 1 << 20,
        node: None,
        nonce: [1; 16],
        authentication: Authentication::None,
        agent: "test".into(),
    })
}

/// Whether whoever comes now is told that there are too many.
fn is_turned_away(address: SocketAddr) -> bool {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let (mut buffer, mut reader) = ([0; 256], FrameReader::new());
    let Ok(len) = stream.read(&mut buffer) else { return false };
    reader.push(&buffer[..len]);
    let message = reader.next_message();
    matches!(message, Ok(Some(Message::Error(e))) if e.code == ErrorCode::TOO_MANY)
}

/// A mirror that was told that its history is another one may stay and ask. Until it has a subscription, it is one of
/// the strangers, of whom there may be a few only.
#[test]
fn who_may_not_have_the_journal_stays_a_stranger_until_the_connection_is_closed() {
    let options = ServeOptions { handshakes_max: 2, ..patient() };
    let served = Served::start(20, small(), options);
    let other_history = Checkpoint { chain: Chain::from_bytes([7; 16]), ..served.end() };
    let subscribe =
        Message::Subscribe(Subscribe { from: Some(other_history), witness: None, window_bytes: 1 });
    let said = encoded(&[hello(FEATURE_PROBE), subscribe]);
    let mut strangers: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = served.connect();
            stream.write_all(&said).unwrap();
            let (mut buffer, mut reader) = ([0; 4096], FrameReader::new());
            let mut refused = false;
            while !refused {
                let len = stream.read(&mut buffer).unwrap();
                assert!(len > 0, "it may ask on");
                reader.push(&buffer[..len]);
                while let Some(message) = reader.next_message().unwrap() {
                    refused |= matches!(message, Message::Diverged(_));
                }
            }
            stream
        })
        .collect();
    assert!(is_turned_away(served.server.local_addr()), "two strangers are all that there may be");
    strangers.pop();
    served.peers_until(|peers| peers.len() == 1);
    assert!(!is_turned_away(served.server.local_addr()));
}

/// The same of one that was refused, and takes its time to hear why.
#[test]
fn who_has_broken_the_protocol_stays_a_stranger_until_the_connection_is_closed() {
    let options = ServeOptions { handshakes_max: 1, ..patient() };
    let served = Served::start(3, small(), options);
    let mut stranger = served.connect();
    stranger.write_all(&[0; 12]).unwrap();
    served.peers_until(|peers| peers.iter().any(|peer| peer.state == PeerState::Closing));
    // For a second it may read the last word.
    let closing = || served.server.peers().iter().any(|peer| peer.state == PeerState::Closing);
    let turned_away = is_turned_away(served.server.local_addr());
    assert!(turned_away || !closing());
    served.peers_until(<[_]>::is_empty);
    assert!(!is_turned_away(served.server.local_addr()));
}

/// Also one that isn't sent anything, because its window is full.
#[test]
fn a_heartbeat_tells_of_the_durable_end_as_it_is_by_then() {
    let served = Served::start(20, small(), patient());
    let mut stream = served.connect();
    let mut subscriber = Subscriber::new(None, 1);
    stream.write_all(&subscriber.begin()).unwrap();
    let mut buffer = [0; 4096];
    let mut hear_until = |subscriber: &mut Subscriber, offset: u64| {
        let deadline = Instant::now() + SOON;
        while subscriber.told.is_none_or(|told| told < offset) {
            assert!(Instant::now() < deadline, "told of {:?}, it is {offset}", subscriber.told);
            let len = stream.read(&mut buffer).unwrap();
            // It acknowledges nothing.
            drop(subscriber.hear(&buffer[..len]).unwrap());
        }
    };
    hear_until(&mut subscriber, served.end().offset);
    for round in 1..4 {
        served.origin.append(round * 20..round * 20 + 20);
        hear_until(&mut subscriber, served.end().offset);
    }
    assert!(subscriber.end.unwrap().offset < served.end().offset, "its window is full");
}

/// What is said and the end of what is said may arrive together, or one by one.
#[test]
fn the_end_of_a_connection_is_noticed_also_behind_the_last_words() {
    let served = Served::start(20, small(), patient());
    let end = served.end();
    for _ in 0..6 {
        let mut streams: Vec<_> = (0..30)
            .map(|_| {
                let (mut stream, mut subscriber) =
                    (served.connect(), Subscriber::new(None, 1 << 20));
                stream.write_all(&subscriber.begin()).unwrap();
                let mut buffer = [0; 16 << 10];
                while subscriber.end != Some(end) {
                    let len = stream.read(&mut buffer).unwrap();
                    drop(subscriber.hear(&buffer[..len]).unwrap());
                }
                (stream, subscriber)
            })
            .collect();
        for (stream, subscriber) in &mut streams {
            stream.write_all(&subscriber.acknowledge()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        }
        // The sockets are open: only the end of what they say tells.
        served.peers_until(<[_]>::is_empty);
    }
}

#[test]
fn a_connection_that_was_superseded_does_not_take_the_lease_back() {
    let served = Served::start(100, small(), patient());
    let node = Some(NodeId::from_bytes([0xA1; 16]));
    let subscribed = |from: Option<Checkpoint>| {
        let (mut stream, mut subscriber) = (served.connect(), Subscriber::new(node, 1 << 20));
        subscriber.end = from;
        stream.write_all(&subscriber.begin()).unwrap();
        let mut buffer = [0; 4096];
        while subscriber.told.is_none() || subscriber.end != Some(served.end()) {
            let len = stream.read(&mut buffer).unwrap();
            drop(subscriber.hear(&buffer[..len]).unwrap());
        }
        stream
    };
    let end = served.end();
    let mut first = subscribed(None);
    // It gets on, and isn't noted with that before it ends.
    let mut cursor = served.origin.store().journal().cursor(Position::START).unwrap();
    let some = cursor.next_batch().unwrap().unwrap().end();
    first
        .write_all(&encoded(&[Message::Ack(Ack { mirrored: some, applied: None, echo: 0 })]))
        .unwrap();
    served.peers_until(|peers| peers.iter().any(|peer| peer.acked == Some(some)));
    // The mirror has come back, with all that there is, before its last connection was given up.
    let second = subscribed(Some(end));
    drop(first);
    served.peers_until(|peers| peers.len() == 1);
    drop(second);
    served.peers_until(<[_]>::is_empty);
    let Served { origin, server, _dir } = served;
    server.shutdown();
    let options = Options::new(Until::Position(end.position));
    let plan = origin.store().plan_retention(&options).unwrap();
    let needs: Vec<_> = plan.gates.iter().filter_map(|gate| gate.position).collect();
    assert!(needs.contains(&end.position), "{:?}", plan.gates);
    assert!(needs.iter().all(|needed| *needed >= end.position), "{:?}", plan.gates);
}

/// Whoever waits for a turn at the disk is told to go as well.
#[test]
fn a_server_with_a_long_queue_for_its_disk_goes_at_once() {
    let large = JournalOptions {
        batch_bytes_max: 2 << 20,
        group_bytes_max: 2 << 20,
        segment_bytes_first: 16 << 20,
        segment_bytes_max: 16 << 20,
        recent_bytes_max: 0,
        ..JournalOptions::default()
    };
    let options = ServeOptions { handshakes_max: 1000, catch_up_threads: 1, ..patient() };
    let served = Served::start(0, large, options);
    (0..6).for_each(|_| served.origin.append_text(&"x".repeat(1_900_000)));
    let count = 300;
    let streams: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = served.connect();
            stream.write_all(&Subscriber::new(None, u32::MAX).begin()).unwrap();
            stream
        })
        .collect();
    served.peers_until(|peers| {
        let is_behind = |peer: &&PeerStatus| peer.sent.is_some() && !peer.is_live();
        peers.iter().filter(is_behind).count() == count
    });
    let began = Instant::now();
    served.server.shutdown();
    let took = began.elapsed();
    println!("{took:?} with {count} in the queue");
    // A second for those who don't take their goodbye, and the one read that was under way.
    assert!(took < Duration::from_millis(2500), "{took:?}");
    drop(streams);
}

/// A connection that has been told to go hears the last word, and nothing is sent behind it.
#[test]
fn the_last_word_of_a_server_is_goodbye() {
    let served = Served::start(20, small(), patient());
    let (mut stream, mut subscriber) = (served.connect(), Subscriber::new(None, 1 << 20));
    stream.write_all(&subscriber.begin()).unwrap();
    let (end, mut buffer) = (served.end(), [0; 4096]);
    while subscriber.end != Some(end) {
        let len = stream.read(&mut buffer).unwrap();
        drop(subscriber.hear(&buffer[..len]).unwrap());
    }
    served.server.shutdown();
    let mut ended = None;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                assert_eq!(ended, None, "something is said behind the last word");
                ended = subscriber.hear(&buffer[..len]).err();
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(ended, Some(Ended::GoAway));
}

/// What is set is added to the clock's time, and the sum has to be one. `Duration::MAX` for "never" is the first idea, and
/// the first peer that took nothing ended the thread that sent to it, or the loop itself: nobody was served any more.
#[test]
fn times_that_are_set_to_never_are_within_what_a_clock_can_tell() {
    let options = ServeOptions {
        write_stall: Duration::MAX,
        flush_intervals: vec![(0, Duration::MAX)],
        catch_up_threads: 1,
        ..patient()
    };
    let served = Served::start(0, JournalOptions::default(), options);
    // More than sockets take.
    (0..40).for_each(|_| served.origin.append_text(&"x".repeat(512 << 10)));
    let mut stuck = served.connect();
    let subscribe = Subscribe { from: None, witness: None, window_bytes: u32::MAX };
    stuck.write_all(&encoded(&[hello(0), Message::Subscribe(subscribe)])).unwrap();
    served.peers_until(|peers| peers.iter().any(|peer| peer.state == PeerState::Stalled));
    let dir = tempfile::tempdir().unwrap();
    let follows = |name: &str| {
        let (dir, to) = (dir.path().join(name), served.server.local_addr().to_string());
        let mirror = follow(Arc::new(OsFs), &dir, to, FollowOptions::default()).unwrap();
        assert!(mirror.wait_until(SOON, MirrorStatus::is_live).is_ok(), "{:?}", mirror.status());
        mirror
    };
    let live = follows("live");
    // It is to be sent to it, in a day.
    served.origin.append_text("more");
    let next = follows("next");
    assert_eq!(next.journal().unwrap().end(), served.end());
    drop((live, next));
}

/// It had to say something within five seconds, and any byte was something: one every four seconds of a frame that was
/// never whole kept it among the strangers for 18 hours, and with 64 of them nobody else was let in.
#[test]
fn who_was_told_that_histories_differ_has_to_ask_in_time_and_a_byte_is_no_question() {
    let deadlines = Deadlines { silence: Duration::from_secs(1), ..patient().deadlines };
    let served = Served::start(20, small(), ServeOptions { deadlines, ..patient() });
    let other_history = Checkpoint { chain: Chain::from_bytes([7; 16]), ..served.end() };
    let subscribe = Subscribe { from: Some(other_history), witness: None, window_bytes: 1 };
    let mut stream = served.connect();
    stream.write_all(&encoded(&[hello(FEATURE_PROBE), Message::Subscribe(subscribe)])).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let (mut buffer, mut reader) = ([0; 4096], FrameReader::new());
    let (mut told_at, mut ended) = (None, None);
    // The beginning of a frame of 4,096 bytes that needn't be understood; then a byte at a time.
    let mut said = [0, 0x10, 0, 0, 0x9A, 1, 0, 0, 0, 0, 0, 0].into_iter();
    while ended.is_none() {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => reader.push(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        while let Some(message) = reader.next_message().unwrap() {
            match message {
                Message::Diverged(_) => told_at = Some(Instant::now()),
                Message::Error(failure) => ended = Some(failure.code),
                _ => {}
            }
        }
        if let Some(told_at) = told_at {
            assert!(told_at.elapsed() < SOON, "it may stay as long as it likes");
            drop(stream.write_all(&[said.next().unwrap_or(0)]));
        }
    }
    assert_eq!(ended, Some(ErrorCode::TIMEOUT));
    assert!(told_at.unwrap().elapsed() >= Duration::from_millis(900), "it may ask for a while");
}
