//! The proof that the code reads every event that was ever written.
//!
//! ```text
//!  record ──▶ a directory in the repository: one sample and more of each (type, version)
//!                │                                     │
//!  check ◀───────╯ in a test of the service            ╰──────▶ `headwater schema check`: is there a sample
//!                  does the code read them all?                 of every kind of event in this journal?
//! ```
//!
//! A sample is recorded once, when its version is new, and never changed or removed: the directory remembers
//! what the code has forgotten. Use one directory for each event type.
//!
//! What [`check`] finds:
//! - a sample that can't be decoded or upcast any more, or whose type or version nothing reads any more;
//! - a payload whose layout was changed without raising its version: what is written now isn't what was
//!   recorded, or a recorded event isn't written as it was read;
//! - kinds of events without a sample, so that nothing is left unproven.

mod sample;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::codec::CodecError;
use crate::error::{IoContext, IoError, ReadError};
use crate::event::{Event, EventKind, PayloadCodec};
use crate::format::record::RecordRef;
use crate::fs::{Fs, os::OsFs};
use crate::journal::Journal;
use crate::position::Position;
use crate::upcast::{Decoded, RawEvent};

pub use sample::Sample;

/// Records samples of the present kinds of events: values of each, made by the code. Several of one kind are
/// worth it where payloads hold enums. Returns the files that are new; add them to the repository.
///
/// # Errors
/// [`SchemaError::Different`] if another value was recorded in an event's place; others if the directory
/// can't be written or a value can't be encoded. What was recorded in front of the error stays.
pub fn record<E: Event>(dir: impl AsRef<Path>, samples: &[E]) -> Result<Vec<PathBuf>, SchemaError> {
    let dir = dir.as_ref();
    OsFs.create_dir_all(dir).context("creating", dir)?;
    let mut new = Vec::new();
    for (number, _, event) in encoded(samples)? {
        new.extend(sample::write(&OsFs, dir, &event, number)?);
    }
    Ok(new)
}

/// Records one event of a version that the code no longer writes, as when samples are begun late. Returns its
/// file, if it is new.
///
/// ```
/// use headwater::{PayloadCodec, schema, upcast::RawEvent};
/// # let dir = tempfile::tempdir()?;
/// let dir = dir.path().join("schema");
/// let old = RawEvent::encode("order.placed", 1, PayloadCodec::Bincode, &1250_u64)?;
/// assert!(schema::record_raw(&dir, &old)?.is_some());
/// assert_eq!(schema::record_raw(&dir, &old)?, None);
/// assert_eq!(schema::samples(&dir)?[0].event, old);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`record`].
pub fn record_raw(
    dir: impl AsRef<Path>,
    event: &RawEvent<'_>,
) -> Result<Option<PathBuf>, SchemaError> {
    let dir = dir.as_ref();
    OsFs.create_dir_all(dir).context("creating", dir)?;
    sample::write(&OsFs, dir, event, 1)
}

/// All samples in a directory.
///
/// # Errors
/// [`SchemaError::Unreadable`] if a file `*.hex` there is no sample; [`SchemaError::Io`].
pub fn samples(dir: impl AsRef<Path>) -> Result<Vec<Sample>, SchemaError> {
    sample::read_all(&OsFs, dir.as_ref())
}

/// Proves that the code reads every sample in `dir` and writes what it wrote: one line in a test of the
/// service. `samples` are the values that [`record`] was given.
///
/// ```
/// use headwater::schema;
///
/// headwater::events! {
///     /// What happens to an order.
///     #[derive(Copy, Eq)]
///     enum OrderEvent {
///         Placed(u64) = "order.placed", version 1;
///     }
/// }
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path().join("schema");
///
/// let samples = [OrderEvent::Placed(1250)];
/// schema::record(&dir, &samples)?; // once for each new version; the files belong to the repository
/// schema::check(&dir, &samples)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`SchemaError::Findings`] with everything that was found; others if the samples can't be read or a value
/// can't be encoded.
pub fn check<E: Event>(dir: impl AsRef<Path>, samples: &[E]) -> Result<Proof, SchemaError> {
    let dir = dir.as_ref();
    let recorded = self::samples(dir)?;
    let mut findings = Vec::new();
    for sample in &recorded {
        findings.extend(check_recorded::<E>(sample));
    }
    check_written(dir, samples, &recorded, &mut findings)?;
    check_kinds::<E>(samples, &recorded, &mut findings);
    match findings.is_empty() {
        true => Ok(Proof { samples: recorded.len(), kinds: E::KINDS.len() }),
        false => Err(SchemaError::Findings(Findings(findings))),
    }
}

