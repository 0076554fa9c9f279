//! Who is let in, and who isn't: each rule with one that it accepts and one that it refuses.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::format::files::Mark;
use headwater::shipping::message::{
    Authentication, ErrorCode, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Presented, Subscribe,
};
use headwater::shipping::security::{
    ALPN, Access, AccessList, AccessToken, Anonymous, Certificate, ClientTls, KeyPin, Peer, Pem,
    Right, Security, SecurityError, SecurityOptions, ServerTls, TlsReason, TokenSource, Trust,
};
use headwater::shipping::{
    Deadlines, EndReason, FollowOptions, Mirror, MirrorState, MirrorStatus, ServeError,
    ServeOptions, Server, ShippingError,
};
use headwater::{
    Append, Checkpoint, ExpectedRevision, JournalId, NewEvent, Position, Store, StreamId,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::crypto::cipher::{
    AeadKey, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundOpaqueMessage,
    OutboundPlainMessage, Tls13AeadAlgorithm, UnsupportedOperationError,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;

use crate::shipping::assert_same_bytes;

const SOON: Duration = Duration::from_secs(20);

/// A certificate and its key as somebody keeps them: two files.
struct Held {
    chain: PathBuf,
    key: PathBuf,
    pin: KeyPin,
}

impl Held {
    fn write(dir: &Path, name: &str, certificate: &str, key: &KeyPair) -> Self {
        let (chain, key_path) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
        fs::write(&chain, certificate).unwrap();
        fs::write(&key_path, key.serialize_pem()).unwrap();
        let pin = KeyPin::of(&Pem::file(&chain)).unwrap();
        Self { chain, key: key_path, pin }
    }

    fn self_signed(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params("irrelevant.example").self_signed(&key).unwrap();
        Self::write(dir, name, &certificate.pem(), &key)
    }

    fn certificate(&self) -> Certificate {
        Certificate::files(&self.chain, &self.key)
    }

    fn der(&self) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let certificate = CertificateDer::from_pem_file(&self.chain).unwrap();
        (certificate, PrivateKeyDer::from_pem_file(&self.key).unwrap())
    }
}

fn params(name: &str) -> CertificateParams {
    CertificateParams::new([name.to_owned()]).unwrap()
}

/// An authority, with its certificate in a file.
struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
    pem: PathBuf,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = params(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let pem = dir.join(format!("{name}.pem"));
        fs::write(&pem, issuer.pem()).unwrap();
        Self { dir: dir.to_owned(), issuer, pem }
    }

    fn signed(&self, file: &str, params: &CertificateParams) -> Held {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Held::write(&self.dir, file, &certificate.pem(), &key)
    }

    fn trust(&self) -> Trust {
        Trust::Authorities(Pem::file(&self.pem))
    }
}

fn expired(name: &str) -> CertificateParams {
    let mut params = params(name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    params
}

fn may_all(name: &str) -> Peer {
    Peer { may: vec![Right::everything()], ..Peer::named(name) }
}

fn with_keys(name: &str, keys: &[KeyPin]) -> Peer {
    Peer { keys: keys.to_vec(), ..may_all(name) }
}

fn with_token(name: &str, token: &AccessToken) -> Peer {
    Peer { tokens: vec![token.hash()], ..may_all(name) }
}

fn list(peers: impl IntoIterator<Item = Peer>) -> Access {
    Access::List(AccessList::new(peers).unwrap())
}

fn write_list(path: &Path, peers: &[Peer]) {
    fs::write(path, serde_json::json!({ "peers": peers }).to_string()).unwrap();
}

/// Everything is told within moments, so that tests needn't wait.
fn brisk() -> Deadlines {
    Deadlines { heartbeat: Duration::from_millis(50), ..Deadlines::default() }
}

/// An origin that is served, with a few events.
struct Origin {
    _dir: tempfile::TempDir,
    store: Store,
    server: Server,
}

impl Origin {
    fn new(security: Option<Security>) -> Self {
        let options = ServeOptions { security, deadlines: brisk(), ..ServeOptions::default() };
        Self::with(options, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    fn with(options: ServeOptions, address: SocketAddr) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("origin")).unwrap();
        let server = store.serve_with(address, options).unwrap();
        let origin = Self { _dir: dir, store, server };
        origin.append(20);
        origin
    }

    fn append(&self, events: usize) {
        let to = StreamId::new("s").unwrap();
        for number in 0..events {
            let event = NewEvent::raw("happened", format!("{number}")).unwrap();
            self.store.append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
        }
    }

    fn journal(&self) -> JournalId {
        self.store.journal().id()
    }

    fn end(&self) -> Checkpoint {
        self.store.journal().end()
    }

    fn follow(&self, options: FollowOptions) -> Following {
        self.follow_at(&self.server.local_addr().to_string(), options)
    }

    fn follow_at(&self, address: &str, options: FollowOptions) -> Following {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("mirror")).unwrap();
        let options = FollowOptions { deadlines: brisk(), ..options };
        let mirror = store.mirror_with("origin", address, options).unwrap();
        Following { mirror, _store: store, _dir: dir }
    }

    fn peers(&self) -> Vec<Option<String>> {
        self.server.peers().into_iter().map(|peer| peer.peer).collect()
    }
}

struct Following {
    mirror: Mirror,
    _store: Store,
    _dir: tempfile::TempDir,
}

