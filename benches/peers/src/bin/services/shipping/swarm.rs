//! Thousands of subscribers that speak the protocol and keep nothing, in one thread.
//!
//! Plain or over TLS. Each acknowledges what it has got, as a mirror would; what a mirror does with it (verify, write, sync) would be
//! measured at the subscribers, and there they are many machines.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use headwater::Position;
use headwater::position::{Chain, Checkpoint, Incarnation, NodeId};
use headwater::shipping::message::{
    Ack, Authentication, FRAME_BYTES_MAX, FrameReader, Hello, Message, PROTOCOL_VERSIONS, Subscribe,
};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use serde::Serialize;

use super::origin::{Acked, Door, Origin};
use super::relays::Relays;
use super::tls::{self, Identity};
use super::{PATIENCE, Scale, bare, sale};
use crate::Outcome;
use crate::figure::{Figure, Wanted};
use crate::shared::page::grouped;
use crate::shared::spread::Spread;
use crate::timing::{Latencies, Rounds, ms, now_ns, ratios};

const READ_BYTES: usize = 64 << 10;
const WINDOW_BYTES: u32 = 64 << 20;
/// Parts of a run, for the spread.
const ROUNDS: usize = 5;
const COMMITS_PER_SECOND: u32 = 10;
/// At the same time; fewer than an origin allows.
const INTRODUCTIONS: usize = 16;
/// As often as a mirror, a member asks how far the origin is.
const ASKS_EVERY_NS: u64 = 750_000_000;
/// Descriptors that are needed besides those of subscribers.
const DESCRIPTORS: u64 = 200;

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let mut figures = Vec::new();
    for (number, it) in scale.subscribers.iter().enumerate() {
        let measured = fan_out(&dir.join(number.to_string()), it, scale.fan_out);
        // What is too much for this machine shall not cost the other figures.
        figures.extend(measured.unwrap_or_else(|error| {
            let failed = Figure::new(arrival(it), "ms", None).wanted(wanted(it));
            vec![failed.note(format!("failed: {error}"))]
        }));
    }
    Ok(figures)
}

/// So many, all in the same way.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct FanOut {
    subscribers: usize,
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum How {
    Plain,
    Tls,
    /// As many at each of so many relays.
    Relays(usize),
}

impl FanOut {
    pub(super) const fn new(subscribers: usize, how: How) -> Self {
        Self { subscribers, how }
    }
}

fn title(&FanOut { subscribers, how }: &FanOut) -> String {
    let how = match how {
        How::Plain => String::new(),
        How::Tls => " over TLS".to_owned(),
        How::Relays(relays) => format!(" of {relays} relays"),
    };
    format!("{} subscribers{how}, {COMMITS_PER_SECOND} commits/s", grouped(subscribers as f64))
}

fn arrival(it: &FanOut) -> String {
    format!("{}: from the answer to the last byte at a subscriber, p99", title(it))
}

const fn wanted(it: &FanOut) -> Wanted {
    Wanted::AtMost(match it.how {
        How::Relays(_) => 250.0,
        _ if it.subscribers > 1_000 => 500.0,
        _ => 50.0,
    })
}

fn fan_out(dir: &Path, it: &FanOut, time: Duration) -> Outcome<Vec<Figure>> {
    let (what, subscribers) = (arrival(it), it.subscribers);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    if limit.is_some_and(|limit| limit < subscribers as u64 + DESCRIPTORS) {
        let note =
            format!("left out: at most {} open files are allowed (ulimit -n)", limit.unwrap_or(0));
        return Ok(vec![Figure::new(what, "ms", None).note(note)]);
    }
    let ours = Ran::of(&dir.join("ours"), it, time, None)?;
    let bare = Ran::of(&dir.join("bare"), it, time, Some(ours.message_bytes))?;

    let p50 = |ran: &Ran| ms(&ran.rounds.p50).map_or(f64::NAN, |it| it.median);
    let is_at_relays = matches!(it.how, How::Relays(_));
    let note = format!(
        "{} deliveries, p50 {:.2} ms beside {:.2} ms; the last subscriber of a commit has it after {:.2} ms beside {:.2} ms (median); one ran after the other; subscribers{} and origin share the processors",
        grouped(ours.seen as f64),
        p50(&ours),
        p50(&bare),
        ours.slowest_ms,
        bare.slowest_ms,
        if is_at_relays { ", relays, each of which writes and syncs," } else { "" }
    );
    let arrived = Figure::new(what, "ms", ms(&ours.rounds.p99))
        .beside(bare::WHAT, ms(&bare.rounds.p99), ratios(&ours.rounds.p99, &bare.rounds.p99))
        .wanted(wanted(it))
        .note(note);
    if is_at_relays {
        return Ok(vec![arrived]);
    }
    let is_tls = it.how == How::Tls;
    let memory = Figure::new(
        format!("{}: resident memory at the origin for each", title(it)),
        "KiB",
        Spread::of([ours.kib_each]),
    )
    .beside(
        if is_tls { "a list of bare TLS streams" } else { "a list of sockets" },
        Spread::of([bare.kib_each]),
        None,
    )
    .wanted(Wanted::AtMost(if is_tls { 64.0 } else { 16.0 }))
    .note(format!("{} KiB without them; the kernel's buffers aren't in it", ours.kib_without));
    Ok(vec![arrived, memory])
}