/// What [`check`] has proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proof {
    /// So many samples are read.
    pub samples: usize,
    /// So many kinds of events have one.
    pub kinds: usize,
}

/// The events with their numbers among those of the same kind, from 1.
fn encoded<E: Event>(
    samples: &[E],
) -> Result<Vec<(usize, EventKind, RawEvent<'static>)>, SchemaError> {
    let mut counts: BTreeMap<(&str, u32, u8), usize> = BTreeMap::new();
    let mut encoded = Vec::with_capacity(samples.len());
    for value in samples {
        let kind = value.kind();
        let event = raw(value).map_err(|source| SchemaError::Encode { kind, source })?;
        let count = counts.entry((kind.name, kind.schema_version, event.codec.to_byte()));
        let number = count.or_default();
        *number += 1;
        encoded.push((*number, kind, event));
    }
    Ok(encoded)
}

fn raw<E: Event>(value: &E) -> Result<RawEvent<'static>, CodecError> {
    let EventKind { name, schema_version } = value.kind();
    let (codec, bytes) = value.encode()?;
    Ok(RawEvent { name: name.into(), schema_version, codec, bytes: bytes.into() })
}

/// Whether the code still reads a sample, and writes it as it was.
fn check_recorded<E: Event>(sample: &Sample) -> Option<Finding> {
    let (event, path) = (&sample.event, sample.path.clone());
    let (name, version) = (event.name.to_string(), event.schema_version);
    let known = E::KINDS.iter().find(|known| is_of(event, known.kind));
    let Some(known) = known else { return Some(Finding::Vanished { path, name, version }) };
    match E::decode(event.kind(), event.payload()) {
        Err(source) => Some(Finding::Undecodable { path, name, version, source }),
        Ok(Decoded::Foreign) => Some(Finding::Vanished { path, name, version }),
        Ok(Decoded::One(value)) if !known.is_past => {
            let same = match raw(&value) {
                Ok(again) => again.codec != event.codec || again == *event,
                Err(_) => false,
            };
            (!same).then_some(Finding::Changed { path, name, version })
        }
        Ok(_) => None,
    }
}

/// Whether what is written now is what was recorded.
fn check_written<E: Event>(
    dir: &Path,
    samples: &[E],
    recorded: &[Sample],
    findings: &mut Vec<Finding>,
) -> Result<(), SchemaError> {
    for (number, kind, event) in encoded(samples)? {
        let (name, version) = (kind.name.to_owned(), kind.schema_version);
        let path = sample::path(dir, &event, number);
        match recorded.iter().find(|sample| sample.path == path) {
            None => findings.push(Finding::NotRecorded { name, version, codec: event.codec }),
            Some(sample) if sample.event != event => {
                let known = findings.iter().any(|finding| finding.path() == Some(&path));
                findings.extend((!known).then_some(Finding::Changed { path, name, version }));
            }
            Some(_) => {}
        }
        if !E::KINDS.iter().any(|known| known.kind == kind) {
            let (name, version) = (kind.name.to_owned(), kind.schema_version);
            findings.push(Finding::Unlisted { name, version });
        }
    }
    Ok(())
}

/// Whether every kind has a sample.
fn check_kinds<E: Event>(samples: &[E], recorded: &[Sample], findings: &mut Vec<Finding>) {
    for known in E::KINDS {
        let EventKind { name, schema_version: version } = known.kind;
        let name = name.to_owned();
        if known.is_past {
            if !recorded.iter().any(|sample| is_of(&sample.event, known.kind)) {
                findings.push(Finding::NoOldSample { name, version });
            }
        } else if !samples.iter().any(|value| value.kind() == known.kind) {
            findings.push(Finding::NoValue { name, version });
        }
    }
}

