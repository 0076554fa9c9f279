//! What is wrong with the settings, and why a TLS connection didn't come about.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError};

use super::access::AccessError;

/// Why security settings can't be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecurityError {
    /// A file can't be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: Arc<io::Error>,
    },
    /// A PEM file or text lacks something.
    #[error("{pem}: no {missing} in it")]
    Pem {
        /// The file.
        pem: String,
        /// What was looked for.
        missing: &'static str,
    },
    /// A certificate, or the key beside it, can't be used.
    #[error("{pem}: {source}")]
    Certificate {
        /// The file.
        pem: String,
        /// What is wrong with it.
        source: TlsSource,
    },
    /// The access list can't be used.
    #[error("{}{source}", Of(path.as_deref()))]
    Access {
        /// The file; `None`: it was made in the program.
        path: Option<PathBuf>,
        /// What is wrong with it.
        source: Arc<AccessError>,
    },
    /// Not a token.
    #[error("not a token: expected hwt_ and 64 hexadecimal digits")]
    Token,
    /// The name that the origin's certificate shall have isn't one.
    #[error("{name:?} is no name that a certificate can have")]
    ServerName {
        /// The name.
        name: String,
    },
    /// Settings that let nobody in.
    #[error("nobody is trusted: {reason}")]
    NobodyTrusted {
        /// Which.
        reason: &'static str,
    },
    /// The system has no randomness.
    #[error("the system gives no random numbers")]
    Randomness,
}

struct Of<'a>(Option<&'a Path>);

impl std::fmt::Display for Of<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |path| write!(f, "{}: ", path.display()))
    }
}

impl SecurityError {
    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.to_owned(), source: Arc::new(source) }
    }

    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::File { .. } => "security.file",
            Self::Pem { .. } => "security.pem",
            Self::Certificate { .. } => "security.certificate",
            Self::Access { .. } => "security.access",
            Self::Token => "security.token",
            Self::ServerName { .. } => "security.server_name",
            Self::NobodyTrusted { .. } => "security.nobody_trusted",
            Self::Randomness => "security.randomness",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::File { .. } => "check the path and that this process may read the file",
            Self::Pem { .. } => "certificates and keys are given in PEM form (-----BEGIN ...)",
            Self::Certificate { .. } => {
                "is the key the certificate's own, and of a kind that TLS 1.3 knows (Ed25519, ECDSA P-256, RSA)?"
            }
            Self::Access { .. } => {
                "see docs/operate/security.md for what an access list looks like"
            }
            Self::Token => "make one with `headwater token`",
            Self::ServerName { .. } => "give the name that stands in the origin's certificate",
            Self::NobodyTrusted { .. } => "name an authority, keys or an access list",
            Self::Randomness => "see the system's log",
        }
    }
}

/// What the TLS library says.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub struct TlsSource(Arc<rustls::Error>);

impl From<rustls::Error> for TlsSource {
    fn from(error: rustls::Error) -> Self {
        Self(Arc::new(error))
    }
}

/// Why a TLS connection to an origin didn't come about, or broke.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}{}", Because(source.as_ref()))]
pub struct TlsFailure {
    reason: TlsReason,
    source: Option<TlsSource>,
}

struct Because<'a>(Option<&'a TlsSource>);

impl std::fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |source| write!(f, " ({source})"))
    }
}

/// The kinds of reasons why a TLS connection doesn't come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsReason {
    /// The origin's certificate is neither pinned nor signed by a trusted authority.
    #[error("the origin's certificate is not trusted")]
    Untrusted,
    /// The origin's certificate is not valid at this time.
    #[error("the origin's certificate is expired, or not valid yet")]
    Expired,
    /// The origin's certificate is for other names.
    #[error("the origin's certificate is for another name")]
    WrongName,
    /// The origin doesn't take this side's certificate, or wants one.
    #[error("the origin refuses this side's certificate, or wants one")]
    Refused,
    /// The origin has no version, cipher or protocol in common with this side.
    #[error("the origin speaks TLS otherwise")]
    Incompatible,
    /// What answers doesn't speak TLS.
    #[error("the origin does not answer in TLS")]
    NotTls,
    /// The origin speaks TLS, and this side was told not to.
    #[error("the origin answers in TLS, and it is followed without")]
    Plaintext,
    /// The bytes were damaged on the way, or somebody meddles with them.
    #[error("the TLS connection broke")]
    Broken,
}

impl TlsFailure {
    pub(crate) const PLAINTEXT: Self = Self { reason: TlsReason::Plaintext, source: None };
    pub(crate) const NO_PROTOCOL: Self = Self { reason: TlsReason::Incompatible, source: None };

    /// Of an error of a connection, whose handshake may have been under way.
    pub(crate) fn new(error: rustls::Error, handshaking: bool) -> Self {
        let reason = match &error {
            rustls::Error::InvalidCertificate(error) => of_certificate(error),
            rustls::Error::AlertReceived(alert) => of_alert(*alert),
            rustls::Error::NoApplicationProtocol | rustls::Error::PeerIncompatible(_) => {
                TlsReason::Incompatible
            }
            rustls::Error::InvalidMessage(_) if handshaking => TlsReason::NotTls,
            _ => TlsReason::Broken,
        };
        Self { reason, source: Some(error.into()) }
    }

    /// Which kind of reason it is.
    #[must_use]
    pub const fn reason(&self) -> TlsReason {
        self.reason
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self.reason {
            TlsReason::Untrusted => {
                "is this the right origin? If its key was changed on purpose, pin the new one too (`headwater pin`), or trust its authority. Attempts go on"
            }
            TlsReason::Expired => {
                "renew the origin's certificate, and check both clocks. Attempts go on"
            }
            TlsReason::WrongName => {
                "follow it by the name in its certificate, or set ClientTls::server_name. Attempts go on"
            }
            TlsReason::Refused => {
                "is this mirror's key in the origin's access list, or its certificate signed by the origin's authority and not expired? Attempts go on"
            }
            TlsReason::Incompatible => "both sides need TLS 1.3 and headwater/1. Attempts go on",
            TlsReason::NotTls => {
                "does the origin serve with a certificate, and is the address right? Attempts go on"
            }
            TlsReason::Plaintext => "set FollowOptions::tls. Attempts go on",
            TlsReason::Broken => "nothing: attempts go on",
        }
    }
}

fn of_certificate(error: &CertificateError) -> TlsReason {
    match error {
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => TlsReason::Expired,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            TlsReason::WrongName
        }
        _ => TlsReason::Untrusted,
    }
}

const fn of_alert(alert: AlertDescription) -> TlsReason {
    match alert {
        AlertDescription::CertificateRequired
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateRevoked
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError => TlsReason::Refused,
        AlertDescription::ProtocolVersion
        | AlertDescription::HandshakeFailure
        | AlertDescription::InsufficientSecurity
        | AlertDescription::NoApplicationProtocol => TlsReason::Incompatible,
        _ => TlsReason::Broken,
    }
}
