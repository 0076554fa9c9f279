//! The event loop from outside: many subscribers, hostile ones, slow ones. They speak the protocol without a disk,
//! from `docs/protocol.md`: what they got is compared with the journal, byte for byte.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use headwater::shipping::message::{
    Ack, Authentication, ErrorCode, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
};
use headwater::shipping::{Deadlines, PeerStatus, ServeOptions, Server, serve};
use headwater::{
    Append, Checkpoint, ExpectedRevision, Journal, JournalOptions, NewEvent, Position, Store,
    StreamId,
};

use crate::descriptors::may_open;
use crate::stalls;

const SOON: Duration = Duration::from_secs(30);

fn small() -> JournalOptions {
    JournalOptions {
        segment_bytes_first: 64 * 1024,
        segment_bytes_max: 64 * 1024,
        batch_bytes_max: 32 * 1024,
        group_bytes_max: 32 * 1024,
        ..JournalOptions::default()
    }
}

/// Nobody is cut off for being quiet.
fn patient() -> ServeOptions {
    let deadlines = Deadlines { silence: Duration::from_secs(120), ..Deadlines::default() };
    ServeOptions { deadlines, ..ServeOptions::default() }
}

struct Origin {
    store: Store,
    server: Server,
    _dir: tempfile::TempDir,
}

impl Origin {
    fn start(journal: JournalOptions, options: ServeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = Store::builder(dir.path().join("origin")).create_if_missing();
        let store = builder.journal_options(journal).open().unwrap();
        let server = serve(store.journal().clone(), "127.0.0.1:0", options).unwrap();
        Self { store, server, _dir: dir }
    }

    fn address(&self) -> SocketAddr {
        self.server.local_addr()
    }

    fn append(&self, payload_bytes: usize) {
        let to = StreamId::new("s").unwrap();
        let event = NewEvent::raw("test.happened", vec![b'x'; payload_bytes]).unwrap();
        self.store.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
    }

    fn end(&self) -> Checkpoint {
        self.store.journal().end()
    }

    /// Waits until the server's peers are as wanted.
    fn peers_until(&self, wanted: impl Fn(&[PeerStatus]) -> bool) -> Vec<PeerStatus> {
        let deadline = Instant::now() + SOON;
        loop {
            let peers = self.server.peers();
            if wanted(&peers) {
                return peers;
            }
            assert!(Instant::now() < deadline, "{peers:?}");
            std::thread::yield_now();
        }
    }
}

/// How many were sent everything. They acknowledge nothing here, so that it depends on the machine's speed whether they
/// are live or already stalled.
fn sent_up_to(peers: &[PeerStatus], end: &Checkpoint) -> usize {
    peers.iter().filter(|peer| peer.sent == Some(*end)).count()
}

/// All batches, and the checkpoints at their ends by offset.
fn contents(journal: &Journal) -> (Vec<u8>, HashMap<u64, Checkpoint>) {
    let (mut bytes, mut ends) = (Vec::new(), HashMap::new());
    let mut cursor = journal.cursor(Position::START).unwrap();
    while let Some(batch) = cursor.next_batch().unwrap() {
        bytes.extend_from_slice(batch.batch.bytes());
        ends.insert(batch.end().offset, batch.end());
    }
    (bytes, ends)
}

fn hello() -> Vec<u8> {
    let (nonce, agent) = ([1; 16], "test".to_owned());
    let versions = PROTOCOL_VERSIONS;
    frame(&Message::Hello(Hello {
        versions,
        features: 0,
        max_frame: 1 << 20,
        node: None,
        nonce,
        authentication: Authentication::None,
        agent,
    }))
}

