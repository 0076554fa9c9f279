//! Reading one's writes across services, and waiting until other machines have them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::shipping::message::{
    Ack, Authentication, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
};
use headwater::shipping::{
    FollowOptions, Mirror, MirrorStatus, ServeOptions, Server, ShippingError, WaitError, follow,
    serve,
};
use headwater::{
    Append, Chain, Checkpoint, Durability, ExpectedRevision, JournalId, NewEvent, NodeId, Position,
    Store, StreamId, Token, TokenError,
};

use crate::shipping::{SOON, copy_dir, small};

/// Long enough for what is there already.
const MOMENT: Duration = Duration::from_millis(20);

fn append(store: &Store, text: &str) -> Token {
    let event = NewEvent::raw("test.happened", text.as_bytes()).unwrap();
    let append = Append::to(&StreamId::new("s").unwrap(), ExpectedRevision::Any, [event]);
    store.append(&append).unwrap().token()
}

fn serve_at(store: &Store, address: SocketAddr) -> Server {
    serve(store.journal().clone(), address, ServeOptions::default()).unwrap()
}

fn origin(dir: &Path) -> (Store, Server) {
    let store = Store::builder(dir).create_if_missing().journal_options(small()).open().unwrap();
    let server = serve_at(&store, SocketAddr::from(([127, 0, 0, 1], 0)));
    (store, server)
}

fn mirror(dir: &Path, server: &Server) -> Mirror {
    let options = FollowOptions { journal: small(), ..FollowOptions::default() };
    follow(Arc::new(OsFs), dir, server.local_addr().to_string(), options).unwrap()
}

fn node_of(mirror: &Mirror) -> NodeId {
    mirror.wait_ready(SOON).unwrap().node()
}

/// Waits until `count` connections have acknowledged `end`.
fn wait_acked(server: &Server, end: Checkpoint, count: usize) {
    let deadline = Instant::now() + SOON;
    while server.peers().iter().filter(|peer| peer.acked == Some(end)).count() < count {
        assert!(Instant::now() < deadline, "{:?}", server.peers());
        std::thread::yield_now();
    }
}

// ------------------------------------------------------------------------------------- waiting for a token

#[test]
fn a_token_from_the_origin_is_waited_for_in_the_mirror() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let address = server.local_addr();
    let mirror = mirror(&dir.path().join("mirror"), &server);
    let header = append(&store, "a").to_string();
    mirror.wait_for(&header.parse().unwrap(), SOON).unwrap(); // perhaps there was no mirror yet
    let journal = mirror.journal().unwrap();
    assert_eq!(journal.end().position, Position::new(1));
    server.shutdown();
    let token = append(&store, "b");
    match mirror.wait_for(&token, MOMENT).unwrap_err() {
        WaitError::Behind { reached, wanted, .. } => {
            assert_eq!((reached, wanted), (Position::new(1), Position::new(2)));
        }
        other => panic!("{other}"),
    }
    assert!(matches!(
        journal.wait_for(&token, MOMENT),
        Err(TokenError::Timeout { reached, .. }) if reached == Position::new(1)
    ));
    let _server = serve_at(&store, address);
    mirror.resume();
    std::thread::scope(|scope| {
        let here = scope.spawn(|| journal.wait_for(&token, SOON));
        mirror.wait_for(&token, SOON).unwrap();
        here.join().unwrap().unwrap();
    });
    // In the origin it is there at once; and in front of everything there is nothing to wait for.
    store.journal().wait_for(&token, Duration::ZERO).unwrap();
    let nothing = Token { position: Position::START, ..token };
    journal.wait_for(&nothing, Duration::ZERO).unwrap();
}

