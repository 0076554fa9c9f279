//! Mirrors over a network that loses, delays, reorders and doubles packets, and is partitioned.
//!
//! ```text
//!   namespace A: origin ══ link ══ namespace B: mirror, which is killed now and then
//!
//!   link: a veth pair with `tc netem` where the kernel has it; else two tun devices, and a program between them
//! ```
//! In the end the mirror is the origin, byte for byte; while it is cut off, it says that it doesn't know how far it
//! lags. Namespaces vanish with this program's: nothing is left behind.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use crate::mounts::{need, tool};
use crate::processes::{self, Process, Role};
use crate::{Plan, Reached, Stop};

const ORIGIN: &str = "10.77.31.1";
const MIRROR: &str = "10.77.31.2";
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads packets from each of two tun devices and writes them to the other one, as it is told by lines of
/// `loss doubled delay_ms jitter_ms`.
const LINK: &str = r#"
import fcntl, heapq, os, random, select, struct, sys, time
def tun(name):
    fd = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454ca, struct.pack('16sH22x', name.encode(), 0x1001))
    return fd
random.seed(int(sys.argv[1]))
a, b = tun(sys.argv[2]), tun(sys.argv[3])
print('ready', flush=True)
loss, doubled, delay, jitter, due, number = 0.0, 0.0, 0.0, 0.0, [], 0
while True:
    wait = max(0.0, due[0][0] - time.monotonic()) if due else None
    for fd in select.select([0, a, b], [], [], wait)[0]:
        if fd == 0:
            line = sys.stdin.readline()
            if not line: sys.exit()
            loss, doubled, delay, jitter = (float(word) for word in line.split())
            continue
        try: packet = os.read(fd, 65536)
        except OSError: continue
        if random.random() < loss: continue
        for _ in range(2 if random.random() < doubled else 1):
            at = time.monotonic() + (delay + random.random() * jitter) / 1000
            number += 1
            heapq.heappush(due, (at, number, b if fd == a else a, packet))
    while due and due[0][0] <= time.monotonic():
        try: os.write(due[0][2], due[0][3])
        except OSError: pass
        heapq.heappop(due)
"#;

/// Two namespaces, of names that end with the number of this process.
struct Net {
    names: [String; 2],
    devices: [String; 2],
    link: Link,
}

enum Link {
    /// `tc netem` on both ends.
    Netem,
    /// A program with this standard input.
    Program(Child, ChildStdin),
}

/// How bad it is.
#[derive(Clone, Copy, Debug)]
struct Weather {
    loss: f64,
    doubled: f64,
    delay_ms: u32,
    jitter_ms: u32,
}

const FINE: Weather = Weather { loss: 0.0, doubled: 0.0, delay_ms: 0, jitter_ms: 0 };
const CUT: Weather = Weather { loss: 1.0, ..FINE };

impl Net {
    fn make(seed: u64) -> Result<Self, String> {
        let id = std::process::id() % 100_000;
        let names = ["a", "b"].map(|end| format!("headwater-{id}-{end}"));
        let devices = ["a", "b"].map(|end| format!("hw{id}{end}"));
        let mut made = Self { names, devices, link: Link::Netem };
        for name in &made.names {
            tool("ip", &["netns", "add", name])?;
        }
        made.plug(seed)?;
        for (end, address) in [ORIGIN, MIRROR].into_iter().enumerate() {
            let (name, device) = (&made.names[end], &made.devices[end]);
            tool("ip", &["link", "set", device, "netns", name])?;
            let peer = [MIRROR, ORIGIN][end];
            made.ip(end, &["addr", "add", address, "peer", peer, "dev", device])?;
            made.ip(end, &["link", "set", device, "up"])?;
        }
        made.weather(&FINE)?;
        Ok(made)
    }

