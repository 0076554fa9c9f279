//! The command line, as the real binary. Every command that docs/cli.md shows is run here.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use headwater::upcast::RawEvent;
use headwater::{
    Append, EventKindRef, ExpectedRevision, NewEvent, Payload, PayloadCodec, Store, StreamId,
    schema,
};
use serde_json::{Value, json};

use crate::golden::{golden, golden_json};
use crate::verify::{fill, small};

pub(crate) fn headwater(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(args).env("NO_COLOR", "1");
    command
}

pub(crate) fn run(args: &[&str]) -> Output {
    headwater(args).output().unwrap()
}

pub(crate) fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
pub(crate) fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()), "{args:?}");
    out(&output)
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn origin() -> String {
    golden().join("origin").display().to_string()
}

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

fn append(store: &Store, text: &str) {
    let event = NewEvent::raw("noted", text).unwrap();
    store.append(&Append::to(&stream("notes"), ExpectedRevision::Any, [event])).unwrap();
}

#[test]
fn cat_prints_every_event_with_the_documented_fields() {
    for journal in ["origin", "mirror"] {
        let dir = golden().join(journal).display().to_string();
        assert_eq!(lines(&ok(&["cat", "--json", &dir])), golden_json(journal));
    }
}

#[test]
fn cat_prints_json_payloads_as_they_were_written_text_as_text_and_the_rest_in_hexadecimal() {
    let text = ok(&["cat", &origin()]);
    let payloads: Vec<&str> =
        text.lines().map(|line| line.splitn(5, "  ").last().unwrap()).collect();
    assert!(payloads[0].ends_with(r#"{"total_cents":1250}"#), "{text}");
    assert!(payloads[1].ends_with("0xfbe20400"), "{text}");
    assert!(payloads[2].ends_with("one lamp, reserved"), "{text}");
    assert!(payloads[3].ends_with(r#"{"parcels":["A 1","B\"2"],"weight_kg":1.50}"#), "{text}");
    assert!(payloads[5].ends_with("0x0001feff"), "{text}");
    assert!(payloads[6].ends_with(r#"{"total_cents":18446744073709551615}"#), "{text}");
    assert!(
        text.starts_with("       0  2026-01-01T00:00:00.001000Z  order-1@0  order.placed v1  ")
    );
}

#[test]
fn cat_selects_by_position_number_stream_and_type() {
    let positions = |args: &[&str]| -> Vec<u64> {
        let origin = origin();
        let all = [&["cat", "--json", &origin], args].concat();
        lines(&ok(&all)).iter().map(|line| line["position"].as_u64().unwrap()).collect()
    };
    assert_eq!(positions(&["--from", "5"]), [5, 6]);
    assert_eq!(positions(&["--from", "7"]), [] as [u64; 0]);
    assert_eq!(positions(&["--from", "1", "--limit", "2"]), [1, 2]);
    assert_eq!(positions(&["--stream", "order-1"]), [0, 1, 3]);
    assert_eq!(positions(&["--stream", "order-1", "--from", "1", "--limit", "1"]), [1]);
    assert_eq!(positions(&["--type", "order.placed"]), [0, 6]);
    assert_eq!(positions(&["--stream", "σ", "--type", "é"]), [5]);
    assert_eq!(positions(&["--stream", "absent"]), [] as [u64; 0]);
    let beyond = run(&["cat", &origin(), "--from", "8"]);
    assert_eq!(beyond.status.code(), Some(1));
    assert!(err(&beyond).starts_with("error[read.beyond_end]: "), "{}", err(&beyond));
}

#[test]
fn stat_tells_identity_end_and_segments() {
    let stat: Value = serde_json::from_str(&ok(&["stat", "--json", &origin()])).unwrap();
    assert_eq!(stat["journal"], "00112233-4455-4677-8899-aabbccddeeff");
    assert_eq!((&stat["role"], &stat["end_position"]), (&json!("origin"), &json!(7)));
    assert_eq!((&stat["epoch"], &stat["damage"]), (&json!(2), &Value::Null));
    assert_eq!(stat["first_recorded_at_us"], 1_767_225_600_001_000_i64);
    assert_eq!(stat["last_recorded_at_us"], 1_767_225_600_007_000_i64);
    let states: Vec<_> = stat["segments"].as_array().unwrap().iter().map(|s| &s["state"]).collect();
    assert_eq!(states, ["sealed", "sealed", "active"]);
    let text = ok(&["stat", &origin()]);
    assert!(
        text.contains("00112233-4455-4677-8899-aabbccddeeff") && text.contains("0..3"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn a_store_its_journal_and_its_mirrors_are_all_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    fill(&store, small(), 3).close().unwrap();
    for to in ["mirrors/flat", "mirrors/nested/journal"] {
        std::fs::create_dir_all(store.join(to)).unwrap();
        for file in std::fs::read_dir(golden().join("mirror")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), store.join(to).join(file.file_name())).unwrap();
        }
    }
    let count = |path: PathBuf| lines(&ok(&["cat", "--json", path.to_str().unwrap()])).len();
    assert_eq!((count(store.clone()), count(store.join("journal"))), (3, 3));
    assert_eq!((count(store.join("mirrors/flat")), count(store.join("mirrors/nested"))), (4, 4));
    let path = store.display().to_string();
    let stat: Value = serde_json::from_str(&ok(&["stat", "--json", &path])).unwrap();
    let mirrors = stat["mirrors"].as_array().unwrap();
    assert_eq!(mirrors.len(), 2);
    assert_eq!((&mirrors[0]["name"], &mirrors[0]["end_position"]), (&json!("flat"), &json!(4)));
    assert!(ok(&["stat", &path]).contains("nested"));
}

#[test]
fn nothing_is_changed_and_no_lock_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let store = fill(dir.path(), small(), 40);
    let path = dir.path().display().to_string();
    let snapshot = |dir: &Path| {
        let mut all: Vec<(PathBuf, Vec<u8>)> = Vec::new();
        for entry in std::fs::read_dir(dir.join("journal")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                all.push((path.clone(), std::fs::read(path).unwrap()));
            }
        }
        all.sort();
        all
    };
    let look = |events: usize| {
        assert_eq!(ok(&["cat", &path]).lines().count(), events);
        assert_eq!(ok(&["tail", &path]).lines().count(), 10);
        assert!(ok(&["stat", &path]).contains(&events.to_string()));
        assert!(ok(&["verify", &path]).contains("healthy"));
    };
    look(40); // beside the writer, which holds the lock
    append(&store, "goes on");
    store.close().unwrap();
    let before = snapshot(dir.path());
    look(41);
    assert!(snapshot(dir.path()) == before, "something was changed");
}

#[test]
fn verify_exits_with_3_and_names_the_place_of_damage() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 60).close().unwrap();
    let path = dir.path().display().to_string();
    let report: Value = serde_json::from_str(&ok(&["verify", "--json", &path])).unwrap();
    assert_eq!((&report["healthy"], &report["events"]), (&json!(true), &json!(60)));
    assert_eq!(report["damage"], json!([]));

    let segment = dir.path().join("journal/0000000000000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[4096 + 150] ^= 0x10;
    std::fs::write(&segment, &bytes).unwrap();
    let found = run(&["verify", &path]);
    assert_eq!(found.status.code(), Some(3));
    let text = out(&found);
    assert!(text.contains("damage[damage.batch]: ") && text.contains("hint: "), "{text}");
    assert!(text.contains("0000000000000001.seg: damage at byte 4096"), "{text}");
    let found = run(&["verify", "--json", &path]);
    assert_eq!(found.status.code(), Some(3));
    let report: Value = serde_json::from_str(&out(&found)).unwrap();
    let damage = &report["damage"][0];
    assert_eq!((&damage["code"], &damage["file_offset"]), (&json!("damage.batch"), &json!(4096)));
    let position = damage["position"].as_u64().unwrap();

    // The others print what lies in front, then say what is wrong.
    let cat = run(&["cat", "--json", &path]);
    assert_eq!(cat.status.code(), Some(3), "{}", err(&cat));
    assert_eq!(lines(&out(&cat)).len() as u64, position);
    assert!(err(&cat).starts_with("error[read.corruption]: ") && err(&cat).contains("hint: "));
    let within = ["cat", &path, "--limit", "5"];
    assert_eq!(run(&within).status.code(), Some(0));
}

#[test]
fn errors_say_code_what_where_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing").display().to_string();
    for verb in ["stat", "cat", "tail", "verify"] {
        let output = run(&[verb, &missing]);
        assert_eq!(output.status.code(), Some(1), "{verb}");
        let text = err(&output);
        assert!(text.starts_with("error[open.not_found]: "), "{verb}: {text}");
        assert!(text.contains(&missing) && text.contains("\n  hint: "), "{verb}: {text}");
        assert_eq!(out(&output), "");
    }
    assert_eq!(run(&["cat"]).status.code(), Some(2));
    assert_eq!(run(&["mend", &missing]).status.code(), Some(2));
    assert_eq!(run(&["cat", &missing, "--from", "x"]).status.code(), Some(2));
    assert!(ok(&["--help"]).contains("Exit codes"));
    assert!(ok(&["--version"]).starts_with("headwater "));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 400).close().unwrap();
    let path = dir.path().display().to_string();
    let mut child =
        headwater(&["cat", &path]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap(); // and the pipe is closed
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()));
}

