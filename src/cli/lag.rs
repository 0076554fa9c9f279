//! `headwater lag` and `headwater peer ls`: how far who is behind, and who is there.

use std::io::{self, IsTerminal as _, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::events::Time;
use super::failure::Failure;
use super::links::{self, Link, Place};
use super::stat::{plain, right};
use super::{Target, tail};
use crate::env;

/// How often `--watch` looks.
const WATCH: Duration = Duration::from_secs(1);
/// The beginning of a terminal's screen, cleared.
const CLEAR: &str = "\x1b[H\x1b[2J";
const UNKNOWN: &str = "unknown";

/// What `lag` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
    /// Shows it anew every second, until it is interrupted or nobody reads its output any more
    #[arg(short, long)]
    watch: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let clear = args.watch && !args.target.json && io::stdout().is_terminal();
    loop {
        let began = Instant::now();
        let places = links::places(&args.target.dir)?;
        let mut out = io::stdout().lock();
        if clear {
            write!(out, "{CLEAR}")?;
        }
        if args.target.json {
            writeln!(out, "{}", lag_to_json(&places))?;
        } else {
            if args.watch {
                writeln!(out, "{}", Time(env::now_us()))?;
            }
            print_lag(&mut out, &places)?;
        }
        out.flush()?;
        drop(out);
        if !args.watch {
            return damage(places);
        }
        // Opening reads headers: on a large store look less often, to stay a light guest.
        tail::wait(WATCH.max(4 * began.elapsed()))?;
    }
}

/// `peer ls`.
pub(super) fn list(dir: &Path, json: bool) -> Result<(), Failure> {
    let places = links::places(dir)?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", list_to_json(&places))?;
    } else {
        print_list(&mut out, &places)?;
    }
    out.flush()?;
    damage(places)
}

fn damage(places: Vec<Place>) -> Result<(), Failure> {
    let damage = places.into_iter().find_map(|place| place.damage);
    damage.map_or(Ok(()), |damage| Err(Failure::Damaged(damage)))
}

fn lag_to_json(places: &[Place]) -> Value {
    let journal = |place: &Place| {
        let end = place.journal.as_ref().map(crate::Journal::end);
        json!({
            "of": place.of,
            "journal": end.map(|end| end.journal.to_string()),
            "end_position": end.map(|end| end.position.get()),
        })
    };
    let links = places.iter().flat_map(|place| &place.links).map(Link::to_json);
    json!({
        "at_us": env::now_us(),
        "journals": places.iter().map(journal).collect::<Vec<_>>(),
        "links": links.collect::<Vec<_>>(),
    })
}

fn list_to_json(places: &[Place]) -> Value {
    let links = places.iter().flat_map(|place| &place.links).map(Link::to_json);
    let refused = places.iter().flat_map(|place| {
        place.refused.iter().map(|refused| json!({ "of": place.of, "reasons": refused }))
    });
    json!({ "peers": links.collect::<Vec<_>>(), "refused": refused.collect::<Vec<_>>() })
}

/// A number, or that it isn't known.
fn number(link: &Link, field: &str) -> String {
    link.number(field).map_or_else(|| UNKNOWN.to_owned(), |number| number.to_string())
}

fn seconds(link: &Link, field: &str) -> String {
    let text = |ms: u64| format!("{}.{:03}", ms / 1000, ms % 1000);
    link.number(field).map_or_else(|| UNKNOWN.to_owned(), text)
}

fn state(link: &Link) -> String {
    link.text("state").unwrap_or(UNKNOWN).replace('_', " ")
}

/// Only what follows holds something back.
fn held(link: &Link) -> String {
    if link.text("direction") == Some("to") { number(link, "held_bytes") } else { "-".to_owned() }
}

