//! Filtered feeds: exactly what the filter lets through, whatever happens on the way, and never as a copy.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::format::batch::genesis;
use headwater::format::crc32;
use headwater::format::record;
use headwater::fs::os::OsFs;
use headwater::fs::sim::SimFs;
use headwater::retention::{self, Holder};
use headwater::shipping::message::{
    Authentication, ErrorCode, Events, FEATURE_FILTERED, FeedRequest, FeedTerms, FrameReader,
    Heartbeat, Hello, Message, OriginEnd, PROTOCOL_VERSIONS, ShapeId, Skip, Speaker, Subscribe,
    Subscribed, Welcome,
};
use headwater::shipping::security::{Access, Security, SecurityOptions};
use headwater::shipping::{
    Deadlines, Feed, FeedError, FeedFilter, FeedPart, FeedStatus, FollowOptions, MirrorState,
    Public, PublicShape, PublishError, ServeOptions, Server, Shape, ShippingError, WaitError,
    follow, follow_feed, serve,
};
use headwater::{
    Append, Checkpoint, EventId, ExpectedRevision, Incarnation, Journal, JournalId, JournalOptions,
    NewEvent, NodeId, Position, Recorded, Revision, Store, StreamId, TokenError,
};

use crate::shipping::{SOON, copy_dir, faulty_proxy, replace_dir, small};
use crate::stalls;

mod upstreams;

/// An origin's store on disk, open and served or not.
struct Origin {
    dir: std::path::PathBuf,
    options: JournalOptions,
    serving: ServeOptions,
    store: Option<Store>,
    server: Option<Server>,
    address: SocketAddr,
}

impl Origin {
    fn start(dir: &Path, options: JournalOptions, serving: ServeOptions) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let dir = dir.join("origin");
        let mut origin = Self { dir, options, serving, store: None, server: None, address };
        origin.open();
        origin
    }

    fn open(&mut self) {
        let builder = Store::builder(&self.dir).create_if_missing();
        let store = builder.journal_options(self.options.clone()).open().unwrap();
        let server = serve(store.journal().clone(), self.address, self.serving.clone()).unwrap();
        self.address = server.local_addr();
        (self.store, self.server) = (Some(store), Some(server));
    }

    fn close(&mut self) {
        self.server.take().unwrap().shutdown();
        self.store.take().unwrap().close().unwrap();
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn end(&self) -> Checkpoint {
        self.store().journal().end()
    }

    fn append(&self, rng: &mut Rng, batches: usize) {
        for _ in 0..batches {
            append_some(self.store(), rng);
        }
    }

    fn feed(&self, dir: &Path, filter: impl Into<FeedFilter>) -> Feed {
        feed_at(dir, self.address, filter)
    }
}

fn feed_at(dir: &Path, address: SocketAddr, filter: impl Into<FeedFilter>) -> Feed {
    follow_feed(Arc::new(OsFs), dir, address.to_string(), filter.into(), options()).unwrap()
}

fn options() -> FollowOptions {
    FollowOptions { journal: small(), window_bytes: 64 << 10, ..FollowOptions::default() }
}

const CATEGORIES: [&str; 4] = ["order", "customer", "stock", "audit"];
const TYPES: [&str; 4] = ["placed", "changed", "removed", "noted"];
const TAGS: [&str; 3] = ["eu", "urgent", "test"];

fn event(rng: &mut Rng) -> (StreamId, NewEvent) {
    let (category, name) = (rng.choice(CATEGORIES).unwrap(), rng.choice(TYPES).unwrap());
    let stream = StreamId::new(format!("{category}-{}", rng.u8(..5))).unwrap();
    let len = if rng.u8(..) < 8 { rng.usize(..3000) } else { rng.usize(..200) };
    let mut event = NewEvent::raw(name, vec![rng.u8(..); len]).unwrap();
    for tag in TAGS {
        if rng.u8(..) < 80 {
            event = event.tag(tag);
        }
    }
    (stream, event)
}

/// A batch of some events, of several streams.
fn append_some(store: &Store, rng: &mut Rng) {
    let mut streams = std::collections::BTreeMap::<StreamId, Vec<NewEvent>>::new();
    for _ in 0..rng.usize(1..6) {
        let (stream, event) = event(rng);
        streams.entry(stream).or_default().push(event);
    }
    let append = streams.into_iter().fold(Append::default(), |append, (stream, events)| {
        append.and_to(&stream, ExpectedRevision::Any, events)
    });
    match store.append(&append) {
        Ok(_) => {}
        Err(error) if error.code() == "append.too_large" => {}
        Err(error) => panic!("{error}"),
    }
}

