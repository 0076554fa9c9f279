//! The two small files beside the segments: `node` says whose directory this is, `mark` how far it is
//! known to be durable.

use super::{Block, Decoder, FormatError, crc32};
use crate::position::{Chain, Checkpoint, Incarnation, JournalId, NodeId, Position};

/// Length of the `node` file.
pub const NODE_BYTES: usize = 64;
/// Length of a mark slot's contents.
pub const MARK_SLOT_BYTES: usize = 128;
/// The two slots of the `mark` file begin at multiples of this, so that no torn write damages both.
pub const MARK_SLOT_STRIDE: u64 = 4096;
/// Length of the `mark` file.
pub const MARK_FILE_BYTES: usize = 2 * MARK_SLOT_STRIDE as usize;

const NODE_MAGIC: [u8; 8] = *b"\x89HWNOD\r\n";
pub(crate) const MARK_MAGIC: [u8; 8] = *b"\x89HWMRK\r\n";
const VERSION: u16 = 1;
const FLAG_CLOSED: u32 = 1;
const FLAG_WITNESS: u32 = 2;

/// What a journal directory is: the place where events are appended, or a copy that follows another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Accepts appends.
    Origin,
    /// An exact read-only copy of an origin.
    Mirror,
    /// What is received of another service's filtered feed, and nothing else: a journal of its own.
    Feed,
}

impl Role {
    /// Whether batches are written here for the first time, and were copied from nowhere.
    #[must_use]
    pub const fn appends(self) -> bool {
        matches!(self, Self::Origin | Self::Feed)
    }

    const fn number(self) -> u8 {
        match self {
            Self::Origin => 1,
            Self::Mirror => 2,
            Self::Feed => 3,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Origin => "origin",
            Self::Mirror => "mirror",
            Self::Feed => "feed",
        })
    }
}

/// The contents of `node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Origin, mirror or feed.
    pub role: Role,
    /// This directory.
    pub node: NodeId,
    /// The journal in it.
    pub journal: JournalId,
}

impl Node {
    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; NODE_BYTES] {
        let mut out = Block::<NODE_BYTES>::new();
        out.put(0, &NODE_MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(10, &[self.role.number()]);
        out.put(16, self.node.as_bytes());
        out.put(32, self.journal.as_bytes());
        let crc = crc32(&[&out.0[..NODE_BYTES - 4]]);
        out.put(NODE_BYTES - 4, &crc.to_le_bytes());
        out.0
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`FormatError`] if they aren't a whole, undamaged `node` of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes: &[u8; NODE_BYTES] = bytes.try_into().map_err(|_| FormatError::Truncated)?;
        let mut input = Decoder::new(bytes);
        check_frame(&mut input, NODE_MAGIC, bytes)?;
        let role = match input.u8()? {
            1 => Role::Origin,
            2 => Role::Mirror,
            3 => Role::Feed,
            _ => return Err(FormatError::Invalid("role")),
        };
        input.bytes(5)?;
        Ok(Self {
            role,
            node: NodeId::from_bytes(input.array()?),
            journal: JournalId::from_bytes(input.array()?),
        })
    }
}

/// Magic, checksum in the last four bytes, version; leaves the input behind the version.
fn check_frame(input: &mut Decoder<'_>, magic: [u8; 8], bytes: &[u8]) -> Result<(), FormatError> {
    if input.array()? != magic {
        return Err(FormatError::Magic);
    }
    let (covered, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated)?;
    if crc32(&[covered]) != u32::from_le_bytes(*crc) {
        return Err(FormatError::HeaderChecksum);
    }
    match input.u16()? {
        VERSION => Ok(()),
        version => Err(FormatError::Unsupported { version, flags: 0 }),
    }
}

/// A place in a journal that a mirror has set aside: where its bytes differed from, or ran ahead of, what
/// was there afterwards. Kept until the same place has been passed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    /// Offset of the old end.
    pub offset: u64,
    /// Position of the old end.
    pub position: Position,
    /// Chain at the old end.
    pub chain: Chain,
}

