//! What both ends tell of themselves, and what the command line tells beside them: never more than is known.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::retention::{History, Options, Until};
use headwater::shipping::message::{
    Ack, Authentication, FrameReader, Heartbeat, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
    Subscribed, Welcome,
};
use headwater::shipping::security::{
    Access, AccessList, AccessToken, Certificate, ClientTls, KeyPin, Peer, Pem, Right, Security,
    SecurityOptions, ServerTls, Trust,
};
use headwater::shipping::{
    Deadlines, EndReason, FollowOptions, Mirror, MirrorStatus, PeerState, PeerStatus, ServeOptions,
    Server, follow, serve,
};
use headwater::testing::Clock;
use headwater::{
    Append, Checkpoint, ExpectedRevision, Journal, JournalId, NewEvent, NodeId, Position, Store,
    StreamId,
};

#[cfg(feature = "cli")]
mod command_line;

use crate::fault_proxy::{Fault, Proxy, What};
use crate::shipping::{
    Origin, SOON, converged, copy_dir, forget_all, replace_dir, small, start_mirror,
};

/// So much is told within moments, and nobody is cut off for being quiet.
fn brisk() -> Deadlines {
    let (heartbeat, silence) = (Duration::from_millis(20), Duration::from_secs(120));
    Deadlines { heartbeat, silence, ..Deadlines::default() }
}

fn options() -> FollowOptions {
    FollowOptions { journal: small(), ..FollowOptions::default() }
}

fn following(dir: &Path, address: impl ToString, options: FollowOptions) -> Mirror {
    follow(Arc::new(OsFs), dir, address.to_string(), options).unwrap()
}