fn filter(rng: &mut Rng) -> FeedFilter {
    let some = |rng: &mut Rng, names: &[&'static str]| -> Vec<&'static str> {
        let chance = rng.u8(0..200);
        names.iter().copied().filter(|_| rng.u8(0..200) < chance / 2).collect()
    };
    let parts = (0..rng.usize(1..4)).map(|_| {
        let (categories, types) = (some(rng, &CATEGORIES), some(rng, &TYPES));
        let tags = if rng.bool() { vec![] } else { some(rng, &TAGS) };
        FeedPart::categories(categories).and_types(types).and_tags(tags)
    });
    FeedFilter::any_of(parts.collect::<Vec<_>>())
}

/// An event without its place.
type Said = (EventId, String, String, Vec<u8>, Vec<String>, Option<i64>);

fn said(event: &Recorded, occurred_at_us: Option<i64>) -> Said {
    (
        event.id(),
        event.stream().to_string(),
        event.event_type().to_string(),
        event.data().clone(),
        event.tags().to_vec(),
        occurred_at_us,
    )
}

fn expected(journal: &Journal, filter: &FeedFilter) -> Vec<Said> {
    let events = journal.read_all(Position::START).unwrap().map(Result::unwrap);
    let events = events.filter(|event| filter.matches(event));
    events.map(|event| said(&event, Some(event.recorded_at_us()))).collect()
}

/// What was received, each stream's revisions without a gap, and the notes between in order.
fn received(journal: &Journal) -> Vec<Said> {
    let mut all = Vec::new();
    let mut heads = std::collections::BTreeMap::new();
    for event in journal.read_all(Position::START).unwrap() {
        let event = event.unwrap();
        let next = heads.entry(event.stream().clone()).or_insert(Revision::FIRST);
        assert_eq!(event.revision(), *next, "{}", event.stream());
        *next = next.next();
        if !event.event_type().as_str().starts_with('$') {
            all.push(said(&event, event.occurred_at_us()));
        }
    }
    for (stream, next) in heads {
        let read = journal.read_stream(&stream, Revision::FIRST).unwrap();
        assert_eq!(read.map(Result::unwrap).count() as u64, next.get(), "{stream}");
    }
    all
}

/// Waits until everything is accounted for that is at the origin now.
fn converged(feed: &Feed, origin: &Origin) -> Journal {
    let end = origin.end();
    let there = |status: &FeedStatus| status.received.is_some_and(|at| at.offset >= end.offset);
    match feed.wait_until(SOON, there) {
        Ok(status) => assert_eq!(status.received, Some(end)),
        Err(error) => panic!("{error}: {:?}", feed.status()),
    }
    feed.journal().unwrap()
}

fn halted(feed: &Feed) -> ShippingError {
    match feed.wait_until(SOON, FeedStatus::is_halted).unwrap().state {
        MirrorState::Halted(error) => error,
        other => panic!("{other:?}"),
    }
}

/// The set of delivered events is the filter applied to the origin's journal, through restarts of both sides, cuts and
/// flipped bits.
#[test]
fn what_is_received_is_what_the_filter_lets_through_whatever_happens_on_the_way() {
    let base = fastrand::u64(..);
    std::thread::scope(|scope| {
        for seed in base..base + 6 {
            scope.spawn(move || random_history(seed));
        }
    });
}

fn random_history(seed: u64) {
    println!("seed {seed}");
    let rng = &mut Rng::with_seed(seed);
    let dir = tempfile::tempdir().unwrap();
    let serving = ServeOptions {
        frame_bytes: 8192,
        window_bytes_max: rng.choice([1, 3000, 1 << 20]).unwrap(),
        ..ServeOptions::default()
    };
    let mut origin = Origin::start(dir.path(), small(), serving);
    origin.append(rng, 150);
    let filters: Vec<_> = (0..3).map(|_| filter(rng)).collect();
    let place = |n: usize| dir.path().join(format!("feed-{n}"));
    let open = |rng: &mut Rng, n: usize, origin: &Origin| {
        let address = match n {
            0 => origin.address,
            _ => faulty_proxy(origin.address, rng.u64(..), 3),
        };
        feed_at(&place(n), address, filters[n].clone())
    };
    let mut feeds: Vec<_> = (0..3).map(|n| open(rng, n, &origin)).collect();
    for round in 0..6 {
        origin.append(rng, rng.clone().usize(1..80));
        match rng.u8(..4) {
            0 => {
                origin.close();
                origin.open();
                // A proxy goes with what it stands for.
                feeds.truncate(1);
                feeds.extend((1..3).map(|n| open(rng, n, &origin)));
            }
            1 => {
                let n = rng.usize(..3);
                feeds.remove(n).stop().unwrap();
                origin.append(rng, 20);
                feeds.insert(n, open(rng, n, &origin));
            }
            _ => {}
        }
        if round % 3 == 2 {
            for (feed, filter) in feeds.iter().zip(&filters) {
                let journal = converged(feed, &origin);
                assert_eq!(
                    received(&journal),
                    expected(origin.store().journal(), filter),
                    "seed {seed}, round {round}, {filter}"
                );
            }
        }
    }
    drop(feeds);
    for (n, filter) in filters.iter().enumerate() {
        let (journal, damage) = Journal::open_read_only(&(Arc::new(OsFs) as _), &place(n)).unwrap();
        assert!(damage.is_none());
        assert_eq!(received(&journal), expected(origin.store().journal(), filter));
    }
}

/// What is sifted may itself be a copy: the feed is the same, and can go on at the origin.
#[test]
fn a_mirror_serves_feeds_of_what_it_mirrors() {
    let rng = &mut Rng::with_seed(4);
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path(), small(), ServeOptions::default());
    origin.append(rng, 60);
    let mirror = dir.path().join("mirror");
    let mirror = follow(Arc::new(OsFs), &mirror, origin.address.to_string(), options()).unwrap();
    let copy = mirror.wait_ready(SOON).unwrap();
    let relay = serve(copy, "127.0.0.1:0", ServeOptions::default()).unwrap();
    let wanted = FeedFilter::from(FeedPart::types(["placed"]).and_tags(["eu"]));
    let place = dir.path().join("feed");
    let feed = feed_at(&place, relay.local_addr(), wanted.clone());
    origin.append(rng, 20);
    let journal = converged(&feed, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &wanted));
    feed.stop().unwrap();
    origin.append(rng, 20);
    let feed = origin.feed(&place, wanted.clone());
    let journal = converged(&feed, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &wanted));
}

// ------------------------------------------------------------------------------------------------- rights

fn confined(path: &Path, filters: &[FeedFilter]) -> Security {
    write_rights(path, filters);
    let access = Access::File(path.to_owned());
    Security::new(SecurityOptions { tls: None, access }).unwrap()
}

fn write_rights(path: &Path, filters: &[FeedFilter]) {
    let may: Vec<_> = filters
        .iter()
        .map(|filter| serde_json::json!({ "journal": "*", "mode": "filtered", "filter": filter }))
        .collect();
    let peer = serde_json::json!({ "name": "here", "anonymous": "loopback", "may": may });
    fs::write(path, serde_json::json!({ "peers": [peer] }).to_string()).unwrap();
}

fn brisk() -> Deadlines {
    Deadlines { heartbeat: Duration::from_millis(50), ..Deadlines::default() }
}

fn denied(error: &ShippingError) -> bool {
    matches!(error, ShippingError::Reported { failure } if failure.code == ErrorCode::DENIED)
}

#[test]
fn what_the_access_list_allows_can_not_be_widened() {
    let rng = &mut Rng::with_seed(1);
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("access.json");
    let orders = FeedFilter::from(FeedPart::categories(["order"]));
    let stock = FeedFilter::from(FeedPart::categories(["stock"]).and_types(["placed"]));
    let security = confined(&list, &[orders.clone(), stock.clone()]);
    let serving = ServeOptions {
        security: Some(security.clone()),
        deadlines: brisk(),
        ..ServeOptions::default()
    };
    let origin = Origin::start(dir.path(), small(), serving);
    origin.append(rng, 100);
    let allowed = FeedFilter::any_of([orders.parts()[0].clone(), stock.parts()[0].clone()]);

    // Whoever wants everything gets what is allowed, and is told.
    let everything = origin.feed(&dir.path().join("all"), FeedFilter::everything());
    let journal = converged(&everything, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &allowed));
    assert_eq!(everything.status().terms.unwrap().filter, allowed);
    // What is wanted and what is allowed.
    let placed = origin.feed(&dir.path().join("placed"), FeedPart::types(["placed"]));
    let both = FeedPart::categories(["order", "stock"]).and_types(["placed"]).into();
    assert_eq!(received(&converged(&placed, &origin)), expected(origin.store().journal(), &both));
    // Nothing in common, and no mirror.
    let none = origin.feed(&dir.path().join("none"), FeedPart::categories(["customer"]));
    assert!(denied(&halted(&none)));
    let mirror = dir.path().join("mirror");
    let mirror = follow(Arc::new(OsFs), &mirror, origin.address.to_string(), options()).unwrap();
    mirror.wait_until(SOON, headwater::shipping::MirrorStatus::is_halted).unwrap();

    // A feed that says that it had more.
    let mut raw = Raw::connect(origin.address);
    let terms = FeedTerms { filter: FeedFilter::everything(), shape: None };
    raw.subscribe(Some(origin.end()), terms, true);
    assert_eq!(raw.error(), Some(ErrorCode::DENIED));

    // Less is allowed now: feeds end that had more, others go on.
    write_rights(&list, &[FeedPart::categories(["order", "stock"]).and_types(["placed"]).into()]);
    security.reload().unwrap();
    assert!(denied(&halted(&everything)));
    origin.append(rng, 10);
    let journal = converged(&placed, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &both));
    // More is allowed: the feed stays what it was.
    write_rights(&list, &[FeedFilter::everything()]);
    security.reload().unwrap();
    everything.resume();
    let journal = converged(&everything, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &allowed));
}

// ------------------------------------------------------------------------------------------------- kinds

