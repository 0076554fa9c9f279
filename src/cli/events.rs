//! Events as lines: of text for people, of JSON for programs.

use std::io::{self, Write};

use crate::{PayloadCodec, Recorded};
use serde::Serialize;

use super::failure::Failure;
use crate::calendar::civil;

/// Prints one event as a line.
pub(crate) fn print(out: &mut impl Write, event: &Recorded, json: bool) -> Result<(), Failure> {
    if json { print_json(out, event) } else { Ok(print_text(out, event)?) }
}

fn print_text(out: &mut impl Write, event: &Recorded) -> io::Result<()> {
    write!(
        out,
        "{:>8}  {}  {}@{}  {} v{}  ",
        event.position(),
        Time(event.recorded_at_us()),
        event.stream(),
        event.revision(),
        event.event_type(),
        event.schema_version(),
    )?;
    match Shown::of(event) {
        Shown::Json(text) | Shown::Text(text) => out.write_all(text.as_bytes())?,
        Shown::Hex(hex) => write!(out, "0x{hex}")?,
    }
    out.write_all(b"\n")
}

/// The fields of an event in JSON, but for its payload.
#[derive(Serialize)]
struct Line<'a> {
    position: u64,
    recorded_at: String,
    recorded_at_us: i64,
    id: String,
    stream: &'a str,
    revision: u64,
    #[serde(rename = "type")]
    event_type: &'a str,
    schema_version: u32,
    codec: String,
    tags: &'a [String],
    metadata: &'a [(String, String)],
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causation: Option<Cause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    occurred_at_us: Option<i64>,
}

#[derive(Serialize)]
struct Cause {
    journal: String,
    position: u64,
}

fn print_json(out: &mut impl Write, event: &Recorded) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(&Line {
        position: event.position().get(),
        recorded_at: Time(event.recorded_at_us()).to_string(),
        recorded_at_us: event.recorded_at_us(),
        id: event.id().to_string(),
        stream: event.stream().as_str(),
        revision: event.revision().get(),
        event_type: event.event_type().as_str(),
        schema_version: event.schema_version(),
        codec: event.codec().to_string(),
        tags: event.tags(),
        metadata: event.metadata(),
        subject: event.subject(),
        correlation: event.correlation().map(|id| id.to_string()),
        causation: event.causation().map(|cause| Cause {
            journal: cause.journal.to_string(),
            position: cause.position.get(),
        }),
        occurred_at_us: event.occurred_at_us(),
    })?;
    line.pop(); // the closing brace: the payload's own JSON goes in front of it, as it was stored
    match Shown::of(event) {
        Shown::Json(json) => {
            line.extend_from_slice(b",\"payload\":");
            line.extend_from_slice(json.as_bytes());
        }
        Shown::Text(text) => {
            line.extend_from_slice(b",\"payload_text\":");
            serde_json::to_writer(&mut line, &text)?;
        }
        Shown::Hex(hex) => {
            line.extend_from_slice(b",\"payload_hex\":");
            serde_json::to_writer(&mut line, &hex)?;
        }
    }
    line.extend_from_slice(b"}\n");
    Ok(out.write_all(&line)?)
}

/// A payload in the most readable form that loses nothing.
enum Shown {
    /// JSON on one line.
    Json(String),
    /// Text without control characters.
    Text(String),
    Hex(String),
}

impl Shown {
    fn of(event: &Recorded) -> Self {
        let text = std::str::from_utf8(event.data());
        match (event.codec(), text) {
            (PayloadCodec::Json, Ok(text))
                if serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok() =>
            {
                Self::Json(without_blanks(text))
            }
            (_, Ok(text)) if !text.chars().any(char::is_control) => Self::Text(text.to_owned()),
            _ => Self::Hex(event.data().iter().map(|byte| format!("{byte:02x}")).collect()),
        }
    }
}

/// Valid JSON without the blanks and line ends between its tokens. Parsing and printing it again would
/// reorder objects and round large numbers.
fn without_blanks(json: &str) -> String {
    let (mut in_string, mut escaped) = (false, false);
    json.chars()
        .filter(|&char| {
            let keep = in_string || !matches!(char, ' ' | '\t' | '\n' | '\r');
            match char {
                _ if escaped => escaped = false,
                '\\' => escaped = in_string,
                '"' => in_string = !in_string,
                _ => {}
            }
            keep
        })
        .collect()
}

/// Microseconds since 1970 as date and time in UTC (RFC 3339).
pub(crate) struct Time(pub(crate) i64);

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const DAY_US: i64 = 86_400_000_000;
        let (days, in_day_us) = (self.0.div_euclid(DAY_US), self.0.rem_euclid(DAY_US));
        let (year, month, day) = civil(days);
        let (seconds, us) = (in_day_us / 1_000_000, in_day_us % 1_000_000);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{us:06}Z")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_of_the_calendar() {
        for (us, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (-1, "1969-12-31T23:59:59.999999Z"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000Z"),
            (1_767_225_599_000_001, "2025-12-31T23:59:59.000001Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(Time(us).to_string(), text);
        }
        assert!(!Time(i64::MAX).to_string().is_empty() && !Time(i64::MIN).to_string().is_empty());
    }

    #[test]
    fn blanks_between_json_tokens_are_dropped_and_nothing_else() {
        let json = "{ \"a b\" :\t[1.50,\n18446744073709551616 ], \"q\\\" \\\\\" : \" x \" }\r\n";
        let short = "{\"a b\":[1.50,18446744073709551616],\"q\\\" \\\\\":\" x \"}";
        assert_eq!(without_blanks(json), short);
    }
}
