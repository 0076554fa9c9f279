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
//! - What [`ViewKey::key_to_json`] makes of a key, [`ViewKey::key_from_json`] makes the same key of.
//!
//! The encoding is stored: it must never change.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::moment::Moment;
use crate::event::{EventId, EventType, Revision, StreamId};
use crate::hex::{from_hex, hex};
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
///
///     // How people and tools write it; without these two it is bytes in hexadecimal to them.
///     fn key_to_json(&self) -> serde_json::Value {
///         self.0.key_to_json()
///     }
///
///     fn key_from_json(value: &serde_json::Value) -> Result<Self, KeyError> {
///         u32::key_from_json(value).map(Self)
///     }
/// }
///
/// assert_eq!(Customer::key_from_json(&serde_json::json!("17")), Ok(Customer(17)));
/// ```
///
/// As JSON, a key is written like this:
///
/// | key | JSON | also taken |
/// |---|---|---|
/// | integers, [`Position`], [`Revision`] | a number; a string if it is beyond 64 bits | a string with the number |
/// | `bool` | `true`, `false` | the same as a string |
/// | `String`, [`StreamId`], [`EventType`], ids | a string | |
/// | [`SystemTime`] | a string such as `2026-01-31T08:00:00.500Z` | a date such as `2026-01-31` |
/// | [`Duration`] | seconds: a number, or a string such as `0.25` | a string with the number |
/// | `Vec<u8>`, byte arrays | a string of `0x` and the bytes in hexadecimal | any other string stands for its own bytes |
/// | `None`, `()` | `null` | |
/// | `Some(key)` | the key; in a list by itself if that is `null`, or `null` in lists | |
/// | tuples | a list of the fields | |
pub trait ViewKey: Sized {
    /// Appends the key's bytes. An event that concerns a row whose key panics here can't be applied.
    fn encode_key(&self, out: &mut Vec<u8>);

    /// Reads a key from the front of `input` and moves `input` behind it.
    ///
    /// # Errors
    /// [`KeyError`] if no key of this type begins there.
    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError>;

    /// The key as people and tools write it, in JSON. Nothing is stored like this. Default: its bytes in hexadecimal.
    #[must_use]
    fn key_to_json(&self) -> Value {
        bytes_to_json(&bytes_of(self))
    }

    /// Reads a key as [`key_to_json`](Self::key_to_json) writes it. Whatever a person may type on a command line comes
    /// as a string: so what isn't a string should be taken as the text of one, too.
    ///
    /// # Errors
    /// [`KeyError`] if it isn't such a key.
    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        decode_all(&bytes_from_json(value)?)
    }

    /// Appends the bytes with which the keys begin that begin with this: some leading fields of a tuple, in a list, or
    /// the beginning of a text. Default: the bytes of this key.
    ///
    /// # Errors
    /// [`KeyError`] if no key begins like this.
    fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
        Self::key_from_json(value)?.encode_key(out);
        Ok(())
    }
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
    /// It is written with another number of fields than it has.
    #[error("it has {wanted} fields")]
    Fields {
        /// How many it has.
        wanted: usize,
    },
}

/// Reads a key from exactly these bytes.
pub(super) fn decode_all<K: ViewKey>(mut bytes: &[u8]) -> Result<K, KeyError> {
    let key = K::decode_key(&mut bytes)?;
    match bytes.len() {
        0 => Ok(key),
        left => Err(KeyError::TrailingBytes { left }),
    }
}

fn bytes_of<K: ViewKey>(key: &K) -> Vec<u8> {
    let mut bytes = Vec::new();
    key.encode_key(&mut bytes);
    bytes
}

fn text(value: &Value) -> Result<&str, KeyError> {
    value.as_str().ok_or(KeyError::Invalid("text"))
}

fn bytes_to_json(bytes: &[u8]) -> Value {
    format!("0x{}", hex(bytes)).into()
}

fn bytes_from_json(value: &Value) -> Result<Vec<u8>, KeyError> {
    let text = text(value)?;
    match text.strip_prefix("0x") {
        Some(digits) => from_hex(digits).ok_or(KeyError::Invalid("hexadecimal")),
        None => Ok(text.as_bytes().to_vec()),
    }
}

