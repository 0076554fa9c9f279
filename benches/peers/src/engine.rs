//! What every engine does here, and what is known of each.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Outcome;

/// A store of events, open. One implementation per peer, in `engines/`.
pub(crate) trait Engine: Send + Sync {
    /// For one thread that appends.
    fn writer(&self) -> Outcome<Box<dyn Writer + '_>>;

    /// Shows every event's payload, in the order of the log.
    fn replay(&mut self, each: Each<'_>) -> Outcome<()>;

    /// Shows the payload of one event.
    fn read(&mut self, _place: &Place, _each: Each<'_>) -> Outcome<()> {
        Err(NOT_OFFERED.into())
    }

    /// Shows the payloads of one stream's events, in their order.
    fn read_stream(&mut self, _stream: u32, _each: Each<'_>) -> Outcome<()> {
        Err(NOT_OFFERED.into())
    }

    /// Stops cleanly.
    fn close(self: Box<Self>) -> Outcome<()>;
}

/// Sees one payload after the other.
pub(crate) type Each<'a> = &'a mut dyn FnMut(&[u8]);

const NOT_OFFERED: &str = "not offered; the peer's list of what it can't do is incomplete";

/// Appends from one thread. Whatever an engine wants to have in its own form is made from the plain bytes in
/// here, and counts.
pub(crate) trait Writer: Send {
    /// Appends the payloads to a stream, atomically, and returns when they are as durable as the engine
    /// makes them.
    fn append(&mut self, stream: u32, payloads: &[&[u8]]) -> Outcome<()>;
}

/// Where an event of the corpus is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Among all events.
    pub(crate) number: u64,
    pub(crate) stream: u32,
    /// Among those of its stream.
    pub(crate) revision: u64,
}

/// What an engine is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) payload_bytes: usize,
    /// Whether streams will be read one by one. Engines that keep an index for that only when asked to are
    /// spared it where it isn't needed.
    pub(crate) streams: bool,
}

/// What is measured besides appending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Operation {
    Replay,
    Random,
    Stream,
    Open,
}

/// What takes part.
#[derive(Debug)]
pub(crate) struct Peer {
    /// As in `--only` and in the tables.
    pub(crate) name: &'static str,
    /// The crate, whose version is in the lock file; none for the bare device.
    pub(crate) package: Option<&'static str>,
    pub(crate) kind: Kind,
    /// What has survived a power cut when an append is over.
    pub(crate) durable: &'static str,
    /// How it was set up and used.
    pub(crate) used: &'static str,
    /// What it can't do, and why.
    pub(crate) without: &'static [(Operation, &'static str)],
    pub(crate) open: fn(&Path, Shape) -> Outcome<Box<dyn Engine>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Headwater,
    /// The device without an engine: one thread brings what all writers would.
    Baseline,
    Peer,
}

impl Peer {
    /// Why it can't do `operation`, if so.
    pub(crate) fn lacks(&self, operation: Operation) -> Option<&'static str> {
        self.without.iter().find(|(lacking, _)| *lacking == operation).map(|(_, why)| *why)
    }

    /// Whether it can do anything with a log that was written before.
    pub(crate) fn reads(&self) -> bool {
        use Operation::{Open, Random, Replay, Stream};
        [Replay, Random, Stream, Open].into_iter().any(|it| self.lacks(it).is_none())
    }

    /// The version that is in the lock file.
    pub(crate) fn version(&self) -> Option<&'static str> {
        let name = format!("name = \"{}\"", self.package?);
        let mut lines = include_str!("../Cargo.lock").lines().skip_while(|line| *line != name);
        lines.nth(1)?.strip_prefix("version = \"")?.strip_suffix('"')
    }
}

/// Like `?`, for errors of any kind.
pub(crate) fn boxed(error: impl std::fmt::Display) -> crate::Error {
    error.to_string().into()
}
