//! What an append gives to those who want to read at least as of it, and its text.

use std::fmt;
use std::str::FromStr;

use super::{Durability, Incarnation, JournalId, Position};
use crate::format::{Decoder, crc32};
use crate::hex::{from_hex, hex};

/// Proof that an append happened: where its batch ends, and under which incarnation it was written.
///
/// A token is valid in every service that mirrors the journal, because mirrors keep positions: hand it to
/// another service as text, and its view ([`wait_for`](crate::Journal::wait_for), and of a view) can wait until it
/// has caught up with it. A token of an event that was lost (a journal restored from a backup) is recognised and
/// refused.
///
/// As text ([`Display`](fmt::Display), [`FromStr`], serde) it is one word of 77 letters and digits, which goes
/// unquoted into headers, cookies and links. Treat it as opaque: its form has a version. Whatever is left out,
/// added or altered on the way makes an [`InvalidToken`] of it and not another token. It is no secret, and proves
/// nothing about who sends it: anybody can make one up, and then waits until the time is up, or is refused.
///
/// ```
/// # use headwater::{Durability, InvalidToken, Token, JournalId, Incarnation, Position};
/// let token = Token {
///     journal: JournalId::from_bytes([7; 16]),
///     incarnation: Incarnation::new(9),
///     position: Position::new(42),
///     durability: Durability::Durable,
/// };
/// let text = token.to_string();
/// assert_eq!(text.parse::<Token>(), Ok(token));
/// assert_eq!(text.replace("2a", "2b").parse::<Token>(), Err(InvalidToken::Checksum));
/// assert_eq!("not a token".parse::<Token>(), Err(InvalidToken::Form));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The journal that was appended to.
    pub journal: JournalId,
    /// The incarnation that wrote the batch.
    pub incarnation: Incarnation,
    /// The end of the batch: a follower that has processed this position has seen the events.
    pub position: Position,
    /// Whether the events were durable when the token was given. Those of a buffered append may have been
    /// lost since; waiting for the token tells.
    pub durability: Durability,
}

/// What a token's text begins with, and its version behind that.
const NAME: &str = "hw";
const VERSION: &str = "1";
/// Journal, incarnation, position, durability.
const FIELDS_BYTES: usize = 16 + 8 + 8 + 1;
const CHECKSUM_BYTES: usize = 4;
const TEXT_LEN: usize = NAME.len() + VERSION.len() + 2 * (FIELDS_BYTES + CHECKSUM_BYTES);

/// A text that isn't a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidToken {
    /// It has another length, or other characters.
    #[error(
        "not a token: expected hw1 and 74 digits of 0 to 9 and a to f, as printed by an append"
    )]
    Form,
    /// It is a token of a version that this program doesn't know.
    #[error("a token of a later version than this program knows")]
    Version,
    /// It was altered on the way.
    #[error("not a token any more: its checksum is wrong, so it was altered on the way")]
    Checksum,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields = [
            self.journal.as_bytes().as_slice(),
            &self.incarnation.get().to_le_bytes(),
            &self.position.get().to_le_bytes(),
            &[u8::from(self.durability == Durability::Buffered)],
        ];
        let text = format!("{NAME}{VERSION}{}", hex(&fields.concat()));
        write!(f, "{text}{}", hex(&crc32(&[text.as_bytes()]).to_le_bytes()))
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let digits = text.strip_prefix(NAME).ok_or(InvalidToken::Form)?;
        let Some(digits) = digits.strip_prefix(VERSION).filter(|_| text.len() == TEXT_LEN) else {
            let is_digit = |first: char| first.is_ascii_digit() && first != '1';
            let is_later = digits.starts_with(is_digit);
            return Err(if is_later { InvalidToken::Version } else { InvalidToken::Form });
        };
        let bytes = from_hex(digits).ok_or(InvalidToken::Form)?;
        let (fields, checksum) = bytes.split_at_checked(FIELDS_BYTES).ok_or(InvalidToken::Form)?;
        let checked = text.len() - 2 * CHECKSUM_BYTES;
        let checked = text.get(..checked).ok_or(InvalidToken::Form)?;
        if crc32(&[checked.as_bytes()]).to_le_bytes() != checksum {
            return Err(InvalidToken::Checksum);
        }
        read(fields).ok_or(InvalidToken::Form)
    }
}

