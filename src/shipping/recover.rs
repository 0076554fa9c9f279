//! An origin asks its mirrors before it opens for writing, and takes back from one what it has lost.
//!
//! ```text
//!   recovery ─▶ ask all ─▶ nobody has more ──────────────────────────────────▶ open for writing
//!                 │  ├── not enough answer, or two go on differently ─▶ refuse, naming them
//!                 ▼
//!   one has more: recovering ─▶ pulled, verified, synced like a mirror ─▶ recovering removed ─▶ open for writing
//!                     └──────── interrupted: the same call goes on; plain opening is refused
//! ```
//! Invariants:
//! - What is taken back continues the journal by its chain, byte for byte, and is durable before anything is
//!   appended behind it, in a new incarnation.
//! - Nothing is taken if two mirrors go on differently, or one holds something else at this journal's end.
//! - While it goes on the journal is put in order like a mirror's: headers of batches that have just come speak of
//!   what had been durable on another disk.

use std::path::Path;
use std::sync::Arc;

use super::error::{Divergent, ShippingError};
use super::link::{Arrived, Link};
use super::message::{ErrorCode, FRAME_BYTES_MAX, Failure, Speaker};
use super::mirror::{FollowOptions, compare_ends, connect};
use super::session::{Delivery, MirrorConfig, MirrorSession, Resume, SessionEnd, batches};
use super::transport;
use crate::env;
use crate::error::{IngestError, OpenError};
use crate::format::files::Witness;
use crate::fs::Fs;
use crate::journal::{Ingest, Journal};
use crate::options::JournalOptions;
use crate::position::{Checkpoint, NodeId, Position};

/// Whom an origin asks before it opens for writing, and what for.
///
/// ```
/// let check = headwater::shipping::PeersCheck {
///     mirrors: vec!["10.0.0.2:7000".into(), "10.0.0.3:7000".into()],
///     recover: true,
///     ..Default::default()
/// };
/// assert_eq!(check.required, None); // all of them must answer
/// ```
#[derive(Clone, Debug, Default)]
pub struct PeersCheck {
    /// Addresses at which mirrors of the journal are [served](super::serve).
    pub mirrors: Vec<String>,
    /// Take back what one of them holds and this journal has lost. Otherwise that is an error.
    pub recover: bool,
    /// So many of them must have been asked; `None`: all of them.
    pub required: Option<usize>,
    /// Those of them that are not asked: they are gone for good, with whatever they held.
    pub given_up: Vec<String>,
    /// How they are connected to.
    pub options: FollowOptions,
}

/// What was taken back from a mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TakenBack {
    /// The mirror's address.
    pub address: String,
    /// Where the journal had ended.
    pub from: Checkpoint,
    /// Where it ends now.
    pub to: Checkpoint,
}

/// Why an origin isn't opened for writing. Nothing was appended.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeersError {
    /// Too few of the mirrors could be asked.
    #[error(
        "{asked} of {required} mirrors were asked whether they hold more; not {}",
        Each(missing)
    )]
    Unreached {
        /// How many answered.
        asked: usize,
        /// How many have to.
        required: usize,
        /// Those that didn't, and why.
        missing: Vec<(String, ShippingError)>,
    },
    /// A mirror holds events that this journal has lost.
    #[error("the mirror at {address} goes on to position {}, this journal ends at {}", theirs.position, ours.position)]
    Longer {
        /// The mirror's address.
        address: String,
        /// This journal's end.
        ours: Box<Checkpoint>,
        /// The mirror's.
        theirs: Box<Checkpoint>,
    },
    /// A mirror holds something else at this journal's end: both have gone on from an older state.
    #[error("the mirror at {address}: {error}")]
    Parted {
        /// The mirror's address.
        address: String,
        /// What is known of it, as seen from this journal: "the mirror" is this journal, "the origin" the mirror.
        error: ShippingError,
    },
    /// Two mirrors go on differently from this journal's end.
    #[error(
        "the mirrors at {first} (up to position {first_end}) and {second} (up to {second_end}) hold different continuations of this journal, which ends at {ours}"
    )]
    Conflict {
        /// The address of the one that goes further.
        first: String,
        /// Its end.
        first_end: Position,
        /// The address of the other.
        second: String,
        /// Its end.
        second_end: Position,
        /// This journal's end.
        ours: Position,
    },
    /// A mirror has lost what it said it held. What it still has was taken back.
    #[error(
        "the mirror at {address} said that it goes on to position {told}, and has nothing more behind {reached}"
    )]
    Receded {
        /// The mirror's address.
        address: String,
        /// Where it ended when it was asked.
        told: Position,
        /// Where this journal ends now.
        reached: Position,
    },
    /// What a mirror holds couldn't be taken back, or not all of it.
    #[error("taking back events from the mirror at {address}: {error}")]
    Pull {
        /// The mirror's address.
        address: String,
        /// What went wrong.
        error: ShippingError,
    },
}

