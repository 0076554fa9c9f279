//! The views whose code is at hand.

use crate::view::Code;

/// Those that were named.
#[derive(Debug, Default)]
pub(in crate::cli) struct Views(pub(in crate::cli) Vec<Code>);

impl Views {
    /// The code of exactly this version.
    pub(super) fn of_version(&self, name: &str, version: u32) -> Option<&Code> {
        self.versions(name).find(|code| code.version == version)
    }

    /// The newest version.
    pub(super) fn newest(&self, name: &str) -> Option<&Code> {
        self.versions(name).max_by_key(|code| code.version)
    }

    pub(super) fn versions(&self, name: &str) -> impl Iterator<Item = &Code> {
        self.0.iter().filter(move |code| code.name == name)
    }
}
