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

    /// Removes what was written: the manifest first, so that it is never without what it names, and the mark last.
    fn clean(&self) -> Result<(), IoError> {
        const ACTION: &str = "removing an unfinished base";
        let remove = |path: &Path| match self.fs.remove(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.context(ACTION, path),
        };
        remove(&self.layout.file(MANIFEST))?;
        remove(&self.layout.new_file(MANIFEST))?;
        self.fs.sync_dir(self.dir).context(ACTION, self.dir)?;
        let journals = self.dir.join(JOURNALS);
        for dir in self.fs.list(&journals).unwrap_or_default().iter().map(|it| journals.join(it)) {
            let mut names = self.fs.list(&dir).unwrap_or_default().into_iter();
            names.try_for_each(|name| remove(&dir.join(name)))?;
            self.fs.sync_dir(&dir).context(ACTION, &dir)?;
        }
        for folder in [self.dir.join(ROWS), journals] {
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.context(ACTION, &folder)?,
            }
        }
        let mut files = [DISCARDED, DEADLY, INTAKE].into_iter();
        files.try_for_each(|name| remove(&self.dir.join(name)))?;
        // What came back without the mark would be somebody's for the next export.
        self.fs.sync_dir(self.dir).context(ACTION, self.dir)?;
        remove(&self.dir.join(UNFINISHED))
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
        // The names of all that it names, in front of its own.
        self.fs.sync_dir(self.dir).context("syncing", self.dir)?;
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

