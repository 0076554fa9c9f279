//! From SIGKILL to the first event that a mirror gets of the origin that was started again.

use std::io::Read as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use headwater::Store;

use super::origin::Origin;
use super::{PATIENCE, Scale, sale};
use crate::Outcome;
use crate::baseline::Device;
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, ms, now_ns, ratios};

/// About as many as an event of ours takes.
const BARE_BYTES: u64 = 512;

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let at = dir.join("origin");
    sale::filled(&at, 16 << 20)?.close()?;
    let mut origin = Origin::start(&at, "127.0.0.1:0")?;
    let address = origin.address.to_string();
    let follower = Store::create(dir.join("follower"))?;
    let mirror = follower.mirror("origin", address.clone())?;
    let journal = mirror.wait_ready(PATIENCE)?;
    let (mut since_kill, mut since_answer) = (Latencies::default(), Latencies::default());
    let mut bare = Bare::start(&dir.join("bare"))?;
    let mut bare_since_kill = Latencies::default();
    for _ in 0..scale.kills {
        origin.commit(10, Duration::ZERO)?;
        mirror.wait_caught_up(PATIENCE)?;
        let killed_ns = now_ns();
        origin.kill()?;
        origin = Origin::start(&at, &address)?;
        let first = origin.commit(1, Duration::ZERO)?;
        let first = first.first().ok_or("no commit")?;
        let last = headwater::Position::new(first.position.get() - 1);
        if journal.wait_past(last, PATIENCE).position < first.position {
            return Err("the mirror doesn't come back".into());
        }
        let arrived_ns = now_ns();
        since_kill.add_between_ns(killed_ns, arrived_ns);
        since_answer.add_between_ns(first.answered_ns, arrived_ns);
        bare = bare.killed(&mut bare_since_kill)?;
    }
    let note = format!(
        "{} kills each, in turn; p50 {:.0} ms beside {:.0} ms; of ours, after the event's answer: p50 {:.0} ms, p99 {:.0} ms: a mirror tries again after 50 ms or more, the bare one after 1 ms",
        scale.kills,
        since_kill.percentile(0.5) * 1e3,
        bare_since_kill.percentile(0.5) * 1e3,
        since_answer.percentile(0.5) * 1e3,
        since_answer.percentile(0.99) * 1e3,
    );
    let what = "SIGKILL of the origin and a restart at once, until the first new event is durable in the mirror: p99";
    let (ours, beside) = ([since_kill.percentile(0.99)], [bare_since_kill.percentile(0.99)]);
    Ok(vec![
        Figure::new(what, "ms", ms(&ours))
            .beside("a process that writes, syncs and sends", ms(&beside), ratios(&ours, &beside))
            .wanted(Wanted::AtMost(1_000.0))
            .note(note),
    ])
}

/// The machine alone: a process that is started again, and somebody who connects again and syncs what comes.
struct Bare {
    dir: PathBuf,
    origin: Origin,
    sink: Device,
}

impl Bare {
    fn start(dir: &Path) -> Outcome<Self> {
        let origin = Origin::start_bare(&dir.join("origin"), "127.0.0.1:0", BARE_BYTES, None)?;
        let sink = Device::create(&dir.join("sink"), 1 << 20)?;
        Ok(Self { dir: dir.to_owned(), origin, sink })
    }

    fn killed(mut self, since_kill: &mut Latencies) -> Outcome<Self> {
        let address = self.origin.address;
        let killed_ns = now_ns();
        self.origin.kill()?;
        let bytes = BARE_BYTES;
        self.origin =
            Origin::start_bare(&self.dir.join("origin"), &address.to_string(), bytes, None)?;
        let mut stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(_) if now_ns() - killed_ns < PATIENCE.as_nanos() as u64 => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error.into()),
            }
        };
        while self.origin.peers()? == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.origin.commit(1, Duration::ZERO)?;
        let mut message = [0; BARE_BYTES as usize];
        stream.read_exact(&mut message)?;
        self.sink.write_synced(&message)?;
        since_kill.add_between_ns(killed_ns, now_ns());
        Ok(self)
    }
}
