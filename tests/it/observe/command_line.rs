//! `headwater lag`, `peer ls` and `topology` beside services that run, and beside what they leave; what doctor and verify
//! tell of what shipping leaves; connections with TLS and tokens.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use headwater::shipping::ForkPolicy;
use serde_json::{Value, json};

use super::*;
use crate::cli::{documented, err, headwater, ok, out, run};

fn json_of(args: &[&str]) -> Value {
    serde_json::from_str(&ok(args)).unwrap()
}

fn keys(value: &Value) -> Vec<String> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    keys
}

/// A service that serves its journal, and one that mirrors it.
struct Services {
    dir: tempfile::TempDir,
    orders: Store,
    customers: Store,
    server: Option<Server>,
    mirror: Option<Mirror>,
}

impl Services {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| Store::create(dir.path().join(name)).unwrap();
        let (orders, customers) = (open("orders"), open("customers"));
        let server = orders.serve("127.0.0.1:0").unwrap();
        let mirror = customers.mirror("orders", server.local_addr().to_string()).unwrap();
        let (server, mirror) = (Some(server), Some(mirror));
        Self { dir, orders, customers, server, mirror }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn address(&self) -> String {
        self.server.as_ref().unwrap().local_addr().to_string()
    }

    /// The only link of `lag`, once it is as wanted.
    #[track_caller]
    fn link(&self, store: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let path = self.path(store);
        let look = || json_of(&["lag", "--json", &path]);
        let is_wanted = |found: &Value| match found["links"].as_array().unwrap().as_slice() {
            [link] => wanted(link),
            _ => false,
        };
        until(look, is_wanted)["links"][0].clone()
    }
}

fn is(state: &'static str) -> impl Fn(&Value) -> bool {
    move |link| link["state"] == state
}

/// Only what its process knows.
#[track_caller]
fn assert_nothing_live(link: &Value) {
    for field in ["lag_events", "lag_bytes", "lag_ms", "connected_ms", "sent_position"] {
        assert_eq!(link[field], Value::Null, "{field} of {link}");
    }
}

#[test]
fn lag_shows_both_ends_while_they_run_and_nothing_that_only_they_knew_afterwards() {
    let mut services = Services::start();
    let mirror = services.mirror.as_ref().unwrap();
    (0..20).for_each(|_| append(&services.orders, "ordered"));
    mirror.wait_ready(SOON).unwrap();
    mirror.wait_caught_up(SOON).unwrap();
    let level = |link: &Value| link["state"] == "live" && link["lag_events"] == 0;
    let to = services.link("orders", |link| level(link) && link["durable_position"] == 20);
    let from = services.link("customers", |link| level(link) && link["durable_position"] == 20);
    for link in [&to, &from] {
        assert_eq!((&link["lag_bytes"], &link["lag_ms"]), (&json!(0), &json!(0)), "{link}");
        assert_eq!(documented("A link"), keys(link));
    }
    let ends = ["of", "direction"].map(|field| [&to[field], &from[field]]);
    assert_eq!(ends, [["journal", "mirrors/orders"], ["to", "from"]]);
    let node = services.orders.journal().node().to_string();
    assert_eq!((&from["node"], &from["path"]), (&json!(node), &json!([node])));
    let node = mirror.journal().unwrap().node().to_string();
    assert_eq!((&to["node"], &to["held_bytes"]), (&json!(node), &json!(0)));
    assert_eq!(from["address"], services.address());
    let path = services.path("orders");
    assert_eq!(documented("lag"), keys(&json_of(&["lag", "--json", &path])));
    assert_eq!(documented("peer ls"), keys(&json_of(&["peer", "ls", "--json", &path])));
    let text = ok(&["lag", &path]);
    assert!(
        text.contains("live") && text.contains("holds back") && text.contains("applied"),
        "{text}"
    );
    let text = ok(&["peer", "ls", &services.path("customers")]);
    assert!(text.contains(&services.address()) && text.contains("live"), "{text}");

    // The server says goodbye: the mirror knows only what it has, its origin's store only what holds it back.
    services.server.take().unwrap().shutdown();
    append(&services.orders, "nobody is told");
    let from = services.link("customers", is("connecting"));
    assert_nothing_live(&from);
    assert_eq!((&from["durable_position"], &from["node"]), (&json!(20), &to_node(&services)));
    let to = services.link("orders", is("unknown"));
    assert_nothing_live(&to);
    assert_eq!((&to["durable_position"], &to["held_bytes"]), (&json!(20), &json!(0)));
    let text = ok(&["lag", &path]);
    assert!(text.contains("unknown") && !text.contains(" 0.000 "), "{text}");

    // It comes back, and the mirror doesn't.
    services.mirror.take().unwrap().stop().unwrap();
    let from = services.link("customers", is("stopped"));
    assert_nothing_live(&from);
    assert_eq!(from["durable_position"], 20);
    services.server = Some(services.orders.serve("127.0.0.1:0").unwrap());
    let to = services.link("orders", is("away"));
    assert_nothing_live(&to);
    assert!(to["heard_ms"].is_u64(), "{to}");
}

