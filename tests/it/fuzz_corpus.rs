//! What the fuzzers begin with, and what they have found, through the code that they call; see `fuzz/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use headwater::format::batch::BATCH_HEADER_BYTES;
use headwater::format::files::Witness;
use headwater::format::segment::{HEADER_PAGE_BYTES, PageState, SegmentPage};
use headwater::fs::sim::SimFs;
use headwater::fuzzing::{DATA, FEED, MIRROR, RELAY, RESUMES, SEAL, TARGETS};
use headwater::shipping::message::Speaker;
use headwater::shipping::message::{
    Ack, Authentication, Common, Data, Diverged, Divergence, ErrorCode, Events, Failure,
    FeedRequest, FeedTerms, GoAway, Heartbeat, Hello, Message, OriginEnd, PROTOCOL_VERSIONS, Probe,
    Probed, ShapeId, Skip, Subscribe, Subscribed, Truncated, Welcome,
};
use headwater::shipping::{FeedFilter, FeedPart};
use headwater::{
    Append, Chain, Checkpoint, EventId, ExpectedRevision, Incarnation, JournalId, JournalOptions,
    Locator, NewEvent, NodeId, Position, Store, StreamId,
};

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// Inputs by target and name.
type Seeds = BTreeMap<(&'static str, &'static str), Vec<u8>>;

fn with_switches(switches: u8, bytes: &[u8]) -> Vec<u8> {
    [&[switches], bytes].concat()
}

// ------------------------------------------------------------------------------------ made by the encoders

fn id(number: u8) -> EventId {
    EventId::from_bytes([number; 16])
}

/// A plain event, one with everything, one that is empty.
fn events() -> Vec<NewEvent> {
    let plain = NewEvent::json("order.placed", &serde_json::json!({ "total_cents": 1250 }));
    let full = NewEvent::raw("order.paid", vec![0xA5; 100]).unwrap();
    let causation = Locator { journal: JournalId::from_bytes([7; 16]), position: Position::new(9) };
    let full = full.tag("vip").tag("eu").subject("customer-7").correlation(id(90));
    let full =
        full.causation(causation).occurred_at_us(-1).metadata("trace", "4f").schema_version(3);
    let empty = NewEvent::raw("x", Vec::new()).unwrap();
    vec![plain.unwrap().id(id(1)), full.id(id(2)), empty.id(id(3))]
}

/// Segment 0 of a journal of a few batches, as it lies on the disk while the journal is open.
fn segment() -> Vec<u8> {
    headwater::env::seed(Some(1));
    let disk = SimFs::new(1);
    let options = JournalOptions {
        segment_bytes_first: 8 * 1024,
        segment_bytes_max: 8 * 1024,
        batch_bytes_max: 1024,
        group_bytes_max: 1024,
        background_thread: false,
        ..JournalOptions::default()
    };
    let store = Store::builder("/s").create_if_missing().journal_options(options);
    let store = store.fs(Arc::new(disk.clone())).open().unwrap();
    let (a, b) = (StreamId::new("order-7").unwrap(), StreamId::new("é").unwrap());
    let mut events = events();
    let later = NewEvent::raw("x", b"later".to_vec()).unwrap().id(id(4));
    let rest = events.split_off(1);
    let first = Append::to(&a, ExpectedRevision::NoStream, events);
    store.append(&first.and_to(&b, ExpectedRevision::NoStream, rest)).unwrap();
    store.append(&Append::to(&a, ExpectedRevision::Any, [later])).unwrap();
    let bytes = disk.raw(Path::new("/s/journal/0000000000000000.seg")).unwrap();
    headwater::env::seed(None);
    bytes
}

