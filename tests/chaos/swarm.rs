//! Subscribers by the thousand, each on a thread of its own that mostly sleeps; each verifies what it gets, cuts its
//! own connection now and then, or takes nothing for a while.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::NodeId;
use headwater::shipping::message::ErrorCode;

use crate::subscriber::{Ended, Subscriber};

const HEARTBEAT: Duration = Duration::from_secs(1);
const SILENCE: Duration = Duration::from_secs(4);
const STACK_BYTES: usize = 128 << 10;

#[derive(Debug, Default)]
pub(crate) struct Tally {
    connections: AtomicU64,
    cut: AtomicU64,
    stalled: AtomicU64,
    turned_away: AtomicU64,
    silent: AtomicU64,
}

struct Shared {
    stopping: AtomicBool,
    /// Until when things go wrong.
    until: Instant,
    failure: Mutex<Option<String>>,
    tally: Tally,
}

pub(crate) struct Swarm {
    shared: Arc<Shared>,
    positions: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<blake3::Hash>>,
}

impl Swarm {
    /// Spread over all addresses.
    pub(crate) fn start(
        addresses: &[SocketAddr],
        count: usize,
        until: Instant,
        rng: &mut Rng,
    ) -> Self {
        let (failure, tally) = (Mutex::new(None), Tally::default());
        let shared = Arc::new(Shared { stopping: AtomicBool::new(false), until, failure, tally });
        let mut swarm = Self { shared, positions: Vec::new(), threads: Vec::new() };
        for number in 0..count {
            let position = Arc::new(AtomicU64::new(0));
            swarm.positions.push(Arc::clone(&position));
            let address = addresses[number % addresses.len()];
            let (shared, mut rng) = (Arc::clone(&swarm.shared), rng.fork());
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let thread = thread.spawn(move || follow(&shared, address, &position, &mut rng));
            swarm.threads.push(thread.unwrap());
        }
        swarm
    }

    /// What must not happen to a subscriber, if it has.
    pub(crate) fn failure(&self) -> Option<String> {
        self.shared.failure.lock().unwrap().clone()
    }

    /// How many don't have so many events.
    pub(crate) fn behind(&self, end: u64) -> usize {
        let at = |position: &&Arc<AtomicU64>| position.load(Ordering::Acquire) < end;
        self.positions.iter().filter(at).count()
    }

    /// The digests of all bytes that each was sent.
    pub(crate) fn stop(&mut self) -> Result<(Vec<blake3::Hash>, &Tally), String> {
        self.shared.stopping.store(true, Ordering::Release);
        let joined = self.threads.drain(..).map(JoinHandle::join);
        let digests = joined.collect::<Result<_, _>>().map_err(|_| "a subscriber has panicked")?;
        Ok((digests, &self.shared.tally))
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn is_calm(&self) -> bool {
        Instant::now() >= self.until
    }
}

fn follow(
    shared: &Shared,
    address: SocketAddr,
    position: &AtomicU64,
    rng: &mut Rng,
) -> blake3::Hash {
    let node = rng.bool().then(|| NodeId::from_bytes(rng.u128(1..).to_le_bytes()));
    let mut subscriber = Subscriber::new(node, 1 << rng.u32(14..24));
    let mut pause_ms = 50;
    while !shared.is_stopping() {
        let before = subscriber.end;
        let ended = TcpStream::connect(address).ok().and_then(|stream| {
            shared.tally.connections.fetch_add(1, Ordering::Relaxed);
            converse(shared, &mut subscriber, &stream, position, rng).ok().flatten()
        });
        let halting = match &ended {
            Some(Ended::Diverged(_)) => true,
            Some(Ended::Told(code)) => !code.is_transient(),
            // Nothing is between these two that could damage it.
            Some(Ended::Damaged(_)) => true,
            Some(Ended::GoAway) | None => false,
        };
        if halting && !shared.is_stopping() {
            let what = format!("a subscriber of {address} at {before:?}: {ended:?}");
            shared.failure.lock().unwrap().get_or_insert(what);
        }
        if ended == Some(Ended::Told(ErrorCode::TOO_MANY)) {
            shared.tally.turned_away.fetch_add(1, Ordering::Relaxed);
        }
        pause_ms = if subscriber.end == before { 2000.min(2 * pause_ms) } else { 50 };
        std::thread::sleep(Duration::from_millis(pause_ms + rng.u64(..pause_ms)));
    }
    subscriber.digest()
}

/// One connection, until it ends or is left.
fn converse(
    shared: &Shared,
    subscriber: &mut Subscriber,
    mut stream: &TcpStream,
    position: &AtomicU64,
    rng: &mut Rng,
) -> std::io::Result<Option<Ended>> {
    stream.set_read_timeout(Some(HEARTBEAT))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.write_all(&subscriber.begin())?;
    let (mut heard_at, mut said_at, mut buffer) = (Instant::now(), Instant::now(), [0; 16 << 10]);
    // About so often something goes wrong.
    let mut next = Instant::now() + Duration::from_millis(rng.u64(500..30_000));
    while !shared.is_stopping() {
        let mut said = match stream.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(len) => {
                heard_at = Instant::now();
                match subscriber.hear(&buffer[..len]) {
                    Ok(said) => said,
                    Err(ended) => return Ok(Some(ended)),
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Vec::new(),
            Err(error) => return Err(error),
        };
        if let Some(end) = subscriber.end {
            position.store(end.position.get(), Ordering::Release);
        }
        if said.is_empty() && said_at.elapsed() >= HEARTBEAT {
            said = subscriber.acknowledge();
        }
        if !said.is_empty() {
            said_at = Instant::now();
            stream.write_all(&said)?;
        }
        if heard_at.elapsed() >= SILENCE {
            shared.tally.silent.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        if Instant::now() >= next && !shared.is_calm() {
            if rng.bool() {
                shared.tally.cut.fetch_add(1, Ordering::Relaxed);
                return Ok(None);
            }
            shared.tally.stalled.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(rng.u64(100..6000)));
            next = Instant::now() + Duration::from_millis(rng.u64(500..30_000));
            heard_at = Instant::now();
        }
    }
    Ok(None)
}
