//! Secondary indexes, and reading several rows: what an index says is what the rows say, after anything.
//!
//! The entries are compared with those that the rows make by a recount that knows nothing of views.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;
use headwater::retention::{History, Options, Until};
use headwater::view::{
    self, Fold, FoldError, Index, Indexes, Keys, Page, PageToken, RebuildOptions, View, ViewError,
    ViewHandle, ViewOptions, ViewReadError, ViewState,
};
use headwater::{
    Append, ExpectedRevision, JournalOptions, NewEvent, Position, Recorded, Store, StreamId, Token,
};
use serde::{Deserialize, Serialize};

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Person {
    city: String,
    tags: Vec<i8>,
    changes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Moved {
    id: u16,
    city: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Tagged {
    id: u16,
    tags: Vec<i8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Left {
    id: u16,
}

headwater::events! {
    /// What happens to people.
    enum PersonEvent {
        Moved(Moved) = "person.moved", version 1;
        Tagged(Tagged) = "person.tagged", version 1;
        Left(Left) = "person.left", version 1;
    }
}

type Tag = (i8, String);

/// What is in the view's indexes.
#[derive(Debug, Default, PartialEq)]
struct Contents {
    by_city: Vec<(String, u16)>,
    by_tag: Vec<(Tag, u16)>,
}

/// `SET` says which indexes there are: 0 none, 1 by city, 2 both, 3 two of one name.
#[derive(Debug)]
struct People<const SET: u8, const VERSION: u32 = 1>;

impl<const SET: u8, const VERSION: u32> People<SET, VERSION> {
    const BY_CITY: Index<Self, String> =
        Index::new("by_city", |_, person: &Person, keys| keys.add(person.city.clone()));
    /// None, one or several entries; one named twice counts once.
    const BY_TAG: Index<Self, Tag> = Index::new("by-tag", |_, person: &Person, keys| {
        keys.extend(person.tags.iter().map(|tag| (*tag, person.city.clone())));
    });
    const OTHER_TYPE: Index<Self, u8> = Index::new("by_city", |_, _, keys| keys.add(1));
}

impl<const SET: u8, const VERSION: u32> View for People<SET, VERSION> {
    const NAME: &'static str = "people";
    const VERSION: u32 = VERSION;
    type Key = u16;
    type Row = Person;
    type Event = PersonEvent;

    fn route(&self, event: &Recorded<PersonEvent>, keys: &mut Keys<u16>) {
        keys.add(id_of(event.data()));
    }

    fn fold(
        &self,
        _: &u16,
        row: Option<Person>,
        event: &Recorded<PersonEvent>,
    ) -> Result<Fold<Person>, FoldError> {
        Ok(step(row, event.data()))
    }

    fn indexes(&self) -> Indexes<Self> {
        match SET {
            0 => Indexes::none(),
            1 => Indexes::none().with(Self::BY_CITY),
            2 => Indexes::none().with(Self::BY_CITY).with(Self::BY_TAG),
            _ => Indexes::none().with(Self::BY_CITY).with(Self::OTHER_TYPE),
        }
    }
}

fn id_of(event: &PersonEvent) -> u16 {
    match event {
        PersonEvent::Moved(Moved { id, .. })
        | PersonEvent::Tagged(Tagged { id, .. })
        | PersonEvent::Left(Left { id }) => *id,
    }
}

fn step(row: Option<Person>, event: &PersonEvent) -> Fold<Person> {
    let changes = row.as_ref().map_or(0, |row| row.changes) + 1;
    match (event, row) {
        (PersonEvent::Left(_), _) => Fold::Delete,
        (PersonEvent::Moved(moved), row) => {
            let tags = row.map_or_else(Vec::new, |row| row.tags);
            Fold::Put(Person { city: moved.city.clone(), tags, changes })
        }
        (PersonEvent::Tagged(_), None) => Fold::Keep,
        (PersonEvent::Tagged(tagged), Some(row)) => {
            Fold::Put(Person { tags: tagged.tags.clone(), changes, ..row })
        }
    }
}

fn recount(store: &Store, end: Position) -> BTreeMap<u16, Person> {
    let mut rows = BTreeMap::new();
    let events = store.journal().read_all(Position::START).unwrap().map(Result::unwrap);
    for event in events.take_while(|event| event.position() < end) {
        let event = event.decode::<PersonEvent>().unwrap().into_iter().next().unwrap();
        let id = id_of(event.data());
        match step(rows.get(&id).cloned(), event.data()) {
            Fold::Put(row) => drop(rows.insert(id, row)),
            Fold::Delete => drop(rows.remove(&id)),
            Fold::Keep => {}
        }
    }
    rows
}

fn contents_of(rows: &BTreeMap<u16, Person>) -> Contents {
    let by_city: BTreeSet<_> = rows.iter().map(|(id, row)| (row.city.clone(), *id)).collect();
    let tags = |(id, row): (&u16, &Person)| -> Vec<(Tag, u16)> {
        row.tags.iter().map(|tag| ((*tag, row.city.clone()), *id)).collect()
    };
    let by_tag: BTreeSet<_> = rows.iter().flat_map(tags).collect();
    Contents { by_city: by_city.into_iter().collect(), by_tag: by_tag.into_iter().collect() }
}

/// Rows and indexes are what the events in front of the checkpoint make.
fn assert_is_prefix<const VERSION: u32>(view: &ViewHandle<People<2, VERSION>>, store: &Store) {
    let snapshot = view.snapshot().unwrap();
    let expected = recount(store, snapshot.checkpoint().position);
    let rows: BTreeMap<u16, Person> = snapshot.range(..).map(Result::unwrap).collect();
    assert_eq!(rows, expected);
    let mut found = Contents::default();
    for entry in snapshot.by_index(People::<2, VERSION>::BY_CITY).unwrap().range(..) {
        let (city, id, row) = entry.unwrap();
        assert_eq!(rows[&id], row);
        found.by_city.push((city, id));
    }
    for entry in snapshot.by_index(People::<2, VERSION>::BY_TAG).unwrap().range(..) {
        let (tag, id, row) = entry.unwrap();
        assert_eq!(rows[&id], row);
        found.by_tag.push((tag, id));
    }
    assert_eq!(found, contents_of(&expected));
}

fn moved(id: u16, city: &str) -> NewEvent {
    NewEvent::typed(&PersonEvent::from(Moved { id, city: city.into() })).unwrap()
}

fn tagged(id: u16, tags: &[i8]) -> NewEvent {
    NewEvent::typed(&PersonEvent::from(Tagged { id, tags: tags.into() })).unwrap()
}

fn left(id: u16) -> NewEvent {
    NewEvent::typed(&PersonEvent::from(Left { id })).unwrap()
}

fn random_event(rng: &mut Rng, ids: u16) -> NewEvent {
    let id = rng.u16(0..ids);
    match rng.u8(0..10) {
        0 => left(id),
        1..5 => {
            let tags: Vec<i8> = (0..rng.usize(0..4)).map(|_| rng.i8(-2..3)).collect();
            tagged(id, &tags)
        }
        _ => moved(id, rng.choice(["", "a", "a\0", "ab", "b"]).unwrap()),
    }
}

fn open(dir: &Path) -> Store {
    let options = JournalOptions {
        segment_bytes_first: 8 << 10,
        segment_bytes_max: 8 << 10,
        batch_bytes_max: 2 << 10,
        group_bytes_max: 2 << 10,
        ..JournalOptions::default()
    };
    Store::builder(dir).create_if_missing().journal_options(options).open().unwrap()
}

fn append(store: &Store, events: Vec<NewEvent>) -> Token {
    let stream = StreamId::new("people").unwrap();
    let append = |events: &[NewEvent]| {
        let append = Append::to(&stream, ExpectedRevision::Any, events.to_vec());
        store.append(&append).unwrap().token()
    };
    // Each fits into a batch. What the last one gives stands for all.
    events.chunks(10).fold(None, |_, events| Some(append(events))).unwrap()
}

fn catch_up<V: View>(view: &ViewHandle<V>) {
    let deadline = Instant::now() + PATIENCE;
    while !matches!(view.status().state, ViewState::CaughtUp) {
        assert!(Instant::now() < deadline, "never caught up: {:?}", view.status());
        std::thread::yield_now();
    }
}

/// The names of all files in there.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(self::files(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files.sort();
    files
}

/// A copy of what is there at one moment, as a power cut would leave it: not one during which files have come or
/// gone.
fn copy_at_a_moment(from: &Path) -> tempfile::TempDir {
    loop {
        let (to, before) = (tempfile::tempdir().unwrap(), files(from));
        let copied = before.iter().all(|path| {
            let to = to.path().join(path.strip_prefix(from).unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(path, to).is_ok()
        });
        if copied && files(from) == before {
            return to;
        }
    }
}

fn rng(round: u64) -> Rng {
    let seed = std::env::var("HEADWATER_SEED").map_or(round, |seed| seed.parse().unwrap());
    println!("seed {seed}: replay with HEADWATER_SEED={seed}");
    Rng::with_seed(seed)
}

/// Chunks, flushes and batches don't coincide.
fn small_steps(rng: &mut Rng) -> ViewOptions {
    ViewOptions {
        chunk_bytes: rng.u64(1..4096),
        row_cache_bytes: rng.u64(..2048),
        flush_bytes: rng.u64(1..16384),
        ..ViewOptions::default()
    }
}

#[test]
fn an_index_says_what_the_rows_say_after_folds_deletes_openings_crashes_and_rebuilds() {
    for round in 0..4 {
        let (mut dir, mut rng) = (tempfile::tempdir().unwrap(), rng(round));
        let mut store = open(dir.path());
        let mut view = store.view_with(People::<2>, small_steps(&mut rng)).unwrap();
        for _ in 0..40 {
            let ids = *rng.choice(&[3, 40, 400]).unwrap();
            let events = (0..rng.usize(1..30)).map(|_| random_event(&mut rng, ids)).collect();
            append(&store, events);
            match rng.u8(0..10) {
                0 => {
                    drop(view);
                    view = store.view_with(People::<2>, small_steps(&mut rng)).unwrap();
                }
                1 => {
                    // What a power cut leaves: the rows that were flushed.
                    drop(view);
                    view = store.view(People::<2>).unwrap();
                    append(&store, (0..20).map(|_| random_event(&mut rng, ids)).collect());
                    catch_up(&view);
                    let left = copy_at_a_moment(dir.path());
                    drop((view, store, dir));
                    dir = left;
                    store = open(dir.path());
                    view = store.view_with(People::<2>, small_steps(&mut rng)).unwrap();
                }
                2..4 => {
                    catch_up(&view);
                    // So little memory that there are several passes.
                    let memory_bytes_max = *rng.choice(&[1, 10_000, 1 << 20]).unwrap();
                    let options = RebuildOptions { memory_bytes_max, ..RebuildOptions::default() };
                    let rebuilt = view.rebuild(options).unwrap().wait().unwrap();
                    assert!(rebuilt.compared.unwrap().is_equal());
                }
                4 => catch_up(&view),
                _ => {}
            }
            assert_is_prefix(&view, &store);
        }
        catch_up(&view);
        assert_is_prefix(&view, &store);
        assert!(view.check(RebuildOptions::default()).unwrap().is_equal());
    }
}

/// The first generation of a longer journal is built in bulk.
#[test]
fn an_index_built_in_bulk_says_what_the_rows_say() {
    let (dir, mut rng) = (tempfile::tempdir().unwrap(), rng(1));
    let store = open(dir.path());
    while store.journal().end().offset < 2 << 20 {
        append(&store, (0..10).map(|_| random_event(&mut rng, 9999)).collect());
    }
    let view = store.view(People::<2>).unwrap();
    catch_up(&view);
    assert_is_prefix(&view, &store);
    append(&store, (0..10).map(|_| random_event(&mut rng, 9999)).collect());
    catch_up(&view);
    assert_is_prefix(&view, &store);
}

#[test]
fn lookups_ranges_and_prefixes_of_an_index_are_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let token = append(
        &store,
        vec![
            moved(1, "bern"),
            moved(2, "basel"),
            moved(3, "bern"),
            moved(4, "be"),
            tagged(1, &[5, -1, 5]),
            tagged(2, &[5]),
            tagged(4, &[]),
        ],
    );
    let view = store.view(People::<2>).unwrap();
    let snapshot = view.snapshot_at_least(&token, PATIENCE).unwrap();
    let by_city = snapshot.by_index(People::<2>::BY_CITY).unwrap();
    let by_tag = snapshot.by_index(People::<2>::BY_TAG).unwrap();
    let cities = |rows: view::IndexRows<People<2>, String>| -> Vec<(String, u16)> {
        rows.map(Result::unwrap).map(|(city, id, _)| (city, id)).collect()
    };
    let ids = |rows: view::IndexRows<People<2>, Tag>| -> Vec<u16> {
        rows.map(|row| row.unwrap().1).collect()
    };
    let of = |list: &[(&str, u16)]| -> Vec<(String, u16)> {
        list.iter().map(|(city, id)| ((*city).to_owned(), *id)).collect()
    };
    let text = |text: &str| text.to_owned();
    assert_eq!(cities(by_city.get("bern")), of(&[("bern", 1), ("bern", 3)]));
    assert_eq!(cities(by_city.get("b")), []);
    assert_eq!(cities(by_city.range(..text("be"))), of(&[("basel", 2)]));
    assert_eq!(cities(by_city.range(..=text("be"))), of(&[("basel", 2), ("be", 4)]));
    let behind = (std::ops::Bound::Excluded(text("be")), std::ops::Bound::Unbounded);
    assert_eq!(cities(by_city.range(behind)), of(&[("bern", 1), ("bern", 3)]));
    assert_eq!(cities(by_city.range(text("z")..text("a"))), []);
    assert_eq!(
        cities(by_city.range(..).rev()),
        of(&[("bern", 3), ("bern", 1), ("be", 4), ("basel", 2)])
    );
    assert_eq!(ids(by_tag.range(..)), [1, 2, 1], "-1 in front of 5, basel in front of bern");
    assert_eq!(ids(by_tag.prefix(&5)), [2, 1]);
    assert_eq!(ids(by_tag.get(&(5, text("bern")))), [1]);
    assert_eq!(by_city.unique("basel").unwrap().unwrap().0, 2);
    assert!(by_city.unique("b").unwrap().is_none());
    let several = by_city.unique("bern");
    assert!(matches!(several, Err(ViewReadError::NotUnique { .. })), "{several:?}");

    let later = append(&store, vec![moved(1, "basel"), left(3)]);
    view.wait_for(&later, PATIENCE).unwrap();
    assert_eq!(cities(by_city.get("bern")).len(), 2, "a reader stays at its moment");
    assert_eq!(cities(view.by_index(People::<2>::BY_CITY).unwrap().get("bern")), []);
}

#[test]
fn an_index_that_was_not_declared_or_has_keys_of_another_type_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let view = store.view(People::<1>).unwrap();
    view.by_index(People::<1>::BY_CITY).unwrap();
    let refused = view.by_index(People::<1>::BY_TAG);
    assert!(matches!(refused, Err(ViewReadError::NoIndex { .. })), "{refused:?}");
    let refused = view.by_index(People::<1>::OTHER_TYPE);
    assert!(matches!(refused, Err(ViewReadError::NoIndex { .. })), "{refused:?}");
    drop(view);
    let refused = store.view(People::<3>);
    assert!(matches!(refused, Err(ViewError::InvalidIndex { .. })), "{refused:?}");
}

#[test]
fn other_indexes_make_another_generation_and_the_old_one_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    append(&store, vec![moved(1, "bern"), tagged(1, &[5])]);
    let folder = |name: &str| dir.path().join("views/people").join(name);
    let view = store.view(People::<1>).unwrap();
    catch_up(&view);
    assert_eq!(view.status().generation, folder("1.1"));
    drop(view);

    let view = store.view(People::<2>).unwrap();
    catch_up(&view);
    assert_eq!(view.status().generation, folder("1.2"));
    assert_eq!(view.status().set_aside, Some(folder("1.1")));
    assert_is_prefix(&view, &store);
    let refused = view.rollback().unwrap().wait().unwrap_err();
    assert_eq!(refused.code(), "view_storage.other_shape", "{refused}");
    assert_is_prefix(&view, &store);
    drop(view);
    let view = store.view(People::<2>).unwrap();
    assert_eq!((view.status().generation, view.status().set_aside), (folder("1.2"), None));
    drop(view);

    let view = store.view(People::<0>).unwrap();
    catch_up(&view);
    assert_eq!(view.status().generation, folder("1.3"));
    assert_eq!(view.get(&1).unwrap().unwrap().tags, [5]);
}

