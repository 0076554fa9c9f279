//! How the command line connects to whoever serves a journal: the flags that `peer` and `recover` have in common.

use std::path::PathBuf;

use crate::shipping::FollowOptions;
use crate::shipping::security::{Certificate, ClientTls, KeyPin, Pem, TokenSource, Trust};

/// Without any of these: plain TCP, to this machine only.
#[derive(Debug, clap::Args)]
pub(crate) struct LinkArgs {
    /// Connects with TLS to whoever has the key of this pin (see `pin`); may be given several times
    #[arg(long, value_name = "PIN", group = "tls")]
    pin: Vec<KeyPin>,
    /// Connects with TLS to whoever has a certificate of an authority in this PEM file
    #[arg(long, value_name = "FILE", group = "tls")]
    authority: Option<PathBuf>,
    /// The name that stands in that certificate, if it isn't the host of the address
    #[arg(long, value_name = "NAME", requires = "authority")]
    server_name: Option<String>,
    /// Shows this certificate, a PEM file
    #[arg(long, value_name = "FILE", requires_all = ["tls", "key"])]
    certificate: Option<PathBuf>,
    /// Its key, a PEM file
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// Shows the token in this file; with TLS, or within this machine
    #[arg(long, value_name = "FILE")]
    token: Option<PathBuf>,
    /// Connects to other machines, too; nothing is encrypted
    #[arg(long, conflicts_with = "tls")]
    allow_plaintext: bool,
}

impl LinkArgs {
    pub(crate) fn options(&self) -> FollowOptions {
        let trust = match &self.authority {
            Some(file) => Some(Trust::Authorities(Pem::file(file))),
            None => (!self.pin.is_empty()).then(|| Trust::Keys(self.pin.clone())),
        };
        let certificate = self.certificate.as_ref().zip(self.key.as_ref());
        FollowOptions {
            tls: trust.map(|trust| ClientTls {
                trust,
                certificate: certificate.map(|(chain, key)| Certificate::files(chain, key)),
                server_name: self.server_name.clone(),
            }),
            token: self.token.clone().map(TokenSource::File),
            allow_plaintext_off_loopback: self.allow_plaintext,
            ..FollowOptions::default()
        }
    }
}