#[test]
fn a_token_of_another_journal_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let mirror = mirror(&dir.path().join("mirror"), &server);
    mirror.wait_for(&append(&store, "a"), SOON).unwrap();
    let stranger = Token { journal: JournalId::from_bytes([9; 16]), ..append(&store, "b") };
    let refused = |error: TokenError| match error {
        TokenError::Foreign { found, followed } => {
            assert_eq!((found, followed), (stranger.journal, store.journal().id()));
        }
        other => panic!("{other}"),
    };
    match mirror.wait_for(&stranger, SOON).unwrap_err() {
        WaitError::Token(error) => refused(error),
        other => panic!("{other}"),
    }
    refused(store.journal().wait_for(&stranger, SOON).unwrap_err());
    refused(store.wait_mirrored(&stranger, 1, SOON).unwrap_err());
}

/// The origin goes back to an older copy and grows another way. Neither side takes the other's events for those that
/// a token means.
#[test]
fn a_token_of_lost_events_is_refused_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("origin");
    let (store, server) = origin(&path);
    append(&store, "a");
    store.close().unwrap();
    server.shutdown();
    drop(store);
    copy_dir(&path, &dir.path().join("copy"));

    let (store, server) = origin(&path);
    let mirrored = mirror(&dir.path().join("mirror"), &server);
    let lost = append(&store, "b");
    mirrored.wait_for(&lost, SOON).unwrap();
    store.close().unwrap();
    server.shutdown();
    mirrored.stop().unwrap();

    let (store, server) = origin(&dir.path().join("copy"));
    let instead = append(&store, "c");
    let beyond = append(&store, "d");
    assert_eq!(instead.position, lost.position);
    assert!(matches!(store.journal().wait_for(&lost, SOON), Err(TokenError::Lost { .. })));
    assert!(matches!(store.wait_mirrored(&lost, 1, SOON), Err(TokenError::Lost { .. })));
    let mirrored = mirror(&dir.path().join("mirror"), &server);
    mirrored.wait_until(SOON, MirrorStatus::is_halted).unwrap();
    mirrored.wait_for(&lost, SOON).unwrap(); // here it is not lost
    let refused = mirrored.wait_for(&instead, SOON).unwrap_err();
    assert!(matches!(refused, WaitError::Token(TokenError::Lost { .. })), "{refused}");
    let halted = mirrored.wait_for(&beyond, SOON).unwrap_err();
    assert!(matches!(halted, WaitError::Halted(ShippingError::Fork(_))), "{halted}");
    // And it is not counted as one that has the new events.
    assert_eq!(store.wait_mirrored(&instead, 1, MOMENT).unwrap().nodes, []);
}

#[test]
fn a_closed_journal_ends_the_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _server) = origin(&dir.path().join("origin"));
    let token = append(&store, "a");
    let later = Token { position: Position::new(2), ..token };
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.journal().wait_for(&later, SOON));
        store.close().unwrap();
        assert!(matches!(waits.join().unwrap(), Err(TokenError::Closed { .. })));
    });
    store.journal().wait_for(&token, Duration::ZERO).unwrap();
}

// ---------------------------------------------------------------------------------------- waiting for mirrors

#[test]
fn an_append_waits_for_as_many_mirrors_as_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let token = append(&store, "a");
    let none = store.wait_mirrored(&token, 1, MOMENT).unwrap();
    assert_eq!((none.nodes.len(), none.wanted, none.is_enough()), (0, 1, false));
    assert!(store.wait_mirrored(&token, 0, Duration::ZERO).unwrap().is_enough());
    // Both are new: they count from their first acknowledgement on.
    let (first, second) = std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.wait_mirrored(&token, 2, SOON).unwrap());
        let first = mirror(&dir.path().join("first"), &server);
        let second = mirror(&dir.path().join("second"), &server);
        let mut nodes = [node_of(&first), node_of(&second)];
        nodes.sort();
        let mirrored = waits.join().unwrap();
        assert_eq!(mirrored.nodes, nodes);
        assert!(mirrored.is_enough());
        (first, second)
    });
    second.stop().unwrap();
    let token = append(&store, "b");
    let mirrored = store.wait_mirrored(&token, 2, Duration::from_millis(500)).unwrap();
    assert!(!mirrored.is_enough());
    assert!(mirrored.nodes.iter().all(|node| *node == node_of(&first)), "{mirrored:?}");
    // One that comes back with what it has counts for that, and goes on.
    let second = mirror(&dir.path().join("second"), &server);
    assert!(store.wait_mirrored(&token, 2, SOON).unwrap().is_enough());
    drop((first, second));
    // Nobody is believed to have what comes later.
    assert_eq!(store.wait_mirrored(&append(&store, "c"), 1, MOMENT).unwrap().nodes, []);
}

