//! What can go wrong with a view, one type per operation.

use std::path::PathBuf;
use std::sync::Arc;

use super::base::BaseError;
use super::db::StorageError;
use super::deadly::Stage;
use super::key::KeyError;
use super::poison::Degraded;
use super::tables::TableError;
use crate::codec::CodecError;
use crate::error::{IoError, ReadError};
use crate::event::{EventType, StreamId};
use crate::journal::TokenError;
use crate::position::{Checkpoint, JournalId, Position};

/// Why a view can't be opened or closed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The view's name can't be the name of a folder.
    #[error("{name:?} can't be the name of a view: expected 1 to 64 of a-z, 0-9, '-' and '_'")]
    InvalidName {
        /// The name.
        name: &'static str,
    },
    /// An index that the view declares can't be kept.
    #[error("index {index:?} of view {view}: {reason}")]
    InvalidIndex {
        /// The view.
        view: &'static str,
        /// The index.
        index: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// A table that the view declares can't be kept.
    #[error("table {table:?} of view {view}: {reason}")]
    InvalidTable {
        /// The view.
        view: &'static str,
        /// The table.
        table: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// The view declares other indexes or tables than its rows have, and the journal doesn't reach back to its beginning, so
    /// that they can't be built anew. Nothing was changed.
    #[error(
        "view {view}: {source}; the rows can't be built anew, because the journal begins at position {start}"
    )]
    OtherShape {
        /// The view.
        view: &'static str,
        /// Which they are.
        source: StorageError,
        /// The first position that is left in the journal.
        start: Position,
    },
    /// Another handle, here or in another process, has the view open.
    #[error("{}: the view is open already, by {owner}", path.display())]
    InUse {
        /// The lock file.
        path: PathBuf,
        /// Who holds it.
        owner: String,
    },
    /// The view, or another one over the same journals, has applied events that a journal which is appended to here no
    /// longer has: the journal has lost its tail, or was restored from an older copy. Nothing was changed; the view, or the
    /// order in which the journals were taken in, is the witness of the loss.
    #[error(
        "view {view}: journal {} was taken in up to position {}, but ends at position {end}: its tail is lost",
        checkpoint.journal, checkpoint.position
    )]
    LostTail {
        /// The view that is refused.
        view: &'static str,
        /// How far the journal was taken in.
        checkpoint: Checkpoint,
        /// Where the journal ends.
        end: Position,
    },
    /// The file that says which generation is live is damaged.
    #[error("{}: the view's pointer is damaged", path.display())]
    DamagedPointer {
        /// The file.
        path: PathBuf,
    },
    /// The file that says which events are discarded is damaged.
    #[error("{}: the list of discarded events is damaged", path.display())]
    DamagedDecisions {
        /// The file.
        path: PathBuf,
    },
    /// The file that says which events kill the process can't be understood.
    #[error("{}: damaged: it says which events have killed the process", path.display())]
    DamagedDeadly {
        /// The file.
        path: PathBuf,
    },
    /// The file that says in which order several journals are taken in is damaged.
    #[error(
        "{}: damaged at byte {file_offset}: it says in which order the journals are taken in", path.display()
    )]
    DamagedIntake {
        /// The file.
        path: PathBuf,
        /// The first byte of the record that can't be read.
        file_offset: u64,
    },
    /// The order in which several journals are taken in was recorded in another layout.
    #[error(
        "{}: layout {version} of the order in which the journals are taken in isn't known here", path.display()
    )]
    UnsupportedIntake {
        /// The file.
        path: PathBuf,
        /// Its layout.
        version: u16,
    },
    /// The order in which several journals are taken in was cut by somebody else while the view followed it: one of the
    /// journals has another history.
    #[error("{}: the order in which the journals are taken in has changed under the view", path.display())]
    StaleIntake {
        /// The file.
        path: PathBuf,
    },
    /// The rows are of an order that isn't recorded, so there is nothing to compare with.
    #[error("view {view}: the order in which its journals were taken in isn't recorded")]
    Unordered {
        /// The view.
        view: &'static str,
    },
    /// A generation can't be deleted while it is the one that is read.
    #[error("{}: this generation is the one that is read", folder.display())]
    Live {
        /// Its folder.
        folder: PathBuf,
    },
    /// There is no such generation.
    #[error("{}: there is no such generation", folder.display())]
    NoGeneration {
        /// Where it would be.
        folder: PathBuf,
    },
    /// A view was to be opened over these journals, which can't be.
    #[error("view {view} can't be made from these journals: {reason}")]
    Journals {
        /// The view.
        view: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// An inline view is applied by those who append: only a store can open one, of its own journal.
    #[error("view {view} can't be inline: it isn't a view of the own journal, opened by its store")]
    Inline {
        /// The view.
        view: &'static str,
    },
    /// The code of a view (its `route`, its fold) has asked for something that would wait for that code to return.
    #[error("view {view}: from within the code of a view this would wait for itself")]
    WithinFold {
        /// The view of which it was asked.
        view: &'static str,
    },
    /// A rebuild of the view is under way.
    #[error("view {view}: a rebuild is under way")]
    Rebuilding {
        /// The view.
        view: &'static str,
    },
    /// The rows that are served aren't known to be of the journal as it is, so there is nothing to compare with.
    #[error("view {view}: its rows are not known to be of this journal")]
    NotJudged {
        /// The view.
        view: &'static str,
    },
    /// The view was closed.
    #[error("view {view} was closed")]
    Closed {
        /// The view.
        view: &'static str,
    },
    /// A base can't be exported, or isn't imported.
    #[error(transparent)]
    Base(Box<BaseError>),
    /// The view's database failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The view's thread couldn't be started.
    #[error("view {view}: its thread could not be started: {source}")]
    Thread {
        /// The view.
        view: &'static str,
        /// The system's answer.
        source: Arc<std::io::Error>,
    },
}

