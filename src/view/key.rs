//! Keys of rows as bytes whose order is the order of the values, so that a range of keys means what it says.
//!
//! ```text
//! value                      bytes
//! ("de", Some(7_u8))         64 65 00 01 │ 01 07
//!                            d  e  end     some 7
//! integers                   big-endian; signed ones with the sign bit flipped
//! strings, byte strings      each 00 as 00 FF, then 00 01: a prefix sorts in front of what it begins
//! None, Some(value)          00; 01 and the value
//! times                      seconds since 1970 as an i64, nanoseconds as a u32; durations with a u64
//! tuples                     one field behind the other
//! ```
//!
//! Invariants:
//! - `a < b` exactly if `bytes(a) < bytes(b)`, within tuples too.
//! - No key's bytes begin with another key's of the same type, so fields need no separators, and the bytes
//!   of the leading fields of a tuple are a prefix of exactly the tuples that begin with them.
//! - Decoding bytes that nobody encoded is an error, never a panic.
//!
//! The encoding is stored: it must never change.

use std::time::{Duration, SystemTime};

use crate::event::{EventId, EventType, Revision, StreamId};
use crate::position::{JournalId, NodeId, Position};

/// Nanoseconds of a second.
const NANOS: u32 = 1_000_000_000;
const ESCAPED: u8 = 0x00;
const ESCAPED_ZERO: u8 = 0xff;
const ESCAPED_END: u8 = 0x01;

/// A value that names a row.
///
/// Implemented for integers, `bool`, `()` (a view with a single row), `String`, `Vec<u8>`, byte arrays, [`SystemTime`],
/// [`Duration`], the ids and names of this crate, [`Option`] of a key, and tuples of up to four keys. A key of your own is best
/// made from one of these:
///
/// ```
/// use headwater::view::{KeyError, ViewKey};
///
/// #[derive(Clone, Debug, PartialEq)]
/// struct Customer(u32);
///
/// impl ViewKey for Customer {
///     fn encode_key(&self, out: &mut Vec<u8>) {
///         self.0.encode_key(out);
///     }
///
///     fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
///         u32::decode_key(input).map(Self)
///     }
/// }
/// ```
pub trait ViewKey: Sized {
    /// Appends the key's bytes.
    fn encode_key(&self, out: &mut Vec<u8>);

    /// Reads a key from the front of `input` and moves `input` behind it.
    ///
    /// # Errors
    /// [`KeyError`] if no key of this type begins there.
    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError>;
}

/// What can stand for a key of type `K` in a lookup: the key itself, or its borrowed form, such as `str`
/// for `String`.
pub trait EncodeKey<K: ViewKey> {
    /// Appends the key's bytes: the same as those of the key for which it stands.
    fn encode_key_into(&self, out: &mut Vec<u8>);
}

/// The leading fields of a tuple key `K`: what [`prefix`](super::ViewHandle::prefix) takes.
pub trait KeyPrefix<K: ViewKey> {
    /// Appends the bytes with which every key begins that begins with these fields.
    fn encode_prefix(&self, out: &mut Vec<u8>);
}

/// Stored bytes that aren't a key of the expected type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The bytes end before the key does.
    #[error("the bytes end within the key")]
    Truncated,
    /// The key ends before the bytes do.
    #[error("{left} bytes are left over behind the key")]
    TrailingBytes {
        /// How many.
        left: usize,
    },
    /// A field has bytes that no value has; which one.
    #[error("invalid {0}")]
    Invalid(&'static str),
}

/// Reads a key from exactly these bytes.
pub(super) fn decode_all<K: ViewKey>(mut bytes: &[u8]) -> Result<K, KeyError> {
    let key = K::decode_key(&mut bytes)?;
    match bytes.len() {
        0 => Ok(key),
        left => Err(KeyError::TrailingBytes { left }),
    }
}

impl<K: ViewKey> EncodeKey<K> for K {
    fn encode_key_into(&self, out: &mut Vec<u8>) {
        self.encode_key(out);
    }
}

fn take<const N: usize>(input: &mut &[u8]) -> Result<[u8; N], KeyError> {
    let (taken, rest) = input.split_first_chunk::<N>().ok_or(KeyError::Truncated)?;
    *input = rest;
    Ok(*taken)
}

macro_rules! unsigned_keys {
    ($($type:ty),+) => {$(
        #[allow(clippy::big_endian_bytes, reason = "big-endian bytes sort like the numbers")]
        impl ViewKey for $type {
            fn encode_key(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                take(input).map(Self::from_be_bytes)
            }
        }
    )+};
}
unsigned_keys!(u8, u16, u32, u64, u128);

