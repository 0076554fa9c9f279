//! The promises of shipping, each as tests that are named after it: S1 to S3 and S6 to S9 here.
//!
//! S3 is also in the tests of the session (against a model of a journal) and, as single cases, in `shipping.rs`; S4 is in
//! `forks.rs` and `shipping.rs`, and here wherever a mirror follows with quarantine; S5 in `shipping_processes.rs` and `./run chaos`, S7 also in
//! `subscribers.rs`. What each says is in `docs/guarantees.md`.

mod bits;
mod disk;
mod floods;
mod hangs;
mod lag;
mod limits;
mod panics;
mod restores;
mod versions;
mod wire;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use headwater::shipping::{Deadlines, FollowOptions, ServeOptions, Server, serve};
use headwater::{Checkpoint, Journal, Position, ReadError};

use crate::shipping::{SOON, small};
use crate::subscriber::{Ended, Subscriber};

/// So that what is lost without a word is noticed soon.
fn impatient() -> Deadlines {
    Deadlines {
        handshake: Duration::from_secs(2),
        silence: Duration::from_secs(1),
        heartbeat: Duration::from_millis(150),
    }
}

fn serve_impatiently(journal: &Journal) -> Server {
    let options = ServeOptions { deadlines: impatient(), ..ServeOptions::default() };
    serve(journal.clone(), "127.0.0.1:0", options).unwrap()
}

fn impatient_follower() -> FollowOptions {
    FollowOptions { journal: small(), deadlines: impatient(), ..FollowOptions::default() }
}

/// The seed of this run, or the one that the environment names.
fn seed() -> u64 {
    let named = std::env::var("HEADWATER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = named.unwrap_or_else(|| fastrand::u64(..));
    println!("HEADWATER_SEED={seed}");
    seed
}

/// The bytes of all batches, and the ends of all of them.
fn batches(journal: &Journal) -> (Vec<u8>, Vec<Checkpoint>) {
    read_batches(journal).unwrap()
}

fn read_batches(journal: &Journal) -> Result<(Vec<u8>, Vec<Checkpoint>), ReadError> {
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    let mut cursor = journal.cursor(Position::START)?;
    while let Some(batch) = cursor.next_batch()? {
        bytes.extend_from_slice(batch.batch.bytes());
        ends.push(batch.end());
    }
    Ok((bytes, ends))
}

/// One connection of a subscriber, until it ends; why, if that was said.
fn converse(
    subscriber: &mut Subscriber,
    mut stream: &TcpStream,
    silence: Duration,
    enough: impl Fn(&Subscriber) -> bool,
) -> std::io::Result<Option<Ended>> {
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    stream.write_all(&subscriber.begin())?;
    let (mut heard_at, mut buffer) = (Instant::now(), [0; 16 << 10]);
    while !enough(subscriber) && heard_at.elapsed() < silence {
        let said = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                heard_at = Instant::now();
                match subscriber.hear(&buffer[..len]) {
                    Ok(said) => said,
                    Err(ended) => return Ok(Some(ended)),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                subscriber.acknowledge()
            }
            Err(error) => return Err(error),
        };
        stream.write_all(&said)?;
    }
    Ok(None)
}

/// Connects again and again until the subscriber has what is wanted.
fn follow_until(
    subscriber: &mut Subscriber,
    address: SocketAddr,
    enough: impl Fn(&Subscriber) -> bool,
) {
    let deadline = Instant::now() + SOON;
    while !enough(subscriber) {
        assert!(Instant::now() < deadline, "at {:?}", subscriber.end);
        let Ok(stream) = TcpStream::connect(address) else { continue };
        match converse(subscriber, &stream, Duration::from_secs(1), &enough) {
            Ok(Some(ended @ Ended::Diverged(_))) => panic!("{ended:?}"),
            Ok(Some(Ended::Told(code))) => assert!(code.is_transient(), "{code}"),
            _ => {}
        }
    }
}
