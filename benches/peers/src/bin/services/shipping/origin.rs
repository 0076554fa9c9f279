//! An origin as a process of its own: it can be killed, and its memory is only its own.
//!
//! It says `serving ADDRESS END` (the checkpoint in hexadecimal), then takes lines:
//! `commit COUNT INTERVAL_US` (says `acked OFFSET POSITION CALLED_NS ANSWERED_NS` for each, then `done END`), `memory`
//! (says `memory KIB`), `peers` (says `peers STREAMING`).

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, BufRead as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headwater::position::Checkpoint;
use headwater::shipping::{PeerState, ServeOptions, Server};
use headwater::{Position, Store};
use rustls::ClientConfig;

use super::tls::Identity;
use super::{PATIENCE, sale};
use crate::Outcome;
use crate::child::Service;
use crate::timing::now_ns;

pub(super) const CONNECTIONS_MAX: usize = 20_000;

pub(crate) fn serve(dir: &Path, address: &str, tls: Option<&Path>) -> Outcome<()> {
    let store = Store::builder(dir).create_if_missing().open()?;
    let security = tls.map(|dir| Identity::at(dir).security()).transpose()?;
    let connections_max = CONNECTIONS_MAX;
    let options = ServeOptions { connections_max, security, ..ServeOptions::default() };
    let server = store.serve_with(address, options)?;
    say(&format!("serving {} {}", server.local_addr(), hex(&store.journal().end())))?;
    let append = |number| {
        let append = sale::append(number, 1)?;
        let called_ns = now_ns();
        store.append(&append)?;
        let answered_ns = now_ns();
        Ok(Moment { end: store.journal().end(), called_ns, answered_ns })
    };
    obey(append, || streaming(&server))
}

/// Takes the lines that stand above.
pub(super) fn obey(
    mut commit: impl FnMut(u64) -> Outcome<Moment>,
    peers: impl Fn() -> usize,
) -> Outcome<()> {
    for line in io::stdin().lock().lines() {
        match line?.split(' ').collect::<Vec<_>>()[..] {
            ["commit", count, interval_us] => {
                let interval = Duration::from_micros(interval_us.parse()?);
                commits(&mut commit, count.parse()?, interval)?;
            }
            ["memory"] => say(&format!("memory {}", resident_kib()?))?,
            ["peers"] => say(&format!("peers {}", peers()))?,
            ref other => return Err(format!("what is {other:?}?").into()),
        }
    }
    Ok(())
}

pub(super) fn say(lines: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{lines}")?;
    Ok(out.flush()?)
}

/// A commit, and where everything ends behind it.
pub(super) struct Moment {
    pub(super) end: Checkpoint,
    pub(super) called_ns: u64,
    pub(super) answered_ns: u64,
}

/// One after the other. Nothing is said while they are measured.
fn commits(
    commit: &mut impl FnMut(u64) -> Outcome<Moment>,
    count: u64,
    interval: Duration,
) -> Outcome<()> {
    let mut lines = String::new();
    let mut next = Instant::now();
    let mut last = None;
    for number in 0..count {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let Moment { end, called_ns, answered_ns } = commit(number)?;
        writeln!(lines, "acked {} {} {called_ns} {answered_ns}", end.offset, end.position)?;
        last = Some(end);
    }
    write!(lines, "done {}", hex(&last.ok_or("no commit was asked for")?))?;
    say(&lines)
}

pub(super) fn streaming(server: &Server) -> usize {
    let is_streaming = |state| matches!(state, PeerState::CatchingUp | PeerState::Live);
    server.peers().iter().filter(|peer| is_streaming(peer.state)).count()
}

fn resident_kib() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

pub(super) fn hex(checkpoint: &Checkpoint) -> String {
    let mut text = String::new();
    for byte in checkpoint.to_bytes() {
        write!(text, "{byte:02x}").unwrap_or_default();
    }
    text
}

fn checkpoint(hex: &str) -> Outcome<Checkpoint> {
    let mut bytes = [0; Checkpoint::ENCODED_LEN];
    for (at, byte) in bytes.iter_mut().enumerate() {
        let digits = hex.get(2 * at..2 * at + 2).ok_or("a checkpoint is too short")?;
        *byte = u8::from_str_radix(digits, 16)?;
    }
    Checkpoint::from_bytes(&bytes).ok_or_else(|| "not a checkpoint".into())
}

