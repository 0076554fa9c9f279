//! What can go wrong, one type per operation. Every error says what, where, and what to do next
//! ([`hint`](ReadError::hint)), and bears a stable [`code`](ReadError::code).

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::event::{ExpectedRevision, InvalidEvent, Revision, StreamId};
use crate::format::FormatError;
use crate::position::{JournalId, Position};

/// Acknowledged data that can't be read, with its place. Never skipped, never repaired silently.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: corruption at byte {file_offset} of the file, position {position}: {kind}", path.display())]
pub struct Corruption {
    /// The file.
    pub path: PathBuf,
    /// Byte in the file.
    pub file_offset: u64,
    /// Position of the first event that can't be read.
    pub position: Position,
    /// What is wrong there.
    pub kind: CorruptionKind,
}

/// What is wrong with acknowledged data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CorruptionKind {
    /// A batch can't be read.
    #[error("damaged batch: {0}")]
    Batch(FormatError),
    /// A batch is whole but doesn't continue what stands in front of it.
    #[error("a batch that does not continue the one in front of it")]
    Chain,
    /// Neither copy of a segment's header can be read.
    #[error("damaged segment header: {0}")]
    SegmentHeader(FormatError),
    /// A segment's header doesn't continue the segment in front.
    #[error("a segment that does not continue the one in front of it")]
    SegmentLink,
    /// A segment file is missing.
    #[error("the segment file is missing")]
    MissingSegment,
    /// Acknowledged bytes are gone: the journal ends before the durable end that was recorded.
    #[error("the journal ends here, but was durable up to byte {proven} of its life")]
    LostTail {
        /// The offset up to which it is known to have been durable.
        proven: u64,
    },
    /// A sealed segment has something behind its end.
    #[error("bytes behind the end of a sealed segment")]
    BehindEnd,
    /// The file of accepted losses can't be read.
    #[error("damaged gaps file: {0}")]
    Gaps(FormatError),
    /// The file that takes the place of a removed prefix can't be read.
    #[error("damaged base file: {0}")]
    Base(FormatError),
    /// A batch with right checksums holds an invalid record.
    #[error("an invalid record in a batch with right checksums: {0}")]
    Record(FormatError),
}

/// An operation on a file failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {action} failed: {source}", path.display())]
pub struct IoError {
    /// What was tried.
    pub action: &'static str,
    /// On which file or directory.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: Arc<io::Error>,
}

impl IoError {
    pub(crate) fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self { action, path: path.to_owned(), source: Arc::new(source) }
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Attaches the action and the path to an I/O error.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, IoError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, IoError> {
        self.map_err(|source| IoError::new(action, path, source))
    }
}

