//! S7, seen from a subscriber: an origin that sends without end fills nobody's memory, and is told why it is left.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use headwater::fs::os::OsFs;
use headwater::fs::sim::{Op, SimFs};
use headwater::shipping::message::{
    Data, Diverged, Divergence, ErrorCode, FEATURE_FILTERED, FEATURE_PROBE, FrameReader, Message,
    OriginEnd, Probed, Skip, Speaker, Subscribed, Welcome,
};
use headwater::shipping::{
    FeedPart, FollowOptions, MirrorStatus, ShippingError, Violation, follow, follow_feed,
};
use headwater::{Checkpoint, Incarnation, JournalId, JournalOptions, NodeId, Position};

use super::impatient_follower;
use super::lag::{Gate, Opens};
use crate::races::Hooked;
use crate::shipping::{Origin, SOON, converged, small, start_mirror};

/// An origin that welcomes everybody, and then does as it likes with whatever it hears.
fn hostile_origin(
    answer: impl Fn(&Message<'_>, &mut TcpStream) -> std::io::Result<()> + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            drop(converse(stream, &answer));
        }
    });
    address
}

fn converse(
    mut stream: TcpStream,
    answer: impl Fn(&Message<'_>, &mut TcpStream) -> std::io::Result<()>,
) -> std::io::Result<()> {
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        reader.push(&buffer[..len]);
        while let Ok(Some(message)) = reader.next_message() {
            match &message {
                Message::Hello(hello) => {
                    let welcome = Welcome {
                        version: 1,
                        heartbeat_ms: 1000,
                        max_frame: 8192,
                        features: hello.features & (FEATURE_PROBE | FEATURE_FILTERED),
                        node: NodeId::from_bytes([9; 16]),
                        session: [1; 16],
                        nonce: hello.nonce,
                        now_us: 0,
                    };
                    stream.write_all(&frames([Message::Welcome(welcome)]))?;
                }
                message => answer(message, &mut stream)?,
            }
        }
    }
}

fn frames<'a>(messages: impl IntoIterator<Item = Message<'a>>) -> Vec<u8> {
    let mut out = Vec::new();
    messages.into_iter().for_each(|message| message.encode(&mut out));
    out
}

/// Each of the answers is looked up in the mirror's files, which takes longer than to receive it.
#[test]
fn s7_an_origin_that_answers_one_probe_again_and_again_is_left_with_the_first_answer() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..60);
    let mirror = start_mirror(&dir.path().join("mirror"), &origin);
    let end = converged(&mirror, &origin).end();
    mirror.stop().unwrap();
    let address = hostile_origin(move |message, stream| match message {
        Message::Subscribe(_) => {
            let (divergence, speaker) = (Divergence::Fork, Speaker::Origin);
            let diverged = Diverged { divergence, at_witness: false, speaker, common: None, end };
            stream.write_all(&frames([Message::Diverged(diverged)]))
        }
        Message::Probe(probe) => {
            let answer = || Message::Probed(Probed { ends: vec![None; probe.positions.len()] });
            stream.write_all(&frames((0..1000).map(|_| answer())))
        }
        _ => Ok(()),
    });
    let options = impatient_follower();
    let path = dir.path().join("mirror");
    let mirror = follow(Arc::new(OsFs), &path, address.to_string(), options).unwrap();
    let status = mirror.wait_until(SOON, |status| status.last_error.is_some()).unwrap();
    match status.last_error {
        Some(ShippingError::Violation(Violation::Unexpected { frame: "PROBED", .. })) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(mirror.journal().unwrap().end(), end);
}

const SKIPS: u64 = 300_000;

fn place(position: u64) -> Checkpoint {
    Checkpoint {
        journal: JournalId::from_bytes([7; 16]),
        epoch: 1,
        incarnation: Incarnation::new(5),
        offset: position * 64,
        position: Position::new(position),
        chain: headwater::format::batch::genesis(JournalId::from_bytes([7; 16])),
    }
}

/// They take no room in the window, and the subscriber's disk hangs: nothing of it can be noted.
#[test]
fn s7_an_origin_that_skips_without_end_is_left_before_the_subscribers_memory_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::default());
    let for_disk = Arc::clone(&gate);
    let fs = Hooked::new(&SimFs::new(1), move |op, _| {
        if op == Op::SyncData {
            for_disk.pass();
        }
        Ok(())
    });
    let (go, gone) = channel::<()>();
    let (done, is_done) = channel();
    let address = hostile_origin(move |message, stream| match message {
        Message::SubscribeFeed(_, request) => {
            let subscribed =
                Subscribed { end: place(SKIPS), first_position: Position::START, path: vec![] };
            stream
                .write_all(&frames([Message::SubscribedFeed(subscribed, request.terms.clone())]))?;
            if gone.recv().is_err() {
                return Ok(());
            }
            let origin_end = OriginEnd::from(&place(SKIPS));
            let skip = |n: u64| {
                let (from, behind) = (Position::new(n), place(n + 1));
                Message::Skip(Skip { from, behind, origin_end })
            };
            let sent = (0..SKIPS / 1000).take_while(|part| {
                stream.write_all(&frames((part * 1000..part * 1000 + 1000).map(skip))).is_ok()
            });
            done.send(sent.count()).map_err(std::io::Error::other)
        }
        _ => Ok(()),
    });
    let (path, options) = (dir.path().join("feed"), impatient_follower());
    let filter = FeedPart::types(["placed"]);
    let address = address.to_string();
    let feed = follow_feed(Arc::new(fs), &path, address, filter.into(), options).unwrap();
    let _opens = Opens(&gate);
    feed.wait_until(SOON, |status| status.received.is_some()).unwrap();
    gate.set_closed(true);
    go.send(()).unwrap();
    drop(go);
    println!("{} thousand were sent", is_done.recv_timeout(SOON).unwrap());
    gate.set_closed(false);
    let deadline = Instant::now() + SOON;
    let skips = loop {
        match feed.status().last_error {
            Some(ShippingError::Violation(Violation::Skips { limit })) => break limit,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        std::thread::yield_now();
    };
    assert!(u64::from(skips) < SKIPS / 2);
}

