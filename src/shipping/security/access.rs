//! Who may have which journals, and how.
//!
//! ```json
//! { "peers": [
//!     { "name": "shipping",
//!       "keys": ["sha256:…"], "tokens": ["sha256:…"], "names": ["shipping.internal"],
//!       "may": [{ "journal": "*" }] },
//!     { "name": "this machine", "anonymous": "loopback", "may": [{ "journal": "*" }] } ] }
//! ```
//!
//! Invariants:
//! - What isn't in the list is denied.
//! - A key and a token belong to one peer.
//! - A right to filtered feeds is no right to the whole journal.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::SecurityError;
use super::secret::{KeyPin, TokenHash};
use crate::position::JournalId;
use crate::shipping::filter::FeedFilter;

/// The peers of an origin, and what each may have.
///
/// ```
/// use headwater::shipping::security::{AccessList, Peer, Right};
///
/// let list: AccessList = r#"{ "peers": [{
///     "name": "shipping",
///     "keys": ["sha256:0000000000000000000000000000000000000000000000000000000000000000"],
///     "may": [{ "journal": "*" }]
/// }] }"#.parse()?;
///
/// let key = list.peers()[0].keys[0];
/// let same = Peer { keys: vec![key], may: vec![Right::everything()], ..Peer::named("shipping") };
/// assert_eq!(AccessList::new([same])?, list);
///
/// let error = r#"{ "peers": [{ "name": "shipping", "kyes": [] }] }"#.parse::<AccessList>().unwrap_err();
/// assert!(error.to_string().contains("unknown field `kyes`"), "{error}");
/// # Ok::<(), headwater::shipping::security::AccessError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessList {
    peers: Vec<Arc<Peer>>,
}

/// Someone who may have journals: by what it is known, and what it may have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name, for people; it shows in the status of its connections.
    pub name: String,
    /// The keys of its certificates: several while it changes from one to another. Who signed the certificates,
    /// and their dates, don't matter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyPin>,
    /// The hashes of its tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenHash>,
    /// Names (DNS) that stand in its certificates, if these are signed by a trusted authority.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<DnsName>,
    /// It is whoever has a certificate that is signed by a trusted authority.
    #[serde(default)]
    pub any_certificate: bool,
    /// It is whoever presents nothing.
    #[serde(default)]
    pub anonymous: Anonymous,
    /// What it may have.
    pub may: Vec<Right>,
}

/// Whether a peer is whoever presents neither a certificate nor a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Anonymous {
    /// No.
    #[default]
    No,
    /// If it connects from this machine. A tunnel or proxy here makes everybody who reaches that look so.
    Loopback,
    /// From anywhere: what the peer may have is public to all who reach the address.
    Anywhere,
}

/// A journal, or all, that a peer may have, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RightInFile", into = "RightInFile")]
pub struct Right {
    /// Which.
    pub journal: Journals,
    /// How.
    pub mode: Mode,
}

/// Which journals a right is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Journals {
    /// All that are served.
    All,
    /// This one.
    One(JournalId),
}

/// In which way a peer may have a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// All of it, byte for byte.
    Verbatim,
    /// Only feeds that this filter lets through.
    Filtered(FeedFilter),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RightInFile {
    journal: String,
    #[serde(default)]
    mode: ModeInFile,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    filter: Option<FeedFilter>,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeInFile {
    #[default]
    Verbatim,
    Filtered,
}

impl TryFrom<RightInFile> for Right {
    type Error = &'static str;

    fn try_from(file: RightInFile) -> Result<Self, &'static str> {
        let journal = match file.journal.as_str() {
            "*" => Journals::All,
            id => {
                Journals::One(id.parse().map_err(|_| "journal: neither \"*\" nor the id of one")?)
            }
        };
        let mode = match (file.mode, file.filter) {
            (ModeInFile::Verbatim, None) => Mode::Verbatim,
            (ModeInFile::Filtered, Some(filter)) => Mode::Filtered(filter),
            (ModeInFile::Verbatim, Some(_)) => return Err("filter: only with mode \"filtered\""),
            (ModeInFile::Filtered, None) => return Err("filter: missing for mode \"filtered\""),
        };
        Ok(Self { journal, mode })
    }
}

impl From<Right> for RightInFile {
    fn from(right: Right) -> Self {
        let journal = match right.journal {
            Journals::All => "*".to_owned(),
            Journals::One(journal) => journal.to_string(),
        };
        let (mode, filter) = match right.mode {
            Mode::Verbatim => (ModeInFile::Verbatim, None),
            Mode::Filtered(filter) => (ModeInFile::Filtered, Some(filter)),
        };
        Self { journal, mode, filter }
    }
}

