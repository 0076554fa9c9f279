//! Who may follow a journal: TLS, tokens and the access list.
//!
//! ```text
//!   mirror                                                    origin
//!   ClientTls ──────── TLS 1.3, ALPN headwater/1 ──────────── ServerTls
//!     Trust: authority or pinned keys                           ClientVerifier: keys of the access list, or an authority
//!   TokenSource ────── HELLO: token, within TLS or loopback ── Gate ──▶ the peer in the access list ──▶ WELCOME
//!                      SUBSCRIBE: journal, mode ────────────── Gate ──▶ its rights ──▶ compared, SUBSCRIBED
//!                                                              Security::reload ──▶ Gate: still the same? else DENIED
//! ```
//!
//! Invariants:
//! - Nothing of a journal, not even whether it is here, is told to somebody who may not have it.
//! - A mirror sends its token only to an origin that it has recognised, or within this machine.
//! - Secrets show in no `Debug` output and in no error.
//! - What is reloaded holds for new connections at once, and for those that there are within a heartbeat.
//!
//! `docs/operate/security.md` says how it is set up, and against whom it protects.

mod access;
mod error;
mod gate;
mod pem;
mod secret;
mod tls;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use rustls::ServerConfig;
use rustls::server::danger::ClientCertVerifier;

pub use access::{
    AccessError, AccessList, Anonymous, DnsName, InvalidDnsName, Journals, Mode, Peer, Right,
};
pub use error::{SecurityError, TlsFailure, TlsReason, TlsSource};
pub(crate) use gate::Gate;
pub use pem::{Certificate, Pem};
pub use secret::{AccessToken, InvalidFingerprint, KeyPin, TokenHash, TokenSource};
pub use tls::{ALPN, ClientTls, Trust};
use tls::{ClientVerifier, PinnedKeys};

/// How an origin's server is secured.
#[derive(Clone, Debug, Default)]
pub struct SecurityOptions {
    /// With TLS, and what it shows there; `None`: plain TCP.
    pub tls: Option<ServerTls>,
    /// Who may have what.
    pub access: Access,
}

/// What a server shows in TLS, and whether it wants to see certificates of mirrors.
#[derive(Clone, Debug)]
pub struct ServerTls {
    /// Its own certificate.
    pub certificate: Certificate,
    /// Authorities whose signature on a mirror's certificate is trusted; keys in the access list are trusted in
    /// any case.
    pub client_authorities: Option<Pem>,
    /// Mirrors without a certificate aren't let in, not even with a token.
    pub require_client_certificate: bool,
}

impl ServerTls {
    /// Shows this certificate, and lets mirrors in by the keys and tokens of the access list.
    #[must_use]
    pub const fn with(certificate: Certificate) -> Self {
        Self { certificate, client_authorities: None, require_client_certificate: false }
    }
}

/// Where the access list comes from.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Access {
    /// There is none: everybody on this machine, and everybody with a certificate of
    /// [`ServerTls::client_authorities`], may have everything.
    #[default]
    NoList,
    /// This file; `docs/operate/security.md` says what it looks like. [`Security::reload`] reads it anew.
    File(PathBuf),
    /// This list.
    List(AccessList),
}

/// What a server checks connections against. Clones are the same; keep one to [`reload`](Self::reload) it.
///
/// ```no_run
/// use headwater::shipping::ServeOptions;
/// use headwater::shipping::security::{Access, Certificate, Security, SecurityOptions, ServerTls};
///
/// # let store = headwater::Store::open("orders")?;
/// let security = Security::new(SecurityOptions {
///     tls: Some(ServerTls::with(Certificate::files("origin.pem", "origin.key"))),
///     access: Access::File("access.json".into()),
/// })?;
/// let options = ServeOptions { security: Some(security.clone()), ..ServeOptions::default() };
/// let server = store.serve_with("0.0.0.0:7401", options)?;
///
/// // On SIGHUP, after certificates or the list were changed:
/// security.reload()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Security {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: SecurityOptions,
    current: RwLock<Arc<Rules>>,
    generation: AtomicU64,
    /// Held while files are read, so that of two reloads the later one lasts.
    reloading: Mutex<()>,
}

