//! Retention and views: what a view hasn't applied durably is held back, and one that must be built anew
//! without its history is told.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use headwater::retention::{History, Holder, Options, Plan, Until};
use headwater::view::{Fold, FoldError, Keys, StopError, View, ViewError, ViewOptions};
use headwater::{
    Append, ExpectedRevision, JournalOptions, NewEvent, Position, ReadError, Recorded, Store,
    StreamId,
};
use serde::{Deserialize, Serialize};

use crate::views::{stopped, until};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Counted {
    text: String,
}

headwater::events! {
    /// What is counted.
    enum CountEvent {
        Counted(Counted) = "count.counted", version 1;
    }
}

#[derive(Debug)]
struct Counts<const VERSION: u32>;

impl<const VERSION: u32> View for Counts<VERSION> {
    const NAME: &'static str = "counts";
    const VERSION: u32 = VERSION;
    type Key = String;
    type Row = u64;
    type Event = CountEvent;

    fn route(&self, _: &Recorded<CountEvent>, keys: &mut Keys<String>) {
        keys.extend(["all".to_owned()]);
    }

    fn fold(
        &self,
        _: &String,
        row: Option<u64>,
        _: &Recorded<CountEvent>,
    ) -> Result<Fold<u64>, FoldError> {
        Ok(Fold::Put(row.unwrap_or(0) + 1))
    }
}

fn open(dir: &Path) -> Store {
    let options = JournalOptions {
        segment_bytes_first: 8 * 1024,
        segment_bytes_max: 8 * 1024,
        batch_bytes_max: 2048,
        group_bytes_max: 2048,
        ..JournalOptions::default()
    };
    Store::builder(dir).create_if_missing().journal_options(options).open().unwrap()
}

fn append(store: &Store, count: usize) {
    let stream = StreamId::new("s").unwrap();
    for _ in 0..count {
        let event =
            NewEvent::typed(&CountEvent::Counted(Counted { text: "x".repeat(100) })).unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }
}

/// Applies everything, and flushes it.
fn catch_up<const VERSION: u32>(store: &Store) {
    let view = store.view(Counts::<VERSION>).unwrap();
    let token = headwater::Token {
        journal: store.journal().id(),
        incarnation: store.journal().end().incarnation,
        position: store.journal().end().position,
        durability: headwater::Durability::Durable,
    };
    view.wait_for(&token, PATIENCE).unwrap();
    view.close().unwrap();
}

fn plan(store: &Store) -> Plan {
    let end = store.journal().end().position;
    store.plan_retention(&Options::new(Until::Position(end))).unwrap()
}

fn forget(store: &Store) -> Plan {
    let options = Options::new(Until::Position(store.journal().end().position));
    store.retain(&options.history(History::Forget(plan(store).target))).unwrap()
}

#[test]
fn a_view_holds_back_what_it_has_not_applied_durably() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, 100);
    catch_up::<1>(&store);
    append(&store, 200);
    let planned = plan(&store);
    let blocker = planned.blocker.unwrap();
    let Holder::View { name, version, generation, .. } = &blocker.holder else {
        panic!("{}", blocker.holder)
    };
    assert_eq!((name.as_str(), *version, *generation), ("counts", 1, 1));
    assert_eq!(blocker.position, Some(Position::new(100)));
    assert!(planned.target <= Position::new(100) && planned.target > Position::START);
    // An older version's generation counts as well, also while a newer one has got on.
    catch_up::<2>(&store);
    let planned = plan(&store);
    assert_eq!(planned.gates.len(), 2);
    assert!(planned.target <= Position::new(100));
    // A view that can't be read holds back everything.
    let pointer = dir.path().join("views/counts/live");
    let text = std::fs::read(&pointer).unwrap();
    std::fs::write(&pointer, "damaged").unwrap();
    let planned = plan(&store);
    assert!(planned.removals.is_empty());
    assert!(matches!(planned.blocker.unwrap().holder, Holder::UnknownViews { .. }));
    std::fs::write(&pointer, text).unwrap();
    catch_up::<1>(&store);
    let done = forget(&store);
    assert!(done.target > Position::new(200));
    catch_up::<1>(&store);
    append(&store, 10);
    let view = store.view(Counts::<1>).unwrap();
    let end = store.journal().end();
    until("applied", || view.checkpoint().applied.position >= end.position);
    assert_eq!(view.get("all").unwrap(), Some(310));
}

/// While another generation takes over there is a moment at which the folder isn't marked any more as one that isn't kept,
/// and the pointer names the old one. The new one needs everything, if its rows come in order.
#[test]
fn a_generation_that_is_about_to_be_live_holds_back_everything_and_one_that_was_set_aside_nothing()
{
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, 200);
    catch_up::<1>(&store);
    let view = dir.path().join("views/counts");
    let held_by = || {
        let holding = plan(&store).gates.into_iter().filter(|gate| !gate.passed_over);
        let of_view = holding.map(|gate| match gate.holder {
            Holder::View { version, generation, .. } => (version, generation, gate.position),
            other => panic!("{other}"),
        });
        let mut held_by: Vec<_> = of_view.collect();
        held_by.sort();
        held_by
    };
    let (begin, end) = (Some(Position::START), Some(Position::new(200)));
    assert_eq!(held_by(), [(1, 1, end)]);
    // As it is begun: with its mark.
    let next = view.join("1.2");
    std::fs::create_dir(&next).unwrap();
    std::fs::write(next.join("not-kept"), "").unwrap();
    assert_eq!(held_by(), [(1, 1, end), (1, 2, begin)]);
    // The mark goes first.
    std::fs::remove_file(next.join("not-kept")).unwrap();
    assert_eq!(held_by(), [(1, 1, end), (1, 2, begin)]);
    assert!(plan(&store).removals.is_empty());
    // A version that has no live one yet.
    std::fs::rename(&next, view.join("2.1")).unwrap();
    assert_eq!(held_by(), [(1, 1, end), (2, 1, begin)]);
    // What another one has taken over from before it had begun.
    std::fs::rename(view.join("2.1"), view.join("1.0")).unwrap();
    assert_eq!(held_by(), [(1, 1, end)]);
    assert!(!plan(&store).removals.is_empty());
}

