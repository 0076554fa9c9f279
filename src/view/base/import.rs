//! Taking in a base.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{Listed, Manifest};
use super::{BaseError, DEADLY, DISCARDED, INTAKE, PIECE_BYTES};
use crate::error::{IoContext, ReadError};
use crate::fs::{Fs, OpenMode, read_full_at, write_all_at};
use crate::journal::Comparison;
use crate::view::db::Db;
use crate::view::deadly::{Attempts, Deadly};
use crate::view::error::ViewError;
use crate::view::generation::{Generations, remove_folder};
use crate::view::intake::Intake;
use crate::view::poison::{Discarded, Parking};
use crate::view::program::Program;
use crate::view::runner::compare;
use crate::view::sources::{Checkpoints, Sources};

/// A base that is to be taken in.
pub(in crate::view) struct Import {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    manifest: Manifest,
    discarded: Discarded,
    deadly: Deadly,
    intake: Option<Vec<u8>>,
}

impl Import {
    /// Reads what it is.
    pub(in crate::view) fn open(fs: &Arc<dyn Fs>, dir: &Path) -> Result<Self, ViewError> {
        let (fs, dir) = (Arc::clone(fs), dir.to_owned());
        let manifest = Manifest::read(&*fs, &dir)?;
        let mut import = Self {
            fs,
            dir,
            manifest,
            discarded: Discarded::default(),
            deadly: Deadly::default(),
            intake: None,
        };
        if let Some(bytes) = import.whole(DISCARDED)? {
            let parsed = str::from_utf8(&bytes).ok().and_then(Discarded::parse);
            import.discarded = parsed.ok_or_else(|| import.damaged(DISCARDED))?;
        }
        if let Some(bytes) = import.whole(DEADLY)? {
            let parsed = str::from_utf8(&bytes).ok().and_then(Deadly::parse);
            import.deadly = parsed.ok_or_else(|| import.damaged(DEADLY))?;
        }
        import.intake = import.whole(INTAKE)?;
        Ok(import)
    }

    /// How many bytes are copied.
    pub(in crate::view) fn bytes(&self) -> u64 {
        self.row_files().fold(0, |sum, (listed, _)| sum.saturating_add(listed.bytes))
    }

    fn row_files(&self) -> impl Iterator<Item = (&Listed, &str)> {
        self.manifest.files.iter().filter_map(|it| Some((it, it.row_file()?)))
    }

    fn damaged(&self, name: &str) -> ViewError {
        let what = "a file isn't what its manifest says";
        BaseError::Damaged { path: self.dir.join(name), what }.into()
    }

    /// A small file of it, if there is one.
    fn whole(&self, name: &str) -> Result<Option<Vec<u8>>, ViewError> {
        let Some(listed) = self.manifest.files.iter().find(|it| it.name == name) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        self.read(listed, |piece, _| {
            bytes.extend_from_slice(piece);
            Ok::<_, ViewError>(())
        })?;
        Ok(Some(bytes))
    }

    /// Reads a file, and finds that it is what the manifest says. Pieces are handed on before that is known.
    fn read<E: From<ViewError>>(
        &self,
        listed: &Listed,
        mut take: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = self.dir.join(&listed.name);
        let file = match self.fs.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(self.damaged(&listed.name).into());
            }
            file => file.context("opening", &path).map_err(ViewError::from)?,
        };
        let (mut hasher, mut at, mut piece) = (blake3::Hasher::new(), 0, vec![0; PIECE_BYTES]);
        loop {
            let read = read_full_at(&*file, &mut piece, at).context("reading", &path);
            let read = read.map_err(ViewError::from)?;
            let taken = piece.get(..read).unwrap_or_default();
            if at + read as u64 > listed.bytes {
                return Err(self.damaged(&listed.name).into());
            }
            hasher.update(taken);
            take(taken, at)?;
            at += read as u64;
            if read < PIECE_BYTES {
                break;
            }
        }
        let is_whole = at == listed.bytes && *hasher.finalize().as_bytes() == listed.hash;
        if is_whole { Ok(()) } else { Err(self.damaged(&listed.name).into()) }
    }

    /// Refuses a base of anything but this view.
    pub(in crate::view) fn check<P: Program>(&self, view: &P) -> Result<(), ViewError> {
        Ok(self.manifest.check(&self.dir, &view.identity())?)
    }

    /// Refuses rows that aren't of the history of these journals.
    pub(in crate::view) fn judge(&self, journals: &Sources) -> Result<(), ViewError> {
        judge(&self.dir, &self.manifest.progress.checkpoints, journals)
    }

    /// Copies the rows into the folder of a generation, verified; durable when this returns. Tells `step` how many bytes
    /// were copied.
    pub(in crate::view) fn copy_into<E: From<ViewError>>(
        &self,
        folder: &Path,
        mut step: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for (listed, name) in self.row_files() {
            let path = folder.join(name);
            let file = self.fs.open(&path, OpenMode::CreateNew).context("creating", &path);
            let file = file.map_err(ViewError::from)?;
            self.read(listed, |piece, at| {
                let written = write_all_at(&*file, piece, at).context("writing", &path);
                written.map_err(ViewError::from)?;
                step(piece.len() as u64)
            })?;
            file.sync_data().context("syncing", &path).map_err(ViewError::from)?;
        }
        self.fs.sync_dir(folder).context("syncing", folder).map_err(ViewError::from)?;
        self.read_back(folder).map_err(E::from)
    }

    /// Whether the database is what the manifest says.
    fn read_back(&self, folder: &Path) -> Result<(), ViewError> {
        let Manifest { view, version, layout, progress, .. } = &self.manifest;
        let db = Arc::new(Db::open_read_only(folder)?);
        let stored = db.stored_progress(progress.checkpoints.iter().map(|it| it.journal))?;
        let is_same = db.stored_identity()? == (*layout, *version, view.clone())
            && db.stored_names()? == (self.manifest.indexes.clone(), self.manifest.tables.clone())
            && stored == *progress;
        if is_same { Ok(()) } else { Err(self.damaged(super::ROWS)) }
    }

    /// Takes over what the rows were made by, durably: decisions, which events are deadly, and the order in which several
    /// journals were taken in. Refuses if it was decided here that an event is left out that the rows have, or if the order
    /// is another one here.
    pub(in crate::view) fn adopt(
        &self,
        intake: &Intake,
        parking: &Parking,
        attempts: &Attempts,
    ) -> Result<(), ViewError> {
        if !intake.install(self.intake.as_deref(), &self.manifest.progress.checkpoints)? {
            return Err(BaseError::Order { dir: self.dir.clone() }.into());
        }
        if let Some(event) = parking.adopt(&self.discarded, &self.manifest.progress.checkpoints)? {
            return Err(BaseError::Decided { event }.into());
        }
        attempts.adopt(&self.deadly)
    }
}

