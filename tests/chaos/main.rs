//! Chaos: an origin, a chain of three relays and a thousand subscribers, while processes are killed and connections
//! cut, held, damaged and left half open; in the end everything is identical, byte for byte.
//!
//! ```text
//!   origin ══proxy══▶ relay 1 ══proxy══▶ relay 2 ══proxy══▶ relay 3        processes; killed by SIGKILL
//!     ║                 ║                  ║                  ║
//!     ╚══ mirrors on disk, each through a proxy of its own; subscribers that verify every byte and keep a digest
//! ```
//! `./run chaos [--seed N] [--for 60s] [--subscribers N] [--plant]`. The same seed gives the same plan; what the
//! machine makes of it differs. With `--plant` the relays don't verify what they write: the run must fail.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test: what was tried is printed"
)]

mod processes;
mod proxy;
mod subscriber;
mod swarm;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::fs::os::OsFs;
use headwater::shipping::{Mirror, follow};

use processes::{Process, Role};
use proxy::{Fault, Proxy};
use swarm::Swarm;

const RELAYS: usize = 3;
const MIRRORS: usize = 20;
/// How long it may take until everybody has everything, once nothing happens any more.
const PATIENCE: Duration = Duration::from_secs(90);

struct Wanted {
    seed: u64,
    time: Duration,
    subscribers: usize,
    plant: bool,
}

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == processes::CHILD) {
        processes::run(&args.split_off(1));
    }
    let Some(wanted) = wanted(&args) else {
        eprintln!("usage: chaos [--seed N] [--for 60s|5m] [--subscribers N] [--plant]");
        return ExitCode::from(2);
    };
    println!(
        "chaos: --seed {} --for {}s --subscribers {}, {RELAYS} relays, {MIRRORS} mirrors",
        wanted.seed,
        wanted.time.as_secs(),
        wanted.subscribers
    );
    match chaos(&wanted) {
        Ok(()) => {
            println!("chaos: identical, byte for byte");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("chaos: FAILED: {what}\nagain: ./run chaos --seed {}", wanted.seed);
            ExitCode::FAILURE
        }
    }
}

fn wanted(args: &[String]) -> Option<Wanted> {
    let (seed, time) = (fastrand::u64(..), Duration::from_secs(60));
    let mut wanted = Wanted { seed, time, subscribers: 1000, plant: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seed" => wanted.seed = args.next()?.parse().ok()?,
            "--for" => wanted.time = duration(args.next()?)?,
            "--subscribers" => wanted.subscribers = args.next()?.parse().ok()?,
            "--plant" => wanted.plant = true,
            _ => return None,
        }
    }
    Some(wanted)
}

fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|it: char| !it.is_ascii_digit())?);
    let seconds = number.parse::<u64>().ok()?;
    match unit {
        "s" => Some(Duration::from_secs(seconds)),
        "m" => Some(Duration::from_secs(60 * seconds)),
        _ => None,
    }
}

/// An address that is free now; whoever is killed comes back to it.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The origin or a relay: alive, or until when it is left dead.
struct Node {
    dir: PathBuf,
    address: SocketAddr,
    role: Role,
    process: Option<Process>,
    back_at: Instant,
    /// What it had acknowledged before it was killed.
    acknowledged: u64,
    /// It doesn't verify what it writes.
    plant: bool,
}

impl Node {
    fn new(dir: PathBuf, address: SocketAddr, role: Role) -> Self {
        Self {
            dir,
            address,
            role,
            process: None,
            back_at: Instant::now(),
            acknowledged: 0,
            plant: false,
        }
    }

    fn kill(&mut self, away: Duration) {
        if let Some(process) = self.process.take() {
            self.acknowledged = self.acknowledged.max(process.kill().position);
        }
        self.back_at = Instant::now() + away;
    }

