//! Memory that the machine has never used costs more at its first use: a virtual machine gets it from its host page by
//! page, and whoever copies into the page cache pays. A server that has run for a while has it behind itself.

use std::hint::black_box;

use super::machine::field;

const AT_MOST_BYTES: usize = 8 << 30;
const PIECE_BYTES: usize = 64 << 20;

/// Uses once, and gives back, half of what is available, so that the kernel has it for its page cache.
pub(crate) fn use_once() {
    let available = field("/proc/meminfo", "MemAvailable")
        .and_then(|text| text.strip_suffix(" kB")?.parse::<usize>().ok());
    let bytes = (available.unwrap_or(0) * 1024 / 2).min(AT_MOST_BYTES);
    let pieces: Vec<_> = (0..bytes / PIECE_BYTES).map(|_| vec![0xA5_u8; PIECE_BYTES]).collect();
    black_box(pieces);
}
