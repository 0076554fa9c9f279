//! Bugs that can be switched on to prove that the tests would find them. Only with feature `test-kit`;
//! otherwise no bug is ever planted and the checks vanish.

/// A bug that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(unreachable_pub, reason = "public with feature `test-kit` only")]
pub enum Bug {
    /// Appends are acknowledged before their sync.
    AcknowledgeBeforeSync,
    /// A batch's body is believed without its checksum and chain.
    NoBodyCheck,
    /// Directories are never synced.
    NoDirectorySync,
}

#[cfg(feature = "test-kit")]
mod switch {
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<super::Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug for what this thread does from now on, or removes it.
    pub fn plant(bug: Option<super::Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn is(bug: super::Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "test-kit")]
pub(crate) use switch::is;
#[cfg(feature = "test-kit")]
pub use switch::plant;

#[cfg(not(feature = "test-kit"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
