//! S9: peers of which one speaks a version of the protocol that the other doesn't know work together, in both
//! directions.
//!
//! ```text
//!   mirror ──▶ what it says, as one of another version would ──▶ origin
//!          ◀── what it says, as one of another version would ◀──
//! ```

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use headwater::fs::os::OsFs;
use headwater::shipping::message::{
    ErrorCode, FrameError, FrameReader, Message, PROTOCOL_VERSIONS, VersionRange,
};
use headwater::shipping::{Mirror, MirrorState, MirrorStatus, ShippingError, Violation, follow};

use super::impatient_follower;
use crate::shipping::{Origin, SOON, assert_same_bytes, converged, small};
use crate::subscriber::Subscriber;

const HELLO: u8 = 0x01;
const WELCOME: u8 = 0x02;
const DATA: u8 = 0x10;
const OPTIONAL: u8 = 1;

/// A frame with a right checksum.
fn frame(kind: u8, flags: u8, subscription: u16, payload: &[u8]) -> Vec<u8> {
    let mut front = (payload.len() as u32).to_le_bytes().to_vec();
    front.extend([kind, flags]);
    front.extend(subscription.to_le_bytes());
    let covered = if kind == DATA { &payload[..32] } else { payload };
    let crc = crc32fast::hash(&[&front[..], covered].concat());
    [&front[..], &crc.to_le_bytes(), payload].concat()
}

/// What a later version might say that this one needn't understand.
fn optional() -> Vec<u8> {
    [frame(0x9A, OPTIONAL, 0, b"skip"), frame(0x99, 0xF0 | OPTIONAL, 7, &[3; 90])].concat()
}

/// Puts another payload into a frame.
fn with_payload(whole: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut payload = whole[12..].to_vec();
    change(&mut payload);
    frame(whole[4], whole[5], 0, &payload)
}

type Change = Arc<dyn Fn(u8, &[u8]) -> Vec<u8> + Send + Sync>;

/// Passes on frames as they were changed.
fn translator(origin: SocketAddr, of_mirror: Change, of_origin: Change) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mirror in listener.incoming().map_while(Result::ok) {
            let Ok(upstream) = TcpStream::connect(origin) else { continue };
            let (mirror, upstream) = (Arc::new(mirror), Arc::new(upstream));
            for (from, to, change) in
                [(&mirror, &upstream, &of_mirror), (&upstream, &mirror, &of_origin)]
            {
                let (from, to, change) = (Arc::clone(from), Arc::clone(to), Arc::clone(change));
                std::thread::spawn(move || {
                    drop(translate(&from, &to, &*change));
                    drop(to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    address
}

fn translate(
    mut from: &TcpStream,
    mut to: &TcpStream,
    change: &dyn Fn(u8, &[u8]) -> Vec<u8>,
) -> std::io::Result<()> {
    loop {
        let mut whole = vec![0; 12];
        from.read_exact(&mut whole)?;
        let len = u32::from_le_bytes(whole[..4].try_into().unwrap()) as usize;
        whole.resize(12 + len, 0);
        from.read_exact(&mut whole[12..])?;
        to.write_all(&change(whole[4], &whole))?;
    }
}

fn unchanged() -> Change {
    Arc::new(|_, whole| whole.to_vec())
}

/// A HELLO of another range of versions, with features that nobody knows, longer than today's, and something that may
/// be passed over behind it.
fn hello_of(versions: VersionRange, whole: &[u8]) -> Vec<u8> {
    let mut hello = with_payload(whole, |payload| {
        payload[4..6].copy_from_slice(&versions.min.to_le_bytes());
        payload[6..8].copy_from_slice(&versions.max.to_le_bytes());
        for byte in &mut payload[9..16] {
            *byte = 0xFF;
        }
        payload.extend([0xAB; 48]);
    });
    hello.extend(optional());
    hello
}

fn mirror_through(dir: &std::path::Path, address: SocketAddr) -> Mirror {
    follow(Arc::new(OsFs), dir, address.to_string(), impatient_follower()).unwrap()
}

#[test]
fn s9_a_mirror_of_the_next_and_of_the_previous_version_follows_an_origin_of_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..80);
    let VersionRange { min, max } = PROTOCOL_VERSIONS;
    for (number, (lowest, highest)) in [(min, max + 1), (min - 1, max)].into_iter().enumerate() {
        let versions = VersionRange { min: lowest, max: highest };
        let agreed = Arc::new(AtomicU16::new(0));
        let seen = Arc::clone(&agreed);
        let of_mirror: Change = Arc::new(move |kind, whole| match kind {
            HELLO => hello_of(versions, whole),
            _ => [whole.to_vec(), optional()].concat(),
        });
        let of_origin: Change = Arc::new(move |kind, whole| {
            if kind == WELCOME {
                seen.store(u16::from_le_bytes([whole[12], whole[13]]), Ordering::Release);
                assert_eq!(whole[21..28], [0; 7], "only what both know is used");
            }
            whole.to_vec()
        });
        let address = translator(origin.address, of_mirror, of_origin);
        let mirror = mirror_through(&dir.path().join(format!("mirror-{number}")), address);
        converged(&mirror, &origin);
        origin.append(0..10);
        assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
        assert_eq!(agreed.load(Ordering::Acquire), max, "the highest that both know");
        assert_eq!(mirror.status().reconnects, 0, "{:?}", mirror.status());
    }
}

#[test]
fn s9_a_mirror_of_this_version_follows_an_origin_of_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..80);
    // It has chosen this version, and says more than this version knows: between all frames.
    let of_origin: Change = Arc::new(|_, whole| [optional(), whole.to_vec(), optional()].concat());
    let address = translator(origin.address, unchanged(), of_origin);
    let mirror = mirror_through(&dir.path().join("mirror"), address);
    converged(&mirror, &origin);
    origin.append(0..10);
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
    assert_eq!(mirror.status().reconnects, 0, "{:?}", mirror.status());
}