impl Following {
    /// Waits until the mirror has everything that the origin has now.
    #[track_caller]
    fn converges_with(&self, origin: &Origin) {
        let journal = match self.mirror.wait_ready(SOON) {
            Ok(journal) => journal,
            Err(error) => panic!("{error}: {:?}", self.mirror.status()),
        };
        let last = Position::new(origin.end().position.get() - 1);
        assert_eq!(journal.wait_past(last, SOON), origin.end(), "{:?}", self.mirror.status());
        assert_same_bytes(origin.store.journal(), &journal);
    }

    #[track_caller]
    fn fails_in_tls(&self) -> TlsReason {
        let failed = |status: &MirrorStatus| status.last_error.is_some();
        let status = self.mirror.wait_until(SOON, failed).unwrap();
        assert!(self.mirror.journal().is_none(), "it got something");
        match status.last_error {
            Some(error @ ShippingError::Tls(_)) => {
                assert!(!error.is_halting() && error.hint().contains("ttempts go on"));
                let ShippingError::Tls(failure) = error else { unreachable!() };
                failure.reason()
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn halts_with(&self) -> ErrorCode {
        match self.mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap().state {
            MirrorState::Halted(ShippingError::Reported { failure }) => failure.code,
            other => panic!("{other:?}"),
        }
    }
}

fn secured(tls: Option<ServerTls>, access: Access) -> Security {
    Security::new(SecurityOptions { tls, access }).unwrap()
}

fn tls(trust: Trust) -> FollowOptions {
    FollowOptions { tls: Some(ClientTls::trusting(trust)), ..FollowOptions::default() }
}

fn tls_as(trust: Trust, held: &Held) -> FollowOptions {
    let certificate = Some(held.certificate());
    let tls = Some(ClientTls { certificate, ..ClientTls::trusting(trust) });
    FollowOptions { tls, ..FollowOptions::default() }
}

fn pins(held: &[&Held]) -> Trust {
    Trust::Keys(held.iter().map(|held| held.pin).collect())
}

fn bearing(token: &AccessToken, options: FollowOptions) -> FollowOptions {
    FollowOptions { token: Some(token.clone().into()), ..options }
}

#[test]
fn pinned_keys_are_let_in_from_both_sides_and_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let [server, client, other] =
        ["server", "client", "other"].map(|name| Held::self_signed(dir.path(), name));
    let tls = ServerTls::with(server.certificate());
    let access = list([with_keys("the client", &[client.pin])]);
    let origin = Origin::new(Some(secured(Some(tls), access)));
    let right = origin.follow(tls_as(pins(&[&server]), &client));
    right.converges_with(&origin);
    origin.append(20);
    right.converges_with(&origin);
    assert_eq!(origin.peers(), [Some("the client".to_owned())]);
    assert_eq!(right.mirror.status().reconnects, 0);

    let wrong_server = origin.follow(tls_as(pins(&[&other]), &client));
    assert_eq!(wrong_server.fails_in_tls(), TlsReason::Untrusted);
    let wrong_client = origin.follow(tls_as(pins(&[&server]), &other));
    assert_eq!(wrong_client.fails_in_tls(), TlsReason::Refused);
}

#[test]
fn certificates_of_the_right_authority_are_let_in_and_of_another_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let [ours, theirs] = ["ours", "theirs"].map(|name| Authority::new(dir.path(), name));
    let server = ours.signed("server", &params("127.0.0.1"));
    let client = ours.signed("client", &params("mirror.internal"));
    let forged = theirs.signed("forged", &params("mirror.internal"));
    let tls = ServerTls {
        client_authorities: Some(Pem::file(&ours.pem)),
        require_client_certificate: true,
        ..ServerTls::with(server.certificate())
    };
    let origin = Origin::new(Some(secured(Some(tls), Access::NoList)));
    origin.follow(tls_as(ours.trust(), &client)).converges_with(&origin);
    let wrong_server = origin.follow(tls_as(theirs.trust(), &client));
    assert_eq!(wrong_server.fails_in_tls(), TlsReason::Untrusted);
    let wrong_client = origin.follow(tls_as(ours.trust(), &forged));
    assert_eq!(wrong_client.fails_in_tls(), TlsReason::Refused);
    let nothing = origin.follow(self::tls(ours.trust()));
    assert_eq!(nothing.fails_in_tls(), TlsReason::Refused, "a certificate is required");
}

#[test]
fn expired_certificates_are_refused_and_dates_do_not_matter_to_pins() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let fresh = authority.signed("fresh", &params("127.0.0.1"));
    let old = authority.signed("old", &expired("127.0.0.1"));
    let server = |held: &Held| {
        let tls = ServerTls {
            client_authorities: Some(Pem::file(&authority.pem)),
            ..ServerTls::with(held.certificate())
        };
        Origin::new(Some(secured(Some(tls), Access::NoList)))
    };
    let (origin, stale) = (server(&fresh), server(&old));
    origin.follow(tls_as(authority.trust(), &fresh)).converges_with(&origin);
    assert_eq!(stale.follow(tls(authority.trust())).fails_in_tls(), TlsReason::Expired);
    let client = origin.follow(tls_as(authority.trust(), &old));
    assert_eq!(client.fails_in_tls(), TlsReason::Refused);
    stale.follow(tls(pins(&[&old]))).converges_with(&stale);
}