#[test]
fn a_view_that_is_built_anew_without_its_history_is_told_and_the_old_generation_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, 200);
    catch_up::<1>(&store);
    let first = forget(&store).target;
    assert!(first > Position::START);
    let raised = store.view(Counts::<2>).unwrap();
    let error = stopped(&raised);
    let told = matches!(&*error, StopError::Journal { source: ReadError::Truncated { first: at }, .. } if *at == first);
    assert!(told, "{error}");
    raised.close().unwrap();
    drop(raised); // until then its folder stays locked
    let served = store.view(Counts::<1>).unwrap();
    assert_eq!(served.get("all").unwrap(), Some(200));
    served.close().unwrap();
    drop(served);
    // What can't be built holds nothing back.
    append(&store, 200);
    catch_up::<1>(&store);
    assert!(forget(&store).target > first);
    std::fs::remove_dir_all(dir.path().join("views")).unwrap();
    let anew = store.view(Counts::<1>).unwrap();
    let error = stopped(&anew);
    assert!(matches!(&*error, StopError::Journal { source: ReadError::Truncated { .. }, .. }));
}

#[test]
fn a_view_of_another_history_needs_everything_and_holds_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let (first, backup) = (dir.path().join("first"), dir.path().join("backup"));
    let store = open(&first);
    append(&store, 100);
    store.journal().backup(&backup).unwrap();
    append(&store, 100);
    catch_up::<1>(&store);
    store.close().unwrap();
    drop(store);
    // The journal is restored to an earlier place and goes on; the view isn't opened meanwhile.
    let fs: Arc<dyn headwater::fs::Fs> = Arc::new(headwater::fs::os::OsFs);
    std::fs::rename(first.join("journal"), dir.path().join("lost")).unwrap();
    headwater::restore(&fs, &backup, &first.join("journal"), None).unwrap();
    let store = open(&first);
    append(&store, 50);
    for events in [0, 200] {
        append(&store, events);
        let planned = plan(&store);
        assert!(planned.removals.is_empty(), "{planned:?}");
        let blocker = planned.blocker.unwrap();
        assert!(matches!(blocker.holder, Holder::View { generation: 1, .. }), "{}", blocker.holder);
        assert_eq!(blocker.position, Some(Position::START));
    }
    // Built anew, it lets go; so does the generation that was set aside, once it is deleted.
    catch_up::<1>(&store);
    std::fs::remove_dir_all(first.join("views/counts/1.1")).unwrap();
    assert!(forget(&store).target > Position::new(250));
}

/// The rows of a view over several journals lie with one of their stores: the others must see it, and the one where it lies
/// must not take it for a view of its own.
#[test]
fn a_view_over_several_journals_holds_back_what_it_needs_of_each_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let own = open(&dir.path().join("store"));
    let peer = open(&dir.path().join("store/mirrors/peer"));
    append(&own, 300);
    append(&peer, 300);
    let view_over = |journals: &[headwater::Journal]| {
        let view = own.view_over(journals, Counts::<1>, ViewOptions::default()).unwrap();
        view.wait_for_latest(PATIENCE).unwrap();
        view.close().unwrap();
    };
    view_over(&[peer.journal().clone()]);
    let planned = plan(&own);
    assert!(planned.target > Position::START, "it needs nothing of this one: {planned:?}");
    append(&peer, 300);
    let held = plan(&peer);
    assert!(held.target <= Position::new(300), "{held:?}");
    let holders = held.gates.iter().map(|gate| &gate.holder);
    assert_eq!(holders.filter(|it| matches!(it, Holder::View { .. })).count(), 1);

    view_over(&[own.journal().clone(), peer.journal().clone()]);
    append(&own, 300);
    append(&peer, 300);
    for (store, applied) in [(&own, 300), (&peer, 600)] {
        let held = plan(store);
        assert!(held.target <= Position::new(applied), "{held:?}");
        let of = |holder: &Holder| matches!(holder, Holder::View { generation: 2, .. });
        let gate = held.gates.iter().find(|gate| of(&gate.holder)).unwrap();
        assert_eq!(gate.position, Some(Position::new(applied)));
    }

    // What can't be made anew isn't set aside for another set of journals.
    assert!(forget(&peer).target > Position::START);
    let third = open(&dir.path().join("third"));
    let journals = [&own, &peer, &third].map(|store| store.journal().clone());
    let refused = own.view_over(&journals, Counts::<1>, ViewOptions::default()).unwrap_err();
    let ViewError::Journals { reason, .. } = refused else { panic!("{refused}") };
    assert!(reason.contains("can't be made anew"), "{reason}");
    view_over(&[peer.journal().clone(), own.journal().clone()]);

    // Nor because the order is lost in which they were taken in.
    std::fs::remove_dir_all(dir.path().join("store/views/.intake")).unwrap();
    append(&own, 300);
    let journals = [&own, &peer].map(|store| store.journal().clone());
    let view = own.view_over(&journals, Counts::<1>, ViewOptions::default()).unwrap();
    assert!(view.status().set_aside.is_none());
    append(&peer, 300);
    view.wait_for_latest(PATIENCE).unwrap();
    assert_eq!(view.status().lag_events, Some(0));
}