fn follow(path: &str, n: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = headwater(&["tail", "-f", "-n", n, "--json", path])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

fn next_text(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let line: Value = serde_json::from_str(&line).unwrap();
    line["payload_text"].as_str().unwrap().to_owned()
}

#[test]
fn tail_prints_the_last_events_and_follows_a_live_writer_across_rolls_and_reopenings() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    let store = fill(dir.path(), small(), 3);
    append(&store, "before");
    let last = lines(&ok(&["tail", "-n", "2", "--json", &path]));
    assert_eq!((last.len(), &last[1]["payload_text"]), (2, &json!("before")));
    assert_eq!(ok(&["tail", "-n", "0", &path]), "");

    let (mut child, mut reader) = follow(&path, "1");
    assert_eq!(next_text(&mut reader), "before");
    let long = "x".repeat(900);
    for i in 0..60 {
        append(&store, &format!("{i}-{long}")); // several segments
    }
    for i in 0..60 {
        assert_eq!(next_text(&mut reader), format!("{i}-{long}"));
    }
    store.close().unwrap();
    let store = fill(dir.path(), small(), 0);
    append(&store, "reopened");
    assert_eq!(next_text(&mut reader), "reopened");

    // Interrupted: it ends at once, with nothing half printed.
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    let status = child.wait().unwrap();
    assert_eq!((rest.as_str(), status.code()), ("", None));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(2));
}