/// One slot of the `mark`: a durable end that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Counts the writes of marks, to tell the slots apart.
    pub sequence: u64,
    /// The durable end.
    pub end: Checkpoint,
    /// The journal was closed cleanly here, and nothing has been written since.
    pub closed: bool,
    /// The end before a deliberate cut.
    pub witness: Option<Witness>,
    /// The lower half of the salt of the segment that was written to, or 0. Nobody who only appends knows it: it tells a
    /// mark that was written to a wrong place from a payload that looks like one.
    pub salt: u32,
}

impl Mark {
    /// The slot's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; MARK_SLOT_BYTES] {
        let mut out = Block::<MARK_SLOT_BYTES>::new();
        let mut flags = if self.closed { FLAG_CLOSED } else { 0 };
        if let Some(witness) = self.witness {
            flags |= FLAG_WITNESS;
            out.put(88, &witness.offset.to_le_bytes());
            out.put(96, &witness.position.get().to_le_bytes());
            out.put(104, witness.chain.as_bytes());
        }
        out.put(0, &MARK_MAGIC);
        out.put(8, &VERSION.to_le_bytes());
        out.put(12, &flags.to_le_bytes());
        out.put(16, &self.sequence.to_le_bytes());
        out.put(24, &self.end.to_bytes());
        out.put(120, &self.salt.to_le_bytes());
        let crc = crc32(&[&out.0[..MARK_SLOT_BYTES - 4]]);
        out.put(MARK_SLOT_BYTES - 4, &crc.to_le_bytes());
        out.0
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// [`FormatError`]; a slot that was never written is [`FormatError::Magic`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes: &[u8; MARK_SLOT_BYTES] = bytes.try_into().map_err(|_| FormatError::Truncated)?;
        let mut input = Decoder::new(bytes);
        check_frame(&mut input, MARK_MAGIC, bytes)?;
        input.u16()?;
        let flags = input.u32()?;
        if flags & !(FLAG_CLOSED | FLAG_WITNESS) != 0 {
            return Err(FormatError::Invalid("mark flags"));
        }
        let sequence = input.u64()?;
        let end =
            Checkpoint::from_bytes(&input.array()?).ok_or(FormatError::Invalid("mark end"))?;
        let witness = Witness {
            offset: input.u64()?,
            position: Position::new(input.u64()?),
            chain: Chain::from_bytes(input.array()?),
        };
        Ok(Self {
            sequence,
            end,
            closed: flags & FLAG_CLOSED != 0,
            witness: (flags & FLAG_WITNESS != 0).then_some(witness),
            salt: input.u32()?,
        })
    }

    /// A mark at the very beginning of a journal.
    #[must_use]
    pub fn start(journal: JournalId) -> Self {
        let end = Checkpoint {
            journal,
            epoch: 0,
            incarnation: Incarnation::default(),
            offset: 0,
            position: Position::START,
            chain: super::batch::genesis(journal),
        };
        Self { sequence: 0, end, closed: false, witness: None, salt: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_node_and_mark_is_noticed() {
        let node = Node {
            role: Role::Mirror,
            node: NodeId::from_bytes([1; 16]),
            journal: JournalId::from_bytes([2; 16]),
        };
        let mut mark = Mark::start(node.journal);
        mark.sequence = 7;
        mark.witness =
            Some(Witness { offset: 64, position: Position::new(1), chain: Chain::default() });
        assert_eq!(Node::decode(&node.encode()), Ok(node));
        assert_eq!(Mark::decode(&mark.encode()), Ok(mark));
        for bit in 0..NODE_BYTES * 8 {
            let mut bytes = node.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Node::decode(&bytes).is_err(), "bit {bit}");
        }
        for bit in 0..MARK_SLOT_BYTES * 8 {
            let mut bytes = mark.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Mark::decode(&bytes).is_err(), "bit {bit}");
        }
    }
}
