//! Readers and writers beside each other, with the other side stepping in at chosen operations.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use headwater::fs::sim::{Op, SimFs};
use headwater::fs::{File, Fs, Lock, LockHeld, OpenMode};
use headwater::{
    Append, AppendError, Appended, EventId, ExpectedRevision, Journal, JournalOptions, NewEvent,
    Position, Revision, Store, StreamId, verify,
};

use crate::options;

const DIR: &str = "/store";

/// What is called in front of every operation; an error becomes the operation's.
type Hook = dyn Fn(Op, &Path) -> io::Result<()> + Send + Sync;

/// A disk with a hook, which counts the files that are open.
pub(crate) struct Hooked {
    disk: SimFs,
    hook: Arc<Hook>,
    handles: Arc<Handles>,
}

#[derive(Debug, Default)]
struct Handles {
    open: AtomicUsize,
    most: AtomicUsize,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Hooked {
    pub(crate) fn new(
        disk: &SimFs,
        hook: impl Fn(Op, &Path) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { disk: disk.clone(), hook: Arc::new(hook), handles: Arc::default() }
    }
}

impl Fs for Hooked {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dir_all(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        (self.hook)(Op::List, dir)?;
        self.disk.list(dir)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        (self.hook)(if mode == OpenMode::CreateNew { Op::Create } else { Op::Open }, path)?;
        let file = self.disk.open(path, mode)?;
        let open = self.handles.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.handles.most.fetch_max(open, Ordering::SeqCst);
        let (hook, handles) = (Arc::clone(&self.hook), Arc::clone(&self.handles));
        Ok(Arc::new(HookedFile { file, path: path.to_owned(), hook, handles }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        (self.hook)(Op::Rename, to)?;
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        (self.hook)(Op::Remove, path)?;
        self.disk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        (self.hook)(Op::SyncDir, dir)?;
        self.disk.sync_dir(dir)
    }

    fn lock(&self, path: &Path, owner: &str) -> io::Result<Result<Box<dyn Lock>, LockHeld>> {
        self.disk.lock(path, owner)
    }
}

struct HookedFile {
    file: Arc<dyn File>,
    path: std::path::PathBuf,
    hook: Arc<Hook>,
    handles: Arc<Handles>,
}

impl std::fmt::Debug for HookedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HookedFile")
    }
}

impl Drop for HookedFile {
    fn drop(&mut self) {
        self.handles.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl File for HookedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        (self.hook)(Op::Read, &self.path)?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        (self.hook)(Op::Write, &self.path)?;
        self.file.write_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        (self.hook)(Op::Size, &self.path)?;
        self.file.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        (self.hook)(Op::SetLen, &self.path)?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        (self.hook)(Op::SyncData, &self.path)?;
        self.file.sync_data()
    }

    fn drop_cache(&self) -> io::Result<()> {
        (self.hook)(Op::DropCache, &self.path)?;
        self.file.drop_cache()
    }
}

fn open_with(fs: impl Fs, options: JournalOptions) -> Store {
    let builder = Store::builder(DIR).create_if_missing().journal_options(options);
    builder.fs(Arc::new(fs)).open().unwrap()
}

fn stream(name: &str) -> StreamId {
    StreamId::new(name).unwrap()
}

fn event() -> NewEvent {
    NewEvent::raw("test.happened", vec![1; 100]).unwrap()
}

fn put(store: &Store, name: &str) -> Appended {
    store.append(&Append::to(&stream(name), ExpectedRevision::Any, [event()])).unwrap()
}

fn ends_with(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// A reader looked for a stream's head in sealed segments; meanwhile the stream grew and its segment was
/// sealed; then the reader remembered what it had found, and the next append got a revision that was taken.
#[test]
fn a_slow_reader_never_makes_the_writer_forget_a_streams_head() {
    let disk = SimFs::new(1);
    let store = open_with(disk.clone(), options());
    put(&store, "a");
    for _ in 0..20 {
        put(&store, "filler");
    }
    store.close().unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let (arrived, at_gate) = mpsc::channel();
    let (open_gate, gate) = mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let hook = {
        let armed = Arc::clone(&armed);
        move |op: Op, path: &Path| {
            if op == Op::Read && ends_with(path, "idx") && armed.swap(false, Ordering::SeqCst) {
                arrived.send(()).unwrap();
                gate.lock().unwrap().recv().unwrap();
            }
            Ok(())
        }
    };
    let store = open_with(Hooked::new(&disk, hook), options());
    armed.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        scope.spawn(|| store.journal().stream_head(&stream("a")).unwrap());
        at_gate.recv().unwrap();
        assert_eq!(put(&store, "a").receipt().events[0].revision, Revision::new(1));
        let before = store.journal().segments().len();
        while store.journal().segments().len() == before {
            put(&store, "filler");
        }
        open_gate.send(()).unwrap();
    });
    assert_eq!(store.journal().stream_head(&stream("a")).unwrap(), Some(Revision::new(1)));
    assert_eq!(put(&store, "a").receipt().events[0].revision, Revision::new(2));
}

