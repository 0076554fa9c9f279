//! Views that aren't pure folds: each in its own way, and each is found at its first event and row.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use headwater::Recorded;
use headwater::testing::{History, Impure, assert_pure, check_purity};
use headwater::view::{Fold, FoldError, Index, Indexes, KeyError, Keys, View, ViewKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::fails;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Happened {
    /// Harmless.
    Plain(u16),
    /// Where the trouble is.
    Trouble(u16),
}

headwater::events! { pub(super) enum AnyEvent { Happened(Happened) = "happened", version 1; } }

fn plain(key: u16) -> AnyEvent {
    Happened::Plain(key).into()
}

fn trouble(key: u16) -> AnyEvent {
    Happened::Trouble(key).into()
}

/// What a view does about trouble; the rest is harmless and the same for all.
trait Trouble: Send + Sync + 'static {
    type Row: Clone + Default + fmt::Debug + Serialize + DeserializeOwned + Send + Sync;

    fn fold(&self, row: Self::Row) -> Result<Fold<Self::Row>, FoldError>;

    fn route(&self, key: u16) -> u16 {
        key
    }

    fn entry(_: &Self::Row) -> u64 {
        1
    }
}

struct Troubled<T>(T, PhantomData<T>);

fn troubled<T: Trouble>(trouble: T) -> Troubled<T> {
    Troubled(trouble, PhantomData)
}

impl<T: Trouble> View for Troubled<T> {
    const NAME: &'static str = "troubled";
    const VERSION: u32 = 1;
    type Key = u16;
    type Row = T::Row;
    type Event = AnyEvent;

    fn route(&self, event: &Recorded<AnyEvent>, keys: &mut Keys<u16>) {
        match event.data() {
            AnyEvent::Happened(Happened::Plain(key)) => keys.add(*key),
            AnyEvent::Happened(Happened::Trouble(key)) => keys.add(self.0.route(*key)),
        }
    }

    fn fold(
        &self,
        _: &u16,
        row: Option<T::Row>,
        event: &Recorded<AnyEvent>,
    ) -> Result<Fold<T::Row>, FoldError> {
        let row = row.unwrap_or_default();
        match event.data() {
            AnyEvent::Happened(Happened::Plain(_)) => Ok(Fold::Put(row)),
            AnyEvent::Happened(Happened::Trouble(_)) => self.0.fold(row),
        }
    }

    fn indexes(&self) -> Indexes<Self> {
        Indexes::none()
            .with(Index::new("entry", |_, row, keys: &mut Keys<u64>| keys.add(T::entry(row))))
    }
}

fn history() -> History {
    History::new()
        .with("s-1", [plain(1), plain(2)])
        .with("s-2", [plain(3), trouble(2), trouble(1), plain(2), trouble(2)])
}

/// It is found at the first event that means trouble.
#[track_caller]
fn found<T: Trouble>(view: T, what: &str) -> Impure {
    let impure = *check_purity(&troubled(view), &history()).expect_err("it should have been found");
    let text = impure.to_string();
    assert_eq!(impure.position.get(), 3, "{text}");
    assert_eq!(impure.stream.as_str(), "s-2", "{text}");
    assert!(text.contains(what) && text.contains("position 3, happened in stream s-2"), "{text}");
    impure
}

macro_rules! trouble {
    ($name:ident, $row:ty, |$self:ident, $given:ident| $fold:expr) => {
        impl Trouble for $name {
            type Row = $row;

            fn fold(&$self, $given: $row) -> Result<Fold<$row>, FoldError> {
                $fold
            }
        }
    };
}

const FOLDED: &str = "folded into the same row again, it came to something else";

