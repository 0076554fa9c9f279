//! Copying a whole journal into a new mirror over the loopback.

use std::fs;
use std::sync::Arc;

use headwater::Position;
use headwater::fs::Fs;
use headwater::fs::os::OsFs;
use headwater::shipping::{FollowOptions, follow};

use crate::corpus::Corpus;
use crate::meter::Meter;
use crate::wire;
use crate::{Group, Outcome, PATIENCE, Scratch, Way};

pub(crate) fn catch_up(scratch: &Scratch, corpus: &Corpus) -> Outcome<Group> {
    let (events, bytes) = (corpus.events, corpus.bytes);
    let folder = scratch.folder("shipping catch-up")?;
    let (files, sink) = (corpus.files.clone(), folder.join("sink"));
    let bare = move || {
        let took = wire::send_and_sync(&files, &sink)?;
        fs::remove_file(&sink)?;
        Ok(took)
    };
    let server = corpus.store.serve("127.0.0.1:0")?;
    let disk: Arc<dyn Fs> = Arc::new(OsFs);
    let last = Position::new(events.saturating_sub(1));
    let mirror = move || {
        let dir = folder.join("mirror");
        let address = server.local_addr().to_string();
        let meter = Meter::start();
        let mirror = follow(Arc::clone(&disk), &dir, address, FollowOptions::default())?;
        let end = mirror.wait_ready(PATIENCE)?.wait_past(last, PATIENCE);
        let took = meter.stop();
        mirror.stop()?;
        fs::remove_dir_all(&dir)?;
        if end.position.get() == events { Ok(took) } else { Err("the mirror is stuck".into()) }
    };
    let ways = vec![
        Way {
            name: "sendfile, CRC-32, write + fdatasync",
            events,
            bytes,
            operation: Box::new(bare),
        },
        Way { name: "mirror, created to durable", events, bytes, operation: Box::new(mirror) },
    ];
    Ok(Group::new("shipping catch-up", "fdatasync every 8 MiB and at the end", ways))
}
