//! What the figures were measured on.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::device::Device;

/// What it was measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory: String,
    pub(crate) system: String,
    pub(crate) file_system: String,
    pub(crate) load: String,
    /// What others did on the device before the run began: writes per second.
    pub(crate) idle_writes_per_second: Option<f64>,
}

impl Machine {
    /// What there is to find out; "unknown" for the rest. Takes a second.
    pub(crate) fn look(dir: &Path) -> Self {
        Self {
            processor: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            memory: memory().unwrap_or_else(unknown),
            system: system(),
            file_system: file_system(dir).unwrap_or_else(unknown),
            load: fs::read_to_string("/proc/loadavg")
                .ok()
                .and_then(|text| text.split(' ').next().map(str::to_owned))
                .unwrap_or_else(unknown),
            idle_writes_per_second: Device::under(dir)
                .ok()
                .flatten()
                .and_then(|device| device.idle_writes_per_second()),
        }
    }

    /// In one line, for plots.
    pub(crate) fn line(&self) -> String {
        let file_system = self.file_system.split(" (").next().unwrap_or_default();
        format!("{}, {} cores; {}; {file_system}", self.processor, self.cores, self.system)
    }

    /// The first rows of a table.
    pub(crate) fn rows(&self) -> String {
        let Self { processor, cores, memory, system, file_system, load, .. } = self;
        let device = self.idle_writes_per_second.map_or_else(
            || "not counted by the kernel".to_owned(),
            |writes| format!("shared with the rest of the system, which did {writes:.1} writes per second in the second before the run"),
        );
        format!(
            "| machine | {processor}, {cores} cores, {memory} |\n\
             | system | {system}, load {load} at the beginning |\n\
             | file system | {file_system} |\n\
             | its device | {device} |\n"
        )
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "machine    {}, {} cores, {}", self.processor, self.cores, self.memory)?;
        writeln!(f, "system     {}, load {} at the beginning", self.system, self.load)?;
        write!(f, "files      {}", self.file_system)?;
        if self.file_system.starts_with("tmpfs") {
            write!(f, "\n           IN MEMORY: nothing is durable here. Set HEADWATER_BENCH_DIR.")?;
        }
        Ok(())
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}

/// `name : value` in a file of such lines.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn memory() -> Option<String> {
    let kib: f64 = field("/proc/meminfo", "MemTotal")?.strip_suffix(" kB")?.parse().ok()?;
    Some(format!("{:.1} GiB of memory", kib / f64::from(1 << 20)))
}

fn system() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} {} {}", std::env::consts::OS, release.trim(), std::env::consts::ARCH)
}

/// Type, device and options of the file system that holds `dir`.
fn file_system(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let found = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (device, at, kind, options) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        dir.starts_with(at).then(|| (at.len(), format!("{kind} on {device} ({options})")))
    });
    // Of mounts over each other, the last one counts.
    found.max_by_key(|(len, _)| *len).map(|(_, text)| text)
}
