//! Headwater: each service embeds its own database, and that database is its event journal.
//!
//! ```text
//!   service A                                            service B
//!   Store::append ─▶ journal ──▶ views                    views ◀── mirror of A's journal
//!                       ╰──────── serve ═══ TCP ═══ mirror ────────────╯
//! ```
//! - The **journal** ([`journal`]) is the only source of truth: append-only, checksummed, chained. When
//!   [`Store::append`] returns, the events are durable.
//! - **Views** (`view`, feature `views`) are rows folded from the journal, in RocksDB. Delete them, and they
//!   come back.
//! - **Shipping** (`shipping`, feature `shipping`): a service follows another's journal *by address* into a
//!   local mirror, byte for byte, and folds its own views from it. The owner can be down and the follower
//!   still answers. There is no broker and no coordinator.
//!
//! It is not a broker, not a consensus system and not a general-purpose database: one process writes a
//! journal, others follow it.
//!
//! ```
//! use headwater::{Append, ExpectedRevision, NewEvent, Position, Store, StreamId};
//!
//! # let dir = tempfile::tempdir()?;
//! let store = Store::create(dir.path().join("orders"))?;
//! let order = StreamId::new("order-7")?;
//! let placed = NewEvent::json("order.placed", &serde_json::json!({ "total_cents": 1250 }))?;
//! store.append(&Append::to(&order, ExpectedRevision::NoStream, [placed]))?;
//!
//! let events = store.read_all(Position::START)?.collect::<Result<Vec<_>, _>>()?;
//! assert_eq!(events[0].stream(), &order);
//! store.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//! | feature | default | what it adds | what it needs |
//! |---|---|---|---|
//! | `derive` | yes | `#[derive(Event)]` | a procedural macro |
//! | `views` | yes | views | a C++ compiler and libclang, for RocksDB |
//! | `shipping` | yes | serving and mirroring | sockets |
//! | `cli` | no | the program `headwater`, and `cli`: the same in a binary of your own | |
//! | `testing` | no | `testing`: what the tests of a service need | |
//!
//! Without default features there is the journal alone, without C++ and without sockets.
//!
//! # Where to look
//! | module | what is in it |
//! |---|---|
//! | [`store`] | what a service opens; wires the parts |
//! | [`journal`] | appending, reading, recovery |
//! | [`command`] | aggregates that decide on commands |
//! | [`reactor`] | side effects of events |
//! | `view` | rows folded from events |
//! | `shipping` | origins and mirrors |
//! | `cli` | the command line, to be mounted in a service |
//! | [`doctor`], [`repair`] | what is wrong with a store, and what can be done about it |
//! | [`retention`] | removing the oldest events, once nothing needs them |
//! | [`format`](mod@format) | the bytes, as specified in `docs/format.md` |
//! | [`fs`] | the disk seam |
//! | [`event`], [`position`], [`codec`] | the words that all others use |
//! | `testing` | given/when/then, purity of views, crashes, a clock that is set |
//! | [`upcast`], [`schema`] | what becomes of events in older forms, and the proof that all of them can be read |

#[cfg(any(feature = "cli", feature = "views"))]
mod calendar;
#[cfg(feature = "cli")]
pub mod cli;
pub mod codec;
pub mod command;
pub mod doctor;
#[cfg(feature = "test-kit")]
#[doc(hidden)]
pub mod env;
#[cfg(not(feature = "test-kit"))]
mod env;
pub mod error;
pub mod event;
pub mod format;
pub mod fs;
#[cfg(feature = "test-kit")]
#[doc(hidden)]
pub mod fuzzing;
mod hex;
pub mod journal;
pub mod options;
#[cfg(feature = "test-kit")]
#[doc(hidden)]
pub mod planted;
#[cfg(not(feature = "test-kit"))]
mod planted;
pub mod position;
pub mod reactor;
pub mod retention;
pub mod schema;
#[cfg(feature = "shipping")]
pub mod shipping;
pub mod store;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
pub mod upcast;
#[cfg(feature = "views")]
pub mod view;

pub use error::{
    AppendError, Corruption, CorruptionKind, IngestError, InvalidAppend, IoError, OpenError,
    Poison, ReadError, Refusal,
};
pub use event::{
    EncodeError, Event, EventId, EventKind, EventKindRef, EventType, ExpectedRevision,
    InvalidEvent, KnownKind, NewEvent, Payload, PayloadCodec, Recorded, Revision, StreamId,
};
#[cfg(feature = "shipping")]
pub use journal::Mirrored;
pub use journal::repair;
pub use journal::{
    Append, Appended, BackupError, BackupReport, CloseError, Comparison, Cursor, CursorBatch,
    Damage, DamageKind, Events, EventsBackward, Fork, Ingest, Item, Journal, Orphans, Placed,
    Query, QueryEvents, QueryItem, Receipt, RecoveryReport, RestoreError, RestoreReport,
    SegmentCheck, SegmentInfo, SegmentState, SetAsideError, StreamEvents, StreamEventsBackward,
    Subscription, Ticket, TokenError, TokenState, VerifyProgress, VerifyReport, ViewBehind,
    abandon_restore, restore, verify, verify_deep,
};
pub use options::JournalOptions;
pub use position::{
    Chain, Checkpoint, Durability, Incarnation, InvalidId, InvalidToken, JournalId, Locator,
    NodeId, Position, Token,
};
pub use store::{Store, StoreBuilder};
pub use upcast::Decoded;

/// What `#[derive(Event)]` writes into the code of others.
#[cfg(feature = "derive")]
#[doc(hidden)]
pub mod __private {
    pub use serde;
}

/// The specifications, executed.
#[cfg(doctest)]
mod specifications {
    #[cfg(all(feature = "views", feature = "shipping"))]
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[cfg(feature = "derive")]
    #[doc = include_str!("../docs/evolution.md")]
    struct Evolution;
    #[doc = include_str!("../docs/commands.md")]
    struct Commands;
    #[cfg(all(feature = "derive", feature = "views", feature = "shipping", feature = "testing"))]
    #[doc = include_str!("../docs/cookbook.md")]
    struct Cookbook;
    #[doc = include_str!("../docs/format.md")]
    struct Format;
    #[cfg(feature = "shipping")]
    #[doc = include_str!("../docs/protocol.md")]
    struct Protocol;
}
