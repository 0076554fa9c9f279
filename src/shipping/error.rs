//! What can go wrong when journals are shipped, sorted by who has to act.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use super::feed::FeedError;
use super::message::{Divergence, ErrorCode, Failure, Speaker, VersionRange};
use super::security::{SecurityError, TlsFailure};
use super::session::{Deadline, DivergedAt, SessionEnd, TruncatedAt, Violation};
use crate::error::{IngestError, OpenError, Refusal};
use crate::format::FormatError;
use crate::format::files::Witness;
use crate::journal::{Fork, RestoreError, SetAsideError, TokenError};
use crate::position::{Checkpoint, JournalId, NodeId, Position};

/// Why a journal can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address is not on this machine's loopback, and there is no encryption.
    #[error("{address} is not a loopback address, and connections are not encrypted")]
    Plaintext {
        /// The address.
        address: SocketAddr,
    },
    /// The address can't be listened on.
    #[error("can't listen: {0}")]
    Listen(#[source] Arc<io::Error>),
    /// No thread could be started.
    #[error("can't start a thread: {0}")]
    Thread(#[source] Arc<io::Error>),
}

impl ServeError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Plaintext { .. } => "serve.plaintext",
            Self::Listen(_) => "serve.listen",
            Self::Thread(_) => "serve.thread",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Plaintext { .. } => PLAINTEXT_HINT,
            Self::Listen(_) => "see the system's error: is the address this machine's, and free?",
            Self::Thread(_) => "raise the limit on threads",
        }
    }
}

const PLAINTEXT_HINT: &str = "use TLS (docs/operate/security.md) or a loopback address; or set allow_plaintext_off_loopback if everybody who can reach the address may read the journal, and give no token then";

