//! Sessions for filtered feeds: every position accounted for once, whatever is cut, lost or crashed.

use std::cell::Cell;
use std::path::Path;

use super::*;
use crate::event::EventId;
use crate::shipping::filter::{FeedFilter, FeedPart};
use crate::shipping::message::{ErrorCode, FeedRequest, FeedTerms, Run, Skip};
use crate::shipping::security::{Access, Security, SecurityOptions};
use crate::shipping::session::mirror::SKIPS_MAX;
use crate::shipping::session::model::TYPES;

/// What a subscriber has: it loses what it hasn't made durable.
struct Subscriber {
    filter: FeedFilter,
    terms: Option<FeedTerms>,
    events: Vec<(u64, EventId)>,
    covered: Option<Checkpoint>,
    durable: (usize, Option<Checkpoint>),
}

impl Subscriber {
    fn new(filter: FeedFilter) -> Self {
        Self { filter, terms: None, events: Vec::new(), covered: None, durable: (0, None) }
    }

    fn session(&self, now: Now) -> MirrorSession {
        let resume = self.durable.1.map(|end| Resume { end, witness: None });
        let wanted = FeedTerms { filter: self.filter.clone(), shape: None };
        let terms = self.terms.clone().unwrap_or(wanted);
        let request = FeedRequest { terms, goes_on: resume.is_some() };
        MirrorSession::fed(mirror_config(resume), request, now)
    }

    fn take(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Granted(end, terms) => {
                assert!(self.terms.as_ref().is_none_or(|had| *had == terms));
                self.terms = Some(terms);
                self.covered.get_or_insert(Mark::start(end.journal).end);
            }
            Delivery::Run(run) => {
                assert_eq!(Some(run.from), self.covered.map(|end| end.position));
                self.add(&run);
                self.covered = Some(run.behind);
            }
            Delivery::Skipped(behind) => self.covered = Some(behind),
            other => panic!("{other:?}"),
        }
    }

    fn add(&mut self, run: &Run) {
        for entry in run.entries() {
            let entry = entry.unwrap();
            self.events.push((entry.position.get(), entry.record.id));
        }
    }

    fn sync(&mut self) -> Option<Checkpoint> {
        self.durable = (self.events.len(), self.covered);
        self.covered
    }

    fn crash(&mut self) {
        self.events.truncate(self.durable.0);
        self.covered = self.durable.1;
        if self.covered.is_none() {
            self.terms = None;
        }
    }
}

struct Wire {
    origin: OriginSession,
    subscriber: MirrorSession,
    to_origin: Vec<u8>,
    to_subscriber: Vec<u8>,
}

impl Wire {
    fn new(subscriber: &mut Subscriber, now: Now) -> Self {
        subscriber.crash(); // what wasn't acknowledged comes again
        let origin = OriginSession::new(OriginConfig { data_bytes: 900, ..origin_config() }, now);
        let (to_origin, to_subscriber) = (Vec::new(), Vec::new());
        Self { origin, subscriber: subscriber.session(now), to_origin, to_subscriber }
    }

    fn speak(&mut self, journal: &mut ModelJournal, now: Now) {
        self.subscriber.on_time(now);
        self.subscriber.take_output(now, &mut self.to_origin);
        self.origin.poll(journal, now, &mut self.to_subscriber);
    }

    fn hear_origin(&mut self, up_to: usize, subscriber: &mut Subscriber, now: Now) {
        let up_to = up_to.min(self.to_subscriber.len());
        let moved: Vec<u8> = self.to_subscriber.drain(..up_to).collect();
        let mut deliveries = Vec::new();
        self.subscriber.on_bytes(&moved, now, &mut deliveries);
        deliveries.into_iter().for_each(|delivery| subscriber.take(delivery));
    }

    fn hear_subscriber(&mut self, up_to: usize, now: Now) {
        let up_to = up_to.min(self.to_origin.len());
        let moved: Vec<u8> = self.to_origin.drain(..up_to).collect();
        self.origin.on_bytes(&moved, now);
    }