/// Flipping the sign bit puts the negative numbers in front.
macro_rules! signed_keys {
    ($($type:ty as $unsigned:ty),+) => {$(
        impl ViewKey for $type {
            fn encode_key(&self, out: &mut Vec<u8>) {
                (self.cast_unsigned() ^ Self::MIN.cast_unsigned()).encode_key(out);
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                <$unsigned>::decode_key(input)
                    .map(|bits| (bits ^ Self::MIN.cast_unsigned()).cast_signed())
            }
        }
    )+};
}
signed_keys!(i8 as u8, i16 as u16, i32 as u32, i64 as u64, i128 as u128);

impl ViewKey for () {
    fn encode_key(&self, _: &mut Vec<u8>) {}

    fn decode_key(_: &mut &[u8]) -> Result<Self, KeyError> {
        Ok(())
    }
}

impl ViewKey for bool {
    fn encode_key(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        match u8::decode_key(input)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(KeyError::Invalid("boolean")),
        }
    }
}

impl<T: ViewKey> ViewKey for Option<T> {
    fn encode_key(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(value) = self {
            value.encode_key(out);
        }
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        match u8::decode_key(input)? {
            0 => Ok(None),
            1 => T::decode_key(input).map(Some),
            _ => Err(KeyError::Invalid("option")),
        }
    }
}

impl<const N: usize> ViewKey for [u8; N] {
    fn encode_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        take(input)
    }
}

/// Seconds, and the nanoseconds behind them.
impl ViewKey for Duration {
    fn encode_key(&self, out: &mut Vec<u8>) {
        self.as_secs().encode_key(out);
        self.subsec_nanos().encode_key(out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        let seconds = u64::decode_key(input)?;
        match u32::decode_key(input)? {
            nanos @ 0..NANOS => Ok(Self::new(seconds, nanos)),
            _ => Err(KeyError::Invalid("duration")),
        }
    }
}

/// Seconds since 1970, negative in front of it, and the nanoseconds behind them.
impl ViewKey for SystemTime {
    fn encode_key(&self, out: &mut Vec<u8>) {
        let (seconds, nanos) = match self.duration_since(Self::UNIX_EPOCH) {
            Ok(since) => (i128::from(since.as_secs()), since.subsec_nanos()),
            Err(before) => match before.duration() {
                whole if whole.subsec_nanos() == 0 => (-i128::from(whole.as_secs()), 0),
                part => (-i128::from(part.as_secs()) - 1, NANOS - part.subsec_nanos()),
            },
        };
        // No system counts further: it is a bound for those that would.
        let bounded = seconds.clamp(i64::MIN.into(), i64::MAX.into());
        i64::try_from(bounded).unwrap_or_default().encode_key(out);
        nanos.encode_key(out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        let (seconds, nanos) = (i64::decode_key(input)?, u32::decode_key(input)?);
        let whole = Duration::from_secs(seconds.unsigned_abs());
        let second = match seconds {
            0.. => Self::UNIX_EPOCH.checked_add(whole),
            _ => Self::UNIX_EPOCH.checked_sub(whole),
        };
        let nanos = Some(nanos).filter(|nanos| *nanos < NANOS);
        let time = second
            .zip(nanos)
            .and_then(|(second, nanos)| second.checked_add(Duration::from_nanos(nanos.into())));
        time.ok_or(KeyError::Invalid("time"))
    }
}

fn encode_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    for (index, piece) in bytes.split(|&byte| byte == ESCAPED).enumerate() {
        if index > 0 {
            out.extend_from_slice(&[ESCAPED, ESCAPED_ZERO]);
        }
        out.extend_from_slice(piece);
    }
    out.extend_from_slice(&[ESCAPED, ESCAPED_END]);
}

fn decode_bytes(input: &mut &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut out = Vec::new();
    loop {
        let len = input.iter().position(|&byte| byte == ESCAPED).ok_or(KeyError::Truncated)?;
        let (piece, rest) = input.split_at_checked(len).ok_or(KeyError::Truncated)?;
        out.extend_from_slice(piece);
        *input = rest;
        match take(input)? {
            [_, ESCAPED_ZERO] => out.push(ESCAPED),
            [_, ESCAPED_END] => return Ok(out),
            _ => return Err(KeyError::Invalid("escape in a string")),
        }
    }
}

impl ViewKey for Vec<u8> {
    fn encode_key(&self, out: &mut Vec<u8>) {
        encode_bytes(self, out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        decode_bytes(input)
    }
}

impl ViewKey for String {
    fn encode_key(&self, out: &mut Vec<u8>) {
        encode_bytes(self.as_bytes(), out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        Self::from_utf8(decode_bytes(input)?).map_err(|_| KeyError::Invalid("UTF-8 in a string"))
    }
}

impl EncodeKey<Vec<u8>> for [u8] {
    fn encode_key_into(&self, out: &mut Vec<u8>) {
        encode_bytes(self, out);
    }
}

macro_rules! name_keys {
    ($($type:ty = $what:literal),+) => {$(
        impl ViewKey for $type {
            fn encode_key(&self, out: &mut Vec<u8>) {
                encode_bytes(self.as_str().as_bytes(), out);
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                Self::new(String::decode_key(input)?).map_err(|_| KeyError::Invalid($what))
            }
        }
    )+};
}
name_keys!(StreamId = "stream name", EventType = "event type");

macro_rules! str_stands_for {
    ($($type:ty),+) => {$(
        impl EncodeKey<$type> for str {
            fn encode_key_into(&self, out: &mut Vec<u8>) {
                encode_bytes(self.as_bytes(), out);
            }
        }
    )+};
}
str_stands_for!(String, StreamId, EventType);

macro_rules! id_keys {
    ($($type:ty),+) => {$(
        impl ViewKey for $type {
            fn encode_key(&self, out: &mut Vec<u8>) {
                self.as_bytes().encode_key(out);
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                take(input).map(Self::from_bytes)
            }
        }
    )+};
}
id_keys!(EventId, JournalId, NodeId);

macro_rules! count_keys {
    ($($type:ty),+) => {$(
        impl ViewKey for $type {
            fn encode_key(&self, out: &mut Vec<u8>) {
                self.get().encode_key(out);
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                u64::decode_key(input).map(Self::new)
            }
        }
    )+};
}
count_keys!(Position, Revision);

macro_rules! tuple_keys {
    ($($name:ident $field:tt),+) => {
        impl<$($name: ViewKey),+> ViewKey for ($($name,)+) {
            fn encode_key(&self, out: &mut Vec<u8>) {
                $(self.$field.encode_key(out);)+
            }

            fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
                Ok(($($name::decode_key(input)?,)+))
            }
        }
    };
}
tuple_keys!(A 0);
tuple_keys!(A 0, B 1);
tuple_keys!(A 0, B 1, C 2);
tuple_keys!(A 0, B 1, C 2, D 3);

macro_rules! leading_fields {
    (<$($param:ident),+> $prefix:ty => $key:ty) => {
        impl<$($param: ViewKey),+> KeyPrefix<$key> for $prefix {
            fn encode_prefix(&self, out: &mut Vec<u8>) {
                self.encode_key(out);
            }
        }
    };
}
leading_fields!(<A, B> A => (A, B));
leading_fields!(<A, B, C> A => (A, B, C));
leading_fields!(<A, B, C> (A, B) => (A, B, C));
leading_fields!(<A, B, C, D> A => (A, B, C, D));
leading_fields!(<A, B, C, D> (A, B) => (A, B, C, D));
leading_fields!(<A, B, C, D> (A, B, C) => (A, B, C, D));

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Debug;