impl From<BaseError> for ViewError {
    fn from(error: BaseError) -> Self {
        Self::Base(Box::new(error))
    }
}

impl ViewError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "view.invalid_name",
            Self::InvalidIndex { .. } => "view.invalid_index",
            Self::InvalidTable { .. } => "view.invalid_table",
            Self::OtherShape { .. } => "view.other_shape",
            Self::InUse { .. } => "view.in_use",
            Self::LostTail { .. } => "view.lost_tail",
            Self::DamagedPointer { .. } => "view.damaged_pointer",
            Self::DamagedDecisions { .. } => "view.damaged_decisions",
            Self::DamagedDeadly { .. } => "view.damaged_deadly",
            Self::DamagedIntake { .. } => "view.damaged_intake",
            Self::UnsupportedIntake { .. } => "view.unsupported_intake",
            Self::StaleIntake { .. } => "view.stale_intake",
            Self::Unordered { .. } => "view.unordered",
            Self::Live { .. } => "view.live",
            Self::NoGeneration { .. } => "view.no_generation",
            Self::Journals { .. } => "view.journals",
            Self::Inline { .. } => "view.inline",
            Self::WithinFold { .. } => "view.within_fold",
            Self::Rebuilding { .. } => "view.rebuilding",
            Self::NotJudged { .. } => "view.not_judged",
            Self::Closed { .. } => "view.closed",
            Self::Base(error) => error.code(),
            Self::Storage(error) => error.code(),
            Self::Io(_) => "view.io",
            Self::Thread { .. } => "view.thread",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "name the view after its folder, such as \"orders_by_day\"",
            Self::InvalidIndex { .. } => "mend what the view's indexes() returns",
            Self::InvalidTable { .. } => "mend what the view's tables() returns",
            Self::OtherShape { .. } => {
                "declare the indexes or tables that the rows have, or put the removed events back and open the view again"
            }
            Self::InUse { .. } => {
                "drop the other handle with its snapshots and iterators, or stop the other process; a `view rebuild` on the command line has the view until it has ended or is interrupted"
            }
            Self::LostTail { .. } => {
                "restore this journal from a mirror or a newer backup; only if the loss is accepted, open the view with LostTail::SetAside"
            }
            Self::DamagedPointer { .. } => {
                "move the view's directory away and open it again: it is built anew from the journal"
            }
            Self::DamagedDeadly { .. } => {
                "delete it: which events kill the process is found out again, by some more deaths"
            }
            Self::DamagedDecisions { .. } => {
                "put it back from a backup; without it, discarded events would come back"
            }
            Self::DamagedIntake { .. } => {
                "delete it and, if all events are left, the folders of the views over these journals, and open them again: they are built anew, in an order that is recorded anew"
            }
            Self::UnsupportedIntake { .. } => {
                "use the release that wrote it; or delete it and, if all events are left, the folders of the views over these journals, and open them again: they are built anew, in an order that is recorded anew"
            }
            Self::StaleIntake { .. } => "open the view again",
            Self::Unordered { .. } => {
                "open the view: it is built anew, in an order that is recorded, if all events are left"
            }
            Self::Live { .. } => "roll back to another generation first",
            Self::NoGeneration { .. } => "list the generations to see which there are",
            Self::Journals { .. } => "name each journal once, and at least one",
            Self::Inline { .. } => "open it with Store::view_with, or without the option",
            Self::WithinFold { .. } => {
                "do it outside of the view: a fold depends on its row and its event only; what is to happen because of an event belongs into a reactor"
            }
            Self::Rebuilding { .. } => "wait for it, or cancel it",
            Self::NotJudged { .. } => {
                "wait until the mirror has got as far as the view, or see why the view has stopped"
            }
            Self::Closed { .. } => "open it again",
            Self::Base(error) => error.hint(),
            Self::Storage(error) => error.hint(),
            Self::Io(_) => "see the system's error; opening again is safe",
            Self::Thread { .. } => "raise the limit on threads",
        }
    }
}