/// What was read last.
#[derive(Debug)]
struct Rules {
    generation: u64,
    access: AccessList,
    authority: Option<Arc<dyn ClientCertVerifier>>,
    /// Also of those who have a token.
    requires_certificate: bool,
    tls: Option<Arc<ServerConfig>>,
}

impl Security {
    /// Reads all files that the options name.
    ///
    /// # Errors
    /// [`SecurityError`] names what is wrong, and where.
    pub fn new(options: SecurityOptions) -> Result<Self, SecurityError> {
        let rules = Rules::read(&options, 0)?;
        let (current, generation) = (RwLock::new(Arc::new(rules)), AtomicU64::new(0));
        let reloading = Mutex::new(());
        Ok(Self { inner: Arc::new(Inner { options, current, generation, reloading }) })
    }

    /// Reads all files again. New connections meet what they say now. Connections that there are go on under their
    /// old certificates, unless the peer, or its right to the journal, isn't in the list any more, or its
    /// certificate isn't trusted any more: these are closed with DENIED within a heartbeat.
    ///
    /// # Errors
    /// [`SecurityError`] names what is wrong, and where; everything stays as it was then.
    pub fn reload(&self) -> Result<(), SecurityError> {
        let _alone = self.inner.reloading.lock();
        let generation = self.inner.generation.load(Ordering::Acquire) + 1;
        let rules = Rules::read(&self.inner.options, generation)?;
        *self.inner.current.write() = Arc::new(rules);
        self.inner.generation.store(generation, Ordering::Release);
        Ok(())
    }

    /// Whether connections are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.inner.options.tls.is_some()
    }

    /// What the handshake of a new connection follows; `None` without TLS.
    pub(crate) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.rules().tls.clone()
    }

    fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.inner.current.read())
    }
}

impl Rules {
    fn read(options: &SecurityOptions, generation: u64) -> Result<Self, SecurityError> {
        let access = read_access(&options.access)?;
        let Some(tls) = &options.tls else {
            let (authority, requires_certificate) = (None, false);
            return Ok(Self { generation, access, authority, requires_certificate, tls: None });
        };
        let authority = tls.client_authorities.as_ref().map(tls::authority).transpose()?;
        let keys: Vec<_> = access.peers().iter().flat_map(|peer| peer.keys.clone()).collect();
        let by_authority = |peer: &Arc<Peer>| peer.any_certificate || !peer.names.is_empty();
        let has_list = !matches!(options.access, Access::NoList);
        if authority.is_none() && has_list && access.peers().iter().any(by_authority) {
            let reason =
                "the access list has names or any_certificate, and there are no client_authorities";
            return Err(SecurityError::NobodyTrusted { reason });
        }
        let clients = (authority.is_some() || !keys.is_empty()).then(|| ClientVerifier {
            pinned: PinnedKeys::new(keys),
            authority: authority.clone(),
            required: tls.require_client_certificate,
        });
        if clients.is_none() && tls.require_client_certificate {
            let reason = "client certificates are required, and no authority and no key is trusted";
            return Err(SecurityError::NobodyTrusted { reason });
        }
        let requires_certificate = tls.require_client_certificate;
        let tls = Some(tls::server_config(&tls.certificate, clients)?);
        Ok(Self { generation, access, authority, requires_certificate, tls })
    }
}

fn read_access(access: &Access) -> Result<AccessList, SecurityError> {
    match access {
        Access::NoList => Ok(AccessList::without_list()),
        Access::List(list) => Ok(list.clone()),
        Access::File(path) => AccessList::read(path),
    }
}

/// Compiles the examples of the manual.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/operate/security.md")]
mod manual {}
