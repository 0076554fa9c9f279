//! Given events, then rows.

use std::fmt::{self, Debug};

use super::diff::diff;
use super::history::History;
use super::purity::assert_pure;
use crate::event::{Event, NewEvent};
use crate::position::Position;
use crate::view::memory::{Kept, MemoryRows, ParkedSlot, row_of};
use crate::view::{EncodeKey, Index, ParkedKey, View, ViewKey};

/// A view over events that are still to be given, for a test of its rows.
///
/// No database, no disk and no thread: what is given is encoded as a journal stores it, decoded (through upcasters, if it
/// is of an older form), routed and folded as the real view does it, rows and keys are kept as the bytes that would be
/// stored, and what fails is parked.
///
/// ```
/// use headwater::testing;
/// use headwater::view::{Fold, FoldError, Index, Indexes, Keys, View};
/// # use headwater::Recorded;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Placed { pub customer: u32, pub total_cents: u64 }
/// # headwater::events! { pub enum OrderEvent { Placed(Placed) = "order.placed", version 1; } }
/// # struct Spent;
/// # const BY_AMOUNT: Index<Spent, u64> = Index::new("by_amount", |_, spent, keys| keys.add(*spent));
/// # impl View for Spent {
/// #     const NAME: &'static str = "spent";
/// #     const VERSION: u32 = 1;
/// #     type Key = u32;
/// #     type Row = u64;
/// #     type Event = OrderEvent;
/// #     fn route(&self, event: &Recorded<OrderEvent>, keys: &mut Keys<u32>) {
/// #         let OrderEvent::Placed(placed) = event.data();
/// #         keys.add(placed.customer);
/// #     }
/// #     fn fold(&self, _: &u32, spent: Option<u64>, event: &Recorded<OrderEvent>) -> Result<Fold<u64>, FoldError> {
/// #         let OrderEvent::Placed(placed) = event.data();
/// #         let sum = spent.unwrap_or(0).checked_add(placed.total_cents);
/// #         Ok(Fold::Put(sum.ok_or("more cents than a u64 holds")?))
/// #     }
/// #     fn indexes(&self) -> Indexes<Self> { Indexes::none().with(BY_AMOUNT) }
/// # }
/// // `Spent` is the view of the example at `View`, with an index.
/// let placed = |customer, total_cents| OrderEvent::from(Placed { customer, total_cents });
/// testing::view(Spent)
///     .given("order-1", [placed(17, 1000)])
///     .given("order-2", [placed(17, 250), placed(4, 99)])
///     .then_row(&17, 1250)
///     .then_no_row(&18)
///     .then_rows([(4, 99), (17, 1250)])
///     .then_by_index(BY_AMOUNT, &1250, [(17, 1250)])
///     .then_pure()
///     .given("order-3", [placed(17, u64::MAX)])
///     .then_parked(&17, "more cents than a u64 holds")
///     .then_row(&4, 99);
/// ```
///
/// # Panics
/// If the view's name or its indexes are such that it couldn't be opened.
#[track_caller]
#[must_use]
pub fn view<V: View>(view: V) -> ViewTest<V> {
    let rows = MemoryRows::new(&view).unwrap_or_else(|error| panic!("{error}"));
    ViewTest { view, history: History::new(), rows }
}

/// A view and the events it was given; from [`view`].
pub struct ViewTest<V: View> {
    view: V,
    history: History,
    rows: MemoryRows<V>,
}

impl<V: View> Debug for ViewTest<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ViewTest");
        shown.field("view", &V::NAME).field("events", &self.history.events().len());
        shown.finish_non_exhaustive()
    }
}

/// What is given.
impl<V: View> ViewTest<V> {
    /// These events of a stream have happened. They may be of another type than the view's, as in a journal.
    ///
    /// # Panics
    /// If the stream's name isn't valid, or an event can't be encoded.
    #[must_use = "nothing is tested without `then_…`"]
    #[track_caller]
    pub fn given<E: Event>(self, stream: &str, events: impl IntoIterator<Item = E>) -> Self {
        self.more(|history| history.with(stream, events))
    }

    /// These events of a stream have happened: with tags and metadata, or in an older form
    /// ([`stored`](super::stored)).
    ///
    /// # Panics
    /// If the stream's name or an event isn't valid.
    #[must_use = "nothing is tested without `then_…`"]
    #[track_caller]
    pub fn given_new(self, stream: &str, events: impl IntoIterator<Item = NewEvent>) -> Self {
        self.more(|history| history.with_new(stream, events))
    }

