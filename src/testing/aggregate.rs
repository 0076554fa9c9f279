//! Given events, when a command comes, then events or an error.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::diff::diff;
use super::history::History;
use crate::codec::{Bincode, Codec, CodecError};
use crate::command::Aggregate;
use crate::event::{Event, NewEvent, PayloadCodec, Recorded, StreamId};
use crate::upcast::Decoded;

/// An aggregate to which nothing has happened yet, for a test of what it decides.
///
/// No disk and no thread: what is given is encoded as a journal stores it, decoded (through upcasters, if it is of an
/// older form) and applied as [`execute`](crate::Store::execute) does. On the way it is looked at what a real store
/// would trip over later; each is a failure of the test:
/// - `apply` and `decide` come to the same when they are called again;
/// - what is decided is the same event after it was stored and read back;
/// - with [`with_snapshots`](AggregateTest::with_snapshots): a state that was stored in a snapshot decides as any other.
///
/// ```
/// use headwater::command::Aggregate;
/// use headwater::{Recorded, testing};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Deposited { pub cents: u64 }
/// # #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
/// # pub struct Withdrawn { pub cents: u64 }
/// # headwater::events! {
/// #     pub enum AccountEvent {
/// #         Deposited(Deposited) = "account.deposited", version 1;
/// #         Withdrawn(Withdrawn) = "account.withdrawn", version 1;
/// #     }
/// # }
/// # #[derive(Clone, Default, Serialize, Deserialize)]
/// # struct Account { balance_cents: u64 }
/// # enum Command { Deposit(u64), Withdraw(u64) }
/// # #[derive(Debug, PartialEq, thiserror::Error)]
/// # #[error("only {balance_cents} cents are there")]
/// # struct NotEnough { balance_cents: u64 }
/// # impl Aggregate for Account {
/// #     const NAME: &'static str = "account";
/// #     type Event = AccountEvent;
/// #     type Command = Command;
/// #     type Error = NotEnough;
/// #     fn apply(&mut self, event: &Recorded<AccountEvent>) {
/// #         match event.data() {
/// #             AccountEvent::Deposited(Deposited { cents }) => self.balance_cents += cents,
/// #             AccountEvent::Withdrawn(Withdrawn { cents }) => self.balance_cents -= cents,
/// #         }
/// #     }
/// #     fn decide(&self, command: &Command) -> Result<Vec<AccountEvent>, NotEnough> {
/// #         match command {
/// #             Command::Deposit(0) => Ok(vec![]),
/// #             Command::Deposit(cents) => Ok(vec![Deposited { cents: *cents }.into()]),
/// #             Command::Withdraw(cents) if *cents > self.balance_cents => {
/// #                 Err(NotEnough { balance_cents: self.balance_cents })
/// #             }
/// #             Command::Withdraw(cents) => Ok(vec![Withdrawn { cents: *cents }.into()]),
/// #         }
/// #     }
/// # }
/// // `Account` is the aggregate of the example at `Aggregate`.
/// testing::aggregate::<Account>()
///     .with_snapshots()
///     .given([Deposited { cents: 500 }.into()])
///     .when(&Command::Withdraw(200))
///     .then([Withdrawn { cents: 200 }.into()]) // and it has happened now
///     .when(&Command::Withdraw(400))
///     .then_error(NotEnough { balance_cents: 300 })
///     .when(&Command::Deposit(0))
///     .then_nothing();
/// ```
#[must_use]
pub fn aggregate<A: Aggregate>() -> AggregateTest<A> {
    AggregateTest { stream: "stream-1".to_owned(), history: History::new(), round_trip: None }
}

/// What has happened to an aggregate; from [`aggregate`].
#[derive(Clone, Debug)]
pub struct AggregateTest<A> {
    stream: String,
    history: History,
    /// A state as it comes out of a snapshot.
    round_trip: Option<fn(&A) -> Result<A, CodecError>>,
}

/// What an aggregate has decided on a command; from [`AggregateTest::when`].
#[derive(Debug)]
#[must_use = "nothing is tested without `then`"]
pub struct Decision<A: Aggregate> {
    test: AggregateTest<A>,
    outcome: Result<Vec<A::Event>, A::Error>,
}

impl<A: Aggregate> AggregateTest<A> {
    /// Sets the stream's name. Default `stream-1`.
    #[must_use = "nothing is tested without `when` and `then`"]
    pub fn stream(mut self, stream: &str) -> Self {
        stream.clone_into(&mut self.stream);
        self
    }