/// The salt, and the place of each batch in the segment's file.
fn batches(segment: &[u8]) -> (u64, Vec<std::ops::Range<usize>>) {
    let page = segment.first_chunk::<HEADER_PAGE_BYTES>().unwrap();
    let PageState::Valid { page, .. } = SegmentPage::read(page) else { panic!("no header") };
    let mut places = Vec::new();
    let mut at = HEADER_PAGE_BYTES;
    while segment[at] != 0 {
        let len = u32::from_le_bytes(*segment[at + 60..].first_chunk().unwrap()) as usize;
        places.push(at..at + len);
        at += len;
    }
    (page.header.salt, places)
}

fn batch_seeds(seeds: &mut Seeds) {
    let segment = segment();
    let (salt, places) = batches(&segment);
    for (name, place) in ["several-streams", "one-event"].into_iter().zip(places) {
        let input = [&salt.to_le_bytes(), &segment[place]].concat();
        seeds.insert(("decode_batch", name), with_switches(0, &input));
        let mut unsealed = with_switches(SEAL, &input);
        unsealed[9 + 12..9 + 16].fill(0);
        let name = if name == "one-event" { "one-event-sealed" } else { "several-streams-sealed" };
        seeds.insert(("decode_batch", name), unsealed);
    }
}

fn segment_seeds(seeds: &mut Seeds) {
    let segment = segment();
    let (_, places) = batches(&segment);
    let end = places.last().unwrap().end;
    let mut put = |name, switches, bytes: &[u8]| {
        seeds.insert(("recover_segment", name), with_switches(switches, bytes));
    };
    put("cut-at-its-end", 0, &segment[..end]);
    put("with-room", 0, &segment);
    put("mirror", MIRROR, &segment[..end]);
    put("torn-body", 0, &segment[..end - BATCH_HEADER_BYTES / 2]);
    put("torn-header", 0, &segment[..places[1].start + 50]);
    put("header-only", 0, &segment[..HEADER_PAGE_BYTES]);
    let mut damaged = segment[..end].to_vec();
    damaged[places[0].start + 200] ^= 1;
    put("damaged-in-front-of-a-batch", 0, &damaged);
    put("damaged-sealed", SEAL, &damaged);
    put("mirror-sealed", SEAL | MIRROR, &damaged);
    // Reading such a stream never ended.
    let revision = places[1].start + BATCH_HEADER_BYTES + 32;
    let mut gap = segment[..end].to_vec();
    gap[revision..revision + 8].copy_from_slice(&5_u64.to_le_bytes());
    put("found-gap-in-revisions", SEAL, &gap);
    put("found-gap-in-revisions-of-a-mirror", SEAL | MIRROR, &gap);
    let revision = places[0].start + BATCH_HEADER_BYTES + 32;
    for (name, last) in [("found-last-revision", u64::MAX), ("found-last-but-one", u64::MAX - 1)] {
        let mut huge = segment[..end].to_vec();
        huge[revision..revision + 8].copy_from_slice(&last.to_le_bytes());
        put(name, SEAL, &huge);
    }
    let mut one_copy = segment[..end].to_vec();
    one_copy[20] ^= 1;
    put("one-copy-of-the-header", 0, &one_copy);
}

fn checkpoint(position: u64) -> Checkpoint {
    Checkpoint {
        journal: JournalId::from_bytes([1; 16]),
        epoch: 2,
        incarnation: Incarnation::new(3),
        offset: 64 * position,
        position: Position::new(position),
        chain: Chain::from_bytes([4; 16]),
    }
}

