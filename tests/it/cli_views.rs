//! The command line of views: of the program `headwater`, which knows none, and mounted in a service, which is this
//! test binary again. Every command of a service that docs/cli.md shows is run here.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::Duration;

use headwater::cli::Cli;
use headwater::fs::{Fs, os::OsFs};
use headwater::retention::{History, Options, Until};
use headwater::view::{
    Fold, FoldError, Index, Indexes, Keys, OnPoison, Table, TableView, Tables, View, ViewHandle,
    ViewOptions, ViewTxn,
};
use headwater::{
    Append, ExpectedRevision, Journal, JournalOptions, NewEvent, Position, Recorded, Store,
    StreamId,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::golden::golden;
use crate::views::{copy_dir, stopped};

const PATIENCE: Duration = Duration::from_secs(60);

/// What was spent, by place and customer. An event is `PLACE CUSTOMER CENTS`.
#[derive(Clone, Debug, Default)]
struct Spent<const VERSION: u32 = 1> {
    /// Events of fewer cents than that can't be folded.
    cents_min: u64,
    /// Added to every row: a fold that was changed.
    twist: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Row {
    orders: u64,
    cents: u64,
}

type Key = (String, u32);

fn parse(data: &[u8]) -> Option<(Key, u64)> {
    let mut words = std::str::from_utf8(data).ok()?.split(' ');
    let key = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    Some((key, words.next()?.parse().ok()?))
}

impl<const VERSION: u32> View for Spent<VERSION> {
    const NAME: &'static str = "spent";
    const VERSION: u32 = VERSION;
    type Key = Key;
    type Row = Row;
    type Event = Vec<u8>;

    fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<Key>) {
        keys.extend(parse(event.data()).map(|(key, _)| key));
    }

    fn fold(
        &self,
        _: &Key,
        row: Option<Row>,
        event: &Recorded<Vec<u8>>,
    ) -> Result<Fold<Row>, FoldError> {
        let Row { orders, cents } = row.unwrap_or_default();
        let (_, more) = parse(event.data()).ok_or("no order")?;
        if more < self.cents_min {
            return Err("too little".into());
        }
        Ok(Fold::Put(Row { orders: orders + 1, cents: cents + more + self.twist }))
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none().with(Index::new("by_cents", |_, row: &Row, keys| keys.add(row.cents)))
    }
}

/// How many orders each place has, and how many there are.
#[derive(Default)]
struct Towns {
    /// So long each event takes.
    fold_ms: u64,
}

const TOWNS: Table<String, u64> = Table::new("towns");
const ALL: Table<(), u64> = Table::new("all");

impl TableView for Towns {
    const NAME: &'static str = "towns";
    const VERSION: u32 = 1;
    type Event = Vec<u8>;

    fn tables(&self) -> Tables {
        Tables::of(TOWNS).with(ALL)
    }

    fn apply(&self, event: &Recorded<Vec<u8>>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        let Some(((town, _), _)) = parse(event.data()) else { return Ok(()) };
        std::thread::sleep(Duration::from_millis(self.fold_ms));
        let orders = tx.get(TOWNS, &town)?.unwrap_or(0) + 1;
        tx.put(TOWNS, &town, &orders)?;
        let all = tx.get(ALL, &())?.unwrap_or(0) + 1;
        tx.put(ALL, &(), &all)?;
        Ok(())
    }
}

/// The service, if it is started as one: not a test.
#[test]
fn process_with_the_command_line() {
    let Ok(args) = std::env::var("HEADWATER_SERVICE") else { return };
    let (args, version, cents_min, twist, fold_ms): (Vec<String>, u32, u64, u64, u64) =
        serde_json::from_str(&args).unwrap();
    writeln!(std::io::stdout(), "{BEGINS}").unwrap();
    let cli = match version {
        1 => Cli::new().view(Spent::<1> { cents_min, twist }),
        _ => Cli::new().view(Spent::<2> { cents_min, twist }).view(Spent::<1> { cents_min, twist }),
    };
    let cli = cli.table_view(Towns { fold_ms });
    let code = format!("{:?}", cli.run_from(args));
    let digits: String = code.chars().filter(char::is_ascii_digit).collect();
    std::process::exit(digits.parse().unwrap());
}

/// In front of it stands what the test harness prints.
const BEGINS: &str = "--- the service begins ---";

/// The service, with its code.
#[derive(Clone, Copy, Default)]
struct Service {
    version: u32,
    cents_min: u64,
    twist: u64,
    fold_ms: u64,
}

impl Service {
    fn command(self, args: &[&str]) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let args: Vec<&str> = ["service"].iter().chain(args).copied().collect();
        let code = json!([args, self.version.max(1), self.cents_min, self.twist, self.fold_ms]);
        command
            .args(["--exact", "cli_views::process_with_the_command_line", "--nocapture"])
            .env("HEADWATER_SERVICE", code.to_string());
        command
    }

    fn run(self, args: &[&str]) -> Output {
        let mut output = self.command(args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, own) = text.split_once(&format!("{BEGINS}\n")).unwrap();
        output.stdout = own.as_bytes().to_vec();
        output
    }
}

fn service(args: &[&str]) -> Output {
    Service::default().run(args)
}

fn headwater(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_headwater")).args(args).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Without the progress, which a slow machine may show.
fn err(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let is_progress = |line: &&str| {
        ["building: ", "comparing: ", "catching up: "].iter().any(|it| line.starts_with(it))
    };
    text.lines().filter(|line| !is_progress(line)).map(|line| format!("{line}\n")).collect()
}

#[track_caller]
fn ok(output: Output) -> String {
    assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()), "{}", out(&output));
    out(&output)
}

/// It failed with this exit code and error.
#[track_caller]
fn failed(output: &Output, exit: i32, code: &str) {
    assert_eq!(output.status.code(), Some(exit), "{}{}", out(output), err(output));
    assert!(err(output).starts_with(&format!("error[{code}]: ")), "{}", err(output));
    assert!(err(output).contains("\n  hint: "), "{}", err(output));
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn json_of(output: Output) -> Value {
    serde_json::from_str(&ok(output)).unwrap()
}

struct World {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

const ORDERS: [&str; 9] = [
    "basel 1 100",
    "bern 2 50",
    "bern 1 200",
    "geneva 3 5",
    "basel 1 11",
    "bern 2 25",
    "bernex 9 75",
    "basel 3 300",
    "geneva 3 1",
];

impl World {
    /// A store with some orders, whose service isn't running.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let world = Self { _dir: dir, path };
        let (store, view) = world.open(ViewOptions::default());
        append(&store, &ORDERS);
        caught_up(&store, &view);
        view.close().unwrap();
        drop(view);
        store.close().unwrap();
        world
    }

    fn open(&self, options: ViewOptions) -> (Store, ViewHandle<Spent>) {
        let store = Store::builder(&self.path).create_if_missing().open().unwrap();
        let view = store.view_with(Spent::default(), options).unwrap();
        (store, view)
    }

    fn dir(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn status(&self, args: &[&str]) -> Vec<Value> {
        let args = [&["view", "ls", "--json", self.dir()], args].concat();
        json_of(headwater(&args))["views"].as_array().unwrap().clone()
    }

    /// The names of the generations on disk, and which one is live.
    fn generations(&self) -> Vec<String> {
        let name = |it: &Value| {
            let live = if it["live"] == true { " live" } else { "" };
            format!("{}.{}{live}", it["version"], it["generation"])
        };
        self.status(&[]).iter().map(name).collect()
    }

    /// Every file of the store: path and bytes.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn add(dir: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => add(&path, files),
                    false => drop(files.insert(path.clone(), std::fs::read(&path).unwrap())),
                }
            }
        }
        let mut files = BTreeMap::new();
        add(&self.path, &mut files);
        files
    }
}

fn append(store: &Store, orders: &[&str]) {
    let stream = StreamId::new("orders").unwrap();
    for order in orders {
        let event = NewEvent::raw("ordered", *order).unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }
}

fn caught_up(store: &Store, view: &ViewHandle<Spent>) {
    view.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
}

