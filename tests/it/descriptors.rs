//! How many files and sockets this process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Whether so many may be open, with the soft limit raised to the hard one. Where everything must be tested, too few are a
/// failure.
pub(crate) fn may_open(files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    // Where that is refused, what there is counts.
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let why = format!("{allowed} files may be open, {files} are needed (raised: {raised:?})");
    assert!(allowed >= files || std::env::var_os("CI").is_none(), "{why}");
    if allowed < files {
        println!("SKIPPED: {why}");
    }
    allowed >= files
}
