//! A wire that fails: a proxy between a mirror and its origin.
//!
//! ```text
//!   mirror ◀──▶ proxy ◀──▶ origin      each direction is copied; faults strike behind so many bytes of one
//!                 │
//!                 └── cut_all, hold: what happens to all connections at once, from outside
//! ```
#![allow(dead_code, reason = "each of the test programs uses a part of it")]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// It is cut, both sides are told.
    Cut,
    /// This bit of the next byte is flipped.
    Flip(u8),
    /// Nothing is taken from this side for so long; what it says waits.
    Delay(Duration),
    /// So many of the next bytes come twice.
    Repeat(usize),
    /// This side sees the connection closed; the other one isn't told, and talks to nobody.
    HalfOpen,
    /// Both sides talk to nobody.
    Vanish,
}

/// One fault of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// In what the origin says, or the mirror.
    pub(crate) of_origin: bool,
    /// Behind so many bytes.
    pub(crate) at: usize,
    pub(crate) what: What,
}

impl Fault {
    /// Any of them, within so many bytes.
    pub(crate) fn any(rng: &mut fastrand::Rng, within: usize) -> Self {
        let what = match rng.u8(..10) {
            0..3 => What::Cut,
            3..6 => What::Flip(rng.u8(..8)),
            6 => What::Delay(Duration::from_millis(rng.u64(1..40))),
            7 => What::Repeat(rng.usize(1..3000)),
            8 => What::HalfOpen,
            _ => What::Vanish,
        };
        // A mirror says little: a hundred bytes and its acknowledgements.
        let of_origin = rng.u8(..4) > 0;
        let at = rng.usize(..if of_origin { within } else { within.min(600) });
        Self { of_origin, at, what }
    }
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    /// Where connections are forwarded to that are made from now on.
    origin: Mutex<SocketAddr>,
    connections: Mutex<Vec<Weak<Connection>>>,
    held: Mutex<bool>,
    released: Condvar,
    struck: AtomicUsize,
}

struct Connection {
    mirror: TcpStream,
    origin: TcpStream,
    /// What either side says goes nowhere.
    vanished: AtomicBool,
}

impl Connection {
    fn close(&self) {
        drop(self.mirror.shutdown(Shutdown::Both));
        drop(self.origin.shutdown(Shutdown::Both));
    }
}

impl Proxy {
    /// Forwards to `origin`, for as long as this process lives; `faults` are those of a connection by its number.
    pub(crate) fn start(
        origin: SocketAddr,
        mut faults: impl FnMut(usize) -> Vec<Fault> + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            origin: Mutex::new(origin),
            connections: Mutex::default(),
            held: Mutex::default(),
            released: Condvar::new(),
            struck: AtomicUsize::new(0),
        });
        let for_thread = Arc::clone(&shared);
        std::thread::spawn(move || {
            for (number, mirror) in listener.incoming().map_while(Result::ok).enumerate() {
                let faults = faults(number);
                // An origin that is away is what the mirror sees as well.
                let origin = *for_thread.origin.lock().unwrap();
                let Ok(origin) = TcpStream::connect(origin) else { continue };
                for_thread.connect(mirror, origin, &faults);
            }
        });
        Self { address, shared }
    }

    /// Cuts all connections that there are.
    pub(crate) fn cut_all(&self) {
        let connections = std::mem::take(&mut *self.shared.connections.lock().unwrap());
        connections.iter().filter_map(Weak::upgrade).for_each(|connection| connection.close());
    }

    /// Whoever connects from now on is forwarded to this address: an origin that was away has another port.
    pub(crate) fn lead_to(&self, origin: SocketAddr) {
        *self.shared.origin.lock().unwrap() = origin;
    }

    /// While it is held, nothing is forwarded.
    pub(crate) fn hold(&self, held: bool) {
        *self.shared.held.lock().unwrap() = held;
        self.shared.released.notify_all();
    }

    /// How many faults have struck.
    pub(crate) fn struck(&self) -> usize {
        self.shared.struck.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, mirror: TcpStream, origin: TcpStream, faults: &[Fault]) {
        drop((mirror.set_nodelay(true), origin.set_nodelay(true)));
        let connection = Connection { mirror, origin, vanished: AtomicBool::new(false) };
        let connection = Arc::new(connection);
        {
            let mut all = self.connections.lock().unwrap();
            all.retain(|connection| connection.strong_count() > 0);
            all.push(Arc::downgrade(&connection));
        }
        for of_origin in [true, false] {
            let mut own: Vec<_> =
                faults.iter().filter(|fault| fault.of_origin == of_origin).copied().collect();
            own.sort_by_key(|fault| fault.at);
            let (shared, connection) = (Arc::clone(self), Arc::clone(&connection));
            std::thread::spawn(move || {
                let (from, to) = match of_origin {
                    true => (&connection.origin, &connection.mirror),
                    false => (&connection.mirror, &connection.origin),
                };
                let went_on = shared.forward(from, to, &connection.vanished, &own);
                if !matches!(went_on, Ok(Open::Half)) {
                    connection.close();
                }
            });
        }
    }

    fn wait_while_held(&self) {
        let mut held = self.held.lock().unwrap();
        while *held {
            held = self.released.wait(held).unwrap();
        }
    }

    fn forward(
        &self,
        mut from: &TcpStream,
        mut to: &TcpStream,
        vanished: &AtomicBool,
        mut faults: &[Fault],
    ) -> io::Result<Open> {
        let (mut passed, mut buffer) = (0, [0; 4096]);
        loop {
            let read = from.read(&mut buffer);
            // The end of what is said waits, too.
            self.wait_while_held();
            let len = read?;
            if len == 0 {
                return Ok(Open::No);
            }
            if vanished.load(Ordering::Acquire) {
                continue;
            }
            let mut rest = &mut buffer[..len];
            while let Some((fault, others)) = faults.split_first()
                && fault.at < passed + rest.len()
            {
                faults = others;
                let (front, behind) = rest.split_at_mut(fault.at.saturating_sub(passed));
                to.write_all(front)?;
                passed += front.len();
                rest = behind;
                self.struck.fetch_add(1, Ordering::Relaxed);
                match fault.what {
                    What::Cut => return Ok(Open::No),
                    What::Flip(bit) => rest[0] ^= 1 << bit,
                    What::Delay(time) => std::thread::sleep(time),
                    What::Repeat(len) => to.write_all(&rest[..len.min(rest.len())])?,
                    What::HalfOpen => {
                        vanished.store(true, Ordering::Release);
                        from.shutdown(Shutdown::Both)?;
                        return Ok(Open::Half);
                    }
                    What::Vanish => {
                        vanished.store(true, Ordering::Release);
                        rest = &mut [];
                    }
                }
            }
            to.write_all(rest)?;
            passed += rest.len();
        }
    }
}

enum Open {
    No,
    /// The other side still talks, until it gives up.
    Half,
}