    fn settle(&mut self, journal: &mut ModelJournal, subscriber: &mut Subscriber, mut now: Now) {
        for _ in 0..10_000 {
            now = later(now, Duration::from_millis(300)); // what is passed over is told after 200
            self.speak(journal, now);
            self.hear_origin(usize::MAX, subscriber, now);
            self.hear_subscriber(usize::MAX, now);
            if let Some(end) = subscriber.sync() {
                self.subscriber.on_durable(end);
            }
            if subscriber.covered == Some(journal.end()) {
                return;
            }
        }
        let ends = (self.origin.end(), self.subscriber.end());
        panic!("the session doesn't settle: {ends:?}");
    }
}

fn check(journal: &ModelJournal, subscriber: &Subscriber) {
    let Some(covered) = subscriber.covered else { return };
    let batches = journal.batches[..journal.durable].iter();
    let batches = batches.take_while(|batch| batch.end.position <= covered.position).count();
    assert_eq!(covered, journal.end_of_batches(batches), "no batch end, or not durable");
    assert_eq!(subscriber.events, journal.events_of(&subscriber.filter, batches));
}

/// As with mirrors: at every step the subscriber has exactly what the filter lets through of what it has accounted for.
#[test]
fn whatever_happens_a_feed_is_what_the_filter_lets_through() {
    for seed in 0..200 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let types = TYPES.iter().copied().filter(|_| rng.bool());
        let filter = FeedFilter::from(FeedPart::types(types.collect::<Vec<_>>()));
        let (mut journal, mut subscriber) = (ModelJournal::new(JOURNAL), Subscriber::new(filter));
        let mut now = now();
        let mut wire = Wire::new(&mut subscriber, now);
        for _ in 0..300 {
            match rng.u32(..100) {
                0..20 => journal.append_events(&mut rng),
                20..32 => journal.sync(),
                32..50 => wire.speak(&mut journal, now),
                50..70 => wire.hear_origin(rng.usize(1..6000), &mut subscriber, now),
                70..82 => wire.hear_subscriber(rng.usize(1..300), now),
                82..90 => {
                    if let Some(end) = subscriber.sync() {
                        wire.subscriber.on_durable(end);
                    }
                }
                90..95 => now = later(now, Duration::from_millis(rng.u64(..500))),
                95..98 => wire = Wire::new(&mut subscriber, now),
                _ => {
                    journal.reopened_with(journal.durable);
                    wire = Wire::new(&mut subscriber, now);
                }
            }
            check(&journal, &subscriber);
            if let Some(end) = wire.subscriber.end().or(wire.origin.end()) {
                assert!(matches!(end, SessionEnd::Timeout(_) | SessionEnd::Peer(_)), "{end:?}");
                wire = Wire::new(&mut subscriber, now);
            }
        }
        journal.sync();
        Wire::new(&mut subscriber, now).settle(&mut journal, &mut subscriber, now);
        check(&journal, &subscriber);
        assert_eq!(subscriber.covered, Some(journal.end()));
    }
}