/// Why a view has stopped following its journal. Its rows are still served, as of its checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// An event could not be applied. The view's checkpoint is the end of the batch in front of it.
    #[error(
        "view {view} stopped at position {position} of journal {journal} ({event_type} in stream {stream}): {cause}"
    )]
    Event {
        /// The view.
        view: &'static str,
        /// The event's journal.
        journal: JournalId,
        /// The event's position.
        position: Position,
        /// The event's stream.
        stream: StreamId,
        /// The event's type.
        event_type: EventType,
        /// What happened.
        #[source]
        cause: EventFailure,
    },
    /// A mirror that had to be fetched again up to the view's checkpoint is another history there.
    #[error(
        "view {view} has applied another history of journal {}: the mirror differs from it at position {}",
        checkpoint.journal, checkpoint.position
    )]
    Fork {
        /// The view.
        view: &'static str,
        /// What the view has applied.
        checkpoint: Checkpoint,
        /// The mirror's durable end.
        end: Position,
    },
    /// The journal can't be read.
    #[error("view {view} stopped: {source}")]
    Journal {
        /// The view.
        view: &'static str,
        /// Why not.
        source: ReadError,
    },
    /// The view's database failed.
    #[error("view {view} stopped: {source}")]
    Storage {
        /// The view.
        view: &'static str,
        /// What failed.
        source: StorageError,
    },
    /// A generation that was built can't be made the one that is read.
    #[error("view {view} stopped: {source}")]
    Folder {
        /// The view.
        view: &'static str,
        /// Why not.
        source: Box<ViewError>,
    },
    /// A row that was built in bulk can't be indexed.
    #[error("view {view} stopped: a row can't be indexed: {cause}")]
    Index {
        /// The view.
        view: &'static str,
        /// What happened.
        #[source]
        cause: EventFailure,
    },
    /// The order in which its journals are taken in can't be read or recorded.
    #[error("view {view} stopped: {source}")]
    Intake {
        /// The view.
        view: &'static str,
        /// Why not.
        source: Box<ViewError>,
    },
    /// What is recorded of the order of intake is of another history of a journal.
    #[error(
        "view {view} stopped: the recorded order of intake is of another history of journal {journal}, at position {position}"
    )]
    Order {
        /// The view.
        view: &'static str,
        /// The journal.
        journal: JournalId,
        /// Where in the journal.
        position: Position,
    },
    /// The view's code panicked outside of any event, such as while a value was dropped.
    #[error("view {view} stopped: panic: {message}")]
    Panic {
        /// The view.
        view: &'static str,
        /// The panic's message.
        message: String,
    },
}

