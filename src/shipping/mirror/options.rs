//! How an origin is followed.

use std::path::PathBuf;
use std::time::Duration;

use crate::options::JournalOptions;
use crate::position::JournalId;
use crate::shipping::security::{ClientTls, TokenSource};
use crate::shipping::session::Deadlines;

/// How an origin is followed.
///
/// ```
/// let options = headwater::shipping::FollowOptions { window_bytes: 4 << 20, ..Default::default() };
/// # assert!(!options.allow_plaintext_off_loopback);
/// ```
#[derive(Clone, Debug)]
pub struct FollowOptions {
    /// How the mirror is written.
    pub journal: JournalOptions,
    /// Which journal is followed, where several are served. Default `None`: that of the mirror, and of one that has yet
    /// to be made the own journal of who is at the first address; the others are not asked before there is a mirror, and
    /// [their status](super::MirrorStatus::upstreams) says so ([`ShippingError::NotAsked`](super::super::ShippingError::NotAsked)).
    pub journal_id: Option<JournalId>,
    /// How long the origin may take, and how often it is told that this side is alive.
    pub deadlines: Deadlines,
    /// How long one address may take to answer a connection attempt. Default 3 s.
    pub connect_timeout: Duration,
    /// How many bytes may be under way or in memory without being durable yet; half as many are synced at
    /// once while catching up. One batch (16 MiB at the most) and header pages of segments come on top: at the worst, from an
    /// origin that means ill, eight times as much. Default 16 MiB.
    pub window_bytes: u32,
    /// Connects with TLS. Default: plain TCP, to loopback addresses only.
    pub tls: Option<ClientTls>,
    /// Says who this is, within TLS or on the loopback; never in clear over a network.
    pub token: Option<TokenSource>,
    /// Plain TCP also goes to other addresses than those of the loopback: everybody on the way can read and forge
    /// what is shipped.
    pub allow_plaintext_off_loopback: bool,
    /// How this program introduces itself to the origin, for people to read there.
    pub agent: String,
    /// What to do when the origin has another history than the mirror. Default: halt.
    pub forks: ForkPolicy,
    /// The directory of a backup of the origin (or of another mirror) with which a mirror begins that isn't there yet: it is
    /// copied, verified, and only the rest is fetched. Or that of a view's base ([`ViewControl::export_base`]): then the
    /// mirror begins where that is, and what lies in front is never fetched. The copying is done by the mirror's thread
    /// ([`MirrorState::Bootstrapping`](super::MirrorState::Bootstrapping)); an interrupted one is continued by following again, also if the backup has grown.
    /// Default none: everything is fetched.
    ///
    /// [`ViewControl::export_base`]: crate::view::ViewControl::export_base
    pub begin_with: Option<PathBuf>,
    /// How often it is written down how the mirror does, for `headwater lag` and `peer ls` beside this process: into the file
    /// `following` beside the mirror's journal, in place, never synced. It is believed for three intervals. From 10 ms to
    /// 60 s: what is less or more counts as that. `None`: it isn't. Default 1 s.
    pub status_interval: Option<Duration>,
}

/// What a mirror does when its origin has lost events that it has, or has others in their place.
///
/// That happens when the origin is restored from an older copy. Then the mirror may hold the only copy of
/// acknowledged events, so nothing of it is ever removed: either it stands still, or they are set aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForkPolicy {
    /// It halts, and is kept as it is. Views of it are served as they are; [`Journal::fork`](crate::Journal::fork)
    /// and their status say that they are stale. Somebody decides: see `docs/operate/forks.md`.
    #[default]
    Halt,
    /// The mirror's tail behind the last common batch is set aside, whole, in `orphaned/` in the mirror's directory,
    /// and the mirror follows the origin from there on.
    ///
    /// Handles of the mirrored journal that were given out before are closed: take the new
    /// [`journal`](super::Mirror::journal), and open the views again on it. Views that have folded orphaned events are then
    /// set aside and built anew; others go on where they were.
    Quarantine,
}

impl Default for FollowOptions {
    fn default() -> Self {
        Self {
            journal: JournalOptions::default(),
            journal_id: None,
            deadlines: Deadlines::default(),
            connect_timeout: Duration::from_secs(3),
            window_bytes: 16 << 20,
            tls: None,
            token: None,
            allow_plaintext_off_loopback: false,
            agent: concat!("headwater/", env!("CARGO_PKG_VERSION")).to_owned(),
            forks: ForkPolicy::default(),
            begin_with: None,
            status_interval: Some(Duration::from_secs(1)),
        }
    }
}