fn to_node(services: &Services) -> Value {
    json!(services.orders.journal().node().to_string())
}

#[test]
fn a_mirror_that_has_never_reached_its_origin_says_why_and_who_was_refused_is_counted() {
    let services = Services::start();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let store = Store::create(services.dir.path().join("lonely")).unwrap();
    let mirror = store.mirror("absent", unused.clone()).unwrap();
    let link = services.link("lonely", |link| link["error"]["code"] == "shipping.connect");
    assert_nothing_live(&link);
    assert_eq!((&link["state"], &link["address"]), (&json!("connecting"), &json!(unused)));
    assert_eq!((&link["durable_position"], &link["node"]), (&Value::Null, &Value::Null));
    assert!(link["ends"]["refused"].as_u64().unwrap() > 0);
    let path = services.path("lonely");
    let text = ok(&["peer", "ls", &path]);
    assert!(text.contains("error[shipping.connect]") && text.contains("hint: "), "{text}");
    let dot = ok(&["topology", &path, "--dot"]);
    assert!(dot.contains(&format!("{unused:?} -> \"mirrors/absent\"")), "{dot}");
    mirror.stop().unwrap();

    let mut hostile = TcpStream::connect(services.address()).unwrap();
    hostile.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let orders = services.path("orders");
    let look = || json_of(&["peer", "ls", "--json", &orders]);
    let list = until(look, |list| list["refused"][0]["reasons"]["protocol"] == 1);
    assert_eq!(list["refused"][0]["of"], "journal");
    let text = ok(&["peer", "ls", &orders]);
    assert!(text.contains("connections that came to no subscription: 1 protocol"), "{text}");
}

/// A mirror that is served is a node in between, and is drawn as one at both of its ends.
#[test]
fn topology_is_a_graph_of_nodes_and_connections() {
    let services = Services::start();
    append(&services.orders, "ordered");
    let mirror = services.mirror.as_ref().unwrap();
    let mirrored = mirror.wait_ready(SOON).unwrap();
    let relay = serve(mirrored.clone(), "127.0.0.1:0", ServeOptions::default()).unwrap();
    let leaf = Store::create(services.dir.path().join("leaf")).unwrap();
    let leaf_mirror = leaf.mirror("orders", relay.local_addr().to_string()).unwrap();
    let end = leaf_mirror.wait_ready(SOON).unwrap();
    let nodes = [services.orders.journal().node(), mirrored.node(), end.node()];
    let [origin, between, end] = nodes.map(|node| node.to_string());
    let path = services.path("customers");
    let look = || json_of(&["topology", "--json", &path]);
    let link_of = |graph: &Value, from: &str, to: &str| {
        let links = graph["links"].as_array().unwrap().clone();
        links.into_iter().find(|link| link["from"] == *from && link["to"] == *to)
    };
    let graph = until(look, |graph| {
        [(&origin, &between), (&between, &end)].iter().all(|(from, to)| {
            link_of(graph, from, to)
                .is_some_and(|link| link["state"] == "live" && link["lag_events"] == 0)
        })
    });
    assert_eq!(documented("topology"), keys(&graph));
    let here = |id: &str| {
        let nodes = graph["nodes"].as_array().unwrap();
        nodes.iter().find(|node| node["id"] == *id).unwrap()["here"].clone()
    };
    assert_eq!([here(&origin), here(&between), here(&end)], [false, true, false]);
    let dot = ok(&["topology", "--dot", &path]);
    assert!(dot.starts_with("digraph headwater {") && dot.ends_with("}\n"), "{dot}");
    let edge = format!("{origin:?} -> {between:?} [label=\"live, 0 events behind\", style=solid];");
    assert!(dot.contains(&edge), "{dot}");
    let text = ok(&["topology", &path]);
    assert!(text.contains("-> mirrors/orders ("), "{text}");
    drop((leaf_mirror, relay));
    let none = ok(&["topology", &services.path("leaf"), "--json"]);
    assert!(none.contains("stopped"), "{none}");
}

