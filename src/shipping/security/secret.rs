//! Bearer tokens, and the fingerprints by which keys and tokens are known: `sha256:` and 64 hexadecimal digits.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::error::SecurityError;
use super::pem::Pem;

const PREFIX: &str = "sha256:";
const TOKEN_PREFIX: &str = "hwt_";
const HASH_BYTES: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Fingerprint([u8; HASH_BYTES]);

impl Fingerprint {
    fn of(bytes: &[u8]) -> Self {
        let mut hash = [0; HASH_BYTES];
        hash.iter_mut().zip(digest(&SHA256, bytes).as_ref()).for_each(|(to, from)| *to = *from);
        Self(hash)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        text.strip_prefix(PREFIX).and_then(unhex).map(Self).ok_or(InvalidFingerprint)
    }
}

/// Exactly 64 hexadecimal digits.
fn unhex(digits: &str) -> Option<[u8; HASH_BYTES]> {
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else { return None };
    let mut bytes = [0; HASH_BYTES];
    if pairs.len() != bytes.len() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?;
    }
    Some(bytes)
}

/// A fingerprint that isn't `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a fingerprint: expected sha256: and 64 hexadecimal digits")]
pub struct InvalidFingerprint;

macro_rules! fingerprint {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Fingerprint);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidFingerprint;

            fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
                text.parse().map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

fingerprint! {
    /// A public key, as a peer is known by it: the SHA-256 of the key's DER encoding with its algorithm (the
    /// SubjectPublicKeyInfo of a certificate). It stays the same when the certificate is renewed with the same key.
    ///
    /// ```
    /// # let certified = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
    /// # let pem = certified.cert.pem();
    /// use headwater::shipping::security::{KeyPin, Pem};
    ///
    /// let pin = KeyPin::of(&Pem::text(pem))?;
    /// assert_eq!(pin.to_string().parse(), Ok(pin)); // sha256:…
    /// # Ok::<(), headwater::shipping::security::SecurityError>(())
    /// ```
    KeyPin
}

impl KeyPin {
    /// The key of the first certificate in `pem`.
    ///
    /// # Errors
    /// [`SecurityError`] if there is no certificate that can be read.
    pub fn of(pem: &Pem) -> Result<Self, SecurityError> {
        let chain = pem.certificates()?;
        let certificate = chain.first().ok_or_else(|| pem.nothing_in_it("certificate"))?;
        Self::of_certificate(certificate).map_err(|source| pem.unusable(source))
    }

    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        Ok(Self(Fingerprint::of(&parsed.subject_public_key_info())))
    }
}

fingerprint! {
    /// The hash of a [`AccessToken`]: what is kept where tokens are checked. Nobody can make the token of it.
    ///
    /// A plain SHA-256 is enough: slow hashes are for secrets that can be guessed, and a token is 256 random bits.
    TokenHash
}

impl TokenHash {
    /// Of what a peer presents, whatever it is.
    pub(crate) fn of(presented: &[u8]) -> Self {
        Self(Fingerprint::of(presented))
    }

