//! For the tests of a service: what its aggregates decide, what its views fold, and what a crash leaves. Feature
//! `testing`, for `[dev-dependencies]`.
//!
//! ```text
//!   decide                       fold                              crash
//!   aggregate::<Account>()       view(Spent)                       CrashTest::new().run(scenario, check)
//!    .given([events])             .given("order-1", [events])        │ at every operation of
//!    .when(&command)              .then_row(&17, 1250)               ▼
//!    .then([events])              .then_pure()                      MemoryDisk ── Clock
//!        no disk, no thread           no disk, no thread               a store as it is, on a disk in memory
//! ```
//!
//! | to test | use |
//! |---|---|
//! | what an aggregate decides | [`aggregate`] |
#![cfg_attr(
    feature = "views",
    doc = "| the rows of a keyed view, its indexes, events it can't fold | [`view`](view()) |",
    doc = "| the tables of a view, events it can't apply | [`table_view`](table_view()) |",
    doc = "| that a view is a pure fold, and can be rebuilt | [`assert_pure`], [`assert_pure_tables`] |"
)]
//! | a service as a whole, quickly, and with times that are known | [`MemoryDisk`], [`Clock`] |
//! | what a service does after a crash | [`CrashTest`] |
//! | events in older forms | [`stored`], [`History`], and [`schema::check`](crate::schema::check) |
//!
//! Invariants:
//! - What is given goes through the bytes in which it would be stored, and through the upcasters of its type.
//! - Where something real is left out, the documentation of the item says so. Above all: **rows of views don't lie on
//!   [`MemoryDisk`]**, as RocksDB does not go through the seam for files; that a view keeps its promises through crashes is
//!   tested by this library, with real processes.
//! - A failed test says what was expected, what came, and how to repeat it.

mod aggregate;
mod clock;
mod crash;
mod diff;
mod disk;
mod history;
#[cfg(feature = "views")]
mod purity;
#[cfg(feature = "views")]
mod table_purity;
#[cfg(feature = "views")]
mod table_view;
#[cfg(feature = "views")]
mod view;

pub use aggregate::{AggregateTest, Decision, aggregate};
pub(crate) use clock::Clocked;
pub use clock::{BEGINNING_US, Clock};
pub use crash::{CrashResult, CrashTest, Crashes};
pub use disk::{Crash, MemoryDisk};
pub use history::{History, stored};
#[cfg(feature = "views")]
pub use purity::{Impure, assert_pure, check_purity};
#[cfg(feature = "views")]
pub use table_purity::{assert_pure_tables, check_purity_of_tables};
#[cfg(feature = "views")]
pub use table_view::{TableViewTest, table_view};
#[cfg(feature = "views")]
pub use view::{ViewTest, view};
