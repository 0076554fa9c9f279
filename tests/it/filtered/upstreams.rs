//! A feed that may be had at several addresses: one that serves is enough, and nothing is lost or comes twice on the way from
//! one to another.

use headwater::shipping::{Addresses, Mirror};

use super::*;

/// An origin, and a relay of it that gets the journal by a way of its own.
struct Both {
    dir: tempfile::TempDir,
    origin: Origin,
    /// Of the origin, for the relay alone.
    way: Option<Server>,
    relay: Mirror,
    /// Of the relay.
    server: Option<Server>,
    address: SocketAddr,
}

impl Both {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::start(dir.path(), small(), in_small_parts());
        let way = serve_at(origin.store().journal(), SocketAddr::from(([127, 0, 0, 1], 0)));
        let (place, address) = (dir.path().join("relay"), way.local_addr().to_string());
        let options = FollowOptions { deadlines: impatient(), ..options() };
        let relay = follow(Arc::new(OsFs), &place, address, options).unwrap();
        let server = serve(&relay, "127.0.0.1:0", in_small_parts()).unwrap();
        let address = server.local_addr();
        Self { dir, origin, relay, way: Some(way), server: Some(server), address }
    }

    fn addresses(&self) -> [String; 2] {
        [self.address, self.origin.address].map(|address| address.to_string())
    }

    /// Only one of both serves any more: the relay, or the origin.
    fn only(&mut self, relay: bool) {
        let (journal, address) = (self.origin.store().journal().clone(), self.origin.address);
        if relay {
            self.server
                .get_or_insert_with(|| serve(&self.relay, self.address, in_small_parts()).unwrap());
            self.origin.server.take().into_iter().for_each(Server::shutdown);
        } else {
            self.origin.server.get_or_insert_with(|| serve_at(&journal, address));
            self.server.take().into_iter().for_each(Server::shutdown);
        }
    }

    fn feed(&self, addresses: impl Into<Addresses>, filter: &FeedFilter) -> Feed {
        let options = FollowOptions { deadlines: impatient(), ..options() };
        let place = self.dir.path().join("feed");
        follow_feed(Arc::new(OsFs), &place, addresses, filter.clone(), options).unwrap()
    }

    fn expected(&self, filter: &FeedFilter) -> Vec<Said> {
        expected(self.origin.store().journal(), filter)
    }
}

/// What is silent is noticed soon.
fn impatient() -> Deadlines {
    Deadlines { silence: Duration::from_secs(1), ..brisk() }
}

/// A session is cut off within what there is to send.
fn in_small_parts() -> ServeOptions {
    ServeOptions {
        frame_bytes: 8192,
        window_bytes_max: 20_000,
        deadlines: impatient(),
        ..ServeOptions::default()
    }
}

fn serve_at(journal: &Journal, address: SocketAddr) -> Server {
    serve(journal, address, in_small_parts()).unwrap()
}

fn until(what: &str, feed: &Feed, condition: impl Fn(&FeedStatus) -> bool) -> FeedStatus {
    let waited = feed.wait_until(SOON, condition);
    waited.unwrap_or_else(|error| panic!("{what}: {error}; {:?}", feed.status()))
}

fn placed() -> FeedFilter {
    FeedPart::types(["placed", "changed"]).into()
}

#[test]
fn a_feed_goes_on_with_the_next_upstream_without_a_gap_or_a_repetition() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let rng = &mut Rng::with_seed(seed);
    let mut both = Both::start();
    both.origin.append(rng, 30);
    let feed = both.feed(both.addresses(), &placed());
    let journal = converged(&feed, &both.origin);
    let status = until("by the relay", &feed, |status| status.upstreams[0].is_in_use);
    assert_eq!((status.address, status.upstreams[1].is_in_use), (both.address.to_string(), false));
    let mut by_relay = true;
    for round in 0..8 {
        let (begun, is_begun) = (feed.status().received, rng.bool());
        both.origin.append(rng, rng.clone().usize(40..120));
        until("a part of it", &feed, |status| !is_begun || status.received != begun);
        by_relay = !by_relay;
        both.only(by_relay);
        both.origin.append(rng, 5);
        converged(&feed, &both.origin);
        assert_eq!(received(&journal), both.expected(&placed()), "seed {seed}, round {round}");
    }
    let status = until("by the relay again", &feed, |status| status.upstreams[0].is_in_use);
    assert!(status.upstreams[1].last_error.is_some() && status.reconnects >= 8, "{status:?}");
    both.server = None;
    until("both are gone", &feed, |status| {
        status.upstreams.iter().all(|upstream| upstream.last_error.is_some() && !upstream.is_in_use)
    });
    assert!(!feed.status().is_halted());
}

