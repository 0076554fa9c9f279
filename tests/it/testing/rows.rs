//! Given events, then rows: the kit's answers, and that they are those of a real view.

use std::collections::BTreeMap;
use std::time::Duration;

use headwater::testing::{History, stored, view};
use headwater::upcast::{RawEvent, Step, Upcast};
use headwater::view::{
    Fold, FoldError, Index, Indexes, Keys, OnPoison, ParkedKey, View, ViewOptions,
};
use headwater::{
    Append, Event, EventKind, EventKindRef, ExpectedRevision, KnownKind, NewEvent, Payload,
    PayloadCodec, Recorded, Store, StreamId, codec::CodecError,
};
use serde::{Deserialize, Serialize};

use super::fails;

/// What happens to accounts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Moved {
    /// Cents from one account to another.
    Cents {
        from: u16,
        to: u16,
        cents: u32,
    },
    Closed(u16),
    /// Changes nothing.
    Looked(u16),
    /// Panics in the fold.
    Broken(u16),
    /// Panics in the route.
    Lost,
}

/// By hand: with an upcaster of one event to two, without the feature `derive`.
impl Event for Moved {
    const KINDS: &'static [KnownKind] =
        &[KnownKind::present("moved", 2), KnownKind::past("moved", 1)];

    fn kind(&self) -> EventKind {
        EventKind { name: "moved", schema_version: 2 }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        use headwater::codec::{Bincode, Codec};
        Ok((PayloadCodec::Bincode, Bincode::encode(self)?))
    }

    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError> {
        match (kind.name, kind.schema_version) {
            ("moved", 2) => payload.decode().map(Step::Value),
            ("moved", 1) => Ok(Step::Upcast(both_ways)),
            _ => Ok(Step::Foreign),
        }
    }
}

/// Version 1 was a deposit of cents into two accounts.
fn both_ways(event: RawEvent<'_>) -> Upcast<'_> {
    let (a, b, cents): (u16, u16, u32) = event.decode()?;
    Ok(vec![
        event.becomes("moved", 2, &Moved::Cents { from: 0, to: a, cents })?,
        event.becomes("moved", 2, &Moved::Cents { from: 0, to: b, cents })?,
    ])
}

/// What an account holds, and how often it was moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Account {
    pub(super) cents: i64,
    pub(super) moves: u32,
}

pub(super) struct Accounts;

/// Accounts by their tens of cents, and by whether they owe.
pub(super) const BY_TENS: Index<Accounts, i64> =
    Index::new("by_tens", |_, row: &Account, keys| keys.add(row.cents / 10));
pub(super) const OWING: Index<Accounts, (bool, u16)> =
    Index::new("owing", |key, row: &Account, keys| {
        if row.cents < 0 {
            keys.add((true, *key));
        }
    });

impl View for Accounts {
    const NAME: &'static str = "accounts";
    const VERSION: u32 = 1;
    type Key = u16;
    type Row = Account;
    type Event = Moved;

    fn route(&self, event: &Recorded<Moved>, keys: &mut Keys<u16>) {
        match event.data() {
            Moved::Cents { from, to, .. } => keys.extend([*from, *to]),
            Moved::Closed(account) | Moved::Looked(account) | Moved::Broken(account) => {
                keys.add(*account);
            }
            Moved::Lost => panic!("nobody knows where"),
        }
    }

    fn fold(
        &self,
        key: &u16,
        row: Option<Account>,
        event: &Recorded<Moved>,
    ) -> Result<Fold<Account>, FoldError> {
        let Account { cents, moves } = row.unwrap_or(Account { cents: 0, moves: 0 });
        let by = match event.data() {
            Moved::Cents { from, to, cents: by } => {
                i64::from(*by) * (i64::from(to == key) - i64::from(from == key))
            }
            Moved::Closed(_) => return Ok(Fold::Delete),
            Moved::Looked(_) => return Ok(Fold::Keep),
            Moved::Broken(account) if account.is_multiple_of(2) => panic!("broken in two"),
            Moved::Broken(_) => return Err("broken".into()),
            Moved::Lost => return Err("routed nowhere".into()),
        };
        Ok(Fold::Put(Account { cents: cents + by, moves: moves + 1 }))
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none().with(BY_TENS).with(OWING)
    }
}