#[test]
fn rows_are_printed_as_what_they_are_and_keys_are_typed_as_they_are_printed() {
    let world = World::new();
    let dir = world.dir();
    let text = ok(service(&["view", "scan", dir, "spent"]));
    let first = "[\"basel\",1]  {\"orders\":2,\"cents\":111}\n[\"basel\",3]  ";
    assert!(text.starts_with(first), "{text}");
    // What is printed as a key finds its row again; so do its fields.
    for line in text.lines() {
        let (key, row) = line.split_once("  ").unwrap();
        assert_eq!(ok(service(&["view", "get", dir, "spent", key])), format!("{row}\n"));
        let fields: Key = serde_json::from_str(key).unwrap();
        let by_fields = service(&["view", "get", dir, "spent", &fields.0, &fields.1.to_string()]);
        assert_eq!(ok(by_fields), format!("{row}\n"));
    }
    let got = json_of(service(&["view", "get", "--json", dir, "spent", "bern", "2"]));
    let row = json!({ "orders": 2, "cents": 75 });
    let expected = json!({ "key": ["bern", 2], "row": row, "position": 9, "degraded": null });
    assert_eq!(got, expected);

    failed(&service(&["view", "get", dir, "spent", "bern", "7"]), 1, "view.no_row");
    failed(&service(&["view", "get", dir, "spent", "bern"]), 1, "view.key");
    failed(&service(&["view", "get", dir, "spent", "bern", "x"]), 1, "view.key");
    failed(&service(&["view", "get", dir, "spend", "bern", "1"]), 1, "view.not_found");
    failed(&service(&["view", "get", dir, "../spent", "bern", "1"]), 1, "view.not_found");
    assert_eq!(service(&["view", "get", dir]).status.code(), Some(2));
}

#[test]
fn scans_take_ranges_beginnings_directions_pages_and_indexes() {
    let world = World::new();
    let dir = world.dir();
    let scan = |args: &[&str]| -> Vec<Value> {
        let args = [&["view", "scan", "--json", dir, "spent"], args].concat();
        lines(&ok(service(&args)))
    };
    let keys = |args: &[&str]| -> Vec<String> {
        scan(args).iter().map(|line| line["key"].to_string()).collect()
    };
    let all = [
        "[\"basel\",1]",
        "[\"basel\",3]",
        "[\"bern\",1]",
        "[\"bern\",2]",
        "[\"bernex\",9]",
        "[\"geneva\",3]",
    ];
    assert_eq!(keys(&[]), all);
    assert_eq!(keys(&["--prefix", "bern"]), all[2..5]);
    assert_eq!(keys(&["--prefix", "[\"bern\"]"]), all[2..4]);
    assert_eq!(keys(&["--from", "[\"basel\",2]", "--to", "[\"bern\",2]"]), all[1..3]);
    assert_eq!(keys(&["--prefix", "bern", "--to", "[\"bern\",2]"]), all[2..3]);
    assert_eq!(keys(&["--from", "[\"z\",0]"]), [""; 0]);
    let reversed: Vec<&str> = all.iter().rev().copied().collect();
    assert_eq!(keys(&["--reverse"]), reversed);

    // Page by page, both ways, everything comes once.
    for direction in [&[][..], &["--reverse"][..]] {
        let (mut seen, mut after) = (Vec::new(), None::<String>);
        loop {
            let mut args = [direction, &["--limit", "4"]].concat();
            if let Some(token) = &after {
                args.extend(["--after", token]);
            }
            let mut page = scan(&args);
            let next = page.last().and_then(|it| it["next"].as_str()).map(str::to_owned);
            page.truncate(if next.is_some() { page.len() - 1 } else { page.len() });
            assert!(page.len() <= 4 && seen.len() < all.len());
            seen.extend(page.iter().map(|line| line["key"].to_string()));
            after = next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(seen, if direction.is_empty() { all.to_vec() } else { reversed.clone() });
    }

    let by_cents = scan(&["--index", "by_cents", "--from", "75", "--to", "200"]);
    let index_keys: Vec<&Value> = by_cents.iter().map(|line| &line["index_key"]).collect();
    assert_eq!(index_keys, [75, 75, 111]);
    let found: Vec<&Value> = by_cents.iter().map(|line| &line["key"]).collect();
    assert_eq!(found, [&json!(["bern", 2]), &json!(["bernex", 9]), &json!(["basel", 1])]);
    assert_eq!(by_cents[2]["row"], json!({ "orders": 2, "cents": 111 }));
    let text = ok(service(&["view", "scan", dir, "spent", "--index", "by_cents", "--limit", "1"]));
    assert!(
        text.starts_with("6  [\"geneva\",3]  {\"orders\":2,\"cents\":6}\nmore: --after "),
        "{text}"
    );
    failed(&service(&["view", "scan", dir, "spent", "--index", "by_name"]), 1, "view.no_index");
}

#[test]
fn without_the_code_keys_and_rows_are_bytes_and_nothing_is_built() {
    let world = World::new();
    let dir = world.dir();
    let key = "6261736c0001";
    let rows = lines(&ok(headwater(&["view", "scan", "--json", dir, "spent"])));
    assert_eq!(rows.len(), 6);
    assert_eq!(rows[0]["key_hex"], "626173656c000100000001");
    assert_eq!(rows[0]["row_hex"], "026f", "two varints");
    let text = ok(headwater(&["view", "get", dir, "spent", "basel", "u32:1"]));
    assert_eq!(text, "0x026f  |.o|\n");
    assert_eq!(ok(headwater(&["view", "get", dir, "spent", "0x626173656c000100000001"])), text);
    let found = ok(headwater(&["view", "scan", dir, "spent", "--prefix", "bern"]));
    assert_eq!(found.lines().count(), 3, "{found}");
    failed(&headwater(&["view", "get", dir, "spent", "u32:x"]), 1, "view.key");
    failed(&headwater(&["view", "get", dir, "spent", &format!("0x{key}")]), 1, "view.no_row");

    let before = world.files();
    for args in [
        &["rebuild", dir, "spent"][..],
        &["check", dir, "spent"],
        &["rollback", dir, "spent"],
        &["retry", dir, "spent", "basel"],
        &["discard", dir, "spent", "basel", "--position", "1"],
        &["scan", dir, "spent", "--index", "by_cents"],
    ] {
        let output = headwater(&[&["view"], args].concat());
        failed(&output, 1, "view.no_code");
        assert!(err(&output).contains("Cli::new().view("), "{}", err(&output));
    }
    assert!(world.files() == before, "something was changed");
}

#[test]
fn what_only_looks_works_beside_the_service_and_changes_nothing() {
    let world = World::new();
    let dir = world.dir().to_owned();
    let look = || {
        ok(headwater(&["view", "status", &dir]));
        ok(headwater(&["view", "status", &dir, "spent"]));
        ok(headwater(&["view", "parked", &dir, "spent"]));
        ok(headwater(&["view", "get", &dir, "spent", "basel", "u32:1"]));
        ok(headwater(&["view", "scan", &dir, "spent"])).lines().count()
    };
    let before = world.files();
    assert_eq!(look(), 6);
    let at_rest = &world.status(&[])[0];
    assert!(world.files() == before, "something was changed");
    assert_eq!((&at_rest["state"], &at_rest["held_by"]), (&json!("caught_up"), &Value::Null));
    assert_eq!((&at_rest["lag_events"], &at_rest["applied_position"]), (&json!(0), &json!(9)));
    assert_eq!(at_rest["indexes"], json!(["by_cents"]));
    assert!(at_rest["disk_bytes"].as_u64().unwrap() > 0);

    // What isn't durable yet isn't seen, and how far the service is, only it knows.
    let never = ViewOptions { flush_interval: Duration::MAX, ..ViewOptions::default() };
    let (store, view) = world.open(never);
    append(&store, &["zug 1 1000", "zug 2 1000"]);
    caught_up(&store, &view);
    assert_eq!(look(), 6);
    let open = &world.status(&[])[0];
    let me = format!("process {}", std::process::id());
    assert_eq!((&open["state"], &open["held_by"]), (&json!("open"), &json!(me)));
    assert_eq!((&open["durable_position"], &open["applied_position"]), (&json!(9), &Value::Null));
    assert_eq!((&open["lag_events"], &open["lag_events_max"]), (&Value::Null, &json!(2)));
    let text = ok(headwater(&["view", "status", &dir]));
    assert!(text.contains("unknown: only the process that has it open knows"), "{text}");
    assert!(text.contains("at most 2") && text.contains(&me), "{text}");
    view.close().unwrap();
    drop(view);
    assert_eq!(look(), 8);

    // Without a service, what it has not applied is what it lacks.
    append(&store, &["zug 3 1000"]);
    store.close().unwrap();
    let behind = &world.status(&[])[0];
    assert_eq!((&behind["state"], &behind["lag_events"]), (&json!("behind"), &json!(1)));
}

/// Whatever is read beside a service that flushes and compacts all the time is what a prefix of the journal makes.
#[test]
fn every_scan_beside_a_busy_service_shows_the_rows_of_one_moment() {
    let world = World::new();
    let busy = ViewOptions { flush_bytes: 1, ..ViewOptions::default() };
    let (store, view) = world.open(busy);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut scans, mut moments) = (0, Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                append(&store, &[&format!("town-{} {} 1", n % 13, n % 7)]);
                caught_up(&store, &view);
                n += 1;
            }
        });
        while scans < 12 {
            let rows = lines(&ok(service(&["view", "scan", "--json", world.dir(), "spent"])));
            let key = |row: &Value| serde_json::from_value::<Key>(row["key"].clone()).unwrap();
            let row = |row: &Value| serde_json::from_value::<Row>(row["row"].clone()).unwrap();
            moments.push(rows.iter().map(|it| (key(it), row(it))).collect::<BTreeMap<Key, Row>>());
            scans += 1;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let mut prefixes = BTreeMap::new();
    let mut rows: BTreeMap<Key, Row> = BTreeMap::new();
    for event in store.read_all(Position::START).unwrap() {
        let event = event.unwrap();
        let (key, cents) = parse(event.data()).unwrap();
        let row = rows.entry(key).or_default();
        (row.orders, row.cents) = (row.orders + 1, row.cents + cents);
        prefixes.insert(event.position().get() + 1, rows.clone());
    }
    let position = |rows: &BTreeMap<Key, Row>| rows.values().map(|row| row.orders).sum::<u64>();
    for rows in &moments {
        assert_eq!(Some(rows), prefixes.get(&position(rows)), "not the rows of any moment");
    }
    let positions: Vec<u64> = moments.iter().map(position).collect();
    println!("moments: {positions:?}");
    assert!(positions.is_sorted() && positions.first() < positions.last(), "{positions:?}");
}