fn frame(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn subscribe(window_bytes: u32) -> Vec<u8> {
    frame(&Message::Subscribe(Subscribe { from: None, witness: None, window_bytes }))
}

/// A subscriber that keeps what it gets in memory.
struct Client {
    stream: TcpStream,
    reader: FrameReader,
    bytes: Vec<u8>,
    granted: Option<Checkpoint>,
    /// The end of the origin as last told.
    told: u64,
    /// The number that came back last, and the end that came with it.
    echo: (u64, u64),
    acked: u64,
    error: Option<ErrorCode>,
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut reader = FrameReader::new();
        reader.allow_data(1 << 20);
        let (bytes, granted, error) = (Vec::new(), None, None);
        Self { stream, reader, bytes, granted, told: 0, echo: (0, 0), acked: 0, error }
    }

    fn subscribed(address: SocketAddr, window_bytes: u32) -> Self {
        let mut client = Self::connect(address);
        client.say(&[hello(), subscribe(window_bytes)].concat());
        client.hear_until(|client| client.granted.is_some());
        client
    }

    fn acknowledge(&mut self, mirrored: Checkpoint) {
        self.acked = mirrored.offset;
        self.say(&frame(&Message::Ack(Ack { mirrored, applied: None, echo: 0 })));
    }

    fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Whether the connection is still there.
    fn hear(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        let Ok(len @ 1..) = self.stream.read(&mut buffer) else { return false };
        self.reader.push(&buffer[..len]);
        while let Some(message) = self.reader.next_message().unwrap() {
            match message {
                Message::Subscribed(subscribed) => self.granted = Some(subscribed.end),
                Message::Heartbeat(heartbeat) => {
                    assert!(heartbeat.end.offset >= self.told, "an end that goes back");
                    self.told = heartbeat.end.offset;
                    self.echo = (heartbeat.echo, self.told);
                }
                Message::Data(data) => {
                    assert_eq!(data.offset, self.bytes.len() as u64, "a gap, or twice");
                    assert!(data.origin_end.offset >= self.told, "an end that goes back");
                    self.told = data.origin_end.offset;
                    self.bytes.extend_from_slice(data.bytes);
                    assert!(data.continued || self.told >= self.bytes.len() as u64);
                }
                Message::Error(failure) => self.error = Some(failure.code),
                _ => {}
            }
        }
        true
    }

    fn hear_until(&mut self, wanted: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !wanted(self) {
            assert!(self.hear(), "cut off: {:?}", self.error);
            assert!(Instant::now() < deadline, "at {}", self.bytes.len());
        }
    }

    fn hear_up_to(&mut self, end: &Checkpoint) {
        self.hear_until(|client| client.bytes.len() as u64 >= end.offset);
        assert_eq!(self.bytes.len() as u64, end.offset);
    }

    /// Why the server has ended it.
    fn end(mut self) -> Option<ErrorCode> {
        let deadline = Instant::now() + SOON;
        while self.hear() {
            assert!(Instant::now() < deadline, "it is still served");
        }
        self.error
    }
}

#[test]
fn subscribers_by_the_hundred_get_the_same_and_end_equal() {
    if !may_open(2 * 500 + 2000) {
        return;
    }
    let origin = Origin::start(small(), ServeOptions { handshakes_max: 1000, ..patient() });
    (0..20).for_each(|n| origin.append(n * 300));
    let mut clients: Vec<_> =
        (0..500).map(|_| Client::subscribed(origin.address(), u32::MAX)).collect();
    origin.peers_until(|peers| sent_up_to(peers, &origin.end()) == 500);
    for n in 0..60 {
        origin.append(n * 37 % 900);
    }
    let (end, (bytes, _)) = (origin.end(), contents(origin.store.journal()));
    for client in &mut clients {
        client.hear_up_to(&end);
        assert!(client.bytes == bytes);
    }
    for peer in origin.server.peers() {
        assert_eq!(peer.sent, Some(end));
        assert!(peer.sent_bytes > bytes.len() as u64);
        assert_eq!(peer.acked.map(|it| it.offset), Some(0), "nothing was acknowledged");
    }
}

/// With hardly anything in memory they fall behind again and again, and come back; with small windows they stop in
/// between.
#[test]
fn s1_between_memory_and_disk_nothing_is_left_out_or_sent_twice() {
    for (recent_bytes_max, window_bytes) in [(0, 5000), (3000, 40_000), (30_000, 1 << 20)] {
        let journal = JournalOptions { recent_bytes_max, ..small() };
        let origin = Origin::start(journal, patient());
        let count = 400;
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..4)
                .map(|_| {
                    let origin = &origin;
                    scope.spawn(move || follow_slowly(origin, window_bytes, count))
                })
                .collect();
            for n in 0..count {
                origin.append(n * 7919 % 6000);
            }
            for client in clients {
                assert!(client.join().unwrap() == contents(origin.store.journal()).0);
            }
        });
    }
}