#[test]
fn the_name_in_the_certificate_must_be_the_one_that_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let server = authority.signed("server", &params("origin.internal"));
    let tls = ServerTls::with(server.certificate());
    let origin = Origin::new(Some(secured(Some(tls), Access::NoList)));
    let by_address = origin.follow(self::tls(authority.trust()));
    assert_eq!(by_address.fails_in_tls(), TlsReason::WrongName);
    let named = |name: &str| {
        let server_name = Some(name.to_owned());
        let tls = Some(ClientTls { server_name, ..ClientTls::trusting(authority.trust()) });
        origin.follow(FollowOptions { tls, ..FollowOptions::default() })
    };
    assert_eq!(named("other.internal").fails_in_tls(), TlsReason::WrongName);
    named("origin.internal").converges_with(&origin);
}

#[test]
fn a_token_is_let_in_within_tls_and_another_or_none_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let server = Held::self_signed(dir.path(), "server");
    let [right, wrong] = [0; 2].map(|_| AccessToken::generate().unwrap());
    let tls = ServerTls::with(server.certificate());
    let origin = Origin::new(Some(secured(Some(tls), list([with_token("holder", &right)]))));
    let following = origin.follow(bearing(&right, self::tls(pins(&[&server]))));
    following.converges_with(&origin);
    assert_eq!(origin.peers(), [Some("holder".to_owned())]);
    let refused = origin.follow(bearing(&wrong, self::tls(pins(&[&server]))));
    assert_eq!(refused.halts_with(), ErrorCode::DENIED);
    let nobody = origin.follow(self::tls(pins(&[&server])));
    assert_eq!(nobody.halts_with(), ErrorCode::AUTH_REQUIRED);
}

/// Only the beginning of a hash being the same is not enough, nor its end.
#[test]
fn a_token_whose_hash_differs_in_one_digit_is_not_let_in() {
    let token = AccessToken::generate().unwrap();
    let hash = token.hash().to_string();
    let flipped = |at: usize| {
        let digit = if &hash[at..=at] == "0" { "1" } else { "0" };
        let hash = format!("{}{digit}{}", &hash[..at], &hash[at + 1..]);
        Peer { tokens: vec![hash.parse().unwrap()], ..may_all("near") }
    };
    for at in [7, 40, 70] {
        let origin = Origin::new(Some(secured(None, list([flipped(at)]))));
        let following = origin.follow(bearing(&token, FollowOptions::default()));
        assert_eq!(following.halts_with(), ErrorCode::DENIED, "digit {at}");
    }
    let origin = Origin::new(Some(secured(None, list([with_token("holder", &token)]))));
    origin.follow(bearing(&token, FollowOptions::default())).converges_with(&origin);
}

/// A peer in clear over the loopback, frame by frame.
struct Raw {
    stream: TcpStream,
    reader: FrameReader,
}

impl Raw {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self { stream, reader: FrameReader::new() }
    }

    fn say(&mut self, message: &Message<'_>) {
        let mut out = Vec::new();
        message.encode(&mut out);
        self.stream.write_all(&out).unwrap();
    }

    fn hello(&mut self, token: &AccessToken) {
        let token = Presented::new(token.expose().as_bytes());
        self.say(&Message::Hello(hello(Authentication::Token(token))));
        let mut buffer = [0; 4096];
        while self.reader.next_message().unwrap().is_none() {
            let len = self.stream.read(&mut buffer).unwrap();
            assert_ne!(len, 0, "closed before WELCOME");
            self.reader.push(&buffer[..len]);
        }
    }

    /// All bytes up to the end of the connection.
    fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        drop(self.stream.read_to_end(&mut rest));
        rest
    }
}

fn hello(authentication: Authentication) -> Hello {
    Hello {
        versions: PROTOCOL_VERSIONS,
        features: 0,
        max_frame: 1 << 20,
        node: None,
        nonce: [1; 16],
        authentication,
        agent: "test".to_owned(),
    }
}

#[test]
fn what_may_not_be_had_looks_exactly_like_what_is_not_there() {
    let token = AccessToken::generate().unwrap();
    let elsewhere = JournalId::from_bytes([9; 16]);
    let right = Right::verbatim(elsewhere);
    let peer = Peer { may: vec![right], ..with_token("holder", &token) };
    let (with, without) = (list([peer]), list([with_token("holder", &token)]));
    let origin = Origin::new(Some(secured(None, with.clone())));
    let other = Origin::new(Some(secured(None, with)));
    let answer = |origin: &Origin, from: Option<Checkpoint>| {
        let mut raw = Raw::connect(origin.server.local_addr());
        raw.hello(&token);
        raw.say(&Message::Subscribe(Subscribe { from, witness: None, window_bytes: 1 << 20 }));
        raw.rest()
    };
    let unknown = Mark::start(JournalId::from_bytes([8; 16])).end;
    let answers = [
        answer(&origin, None),
        answer(&origin, Some(origin.end())),
        answer(&origin, Some(Mark::start(origin.journal()).end)),
        answer(&origin, Some(unknown)),
        answer(&origin, Some(Mark::start(elsewhere).end)),
        answer(&other, Some(origin.end())),
    ];
    assert!(answers.iter().all(|other| *other == answers[0]), "{answers:?}");
    let mut reader = FrameReader::new();
    reader.push(&answers[0]);
    match reader.next_message().unwrap() {
        Some(Message::Error(failure)) => assert_eq!(failure.code, ErrorCode::DENIED),
        other => panic!("{other:?}"),
    }
    // Who may have it is told what it is.
    let origin = Origin::new(Some(secured(None, without)));
    assert_ne!(answer(&origin, Some(unknown)), answers[0]);
    origin.follow(bearing(&token, FollowOptions::default())).converges_with(&origin);
}