    /// Starts it if it is its time; a relay that has halted is a failure.
    fn look(&mut self) -> Result<(), String> {
        let dir = &self.dir;
        let planted = format!("{}=1", processes::PLANT);
        let prefix = if self.plant { vec!["env".to_owned(), planted] } else { Vec::new() };
        let start = || Process::start(&prefix, &self.role, dir);
        if self.process.is_none() && Instant::now() >= self.back_at {
            self.process = Some(start());
        }
        let Some(process) = &mut self.process else { return Ok(()) };
        process.hear().map_err(|error| format!("{}: {error}", dir.display()))?;
        match &process.heard.halted {
            Some(why) => Err(format!("{} has halted: {why}", dir.display())),
            None => Ok(()),
        }
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }
}

#[derive(Debug, Default)]
struct Tally {
    kills_of_the_origin: usize,
    kills_of_relays: usize,
    cuts: usize,
    holds: usize,
}

struct Scene {
    nodes: Vec<Node>,
    /// In front of each relay.
    proxies: Vec<Proxy>,
    /// Of mirrors, with the proxy that each goes through.
    mirrors: Vec<(PathBuf, Mirror, Proxy)>,
    swarm: Swarm,
    held: Vec<(usize, Instant)>,
    tally: Tally,
}

fn chaos(wanted: &Wanted) -> Result<(), String> {
    let scratch = tempfile::Builder::new().prefix("chaos-").tempdir_in(target_dir()).unwrap();
    if wanted.plant {
        println!("chaos: relays believe what they are sent");
    }
    let mut rng = Rng::with_seed(wanted.seed);
    let mut scene = Scene::begin(scratch.path(), wanted, &mut rng)?;
    let ended = scene
        .storm(wanted.time, &mut rng)
        .and_then(|()| scene.settle())
        .and_then(|()| scene.check());
    if ended.is_err() {
        println!("chaos: the files are kept in {}", scratch.keep().display());
    }
    ended
}

fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A proxy with faults on some of its connections, while there is chaos.
fn faulty(to: SocketAddr, mut rng: Rng, until: Instant, plant: bool) -> Proxy {
    Proxy::start(to, move |_| {
        if Instant::now() >= until || rng.u8(..3) == 0 {
            return Vec::new();
        }
        let mut faults: Vec<_> =
            (0..rng.usize(1..3)).map(|_| Fault::any(&mut rng, 300_000)).collect();
        if plant {
            faults.clear();
            let at = 12_000 + rng.usize(..100_000);
            faults.push(Fault { of_origin: true, at, what: proxy::What::Flip(0) });
        }
        faults
    })
}

impl Scene {
    fn begin(dir: &Path, wanted: &Wanted, rng: &mut Rng) -> Result<Self, String> {
        let until = Instant::now() + wanted.time;
        let address = free_address();
        let role = Role::Origin { address: address.to_string(), pause_ms: 8 };
        let mut nodes = vec![Node::new(dir.join("origin"), address, role)];
        let mut proxies = Vec::new();
        for relay in 1..=RELAYS {
            let proxy = faulty(nodes[relay - 1].address, rng.fork(), until, wanted.plant);
            let address = free_address();
            let upstream = proxy.address.to_string();
            let role = Role::Mirror { upstream, address: Some(address.to_string()) };
            let mut node = Node::new(dir.join(format!("relay-{relay}")), address, role);
            node.plant = wanted.plant;
            nodes.push(node);
            proxies.push(proxy);
        }
        nodes.iter_mut().try_for_each(Node::look)?;
        let addresses: Vec<_> = nodes.iter().map(|node| node.address).collect();
        let mirrors = (0..MIRRORS).map(|number| {
            let proxy = faulty(addresses[number % addresses.len()], rng.fork(), until, false);
            let dir = dir.join(format!("mirror-{number}"));
            let address = proxy.address.to_string();
            let mirror = follow(Arc::new(OsFs), &dir, address, processes::follow_options());
            (dir, mirror.unwrap(), proxy)
        });
        let mirrors = mirrors.collect();
        let swarm = Swarm::start(&addresses, wanted.subscribers, until, rng);
        let (held, tally) = (Vec::new(), Tally::default());
        Ok(Self { nodes, proxies, mirrors, swarm, held, tally })
    }