    fn bytes<K: ViewKey>(key: &K) -> Vec<u8> {
        let mut out = Vec::new();
        key.encode_key(&mut out);
        out
    }

    fn check_pair<K: ViewKey + Ord + Debug>(a: &K, b: &K) {
        let (a_bytes, b_bytes) = (bytes(a), bytes(b));
        assert_eq!(a.cmp(b), a_bytes.cmp(&b_bytes), "{a:?} {b:?}");
        assert!(a == b || !a_bytes.starts_with(&b_bytes), "{a:?} begins with {b:?}");
        assert_eq!(&decode_all::<K>(&a_bytes).unwrap(), a);
        for cut in 0..a_bytes.len() {
            assert!(decode_all::<K>(&a_bytes[..cut]).is_err(), "{a:?} cut at {cut}");
        }
    }

    /// Short strings over few letters, so that prefixes, zeros and ties are frequent.
    fn text() -> impl Strategy<Value = String> {
        "[\0\u{1}ab\u{ff}]{0,4}"
    }

    fn binary() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(prop::sample::select(vec![0, 1, 2, 0x61, 0xfe, 0xff]), 0..5)
    }

    proptest! {
        #[test]
        fn order_of_times_is_byte_order(
            a: (i32, u32), b: (i32, u32), near: (i8, u8), far: (u64, u32), other: (u64, u32),
        ) {
            let time = |(seconds, nanos): (i32, u32)| {
                let whole = Duration::from_secs(seconds.unsigned_abs().into());
                let second = if seconds < 0 { SystemTime::UNIX_EPOCH - whole } else { SystemTime::UNIX_EPOCH + whole };
                second + Duration::from_nanos((nanos % NANOS).into())
            };
            let near = time((near.0.into(), u32::from(near.1) * 3_000_000));
            check_pair(&time(a), &time(b));
            check_pair(&time(a), &near);
            check_pair(&SystemTime::UNIX_EPOCH, &near);
            let duration = |(seconds, nanos): (u64, u32)| Duration::new(seconds, nanos % NANOS);
            check_pair(&duration(far), &duration(other));
        }

        #[test]
        fn unsigned_order_is_byte_order(a: (u8, u16, u32, u64), b: (u8, u16, u32, u64), c: u128, d: u128) {
            check_pair(&a.0, &b.0);
            check_pair(&a.1, &b.1);
            check_pair(&a.2, &b.2);
            check_pair(&a.3, &b.3);
            check_pair(&c, &d);
        }

        #[test]
        fn signed_order_is_byte_order(a: (i8, i16, i32, i64), b: (i8, i16, i32, i64), c: i128, d: i128) {
            check_pair(&a.0, &b.0);
            check_pair(&a.1, &b.1);
            check_pair(&a.2, &b.2);
            check_pair(&a.3, &b.3);
            check_pair(&c, &d);
        }

        #[test]
        fn string_order_is_byte_order(a in text(), b in text(), c in binary(), d in binary()) {
            check_pair(&a, &b);
            check_pair(&c, &d);
        }

        #[test]
        fn order_holds_within_tuples(
            a in (text(), any::<bool>(), prop::option::of(binary()), any::<i16>()),
            b in (text(), any::<bool>(), prop::option::of(binary()), any::<i16>()),
        ) {
            check_pair(&a, &b);
            check_pair(&(a.2.clone(), a.0.clone()), &(b.2.clone(), b.0.clone()));
            check_pair(&(a.0.clone(), a.2.clone(), a.3), &(b.0.clone(), b.2.clone(), b.3));
            check_pair(&(Some((a.0.clone(), a.3)), a.1), &(Some((b.0.clone(), b.3)), b.1));
        }

        #[test]
        fn leading_fields_are_a_prefix_of_exactly_their_tuples(a in (text(), text()), b in (text(), text())) {
            let mut prefix = Vec::new();
            KeyPrefix::<(String, String)>::encode_prefix(&a.0, &mut prefix);
            prop_assert_eq!(bytes(&b).starts_with(&prefix), a.0 == b.0);
        }

        /// Whatever decodes, encodes to the same bytes: no two byte strings are one key.
        #[test]
        fn decoding_any_bytes_never_panics_and_is_exact(input in binary()) {
            fn check<K: ViewKey>(input: &[u8]) {
                if let Ok(key) = decode_all::<K>(input) {
                    assert_eq!(bytes(&key), input);
                }
            }
            check::<(String, Option<bool>)>(&input);
            check::<Vec<u8>>(&input);
            check::<StreamId>(&input);
            check::<Option<i16>>(&input);
            check::<[u8; 3]>(&input);
            check::<SystemTime>(&input);
            check::<Duration>(&input);
            check::<()>(&input);
        }
    }