/// A server that has a mirror, too, writes one file for both; and a mirror says of each upstream how it is.
#[test]
fn who_follows_a_mirror_is_listed_with_the_mirror_and_upstreams_each_for_itself() {
    let services = Services::start();
    append(&services.orders, "ordered");
    let mirror = services.mirror.as_ref().unwrap();
    let mirrored = mirror.wait_ready(SOON).unwrap();
    let server = services.customers.serve("127.0.0.1:0").unwrap();
    server.add(mirror);
    let relay = server.local_addr().to_string();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let leaf = Store::create(services.dir.path().join("leaf")).unwrap();
    // One that is new would get the server's own journal.
    let begun = leaf.mirror("orders", services.address()).unwrap();
    let end = begun.wait_ready(SOON).unwrap().node().to_string();
    begun.stop().unwrap();
    let leaf_mirror = leaf.mirror("orders", [unused.clone(), relay.clone()]).unwrap();
    leaf_mirror.wait_caught_up(SOON).unwrap();

    let path = services.path("customers");
    let of_leaf = |lag: &Value| {
        let links = lag["links"].as_array().unwrap().clone();
        links.into_iter().find(|link| link["node"] == *end)
    };
    let look = || json_of(&["lag", "--json", &path]);
    let lag = until(look, |lag| of_leaf(lag).is_some_and(|link| link["state"] == "live"));
    assert_eq!(of_leaf(&lag).unwrap()["of"], "mirrors/orders");
    assert_eq!(lag["links"].as_array().unwrap().len(), 2, "{lag}");

    let link = services.link("leaf", |link| link["state"] == "live" && link["path"].is_array());
    let nodes = [services.orders.journal().node(), mirrored.node()].map(|node| node.to_string());
    assert_eq!((&link["path"], &link["address"]), (&json!(nodes), &json!(relay)));
    let of = |number: usize| &link["upstreams"][number];
    assert_eq!((&of(0)["address"], &of(0)["in_use"]), (&json!(unused), &json!(false)));
    assert_eq!(of(0)["error"]["code"], "shipping.connect");
    assert_eq!((&of(1)["address"], &of(1)["in_use"]), (&json!(relay), &json!(true)));
    let text = ok(&["peer", "ls", &services.path("leaf")]);
    let first = format!("mirrors/orders at {unused}: error[shipping.connect]: ");
    assert!(text.contains(&first) && !text.contains(&format!("at {relay}: error")), "{text}");
}

/// Of several addresses, and without a name of the journal, a new mirror asks the first alone; whoever looks is told.
#[test]
fn a_new_mirror_that_waits_for_its_first_address_says_why_it_doesnt_ask_the_others() {
    let services = Services::start();
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let leaf = Store::create(services.dir.path().join("leaf")).unwrap();
    let mirror = leaf.mirror("orders", [unused.clone(), services.address()]).unwrap();
    mirror.wait_until(SOON, |status| status.last_error.is_some()).unwrap();
    let link = services.link("leaf", |link| link["upstreams"][0]["error"].is_object());
    assert_eq!(link["upstreams"][1]["error"]["code"], "shipping.not_asked", "{link}");
    let text = ok(&["peer", "ls", &services.path("leaf")]);
    let second = format!("mirrors/orders at {}: error[shipping.not_asked]: ", services.address());
    assert!(text.contains(&second) && text.contains("journal_id"), "{text}");
}

#[test]
fn watching_goes_on_until_nobody_reads_or_it_is_interrupted() {
    let services = Services::start();
    let path = services.path("orders");
    let watch = |args: &[&str]| {
        let args = [&["lag", "--watch", &path], args].concat();
        let mut child =
            headwater(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        (child, lines)
    };
    let (child, mut lines) = watch(&["--json"]);
    let mut times = Vec::new();
    for _ in 0..2 {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        times.push(serde_json::from_str::<Value>(&line).unwrap()["at_us"].as_i64().unwrap());
    }
    assert!(times[0] < times[1]);
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), err(&output)), (Some(0), String::new()));

    let (mut child, mut lines) = watch(&[]);
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert!(line.ends_with("Z\n") && !line.contains('\u{1b}'), "no terminal: {line:?}");
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert!(!status.success());
}

