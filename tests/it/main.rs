//! The integration tests: behaviours as test names.
#![allow(missing_docs, reason = "tests")]

#[cfg(feature = "test-kit")]
mod crash;
mod journal;
#[cfg(feature = "shipping")]
mod shipping;
#[cfg(feature = "views")]
mod views;