    /// These events have happened, stored as the aggregate would [record](Aggregate::record) them.
    ///
    /// # Panics
    /// If one can't be encoded.
    #[must_use = "nothing is tested without `when` and `then`"]
    #[track_caller]
    pub fn given(self, events: impl IntoIterator<Item = A::Event>) -> Self {
        let events: Vec<NewEvent> = events.into_iter().map(|event| recorded::<A>(&event)).collect();
        self.given_new(events)
    }

    /// These events have happened, in the form in which they were stored then; see [`stored`](super::stored).
    ///
    /// # Panics
    /// If one isn't valid.
    #[must_use = "nothing is tested without `when` and `then`"]
    #[track_caller]
    pub fn given_new(mut self, events: impl IntoIterator<Item = NewEvent>) -> Self {
        self.history = self.history.with_new(&self.stream, events);
        self
    }

    /// Later events are recorded from this time on, in microseconds since 1970.
    #[must_use = "nothing is tested without `when` and `then`"]
    pub fn at_us(mut self, time_us: i64) -> Self {
        self.history = self.history.at_us(time_us);
        self
    }

    /// Looks also at what [snapshots](crate::command::Commands::snapshot_every) do: whether the state decides the same
    /// if it was stored and read back behind any of its events.
    #[must_use = "nothing is tested without `when` and `then`"]
    pub fn with_snapshots(mut self) -> Self
    where
        A: Serialize + DeserializeOwned,
    {
        self.round_trip = Some(|state| Bincode::decode(&Bincode::encode(state)?));
        self
    }

    /// The state that the events have led to.
    ///
    /// # Panics
    /// If an event can't be decoded, or is of a type that the aggregate doesn't know
    /// ([`PASSES_UNKNOWN_EVENTS`](Aggregate::PASSES_UNKNOWN_EVENTS)): its commands would fail.
    #[track_caller]
    #[must_use]
    pub fn state(&self) -> A {
        self.state_with_snapshot_behind(None)
    }

    /// A command comes.
    ///
    /// # Panics
    /// If the aggregate can't be loaded, or decides otherwise when it is asked again.
    #[track_caller]
    pub fn when(self, command: &A::Command) -> Decision<A> {
        let outcome = self.state().decide(command);
        let first = shown(&outcome);
        let again = shown(&self.state().decide(command));
        assert!(
            first == again,
            "{}: the same command on the same events was decided otherwise the second time:\n{}\
             Usual causes: a clock, a random number, the order of a HashMap.",
            A::NAME,
            diff(&first, &again),
        );
        let snapshots = self.round_trip.map_or(0, |_| self.history.events().len() + 1);
        for behind in 0..snapshots {
            let again = shown(&self.state_with_snapshot_behind(Some(behind)).decide(command));
            assert!(
                first == again,
                "{}: a snapshot behind {behind} events changes what is decided, because the state isn't the same \
                 after it was stored and read back:\n{}",
                A::NAME,
                diff(&first, &again),
            );
        }
        Decision { test: self, outcome }
    }

    /// The state, stored and read back behind so many events.
    #[track_caller]
    fn state_with_snapshot_behind(&self, events: Option<usize>) -> A {
        let mut state = A::default();
        let snapshot = |state: A, behind: usize| match self.round_trip {
            Some(round_trip) if events == Some(behind) => {
                round_trip(&state).unwrap_or_else(|error| {
                    panic!("{}: the state can't be kept in a snapshot: {error}", A::NAME)
                })
            }
            _ => state,
        };
        state = snapshot(state, 0);
        for (behind, event) in (1..).zip(self.history.events()) {
            apply(&mut state, event);
            state = snapshot(state, behind);
        }
        state
    }
}

#[track_caller]
fn apply<A: Aggregate>(state: &mut A, event: &Recorded) {
    let name = event.event_type();
    match event.decode::<A::Event>() {
        Ok(Decoded::Foreign) if !A::PASSES_UNKNOWN_EVENTS => {
            panic!("{}: {name} is not one of its events: its commands would fail", A::NAME)
        }
        Ok(decoded) => decoded.into_iter().for_each(|event| state.apply(&event)),
        Err(error) => panic!("{}: {name}, given, can't be decoded: {error}", A::NAME),
    }
}

#[track_caller]
fn recorded<A: Aggregate>(event: &A::Event) -> NewEvent {
    let name = event.kind().name;
    A::record(event)
        .unwrap_or_else(|error| panic!("{}: {name} can't be recorded: {error}", A::NAME))
}