#[test]
fn a_clock_a_random_number_and_the_order_of_a_map_are_found() {
    struct Clock;
    trouble!(Clock, u128, |self, _row| {
        Ok(Fold::Put(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos()))
    });
    let impure = found(Clock, FOLDED);
    assert_eq!(impure.key.as_deref(), Some("2"));
    assert!(impure.difference.contains("- ") && impure.difference.contains("+ "), "{impure}");

    struct Random;
    trouble!(Random, u64, |self, _row| Ok(Fold::Put(fastrand::u64(..))));
    found(Random, FOLDED);

    struct Order;
    trouble!(Order, Vec<u8>, |self, _row| {
        let map: HashMap<u8, ()> = (0..2).map(|n| (n, ())).collect();
        Ok(Fold::Put(map.into_keys().collect()))
    });
    found(Order, FOLDED);
}

#[test]
fn a_clock_of_milliseconds_is_found_too() {
    thread_local! { static BEGAN: Instant = Instant::now(); }
    struct Coarse;
    trouble!(Coarse, u64, |self, _row| {
        Ok(Fold::Put(BEGAN.with(Instant::elapsed).as_millis() as u64))
    });
    let mut at = Vec::new();
    for _ in 0..20 {
        let impure = check_purity(&troubled(Coarse), &history()).expect_err("the clock has moved");
        at.push(impure.position.get());
    }
    assert!(at.iter().all(|at| [3, 4, 6].contains(at)), "{at:?}");
    assert!(BEGAN.with(Instant::elapsed) > Duration::ZERO);
}

#[test]
fn what_is_remembered_beside_the_row_is_found() {
    #[derive(Default)]
    struct Counter(AtomicU64);
    trouble!(Counter, u64, |self, _row| Ok(Fold::Put(self.0.fetch_add(1, Ordering::SeqCst))));
    found(Counter::default(), FOLDED);

    // Differs only from time to time.
    #[derive(Default)]
    struct Seldom(AtomicU64);
    trouble!(Seldom, u64, |self, _row| {
        Ok(Fold::Put(u64::from(self.0.fetch_add(1, Ordering::SeqCst) == 30)))
    });
    let impure = *check_purity(&troubled(Seldom::default()), &history()).unwrap_err();
    assert!([3, 4, 6].contains(&impure.position.get()), "{impure}");

    // Depends on which row was folded before: the same each time for one order of rows.
    thread_local! { static LAST: RefCell<u64> = const { RefCell::new(0) }; }
    struct Last;
    impl Trouble for Last {
        type Row = u64;

        fn route(&self, key: u16) -> u16 {
            LAST.set(u64::from(key));
            key
        }

        fn fold(&self, row: u64) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(row + LAST.with_borrow(|last| *last)))
        }
    }
    let impure = *check_purity(&troubled(Last), &history()).unwrap_err();
    assert!(impure.what.starts_with("folded in chunks of 7 events"), "{impure}");
    assert_eq!((impure.position.get(), impure.key.as_deref()), (4, Some("1")), "{impure}");
}

#[test]
fn a_fold_that_fails_from_time_to_time_is_found() {
    #[derive(Default)]
    struct Sometimes(AtomicU64);
    trouble!(Sometimes, u64, |self, row| {
        if self.0.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            return Err("not now".into());
        }
        Ok(Fold::Put(row + 1))
    });
    found(Sometimes::default(), "not now");
    // One that fails each time is pure: the event is parked, each time.
    struct Always;
    trouble!(Always, u64, |self, _row| Err("never".into()));
    assert_pure(&troubled(Always), &history());
}