#[test]
fn a_rebuilt_generation_takes_over_the_old_one_is_kept_and_can_be_gone_back_to() {
    let world = World::new();
    let dir = world.dir();
    let rows = ok(service(&["view", "scan", dir, "spent"]));
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["previous"]), (&json!(2), &json!(1)));
    let compared = &rebuilt["compared"];
    assert_eq!((&compared["equal"], &compared["position"]), (&json!(true), &json!(9)));
    assert_eq!(compared["built"], compared["served"]);
    assert_eq!(compared["built"]["rows"], 6);
    assert_eq!(world.generations(), ["1.1", "1.2 live"]);
    assert_eq!(ok(service(&["view", "scan", dir, "spent"])), rows);

    // The fold was mended, and the version wasn't raised: that must be said.
    let mended = Service { twist: 1, ..Service::default() };
    let differs = mended.run(&["view", "rebuild", dir, "spent"]);
    failed(&differs, 3, "rebuild.different");
    assert!(err(&differs).contains("--accept-difference"), "{}", err(&differs));
    assert_eq!(world.generations(), ["1.1", "1.2 live"]);
    let text = ok(mended.run(&["view", "rebuild", dir, "spent", "--accept-difference"]));
    assert!(
        text.contains("generation 1.3 is live after ") && text.contains("1.2 had 6 rows"),
        "{text}"
    );
    let get = |generation: &[&str]| {
        let args = [&["view", "get", dir, "spent", "geneva", "3"], generation].concat();
        ok(service(&args))
    };
    assert_eq!(get(&[]), "{\"orders\":2,\"cents\":8}\n");
    assert_eq!(get(&["--generation", "1.2"]), "{\"orders\":2,\"cents\":6}\n");
    failed(
        &service(&["view", "scan", dir, "spent", "--generation", "1.9"]),
        1,
        "view.no_generation",
    );
    failed(&service(&["view", "scan", dir, "spent", "--generation", "7"]), 1, "view.no_generation");

    let back = json_of(service(&["view", "rollback", "--json", dir, "spent"]));
    assert_eq!((&back["generation"], &back["previous"]), (&json!(2), &json!(3)));
    assert_eq!(world.generations(), ["1.1", "1.2 live", "1.3"]);
    failed(&headwater(&["view", "rm", dir, "spent", "1.2"]), 1, "view.live");
    failed(&headwater(&["view", "rm", dir, "spent", "1.7"]), 1, "view.no_generation");
    failed(&headwater(&["view", "rm", dir, "spent", "2.1"]), 1, "view.no_generation");
    assert!(ok(headwater(&["view", "rm", dir, "spent", "1.3"])).contains("1.3 is deleted"));
    assert_eq!(world.generations(), ["1.1", "1.2 live"]);
    assert_eq!(ok(service(&["view", "scan", dir, "spent"])), rows);
    // The journal was closed as it should be, and goes on.
    let (store, view) = world.open(ViewOptions::default());
    append(&store, &["zug 1 1"]);
    caught_up(&store, &view);
    assert_eq!(view.get(&("zug".to_owned(), 1)).unwrap().unwrap().cents, 1);
}

#[test]
fn what_changes_a_view_is_refused_while_its_service_runs_and_says_what_to_do() {
    let world = World::new();
    let (_store, _view) = world.open(ViewOptions::default());
    let dir = world.dir();
    for args in [
        &["rebuild", dir, "spent"][..],
        &["rollback", dir, "spent"],
        &["retry", dir, "spent", "bern", "1"],
        &["discard", dir, "spent", "bern", "1", "--position", "1"],
    ] {
        let output = service(&[&["view"], args].concat());
        failed(&output, 1, "view.in_use");
        let me = format!("process {}", std::process::id());
        assert!(
            err(&output).contains(&me) && err(&output).contains("ViewHandle"),
            "{}",
            err(&output)
        );
    }
    assert_eq!(world.generations(), ["1.1 live"]);
}

#[test]
fn a_new_version_is_built_while_the_service_of_the_old_one_runs() {
    let world = World::new();
    let (store, view) = world.open(ViewOptions::default());
    let dir = world.dir();
    let new = Service { version: 2, twist: 5, ..Service::default() };
    let listed = json_of(new.run(&["view", "ls", "--json", dir]));
    let states: Vec<_> =
        listed["views"].as_array().unwrap().iter().map(|it| &it["state"]).collect();
    assert_eq!(states[1], "not_built");
    let text = ok(new.run(&["view", "rebuild", dir, "spent"]));
    assert_eq!(text, "spent: generation 2.1 was built, up to position 9\n");
    assert_eq!(world.generations(), ["1.1 live", "2.1 live"]);
    let get = |args: &[&str]| {
        ok(new.run(&[&["view", "get", dir, "spent", "geneva", "3"], args].concat()))
    };
    assert_eq!(get(&[]), "{\"orders\":2,\"cents\":16}\n");
    assert_eq!(get(&["--generation", "1"]), "{\"orders\":2,\"cents\":6}\n");
    // The service has noticed nothing, and the version that comes next finds all there is.
    append(&store, &["geneva 3 1"]);
    caught_up(&store, &view);
    view.close().unwrap();
    let next = store.view(Spent::<2> { twist: 5, cents_min: 0 }).unwrap();
    assert_eq!(next.checkpoint().durable.position, Position::new(9));
    next.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
    assert_eq!(next.get(&("geneva".to_owned(), 3)).unwrap().unwrap().cents, 22);
}

