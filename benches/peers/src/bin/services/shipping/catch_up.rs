//! Copying a whole journal into a new mirror, beside sending its files and syncing what arrives; plain, and over TLS.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headwater::format::segment::HEADER_PAGE_BYTES;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::shipping::{FollowOptions, ServeOptions, Server, follow};
use headwater::{Position, SegmentInfo, Store};

use super::senders::{Checked, Copied};
use super::tls::{self, Identity};
use super::{PATIENCE, Scale, sale};
use crate::figure::{Figure, Wanted};
use crate::meter::{Meter, Took};
use crate::shared::spread::Spread;
use crate::timing::ratios;
use crate::{Outcome, wire};

const SENDFILE: &str = "sendfile, CRC-32, write + fdatasync";

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let store = sale::filled(&dir.join("origin"), scale.catch_up_bytes)?;
    let identity = Identity::create(&dir.join("tls"))?;
    let plain = store.serve("127.0.0.1:0")?;
    let security = Some(identity.security()?);
    let secured =
        store.serve_with("127.0.0.1:0", ServeOptions { security, ..ServeOptions::default() })?;
    let over_tls = FollowOptions { tls: Some(identity.client()?), ..FollowOptions::default() };
    let bench = Bench { dir, store: &store, rounds: scale.rounds };

    let bytes = store.journal().end().offset as f64;
    let what = format!(
        "Catch-up of a new mirror: {:.0} MB of 256 B events, until all is durable",
        bytes / 1e6
    );
    let note = "synced every 8 MiB and at the end, both; verified with its chain, only ours";
    let mut figures = vec![
        bench.figure(what, SENDFILE, &plain, &FollowOptions::default(), send)?.note(note),
        bench.figure(
            "The same over TLS 1.3".to_owned(),
            "a bare stream over TLS 1.3, CRC-32, write + fdatasync",
            &secured,
            &over_tls,
            |files, sink| send_over_tls(files, sink, &identity),
        )?,
    ];
    figures.push(bench.without_sendfile(
        ("The bare one with read + write in place of sendfile", SENDFILE),
        send_copied,
        send,
    )?);
    figures.push(bench.without_sendfile(
        (
            "The bare one, read and checksummed before it leaves, as ours is",
            "the same, but sent by sendfile from the files",
        ),
        |files, sink| send_checked(files, sink, false),
        |files, sink| send_checked(files, sink, true),
    )?);
    plain.shutdown();
    secured.shutdown();
    Ok(figures)
}

struct Bench<'a> {
    dir: &'a Path,
    store: &'a Store,
    rounds: usize,
}