#[test]
fn a_right_to_filtered_feeds_is_no_right_to_a_mirror() {
    let token = AccessToken::generate().unwrap();
    let text = format!(
        r#"{{ "peers": [{{ "name": "feeds", "tokens": ["{}"],
              "may": [{{ "journal": "*", "mode": "filtered", "filter": {{}} }}] }}] }}"#,
        token.hash()
    );
    let access = Access::List(text.parse().unwrap());
    let origin = Origin::new(Some(secured(None, access)));
    let following = origin.follow(bearing(&token, FollowOptions::default()));
    assert_eq!(following.halts_with(), ErrorCode::DENIED);
}

#[test]
fn without_authentication_this_machine_is_let_in_unless_a_list_says_otherwise() {
    let nothing = FollowOptions::default;
    let unsecured = Origin::new(None);
    unsecured.follow(nothing()).converges_with(&unsecured);
    let no_list = Origin::new(Some(secured(None, Access::NoList)));
    no_list.follow(nothing()).converges_with(&no_list);
    let token = AccessToken::generate().unwrap();
    let listed = Origin::new(Some(secured(None, list([with_token("holder", &token)]))));
    assert_eq!(listed.follow(nothing()).halts_with(), ErrorCode::AUTH_REQUIRED);
    let local = Peer { anonymous: Anonymous::Loopback, ..may_all("local") };
    let local = Origin::new(Some(secured(None, list([local]))));
    local.follow(nothing()).converges_with(&local);
}

#[test]
fn off_the_loopback_a_server_needs_tls_or_the_word_plaintext_and_a_token_needs_tls() {
    let dir = tempfile::tempdir().unwrap();
    let server = Held::self_signed(dir.path(), "server");
    let token = AccessToken::generate().unwrap();
    let store = Store::create(dir.path().join("store")).unwrap();
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let serve = |security: Option<Security>, allow_plaintext_off_loopback: bool| {
        let options =
            ServeOptions { security, allow_plaintext_off_loopback, ..ServeOptions::default() };
        store.serve_with(everywhere, options).map(Server::shutdown)
    };
    let access = || list([with_token("holder", &token)]);
    let in_clear = || secured(None, access());
    for security in [None, Some(in_clear())] {
        assert!(matches!(serve(security, false), Err(ServeError::Plaintext { .. })));
    }
    serve(Some(in_clear()), true).unwrap();
    let tls = ServerTls::with(server.certificate());
    serve(Some(secured(Some(tls), access())), false).unwrap();

    let elsewhere = "192.0.2.1:7401";
    let plaintext = FollowOptions { allow_plaintext_off_loopback: true, ..Default::default() };
    let refused = store.mirror_with("a", elsewhere, bearing(&token, plaintext.clone()));
    assert!(matches!(refused, Err(ShippingError::Plaintext { .. })), "{refused:?}");
    drop(store.mirror_with("b", elsewhere, plaintext).unwrap());
    let encrypted = bearing(&token, self::tls(pins(&[&server])));
    drop(store.mirror_with("c", elsewhere, encrypted).unwrap());
}

#[test]
fn a_reload_lets_new_ones_in_cuts_off_the_revoked_and_leaves_the_rest_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.json");
    let [stays, goes, comes] = [0; 3].map(|_| AccessToken::generate().unwrap());
    let peers = [with_token("stays", &stays), with_token("goes", &goes)];
    write_list(&path, &peers);
    let security = secured(None, Access::File(path.clone()));
    let origin = Origin::new(Some(security.clone()));
    let [stays, goes, comes_in] = [&stays, &goes, &comes]
        .map(|token| origin.follow(bearing(token, FollowOptions::default())));
    stays.converges_with(&origin);
    goes.converges_with(&origin);
    assert_eq!(comes_in.halts_with(), ErrorCode::DENIED);

    fs::write(&path, "{ \"peers\": [,] }").unwrap();
    let error = security.reload().unwrap_err();
    assert!(matches!(error, SecurityError::Access { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("access.json") && text.contains("line 1 column"), "{text}");
    origin.append(3);
    goes.converges_with(&origin);

    write_list(
        &path,
        &[with_token("stays", &comes), peers[0].clone()].map(|mut peer| {
            peer.name = peer.tokens[0].to_string();
            peer
        }),
    );
    security.reload().unwrap();
    assert_eq!(goes.halts_with(), ErrorCode::DENIED);
    comes_in.mirror.resume();
    origin.append(3);
    comes_in.converges_with(&origin);
    stays.converges_with(&origin);
    assert_eq!(stays.mirror.status().reconnects, 0, "its session went on");
    assert!(goes.mirror.journal().unwrap().end().position < origin.end().position);
}

#[test]
fn a_right_that_is_taken_away_ends_the_session_and_one_that_stays_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.json");
    let token = AccessToken::generate().unwrap();
    let peer = |right: Right| Peer { may: vec![right], ..with_token("holder", &token) };
    write_list(&path, &[peer(Right::everything())]);
    let security = secured(None, Access::File(path.clone()));
    let origin = Origin::new(Some(security.clone()));
    let following = origin.follow(bearing(&token, FollowOptions::default()));
    following.converges_with(&origin);
    write_list(&path, &[peer(Right::verbatim(origin.journal()))]);
    security.reload().unwrap();
    origin.append(3);
    following.converges_with(&origin);
    assert_eq!(following.mirror.status().reconnects, 0);
    write_list(&path, &[peer(Right::verbatim(JournalId::from_bytes([9; 16])))]);
    security.reload().unwrap();
    assert_eq!(following.halts_with(), ErrorCode::DENIED);
}