#[test]
fn check_proves_the_rows_beside_the_service_and_exits_with_3_if_they_differ() {
    let world = World::new();
    let dir = world.dir();
    let names = || -> Vec<String> {
        let entries = std::fs::read_dir(world.path.join("views/spent")).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "lock.check");
        names.sort();
        names
    };
    let before = names();
    let equal = json_of(service(&["view", "check", "--json", dir, "spent"]));
    assert_eq!((&equal["equal"], &equal["position"]), (&json!(true), &json!(9)));
    assert_eq!((&equal["served"], &equal["served"]["rows"]), (&equal["built"], &json!(6)));
    assert_eq!(names(), before);

    let (store, view) = world.open(ViewOptions::default());
    append(&store, &["zug 1 1"]);
    caught_up(&store, &view);
    let text = ok(service(&["view", "check", dir, "spent"]));
    assert!(text.contains("the rows are what the journal makes, up to position 9"), "{text}");
    assert_eq!(view.digest().unwrap().rows, 7, "it serves");
    view.close().unwrap();
    drop(view);

    let other = Service { twist: 1, ..Service::default() };
    let differs = other.run(&["view", "check", dir, "spent"]);
    assert_eq!((differs.status.code(), err(&differs)), (Some(3), String::new()));
    let text = out(&differs);
    assert!(text.contains("NOT what the journal makes, up to position 10"), "{text}");
    let differs = other.run(&["view", "check", "--json", dir, "spent"]);
    assert_eq!(differs.status.code(), Some(3));
    let differs: Value = serde_json::from_str(&out(&differs)).unwrap();
    assert_eq!(differs["equal"], false);
    assert_ne!(differs["served"], differs["built"]);
    assert_eq!(names(), before);
}

