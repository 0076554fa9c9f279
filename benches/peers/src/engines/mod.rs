//! Who takes part; one file each.

use crate::engine::Peer;

mod device;
mod fjall;
mod headwater;
mod keys;
mod okaywal;
mod raft_engine;
mod redb;
#[cfg(feature = "rocksdb")]
mod rocksdb;
mod sqlite;
mod umadb;
mod walrus;

/// In the order of the tables. The first one is what the others are compared with.
pub(crate) const PEERS: &[Peer] = &[
    headwater::PEER,
    device::ZEROED,
    device::GROWING,
    raft_engine::PEER,
    okaywal::PEER,
    #[cfg(feature = "rocksdb")]
    rocksdb::PEER,
    fjall::PEER,
    sqlite::PEER,
    redb::PEER,
    umadb::PEER,
    walrus::PEER,
];

/// What was looked at and not measured, and why.
pub(crate) const LEFT_OUT: [(&str, &str); 4] = [
    (
        "commitlog 0.2.0",
        "never durable: its `flush` calls `File::flush`, which does nothing, and syncs only the index; there is no other call",
    ),
    ("simple_wal 0.3.0", "never durable: its `flush` calls `File::flush`, which does nothing"),
    (
        "nano-wal 1.0.0",
        "no checksums, and a batch of more than 204 events fails (it is one `writev` of five pieces each)",
    ),
    (
        "spacetimedb-commitlog 2",
        "needs a newer compiler (1.97) than this project; its licence (BSL) isn't one of free software",
    ),
];
