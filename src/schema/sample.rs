//! One recorded event in a file that people can read:
//!
//! ```text
//! headwater sample
//! type order.placed
//! version 2
//! codec bincode
//!
//! 11 fb e2 04 03 45 55 52                          |.....EUR|
//! ```
//!
//! Up to 16 bytes of the payload a line; what stands behind `|` is for people. The file's name,
//! `order.placed.2.bincode.1.hex`, follows from the contents, but for the number in it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, IoError};
use crate::event::PayloadCodec;
use crate::fs::{self, Fs, OpenMode};
use crate::schema::SchemaError;
use crate::upcast::RawEvent;

const FIRST_LINE: &str = "headwater sample";
const EXTENSION: &str = ".hex";
const BYTES_PER_LINE: usize = 16;
/// Of a name in a file's name, escaped; a file's name may have 255 bytes.
const NAME_BYTES_MAX: usize = 180;

/// No event is so large that its sample would be.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// A recorded event.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sample {
    /// Its file.
    pub path: PathBuf,
    /// What is recorded.
    pub event: RawEvent<'static>,
}

/// All samples in a directory, in the order of their files' names. Other files are left alone.
pub(super) fn read_all(fs: &dyn Fs, dir: &Path) -> Result<Vec<Sample>, SchemaError> {
    let mut samples = Vec::new();
    for name in fs.list(dir).context("listing", dir)? {
        if name.ends_with(EXTENSION) {
            let path = dir.join(&name);
            let bytes = read(fs, &path)?;
            let event = parse(&bytes).and_then(|event| is_named_for(&name, event));
            match event {
                Ok(event) => samples.push(Sample { path, event }),
                Err(what) => return Err(SchemaError::Unreadable { path, what }),
            }
        }
    }
    Ok(samples)
}

fn read(fs: &dyn Fs, path: &Path) -> Result<Vec<u8>, SchemaError> {
    let file = fs.open(path, OpenMode::Read).context("opening", path)?;
    let size = file.size().context("measuring", path)?;
    let len = usize::try_from(size).ok().filter(|_| size <= FILE_BYTES_MAX);
    let too_large = || SchemaError::Unreadable { path: path.to_owned(), what: "it is too large" };
    let mut bytes = vec![0; len.ok_or_else(too_large)?];
    let read = fs::read_full_at(&*file, &mut bytes, 0).context("reading", path)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Writes a sample under the number `number` of its kind, unless it is there; `None` then. A sample that is
/// there is never changed.
pub(super) fn write(
    fs: &dyn Fs,
    dir: &Path,
    event: &RawEvent<'_>,
    number: usize,
) -> Result<Option<PathBuf>, SchemaError> {
    let path = path(dir, event, number);
    let text = print(event);
    let file = match fs.open(&path, OpenMode::CreateNew) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return match read(fs, &path)? == text.as_bytes() {
                true => Ok(None),
                false => Err(SchemaError::Different { path }),
            };
        }
        opened => opened.context("creating", &path)?,
    };
    let written = fs::write_all_at(&*file, text.as_bytes(), 0).and_then(|()| file.sync_data());
    if let Err(error) = written {
        drop(fs.remove(&path)); // half of a sample would never be completed
        return Err(IoError::new("writing", &path, error).into());
    }
    fs.sync_dir(dir).context("syncing", dir)?;
    Ok(Some(path))
}

/// Where a sample lies.
pub(super) fn path(dir: &Path, event: &RawEvent<'_>, number: usize) -> PathBuf {
    dir.join(format!("{}.{number}{EXTENSION}", stem(event)))
}

/// The first part of a file's name: type, version, codec.
fn stem(event: &RawEvent<'_>) -> String {
    let mut name = String::new();
    for (at, byte) in event.name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(byte)),
            b'.' if at > 0 => name.push('.'),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    if name.len() > NAME_BYTES_MAX {
        let hash = twox_hash::XxHash3_64::oneshot(event.name.as_bytes());
        name.truncate(NAME_BYTES_MAX); // all of it is ASCII
        name.push_str(&format!("~{hash:016x}"));
    }
    format!("{name}.{}.{}", event.schema_version, event.codec)
}