/// Acknowledges what it has whole, and only then hears more.
fn follow_slowly(origin: &Origin, window_bytes: u32, count: usize) -> Vec<u8> {
    let mut client = Client::subscribed(origin.address(), window_bytes);
    let mut cursor = origin.store.journal().cursor(Position::START).unwrap();
    while (cursor.position().get() as usize) < count {
        let before = client.acked;
        while client.acked < client.bytes.len() as u64 {
            // Batches are shorter than frames here: what it has is whole.
            let mirrored = cursor.next_batch().unwrap().unwrap().end();
            client.acknowledge(mirrored);
        }
        if client.acked == before {
            client.hear_until(|client| client.bytes.len() as u64 > client.acked);
        }
    }
    client.bytes
}

/// What is committed is collected for a minute; whoever asks how far that is isn't told what the loop knew before.
#[test]
fn whoever_asks_for_the_durable_end_is_told_the_one_that_there_is() {
    let flush_intervals = vec![(0, Duration::from_secs(60))];
    let origin = Origin::start(small(), ServeOptions { flush_intervals, ..patient() });
    origin.append(100);
    let mut client = Client::subscribed(origin.address(), 1 << 20);
    client.hear_up_to(&origin.end());
    for echo in 1..20 {
        let mirrored = client.granted.unwrap();
        client.say(&frame(&Message::Ack(Ack { mirrored, applied: None, echo })));
        client.hear_until(|client| client.echo.0 == echo);
        assert_eq!(client.echo.1, origin.end().offset, "{echo}");
        origin.append(100);
    }
}

#[test]
fn batches_longer_than_a_frame_go_to_many_in_parts() {
    let large = JournalOptions {
        batch_bytes_max: 4 << 20,
        group_bytes_max: 4 << 20,
        segment_bytes_first: 8 << 20,
        segment_bytes_max: 8 << 20,
        recent_bytes_max: 1 << 20,
        ..JournalOptions::default()
    };
    let origin = Origin::start(large, patient());
    let mut early: Vec<_> = (0..3).map(|_| Client::subscribed(origin.address(), 100_000)).collect();
    let sizes = [900_000, 10, 50_000, 57_000, 60_000, 100, 1_000_000, 5];
    sizes.iter().for_each(|bytes| origin.append(*bytes));
    let mut late = Client::subscribed(origin.address(), u32::MAX);
    late.hear_up_to(&origin.end());
    let (bytes, ends) = contents(origin.store.journal());
    assert!(late.bytes == bytes);
    for client in &mut early {
        // The window opens only with what is acknowledged.
        while client.bytes.len() < bytes.len() {
            let whole = ends.keys().filter(|end| **end <= client.bytes.len() as u64).max();
            if let Some(end) = whole.filter(|end| **end > client.acked) {
                client.acknowledge(ends[end]);
            }
            let before = client.bytes.len();
            client.hear_until(|client| client.bytes.len() > before);
        }
        assert!(client.bytes == bytes);
    }
}

/// Those who take nothing, from the beginning on or once they are live: what is committed is with another one before they
/// have read a byte.
#[test]
fn s7_a_peer_that_takes_nothing_is_cut_off_after_the_write_stall_and_delays_nobody() {
    let origin = Origin::start(stalls::large(), stalls::patient());
    let subscribed = || Client::subscribed(origin.address(), u32::MAX);
    let mut other = subscribed();
    let mut stalled = vec![subscribed()];
    origin.peers_until(|peers| sent_up_to(peers, &origin.end()) == 2);
    for _ in 0..stalls::EVENTS {
        origin.append(stalls::EVENT_BYTES);
        other.hear_up_to(&origin.end());
    }
    stalled.extend((0..stalls::STALLED).map(|_| subscribed()));
    let addresses: Vec<_> =
        stalled.iter().map(|client| client.stream.local_addr().unwrap()).collect();
    stalls::assert_delay_nobody(&origin.server, &addresses, || {
        origin.append(100);
        other.hear_up_to(&origin.end());
    });
    subscribed().hear_up_to(&origin.end());
    // One with less patience serves the same.
    let journal = origin.store.journal().clone();
    let impatient = serve(journal, "127.0.0.1:0", stalls::impatient()).unwrap();
    let began = Instant::now();
    let stalled = Client::subscribed(impatient.local_addr(), u32::MAX);
    stalls::wait_cut_off(&impatient, stalled.stream.local_addr().unwrap());
    assert!(began.elapsed() >= stalls::impatient().write_stall, "{:?}", began.elapsed());
    origin.append(100);
    other.hear_up_to(&origin.end());
}

