//! S7: a lagging, stalled or hostile subscriber costs bounded memory and no more disk than its cap.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use headwater::retention::{History, Options, Until};
use headwater::shipping::message::{
    Authentication, ErrorCode, FEATURE_FILTERED, FeedRequest, FeedTerms, FrameReader, Hello,
    Message, PROTOCOL_VERSIONS, Subscribe,
};
use headwater::shipping::{Deadlines, FeedFilter, FeedPart, ServeOptions, serve};
use headwater::{JournalOptions, Position};

use crate::memory::held_bytes;
use crate::shipping::{Origin, SOON, converged, small, start_mirror};
use crate::subscriber::Subscriber;

fn patient() -> ServeOptions {
    let silence = Duration::from_secs(120);
    let deadlines = Deadlines { silence, ..Deadlines::default() };
    ServeOptions { deadlines, write_stall: silence, ..ServeOptions::default() }
}

fn subscribe(address: SocketAddr, window_bytes: u32) -> TcpStream {
    connect(address, &Subscriber::new(None, window_bytes).begin())
}

fn connect(address: SocketAddr, first: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(first).unwrap();
    stream
}

/// Wants a feed, each another one, with as many names as there may be.
#[cfg(target_os = "linux")]
fn subscribe_to_feed(address: SocketAddr, number: usize) -> TcpStream {
    let name = |n: u32| char::from_u32(0x21 + n).unwrap().to_string();
    let part = |n: u32| FeedPart::types((n..n + 40).map(name));
    let own = FeedPart::types(["test.happened".to_owned(), format!("x{number}")]);
    let filter = FeedFilter::any_of((0..15).map(part).chain([own]));
    filter.check().unwrap();
    let mut out = Vec::new();
    Message::Hello(Hello {
        versions: PROTOCOL_VERSIONS,
        features: FEATURE_FILTERED,
        max_frame: 1 << 20,
        node: None,
        nonce: [7; 16],
        authentication: Authentication::None,
        agent: "headwater/test".into(),
    })
    .encode(&mut out);
    let subscribe = Subscribe { from: None, witness: None, window_bytes: u32::MAX };
    let terms = FeedTerms { filter, shape: None };
    let request = FeedRequest { terms, goes_on: false };
    Message::SubscribeFeed(subscribe, request).encode(&mut out);
    connect(address, &out)
}

const ALONE: &str = "HEADWATER_TEST_LIMITS_ALONE";

