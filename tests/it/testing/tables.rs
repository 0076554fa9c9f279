//! Given events, then rows of tables: the kit's answers, that they are those of a real view, and that views of tables which
//! aren't pure are found.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use headwater::testing::{
    History, Impure, assert_pure_tables, check_purity_of_tables, stored, table_view,
};
use headwater::view::{FoldError, OnPoison, Table, TableView, Tables, ViewOptions, ViewTxn};
use headwater::{Append, ExpectedRevision, NewEvent, Recorded, Store, StreamId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::fails;
use super::rows::Moved;

/// What each account holds, who holds how much, and how often each was looked at.
struct Bank;

const CENTS: Table<u16, i64> = Table::new("cents");
/// (cents, account).
const BY_CENTS: Table<(i64, u16), ()> = Table::new("by_cents");
/// What those hold who have most, whenever somebody looked.
const RICHEST: Table<u64, Vec<(u16, i64)>> = Table::new("richest");
const UNDECLARED: Table<u8, u8> = Table::new("undeclared");

impl Bank {
    fn add(tx: &mut ViewTxn<'_>, account: u16, by: i64) -> Result<(), FoldError> {
        let before = tx.get(CENTS, &account)?;
        if let Some(before) = before {
            tx.delete(BY_CENTS, &(before, account))?;
        }
        let cents = before.unwrap_or(0) + by;
        tx.put(CENTS, &account, &cents)?;
        tx.put(BY_CENTS, &(cents, account), &())?;
        Ok(())
    }
}

impl TableView for Bank {
    const NAME: &'static str = "bank";
    const VERSION: u32 = 1;
    type Event = Moved;

    fn tables(&self) -> Tables {
        Tables::of(RICHEST).with(CENTS).with(BY_CENTS)
    }

    fn apply(&self, event: &Recorded<Moved>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        match event.data() {
            Moved::Cents { from, to, cents } => {
                Self::add(tx, *from, -i64::from(*cents))?;
                Self::add(tx, *to, i64::from(*cents))?;
            }
            Moved::Closed(account) => {
                if let Some(cents) = tx.get(CENTS, account)? {
                    tx.delete(BY_CENTS, &(cents, *account))?;
                    tx.delete(CENTS, account)?;
                }
            }
            Moved::Looked(_) => {
                let rich = tx.range(BY_CENTS, (1, 0)..)?.collect::<Result<Vec<_>, _>>()?;
                let rich = rich.into_iter().map(|((cents, account), ())| (account, cents));
                tx.put(RICHEST, &event.position().get(), &rich.collect())?;
            }
            Moved::Broken(account) => {
                tx.put(CENTS, account, &0)?; // nothing of it is kept
                match account.is_multiple_of(2) {
                    true => panic!("broken in two"),
                    false => return Err("broken".into()),
                }
            }
            Moved::Lost => drop(tx.get(UNDECLARED, &1)),
        }
        Ok(())
    }
}

fn moved(from: u16, to: u16, cents: u32) -> Moved {
    Moved::Cents { from, to, cents }
}

#[test]
fn tables_are_what_the_events_make_one_after_the_other() {
    let test = table_view(Bank)
        .given("bank", [moved(1, 2, 30), moved(2, 3, 10), Moved::Looked(1)])
        .then_rows(CENTS, [(1, -30), (2, 20), (3, 10)])
        .then_rows(BY_CENTS, [((-30, 1), ()), ((10, 3), ()), ((20, 2), ())])
        .then_row(RICHEST, &2, vec![(3, 10), (2, 20)])
        .then_no_row(CENTS, &4)
        .then_pure()
        .given("bank", [Moved::Closed(2)])
        .then_no_row(CENTS, &2)
        .then_rows(BY_CENTS, [((-30, 1), ()), ((10, 3), ())])
        .then_nothing_parked()
        .then_pure();
    assert_eq!(test.get(CENTS, &3), Some(10));
    assert_eq!(test.rows(RICHEST).len(), 1);

    headwater::events! { enum Foreign { Other(u8) = "other", version 1; } }
    table_view(Bank)
        .given_new("bank", [stored("moved", 1, &(4_u16, 4_u16, 5_u32))])
        .given("elsewhere", [Foreign::Other(1)])
        .then_rows(CENTS, [(0, -10), (4, 10)])
        .then_pure();
}

#[test]
fn an_event_that_can_not_be_applied_leaves_nothing_and_is_parked() {
    for (account, reason) in [(2, "panic: broken in two"), (3, "the fold failed: broken")] {
        let test = table_view(Bank)
            .given("bank", [moved(1, 2, 30), Moved::Broken(account), moved(1, 2, 5)])
            .then_parked(reason)
            .then_pure();
        assert_eq!(test.rows(CENTS), [(1, -35), (2, 35)]);
        assert_eq!(test.parked().len(), 1);
        fails(|| test.then_row(CENTS, &2, 35), &["position 1", "any row may lack it", reason]);
    }
    table_view(Bank)
        .given_new("bank", [stored("moved", 2, &99_u8)])
        .then_parked("can't be decoded")
        .then_pure();
    let lost = table_view(Bank).given("bank", [moved(1, 2, 30), Moved::Lost, moved(1, 2, 30)]);
    fails(|| lost.get(CENTS, &1), &["view bank", "would stop at position 1", "undeclared"]);
}

#[test]
fn whatever_differs_from_what_was_expected_in_a_table_is_told() {
    let test = || table_view(Bank).given("bank", [moved(1, 2, 30)]);
    fails(
        || test().then_row(CENTS, &2, 31),
        &["view bank, table cents, row 2", "-     31", "+     30"],
    );
    fails(|| test().then_row(CENTS, &3, 31), &["row 3", "+ None"]);
    fails(|| test().then_no_row(CENTS, &2), &["table cents: no row 2 was expected", "30"]);
    fails(|| test().then_rows(CENTS, [(2, 30)]), &["the rows of table cents are other ones"]);
    fails(|| test().then_rows(CENTS, [(1, -30), (3, 30)]), &["-         3,"]);
    fails(|| test().then_parked("broken"), &["because of \"broken\"", "[]"]);
    fails(|| test().get(UNDECLARED, &1), &["undeclared"]);

    struct Twice;
    impl TableView for Twice {
        const NAME: &'static str = "twice";
        const VERSION: u32 = 1;
        type Event = Moved;
        fn tables(&self) -> Tables {
            Tables::of(CENTS).with(CENTS)
        }
        fn apply(&self, _: &Recorded<Moved>, _: &mut ViewTxn<'_>) -> Result<(), FoldError> {
            Ok(())
        }
    }
    fails(|| table_view(Twice), &["cents"]);
}

/// Random histories, with everything that can happen in them but what stops the view.
fn history(seed: u64) -> Vec<NewEvent> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let account = |rng: &mut fastrand::Rng| rng.u16(0..8);
    let typed = |event: Moved| NewEvent::typed(&event).unwrap();
    (0..rng.usize(1..120))
        .map(|_| match rng.u8(0..20) {
            0 => stored("moved", 1, &(account(&mut rng), account(&mut rng), rng.u32(0..50))),
            1 => stored("other", 1, &7_u8),
            2 | 3 => typed(Moved::Closed(account(&mut rng))),
            4..=6 => typed(Moved::Looked(account(&mut rng))),
            7 if seed.is_multiple_of(2) => typed(Moved::Broken(account(&mut rng))),
            8 if seed.is_multiple_of(3) => stored("moved", 2, &99_u8),
            _ => typed(moved(account(&mut rng), account(&mut rng), rng.u32(0..50))),
        })
        .collect()
}