/// Why an event could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventFailure {
    /// The payload can't be decoded.
    #[error("its payload can't be decoded: {0}")]
    Payload(#[source] CodecError),
    /// The fold returned an error.
    #[error("the fold failed: {0}")]
    Fold(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The view's code panicked.
    #[error("panic: {message}")]
    Panic {
        /// The panic's message.
        message: String,
    },
    /// The stored row can't be decoded as the view's row type.
    #[error("the stored row can't be decoded: {0}")]
    StoredRow(#[source] CodecError),
    /// The stored key can't be decoded as the view's key type.
    #[error("the stored key can't be decoded: {0}")]
    StoredKey(#[source] KeyError),
    /// The row that the fold returned can't be encoded.
    #[error("the new row can't be encoded: {0}")]
    NewRow(#[source] CodecError),
    /// A table of the view can't be read or written.
    #[error(transparent)]
    Table(TableError),
    /// The process has died of it, again and again; see [`ViewControl::deadly_events`](super::ViewControl::deadly_events).
    #[error("the process died {deaths} times while {stage} it")]
    Deadly {
        /// What the view's code was doing with it.
        stage: Stage,
        /// How often.
        deaths: u32,
    },
}

impl EventFailure {
    /// It isn't the event that is wrong: the stored rows are of other types than the view's.
    pub(super) const fn is_of_the_rows(&self) -> bool {
        match self {
            Self::StoredRow(_) | Self::StoredKey(_) => true,
            Self::Table(error) => !matches!(error, TableError::NewRow { .. }),
            _ => false,
        }
    }
}

impl StopError {
    /// The position of the event that could not be applied, if it was an event.
    #[must_use]
    pub const fn position(&self) -> Option<Position> {
        match self {
            Self::Event { position, .. } => Some(*position),
            _ => None,
        }
    }

    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Event { cause, .. } => match cause {
                EventFailure::Payload(_) => "view_stop.payload",
                EventFailure::Fold(_) => "view_stop.fold",
                EventFailure::Panic { .. } => "view_stop.panic",
                EventFailure::StoredRow(_) => "view_stop.stored_row",
                EventFailure::StoredKey(_) => "view_stop.stored_key",
                EventFailure::NewRow(_) => "view_stop.new_row",
                EventFailure::Table(_) => "view_stop.table",
                EventFailure::Deadly { .. } => "view_stop.deadly",
            },
            Self::Index { .. } => "view_stop.index",
            Self::Folder { source, .. } | Self::Intake { source, .. } => source.code(),
            Self::Order { .. } => "view_stop.order",
            Self::Fork { .. } => "view_stop.fork",
            Self::Journal { .. } => "view_stop.journal",
            Self::Storage { .. } => "view_stop.storage",
            Self::Panic { .. } => "view_stop.panic",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Event { cause, .. } => match cause {
                EventFailure::Payload(_) => {
                    "teach the event type to decode this schema version, then open the view again"
                }
                EventFailure::Fold(_) | EventFailure::Panic { .. } => {
                    "mend the fold, raise VERSION if rows would differ, then open the view again"
                }
                EventFailure::StoredRow(_) | EventFailure::StoredKey(_) => {
                    "the key or row type was changed without a new VERSION: raise it, and the view is built anew"
                }
                EventFailure::NewRow(_) => "use a row type that its codec can represent",
                EventFailure::Table(TableError::NoTable { .. }) => {
                    "name the table in the view's tables(), then open the view again"
                }
                EventFailure::Table(TableError::NewRow { .. }) => {
                    "use a row type that its codec can represent"
                }
                EventFailure::Table(_) => {
                    "the key or row type was changed without a new VERSION: raise it, and the view is built anew"
                }
                EventFailure::Deadly { .. } => {
                    "mend the view's code, which aborts, overflows its stack or needs too much memory; then acquit the event and try it again, or raise VERSION"
                }
            },
            Self::Index { .. } => "mend the function that makes the index keys",
            Self::Folder { source, .. } | Self::Intake { source, .. } => source.hint(),
            Self::Order { .. } => "open the view again: it is built anew if it has to be",
            Self::Fork { .. } => {
                "two histories of one journal exist: decide which is right; to follow the mirror, move the view's directory away"
            }
            Self::Journal { source, .. } => source.hint(),
            Self::Storage { source, .. } => source.hint(),
            Self::Panic { .. } => "mend the view's code, then open the view again",
        }
    }
}

/// Why a wait for a token ended without the view having applied it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// Time is up.
    #[error("the view has applied up to position {reached}, not yet up to position {wanted}")]
    Timeout {
        /// How far the view has got.
        reached: Position,
        /// The token's position.
        wanted: Position,
    },
    /// The journal has another event at the token's position: what the token stands for was lost.
    #[error(
        "the append that ended at position {position} is not in this journal's history: it was lost"
    )]
    TokenLost {
        /// The token's position.
        position: Position,
    },
    /// The token is of another journal.
    #[error("the token is of journal {found}, but the view follows journal {followed}")]
    ForeignToken {
        /// The token's journal.
        found: JournalId,
        /// The view's journal.
        followed: JournalId,
    },
    /// The view has stopped in front of the token's position.
    #[error(transparent)]
    Stopped(Arc<StopError>),
    /// The view, or its journal, was closed in front of the token's position.
    #[error("the view was closed")]
    Closed,
    /// The journal can't be asked whether the token is of its history.
    #[error(transparent)]
    Journal(#[from] ReadError),
}

