//! Given events, then rows of tables.

use std::fmt::{self, Debug};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::diff::diff;
use super::history::History;
use super::table_purity::assert_pure_tables;
use super::view::{same_rows, shown_key};
use crate::event::{Event, NewEvent};
use crate::position::Position;
use crate::view::memory_tables::{KeptTables, MemoryTables};
use crate::view::{EncodeKey, Table, TableView, ViewKey};

/// A view of several tables over events that are still to be given, for a test of its rows. For a keyed view there is
/// [`view`](super::view()).
///
/// No database, no disk and no thread: what is given is encoded as a journal stores it, decoded (through upcasters, if it
/// is of an older form) and applied as the real view does it, rows and keys are kept as the bytes that would be stored, and
/// an event that fails leaves nothing and is parked, alone.
///
/// ```
/// use headwater::testing;
/// use headwater::view::{FoldError, Table, TableView, Tables, ViewTxn};
/// # use headwater::Recorded;
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Named { pub customer: u32, pub name: String }
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Placed { pub order: u32, pub customer: u32 }
/// # headwater::events! {
/// #     pub enum ShopEvent {
/// #         Named(Named) = "customer.named", version 1;
/// #         Placed(Placed) = "order.placed", version 1;
/// #     }
/// # }
/// # struct Orders;
/// const NAMES: Table<u32, String> = Table::new("names");
/// const ORDERS: Table<u32, String> = Table::new("orders");
/// const OF_CUSTOMER: Table<(u32, u32), ()> = Table::new("of_customer");
/// # impl TableView for Orders {
/// #     const NAME: &'static str = "orders";
/// #     const VERSION: u32 = 1;
/// #     type Event = ShopEvent;
/// #     fn tables(&self) -> Tables { Tables::of(NAMES).with(ORDERS).with(OF_CUSTOMER) }
/// #     fn apply(&self, event: &Recorded<ShopEvent>, tx: &mut ViewTxn<'_>) -> Result<(), FoldError> {
/// #         match event.data() {
/// #             ShopEvent::Named(Named { customer, name }) => {
/// #                 tx.put(NAMES, customer, name)?;
/// #                 let orders = tx.prefix(OF_CUSTOMER, customer)?.collect::<Result<Vec<_>, _>>()?;
/// #                 for ((_, order), ()) in orders {
/// #                     tx.put(ORDERS, &order, name)?;
/// #                 }
/// #             }
/// #             ShopEvent::Placed(Placed { order, customer }) => {
/// #                 let name = tx.get(NAMES, customer)?.ok_or("nobody knows the customer")?;
/// #                 tx.put(ORDERS, order, &name)?;
/// #                 tx.put(OF_CUSTOMER, &(*customer, *order), &())?;
/// #             }
/// #         }
/// #         Ok(())
/// #     }
/// # }
///
/// // `Orders` is the view of the example at `TableView`; here it wants to know the customer.
/// let named = |customer, name: &str| ShopEvent::from(Named { customer, name: name.into() });
/// let placed = |order, customer| ShopEvent::from(Placed { order, customer });
/// testing::table_view(Orders)
///     .given("customer-1", [named(1, "Ada")])
///     .given("orders", [placed(7, 1), placed(8, 1)])
///     .given("customer-1", [named(1, "Ada L.")])
///     .then_row(ORDERS, &7, "Ada L.".into())
///     .then_no_row(ORDERS, &9)
///     .then_rows(OF_CUSTOMER, [((1, 7), ()), ((1, 8), ())])
///     .then_pure()
///     .given("orders", [placed(9, 2)])
///     .then_parked("nobody knows the customer");
/// ```
///
/// # Panics
/// If the view's name or its tables are such that it couldn't be opened.
#[track_caller]
#[must_use]
pub fn table_view<T: TableView>(view: T) -> TableViewTest<T> {
    let tables = MemoryTables::new(&view).unwrap_or_else(|error| panic!("{error}"));
    TableViewTest { view, history: History::new(), tables }
}

/// A view of tables and the events it was given; from [`table_view`].
pub struct TableViewTest<T: TableView> {
    view: T,
    history: History,
    tables: MemoryTables,
}

impl<T: TableView> Debug for TableViewTest<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("TableViewTest");
        shown.field("view", &T::NAME).field("events", &self.history.events().len());
        shown.finish_non_exhaustive()
    }
}

/// What is given.
impl<T: TableView> TableViewTest<T> {
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
        self.tables.kept = KeptTables::default();
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
            self.tables.apply(&self.view, event);
        }
        self
    }
}

