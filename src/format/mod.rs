//! Bytes to values and back: format v1, as specified in `docs/format.md`.
//!
//! No files, no sockets, no clock. Every decoder here is fed bytes that a disk may have damaged or a peer
//! may have forged: it bounds-checks every field, never panics, and allocates nothing that it only claims.
//!
//! ```text
//! segment file   ┌ header page 4096 ┐┌ batch ┐┌ batch ┐┌ batch ┐ 0 0 0 …
//!                │ copy · copy · 0… ││       ││       ││       │
//! batch                              ┌ header 128 ┐┌ body: records ┐┌ padding to 64 ┐
//! record                                           ┌ fixed 56 ┐┌ names, tags, metadata ┐┌ payload ┐
//! ```

pub mod base;
pub mod batch;
mod entries;
pub mod files;
pub mod gaps;
pub mod incoming;
pub mod intake;
pub mod labels;
pub mod leases;
pub mod map;
pub mod record;
pub mod segment;
pub mod sidecar;

/// The version of the format that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u16 = 1;

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The bytes end before the value does.
    #[error("the bytes end too early")]
    Truncated,
    /// The magic number is another one: nothing of this kind lies here.
    #[error("the magic number is wrong")]
    Magic,
    /// The header's checksum doesn't match.
    #[error("the header's checksum does not match")]
    HeaderChecksum,
    /// The body's checksum doesn't match.
    #[error("the body's checksum does not match")]
    BodyChecksum,
    /// The checksum matches, but the writer was of a later format or used a feature that must be known.
    #[error(
        "written in format version {version} with required features {flags:#06x}, which this version can't read"
    )]
    Unsupported {
        /// Format version of the bytes.
        version: u16,
        /// The flags of the incompatible class.
        flags: u16,
    },
    /// A field has a value that no writer writes; which one.
    #[error("invalid {0}")]
    Invalid(&'static str),
}

/// A cursor over bytes that can't read past their end.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Reads from the front of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What has not been read yet.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `len` bytes, borrowed.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] if there are fewer; so do all the methods below.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(FormatError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(FormatError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A little-endian `u16`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    /// A little-endian `u32`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    /// A little-endian `u64`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A little-endian `i64`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn i64(&mut self) -> Result<i64, FormatError> {
        self.array().map(i64::from_le_bytes)
    }

    /// UTF-8 text with its length in front as a `u16`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], or [`FormatError::Invalid`] naming `what` if it isn't UTF-8.
    pub fn text16(&mut self, what: &'static str) -> Result<&'a str, FormatError> {
        let len = self.u16()?;
        self.text(usize::from(len), what)
    }

    /// UTF-8 text of `len` bytes.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], or [`FormatError::Invalid`] naming `what` if it isn't UTF-8.
    pub fn text(&mut self, len: usize, what: &'static str) -> Result<&'a str, FormatError> {
        std::str::from_utf8(self.bytes(len)?).map_err(|_| FormatError::Invalid(what))
    }
}

/// The three classes of feature flags, each a bit set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// A reader that doesn't know one of these must refuse.
    pub incompatible: u16,
    /// A reader that doesn't know one of these may read, but a writer must refuse to append behind it.
    pub read_only: u16,
    /// May be ignored.
    pub ignorable: u16,
}

impl Flags {
    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self, FormatError> {
        Ok(Self { incompatible: input.u16()?, read_only: input.u16()?, ignorable: input.u16()? })
    }

    pub(crate) fn encode_into(self, out: &mut [u8; 6]) {
        let [a, b] = self.incompatible.to_le_bytes();
        let [c, d] = self.read_only.to_le_bytes();
        let [e, f] = self.ignorable.to_le_bytes();
        *out = [a, b, c, d, e, f];
    }
}

/// CRC-32 (IEEE) over several pieces in a row.
#[must_use]
pub fn crc32(pieces: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    pieces.iter().for_each(|piece| hasher.update(piece));
    hasher.finalize()
}

/// What stands in front of the checksum of a text, if it has that as its last line: `crc32 5f3c9a01`.
#[cfg(any(feature = "views", feature = "shipping"))]
pub(crate) fn in_front_of_crc(text: &str) -> Option<&str> {
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once("crc32 ")?;
    (u32::from_str_radix(crc, 16) == Ok(crc32(&[body.as_bytes()]))).then_some(body)
}

/// Writes values at fixed places of a fixed-size block. All places are constants of this module, within the
/// block by construction and by the golden-byte tests.
pub(crate) struct Block<const N: usize>(pub(crate) [u8; N]);

impl<const N: usize> Block<N> {
    pub(crate) const fn new() -> Self {
        Self([0; N])
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
