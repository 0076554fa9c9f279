//! Both ends of a session against each other, over a wire that cuts the bytes anywhere, with journals in
//! memory: lost connections, crashes of either side, histories that differ. Real batches, real chains.

use std::time::{Duration, Instant};

use super::model::{
    JOURNAL, ModelJournal, ModelMirror, common_at, later, mirror_config, now, origin_config,
};
use super::*;
use crate::format::batch::{BatchRef, Link, PADDED_BYTES_LIMIT};
use crate::format::files::{Mark, Role, Witness};
use crate::format::segment::{HEADER_PAGE_BYTES, SegmentPage};
use crate::journal::Comparison;
use crate::position::JournalId;
use crate::shipping::message::Speaker;
use crate::shipping::message::{
    Ack, Authentication, Data, FrameReader, GoAway, Heartbeat, Hello, Message, OriginEnd,
    PROTOCOL_VERSIONS, Probe, Probed, Subscribe,
};
use crate::shipping::security::{Access, Gate, Security, SecurityOptions};

mod echoes;
mod feeds;

/// One connection between an origin and a mirror; bytes lie in the pipes until they are moved.
struct Connection {
    origin: OriginSession,
    mirror: MirrorSession,
    to_origin: Vec<u8>,
    to_mirror: Vec<u8>,
    wait: Option<Next>,
}

impl Connection {
    fn new(mirror: &ModelMirror, now: Now) -> Self {
        let mirror = MirrorSession::new(mirror_config(mirror.resume()), now);
        let origin = OriginSession::new(origin_config(), now);
        Self { origin, mirror, to_origin: Vec::new(), to_mirror: Vec::new(), wait: None }
    }

    /// Whether it is over on a side: nothing but a deadline ends it, here or there.
    fn has_timed_out(&self) -> bool {
        let ends = [self.mirror.end(), self.origin.end()];
        let is_of_time =
            |end: &SessionEnd| matches!(end, SessionEnd::Timeout(_) | SessionEnd::Peer(_));
        assert!(ends.into_iter().flatten().all(is_of_time), "{ends:?}");
        ends.into_iter().flatten().next().is_some()
    }

    /// Both sides say what they have to say.
    fn speak(&mut self, journal: &mut ModelJournal, now: Now) {
        self.mirror.on_time(now);
        self.mirror.take_output(now, &mut self.to_origin);
        self.wait = Some(self.origin.poll(journal, now, &mut self.to_mirror));
    }

    /// Up to the moment at which a mirror that was told that the histories differ has asked.
    fn ask(&mut self, journal: &mut ModelJournal, mirror: &mut ModelMirror) {
        while self.mirror.expected() != "PROBED" {
            self.speak(journal, now());
            self.hear_origin(usize::MAX, mirror, now());
            self.hear_mirror(usize::MAX, now());
        }
    }

    fn hear_origin(&mut self, up_to: usize, mirror: &mut ModelMirror, now: Now) {
        let moved: Vec<u8> = self.to_mirror.drain(..up_to.min(self.to_mirror.len())).collect();
        let mut deliveries = Vec::new();
        self.mirror.on_bytes(&moved, now, &mut deliveries);
        for delivery in deliveries {
            match delivery {
                Delivery::Probed(ends) => self.mirror.on_compared(&mirror.held(&ends), now),
                delivery => mirror.take(delivery),
            }
        }
    }

    fn hear_mirror(&mut self, up_to: usize, now: Now) {
        let moved: Vec<u8> = self.to_origin.drain(..up_to.min(self.to_origin.len())).collect();
        self.origin.on_bytes(&moved, now);
    }

    /// Moves everything until nobody has anything to say, syncing the mirror on the way.
    fn settle(&mut self, journal: &mut ModelJournal, mirror: &mut ModelMirror, now: Now) {
        for _ in 0..10_000 {
            self.speak(journal, now);
            if self.to_mirror.is_empty() && self.to_origin.is_empty() {
                return;
            }
            self.hear_origin(usize::MAX, mirror, now);
            self.hear_mirror(usize::MAX, now);
            if let Some(end) = mirror.sync() {
                self.mirror.on_durable(end);
            }
        }
        panic!("the session doesn't settle");
    }
}

fn random_body(rng: &mut fastrand::Rng) -> Vec<u8> {
    let len = if rng.u8(..) < 12 { rng.usize(8_000..30_000) } else { rng.usize(64..900) };
    (0..len).map(|_| rng.u8(..)).collect()
}

fn filled(batches: usize, seed: u64) -> ModelJournal {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut journal = ModelJournal::new(JOURNAL);
    (0..batches).for_each(|_| journal.append(&random_body(&mut rng)));
    journal.sync();
    journal
}

