//! Writing a base.

use std::path::Path;
use std::sync::Arc;

use super::manifest::{Listed, Manifest};
use super::{
    BaseError, CODEC, DEADLY, DISCARDED, INTAKE, MANIFEST, PIECE_BYTES, ROWS, UNFINISHED, ViewBase,
};
use crate::error::{IoContext, IoError};
use crate::fs::{Fs, OpenMode, write_all_at};
use crate::journal::layout::{JOURNALS, Layout};
use crate::position::Position;
use crate::view::db::Db;
use crate::view::deadly::Deadly;
use crate::view::error::ViewError;
use crate::view::poison::Discarded;
use crate::view::sources::Sources;
use crate::view::takeover::digest_rows;

/// What belongs to the rows, as of the same moment.
pub(in crate::view) struct Beside {
    pub(in crate::view) discarded: Arc<Discarded>,
    pub(in crate::view) deadly: Arc<Deadly>,
    /// In which order several journals were taken in.
    pub(in crate::view) intake: Option<Vec<u8>>,
}

/// Exports into `dir`: `take` puts the database into the folder that it is given, which isn't there yet, and tells what
/// belongs to it. The rows are of `journals`. Durable when this returns.
pub(in crate::view) fn export(
    fs: &Arc<dyn Fs>,
    dir: &Path,
    journals: &Sources,
    take: impl FnOnce(&Path) -> Result<Beside, ViewError>,
) -> Result<ViewBase, ViewError> {
    let target = Target { fs, dir, layout: Layout::new(dir) };
    target.begin()?;
    target.fill(journals, take).inspect_err(|_| {
        // An effort: the next export into this directory does it, too.
        drop(target.clean());
    })
}

struct Target<'a> {
    fs: &'a Arc<dyn Fs>,
    dir: &'a Path,
    layout: Layout,
}

impl Target<'_> {
    /// Marks the directory, which is new or empty, or holds what an interrupted export has left: that goes.
    fn begin(&self) -> Result<(), ViewError> {
        self.fs.create_dir_all(self.dir).context("creating the directory of a base", self.dir)?;
        let names = self.fs.list(self.dir).context("listing", self.dir)?;
        let has = |name: &str| names.iter().any(|it| it == name);
        if has(UNFINISHED) && !has(MANIFEST) {
            self.clean()?;
        } else if let Some(name) = names.first() {
            return Err(BaseError::NotEmpty { path: self.dir.join(name) }.into());
        }
        let mark = self.dir.join(UNFINISHED);
        let marked = self.fs.open(&mark, OpenMode::CreateNew).and_then(|it| it.sync_data());
        marked.context("marking an unfinished base", &mark)?;
        self.fs.sync_dir(self.dir).context("syncing", self.dir)?;
        Ok(())
    }

    /// Removes what was written, the mark last.
    fn clean(&self) -> Result<(), IoError> {
        for folder in [ROWS, JOURNALS].map(|it| self.dir.join(it)) {
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.context("removing an unfinished base", &folder)?,
            }
        }
        for path in [DISCARDED, DEADLY, INTAKE, UNFINISHED].map(|it| self.dir.join(it)) {
            match self.fs.remove(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.context("removing an unfinished base", &path)?,
            }
        }
        Ok(())
    }

    fn fill(
        &self,
        journals: &Sources,
        take: impl FnOnce(&Path) -> Result<Beside, ViewError>,
    ) -> Result<ViewBase, ViewError> {
        let rows = self.dir.join(ROWS);
        let Beside { discarded, deadly, intake } = take(&rows)?;
        let names = self.fs.list(&rows).context("listing", &rows)?;
        let mut files: Vec<String> = names.into_iter().map(|it| format!("{ROWS}/{it}")).collect();
        self.fs.sync_dir(&rows).context("syncing", &rows)?;
        let beside = [
            (DISCARDED, (!discarded.is_empty()).then(|| discarded.text().into_bytes())),
            (DEADLY, deadly.has_killers().then(|| deadly.killers_only().text().into_bytes())),
            (INTAKE, intake),
        ];
        for (name, bytes) in beside {
            if let Some(bytes) = bytes {
                let path = self.dir.join(name);
                let file = self.fs.open(&path, OpenMode::CreateNew).context("creating", &path)?;
                write_all_at(&*file, &bytes, 0).context("writing", &path)?;
                files.push(name.to_owned());
            }
        }
        let files: Vec<Listed> =
            files.into_iter().map(|name| self.sealed(name)).collect::<Result<_, _>>()?;
        let manifest = read_back(&rows, journals, files)?;
        for checkpoint in manifest.progress.checkpoints.iter() {
            // In front of everything a mirror begins without help.
            if let Some(journal) = journals.get(checkpoint.journal)
                && checkpoint.position > Position::START
            {
                let dir = self.dir.join(JOURNALS).join(checkpoint.journal.to_string());
                let copied = journal.copy_end(checkpoint, &dir);
                copied.map_err(|error| BaseError::Copy(Arc::new(error)))?;
            }
        }
        self.layout.replace(&**self.fs, MANIFEST, manifest.text().as_bytes())?;
        // It is a base now; the mark only says nothing any more.
        drop(self.fs.remove(&self.dir.join(UNFINISHED)));
        Ok(manifest.summary())
    }

    /// Syncs a file, and says what it holds.
    fn sealed(&self, name: String) -> Result<Listed, IoError> {
        let path = self.dir.join(&name);
        let file = self.fs.open(&path, OpenMode::Read).context("opening", &path)?;
        file.sync_data().context("syncing", &path)?;
        let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let read =
                crate::fs::read_full_at(&*file, &mut piece, bytes).context("reading", &path)?;
            hasher.update(piece.get(..read).unwrap_or_default());
            bytes += read as u64;
            if read < PIECE_BYTES {
                return Ok(Listed { name, bytes, hash: *hasher.finalize().as_bytes() });
            }
        }
    }
}

