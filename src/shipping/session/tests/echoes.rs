//! As of when what an origin tells holds, by the mirror's clock, whatever the way does with it.

use super::*;
use crate::shipping::message::Welcome;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// When the origin's durable end came to be what it is.
struct Ends(Vec<(Instant, Checkpoint)>);

impl Ends {
    fn note(&mut self, journal: &ModelJournal, now: Now) {
        self.0.push((now.at, journal.end()));
    }

    fn as_of(&self, at: Instant) -> Checkpoint {
        self.0.iter().rfind(|(since, _)| *since <= at).unwrap().1
    }
}

/// Bytes are held up for as long as it takes in either direction, and come in pieces: at every moment, the origin's end as of
/// the time that goes with it was no further, and its clock no later.
#[test]
fn what_is_told_held_as_of_the_time_that_goes_with_it_however_long_it_was_on_the_way() {
    let mut moved = 0;
    for seed in 0..300 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut journal, mut mirror) = (filled(3, seed), ModelMirror::default());
        let began = now();
        let mut now = began;
        let mut ends = Ends(Vec::new());
        ends.note(&journal, began);
        let mut connection = Connection::new(&mirror, now);
        let mut last = None;
        for _ in 0..600 {
            now = later(now, Duration::from_micros(1)); // nothing happens at one time
            match rng.u32(..100) {
                0..15 => {
                    journal.append(&random_body(&mut rng)[..64]);
                    journal.sync();
                    ends.note(&journal, now);
                }
                15..40 => connection.speak(&mut journal, now),
                40..58 => connection.hear_origin(rng.usize(1..6000), &mut mirror, now),
                58..75 => connection.hear_mirror(rng.usize(1..300), now),
                75..80 => connection.mirror.ask(now),
                80..90 => {
                    if let Some(end) = mirror.sync() {
                        connection.mirror.on_durable(end);
                    }
                }
                _ => now = later(now, ms(rng.u64(..500))),
            }
            let told = connection.mirror.told();
            if let Some((end, as_of)) = told.end {
                let was = ends.as_of(as_of);
                assert!(as_of <= now.at, "in the future");
                assert!(
                    end.offset >= was.offset && end.position >= was.position,
                    "{end:?} {was:?}"
                );
                assert!(last.is_none_or(|last| last <= as_of), "it goes back");
                moved += u32::from(last.is_some_and(|last| last < as_of));
                last = Some(as_of);
            }
            if let Some((us, as_of)) = told.clock {
                let was_us = began.unix_us + (as_of - began.at).as_micros() as i64;
                assert!(us >= was_us, "{} us too early", was_us - us);
            }
            if connection.has_timed_out() {
                (connection, last) = (Connection::new(&mirror, now), None);
            }
        }
    }
    assert!(moved > 3000, "{moved}");
}

/// Both sides over a way that takes its time, millisecond by millisecond; how old what is known was at the most, and how many
/// heartbeats and acknowledgements there were.
struct Road {
    way: Duration,
    /// The mirror's thread wakes up so often, if nothing arrives.
    tick: Duration,
    connection: Connection,
    to_origin: Vec<(Instant, Vec<u8>)>,
    to_mirror: Vec<(Instant, Vec<u8>)>,
    woken_at: Instant,
    reader: FrameReader,
    acks_reader: FrameReader,
    heartbeats: usize,
    acks: usize,
}

impl Road {
    fn new(mirror: &ModelMirror, way: Duration, now: Now) -> Self {
        let mut reader = FrameReader::new();
        reader.allow_data(8192);
        Self {
            way,
            tick: ms(200),
            connection: Connection::new(mirror, now),
            to_origin: Vec::new(),
            to_mirror: Vec::new(),
            woken_at: now.at,
            reader,
            acks_reader: FrameReader::new(),
            heartbeats: 0,
            acks: 0,
        }
    }

    fn flush(&mut self, now: Now) {
        let mut out = Vec::new();
        self.connection.mirror.take_output(now, &mut out);
        self.acks_reader.push(&out);
        while let Some(message) = self.acks_reader.next_message().unwrap() {
            self.acks += usize::from(matches!(message, Message::Ack(_)));
        }
        self.to_origin.push((now.at + self.way, out));
    }

    fn go(&mut self, journal: &mut ModelJournal, mirror: &mut ModelMirror, now: Now) {
        let has_come = |(at, bytes): &(Instant, Vec<u8>)| *at <= now.at && !bytes.is_empty();
        for (_, bytes) in self.to_origin.extract_if(.., |it| it.0 <= now.at) {
            self.connection.origin.on_bytes(&bytes, now);
        }
        let mut out = Vec::new();
        while self.connection.origin.poll(journal, now, &mut out) == Next::Write {}
        self.reader.push(&out);
        while let Some(message) = self.reader.next_message().unwrap() {
            self.heartbeats += usize::from(matches!(message, Message::Heartbeat(_)));
        }
        self.to_mirror.push((now.at + self.way, out));
        let is_woken = self.to_mirror.iter().any(has_come) || now.at >= self.woken_at + self.tick;
        for (_, bytes) in self.to_mirror.extract_if(.., |it| it.0 <= now.at) {
            self.connection.to_mirror.extend_from_slice(&bytes);
        }
        if is_woken {
            self.woken_at = now.at;
            self.connection.hear_origin(usize::MAX, mirror, now);
            self.connection.mirror.on_time(now);
            self.flush(now);
            if let Some(end) = mirror.sync() {
                self.connection.mirror.on_durable(end);
                self.flush(now);
            }
        }
        assert_eq!((self.connection.mirror.end(), self.connection.origin.end()), (None, None));
    }

