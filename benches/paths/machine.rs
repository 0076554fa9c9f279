//! What the figures were measured on.

use std::fmt;
use std::fs;
use std::path::Path;

pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory: String,
    pub(crate) system: String,
    pub(crate) file_system: String,
    pub(crate) load: String,
}

impl Machine {
    /// What there is to find out; "unknown" for the rest.
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
        }
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
