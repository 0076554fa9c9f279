use proptest::prelude::*;

use super::*;
use crate::event::{NewEvent, Revision, StreamId};
use crate::format::record;
use crate::position::Incarnation;
use crate::shipping::filter::{FeedFilter, FeedPart};

fn end(offset: u64, position: u64) -> Checkpoint {
    Checkpoint {
        journal: JournalId::from_bytes([0x0A; 16]),
        epoch: 3,
        incarnation: Incarnation::new(0x1122_3344_5566_7788),
        offset,
        position: Position::new(position),
        chain: Chain::from_bytes([0x0C; 16]),
    }
}

/// One of each kind of control frame, with every optional part once present and once absent.
fn control_frames() -> Vec<Message<'static>> {
    let witness = Witness { offset: 640, position: Position::new(9), chain: Chain::default() };
    let diverged = |common| Diverged {
        divergence: Divergence::Fork,
        at_witness: true,
        speaker: Speaker::RelayBehind,
        common,
        end: end(1024, 12),
    };
    let common = Common { position: Position::new(4), chain: Chain::from_bytes([4; 16]) };
    let node = NodeId::from_bytes([0x0D; 16]);
    vec![
        Message::Hello(Hello {
            versions: VersionRange { min: 1, max: 4 },
            features: 5,
            max_frame: FRAME_BYTES_MAX,
            node: Some(node),
            nonce: [7; 16],
            authentication: Authentication::Token(Presented::new(b"hwt_secret")),
            agent: "headwater/test".into(),
        }),
        Message::Welcome(Welcome {
            version: 1,
            heartbeat_ms: 1000,
            max_frame: FRAME_BYTES_MIN,
            features: 0,
            node,
            session: [8; 16],
            nonce: [7; 16],
            now_us: -1,
        }),
        Message::Subscribe(Subscribe { from: None, witness: None, window_bytes: 1 }),
        Message::Subscribe(Subscribe {
            from: Some(end(64, 1)),
            witness: Some(witness),
            window_bytes: 8 << 20,
        }),
        Message::Subscribed(Subscribed {
            end: end(0, 0),
            first_position: Position::START,
            path: vec![],
        }),
        Message::Subscribed(Subscribed {
            end: end(64, 1),
            first_position: Position::new(3),
            path: vec![node; PATH_NODES_MAX],
        }),
        Message::SubscribeFeed(
            Subscribe { from: None, witness: None, window_bytes: 1 },
            FeedRequest { terms: FeedTerms { shape: None, ..terms() }, goes_on: false },
        ),
        Message::SubscribeFeed(
            Subscribe { from: Some(end(64, 1)), witness: None, window_bytes: 1 },
            FeedRequest { terms: terms(), goes_on: true },
        ),
        Message::SubscribedFeed(
            Subscribed { end: end(64, 1), first_position: Position::START, path: vec![node] },
            terms(),
        ),
        Message::Skip(Skip {
            from: Position::new(2),
            behind: end(64, 3),
            origin_end: OriginEnd { offset: 64, position: Position::new(3) },
        }),
        Message::Diverged(diverged(None)),
        Message::Diverged(diverged(Some(common))),
        Message::Probe(Probe { positions: (0..64).map(Position::new).collect() }),
        Message::Probed(Probed { ends: vec![None; 64] }),
        Message::Probed(Probed { ends: vec![Some(end(64, 1).into()), None] }),
        Message::Truncated(Truncated { start: end(64, 1), sources: vec![] }),
        Message::Truncated(Truncated {
            start: end(64, 1),
            sources: vec!["127.0.0.1:7001".into(); SOURCES_MAX],
        }),
        Message::Heartbeat(Heartbeat {
            end: end(128, 2),
            now_us: 1_700_000_000_000_000,
            speaker: Speaker::RelayApart,
            echo: 1 << 40,
        }),
        ack(None, 0),
        ack(Some(Position::new(1)), u64::MAX),
        Message::Error(Failure::new(ErrorCode::PROTOCOL, "")),
        Message::Error(Failure {
            retry_after_ms: 250,
            position: Some(Position::new(77)),
            ..Failure::new(ErrorCode::CORRUPT, "damage")
        }),
        Message::GoAway(GoAway { reconnect_after_ms: 100 }),
        Message::Segment(&[0x5A; HEADER_PAGE_BYTES]),
    ]
}

