//! The code of a view without its types: for the command line.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::at_rest::{self, AtRest};
use super::control::ViewControl;
use super::error::ViewError;
use super::key::{KeySpelling, ViewKey};
use super::program::{Keyed, Program};
use super::rebuild::{Comparison, RebuildError, RebuildHandle, RebuildOptions};
use super::sources::Sources;
use super::tables::Tabled;
use super::{Indexes, TableView, View, ViewOptions, generation, runner};
use crate::codec::{Bincode, Codec, CodecError};

/// How the rows of a view or of a table are written by people.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowSpelling {
    pub(crate) key: KeySpelling,
    /// A row in JSON; `None` if JSON has no form for it.
    pub(crate) row_to_json: fn(&[u8]) -> Result<Option<String>, CodecError>,
}

impl RowSpelling {
    pub(super) fn of<K: ViewKey, R: Serialize + DeserializeOwned>() -> Self {
        let row_to_json = |row: &[u8]| {
            let row: R = Bincode::decode(row)?;
            Ok(serde_json::to_string(&row).ok())
        };
        Self { key: KeySpelling::of::<K>(), row_to_json }
    }
}

/// How what is in a view is written by people.
#[derive(Debug)]
pub(crate) enum Spelling {
    Rows { rows: RowSpelling, indexes: Vec<(&'static str, KeySpelling)> },
    Tables(Vec<(&'static str, RowSpelling)>),
}

/// A view whose code is at hand.
pub(crate) struct Code {
    pub(crate) name: &'static str,
    pub(crate) version: u32,
    pub(crate) spelling: Spelling,
    options: ViewOptions,
    /// Why it can't be opened at all.
    refused: Option<ViewError>,
    program: Arc<dyn Mounted>,
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.name, self.version)
    }
}

impl Code {
    pub(crate) fn of<V: View>(view: V, options: ViewOptions) -> Self {
        let indexes = Indexes::of(&view);
        let rows = RowSpelling::of::<V::Key, V::Row>();
        let spelling = Spelling::Rows { rows, indexes: indexes.spellings() };
        Self::new(Keyed(view), spelling, options, indexes.check())
    }

    pub(crate) fn of_tables<T: TableView>(view: T, options: ViewOptions) -> Self {
        let program = Tabled::new(view);
        let spelling = Spelling::Tables(program.tables().spellings());
        let checked = program.tables().check(T::NAME);
        Self::new(program, spelling, options, checked)
    }

    fn new<P: Program>(
        program: P,
        spelling: Spelling,
        options: ViewOptions,
        checked: Result<(), ViewError>,
    ) -> Self {
        let refused = match generation::is_valid_name(P::NAME) {
            true => checked.err(),
            false => Some(ViewError::InvalidName { name: P::NAME }),
        };
        let options = ViewOptions { inline: false, ..options }; // nobody appends
        let (name, version, program) = (P::NAME, P::VERSION, Arc::new(program));
        Self { name, version, spelling, options, refused, program }
    }

    /// Opens the view, as its service does; what is to be built first, with these options.
    pub(crate) fn open(
        &self,
        views_dir: &Path,
        sources: Sources,
        building: RebuildOptions,
    ) -> Result<ViewControl, ViewError> {
        self.refused.clone().map_or(Ok(()), Err)?;
        let options = ViewOptions { building, ..self.options.clone() };
        Arc::clone(&self.program).open(views_dir, sources, options)
    }

    /// [`at_rest::check`].
    pub(crate) fn check(
        &self,
        at_rest: &AtRest,
        sources: &Sources,
        dir: &Path,
        options: &RebuildOptions,
        watched: &RebuildHandle,
    ) -> Result<Comparison, RebuildError> {
        self.refused.clone().map_or(Ok(()), Err)?;
        self.program.check_at_rest(at_rest, sources, dir, options, watched)
    }
}

/// A program of any type.
trait Mounted: Send + Sync {
    fn open(
        self: Arc<Self>,
        views_dir: &Path,
        sources: Sources,
        options: ViewOptions,
    ) -> Result<ViewControl, ViewError>;

    fn check_at_rest(
        &self,
        at_rest: &AtRest,
        sources: &Sources,
        dir: &Path,
        options: &RebuildOptions,
        watched: &RebuildHandle,
    ) -> Result<Comparison, RebuildError>;
}

impl<P: Program> Mounted for P {
    fn open(
        self: Arc<Self>,
        views_dir: &Path,
        sources: Sources,
        options: ViewOptions,
    ) -> Result<ViewControl, ViewError> {
        let running = runner::start(views_dir, sources, Arc::clone(&self), options)?;
        Ok(ViewControl::new(running, self))
    }

    fn check_at_rest(
        &self,
        at_rest: &AtRest,
        sources: &Sources,
        dir: &Path,
        options: &RebuildOptions,
        watched: &RebuildHandle,
    ) -> Result<Comparison, RebuildError> {
        at_rest::check(at_rest, self, sources, dir, options, watched)
    }
}