/// Why a journal can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no journal.
    #[error("{}: no journal here", path.display())]
    NotFound {
        /// The directory.
        path: PathBuf,
    },
    /// There is a journal already.
    #[error("{}: a journal exists already", path.display())]
    AlreadyExists {
        /// The directory.
        path: PathBuf,
    },
    /// Another process, or another handle in this one, has the journal open for writing.
    #[error("{}: open for writing already, by {owner}", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Who holds it.
        owner: String,
    },
    /// An option has an impossible value.
    #[error("invalid option {option}: {reason}")]
    InvalidOption {
        /// Its name.
        option: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Acknowledged data is damaged or lost. Nothing was changed; what lies in front can be read.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// The journal's files are gone, but something remembers that they held events.
    #[error("{}: the journal is gone, but it was durable up to position {position}", path.display())]
    LostJournal {
        /// The directory.
        path: PathBuf,
        /// The remembered durable end.
        position: Position,
    },
    /// The segments are another history than the one that was marked durable here.
    #[error("{}: the history at position {position} is not the one that was durable here", path.display())]
    HistoryReplaced {
        /// The directory.
        path: PathBuf,
        /// The position of the mark.
        position: Position,
    },
    /// Written by a later version.
    #[error("{}: {source}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is unknown.
        source: FormatError,
    },
    /// A restore has begun and not ended.
    #[error("{}: a restore of this journal has not been completed", path.display())]
    Incomplete {
        /// The directory.
        path: PathBuf,
    },
    /// The journal is taking back from a mirror what it has lost, and hasn't ended that.
    #[error("{}: the journal has begun to take back from a mirror what it had lost, and has not completed that", path.display())]
    Recovering {
        /// The directory.
        path: PathBuf,
    },
    /// There are segments but no `node` file: this is a copy, not a place to write to.
    #[error("{}: a copy of a journal, not a journal of its own", path.display())]
    Copy {
        /// The directory.
        path: PathBuf,
    },
    /// The directory holds a journal of the other role.
    #[error("{}: holds a journal's {found}, not its {wanted}", path.display())]
    Role {
        /// The directory.
        path: PathBuf,
        /// What it is.
        found: crate::format::files::Role,
        /// What was asked for.
        wanted: crate::format::files::Role,
    },
    /// The mirrors of the journal could not be asked whether they hold more than it, or they do.
    #[cfg(feature = "shipping")]
    #[error(transparent)]
    Peers(Box<crate::shipping::PeersError>),
    /// A file operation failed; nothing more was changed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl OpenError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "open.not_found",
            Self::AlreadyExists { .. } => "open.already_exists",
            Self::Locked { .. } => "open.locked",
            Self::InvalidOption { .. } => "open.invalid_option",
            Self::Corruption(_) => "open.corruption",
            Self::LostJournal { .. } => "open.lost_journal",
            Self::HistoryReplaced { .. } => "open.history_replaced",
            Self::Unsupported { .. } => "open.unsupported",
            Self::Incomplete { .. } => "open.incomplete",
            Self::Recovering { .. } => "open.recovering",
            #[cfg(feature = "shipping")]
            Self::Peers(error) => error.code(),
            Self::Copy { .. } => "open.copy",
            Self::Role { .. } => "open.role",
            Self::Io(_) => "open.io",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "create one with Store::create, or check the path",
            Self::AlreadyExists { .. } => "open it with Store::open",
            Self::Locked { .. } => {
                "stop the owner first, or read with `headwater cat`, which takes no lock"
            }
            Self::InvalidOption { .. } => "see the documented limits of JournalOptions",
            Self::Corruption(_) => {
                "copy the directory, run `headwater verify` on it, and restore the damaged range from a mirror or a backup; `headwater cat` exports what lies in front"
            }
            Self::LostJournal { .. } => {
                "restore the journal directory from a mirror or a backup; remove its `mark` and the views only to begin a new history on purpose"
            }
            Self::HistoryReplaced { .. } => {
                "put back the original segments, or restore the whole directory, mark included, from one backup"
            }
            Self::Unsupported { .. } => "open it with the version that wrote it, or a later one",
            #[cfg(feature = "shipping")]
            Self::Peers(error) => error.hint(),
            Self::Recovering { .. } => {
                "open it with recover_from_mirrors again (`headwater recover DIR --from HOST:PORT`); with `headwater recover DIR --abandon` it keeps what has arrived so far, and no more"
            }
            Self::Incomplete { .. } => {
                "complete or abandon the restore with the command that began it"
            }
            Self::Copy { .. } => {
                "verify it with `headwater verify`; restore it into a journal before writing"
            }
            Self::Role { .. } => {
                "open an origin with Store::open; mirrors belong to the store that follows them"
            }
            Self::Io(_) => "see the system's error; opening again is safe",
        }
    }
}

impl From<ReadError> for OpenError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corruption(corruption) => Self::Corruption(corruption),
            ReadError::Io(error) => Self::Io(error),
            ReadError::Unsupported { path, source } => Self::Unsupported { path, source },
            ReadError::BeyondEnd { .. }
            | ReadError::Gap { .. }
            | ReadError::Truncated { .. }
            | ReadError::TruncatedStream { .. } => {
                let source = io::ErrorKind::InvalidInput.into();
                Self::Io(IoError::new("reading outside of", Path::new("the journal"), source))
            }
        }
    }
}

/// Why events can't be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Acknowledged data is damaged.
    #[error(transparent)]
    Corruption(#[from] Corruption),
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Written by a later version.
    #[error("{}: {source}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is unknown.
        source: FormatError,
    },
    /// Events were lost, and [accepted as lost](crate::repair). They are not skipped silently: a reader
    /// that can do without them goes on at `to`.
    #[error("the events at positions {from} to {to} were lost, and accepted as lost")]
    Gap {
        /// Position of the first lost event.
        from: Position,
        /// Position behind the last lost event.
        to: Position,
    },
    /// The events in front of `first` were removed by [retention](crate::retention).
    #[error("the events in front of position {first} were removed")]
    Truncated {
        /// Position of the first event that the journal still has.
        first: Position,
    },
    /// The first events of the stream were removed by [retention](crate::retention).
    #[error("the events of stream {stream} in front of revision {first} were removed")]
    TruncatedStream {
        /// The stream.
        stream: StreamId,
        /// Revision of its first event that the journal still has, or, if it has none, of the next one.
        first: Revision,
    },
    /// The position lies behind the durable end.
    #[error("position {position} lies behind the durable end {end}")]
    BeyondEnd {
        /// What was asked for.
        position: Position,
        /// The durable end.
        end: Position,
    },
}