/// What came of one run.
struct Ran {
    rounds: Rounds,
    /// When the last subscriber had a commit, median.
    slowest_ms: f64,
    seen: usize,
    kib_without: u64,
    kib_each: f64,
    message_bytes: u64,
}

impl Ran {
    /// Headwater, or the machine alone with messages of so many bytes.
    fn of(dir: &Path, it: &FanOut, time: Duration, bare: Option<u64>) -> Outcome<Self> {
        let journal = dir.join("origin");
        let identity =
            (it.how == How::Tls).then(|| Identity::create(&dir.join("tls"))).transpose()?;
        let mut origin = match bare {
            Some(bytes) => Origin::start_bare(&journal, "127.0.0.1:0", bytes, identity)?,
            None => {
                sale::filled(&journal, 1)?.close()?;
                Origin::start_as(&journal, "127.0.0.1:0", identity)?
            }
        };
        origin.commit(COMMITS_PER_SECOND, Duration::ZERO)?;
        let kib_without = origin.memory_kib()?;
        let (swarm, relays) = gather(dir, it, &mut origin, bare)?;
        let interval = Duration::from_secs(1) / COMMITS_PER_SECOND;
        origin.commit(COMMITS_PER_SECOND, interval)?; // not counted
        let commits = u32::try_from(time.as_millis() / interval.as_millis())?;
        let before = origin.end.offset;
        let acked = origin.commit(commits, interval)?;
        let kib_with = origin.memory_kib()?;
        let last = acked.last().ok_or("no commit")?.offset;
        let deliveries = swarm.stop_at(last)?;
        drop(relays);
        origin.kill()?;

        let (mut rounds, mut whole, mut seen) = (Rounds::default(), Latencies::default(), 0);
        for round in acked.chunks(acked.len().div_ceil(ROUNDS)) {
            let mut each = Latencies::default();
            for commit in round {
                let slowest = arrivals(&deliveries, commit, &mut each);
                whole.add_between_ns(commit.answered_ns, slowest);
            }
            seen += each.len();
            rounds.add(&each);
        }
        if seen != acked.len() * it.subscribers {
            return Err("a subscriber has not got everything".into());
        }
        Ok(Self {
            rounds,
            slowest_ms: whole.percentile(0.5) * 1e3,
            seen,
            kib_without,
            kib_each: kib_with.saturating_sub(kib_without) as f64 / it.subscribers as f64,
            message_bytes: (last - before) / u64::from(commits),
        })
    }
}

/// They subscribe where they are to; gives the relays back, so that these stay.
fn gather(
    dir: &Path,
    it: &FanOut,
    origin: &mut Origin,
    bare: Option<u64>,
) -> Outcome<(Swarm, Option<Relays>)> {
    if let How::Relays(count) = it.how {
        let dir = dir.join("relays");
        let mut relays = match bare {
            Some(bytes) => Relays::start_bare(&dir, origin.address, count, bytes)?,
            None => Relays::start(&dir, origin.address, count)?,
        };
        let swarm = Swarm::connect(relays.doors.clone(), origin.end, it.subscribers)?;
        relays.wait_streaming(it.subscribers)?;
        return Ok((swarm, Some(relays)));
    }
    let swarm = Swarm::connect(vec![origin.door()?], origin.end, it.subscribers)?;
    origin.wait_streaming(it.subscribers)?;
    Ok((swarm, None))
}

/// When each subscriber had this commit whole; gives back the last.
fn arrivals(deliveries: &[Delivery], commit: &Acked, each: &mut Latencies) -> u64 {
    let its = deliveries.iter().filter(|it| (it.from + 1..=it.to).contains(&commit.offset));
    its.map(|delivery| {
        each.add_between_ns(commit.answered_ns, delivery.at_ns);
        delivery.at_ns
    })
    .max()
    .unwrap_or(u64::MAX)
}

