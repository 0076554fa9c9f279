//! What can be wrong with a base.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::ReadError;
use crate::journal::BackupError;
use crate::position::{Checkpoint, JournalId, Locator, Position};

/// Why a base can't be exported, or isn't imported. What was served before is served on, and nothing was changed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaseError {
    /// There is no base in the directory, or one of which the export was interrupted.
    #[error("{}: no base of a view, or an unfinished one", dir.display())]
    NotABase {
        /// The directory.
        dir: PathBuf,
    },
    /// There is something in the directory into which a base is to be exported.
    #[error("{}: something is here already", path.display())]
    NotEmpty {
        /// What was found.
        path: PathBuf,
    },
    /// A file isn't what it was when the base was exported.
    #[error("{}: the base is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What shows it.
        what: &'static str,
    },
    /// A later version has written it.
    #[error("{}: written by a later version", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
    },
    /// It is of another view, of another version of it, or of one with other indexes, tables or rows.
    #[error("{}: the base has the {what} [{found}], and the view [{wanted}]", dir.display())]
    Another {
        /// The directory.
        dir: PathBuf,
        /// In what they differ.
        what: &'static str,
        /// What the base has.
        found: String,
        /// What the view has.
        wanted: String,
    },
    /// The rows are made from other journals than the view.
    #[error(
        "{}: the rows of the base are made from journals {}, the view from {}",
        dir.display(), listed(found), listed(wanted)
    )]
    Journals {
        /// The directory.
        dir: PathBuf,
        /// Those of the base.
        found: Vec<JournalId>,
        /// Those of the view.
        wanted: Vec<JournalId>,
    },
    /// The journal here has another history than the one that the rows are made of.
    #[error(
        "the rows of the base are of another history of journal {}: it differs here at position {}",
        checkpoint.journal, checkpoint.position
    )]
    Fork {
        /// What the rows are of.
        checkpoint: Checkpoint,
        /// The durable end of the journal here.
        end: Position,
    },
    /// The journal here doesn't reach to where the rows are, so nobody can tell whether they are of its history.
    #[error(
        "the rows of the base are of position {} of journal {}, which ends at position {end} here",
        checkpoint.position, checkpoint.journal
    )]
    Behind {
        /// What the rows are of.
        checkpoint: Checkpoint,
        /// The durable end of the journal here.
        end: Position,
    },
    /// The journal here begins behind the place up to which the rows are: events between would be missing.
    #[error(
        "the rows of the base are of position {} of journal {}, which begins at position {first} here",
        checkpoint.position, checkpoint.journal
    )]
    Truncated {
        /// What the rows are of.
        checkpoint: Checkpoint,
        /// The first position that is left here.
        first: Position,
    },
    /// It was decided here that an event is left out, and the rows of the base have it, or may.
    #[error(
        "the event at position {} of journal {} is left out here by decision, and not in the base",
        event.position, event.journal
    )]
    Decided {
        /// The event.
        event: Locator,
    },
    /// The rows are of several journals, which were taken in in another order here.
    #[error("{}: the journals were taken in in another order here", dir.display())]
    Order {
        /// The directory.
        dir: PathBuf,
    },
    /// The version has rows already, and it wasn't said that they are to be replaced.
    #[error("{}: this generation is live already", folder.display())]
    Live {
        /// Its folder.
        folder: PathBuf,
    },
    /// The journal can't be read where the rows are.
    #[error("the journal can't be compared with the base: {0}")]
    Journal(#[source] ReadError),
    /// The end of the journal, which a mirror can begin with, can't be copied into the base.
    #[error("the end of the journal can't be copied into the base: {0}")]
    Copy(#[source] Arc<BackupError>),
}

fn listed(ids: &[JournalId]) -> String {
    ids.iter().map(JournalId::to_string).collect::<Vec<_>>().join(", ")
}

impl BaseError {
    /// A stable name of the kind of error.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotABase { .. } => "base.not_a_base",
            Self::NotEmpty { .. } => "base.not_empty",
            Self::Damaged { .. } => "base.damaged",
            Self::Unsupported { .. } => "base.unsupported",
            Self::Another { .. } => "base.another",
            Self::Journals { .. } => "base.journals",
            Self::Fork { .. } => "base.fork",
            Self::Behind { .. } => "base.behind",
            Self::Truncated { .. } => "base.truncated",
            Self::Decided { .. } => "base.decided",
            Self::Order { .. } => "base.order",
            Self::Live { .. } => "base.live",
            Self::Journal(error) => error.code(),
            Self::Copy(error) => error.code(),
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotABase { .. } => {
                "name the directory into which the base was exported; if that was interrupted, export it again"
            }
            Self::NotEmpty { .. } => "export into a new directory",
            Self::Damaged { .. } => "copy it again from where it was exported, or export another",
            Self::Unsupported { .. } => "import it with the version that wrote it, or a later one",
            Self::Another { .. } => {
                "export a base with the very version of the view that is to be served here, or build the view from the journal"
            }
            Self::Journals { .. } => {
                "export a base of the view over the same journals, or open the view over those of the base"
            }
            Self::Fork { .. } => {
                "one of the two has lost events that the other has: see docs/operate/forks.md, and take a base from who has the right history"
            }
            Self::Behind { .. } => {
                "wait until the mirror has got as far, or begin it with the base as well (FollowOptions::begin_with)"
            }
            Self::Truncated { .. } => {
                "take a newer base; or begin the mirror anew with this one (FollowOptions::begin_with), if its origin still has what follows"
            }
            Self::Decided { .. } => {
                "take a base of a view in which it is discarded, too, or build the view from the journal"
            }
            Self::Order { .. } => {
                "import the bases of all views over these journals before one of them follows, that which was exported last first"
            }
            Self::Live { .. } => "say that it is to be replaced; it is kept, to go back to",
            Self::Journal(error) => error.hint(),
            Self::Copy(error) => error.hint(),
        }
    }
}