/// What the exported database says of itself: every row is read once.
fn read_back(rows: &Path, journals: &Sources, files: Vec<Listed>) -> Result<Manifest, ViewError> {
    let db = Arc::new(Db::open_read_only(rows)?);
    let (layout, version, view) = db.stored_identity()?;
    let (indexes, tables) = db.stored_names()?;
    let progress = db.stored_progress(journals.ids().iter().copied())?;
    let digest = digest_rows(&db.latest(), ViewError::from, || Ok(()))?;
    let codec = CODEC.to_owned();
    Ok(Manifest { view, version, layout, codec, indexes, tables, progress, digest, files })
}

/// Exports the live generation of a view that nobody has open, from the folder of views `views_dir`.
#[cfg(feature = "cli")]
pub(crate) fn export_at_rest(
    views_dir: &Path,
    (name, version): (&str, u32),
    journals: &Sources,
    dir: &Path,
) -> Result<ViewBase, ViewError> {
    use super::import::judge;
    use crate::view::ViewMemory;
    use crate::view::deadly;
    use crate::view::generation::Generations;
    use crate::view::intake::Intake;
    use crate::view::poison::Parking;

    let fs: Arc<dyn Fs> = Arc::new(crate::fs::os::OsFs);
    let folder = Generations::open(Arc::clone(&fs), views_dir, name, version)?;
    let missing = |folder: std::path::PathBuf| ViewError::NoGeneration { folder };
    let live = folder.live()?.ok_or_else(|| missing(views_dir.join(name)))?;
    let db = Arc::new(Db::open(&live, &ViewMemory::default())?);
    let progress = db.latest().progress(journals.ids())?;
    let progress = progress.ok_or_else(|| missing(live.clone()))?;
    judge(dir, &progress.checkpoints, journals)?;
    let beside = views_dir.join(name);
    let discarded = Parking::open(Arc::clone(&fs), &beside, version)?.discarded();
    let deadly = Arc::new(deadly::known(&*fs, &beside, version)?);
    let intake = Intake::open(&fs, views_dir, journals)?.bytes()?;
    export(&fs, dir, journals, |rows| {
        db.export(rows)?;
        Ok(Beside { discarded, deadly, intake })
    })
}