#[test]
fn the_tables_in_memory_are_those_of_a_real_view_with_all_that_is_parked() {
    let patience = Duration::from_secs(60);
    let (mut all_rows, mut all_parked) = (0, 0);
    for seed in 0..8 {
        println!("seed {seed}");
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
        let real = store.table_view_with(Bank, options).unwrap();
        real.wait_for(&store.journal().end().token(), patience).unwrap();
        for history in [given, History::of(store.journal()).unwrap()] {
            let test = table_view(Bank).given_history(history);
            let mut same = 0;
            macro_rules! same {
                ($table:expr) => {{
                    let rows = real.table($table).unwrap().range(..);
                    let rows = rows.collect::<Result<Vec<_>, _>>().unwrap();
                    assert_eq!(test.rows($table), rows, "seed {seed}");
                    same += rows.len();
                }};
            }
            same!(CENTS);
            same!(BY_CENTS);
            same!(RICHEST);
            let parked = real.unrouted_events().map(Result::unwrap);
            let parked: Vec<_> = parked.map(|it| (it.position, it.reason)).collect();
            assert_eq!(test.parked(), parked, "seed {seed}");
            (all_rows, all_parked) = (all_rows + same, all_parked + parked.len());
            test.then_pure();
        }
    }
    assert!(all_rows > 100 && all_parked > 10, "{all_rows}, {all_parked}");
}

