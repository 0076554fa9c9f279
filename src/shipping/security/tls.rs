//! TLS 1.3 with `rustls`: who is trusted, and what both sides agree upon.
//!
//! Invariants:
//! - The provider of algorithms is named here (`ring`), and no process-wide default is looked at or set.
//! - A pin is for a key, and so says nothing without the proof that the peer has that key: the signature over the
//!   handshake is verified in every case, by the same code as for certificates of an authority.
//! - No sessions are resumed and no early data is taken: whoever was refused or revoked has nothing to come back with,
//!   and nothing can be replayed.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, PeerIncompatible,
    RootCertStore, ServerConfig, SignatureScheme, SupportedProtocolVersion,
};

use super::error::SecurityError;
use super::pem::{Certificate, Pem};
use super::secret::KeyPin;

/// What is spoken within TLS, as both sides tell each other (ALPN).
pub const ALPN: &[u8] = b"headwater/1";

const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// How a mirror connects with TLS: whom it believes to be its origin, and what it shows of itself.
///
/// Files are read before every connection, so renewed ones need no restart.
///
/// ```
/// use headwater::shipping::FollowOptions;
/// use headwater::shipping::security::{Certificate, ClientTls, Pem, Trust};
///
/// let options = FollowOptions {
///     tls: Some(ClientTls {
///         certificate: Some(Certificate::files("mirror.pem", "mirror.key")),
///         ..ClientTls::trusting(Trust::Authorities(Pem::file("ca.pem")))
///     }),
///     ..FollowOptions::default()
/// };
/// ```
#[derive(Clone, Debug)]
pub struct ClientTls {
    /// Whom to believe.
    pub trust: Trust,
    /// What this side shows of itself, if the origin wants to see a certificate.
    pub certificate: Option<Certificate>,
    /// The name that must stand in the origin's certificate; `None`: the host of the address. With
    /// [`Trust::Keys`] names don't matter.
    pub server_name: Option<String>,
}

/// By what a mirror recognises its origin.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Trust {
    /// Its certificate is signed by one of these authorities, not expired, and for the right name.
    Authorities(Pem),
    /// It has one of these keys: several while it changes from one to another. Who signed its certificate, and the
    /// dates and names in it, don't matter: it can be self-signed.
    Keys(Vec<KeyPin>),
}

impl ClientTls {
    /// Trusts these, and shows nothing of itself.
    #[must_use]
    pub const fn trusting(trust: Trust) -> Self {
        Self { trust, certificate: None, server_name: None }
    }

    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, SecurityError> {
        let verifier: Arc<dyn ServerCertVerifier> = match &self.trust {
            Trust::Authorities(pem) => {
                let roots = Arc::new(roots(pem)?);
                let built = WebPkiServerVerifier::builder_with_provider(roots, provider()).build();
                built.map_err(|error| unusable(pem, &error))?
            }
            Trust::Keys(keys) if keys.is_empty() => {
                return Err(SecurityError::NobodyTrusted { reason: "the list of keys is empty" });
            }
            Trust::Keys(keys) => Arc::new(PinnedKeys::new(keys.clone())),
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(VERSIONS)
            .map_err(|error| no_versions(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => {
                let (chain, key) = certificate.load()?;
                let built = builder.with_client_auth_cert(chain, key);
                built.map_err(|error| certificate.chain.unusable(error))?
            }
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// The name for an origin at `address`, which is a host and a port.
    pub(crate) fn server_name(&self, address: &str) -> Result<ServerName<'static>, SecurityError> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = self.server_name.as_deref().unwrap_or(host);
        match (ServerName::try_from(name.to_owned()), &self.trust) {
            (Ok(name), _) => Ok(name),
            // It is only sent to help a proxy on the way; an address is not sent.
            (Err(_), Trust::Keys(_)) => Ok(IpAddr::from([127, 0, 0, 1]).into()),
            (Err(_), Trust::Authorities(_)) => {
                Err(SecurityError::ServerName { name: name.to_owned() })
            }
        }
    }
}

fn roots(pem: &Pem) -> Result<RootCertStore, SecurityError> {
    let mut roots = RootCertStore::empty();
    for certificate in pem.certificates()? {
        roots.add(certificate).map_err(|error| pem.unusable(error))?;
    }
    Ok(roots)
}

fn unusable(pem: &Pem, error: &VerifierBuilderError) -> SecurityError {
    pem.unusable(rustls::Error::General(error.to_string()))
}

fn no_versions(error: &rustls::Error) -> SecurityError {
    Pem::text("").unusable(error.clone())
}

/// Verifies certificates of peers by an authority's signature.
pub(crate) fn authority(pem: &Pem) -> Result<Arc<dyn ClientCertVerifier>, SecurityError> {
    let roots = Arc::new(roots(pem)?);
    let built = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
    built.map_err(|error| unusable(pem, &error))
}

/// What a server shows and asks for.
pub(crate) fn server_config(
    certificate: &Certificate,
    clients: Option<ClientVerifier>,
) -> Result<Arc<ServerConfig>, SecurityError> {
    let (chain, key) = certificate.load()?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(VERSIONS)
        .map_err(|error| no_versions(&error))?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(Arc::new(clients)),
        None => builder.with_no_client_auth(),
    };
    let built = builder.with_single_cert(chain, key);
    let mut config = built.map_err(|error| certificate.chain.unusable(error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Believes whoever proves to have one of certain keys.
pub(crate) struct PinnedKeys {
    keys: Vec<KeyPin>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedKeys {
    pub(crate) fn new(keys: Vec<KeyPin>) -> Self {
        Self { keys, algorithms: provider().signature_verification_algorithms }
    }

    fn has(&self, certificate: &CertificateDer<'_>) -> Result<bool, rustls::Error> {
        Ok(self.keys.contains(&KeyPin::of_certificate(certificate)?))
    }

    /// That the peer has the key of its certificate, and not only the certificate.
    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

impl fmt::Debug for PinnedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PinnedKeys").field(&self.keys).finish()
    }
}

const UNTRUSTED: rustls::Error =
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
const NO_TLS12: rustls::Error =
    rustls::Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled);

impl ServerCertVerifier for PinnedKeys {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.has(end_entity)? { Ok(ServerCertVerified::assertion()) } else { Err(UNTRUSTED) }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Believes mirrors whose keys are in the access list, and those with a certificate of an authority.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    pub(crate) pinned: PinnedKeys,
    pub(crate) authority: Option<Arc<dyn ClientCertVerifier>>,
    pub(crate) required: bool,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.required
    }

    /// None: a mirror with a self-signed certificate would think that its own isn't wanted.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if self.pinned.has(end_entity)? {
            return Ok(ClientCertVerified::assertion());
        }
        let authority = self.authority.as_ref().ok_or(UNTRUSTED)?;
        authority.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.pinned.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.pinned.algorithms.supported_schemes()
    }
}