    fn look(&mut self) -> Result<(), String> {
        let now = Instant::now();
        let proxies = &self.proxies;
        self.held.retain(|(proxy, until)| {
            let goes_on = now < *until;
            if !goes_on {
                proxies[*proxy].hold(false);
            }
            goes_on
        });
        self.nodes.iter_mut().try_for_each(Node::look)?;
        for (dir, mirror, _) in &self.mirrors {
            let status = mirror.status();
            if status.is_halted() {
                return Err(format!("{} has halted: {:?}", dir.display(), status.state));
            }
        }
        self.swarm.failure().map_or(Ok(()), Err)
    }

    /// For so long, one thing after the other.
    fn storm(&mut self, time: Duration, rng: &mut Rng) -> Result<(), String> {
        let began = Instant::now();
        let mut next_at = began + Duration::from_secs(2);
        while began.elapsed() < time {
            self.look()?;
            if Instant::now() >= next_at {
                self.strike(rng);
                next_at += Duration::from_millis(rng.u64(100..900));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// One thing goes wrong.
    fn strike(&mut self, rng: &mut Rng) {
        let away = Duration::from_millis(rng.u64(..1500));
        match rng.u8(..10) {
            0 | 1 => {
                self.nodes[0].kill(away);
                self.tally.kills_of_the_origin += 1;
            }
            2..5 => {
                self.nodes[rng.usize(1..=RELAYS)].kill(away);
                self.tally.kills_of_relays += 1;
            }
            5 => {
                let proxy = rng.usize(..RELAYS);
                let until = Instant::now() + Duration::from_millis(rng.u64(100..5000));
                self.proxies[proxy].hold(true);
                self.held.push((proxy, until));
                self.tally.holds += 1;
            }
            6 | 7 => {
                self.proxies[rng.usize(..RELAYS)].cut_all();
                self.tally.cuts += 1;
            }
            _ => {
                self.mirrors[rng.usize(..MIRRORS)].2.cut_all();
                self.tally.cuts += 1;
            }
        }
    }

    /// Nothing goes wrong any more: everybody gets everything.
    fn settle(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        self.proxies.iter().for_each(|proxy| proxy.hold(false));
        self.held.clear();
        self.nodes.iter_mut().for_each(|node| node.back_at = Instant::now());
        self.look()?;
        self.nodes[0].process().hear_until(PATIENCE, |heard| heard.position > 0)?;
        self.nodes[0].process().quiet();
        self.nodes[0].process().hear_until(PATIENCE, |heard| heard.end.is_some())?;
        let end = self.nodes[0].process().heard.end.unwrap();
        let acknowledged = self.nodes[0].acknowledged;
        if acknowledged > end {
            return Err(format!("{acknowledged} events were acknowledged, {end} are there"));
        }
        loop {
            self.look()?;
            let relays = self.nodes[1..].iter_mut().map(|node| node.process().heard.position);
            let mirrors = self
                .mirrors
                .iter()
                .map(|(_, mirror, _)| mirror.status().mirrored.map_or(0, |end| end.position.get()));
            let behind = relays.chain(mirrors).filter(|position| *position < end).count();
            let subscribers = self.swarm.behind(end);
            if behind + subscribers == 0 {
                println!("chaos: {end} events everywhere");
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "after {PATIENCE:?}, {behind} mirrors and {subscribers} subscribers don't have all {end} events"
                ));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// All files and digests are the origin's.
    fn check(&mut self) -> Result<(), String> {
        for node in &mut self.nodes {
            node.kill(Duration::MAX / 4);
        }
        let (digests, tally) = self.swarm.stop()?;
        let store = processes::reopen(&self.nodes[0].dir)?;
        let origin = store.journal();
        for (dir, mirror, _) in self.mirrors.drain(..) {
            mirror.stop().map_err(|error| format!("{}: {error}", dir.display()))?;
            processes::compare(origin, &dir)?;
        }
        for node in &self.nodes[1..] {
            processes::compare(origin, &node.dir)?;
        }
        let wanted = processes::digest(origin)?;
        let others = digests.iter().filter(|digest| **digest != wanted).count();
        println!("chaos: {:?}, {tally:?}", self.tally);
        let segments = origin.segments().len();
        println!("chaos: {} bytes in {segments} segments", origin.end().offset);
        match others {
            0 => Ok(()),
            _ => Err(format!("{others} subscribers have other bytes")),
        }
    }
}
