//! The doctor finds what is wrong, and leaves everything as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use headwater::doctor::{self, Check, Diagnosis, Level};
use headwater::{JournalOptions, Store};

use crate::verify::{fill, small};

fn examine(store: &Path) -> Diagnosis {
    let before = files(store);
    let diagnosis = doctor::examine(&store.join("journal")).unwrap();
    assert_eq!(files(store), before, "the doctor changes nothing");
    diagnosis
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files(&entry.path())),
            false => drop(found.insert(entry.path(), std::fs::read(entry.path()).unwrap())),
        }
    }
    found
}

fn check<'d>(diagnosis: &'d Diagnosis, name: &str) -> &'d Check {
    diagnosis.checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("{name}"))
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

/// A closed store; with what the doctor says of it where nothing is wrong.
fn closed() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), small(), 90).close().unwrap();
    let journal = dir.path().join("journal");
    (dir, journal)
}

#[test]
fn a_healthy_store_has_no_failure_and_every_check_is_there() {
    let (dir, _) = closed();
    let diagnosis = examine(dir.path());
    assert!(diagnosis.level() < Level::Fail, "{diagnosis:?}");
    for name in [
        "role",
        "journal",
        "mark",
        "end",
        "headers",
        "sidecars",
        "spares",
        "gaps",
        "lock",
        "restore",
        "quarantine",
        "file system",
        "sync",
        "space",
        "inodes",
        "clock",
    ] {
        let check = check(&diagnosis, name);
        assert!(!check.finding.is_empty());
        assert_eq!(check.hint.is_some(), check.level > Level::Ok, "{check:?}");
    }
    for name in ["role", "journal", "mark", "end", "headers", "sidecars", "gaps", "quarantine"] {
        assert_eq!(check(&diagnosis, name).level, Level::Ok, "{diagnosis:?}");
    }
    assert!(check(&diagnosis, "lock").finding.contains("free"));
    assert!(check(&diagnosis, "mark").finding.contains("closed"));
}

#[test]
fn beside_a_writer_the_doctor_names_it_and_finds_nothing_wrong() {
    let dir = tempfile::tempdir().unwrap();
    // Without a thread that changes files meanwhile.
    let options = JournalOptions { background_thread: false, ..small() };
    let store = fill(dir.path(), options, 20);
    let diagnosis = examine(dir.path());
    let lock = check(&diagnosis, "lock");
    assert!(lock.finding.contains(&format!("process {}", std::process::id())), "{lock:?}");
    assert!(diagnosis.level() < Level::Fail, "{diagnosis:?}");
    store.close().unwrap();
}