/// Addresses, and why they weren't reached.
struct Each<'a>(&'a [(String, ShippingError)]);

impl std::fmt::Display for Each<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, (address, error)) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{address} ({error})")?;
        }
        Ok(())
    }
}

impl PeersError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unreached { .. } => "peers.unreached",
            Self::Longer { .. } => "peers.longer",
            Self::Parted { .. } => "peers.parted",
            Self::Conflict { .. } => "peers.conflict",
            Self::Receded { .. } => "peers.receded",
            Self::Pull { .. } => "peers.pull",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Unreached { .. } => {
                "bring the mirrors up, resume those that have halted, and try again: one of them may hold the only copy of acknowledged events. Meanwhile the journal can be read (Journal::open_read_only). One that is gone for good is left out by name: give_up_on_mirror (`--give-up HOST:PORT`)"
            }
            Self::Longer { .. } => {
                "this journal has lost events: open it with recover_from_mirrors (`headwater recover`) to take them back"
            }
            Self::Parted { .. } => {
                "something was appended here since the journal was restored. Restore the backup once more and recover from the mirrors before anything is appended; or leave the mirror out by name, and let it set its tail aside. See docs/operate/forks.md"
            }
            Self::Conflict { .. } => {
                "decide which of them is the right history, and leave the other out by name: give_up_on_mirror (`--give-up HOST:PORT`). See docs/operate/forks.md"
            }
            Self::Receded { .. } => {
                "see what became of the mirror's tail: it was restarted on a damaged disk, or has set events aside (`headwater peer`, its folder `orphaned`). Is there another mirror, or a backup? The next attempt takes for the end what the mirrors hold then"
            }
            Self::Pull { .. } => {
                "see the cause, then try again: it goes on where it was interrupted. Nothing is appended before it is complete"
            }
        }
    }
}

impl PeersCheck {
    fn asked(&self) -> impl Iterator<Item = &String> {
        self.mirrors.iter().filter(|address| !self.given_up.contains(address))
    }
}

/// How a peer's history relates to this one.
#[derive(Clone, Debug)]
pub(crate) enum Standing {
    /// It has this journal's end, and itself ends here.
    Holds(Checkpoint),
    /// It is a mirror that isn't as far yet: it ends here.
    #[cfg_attr(
        not(feature = "cli"),
        allow(dead_code, reason = "only the command line says how far")
    )]
    Behind(Position),
    /// It is an origin that has lost what lies behind the common end, or has something else there.
    Parted(ShippingError),
}

/// Asks whoever serves at `address` about a place that `journal` has.
pub(crate) fn ask(
    address: &str,
    journal: &Journal,
    end: Checkpoint,
    options: &FollowOptions,
) -> Result<Standing, ShippingError> {
    let resume = Resume { end, witness: None };
    let mut conversation = Conversation::begin(address, journal.node(), resume, options)?;
    loop {
        match conversation.next() {
            Ok(deliveries) => {
                for delivery in deliveries {
                    match delivery {
                        Delivery::Subscribed(end) => return Ok(Standing::Holds(end)),
                        Delivery::Probed(ends) => {
                            let held = compare_ends(journal, &ends);
                            conversation.session.on_compared(&held, transport::now());
                        }
                        _ => {}
                    }
                }
            }
            // Without a position it has no journal at present, and whatever it holds isn't known.
            Err(SessionEnd::Peer(Failure {
                code: ErrorCode::NOT_YET,
                position: Some(end),
                ..
            })) => return Ok(Standing::Behind(end)),
            Err(ended @ SessionEnd::Diverged(_)) => {
                return Ok(Standing::Parted(ShippingError::from_end(ended, Some(end), None)));
            }
            Err(ended) => return Err(conversation.failed(ended, Some(end), None)),
        }
    }
}

/// A session in one thread.
struct Conversation {
    link: Link,
    session: MirrorSession,
    raw: Vec<u8>,
    plain: Vec<u8>,
}

