//! Keys as they are typed and printed.
//!
//! With the view's code, what was typed is JSON if it is a list, a string in quotes or `null`, and otherwise the text of
//! a value: `17`, `de`, `'["de",7]'`, or `de 7`. Without it: `0x00ff` are bytes, `u32:17` is a number of this width, and
//! everything else the text of a `String`; several of these, one behind the other.
//!
//! What begins like a list is one where keys are lists of their fields: a list that can't be read isn't looked for as a text
//! that nobody meant.

use std::fmt::Display;

use serde_json::Value;

use super::failure::ViewFailure;
use crate::cli::failure::Failure;
use crate::hex::{from_hex, hex};
use crate::view::{KeyError, KeySpelling, ViewKey};

/// Something in a form for people.
pub(super) enum Shown {
    Json(String),
    Bytes(Vec<u8>),
}

impl Shown {
    /// For a line of JSON: `"name":…`, or `"name_hex":"…"` for bytes.
    pub(super) fn field(&self, name: &str) -> String {
        match self {
            Self::Json(json) => format!("\"{name}\":{json}"),
            Self::Bytes(bytes) => format!("\"{name}_hex\":\"{}\"", hex(bytes)),
        }
    }
}

impl Display for Shown {
    /// JSON, or hexadecimal and what of it can be read.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Json(json) => f.write_str(json),
            Self::Bytes(bytes) => {
                write!(f, "0x{}", hex(bytes))?;
                if !bytes.iter().any(u8::is_ascii_graphic) {
                    return Ok(());
                }
                let plain = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
                let text =
                    bytes.iter().map(|byte| if plain(byte) { char::from(*byte) } else { '.' });
                write!(f, "  |{}|", text.collect::<String>())
            }
        }
    }
}

/// A key at the front of `input`, which is moved behind it. Without its code: all of it.
pub(super) fn show(
    view: &'static str,
    spelling: Option<&KeySpelling>,
    input: &mut &[u8],
) -> Result<Shown, Failure> {
    match spelling {
        None => Ok(Shown::Bytes(std::mem::take(input).to_vec())),
        Some(spelling) => {
            let key = (spelling.to_json)(input);
            let key = key.map_err(|source| crate::view::ViewReadError::Key { view, source })?;
            Ok(Shown::Json(key.to_string()))
        }
    }
}

/// The bytes of the key that was typed.
pub(super) fn whole(typed: &[String], spelling: Option<&KeySpelling>) -> Result<Vec<u8>, Failure> {
    match spelling {
        Some(spelling) => first_that_fits(typed, spelling, spelling.from_json),
        None => untyped(typed, |spelling| spelling.from_json),
    }
}

/// The bytes with which the keys begin that begin as was typed.
pub(super) fn start(typed: &str, spelling: Option<&KeySpelling>) -> Result<Vec<u8>, Failure> {
    let words = [typed.to_owned()];
    match spelling {
        Some(spelling) if typed.starts_with('[') && spelling.takes_lists() => {
            let list: Value = serde_json::from_str(typed).map_err(|error| {
                wrong(&words, Some(spelling), &format!("no list in JSON: {error}"))
            })?;
            (spelling.start_from_json)(&list).map_err(|error| wrong(&words, Some(spelling), &error))
        }
        Some(spelling) => first_that_fits(&words, spelling, spelling.start_from_json),
        None => untyped(&words, |spelling| spelling.start_from_json),
    }
}

type FromJson = fn(&Value) -> Result<Vec<u8>, KeyError>;

fn first_that_fits(
    typed: &[String],
    spelling: &KeySpelling,
    from_json: FromJson,
) -> Result<Vec<u8>, Failure> {
    let key = from_json(&meant(typed));
    let as_text =
        |error| from_json(&as_text(typed)).map_err(|_| wrong(typed, Some(spelling), &error));
    key.or_else(as_text)
}

fn wrong(typed: &[String], spelling: Option<&KeySpelling>, reason: &dyn Display) -> Failure {
    let typed = typed.join(" ");
    let keys = spelling.map(KeySpelling::type_name);
    ViewFailure::Key { typed, keys, reason: reason.to_string() }.into()
}

/// What was most likely meant.
fn meant(typed: &[String]) -> Value {
    let json = |text: &String| {
        let is_json = text.starts_with(['[', '"']) || text == "null";
        let parsed = is_json.then(|| serde_json::from_str(text).ok()).flatten();
        parsed.unwrap_or_else(|| Value::from(text.as_str()))
    };
    one_or_list(typed.iter().map(json).collect())
}