fn moved(from: u16, to: u16, cents: u32) -> Moved {
    Moved::Cents { from, to, cents }
}

fn row(cents: i64, moves: u32) -> Account {
    Account { cents, moves }
}

#[test]
fn rows_are_what_the_events_make_of_them() {
    let test = view(Accounts)
        .given("bank", [moved(1, 2, 30), moved(2, 3, 10)])
        .then_rows([(1, row(-30, 1)), (2, row(20, 2)), (3, row(10, 1))])
        .then_row(&2, row(20, 2))
        .then_no_row(&4)
        .then_by_index(BY_TENS, &2, [(2, row(20, 2))])
        .then_by_index(BY_TENS, &7, [])
        .then_by_index(OWING, &(true, 1), [(1, row(-30, 1))])
        .then_pure()
        .given("bank", [Moved::Closed(2), Moved::Looked(3), Moved::Looked(9)])
        .then_no_row(&2)
        .then_by_index(BY_TENS, &2, [])
        .then_rows([(1, row(-30, 1)), (3, row(10, 1))])
        .then_nothing_parked()
        .then_pure();
    assert_eq!(test.get(&3), Some(row(10, 1)));
    assert_eq!(test.rows().len(), 2);
}

#[test]
fn older_forms_are_upcast_and_other_types_are_skipped() {
    headwater::events! { pub(super) enum Foreign { Other(u8) = "other", version 1; } }
    view(Accounts)
        .given_new("bank", [stored("moved", 1, &(4_u16, 4_u16, 5_u32))])
        .given("elsewhere", [Foreign::Other(1)])
        .then_rows([(0, row(-10, 2)), (4, row(10, 2))])
        .then_pure();
}

#[test]
fn what_cannot_be_folded_is_parked_with_all_that_follows() {
    let test = view(Accounts)
        .given("bank", [moved(1, 2, 30), Moved::Broken(2), moved(1, 2, 5), Moved::Broken(3)])
        .then_parked(&2, "panic: broken in two")
        .then_parked(&3, "the fold failed: broken")
        .then_row(&1, row(-35, 2))
        .then_pure();
    assert_eq!(test.get(&2), Some(row(30, 1)));
    fails(|| test.then_row(&2, row(30, 1)), &["position 1", "2 of the row are parked", "broken"]);

    let lost = || view(Accounts).given("bank", [Moved::Lost, moved(1, 2, 30)]);
    let undecodable = [stored("moved", 2, &99_u8)];
    lost().then_undecodable("nobody knows where").then_pure();
    view(Accounts).given_new("bank", undecodable).then_undecodable("can't be decoded").then_pure();
    fails(|| lost().then_row(&1, row(-30, 1)), &["position 0", "any row may lack it"]);
    fails(|| lost().then_no_row(&7), &["any row may lack it"]);
    fails(|| lost().then_undecodable("of another reason"), &["nobody knows where"]);
}

#[test]
fn whatever_differs_from_what_was_expected_is_told() {
    let test = || view(Accounts).given("bank", [moved(1, 2, 30)]);
    fails(
        || test().then_row(&2, row(31, 1)),
        &["view accounts, row 2", "-         cents: 31", "+         cents: 30"],
    );
    fails(|| test().then_row(&3, row(31, 1)), &["row 3", "+ None"]);
    fails(|| test().then_no_row(&2), &["no row 2 was expected", "cents: 30"]);
    fails(|| test().then_rows([(2, row(30, 1))]), &["its rows are other ones", "+"]);
    fails(|| test().then_rows([(1, row(-30, 1)), (3, row(30, 1))]), &["-         3,"]);
    fails(|| test().then_by_index(BY_TENS, &3, []), &["found by index by_tens", "cents: 30"]);
    fails(|| test().then_parked(&2, "broken"), &["row 2", "nothing of it is parked"]);
    fails(|| test().then_undecodable(""), &["an event was expected"]);
    const OTHER: Index<Accounts, u8> = Index::new("other", |_, _, keys| keys.add(1));
    fails(|| test().then_by_index(OTHER, &1, []), &["keeps no index \"other\""]);
}

