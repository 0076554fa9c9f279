//! Given events, when a command comes, then events or an error.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use headwater::command::Aggregate;
use headwater::testing::{self, stored};
use headwater::upcast::{RawEvent, Step, Upcast};
use headwater::{
    EncodeError, Event, EventKind, EventKindRef, KnownKind, NewEvent, Payload, PayloadCodec,
    Recorded, codec::CodecError,
};
use serde::{Deserialize, Serialize};

use super::fails;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Deposited {
    cents: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Withdrawn {
    cents: u64,
    /// Lost when it is stored.
    #[serde(skip)]
    note: String,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum AccountEvent {
    Deposited(Deposited),
    Withdrawn(Withdrawn),
}

/// By hand, so that it doesn't need the feature `derive`.
impl Event for AccountEvent {
    const KINDS: &'static [KnownKind] = &[
        KnownKind::present("account.deposited", 2),
        KnownKind::past("account.deposited", 1),
        KnownKind::present("account.withdrawn", 1),
    ];

    fn kind(&self) -> EventKind {
        match self {
            Self::Deposited(_) => EventKind { name: "account.deposited", schema_version: 2 },
            Self::Withdrawn(_) => EventKind { name: "account.withdrawn", schema_version: 1 },
        }
    }

    fn encode(&self) -> Result<(PayloadCodec, Vec<u8>), CodecError> {
        use headwater::codec::{Bincode, Codec};
        let bytes = match self {
            Self::Deposited(it) => Bincode::encode(it),
            Self::Withdrawn(it) => Bincode::encode(it),
        };
        Ok((PayloadCodec::Bincode, bytes?))
    }

    fn step(kind: EventKindRef<'_>, payload: Payload<'_>) -> Result<Step<Self>, CodecError> {
        match (kind.name, kind.schema_version) {
            ("account.deposited", 2) => payload.decode().map(|it| Step::Value(Self::Deposited(it))),
            ("account.deposited", 1) => Ok(Step::Upcast(in_francs)),
            ("account.withdrawn", 1) => payload.decode().map(|it| Step::Value(Self::Withdrawn(it))),
            _ => Ok(Step::Foreign),
        }
    }
}

/// Version 1 was in whole francs.
fn in_francs(event: RawEvent<'_>) -> Upcast<'_> {
    event.map(|francs: u32| Deposited { cents: u64::from(francs) * 100 })
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Account {
    balance_cents: u64,
    /// A snapshot forgets it.
    #[serde(skip)]
    is_frozen: bool,
}

enum Command {
    Deposit(u64),
    Withdraw(u64),
    WithdrawNoted(u64),
    Freeze,
    /// Decided by something else than the state.
    Gamble,
    /// In the order of a map.
    Split,
}

#[derive(Debug, PartialEq, thiserror::Error)]
enum Refused {
    #[error("only {0} cents are there")]
    NotEnough(u64),
    #[error("frozen")]
    Frozen,
}

static CALLS: AtomicU64 = AtomicU64::new(0);

impl Aggregate for Account {
    const NAME: &'static str = "account";
    type Event = AccountEvent;
    type Command = Command;
    type Error = Refused;

    fn apply(&mut self, event: &Recorded<AccountEvent>) {
        match event.data() {
            AccountEvent::Deposited(it) if it.cents == 0 => self.is_frozen = true,
            AccountEvent::Deposited(it) => self.balance_cents += it.cents,
            AccountEvent::Withdrawn(it) => self.balance_cents -= it.cents,
        }
    }

    fn decide(&self, command: &Command) -> Result<Vec<AccountEvent>, Refused> {
        let deposited = |cents| AccountEvent::Deposited(Deposited { cents });
        let withdrawn =
            |cents, note: &str| AccountEvent::Withdrawn(Withdrawn { cents, note: note.to_owned() });
        match command {
            _ if self.is_frozen => Err(Refused::Frozen),
            Command::Deposit(0) => Ok(vec![]),
            Command::Deposit(cents) => Ok(vec![deposited(*cents)]),
            Command::Withdraw(cents) | Command::WithdrawNoted(cents)
                if *cents > self.balance_cents =>
            {
                Err(Refused::NotEnough(self.balance_cents))
            }
            Command::Withdraw(cents) => Ok(vec![withdrawn(*cents, "")]),
            Command::WithdrawNoted(cents) => Ok(vec![withdrawn(*cents, "for rent")]),
            Command::Freeze => Ok(vec![deposited(0)]),
            Command::Gamble => Ok(vec![deposited(CALLS.fetch_add(1, Ordering::Relaxed) + 1)]),
            Command::Split => {
                let parts: HashSet<u64> = (1..50).collect();
                Ok(parts.into_iter().map(deposited).collect())
            }
        }
    }

    fn record(event: &AccountEvent) -> Result<NewEvent, EncodeError> {
        Ok(NewEvent::typed(event)?.tag("bank:7"))
    }
}

fn deposited(cents: u64) -> AccountEvent {
    AccountEvent::Deposited(Deposited { cents })
}

fn withdrawn(cents: u64) -> AccountEvent {
    AccountEvent::Withdrawn(Withdrawn { cents, note: String::new() })
}

fn account() -> testing::AggregateTest<Account> {
    testing::aggregate()
}

#[test]
fn what_is_decided_has_happened_and_the_next_command_meets_it() {
    let test = account()
        .given([deposited(500)])
        .when(&Command::Withdraw(200))
        .then([withdrawn(200)])
        .when(&Command::Withdraw(301))
        .then_error(Refused::NotEnough(300))
        .when(&Command::Deposit(0))
        .then_nothing()
        .when(&Command::Withdraw(301))
        .then_error_where(|error| matches!(error, Refused::NotEnough(_)))
        .when(&Command::Withdraw(300))
        .then_recorded(|events| {
            assert_eq!(events.len(), 1);
            assert_eq!(events[0].tags(), ["bank:7"]);
            assert_eq!((events[0].revision().get(), events[0].position().get()), (2, 2));
        });
    assert_eq!(test.state().balance_cents, 0);
    assert_eq!(account().when(&Command::Deposit(7)).outcome().unwrap(), [deposited(7)]);
}

#[test]
fn events_in_an_older_form_come_through_their_upcaster() {
    account()
        .stream("account-7")
        .at_us(5)
        .given_new([stored("account.deposited", 1, &3_u32)])
        .when(&Command::Withdraw(300))
        .then([withdrawn(300)]);
}

#[test]
fn whatever_differs_from_what_was_expected_is_told() {
    let withdraw = |cents| account().given([deposited(500)]).when(&Command::Withdraw(cents));
    fails(
        || withdraw(200).then([withdrawn(201)]),
        &[
            "account: other events than expected",
            "-             cents: 201",
            "+             cents: 200",
        ],
    );
    fails(|| withdraw(200).then([]), &["other events", "Withdrawn"]);
    fails(|| withdraw(600).then([withdrawn(600)]), &["refused: only 500 cents are there", "600"]);
    fails(
        || withdraw(600).then_error(Refused::NotEnough(1)),
        &["another error than expected", "500", "- ", "+ "],
    );
    fails(|| withdraw(200).then_error(Refused::Frozen), &["expected to be refused", "200"]);
    fails(|| withdraw(600).then_error_where(|it| *it == Refused::Frozen), &["NotEnough"]);
    fails(|| withdraw(600).then_nothing(), &["refused"]);
}

#[test]
fn a_decision_that_is_another_one_the_second_time_is_found() {
    for command in [Command::Gamble, Command::Split] {
        fails(|| account().when(&command), &["decided otherwise the second time"]);
    }
}

#[test]
fn an_event_that_loses_something_when_it_is_stored_is_found() {
    let noted = Withdrawn { cents: 5, note: "for rent".into() };
    let decision = || account().given([deposited(500)]).when(&Command::WithdrawNoted(5));
    fails(
        || decision().then([AccountEvent::Withdrawn(noted.clone())]),
        &["account.withdrawn isn't the same after it was stored", "for rent"],
    );
}

#[test]
fn a_state_that_loses_something_in_a_snapshot_is_found() {
    let frozen = || account().given([deposited(500)]).when(&Command::Freeze).then([deposited(0)]);
    frozen().when(&Command::Withdraw(1)).then_error(Refused::Frozen);
    fails(
        || frozen().with_snapshots().when(&Command::Withdraw(1)),
        &["a snapshot behind 2 events changes what is decided", "Frozen"],
    );
    account()
        .with_snapshots()
        .given([deposited(5)])
        .when(&Command::Withdraw(5))
        .then([withdrawn(5)]);
}

#[test]
fn an_event_that_would_make_commands_fail_fails_the_test() {
    let given = |event: NewEvent| account().given_new([event]).when(&Command::Deposit(1));
    fails(|| given(stored("account.closed", 1, &())), &["account.closed is not one of its events"]);
    fails(
        || given(stored("account.deposited", 2, &"no number")),
        &["account.deposited, given, can't be decoded"],
    );
    fails(|| given(stored("$reserved", 1, &())), &["$reserved", "reserved"]);
}
