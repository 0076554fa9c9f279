//! Journals over the network: an origin serves its journal, mirrors follow it, byte for byte.
//!
//! ```text
//!   origin process                                   mirror process
//!   journal ─▶ cursor ─▶ session ═══ TCP ═══▶ session ─▶ Ingest ─▶ mirror ─▶ views, like of an own journal
//!     ▲ durable only        ◀──── ACK: durable up to P ────            │
//!     └ compares the mirror's end with its own history before it sends a byte
//! ```
//!
//! Invariants:
//! - In order, without gap or duplicate, and nothing that wasn't durable at the origin.
//! - A mirror's segments are the origin's, byte for byte: sealed ones whole, the active one up to the
//!   durable end.
//! - An origin that was restored from an older state is recognised at the first subscription, however far
//!   it has grown again: a place in a journal is told with its chain, never as a bare number. The mirror
//!   halts and is kept, because it may hold the only copy of acknowledged events.
//! - Nothing of another history is ever mixed into a mirror.
//! - The journal is the only buffer: no subscriber, however slow or hostile, delays commits or makes the
//!   origin's memory grow.
//! - Lag that isn't known is never reported as 0.
//!
//! [`serve`] and [`follow`] are the two ends; [`message`] is the wire format of `docs/protocol.md`.

pub mod message;
pub mod security;

mod error;
mod feed;
pub(crate) mod filter;
mod link;
mod mirror;
mod observe;
mod recover;
mod relay;
mod server;
pub(crate) mod session;
mod shape;
pub(crate) mod status_file;
mod transport;
mod upstreams;
mod wire;

pub use error::{Divergent, ServeError, ShippingError, WaitError};
pub use feed::{Feed, FeedError, FeedStatus, follow_feed};
pub use filter::{
    FILTER_BYTES_MAX, FILTER_NAMES_MAX, FILTER_PARTS_MAX, FeedFilter, FeedPart, InvalidFilter,
};
pub use mirror::{FollowOptions, ForkPolicy, Mirror, MirrorState, MirrorStatus, follow};
pub use observe::{EndReason, Ends};
pub use recover::{PeersCheck, PeersError, TakenBack, abandon_recovery, recover};
#[cfg(feature = "cli")]
pub(crate) use recover::{Standing, ask};
pub use relay::Served;
pub use server::{PeerState, PeerStatus, ServeOptions, Server, serve};
pub use session::{Deadline, Deadlines, Violation};
pub use shape::{Public, PublicShape, PublishError, Shape};
pub use upstreams::{Addresses, UpstreamStatus};

/// Runs the examples of the specification.
#[cfg(doctest)]
#[doc = include_str!("../../docs/protocol.md")]
mod protocol {}

/// Runs the examples of the page.
#[cfg(doctest)]
#[doc = include_str!("../../docs/operate/feeds.md")]
mod feeds_page {}