fn message_seeds(seeds: &mut Seeds) {
    let segment = segment();
    let (_, places) = batches(&segment);
    let node = NodeId::from_bytes([5; 16]);
    let chain = Chain::from_bytes([4; 16]);
    let witness = Witness { offset: 640, position: Position::new(10), chain };
    let page = segment.first_chunk::<HEADER_PAGE_BYTES>().unwrap();
    let bytes = &segment[places[0].start..places[1].end];
    let origin_end = OriginEnd { offset: bytes.len() as u64, position: Position::new(4) };
    let agent = "headwater/0.1.0".to_owned();
    let failure = Failure::new(ErrorCode::CORRUPT, "damaged");
    let run = crate::filtered::run(9, &[(2, 0, "placed"), (0, 1, "placed"), (1, 0, "x")], 3);
    let messages = [
        (
            "hello",
            Message::Hello(Hello {
                versions: PROTOCOL_VERSIONS,
                features: 0,
                max_frame: 1 << 20,
                node: Some(node),
                nonce: [6; 16],
                authentication: Authentication::None,
                agent,
            }),
        ),
        (
            "welcome",
            Message::Welcome(Welcome {
                version: 1,
                heartbeat_ms: 1000,
                max_frame: 1 << 20,
                features: 0,
                node,
                session: [8; 16],
                nonce: [6; 16],
                now_us: 1,
            }),
        ),
        (
            "subscribe",
            Message::Subscribe(Subscribe {
                from: Some(checkpoint(9)),
                witness: Some(witness),
                window_bytes: 1 << 20,
            }),
        ),
        (
            "subscribe-to-all",
            Message::Subscribe(Subscribe { from: None, witness: None, window_bytes: 1 }),
        ),
        (
            "subscribed",
            Message::Subscribed(Subscribed {
                end: checkpoint(20),
                first_position: Position::START,
                path: vec![node, NodeId::from_bytes([9; 16])],
            }),
        ),
        (
            "diverged",
            Message::Diverged(Diverged {
                divergence: Divergence::Fork,
                at_witness: true,
                speaker: Speaker::Origin,
                common: Some(Common { position: Position::new(3), chain }),
                end: checkpoint(20),
            }),
        ),
        ("probe", Message::Probe(Probe { positions: (1..=3).map(Position::new).collect() })),
        ("probed", Message::Probed(Probed { ends: vec![None, Some(checkpoint(20).into())] })),
        (
            "truncated",
            Message::Truncated(Truncated {
                start: checkpoint(20),
                sources: vec!["127.0.0.1:7001".into(), "/srv/backups/orders".into()],
            }),
        ),
        ("segment", Message::Segment(page)),
        ("data", Message::Data(Data { offset: 0, origin_end, continued: false, bytes })),
        (
            "heartbeat",
            Message::Heartbeat(Heartbeat {
                end: checkpoint(20),
                now_us: 7,
                speaker: Speaker::Origin,
                echo: 3,
            }),
        ),
        (
            "ack",
            Message::Ack(Ack {
                mirrored: checkpoint(20),
                applied: Some(Position::new(19)),
                echo: 3,
            }),
        ),
        ("error", Message::Error(Failure { position: Some(Position::new(3)), ..failure })),
        ("goaway", Message::GoAway(GoAway { reconnect_after_ms: 1000 })),
    ];
    let mut all = Vec::new();
    for (name, message) in messages.iter().chain(&feed_messages(&run)) {
        let mut frame = Vec::new();
        message.encode(&mut frame);
        all.extend_from_slice(&frame);
        seeds.insert(("decode_message", name), with_switches(SEAL | DATA, &frame));
    }
    seeds.insert(("decode_message", "all"), with_switches(DATA, &all));
    seeds.insert(("decode_message", "all-without-data"), with_switches(0, &all));
}

/// What only filtered feeds use.
fn feed_messages(run: &[u8]) -> [(&'static str, Message<'_>); 5] {
    let part = FeedPart::categories(["order", "stock"]).and_types(["placed"]).and_tags(["eu"]);
    let filter = FeedFilter::any_of([part, FeedPart::types(["x"])]);
    let shape = Some(ShapeId { name: "public".to_owned(), version: 2 });
    let terms = FeedTerms { filter, shape };
    let subscribe = Subscribe { from: Some(checkpoint(9)), witness: None, window_bytes: 1 << 20 };
    let path = vec![NodeId::from_bytes([5; 16])];
    let subscribed = Subscribed { end: checkpoint(20), first_position: Position::START, path };
    let (from, end) = (Position::new(2), checkpoint(20));
    let origin_end = OriginEnd::from(&end);
    let (bytes, rest) = run.split_at(run.len() / 2);
    let (first, at) = (Position::START, bytes.len() as u32);
    let part = |at, continued, bytes| {
        Message::Events(Events { from: first, origin_end, at, continued, bytes })
    };
    [
        (
            "subscribe-to-a-feed",
            Message::SubscribeFeed(subscribe, FeedRequest { terms: terms.clone(), goes_on: true }),
        ),
        ("a-feed-is-granted", Message::SubscribedFeed(subscribed, terms)),
        ("skip", Message::Skip(Skip { from, behind: end, origin_end })),
        ("events", part(0, false, run)),
        ("a-part-of-events", part(at, true, rest)),
    ]
}