/// In a process of its own, where nobody else takes memory.
#[cfg(target_os = "linux")]
#[test]
fn process_with_many_stalled_subscribers() {
    let Ok(what) = std::env::var(ALONE) else { return };
    let are_feeds = what == "feeds";
    let dir = tempfile::tempdir().unwrap();
    let large = JournalOptions {
        batch_bytes_max: 1 << 20,
        group_bytes_max: 1 << 20,
        segment_bytes_first: 16 << 20,
        segment_bytes_max: 16 << 20,
        recent_bytes_max: 1 << 20,
        ..JournalOptions::default()
    };
    let origin = Origin::start(dir.path().join("origin"), large);
    // More than sockets hold: to mirrors, in batches longer than a frame.
    let (count, bytes) = if are_feeds { (600, 30_000) } else { (20, 900_000) };
    (0..count).for_each(|_| origin.append_text(&"x".repeat(bytes)));
    let options = ServeOptions { handshakes_max: 1000, ..patient() };
    let server = serve(origin.store().journal().clone(), "127.0.0.1:0", options).unwrap();
    let stalled = |numbers: std::ops::Range<usize>| {
        let address = server.local_addr();
        let connect = |n| match are_feeds {
            true => subscribe_to_feed(address, n),
            false => subscribe(address, u32::MAX),
        };
        let streams: Vec<_> = numbers.map(connect).collect();
        // As much of a frame as there may be, and never the rest of it.
        for mut stream in &streams {
            let beginning = [&4096_u32.to_le_bytes()[..], &[0x80, 1, 0, 0], &[0; 4000]].concat();
            stream.write_all(&beginning).unwrap();
        }
        streams
    };
    let blocked = |count: usize| {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = (0, Instant::now());
        loop {
            let peers = server.peers();
            let behind = peers.iter().filter(|peer| peer.sent.is_some() && !peer.is_live());
            let sent = peers.iter().map(|peer| peer.sent_bytes).sum::<u64>();
            if sent != last.0 {
                last = (sent, Instant::now());
            }
            // Nobody has been sent anything for a while: all of them are blocked.
            if behind.count() == count && last.1.elapsed() > Duration::from_millis(500) {
                return;
            }
            assert!(Instant::now() < deadline, "{peers:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // 64 KiB each, and what all of them together may take, whoever they are: 16 MiB of batches that were begun, and one
    // more in the hands of each of two threads; of feeds, also runs that others may want.
    let shared_max = (16 << 20) + (3 << 20);
    let alone = held_bytes();
    let (mut streams, mut held) = (Vec::new(), alone);
    // The last of them come when all that is shared is in use, so that what they add is theirs.
    for count in [30, 60, 60] {
        streams.extend(stalled(streams.len()..streams.len() + count));
        blocked(streams.len());
        let before = std::mem::replace(&mut held, held_bytes());
        let together = held.saturating_sub(alone + streams.len() * (64 << 10));
        println!("{together} bytes for all {} that catch up together", streams.len());
        assert!(together < shared_max, "{together}");
        if count < streams.len() - count {
            let each = held.saturating_sub(before) / count;
            println!("{each} bytes for each of {count} stalled subscribers");
            assert!(each < 64 << 10, "{each}");
        }
    }
    // What is committed meanwhile is no more than what others are sent, too.
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
    drop(streams);
}

#[cfg(target_os = "linux")]
#[test]
fn s7_a_stalled_subscriber_costs_less_than_64_kib() {
    costs_little("mirrors");
}

/// Whatever its filter is.
#[cfg(target_os = "linux")]
#[test]
fn s7_a_stalled_subscriber_of_a_feed_costs_less_than_64_kib() {
    costs_little("feeds");
}

#[cfg(target_os = "linux")]
fn costs_little(what: &str) {
    let name = "promises::limits::process_with_many_stalled_subscribers";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(ALONE, what)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("stalled subscribers"));
}

/// One that is connected and acknowledges nothing holds back what it needs, up to the cap; then it is told.
#[test]
fn s7_a_stalled_subscriber_holds_back_no_more_of_the_disk_than_its_cap() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let server = serve(origin.store().journal().clone(), "127.0.0.1:0", patient()).unwrap();
    let mut stalled = subscribe(server.local_addr(), 2000);
    let deadline = Instant::now() + SOON;
    while !server.peers().iter().any(|peer| peer.acked.is_some() && peer.sent_bytes > 0) {
        assert!(Instant::now() < deadline, "{:?}", server.peers());
        std::thread::yield_now();
    }
    origin.append(10..400);
    let end = origin.store().journal().end();
    let until_now = Options::new(Until::Position(end.position));
    let plan = origin.store().plan_retention(&until_now).unwrap();
    assert!(plan.removals.is_empty(), "it still needs everything: {plan:?}");
    let cap = 64 << 10;
    let capped = Options { lease_bytes_max: cap, ..until_now };
    let plan = origin.store().plan_retention(&capped).unwrap();
    let (target, passed_over) = (plan.target, plan.gates.iter().any(|gate| gate.passed_over));
    assert!(passed_over && target > Position::START, "{plan:?}");
    origin.store().retain(&capped.history(History::Forget(target))).unwrap();
    let kept: u64 = origin.store().journal().segments().iter().map(bytes_of).sum();
    assert!(kept <= cap + 16 * 1024, "{kept} bytes are held back, with a cap of {cap}");
    // It goes on with what it was sent, and is told what it can't have any more.
    let mut subscriber = Subscriber::new(None, u32::MAX);
    drop(subscriber.begin());
    let (mut buffer, mut told) = ([0; 4096], None);
    while told.is_none() {
        let len = stalled.read(&mut buffer).unwrap();
        assert!(len > 0, "closed without a word");
        match subscriber.hear(&buffer[..len]) {
            Ok(said) => stalled.write_all(&said).unwrap(),
            Err(ended) => told = Some(ended),
        }
    }
    assert_eq!(told, Some(crate::subscriber::Ended::Told(ErrorCode::TRUNCATED)));
}

fn bytes_of(segment: &headwater::SegmentInfo) -> u64 {
    4096 + segment.end_offset - segment.base_offset
}

/// Lengths that are claimed, frames without an end, requests without an answer: nothing is kept for them.
#[test]
fn s7_what_is_only_claimed_is_never_allocated_and_the_rest_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let header = |len: u32, kind: u8, flags: u8| {
        let front = [&len.to_le_bytes()[..], &[kind, flags, 0, 0]].concat();
        let crc = crc32fast::hash(&[&front[..], &[0; 32]].concat());
        [front, crc.to_le_bytes().to_vec()].concat()
    };
    let begin = Subscriber::new(None, 1 << 20).begin();
    for (what, said) in [
        ("4 GiB of HELLO", header(u32::MAX, 0x01, 0)),
        ("4 GiB that may be passed over", header(u32::MAX, 0x80, 1)),
        ("4 GiB of DATA before WELCOME", header(u32::MAX, 0x10, 0)),
        ("DATA to an origin", [begin.clone(), header(u32::MAX, 0x10, 2)].concat()),
        ("a control frame of 1 MiB", [begin, header(1 << 20, 0x17, 0)].concat()),
    ] {
        let mut stream = TcpStream::connect(origin.address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(&said).unwrap();
        let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
        reader.allow_data(1 << 20);
        let code = loop {
            let len = stream.read(&mut buffer).unwrap();
            assert!(len > 0, "{what}: closed without a word");
            reader.push(&buffer[..len]);
            let mut code = None;
            while let Some(message) = reader.next_message().unwrap() {
                if let Message::Error(failure) = message {
                    code = Some(failure.code);
                }
            }
            if let Some(code) = code {
                break code;
            }
        };
        assert_eq!(code, ErrorCode::FRAME_TOO_LONG, "{what}");
    }
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    converged(&mirror, &origin);
}