/// A sample that was copied under another name would stand for what it isn't.
fn is_named_for(name: &str, event: RawEvent<'static>) -> Result<RawEvent<'static>, &'static str> {
    let number = name.strip_suffix(EXTENSION).and_then(|it| it.strip_prefix(&stem(&event)));
    match number.and_then(|number| number.strip_prefix('.')).map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(event),
        _ => Err("the file's name is not of the type, version and codec that are in it"),
    }
}

fn print(event: &RawEvent<'_>) -> String {
    let RawEvent { name, schema_version, codec, bytes } = event;
    let mut text =
        format!("{FIRST_LINE}\ntype {name}\nversion {schema_version}\ncodec {codec}\n\n");
    for line in bytes.chunks(BYTES_PER_LINE) {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let shown = |&byte: &u8| match byte {
            b' '..=b'~' => char::from(byte),
            _ => '.',
        };
        let shown: String = line.iter().map(shown).collect();
        text.push_str(&format!("{hex:width$} |{shown}|\n", width = 3 * BYTES_PER_LINE));
    }
    text
}

fn parse(bytes: &[u8]) -> Result<RawEvent<'static>, &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
    let mut lines = text.lines();
    if lines.next() != Some(FIRST_LINE) {
        return Err("its first line is not that of a sample");
    }
    let mut field = |name| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let name = field("type").ok_or("there is no line `type`")?;
    let version = field("version").and_then(|version| version.parse().ok());
    let version = version.ok_or("there is no valid line `version`")?;
    let codec = field("codec").and_then(codec_of).ok_or("there is no valid line `codec`")?;
    if lines.next() != Some("") {
        return Err("there is no empty line behind `codec`");
    }
    let mut payload = Vec::new();
    for line in lines {
        let hex = line.split('|').next().unwrap_or_default();
        for byte in hex.split_ascii_whitespace() {
            let digits = Some(byte).filter(|it| it.len() == 2 && !it.starts_with('+'));
            let byte = digits.and_then(|it| u8::from_str_radix(it, 16).ok());
            payload.push(byte.ok_or("there is something else than bytes in hexadecimal")?);
        }
    }
    Ok(RawEvent {
        name: Cow::Owned(name.to_owned()),
        schema_version: version,
        codec,
        bytes: Cow::Owned(payload),
    })
}

fn codec_of(name: &str) -> Option<PayloadCodec> {
    match name {
        "raw" => Some(PayloadCodec::Raw),
        "bincode" => Some(PayloadCodec::Bincode),
        "json" => Some(PayloadCodec::Json),
        other => Some(PayloadCodec::from_byte(other.strip_prefix("codec-")?.parse().ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(name: &str, codec: PayloadCodec, bytes: Vec<u8>) -> RawEvent<'static> {
        let name = Cow::Owned(name.to_owned());
        RawEvent { name, schema_version: 2, codec, bytes: Cow::Owned(bytes) }
    }

    #[test]
    fn a_sample_is_printed_as_described() {
        let event = event("order.placed", PayloadCodec::Bincode, b"\x11\xfb\xe2\x04\x03EUR".into());
        let text = "headwater sample\ntype order.placed\nversion 2\ncodec bincode\n\n\
                    11 fb e2 04 03 45 55 52                          |.....EUR|\n";
        assert_eq!(print(&event), text);
        assert_eq!(path(Path::new(""), &event, 1), Path::new("order.placed.2.bincode.1.hex"));
    }

    proptest! {
        #[test]
        fn what_was_printed_is_parsed_and_named_for_itself(
            name in "[^\\p{Cc}]{1,80}", codec: u8, bytes: Vec<u8>, number in 1_usize..1000,
        ) {
            let event = event(&name, PayloadCodec::from_byte(codec), bytes);
            prop_assert_eq!(parse(print(&event).as_bytes()), Ok(event.clone()));
            let path = path(Path::new("dir"), &event, number);
            prop_assert_eq!(path.parent(), Some(Path::new("dir")));
            let name = path.file_name().unwrap().to_str().unwrap();
            prop_assert!(name.len() <= 255 && !name.starts_with('.'));
            prop_assert_eq!(is_named_for(name, event.clone()), Ok(event));
        }

        #[test]
        fn whatever_is_in_a_file_it_is_parsed_or_refused(text in "\\PC{0,200}", cut: usize) {
            drop(parse(text.as_bytes()));
            let whole = print(&event("a", PayloadCodec::Json, text.into_bytes()));
            drop(parse(&whole.as_bytes()[..cut % whole.len()]));
        }
    }
}
