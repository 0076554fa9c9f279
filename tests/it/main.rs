//! The integration tests: behaviours as test names.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::too_many_lines,
    reason = "tests: a failure is a panic, and what was tried is printed"
)]

#[cfg(feature = "test-kit")]
mod crash;
#[cfg(all(feature = "test-kit", feature = "shipping"))]
mod fuzz_corpus;
mod journal;
#[cfg(all(feature = "views", feature = "shipping"))]
mod processes;
#[cfg(feature = "shipping")]
mod shipping;
#[cfg(feature = "shipping")]
mod shipping_processes;
#[cfg(feature = "views")]
mod views;
