//! Every bit of acknowledged data: flipped, it is found, and reported with its file and its place.

use std::path::{Path, PathBuf};

use headwater::fs::sim::SimFs;
use headwater::{VerifyReport, verify};

use super::Check;
use super::world::{DIR, World, seeded, segments};

/// A closed journal of some segments on a simulated disk.
pub(crate) struct Journal {
    fs: SimFs,
    dir: PathBuf,
    whole: VerifyReport,
    /// A sealed segment: its file and its length.
    pub(crate) segment: PathBuf,
    pub(crate) bits: u64,
    /// Where its batches begin in the file, and the position of the first event of each.
    batches: Vec<(u64, u64)>,
}

impl Journal {
    pub(crate) fn new(seed: u64) -> Check<Self> {
        seeded(seed, None, || {
            let mut world = World::new(seed);
            let store = world.open_healed()?;
            while store.journal().segments().len() < 3 {
                world.append_one(&store)?;
            }
            let info = store.journal().segments().swap_remove(1);
            let mut cursor =
                store.journal().cursor(info.base_position).map_err(|error| error.to_string())?;
            let mut batches = Vec::new();
            while let Some(batch) = cursor.next_batch().map_err(|error| error.to_string())? {
                if batch.segment == info.number {
                    batches.push((batch.file_offset(), batch.batch.header.base_position.get()));
                }
            }
            store.close().map_err(|error| error.to_string())?;
            let files = segments(&world.fs, Path::new(DIR));
            let len = files.get(1).ok_or("one segment only")?.1.len() as u64;
            let dir = Path::new(DIR).join("journal");
            let whole = check(&world.fs, &dir)?;
            if !whole.is_healthy() {
                return Err("damaged without a flip".into());
            }
            Ok(Self { fs: world.fs, dir, whole, segment: info.path, bits: len * 8, batches })
        })
    }

    /// Flips the bit, looks, and flips it back.
    pub(crate) fn flip(&self, bit: u64) -> Check<()> {
        let fs = self.fs.fork(0);
        let at = bit / 8;
        if !fs.flip_bit(&self.segment, at, (bit % 8) as u8) {
            return Err("there is no such bit".into());
        }
        let report = check(&fs, &self.dir)?;
        let place = self.batches.iter().rfind(|(from, _)| *from <= at);
        let (from, position) = match place {
            Some((from, position)) => (*from, Some(*position)),
            None => (0, None),
        };
        let found = report.damage.iter().any(|damage| {
            damage.path == self.segment
                && match position {
                    Some(position) => {
                        damage.file_offset == from
                            && damage.position.is_some_and(|found| found.get() == position)
                    }
                    None => damage.file_offset < 4096,
                }
        });
        if !found {
            return Err(format!("bit {bit} of {}: {:?}", self.segment.display(), report.damage));
        }
        if position.is_none() && report.events != self.whole.events {
            return Err(format!("bit {bit} of a header page that is there twice costs events"));
        }
        Ok(())
    }
}

fn check(fs: &SimFs, dir: &Path) -> Check<VerifyReport> {
    verify(fs, dir, &mut |_| {}).map_err(|error| error.to_string())
}