#[test]
fn a_filtered_feed_is_listed_with_what_it_holds_and_by_the_origins_positions() {
    let services = Services::start();
    (0..4).for_each(|_| append(&services.orders, "ordered"));
    let store = Store::create(services.dir.path().join("feeding")).unwrap();
    let wanted = headwater::shipping::FeedPart::types(["test.other"]);
    let feed = store.feed("orders", services.address(), wanted).unwrap();
    feed.wait_ready(SOON).unwrap();
    feed.wait_caught_up(SOON).unwrap();
    let status = feed.status();
    assert_eq!((status.lag_events(), status.lag_bytes()), (Some(0), Some(0)), "{status:?}");
    assert_eq!(status.lag_time(), Some(Duration::ZERO));
    let link = services.link("feeding", |link| link["state"] == "live" && link["lag_ms"] == 0);
    assert_eq!(documented("A link"), keys(&link));
    assert!(link["feed"].to_string().contains("test.other"), "{link}");
    assert_eq!(link["upstreams"][0]["in_use"], true, "{link}");
    // None of the four is stored.
    assert_eq!(link["durable_position"], 4);
    let orders = services.path("orders");
    let look = || json_of(&["peer", "ls", "--json", &orders]);
    let fed = |list: &Value| {
        let peers = list["peers"].as_array().unwrap();
        peers.iter().any(|link| link["feed"].is_object() && link["state"] == "live")
    };
    until(look, fed);

    let mut services = services;
    services.server.take().unwrap().shutdown();
    let status = until(|| feed.status(), |status| status.ends.of(EndReason::GoingAway) == 1);
    let lag = (status.lag_events(), status.lag_bytes(), status.lag_time());
    assert_eq!(lag, (None, None, None));
    feed.stop().unwrap();
    let link = services.link("feeding", is("stopped"));
    assert_nothing_live(&link);
    assert_eq!(link["durable_position"], 4);
}

/// What a kill leaves behind: nothing of it is believed, and the next server removes that of a server.
#[test]
fn what_a_killed_process_has_left_is_not_believed() {
    let mut services = Services::start();
    let (store, orders) = (services.dir.path().join("orders"), services.path("orders"));
    let mine = store.join(format!("serving-{}", services.address()));
    until(|| mine.exists(), |exists| *exists);
    let is_level = |link: &Value| link["state"] == "live" && link["lag_events"] == 0;
    services.link("orders", is_level);
    let left = store.join("serving-127.0.0.1:1");
    std::fs::write(&left, aged(&std::fs::read_to_string(&mine).unwrap())).unwrap();
    let links = json_of(&["lag", "--json", &orders]);
    assert_eq!(links["links"].as_array().unwrap().len(), 1, "{links}");
    let other = services.orders.serve("127.0.0.1:0").unwrap();
    assert!(!left.exists() && mine.exists());
    let path = store.join(format!("serving-{}", other.local_addr()));
    until(|| path.exists(), |exists| *exists);
    other.shutdown();
    assert!(!path.exists());

    let level = services.link("customers", is_level);
    let following = services.dir.path().join("customers/mirrors/orders/following");
    let alive = std::fs::read_to_string(&following).unwrap();
    services.mirror.take().unwrap().stop().unwrap();
    std::fs::write(&following, aged(&alive)).unwrap();
    let link = services.link("customers", is("unknown"));
    assert_nothing_live(&link);
    for field in ["address", "node", "path", "durable_position"] {
        assert_eq!(link[field], level[field], "{field}");
    }
    assert_eq!((&link["ends"], &link["reconnects"]), (&Value::Null, &Value::Null));
}

/// A status file as it was written a minute ago; the time is within the checksum.
fn aged(text: &str) -> String {
    let (_, body) = text.split_once('\n').unwrap();
    let mut statuses = serde_json::Deserializer::from_str(body).into_iter::<Value>();
    let mut status = statuses.next().unwrap().unwrap();
    status["monotonic_ms"] = json!(status["monotonic_ms"].as_i64().unwrap() - 60_000);
    let body = status.to_string();
    format!("headwater-status 1 {} {:08x}\n{body}\n", body.len(), crc32(body.as_bytes()))
}

/// CRC-32 (IEEE), as docs/format.md has it, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