#[test]
fn a_row_that_loses_something_when_it_is_stored_is_found() {
    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    struct Skips {
        count: u64,
        #[serde(skip)]
        seen: u64,
    }
    struct Skipping;
    trouble!(Skipping, Skips, |self, row| {
        Ok(Fold::Put(Skips { count: row.count + row.seen, seen: row.seen + 1 }))
    });
    let impure = found(Skipping, "the row was stored and read back, and is another");
    assert!(
        impure.difference.contains("seen: 1") && impure.difference.contains("seen: 0"),
        "{impure}"
    );

    // Even if nobody can see it: rows in the middle of a chunk aren't stored.
    #[derive(Clone, Default, Serialize, Deserialize)]
    struct Hidden(u64, #[serde(skip)] u64);
    impl fmt::Debug for Hidden {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Hidden({})", self.0)
        }
    }
    struct Hiding;
    trouble!(Hiding, Hidden, |self, row| Ok(Fold::Put(Hidden(row.0 + row.1, row.1 + 1))));
    let impure = *check_purity(&troubled(Hiding), &history()).unwrap_err();
    assert!(impure.what.starts_with("folded in chunks of 7 events"), "{impure}");
    assert_eq!((impure.position.get(), impure.key.as_deref()), (6, Some("2")), "{impure}");

    #[derive(Clone, Debug, Default, Serialize, Deserialize)]
    struct Mapped(HashMap<u8, u8>);
    struct Mapping;
    trouble!(Mapping, Mapped, |self, _row| Ok(Fold::Put(Mapped((0..9).map(|n| (n, n)).collect()))));
    found(Mapping, "");
}

#[test]
fn routes_and_index_keys_that_differ_are_found() {
    #[derive(Default)]
    struct Route(AtomicU64);
    impl Trouble for Route {
        type Row = u64;

        fn fold(&self, row: u64) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(row))
        }

        fn route(&self, _: u16) -> u16 {
            self.0.fetch_add(1, Ordering::SeqCst) as u16
        }
    }
    assert_eq!(found(Route::default(), "routed again, it went to other rows").key, None);

    static ENTRIES: AtomicU64 = AtomicU64::new(0);
    struct Entry;
    impl Trouble for Entry {
        type Row = u64;

        fn fold(&self, _: u64) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(9))
        }

        fn entry(row: &u64) -> u64 {
            if *row == 9 { ENTRIES.fetch_add(1, Ordering::SeqCst) } else { 1 }
        }
    }
    found(Entry, "the keys in its indexes were made again, and are others");
}

#[test]
fn a_key_that_is_another_when_it_is_read_back_is_found() {
    #[derive(Clone, Debug)]
    struct Half(u16);
    impl ViewKey for Half {
        fn encode_key(&self, out: &mut Vec<u8>) {
            (self.0 / 2).encode_key(out);
        }

        fn decode_key(input: &mut &[u8]) -> Result<Self, KeyError> {
            Ok(Self(u16::decode_key(input)? * 2))
        }
    }
    struct ByHalf;
    impl View for ByHalf {
        const NAME: &'static str = "by_half";
        const VERSION: u32 = 1;
        type Key = Half;
        type Row = u64;
        type Event = AnyEvent;

        fn route(&self, event: &Recorded<AnyEvent>, keys: &mut Keys<Half>) {
            let AnyEvent::Happened(Happened::Plain(key) | Happened::Trouble(key)) = event.data();
            keys.add(Half(*key));
        }

        fn fold(
            &self,
            _: &Half,
            row: Option<u64>,
            _: &Recorded<AnyEvent>,
        ) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(row.unwrap_or(0) + 1))
        }
    }
    let even = History::new().with("s-1", [plain(2), plain(4)]);
    assert_pure(&ByHalf, &even);
    fails(
        || assert_pure(&ByHalf, &even.with("s-1", [plain(5)])),
        &["position 2", "key", "Half(5)", "Half(4)"],
    );
}

#[test]
fn pure_views_are_found_pure_whatever_the_history() {
    struct Count;
    trouble!(Count, u64, |self, row| Ok(match row {
        5 => Fold::Delete,
        3 => return Err("three".into()),
        _ => Fold::Put(row + 1),
    }));
    assert_pure(&troubled(Count), &History::new());
    for seed in 0..50 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let events = (0..rng.usize(1..200)).map(|_| trouble(rng.u16(0..30))).collect::<Vec<_>>();
        assert_pure(&troubled(Count), &History::new().with("s-1", events));
    }
}