/// Refuses checkpoints that aren't places in these journals, and of all of them.
pub(super) fn judge(
    dir: &Path,
    checkpoints: &Checkpoints,
    journals: &Sources,
) -> Result<(), ViewError> {
    if !checkpoints.are_of(journals.ids()) {
        let found = checkpoints.iter().map(|it| it.journal).collect();
        let wanted = journals.ids().to_vec();
        return Err(BaseError::Journals { dir: dir.to_owned(), found, wanted }.into());
    }
    for journal in journals.iter() {
        let Some(checkpoint) = checkpoints.of(journal.id()) else { continue };
        let end = journal.end().position;
        match compare(journal, &checkpoint) {
            Ok(Comparison::Equal) => {}
            Ok(Comparison::Ahead) => return Err(BaseError::Behind { checkpoint, end }.into()),
            Ok(Comparison::Differs | Comparison::Foreign) => {
                return Err(BaseError::Fork { checkpoint, end }.into());
            }
            Err(ReadError::Truncated { first }) => {
                return Err(BaseError::Truncated { checkpoint, first }.into());
            }
            Err(error) => return Err(BaseError::Journal(error).into()),
        }
    }
    Ok(())
}

/// Begins a view that has no rows yet with the base in `dir`: they are live when this returns. One that has some goes on
/// with them.
pub(in crate::view) fn begin_with<P: Program>(
    dir: &Path,
    view: &P,
    folder: &mut Generations,
    (journals, intake): (&Sources, &Intake),
    decided: (&Parking, &Attempts),
) -> Result<(), ViewError> {
    if folder.has_live_rows() {
        return Ok(());
    }
    let import = Import::open(folder.fs(), dir)?;
    import.check(view)?;
    import.judge(journals)?;
    take_in(&import, folder, intake, decided).map(drop)
}

/// Makes a generation of it, and lets the version read that.
fn take_in(
    import: &Import,
    folder: &mut Generations,
    intake: &Intake,
    (parking, attempts): (&Parking, &Attempts),
) -> Result<u32, ViewError> {
    let (number, path) = folder.begin()?;
    let copied = import.copy_into(&path, |_| Ok(()));
    copied.and_then(|()| import.adopt(intake, parking, attempts)).inspect_err(
        |_: &ViewError| {
            // An effort: the next opening deletes it, too.
            drop(remove_folder(&path));
        },
    )?;
    folder.set_live(number)?;
    Ok(number)
}

/// What [`import_at_rest`] has done: the generation that is live now, and the one that was.
#[cfg(feature = "cli")]
pub(crate) struct Imported {
    pub(crate) version: u32,
    pub(crate) number: u32,
    pub(crate) previous: Option<u32>,
}

/// Takes in a base while nobody has the view open. A generation that is live must be meant to be replaced; it is kept.
#[cfg(feature = "cli")]
pub(crate) fn import_at_rest(
    views_dir: &Path,
    name: &str,
    journals: &Sources,
    dir: &Path,
    replace: bool,
) -> Result<Imported, ViewError> {
    let fs: Arc<dyn Fs> = Arc::new(crate::fs::os::OsFs);
    let import = Import::open(&fs, dir)?;
    let Manifest { view, version, .. } = &import.manifest;
    if view != name {
        let (found, wanted) = (view.clone(), name.to_owned());
        return Err(BaseError::Another { dir: dir.to_owned(), what: "name", found, wanted }.into());
    }
    import.judge(journals)?;
    let mut folder = Generations::open(Arc::clone(&fs), views_dir, name, *version)?;
    let previous = folder.live_number();
    if folder.has_live_rows() && !replace {
        let number = previous.unwrap_or_default();
        let folder = views_dir.join(name).join(format!("{version}.{number}"));
        return Err(BaseError::Live { folder }.into());
    }
    let beside = views_dir.join(name);
    let parking = Parking::open(Arc::clone(&fs), &beside, *version)?;
    let attempts = Attempts::open(Arc::clone(&fs), &beside, *version)?;
    let intake = Intake::open(&fs, views_dir, journals)?;
    let number = take_in(&import, &mut folder, &intake, (&parking, &*attempts))?;
    Ok(Imported { version: *version, number, previous })
}
