//! The file `manifest`: what a base holds.

use std::path::Path;

use super::{BaseError, CODEC, DEADLY, DISCARDED, INTAKE, MANIFEST, ROWS, ViewBase};
use crate::error::IoContext;
use crate::format::{crc32, in_front_of_crc};
use crate::fs::{Fs, OpenMode, read_exact_at};
use crate::hex::{from_hex, hex};
use crate::journal::layout::MANIFEST_BYTES_MAX;
use crate::position::Checkpoint;
use crate::view::db::{Identity, LAYOUT, Progress};
use crate::view::error::ViewError;
use crate::view::poison::ParkedCounts;
use crate::view::rebuild::Digest;
use crate::view::sources::Checkpoints;

const HEAD: &str = "headwater view base ";
const FORMAT: u32 = 1;

/// What a base holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) view: String,
    pub(super) version: u32,
    pub(super) layout: u32,
    pub(super) codec: String,
    pub(super) indexes: Vec<String>,
    pub(super) tables: Vec<String>,
    pub(super) progress: Progress,
    pub(super) digest: Digest,
    pub(super) files: Vec<Listed>,
}

/// A file of a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    /// Relative to the base.
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) hash: [u8; 32],
}

impl Listed {
    /// Its name in a generation; `None` if it isn't one of the database's.
    pub(super) fn row_file(&self) -> Option<&str> {
        self.name.strip_prefix(ROWS)?.strip_prefix('/')
    }
}

/// Whether it may be the name of a file in a base: nothing that leads out of it.
fn is_file_name(name: &str) -> bool {
    let plain = |it: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !it.is_empty() && !it.starts_with('.') && it.bytes().all(allowed)
    };
    match name.split_once('/') {
        Some((ROWS, name)) => plain(name),
        Some(_) => false,
        None => [DISCARDED, DEADLY, INTAKE].contains(&name),
    }
}