fn assert_is_prefix(mirror: &ModelMirror, journal: &ModelJournal) {
    assert!(mirror.batches.len() <= journal.durable, "more than is durable was shipped");
    for (index, (bytes, page, end)) in mirror.batches.iter().enumerate() {
        let batch = &journal.batches[index];
        assert!(*bytes == batch.bytes && *page == batch.page && *end == batch.end, "batch {index}");
    }
}

/// Appends, syncs, moves bytes, lets time pass, cuts connections and crashes both sides, all at random; the
/// mirror is a prefix of what is durable at every step, and all of it once the disturbances end.
#[test]
fn whatever_happens_the_mirror_is_a_prefix_and_converges() {
    for seed in 0..300 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut journal, mut mirror) = (ModelJournal::new(JOURNAL), ModelMirror::default());
        let mut now = now();
        let mut connection = Connection::new(&mirror, now);
        for _ in 0..400 {
            match rng.u32(..100) {
                0..20 => journal.append(&random_body(&mut rng)),
                20..32 => journal.sync(),
                32..50 => connection.speak(&mut journal, now),
                50..70 => connection.hear_origin(rng.usize(1..6000), &mut mirror, now),
                70..82 => connection.hear_mirror(rng.usize(1..300), now),
                82..90 => {
                    if let Some(end) = mirror.sync() {
                        connection.mirror.on_durable(end);
                    }
                }
                90..94 => now = later(now, Duration::from_millis(rng.u64(..700))),
                94..96 => connection = Connection::new(&mirror, now),
                96..98 => {
                    mirror.crash();
                    connection = Connection::new(&mirror, now);
                }
                _ => {
                    journal.reopened_with(journal.durable);
                    connection = Connection::new(&mirror, now);
                }
            }
            assert_is_prefix(&mirror, &journal);
            if connection.has_timed_out() {
                connection = Connection::new(&mirror, now);
            }
        }
        journal.sync();
        Connection::new(&mirror, now).settle(&mut journal, &mut mirror, now);
        assert_is_prefix(&mirror, &journal);
        assert_eq!(mirror.batches.len(), journal.batches.len(), "not converged");
    }
}

/// The question came in time, and waited for a thread that may wait for the disk; when that took it up, the five seconds for the
/// question were over, and the mirror was cut off for having asked nothing.
#[test]
fn a_question_that_came_in_time_is_answered_whenever_there_is_time_for_it() {
    let (start, mut journal, mut mirror) = (now(), filled(8, 3), ModelMirror::default());
    Connection::new(&mirror, start).settle(&mut journal, &mut mirror, start);
    journal.reopened_with(2);
    (0..8).for_each(|_| journal.append(&[7; 100]));
    journal.sync();
    let mut connection = Connection::new(&mirror, start);
    let has_asked = |bytes: &[u8]| {
        let mut reader = FrameReader::new();
        reader.push(bytes);
        std::iter::from_fn(|| reader.next_message().unwrap().map(|it| it.name() == "PROBE"))
            .any(|is_probe| is_probe)
    };
    loop {
        connection.speak(&mut journal, start);
        connection.hear_origin(usize::MAX, &mut mirror, start);
        connection.mirror.take_output(start, &mut connection.to_origin);
        if has_asked(&connection.to_origin) {
            break;
        }
        connection.hear_mirror(usize::MAX, start);
    }
    let silence = origin_config().deadlines.silence;
    connection.hear_mirror(usize::MAX, later(start, silence - Duration::from_millis(1)));
    let late = later(start, 2 * silence);
    connection.origin.poll(&mut journal, late, &mut connection.to_mirror);
    assert_eq!((connection.origin.end(), journal.probed > 0), (None, true));
}

/// An origin loses a tail of any length and grows again by any number of batches, with the same payloads or
/// others: a mirror whose end is still there goes on, any other is told, and gets nothing.
#[test]
fn an_origin_restored_from_an_older_state_is_detected_for_every_tail_length() {
    for mirrored in 0..9 {
        for kept in 0..=8 {
            for regrown in 0..9 {
                let original = filled(8, 1);
                let mut journal = original.clone();
                let mut mirror = ModelMirror::default();
                journal.durable = mirrored;
                Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
                journal.reopened_with(kept);
                // The very same payloads: only the incarnation tells the histories apart.
                let bodies = original.batches.iter().skip(kept).cycle().take(regrown);
                let bodies: Vec<_> = bodies.map(|batch| batch.bytes[128..].to_vec()).collect();
                bodies.iter().for_each(|body| journal.append(body));
                journal.sync();
                let before = mirror.batches.len();
                let mut connection = Connection::new(&mirror, now());
                connection.settle(&mut journal, &mut mirror, now());
                if mirrored <= kept {
                    assert_is_prefix(&mirror, &journal);
                    assert_eq!(mirror.batches.len(), journal.batches.len());
                    continue;
                }
                let ahead = mirror.resume().unwrap().end.offset > journal.end().offset;
                let expected = if ahead { Divergence::Ahead } else { Divergence::Fork };
                let common = Some(common_at(&original.end_of_batches(kept)));
                let origin = journal.end();
                let at = DivergedAt {
                    divergence: expected,
                    at_witness: false,
                    common,
                    speaker: Speaker::Origin,
                    origin,
                    is_cut_off: false,
                };
                assert_eq!(connection.mirror.end(), Some(&SessionEnd::Diverged(at)));
                assert_eq!(mirror.batches.len(), before, "bytes of another history were shipped");
            }
        }
    }
}