/// The reader surveys the journal in several steps; batches that come in between claim a durable end that
/// wasn't there when the reader had passed it.
#[test]
fn reading_beside_a_live_writer_never_reports_damage() {
    let mut step = 0;
    loop {
        let disk = SimFs::new(1);
        let store = open_with(disk.clone(), options());
        for _ in 0..step % 17 {
            put(&store, "a");
        }
        let (steps, writer) = (AtomicUsize::new(0), store.clone());
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let hook = move |op: Op, _: &Path| {
            assert!(!matches!(op, Op::Write | Op::SetLen | Op::SyncData), "a reader: {op:?}");
            counted.fetch_add(1, Ordering::SeqCst);
            if steps.fetch_add(1, Ordering::SeqCst) == step {
                for _ in 0..3 {
                    put(&writer, "a");
                }
            }
            Ok(())
        };
        let durable = store.journal().end();
        let fs: Arc<dyn Fs> = Arc::new(Hooked::new(&disk, hook));
        let (journal, corruption) =
            Journal::open_read_only(&fs, &Path::new(DIR).join("journal")).unwrap();
        assert_eq!(corruption, None, "step {step}");
        assert!(journal.end().position >= durable.position, "step {step}");
        assert!(journal.end().position <= store.journal().end().position, "step {step}");
        let read = journal
            .read_all(Position::START)
            .unwrap()
            .inspect(|event| assert!(event.is_ok()))
            .count();
        assert_eq!(read as u64, journal.end().position.get());
        if step > 17 && count.load(Ordering::SeqCst) <= step {
            break;
        }
        step += 1;
    }
    assert!(step > 20, "{step}");
}

#[test]
fn opening_keeps_few_files_open_however_many_segments_there_are() {
    let disk = SimFs::new(1);
    let store = open_with(disk.clone(), options());
    while store.journal().segments().len() < 100 {
        put(&store, "a");
    }
    store.close().unwrap();
    for marked in [true, false] {
        // Without a mark everything is read, up to what the headers prove.
        if !marked {
            disk.remove_raw(&Path::new(DIR).join("journal/mark"));
        }
        let hooked = Hooked::new(&disk, |_, _| Ok(()));
        let handles = Arc::clone(&hooked.handles);
        let fs: Arc<dyn Fs> = Arc::new(hooked);
        // The cache of sidecars holds some for good; it is bounded, and not what this is about.
        for (path, _) in disk.snapshot_dir(Path::new(DIR)).files {
            if ends_with(&path, "idx") {
                disk.remove_raw(&Path::new(DIR).join(path));
            }
        }
        let journal = Journal::open_read_only(&fs, &Path::new(DIR).join("journal")).unwrap().0;
        assert!(handles.most.load(Ordering::SeqCst) < 10, "{handles:?}");
        drop(journal);
    }
}