impl ReadError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Corruption(_) => "read.corruption",
            Self::Io(_) => "read.io",
            Self::Unsupported { .. } => "read.unsupported",
            Self::Gap { .. } => "read.gap",
            Self::Truncated { .. } => "read.truncated",
            Self::TruncatedStream { .. } => "read.truncated_stream",
            Self::BeyondEnd { .. } => "read.beyond_end",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Corruption(_) => {
                "run `headwater verify`; restore the damaged range from a mirror or a backup"
            }
            Self::Io(_) => "see the system's error; reading again is safe",
            Self::Unsupported { .. } => "read it with the version that wrote it, or a later one",
            Self::Gap { .. } => {
                "if a mirror or a backup with these events turns up, `headwater repair --from` puts them back; what can do without them goes on behind them"
            }
            Self::Truncated { .. } => {
                "begin at the first position that is left; what needs the history is restored from the archive, in another directory"
            }
            Self::TruncatedStream { .. } => {
                "read from that revision on; what lies in front is in the archive, if there is one"
            }
            Self::BeyondEnd { .. } => {
                "wait until the position is durable, or check that it belongs to this journal"
            }
        }
    }
}

/// The first failure of a journal's writer. It is sticky: nothing is retried, because a second sync may
/// succeed without having written anything.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the journal's writer failed and accepts nothing more: {error}{}", Lost(lost.as_ref()))]
pub struct Poison {
    error: Arc<IoError>,
    lost: Option<Range<Position>>,
}

impl Poison {
    pub(crate) fn new(error: IoError, lost: Option<Range<Position>>) -> Self {
        Self { error: Arc::new(error), lost }
    }

    /// The write or sync that failed.
    #[must_use]
    pub fn error(&self) -> &IoError {
        &self.error
    }

    /// The events that were answered as buffered and never became durable, if there are any: after the
    /// journal has been opened again they may be there or not, the first ones rather than the last.
    #[must_use]
    pub const fn lost(&self) -> Option<&Range<Position>> {
        self.lost.as_ref()
    }
}

struct Lost<'a>(Option<&'a Range<Position>>);

impl std::fmt::Display for Lost<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |lost| {
            write!(f, "; the buffered events {}..{} are lost or in doubt", lost.start, lost.end)
        })
    }
}

/// Why an append didn't happen, or why nobody can say whether it did.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// A stream is not as expected. Certainly not written.
    #[error("stream {stream}: expected {expected}, found {}", Found(*actual))]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// What the append expected of it.
        expected: ExpectedRevision,
        /// Revision of its last event; `None` if it has none.
        actual: Option<Revision>,
    },
    /// There is an event that a condition on a query excludes. Certainly not written.
    #[error("the event at position {position} is one that the append expects not to be there")]
    QueryConflict {
        /// Position of the first such event.
        position: Position,
    },
    /// Some of the events exist already, but not all of them as one batch. Certainly not written.
    #[error("{known} of {total} events exist already")]
    PartialDuplicate {
        /// How many exist.
        known: usize,
        /// How many were to be appended.
        total: usize,
    },
    /// The batch is larger than the limit. Certainly not written.
    #[error("the batch has {len_bytes} bytes, more than the {max_bytes} allowed")]
    TooLarge {
        /// Its length.
        len_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A part of an event breaks a limit of the format, or the append is empty or names an id or a stream
    /// twice. Certainly not written.
    #[error(transparent)]
    Invalid(#[from] InvalidAppend),
    /// The append is buffered, and an inline view shows what is durable only. Certainly not written.
    #[error(
        "view {view} is inline: it can't have applied an append that doesn't wait for the disk"
    )]
    BufferedInline {
        /// The view.
        view: &'static str,
    },
    /// No space to prepare the next segment. Certainly not written; reads go on, and appending works again
    /// once there is space.
    #[error("no space for the next segment: {0}")]
    DiskFull(IoError),
    /// The write or its sync failed: after the journal has been opened again the events may be there or
    /// not, but only all of them. Append them again under the same ids to settle it.
    #[error("the append may or may not have happened: {0}")]
    Unknown(Poison),
    /// An earlier write or sync failed. Certainly not written.
    #[error(transparent)]
    Poisoned(Poison),
    /// A view or a reactor remembers events that the journal has lost. Certainly not written.
    #[error(
        "{view} has applied the journal up to position {applied}, but the journal ends at {end}: its tail is \
         lost"
    )]
    LostTail {
        /// The view or reactor.
        view: &'static str,
        /// How far it has got.
        applied: Position,
        /// Where the journal ends.
        end: Position,
    },
    /// The store was closed. Certainly not written.
    #[error("the store is closed")]
    Closed,
    /// What the append depends on couldn't be read. Certainly not written.
    #[error(transparent)]
    Read(#[from] ReadError),
}