#[test]
fn a_view_that_could_not_be_opened_is_refused() {
    struct Misnamed;
    impl View for Misnamed {
        const NAME: &'static str = "Not A Folder";
        const VERSION: u32 = 1;
        type Key = ();
        type Row = ();
        type Event = Vec<u8>;

        fn route(&self, _: &Recorded<Vec<u8>>, _: &mut Keys<()>) {}

        fn fold(
            &self,
            (): &(),
            _: Option<()>,
            _: &Recorded<Vec<u8>>,
        ) -> Result<Fold<()>, FoldError> {
            Ok(Fold::Keep)
        }
    }
    fails(|| view(Misnamed), &["Not A Folder"]);
}

/// Random histories, with everything that can happen in them.
fn history(seed: u64) -> Vec<NewEvent> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let account = |rng: &mut fastrand::Rng| rng.u16(0..8);
    let events = rng.usize(1..120);
    (0..events)
        .map(|_| match rng.u8(0..20) {
            0 => stored("moved", 1, &(account(&mut rng), account(&mut rng), rng.u32(0..50))),
            1 => stored("other", 1, &7_u8),
            2 => NewEvent::typed(&Moved::Closed(account(&mut rng))).unwrap(),
            3 => NewEvent::typed(&Moved::Looked(account(&mut rng))).unwrap(),
            4 if seed.is_multiple_of(2) => {
                NewEvent::typed(&Moved::Broken(account(&mut rng))).unwrap()
            }
            5 if seed.is_multiple_of(3) => NewEvent::typed(&Moved::Lost).unwrap(),
            6 if seed.is_multiple_of(5) => stored("moved", 2, &99_u8),
            _ => {
                let it = moved(account(&mut rng), account(&mut rng), rng.u32(0..50));
                NewEvent::typed(&it).unwrap()
            }
        })
        .collect()
}

#[test]
fn the_rows_in_memory_are_those_of_a_real_view_with_all_that_is_parked() {
    let patience = Duration::from_secs(60);
    let (mut all_parked, mut all_unrouted) = (0, 0);
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path().join("bank")).unwrap();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut events = history(seed).into_iter().peekable();
        let mut given = History::new();
        while events.peek().is_some() {
            let batch = events.by_ref().take(rng.usize(1..9)).collect::<Vec<_>>();
            let name = format!("s-{}", rng.u8(0..3));
            given = given.with_new(&name, batch.clone());
            let stream = StreamId::new(&name).unwrap();
            store.append(&Append::to(&stream, ExpectedRevision::Any, batch)).unwrap();
        }
        let options = ViewOptions {
            chunk_bytes: rng.u64(1..2000),
            on_poison: OnPoison::Park,
            ..ViewOptions::default()
        };
        let real = store.view_with(Accounts, options).unwrap();
        real.wait_for(&store.journal().end().token(), patience).unwrap();

        for history in [given, History::of(store.journal()).unwrap()] {
            let test = view(Accounts).given_history(history);
            let rows: Vec<_> = real.range(..).collect::<Result<_, _>>().unwrap();
            assert_eq!(test.rows(), rows, "seed {seed}");
            let by_tens = real.by_index(BY_TENS).unwrap();
            let mut found: BTreeMap<i64, Vec<_>> = BTreeMap::new();
            for it in by_tens.range(..) {
                let (tens, key, row) = it.unwrap();
                found.entry(tens).or_default().push((key, row));
            }
            let mut test = test;
            for tens in -200..200 {
                let rows = found.remove(&tens).unwrap_or_default();
                test = test.then_by_index(BY_TENS, &tens, rows);
            }
            let parked: Vec<_> = real.parked().map(Result::unwrap).collect();
            let whole = |it: &ParkedKey<u16>| (it.key, it.first, it.events, it.reason.clone());
            let parked: Vec<_> = parked.iter().map(whole).collect();
            assert_eq!(test.parked().iter().map(whole).collect::<Vec<_>>(), parked, "seed {seed}");
            let unrouted: Vec<_> = real.unrouted_events().map(|it| it.unwrap().position).collect();
            let came: Vec<_> = test.undecodable().iter().map(|(position, _)| *position).collect();
            assert_eq!(came, unrouted, "seed {seed}");
            all_parked += parked.len();
            all_unrouted += unrouted.len();
            test.then_pure();
        }
    }
    assert!(all_parked > 10 && all_unrouted > 5, "{all_parked}, {all_unrouted}");
}