impl Right {
    /// All journals, byte for byte.
    #[must_use]
    pub const fn everything() -> Self {
        Self { journal: Journals::All, mode: Mode::Verbatim }
    }

    /// This journal, byte for byte.
    #[must_use]
    pub const fn verbatim(journal: JournalId) -> Self {
        Self { journal: Journals::One(journal), mode: Mode::Verbatim }
    }

    fn is_about(&self, journal: &JournalId) -> bool {
        match &self.journal {
            Journals::All => true,
            Journals::One(one) => one == journal,
        }
    }
}

impl Peer {
    /// Called this, known by nothing yet, and without rights.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Whether it may have all of this journal, byte for byte.
    #[must_use]
    pub fn may_mirror(&self, journal: &JournalId) -> bool {
        self.may.iter().any(|right| right.is_about(journal) && right.mode == Mode::Verbatim)
    }

    /// The filters of the feeds that it may have of this journal.
    pub fn filters(&self, journal: &JournalId) -> impl Iterator<Item = &FeedFilter> {
        self.may.iter().filter(|right| right.is_about(journal)).filter_map(|right| {
            match &right.mode {
                Mode::Filtered(filter) => Some(filter),
                Mode::Verbatim => None,
            }
        })
    }

    /// What it may have of this journal at the most, in feeds; `None`: nothing at all.
    #[must_use]
    pub fn may_be_fed(&self, journal: &JournalId) -> Option<FeedFilter> {
        if self.may_mirror(journal) {
            return Some(FeedFilter::everything());
        }
        let parts = self.filters(journal).flat_map(FeedFilter::parts).cloned();
        let all = FeedFilter::any_of(parts);
        (!all.parts().is_empty()).then_some(all)
    }

    fn is_known_by_something(&self) -> bool {
        let listed = !(self.keys.is_empty() && self.tokens.is_empty() && self.names.is_empty());
        listed || self.any_certificate || self.anonymous != Anonymous::No
    }
}

/// A name in a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsName(rustls::pki_types::DnsName<'static>);

impl DnsName {
    pub(crate) fn to_server_name(&self) -> rustls::pki_types::ServerName<'static> {
        rustls::pki_types::ServerName::DnsName(self.0.clone())
    }
}

impl FromStr for DnsName {
    type Err = InvalidDnsName;

    fn from_str(text: &str) -> Result<Self, InvalidDnsName> {
        let name = rustls::pki_types::DnsName::try_from(text.to_owned());
        name.map(Self).map_err(|_| InvalidDnsName)
    }
}

impl Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_ref())
    }
}

impl Serialize for DnsName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DnsName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A text that can't be a name in a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a DNS name")]
pub struct InvalidDnsName;

/// What is wrong with an access list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// It isn't JSON, or not with these fields; says the line and the column.
    #[error("{0}")]
    Syntax(#[source] serde_json::Error),
    /// A peer without a name.
    #[error("peers[{index}]: name is empty")]
    NoName {
        /// Which one, from 0.
        index: usize,
    },
    /// Two peers of one name.
    #[error("peers[{index}]: there are two peers of the name {name:?}")]
    SameName {
        /// The second one.
        index: usize,
        /// The name.
        name: String,
    },
    /// A peer that nobody can be.
    #[error(
        "peer {peer:?}: nobody can be it: give keys, tokens, names, any_certificate or anonymous"
    )]
    Nobody {
        /// Its name.
        peer: String,
    },
    /// A peer that may have nothing.
    #[error("peer {peer:?}: may is empty")]
    NoRights {
        /// Its name.
        peer: String,
    },
    /// Something that is to tell peers apart stands with two of them.
    #[error("peer {peer:?}: {field}: {value} stands with peer {other:?} already")]
    Shared {
        /// The second one.
        peer: String,
        /// The field.
        field: &'static str,
        /// What is shared.
        value: String,
        /// The first one.
        other: String,
    },
}

impl FromStr for AccessList {
    type Err = AccessError;

    fn from_str(text: &str) -> Result<Self, AccessError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct InFile {
            peers: Vec<Peer>,
        }
        let file: InFile = serde_json::from_str(text).map_err(AccessError::Syntax)?;
        Self::new(file.peers)
    }
}

