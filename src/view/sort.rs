//! Sorts more byte strings than fit into memory.
//!
//! ```text
//! add … add ─ full ▶ sorted ─▶ run 1 ┐
//! add … add ─ full ▶ sorted ─▶ run 2 ├─ merged ─▶ one after the other, in order
//! add … add ─ end ─▶ sorted ─▶ run 3 ┘
//!
//! run:   length u32, little-endian │ bytes       as often as there are strings
//! ```
//! Each run is an open file while it is merged, and a process may have few: where there are too many, some are merged into one
//! before.
//!
//! The runs are of no use after the process that wrote them: they lie in a folder that goes away with what is
//! being built, and are neither synced nor checked.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
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
/// Runs that are merged at once. Often a process may have 1024 open files, and most are for others.
const MERGED_MAX: usize = 256;
/// When runs are merged into one, somebody is asked behind so many strings whether that is to go on.
const STEP: usize = 4096;

/// Runs on disk, added to by several threads.
pub(super) struct Runs {
    dir: PathBuf,
    count: AtomicUsize,
    written: Mutex<VecDeque<PathBuf>>,
    /// So many may be open at once; two at least.
    merged_max: usize,
}

impl Runs {
    /// No run yet; they will lie in `dir`.
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            count: AtomicUsize::new(0),
            written: Mutex::default(),
            merged_max: MERGED_MAX,
        }
    }

    /// A run that is being filled.
    pub(super) const fn begin(&self) -> Run<'_> {
        Run { runs: self, bytes: Vec::new(), spans: Vec::new(), bytes_max: RUN_BYTES }
    }

    /// All strings, in order. Before they come there may be a lot to do: a step is taken now and then.
    pub(super) fn merge<E>(
        self,
        failed: impl Fn(io::Error) -> E,
        mut step: impl FnMut() -> Result<(), E>,
    ) -> Result<Merge, E> {
        let mut paths = std::mem::take(&mut *self.written.lock());
        while paths.len() > self.merged_max {
            // The oldest, which are the shortest; no more than need be.
            let count = (paths.len() - self.merged_max + 1).min(self.merged_max);
            let some: Vec<PathBuf> = paths.drain(..count).collect();
            paths.push_back(self.merge_into_one(&some, &failed, &mut step)?);
        }
        Merge::of(&paths).map_err(failed)
    }

    fn merge_into_one<E>(
        &self,
        paths: &[PathBuf],
        failed: impl Fn(io::Error) -> E,
        mut step: impl FnMut() -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let mut file = RunFile::create(self).map_err(&failed)?;
        for (number, string) in Merge::of(paths).map_err(&failed)?.enumerate() {
            if number % STEP == 0 {
                step()?;
            }
            string.and_then(|string| file.add(&string)).map_err(&failed)?;
        }
        // An effort: they go away with their folder.
        paths.iter().for_each(|path| drop(std::fs::remove_file(path)));
        file.end().map_err(failed)
    }
}

/// A run on its way to the disk.
struct RunFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl RunFile {
    fn create(runs: &Runs) -> io::Result<Self> {
        let number = runs.count.fetch_add(1, Ordering::Relaxed);
        let path = runs.dir.join(format!("{number}.run"));
        let file = BufWriter::new(File::create_new(&path)?);
        Ok(Self { path, file })
    }

    fn add(&mut self, string: &[u8]) -> io::Result<()> {
        let len = u32::try_from(string.len()).map_err(io::Error::other)?;
        self.file.write_all(&len.to_le_bytes())?;
        self.file.write_all(string)
    }

    fn end(self) -> io::Result<PathBuf> {
        self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(self.path)
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
        let mut file = RunFile::create(self.runs)?;
        self.spans.iter().map(string).try_for_each(|string| file.add(string))?;
        self.runs.written.lock().push_back(file.end()?);
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

impl Merge {
    fn of<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> io::Result<Self> {
        let mut merge = Self { sources: Vec::new(), heads: BinaryHeap::new() };
        for path in paths {
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

    fn string() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..100)
    }

    fn merged(runs: Runs) -> io::Result<Merge> {
        runs.merge(|error| error, || Ok(()))
    }

    proptest! {
        /// A large view with an index has thousands of runs. All were opened at once, at the very end of a build of hours,
        /// where the process had files for some hundreds.
        #[test]
        fn what_was_added_comes_back_in_order_and_few_files_are_open_at_once(
            parts in prop::collection::vec(prop::collection::vec(string(), 0..20), 0..5),
            bytes_max in 1_usize..200,
            merged_max in 2_usize..9,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let runs = Runs { merged_max, ..Runs::new(dir.path()) };
            for part in &parts {
                let mut run = Run { bytes_max, ..runs.begin() };
                part.iter().for_each(|string| run.add(string).unwrap());
                run.end().unwrap();
            }
            let merge = merged(runs).unwrap();
            let open = merge.sources.len();
            prop_assert!(open <= merged_max, "{open} of {merged_max}");
            // And what was merged into others needs no space any more.
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), open);
            let merged: Vec<Vec<u8>> = merge.map(Result::unwrap).collect();
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
        assert!(merged(runs).is_err());
    }

    #[test]
    fn merging_many_runs_into_one_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs { merged_max: 2, ..Runs::new(dir.path()) };
        for string in [b"a", b"b", b"c"] {
            let mut run = runs.begin();
            run.add(string).unwrap();
            run.end().unwrap();
        }
        let merge = runs.merge(|error| error, || Err(io::ErrorKind::Interrupted.into()));
        assert_eq!(merge.err().map(|error| error.kind()), Some(io::ErrorKind::Interrupted));
    }
}
