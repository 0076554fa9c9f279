//! S1: in order, dense, no gap, no duplicate, whatever the wire does and whoever is at its end.

use std::sync::Arc;

use headwater::format::batch::{BatchRef, body_digest};
use headwater::fs::os::OsFs;
use headwater::shipping::message::{Data, Message, OriginEnd};
use headwater::shipping::{MirrorStatus, ShippingError, follow};
use headwater::{Chain, Comparison, Position};

use super::{batches, follow_until, impatient_follower, seed, serve_impatiently};
use crate::fault_proxy::{Fault, Proxy};
use crate::shipping::{
    Origin, SOON, assert_same_bytes, converged, false_origin_at, small, start_mirror,
};
use crate::subscriber::Subscriber;

/// Cuts, flipped bits, delays, bytes that come twice, half-open connections and silence, in both directions.
#[test]
fn s1_through_every_fault_of_the_wire_there_is_no_gap_and_no_duplicate_and_the_end_is_equal() {
    let seed = seed();
    std::thread::scope(|scope| {
        for case in 0..6 {
            scope.spawn(move || through_faults(seed.wrapping_add(case)));
        }
    });
}

fn through_faults(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..60);
    let server = serve_impatiently(origin.store().journal());
    let mut for_proxy = rng.fork();
    let proxy = Proxy::start(server.local_addr(), move |number| {
        let count = if number < 12 { for_proxy.usize(1..4) } else { 0 };
        (0..count).map(|_| Fault::any(&mut for_proxy, 40_000)).collect()
    });
    let address = proxy.address.to_string();
    let mirror_dir = dir.path().join("mirror");
    let mirror = follow(Arc::new(OsFs), &mirror_dir, address, impatient_follower()).unwrap();
    let mut subscriber = Subscriber::keeping(rng.u32(5000..100_000));
    for round in 0..10 {
        origin.append(60 + round * 20..60 + round * 20 + rng.usize(1..20));
        if rng.u8(..4) == 0 {
            proxy.cut_all();
        }
        let some = subscriber.end.map_or(0, |end| end.offset) + rng.u64(1..9000);
        let some = some.min(origin.store().journal().end().offset);
        let enough = |it: &Subscriber| it.end.is_some_and(|end| end.offset >= some);
        follow_until(&mut subscriber, proxy.address, enough);
        // Whatever is in the mirror at any time is a beginning of the origin's history.
        if let Some(journal) = mirror.journal() {
            let end = journal.end();
            let compared = origin.store().journal().compare(&end).unwrap();
            assert_eq!(compared, Comparison::Equal, "seed {seed}");
            let read = journal.read_all(Position::START).unwrap().map(Result::unwrap);
            let read: Vec<_> = read.map(|event| event.position().get()).collect();
            assert!(read.iter().copied().eq(0..read.len() as u64), "seed {seed}");
            assert!(read.len() as u64 >= end.position.get(), "seed {seed}");
        }
    }
    let end = origin.store().journal().end();
    follow_until(&mut subscriber, proxy.address, |it| it.end == Some(end));
    let (bytes, _) = batches(origin.store().journal());
    assert!(subscriber.kept.as_ref().is_some_and(|kept| *kept == bytes), "seed {seed}");
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
    assert!(proxy.struck() > 0, "seed {seed}: no fault has struck");
}

/// An origin that leaves out a batch, sends one twice or continues another history: checksums and all are right,
/// and nothing of it is taken.
#[test]
fn s1_what_does_not_continue_the_mirror_is_never_applied() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    (0..4).for_each(|_| origin.append_text("the same length"));
    let mut cursor = origin.store().journal().cursor(Position::START).unwrap();
    let (mut page, mut sent) = (None, Vec::new());
    while let Some(next) = cursor.next_batch().unwrap() {
        page = page.or(next.page.cloned());
        sent.push(next.batch.bytes().to_vec());
    }
    let page = page.unwrap();
    let salt = page.header.salt;
    let resealed = |position: u64, chain: Chain| {
        let batch = BatchRef::decode(&sent[1], salt).unwrap();
        let mut header = batch.header;
        header.base_position = Position::new(position);
        let front = header.seal(chain, None, &body_digest(batch.body()), salt);
        [&front, &sent[1][front.len()..]].concat()
    };
    let first_chain = BatchRef::decode(&sent[0], salt).unwrap().header.chain;
    let len = sent[0].len() as u64;
    let second = [
        ("the one behind it", sent[2].clone(), len),
        ("the one behind it, as what it is", sent[2].clone(), 2 * len),
        ("the first again", sent[0].clone(), len),
        ("the first again, as what it is", sent[0].clone(), 0),
        ("one of another history", resealed(1, Chain::from_bytes([7; 16])), len),
        ("one of another position", resealed(2, first_chain), len),
    ];
    let end = origin.store().journal().end();
    for (number, (what, second, offset)) in second.into_iter().enumerate() {
        println!("{what}");
        let (page, first) = (page.bytes(), sent[0].clone());
        let address = false_origin_at(end, move |out| {
            let origin_end = OriginEnd { offset: end.offset, position: end.position };
            let data = |offset, bytes, out: &mut Vec<u8>| {
                Message::Data(Data { offset, origin_end, continued: false, bytes }).encode(out);
            };
            Message::Segment(&page).encode(out);
            data(0, &first, out);
            data(offset, &second, out);
        });
        let mirror_dir = dir.path().join(format!("mirror-{number}"));
        let options = impatient_follower();
        let mirror = follow(Arc::new(OsFs), &mirror_dir, address.to_string(), options).unwrap();
        let told = mirror.wait_until(SOON, |status| status.last_error.is_some()).unwrap();
        let error = told.last_error.unwrap();
        // One that says that it is elsewhere isn't even looked at.
        let is_refused = match error {
            ShippingError::Violation(_) => offset != len,
            ShippingError::Refused { .. } => offset == len,
            _ => false,
        };
        assert!(is_refused, "{what}: {error}");
        let journal = mirror.journal().unwrap();
        assert_eq!(journal.end().position, Position::new(1), "{what}");
        mirror.stop().unwrap();
    }
    // The right one goes on from there.
    let mirror = start_mirror(&dir.path().join("mirror-0"), &origin);
    assert!(mirror.wait_until(SOON, MirrorStatus::is_live).is_ok());
    assert_same_bytes(origin.store().journal(), &converged(&mirror, &origin));
}