/// A process that builds something slowly: it doesn't outlive its test.
struct Building {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Drop for Building {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Begins to build something, and waits for the first line of progress.
fn building(service: Service, args: &[&str], total: &str) -> Building {
    let mut child =
        service.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let mut building = Building { child, stderr };
    let mut line = String::new();
    building.stderr.read_line(&mut line).unwrap();
    assert!(line.contains("ing: ") && line.contains(total), "{line}");
    building
}

/// The same, and interrupts it.
fn interrupted(service: Service, args: &[&str], total: &str) -> (Option<i32>, String) {
    interrupt(&mut building(service, args, total))
}

fn interrupt(building: &mut Building) -> (Option<i32>, String) {
    let pid = building.child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let mut rest = String::new();
    building.stderr.read_to_string(&mut rest).unwrap();
    (building.child.wait().unwrap().code(), rest)
}

#[test]
fn an_interrupted_rebuild_or_check_leaves_nothing_behind() {
    let world = World::new();
    let dir = world.dir();
    for verb in ["rebuild", "check"] {
        let args = ["view", verb, dir, "spent", "--bytes-per-second-max", "1"];
        let (code, text) = interrupted(Service::default(), &args, "of 9 events");
        let last = text.lines().find(|line| line.starts_with("error")).unwrap();
        assert_eq!(code, Some(1), "{text}");
        assert!(last.starts_with("error[rebuild.cancelled]: "), "{text}");
        assert_eq!(world.generations(), ["1.1 live"]);
        assert!(!world.path.join("views/spent/check").exists());
        assert!(!world.path.join("views/spent/1.2").exists());
    }
    // And nothing is locked.
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!(rebuilt["compared"]["equal"], true);
    assert!(!OsFs.list(&world.path.join("views/spent")).unwrap().contains(&"check".to_owned()));
}

/// A store whose journal is long enough to be built from in bulk.
fn long() -> World {
    let world = World::new();
    let store = Store::open(&world.path).unwrap();
    let stream = StreamId::new("orders").unwrap();
    for batch in 0..20_u32 {
        let order = |n: u32| {
            let order = format!("town-{} {n} {}", batch % 7, "1".repeat(1 + n as usize % 9));
            NewEvent::raw("ordered", order).unwrap().metadata("filler", "x".repeat(600))
        };
        let orders = (0..100).map(order);
        store.append(&Append::to(&stream, ExpectedRevision::Any, orders)).unwrap();
    }
    store.close().unwrap();
    world
}

/// Nothing holds back the events of the journal but the version that is served.
fn held_by(world: &World) -> Vec<String> {
    let plan = json_of(headwater(&["retain", world.dir(), "--before", "9", "--json"]));
    let gates = plan["gates"].as_array().unwrap();
    gates.iter().map(|it| it["holder"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_first_build_that_is_interrupted_leaves_nothing_and_one_that_was_killed_can_be_removed() {
    let world = long();
    let dir = world.dir();
    let (store, view) = world.open(ViewOptions::default());
    caught_up(&store, &view);
    let new = Service { version: 2, ..Service::default() };
    let slowly = ["view", "rebuild", dir, "spent", "--bytes-per-second-max", "1"];
    let before = held_by(&world);
    assert_eq!(before.len(), 1, "{before:?}");
    let (code, text) = interrupted(new, &slowly, "of 2009 events");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.lines().any(|it| it.starts_with("error[rebuild.cancelled]: ")), "{text}");
    assert_eq!(world.generations(), ["1.1 live"]);
    assert_eq!(held_by(&world), before);
    assert!(!world.path.join("views/spent/2.1").exists());

    // Killed: it is told as what it is, nobody reads it, and it goes away.
    let killed = building(new, &slowly, "of 2009 events");
    let busy = headwater(&["view", "rm", dir, "spent", "2.1"]);
    failed(&busy, 1, "view.in_use");
    drop(killed);
    assert_eq!(world.generations(), ["1.1 live", "2.1"]);
    assert_eq!(world.status(&[])[1]["state"], "unfinished");
    let get = ["view", "scan", dir, "spent", "--limit", "1"];
    assert_eq!(ok(new.run(&get)), ok(service(&get)), "the rows of the version that is served");
    assert_eq!(ok(headwater(&get)).lines().count(), 2);
    assert_eq!(held_by(&world).len(), 2);
    ok(headwater(&["view", "rm", dir, "spent", "2.1"]));
    assert_eq!(world.generations(), ["1.1 live"]);
    assert_eq!(held_by(&world), before);
}

#[test]
fn a_first_build_in_order_that_is_interrupted_leaves_nothing_either() {
    let world = long();
    let dir = world.dir();
    let store = Store::open(&world.path).unwrap();
    drop(store.table_view(Towns::default()).unwrap());
    store.close().unwrap();
    ok(headwater(&["view", "rm", dir, "towns", "1"]));
    let slow = Service { fold_ms: 20, ..Service::default() };
    let mut building = building(slow, &["view", "rebuild", dir, "towns"], "of 2009 events");
    let names = || -> Vec<String> {
        let all = world.status(&[]);
        all.iter().map(|it| it["view"].as_str().unwrap().to_owned()).collect()
    };
    // Its rows are there as they come.
    assert_eq!(names(), ["spent", "towns"]);
    let text = interrupt(&mut building).1;
    assert!(text.lines().any(|it| it.starts_with("error[rebuild.cancelled]: ")), "{text}");
    assert_eq!(names(), ["spent"]);
    assert_eq!(held_by(&world).len(), 1);
}

#[test]
fn reads_of_a_view_whose_rows_are_being_made_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let world = World { path: dir.path().join("store"), _dir: dir };
    let dir = world.dir();
    let store = Store::create(&world.path).unwrap();
    append(&store, &ORDERS);
    // The fourth is of too little.
    let (demanding, options) = (Spent::<1> { cents_min: 10, twist: 0 }, ViewOptions::default());
    let view = store.view_with(demanding, ViewOptions { on_poison: OnPoison::Stop, ..options });
    let view = view.unwrap();
    stopped(&view);
    view.close().unwrap();
    drop(view);
    store.close().unwrap();
    let get = ["view", "get", dir, "spent", "basel", "3"];
    let got = service(&get);
    let said = "the view is being built: it is at position 3 of 9";
    assert_eq!(got.status.code(), Some(1));
    let warning = format!("warning: the row is degraded: {said}\nerror[");
    assert!(err(&got).starts_with(&warning), "{}", err(&got));
    let got = service(&[&get[..], &["--json"]].concat());
    let row: Value = serde_json::from_str(&out(&got)).unwrap();
    assert_eq!((&row["row"], &row["degraded"]), (&Value::Null, &json!(said)));
    let scan = ["view", "scan", dir, "spent"];
    let scanned = headwater(&scan);
    assert_eq!((scanned.status.code(), out(&scanned).lines().count()), (Some(0), 3));
    let warning = format!("warning: rows may be missing or lack events: {said}\n");
    assert_eq!(err(&scanned), warning);

    let (store, view) = world.open(ViewOptions::default());
    caught_up(&store, &view);
    view.close().unwrap();
    drop((view, store));
    assert_eq!(ok(headwater(&scan)).lines().count(), 6);
    ok(service(&get));
}

#[test]
fn a_version_that_nobody_opens_any_more_is_removed_whole() {
    let world = World::new();
    let dir = world.dir();
    let new = Service { version: 2, ..Service::default() };
    ok(new.run(&["view", "rebuild", dir, "spent"]));
    ok(new.run(&["view", "rebuild", dir, "spent"]));
    assert_eq!(world.generations(), ["1.1 live", "2.1", "2.2 live"]);
    failed(&headwater(&["view", "rm", dir, "spent", "2.2"]), 1, "view.live");
    let (store, view) = world.open(ViewOptions::default());
    failed(&headwater(&["view", "rm", dir, "spent", "1"]), 1, "view.in_use");
    let text = ok(headwater(&["view", "rm", dir, "spent", "2"]));
    assert_eq!(text, "spent: version 2 is deleted: 2.1, 2.2\n");
    assert_eq!(world.generations(), ["1.1 live"]);
    failed(&headwater(&["view", "rm", dir, "spent", "2"]), 1, "view.no_generation");
    drop((view, store));
    assert_eq!(ok(headwater(&["view", "scan", dir, "spent"])).lines().count(), 6);
}

/// A store, and one in its folder of mirrors, both with several segments, and a view that has applied all of the journals
/// that are named: `own`, `peer`. It lies with the store; that over the `mirror` lies with that one.
fn two_journals(view_over: &[&str]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let world = World { _dir: dir, path };
    let (own, peer) = (world.small_segments("own"), world.small_segments("peer"));
    for store in [&own, &peer] {
        for _ in 0..40 {
            append(store, &["basel 1 100", "bern 2 50", "geneva 3 5"]);
        }
    }
    let journal = |name: &&str| [&own, &peer][usize::from(*name != "own")].journal().clone();
    let journals: Vec<Journal> = view_over.iter().map(journal).collect();
    let keeper = if view_over == ["mirror"] { &peer } else { &own };
    let view = keeper.view_over(&journals, Spent::<1>::default(), ViewOptions::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.close().unwrap();
    drop(view);
    own.close().unwrap();
    peer.close().unwrap();
    world
}

impl World {
    /// Opens the store, or the one in its folder of mirrors, with segments of a few events.
    fn small_segments(&self, name: &str) -> Store {
        let options = JournalOptions {
            segment_bytes_first: 8 << 10,
            segment_bytes_max: 8 << 10,
            batch_bytes_max: 2 << 10,
            group_bytes_max: 2 << 10,
            ..JournalOptions::default()
        };
        let store = match name {
            "peer" => self.path.join("mirrors/peer"),
            _ => self.path.clone(),
        };
        Store::builder(store).create_if_missing().journal_options(options).open().unwrap()
    }

    /// Removes the oldest events of one of the two journals.
    fn forget(&self, name: &str) {
        let store = self.small_segments(name);
        let options = Options::new(Until::Position(store.journal().end().position));
        let target = store.plan_retention(&options).unwrap().target;
        assert!(target > Position::START, "{name}");
        store.retain(&options.history(History::Forget(target))).unwrap();
        store.close().unwrap();
    }

    fn rm(&self, generation: &str) -> Output {
        headwater(&["view", "rm", self.dir(), "spent", generation])
    }
}

/// What is deleted whole is built anew by the next one who opens it: not where one of the journals that it is made from
/// has lost its beginning, whatever others have.
#[test]
fn a_version_that_could_not_be_made_anew_is_not_deleted() {
    const BOTH: &[&str] = &["own", "peer"];
    let cases: &[(&[&str], &[&str], Option<&str>)] = &[
        (&["own"], &[], None),
        (&["own"], &["own"], Some("own")),
        (&["own"], &["peer"], None),
        (&["peer"], &["own"], None),
        (&["peer"], &["peer"], Some("mirrors/peer")),
        (&["mirror"], &["own"], None),
        (&["mirror"], &["peer"], Some("mirrors/peer")),
        (BOTH, &[], None),
        (BOTH, &["own"], Some("own")),
        (BOTH, &["peer"], Some("mirrors/peer")),
    ];
    for (view_over, forgotten, held_by) in cases {
        let what = format!("a view over {view_over:?} without the beginning of {forgotten:?}");
        println!("{what}");
        let world = two_journals(view_over);
        forgotten.iter().for_each(|name| world.forget(name));
        failed(&world.rm("2"), 1, "view.no_generation");
        let removed = world.rm("1");
        match held_by {
            None => {
                assert_eq!(ok(removed), "spent: version 1 is deleted: 1.1\n", "{what}");
                assert_eq!(world.generations(), [""; 0], "{what}");
            }
            Some(held_by) => {
                failed(&removed, 1, "view.truncated");
                assert!(err(&removed).contains(held_by), "{what}: {}", err(&removed));
                assert_eq!(world.generations(), ["1.1 live"], "{what}");
                assert_eq!(
                    ok(headwater(&["view", "scan", world.dir(), "spent"])).lines().count(),
                    3
                );
            }
        }
    }
}

/// Whoever can't know of which journals the rows are takes them for rows of all.
#[test]
fn a_version_that_can_not_be_read_is_deleted_only_if_no_journal_has_lost_its_beginning() {
    for (forgotten, is_held) in [(None, false), (Some("own"), true), (Some("peer"), true)] {
        let world = two_journals(&["own"]);
        if let Some(name) = forgotten {
            world.forget(name);
        }
        let current = world.path.join("views/spent/1.1/CURRENT");
        std::fs::write(&current, "damaged").unwrap();
        let removed = world.rm("1");
        match is_held {
            true => failed(&removed, 1, "view.truncated"),
            false => drop(ok(removed)),
        }
        assert_eq!(current.exists(), is_held);
    }
}

/// Nor is one of which a journal isn't there: it may have lost its beginning, where it is.
#[test]
fn a_version_is_deleted_only_where_all_of_its_journals_are() {
    let world = two_journals(&["own", "peer"]);
    let (peer, elsewhere) = (world.path.join("mirrors/peer"), world.path.join("elsewhere"));
    std::fs::rename(&peer, &elsewhere).unwrap();
    failed(&world.rm("1"), 1, "view.no_journal");
    assert_eq!(world.generations(), ["1.1 live"]);
    std::fs::rename(&elsewhere, &peer).unwrap();
    // A generation that no version reads is nobody's loss.
    ok(service(&["view", "rebuild", world.dir(), "spent"]));
    world.forget("own");
    let before = world.generations();
    assert_eq!(before, ["1.1", "1.2 live"]);
    failed(&world.rm("1"), 1, "view.truncated");
    failed(&world.rm("1.2"), 1, "view.live");
    assert_eq!(world.generations(), before);
    assert_eq!(ok(world.rm("1.1")), "spent: generation 1.1 is deleted\n");
    assert_eq!(world.generations(), ["1.2 live"]);
}

#[test]
fn what_is_parked_is_listed_retried_and_discarded() {
    let world = World::new();
    let dir = world.dir();
    // From a journal that the view meets with a fold that wants more.
    std::fs::remove_dir_all(world.path.join("views")).unwrap();
    let store = Store::open(&world.path).unwrap();
    let parks = ViewOptions { on_poison: OnPoison::Park, ..ViewOptions::default() };
    let view = store.view_with(Spent::<1> { cents_min: 20, twist: 0 }, parks).unwrap();
    caught_up(&store, &view);
    view.close().unwrap();
    drop(view);
    store.close().unwrap();

    let status = &world.status(&[])[0];
    assert_eq!(status["parked"], json!({ "keys": 2, "events": 3, "unrouted_events": 0 }));
    let parked = lines(&ok(service(&["view", "parked", "--json", dir, "spent"])));
    assert_eq!(parked.len(), 2);
    assert_eq!(parked[0]["key"], json!(["basel", 1]));
    assert_eq!((&parked[1]["events"], &parked[1]["first_position"]), (&json!(2), &json!(3)));
    assert!(parked[1]["reason"].as_str().unwrap().contains("too little"));
    let text = ok(headwater(&["view", "parked", dir, "spent"]));
    assert!(text.contains("|basel......|  1 events since "), "{text}");
    let events = lines(&ok(service(&["view", "parked", "--json", dir, "spent", "geneva", "3"])));
    let positions: Vec<&Value> = events.iter().map(|event| &event["position"]).collect();
    assert_eq!(positions, [3, 8]);
    assert_eq!((&events[0]["stream"], &events[0]["type"]), (&json!("orders"), &json!("ordered")));
    let got = service(&["view", "get", dir, "spent", "basel", "1"]);
    assert_eq!(out(&got), "{\"orders\":1,\"cents\":100}\n");
    assert!(err(&got).starts_with("warning: the row is degraded: 1 events"), "{}", err(&got));
    let scanned = service(&["view", "scan", dir, "spent"]);
    assert_eq!(out(&scanned).lines().count(), 5);
    assert!(err(&scanned).starts_with("warning: 2 rows lack events"), "{}", err(&scanned));
    let got = json_of(service(&["view", "get", "--json", dir, "spent", "basel", "1"]));
    assert!(got["degraded"].as_str().unwrap().contains("too little"));

    let stubborn = Service { cents_min: 20, ..Service::default() };
    let failing = stubborn.run(&["view", "retry", "--json", dir, "spent", "basel", "1"]);
    failed(&failing, 1, "view.still_parked");
    assert_eq!(lines(&out(&failing))[0]["left"], 1);
    failed(&stubborn.run(&["view", "retry", dir, "spent", "bern", "1"]), 1, "parked.not_parked");
    let retried = json_of(service(&["view", "retry", "--json", dir, "spent", "basel", "1"]));
    assert_eq!((&retried["applied"], &retried["left"]), (&json!(1), &json!(0)));
    assert_eq!(
        ok(service(&["view", "get", dir, "spent", "basel", "1"])),
        "{\"orders\":2,\"cents\":111}\n"
    );

    let discard = ["view", "discard", dir, "spent", "geneva", "3", "--position", "3"];
    failed(&stubborn.run(&discard), 1, "view.still_parked");
    let text = ok(service(&["view", "retry", dir, "spent", "[\"geneva\",3]"]));
    assert_eq!(text, "spent: 1 events applied, 0 left\n");
    assert_eq!(
        ok(service(&["view", "get", dir, "spent", "geneva", "3"])),
        "{\"orders\":1,\"cents\":1}\n"
    );
    let unrouted = ["view", "discard", dir, "spent", "--unrouted", "--position", "3"];
    failed(&service(&unrouted), 1, "parked.not_parked");
    assert_eq!(world.status(&[])[0]["parked"]["events"], 0);
    // The decision holds when it is built anew.
    assert_eq!(
        json_of(service(&["view", "rebuild", "--json", dir, "spent"]))["compared"]["equal"],
        true
    );
}

#[test]
fn views_of_mirrors_are_found_and_several_of_one_name_are_told_apart() {
    let world = World::new();
    let dir = world.dir();
    let mirror = |name: &str| {
        let dir = world.path.join("mirrors").join(name);
        std::fs::create_dir_all(dir.join("journal")).unwrap();
        for file in std::fs::read_dir(golden().join("mirror")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), dir.join("journal").join(file.file_name())).unwrap();
        }
        let fs: std::sync::Arc<dyn Fs> = std::sync::Arc::new(OsFs);
        let (journal, _) = Journal::open_read_only(&fs, &dir.join("journal")).unwrap();
        let end = journal.end().token();
        let views = dir.join("views");
        let view =
            headwater::view::open(&views, journal, Spent::<1>::default(), ViewOptions::default());
        let view = view.unwrap();
        view.wait_for(&end, PATIENCE).unwrap();
        view.close().unwrap();
        dir
    };
    let first = mirror("first");
    let of = |all: Vec<Value>| -> Vec<String> {
        all.iter().map(|it| it["of"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(of(world.status(&[])), ["own", "mirrors/first"]);
    assert_eq!(world.status(&[])[1]["durable_position"], 4);
    // The own one comes first; without it, the only one is meant.
    assert_eq!(ok(headwater(&["view", "scan", dir, "spent"])).lines().count(), 6);
    std::fs::rename(world.path.join("views"), world.path.join("elsewhere")).unwrap();
    let listed = json_of(headwater(&["view", "status", "--json", dir, "spent"]));
    assert_eq!(of(listed["views"].as_array().unwrap().clone()), ["mirrors/first"]);
    assert_eq!(ok(headwater(&["view", "scan", dir, "spent"])), "");
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["compared"]["equal"]), (&json!(2), &json!(true)));
    mirror("second");
    let several = headwater(&["view", "scan", dir, "spent"]);
    failed(&several, 1, "view.of_several");
    assert!(err(&several).contains("mirrors/first, mirrors/second"), "{}", err(&several));
    ok(headwater(&["view", "scan", first.to_str().unwrap(), "spent"]));
    let missing = world.path.join("missing");
    failed(&headwater(&["view", "ls", missing.to_str().unwrap()]), 1, "open.not_found");
}

#[test]
fn tables_are_read_by_their_names() {
    let world = World::new();
    let dir = world.dir();
    let store = Store::open(&world.path).unwrap();
    let towns = store.table_view(Towns::default()).unwrap();
    towns.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
    towns.close().unwrap();
    drop(towns);
    store.close().unwrap();
    let scan = |args: &[&'static str]| {
        let args = [&["view", "scan", "--json", dir, "towns"], args].concat();
        service(&args)
    };
    let rows = lines(&ok(scan(&["--table", "towns", "--prefix", "bern"])));
    let bern = json!({ "key": "bern", "row": 3 });
    assert_eq!(rows, [bern, json!({ "key": "bernex", "row": 1 })]);
    assert_eq!(lines(&ok(scan(&["--table", "all"]))), [json!({ "key": null, "row": 9 })]);
    let get = ["view", "get", dir, "towns", "geneva", "--table", "towns"];
    assert_eq!(ok(service(&get)), "2\n");
    assert_eq!(ok(headwater(&get)), "0x02\n");
    assert_eq!(ok(service(&["view", "get", dir, "towns", "--table", "all"])), "9\n");
    failed(&scan(&[]), 1, "view.table");
    failed(&scan(&["--table", "town"]), 1, "view.table");
    failed(&service(&["view", "scan", dir, "spent", "--table", "all"]), 1, "view.table");
    let checked = json_of(service(&["view", "check", "--json", dir, "towns"]));
    assert_eq!((&checked["equal"], &checked["built"]["rows"]), (&json!(true), &json!(5)));
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "towns"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["compared"]["equal"]), (&json!(2), &json!(true)));
    let status = &json_of(service(&["view", "status", "--json", dir, "towns"]))["views"][1];
    let tables = json!(["all", "towns"]);
    assert_eq!((&status["state"], &status["tables"]), (&json!("caught_up"), &tables));
    failed(&service(&["view", "retry", dir, "towns", "bern"]), 1, "parked.not_parked");
}

#[test]
fn a_view_of_several_journals_is_looked_at_checked_and_rebuilt() {
    let world = World::new();
    let dir = world.dir();
    std::fs::remove_dir_all(world.path.join("views")).unwrap();
    let mirror = world.path.join("mirrors/other/journal");
    std::fs::create_dir_all(&mirror).unwrap();
    for file in std::fs::read_dir(golden().join("mirror")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), mirror.join(file.file_name())).unwrap();
    }
    let store = Store::open(&world.path).unwrap();
    let fs: std::sync::Arc<dyn Fs> = std::sync::Arc::new(OsFs);
    let (other, _) = Journal::open_read_only(&fs, &mirror).unwrap();
    let journals = [store.journal().clone(), other.clone()];
    let view = store.view_over(&journals, Spent::<1>::default(), ViewOptions::default()).unwrap();
    for journal in &journals {
        view.wait_for(&journal.end().token(), PATIENCE).unwrap();
    }
    view.close().unwrap();
    drop(view);
    let own = store.journal().id().to_string();
    append(&store, &["zug 1 1"]);
    store.close().unwrap();
    drop(store);
    let status = &world.status(&[])[0];
    assert_eq!((&status["state"], &status["lag_events"]), (&json!("behind"), &json!(1)));
    let (durable, end) = (&status["durable_position"], &status["journal_end_position"]);
    assert_eq!((durable, end), (&json!(13), &json!(14)));
    let each = status["journals"].as_array().unwrap();
    let at = |id: &str| each.iter().find(|it| it["journal"] == id).unwrap();
    assert_eq!((&at(&own)["durable_position"], &at(&own)["end_position"]), (&json!(9), &json!(10)));
    assert_eq!(at(&other.id().to_string())["end_position"], 4);
    let checked = json_of(service(&["view", "check", "--json", dir, "spent"]));
    assert_eq!((&checked["equal"], &checked["position"]), (&json!(true), &json!(13)));
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["compared"]["equal"]), (&json!(2), &json!(true)));
    assert_eq!(world.status(&[])[1]["state"], "caught_up");
    // Each version with those that it is made from, whatever another one has.
    let store = Store::open(&world.path).unwrap();
    let view = store.view(Spent::<2>::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.close().unwrap();
    drop(view);
    store.close().unwrap();
    drop(store);
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["compared"]["equal"]), (&json!(3), &json!(true)));
    // Not where one of them is missing.
    std::fs::rename(world.path.join("mirrors/other"), world.path.join("elsewhere")).unwrap();
    failed(&service(&["view", "rebuild", dir, "spent"]), 1, "view.no_journal");
    assert_eq!(world.status(&[])[1]["state"], "unknown");
}