/// An origin that was restored and has grown again, by any number of batches, also of the same events.
#[test]
fn a_feed_of_a_history_that_is_gone_is_told_for_every_tail_length() {
    for (kept, regrown) in (0..=6).flat_map(|kept| (0..6).map(move |regrown| (kept, regrown))) {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut journal = ModelJournal::new(JOURNAL);
        (0..6).for_each(|_| journal.append_events(&mut rng));
        journal.sync();
        let original = journal.clone();
        let mut subscriber = Subscriber::new(FeedFilter::from(FeedPart::types(["a", "c"])));
        Wire::new(&mut subscriber, now()).settle(&mut journal, &mut subscriber, now());
        let had = subscriber.events.clone();
        journal.reopened_with(kept);
        for batch in original.batches.iter().cycle().take(regrown) {
            let decoded = BatchRef::decode(&batch.bytes, batch.page.header.salt).unwrap();
            journal.append_counted(decoded.body(), decoded.header.count);
        }
        journal.sync();
        let mut wire = Wire::new(&mut subscriber, now());
        for _ in 0..4 {
            wire.speak(&mut journal, now());
            wire.hear_origin(usize::MAX, &mut subscriber, now());
            wire.hear_subscriber(usize::MAX, now());
        }
        match (kept, wire.subscriber.end()) {
            (6, None) => {}
            (0..6, Some(SessionEnd::Diverged(at))) => {
                let ahead = at.divergence == Divergence::Ahead;
                assert_eq!(ahead, journal.end().offset < subscriber.covered.unwrap().offset);
            }
            other => panic!("{kept}, {regrown}: {other:?}"),
        }
        if kept < 6 {
            assert_eq!(subscriber.events, had);
        }
    }
}

/// An origin that only ever says that there is nothing fills nobody's memory, as long as nothing of it was taken.
#[test]
fn more_skips_than_anybody_needs_are_refused_until_some_are_acknowledged() {
    let mut journal = ModelJournal::new(JOURNAL);
    journal.append_events(&mut fastrand::Rng::with_seed(1));
    journal.sync();
    let mut subscriber = Subscriber::new(FeedFilter::from(FeedPart::types(["none"])));
    let mut wire = Wire::new(&mut subscriber, now());
    wire.settle(&mut journal, &mut subscriber, now());
    let begin = subscriber.covered.unwrap();
    let place = |n: u64| Checkpoint {
        offset: begin.offset + 64 * n,
        position: begin.position.advance(n),
        ..begin
    };
    let far = OriginEnd::from(&place(1 << 40));
    let skips = |wire: &mut Wire, from: u64, to: u64| {
        let (mut out, mut deliveries) = (Vec::new(), Vec::new());
        for n in from..to {
            let (from, behind) = (place(n).position, place(n + 1));
            Message::Skip(Skip { from, behind, origin_end: far }).encode(&mut out);
        }
        wire.subscriber.on_bytes(&out, now(), &mut deliveries);
        deliveries.len() as u64
    };
    let limit = u64::from(SKIPS_MAX);
    assert_eq!((skips(&mut wire, 0, limit), wire.subscriber.end()), (limit, None));
    // What is durable makes room, and nothing else does.
    wire.subscriber.on_durable(place(limit - 1));
    assert_eq!((skips(&mut wire, limit, 2 * limit - 1), wire.subscriber.end()), (limit - 1, None));
    assert_eq!(skips(&mut wire, 2 * limit - 1, 2 * limit + 2), 0);
    let refused = Violation::Skips { limit: SKIPS_MAX };
    assert_eq!(wire.subscriber.end(), Some(&SessionEnd::Violation(refused)));
}

/// A journal as one of the server's two sides sees it.
struct Seen<'a> {
    journal: &'a mut ModelJournal,
    may_wait: bool,
    /// So many batches are durable now; one more each time it is looked.
    grows: Option<Cell<usize>>,
}

impl Source for Seen<'_> {
    fn end(&self) -> Checkpoint {
        let Some(grows) = &self.grows else { return self.journal.end() };
        grows.set((grows.get() + 1).min(self.journal.durable));
        self.journal.end_of_batches(grows.get())
    }

    fn start(&self) -> Checkpoint {
        self.journal.start()
    }

    fn is_closed(&self) -> bool {
        false
    }

    fn may_wait(&self) -> bool {
        self.may_wait
    }

    fn compare(&mut self, checkpoint: &Checkpoint) -> Result<Comparison, SourceError> {
        self.journal.compare(checkpoint)
    }

    fn compare_witness(&mut self, witness: &Witness) -> Result<Comparison, SourceError> {
        self.journal.compare_witness(witness)
    }

    fn batch_end_at(&mut self, position: Position) -> Result<Option<Link>, SourceError> {
        self.journal.batch_end_at(position)
    }

    fn seek(&mut self, from: Position) -> Result<(), SourceError> {
        self.journal.seek(from)
    }

    fn next_batch(
        &mut self,
        at: &Checkpoint,
    ) -> Result<Option<(BatchRef<'_>, Option<&SegmentPage>)>, SourceError> {
        match &self.grows {
            Some(known) if at.offset >= self.journal.end_of_batches(known.get()).offset => Ok(None),
            _ => self.journal.next_batch(at),
        }
    }
}