/// Every word as it stands there.
fn as_text(typed: &[String]) -> Value {
    one_or_list(typed.iter().map(|text| Value::from(text.as_str())).collect())
}

fn one_or_list(mut values: Vec<Value>) -> Value {
    match values.len() {
        0 => Value::Null,
        1 => values.remove(0),
        _ => Value::Array(values),
    }
}

/// The bytes of fields whose types are written in front of them.
fn untyped(typed: &[String], how: fn(&KeySpelling) -> FromJson) -> Result<Vec<u8>, Failure> {
    let field = |text: &String| {
        if let Some(digits) = text.strip_prefix("0x") {
            return from_hex(digits).ok_or(KeyError::Invalid("hexadecimal"));
        }
        let written = text.split_once(':').and_then(|(name, value)| Some((of_type(name)?, value)));
        let (spelling, value) =
            written.unwrap_or_else(|| (KeySpelling::of::<String>(), text.as_str()));
        how(&spelling)(&value.into())
    };
    let fields = typed.iter().map(|text| field(text).map_err(|error| wrong(typed, None, &error)));
    Ok(fields.collect::<Result<Vec<_>, _>>()?.concat())
}

fn of_type(name: &str) -> Option<KeySpelling> {
    fn of<K: ViewKey>() -> Option<KeySpelling> {
        Some(KeySpelling::of::<K>())
    }
    match name {
        "u8" => of::<u8>(),
        "u16" => of::<u16>(),
        "u32" => of::<u32>(),
        "u64" => of::<u64>(),
        "u128" => of::<u128>(),
        "i8" => of::<i8>(),
        "i16" => of::<i16>(),
        "i32" => of::<i32>(),
        "i64" => of::<i64>(),
        "i128" => of::<i128>(),
        "bool" => of::<bool>(),
        "str" => of::<String>(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed<K: ViewKey>(words: &[&str]) -> Option<K> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let bytes = whole(&words, Some(&KeySpelling::of::<K>())).ok()?;
        K::decode_key(&mut &bytes[..]).ok()
    }

    #[test]
    fn what_is_typed_is_the_key_that_was_meant() {
        assert_eq!(typed::<u32>(&["17"]), Some(17));
        assert_eq!(typed::<i8>(&["-17"]), Some(-17));
        assert_eq!(typed::<u32>(&["x"]), None);
        for (text, key) in [
            ("de", "de"),
            ("17", "17"),
            ("null", "null"),
            ("\"de\"", "de"),
            ("[x", "[x"),
            ("[1]", "[1]"),
            ("\"\\\"\"", "\""),
            ("", ""),
        ] {
            assert_eq!(typed::<String>(&[text]).as_deref(), Some(key), "{text}");
        }
        let pair = Some(("de".to_owned(), 7_u64));
        assert_eq!(typed(&["de", "7"]), pair);
        assert_eq!(typed(&["[\"de\",7]"]), pair);
        assert_eq!(typed(&["null", "7"]), Some(("null".to_owned(), 7_u64)));
        assert_eq!(typed::<(String, u64)>(&["de"]), None);
        assert_eq!(typed(&["null", "7"]), Some((None::<u8>, 7_u64)));
        assert_eq!(typed(&["null"]), Some(None::<u8>));
        assert_eq!(typed(&[]), Some(()));
        assert_eq!(typed(&["0x00ff"]), Some(vec![0_u8, 255]));
    }

    #[test]
    fn without_the_code_types_are_written_in_front() {
        let bytes = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            whole(&words, None).ok()
        };
        assert_eq!(bytes(&["u32:258"]), Some(vec![0, 0, 1, 2]));
        assert_eq!(bytes(&["i8:-1"]), Some(vec![0x7f]));
        assert_eq!(bytes(&["de", "u8:7"]), Some(b"de\x00\x01\x07".to_vec()));
        assert_eq!(bytes(&["str:u8:7"]), Some(b"u8:7\x00\x01".to_vec()));
        assert_eq!(bytes(&["order:7"]), Some(b"order:7\x00\x01".to_vec()));
        assert_eq!(bytes(&["0x00ff", "bool:true"]), Some(vec![0, 0xff, 1]));
        assert_eq!((bytes(&["u8:256"]), bytes(&["0x0"])), (None, None));
        assert_eq!(start("de", None).ok(), Some(b"de".to_vec()));
    }
}