#[test]
fn s7_two_thousand_connections_at_once_meet_the_limits_and_the_origin_goes_on() {
    const CROWD: usize = 2000;
    // Both ends are here, and there are other tests.
    if !may_open(2 * CROWD as u64 + 2000) {
        return;
    }
    let deadlines = Deadlines { handshake: Duration::from_secs(60), ..patient().deadlines };
    let origin = Origin::start(small(), ServeOptions { deadlines, ..patient() });
    let mut before = Client::subscribed(origin.address(), u32::MAX);
    let crowd: Vec<_> = (0..CROWD)
        .map(|number| {
            let stream = TcpStream::connect(origin.address());
            let stream = stream.unwrap_or_else(|error| panic!("connection {number}: {error}"));
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream
        })
        .collect();
    origin.append(500);
    before.hear_up_to(&origin.end());
    let peers = origin.server.peers().len();
    assert!(peers <= 65, "{peers}: 64 handshakes at most");
    let turned_away = |stream: &TcpStream| {
        let (mut buffer, mut reader) = ([0; 256], FrameReader::new());
        let Ok(len) = (&*stream).read(&mut buffer) else { return false };
        reader.push(&buffer[..len]);
        let message = reader.next_message();
        matches!(message, Ok(Some(Message::Error(e))) if e.code == ErrorCode::TOO_MANY)
    };
    let refused = crowd.iter().skip(64).filter(|stream| turned_away(stream)).count();
    assert!(refused + 64 >= crowd.len(), "{refused} of {} were told", crowd.len());
    drop(crowd);
    origin.peers_until(|peers| peers.len() == 1);
    let mut after = Client::subscribed(origin.address(), u32::MAX);
    after.hear_up_to(&origin.end());
}

#[test]
fn connections_are_limited_in_all_and_by_address() {
    for (options, allowed) in [
        (ServeOptions { connections_max: 3, ..patient() }, 3),
        (ServeOptions { connections_per_address_max: Some(2), ..patient() }, 2),
    ] {
        let origin = Origin::start(small(), options);
        let mut clients: Vec<_> =
            (0..allowed).map(|_| Client::subscribed(origin.address(), 1000)).collect();
        assert_eq!(Client::connect(origin.address()).end(), Some(ErrorCode::TOO_MANY));
        clients.pop();
        origin.peers_until(|peers| peers.len() == allowed - 1);
        clients.push(Client::subscribed(origin.address(), 1000));
    }
}

#[test]
fn a_handshake_that_stops_half_way_is_ended_by_its_deadline() {
    let deadlines = Deadlines { handshake: Duration::from_millis(300), ..patient().deadlines };
    let origin = Origin::start(small(), ServeOptions { deadlines, ..patient() });
    let said = [
        Vec::new(),
        hello()[..20].to_vec(),
        hello(),
        [hello(), subscribe(1)[..50].to_vec()].concat(),
    ];
    let clients = said.map(|said| {
        let mut client = Client::connect(origin.address());
        client.say(&said);
        client
    });
    for client in clients {
        assert_eq!(client.end(), Some(ErrorCode::TIMEOUT));
    }
    origin.peers_until(<[_]>::is_empty);
}

/// A frame of a type that isn't known and may be passed over.
fn optional_frame(payload: &[u8]) -> Vec<u8> {
    let mut header = [0; 12];
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    (header[4], header[5]) = (0x80, 1);
    let crc = crc32fast::hash(&[&header[..8], payload].concat());
    header[8..].copy_from_slice(&crc.to_le_bytes());
    [&header, payload].concat()
}

#[test]
fn nothing_is_kept_of_those_who_talk_and_never_subscribe() {
    let origin = Origin::start(small(), patient());
    let mut client = Client::connect(origin.address());
    client.say(&[optional_frame(&[7; 4000]), optional_frame(&[7; 4000])].concat());
    assert_eq!(client.end(), Some(ErrorCode::PROTOCOL));
    let mut client = Client::connect(origin.address());
    client.say(&[optional_frame(&[7; 2000]), hello()].concat());
    for _ in 0..5 {
        client.say(&optional_frame(&[7; 4000]));
    }
    assert_eq!(client.end(), Some(ErrorCode::PROTOCOL));
    let mut client = Client::connect(origin.address());
    client.say(&[optional_frame(&[7; 2000]), hello(), optional_frame(b"")].concat());
    client.say(&subscribe(1000));
    client.hear_until(|client| client.granted.is_some());
}