/// A commit, as the origin saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acked {
    /// Behind the commit.
    pub(super) offset: u64,
    pub(super) position: Position,
    pub(super) called_ns: u64,
    pub(super) answered_ns: u64,
}

/// Where subscribers knock, and how.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub(super) address: SocketAddr,
    pub(super) tls: Option<Arc<ClientConfig>>,
    /// Nothing is said there, and bytes come without frames.
    pub(super) is_bare: bool,
}

/// The other end of it.
pub(super) struct Origin {
    service: Service,
    pub(super) address: SocketAddr,
    identity: Option<Identity>,
    is_bare: bool,
    pub(super) end: Checkpoint,
}

impl Origin {
    pub(super) fn start(dir: &Path, address: &str) -> Outcome<Self> {
        Self::start_as(dir, address, None)
    }

    pub(super) fn start_as(dir: &Path, address: &str, identity: Option<Identity>) -> Outcome<Self> {
        Self::run(&[OsStr::new("origin"), dir.as_os_str(), OsStr::new(address)], identity)
    }

    /// The machine alone in its place, with messages of so many bytes.
    pub(super) fn start_bare(
        dir: &Path,
        address: &str,
        message_bytes: u64,
        identity: Option<Identity>,
    ) -> Outcome<Self> {
        let bytes = message_bytes.to_string();
        let args = [OsStr::new("bare"), dir.as_os_str(), OsStr::new(address), OsStr::new(&bytes)];
        Ok(Self { is_bare: true, ..Self::run(&args, identity)? })
    }

    fn run(args: &[&OsStr], identity: Option<Identity>) -> Outcome<Self> {
        let tls = identity.as_ref().map(|identity| identity.dir().as_os_str());
        let args: Vec<_> = args.iter().copied().chain(tls).collect();
        let mut service = Service::start(&args)?;
        let line = service.hear()?;
        let [_, address, end] = &line[..] else { return Err("what does it say?".into()) };
        let (address, end) = (address.parse()?, checkpoint(end)?);
        Ok(Self { address, end, service, identity, is_bare: false })
    }

    pub(super) fn door(&self) -> Outcome<Door> {
        let tls = self.identity.as_ref().map(Identity::bare_client).transpose()?;
        Ok(Door { address: self.address, tls, is_bare: self.is_bare })
    }

    pub(super) fn begin(&self) -> Checkpoint {
        let journal = self.end.journal;
        Checkpoint {
            journal,
            epoch: 0,
            incarnation: headwater::position::Incarnation::new(0),
            offset: 0,
            position: Position::START,
            chain: headwater::format::batch::genesis(journal),
        }
    }

    pub(super) fn commit(&mut self, count: u32, interval: Duration) -> Outcome<Vec<Acked>> {
        self.service.say(&format!("commit {count} {}", interval.as_micros()))?;
        let mut all = Vec::new();
        loop {
            let words = self.service.hear()?;
            match &words[..] {
                [acked, offset, position, called, answered] if acked == "acked" => {
                    all.push(Acked {
                        offset: offset.parse()?,
                        position: Position::new(position.parse()?),
                        called_ns: called.parse()?,
                        answered_ns: answered.parse()?,
                    });
                }
                [done, end] if done == "done" => {
                    self.end = checkpoint(end)?;
                    return Ok(all);
                }
                other => return Err(format!("the origin says {other:?}").into()),
            }
        }
    }

    pub(super) fn memory_kib(&mut self) -> Outcome<u64> {
        ask(&mut self.service, "memory")
    }

    pub(super) fn peers(&mut self) -> Outcome<u64> {
        ask(&mut self.service, "peers")
    }

    pub(super) fn wait_streaming(&mut self, peers: usize) -> Outcome<()> {
        wait_peers(&mut self.service, |streaming| streaming >= peers as u64)
    }

    pub(super) fn wait_gone(&mut self) -> Outcome<()> {
        wait_peers(&mut self.service, |streaming| streaming == 0)
    }

    pub(super) fn kill(self) -> Outcome<()> {
        self.service.kill()
    }
}

pub(super) fn wait_peers(service: &mut Service, is_it: impl Fn(u64) -> bool) -> Outcome<()> {
    let began = Instant::now();
    while !is_it(ask(service, "peers")?) {
        if began.elapsed() > PATIENCE {
            return Err("subscribers don't come, or don't go".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn ask(service: &mut Service, question: &str) -> Outcome<u64> {
    service.say(question)?;
    Ok(service.hear()?.get(1).ok_or("no answer")?.parse()?)
}
