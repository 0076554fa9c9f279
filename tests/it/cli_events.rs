//! `schema check` of a service, which mounts its event types: the service is this test binary again.

use std::borrow::Cow;
use std::path::Path;
use std::process::{Command, Output};

use headwater::cli::Cli;
use headwater::upcast::{RawEvent, Upcast};
use headwater::{Append, Event, ExpectedRevision, NewEvent, PayloadCodec, Store, StreamId, schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Serialize, Deserialize)]
struct PlacedV1 {
    cents: u64,
}

#[derive(Serialize, Deserialize)]
struct Placed {
    cents: u64,
    currency: Cow<'static, str>,
}

/// What was written once.
#[derive(Event)]
enum Before {
    #[event(name = "order.placed", version = 1)]
    Placed(PlacedV1),
}

/// What the service reads and writes.
#[derive(Event)]
enum OrderEvent {
    #[event(name = "order.placed", version = 2, upcast(1 = placed_1_to_2))]
    Placed(Placed),
    #[event(name = "order.cancelled", version = 1)]
    Cancelled(u32),
}

fn placed_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
    event.map(|PlacedV1 { cents }| Placed { cents, currency: "EUR".into() })
}

/// The same after somebody was careless: old orders of nothing aren't read, nor some others, and cancelling is forgotten.
#[derive(Event)]
enum CarelessEvent {
    #[event(name = "order.placed", version = 2, upcast(1 = careless_1_to_2))]
    Placed(Placed),
}

fn careless_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
    match event.decode::<PlacedV1>()?.cents {
        0 => Err("nothing was bought".into()),
        13 => panic!("unlucky"),
        _ => placed_1_to_2(event),
    }
}

#[derive(Event)]
enum StockEvent {
    #[event(name = "stock.counted", version = 1)]
    Counted(u64),
}

fn placed() -> Placed {
    Placed { cents: 1250, currency: "CHF".into() }
}

fn orders() -> Vec<OrderEvent> {
    vec![OrderEvent::Placed(placed()), OrderEvent::Cancelled(17)]
}

/// The service, if it is started as one: not a test.
#[test]
fn process_with_event_types() {
    let Ok(args) = std::env::var("HEADWATER_EVENTS") else { return };
    let (is_careful, args): (bool, Vec<String>) = serde_json::from_str(&args).unwrap();
    println!("{BEGINS}");
    let cli = Cli::new().events("stock", [StockEvent::Counted(3)]);
    let cli = match is_careful {
        true => cli.events("orders", orders()),
        false => cli.events("orders", [CarelessEvent::Placed(placed())]),
    };
    let code = format!("{:?}", cli.run_from(args));
    let digits: String = code.chars().filter(char::is_ascii_digit).collect();
    std::process::exit(digits.parse().unwrap());
}

/// In front of it stands what the test harness prints.
const BEGINS: &str = "--- the service begins ---";

fn service(is_careful: bool, args: &[&str]) -> Output {
    let args: Vec<&str> = ["service"].iter().chain(args).copied().collect();
    let mut output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cli_events::process_with_event_types", "--nocapture"])
        .env("HEADWATER_EVENTS", json!([is_careful, args]).to_string())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, own) = text.split_once(&format!("{BEGINS}\n")).unwrap();
    output.stdout = own.as_bytes().to_vec();
    output
}

#[track_caller]
fn text_of(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    (out, err)
}

/// A store with events of all kinds, and the samples.
struct World {
    dir: tempfile::TempDir,
    store: Store,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let world = Self { dir, store };
        for cents in [1250, 0, 13] {
            world.append(&NewEvent::typed(&Before::Placed(PlacedV1 { cents })).unwrap());
        }
        orders().iter().for_each(|it| world.append(&NewEvent::typed(it).unwrap()));
        world.append(&NewEvent::typed(&StockEvent::Counted(3)).unwrap());
        let samples = |name: &str| world.dir.path().join("schema").join(name);
        schema::record(samples("orders"), &[Before::Placed(PlacedV1 { cents: 1250 })]).unwrap();
        schema::record(samples("orders"), &orders()).unwrap();
        schema::record(samples("stock"), &[StockEvent::Counted(3)]).unwrap();
        world
    }

    fn append(&self, event: &NewEvent) {
        let stream = StreamId::new("orders").unwrap();
        let append = Append::to(&stream, ExpectedRevision::Any, [event.clone()]);
        self.store.append(&append).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn check(&self, is_careful: bool, more: &[&str]) -> Output {
        let schema = self.path("schema");
        let args: Vec<&str> = ["schema", "check", &schema].iter().chain(more).copied().collect();
        service(is_careful, &args)
    }

    fn json(&self, is_careful: bool, code: i32) -> Value {
        let output = self.check(is_careful, &["--json", &self.path("store")]);
        serde_json::from_str(&text_of(&output, code).0).unwrap()
    }
}