#[test]
fn a_feed_is_no_mirror_and_no_store_nor_the_other_way_round() {
    let rng = &mut Rng::with_seed(2);
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path(), small(), ServeOptions::default());
    origin.append(rng, 20);
    let (feed_dir, mirror_dir) = (dir.path().join("feed/journal"), dir.path().join("mirror"));
    let address = origin.address.to_string();
    let follow_into =
        |dir: &Path| follow(Arc::new(OsFs), dir, address.clone(), options()).map(drop);
    let feed_into = |dir: &Path| {
        let all = FeedFilter::everything();
        follow_feed(Arc::new(OsFs), dir, address.clone(), all, options()).map(drop)
    };
    let feed = origin.feed(&feed_dir, FeedFilter::everything());
    let journal = converged(&feed, &origin);
    assert_ne!(journal.id(), origin.store().journal().id());
    // It counts for nobody who waits for mirrors.
    let token = origin.store().append(&Append::to(
        &StreamId::new("order-1").unwrap(),
        ExpectedRevision::Any,
        [NewEvent::raw("placed", *b"x").unwrap()],
    ));
    let token = token.unwrap().token();
    converged(&feed, &origin);
    let waited = origin.store().wait_mirrored(&token, 1, Duration::from_millis(100)).unwrap();
    assert!(!waited.is_enough(), "{waited:?}");
    feed.stop().unwrap();
    follow(Arc::new(OsFs), &mirror_dir, address.clone(), options())
        .unwrap()
        .wait_ready(SOON)
        .map(drop)
        .unwrap();
    let refused = |result: Result<(), ShippingError>| match result {
        Err(error @ ShippingError::Open(_)) => {
            assert!(error.to_string().contains("feed"), "{error}");
        }
        other => panic!("{other:?}"),
    };
    refused(follow_into(&feed_dir));
    refused(feed_into(&mirror_dir));
    refused(feed_into(&origin_copy(dir.path(), &origin).join("journal")));
    let error = Store::open(dir.path().join("feed")).unwrap_err();
    assert_eq!(error.code(), "open.role");
    // What belongs to mirrors only is refused, not ignored.
    let begin = FollowOptions { begin_with: Some(mirror_dir.clone()), ..options() };
    let all = FeedFilter::everything();
    let begun = follow_feed(Arc::new(OsFs), &dir.path().join("new"), address.clone(), all, begin);
    assert!(matches!(begun, Err(ShippingError::Open(_))));
}

/// A store's directory that nobody has open.
fn origin_copy(dir: &Path, origin: &Origin) -> std::path::PathBuf {
    let copy = dir.join("copy");
    copy_dir(&origin.dir, &copy);
    copy
}

#[test]
fn another_filter_is_another_feed() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path(), small(), ServeOptions::default());
    origin.append(&mut Rng::with_seed(3), 20);
    let place = dir.path().join("feed");
    let feed = origin.feed(&place, FeedPart::categories(["order"]));
    converged(&feed, &origin);
    feed.stop().unwrap();
    let other = FeedFilter::from(FeedPart::categories(["stock"]));
    let address = origin.address.to_string();
    match follow_feed(Arc::new(OsFs), &place, address, other.clone(), options()) {
        Err(ShippingError::Feed(FeedError::Differs { wanted, .. })) => assert_eq!(*wanted, other),
        other => panic!("{other:?}"),
    }
    converged(&origin.feed(&place, FeedPart::categories(["order"])), &origin);
    let invalid = follow_feed(Arc::new(OsFs), &place, "x:1", FeedFilter::default(), options());
    assert!(matches!(invalid, Err(ShippingError::Feed(FeedError::Filter(_)))));
}

// ------------------------------------------------------------------------------------------------- forks, tokens