impl AccessList {
    /// A list of these peers.
    ///
    /// # Errors
    /// [`AccessError`] if it could mean something else than was meant.
    pub fn new(peers: impl IntoIterator<Item = Peer>) -> Result<Self, AccessError> {
        let peers: Vec<_> = peers.into_iter().map(Arc::new).collect();
        let mut known = Known::default();
        for (index, peer) in peers.iter().enumerate() {
            if peer.name.is_empty() {
                return Err(AccessError::NoName { index });
            }
            if !known.names.insert(&peer.name) {
                return Err(AccessError::SameName { index, name: peer.name.clone() });
            }
            if !peer.is_known_by_something() {
                return Err(AccessError::Nobody { peer: peer.name.clone() });
            }
            if peer.may.is_empty() {
                return Err(AccessError::NoRights { peer: peer.name.clone() });
            }
            peer.keys.iter().try_for_each(|key| known.claim(peer, "keys", key))?;
            peer.tokens.iter().try_for_each(|token| known.claim(peer, "tokens", token))?;
            peer.names.iter().try_for_each(|name| known.claim(peer, "names", name))?;
            if peer.any_certificate {
                known.claim(peer, "any_certificate", &true)?;
            }
            if peer.anonymous != Anonymous::No {
                known.claim(peer, "anonymous", &"this")?;
            }
        }
        Ok(Self { peers })
    }

    /// The list in a file.
    ///
    /// # Errors
    /// [`SecurityError`] names the file, and the line or the peer and the field.
    pub fn read(path: &Path) -> Result<Self, SecurityError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| SecurityError::file(path, error))?;
        text.parse().map_err(|error| {
            let (path, source) = (Some(path.to_owned()), Arc::new(error));
            SecurityError::Access { path, source }
        })
    }

    /// What holds where no list is given: everybody on this machine, and whoever has a certificate that is
    /// signed by a trusted authority, may have everything.
    pub(crate) fn without_list() -> Self {
        let all = || vec![Right::everything()];
        let certified =
            Peer { any_certificate: true, may: all(), ..Peer::named("any certificate") };
        let local = Anonymous::Loopback;
        let local = Peer { anonymous: local, may: all(), ..Peer::named("this machine") };
        Self { peers: vec![Arc::new(certified), Arc::new(local)] }
    }

    /// Its peers.
    #[must_use]
    pub fn peers(&self) -> &[Arc<Peer>] {
        &self.peers
    }

    pub(crate) fn by_key(&self, key: &KeyPin) -> Option<&Arc<Peer>> {
        self.peers.iter().find(|peer| peer.keys.contains(key))
    }

    /// Looks at every token, and at every byte of it, whichever it is.
    pub(crate) fn by_token(&self, hash: &TokenHash) -> Option<&Arc<Peer>> {
        self.peers.iter().fold(None, |found, peer| {
            peer.tokens
                .iter()
                .fold(found, |found, token| if token.is(hash) { Some(peer) } else { found })
        })
    }

    pub(crate) fn anonymous(&self, loopback: bool) -> Option<&Arc<Peer>> {
        self.peers.iter().find(|peer| match peer.anonymous {
            Anonymous::No => false,
            Anonymous::Loopback => loopback,
            Anonymous::Anywhere => true,
        })
    }
}

/// What stands with a peer already.
#[derive(Default)]
struct Known<'a> {
    names: std::collections::BTreeSet<&'a str>,
    claimed: BTreeMap<(&'static str, String), &'a str>,
}

