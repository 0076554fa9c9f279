//! What this process holds, as Rust code has allocated it: what an allocator keeps of what was freed isn't in it.

use std::alloc::System;

use cap::Cap;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

pub(crate) fn held_bytes() -> usize {
    ALLOCATOR.allocated()
}

/// The most that was ever held at a time.
#[cfg(feature = "views")]
pub(crate) fn held_bytes_max() -> usize {
    ALLOCATOR.max_allocated()
}