#[test]
fn tail_stops_following_when_nobody_reads_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display().to_string();
    let store = fill(dir.path(), small(), 0);
    append(&store, "only");
    let (child, mut reader) = follow(&path, "1");
    assert_eq!(next_text(&mut reader), "only");
    drop(reader); // nothing more is ever appended
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()));
}

/// Who serves what lies in a directory, and where.
#[cfg(feature = "shipping")]
fn served(dir: &Path) -> (headwater::shipping::Server, String) {
    let fs: std::sync::Arc<dyn headwater::fs::Fs> = std::sync::Arc::new(headwater::fs::os::OsFs);
    let (journal, _) = headwater::Journal::open_read_only(&fs, dir).unwrap();
    let options = headwater::shipping::ServeOptions::default();
    let server = headwater::shipping::serve(journal, "127.0.0.1:0", options).unwrap();
    let address = server.local_addr().to_string();
    (server, address)
}

/// A mirror of a backup; what it was begun with, and its name, are checked.
#[test]
#[cfg(feature = "shipping")]
fn bootstrap_makes_a_mirror_of_a_backup_before_anybody_follows() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let origin = fill(&dir.path().join("origin"), small(), 40);
    origin.journal().backup(&dir.path().join("backup")).unwrap();
    Store::create(dir.path().join("store")).unwrap().close().unwrap();
    let made = lines(&ok(&["bootstrap", &path("store"), "orders", &path("backup"), "--json"]));
    assert_eq!(made[0]["end_position"], origin.journal().end().position.get());
    let mut fields: Vec<_> = made[0].as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(documented("bootstrap"), fields);
    ok(&["verify", &path("store/mirrors/orders")]);
    let again = run(&["bootstrap", &path("store"), "orders", &path("backup")]);
    assert!(err(&again).contains("error[restore.not_empty]"), "{}", err(&again));
    let nothing = run(&["bootstrap", &path("store"), "other", &path("nothing")]);
    assert!(err(&nothing).contains("error[restore.backup]"), "{}", err(&nothing));
    let named = run(&["bootstrap", &path("store"), "../x", &path("backup")]);
    assert!(err(&named).contains("mirror name"), "{}", err(&named));
}