impl<'a> Known<'a> {
    fn claim(
        &mut self,
        peer: &'a Peer,
        field: &'static str,
        value: &impl Display,
    ) -> Result<(), AccessError> {
        let value = value.to_string();
        match self.claimed.insert((field, value.clone()), &peer.name) {
            None => Ok(()),
            Some(other) => Err(AccessError::Shared {
                peer: peer.name.clone(),
                field,
                value,
                other: other.to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000aa";
    const JOURNAL: JournalId = JournalId::from_bytes([7; 16]);

    fn list(peers: &str) -> Result<AccessList, AccessError> {
        format!("{{ \"peers\": [\n{peers}\n] }}").parse()
    }

    #[test]
    fn what_is_wrong_is_told_with_line_or_peer_and_field() {
        let right = r#""may": [{ "journal": "*" }]"#;
        let wrong = [
            (r#"{ "name": "a", "kyes": [] }"#.to_owned(), "unknown field `kyes`"),
            (r#"{ "name": "a", "kyes": [] }"#.to_owned(), "at line 2 column"),
            (format!(r#"{{ "name": "a", "keys": ["sha256:1"], {right} }}"#), "not a fingerprint"),
            (format!(r#"{{ "name": "a", "keys": ["sha256:1"], {right} }}"#), "line 2"),
            (format!(r#"{{ "name": "", "keys": ["{KEY}"], {right} }}"#), "peers[0]: name"),
            (format!(r#"{{ "name": "a", {right} }}"#), "peer \"a\": nobody can be it"),
            (format!(r#"{{ "name": "a", "keys": ["{KEY}"] }}"#), "missing field `may`"),
            (format!(r#"{{ "name": "a", "keys": ["{KEY}"], "may": [] }}"#), "peer \"a\": may is"),
            (format!(r#"{{ "name": "a", "names": ["-?"], {right} }}"#), "not a DNS name"),
            (format!(r#"{{ "name": "a", "anonymous": "yes", {right} }}"#), "unknown variant `yes`"),
            (
                format!(r#"{{ "name": "a", "keys": ["{KEY}"], "may": [{{ "journal": "b" }}] }}"#),
                "journal: neither",
            ),
            (
                r#"{ "name": "a", "anonymous": "anywhere", "may": [{ "journal": "*", "mode": "filtered" }] }"#
                    .to_owned(),
                "filter: missing",
            ),
            (
                r#"{ "name": "a", "anonymous": "anywhere", "may": [{ "journal": "*", "filter": {} }] }"#
                    .to_owned(),
                "filter: only with mode",
            ),
            (
                format!(
                    r#"{{ "name": "a", "keys": ["{KEY}"], {right} }}, {{ "name": "a", "keys": ["{KEY}"], {right} }}"#
                ),
                "peers[1]: there are two peers of the name \"a\"",
            ),
            (
                format!(
                    r#"{{ "name": "a", "keys": ["{KEY}"], {right} }}, {{ "name": "b", "keys": ["{KEY}"], {right} }}"#
                ),
                "peer \"b\": keys: sha256:00000000000000000000000000000000000000000000000000000000000000aa stands with peer \"a\"",
            ),
        ];
        for (peers, expected) in wrong {
            let error = list(&peers).unwrap_err().to_string();
            assert!(error.contains(expected), "{peers}\n{error}");
        }
    }

    #[test]
    fn a_right_is_for_the_journal_and_the_mode_that_it_names() {
        let other = JournalId::from_bytes([8; 16]);
        let filtered = Mode::Filtered(FeedFilter::everything());
        let filtered = Right { journal: Journals::One(JOURNAL), mode: filtered };
        let may = |rights: &[Right]| Peer { may: rights.to_vec(), ..Peer::named("a") };
        let one = may(&[Right::verbatim(JOURNAL)]);
        assert!(one.may_mirror(&JOURNAL) && !one.may_mirror(&other));
        assert_eq!(one.filters(&JOURNAL).count(), 0);
        let all = may(&[Right::everything()]);
        assert!(all.may_mirror(&JOURNAL) && all.may_mirror(&other));
        let feeds = may(std::slice::from_ref(&filtered));
        assert!(!feeds.may_mirror(&JOURNAL), "a filtered right is no right to everything");
        assert_eq!((feeds.filters(&JOURNAL).count(), feeds.filters(&other).count()), (1, 0));
        assert!(may(&[filtered, Right::verbatim(JOURNAL)]).may_mirror(&JOURNAL));
    }

    #[test]
    fn a_list_is_written_as_it_is_read() {
        let text = format!(
            r#"{{"name":"a","keys":["{KEY}"],"names":["a.internal"],"any_certificate":false,"anonymous":"loopback","may":[{{"journal":"*","mode":"verbatim"}},{{"journal":"{JOURNAL}","mode":"filtered","filter":{{"types":["x"]}}}}]}}"#
        );
        let list = list(&text).unwrap();
        assert_eq!(serde_json::to_string(&*list.peers()[0]).unwrap(), text);
    }

    #[test]
    fn tokens_are_found_wherever_they_stand() {
        let hash = |n: u8| TokenHash::of(&[n]);
        let peer = |n: u8| Peer {
            tokens: vec![hash(n), hash(n + 1)],
            may: vec![Right::everything()],
            ..Peer::named(n.to_string())
        };
        let list = AccessList::new([peer(0), peer(2), peer(4)]).unwrap();
        for n in 0..6 {
            assert_eq!(list.by_token(&hash(n)).unwrap().name, (n & !1).to_string());
        }
        assert_eq!(list.by_token(&hash(6)), None);
    }
}