/// Why a mirror doesn't follow its origin at present.
///
/// [`is_halting`](Self::is_halting) tells those that end all attempts until somebody acts from those that
/// heal by themselves.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShippingError {
    /// The origin has lost events that this mirror has. The mirror is kept as it is: it may hold the only
    /// copy of them.
    #[error("the mirror is ahead of its origin: {0}")]
    Ahead(Box<Divergent>),
    /// The origin has other events than this mirror in the same places. The mirror is kept as it is.
    #[error("the origin's history is another one than the mirror's: {0}")]
    Fork(Box<Divergent>),
    /// The address belongs to another journal's origin.
    #[error("the mirror is of journal {mirror}, the origin's is {origin}")]
    Foreign {
        /// The mirror's journal.
        mirror: JournalId,
        /// The journal that is served at the address.
        origin: JournalId,
    },
    /// The origin no longer has what the mirror needs next.
    #[error(
        "the mirror ends at position {mirror}, the origin begins at {first}{}",
        Sources(sources)
    )]
    Truncated {
        /// The mirror's end.
        mirror: Position,
        /// The first position that the origin has.
        first: Position,
        /// The checkpoint there, if the origin has told.
        start: Option<Box<Checkpoint>>,
        /// Where the removed events may be found, as the origin says: other mirrors, places of backups.
        sources: Vec<String>,
    },
    /// The journal comes from this mirror itself. Nothing is taken from there, and attempts go on: paths change.
    #[error("the origin at this address is the mirror itself, or gets the journal from it")]
    Cycle {
        /// The nodes that the journal comes through, this mirror among them.
        path: Vec<NodeId>,
    },
    /// No version of the protocol in common.
    #[error("the origin speaks versions {} to {} of the protocol", versions.min, versions.max)]
    Version {
        /// The origin's versions.
        versions: VersionRange,
    },
    /// The origin refuses, or has trouble of its own: its code, and where it says so, the position.
    #[error("the origin reports {}{}: {}", failure.code, At(failure.position), failure.detail)]
    Reported {
        /// What it said.
        failure: Box<Failure>,
    },
    /// The origin sent bytes that don't continue the mirror; nothing of them was written. Damage on the way
    /// heals by fetching them again; after several times at one place the mirror halts.
    #[error("what the origin sent was refused at position {position}: {refusal}")]
    Refused {
        /// The mirror's end.
        position: Position,
        /// What is wrong with the bytes.
        refusal: Refusal,
    },
    /// The address is not on this machine's loopback, and there is no encryption; or that is allowed, and a token
    /// would go out in clear.
    #[error("{address} is not a loopback address, and the connection would not be encrypted")]
    Plaintext {
        /// The address.
        address: SocketAddr,
    },
    /// Certificates, keys or the token of this side can't be used at present.
    #[error(transparent)]
    Security(#[from] SecurityError),
    /// No TLS connection comes about. Nothing was said in it, and no token was sent.
    #[error(transparent)]
    Tls(TlsFailure),
    /// The mirror's disk is full, or failed.
    #[error(transparent)]
    Storage(IngestError),
    /// The tail that the origin has lost can't be set aside. It is still in the mirror.
    #[error("the mirror's tail can't be set aside: {0}")]
    SetAside(Arc<SetAsideError>),
    /// The mirror can't begin with the backup that it was given.
    #[error("the mirror can't begin with the backup: {0}")]
    Begin(Arc<RestoreError>),
    /// The mirror can't be opened or created.
    #[error(transparent)]
    Open(#[from] Arc<OpenError>),
    /// The address can't be resolved.
    #[error("can't resolve {address}: {source}")]
    Resolve {
        /// The address as it was given.
        address: String,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// Nobody answers.
    #[error("can't connect to {address}: {source}")]
    Connect {
        /// The last address that was tried.
        address: SocketAddr,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// A connection can't be set up on this side.
    #[error("can't set up the connection: {0}")]
    Setup(#[source] Arc<io::Error>),
    /// A filtered feed doesn't go on.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// What answers at the address is a relay that hasn't heard from its origin for a while; others were asked.
    #[error("the relay at this address doesn't hear from its origin")]
    Apart,
    /// Nobody was asked at this address: a mirror that has yet to be made, and wasn't told which journal it will be, gets
    /// that of the first address ([`FollowOptions::journal_id`](super::FollowOptions::journal_id)).
    #[error("not asked before the first address has said which journal it is")]
    NotAsked,
    /// The connection was closed.
    #[error("the origin closed the connection")]
    Disconnected,
    /// The origin said that it is going away.
    #[error("the origin is going away")]
    GoingAway {
        /// It asks for this much time before the next attempt, in milliseconds.
        reconnect_after_ms: u32,
    },
    /// A deadline has passed.
    #[error("{0}")]
    Timeout(Deadline),
    /// What answers at the address doesn't keep to the protocol.
    #[error("the origin broke the protocol: {0}")]
    Violation(#[from] Violation),
}

/// What is known of two histories that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Divergent {
    /// The mirror's end.
    pub mirror: Checkpoint,
    /// The origin's durable end.
    pub origin: Checkpoint,
    /// The old end of a tail that the mirror has set aside: those events are the mirror's alone, too, wherever in front of
    /// that end they differ.
    pub witness: Option<Witness>,
    /// Up to where both have the same events, exactly; `None` if it isn't known: the origin can't be asked, or
    /// one of both has removed what was there.
    pub common: Option<Position>,
    /// Who says so. A relay that is apart from its origin may be the one whose history is out of date: then others are
    /// asked, and it is asked again.
    pub told_by: Speaker,
}

impl Divergent {
    /// The positions of the events that the mirror has (or has set aside) and the origin hasn't, if it is known
    /// where the histories part.
    #[must_use]
    pub fn orphaned(&self) -> Option<Range<Position>> {
        let witnessed = self.witness.map_or(Position::START, |witness| witness.position);
        let end = self.mirror.position.max(witnessed);
        self.common.map(|common| common..end.max(common))
    }
}

impl std::fmt::Display for Divergent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the mirror ends at position {}", self.mirror.position)?;
        if let Some(witness) = self.witness {
            write!(f, " (and held events up to {} before)", witness.position)?;
        }
        write!(f, ", the origin at {}; ", self.origin.position)?;
        match self.orphaned() {
            Some(orphaned) if orphaned.is_empty() => {
                write!(f, "they agree up to {}", orphaned.start)
            }
            Some(Range { start, end }) => {
                let (count, last) = (end.since(start), end.get() - 1);
                write!(f, "they agree up to {start}, and only the mirror has ")?;
                match count {
                    1 => write!(f, "the event at {last}"),
                    _ => write!(f, "the {count} events from {start} to {last}"),
                }
            }
            None => f.write_str("up to where they agree is not known"),
        }?;
        f.write_str(says_so(self.told_by))
    }
}

/// Who says that histories differ, if that isn't the origin itself.
pub(super) const fn says_so(told_by: Speaker) -> &'static str {
    match told_by {
        Speaker::Origin => "",
        Speaker::Relay | Speaker::RelayBehind => "; a relay says so",
        Speaker::RelayApart => "; a relay says so that doesn't hear from the origin",
    }
}

/// Where the rest may be found.
struct Sources<'a>(&'a [String]);