fn ack(applied: Option<Position>, echo: u64) -> Message<'static> {
    Message::Ack(Ack { mirrored: end(128, 2), applied, echo })
}

fn terms() -> FeedTerms {
    let part = FeedPart::categories(["order", "stock"]).and_types(["placed"]).and_tags(["eu"]);
    let shape = Some(ShapeId { name: "public".into(), version: 7 });
    FeedTerms { filter: FeedFilter::any_of([part, FeedPart::types(["x"])]), shape }
}

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn reader() -> FrameReader {
    let mut reader = FrameReader::new();
    reader.allow_data(FRAME_BYTES_MAX);
    reader
}

#[test]
fn every_frame_reads_back_as_it_was_written() {
    for message in control_frames() {
        let mut reader = reader();
        reader.push(&encoded(&message));
        assert_eq!(reader.next_message().unwrap().as_ref(), Some(&message));
        assert!(reader.next_message().unwrap().is_none() && !reader.is_inside_a_frame());
    }
}

#[test]
fn a_frame_cut_anywhere_is_waited_for() {
    for message in control_frames() {
        let bytes = encoded(&message);
        for len in 0..bytes.len() {
            let mut reader = reader();
            reader.push(&bytes[..len]);
            assert_eq!(reader.next_message(), Ok(None), "{} at {len}", message.name());
            reader.push(&bytes[len..]);
            assert_eq!(reader.next_message().unwrap().as_ref(), Some(&message));
        }
    }
}

#[test]
fn every_flipped_bit_of_a_control_frame_is_noticed() {
    for message in control_frames() {
        let bytes = encoded(&message);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut reader = reader();
            reader.push(&damaged);
            let read = reader.next_message();
            // A longer length is waited for; everything else is refused at once.
            assert!(!matches!(read, Ok(Some(_))), "{} bit {bit}: {read:?}", message.name());
            assert!(read.is_err() || bit < 32, "{} bit {bit} waits", message.name());
        }
    }
}

#[test]
fn every_flipped_bit_in_front_of_the_batches_of_a_data_frame_is_noticed() {
    let origin_end = OriginEnd { offset: 4096, position: Position::new(10) };
    let data = Data { offset: 64, origin_end, continued: true, bytes: &[0xB7; 256] };
    let bytes = encoded(&Message::Data(data));
    for bit in 0..(FRAME_HEADER_BYTES + DATA_FIXED_BYTES as usize) * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let mut reader = reader();
        reader.push(&damaged);
        assert!(reader.next_message().is_err(), "bit {bit}");
    }
}

#[test]
fn a_length_beyond_the_limit_is_refused_from_the_header_alone() {
    for (kind, limit) in
        [(kind::HELLO, CONTROL_BYTES_MAX), (kind::DATA, FRAME_BYTES_MAX), (0x77, 4096)]
    {
        for length in [limit + 1, u32::MAX] {
            let header = FrameHeader { length, kind, flags: FLAG_OPTIONAL, sub: 0, crc: 0 };
            let mut reader = reader();
            reader.push(&header.encode());
            assert_eq!(reader.next_message(), Err(FrameError::TooLong { kind, length, limit }));
        }
    }
}

#[test]
fn data_is_refused_until_it_is_allowed() {
    let origin_end = OriginEnd { offset: 64, position: Position::new(1) };
    let data = Data { offset: 0, origin_end, continued: false, bytes: &[1] };
    let mut reader = FrameReader::new();
    reader.push(&encoded(&Message::Data(data)));
    assert!(matches!(reader.next_message(), Err(FrameError::TooLong { limit: 0, .. })));
}

fn unknown(kind: u8, flags: u8) -> Vec<u8> {
    let mut out = Vec::new();
    let frame = FrameWriter::begin(&mut out);
    out.extend_from_slice(b"from the future");
    frame.finish(&mut out, kind, flags);
    out
}

#[test]
fn unknown_frames_are_passed_over_only_if_they_are_optional() {
    let heartbeat = Message::Heartbeat(Heartbeat {
        end: end(128, 2),
        now_us: 0,
        speaker: Speaker::Origin,
        echo: 0,
    });
    let mut reader = reader();
    reader.push(&[unknown(0x77, FLAG_OPTIONAL), encoded(&heartbeat)].concat());
    assert_eq!(reader.next_message(), Ok(Some(heartbeat)));
    reader.push(&unknown(0x77, 0));
    assert_eq!(reader.next_message(), Err(FrameError::UnknownType(0x77)));
}

