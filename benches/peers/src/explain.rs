//! Why another one is faster somewhere: explanations, which are shown only where the data shows that it is.

use crate::runner::Measured;
use crate::worker::Load;

struct Explanation {
    /// Of what.
    of: fn(Measured) -> bool,
    /// Of whom; of everybody if empty.
    peers: &'static [&'static str],
    text: &'static str,
}

const EXPLANATIONS: &[Explanation] = &[
    Explanation {
        of: |measured| matches!(measured, Measured::Append(Load { writers: 1, batch: 1, .. })),
        peers: &[],
        text: "**Appends of one writer**: where nothing but the sync counts, everybody with one sync for each commit is near the bare device. What is left is the encoding (ids, two checksums, the chain), and whether a commit has to allocate blocks.",
    },
    Explanation {
        of: |measured| matches!(measured, Measured::Append(Load { writers: 2.., .. })),
        peers: &[],
        text: "**Appends of many writers**: a writer that shares a sync is woken by it and comes back one by one; how many of them are there when the next sync begins decides.",
    },
    Explanation {
        of: |measured| matches!(measured, Measured::Append(Load { writers: 1, batch: 2.., .. })),
        peers: &["raft-engine"],
        text: "**Batches**: raft-engine compresses them (LZ4), so that it writes less than the others; half of each payload is text. Headwater writes what it was given.",
    },
    Explanation {
        of: |measured| matches!(measured, Measured::Append(Load { writers: 1, batch: 2.., .. })),
        peers: &["okaywal", "rocksdb", "fjall"],
        text: "**Batches**: every event of Headwater's carries an id, its stream and its type, which are encoded, hashed into the chain and remembered; these store the payload, with a number or nothing.",
    },
    Explanation {
        of: |measured| measured == Measured::Random,
        peers: &["rocksdb", "fjall", "sqlite", "redb", "umadb-core"],
        text: "**One event by its position**: a store of keys finds one value by one descent in a cached block. Headwater reads and verifies the batch that holds the event, and its smallest unit is that batch; the bigger the batches, the further it is behind.",
    },
    Explanation {
        of: |measured| measured == Measured::Random,
        peers: &["raft-engine"],
        text: "**One event by its position**: raft-engine keeps the place of every entry in memory.",
    },
    Explanation {
        of: |measured| measured == Measured::Stream,
        peers: &["rocksdb", "fjall", "sqlite", "redb", "umadb-core"],
        text: "**One stream**: these have the stream's events in one index, and the events in pages that are cached and not verified again. Headwater reads the batches that hold them, and verifies each.",
    },
    Explanation {
        of: |measured| measured == Measured::Replay,
        peers: &["redb"],
        text: "**Replay**: redb hands out values from its tree where they lie, without verifying anything. Headwater verifies two checksums for each batch; the bare read with a checksum stands in the table as the limit of that.",
    },
    Explanation {
        of: |measured| measured.is_time(),
        peers: &["sqlite", "redb", "umadb-core"],
        text: "**Opening**: a tree opens by reading a header. Headwater reads and verifies the end of the journal, makes what it found durable again before it shows it, and rebuilds what it remembers of the last events.",
    },
    Explanation {
        of: |measured| measured.is_time(),
        peers: &["rocksdb", "fjall", "raft-engine", "okaywal"],
        text: "**Opening**: how much of its log an engine has to read depends on what it has already put elsewhere, or remembers to have been read. Headwater reads and verifies what lies behind its mark, makes it durable again, and rebuilds what it remembers of the last events by their ids.",
    },
];

/// What explains the given losses, each once.
pub(crate) fn of(lost: &[(Measured, &str)]) -> Vec<&'static str> {
    let applies = |it: &&Explanation| {
        lost.iter().any(|(measured, peer)| {
            (it.of)(*measured) && (it.peers.is_empty() || it.peers.contains(peer))
        })
    };
    EXPLANATIONS.iter().filter(applies).map(|it| it.text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_lost_is_not_explained() {
        assert_eq!(of(&[]), Vec::<&str>::new());
        assert_eq!(of(&[(Measured::Replay, "sqlite")]), Vec::<&str>::new());
        assert_eq!(of(&[(Measured::Replay, "redb")]).len(), 1);
    }
}