    fn age(&self, now: Now) -> Option<Duration> {
        self.connection.mirror.origin_end().map(|(_, as_of)| now.at - as_of)
    }
}

/// As readily known as by heartbeats alone, for hardly more of them: whether nothing happens, or the origin commits all the
/// time.
#[test]
fn what_is_told_is_never_older_than_a_heartbeat_and_the_way_there_and_back() {
    for (pause_ms, way_ms) in [(0, 0), (0, 20), (0, 300), (5, 0), (5, 20), (300, 20), (5, 300)] {
        let (mut journal, mut mirror) = (filled(3, 1), ModelMirror::default());
        let start = now();
        let mut road = Road::new(&mirror, ms(way_ms), start);
        let mut oldest = Duration::ZERO;
        for at in 0..20_000 {
            let now = later(start, ms(at));
            if pause_ms > 0 && at % pause_ms == 0 {
                journal.append(&[7; 64]);
                journal.sync();
            }
            road.go(&mut journal, &mut mirror, now);
            if at > 3000 {
                oldest = oldest.max(road.age(now).unwrap());
            }
        }
        let (heartbeats, acks) = (road.heartbeats, road.acks);
        println!("{pause_ms} {way_ms}: {oldest:?}, {heartbeats} heartbeats, {acks} acks");
        assert!(oldest <= ms(1000 + 2 * way_ms), "{pause_ms} {way_ms}: {oldest:?}");
        assert!(heartbeats <= 30, "{pause_ms} {way_ms}: {heartbeats} heartbeats in 20 s");
        assert!(pause_ms > 0 || acks <= 30, "{acks} acknowledgements in 20 s");
    }
}

/// Whoever waits for an end that the origin has from now on waits for a round trip.
#[test]
fn whoever_asks_is_answered_at_once() {
    let (mut journal, mut mirror) = (filled(3, 1), ModelMirror::default());
    let start = now();
    let mut road = Road::new(&mirror, ms(20), start);
    (0..3000).for_each(|at| road.go(&mut journal, &mut mirror, later(start, ms(at))));
    let (heartbeats, asked_at) = (road.heartbeats, later(start, ms(3000)));
    road.connection.mirror.ask(asked_at);
    road.connection.mirror.ask(asked_at);
    road.flush(asked_at);
    let as_of = |road: &Road| road.connection.mirror.origin_end().unwrap().1;
    for at in 3000..=3040 {
        assert!(as_of(&road) < asked_at.at, "{at}");
        road.go(&mut journal, &mut mirror, later(start, ms(at)));
    }
    assert_eq!((as_of(&road), road.heartbeats), (asked_at.at, heartbeats + 1));
    // However many ask, and whenever, a peer is not bothered more often than it has to put up with.
    for at in 3042..13_042 {
        road.connection.mirror.ask(later(start, ms(at)));
        road.flush(later(start, ms(at)));
        road.go(&mut journal, &mut mirror, later(start, ms(at)));
    }
    assert!(road.heartbeats - heartbeats <= 502, "{}", road.heartbeats - heartbeats);
}

/// A number that was not sent, or one from before the last that came back: nothing is believed of whoever says so.
#[test]
fn an_echo_that_was_not_sent_or_goes_back_is_refused() {
    for echo in [0, 1, 3, 7, u64::MAX] {
        let mut journal = filled(3, 9);
        let mut mirror = ModelMirror::default();
        let start = now();
        let mut connection = Connection::new(&mirror, start);
        connection.settle(&mut journal, &mut mirror, start);
        connection.settle(&mut journal, &mut mirror, later(start, ms(750)));
        let told = connection.mirror.told();
        assert_eq!(told.end.unwrap().1, start.at + ms(750), "two of them came back");
        let (end, speaker) = (journal.end(), Speaker::Origin);
        let heartbeat = Message::Heartbeat(Heartbeat { end, now_us: i64::MAX, speaker, echo });
        heartbeat.encode(&mut connection.to_mirror);
        connection.hear_origin(usize::MAX, &mut mirror, later(start, ms(800)));
        let refused = Violation::Echo { echo, from: 2, sent: 2 };
        assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(refused)));
        assert_eq!(connection.mirror.told(), told, "nothing of it was taken");
        let mut reader = FrameReader::new();
        connection.mirror.take_output(start, &mut connection.to_origin);
        reader.push(&connection.to_origin);
        match reader.next_message() {
            Ok(Some(Message::Error(failure))) => assert_eq!(failure.code, ErrorCode::PROTOCOL),
            other => panic!("{other:?}"),
        }
    }
}