#[test]
fn keys_of_both_sides_are_rotated_without_an_interruption() {
    let dir = tempfile::tempdir().unwrap();
    let [old_server, new_server, old_client, new_client] =
        ["a", "b", "c", "d"].map(|name| Held::self_signed(dir.path(), name));
    let path = dir.path().join("access.json");
    write_list(&path, &[with_keys("mirror", &[old_client.pin, new_client.pin])]);
    // What the server has in use.
    let used =
        Held { chain: dir.path().join("used.pem"), key: dir.path().join("used.key"), ..old_server };
    let install = |held: &Held| {
        fs::copy(&held.chain, &used.chain).unwrap();
        fs::copy(&held.key, &used.key).unwrap();
    };
    let old_server =
        Held { chain: dir.path().join("a.pem"), key: dir.path().join("a.key"), pin: used.pin };
    install(&old_server);
    let tls = ServerTls::with(used.certificate());
    let security = secured(Some(tls), Access::File(path.clone()));
    let origin = Origin::new(Some(security.clone()));
    let both = pins(&[&old_server, &new_server]);
    let early = origin.follow(tls_as(both.clone(), &old_client));
    early.converges_with(&origin);

    install(&new_server);
    security.reload().unwrap();
    origin.append(3);
    early.converges_with(&origin);
    assert_eq!(early.mirror.status().reconnects, 0, "its session goes on under the old key");
    origin.follow(tls_as(both.clone(), &new_client)).converges_with(&origin);
    let behind = origin.follow(tls_as(pins(&[&old_server]), &new_client));
    assert_eq!(behind.fails_in_tls(), TlsReason::Untrusted);

    write_list(&path, &[with_keys("mirror", &[new_client.pin])]);
    security.reload().unwrap();
    assert_eq!(early.halts_with(), ErrorCode::DENIED, "its key was taken out");
    let revoked = origin.follow(tls_as(both.clone(), &old_client));
    assert_eq!(revoked.fails_in_tls(), TlsReason::Refused);
    origin.follow(tls_as(both, &new_client)).converges_with(&origin);
}

#[test]
fn a_mirror_reads_its_files_before_every_connection() {
    let dir = tempfile::tempdir().unwrap();
    let server = Held::self_signed(dir.path(), "server");
    let [first, second] = [0; 2].map(|_| AccessToken::generate().unwrap());
    let path = dir.path().join("token");
    fs::write(&path, format!("{}\n", first.expose())).unwrap();
    let tls = ServerTls::with(server.certificate());
    let origin = Origin::new(Some(secured(Some(tls), list([with_token("holder", &second)]))));
    let token = Some(TokenSource::File(path.clone()));
    let following = origin.follow(FollowOptions { token, ..self::tls(pins(&[&server])) });
    assert_eq!(following.halts_with(), ErrorCode::DENIED);
    fs::write(&path, second.expose()).unwrap();
    following.mirror.resume();
    following.converges_with(&origin);
}

#[test]
fn settings_that_cannot_work_are_refused_with_the_file_and_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| Held::self_signed(dir.path(), name));
    let new = |tls: ServerTls| {
        Security::new(SecurityOptions { tls: Some(tls), access: Access::NoList }).unwrap_err()
    };
    let missing = Certificate::files(dir.path().join("none.pem"), &a.key);
    let swapped = Certificate::files(&a.key, &a.chain);
    let mixed = Certificate::files(&a.chain, &b.key);
    let errors = [
        (new(ServerTls::with(missing)), "none.pem"),
        (new(ServerTls::with(swapped)), "a.key: no certificate in it"),
        (new(ServerTls::with(mixed)), "a.pem: "),
        (
            new(ServerTls { require_client_certificate: true, ..ServerTls::with(a.certificate()) }),
            "nobody is trusted",
        ),
    ];
    for (error, expected) in errors {
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.code().starts_with("security.") && !error.hint().is_empty());
    }
    let store = Store::create(dir.path().join("store")).unwrap();
    let mirror = |options: FollowOptions| store.mirror_with("m", "127.0.0.1:1", options);
    let nobody = mirror(tls(Trust::Keys(vec![])));
    assert!(matches!(nobody, Err(ShippingError::Security(SecurityError::NobodyTrusted { .. }))));
    let token = Some(TokenSource::File(a.key.clone()));
    let no_token = mirror(FollowOptions { token, ..FollowOptions::default() });
    assert!(matches!(no_token, Err(ShippingError::Security(SecurityError::Token))));
}

#[test]
fn tls_and_plaintext_that_meet_say_so_and_try_again_until_they_fit() {
    let dir = tempfile::tempdir().unwrap();
    let server = Held::self_signed(dir.path(), "server");
    let open = Peer { anonymous: Anonymous::Loopback, ..may_all("local") };
    let security = secured(Some(ServerTls::with(server.certificate())), list([open]));
    let encrypted = Origin::new(Some(security.clone()));
    let in_clear = encrypted.follow(FollowOptions::default());
    assert_eq!(in_clear.fails_in_tls(), TlsReason::Plaintext);

    let mut plain = Origin::new(None);
    let address = plain.server.local_addr();
    let following = plain.follow(tls(pins(&[&server])));
    assert_eq!(following.fails_in_tls(), TlsReason::NotTls);
    plain.server.shutdown();
    let options = ServeOptions { security: Some(security), ..ServeOptions::default() };
    plain.server = plain.store.serve_with(address, options).unwrap();
    following.converges_with(&plain);
}