/// What a subscriber got at once: everything from one offset to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delivery {
    from: u64,
    to: u64,
    at_ns: u64,
}

impl Delivery {
    pub(super) const fn bytes(&self) -> u64 {
        self.to - self.from
    }
}

/// The subscribers' thread.
pub(super) struct Swarm {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Outcome<Members>>,
}

impl Swarm {
    /// They subscribe to what follows `from`.
    pub(super) fn connect(doors: Vec<Door>, from: Checkpoint, count: usize) -> Outcome<Self> {
        let mut members = Members {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            members: Vec::with_capacity(count),
            deliveries: Vec::new(),
            buffer: vec![0; READ_BYTES],
        };
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let (tell, ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || -> Outcome<Members> {
            members.gather(&doors, from, count)?;
            tell.send(())?;
            while !seen.load(Ordering::Acquire) {
                members.turn(Duration::from_millis(20))?;
            }
            Ok(members)
        });
        if ready.recv().is_err() {
            return match thread.join().map_err(|_| "the subscribers panicked")? {
                Ok(_) => Err("the subscribers are gone".into()),
                Err(error) => Err(error),
            };
        }
        Ok(Self { stop, thread })
    }

    pub(super) fn stop(self) -> Outcome<()> {
        self.members().map(drop)
    }

    /// When all have got everything up to there.
    fn stop_at(self, offset: u64) -> Outcome<Vec<Delivery>> {
        let mut members = self.members()?;
        let began = now_ns();
        while members.members.iter().any(|member| member.at < offset) {
            members.turn(Duration::from_millis(20))?;
            if Duration::from_nanos(now_ns() - began) > PATIENCE {
                return Err("a subscriber is stuck".into());
            }
        }
        Ok(members.deliveries)
    }

    fn members(self) -> Outcome<Members> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| "the subscribers panicked")?
    }
}

struct Members {
    epoll: OwnedFd,
    members: Vec<Member>,
    deliveries: Vec<Delivery>,
    buffer: Vec<u8>,
}

impl Members {
    /// Several introduce themselves at a time; who is in already is served meanwhile.
    fn gather(&mut self, doors: &[Door], from: Checkpoint, count: usize) -> Outcome<()> {
        std::thread::scope(|scope| {
            let (tell, new) = sync_channel(INTRODUCTIONS);
            for first in 0..INTRODUCTIONS {
                let tell = tell.clone();
                scope.spawn(move || {
                    let ours = doors.iter().cycle().take(count).skip(first);
                    for door in ours.step_by(INTRODUCTIONS) {
                        if tell.send(Member::subscribe(door, Some(from), from)).is_err() {
                            return; // one has failed
                        }
                    }
                });
            }
            drop(tell);
            while self.members.len() < count {
                match new.recv_timeout(Duration::from_millis(1)) {
                    Ok(member) => {
                        self.add(member?)?;
                        new.try_iter().try_for_each(|member| self.add(member?))?;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Err("who is missing?".into()),
                }
                self.turn(Duration::ZERO)?;
            }
            Ok(())
        })
    }

    fn add(&mut self, member: Member) -> Outcome<()> {
        let socket = member.stream.socket();
        socket.set_nonblocking(true)?;
        let number = epoll::EventData::new_u64(self.members.len() as u64);
        epoll::add(&self.epoll, socket, number, epoll::EventFlags::IN)?;
        self.members.push(member);
        Ok(())
    }

    /// Takes what has arrived.
    fn turn(&mut self, patience: Duration) -> Outcome<()> {
        let timeout = Timespec::try_from(patience)?;
        let mut events = Vec::with_capacity(1024);
        match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events {
            let number = usize::try_from(event.data.u64())?;
            let member = self.members.get_mut(number).ok_or("whose socket?")?;
            self.deliveries.extend(member.take(&mut self.buffer)?);
        }
        Ok(())
    }
}

/// Plain, or with TLS over it.
enum Stream {
    Plain(TcpStream),
    Tls(Box<tls::Client>),
}

impl Stream {
    fn connect(door: &Door) -> Outcome<Self> {
        let stream = TcpStream::connect(door.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(match &door.tls {
            Some(config) => {
                let mut stream = tls::connect(Arc::clone(config), stream)?;
                while stream.conn.is_handshaking() {
                    stream.conn.complete_io(&mut stream.sock)?;
                }
                Self::Tls(Box::new(stream))
            }
            None => Self::Plain(stream),
        })
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }
}

/// One subscriber.
pub(super) struct Member {
    stream: Stream,
    reader: FrameReader,
    /// Whatever comes is the journal's: there are no frames.
    is_bare: bool,
    /// Up to where it has the journal.
    at: u64,
    acked: Checkpoint,
}

impl Member {
    /// Subscribes from a checkpoint on, or from the beginning, which is `acked` then.
    pub(super) fn subscribe(
        door: &Door,
        from: Option<Checkpoint>,
        acked: Checkpoint,
    ) -> Outcome<Self> {
        let stream = Stream::connect(door)?;
        let (is_bare, at) = (door.is_bare, acked.offset);
        let mut member = Self { stream, reader: FrameReader::new(), is_bare, at, acked };
        if is_bare {
            return Ok(member);
        }
        member.say(&Message::Hello(Hello {
            versions: PROTOCOL_VERSIONS,
            features: 0,
            max_frame: FRAME_BYTES_MAX,
            node: Some(NodeId::random()),
            nonce: [7; 16],
            authentication: Authentication::None,
            agent: "headwater-services".to_owned(),
        }))?;
        member.expect("WELCOME")?;
        let subscribe = Subscribe { from, witness: None, window_bytes: WINDOW_BYTES };
        member.say(&Message::Subscribe(subscribe))?;
        member.reader.allow_data(FRAME_BYTES_MAX);
        member.expect("SUBSCRIBED")?;
        member.acknowledge()?;
        Ok(member)
    }

