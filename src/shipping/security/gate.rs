//! What a session asks: who is this, may they, and still?

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;

use super::access::Peer;
use super::secret::{KeyPin, TokenHash};
use super::{Rules, Security};
use crate::position::JournalId;
use crate::shipping::filter::FeedFilter;
use crate::shipping::message::{Authentication, ErrorCode};

/// What is known of a connection beside what is said in it.
#[derive(Clone, Debug, Default)]
struct Channel {
    /// It comes from this machine.
    loopback: bool,
    /// It is TLS.
    encrypted: bool,
    /// What the peer has shown in TLS, and proven to have the key of; its own certificate first.
    certificates: Vec<CertificateDer<'static>>,
}

/// A connection's way in. Without security there is no gate: everybody may have everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gate {
    security: Option<Security>,
    channel: Channel,
    admitted: Option<Admitted>,
}

#[derive(Clone, Debug)]
struct Admitted {
    peer: Arc<Peer>,
    credential: Credential,
    generation: u64,
}

#[derive(Clone, Debug)]
enum Credential {
    Token(TokenHash),
    Certificate,
    Nothing,
}

impl Gate {
    /// Of a connection that comes from this machine or not.
    pub(crate) fn new(security: Option<Security>, loopback: bool) -> Self {
        let channel = Channel { loopback, ..Channel::default() };
        Self { security, channel, admitted: None }
    }

    /// The connection has become a TLS one, in which the peer has shown these certificates.
    pub(crate) fn encrypted(&mut self, certificates: Vec<CertificateDer<'static>>) {
        self.channel.encrypted = true;
        self.channel.certificates = certificates;
    }

    /// Finds out who it is, or why they aren't let in.
    pub(crate) fn enter(&mut self, authentication: &Authentication) -> Result<(), ErrorCode> {
        let Some(security) = &self.security else { return Ok(()) };
        let credential = match authentication {
            Authentication::Token(token) => Credential::Token(TokenHash::of(token.as_bytes())),
            _ if self.channel.certificates.is_empty() => Credential::Nothing,
            _ => Credential::Certificate,
        };
        let rules = security.rules();
        let peer = rules.identify(&self.channel, &credential)?;
        self.admitted = Some(Admitted { peer, credential, generation: rules.generation });
        Ok(())
    }

    /// The name of the peer in the access list.
    pub(crate) fn peer(&self) -> Option<&str> {
        self.admitted.as_ref().map(|admitted| admitted.peer.name.as_str())
    }

    /// Whether it may have this journal, byte for byte.
    pub(crate) fn may_mirror(&self, journal: &JournalId) -> bool {
        match (&self.security, &self.admitted) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(_), Some(admitted)) => admitted.peer.may_mirror(journal),
        }
    }

    /// What it may have of this journal at the most, in feeds; `None`: nothing.
    pub(crate) fn may_be_fed(&self, journal: &JournalId) -> Option<FeedFilter> {
        match (&self.security, &self.admitted) {
            (None, _) => Some(FeedFilter::everything()),
            (Some(_), admitted) => admitted.as_ref()?.peer.may_be_fed(journal),
        }
    }

    /// Whether what it was let in by doesn't hold any more, nor its right to `journal` where it is sent that, or
    /// to what `filter` lets through of it. Costs next to nothing unless there was a reload. `None`: its rights are
    /// others by now, and filters are to be compared, which may take long, and wasn't allowed.
    pub(crate) fn is_revoked(
        &mut self,
        journal: Option<&JournalId>,
        filter: Option<&FeedFilter>,
        may_take_long: bool,
    ) -> Option<bool> {
        let (Some(security), Some(admitted)) = (&self.security, &mut self.admitted) else {
            return Some(false);
        };
        if security.inner.generation.load(Ordering::Acquire) == admitted.generation {
            return Some(false);
        }
        let rules = security.rules();
        let Ok(peer) = rules.identify(&self.channel, &admitted.credential) else {
            return Some(true);
        };
        let is_revoked = match (journal, filter) {
            (None, _) => false,
            (Some(journal), None) => !peer.may_mirror(journal),
            // It was granted by these.
            (Some(_), Some(_)) if peer.may == admitted.peer.may => false,
            (Some(_), Some(_)) if !may_take_long => return None,
            (Some(journal), Some(filter)) => {
                !peer.may_be_fed(journal).is_some_and(|all| filter.is_within(&all))
            }
        };
        admitted.peer = peer;
        admitted.generation = rules.generation;
        Some(is_revoked)
    }
}

impl Rules {
    /// The token decides if there is one, else the certificate.
    fn identify(&self, channel: &Channel, credential: &Credential) -> Result<Arc<Peer>, ErrorCode> {
        let (found, missing) = match credential {
            Credential::Token(_) if !channel.encrypted && !channel.loopback => {
                (None, ErrorCode::DENIED)
            }
            Credential::Token(_) if self.requires_certificate && !self.trusts(channel) => {
                (None, ErrorCode::DENIED)
            }
            Credential::Token(hash) => (self.access.by_token(hash), ErrorCode::DENIED),
            Credential::Certificate => (self.by_certificate(channel), ErrorCode::DENIED),
            Credential::Nothing => {
                (self.access.anonymous(channel.loopback), ErrorCode::AUTH_REQUIRED)
            }
        };
        found.cloned().ok_or(missing)
    }