#[test]
fn a_node_counts_once_however_often_it_is_connected() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    append(&store, "a");
    let one = mirror(&dir.path().join("one"), &server);
    one.wait_caught_up(SOON).unwrap();
    one.stop().unwrap();
    copy_dir(&dir.path().join("one"), &dir.path().join("copy"));
    let one = mirror(&dir.path().join("one"), &server);
    let copy = mirror(&dir.path().join("copy"), &server);
    let token = append(&store, "b");
    wait_acked(&server, store.journal().end(), 2);
    let mirrored = store.wait_mirrored(&token, 2, MOMENT).unwrap();
    assert_eq!(mirrored.nodes, [node_of(&one)]);
    assert_eq!(node_of(&one), node_of(&copy));
}

#[test]
fn a_buffered_append_is_durable_before_mirrors_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let _mirror = mirror(&dir.path().join("mirror"), &server);
    let event = NewEvent::raw("test.happened", b"a").unwrap();
    let buffered = Append::to(&StreamId::new("s").unwrap(), ExpectedRevision::Any, [event])
        .durability(Durability::Buffered);
    let token = store.submit(&buffered).unwrap().wait().unwrap().token();
    assert_eq!(token.durability, Durability::Buffered);
    assert!(store.wait_mirrored(&token, 1, SOON).unwrap().is_enough());
    assert!(store.journal().end().position >= token.position);
}

/// A peer of our own making, that says what it is told to say.
struct Peer(TcpStream);

impl Peer {
    /// Subscribes, and reads until it was sent something of the journal.
    fn subscribe(server: &Server, node: NodeId) -> Self {
        let mut stream = TcpStream::connect(server.local_addr()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let (nonce, agent, node) = ([1; 16], "test".to_owned(), Some(node));
        let versions = PROTOCOL_VERSIONS;
        let (max_frame, authentication) = (1 << 20, Authentication::None);
        let hello = Hello { versions, features: 0, max_frame, node, nonce, authentication, agent };
        let mut out = Vec::new();
        Message::Hello(hello).encode(&mut out);
        let all = Subscribe { from: None, witness: None, window_bytes: 1 << 20 };
        Message::Subscribe(all).encode(&mut out);
        stream.write_all(&out).unwrap();
        let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
        reader.allow_data(1 << 20);
        loop {
            let len = stream.read(&mut buffer).unwrap();
            assert!(len > 0, "the origin has closed the connection");
            reader.push(&buffer[..len]);
            while let Some(message) = reader.next_message().unwrap() {
                if matches!(message, Message::Data(_)) {
                    return Self(stream);
                }
            }
        }
    }

    fn acknowledge(&mut self, mirrored: Checkpoint) {
        let mut out = Vec::new();
        Message::Ack(Ack { mirrored, applied: None, echo: 0 }).encode(&mut out);
        self.0.write_all(&out).unwrap();
    }
}

#[test]
fn an_acknowledgement_of_another_chain_does_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let token = append(&store, "a");
    let end = store.journal().end();
    let (liar, honest) = (NodeId::from_bytes([3; 16]), NodeId::from_bytes([4; 16]));
    let mut peer = Peer::subscribe(&server, liar);
    let other = Checkpoint { chain: Chain::from_bytes([5; 16]), ..end };
    peer.acknowledge(other);
    wait_acked(&server, other, 1);
    assert_eq!(store.wait_mirrored(&token, 1, MOMENT).unwrap().nodes, []);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| store.wait_mirrored(&token, 1, SOON).unwrap());
        let mut peer = Peer::subscribe(&server, honest);
        peer.acknowledge(end);
        assert_eq!(waits.join().unwrap().nodes, [honest]);
    });
}