/// They say so, stop, and go on once one of them was replaced.
#[test]
fn s9_without_a_version_in_common_both_say_which_they_speak_and_nothing_is_shipped() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let lowest = Arc::new(AtomicU16::new(PROTOCOL_VERSIONS.max + 1));
    let wanted = Arc::clone(&lowest);
    let of_mirror: Change = Arc::new(move |kind, whole| match kind {
        HELLO => {
            let min = wanted.load(Ordering::Acquire);
            hello_of(VersionRange { min, max: min + 1 }, whole)
        }
        _ => whole.to_vec(),
    });
    let address = translator(origin.address, of_mirror, unchanged());
    let mirror = mirror_through(&dir.path().join("mirror"), address);
    let status = mirror.wait_until(SOON, MirrorStatus::is_halted).unwrap();
    match status.state {
        MirrorState::Halted(error @ ShippingError::Version { versions }) => {
            assert_eq!(versions, PROTOCOL_VERSIONS);
            assert!(error.to_string().contains("speaks versions"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert!(mirror.journal().is_none());
    lowest.store(PROTOCOL_VERSIONS.max, Ordering::Release);
    mirror.resume();
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}

/// What isn't agreed upon isn't believed, and what must be understood isn't passed over.
#[test]
fn s9_a_version_or_feature_that_was_not_offered_and_frames_that_must_be_understood_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..10);
    let welcome = |change: fn(&mut Vec<u8>)| -> Change {
        Arc::new(move |kind, whole| match kind {
            WELCOME => with_payload(whole, change),
            _ => whole.to_vec(),
        })
    };
    let mandatory: Change = Arc::new(|kind, whole| match kind {
        DATA => frame(0x77, 0, 0, b"understand this"),
        _ => whole.to_vec(),
    });
    let cases = [
        ("another version", welcome(|payload| payload[0] += 1)),
        ("an unknown feature", welcome(|payload| payload[15] |= 0x80)),
        ("a longer WELCOME", welcome(|payload| payload.push(0))),
        ("a frame that must be understood", mandatory),
    ];
    for (number, (what, of_origin)) in cases.into_iter().enumerate() {
        let address = translator(origin.address, unchanged(), of_origin);
        let mirror = mirror_through(&dir.path().join(format!("mirror-{number}")), address);
        let tried = |status: &MirrorStatus| status.last_error.is_some();
        let error = mirror.wait_until(SOON, tried).unwrap().last_error.unwrap();
        println!("{what}: {error}");
        match error {
            ShippingError::Violation(Violation::Welcome) => assert!(number < 2),
            ShippingError::Violation(Violation::Frame(FrameError::Malformed { .. })) => {
                assert_eq!(number, 2);
            }
            ShippingError::Violation(Violation::Frame(FrameError::UnknownType(0x77))) => {
                assert_eq!(number, 3);
            }
            other => panic!("{what}: {other}"),
        }
        let end = mirror.journal().map(|journal| journal.end().position.get());
        assert!(end.is_none_or(|end| end == 0), "{what}: something was applied");
    }
    // The origin's side: in every state.
    let begin = Subscriber::new(None, 1000).begin();
    for said in [Vec::new(), begin] {
        let mut stream = TcpStream::connect(origin.address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(&[said, optional(), frame(0x77, 0, 0, b"")].concat()).unwrap();
        let (mut reader, mut heard) = (FrameReader::new(), Vec::new());
        stream.read_to_end(&mut heard).unwrap();
        reader.allow_data(1 << 20);
        reader.push(&heard);
        let mut last = None;
        while let Some(message) = reader.next_message().unwrap() {
            if let Message::Error(failure) = message {
                last = Some(failure.code);
            }
        }
        assert_eq!(last, Some(ErrorCode::PROTOCOL));
    }
}