/// What there must be.
impl<T: TableView> TableViewTest<T> {
    /// This row is in the table, and nothing is parked that it might lack.
    ///
    /// # Panics
    /// If there is none, or another, or an event is parked: any row may lack it.
    #[track_caller]
    pub fn then_row<K, R, Q>(self, table: Table<K, R>, key: &Q, row: R) -> Self
    where
        K: ViewKey + Debug + 'static,
        R: Serialize + DeserializeOwned + PartialEq + Debug + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let this = self.then_nothing_parked();
        let came = this.get(table, key);
        assert!(
            came.as_ref() == Some(&row),
            "view {}, table {}, row {}: another row than expected (- expected, + came):\n{}",
            T::NAME,
            table.name(),
            shown_key::<K, Q>(key),
            diff(&Some(&row), &came.as_ref())
        );
        this
    }

    /// There is no row under this key in the table, and nothing is parked that might have become one.
    ///
    /// # Panics
    /// If there is one, or an event is parked.
    #[track_caller]
    pub fn then_no_row<K, R, Q>(self, table: Table<K, R>, key: &Q) -> Self
    where
        K: ViewKey + Debug + 'static,
        R: DeserializeOwned + Debug + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        let this = self.then_nothing_parked();
        if let Some(row) = this.get(table, key) {
            let key = shown_key::<K, Q>(key);
            panic!(
                "view {}, table {}: no row {key} was expected, but there is {row:#?}",
                T::NAME,
                table.name()
            );
        }
        this
    }

    /// Exactly these rows are in the table, in the order of their keys, and nothing is parked.
    ///
    /// # Panics
    /// If there are others, or an event is parked.
    #[track_caller]
    pub fn then_rows<K, R>(
        self,
        table: Table<K, R>,
        expected: impl IntoIterator<Item = (K, R)>,
    ) -> Self
    where
        K: ViewKey + Debug + 'static,
        R: DeserializeOwned + PartialEq + Debug + 'static,
    {
        let this = self.then_nothing_parked();
        let expected: Vec<_> = expected.into_iter().collect();
        let what = format!("the rows of table {}", table.name());
        same_rows(T::NAME, &what, &expected, &this.rows(table));
        this
    }

    /// An event could not be decoded or applied, for a reason that contains `reason`: it is parked, and has written nothing.
    /// The tables are what the others have made ([`get`](Self::get), [`rows`](Self::rows)).
    ///
    /// # Panics
    /// If there is none such.
    #[track_caller]
    pub fn then_parked(self, reason: &str) -> Self {
        self.not_stopped();
        let parked = self.parked();
        assert!(
            parked.iter().any(|(_, came)| came.contains(reason)),
            "view {}: expected an event to be parked because of {reason:?}, but there are: {parked:#?}",
            T::NAME
        );
        self
    }

    /// Every event was applied.
    ///
    /// # Panics
    /// If one is parked.
    #[track_caller]
    pub fn then_nothing_parked(self) -> Self {
        self.not_stopped();
        if let Some((position, reason)) = self.parked().first() {
            panic!(
                "view {}: the event at position {position} can't be decoded or applied, so any row may lack it: \
                 {reason}",
                T::NAME
            );
        }
        self
    }

    /// The view is a pure fold, as far as what was given shows; see [`assert_pure_tables`].
    ///
    /// # Panics
    /// If it isn't: says at which event and row it shows.
    #[track_caller]
    pub fn then_pure(self) -> Self {
        assert_pure_tables(&self.view, &self.history);
        self
    }

    /// The row under `key`, whether or not anything is parked.
    ///
    /// # Panics
    /// If it can't be read back, or the view doesn't declare the table.
    #[track_caller]
    pub fn get<K, R, Q>(&self, table: Table<K, R>, key: &Q) -> Option<R>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
        Q: EncodeKey<K> + ?Sized,
    {
        self.not_stopped();
        self.tables.get::<T, K, R, Q>(table, key).unwrap_or_else(|error| panic!("{error}"))
    }

    /// All rows of a table, in the order of their keys, whether or not anything is parked.
    ///
    /// # Panics
    /// If one can't be read back, or the view doesn't declare the table.
    #[track_caller]
    pub fn rows<K, R>(&self, table: Table<K, R>) -> Vec<(K, R)>
    where
        K: ViewKey + 'static,
        R: DeserializeOwned + 'static,
    {
        self.not_stopped();
        self.tables.rows::<T, K, R>(table).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The events that can't be decoded or applied, and why; as
    /// [`ViewControl::unrouted_events`](crate::view::ViewControl::unrouted_events) tells them.
    #[must_use]
    pub fn parked(&self) -> &[(Position, String)] {
        &self.tables.kept.parked
    }

    #[track_caller]
    fn not_stopped(&self) {
        if let Some((position, reason)) = &self.tables.kept.stopped {
            panic!("view {}: it would stop at position {position}: {reason}", T::NAME);
        }
    }
}