#[test]
fn frames_that_are_replayed_or_forged_end_the_session() {
    let origin = Origin::start(small(), patient());
    (0..10).for_each(|_| origin.append(100));
    let (_, ends) = contents(origin.store.journal());
    let end = origin.end();
    let said = |said: &[u8], wanted: ErrorCode| {
        let mut client = Client::subscribed(origin.address(), u32::MAX);
        client.hear_up_to(&end);
        client.say(said);
        assert_eq!(client.end(), Some(wanted));
    };
    let ack = |mirrored| frame(&Message::Ack(Ack { mirrored, applied: None, echo: 0 }));
    said(&hello(), ErrorCode::PROTOCOL);
    said(&subscribe(1), ErrorCode::PROTOCOL);
    said(&ack(Checkpoint { offset: end.offset + 64, ..end }), ErrorCode::PROTOCOL);
    said(&ack(Checkpoint { position: end.position.advance(1), ..end }), ErrorCode::PROTOCOL);
    let middle = ends.values().find(|other| other.offset < end.offset).unwrap();
    said(&[ack(end), ack(*middle)].concat(), ErrorCode::PROTOCOL);
    said(&[0xFF; 12], ErrorCode::FRAME_TOO_LONG);
    said(&[0; 12], ErrorCode::PROTOCOL);
    said(&ack(end).repeat(200), ErrorCode::RATE);
    // As many as commits there are is what a mirror does.
    let mut client = Client::subscribed(origin.address(), u32::MAX);
    client.hear_up_to(&end);
    let mut ends: Vec<_> = ends.values().copied().collect();
    ends.sort_by_key(|end| end.offset);
    ends.iter().for_each(|end| client.say(&ack(*end)));
    let acked = |peers: &[PeerStatus]| peers.iter().any(|peer| peer.lag_bytes() == Some(0));
    let peers = origin.peers_until(acked);
    assert!(peers.iter().any(|peer| peer.lag_events() == Some(0) && peer.is_live()));
}

#[test]
fn a_peer_that_resets_in_the_middle_leaves_the_others_alone() {
    let origin = Origin::start(small(), patient());
    let mut other = Client::subscribed(origin.address(), u32::MAX);
    for round in 0..20 {
        (0..20).for_each(|_| origin.append(3000));
        let mut client = Client::connect(origin.address());
        client.say(&[hello(), subscribe(u32::MAX)].concat());
        if round % 2 == 0 {
            client.hear_until(|client| client.bytes.len() > 5000);
        }
        // What it hasn't read makes this a reset.
        drop(client);
        other.hear_up_to(&origin.end());
    }
    origin.peers_until(|peers| peers.len() == 1);
}

/// Bytes of this process that are in memory.
#[cfg(target_os = "linux")]
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

const ALONE: &str = "HEADWATER_TEST_SUBSCRIBERS_ALONE";

/// In a process of its own, where nobody else takes memory.
#[cfg(target_os = "linux")]
#[test]
fn process_with_many_idle_subscribers() {
    if std::env::var_os(ALONE).is_none() || !may_open(2 * 820 + 100) {
        return;
    }
    let options = ServeOptions { handshakes_max: 1000, ..patient() };
    let origin = Origin::start(small(), ServeOptions { connections_max: 2000, ..options });
    (0..50).for_each(|_| origin.append(2000));
    let mut clients: Vec<_> =
        (0..20).map(|_| Client::subscribed(origin.address(), u32::MAX)).collect();
    clients.iter_mut().for_each(|client| client.hear_up_to(&origin.end()));
    let before = resident_bytes();
    let count = 800;
    for _ in 0..count {
        let mut client = Client::subscribed(origin.address(), u32::MAX);
        client.hear_up_to(&origin.end());
        // What the client takes isn't what is measured.
        (client.bytes, client.reader) = (Vec::new(), FrameReader::new());
        clients.push(client);
    }
    origin.peers_until(|peers| sent_up_to(peers, &origin.end()) == count + 20);
    let each = resident_bytes().saturating_sub(before) / count;
    println!("{each} bytes for each of {count} idle subscribers");
    assert!(each < 16 << 10, "{each}");
}

#[cfg(target_os = "linux")]
#[test]
fn s7_an_idle_subscriber_costs_less_than_16_kib() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "subscribers::process_with_many_idle_subscribers", "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