/// It lies beside the store's journal, which it has nothing of.
#[test]
fn a_view_of_exactly_one_mirror_that_lies_with_the_stores_own_is_looked_at_checked_and_rebuilt() {
    let world = World::new();
    let dir = world.dir();
    std::fs::remove_dir_all(world.path.join("views")).unwrap();
    let mirror = world.path.join("mirrors/other/journal");
    copy_dir(&golden().join("mirror"), &mirror);
    let store = Store::open(&world.path).unwrap();
    let fs: std::sync::Arc<dyn Fs> = std::sync::Arc::new(OsFs);
    let (other, _) = Journal::open_read_only(&fs, &mirror).unwrap();
    let journals = [other.clone()];
    let view = store.view_over(&journals, Spent::<1>::default(), ViewOptions::default()).unwrap();
    view.wait_for_latest(PATIENCE).unwrap();
    view.close().unwrap();
    drop(view);
    store.close().unwrap();
    let is_of_the_mirror = |status: &Value| {
        assert_eq!(status["state"], "caught_up");
        assert_eq!(
            (&status["durable_position"], &status["journal_end_position"]),
            (&json!(4), &json!(4))
        );
        assert_eq!(status["journals"][0]["journal"], other.id().to_string());
    };
    is_of_the_mirror(&world.status(&[])[0]);
    let checked = json_of(service(&["view", "check", "--json", dir, "spent"]));
    assert_eq!((&checked["equal"], &checked["position"]), (&json!(true), &json!(4)));
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!((&rebuilt["generation"], &rebuilt["compared"]["equal"]), (&json!(2), &json!(true)));
    is_of_the_mirror(&world.status(&[])[1]);
    // What can't be read may be it.
    let files = std::fs::read_dir(&mirror).unwrap().map(|it| it.unwrap().path());
    let files = files.filter(|it| it.is_file());
    files.for_each(|file| std::fs::write(file, b"damaged").unwrap());
    let refused = service(&["view", "rebuild", dir, "spent"]);
    assert_ne!(refused.status.code(), Some(0), "{}", err(&refused));
    assert_eq!(world.generations(), ["1.1", "1.2 live"]);
}