/// How a type of keys is written by people, without the type.
#[cfg(feature = "cli")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeySpelling {
    /// The type's name, with its modules.
    type_name: fn() -> &'static str,
    /// Of the key at the front of the input, which is moved behind it.
    pub(crate) to_json: fn(&mut &[u8]) -> Result<Value, KeyError>,
    /// The bytes of a key.
    pub(crate) from_json: fn(&Value) -> Result<Vec<u8>, KeyError>,
    /// The bytes with which keys begin that begin like this.
    pub(crate) start_from_json: fn(&Value) -> Result<Vec<u8>, KeyError>,
}

#[cfg(feature = "cli")]
impl KeySpelling {
    pub(crate) fn of<K: ViewKey>() -> Self {
        Self {
            type_name: std::any::type_name::<K>,
            to_json: |input| Ok(K::decode_key(input)?.key_to_json()),
            from_json: |value| Ok(bytes_of(&K::key_from_json(value)?)),
            start_from_json: |value| {
                let mut start = Vec::new();
                K::key_start_from_json(value, &mut start)?;
                Ok(start)
            },
        }
    }

    /// The type's name as its author writes it.
    pub(crate) fn type_name(&self) -> String {
        let is_of_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | ':');
        let mut name = String::new();
        for c in (self.type_name)().chars() {
            name.push(c);
            if name.ends_with("::") {
                name.truncate(name.trim_end_matches(is_of_name).len());
            }
        }
        name
    }

    /// Whether keys are written as lists of their fields.
    pub(crate) fn takes_lists(&self) -> bool {
        (self.start_from_json)(&Value::Array(Vec::new())).is_ok()
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

            fn key_to_json(&self) -> Value {
                u64::try_from(*self).map_or_else(|_| self.to_string().into(), Value::from)
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                let wrong = KeyError::Invalid(stringify!($type));
                let number = value.as_u64().and_then(|number| Self::try_from(number).ok());
                let text = || value.as_str()?.parse().ok();
                number.or_else(text).ok_or(wrong)
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

            fn key_to_json(&self) -> Value {
                i64::try_from(*self).map_or_else(|_| self.to_string().into(), Value::from)
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                let wrong = KeyError::Invalid(stringify!($type));
                let number = value.as_i64().and_then(|number| Self::try_from(number).ok());
                let text = || value.as_str()?.parse().ok();
                number.or_else(text).ok_or(wrong)
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

    fn key_to_json(&self) -> Value {
        Value::Null
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        value.as_null().ok_or(KeyError::Invalid("key: there is one row, without a key"))
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

    fn key_to_json(&self) -> Value {
        (*self).into()
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        let text = || value.as_str()?.parse().ok();
        value.as_bool().or_else(text).ok_or(KeyError::Invalid("boolean"))
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

    fn key_to_json(&self) -> Value {
        match self.as_ref().map(T::key_to_json) {
            None => Value::Null,
            Some(value) if is_null_in_lists(&value) => Value::Array(vec![value]),
            Some(value) => value,
        }
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        some_in(value).map(T::key_from_json).transpose()
    }

    fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
        let Some(value) = some_in(value) else {
            None::<T>.encode_key(out);
            return Ok(());
        };
        out.push(1);
        T::key_start_from_json(value, out)
    }
}

/// Whether a value has to be put in a list, not to be taken for `None`.
fn is_null_in_lists(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => matches!(&values[..], [value] if is_null_in_lists(value)),
        _ => false,
    }
}

/// The value of an option.
fn some_in(value: &Value) -> Option<&Value> {
    match value {
        Value::Null => None,
        Value::Array(values) => match &values[..] {
            [inner] if is_null_in_lists(inner) => Some(inner),
            _ => Some(value),
        },
        value => Some(value),
    }
}

impl<const N: usize> ViewKey for [u8; N] {
    fn encode_key(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        take(input)
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        let wrong = KeyError::Invalid("number of bytes");
        bytes_from_json(value)?.try_into().map_err(|_| wrong)
    }

    fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
        let bytes = bytes_from_json(value)?;
        if bytes.len() > N {
            return Err(KeyError::Invalid("number of bytes"));
        }
        out.extend(bytes);
        Ok(())
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

    fn key_to_json(&self) -> Value {
        match (self.as_secs(), self.subsec_nanos()) {
            (seconds, 0) => seconds.into(),
            (seconds, nanos) => format!("{seconds}.{nanos:09}").trim_end_matches('0').into(),
        }
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        let wrong = KeyError::Invalid("duration");
        if let Some(seconds) = value.as_u64() {
            return Ok(Self::from_secs(seconds));
        }
        let text = value.as_str().ok_or(wrong)?;
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
        if !is_number(seconds) || !is_number(fraction) || fraction.len() > 9 {
            return Err(wrong);
        }
        let nanos = format!("{fraction:0<9}").parse().map_err(|_| wrong)?;
        Ok(Self::new(seconds.parse().map_err(|_| wrong)?, nanos))
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

    fn key_to_json(&self) -> Value {
        let stored = bytes_of(self);
        let mut input = &stored[..];
        match (i64::decode_key(&mut input), u32::decode_key(&mut input)) {
            (Ok(seconds), Ok(nanos)) => Moment { seconds, nanos }.to_string().into(),
            _ => bytes_to_json(&stored),
        }
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        let moment = Moment::parse(text(value)?).ok_or(KeyError::Invalid("time"))?;
        decode_all(&bytes_of(&(moment.seconds, moment.nanos)))
    }
}

fn encode_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    encode_start(bytes, out);
    out.extend_from_slice(&[ESCAPED, ESCAPED_END]);
}

/// Without the end: with this begin all that begin with these bytes.
fn encode_start(bytes: &[u8], out: &mut Vec<u8>) {
    for (index, piece) in bytes.split(|&byte| byte == ESCAPED).enumerate() {
        if index > 0 {
            out.extend_from_slice(&[ESCAPED, ESCAPED_ZERO]);
        }
        out.extend_from_slice(piece);
    }
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

    fn key_to_json(&self) -> Value {
        bytes_to_json(self)
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        bytes_from_json(value)
    }

    fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
        encode_start(&bytes_from_json(value)?, out);
        Ok(())
    }
}

impl ViewKey for String {
    fn encode_key(&self, out: &mut Vec<u8>) {
        encode_bytes(self.as_bytes(), out);
    }

    fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
        Self::from_utf8(decode_bytes(input)?).map_err(|_| KeyError::Invalid("UTF-8 in a string"))
    }

    fn key_to_json(&self) -> Value {
        self.as_str().into()
    }

    fn key_from_json(value: &Value) -> Result<Self, KeyError> {
        text(value).map(str::to_owned)
    }

    fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
        encode_start(text(value)?.as_bytes(), out);
        Ok(())
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

            fn key_to_json(&self) -> Value {
                self.as_str().into()
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                Self::new(text(value)?).map_err(|_| KeyError::Invalid($what))
            }

            fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
                String::key_start_from_json(value, out)
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

            fn key_to_json(&self) -> Value {
                self.to_string().into()
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                text(value)?.parse().map_err(|_| KeyError::Invalid("id"))
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

            fn key_to_json(&self) -> Value {
                self.get().into()
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                u64::key_from_json(value).map(Self::new)
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

            fn key_to_json(&self) -> Value {
                Value::Array(vec![$(self.$field.key_to_json()),+])
            }

            fn key_from_json(value: &Value) -> Result<Self, KeyError> {
                let wrong = KeyError::Fields { wanted: [$($field),+].len() };
                let fields = value.as_array().filter(|it| it.len() == [$($field),+].len()).ok_or(wrong)?;
                Ok(($($name::key_from_json(fields.get($field).ok_or(wrong)?)?,)+))
            }

            fn key_start_from_json(value: &Value, out: &mut Vec<u8>) -> Result<(), KeyError> {
                let Some(fields) = value.as_array() else { return A::key_start_from_json(value, out) };
                if fields.len() > [$($field),+].len() {
                    return Err(KeyError::Fields { wanted: [$($field),+].len() });
                }
                $(
                    let Some(field) = fields.get($field) else { return Ok(()) };
                    $name::key_from_json(field)?.encode_key(out);
                )+
                Ok(())
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
        check_json(a);
        for cut in 0..a_bytes.len() {
            assert!(decode_all::<K>(&a_bytes[..cut]).is_err(), "{a:?} cut at {cut}");
        }
    }

    /// What is printed can be given back, also as what a person would type, and by its beginning.
    fn check_json<K: ViewKey + PartialEq + Debug>(key: &K) {
        let json = key.key_to_json();
        let printed: Value = serde_json::from_str(&json.to_string()).unwrap();
        assert_eq!(&K::key_from_json(&printed).unwrap(), key, "{json}");
        if json.is_number() || json.is_boolean() {
            assert_eq!(&K::key_from_json(&json.to_string().into()).unwrap(), key, "{json}");
        }
        #[cfg(feature = "cli")]
        check_spelling(&json, key);
    }

    #[cfg(feature = "cli")]
    #[test]
    fn types_of_keys_are_named_as_their_authors_write_them() {
        assert_eq!(KeySpelling::of::<u64>().type_name(), "u64");
        let nested = KeySpelling::of::<(String, Option<StreamId>, Vec<u8>)>();
        assert_eq!(nested.type_name(), "(String, Option<StreamId>, Vec<u8>)");
        assert!(nested.takes_lists() && !KeySpelling::of::<String>().takes_lists());
    }

    #[cfg(feature = "cli")]
    fn check_spelling<K: ViewKey>(json: &Value, key: &K) {
        let spelling = KeySpelling::of::<K>();
        let (mut input, key) = (&bytes_of(key)[..], bytes_of(key));
        assert_eq!(&(spelling.to_json)(&mut input).unwrap(), json);
        assert!(input.is_empty());
        assert_eq!((spelling.from_json)(json).unwrap(), key);
        assert!(key.starts_with(&(spelling.start_from_json)(json).unwrap()), "{json}");
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
        fn leading_fields_and_beginnings_of_texts_are_found_as_json(
            a in (text(), any::<u8>()), b in (text(), any::<u8>()),
        ) {
            let start = |value: Value| {
                let mut start = Vec::new();
                <(String, u8)>::key_start_from_json(&value, &mut start).unwrap();
                start
            };
            let fields = start(serde_json::json!([a.0]));
            prop_assert_eq!(bytes(&b).starts_with(&fields), a.0 == b.0);
            let beginning = start(serde_json::json!(a.0));
            prop_assert_eq!(bytes(&b).starts_with(&beginning), b.0.starts_with(&a.0));
            prop_assert!(start(serde_json::json!([])).is_empty());
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

    #[test]
    fn keys_are_written_in_json_as_documented() {
        let check = |key: Value, json: Value| assert_eq!(key, json);
        check(7_u8.key_to_json(), 7.into());
        check(u128::MAX.key_to_json(), "340282366920938463463374607431768211455".into());
        check(i64::MIN.key_to_json(), i64::MIN.into());
        check(("de".to_owned(), Some(7_u8)).key_to_json(), serde_json::json!(["de", 7]));
        check(vec![0_u8, 255].key_to_json(), "0x00ff".into());
        check(Some(None::<u8>).key_to_json(), serde_json::json!([null]));
        check(().key_to_json(), Value::Null);
        check_json(&Some(None::<u8>));
        for nested in [None, Some(None), Some(Some(None)), Some(Some(Some(7_u8)))] {
            check_json(&nested);
        }
        check_json(&Some((None::<u8>,)));
        check_json(&(None::<u8>, Some(())));
        check_json(&u128::MAX);
        assert_eq!(Vec::<u8>::key_from_json(&"text".into()).unwrap(), b"text");
        let wrong =
            |error: Option<KeyError>, text: &str| assert_eq!(error.unwrap().to_string(), text);
        wrong(u8::key_from_json(&256.into()).err(), "invalid u8");
        wrong(u8::key_from_json(&"x".into()).err(), "invalid u8");
        wrong(i8::key_from_json(&1.5.into()).err(), "invalid i8");
        wrong(String::key_from_json(&7.into()).err(), "invalid text");
        wrong(<(u8, u8)>::key_from_json(&serde_json::json!([1])).err(), "it has 2 fields");
        wrong(<(u8, u8)>::key_from_json(&"1".into()).err(), "it has 2 fields");
        wrong(Vec::<u8>::key_from_json(&"0x0".into()).err(), "invalid hexadecimal");
        wrong(<[u8; 2]>::key_from_json(&"0x01".into()).err(), "invalid number of bytes");
        wrong(EventId::key_from_json(&"x".into()).err(), "invalid id");
        wrong(
            <()>::key_from_json(&"x".into()).err(),
            "invalid key: there is one row, without a key",
        );
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