#[test]
fn doctor_and_verify_tell_of_what_was_set_aside_and_of_what_is_being_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store")).unwrap();
    let mut origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    origin.close();
    copy_dir(&origin.dir, &dir.path().join("backup"));
    origin.open();
    origin.append(20..25);
    let address = origin.address.to_string();
    let quarantine = FollowOptions { forks: ForkPolicy::Quarantine, ..options() };
    let mirror = store.mirror_with("origin", address, quarantine).unwrap();
    mirror.wait_caught_up(SOON).unwrap();
    origin.close();
    replace_dir(&origin.dir, &dir.path().join("backup"));
    origin.open();
    mirror.wait_until(SOON, |status| !status.orphans.is_empty() && status.is_live()).unwrap();
    mirror.stop().unwrap();
    store.close().unwrap();
    drop(store);

    let path = |name: &str| dir.path().join(name).display().to_string();
    let check = |dir: &str, name: &str| {
        let output = run(&["doctor", "--json", dir]);
        let all: Value = serde_json::from_str(&out(&output)).unwrap();
        let checks = all["checks"].as_array().unwrap().clone();
        checks.into_iter().filter(|check| check["name"] == name).collect::<Vec<_>>()
    };
    let of_mirror = check(&path("store"), "mirror");
    let aside = of_mirror.iter().find(|check| check["level"] == "warn").unwrap();
    let finding = aside["finding"].as_str().unwrap();
    assert!(finding.contains("origin: 5 events from position 20 on"), "{finding}");
    let mirror = path("store/mirrors/origin");
    assert_eq!(check(&mirror, "orphaned")[0]["level"], "warn");
    let verified = json_of(&["verify", "--json", &mirror]);
    let orphaned = &verified["orphaned"][0];
    let ends = (&orphaned["from_position"], &orphaned["end_position"]);
    assert_eq!((ends, &verified["recovering"]), ((&json!(20), &json!(25)), &json!(false)));
    assert!(
        ok(&["verify", &mirror]).contains("events from position 20 on, which the origin has lost")
    );

    origin.close();
    let healthy = check(&path("origin"), "recovery");
    assert_eq!(healthy[0]["level"], "ok");
    std::fs::write(origin.dir.join("journal/recovering"), b"see docs/format.md\n").unwrap();
    let found = check(&path("origin"), "recovery");
    assert_eq!(found[0]["level"], "fail");
    assert!(found[0]["hint"].as_str().unwrap().contains("headwater recover"));
    assert_eq!(json_of(&["verify", "--json", &path("origin")])["recovering"], true);
    std::fs::remove_file(origin.dir.join("journal/recovering")).unwrap();
    origin.open();
}

#[test]
fn peer_and_recover_go_over_tls_and_show_who_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path().join("origin"), small());
    origin.append(0..20);
    origin.store().journal().backup(&dir.path().join("backup")).unwrap();
    origin.append(20..25);
    let [own, mine] = ["own", "mine"].map(|name| held(dir.path(), name));
    let token = AccessToken::generate().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(file("token"), token.expose()).unwrap();
    let peer = Peer {
        tokens: vec![token.hash()],
        keys: vec![mine.pin],
        may: vec![Right::everything()],
        ..Peer::named("the command line")
    };
    let server = secured(origin.store().journal(), &own, vec![peer]);
    let (address, pin, wrong) =
        (server.local_addr().to_string(), own.pin.to_string(), mine.pin.to_string());
    let store = file("restored");
    ok(&["restore", &file("backup"), &store]);

    let refused = |args: &[&str], code: &str| {
        let output = run(&[&["peer", &store, &address], args].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", err(&output));
        assert!(err(&output).contains(code), "{args:?}: {}", err(&output));
    };
    refused(&[], "error[shipping.tls]");
    refused(&["--pin", &wrong, "--token", &file("token")], "error[shipping.tls]");
    refused(&["--pin", &pin], "error[shipping.reported]");
    refused(&["--pin", &pin, "--token", &file("none")], "error[security.file]");
    let misused = [
        &["--certificate", "a", "--pin", &pin][..],
        &["--certificate", "a", "--key", "b"],
        &["--pin", &pin, "--authority", "a"],
        &["--server-name", "a"],
        &["--pin", "sha256:1"],
        &["--pin", &pin, "--allow-plaintext"],
    ];
    for args in misused {
        assert_eq!(
            run(&[&["peer", &store, &address], args].concat()).status.code(),
            Some(2),
            "{args:?}"
        );
    }
    let behind = |args: &[&str]| {
        let text = ok(&[&["peer", &store, &address], args].concat());
        assert!(text.contains("behind: "), "{args:?}: {text}");
    };
    behind(&["--pin", &wrong, "--pin", &pin, "--token", &file("token")]);
    behind(&["--pin", &pin, "--certificate", &file("mine.pem"), "--key", &file("mine.key")]);
    behind(&["--authority", &file("own.pem"), "--server-name", "own", "--token", &file("token")]);
    let recovered =
        ok(&["recover", &store, "--from", &address, "--pin", &pin, "--token", &file("token")]);
    assert!(recovered.contains("5 events taken back"), "{recovered}");
    assert!(
        ok(&["peer", &store, &address, "--pin", &pin, "--token", &file("token")])
            .contains("equal: ")
    );
}