#[test]
fn an_origin_that_lost_what_a_mirror_has_set_aside_is_told_by_the_witness() {
    for regrown in [0, 2, 9] {
        let mut journal = filled(8, 2);
        let mut mirror = ModelMirror::default();
        Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
        mirror.set_aside_from(3);
        journal.reopened_with(5);
        (0..regrown).for_each(|_| journal.append(&[7; 100]));
        journal.sync();
        let mut connection = Connection::new(&mirror, now());
        connection.settle(&mut journal, &mut mirror, now());
        let ahead = mirror.witness.unwrap().offset > journal.end().offset;
        let divergence = if ahead { Divergence::Ahead } else { Divergence::Fork };
        // What is left of the mirror is common: the origin knows that without being asked.
        let common = mirror.end_of_batches(3).map(|end| common_at(&end));
        let at = DivergedAt {
            divergence,
            at_witness: true,
            common,
            speaker: Speaker::Origin,
            origin: journal.end(),
            is_cut_off: false,
        };
        assert_eq!(connection.mirror.end(), Some(&SessionEnd::Diverged(at)), "{regrown}");
        assert_eq!(mirror.batches.len(), 3);
    }
}

#[test]
fn a_witness_that_is_still_there_lets_the_mirror_refetch() {
    let mut journal = filled(8, 2);
    let mut mirror = ModelMirror::default();
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    mirror.set_aside_from(3);
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    assert_eq!(mirror.batches.len(), 8);
}

#[test]
fn another_journal_is_foreign() {
    let mut mirror = ModelMirror::default();
    Connection::new(&mirror, now()).settle(&mut filled(3, 3), &mut mirror, now());
    let mut other = ModelJournal::new(JournalId::from_bytes([0x2B; 16]));
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut other, &mut mirror, now());
    assert!(matches!(
        connection.mirror.end(),
        Some(SessionEnd::Diverged(DivergedAt { divergence: Divergence::Foreign, .. }))
    ));
}