#[test]
fn the_own_node_is_no_mirror() {
    let dir = tempfile::tempdir().unwrap();
    let (store, server) = origin(&dir.path().join("origin"));
    let token = append(&store, "a");
    let end = store.journal().end();
    let mut own = Peer::subscribe(&server, store.journal().node());
    own.acknowledge(end);
    wait_acked(&server, end, 1);
    assert_eq!(store.wait_mirrored(&token, 1, MOMENT).unwrap().nodes, []);
}

// ------------------------------------------------------------------------------------------ what views have applied

#[cfg(feature = "views")]
mod views {
    use headwater::Recorded;
    use headwater::view::{Fold, FoldError, Keys, OnPoison, View, ViewOptions, ViewState};

    use super::*;

    /// Counts events; with another `STOPS_AT` the one of that position can't be folded.
    struct Counts<const STOPS_AT: u64>;

    impl<const STOPS_AT: u64> View for Counts<STOPS_AT> {
        const NAME: &'static str = if STOPS_AT == 0 { "counts" } else { "stops" };
        const VERSION: u32 = 1;
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
            event: &Recorded<Vec<u8>>,
        ) -> Result<Fold<u64>, FoldError> {
            match STOPS_AT > 0 && event.position().get() == STOPS_AT {
                true => Err("no further".into()),
                false => Ok(Fold::Put(row.unwrap_or_default() + 1)),
            }
        }
    }

    fn applied(server: &Server) -> Option<Position> {
        server.peers().first().and_then(|peer| peer.applied)
    }

    /// The origin once knew of applied positions only if the service itself reported them, which nobody did.
    #[test]
    fn s8_the_origin_hears_what_all_open_views_have_applied_and_nobody_has_to_report_it() {
        let dir = tempfile::tempdir().unwrap();
        let (store, server) = origin(&dir.path().join("origin"));
        let here = Store::create(dir.path().join("here")).unwrap();
        let mirror = mirror(&dir.path().join("mirror"), &server);
        let journal = mirror.wait_ready(SOON).unwrap();
        let hears = |wanted: Option<Position>| {
            let deadline = Instant::now() + SOON;
            while applied(&server) != wanted {
                assert!(Instant::now() < deadline, "{:?}, not {wanted:?}", applied(&server));
                std::thread::yield_now();
            }
        };
        wait_acked(&server, append_some(&store, 2), 1);
        assert_eq!((applied(&server), mirror.status().applied), (None, None), "there is no view");

        let view = here.view_of(&journal, Counts::<0>).unwrap();
        hears(Some(Position::new(2)));
        let options = ViewOptions { on_poison: OnPoison::Stop, ..ViewOptions::default() };
        let stops = here.view_of_with(&journal, Counts::<3>, options).unwrap();
        let end = append_some(&store, 5);
        view.wait_for(&end.token(), SOON).unwrap();
        let stopped = stops.wait_for(&end.token(), SOON);
        assert!(stopped.is_err() && matches!(stops.status().state, ViewState::Stopped(_)));
        hears(Some(Position::new(3)));
        assert_eq!(mirror.status().applied, Some(Position::new(3)), "the last one counts");
        // One that is closed isn't waited for, also if somebody keeps a handle.
        let kept = stops.clone();
        stops.close().unwrap();
        hears(Some(Position::new(7)));
        drop(kept);

        // What the service says itself counts in its place.
        mirror.report_applied(Position::new(1));
        hears(Some(Position::new(1)));
    }

    fn append_some(store: &Store, count: usize) -> Checkpoint {
        for _ in 0..count {
            append(store, "more");
        }
        store.journal().end()
    }
}
