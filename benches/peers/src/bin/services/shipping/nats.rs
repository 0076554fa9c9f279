//! From the beginning of a write until another service can read it: a mirror at a leaf node of NATS, and ours.
//!
//! ```text
//!  publish ──▶ server "origin": stream SALES ── leaf connection ──▶ server "leaf": mirror of SALES ──▶ push consumer
//! ```
//! NATS acknowledges what it has written, not what it has synced, at both ends. Ours is synced at both.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::push::{self, Messages};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use async_nats::jetstream::stream::{Config, External, Source, StorageType};
use async_nats::jetstream::{self, Context};
use futures_util::future::try_join;
use futures_util::stream::StreamExt as _;
use tokio::runtime::{Builder, Runtime};

use super::remote_view::Remote;
use super::{PATIENCE, Scale, sale};
use crate::Outcome;
use crate::figure::{Figure, Wanted};
use crate::timing::{Latencies, Rounds, ms, ratios};

const PROGRAM: &str = "nats-server";
const SUBJECT: &str = "sales.till";

/// What is installed, or why there is none.
pub(super) fn version() -> Result<String, String> {
    let missing = |error| format!("{PROGRAM} can't be run: {error}");
    let output = Command::new(PROGRAM).arg("--version").output().map_err(missing)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().replace(':', ""))
}

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    if let Err(why) = version() {
        let what = "A write's beginning until it can be read elsewhere, beside NATS";
        return Ok(vec![Figure::new(what, "ms", None).note(format!("left out: {why}"))]);
    }
    let mut nats = Mirrored::start(dir)?;
    let remote = Remote::start(dir)?;
    let (mut theirs, mut ours) = <(Rounds, Rounds)>::default();
    let mut number = 0;
    for _ in 0..scale.peer_rounds {
        let (mut of_theirs, mut of_ours) = (Latencies::default(), Latencies::default());
        for _ in 0..scale.peer_commits {
            number += 1;
            of_theirs.add(nats.publish_and_receive()?);
            of_ours.add(remote.append_and_see(number)?);
        }
        theirs.add(&of_theirs);
        ours.add(&of_ours);
    }
    let beside = "NATS, a stream's mirror at a leaf node";
    let note = "ours is synced at both ends and in a view; NATS syncs at neither, and hands the message over";
    Ok(vec![
        Figure::new("A write's beginning until it is there elsewhere: p50", "ms", ms(&ours.p50))
            .beside(beside, ms(&theirs.p50), ratios(&ours.p50, &theirs.p50))
            .wanted(Wanted::RatioAtMost(1.0))
            .note(note),
        Figure::new("The same: p99", "ms", ms(&ours.p99))
            .beside(beside, ms(&theirs.p99), ratios(&ours.p99, &theirs.p99))
            .wanted(Wanted::RatioAtMost(1.0)),
    ])
}

/// A stream, and somebody who hears what its mirror gets.
struct Mirrored {
    runtime: Runtime,
    stream: Context,
    mirrored: Messages,
    /// Behind the connections, so that they go last.
    _servers: [Server; 2],
}

impl Mirrored {
    fn start(dir: &Path) -> Outcome<Self> {
        let leaf_port = free_port()?;
        let accepts = format!("leafnodes {{ listen: \"127.0.0.1:{leaf_port}\" }}");
        let connects =
            format!("leafnodes {{ remotes: [ {{ url: \"nats://127.0.0.1:{leaf_port}\" }} ] }}");
        let origin = Server::start(dir, "origin", &accepts)?;
        let leaf = Server::start(dir, "leaf", &connects)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (stream, mirrored) = runtime.block_on(async {
            let stream = jetstream::new(connect(origin.port).await?);
            stream.create_stream(config("SALES", &[SUBJECT], None)).await?;
            let there = jetstream::new(connect(leaf.port).await?);
            Ok::<_, async_nats::Error>((stream, mirror(&there).await?))
        })?;
        let mut this = Self { runtime, stream, mirrored, _servers: [origin, leaf] };
        this.publish_and_receive()?; // until the mirror has come to life
        Ok(this)
    }

    /// From the beginning of a publication until the mirror's consumer has it.
    fn publish_and_receive(&mut self) -> Outcome<Duration> {
        let Self { runtime, stream, mirrored, .. } = self;
        let payload = vec![0xA5; sale::PAYLOAD_BYTES];
        let began = Instant::now();
        let publish = async {
            stream.publish(SUBJECT, payload.into()).await?.await?;
            Ok::<_, async_nats::Error>(())
        };
        let receive = async {
            mirrored.next().await.ok_or("the mirror's consumer has ended")??;
            Ok(began.elapsed())
        };
        let both = async { tokio::time::timeout(PATIENCE, try_join(publish, receive)).await };
        let ((), took) = runtime.block_on(both)??;
        Ok(took)
    }
}

async fn connect(port: u16) -> Result<async_nats::Client, async_nats::Error> {
    let began = Instant::now();
    loop {
        match async_nats::connect(format!("127.0.0.1:{port}")).await {
            Ok(client) => return Ok(client),
            Err(error) if began.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn mirror(there: &Context) -> Result<Messages, async_nats::Error> {
    let external = External { api_prefix: "$JS.origin.API".to_owned(), delivery_prefix: None };
    let of = Source { name: "SALES".to_owned(), external: Some(external), ..Source::default() };
    let mirror = there.create_stream(config("MIRROR", &[], Some(of))).await?;
    let consumer = push::Config {
        deliver_subject: "mirrored".to_owned(),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::None,
        ..push::Config::default()
    };
    Ok(mirror.create_consumer(consumer).await?.messages().await?)
}

fn config(name: &str, subjects: &[&str], mirror: Option<Source>) -> Config {
    Config {
        name: name.to_owned(),
        subjects: subjects.iter().map(|&it| it.to_owned()).collect(),
        storage: StorageType::File,
        mirror,
        ..Config::default()
    }
}

/// A throw-away server on the loopback.
struct Server {
    process: Child,
    port: u16,
}

impl Server {
    fn start(dir: &Path, name: &str, leafnodes: &str) -> Outcome<Self> {
        let port = free_port()?;
        let data = dir.join(format!("nats-{name}"));
        fs::create_dir_all(&data)?;
        let config = format!(
            "server_name: {name}\nlisten: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {:?}, domain: {name} }}\n{leafnodes}\n",
            data.display().to_string()
        );
        let path = data.join("nats.conf");
        fs::write(&path, config)?;
        let log = fs::File::create(data.join("server.log"))?;
        let mut command = Command::new(PROGRAM);
        command.arg("-c").arg(&path).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self { process: command.spawn()?, port })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// One that was free a moment ago: the server can't say which one it has taken for its leaf nodes.
fn free_port() -> Outcome<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