#[test]
fn damage_at_the_origin_is_reported_with_its_position_and_never_passed_over() {
    let mut journal = filled(8, 4);
    journal.damaged_at = Some(5);
    let position = journal.end_of_batches(5).position;
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    assert_eq!(mirror.batches.len(), 5, "everything in front of the damage was shipped");
    match connection.mirror.end() {
        Some(SessionEnd::Peer(failure)) => {
            assert_eq!((failure.code, failure.position), (ErrorCode::CORRUPT, Some(position)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_closed_journal_is_shipped_to_its_end_and_then_the_origin_goes_away() {
    let mut journal = filled(12, 5);
    journal.closed = true;
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    assert_eq!(mirror.batches.len(), 12);
    assert!(matches!(connection.mirror.end(), Some(SessionEnd::GoAway(_))));
    assert_eq!(connection.wait, Some(Next::Close));
}

#[test]
fn nothing_is_sent_beyond_the_window_until_it_is_acknowledged() {
    let mut journal = ModelJournal::new(JOURNAL);
    (0..100).for_each(|_| journal.append(&[1; 512]));
    journal.sync();
    let mut mirror = ModelMirror::default();
    let (now, mut connection) = (now(), Connection::new(&mirror, now()));
    for _ in 0..200 {
        connection.speak(&mut journal, now);
        connection.hear_origin(usize::MAX, &mut mirror, now);
        connection.hear_mirror(usize::MAX, now);
    }
    let sent = connection.origin.status().sent.unwrap().offset;
    assert!((4096..4096 + 704).contains(&sent), "{sent}");
    assert!(matches!(connection.wait, Some(Next::Wait { past: None, .. })));
    connection.mirror.on_durable(mirror.sync().unwrap());
    connection.speak(&mut journal, now);
    connection.hear_mirror(usize::MAX, now);
    connection.speak(&mut journal, now);
    assert!(connection.origin.status().sent.unwrap().offset > sent);
}

#[test]
fn a_mirror_refuses_an_origin_that_ignores_the_window() {
    let mut journal = filled(3, 6);
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    // Looks like a batch until somebody verifies it.
    let mut bytes = [0xB7; 4096];
    bytes[60..64].copy_from_slice(&4096_u32.to_le_bytes());
    let far = OriginEnd { offset: u64::MAX >> 1, position: Position::new(u64::MAX >> 1) };
    let mut offset = journal.end().offset;
    for kept in (0..).step_by(bytes.len()) {
        let data = Data { offset, origin_end: far, continued: false, bytes: &bytes };
        Message::Data(data).encode(&mut connection.to_mirror);
        offset += bytes.len() as u64;
        connection.mirror.on_bytes(&connection.to_mirror, now(), &mut Vec::new());
        connection.to_mirror.clear();
        assert!(kept <= 4096 + PADDED_BYTES_LIMIT, "the mirror takes everything");
        if connection.mirror.end().is_some() {
            break;
        }
    }
    let violation = Violation::Window { window_bytes: 4096 };
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(violation)));
}

/// Each of them brings a page, which takes no room in the window. The journals with the shortest segments that can be had
/// roll at every batch of two, one of which alone is as long as a segment takes.
#[test]
fn a_mirror_takes_a_window_of_the_shortest_segments_and_no_more_header_pages() {
    let mut journal = filled(3, 6);
    let (begin, page) = (journal.end().offset, [0; HEADER_PAGE_BYTES]);
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    let begin_end = connection.origin.status().sent.unwrap();
    assert_eq!(begin_end.offset, begin);
    connection.mirror.on_durable(begin_end);
    let far = OriginEnd { offset: u64::MAX >> 1, position: Position::new(u64::MAX >> 1) };
    let mut offset = begin;
    let mut segment = |mirror: &mut MirrorSession, len: usize| {
        // Looks like a batch until somebody verifies it.
        let mut bytes = vec![0xB7; len];
        bytes[60..64].copy_from_slice(&(len as u32).to_le_bytes());
        let data = Data { offset, origin_end: far, continued: false, bytes: &bytes };
        let mut out = Vec::new();
        Message::Segment(&page).encode(&mut out);
        Message::Data(data).encode(&mut out);
        mirror.on_bytes(&out, now(), &mut Vec::new());
        offset += len as u64;
        offset
    };
    for round in 0..20 {
        let (mut at, mut lens) = (0, [128, 1024].into_iter().cycle());
        while at < begin + (round + 1) * 4096 {
            at = segment(&mut connection.mirror, lens.next().unwrap());
        }
        assert_eq!(connection.mirror.end(), None, "round {round}");
        connection.mirror.on_durable(Checkpoint { offset: at, ..begin_end });
    }
    let pages = (0..).take_while(|_| {
        segment(&mut connection.mirror, 128);
        connection.mirror.end().is_none()
    });
    assert!((8..100).contains(&pages.take(1000).count()));
    let violation = Violation::Pages { limit: 4096 / 512 + 64 };
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(violation)));
}

/// Pages don't count against the window, so nothing but batches may let another one come.
#[test]
fn a_mirror_refuses_header_pages_without_batches_in_between() {
    let mut journal = filled(3, 6);
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    let page = [0; HEADER_PAGE_BYTES];
    for _ in 0..2 {
        assert_eq!(connection.mirror.end(), None, "the first page is right");
        connection.to_mirror.clear();
        Message::Segment(&page).encode(&mut connection.to_mirror);
        connection.mirror.on_bytes(&connection.to_mirror, now(), &mut Vec::new());
    }
    let violation = Violation::Unexpected { frame: "SEGMENT", expected: "DATA" };
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(violation)));
}

#[test]
fn a_peer_that_dribbles_its_hello_is_cut_off_by_the_absolute_deadline() {
    let (mut journal, start) = (filled(1, 7), now());
    let mut origin = OriginSession::new(origin_config(), start);
    let mut hello = Vec::new();
    MirrorSession::new(mirror_config(None), start).take_output(start, &mut hello);
    let mut out = Vec::new();
    for (index, byte) in hello.iter().enumerate() {
        let at = later(start, Duration::from_millis(100 * index as u64));
        origin.on_bytes(&[*byte], at);
        if origin.poll(&mut journal, at, &mut out) == Next::Close {
            break;
        }
        assert!(at.at <= start.at + Duration::from_millis(3100), "still there");
        if origin.end().is_some() {
            out.clear();
        }
    }
    assert_eq!(origin.end(), Some(&SessionEnd::Timeout(Deadline::Handshake)));
}

#[test]
fn silence_ends_a_session_on_both_sides_and_heartbeats_keep_it() {
    let (mut journal, mut mirror, start) = (filled(2, 8), ModelMirror::default(), now());
    let mut connection = Connection::new(&mirror, start);
    connection.settle(&mut journal, &mut mirror, start);
    let mut at = start;
    for _ in 0..20 {
        at = later(at, Duration::from_secs(1));
        connection.settle(&mut journal, &mut mirror, at);
    }
    assert!(connection.mirror.end().is_none() && connection.origin.end().is_none());
    at = later(at, Duration::from_secs(5));
    connection.speak(&mut journal, at);
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Timeout(Deadline::Silence)));
    assert_eq!(connection.origin.end(), Some(&SessionEnd::Timeout(Deadline::Silence)));
}