#[test]
fn rows_that_cannot_be_built_again_are_not_given_up_for_other_indexes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for id in 0..2000 {
        append(&store, vec![moved(id, "bern")]);
    }
    let view = store.view(People::<1>).unwrap();
    catch_up(&view);
    view.close().unwrap();
    drop(view);
    let to_end = Options::new(Until::Position(store.journal().end().position));
    let target = store.plan_retention(&to_end).unwrap().target;
    store.retain(&to_end.history(History::Forget(target))).unwrap();
    assert!(store.journal().start().position > Position::START);

    let refused = store.view(People::<2>);
    assert!(matches!(refused, Err(ViewError::OtherShape { .. })), "{refused:?}");
    let view = store.view(People::<1>).unwrap();
    let in_bern = view.by_index(People::<1>::BY_CITY).unwrap().get("bern").count();
    assert_eq!(in_bern, 2000);
}

#[test]
fn several_rows_come_in_the_order_of_their_keys_and_of_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let token = append(&store, vec![moved(1, "a"), moved(2, "b")]);
    let view = store.view(People::<0>).unwrap();
    let snapshot = view.snapshot_at_least(&token, PATIENCE).unwrap();
    let cities = |rows: Vec<Option<Person>>| -> Vec<Option<String>> {
        rows.into_iter().map(|row| row.map(|row| row.city)).collect()
    };
    let some = |city: &str| Some(city.to_owned());
    let later = append(&store, vec![moved(1, "c"), left(2)]);
    view.wait_for(&later, PATIENCE).unwrap();
    let asked = [2, 7, 1, 2];
    assert_eq!(
        cities(snapshot.multi_get(&asked).unwrap()),
        [some("b"), None, some("a"), some("b")]
    );
    assert_eq!(cities(view.multi_get(&asked).unwrap()), [None, None, some("c"), None]);
    assert!(view.multi_get::<u16>([]).unwrap().is_empty());
}