#[test]
fn an_origin_that_was_restored_from_an_older_copy_is_recognised_however_far_it_has_grown() {
    for (seed, regrown) in [(1, 0), (2, 10), (3, 40), (4, 90)] {
        let rng = &mut Rng::with_seed(seed);
        let dir = tempfile::tempdir().unwrap();
        let mut origin = Origin::start(dir.path(), small(), ServeOptions::default());
        origin.append(rng, 40);
        origin.close();
        let (older, newest) = (dir.path().join("older"), dir.path().join("newest"));
        copy_dir(&origin.dir, &older);
        origin.open();
        let mut same = rng.clone();
        origin.append(rng, 40);
        let feed = origin.feed(&dir.path().join("feed"), FeedPart::types(["placed", "changed"]));
        let journal = converged(&feed, &origin);
        let (had, end) = (received(&journal), journal.end());
        origin.close();
        copy_dir(&origin.dir, &newest);
        replace_dir(&origin.dir, &older);
        origin.open();
        origin.append(&mut same, regrown); // the same events again, for a while
        feed.resume();
        match halted(&feed) {
            ShippingError::Feed(FeedError::Replaced { is_ahead, .. }) => {
                assert!(is_ahead || regrown > 10, "{regrown}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((received(&journal), journal.end()), (had, end), "nothing was added");
        origin.close();
        replace_dir(&origin.dir, &newest);
        origin.open();
        origin.append(rng, 5);
        feed.resume();
        let filter = FeedPart::types(["placed", "changed"]).into();
        let journal = converged(&feed, &origin);
        assert_eq!(received(&journal), expected(origin.store().journal(), &filter));
    }
}

/// The disk gets full within a run that takes several batches; meanwhile the origin is restored from a copy that has all
/// that was noted, and goes on differently.
#[test]
fn an_origin_that_was_restored_while_a_run_was_stored_in_part_is_recognised() {
    // When segments are prepared decides where the disk is full: perhaps between two runs.
    assert!((0..10).any(|_| restored_while_a_run_was_stored_in_part()));
}

/// False if it was stored whole, or not at all.
fn restored_while_a_run_was_stored_in_part() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let serving = ServeOptions { frame_bytes: 8192, ..ServeOptions::default() };
    let mut origin = Origin::start(dir.path(), small(), serving);
    let append = |origin: &Origin, data: u8| {
        let order = StreamId::new("order-1").unwrap();
        let events = (0..12).map(|_| NewEvent::raw("placed", [data; 300]).unwrap());
        let append = Append::to(&order, ExpectedRevision::Any, events);
        origin.store().append(&append).unwrap();
    };
    append(&origin, 0);
    let disk = SimFs::new(1);
    let journal = JournalOptions { batch_bytes_max: 1024, group_bytes_max: 1024, ..small() };
    let options = FollowOptions { journal, ..options() };
    let (address, all) = (origin.address.to_string(), FeedFilter::everything());
    let following = Arc::new(disk.clone());
    let feed = follow_feed(following, Path::new("/feed"), address, all.clone(), options).unwrap();
    let had = received(&converged(&feed, &origin)).len();
    let (older, newest) = (dir.path().join("older"), dir.path().join("newest"));
    // As many batches as fit into the segments that there are.
    disk.set_capacity(Some(0));
    let journal = feed.journal().unwrap();
    let mut count = 0;
    loop {
        origin.close();
        drop(fs::remove_dir_all(&older));
        copy_dir(&origin.dir, &older);
        origin.open();
        append(&origin, 1);
        feed.resume();
        let end = origin.end();
        let is_full = |status: &FeedStatus| {
            matches!(&status.last_error, Some(ShippingError::Feed(FeedError::Append(_))))
        };
        let told = |status: &FeedStatus| is_full(status) || status.received == Some(end);
        if is_full(&feed.wait_until(SOON, told).unwrap()) {
            break;
        }
        count += 1;
        assert!(count < 100);
    }
    let stored = received(&journal).len();
    println!("{} of 12 events of the last run are stored", stored - had - 12 * count);
    if stored == had + 12 * count {
        return false;
    }
    origin.close();
    copy_dir(&origin.dir, &newest);
    replace_dir(&origin.dir, &older);
    origin.open();
    append(&origin, 2);
    disk.set_capacity(None);
    feed.resume();
    match halted(&feed) {
        ShippingError::Feed(FeedError::Replaced { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(received(&journal).len(), stored, "nothing was added");
    origin.close();
    replace_dir(&origin.dir, &newest);
    origin.open();
    feed.resume();
    let journal = converged(&feed, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &all));
    true
}

#[test]
fn a_token_of_the_origin_is_waited_for_also_if_the_feed_has_none_of_its_events() {
    let rng = &mut Rng::with_seed(5);
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path(), small(), ServeOptions::default());
    let feed = origin.feed(&dir.path().join("feed"), FeedPart::categories(["order"]));
    let append = |origin: &Origin, stream: &str| {
        let stream = StreamId::new(stream).unwrap();
        let event = NewEvent::raw("placed", *b"x").unwrap();
        let append = Append::to(&stream, ExpectedRevision::Any, [event]);
        origin.store().append(&append).unwrap().token()
    };
    let mut tokens = Vec::new();
    for n in 0..4 {
        tokens.push(append(&origin, "order-1"));
        let own = feed.wait_for(tokens.last().unwrap(), SOON).unwrap();
        let journal = feed.journal().unwrap();
        journal.wait_for(&own, SOON).unwrap();
        assert_eq!(received(&journal).len(), n + 1);
        tokens.push(append(&origin, "stock-1")); // none of the feed's
        feed.wait_for(tokens.last().unwrap(), SOON).unwrap();
        origin.append(rng, 1);
        if n == 1 {
            origin.close();
            origin.open();
            feed.resume();
        }
        let len = received(&journal).len();
        origin.append(rng, 0);
        converged(&feed, &origin);
        let orders = FeedPart::categories(["order"]).into();
        let all = expected(origin.store().journal(), &orders).len();
        assert!(len <= all);
        if all != n + 1 {
            return check_lost(&feed, &tokens); // the random batch held an order
        }
    }
    check_lost(&feed, &tokens);
}

fn check_lost(feed: &Feed, tokens: &[headwater::Token]) {
    for token in tokens {
        feed.wait_for(token, SOON).unwrap();
        let lost = headwater::Token { incarnation: Incarnation::new(7), ..*token };
        match feed.wait_for(&lost, SOON) {
            Err(WaitError::Token(TokenError::Lost { position })) => {
                assert_eq!(position, token.position);
            }
            other => panic!("{other:?}"),
        }
        let foreign = headwater::Token { journal: JournalId::from_bytes([3; 16]), ..*token };
        match feed.wait_for(&foreign, SOON) {
            Err(WaitError::Token(TokenError::Foreign { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    let later = headwater::Token { position: Position::new(1 << 40), ..tokens[0] };
    match feed.wait_for(&later, Duration::from_millis(50)) {
        Err(WaitError::Behind { .. }) => {}
        other => panic!("{other:?}"),
    }
}

// ------------------------------------------------------------------------------------------------- shapes

/// Drops, passes, renames and multiplies; fails where it is told to.
struct Shaping<const VERSION: u32> {
    /// At the n-th call from now, once: 1 an error, 2 a panic.
    fails_at: Arc<AtomicU32>,
    panics: bool,
}

impl<const V: u32> PublicShape for Shaping<V> {
    const NAME: &'static str = "public";
    const VERSION: u32 = V;

    fn publish(&self, event: &Recorded, public: &mut Public<'_>) -> Result<(), PublishError> {
        let at = self.fails_at.load(Ordering::SeqCst);
        if at != 0 && event.position().get() == u64::from(at) {
            assert!(!self.panics, "panicked as it was told to");
            return Err("failed as it was told to".into());
        }
        match event.event_type().as_str() {
            "placed" => public.as_stored(),
            "changed" => {
                for number in 0..event.data().len() % 4 {
                    let stream = StreamId::new(format!("public-{number}"))?;
                    let data = [&event.data()[..event.data().len() / 2], &[number as u8]].concat();
                    public.event(&stream, NewEvent::raw("order.changed", data)?.tag("eu"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn shape<const V: u32>(fails_at: &Arc<AtomicU32>, panics: bool) -> Option<Shape> {
    Some(Shape::new(Shaping::<V> { fails_at: Arc::clone(fails_at), panics }))
}

/// What is published, without ids and times.
fn published(journal: &Journal) -> Vec<(String, String, Vec<u8>)> {
    let mut all = Vec::new();
    for event in journal.read_all(Position::START).unwrap().map(Result::unwrap) {
        let data = event.data();
        match event.event_type().as_str() {
            "placed" => all.push((event.stream().to_string(), "placed".to_owned(), data.clone())),
            "changed" => all.extend((0..data.len() % 4).map(|number| {
                let data = [&data[..data.len() / 2], &[number as u8]].concat();
                (format!("public-{number}"), "order.changed".to_owned(), data)
            })),
            _ => {}
        }
    }
    all
}

fn without_ids(journal: &Journal) -> Vec<(String, String, Vec<u8>)> {
    let all = received(journal).into_iter();
    all.map(|(_, stream, name, data, ..)| (stream, name, data)).collect()
}

#[test]
fn a_service_publishes_another_shape_and_a_failure_stops_in_front_of_the_event() {
    for panics in [false, true] {
        let rng = &mut Rng::with_seed(6);
        let dir = tempfile::tempdir().unwrap();
        let fails_at = Arc::new(AtomicU32::new(0));
        let serving = ServeOptions {
            shape: shape::<1>(&fails_at, panics),
            frame_bytes: 8192,
            ..ServeOptions::default()
        };
        let mut origin = Origin::start(dir.path(), small(), serving);
        origin.append(rng, 100);
        let all = FeedFilter::everything();
        let feed = origin.feed(&dir.path().join("feed"), all.clone());
        let public = FeedFilter::from(FeedPart::categories(["public"]).and_tags(["eu"]));
        let only_public = origin.feed(&dir.path().join("public"), public.clone());
        let journal = converged(&feed, &origin);
        assert_eq!(without_ids(&journal), published(origin.store().journal()));
        let only = converged(&only_public, &origin);
        let mut wanted = published(origin.store().journal());
        wanted.retain(|(stream, ..)| stream.starts_with("public"));
        assert_eq!(without_ids(&only), wanted, "the filter is about what is published");
        let id = ShapeId { name: "public".to_owned(), version: 1 };
        assert_eq!(feed.status().terms.unwrap().shape, Some(id));
        // Published ids are the same whoever asks when.
        let again = origin.feed(&dir.path().join("again"), all.clone());
        assert_eq!(received(&converged(&again, &origin)), received(&journal));
        let ids: std::collections::BTreeSet<_> =
            received(&journal).into_iter().map(|(id, ..)| id).collect();
        assert_eq!(ids.len(), received(&journal).len());

        // An event that can't be published.
        let before = origin.end().position;
        let poisoned = before.get() as u32 + 20;
        fails_at.store(poisoned, Ordering::SeqCst);
        origin.append(rng, 30);
        let told = feed.wait_until(SOON, |status| {
            matches!(&status.last_error, Some(ShippingError::Reported { failure })
                if failure.code == ErrorCode::SHAPE)
        });
        let Some(ShippingError::Reported { failure }) = told.unwrap().last_error else { panic!() };
        assert_eq!(failure.position, Some(Position::new(u64::from(poisoned))));
        assert!(failure.detail.contains("as it was told to"), "{failure:?}");
        let reached = feed.status().received.unwrap().position;
        assert!(reached > before && reached.get() <= u64::from(poisoned), "{reached}");
        assert!(!feed.status().is_halted(), "it is for the service to be mended");
        // A mirror isn't concerned.
        let mirror = dir.path().join("mirror");
        let mirror =
            follow(Arc::new(OsFs), &mirror, origin.address.to_string(), options()).unwrap();
        let copy = mirror.wait_ready(SOON).unwrap();
        let last = Position::new(origin.end().position.get() - 1);
        assert_eq!(copy.wait_past(last, SOON), origin.end());
        // Mended.
        fails_at.store(0, Ordering::SeqCst);
        feed.resume();
        let journal = converged(&feed, &origin);
        assert_eq!(without_ids(&journal), published(origin.store().journal()));

        // Another version is another feed.
        origin.close();
        origin.serving.shape = shape::<2>(&fails_at, panics);
        origin.open();
        feed.resume();
        match halted(&feed) {
            ShippingError::Reported { failure } => {
                assert_eq!(failure.code, ErrorCode::TERMS);
                assert!(failure.detail.contains("version 2"), "{failure:?}");
            }
            other => panic!("{other:?}"),
        }
        origin.close();
        origin.serving.shape = shape::<1>(&fails_at, panics);
        origin.open();
        feed.resume();
        converged(&feed, &origin);
    }
}

/// The service's own code may take its time: commits and live mirrors don't wait for it.
#[test]
fn a_shape_that_hangs_holds_up_nobody_else() {
    struct Hanging(Arc<parking_lot::RwLock<()>>);
    impl PublicShape for Hanging {
        const NAME: &'static str = "hanging";
        const VERSION: u32 = 1;
        fn publish(&self, _: &Recorded, public: &mut Public<'_>) -> Result<(), PublishError> {
            let _held = self.0.read();
            public.as_stored();
            Ok(())
        }
    }
    let rng = &mut Rng::with_seed(8);
    let dir = tempfile::tempdir().unwrap();
    let gate = Arc::new(parking_lot::RwLock::new(()));
    let shape = Some(Shape::new(Hanging(Arc::clone(&gate))));
    let serving = ServeOptions { shape, ..ServeOptions::default() };
    let origin = Origin::start(dir.path(), small(), serving);
    let feed = origin.feed(&dir.path().join("feed"), FeedFilter::everything());
    feed.wait_ready(SOON).unwrap();
    let held = gate.write();
    origin.append(rng, 5);
    let mirror = dir.path().join("mirror");
    let mirror = follow(Arc::new(OsFs), &mirror, origin.address.to_string(), options()).unwrap();
    let journal = mirror.wait_ready(SOON).unwrap();
    for _ in 0..20 {
        origin.append(rng, 1);
        let last = Position::new(origin.end().position.get() - 1);
        assert_eq!(journal.wait_past(last, SOON), origin.end());
    }
    assert_eq!(received(&feed.journal().unwrap()), []);
    drop(held);
    let all = FeedFilter::everything();
    assert_eq!(received(&converged(&feed, &origin)), expected(origin.store().journal(), &all));
}

// ------------------------------------------------------------------------------------------------- views

#[cfg(feature = "views")]
mod views {
    use headwater::view::{Fold, FoldError, Keys, View};

    use super::*;

    /// How many events each stream has, and their bytes.
    pub(super) struct Counts;

    impl View for Counts {
        const NAME: &'static str = "counts";
        const VERSION: u32 = 1;
        type Key = String;
        type Row = (u64, u64);
        type Event = Vec<u8>;

        fn route(&self, event: &Recorded<Vec<u8>>, keys: &mut Keys<String>) {
            assert!(!event.event_type().as_str().starts_with('$'), "a note is nobody's event");
            keys.add(event.stream().to_string());
        }

        fn fold(
            &self,
            _: &String,
            row: Option<(u64, u64)>,
            event: &Recorded<Vec<u8>>,
        ) -> Result<Fold<(u64, u64)>, FoldError> {
            let (count, bytes) = row.unwrap_or_default();
            Ok(Fold::Put((count + 1, bytes + event.data().len() as u64)))
        }
    }
}

#[cfg(feature = "views")]
#[test]
fn views_of_a_feed_are_built_waited_for_and_rebuilt_without_the_origin() {
    use headwater::view::RebuildOptions;

    let rng = &mut Rng::with_seed(9);
    let dir = tempfile::tempdir().unwrap();
    let mut origin = Origin::start(dir.path(), small(), ServeOptions::default());
    origin.append(rng, 60);
    let local = Store::create(dir.path().join("local")).unwrap();
    let wanted = FeedFilter::from(FeedPart::types(["placed", "removed"]));
    let feed =
        local.feed_with("orders", origin.address.to_string(), wanted.clone(), options()).unwrap();
    let journal = feed.wait_ready(SOON).unwrap();
    let view = local.view_of(&journal, views::Counts).unwrap();
    for _ in 0..3 {
        origin.append(rng, 10);
        let order = StreamId::new("order-1").unwrap();
        let placed = NewEvent::raw("placed", *b"x").unwrap();
        let append = Append::to(&order, ExpectedRevision::Any, [placed]);
        let token = origin.store().append(&append).unwrap().token();
        let own = feed.wait_for(&token, SOON).unwrap();
        view.wait_for(&own, SOON).unwrap();
        check_counts(&view, &expected(origin.store().journal(), &wanted));
    }
    let had = expected(origin.store().journal(), &wanted);
    origin.close();
    view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
    check_counts(&view, &had);
    origin.open();
    feed.resume();
    origin.append(rng, 10);
    converged(&feed, &origin);
    let end = journal.end();
    let durability = headwater::Durability::Durable;
    let (incarnation, position) = (end.incarnation, end.position);
    let token = headwater::Token { journal: end.journal, incarnation, position, durability };
    view.wait_for(&token, SOON).unwrap();
    check_counts(&view, &expected(origin.store().journal(), &wanted));
}

#[cfg(feature = "views")]
fn check_counts(view: &headwater::view::ViewHandle<views::Counts>, events: &[Said]) {
    let mut counts = std::collections::BTreeMap::<String, (u64, u64)>::new();
    for (_, stream, _, data, ..) in events {
        let (count, bytes) = counts.entry(stream.clone()).or_default();
        *count += 1;
        *bytes += data.len() as u64;
    }
    for (stream, row) in counts {
        assert_eq!(view.get(&stream).unwrap(), Some(row), "{stream}");
    }
}

// ------------------------------------------------------------------------------------------------- hostile peers

/// A subscriber by hand.
struct Raw {
    node: Option<NodeId>,
    stream: TcpStream,
    reader: FrameReader,
}

impl Raw {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut reader = FrameReader::new();
        reader.allow_data(1 << 20);
        Self { node: None, stream, reader }
    }

    fn say(&mut self, message: &Message<'_>) {
        let mut out = Vec::new();
        message.encode(&mut out);
        self.stream.write_all(&out).unwrap();
    }

    fn subscribe(&mut self, from: Option<Checkpoint>, terms: FeedTerms, goes_on: bool) {
        self.hello(FEATURE_FILTERED);
        let subscribe = Subscribe { from, witness: None, window_bytes: 1 << 20 };
        self.say(&Message::SubscribeFeed(subscribe, FeedRequest { terms, goes_on }));
    }

    fn hello(&mut self, features: u64) {
        self.say(&Message::Hello(Hello {
            versions: PROTOCOL_VERSIONS,
            features,
            max_frame: 1 << 20,
            node: self.node,
            nonce: [1; 16],
            authentication: Authentication::None,
            agent: "test".to_owned(),
        }));
    }

    /// The error with which it is told to go.
    fn error(&mut self) -> Option<ErrorCode> {
        let mut buffer = [0; 4096];
        loop {
            while let Some(message) = self.reader.next_message().unwrap() {
                if let Message::Error(failure) = message {
                    return Some(failure.code);
                }
            }
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return None,
                Ok(len) => self.reader.push(&buffer[..len]),
            }
        }
    }
}

#[test]
fn a_subscriber_that_breaks_the_rules_of_feeds_is_told_and_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path(), small(), ServeOptions::default());
    origin.append(&mut Rng::with_seed(10), 10);
    let all = || FeedTerms { filter: FeedFilter::everything(), shape: None };
    // Without the feature.
    let mut raw = Raw::connect(origin.address);
    raw.hello(0);
    let subscribe = Subscribe { from: None, witness: None, window_bytes: 1 };
    let request = FeedRequest { terms: all(), goes_on: false };
    raw.say(&Message::SubscribeFeed(subscribe, request));
    assert_eq!(raw.error(), Some(ErrorCode::PROTOCOL));
    // A shape that there isn't.
    let mut raw = Raw::connect(origin.address);
    let shape = Some(ShapeId { name: "other".to_owned(), version: 3 });
    raw.subscribe(Some(origin.end()), FeedTerms { shape, ..all() }, true);
    assert_eq!(raw.error(), Some(ErrorCode::TERMS));
    // A filter that is no filter.
    let mut raw = Raw::connect(origin.address);
    raw.subscribe(None, FeedTerms { filter: FeedFilter::default(), shape: None }, false);
    assert_eq!(raw.error(), Some(ErrorCode::PROTOCOL));
}

/// Has subscribed to everything, and reads no more than the first byte, which says that it was let in.
fn never_reads(address: SocketAddr) -> Raw {
    let mut raw = Raw::connect(address);
    raw.hello(FEATURE_FILTERED);
    let subscribe = Subscribe { from: None, witness: None, window_bytes: u32::MAX };
    let terms = FeedTerms { filter: FeedFilter::everything(), shape: None };
    raw.say(&Message::SubscribeFeed(subscribe, FeedRequest { terms, goes_on: false }));
    raw.stream.read_exact(&mut [0]).unwrap();
    raw
}

/// What is committed is in another feed before these have read it, those that never did and one that was live; and it is cut
/// off.
#[test]
fn a_feed_that_is_never_read_delays_nobody() {
    let rng = &mut Rng::with_seed(11);
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start(dir.path(), stalls::large(), stalls::patient());
    let wanted = FeedFilter::from(FeedPart::types(["placed"]));
    let feed = origin.feed(&dir.path().join("feed"), wanted.clone());
    let mut stalled = vec![never_reads(origin.address)];
    let to = StreamId::new("stock-1").unwrap();
    for _ in 0..stalls::EVENTS {
        let event = NewEvent::raw("noted", vec![b'x'; stalls::EVENT_BYTES]).unwrap();
        origin.store().append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
        origin.append(rng, 1);
        converged(&feed, &origin);
    }
    stalled.extend((0..stalls::STALLED).map(|_| never_reads(origin.address)));
    let addresses: Vec<_> = stalled.iter().map(|raw| raw.stream.local_addr().unwrap()).collect();
    stalls::assert_delay_nobody(origin.server.as_ref().unwrap(), &addresses, || {
        origin.append(rng, 3);
        converged(&feed, &origin);
    });
    let expected = expected(origin.store().journal(), &wanted);
    assert_eq!(received(&converged(&feed, &origin)), expected);
    let late = origin.feed(&dir.path().join("late"), wanted);
    assert_eq!(received(&converged(&late, &origin)), expected);
    let journal = origin.store().journal().clone();
    let impatient = serve(journal, "127.0.0.1:0", stalls::impatient()).unwrap();
    let stalled = never_reads(impatient.local_addr());
    stalls::wait_cut_off(&impatient, stalled.stream.local_addr().unwrap());
}

/// Whether it may still have what it doesn't take is found out all the same.
#[test]
fn a_feed_that_takes_nothing_ends_once_it_may_not_have_it_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("access.json");
    let security = confined(&list, &[FeedFilter::everything()]);
    let serving = ServeOptions { security: Some(security.clone()), ..stalls::patient() };
    let origin = Origin::start(dir.path(), stalls::large(), serving);
    let to = StreamId::new("stock-1").unwrap();
    for _ in 0..stalls::EVENTS {
        let event = NewEvent::raw("noted", vec![b'x'; stalls::EVENT_BYTES]).unwrap();
        origin.store().append(&Append::to(&to, ExpectedRevision::Any, [event])).unwrap();
    }
    let server = origin.server.as_ref().unwrap();
    let stuck = [never_reads(origin.address), never_reads(origin.address)];
    let addresses = stuck.each_ref().map(|raw| raw.stream.local_addr().unwrap());
    stalls::wait_stuck(server, &addresses);
    // Other rights that allow as much.
    write_rights(&list, &[FeedPart::default().into(), FeedPart::types(["placed"]).into()]);
    security.reload().unwrap();
    stalls::wait_stuck(server, &addresses);
    write_rights(&list, &[FeedPart::types(["placed"]).into()]);
    security.reload().unwrap();
    addresses.into_iter().for_each(|address| stalls::wait_cut_off(server, address));
}

/// A mirror and a feed may have the same node id: neither lets go of what the other one lacks.
#[test]
fn a_mirror_and_a_feed_of_one_node_hold_back_what_each_of_them_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let serving = ServeOptions { deadlines: brisk(), ..ServeOptions::default() };
    let origin = Origin::start(dir.path(), small(), serving);
    origin.append(&mut Rng::with_seed(12), 100);
    let end = origin.end();
    let everything = || FeedTerms { filter: FeedFilter::everything(), shape: None };
    let until = retention::Options::new(retention::Until::Position(end.position));
    // Which of them comes last doesn't matter.
    for (node, feed_last) in [(6, true), (7, false)] {
        let node = NodeId::from_bytes([node; 16]);
        let held = || {
            let plan = origin.store().plan_retention(&until).unwrap();
            let of_node = |gate: &retention::Gate| match gate.holder {
                Holder::Mirror { node: Some(at), .. } if at == node => Some((false, gate.position)),
                Holder::Feed { node: Some(at), .. } if at == node => Some((true, gate.position)),
                _ => None,
            };
            let mut held: Vec<_> = plan.gates.iter().filter_map(of_node).collect();
            held.sort_unstable();
            held
        };
        let mut both = [(); 2].map(|()| Raw::connect(origin.address));
        for (n, raw) in both.iter_mut().enumerate() {
            raw.node = Some(node);
            if (n == 1) == feed_last {
                raw.subscribe(None, everything(), false);
            } else {
                raw.hello(0);
                let (from, witness) = (Some(end), None);
                raw.say(&Message::Subscribe(Subscribe { from, witness, window_bytes: 1 }));
            }
            let deadline = Instant::now() + SOON;
            while held().len() <= n {
                assert!(Instant::now() < deadline, "{n}: {:?}", held());
                std::thread::yield_now();
            }
        }
        assert_eq!(held(), [(false, Some(end.position)), (true, Some(Position::START))]);
    }
}

/// Serves the same relayed journal to one connection after the other, of which each is sent what comes from the test; nothing
/// at all ends it.
fn false_relay() -> (SocketAddr, std::sync::mpsc::Sender<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, said) = std::sync::mpsc::channel::<Vec<u8>>();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
            let mut is_subscribed = false;
            while !is_subscribed {
                let Ok(len @ 1..) = stream.read(&mut buffer) else { break };
                reader.push(&buffer[..len]);
                let mut out = Vec::new();
                while let Ok(Some(message)) = reader.next_message() {
                    let path = [8, 9].map(|n| NodeId::from_bytes([n; 16])).to_vec();
                    is_subscribed |= matches!(message, Message::SubscribeFeed(..));
                    grant(message, path, &mut out);
                }
                drop(stream.write_all(&out));
            }
            while let Some(bytes) = is_subscribed.then(|| said.recv()) {
                match bytes {
                    Ok(bytes) if !bytes.is_empty() => drop(stream.write_all(&bytes)),
                    Ok(_) => break,
                    Err(_) => return,
                }
            }
        }
    });
    (address, sender)
}

fn heartbeat(speaker: Speaker) -> Vec<u8> {
    frame(&Message::Heartbeat(Heartbeat { end: place(100), now_us: 0, speaker, echo: 0 }))
}

#[test]
fn behind_a_relay_lag_is_unknown_until_it_has_said_that_it_is_current_in_this_session() {
    let dir = tempfile::tempdir().unwrap();
    let (address, say) = false_relay();
    // It gives no number back: what it says holds as of the subscription, and for long.
    let (heartbeat_time, silence) = (Duration::from_secs(60), Duration::from_secs(600));
    let deadlines = Deadlines { heartbeat: heartbeat_time, silence, ..Deadlines::default() };
    let (path, options) = (dir.path().join("feed"), FollowOptions { deadlines, ..options() });
    let placed = FeedPart::types(["placed"]).into();
    let feed = follow_feed(Arc::new(OsFs), &path, address.to_string(), placed, options).unwrap();
    say.send(frame(&skip(0, 100))).unwrap();
    let all = Some(Position::new(100));
    let has_all = |status: &FeedStatus| status.received.map(|at| at.position) == all;
    let status = feed.wait_until(SOON, has_all).unwrap();
    assert!(!status.is_live() && status.lag_events().is_none(), "{status:?}");
    say.send(heartbeat(Speaker::Relay)).unwrap();
    let status = feed.wait_until(SOON, FeedStatus::is_live).unwrap();
    assert_eq!(status.lag_events(), Some(0));
    // It is behind now, and says so.
    say.send(heartbeat(Speaker::RelayBehind)).unwrap();
    feed.wait_until(SOON, |status| status.lag_events().is_none()).unwrap();
    say.send(heartbeat(Speaker::Relay)).unwrap();
    feed.wait_until(SOON, |status| status.lag_events() == Some(0)).unwrap();
    // Another session: what was heard in the last one was a moment ago.
    say.send(Vec::new()).unwrap();
    feed.wait_until(SOON, |status| status.reconnects == 0 && status.last_error.is_some()).unwrap();
    feed.resume();
    let again = |status: &FeedStatus| {
        status.reconnects == 1
            && matches!(status.state, MirrorState::CatchingUp | MirrorState::Live)
    };
    for said in [None, Some(heartbeat(Speaker::RelayBehind))] {
        let since = Instant::now();
        said.into_iter().for_each(|said| say.send(said).unwrap());
        let status = feed.wait_until(SOON, again).unwrap();
        assert!(!status.is_live() && status.lag_events().is_none(), "{status:?}");
        assert!(status.origin_heard.unwrap() < 3 * heartbeat_time, "{since:?}");
    }
    say.send(heartbeat(Speaker::Relay)).unwrap();
    let status = feed.wait_until(SOON, |status| again(status) && status.is_live()).unwrap();
    assert_eq!((status.lag_events(), status.lag_time()), (Some(0), Some(Duration::ZERO)));
}

const FALSE: JournalId = JournalId::from_bytes([7; 16]);

fn place(position: u64) -> Checkpoint {
    Checkpoint {
        journal: FALSE,
        epoch: 1,
        incarnation: Incarnation::new(5),
        offset: position * 64,
        position: Position::new(position),
        chain: genesis(FALSE),
    }
}

fn false_end() -> OriginEnd {
    OriginEnd { offset: 6400, position: Position::new(100) }
}

fn skip(from: u64, to: u64) -> Message<'static> {
    let from = Position::new(from);
    Message::Skip(Skip { from, behind: place(to), origin_end: false_end() })
}

/// A run as the specification says: for each event what is skipped in front of it, flags, type.
pub(crate) fn run(to: u64, entries: &[(u32, u32, &str)], skipped_behind: u32) -> Vec<u8> {
    let mut rest = Vec::new();
    rest.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    rest.extend_from_slice(&skipped_behind.to_le_bytes());
    rest.extend_from_slice(&[0; 4]);
    rest.extend_from_slice(&place(to).to_bytes());
    for (number, (skipped, flags, name)) in (1..).zip(entries) {
        rest.extend_from_slice(&skipped.to_le_bytes());
        rest.extend_from_slice(&flags.to_le_bytes());
        rest.extend_from_slice(&1_700_000_000_000_000_i64.to_le_bytes());
        let event = NewEvent::raw(name, *b"data").unwrap().id(EventId::from_bytes([number; 16]));
        let stream = StreamId::new("order-1").unwrap();
        record::encode(&mut rest, &event, &stream, Revision::FIRST);
    }
    [&crc32(&[&rest]).to_le_bytes()[..], &rest].concat()
}

fn events(from: u64, run: &[u8]) -> Vec<u8> {
    part(from, 0, false, run)
}

fn part(from: u64, at: u32, continued: bool, bytes: &[u8]) -> Vec<u8> {
    let (from, origin_end) = (Position::new(from), false_end());
    frame(&Message::Events(Events { from, origin_end, at, continued, bytes }))
}

fn frame(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// Answers as an origin that lets in everybody.
fn grant(message: Message<'_>, path: Vec<NodeId>, out: &mut Vec<u8>) {
    match message {
        Message::Hello(hello) => Message::Welcome(Welcome {
            version: 1,
            heartbeat_ms: 1000,
            max_frame: 8192,
            features: hello.features & FEATURE_FILTERED,
            node: NodeId::from_bytes([9; 16]),
            session: [1; 16],
            nonce: hello.nonce,
            now_us: 0,
        })
        .encode(out),
        Message::SubscribeFeed(_, request) => {
            let (end, first_position) = (place(100), Position::START);
            let subscribed = Subscribed { end, first_position, path };
            Message::SubscribedFeed(subscribed, request.terms).encode(out);
        }
        _ => {}
    }
}

/// Grants every feed, and sends these bytes.
fn false_origin(then: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                reader.push(&buffer[..len]);
                let mut out = Vec::new();
                while let Ok(Some(message)) = reader.next_message() {
                    let is_granted = matches!(message, Message::SubscribeFeed(..));
                    grant(message, vec![], &mut out);
                    out.extend(then.iter().filter(|_| is_granted));
                }
                if stream.write_all(&out).is_err() {
                    break;
                }
            }
        }
    });
    address
}

/// What an origin sends; whether that is a lie; and how many events of it may be stored, up to which position.
fn lies() -> Vec<(&'static str, Vec<u8>, bool, (usize, u64))> {
    let good = run(5, &[(2, 0, "placed")], 2);
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 4;
    let mut elsewhere = run(5, &[(2, 0, "placed")], 2);
    elsewhere[16..32].copy_from_slice(&[8; 16]);
    let crc = crc32(&[&elsewhere[4..]]).to_le_bytes();
    elsewhere[..4].copy_from_slice(&crc);
    let mut reserved = run(5, &[(4, 0, "xfeed")], 0);
    let at = reserved.windows(5).position(|bytes| bytes == b"xfeed").unwrap();
    reserved[at] = b'$';
    let crc = crc32(&[&reserved[4..]]).to_le_bytes();
    reserved[..4].copy_from_slice(&crc);
    let data = headwater::shipping::message::Data {
        offset: 0,
        origin_end: false_end(),
        continued: false,
        bytes: &[0xB7; 128],
    };
    vec![
        ("nothing wrong", events(0, &good), false, (1, 5)),
        (
            "a good run in parts",
            [part(0, 0, true, &good[..90]), part(0, 90, false, &good[90..])].concat(),
            false,
            (1, 5),
        ),
        (
            "several of one position",
            events(0, &run(2, &[(1, 0, "placed"), (0, 1, "placed")], 0)),
            false,
            (2, 2),
        ),
        ("skips that overlap", [frame(&skip(0, 5)), frame(&skip(3, 8))].concat(), true, (0, 5)),
        (
            "a position that nothing accounts for",
            [frame(&skip(0, 5)), frame(&skip(6, 8))].concat(),
            true,
            (0, 5),
        ),
        ("a skip that goes back", [frame(&skip(0, 5)), frame(&skip(5, 3))].concat(), true, (0, 5)),
        ("the same skip again", [frame(&skip(0, 5)), frame(&skip(0, 5))].concat(), true, (0, 5)),
        ("a run that overlaps", [frame(&skip(0, 3)), events(0, &good)].concat(), true, (0, 3)),
        ("a run behind a gap", events(1, &good), true, (0, 0)),
        ("a run again", [events(0, &good), events(0, &good)].concat(), true, (1, 5)),
        ("one position too few", events(0, &run(5, &[(2, 0, "placed")], 1)), true, (0, 0)),
        ("one position too many", events(0, &run(5, &[(3, 0, "placed")], 2)), true, (0, 0)),
        (
            "nothing in front to share a place with",
            events(0, &run(5, &[(0, 1, "placed")], 5)),
            true,
            (0, 0),
        ),
        ("an event that wasn't wanted", events(0, &run(5, &[(2, 0, "removed")], 2)), true, (0, 0)),
        ("a reserved type", events(0, &reserved), true, (0, 0)),
        ("a flipped bit", events(0, &flipped), true, (0, 0)),
        ("another journal", events(0, &elsewhere), true, (0, 0)),
        ("no event at all", events(0, &run(5, &[], 5)), true, (0, 0)),
        (
            "beyond what is durable",
            frame(&skip(0, 100))
                .into_iter()
                .chain(events(100, &run(105, &[(2, 0, "placed")], 2)))
                .collect(),
            true,
            (0, 100),
        ),
        (
            "parts that don't follow",
            [part(0, 0, true, &good[..90]), part(0, 91, false, &good[90..])].concat(),
            true,
            (0, 0),
        ),
        (
            "a skip within a run",
            [part(0, 0, true, &good[..90]), frame(&skip(0, 5))].concat(),
            true,
            (0, 0),
        ),
        ("the journal itself", frame(&Message::Data(data)), true, (0, 0)),
    ]
}

#[test]
fn a_lying_origin_is_refused_before_anything_of_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for (what, said, is_lie, may_be_stored) in lies() {
            let place = dir.path().join(what.replace(' ', "-"));
            scope.spawn(move || {
                let address = false_origin(said);
                let feed = feed_at(&place, address, FeedPart::types(["placed", "$feed"]));
                let told = |status: &FeedStatus| match is_lie {
                    true => matches!(&status.last_error, Some(ShippingError::Violation(_))),
                    false => status.received.is_some_and(|at| at.position > Position::START),
                };
                match feed.wait_until(SOON, told) {
                    Ok(_) => {}
                    Err(error) => panic!("{what}: {error}: {:?}", feed.status()),
                }
                let (journal, reached) = (feed.journal().unwrap(), feed.status().received.unwrap());
                feed.stop().unwrap();
                let reached = (received(&journal).len(), reached.position.get());
                assert_eq!(reached, may_be_stored, "{what}");
            });
        }
    });
}