#[test]
fn a_mirror_gives_up_on_an_origin_that_never_answers() {
    let start = now();
    let mut mirror = MirrorSession::new(mirror_config(None), start);
    mirror.on_time(later(start, Duration::from_millis(2999)));
    assert_eq!(mirror.end(), None);
    mirror.on_time(later(start, Duration::from_secs(3)));
    assert_eq!(mirror.end(), Some(&SessionEnd::Timeout(Deadline::Handshake)));
}

fn streaming_origin(journal: &mut ModelJournal) -> Connection {
    let mut mirror = ModelMirror::default();
    let mut connection = Connection::new(&mirror, now());
    connection.settle(journal, &mut mirror, now());
    connection
}

#[test]
fn acknowledgements_beyond_what_was_sent_or_going_back_or_of_another_journal_are_refused() {
    let other = Mark::start(JournalId::from_bytes([0x2B; 16])).end;
    let mut journal = filled(6, 9);
    let beyond = Checkpoint { offset: journal.end().offset + 64, ..journal.end() };
    for mirrored in [beyond, journal.end_of_batches(2), other] {
        let mut connection = streaming_origin(&mut journal);
        Message::Ack(Ack { mirrored, applied: None, echo: 0 }).encode(&mut connection.to_origin);
        connection.hear_mirror(usize::MAX, now());
        assert!(matches!(
            connection.origin.end(),
            Some(SessionEnd::Violation(Violation::Ack { .. }))
        ));
    }
}

#[test]
fn frames_out_of_their_state_are_refused_with_an_error_and_nothing_is_taken_after_it() {
    let mut journal = filled(2, 10);
    let mut connection = streaming_origin(&mut journal);
    let subscribe = Subscribe { from: None, witness: None, window_bytes: 1 };
    Message::Subscribe(subscribe).encode(&mut connection.to_origin);
    Message::GoAway(GoAway { reconnect_after_ms: 0 }).encode(&mut connection.to_origin);
    connection.hear_mirror(usize::MAX, now());
    let unexpected = Violation::Unexpected { frame: "SUBSCRIBE", expected: "ACK" };
    assert_eq!(connection.origin.end(), Some(&SessionEnd::Violation(unexpected)));
    let mut out = Vec::new();
    assert_eq!(connection.origin.poll(&mut journal, now(), &mut out), Next::Write);
    let mut reader = FrameReader::new();
    reader.push(&out);
    match reader.next_message() {
        Ok(Some(Message::Error(failure))) => assert_eq!(failure.code, ErrorCode::PROTOCOL),
        other => panic!("{other:?}"),
    }
    out.clear();
    assert_eq!(connection.origin.poll(&mut journal, now(), &mut out), Next::Close);
}

#[test]
fn no_common_version_is_said_with_the_versions_that_are_spoken() {
    let mut origin = OriginSession::new(origin_config(), now());
    let mut bytes = Vec::new();
    let versions = VersionRange { min: 7, max: 9 };
    let (agent, nonce, authentication) = (String::new(), [0; 16], Authentication::None);
    let (features, max_frame, node) = (0, 8192, None);
    let hello = Hello { versions, features, max_frame, node, nonce, authentication, agent };
    Message::Hello(hello).encode(&mut bytes);
    origin.on_bytes(&bytes, now());
    assert_eq!(origin.end(), Some(&SessionEnd::Version(versions)));
    let mut out = Vec::new();
    origin.poll(&mut filled(0, 0), now(), &mut out);
    let mut mirror = MirrorSession::new(mirror_config(None), now());
    mirror.on_bytes(&out, now(), &mut Vec::new());
    assert_eq!(mirror.end(), Some(&SessionEnd::Version(PROTOCOL_VERSIONS)));
}

#[test]
fn a_mirror_refuses_its_own_journal_coming_back() {
    let start = now();
    let own = MirrorConfig { node: Some(origin_config().node), ..mirror_config(None) };
    let mut mirror = MirrorSession::new(own, start);
    let mut origin = OriginSession::new(origin_config(), start);
    let (mut to_origin, mut to_mirror) = (Vec::new(), Vec::new());
    mirror.take_output(start, &mut to_origin);
    origin.on_bytes(&to_origin, start);
    origin.poll(&mut filled(0, 0), start, &mut to_mirror);
    mirror.on_bytes(&to_mirror, start, &mut Vec::new());
    assert_eq!(mirror.end(), Some(&SessionEnd::Cycle(vec![origin_config().node])));
}