#[cfg(test)]
#[cfg(all(feature = "test-kit", not(shuttle)))]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;
    use crate::fs::os::OsFs;
    use crate::fs::routed::Routed;
    use crate::fs::sim::{Fault, Repeat, SimFs};
    use crate::journal::{Append, Appender, Journal};
    use crate::options::JournalOptions;
    use crate::view::ViewMemory;
    use crate::view::db::{Identity, Progress};
    use crate::view::runner::nothing;
    use crate::{ExpectedRevision, NewEvent, StreamId};

    /// The database lies on this machine's disk, and all else of a base on one that fails.
    fn failing(sim: &SimFs, rows: &Path) -> Arc<dyn Fs> {
        let (sim, rows) = (sim.clone(), rows.to_owned());
        Arc::new(Routed(Box::new(move |path| {
            if path.starts_with(&rows) { Arc::new(OsFs) } else { Arc::new(sim.clone()) }
        })))
    }

    const JOURNAL: &str = "/journal";

    fn with_events(sim: &SimFs) {
        let fs: Arc<dyn Fs> = Arc::new(sim.clone());
        let options = JournalOptions { background_thread: false, ..JournalOptions::default() };
        let appender = Appender::create(&fs, Path::new(JOURNAL), &options).unwrap();
        let (stream, event) =
            (StreamId::new("s").unwrap(), NewEvent::raw("e", vec![1; 9]).unwrap());
        appender.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }

    fn sources_on(sim: &SimFs, rows: &Path) -> Sources {
        let (journal, _) =
            Journal::open_read_only(&failing(sim, rows), Path::new(JOURNAL)).unwrap();
        Sources::from(journal)
    }

    /// Without the mark nothing is left: it would be somebody's.
    fn assert_marked(sim: &SimFs, base: &Path, context: &str) {
        if sim.raw(&base.join(UNFINISHED)).is_none() {
            let files = sim.files().into_iter().map(|it| Path::new("/").join(it));
            let left: Vec<PathBuf> = files.filter(|it| it.starts_with(base)).collect();
            assert!(left.is_empty(), "{context}: {left:?}");
        }
    }

    fn names(dir: &Path) -> BTreeSet<String> {
        OsFs.list(dir).unwrap_or_default().into_iter().collect()
    }

    /// Whatever fails, and whether the power goes then or not: a manifest is there only with all that it names.
    #[test]
    fn an_export_that_fails_anywhere_is_no_base_also_behind_a_power_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (base, rows) = (dir.path().join("base"), dir.path().join("base").join(ROWS));
        // The end of the journal goes along: it lies on the same disk as the base.
        let ready = SimFs::new(0);
        with_events(&ready);
        let sources_on = |sim: &SimFs| sources_on(sim, &rows);
        let sources = sources_on(&ready);
        let copy = base.join(JOURNALS).join(sources.first().id().to_string());
        let memory = ViewMemory::new(1 << 20, 1 << 20);
        let db = Arc::new(Db::open(&dir.path().join("db"), &memory).unwrap());
        let identity = Identity { name: "v", version: 1, indexes: Vec::new(), tables: Vec::new() };
        db.begin(&identity, Progress { checkpoints: sources.end(), ..nothing(&sources) }).unwrap();
        let export = |sim: &SimFs, sources: &Sources| {
            std::fs::create_dir_all(&base).unwrap();
            export(&failing(sim, &rows), &base, sources, |rows| {
                db.export(rows)?;
                let (discarded, deadly) = (Arc::default(), Arc::default());
                Ok(Beside { discarded, deadly, intake: Some(b"an order".to_vec()) })
            })
        };
        let is_base = |sim: &SimFs| Manifest::read(&*failing(sim, &rows), &base);
        let assert_marked = |sim: &SimFs, context: &str| assert_marked(sim, &base, context);
        let repeated = |sim: &SimFs, context: &str| {
            assert_marked(sim, context);
            if sim.raw(&base.join(UNFINISHED)).is_none() {
                sim.remove_raw(&base.join(JOURNALS)); // its folders aren't on this machine's disk
            }
            let again = export(sim, &sources_on(sim));
            again.unwrap_or_else(|error| panic!("{context}: {error}"));
            is_base(sim).unwrap();
        };
        let mut failed = 0;
        let (once, forever) = ((Fault::Eio, Repeat::Once), (Fault::Eio, Repeat::Forever));
        let mut plans = [once, forever, (Fault::PowerCut, Repeat::Once)].into_iter();
        let mut plan = plans.next().map(|plan| (plan, 0));
        while let Some(((fault, repeat), op)) = plan {
            let sim = ready.fork(op);
            let on_sim = sources_on(&sim);
            sim.fail_at(sim.ops() + op, fault, repeat);
            let exported = export(&sim, &on_sim);
            let is_cut = sim.down().is_some();
            plan = match sim.faults_struck() == 0 && !is_cut {
                true => plans.next().map(|plan| (plan, 0)),
                false => Some(((fault, repeat), op + 1)),
            };
            sim.clear_faults();
            let context = format!("{fault:?} {repeat:?} at {op}: {exported:?}");
            failed += u32::from(exported.is_err());
            for fork in u64::from(is_cut)..16 {
                let cut = sim.fork(fork);
                match fork {
                    0 => {}
                    1 => cut.power_cut_losing_all(),
                    _ => cut.power_cut(),
                }
                match is_base(&cut) {
                    Err(error) => {
                        let ViewError::Base(error) = error else { panic!("{context}: {error}") };
                        assert!(matches!(*error, BaseError::NotABase { .. }), "{context}: {error}");
                        assert!(exported.is_err(), "{context}, {fork}");
                        let context = format!("{context}, {fork}");
                        assert_marked(&cut, &context);
                        if fork == 1 {
                            // What lies on this machine's disk is the same in all forks.
                            let aside = dir.path().join("aside");
                            let is_there = std::fs::rename(&rows, &aside).is_ok();
                            repeated(&cut, &context);
                            std::fs::remove_dir_all(&rows).unwrap();
                            is_there.then(|| std::fs::rename(&aside, &rows).unwrap());
                        }
                    }
                    Ok(manifest) => {
                        let has_all = manifest.files.iter().all(|it| match it.row_file() {
                            Some(name) => names(&rows).contains(name),
                            None => cut.raw(&base.join(&it.name)).is_some(),
                        });
                        assert!(has_all, "{context}, {fork}: {:?}", names(&rows));
                        let copied = Journal::open_read_only(&failing(&cut, &rows), &copy);
                        assert_eq!(copied.unwrap().0.end(), sources.first().end(), "{context}");
                        assert!(exported.is_ok() || (fault, repeat) != once, "{context}");
                    }
                }
            }
            if exported.is_err() && !is_cut && is_base(&sim).is_err() {
                repeated(&sim, &context);
            }
            drop(std::fs::remove_dir_all(&base));
        }
        assert!(failed > 20, "{failed}");
    }
}