impl std::fmt::Display for Sources<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, "; it names as sources: {}", self.0.join(", "))
    }
}

struct At(Option<Position>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |position| write!(f, " at position {position}"))
    }
}

impl ShippingError {
    /// Whether no further attempt is made until [`Mirror::resume`](super::Mirror::resume) or a restart.
    #[must_use]
    pub fn is_halting(&self) -> bool {
        match self {
            Self::Fork(at) => at.told_by != Speaker::RelayApart,
            Self::Ahead(_)
            | Self::Foreign { .. }
            | Self::Truncated { .. }
            | Self::Version { .. }
            | Self::Plaintext { .. }
            | Self::Open(_) => true,
            Self::Begin(error) => !error.is_disk_full(),
            Self::Reported { failure } => !failure.code.is_transient(),
            Self::Storage(error) => !matches!(error, IngestError::DiskFull(_)),
            Self::SetAside(error) => !error.is_disk_full(),
            Self::Feed(error) => error.is_halting(),
            Self::Refused { refusal, .. } => is_unsupported(refusal),
            Self::Security(_)
            | Self::Tls(_)
            | Self::Resolve { .. }
            | Self::Connect { .. }
            | Self::Setup(_)
            | Self::Cycle { .. }
            | Self::Apart
            | Self::NotAsked
            | Self::Disconnected
            | Self::GoingAway { .. }
            | Self::Timeout(_)
            | Self::Violation(_) => false,
        }
    }

    /// Whether it says something of this mirror or machine, so that other upstreams are no help.
    const fn is_own(&self) -> bool {
        match self {
            Self::Storage(_)
            | Self::SetAside(_)
            | Self::Begin(_)
            | Self::Open(_)
            | Self::Setup(_)
            | Self::Security(_) => true,
            Self::Feed(error) => error.is_own(),
            _ => false,
        }
    }

    /// Who says that the histories differ, if that is what it says.
    pub(crate) const fn told_by(&self) -> Option<Speaker> {
        match self {
            Self::Ahead(at) | Self::Fork(at) => Some(at.told_by),
            Self::Feed(FeedError::Replaced { told_by, .. }) => Some(*told_by),
            _ => None,
        }
    }

    /// Whether other upstreams can't do better: it is the trouble of this side, or the origin's own word.
    pub(crate) fn is_settled(&self) -> bool {
        self.is_own() || self.told_by() == Some(Speaker::Origin)
    }

    /// Whether the histories differ, and it is known up to where they agree: what lies behind could be set aside.
    pub(crate) fn is_parting(&self) -> bool {
        self.is_halting() && matches!(self.fork(), Some(Fork { common: Some(_) }))
    }

