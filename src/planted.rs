//! Bugs that can be switched on to prove that the tests would find them. Only with feature `test-kit`;
//! otherwise no bug is ever planted and the checks vanish.

/// A bug that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(unreachable_pub, reason = "public with feature `test-kit` only")]
#[allow(dead_code, reason = "some can be planted only in parts that are features")]
pub enum Bug {
    /// Appends are acknowledged before their sync.
    AcknowledgeBeforeSync,
    /// A batch's body is believed without its checksum and chain.
    NoBodyCheck,
    /// A name whose sync failed is synced once more, and believed.
    NameSyncedAgain,
    /// A view passes over some events, and counts them as part of what it has seen.
    SkipEvent,
    /// Of some of a view's chunks only the checkpoint is written.
    DropChunk,
    /// Rows of a view and the checkpoint that they are of are written one after the other.
    CheckpointApartFromRows,
    /// Rows of a view are durable before the checkpoint that they are of is written.
    RowsDurableAlone,
    /// A full segment is cut in front of the end of its last batch.
    DropBatchAtRoll,
    /// Directories are never synced.
    NoDirectorySync,
    /// A failed sync is tried once more, and believed.
    RetryFailedSync,
    /// Followers are shown a group before it is synced.
    ShipUnsynced,
    /// Events that belong together are appended as two batches.
    SplitBatch,
    /// Recovery believes what it reads, though the disk may not hold it.
    TrustPageCache,
    /// Frames may be as long as they say.
    UnboundedFrame,
    /// A gate wakes those who wait before it is open.
    LostWakeUp,
    /// An answer is given before the durable end that it speaks of is published.
    AnswerBeforePublish,
    /// The leader that has synced doesn't wake the one whose group is written.
    TurnWithoutNotice,
    /// Whoever waits for room isn't woken when there is some.
    RoomWithoutNotice,
    /// Retention removes segments before the base that takes their place is durable.
    UnlinkBeforeBase,
    /// The search for the last common batch end leaves out the last position.
    ProbeOffByOne,
    /// A mirror is cut before the copy of its tail is durable.
    CutBeforeCopy,
    /// Batches are taken in that don't continue what is there.
    TakeUnlinked,
}

#[cfg(feature = "test-kit")]
mod switch {
    use std::cell::Cell;
    use std::sync::OnceLock;

    thread_local! {
        static PLANTED: Cell<Option<super::Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug for what this thread does from now on, or removes it.
    pub fn plant(bug: Option<super::Bug>) {
        PLANTED.set(bug);
    }

    /// In every thread of this process, for ever.
    static EVERYWHERE: OnceLock<super::Bug> = OnceLock::new();

    /// Plants a bug in all threads of this process, for as long as it lives; the first one stays.
    pub fn plant_everywhere(bug: super::Bug) {
        EVERYWHERE.get_or_init(|| bug);
    }

    pub(crate) fn is(bug: super::Bug) -> bool {
        PLANTED.get() == Some(bug) || EVERYWHERE.get() == Some(&bug)
    }
}

#[cfg(feature = "test-kit")]
pub(crate) use switch::is;
#[cfg(feature = "test-kit")]
pub use switch::{plant, plant_everywhere};

#[cfg(not(feature = "test-kit"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