/// Streams are read while they grow and their segments are sealed; nothing is missing, nothing damaged.
#[test]
fn streams_read_beside_a_writer_are_whole_up_to_the_end_that_was_durable() {
    let disk = SimFs::new(1);
    let store = open_with(disk, options());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let head = store.journal().stream_head(&stream("a")).unwrap();
                    let from = head.map_or(0, |head| head.get().saturating_sub(10));
                    let events = store.read_stream(&stream("a"), Revision::new(from)).unwrap();
                    let mut next = from;
                    for event in events {
                        assert_eq!(event.unwrap().revision().get(), next);
                        next += 1;
                    }
                    assert!(head.is_none_or(|head| next > head.get()), "{head:?}, read to {next}");
                    let back = store.journal().read_stream_backward(&stream("a"), None).unwrap();
                    let back: Vec<u64> =
                        back.take(30).map(|event| event.unwrap().revision().get()).collect();
                    assert!(back.windows(2).all(|pair| pair[0] == pair[1] + 1), "{back:?}");
                    assert!(back.first().copied() >= head.map(Revision::get), "{back:?}");
                    assert!(back.len() == 30 || back.last().is_none_or(|last| *last == 0));
                }
            });
        }
        scope.spawn(|| {
            let mut subscription = store.subscribe(Position::START).unwrap();
            let mut next = 0;
            while !done.load(Ordering::SeqCst) {
                match subscription.next(Duration::from_millis(1)).unwrap() {
                    Some(headwater::Item::Event(event)) => {
                        assert_eq!(event.position().get(), next);
                        next += 1;
                    }
                    Some(headwater::Item::CaughtUp { end }) => assert_eq!(end.get(), next),
                    _ => {}
                }
            }
        });
        for _ in 0..4000 {
            put(&store, "a");
        }
        done.store(true, Ordering::SeqCst);
    });
}