#[test]
fn a_damaged_view_and_one_ahead_of_its_journal_are_told() {
    let world = World::new();
    let dir = world.dir();
    let backup = world.path.with_file_name("backup");
    ok(headwater(&["backup", dir, backup.to_str().unwrap()]));
    let (store, view) = world.open(ViewOptions::default());
    append(&store, &["zug 1 1"]);
    caught_up(&store, &view);
    view.close().unwrap();
    drop(view);
    store.close().unwrap();
    drop(store);
    // The journal is put back to an older state.
    let restored = world.path.with_file_name("restored");
    ok(headwater(&["restore", backup.to_str().unwrap(), restored.to_str().unwrap()]));
    std::fs::remove_dir_all(world.path.join("journal")).unwrap();
    std::fs::rename(restored.join("journal"), world.path.join("journal")).unwrap();
    let ahead = &world.status(&[])[0];
    assert_eq!((&ahead["state"], &ahead["lag_events"]), (&json!("ahead"), &Value::Null));
    failed(&service(&["view", "rebuild", dir, "spent"]), 3, "view.lost_tail");
    failed(&service(&["view", "check", dir, "spent"]), 1, "view.not_judged");

    let generation = world.path.join("views/spent/1.1");
    let tables = std::fs::read_dir(&generation).unwrap().map(|entry| entry.unwrap().path());
    for table in tables.filter(|path| path.extension().is_some_and(|it| it == "sst")) {
        let mut bytes = std::fs::read(&table).unwrap();
        bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
        std::fs::write(&table, bytes).unwrap();
    }
    let listed = headwater(&["view", "ls", "--json", dir]);
    failed(&listed, 3, "view_storage.damaged");
    let damaged = &lines(&out(&listed))[0]["views"][0];
    assert_eq!(damaged["state"], "unreadable");
    assert!(damaged["error"].as_str().unwrap().contains("1.1"), "{damaged}");
    failed(&headwater(&["view", "scan", dir, "spent"]), 3, "view_storage.damaged");
}

#[test]
fn one_damaged_view_hides_no_other() {
    let world = World::new();
    let dir = world.dir();
    let store = Store::open(&world.path).unwrap();
    let towns = store.table_view(Towns::default()).unwrap();
    towns.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
    towns.close().unwrap();
    drop(towns);
    store.close().unwrap();
    let pointer = world.path.join("views/spent/live");
    std::fs::write(&pointer, "headwater view 1\n1 9\ncrc32 00000000\n").unwrap();
    for verb in ["ls", "status"] {
        let listed = headwater(&["view", verb, "--json", dir]);
        failed(&listed, 3, "view.damaged_pointer");
        assert!(err(&listed).contains("views/spent/live"), "{}", err(&listed));
        let listed: Value = serde_json::from_str(&out(&listed)).unwrap();
        let all = listed["views"].as_array().unwrap();
        let states: Vec<_> = all.iter().map(|it| (&it["view"], &it["state"])).collect();
        let (spent, towns) = (json!("spent"), json!("towns"));
        let (unreadable, caught_up) = (json!("unreadable"), json!("caught_up"));
        assert_eq!(states, [(&spent, &unreadable), (&towns, &caught_up)]);
        assert!(all[0]["error"].as_str().unwrap().contains("views/spent/live"), "{listed}");
        assert_eq!((&all[0]["version"], &all[0]["generation"]), (&Value::Null, &Value::Null));
        let text = out(&headwater(&["view", verb, dir]));
        assert!(text.contains("unreadable") && text.contains("caught_up"), "{text}");
    }
    failed(&headwater(&["view", "status", dir, "spent"]), 3, "view.damaged_pointer");
    ok(headwater(&["view", "status", dir, "towns"]));
    // So does a database.
    std::fs::remove_file(&pointer).unwrap();
    let current = world.path.join("views/spent/1.1/CURRENT");
    std::fs::write(&current, "MANIFEST-999999\n").unwrap();
    let listed = headwater(&["view", "ls", "--json", dir]);
    assert_ne!(listed.status.code(), Some(0), "{}", out(&listed));
    assert!(err(&listed).contains("views/spent/1.1"), "{}", err(&listed));
    let listed: Value = serde_json::from_str(&out(&listed)).unwrap();
    assert_eq!(listed["views"][1]["state"], "caught_up");
}