/// All pages of a scan, and how many there were.
fn pages<T>(limit: usize, page: impl Fn(Option<&PageToken>) -> Page<T>) -> (Vec<T>, usize) {
    let (mut items, mut count, mut token) = (Vec::new(), 0, None::<PageToken>);
    loop {
        let page = page(token.as_ref());
        assert!(page.items.len() <= limit);
        items.extend(page.items);
        count += 1;
        match page.next {
            Some(next) => token = Some(next.to_string().parse().unwrap()),
            None => return (items, count),
        }
    }
}

#[test]
fn pages_are_all_of_it_in_both_directions() {
    let (dir, mut rng) = (tempfile::tempdir().unwrap(), rng(1));
    let store = open(dir.path());
    let events = (0..300).map(|_| random_event(&mut rng, 60)).collect();
    let token = append(&store, events);
    let view = store.view(People::<2>).unwrap();
    let snapshot = view.snapshot_at_least(&token, PATIENCE).unwrap();
    for _ in 0..100 {
        let (a, b) = (rng.u16(0..70), rng.u16(0..70));
        let limit = rng.usize(1..20);
        let reversed = rng.bool();
        let rows = || match reversed {
            false => snapshot.range(a..b),
            true => snapshot.range(a..b).rev(),
        };
        let mut expected: Vec<_> = snapshot.range(a..b).map(Result::unwrap).collect();
        assert!(expected.is_sorted_by_key(|(id, _)| *id));
        if reversed {
            expected.reverse();
        }
        assert_eq!(rows().map(Result::unwrap).collect::<Vec<_>>(), expected);
        let of_rows = |token: Option<&PageToken>| match token {
            None => rows().page(limit).unwrap(),
            Some(token) => rows().after(token).page(limit).unwrap(),
        };
        let (items, count) = pages(limit, of_rows);
        assert_eq!(items, expected);
        assert_eq!(count, expected.len().div_ceil(limit).max(1), "none is empty but the only one");

        // What is left after some were taken, from its other end.
        let mut some = rows();
        let taken: Vec<_> = some.by_ref().take(limit).map(Result::unwrap).collect();
        let mut left: Vec<_> = some.rev().map(Result::unwrap).collect();
        left.reverse();
        assert_eq!([taken, left].concat(), expected);

        let tag = rng.i8(-2..3);
        let by_tag = snapshot.by_index(People::<2>::BY_TAG).unwrap();
        let found = || match reversed {
            false => by_tag.prefix(&tag),
            true => by_tag.prefix(&tag).rev(),
        };
        let expected: Vec<_> = found().map(Result::unwrap).collect();
        let of_index = |token: Option<&PageToken>| match token {
            None => found().page(limit).unwrap(),
            Some(token) => found().after(token).page(limit).unwrap(),
        };
        assert_eq!(pages(limit, of_index).0, expected);
    }
}