/// Operations by their numbers in `src/fuzzing/ops.rs`, with what follows each; in front the disk's seed.
fn operation_seeds(seeds: &mut Seeds) {
    let append = |what: u8| [0, what, 40];
    let (buffered, ticket) = ([4, 7, 20], [5, 10, 20]);
    let (wait, flush, read_all, mirror) = ([7], [8], [12], [19]);
    let (close, kill, cut) = ([17, 0], [17, 1], [17, 2]);
    let kinds: [&[u8]; 17] = [
        &[1],
        &append(0),
        &append(200),
        &buffered,
        &ticket,
        &ticket,
        &wait,
        &flush,
        &[9, 1, 3],
        &[10, 0],
        &[11, 1, 2, 3],
        &read_all,
        &[13, 1, 1],
        &[14, 2],
        &close,
        &append(9),
        &read_all,
    ];
    seeds.insert(("ops_vs_model", "every-kind"), kinds.concat());
    let rolls: Vec<u8> = (0..30).flat_map(|what: u8| [0, what * 8, 250]).collect();
    let rolls =
        [&[2], &rolls[..45], &mirror, &rolls[45..], &read_all, &mirror, &close, &mirror].concat();
    seeds.insert(("ops_vs_model", "rolls-and-a-mirror"), rolls);
    let crashes: [&[u8]; 12] = [
        &[3],
        &append(3),
        &[15, 0],
        &append(4),
        &cut,
        &append(5),
        &[15, 3],
        &ticket,
        &kill,
        &[18, 1, 20, 1],
        &append(6),
        &read_all,
    ];
    seeds.insert(("ops_vs_model", "failures-and-crashes"), crashes.concat());
    let full: [&[u8]; 9] =
        [&[4], &[16, 0], &rolls_of(12), &[10, 3], &[16, 1], &append(7), &buffered, &cut, &read_all];
    seeds.insert(("ops_vs_model", "disk-full"), full.concat());
    let pending: [&[u8]; 9] =
        [&[5], &buffered, &buffered, &[10, 1], &ticket, &[9, 10, 1], &[15, 1], &flush, &wait];
    seeds.insert(("ops_vs_model", "answers-that-rest-on-others"), pending.concat());
}

fn rolls_of(count: u8) -> Vec<u8> {
    (0..count).flat_map(|what| [0, what * 3, 255]).collect()
}

/// What an input of a session does: each begins with the place that it is about (1: the end), then comes its number.
fn act(number: u8, choices: &[u8]) -> Vec<u8> {
    [&[1, number], choices].concat()
}

/// A frame as it is, undamaged and in one piece.
fn act_raw(number: u8, message: &Message<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(&mut frame);
    let len = u16::try_from(frame.len()).unwrap().to_le_bytes();
    act(number, &[&len, &frame[..], &[0, 0]].concat())
}

