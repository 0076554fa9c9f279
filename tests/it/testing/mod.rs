//! The kit for the tests of services: it says yes to what is right, and finds what is planted.

use std::panic::{AssertUnwindSafe, catch_unwind};

mod aggregates;
mod crashes;
mod disks;
#[cfg(feature = "views")]
mod purity;
#[cfg(feature = "views")]
mod rows;
#[cfg(feature = "views")]
mod tables;

/// What the kit says when it fails the test.
fn failure<T>(run: impl FnOnce() -> T) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(run)) else {
        panic!("the test should have failed");
    };
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).expect("a message")
}

/// It failed, and the message has all of this.
#[track_caller]
fn fails<T>(run: impl FnOnce() -> T, parts: &[&str]) {
    let text = failure(run);
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}
