//! `headwater view get`, `scan` and `parked`: what is in a view.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use serde_json::{Value, json};

use super::failure::ViewFailure;
use super::find;
use super::keys::{self, Shown};
use super::mounted::Views;
use super::{GetArgs, ParkedArgs, ScanArgs};
use crate::cli::events::Time;
use crate::cli::failure::Failure;
use crate::view::at_rest::{AtRest, Found, Wanted};
use crate::view::{
    Code, Degraded, KeySpelling, ParkedEvent, ParkedEvents, ParkedKey, RowSpelling, Spelling,
    ViewReadError,
};

pub(super) fn get(args: &GetArgs, views: &Views) -> Result<(), Failure> {
    let located = find::view(&args.which.target.dir, &args.which.name)?;
    let (at_rest, _, code) = located.open(args.generation.generation, views)?;
    let (printer, table) = Printer::new(&at_rest, code, args.table.as_deref())?;
    let key = keys::whole(&args.key, printer.key())?;
    let row = at_rest.get(table, &key)?;
    let degraded = at_rest.degraded(&key)?;
    let mut out = io::stdout().lock();
    let row = row.map(|row| printer.row(&row)).transpose()?;
    let key = printer.show_key(&key)?;
    if args.which.target.json {
        let row = row.as_ref().map_or_else(|| "\"row\":null".to_owned(), |row| row.field("row"));
        let position = at_rest.events();
        let degraded = serde_json::to_string(&degraded.as_ref().map(ToString::to_string))?;
        let key = key.field("key");
        writeln!(out, "{{{key},{row},\"position\":{position},\"degraded\":{degraded}}}")?;
    } else if let Some(row) = &row {
        writeln!(out, "{row}")?;
    }
    out.flush()?;
    if let Some(degraded) = degraded.filter(|_| !args.which.target.json) {
        report_degraded(&degraded);
    }
    Ok(row.map(drop).ok_or_else(|| ViewFailure::NoRow { key: key.to_string() })?)
}

fn report_degraded(degraded: &Degraded) {
    // There is nobody to tell if standard error is closed as well.
    drop(writeln!(io::stderr(), "warning: the row is degraded: {degraded}"));
}

pub(super) fn scan(args: &ScanArgs, views: &Views) -> Result<(), Failure> {
    let located = find::view(&args.which.target.dir, &args.which.name)?;
    let (at_rest, _, code) = located.open(args.generation.generation, views)?;
    let (printer, table) = Printer::new(&at_rest, code, args.table.as_deref())?;
    let by = args.index.as_deref().map(|name| By::new(name, &at_rest, code, &located.name));
    let by = by.transpose()?;
    let spelling = by.as_ref().map_or_else(|| printer.key(), |by| Some(&by.spelling));
    let key = |typed: &String| keys::whole(std::slice::from_ref(typed), spelling);
    let wanted = Wanted {
        table,
        index: by.as_ref().map(|by| by.number),
        prefix: args.prefix.as_deref().map_or(Ok(Vec::new()), |it| keys::start(it, spelling))?,
        from: args.from.as_ref().map(key).transpose()?,
        to: args.to.as_ref().map(key).transpose()?,
        reverse: args.reverse,
        after: args.after.clone(),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut printed, mut last) = (0, None);
    for found in at_rest.scan(&wanted) {
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                out.flush()?;
                return Err(error.into());
            }
        };
        if args.limit.is_some_and(|limit| printed >= limit) {
            if let Some(token) = last {
                match args.which.target.json {
                    true => writeln!(out, "{}", json!({ "next": token }))?,
                    false => writeln!(out, "more: --after {token}")?,
                }
            }
            break;
        }
        let line = line(&printer, &at_rest, by.as_ref(), &found, args.which.target.json);
        match line {
            Ok(line) => writeln!(out, "{line}")?,
            Err(error) => {
                out.flush()?;
                return Err(error);
            }
        }
        (printed, last) = (printed + 1, Some(found.token));
    }
    out.flush()?;
    report_lacking(&at_rest, &located.name)
}

/// Rows of a scan don't say it themselves.
fn report_lacking(at_rest: &AtRest, name: &str) -> Result<(), Failure> {
    if let Some(building) = at_rest.building()? {
        drop(writeln!(io::stderr(), "warning: rows may be missing or lack events: {building}"));
    }
    let parked = at_rest.parked_counts();
    if !parked.is_empty() {
        let (keys, unrouted) = (parked.keys, parked.unrouted);
        drop(writeln!(
            io::stderr(),
            "warning: {keys} rows lack events that are parked, and any row may lack {unrouted} that couldn't be routed: see view parked DIR {name}"
        ));
    }
    Ok(())
}

/// A row as it is printed.
fn line(
    printer: &Printer<'_>,
    at_rest: &AtRest,
    by: Option<&By>,
    found: &Found,
    json: bool,
) -> Result<String, Failure> {
    let mut key = &found.key[..];
    let index_key = by.map(|by| keys::show(printer.view, Some(&by.spelling), &mut key));
    let index_key = index_key.transpose()?;
    let row = match by {
        None => found.row.to_vec(),
        Some(_) => at_rest.row_of_entry(key)?,
    };
    let (key, row) = (printer.show_key(key)?, printer.row(&row)?);
    Ok(match (index_key, json) {
        (None, true) => format!("{{{},{}}}", key.field("key"), row.field("row")),
        (None, false) => format!("{key}  {row}"),
        (Some(by), true) => {
            format!("{{{},{},{}}}", by.field("index_key"), key.field("key"), row.field("row"))
        }
        (Some(by), false) => format!("{by}  {key}  {row}"),
    })
}

/// By which index it is read.
struct By {
    number: u8,
    spelling: KeySpelling,
}

