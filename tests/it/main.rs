//! The integration tests: behaviours as test names.
#![allow(missing_docs, reason = "tests")]

mod journal;