#[test]
fn an_origin_that_grants_more_than_was_wanted_or_no_feeds_at_all_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // One that speaks of filtered feeds as of something unknown: a mirror's origin of an older kind.
    let end = headwater::format::files::Mark::start(FALSE).end;
    let address = crate::shipping::false_origin_at(end, |_| {});
    let feed = feed_at(&dir.path().join("older"), address, FeedPart::types(["placed"]));
    match halted(&feed) {
        ShippingError::Reported { failure } => assert_eq!(failure.code, ErrorCode::UNSUPPORTED),
        other => panic!("{other:?}"),
    }
    assert!(feed.journal().is_none());
}

// ------------------------------------------------------------------------------------------------- processes

const DIR: &str = "HEADWATER_TEST_FEED_DIR";
const ADDRESS: &str = "HEADWATER_TEST_FEED_ADDRESS";

fn wanted_by_process() -> FeedFilter {
    FeedPart::categories(["order", "audit"]).into()
}

fn environment() -> Option<(std::path::PathBuf, SocketAddr)> {
    Some((std::env::var_os(DIR)?.into(), std::env::var(ADDRESS).ok()?.parse().unwrap()))
}

/// Tells the test that it goes on; ends with the test.
fn say(position: Position) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "\nat {position}").and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

fn origin_at(dir: &Path, address: SocketAddr) -> Origin {
    let (options, serving) =
        (small(), ServeOptions { frame_bytes: 8192, ..ServeOptions::default() });
    let dir = dir.join("origin");
    let mut origin = Origin { dir, options, serving, store: None, server: None, address };
    origin.open();
    origin
}