#[test]
fn an_upstream_that_refuses_a_feed_hinders_no_other_and_only_what_all_refuse_halts_it() {
    let mut both = Both::start();
    both.origin.append(&mut Rng::with_seed(1), 30);
    let list = both.dir.path().join("access.json");
    let stock = FeedFilter::from(FeedPart::categories(["stock"]).and_types(["noted"]));
    let security = Some(confined(&list, std::slice::from_ref(&stock)));
    let refusing = ServeOptions { security, ..in_small_parts() };
    let refusing = serve(both.origin.store().journal(), "127.0.0.1:0", refusing).unwrap();
    let address = |server: &Server| server.local_addr().to_string();
    let addresses = [address(&refusing), both.origin.address.to_string()];
    // Which journal it is, is said by the first alone.
    let feed = both.feed(addresses.clone(), &placed());
    assert!(denied(&halted(&feed)));
    let not_asked = feed.status().upstreams[1].last_error.clone();
    assert!(matches!(not_asked, Some(ShippingError::NotAsked)), "{not_asked:?}");
    feed.stop().unwrap();
    let feed = both.feed([addresses[1].clone(), addresses[0].clone()], &placed());
    converged(&feed, &both.origin);
    feed.stop().unwrap();
    both.origin.append(&mut Rng::with_seed(2), 30);
    let feed = both.feed(addresses.clone(), &placed());
    let journal = converged(&feed, &both.origin);
    assert_eq!(received(&journal), both.expected(&placed()));
    let status = until("it is served", &feed, |status| status.upstreams[1].is_in_use);
    assert!(status.upstreams[0].last_error.as_ref().is_some_and(denied), "{status:?}");
    both.origin.server.take().unwrap().shutdown();
    until("nobody serves", &feed, |status| status.upstreams[1].last_error.is_some());
    assert!(!feed.status().is_halted(), "the origin may come back");
    feed.stop().unwrap();
    let feed = both.feed([addresses[0].clone(), addresses[0].clone()], &placed());
    assert!(denied(&halted(&feed)));
    let none = follow_feed(
        Arc::new(OsFs),
        &both.dir.path().join("none"),
        Vec::<String>::new(),
        placed(),
        options(),
    );
    assert!(matches!(none, Err(ShippingError::Open(_))), "{none:?}");
}

#[test]
fn a_feed_leaves_a_relay_that_does_not_hear_from_its_origin_if_there_is_another_upstream() {
    let rng = &mut Rng::with_seed(3);
    let mut both = Both::start();
    both.origin.append(rng, 30);
    let feed = both.feed(both.addresses(), &placed());
    let place = both.dir.path().join("only");
    let only = FollowOptions { deadlines: impatient(), ..options() };
    let only = follow_feed(Arc::new(OsFs), &place, both.address.to_string(), placed(), only);
    let only = only.unwrap();
    for feed in [&feed, &only] {
        converged(feed, &both.origin);
        until("lag is known", feed, |status| status.lag_events() == Some(0));
    }
    assert_eq!(feed.status().address, both.address.to_string());
    let (end, sessions) = (only.status().received, only.status().reconnects);
    both.way.take().unwrap().shutdown();
    both.origin.append(rng, 30);
    let journal = converged(&feed, &both.origin);
    assert_eq!(received(&journal), both.expected(&placed()));
    let status = until("by the origin", &feed, |status| status.lag_events() == Some(0));
    assert_eq!(status.address, both.origin.address.to_string());
    assert!(matches!(status.upstreams[0].last_error, Some(ShippingError::Apart)), "{status:?}");
    let status = until("it knows no lag", &only, |status| status.lag_events().is_none());
    assert_eq!((status.received, status.reconnects), (end, sessions), "nobody else is there");
}

/// What a relay that is apart has of an out-of-date history is nothing that halts; the origin's own word is.
#[test]
fn who_tells_a_feed_that_the_history_is_another_one_decides_whether_others_are_asked() {
    let rng = &mut Rng::with_seed(5);
    let mut both = Both::start();
    both.origin.append(rng, 40);
    let way = both.way.take().unwrap();
    let address = way.local_addr();
    way.shutdown();
    both.origin.close();
    let older = both.dir.path().join("older");
    copy_dir(&both.origin.dir, &older);
    both.origin.open();
    both.origin.append(rng, 40);
    let way = serve_at(both.origin.store().journal(), address);
    let feed = both.feed(both.address.to_string(), &placed());
    let had = received(&converged(&feed, &both.origin));
    feed.stop().unwrap();
    // The origin loses what the relay and the feed have, and the relay hears nothing of that.
    way.shutdown();
    both.origin.close();
    replace_dir(&both.origin.dir, &older);
    both.origin.open();
    let addresses = [both.origin.address, both.address].map(|address| address.to_string());
    let feed = both.feed(addresses, &placed());
    match halted(&feed) {
        ShippingError::Feed(FeedError::Replaced { told_by: Speaker::Origin, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(feed.status().upstreams[1].last_error.is_none(), "the relay isn't asked");
    assert_eq!(received(&feed.journal().unwrap()), had);
    feed.stop().unwrap();
    // A feed of what the origin has now goes on there, whatever the relay says.
    fs::remove_dir_all(both.dir.path().join("feed")).unwrap();
    both.origin.append(rng, 10);
    let feed = both.feed(both.origin.address.to_string(), &placed());
    converged(&feed, &both.origin);
    feed.stop().unwrap();
    let feed = both.feed(both.addresses(), &placed());
    both.origin.append(rng, 10);
    let journal = converged(&feed, &both.origin);
    assert_eq!(received(&journal), both.expected(&placed()));
    match &feed.status().upstreams[0].last_error {
        Some(ShippingError::Fork(at)) if at.told_by == Speaker::RelayApart => {}
        other => panic!("{other:?}"),
    }
}
