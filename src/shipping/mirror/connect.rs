//! How a connection to whoever serves comes about: never in clear where it mustn't be.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use super::FollowOptions;
use crate::error::OpenError;
use crate::shipping::error::ShippingError;
use crate::shipping::link::Link;
use crate::shipping::message::{Authentication, Presented};
use crate::shipping::security::{AccessToken, TokenSource};
use crate::shipping::transport;
use crate::shipping::upstreams::Addresses;

pub(super) fn open_error(error: OpenError) -> ShippingError {
    ShippingError::Open(Arc::new(error))
}

pub(in crate::shipping) fn setup_error(error: std::io::Error) -> ShippingError {
    ShippingError::Setup(Arc::new(error))
}

/// What a connection is made with, as it is at present.
struct Credentials {
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    authentication: Authentication,
}

impl Credentials {
    fn read(options: &FollowOptions, address: &str) -> Result<Self, ShippingError> {
        let tls = options.tls.as_ref();
        let tls = tls.map(|tls| Ok((tls.config()?, tls.server_name(address)?)));
        let token = options.token.as_ref().map(TokenSource::token).transpose()?;
        let presented = |token: AccessToken| Presented::new(token.expose().as_bytes());
        Ok(Self {
            tls: tls.transpose().map_err(ShippingError::Security)?,
            authentication: token
                .map_or(Authentication::None, |token| Authentication::Token(presented(token))),
        })
    }
}

/// Connects to whoever serves at `address`, wherever that is now; how this side introduces itself there.
pub(in crate::shipping) fn connect(
    address: &str,
    options: &FollowOptions,
    give_up: impl Fn() -> bool,
    connected: impl FnOnce(&TcpStream) -> Result<(), ShippingError>,
) -> Result<(Link, Authentication), ShippingError> {
    let credentials = Credentials::read(options, address)?;
    let addresses = transport::resolve(address, &give_up)?;
    let addresses = check_plaintext(&addresses, options)?;
    let stream = transport::connect(&addresses, options.connect_timeout, give_up)?;
    transport::prepare(&stream, options.deadlines.bounded().silence).map_err(setup_error)?;
    connected(&stream)?;
    let link = match credentials.tls {
        Some((config, name)) => Link::tls(stream, config, name)?,
        None => Link::plain(stream),
    };
    Ok((link, credentials.authentication))
}

/// Whether there is an address, and what is needed to connect to each of them.
pub(in crate::shipping) fn check_addresses(
    addresses: &Addresses,
    options: &FollowOptions,
) -> Result<(), ShippingError> {
    if addresses.as_slice().is_empty() {
        let (option, reason) = ("addresses", "name at least one");
        return Err(open_error(OpenError::InvalidOption { option, reason }));
    }
    addresses.as_slice().iter().try_for_each(|address| {
        check_literal(address, options)?;
        Credentials::read(options, address).map(drop)
    })
}

/// Whether an address that needs no name service may be connected to.
fn check_literal(address: &str, options: &FollowOptions) -> Result<(), ShippingError> {
    match address.parse::<SocketAddr>() {
        Ok(literal) => check_plaintext(&[literal], options).map(drop),
        Err(_) => Ok(()),
    }
}

/// Leaves the addresses that may be connected to; an error if there are none. A token isn't sent in clear, whatever
/// is allowed.
fn check_plaintext(
    addresses: &[SocketAddr],
    options: &FollowOptions,
) -> Result<Vec<SocketAddr>, ShippingError> {
    let plaintext = options.allow_plaintext_off_loopback && options.token.is_none();
    let anywhere = options.tls.is_some() || plaintext;
    let allowed = |address: &&SocketAddr| anywhere || transport::is_loopback(address);
    let usable: Vec<_> = addresses.iter().filter(allowed).copied().collect();
    match addresses.first() {
        Some(&address) if usable.is_empty() => Err(ShippingError::Plaintext { address }),
        _ => Ok(usable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shipping::security::{ClientTls, Trust};

    #[test]
    fn of_several_addresses_only_those_on_loopback_are_used() {
        let addresses = ["192.0.2.1:1", "127.0.0.9:2", "[::1]:3", "[::ffff:127.0.0.1]:4"]
            .map(|address| address.parse::<SocketAddr>().unwrap());
        let mut options = FollowOptions::default();
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses[1..]);
        match check_plaintext(&addresses[..1], &options) {
            Err(ShippingError::Plaintext { address }) => assert_eq!(address, addresses[0]),
            other => panic!("{other:?}"),
        }
        options.allow_plaintext_off_loopback = true;
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses);
        options.token = Some(AccessToken::generate().unwrap().into());
        let kept = check_plaintext(&addresses, &options).unwrap();
        assert_eq!(kept, addresses[1..], "a token in clear");
        options.tls = Some(ClientTls::trusting(Trust::Keys(Vec::new())));
        assert_eq!(check_plaintext(&addresses, &options).unwrap(), addresses);
    }
}