/// The first try's batch may be there after a restart, so its repetition can't be "certainly not written".
#[test]
fn repeating_an_append_whose_sync_fails_is_as_unknown_as_the_append() {
    let mut unknown = 0;
    for round in 0..50 {
        let disk = SimFs::new(round);
        let failing = Arc::new(AtomicBool::new(false));
        let (arrived, at_sync) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let hook = {
            let failing = Arc::clone(&failing);
            move |op: Op, path: &Path| {
                if op == Op::SyncData && ends_with(path, "seg") && failing.load(Ordering::SeqCst) {
                    arrived.send(()).unwrap();
                    released.lock().unwrap().recv().unwrap();
                    return Err(io::Error::other("the device is gone"));
                }
                Ok(())
            }
        };
        let store = open_with(Hooked::new(&disk, hook), options());
        failing.store(true, Ordering::SeqCst);
        let id = EventId::new();
        let append = Append::to(&stream("a"), ExpectedRevision::Any, [event().id(id)]);
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| store.append(&append));
            at_sync.recv().unwrap();
            let second = scope.spawn(|| store.append(&append));
            // Gives the second a good chance to come in time; if it doesn't, it is refused as it should be.
            for _ in 0..2000 {
                std::thread::yield_now();
            }
            release.send(()).unwrap();
            (first.join().unwrap(), second.join().unwrap())
        });
        assert!(matches!(first, Err(AppendError::Unknown(_))), "{first:?}");
        match second {
            Err(AppendError::Unknown(_)) => unknown += 1,
            Err(AppendError::Poisoned(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(unknown > 0);
}

/// With another append to the stream under way, a repetition from beyond the window was called a conflict.
#[test]
fn an_old_repetition_is_recognised_while_its_stream_is_being_written() {
    let disk = SimFs::new(1);
    let (to_second, second_store) = mpsc::channel::<Store>();
    let second_store = Mutex::new(second_store);
    let armed = Arc::new(AtomicBool::new(false));
    let old = Append::to(&stream("a"), ExpectedRevision::NoStream, [event().id(EventId::new())]);
    let (answered, answer) = mpsc::channel();
    let hook = {
        let (armed, old) = (Arc::clone(&armed), old.clone());
        move |op: Op, path: &Path| {
            if op == Op::SyncData && ends_with(path, "seg") && armed.swap(false, Ordering::SeqCst) {
                let store = second_store.lock().unwrap().recv().unwrap();
                let (old, answered) = (old.clone(), answered.clone());
                let (done, wait) = mpsc::channel();
                std::thread::spawn(move || {
                    let answer = store.append(&old);
                    answered.send(answer).unwrap();
                    done.send(()).ok();
                });
                // It rests on what has long been durable, so it needs not wait for this sync.
                wait.recv_timeout(Duration::from_secs(20)).ok();
            }
            Ok(())
        }
    };
    let options = JournalOptions { idempotency_window_events: 0, ..options() };
    let store = open_with(Hooked::new(&disk, hook), options);
    let first = store.append(&old).unwrap();
    put(&store, "a");
    armed.store(true, Ordering::SeqCst);
    to_second.send(store.clone()).unwrap();
    put(&store, "a");
    match answer.recv().unwrap() {
        Ok(Appended::Duplicate(receipt)) => assert_eq!(&receipt, first.receipt()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_old_repetition_is_recognised_though_its_condition_on_another_stream_is_not_met_any_more() {
    let options = JournalOptions { idempotency_window_events: 0, ..options() };
    let store = open_with(SimFs::new(1), options);
    put(&store, "b");
    let conditional = Append::default()
        .and_expect(&stream("b"), ExpectedRevision::Exact(Revision::FIRST))
        .and_to(&stream("a"), ExpectedRevision::NoStream, [event().id(EventId::new())]);
    let first = store.append(&conditional).unwrap();
    put(&store, "b");
    let again = store.append(&conditional).unwrap();
    assert_eq!(again, Appended::Duplicate(first.receipt().clone()));
}

/// The window was smaller once, so an id came twice; when the older of the two left the window, the id was
/// forgotten altogether.
#[test]
fn the_window_knows_an_id_as_long_as_its_last_event_is_within() {
    let disk = SimFs::new(1);
    let window = |events| JournalOptions { idempotency_window_events: events, ..options() };
    let twice = Append::to(&stream("a"), ExpectedRevision::Any, [event().id(EventId::new())]);
    let store = open_with(disk.clone(), window(0));
    store.append(&twice).unwrap();
    let second = store.append(&twice).unwrap();
    assert!(matches!(second, Appended::New(_)));
    store.close().unwrap();
    let store = open_with(disk, window(3));
    put(&store, "b");
    put(&store, "b");
    let third = store.append(&twice).unwrap();
    assert_eq!(third, Appended::Duplicate(second.receipt().clone()));
}

/// Each of them brings the next append before the last group is over; `close` must not wait for a gap.
#[test]
fn close_is_not_kept_waiting_by_appends_that_come_later() {
    const MOST: usize = 20_000;
    let store = open_with(SimFs::new(1), options());
    let started = std::sync::Barrier::new(7);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|thread| {
                let (store, started) = (&store, &started);
                scope.spawn(move || {
                    let to = stream(&format!("t-{thread}"));
                    started.wait();
                    for count in 0..MOST {
                        match store.append(&Append::to(&to, ExpectedRevision::Any, [event()])) {
                            Ok(_) => {}
                            Err(AppendError::Closed) => return count,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    MOST
                })
            })
            .collect();
        started.wait();
        store.close().unwrap();
        for thread in threads {
            assert!(thread.join().unwrap() < MOST);
        }
    });
}

/// What is only begun has no name that vouches for it.
#[test]
fn a_journal_that_is_being_written_is_found_healthy_in_front_of_every_operation() {
    let disk = SimFs::new(41);
    let (seen, beside) = (Arc::new(Mutex::new(Vec::new())), disk.clone());
    let found = Arc::clone(&seen);
    let hook = move |_: Op, path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.contains(".idx") {
            let report = verify(&beside, &Path::new(DIR).join("journal"), &mut |_| {}).unwrap();
            found.lock().unwrap().push((name.to_owned(), report.damage));
        }
        Ok(())
    };
    let options = JournalOptions {
        segment_bytes_first: 6 * 1024,
        segment_bytes_max: 6 * 1024,
        batch_bytes_max: 1024,
        group_bytes_max: 1024,
        background_thread: false,
        ..JournalOptions::default()
    };
    let builder = Store::builder(DIR).create_if_missing().journal_options(options);
    let store = builder.fs(Arc::new(Hooked::new(&disk, hook))).open().unwrap();
    let stream = StreamId::new("a").unwrap();
    while store.journal().segments().len() < 6 {
        let event = NewEvent::raw("test.happened", [7; 300]).unwrap();
        store.append(&Append::to(&stream, ExpectedRevision::Any, [event])).unwrap();
    }
    store.close().unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.len() > 10);
    let damaged: Vec<_> = seen.iter().filter(|(_, damage)| !damage.is_empty()).collect();
    assert!(damaged.is_empty(), "{damaged:?}");
}
