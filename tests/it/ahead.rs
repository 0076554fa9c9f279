//! Segments are prepared ahead and cut behind: not by those who commit, and without harm when it fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};

use headwater::env::{Pace, pace_background};
use headwater::fs::Fs;
use headwater::fs::sim::{Fault, Op, Repeat, SimFs};
use headwater::{
    Append, AppendError, ExpectedRevision, JournalOptions, NewEvent, Position, Store, StreamId,
};

use crate::options;
use crate::races::Hooked;

const JOURNAL: &str = "/store/journal";
/// Of events of this size the sixth has the next segment ordered, and the tenth is its first.
const EVENT_BYTES: usize = 100;
const ORDERS: usize = 6;

fn open(fs: impl Fs, options: JournalOptions) -> Store {
    let builder = Store::builder("/store").create_if_missing().journal_options(options);
    builder.fs(Arc::new(fs)).open().unwrap()
}

fn append(store: &Store) -> Result<(), AppendError> {
    let event = NewEvent::raw("test.happened", vec![1; EVENT_BYTES]).unwrap();
    let stream = StreamId::new("s").unwrap();
    store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).map(drop)
}

fn events(store: &Store) -> usize {
    store.read_all(Position::START).unwrap().map(Result::unwrap).count()
}

fn segments(store: &Store) -> usize {
    store.journal().segments().len()
}

fn segment(number: usize) -> PathBuf {
    Path::new(JOURNAL).join(format!("{number:016x}.seg"))
}

/// Appends until a segment is entered; how many.
fn append_until_roll(store: &Store) -> usize {
    let before = segments(store);
    (1..)
        .find(|_| {
            append(store).unwrap();
            segments(store) > before
        })
        .unwrap()
}

/// Who commits writes into files that are there and syncs them, once for each group, whatever the segment.
#[test]
fn no_commit_makes_a_file_or_syncs_a_directory() {
    const ROLLS: usize = 6;
    let by_committer: Arc<Mutex<BTreeMap<(Op, String), usize>>> = Arc::default();
    let (named, is_named) = mpsc::channel();
    let me = std::thread::current().id();
    let hook = {
        let by_committer = Arc::clone(&by_committer);
        move |op: Op, path: &Path| {
            if std::thread::current().id() == me {
                let kind = path.extension().or(path.file_name()).unwrap().to_string_lossy();
                *by_committer.lock().unwrap().entry((op, kind.into_owned())).or_default() += 1;
            } else if op == Op::SyncDir {
                named.send(()).unwrap();
            }
            Ok(())
        }
    };
    let options = JournalOptions { background_thread: true, ..options() };
    let store = open(Hooked::new(&SimFs::new(1), hook), options);
    by_committer.lock().unwrap().clear();
    let mut appends = 0;
    for _ in 0..ROLLS {
        for _ in 0..ORDERS {
            append(&store).unwrap();
        }
        is_named.recv().unwrap(); // the next segment has only its last operation in front of it
        appends += ORDERS + append_until_roll(&store);
    }
    let counts = std::mem::take(&mut *by_committer.lock().unwrap());
    assert_eq!(counts.get(&(Op::SyncData, "seg".into())), Some(&appends), "{counts:?}");
    for (op, kind) in counts.keys() {
        let allowed = match op {
            Op::Write => ["seg", "mark"].contains(&kind.as_str()),
            Op::SyncData => kind == "seg",
            _ => false,
        };
        assert!(allowed, "{op:?} of {kind}: {counts:?}");
    }
    store.close().unwrap();
    assert!(events(&store) == appends);
}

/// A store with an ordered next segment, of which each append takes one step.
fn ordered(fs: &SimFs) -> Store {
    pace_background(Some(Pace::Steps(0)));
    let store = open(fs.clone(), options());
    for _ in 0..ORDERS {
        append(&store).unwrap();
    }
    pace_background(Some(Pace::Steps(1)));
    store
}

/// What a commit does in front of its step: the batch written and synced, the mark written.
const COMMIT_OPS: u64 = 3;