/// What a view does about a `Looked`, beside what is harmless: what it writes under the account's number.
trait Trouble: Send + Sync + 'static {
    type Row: Serialize + DeserializeOwned + 'static;

    fn row(&self, before: Option<Self::Row>) -> Result<Self::Row, FoldError>;

    fn seen(&self, _: &Recorded<Moved>) {}
}

struct Troubled<T>(T);

impl<T: Trouble> Troubled<T> {
    const TROUBLE: Table<u16, T::Row> = Table::new("trouble");
}

impl<T: Trouble> TableView for Troubled<T> {
    const NAME: &'static str = "troubled";
    const VERSION: u32 = 1;
    type Event = Moved;

    fn tables(&self) -> Tables {
        Tables::of(CENTS).with(Self::TROUBLE)
    }

    fn apply(&self, event: &Recorded<Moved>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
        self.0.seen(event);
        match event.data() {
            Moved::Looked(account) => {
                let row = self.0.row(tx.get(Self::TROUBLE, account)?)?;
                tx.put(Self::TROUBLE, account, &row)?;
            }
            Moved::Cents { to, cents, .. } => {
                let before = tx.get(CENTS, to)?.unwrap_or(0);
                tx.put(CENTS, to, &(before + i64::from(*cents)))?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn troubled_history() -> History {
    History::new()
        .with("s-1", [moved(1, 2, 30), moved(1, 3, 5), moved(2, 2, 5)])
        .with("s-2", [Moved::Looked(7), moved(1, 2, 30), Moved::Looked(7), Moved::Looked(8)])
}

/// It is found at the first event that means trouble.
#[track_caller]
fn found<T: Trouble>(trouble: T, what: &str) -> Impure {
    let impure = *check_purity_of_tables(&Troubled(trouble), &troubled_history())
        .expect_err("it should have been found");
    let text = impure.to_string();
    assert_eq!((impure.view, impure.position.get()), ("troubled", 3), "{text}");
    assert!(text.contains(what) && text.contains("position 3, moved in stream s-2"), "{text}");
    impure
}

macro_rules! trouble {
    ($name:ident, $row:ty, |$self:ident, $before:ident| $made:expr) => {
        impl Trouble for $name {
            type Row = $row;

            fn row(&$self, $before: Option<$row>) -> Result<$row, FoldError> {
                $made
            }
        }
    };
}

const APPLIED: &str = "applied to the same tables again, it came to something else";

#[test]
fn tables_that_depend_on_clocks_random_numbers_or_the_order_of_maps_are_found() {
    struct Clock;
    trouble!(Clock, u128, |self, _before| {
        Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())
    });
    let impure = found(Clock, APPLIED);
    assert_eq!((impure.table, impure.key.as_deref()), (Some("trouble"), Some("7")), "{impure}");
    assert!(impure.difference.contains("- ") && impure.difference.contains("+ "), "{impure}");
    assert!(impure.to_string().contains("row:   7 of table trouble"), "{impure}");
    fails(
        || assert_pure_tables(&Troubled(Clock), &troubled_history()),
        &["view troubled is not a pure fold", "position 3"],
    );

    struct Random;
    trouble!(Random, u64, |self, _before| Ok(fastrand::u64(..)));
    found(Random, APPLIED);

    struct Map;
    trouble!(Map, HashMap<u8, u8>, |self, _before| Ok((0..9).map(|n| (n, n)).collect()));
    found(Map, APPLIED);
}

#[test]
fn tables_that_depend_on_what_is_remembered_beside_them_are_found() {
    #[derive(Default)]
    struct Counter(AtomicU64);
    trouble!(Counter, u64, |self, _before| Ok(self.0.fetch_add(1, Ordering::SeqCst)));
    found(Counter::default(), APPLIED);

    #[derive(Default)]
    struct Sometimes(AtomicU64);
    trouble!(Sometimes, u64, |self, before| {
        match self.0.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            true => Err("not now".into()),
            false => Ok(before.unwrap_or(0) + 1),
        }
    });
    let impure = found(Sometimes::default(), "not now");
    assert_eq!((impure.table, impure.key), (None, None));

    // The position of the last event that it saw, the first time: the same however often the event is applied, and another
    // one behind a crash or in a rebuild, when it has seen later ones.
    #[derive(Default)]
    struct Latest(AtomicU64);
    impl Trouble for Latest {
        type Row = u64;

        fn row(&self, _: Option<u64>) -> Result<u64, FoldError> {
            Ok(self.0.load(Ordering::SeqCst))
        }

        fn seen(&self, event: &Recorded<Moved>) {
            self.0.fetch_max(event.position().get(), Ordering::SeqCst);
        }
    }
    let impure = found(Latest::default(), "applied in chunks of 7 events");
    assert!(impure.difference.contains("-  3") || impure.difference.contains("- 3"), "{impure}");

    // Whether it was ever set back into the middle of the journal: nothing but a crash does that.
    #[derive(Default)]
    struct SetBack {
        last: AtomicU64,
        times: AtomicU64,
    }
    impl Trouble for SetBack {
        type Row = u64;

        fn row(&self, _: Option<u64>) -> Result<u64, FoldError> {
            Ok(self.times.load(Ordering::SeqCst))
        }

        fn seen(&self, event: &Recorded<Moved>) {
            let position = event.position().get();
            let last = self.last.swap(position, Ordering::SeqCst);
            self.times.fetch_add(u64::from(position > 0 && position < last), Ordering::SeqCst);
        }
    }
    let looks = History::new().with("s-1", (0..100).map(Moved::Looked));
    let impure = *check_purity_of_tables(&Troubled(SetBack::default()), &looks)
        .expect_err("it should have been found");
    assert!(impure.what.starts_with("applied with crashes"), "{impure}");

    // Differs only once, in one of the later runs.
    #[derive(Default)]
    struct Seldom(AtomicU64);
    trouble!(Seldom, u64, |self, _before| {
        Ok(u64::from(self.0.fetch_add(1, Ordering::SeqCst) == 40))
    });
    let impure = *check_purity_of_tables(&Troubled(Seldom::default()), &troubled_history())
        .expect_err("it should have been found");
    assert!([3, 5, 6].contains(&impure.position.get()), "{impure}");
}

thread_local! { static DECODED: Cell<u64> = const { Cell::new(0) }; }

/// Counts how many were decoded.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Counting(u64);

impl<'de> Deserialize<'de> for Counting {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u64::deserialize(deserializer)?;
        DECODED.set(number);
        Ok(Self(number))
    }
}

headwater::events! { enum Counted { Counting(Counting) = "counted", version 1; } }

#[test]
fn a_view_that_sees_which_events_were_decoded_ahead_is_found() {
    const AHEAD: Table<u64, u64> = Table::new("ahead");
    struct Ahead;
    impl TableView for Ahead {
        const NAME: &'static str = "ahead";
        const VERSION: u32 = 1;
        type Event = Counted;
        fn tables(&self) -> Tables {
            Tables::of(AHEAD)
        }
        fn apply(&self, event: &Recorded<Counted>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
            let Counted::Counting(Counting(number)) = event.data();
            Ok(tx.put(AHEAD, number, &DECODED.get())?)
        }
    }
    let events = (0..5).map(|number| Counted::from(Counting(number)));
    let history = History::new().with("s-1", events);
    let impure = *check_purity_of_tables(&Ahead, &history).expect_err("it depends on the chunks");
    assert!(impure.what.starts_with("applied in chunks of 5 events"), "{impure}");
    assert_eq!((impure.position.get(), impure.table), (0, Some("ahead")), "{impure}");
}

#[test]
fn a_row_of_a_table_that_can_not_be_read_back_is_found() {
    #[derive(Serialize, Deserialize)]
    struct Skipping {
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<u8>,
    }
    struct Unreadable;
    trouble!(Unreadable, Skipping, |self, _before| Ok(Skipping { name: None }));
    let impure = found(Unreadable, "the row was stored and read back, and is another");
    assert_eq!((impure.table, impure.key.as_deref()), (Some("trouble"), Some("7")), "{impure}");
}

#[test]
fn pure_views_of_tables_are_found_pure_whatever_the_history() {
    struct Always;
    trouble!(Always, u64, |self, before| match before {
        Some(3) => Err("three".into()),
        before => Ok(before.unwrap_or(0) + 1),
    });
    assert_pure_tables(&Troubled(Always), &History::new());
    for seed in 0..30 {
        let given = History::new().with_new("s-1", history(seed));
        assert_pure_tables(&Troubled(Always), &given);
        assert_pure_tables(&Bank, &given);
    }
}