    /// Takes as long whether they are equal or not, and wherever they differ.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

/// A secret that says who a mirror is: `hwt_` and 256 random bits as 64 hexadecimal digits.
///
/// Whoever has it can read what it is good for. It never shows in `Debug` output, and its memory is
/// overwritten when it is dropped.
///
/// ```
/// use headwater::shipping::security::AccessToken;
///
/// let token = AccessToken::generate()?;
/// let hash = token.hash(); // into the origin's access list; the token itself to the mirror
/// assert_eq!(AccessToken::parse(token.expose())?.hash(), hash);
/// assert!(!format!("{token:?}").contains(token.expose()));
/// # Ok::<(), headwater::shipping::security::SecurityError>(())
/// ```
#[derive(Clone)]
pub struct AccessToken(Zeroizing<String>);

impl AccessToken {
    /// A new one, from the system's randomness.
    ///
    /// # Errors
    /// [`SecurityError::Randomness`] if the system has none.
    pub fn generate() -> Result<Self, SecurityError> {
        let mut bytes = Zeroizing::new([0_u8; HASH_BYTES]);
        SystemRandom::new().fill(bytes.as_mut()).map_err(|_| SecurityError::Randomness)?;
        // As long as it will be: no half of a token is left behind when it grows.
        let mut text = String::with_capacity(TOKEN_PREFIX.len() + 2 * bytes.len());
        text.push_str(TOKEN_PREFIX);
        for byte in bytes.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
            }
        }
        Ok(Self(Zeroizing::new(text)))
    }

    /// A token as it was printed. Space around it is left out.
    ///
    /// # Errors
    /// [`SecurityError::Token`] if it isn't one; a word that somebody thought up can't be one.
    pub fn parse(text: &str) -> Result<Self, SecurityError> {
        let text = text.trim();
        let digits = text.strip_prefix(TOKEN_PREFIX).and_then(unhex);
        if digits.map(Zeroizing::new).is_none() || text.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(SecurityError::Token);
        }
        Ok(Self(Zeroizing::new(text.to_owned())))
    }

    /// What the origin's access list knows it by.
    #[must_use]
    pub fn hash(&self) -> TokenHash {
        TokenHash::of(self.0.as_bytes())
    }

    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(..)")
    }
}

/// Where a mirror has its token from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TokenSource {
    /// It is this one.
    Value(AccessToken),
    /// It is in this file, which is read anew before every connection: a new token needs no restart.
    File(PathBuf),
}

impl TokenSource {
    pub(crate) fn token(&self) -> Result<AccessToken, SecurityError> {
        match self {
            Self::Value(token) => Ok(token.clone()),
            Self::File(path) => {
                let read = std::fs::read_to_string(path);
                let text = Zeroizing::new(read.map_err(|error| SecurityError::file(path, error))?);
                AccessToken::parse(&text)
            }
        }
    }
}

impl From<AccessToken> for TokenSource {
    fn from(token: AccessToken) -> Self {
        Self::Value(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_256_random_bits_and_nothing_else_is_one() {
        let (a, b) = (AccessToken::generate().unwrap(), AccessToken::generate().unwrap());
        assert!(a.expose().len() == 68 && a.expose() != b.expose() && a.hash() != b.hash());
        assert_eq!(AccessToken::parse(&format!(" {}\n", a.expose())).unwrap().expose(), a.expose());
        let (short, upper) = (&a.expose()[..67], a.expose().to_uppercase());
        let wide = format!("{TOKEN_PREFIX}{}", "é".repeat(32));
        for wrong in ["", "secret", TOKEN_PREFIX, short, &upper, &a.expose()[4..], &wide] {
            assert!(matches!(AccessToken::parse(wrong), Err(SecurityError::Token)), "{wrong}");
        }
    }

    #[test]
    fn a_token_shows_in_no_debug_output() {
        let token = AccessToken::generate().unwrap();
        let source = TokenSource::from(token.clone());
        for shown in [format!("{token:?}"), format!("{source:?}"), format!("{source:#?}")] {
            assert!(!shown.contains(&token.expose()[4..8]), "{shown}");
        }
    }

    /// Known from `printf %s hwt_00… | openssl dgst -sha256`.
    #[test]
    fn the_hash_is_the_sha_256_of_the_text() {
        let token = AccessToken::parse(&format!("hwt_{}", "0".repeat(64))).unwrap();
        let hash = "sha256:e62c31c7405ccc7b258dc178de1b9651e53d14e40ecbbb1a211d3d27a625f5a3";
        assert_eq!(token.hash().to_string(), hash);
        assert_eq!(hash.parse(), Ok(token.hash()));
    }

    #[test]
    fn hashes_that_differ_anywhere_are_not_the_same() {
        let hash = TokenHash::of(b"a");
        assert!(hash.is(&TokenHash::of(b"a")));
        for bit in 0..256 {
            let mut other = hash;
            other.0.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!hash.is(&other), "bit {bit}");
        }
    }
}
