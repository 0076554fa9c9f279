//! Copying a whole journal into a new mirror, beside sending its files and syncing what arrives.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headwater::format::segment::HEADER_PAGE_BYTES;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::shipping::{FollowOptions, follow};
use headwater::{Position, SegmentInfo};

use super::{PATIENCE, Scale, sale};
use crate::figure::{Figure, Wanted};
use crate::meter::Meter;
use crate::shared::spread::Spread;
use crate::timing::ratios;
use crate::{Outcome, wire};

pub(super) fn measure(dir: &Path, scale: &Scale) -> Outcome<Vec<Figure>> {
    let store = sale::filled(&dir.join("origin"), scale.catch_up_bytes)?;
    let end = store.journal().end();
    let files: Vec<_> = store.journal().segments().into_iter().map(used).collect();
    let server = store.serve("127.0.0.1:0")?;
    let address = server.local_addr().to_string();
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        bare.push(send(&files, &dir.join("sink"))?.as_secs_f64());
        let last = Position::new(end.position.get() - 1);
        ours.push(mirror(&dir.join("mirror"), &address, last)?.as_secs_f64());
    }
    server.shutdown();
    let rate = |times: &[f64]| Spread::of(times.iter().map(|time| end.offset as f64 / time / 1e6));
    let what = format!(
        "Catch-up of a new mirror: {:.0} MB of 256 B events, until all is durable",
        end.offset as f64 / 1e6
    );
    let note = "synced every 8 MiB and at the end, both; verified with its chain, only ours";
    Ok(vec![
        Figure::new(what, "MB/s", rate(&ours))
            .beside("sendfile, CRC-32, write + fdatasync", rate(&bare), ratios(&bare, &ours))
            .wanted(Wanted::RatioAtLeast(0.8))
            .note(note),
    ])
}

/// A segment's file and how much of it is in use.
fn used(segment: SegmentInfo) -> (PathBuf, u64) {
    let batches = segment.end_offset - segment.base_offset;
    (segment.path, HEADER_PAGE_BYTES as u64 + batches)
}

fn send(files: &[(PathBuf, u64)], sink: &Path) -> Outcome<Duration> {
    let took = wire::send_and_sync(files, sink)?;
    fs::remove_file(sink)?;
    settle(sink)?;
    Ok(took.time)
}

fn mirror(dir: &Path, address: &str, last: Position) -> Outcome<Duration> {
    let disk: Arc<dyn Fs> = Arc::new(OsFs);
    let meter = Meter::start();
    let mirror = follow(disk, dir, address, FollowOptions::default())?;
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