fn print_lag(out: &mut impl Write, places: &[Place]) -> io::Result<()> {
    let mut table = plain();
    table.set_header([
        "of",
        "to/from",
        "who",
        "state",
        "position",
        "applied",
        "events",
        "bytes",
        "seconds",
        "holds back",
    ]);
    for link in places.iter().flat_map(|place| &place.links) {
        table.add_row(vec![
            link.text("of").unwrap_or_default().to_owned(),
            link.text("direction").unwrap_or_default().to_owned(),
            link.who().to_owned(),
            state(link),
            number(link, "durable_position"),
            number(link, "applied_position"),
            number(link, "lag_events"),
            number(link, "lag_bytes"),
            seconds(link, "lag_ms"),
            held(link),
        ]);
    }
    right(&mut table, &[4, 5, 6, 7, 8, 9]);
    print_ends(out, places)?;
    writeln!(out, "{}", table.trim_fmt())
}

fn print_ends(out: &mut impl Write, places: &[Place]) -> io::Result<()> {
    for place in places {
        match &place.journal {
            Some(journal) => {
                let end = journal.end();
                writeln!(out, "{}: {} up to position {}", place.of, end.journal, end.position)?;
            }
            None => writeln!(out, "{}: nothing yet", place.of)?,
        }
    }
    writeln!(out)
}

fn print_list(out: &mut impl Write, places: &[Place]) -> io::Result<()> {
    let mut table = plain();
    table.set_header([
        "of",
        "to/from",
        "name",
        "node",
        "address",
        "state",
        "heard s ago",
        "reconnects",
        "ended by",
    ]);
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    for link in places.iter().flat_map(|place| &place.links) {
        table.add_row(vec![
            link.text("of").unwrap_or_default().to_owned(),
            link.text("direction").unwrap_or_default().to_owned(),
            or_dash(link.text("name")),
            or_dash(link.text("node")),
            or_dash(link.text("address")),
            state(link),
            seconds(link, "heard_ms"),
            number(link, "reconnects"),
            counts(link.get("ends")).unwrap_or_else(|| UNKNOWN.to_owned()),
        ]);
    }
    right(&mut table, &[6, 7]);
    print_ends(out, places)?;
    writeln!(out, "{}", table.trim_fmt())?;
    for link in places.iter().flat_map(|place| &place.links) {
        print_errors(out, link)?;
    }
    for place in places {
        for refused in place.refused.iter().filter_map(counts).filter(|counts| counts != "-") {
            writeln!(out, "\n{}: connections that came to no subscription: {refused}", place.of)?;
        }
    }
    Ok(())
}

/// Why it isn't there; then, of several addresses at which it could be, why not at each of the others.
fn print_errors(out: &mut impl Write, link: &Link) -> io::Result<()> {
    let (of, at) = (link.text("of").unwrap_or_default(), link.text("address"));
    print_error(out, of, link.get("error"))?;
    for upstream in link.get("upstreams").as_array().into_iter().flatten() {
        let address = upstream.get("address").and_then(Value::as_str).unwrap_or_default();
        if let Some(error) = upstream.get("error").filter(|_| at != Some(address)) {
            print_error(out, &format!("{of} at {address}"), error)?;
        }
    }
    Ok(())
}

fn print_error(out: &mut impl Write, of: &str, error: &Value) -> io::Result<()> {
    let part = |name: &str| error.get(name).and_then(Value::as_str);
    if let (Some(code), Some(message)) = (part("code"), part("message")) {
        writeln!(out, "\n{of}: error[{code}]: {message}")?;
        writeln!(out, "  hint: {}", part("hint").unwrap_or_default())?;
    }
    Ok(())
}

/// `2 timeout, 1 disconnected`; `None` if it isn't known.
fn counts(reasons: &Value) -> Option<String> {
    let reasons = reasons.as_object()?;
    let one = |(reason, count): (&String, &Value)| format!("{count} {reason}");
    let all: Vec<_> = reasons.iter().map(one).collect();
    Some(if all.is_empty() { "-".to_owned() } else { all.join(", ") })
}