/// See `src/fuzzing/session_origin.rs` for the numbers.
fn session_origin_seeds(seeds: &mut Seeds) {
    let hello = act_raw(9, &Message::Hello(session_hello(0b1101)));
    let from = |from| Subscribe { from, witness: None, window_bytes: 4096 };
    let subscribe = act_raw(9, &Message::Subscribe(from(None)));
    let fork = act_raw(9, &Message::Subscribe(from(Some(session_end(3)))));
    let feed = |filter| {
        let request = FeedRequest { terms: FeedTerms { filter, shape: None }, goes_on: false };
        act_raw(9, &Message::SubscribeFeed(from(None), request))
    };
    let types = |name| feed(FeedFilter::any_of([FeedPart::types([name])]));
    let (some, none, all) = (types("a"), types("none"), feed(FeedFilter::everything()));
    let probe = act_raw(9, &Message::Probe(Probe { positions: vec![Position::new(1); 64] }));
    let (ack, idle) = (act(3, &[0; 5]), act(5, &[200, 0, 0, 0]));
    let (talk, step) = (act(19, &[7]), act(16, &[]));
    let (grow, sync) = (act(12, &[]), act(13, &[]));
    let second = act(11, &[5, 0]);
    let probes = act(6, &[&[19][..], &[0; 100]].concat());
    let (away, back) = (act(14, &[5]), act(14, &[4]));
    let mut put = |name, switches: u8, acts: &[&[u8]]| {
        let front: [&[u8]; 1] = [&[switches, 1, 20]];
        seeds.insert(("session_origin", name), [&front, acts].concat().concat());
    };
    let catches_up: [&[u8]; 10] =
        [&hello, &subscribe, &talk, &ack, &talk, &grow, &sync, &talk, &second, &talk];
    put("a-mirror-catches-up", SEAL, &catches_up);
    put("a-mirror-of-a-mirror-catches-up", SEAL | RELAY, &catches_up);
    let more: [&[u8]; 6] = [&grow, &sync, &talk, &second, &talk, &ack];
    put(
        "a-subscriber-is-fed",
        SEAL,
        &[&[&hello[..], &some, &talk, &ack], &more[..], &more].concat(),
    );
    put("a-subscriber-is-fed-nothing", SEAL, &[&hello, &none, &talk, &second, &talk]);
    put("a-subscriber-is-fed-everything", SEAL, &[&hello, &all, &talk, &talk, &ack, &talk]);
    put("another-history", SEAL, &[&hello, &fork, &step, &probe, &talk, &probe, &probe]);
    put("asked-too-often-where-histories-part", SEAL, &[&hello, &fork, &step, &probes, &talk]);
    let away = [&hello, &subscribe, &away, &step, &back, &talk, &ack, &away, &step, &second];
    put("a-disk-that-may-not-be-asked", 0, &away.map(Vec::as_slice));
    put("acknowledged-over-and-over", 0, &[&hello, &subscribe, &talk, &ack, &idle, &talk]);
    let ahead = [0, 5, 0, 3, 0, 0, 0, 0, 0];
    put("acknowledged-ahead", SEAL, &[&hello, &subscribe, &step, &ahead, &talk]);
    let nothing = act(10, &[0xA0, 0x0F, 0, 0, 0]);
    put("nothing-without-end", 0, &[&[&hello[..]], &[&nothing[..]; 6][..]].concat());
    let leave = act(15, &[1]);
    put("told-twice-to-leave", 0, &[&hello, &subscribe, &talk, &leave, &talk, &leave, &talk]);
    put("before-hello", 0, &[&subscribe, &talk]);
    put("in-the-wrong-order", 0, &[&hello, &talk, &hello, &subscribe, &talk]);
    let leaves = act(8, &[0, 0]);
    put("it-leaves", 0, &[&hello, &subscribe, &talk, &leaves, &talk, &ack]);
}