fn is_of(event: &RawEvent<'_>, kind: EventKind) -> bool {
    event.name == kind.name && event.schema_version == kind.schema_version
}

/// One thing that keeps the proof from being complete.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// Events of this kind were stored, and the event type doesn't know it any more.
    #[error("{}: nothing reads {name:?}, version {version}, any more", path.display())]
    Vanished {
        /// The sample.
        path: PathBuf,
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
    },
    /// Events of this kind were stored, and can't be decoded or upcast any more.
    #[error("{}: {name:?}, version {version}, can't be read: {source}", path.display())]
    Undecodable {
        /// The sample.
        path: PathBuf,
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
        /// Why not.
        source: CodecError,
    },
    /// The payload's layout is another one than when its version was recorded.
    #[error(
        "{}: {name:?}, version {version}, is written in another way than it was", path.display()
    )]
    Changed {
        /// The sample.
        path: PathBuf,
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
    },
    /// A value that was given is not recorded yet.
    #[error("{name:?}, version {version}, as {codec}, is not recorded yet")]
    NotRecorded {
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
        /// The value's codec.
        codec: PayloadCodec,
    },
    /// No value was given of a kind that is written.
    #[error("there is no value of {name:?}, version {version}, among the samples that were given")]
    NoValue {
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
    },
    /// No sample is recorded of a kind that only an upcaster reads.
    #[error("{name:?}, version {version}, is upcast, but no sample of it is recorded")]
    NoOldSample {
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
    },
    /// A value is of a kind that its type doesn't list.
    #[error("{name:?}, version {version}, is not among the kinds that its event type lists")]
    Unlisted {
        /// The type's name.
        name: String,
        /// The version.
        version: u32,
    },
}

impl Finding {
    /// A stable name of the kind of finding.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Vanished { .. } => "schema.vanished",
            Self::Undecodable { .. } => "schema.undecodable",
            Self::Changed { .. } => "schema.changed",
            Self::NotRecorded { .. } => "schema.not_recorded",
            Self::NoValue { .. } => "schema.no_value",
            Self::NoOldSample { .. } => "schema.no_old_sample",
            Self::Unlisted { .. } => "schema.unlisted",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Vanished { .. } => {
                "declare what becomes of it with upcast(…): events of it are in journals"
            }
            Self::Undecodable { .. } => {
                "undo the change of its payload, or raise the version and declare an upcaster"
            }
            Self::Changed { .. } => {
                "undo the change of its payload, or raise the version; if only the sample in the code is another one, put the recorded one back and add the new one behind it"
            }
            Self::NotRecorded { .. } => "record it with schema::record and keep its file",
            Self::NoValue { .. } => "give a value of it to schema::record and schema::check",
            Self::NoOldSample { .. } => "record an event of it with schema::record_raw",
            Self::Unlisted { .. } => "add it to the KINDS of its event type",
        }
    }

    const fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Vanished { path, .. }
            | Self::Undecodable { path, .. }
            | Self::Changed { path, .. } => Some(path),
            _ => None,
        }
    }
}

/// Everything that [`check`] found; one line each, with what to do about it.
pub struct Findings(Vec<Finding>);

impl Findings {
    /// The findings; at least one.
    pub fn iter(&self) -> std::slice::Iter<'_, Finding> {
        self.0.iter()
    }
}

impl<'a> IntoIterator for &'a Findings {
    type Item = &'a Finding;
    type IntoIter = std::slice::Iter<'a, Finding>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} findings", self.0.len())?;
        for finding in &self.0 {
            write!(f, "\n{}: {finding}\n  hint: {}", finding.code(), finding.hint())?;
        }
        Ok(())
    }
}