/// Equal, then restored to an older state: lost, taken back, equal again; appended to instead: forked.
#[test]
#[cfg(feature = "shipping")]
fn peer_says_how_two_histories_relate_and_recover_takes_back_what_one_has_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (store, backup) = (dir.path().join("store"), dir.path().join("backup"));
    let opened = fill(&store, small(), 20);
    opened.journal().backup(&backup).unwrap();
    for n in 0..9 {
        append(&opened, &format!("later {n}"));
    }
    opened.close().unwrap();
    drop(opened);
    let newest = dir.path().join("newest");
    copy_segments(&store.join("journal"), &newest);
    let (_server, address) = served(&newest);
    let (at, older) = (store.to_str().unwrap(), dir.path().join("older"));
    assert!(ok(&["peer", at, &address]).contains("equal: "));
    let older_at = older.to_str().unwrap();
    ok(&["restore", backup.to_str().unwrap(), older_at]);
    let text = ok(&["peer", older_at, &address]);
    assert!(text.contains("behind: ") && text.contains("9 events more"), "{text}");
    let asked = run(&["recover", older_at, "--from", &address, "--check"]);
    assert_eq!(asked.status.code(), Some(1));
    assert!(err(&asked).contains("error[peers.longer]"), "{}", err(&asked));
    let back = lines(&ok(&["recover", older_at, "--from", &address, "--json"]));
    let mut fields: Vec<_> = back[0].as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(documented("recover"), fields);
    assert_eq!(back[0]["taken_back"]["address"], address);
    let peer = lines(&ok(&["peer", older_at, &address, "--json"]));
    let mut fields: Vec<_> = peer[0].as_object().unwrap().keys().cloned().collect();
    fields.sort();
    assert_eq!(documented("peer"), fields);
    assert_eq!(peer[0]["peer"]["standing"], "equal");
    assert!(ok(&["recover", older_at, "--from", &address]).contains("nothing is missing"));
    let forked = dir.path().join("forked");
    ok(&["restore", backup.to_str().unwrap(), forked.to_str().unwrap()]);
    let opened = Store::open(&forked).unwrap();
    append(&opened, "another");
    let common = opened.journal().end().position.get() - 1;
    opened.close().unwrap();
    drop(opened);
    let told = run(&["peer", forked.to_str().unwrap(), &address, "--json"]);
    assert_eq!(told.status.code(), Some(3), "{}", err(&told));
    let told = &lines(&out(&told))[0]["peer"];
    assert_eq!(told["standing"], "forked");
    assert_eq!((&told["common_position"], &told["orphaned_events"]), (&json!(common), &json!(1)));
    let refused = run(&["recover", forked.to_str().unwrap(), "--from", &address]);
    assert!(err(&refused).contains("error[peers.parted]"), "{}", err(&refused));
}

/// A mirror that has no journal at present was shown as one that "ends at position 0", with everything still to get.
#[test]
#[cfg(feature = "shipping")]
fn peer_and_recover_say_that_a_mirror_has_no_journal_at_present() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let origin = fill(&store, small(), 3);
    let upstream = origin.serve("127.0.0.1:0").unwrap();
    let address = upstream.local_addr().to_string();
    let follow = |name: &str| {
        let fs = std::sync::Arc::new(headwater::fs::os::OsFs);
        let address = address.clone();
        let options = headwater::shipping::FollowOptions::default();
        headwater::shipping::follow(fs, &dir.path().join(name), address, options).unwrap()
    };
    let mirror = follow("mirror");
    mirror.wait_caught_up(std::time::Duration::from_secs(20)).unwrap();
    let served = headwater::shipping::serve(&mirror, "127.0.0.1:0", Default::default()).unwrap();
    mirror.stop().unwrap();
    upstream.shutdown();
    let new = follow("new");
    let none = headwater::shipping::serve(&new, "127.0.0.1:0", Default::default()).unwrap();
    origin.close().unwrap();
    drop(origin);
    let (at, address) = (store.to_str().unwrap(), served.local_addr().to_string());
    // One that has never had it holds nothing of it, which is known.
    let text = ok(&["peer", at, &none.local_addr().to_string()]);
    assert!(text.contains("ends at position 0"), "{text}");
    let told = run(&["peer", at, &address]);
    assert_eq!(told.status.code(), Some(1), "{}", out(&told));
    let text = err(&told);
    assert!(text.contains("NOT_YET") && text.contains("no journal at present"), "{text}");
    let refused = run(&["recover", at, "--from", &address]);
    assert_eq!(refused.status.code(), Some(1));
    let text = err(&refused);
    assert!(text.contains("error[peers.unreached]") && text.contains("no journal at"), "{text}");
}