    /// Of a mirror whose history parts from the origin's, what is known of that.
    pub(crate) const fn fork(&self) -> Option<Fork> {
        match self {
            Self::Ahead(at) | Self::Fork(at) => Some(Fork { common: at.common }),
            _ => None,
        }
    }

    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ahead(_) => "shipping.ahead",
            Self::Fork(_) => "shipping.fork",
            Self::Foreign { .. } => "shipping.foreign",
            Self::Truncated { .. } => "shipping.truncated",
            Self::Cycle { .. } => "shipping.cycle",
            Self::Version { .. } => "shipping.version",
            Self::Reported { .. } => "shipping.reported",
            Self::Refused { .. } => "shipping.refused",
            Self::Plaintext { .. } => "shipping.plaintext",
            Self::Security(error) => error.code(),
            Self::Tls(_) => "shipping.tls",
            Self::Storage(_) => "shipping.storage",
            Self::SetAside(_) => "shipping.set_aside",
            Self::Begin(_) => "shipping.begin",
            Self::Open(_) => "shipping.open",
            Self::Resolve { .. } => "shipping.resolve",
            Self::Connect { .. } => "shipping.connect",
            Self::Setup(_) => "shipping.setup",
            Self::Feed(error) => error.code(),
            Self::Apart => "shipping.apart",
            Self::NotAsked => "shipping.not_asked",
            Self::Disconnected => "shipping.disconnected",
            Self::GoingAway { .. } => "shipping.going_away",
            Self::Timeout(_) => "shipping.timeout",
            Self::Violation(_) => "shipping.violation",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Ahead(_) => {
                "don't delete the mirror: it may hold the only copy of acknowledged events. Was the origin restored from an older copy? Close it and open it with recover_from_mirrors (`headwater recover`), before anything is appended to it. To go on without these events, follow with ForkPolicy::Quarantine. See docs/operate/forks.md"
            }
            Self::Fork(_) => {
                "don't delete the mirror: it may hold the only copy of acknowledged events. Was the origin restored from an older copy and appended to? Decide which history is to stay: put the origin's newest state back and resume, or follow with ForkPolicy::Quarantine, which sets the mirror's events aside. See docs/operate/forks.md"
            }
            Self::Foreign { .. } => {
                "check the address; to follow this origin too, use another mirror directory"
            }
            Self::Truncated { .. } => {
                "the origin has removed these events: begin the mirror anew from a backup or archive of the origin that reaches further (FollowOptions::begin_with), or follow one of the sources first"
            }
            Self::Cycle { .. } => {
                "follow the journal's origin, or a relay that doesn't get it from this mirror"
            }
            Self::Version { .. } => "upgrade the older side",
            Self::Reported { failure } => match failure.code {
                ErrorCode::AUTH_REQUIRED => {
                    "give this mirror a certificate (FollowOptions::tls) or a token that is in the origin's access list, then resume"
                }
                ErrorCode::DENIED => {
                    "put this mirror's key or token, with a right to this journal, into the origin's access list, reload that, then resume; is it the right origin?"
                }
                ErrorCode::NOT_YET if failure.position.is_none() => {
                    "a mirror is served there that has yet to get its journal, was stopped, or has halted: see its status, and resume it; attempts go on"
                }
                ErrorCode::TERMS => {
                    "the service publishes its events in another shape now: follow the feed anew under another name"
                }
                ErrorCode::SHAPE => {
                    "the service can't publish the event at this position: it is to be mended there; attempts go on"
                }
                _ => "see the origin: the trouble is on its side",
            },
            Self::Refused { .. } => {
                "run `headwater verify` on the origin's journal, and check its version"
            }
            Self::Plaintext { .. } => PLAINTEXT_HINT,
            Self::Security(error) => error.hint(),
            Self::Tls(failure) => failure.hint(),
            Self::Storage(_) => "check the mirror's disk, then resume",
            Self::Open(error) => error.hint(),
            Self::SetAside(error) => error.hint(),
            Self::Feed(error) => error.hint(),
            Self::Begin(error) => error.hint(),
            Self::Resolve { .. } | Self::Connect { .. } => {
                "is the origin running, and is the address right? Attempts go on"
            }
            Self::Setup(_) => "raise the limits on threads and open files; attempts go on",
            Self::Apart => "see the relay: whom does it follow, and why not? Attempts go on",
            Self::NotAsked => {
                "name the journal (FollowOptions::journal_id), or put an address first that answers; attempts at the first go on"
            }
            Self::Disconnected | Self::GoingAway { .. } | Self::Timeout(_) => {
                "nothing: attempts go on"
            }
            Self::Violation(_) => "does another service answer at this address? Attempts go on",
        }
    }

    /// What the end of a session means for the mirror that ends at `mirror`.
    pub(crate) fn from_end(
        end: SessionEnd,
        mirror: Option<Checkpoint>,
        witness: Option<Witness>,
    ) -> Self {
        match end {
            SessionEnd::Disconnected | SessionEnd::ShuttingDown => Self::Disconnected,
            SessionEnd::Violation(violation) => Self::Violation(violation),
            SessionEnd::Timeout(deadline) => Self::Timeout(deadline),
            SessionEnd::Version(versions) => Self::Version { versions },
            SessionEnd::Peer(Failure {
                code: ErrorCode::TRUNCATED, position: Some(first), ..
            }) => Self::from_truncation(first.into(), mirror),
            SessionEnd::Peer(failure) | SessionEnd::Own(failure) => {
                Self::Reported { failure: Box::new(failure) }
            }
            SessionEnd::GoAway(go_away) => {
                Self::GoingAway { reconnect_after_ms: go_away.reconnect_after_ms }
            }
            SessionEnd::Truncated(at) => Self::from_truncation(at, mirror),
            SessionEnd::Apart => Self::Apart,
            SessionEnd::Cycle(path) => Self::Cycle { path },
            SessionEnd::Diverged(at) => Self::from_divergence(&at, mirror, witness),
        }
    }

    fn from_truncation(at: TruncatedAt, mirror: Option<Checkpoint>) -> Self {
        let TruncatedAt { first, start, sources } = at;
        let mirror = mirror.map_or(Position::START, |end| end.position);
        Self::Truncated { mirror, first, start: start.map(Box::new), sources }
    }

    fn from_divergence(
        at: &DivergedAt,
        mirror: Option<Checkpoint>,
        witness: Option<Witness>,
    ) -> Self {
        let origin = at.origin;
        // A mirror that has nothing yet can't differ from anything; an origin that says so all the same
        // serves another journal than the one asked for.
        let mirror =
            mirror.unwrap_or_else(|| crate::format::files::Mark::start(origin.journal).end);
        let common = at.common.map(|common| common.position);
        let told_by = at.speaker;
        let divergent = Box::new(Divergent { mirror, origin, witness, common, told_by });
        match at.divergence {
            Divergence::Ahead => Self::Ahead(divergent),
            Divergence::Fork => Self::Fork(divergent),
            Divergence::Foreign => Self::Foreign { mirror: mirror.journal, origin: origin.journal },
        }
    }
}

