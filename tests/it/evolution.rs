//! Events of older versions become those that the code knows, wherever they are read; and what was once
//! written is proven to be readable.
//!
//! The histories here are written by event types of earlier times and read by the present one. What must
//! come out is told by a model that knows nothing of upcasters: [`Written::now`].

use std::path::{Path, PathBuf};

use fastrand::Rng;
use headwater::codec::CodecError;
use headwater::schema::{self, Finding, SchemaError};
use headwater::upcast::{Decoded, RawEvent, Step, UPCAST_CHAIN_MAX, Upcast, discard};
use headwater::{
    Append, Event, EventKind, EventKindRef, ExpectedRevision, KnownKind, NewEvent, Payload,
    PayloadCodec, Position, Recorded, Store, StreamId,
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Placed {
    cents: u64,
    currency: String,
    items: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PlacedV2 {
    cents: u64,
    currency: String,
}

/// What the code knows today.
#[derive(Clone, Debug, PartialEq, Event)]
#[event(
    upcast("order.placed_and_paid", 1 = split),
    upcast("order.bundled", 1 = unbundle),
    upcast("order.viewed", 1 = discard, 2 = discard)
)]
enum OrderEvent {
    #[event(name = "order.placed", version = 3, upcast(1 = placed_1_to_2, 2 = placed_2_to_3))]
    Placed(Placed),
    #[event(name = "order.paid", version = 1)]
    Paid { cents: u64 },
    #[event(name = "order.cancelled", version = 2, codec = json)]
    #[event(upcast(1 = cancelled_1_to_2), upcast("order.canceled", 1 = canceled))]
    Cancelled { by: u32, reason: Option<String> },
    #[event(name = "order.closed", version = 4, since = 4)]
    Closed,
}

fn placed_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
    event.map(|cents: u64| PlacedV2 { cents, currency: "EUR".into() })
}