/// The documented commands, as they stand in docs/cli.md: `DIR` is a store here, other names in capitals are
/// directories that the commands make.
#[test]
fn every_command_that_the_documentation_shows_works() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    fill(&store, small(), 30).close().unwrap();
    #[cfg(feature = "views")]
    crate::cli_views::with_view(&store);
    std::fs::create_dir_all(store.join("mirrors")).unwrap();
    let mirror = store.join("mirrors/customers");
    std::fs::create_dir_all(&mirror).unwrap();
    for file in std::fs::read_dir(golden().join("mirror")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), mirror.join(file.file_name())).unwrap();
    }
    let copy = dir.path().join("copy");
    copy_segments(&store.join("journal"), &copy);
    for name in ["test.happened", "ordered"] {
        sample(&dir.path().join("SCHEMA"), name);
    }
    #[cfg(feature = "shipping")]
    security_files(dir.path());
    let text = include_str!("../../docs/cli.md");
    let shown: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("$ headwater ")).collect();
    let of_shipping =
        ["token", "pin ", "access ", "peer ", "recover ", "lag ", "topology ", "bootstrap "];
    let is_built_in = |command: &&str| {
        let of_shipping = of_shipping.iter().any(|verb| command.starts_with(verb));
        (cfg!(feature = "views") || !command.starts_with("view "))
            && (cfg!(feature = "shipping") || !of_shipping)
    };
    #[cfg(feature = "shipping")]
    let (_server, address) = served(&copy);
    #[cfg(not(feature = "shipping"))]
    let address = "";
    let shown: Vec<&str> = shown.into_iter().filter(is_built_in).collect();
    assert!(shown.len() >= 10, "{shown:?}");
    for command in shown {
        let command = command.split(" #").next().unwrap_or(command).trim();
        let (command, piped) = match command.split_once(" | ") {
            Some((command, piped)) => (command, Some(piped)),
            None => (command, None),
        };
        let mut command = command.replace("DIR", store.to_str().unwrap());
        for name in
            ["BACKUP", "STORE", "EARLIER", "ARCHIVE", "BASE", "SCHEMA", "PEM", "TOKEN", "LIST"]
        {
            command = command.replace(name, dir.path().join(name).to_str().unwrap());
        }
        command = command.replace("COPY", copy.to_str().unwrap());
        command = command.replace("HOST:PORT", &address);
        let args: Vec<&str> = command.split_whitespace().collect();
        let following = ["-f", "--watch"].iter().any(|flag| args.contains(flag));
        if following || piped.is_some() {
            let mut child = headwater(&args).stdout(Stdio::piped()).spawn().unwrap();
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "{command}");
            assert_eq!(child.wait().unwrap().code(), Some(0), "{command}");
        } else {
            let output = run(&args);
            assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()), "{command}");
        }
    }
}

/// A certificate, a token and an access list.
#[cfg(feature = "shipping")]
fn security_files(dir: &Path) {
    use headwater::shipping::security::{AccessToken, KeyPin, Peer, Pem, Right};

    let certified = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
    let (pem, token) = (certified.cert.pem(), AccessToken::generate().unwrap());
    let peer = Peer {
        keys: vec![KeyPin::of(&Pem::text(pem.clone())).unwrap()],
        tokens: vec![token.hash()],
        may: vec![Right::everything()],
        ..Peer::named("shipping")
    };
    std::fs::write(dir.join("PEM"), pem).unwrap();
    std::fs::write(dir.join("TOKEN"), token.expose()).unwrap();
    std::fs::write(dir.join("LIST"), json!({ "peers": [peer] }).to_string()).unwrap();
}

#[cfg(feature = "shipping")]
#[test]
fn tokens_pins_and_access_lists_are_what_a_server_takes() {
    let dir = tempfile::tempdir().unwrap();
    security_files(dir.path());
    let file = |name: &str| dir.path().join(name).display().to_string();
    let json = |args: &[&str]| lines(&ok(args)).remove(0);
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let made = json(&["token", "--json"]);
    assert_eq!(documented("token"), keys(&made));
    std::fs::write(file("made"), made["token"].as_str().unwrap()).unwrap();
    assert_eq!(json(&["token", "--hash", &file("made"), "--json"])["hash"], made["hash"]);
    let pin = json(&["pin", &file("PEM"), "--json"]);
    assert_eq!(documented("pin"), keys(&pin));
    let access = json(&["access", &file("LIST"), "--json"]);
    assert_eq!(documented("access"), keys(&access));
    assert_eq!(access["peers"][0]["keys"][0], pin["pin"]);
    let text = ok(&["access", &file("LIST")]);
    assert!(text.contains("shipping") && text.contains("1 key, 1 token"), "{text}");

    std::fs::write(file("LIST"), "{ \"peers\": [\n{ \"nam\": 1 }] }").unwrap();
    let wrong = run(&["access", &file("LIST")]);
    assert_eq!(wrong.status.code(), Some(1));
    let text = err(&wrong);
    assert!(text.contains("error[security.access]") && text.contains("line 2"), "{text}");
}

