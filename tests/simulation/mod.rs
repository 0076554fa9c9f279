//! The simulated world: a store and its mirror on disks that exploit every freedom a real disk has, and a
//! model that knows what must be there afterwards.
//!
//! ```text
//!   life        random lives from a seed: append, crash, recover, crash inside recovery, mirror …
//!   every_fault every operation of some short scenarios x every kind of fault, then a second one
//!   threads     several threads append to one store until it crashes
//!   misdirected one write of a life lands elsewhere: reported or harmless, never served
//!   bits        every single bit of acknowledged data
//!      │ all of them through
//!      ▼
//!   world       store, mirror, model; opening, appending, feeding the mirror, and the checks
//!   reached     which of the hard situations a run has met
//!   campaign    many seeds on all cores, failing seeds kept, a watchdog for what hangs
//! ```
//! Shared by the tests (`tests/it/crash.rs`) and by the soak (`soak.rs`), which does more of the same.

#![allow(dead_code, reason = "the tests and the soak each use a part")]

pub(crate) mod bits;
pub(crate) mod campaign;
pub(crate) mod every_fault;
pub(crate) mod life;
pub(crate) mod misdirected;
pub(crate) mod overlapping;
pub(crate) mod reached;
pub(crate) mod threads;
pub(crate) mod world;

/// What a check found, in words.
pub(crate) type Check<T> = Result<T, String>;