#[test]
fn a_durable_end_that_goes_back_within_a_session_is_refused() {
    let mut journal = filled(4, 11);
    let mut connection = streaming_origin(&mut journal);
    let end = journal.end_of_batches(1);
    Message::Heartbeat(Heartbeat { end, now_us: 0, speaker: Speaker::Origin, echo: 1 })
        .encode(&mut connection.to_mirror);
    connection.hear_origin(usize::MAX, &mut ModelMirror::default(), now());
    assert!(matches!(
        connection.mirror.end(),
        Some(SessionEnd::Violation(Violation::EndWentBack { .. }))
    ));
}

/// A bit flipped anywhere on the wire: the session ends or the mirror's checks fail, but nothing else than
/// the origin's bytes is ever taken.
#[test]
fn a_bit_flipped_on_the_wire_never_reaches_the_mirror() {
    let mut rng = fastrand::Rng::with_seed(12);
    for _ in 0..400 {
        let mut journal = filled(6, 12);
        let mut mirror = ModelMirror::default();
        let mut connection = Connection::new(&mirror, now());
        let flip_at = rng.usize(..6);
        for step in 0..12 {
            connection.speak(&mut journal, now());
            if step == flip_at && !connection.to_mirror.is_empty() {
                let bit = rng.usize(..connection.to_mirror.len() * 8);
                connection.to_mirror[bit / 8] ^= 1 << (bit % 8);
            }
            let moved = std::mem::take(&mut connection.to_mirror);
            let mut deliveries = Vec::new();
            connection.mirror.on_bytes(&moved, now(), &mut deliveries);
            for delivery in deliveries {
                if mirror.try_take(delivery).is_err() {
                    connection.mirror.fail(Failure::new(ErrorCode::REFUSED, ""));
                }
            }
            connection.hear_mirror(usize::MAX, now());
        }
        assert_is_prefix(&mirror, &journal);
    }
}

/// Histories of random batches that part anywhere: the origin restored from any older state, grown again by any
/// number of batches, with the same payloads or others. The mirror is told at its first subscription, gets not a
/// byte, and finds the exact last common batch end.
#[test]
fn s3_any_restored_origin_is_detected_at_the_first_subscription_and_the_common_end_is_exact() {
    for seed in 0..400 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let batches = rng.usize(1..if seed % 20 == 0 { 400 } else { 40 });
        let mut original = ModelJournal::new(JOURNAL);
        (0..batches).for_each(|_| original.append(&vec![7; rng.usize(64..900)]));
        original.sync();
        let mut mirror = ModelMirror::default();
        let mut journal = original.clone();
        journal.durable = rng.usize(0..=batches);
        Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
        let (mirrored, kept) = (journal.durable, rng.usize(0..=batches));
        journal.reopened_with(kept);
        let (identical, regrown) = (rng.bool(), rng.usize(0..2 * batches));
        for batch in original.batches.iter().skip(kept).cycle().take(regrown) {
            match identical {
                true => journal.append(&batch.bytes[128..]),
                false => journal.append(&random_body(&mut rng)),
            }
        }
        journal.sync();
        let before = mirror.batches.len();
        let mut connection = Connection::new(&mirror, now());
        connection.settle(&mut journal, &mut mirror, now());
        if mirrored <= kept {
            assert_is_prefix(&mirror, &journal);
            continue;
        }
        assert_eq!(mirror.batches.len(), before, "bytes of another history were shipped");
        match connection.mirror.end() {
            Some(SessionEnd::Diverged(at)) => {
                assert_eq!(at.common, Some(common_at(&original.end_of_batches(kept))));
                assert_eq!(at.origin, journal.end());
            }
            other => panic!("{other:?}"),
        }
        assert!(journal.probed <= 64 * 3, "{} batch ends were asked for", journal.probed);
        connection.origin.on_closed();
        assert!(matches!(connection.origin.end(), Some(SessionEnd::Diverged(_))));
    }
}

/// A mirror whose origin has another history, up to the moment at which it has asked.
fn forked() -> (ModelJournal, ModelMirror, Connection) {
    let (mut journal, mut mirror) = (filled(200, 13), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    journal.reopened_with(60);
    (0..200).for_each(|_| journal.append(&[1; 64]));
    journal.sync();
    let mut connection = Connection::new(&mirror, now());
    connection.ask(&mut journal, &mut mirror);
    (journal, mirror, connection)
}

#[test]
fn a_search_that_is_cut_off_ends_as_what_it_is_a_divergence() {
    for how in 0..4 {
        let (_, mut mirror, mut connection) = forked();
        match how {
            0 => connection.mirror.on_closed(),
            1 => connection.mirror.on_time(later(now(), Duration::from_secs(6))),
            2 => {
                Message::GoAway(GoAway { reconnect_after_ms: 0 }).encode(&mut connection.to_mirror);
            }
            _ => Message::Error(Failure::new(ErrorCode::CORRUPT, ""))
                .encode(&mut connection.to_mirror),
        }
        connection.hear_origin(usize::MAX, &mut mirror, now());
        match connection.mirror.end() {
            Some(SessionEnd::Diverged(DivergedAt { common: None, is_cut_off, .. })) => {
                assert_eq!(*is_cut_off, how < 3, "{how}: damage at the origin doesn't pass");
            }
            other => panic!("{how}: {other:?}"),
        }
    }
}

#[test]
fn answers_that_fit_no_question_are_refused() {
    let end = |position| {
        Some(Link { offset: 64, position: Position::new(position), chain: Default::default() })
    };
    for ends in [vec![end(1)], vec![None; 63], vec![end(u64::MAX - 1); 64]] {
        let (_, mut mirror, mut connection) = forked();
        connection.to_mirror.clear();
        Message::Probed(Probed { ends }).encode(&mut connection.to_mirror);
        connection.hear_origin(usize::MAX, &mut mirror, now());
        assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(Violation::Probed)));
    }
}