    /// All this has happened: such as what a store's journal holds ([`History::of`]). In place of what was given before.
    #[must_use = "nothing is tested without `then_…`"]
    pub fn given_history(mut self, history: History) -> Self {
        self.rows.kept = Kept::default();
        self.history = History::new();
        self.more(|_| history)
    }

    /// Later events are recorded from this time on, in microseconds since 1970.
    #[must_use = "nothing is tested without `then_…`"]
    pub fn at_us(mut self, time_us: i64) -> Self {
        self.history = self.history.at_us(time_us);
        self
    }

    fn more(mut self, add: impl FnOnce(History) -> History) -> Self {
        let before = self.history.events().len();
        self.history = add(self.history);
        for event in self.history.events().get(before..).unwrap_or_default() {
            self.rows.apply(&self.view, std::slice::from_ref(event), |_| true);
        }
        self
    }
}

/// What there must be.
impl<V: View> ViewTest<V>
where
    V::Key: Debug,
    V::Row: PartialEq + Debug,
{
    /// This row is there, and lacks nothing.
    ///
    /// # Panics
    /// If there is none, or another, or events are parked that belong into it or might.
    #[track_caller]
    pub fn then_row<Q: EncodeKey<V::Key> + ?Sized>(self, key: &Q, row: V::Row) -> Self {
        self.whole(key);
        let came = self.get(key);
        assert!(
            came.as_ref() == Some(&row),
            "view {}, row {}: another row than expected (- expected, + came):\n{}",
            V::NAME,
            shown_key::<V::Key, Q>(key),
            diff(&Some(&row), &came.as_ref())
        );
        self
    }

    /// There is no row under this key, and nothing that was to become one.
    ///
    /// # Panics
    /// If there is one, or events are parked that belong into it or might.
    #[track_caller]
    pub fn then_no_row<Q: EncodeKey<V::Key> + ?Sized>(self, key: &Q) -> Self {
        self.whole(key);
        if let Some(row) = self.get(key) {
            let key = shown_key::<V::Key, Q>(key);
            panic!("view {}: no row {key} was expected, but there is {row:#?}", V::NAME);
        }
        self
    }

    /// Exactly these rows are there, in the order of their keys, and lack nothing.
    ///
    /// # Panics
    /// If there are others, or anything is parked.
    #[track_caller]
    pub fn then_rows(self, expected: impl IntoIterator<Item = (V::Key, V::Row)>) -> Self {
        let this = self.then_nothing_parked();
        let expected: Vec<_> = expected.into_iter().collect();
        same_rows(V::NAME, "its rows", &expected, &this.rows());
        this
    }

    /// Exactly these rows have `key` in an index; in the order of their own keys.
    ///
    /// # Panics
    /// If others have, or the view doesn't keep the index.
    #[track_caller]
    pub fn then_by_index<K: ViewKey + 'static, Q: EncodeKey<K> + ?Sized>(
        self,
        index: Index<V, K>,
        key: &Q,
        expected: impl IntoIterator<Item = (V::Key, V::Row)>,
    ) -> Self {
        self.not_stopped();
        let came = self.rows.by_index(index, key).unwrap_or_else(|error| panic!("{error}"));
        let expected: Vec<_> = expected.into_iter().collect();
        same_rows(V::NAME, &format!("rows found by index {}", index.name()), &expected, &came);
        self
    }

    /// An event could not be folded into this row: it is parked, with all later ones of the row, for a reason that
    /// contains `reason`. The row is what the events in front of it have made ([`get`](Self::get)).
    ///
    /// # Panics
    /// If nothing of the row is parked, or for another reason.
    #[track_caller]
    pub fn then_parked<Q: EncodeKey<V::Key> + ?Sized>(self, key: &Q, reason: &str) -> Self {
        self.not_stopped();
        let parked = self.rows.slot(key).and_then(|slot| slot.parked.as_ref());
        let came = parked.map(|parked| parked.reason.as_str());
        assert!(
            came.is_some_and(|came| came.contains(reason)),
            "view {}, row {}: expected to be parked because of {reason:?}, but {}",
            V::NAME,
            shown_key::<V::Key, Q>(key),
            came.map_or("nothing of it is parked".to_owned(), |came| format!(
                "it is, because: {came}"
            )),
        );
        self
    }

    /// An event could not be decoded or routed, for a reason that contains `reason`: it is parked, and any row may lack
    /// it.
    ///
    /// # Panics
    /// If there is none such.
    #[track_caller]
    pub fn then_undecodable(self, reason: &str) -> Self {
        let unrouted = self.undecodable();
        assert!(
            unrouted.iter().any(|(_, came)| came.contains(reason)),
            "view {}: an event was expected that can't be decoded or routed because of {reason:?}, but there are: \
             {unrouted:#?}",
            V::NAME
        );
        self
    }

    /// Every event was folded into every row that it concerns.
    ///
    /// # Panics
    /// If anything is parked.
    #[track_caller]
    pub fn then_nothing_parked(self) -> Self {
        self.all_routed();
        if let Some(ParkedKey { key, events, first, reason, .. }) = self.parked().first() {
            panic_parked::<V>(&format!("{key:?}"), (*first, *events, reason));
        }
        self
    }

    /// The view is a pure fold, as far as what was given shows; see [`assert_pure`].
    ///
    /// # Panics
    /// If it isn't: says at which event and row it shows.
    #[track_caller]
    pub fn then_pure(self) -> Self {
        assert_pure(&self.view, &self.history);
        self
    }

    /// The row under `key`, whether or not it lacks anything.
    ///
    /// # Panics
    /// If it can't be read back.
    #[track_caller]
    pub fn get<Q: EncodeKey<V::Key> + ?Sized>(&self, key: &Q) -> Option<V::Row> {
        self.not_stopped();
        let row = self.rows.slot(key)?.row.as_deref()?;
        Some(row_of::<V>(row).unwrap_or_else(|error| panic!("{error}")))
    }

    /// All rows, in the order of their keys, whether or not they lack anything.
    ///
    /// # Panics
    /// If one can't be read back.
    #[track_caller]
    pub fn rows(&self) -> Vec<(V::Key, V::Row)> {
        self.not_stopped();
        self.rows.rows().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The rows of which something is parked, as [`ViewHandle::parked`](crate::view::ViewHandle::parked) tells them.
    ///
    /// # Panics
    /// If a key can't be read back.
    #[track_caller]
    pub fn parked(&self) -> Vec<ParkedKey<V::Key>> {
        self.rows.parked().unwrap_or_else(|error| panic!("{error}"))
    }

    /// The events that can't be decoded or routed, and why.
    #[must_use]
    pub fn undecodable(&self) -> &[(Position, String)] {
        &self.rows.kept.unrouted
    }

    #[track_caller]
    fn whole<Q: EncodeKey<V::Key> + ?Sized>(&self, key: &Q) {
        self.all_routed();
        if let Some(parked) = self.rows.slot(key).and_then(|slot| slot.parked.as_ref()) {
            let ParkedSlot { first, events, reason, .. } = parked;
            panic_parked::<V>(&shown_key::<V::Key, Q>(key), (*first, *events, reason));
        }
    }

    #[track_caller]
    fn all_routed(&self) {
        self.not_stopped();
        if let Some((position, reason)) = self.rows.kept.unrouted.first() {
            panic!(
                "view {}: the event at position {position} can't be decoded or routed, so any row may lack it: \
                 {reason}",
                V::NAME
            );
        }
    }

    #[track_caller]
    fn not_stopped(&self) {
        if let Some((position, reason)) = &self.rows.kept.stopped {
            panic!("view {}: it would stop at position {position}: {reason}", V::NAME);
        }
    }
}