    /// Whether the certificate that was shown would be trusted now.
    fn trusts(&self, channel: &Channel) -> bool {
        let Some((end_entity, intermediates)) = channel.certificates.split_first() else {
            return false;
        };
        let pin = KeyPin::of_certificate(end_entity);
        pin.is_ok_and(|pin| self.access.by_key(&pin).is_some())
            || self.is_signed(end_entity, intermediates)
    }

    fn is_signed(&self, end_entity: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> bool {
        self.authority.as_ref().is_some_and(|authority| {
            authority.verify_client_cert(end_entity, rest, UnixTime::now()).is_ok()
        })
    }

    /// By its key, else by an authority's word: a certificate that was let in for its key may claim any name.
    fn by_certificate(&self, channel: &Channel) -> Option<&Arc<Peer>> {
        let (end_entity, intermediates) = channel.certificates.split_first()?;
        if let Some(peer) = self.access.by_key(&KeyPin::of_certificate(end_entity).ok()?) {
            return Some(peer);
        }
        self.is_signed(end_entity, intermediates).then_some(())?;
        let certificate = ParsedCertificate::try_from(end_entity).ok()?;
        let named = |peer: &&Arc<Peer>| {
            let mut names = peer.names.iter().map(super::DnsName::to_server_name);
            names.any(|name| rustls::client::verify_server_name(&certificate, &name).is_ok())
        };
        let mut peers = self.access.peers().iter();
        peers.clone().find(named).or_else(|| peers.find(|peer| peer.any_certificate))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    use super::super::{
        Access, AccessList, AccessToken, Anonymous, Certificate, Pem, Right, SecurityOptions,
        ServerTls,
    };
    use super::*;
    use crate::shipping::message::Presented;

    const JOURNAL: JournalId = JournalId::from_bytes([7; 16]);

    fn presented(token: &AccessToken) -> Authentication {
        Authentication::Token(Presented::new(token.expose().as_bytes()))
    }

    fn plain(peers: impl IntoIterator<Item = Peer>) -> Security {
        let access = Access::List(AccessList::new(peers).unwrap());
        Security::new(SecurityOptions { tls: None, access }).unwrap()
    }

    fn peer(name: &str) -> Peer {
        Peer { may: vec![Right::everything()], ..Peer::named(name) }
    }

    fn entered(
        security: &Security,
        loopback: bool,
        with: &Authentication,
    ) -> Result<String, ErrorCode> {
        let mut gate = Gate::new(Some(security.clone()), loopback);
        gate.enter(with)?;
        Ok(gate.peer().unwrap().to_owned())
    }

    #[test]
    fn without_a_list_this_machine_is_let_in_and_nobody_else() {
        let security = Security::new(SecurityOptions::default()).unwrap();
        let nothing = Authentication::None;
        assert_eq!(entered(&security, true, &nothing), Ok("this machine".to_owned()));
        assert_eq!(entered(&security, false, &nothing), Err(ErrorCode::AUTH_REQUIRED));
        let mut open = Gate::default();
        assert!(
            open.enter(&nothing).is_ok()
                && open.may_mirror(&JOURNAL)
                && open.is_revoked(None, None, false) == Some(false)
        );
    }

    #[test]
    fn whoever_presents_nothing_is_let_in_only_where_the_list_says_so() {
        let local = Peer { anonymous: Anonymous::Loopback, ..peer("local") };
        let public = Peer { anonymous: Anonymous::Anywhere, ..peer("public") };
        let token = AccessToken::generate().unwrap();
        let holder = Peer { tokens: vec![token.hash()], ..peer("holder") };
        let (nothing, unknown) = (Authentication::None, Authentication::Other(7));
        let list = plain([holder.clone()]);
        assert_eq!(entered(&list, true, &nothing), Err(ErrorCode::AUTH_REQUIRED));
        assert_eq!(entered(&list, true, &unknown), Err(ErrorCode::AUTH_REQUIRED));
        let list = plain([holder.clone(), local]);
        assert_eq!(entered(&list, true, &nothing), Ok("local".to_owned()));
        assert_eq!(entered(&list, false, &nothing), Err(ErrorCode::AUTH_REQUIRED));
        assert_eq!(entered(&plain([holder, public]), false, &nothing), Ok("public".to_owned()));
    }

    #[test]
    fn a_token_counts_within_tls_or_this_machine_and_never_in_clear_over_a_network() {
        let (token, other) = (AccessToken::generate().unwrap(), AccessToken::generate().unwrap());
        let security = plain([Peer { tokens: vec![token.hash()], ..peer("holder") }]);
        assert_eq!(entered(&security, true, &presented(&token)), Ok("holder".to_owned()));
        assert_eq!(entered(&security, false, &presented(&token)), Err(ErrorCode::DENIED));
        assert_eq!(entered(&security, true, &presented(&other)), Err(ErrorCode::DENIED));
        let mut gate = Gate::new(Some(security), false);
        gate.encrypted(Vec::new());
        assert_eq!(gate.enter(&presented(&token)), Ok(()));
    }

    /// Where a certificate is asked for as well, it must be trusted as long as the token is used.
    #[test]
    fn a_token_counts_only_beside_a_certificate_that_is_still_trusted_where_both_are_wanted() {
        let authority = || {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let pem = params.self_signed(&key).unwrap().pem();
            (pem, Issuer::new(params, key))
        };
        let ((pem, issuer), (other_pem, _)) = (authority(), authority());
        let key = KeyPair::generate().unwrap();
        let shown = CertificateParams::new(["mirror.internal".to_owned()]).unwrap();
        let shown = shown.signed_by(&key, &issuer).unwrap();
        let own = rcgen::generate_simple_self_signed(["origin.internal".to_owned()]).unwrap();
        let token = AccessToken::generate().unwrap();
        let entered = |authority: &str, certificates: Vec<CertificateDer<'static>>| {
            let certificate = Certificate {
                chain: Pem::text(own.cert.pem()),
                key: Pem::text(own.signing_key.serialize_pem()),
            };
            let tls = ServerTls {
                client_authorities: Some(Pem::text(authority.to_owned())),
                require_client_certificate: true,
                ..ServerTls::with(certificate)
            };
            let holder = Peer { tokens: vec![token.hash()], ..peer("holder") };
            let access = Access::List(AccessList::new([holder]).unwrap());
            let options = SecurityOptions { tls: Some(tls), access };
            let mut gate = Gate::new(Some(Security::new(options).unwrap()), false);
            gate.encrypted(certificates);
            gate.enter(&presented(&token))
        };
        let shown = shown.der().clone();
        assert_eq!(entered(&pem, vec![shown.clone()]), Ok(()));
        assert_eq!(entered(&other_pem, vec![shown]), Err(ErrorCode::DENIED));
        assert_eq!(entered(&pem, Vec::new()), Err(ErrorCode::DENIED));
    }

    /// Whoever isn't let in yet may have nothing.
    #[test]
    fn nothing_may_be_had_before_the_peer_is_known() {
        let security = Security::new(SecurityOptions::default()).unwrap();
        let mut gate = Gate::new(Some(security), true);
        assert!(!gate.may_mirror(&JOURNAL));
        gate.enter(&Authentication::None).unwrap();
        assert!(gate.may_mirror(&JOURNAL));
    }

    #[test]
    fn a_certificate_is_known_by_its_key_else_by_what_an_authority_says() {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new([]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(ca, ca_key);
        let signed = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([name.to_owned()]).unwrap();
            params.signed_by(&key, &issuer).unwrap().der().clone()
        };
        let own_key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["listed.internal".to_owned()]).unwrap();
        let own = params.self_signed(&own_key).unwrap();
        let pinned = own.der().clone();
        let keys = vec![KeyPin::of_certificate(&pinned).unwrap()];
        let names = vec!["listed.internal".parse().unwrap()];
        let certified = |peers: &[Peer], authority: bool| {
            let tls = ServerTls {
                client_authorities: authority.then(|| Pem::text(ca_pem.clone())),
                ..ServerTls::with(Certificate {
                    chain: Pem::text(own.pem()),
                    key: Pem::text(own_key.serialize_pem()),
                })
            };
            let access = Access::List(AccessList::new(peers.to_vec()).unwrap());
            Security::new(SecurityOptions { tls: Some(tls), access })
        };
        let by_key = Peer { keys, ..peer("by key") };
        let by_name = Peer { names, ..peer("by name") };
        let any = Peer { any_certificate: true, ..peer("any") };
        let shown = |security: &Security, certificate: CertificateDer<'static>| {
            let mut gate = Gate::new(Some(security.clone()), false);
            gate.encrypted(vec![certificate]);
            gate.enter(&Authentication::None).map(|()| gate.peer().unwrap().to_owned())
        };
        let all = certified(&[any.clone(), by_name.clone(), by_key.clone()], true).unwrap();
        // Its own word for a name is worth nothing.
        assert_eq!(shown(&all, pinned.clone()), Ok("by key".to_owned()));
        assert_eq!(shown(&all, signed("listed.internal")), Ok("by name".to_owned()));
        assert_eq!(shown(&all, signed("other.internal")), Ok("any".to_owned()));
        let named = certified(std::slice::from_ref(&by_name), true).unwrap();
        assert_eq!(shown(&named, pinned), Err(ErrorCode::DENIED));
        assert_eq!(shown(&named, signed("other.internal")), Err(ErrorCode::DENIED));
        for peer in [by_name, any] {
            assert!(certified(&[peer], false).is_err(), "nobody could be it");
        }
    }
}