impl Conversation {
    fn begin(
        address: &str,
        node: NodeId,
        resume: Resume,
        options: &FollowOptions,
    ) -> Result<Self, ShippingError> {
        let (link, authentication) = connect(address, options, || false, |_| Ok(()))?;
        let config = MirrorConfig {
            node: Some(node),
            follows: false,
            nonce: env::random_id(),
            authentication,
            agent: options.agent.clone(),
            deadlines: options.deadlines.bounded(),
            max_frame: FRAME_BYTES_MAX,
            window_bytes: options.window_bytes.max(1),
            resume: Some(resume),
        };
        let session = MirrorSession::new(config, transport::now());
        Ok(Self { link, session, raw: vec![0; 128 << 10], plain: Vec::new() })
    }

    /// Why it has ended: if it was cut off, perhaps by TLS.
    fn failed(
        &self,
        end: SessionEnd,
        own_end: Option<Checkpoint>,
        witness: Option<Witness>,
    ) -> ShippingError {
        match (end, self.link.failure()) {
            (SessionEnd::Disconnected, Some(failure)) => ShippingError::Tls(failure),
            (end, _) => ShippingError::from_end(end, own_end, witness),
        }
    }

    /// Says what is to be said, and waits for what comes next.
    fn next(&mut self) -> Result<Vec<Delivery>, SessionEnd> {
        let mut deliveries = Vec::new();
        while deliveries.is_empty() {
            let Self { link, session, raw, plain } = self;
            let written = link.write(|out| session.take_output(transport::now(), out));
            if let Some(end) = session.end() {
                return Err(end.clone());
            }
            let arrived = if written { link.receive(raw, plain) } else { Arrived::Closed };
            let now = transport::now();
            match arrived {
                Arrived::Bytes(bytes) => session.on_bytes(bytes, now, &mut deliveries),
                Arrived::Nothing => {}
                Arrived::Closed => session.on_closed(),
            }
            session.on_time(now);
        }
        Ok(deliveries)
    }
}

/// Asks all mirrors, and takes back what the journal in `dir` has lost, if that is wanted. The journal is not open
/// for writing then; its end is durable. `None` if nothing was missing, or there is no journal.
///
/// Blocks for recovery, for the network, and for writing what is taken back.
///
/// # Errors
/// [`OpenError::Peers`] and others.
pub fn recover(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    journal_options: &JournalOptions,
    check: &PeersCheck,
) -> Result<Option<TakenBack>, OpenError> {
    let Some(ingest) = Ingest::open_lossy(fs, dir, journal_options)? else { return Ok(None) };
    let ours = ingest.end();
    let longest = consult(ingest.journal(), check);
    let is_short = ingest.witness().is_some();
    let (address, theirs) = match longest {
        Ok(Some(longest)) => longest,
        Ok(None) => {
            // An end that can't be marked is found again by the next recovery.
            drop(ingest.close());
            return end(fs, dir, is_short).map(|()| None);
        }
        Err(error) => {
            // What recovery has put in order stays so.
            drop(ingest.close());
            return Err(OpenError::Peers(Box::new(error)));
        }
    };
    drop(ingest.close());
    let mut ingest = Ingest::begin_recovering(fs, dir, journal_options)?;
    let pulled = pull(&address, &mut ingest, &theirs, &check.options);
    let (to, is_short) = (ingest.end(), ingest.witness().is_some());
    let closed = ingest.close().map_err(ShippingError::Storage);
    pulled.and(closed).map_err(|error| {
        let address = address.clone();
        OpenError::Peers(Box::new(PeersError::Pull { address, error }))
    })?;
    if to.offset < theirs.offset {
        let (told, reached) = (theirs.position, to.position);
        return Err(OpenError::Peers(Box::new(PeersError::Receded { address, told, reached })));
    }
    end(fs, dir, is_short)?;
    Ok(Some(TakenBack { address, from: ours, to }))
}

/// Gives up taking back what a journal has lost, once that has begun: it keeps what has arrived, and can be opened
/// for writing. Nothing is removed.
///
/// # Errors
/// [`OpenError`].
pub fn abandon_recovery(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    journal_options: &JournalOptions,
) -> Result<(), OpenError> {
    let not_found = || OpenError::NotFound { path: dir.to_owned() };
    let ingest = Ingest::open_lossy(fs, dir, journal_options)?.ok_or_else(not_found)?;
    ingest.close().map_err(|error| {
        let (address, error) = (String::new(), ShippingError::Storage(error));
        OpenError::Peers(Box::new(PeersError::Pull { address, error }))
    })?;
    Ingest::end_recovering(fs, dir)
}

/// The journal is an origin's again, unless it lacks what it had before its disk lost it.
fn end(fs: &Arc<dyn Fs>, dir: &Path, is_short: bool) -> Result<(), OpenError> {
    if is_short {
        return Err(OpenError::Recovering { path: dir.to_owned() });
    }
    Ingest::end_recovering(fs, dir)
}