/// Writes an access list that lets everybody here have feeds of these types.
fn allow(list: &Path, types: &[&str]) {
    let filter = FeedFilter::from(FeedPart::types(types.iter().copied()));
    let may = serde_json::json!({ "journal": "*", "mode": "filtered", "filter": filter });
    let peer = serde_json::json!({ "name": "here", "anonymous": "loopback", "may": [may] });
    std::fs::write(list, serde_json::json!({ "peers": [peer] }).to_string()).unwrap();
}

/// The rights are taken away after the loop has seen that they allow something of it, and before the catch-up threads send
/// the first event. What exactly they allow, nobody finds out before: comparing long filters held up the loop.
#[test]
fn rights_that_are_taken_away_before_the_first_event_of_a_feed_count() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("access.json");
    for is_taken in [false, true] {
        allow(&list, &["a"]);
        let access = Access::File(list.clone());
        let security = Security::new(SecurityOptions { tls: None, access }).unwrap();
        let mut journal = ModelJournal::new(JOURNAL);
        journal.append_events(&mut fastrand::Rng::with_seed(1));
        journal.sync();
        let subscriber = Subscriber::new(FeedFilter::from(FeedPart::types(["a"])));
        let (mut session, now) = (subscriber.session(now()), now());
        let gate = Gate::new(Some(security.clone()), true);
        let mut origin = OriginSession::new(OriginConfig { gate, ..origin_config() }, now);
        let (mut to_origin, mut to_subscriber) = (Vec::new(), Vec::new());
        let mut granted = |origin: &mut OriginSession, may_wait: bool, deliveries: &mut Vec<_>| {
            for _ in 0..4 {
                session.take_output(now, &mut to_origin);
                origin.on_bytes(&std::mem::take(&mut to_origin), now);
                let mut source = Seen { journal: &mut journal, may_wait, grows: None };
                origin.poll(&mut source, now, &mut to_subscriber);
                session.on_bytes(&std::mem::take(&mut to_subscriber), now, deliveries);
            }
        };
        let mut deliveries = Vec::new();
        granted(&mut origin, false, &mut deliveries);
        assert!(origin.may_have(&JOURNAL) && origin.status().feed.is_none(), "not granted yet");
        assert!(deliveries.is_empty());
        if is_taken {
            allow(&list, &["b"]);
            security.reload().unwrap();
        }
        granted(&mut origin, true, &mut deliveries);
        if is_taken {
            assert!(deliveries.is_empty(), "{deliveries:?}");
            let end = origin.end().cloned();
            assert!(matches!(end, Some(SessionEnd::Own(it)) if it.code == ErrorCode::DENIED));
        } else {
            assert!(matches!(deliveries.first(), Some(Delivery::Granted(..))), "{deliveries:?}");
        }
    }
}

