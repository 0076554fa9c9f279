//! A certificate of its own, and both ends of TLS with it: ours, and bare ones.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::shipping::security::{
    ALPN, Access, Certificate, ClientTls, KeyPin, Pem, Security, SecurityOptions, ServerTls, Trust,
};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::Outcome;

const HOST: &str = "localhost";

/// A certificate and its key, in files, so that another process can have them.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    dir: PathBuf,
    chain: PathBuf,
    key: PathBuf,
}

impl Identity {
    pub(super) fn create(dir: &Path) -> Outcome<Self> {
        let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        fs::create_dir_all(dir)?;
        let identity = Self::at(dir);
        fs::write(&identity.chain, made.cert.pem())?;
        fs::write(&identity.key, made.signing_key.serialize_pem())?;
        Ok(identity)
    }

    pub(super) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), chain: dir.join("chain.pem"), key: dir.join("key.pem") }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn security(&self) -> Outcome<Security> {
        let tls = ServerTls::with(Certificate::files(&self.chain, &self.key));
        Ok(Security::new(SecurityOptions { tls: Some(tls), access: Access::NoList })?)
    }

    pub(super) fn client(&self) -> Outcome<ClientTls> {
        let pin = KeyPin::of(&Pem::file(&self.chain))?;
        Ok(ClientTls::trusting(Trust::Keys(vec![pin])))
    }

    /// For a bare end of a connection.
    pub(super) fn bare_server(&self) -> Outcome<Arc<ServerConfig>> {
        let chain = vec![CertificateDer::from_pem_file(&self.chain)?];
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth();
        let mut config =
            builder.with_single_cert(chain, PrivateKeyDer::from_pem_file(&self.key)?)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// The same; also for one that speaks the protocol.
    pub(super) fn bare_client(&self) -> Outcome<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&self.chain)?)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

pub(super) type Client = rustls::StreamOwned<ClientConnection, TcpStream>;
pub(super) type Server = rustls::StreamOwned<ServerConnection, TcpStream>;

pub(super) fn connect(config: Arc<ClientConfig>, stream: TcpStream) -> Outcome<Client> {
    let connection = ClientConnection::new(config, ServerName::try_from(HOST)?)?;
    Ok(Client::new(connection, stream))
}

pub(super) fn accept(config: Arc<ServerConfig>, stream: TcpStream) -> Outcome<Server> {
    Ok(Server::new(ServerConnection::new(config)?, stream))
}