impl From<TokenError> for WaitError {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Timeout { reached, wanted } => Self::Timeout { reached, wanted },
            TokenError::Lost { position } => Self::TokenLost { position },
            TokenError::Foreign { found, followed } => Self::ForeignToken { found, followed },
            TokenError::Closed { .. } => Self::Closed,
            TokenError::Journal(error) => Self::Journal(error),
        }
    }
}

impl WaitError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "view_wait.timeout",
            Self::TokenLost { .. } => "view_wait.token_lost",
            Self::ForeignToken { .. } => "view_wait.foreign_token",
            Self::Stopped(_) => "view_wait.stopped",
            Self::Closed => "view_wait.closed",
            Self::Journal(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "wait longer, or read what is there; see status() for the lag",
            Self::TokenLost { .. } => {
                "the journal was restored from an older copy: make the change again, it is gone"
            }
            Self::ForeignToken { .. } => "ask the view that follows the token's journal",
            Self::Stopped(error) => error.hint(),
            Self::Closed => "open the view again",
            Self::Journal(error) => error.hint(),
        }
    }
}

/// Why rows can't be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewReadError {
    /// The view's database failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A row can't be decoded as the view's row type.
    #[error("view {view}: a stored row can't be decoded: {source}")]
    Row {
        /// The view.
        view: &'static str,
        /// Why not.
        source: Arc<CodecError>,
    },
    /// A key can't be decoded as the view's key type.
    #[error("view {view}: a stored key can't be decoded: {source}")]
    Key {
        /// The view.
        view: &'static str,
        /// Why not.
        source: KeyError,
    },
    /// The row lacks events that the token stands for, or may lack them.
    #[error("view {view}: the row is degraded: {degraded}")]
    Degraded {
        /// The view.
        view: &'static str,
        /// What it lacks.
        degraded: Degraded,
    },
    /// The view doesn't keep this index.
    #[error("view {view} keeps no index {index:?} with keys of this type")]
    NoIndex {
        /// The view.
        view: &'static str,
        /// The index.
        index: &'static str,
    },
    /// The view doesn't have this table.
    #[error("view {view} has no table {table:?} with keys and rows of these types")]
    NoTable {
        /// The view.
        view: &'static str,
        /// The table.
        table: &'static str,
    },
    /// One row was asked for, but there are several.
    #[error("index {index:?} of view {view}: several rows have this key")]
    NotUnique {
        /// The view.
        view: &'static str,
        /// The index.
        index: &'static str,
    },
    /// The view hasn't applied the token that the read asked for.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

impl ViewReadError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Storage(error) => error.code(),
            Self::Row { .. } => "view_read.row",
            Self::Key { .. } => "view_read.key",
            Self::Degraded { .. } => "view_read.degraded",
            Self::NoIndex { .. } => "view_read.no_index",
            Self::NoTable { .. } => "view_read.no_table",
            Self::NotUnique { .. } => "view_read.not_unique",
            Self::Wait(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Storage(error) => error.hint(),
            Self::Row { .. } | Self::Key { .. } => {
                "the key or row type was changed without a new VERSION: raise it, and the view is built anew"
            }
            Self::Degraded { .. } => "see what is parked; get_checked() returns the row as it is",
            Self::NoIndex { .. } => "name the index in the view's indexes()",
            Self::NoTable { .. } => "name the table in the view's tables()",
            Self::NotUnique { .. } => "read all rows of the key with get()",
            Self::Wait(error) => error.hint(),
        }
    }
}