struct Found(Option<Revision>);

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(revision) => write!(f, "revision {revision}"),
            None => f.write_str("no stream"),
        }
    }
}

/// What is wrong with an append as it was given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidAppend {
    /// An event breaks a limit.
    #[error(transparent)]
    Event(#[from] InvalidEvent),
    /// There is no event in it.
    #[error("an append needs at least one event")]
    Empty,
    /// Two of its events have the same id.
    #[error("two events have the same id {0}")]
    RepeatedId(crate::event::EventId),
    /// A stream is named twice.
    #[error("stream {0} is named twice")]
    RepeatedStream(StreamId),
}

impl AppendError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => "append.conflict",
            Self::QueryConflict { .. } => "append.query_conflict",
            Self::PartialDuplicate { .. } => "append.partial_duplicate",
            Self::TooLarge { .. } => "append.too_large",
            Self::Invalid(_) => "append.invalid",
            Self::BufferedInline { .. } => "append.buffered_inline",
            Self::DiskFull(_) => "append.disk_full",
            Self::Unknown(_) => "append.unknown",
            Self::Poisoned(_) => "append.poisoned",
            Self::LostTail { .. } => "append.lost_tail",
            Self::Closed => "append.closed",
            Self::Read(_) => "append.read",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => {
                "read the stream again, decide again, and append with its new revision"
            }
            Self::QueryConflict { .. } => {
                "read the query again, decide again, and append with the position up to which it was read"
            }
            Self::PartialDuplicate { .. } => {
                "give new events new ids, and retries exactly the events of the first try"
            }
            Self::TooLarge { .. } => "split the batch, or raise batch_bytes_max",
            Self::Invalid(_) => "mend the event",
            Self::BufferedInline { .. } => "append it durably, or open the view without the option",
            Self::DiskFull(_) => "free disk space and append again",
            Self::Unknown(_) => {
                "open the store again and append the same events under the same ids"
            }
            Self::Poisoned(_) => "check the device, then open the store again",
            Self::LostTail { .. } => {
                "restore the journal from a mirror or a newer backup; only if the loss is accepted, open the view with LostTail::SetAside, or the reactor with ReactorOptions::restart"
            }
            Self::Closed => "open the store again",
            Self::Read(_) => "see the cause; nothing was written",
        }
    }

    /// Whether the events were certainly not written.
    #[must_use]
    pub const fn is_certainly_not_written(&self) -> bool {
        !matches!(self, Self::Unknown(_))
    }
}

/// Why a mirror can't take in what a peer sent.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// The bytes are not a continuation of this mirror. Nothing was written.
    #[error("refused at position {position}: {refusal}")]
    Refused {
        /// The mirror's end.
        position: Position,
        /// What is wrong with them.
        refusal: Refusal,
    },
    /// The bytes continue the mirror, but they contradict the tail that it has set aside: the origin's
    /// history was replaced. Nothing was written.
    #[error("the origin's history differs from what this mirror held at position {position}")]
    WitnessDiffers {
        /// Position of the old end.
        position: Position,
    },
    /// No space. Nothing was written; it may be tried again.
    #[error("no space for the mirror: {0}")]
    DiskFull(IoError),
    /// A write or sync failed; open the mirror again.
    #[error(transparent)]
    Poisoned(Poison),
}

/// What is wrong with bytes that a peer sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A header page that isn't whole and valid.
    #[error("an invalid segment header page: {0}")]
    Page(FormatError),
    /// A segment of another journal.
    #[error("a segment of another journal, {0}")]
    Journal(JournalId),
    /// A segment that doesn't continue the mirror.
    #[error("a segment that does not continue the mirror")]
    SegmentLink,
    /// A batch without a segment to put it into.
    #[error("a batch without its segment's header page")]
    NoSegment,
    /// A batch that isn't whole and valid.
    #[error("an invalid batch: {0}")]
    Batch(FormatError),
    /// A batch that doesn't continue the mirror.
    #[error("a batch that does not continue the mirror")]
    BatchLink,
}