#[test]
fn a_token_from_elsewhere_does_not_lead_out_of_the_range() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let token = append(&store, (0..10).map(|id| moved(id, "bern")).collect());
    let view = store.view(People::<2>).unwrap();
    let snapshot = view.snapshot_at_least(&token, PATIENCE).unwrap();
    let of_rows = |id: u16| snapshot.range(id..).page(1).unwrap().next.unwrap();
    let by_city = snapshot.by_index(People::<2>::BY_CITY).unwrap();
    let of_index = by_city.range(..).page(1).unwrap().next.unwrap();
    let forged: PageToken = "00ff".parse().unwrap();
    let ids =
        |rows: view::Rows<u16, Person>| -> Vec<u16> { rows.map(|row| row.unwrap().0).collect() };
    for token in [of_rows(0), of_rows(8), of_index, forged] {
        let within = |found: Vec<u16>| found.iter().all(|id| (3..6).contains(id));
        assert!(within(ids(snapshot.range(3..6).after(&token))), "{token}");
        assert!(within(ids(snapshot.range(3..6).rev().after(&token))), "{token}");
        assert_eq!(by_city.get("basel").after(&token).count(), 0, "{token}");
    }
    assert_eq!(ids(snapshot.range(3..6).after(&of_rows(0))), [3, 4, 5]);
    for text in ["", "0", "0g", "0G", "é0", "AB"] {
        assert!(text.parse::<PageToken>().is_err(), "{text:?}");
    }
}