#[test]
fn schema_check_of_a_service_passes_if_its_code_reads_samples_and_journal() {
    let world = World::new();
    let (text, errors) = text_of(&world.check(true, &[&world.path("store")]), 0);
    let kinds: Vec<&str> = text.lines().skip(1).filter(|line| !line.is_empty()).collect();
    assert_eq!((kinds.len(), errors.as_str()), (4, ""), "{text}");
    assert!(kinds.iter().all(|it| it.contains("yes") && it.contains("all")), "{text}");
    let checked = world.json(true, 0);
    let old = json!({
        "type": "order.placed", "schema_version": 1, "codec": "bincode", "events": 3,
        "first_position": 0, "recorded": true, "read_events": 3,
    });
    assert_eq!(checked["kinds"][1], old, "{checked}");
    assert_eq!((&checked["samples"], &checked["complete"]), (&json!(4), &json!(true)));
    assert_eq!((&checked["findings"], &checked["undecodable_events"]), (&json!([]), &json!(0)));

    // The samples alone.
    let (text, _) = text_of(&world.check(true, &[]), 0);
    assert_eq!(text, "4 samples\n");

    // What nobody has recorded is told as before, and that none of the types knows it.
    world.append(&NewEvent::raw("stock.lost", *b"?").unwrap());
    let (text, errors) = text_of(&world.check(true, &[&world.path("store")]), 1);
    assert!(errors.starts_with("error[schema.unrecorded]: 1 kinds"), "{errors}");
    let lost = text.lines().find(|line| line.contains("stock.lost")).unwrap();
    assert!(lost.contains("MISSING") && lost.contains("NONE"), "{text}");
}

#[test]
fn schema_check_of_a_service_names_each_event_of_a_journal_that_its_code_can_not_decode() {
    let world = World::new();
    let (text, errors) = text_of(&world.check(false, &[&world.path("store")]), 1);
    let code = "error[schema.undecodable_events]: 2 events in the journal can't be decoded";
    assert!(errors.contains(code), "{errors}");
    for (position, reason) in [(1, "nothing was bought"), (2, "panic: unlucky")] {
        let place = format!("position {position}: \"order.placed\", version 1, in stream orders: ");
        let line = text.lines().find(|line| line.starts_with(&place));
        assert!(line.is_some_and(|line| line.contains(reason)), "{place}{reason}\n{text}");
    }
    let kind = |of: &str, version: &str| {
        let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        lines.find(|it| it.starts_with(&[of, version])).unwrap().join(" ")
    };
    assert!(kind("order.placed", "1").ends_with("ONLY 1"), "{text}");
    assert!(kind("order.placed", "2").ends_with("all"), "{text}");
    assert!(kind("order.cancelled", "1").ends_with("NONE"), "{text}");
    assert!(text.contains("schema.vanished: ") && text.contains("order.cancelled.1"), "{text}");

    let checked = world.json(false, 1);
    assert_eq!(checked["findings"][0]["code"], json!("schema.vanished"));
    let first = &checked["undecodable"][0];
    assert_eq!((&first["position"], &first["stream"]), (&json!(1), &json!("orders")), "{checked}");
    assert_eq!((&first["type"], &first["schema_version"]), (&json!("order.placed"), &json!(1)));

    // Very many are counted, and the first of them told.
    for _ in 0..30 {
        world.append(&NewEvent::typed(&Before::Placed(PlacedV1 { cents: 0 })).unwrap());
    }
    let checked = world.json(false, 1);
    assert_eq!(checked["undecodable_events"], json!(32));
    assert_eq!(checked["undecodable"].as_array().unwrap().len(), 20);
    let (text, _) = text_of(&world.check(false, &[&world.path("store")]), 1);
    assert!(text.contains("and 12 more that can't be decoded"), "{text}");
}

#[test]
fn schema_check_of_a_service_proves_the_samples_without_a_journal() {
    let world = World::new();
    let (text, errors) = text_of(&world.check(false, &[]), 1);
    assert!(errors.starts_with("error[schema.findings]: 1 findings"), "{errors}");
    assert!(text.contains("schema.vanished: ") && text.contains("hint: "), "{text}");
    // A sample that isn't read keeps the proof from being complete, even if the journal has none such.
    let path = world.dir.path().join("schema/orders");
    let nothing = RawEvent::encode("order.placed", 1, PayloadCodec::Json, &PlacedV1 { cents: 0 });
    schema::record_raw(Path::new(&path), &nothing.unwrap()).unwrap();
    let (text, _) = text_of(&world.check(false, &[]), 1);
    assert!(text.contains("schema.undecodable: ") && text.contains("nothing was bought"), "{text}");
    text_of(&world.check(true, &[]), 0);
    // Without the code of a service there is nothing to be checked then.
    let headwater = Command::new(env!("CARGO_BIN_EXE_headwater"))
        .args(["schema", "check", &world.path("schema")])
        .output();
    let (_, errors) = text_of(&headwater.unwrap(), 2);
    assert!(errors.starts_with("error[schema.nothing_to_check]"), "{errors}");
}

/// The commands of a service about its events, as they stand in docs/cli.md.
#[test]
fn every_command_about_events_that_the_documentation_shows_works() {
    let world = World::new();
    let text = include_str!("../../docs/cli.md");
    let shown = text.lines().filter_map(|line| line.strip_prefix("$ service schema "));
    let shown: Vec<&str> = shown.collect();
    assert!(shown.len() >= 2, "{shown:?}");
    for command in shown {
        let command = format!("schema {command}").replace("DIR", &world.path("store"));
        let command = command.replace("SCHEMA", &world.path("schema"));
        text_of(&service(true, &command.split_whitespace().collect::<Vec<_>>()), 0);
    }
    let mut printed: Vec<String> =
        world.json(true, 0).as_object().unwrap().keys().cloned().collect();
    printed.sort();
    assert_eq!(crate::cli::documented("schema check"), printed);
}