/// Looks until it is as wanted.
#[track_caller]
fn until<T: std::fmt::Debug>(look: impl Fn() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        let found = look();
        if wanted(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{found:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn assert_unknown(status: &MirrorStatus) {
    let lag = (status.lag_events(), status.lag_bytes(), status.lag_time());
    assert_eq!((lag, status.applied_lag_events()), ((None, None, None), None), "{status:?}");
}

/// A subscriber that says what it is told to, and else nothing.
struct Subscriber {
    stream: TcpStream,
    reader: FrameReader,
    granted: bool,
    /// The offset up to which it was sent.
    reached: u64,
}

impl Subscriber {
    fn connect(address: SocketAddr, node: u8) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let hello = Hello {
            versions: PROTOCOL_VERSIONS,
            features: 0,
            max_frame: 1 << 20,
            node: Some(NodeId::from_bytes([node; 16])),
            nonce: [1; 16],
            authentication: Authentication::None,
            agent: "observer".to_owned(),
        };
        let subscribe = Subscribe { from: None, witness: None, window_bytes: u32::MAX };
        let said = [frame(&Message::Hello(hello)), frame(&Message::Subscribe(subscribe))].concat();
        stream.write_all(&said).unwrap();
        let mut reader = FrameReader::new();
        reader.allow_data(1 << 20);
        let mut subscriber = Self { stream, reader, granted: false, reached: 0 };
        subscriber.hear_until(|it| it.granted);
        subscriber
    }

    fn hear_until(&mut self, wanted: impl Fn(&Self) -> bool) {
        let mut buffer = [0; 16 << 10];
        let deadline = Instant::now() + SOON;
        while !wanted(self) {
            assert!(Instant::now() < deadline, "at {}", self.reached);
            let len = self.stream.read(&mut buffer).unwrap();
            assert!(len > 0, "cut off");
            self.reader.push(&buffer[..len]);
            while let Some(message) = self.reader.next_message().unwrap() {
                match message {
                    Message::Subscribed(_) => self.granted = true,
                    Message::Data(data) => self.reached = data.offset + data.bytes.len() as u64,
                    _ => {}
                }
            }
        }
    }

    fn hear_up_to(&mut self, end: Checkpoint) {
        self.hear_until(|it| it.reached >= end.offset);
    }

    fn acknowledge(&mut self, mirrored: Checkpoint, applied: Option<Position>) {
        let ack = Message::Ack(Ack { mirrored, applied, echo: 0 });
        self.stream.write_all(&frame(&ack)).unwrap();
    }
}

fn frame(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// The only peer.
fn peer(server: &Server, wanted: impl Fn(&PeerStatus) -> bool) -> PeerStatus {
    let peers = until(|| server.peers(), |peers| peers.len() == 1 && wanted(&peers[0]));
    peers.into_iter().next().unwrap()
}

#[test]
fn s8_a_mirrors_lag_is_unknown_before_between_and_after_sessions_and_when_it_has_halted() {
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..30);
    let backup = dir.path().join("backup");
    origin.close();
    copy_dir(&origin.dir, &backup);

    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    mirror.report_applied(Position::START);
    let tried = |status: &MirrorStatus| status.ends.of(EndReason::Refused) > 0;
    let status = mirror.wait_until(SOON, tried).unwrap();
    assert_unknown(&status);
    assert_eq!((status.mirrored, status.connected_for), (None, None));

    origin.open();
    origin.append(30..60);
    converged(&mirror, &origin);
    mirror.wait_caught_up(SOON).unwrap();
    let status = mirror.wait_until(SOON, MirrorStatus::is_live).unwrap();
    assert_eq!((status.lag_events(), status.lag_bytes()), (Some(0), Some(0)));
    assert_eq!(status.lag_time(), Some(Duration::ZERO));
    assert_eq!(status.applied_lag_events(), Some(60));
    assert_eq!(status.path, [origin.store().journal().node()]);
    assert_eq!(status.received_offset, status.mirrored.map(|it| it.offset));
    assert!(status.connected_for.is_some());

    // It had everything, and nobody knows what has come since.
    origin.close();
    let gone = |status: &MirrorStatus| status.ends.of(EndReason::GoingAway) > 0;
    let status = mirror.wait_until(SOON, gone).unwrap();
    assert!(status.mirrored.is_some() && status.origin_end.is_some());
    assert_unknown(&status);
    assert_eq!(status.received_offset, None);

    replace_dir(&origin.dir, &backup);
    origin.open();
    let status = mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap();
    assert_unknown(&status);
    assert_eq!(status.ends.of(EndReason::History), 1);
}

#[test]
fn s8_lag_is_unknown_while_the_other_side_is_connected_and_not_heard() {
    let dir = tempfile::tempdir().unwrap();
    // The origin says nothing of itself for an hour.
    let quiet = Deadlines { heartbeat: Duration::from_secs(3600), ..brisk() };
    let store = Store::create(dir.path().join("origin")).unwrap();
    let serve_options = ServeOptions { deadlines: quiet, ..ServeOptions::default() };
    let server = serve(store.journal().clone(), "127.0.0.1:0", serve_options).unwrap();
    append(&store, "one");
    let options = FollowOptions { deadlines: brisk(), ..options() };
    let mirror = following(&dir.path().join("mirror"), server.local_addr(), options);
    mirror.wait_until(SOON, MirrorStatus::is_live).unwrap();
    let status = until(|| mirror.status(), |status| status.lag_events().is_none());
    assert!(status.is_live() && status.connected_for.is_some());
    assert_unknown(&status);
    // What it says is news.
    append(&store, "two");
    until(|| mirror.status(), |status| status.lag_events() == Some(0));
    until(|| mirror.status(), |status| status.lag_events().is_none());
}

fn append(store: &Store, text: &str) {
    let event = NewEvent::raw("test.happened", text.as_bytes()).unwrap();
    let to = StreamId::new("s").unwrap();
    store.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
}

#[test]
fn s8_a_peers_lag_is_unknown_before_it_subscribes_and_when_it_is_not_heard() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..30);
    let options = ServeOptions { deadlines: brisk(), ..ServeOptions::default() };
    let server = serve(origin.store().journal().clone(), "127.0.0.1:0", options).unwrap();
    let unknown = |peer: &PeerStatus| {
        let lag = (peer.lag_events(), peer.lag_bytes(), peer.lag_time());
        (lag, peer.applied_lag_events()) == ((None, None, None), None)
    };
    let stranger = TcpStream::connect(server.local_addr()).unwrap();
    let seen = peer(&server, |peer| peer.state == PeerState::Handshake);
    assert!(unknown(&seen) && seen.held_bytes().is_none(), "{seen:?}");
    drop(stranger);
    until(|| server.peers().len(), |count| *count == 0);
    assert_eq!(server.refused().of(EndReason::Disconnected), 1);

    let mut subscriber = Subscriber::connect(server.local_addr(), 7);
    let end = origin.store().journal().end();
    subscriber.hear_up_to(end);
    subscriber.acknowledge(end, Some(Position::new(9)));
    let seen = peer(&server, |peer| peer.lag_events() == Some(0));
    assert_eq!((seen.lag_bytes(), seen.lag_time()), (Some(0), Some(Duration::ZERO)));
    assert_eq!((seen.applied_lag_events(), seen.held_bytes()), (Some(21), Some(0)));
    // It has everything, as it said; whether it is still there nobody knows.
    let seen = peer(&server, unknown);
    assert_eq!((seen.acked, seen.is_live()), (Some(end), true));
    // Now it lacks something, and nothing moves.
    origin.append(30..31);
    let seen = peer(&server, |peer| peer.state == PeerState::Stalled);
    assert!(unknown(&seen) && seen.held_bytes().is_some(), "{seen:?}");
    subscriber.acknowledge(end, None);
    peer(&server, |peer| peer.lag_events() == Some(1));
    subscriber.hear_up_to(origin.store().journal().end());
    subscriber.acknowledge(origin.store().journal().end(), None);
    peer(&server, |peer| peer.lag_events() == Some(0) && peer.is_live());
}

