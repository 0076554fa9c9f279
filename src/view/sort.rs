//! Sorts more byte strings than fit into memory.
//!
//! ```text
//! add … add ─ full ▶ sorted ─▶ run 1 ┐
//! add … add ─ full ▶ sorted ─▶ run 2 ├─ merged ─▶ one after the other, in order
//! add … add ─ end ─▶ sorted ─▶ run 3 ┘
//!
//! run:   length u32, little-endian │ bytes       as often as there are strings
//! ```
//!
//! The runs are of no use after the process that wrote them: they lie in a folder that goes away with what is
//! being built, and are neither synced nor checked.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// Bytes of a run, at about.
const RUN_BYTES: usize = 32 << 20;
/// What a string needs beside its bytes.
const SPAN_BYTES: usize = size_of::<(usize, usize)>();
const READ_BYTES: usize = 64 << 10;

/// Runs on disk, added to by several threads.
pub(super) struct Runs {
    dir: PathBuf,
    count: AtomicUsize,
    written: Mutex<Vec<PathBuf>>,
}

impl Runs {
    /// No run yet; they will lie in `dir`.
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), count: AtomicUsize::new(0), written: Mutex::default() }
    }

    /// A run that is being filled.
    pub(super) const fn begin(&self) -> Run<'_> {
        Run { runs: self, bytes: Vec::new(), spans: Vec::new(), bytes_max: RUN_BYTES }
    }

    /// All strings, in order.
    pub(super) fn merge(self) -> io::Result<Merge> {
        let mut merge = Merge { sources: Vec::new(), heads: BinaryHeap::new() };
        for path in self.written.into_inner() {
            let number = merge.sources.len();
            let mut source = BufReader::with_capacity(READ_BYTES, File::open(path)?);
            if let Some(first) = read(&mut source)? {
                merge.heads.push(Reverse((first, number)));
            }
            merge.sources.push(source);
        }
        Ok(merge)
    }
}

/// Strings of one thread, on their way to a run.
pub(super) struct Run<'a> {
    runs: &'a Runs,
    bytes: Vec<u8>,
    spans: Vec<(usize, usize)>,
    bytes_max: usize,
}

impl Run<'_> {
    pub(super) fn add(&mut self, string: &[u8]) -> io::Result<()> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(string);
        self.spans.push((start, self.bytes.len()));
        if self.bytes.len() + self.spans.len() * SPAN_BYTES >= self.bytes_max {
            self.write()?;
        }
        Ok(())
    }

    /// Writes what is left.
    pub(super) fn end(mut self) -> io::Result<()> {
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        if self.spans.is_empty() {
            return Ok(());
        }
        let bytes = &self.bytes;
        let string = |&(start, end): &(usize, usize)| bytes.get(start..end).unwrap_or_default();
        self.spans.sort_unstable_by(|a, b| string(a).cmp(string(b)));
        let number = self.runs.count.fetch_add(1, Ordering::Relaxed);
        let path = self.runs.dir.join(format!("{number}.run"));
        let mut file = BufWriter::new(File::create_new(&path)?);
        for string in self.spans.iter().map(string) {
            let len = u32::try_from(string.len()).map_err(io::Error::other)?;
            file.write_all(&len.to_le_bytes())?;
            file.write_all(string)?;
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?;
        self.runs.written.lock().push(path);
        self.bytes.clear();
        self.spans.clear();
        Ok(())
    }
}

/// The strings of all runs, in order.
pub(super) struct Merge {
    sources: Vec<BufReader<File>>,
    heads: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
}

impl Iterator for Merge {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let Reverse((string, number)) = self.heads.pop()?;
        let more = self.sources.get_mut(number).map_or(Ok(None), read);
        match more {
            Ok(more) => self.heads.extend(more.map(|more| Reverse((more, number)))),
            Err(error) => return Some(Err(error)),
        }
        Some(Ok(string))
    }
}

fn read(source: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    match source.read_exact(&mut len) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let len = u64::from(u32::from_le_bytes(len));
    let mut string = Vec::new();
    // Not allocated before it is there.
    source.take(len).read_to_end(&mut string)?;
    if string.len() as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(string))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_added_comes_back_in_order(
            parts: Vec<Vec<Vec<u8>>>,
            bytes_max in 1_usize..200,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let runs = Runs::new(dir.path());
            for part in &parts {
                let mut run = Run { bytes_max, ..runs.begin() };
                part.iter().for_each(|string| run.add(string).unwrap());
                run.end().unwrap();
            }
            let merged: Vec<Vec<u8>> = runs.merge().unwrap().map(Result::unwrap).collect();
            let mut expected: Vec<Vec<u8>> = parts.into_iter().flatten().collect();
            expected.sort_unstable();
            prop_assert_eq!(merged, expected);
        }
    }

    #[test]
    fn a_run_that_was_cut_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::new(dir.path());
        let mut run = runs.begin();
        run.add(b"abc").unwrap();
        run.end().unwrap();
        let path = dir.path().join("0.run");
        File::options().write(true).open(path).unwrap().set_len(6).unwrap();
        assert!(runs.merge().is_err());
    }
}