/// An outcome whose types need not be comparable.
fn shown<E: Event, R: Debug>(outcome: &Result<Vec<E>, R>) -> Result<Vec<String>, String> {
    let event = |event: &E| {
        let kind = event.kind();
        let payload = match event.encode() {
            Ok((PayloadCodec::Json, bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            Ok((codec, bytes)) => format!("{codec} {bytes:02x?}"),
            Err(error) => error.to_string(),
        };
        format!("{} version {}: {payload}", kind.name, kind.schema_version)
    };
    match outcome {
        Ok(events) => Ok(events.iter().map(event).collect()),
        Err(error) => Err(format!("{error:?}")),
    }
}

impl<A: Aggregate> Decision<A> {
    /// It has decided on exactly these events; they have happened now.
    ///
    /// # Panics
    /// If it has decided otherwise, or an event isn't the same after it was stored and read back.
    #[track_caller]
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> AggregateTest<A>
    where
        A::Event: PartialEq + Debug,
    {
        let expected: Vec<A::Event> = expected.into_iter().collect();
        match &self.outcome {
            Ok(events) if *events == expected => {}
            Ok(events) => panic!(
                "{}: other events than expected (- expected, + decided):\n{}",
                A::NAME,
                diff(&expected, events)
            ),
            Err(error) => panic!(
                "{}: events were expected, but the command was refused: {error}\nexpected: {expected:#?}",
                A::NAME
            ),
        }
        self.happen()
    }

    /// It has decided that nothing is to happen.
    ///
    /// # Panics
    /// If it has decided otherwise.
    #[track_caller]
    pub fn then_nothing(self) -> AggregateTest<A>
    where
        A::Event: PartialEq + Debug,
    {
        self.then([])
    }

    /// It has refused the command, with this error.
    ///
    /// # Panics
    /// If it has decided otherwise, or with another error.
    #[track_caller]
    pub fn then_error(self, expected: impl Into<A::Error>) -> AggregateTest<A>
    where
        A::Event: Debug,
        A::Error: PartialEq,
    {
        let expected = expected.into();
        let error = self.refusal();
        assert!(
            *error == expected,
            "{}: refused with another error than expected (- expected, + came):\n{}",
            A::NAME,
            diff(&expected, error)
        );
        self.test
    }

    /// It has refused the command, with an error of which this is true.
    ///
    /// # Panics
    /// If it has decided otherwise, or with another error.
    #[track_caller]
    pub fn then_error_where(self, is_expected: impl FnOnce(&A::Error) -> bool) -> AggregateTest<A>
    where
        A::Event: Debug,
    {
        let error = self.refusal();
        assert!(is_expected(error), "{}: refused with an unexpected error: {error:#?}", A::NAME);
        self.test
    }

    /// Looks at the events as they are appended, with their tags, metadata and subjects. They have happened then.
    ///
    /// # Panics
    /// If the command was refused, or an event isn't the same after it was stored and read back.
    #[track_caller]
    pub fn then_recorded(self, look: impl FnOnce(&[Recorded])) -> AggregateTest<A>
    where
        A::Event: PartialEq + Debug,
    {
        let before = self.test.history.events().len();
        let test = self.happen();
        look(test.history.events().get(before..).unwrap_or_default());
        test
    }

    /// What it has decided, to look at it in other ways.
    ///
    /// # Errors
    /// Why the command was refused.
    pub fn outcome(self) -> Result<Vec<A::Event>, A::Error> {
        self.outcome
    }

    #[track_caller]
    fn refusal(&self) -> &A::Error
    where
        A::Event: Debug,
    {
        match &self.outcome {
            Ok(events) => panic!(
                "{}: the command was expected to be refused, but it was decided: {events:#?}",
                A::NAME
            ),
            Err(error) => error,
        }
    }

    #[track_caller]
    fn happen(self) -> AggregateTest<A>
    where
        A::Event: PartialEq + Debug,
    {
        let Self { mut test, outcome } = self;
        let events = outcome.unwrap_or_else(|error| {
            panic!("{}: the command was expected to be decided, but was refused: {error}", A::NAME)
        });
        let stream = StreamId::new(&test.stream).unwrap_or_else(|error| panic!("{error}"));
        for event in &events {
            test.history.push(&stream, &recorded::<A>(event));
            if let Some(stored) = test.history.events().last() {
                same_after_storing::<A>(event, stored);
            }
        }
        test
    }
}

#[track_caller]
fn same_after_storing<A: Aggregate>(event: &A::Event, stored: &Recorded)
where
    A::Event: PartialEq + Debug,
{
    let name = stored.event_type();
    let decoded = stored.decode::<A::Event>().unwrap_or_else(|error| {
        panic!("{}: {name}, decided, can't be read back: {error}", A::NAME)
    });
    let read: Vec<A::Event> = decoded.into_iter().map(Recorded::into_data).collect();
    assert!(
        read.iter().eq([event]),
        "{}: {name} isn't the same after it was stored and read back (- decided, + read):\n{}",
        A::NAME,
        diff(&[event], &read)
    );
}