/// By the origin's clock, which is set here.
#[test]
fn the_time_of_a_peers_lag_is_the_age_of_the_oldest_event_that_it_lacks() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::default());
    let builder = Store::builder(dir.path().join("origin")).create_if_missing();
    let store = builder.clock(&clock).open().unwrap();
    let minute = Duration::from_secs(60);
    let deadlines = Deadlines { silence: 4 * minute, heartbeat: minute, ..Deadlines::default() };
    let options = ServeOptions { deadlines, ..ServeOptions::default() };
    let server = serve(store.journal().clone(), "127.0.0.1:0", options).unwrap();
    append(&store, "early");
    let early = store.journal().end();
    let mut subscriber = Subscriber::connect(server.local_addr(), 7);
    subscriber.hear_up_to(early);
    subscriber.acknowledge(early, None);
    peer(&server, |peer| peer.lag_time() == Some(Duration::ZERO));
    clock.advance(Duration::from_secs(1000));
    append(&store, "late");
    clock.advance(Duration::from_secs(90));
    append(&store, "later");
    let seen = peer(&server, |peer| peer.lag_events() == Some(2));
    assert_eq!(seen.lag_time(), Some(Duration::from_secs(90)), "not since the last that it has");
    // A clock that was set back says nothing.
    clock.set_us(1);
    let seen = peer(&server, |peer| peer.lag_events() == Some(2));
    assert_eq!(seen.lag_time(), None);
}

/// An origin that grants the subscription and says that there are ten events more, of which it sends none; by a clock that
/// is `ahead_us` ahead.
fn withholding(end: Checkpoint, ahead_us: i64) -> SocketAddr {
    let end = Checkpoint { offset: end.offset + 640, position: end.position.advance(10), ..end };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            reader.push(&buffer[..len]);
            while let Ok(Some(message)) = reader.next_message() {
                let node = NodeId::from_bytes([9; 16]);
                let now_us = unix_us() + ahead_us;
                let answer = match message {
                    Message::Hello(hello) => frame(&Message::Welcome(Welcome {
                        version: 1,
                        heartbeat_ms: 1000,
                        max_frame: 8192,
                        features: 0,
                        node,
                        session: [1; 16],
                        nonce: hello.nonce,
                        now_us,
                    })),
                    Message::Subscribe(_) => frame(&Message::Subscribed(Subscribed {
                        end,
                        first_position: Position::START,
                        path: vec![NodeId::from_bytes([8; 16]), node],
                    })),
                    Message::Ack(ack) => frame(&Message::Heartbeat(Heartbeat {
                        end,
                        now_us,
                        speaker: headwater::shipping::message::Speaker::Origin,
                        echo: ack.echo,
                    })),
                    _ => return,
                };
                drop(stream.write_all(&answer));
            }
        }
    });
    address
}