    /// By netem if there is one; its absence shows only when it is asked for.
    fn plug(&mut self, seed: u64) -> Result<(), String> {
        let [a, b] = &self.devices;
        let veth = tool("ip", &["link", "add", a, "type", "veth", "peer", "name", b]);
        let netem = veth.and_then(|_| {
            let tried = tool("tc", &["qdisc", "add", "dev", a, "root", "netem", "delay", "1ms"]);
            if tried.is_err() {
                tool("ip", &["link", "del", a])?;
            }
            tried
        });
        let Err(no_netem) = netem else { return Ok(()) };
        let seed = (seed % 1_000_000).to_string();
        let mut child = Command::new("python3")
            .args(["-c", LINK, &seed, a, b])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{no_netem}; python3: {error}"))?;
        let mut ready = String::new();
        drop(BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready));
        if ready.trim() != "ready" {
            let output = child.wait_with_output().map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(format!("{no_netem}; no tun devices either: {said}"));
        }
        let stdin = child.stdin.take().unwrap();
        self.link = Link::Program(child, stdin);
        Ok(())
    }

    fn ip(&self, end: usize, args: &[&str]) -> Result<String, String> {
        tool("ip", &[&["-n", &self.names[end]], args].concat())
    }

    fn weather(&mut self, weather: &Weather) -> Result<(), String> {
        let Weather { loss, doubled, delay_ms, jitter_ms } = *weather;
        match &mut self.link {
            Link::Program(_, stdin) => {
                let line = format!("{loss} {doubled} {delay_ms} {jitter_ms}\n");
                let written = stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush());
                written.map_err(|error| format!("the link: {error}"))
            }
            Link::Netem => {
                let (delay, jitter) = (format!("{delay_ms}ms"), format!("{jitter_ms}ms"));
                let (loss, doubled) =
                    (format!("{}%", loss * 100.0), format!("{}%", doubled * 100.0));
                let netem =
                    ["netem", "delay", &delay, &jitter, "loss", &loss, "duplicate", &doubled];
                for (name, device) in self.names.iter().zip(&self.devices) {
                    let qdisc = ["-n", name, "qdisc", "replace", "dev", device, "root"];
                    tool("tc", &[&qdisc[..], &netem].concat())?;
                }
                Ok(())
            }
        }
    }

    fn start(&self, end: usize, role: &Role, dir: &Path) -> Process {
        let prefix = ["ip", "netns", "exec", &self.names[end]].map(ToOwned::to_owned);
        Process::start(&prefix, role, dir)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Link::Program(child, _) = &mut self.link {
            drop(child.kill());
            drop(child.wait());
        }
        for name in &self.names {
            drop(tool("ip", &["netns", "del", name]));
        }
        drop(tool("ip", &["link", "del", &self.devices[0]]));
    }
}

pub(crate) fn run(plan: &Plan) -> Reached {
    need("ip")?;
    let mut rng = plan.rng();
    let mut net = Net::make(plan.seed).map_err(Stop::Skipped)?;
    let dir = plan.dir("network");
    let address = format!("{ORIGIN}:7431");
    let appending = Role::Origin { address: address.clone(), pause_ms: 5 };
    let mut origin = net.start(0, &appending, &dir.join("origin"));
    origin.hear_until(PATIENCE, |heard| heard.position > 0).map_err(Stop::Violated)?;
    let following = Role::Mirror { upstream: address, address: None };
    let mut mirror = net.start(1, &following, &dir.join("mirror"));
    let budget = plan.budget(4, 30);
    let (mut rounds, mut reconnects, mut unknown, mut packets) = (0, 0, 0, String::new());
    while budget.allows(rounds) {
        let weather = Weather {
            loss: rng.f64() * 0.08,
            doubled: rng.f64() * 0.05,
            delay_ms: rng.u32(..30),
            jitter_ms: rng.u32(1..30),
        };
        packets = format!("{weather:?}");
        net.weather(&weather).map_err(Stop::Violated)?;
        let goal = mirror.heard.position + 200;
        let further = mirror.hear_until(PATIENCE, |heard| heard.position >= goal);
        further.map_err(|what| Stop::Violated(format!("{what}, with {weather:?}")))?;
        if rng.bool() {
            reconnects += mirror.kill().reconnects;
            mirror = net.start(1, &following, &dir.join("mirror"));
        }
        let connected = mirror.hear_until(PATIENCE, |heard| matches!(heard.lag, Some(Some(_))));
        connected.map_err(Stop::Violated)?;
        // A partition: nobody is told. Whoever hears nothing doesn't know how far it lags.
        net.weather(&CUT).map_err(Stop::Violated)?;
        let since = Instant::now();
        let blind = mirror.hear_until(PATIENCE, |heard| heard.lag == Some(None));
        blind.map_err(|what| Stop::Violated(format!("lag is still known: {what}")))?;
        while since.elapsed() < Duration::from_millis(rng.u64(3000..5000)) {
            origin.hear().and_then(|()| mirror.hear()).map_err(Stop::Violated)?;
            if let Some(Some(lag)) = mirror.heard.lag {
                return Err(Stop::Violated(format!("cut off, it says that it lags by {lag}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        unknown += 1;
        rounds += 1;
    }
    net.weather(&FINE).map_err(Stop::Violated)?;
    origin.quiet();
    origin.hear_until(PATIENCE, |heard| heard.end.is_some()).map_err(Stop::Violated)?;
    let end = origin.heard.end.unwrap();
    mirror.hear_until(PATIENCE, |heard| heard.position >= end).map_err(Stop::Violated)?;
    reconnects += mirror.kill().reconnects;
    drop(origin.kill());
    let store = processes::reopen(&dir.join("origin")).map_err(Stop::Violated)?;
    let journal = store.journal();
    if journal.end().position.get() != end {
        return Err(Stop::Violated(format!("{end} were acknowledged: {:?}", journal.end())));
    }
    processes::digest(journal).map_err(Stop::Violated)?;
    processes::compare(journal, &dir.join("mirror")).map_err(Stop::Violated)?;
    let link = match net.link {
        Link::Netem => "tc netem",
        Link::Program(..) => "a link of our own, as the kernel has no netem",
    };
    Ok(format!(
        "{end} events through {rounds} rounds of bad weather (the last: {packets}) by {link}, \
         {unknown} partitions, {reconnects} reconnects, identical"
    ))
}
