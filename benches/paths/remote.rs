//! How long it takes from an append here until a view in another service shows it.

use headwater::{Append, ExpectedRevision, NewEvent, Store, StreamId};

use crate::append::append_bytes;
use crate::baseline::Device;
use crate::corpus::{Corpus, sale};
use crate::meter::Meter;
use crate::view::Bought;
use crate::wire::Peer;
use crate::{Group, Outcome, PATIENCE, Scratch, Way};

pub(crate) fn commit_to_remote_view(scratch: &Scratch, _: &Corpus) -> Outcome<Group> {
    let folder = scratch.folder("commit to remote view")?;
    let stream = StreamId::new("till-0")?;
    let one = move |number| -> Outcome<Append> {
        let sold = NewEvent::typed(&sale(number, 1_000)?)?;
        Ok(Append::to(&stream, ExpectedRevision::Any, [sold]))
    };

    let origin = Store::create(folder.join("origin"))?;
    let bytes = append_bytes(&origin, &one(0)?)?;
    let server = origin.serve("127.0.0.1:0")?;
    let follower = Store::create(folder.join("follower"))?;
    let mirror = follower.mirror("origin", server.local_addr().to_string())?;
    let view = follower.view_of(&mirror.wait_ready(PATIENCE)?, Bought)?;

    let size = scratch.scale.file_bytes;
    let mut here = Device::create(&folder.join("here"), size)?;
    let there = Device::create(&folder.join("there"), size)?;
    let message = vec![0xA5; usize::try_from(bytes)?];
    let mut peer = Peer::start(there, message.len())?;
    let bare = move || {
        let meter = Meter::start();
        here.write_synced(&message)?;
        peer.send(&message)?;
        Ok(meter.stop())
    };

    let mut number = 0;
    let remote = move || {
        number += 1;
        let append = one(number)?;
        let meter = Meter::start();
        let token = origin.append(&append)?.token();
        view.wait_for(&token, PATIENCE)?;
        let took = meter.stop();
        let _running = (&mirror, &server);
        Ok(took)
    };
    let ways = vec![
        Way { name: "sync, send, sync, reply", events: 1, bytes, operation: Box::new(bare) },
        Way { name: "append to wait_for", events: 1, bytes, operation: Box::new(remote) },
    ];
    let durable = "fdatasync on both sides; the view's rows follow";
    Ok(Group::new("commit to remote view", durable, ways))
}