// As text: it is what a failed test shows.
impl fmt::Debug for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why samples can't be recorded or checked, or what the check found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchemaError {
    /// The code doesn't read everything, or not everything is recorded.
    #[error("{0}")]
    Findings(Findings),
    /// Another event is recorded in this one's place.
    #[error("{}: another sample is recorded there", path.display())]
    Different {
        /// The sample.
        path: PathBuf,
    },
    /// A file is no sample.
    #[error("{}: not a sample: {what}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A value can't be encoded.
    #[error("{:?}, version {}, can't be encoded: {source}", kind.name, kind.schema_version)]
    Encode {
        /// Of which kind.
        kind: EventKind,
        /// Why not.
        source: CodecError,
    },
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl SchemaError {
    /// A stable name of the kind of error.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Findings(_) => "schema.findings",
            Self::Different { .. } => "schema.different",
            Self::Unreadable { .. } => "schema.unreadable",
            Self::Encode { .. } => "schema.encode",
            Self::Io(_) => "schema.io",
        }
    }

    /// What to do about it.
    #[must_use]
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Findings(_) => "each finding has its own hint",
            Self::Different { .. } => {
                "what was recorded never changes: raise the version if the payload's layout is another one, or add the new sample behind the old one"
            }
            Self::Unreadable { .. } => "bring the file back as it was recorded",
            Self::Encode { .. } => "use a payload that its codec can represent",
            Self::Io(_) => "see the system's error",
        }
    }
}

/// A kind of events in a journal: type, version and codec.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredKind {
    /// The type's name.
    pub name: String,
    /// Version of the payload's schema.
    pub schema_version: u32,
    /// How the payloads are encoded.
    pub codec: PayloadCodec,
    /// How many events there are.
    pub events: u64,
    /// The first of them.
    pub first: Position,
}

impl StoredKind {
    #[cfg(feature = "cli")]
    pub(crate) fn is_same_kind(&self, other: &Self) -> bool {
        (&self.name, self.schema_version, self.codec)
            == (&other.name, other.schema_version, other.codec)
    }

    /// Whether there is a sample of it among these.
    #[must_use]
    pub fn is_recorded(&self, samples: &[Sample]) -> bool {
        samples.iter().map(|sample| &sample.event).any(|event| {
            event.name == self.name.as_str()
                && (event.schema_version, event.codec) == (self.schema_version, self.codec)
        })
    }
}

/// All kinds of events that a journal holds up to its durable end, by name, version and codec. Reads the
/// whole journal; the memory it needs is that of the names.
///
/// # Errors
/// [`ReadError`] if the journal can't be read to its end.
pub fn stored_kinds(journal: &Journal) -> Result<Vec<StoredKind>, ReadError> {
    let mut kinds = Kinds::default();
    for_each_record(journal, |position, record| kinds.add(position, record))?;
    Ok(kinds.into_vec())
}

/// Kinds of events, counted.
#[derive(Default)]
pub(crate) struct Kinds(BTreeMap<String, BTreeMap<(u32, u8), StoredKind>>);

impl Kinds {
    /// One more of its kind.
    pub(crate) fn add(&mut self, position: Position, record: &RecordRef<'_>) {
        let (name, schema_version, codec) =
            (record.event_type, record.schema_version, record.codec);
        let of_name = match self.0.get_mut(name) {
            Some(of_name) => of_name,
            None => self.0.entry(name.to_owned()).or_default(),
        };
        let kind = of_name.entry((schema_version, codec.to_byte())).or_insert_with(|| StoredKind {
            name: name.to_owned(),
            schema_version,
            codec,
            events: 0,
            first: position,
        });
        kind.events += 1;
    }

    /// By name, version and codec.
    pub(crate) fn into_vec(self) -> Vec<StoredKind> {
        self.0.into_values().flat_map(BTreeMap::into_values).collect()
    }
}

/// Looks at all events up to the journal's durable end, in order.
pub(crate) fn for_each_record(
    journal: &Journal,
    mut look: impl FnMut(Position, &RecordRef<'_>),
) -> Result<(), ReadError> {
    let mut cursor = journal.cursor(journal.start().position)?;
    while let Some(batch) = cursor.next_batch()? {
        let mut position = batch.batch.header.base_position;
        for record in batch.batch.records() {
            let record = record.map_err(|error| batch.unreadable(journal, error))?;
            look(position, &record);
            position = position.advance(1);
        }
    }
    Ok(())
}