fn unix_us() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    since.as_micros() as i64
}

#[test]
fn the_time_of_a_mirrors_lag_is_counted_by_the_origins_clock_whatever_its_own_says() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..5);
    let path = dir.path().join("mirror");
    let mirror = start_mirror(&path, &origin);
    let end = converged(&mirror, &origin).end();
    mirror.stop().unwrap();

    let hour = Duration::from_secs(3600);
    let ahead = following(&path, withholding(end, hour.as_micros() as i64), options());
    let status = ahead.wait_until(SOON, |status| status.lag_events() == Some(10)).unwrap();
    let lag = status.lag_time().unwrap();
    assert!(lag >= hour && lag < hour + SOON, "{lag:?}");
    assert_eq!(status.lag_bytes(), Some(640));
    let path_of = [8, 9].map(|n| NodeId::from_bytes([n; 16]));
    assert_eq!(status.path, path_of);
    ahead.stop().unwrap();

    let behind = following(&path, withholding(end, -(hour.as_micros() as i64)), options());
    let status = behind.wait_until(SOON, |status| status.lag_events() == Some(10)).unwrap();
    assert_eq!(status.lag_time(), None, "an event of the future says nothing");
    behind.stop().unwrap();
}

/// Of what stands on the disk, exactly that much can go once the mirror doesn't count any more.
#[test]
fn what_a_mirror_holds_back_is_what_retention_frees_without_it() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..150);
    let server = origin.store().serve("127.0.0.1:0").unwrap();
    let mut subscriber = Subscriber::connect(server.local_addr(), 7);
    let third = origin.store().journal().end();
    subscriber.hear_up_to(third);
    subscriber.acknowledge(third, None);
    peer(&server, |peer| peer.acked == Some(third));
    origin.append(150..450);
    let held = peer(&server, |_| true).held_bytes().unwrap();
    drop(subscriber);
    until(|| server.peers().len(), |count| *count == 0);
    server.shutdown();

    // Full segments are cut to their length beside the commits.
    let surplus = || -> u64 {
        let sealed = origin.store().journal().segments().into_iter().filter(|it| it.sealed);
        let surplus = sealed.map(|it| {
            std::fs::metadata(&it.path).unwrap().len() - 4096 - (it.end_offset - it.base_offset)
        });
        surplus.sum()
    };
    until(surplus, |bytes| *bytes == 0);
    let plan = |options: &Options| origin.store().plan_retention(options).unwrap();
    let mut options = Options::new(Until::Position(origin.end()));
    let with = plan(&options);
    assert_eq!(with.blocker.as_ref().unwrap().holder.code(), "mirror");
    options.lease_bytes_max = 0;
    let without = plan(&options);
    assert!(with.file_bytes() > 0 && held > 0);
    assert_eq!(without.file_bytes() - with.file_bytes(), held);
    let history = History::Forget(without.target);
    let removed = origin.store().retain(&options.history(history)).unwrap();
    assert_eq!(removed.file_bytes(), with.file_bytes() + held);
}

/// Follows, and waits until it has ended for this reason.
fn ends(dir: &Path, address: impl ToString, options: FollowOptions, reason: EndReason) {
    let mirror = following(dir, address, options);
    let status = until(|| mirror.status(), |status| status.ends.of(reason) > 0);
    assert_unknown(&status);
    assert_eq!(EndReason::from(&status.last_error.unwrap()), reason);
}

/// Accepts, and does this with each connection.
fn accepting(mut then: impl FnMut(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(&mut then));
    address
}