impl Manifest {
    /// Reads that of the base in `dir`.
    pub(super) fn read(fs: &dyn Fs, dir: &Path) -> Result<Self, ViewError> {
        const ACTION: &str = "reading the manifest of a base";
        let path = dir.join(MANIFEST);
        let file = match fs.open(&path, OpenMode::Read) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(BaseError::NotABase { dir: dir.to_owned() }.into());
            }
            file => file.context(ACTION, &path)?,
        };
        let what = "its manifest isn't whole";
        let damaged = || BaseError::Damaged { path: path.clone(), what };
        let size = file.size().context(ACTION, &path)?;
        if size > MANIFEST_BYTES_MAX {
            return Err(damaged().into());
        }
        let mut bytes = vec![0; usize::try_from(size).map_err(|_| damaged())?];
        read_exact_at(&*file, &mut bytes, 0).context(ACTION, &path)?;
        let text = str::from_utf8(&bytes).map_err(|_| damaged())?;
        let body = in_front_of_crc(text).ok_or_else(damaged)?;
        let format = body.lines().next().and_then(|head| head.strip_prefix(HEAD));
        match format.and_then(|format| format.parse::<u32>().ok()) {
            Some(FORMAT) => Ok(Self::parse(body).ok_or_else(damaged)?),
            Some(later) if later > FORMAT => Err(BaseError::Unsupported { path }.into()),
            _ => Err(damaged().into()),
        }
    }

    pub(super) fn text(&self) -> String {
        let Progress { checkpoints, skipped_events, parked } = &self.progress;
        let ParkedCounts { keys, events, unrouted } = parked;
        let mut text = format!("{HEAD}{FORMAT}\nview {} {}\n", self.view, self.version);
        text += &format!("layout {}\ncodec {}\n", self.layout, self.codec);
        text.extend(self.indexes.iter().map(|name| format!("index {name}\n")));
        text.extend(self.tables.iter().map(|name| format!("table {name}\n")));
        text.extend(checkpoints.iter().map(|at| format!("journal {}\n", hex(&at.to_bytes()))));
        text += &format!("skipped {skipped_events}\nparked {keys} {events} {unrouted}\n");
        text += &format!("digest {} {}\n", self.digest.rows, hex(&self.digest.hash));
        for Listed { name, bytes, hash } in &self.files {
            text += &format!("file {name} {bytes} {}\n", hex(hash));
        }
        text += &format!("crc32 {:08x}\n", crc32(&[text.as_bytes()]));
        text
    }

    /// From the lines in front of the checksum.
    fn parse(body: &str) -> Option<Self> {
        let (mut view, mut layout, mut codec, mut skipped) = (None, None, None, None);
        let (mut parked, mut digest) = (None, None);
        let (mut indexes, mut tables) = (Vec::new(), Vec::new());
        let (mut checkpoints, mut files) = (Vec::new(), Vec::new());
        for line in body.lines().skip(1) {
            let (what, value) = line.split_once(' ')?;
            match what {
                "view" => {
                    let (name, version) = value.split_once(' ')?;
                    view = Some((name.to_owned(), version.parse().ok()?));
                }
                "layout" => layout = Some(value.parse().ok()?),
                "codec" => codec = Some(value.to_owned()),
                "index" => indexes.push(value.to_owned()),
                "table" => tables.push(value.to_owned()),
                "journal" => checkpoints.push(checkpoint(value)?),
                "skipped" => skipped = Some(value.parse().ok()?),
                "parked" => parked = Some(counts(value)?),
                "digest" => {
                    let (rows, hash) = value.split_once(' ')?;
                    digest = Some(Digest { rows: rows.parse().ok()?, hash: hash_of(hash)? });
                }
                "file" => files.push(listed(value)?),
                _ => return None,
            }
        }
        let (view, version) = view?;
        let checkpoints = Checkpoints::of_all(checkpoints.into_iter())?;
        let progress = Progress { checkpoints, skipped_events: skipped?, parked: parked? };
        let (layout, codec, digest) = (layout?, codec?, digest?);
        Some(Self { view, version, layout, codec, indexes, tables, progress, digest, files })
    }

    /// Refuses a base of anything but this.
    pub(super) fn check(&self, dir: &Path, identity: &Identity) -> Result<(), BaseError> {
        let one = |it: &str| vec![it.to_owned()];
        let all = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect();
        let compared: [(&'static str, Vec<String>, Vec<String>); 6] = [
            ("name", one(&self.view), one(identity.name)),
            ("version", one(&self.version.to_string()), one(&identity.version.to_string())),
            ("layout", one(&self.layout.to_string()), one(&LAYOUT.to_string())),
            ("codec of rows", one(&self.codec), one(CODEC)),
            ("indexes", self.indexes.clone(), all(&identity.indexes)),
            ("tables", self.tables.clone(), all(&identity.tables)),
        ];
        match compared.into_iter().find(|(_, found, wanted)| found != wanted) {
            None => Ok(()),
            Some((what, found, wanted)) => {
                let (found, wanted) = (found.join(", "), wanted.join(", "));
                Err(BaseError::Another { dir: dir.to_owned(), what, found, wanted })
            }
        }
    }

    pub(super) fn summary(&self) -> ViewBase {
        ViewBase {
            view: self.view.clone(),
            version: self.version,
            checkpoints: self.progress.checkpoints.iter().copied().collect(),
            digest: self.digest,
            skipped_events: self.progress.skipped_events,
            parked: self.progress.parked,
            bytes: self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)),
        }
    }
}

fn hash_of(text: &str) -> Option<[u8; 32]> {
    from_hex(text)?.try_into().ok()
}

fn checkpoint(text: &str) -> Option<Checkpoint> {
    Checkpoint::from_bytes(&from_hex(text)?.try_into().ok()?)
}

fn counts(text: &str) -> Option<ParkedCounts> {
    let mut numbers = text.split(' ').map(|number| number.parse().ok());
    let (keys, events, unrouted) = (numbers.next()??, numbers.next()??, numbers.next()??);
    numbers.next().is_none().then_some(ParkedCounts { keys, events, unrouted })
}

