//! Certificates and keys in PEM form.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::error::SecurityError;

/// Certificates, or a private key, in PEM form.
#[derive(Clone)]
pub struct Pem(Place);

#[derive(Clone)]
enum Place {
    File(PathBuf),
    Text(Zeroizing<Vec<u8>>),
}

impl Pem {
    /// What this file holds. It is read when it is needed, and read anew when that may have changed.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Place::File(path.into()))
    }

    /// This text itself.
    pub fn text(text: impl Into<Vec<u8>>) -> Self {
        Self(Place::Text(Zeroizing::new(text.into())))
    }

    fn read(&self) -> Result<Cow<'_, Zeroizing<Vec<u8>>>, SecurityError> {
        match &self.0 {
            Place::Text(text) => Ok(Cow::Borrowed(text)),
            Place::File(path) => match std::fs::read(path) {
                Ok(text) => Ok(Cow::Owned(Zeroizing::new(text))),
                Err(error) => Err(SecurityError::file(path, error)),
            },
        }
    }

    /// All certificates in it.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
        let text = self.read()?;
        let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
        match found {
            Ok(found) if found.is_empty() => Err(self.nothing_in_it("certificate")),
            Ok(found) => Ok(found),
            Err(_) => Err(self.nothing_in_it("readable certificate")),
        }
    }

    /// The private key in it.
    pub(crate) fn private_key(&self) -> Result<PrivateKeyDer<'static>, SecurityError> {
        let text = self.read()?;
        PrivateKeyDer::from_pem_slice(&text).map_err(|_| self.nothing_in_it("private key"))
    }

    pub(crate) fn nothing_in_it(&self, missing: &'static str) -> SecurityError {
        SecurityError::Pem { pem: self.to_string(), missing }
    }

    pub(crate) fn unusable(&self, source: rustls::Error) -> SecurityError {
        SecurityError::Certificate { pem: self.to_string(), source: source.into() }
    }
}

/// The file, never what is in it.
impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::File(path) => path.display().fmt(f),
            Place::Text(_) => f.write_str("the PEM text given"),
        }
    }
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pem({self})")
    }
}

/// What a process shows of itself: a certificate, with those that lead to its authority behind it, and its key.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Its own certificate first.
    pub chain: Pem,
    /// The private key (PKCS#8, PKCS#1 or SEC1).
    pub key: Pem,
}

impl Certificate {
    /// From two files.
    pub fn files(chain: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Self { chain: Pem::file(chain), key: Pem::file(key) }
    }

    pub(crate) fn load(
        &self,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), SecurityError> {
        Ok((self.chain.certificates()?, self.key.private_key()?))
    }
}