/// A small one: what fits into it is sent at once.
const WINDOW_BYTES: u32 = 64 << 10;

fn hangs_at(gate: &Arc<Gate>) -> Arc<Hooked> {
    let for_disk = Arc::clone(gate);
    Arc::new(Hooked::new(&SimFs::new(1), move |op, _| {
        if op == Op::SyncData {
            for_disk.pass();
        }
        Ok(())
    }))
}

/// Header pages take no room in the window, and the shortest batch lets the next one come. The mirror's disk hangs from its
/// first file on, so nobody takes them.
#[test]
fn s7_an_origin_of_nothing_but_header_pages_is_left_before_the_mirrors_memory_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::default());
    let for_origin = Arc::clone(&gate);
    let (tell, told) = channel();
    let address = hostile_origin(move |message, stream| match message {
        Message::Subscribe(_) => {
            for_origin.set_closed(true);
            let (end, path) = (place(1 << 30), vec![NodeId::from_bytes([9; 16])]);
            let subscribed = Subscribed { end, first_position: Position::START, path };
            stream.write_all(&frames([Message::Subscribed(subscribed)]))?;
            let (page, mut bytes) = ([7; 4096], [7; 128]);
            bytes[60..64].copy_from_slice(&128_u32.to_le_bytes());
            let segments = (0..2000).take_while(|n| {
                let (offset, origin_end) = (n * 128, OriginEnd::from(&end));
                let data = Data { offset, origin_end, continued: false, bytes: &bytes };
                stream.write_all(&frames([Message::Segment(&page), Message::Data(data)])).is_ok()
            });
            println!("{} segments were sent", segments.count());
            Ok(())
        }
        Message::Error(failure) => tell.send(failure.clone()).map_err(std::io::Error::other),
        _ => Ok(()),
    });
    let options = FollowOptions { window_bytes: WINDOW_BYTES, ..impatient_follower() };
    let (path, fs) = (dir.path().join("mirror"), hangs_at(&gate));
    let mirror = follow(fs, &path, address.to_string(), options).unwrap();
    let _opens = Opens(&gate);
    let failure = told.recv_timeout(SOON).unwrap();
    let expected = Violation::Pages { limit: 128 + 64 }.to_string();
    assert_eq!((failure.code, failure.detail), (ErrorCode::PROTOCOL, expected));
    gate.set_closed(false);
    mirror.stop().unwrap();
}

/// Every batch begins one, and together they fill the window while the mirror's disk hangs.
#[test]
fn the_shortest_segments_that_can_be_had_are_taken_by_a_mirror_whose_disk_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let shortest = 4096 + 1024 + 64;
    let options = JournalOptions {
        segment_bytes_first: shortest,
        segment_bytes_max: shortest,
        batch_bytes_max: 1024,
        group_bytes_max: 1024,
        group_alignment_bytes: 64,
        ..JournalOptions::default()
    };
    let origin = Origin::start(dir.path().join("origin"), options);
    let gate = Arc::new(Gate::default());
    let options =
        FollowOptions { journal: small(), window_bytes: WINDOW_BYTES, ..FollowOptions::default() };
    let (path, address) = (dir.path().join("mirror"), origin.address.to_string());
    let mirror = follow(hangs_at(&gate), &path, address, options).unwrap();
    let _opens = Opens(&gate);
    mirror.wait_ready(SOON).unwrap();
    gate.set_closed(true);
    (0..200).for_each(|n| origin.append_text(&"x".repeat(if n % 2 == 0 { 1 } else { 700 })));
    let journal = origin.store().journal();
    assert!(journal.segments().len() > 190, "{} segments", journal.segments().len());
    let fills = |status: &MirrorStatus| {
        let mirrored = status.mirrored.map_or(0, |end| end.offset);
        status.received_offset.unwrap_or(0) >= mirrored + u64::from(WINDOW_BYTES)
    };
    mirror.wait_until(SOON, fills).unwrap();
    gate.set_closed(false);
    assert_eq!(converged(&mirror, &origin).end(), journal.end());
    let status = mirror.status();
    assert!(status.reconnects == 0 && status.last_error.is_none(), "{status:?}");
    mirror.stop().unwrap();
}