/// Believes anybody: a peer that tests servers.
#[derive(Debug)]
struct Gullible;

impl rustls::client::danger::ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Shows one certificate and signs with the key of another.
#[derive(Debug)]
struct Forger(Arc<CertifiedKey>);

impl Forger {
    fn showing(shown: &Held, having: &Held) -> Self {
        let key = ring::default_provider().key_provider.load_private_key(having.der().1).unwrap();
        Self(Arc::new(CertifiedKey::new(vec![shown.der().0], key)))
    }
}

impl rustls::server::ResolvesServerCert for Forger {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

impl rustls::client::ResolvesClientCert for Forger {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

type Versions = &'static [&'static rustls::SupportedProtocolVersion];

static TLS12: Versions = &[&rustls::version::TLS12];
static TLS13: Versions = &[&rustls::version::TLS13];

struct Client {
    versions: Versions,
    alpn: Option<&'static [u8]>,
    shows: Option<Forger>,
}

impl Default for Client {
    fn default() -> Self {
        Self { versions: TLS13, alpn: Some(ALPN), shows: None }
    }
}

impl Client {
    /// Says HELLO with nothing in it, and returns what comes back.
    fn answer(self, address: SocketAddr) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Message::Hello(hello(Authentication::None)).encode(&mut out);
        self.answer_to(address, &out)
    }

    fn answer_to(self, address: SocketAddr, out: &[u8]) -> std::io::Result<Vec<u8>> {
        let provider = Arc::new(ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Gullible));
        let mut config = match self.shows {
            None => builder.with_no_client_auth(),
            Some(forger) => builder.with_client_cert_resolver(Arc::new(forger)),
        };
        config.alpn_protocols = self.alpn.iter().map(|alpn| alpn.to_vec()).collect();
        let name = ServerName::try_from("origin.internal").unwrap();
        let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(SOON))?;
        let mut tls = rustls::StreamOwned::new(connection, stream);
        tls.write_all(out)?;
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match tls.read(&mut buffer)? {
                0 => return Ok(answer),
                len => answer.extend_from_slice(&buffer[..len]),
            }
            // WELCOME is enough.
            if answer.get(4) == Some(&2) {
                return Ok(answer);
            }
        }
    }
}

fn open_tls_server(held: &Held, peers: impl IntoIterator<Item = Peer>) -> Origin {
    let tls = ServerTls::with(held.certificate());
    Origin::new(Some(secured(Some(tls), list(peers))))
}

fn anybody() -> Peer {
    Peer { anonymous: Anonymous::Anywhere, ..may_all("anybody") }
}

#[track_caller]
fn refused_in_tls(answer: std::io::Result<Vec<u8>>, because: &str) {
    let error = answer.unwrap_err().to_string();
    assert!(error.contains(because), "{error}");
}

#[test]
fn only_tls_1_3_and_the_protocol_of_headwater_are_spoken() {
    let dir = tempfile::tempdir().unwrap();
    let origin = open_tls_server(&Held::self_signed(dir.path(), "server"), [anybody()]);
    let address = origin.server.local_addr();
    let welcome = Client::default().answer(address).unwrap();
    assert_eq!(welcome[4], 2, "WELCOME");
    let old = Client { versions: TLS12, ..Client::default() };
    refused_in_tls(old.answer(address), "ProtocolVersion");
    let other = Client { alpn: Some(b"h2"), ..Client::default() };
    refused_in_tls(other.answer(address), "NoApplicationProtocol");
    let none = Client { alpn: None, ..Client::default() };
    assert!(none.answer(address).map_or(true, |answer| answer.is_empty()));
}

#[test]
fn a_pinned_certificate_without_its_key_is_worth_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let [server, client, forger] =
        ["server", "client", "forger"].map(|name| Held::self_signed(dir.path(), name));
    // Towards the origin.
    let origin = open_tls_server(&server, [with_keys("client", &[client.pin])]);
    let address = origin.server.local_addr();
    let honest = Client { shows: Some(Forger::showing(&client, &client)), ..Client::default() };
    assert_eq!(honest.answer(address).unwrap()[4], 2, "WELCOME");
    let forged = Client { shows: Some(Forger::showing(&client, &forger)), ..Client::default() };
    refused_in_tls(forged.answer(address), "alert");

    // Towards the mirror.
    let provider = Arc::new(ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Forger::showing(&server, &forger)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let token = AccessToken::generate().unwrap();
    let options = bearing(&token, tls(pins(&[&server])));
    let following = origin.follow_at(&listener.local_addr().unwrap().to_string(), options);
    let (stream, _) = listener.accept().unwrap();
    let connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
    let mut heard = Vec::new();
    let read = rustls::StreamOwned::new(connection, stream).read_to_end(&mut heard);
    assert!(read.is_err() && heard.is_empty(), "the token went to a forger");
    assert_eq!(following.fails_in_tls(), TlsReason::Untrusted);
}

/// One that has the right key, and isn't what was expected at this address: a web server behind the same certificate.
#[test]
fn a_token_does_not_go_to_who_speaks_another_protocol() {
    let dir = tempfile::tempdir().unwrap();
    let server = Held::self_signed(dir.path(), "server");
    let origin = open_tls_server(&server, [anybody()]);
    let provider = Arc::new(ring::default_provider());
    // It names no protocol at all, and takes whoever comes.
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(TLS13)
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Forger::showing(&server, &server)));
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let token = AccessToken::generate().unwrap();
    let options = bearing(&token, tls(pins(&[&server])));
    let following = origin.follow_at(&listener.local_addr().unwrap().to_string(), options);
    for _ in 0..5 {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
        let mut heard = Vec::new();
        drop(rustls::StreamOwned::new(connection, stream).read_to_end(&mut heard));
        assert!(heard.is_empty(), "{} bytes went to something else", heard.len());
    }
    assert_eq!(following.fails_in_tls(), TlsReason::Incompatible);
}