#[test]
fn damage_fails_and_lesser_faults_warn() {
    let (dir, journal) = closed();
    let segments: Vec<_> =
        (0..3).map(|number| journal.join(format!("{number:016x}.seg"))).collect();
    let active = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path());
    let active = active.filter(|path| path.extension().is_some_and(|e| e == "seg")).max().unwrap();
    type Harm<'h> = Box<dyn Fn() + 'h>;
    let harms: Vec<(&str, Level, Harm<'_>)> = vec![
        ("journal", Level::Fail, Box::new(|| flip(&active, 4096 + 140))),
        ("journal", Level::Fail, Box::new(|| std::fs::remove_file(&segments[1]).unwrap())),
        ("journal", Level::Fail, Box::new(|| flip(&journal.join("node"), 20))),
        (
            "journal",
            Level::Fail,
            Box::new(|| {
                flip(&active, 30);
                flip(&active, 512 + 30);
            }),
        ),
        (
            "restore",
            Level::Fail,
            Box::new(|| std::fs::write(journal.join("incoming"), "x").unwrap()),
        ),
        ("headers", Level::Warn, Box::new(|| flip(&segments[1], 30))),
        ("mark", Level::Warn, Box::new(|| std::fs::remove_file(journal.join("mark")).unwrap())),
        (
            "end",
            Level::Warn,
            Box::new(|| {
                let len = std::fs::metadata(&active).unwrap().len();
                flip(&active, len as usize - 3);
            }),
        ),
        (
            "sidecars",
            Level::Warn,
            Box::new(|| {
                std::fs::remove_file(segments[0].with_extension("idx")).unwrap();
            }),
        ),
        (
            "quarantine",
            Level::Warn,
            Box::new(|| {
                std::fs::write(journal.join("quarantine/0000000000000001-1.tail"), "torn").unwrap();
            }),
        ),
        (
            "role",
            Level::Warn,
            Box::new(|| {
                std::fs::remove_file(journal.join("node")).unwrap();
                std::fs::remove_file(journal.join("mark")).unwrap();
            }),
        ),
    ];
    let whole = files(dir.path());
    for (index, (name, level, harm)) in harms.iter().enumerate() {
        harm();
        let diagnosis = examine(dir.path());
        let found = check(&diagnosis, name);
        assert_eq!(found.level, *level, "harm {index}: {diagnosis:?}");
        assert!(found.hint.is_some());
        assert_eq!(diagnosis.level(), *level, "harm {index}: {diagnosis:?}");
        std::fs::remove_dir_all(&journal).unwrap();
        for (path, bytes) in &whole {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn a_file_system_in_memory_is_warned_of() {
    let memory = Path::new("/dev/shm");
    let is_tmpfs = std::fs::read_to_string("/proc/mounts").is_ok_and(|mounts| {
        mounts.lines().any(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next() == Some("/dev/shm") && fields.next() == Some("tmpfs")
        })
    });
    if !is_tmpfs {
        println!("skipped: {} is no tmpfs", memory.display());
        return;
    }
    let Ok(dir) = tempfile::tempdir_in(memory) else {
        println!("skipped: {} is not writable", memory.display());
        return;
    };
    Store::create(dir.path()).unwrap().close().unwrap();
    let diagnosis = examine(dir.path());
    let found = check(&diagnosis, "file system");
    assert_eq!((found.level, &found.finding[..]), (Level::Warn, "tmpfs"), "{diagnosis:?}");
}

#[test]
fn without_a_journal_there_is_nothing_to_examine() {
    let dir = tempfile::tempdir().unwrap();
    let error = doctor::examine(&dir.path().join("journal")).unwrap_err();
    assert_eq!(error.code(), "open.not_found");
}

#[cfg(feature = "views")]
mod views {
    use std::sync::Arc;
    use std::time::Duration;

    use headwater::fs::{Fs, os::OsFs};
    use headwater::repair::{self, Options, Step};
    use headwater::view::{Fold, FoldError, Keys, StopError, View, ViewState};
    use headwater::{
        Append, ExpectedRevision, NewEvent, Position, ReadError, Recorded, Store, StreamId,
    };
    use serde::{Deserialize, Serialize};

    use super::{Level, check, examine, flip};
    use crate::verify::small;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Noted {
        text: String,
    }

    headwater::events! {
        /// What is noted.
        enum NoteEvent {
            Noted(Noted) = "noted", version 1;
        }
    }

    /// How many notes there are.
    struct Notes;

    impl View for Notes {
        const NAME: &'static str = "notes";
        const VERSION: u32 = 1;
        type Key = u8;
        type Row = u64;
        type Event = NoteEvent;

        fn route(&self, _event: &Recorded<NoteEvent>, keys: &mut Keys<u8>) {
            keys.add(0);
        }

        fn fold(
            &self,
            _key: &u8,
            count: Option<u64>,
            _event: &Recorded<NoteEvent>,
        ) -> Result<Fold<u64>, FoldError> {
            Ok(Fold::Put(count.unwrap_or(0) + 1))
        }
    }

    fn open(dir: &std::path::Path) -> Store {
        let builder = Store::builder(dir).create_if_missing().journal_options(small());
        builder.open().unwrap()
    }

    fn note(store: &Store, from: usize, to: usize) {
        let stream = StreamId::new("notes").unwrap();
        for i in from..to {
            let noted = NoteEvent::from(Noted { text: "x".repeat(i * 13 % 700) });
            let event = NewEvent::typed(&noted).unwrap();
            store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
        }
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    fn stop(store: &Store) -> (Arc<StopError>, Position) {
        let view = store.view(Notes).unwrap();
        let begun = std::time::Instant::now();
        loop {
            if let ViewState::Stopped(error) = view.status().state {
                return (error, view.checkpoint().applied.position);
            }
            assert!(begun.elapsed() < PATIENCE, "the view didn't stop");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_view_is_compared_with_its_journal_and_one_that_remembers_more_fails() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let view = store.view(Notes).unwrap();
        note(&store, 0, 60);
        view.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
        view.close().unwrap();
        drop(view);
        store.close().unwrap();
        drop(store);
        let diagnosis = examine(dir.path());
        let found = check(&diagnosis, "view");
        assert_eq!(found.level, Level::Ok, "{found:?}");
        assert!(found.finding.contains("at position 60"), "{found:?}");
        // The journal loses its last segments, and what knew of them.
        let journal = dir.path().join("journal");
        for entry in std::fs::read_dir(&journal).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            if name == "mark" || (name.ends_with("seg") && !name.starts_with("0000000000000000")) {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        let diagnosis = examine(dir.path());
        assert_eq!(check(&diagnosis, "view").level, Level::Fail, "{diagnosis:?}");
    }

    #[test]
    fn a_view_halts_in_front_of_events_that_were_given_up_and_one_behind_them_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let view = store.view(Notes).unwrap();
        note(&store, 0, 60);
        view.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
        view.close().unwrap();
        drop(view);
        store.close().unwrap();
        drop(store);
        let journal = dir.path().join("journal");
        flip(&journal.join("0000000000000001.seg"), 4096 + 140);
        let fs: Arc<dyn Fs> = Arc::new(OsFs);
        let plan = repair::plan(&fs, &journal, &Options::default()).unwrap();
        let [Step::GiveUp { gap, .. }] = &plan.steps[..] else { panic!("{plan:?}") };
        let accept = vec![gap.from.position..gap.to_position];
        let options = Options { accept: accept.clone(), ..Options::default() };
        assert!(repair::apply(&fs, &journal, &options).unwrap().report.is_healthy());

        let store = open(dir.path());
        note(&store, 60, 70);
        let view = store.view(Notes).unwrap();
        view.wait_for(&store.journal().end().token(), PATIENCE).unwrap();
        assert_eq!(view.get(&0).unwrap(), Some(70));
        view.close().unwrap();
        drop(view);
        std::fs::remove_dir_all(dir.path().join("views")).unwrap();
        let (error, applied) = stop(&store);
        let StopError::Journal { source, .. } = &*error else { panic!("{error}") };
        assert!(
            matches!(source, ReadError::Gap { from, to }
                if *from == accept[0].start && *to == accept[0].end),
            "{error}"
        );
        assert_eq!(applied, accept[0].start);
        assert_eq!(check(&examine(dir.path()), "gaps").level, Level::Warn);
    }
}