/// Whether the peer's bytes are whole but of a later version: fetching them again changes nothing.
const fn is_unsupported(refusal: &Refusal) -> bool {
    matches!(
        refusal,
        Refusal::Page(FormatError::Unsupported { .. })
            | Refusal::Batch(FormatError::Unsupported { .. })
    )
}

/// Why waiting for a mirror ended without what was waited for.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The time is up.
    #[error("the time is up{}", Because(last_error))]
    Timeout {
        /// Why the mirror didn't follow when it was last tried, if it didn't.
        last_error: Option<ShippingError>,
    },
    /// The time is up, and the mirror doesn't have the events of a token yet.
    #[error(
        "the mirror is durable up to position {reached}, not yet up to position {wanted}{}",
        Because(last_error)
    )]
    Behind {
        /// How far it is durable.
        reached: Position,
        /// The token's position.
        wanted: Position,
        /// Why it didn't follow when it was last tried, if it didn't.
        last_error: Option<ShippingError>,
    },
    /// The token is of another journal or history than the mirror.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The mirror doesn't follow any more, until somebody acts.
    #[error("the mirror has halted: {0}")]
    Halted(ShippingError),
    /// The mirror was stopped.
    #[error("the mirror was stopped")]
    Stopped,
}

struct Because<'a>(&'a Option<ShippingError>);

impl std::fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.as_ref().map_or(Ok(()), |error| write!(f, "; the last attempt: {error}"))
    }
}

impl WaitError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "mirror.timeout",
            Self::Behind { .. } => "mirror.behind",
            Self::Token(error) => error.code(),
            Self::Halted(_) => "mirror.halted",
            Self::Stopped => "mirror.stopped",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Token(error) => error.hint(),
            Self::Timeout { last_error } | Self::Behind { last_error, .. } => {
                last_error.as_ref().map_or("wait longer", ShippingError::hint)
            }
            Self::Halted(error) => error.hint(),
            Self::Stopped => "follow again",
        }
    }
}