    #[test]
    fn ids_and_names_keep_their_order() {
        let id = |byte| EventId::from_bytes([byte; 16]);
        check_pair(&id(1), &id(0x80));
        let stream = |name: &str| StreamId::new(name).unwrap();
        check_pair(&stream("order-1"), &stream("order-10"));
        check_pair(&Position::new(255), &Position::new(256));
        let mut borrowed = Vec::new();
        EncodeKey::<StreamId>::encode_key_into("order-1", &mut borrowed);
        assert_eq!(borrowed, bytes(&stream("order-1")));
    }

    /// The bytes are stored: they must never change.
    #[test]
    fn keys_have_the_golden_bytes() {
        assert_eq!(bytes(&("de".to_owned(), Some(7_u8))), [0x64, 0x65, 0, 1, 1, 7]);
        assert_eq!(bytes(&vec![0_u8, 1, 0]), [0, 0xff, 1, 0, 0xff, 0, 1]);
        assert_eq!(bytes(&(-1_i16, i16::MAX)), [0x7f, 0xff, 0xff, 0xff]);
        assert_eq!(bytes(&(None::<u8>, true, 258_u32)), [0, 1, 0, 0, 1, 2]);
        assert!(bytes(&()).is_empty());
        let half_before_1970 = SystemTime::UNIX_EPOCH - Duration::from_millis(500);
        let bytes_of = [0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1d, 0xcd, 0x65, 0x00];
        assert_eq!(bytes(&half_before_1970), bytes_of);
        assert_eq!(bytes(&Duration::new(1, 2)), [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]);
    }
}