/// The fields, the checksum of which is right.
fn read(fields: &[u8]) -> Option<Token> {
    let mut input = Decoder::new(fields);
    let journal = JournalId::from_bytes(input.array().ok()?);
    let incarnation = Incarnation::new(input.u64().ok()?);
    let position = Position::new(input.u64().ok()?);
    let durability = match input.u8().ok()? {
        0 => Durability::Durable,
        1 => Durability::Buffered,
        _ => return None,
    };
    Some(Token { journal, incarnation, position, durability })
}

impl serde::Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Token {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> impl Strategy<Value = Token> {
        (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
            |(journal, incarnation, position, buffered)| Token {
                journal: JournalId::from_bytes(journal),
                incarnation: Incarnation::new(incarnation),
                position: Position::new(position),
                durability: if buffered { Durability::Buffered } else { Durability::Durable },
            },
        )
    }

    proptest! {
        #[test]
        fn a_token_comes_back_from_its_text(token in token()) {
            let text = token.to_string();
            prop_assert_eq!(text.len(), TEXT_LEN);
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
            prop_assert_eq!(text.parse(), Ok(token));
            let json = serde_json::to_string(&token).unwrap();
            prop_assert_eq!(json, format!("\"{text}\""));
        }

        /// Up to four characters beside each other are what a CRC finds for certain.
        #[test]
        fn a_token_that_was_altered_is_none(
            token in token(),
            at in 0..TEXT_LEN,
            with in "[ -~]{0,4}",
            gone in 0..=4_usize,
        ) {
            let text = token.to_string();
            let end = (at + gone).min(TEXT_LEN);
            let altered = format!("{}{with}{}", &text[..at], &text[end..]);
            prop_assert_eq!(altered.parse::<Token>().ok(), (altered == text).then_some(token));
        }

        #[test]
        fn no_text_is_too_strange(text in any::<String>(), behind in "hw[0-9]?\\PC{0,90}") {
            prop_assert!(text.parse::<Token>().is_err());
            prop_assert!(behind.parse::<Token>().is_err());
        }
    }

    fn one() -> Token {
        Token {
            journal: JournalId::from_bytes([0xA7; 16]),
            incarnation: Incarnation::new(0x0123_4567_89ab_cdef),
            position: Position::new(42),
            durability: Durability::Durable,
        }
    }

    fn sealed(fields: &str) -> String {
        format!("{fields}{:08x}", crc32fast::hash(fields.as_bytes()).swap_bytes())
    }

    /// Services of several versions read each other's tokens.
    #[test]
    fn the_text_stays_what_it_is() {
        let text = one().to_string();
        let fields = "hw1a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7efcdab89674523012a0000000000000000";
        assert_eq!(text, sealed(fields));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let text = one().to_string();
        assert_eq!(text.to_uppercase().parse::<Token>(), Err(InvalidToken::Form));
        assert_eq!(format!("{text}, {text}").parse::<Token>(), Err(InvalidToken::Form));
        assert_eq!(text.replacen("hw1", "hw2", 1).parse::<Token>(), Err(InvalidToken::Version));
        assert_eq!(text.replacen("a7", "a6", 1).parse::<Token>(), Err(InvalidToken::Checksum));
        let fields = text[..TEXT_LEN - 10].to_owned() + "02";
        assert_eq!(
            sealed(&fields).parse::<Token>(),
            Err(InvalidToken::Form),
            "a durability that there isn't"
        );
    }
}