/// The mirror that holds most of what continues this journal, and its end; `None` if none holds more.
fn consult(
    journal: &Journal,
    check: &PeersCheck,
) -> Result<Option<(String, Checkpoint)>, PeersError> {
    let ours = journal.end();
    let (mut longer, mut missing, mut asked) = (Vec::new(), Vec::new(), 0);
    for address in check.asked() {
        match ask(address, journal, ours, &check.options) {
            Ok(Standing::Holds(end)) if end.offset > ours.offset => {
                longer.push((address.clone(), end));
            }
            Ok(Standing::Holds(_) | Standing::Behind(_)) => {}
            Ok(Standing::Parted(error)) => {
                return Err(PeersError::Parted { address: address.clone(), error });
            }
            Err(error) => {
                missing.push((address.clone(), error));
                continue;
            }
        }
        asked += 1;
    }
    let required = check.required.unwrap_or_else(|| check.asked().count());
    if asked < required {
        return Err(PeersError::Unreached { asked, required, missing });
    }
    longer.sort_by_key(|(_, end)| end.offset);
    let Some((address, theirs)) = longer.pop() else { return Ok(None) };
    for (other, end) in &longer {
        agree(journal, (&address, &theirs), (other, end), check)?;
    }
    if check.recover {
        return Ok(Some((address, theirs)));
    }
    Err(PeersError::Longer { address, ours: Box::new(ours), theirs: Box::new(theirs) })
}

/// Whether what one mirror holds is a beginning of what the longest one holds.
fn agree(
    journal: &Journal,
    (first, first_end): (&str, &Checkpoint),
    (second, second_end): (&str, &Checkpoint),
    check: &PeersCheck,
) -> Result<(), PeersError> {
    match ask(first, journal, *second_end, &check.options) {
        Ok(Standing::Holds(_)) => Ok(()),
        Ok(Standing::Parted(_) | Standing::Behind(_)) => Err(PeersError::Conflict {
            first: first.to_owned(),
            first_end: first_end.position,
            second: second.to_owned(),
            second_end: second_end.position,
            ours: journal.end().position,
        }),
        Err(error) => Err(PeersError::Pull { address: first.to_owned(), error }),
    }
}

/// Takes in what the mirror at `address` sends, as a mirror would: up to `until` at least, or to where it ends when that is
/// in front by now. Durable when this returns.
fn pull(
    address: &str,
    ingest: &mut Ingest,
    until: &Checkpoint,
    options: &FollowOptions,
) -> Result<(), ShippingError> {
    let resume = Resume { end: ingest.end(), witness: ingest.witness() };
    let node = ingest.journal().node();
    let mut conversation = Conversation::begin(address, node, resume, options)?;
    let group_bytes = u64::from(options.window_bytes) / 2;
    let mut until = until.offset;
    while ingest.journal().end().offset < until {
        let next = conversation.next();
        let deliveries =
            next.map_err(|end| conversation.failed(end, Some(resume.end), resume.witness))?;
        for delivery in deliveries {
            if let Delivery::Subscribed(end) = &delivery {
                until = until.min(end.offset);
            }
            take(ingest, delivery)?;
        }
        let unsynced_bytes = ingest.end().offset - ingest.journal().end().offset;
        if unsynced_bytes > group_bytes || ingest.end().offset >= until {
            let end = ingest.sync().map_err(|error| refused(ingest, error))?;
            conversation.session.on_durable(end);
        }
    }
    Ok(())
}

fn take(ingest: &mut Ingest, delivery: Delivery) -> Result<(), ShippingError> {
    let taken = match delivery {
        Delivery::Segment(page) => ingest.segment(&page),
        Delivery::Batches(bytes) => {
            batches(&bytes).try_for_each(|batch| ingest.batch(batch).map(drop))
        }
        _ => Ok(()),
    };
    taken.map_err(|error| refused(ingest, error))
}

fn refused(ingest: &Ingest, error: IngestError) -> ShippingError {
    match error {
        IngestError::Refused { position, refusal } => ShippingError::Refused { position, refusal },
        IngestError::WitnessDiffers { .. } => {
            let (mirror, witness) = (ingest.end(), ingest.witness());
            let common = Some(mirror.position);
            let origin = mirror;
            let told_by = Speaker::RelayBehind;
            ShippingError::Fork(Box::new(Divergent { mirror, origin, witness, common, told_by }))
        }
        error => ShippingError::Storage(error),
    }
}