/// The fields in the table under this title of docs/cli.md.
pub(crate) fn documented(title: &str) -> Vec<String> {
    let text = include_str!("../../docs/cli.md");
    let section = text.split(&format!("### {title}\n")).nth(1).expect(title);
    let section = section.split("\n#").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut names: Vec<_> = rows.map(|row| row.split('`').next().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// The tables of fields in docs/cli.md are the fields that are printed.
#[test]
fn the_documented_fields_are_exactly_those_that_are_printed() {
    let keys = |values: &[Value]| -> Vec<String> {
        let mut keys: Vec<String> =
            values.iter().flat_map(|value| value.as_object().unwrap().keys().cloned()).collect();
        keys.sort();
        keys.dedup();
        keys
    };
    assert_eq!(documented("An event"), keys(&lines(&ok(&["cat", "--json", &origin()]))));
    assert_eq!(documented("stat"), keys(&lines(&ok(&["stat", "--json", &origin()]))));
    assert_eq!(documented("verify"), keys(&lines(&ok(&["verify", "--json", &origin()]))));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let backup = ok(&["backup", "--json", &origin(), &path("backup")]);
    assert_eq!(documented("backup"), keys(&lines(&backup)));
    let restored = ok(&["restore", "--json", &path("backup"), &path("store")]);
    assert_eq!(documented("restore"), keys(&lines(&restored)));
    let retain = ok(&["retain", "--json", &origin(), "--before", "1"]);
    assert_eq!(documented("retain"), keys(&lines(&retain)));
    fill(&dir.path().join("doctored"), small(), 3).close().unwrap();
    let doctored = path("doctored");
    assert_eq!(documented("doctor"), keys(&lines(&ok(&["doctor", "--json", &doctored]))));
    std::fs::create_dir(path("schema")).unwrap();
    let checked = run(&["schema", "check", "--json", &path("schema"), &doctored]);
    assert_eq!(documented("schema check"), keys(&lines(&out(&checked))));
}

fn copy_segments(journal: &Path, copy: &Path) {
    std::fs::create_dir_all(copy).unwrap();
    for file in std::fs::read_dir(journal).unwrap().map(Result::unwrap) {
        if file.path().extension().is_some_and(|extension| extension == "seg") {
            std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
    }
}

/// A store with damage in segment 1, and a copy of its segments.
fn damaged(dir: &Path) -> (String, String, PathBuf) {
    let (store, copy) = (dir.join("store"), dir.join("copy"));
    fill(&store, small(), 60).close().unwrap();
    copy_segments(&store.join("journal"), &copy);
    let segment = store.join("journal/0000000000000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[4096 + 150] ^= 0x10;
    std::fs::write(&segment, &bytes).unwrap();
    (store.display().to_string(), copy.display().to_string(), segment)
}

fn json_of(args: &[&str], code: i32) -> Value {
    let output = run(args);
    assert_eq!((output.status.code(), err(&output)), (Some(code), String::new()), "{args:?}");
    serde_json::from_str(&out(&output)).unwrap()
}

#[test]
fn repair_plans_first_and_fetches_what_a_copy_has() {
    let dir = tempfile::tempdir().unwrap();
    let (store, copy, segment) = damaged(dir.path());
    let before = std::fs::read(&segment).unwrap();
    let planned = run(&["repair", &store, "--from", &copy]);
    assert_eq!(planned.status.code(), Some(3));
    let text = out(&planned);
    assert!(text.contains("would fetch the events at positions "), "{text}");
    assert!(
        text.contains("bytes at byte 4096 of ") && text.contains("nothing was changed"),
        "{text}"
    );
    assert_eq!(std::fs::read(&segment).unwrap(), before);
    let value = json_of(&["repair", "--json", &store, "--from", &copy], 3);
    assert_eq!((&value["applied"], &value["healthy"]), (&json!(false), &json!(false)));
    assert_eq!(
        (&value["steps"][0]["step"], &value["steps"][0]["possible"]),
        (&json!("fetch"), &json!(true))
    );

    let done = run(&["repair", &store, "--from", &copy, "--apply"]);
    assert_eq!((done.status.code(), err(&done)), (Some(0), String::new()), "{}", out(&done));
    assert!(out(&done).contains("did fetch ") && out(&done).contains("healthy: 60 events"));
    let whole = Path::new(&copy).join("0000000000000001.seg");
    assert_eq!(std::fs::read(&segment).unwrap(), std::fs::read(whole).unwrap());
    ok(&["verify", "--deep", &store]);
    let value = json_of(&["repair", "--json", &store], 0);
    assert_eq!((&value["healthy"], &value["steps"]), (&json!(true), &json!([])));
}

#[test]
fn repair_gives_up_only_what_is_named_and_readers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (store, copy, _) = damaged(dir.path());
    let value = json_of(&["repair", "--json", "--apply", &store], 3);
    assert_eq!((&value["steps"], &value["left"][0]["step"]), (&json!([]), &json!("give_up")));
    let (from, to) = (&value["left"][0]["from_position"], &value["left"][0]["to_position"]);
    let range = format!("{from}..{to}");
    let planned = run(&["repair", &store]);
    assert!(out(&planned).contains(&format!("--accept-gap {range}")), "{}", out(&planned));
    let wrong = run(&["repair", "--apply", &store, "--accept-gap", "0..1"]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(err(&wrong).starts_with("error[repair.not_lost]: "), "{}", err(&wrong));
    assert_eq!(run(&["repair", &store, "--accept-gap", "7"]).status.code(), Some(2));

    let done = json_of(&["repair", "--json", "--apply", &store, "--accept-gap", &range], 0);
    assert_eq!((&done["healthy"], &done["left"]), (&json!(true), &json!([])));
    let verified = json_of(&["verify", "--json", &store], 0);
    assert_eq!(verified["lost"], json!([{ "from_position": from, "to_position": to }]));
    let cat = run(&["cat", "--json", &store]);
    assert_eq!(
        (cat.status.code(), lines(&out(&cat)).len() as u64),
        (Some(3), from.as_u64().unwrap())
    );
    assert!(err(&cat).starts_with("error[read.gap]: "), "{}", err(&cat));
    let rest = ok(&["cat", "--json", &store, "--from", &to.to_string()]);
    assert_eq!(lines(&rest).len() as u64, 60 - to.as_u64().unwrap());
    let doctor = json_of(&["doctor", "--json", &store], 0);
    let gaps = doctor["checks"].as_array().unwrap().iter().find(|check| check["name"] == "gaps");
    assert_eq!(gaps.unwrap()["level"], "warn");

    json_of(&["repair", "--json", "--apply", &store, "--from", &copy], 0);
    assert_eq!(lines(&ok(&["cat", "--json", &store])).len(), 60);
}

#[test]
fn doctor_exits_with_3_for_damage_and_0_with_warnings() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 60).close().unwrap();
    let path = dir.path().display().to_string();
    assert!(ok(&["doctor", &path]).contains("0 failed, "));
    let journal = dir.path().join("journal");
    std::fs::remove_file(journal.join("0000000000000000.idx")).unwrap();
    let text = ok(&["doctor", &path]);
    assert!(text.contains("warn  sidecars") && text.contains("hint: "), "{text}");
    std::fs::remove_file(journal.join("0000000000000001.seg")).unwrap();
    let failed = run(&["doctor", &path]);
    assert_eq!((failed.status.code(), err(&failed)), (Some(3), String::new()));
    assert!(out(&failed).contains("fail  journal"), "{}", out(&failed));
}

#[test]
fn retain_plans_first_and_removes_what_the_archive_has_or_what_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (store, archive) = (path("store"), path("archive"));
    let open = fill(Path::new(&store), small(), 120);
    ok(&["archive", &store, &archive]);
    let plan = json_of(&["retain", "--json", &store, "--before", "60", "--archive", &archive], 0);
    assert_eq!((&plan["applied"], &plan["first_position"]), (&json!(false), &json!(0)));
    assert_eq!(plan["blocker"], Value::Null);
    let target = plan["target_position"].as_u64().unwrap();
    assert!(target > 0 && target <= 60);
    let text = ok(&["retain", &store, "--before", "60"]);
    assert!(text.contains(&format!("--forget {target}")) && text.contains("nothing was changed"));
    let apply = ["retain", &store, "--before", "60", "--archive", &archive, "--apply"];
    let locked = run(&apply);
    assert!(err(&locked).starts_with("error[open.locked]: "), "{}", err(&locked));
    open.close().unwrap();
    let undecided = run(&["retain", &store, "--before", "60", "--apply"]);
    assert_eq!(undecided.status.code(), Some(1));
    assert!(err(&undecided).starts_with("error[retention.undecided]: "), "{}", err(&undecided));
    assert!(ok(&apply).contains(&format!("the journal begins at {target}")));
    assert_eq!(lines(&ok(&["cat", "--json", &store])).len() as u64, 120 - target);
    let gone = run(&["cat", &store, "--from", "0"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(err(&gone).starts_with("error[read.truncated]: "), "{}", err(&gone));
    ok(&["verify", "--deep", &store]);
    assert_eq!(lines(&ok(&["cat", "--json", &archive])).len(), 120);
    ok(&["archive", &store, &archive]);

    let wrong = run(&["retain", &store, "--before", "90", "--forget", "89", "--apply"]);
    assert_eq!(wrong.status.code(), Some(1));
    let plan = json_of(&["retain", "--json", &store, "--before", "90"], 0);
    let named = plan["target_position"].to_string();
    if named != "89" {
        assert!(err(&wrong).starts_with("error[retention.not_as_planned]: "), "{}", err(&wrong));
    }
    ok(&["retain", &store, "--before", "90", "--forget", &named, "--apply"]);
    let stat = json_of(&["stat", "--json", &store], 0);
    assert_eq!(stat["first_position"].to_string(), named);
    assert_eq!(run(&["retain", &store]).status.code(), Some(2));
    assert_eq!(ok(&["doctor", &store]).matches("fail ").count(), 0);
}

#[test]
fn backup_and_restore_make_a_store_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (store, backup, restored) = (path("store"), path("backup"), path("restored"));
    let open = fill(Path::new(&store), small(), 40);
    let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let first = json(&ok(&["backup", "--json", &store, &backup]));
    assert_eq!(first["end_position"], 40);
    assert!(first["written_bytes"].as_u64().unwrap() > 0);
    let again = ok(&["backup", &store, &backup]);
    assert!(again.ends_with(": 0 bytes new\n"), "{again}");
    open.close().unwrap();
    ok(&["verify", &backup]);
    assert_eq!(ok(&["cat", "--json", &backup]), ok(&["cat", "--json", &store]));

    let done = json(&ok(&["restore", &backup, &restored, "--at-position", "20", "--json"]));
    assert_eq!((&done["end_position"], &done["journal"]), (&json!(20), &first["journal"]));
    let refused = run(&["restore", &backup, &restored]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(err(&refused).starts_with("error[restore.not_empty]: "), "{}", err(&refused));
    let refused = run(&["restore", &backup, &restored, "--abandon"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(err(&refused).starts_with("error[restore.not_begun]: "), "{}", err(&refused));
    let again = Store::open(&restored).unwrap();
    append(&again, "goes on");
    again.close().unwrap();
    assert_eq!(lines(&ok(&["cat", "--json", &restored])).len(), 21);
    let onto = run(&["backup", &store, &format!("{restored}/journal")]);
    assert!(err(&onto).starts_with("error[backup.not_a_backup]: "), "{}", err(&onto));

    // A damaged backup, and a restore that was left unfinished.
    let segment = Path::new(&backup).join("0000000000000000.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[4096 + 200] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let other = path("other");
    assert_eq!(run(&["restore", &backup, &other]).status.code(), Some(3));
    assert!(!Path::new(&other).exists(), "nothing was begun");
    std::fs::create_dir_all(Path::new(&other).join("journal")).unwrap();
    std::fs::write(Path::new(&other).join("journal/incoming"), "interrupted").unwrap();
    assert!(matches!(Store::open(&other), Err(headwater::OpenError::Incomplete { .. })));
    assert!(ok(&["restore", &backup, &other, "--abandon"]).starts_with("abandoned"));
    assert!(matches!(Store::open(&other), Err(headwater::OpenError::NotFound { .. })));
}

/// Records a sample of events of plain bytes.
fn sample(dir: &Path, name: &str) {
    let kind = EventKindRef { name, schema_version: 1 };
    let payload = Payload { codec: PayloadCodec::Raw, bytes: b"x" };
    schema::record_raw(dir, &RawEvent::new(kind, payload)).unwrap();
}

#[test]
fn schema_check_names_the_kinds_of_events_without_a_sample() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (samples, store) = (path("schema"), path("store"));
    let open = Store::create(&store).unwrap();
    append(&open, "one");
    append(&open, "two");
    let placed = NewEvent::json("order.placed", &1250).unwrap().schema_version(2);
    open.append(&Append::to(&stream("order"), ExpectedRevision::Any, [placed])).unwrap();

    let missing = run(&["schema", "check", &samples, &store]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).starts_with("error[schema.io]: "), "{}", err(&missing));
    sample(Path::new(&samples), "noted");
    // Another version and another codec are other kinds.
    let encode = |version, codec| RawEvent::encode("order.placed", version, codec, &1250).unwrap();
    schema::record_raw(&samples, &encode(1, PayloadCodec::Json)).unwrap();
    schema::record_raw(&samples, &encode(2, PayloadCodec::Bincode)).unwrap();
    let missing = run(&["schema", "check", &samples, &store]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).starts_with("error[schema.unrecorded]: 1 kinds"), "{}", err(&missing));
    let text = out(&missing);
    assert_eq!(text.matches("MISSING").count(), 1, "{text}");
    assert!(text.lines().any(|it| it.contains("order.placed") && it.contains("MISSING")), "{text}");
    let missing = run(&["schema", "check", "--json", &samples, &store]);
    assert_eq!(missing.status.code(), Some(1));
    let value: Value = serde_json::from_str(&out(&missing)).unwrap();
    assert_eq!((&value["complete"], &value["samples"]), (&json!(false), &json!(3)));
    let kind = json!({
        "type": "order.placed", "schema_version": 2, "codec": "json", "events": 1,
        "first_position": 2, "recorded": false, "read_events": null,
    });
    assert_eq!(value["kinds"][1], kind);
    assert_eq!(
        (&value["kinds"][0]["events"], &value["kinds"][0]["recorded"]),
        (&json!(2), &json!(true))
    );

    schema::record_raw(&samples, &encode(2, PayloadCodec::Json)).unwrap();
    ok(&["schema", "check", &samples, &store]);
    assert_eq!(
        json_of(&["schema", "check", "--json", &samples, &store], 0)["complete"],
        json!(true)
    );
    open.close().unwrap();
    std::fs::write(dir.path().join("schema/broken.hex"), "?").unwrap();
    let broken = run(&["schema", "check", &samples, &store]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(err(&broken).starts_with("error[schema.unreadable]: "), "{}", err(&broken));
    assert_eq!(run(&["schema", "check", &samples]).status.code(), Some(2));
}