#[test]
fn a_longer_hello_is_understood_and_any_other_longer_frame_is_not() {
    for message in control_frames() {
        let mut out = Vec::new();
        let frame = FrameWriter::begin(&mut out);
        out.extend_from_slice(&encoded(&message)[FRAME_HEADER_BYTES..]);
        out.push(0);
        frame.finish(&mut out, message.kind(), 0);
        let mut reader = reader();
        reader.push(&out);
        match (&message, reader.next_message()) {
            (Message::Hello(_), Ok(read)) => assert_eq!(read.as_ref(), Some(&message)),
            (Message::Segment(_), read) => assert!(matches!(read, Err(FrameError::TooLong { .. }))),
            (_, read) => assert!(matches!(read, Err(FrameError::Malformed { .. })), "{read:?}"),
        }
    }
}

#[test]
fn a_data_frame_that_claims_bytes_beyond_the_durable_end_is_refused() {
    let origin_end = OriginEnd { offset: 99, position: Position::new(1) };
    for offset in [0, u64::MAX] {
        let data = Data { offset, origin_end, continued: false, bytes: &[0; 100] };
        let mut reader = reader();
        reader.push(&encoded(&Message::Data(data)));
        assert!(matches!(reader.next_message(), Err(FrameError::Malformed { frame: "DATA", .. })));
    }
}