fn listed(text: &str) -> Option<Listed> {
    let mut fields = text.split(' ');
    let name = fields.next().filter(|name| is_file_name(name))?.to_owned();
    let (bytes, hash) = (fields.next()?.parse().ok()?, hash_of(fields.next()?)?);
    fields.next().is_none().then_some(Listed { name, bytes, hash })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Chain, Incarnation, JournalId, Position};

    fn manifest() -> Manifest {
        let at = |id, position| Checkpoint {
            journal: JournalId::from_bytes([id; 16]),
            epoch: 3,
            incarnation: Incarnation::new(9),
            offset: position * 64,
            position: Position::new(position),
            chain: Chain::from_bytes([5; 16]),
        };
        let file =
            |name: &str, bytes| Listed { name: name.to_owned(), bytes, hash: [bytes as u8; 32] };
        Manifest {
            view: "orders_by-day2".to_owned(),
            version: 7,
            layout: LAYOUT,
            codec: CODEC.to_owned(),
            indexes: vec!["by day".to_owned(), "by-customer".to_owned()],
            tables: vec!["orders".to_owned()],
            progress: Progress {
                checkpoints: Checkpoints::of_all([at(1, 40), at(2, 50)].into_iter()).unwrap(),
                skipped_events: 3,
                parked: ParkedCounts { keys: 1, events: 2, unrouted: 4 },
            },
            digest: Digest { rows: 41, hash: [0xab; 32] },
            files: vec![file("rows/CURRENT", 16), file("rows/000012.sst", 99), file(DISCARDED, 7)],
        }
    }

    fn read(bytes: &[u8]) -> Result<Manifest, ViewError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MANIFEST), bytes).unwrap();
        Manifest::read(&crate::fs::os::OsFs, dir.path())
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_any_changed_byte_is_noticed() {
        let text = manifest().text();
        assert_eq!(read(text.as_bytes()).unwrap(), manifest());
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let error = read(&bytes).unwrap_err();
            let ViewError::Base(error) = error else { panic!("{at}: {error}") };
            assert!(matches!(*error, BaseError::Damaged { .. }), "{at}: {error}");
            assert!(read(&text.as_bytes()[..at]).is_err(), "cut at {at}");
        }
    }

    /// docs/format.md shows one.
    #[test]
    fn the_documented_manifest_is_one() {
        let text = include_str!("../../../docs/format.md");
        let blocks = text.split("```text\n").filter(|block| block.starts_with(HEAD));
        let shown: Vec<_> = blocks.map(|block| block.split("```").next().unwrap()).collect();
        let [shown] = shown.as_slice() else { panic!("{shown:?}") };
        let manifest = read(shown.as_bytes()).unwrap();
        assert_eq!(manifest.text(), *shown);
        assert_eq!(manifest.progress.checkpoints.first().position, Position::new(160));
    }

    /// A manifest that proves itself may still say anything.
    #[test]
    fn numbers_of_a_manifest_that_add_up_to_too_much_are_not_added_up_to_less() {
        let mut manifest = manifest();
        manifest.files.iter_mut().for_each(|file| file.bytes = u64::MAX - 1);
        let all = manifest.progress.checkpoints.iter().map(|at| Checkpoint {
            offset: u64::MAX - 1,
            position: Position::new(u64::MAX - 1),
            ..*at
        });
        manifest.progress.checkpoints =
            Checkpoints::of_all(all.collect::<Vec<_>>().into_iter()).unwrap();
        let manifest = read(manifest.text().as_bytes()).unwrap();
        assert_eq!(manifest.summary().bytes, u64::MAX);
        assert_eq!(manifest.progress.checkpoints.events(), u64::MAX);
        assert_eq!(manifest.progress.checkpoints.bytes(), u64::MAX);
        let dir = tempfile::tempdir().unwrap();
        let without = manifest.files.into_iter().filter(|file| file.row_file().is_some()).collect();
        let text = Manifest { files: without, ..manifest }.text();
        std::fs::write(dir.path().join(MANIFEST), text).unwrap();
        let os: std::sync::Arc<dyn Fs> = std::sync::Arc::new(crate::fs::os::OsFs);
        let import = crate::view::base::Import::open(&os, dir.path()).unwrap();
        assert_eq!(import.bytes(), u64::MAX);
    }

    fn with_crc(body: &str) -> String {
        format!("{body}crc32 {:08x}\n", crc32(&[body.as_bytes()]))
    }

    #[test]
    fn a_later_manifest_is_not_taken_for_a_damaged_one() {
        let error = read(with_crc("headwater view base 2\nnew 1\n").as_bytes()).unwrap_err();
        let ViewError::Base(error) = error else { panic!("{error}") };
        assert!(matches!(*error, BaseError::Unsupported { .. }), "{error}");
    }

    #[test]
    fn names_of_files_never_lead_out_of_the_base() {
        for name in
            ["rows/CURRENT", "rows/MANIFEST-000004", "rows/000012.sst", DISCARDED, DEADLY, INTAKE]
        {
            assert!(is_file_name(name), "{name}");
        }
        for name in ["", "rows/", "rows/..", "rows/.x", "rows/a/b", "../x", "/x", "x", "rows\\x"] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