/// See `src/fuzzing/session_mirror.rs` for the numbers.
fn session_mirror_seeds(seeds: &mut Seeds) {
    let welcome =
        |features| act_raw(13, &Message::Welcome(Welcome { features, ..session_welcome() }));
    let (whole, fed) = (welcome(0b1100), welcome(1));
    let (subscribed, honest) = (act(1, &[0; 7]), act(2, &[9, 0, 0]));
    let heartbeat = act(8, &[0; 7]);
    let (take, sync, speak) = (act(17, &[8, 0]), act(20, &[]), act(22, &[]));
    let (second, ask) = (act(15, &[5, 0]), act(24, &[4]));
    let diverged = Diverged {
        divergence: Divergence::Fork,
        at_witness: false,
        speaker: Speaker::Origin,
        common: None,
        end: session_end(40),
    };
    let diverged = act_raw(13, &Message::Diverged(diverged));
    let probed = act(10, &[0, 0, 0]);
    let flood = |kind| act(25, &[kind, 200]);
    let (skip, skip_back) = (act(27, &[0; 6]), act(27, &[0, 7, 0, 0, 0, 252, 0, 0, 0, 0, 0, 0]));
    let run_with = |from, filter| act(26, &[from, 0, 1, filter, 0, 0, 0, 0, 0, 0]);
    let (run, run_of_all) = (run_with(0, 0), run_with(0, 15));
    let run_from_elsewhere = [&[0, 6, 0], &run_with(15, 0)[1..]].concat();
    let pages = act(6, &[0, 0, 1, 0, 0, 0, 0]);
    let mut put = |name, front: &[u8], acts: &[&[u8]]| {
        seeds.insert(("session_mirror", name), [&[front], acts].concat().concat());
    };
    let begin: [&[u8]; 3] = [&speak, &whole, &subscribed];
    let rounds: [&[u8]; 10] =
        [&honest, &honest, &take, &sync, &speak, &heartbeat, &second, &ask, &speak, &honest];
    put("it-catches-up", &[SEAL, 1, 20, 0], &[&begin[..], &rounds, &rounds].concat());
    put("it-goes-on", &[SEAL | RESUMES, 1, 20, 3, 0, 0], &[&begin[..], &rounds].concat());
    let parts: [&[u8]; 7] = [&speak, &whole, &diverged, &speak, &probed, &take, &speak];
    put("another-history", &[SEAL | RESUMES, 1, 20, 9, 0, 3, 4, 0, 5], &parts);
    let twice: [&[u8]; 6] = [&speak, &whole, &diverged, &speak, &probed, &probed];
    put("another-history-answered-twice", &[SEAL | RESUMES, 1, 20, 9, 0, 3, 4, 0, 5], &twice);
    put("another-history-and-silence", &[SEAL | RESUMES, 1, 20, 9, 0, 3, 4, 0, 5], &twice[..3]);
    let back = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    put("an-end-that-goes-back", &[SEAL, 1, 20, 0], &[&begin[..], &[&honest, &back]].concat());
    put("two-pages-for-a-segment", &[SEAL, 1, 20, 0], &[&begin[..], &[&pages]].concat());
    for (name, offset) in [("data-of-elsewhere", 4096), ("half-a-batch", 0)] {
        let mut bytes = [0; 128];
        bytes[60] = if offset == 0 { 192 } else { 128 };
        let origin_end = OriginEnd { offset: 1 << 40, position: Position::new(1 << 40) };
        let data = Message::Data(Data { offset, origin_end, continued: false, bytes: &bytes });
        put(name, &[SEAL, 1, 20, 0], &[&begin[..], &[&act_raw(13, &data)]].concat());
    }
    for (name, kind) in [("flood-of-parts", 0), ("flood-of-batches", 1), ("flood-of-segments", 2)] {
        put(name, &[0, 1, 20, 0], &[&begin[..], &[&flood(kind)]].concat());
    }
    let feed: [&[u8]; 9] = [&speak, &fed, &subscribed, &run, &run, &take, &sync, &speak, &skip];
    put("it-is-fed", &[SEAL | FEED, 1, 20, 0, 0], &feed);
    let begin: [&[u8]; 4] = [&speak, &fed, &subscribed, &run];
    for (name, last) in [
        ("it-is-fed-and-goes-back", &skip_back),
        ("it-is-fed-from-elsewhere", &run_from_elsewhere),
        ("it-is-fed-what-it-did-not-want", &run_of_all),
    ] {
        put(name, &[SEAL | FEED, 1, 20, 0, 1], &[&begin[..], &[last]].concat());
    }
    put("before-welcome", &[0, 1, 20, 0], &[&subscribed, &honest]);
}