impl By {
    fn new(name: &str, at_rest: &AtRest, code: Option<&Code>, view: &str) -> Result<Self, Failure> {
        let code = code.ok_or_else(|| ViewFailure::NoCode { view: view.to_owned() })?;
        let number = (0_u8..).zip(at_rest.indexes()).find(|(_, it)| *it == name);
        let declared = match &code.spelling {
            Spelling::Rows { indexes, .. } => &indexes[..],
            Spelling::Tables(_) => &[],
        };
        let spelling = declared.iter().find(|(it, _)| *it == name);
        match (number, spelling) {
            (Some((number, _)), Some((_, spelling))) => Ok(Self { number, spelling: *spelling }),
            _ => Err(ViewFailure::NoIndex {
                view: view.to_owned(),
                index: name.to_owned(),
                has: at_rest.indexes().join(", "),
            }
            .into()),
        }
    }
}

pub(super) fn parked(args: &ParkedArgs, views: &Views) -> Result<(), Failure> {
    let which = &args.of.which;
    let located = find::view(&which.target.dir, &which.name)?;
    let (at_rest, _, code) = located.open(args.generation.generation, views)?;
    let printer = Printer::of_rows(code);
    let mut out = BufWriter::new(io::stdout().lock());
    let json = which.target.json;
    if !args.of.key.is_empty() {
        let key = keys::whole(&args.of.key, printer.key())?;
        print_events(&mut out, at_rest.parked_events(&key), json)?;
        return Ok(out.flush()?);
    }
    for parked in at_rest.parked() {
        print_key(&mut out, &printer, &parked?, json)?;
    }
    print_events(&mut out, at_rest.unrouted_events(), json)?;
    Ok(out.flush()?)
}

fn print_key(
    out: &mut impl Write,
    printer: &Printer<'_>,
    parked: &ParkedKey<Vec<u8>>,
    json: bool,
) -> Result<(), Failure> {
    let ParkedKey { key, events, journal, first, since_us, reason } = parked;
    let key = printer.show_key(key)?;
    if json {
        let (key, reason) = (key.field("key"), serde_json::to_string(reason)?);
        writeln!(
            out,
            "{{{key},\"events\":{events},\"journal\":\"{journal}\",\"first_position\":{first},\
             \"since_us\":{since_us},\"reason\":{reason}}}"
        )?;
    } else {
        let since = Time(*since_us);
        writeln!(out, "{key}  {events} events since {since}, position {first}: {reason}")?;
    }
    Ok(())
}

fn print_events(out: &mut impl Write, events: ParkedEvents, json: bool) -> Result<(), Failure> {
    for event in events {
        let event: ParkedEvent = event?;
        let reason = Some(&event.reason).filter(|reason| !reason.is_empty());
        if json {
            let value: Value = json!({
                "journal": event.journal.to_string(),
                "position": event.position.get(),
                "stream": event.stream.as_str(),
                "type": event.event_type.as_str(),
                "schema_version": event.schema_version,
                "recorded_at_us": event.recorded_at_us,
                "reason": reason,
            });
            writeln!(out, "{value}")?;
        } else {
            let ParkedEvent { position, stream, event_type, schema_version, .. } = &event;
            let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
            let at = Time(event.recorded_at_us);
            writeln!(out, "{position:>8}  {at}  {stream}  {event_type} v{schema_version}{reason}")?;
        }
    }
    Ok(())
}

/// Keys and rows in the form that is known of them.
struct Printer<'c> {
    view: &'static str,
    spelling: Option<&'c RowSpelling>,
}

impl<'c> Printer<'c> {
    /// Of the rows of a table, if the view has some; its number.
    fn new(
        at_rest: &AtRest,
        code: Option<&'c Code>,
        table: Option<&str>,
    ) -> Result<(Self, Option<u8>), Failure> {
        let (Some(table), false) = (table, at_rest.tables().is_empty()) else {
            return match at_rest.tables().is_empty() && table.is_none() {
                true => Ok((Self::of_rows(code), None)),
                false => Err(ViewFailure::Table { has: at_rest.tables().join(", ") }.into()),
            };
        };
        let number = (0_u8..).zip(at_rest.tables()).find(|(_, it)| *it == table);
        let missing = || ViewFailure::Table { has: at_rest.tables().join(", ") };
        let (number, _) = number.ok_or_else(missing)?;
        let declared = code.map(|code| match &code.spelling {
            Spelling::Rows { .. } => &[],
            Spelling::Tables(tables) => &tables[..],
        });
        let found = declared.unwrap_or_default().iter().find(|(it, _)| *it == table);
        let (view, spelling) = (code.map_or("", |code| code.name), found.map(|(_, it)| it));
        Ok((Self { view, spelling }, Some(number)))
    }

    /// Of a view without tables.
    fn of_rows(code: Option<&'c Code>) -> Self {
        let spelling = code.and_then(|code| match &code.spelling {
            Spelling::Rows { rows, .. } => Some(rows),
            Spelling::Tables(_) => None,
        });
        Self { view: code.map_or("", |code| code.name), spelling }
    }

    fn key(&self) -> Option<&'c KeySpelling> {
        self.spelling.map(|it| &it.key)
    }

    fn show_key(&self, mut key: &[u8]) -> Result<Shown, Failure> {
        keys::show(self.view, self.key(), &mut key)
    }

    fn row(&self, row: &[u8]) -> Result<Shown, ViewReadError> {
        let json = self.spelling.map(|it| (it.row_to_json)(row)).transpose();
        let view = self.view;
        let json = json.map_err(|error| ViewReadError::Row { view, source: Arc::new(error) })?;
        Ok(json.flatten().map_or_else(|| Shown::Bytes(row.to_vec()), Shown::Json))
    }
}