#[track_caller]
fn panic_parked<V: View>(key: &str, (first, events, reason): (Position, u64, &str)) {
    panic!(
        "view {}, row {key}: the event at position {first} could not be folded, and {events} of the row are parked: \
         {reason}",
        V::NAME
    );
}

#[track_caller]
pub(super) fn same_rows<K: ViewKey + Debug, R: PartialEq + Debug>(
    view: &str,
    what: &str,
    expected: &[(K, R)],
    came: &[(K, R)],
) {
    // Keys need not be comparable; their bytes are.
    let bytes = |key: &K| {
        let mut out = Vec::new();
        key.encode_key(&mut out);
        out
    };
    let same = |a: &(K, R), b: &(K, R)| bytes(&a.0) == bytes(&b.0) && a.1 == b.1;
    let all = expected.len() == came.len() && expected.iter().zip(came).all(|(a, b)| same(a, b));
    assert!(
        all,
        "view {view}: {what} are other ones than expected (- expected, + came):\n{}",
        diff(&expected, &came)
    );
}

/// A key as people read it.
pub(super) fn shown_key<K: ViewKey + Debug, Q: EncodeKey<K> + ?Sized>(key: &Q) -> String {
    let mut bytes = Vec::new();
    key.encode_key_into(&mut bytes);
    match K::decode_key(&mut bytes.as_slice()) {
        Ok(key) => format!("{key:?}"),
        Err(error) => format!("{bytes:02x?} ({error})"),
    }
}