#[test]
fn a_first_frame_of_more_than_4_kib_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let origin = open_tls_server(&Held::self_signed(dir.path(), "server"), [anybody()]);
    let mut frame = vec![0; 12 + 4097];
    frame[..5].copy_from_slice(&[1, 0x10, 0, 0, 1]); // 4097 bytes, HELLO
    let answer = Client::default().answer_to(origin.server.local_addr(), &frame).unwrap();
    let mut reader = FrameReader::new();
    reader.push(&answer);
    match reader.next_message().unwrap() {
        Some(Message::Error(failure)) => assert_eq!(failure.code, ErrorCode::FRAME_TOO_LONG),
        other => panic!("{other:?}"),
    }
}

/// A server that lets one handshake be under way, for 300 ms.
fn hurried(held: &Held) -> Origin {
    let tls = ServerTls::with(held.certificate());
    let options = ServeOptions {
        security: Some(secured(Some(tls), list([anybody()]))),
        deadlines: Deadlines { handshake: Duration::from_millis(300), ..brisk() },
        handshakes_max: 1,
        ..ServeOptions::default()
    };
    Origin::with(options, SocketAddr::from(([127, 0, 0, 1], 0)))
}

#[test]
fn a_handshake_that_is_dribbled_is_cut_off_and_keeps_nobody_out() {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::self_signed(dir.path(), "server");
    let origin = hurried(&held);
    let mut slow = TcpStream::connect(origin.server.local_addr()).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    // The beginning of a record of 16 KiB, and then a byte at a time: it isn't whole before minutes have passed.
    slow.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3F, 0xFC]).unwrap();
    let (began, mut byte) = (Instant::now(), [0]);
    let closed = |read: std::io::Result<usize>| match read {
        Ok(len) => len == 0,
        Err(error) => {
            !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        }
    };
    while !closed(slow.read(&mut byte)) {
        assert!(began.elapsed() < SOON, "it is never cut off");
        drop(slow.write_all(&[0]));
    }
    assert!(began.elapsed() >= Duration::from_millis(250), "{:?}", began.elapsed());
    origin.follow(tls(pins(&[&held]))).converges_with(&origin);
}

#[test]
fn garbage_in_a_handshake_is_cut_off_and_the_rest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::self_signed(dir.path(), "server");
    let origin = open_tls_server(&held, [anybody()]);
    let following = origin.follow(tls(pins(&[&held])));
    following.converges_with(&origin);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for round in 0..60 {
        let mut bytes: Vec<u8> = (0..rng.usize(5..600)).map(|_| rng.u8(..)).collect();
        if round % 2 == 0 {
            // A handshake record with a length, so that what is within is looked at.
            let length = bytes.len() - 5;
            bytes[..5].copy_from_slice(&[0x16, 3, 1, (length >> 8) as u8, length as u8]);
        }
        let mut stream = TcpStream::connect(origin.server.local_addr()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        drop(stream.write_all(&bytes));
        drop(stream.shutdown(std::net::Shutdown::Write));
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer));
        assert!(answer.len() < 300, "an alert and nothing else: {} bytes", answer.len());
    }
    origin.append(3);
    following.converges_with(&origin);
    assert_eq!(following.mirror.status().reconnects, 0);
}

#[test]
fn secrets_show_in_no_debug_output() {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::self_signed(dir.path(), "server");
    let token = AccessToken::generate().unwrap();
    let key = fs::read_to_string(&held.key).unwrap();
    let certificate = Certificate { chain: Pem::file(&held.chain), key: Pem::text(key.clone()) };
    let tls = ServerTls::with(certificate.clone());
    let security = secured(Some(tls), list([with_token("holder", &token)]));
    let client =
        ClientTls { certificate: Some(certificate), ..ClientTls::trusting(pins(&[&held])) };
    let follow = FollowOptions { tls: Some(client), ..FollowOptions::default() };
    let follow = bearing(&token, follow);
    let presented = Presented::new(token.expose().as_bytes());
    let shown = [
        format!("{security:?}"),
        format!("{follow:?}"),
        format!("{:?}", hello(Authentication::Token(presented))),
        format!("{:?}", ServeOptions { security: Some(security), ..ServeOptions::default() }),
    ];
    let secret = &token.expose()[4..];
    for shown in shown {
        assert!(!shown.contains(secret) && !shown.contains("PRIVATE KEY"), "{shown}");
        let bytes = format!("{:?}", &secret.as_bytes()[..8]);
        assert!(!shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
    }
}

/// What tells application data of which nothing is to be left from that which is to be said.
const NOTHING: &[u8] = b"nothing";

/// Encrypts as the cipher suite does, but for [`NOTHING`], of which it makes a record without a byte: rustls itself makes
/// none.
struct Hollow(&'static dyn Tls13AeadAlgorithm);

struct HollowEncrypter(Box<dyn MessageEncrypter>);

impl Tls13AeadAlgorithm for Hollow {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(HollowEncrypter(self.0.encrypter(key, iv)))
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.0.decrypter(key, iv)
    }

    fn key_len(&self) -> usize {
        self.0.key_len()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: Iv,
    ) -> Result<rustls::ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.0.extract_keys(key, iv)
    }
}