/// Each answer is compared with what is on the disk: nobody gives more of them than were asked for.
#[test]
fn one_question_has_one_answer_also_while_it_is_being_compared() {
    let (_, mirror, mut connection) = forked();
    let ends = vec![None; 64];
    let (mut out, mut deliveries) = (Vec::new(), Vec::new());
    (0..1000).for_each(|_| Message::Probed(Probed { ends: ends.clone() }).encode(&mut out));
    connection.mirror.on_bytes(&out, now(), &mut deliveries);
    assert_eq!(deliveries.len(), 1, "answers to one question");
    assert_eq!(deliveries, [Delivery::Probed(ends.clone())]);
    let unexpected = Violation::Unexpected { frame: "PROBED", expected: "nothing before PROBE" };
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(unexpected)));
    connection.mirror.on_compared(&mirror.held(&ends), now());
    assert_eq!(connection.mirror.end(), Some(&SessionEnd::Violation(unexpected)));
}

#[test]
fn an_origin_answers_so_many_probes_and_none_out_of_place() {
    let probe = || Message::Probe(Probe { positions: vec![Position::new(1); 64] });
    let (mut journal, _, mut connection) = forked();
    let mut answered = 0;
    let mut out = Vec::new();
    while connection.origin.end().is_none() {
        probe().encode(&mut connection.to_origin);
        connection.hear_mirror(usize::MAX, now());
        assert_eq!(connection.origin.poll(&mut journal, now(), &mut out), Next::Write);
        answered += 1;
        assert!(answered < 100, "there is no end to it");
    }
    assert!(
        matches!(connection.origin.end(), Some(SessionEnd::Own(failure)) if failure.code == ErrorCode::RATE)
    );
    // Two at once, and one that streams.
    let (_, _, mut connection) = forked();
    probe().encode(&mut connection.to_origin);
    probe().encode(&mut connection.to_origin);
    connection.hear_mirror(usize::MAX, now());
    let unexpected = Violation::Unexpected { frame: "PROBE", expected: "the answer to PROBE" };
    assert_eq!(connection.origin.end(), Some(&SessionEnd::Violation(unexpected)));
    let mut connection = streaming_origin(&mut filled(2, 14));
    probe().encode(&mut connection.to_origin);
    connection.hear_mirror(usize::MAX, now());
    let unexpected = Violation::Unexpected { frame: "PROBE", expected: "ACK" };
    assert_eq!(connection.origin.end(), Some(&SessionEnd::Violation(unexpected)));
}

/// Whoever was told that the histories differ has no subscription, and is answered nothing once it may not have the journal
/// any more.
#[test]
fn questions_are_answered_to_those_alone_who_still_may_have_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("access.json");
    let allow = |journal: JournalId| {
        let may = serde_json::json!({ "journal": journal.to_string(), "mode": "verbatim" });
        let peer = serde_json::json!({ "name": "here", "anonymous": "loopback", "may": [may] });
        std::fs::write(&list, serde_json::json!({ "peers": [peer] }).to_string()).unwrap();
    };
    for is_taken in [false, true] {
        allow(JOURNAL);
        let access = Access::File(list.clone());
        let security = Security::new(SecurityOptions { tls: None, access }).unwrap();
        let (mut journal, mut mirror, _) = forked();
        let gate = Gate::new(Some(security.clone()), true);
        let mut connection = Connection {
            origin: OriginSession::new(OriginConfig { gate, ..origin_config() }, now()),
            ..Connection::new(&mirror, now())
        };
        connection.ask(&mut journal, &mut mirror);
        allow(if is_taken { JournalId::from_bytes([1; 16]) } else { JOURNAL });
        security.reload().unwrap();
        connection.speak(&mut journal, now());
        let end = connection.origin.end().cloned();
        let is_denied = matches!(&end, Some(SessionEnd::Own(it)) if it.code == ErrorCode::DENIED);
        assert_eq!((is_denied, end.is_some()), (is_taken, is_taken), "{end:?}");
        connection.speak(&mut journal, now());
        let soon = now().at + origin_config().deadlines.heartbeat;
        let looks_again =
            matches!(connection.wait, Some(Next::Wait { until, .. }) if until <= soon);
        assert!(is_taken || looks_again, "{:?}", connection.wait);
    }
}