fn placed_2_to_3(event: RawEvent<'_>) -> Upcast<'_> {
    event.map(|PlacedV2 { cents, currency }| Placed { cents, currency, items: 1 })
}

#[derive(Serialize, Deserialize)]
struct CancelledV1 {
    by: u32,
}

#[derive(Serialize)]
struct Paid {
    cents: u64,
}

#[derive(Serialize)]
struct CancelledV2 {
    by: u32,
    reason: Option<String>,
}

fn cancelled_1_to_2(event: RawEvent<'_>) -> Upcast<'_> {
    event.map(|CancelledV1 { by }| CancelledV2 { by, reason: None })
}

fn canceled(event: RawEvent<'_>) -> Upcast<'_> {
    event.renamed("order.cancelled", 1)
}

/// Into a placed event of the first version, which goes on through its own upcasters, and a paid one.
fn split(event: RawEvent<'_>) -> Upcast<'_> {
    let cents: u64 = event.decode()?;
    let paid = Paid { cents };
    Ok(vec![event.becomes("order.placed", 1, &cents)?, event.becomes("order.paid", 1, &paid)?])
}

/// Into none, one or several of another old kind.
fn unbundle(event: RawEvent<'_>) -> Upcast<'_> {
    let all: Vec<u64> = event.decode()?;
    let orders = all.iter().map(|cents| Ok(event.becomes("order.placed_and_paid", 1, cents)?));
    orders.collect()
}

/// What earlier programs wrote.
#[derive(Clone, Debug, Event)]
enum FirstEra {
    #[event(name = "order.placed", version = 1)]
    Placed(u64),
    #[event(name = "order.placed_and_paid", version = 1)]
    PlacedAndPaid(u64),
    #[event(name = "order.bundled", version = 1, codec = json)]
    Bundled(Vec<u64>),
    #[event(name = "order.canceled", version = 1)]
    Canceled { by: u32 },
    #[event(name = "order.viewed", version = 1)]
    Viewed,
}

#[derive(Clone, Debug, Event)]
enum SecondEra {
    #[event(name = "order.placed", version = 2, since = 2)]
    Placed { cents: u64, currency: String },
    #[event(name = "order.paid", version = 1, codec = json)]
    Paid { cents: u64 },
    #[event(name = "order.cancelled", version = 1, codec = json)]
    Cancelled { by: u32 },
    #[event(name = "order.viewed", version = 2, since = 2)]
    Viewed { by: u32 },
}

/// Another service's.
#[derive(Clone, Debug, Event)]
#[event(crate = headwater)]
enum OtherEvent {
    #[event(name = "stock.counted", version = 9, since = 9)]
    Counted(u64),
}

#[derive(Clone, Debug)]
enum Written {
    First(FirstEra),
    Second(SecondEra),
    Now(OrderEvent),
    Other(OtherEvent),
}

impl Written {
    fn random(rng: &mut Rng) -> Self {
        let (cents, by) = (rng.u64(0..100_000), rng.u32(..));
        let currency = rng.choice(["EUR", "CHF", ""]).unwrap().to_owned();
        match rng.u8(0..14) {
            0 => Self::First(FirstEra::Placed(cents)),
            1 => Self::First(FirstEra::PlacedAndPaid(cents)),
            2 => {
                let all = (0..rng.usize(0..4)).map(|_| rng.u64(0..100_000)).collect();
                Self::First(FirstEra::Bundled(all))
            }
            3 => Self::First(FirstEra::Canceled { by }),
            4 => Self::First(FirstEra::Viewed),
            5 => Self::Second(SecondEra::Placed { cents, currency }),
            6 => Self::Second(SecondEra::Paid { cents }),
            7 => Self::Second(SecondEra::Cancelled { by }),
            8 => Self::Second(SecondEra::Viewed { by }),
            9 => Self::Now(OrderEvent::Placed(Placed { cents, currency, items: by })),
            10 => Self::Now(OrderEvent::Paid { cents }),
            11 => Self::Now(OrderEvent::Cancelled { by, reason: Some(currency) }),
            12 => Self::Now(OrderEvent::Closed),
            _ => Self::Other(OtherEvent::Counted(cents)),
        }
    }

    fn to_event(&self) -> NewEvent {
        match self {
            Self::First(event) => NewEvent::typed(event),
            Self::Second(event) => NewEvent::typed(event),
            Self::Now(event) => NewEvent::typed(event),
            Self::Other(event) => NewEvent::typed(event),
        }
        .unwrap()
    }

    /// What it is today; `None` if it is of another type.
    fn now(&self) -> Option<Vec<OrderEvent>> {
        let placed = |cents: u64, currency: &str| {
            OrderEvent::Placed(Placed { cents, currency: currency.into(), items: 1 })
        };
        let both = |cents: u64| [placed(cents, "EUR"), OrderEvent::Paid { cents }];
        Some(match self {
            Self::First(FirstEra::Placed(cents)) => vec![placed(*cents, "EUR")],
            Self::First(FirstEra::PlacedAndPaid(cents)) => both(*cents).into(),
            Self::First(FirstEra::Bundled(all)) => all.iter().flat_map(|it| both(*it)).collect(),
            Self::First(FirstEra::Canceled { by }) | Self::Second(SecondEra::Cancelled { by }) => {
                vec![OrderEvent::Cancelled { by: *by, reason: None }]
            }
            Self::First(FirstEra::Viewed) | Self::Second(SecondEra::Viewed { .. }) => vec![],
            Self::Second(SecondEra::Placed { cents, currency }) => vec![placed(*cents, currency)],
            Self::Second(SecondEra::Paid { cents }) => vec![OrderEvent::Paid { cents: *cents }],
            Self::Now(event) => vec![event.clone()],
            Self::Other(_) => return None,
        })
    }
}

fn rng(round: u64) -> Rng {
    let seed = std::env::var("HEADWATER_SEED").map_or(round, |seed| seed.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    Rng::with_seed(seed)
}

fn append(store: &Store, rng: &mut Rng, history: &[Written]) {
    let mut rest = history;
    while !rest.is_empty() {
        let (batch, left) = rest.split_at(rng.usize(1..=rest.len().min(7)));
        let orders = StreamId::new("orders").unwrap();
        let events = batch.iter().map(Written::to_event);
        store.append(&Append::to(&orders, ExpectedRevision::Any, events)).unwrap();
        rest = left;
    }
}

fn read(store: &Store) -> impl Iterator<Item = Recorded> {
    store.journal().read_all(Position::START).unwrap().map(Result::unwrap)
}

#[test]
fn histories_of_all_versions_are_read_as_what_they_are_today() {
    for round in 0..20 {
        let (mut rng, dir) = (rng(round), tempfile::tempdir().unwrap());
        let history: Vec<_> = (0..40).map(|_| Written::random(&mut rng)).collect();
        let store = Store::create(dir.path()).unwrap();
        append(&store, &mut rng, &history);
        for (recorded, written) in read(&store).zip(&history) {
            let decoded = recorded.decode::<OrderEvent>().unwrap();
            let expected = written.now();
            assert_eq!(decoded.is_foreign(), expected.is_none(), "{written:?}");
            let mut found = Vec::new();
            for event in decoded {
                // Whatever became of it, it stands where it was stored.
                assert_eq!(event.locator(), recorded.locator());
                assert_eq!(event.revision(), recorded.revision());
                assert_eq!(
                    (event.id(), event.event_type()),
                    (recorded.id(), recorded.event_type())
                );
                found.push(event.into_data());
            }
            assert_eq!(found, expected.unwrap_or_default(), "{written:?}");
        }
        assert_eq!(read(&store).count(), history.len());
        store.close().unwrap();
    }
}

#[cfg(feature = "views")]
mod view {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use headwater::view::{
        Fold, FoldError, Keys, OnPoison, RebuildOptions, View, ViewHandle, ViewOptions, ViewState,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// All events in their order, and those of each kind: rows that tell whether any is missing, there twice
    /// or in another place.
    struct Orders;

    fn keys_of(event: &OrderEvent) -> [String; 2] {
        ["all".to_owned(), event.kind().name.to_owned()]
    }

    impl View for Orders {
        const NAME: &'static str = "orders";
        const VERSION: u32 = 1;
        type Key = String;
        type Row = Vec<String>;
        type Event = OrderEvent;

        fn route(&self, event: &Recorded<OrderEvent>, keys: &mut Keys<String>) {
            keys.extend(keys_of(event.data()));
        }

        fn fold(
            &self,
            _key: &String,
            row: Option<Vec<String>>,
            event: &Recorded<OrderEvent>,
        ) -> Result<Fold<Vec<String>>, FoldError> {
            let mut row = row.unwrap_or_default();
            row.push(entry(event.position(), event.data()));
            Ok(Fold::Put(row))
        }
    }

    fn entry(position: Position, event: &OrderEvent) -> String {
        format!("{position} {event:?}")
    }

    fn expected(history: &[Written]) -> BTreeMap<String, Vec<String>> {
        let mut rows: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (position, written) in history.iter().enumerate() {
            for event in written.now().unwrap_or_default() {
                for key in keys_of(&event) {
                    let row = rows.entry(key).or_default();
                    row.push(entry(Position::new(position as u64), &event));
                }
            }
        }
        rows
    }

    #[track_caller]
    fn assert_holds(view: &ViewHandle<Orders>, end: Position, history: &[Written]) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while view.status().checkpoint.applied.position < end {
            assert!(!matches!(view.status().state, ViewState::Stopped(_)), "{:?}", view.status());
            assert!(std::time::Instant::now() < deadline, "the view never arrived");
            std::thread::yield_now();
        }
        let rows =
            view.snapshot().unwrap().range(..).map(Result::unwrap).collect::<BTreeMap<_, _>>();
        assert_eq!(rows, expected(history));
        let foreign = history.iter().filter(|written| written.now().is_none()).count() as u64;
        assert_eq!(view.status().skipped_events, foreign, "dropped ones are not skipped");
    }

    fn options(rng: &mut Rng) -> ViewOptions {
        ViewOptions { chunk_bytes: rng.u64(1..8192), ..ViewOptions::default() }
    }

    #[test]
    fn a_view_folds_histories_of_all_versions_as_what_they_are_today_live_and_built_anew() {
        for round in 0..12 {
            let (mut rng, dir) = (rng(round), tempfile::tempdir().unwrap());
            let history: Vec<_> = (0..80).map(|_| Written::random(&mut rng)).collect();
            let store = Store::create(dir.path()).unwrap();
            let view = store.view_with(Orders, options(&mut rng)).unwrap();
            append(&store, &mut rng, &history);
            let end = store.journal().end().position;
            assert_holds(&view, end, &history);
            view.close().unwrap();
            drop(view);
            std::fs::remove_dir_all(dir.path().join("views")).unwrap();
            let view = store.view_with(Orders, options(&mut rng)).unwrap();
            assert_holds(&view, end, &history);
            // In bulk, too; what it makes is compared with what is served before it takes over.
            view.rebuild(RebuildOptions::default()).unwrap().wait().unwrap();
            assert_holds(&view, end, &history);
            view.close().unwrap();
            store.close().unwrap();
        }
    }

    #[cfg(feature = "shipping")]
    #[test]
    fn a_view_of_a_mirror_folds_old_versions_as_well() {
        let (mut rng, dir) = (rng(1), tempfile::tempdir().unwrap());
        let history: Vec<_> = (0..80).map(|_| Written::random(&mut rng)).collect();
        let origin = Store::create(dir.path().join("orders")).unwrap();
        append(&origin, &mut rng, &history);
        let server = origin.serve("127.0.0.1:0").unwrap();
        let follower = Store::create(dir.path().join("follower")).unwrap();
        let mirror = follower.mirror("orders", server.local_addr().to_string()).unwrap();
        let view = follower.view_of(&mirror.wait_ready(PATIENCE).unwrap(), Orders).unwrap();
        assert_holds(&view, origin.journal().end().position, &history);
    }

    #[test]
    fn an_event_of_a_newer_version_stops_the_view_in_front_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path()).unwrap();
        let options = ViewOptions { on_undecodable: OnPoison::Stop, ..ViewOptions::default() };
        let view = store.view_with(Orders, options).unwrap();
        let history = [Written::First(FirstEra::PlacedAndPaid(7))];
        append(&store, &mut rng(1), &history);
        let newer = NewEvent::typed(&OrderEvent::Closed).unwrap().schema_version(5);
        let orders = StreamId::new("orders").unwrap();
        let token =
            store.append(&Append::to(&orders, ExpectedRevision::Any, [newer])).unwrap().token();
        let stopped = view.wait_for(&token, PATIENCE).unwrap_err().to_string();
        assert!(
            stopped.contains("\"order.closed\" are not known in schema version 5"),
            "{stopped}"
        );
        assert_holds(&view, Position::new(1), &history);
    }
}

fn decode<E: Event>(event: &RawEvent<'_>) -> Result<Decoded<E>, CodecError> {
    E::decode(event.kind(), event.payload())
}

fn bincode<T: Serialize>(name: &'static str, version: u32, value: &T) -> RawEvent<'static> {
    RawEvent::encode(name, version, PayloadCodec::Bincode, value).unwrap()
}

/// The derive stores what a struct of the fields is, so either form may be turned into the other.
#[test]
fn all_shapes_of_variants_are_stored_as_their_payloads_are() {
    let stored = |event: OrderEvent| {
        let (codec, bytes) = event.encode().unwrap();
        let kind = event.kind();
        let raw = RawEvent::new(
            EventKindRef { name: kind.name, schema_version: kind.schema_version },
            Payload { codec, bytes: &bytes },
        );
        assert_eq!(decode::<OrderEvent>(&raw).unwrap(), Decoded::One(event));
        (kind.name, kind.schema_version, codec, bytes)
    };
    let placed = Placed { cents: 1250, currency: "EUR".into(), items: 2 };
    let bytes = b"\xfb\xe2\x04\x03EUR\x02".to_vec();
    let bincode = PayloadCodec::Bincode;
    assert_eq!(stored(OrderEvent::Placed(placed)), ("order.placed", 3, bincode, bytes));
    assert_eq!(stored(OrderEvent::Paid { cents: 7 }), ("order.paid", 1, bincode, vec![7]));
    assert_eq!(stored(OrderEvent::Closed), ("order.closed", 4, bincode, vec![]));
    let json = br#"{"by":7,"reason":null}"#.to_vec();
    let cancelled = OrderEvent::Cancelled { by: 7, reason: None };
    assert_eq!(stored(cancelled), ("order.cancelled", 2, PayloadCodec::Json, json));
    let longer = bincode_closed(b"\0");
    assert!(matches!(decode::<OrderEvent>(&longer), Err(CodecError::TrailingBytes { left: 1 })));
}

fn bincode_closed(bytes: &'static [u8]) -> RawEvent<'static> {
    RawEvent { bytes: bytes.into(), ..bincode("order.closed", 4, &()) }
}

#[test]
fn all_kinds_are_listed_with_those_that_are_only_upcast() {
    let mut kinds: Vec<_> = OrderEvent::KINDS
        .iter()
        .map(|it| (it.kind.name, it.kind.schema_version, it.is_past))
        .collect();
    kinds.sort_unstable();
    let expected = [
        ("order.bundled", 1, true),
        ("order.canceled", 1, true),
        ("order.cancelled", 1, true),
        ("order.cancelled", 2, false),
        ("order.closed", 4, false),
        ("order.paid", 1, false),
        ("order.placed", 1, true),
        ("order.placed", 2, true),
        ("order.placed", 3, false),
        ("order.placed_and_paid", 1, true),
        ("order.viewed", 1, true),
        ("order.viewed", 2, true),
    ];
    assert_eq!(kinds, expected);
}

#[test]
fn the_macro_and_the_derive_store_the_same() {
    headwater::events! {
        enum Declared {
            Placed(Placed) = "order.placed", version 3;
        }
    }
    let placed = Placed { cents: 1, currency: "EUR".into(), items: 2 };
    let declared = Declared::from(placed.clone());
    assert_eq!(declared.encode().unwrap(), OrderEvent::Placed(placed).encode().unwrap());
    assert_eq!(Declared::KINDS, [KnownKind::present("order.placed", 3)]);
}

/// An event type whose upcasters are wrong, each in its own way.
#[derive(Debug)]
struct Wrong;

impl Event for Wrong {
    const KINDS: &'static [KnownKind] = &[KnownKind::past("circle", 1), KnownKind::past("lost", 1)];

    fn kind(&self) -> EventKind {
        EventKind { name: "wrong", schema_version: 1 }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        Ok((PayloadCodec::Raw, Vec::new()))
    }

    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError> {
        Ok(match kind.name {
            "circle" => Step::Upcast(|event| event.renamed("circle", 1)),
            "swarm" => Step::Upcast(|event| Ok(vec![event.clone(), event])),
            "lost" => Step::Upcast(|event| event.renamed("nowhere", 3)),
            "refused" => Step::Upcast(|_| Err("it makes no sense".into())),
            "broken" => Step::Upcast(|event| event.renamed("wrong", 1)),
            "wrong" => return Err(payload.decode::<u64>().unwrap_err()),
            _ => Step::Foreign,
        })
    }
}

#[test]
fn upcasters_that_fail_are_told_with_the_event_they_failed_at() {
    let error =
        |name: &'static str| decode::<Wrong>(&bincode(name, 1, &())).unwrap_err().to_string();
    // Many in breadth are no circle.
    let many = vec![7_u64; 3 * UPCAST_CHAIN_MAX];
    let many = RawEvent::encode("order.bundled", 1, PayloadCodec::Bincode, &many).unwrap();
    let events = decode::<OrderEvent>(&many).unwrap().into_iter();
    assert_eq!(events.len(), 6 * UPCAST_CHAIN_MAX);
    assert_eq!(error("circle"), "the upcasters of \"circle\", version 1, come to no end");
    assert_eq!(error("swarm"), "the upcasters of \"swarm\", version 1, come to no end");
    let lost = "an upcaster returned \"nowhere\", version 3, which its event type doesn't know";
    assert_eq!(error("lost"), lost);
    let refused = "the upcaster of \"refused\", version 1, failed: it makes no sense";
    assert_eq!(error("refused"), refused);
    let broken = "the upcaster of \"broken\", version 1, failed: the bytes don't match the type";
    assert!(error("broken").starts_with(broken), "{}", error("broken"));
}

#[test]
fn a_version_that_is_not_known_is_an_error_and_a_type_that_is_not_known_is_none() {
    let newer = decode::<OrderEvent>(&bincode("order.placed", 4, &1_u64));
    assert!(matches!(newer, Err(CodecError::SchemaVersion { name: "order.placed", version: 4 })));
    let never = decode::<OrderEvent>(&bincode("order.closed", 3, &()));
    assert!(matches!(never, Err(CodecError::SchemaVersion { name: "order.closed", version: 3 })));
    assert!(decode::<OrderEvent>(&bincode("order.unheard", 1, &())).unwrap().is_foreign());
}

// ------------------------------------------------------------------------------------------------ samples

fn values() -> Vec<OrderEvent> {
    vec![
        OrderEvent::Placed(Placed { cents: 1250, currency: "EUR".into(), items: 2 }),
        OrderEvent::Paid { cents: 1250 },
        OrderEvent::Cancelled { by: 17, reason: None },
        OrderEvent::Cancelled { by: 17, reason: Some("too late".into()) },
        OrderEvent::Closed,
    ]
}

/// A directory with all samples: those of each era were recorded when it was the present.
fn recorded() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let samples = dir.path().join("schema");
    let first = [
        FirstEra::Placed(1250),
        FirstEra::PlacedAndPaid(1250),
        FirstEra::Bundled(vec![1, 2]),
        FirstEra::Canceled { by: 17 },
        FirstEra::Viewed,
    ];
    let second = [
        SecondEra::Placed { cents: 1250, currency: "CHF".into() },
        SecondEra::Paid { cents: 1250 },
        SecondEra::Cancelled { by: 17 },
        SecondEra::Viewed { by: 17 },
    ];
    assert_eq!(schema::record(&samples, &first).unwrap().len(), 5);
    assert_eq!(schema::record(&samples, &second).unwrap().len(), 4);
    assert_eq!(schema::record(&samples, &values()).unwrap().len(), 5);
    (dir, samples)
}

#[track_caller]
fn findings<E: Event>(dir: &Path, samples: &[E]) -> Vec<(&'static str, String)> {
    let error = schema::check(dir, samples).unwrap_err();
    assert!(!error.hint().is_empty());
    let SchemaError::Findings(findings) = &error else { panic!("{error:?}") };
    let each = |it: &Finding| (it.code(), it.to_string());
    findings.iter().map(each).collect()
}

/// Exactly this one finding.
#[track_caller]
fn assert_finds<E: Event>(dir: &Path, samples: &[E], code: &str, what: &str) {
    let found = findings(dir, samples);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].0 == code && found[0].1.contains(what), "{found:?}");
}

#[test]
fn samples_of_all_times_are_recorded_once_and_proven() {
    let (_dir, samples) = recorded();
    let proof = schema::check(&samples, &values()).unwrap();
    assert_eq!((proof.samples, proof.kinds), (14, 12));
    assert_eq!(schema::record(&samples, &values()).unwrap(), [] as [PathBuf; 0], "nothing is new");
    let text = std::fs::read_to_string(samples.join("order.cancelled.2.json.2.hex")).unwrap();
    let expected = "headwater sample\ntype order.cancelled\nversion 2\ncodec json\n\n\
                    7b 22 62 79 22 3a 31 37 2c 22 72 65 61 73 6f 6e  |{\"by\":17,\"reason|\n\
                    22 3a 22 74 6f 6f 20 6c 61 74 65 22 7d           |\":\"too late\"}|\n";
    assert_eq!(text, expected);
}

/// Each is an event type of tomorrow in which something was changed, and nothing said.
mod tomorrow {
    use super::*;

    #[derive(Clone, Debug, PartialEq, Event)]
    pub(super) enum Event1 {
        #[event(name = "a", version = 1)]
        A { from: u32, to: u32 },
    }

    #[derive(Event)]
    pub(super) enum FieldsSwapped {
        #[event(name = "a", version = 1)]
        A { to: u32, from: u32 },
    }

    #[derive(Event)]
    pub(super) enum OtherInteger {
        #[event(name = "a", version = 1)]
        A { from: i32, to: u32 },
    }

    #[derive(Event)]
    pub(super) enum FieldAdded {
        #[event(name = "a", version = 1)]
        A { from: u32, to: u32, by: Option<u32> },
    }

    #[derive(Event)]
    pub(super) enum Renamed {
        #[event(name = "b", version = 1)]
        A { from: u32, to: u32 },
    }

    #[derive(Event)]
    pub(super) enum VersionForgotten {
        #[event(name = "a", version = 2, since = 2)]
        A { from: u32, to: u32 },
    }

    #[derive(Event)]
    pub(super) enum OtherCodec {
        #[event(name = "a", version = 1, codec = json)]
        A { from: u32, to: u32 },
    }

    fn wrong(event: RawEvent<'_>) -> Upcast<'_> {
        event.map(|text: String| (text, 0_u32))
    }

    #[derive(Event)]
    pub(super) enum WrongUpcaster {
        #[event(name = "a", version = 2, upcast(1 = wrong))]
        A(String),
    }

    #[derive(Event)]
    pub(super) enum Added {
        #[event(name = "a", version = 1)]
        A { from: u32, to: u32 },
        #[event(name = "b", version = 1, upcast("c", 1 = discard))]
        B,
    }

    /// Reads another field than it writes.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    pub(super) struct Uneven {
        pub(super) from: u32,
        #[serde(skip_deserializing)]
        pub(super) to: u32,
    }

    #[derive(Event)]
    pub(super) enum ReadsAnother {
        #[event(name = "a", version = 1, codec = json)]
        A(Uneven),
    }
}

#[test]
fn what_was_changed_without_a_word_is_found() {
    use tomorrow::{
        Added, Event1, FieldAdded, FieldsSwapped, OtherCodec, OtherInteger, ReadsAnother, Renamed,
        Uneven, VersionForgotten, WrongUpcaster,
    };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("schema");
    let (from, to) = (3, 4);
    schema::record(&dir, &[Event1::A { from, to }]).unwrap();
    schema::check(&dir, &[Event1::A { from, to }]).unwrap();

    let changed = "\"a\", version 1, is written in another way than it was";
    assert_finds(&dir, &[FieldsSwapped::A { from, to }], "schema.changed", changed);
    assert_finds(&dir, &[OtherInteger::A { from: 3, to }], "schema.changed", changed);
    assert_finds(&dir, &[Event1::A { from: 5, to }], "schema.changed", changed);
    let added = findings(&dir, &[FieldAdded::A { from, to, by: None }]);
    assert_eq!(added[0].0, "schema.undecodable", "{added:?}");

    let renamed = findings(&dir, &[Renamed::A { from, to }]);
    let codes = |found: &[(&'static str, String)]| found.iter().map(|it| it.0).collect::<Vec<_>>();
    assert_eq!(codes(&renamed), ["schema.vanished", "schema.not_recorded"], "{renamed:?}");
    let forgotten = findings(&dir, &[VersionForgotten::A { from, to }]);
    assert_eq!(codes(&forgotten), ["schema.vanished", "schema.not_recorded"], "{forgotten:?}");
    let wrong = findings(&dir, &[WrongUpcaster::A("x".into())]);
    assert_eq!(codes(&wrong), ["schema.undecodable", "schema.not_recorded"], "{wrong:?}");
    let of_json = "\"a\", version 1, as json, is not recorded yet";
    assert_finds(&dir, &[OtherCodec::A { from, to }], "schema.not_recorded", of_json);

    let some = findings(&dir, &[Added::A { from, to }]);
    assert_eq!(codes(&some), ["schema.no_value", "schema.no_old_sample"], "{some:?}");
    let all = findings(&dir, &[Added::A { from, to }, Added::B]);
    assert_eq!(codes(&all), ["schema.not_recorded", "schema.no_old_sample"], "{all:?}");
    schema::record(&dir, &[Added::B]).unwrap();
    schema::record_raw(&dir, &bincode("c", 1, &7_u8)).unwrap();
    schema::check(&dir, &[Added::A { from, to }, Added::B]).unwrap();

    // What is changed properly needs no finding: another codec, recorded beside the first one.
    let dir = dir.join("json");
    schema::record(&dir, &[Event1::A { from, to }]).unwrap();
    schema::record(&dir, &[OtherCodec::A { from, to }]).unwrap();
    schema::check(&dir, &[OtherCodec::A { from, to }]).unwrap();
    std::fs::remove_file(dir.join("a.1.bincode.1.hex")).unwrap();
    assert_finds(&dir, &[ReadsAnother::A(Uneven { from, to })], "schema.changed", changed);
}

#[test]
fn samples_are_never_overwritten_and_damaged_ones_are_told() {
    let (_dir, samples) = recorded();
    let other = [OrderEvent::Paid { cents: 1 }];
    let different = schema::record(&samples, &other).unwrap_err();
    assert!(matches!(different, SchemaError::Different { .. }), "{different:?}");
    assert_finds(&samples, &values()[1..], "schema.no_value", "\"order.placed\", version 3");

    let path = samples.join("order.paid.1.bincode.1.hex");
    let text = std::fs::read_to_string(&path).unwrap();
    for (damaged, what) in [
        (text.replace("version 1", "version one"), "no valid line `version`"),
        (text.replace("bincode", "xml"), "no valid line `codec`"),
        (text.replace("order.paid", "order.placed"), "not of the type, version and codec"),
        (text.replace("\n\n", "\n"), "no empty line"),
        (text.replace("fb e2", "fb +2"), "something else than bytes"),
        (String::new(), "first line"),
    ] {
        std::fs::write(&path, damaged).unwrap();
        let error = schema::check(&samples, &values()).unwrap_err();
        assert!(matches!(error, SchemaError::Unreadable { .. }), "{error:?}");
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.to_string().contains("order.paid.1.bincode.1.hex"), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert_finds(
        &samples,
        &values(),
        "schema.not_recorded",
        "\"order.paid\", version 1, as bincode",
    );
    let missing = schema::check(samples.join("nowhere"), &values()).unwrap_err();
    assert!(matches!(missing, SchemaError::Io(_)), "{missing:?}");
}

#[test]
fn kinds_of_a_journal_are_compared_with_the_samples() {
    let (dir, samples) = recorded();
    let store = Store::create(dir.path().join("store")).unwrap();
    let history = [
        Written::First(FirstEra::Placed(1)),
        Written::Second(SecondEra::Paid { cents: 1 }),
        Written::Other(OtherEvent::Counted(2)),
        Written::Now(OrderEvent::Paid { cents: 2 }),
        Written::Other(OtherEvent::Counted(1)),
    ];
    append(&store, &mut rng(1), &history);
    // In another codec it is another kind.
    let counted = RawEvent::encode("stock.counted", 9, PayloadCodec::Json, &1_u64).unwrap();
    schema::record_raw(&samples, &counted).unwrap();
    let samples = schema::samples(&samples).unwrap();
    let kinds = schema::stored_kinds(store.journal()).unwrap();
    let found: Vec<_> = kinds
        .iter()
        .map(|kind| {
            let recorded = kind.is_recorded(&samples);
            (
                kind.name.as_str(),
                kind.schema_version,
                kind.codec,
                kind.events,
                kind.first.get(),
                recorded,
            )
        })
        .collect();
    let (bincode, json) = (PayloadCodec::Bincode, PayloadCodec::Json);
    let expected = [
        ("order.paid", 1, bincode, 1, 3, true),
        ("order.paid", 1, json, 1, 1, true),
        ("order.placed", 1, bincode, 1, 0, true),
        ("stock.counted", 9, bincode, 2, 2, false),
    ];
    assert_eq!(found, expected);
}