#[test]
fn reconnects_are_counted_by_reasons_that_happen_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    ends(&path("refused"), unused, options(), EndReason::Refused);
    ends(&path("resolve"), "no-such-host.invalid:1", options(), EndReason::Resolve);
    // Nobody connects to everybody.
    let anywhere = FollowOptions { allow_plaintext_off_loopback: true, ..options() };
    ends(&path("unreachable"), "255.255.255.255:1", anywhere, EndReason::Unreachable);

    let mut kept = Vec::new();
    let silent = accepting(move |stream| kept.push(stream));
    let soon = Deadlines { handshake: Duration::from_millis(50), ..Deadlines::default() };
    let impatient = FollowOptions { deadlines: soon, ..options() };
    ends(&path("timeout"), silent, impatient, EndReason::Timeout);
    ends(&path("disconnected"), accepting(drop), options(), EndReason::Disconnected);
    let other = accepting(|mut stream| {
        drop(stream.read(&mut [0; 4096]));
        drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"));
        drop(stream.read(&mut [0; 4096]));
    });
    ends(&path("protocol"), other, options(), EndReason::Protocol);

    let origin = Origin::start(path("origin"), small());
    origin.append(0..50);
    // Behind SUBSCRIBED, in the bytes of the first batch.
    let fault = Fault { of_origin: true, at: 9000, what: What::Flip(3) };
    let flip_once = move |number| if number == 0 { vec![fault] } else { Vec::new() };
    let flipping = Proxy::start(origin.address, flip_once);
    let mirror = following(&path("damaged"), flipping.address, options());
    converged(&mirror, &origin);
    let found = mirror.status().ends;
    assert_eq!(
        (found.of(EndReason::Damaged) + found.of(EndReason::Protocol), found.total()),
        (1, 1)
    );
    mirror.stop().unwrap();

    let none = ServeOptions { connections_max: 0, ..ServeOptions::default() };
    let full = serve(origin.store().journal().clone(), "127.0.0.1:0", none).unwrap();
    ends(&path("limit"), full.local_addr(), options(), EndReason::Limit);
    assert!(full.refused().of(EndReason::Limit) > 0 && full.peers().is_empty());

    let mirror = start_mirror(&path("away"), &origin);
    converged(&mirror, &origin);
    let mut origin = origin;
    origin.close();
    until(|| mirror.status(), |status| status.ends.of(EndReason::GoingAway) > 0);
    origin.open();
    let status = until(|| mirror.status(), |status| status.reconnects == 1);
    assert_eq!(status.ends.of(EndReason::GoingAway), 1);
    mirror.stop().unwrap();
}

#[test]
fn reconnects_are_counted_by_reasons_that_lie_in_histories() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let fs: Arc<dyn headwater::fs::Fs> = Arc::new(OsFs);
    let serve_dir = |dir: &Path| {
        let (journal, _) = Journal::open_read_only(&fs, dir).unwrap();
        serve(journal, "127.0.0.1:0", ServeOptions::default()).unwrap()
    };
    let mut origin = Origin::start(path("origin"), small());
    origin.append(0..100);
    let mirror = start_mirror(&path("mirror"), &origin);
    converged(&mirror, &origin);
    mirror.stop().unwrap();
    copy_dir(&path("mirror"), &path("early"));
    let other = start_mirror(&path("other mirror"), &origin);
    converged(&other, &origin);
    other.stop().unwrap();

    // Of itself.
    let itself = serve_dir(&path("early"));
    ends(&path("early"), itself.local_addr(), options(), EndReason::Cycle);
    // Of a mirror that has less.
    origin.append(100..200);
    let mirror = start_mirror(&path("mirror"), &origin);
    converged(&mirror, &origin);
    mirror.stop().unwrap();
    copy_dir(&path("mirror"), &path("late"));
    let less = serve_dir(&path("other mirror"));
    ends(&path("mirror"), less.local_addr(), options(), EndReason::Behind);
    // Of an origin that has removed what is lacking.
    std::fs::remove_file(origin.dir.join("journal/leases")).unwrap();
    origin.close();
    origin.open();
    assert!(!forget_all(&origin).removals.is_empty());
    ends(&path("removed"), origin.address, options(), EndReason::Removed);
    origin.close();
    // Of another journal.
    let other = Store::create(path("other")).unwrap();
    append(&other, "other");
    let other = other.serve("127.0.0.1:0").unwrap();
    ends(&path("late"), other.local_addr(), options(), EndReason::History);
    let refused = until(|| other.refused(), |refused| refused.total() > 0);
    assert_eq!(refused.of(EndReason::History), 1);

    // Of one that can't read its journal.
    let mut rotten = Origin::start(path("rotten"), small());
    rotten.append(0..200);
    let segment = rotten.store().journal().segments()[1].path.clone();
    rotten.close();
    rotten.open();
    crate::shipping::flip_bit(&segment, 5000);
    ends(&path("of rotten"), rotten.address, options(), EndReason::Storage);
}

