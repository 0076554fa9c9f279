//! Why a command failed, and what the user is told: code, what, where, and what to do next.

use std::io::{self, Write};
use std::process::ExitCode;

#[cfg(feature = "views")]
use super::view::ViewFailure;
use crate::repair::RepairError;
use crate::retention::RetentionError;
use crate::schema::SchemaError;
#[cfg(feature = "shipping")]
use crate::shipping::security::SecurityError;
use crate::{BackupError, Corruption, IoError, OpenError, ReadError, RestoreError};

#[derive(Debug)]
pub(crate) enum Failure {
    Open(OpenError),
    Read(ReadError),
    Repair(RepairError),
    Backup(BackupError),
    Restore(RestoreError),
    Retention(RetentionError),
    Schema(SchemaError),
    #[cfg(feature = "shipping")]
    Security(SecurityError),
    #[cfg(feature = "shipping")]
    Shipping(crate::shipping::ShippingError),
    /// So many kinds of events have no sample; they have been printed.
    Unrecorded(usize),
    /// So much keeps the samples from proving that the service reads everything; it has been printed.
    Unproven(usize),
    /// So many events of the journal can't be decoded by the service; the first have been printed.
    Undecodable(u64),
    /// Neither a journal nor the code of event types is at hand.
    NothingToCheck,
    /// What lies in front was printed.
    Damaged(Corruption),
    /// Damage was found and has been printed.
    Reported,
    /// The journal in the directory is another one than it was.
    Replaced,
    Output(io::Error),
    #[cfg(feature = "views")]
    View(ViewFailure),
    /// Whoever read the output has seen enough.
    PipeClosed,
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl From<RepairError> for Failure {
    fn from(error: RepairError) -> Self {
        match error {
            RepairError::Open(error) => Self::Open(error),
            error => Self::Repair(error),
        }
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        Self::Backup(error)
    }
}

impl From<RetentionError> for Failure {
    fn from(error: RetentionError) -> Self {
        match error {
            RetentionError::Open(error) => Self::Open(error),
            RetentionError::Read(error) => Self::Read(error),
            error => Self::Retention(error),
        }
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        Self::Restore(error)
    }
}

impl From<SchemaError> for Failure {
    fn from(error: SchemaError) -> Self {
        Self::Schema(error)
    }
}

#[cfg(feature = "shipping")]
impl From<SecurityError> for Failure {
    fn from(error: SecurityError) -> Self {
        Self::Security(error)
    }
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        Self::Open(error.into())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::PipeClosed,
            _ => Self::Output(error),
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        io::Error::from(error).into()
    }
}

impl Failure {
    pub(crate) fn report(&self) {
        let (code, what, hint) = match self {
            Self::Open(error) => (error.code(), error.to_string(), error.hint()),
            Self::Read(error) => (error.code(), error.to_string(), error.hint()),
            Self::Repair(error) => (error.code(), error.to_string(), error.hint()),
            Self::Backup(error) => (error.code(), error.to_string(), error.hint()),
            Self::Restore(error) => (error.code(), error.to_string(), error.hint()),
            Self::Retention(error) => (error.code(), error.to_string(), error.hint()),
            Self::Schema(error) => (error.code(), error.to_string(), error.hint()),
            #[cfg(feature = "shipping")]
            Self::Security(error) => (error.code(), error.to_string(), error.hint()),
            #[cfg(feature = "shipping")]
            Self::Shipping(error) => (error.code(), error.to_string(), error.hint()),
            Self::Unrecorded(kinds) => (
                "schema.unrecorded",
                format!("{kinds} kinds of events in the journal have no sample"),
                "record them with headwater::schema, and let schema::check prove that they are read",
            ),
            Self::Unproven(findings) => (
                "schema.findings",
                format!("{findings} findings: this code doesn't read and write what was recorded"),
                "each finding has its own hint",
            ),
            Self::Undecodable(events) => (
                "schema.undecodable_events",
                format!("{events} events in the journal can't be decoded by this code"),
                "keep what read them before: undo the change, or declare an upcaster",
            ),
            Self::NothingToCheck => (
                "schema.nothing_to_check",
                "there is neither a journal nor the code of a service".to_owned(),
                "name the directory of a journal, too",
            ),
            Self::Damaged(corruption) => {
                let error = ReadError::from(corruption.clone());
                (error.code(), error.to_string(), error.hint())
            }
            Self::Replaced => (
                "open.replaced",
                "the directory holds another journal than before".to_owned(),
                "run the command again to read the new one",
            ),
            Self::Output(error) => (
                "output.io",
                format!("standard output: writing failed: {error}"),
                "see the system's error",
            ),
            #[cfg(feature = "views")]
            Self::View(failure) => (failure.code(), failure.to_string(), failure.hint()),
            Self::Reported | Self::PipeClosed => return,
        };
        // There is nobody to tell if standard error is closed as well.
        drop(writeln!(io::stderr(), "error[{code}]: {what}\n  hint: {hint}"));
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        let damage = match self {
            Self::NothingToCheck => return ExitCode::from(2),
            Self::Open(error)
            | Self::Backup(BackupError::Target(error))
            | Self::Restore(RestoreError::Backup(error) | RestoreError::Target(error)) => matches!(
                error,
                OpenError::Corruption(_)
                    | OpenError::LostJournal { .. }
                    | OpenError::HistoryReplaced { .. }
            ),
            Self::Read(error)
            | Self::Backup(BackupError::Read(error))
            | Self::Restore(RestoreError::Read(error)) => {
                matches!(error, ReadError::Corruption(_) | ReadError::Gap { .. })
            }
            Self::Backup(BackupError::Missing { .. }) => true,
            Self::Backup(_) | Self::Restore(_) => false,
            Self::Damaged(_) | Self::Reported => true,
            #[cfg(feature = "views")]
            Self::View(failure) => failure.is_damage(),
            #[cfg(feature = "shipping")]
            Self::Security(_) => false,
            #[cfg(feature = "shipping")]
            Self::Shipping(_) => false,
            Self::Retention(_)
            | Self::Schema(_)
            | Self::Unrecorded(_)
            | Self::Unproven(_)
            | Self::Undecodable(_)
            | Self::Repair(_)
            | Self::Replaced
            | Self::Output(_)
            | Self::PipeClosed => false,
        };
        ExitCode::from(if damage { 3 } else { 1 })
    }
}
