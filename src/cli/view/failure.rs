//! Why a verb about views failed.

use std::path::PathBuf;

use crate::cli::failure::Failure;
use crate::view::{
    BaseError, ParkedError, RebuildError, StorageError, StorageErrorKind, ViewError, ViewReadError,
};
use crate::{JournalId, Position};

#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum ViewFailure {
    #[error(transparent)]
    View(ViewError),
    #[error(transparent)]
    Read(ViewReadError),
    #[error(transparent)]
    Rebuild(RebuildError),
    #[error(transparent)]
    Parked(ParkedError),
    #[error("{}: there is no view {view:?}", dir.display())]
    NoView { view: String, dir: PathBuf },
    #[error("several journals have a view {view:?}: {}", places.join(", "))]
    OfSeveral { view: String, places: Vec<String> },
    #[error("view {view}: this takes the view's code, which this program doesn't have")]
    NoCode { view: String },
    #[error("view {view}: another process has it open: {owner}")]
    InUse { view: String, owner: String },
    #[error("{}: nothing of it is durable yet", folder.display())]
    Empty { folder: PathBuf },
    /// With the type of the keys, if it is known.
    #[error("{typed:?} is no key of this view{}: {reason}", of_type(keys.as_deref()))]
    Key { typed: String, keys: Option<String>, reason: String },
    #[error("there is no row under {key}")]
    NoRow { key: String },
    #[error("view {view} has no index {index:?}; it has [{has}]")]
    NoIndex { view: String, index: String, has: String },
    /// A version was to be deleted that can't be built again.
    #[error(
        "view {view}: it can't be built anew, as the events of {of} in front of position {start} were removed"
    )]
    Truncated { view: String, of: String, start: Position },
    #[error("view {view}: its journals can't be opened together")]
    Journals { view: String },
    #[error("name a table, if there are some: the view has [{has}]")]
    Table { has: String },
    #[error("{}: the journal {journal}, of which the view is, isn't there", dir.display())]
    NoJournal { journal: JournalId, dir: PathBuf },
    /// It was printed how many.
    #[error("{left} events are still parked: {reason}")]
    StillParked { left: u64, reason: String },
    #[error("the progress can't be interrupted: {0}")]
    Signals(#[source] std::io::Error),
}

fn of_type(keys: Option<&str>) -> String {
    keys.map_or_else(String::new, |keys| format!(", whose keys are {keys}"))
}

impl ViewFailure {
    pub(in crate::cli) fn code(&self) -> &'static str {
        match self {
            Self::View(error) => error.code(),
            Self::Read(error) => error.code(),
            Self::Rebuild(error) => error.code(),
            Self::Parked(error) => error.code(),
            Self::NoView { .. } => "view.not_found",
            Self::OfSeveral { .. } => "view.of_several",
            Self::NoCode { .. } => "view.no_code",
            Self::InUse { .. } => "view.in_use",
            Self::Empty { .. } => "view.empty",
            Self::Key { .. } => "view.key",
            Self::NoRow { .. } => "view.no_row",
            Self::NoIndex { .. } => "view.no_index",
            Self::Truncated { .. } => "view.truncated",
            Self::Journals { .. } => "view.journals",
            Self::Table { .. } => "view.table",
            Self::NoJournal { .. } => "view.no_journal",
            Self::StillParked { .. } => "view.still_parked",
            Self::Signals(_) => "view.signals",
        }
    }

    pub(in crate::cli) fn hint(&self) -> &'static str {
        match self {
            Self::View(error) => error.hint(),
            Self::Read(error) => error.hint(),
            Self::Rebuild(RebuildError::Different(_)) => {
                "if the fold was changed, raise the view's version, or rebuild with --accept-difference; if not, the fold isn't pure (a clock, randomness, the order of a hash map) or the database is damaged"
            }
            Self::Rebuild(error) => error.hint(),
            Self::Parked(error) => error.hint(),
            Self::NoView { .. } => "`view ls` lists those that there are",
            Self::OfSeveral { .. } => "name the mirror in place of the store: STORE/mirrors/NAME",
            Self::NoCode { .. } => {
                "mount the command line in the service, headwater::cli::Cli::new().view(MyView).run(), and call that; as the example does: cargo run --features cli --example shop -- admin view ls DIR"
            }
            Self::InUse { .. } => {
                "let the service do it itself, while it serves: ViewHandle has rebuild, rollback, retry and discard; or stop it first"
            }
            Self::Empty { .. } => {
                "a service that has it open writes it to disk in a while; see `view status`"
            }
            Self::Key { .. } => {
                "a key is text, a number, or a list of its fields in JSON; without the view's code, text, TYPE:VALUE such as u32:17, or 0x and its bytes"
            }
            Self::NoRow { .. } => "`view scan` prints the rows that there are",
            Self::NoIndex { .. } => "name one of these",
            Self::Truncated { .. } => {
                "if it is of no more use all the same, delete its folders by hand: the directory of the view, VERSION.NUMBER"
            }
            Self::Journals { .. } => "see `view status`; one of them is there twice",
            Self::Table { .. } => "name one with --table",
            Self::NoJournal { .. } => {
                "a view of several journals is built where all of them are: name the store"
            }
            Self::StillParked { .. } => "mend the fold and try again, or discard the first of them",
            Self::Signals(_) => "see the system's error",
        }
    }

    /// The view isn't what it should be.
    pub(in crate::cli) fn is_damage(&self) -> bool {
        let damaged = |error: &StorageError| error.kind() == StorageErrorKind::Damaged;
        match self {
            Self::View(ViewError::Storage(error)) | Self::Read(ViewReadError::Storage(error)) => {
                damaged(error)
            }
            Self::View(ViewError::Base(error)) => {
                matches!(**error, BaseError::Damaged { .. } | BaseError::Fork { .. })
            }
            Self::View(
                ViewError::LostTail { .. }
                | ViewError::DamagedPointer { .. }
                | ViewError::DamagedDecisions { .. },
            )
            | Self::Rebuild(RebuildError::Different(_)) => true,
            _ => false,
        }
    }
}

impl From<ViewFailure> for Failure {
    fn from(failure: ViewFailure) -> Self {
        Self::View(failure)
    }
}

impl From<ViewError> for Failure {
    fn from(error: ViewError) -> Self {
        ViewFailure::View(error).into()
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        ViewError::from(error).into()
    }
}

impl From<ViewReadError> for Failure {
    fn from(error: ViewReadError) -> Self {
        ViewFailure::Read(error).into()
    }
}

impl From<RebuildError> for Failure {
    fn from(error: RebuildError) -> Self {
        match error {
            RebuildError::View(error) => error.into(),
            error => ViewFailure::Rebuild(error).into(),
        }
    }
}

impl From<ParkedError> for Failure {
    fn from(error: ParkedError) -> Self {
        match error {
            ParkedError::View(error) => error.into(),
            error => ViewFailure::Parked(error).into(),
        }
    }
}
