//! The wire captures in `tests/golden/v1/wire/`: what both sides say, frame by frame, with fixed ids and a
//! fixed clock. They change only on purpose: `HEADWATER_WRITE_GOLDEN=1 cargo test golden`.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::*;

/// Everything that was said, one frame a line: who, which frame, the bytes.
struct Capture {
    text: String,
}

impl Capture {
    fn new(title: &str) -> Self {
        Self {
            text: format!(
                "# {title}\n# sender, frame, bytes in hexadecimal; batches of DATA included\n"
            ),
        }
    }

    fn add(&mut self, who: &str, reader: &mut FrameReader, bytes: &[u8]) {
        reader.push(bytes);
        loop {
            let frame = match reader.next_message().unwrap() {
                None => return,
                Some(message) => {
                    let mut frame = Vec::new();
                    message.encode(&mut frame);
                    (message.name(), frame)
                }
            };
            let hex = frame.1.iter().fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").unwrap();
                hex
            });
            writeln!(self.text, "{who} {} {hex}", frame.0).unwrap();
        }
    }

    fn check(&self, name: &str) {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/wire").join(name);
        if std::env::var_os("HEADWATER_WRITE_GOLDEN").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &self.text).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        for (line, (ours, theirs)) in self.text.lines().zip(golden.lines()).enumerate() {
            assert_eq!(ours, theirs, "{name}, line {}", line + 1);
        }
        assert_eq!(self.text.lines().count(), golden.lines().count(), "{name}");
    }
}

/// Runs a session until nobody has anything to say, then lets a second pass, and writes all of it down.
fn capture(title: &str, journal: &mut ModelJournal, mirror: &mut ModelMirror) -> Capture {
    let mut capture = Capture::new(title);
    let (mut from_mirror, mut from_origin) = (FrameReader::new(), FrameReader::new());
    from_origin.allow_data(8192);
    let mut at = now();
    let mut connection = Connection::new(mirror, at);
    for _ in 0..2 {
        for _ in 0..12 {
            connection.mirror.on_time(at);
            connection.mirror.take_output(at, &mut connection.to_origin);
            capture.add("mirror", &mut from_mirror, &connection.to_origin);
            connection.hear_mirror(usize::MAX, at);
            connection.origin.poll(journal, at, &mut connection.to_mirror);
            capture.add("origin", &mut from_origin, &connection.to_mirror);
            connection.hear_origin(usize::MAX, mirror, at);
            if let Some(end) = mirror.sync() {
                connection.mirror.on_durable(end);
            }
        }
        at = later(at, Duration::from_secs(1));
    }
    capture
}

fn small_journal() -> ModelJournal {
    let mut journal = ModelJournal::new(JOURNAL);
    (1..=6).for_each(|n| journal.append(&vec![n; 40 + usize::from(n) * 20]));
    journal.sync();
    journal
}

#[test]
fn golden_first_subscription_of_a_new_mirror() {
    let (mut journal, mut mirror) = (small_journal(), ModelMirror::default());
    capture(
        "a new mirror subscribes, catches up across a roll, and stays",
        &mut journal,
        &mut mirror,
    )
    .check("first-subscription.txt");
}

#[test]
fn golden_resumption_with_a_witness() {
    let (mut journal, mut mirror) = (small_journal(), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    mirror.set_aside_from(4);
    capture("a mirror that has set its tail aside resumes", &mut journal, &mut mirror)
        .check("resumption.txt");
}

#[test]
fn golden_batch_in_several_frames() {
    let (mut journal, mut mirror) = (ModelJournal::new(JOURNAL), ModelMirror::default());
    journal.append(&vec![0xEE; 9000]);
    journal.sync();
    capture("a batch longer than a frame", &mut journal, &mut mirror).check("long-batch.txt");
}

#[test]
fn golden_divergence() {
    let (mut journal, mut mirror) = (small_journal(), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    journal.reopened_with(2);
    capture("the origin has lost events that the mirror has", &mut journal, &mut mirror)
        .check("ahead.txt");
    (0..6).for_each(|_| journal.append(&[9; 200]));
    journal.sync();
    capture("the origin has lost events and grown again", &mut journal, &mut mirror)
        .check("fork.txt");
}

#[test]
fn golden_probes() {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut journal = ModelJournal::new(JOURNAL);
    (0..200).for_each(|_| journal.append(&vec![rng.u8(..); rng.usize(64..400)]));
    journal.sync();
    let mut mirror = ModelMirror::default();
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    journal.reopened_with(77);
    (0..150).for_each(|_| journal.append(&[9; 100]));
    journal.sync();
    capture("the mirror finds the last common batch end", &mut journal, &mut mirror)
        .check("probes.txt");
}

#[test]
fn golden_truncation() {
    let (mut journal, mut mirror) = (small_journal(), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    mirror.batches.truncate(2);
    journal.removed = 4;
    capture("the origin has removed what the mirror needs", &mut journal, &mut mirror)
        .check("truncated.txt");
}

#[test]
fn golden_damage() {
    let (mut journal, mut mirror) = (small_journal(), ModelMirror::default());
    journal.damaged_at = Some(2);
    capture("the origin finds damage in its journal", &mut journal, &mut mirror)
        .check("damage.txt");
}

#[test]
fn the_specification_shows_the_frames_of_the_capture() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let specification: String = read("docs/protocol.md").split_whitespace().collect();
    let capture = read("tests/golden/v1/wire/first-subscription.txt");
    let mut seen = std::collections::BTreeSet::new();
    for line in capture.lines().filter(|line| !line.starts_with('#')) {
        let [_, frame, hex] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        if frame != "SEGMENT" && seen.insert(frame) {
            assert!(specification.contains(hex), "{frame} in docs/protocol.md is another one");
        }
    }
    assert_eq!(seen.len(), 7);
}