/// The journal that the sessions of the targets are about.
fn session_end(position: u64) -> Checkpoint {
    Checkpoint { journal: JournalId::from_bytes([0x1A; 16]), ..checkpoint(position) }
}

fn session_hello(features: u64) -> Hello {
    Hello {
        versions: PROTOCOL_VERSIONS,
        features,
        max_frame: 1 << 20,
        node: Some(NodeId::from_bytes([5; 16])),
        nonce: [6; 16],
        authentication: Authentication::None,
        agent: "headwater/0.1.0".to_owned(),
    }
}

fn session_welcome() -> Welcome {
    Welcome {
        version: 1,
        heartbeat_ms: 1000,
        max_frame: 8192,
        features: 0,
        node: NodeId::from_bytes([5; 16]),
        session: [8; 16],
        nonce: [0x17; 16],
        now_us: 1,
    }
}

fn seeds() -> Seeds {
    let mut seeds = Seeds::new();
    operation_seeds(&mut seeds);
    batch_seeds(&mut seeds);
    message_seeds(&mut seeds);
    segment_seeds(&mut seeds);
    session_mirror_seeds(&mut seeds);
    session_origin_seeds(&mut seeds);
    seeds
}

#[test]
fn the_seeds_are_what_the_encoders_make() {
    for ((target, name), bytes) in seeds() {
        let path = fuzz_dir().join("seeds").join(target).join(name);
        if std::env::var_os("HEADWATER_WRITE_SEEDS").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        let stored = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(stored == bytes, "{}: written by other code; see fuzz/README.md", path.display());
    }
}

// --------------------------------------------------------------------------------------------- the corpus

fn inputs_in(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

#[test]
fn no_seed_and_nothing_that_fuzzers_have_found_breaks_a_promise() {
    for (target, run) in TARGETS {
        let mut count = 0;
        for folder in ["seeds", "corpus", "artifacts"] {
            for (path, input) in inputs_in(&fuzz_dir().join(folder).join(target)) {
                println!("{}", path.display());
                run(&input);
                count += 1;
            }
        }
        assert!(count > 3, "{target}: no seeds");
        println!("{target}: {count} inputs");
    }
}

#[test]
fn seeds_with_single_bytes_changed_break_no_promise() {
    let targets: BTreeMap<_, _> = TARGETS.iter().copied().collect();
    for ((target, name), bytes) in seeds() {
        let mut rng = fastrand::Rng::with_seed(bytes.len() as u64);
        for _ in 0..60 {
            let mut input = bytes.clone();
            // Where headers and records are, most of the time.
            let at = match rng.u8(..3) {
                0 => rng.usize(1..input.len()),
                1 => rng.usize(1..input.len().min(160)),
                _ if input.len() > 4300 => rng.usize(4097..4300),
                _ => rng.usize(1..input.len()),
            };
            input[at] = if rng.bool() { rng.u8(..) } else { input[at] ^ (1 << rng.u8(..8)) };
            input[0] |= if rng.bool() { SEAL } else { 0 };
            println!("{target}/{name}: byte {at} is {}, switches {}", input[at], input[0]);
            targets[target](&input);
        }
    }
}

#[test]
fn the_targets_reach_behind_the_checksums() {
    // A seed whose payload is changed is refused as it is, and accepted once it is sealed: otherwise the
    // fuzzers would only ever test checksums.
    let segment = segment();
    let (salt, places) = batches(&segment);
    let mut batch = segment[places[0].clone()].to_vec();
    let last = batch.iter().rposition(|&byte| byte == 0xA5).unwrap();
    batch[last] ^= 1;
    assert!(headwater::format::batch::BatchRef::decode(&batch, salt).is_err());
    headwater::fuzzing::seal(&mut batch, salt);
    assert!(headwater::format::batch::BatchRef::decode(&batch, salt).is_ok());
}