impl Bench<'_> {
    /// Ours and what is beside it take turns.
    fn figure(
        &self,
        what: String,
        beside: &'static str,
        server: &Server,
        options: &FollowOptions,
        send: impl Fn(&[(PathBuf, u64)], &Path) -> Outcome<Took>,
    ) -> Outcome<Figure> {
        let (end, files) = (self.store.journal().end(), self.files());
        let address = server.local_addr().to_string();
        let last = Position::new(end.position.get() - 1);
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            bare.push(self.sent(|sink| send(&files, sink))?.time.as_secs_f64());
            let took = mirror(&self.dir.join("mirror"), &address, options.clone(), last)?;
            ours.push(took.as_secs_f64());
        }
        Ok(Figure::new(what, "MB/s", rates(end.offset, &ours))
            .beside(beside, rates(end.offset, &bare), ratios(&bare, &ours))
            .wanted(Wanted::RatioAtLeast(0.8)))
    }

    /// What `sendfile` would be worth: both bare. Each is first in every other round, as often as the other: what one
    /// leaves to the disk is the other's burden as often.
    fn without_sendfile(
        &self,
        (what, beside): (&'static str, &'static str),
        without: impl Fn(&[(PathBuf, u64)], &Path) -> Outcome<Took>,
        with: impl Fn(&[(PathBuf, u64)], &Path) -> Outcome<Took>,
    ) -> Outcome<Figure> {
        let (bytes, files) = (self.store.journal().end().offset, self.files());
        let (mut times, mut times_with) = (Vec::new(), Vec::new());
        let (mut cpu, mut cpu_with) = (Vec::new(), Vec::new());
        for round in 0..self.rounds.next_multiple_of(2) {
            for is_sendfile in [round % 2 == 0, round % 2 == 1] {
                let (took, times, cpu) = match is_sendfile {
                    true => (self.sent(|sink| with(&files, sink))?, &mut times_with, &mut cpu_with),
                    false => (self.sent(|sink| without(&files, sink))?, &mut times, &mut cpu),
                };
                times.push(took.time.as_secs_f64());
                cpu.push(took.cpu.as_secs_f64());
            }
        }
        let cpu = ratios(&cpu, &cpu_with).map_or(f64::NAN, |it| it.median);
        Ok(Figure::new(what, "MB/s", rates(bytes, &times))
            .beside(beside, rates(bytes, &times_with), ratios(&times_with, &times))
            .note(format!("processor time of both ends {cpu:.2}x as much")))
    }

    fn files(&self) -> Vec<(PathBuf, u64)> {
        self.store.journal().segments().into_iter().map(used).collect()
    }

    /// Nothing stays of it.
    fn sent(&self, send: impl FnOnce(&Path) -> Outcome<Took>) -> Outcome<Took> {
        let sink = self.dir.join("sink");
        let took = send(&sink)?;
        fs::remove_file(&sink)?;
        settle(&sink)?;
        Ok(took)
    }
}

fn rates(bytes: u64, times: &[f64]) -> Option<Spread> {
    Spread::of(times.iter().map(|time| bytes as f64 / time / 1e6))
}

/// A segment's file and how much of it is in use.
fn used(segment: SegmentInfo) -> (PathBuf, u64) {
    let batches = segment.end_offset - segment.base_offset;
    (segment.path, HEADER_PAGE_BYTES as u64 + batches)
}

fn send(files: &[(PathBuf, u64)], sink: &Path) -> Outcome<Took> {
    wire::send_and_sync(files, sink)
}

fn send_copied(files: &[(PathBuf, u64)], sink: &Path) -> Outcome<Took> {
    wire::send_and_sync_over(files, sink, |stream| Ok(Copied(stream)), Ok)
}

fn send_checked(files: &[(PathBuf, u64)], sink: &Path, by_sendfile: bool) -> Outcome<Took> {
    let sender = |stream| Ok(Checked { stream, by_sendfile });
    wire::send_and_sync_over(files, sink, sender, Ok)
}

fn send_over_tls(files: &[(PathBuf, u64)], sink: &Path, identity: &Identity) -> Outcome<Took> {
    let (client, server) = (identity.bare_client()?, identity.bare_server()?);
    let sender = |stream| tls::connect(client, stream);
    wire::send_and_sync_over(files, sink, sender, |stream| tls::accept(server, stream))
}

fn mirror(dir: &Path, address: &str, options: FollowOptions, last: Position) -> Outcome<Duration> {
    let disk: Arc<dyn Fs> = Arc::new(OsFs);
    let meter = Meter::start();
    let mirror = follow(disk, dir, address, options)?;
    let end = mirror.wait_ready(PATIENCE)?.wait_past(last, PATIENCE);
    let took = meter.stop();
    mirror.stop()?;
    fs::remove_dir_all(dir)?;
    settle(dir)?;
    if end.position > last { Ok(took.time) } else { Err("the mirror is stuck".into()) }
}

/// What one of them leaves to be written shall not be the next one's burden.
fn settle(path: &Path) -> Outcome<()> {
    let parent = fs::File::open(path.parent().ok_or("no folder")?)?;
    Ok(rustix::fs::syncfs(parent)?)
}