struct Held {
    certificate: Certificate,
    pin: KeyPin,
}

fn held(dir: &Path, name: &str) -> Held {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (chain, key) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
    std::fs::write(&chain, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let pin = KeyPin::of(&Pem::file(&chain)).unwrap();
    Held { certificate: Certificate::files(chain, key), pin }
}

/// Served with TLS, and this list.
fn secured(journal: &Journal, certificate: &Held, peers: Vec<Peer>) -> Server {
    let tls = Some(ServerTls::with(certificate.certificate.clone()));
    let access = Access::List(AccessList::new(peers).unwrap());
    let security = Some(Security::new(SecurityOptions { tls, access }).unwrap());
    let options = ServeOptions { security, ..ServeOptions::default() };
    serve(journal.clone(), "127.0.0.1:0", options).unwrap()
}

#[test]
fn who_is_refused_is_counted_by_reason_at_both_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let origin = Origin::start(path("origin"), small());
    origin.append(0..10);
    let [own, other] = ["own", "other"].map(|name| held(dir.path(), name));
    let [may, may_not, unknown] = [0; 3].map(|_| AccessToken::generate().unwrap());
    let peer_of = |name: &str, token: &AccessToken, right| Peer {
        tokens: vec![token.hash()],
        may: vec![right],
        ..Peer::named(name)
    };
    let elsewhere = Right::verbatim(JournalId::from_bytes([5; 16]));
    let peers =
        vec![peer_of("may", &may, Right::everything()), peer_of("may not", &may_not, elsewhere)];
    let journal = origin.store().journal();
    let server = secured(journal, &own, peers);
    let tls = |pin: &Held, token: Option<&AccessToken>| FollowOptions {
        tls: Some(ClientTls::trusting(Trust::Keys(vec![pin.pin]))),
        token: token.cloned().map(Into::into),
        ..options()
    };
    let address = server.local_addr();
    let counts = |reason| until(|| server.refused(), |it| it.of(reason) > 0).of(reason);
    ends(&path("tls"), address, tls(&other, Some(&may)), EndReason::Tls);
    assert!(counts(EndReason::Tls) > 0);
    ends(&path("no token"), address, tls(&own, None), EndReason::Credentials);
    assert_eq!(counts(EndReason::Credentials), 1);
    // To a mirror both look the same.
    ends(&path("unknown"), address, tls(&own, Some(&unknown)), EndReason::Access);
    until(|| server.refused(), |refused| refused.of(EndReason::Credentials) == 2);
    assert_eq!(server.refused().of(EndReason::Access), 0);
    ends(&path("may not"), address, tls(&own, Some(&may_not)), EndReason::Access);
    assert_eq!(counts(EndReason::Access), 1);
    assert_eq!(server.ended().total(), 0);

    let mirror = following(&path("may"), address, tls(&own, Some(&may)));
    converged(&mirror, &origin);
    let seen = peer(&server, |peer| peer.peer.as_deref() == Some("may"));
    assert_eq!((seen.reconnects, seen.ends.total()), (0, 0));
    mirror.stop().unwrap();
    until(|| server.ended().total(), |total| *total == 1);
    let mirror = following(&path("may"), address, tls(&own, Some(&may)));
    let seen = peer(&server, |peer| peer.reconnects == 1);
    assert_eq!(seen.ends.of(EndReason::Disconnected), 1);
    mirror.stop().unwrap();

    // Whoever dribbles, and whoever speaks something else.
    let soon = Deadlines { handshake: Duration::from_millis(50), ..Deadlines::default() };
    let options = ServeOptions { deadlines: soon, ..ServeOptions::default() };
    let plain = serve(journal.clone(), "127.0.0.1:0", options).unwrap();
    let _silent = TcpStream::connect(plain.local_addr()).unwrap();
    let mut hostile = TcpStream::connect(plain.local_addr()).unwrap();
    hostile.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let refused = until(|| plain.refused(), |refused| refused.total() == 2);
    let found = [EndReason::Timeout, EndReason::Protocol].map(|reason| refused.of(reason));
    assert_eq!(found, [1, 1]);
}