    fn say(&mut self, message: &Message<'_>) -> io::Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.stream.write_all(&bytes)
    }

    /// It is alive, and has this much.
    pub(super) fn acknowledge(&mut self) -> io::Result<()> {
        let (mirrored, applied) = (self.acked, None);
        let echo = now_ns() / ASKS_EVERY_NS;
        self.say(&Message::Ack(Ack { mirrored, applied, echo }))
    }

    /// Byte by byte, so that nothing behind the frame is taken.
    fn expect(&mut self, name: &str) -> Outcome<()> {
        let mut byte = [0];
        loop {
            if let Some(message) = self.reader.next_message()? {
                if message.name() == name {
                    return Ok(());
                }
                return Err(format!("the origin says {message:?} instead of {name}").into());
            }
            if self.stream.read(&mut byte)? == 0 {
                return Err(format!("the origin hangs up instead of {name}").into());
            }
            self.reader.push(&byte);
        }
    }

    /// Reads once from the socket. What came of the journal was there when the read returned.
    pub(super) fn take(&mut self, buffer: &mut [u8]) -> Outcome<Option<Delivery>> {
        let read = match self.stream.read(buffer) {
            Ok(0) => return Err("the origin has closed a connection".into()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let from = self.at;
        self.heard(buffer, read);
        while let Stream::Tls(stream) = &mut self.stream
            && stream.conn.process_new_packets()?.plaintext_bytes_to_read() > 0
        {
            let read = stream.conn.reader().read(buffer)?; // what TLS holds already the socket won't tell of again
            self.heard(buffer, read);
        }
        let at_ns = now_ns();
        let mut is_alive = false;
        while let Some(message) = self.reader.next_message()? {
            match message {
                Message::Data(data) => {
                    self.at = data.offset + data.bytes.len() as u64;
                    self.acked = last_end(data.bytes, self.acked).unwrap_or(self.acked);
                }
                Message::Heartbeat(_) => is_alive = true,
                Message::Segment(_) => {}
                other => return Err(format!("the origin says {other:?}").into()),
            }
        }
        if is_alive || self.at > from {
            self.acknowledge()?;
        }
        let to = self.at;
        Ok((to > from).then_some(Delivery { from, to, at_ns }))
    }

    fn heard(&mut self, buffer: &[u8], read: usize) {
        match self.is_bare {
            true => self.at += read as u64,
            false => self.reader.push(buffer.get(..read).unwrap_or_default()),
        }
    }
}

/// The end of the last whole batch in there, read from its header as `docs/format.md` says. Verifying it is left to those
/// who keep it.
fn last_end(mut bytes: &[u8], before: Checkpoint) -> Option<Checkpoint> {
    let mut end = None;
    while let Some(header) = bytes.first_chunk::<128>() {
        let u32_at = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(*header.get(at..)?.first_chunk()?));
        let len = u32_at(60)?;
        let Some(rest) = bytes.get(usize::try_from(len).ok()?..) else { break };
        end = Some(Checkpoint {
            journal: before.journal,
            epoch: u32_at(56)?,
            incarnation: Incarnation::new(u64_at(64)?),
            offset: u64_at(40)? + u64::from(len),
            position: Position::new(u64_at(32)? + u64::from(u32_at(28)?)),
            chain: Chain::from_bytes(*header.get(80..)?.first_chunk()?),
        });
        bytes = rest;
    }
    end
}
