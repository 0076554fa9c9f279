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
mod ahead;
#[cfg(all(feature = "views", feature = "test-kit"))]
mod audit;
#[cfg(feature = "test-kit")]
mod backup;
#[cfg(all(feature = "views", feature = "shipping"))]
mod bases;
mod benchmarks;
#[cfg(all(feature = "test-kit", feature = "shipping"))]
mod bootstrap;
#[cfg(feature = "cli")]
mod cli;
#[cfg(all(feature = "cli", feature = "derive"))]
mod cli_events;
#[cfg(all(feature = "cli", feature = "views"))]
mod cli_views;
#[cfg(feature = "test-kit")]
mod commands;
#[cfg(feature = "shipping")]
mod connections;
#[cfg(feature = "shipping")]
mod consistency;
#[cfg(feature = "test-kit")]
mod crash;
#[cfg(feature = "views")]
mod deadly;
#[cfg(feature = "shipping")]
mod descriptors;
mod doctor;
mod dump;
#[cfg(feature = "derive")]
mod evolution;
#[cfg(feature = "shipping")]
#[path = "../chaos/proxy.rs"]
mod fault_proxy;
#[cfg(feature = "shipping")]
mod filtered;
#[cfg(feature = "test-kit")]
mod forks;
#[cfg(all(feature = "test-kit", feature = "shipping"))]
mod fuzz_corpus;
mod golden;
#[cfg(feature = "views")]
mod indexes;
#[cfg(feature = "views")]
mod inline;
#[cfg(all(feature = "views", feature = "test-kit"))]
mod intake;
mod journal;
#[cfg(all(
    any(feature = "shipping", feature = "views"),
    feature = "test-kit",
    target_os = "linux"
))]
mod memory;
#[cfg(all(feature = "shipping", feature = "testing"))]
mod observe;
#[cfg(feature = "test-kit")]
mod operations;
#[cfg(feature = "test-kit")]
mod planted;
#[cfg(feature = "views")]
mod poison;
#[cfg(all(feature = "views", feature = "derive"))]
mod poison_parts;
#[cfg(all(feature = "views", feature = "shipping"))]
mod processes;
#[cfg(all(feature = "shipping", feature = "test-kit"))]
mod promises;
#[cfg(feature = "shipping")]
mod python_subscriber;
#[cfg(feature = "test-kit")]
mod queries;
#[cfg(feature = "test-kit")]
mod races;
#[cfg(feature = "test-kit")]
mod reactors;
#[cfg(feature = "test-kit")]
mod reads;
#[cfg(feature = "views")]
mod rebuild;
#[cfg(all(feature = "views", feature = "test-kit", target_os = "linux"))]
mod rebuild_memory;
#[cfg(feature = "test-kit")]
mod recovery;
#[cfg(feature = "shipping")]
mod relays;
#[cfg(feature = "test-kit")]
mod repair;
#[cfg(feature = "test-kit")]
mod retention;
#[cfg(feature = "views")]
mod retention_views;
#[cfg(feature = "shipping")]
mod security;
#[cfg(feature = "shipping")]
mod shipping;
#[cfg(feature = "shipping")]
mod shipping_processes;
#[cfg(feature = "test-kit")]
#[path = "../simulation/mod.rs"]
mod simulation;
#[cfg(feature = "views")]
mod sources;
#[cfg(feature = "shipping")]
mod stalls;
#[cfg(feature = "shipping")]
#[path = "../chaos/subscriber.rs"]
mod subscriber;
#[cfg(feature = "shipping")]
mod subscribers;
#[cfg(feature = "views")]
mod tables;
#[cfg(feature = "testing")]
mod testing;
#[cfg(feature = "test-kit")]
mod tickets;
mod verify;
#[cfg(feature = "views")]
mod views;
#[cfg(feature = "views")]
mod watch;

/// Segments of a few events, and nothing that is done beside the appends.
#[cfg(feature = "test-kit")]
fn options() -> headwater::JournalOptions {
    headwater::JournalOptions {
        segment_bytes_first: 7 * 1024,
        segment_bytes_max: 7 * 1024,
        batch_bytes_max: 1024,
        group_bytes_max: 2048,
        background_thread: false,
        ..headwater::JournalOptions::default()
    }
}