impl MessageEncrypter for HollowEncrypter {
    fn encrypt(
        &mut self,
        message: OutboundPlainMessage<'_>,
        sequence: u64,
    ) -> Result<OutboundOpaqueMessage, rustls::Error> {
        let payload = message.payload.to_vec();
        let payload = if payload == NOTHING { &[] } else { payload.as_slice() };
        let payload = OutboundChunks::Single(payload);
        self.0.encrypt(OutboundPlainMessage { payload, ..message }, sequence)
    }

    fn encrypted_payload_len(&self, payload_len: usize) -> usize {
        self.0.encrypted_payload_len(payload_len)
    }
}

/// A client of which every record can be seen, and that can say nothing.
struct HollowClient {
    tls: rustls::ClientConnection,
    stream: TcpStream,
}

impl HollowClient {
    /// Comes through the handshake, saying so many bytes at once.
    fn connect(address: SocketAddr, piece: usize) -> Self {
        let rustls::SupportedCipherSuite::Tls13(suite) =
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256
        else {
            unreachable!()
        };
        let (suite_id, hash_provider) = (suite.common.suite, suite.common.hash_provider);
        // For as long as the test runs: rustls wants it for ever.
        let hollow = Box::leak(Box::new(rustls::Tls13CipherSuite {
            common: rustls::crypto::CipherSuiteCommon {
                suite: suite_id,
                hash_provider,
                confidentiality_limit: suite.common.confidentiality_limit,
            },
            hkdf_provider: suite.hkdf_provider,
            aead_alg: Box::leak(Box::new(Hollow(suite.aead_alg))),
            quic: None,
        }));
        let provider = rustls::crypto::CryptoProvider {
            cipher_suites: vec![rustls::SupportedCipherSuite::Tls13(hollow)],
            ..ring::default_provider()
        };
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(TLS13)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Gullible))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let name = ServerName::try_from("origin.internal").unwrap();
        let tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut client = Self { tls, stream };
        while client.tls.is_handshaking() {
            let said = client.records();
            client.say(&said, piece);
            if client.tls.is_handshaking() {
                client.tls.read_tls(&mut client.stream).unwrap();
                client.tls.process_new_packets().unwrap();
            }
        }
        let said = client.records();
        client.say(&said, piece);
        client
    }

    /// What it has to say, encrypted.
    fn records(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut out).unwrap();
        }
        out
    }

    fn say(&mut self, records: &[u8], piece: usize) {
        records.chunks(piece).for_each(|piece| self.stream.write_all(piece).unwrap());
    }
}

/// A peer without any certificate came through the handshake of TLS, and
/// said a KeyUpdate and a record without a byte, over and over. What rustls counts against the one is forgotten with the
/// other, so the event loop read on for as long as it was talked to: no commit left, no heartbeat, and no deadline was
/// looked at.
#[test]
fn a_peer_that_says_nothing_at_length_is_cut_off_and_others_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let held = Held::self_signed(dir.path(), "server");
    let tls_server = ServerTls::with(held.certificate());
    let options = ServeOptions {
        security: Some(secured(Some(tls_server), list([anybody()]))),
        // It isn't this that ends it.
        deadlines: Deadlines { handshake: 10 * SOON, ..brisk() },
        ..ServeOptions::default()
    };
    let origin = Origin::with(options, SocketAddr::from(([127, 0, 0, 1], 0)));
    let following = origin.follow(tls(pins(&[&held])));
    following.converges_with(&origin);
    let mut hostile = HollowClient::connect(origin.server.local_addr(), usize::MAX);
    let mut nothing = Vec::new();
    while nothing.len() < 1 << 20 {
        hostile.tls.refresh_traffic_keys().unwrap();
        hostile.tls.writer().write_all(NOTHING).unwrap();
        nothing.extend(hostile.records());
    }
    let mut answers = hostile.stream.try_clone().unwrap();
    let saying = std::thread::spawn(move || drop(hostile.stream.write_all(&nothing)));
    // Closed or reset, and not still there.
    if let Err(error) = std::io::copy(&mut answers, &mut std::io::sink()) {
        let kind = error.kind();
        let waits = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::TimedOut];
        assert!(!waits.contains(&kind), "it is heard for ever: {error}");
    }
    saying.join().unwrap();
    origin.append(3);
    following.converges_with(&origin);
    assert_eq!(following.mirror.status().reconnects, 0);
    assert_eq!(origin.server.refused().of(EndReason::Tls), 1, "{:?}", origin.server.refused());
}

/// What is for TLS itself is counted, but an honest peer may come in single bytes, and has new keys now and then.
#[test]
fn a_peer_that_comes_in_single_bytes_and_with_new_keys_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let origin = open_tls_server(&Held::self_signed(dir.path(), "server"), [anybody()]);
    let mut honest = HollowClient::connect(origin.server.local_addr(), 1);
    let mut out = Vec::new();
    Message::Hello(hello(Authentication::None)).encode(&mut out);
    for byte in out {
        honest.tls.refresh_traffic_keys().unwrap();
        honest.tls.writer().write_all(&[byte]).unwrap();
        let said = honest.records();
        honest.say(&said, 7);
    }
    let mut answer = [0; 5];
    let HollowClient { mut tls, mut stream } = honest;
    rustls::Stream::new(&mut tls, &mut stream).read_exact(&mut answer).unwrap();
    assert_eq!(answer[4], 2, "WELCOME");
}