#[test]
fn process_origin() {
    let Some((dir, address)) = environment() else { return };
    let origin = origin_at(&dir, address);
    let rng = &mut Rng::new();
    loop {
        origin.append(rng, 1);
        say(origin.end().position);
    }
}

#[test]
fn process_feed() {
    let Some((dir, address)) = environment() else { return };
    let feed = feed_at(&dir.join("feed"), address, wanted_by_process());
    let journal = feed.wait_ready(SOON).unwrap();
    let mut end = journal.end().position;
    loop {
        say(end);
        end = journal.wait_past(end, SOON).position;
    }
}

struct Process {
    child: std::process::Child,
    says: std::io::BufReader<std::process::ChildStdout>,
}

impl Process {
    fn start(test: &str, dir: &Path, address: SocketAddr) -> Self {
        let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(DIR, dir)
            .env(ADDRESS, address.to_string())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let says = std::io::BufReader::new(child.stdout.take().unwrap());
        Self { child, says }
    }

    /// Reads on until it has said so many positions.
    fn hear(&mut self, lines: usize) {
        use std::io::BufRead as _;
        let (mut heard, mut line) = (0, String::new());
        while heard < lines {
            line.clear();
            assert!(self.says.read_line(&mut line).unwrap() > 0, "the process has ended");
            heard += usize::from(line.starts_with("at "));
        }
    }
}

impl Drop for Process {
    /// SIGKILL.
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn processes_of_a_feed_killed_at_any_moment_end_up_with_all_of_it_once() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = Rng::with_seed(seed);
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let start = |test| Some(Process::start(test, dir, address));
    let (mut origin, mut feed) = (start("process_origin"), start("process_feed"));
    for _ in 0..10 {
        origin.as_mut().unwrap().hear(rng.usize(1..60));
        feed.as_mut().unwrap().hear(rng.usize(1..4));
        let kill = rng.u8(1..4);
        if kill & 1 != 0 {
            origin = None;
            origin = origin.or_else(|| start("process_origin"));
        }
        if kill & 2 != 0 {
            feed = None;
            feed = feed.or_else(|| start("process_feed"));
        }
    }
    drop((origin, feed));
    let origin = origin_at(dir, address);
    let feed = feed_at(&dir.join("feed"), address, wanted_by_process());
    let journal = converged(&feed, &origin);
    assert_eq!(received(&journal), expected(origin.store().journal(), &wanted_by_process()));
}
