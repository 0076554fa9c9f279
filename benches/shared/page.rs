//! Pages of which a part is generated: what lies between two marks is written anew, the rest is kept.

use std::fs;
use std::path::Path;

/// A part's first and last line in a page.
pub(crate) struct Part {
    pub(crate) begin: &'static str,
    pub(crate) end: &'static str,
}

/// Writes `text` into a part of a page. Where there is no page, one is begun.
pub(crate) fn write(page: &Path, part: &Part, text: &str) -> Result<(), super::Error> {
    let old = match fs::read_to_string(page) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error.into()),
    };
    Ok(fs::write(page, replaced(&old, part, text)?)?)
}

/// A page without the part gets it at its end.
fn replaced(page: &str, Part { begin, end }: &Part, text: &str) -> Result<String, super::Error> {
    let text = text.trim_end();
    let Some((before, rest)) = page.split_once(begin) else {
        let gap = if page.is_empty() { "" } else { "\n" };
        return Ok(format!("{page}{gap}{begin}\n{text}\n{end}\n"));
    };
    let (_, after) = rest.split_once(end).ok_or_else(|| format!("{begin}: where does it end?"))?;
    Ok(format!("{before}{begin}\n{text}\n{end}{after}"))
}

/// `1,234,567`.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A time for people.
pub(crate) fn time(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 1e-5 => format!("{:.2} µs", seconds * 1e6),
        seconds if seconds < 1e-3 => format!("{:.0} µs", seconds * 1e6),
        seconds if seconds < 1.0 => format!("{:.2} ms", seconds * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

/// How many times.
pub(crate) fn ratio(times: f64) -> String {
    match times {
        times if times < 0.1 => format!("{times:.4}x"),
        times if times < 10.0 => format!("{times:.2}x"),
        times => format!("{}x", grouped(times)),
    }
}
