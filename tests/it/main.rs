//! The integration tests: behaviours as test names.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

#[cfg(feature = "test-kit")]
mod crash;
mod journal;
#[cfg(feature = "views")]
mod views;
#[cfg(feature = "shipping")]
mod shipping;
#[cfg(feature = "shipping")]
mod shipping_processes;
