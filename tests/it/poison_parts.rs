//! One stored event that upcasters make several of is folded, parked and retried as one.
//!
//! If it were not, the parts in front of the one that fails would be in the row already, and be folded again when what is
//! parked is retried.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use headwater::upcast::{RawEvent, Upcast};
use headwater::view::{Fold, FoldError, Keys, View};
use headwater::{Append, Event, ExpectedRevision, NewEvent, Recorded, Store, StreamId};

const PATIENCE: Duration = Duration::from_secs(60);
/// What the fold doesn't take before it is mended.
const POISON: u64 = 1000;

#[derive(Clone, Debug, PartialEq, Event)]
#[event(upcast("numbers.added", 1 = one_by_one))]
enum NumberEvent {
    #[event(name = "number.added", version = 1)]
    Added(u64),
}

fn one_by_one(event: RawEvent<'_>) -> Upcast<'_> {
    let all: Vec<u64> = event.decode()?;
    all.iter().map(|number| Ok(event.becomes("number.added", 1, number)?)).collect()
}

/// What was written once.
#[derive(Clone, Debug, Event)]
enum Numbers {
    #[event(name = "numbers.added", version = 1)]
    Added(Vec<u64>),
}

/// Under 0 all numbers, under 1 those that are odd: in order.
#[derive(Clone, Default)]
struct Lists {
    is_mended: Arc<AtomicBool>,
}

impl View for Lists {
    const NAME: &'static str = "lists";
    const VERSION: u32 = 1;
    type Key = u64;
    type Row = Vec<u64>;
    type Event = NumberEvent;

    fn route(&self, event: &Recorded<NumberEvent>, keys: &mut Keys<u64>) {
        let NumberEvent::Added(number) = event.data();
        keys.add(0);
        keys.extend((number % 2 == 1).then_some(1));
    }

    fn fold(
        &self,
        key: &u64,
        row: Option<Vec<u64>>,
        event: &Recorded<NumberEvent>,
    ) -> Result<Fold<Vec<u64>>, FoldError> {
        let NumberEvent::Added(number) = event.data();
        if *key == 0 && *number == POISON && !self.is_mended.load(Ordering::SeqCst) {
            return Err("too much".into());
        }
        let mut row = row.unwrap_or_default();
        row.push(*number);
        Ok(Fold::Put(row))
    }
}

#[test]
fn the_parts_of_a_stored_event_are_parked_and_retried_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store")).unwrap();
    let stream = StreamId::new("numbers").unwrap();
    let lists = Lists::default();
    let view = store.view(lists.clone()).unwrap();
    // The poison is in the middle of one that begins well, in the same chunk as what is in front and behind.
    let stored = [vec![1, 2], vec![3, POISON, 5, 7], vec![9], vec![]];
    let events = stored.iter().map(|all| NewEvent::typed(&Numbers::Added(all.clone())).unwrap());
    let append = Append::to(&stream, ExpectedRevision::Any, events);
    let token = store.append(&append).unwrap().token();
    view.wait_for(&token, PATIENCE).unwrap();
    assert_eq!(view.get(&0).unwrap(), Some(vec![1, 2]), "nothing of the one that failed");
    assert_eq!(view.get(&1).unwrap(), Some(vec![1, 3, 5, 7, 9]), "another row has all of it");
    let parked: Vec<_> = view.parked().map(Result::unwrap).collect();
    let [parked] = parked.as_slice() else { panic!("{parked:?}") };
    assert_eq!((parked.key, parked.events, parked.first.get()), (0, 2, 1));

    let retried = view.retry(&0).unwrap();
    assert_eq!((retried.applied, retried.left), (0, 2));
    assert_eq!(view.get(&0).unwrap(), Some(vec![1, 2]));
    lists.is_mended.store(true, Ordering::SeqCst);
    let retried = view.retry(&0).unwrap();
    assert_eq!((retried.applied, retried.left), (2, 0));
    assert_eq!(view.get(&0).unwrap(), Some(vec![1, 2, 3, POISON, 5, 7, 9]));
    assert_eq!(view.parked().count(), 0);
}