#[test]
fn what_can_not_be_the_beginning_of_a_key_is_told_what_keys_are() {
    let world = World::new();
    let dir = world.dir();
    let scan = |prefix: &str| service(&["view", "scan", dir, "spent", "--prefix", prefix]);
    for wrong in ["[\"bern\"", "[\"bern\",\"x\"]", "[\"bern\",1,2]", "[5]", "[\"bern\" 1]"] {
        let output = scan(wrong);
        failed(&output, 1, "view.key");
        assert!(err(&output).contains("(String, u32)"), "{}", err(&output));
        assert_eq!(out(&output), "");
    }
    let by = |prefix: &str| {
        service(&["view", "scan", dir, "spent", "--index", "by_cents", "--prefix", prefix])
    };
    for wrong in ["x", "[1", "1x", "-1"] {
        let output = by(wrong);
        failed(&output, 1, "view.key");
        assert!(err(&output).contains("u64"), "{}", err(&output));
    }
    assert_eq!(ok(by("75")).lines().count(), 2);
    assert_eq!(ok(scan("be")).lines().count(), 3);
    assert_eq!(ok(scan("[\"bern\"]")).lines().count(), 2);
}

/// A view has as many files as it has, and a process may have no more open than it may.
#[test]
fn a_view_of_more_files_than_may_be_open_is_read() {
    let world = World::new();
    let dir = world.dir();
    let store = Store::open(&world.path).unwrap();
    let orders: Vec<String> = (0..300).map(|n| format!("town-{n} {n} 1")).collect();
    append(&store, &orders.iter().map(String::as_str).collect::<Vec<_>>());
    store.close().unwrap();
    ok(service(&["view", "rebuild", dir, "spent", "--threads", "150"]));
    let tables = std::fs::read_dir(world.path.join("views/spent/1.2")).unwrap();
    let tables =
        tables.filter(|it| it.as_ref().unwrap().path().extension().is_some_and(|it| it == "sst"));
    assert!(tables.count() > 100);
    let all = ok(headwater(&["view", "scan", dir, "spent"]));
    for files_max in ["64", "1024"] {
        let limited = "ulimit -n \"$1\" && shift && exec \"$@\"";
        let program = env!("CARGO_BIN_EXE_headwater");
        let args = ["-c", limited, "sh", files_max, program, "view", "scan", dir, "spent"];
        assert!(ok(Command::new("sh").args(args).output().unwrap()) == all, "with {files_max}");
    }
    assert_eq!(all.lines().count(), 306);
}

/// The journals are held only for as long as it takes to open them: not while rows are built.
#[test]
fn a_rebuild_holds_its_view_and_no_journal() {
    let world = World::new();
    let dir = world.dir();
    let args = ["view", "rebuild", dir, "spent", "--bytes-per-second-max", "1"];
    let killed = building(Service::default(), &args, "of 9 events");
    let store = Store::open(&world.path).unwrap();
    append(&store, &["zug 1 1"]);
    let held = store.view(Spent::<1>::default()).map(drop).unwrap_err();
    assert_eq!(held.code(), "view.in_use");
    assert!(held.to_string().contains(&format!("process {}", killed.child.id())), "{held}");
    assert!(held.hint().contains("view rebuild"), "{}", held.hint());
    let towns = store.table_view(Towns::default()).unwrap();
    towns.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
    drop(killed);
    let view = store.view(Spent::<1>::default()).unwrap();
    caught_up(&store, &view);
}

/// Without the view's code, and so is the generation that it was replaced by, and everything that can be wrong.
#[test]
fn rows_are_exported_and_imported_while_no_service_has_the_view() {
    let world = World::new();
    let dir = world.dir();
    let base = world.path.join("base").display().to_string();
    let before = json_of(service(&["view", "get", "--json", dir, "spent", "bern", "1"]));
    let exported = json_of(headwater(&["view", "export", "--json", dir, "spent", &base]));
    assert_eq!(exported["journals"].as_array().unwrap().len(), 1);
    failed(&headwater(&["view", "export", dir, "spent", &base]), 1, "base.not_empty");
    failed(&headwater(&["view", "import", dir, "spent", &base]), 1, "base.live");
    failed(&headwater(&["view", "import", dir, "towns", &base]), 1, "base.another");
    failed(&headwater(&["view", "import", dir, "spent", dir]), 1, "base.not_a_base");
    let imported =
        json_of(headwater(&["view", "import", "--json", dir, "spent", &base, "--replace"]));
    assert!(imported["generation"].as_u64() > imported["previous"].as_u64(), "{imported}");
    assert_eq!(imported["digest"], exported["digest"]);
    assert_eq!(json_of(service(&["view", "get", "--json", dir, "spent", "bern", "1"])), before);
    ok(service(&["view", "check", dir, "spent"]));
    // Beside a journal with its history, and no views yet.
    let copy = world.path.join("copy").display().to_string();
    let store = world.path.join("store").display().to_string();
    ok(headwater(&["backup", dir, &copy]));
    ok(headwater(&["restore", &copy, &store]));
    let text = ok(headwater(&["view", "import", &store, "spent", &base]));
    assert!(text.contains("imported") && text.contains("generation 1.1 is live"), "{text}");
    assert_eq!(json_of(service(&["view", "get", "--json", &store, "spent", "bern", "1"])), before);
    // Another journal.
    let other = world.path.join("other");
    Store::create(&other).unwrap().close().unwrap();
    let other = other.display().to_string();
    failed(&headwater(&["view", "import", &other, "spent", &base]), 1, "view.no_journal");
    let current = Path::new(&base).join("rows/CURRENT");
    let mut bytes = std::fs::read(&current).unwrap();
    bytes[0] ^= 1;
    std::fs::remove_file(&current).unwrap();
    std::fs::write(&current, bytes).unwrap();
    failed(&headwater(&["view", "import", dir, "spent", &base, "--replace"]), 3, "base.damaged");
    let opened = Store::open(dir).unwrap();
    let view = opened.view(Spent::<1>::default()).unwrap();
    failed(&headwater(&["view", "export", dir, "spent", &copy]), 1, "view.in_use");
    view.close().unwrap();
}

/// The commands of a service, as they stand in docs/cli.md.
#[test]
fn every_command_of_a_service_that_the_documentation_shows_works() {
    let world = World::new();
    ok(service(&["view", "rebuild", world.dir(), "spent"]));
    let text = include_str!("../../docs/cli.md");
    let shown: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("$ service ")).collect();
    assert!(shown.len() >= 5, "{shown:?}");
    // Those about events are run where this service has event types: `cli_events`.
    for command in shown.into_iter().filter(|it| !it.starts_with("schema ")) {
        let command = command.split(" #").next().unwrap_or(command).trim();
        let command = command.replace("DIR", world.dir()).replace('\'', "");
        let args: Vec<&str> = command.split_whitespace().collect();
        ok(service(&args));
    }
}

/// A store with a view, for the commands of `headwater` that docs/cli.md shows.
pub(crate) fn with_view(path: &Path) {
    let store = Store::open(path).unwrap();
    append(&store, &ORDERS);
    let view = store.view(Spent::<1>::default()).unwrap();
    caught_up(&store, &view);
    view.rebuild(headwater::view::RebuildOptions::default()).unwrap().wait().unwrap();
    view.close().unwrap();
    drop(view);
    store.close().unwrap();
}

/// The tables of fields in docs/cli.md are the fields that are printed.
#[test]
fn the_documented_fields_are_exactly_those_that_are_printed() {
    let world = World::new();
    let dir = world.dir();
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let documented = crate::cli::documented;
    let status = json_of(service(&["view", "status", "--json", dir]));
    assert_eq!(documented("view status"), keys(&status["views"][0]));
    let rebuilt = json_of(service(&["view", "rebuild", "--json", dir, "spent"]));
    assert_eq!(documented("view rebuild"), keys(&rebuilt));
    let checked = json_of(service(&["view", "check", "--json", dir, "spent"]));
    assert_eq!(documented("view check"), keys(&checked));
    let base = world.path.join("base").display().to_string();
    let exported = json_of(service(&["view", "export", "--json", dir, "spent", &base]));
    assert_eq!(documented("view export"), keys(&exported));
    let got = json_of(service(&["view", "get", "--json", dir, "spent", "bern", "1"]));
    assert_eq!(documented("view get"), keys(&got));
}
