//! How payloads and rows become bytes. Only payloads and rows: frames, headers and protocol are laid out by
//! hand, so that a reader in another language needs no Rust.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::event::PayloadCodec;

/// The most memory that decoding one value may claim, in bytes: a few forged bytes must not allocate
/// gigabytes.
pub const DECODE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Why a value can't be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The value can't be represented.
    #[error("the value can't be encoded: {0}")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The value would not be read back: decoding it would claim more than [`DECODE_BYTES_MAX`].
    #[error(
        "the value, of {bytes} bytes, is too large: it would take more than 64 MiB to read it back"
    )]
    TooLarge {
        /// How many bytes it has when encoded.
        bytes: usize,
    },
    /// The bytes don't match the type.
    #[error("the bytes don't match the type: {0}")]
    Decode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The value ends before the bytes do: they are of another type.
    #[error("{left} bytes are left over behind the value: they are of another type or version")]
    TrailingBytes {
        /// How many.
        left: usize,
    },
    /// The payload is stored in a codec that decodes no serde types.
    #[error("payloads stored as {codec:?} can't be decoded into a type")]
    NotSerde {
        /// The codec.
        codec: PayloadCodec,
    },
    /// The type is known, but not in this schema version.
    #[error("events of type {name:?} are not known in schema version {version}")]
    SchemaVersion {
        /// The type's name.
        name: &'static str,
        /// The stored version.
        version: u32,
    },
    /// An upcaster could make nothing of an event of an older form.
    #[error("the upcaster of {name:?}, version {version}, failed: {source}")]
    Upcast {
        /// The old type's name.
        name: String,
        /// The old version.
        version: u32,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An upcaster returned an event that the event type doesn't know.
    #[error("an upcaster returned {name:?}, version {version}, which its event type doesn't know")]
    UpcastToUnknown {
        /// The name that it gave.
        name: String,
        /// The version that it gave.
        version: u32,
    },
    /// The upcasters of an event go round in a circle.
    #[error("the upcasters of {name:?}, version {version}, come to no end")]
    UpcastWithoutEnd {
        /// The stored type's name.
        name: String,
        /// The stored version.
        version: u32,
    },
}

/// A codec for serde values.
pub trait Codec {
    /// Its number in the journal.
    const KIND: PayloadCodec;

    /// Encodes a value.
    ///
    /// # Errors
    /// [`CodecError::Encode`].
    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError>;

    /// Decodes a value from exactly these bytes.
    ///
    /// # Errors
    /// [`CodecError::Decode`], [`CodecError::TrailingBytes`].
    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError>;
}

/// bincode 2 in its standard configuration (little-endian, variable-length integers): compact, the default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bincode;

impl Codec for Bincode {
    const KIND: PayloadCodec = PayloadCodec::Bincode;

    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
        bincode::serde::encode_to_vec(value, bincode::config::standard())
            .map_err(|error| CodecError::Encode(Box::new(error)))
    }

    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        let config = bincode::config::standard().with_limit::<DECODE_BYTES_MAX>();
        let (value, used) = bincode::serde::decode_from_slice(bytes, config)
            .map_err(|error| CodecError::Decode(Box::new(error)))?;
        match bytes.len().saturating_sub(used) {
            0 => Ok(value),
            left => Err(CodecError::TrailingBytes { left }),
        }
    }
}

/// A value of fewer bytes can always be read back: a byte claims that of a `u128`, at the most.
#[cfg(feature = "views")]
const SURELY_DECODED_BYTES: usize = DECODE_BYTES_MAX / size_of::<u128>();

impl Bincode {
    /// Refuses what was encoded if it is too large to be decoded again.
    #[cfg(feature = "views")]
    pub(crate) fn check_size<T: DeserializeOwned>(bytes: &[u8]) -> Result<(), CodecError> {
        use bincode::error::DecodeError;
        if bytes.len() <= SURELY_DECODED_BYTES {
            return Ok(());
        }
        match Self::decode::<T>(bytes) {
            Err(CodecError::Decode(error))
                if matches!(error.downcast_ref(), Some(DecodeError::LimitExceeded)) =>
            {
                Err(CodecError::TooLarge { bytes: bytes.len() })
            }
            _ => Ok(()), // what else is wrong with it is told when it is read
        }
    }

    /// Encodes a value piece by piece.
    #[cfg(feature = "views")]
    pub(crate) fn encode_with<T: Serialize>(
        value: &T,
        put: impl FnMut(&[u8]),
    ) -> Result<(), CodecError> {
        bincode::serde::encode_into_writer(value, Sink(put), bincode::config::standard())
            .map_err(|error| CodecError::Encode(Box::new(error)))
    }
}

#[cfg(feature = "views")]
struct Sink<F>(F);

#[cfg(feature = "views")]
impl<F: FnMut(&[u8])> bincode::enc::write::Writer for Sink<F> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        (self.0)(bytes);
        Ok(())
    }
}

/// JSON text: larger, readable by anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

impl Codec for Json {
    const KIND: PayloadCodec = PayloadCodec::Json;

    fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
        serde_json::to_vec(value).map_err(|error| CodecError::Encode(Box::new(error)))
    }

    fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
        serde_json::from_slice(bytes).map_err(|error| CodecError::Decode(Box::new(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Shape {
        Dot,
        Line { from: u64, to: i32 },
        Label(String, Vec<u8>, Option<u16>),
    }

    /// The bytes are part of what is stored: they must never change.
    #[test]
    fn bincode_produces_the_golden_bytes() {
        let golden: [(Shape, &[u8]); 3] = [
            (Shape::Dot, &[0]),
            (Shape::Line { from: 250, to: -1 }, &[1, 250, 1]),
            (
                Shape::Label("é".into(), vec![1, 255], Some(300)),
                &[2, 2, 0xc3, 0xa9, 2, 1, 255, 1, 251, 0x2c, 1],
            ),
        ];
        for (value, bytes) in golden {
            assert_eq!(Bincode::encode(&value).unwrap(), bytes);
            assert_eq!(Bincode::decode::<Shape>(bytes).unwrap(), value);
        }
    }

    #[test]
    fn trailing_bytes_are_refused() {
        assert!(matches!(
            Bincode::decode::<u8>(&[1, 2, 3]),
            Err(CodecError::TrailingBytes { left: 2 })
        ));
        assert!(Json::decode::<u8>(b"1 2").is_err());
    }

    /// Nine bytes claim a vector of 2^32 integers; without a limit that is 32 GiB.
    #[test]
    fn a_forged_length_is_refused_before_it_is_allocated() {
        let forged = [253, 0, 0, 0, 0, 1, 0, 0, 0];
        assert!(matches!(Bincode::decode::<Vec<u64>>(&forged), Err(CodecError::Decode(_))));
    }
}