/// Comparing long filters with other rights held up the loop, once for each feed after every reload.
#[test]
fn other_rights_are_compared_with_feeds_by_a_source_that_may_wait_and_the_same_ones_by_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("access.json");
    let nobody = || std::fs::write(&list, serde_json::json!({ "peers": [] }).to_string()).unwrap();
    let cases =
        [(Some(&["a", "b"][..]), true), (Some(&["b"]), true), (Some(&["a"]), false), (None, false)];
    for ((allowed, takes_long), is_blocked) in
        cases.into_iter().flat_map(|it| [(it, false), (it, true)])
    {
        allow(&list, &["a"]);
        let access = Access::File(list.clone());
        let security = Security::new(SecurityOptions { tls: None, access }).unwrap();
        let mut journal = ModelJournal::new(JOURNAL);
        journal.append_events(&mut fastrand::Rng::with_seed(1));
        journal.sync();
        let subscriber = Subscriber::new(FeedFilter::from(FeedPart::types(["a"])));
        let (mut session, now) = (subscriber.session(now()), now());
        let gate = Gate::new(Some(security.clone()), true);
        let mut origin = OriginSession::new(OriginConfig { gate, ..origin_config() }, now);
        let (mut to_origin, mut to_subscriber, mut deliveries) =
            (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..4 {
            session.take_output(now, &mut to_origin);
            origin.on_bytes(&std::mem::take(&mut to_origin), now);
            let mut source = Seen { journal: &mut journal, may_wait: true, grows: None };
            while origin.poll(&mut source, now, &mut to_subscriber) == Next::Write {}
            session.on_bytes(&std::mem::take(&mut to_subscriber), now, &mut deliveries);
        }
        assert!(matches!(deliveries.first(), Some(Delivery::Granted(..))), "{deliveries:?}");
        match allowed {
            Some(types) => allow(&list, types),
            None => nobody(),
        }
        security.reload().unwrap();
        // Whether it can be written to or not: it is left to somebody else.
        let mut look = |origin: &mut OriginSession, may_wait: bool| {
            let mut source = Seen { journal: &mut journal, may_wait, grows: None };
            match is_blocked {
                true => origin.on_time(now, may_wait).is_none(),
                false => origin.poll(&mut source, now, &mut to_subscriber) == Next::OnDisk,
            }
        };
        let case = format!("{allowed:?}, blocked: {is_blocked}");
        assert_eq!(look(&mut origin, false), takes_long, "{case}");
        assert_eq!(origin.end().is_some(), allowed.is_none(), "{case}");
        assert!(!look(&mut origin, true), "{case}");
        let is_revoked = !allowed.is_some_and(|types| types.contains(&"a"));
        let end = origin.end().cloned();
        let is_denied = matches!(&end, Some(SessionEnd::Own(it)) if it.code == ErrorCode::DENIED);
        assert_eq!((is_denied, end.is_some()), (is_revoked, is_revoked), "{case}: {end:?}");
        assert!(!look(&mut origin, false), "{case}: it is known");
    }
}

/// What is committed while a turn is taken is in the heartbeat or in none of its frames.
#[test]
fn the_end_that_a_feed_is_told_never_goes_back_also_if_it_moves_within_a_turn() {
    for types in [vec!["a", "b", "c"], vec!["a"], vec!["nothing of it"]] {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut journal = ModelJournal::new(JOURNAL);
        (0..200).for_each(|_| journal.append_events(&mut rng));
        journal.sync();
        let mut subscriber = Subscriber::new(FeedFilter::from(FeedPart::types(types)));
        let mut now = now();
        let mut wire = Wire::new(&mut subscriber, now);
        let known = Cell::new(0);
        for _ in 0..2000 {
            let mut source =
                Seen { journal: &mut journal, may_wait: true, grows: Some(known.clone()) };
            wire.subscriber.on_time(now);
            wire.subscriber.take_output(now, &mut wire.to_origin);
            wire.hear_subscriber(usize::MAX, now);
            wire.origin.poll(&mut source, now, &mut wire.to_subscriber);
            known.set(source.grows.map_or(0, Cell::into_inner));
            wire.hear_origin(usize::MAX, &mut subscriber, now);
            let ends = (wire.subscriber.end(), wire.origin.end());
            assert!(matches!(ends, (None, None)), "{ends:?}");
            if let Some(end) = subscriber.sync() {
                wire.subscriber.on_durable(end);
            }
            now = later(now, Duration::from_millis(700)); // skips and heartbeats fall due together
        }
        assert_eq!(subscriber.covered, Some(journal.end()));
    }
}