/// What an origin that gives nothing back tells holds as of the subscription, for ever.
#[test]
fn an_origin_that_gives_no_number_back_tells_nothing_new() {
    let mut journal = filled(3, 9);
    let mut mirror = ModelMirror::default();
    let start = now();
    let mut connection = Connection::new(&mirror, start);
    connection.mirror.take_output(start, &mut connection.to_origin);
    connection.hear_mirror(usize::MAX, start);
    connection.origin.poll(&mut journal, start, &mut connection.to_mirror);
    let mut reader = FrameReader::new();
    reader.push(&connection.to_mirror);
    let welcomed_at = later(start, ms(400));
    match reader.next_message() {
        Ok(Some(Message::Welcome(Welcome { now_us, .. }))) => assert_eq!(now_us, start.unix_us),
        other => panic!("{other:?}"),
    }
    connection.hear_origin(usize::MAX, &mut mirror, welcomed_at);
    assert_eq!(connection.mirror.told().clock, Some((start.unix_us, start.at)));
    connection.mirror.take_output(welcomed_at, &mut connection.to_origin);
    connection.hear_mirror(usize::MAX, welcomed_at);
    for n in 1..50 {
        let now = later(welcomed_at, ms(500 * n));
        connection.origin.poll(&mut journal, now, &mut connection.to_mirror);
        journal.append(&[7; 64]);
        journal.sync();
        connection.hear_origin(usize::MAX, &mut mirror, now);
        if let Some(end) = mirror.sync() {
            connection.mirror.on_durable(end);
        }
        connection.mirror.on_time(now);
        let mut out = Vec::new();
        connection.mirror.take_output(now, &mut out);
        // Its acknowledgements come without numbers.
        let mut reader = FrameReader::new();
        reader.push(&out);
        while let Some(Message::Ack(ack)) = reader.next_message().unwrap() {
            Message::Ack(Ack { echo: 0, ..ack }).encode(&mut connection.to_origin);
        }
        connection.hear_mirror(usize::MAX, now);
        let (end, as_of) = connection.mirror.origin_end().unwrap();
        assert_eq!(
            (end.offset, as_of),
            (journal.end_of_batches(2 + n as usize).offset, welcomed_at.at)
        );
    }
}

/// Numbers are answered together, and only within what a peer may say without saying anything new.
#[test]
fn a_peer_that_asks_and_asks_gets_one_answer_a_turn_and_is_cut_off() {
    let mut journal = filled(6, 9);
    let mut connection = streaming_origin(&mut journal);
    let (now, mirrored) = (now(), journal.end());
    let ack = |echo| Message::Ack(Ack { mirrored, applied: None, echo });
    let mut answered = Vec::new();
    for round in 0..3_u64 {
        (1..=30).for_each(|n| ack(100 * round + n).encode(&mut connection.to_origin));
        connection.hear_mirror(usize::MAX, now);
        assert!(connection.origin.is_asked());
        let mut out = Vec::new();
        while connection.origin.poll(&mut journal, now, &mut out) == Next::Write {}
        let mut reader = FrameReader::new();
        reader.push(&out);
        while let Some(message) = reader.next_message().unwrap() {
            match message {
                Message::Heartbeat(heartbeat) => answered.push(heartbeat.echo),
                other => panic!("{other:?}"),
            }
        }
        ack(100 * round + 30).encode(&mut connection.to_origin);
        connection.hear_mirror(usize::MAX, now);
        assert!(!connection.origin.is_asked(), "the same one again");
    }
    assert_eq!(answered, [30, 130, 230]);
    (1..=30).for_each(|n| ack(n).encode(&mut connection.to_origin));
    connection.hear_mirror(usize::MAX, now);
    let limit = Violation::Rate { per_second: 100 };
    assert_eq!(connection.origin.end(), Some(&SessionEnd::Violation(limit)));
}

/// Whoever acknowledges a lot may ask as often: between two that say nothing new lies one that does.
#[test]
fn who_says_something_new_each_time_may_ask_in_between() {
    let mut journal = filled(0, 9);
    let mut connection = streaming_origin(&mut journal);
    let now = now();
    for n in 0..500 {
        journal.append(&[7; 64]);
        journal.sync();
        let mut out = Vec::new();
        while connection.origin.poll(&mut journal, now, &mut out) == Next::Write {}
        let mirrored = journal.end();
        Message::Ack(Ack { mirrored, applied: None, echo: n }).encode(&mut connection.to_origin);
        let echo = 1000 + n;
        Message::Ack(Ack { mirrored, applied: None, echo }).encode(&mut connection.to_origin);
        connection.hear_mirror(usize::MAX, now);
        assert_eq!(connection.origin.end(), None, "{n}");
    }
}