/// A name whose sync failed may stay lost though a second sync succeeds: it must be made anew.
#[test]
fn a_preparation_that_failed_is_told_and_made_anew_at_the_roll() {
    // In which step, and with which of its operations: create; write, sync; sync the name; remove.
    let failures: [(usize, &[u64]); 6] =
        [(0, &[0]), (1, &[0]), (1, &[1]), (2, &[0]), (2, &[0, 1]), (1, &[0, 1])];
    for (step, operations) in failures {
        for seed in 0..12 {
            let case = format!("step {step}, operations {operations:?}, seed {seed}");
            let fs = SimFs::new(seed);
            let store = ordered(&fs);
            for _ in 0..step {
                append(&store).unwrap();
                assert!(store.background_error().is_none(), "{case}");
            }
            for operation in operations {
                fs.fail_at(fs.ops() + COMMIT_OPS + operation, Fault::Eio, Repeat::Once);
            }
            append(&store).unwrap();
            assert_eq!(fs.faults_struck(), operations.len() as u64, "{case}");
            let told = store.background_error().unwrap_or_else(|| panic!("{case}: not told"));
            assert!(told.path.ends_with(segment(1)), "{case}: {told}");
            assert_eq!(fs.raw(&segment(1)).is_some(), operations.len() > 1, "{case}");
            let mut appended = ORDERS + step + 1 + append_until_roll(&store);
            assert!(store.background_error().is_none(), "{case}: it was made anew");
            append(&store).unwrap();
            appended += 1;
            drop(store);
            fs.power_cut();
            assert_eq!(events(&open(fs, options())), appended, "{case}");
        }
    }
}

/// What can't be removed can't be made anew.
#[test]
fn a_failed_attempt_that_stays_is_never_used() {
    let fs = SimFs::new(1);
    let store = ordered(&fs);
    append(&store).unwrap();
    append(&store).unwrap();
    fs.fail_at(fs.ops() + COMMIT_OPS, Fault::Eio, Repeat::Once);
    fs.fail_at(fs.ops() + COMMIT_OPS + 1, Fault::Eio, Repeat::Once);
    append(&store).unwrap();
    fs.fail_next(Op::Remove, Fault::Eio);
    let error = (0..10).find_map(|_| append(&store).err()).unwrap();
    assert!(matches!(error, AppendError::Poisoned(_)), "{error}");
    drop(store);
    // The next opening removes it, before it makes it anew.
    let store = open(fs.clone(), options());
    assert_eq!(fs.raw(&segment(1)), None);
    let appended = events(&store) + append_until_roll(&store) + 1;
    append(&store).unwrap();
    drop(store);
    fs.power_cut();
    assert_eq!(events(&open(fs, options())), appended);
}

#[test]
fn without_space_for_the_next_segment_appends_go_on_until_it_is_needed() {
    let fs = SimFs::new(1);
    let store = ordered(&fs);
    fs.set_capacity(Some(0));
    while store.background_error().is_none() {
        append(&store).unwrap();
    }
    assert!(store.background_error().unwrap().source.kind() == std::io::ErrorKind::StorageFull);
    assert_eq!(fs.raw(&segment(1)), None, "what there was is given back");
    let full = (0..10).find_map(|_| append(&store).err()).unwrap();
    assert!(matches!(full, AppendError::DiskFull(_)), "{full}");
    assert!(matches!(append(&store), Err(AppendError::DiskFull(_))));
    fs.set_capacity(None);
    append_until_roll(&store);
    assert!(store.background_error().is_none());
    store.close().unwrap();
}

#[test]
fn a_spare_that_nobody_needed_is_removed_at_close() {
    let fs = SimFs::new(1);
    let store = ordered(&fs);
    for _ in 0..3 {
        append(&store).unwrap();
    }
    assert_eq!(fs.raw_durable(&segment(1)), Some(vec![0; 7 * 1024]));
    store.close().unwrap();
    assert_eq!(fs.raw(&segment(1)), None);
}

/// However slow whoever cuts is: not more than some full segments wait.
#[test]
fn full_segments_are_cut_sometime() {
    let fs = SimFs::new(1);
    pace_background(Some(Pace::Steps(0)));
    let store = open(fs.clone(), options());
    let uncut = || (0..).map_while(|n| fs.raw(&segment(n))).filter(|s| s.len() == 7 * 1024).count();
    for _ in 0..10 {
        append_until_roll(&store);
    }
    assert_eq!(uncut(), 4 + 1);
    store.close().unwrap();
    assert_eq!(uncut(), 1);
}
