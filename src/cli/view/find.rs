//! Which views there are, and where.

use std::path::{Path, PathBuf};

use super::GenerationName;
use super::failure::ViewFailure;
use super::mounted::Views;
use crate::JournalId;
use crate::cli::failure::Failure;
use crate::cli::target;
use crate::view::at_rest::AtRest;
use crate::view::{Code, Generation, ViewError, generations};

/// A journal, and the folder of its views.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// `own`, or `mirrors/NAME`.
    pub(super) label: String,
    pub(super) journal: PathBuf,
    pub(super) views: PathBuf,
}

impl Place {
    fn new(label: String, dir: &Path) -> Self {
        let journal = target::journal_dir(dir);
        let beside = if journal == dir { dir.parent().unwrap_or(dir) } else { dir };
        Self { label, views: beside.join("views"), journal }
    }
}

/// A view on disk.
#[derive(Debug)]
pub(super) struct Located {
    /// What `DIR` stands for, and the mirrors in it: of the first the view is, or of several.
    pub(super) places: Vec<Place>,
    pub(super) place: Place,
    pub(super) name: String,
    /// Sorted by version and number.
    pub(super) generations: Vec<Generation>,
}

impl Located {
    pub(super) fn folder(&self) -> PathBuf {
        self.place.views.join(&self.name)
    }

    /// The generation that is meant, and its code.
    pub(super) fn generation<'v>(
        &self,
        wanted: Option<GenerationName>,
        views: &'v Views,
    ) -> Result<(&Generation, Option<&'v Code>), Failure> {
        let live =
            |version: u32| self.generations.iter().find(move |it| it.version == version && it.live);
        let found = match wanted {
            Some(GenerationName { version, number: None }) => live(version),
            Some(GenerationName { version, number }) => self
                .generations
                .iter()
                .find(|it| (it.version, Some(it.number)) == (version, number)),
            None => {
                let mut mounted: Vec<u32> =
                    views.versions(&self.name).map(|code| code.version).collect();
                mounted.sort_unstable();
                let with_code = mounted.into_iter().rev().find_map(live);
                with_code.or_else(|| self.generations.iter().rev().find(|it| it.live))
            }
        };
        let folder = || {
            wanted.map_or_else(|| self.folder(), |wanted| self.folder().join(wanted.to_string()))
        };
        let found = found.ok_or_else(|| ViewError::NoGeneration { folder: folder() })?;
        Ok((found, views.of_version(&self.name, found.version)))
    }

    /// The same, opened for reading.
    pub(super) fn open<'v>(
        &self,
        wanted: Option<GenerationName>,
        views: &'v Views,
    ) -> Result<(AtRest, &Generation, Option<&'v Code>), Failure> {
        let (generation, code) = self.generation(wanted, views)?;
        let at_rest = AtRest::open(generation.folder())?
            .ok_or_else(|| ViewFailure::Empty { folder: generation.folder().to_owned() })?;
        Ok((at_rest, generation, code))
    }

    /// The journals that the rows are of: those of the live generation of `version`, else of the newest one that has any;
    /// `None` if there are no rows. What can't be read isn't passed over: opened with other journals, the view would be
    /// set aside.
    pub(super) fn journals(&self, version: u32) -> Result<Option<Vec<JournalId>>, Failure> {
        let live = || self.generations.iter().rev().filter(|it| it.live);
        let own = live().filter(|it| it.version == version);
        for generation in own.chain(live().filter(|it| it.version != version)) {
            if let Some(at_rest) = AtRest::open(generation.folder())? {
                return Ok(Some(at_rest.checkpoints().iter().map(|it| it.journal).collect()));
            }
        }
        Ok(None)
    }

    /// The newest code of the view, for what can't be done without.
    pub(super) fn code<'v>(&self, views: &'v Views) -> Result<&'v Code, Failure> {
        let missing = || ViewFailure::NoCode { view: self.name.clone() };
        Ok(views.newest(&self.name).ok_or_else(missing)?)
    }
}

/// The journal that `dir` stands for, and those of the mirrors in a store.
pub(super) fn places(dir: &Path) -> Vec<Place> {
    let own = Place::new("own".to_owned(), dir);
    let mirrors = target::mirrors(own.views.parent().unwrap_or(dir)).into_iter();
    let mirrors = mirrors.map(|(name, path)| Place::new(format!("mirrors/{name}"), &path));
    std::iter::once(own.clone()).chain(mirrors).collect()
}

/// The views of a journal, sorted by name, and those of which nobody knows what there is, with why.
pub(super) fn views_of(place: &Place) -> Vec<Result<Located, (String, ViewError)>> {
    let Ok(entries) = std::fs::read_dir(&place.views) else { return Vec::new() };
    let names = entries.filter_map(Result::ok).filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> =
        names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| !name.starts_with('.')); // what several views have in common
    names.sort();
    let view =
        |name: String| located(place, Vec::new(), name.clone()).map_err(|error| (name, error));
    names.into_iter().map(view).collect()
}

fn located(place: &Place, places: Vec<Place>, name: String) -> Result<Located, ViewError> {
    let mut generations = generations(&place.views.join(&name))?;
    generations.sort_by_key(|it| (it.version, it.number));
    Ok(Located { places, place: place.clone(), name, generations })
}

/// The view `name` of the journal that `dir` stands for, or of the only mirror that has one.
pub(super) fn view(dir: &Path, name: &str) -> Result<Located, Failure> {
    let has_it = |place: &Place| place.views.join(name).is_dir();
    let is_name = !name.contains(['/', '\\', '.']) && !name.is_empty();
    let all = places(dir);
    let mut found = all.iter().filter(|place| is_name && has_it(place)).cloned();
    let missing = || ViewFailure::NoView { view: name.to_owned(), dir: dir.to_owned() };
    let place = found.next().ok_or_else(missing)?;
    if place.label != "own" {
        let others: Vec<String> = found.by_ref().map(|place| place.label).collect();
        if !others.is_empty() {
            let places = [vec![place.label.clone()], others].concat();
            return Err(ViewFailure::OfSeveral { view: name.to_owned(), places }.into());
        }
    }
    drop(found);
    Ok(located(&place, all, name.to_owned())?)
}