#[test]
fn an_origin_waits_no_longer_for_questions_than_for_anything_else() {
    let (mut journal, _, mut connection) = forked();
    connection.to_origin.clear();
    let (mut out, at) = (Vec::new(), later(now(), Duration::from_secs(6)));
    connection.origin.poll(&mut journal, at, &mut out);
    assert!(matches!(connection.origin.end(), Some(SessionEnd::Diverged(_))));
}

/// Its disk takes a minute for each answer, and the mirror none for the next question.
#[test]
fn an_origin_gives_nobody_up_for_the_time_that_its_own_disk_takes() {
    let (mut mirror, mut at) = (ModelMirror::default(), now());
    Connection::new(&mirror, at).settle(&mut filled(90, 15), &mut mirror, at);
    let mut journal = filled(90, 16);
    let mut connection = Connection::new(&mirror, at);
    connection.mirror.take_output(at, &mut connection.to_origin);
    let mut asked = 0;
    while connection.origin.end().is_none() {
        connection.hear_mirror(usize::MAX, at);
        let is_on_disk = connection.origin.wants().is_some() || asked > 0;
        let out = &mut connection.to_mirror;
        connection.origin.poll(&mut journal, at, out);
        at = later(at, Duration::from_secs(if is_on_disk { 60 } else { 0 }));
        connection.origin.came_back(at);
        connection.origin.poll(&mut journal, at, out);
        assert_eq!(connection.origin.end(), None, "after {asked} questions");
        // Not so the mirror, for whom no time passes here.
        connection.hear_origin(usize::MAX, &mut mirror, now());
        connection.mirror.take_output(now(), &mut connection.to_origin);
        match connection.mirror.end() {
            None => asked += u32::from(connection.mirror.expected() == "PROBED"),
            Some(_) => break,
        }
    }
    assert!(asked > 0);
    // It isn't waited for any longer than always, and no turn of the disk's makes that longer.
    for (seconds, waits) in [(3, true), (4, true), (5, false)] {
        let late = later(at, Duration::from_secs(seconds));
        connection.origin.came_back(late);
        connection.origin.poll(&mut journal, late, &mut Vec::new());
        assert_eq!(connection.origin.end().is_none(), waits, "{seconds} s");
    }
}

/// Whatever is done with the connection meanwhile.
#[test]
fn a_lease_tells_when_its_subscriber_was_heard_last() {
    let (mut journal, mut mirror, start) = (filled(9, 15), ModelMirror::default(), now());
    let mut connection = Connection::new(&mirror, start);
    connection.settle(&mut journal, &mut mirror, start);
    let heard_at_us = |origin: &OriginSession| origin.lease().unwrap().heard_at_us;
    assert_eq!(heard_at_us(&connection.origin), start.unix_us);
    let [second, fourth] = [2, 4].map(|seconds| later(start, Duration::from_secs(seconds)));
    connection.mirror.on_time(second);
    connection.mirror.take_output(second, &mut connection.to_origin);
    connection.hear_mirror(usize::MAX, second);
    connection.origin.came_back(fourth);
    connection.origin.poll(&mut journal, fourth, &mut Vec::new());
    assert_eq!(heard_at_us(&connection.origin), second.unix_us);
}

/// A mirror knows only that it has less: its origin alone knows that there is no more.
#[test]
fn a_mirror_that_is_behind_its_subscriber_says_not_yet_and_never_ahead() {
    let (mut journal, mut mirror) = (filled(9, 15), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    journal.reopened_with(4);
    let mut connection = Connection::new(&mirror, now());
    let config = OriginConfig { role: Role::Mirror, ..origin_config() };
    connection.origin = OriginSession::new(config, now());
    connection.settle(&mut journal, &mut mirror, now());
    match connection.mirror.end() {
        Some(SessionEnd::Peer(failure)) => assert_eq!(failure.code, ErrorCode::NOT_YET),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_removed_is_answered_with_where_the_journal_begins_and_where_else_there_is_more() {
    let (mut journal, mut mirror) = (filled(9, 16), ModelMirror::default());
    Connection::new(&mirror, now()).settle(&mut journal, &mut mirror, now());
    mirror.batches.truncate(3);
    journal.removed = 5;
    let mut connection = Connection::new(&mirror, now());
    connection.settle(&mut journal, &mut mirror, now());
    match connection.mirror.end() {
        Some(SessionEnd::Truncated(at)) => {
            assert_eq!((at.first, at.start), (journal.start().position, Some(journal.start())));
            assert_eq!(at.sources, origin_config().sources);
        }
        other => panic!("{other:?}"),
    }
}

mod golden;