#[test]
fn texts_are_cut_between_characters() {
    let failure = Failure::new(ErrorCode::STORAGE, "ä".repeat(400));
    let mut reader = reader();
    reader.push(&encoded(&Message::Error(failure)));
    match reader.next_message() {
        Ok(Some(Message::Error(read))) => assert_eq!(read.detail, "ä".repeat(256)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn control_characters_never_reach_a_terminal() {
    let failure = Failure::new(ErrorCode::STORAGE, "a\u{1b}[2Jb");
    let mut frame = encoded(&Message::Error(failure));
    let mut reader = reader();
    reader.push(&frame);
    match reader.next_message() {
        Ok(Some(Message::Error(read))) => assert_eq!(read.detail, "a [2Jb"),
        other => panic!("{other:?}"),
    }
    let escape = frame.iter().position(|&byte| byte == b' ').unwrap();
    frame[escape] = 0x1B;
    let payload = frame.split_off(FRAME_HEADER_BYTES);
    let mut forged = Vec::new();
    let writer = FrameWriter::begin(&mut forged);
    forged.extend_from_slice(&payload);
    writer.finish(&mut forged, kind::ERROR, 0);
    reader.push(&forged);
    assert!(matches!(reader.next_message(), Err(FrameError::Malformed { frame: "ERROR", .. })));
}

#[test]
fn the_largest_batch_with_its_groups_padding_is_not_too_long() {
    let claimed = |len: u32| {
        let mut header = [0; 64];
        header[60..].copy_from_slice(&len.to_le_bytes());
        claimed_batch_len(&header)
    };
    let largest = PADDED_BYTES_LIMIT;
    assert_eq!(claimed(largest), Some(largest as usize));
    assert_eq!(claimed(largest + 1), None);
    assert_eq!(claimed(127), None);
}

#[test]
fn version_ranges_meet_at_their_highest_common_version() {
    let range = |min, max| VersionRange { min, max };
    assert_eq!(range(1, 1).common(range(1, 2)), Some(1));
    assert_eq!(range(1, 3).common(range(2, 9)), Some(3));
    assert_eq!(range(1, 1).common(range(2, 3)), None);
    assert_eq!(range(3, 2).common(range(1, 9)), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn frames_survive_any_cutting_of_the_stream(
        order in prop::collection::vec(0..16_usize, 1..20),
        cuts in prop::collection::vec(1..700_usize, 1..50),
    ) {
        let origin_end = OriginEnd { offset: 1 << 20, position: Position::new(99) };
        let bulk = vec![0x42; 3000];
        let mut frames = control_frames();
        frames.push(Message::Data(Data { offset: 7, origin_end, continued: false, bytes: &bulk }));
        let sent: Vec<_> = order.iter().map(|&which| frames[which % frames.len()].clone()).collect();
        let bytes: Vec<u8> = sent.iter().flat_map(encoded).collect();
        let (mut reader, mut at, mut read) = (reader(), 0, 0);
        for cut in cuts.iter().cycle() {
            let to = bytes.len().min(at + cut);
            reader.push(&bytes[at..to]);
            while let Some(message) = reader.next_message().unwrap() {
                prop_assert_eq!(&message, &sent[read]);
                read += 1;
            }
            at = to;
            if at == bytes.len() {
                break;
            }
        }
        prop_assert_eq!(read, sent.len());
    }

    #[test]
    fn random_bytes_never_panic_and_never_pile_up(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..30),
    ) {
        let mut reader = reader();
        for chunk in chunks {
            reader.push(&chunk);
            while let Ok(Some(_)) = reader.next_message() {}
            prop_assert!(reader.buffer.len() <= FRAME_BYTES_MAX as usize + FRAME_HEADER_BYTES + 300);
        }
    }

    /// The checksum is made to fit, so that the decoders behind it are reached.
    #[test]
    fn random_payloads_with_right_checksums_never_panic(
        which in 0..0x20_u8,
        flags in 0..4_u8,
        payload in prop::collection::vec(any::<u8>(), 0..300),
        start in 0..20_usize,
    ) {
        let frames = control_frames();
        let template = encoded(&frames[start % frames.len()]);
        let kind = if which == 0 { template[4] } else { which };
        let mut out = Vec::new();
        let frame = FrameWriter::begin(&mut out);
        let front = &template[FRAME_HEADER_BYTES..];
        out.extend_from_slice(&front[..front.len().min(payload.len())]);
        out.extend_from_slice(&payload);
        frame.finish(&mut out, kind, flags);
        let mut reader = reader();
        reader.push(&out);
        while let Ok(Some(message)) = reader.next_message() {
            // What is accepted means the same when it is written again.
            let again = encoded(&message);
            prop_assert!(message.kind() == kind::HELLO || again.len() == out.len());
        }
    }
}

/// What a run is made of: for each event its position, and how long its payload is.
fn run_of(from: u64, events: &[(u64, usize)], to: u64) -> Vec<u8> {
    let mut run = RunWriter::new(Position::new(from));
    for (position, len) in events {
        let event = NewEvent::raw("happened", vec![*len as u8; *len]).unwrap();
        let mut bytes = Vec::new();
        record::encode(&mut bytes, &event, &StreamId::new("a").unwrap(), Revision::FIRST);
        run.add(Position::new(*position), 5, &bytes);
    }
    run.finish(&end(64 * to, to))
}

proptest! {
    /// Runs survive being cut into frames, account for each position, and no flipped bit is taken in.
    #[test]
    fn a_run_accounts_for_every_position_and_survives_being_sent_in_parts(
        from in 0_u64..1000,
        steps in proptest::collection::vec((0_u64..5, 0_usize..50), 1..20),
        behind in 0_u64..9,
        max_frame in 40_u32..200,
        flip in any::<prop::sample::Index>(),
    ) {
        let mut next = from;
        let events: Vec<_> = steps
            .iter()
            .enumerate()
            .map(|(n, (step, len))| {
                // 0: once more at the place of the one in front.
                let position = if n == 0 || *step > 0 { next + step.saturating_sub(1) } else { next - 1 };
                next = position + 1;
                (position, *len)
            })
            .collect();
        let to = next + behind;
        let bytes = run_of(from, &events, to);
        let mut frames = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let origin = OriginEnd { offset: 64 * to, position: Position::new(to) };
            at += put_part(&mut frames, Position::new(from), &bytes, at, max_frame, origin);
        }
        let mut reader = reader();
        reader.push(&frames);
        let mut together = Vec::new();
        while let Some(message) = reader.next_message().unwrap() {
            let Message::Events(part) = message else { panic!("{message:?}") };
            prop_assert_eq!(part.at as usize, together.len());
            together.extend_from_slice(part.bytes);
            prop_assert_eq!(part.continued, together.len() < bytes.len());
        }
        let run = Run::decode(Position::new(from), together).unwrap();
        let read: Vec<_> = run.entries().map(|entry| {
            let entry = entry.unwrap();
            (entry.position.get(), entry.record.payload.len())
        }).collect();
        prop_assert_eq!(read, events);
        prop_assert_eq!(run.behind, end(64 * to, to));
        let bit = flip.index(8 * bytes.len());
        let mut flipped = bytes;
        flipped[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Run::decode(Position::new(from), flipped).is_err());
    }
}
